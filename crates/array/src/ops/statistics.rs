//! Reductions made of others.

use crate::shape::{normalize_axes, normalize_axis};
use crate::{Array, Dtype, Error, Result};

impl Array {
    /// The root of [`Array::var`].
    pub fn std(&self, axes: &[i32], keepdims: bool, ddof: usize) -> Result<Array> {
        self.var(axes, keepdims, ddof)?.sqrt()
    }

    /// The smallest and the largest over the axes (all if none are named).
    pub fn minmax(&self, axes: &[i32], keepdims: bool) -> Result<(Array, Array)> {
        Ok((self.min(axes, keepdims)?, self.max(axes, keepdims)?))
    }

    /// How many elements over the axes are not zero: i32.
    pub fn count_nonzero(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        self.astype(Dtype::Bool)?.astype(Dtype::I32)?.sum(axes, keepdims)
    }

    /// eˣ / Σ eˣ over several axes together (all if none are named), in this array's dtype.
    pub fn softmax_axes(&self, axes: &[i32]) -> Result<Array> {
        let list = normalize_axes("softmax", axes, self.rank())?;
        if self.size() == 0 {
            return Ok(self.clone());
        }
        match list.as_slice() {
            [axis] if axis + 1 == self.rank() => self.softmax(-1),
            _ => {
                // Unsigned integers have no differences below zero.
                let x = if self.dtype().is_inexact() { self.clone() } else { self.astype(Dtype::F32)? };
                let exp = x.subtract(x.max(axes, true)?.stop_gradient()?)?.exp()?;
                exp.divide(exp.sum(axes, true)?)?.astype(self.dtype())
            }
        }
    }

    /// log Σ eˣ over several axes together (all if none are named).
    pub fn logsumexp_axes(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        let list = normalize_axes("logsumexp", axes, self.rank())?;
        if self.size() == 0 {
            return Err(Error::invalid("logsumexp", format!("an array of {:?} is empty", self.shape())));
        }
        if let ([axis], false) = (list.as_slice(), self.dtype() == Dtype::C64) {
            return self.logsumexp(*axis as i32, keepdims);
        }
        let dtype = if self.dtype().is_inexact() { self.dtype() } else { Dtype::F32 };
        let x = self.astype(dtype)?;
        // An infinite maximum is the result, not ∞ − ∞.
        let top = x.max(axes, true)?.stop_gradient()?;
        let base = Array::select(&top.isinf()?, &top.zeros_like(), &top)?;
        let sum = x.subtract(&base)?.exp()?.sum(axes, true)?.log()?.add(&base)?;
        if keepdims {
            Ok(sum)
        } else {
            sum.squeeze(&list.iter().map(|&axis| axis as i32).collect::<Vec<_>>())
        }
    }

    /// Differences of neighbours along an axis, `n` times.
    pub fn diff(&self, n: usize, axis: i32) -> Result<Array> {
        let at = normalize_axis("diff", axis, self.rank())?;
        let mut x = self.clone();
        for _ in 0..n {
            let size = x.shape()[at];
            let (later, earlier) = (x.narrow(axis, size.min(1), size)?, x.narrow(axis, 0, size.max(1) - 1)?);
            x = match self.dtype() {
                Dtype::Bool => later.not_equal(earlier)?,
                _ => later.subtract(earlier)?,
            };
        }
        Ok(x)
    }

    /// Σ a* · b along an axis (a* is a, of complex numbers their conjugates).
    pub fn vecdot(&self, other: &Array, axis: i32) -> Result<Array> {
        let rank = self.rank().min(other.rank());
        normalize_axis("vecdot", axis, rank)?;
        if self.dim(axis) != other.dim(axis) {
            return Err(Error::shapes("vecdot", &self.shape().into(), &other.shape().into()));
        }
        self.conjugate()?.multiply(other)?.sum(&[axis], false)
    }
}
