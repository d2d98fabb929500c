//! Comparisons: two operands of one type, bool out.

use mica_simd::Isa;

use super::complex;
use super::lanes::{map2, narrow2};
use super::tile::TileOp;
use super::unary::ops;
use crate::dtype::Dtype;
use crate::element::Bool8;

ops! {
    /// A comparison.
    CompareOp {
        Eq "equal",
        Ne "not_equal",
        Lt "less",
        Le "less_equal",
        Gt "greater",
        Ge "greater_equal",
    }
}

/// The op on dense arrays of `dtype` (a compute type), if there is one.
pub(crate) fn compare_op(isa: Isa, op: CompareOp, dtype: Dtype) -> Option<Box<dyn TileOp>> {
    use CompareOp::*;
    macro_rules! narrow {
        ($t:ty) => {
            match op {
                Eq => narrow2(|a: $t, b: $t| Bool8::from(a == b)),
                Ne => narrow2(|a: $t, b: $t| Bool8::from(a != b)),
                Lt => narrow2(|a: $t, b: $t| Bool8::from(a < b)),
                Le => narrow2(|a: $t, b: $t| Bool8::from(a <= b)),
                Gt => narrow2(|a: $t, b: $t| Bool8::from(a > b)),
                Ge => narrow2(|a: $t, b: $t| Bool8::from(a >= b)),
            }
        };
    }
    Some(match dtype {
        Dtype::Bool | Dtype::U8 => narrow!(u8),
        Dtype::U16 => narrow!(u16),
        Dtype::U32 => narrow!(u32),
        Dtype::U64 => narrow!(u64),
        Dtype::I8 => narrow!(i8),
        Dtype::I16 => narrow!(i16),
        Dtype::I32 => narrow!(i32),
        Dtype::I64 => narrow!(i64),
        Dtype::F64 => narrow!(f64),
        Dtype::F32 => match op {
            Eq => map2(isa, |a: f32, b: f32| Bool8::from(a == b)),
            Ne => map2(isa, |a: f32, b: f32| Bool8::from(a != b)),
            Lt => map2(isa, |a: f32, b: f32| Bool8::from(a < b)),
            Le => map2(isa, |a: f32, b: f32| Bool8::from(a <= b)),
            Gt => map2(isa, |a: f32, b: f32| Bool8::from(a > b)),
            Ge => map2(isa, |a: f32, b: f32| Bool8::from(a >= b)),
        },
        Dtype::C64 => complex::compare_tile(op),
        Dtype::F16 | Dtype::BF16 => return None,
    })
}
