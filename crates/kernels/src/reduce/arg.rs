//! The place of the largest or smallest element along an axis.

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::geometry::Geometry;
use super::loops::{Largest, Smallest, extreme, first_place};
use super::{Buffers, LANES};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::element::{Bool8, Complex32, Element};
use crate::elementwise::tile::{CHUNK, Sink, Source, TILE, check_output, compute_dtype};
use crate::error::KernelError;
use crate::layout::Linear;

/// Elements of a row that are searched at a time: they are read twice, the second time from the first-level cache.
const DENSE_TILE: usize = 4096;

/// Largest or smallest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ArgReduceOp {
    /// The first largest.
    ArgMax,
    /// The first smallest.
    ArgMin,
}

impl ArgReduceOp {
    /// The name, as MLX spells it.
    pub const fn name(self) -> &'static str {
        match self {
            ArgReduceOp::ArgMax => "argmax",
            ArgReduceOp::ArgMin => "argmin",
        }
    }
}

/// `out` (uint32) = the index along `axis` of the first largest or smallest element, or of the
/// first NaN if there is one.
pub fn arg_reduce(
    op: ArgReduceOp,
    source: DynView,
    axis: usize,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let name = op.name();
    if out.dtype != Dtype::U32 {
        return Err(KernelError::new(name, format!("gives uint32, the output is {}", out.dtype)));
    }
    check_output(name, &out)?;
    let geometry = Geometry::new(name, &source, &[axis], &out.shape)?;
    if geometry.reduced() == 0 && geometry.outputs() > 0 {
        return Err(KernelError::new(name, format!("of no elements: shape {:?}, axis {axis}", source.shape)));
    }
    if geometry.reduced() > u32::MAX as usize {
        return Err(KernelError::new(name, "of more than 2^32 elements does not fit in uint32"));
    }
    let max = op == ArgReduceOp::ArgMax;
    macro_rules! make {
        ($t:ty, $nan:expr) => {
            make!($t, $nan, top, top, place)
        };
        ($t:ty, $nan:expr, $largest:expr, $smallest:expr, $place:expr) => {
            if max {
                let better = |a: $t, b: $t| (a > b) | ($nan(a) & !$nan(b));
                ArgReduce::<$t, _>::boxed(name, geometry, &source, &out, better, $largest, $place)
            } else {
                let better = |a: $t, b: $t| (a < b) | ($nan(a) & !$nan(b));
                ArgReduce::<$t, _>::boxed(name, geometry, &source, &out, better, $smallest, $place)
            }
        };
    }
    Ok(match compute_dtype(source.dtype) {
        Dtype::Bool => make!(Bool8, |_| false),
        Dtype::U8 => make!(u8, |_| false),
        Dtype::U16 => make!(u16, |_| false),
        Dtype::U32 => make!(u32, |_| false),
        Dtype::U64 => make!(u64, |_| false),
        Dtype::I8 => make!(i8, |_| false),
        Dtype::I16 => make!(i16, |_| false),
        Dtype::I32 => make!(i32, |_| false),
        Dtype::I64 => make!(i64, |_| false),
        Dtype::F32 => {
            make!(
                f32,
                |x: f32| x.is_nan(),
                |_, values| extreme::<Largest>(Isa::get(), values),
                |_, values| { extreme::<Smallest>(Isa::get(), values) },
                |_, values, top| first_place(Isa::get(), values, top)
            )
        }
        Dtype::F64 => make!(f64, |x: f64| x.is_nan()),
        Dtype::C64 => {
            let less = crate::elementwise::complex::stored_is_less;
            let nan = |x: Complex32| x.re.is_nan() || x.im.is_nan();
            let better = move |a: Complex32, b: Complex32| {
                (nan(a) && !nan(b)) || if max { less(b, a) } else { less(a, b) }
            };
            ArgReduce::<Complex32, _>::boxed(name, geometry, &source, &out, better, top, place)
        }
        Dtype::F16 | Dtype::BF16 => {
            return Err(KernelError::new(name, format!("not defined for {}", source.dtype)));
        }
    })
}

/// `better(a, b)`: a beats b. No two elements beat each other; ties go to the first.
struct ArgReduce<T, F> {
    name: &'static str,
    source: Source,
    kept: Linear,
    /// The axis, if the last axis is kept: outputs are then taken a tile at a time.
    columns: Option<Linear>,
    out: Sink,
    better: F,
    top: Top<T, F>,
    place: Place<T, F>,
    outputs_a_chunk: usize,
}

/// Finds the best of at least one value.
type Top<T, F> = fn(&F, &[T]) -> T;
/// Finds the first place of the best.
type Place<T, F> = fn(&F, &[T], T) -> usize;

fn top<T: Copy, F: Fn(T, T) -> bool>(better: &F, values: &[T]) -> T {
    let mut lanes = [values[0]; LANES];
    let (blocks, tail) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            let (a, b) = (block[lane], lanes[lane]);
            lanes[lane] = if better(a, b) { a } else { b };
        }
    }
    let mut top = lanes[0];
    for &value in lanes.iter().chain(tail) {
        top = if better(value, top) { value } else { top };
    }
    top
}

fn place<T: Copy, F: Fn(T, T) -> bool>(better: &F, values: &[T], top: T) -> usize {
    let is_top = |value: &T| !better(top, *value);
    let has_top = |block: &[T; LANES]| block.iter().fold(false, |any, value| any | is_top(value));
    let (blocks, _) = values.as_chunks::<LANES>();
    let block = blocks.iter().position(has_top).unwrap_or(blocks.len());
    let place = values[block * LANES..].iter().position(is_top);
    block * LANES + place.expect("the best value is one of them")
}

impl<T: Element, F: Fn(T, T) -> bool + Send + Sync + 'static> ArgReduce<T, F> {
    fn boxed(
        name: &'static str,
        geometry: Geometry,
        source: &DynView,
        out: &DynViewMut,
        better: F,
        top: Top<T, F>,
        place: Place<T, F>,
    ) -> Box<dyn Task> {
        let length = geometry.reduced().max(1);
        let Geometry { kept, outer, row, by_columns } = geometry;
        let linear = if by_columns { kept.clone() } else { row };
        Box::new(ArgReduce {
            name,
            source: Source::with_linear(source, T::DTYPE, linear),
            kept,
            columns: by_columns.then_some(outer),
            out: Sink::new(out, Dtype::U32),
            better,
            top,
            place,
            outputs_a_chunk: if by_columns { 256 } else { (CHUNK / length).max(1) },
        })
    }

    /// The place of the best of a row. A tile is first reduced to its best value, and searched for it only if
    /// that beats the best so far; both are loops over blocks without a branch, which become vectors.
    fn row(&self, base: isize, buffers: &Buffers) -> u32 {
        let length = self.source.linear.size();
        let mut best: Option<(T, usize)> = None;
        // What needs no buffer is taken in larger pieces.
        let dense = self.source.dense(base, 0, length);
        let step = if dense.is_some() { DENSE_TILE } else { TILE };
        for start in (0..length).step_by(step) {
            let count = step.min(length - start);
            // SAFETY: inside the source; the buffers hold a tile.
            let values = unsafe {
                let tile = match dense {
                    Some(dense) => dense.cast::<T>().add(start).cast(),
                    None => self.source.load(base, start, count, buffers.tile, buffers.raw),
                };
                std::slice::from_raw_parts(tile.cast::<T>(), count)
            };
            let top = (self.top)(&self.better, values);
            if best.is_none_or(|(value, _)| (self.better)(top, value)) {
                best = Some((top, start + (self.place)(&self.better, values, top)));
            }
        }
        best.expect("rows are not empty").1 as u32
    }
}

impl<T: Element, F: Fn(T, T) -> bool + Send + Sync + 'static> Task for ArgReduce<T, F> {
    fn chunks(&self) -> usize {
        self.kept.size().div_ceil(self.outputs_a_chunk)
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let buffers = Buffers::new(scratch);
        let end = self.kept.size().min((chunk + 1) * self.outputs_a_chunk);
        let mut places = [0u32; 256];
        for start in (chunk * self.outputs_a_chunk..end).step_by(256) {
            let count = 256.min(end - start);
            let places = &mut places[..count];
            match &self.columns {
                None => {
                    for (i, place) in places.iter_mut().enumerate() {
                        *place = self.row(self.kept.offset(start + i), &buffers);
                    }
                }
                Some(axis) => {
                    let mut best = [T::default(); 256];
                    for at in 0..axis.size() {
                        // SAFETY: inside the source; the buffers hold a tile.
                        let values = unsafe {
                            let base = axis.offset(at);
                            let tile = self.source.load(base, start, count, buffers.tile, buffers.raw);
                            std::slice::from_raw_parts(tile.cast::<T>(), count)
                        };
                        for (i, &value) in values.iter().enumerate() {
                            if at == 0 || (self.better)(value, best[i]) {
                                best[i] = value;
                                places[i] = at as u32;
                            }
                        }
                    }
                }
            }
            // SAFETY: outputs of this chunk.
            unsafe { self.out.store(places.as_ptr().cast(), start, count, buffers.raw) }
        }
    }

    fn name(&self) -> &'static str {
        self.name
    }
}
