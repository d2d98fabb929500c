//! Gathering and scattering by index arrays.

pub(crate) mod jvp;
pub(crate) mod vmap;

use smallvec::smallvec;

use super::{Grads, Vjp};
use crate::op::{Op, first_failure};
use crate::shape::{Shape, normalize_axis};
use crate::{Array, Error, Result};

fn check_indices(op: &'static str, indices: &Array) -> Result<()> {
    if indices.dtype().is_integer() {
        Ok(())
    } else {
        Err(Error::dtype(op, "integer indices", indices.dtype()))
    }
}

impl Array {
    /// The slices along `axis` that `indices` name; negative indices count from the end. The
    /// shape of the indices replaces the axis.
    pub fn take(&self, indices: &Array, axis: i32) -> Result<Array> {
        first_failure(&[self, indices])?;
        check_indices("take", indices)?;
        let axis = normalize_axis("take", axis, self.rank())?;
        if self.shape()[axis] == 0 && indices.size() > 0 {
            return Err(Error::invalid("take", format!("axis {axis} of {:?} is empty", self.shape())));
        }
        let mut shape: Shape = self.shape()[..axis].into();
        shape.extend_from_slice(indices.shape());
        shape.extend_from_slice(&self.shape()[axis + 1..]);
        Ok(Array::lazy(Op::Take { axis }, smallvec![self.clone(), indices.clone()], shape, self.dtype()))
    }

    /// For every place of `indices` the element at that index along `axis`. The other dimensions
    /// are equal.
    pub fn take_along_axis(&self, indices: &Array, axis: i32) -> Result<Array> {
        first_failure(&[self, indices])?;
        check_indices("take_along_axis", indices)?;
        let axis = normalize_axis("take_along_axis", axis, self.rank())?;
        let fits = indices.rank() == self.rank()
            && (0..self.rank()).all(|i| i == axis || indices.shape()[i] == self.shape()[i]);
        if !fits {
            return Err(Error::shapes("take_along_axis", &self.shape().into(), &indices.shape().into()));
        }
        let inputs = smallvec![self.clone(), indices.clone()];
        Ok(Array::lazy(Op::TakeAlong { axis }, inputs, indices.shape(), self.dtype()))
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
