//! Diagonals and triangles.

use smallvec::smallvec;

use crate::op::{Op, first_failure};
use crate::shape::normalize_axis;
use crate::{Array, Dtype, Error, Result};

/// Whether an element is at or below diagonal `k`, as bools.
fn lower(rows: usize, columns: usize, k: i64) -> Result<Array> {
    let row = Array::arange(0.0, rows as f64, 1.0, Dtype::I64)?.expand_dims(&[1])?;
    let column = Array::arange(0.0, columns as f64, 1.0, Dtype::I64)?;
    row.add(k)?.greater_equal(column)
}

impl Array {
    /// Ones on diagonal `k` of a matrix (above the main one if positive), zeros elsewhere.
    pub fn eye(rows: usize, columns: impl Into<Option<usize>>, k: i64, dtype: Dtype) -> Result<Array> {
        let columns = columns.into().unwrap_or(rows);
        let row = Array::arange(0.0, rows as f64, 1.0, Dtype::I64)?.expand_dims(&[1])?;
        row.add(k)?.equal(Array::arange(0.0, columns as f64, 1.0, Dtype::I64)?)?.astype(dtype)
    }

    /// The square matrix with ones on its diagonal.
    pub fn identity(size: usize, dtype: Dtype) -> Result<Array> {
        Array::eye(size, None, 0, dtype)
    }

    /// Ones at and below diagonal `k` of a matrix, zeros above.
    pub fn tri(rows: usize, columns: impl Into<Option<usize>>, k: i64, dtype: Dtype) -> Result<Array> {
        lower(rows, columns.into().unwrap_or(rows), k)?.astype(dtype)
    }

    /// The elements at and below diagonal `k` of the last two dimensions, zeros above.
    pub fn tril(&self, k: i64) -> Result<Array> {
        let [rows, columns] = self.matrix("tril")?;
        Array::select(&lower(rows, columns, k)?, self, self.zero())
    }

    /// The elements at and above diagonal `k` of the last two dimensions, zeros below.
    pub fn triu(&self, k: i64) -> Result<Array> {
        let [rows, columns] = self.matrix("triu")?;
        Array::select(&lower(rows, columns, k - 1)?, &self.zero(), self)
    }

    fn zero(&self) -> Array {
        Array::zeros(&[], self.dtype())
    }

    fn matrix(&self, name: &'static str) -> Result<[usize; 2]> {
        first_failure(&[self])?;
        match self.shape() {
            [.., rows, columns] => Ok([*rows, *columns]),
            shape => Err(Error::invalid(name, format!("needs two dimensions, got shape {shape:?}"))),
        }
    }

    /// Diagonal `offset` of two dimensions, which disappear; it is the last dimension of the result.
    pub fn diagonal(&self, offset: i64, axis1: i32, axis2: i32) -> Result<Array> {
        const NAME: &str = "diagonal";
        let first = normalize_axis(NAME, axis1, self.rank())?;
        let second = normalize_axis(NAME, axis2, self.rank())?;
        if first == second {
            return Err(Error::invalid(NAME, format!("needs two different axes, got {axis1} and {axis2}")));
        }
        let mut order: Vec<i32> = (0..self.rank())
            .filter(|&axis| axis != first && axis != second)
            .map(|axis| axis as i32)
            .collect();
        order.extend([first as i32, second as i32]);
        let matrix = self.transpose(&order)?;
        let (rows, columns) = (self.shape()[first], self.shape()[second]);
        let (down, right) = ((-offset).max(0) as usize, offset.max(0) as usize);
        let count = rows.saturating_sub(down).min(columns.saturating_sub(right));
        // In a row-major matrix the diagonal's elements are columns + 1 apart.
        let flat = matrix.flatten_axes(-2, -1)?;
        let axis = flat.rank() - 1;
        let (mut start, mut counts, mut step) =
            (vec![0; flat.rank()], flat.shape().to_vec(), vec![1isize; flat.rank()]);
        (start[axis], counts[axis]) = (if count == 0 { 0 } else { down * columns + right }, count);
        step[axis] = columns as isize + 1;
        flat.window(&start, &counts, &step)
    }

    /// Diagonal `k` of a matrix, or a square matrix with this array of one dimension on it.
    pub fn diag(&self, k: i64) -> Result<Array> {
        match self.rank() {
            2 => self.diagonal(k, 0, 1),
            1 => {
                let size = self.size().saturating_add(k.unsigned_abs() as usize);
                let flat = Array::zeros(&[size, size], self.dtype()).flatten()?;
                let start = if k >= 0 { k as usize } else { k.unsigned_abs() as usize * size };
                let op = Op::SliceUpdate { start: smallvec![start], step: smallvec![size as isize + 1] };
                if self.size() == 0 {
                    return flat.reshape(&[size as i64, size as i64]);
                }
                let inputs = smallvec![flat.clone(), self.clone()];
                Array::lazy(op, inputs, flat.shape(), self.dtype()).reshape(&[size as i64, size as i64])
            }
            _ => Err(Error::invalid(
                "diag",
                format!("needs an array of one or two dimensions, got shape {:?}", self.shape()),
            )),
        }
    }

    /// The sum of a diagonal, in `dtype` if one is given.
    pub fn trace(
        &self,
        offset: i64,
        axis1: i32,
        axis2: i32,
        dtype: impl Into<Option<Dtype>>,
    ) -> Result<Array> {
        let diagonal = self.diagonal(offset, axis1, axis2)?;
        match dtype.into() {
            Some(dtype) => diagonal.astype(dtype)?.sum(&[-1], false)?.astype(dtype),
            None => diagonal.sum(&[-1], false),
        }
    }
}
