//! Softmax and log-sum-exp over the last axis.
//!
//! A row is: its largest value; e^(x - largest), summed as a row of any sum is (16 lanes, segments
//! of 16,384); then each times one over the sum. Half types are computed in f32 and
//! rounded once at the end, so MLX's `precise` is always on. A row of nothing but -∞ gives NaN,
//! and so does one with +∞ or NaN, as in MLX; the log-sum-exp of such rows is -∞, +∞, NaN.

use mica_simd::{Isa, Kernel, LANES, Vector, dispatch, math};
use mica_threads::{Scratch, Task};

use super::SEGMENT;
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::{CHUNK, Sink, Source, TILE, check_output, check_rank, compute_dtype};
use crate::error::KernelError;
use crate::layout::{Linear, prefetch};

/// `out = softmax(source)` over the last axis; both of one float type and shape. `out` may be
/// the memory of `source` if they have the same layout.
pub fn softmax(source: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    softmax_on(Isa::get(), source, out)
}

pub(crate) fn softmax_on(isa: Isa, source: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "softmax";
    if out.shape != source.shape || out.dtype != source.dtype {
        let message = format!(
            "the output has to be {} of {:?}, got {} of {:?}",
            source.dtype, source.shape, out.dtype, out.shape
        );
        return Err(KernelError::new(NAME, message));
    }
    let rows = Rows::new(NAME, isa, source)?;
    check_output(NAME, &out)?;
    let compute = rows.compute;
    Ok(Box::new(Softmax { rows, out: Sink::new(&out, compute) }))
}

/// `out = log Σ exp(source)` over the last axis. `out` has `source`'s float type and its shape
/// without the last axis, or with 1 in its place.
pub fn logsumexp(source: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    logsumexp_on(Isa::get(), source, out)
}

pub(crate) fn logsumexp_on(isa: Isa, source: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "logsumexp";
    let dtype = source.dtype;
    let shape = source.shape.clone();
    let rows = Rows::new(NAME, isa, source)?;
    let outer = &shape[..shape.len() - 1];
    let fits = *out.shape == *outer || out.shape.split_last() == Some((&1, outer));
    if !fits || out.dtype != dtype {
        let message =
            format!("the output has to be {dtype} of {outer:?}, got {} of {:?}", out.dtype, out.shape);
        return Err(KernelError::new(NAME, message));
    }
    if rows.length() == 0 && rows.outer.size() > 0 {
        return Err(KernelError::new(NAME, format!("of no elements: shape {shape:?}")));
    }
    check_output(NAME, &out)?;
    let compute = rows.compute;
    Ok(Box::new(LogSumExp { rows, out: Sink::new(&out, compute) }))
}

/// The rows of a source.
struct Rows {
    isa: Isa,
    compute: Dtype,
    source: Source,
    outer: Linear,
}

impl Rows {
    fn new(name: &'static str, isa: Isa, source: DynView) -> Result<Rows, KernelError> {
        check_rank(name, &source.shape, &source.strides)?;
        if !source.dtype.is_float() {
            let message = format!("takes floating types, got {}: cast first", source.dtype);
            return Err(KernelError::new(name, message));
        }
        let Some(last) = source.shape.len().checked_sub(1) else {
            return Err(KernelError::new(name, "takes at least one dimension, got a scalar"));
        };
        let compute = compute_dtype(source.dtype);
        let row = Linear::new(&source.shape[last..], &source.strides[last..]);
        Ok(Rows {
            isa,
            compute,
            outer: Linear::new(&source.shape[..last], &source.strides[..last]),
            source: Source::with_linear(&source, compute, row),
        })
    }

    fn length(&self) -> usize {
        self.source.linear.size()
    }

    fn rows_a_chunk(&self) -> usize {
        (CHUNK / self.length().max(1)).max(1)
    }

    fn chunks(&self) -> usize {
        self.outer.size().div_ceil(self.rows_a_chunk())
    }

    fn of_chunk(&self, chunk: usize) -> std::ops::Range<usize> {
        let step = self.rows_a_chunk();
        chunk * step..self.outer.size().min((chunk + 1) * step)
    }

    /// Where a row is that needs no copy: f32 side by side.
    fn dense(&self, row: usize) -> Option<*const f32> {
        if self.source.dtype != Dtype::F32 {
            return None;
        }
        let offset = self.source.linear.contiguous_from(0, self.length())?;
        Some(self.source.pointer.cast::<f32>().wrapping_offset(self.outer.offset(row) + offset))
    }

    /// A row of numbers of the compute type, copied to `to`, which holds it.
    fn load(&self, row: usize, to: *mut u8, buffers: &super::Buffers) {
        let base = self.outer.offset(row);
        let size = self.compute.size();
        for start in (0..self.length()).step_by(TILE) {
            let count = TILE.min(self.length() - start);
            // SAFETY: inside the source; `to` holds a row, the buffers a tile.
            unsafe {
                let to = to.add(start * size);
                let tile = self.source.load(base, start, count, to, buffers.raw);
                if tile != to.cast_const() {
                    std::ptr::copy_nonoverlapping(tile, to, count * size);
                }
            }
        }
    }
}

/// Row memory of the compute type, in scratch: a multiple of 16 elements.
fn row_memory(rows: &Rows, scratch: &Scratch) -> *mut u8 {
    scratch.take::<u8>(rows.length().next_multiple_of(LANES) * rows.compute.size()).as_mut_ptr()
}

struct Softmax {
    rows: Rows,
    out: Sink,
}

struct LogSumExp {
    rows: Rows,
    out: Sink,
}

impl Task for Softmax {
    fn chunks(&self) -> usize {
        if self.rows.length() == 0 { 0 } else { self.rows.chunks() }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let buffers = super::Buffers::new(scratch);
        let memory = row_memory(&self.rows, scratch);
        let length = self.rows.length();
        let rows = self.rows.of_chunk(chunk);
        for row in rows.clone() {
            // Rows of f32 without gaps are read and written where they are.
            let own = self.rows.dense(row);
            if own.is_none() {
                self.rows.load(row, memory, &buffers);
            }
            let target = self.out.direct(row * length, length).unwrap_or(memory);
            // SAFETY: a row of the compute type in memory, or written by `load`; outputs of this chunk. The
            // output may be the memory of the source: each element is read before it is written.
            unsafe {
                if self.rows.compute == Dtype::F64 {
                    softmax_f64(std::slice::from_raw_parts_mut(memory.cast(), length));
                } else {
                    let next = if row + 1 < rows.end { row + 1 } else { row };
                    let next = [
                        self.rows.dense(next).unwrap_or(memory.cast()),
                        self.out.direct(next * length, length).unwrap_or(memory).cast::<f32>().cast_const(),
                    ];
                    let from = own.unwrap_or(memory.cast());
                    softmax_row(self.rows.isa, SoftmaxRow { from, to: target.cast(), length, next });
                    if target != memory {
                        continue;
                    }
                }
                for start in (0..length).step_by(TILE) {
                    let count = TILE.min(length - start);
                    let values = memory.add(start * self.rows.compute.size());
                    self.out.store(values, row * length + start, count, buffers.raw);
                }
            }
        }
    }

    fn name(&self) -> &'static str {
        "softmax"
    }
}

impl Task for LogSumExp {
    fn chunks(&self) -> usize {
        self.rows.chunks()
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let buffers = super::Buffers::new(scratch);
        let memory = row_memory(&self.rows, scratch);
        let length = self.rows.length();
        for row in self.rows.of_chunk(chunk) {
            self.rows.load(row, memory, &buffers);
            // SAFETY: a row of the compute type, written by `load`; one output of this chunk.
            unsafe {
                if self.rows.compute == Dtype::F64 {
                    let total = logsumexp_f64(std::slice::from_raw_parts(memory.cast(), length));
                    self.out.store((&raw const total).cast(), row, 1, buffers.raw);
                } else {
                    let total = logsumexp_of(self.rows.isa, memory.cast(), memory.cast(), length);
                    self.out.store((&raw const total).cast(), row, 1, buffers.raw);
                }
            }
        }
    }

    fn name(&self) -> &'static str {
        "logsumexp"
    }
}

/// Writes the softmax of a row.
///
/// # Safety
/// The row is there to be read, and to be written.
unsafe fn softmax_row(isa: Isa, row: SoftmaxRow) {
    dispatch(isa, row);
}

/// Writes the softmax of a row of `length` values. `next` is what is read and written after it.
///
/// # Safety
/// The row is readable at `from` and writable at `to`, which may be the same place.
pub(crate) unsafe fn softmax_of(
    isa: Isa,
    from: *const f32,
    to: *mut f32,
    length: usize,
    next: [*const f32; 2],
) {
    dispatch(isa, SoftmaxRow { from, to, length, next });
}

/// The log-sum-exp of a row of `length` values.
///
/// # Safety
/// The row is readable at `from`; `to`, which may be the same place, is overwritten as far.
pub(crate) unsafe fn logsumexp_of(isa: Isa, from: *const f32, to: *mut f32, length: usize) -> f32 {
    dispatch(isa, LogSumExpRow { from, to, length })
}

/// A row of `length` values, and where the softmax goes.
struct SoftmaxRow {
    from: *const f32,
    to: *mut f32,
    length: usize,
    /// What is read and written after this row: it is asked for meanwhile.
    next: [*const f32; 2],
}

/// As [`SoftmaxRow`]; `to` is room for the exponentials.
struct LogSumExpRow {
    from: *const f32,
    to: *mut f32,
    length: usize,
}

impl Kernel for SoftmaxRow {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let SoftmaxRow { from, to, length, next } = self;
        // SAFETY: promised to `softmax_row`.
        unsafe {
            let (_, sum) = exponentials::<V>(from, to, length, next);
            let scale = V::splat(1.0 / sum);
            for at in (0..length).step_by(LANES) {
                let count = (length - at).min(LANES);
                (V::load_part(to.add(at), count, 0.0) * scale).store_part(to.add(at), count);
            }
        }
    }
}

impl Kernel for LogSumExpRow {
    type Output = f32;

    #[inline(always)]
    fn run<V: Vector>(self) -> f32 {
        let LogSumExpRow { from, to, length } = self;
        // SAFETY: promised to `logsumexp_of`.
        let (largest, sum) = unsafe { exponentials::<V>(from, to, length, [from; 2]) };
        if largest.is_infinite() {
            return largest;
        }
        largest + math::log(V::splat(sum)).to_array()[0]
    }
}

/// Vectors whose largest values are found apart: a comparison waits some cycles for the one before.
const TOPS: usize = 4;

/// Writes e^(x - largest) of a row; gives the largest (NaN if any is) and the sum.
///
/// # Safety
/// `length` values are readable at `from` and writable at `to`, which may be the same place.
#[inline(always)]
unsafe fn exponentials<V: Vector>(
    from: *const f32,
    to: *mut f32,
    length: usize,
    next: [*const f32; 2],
) -> (f32, f32) {
    let mut tops = [V::splat(f32::NEG_INFINITY); TOPS];
    for start in (0..length).step_by(TOPS * LANES) {
        for (i, top) in tops.iter_mut().enumerate() {
            let at = (start + i * LANES).min(length);
            // SAFETY: the caller's; none past the end.
            let x = unsafe { V::load_part(from.add(at), length - at, f32::NEG_INFINITY) };
            // Keeps NaN on either side.
            *top = V::select(V::mask_or(x.is_nan(), x.gt(*top)), x, *top);
        }
    }
    let mut largest = f32::NEG_INFINITY;
    for lane in tops.iter().flat_map(|top| top.to_array()) {
        largest = if lane.is_nan() || lane > largest { lane } else { largest };
    }
    let shift = V::splat(largest);
    let mut total = 0.0;
    for segment in (0..length).step_by(SEGMENT) {
        let mut sum = V::zero();
        for at in (segment..length.min(segment + SEGMENT)).step_by(LANES) {
            let count = (length - at).min(LANES);
            next.iter().for_each(|next| prefetch(next.wrapping_add(at).cast(), 4 * LANES));
            // SAFETY: the caller's. Lanes past the end become e^-∞ = 0.
            unsafe {
                let e = math::exp(V::load_part(from.add(at), count, f32::NEG_INFINITY) - shift);
                e.store_part(to.add(at), count);
                sum = sum + e;
            }
        }
        total = if segment == 0 { sum.sum() } else { total + sum.sum() };
    }
    (largest, total)
}

fn exponentials_f64(values: &mut [f64]) -> (f64, f64) {
    let largest = values.iter().fold(f64::NEG_INFINITY, |a, &b| if a.is_nan() || a > b { a } else { b });
    let mut sum = 0.0;
    for value in values {
        *value = (*value - largest).exp();
        sum += *value;
    }
    (largest, sum)
}

fn softmax_f64(values: &mut [f64]) {
    let (_, sum) = exponentials_f64(values);
    for value in values {
        *value /= sum;
    }
}

fn logsumexp_f64(values: &[f64]) -> f64 {
    let (largest, sum) = exponentials_f64(&mut values.to_vec());
    if largest.is_infinite() { largest } else { largest + sum.ln() }
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::*;
    use crate::testing::{Laid, Layout, layouts};

    fn row_reference(row: &[f64]) -> (Vec<f64>, f64) {
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = row.iter().map(|x| (x - top).exp()).collect();
        let sum: f64 = e.iter().sum();
        (e.iter().map(|e| e / sum).collect(), top + sum.ln())
    }

    #[test]
    fn rows_match_f64_and_have_the_same_bits_everywhere() {
        let mut rng = Rng::new(21);
        for shape in [&[1][..], &[15], &[16], &[3, 17], &[5, 1000], &[2, 3, 2049], &[40, 1], &[1, 100_001]] {
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64] {
                // A unit in the last place of the type, for values of at most 1.
                let step = match dtype {
                    Dtype::BF16 => 2f64.powi(-8),
                    Dtype::F16 => 2f64.powi(-11),
                    Dtype::F32 => 2f64.powi(-23),
                    _ => 1e-14,
                };
                let length = *shape.last().unwrap();
                let values: Vec<f64> =
                    (0..shape.iter().product()).map(|_| rng.normal() as f64 * 4.0).collect();
                let mut first: Option<(Vec<f64>, Vec<f64>)> = None;
                for &isa in Isa::available() {
                    for layout in layouts(shape) {
                        let a = Laid::new(dtype, shape, layout, &values);
                        let mut out = Laid::poisoned(dtype, shape, Layout::Padded);
                        let mut totals = Laid::poisoned(dtype, &shape[..shape.len() - 1], layout);
                        for threads in [1, 3] {
                            let tasks = [
                                softmax_on(isa, a.view(), out.view_mut()).unwrap(),
                                logsumexp_on(isa, a.view(), totals.view_mut()).unwrap(),
                            ];
                            Pool::new(threads).run(&tasks).unwrap();
                            out.check_untouched_outside();
                            totals.check_untouched_outside();
                            let now = (out.values(), totals.values());
                            match &first {
                                None => first = Some(now),
                                Some(first) => assert!(*first == now, "{isa} {dtype} {shape:?} {layout:?}"),
                            }
                        }
                    }
                }
                let (got, totals) = first.unwrap();
                let stored = Laid::contiguous(dtype, shape, &values).values();
                for (i, row) in stored.chunks(length).enumerate() {
                    let (expected, total) = row_reference(row);
                    // Exponential 2 units, chains of up to 1,024 additions, scale; then the type's
                    // own rounding.
                    for (got, expected) in got[i * length..].iter().zip(&expected) {
                        let bound = expected * (step + 3e-6) + 4e-8; // f16 has steps of 6e-8 near 0
                        assert!((got - expected).abs() <= bound, "{dtype} {shape:?}: {got} {expected}");
                    }
                    let bound = total.abs() * (step + 1e-6) + 3e-6;
                    assert!((totals[i] - total).abs() <= bound, "{dtype} {shape:?}: {} {total}", totals[i]);
                }
            }
        }
    }

    #[test]
    fn edges_are_mlx() {
        const I: f64 = f64::INFINITY;
        const N: f64 = f64::NAN;
        for dtype in [Dtype::F32, Dtype::F64, Dtype::BF16] {
            for (row, expected, total) in [
                (&[-I, -I][..], &[N, N][..], -I),
                (&[I, 1.0], &[N, N], I),
                (&[N, 1.0], &[N, N], N),
                (&[1.0, N], &[N, N], N),
                (&[-I, 1.0, -I], &[0.0, 1.0, 0.0], 1.0),
                (&[1000.0], &[1.0], 1000.0),
                (&[-3000.0, 3000.0], &[0.0, 1.0], 3000.0),
            ] {
                let mut a = Laid::contiguous(dtype, &[row.len()], row);
                let mut out = Laid::poisoned(dtype, &[1], Layout::Contiguous);
                // In place: the output is the source.
                let tasks =
                    [logsumexp(a.view(), out.view_mut()).unwrap(), softmax(a.view(), a.view_mut()).unwrap()];
                Pool::new(1).run(&tasks).unwrap();
                let mut got = a.values();
                got.push(out.values()[0]);
                for (got, expected) in got.iter().zip(expected.iter().chain([&total])) {
                    let same = (got - expected).abs() <= expected.abs() * 0.01
                        || got == expected
                        || (got.is_nan() && expected.is_nan());
                    assert!(same, "{dtype} {row:?}: {got} is not {expected}");
                }
            }
        }
        let empty = Laid::contiguous(Dtype::F32, &[2, 0], &[]);
        let mut out = Laid::poisoned(Dtype::F32, &[2], Layout::Contiguous);
        assert!(logsumexp(empty.view(), out.view_mut()).is_err());
        let ints = Laid::contiguous(Dtype::I32, &[2], &[0.0; 2]);
        let mut out = Laid::poisoned(Dtype::I32, &[2], Layout::Contiguous);
        assert!(softmax(ints.view(), out.view_mut()).err().unwrap().to_string().contains("cast"));
    }
}
