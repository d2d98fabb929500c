//! Facts about dtypes: their limits, their kinds, what casts into what.

use crate::dtype::promote;
use crate::{Array, Dtype, Error, Result};

/// A kind of dtypes: the categories of MLX's `issubdtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtypeCategory {
    /// All.
    Generic,
    /// All but bool.
    Number,
    /// Integers of either kind.
    Integer,
    /// Signed integers.
    SignedInteger,
    /// Unsigned integers.
    UnsignedInteger,
    /// Real and complex floats.
    Inexact,
    /// Real floats.
    Floating,
    /// Complex floats.
    ComplexFloating,
}

impl DtypeCategory {
    /// Whether a dtype is of this kind (`issubdtype`).
    pub fn contains(self, dtype: Dtype) -> bool {
        match self {
            DtypeCategory::Generic => true,
            DtypeCategory::Number => dtype != Dtype::Bool,
            DtypeCategory::Integer => dtype.is_integer(),
            DtypeCategory::SignedInteger => dtype.is_signed_integer(),
            DtypeCategory::UnsignedInteger => dtype.is_integer() && !dtype.is_signed_integer(),
            DtypeCategory::Inexact => dtype.is_inexact(),
            DtypeCategory::Floating => dtype.is_float(),
            DtypeCategory::ComplexFloating => dtype == Dtype::C64,
        }
    }

    /// The kind that `isdtype` of the array API standard calls by this name.
    pub fn from_name(kind: &str) -> Option<DtypeCategory> {
        Some(match kind {
            "signed integer" => DtypeCategory::SignedInteger,
            "unsigned integer" => DtypeCategory::UnsignedInteger,
            "integral" => DtypeCategory::Integer,
            "real floating" => DtypeCategory::Floating,
            "complex floating" => DtypeCategory::ComplexFloating,
            "numeric" => DtypeCategory::Number,
            _ => return None,
        })
    }
}

/// The dtype that promoting all of these gives; `None` of none.
pub fn result_type(dtypes: impl IntoIterator<Item = Dtype>) -> Option<Dtype> {
    dtypes.into_iter().reduce(promote)
}

/// Whether promoting `from` together with `to` gives `to`.
pub fn can_cast(from: Dtype, to: Dtype) -> bool {
    promote(from, to) == to
}

/// Limits of a float dtype.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FloatInfo {
    /// The dtype.
    pub dtype: Dtype,
    /// Bits of a number.
    pub bits: usize,
    /// Smallest finite number.
    pub min: f64,
    /// Largest finite number.
    pub max: f64,
    /// Distance from 1 to the next larger number.
    pub eps: f64,
    /// Smallest positive number of full precision.
    pub smallest_normal: f64,
}

/// Limits of an integer dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntegerInfo {
    /// The dtype.
    pub dtype: Dtype,
    /// Smallest number.
    pub min: i128,
    /// Largest number.
    pub max: i128,
}

/// Limits of a float dtype; of complex64 those of its parts.
pub fn finfo(dtype: Dtype) -> Result<FloatInfo> {
    let (of, bits, max, digits, lowest) = match dtype {
        Dtype::F16 => (Dtype::F16, 16, 65504.0, 10, -14),
        Dtype::BF16 => (Dtype::BF16, 16, half::bf16::MAX.to_f64(), 7, -126),
        Dtype::F32 | Dtype::C64 => (Dtype::F32, 32, f32::MAX as f64, 23, -126),
        Dtype::F64 => (Dtype::F64, 64, f64::MAX, 52, -1022),
        _ => return Err(Error::dtype("finfo", "a float dtype", dtype)),
    };
    Ok(FloatInfo {
        dtype: of,
        bits,
        min: -max,
        max,
        eps: 2f64.powi(-digits),
        smallest_normal: 2f64.powi(lowest),
    })
}

/// Limits of an integer dtype.
pub fn iinfo(dtype: Dtype) -> Result<IntegerInfo> {
    if !dtype.is_integer() {
        return Err(Error::dtype("iinfo", "an integer dtype", dtype));
    }
    let bits = 8 * dtype.size() as u32;
    let (min, max) = match dtype.is_signed_integer() {
        true => (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1),
        false => (0, (1i128 << bits) - 1),
    };
    Ok(IntegerInfo { dtype, min, max })
}

impl Array {
    /// Bytes of an element.
    pub fn itemsize(&self) -> usize {
        self.dtype().size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_mlx() {
        for (dtype, max, eps, smallest) in [
            (Dtype::F16, 65504.0, 0.0009765625, 6.103515625e-05),
            (Dtype::BF16, 3.3895313892515355e38, 0.0078125, 1.1754943508222875e-38),
            (Dtype::F32, 3.4028234663852886e38, 1.1920928955078125e-07, 1.1754943508222875e-38),
            (Dtype::F64, f64::MAX, f64::EPSILON, f64::MIN_POSITIVE),
        ] {
            let info = finfo(dtype).unwrap();
            assert_eq!((info.max, info.min, info.eps), (max, -max, eps), "{dtype}");
            assert_eq!(info.smallest_normal, smallest, "{dtype}");
        }
        assert_eq!(iinfo(Dtype::I8).unwrap().min, -128);
        assert_eq!(iinfo(Dtype::U64).unwrap().max, u64::MAX as i128);
        assert!(finfo(Dtype::I32).is_err() && iinfo(Dtype::Bool).is_err());
        assert!(can_cast(Dtype::I32, Dtype::F16) && !can_cast(Dtype::U8, Dtype::I8));
        assert_eq!(result_type([Dtype::I8, Dtype::U8, Dtype::F16]), Some(Dtype::F16));
    }
}
