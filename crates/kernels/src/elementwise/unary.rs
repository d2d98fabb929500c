//! Ops of one operand.

use mica_simd::Isa;

use super::lanes::{map1, narrow1};
use super::tile::TileOp;
use super::{complex, erf64, math};
use crate::dtype::Dtype;
use crate::element::Bool8;

macro_rules! ops {
    ($(#[$doc:meta])* $Enum:ident { $($(#[$op_doc:meta])* $op:ident $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)] // each is the function of its name, unless it says more
        pub enum $Enum { $($(#[$op_doc])* $op,)* }

        impl $Enum {
            /// All of them.
            pub const ALL: &'static [$Enum] = &[$($Enum::$op,)*];

            /// The name, as MLX spells it.
            pub const fn name(self) -> &'static str {
                match self { $($Enum::$op => $name,)* }
            }
        }
    };
}
pub(super) use ops;

ops! {
    /// An op of one operand. Floats take all but [`UnaryOp::BitwiseInvert`]; integers and bool
    /// take those that need no fractions.
    UnaryOp {
        Abs "abs",
        Neg "negative",
        /// -1, 0 or 1; 0 for NaN.
        Sign "sign",
        Floor "floor",
        Ceil "ceil",
        /// To the nearest integer, halves to even.
        Round "round",
        Sqrt "sqrt",
        Rsqrt "rsqrt",
        Square "square",
        Reciprocal "reciprocal",
        Exp "exp",
        Expm1 "expm1",
        Log "log",
        Log2 "log2",
        Log10 "log10",
        Log1p "log1p",
        Sin "sin",
        Cos "cos",
        Tan "tan",
        Arcsin "arcsin",
        Arccos "arccos",
        Arctan "arctan",
        Sinh "sinh",
        Cosh "cosh",
        Tanh "tanh",
        Arcsinh "arcsinh",
        Arccosh "arccosh",
        Arctanh "arctanh",
        Erf "erf",
        ErfInv "erfinv",
        Sigmoid "sigmoid",
        LogicalNot "logical_not",
        BitwiseInvert "bitwise_invert",
        /// x · sigmoid(x).
        Silu "silu",
        /// x · ½ (1 + erf(x / √2)).
        GeluErf "gelu",
        /// x · ½ (1 + tanh(√(2/π) (x + 0.044715 x³))).
        GeluTanh "gelu_tanh",
        /// log(1 + exp(x)), without overflow.
        Softplus "softplus",
    }
}

/// The op on dense arrays of `dtype` (a compute type), if there is one.
pub(crate) fn unary_op(isa: Isa, op: UnaryOp, dtype: Dtype) -> Option<Box<dyn TileOp>> {
    match dtype {
        Dtype::Bool => boolean(op),
        Dtype::U8 => unsigned_u8(op),
        Dtype::U16 => unsigned_u16(op),
        Dtype::U32 => unsigned_u32(op),
        Dtype::U64 => unsigned_u64(op),
        Dtype::I8 => signed_i8(op),
        Dtype::I16 => signed_i16(op),
        Dtype::I32 => signed_i32(op),
        Dtype::I64 => signed_i64(op),
        Dtype::F32 => float32(isa, op),
        Dtype::F64 => float64(op),
        Dtype::C64 => complex::unary_tile(op),
        Dtype::F16 | Dtype::BF16 => None,
    }
}

fn boolean(op: UnaryOp) -> Option<Box<dyn TileOp>> {
    use UnaryOp::*;
    Some(match op {
        Abs | Sign | Floor | Ceil | Round | Square => narrow1(|x: Bool8| x),
        LogicalNot | BitwiseInvert => narrow1(|x: Bool8| Bool8((x.0 == 0) as u8)),
        _ => return None,
    })
}

macro_rules! integers {
    ($($name:ident $t:ty, $abs:expr, $sign:expr;)*) => { $(
        fn $name(op: UnaryOp) -> Option<Box<dyn TileOp>> {
            use UnaryOp::*;
            Some(match op {
                Abs => narrow1::<$t, $t, _>($abs),
                Sign => narrow1::<$t, $t, _>($sign),
                Neg => narrow1(|x: $t| x.wrapping_neg()),
                Floor | Ceil | Round => narrow1(|x: $t| x),
                Square => narrow1(|x: $t| x.wrapping_mul(x)),
                BitwiseInvert => narrow1(|x: $t| !x),
                _ => return None,
            })
        }
    )* };
}
integers! {
    unsigned_u8 u8, |x| x, |x| (x != 0) as u8;
    unsigned_u16 u16, |x| x, |x| (x != 0) as u16;
    unsigned_u32 u32, |x| x, |x| (x != 0) as u32;
    unsigned_u64 u64, |x| x, |x| (x != 0) as u64;
    signed_i8 i8, |x| x.wrapping_abs(), |x| x.signum();
    signed_i16 i16, |x| x.wrapping_abs(), |x| x.signum();
    signed_i32 i32, |x| x.wrapping_abs(), |x| x.signum();
    signed_i64 i64, |x| x.wrapping_abs(), |x| x.signum();
}

/// `f32::signum` has no zero; MLX's sign has, and gives it for NaN too.
macro_rules! sign {
    ($x:expr) => {
        if $x < 0.0 {
            -1.0
        } else if $x > 0.0 {
            1.0
        } else {
            0.0
        }
    };
}

fn float32(isa: Isa, op: UnaryOp) -> Option<Box<dyn TileOp>> {
    use UnaryOp::*;
    Some(match op {
        Abs => map1(isa, |x: f32| x.abs()),
        Neg => map1(isa, |x: f32| -x),
        Sign => map1(isa, |x: f32| -> f32 { sign!(x) }),
        Floor => map1(isa, |x: f32| x.floor()),
        Ceil => map1(isa, |x: f32| x.ceil()),
        Round => map1(isa, |x: f32| x.round_ties_even()),
        Sqrt => map1(isa, |x: f32| x.sqrt()),
        Rsqrt => map1(isa, |x: f32| 1.0 / x.sqrt()),
        Square => map1(isa, |x: f32| x * x),
        Reciprocal => map1(isa, |x: f32| 1.0 / x),
        LogicalNot | BitwiseInvert => return None,
        _ => return math::unary(isa, op),
    })
}

fn float64(op: UnaryOp) -> Option<Box<dyn TileOp>> {
    use UnaryOp::*;
    Some(match op {
        Abs => narrow1(|x: f64| x.abs()),
        Neg => narrow1(|x: f64| -x),
        Sign => narrow1(|x: f64| -> f64 { sign!(x) }),
        Floor => narrow1(|x: f64| x.floor()),
        Ceil => narrow1(|x: f64| x.ceil()),
        Round => narrow1(|x: f64| x.round_ties_even()),
        Sqrt => narrow1(|x: f64| x.sqrt()),
        Rsqrt => narrow1(|x: f64| 1.0 / x.sqrt()),
        Square => narrow1(|x: f64| x * x),
        Reciprocal => narrow1(|x: f64| 1.0 / x),
        Exp => narrow1(|x: f64| x.exp()),
        Expm1 => narrow1(|x: f64| x.exp_m1()),
        Log => narrow1(|x: f64| x.ln()),
        Log2 => narrow1(|x: f64| x.log2()),
        Log10 => narrow1(|x: f64| x.log10()),
        Log1p => narrow1(|x: f64| x.ln_1p()),
        Sin => narrow1(|x: f64| x.sin()),
        Cos => narrow1(|x: f64| x.cos()),
        Tan => narrow1(|x: f64| x.tan()),
        Arcsin => narrow1(|x: f64| x.asin()),
        Arccos => narrow1(|x: f64| x.acos()),
        Arctan => narrow1(|x: f64| x.atan()),
        Sinh => narrow1(|x: f64| x.sinh()),
        Cosh => narrow1(|x: f64| x.cosh()),
        Tanh => narrow1(|x: f64| x.tanh()),
        Arcsinh => narrow1(|x: f64| x.asinh()),
        Arccosh => narrow1(|x: f64| x.acosh()),
        Arctanh => narrow1(|x: f64| x.atanh()),
        Erf => narrow1(erf64::erf),
        ErfInv => narrow1(erf64::erf_inv),
        Sigmoid => narrow1(sigmoid64),
        Silu => narrow1(|x: f64| x * sigmoid64(x)),
        GeluErf => narrow1(|x: f64| x * 0.5 * (1.0 + erf64::erf(x * std::f64::consts::FRAC_1_SQRT_2))),
        GeluTanh => narrow1(|x: f64| {
            let inner = 0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x);
            x * 0.5 * (1.0 + inner.tanh())
        }),
        Softplus => narrow1(|x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p()),
        LogicalNot | BitwiseInvert => return None,
    })
}

fn sigmoid64(x: f64) -> f64 {
    let y = 1.0 / (1.0 + x.abs().exp());
    if x < 0.0 { y } else { 1.0 - y }
}
