//! Arrays as the reference computes with them: dense, row-major, f64 or i128.

use half::{bf16, f16};
use mica_kernels::ViewMut;
use mica_kernels::elementwise::complex::Pair;
use mica_kernels::gemm::{FloatType, FloatViewMut, FloatWeight};
use mica_kernels::quant::QuantWeight;
use mica_kernels::view::contiguous_strides;

use crate::backend::{HostView, Operand};
use crate::op::Scalar;
use crate::packed::Experts;
use crate::shape::{Shape, size_of};
use crate::{Dtype, Error, PackedWeight, Result};

/// Values of a float, an integer (or bool) or a complex array.
#[derive(Clone, Debug)]
pub(super) enum Values {
    Float(Vec<f64>),
    Int(Vec<i128>),
    Complex(Vec<Pair>),
}

#[derive(Clone, Debug)]
pub(super) struct Dense {
    pub shape: Shape,
    pub values: Values,
}

impl Dense {
    pub fn floats(shape: &[usize], values: Vec<f64>) -> Dense {
        debug_assert_eq!(size_of(shape), values.len());
        Dense { shape: shape.into(), values: Values::Float(values) }
    }

    pub fn ints(shape: &[usize], values: Vec<i128>) -> Dense {
        debug_assert_eq!(size_of(shape), values.len());
        Dense { shape: shape.into(), values: Values::Int(values) }
    }

    pub fn complex(shape: &[usize], values: Vec<Pair>) -> Dense {
        debug_assert_eq!(size_of(shape), values.len());
        Dense { shape: shape.into(), values: Values::Complex(values) }
    }

    pub fn filled(shape: &[usize], dtype: Dtype, value: Scalar) -> Dense {
        let count = size_of(shape);
        match (value, dtype.is_float()) {
            (Scalar::Int(value), false) => Dense::ints(shape, vec![value as i128; count]),
            (Scalar::UInt(value), false) => Dense::ints(shape, vec![value as i128; count]),
            _ => Dense::floats(shape, vec![value.to_f64(); count]),
        }
    }

    pub fn with_shape(mut self, shape: &[usize]) -> Dense {
        self.shape = shape.into();
        self
    }

    pub fn size(&self) -> usize {
        size_of(&self.shape)
    }

    /// The size of the last dimension, and how many rows there are.
    pub fn rows(&self) -> (usize, usize) {
        let width = self.shape.last().copied().unwrap_or(1);
        (self.size().checked_div(width).unwrap_or(0), width)
    }

    pub fn at(&self, index: usize) -> f64 {
        match &self.values {
            Values::Float(values) => values[index],
            Values::Int(values) => values[index] as f64,
            Values::Complex(values) => values[index].0,
        }
    }

    pub fn pair(&self, index: usize) -> Pair {
        match &self.values {
            Values::Complex(values) => values[index],
            _ => (self.at(index), 0.0),
        }
    }

    pub fn int(&self, index: usize) -> i128 {
        match &self.values {
            Values::Float(values) => values[index] as i128,
            Values::Int(values) => values[index],
            Values::Complex(values) => values[index].0 as i128,
        }
    }

    pub fn is_complex(&self) -> bool {
        matches!(self.values, Values::Complex(_))
    }

    /// Whether the value is not zero.
    pub fn truth(&self, index: usize) -> bool {
        match &self.values {
            Values::Float(values) => values[index] != 0.0,
            Values::Int(values) => values[index] != 0,
            Values::Complex(values) => values[index] != (0.0, 0.0),
        }
    }

    pub fn to_f64(&self) -> Vec<f64> {
        (0..self.size()).map(|index| self.at(index)).collect()
    }

    /// The values at these places, as an array of another shape.
    pub fn gathered(&self, shape: &[usize], places: impl Iterator<Item = usize>) -> Dense {
        match &self.values {
            Values::Float(values) => Dense::floats(shape, places.map(|place| values[place]).collect()),
            Values::Int(values) => Dense::ints(shape, places.map(|place| values[place]).collect()),
            Values::Complex(values) => Dense::complex(shape, places.map(|place| values[place]).collect()),
        }
    }

    /// The values as they are once they have been stored in an array of this dtype.
    pub fn rounded(&self, dtype: Dtype) -> Result<Dense> {
        let mut bytes = vec![0u64; (self.size() * dtype.size()).div_ceil(8)];
        let view = HostView {
            pointer: bytes.as_mut_ptr().cast(),
            shape: self.shape.clone(),
            strides: contiguous_strides(&self.shape).as_slice().into(),
            dtype,
        };
        self.store(&view)?;
        Dense::load(&Operand::Host(view))
    }

    /// The bytes that the values of type `from` are, as values of type `to`.
    pub fn bitcast(&self, from: Dtype, to: Dtype, shape: &[usize]) -> Result<Dense> {
        let mut bytes = vec![0u64; (self.size() * from.size()).div_ceil(8)];
        let view = |dtype: Dtype, shape: &[usize], pointer: *mut u64| HostView {
            pointer: pointer.cast(),
            shape: shape.into(),
            strides: contiguous_strides(shape).as_slice().into(),
            dtype,
        };
        let pointer = bytes.as_mut_ptr();
        self.store(&view(from, &self.shape, pointer))?;
        Dense::load(&Operand::Host(view(to, shape, pointer)))
    }

    pub fn load(operand: &Operand) -> Result<Dense> {
        let view = match operand {
            Operand::Host(view) => view,
            Operand::Packed(weight) => {
                let values = match weight.as_ref() {
                    PackedWeight::Float(float) => float_values(float)?,
                    PackedWeight::Quant(quant) => quantized_values(quant),
                    PackedWeight::Experts(Experts::Float(experts)) => {
                        let each = experts.weights().iter().map(float_values).collect::<Result<Vec<_>>>()?;
                        each.concat()
                    }
                    PackedWeight::Experts(Experts::Quant(experts)) => {
                        experts.weights().iter().flat_map(quantized_values).collect()
                    }
                };
                return Ok(Dense::floats(&weight.shape(), values));
            }
            Operand::Absent => return Err(Error::Kernel("an absent operand was read".into())),
        };
        let offsets = offsets(view);
        macro_rules! read {
            ($t:ty, $convert:expr) => {
                offsets.iter().map(|&offset| $convert(read_at::<$t>(view, offset))).collect()
            };
        }
        let values = match view.dtype {
            Dtype::Bool | Dtype::U8 => Values::Int(read!(u8, i128::from)),
            Dtype::U16 => Values::Int(read!(u16, i128::from)),
            Dtype::U32 => Values::Int(read!(u32, i128::from)),
            Dtype::U64 => Values::Int(read!(u64, i128::from)),
            Dtype::I8 => Values::Int(read!(i8, i128::from)),
            Dtype::I16 => Values::Int(read!(i16, i128::from)),
            Dtype::I32 => Values::Int(read!(i32, i128::from)),
            Dtype::I64 => Values::Int(read!(i64, i128::from)),
            Dtype::F16 => Values::Float(read!(u16, |bits| f16::from_bits(bits).to_f64())),
            Dtype::BF16 => Values::Float(read!(u16, |bits| bf16::from_bits(bits).to_f64())),
            Dtype::F32 => Values::Float(read!(f32, f64::from)),
            Dtype::F64 => Values::Float(read!(f64, |value| value)),
            Dtype::C64 => Values::Complex(read!([f32; 2], |[re, im]: [f32; 2]| (re as f64, im as f64))),
        };
        Ok(Dense { shape: view.shape.clone(), values })
    }

    /// Writes the values, rounded to the view's dtype.
    pub fn store(&self, view: &HostView) -> Result<()> {
        if size_of(&view.shape) != self.size() {
            return Err(Error::Kernel(format!("a result of {:?} for {:?}", self.shape, view.shape).into()));
        }
        macro_rules! write {
            ($t:ty, $value:expr) => {
                for (index, offset) in offsets(view).into_iter().enumerate() {
                    let value: $t = $value(index);
                    write_at(view, offset, value);
                }
            };
        }
        macro_rules! integer {
            ($t:ty) => {
                write!($t, |index| match &self.values {
                    Values::Float(values) => values[index] as $t,
                    Values::Int(values) => values[index] as $t,
                    Values::Complex(_) => self.at(index) as $t,
                })
            };
        }
        match view.dtype {
            Dtype::Bool => write!(u8, |index| self.truth(index) as u8),
            Dtype::U8 => integer!(u8),
            Dtype::U16 => integer!(u16),
            Dtype::U32 => integer!(u32),
            Dtype::U64 => integer!(u64),
            Dtype::I8 => integer!(i8),
            Dtype::I16 => integer!(i16),
            Dtype::I32 => integer!(i32),
            Dtype::I64 => integer!(i64),
            Dtype::F16 => write!(u16, |index| f16::from_f64(self.at(index)).to_bits()),
            Dtype::BF16 => write!(u16, |index| bf16::from_f64(self.at(index)).to_bits()),
            Dtype::F32 => write!(f32, |index| self.at(index) as f32),
            Dtype::F64 => write!(f64, |index| self.at(index)),
            Dtype::C64 => write!([f32; 2], |index| {
                let (re, im) = self.pair(index);
                [re as f32, im as f32]
            }),
        }
        Ok(())
    }
}

/// Every value of a packed float weight, widened.
fn float_values(weight: &FloatWeight) -> Result<Vec<f64>> {
    fn unpack<'a, T: Copy>(
        weight: &FloatWeight,
        values: &'a mut [T],
        wrap: impl Fn(ViewMut<'a, T>) -> FloatViewMut<'a>,
    ) -> Result<()>
    where
        f64: From<T>,
    {
        let view = ViewMut::new(values, &[weight.out(), weight.inputs()])?;
        let task = weight.unpack(wrap(view))?;
        let mut scratch = mica_threads::Scratch::new();
        (0..task.chunks()).for_each(|chunk| task.run(chunk, &mut scratch));
        Ok(())
    }
    macro_rules! unpack {
        ($t:ty, $variant:ident) => {{
            let mut values = vec![<$t>::from_bits(0); weight.out() * weight.inputs()];
            unpack(weight, &mut values, FloatViewMut::$variant)?;
            values.into_iter().map(f64::from).collect()
        }};
    }
    Ok(match weight.float_type() {
        FloatType::F32 => unpack!(f32, F32),
        FloatType::Bf16 => unpack!(bf16, Bf16),
        FloatType::F16 => unpack!(f16, F16),
    })
}

/// Every value of a quantized weight: code · scale + bias.
fn quantized_values(weight: &QuantWeight) -> Vec<f64> {
    (0..weight.shape()[0]).flat_map(|row| weight.row_values(row)).collect()
}

/// One element, for views that the evaluator gave (live memory) and offsets of [`offsets`].
fn read_at<T: Copy>(view: &HostView, offset: isize) -> T {
    let at = view.pointer.wrapping_offset(offset * view.dtype.size() as isize);
    // SAFETY: the offset is inside the view, whose memory the evaluator keeps alive.
    unsafe { at.cast::<T>().read_unaligned() }
}

fn write_at<T: Copy>(view: &HostView, offset: isize, value: T) {
    let at = view.pointer.wrapping_offset(offset * view.dtype.size() as isize);
    // SAFETY: the offset is inside the view, whose memory the evaluator keeps alive and orders.
    unsafe { at.cast::<T>().write_unaligned(value) }
}

/// Element offsets in row-major order.
fn offsets(view: &HostView) -> Vec<isize> {
    let mut list = vec![0isize];
    for (&size, &stride) in view.shape.iter().zip(&view.strides) {
        list = list.iter().flat_map(|&base| (0..size).map(move |i| base + i as isize * stride)).collect();
    }
    list
}

/// The index of an element per dimension.
pub(super) fn unravel(mut index: usize, shape: &[usize]) -> Shape {
    let mut result = Shape::from_elem(0, shape.len());
    for axis in (0..shape.len()).rev() {
        result[axis] = index % shape[axis];
        index /= shape[axis];
    }
    result
}

/// The row-major number of an index.
pub(super) fn ravel(index: &[usize], shape: &[usize]) -> usize {
    index.iter().zip(shape).fold(0, |sum, (&at, &size)| sum * size + at)
}
