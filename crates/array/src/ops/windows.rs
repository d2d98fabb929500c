//! Evenly spaced numbers, and window functions.

use std::f64::consts::PI;

use crate::{Array, Dtype, Error, Result};

impl Array {
    /// `count` numbers from `start` to `stop` at equal distances; without `endpoint` the last one
    /// is a distance before `stop`.
    pub fn linspace(start: f64, stop: f64, count: usize, endpoint: bool, dtype: Dtype) -> Result<Array> {
        if !start.is_finite() || !stop.is_finite() {
            return Err(Error::invalid("linspace", format!("needs finite numbers, got {start} and {stop}")));
        }
        let steps = if endpoint { count.saturating_sub(1) } else { count };
        let compute = if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
        if count <= 1 {
            return Array::full(&[count], start, compute).astype(dtype);
        }
        let t = Array::arange(0.0, count as f64, 1.0, compute)?.divide(steps as f64)?;
        t.negative()?.add(1.0)?.multiply(start)?.add(t.multiply(stop)?)?.astype(dtype)
    }

    /// The Bartlett window (a triangle) of so many points: f32.
    pub fn bartlett(points: usize) -> Result<Array> {
        let half = points.saturating_sub(1) as f64 / 2.0;
        window(points, |n| {
            let distance = n.subtract(half)?.abs()?.multiply(1.0 / half)?;
            distance.negative()?.add(1.0)
        })
    }

    /// The Hanning window of so many points: f32.
    pub fn hanning(points: usize) -> Result<Array> {
        cosines(points, &[0.5, -0.5])
    }

    /// The Hamming window of so many points: f32.
    pub fn hamming(points: usize) -> Result<Array> {
        cosines(points, &[0.54, -0.46])
    }

    /// The Blackman window of so many points: f32.
    pub fn blackman(points: usize) -> Result<Array> {
        cosines(points, &[0.42, -0.5, 0.08])
    }
}

fn window(points: usize, f: impl Fn(&Array) -> Result<Array>) -> Result<Array> {
    if points <= 1 {
        return Ok(Array::ones(&[points], Dtype::F32));
    }
    f(&Array::arange(0.0, points as f64, 1.0, Dtype::F32)?)
}

/// Σ c · cos(2πkn / (points − 1)) over the coefficients c, k = 0, 1 …
fn cosines(points: usize, coefficients: &[f64]) -> Result<Array> {
    window(points, |n| {
        let mut sum = Array::full(&[], coefficients[0], Dtype::F32);
        for (k, &coefficient) in coefficients.iter().enumerate().skip(1) {
            let angle = n.multiply(2.0 * PI * k as f64 / (points - 1) as f64)?;
            sum = sum.add(angle.cos()?.multiply(coefficient)?)?;
        }
        Ok(sum)
    })
}
