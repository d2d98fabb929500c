//! Rotary positions of a model: frequencies computed once.

use mica_array::op::RopeSpec;
use mica_array::{Array, Result};

use crate::config::{RopeConfig, RopeFrequencies};

/// Frequencies and how to apply them.
#[derive(Debug, Clone)]
pub struct Rope {
    /// [dims / 2]
    frequencies: Array,
    spec: RopeSpec,
}

impl Rope {
    /// For heads of this width, in a model made for `max_positions`.
    pub fn new(config: &RopeConfig, head_dim: usize, max_positions: usize) -> crate::Result<Rope> {
        let RopeFrequencies { inv_freq, attention_factor } = config.frequencies(head_dim, max_positions)?;
        Ok(Rope {
            frequencies: Array::from_slice(&inv_freq, &[inv_freq.len()])?,
            spec: RopeSpec {
                dims: 2 * inv_freq.len(),
                traditional: false,
                inverse: false,
                scale: attention_factor,
            },
        })
    }

    /// x [batch, length, heads, head_dim], positions [batch, length].
    pub fn forward(&self, x: &Array, positions: &Array) -> Result<Array> {
        x.rope(positions, &self.frequencies, self.spec.clone())
    }
}
