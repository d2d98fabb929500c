//! Running sums, products and extremes.

use smallvec::smallvec;

use super::{Grads, Jvp, Tangents, Vjp};
use crate::op::{Op, ScanOp, first_failure};
use crate::shape::normalize_axis;
use crate::{Array, Dtype, Error, Result};

impl Array {
    /// Σ of the elements up to each along an axis, or of all in row-major order. `reverse` starts
    /// from the last; not `inclusive` leaves the element itself out. Bools become i32.
    pub fn cumsum(&self, axis: impl Into<Option<i32>>, reverse: bool, inclusive: bool) -> Result<Array> {
        self.scan(ScanOp::Sum, axis.into(), reverse, inclusive)
    }

    /// Π of the elements up to each, as [`Array::cumsum`].
    pub fn cumprod(&self, axis: impl Into<Option<i32>>, reverse: bool, inclusive: bool) -> Result<Array> {
        self.scan(ScanOp::Prod, axis.into(), reverse, inclusive)
    }

    /// The largest of the elements up to each, as [`Array::cumsum`].
    pub fn cummax(&self, axis: impl Into<Option<i32>>, reverse: bool, inclusive: bool) -> Result<Array> {
        self.scan(ScanOp::Max, axis.into(), reverse, inclusive)
    }

    /// The smallest of the elements up to each, as [`Array::cumsum`].
    pub fn cummin(&self, axis: impl Into<Option<i32>>, reverse: bool, inclusive: bool) -> Result<Array> {
        self.scan(ScanOp::Min, axis.into(), reverse, inclusive)
    }

    /// log Σ eˣ of the elements up to each, as [`Array::cumsum`]; integers become f32.
    pub fn logcumsumexp(
        &self,
        axis: impl Into<Option<i32>>,
        reverse: bool,
        inclusive: bool,
    ) -> Result<Array> {
        let x = if self.dtype().is_inexact() { self.clone() } else { self.astype(Dtype::F32)? };
        x.scan(ScanOp::LogSumExp, axis.into(), reverse, inclusive)
    }

    pub(crate) fn scan(
        &self,
        op: ScanOp,
        axis: Option<i32>,
        reverse: bool,
        inclusive: bool,
    ) -> Result<Array> {
        first_failure(&[self])?;
        let Some(axis) = axis else {
            return self.flatten()?.scan(op, Some(0), reverse, inclusive);
        };
        let axis = normalize_axis(op.name(), axis, self.rank())?;
        let dtype = op.output_dtype(self.dtype());
        let op = Op::Scan { op, axis, reverse, exclusive: !inclusive };
        Ok(Array::lazy(op, smallvec![self.clone()], self.shape(), dtype))
    }
}

pub(crate) fn scan_vjp(op: ScanOp, axis: usize, reverse: bool, exclusive: bool, rule: &Vjp) -> Result<Grads> {
    let (x, y, ct) = (&rule.inputs[0], rule.output, rule.cotangent());
    let axis = axis as i32;
    match op {
        ScanOp::Sum => rule.one(ct.cumsum(axis, !reverse, !exclusive)?),
        ScanOp::LogSumExp => {
            // Σ over the outputs that x reaches of ct · exp(x − y), for either sign of ct apart, in
            // logarithms so that nothing overflows.
            let part = |ct: &Array| -> Result<Array> {
                let none = Array::full(&[], f64::NEG_INFINITY, ct.dtype());
                let log = Array::select(&ct.greater(0.0)?, &ct.log()?, &none)?;
                let difference = Array::select(&log.equal(&none)?, &none, log.subtract(y)?)?;
                difference.logcumsumexp(axis, !reverse, !exclusive)?.add(x)?.exp()
            };
            rule.one(part(ct)?.subtract(part(&ct.negative()?)?)?)
        }
        // For elements that are not 0; the gradient of one that is comes out as NaN.
        ScanOp::Prod => rule.one(ct.multiply(y)?.cumsum(axis, !reverse, !exclusive)?.divide(x)?),
        ScanOp::Max | ScanOp::Min => extreme_vjp(op, axis, reverse, exclusive, rule),
    }
}

/// The gradient of an output is that of the element that it is: the latest of equal ones, as in MLX.
fn extreme_vjp(op: ScanOp, axis: i32, reverse: bool, exclusive: bool, rule: &Vjp) -> Result<Grads> {
    let (x, ct) = (&rule.inputs[0], rule.cotangent());
    let size = x.dim(axis);
    if size == 0 {
        return rule.one(ct.clone());
    }
    let extreme = if exclusive { x.scan(op, Some(axis), reverse, true)? } else { rule.output.clone() };
    let mut along = vec![1; x.rank()];
    along[axis as usize] = size as i64;
    let place = Array::arange(0.0, size as f64, 1.0, Dtype::I32)?.reshape(&along)?.broadcast_to(x.shape())?;
    let is_extreme = x.equal(&extreme)?;
    // The place of the latest extreme so far; outside before there is one (behind a NaN).
    let latest = if reverse {
        Array::select(&is_extreme, &place, size as i64)?.cummin(axis, true, true)?
    } else {
        Array::select(&is_extreme, &place, -1)?.cummax(axis, false, true)?
    };
    // Without the element itself, an output is the extreme of its neighbour.
    let ct = if exclusive {
        let none = ct.narrow(axis, 0, 1)?.zeros_like();
        let parts = if reverse {
            [none, ct.narrow(axis, 0, size - 1)?]
        } else {
            [ct.narrow(axis, 1, size)?, none]
        };
        Array::concatenate(&parts, axis)?
    } else {
        ct.clone()
    };
    let inside = latest.greater_equal(0)?.logical_and(latest.less(size as i64)?)?;
    let ct = Array::select(&inside, &ct, &ct.zeros_like())?;
    let op = Op::ScatterAddAlong { axis: axis as usize };
    let places = latest.clip(0, size as i64 - 1)?;
    rule.one(Array::lazy(op, smallvec![places, ct.clone()], x.shape(), ct.dtype()))
}

pub(crate) fn scan_jvp(
    op: ScanOp,
    axis: usize,
    reverse: bool,
    exclusive: bool,
    rule: &Jvp,
) -> Result<Tangents> {
    let (x, y) = (&rule.inputs[0], rule.output);
    let axis = axis as i32;
    rule.linear(0, |dx| match op {
        ScanOp::Sum => dx.cumsum(axis, reverse, !exclusive),
        ScanOp::LogSumExp => {
            // Σ over the elements that reach an output of dx · exp(x − y), for either sign of dx apart, in logarithms so
            // that nothing overflows.
            let none = Array::full(&[], f64::NEG_INFINITY, x.dtype());
            let part = |dx: &Array| -> Result<Array> {
                let log = Array::select(&dx.greater(0.0)?, &dx.log()?, &none)?.add(x)?;
                let sum = log.logcumsumexp(axis, reverse, !exclusive)?;
                Array::select(&sum.equal(&none)?, &none, sum.subtract(y)?)?.exp()
            };
            part(dx)?.subtract(part(&dx.negative()?)?)
        }
        // For elements that are not 0; the tangent behind one that is comes out as NaN.
        ScanOp::Prod => y.multiply(dx.divide(x)?.cumsum(axis, reverse, !exclusive)?),
        ScanOp::Max | ScanOp::Min => {
            Err(Error::unsupported(op.name(), "has no tangent (it has none in MLX either)"))
        }
    })
}
