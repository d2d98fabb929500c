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

use crate::dtype::{Dtype, DynView};
use crate::elementwise::tile::{Source, TILE, broadcast};
use crate::error::KernelError;

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
    /// `indices`, broadcast to `shape`, of slices of `slice` places on an axis of `size`.
    fn new(
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
        let wide = broadcast(name, indices, shape)?;
        let room = (size + 1).saturating_sub(slice.max(1));
        let from_end = indices.dtype != Dtype::U64;
        Ok(AxisIndex { name, indices: Source::new(&wide, Dtype::I64), from_end, axis, size, room, stride })
    }

    /// Adds to `places` the offsets of indices from `start`; at most a tile of them.
    ///
    /// # Safety
    /// They are inside the indices' shape; `buffer` and `raw` hold a tile.
    unsafe fn add_offsets(&self, start: usize, places: &mut [i64], buffer: *mut u8, raw: *mut u8) {
        debug_assert!(places.len() <= TILE);
        // SAFETY: promised by the caller.
        let indices = unsafe {
            let tile = self.indices.load(0, start, places.len(), buffer, raw);
            std::slice::from_raw_parts(tile.cast::<i64>(), places.len())
        };
        // Without a branch and without comparing, so that it becomes vectors: one is outside if one of these
        // numbers is negative. Which one is looked for once there is any.
        let (size, last, stride) = (self.wrap(), self.room as i64 - 1, self.stride as i64);
        let at = |index: i64| index.wrapping_add(size & (index >> 63));
        let signs = |index: i64| at(index) | last.wrapping_sub(at(index));
        if indices.iter().fold(0, |any, &index| any | signs(index)) < 0 {
            self.fail(*indices.iter().find(|&&index| signs(index) < 0).expect("one is outside"));
        }
        if stride == 1 {
            places.iter_mut().zip(indices).for_each(|(place, &index)| *place += at(index));
        } else {
            places.iter_mut().zip(indices).for_each(|(place, &index)| *place += at(index) * stride);
        }
    }

    /// What is added to negative indices.
    fn wrap(&self) -> i64 {
        if self.from_end { self.size as i64 } else { 0 }
    }

    /// Ends the task; the pool turns the message into an error. Not `panic!`, because this is bad
    /// data and not a bug: no backtrace belongs on stderr.
    #[cold]
    fn fail(&self, index: i64) -> ! {
        let (name, axis, size) = (self.name, self.axis, self.size);
        let slice = match size - self.room {
            0 => String::new(),
            more => format!(" (slices of {})", more + 1),
        };
        let index = if self.from_end { index as i128 } else { index as u64 as i128 };
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
