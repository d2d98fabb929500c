//! What a forward pass needs to know besides its inputs.

use std::cell::RefCell;

use mica_array::{Array, Dtype, Precision, Result, random};

/// How to compute a forward pass.
#[derive(Debug, Default)]
pub struct Context {
    /// Of the products.
    pub precision: Precision,
    /// The key of the next random numbers, while training with dropout.
    key: Option<RefCell<Array>>,
}

impl Context {
    /// Without randomness.
    pub fn new(precision: Precision) -> Context {
        Context { precision, key: None }
    }

    /// For a training step: dropout draws from this key.
    pub fn training(precision: Precision, key: Array) -> Context {
        Context { precision, key: Some(RefCell::new(key)) }
    }

    /// Zeroes values with probability `rate` and scales the others up; only while training.
    pub fn dropout(&self, x: &Array, rate: f32) -> Result<Array> {
        let Some(key) = self.key.as_ref().filter(|_| rate > 0.0) else { return Ok(x.clone()) };
        let keys = random::split(&key.borrow(), 2)?;
        let draw = keys.narrow(0, 1, 2)?.reshape(&[2])?;
        *key.borrow_mut() = keys.narrow(0, 0, 1)?.reshape(&[2])?;
        let keep = random::bernoulli(1.0 - rate, x.shape(), &draw)?;
        x.multiply(keep.astype(Dtype::F32)?.multiply(1.0 / (1.0 - rate))?.astype(x.dtype())?)
    }
}
