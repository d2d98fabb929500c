//! A table of vectors.

use mica_array::quantized::QuantSpec;
use mica_array::{Array, Dtype, Result};

use super::quantized::pack;
use super::{LayerQuantization, QuantizedEmbedding, invalid};
use crate::{Context, Keys, Layer, Parameter, Role, init, module};

/// Rows of a table by index.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// [rows, width], plain or packed.
    pub weight: Parameter,
}

module!(Embedding { weight }
    fn can_quantize(&self) -> bool {
        self.weight.packed().is_none()
    }

    fn quantize(&mut self, format: QuantSpec) -> Result<()> {
        self.weight = Parameter::new(pack(&self.weight, format)?, Role::Frozen);
        Ok(())
    }
);

impl Embedding {
    /// A new table, normal with deviation 1/√dims.
    pub fn new(num_embeddings: usize, dims: usize, keys: &mut Keys) -> Result<Embedding> {
        let deviation = (1.0 / dims as f64).sqrt();
        Ok(Embedding {
            weight: init::normal(&[num_embeddings, dims], 0.0, deviation, Dtype::F32, keys)?.into(),
        })
    }

    /// The rows as `dtype`: indices [..] → [.., width].
    pub fn rows(&self, indices: &Array, dtype: Dtype) -> Result<Array> {
        Array::embedding(&self.weight, indices, dtype)
    }

    /// x · weightᵀ, for an output head that shares the table: [.., width] → [.., rows].
    pub fn as_linear(&self, x: &Array, context: &Context) -> Result<Array> {
        x.linear(&self.weight, None, context.precision)
    }
}

/// indices [..] → [.., width] in the table's dtype.
impl Layer for Embedding {
    fn forward(&self, indices: &Array, _: &Context) -> Result<Array> {
        self.rows(indices, self.weight.dtype())
    }

    fn has_quantized_form(&self) -> bool {
        self.weight.packed().is_none()
    }

    fn to_quantized(&self, how: LayerQuantization) -> Result<Box<dyn Layer>> {
        if how.quantize_input {
            return Err(invalid(
                "to_quantized",
                "an Embedding's inputs are indices, not to be quantized".into(),
            ));
        }
        Ok(Box::new(QuantizedEmbedding::from_embedding(self, how.format)?))
    }
}
