//! Ops of two operands of one type.

use half::bf16;
use mica_simd::Isa;

use super::lanes::{map2, narrow2};
use super::tile::TileOp;
use super::unary::ops;
use super::{complex, math};
use crate::dtype::Dtype;
use crate::element::{Bool8, CastTo, round_bf16};

ops! {
    /// An op of two operands of one type. Integers wrap; shifts take the count modulo 32 (64 for
    /// 64-bit types); an integer divided by 0 is 0, its remainder the dividend.
    BinaryOp {
        Add "add",
        Subtract "subtract",
        Multiply "multiply",
        /// Integers truncate towards zero.
        Divide "divide",
        /// Integers with a negative exponent give 0.
        Power "power",
        /// Has the sign of the divisor.
        Remainder "remainder",
        /// Rounds down.
        FloorDivide "floor_divide",
        /// NaN if either is.
        Maximum "maximum",
        /// NaN if either is.
        Minimum "minimum",
        Atan2 "arctan2",
        LogAddExp "logaddexp",
        BitwiseAnd "bitwise_and",
        BitwiseOr "bitwise_or",
        BitwiseXor "bitwise_xor",
        LeftShift "left_shift",
        RightShift "right_shift",
        LogicalAnd "logical_and",
        LogicalOr "logical_or",
    }
}

impl BinaryOp {
    /// Takes operands as bool and gives bool.
    pub const fn is_logical(self) -> bool {
        matches!(self, BinaryOp::LogicalAnd | BinaryOp::LogicalOr)
    }
}

/// The op on dense arrays of `dtype` (a compute type), if there is one.
pub(crate) fn binary_op(isa: Isa, op: BinaryOp, dtype: Dtype) -> Option<Box<dyn TileOp>> {
    match dtype {
        Dtype::Bool => boolean(op),
        Dtype::U8 => integer_u8(op),
        Dtype::U16 => integer_u16(op),
        Dtype::U32 => integer_u32(op),
        Dtype::U64 => integer_u64(op),
        Dtype::I8 => integer_i8(op),
        Dtype::I16 => integer_i16(op),
        Dtype::I32 => integer_i32(op),
        Dtype::I64 => integer_i64(op),
        Dtype::F32 => float32(isa, op),
        Dtype::F64 => float64(op),
        Dtype::C64 => complex::binary_tile(op),
        Dtype::F16 | Dtype::BF16 => None,
    }
}

/// What C's promotion of bool to int and back gives.
fn boolean(op: BinaryOp) -> Option<Box<dyn TileOp>> {
    use BinaryOp::*;
    fn op2(f: impl Fn(bool, bool) -> bool + Send + Sync + 'static) -> Option<Box<dyn TileOp>> {
        Some(narrow2(move |a: Bool8, b: Bool8| Bool8(f(a.0 != 0, b.0 != 0) as u8)))
    }
    match op {
        Add | Maximum | BitwiseOr | LogicalOr => op2(|a, b| a | b),
        Multiply | Divide | FloorDivide | Minimum | BitwiseAnd | LogicalAnd => op2(|a, b| a & b),
        Subtract | BitwiseXor => op2(|a, b| a ^ b),
        Power => op2(|a, b| a | !b),
        Remainder => op2(|a, b| a & !b),
        Atan2 | LogAddExp | LeftShift | RightShift => None,
    }
}

macro_rules! integers {
    ($($name:ident $t:ty, $wide:ty, $signed:expr;)*) => { $(
        fn $name(op: BinaryOp) -> Option<Box<dyn TileOp>> {
            use BinaryOp::*;
            Some(match op {
                Add => narrow2(|a: $t, b: $t| a.wrapping_add(b)),
                Subtract => narrow2(|a: $t, b: $t| a.wrapping_sub(b)),
                Multiply => narrow2(|a: $t, b: $t| a.wrapping_mul(b)),
                Divide => narrow2(|a: $t, b: $t| if b == 0 { 0 } else { a.wrapping_div(b) }),
                Power => narrow2(|base: $t, exponent: $t| {
                    let (mut base, mut exponent, mut result) = (base, exponent, 1 as $t);
                    #[allow(unused_comparisons)] // of unsigned types
                    if exponent < 0 {
                        return 0;
                    }
                    while exponent != 0 {
                        if exponent & 1 != 0 {
                            result = result.wrapping_mul(base);
                        }
                        exponent >>= 1;
                        base = base.wrapping_mul(base);
                    }
                    result
                }),
                Remainder => narrow2(|a: $t, b: $t| {
                    if b == 0 {
                        return a;
                    }
                    let r = a.wrapping_rem(b);
                    #[allow(unused_comparisons)]
                    if $signed && r != 0 && ((r < 0) != (b < 0)) { r.wrapping_add(b) } else { r }
                }),
                FloorDivide => narrow2(|a: $t, b: $t| {
                    if b == 0 {
                        return 0;
                    }
                    let q = a.wrapping_div(b);
                    #[allow(unused_comparisons)]
                    let down = $signed && a.wrapping_rem(b) != 0 && ((a < 0) != (b < 0));
                    if down { q.wrapping_sub(1) } else { q }
                }),
                Maximum => narrow2(|a: $t, b: $t| a.max(b)),
                Minimum => narrow2(|a: $t, b: $t| a.min(b)),
                BitwiseAnd => narrow2(|a: $t, b: $t| a & b),
                BitwiseOr => narrow2(|a: $t, b: $t| a | b),
                BitwiseXor => narrow2(|a: $t, b: $t| a ^ b),
                // Narrow types shift as the C int they are promoted to.
                LeftShift => narrow2(|a: $t, b: $t| (a as $wide).wrapping_shl(b as u32) as $t),
                RightShift => narrow2(|a: $t, b: $t| (a as $wide).wrapping_shr(b as u32) as $t),
                Atan2 | LogAddExp | LogicalAnd | LogicalOr => return None,
            })
        }
    )* };
}
integers! {
    integer_u8 u8, i32, false;
    integer_u16 u16, i32, false;
    integer_u32 u32, u32, false;
    integer_u64 u64, u64, false;
    integer_i8 i8, i32, true;
    integer_i16 i16, i32, true;
    integer_i32 i32, i32, true;
    integer_i64 i64, i64, true;
}

macro_rules! remainder {
    ($a:expr, $b:expr) => {{
        let r = $a % $b;
        if r != 0.0 && ((r < 0.0) != ($b < 0.0)) { r + $b } else { r }
    }};
}

fn float32(isa: Isa, op: BinaryOp) -> Option<Box<dyn TileOp>> {
    use BinaryOp::*;
    Some(match op {
        Add => map2(isa, |a: f32, b: f32| a + b),
        Subtract => map2(isa, |a: f32, b: f32| a - b),
        Multiply => map2(isa, |a: f32, b: f32| a * b),
        Divide => map2(isa, |a: f32, b: f32| a / b),
        Remainder => narrow2(|a: f32, b: f32| remainder!(a, b)),
        FloorDivide => map2(isa, |a: f32, b: f32| (a / b).floor()),
        Maximum => map2(isa, maximum),
        Minimum => map2(isa, minimum),
        Power | Atan2 | LogAddExp => return math::binary(isa, op),
        _ => return None,
    })
}

/// Arithmetic on bf16 in memory, without passes of its own that widen and round; the same bits as in f32 and rounded.
pub(super) fn bfloat16(isa: Isa, op: BinaryOp) -> Option<Box<dyn TileOp>> {
    fn make(isa: Isa, f: impl Fn(f32, f32) -> f32 + Send + Sync + 'static) -> Option<Box<dyn TileOp>> {
        Some(map2(isa, move |a: bf16, b: bf16| round_bf16(f(a.cast(), b.cast()))))
    }
    match op {
        BinaryOp::Add => make(isa, |a, b| a + b),
        BinaryOp::Subtract => make(isa, |a, b| a - b),
        BinaryOp::Multiply => make(isa, |a, b| a * b),
        BinaryOp::Divide => make(isa, |a, b| a / b),
        _ => None,
    }
}

/// The larger; NaN if either is; of two zeros the second.
#[inline(always)]
pub(crate) fn maximum(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}

/// The smaller; NaN if either is; of two zeros the second.
#[inline(always)]
pub(crate) fn minimum(a: f32, b: f32) -> f32 {
    if a.is_nan() || a < b { a } else { b }
}

fn float64(op: BinaryOp) -> Option<Box<dyn TileOp>> {
    use BinaryOp::*;
    Some(match op {
        Add => narrow2(|a: f64, b: f64| a + b),
        Subtract => narrow2(|a: f64, b: f64| a - b),
        Multiply => narrow2(|a: f64, b: f64| a * b),
        Divide => narrow2(|a: f64, b: f64| a / b),
        Power => narrow2(|a: f64, b: f64| a.powf(b)),
        Remainder => narrow2(|a: f64, b: f64| remainder!(a, b)),
        FloorDivide => narrow2(|a: f64, b: f64| (a / b).floor()),
        Maximum => narrow2(|a: f64, b: f64| if a.is_nan() || a > b { a } else { b }),
        Minimum => narrow2(|a: f64, b: f64| if a.is_nan() || a < b { a } else { b }),
        Atan2 => narrow2(|a: f64, b: f64| a.atan2(b)),
        LogAddExp => narrow2(|a: f64, b: f64| {
            let (high, low) = if a.is_nan() || a > b { (a, b) } else { (b, a) };
            if low == f64::NEG_INFINITY || high == f64::INFINITY {
                return high;
            }
            high + (low - high).exp().ln_1p()
        }),
        _ => return None,
    })
}
