//! Complex arithmetic: computed in f64, rounded once to two f32. Principal values throughout; the
//! order of complex numbers is that of their real parts, then of their imaginary ones, as in MLX.
//!
//! The functions of f64 pairs are public because the reference backend computes with them too.

use super::binary::BinaryOp;
use super::compare::CompareOp;
use super::lanes::{narrow1, narrow2};
use super::tile::TileOp;
use super::unary::UnaryOp;
use crate::element::{Bool8, Complex32};

/// A complex number while it is computed with: real and imaginary part.
pub type Pair = (f64, f64);

const ONE: Pair = (1.0, 0.0);

fn add(a: Pair, b: Pair) -> Pair {
    (a.0 + b.0, a.1 + b.1)
}

fn subtract(a: Pair, b: Pair) -> Pair {
    (a.0 - b.0, a.1 - b.1)
}

/// a · b.
pub fn multiply(a: Pair, b: Pair) -> Pair {
    (a.0 * b.0 - a.1 * b.1, a.0 * b.1 + a.1 * b.0)
}

/// Squares of f32 values do not overflow f64, so the plain formula does; where it comes to nothing, infinities and
/// zeros are what C's annex G says, as in MLX.
fn divide(a: Pair, b: Pair) -> Pair {
    let norm = b.0 * b.0 + b.1 * b.1;
    let plain = ((a.0 * b.0 + a.1 * b.1) / norm, (a.1 * b.0 - a.0 * b.1) / norm);
    if !(plain.0.is_nan() && plain.1.is_nan()) {
        return plain;
    }
    let is_infinite = |z: Pair| z.0.is_infinite() || z.1.is_infinite();
    let is_finite = |z: Pair| z.0.is_finite() && z.1.is_finite();
    // The direction of an infinite number.
    let boxed = |z: Pair| {
        let part = |x: f64| f64::from(x.is_infinite()).copysign(x);
        (part(z.0), part(z.1))
    };
    let times = |(x, y): Pair| (x * b.0 + y * b.1, y * b.0 - x * b.1);
    if norm == 0.0 && !(a.0.is_nan() && a.1.is_nan()) {
        scale(a, f64::INFINITY.copysign(b.0))
    } else if is_infinite(a) && is_finite(b) {
        scale(times(boxed(a)), f64::INFINITY)
    } else if is_infinite(b) && is_finite(a) {
        let (x, y) = boxed(b);
        ((a.0 * x + a.1 * y) * 0.0, (a.1 * x - a.0 * y) * 0.0)
    } else {
        plain
    }
}

/// a + a real number: on a branch cut the sign of a zero imaginary part decides, so it must stay.
fn shifted(a: Pair, by: f64) -> Pair {
    (a.0 + by, a.1)
}

fn scale(a: Pair, by: f64) -> Pair {
    (a.0 * by, a.1 * by)
}

fn negative(a: Pair) -> Pair {
    (-a.0, -a.1)
}

fn exp(a: Pair) -> Pair {
    let size = a.0.exp();
    if a.1 == 0.0 { (size, a.1) } else { (size * a.1.cos(), size * a.1.sin()) }
}

fn log(a: Pair) -> Pair {
    (a.0.hypot(a.1).ln(), a.1.atan2(a.0))
}

fn log1p(a: Pair) -> Pair {
    (0.5 * (a.0 * (a.0 + 2.0) + a.1 * a.1).ln_1p(), a.1.atan2(1.0 + a.0))
}

fn sqrt(a: Pair) -> Pair {
    if a.0 == 0.0 && a.1 == 0.0 {
        return (0.0, a.1);
    }
    let half = ((a.0.abs() + a.0.hypot(a.1)) / 2.0).sqrt();
    if a.0 >= 0.0 { (half, a.1 / (2.0 * half)) } else { (a.1.abs() / (2.0 * half), half.copysign(a.1)) }
}

fn sinh(a: Pair) -> Pair {
    (a.0.sinh() * a.1.cos(), a.0.cosh() * a.1.sin())
}

fn cosh(a: Pair) -> Pair {
    (a.0.cosh() * a.1.cos(), a.0.sinh() * a.1.sin())
}

fn tanh(a: Pair) -> Pair {
    // Past this, cosh² swamps the rest and would overflow.
    if a.0.abs() > 20.0 {
        return (a.0.signum(), 2.0 * (2.0 * a.1).sin() * (-2.0 * a.0.abs()).exp());
    }
    let below = (2.0 * a.0).cosh() + (2.0 * a.1).cos();
    ((2.0 * a.0).sinh() / below, (2.0 * a.1).sin() / below)
}

/// An odd function: the left half plane is mirrored, where the sum below would cancel.
fn arcsinh(a: Pair) -> Pair {
    if a.0 < 0.0 || (a.0 == 0.0 && a.0.is_sign_negative()) {
        return negative(arcsinh(negative(a)));
    }
    log(add(a, sqrt(shifted(multiply(a, a), 1.0))))
}

fn arccosh(a: Pair) -> Pair {
    log(add(a, multiply(sqrt(shifted(a, 1.0)), sqrt(shifted(a, -1.0)))))
}

fn arctanh(a: Pair) -> Pair {
    scale(subtract(log1p(a), log1p(negative(a))), 0.5)
}

/// f(i·a) / i: how the circular functions follow from the hyperbolic ones.
fn turned(f: fn(Pair) -> Pair, a: Pair) -> Pair {
    let b = f((-a.1, a.0));
    (b.1, -b.0)
}

fn is_nan(a: Pair) -> bool {
    a.0.is_nan() || a.1.is_nan()
}

/// Whether `a` comes before `b`.
pub fn is_less(a: Pair, b: Pair) -> bool {
    a.0 < b.0 || (a.0 == b.0 && a.1 < b.1)
}

fn maximum(a: Pair, b: Pair) -> Pair {
    if is_nan(a) || is_less(b, a) { a } else { b }
}

fn minimum(a: Pair, b: Pair) -> Pair {
    if is_nan(a) || is_less(a, b) { a } else { b }
}

fn power(a: Pair, b: Pair) -> Pair {
    if a == (0.0, 0.0) {
        return if b == (0.0, 0.0) { ONE } else { (0.0, 0.0) };
    }
    exp(multiply(b, log(a)))
}

fn logaddexp(a: Pair, b: Pair) -> Pair {
    let (high, low) = (maximum(a, b), minimum(a, b));
    if low.0 == f64::NEG_INFINITY || high.0 == f64::INFINITY {
        return high;
    }
    add(high, log1p(exp(subtract(low, high))))
}

/// The function behind a unary op, if it is defined for complex numbers. The absolute value is
/// a complex number without imaginary part.
pub fn unary(op: UnaryOp) -> Option<fn(Pair) -> Pair> {
    use UnaryOp::*;
    Some(match op {
        Abs => |a| (a.0.hypot(a.1), 0.0),
        Neg => negative,
        Sign => |a| if a == (0.0, 0.0) { a } else { scale(a, 1.0 / a.0.hypot(a.1)) },
        Round => |a| (a.0.round_ties_even(), a.1.round_ties_even()),
        Sqrt => sqrt,
        Rsqrt => |a| divide(ONE, sqrt(a)),
        Square => |a| multiply(a, a),
        Reciprocal => |a| divide(ONE, a),
        Exp => exp,
        Log => log,
        Log2 => |a| scale(log(a), std::f64::consts::LOG2_E),
        Log10 => |a| scale(log(a), std::f64::consts::LOG10_E),
        Log1p => log1p,
        Sin => |a| turned(sinh, a),
        Cos => |a| cosh((-a.1, a.0)),
        Tan => |a| turned(tanh, a),
        Arcsin => |a| turned(arcsinh, a),
        Arccos => |a| subtract((std::f64::consts::FRAC_PI_2, 0.0), turned(arcsinh, a)),
        Arctan => |a| turned(arctanh, a),
        Sinh => sinh,
        Cosh => cosh,
        Tanh => tanh,
        Arcsinh => arcsinh,
        Arccosh => arccosh,
        Arctanh => arctanh,
        Floor | Ceil | Expm1 | Erf | ErfInv | Sigmoid | LogicalNot | BitwiseInvert | Silu | GeluErf
        | GeluTanh | Softplus => return None,
    })
}

/// The function behind a binary op, if it is defined for complex numbers.
pub fn binary(op: BinaryOp) -> Option<fn(Pair, Pair) -> Pair> {
    use BinaryOp::*;
    Some(match op {
        Add => add,
        Subtract => subtract,
        Multiply => multiply,
        // MLX does not round a complex quotient down.
        Divide | FloorDivide => divide,
        Power => power,
        Maximum => maximum,
        Minimum => minimum,
        LogAddExp => logaddexp,
        Remainder | Atan2 | BitwiseAnd | BitwiseOr | BitwiseXor | LeftShift | RightShift | LogicalAnd
        | LogicalOr => return None,
    })
}

/// The comparison of two complex numbers.
pub fn compare(op: CompareOp) -> fn(Pair, Pair) -> bool {
    match op {
        CompareOp::Eq => |a, b| a == b,
        CompareOp::Ne => |a, b| a != b,
        CompareOp::Lt => is_less,
        CompareOp::Le => |a, b| a == b || is_less(a, b),
        CompareOp::Gt => |a, b| is_less(b, a),
        CompareOp::Ge => |a, b| a == b || is_less(b, a),
    }
}

fn wide(a: Complex32) -> Pair {
    (a.re as f64, a.im as f64)
}

fn narrow(a: Pair) -> Complex32 {
    Complex32 { re: a.0 as f32, im: a.1 as f32 }
}

/// Two stored numbers joined by an op that complex numbers have.
pub(crate) fn joined(op: BinaryOp, a: Complex32, b: Complex32) -> Complex32 {
    stored(binary(op).expect("complex numbers have it"))(a, b)
}

/// A function of two pairs as one of stored numbers.
pub(crate) fn stored(f: fn(Pair, Pair) -> Pair) -> impl Fn(Complex32, Complex32) -> Complex32 + Copy {
    move |a, b| narrow(f(wide(a), wide(b)))
}

/// Whether `a` comes before `b`.
pub(crate) fn stored_is_less(a: Complex32, b: Complex32) -> bool {
    is_less(wide(a), wide(b))
}

pub(super) fn unary_tile(op: UnaryOp) -> Option<Box<dyn TileOp>> {
    let f = unary(op)?;
    Some(narrow1(move |a: Complex32| narrow(f(wide(a)))))
}

pub(super) fn binary_tile(op: BinaryOp) -> Option<Box<dyn TileOp>> {
    Some(narrow2(stored(binary(op)?)))
}

pub(super) fn compare_tile(op: CompareOp) -> Box<dyn TileOp> {
    let f = compare(op);
    narrow2(move |a: Complex32, b: Complex32| Bool8::from(f(wide(a), wide(b))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(name: &str, got: Pair, expected: Pair) {
        let size = expected.0.hypot(expected.1).max(1e-3);
        let off = (got.0 - expected.0).hypot(got.1 - expected.1);
        assert!(off <= 1e-12 * size, "{name}: {got:?}, expected {expected:?}");
    }

    #[test]
    fn functions_undo_each_other() {
        use UnaryOp::*;
        let points = [(0.3, 0.4), (-0.7, 0.2), (1.5, -2.0), (-2.5, -0.5), (0.0, 0.6), (-1e-3, 1e-4)];
        for (name, there, back) in [
            ("sin", Arcsin, Sin),
            ("cos", Arccos, Cos),
            ("tan", Arctan, Tan),
            ("sinh", Arcsinh, Sinh),
            ("cosh", Arccosh, Cosh),
            ("tanh", Arctanh, Tanh),
            ("exp", Log, Exp),
            ("square", Sqrt, Square),
        ] {
            let (there, back) = (unary(there).unwrap(), unary(back).unwrap());
            for point in points {
                close(name, back(there(point)), point);
            }
        }
    }

    #[test]
    fn arithmetic() {
        // On the branch cut, from above.
        close(
            "arcsin(4)",
            unary(UnaryOp::Arcsin).unwrap()((4.0, 0.0)),
            (std::f64::consts::FRAC_PI_2, 4f64.acosh()),
        );
        let (a, b) = ((1.0, 2.0), (2.0, -1.0));
        for (op, expected) in [
            (BinaryOp::Multiply, (4.0, 3.0)),
            (BinaryOp::Divide, (0.0, 1.0)),
            (BinaryOp::Maximum, b),
            (BinaryOp::Minimum, a),
            (BinaryOp::Power, (2.428447747683073, 14.93241486964456)),
            (BinaryOp::LogAddExp, (1.5504546361718838, -0.9185277439144951)),
        ] {
            let got = binary(op).unwrap()(a, b);
            assert!((got.0 - expected.0).hypot(got.1 - expected.1) < 1e-6, "{op:?}: {got:?}");
        }
        assert!(compare(CompareOp::Lt)((1.0, 2.0), (1.0, 3.0)));
        assert!(!compare(CompareOp::Ge)((1.0, 2.0), (f64::NAN, 3.0)));
    }
}
