//! Elementwise ops, reductions, random bits, the optimizer step.

use mica_kernels::elementwise::complex;

use super::dense::{Dense, Values, ravel, unravel};
use crate::Dtype;
use crate::op::{AdamWSpec, BinaryOp, CompareOp, ReduceOp, UnaryOp};
use crate::shape::size_of;

pub(super) fn unary(op: UnaryOp, x: &Dense) -> Dense {
    use UnaryOp::*;
    if let Values::Int(values) = &x.values {
        let int = |f: fn(i128) -> i128| Dense::ints(&x.shape, values.iter().map(|&v| f(v)).collect());
        match op {
            Abs => return int(i128::abs),
            Neg => return int(|v| -v),
            Sign => return int(i128::signum),
            Floor | Ceil | Round => return x.clone(),
            Square => return int(|v| v.wrapping_mul(v)),
            BitwiseInvert => return int(|v| !v),
            LogicalNot => return int(|v| (v == 0) as i128),
            _ => {}
        }
    }
    if let Values::Complex(values) = &x.values {
        return match (op, complex::unary(op)) {
            (LogicalNot, _) => Dense::ints(&x.shape, (0..x.size()).map(|i| !x.truth(i) as i128).collect()),
            (_, Some(f)) => Dense::complex(&x.shape, values.iter().map(|&value| f(value)).collect()),
            (_, None) => Dense::complex(&x.shape, vec![(f64::NAN, f64::NAN); x.size()]),
        };
    }
    let f: fn(f64) -> f64 = match op {
        Abs => f64::abs,
        Neg => |x| -x,
        Sign => |x| {
            if x > 0.0 {
                1.0
            } else if x < 0.0 {
                -1.0
            } else {
                0.0
            }
        },
        Floor => f64::floor,
        Ceil => f64::ceil,
        Round => f64::round_ties_even,
        Sqrt => f64::sqrt,
        Rsqrt => |x| 1.0 / x.sqrt(),
        Square => |x| x * x,
        Reciprocal => |x| 1.0 / x,
        Exp => f64::exp,
        Expm1 => f64::exp_m1,
        Log => f64::ln,
        Log2 => f64::log2,
        Log10 => f64::log10,
        Log1p => f64::ln_1p,
        Sin => f64::sin,
        Cos => f64::cos,
        Tan => f64::tan,
        Arcsin => f64::asin,
        Arccos => f64::acos,
        Arctan => f64::atan,
        Sinh => f64::sinh,
        Cosh => f64::cosh,
        Tanh => f64::tanh,
        Arcsinh => f64::asinh,
        Arccosh => f64::acosh,
        Arctanh => f64::atanh,
        Erf => erf,
        ErfInv => erf_inverse,
        Sigmoid => sigmoid,
        LogicalNot => |x| (x == 0.0) as u8 as f64,
        BitwiseInvert => |_| f64::NAN,
        Silu => |x| x * sigmoid(x),
        GeluErf => |x| 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
        GeluTanh => |x| {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            0.5 * x * (1.0 + (c * (x + 0.044715 * x * x * x)).tanh())
        },
        Softplus => |x| x.max(0.0) + (-x.abs()).exp().ln_1p(),
    };
    Dense::floats(&x.shape, (0..x.size()).map(|index| f(x.at(index))).collect())
}

pub(super) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// By its Taylor series near zero and its continued fraction further out: exact to f64's last
/// few bits, and slow.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if x.is_nan() {
        return x;
    }
    if a >= 6.0 {
        return x.signum();
    }
    let value = if a < 2.5 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-18 * sum.abs() && n < 200.0 {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut fraction = 0.0;
        for k in (1..=120).rev() {
            fraction = k as f64 / 2.0 / (a + fraction);
        }
        1.0 - (-a * a).exp() / ((a + fraction) * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

/// By Newton's method on [`erf`].
fn erf_inverse(y: f64) -> f64 {
    if y.abs() >= 1.0 {
        return if y.abs() == 1.0 { y * f64::INFINITY } else { f64::NAN };
    }
    let w = -((1.0 - y) * (1.0 + y)).ln();
    let mut x = (w * 0.5).sqrt().copysign(y);
    if w < 5.0 {
        x = y * 0.886_226_925_452_758;
    }
    for _ in 0..80 {
        let slope = std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp();
        let step = (erf(x) - y) / slope;
        x -= step / (1.0 + x * step);
        if step.abs() < 1e-16 {
            break;
        }
    }
    x
}

pub(super) fn binary(op: BinaryOp, a: &Dense, b: &Dense, dtype: Dtype) -> Dense {
    use BinaryOp::*;
    if dtype == Dtype::C64 {
        let f = complex::binary(op).unwrap_or(|_, _| (f64::NAN, f64::NAN));
        return Dense::complex(&a.shape, (0..a.size()).map(|i| f(a.pair(i), b.pair(i))).collect());
    }
    if matches!(op, LogicalAnd | LogicalOr) {
        let f = |i: usize| match op {
            LogicalAnd => a.truth(i) && b.truth(i),
            _ => a.truth(i) || b.truth(i),
        };
        return Dense::ints(&a.shape, (0..a.size()).map(|i| f(i) as i128).collect());
    }
    if !dtype.is_float() {
        let f = |x: i128, y: i128| match op {
            Add => x + y,
            Subtract => x - y,
            Multiply => x.wrapping_mul(y),
            Divide | FloorDivide if y == 0 => 0,
            Divide => x / y,
            FloorDivide => x / y - (x % y != 0 && (x < 0) != (y < 0)) as i128,
            Remainder if y == 0 => x,
            Remainder => {
                let r = x % y;
                if r != 0 && (r < 0) != (y < 0) { r + y } else { r }
            }
            Power => power(x, y),
            Maximum => x.max(y),
            Minimum => x.min(y),
            BitwiseAnd => x & y,
            BitwiseOr => x | y,
            BitwiseXor => x ^ y,
            LeftShift => x.wrapping_shl(y as u32),
            RightShift => x.wrapping_shr(y as u32),
            LogicalAnd => (x != 0 && y != 0) as i128,
            LogicalOr => (x != 0 || y != 0) as i128,
            Atan2 | LogAddExp => 0,
        };
        return Dense::ints(&a.shape, (0..a.size()).map(|i| f(a.int(i), b.int(i))).collect());
    }
    Dense::floats(&a.shape, (0..a.size()).map(|i| join_floats(op, a.at(i), b.at(i))).collect())
}

/// A binary op on two floats.
pub(super) fn join_floats(op: BinaryOp, x: f64, y: f64) -> f64 {
    use BinaryOp::*;
    match op {
        Add => x + y,
        Subtract => x - y,
        Multiply => x * y,
        Divide => x / y,
        FloorDivide => (x / y).floor(),
        Remainder => {
            let r = x % y;
            if r != 0.0 && (r < 0.0) != (y < 0.0) { r + y } else { r }
        }
        Power => x.powf(y),
        Maximum => {
            if x.is_nan() || y.is_nan() {
                f64::NAN
            } else {
                x.max(y)
            }
        }
        Minimum => {
            if x.is_nan() || y.is_nan() {
                f64::NAN
            } else {
                x.min(y)
            }
        }
        Atan2 => x.atan2(y),
        LogAddExp => {
            let top = if x.is_nan() || y.is_nan() { f64::NAN } else { x.max(y) };
            if top.is_infinite() { top } else { top + ((x - top).exp() + (y - top).exp()).ln() }
        }
        LogicalAnd => (x != 0.0 && y != 0.0) as u8 as f64,
        LogicalOr => (x != 0.0 || y != 0.0) as u8 as f64,
        BitwiseAnd | BitwiseOr | BitwiseXor | LeftShift | RightShift => f64::NAN,
    }
}

fn power(base: i128, exponent: i128) -> i128 {
    if exponent < 0 {
        return 0;
    }
    let (mut base, mut exponent, mut product) = (base, exponent, 1i128);
    while exponent != 0 {
        if exponent & 1 != 0 {
            product = product.wrapping_mul(base);
        }
        exponent >>= 1;
        base = base.wrapping_mul(base);
    }
    product
}

pub(super) fn compare(op: CompareOp, a: &Dense, b: &Dense) -> Dense {
    let holds = |order: Option<std::cmp::Ordering>| match op {
        CompareOp::Eq => order.is_some_and(|o| o.is_eq()),
        CompareOp::Ne => order.is_none_or(|o| o.is_ne()),
        CompareOp::Lt => order.is_some_and(|o| o.is_lt()),
        CompareOp::Le => order.is_some_and(|o| o.is_le()),
        CompareOp::Gt => order.is_some_and(|o| o.is_gt()),
        CompareOp::Ge => order.is_some_and(|o| o.is_ge()),
    };
    let values = (0..a.size())
        .map(|i| match (&a.values, &b.values) {
            (Values::Int(x), Values::Int(y)) => holds(Some(x[i].cmp(&y[i]))) as i128,
            (Values::Complex(x), Values::Complex(y)) => complex::compare(op)(x[i], y[i]) as i128,
            _ => holds(a.at(i).partial_cmp(&b.at(i))) as i128,
        })
        .collect();
    Dense::ints(&a.shape, values)
}

pub(super) fn select(condition: &Dense, a: &Dense, b: &Dense) -> Dense {
    let pick = |i: usize| if condition.truth(i) { a } else { b };
    match (&a.values, &b.values) {
        (Values::Int(_), Values::Int(_)) => {
            Dense::ints(&a.shape, (0..a.size()).map(|i| pick(i).int(i)).collect())
        }
        (Values::Complex(_), _) => Dense::complex(&a.shape, (0..a.size()).map(|i| pick(i).pair(i)).collect()),
        _ => Dense::floats(&a.shape, (0..a.size()).map(|i| pick(i).at(i)).collect()),
    }
}

pub(super) fn reduce(op: ReduceOp, x: &Dense, axes: &[usize], shape: &[usize]) -> Dense {
    let target = |i: usize| {
        let mut index = unravel(i, &x.shape);
        for &axis in axes {
            index[axis] = 0;
        }
        ravel(&index, shape)
    };
    let count = size_of(shape);
    if let Values::Int(values) = &x.values {
        let start = match op {
            ReduceOp::Sum | ReduceOp::Any => 0,
            ReduceOp::Prod | ReduceOp::All => 1,
            ReduceOp::Max => i128::MIN,
            ReduceOp::Min => i128::MAX,
        };
        let mut result = vec![start; count];
        for (i, &value) in values.iter().enumerate() {
            let slot = &mut result[target(i)];
            *slot = match op {
                ReduceOp::Sum => *slot + value,
                ReduceOp::Prod => slot.wrapping_mul(value),
                ReduceOp::Max => (*slot).max(value),
                ReduceOp::Min => (*slot).min(value),
                ReduceOp::All => (*slot != 0 && value != 0) as i128,
                ReduceOp::Any => (*slot != 0 || value != 0) as i128,
            };
        }
        return Dense::ints(shape, result);
    }
    if let Values::Complex(values) = &x.values {
        let (joined, start) = match op {
            ReduceOp::Prod => (BinaryOp::Multiply, (1.0, 0.0)),
            ReduceOp::Max => (BinaryOp::Maximum, (f64::NEG_INFINITY, f64::NEG_INFINITY)),
            ReduceOp::Min => (BinaryOp::Minimum, (f64::INFINITY, f64::INFINITY)),
            // Truth is asked of bools alone: the constructor casts.
            ReduceOp::Sum | ReduceOp::All | ReduceOp::Any => (BinaryOp::Add, (0.0, 0.0)),
        };
        let join = complex::binary(joined).expect("complex numbers have it");
        let mut result = vec![start; count];
        for (i, &value) in values.iter().enumerate() {
            let slot = &mut result[target(i)];
            *slot = join(*slot, value);
        }
        return Dense::complex(shape, result);
    }
    let start = match op {
        ReduceOp::Sum | ReduceOp::Any => 0.0,
        ReduceOp::Prod | ReduceOp::All => 1.0,
        ReduceOp::Max => f64::NEG_INFINITY,
        ReduceOp::Min => f64::INFINITY,
    };
    let mut result = vec![start; count];
    for i in 0..x.size() {
        let value = x.at(i);
        let slot = &mut result[target(i)];
        *slot = match op {
            ReduceOp::Sum => *slot + value,
            ReduceOp::Prod => *slot * value,
            ReduceOp::Max if value.is_nan() || slot.is_nan() => f64::NAN,
            ReduceOp::Min if value.is_nan() || slot.is_nan() => f64::NAN,
            ReduceOp::Max => slot.max(value),
            ReduceOp::Min => slot.min(value),
            ReduceOp::All => (*slot != 0.0 && value != 0.0) as u8 as f64,
            ReduceOp::Any => (*slot != 0.0 || value != 0.0) as u8 as f64,
        };
    }
    Dense::floats(shape, result)
}

/// The first of the largest or smallest; of the first NaN if there is one.
pub(super) fn arg_reduce(max: bool, x: &Dense, axis: usize, shape: &[usize]) -> Dense {
    let nan = |i: usize| x.pair(i).0.is_nan() || x.pair(i).1.is_nan();
    let beats = |new: usize, held: usize| match &x.values {
        Values::Int(values) => {
            if max {
                values[new] > values[held]
            } else {
                values[new] < values[held]
            }
        }
        _ if nan(new) || nan(held) => nan(new) && !nan(held),
        _ if max => complex::is_less(x.pair(held), x.pair(new)),
        _ => complex::is_less(x.pair(new), x.pair(held)),
    };
    let mut best: Vec<Option<usize>> = vec![None; size_of(shape)];
    for i in 0..x.size() {
        let mut index = unravel(i, &x.shape);
        index[axis] = 0;
        let slot = &mut best[ravel(&index, shape)];
        if slot.is_none_or(|held| beats(i, held)) {
            *slot = Some(i);
        }
    }
    let place = |i: usize| unravel(i, &x.shape)[axis] as i128;
    Dense::ints(shape, best.into_iter().map(|slot| slot.map_or(0, place)).collect())
}

pub(super) fn softmax(x: &Dense) -> Dense {
    let (rows, width) = x.rows();
    let mut result = Vec::with_capacity(x.size());
    for row in 0..rows {
        let values: Vec<f64> = (0..width).map(|i| x.at(row * width + i)).collect();
        let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exps: Vec<f64> = values.iter().map(|value| (value - top).exp()).collect();
        let sum: f64 = exps.iter().sum();
        result.extend(exps.iter().map(|value| value / sum));
    }
    Dense::floats(&x.shape, result)
}

pub(super) fn logsumexp(x: &Dense, shape: &[usize]) -> Dense {
    let (rows, width) = x.rows();
    let result = (0..rows)
        .map(|row| {
            let values = (0..width).map(|i| x.at(row * width + i));
            let top = values.clone().fold(f64::NEG_INFINITY, f64::max);
            if values.clone().any(f64::is_nan) {
                f64::NAN
            } else if top.is_infinite() {
                top
            } else {
                top + values.map(|value| (value - top).exp()).sum::<f64>().ln()
            }
        })
        .collect();
    Dense::floats(shape, result)
}

/// Threefry2x32 with MLX's numbering: the first half of the counters gives the first halves.
/// Keys [.., 2], each for its part of the result, whose shape begins with the keys' dimensions.
pub(super) fn random_bits(width: usize, keys: &Dense, shape: &[usize]) -> Dense {
    let part = &shape[keys.shape.len() - 1..];
    let of_key = |key: usize| {
        let key = (keys.int(2 * key) as u32, keys.int(2 * key + 1) as u32);
        random_bits_of(width, key, part)
    };
    Dense::ints(shape, (0..keys.size() / 2).flat_map(of_key).collect())
}

fn random_bits_of(width: usize, (k0, k1): (u32, u32), shape: &[usize]) -> Vec<i128> {
    let bytes = size_of(shape) * width;
    let words = bytes.div_ceil(4);
    let half = words / 2;
    let even = words.is_multiple_of(2);
    let mut out = vec![0u32; words];
    for i in 0..half {
        let (a, b) = threefry(k0, k1, i as u32, (i + half + !even as usize) as u32);
        out[i] = a;
        out[i + half + !even as usize] = b;
    }
    if !even {
        out[half] = threefry(k0, k1, half as u32, 0).0;
    }
    let stream: Vec<u8> = out.iter().flat_map(|word| word.to_le_bytes()).collect();
    stream
        .chunks_exact(width)
        .take(size_of(shape))
        .map(|chunk| chunk.iter().rev().fold(0i128, |sum, &byte| sum << 8 | byte as i128))
        .collect()
}

fn threefry(k0: u32, k1: u32, x: u32, y: u32) -> (u32, u32) {
    const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    let keys = [k0, k1, k0 ^ k1 ^ 0x1BD1_1BDA];
    let (mut x, mut y) = (x.wrapping_add(keys[0]), y.wrapping_add(keys[1]));
    for round in 0..5u32 {
        for rotation in ROTATIONS[round as usize % 2] {
            x = x.wrapping_add(y);
            y = y.rotate_left(rotation) ^ x;
        }
        x = x.wrapping_add(keys[(round as usize + 1) % 3]);
        y = y.wrapping_add(keys[(round as usize + 2) % 3]).wrapping_add(round + 1);
    }
    (x, y)
}

pub(super) fn adamw(spec: &AdamWSpec, inputs: &[Dense]) -> Vec<Dense> {
    let (b1, b2) = (spec.beta1 as f64, spec.beta2 as f64);
    let correct = |beta: f64| if spec.step == 0 { 1.0 } else { 1.0 - beta.powi(spec.step as i32) };
    let (c1, c2) = (correct(b1), correct(b2));
    let mut out = [Vec::new(), Vec::new(), Vec::new()];
    for i in 0..inputs[0].size() {
        let (p, g) = (inputs[0].at(i), inputs[1].at(i) * spec.grad_scale as f64);
        let m = b1 * inputs[2].at(i) + (1.0 - b1) * g;
        let v = b2 * inputs[3].at(i) + (1.0 - b2) * g * g;
        let update = (m / c1) / ((v / c2).sqrt() + spec.eps as f64);
        out[0].push(p * (1.0 - spec.lr as f64 * spec.weight_decay as f64) - spec.lr as f64 * update);
        out[1].push(m);
        out[2].push(v);
    }
    out.into_iter().map(|values| Dense::floats(&inputs[0].shape, values)).collect()
}
