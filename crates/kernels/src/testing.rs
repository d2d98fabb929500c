//! Arrays in odd layouts, for the tests of kernels over run-time typed views.

use mica_testkit::Rng;

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::element::{CastTo, with_element};
use crate::layout::Linear;
use crate::view::{Strides, contiguous_strides, extent};

/// How a shape lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Layout {
    Contiguous,
    /// Rows lie apart, and the first element is not at the start.
    Padded,
    /// Dimensions in reverse order (column-major).
    Transposed,
    /// Every dimension backwards, two steps at a time.
    Reversed,
}

/// All layouts; the first two suit outputs of any kind.
pub(crate) fn layouts(_shape: &[usize]) -> [Layout; 4] {
    [Layout::Contiguous, Layout::Padded, Layout::Transposed, Layout::Reversed]
}

const POISON: u8 = 0xa5;

/// An array with its memory.
#[derive(Clone)]
pub(crate) struct Laid {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub strides: Strides,
    pub offset: usize,
    pub bytes: Vec<u64>,
}

impl Laid {
    pub fn poisoned(dtype: Dtype, shape: &[usize], layout: Layout) -> Laid {
        let mut strides = match layout {
            Layout::Contiguous => contiguous_strides(shape),
            Layout::Padded => {
                let mut wide: Vec<usize> = shape.to_vec();
                if let Some(last) = wide.last_mut() {
                    *last += 3;
                }
                contiguous_strides(&wide)
            }
            Layout::Transposed => {
                let mut back = shape.to_vec();
                back.reverse();
                let mut strides = contiguous_strides(&back);
                strides.reverse();
                strides
            }
            Layout::Reversed => contiguous_strides(shape).iter().map(|stride| -2 * stride).collect(),
        };
        for (stride, &size) in strides.iter_mut().zip(shape) {
            if size == 1 {
                *stride = 12345; // never to be used
            }
        }
        let counted: Strides =
            strides.iter().zip(shape).map(|(&stride, &size)| if size == 1 { 0 } else { stride }).collect();
        let (low, high) = extent(shape, &counted).unwrap_or((0, 0));
        let front = if layout == Layout::Contiguous { 0 } else { 5 };
        let elements = (high - low + 1) as usize + 2 * front;
        let poison = u64::from_ne_bytes([POISON; 8]);
        Laid {
            dtype,
            shape: shape.to_vec(),
            strides,
            offset: (front as isize - low) as usize,
            bytes: vec![poison; (elements * dtype.size()).div_ceil(8)],
        }
    }

    pub fn new(dtype: Dtype, shape: &[usize], layout: Layout, values: &[f64]) -> Laid {
        let mut laid = Laid::poisoned(dtype, shape, layout);
        assert_eq!(values.len(), laid.linear().size());
        let view = laid.view_mut();
        let linear = laid.linear();
        for (at, &value) in values.iter().enumerate() {
            with_element!(dtype, T => {
                let value: T = value.cast();
                // SAFETY: `at` is inside the shape, whose memory was made for it.
                unsafe { *view.pointer.cast::<T>().offset(linear.offset(at)) = value }
            });
        }
        laid
    }

    pub fn contiguous(dtype: Dtype, shape: &[usize], values: &[f64]) -> Laid {
        Laid::new(dtype, shape, Layout::Contiguous, values)
    }

    /// Standard normal values, integers from -50 to 49 for the types that have them.
    #[allow(dead_code)]
    pub fn random(dtype: Dtype, shape: &[usize], layout: Layout, rng: &mut Rng) -> Laid {
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| match dtype {
                Dtype::Bool => rng.range(0..2) as f64,
                Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => rng.range(0..100) as f64,
                _ if dtype.is_inexact() => rng.normal() as f64,
                _ => rng.range(0..100) as f64 - 50.0,
            })
            .collect();
        Laid::new(dtype, shape, layout, &values)
    }

    pub fn linear(&self) -> Linear {
        Linear::new(&self.shape, &self.strides)
    }

    pub fn view(&self) -> DynView {
        DynView {
            pointer: self.bytes.as_ptr().cast::<u8>().wrapping_add(self.offset * self.dtype.size()),
            dtype: self.dtype,
            shape: self.shape.as_slice().into(),
            strides: self.strides.clone(),
        }
    }

    pub fn view_mut(&mut self) -> DynViewMut {
        DynViewMut {
            pointer: self.bytes.as_mut_ptr().cast::<u8>().wrapping_add(self.offset * self.dtype.size()),
            dtype: self.dtype,
            shape: self.shape.as_slice().into(),
            strides: self.strides.clone(),
        }
    }

    /// All elements in row-major order.
    pub fn values(&self) -> Vec<f64> {
        let (view, linear) = (self.view(), self.linear());
        (0..linear.size())
            .map(|at| {
                with_element!(self.dtype, T => {
                    // SAFETY: inside the shape, whose memory was made for it.
                    let value = unsafe { *view.pointer.cast::<T>().offset(linear.offset(at)) };
                    CastTo::<f64>::cast(value)
                })
            })
            .collect()
    }

    /// The value that element `at` of `shape` sees when this is broadcast to it.
    pub fn broadcast_value(&self, shape: &[usize], at: usize) -> f64 {
        let missing = shape.len() - self.shape.len();
        let (mut rest, mut own, mut step) = (at, 0, 1);
        for axis in (0..shape.len()).rev() {
            let index = rest % shape[axis];
            rest /= shape[axis];
            if axis >= missing {
                let size = self.shape[axis - missing];
                own += if size == 1 { 0 } else { index * step };
                step *= size;
            }
        }
        self.values()[own]
    }

    /// Panics if a byte that is in no element was written.
    pub fn check_untouched_outside(&self) {
        let size = self.dtype.size();
        let bytes: &[u8] = bytemuck::cast_slice(&self.bytes);
        let mut inside = vec![false; bytes.len()];
        let linear = self.linear();
        for at in 0..linear.size() {
            let from = (self.offset as isize + linear.offset(at)) as usize * size;
            inside[from..from + size].fill(true);
        }
        for (i, &byte) in bytes.iter().enumerate() {
            assert!(inside[i] || byte == POISON, "byte {i} outside the view was written");
        }
    }
}
