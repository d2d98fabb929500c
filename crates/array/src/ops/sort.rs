//! Sorting, and what is made of it.

use smallvec::smallvec;

use super::{Grads, Jvp, Tangents, Vjp};
use crate::op::{CompareOp, Op, SortOrder, first_failure};
use crate::shape::normalize_axis;
use crate::{Array, Dtype, Error, Result, Shape, promote};

/// Where [`Array::searchsorted`] puts a value among equal ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Side {
    /// Before them.
    #[default]
    Left,
    /// After them.
    Right,
}

/// What [`Array::unique`] finds.
#[derive(Clone, Debug)]
pub struct Unique {
    /// The values, ascending.
    pub values: Array,
    /// Where each stands first in the flattened array: u32.
    pub index: Array,
    /// For each element of the array the place of its value in `values`: u32, of the array's shape.
    pub inverse: Array,
    /// How often each stands in the array: i32.
    pub counts: Array,
}

impl Array {
    /// The values along an axis in ascending order, NaN last; of the flattened array without an
    /// axis.
    pub fn sort(&self, axis: impl Into<Option<i32>>) -> Result<Array> {
        self.in_order("sort", axis.into(), false, None)
    }

    /// The places along an axis of the values in ascending order: u32; equal values keep their
    /// order.
    pub fn argsort(&self, axis: impl Into<Option<i32>>) -> Result<Array> {
        self.in_order("argsort", axis.into(), true, None)
    }

    /// The value that sorting would put at place `kth` (from the end if negative) is there; what would come
    /// before it is before it and the rest after it, both in their original order.
    pub fn partition(&self, kth: i64, axis: impl Into<Option<i32>>) -> Result<Array> {
        self.in_order("partition", axis.into(), false, Some(kth))
    }

    /// The places of the values that [`Array::partition`] gives: u32.
    pub fn argpartition(&self, kth: i64, axis: impl Into<Option<i32>>) -> Result<Array> {
        self.in_order("argpartition", axis.into(), true, Some(kth))
    }

    fn in_order(
        &self,
        name: &'static str,
        axis: Option<i32>,
        places: bool,
        kth: Option<i64>,
    ) -> Result<Array> {
        first_failure(&[self])?;
        let Some(axis) = axis else {
            return self.flatten()?.in_order(name, Some(0), places, kth);
        };
        let axis = normalize_axis(name, axis, self.rank())?;
        let size = self.shape()[axis];
        let order = match kth {
            None => SortOrder::Full,
            Some(kth) => {
                let at = if kth < 0 { kth + size as i64 } else { kth };
                if at < 0 || at >= size as i64 {
                    return Err(Error::invalid(
                        name,
                        format!("place {kth} is not on axis {axis} of {:?}", self.shape()),
                    ));
                }
                SortOrder::Partition(at as usize)
            }
        };
        let (op, dtype) = match places {
            true => (Op::ArgSort { axis, order }, Dtype::U32),
            false => (Op::Sort { axis, order }, self.dtype()),
        };
        Ok(Array::lazy(op, smallvec![self.clone()], self.shape(), dtype))
    }

    /// The `k` largest values along an axis (of the flattened array without one), in no promised
    /// order.
    pub fn topk(&self, k: usize, axis: impl Into<Option<i32>>) -> Result<Array> {
        let Some(axis) = axis.into() else {
            return self.flatten()?.topk(k, 0);
        };
        let at = normalize_axis("topk", axis, self.rank())?;
        let size = self.shape()[at];
        if k > size {
            return Err(Error::invalid(
                "topk",
                format!("k = {k} of axis {axis} with {size} elements: take at most {size}"),
            ));
        }
        if k == 0 || k == size {
            return self.narrow(axis, size - k, size);
        }
        self.partition((size - k) as i64, axis)?.narrow(axis, size - k, size)
    }

    /// How many elements of this sorted one-dimensional array each value is greater than (with
    /// [`Side::Right`]: not less than): u32, of the values' shape.
    pub fn searchsorted(&self, values: &Array, side: Side) -> Result<Array> {
        first_failure(&[self, values])?;
        if self.rank() != 1 {
            return Err(Error::invalid(
                "searchsorted",
                format!("the sorted sequence must have one dimension, got shape {:?}", self.shape()),
            ));
        }
        let dtype = promote(self.dtype(), values.dtype());
        let (sorted, values) = (self.astype(dtype)?, values.astype(dtype)?);
        let size = self.size();
        let mut low = Array::zeros(values.shape(), Dtype::U32);
        if size == 0 {
            return Ok(low);
        }
        // Invariant: the answer is in low ..= low + width. NaN counts as larger than all else.
        let mut width = size;
        let is_nan = |x: &Array| x.compare(CompareOp::Ne, x);
        let nan = if dtype.is_inexact() { Some(is_nan(&values)?) } else { None };
        while width > 0 {
            let half = width.div_ceil(2);
            let probe = low.add(half - 1)?;
            // Past the end nothing is smaller.
            let inside = probe.less(size)?;
            let at = sorted.take(&probe.minimum(size - 1)?, 0)?;
            let mut goes = match side {
                Side::Left => at.less(&values)?,
                Side::Right => at.less_equal(&values)?,
            };
            if let Some(nan) = &nan {
                let below = match side {
                    Side::Left => is_nan(&at)?.logical_not()?,
                    Side::Right => Array::scalar(crate::Scalar::Bool(true), Dtype::Bool),
                };
                goes = goes.logical_or(nan.logical_and(below)?)?;
            }
            let goes = goes.logical_and(inside)?.astype(Dtype::U32)?;
            low = low.add(goes.multiply(half)?)?;
            width -= half;
        }
        Ok(low)
    }

    /// The distinct values of the flattened array, ascending, cut or filled up to `size` so that
    /// the result's shape does not depend on the values. What is filled up holds `fill`, or the
    /// smallest value, and counts 0.
    pub fn unique(&self, size: usize, fill: Option<&Array>) -> Result<Unique> {
        first_failure(&[self])?;
        let flat = self.flatten()?;
        let count = flat.size();
        if count == 0 {
            return Err(Error::invalid("unique", "an empty array has no values to begin with"));
        }
        let order = flat.argsort(0)?;
        let sorted = flat.take(&order, 0)?;
        // Whether a sorted element is the first of its value; NaN differs from NaN.
        let first = Array::concatenate(
            &[
                Array::full(&[1], 1.0, Dtype::Bool),
                sorted.narrow(0, 1, count)?.not_equal(sorted.narrow(0, 0, count - 1)?)?,
            ],
            0,
        )?;
        let group = first.astype(Dtype::U32)?.cumsum(0, false, true)?.subtract(1)?;
        // Where each group begins; places that no group claims stay at 0, and those past `size` go
        // to one place more, which is cut off.
        let clipped = group.minimum(size)?;
        let places = Array::arange(0.0, count as f64, 1.0, Dtype::U32)?;
        let end = Array::full(&[size + 1], count as f64, Dtype::U32);
        let begins = end.scatter(crate::op::ScatterOp::Min, &[&clipped], &[0], &places.expand_dims(&[1])?)?;
        let begins = begins.narrow(0, 0, size)?;
        let empty = begins.equal(count)?;
        let begins = Array::select(&empty, &begins.zeros_like(), &begins)?;
        let values = sorted.take(&begins, 0)?;
        let index = order.take(&begins, 0)?;
        let values = match fill {
            Some(fill) => Array::select(&empty, &fill.astype(self.dtype())?, &values)?,
            None => values,
        };
        let ones = Array::ones(&[count], Dtype::I32);
        let counts = Array::scatter_add(&ones, &clipped, 0, size + 1)?.narrow(0, 0, size)?;
        let inverse = group.minimum(size.max(1) - 1)?;
        let back = Array::zeros(&[count], Dtype::U32).put_along_axis(&order, &inverse, 0)?;
        let inverse = back.reshape(&self.shape().iter().map(|&size| size as i64).collect::<Vec<_>>())?;
        Ok(Unique { values, index, inverse, counts })
    }

    /// The middle of the sorted values over the axes (all if none are named); the mean of the two
    /// middle ones if their number is even. Integers become f32.
    pub fn median(&self, axes: &[i32], keepdims: bool) -> Result<Array> {
        let list = crate::shape::normalize_axes("median", axes, self.rank())?;
        let dtype = if self.dtype().is_inexact() { self.dtype() } else { Dtype::F32 };
        let kept: Vec<usize> = (0..self.rank()).filter(|axis| !list.contains(axis)).collect();
        let order: Vec<i32> = kept.iter().chain(&list).map(|&axis| axis as i32).collect();
        let count: usize = list.iter().map(|&axis| self.shape()[axis]).product();
        if count == 0 {
            return Err(Error::invalid("median", format!("of no elements: shape {:?}", self.shape())));
        }
        let mut shape: Vec<i64> = kept.iter().map(|&axis| self.shape()[axis] as i64).collect();
        shape.push(count as i64);
        let sorted = self.transpose(&order)?.reshape(&shape)?.sort(-1)?;
        let half = count / 2;
        let middle = if count.is_multiple_of(2) {
            let below = sorted.narrow(-1, half - 1, half)?.astype(dtype)?;
            below.add(sorted.narrow(-1, half, half + 1)?)?.multiply(0.5)?
        } else {
            sorted.narrow(-1, half, half + 1)?.astype(dtype)?
        };
        // NaN is sorted last.
        let last = sorted.narrow(-1, count - 1, count)?.astype(dtype)?;
        let middle = if dtype.is_float() { Array::select(&last.isnan()?, &last, middle)? } else { middle };
        let shape: Shape = if keepdims {
            let sizes = self.shape().iter().enumerate();
            sizes.map(|(axis, &size)| if list.contains(&axis) { 1 } else { size }).collect()
        } else {
            kept.iter().map(|&axis| self.shape()[axis]).collect()
        };
        middle.reshape(&shape.iter().map(|&size| size as i64).collect::<Vec<_>>())
    }
}

pub(crate) fn sort_vjp(axis: usize, order: SortOrder, rule: &Vjp) -> Result<Grads> {
    let (x, ct) = (&rule.inputs[0], rule.cotangent());
    let places = Array::lazy(Op::ArgSort { axis, order }, smallvec![x.clone()], x.shape(), Dtype::U32);
    let op = Op::ScatterAddAlong { axis };
    rule.one(Array::lazy(op, smallvec![places, ct.clone()], x.shape(), ct.dtype()))
}

pub(crate) fn sort_jvp(axis: usize, order: SortOrder, rule: &Jvp) -> Result<Tangents> {
    let x = &rule.inputs[0];
    rule.linear(0, |tangent| {
        let places = Array::lazy(Op::ArgSort { axis, order }, smallvec![x.clone()], x.shape(), Dtype::U32);
        tangent.take_along_axis(&places, axis as i32)
    })
}
