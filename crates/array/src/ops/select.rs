//! Reading parts of an array: slices, integers, index arrays, new axes, in one list as between the
//! brackets of Python.

use std::ops::{Range, RangeFrom, RangeFull, RangeTo};

use smallvec::SmallVec;

use super::index::check_indices;
use crate::op::first_failure;
use crate::shape::{Shape, broadcast_shapes, normalize_axis};
use crate::{Array, Error, Result};

/// One entry of an index: what to take along a dimension.
///
/// Integers, ranges and arrays convert into it: `x.index(&[0.into(), (1..).into()])`.
#[derive(Clone, Debug)]
pub enum Index {
    /// One place; negative ones count from the end. The dimension disappears.
    At(i64),
    /// `start:stop:step` with Python's meaning.
    Slice {
        /// From here; from the beginning (the end for a negative step) if there is none.
        start: Option<i64>,
        /// Up to here, exclusive.
        stop: Option<i64>,
        /// Distance of neighbours; not 0.
        step: i64,
    },
    /// A new dimension of size one.
    NewAxis,
    /// As many whole dimensions as are left over.
    Ellipsis,
    /// The places that an array of integers names; its shape takes the dimension's place. Several
    /// arrays (and integers beside them) broadcast together; if something stands between them,
    /// their shape comes first in the result, as in NumPy.
    Places(Array),
}

impl Index {
    /// A whole dimension.
    pub const ALL: Index = Index::Slice { start: None, stop: None, step: 1 };

    /// `start:stop:step`.
    pub fn stepped(start: impl Into<Option<i64>>, stop: impl Into<Option<i64>>, step: i64) -> Index {
        Index::Slice { start: start.into(), stop: stop.into(), step }
    }
}

impl From<i64> for Index {
    fn from(at: i64) -> Index {
        Index::At(at)
    }
}

impl From<i32> for Index {
    fn from(at: i32) -> Index {
        Index::At(at as i64)
    }
}

impl From<&Array> for Index {
    fn from(places: &Array) -> Index {
        Index::Places(places.clone())
    }
}

impl From<Range<i64>> for Index {
    fn from(range: Range<i64>) -> Index {
        Index::stepped(range.start, range.end, 1)
    }
}

impl From<RangeFrom<i64>> for Index {
    fn from(range: RangeFrom<i64>) -> Index {
        Index::stepped(range.start, None, 1)
    }
}

impl From<RangeTo<i64>> for Index {
    fn from(range: RangeTo<i64>) -> Index {
        Index::stepped(None, range.end, 1)
    }
}

impl From<RangeFull> for Index {
    fn from(_: RangeFull) -> Index {
        Index::ALL
    }
}

/// What an index means for an array of a certain shape.
pub(super) struct Selection {
    /// The window that integers and slices leave; index arrays still see their whole dimension.
    pub(super) start: Shape,
    pub(super) count: Shape,
    pub(super) step: SmallVec<[isize; 4]>,
    /// Dimensions of the window that integers drop.
    dropped: Vec<i32>,
    /// Index arrays with their dimension once integers' have been dropped.
    pub(super) arrays: Vec<(usize, Array)>,
    /// The common shape of the arrays.
    common: Shape,
    /// Where the arrays' shape stands among the dimensions that remain.
    position: usize,
    /// Where the result has new dimensions.
    new: Vec<i32>,
}

impl Selection {
    pub(super) fn new(name: &'static str, shape: &[usize], indices: &[Index]) -> Result<Selection> {
        let items = expand(name, shape, indices)?;
        let mut selection = Selection {
            start: Shape::new(),
            count: Shape::new(),
            step: SmallVec::new(),
            dropped: Vec::new(),
            arrays: Vec::new(),
            common: Shape::new(),
            position: 0,
            new: Vec::new(),
        };
        let has_arrays = items.iter().any(|item| matches!(item, Index::Places(_)));
        let is_placed = |item: &Index| matches!(item, Index::At(_) | Index::Places(_));
        // Integers and arrays are a group; something between its members sends it to the front.
        let first = items.iter().position(is_placed);
        let last = items.iter().rposition(is_placed);
        let apart = match (first, last) {
            (Some(first), Some(last)) => !items[first..=last].iter().all(is_placed),
            _ => false,
        };
        let mut axis = 0;
        let mut remaining = 0;
        for item in &items {
            let (start, count, step) = match item {
                Index::NewAxis => continue,
                Index::At(at) => {
                    let size = shape[axis] as i64;
                    let place = if *at < 0 { at + size } else { *at };
                    if place < 0 || place >= size {
                        return Err(Error::invalid(
                            name,
                            format!("index {at} is out of bounds for axis {axis} of {shape:?}"),
                        ));
                    }
                    selection.dropped.push(axis as i32);
                    (place as usize, 1, 1)
                }
                Index::Slice { start, stop, step } => resolve(name, shape[axis], *start, *stop, *step)?,
                Index::Places(array) => {
                    check_indices(name, array)?;
                    selection.common = broadcast_shapes(name, &selection.common, array.shape())?;
                    selection.arrays.push((axis - selection.dropped.len(), array.clone()));
                    (0, shape[axis], 1)
                }
                Index::Ellipsis => unreachable!("expanded"),
            };
            selection.start.push(start);
            selection.count.push(count);
            selection.step.push(step);
            axis += 1;
        }
        let mut place = 0;
        let mut group_seen = !has_arrays;
        if has_arrays && apart {
            place = selection.common.len();
            group_seen = true;
        }
        for item in &items {
            match item {
                Index::NewAxis => {
                    selection.new.push(place as i32);
                    place += 1;
                }
                Index::Slice { .. } => {
                    remaining += 1;
                    place += 1;
                }
                _ if !group_seen => {
                    selection.position = remaining;
                    place += selection.common.len();
                    group_seen = true;
                }
                _ => {}
            }
        }
        Ok(selection)
    }

    /// Whether the window is the whole array.
    pub(super) fn is_whole(&self, shape: &[usize]) -> bool {
        self.count.as_slice() == shape && self.step.iter().all(|&step| step == 1)
    }

    fn array_axes(&self) -> Vec<i32> {
        self.arrays.iter().map(|&(axis, _)| axis as i32).collect()
    }

    /// The selected part of an array.
    fn read(&self, x: &Array) -> Result<Array> {
        let window = x.window(&self.start, &self.count, &self.step)?;
        let window = if self.dropped.is_empty() { window } else { window.squeeze(&self.dropped)? };
        let picked = match self.arrays.as_slice() {
            [] => window,
            [(axis, array)] => {
                let picked = window.take(array, *axis as i32)?;
                move_block(&picked, *axis, array.rank(), self.position)?
            }
            arrays => {
                let mut slice: Shape = window.shape().into();
                arrays.iter().for_each(|&(axis, _)| slice[axis] = 1);
                let axes: Vec<usize> = arrays.iter().map(|&(axis, _)| axis).collect();
                let indices: Vec<&Array> = arrays.iter().map(|(_, array)| array).collect();
                let rank = self.common.len() as i32;
                let picked = window.gather(&indices, &axes, &slice)?;
                let ones: Vec<i32> = self.array_axes().iter().map(|&axis| rank + axis).collect();
                move_block(&picked.squeeze(&ones)?, 0, rank as usize, self.position)?
            }
        };
        picked.expand_dims(&self.new)
    }

    /// The shape of what [`Selection::read`] gives.
    pub(super) fn shape(&self) -> Shape {
        let mut shape = self.inner_shape();
        for &axis in &self.new {
            shape.insert(axis as usize, 1);
        }
        shape
    }

    /// The same without new dimensions.
    fn inner_shape(&self) -> Shape {
        let axes = self.array_axes();
        let mut shape: Shape = self.dense_shape();
        let mut axis = 0;
        shape.retain(|_| {
            axis += 1;
            !axes.contains(&(axis - 1))
        });
        shape.insert_many(self.position, self.common.iter().copied());
        shape
    }

    /// The window without the dimensions that integers drop.
    pub(super) fn dense_shape(&self) -> Shape {
        let sizes = self.count.iter().enumerate();
        sizes.filter(|(axis, _)| !self.dropped.contains(&(*axis as i32))).map(|(_, &size)| size).collect()
    }

    /// Values of [`Selection::shape`] as the updates of a scatter into the window (the arrays'
    /// common shape, then a slice), or as the window's new content if there are no arrays.
    pub(super) fn as_updates(&self, values: &Array) -> Result<Array> {
        let values = if self.new.is_empty() { values.clone() } else { values.squeeze(&self.new)? };
        if self.arrays.is_empty() {
            return Ok(values);
        }
        let rank = self.common.len();
        let values = move_block(&values, self.position, rank, 0)?;
        let ones: Vec<i32> = self.array_axes().iter().map(|&axis| rank as i32 + axis).collect();
        values.expand_dims(&ones)
    }
}

/// The dimensions `from .. from + count` moved so that they begin at `to`.
fn move_block(x: &Array, from: usize, count: usize, to: usize) -> Result<Array> {
    let mut order: Vec<i32> = (0..x.rank() as i32).collect();
    let block: Vec<i32> = order.drain(from..from + count).collect();
    order.splice(to..to, block);
    x.transpose(&order)
}

/// The index with whole dimensions in place of the ellipsis and at the end.
fn expand(name: &'static str, shape: &[usize], indices: &[Index]) -> Result<Vec<Index>> {
    let used = indices.iter().filter(|item| !matches!(item, Index::NewAxis | Index::Ellipsis)).count();
    let ellipses = indices.iter().filter(|item| matches!(item, Index::Ellipsis)).count();
    if used > shape.len() || ellipses > 1 {
        return Err(Error::invalid(
            name,
            format!("{used} indices and {ellipses} ellipses for shape {shape:?}: too many"),
        ));
    }
    let fill = shape.len() - used;
    let mut items = Vec::with_capacity(indices.len() + fill);
    for item in indices {
        match item {
            Index::Ellipsis => items.extend(std::iter::repeat_n(Index::ALL, fill)),
            other => items.push(other.clone()),
        }
    }
    if ellipses == 0 {
        items.extend(std::iter::repeat_n(Index::ALL, fill));
    }
    Ok(items)
}

/// First place, count and step of a Python slice of `size` elements.
fn resolve(
    name: &'static str,
    size: usize,
    start: Option<i64>,
    stop: Option<i64>,
    step: i64,
) -> Result<(usize, usize, isize)> {
    if step == 0 {
        return Err(Error::invalid(name, "a slice's step must not be 0"));
    }
    let size = size as i64;
    let (low, high) = if step > 0 { (0, size) } else { (-1, size - 1) };
    let bound = |place: Option<i64>, default: i64| match place {
        None => default,
        Some(place) => (if place < 0 { place.saturating_add(size) } else { place }).clamp(low, high),
    };
    let (start, stop) = if step > 0 {
        (bound(start, 0), bound(stop, size))
    } else {
        (bound(start, size - 1), bound(stop, -1))
    };
    let span = if step > 0 { stop - start } else { start - stop };
    let count = if span <= 0 { 0 } else { (span - 1) / step.abs() + 1 };
    Ok(if count == 0 { (0, 0, 1) } else { (start as usize, count as usize, step as isize) })
}

impl Array {
    /// The part of the array that an index selects, as Python's `x[…]`.
    pub fn index(&self, indices: &[Index]) -> Result<Array> {
        first_failure(&[self])?;
        Selection::new("index", self.shape(), indices)?.read(self)
    }

    /// A part of the array that begins at places which are computed: `start` has one integer per
    /// entry of `axes`, and the part the sizes `size`. A part that would reach past the end is an
    /// error when it is computed.
    pub fn dynamic_slice(&self, start: &Array, axes: &[i32], size: &[usize]) -> Result<Array> {
        let (indices, axes) = starts("slice", self, start, axes)?;
        self.gather(&indices.iter().collect::<Vec<_>>(), &axes, size)
    }

    /// The array with a part that begins at places which are computed replaced by `update`.
    pub fn dynamic_slice_update(&self, update: &Array, start: &Array, axes: &[i32]) -> Result<Array> {
        let (indices, axes) = starts("slice_update", self, start, axes)?;
        let op = crate::op::ScatterOp::Set;
        let mut shape: Shape = self.shape().into();
        axes.iter().for_each(|&axis| shape[axis] = 1);
        // Missing leading dimensions are those of size one, as in MLX.
        let rank = self.rank().saturating_sub(update.rank());
        let sizes: Vec<i64> =
            std::iter::repeat_n(1, rank).chain(update.shape().iter().map(|&size| size as i64)).collect();
        self.scatter(op, &indices.iter().collect::<Vec<_>>(), &axes, &update.reshape(&sizes)?)
    }
}

/// One number per axis of an array of them.
fn starts(name: &'static str, x: &Array, start: &Array, axes: &[i32]) -> Result<(Vec<Array>, Vec<usize>)> {
    first_failure(&[x, start])?;
    if start.size() != axes.len() || start.rank() > 1 {
        return Err(Error::invalid(
            name,
            format!("needs one start per axis, got starts of {:?} and axes {axes:?}", start.shape()),
        ));
    }
    let flat = start.flatten()?;
    let indices = (0..axes.len())
        .map(|place| flat.narrow(0, place, place + 1)?.reshape(&[]))
        .collect::<Result<Vec<_>>>()?;
    let axes = axes.iter().map(|&axis| normalize_axis(name, axis, x.rank())).collect::<Result<Vec<_>>>()?;
    Ok((indices, axes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_have_pythons_meaning() {
        let cases = [
            ("all", 5, None, None, 1, (0, 5, 1)),
            ("back", 5, None, None, -1, (4, 5, -1)),
            ("every second", 5, Some(1), None, 2, (1, 2, 2)),
            ("from the end", 5, Some(-2), None, 1, (3, 2, 1)),
            ("past the end", 5, Some(2), Some(99), 1, (2, 3, 1)),
            ("nothing", 5, Some(3), Some(1), 1, (0, 0, 1)),
            ("down to the first", 5, Some(3), None, -2, (3, 2, -2)),
            ("of nothing", 0, None, None, -1, (0, 0, 1)),
            ("a large step", 5, Some(0), Some(5), i64::MAX, (0, 1, isize::MAX)),
        ];
        for (name, size, start, stop, step, expected) in cases {
            assert_eq!(resolve("test", size, start, stop, step).unwrap(), expected, "{name}");
        }
        assert!(resolve("test", 5, None, None, 0).is_err());
    }
}
