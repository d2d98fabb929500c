//! Reading and writing at places that data name: gather, take, scatter.
//!
//! Indices are of any integer type; negative ones count from the end. An index outside its axis
//! ends the task with a message that names it (where MLX reads or writes whatever is there).
//!
//! Scattering is deterministic: every output element is changed by one chunk alone, by its
//! updates in ascending order. Half types are joined in f32 and rounded once.
//!
//! Outputs of [`gather`], [`take`] and [`take_along_axis`] must not overlap the source; of the
//! scatters, not the updates or indices.

mod gather;
mod scatter;

pub use gather::{gather, take, take_along_axis};
pub use scatter::{ScatterOp, scatter, scatter_along_axis};

use std::ops::Range;

use mica_simd::Isa;

use crate::dtype::{Dtype, DynView};
use crate::elementwise::tile::{Source, TILE, broadcast};
use crate::error::KernelError;
use crate::layout::prefetch;

/// A place in an array, or an index: 32 bits where they are enough, because vectors then hold twice as many (and
/// the simplest ones know no arithmetic of 64).
trait Place: Copy + std::ops::BitOr<Output = Self> + std::ops::BitAnd<Output = Self> {
    const ZERO: Self;
    /// The type of indices that come as this.
    const DTYPE: Dtype;
    /// A number that fits.
    fn of(number: isize) -> Self;
    fn offset(self) -> isize;
    /// The number that this index was: `signed` says how to read its highest bit.
    fn index(self, signed: bool) -> i128;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    /// All bits are the sign.
    fn sign(self) -> Self;
}

macro_rules! places {
    ($($t:ty, $unsigned:ty, $dtype:ident;)*) => { $(
        impl Place for $t {
            const ZERO: $t = 0;
            const DTYPE: Dtype = Dtype::$dtype;
            #[inline(always)]
            fn of(number: isize) -> $t {
                number as $t
            }
            #[inline(always)]
            fn offset(self) -> isize {
                self as isize
            }
            fn index(self, signed: bool) -> i128 {
                if signed { self as i128 } else { self as $unsigned as i128 }
            }
            #[inline(always)]
            fn plus(self, other: $t) -> $t {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn minus(self, other: $t) -> $t {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn times(self, other: $t) -> $t {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn sign(self) -> $t {
                self >> (<$t>::BITS - 1)
            }
        }
    )* };
}
places! {
    i32, u32, I32;
    i64, u64, I64;
}

/// Whether indices of `dtype` and places in an array of this layout are [`Place`]s of 32 bits.
fn fits_narrow(dtype: Dtype, shape: &[usize], strides: &[isize]) -> bool {
    let reach =
        |(&size, &stride): (&usize, &isize)| size.saturating_sub(1).saturating_mul(stride.unsigned_abs());
    let span = shape.iter().zip(strides).map(reach).fold(0, usize::saturating_add);
    let sizes = shape.iter().copied().max().unwrap_or(0);
    dtype.size() <= 4 && span.max(sizes) < i32::MAX as usize
}

/// Indices along one axis of an array, and how far apart its places are.
struct AxisIndex {
    name: &'static str,
    indices: Source,
    /// Negative indices count from the end; unsigned ones are never negative.
    from_end: bool,
    axis: usize,
    size: usize,
    /// Index values that leave room for the slice behind them.
    room: usize,
    stride: isize,
}

impl AxisIndex {
    /// `indices`, broadcast to `shape`, of slices of `slice` places on an axis of `size`. They come as `P`.
    fn new<P: Place>(
        name: &'static str,
        indices: &DynView,
        shape: &[usize],
        axis: usize,
        size: usize,
        slice: usize,
        stride: isize,
    ) -> Result<AxisIndex, KernelError> {
        if !indices.dtype.is_integer() {
            let message = format!("indices must be integers, got {}", indices.dtype);
            return Err(KernelError::new(name, message));
        }
        let mut wide = broadcast(name, indices, shape)?;
        let room = (size + 1).saturating_sub(slice.max(1));
        // Unsigned numbers of the same width are read as they are: what would be negative is outside in any case.
        let unsigned = matches!((wide.dtype, P::DTYPE), (Dtype::U32, Dtype::I32) | (Dtype::U64, Dtype::I64));
        if unsigned {
            wide.dtype = P::DTYPE;
        }
        let indices = Source::new(&wide, P::DTYPE);
        Ok(AxisIndex { name, indices, from_end: !unsigned, axis, size, room, stride })
    }

    /// Adds to `places` the offsets of indices from `start`; at most a tile of them.
    ///
    /// # Safety
    /// They are inside the indices' shape; `buffer` and `raw` hold a tile; P is the type that this was made for.
    unsafe fn add_offsets<P: Place>(&self, start: usize, places: &mut [P], buffer: *mut u8, raw: *mut u8) {
        debug_assert!(places.len() <= TILE);
        // SAFETY: promised by the caller.
        let indices = unsafe {
            let tile = self.indices.load(0, start, places.len(), buffer, raw);
            std::slice::from_raw_parts(tile.cast::<P>(), places.len())
        };
        match Isa::get() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the tier is the machine's.
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { self.add_avx512(indices, places) },
            _ => self.add(indices, places),
        }
    }

    /// [`AxisIndex::add`] with the tier's vectors.
    ///
    /// # Safety
    /// The processor has the tier's features.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn add_avx512<P: Place>(&self, indices: &[P], places: &mut [P]) {
        self.add(indices, places)
    }

    /// Adds the offsets of indices to as many places.
    #[inline(always)]
    fn add<P: Place>(&self, indices: &[P], places: &mut [P]) {
        // Without a branch and without comparing, so that it becomes vectors: one is outside if one of these
        // numbers is negative. Which one is looked for once there is any.
        let wrap = P::of(if self.from_end { self.size as isize } else { 0 });
        let (last, stride) = (P::of(self.room as isize - 1), P::of(self.stride));
        let at = |index: P| index.plus(wrap & index.sign());
        let signs = |index: P| at(index) | last.minus(at(index));
        let outside = |bits: P| bits.sign().offset() != 0;
        if outside(indices.iter().fold(P::ZERO, |any, &index| any | signs(index))) {
            let index = indices.iter().find(|&&index| outside(signs(index))).expect("one is outside");
            self.fail(index.index(self.from_end));
        }
        if self.stride == 1 {
            places.iter_mut().zip(indices).for_each(|(place, &index)| *place = place.plus(at(index)));
        } else {
            let offset = |index: P| at(index).times(stride);
            places.iter_mut().zip(indices).for_each(|(place, &index)| *place = place.plus(offset(index)));
        }
    }

    /// Asks memory for indices that are wanted soon.
    fn ask_for(&self, range: Range<usize>) {
        if !range.is_empty()
            && let Some(indices) = self.indices.dense(0, range.start, range.len())
        {
            prefetch(indices, range.len() * self.indices.dtype.size());
        }
    }

    /// Ends the task; the pool turns the message into an error. Not `panic!`, because this is bad
    /// data and not a bug: no backtrace belongs on stderr.
    #[cold]
    fn fail(&self, index: i128) -> ! {
        let (name, axis, size) = (self.name, self.axis, self.size);
        let slice = match size - self.room {
            0 => String::new(),
            more => format!(" (slices of {})", more + 1),
        };
        let message = format!("[{name}] index {index} is outside axis {axis} of {size}{slice}");
        std::panic::resume_unwind(Box::new(message))
    }
}

/// The shape that all index arrays broadcast to.
fn common_shape(name: &'static str, indices: &[(usize, DynView)]) -> Result<Vec<usize>, KernelError> {
    let rank = indices.iter().map(|(_, view)| view.shape.len()).max().unwrap_or(0);
    let mut shape = vec![1; rank];
    for (_, view) in indices {
        let missing = rank - view.shape.len();
        for (size, &own) in shape[missing..].iter_mut().zip(&view.shape) {
            if *size == 1 {
                *size = own;
            } else if own != 1 && own != *size {
                let shapes: Vec<_> = indices.iter().map(|(_, view)| &view.shape).collect();
                return Err(KernelError::new(name, format!("index shapes {shapes:?} do not broadcast")));
            }
        }
    }
    Ok(shape)
}

/// Axes are distinct and slices fit.
fn check_slices(
    name: &'static str,
    shape: &[usize],
    axes: impl Iterator<Item = usize>,
    slice: &[usize],
) -> Result<(), KernelError> {
    if slice.len() != shape.len() || slice.iter().zip(shape).any(|(part, size)| part > size) {
        let message = format!("slices of shape {slice:?} do not fit in shape {shape:?}");
        return Err(KernelError::new(name, message));
    }
    let mut seen = vec![false; shape.len()];
    for axis in axes {
        if axis >= shape.len() || std::mem::replace(&mut seen[axis], true) {
            let message = format!("index axes must be distinct axes of shape {shape:?}, got {axis}");
            return Err(KernelError::new(name, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
