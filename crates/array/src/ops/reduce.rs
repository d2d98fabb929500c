//! Reductions over axes, softmax and log-sum-exp.

pub(crate) mod jvp;

use smallvec::smallvec;

use super::{Grads, Vjp};
use crate::op::{Axes, Op, ReduceOp, first_failure};
use crate::shape::{Shape, normalize_axes, normalize_axis};
use crate::{Array, Dtype, Error, Result};

impl Array {
    pub(crate) fn reduce(&self, op: ReduceOp, axes: &[i32], keepdims: bool) -> Result<Array> {
        first_failure(&[self])?;
        let axes = normalize_axes(op.name(), axes, self.rank())?;
        let dtype = op.output_dtype(self.dtype());
        if axes.is_empty() && matches!(op, ReduceOp::Sum | ReduceOp::Prod) {
            // Over no axes there is nothing to add up: small types stay as they are, as in MLX.
            return Ok(self.clone());
        }
        let empty = axes.iter().any(|&axis| self.shape()[axis] == 0);
        if empty && matches!(op, ReduceOp::Max | ReduceOp::Min) {
            return Err(Error::invalid(
                op.name(),
                format!("an empty axis of {:?} has no extremum", self.shape()),
            ));
        }
        let input = match op {
            ReduceOp::All | ReduceOp::Any => self.astype(Dtype::Bool)?,
            _ => self.astype(dtype)?,
        };
        let kept: Shape = self
            .shape()
            .iter()
            .enumerate()
            .map(|(axis, &size)| if axes.contains(&axis) { 1 } else { size })
            .collect();
        let full = Array::lazy(Op::Reduce { op, axes: axes.clone() }, smallvec![input], kept, dtype);
        if keepdims { Ok(full) } else { drop_axes(&full, &axes) }
    }

    /// Σ over the axes (all if none are named). Small integers add up in 32 bits; a scalar is its own sum.
    pub fn sum(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        self.reduce(ReduceOp::Sum, axes, keepdims)
    }

    /// Π over the axes.
    pub fn prod(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        self.reduce(ReduceOp::Prod, axes, keepdims)
    }

    /// The largest over the axes.
    pub fn max(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        self.reduce(ReduceOp::Max, axes, keepdims)
    }

    /// The smallest over the axes.
    pub fn min(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        self.reduce(ReduceOp::Min, axes, keepdims)
    }

    /// Whether all are true.
    pub fn all(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        self.reduce(ReduceOp::All, axes, keepdims)
    }

    /// Whether any is true.
    pub fn any(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        self.reduce(ReduceOp::Any, axes, keepdims)
    }

    /// The mean over the axes; integers become f32.
    pub fn mean(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        let list = normalize_axes("mean", axes, self.rank())?;
        let count: usize = list.iter().map(|&axis| self.shape()[axis]).product();
        let dtype = if self.dtype().is_inexact() { self.dtype() } else { Dtype::F32 };
        self.astype(dtype)?.sum(axes, keepdims)?.multiply(1.0 / count as f64)
    }

    /// The mean square distance from the mean, divided by n − ddof.
    pub fn var(&self, axes: &[i32], keepdims: bool, ddof: usize) -> Result<Array> {
        let list = normalize_axes("var", axes, self.rank())?;
        let count: usize = list.iter().map(|&axis| self.shape()[axis]).product();
        let centred = self.subtract(self.mean(axes, true)?)?;
        // Of complex numbers the distances' squares, which are real.
        let centred = if self.dtype() == Dtype::C64 { centred.abs()? } else { centred };
        centred.square()?.sum(axes, keepdims)?.multiply(1.0 / count.saturating_sub(ddof) as f64)
    }

    fn arg_reduce(&self, max: bool, axis: Option<i32>, keepdims: bool) -> Result<Array> {
        first_failure(&[self])?;
        let name = if max { "argmax" } else { "argmin" };
        let Some(axis) = axis else {
            let index = self.flatten()?.arg_reduce(max, Some(0), false)?;
            return if keepdims { index.reshape(&vec![1; self.rank()]) } else { Ok(index) };
        };
        let axis = normalize_axis(name, axis, self.rank())?;
        if self.size() == 0 {
            return Err(Error::invalid(name, format!("an array of {:?} is empty", self.shape())));
        }
        let mut kept: Shape = self.shape().into();
        kept[axis] = 1;
        let full = Array::lazy(Op::ArgReduce { max, axis }, smallvec![self.clone()], kept, Dtype::U32);
        if keepdims { Ok(full) } else { drop_axes(&full, &smallvec![axis]) }
    }

    /// The index of the largest along an axis (of the flattened array without one); the lowest on ties,
    /// that of the first NaN if there is one.
    pub fn argmax(&self, axis: impl Into<Option<i32>>, keepdims: bool) -> Result<Array> {
        self.arg_reduce(true, axis.into(), keepdims)
    }

    /// The index of the smallest, as [`Array::argmax`].
    pub fn argmin(&self, axis: impl Into<Option<i32>>, keepdims: bool) -> Result<Array> {
        self.arg_reduce(false, axis.into(), keepdims)
    }

    /// eˣ / Σ eˣ along an axis.
    pub fn softmax(&self, axis: i32) -> Result<Array> {
        if self.dtype() == Dtype::C64 {
            let powers = self.subtract(self.max(&[axis], true)?)?.exp()?;
            return powers.divide(powers.sum(&[axis], true)?);
        }
        if self.size() == 0 {
            normalize_axis("softmax", axis, self.rank())?;
            return self.astype(if self.dtype().is_inexact() { self.dtype() } else { Dtype::F32 });
        }
        along_last("softmax", self, axis, |x| {
            Ok(Array::lazy(Op::Softmax, smallvec![x.clone()], x.shape(), x.dtype()))
        })
    }

    /// log Σ eˣ along an axis.
    ///
    /// # Errors
    /// If there are no elements.
    pub fn logsumexp(&self, axis: i32, keepdims: bool) -> Result<Array> {
        if self.size() == 0 {
            return Err(Error::invalid("logsumexp", format!("an array of {:?} is empty", self.shape())));
        }
        if self.dtype() == Dtype::C64 {
            let largest = self.max(&[axis], true)?;
            let sum = self.subtract(&largest)?.exp()?.sum(&[axis], true)?.log()?.add(&largest)?;
            return if keepdims { Ok(sum) } else { sum.squeeze(&[axis]) };
        }
        let full = along_last("logsumexp", self, axis, |x| {
            let mut kept: Shape = x.shape().into();
            *kept.last_mut().expect("has the axis") = 1;
            Ok(Array::lazy(Op::LogSumExp, smallvec![x.clone()], kept, x.dtype()))
        })?;
        let axis = normalize_axis("logsumexp", axis, self.rank())?;
        if keepdims { Ok(full) } else { drop_axes(&full, &smallvec![axis]) }
    }

    /// x − log Σ eˣ along an axis.
    pub fn log_softmax(&self, axis: i32) -> Result<Array> {
        self.subtract(self.logsumexp(axis, true)?)
    }
}

/// Runs a last-axis op along any axis.
fn along_last(
    name: &'static str,
    x: &Array,
    axis: i32,
    op: impl Fn(&Array) -> Result<Array>,
) -> Result<Array> {
    first_failure(&[x])?;
    let axis = normalize_axis(name, axis, x.rank())?;
    let x = if x.dtype().is_inexact() { x.clone() } else { x.astype(Dtype::F32)? };
    if x.shape()[axis] == 0 {
        return Err(Error::invalid(name, format!("axis {axis} of {:?} is empty", x.shape())));
    }
    if axis + 1 == x.rank() {
        return op(&x);
    }
    op(&x.swap_axes(axis as i32, -1)?)?.swap_axes(axis as i32, -1)
}

fn drop_axes(array: &Array, axes: &Axes) -> Result<Array> {
    if axes.is_empty() {
        return Ok(array.clone());
    }
    array.squeeze(&axes.iter().map(|&axis| axis as i32).collect::<Vec<_>>())
}

pub(crate) fn reduce_vjp(op: ReduceOp, axes: &Axes, rule: &Vjp) -> Result<Grads> {
    let (x, y, ct) = (&rule.inputs[0], rule.output, rule.cotangent());
    match op {
        ReduceOp::Sum => rule.one(ct.broadcast_to(x.shape())?),
        ReduceOp::Max | ReduceOp::Min => {
            // Ties share the gradient, as in MLX.
            let axes: Vec<i32> = axes.iter().map(|&axis| axis as i32).collect();
            rule.one(ct.multiply(extremum_share(x, y, ct.dtype(), &axes)?)?)
        }
        ReduceOp::Prod => {
            // The product of all other elements: of those before and those after. Dividing by the
            // element itself would fail where it is 0.
            let kept = (0..x.rank()).filter(|axis| !axes.contains(axis));
            let order: Vec<i32> = kept.chain(axes.iter().copied()).map(|axis| axis as i32).collect();
            let moved = x.transpose(&order)?;
            let mut lines: Vec<i64> = moved.shape().iter().map(|&size| size as i64).collect();
            let back = lines.clone();
            lines.truncate(x.rank() - axes.len());
            lines.push(axes.iter().map(|&axis| x.shape()[axis] as i64).product());
            let lines = moved.reshape(&lines)?;
            let others = lines.cumprod(-1, false, false)?.multiply(lines.cumprod(-1, true, false)?)?;
            let mut inverse = vec![0i32; order.len()];
            order.iter().enumerate().for_each(|(to, &from)| inverse[from as usize] = to as i32);
            rule.one(ct.multiply(others.reshape(&back)?.transpose(&inverse)?)?)
        }
        ReduceOp::All | ReduceOp::Any => rule.none(),
    }
}

/// One over how many elements are the extremum where an element is it, else zero.
fn extremum_share(x: &Array, y: &Array, dtype: Dtype, axes: &[i32]) -> Result<Array> {
    let mask = x.equal(y)?.astype(dtype)?;
    if axes.is_empty() {
        return Ok(mask);
    }
    mask.divide(mask.sum(axes, true)?)
}

pub(crate) fn softmax_vjp(rule: &Vjp) -> Result<Grads> {
    let (y, ct) = (&rule.values(0), rule.cotangent());
    let weighted = y.multiply(ct)?;
    rule.one(weighted.subtract(y.multiply(weighted.sum(&[-1], true)?)?)?)
}

pub(crate) fn logsumexp_vjp(rule: &Vjp) -> Result<Grads> {
    rule.one(rule.inputs[0].softmax(-1)?.multiply(rule.cotangent())?)
}
