//! The norm of all gradients together, and keeping it in bounds.

use mica_array::{Array, Dtype, Error, Result};

/// The square root of the sum of squares over all gradients, f32.
pub fn global_norm<'a>(grads: impl IntoIterator<Item = &'a Array>) -> Result<Array> {
    let mut sum: Option<Array> = None;
    for grad in grads {
        let square = grad.astype(Dtype::F32)?.square()?.sum(&[], false)?;
        sum = Some(match sum {
            Some(before) => before.add(square)?,
            None => square,
        });
    }
    sum.unwrap_or_else(|| Array::zeros(&[], Dtype::F32)).sqrt()
}

/// Scales all gradients down together if their norm is above `max_norm`. Gives them and the norm
/// that they had.
///
/// # Errors
/// If `max_norm` is negative.
pub fn clip_grad_norm(grads: &[(String, Array)], max_norm: f64) -> Result<(Vec<(String, Array)>, Array)> {
    if max_norm.is_nan() || max_norm < 0.0 {
        let message = format!("max_norm must be at least 0, got {max_norm}");
        return Err(Error::Invalid { op: "clip_grad_norm", message: message.into() });
    }
    let norm = global_norm(grads.iter().map(|(_, grad)| grad))?;
    let scale = norm.add(1e-6)?.reciprocal()?.multiply(max_norm)?.minimum(1.0)?;
    let clipped = grads
        .iter()
        .map(|(name, grad)| Ok((name.clone(), grad.multiply(&scale)?.astype(grad.dtype())?)))
        .collect::<Result<_>>()?;
    Ok((clipped, norm))
}
