//! Transcendental functions with one definition for every tier.
//!
//! Each function is a polynomial over [`Vector`] with fused multiply-adds in a fixed order, so
//! its bits are the same on every tier. The errors, in units in the last place against f64, are
//! asserted by the tests below over dense sweeps of the whole range:
//!
//! | function | largest error |
//! |---|---|
//! | `exp`, `log`, `sin`, `cos`, `erf` | 2 |
//! | `expm1`, `log1p`, `tanh`, `sigmoid`, `silu` | 3 |
//! | `gelu_tanh`, `gelu` | 5 of the result for x > -1; below that 2⁻²¹·abs(x) absolute |
//!
//! Infinities, NaN, signed zeros and subnormal results behave as in IEEE 754's recommended
//! operations. Polynomials are those of Cephes (S. Moshier) and, for `erf`, N. Juffa's.

use crate::{Isa, Kernel, LANES, Vector, dispatch};

/// ln 2 in two parts; the first has few bits, so that n · HI is exact.
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;

/// Σ coefficients[i] · x^(last - i), by Horner's rule.
#[inline(always)]
fn polynomial<V: Vector, const N: usize>(x: V, coefficients: [f32; N]) -> V {
    let mut y = V::splat(coefficients[0]);
    for i in 1..N {
        y = y.mul_add(x, V::splat(coefficients[i]));
    }
    y
}

/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and e^r - 1.
#[inline(always)]
fn exp_parts<V: Vector>(x: V) -> (V, V) {
    let n = (x * V::splat(std::f32::consts::LOG2_E)).round();
    let r = n.neg_mul_add(V::splat(LN2_LO), n.neg_mul_add(V::splat(LN2_HI), x));
    let p = polynomial(r, [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5]);
    (n, p.mul_add(r * r, r))
}

/// e^x.
#[inline(always)]
pub fn exp<V: Vector>(x: V) -> V {
    // Past the ends the result is 0 or infinity; this operand order lets NaN through.
    let x = V::splat(-105.0).max(V::splat(90.0).min(x));
    let (n, y) = exp_parts(x);
    (y + V::splat(1.0)).scale_exp2(n)
}

/// [`exp`] of numbers up to 0, but zero below 2⁻⁶⁴: the weights of a softmax. Beside a weight of 1 they are nothing, but
/// products with them could be subnormal, which some processors form many times slower.
#[inline(always)]
pub fn exp_to_one<V: Vector>(x: V) -> V {
    let (n, y) = exp_parts(x);
    V::select(x.lt(V::splat(EXP_TO_ONE_FROM)), V::zero(), (y + V::splat(1.0)).scale_exp2(n))
}

/// ln 2⁻⁶⁴.
const EXP_TO_ONE_FROM: f32 = -44.361_42;

/// e^x - 1, accurate near zero.
#[inline(always)]
pub fn expm1<V: Vector>(x: V) -> V {
    // At 88.8 the result is already infinite, and 2^127 (half of the scale) is not.
    let clamped = V::splat(-20.0).max(V::splat(88.8).min(x));
    let (n, y) = exp_parts(clamped);
    // Half of the result, doubled at the end, so that 2^128 is never formed.
    let half = V::splat(0.5).scale_exp2(n);
    let result = y.mul_add(half, half - V::splat(0.5));
    // Keeps -0 and subnormals, which the formula would round.
    V::select(x.abs().lt(V::splat(1e-10)), x, result + result)
}

/// Natural logarithm; -∞ for zeros, NaN below.
#[inline(always)]
pub fn log<V: Vector>(x: V) -> V {
    let tiny = x.lt(V::splat(f32::MIN_POSITIVE));
    let scaled = V::select(tiny, x * V::splat(8_388_608.0), x);
    // Exponent and mantissa with the mantissa in [√½, √2).
    let bits = V::int_sub(scaled.to_bits(), V::int_splat(0x3f35_04f3));
    let exponent = V::from_int(V::int_shr(bits, 23));
    let mantissa = V::int_add(V::int_and(bits, V::int_splat(0x007f_ffff)), V::int_splat(0x3f35_04f3));
    let e = exponent - V::select(tiny, V::splat(23.0), V::zero());
    let f = V::from_bits(mantissa) - V::splat(1.0);
    let z = f * f;
    let p = polynomial(
        f,
        [
            7.037_683_6e-2,
            -0.115_146_1,
            0.116_769_99,
            -0.124_201_41,
            0.142_493_23,
            -0.166_680_58,
            0.200_007_15,
            -0.249_999_94,
            0.333_333_3,
        ],
    );
    let y = e.mul_add(V::splat(LN2_LO), p * (f * z));
    let y = V::splat(-0.5).mul_add(z, y);
    let result = e.mul_add(V::splat(LN2_HI), f + y);
    let result = V::select(x.eq(V::splat(f32::INFINITY)), x, result);
    let result = V::select(x.eq(V::zero()), V::splat(f32::NEG_INFINITY), result);
    V::select(x.ge(V::zero()), result, V::splat(f32::NAN))
}

/// ln(1 + x), accurate near zero.
#[inline(always)]
pub fn log1p<V: Vector>(x: V) -> V {
    let one = V::splat(1.0);
    let u = one + x;
    // What rounding 1 + x lost, relative to u.
    let lost = (x - (u - one)) / u;
    let lost = V::select(x.abs().lt(V::splat(1e8)), lost, V::zero());
    let result = log(u) + lost;
    let result = V::select(x.eq(V::splat(-1.0)), V::splat(f32::NEG_INFINITY), result);
    V::select(x.abs().lt(V::splat(5e-8)), x, result)
}

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh<V: Vector>(x: V) -> V {
    let twice = x.abs() + x.abs();
    let e = expm1(V::splat(20.0).min(twice));
    let result = (e / (e + V::splat(2.0))).copy_sign(x);
    V::select(x.abs().lt(V::splat(1e-10)), x, result)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<V: Vector>(x: V) -> V {
    let e = exp(-x.abs());
    V::select(x.lt(V::zero()), e, V::splat(1.0)) / (V::splat(1.0) + e)
}

/// x · sigmoid(x), the activation of gated MLPs.
#[inline(always)]
pub fn silu<V: Vector>(x: V) -> V {
    x * sigmoid(x)
}

/// For |x| > 0.9277: ln(1 - erf |x|).
#[inline(always)]
fn log_erfc<V: Vector>(t: V) -> V {
    let s = t * t;
    let r = V::splat(-1.728_534_7e-5).mul_add(t, V::splat(3.831_971_3e-4));
    let u = V::splat(-3.883_964_4e-3).mul_add(t, V::splat(2.425_462_2e-2));
    let r = r.mul_add(s, u);
    let r = r.mul_add(t, V::splat(-0.106_777_88));
    let r = r.mul_add(t, V::splat(-0.634_846_7));
    let r = r.mul_add(t, V::splat(-0.128_717_51));
    r.mul_add(t, -t)
}

/// For |x| ≤ 0.9277: erf x.
#[inline(always)]
fn erf_middle<V: Vector>(x: V) -> V {
    let r = polynomial(
        x * x,
        [-5.967_617e-4, 4.991_194e-3, -2.676_813_5e-2, 0.112_819_925, -0.376_125_34, 0.128_379_17],
    );
    r.mul_add(x, x)
}

/// Where the two forms of erf meet.
const ERF_SPLIT: f32 = 0.927_734_4;

/// The error function.
#[inline(always)]
pub fn erf<V: Vector>(x: V) -> V {
    // Past 4 the result is one; the bound keeps the polynomial from turning round.
    let t = V::splat(4.0).min(x.abs());
    let outer = (V::splat(1.0) - exp(log_erfc(t))).copy_sign(x);
    V::select(t.gt(V::splat(ERF_SPLIT)), outer, erf_middle(x))
}

/// x · Φ(x) with the error function (the exact GELU).
#[inline(always)]
pub fn gelu<V: Vector>(x: V) -> V {
    let half = V::splat(0.5);
    let z = x * V::splat(std::f32::consts::FRAC_1_SQRT_2);
    let t = V::splat(10.0).min(z.abs());
    let tail = half * exp(log_erfc(t));
    let outer = V::select(x.lt(V::zero()), tail, V::splat(1.0) - tail);
    let middle = half.mul_add(erf_middle(z), half);
    let result = x * V::select(t.gt(V::splat(ERF_SPLIT)), outer, middle);
    // Past -14 the result is below the smallest f32; -∞ · 0 would be NaN.
    V::select(x.lt(V::splat(-14.0)), V::splat(-0.0), result)
}

/// GELU in the tanh form: x · sigmoid(2·√(2/π)·(x + 0.044715·x³)), which is the same thing.
#[inline(always)]
pub fn gelu_tanh<V: Vector>(x: V) -> V {
    let cubic = (x * x).mul_add(V::splat(0.044_715), V::splat(1.0)) * x;
    let result = x * sigmoid(cubic * V::splat(1.595_769));
    V::select(x.lt(V::splat(-14.0)), V::splat(-0.0), result)
}

/// Past this the three-part reduction of sine and cosine runs out of bits.
const TRIG_LIMIT: f32 = 30_000.0;

/// Sine and cosine.
#[inline(always)]
pub fn sin_cos<V: Vector>(x: V) -> (V, V) {
    let big = x.abs().gt(V::splat(TRIG_LIMIT));
    let small = V::select(big, V::zero(), x);
    let n = (small * V::splat(std::f32::consts::FRAC_2_PI)).round();
    let r = n.neg_mul_add(V::splat(std::f32::consts::FRAC_PI_2), small);
    let r = n.neg_mul_add(V::splat(-4.371_139e-8), r);
    let r = n.neg_mul_add(V::splat(-1.715_124_5e-15), r);
    let z = r * r;
    let s = polynomial(z, [-1.951_529_6e-4, 8.332_161e-3, -0.166_666_55]).mul_add(z * r, r);
    let c = polynomial(z, [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2]);
    let c = c.mul_add(z * z, V::splat(-0.5).mul_add(z, V::splat(1.0)));
    let quadrant = n.to_int();
    let swap = V::int_eq(V::int_and(quadrant, V::int_splat(1)), V::int_splat(1));
    let sin_sign = V::int_shl(V::int_and(quadrant, V::int_splat(2)), 30);
    let next = V::int_add(quadrant, V::int_splat(1));
    let cos_sign = V::int_shl(V::int_and(next, V::int_splat(2)), 30);
    let sin = V::from_bits(V::int_xor(V::select(swap, c, s).to_bits(), sin_sign));
    let cos = V::from_bits(V::int_xor(V::select(swap, s, c).to_bits(), cos_sign));
    // The reduction turns -0 into 0.
    let sin = V::select(x.eq(V::zero()), x, sin);
    if !V::any(big) {
        return (sin, cos);
    }
    let (mut sin, mut cos) = (sin.to_array(), cos.to_array());
    let bits = V::mask_bits(big);
    for (i, x) in x.to_array().into_iter().enumerate() {
        if bits >> i & 1 == 1 {
            let (s, c) = sin_cos_f64(x as f64);
            (sin[i], cos[i]) = (s as f32, c as f32);
        }
    }
    (V::from_array(sin), V::from_array(cos))
}

/// Sine.
#[inline(always)]
pub fn sin<V: Vector>(x: V) -> V {
    sin_cos(x).0
}

/// Cosine.
#[inline(always)]
pub fn cos<V: Vector>(x: V) -> V {
    sin_cos(x).1
}

/// Sine and cosine in f64 by the same operations on every platform, for angles as they occur in
/// position tables: the absolute error is below 1e-15 for |x| < 2³¹ and below 1e-9 for the rest
/// up to 1e18; beyond that (no position) the platform's own functions answer.
pub fn sin_cos_f64(x: f64) -> (f64, f64) {
    if x.is_nan() || x.is_infinite() || x.abs() > 1e18 {
        return x.sin_cos();
    }
    let n = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
    // π/2 in three parts of 53 bits each.
    let r = (-n).mul_add(std::f64::consts::FRAC_PI_2, x);
    let r = (-n).mul_add(6.123_233_995_736_766e-17, r);
    let r = (-n).mul_add(-1.497_384_904_859_169_8e-33, r);
    let z = r * r;
    // The kernels of fdlibm.
    let horner = |coefficients: [f64; 6]| coefficients.into_iter().reduce(|y, c| y.mul_add(z, c));
    let s = horner([
        1.589_690_995_211_55e-10,
        -2.505_076_025_340_686_3e-8,
        2.755_731_370_707_006_8e-6,
        -1.984_126_982_985_795e-4,
        8.333_333_333_322_49e-3,
        -1.666_666_666_666_663_2e-1,
    ])
    .expect("six coefficients");
    let c = horner([
        -1.135_964_755_778_819_5e-11,
        2.087_572_321_298_175e-9,
        -2.755_731_435_139_066_3e-7,
        2.480_158_728_947_673e-5,
        -1.388_888_888_887_411e-3,
        4.166_666_666_666_66e-2,
    ])
    .expect("six coefficients");
    let s = s.mul_add(z * r, r);
    let c = c.mul_add(z * z, (-0.5f64).mul_add(z, 1.0));
    match n.rem_euclid(4.0) as u8 {
        0 => (s, c),
        1 => (c, -s),
        2 => (-s, -c),
        _ => (-c, s),
    }
}

/// A function of one value, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // each is the function of its name above
pub enum Function {
    Exp,
    Expm1,
    Log,
    Log1p,
    Tanh,
    Sigmoid,
    Silu,
    Erf,
    Gelu,
    GeluTanh,
    Sin,
    Cos,
}

impl Function {
    /// All of them.
    pub const ALL: [Function; 12] = [
        Function::Exp,
        Function::Expm1,
        Function::Log,
        Function::Log1p,
        Function::Tanh,
        Function::Sigmoid,
        Function::Silu,
        Function::Erf,
        Function::Gelu,
        Function::GeluTanh,
        Function::Sin,
        Function::Cos,
    ];

    /// The function of one vector.
    #[inline(always)]
    pub fn of<V: Vector>(self, x: V) -> V {
        match self {
            Function::Exp => exp(x),
            Function::Expm1 => expm1(x),
            Function::Log => log(x),
            Function::Log1p => log1p(x),
            Function::Tanh => tanh(x),
            Function::Sigmoid => sigmoid(x),
            Function::Silu => silu(x),
            Function::Erf => erf(x),
            Function::Gelu => gelu(x),
            Function::GeluTanh => gelu_tanh(x),
            Function::Sin => sin(x),
            Function::Cos => cos(x),
        }
    }

    /// The function of one value: the same bits as in a slice.
    pub fn of_one(self, x: f32) -> f32 {
        let mut values = [x];
        self.of_slice(Isa::get(), &mut values);
        values[0]
    }

    /// Replaces each value by the function of it.
    pub fn of_slice(self, isa: Isa, values: &mut [f32]) {
        dispatch(isa, InPlace { function: self, values });
    }
}

struct InPlace<'a> {
    function: Function,
    values: &'a mut [f32],
}

impl Kernel for InPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        for part in self.values.chunks_mut(LANES) {
            self.function.of(V::from_slice(part, 0.0)).to_slice(part);
        }
    }
}

#[cfg(test)]
mod tests;
