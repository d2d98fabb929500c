//! Where a model's parameters come from.

mod files;
mod random;

pub use files::{FileSource, Packing};
pub(crate) use files::{bad_codes, not_finite, read_finite};
pub use random::RandomSource;

use mica_array::Array;
use mica_nn::Linear;

use crate::Result;
use crate::models::ModelInfo;

/// Gives parameters by name, checked for shape.
pub trait Source {
    /// Whether there is a tensor of this name.
    fn has(&self, name: &str) -> bool;

    /// A plain tensor.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Array> {
        self.tensor_any(name, &[shape])
    }

    /// A plain tensor that has one of several shapes.
    fn tensor_any(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Array>;

    /// The weight [out, in] of a linear layer or an embedding at `path`: `path.weight`, with
    /// `path.scales` and `path.biases` where it is quantized.
    fn weight(&mut self, path: &str, out: usize, inputs: usize) -> Result<Array>;
}

/// A linear layer at `path`.
pub fn linear(source: &mut dyn Source, path: &str, out: usize, inputs: usize, bias: bool) -> Result<Linear> {
    let weight = source.weight(path, out, inputs)?;
    let bias = if bias { Some(source.tensor(&format!("{path}.bias"), &[out])?) } else { None };
    Ok(Linear::from_arrays(weight, bias))
}

/// The output head, unless it is the embedding. A head in the file wins over `tie_word_embeddings`.
pub fn head(source: &mut dyn Source, info: &ModelInfo) -> Result<Option<Linear>> {
    if info.tied && !source.has("lm_head.weight") {
        return Ok(None);
    }
    Ok(Some(linear(source, "lm_head", info.vocabulary, info.hidden, false)?))
}
