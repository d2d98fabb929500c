//! Reading at indices.

use mica_threads::{Plain, Scratch, Task};
use smallvec::SmallVec;

use super::{AxisIndex, Place, check_slices, common_shape, fits_narrow};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::{CHUNK, TILE, TILE_BYTES, broadcast, check_output};
use crate::error::KernelError;
use crate::layout::{Linear, by_size, gather_run, prefetch, scatter_run};

/// `out[i…, s…] = source[s… + indices[i…] on their axes]`: a slice of `slice_sizes` (one size per
/// axis of `source`) for every position of the index arrays, which broadcast together. `out` has
/// the index shape followed by `slice_sizes`.
///
/// Where a slice is longer than 1 along an indexed axis it has to fit behind the index, which
/// the task checks.
pub fn gather(
    source: DynView,
    indices: &[(usize, DynView)],
    slice_sizes: &[usize],
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "gather";
    check_slices(NAME, &source.shape, indices.iter().map(|&(axis, _)| axis), slice_sizes)?;
    let index_shape = common_shape(NAME, indices)?;
    let expected: Vec<usize> = index_shape.iter().chain(slice_sizes).copied().collect();
    check_out(NAME, source.dtype, &expected, &out)?;
    let (out_index, out_slice) = out.shape.split_at(index_shape.len());
    let (index_strides, slice_strides) = out.strides.split_at(index_shape.len());
    let narrow = indices.iter().all(|(_, view)| fits_narrow(view.dtype, &source.shape, &source.strides));
    let make = if narrow { AxisIndex::new::<i32> } else { AxisIndex::new::<i64> };
    let mut axes = SmallVec::new();
    for (axis, view) in indices {
        let (size, stride) = (source.shape[*axis], source.strides[*axis]);
        axes.push(make(NAME, view, &index_shape, *axis, size, slice_sizes[*axis], stride)?);
    }
    Ok(Box::new(Gather {
        name: NAME,
        bytes: source.dtype.size(),
        source: source.pointer,
        axes,
        narrow,
        base: None,
        slice: Linear::new(slice_sizes, &source.strides),
        out: out.pointer,
        out_index: Linear::new(out_index, index_strides),
        out_slice: Linear::new(out_slice, slice_strides),
    }))
}

/// `out[a…, i…, b…] = source[a…, indices[i…], b…]` for the axis between a… and b…: rows of an
/// embedding, for instance.
pub fn take(
    source: DynView,
    axis: usize,
    indices: DynView,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "take";
    if axis >= source.shape.len() {
        let message = format!("axis {axis} is not in shape {:?}", source.shape);
        return Err(KernelError::new(NAME, message));
    }
    let rank = indices.shape.len();
    let mut expected: Vec<usize> = source.shape[..axis].to_vec();
    expected.extend(&indices.shape);
    expected.extend(&source.shape[axis + 1..]);
    check_out(NAME, source.dtype, &expected, &out)?;
    if expected.contains(&0) {
        return crate::copy::fill_f64(0.0, out); // of nothing
    }
    // The same output with the index dimensions first, and a 1 for the axis: a gather.
    let order = (axis..axis + rank).chain(0..axis);
    let mut view = DynViewMut { shape: Default::default(), strides: Default::default(), ..out };
    for from in order {
        view.shape.push(out.shape[from]);
        view.strides.push(out.strides[from]);
    }
    view.shape.push(1);
    view.strides.push(0);
    view.shape.extend_from_slice(&out.shape[axis + rank..]);
    view.strides.extend_from_slice(&out.strides[axis + rank..]);
    let mut slice = source.shape.clone();
    slice[axis] = 1;
    gather(source, &[(axis, indices)], &slice, view)
}

/// `out[…, i, …] = source[…, indices[…, i, …], …]` along `axis`. `out` has the shape of
/// `indices`; the other axes of `source` broadcast to it.
pub fn take_along_axis(
    source: DynView,
    axis: usize,
    indices: DynView,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "take_along_axis";
    check_out(NAME, source.dtype, &indices.shape, &out)?;
    let base = along_axis_base(NAME, &source, axis, &indices.shape)?;
    let (size, stride) = (source.shape[axis], source.strides[axis]);
    let narrow = fits_narrow(indices.dtype, &source.shape, &source.strides);
    let make = if narrow { AxisIndex::new::<i32> } else { AxisIndex::new::<i64> };
    let index = make(NAME, &indices, &indices.shape, axis, size, 1, stride)?;
    Ok(Box::new(Gather {
        name: NAME,
        bytes: source.dtype.size(),
        source: source.pointer,
        axes: SmallVec::from_iter([index]),
        narrow,
        base: Some(base),
        slice: Linear::new(&[], &[]),
        out: out.pointer,
        out_index: Linear::new(&out.shape, &out.strides),
        out_slice: Linear::new(&[], &[]),
    }))
}

/// The places of `view` for every element of `shape` when the index along `axis` is 0.
pub(super) fn along_axis_base(
    name: &'static str,
    view: &DynView,
    axis: usize,
    shape: &[usize],
) -> Result<Linear, KernelError> {
    if axis >= shape.len() || view.shape.len() != shape.len() {
        let message = format!(
            "axis {axis}, an array of shape {:?} and indices of {shape:?} do not belong together",
            view.shape
        );
        return Err(KernelError::new(name, message));
    }
    let mut flat = view.clone();
    flat.shape[axis] = 1;
    Ok(Linear::new(shape, &broadcast(name, &flat, shape)?.strides))
}

fn check_out(
    name: &'static str,
    dtype: Dtype,
    expected: &[usize],
    out: &DynViewMut,
) -> Result<(), KernelError> {
    if out.dtype != dtype || *out.shape != *expected {
        let message = format!(
            "the result is {dtype} of shape {expected:?}, the output {} of {:?}",
            out.dtype, out.shape
        );
        return Err(KernelError::new(name, message));
    }
    check_output(name, out)
}

/// Bytes of the longest line that is asked for as a whole: less than a first-level cache.
const LINE: usize = 32 << 10;

struct Gather {
    name: &'static str,
    bytes: usize,
    source: *const u8,
    axes: SmallVec<[AxisIndex; 2]>,
    /// Places are of 32 bits, otherwise of 64.
    narrow: bool,
    /// Offsets that depend on the position among the indices.
    base: Option<Linear>,
    slice: Linear,
    out: *mut u8,
    out_index: Linear,
    out_slice: Linear,
}

// SAFETY: made of views that may be used from any thread (their maker's promise); chunks write
// disjoint outputs.
unsafe impl Send for Gather {}
// SAFETY: as above.
unsafe impl Sync for Gather {}

impl Gather {
    /// Index positions of a chunk, and the pieces that a slice is cut into.
    fn cut(&self) -> (usize, usize) {
        let slice = self.slice.size().max(1);
        ((CHUNK / slice).max(1), slice.div_ceil(CHUNK))
    }

    /// # Safety
    /// `chunk` is one of [`Task::chunks`].
    unsafe fn run_typed<T: Copy, P: Place + Plain>(&self, chunk: usize, scratch: &Scratch) {
        let (positions, pieces) = self.cut();
        let (group, piece) = (chunk / pieces, chunk % pieces);
        let end = self.out_index.size().min((group + 1) * positions);
        let from = piece * CHUNK;
        let length = CHUNK.min(self.slice.size() - from);
        let buffer = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        let raw = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        let places = scratch.take::<P>(TILE);
        for start in (group * positions..end).step_by(TILE) {
            let count = TILE.min(end - start);
            let places = &mut places[..count];
            self.places(start, places, buffer, raw);
            // Reading at places takes as long as memory for the next ones.
            let next = start + count..self.out_index.size().min(start + count + TILE);
            self.axes.iter().for_each(|axis| axis.ask_for(next.clone()));
            // SAFETY: the places are inside the source, checked by `places`; outputs are this
            // chunk's own; the buffer holds a tile.
            unsafe {
                if self.slice.size() == 1 {
                    let source = self.source.cast::<T>();
                    match self.out_index.contiguous_from(start, count) {
                        Some(offset) => collect(source, places, self.out.cast::<T>().offset(offset)),
                        None => {
                            collect(source, places, buffer.cast::<T>());
                            scatter_run::<T>(buffer, self.out, &self.out_index, start, count);
                        }
                    }
                    continue;
                }
                for (i, &place) in places.iter().enumerate() {
                    let to = self.out.cast::<T>().offset(self.out_index.offset(start + i));
                    let source = self.source.cast::<T>().offset(place.offset());
                    self.copy_slice(source, to, from, length, buffer);
                }
            }
        }
    }

    /// Source offsets of index positions from `start`.
    fn places<P: Place>(&self, start: usize, places: &mut [P], buffer: *mut u8, raw: *mut u8) {
        match &self.base {
            None => places.fill(P::ZERO),
            Some(base) => {
                let mut at = 0;
                base.runs(start, places.len(), |offset, stride, length| {
                    let run = &mut places[at..at + length];
                    at += length;
                    if stride == 0 {
                        run.fill(P::of(offset));
                        self.ask_for_line(offset, length);
                        return;
                    }
                    for (i, place) in run.iter_mut().enumerate() {
                        *place = P::of(offset + i as isize * stride);
                    }
                });
            }
        }
        for axis in &self.axes {
            // SAFETY: inside the index shape; the buffers hold a tile.
            unsafe { axis.add_offsets(start, places, buffer, raw) };
        }
    }

    /// A dense line of which so many elements are wanted, in any order, is better asked for from front to back.
    fn ask_for_line(&self, offset: isize, wanted: usize) {
        let &[AxisIndex { size, stride: 1, .. }] = self.axes.as_slice() else { return };
        let bytes = size * self.bytes;
        if bytes <= LINE && wanted * self.bytes >= bytes / 4 {
            prefetch(self.source.wrapping_offset(offset * self.bytes as isize), bytes);
        }
    }

    /// Copies elements `start .. start + count` of a slice.
    ///
    /// # Safety
    /// Both are inside their memory; `buffer` holds a tile.
    unsafe fn copy_slice<T: Copy>(
        &self,
        source: *const T,
        out: *mut T,
        start: usize,
        count: usize,
        buffer: *mut u8,
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            let dense = self.slice.contiguous_from(start, count);
            if let (Some(from), Some(to)) = (dense, self.out_slice.contiguous_from(start, count)) {
                return std::ptr::copy_nonoverlapping(source.offset(from), out.offset(to), count);
            }
            for at in (start..start + count).step_by(TILE) {
                let length = TILE.min(start + count - at);
                gather_run::<T>(source.cast(), &self.slice, at, length, buffer);
                scatter_run::<T>(buffer, out.cast(), &self.out_slice, at, length);
            }
        }
    }
}

impl Task for Gather {
    fn chunks(&self) -> usize {
        if self.slice.size() == 0 {
            return 0;
        }
        let (positions, pieces) = self.cut();
        self.out_index.size().div_ceil(positions) * pieces
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        // SAFETY: a chunk of this task.
        unsafe { by_size!(self.bytes, run_gather(self, chunk, scratch)) }
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

unsafe fn run_gather<T: Copy>(gather: &Gather, chunk: usize, scratch: &Scratch) {
    // SAFETY: promised by the caller.
    unsafe {
        match gather.narrow {
            true => gather.run_typed::<T, i32>(chunk, scratch),
            false => gather.run_typed::<T, i64>(chunk, scratch),
        }
    }
}

/// `out[i] = source[places[i]]`.
///
/// # Safety
/// The places are inside the source; `out` has room for as many values.
#[inline(always)]
unsafe fn collect<T: Copy, P: Place>(source: *const T, places: &[P], out: *mut T) {
    let (blocks, rest) = places.as_chunks::<8>();
    // SAFETY: promised by the caller.
    unsafe {
        for (at, block) in blocks.iter().enumerate() {
            let values = block.map(|place| *source.offset(place.offset()));
            out.add(at * 8).cast::<[T; 8]>().write_unaligned(values);
        }
        for (at, place) in rest.iter().enumerate() {
            *out.add(blocks.len() * 8 + at) = *source.offset(place.offset());
        }
    }
}
