//! The f32 functions that need a polynomial.
//!
//! The common ones run on sixteen lanes with `simd::math`. The rare ones compute in f64 with the
//! platform's functions and round, which costs time but is right to the last place or the one
//! beside it, and the same everywhere but for a rare tie.

use std::marker::PhantomData;

use mica_simd::{Isa, Kernel, LANES, Vector, dispatch, math};

use super::lanes::{narrow1, narrow2};
use super::tile::TileOp;
use super::{BinaryOp, UnaryOp};

/// A function of vectors.
trait Function1: Send + Sync + 'static {
    fn of<V: Vector>(x: V) -> V;
}

/// A function of two vectors.
trait Function2: Send + Sync + 'static {
    fn of<V: Vector>(x: V, y: V) -> V;
}

macro_rules! functions {
    ($($name:ident = $f:path;)*) => { $(
        struct $name;
        impl Function1 for $name {
            #[inline(always)]
            fn of<V: Vector>(x: V) -> V {
                $f(x)
            }
        }
    )* };
}
functions! {
    Exp = math::exp;
    Expm1 = math::expm1;
    Log = math::log;
    Log1p = math::log1p;
    Sin = math::sin;
    Cos = math::cos;
    Tanh = math::tanh;
    Erf = math::erf;
    ErfInv = erf_inv;
    Sigmoid = math::sigmoid;
    Silu = math::silu;
    Gelu = math::gelu;
    GeluTanh = math::gelu_tanh;
    Softplus = softplus;
}

struct LogAddExp;
impl Function2 for LogAddExp {
    #[inline(always)]
    fn of<V: Vector>(x: V, y: V) -> V {
        log_add_exp(x, y)
    }
}

pub(super) fn unary(isa: Isa, op: UnaryOp) -> Option<Box<dyn TileOp>> {
    fn vector<F: Function1>(isa: Isa) -> Option<Box<dyn TileOp>> {
        Some(Box::new(Map1 { isa, function: PhantomData::<F> }))
    }
    fn exact(f: fn(f64) -> f64) -> Option<Box<dyn TileOp>> {
        Some(narrow1(move |x: f32| f(x as f64) as f32))
    }
    match op {
        UnaryOp::Exp => vector::<Exp>(isa),
        UnaryOp::Expm1 => vector::<Expm1>(isa),
        UnaryOp::Log => vector::<Log>(isa),
        UnaryOp::Log1p => vector::<Log1p>(isa),
        UnaryOp::Sin => vector::<Sin>(isa),
        UnaryOp::Cos => vector::<Cos>(isa),
        UnaryOp::Tanh => vector::<Tanh>(isa),
        UnaryOp::Erf => vector::<Erf>(isa),
        UnaryOp::ErfInv => vector::<ErfInv>(isa),
        UnaryOp::Sigmoid => vector::<Sigmoid>(isa),
        UnaryOp::Silu => vector::<Silu>(isa),
        UnaryOp::GeluErf => vector::<Gelu>(isa),
        UnaryOp::GeluTanh => vector::<GeluTanh>(isa),
        UnaryOp::Softplus => vector::<Softplus>(isa),
        UnaryOp::Log2 => exact(f64::log2),
        UnaryOp::Log10 => exact(f64::log10),
        UnaryOp::Tan => exact(f64::tan),
        UnaryOp::Arcsin => exact(f64::asin),
        UnaryOp::Arccos => exact(f64::acos),
        UnaryOp::Arctan => exact(f64::atan),
        UnaryOp::Sinh => exact(f64::sinh),
        UnaryOp::Cosh => exact(f64::cosh),
        UnaryOp::Arcsinh => exact(f64::asinh),
        UnaryOp::Arccosh => exact(f64::acosh),
        UnaryOp::Arctanh => exact(f64::atanh),
        _ => None,
    }
}

pub(super) fn binary(isa: Isa, op: BinaryOp) -> Option<Box<dyn TileOp>> {
    match op {
        BinaryOp::LogAddExp => Some(Box::new(Map2 { isa, function: PhantomData::<LogAddExp> })),
        BinaryOp::Power => Some(narrow2(|a: f32, b: f32| (a as f64).powf(b as f64) as f32)),
        BinaryOp::Atan2 => Some(narrow2(|a: f32, b: f32| (a as f64).atan2(b as f64) as f32)),
        _ => None,
    }
}

/// log(eˣ + eʸ), without overflow; MLX's edges.
#[inline(always)]
fn log_add_exp<V: Vector>(x: V, y: V) -> V {
    let high = V::select(V::mask_or(x.is_nan(), x.gt(y)), x, y);
    let low = V::select(V::mask_or(x.is_nan(), x.lt(y)), x, y);
    let one_sided = V::mask_or(low.eq(V::splat(f32::NEG_INFINITY)), high.eq(V::splat(f32::INFINITY)));
    V::select(one_sided, high, high + math::log1p(math::exp(low - high)))
}

/// log(1 + eˣ).
#[inline(always)]
fn softplus<V: Vector>(x: V) -> V {
    log_add_exp(x, V::zero())
}

/// The inverse of the error function: N. Juffa's polynomials in log(1 - x²), as MLX; the error
/// is at most 3 units in the last place beside that of the logarithm. ±∞ at ±1, NaN outside.
#[inline(always)]
fn erf_inv<V: Vector>(x: V) -> V {
    let t = math::log(x.neg_mul_add(x, V::splat(1.0)));
    let tail = horner(
        t,
        [
            3.036_975_7e-10,
            2.932_431e-8,
            1.221_503_3e-6,
            2.841_089_5e-5,
            3.935_529_7e-4,
            3.026_988_1e-3,
            4.831_858e-3,
            -2.646_461_4e-1,
            8.400_165e-1,
        ],
    );
    let middle = horner(
        t,
        [
            5.438_778_3e-9,
            1.432_860_6e-7,
            1.227_754e-6,
            1.129_626_3e-7,
            -5.615_319_6e-5,
            -1.476_977e-4,
            2.314_687e-3,
            1.153_925_6e-2,
            -2.320_154_8e-1,
            8.862_269e-1,
        ],
    );
    x * V::select(t.abs().gt(V::splat(6.125)), tail, middle)
}

#[inline(always)]
fn horner<V: Vector, const N: usize>(x: V, coefficients: [f32; N]) -> V {
    let mut y = V::splat(coefficients[0]);
    for i in 1..N {
        y = y.mul_add(x, V::splat(coefficients[i]));
    }
    y
}

struct Map1<F> {
    isa: Isa,
    function: PhantomData<F>,
}

struct Map2<F> {
    isa: Isa,
    function: PhantomData<F>,
}

struct Loop1<F> {
    a: *const f32,
    out: *mut f32,
    count: usize,
    function: PhantomData<F>,
}

struct Loop2<F> {
    a: *const f32,
    b: *const f32,
    out: *mut f32,
    count: usize,
    function: PhantomData<F>,
}

impl<F: Function1> TileOp for Map1<F> {
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize) {
        let (a, out) = (inputs[0].cast(), output.cast());
        dispatch(self.isa, Loop1 { a, out, count, function: self.function });
    }
}

impl<F: Function2> TileOp for Map2<F> {
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize) {
        let (a, b, out) = (inputs[0].cast(), inputs[1].cast(), output.cast());
        dispatch(self.isa, Loop2 { a, b, out, count, function: self.function });
    }
}

impl<F: Function1> Kernel for Loop1<F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        for at in (0..self.count).step_by(LANES) {
            let left = self.count - at;
            // SAFETY: `left` elements from `at` are inside both arrays (TileOp's promise).
            unsafe {
                if left >= LANES {
                    F::of(V::load(self.a.add(at))).store(self.out.add(at));
                } else {
                    F::of(V::load_part(self.a.add(at), left, 0.0)).store_part(self.out.add(at), left);
                }
            }
        }
    }
}

impl<F: Function2> Kernel for Loop2<F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        for at in (0..self.count).step_by(LANES) {
            let left = self.count - at;
            // SAFETY: `left` elements from `at` are inside all arrays (TileOp's promise).
            unsafe {
                let x = V::load_part(self.a.add(at), left, 0.0);
                let y = V::load_part(self.b.add(at), left, 0.0);
                F::of(x, y).store_part(self.out.add(at), left);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::erf64;
    use super::*;
    use crate::dtype::Dtype;
    use crate::elementwise::{unary::unary_op, unary_on};
    use crate::testing::{Laid, Layout};

    /// The same function in f64, and the units in the last place that f32 may be off.
    fn reference(op: UnaryOp) -> Option<f64> {
        Some(match op {
            UnaryOp::Exp | UnaryOp::Log | UnaryOp::Sin | UnaryOp::Cos | UnaryOp::Erf => 2.0,
            UnaryOp::Expm1 | UnaryOp::Log1p | UnaryOp::Tanh | UnaryOp::Sigmoid | UnaryOp::Silu => 3.0,
            // Two functions one after the other, or a formula in f32.
            UnaryOp::Softplus | UnaryOp::ErfInv | UnaryOp::Rsqrt => 6.0,
            UnaryOp::LogicalNot | UnaryOp::BitwiseInvert => return None,
            // The tail has an absolute bound instead, see simd::math; below it is cut off.
            UnaryOp::GeluErf | UnaryOp::GeluTanh => 6.0,
            _ => 1.0,
        })
    }

    #[test]
    fn all_functions_agree_with_f64_and_between_tiers() {
        let mut points: Vec<f32> = (-400..=400).map(|i| i as f32 * 0.0725).collect();
        points.extend((-60..=60).map(|i| 2f32.powi(i / 2) * if i % 2 == 0 { 1.0 } else { -1.0 }));
        points.extend((-99..=99).map(|i| i as f32 / 100.0));
        points.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.999999, -0.9999999]);
        let values: Vec<f64> = points.iter().map(|&x| x as f64).collect();
        for &op in UnaryOp::ALL {
            let Some(units) = reference(op) else { continue };
            let exact = unary_op(Isa::Scalar, op, Dtype::F64).expect("f64 has them all");
            let mut expected = vec![0f64; values.len()];
            // SAFETY: both arrays have the length given.
            unsafe { exact.run(&[values.as_ptr().cast()], expected.as_mut_ptr().cast(), values.len()) };
            let mut first: Option<Vec<f64>> = None;
            for &isa in Isa::available() {
                let a = Laid::contiguous(Dtype::F32, &[values.len()], &values);
                let mut out = Laid::poisoned(Dtype::F32, &[values.len()], Layout::Contiguous);
                let task = unary_on(isa, op, a.view(), out.view_mut()).unwrap();
                mica_threads::Pool::new(1).run(&[task]).unwrap();
                let got = out.values();
                for (i, (&got, &expected)) in got.iter().zip(&expected).enumerate() {
                    let rounded = expected as f32;
                    let step = (rounded.abs().max(f32::MIN_POSITIVE) * f32::EPSILON) as f64;
                    let gelu = matches!(op, UnaryOp::GeluErf | UnaryOp::GeluTanh) && points[i] < -1.0;
                    let bound =
                        units * step + if gelu { 2f64.powi(-20) * points[i].abs() as f64 } else { 0.0 };
                    let same = got == rounded as f64
                        || (got.is_nan() && expected.is_nan())
                        || (got - expected).abs() <= bound
                        // -∞ · 0: the f64 formula of gelu has no limit case.
                        || (points[i] == f32::NEG_INFINITY && expected.is_nan() && got == 0.0);
                    assert!(same, "{isa} {}({:?}) = {got:?}, expected {expected:?}", op.name(), points[i]);
                }
                let bits: Vec<f64> = got;
                match &first {
                    None => first = Some(bits),
                    Some(first) => {
                        let same = first
                            .iter()
                            .zip(&bits)
                            .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
                        assert!(same, "{} differs on {isa}", op.name());
                    }
                }
            }
        }
    }

    #[test]
    fn the_inverse_of_erf_is_mlx() {
        // mx.erfinv of MLX 0.32.4.
        for (x, expected) in
            [(0.5f32, 0.476936f32), (0.0, 0.0), (1.0, f32::INFINITY), (-1.0, f32::NEG_INFINITY)]
        {
            let op = unary(Isa::get(), UnaryOp::ErfInv).unwrap();
            let mut got = 0f32;
            // SAFETY: one value in, one out.
            unsafe { op.run(&[(&raw const x).cast()], (&raw mut got).cast(), 1) };
            assert!(got == expected || (got - expected).abs() < 1e-6, "{x}: {got}");
        }
        assert!(erf64::erf_inv(2.0).is_nan());
    }
}
