//! Initializers: new arrays for parameters, with fans counted from MLX's layouts
//! (`[out, .., in]`).
//!
//! The random ones draw the numbers that MLX draws with the same key.

use mica_array::{Array, Dtype, Error, Result, random};

use crate::Keys;

fn invalid(op: &'static str, message: String) -> Error {
    Error::Invalid { op, message: message.into() }
}

/// The same value everywhere.
pub fn constant(shape: &[usize], value: f64, dtype: Dtype) -> Array {
    Array::full(shape, value, dtype)
}

/// Normal numbers.
pub fn normal(shape: &[usize], mean: f64, std: f64, dtype: Dtype, keys: &mut Keys) -> Result<Array> {
    let x = random::normal(shape, dtype, &keys.draw()?)?;
    let x = if std == 1.0 { x } else { x.multiply(std)? };
    if mean == 0.0 { Ok(x) } else { x.add(mean) }
}

/// Uniform numbers in [low, high).
pub fn uniform(shape: &[usize], low: f64, high: f64, dtype: Dtype, keys: &mut Keys) -> Result<Array> {
    random::uniform(low as f32, high as f32, shape, dtype, &keys.draw()?)
}

/// Ones on the diagonal of a square matrix, zeros elsewhere.
pub fn identity(shape: &[usize], dtype: Dtype) -> Result<Array> {
    let &[rows, columns] = shape else {
        return Err(invalid("identity", format!("expected a square matrix, got {shape:?}")));
    };
    if rows != columns {
        return Err(invalid("identity", format!("expected a square matrix, got {shape:?}")));
    }
    let places = Array::arange(0.0, rows as f64, 1.0, Dtype::I32)?;
    places.expand_dims(&[1])?.equal(&places)?.astype(dtype)
}

/// Values that go into an output, and outputs that a value goes into.
fn fans(op: &'static str, shape: &[usize]) -> Result<(f64, f64)> {
    let [out, field @ .., inputs] = shape else {
        return Err(invalid(op, format!("expected at least two dimensions, got {shape:?}")));
    };
    let field: usize = field.iter().product();
    Ok(((inputs * field) as f64, (out * field) as f64))
}

/// Normal with the deviation gain · √(2 / (fan in + fan out)) (Glorot & Bengio 2010).
pub fn glorot_normal(shape: &[usize], gain: f64, dtype: Dtype, keys: &mut Keys) -> Result<Array> {
    let (inputs, outputs) = fans("glorot_normal", shape)?;
    normal(shape, 0.0, gain * (2.0 / (inputs + outputs)).sqrt(), dtype, keys)
}

/// Uniform in ± gain · √(6 / (fan in + fan out)) (Glorot & Bengio 2010).
pub fn glorot_uniform(shape: &[usize], gain: f64, dtype: Dtype, keys: &mut Keys) -> Result<Array> {
    let (inputs, outputs) = fans("glorot_uniform", shape)?;
    let bound = gain * (6.0 / (inputs + outputs)).sqrt();
    uniform(shape, -bound, bound, dtype, keys)
}

/// Which connections the He initializers count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Fan {
    /// Into an output: keeps the size of activations.
    #[default]
    In,
    /// Out of a value: keeps the size of gradients.
    Out,
}

impl Fan {
    fn of(self, op: &'static str, shape: &[usize]) -> Result<f64> {
        let (inputs, outputs) = fans(op, shape)?;
        Ok(if self == Fan::In { inputs } else { outputs })
    }
}

/// Normal with the deviation gain / √fan (He et al. 2015).
pub fn he_normal(shape: &[usize], fan: Fan, gain: f64, dtype: Dtype, keys: &mut Keys) -> Result<Array> {
    normal(shape, 0.0, gain / fan.of("he_normal", shape)?.sqrt(), dtype, keys)
}

/// Uniform in ± gain · √(3 / fan) (He et al. 2015).
pub fn he_uniform(shape: &[usize], fan: Fan, gain: f64, dtype: Dtype, keys: &mut Keys) -> Result<Array> {
    let bound = gain * (3.0 / fan.of("he_uniform", shape)?).sqrt();
    uniform(shape, -bound, bound, dtype, keys)
}

/// A matrix of normal numbers in which each row has the same share of zeros, at random places.
///
/// # Errors
/// If the shape is no matrix or the sparsity not in [0, 1]. Reads values: not for traced functions.
pub fn sparse(
    shape: &[usize],
    sparsity: f64,
    mean: f64,
    std: f64,
    dtype: Dtype,
    keys: &mut Keys,
) -> Result<Array> {
    let &[rows, columns] = shape else {
        return Err(invalid("sparse", format!("expected two dimensions, got {shape:?}")));
    };
    if !(0.0..=1.0).contains(&sparsity) {
        return Err(invalid("sparse", format!("expected a sparsity in [0, 1], got {sparsity}")));
    }
    let zeros = (sparsity * columns as f64).ceil() as usize;
    let draws = uniform(shape, 0.0, 1.0, Dtype::F32, keys)?.to_vec::<f32>()?;
    let mut keep = vec![true; rows * columns];
    for row in 0..rows {
        let mut order: Vec<usize> = (row * columns..(row + 1) * columns).collect();
        order.sort_by(|&a, &b| draws[a].total_cmp(&draws[b]));
        for &place in &order[..zeros] {
            keep[place] = false;
        }
    }
    let values = normal(shape, mean, std, dtype, keys)?;
    Array::select(&Array::from_slice(&keep, shape)?, &values, Array::zeros(&[], dtype))
}

/// A matrix whose rows or columns, whichever are fewer, are orthogonal and `gain` long.
///
/// # Errors
/// If the shape is no matrix. Reads values: not for traced functions.
pub fn orthogonal(shape: &[usize], gain: f64, dtype: Dtype, keys: &mut Keys) -> Result<Array> {
    let &[rows, columns] = shape else {
        return Err(invalid("orthogonal", format!("expected two dimensions, got {shape:?}")));
    };
    let size = rows.max(columns);
    let draws = normal(&[size, size], 0.0, 1.0, Dtype::F32, keys)?.transpose(&[])?.to_vec::<f32>()?;
    let mut q: Vec<f64> = draws.into_iter().map(f64::from).collect();
    orthogonalize(&mut q, size);
    let q: Vec<f32> = q.into_iter().map(|value| value as f32).collect();
    let q = Array::from_slice(&q, &[size, size])?.transpose(&[])?;
    q.narrow(0, 0, rows)?.narrow(1, 0, columns)?.multiply(gain)?.astype(dtype)
}

/// Gram-Schmidt over rows, twice, which leaves them orthogonal to the last bits. It gives the Q of
/// a QR decomposition whose R has a positive diagonal.
fn orthogonalize(rows: &mut [f64], size: usize) {
    for row in 0..size {
        let (before, rest) = rows.split_at_mut(row * size);
        let this = &mut rest[..size];
        for _ in 0..2 {
            for other in before.chunks_exact(size) {
                let along: f64 = this.iter().zip(other).map(|(a, b)| a * b).sum();
                this.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
        }
        let length = this.iter().map(|a| a * a).sum::<f64>().sqrt();
        this.iter_mut().for_each(|a| *a /= length);
    }
}
