//! Sums, products, extremes and truth over any set of axes.
//!
//! The order of additions follows from the logical shape alone, never from strides or threads
//! (docs/NUMERICS.md). Let *row* be the last axes, as far as they are reduced, taken together;
//! *outer* the other reduced axes.
//!
//! - A row is summed in 16 lanes (lane *i* takes elements *i*, *i*+16 …), which fold as a tree;
//!   a row of more than 16,384 elements is cut in segments of that length, each summed so.
//! - Rows and segments of one output are added in ascending order, first within groups of at
//!   least 16,384 elements, then group by group.
//! - If the last axis is kept, each output is one ascending chain over the outer elements,
//!   segment by segment of 512.
//! - `Max` and `Min` of f32 take any order: only the sign of a zero depends on it, and follows from the shape.
//!
//! Half types accumulate in f32 and round once. Integers wrap. `Max` and `Min` are NaN if any
//! element is. The output may not alias the source.

mod arg;
mod geometry;
mod loops;
mod rows;
mod softmax;

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicUsize, Ordering};

use mica_simd::Isa;
use mica_threads::{Scratch, Task};
use smallvec::SmallVec;

pub use arg::{ArgReduceOp, arg_reduce};
use geometry::Geometry;
use loops::{Largest, Loops, Product, ROWS, Smallest, Sum, Whole};
pub(crate) use rows::{Partial, RowReduce};
pub use softmax::{logsumexp, softmax};
pub(crate) use softmax::{logsumexp_of, softmax_of};
#[cfg(test)]
pub(crate) use softmax::{logsumexp_on, softmax_on};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::element::{Bool8, Complex32, Element};
use crate::elementwise::tile::{CHUNK, Sink, Source, TILE, TILE_BYTES, check_output};
use crate::elementwise::{BinaryOp, complex};
use crate::error::KernelError;
use crate::layout::Linear;

/// Elements of a row, or of several rows of one output, that are summed apart.
/// Longer chains lose digits: 1,024 additions a lane are about a unit in the sixth place.
const SEGMENT: usize = 16_384;
/// Outer elements that are summed apart when the last axis is kept.
const OUTER_SEGMENT: usize = 512;
/// Outputs that a chunk computes when the last axis is kept, if there are [`CHUNKS`] such chunks: a page of
/// f32 from each row, which reads half as fast again as 1 KB (Sapphire Rapids).
const COLUMNS: usize = 1024;
/// Outputs that it computes at least, if there are so many.
const FEW_COLUMNS: usize = 256;
/// Chunks of columns to have for the threads, rather than long reads.
const CHUNKS: usize = 8;
/// Groups that a chunk computes, if there are [`CHUNKS_OF_GROUPS`] such chunks.
const GROUPS: usize = 4;
const CHUNKS_OF_GROUPS: usize = 32;
/// Lanes of a row reduction, on every instruction set.
const LANES: usize = 16;

/// How elements are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// The sum; 0 of none.
    Sum,
    /// The product; 1 of none.
    Prod,
    /// The largest; NaN if any is.
    Max,
    /// The smallest; NaN if any is.
    Min,
    /// Whether no element is zero; true of none.
    All,
    /// Whether some element is not zero; false of none.
    Any,
}

impl ReduceOp {
    /// The name, as MLX spells it.
    pub const fn name(self) -> &'static str {
        match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Prod => "prod",
            ReduceOp::Max => "max",
            ReduceOp::Min => "min",
            ReduceOp::All => "all",
            ReduceOp::Any => "any",
        }
    }

    /// The type of the result for elements of `dtype`, MLX's rule: sums and products of small
    /// integers are 32 bits wide.
    pub const fn output_dtype(self, dtype: Dtype) -> Dtype {
        match (self, dtype) {
            (ReduceOp::All | ReduceOp::Any, _) => Dtype::Bool,
            (ReduceOp::Max | ReduceOp::Min, _) => dtype,
            (_, Dtype::Bool | Dtype::I8 | Dtype::I16) => Dtype::I32,
            (_, Dtype::U8 | Dtype::U16) => Dtype::U32,
            _ => dtype,
        }
    }
}

/// `out = op` over `axes` of `source`. `out` has [`ReduceOp::output_dtype`] and the shape of
/// `source` without the axes, or with 1 in their places.
pub fn reduce(
    op: ReduceOp,
    source: DynView,
    axes: &[usize],
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    reduce_on(Isa::get(), op, source, axes, out)
}

pub(crate) fn reduce_on(
    isa: Isa,
    op: ReduceOp,
    source: DynView,
    axes: &[usize],
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let name = op.name();
    let expected = op.output_dtype(source.dtype);
    if out.dtype != expected {
        let message = format!("of {} gives {expected}, the output is {}", source.dtype, out.dtype);
        return Err(KernelError::new(name, message));
    }
    check_output(name, &out)?;
    let geometry = Geometry::new(name, &source, axes, &out.shape)?;
    if geometry.reduced() == 0 && geometry.outputs() > 0 && matches!(op, ReduceOp::Max | ReduceOp::Min) {
        return Err(KernelError::new(
            name,
            format!("of no elements: shape {:?}, axes {axes:?}", source.shape),
        ));
    }
    // What the accumulator is: half types f32, else the output's type.
    let compute = match (op, expected) {
        (_, Dtype::F16 | Dtype::BF16) => Dtype::F32,
        (_, other) => other,
    };
    macro_rules! task {
        ($t:ty, $loops:expr, $neutral:expr, $join:expr) => {
            Ok(Reduce::<$t, _>::boxed(name, geometry, &source, &out, $loops, $neutral, $join))
        };
    }
    macro_rules! integer {
        ($t:ty) => {
            match op {
                ReduceOp::Sum => task!($t, Loops::plain(), 0, |a: $t, b: $t| a.wrapping_add(b)),
                ReduceOp::Prod => task!($t, Loops::plain(), 1, |a: $t, b: $t| a.wrapping_mul(b)),
                ReduceOp::Max => task!($t, Loops::plain(), <$t>::MIN, |a: $t, b: $t| a.max(b)),
                ReduceOp::Min => task!($t, Loops::plain(), <$t>::MAX, |a: $t, b: $t| a.min(b)),
                ReduceOp::All | ReduceOp::Any => unreachable!("their type is bool"),
            }
        };
    }
    macro_rules! float {
        ($t:ident, $sum:expr, $product:expr, $largest:expr, $smallest:expr) => {{
            let larger = |a: $t, b: $t| if a.is_nan() | (a > b) { a } else { b };
            let smaller = |a: $t, b: $t| if a.is_nan() | (a < b) { a } else { b };
            match op {
                ReduceOp::Sum => task!($t, $sum, 0.0, |a: $t, b: $t| a + b),
                ReduceOp::Prod => task!($t, $product, 1.0, |a: $t, b: $t| a * b),
                ReduceOp::Max => task!($t, $largest, $t::NEG_INFINITY, larger),
                ReduceOp::Min => task!($t, $smallest, $t::INFINITY, smaller),
                ReduceOp::All | ReduceOp::Any => unreachable!("their type is bool"),
            }
        }};
    }
    match compute {
        Dtype::Bool => match op {
            ReduceOp::All | ReduceOp::Min => {
                task!(Bool8, Loops::plain(), Bool8(1), |a: Bool8, b: Bool8| Bool8(a.0 & b.0))
            }
            _ => task!(Bool8, Loops::plain(), Bool8(0), |a: Bool8, b: Bool8| Bool8(a.0 | b.0)),
        },
        Dtype::U8 => integer!(u8),
        Dtype::U16 => integer!(u16),
        Dtype::U32 => integer!(u32),
        Dtype::U64 => integer!(u64),
        Dtype::I8 => integer!(i8),
        Dtype::I16 => integer!(i16),
        Dtype::I32 => integer!(i32),
        Dtype::I64 => integer!(i64),
        Dtype::F32 => float!(
            f32,
            Loops::vectors::<Sum>(isa),
            Loops::vectors::<Product>(isa),
            Loops::extremes::<Largest>(isa),
            Loops::extremes::<Smallest>(isa)
        ),
        Dtype::F64 => float!(f64, Loops::plain(), Loops::plain(), Loops::plain(), Loops::plain()),
        Dtype::C64 => {
            use complex::{binary, stored};
            let number = |re, im| Complex32 { re, im };
            let (joined, start) = match op {
                ReduceOp::Sum => (BinaryOp::Add, number(0.0, 0.0)),
                ReduceOp::Prod => (BinaryOp::Multiply, number(1.0, 0.0)),
                ReduceOp::Max => (BinaryOp::Maximum, number(f32::NEG_INFINITY, f32::NEG_INFINITY)),
                ReduceOp::Min => (BinaryOp::Minimum, number(f32::INFINITY, f32::INFINITY)),
                ReduceOp::All | ReduceOp::Any => unreachable!("their type is bool"),
            };
            let join = stored(binary(joined).expect("complex numbers have it"));
            task!(Complex32, Loops::plain(), start, join)
        }
        Dtype::F16 | Dtype::BF16 => Err(KernelError::new(name, format!("not defined for {}", source.dtype))),
    }
}

/// Accumulators of type T, joined by F.
struct Reduce<T, F> {
    name: &'static str,
    source: Source,
    outer: Linear,
    /// Where each output's elements start.
    kept: Linear,
    out: Sink,
    neutral: T,
    join: F,
    loops: Loops<T, F>,
    work: Work,
    /// Partial results and how many chunks have left theirs; unused when there is one part.
    parts: UnsafeCell<Box<[T]>>,
    done: AtomicUsize,
}

/// How the work is cut.
enum Work {
    /// The last axis is reduced; few elements an output: so many outputs a chunk.
    Rows { outputs: usize },
    /// The last axis is reduced; a chunk is some groups of one output. `pieces` segments a group.
    Groups { groups: usize, pieces: usize, a_chunk: usize },
    /// The last axis is kept: a chunk is a segment of outer elements of a block of outputs.
    Columns { segments: usize, columns: usize },
}

// SAFETY: views may be used from any thread (their maker's promise); `parts` is written by chunks
// at disjoint places, and read by the one that finds all others done (`done`, AcqRel).
unsafe impl<T: Send + Sync, F: Sync> Sync for Reduce<T, F> {}

impl<T: Element, F: Fn(T, T) -> T + Send + Sync + 'static> Reduce<T, F> {
    fn boxed(
        name: &'static str,
        geometry: Geometry,
        source: &DynView,
        out: &DynViewMut,
        loops: Loops<T, F>,
        neutral: T,
        join: F,
    ) -> Box<dyn Task> {
        let Geometry { kept, outer, row, by_columns } = geometry;
        let outputs = kept.size();
        let (work, parts) = if by_columns {
            let segments = outer.size().div_ceil(OUTER_SEGMENT).max(1);
            let mut columns = COLUMNS;
            while columns > FEW_COLUMNS && segments * outputs.div_ceil(columns) < CHUNKS {
                columns /= 2;
            }
            (Work::Columns { segments, columns }, if segments > 1 { segments * outputs } else { 0 })
        } else {
            let per_output = row.size() * outer.size();
            let pieces = outer.size() * row.size().div_ceil(SEGMENT);
            let pieces_a_group = (SEGMENT / row.size().clamp(1, SEGMENT)).max(1);
            let groups = pieces.div_ceil(pieces_a_group);
            if groups <= 1 {
                (Work::Rows { outputs: (CHUNK / per_output.max(1)).max(1) }, 0)
            } else {
                let a_chunk = (groups * outputs / CHUNKS_OF_GROUPS).clamp(1, GROUPS);
                (Work::Groups { groups, pieces: pieces_a_group, a_chunk }, groups * outputs)
            }
        };
        let linear = if by_columns { &kept } else { &row };
        Box::new(Reduce {
            name,
            source: Source::with_linear(source, T::DTYPE, linear.clone()),
            outer,
            kept,
            out: Sink::new(out, T::DTYPE),
            neutral,
            join,
            loops,
            work,
            parts: UnsafeCell::new(vec![neutral; parts].into_boxed_slice()),
            done: AtomicUsize::new(0),
        })
    }

    /// Joins elements `start .. start + count` of the row at `base`.
    ///
    /// # Safety
    /// They are inside the source.
    unsafe fn row(&self, base: isize, start: usize, count: usize, scratch: &Buffers) -> T {
        let mut lanes = [self.neutral; LANES];
        // SAFETY: inside the source; the buffers hold a tile.
        unsafe {
            if let Some(dense) = self.source.dense(base, start, count) {
                let values = std::slice::from_raw_parts(dense.cast::<T>(), count);
                self.loops.row(&self.join, &mut lanes, values);
            } else {
                for at in (0..count).step_by(TILE) {
                    let length = TILE.min(count - at);
                    let tile = self.source.load(base, start + at, length, scratch.tile, scratch.raw);
                    let values = std::slice::from_raw_parts(tile.cast::<T>(), length);
                    self.loops.row(&self.join, &mut lanes, values);
                }
            }
        }
        self.loops.fold(&self.join, lanes)
    }

    /// The results from `start` on, if each is of one dense piece; whether they are.
    ///
    /// # Safety
    /// They are outputs.
    unsafe fn dense_rows(&self, start: usize, results: &mut [T]) -> bool {
        let length = self.source.linear.size();
        if self.outer.size() != 1 || !(1..=SEGMENT).contains(&length) {
            return false;
        }
        let Some(dense) = self.source.dense(0, 0, length) else { return false };
        let mut done = 0;
        self.kept.runs(start, results.len(), |offset, stride, count| {
            let first = dense.cast::<T>().wrapping_offset(offset);
            let rows = Whole { first, stride, length, neutral: self.neutral };
            // SAFETY: outputs' rows, inside the source.
            unsafe { self.loops.whole(&self.join, rows, &mut results[done..done + count]) }
            done += count;
        });
        true
    }

    /// The results of groups from `first` on that are one whole segment of a dense row; how many they are.
    ///
    /// # Safety
    /// They are groups of this output.
    unsafe fn dense_segments(&self, output: usize, first: usize, pieces: usize, results: &mut [T]) -> usize {
        let length = self.source.linear.size();
        let count = results.len().min((length / SEGMENT).saturating_sub(first));
        if self.outer.size() != 1 || pieces != 1 || count == 0 {
            return 0;
        }
        let base = self.kept.offset(output);
        let Some(dense) = self.source.dense(base, first * SEGMENT, count * SEGMENT) else { return 0 };
        let (stride, neutral) = (SEGMENT as isize, self.neutral);
        let rows = Whole { first: dense.cast::<T>(), stride, length: SEGMENT, neutral };
        // SAFETY: segments of the source.
        unsafe { self.loops.whole(&self.join, rows, &mut results[..count]) }
        count
    }

    /// Joins pieces `first .. last` of output `output`.
    unsafe fn pieces(&self, output: usize, first: usize, last: usize, scratch: &Buffers) -> T {
        let length = self.source.linear.size();
        let a_row = length.div_ceil(SEGMENT);
        let base = self.kept.offset(output);
        let mut total = self.neutral;
        for piece in first..last {
            let (at, segment) = (piece / a_row, piece % a_row);
            let start = segment * SEGMENT;
            let count = SEGMENT.min(length - start);
            // SAFETY: inside the source, which these layouts were cut from.
            let value = unsafe { self.row(base + self.outer.offset(at), start, count, scratch) };
            total = if piece == first { value } else { (self.join)(total, value) };
        }
        total
    }

    /// Writes outputs from `start`.
    unsafe fn write(&self, start: usize, values: &[T], scratch: &Buffers) {
        // SAFETY: the outputs belong to this chunk alone.
        unsafe { self.out.store(values.as_ptr().cast(), start, values.len(), scratch.raw) }
    }

    fn rows_chunk(&self, outputs: usize, chunk: usize, scratch: &Buffers) {
        let end = self.kept.size().min((chunk + 1) * outputs);
        let a_row = self.source.linear.size().div_ceil(SEGMENT);
        let mut batch = [self.neutral; 64];
        for start in (chunk * outputs..end).step_by(64) {
            let count = 64.min(end - start);
            // SAFETY: outputs of this chunk, and all pieces of one.
            unsafe {
                if !self.dense_rows(start, &mut batch[..count]) {
                    for (i, result) in batch[..count].iter_mut().enumerate() {
                        *result = self.pieces(start + i, 0, self.outer.size() * a_row, scratch);
                    }
                }
            }
            // SAFETY: outputs of this chunk.
            unsafe { self.write(start, &batch[..count], scratch) }
        }
    }

    fn group_chunk(&self, groups: usize, pieces: usize, a_chunk: usize, chunk: usize, scratch: &Buffers) {
        let chunks = groups.div_ceil(a_chunk);
        let (output, first) = (chunk / chunks, chunk % chunks * a_chunk);
        let last = groups.min(first + a_chunk);
        // SAFETY: these parts are this chunk's own.
        let parts = unsafe {
            let parts = (*self.parts.get()).as_mut_ptr().add(output * groups + first);
            std::slice::from_raw_parts_mut(parts, last - first)
        };
        // SAFETY: groups of this output.
        unsafe {
            let whole = self.dense_segments(output, first, pieces, parts);
            let all = self.outer.size() * self.source.linear.size().div_ceil(SEGMENT);
            for (group, part) in (first..last).zip(parts).skip(whole) {
                *part = self.pieces(output, group * pieces, all.min((group + 1) * pieces), scratch);
            }
        }
        if self.is_last() {
            for output in 0..self.kept.size() {
                // SAFETY: every other chunk is done with its part.
                unsafe {
                    let parts = &(&(*self.parts.get()))[output * groups..(output + 1) * groups];
                    let total = parts[1..].iter().fold(parts[0], |total, &part| (self.join)(total, part));
                    self.write(output, &[total], scratch);
                }
            }
        }
    }

    fn column_chunk(&self, segments: usize, columns: usize, chunk: usize, scratch: &Buffers) {
        let outputs = self.kept.size();
        let (segment, block) = (chunk % segments, chunk / segments);
        let start = block * columns;
        let count = columns.min(outputs - start);
        let mut totals = [self.neutral; COLUMNS];
        let totals = &mut totals[..count];
        let from = segment * OUTER_SEGMENT;
        let length = OUTER_SEGMENT.min(self.outer.size() - from);
        let dense = self.source.dense(0, start, count);
        self.outer.runs(from, length, |offset, stride, length| {
            for first in (0..length).step_by(ROWS) {
                let bases = (first..length.min(first + ROWS)).map(|i| offset + i as isize * stride);
                // SAFETY: inside the source; the buffers hold a tile.
                unsafe {
                    if let Some(dense) = dense {
                        let rows: SmallVec<[*const T; ROWS]> =
                            bases.map(|base| dense.cast::<T>().wrapping_offset(base)).collect();
                        self.loops.columns(&self.join, totals, &rows);
                    } else {
                        for base in bases {
                            let tile = self.source.load(base, start, count, scratch.tile, scratch.raw);
                            self.loops.columns(&self.join, totals, &[tile.cast::<T>()]);
                        }
                    }
                }
            }
        });
        if segments == 1 {
            // SAFETY: outputs of this chunk.
            return unsafe { self.write(start, totals, scratch) };
        }
        // SAFETY: parts [segment][start..] are this chunk's own.
        unsafe {
            let part = (*self.parts.get()).as_mut_ptr().add(segment * outputs + start);
            std::ptr::copy_nonoverlapping(totals.as_ptr(), part, count);
        }
        if self.is_last() {
            // SAFETY: every other chunk is done with its parts.
            let parts = unsafe { &mut **self.parts.get() };
            let (first, rest) = parts.split_at_mut(outputs);
            for part in rest.chunks_exact(outputs) {
                for (total, &value) in first.iter_mut().zip(part) {
                    *total = (self.join)(*total, value);
                }
            }
            for (block, totals) in first.chunks(TILE).enumerate() {
                // SAFETY: this chunk alone writes outputs.
                unsafe { self.write(block * TILE, totals, scratch) }
            }
        }
    }

    /// Whether all other chunks have left their parts. Resets for the next run.
    fn is_last(&self) -> bool {
        let last = self.done.fetch_add(1, Ordering::AcqRel) + 1 == self.chunks();
        if last {
            self.done.store(0, Ordering::Relaxed);
        }
        last
    }
}

/// A tile's scratch.
struct Buffers {
    tile: *mut u8,
    raw: *mut u8,
}

impl Buffers {
    fn new(scratch: &Scratch) -> Buffers {
        Buffers {
            tile: scratch.take::<u8>(TILE_BYTES).as_mut_ptr(),
            raw: scratch.take::<u8>(TILE_BYTES).as_mut_ptr(),
        }
    }
}

impl<T: Element, F: Fn(T, T) -> T + Send + Sync + 'static> Task for Reduce<T, F> {
    fn chunks(&self) -> usize {
        match self.work {
            Work::Rows { outputs } => self.kept.size().div_ceil(outputs),
            Work::Groups { groups, a_chunk, .. } => self.kept.size() * groups.div_ceil(a_chunk),
            Work::Columns { segments, columns } => self.kept.size().div_ceil(columns) * segments,
        }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let buffers = Buffers::new(scratch);
        match self.work {
            Work::Rows { outputs } => self.rows_chunk(outputs, chunk, &buffers),
            Work::Groups { groups, pieces, a_chunk } => {
                self.group_chunk(groups, pieces, a_chunk, chunk, &buffers)
            }
            Work::Columns { segments, columns } => self.column_chunk(segments, columns, chunk, &buffers),
        }
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

#[cfg(test)]
mod tests;
