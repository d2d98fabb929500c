//! What a forward pass needs to know besides its inputs, and where random numbers come from.

use std::cell::RefCell;

use mica_array::{Array, Dtype, Precision, Result, random};

/// Keys for random numbers, one after another: the sequence of MLX's global state.
///
/// After `mlx.core.random.seed(s)`, the n-th draw there has the key that `Keys::new(s)` gives n-th.
#[derive(Debug, Clone)]
pub struct Keys {
    key: Array,
}

impl Keys {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Result<Keys> {
        Ok(Keys { key: random::key(seed)? })
    }

    /// The sequence that starts at a key.
    pub fn from_key(key: Array) -> Keys {
        Keys { key }
    }

    /// The next key.
    pub fn draw(&mut self) -> Result<Array> {
        let keys = random::split(&self.key, 2)?;
        self.key = keys.narrow(0, 0, 1)?.reshape(&[2])?;
        keys.narrow(0, 1, 2)?.reshape(&[2])
    }
}

/// How to compute a forward pass. A context for training is what MLX's `module.train()` is, the
/// default what `module.eval()` is: dropout and batch norm look at it.
#[derive(Debug, Default)]
pub struct Context {
    /// Of the products.
    pub precision: Precision,
    /// Where random numbers come from, while training.
    keys: Option<RefCell<Keys>>,
}

impl Context {
    /// Without randomness.
    pub fn new(precision: Precision) -> Context {
        Context { precision, keys: None }
    }

    /// For a training step: dropout draws from this key.
    pub fn training(precision: Precision, key: Array) -> Context {
        Context { precision, keys: Some(RefCell::new(Keys::from_key(key))) }
    }

    /// Whether this is a training step.
    pub fn is_training(&self) -> bool {
        self.keys.is_some()
    }

    /// The same values; while training with bf16 products, gradients are given a copy in bf16, so that no more than that
    /// is kept for them (see [`Array::saved_as`]): for inputs of norms, products and activations, and what attention
    /// takes and gives.
    pub fn saved(&self, x: &Array) -> Result<Array> {
        match (self.is_training(), self.precision) {
            (true, Precision::Bf16) => x.saved_as(Dtype::BF16),
            _ => Ok(x.clone()),
        }
    }

    /// Zeroes values with probability `rate` and scales the others up; only while training.
    pub fn dropout(&self, x: &Array, rate: f32) -> Result<Array> {
        self.dropout_shaped(x, rate, x.shape())
    }

    /// [`Context::dropout`] with one draw for all that `shape` broadcasts to.
    pub(crate) fn dropout_shaped(&self, x: &Array, rate: f32, shape: &[usize]) -> Result<Array> {
        let Some(keys) = self.keys.as_ref().filter(|_| rate > 0.0) else { return Ok(x.clone()) };
        let key = keys.borrow_mut().draw()?;
        let keep = random::bernoulli(1.0 - rate, shape, &key)?;
        x.multiply(keep.astype(Dtype::F32)?.multiply(1.0 / (1.0 - rate))?.astype(x.dtype())?)
    }
}
