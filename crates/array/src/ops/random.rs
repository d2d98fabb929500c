//! Random numbers from keys: threefry2x32, bit for bit as MLX.
//!
//! A key is an array of two u32. The same key gives the same numbers; `split` makes new keys.

use smallvec::smallvec;

use crate::op::{Op, Scalar, UnaryOp, first_failure};
use crate::{Array, Dtype, Error, Result};

/// The key of a seed.
pub fn key(seed: u64) -> Result<Array> {
    Array::from_slice(&[(seed >> 32) as u32, seed as u32], &[2])
}

/// `count` keys from one: [count, 2].
pub fn split(key: &Array, count: usize) -> Result<Array> {
    bits(&[count, 2], 4, key)
}

/// Uniform bits in unsigned integers of `width` bytes: 1, 2 or 4.
pub fn bits(shape: &[usize], width: usize, key: &Array) -> Result<Array> {
    first_failure(&[key])?;
    if key.shape() != [2] || key.dtype() != Dtype::U32 {
        return Err(Error::invalid("random_bits", format!("a key is two uint32, got {key:?}")));
    }
    let dtype = match width {
        1 => Dtype::U8,
        2 => Dtype::U16,
        4 => Dtype::U32,
        _ => return Err(Error::invalid("random_bits", format!("a width of 1, 2 or 4 bytes, got {width}"))),
    };
    Ok(Array::lazy(Op::RandomBits { width }, smallvec![key.clone()], shape, dtype))
}

/// Uniform numbers in [low, high).
pub fn uniform(low: f32, high: f32, shape: &[usize], dtype: Dtype, key: &Array) -> Result<Array> {
    let upper = match dtype {
        Dtype::F32 => 1.0f32.next_down() as f64,
        Dtype::F16 => half::f16::from_bits(0x3bff).to_f64(),
        Dtype::BF16 => half::bf16::from_bits(0x3f7f).to_f64(),
        _ => return Err(Error::dtype("uniform", "float16, bfloat16 or float32", dtype)),
    };
    let low = Array::scalar(Scalar::Float(low as f64), dtype);
    let range = Array::scalar(Scalar::Float(high as f64), dtype).subtract(&low)?;
    let unit =
        bits(shape, 4, key)?.astype(Dtype::F32)?.divide(u32::MAX as f32)?.astype(dtype)?.minimum(upper)?;
    range.multiply(unit)?.add(low)
}

/// Normal numbers of mean 0 and deviation 1.
pub fn normal(shape: &[usize], dtype: Dtype, key: &Array) -> Result<Array> {
    let low = match dtype {
        Dtype::F32 => (-1.0f32).next_up(),
        Dtype::F16 => -half::f16::from_bits(0x3bff).to_f32(),
        Dtype::BF16 => -half::bf16::from_bits(0x3f7f).to_f32(),
        _ => return Err(Error::dtype("normal", "float16, bfloat16 or float32", dtype)),
    };
    uniform(low, 1.0, shape, dtype, key)?.unary(UnaryOp::ErfInv)?.multiply(std::f32::consts::SQRT_2)
}

/// true with probability `p`.
pub fn bernoulli(p: f32, shape: &[usize], key: &Array) -> Result<Array> {
    uniform(0.0, 1.0, shape, Dtype::F32, key)?.less(p)
}
