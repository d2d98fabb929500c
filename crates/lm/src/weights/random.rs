//! Parameters drawn at random: a new model.

use mica_array::{Array, Dtype, random};

use super::Source;
use crate::Result;

/// Seeded initial values: linear weights and embeddings normal with deviation `deviation`, norms
/// one, biases zero.
pub struct RandomSource {
    key: Array,
    deviation: f32,
    dtype: Dtype,
}

impl RandomSource {
    /// Values that depend on the seed and on the order in which they are asked for.
    pub fn new(seed: u64, deviation: f32, dtype: Dtype) -> Result<RandomSource> {
        Ok(RandomSource { key: random::key(seed)?, deviation, dtype })
    }

    fn normal(&mut self, shape: &[usize]) -> Result<Array> {
        let keys = random::split(&self.key, 2)?;
        let draw = keys.narrow(0, 1, 2)?.reshape(&[2])?;
        self.key = keys.narrow(0, 0, 1)?.reshape(&[2])?;
        let values =
            random::normal(shape, Dtype::F32, &draw)?.multiply(self.deviation)?.astype(self.dtype)?;
        values.eval()?;
        Ok(values)
    }
}

impl Source for RandomSource {
    fn has(&self, _: &str) -> bool {
        false
    }

    fn tensor_any(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Array> {
        let shape = shapes[0];
        if name.ends_with("bias") {
            Ok(Array::zeros(shape, self.dtype))
        } else if shape.len() == 1 {
            Ok(Array::ones(shape, self.dtype))
        } else {
            self.normal(shape)
        }
    }

    fn weight(&mut self, _: &str, out: usize, inputs: usize) -> Result<Array> {
        self.normal(&[out, inputs])
    }
}
