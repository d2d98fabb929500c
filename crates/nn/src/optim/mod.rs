//! Optimizers: from parameters and gradients to parameters.
//!
//! An optimizer owns its state, by parameter name, and hands it out and takes it back for
//! checkpoints.

mod adamw;

pub use adamw::{AdamW, AdamWConfig};

use mica_array::{Array, Dtype, Result};

/// The square root of the sum of squares over all gradients, f32.
pub fn global_norm(grads: &[Array]) -> Result<Array> {
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
