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
        ScanOp::Prod if x.shape()[axis as usize] == 0 => rule.one(ct.clone()),
        ScanOp::Prod => {
            // What comes before an element, times the sum over the outputs that it reaches of ct
            // times what lies between: no division, so zeros are like any element.
            let before = x.cumprod(axis, reverse, false)?;
            let seen = if exclusive { moved(ct, axis, 1, reverse)? } else { ct.clone() };
            let sums = recurrence(moved(x, axis, 1, reverse)?, seen, axis, reverse)?;
            rule.one(before.multiply(sums)?)
        }
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
    let ct = if exclusive { moved(ct, axis, 1, reverse)? } else { ct.clone() };
    let inside = latest.greater_equal(0)?.logical_and(latest.less(size as i64)?)?;
    let ct = Array::select(&inside, &ct, ct.zeros_like())?;
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
        ScanOp::Prod if x.shape()[axis as usize] == 0 => Ok(dx.clone()),
        ScanOp::Prod => {
            let before = x.cumprod(axis, reverse, false)?;
            let tangent = recurrence(x.clone(), dx.multiply(before)?, axis, !reverse)?;
            if exclusive { moved(&tangent, axis, 1, !reverse) } else { Ok(tangent) }
        }
        ScanOp::Max | ScanOp::Min => {
            Err(Error::unsupported(op.name(), "has no tangent (it has none in MLX either)"))
        }
    })
}

/// Element i + `by` at place i, and zeros at the end; `backward`: i − `by`, and zeros at the start.
fn moved(x: &Array, axis: i32, by: usize, backward: bool) -> Result<Array> {
    let n = x.dim(axis);
    let mut gap: Vec<usize> = x.shape().to_vec();
    gap[axis as usize] = by;
    let zeros = Array::zeros(&gap, x.dtype());
    match backward {
        false => Array::concatenate(&[x.narrow(axis, by, n)?, zeros], axis),
        true => Array::concatenate(&[zeros, x.narrow(axis, 0, n - by)?], axis),
    }
}

/// s with sᵢ = cᵢ + aᵢ · sᵢ₊₁ and nothing behind the end; `backward`: sᵢ₋₁, and nothing before the
/// start. In steps that double how far each element sees.
fn recurrence(mut a: Array, mut c: Array, axis: i32, backward: bool) -> Result<Array> {
    let n = a.dim(axis);
    let mut by = 1;
    while by < n {
        c = c.add(a.multiply(moved(&c, axis, by, backward)?)?)?;
        a = a.multiply(moved(&a, axis, by, backward)?)?;
        by *= 2;
    }
    Ok(c)
}
