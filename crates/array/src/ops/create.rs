//! Constants and ranges.

use smallvec::SmallVec;

use crate::op::{Op, Scalar};
use crate::{Array, Dtype, Error, Result};

impl Array {
    /// A number as an array without dimensions.
    pub fn scalar(value: Scalar, dtype: Dtype) -> Array {
        Array::lazy(Op::Full(value), SmallVec::new(), &[][..], dtype)
    }

    /// The same number everywhere.
    pub fn full(shape: &[usize], value: f64, dtype: Dtype) -> Array {
        Array::lazy(Op::Full(Scalar::Float(value)), SmallVec::new(), shape, dtype)
    }

    /// Zeros.
    pub fn zeros(shape: &[usize], dtype: Dtype) -> Array {
        Array::full(shape, 0.0, dtype)
    }

    /// Ones.
    pub fn ones(shape: &[usize], dtype: Dtype) -> Array {
        Array::full(shape, 1.0, dtype)
    }

    /// Zeros of this array's shape and dtype.
    pub fn zeros_like(&self) -> Array {
        Array::zeros(self.shape(), self.dtype())
    }

    /// Ones of this array's shape and dtype.
    pub fn ones_like(&self) -> Array {
        Array::ones(self.shape(), self.dtype())
    }

    /// start, start + step, … below `stop` (above it for a negative step).
    pub fn arange(start: f64, stop: f64, step: f64, dtype: Dtype) -> Result<Array> {
        if step == 0.0 || !start.is_finite() || !stop.is_finite() || !step.is_finite() {
            return Err(Error::invalid(
                "arange",
                format!("needs finite numbers and a step, got {start}, {stop}, {step}"),
            ));
        }
        if dtype == Dtype::C64 {
            return Array::arange(start, stop, step, Dtype::F32)?.astype(dtype);
        }
        let count = ((stop - start) / step).ceil().max(0.0);
        if count > (1u64 << 40) as f64 {
            return Err(Error::invalid("arange", format!("{count} elements are too many")));
        }
        Ok(Array::lazy(Op::Arange { start, step }, SmallVec::new(), &[count as usize][..], dtype))
    }
}
