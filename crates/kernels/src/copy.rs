//! Moving values: strided copies, fills, ranges, padding.
//!
//! [`copy`] is what materialises a view, concatenates (into sub-views of the output) and updates
//! slices. It looks at the layouts only: the type must be the same on both sides, and any type
//! will do. Source and output must not overlap.

use mica_threads::{Scratch, Task};
use smallvec::SmallVec;

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::element::{CastTo, Element, with_element};
use crate::elementwise::tile::{CHUNK, broadcast, check_output};
use crate::error::KernelError;
use crate::layout::{Linear, by_size, scatter_run};

/// Side of a transposed chunk: 128 × 128 = [`CHUNK`] elements.
const SIDE: usize = 128;
/// Side of the tile that is turned at a time: 16 f32 are a cache line both ways.
const TURN: usize = 16;

/// `out = source`, repeated along size-1 and missing dimensions where `out` has more.
pub fn copy(source: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    if source.dtype != out.dtype {
        let message = format!("source is {}, output {}: use cast to convert", source.dtype, out.dtype);
        return Err(KernelError::new("copy", message));
    }
    check_output("copy", &out)?;
    let source = broadcast("copy", &source, &out.shape)?;
    let mut axes: SmallVec<[Axis; 6]> = SmallVec::new();
    for (axis, &size) in out.shape.iter().enumerate() {
        if size != 1 {
            axes.push(Axis { size, from: source.strides[axis], to: out.strides[axis] });
        }
    }
    let size: usize = out.shape.iter().product();
    // The order of a copy is free: the output's memory order makes writes sequential.
    axes.sort_by_key(|axis| std::cmp::Reverse(axis.to.unsigned_abs()));
    let mut merged: SmallVec<[Axis; 6]> = SmallVec::new();
    for axis in axes {
        match merged.last_mut() {
            Some(last)
                if last.from == axis.from * axis.size as isize && last.to == axis.to * axis.size as isize =>
            {
                *last = Axis { size: last.size * axis.size, ..axis };
            }
            _ => merged.push(axis),
        }
    }
    let inner = merged.pop().unwrap_or(Axis { size: 1, from: 1, to: 1 });
    let across = merged.iter().position(|axis| inner.to == 1 && inner.from != 1 && axis.from == 1);
    let plan = match across {
        Some(at) if inner.size > 1 && inner.from != 0 => {
            let across = merged.remove(at);
            Plan::Transpose { across }
        }
        _ => Plan::Runs,
    };
    Ok(Box::new(Copy {
        source: source.pointer,
        out: out.pointer,
        bytes: out.dtype.size(),
        outer: merged,
        inner,
        plan,
        size,
    }))
}

#[derive(Clone, Copy, Debug)]
struct Axis {
    size: usize,
    /// Strides of source and output, in elements.
    from: isize,
    to: isize,
}

enum Plan {
    /// Along the inner axis, run by run.
    Runs,
    /// The source is dense along `across`, the output along the inner axis.
    Transpose { across: Axis },
}

struct Copy {
    source: *const u8,
    out: *mut u8,
    bytes: usize,
    outer: SmallVec<[Axis; 6]>,
    inner: Axis,
    plan: Plan,
    size: usize,
}

// SAFETY: made of views whose maker promised that they may be used from any thread; chunks write
// disjoint elements.
unsafe impl Send for Copy {}
// SAFETY: as above.
unsafe impl Sync for Copy {}

impl Task for Copy {
    fn chunks(&self) -> usize {
        if self.size == 0 {
            return 0;
        }
        match self.plan {
            Plan::Runs => self.size.div_ceil(CHUNK),
            Plan::Transpose { across } => {
                let outer: usize = self.outer.iter().map(|axis| axis.size).product();
                outer * across.size.div_ceil(SIDE) * self.inner.size.div_ceil(SIDE)
            }
        }
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        // SAFETY: every element named is inside both views, which were checked to agree in shape.
        unsafe {
            match self.plan {
                Plan::Runs => by_size!(self.bytes, copy_runs(self, chunk)),
                Plan::Transpose { across } => by_size!(self.bytes, copy_turned(self, across, chunk)),
            }
        }
    }

    fn name(&self) -> &'static str {
        "copy"
    }
}

/// Offsets in source and output of an index over `outer`, given in row-major order.
fn offsets(outer: &[Axis], mut at: usize) -> (isize, isize) {
    let (mut from, mut to) = (0, 0);
    for axis in outer.iter().rev() {
        let index = (at % axis.size) as isize;
        at /= axis.size;
        from += index * axis.from;
        to += index * axis.to;
    }
    (from, to)
}

unsafe fn copy_runs<T: std::marker::Copy>(copy: &Copy, chunk: usize) {
    let (source, out) = (copy.source.cast::<T>(), copy.out.cast::<T>());
    let Axis { size: inner, from: from_step, to: to_step } = copy.inner;
    let end = copy.size.min((chunk + 1) * CHUNK);
    let mut at = chunk * CHUNK;
    let mut index: SmallVec<[usize; 6]> = SmallVec::from_elem(0, copy.outer.len());
    let mut rest = at / inner;
    for (place, axis) in index.iter_mut().zip(&copy.outer).rev() {
        *place = rest % axis.size;
        rest /= axis.size;
    }
    let (mut from_base, mut to_base) = offsets(&copy.outer, at / inner);
    while at < end {
        let first = at % inner;
        let length = (inner - first).min(end - at);
        // SAFETY: the caller's; elements first .. first + length of this row.
        unsafe {
            let from = source.offset(from_base + first as isize * from_step);
            let to = out.offset(to_base + first as isize * to_step);
            match (from_step, to_step) {
                (1, 1) if length >= 16 => std::ptr::copy_nonoverlapping(from, to, length),
                (0, 1) => std::slice::from_raw_parts_mut(to, length).fill(*from),
                _ => {
                    for i in 0..length as isize {
                        *to.offset(i * to_step) = *from.offset(i * from_step);
                    }
                }
            }
        }
        at += length;
        for (place, axis) in index.iter_mut().zip(&copy.outer).rev() {
            *place += 1;
            from_base += axis.from;
            to_base += axis.to;
            if *place < axis.size {
                break;
            }
            from_base -= axis.from * axis.size as isize;
            to_base -= axis.to * axis.size as isize;
            *place = 0;
        }
    }
}

unsafe fn copy_turned<T: std::marker::Copy>(copy: &Copy, across: Axis, chunk: usize) {
    let (source, out) = (copy.source.cast::<T>(), copy.out.cast::<T>());
    let (wide, high) = (copy.inner.size.div_ceil(SIDE), across.size.div_ceil(SIDE));
    let (column, row) = (chunk % wide * SIDE, chunk / wide % high * SIDE);
    let (from_base, to_base) = offsets(&copy.outer, chunk / (wide * high));
    let (columns, rows) = ((column + SIDE).min(copy.inner.size), (row + SIDE).min(across.size));
    for i in (row..rows).step_by(TURN) {
        for j in (column..columns).step_by(TURN) {
            // SAFETY: the caller's; rows i.. and columns j.. of this outer index.
            unsafe {
                let from = source.offset(from_base + i as isize + j as isize * copy.inner.from);
                let to = out.offset(to_base + i as isize * across.to + j as isize);
                let (tall, broad) = (TURN.min(rows - i), TURN.min(columns - j));
                if tall == TURN && broad == TURN {
                    turn(from, copy.inner.from, to, across.to, TURN, TURN);
                } else {
                    turn(from, copy.inner.from, to, across.to, tall, broad);
                }
            }
        }
    }
}

/// `to[i][j] = from[j][i]` for i < `tall`, j < `broad`.
#[inline(always)]
unsafe fn turn<T: std::marker::Copy>(
    from: *const T,
    from_step: isize,
    to: *mut T,
    to_step: isize,
    tall: usize,
    broad: usize,
) {
    for i in 0..tall as isize {
        for j in 0..broad as isize {
            // SAFETY: the caller's.
            unsafe { *to.offset(i * to_step + j) = *from.offset(j * from_step + i) }
        }
    }
}

/// Every element of `out` becomes `value`.
pub fn fill<T: Element>(value: T, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    if out.dtype != T::DTYPE {
        let message = format!("the output is {}, the value {}", out.dtype, T::DTYPE);
        return Err(KernelError::new("fill", message));
    }
    check_output("fill", &out)?;
    let linear = Linear::new(&out.shape, &out.strides);
    Ok(Box::new(Generate { name: "fill", out, linear, value: move |_| value }))
}

/// Every element of `out` becomes `value`, converted to its type as `cast` does.
pub fn fill_f64(value: f64, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    with_element!(out.dtype, T => fill::<T>(value.cast(), out))
}

/// Elements `start`, `start + step`, `start + 2·step` … in row-major order. Floats are computed
/// in f64 and rounded once (MLX's CPU adds `step` again and again in the output's type); integers
/// step by the difference of the two truncated first values, as MLX's do.
pub fn arange(start: f64, step: f64, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    fn make<T: Element>(
        out: DynViewMut,
        value: impl Fn(usize) -> T + Send + Sync + 'static,
    ) -> Result<Box<dyn Task>, KernelError> {
        check_output("arange", &out)?;
        let linear = Linear::new(&out.shape, &out.strides);
        Ok(Box::new(Generate { name: "arange", out, linear, value }))
    }
    match out.dtype {
        Dtype::Bool | Dtype::C64 => Err(KernelError::new("arange", format!("not defined for {}", out.dtype))),
        dtype if dtype.is_float() => {
            with_element!(dtype, T => make::<T>(out, move |i| (start + i as f64 * step).cast()))
        }
        Dtype::U64 => {
            let (first, next) = (start as u64, (start + step) as u64);
            let step = next.wrapping_sub(first);
            make::<u64>(out, move |i| first.wrapping_add(step.wrapping_mul(i as u64)))
        }
        dtype => {
            let (first, next) = (start as i64, (start + step) as i64);
            let step = next.wrapping_sub(first);
            with_element!(dtype, T => {
                make::<T>(out, move |i| first.wrapping_add(step.wrapping_mul(i as i64)).cast())
            })
        }
    }
}

/// A value for each element, from its row-major number.
struct Generate<F> {
    name: &'static str,
    out: DynViewMut,
    linear: Linear,
    value: F,
}

impl<T: Element, F: Fn(usize) -> T + Send + Sync> Task for Generate<F> {
    fn chunks(&self) -> usize {
        self.linear.size().div_ceil(CHUNK)
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        let end = self.linear.size().min((chunk + 1) * CHUNK);
        const BATCH: usize = 256;
        let mut batch = [T::default(); BATCH];
        for start in (chunk * CHUNK..end).step_by(BATCH) {
            let count = BATCH.min(end - start);
            for (i, value) in batch[..count].iter_mut().enumerate() {
                *value = (self.value)(start + i);
            }
            // SAFETY: the elements are inside the view; the output's type is T (checked).
            unsafe { scatter_run::<T>(batch.as_ptr().cast(), self.out.pointer, &self.linear, start, count) }
        }
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

/// `out` is `value` but for a copy of `source` that starts at index `low`. Two tasks, to be run
/// one after the other.
pub fn pad(
    source: DynView,
    low: &[usize],
    value: f64,
    out: DynViewMut,
) -> Result<[Box<dyn Task>; 2], KernelError> {
    let fits = low.len() == out.shape.len()
        && source.shape.len() == low.len()
        && low
            .iter()
            .zip(&source.shape)
            .zip(&out.shape)
            .all(|((&low, &size), &wide)| low.checked_add(size).is_some_and(|end| end <= wide));
    if !fits {
        let message = format!(
            "a source of shape {:?} at {low:?} is not inside the output's {:?}",
            source.shape, out.shape
        );
        return Err(KernelError::new("pad", message));
    }
    let inner = sub_view(&out, low, &source.shape);
    Ok([fill_f64(value, out)?, copy(source, inner)?])
}

/// The part of a view that starts at index `low` and has `shape`: what concatenating and slice
/// updates copy into.
///
/// # Panics
/// If the part is not inside the view.
pub fn sub_view(view: &DynViewMut, low: &[usize], shape: &[usize]) -> DynViewMut {
    assert!(low.len() == view.shape.len() && shape.len() == low.len(), "ranks differ");
    let mut offset = 0isize;
    for axis in 0..low.len() {
        assert!(low[axis] + shape[axis] <= view.shape[axis], "{low:?} + {shape:?} leaves {:?}", view.shape);
        offset += low[axis] as isize * view.strides[axis];
    }
    if shape.contains(&0) {
        offset = 0; // stays inside the memory
    }
    DynViewMut {
        pointer: view.pointer.wrapping_offset(offset * view.dtype.size() as isize),
        dtype: view.dtype,
        shape: shape.into(),
        strides: view.strides.clone(),
    }
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::*;
    use crate::testing::{Laid, Layout, layouts};

    fn run(tasks: &[Box<dyn Task>], out: &Laid) {
        for threads in [1, 3] {
            Pool::new(threads).run(tasks).unwrap();
            out.check_untouched_outside();
        }
    }

    #[test]
    fn copies_between_all_layouts_and_sizes() {
        let mut rng = Rng::new(3);
        let shapes: &[&[usize]] = &[
            &[],
            &[1],
            &[0, 4],
            &[5],
            &[300, 200],
            &[3, 129, 17],
            &[2, 3, 4, 5],
            &[20_000, 2],
            &[2, 20_000],
        ];
        for dtype in [Dtype::Bool, Dtype::BF16, Dtype::F32, Dtype::I64] {
            for &shape in shapes {
                for from in layouts(shape) {
                    let a = Laid::random(dtype, shape, from, &mut rng);
                    for to in layouts(shape) {
                        let mut out = Laid::poisoned(dtype, shape, to);
                        let task = copy(a.view(), out.view_mut()).unwrap();
                        run(&[task], &out);
                        assert!(out.values() == a.values(), "{dtype} {shape:?} {from:?} {to:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn permutations_of_four_axes() {
        let mut rng = Rng::new(4);
        let shape = [3, 40, 2, 70];
        let a = Laid::random(Dtype::F32, &shape, Layout::Contiguous, &mut rng);
        for order in [[0, 2, 1, 3], [0, 1, 3, 2], [3, 2, 1, 0], [1, 3, 0, 2], [2, 3, 0, 1]] {
            let mut view = a.view();
            view.shape = order.iter().map(|&axis| shape[axis]).collect();
            view.strides = order.iter().map(|&axis| a.strides[axis]).collect();
            let mut out = Laid::poisoned(Dtype::F32, &view.shape, Layout::Padded);
            let linear = Linear::new(&view.shape, &view.strides);
            let values = a.values();
            let expected: Vec<f64> =
                (0..linear.size()).map(|at| values[linear.offset(at) as usize]).collect();
            let task = copy(view, out.view_mut()).unwrap();
            run(&[task], &out);
            assert!(out.values() == expected, "{order:?}");
        }
    }

    #[test]
    fn copies_repeat_missing_dimensions() {
        let a = Laid::contiguous(Dtype::I32, &[3, 1], &[1.0, 2.0, 3.0]);
        let mut out = Laid::poisoned(Dtype::I32, &[2, 3, 4], Layout::Padded);
        let task = copy(a.view(), out.view_mut()).unwrap();
        run(&[task], &out);
        let expected: Vec<f64> = (0..24).map(|i| (i / 4 % 3 + 1) as f64).collect();
        assert_eq!(out.values(), expected);
    }

    #[test]
    fn fills_and_ranges() {
        for dtype in Dtype::ALL {
            for layout in layouts(&[3, 7]) {
                let mut out = Laid::poisoned(dtype, &[3, 7], layout);
                let task = fill_f64(1.0, out.view_mut()).unwrap();
                run(&[task], &out);
                assert_eq!(out.values(), [1.0; 21], "{dtype}");
                if matches!(dtype, Dtype::Bool | Dtype::C64) {
                    assert!(arange(0.0, 1.0, out.view_mut()).is_err());
                    continue;
                }
                let task = arange(2.0, 3.0, out.view_mut()).unwrap();
                run(&[task], &out);
                let expected: Vec<f64> = (0..21).map(|i| 2.0 + 3.0 * i as f64).collect();
                assert_eq!(out.values(), expected, "{dtype}");
            }
        }
        let mut out = Laid::poisoned(Dtype::F32, &[40_000], Layout::Contiguous);
        let task = arange(1.0, -0.1, out.view_mut()).unwrap();
        run(&[task], &out);
        let expected: Vec<f64> = (0..40_000).map(|i| (1.0 + i as f64 * -0.1) as f32 as f64).collect();
        assert_eq!(out.values(), expected);
        let mut out = Laid::poisoned(Dtype::I8, &[3], Layout::Contiguous);
        let task = arange(5.0, -2.0, out.view_mut()).unwrap();
        run(&[task], &out);
        assert_eq!(out.values(), [5.0, 3.0, 1.0]);
    }

    #[test]
    fn padding_surrounds_and_misfits_are_refused() {
        let a = Laid::contiguous(Dtype::F32, &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let mut out = Laid::poisoned(Dtype::F32, &[3, 4], Layout::Padded);
        let tasks = pad(a.view(), &[0, 1], -1.0, out.view_mut()).unwrap();
        run(&tasks, &out);
        assert_eq!(out.values(), [-1.0, 1.0, 2.0, -1.0, -1.0, 3.0, 4.0, -1.0, -1.0, -1.0, -1.0, -1.0]);
        assert!(pad(a.view(), &[2, 1], 0.0, out.view_mut()).is_err());
        assert!(pad(a.view(), &[usize::MAX, 1], 0.0, out.view_mut()).is_err());
        let b = Laid::contiguous(Dtype::I32, &[3, 4], &[0.0; 12]);
        assert!(copy(b.view(), out.view_mut()).err().unwrap().to_string().contains("use cast"));
    }
}
