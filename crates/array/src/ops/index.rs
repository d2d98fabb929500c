//! Gathering and scattering by index arrays.

pub(crate) mod jvp;
pub(crate) mod vmap;

use smallvec::smallvec;

use super::{Grads, Vjp};
use crate::op::{Axes, Op, ScatterOp, first_failure};
use crate::shape::{Shape, broadcast_shapes, normalize_axis};
use crate::{Array, Error, Result};

pub(super) fn check_indices(op: &'static str, indices: &Array) -> Result<()> {
    if indices.dtype().is_integer() {
        Ok(())
    } else {
        Err(Error::dtype(op, "integer indices", indices.dtype()))
    }
}

impl Array {
    /// The slices along `axis` (elements of the flattened array without one) that `indices` name;
    /// negative indices count from the end. The shape of the indices replaces the axis.
    pub fn take(&self, indices: &Array, axis: impl Into<Option<i32>>) -> Result<Array> {
        first_failure(&[self, indices])?;
        check_indices("take", indices)?;
        let Some(axis) = axis.into() else {
            return self.flatten()?.take(indices, 0);
        };
        let axis = normalize_axis("take", axis, self.rank())?;
        if self.shape()[axis] == 0 && indices.size() > 0 {
            return Err(Error::invalid("take", format!("axis {axis} of {:?} is empty", self.shape())));
        }
        let mut shape: Shape = self.shape()[..axis].into();
        shape.extend_from_slice(indices.shape());
        shape.extend_from_slice(&self.shape()[axis + 1..]);
        Ok(Array::lazy(Op::Take { axis }, smallvec![self.clone(), indices.clone()], shape, self.dtype()))
    }

    /// For every place of `indices` the element at that index along `axis` (of the flattened array
    /// without one). The other dimensions broadcast together.
    pub fn take_along_axis(&self, indices: &Array, axis: impl Into<Option<i32>>) -> Result<Array> {
        first_failure(&[self, indices])?;
        check_indices("take_along_axis", indices)?;
        let Some(axis) = axis.into() else {
            return self.flatten()?.take_along_axis(indices, 0);
        };
        let (x, indices, axis) = along("take_along_axis", self, indices, axis)?;
        if x.shape()[axis] == 0 && indices.size() > 0 {
            let message = format!("axis {axis} of {:?} is empty", self.shape());
            return Err(Error::invalid("take_along_axis", message));
        }
        let shape: Shape = indices.shape().into();
        Ok(Array::lazy(Op::TakeAlong { axis }, smallvec![x, indices], shape, self.dtype()))
    }

    /// This array with `values` (which broadcast to the indices' shape) at the indices along `axis`
    /// (of the flattened array without one, in whose shape the result is then put back).
    pub fn put_along_axis(
        &self,
        indices: &Array,
        values: &Array,
        axis: impl Into<Option<i32>>,
    ) -> Result<Array> {
        self.scatter_along(ScatterOp::Set, indices, values, axis.into())
    }

    /// This array with `values` added at the indices along `axis`, as [`Array::put_along_axis`].
    pub fn scatter_add_axis(&self, indices: &Array, values: &Array, axis: i32) -> Result<Array> {
        self.scatter_along(ScatterOp::Add, indices, values, Some(axis))
    }

    pub(crate) fn scatter_along(
        &self,
        op: ScatterOp,
        indices: &Array,
        values: &Array,
        axis: Option<i32>,
    ) -> Result<Array> {
        const NAME: &str = "put_along_axis";
        first_failure(&[self, indices, values])?;
        check_indices(NAME, indices)?;
        let Some(axis) = axis else {
            let flat = self.flatten()?.scatter_along(op, indices, values, Some(0))?;
            return flat.reshape(&self.shape().iter().map(|&size| size as i64).collect::<Vec<_>>());
        };
        let (x, indices, axis) = along(NAME, self, indices, axis)?;
        if x.shape() != self.shape() {
            return Err(Error::shapes(NAME, &self.shape().into(), &indices.shape().into()));
        }
        let values = values.astype(self.dtype())?.broadcast_to(indices.shape())?;
        let op = Op::ScatterAlong { op, axis };
        Ok(Array::lazy(op, smallvec![x, indices, values], self.shape(), self.dtype()))
    }

    /// A slice of sizes `slice` (one per dimension) for every position of the index arrays, which
    /// broadcast together and say where it begins on `axes` (elsewhere it begins at 0). The result
    /// has the indices' shape followed by the slice's.
    pub fn gather(&self, indices: &[&Array], axes: &[usize], slice: &[usize]) -> Result<Array> {
        const NAME: &str = "gather";
        first_failure(indices)?;
        first_failure(&[self])?;
        let mut shape = check_places(NAME, self.shape(), indices, axes, slice)?;
        shape.extend_from_slice(slice);
        let mut inputs = smallvec![self.clone()];
        inputs.extend(indices.iter().map(|&index| index.clone()));
        let op = Op::Gather { axes: axes.into(), slice: slice.into() };
        Ok(Array::lazy(op, inputs, shape, self.dtype()))
    }

    /// This array with the slices of `updates` joined to it where [`Array::gather`] would read
    /// them. `updates` has the indices' common shape followed by a slice's; what meets in one place
    /// is joined in ascending order.
    pub fn scatter(
        &self,
        op: ScatterOp,
        indices: &[&Array],
        axes: &[usize],
        updates: &Array,
    ) -> Result<Array> {
        const NAME: &str = "scatter";
        first_failure(indices)?;
        first_failure(&[self, updates])?;
        let rank = updates.rank().checked_sub(self.rank());
        let slice = rank.map_or(&[][..], |rank| &updates.shape()[rank..]);
        let shape = check_places(NAME, self.shape(), indices, axes, slice)?;
        if rank.map(|rank| &updates.shape()[..rank]) != Some(shape.as_slice()) {
            return Err(Error::invalid(
                NAME,
                format!(
                    "updates of {:?} for indices of {shape:?} into {:?}: expected the indices' shape \
                     followed by a slice's",
                    updates.shape(),
                    self.shape()
                ),
            ));
        }
        let mut inputs = smallvec![self.clone(), updates.astype(self.dtype())?];
        inputs.extend(indices.iter().map(|&index| index.clone()));
        let op = Op::Scatter { op, axes: axes.into() };
        Ok(Array::lazy(op, inputs, self.shape(), self.dtype()))
    }

    /// zeros with `size` slices along `axis`, to which the slices of `updates` are added at
    /// `indices`. `updates` has the indices' shape in place of the axis.
    pub fn scatter_add(updates: &Array, indices: &Array, axis: usize, size: usize) -> Result<Array> {
        first_failure(&[updates, indices])?;
        check_indices("scatter_add", indices)?;
        let fits = updates.rank() >= axis + indices.rank()
            && &updates.shape()[axis..axis + indices.rank()] == indices.shape();
        if !fits {
            return Err(Error::shapes("scatter_add", &updates.shape().into(), &indices.shape().into()));
        }
        let mut shape: Shape = updates.shape()[..axis].into();
        shape.push(size);
        shape.extend_from_slice(&updates.shape()[axis + indices.rank()..]);
        let inputs = smallvec![indices.clone(), updates.clone()];
        Ok(Array::lazy(Op::ScatterAdd { axis }, inputs, shape, updates.dtype()))
    }
}

/// An array and indices into it along an axis, with their other dimensions broadcast together.
fn along(name: &'static str, x: &Array, indices: &Array, axis: i32) -> Result<(Array, Array, usize)> {
    let axis = normalize_axis(name, axis, x.rank())?;
    if indices.rank() != x.rank() {
        return Err(Error::shapes(name, &x.shape().into(), &indices.shape().into()));
    }
    let (mut wide, mut places): (Shape, Shape) = (x.shape().into(), indices.shape().into());
    (wide[axis], places[axis]) = (1, 1);
    let mut common = broadcast_shapes(name, &wide, &places)?;
    common[axis] = x.shape()[axis];
    let x = x.broadcast_to(&common)?;
    common[axis] = indices.shape()[axis];
    Ok((x, indices.broadcast_to(&common)?, axis))
}

/// The common shape of index arrays, if they and a slice fit an array.
fn check_places(
    name: &'static str,
    shape: &[usize],
    indices: &[&Array],
    axes: &[usize],
    slice: &[usize],
) -> Result<Shape> {
    let distinct = (0..axes.len()).all(|i| axes[i] < shape.len() && !axes[..i].contains(&axes[i]));
    if axes.len() != indices.len() || !distinct {
        return Err(Error::invalid(
            name,
            format!("{} index arrays for axes {axes:?} of {shape:?}: one per axis", indices.len()),
        ));
    }
    if slice.len() != shape.len() || slice.iter().zip(shape).any(|(part, whole)| part > whole) {
        return Err(Error::invalid(name, format!("slices of {slice:?} do not fit in {shape:?}")));
    }
    indices.iter().try_fold(Shape::new(), |common, index| {
        check_indices(name, index)?;
        broadcast_shapes(name, &common, index.shape())
    })
}

pub(crate) fn gather_vjp(axes: &Axes, rule: &Vjp) -> Result<Grads> {
    let indices: Vec<&Array> = rule.inputs[1..].iter().collect();
    let zeros = rule.inputs[0].zeros_like();
    rule.first(zeros.scatter(ScatterOp::Add, &indices, axes, rule.cotangent())?)
}

pub(crate) fn scatter_vjp(op: ScatterOp, axes: &Axes, rule: &Vjp) -> Result<Grads> {
    let (base, updates, ct) = (&rule.inputs[0], &rule.inputs[1], rule.cotangent());
    let indices: Vec<&Array> = rule.inputs[2..].iter().collect();
    let slice = &updates.shape()[updates.rank() - base.rank()..];
    let read = |x: &Array| x.gather(&indices, axes, slice);
    let (for_base, for_updates) = scatter_grads(op, base, updates, rule, &read, &|| {
        ct.scatter(ScatterOp::Set, &indices, axes, &updates.zeros_like())
    })?;
    let mut grads = rule.none()?;
    (grads[0], grads[1]) = (Some(for_base), Some(for_updates));
    Ok(grads)
}

pub(crate) fn scatter_along_vjp(op: ScatterOp, axis: usize, rule: &Vjp) -> Result<Grads> {
    let (base, indices, updates) = (&rule.inputs[0], &rule.inputs[1], &rule.inputs[2]);
    let ct = rule.cotangent();
    let read = |x: &Array| x.take_along_axis(indices, axis as i32);
    let (for_base, for_updates) = scatter_grads(op, base, updates, rule, &read, &|| {
        ct.put_along_axis(indices, &updates.zeros_like(), axis as i32)
    })?;
    Ok(smallvec![Some(for_base), None, Some(for_updates)])
}

/// Gradients of base and updates: `read` reads an array where the updates went, `outside` is the
/// cotangent with zeros there.
fn scatter_grads(
    op: ScatterOp,
    base: &Array,
    updates: &Array,
    rule: &Vjp,
    read: &dyn Fn(&Array) -> Result<Array>,
    outside: &dyn Fn() -> Result<Array>,
) -> Result<(Array, Array)> {
    let (y, ct) = (rule.output, rule.cotangent());
    match op {
        ScatterOp::Set => Ok((outside()?, read(ct)?)),
        ScatterOp::Add => Ok((ct.clone(), read(ct)?)),
        // To whatever the result was taken from.
        ScatterOp::Max | ScatterOp::Min => Ok((
            Array::select(&base.equal(y)?, ct, 0.0)?,
            Array::select(&updates.equal(read(y)?)?, &read(ct)?, 0.0)?,
        )),
        ScatterOp::Prod => {
            Err(Error::unsupported("scatter", "products have no gradient (they have none in MLX either)"))
        }
    }
}

pub(crate) fn take_vjp(axis: usize, rule: &Vjp) -> Result<Grads> {
    let (x, indices) = (&rule.inputs[0], &rule.inputs[1]);
    Ok(smallvec![Some(Array::scatter_add(rule.cotangent(), indices, axis, x.shape()[axis])?), None])
}

pub(crate) fn take_along_vjp(axis: usize, rule: &Vjp) -> Result<Grads> {
    let (x, indices, ct) = (&rule.inputs[0], &rule.inputs[1], rule.cotangent());
    let inputs = smallvec![indices.clone(), ct.clone()];
    Ok(smallvec![Some(Array::lazy(Op::ScatterAddAlong { axis }, inputs, x.shape(), ct.dtype())), None])
}

pub(crate) fn scatter_add_vjp(axis: usize, rule: &Vjp) -> Result<Grads> {
    Ok(smallvec![None, Some(rule.cotangent().take(&rule.inputs[0], axis as i32)?)])
}

pub(crate) fn scatter_add_along_vjp(axis: usize, rule: &Vjp) -> Result<Grads> {
    Ok(smallvec![None, Some(rule.cotangent().take_along_axis(&rule.inputs[0], axis as i32)?)])
}
