//! Random numbers from keys: threefry2x32, bit for bit as MLX.
//!
//! A key is an array of two u32. The same key gives the same numbers; [`split`] makes new keys. Where a
//! function takes a key, `None` means the next key of this thread's own sequence, which starts from
//! the clock, or from [`seed`]: each call draws another one.

use std::cell::RefCell;
use std::time::{SystemTime, UNIX_EPOCH};

use smallvec::smallvec;

use super::elementwise::Operand;
use crate::op::{Op, Scalar, UnaryOp, first_failure};
use crate::shape::{Shape, broadcast_shapes, normalize_axis};
use crate::{Array, Dtype, Error, Result, linalg};

thread_local! {
    /// The key from which this thread's next one is split.
    static STATE: RefCell<Option<Array>> = const { RefCell::new(None) };
}

/// The key of a seed.
pub fn key(seed: u64) -> Result<Array> {
    Array::from_slice(&[(seed >> 32) as u32, seed as u32], &[2])
}

/// Starts this thread's sequence of keys from a seed.
pub fn seed(seed: u64) -> Result<()> {
    let key = key(seed)?;
    STATE.with_borrow_mut(|state| *state = Some(key));
    Ok(())
}

/// The key from which this thread's next one will be split: what to save to go on from here.
pub fn state() -> Result<Array> {
    if let Some(state) = STATE.with_borrow(Clone::clone) {
        return Ok(state);
    }
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
    seed(clock)?;
    state()
}

/// Goes on from what [`state`] gave.
pub fn set_state(key: Array) -> Result<()> {
    check_key(&key)?;
    STATE.with_borrow_mut(|state| *state = Some(key));
    Ok(())
}

/// The given key, or the next of this thread's sequence.
fn key_or_next(key: Option<&Array>) -> Result<Array> {
    if let Some(key) = key {
        return Ok(key.clone());
    }
    let pair = split(&state()?, 2)?;
    let half = |at: usize| pair.narrow(0, at, at + 1)?.reshape(&[2]);
    set_state(half(0)?)?;
    half(1)
}

fn check_key(key: &Array) -> Result<()> {
    if key.shape() != [2] || key.dtype() != Dtype::U32 {
        return Err(Error::invalid("random_bits", format!("a key is two uint32, got {key:?}")));
    }
    Ok(())
}

/// `count` keys from one: [count, 2].
pub fn split(key: &Array, count: usize) -> Result<Array> {
    bits(&[count, 2], 4, key)
}

/// Uniform bits in unsigned integers of `width` bytes: 1, 2 or 4.
pub fn bits<'a>(shape: &[usize], width: usize, key: impl Into<Option<&'a Array>>) -> Result<Array> {
    let key = key_or_next(key.into())?;
    first_failure(&[&key])?;
    check_key(&key)?;
    let dtype = match width {
        1 => Dtype::U8,
        2 => Dtype::U16,
        4 => Dtype::U32,
        _ => return Err(Error::invalid("random_bits", format!("a width of 1, 2 or 4 bytes, got {width}"))),
    };
    Ok(Array::lazy(Op::RandomBits { width }, smallvec![key], shape, dtype))
}

/// The numbers next to ±1 on the side of zero.
fn below_one(op: &'static str, dtype: Dtype) -> Result<f64> {
    Ok(match dtype {
        Dtype::F32 => 1.0f32.next_down() as f64,
        Dtype::F16 => half::f16::from_bits(0x3bff).to_f64(),
        Dtype::BF16 => half::bf16::from_bits(0x3f7f).to_f64(),
        _ => return Err(Error::dtype(op, "float16, bfloat16 or float32", dtype)),
    })
}

/// Refuses operands that would make a result of another shape than was asked for.
fn check_shape(op: &'static str, shape: &[usize], operands: &[&Array]) -> Result<()> {
    for operand in operands {
        if broadcast_shapes(op, shape, operand.shape())?.as_slice() != shape {
            return Err(Error::invalid(
                op,
                format!("arguments of shape {:?} do not broadcast to the shape {shape:?}", operand.shape()),
            ));
        }
    }
    Ok(())
}

/// Uniform numbers in [low, high); the bounds broadcast to the shape.
pub fn uniform<'a>(
    low: impl Operand,
    high: impl Operand,
    shape: &[usize],
    dtype: Dtype,
    key: impl Into<Option<&'a Array>>,
) -> Result<Array> {
    let upper = below_one("uniform", dtype)?;
    let low = low.operand(dtype).astype(dtype)?;
    let range = high.operand(dtype).astype(dtype)?.subtract(&low)?;
    check_shape("uniform", shape, &[&range])?;
    let unit =
        bits(shape, 4, key)?.astype(Dtype::F32)?.divide(u32::MAX as f32)?.astype(dtype)?.minimum(upper)?;
    range.multiply(unit)?.add(low)
}

/// Normal numbers of mean 0 and deviation 1.
pub fn normal<'a>(shape: &[usize], dtype: Dtype, key: impl Into<Option<&'a Array>>) -> Result<Array> {
    normal_with(shape, dtype, None, None, key)
}

/// Normal numbers of mean `loc` and deviation `scale`, which broadcast to the shape. Complex numbers
/// have parts of half the variance.
pub fn normal_with<'a>(
    shape: &[usize],
    dtype: Dtype,
    loc: Option<&Array>,
    scale: Option<&Array>,
    key: impl Into<Option<&'a Array>>,
) -> Result<Array> {
    check_shape("normal", shape, &loc.into_iter().chain(scale).collect::<Vec<_>>())?;
    if !dtype.is_inexact() {
        return Err(Error::dtype("normal", "a float dtype or complex64", dtype));
    }
    // Drawn in f32 whatever the dtype: half types have too few numbers between −1 and 1.
    let low = -below_one("normal", Dtype::F32)?;
    let mut pairs: Shape = shape.into();
    if dtype == Dtype::C64 {
        pairs.push(2);
    }
    let samples = uniform(low, 1.0, &pairs, Dtype::F32, key)?.unary(UnaryOp::ErfInv)?;
    let number = |value: f64| Array::scalar(Scalar::Float(value), dtype);
    let (samples, unit) = match dtype {
        Dtype::C64 => {
            let last = shape.len() as i32;
            let part = |at: usize| samples.narrow(last, at, at + 1)?.squeeze(&[last]);
            (Array::complex(&part(0)?, &part(1)?)?, number(1.0))
        }
        _ => (samples.astype(dtype)?, number(std::f64::consts::SQRT_2)),
    };
    let factor = match scale {
        Some(scale) => unit.multiply(scale.astype(dtype)?)?,
        None => unit,
    };
    let samples = if dtype == Dtype::C64 && scale.is_none() { samples } else { samples.multiply(factor)? };
    match loc {
        Some(loc) => samples.add(loc.astype(dtype)?),
        None => Ok(samples),
    }
}

/// Samples of a multivariate normal distribution: mean [.., n], covariance [.., n, n] (positive
/// semi-definite) → [shape, n]. `None`: the batch shape of mean and covariance.
pub fn multivariate_normal<'a>(
    mean: &Array,
    covariance: &Array,
    shape: Option<&[usize]>,
    key: impl Into<Option<&'a Array>>,
) -> Result<Array> {
    const NAME: &str = "multivariate_normal";
    let fits = mean.rank() >= 1
        && covariance.rank() >= 2
        && covariance.dim(-1) == covariance.dim(-2)
        && covariance.dim(-1) == mean.dim(-1);
    if !fits {
        return Err(Error::invalid(
            NAME,
            format!("needs a mean [.., n] and a covariance [.., n, n], got {mean:?} and {covariance:?}"),
        ));
    }
    let lead = |array: &Array, last: usize| Shape::from(&array.shape()[..array.rank() - last]);
    let batch = broadcast_shapes(NAME, &lead(mean, 1), &lead(covariance, 2))?;
    let mut shape: Shape = match shape {
        Some(shape) if !shape.is_empty() => {
            if broadcast_shapes(NAME, shape, &batch)?.as_slice() != shape {
                return Err(Error::shapes(NAME, &shape.into(), &batch));
            }
            shape.into()
        }
        _ => batch,
    };
    shape.push(mean.dim(-1));
    let (u, s, vt) = linalg::svd(&covariance.astype(Dtype::F32)?)?;
    let root = u.multiply(s.sqrt()?.expand_dims(&[-2])?)?.matmul(&vt)?;
    let samples = normal(&shape, Dtype::F32, key)?.expand_dims(&[-2])?;
    samples.matmul(&root)?.squeeze(&[-2])?.add(mean.astype(Dtype::F32)?)
}

/// Uniform integers in [low, high); the bounds broadcast to the shape.
///
/// As in MLX they are f32 rounded down: of ranges beyond 2²⁴ not every integer can come.
pub fn randint<'a>(
    low: impl Operand,
    high: impl Operand,
    shape: &[usize],
    dtype: Dtype,
    key: impl Into<Option<&'a Array>>,
) -> Result<Array> {
    if dtype.is_inexact() {
        return Err(Error::dtype("randint", "an integer dtype or bool", dtype));
    }
    let (low, high) = (low.operand(Dtype::F32), high.operand(Dtype::F32));
    uniform(&low, &high, shape, Dtype::F32, key)?.maximum(low.astype(Dtype::F32)?)?.floor()?.astype(dtype)
}

/// true with probability `p`, which broadcasts to the shape.
pub fn bernoulli<'a>(p: impl Operand, shape: &[usize], key: impl Into<Option<&'a Array>>) -> Result<Array> {
    let p = p.operand(Dtype::F32);
    if !p.dtype().is_float() {
        return Err(Error::dtype("bernoulli", "a probability of a float dtype", p.dtype()));
    }
    check_shape("bernoulli", shape, &[&p])?;
    uniform(0.0, 1.0, shape, Dtype::F32, key)?.less(p)
}

/// Normal numbers of mean 0 and deviation 1 between `lower` and `upper`, which broadcast to the
/// shape; `None`: to each other.
pub fn truncated_normal<'a>(
    lower: impl Operand,
    upper: impl Operand,
    shape: Option<&[usize]>,
    dtype: Dtype,
    key: impl Into<Option<&'a Array>>,
) -> Result<Array> {
    if !dtype.is_float() {
        return Err(Error::dtype("truncated_normal", "a float dtype", dtype));
    }
    let (lower, upper) = (lower.operand(dtype).astype(dtype)?, upper.operand(dtype).astype(dtype)?);
    let shape = match shape {
        Some(shape) => shape.into(),
        None => broadcast_shapes("truncated_normal", lower.shape(), upper.shape())?,
    };
    let root = Array::scalar(Scalar::Float(std::f64::consts::SQRT_2), dtype);
    let (a, b) = (lower.divide(&root)?.erf()?, upper.divide(&root)?.erf()?);
    let u = uniform(a, b, &shape, dtype, key)?;
    root.multiply(u.unary(UnaryOp::ErfInv)?)?.minimum(upper)?.maximum(lower)
}

/// Samples of the standard Gumbel distribution: −log(−log u).
pub fn gumbel<'a>(shape: &[usize], dtype: Dtype, key: impl Into<Option<&'a Array>>) -> Result<Array> {
    uniform(0.0, 1.0, shape, dtype, key)?.log()?.negative()?.log()?.negative()
}

/// What [`categorical`] draws.
#[derive(Clone, Copy, Debug, Default)]
pub enum Draws<'a> {
    /// One sample per distribution.
    #[default]
    One,
    /// So many per distribution, in a new last dimension.
    Many(usize),
    /// This shape, to which the shape of the distributions broadcasts.
    Shape(&'a [usize]),
}

/// Samples of the distributions whose unnormalized log-probabilities lie along `axis`: u32 indices.
pub fn categorical<'a>(
    logits: &Array,
    axis: i32,
    draws: Draws,
    key: impl Into<Option<&'a Array>>,
) -> Result<Array> {
    const NAME: &str = "categorical";
    let axis = normalize_axis(NAME, axis, logits.rank())?;
    if let Draws::Many(count) = draws {
        let logits = logits.expand_dims(&[-1])?;
        let mut shape: Shape = logits.shape().into();
        shape.remove(axis);
        *shape.last_mut().expect("a dimension was added") = count;
        return categorical(&logits, axis as i32, Draws::Shape(&shape), key);
    }
    let mut reduced: Shape = logits.shape().into();
    reduced.remove(axis);
    let mut shape: Shape = match draws {
        Draws::Shape(shape) => {
            if broadcast_shapes(NAME, shape, &reduced)?.as_slice() != shape {
                return Err(Error::shapes(NAME, &shape.into(), &reduced));
            }
            shape.into()
        }
        _ => reduced,
    };
    let at = axis + shape.len() + 1 - logits.rank();
    shape.insert(at, logits.shape()[axis]);
    gumbel(&shape, Dtype::F32, key)?.add(logits)?.argmax(at as i32, false)
}

/// Samples of the Laplace distribution.
pub fn laplace<'a>(
    shape: &[usize],
    dtype: Dtype,
    loc: f64,
    scale: f64,
    key: impl Into<Option<&'a Array>>,
) -> Result<Array> {
    if !dtype.is_float() {
        return Err(Error::dtype("laplace", "a float dtype", dtype));
    }
    let u = uniform(-below_one("laplace", Dtype::F32)?, 1.0, shape, Dtype::F32, key)?;
    let mut samples = u.sign()?.multiply(u.abs()?.multiply(-1.0)?.log1p()?)?.astype(dtype)?;
    if scale != 1.0 {
        samples = samples.multiply(scale)?;
    }
    if loc != 0.0 { samples.add(loc) } else { Ok(samples) }
}

/// The numbers below `count` in random order, u32.
pub fn permutation_of<'a>(count: usize, key: impl Into<Option<&'a Array>>) -> Result<Array> {
    bits(&[count], 4, key)?.argsort(0)
}

/// The slices along an axis in random order.
pub fn permutation<'a>(x: &Array, axis: i32, key: impl Into<Option<&'a Array>>) -> Result<Array> {
    let at = normalize_axis("permutation", axis, x.rank())?;
    x.take(&permutation_of(x.shape()[at], key)?, axis)
}
