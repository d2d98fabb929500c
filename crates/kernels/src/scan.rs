//! Running sums, products and extremes along an axis.
//!
//! Each line is one chain in its order; half types accumulate in f32 and round each output.
//! NaN in an extreme stays to the end of the line. The output may be the memory of the source if
//! both have the same layout and type.

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::element::{Bool8, Complex32, Element};
use crate::elementwise::tile::{CHUNK, Sink, Source, TILE, TILE_BYTES, check_output, check_rank};
use crate::elementwise::{BinaryOp, binary_op, complex};
use crate::error::KernelError;
use crate::layout::Linear;
use crate::view::{Dims, Strides};

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
) -> Result<Box<dyn Task>, KernelError> {
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
                ScanOp::Sum => Ok(Scan::<$t, _>::boxed(name, options, &source, axis, &out, $zero, $add)),
                ScanOp::Prod => Ok(Scan::<$t, _>::boxed(name, options, &source, axis, &out, $one, $multiply)),
                ScanOp::Max => Ok(Scan::<$t, _>::boxed(name, options, &source, axis, &out, $low, $max)),
                ScanOp::Min => Ok(Scan::<$t, _>::boxed(name, options, &source, axis, &out, $high, $min)),
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
                Ok(Scan::<$t, _>::boxed(name, options, &source, axis, &out, $t::NEG_INFINITY, join))
            } else {
                make!(
                    $t,
                    0.0,
                    1.0,
                    $t::NEG_INFINITY,
                    $t::INFINITY,
                    |a: $t, b: $t| a + b,
                    |a: $t, b: $t| a * b,
                    |a: $t, b: $t| if a.is_nan() || a > b { a } else { b },
                    |a: $t, b: $t| if a.is_nan() || a < b { a } else { b }
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
            Ok(Scan::<Complex32, _>::boxed(name, options, &source, axis, &out, start, of(joined)))
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

/// Lines that a chunk takes side by side when the axis is not the last.
const LINES: usize = 256;

struct Scan<T, F> {
    name: &'static str,
    options: ScanOptions,
    length: usize,
    /// Lines before the axis and, of those that lie side by side behind it, how many.
    before: usize,
    behind: usize,
    source: Source,
    out: Sink,
    neutral: T,
    join: F,
}

impl<T: Element, F: Fn(T, T) -> T + Send + Sync + 'static> Scan<T, F> {
    fn boxed(
        name: &'static str,
        options: ScanOptions,
        source: &DynView,
        axis: usize,
        out: &DynViewMut,
        neutral: T,
        join: F,
    ) -> Box<dyn Task> {
        // The axis in the given direction: element numbers then ascend.
        let flip = |shape: &Dims, strides: &Strides| {
            let mut strides = strides.clone();
            let mut offset = 0;
            if options.reverse && shape[axis] > 0 {
                offset = strides[axis] * (shape[axis] as isize - 1);
                strides[axis] = -strides[axis];
            }
            (offset, Linear::new(shape, &strides))
        };
        let (from, source_linear) = flip(&source.shape, &source.strides);
        let (to, out_linear) = flip(&out.shape, &out.strides);
        let mut moved = source.clone();
        moved.pointer = source.pointer.wrapping_offset(from * source.dtype.size() as isize);
        let mut sink = Sink::new(out, T::DTYPE);
        sink.pointer = out.pointer.wrapping_offset(to * out.dtype.size() as isize);
        sink.linear = out_linear;
        Box::new(Scan {
            name,
            options,
            length: source.shape[axis],
            before: source.shape[..axis].iter().product(),
            behind: source.shape[axis + 1..].iter().product(),
            source: Source::with_linear(&moved, T::DTYPE, source_linear),
            out: sink,
            neutral,
            join,
        })
    }

    /// Lines one after the other: elements of a line are neighbours in number.
    fn lines(&self, lines: std::ops::Range<usize>, buffers: &Buffers<T>) {
        for line in lines {
            let mut total = self.neutral;
            for at in (0..self.length).step_by(TILE) {
                let count = TILE.min(self.length - at);
                let start = line * self.length + at;
                // SAFETY: inside both views; buffers hold a tile.
                unsafe {
                    let tile = self.source.load(0, start, count, buffers.tile, buffers.raw).cast::<T>();
                    for i in 0..count {
                        let before = total;
                        total = (self.join)(total, *tile.add(i));
                        *buffers.out.add(i) = if self.options.exclusive { before } else { total };
                    }
                    self.out.store(buffers.out.cast(), start, count, buffers.raw);
                }
            }
        }
    }

    /// Lines side by side: `count` of them from `first`, behind index `before`.
    fn columns(&self, before: usize, first: usize, count: usize, buffers: &Buffers<T>) {
        let mut totals = [self.neutral; LINES];
        for at in 0..self.length {
            let start = (before * self.length + at) * self.behind + first;
            // SAFETY: inside both views; buffers hold a tile.
            unsafe {
                let tile = self.source.load(0, start, count, buffers.tile, buffers.raw).cast::<T>();
                for (i, total) in totals[..count].iter_mut().enumerate() {
                    let old = *total;
                    *total = (self.join)(old, *tile.add(i));
                    *buffers.out.add(i) = if self.options.exclusive { old } else { *total };
                }
                self.out.store(buffers.out.cast(), start, count, buffers.raw);
            }
        }
    }

    fn lines_a_chunk(&self) -> usize {
        (CHUNK / self.length).max(1)
    }
}

struct Buffers<T> {
    tile: *mut u8,
    raw: *mut u8,
    out: *mut T,
}

impl<T: Element, F: Fn(T, T) -> T + Send + Sync + 'static> Task for Scan<T, F> {
    fn chunks(&self) -> usize {
        if self.length == 0 {
            0
        } else if self.behind == 1 {
            self.before.div_ceil(self.lines_a_chunk())
        } else {
            self.before * self.behind.div_ceil(LINES)
        }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let buffers = Buffers {
            tile: scratch.take::<u8>(TILE_BYTES).as_mut_ptr(),
            raw: scratch.take::<u8>(TILE_BYTES).as_mut_ptr(),
            out: scratch.take::<u8>(TILE_BYTES).as_mut_ptr().cast::<T>(),
        };
        if self.behind == 1 {
            let step = self.lines_a_chunk();
            self.lines(chunk * step..self.before.min((chunk + 1) * step), &buffers);
        } else {
            let blocks = self.behind.div_ceil(LINES);
            let first = chunk % blocks * LINES;
            self.columns(chunk / blocks, first, LINES.min(self.behind - first), &buffers);
        }
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::*;
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
                            let task = scan(op, options, a.view(), axis, out.view_mut()).unwrap();
                            Pool::new(threads).run(&[task]).unwrap();
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

    #[test]
    fn in_place_nan_and_bools() {
        let mut a = Laid::contiguous(Dtype::F32, &[3], &[1.0, f64::NAN, 3.0]);
        let task = scan(ScanOp::Max, ScanOptions::default(), a.view(), 0, a.view_mut()).unwrap();
        Pool::new(1).run(&[task]).unwrap();
        let got = a.values();
        assert!(got[0] == 1.0 && got[1].is_nan() && got[2].is_nan(), "{got:?}");
        let b = Laid::contiguous(Dtype::Bool, &[3], &[1.0, 1.0, 1.0]);
        let mut out = Laid::poisoned(Dtype::I32, &[3], Layout::Contiguous);
        let task = scan(ScanOp::Sum, ScanOptions::default(), b.view(), 0, out.view_mut()).unwrap();
        Pool::new(1).run(&[task]).unwrap();
        assert_eq!(out.values(), [1.0, 2.0, 3.0]);
        let wrong = scan(ScanOp::LogSumExp, ScanOptions::default(), b.view(), 0, b.clone().view_mut());
        assert!(wrong.err().unwrap().to_string().contains("floating types"));
    }
}
