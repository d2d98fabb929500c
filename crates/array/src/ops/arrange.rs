//! Arrays put in another arrangement: tiled, rolled, flipped, padded, split, of more dimensions.

use smallvec::SmallVec;

use super::elementwise::Operand;
use crate::op::first_failure;
use crate::shape::{Shape, normalize_axes, normalize_axis};
use crate::{Array, Dtype, Error, Result, memory};

/// What [`Array::pad`] puts around an array.
#[derive(Clone, Debug, PartialEq)]
pub enum PadMode {
    /// One value.
    Constant(f64),
    /// The element at the edge.
    Edge,
    /// The array mirrored at its edge elements, which are not repeated.
    Reflect,
    /// The array mirrored beside its edge elements, which are repeated.
    Symmetric,
}

/// The shape that all of these broadcast to.
pub fn broadcast_shapes(shapes: &[&[usize]]) -> Result<Shape> {
    shapes.iter().try_fold(Shape::new(), |common, shape| {
        crate::shape::broadcast_shapes("broadcast_shapes", &common, shape)
    })
}

fn signed(shape: &[usize]) -> SmallVec<[i64; 4]> {
    shape.iter().map(|&size| size as i64).collect()
}

/// The shape with these widths beside each dimension.
fn padded_shape(shape: &[usize], width: impl Fn(usize) -> (usize, usize)) -> Result<Shape> {
    let padded = |(axis, &size): (usize, &usize)| {
        let (low, high) = width(axis);
        let sum = size.checked_add(low).and_then(|sum| sum.checked_add(high));
        sum.filter(|&sum| sum <= isize::MAX as usize / 8).ok_or_else(|| {
            Error::invalid(
                "pad",
                format!("widths {low} and {high} make axis {axis} of {shape:?} larger than memory can be"),
            )
        })
    };
    shape.iter().enumerate().map(padded).collect()
}

impl Array {
    /// The arrays, each broadcast to their common shape.
    pub fn broadcast_arrays(arrays: &[Array]) -> Result<Vec<Array>> {
        let shapes: Vec<&[usize]> = arrays.iter().map(Array::shape).collect();
        let common = broadcast_shapes(&shapes)?;
        arrays.iter().map(|array| array.broadcast_to(&common)).collect()
    }

    /// At least one dimension.
    pub fn atleast_1d(&self) -> Result<Array> {
        if self.rank() == 0 { self.reshape(&[1]) } else { Ok(self.clone()) }
    }

    /// At least two dimensions; new ones come first.
    pub fn atleast_2d(&self) -> Result<Array> {
        match self.rank() {
            0 => self.reshape(&[1, 1]),
            1 => self.expand_dims(&[0]),
            _ => Ok(self.clone()),
        }
    }

    /// At least three dimensions: `[n]` becomes `[1, n, 1]`, `[m, n]` becomes `[m, n, 1]`.
    pub fn atleast_3d(&self) -> Result<Array> {
        match self.rank() {
            0 => self.reshape(&[1, 1, 1]),
            1 => self.expand_dims(&[0, 2]),
            2 => self.expand_dims(&[2]),
            _ => Ok(self.clone()),
        }
    }

    /// One dimension moved to another place, the others in their order.
    pub fn moveaxis(&self, source: i32, destination: i32) -> Result<Array> {
        let from = normalize_axis("moveaxis", source, self.rank())?;
        let to = normalize_axis("moveaxis", destination, self.rank())?;
        let mut order: Vec<i32> = (0..self.rank() as i32).collect();
        let axis = order.remove(from);
        order.insert(to, axis);
        self.transpose(&order)
    }

    /// The last two dimensions exchanged.
    pub fn matrix_transpose(&self) -> Result<Array> {
        if self.rank() < 2 {
            return Err(Error::invalid(
                "matrix_transpose",
                format!("needs two dimensions, got shape {:?}", self.shape()),
            ));
        }
        self.swap_axes(-1, -2)
    }

    /// The order of the elements along these axes (all if none are named) reversed.
    pub fn flip(&self, axes: &[i32]) -> Result<Array> {
        let axes = normalize_axes("flip", axes, self.rank())?;
        let turned = |axis: usize| axes.contains(&axis) && self.shape()[axis] > 0;
        let start: Shape =
            (0..self.rank()).map(|axis| if turned(axis) { self.shape()[axis] - 1 } else { 0 }).collect();
        let step: Vec<isize> = (0..self.rank()).map(|axis| if turned(axis) { -1 } else { 1 }).collect();
        self.window(&start, self.shape(), &step)
    }

    /// Every element several times in a row along an axis; of the flattened array without one.
    pub fn repeat(&self, repeats: usize, axis: impl Into<Option<i32>>) -> Result<Array> {
        let Some(axis) = axis.into() else {
            return self.flatten()?.repeat(repeats, 0);
        };
        let axis = normalize_axis("repeat", axis, self.rank())?;
        let mut wide: Shape = self.shape().into();
        wide.insert(axis + 1, repeats);
        let mut shape = signed(self.shape());
        shape[axis] = shape[axis].saturating_mul(i64::try_from(repeats).unwrap_or(i64::MAX));
        self.expand_dims(&[axis as i32 + 1])?.broadcast_to(&wide)?.reshape(&shape)
    }

    /// The array several times along each dimension. Missing counts are 1 for the first dimensions;
    /// counts beyond the array's dimensions make new ones.
    pub fn tile(&self, repeats: &[usize]) -> Result<Array> {
        let rank = self.rank().max(repeats.len());
        let count = |axis: usize| (axis + repeats.len()).checked_sub(rank).map_or(1, |i| repeats[i]);
        let size = |axis: usize| (axis + self.rank()).checked_sub(rank).map_or(1, |i| self.shape()[i]);
        // [1, size, 1, size …] broadcast to [count, size, count, size …].
        let apart: Vec<i64> = (0..rank).flat_map(|axis| [1, size(axis) as i64]).collect();
        let wide: Shape = (0..rank).flat_map(|axis| [count(axis), size(axis)]).collect();
        let product = |axis: usize| count(axis).saturating_mul(size(axis));
        let shape: Vec<i64> =
            (0..rank).map(|axis| i64::try_from(product(axis)).unwrap_or(i64::MAX)).collect();
        self.reshape(&apart)?.broadcast_to(&wide)?.reshape(&shape)
    }

    /// The elements moved along axes, those that leave at one end coming back at the other. One
    /// shift is for all axes; without axes the flattened array is rolled.
    pub fn roll(&self, shifts: &[i64], axes: &[i32]) -> Result<Array> {
        const NAME: &str = "roll";
        if axes.is_empty() {
            let shift: i64 = shifts.iter().sum();
            return self.flatten()?.roll(&[shift], &[0])?.reshape(&signed(self.shape()));
        }
        if shifts.len() != 1 && shifts.len() != axes.len() {
            return Err(Error::invalid(
                NAME,
                format!("needs one shift or one per axis, got shifts {shifts:?} and axes {axes:?}"),
            ));
        }
        let mut rolled = self.clone();
        for (place, &axis) in axes.iter().enumerate() {
            let at = normalize_axis(NAME, axis, self.rank())?;
            let size = self.shape()[at];
            let shift = shifts[if shifts.len() == 1 { 0 } else { place }];
            let split = if size == 0 { 0 } else { (-shift).rem_euclid(size as i64) as usize };
            if split != 0 {
                let parts = [rolled.narrow(axis, split, size)?, rolled.narrow(axis, 0, split)?];
                rolled = Array::concatenate(&parts, axis)?;
            }
        }
        Ok(rolled)
    }

    /// Equal parts along an axis.
    pub fn split(&self, parts: usize, axis: i32) -> Result<Vec<Array>> {
        let at = normalize_axis("split", axis, self.rank())?;
        let size = self.shape()[at];
        if parts == 0 || !size.is_multiple_of(parts) {
            return Err(Error::invalid(
                "split",
                format!("axis {axis} of {:?} can't be cut in {parts} equal parts", self.shape()),
            ));
        }
        self.split_sizes(&vec![size / parts; parts], axis)
    }

    /// The parts between these places along an axis; what a part would have outside of the array,
    /// or backwards, it lacks.
    pub fn split_at(&self, places: &[i64], axis: i32) -> Result<Vec<Array>> {
        let at = normalize_axis("split", axis, self.rank())?;
        let size = self.shape()[at] as i64;
        let bound = |place: i64| if place < 0 { (place + size).max(0) } else { place.min(size) } as usize;
        let mut from = 0;
        let mut parts = Vec::with_capacity(places.len() + 1);
        for to in places.iter().map(|&place| bound(place)).chain([size as usize]) {
            parts.push(self.narrow(axis, from, to.max(from))?);
            from = to;
        }
        Ok(parts)
    }

    /// The slices along an axis, which disappears.
    pub fn unstack(&self, axis: i32) -> Result<Vec<Array>> {
        let at = normalize_axis("unstack", axis, self.rank())?;
        (0..self.shape()[at]).map(|place| self.narrow(axis, place, place + 1)?.squeeze(&[axis])).collect()
    }

    /// More elements before and after the array along each dimension; one pair of widths is for
    /// all.
    pub fn pad(&self, widths: &[(usize, usize)], mode: PadMode) -> Result<Array> {
        const NAME: &str = "pad";
        first_failure(&[self])?;
        if widths.len() != 1 && widths.len() != self.rank() {
            return Err(Error::invalid(
                NAME,
                format!(
                    "needs one pair of widths or one per dimension of {:?}, got {widths:?}",
                    self.shape()
                ),
            ));
        }
        let width = |axis: usize| widths[if widths.len() == 1 { 0 } else { axis }];
        padded_shape(self.shape(), width)?;
        if let PadMode::Constant(value) = mode {
            return self.pad_with(widths, value);
        }
        let mut padded = self.clone();
        for axis in 0..self.rank() {
            let ((low, high), size) = (width(axis), self.shape()[axis]);
            if low == 0 && high == 0 {
                continue;
            }
            if size == 0 {
                return Err(Error::invalid(
                    NAME,
                    format!("axis {axis} of {:?} is empty: it has no edge to repeat", self.shape()),
                ));
            }
            let mut places: Vec<i64> = Vec::new();
            if places.try_reserve_exact(low + size + high).is_err() {
                let bytes = (low + size + high) * size_of::<i64>();
                return Err(Error::OutOfMemory {
                    requested: bytes,
                    active: memory::active(),
                    limit: memory::limit(),
                });
            }
            places
                .extend((-(low as i64)..(size + high) as i64).map(|place| source(place, size as i64, &mode)));
            let places = Array::from_slice(&places, &[places.len()])?;
            padded = padded.take(&places, axis as i32)?;
        }
        Ok(padded)
    }

    /// [`Array::pad`] with one value, which may be an array without dimensions.
    pub fn pad_with(&self, widths: &[(usize, usize)], value: impl Operand) -> Result<Array> {
        const NAME: &str = "pad";
        if widths.len() != 1 && widths.len() != self.rank() {
            return Err(Error::invalid(
                NAME,
                format!(
                    "needs one pair of widths or one per dimension of {:?}, got {widths:?}",
                    self.shape()
                ),
            ));
        }
        let width = |axis: usize| widths[if widths.len() == 1 { 0 } else { axis }];
        let start: Vec<usize> = (0..self.rank()).map(|axis| width(axis).0).collect();
        let shape = padded_shape(self.shape(), width)?;
        let value = value.operand(self.dtype()).astype(self.dtype())?;
        value.broadcast_to(&shape)?.slice_update(self, &start)
    }

    /// Grids of coordinates: of arrays of one dimension, each along its own dimension and, unless
    /// `sparse`, repeated along the others'. The first two dimensions are exchanged unless
    /// `matrix_order` (MLX's `indexing="ij"`).
    pub fn meshgrid(arrays: &[Array], sparse: bool, matrix_order: bool) -> Result<Vec<Array>> {
        let rank = arrays.len();
        let place = |i: usize| if !matrix_order && rank > 1 && i < 2 { 1 - i } else { i };
        let mut grids = Vec::with_capacity(rank);
        for (i, array) in arrays.iter().enumerate() {
            if array.rank() > 1 {
                return Err(Error::invalid(
                    "meshgrid",
                    format!("needs arrays of one dimension, got {:?}", array.shape()),
                ));
            }
            let mut shape = vec![1i64; rank];
            shape[place(i)] = -1;
            grids.push(array.flatten()?.reshape(&shape)?);
        }
        if sparse { Ok(grids) } else { Array::broadcast_arrays(&grids) }
    }

    /// The values of an array, repeated to a shape.
    pub fn full_with(shape: &[usize], values: &Array, dtype: impl Into<Option<Dtype>>) -> Result<Array> {
        values.astype(dtype.into().unwrap_or(values.dtype()))?.broadcast_to(shape)
    }
}

/// The element that a place before, in or after an axis shows.
fn source(place: i64, size: i64, mode: &PadMode) -> i64 {
    match mode {
        PadMode::Constant(_) | PadMode::Edge => place.clamp(0, size - 1),
        PadMode::Reflect if size == 1 => 0,
        PadMode::Reflect => {
            let at = place.rem_euclid(2 * size - 2);
            at.min(2 * size - 2 - at)
        }
        PadMode::Symmetric => {
            let at = place.rem_euclid(2 * size);
            at.min(2 * size - 1 - at)
        }
    }
}
