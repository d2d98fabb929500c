//! Arrays with a part replaced or updated: what assigning to `x[…]` and `x.at[…].add(…)` are in
//! Python. The array itself never changes; the result is a new one.

use smallvec::smallvec;

use super::elementwise::Operand;
use super::select::{Index, Selection};
use crate::op::{BinaryOp, Op, ScatterOp, first_failure};
use crate::shape::{Shape, broadcast_shapes};
use crate::{Array, Dtype, Error, Result};

/// A part of an array that is to be updated: [`Array::at`].
#[derive(Debug)]
pub struct At<'a> {
    array: &'a Array,
    indices: &'a [Index],
}

impl Array {
    /// The part of the array that an index selects, for updating it: `x.at(&[0.into()]).add(1.0)`.
    /// Places that an index names several times are updated several times.
    pub fn at<'a>(&'a self, indices: &'a [Index]) -> At<'a> {
        At { array: self, indices }
    }

    /// The array with the values where `mask` is true replaced. The mask covers the leading
    /// dimensions. Values of the shape of the other dimensions go everywhere; those with one
    /// dimension more are taken one after another for the places that are true, in row-major
    /// order. (Too few of them are an error when it is computed.)
    pub fn masked_update(&self, mask: &Array, values: impl Operand) -> Result<Array> {
        const NAME: &str = "masked_update";
        let values = values.operand(self.dtype());
        first_failure(&[self, mask, &values])?;
        if mask.dtype() != Dtype::Bool {
            return Err(Error::dtype(NAME, "a bool mask", mask.dtype()));
        }
        if mask.rank() > self.rank() || mask.shape() != &self.shape()[..mask.rank()] {
            return Err(Error::invalid(
                NAME,
                format!(
                    "a mask of {:?} does not cover the first dimensions of {:?}",
                    mask.shape(),
                    self.shape()
                ),
            ));
        }
        let values = values.astype(self.dtype())?;
        let mut rest: Shape = self.shape()[mask.rank()..].into();
        let missing: Vec<i32> = (mask.rank()..self.rank()).map(|axis| axis as i32).collect();
        let wide = if missing.is_empty() { mask.clone() } else { mask.expand_dims(&missing)? };
        if values.rank() <= rest.len() {
            return Array::select(&wide, &values.broadcast_to(&rest)?, self);
        }
        let count = values.shape()[0];
        if values.rank() != rest.len() + 1 || count == 0 {
            return Err(Error::shapes(NAME, &rest, &values.shape().into()));
        }
        rest.insert(0, count);
        let values = values.broadcast_to(&rest)?;
        // The n-th true place gets the n-th value.
        let places = mask.flatten()?;
        let chosen = match count {
            1 => Array::zeros(&[places.size()], Dtype::I64),
            _ => {
                let nth = places.astype(Dtype::I64)?.cumsum(0, false, false)?;
                Array::select(&places, &nth, 0)?
            }
        };
        let sizes: Vec<i64> = self.shape().iter().map(|&size| size as i64).collect();
        Array::select(&wide, &values.take(&chosen, 0)?.reshape(&sizes)?, self)
    }

    /// This array with the window at `start` with these steps replaced by `update`.
    fn stepped_update(&self, update: &Array, start: &[usize], step: &[isize]) -> Array {
        let op = Op::SliceUpdate { start: start.into(), step: step.into() };
        Array::lazy(op, smallvec![self.clone(), update.clone()], self.shape(), self.dtype())
    }
}

impl At<'_> {
    /// The array with the part replaced; `values` broadcast to its shape.
    pub fn set(&self, values: impl Operand) -> Result<Array> {
        self.update(ScatterOp::Set, None, values.operand(self.array.dtype()))
    }

    /// The array with values added to the part.
    pub fn add(&self, values: impl Operand) -> Result<Array> {
        self.update(ScatterOp::Add, Some(BinaryOp::Add), values.operand(self.array.dtype()))
    }

    /// The array with values subtracted from the part.
    pub fn subtract(&self, values: impl Operand) -> Result<Array> {
        let values = values.operand(self.array.dtype()).astype(self.array.dtype())?;
        self.update(ScatterOp::Add, Some(BinaryOp::Add), values.negative()?)
    }

    /// The array with the part multiplied.
    pub fn multiply(&self, values: impl Operand) -> Result<Array> {
        self.update(ScatterOp::Prod, Some(BinaryOp::Multiply), values.operand(self.array.dtype()))
    }

    /// The array with the part divided: multiplied with reciprocals.
    pub fn divide(&self, values: impl Operand) -> Result<Array> {
        let values = values.operand(self.array.dtype()).reciprocal()?;
        self.update(ScatterOp::Prod, Some(BinaryOp::Multiply), values)
    }

    /// The array with the larger of values and part in the part's place.
    pub fn maximum(&self, values: impl Operand) -> Result<Array> {
        self.update(ScatterOp::Max, Some(BinaryOp::Maximum), values.operand(self.array.dtype()))
    }

    /// The array with the smaller of values and part in the part's place.
    pub fn minimum(&self, values: impl Operand) -> Result<Array> {
        self.update(ScatterOp::Min, Some(BinaryOp::Minimum), values.operand(self.array.dtype()))
    }

    /// Without index arrays the part is a window and `join` does it; with them it is a scatter.
    fn update(&self, op: ScatterOp, join: Option<BinaryOp>, values: Array) -> Result<Array> {
        const NAME: &str = "at";
        let x = self.array;
        first_failure(&[x, &values])?;
        let selection = Selection::new(NAME, x.shape(), self.indices)?;
        let shape = selection.shape();
        let mut values = values.astype(x.dtype())?;
        // Leading dimensions of size one beyond the part's are dropped, as MLX does.
        if values.rank() > shape.len() {
            let more = values.rank() - shape.len();
            let ones: Vec<i32> = (0..more as i32).collect();
            values =
                values.squeeze(&ones).map_err(|_| Error::shapes(NAME, &shape, &values.shape().into()))?;
        }
        if broadcast_shapes(NAME, values.shape(), &shape)? != shape {
            return Err(Error::shapes(NAME, &shape, &values.shape().into()));
        }
        let updates = selection.as_updates(&values.broadcast_to(&shape)?)?;
        let dense: Vec<i64> = selection.dense_shape().iter().map(|&size| size as i64).collect();
        let count: Vec<i64> = selection.count.iter().map(|&size| size as i64).collect();
        let window = || x.window(&selection.start, &selection.count, &selection.step)?.reshape(&dense);
        let new = match (selection.arrays.is_empty(), join) {
            (true, None) => updates,
            (true, Some(join)) => window()?.binary(join, &updates)?,
            (false, _) => {
                let axes: Vec<usize> = selection.arrays.iter().map(|&(axis, _)| axis).collect();
                let indices: Vec<&Array> = selection.arrays.iter().map(|(_, array)| array).collect();
                window()?.scatter(op, &indices, &axes, &updates)?
            }
        };
        let new = new.reshape(&count)?;
        if selection.is_whole(x.shape()) {
            return Ok(new);
        }
        Ok(x.stepped_update(&new, &selection.start, &selection.step))
    }
}
