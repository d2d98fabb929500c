//! The f32 functions that need a polynomial.

use mica_simd::Isa;

use super::binary::{maximum, minimum};
use super::lanes::{narrow1, narrow2};
use super::tile::TileOp;
use super::{BinaryOp, UnaryOp, erf64};

pub(super) fn unary(_isa: Isa, op: UnaryOp) -> Option<Box<dyn TileOp>> {
    use UnaryOp::*;
    Some(match op {
        Exp => narrow1(|x: f32| x.exp()),
        Expm1 => narrow1(|x: f32| x.exp_m1()),
        Log => narrow1(|x: f32| x.ln()),
        Log2 => narrow1(|x: f32| x.log2()),
        Log10 => narrow1(|x: f32| x.log10()),
        Log1p => narrow1(|x: f32| x.ln_1p()),
        Sin => narrow1(|x: f32| x.sin()),
        Cos => narrow1(|x: f32| x.cos()),
        Tan => narrow1(|x: f32| x.tan()),
        Arcsin => narrow1(|x: f32| x.asin()),
        Arccos => narrow1(|x: f32| x.acos()),
        Arctan => narrow1(|x: f32| x.atan()),
        Sinh => narrow1(|x: f32| x.sinh()),
        Cosh => narrow1(|x: f32| x.cosh()),
        Tanh => narrow1(|x: f32| x.tanh()),
        Arcsinh => narrow1(|x: f32| x.asinh()),
        Arccosh => narrow1(|x: f32| x.acosh()),
        Arctanh => narrow1(|x: f32| x.atanh()),
        Erf => narrow1(|x: f32| erf64::erf(x as f64) as f32),
        ErfInv => narrow1(|x: f32| erf64::erf_inv(x as f64) as f32),
        Sigmoid => narrow1(sigmoid),
        Silu => narrow1(|x: f32| x * sigmoid(x)),
        GeluErf => narrow1(|x: f32| {
            let half = 0.5 * (1.0 + erf64::erf(x as f64 * std::f64::consts::FRAC_1_SQRT_2));
            (x as f64 * half) as f32
        }),
        GeluTanh => narrow1(|x: f32| {
            let inner = 0.797_884_6 * (x + 0.044715 * x * x * x);
            x * 0.5 * (1.0 + inner.tanh())
        }),
        Softplus => narrow1(|x: f32| maximum(x, 0.0) + (-x.abs()).exp().ln_1p()),
        _ => return None,
    })
}

pub(super) fn binary(_isa: Isa, op: BinaryOp) -> Option<Box<dyn TileOp>> {
    Some(match op {
        BinaryOp::Power => narrow2(|a: f32, b: f32| a.powf(b)),
        BinaryOp::Atan2 => narrow2(|a: f32, b: f32| a.atan2(b)),
        BinaryOp::LogAddExp => narrow2(|a: f32, b: f32| {
            let (high, low) = (maximum(a, b), minimum(a, b));
            if low == f32::NEG_INFINITY || high == f32::INFINITY {
                return high;
            }
            high + (low - high).exp().ln_1p()
        }),
        _ => return None,
    })
}

fn sigmoid(x: f32) -> f32 {
    let y = 1.0 / (1.0 + x.abs().exp());
    if x < 0.0 { y } else { 1.0 - y }
}
