//! Questions about values (finite? close? equal?) and elementwise functions made of others.

use super::elementwise::{Operand, binary_methods, unary_methods};
use crate::dtype::promote;
use crate::op::{BinaryOp, UnaryOp, first_failure};
use crate::{Array, Dtype, Error, Result, Scalar};

fn never(like: &Array) -> Array {
    Array::full(like.shape(), 0.0, Dtype::Bool)
}

impl Array {
    /// Whether a value is not a number.
    pub fn isnan(&self) -> Result<Array> {
        if self.dtype().is_inexact() { self.not_equal(self) } else { Ok(never(self)) }
    }

    /// Whether a value is infinite, of either sign; a complex one in either part.
    pub fn isinf(&self) -> Result<Array> {
        match self.dtype() {
            Dtype::C64 => self.real()?.isinf()?.logical_or(self.imag()?.isinf()?),
            dtype if dtype.is_float() => self.abs()?.equal(f64::INFINITY),
            _ => Ok(never(self)),
        }
    }

    /// Whether a value is +∞.
    pub fn isposinf(&self) -> Result<Array> {
        if self.dtype().is_inexact() { self.equal(f64::INFINITY) } else { Ok(never(self)) }
    }

    /// Whether a value is −∞.
    pub fn isneginf(&self) -> Result<Array> {
        if self.dtype().is_inexact() { self.equal(f64::NEG_INFINITY) } else { Ok(never(self)) }
    }

    /// Whether a value is neither infinite nor not a number.
    pub fn isfinite(&self) -> Result<Array> {
        self.isinf()?.logical_or(self.isnan()?)?.logical_not()
    }

    /// Whether |a − b| ≤ atol + rtol · |b|. Equal infinities are close; NaNs are, if `equal_nan`.
    pub fn isclose(&self, other: &Array, rtol: f64, atol: f64, equal_nan: bool) -> Result<Array> {
        let distance = self.subtract(other)?.abs()?;
        let near = distance.less_equal(other.abs()?.multiply(rtol)?.add(atol)?)?;
        let infinite = self.isinf()?.logical_or(other.isinf()?)?;
        let up = self.isposinf()?.logical_and(other.isposinf()?)?;
        let down = self.isneginf()?.logical_and(other.isneginf()?)?;
        let near = Array::select(&infinite, &up.logical_or(down)?, &near)?;
        if equal_nan { near.logical_or(self.isnan()?.logical_and(other.isnan()?)?) } else { Ok(near) }
    }

    /// Whether all values are close, as [`Array::isclose`].
    pub fn allclose(&self, other: &Array, rtol: f64, atol: f64, equal_nan: bool) -> Result<Array> {
        self.isclose(other, rtol, atol, equal_nan)?.all(&[], false)
    }

    /// Whether shapes and all values are equal; NaNs are, if `equal_nan`.
    pub fn array_equal(&self, other: &Array, equal_nan: bool) -> Result<Array> {
        first_failure(&[self, other])?;
        if self.shape() != other.shape() {
            return Ok(Array::scalar(Scalar::Bool(false), Dtype::Bool));
        }
        let dtype = promote(self.dtype(), other.dtype());
        let (a, b) = (self.astype(dtype)?, other.astype(dtype)?);
        let mut equal = a.equal(&b)?;
        if equal_nan && dtype.is_inexact() {
            equal = equal.logical_or(a.isnan()?.logical_and(b.isnan()?)?)?;
        }
        equal.all(&[], false)
    }

    /// Each value, or the nearer bound if it is outside of them. For one bound alone there are
    /// [`Array::maximum`] and [`Array::minimum`].
    pub fn clip(&self, low: impl Operand, high: impl Operand) -> Result<Array> {
        self.maximum(low)?.minimum(high)
    }

    /// NaN replaced by `nan`, infinities by `posinf` and `neginf`, or by the largest and smallest
    /// finite numbers.
    pub fn nan_to_num(&self, nan: f64, posinf: Option<f64>, neginf: Option<f64>) -> Result<Array> {
        let dtype = self.dtype();
        if dtype == Dtype::C64 {
            return Err(Error::dtype("nan_to_num", "real numbers", dtype));
        }
        if !dtype.is_float() {
            return Ok(self.clone());
        }
        let most = crate::dtype_info::finfo(dtype)?.max;
        let y = Array::select(&self.isnan()?, &Array::full(&[], nan, dtype), self)?;
        let y = Array::select(&self.isposinf()?, &Array::full(&[], posinf.unwrap_or(most), dtype), &y)?;
        Array::select(&self.isneginf()?, &Array::full(&[], neginf.unwrap_or(-most), dtype), &y)
    }

    /// Rounded to so many decimals (tens, hundreds … if negative), halves to even.
    pub fn round_to(&self, decimals: i32) -> Result<Array> {
        if decimals == 0 {
            return self.round();
        }
        let scale = 10f64.powi(decimals.abs());
        let dtype = if self.dtype().is_inexact() { self.dtype() } else { Dtype::F32 };
        let x = self.astype(dtype)?;
        let rounded = match decimals > 0 {
            true => x.multiply(scale)?.round()?.divide(scale)?,
            false => x.divide(scale)?.round()?.multiply(scale)?,
        };
        rounded.astype(self.dtype())
    }

    /// Without its fraction: the nearest integer towards zero.
    pub fn trunc(&self) -> Result<Array> {
        match self.dtype() {
            Dtype::C64 => Err(Error::dtype("trunc", "real numbers", Dtype::C64)),
            dtype if dtype.is_float() => Array::select(&self.less(0.0)?, &self.ceil()?, self.floor()?),
            _ => Ok(self.clone()),
        }
    }

    /// The array itself.
    pub fn positive(&self) -> Result<Array> {
        first_failure(&[self])?;
        Ok(self.clone())
    }

    /// Radians as degrees.
    pub fn degrees(&self) -> Result<Array> {
        self.multiply(180.0 / std::f64::consts::PI)
    }

    /// Degrees as radians.
    pub fn radians(&self) -> Result<Array> {
        self.multiply(std::f64::consts::PI / 180.0)
    }

    /// ⌊a / b⌋ and what remains.
    pub fn divmod(&self, divisor: impl Operand) -> Result<(Array, Array)> {
        let divisor = divisor.operand(self.dtype());
        Ok((self.floor_divide(&divisor)?, self.remainder(&divisor)?))
    }

    /// a or b, but not both.
    pub fn logical_xor(&self, rhs: impl Operand) -> Result<Array> {
        let rhs = rhs.operand(self.dtype());
        self.astype(Dtype::Bool)?.not_equal(rhs.astype(Dtype::Bool)?)
    }
}

unary_methods! {
    /// Tangent.
    tan => Tan;
    /// Inverse of the sine.
    arcsin => Arcsin;
    /// Inverse of the cosine.
    arccos => Arccos;
    /// Inverse of the tangent.
    arctan => Arctan;
    /// Hyperbolic sine.
    sinh => Sinh;
    /// Hyperbolic cosine.
    cosh => Cosh;
    /// Inverse of the hyperbolic sine.
    arcsinh => Arcsinh;
    /// Inverse of the hyperbolic cosine.
    arccosh => Arccosh;
    /// Inverse of the hyperbolic tangent.
    arctanh => Arctanh;
    /// Inverse of the error function.
    erfinv => ErfInv;
    /// All bits changed; of a bool, not x.
    bitwise_invert => BitwiseInvert;
}

binary_methods! {
    /// The angle of the point (b, a): the arctangent of a / b in the right quadrant.
    arctan2 => Atan2;
    /// Bits that are set in both.
    bitwise_and => BitwiseAnd;
    /// Bits that are set in either.
    bitwise_or => BitwiseOr;
    /// Bits that are set in one.
    bitwise_xor => BitwiseXor;
    /// Bits moved up.
    left_shift => LeftShift;
    /// Bits moved down; the sign stays.
    right_shift => RightShift;
}
