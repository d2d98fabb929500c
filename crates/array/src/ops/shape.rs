//! Ops that move elements without changing them.

pub(crate) mod jvp;
pub(crate) mod vmap;

use smallvec::{SmallVec, smallvec};

use super::{Grads, Vjp};
use crate::dtype::promote;
use crate::node::State;
use crate::op::{Axes, Op, first_failure};
use crate::shape::{Shape, broadcast_shapes, normalize_axes, normalize_axis, size_of};
use crate::storage::Storage;
use crate::{Array, Dtype, Error, Result};

/// Saturated: no array has so many elements.
fn product<'a>(sizes: impl Iterator<Item = &'a i64>) -> i64 {
    sizes.fold(1, |product, &size| product.saturating_mul(size))
}

impl Array {
    /// The same elements, row-major, in another shape. One size may be −1: whatever remains.
    pub fn reshape(&self, shape: &[i64]) -> Result<Array> {
        first_failure(&[self])?;
        let known = product(shape.iter().filter(|&&size| size != -1));
        let size = self.size();
        let free = shape.iter().filter(|&&size| size == -1).count();
        let bad = || Error::invalid("reshape", format!("cannot make {shape:?} of {:?}", self.shape()));
        if shape.iter().any(|&size| size < -1) || free > 1 || known < 0 || (free == 1 && known == 0) {
            return Err(bad());
        }
        let to: Shape = shape
            .iter()
            .map(|&wanted| if wanted == -1 { size / known as usize } else { wanted as usize })
            .collect();
        if size_of(&to) != size {
            return Err(bad());
        }
        self.reshape_to(&to)
    }

    pub(crate) fn reshape_to(&self, shape: &[usize]) -> Result<Array> {
        first_failure(&[self])?;
        if shape == self.shape() {
            return Ok(self.clone());
        }
        Ok(Array::lazy(Op::Reshape, smallvec![self.clone()], shape, self.dtype()))
    }

    /// All elements in one dimension.
    pub fn flatten(&self) -> Result<Array> {
        self.reshape_to(&[self.size()])
    }

    /// Merges the dimensions `from ..= to` into one; an array without dimensions gets one.
    pub fn flatten_axes(&self, from: i32, to: i32) -> Result<Array> {
        if self.rank() == 0 {
            return self.flatten();
        }
        let from = normalize_axis("flatten", from, self.rank())?;
        let to = normalize_axis("flatten", to, self.rank())?;
        if from > to {
            return Err(Error::invalid("flatten", format!("axis {from} comes after {to}")));
        }
        let mut shape: Shape = self.shape()[..from].into();
        shape.push(size_of(&self.shape()[from..=to]));
        shape.extend_from_slice(&self.shape()[to + 1..]);
        self.reshape_to(&shape)
    }

    /// Splits one dimension into several of these sizes, one of which may be −1: what remains.
    pub fn unflatten(&self, axis: i32, sizes: &[i64]) -> Result<Array> {
        let axis = normalize_axis("unflatten", axis, self.rank())?;
        let size = self.shape()[axis];
        let known = product(sizes.iter().filter(|&&size| size != -1));
        let rest = if known > 0 { size as i64 / known } else { 0 };
        let free = sizes.iter().filter(|&&size| size == -1).count();
        let sizes: Shape = sizes.iter().map(|&size| if size == -1 { rest } else { size } as usize).collect();
        if free > 1 || known < 0 || size_of(&sizes) != size {
            return Err(Error::invalid("unflatten", format!("{sizes:?} do not multiply to {size}")));
        }
        let mut shape: Shape = self.shape()[..axis].into();
        shape.extend_from_slice(&sizes);
        shape.extend_from_slice(&self.shape()[axis + 1..]);
        self.reshape_to(&shape)
    }

    /// Inserts dimensions of size one, at these places of the result.
    pub fn expand_dims(&self, axes: &[i32]) -> Result<Array> {
        let rank = self.rank() + axes.len();
        if axes.is_empty() {
            return Ok(self.clone());
        }
        let axes = normalize_axes("expand_dims", axes, rank)?;
        let mut sizes = self.shape().iter();
        let shape: Shape = (0..rank)
            .map(|axis| if axes.contains(&axis) { 1 } else { *sizes.next().expect("rank adds up") })
            .collect();
        self.reshape_to(&shape)
    }

    /// Removes dimensions of size one: these, or all if none are named.
    pub fn squeeze(&self, axes: &[i32]) -> Result<Array> {
        let axes: Axes = if axes.is_empty() {
            (0..self.rank()).filter(|&axis| self.shape()[axis] == 1).collect()
        } else {
            normalize_axes("squeeze", axes, self.rank())?
        };
        if let Some(axis) = axes.iter().find(|&&axis| self.shape()[axis] != 1) {
            return Err(Error::invalid(
                "squeeze",
                format!("axis {axis} of {:?} is not of size one", self.shape()),
            ));
        }
        let shape: Shape = self
            .shape()
            .iter()
            .enumerate()
            .filter(|(axis, _)| !axes.contains(axis))
            .map(|(_, &size)| size)
            .collect();
        self.reshape_to(&shape)
    }

    /// Dimensions in the order of `axes`; all reversed if none are named.
    pub fn transpose(&self, axes: &[i32]) -> Result<Array> {
        let order: Axes = if axes.is_empty() {
            (0..self.rank()).rev().collect()
        } else {
            axes.iter().map(|&axis| normalize_axis("transpose", axis, self.rank())).collect::<Result<_>>()?
        };
        let mut seen = order.clone();
        seen.sort_unstable();
        if !seen.iter().copied().eq(0..self.rank()) {
            return Err(Error::invalid(
                "transpose",
                format!("axes {axes:?} do not permute {} dimensions", self.rank()),
            ));
        }
        first_failure(&[self])?;
        if order.iter().copied().eq(0..self.rank()) {
            return Ok(self.clone());
        }
        let shape: Shape = order.iter().map(|&axis| self.shape()[axis]).collect();
        Ok(Array::lazy(Op::Transpose(order), smallvec![self.clone()], shape, self.dtype()))
    }

    /// Two dimensions exchanged.
    pub fn swap_axes(&self, a: i32, b: i32) -> Result<Array> {
        let (a, b) =
            (normalize_axis("swapaxes", a, self.rank())?, normalize_axis("swapaxes", b, self.rank())?);
        let mut order: SmallVec<[i32; 4]> = (0..self.rank() as i32).collect();
        order.swap(a, b);
        self.transpose(&order)
    }

    /// Repeated along dimensions of size one (and new leading ones) to this shape.
    pub fn broadcast_to(&self, shape: &[usize]) -> Result<Array> {
        if shape == self.shape() {
            return Ok(self.clone());
        }
        first_failure(&[self])?;
        if broadcast_shapes("broadcast_to", self.shape(), shape)?.as_slice() != shape {
            return Err(Error::invalid(
                "broadcast_to",
                format!("{:?} does not broadcast to {shape:?}", self.shape()),
            ));
        }
        Ok(Array::lazy(Op::Broadcast, smallvec![self.clone()], shape, self.dtype()))
    }

    /// A strided window: per dimension the first index, how many, and the step (which may be
    /// negative).
    pub fn window(&self, start: &[usize], count: &[usize], step: &[isize]) -> Result<Array> {
        first_failure(&[self])?;
        let fits = start.len() == self.rank() && count.len() == self.rank() && step.len() == self.rank();
        let inside = fits
            && (0..self.rank()).all(|axis| {
                count[axis] == 0 || {
                    let last = start[axis] as i128 + (count[axis] as i128 - 1) * step[axis] as i128;
                    start[axis] < self.shape()[axis] && last >= 0 && last < self.shape()[axis] as i128
                }
            });
        if !inside {
            return Err(Error::invalid(
                "slice",
                format!("start {start:?}, count {count:?}, step {step:?} leave the shape {:?}", self.shape()),
            ));
        }
        if count == self.shape() && step.iter().all(|&step| step == 1) {
            return Ok(self.clone());
        }
        Ok(Array::lazy(
            Op::Slice { start: start.into(), step: step.into() },
            smallvec![self.clone()],
            count,
            self.dtype(),
        ))
    }

    /// Indices `from .. to` along one axis, as Python's `[from:to]` with non-negative bounds.
    pub fn narrow(&self, axis: i32, from: usize, to: usize) -> Result<Array> {
        let axis = normalize_axis("slice", axis, self.rank())?;
        let size = self.shape()[axis];
        if from > to || to > size {
            return Err(Error::invalid("slice", format!("{from}..{to} leaves axis {axis} of size {size}")));
        }
        let mut start: Shape = smallvec![0; self.rank()];
        let mut count: Shape = self.shape().into();
        start[axis] = if to == from { 0 } else { from };
        count[axis] = to - from;
        self.window(&start, &count, &vec![1; self.rank()])
    }

    /// Pieces along an axis of these sizes.
    pub fn split_sizes(&self, sizes: &[usize], axis: i32) -> Result<Vec<Array>> {
        let mut from = 0usize;
        let pieces = sizes
            .iter()
            .map(|&size| {
                let start = from;
                from = start.saturating_add(size);
                self.narrow(axis, start, from)
            })
            .collect::<Result<Vec<_>>>()?;
        if from != self.shape()[normalize_axis("split", axis, self.rank())?] {
            return Err(Error::invalid(
                "split",
                format!("{sizes:?} do not add up to the axis of {:?}", self.shape()),
            ));
        }
        Ok(pieces)
    }

    /// Arrays one after another along an axis.
    pub fn concatenate(arrays: &[Array], axis: i32) -> Result<Array> {
        let Some(first) = arrays.first() else {
            return Err(Error::invalid("concatenate", "needs at least one array"));
        };
        first_failure(&arrays.iter().collect::<Vec<_>>())?;
        let axis = normalize_axis("concatenate", axis, first.rank())?;
        let mut shape: Shape = first.shape().into();
        shape[axis] = 0;
        let mut dtype = first.dtype();
        for array in arrays {
            let fits = array.rank() == shape.len()
                && (0..shape.len()).all(|i| i == axis || array.shape()[i] == first.shape()[i]);
            if !fits {
                return Err(Error::shapes("concatenate", &first.shape().into(), &array.shape().into()));
            }
            shape[axis] = shape[axis].saturating_add(array.shape()[axis]);
            dtype = promote(dtype, array.dtype());
        }
        if arrays.len() == 1 {
            return Ok(first.clone());
        }
        let inputs = arrays.iter().map(|array| array.astype(dtype)).collect::<Result<_>>()?;
        Ok(Array::lazy(Op::Concatenate { axis }, inputs, shape, dtype))
    }

    /// Arrays of the same shape along a new axis.
    pub fn stack(arrays: &[Array], axis: i32) -> Result<Array> {
        let expanded = arrays.iter().map(|array| array.expand_dims(&[axis])).collect::<Result<Vec<_>>>()?;
        Array::concatenate(&expanded, axis)
    }

    /// This array with the window at `start` (unit steps) replaced by `update`.
    pub fn slice_update(&self, update: &Array, start: &[usize]) -> Result<Array> {
        first_failure(&[self, update])?;
        let fits = update.rank() == self.rank()
            && start.len() == self.rank()
            && (0..self.rank()).all(|axis| {
                start[axis].checked_add(update.shape()[axis]).is_some_and(|end| end <= self.shape()[axis])
            });
        if !fits {
            return Err(Error::invalid(
                "slice_update",
                format!("an update of {:?} at {start:?} leaves {:?}", update.shape(), self.shape()),
            ));
        }
        let step = SmallVec::from_elem(1, self.rank());
        let inputs = smallvec![self.clone(), update.astype(self.dtype())?];
        Ok(Array::lazy(Op::SliceUpdate { start: start.into(), step }, inputs, self.shape(), self.dtype()))
    }

    /// The same arrays, none of which is computed before all of `dependencies` are. Gradients pass
    /// by the dependencies.
    ///
    /// ```
    /// use mica_array::{Array, Dtype};
    ///
    /// let (x, first) = (Array::ones(&[2], Dtype::F32), Array::ones(&[3], Dtype::F32).exp()?);
    /// let y = Array::depends(&[x], &[first.clone()])?;
    /// y[0].eval()?;
    /// assert!(first.is_ready());
    /// # Ok::<(), mica_array::Error>(())
    /// ```
    pub fn depends(inputs: &[Array], dependencies: &[Array]) -> Result<Vec<Array>> {
        first_failure(&inputs.iter().chain(dependencies).collect::<Vec<&Array>>())?;
        let behind = |input: &Array| dependencies.iter().fold(input.clone(), |input, one| input.after(one));
        Ok(inputs.iter().map(behind).collect())
    }

    /// This array, not computed before `other` is.
    pub(crate) fn after(&self, other: &Array) -> Array {
        Array::lazy(Op::After, smallvec![self.clone(), other.clone()], self.shape(), self.dtype())
    }

    /// The same values. Gradients that need them later take a copy rounded to `dtype`, which is made before the result
    /// is used and is all that is kept for them: half of the memory for f32 in bf16. Nothing is rounded on the way
    /// forward, and where no gradient needs the copy, it is not made.
    ///
    /// The copy counts for what is computed from the result and, if it has a gradient, from `self`, by ops whose
    /// gradient is smooth: arithmetic, functions of one number, softmax, products, norms, attention, convolutions.
    /// Gradients that compare or order (extremes, sorting, scattering) and those of custom functions and checkpoints
    /// take the array itself. Near a pole the gradient is that of the rounded value, and what `dtype` can't hold is
    /// infinite there. A compiled function fuses the copy with its neighbours, where it saves nothing.
    ///
    /// An array that is no wider than `dtype`, or saved already, stays as it is.
    ///
    /// ```
    /// use mica_array::{Array, Dtype, transforms::grad};
    ///
    /// let x = Array::from_slice(&[1.0f32 + 1.0 / 512.0], &[1])?;
    /// let square = |x: &[Array]| {
    ///     let x = x[0].saved_as(Dtype::BF16)?;
    ///     x.multiply(&x)?.sum(&[], false)
    /// };
    /// assert_eq!(grad(square, &[x])?[0].to_vec::<f32>()?, [2.0]);
    /// # Ok::<(), mica_array::Error>(())
    /// ```
    ///
    /// # Errors
    /// Where one of the dtypes is no float.
    pub fn saved_as(&self, dtype: Dtype) -> Result<Array> {
        if !self.dtype().is_float() || !dtype.is_float() {
            return Err(Error::dtype(
                "saved_as",
                "floats",
                if self.dtype().is_float() { dtype } else { self.dtype() },
            ));
        }
        if self.is_saved() || dtype.size() >= self.dtype().size() {
            return Ok(self.clone());
        }
        self.with_copy(&self.astype(dtype)?)
    }

    /// Whether it is an array that has a copy for gradients, or a view of one.
    fn is_saved(&self) -> bool {
        let before = match &*self.node().state() {
            State::Lazy { op: Op::SavedAs, .. } => return true,
            State::Lazy { op, inputs } if op.is_saved_view() => inputs[0].clone(),
            _ => return false,
        };
        matches!(&*before.node().state(), State::Lazy { op: Op::SavedAs, .. })
    }

    /// This array, and a copy of it in another dtype for gradient rules.
    pub(crate) fn with_copy(&self, copy: &Array) -> Result<Array> {
        first_failure(&[self, copy])?;
        if copy.shape() != self.shape() {
            return Err(Error::shapes("saved_as", &self.shape().into(), &copy.shape().into()));
        }
        let mut inputs = smallvec![self.clone(), copy.clone()];
        if self.output() == 0 && matches!(&*self.node().state(), State::Lazy { op: Op::Attention(_), .. }) {
            let lse = self.sibling(1);
            inputs.push(Array::lazy(Op::Contiguous, smallvec![lse.clone()], lse.shape(), lse.dtype()));
        }
        Ok(Array::lazy(Op::SavedAs, inputs, self.shape(), self.dtype()))
    }

    /// The array of half the width that this one was widened from, which has the same values, if it is still to be
    /// widened; else this one. For kernels that read either.
    pub(crate) fn unwidened(&self) -> Array {
        let before = match &*self.node().state() {
            State::Lazy { op: Op::Cast, inputs } if self.dtype() == Dtype::F32 => inputs[0].clone(),
            _ => return self.clone(),
        };
        let is_half = matches!(before.dtype(), Dtype::BF16 | Dtype::F16) && before.packed().is_none();
        if is_half { before } else { self.clone() }
    }

    /// [`Array::contiguous`] for a kernel that needs it; no node where it shows already that there are no gaps.
    pub(crate) fn dense(&self) -> Result<Array> {
        let mut array = self.clone();
        let is_dense = loop {
            let before = match &*array.node().state() {
                // These have gaps where their input has some.
                State::Lazy { op: Op::StopGradient | Op::After | Op::SavedAs | Op::Reshape, inputs } => {
                    inputs[0].clone()
                }
                // A tracer stands for inputs of later calls too, which may have gaps.
                State::Lazy { op, .. } => break !op.is_view() && !matches!(op, Op::Bitcast),
                State::Ready(storage) => match &storage[array.output()] {
                    Storage::Host(host) => break host.is_contiguous(array.shape()),
                    Storage::Packed(_) | Storage::Absent => break true,
                },
                State::Failed(_) => break true,
            };
            array = before;
        };
        if is_dense { Ok(self.clone()) } else { self.contiguous() }
    }

    /// The same values, row-major without gaps.
    pub fn contiguous(&self) -> Result<Array> {
        first_failure(&[self])?;
        Ok(Array::lazy(Op::Contiguous, smallvec![self.clone()], self.shape(), self.dtype()))
    }
}

pub(crate) fn reshape_vjp(rule: &Vjp) -> Result<Grads> {
    rule.one(rule.cotangent().reshape_to(rule.inputs[0].shape())?)
}

pub(crate) fn transpose_vjp(order: &Axes, rule: &Vjp) -> Result<Grads> {
    let mut inverse: SmallVec<[i32; 4]> = SmallVec::from_elem(0, order.len());
    for (to, &from) in order.iter().enumerate() {
        inverse[from] = to as i32;
    }
    rule.one(rule.cotangent().transpose(&inverse)?)
}

pub(crate) fn broadcast_vjp(rule: &Vjp) -> Result<Grads> {
    rule.one(sum_to(rule.cotangent(), rule.inputs[0].shape())?)
}

/// Sums away what broadcasting `to` to the array's shape had repeated.
pub(crate) fn sum_to(array: &Array, to: &[usize]) -> Result<Array> {
    let lead = array.rank() - to.len();
    let axes: Vec<i32> = (0..array.rank())
        .filter(|&axis| axis < lead || (to[axis - lead] == 1 && array.shape()[axis] != 1))
        .map(|axis| axis as i32)
        .collect();
    if axes.is_empty() {
        return array.reshape_to(to);
    }
    array.sum(&axes, true)?.reshape_to(to)
}

pub(crate) fn slice_vjp(start: &[usize], step: &[isize], rule: &Vjp) -> Result<Grads> {
    let zeros = rule.inputs[0].zeros_like();
    let ct = rule.cotangent();
    let op = Op::SliceUpdate { start: start.into(), step: step.into() };
    rule.one(Array::lazy(op, smallvec![zeros.clone(), ct.clone()], zeros.shape(), zeros.dtype()))
}

pub(crate) fn slice_update_vjp(start: &[usize], step: &[isize], rule: &Vjp) -> Result<Grads> {
    let (update, ct) = (&rule.inputs[1], rule.cotangent());
    let zeros = update.zeros_like();
    let op = Op::SliceUpdate { start: start.into(), step: step.into() };
    let outside = Array::lazy(op, smallvec![ct.clone(), zeros], ct.shape(), ct.dtype());
    Ok(smallvec![Some(outside), Some(ct.window(start, update.shape(), step)?)])
}

pub(crate) fn concatenate_vjp(axis: usize, rule: &Vjp) -> Result<Grads> {
    let sizes: Vec<usize> = rule.inputs.iter().map(|input| input.shape()[axis]).collect();
    Ok(rule.cotangent().split_sizes(&sizes, axis as i32)?.into_iter().map(Some).collect())
}
