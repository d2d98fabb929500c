//! Rows of float arrays of any half or single type: what row kernels read and write.
//!
//! A row is the last dimension. Rows are widened to f32 in scratch, worked on there, and rounded
//! once when they are written, so that a kernel is written for f32 alone.

use half::{bf16, f16};
use mica_simd::{Element, Isa, Kernel, LANES, Vector, dispatch};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::check_output;
use crate::error::KernelError;
use crate::layout::Linear;

/// A float array as rows.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    pointer: *mut u8,
    dtype: Dtype,
    outer: Linear,
    /// Elements of a row.
    pub width: usize,
    stride: isize,
}

// SAFETY: made from a DynView or DynViewMut, whose promises it inherits.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

/// Runs `$body` with `$T` being the float type behind `$dtype`.
macro_rules! with_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            Dtype::BF16 => {
                type $T = bf16;
                $body
            }
            Dtype::F16 => {
                type $T = f16;
                $body
            }
            _ => {
                type $T = f32;
                $body
            }
        }
    };
}

/// Refuses other types than f32, bf16 and f16.
pub(crate) fn check_float(kernel: &'static str, name: &str, dtype: Dtype) -> Result<(), KernelError> {
    if matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
        return Ok(());
    }
    let message = format!("{name} is {dtype}, expected float32, bfloat16 or float16");
    Err(KernelError::new(kernel, message))
}

/// Refuses a shape that differs from what is expected.
pub(crate) fn check_shape(
    kernel: &'static str,
    name: &str,
    shape: &[usize],
    expected: &[usize],
) -> Result<(), KernelError> {
    if shape == expected {
        return Ok(());
    }
    Err(KernelError::new(kernel, format!("{name} has shape {shape:?}, expected {expected:?}")))
}

impl Rows {
    /// Rows to read.
    pub fn new(kernel: &'static str, name: &str, view: &DynView) -> Result<Rows, KernelError> {
        check_float(kernel, name, view.dtype)?;
        let (Some(&width), Some(&stride)) = (view.shape.last(), view.strides.last()) else {
            return Err(KernelError::new(kernel, format!("{name} has no dimensions, expected rows")));
        };
        let rank = view.shape.len() - 1;
        Ok(Rows {
            pointer: view.pointer.cast_mut(),
            dtype: view.dtype,
            outer: Linear::new(&view.shape[..rank], &view.strides[..rank]),
            width,
            stride: if width == 1 { 1 } else { stride },
        })
    }

    /// Rows to write.
    pub fn new_mut(kernel: &'static str, name: &str, view: &DynViewMut) -> Result<Rows, KernelError> {
        check_output(kernel, view)?;
        Rows::new(kernel, name, &view.as_view())
    }

    /// The number of rows.
    pub fn count(&self) -> usize {
        self.outer.size()
    }

    /// Where a row (or the last one) begins, and the bytes of an element: for asking memory early.
    #[inline(always)]
    pub fn address(&self, row: usize) -> (*const u8, usize) {
        let size = self.dtype.size();
        let offset = self.outer.offset(row.min(self.count() - 1));
        (self.pointer.wrapping_offset(offset * size as isize).cast_const(), size)
    }

    /// Where a row lies, if it is f32 without gaps: for kernels that take it from there.
    #[inline(always)]
    pub fn dense(&self, row: usize) -> Option<*const f32> {
        (self.dtype == Dtype::F32 && self.stride == 1).then(|| self.address(row).0.cast())
    }

    pub fn is_f32(&self) -> bool {
        self.dtype == Dtype::F32
    }

    /// Widens a row.
    ///
    /// # Safety
    /// `row < count()` and nobody writes the row meanwhile. `out` is as long as a row.
    #[inline(always)]
    pub unsafe fn load<V: Vector>(&self, row: usize, out: &mut [f32]) {
        debug_assert!(row < self.count() && out.len() == self.width);
        // SAFETY: the row is inside the view.
        unsafe { load_any(V::ISA, self.dtype, self.pointer, self.outer.offset(row), self.stride, out) }
    }

    /// Widens the part of a row that begins at element `at`.
    ///
    /// # Safety
    /// As for [`Rows::load`]; `at + out.len()` is at most the width.
    #[inline(always)]
    pub unsafe fn load_from<V: Vector>(&self, row: usize, at: usize, out: &mut [f32]) {
        debug_assert!(row < self.count() && at + out.len() <= self.width);
        let offset = self.outer.offset(row) + at as isize * self.stride;
        // SAFETY: the row is inside the view.
        unsafe { load_any(V::ISA, self.dtype, self.pointer, offset, self.stride, out) }
    }

    /// Rounds and writes the part of a row that begins at element `at`.
    ///
    /// # Safety
    /// As for [`Rows::store`]; `at + values.len()` is at most the width.
    #[inline(always)]
    pub unsafe fn store_from<V: Vector>(&self, row: usize, at: usize, values: &[f32]) {
        debug_assert!(row < self.count() && at + values.len() <= self.width);
        let offset = self.outer.offset(row) + at as isize * self.stride;
        // SAFETY: the row is inside the view, which may be written.
        unsafe { store_any(V::ISA, self.dtype, self.pointer, offset, self.stride, values) }
    }

    /// Rounds and writes a row.
    ///
    /// # Safety
    /// The rows were made by `new_mut`, `row < count()`, and nobody else touches the row
    /// meanwhile. `values` is as long as a row.
    #[inline(always)]
    pub unsafe fn store<V: Vector>(&self, row: usize, values: &[f32]) {
        debug_assert!(row < self.count() && values.len() == self.width);
        // SAFETY: the row is inside the view, which may be written.
        unsafe { store_any(V::ISA, self.dtype, self.pointer, self.outer.offset(row), self.stride, values) }
    }
}

/// Widens `out.len()` elements from `pointer + offset` (in elements) that lie `stride` apart.
///
/// Never inlined: a row is long enough to pay for a call, and kernels that load many things would
/// else be three times their size.
///
/// # Safety
/// They are valid for reading and of type `dtype` (f32, bf16 or f16).
#[inline(never)]
pub(crate) unsafe fn load_any(
    isa: Isa,
    dtype: Dtype,
    pointer: *const u8,
    offset: isize,
    stride: isize,
    out: &mut [f32],
) {
    with_float!(dtype, T => {
        let from = pointer.cast::<T>().wrapping_offset(offset);
        dispatch(isa, LoadRun { from, stride, out })
    })
}

/// Rounds and writes `values` to places from `pointer + offset` (in elements) that lie `stride`
/// apart.
///
/// # Safety
/// They are valid for writing and of type `dtype` (f32, bf16 or f16).
#[inline(never)]
pub(crate) unsafe fn store_any(
    isa: Isa,
    dtype: Dtype,
    pointer: *mut u8,
    offset: isize,
    stride: isize,
    values: &[f32],
) {
    with_float!(dtype, T => {
        let to = pointer.cast::<T>().wrapping_offset(offset);
        dispatch(isa, StoreRun { to, stride, values })
    })
}

/// The arguments of [`load_any`], whose promises hold where one is made.
struct LoadRun<'a, T> {
    from: *const T,
    stride: isize,
    out: &'a mut [f32],
}

impl<T: Element> Kernel for LoadRun<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        // SAFETY: promised by the caller of `load_any`.
        unsafe { load_run::<V, T>(self.from, self.stride, self.out) }
    }
}

/// The arguments of [`store_any`], whose promises hold where one is made.
struct StoreRun<'a, T> {
    to: *mut T,
    stride: isize,
    values: &'a [f32],
}

impl<T: Element> Kernel for StoreRun<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        // SAFETY: promised by the caller of `store_any`.
        unsafe { store_run::<V, T>(self.to, self.stride, self.values) }
    }
}

/// Widens `out.len()` elements that lie `stride` apart.
///
/// # Safety
/// They are valid for reading.
#[inline(always)]
unsafe fn load_run<V: Vector, T: Element>(from: *const T, stride: isize, out: &mut [f32]) {
    // SAFETY: promised by the caller.
    unsafe {
        if stride == 1 {
            let (whole, rest) = out.as_chunks_mut::<LANES>();
            for (i, part) in whole.iter_mut().enumerate() {
                T::load::<V>(from.add(i * LANES)).store(part.as_mut_ptr());
            }
            if !rest.is_empty() {
                T::load_part::<V>(from.add(whole.len() * LANES), rest.len()).to_slice(rest);
            }
        } else {
            for (i, value) in out.iter_mut().enumerate() {
                *value = (*from.offset(i as isize * stride)).to_f32();
            }
        }
    }
}

/// Rounds and writes `values` to places that lie `stride` apart.
///
/// # Safety
/// They are valid for writing.
#[inline(always)]
pub(crate) unsafe fn store_run<V: Vector, T: Element>(to: *mut T, stride: isize, values: &[f32]) {
    // SAFETY: promised by the caller.
    unsafe {
        if stride == 1 {
            for (i, part) in values.chunks(LANES).enumerate() {
                T::store_part(V::from_slice(part, 0.0), to.add(i * LANES), part.len());
            }
        } else {
            for (i, &value) in values.iter().enumerate() {
                *to.offset(i as isize * stride) = T::from_f32(value);
            }
        }
    }
}
