//! Positions: rotary, sinusoidal, and linear biases.

use mica_array::op::RopeSpec;
use mica_array::{Array, Dtype, Result};

use super::invalid;
use crate::{Context, Layer, module};

/// Rotary positions (Su et al. 2021) over [.., length, width].
#[derive(Clone, Copy, Debug)]
pub struct RoPE {
    /// How many of the features turn.
    pub dims: usize,
    /// Pairs are neighbours rather than halves. MLX's default is false.
    pub traditional: bool,
    /// Of the frequencies. MLX's default is 10,000.
    pub base: f32,
    /// Multiplies positions. MLX's default is 1.
    pub scale: f32,
}

module!(RoPE {});

impl RoPE {
    /// With MLX's defaults.
    pub fn new(dims: usize) -> RoPE {
        RoPE { dims, traditional: false, base: 10_000.0, scale: 1.0 }
    }

    /// The positions are offset, offset + 1, …
    pub fn at(&self, x: &Array, offset: usize) -> Result<Array> {
        if x.rank() < 2 || self.dims > x.dim(-1) || !self.dims.is_multiple_of(2) {
            let message = format!(
                "expected [.., length, width] with an even part of {} features, got {:?}",
                self.dims,
                x.shape()
            );
            return Err(invalid("RoPE", message));
        }
        let (length, width) = (x.dim(-2), x.dim(-1));
        let lead = x.size() / (length * width).max(1);
        let half = self.dims / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| (-(i as f64) / half as f64 * f64::from(self.base).ln()).exp() as f32 * self.scale)
            .collect();
        let frequencies = Array::from_slice(&frequencies, &[half])?;
        let positions = Array::arange(offset as f64, (offset + length) as f64, 1.0, Dtype::I32)?;
        let spec = RopeSpec { dims: self.dims, traditional: self.traditional, inverse: false, scale: 1.0 };
        x.reshape(&[lead as i64, length as i64, 1, width as i64])?
            .rope(&positions.broadcast_to(&[lead, length])?, &frequencies, spec)?
            .reshape(&x.shape().iter().map(|&size| size as i64).collect::<Vec<_>>())
    }
}

/// From position 0.
impl Layer for RoPE {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        self.at(x, 0)
    }
}

/// Sines and cosines of positions (Vaswani et al. 2017): [..] → [.., dims].
#[derive(Clone, Debug)]
pub struct SinusoidalPositionalEncoding {
    sigmas: Array,
    /// Multiplies the result.
    pub scale: f32,
    /// Cosines come before sines.
    pub cos_first: bool,
}

module!(SinusoidalPositionalEncoding {});

impl SinusoidalPositionalEncoding {
    /// Frequencies from `min_freq` to `max_freq`, times 2π if `full_turns`. `scale` is √(2/dims)
    /// if there is none. MLX's defaults are 1e-4, 1, none, false, false.
    pub fn new(
        dims: usize,
        min_freq: f64,
        max_freq: f64,
        scale: Option<f32>,
        cos_first: bool,
        full_turns: bool,
    ) -> Result<SinusoidalPositionalEncoding> {
        if dims == 0 || !dims.is_multiple_of(2) {
            let message = format!("dims must be positive and even, got {dims}");
            return Err(invalid("SinusoidalPositionalEncoding", message));
        }
        let half = dims / 2;
        let (low, high) = (min_freq.ln(), max_freq.ln());
        let turn = if full_turns { 2.0 * std::f64::consts::PI } else { 1.0 };
        let sigmas: Vec<f32> = (0..half)
            .map(|i| {
                let down = if half == 1 { 1.0 } else { 1.0 - i as f64 / (half - 1) as f64 };
                ((down * (high - low) + low).exp() * turn) as f32
            })
            .collect();
        let scale = scale.unwrap_or((2.0 / dims as f64).sqrt() as f32);
        Ok(SinusoidalPositionalEncoding { sigmas: Array::from_slice(&sigmas, &[half])?, scale, cos_first })
    }
}

impl Layer for SinusoidalPositionalEncoding {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        let angles = x.expand_dims(&[-1])?.multiply(&self.sigmas)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let y = Array::concatenate(&if self.cos_first { [cos, sin] } else { [sin, cos] }, -1)?;
        if self.scale == 1.0 { Ok(y) } else { y.multiply(self.scale) }
    }
}

/// Attention with linear biases (Press et al. 2021).
#[derive(Clone, Copy, Debug, Default)]
pub struct ALiBi;

module!(ALiBi {});

impl ALiBi {
    /// The slope of each head: [heads, 1, 1].
    pub fn slopes(heads: usize, dtype: Dtype) -> Result<Array> {
        fn of_power(heads: usize) -> Vec<f64> {
            let start = 2f64.powf(-(2f64.powf(3.0 - (heads as f64).log2())));
            (0..heads).map(|i| start * start.powi(i as i32)).collect()
        }
        if heads == 0 {
            return Err(invalid("ALiBi", "expected at least one head".to_string()));
        }
        let power = 1 << heads.ilog2();
        let mut slopes = of_power(power);
        slopes.extend(of_power(2 * power).into_iter().step_by(2).take(heads - power));
        let slopes: Vec<f32> = slopes.into_iter().map(|slope| slope as f32).collect();
        Array::from_slice(&slopes, &[heads, 1, 1])?.astype(dtype)
    }

    /// −|i − j| · slope for queries i from `offset` to `queries` and keys j:
    /// [1, heads, queries − offset, keys].
    pub fn matrix(queries: usize, keys: usize, heads: usize, offset: usize, dtype: Dtype) -> Result<Array> {
        let i = Array::arange(offset as f64, queries as f64, 1.0, Dtype::I32)?.expand_dims(&[1])?;
        let j = Array::arange(0.0, keys as f64, 1.0, Dtype::I32)?;
        let distance = i.subtract(j)?.abs()?.negative()?.expand_dims(&[0, 1])?;
        distance.multiply(ALiBi::slopes(heads, dtype)?)?.astype(dtype)
    }

    /// Adds the biases, and a mask, to scores [batch, heads, queries, keys].
    pub fn forward(&self, scores: &Array, offset: usize, mask: Option<&Array>) -> Result<Array> {
        if scores.rank() != 4 {
            let message = format!("expected scores [batch, heads, queries, keys], got {:?}", scores.shape());
            return Err(invalid("ALiBi", message));
        }
        let queries = scores.dim(2) + offset;
        let biases = ALiBi::matrix(queries, scores.dim(3), scores.dim(1), offset, scores.dtype())?;
        match mask {
            Some(mask) => scores.add(biases.add(mask)?),
            None => scores.add(biases),
        }
    }
}
