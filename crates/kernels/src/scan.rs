//! Running sums, products and extremes along an axis.
//!
//! Each line is one chain in its order; half types accumulate in f32 and round each output. A line of more than
//! 16,384 elements is cut into segments of that length: each is a chain of its own, and what comes out is the
//! total before the segment joined with the chain. A running sum of numbers that are not negative so never
//! falls, at the ends of segments neither.
//! NaN in an extreme stays to the end of the line. The output may be the memory of the source if
//! both have the same layout and type.

use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::element::{Bool8, Complex32, Element};
use crate::elementwise::tile::{CHUNK, Sink, Source, TILE, TILE_BYTES, check_output, check_rank};
use crate::elementwise::{BinaryOp, binary_op, complex};
use crate::error::KernelError;
use crate::layout::Linear;
use crate::plan::{Plan, Workspace};

/// What runs along the axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScanOp {
    /// Sum.
    Sum,
    /// Product.
    Prod,
    /// Largest so far; NaN from the first NaN on.
    Max,
    /// Smallest so far; NaN from the first NaN on.
    Min,
    /// log Σ exp so far; floats only.
    LogSumExp,
}

impl ScanOp {
    /// The name, as MLX spells it.
    pub const fn name(self) -> &'static str {
        match self {
            ScanOp::Sum => "cumsum",
            ScanOp::Prod => "cumprod",
            ScanOp::Max => "cummax",
            ScanOp::Min => "cummin",
            ScanOp::LogSumExp => "logcumsumexp",
        }
    }

    /// The type of the result, MLX's rule: only a running sum of bools is wider (int32).
    pub const fn output_dtype(self, dtype: Dtype) -> Dtype {
        match (self, dtype) {
            (ScanOp::Sum, Dtype::Bool) => Dtype::I32,
            _ => dtype,
        }
    }
}

/// Which way and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ScanOptions {
    /// From the last element to the first.
    pub reverse: bool,
    /// Without the element itself: the first output of a line is the neutral element.
    pub exclusive: bool,
}

/// `out[…, i, …] = op` of `source[…, ..=i, …]` along `axis`. Both have one shape, `out` has
/// [`ScanOp::output_dtype`].
pub fn scan(
    op: ScanOp,
    options: ScanOptions,
    source: DynView,
    axis: usize,
    out: DynViewMut,
) -> Result<Plan, KernelError> {
    let name = op.name();
    let expected = op.output_dtype(source.dtype);
    if out.dtype != expected || out.shape != source.shape {
        let message = format!(
            "the result is {expected} of {:?}, the output {} of {:?}",
            source.shape, out.dtype, out.shape
        );
        return Err(KernelError::new(name, message));
    }
    check_rank(name, &source.shape, &source.strides)?;
    check_output(name, &out)?;
    if axis >= source.shape.len() {
        let message = format!("axis {axis} is not in shape {:?}", source.shape);
        return Err(KernelError::new(name, message));
    }
    macro_rules! make {
        ($t:ty, $zero:expr, $one:expr, $low:expr, $high:expr, $add:expr, $multiply:expr, $max:expr, $min:expr) => {
            match op {
                ScanOp::Sum => Ok(Scan::<$t, _>::plan(name, options, &source, axis, &out, $zero, $add)),
                ScanOp::Prod => Ok(Scan::<$t, _>::plan(name, options, &source, axis, &out, $one, $multiply)),
                ScanOp::Max => Ok(Scan::<$t, _>::plan(name, options, &source, axis, &out, $low, $max)),
                ScanOp::Min => Ok(Scan::<$t, _>::plan(name, options, &source, axis, &out, $high, $min)),
                ScanOp::LogSumExp => Err(KernelError::new(
                    name,
                    format!("takes floating types, got {}: cast first", source.dtype),
                )),
            }
        };
    }
    macro_rules! integer {
        ($t:ty) => {
            make!(
                $t,
                0,
                1,
                <$t>::MIN,
                <$t>::MAX,
                |a: $t, b: $t| a.wrapping_add(b),
                |a: $t, b: $t| a.wrapping_mul(b),
                |a: $t, b: $t| a.max(b),
                |a: $t, b: $t| a.min(b)
            )
        };
    }
    macro_rules! float {
        ($t:ident) => {
            if op == ScanOp::LogSumExp {
                let join = pair::<$t>();
                Ok(Scan::<$t, _>::plan(name, options, &source, axis, &out, $t::NEG_INFINITY, join))
            } else {
                make!(
                    $t,
                    0.0,
                    1.0,
                    $t::NEG_INFINITY,
                    $t::INFINITY,
                    |a: $t, b: $t| a + b,
                    |a: $t, b: $t| a * b,
                    |a: $t, b: $t| if a.is_nan() | (a > b) { a } else { b },
                    |a: $t, b: $t| if a.is_nan() | (a < b) { a } else { b }
                )
            }
        };
    }
    match expected {
        Dtype::Bool => make!(
            Bool8,
            Bool8(0),
            Bool8(1),
            Bool8(0),
            Bool8(1),
            |a: Bool8, b: Bool8| Bool8(a.0 | b.0),
            |a: Bool8, b: Bool8| Bool8(a.0 & b.0),
            |a: Bool8, b: Bool8| Bool8(a.0 | b.0),
            |a: Bool8, b: Bool8| Bool8(a.0 & b.0)
        ),
        Dtype::U8 => integer!(u8),
        Dtype::U16 => integer!(u16),
        Dtype::U32 => integer!(u32),
        Dtype::U64 => integer!(u64),
        Dtype::I8 => integer!(i8),
        Dtype::I16 => integer!(i16),
        Dtype::I32 => integer!(i32),
        Dtype::I64 => integer!(i64),
        Dtype::F16 | Dtype::BF16 | Dtype::F32 => float!(f32),
        Dtype::F64 => float!(f64),
        Dtype::C64 => {
            use complex::{binary, stored};
            let of = |op| stored(binary(op).expect("complex numbers have it"));
            let number = |re, im| Complex32 { re, im };
            let (joined, start) = match op {
                ScanOp::Sum => (BinaryOp::Add, number(0.0, 0.0)),
                ScanOp::Prod => (BinaryOp::Multiply, number(1.0, 0.0)),
                ScanOp::Max => (BinaryOp::Maximum, number(f32::NEG_INFINITY, f32::NEG_INFINITY)),
                ScanOp::Min => (BinaryOp::Minimum, number(f32::INFINITY, f32::INFINITY)),
                ScanOp::LogSumExp => (BinaryOp::LogAddExp, number(f32::NEG_INFINITY, 0.0)),
            };
            Ok(Scan::<Complex32, _>::plan(name, options, &source, axis, &out, start, of(joined)))
        }
    }
}

/// log(eᵃ + eᵇ) of single values: the elementwise op, so that both have the same bits.
fn pair<T: Element>() -> impl Fn(T, T) -> T + Send + Sync {
    let op = binary_op(Isa::get(), BinaryOp::LogAddExp, T::DTYPE).expect("floats have it");
    move |a: T, b: T| {
        let mut out = T::default();
        // SAFETY: one value of the op's type each.
        unsafe {
            op.run(&[(&raw const a).cast(), (&raw const b).cast()], (&raw mut out).cast(), 1);
        }
        out
    }
}

/// Elements of a line that are one chain.
const SEGMENT: usize = 16_384;
/// Lines that a chunk takes side by side when the axis is not the last.
const LINES: usize = 256;
/// With fewer lines side by side each is gathered by itself.
const FEW: usize = 16;
/// Chains that run at once: an addition takes four cycles, so one chain alone leaves the processor waiting.
const CHAINS: usize = 4;

struct Scan<T, F> {
    name: &'static str,
    options: ScanOptions,
    length: usize,
    /// Lines before the axis, and of those that lie side by side behind it, how many. With few behind, all are
    /// before: they are taken one by one.
    before: usize,
    behind: usize,
    source: Source,
    out: Sink,
    neutral: T,
    join: F,
    /// For every segment of every line its total, then that of all before it. Nothing if lines have one segment.
    totals: Workspace,
}

impl<T: Element, F: Fn(T, T) -> T + Send + Sync + 'static> Scan<T, F> {
    fn plan(
        name: &'static str,
        options: ScanOptions,
        source: &DynView,
        axis: usize,
        out: &DynViewMut,
        neutral: T,
        join: F,
    ) -> Plan {
        let length = source.shape[axis];
        let mut before: usize = source.shape[..axis].iter().product();
        let mut behind: usize = source.shape[axis + 1..].iter().product();
        let is_few = behind < FEW;
        // The axis in the given direction: element numbers then ascend. A line's elements are neighbours in
        // number if lines are taken one by one.
        let turn = |shape: &[usize], strides: &[isize]| {
            let (mut shape, mut strides) = (shape.to_vec(), strides.to_vec());
            let mut offset = 0;
            if options.reverse && length > 0 {
                offset = strides[axis] * (length as isize - 1);
                strides[axis] = -strides[axis];
            }
            if is_few {
                shape[axis..].rotate_left(1);
                strides[axis..].rotate_left(1);
            }
            (offset, Linear::new(&shape, &strides))
        };
        let (from, source_linear) = turn(&source.shape, &source.strides);
        let (to, out_linear) = turn(&out.shape, &out.strides);
        let mut moved = source.clone();
        moved.pointer = source.pointer.wrapping_offset(from * source.dtype.size() as isize);
        let mut sink = Sink::new(out, T::DTYPE);
        sink.pointer = out.pointer.wrapping_offset(to * out.dtype.size() as isize);
        sink.linear = out_linear;
        if is_few {
            (before, behind) = (before * behind, 1);
        }
        let source = Source::with_linear(&moved, T::DTYPE, source_linear);
        let segments = length.div_ceil(SEGMENT);
        let bytes = if segments > 1 { before * behind * segments * size_of::<T>() } else { 0 };
        Plan::new(bytes, move |totals, list| {
            let scan =
                Scan { name, options, length, before, behind, source, out: sink, neutral, join, totals };
            let scan = Arc::new(scan);
            let steps =
                if segments > 1 { &[Step::Totals, Step::Before, Step::Write][..] } else { &[Step::Write] };
            for &step in steps {
                list.push(Box::new(Pass { scan: scan.clone(), step }));
            }
        })
    }

    fn segments(&self) -> usize {
        self.length.div_ceil(SEGMENT)
    }

    /// The total of a segment of a line, or of what is before it.
    fn total(&self, line: usize, segment: usize) -> *mut T {
        self.totals.0.cast::<T>().wrapping_add(line * self.segments() + segment)
    }

    /// What is before a segment, if it is not a line's first.
    fn before(&self, line: usize, segment: usize) -> Option<T> {
        // SAFETY: written by the steps before.
        (segment > 0).then(|| unsafe { *self.total(line, segment) })
    }

    /// Several chains of `count` elements at once, one after the other in memory each: those from element
    /// `starts[i]` on. Gives their totals; writes the outputs, if they are wanted, joined with what is before.
    fn chains<const N: usize>(
        &self,
        starts: [usize; N],
        count: usize,
        write: Option<[Option<T>; N]>,
        buffers: &Buffers<T>,
    ) -> [T; N] {
        let mut totals = [self.neutral; N];
        for at in (0..count).step_by(TILE) {
            let length = TILE.min(count - at);
            // SAFETY: inside both views; buffers hold a tile each. An output that is the memory of the source
            // has its layout, so a place is read before it is written.
            unsafe {
                let tiles: [*const T; N] = std::array::from_fn(|i| {
                    self.source.load(0, starts[i] + at, length, buffers.tile[i], buffers.raw).cast()
                });
                let Some(before) = &write else {
                    for place in 0..length {
                        for i in 0..N {
                            totals[i] = (self.join)(totals[i], *tiles[i].add(place));
                        }
                    }
                    continue;
                };
                let direct: [Option<*mut u8>; N] =
                    std::array::from_fn(|i| self.out.direct(starts[i] + at, length));
                let outs: [*mut T; N] =
                    std::array::from_fn(|i| direct[i].map_or(buffers.out[i], |pointer| pointer.cast()));
                for place in 0..length {
                    for i in 0..N {
                        let old = totals[i];
                        totals[i] = (self.join)(old, *tiles[i].add(place));
                        *outs[i].add(place) = if self.options.exclusive { old } else { totals[i] };
                    }
                }
                for i in 0..N {
                    if let Some(before) = before[i] {
                        for place in 0..length {
                            *outs[i].add(place) = (self.join)(before, *outs[i].add(place));
                        }
                    }
                    if direct[i].is_none() {
                        self.out.store(outs[i].cast(), starts[i] + at, length, buffers.raw);
                    }
                }
            }
        }
        totals
    }

    /// Segments, numbered through all lines, each by itself.
    fn lines(&self, pieces: std::ops::Range<usize>, step: Step, buffers: &Buffers<T>) {
        let segments = self.segments();
        let place = |piece: usize| (piece / segments, piece % segments);
        let count = |piece: usize| SEGMENT.min(self.length - piece % segments * SEGMENT);
        let start = |piece: usize| place(piece).0 * self.length + place(piece).1 * SEGMENT;
        let before = |piece: usize| self.before(place(piece).0, place(piece).1);
        let keep = |piece: usize, total: T| {
            // SAFETY: the segment is this chunk's own.
            unsafe { self.total(place(piece).0, place(piece).1).write(total) }
        };
        let is_write = step == Step::Write;
        let mut at = pieces.start;
        while at < pieces.end {
            let many = at + CHAINS <= pieces.end && (at..at + CHAINS).all(|piece| count(piece) == count(at));
            if many {
                let group: [usize; CHAINS] = std::array::from_fn(|i| at + i);
                let write = is_write.then(|| group.map(before));
                let totals = self.chains(group.map(start), count(at), write, buffers);
                if !is_write {
                    group.iter().zip(totals).for_each(|(&piece, total)| keep(piece, total));
                }
                at += CHAINS;
            } else {
                let write = is_write.then(|| [before(at)]);
                let [total] = self.chains([start(at)], count(at), write, buffers);
                if !is_write {
                    keep(at, total);
                }
                at += 1;
            }
        }
    }

    /// Lines side by side: `count` of them from `first`, behind index `before`; one segment.
    fn columns(
        &self,
        before: usize,
        segment: usize,
        first: usize,
        count: usize,
        step: Step,
        buffers: &Buffers<T>,
    ) {
        let mut totals = [self.neutral; LINES];
        let line = before * self.behind + first;
        let is_write = step == Step::Write;
        let mut joined = [self.neutral; LINES];
        if is_write && segment > 0 {
            for (i, joined) in joined[..count].iter_mut().enumerate() {
                // SAFETY: written by the steps before.
                *joined = unsafe { *self.total(line + i, segment) };
            }
        }
        for at in segment * SEGMENT..self.length.min((segment + 1) * SEGMENT) {
            let start = (before * self.length + at) * self.behind + first;
            // SAFETY: inside both views; buffers hold a tile.
            unsafe {
                let tile = self.source.load(0, start, count, buffers.tile[0], buffers.raw).cast::<T>();
                let out = buffers.out[0];
                for (i, total) in totals[..count].iter_mut().enumerate() {
                    let old = *total;
                    *total = (self.join)(old, *tile.add(i));
                    *out.add(i) = if self.options.exclusive { old } else { *total };
                }
                if is_write {
                    if segment > 0 {
                        for (i, &joined) in joined[..count].iter().enumerate() {
                            *out.add(i) = (self.join)(joined, *out.add(i));
                        }
                    }
                    self.out.store(out.cast(), start, count, buffers.raw);
                }
            }
        }
        if !is_write {
            for (i, &total) in totals[..count].iter().enumerate() {
                // SAFETY: the segment of these lines is this chunk's own.
                unsafe { self.total(line + i, segment).write(total) }
            }
        }
    }

    /// Turns a line's totals into those of all that is before each segment.
    fn add_up(&self, line: usize) {
        // SAFETY: the line's totals, written by the step before, this chunk's alone.
        let totals = unsafe { std::slice::from_raw_parts_mut(self.total(line, 0), self.segments()) };
        let mut so_far = totals[0];
        for total in &mut totals[1..] {
            so_far = (self.join)(std::mem::replace(total, so_far), so_far);
        }
    }

    fn pieces_a_chunk(&self) -> usize {
        (CHUNK / self.length.min(SEGMENT)).max(1).next_multiple_of(CHAINS)
    }
}

/// What is done with the elements.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Find each segment's total.
    Totals,
    /// Add them up.
    Before,
    Write,
}

struct Pass<T, F> {
    scan: Arc<Scan<T, F>>,
    step: Step,
}

struct Buffers<T> {
    tile: [*mut u8; CHAINS],
    out: [*mut T; CHAINS],
    raw: *mut u8,
}

impl<T: Element, F: Fn(T, T) -> T + Send + Sync + 'static> Task for Pass<T, F> {
    fn chunks(&self) -> usize {
        let scan = &*self.scan;
        if scan.length == 0 {
            0
        } else if self.step == Step::Before {
            scan.before * scan.behind
        } else if scan.behind == 1 {
            (scan.before * scan.segments()).div_ceil(scan.pieces_a_chunk())
        } else {
            scan.before * scan.segments() * scan.behind.div_ceil(LINES)
        }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let scan = &*self.scan;
        if self.step == Step::Before {
            return scan.add_up(chunk);
        }
        let buffers = Buffers {
            tile: std::array::from_fn(|_| scratch.take::<u8>(TILE_BYTES).as_mut_ptr()),
            out: std::array::from_fn(|_| scratch.take::<u8>(TILE_BYTES).as_mut_ptr().cast::<T>()),
            raw: scratch.take::<u8>(TILE_BYTES).as_mut_ptr(),
        };
        if scan.behind == 1 {
            let step = scan.pieces_a_chunk();
            let pieces = scan.before * scan.segments();
            scan.lines(chunk * step..pieces.min((chunk + 1) * step), self.step, &buffers);
        } else {
            let blocks = scan.behind.div_ceil(LINES);
            let (block, rest) = (chunk % blocks, chunk / blocks);
            let (before, segment) = (rest / scan.segments(), rest % scan.segments());
            let count = LINES.min(scan.behind - block * LINES);
            scan.columns(before, segment, block * LINES, count, self.step, &buffers);
        }
    }

    fn name(&self) -> &'static str {
        self.scan.name
    }
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::*;
    use crate::plan::run_plan;
    use crate::testing::{Laid, Layout, layouts};

    /// One line in its direction.
    fn expected(op: ScanOp, options: ScanOptions, line: &[f64], f32s: bool) -> Vec<f64> {
        let round = |x: f64| if f32s { x as f32 as f64 } else { x };
        let neutral = match op {
            ScanOp::Sum => 0.0,
            ScanOp::Prod => 1.0,
            ScanOp::Max | ScanOp::LogSumExp => f64::NEG_INFINITY,
            ScanOp::Min => f64::INFINITY,
        };
        let mut total = neutral;
        let mut out = vec![0.0; line.len()];
        for step in 0..line.len() {
            let at = if options.reverse { line.len() - 1 - step } else { step };
            let before = total;
            let x = line[at];
            total = match op {
                ScanOp::Sum => round(total + x),
                ScanOp::Prod => round(total * x),
                ScanOp::Max => {
                    if total.is_nan() || x.is_nan() {
                        f64::NAN
                    } else {
                        total.max(x)
                    }
                }
                ScanOp::Min => {
                    if total.is_nan() || x.is_nan() {
                        f64::NAN
                    } else {
                        total.min(x)
                    }
                }
                ScanOp::LogSumExp => {
                    let top = total.max(x);
                    if top == f64::NEG_INFINITY {
                        top
                    } else {
                        top + ((total - top).exp() + (x - top).exp()).ln()
                    }
                }
            };
            out[at] = if options.exclusive { before } else { total };
        }
        out
    }

    #[test]
    fn lines_of_every_axis_type_and_direction() {
        let mut rng = Rng::new(31);
        for (shape, axis) in [
            (&[9][..], 0),
            (&[3000], 0),
            (&[40, 7], 1),
            (&[7, 40], 0),
            (&[3, 5, 300], 1),
            (&[9, 20, 3], 1),
            (&[2, 1, 3], 1),
            (&[4, 0], 1),
        ] {
            let stride: usize = shape[axis + 1..].iter().product();
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::F64, Dtype::I32, Dtype::I8] {
                for op in [ScanOp::Sum, ScanOp::Prod, ScanOp::Max, ScanOp::Min, ScanOp::LogSumExp] {
                    if op == ScanOp::LogSumExp && !dtype.is_float() {
                        continue;
                    }
                    for (reverse, exclusive) in [(false, false), (true, false), (false, true), (true, true)] {
                        let options = ScanOptions { reverse, exclusive };
                        // Integers: few and small, so that the reference need not wrap.
                        let values: Vec<f64> = (0..shape.iter().product())
                            .map(|_| {
                                if dtype.is_integer() {
                                    if rng.chance(0.01) { -1.0 } else { (op != ScanOp::Sum) as u8 as f64 }
                                } else {
                                    rng.normal() as f64
                                }
                            })
                            .collect();
                        let a = Laid::new(dtype, shape, *rng.choose(&layouts(shape)), &values);
                        let values = a.values();
                        let mut want = vec![0.0; values.len()];
                        for first in (0..values.len())
                            .filter(|at| (at / stride.max(1)).is_multiple_of(shape[axis].max(1)))
                        {
                            let line: Vec<f64> =
                                (0..shape[axis]).map(|i| values[first + i * stride]).collect();
                            let line = expected(op, options, &line, dtype != Dtype::F64);
                            for (i, value) in line.into_iter().enumerate() {
                                want[first + i * stride] = value;
                            }
                        }
                        let want = Laid::contiguous(dtype, shape, &want).values();
                        let mut first: Option<Vec<f64>> = None;
                        for threads in [1, 3] {
                            let mut out = Laid::poisoned(dtype, shape, *rng.choose(&layouts(shape)));
                            let plan = scan(op, options, a.view(), axis, out.view_mut()).unwrap();
                            run_plan(&Pool::new(threads), plan);
                            out.check_untouched_outside();
                            let got = out.values();
                            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                                // log-sum-exp: 2 + 3 units a step, against f64.
                                let loose = op == ScanOp::LogSumExp
                                    && (got - want).abs()
                                        <= 1e-2
                                            * if dtype == Dtype::BF16 { 2.0 } else { 0.02 }
                                            * want.abs().max(1.0);
                                assert!(
                                    got == want || loose,
                                    "{op:?} {options:?} {dtype} {shape:?} [{i}]: {got} {want}"
                                );
                            }
                            match &first {
                                None => first = Some(got),
                                Some(first) => assert!(*first == got),
                            }
                        }
                    }
                }
            }
        }
    }

    /// Lines of several segments, alone, few and many side by side.
    #[test]
    fn long_lines_are_chains_of_segments() {
        let mut rng = Rng::new(37);
        let length = 2 * SEGMENT + 1234;
        for (shape, axis) in [(&[length][..], 0), (&[3, length], 1), (&[length, 2], 0), (&[length, 20], 0)] {
            let stride: usize = shape[axis + 1..].iter().product();
            for (dtype, op) in [
                (Dtype::F32, ScanOp::Sum),
                (Dtype::BF16, ScanOp::Sum),
                (Dtype::I32, ScanOp::Sum),
                (Dtype::F32, ScanOp::Max),
                (Dtype::F32, ScanOp::LogSumExp),
            ] {
                let a = Laid::random(dtype, shape, *rng.choose(&layouts(shape)), &mut rng);
                let values = a.values();
                for (reverse, exclusive) in [(false, false), (true, true)] {
                    let options = ScanOptions { reverse, exclusive };
                    let mut first: Option<Vec<f64>> = None;
                    for threads in [1, 3] {
                        let mut out = Laid::poisoned(dtype, shape, *rng.choose(&layouts(shape)));
                        let plan = scan(op, options, a.view(), axis, out.view_mut()).unwrap();
                        run_plan(&Pool::new(threads), plan);
                        out.check_untouched_outside();
                        let got = out.values();
                        if let Some(first) = &first {
                            assert!(*first == got, "{op:?} {dtype} {shape:?}");
                        }
                        first = Some(got);
                    }
                    let got = first.expect("it ran");
                    for start in (0..values.len()).filter(|at| (at / stride).is_multiple_of(length)) {
                        let line: Vec<f64> = (0..length).map(|i| values[start + i * stride]).collect();
                        let exact = expected(op, options, &line, false);
                        let size = line.iter().fold(1f64, |sum, value| sum + value.abs());
                        // A chain loses half a unit of its size a step at most, on average far less; bf16
                        // rounds its outputs.
                        let loss = if dtype == Dtype::BF16 { 4e-3 } else { 1e-6 };
                        for (i, want) in exact.into_iter().enumerate() {
                            let got = got[start + i * stride];
                            let near = (got - want).abs() <= loss * size.max(want.abs()) || got == want;
                            let exact = dtype == Dtype::F32 && op == ScanOp::Max || dtype == Dtype::I32;
                            assert!(
                                if exact { got == want } else { near },
                                "{op:?} {options:?} {dtype} {shape:?} [{i}]: {got} {want}"
                            );
                        }
                    }
                }
            }
        }
        // It never falls.
        let values: Vec<f64> = (0..length).map(|_| rng.normal().abs() as f64).collect();
        let a = Laid::contiguous(Dtype::F32, &[length], &values);
        let mut out = Laid::poisoned(Dtype::F32, &[length], Layout::Contiguous);
        run_plan(
            &Pool::new(2),
            scan(ScanOp::Sum, ScanOptions::default(), a.view(), 0, out.view_mut()).unwrap(),
        );
        assert!(out.values().is_sorted());
    }

    #[test]
    fn in_place_nan_and_bools() {
        let mut a = Laid::contiguous(Dtype::F32, &[3], &[1.0, f64::NAN, 3.0]);
        let plan = scan(ScanOp::Max, ScanOptions::default(), a.view(), 0, a.view_mut()).unwrap();
        run_plan(&Pool::new(1), plan);
        let got = a.values();
        assert!(got[0] == 1.0 && got[1].is_nan() && got[2].is_nan(), "{got:?}");
        let b = Laid::contiguous(Dtype::Bool, &[3], &[1.0, 1.0, 1.0]);
        let mut out = Laid::poisoned(Dtype::I32, &[3], Layout::Contiguous);
        let plan = scan(ScanOp::Sum, ScanOptions::default(), b.view(), 0, out.view_mut()).unwrap();
        run_plan(&Pool::new(1), plan);
        assert_eq!(out.values(), [1.0, 2.0, 3.0]);
        let wrong = scan(ScanOp::LogSumExp, ScanOptions::default(), b.view(), 0, b.clone().view_mut());
        assert!(wrong.err().unwrap().to_string().contains("floating types"));
    }
}
