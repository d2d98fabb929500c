//! Layers that every model uses: linear maps (with adapters), embeddings, norms.

use mica_array::{Array, Dtype, Result};

use crate::{Context, module};

/// y = x · weightᵀ + bias, plus what an adapter adds.
#[derive(Debug, Clone)]
pub struct Linear {
    /// [out, in], plain or packed.
    pub weight: Array,
    /// [out]
    pub bias: Option<Array>,
    /// A low-rank addition that is trained while the weight is frozen.
    pub adapter: Option<Adapter>,
}

module!(Linear { weight, bias, adapter as "" });

/// y += scale · (x · a) · b, and DoRA's magnitude.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// [in, rank]
    pub a: Array,
    /// [rank, out]
    pub b: Array,
    /// Multiplies the product.
    pub scale: f32,
    /// Share of inputs that are zeroed while training.
    pub dropout: f32,
    /// DoRA: the length of each row of the merged weight, [out].
    pub magnitude: Option<Array>,
}

module!(Adapter { a as "lora_a", b as "lora_b", magnitude as "m" });

impl Linear {
    /// A layer without an adapter.
    pub fn new(weight: Array, bias: Option<Array>) -> Linear {
        Linear { weight, bias, adapter: None }
    }

    /// [.., in] → [.., out]
    pub fn forward(&self, x: &Array, context: &Context) -> Result<Array> {
        let base = x.linear(&self.weight, None, context.precision)?;
        let y = match &self.adapter {
            None => base,
            Some(adapter) => adapter.apply(x, &base, &self.weight, context)?,
        };
        match &self.bias {
            Some(bias) => y.add(bias.astype(y.dtype())?),
            None => Ok(y),
        }
    }

    /// The weight with its adapter merged in, as a plain f32 array.
    pub fn merged(&self) -> Result<Array> {
        let weight = self.weight.dequantize_to(Dtype::F32)?;
        let Some(adapter) = &self.adapter else { return Ok(weight) };
        let sum = weight.add(adapter.delta()?)?;
        match &adapter.magnitude {
            None => Ok(sum),
            Some(magnitude) => {
                let norm = row_norm(&sum)?;
                sum.multiply(magnitude.astype(Dtype::F32)?.divide(norm)?.expand_dims(&[1])?)
            }
        }
    }
}

impl Adapter {
    /// scale · (a · b)ᵀ: what is added to the weight, [out, in] f32.
    fn delta(&self) -> Result<Array> {
        let product = self.b.transpose(&[])?.matmul(&self.a.transpose(&[])?)?;
        product.astype(Dtype::F32)?.multiply(self.scale)
    }

    fn apply(&self, x: &Array, base: &Array, weight: &Array, context: &Context) -> Result<Array> {
        let dropped = context.dropout(x, self.dropout)?;
        let flat = dropped.reshape(&[-1, x.dim(-1) as i64])?;
        let (a, b) = (self.a.astype(x.dtype())?, self.b.astype(x.dtype())?);
        let low = flat.matmul_with(&a, context.precision)?.matmul_with(&b, context.precision)?;
        let y = base.add(low.multiply(self.scale)?.reshape(&shape_of(base))?)?;
        match &self.magnitude {
            None => Ok(y),
            Some(magnitude) => {
                // The norm is a constant of the step (DoRA, section 4.3).
                let merged = weight.dequantize_to(Dtype::F32)?.add(self.delta()?)?;
                let norm = row_norm(&merged)?.stop_gradient()?;
                y.multiply(magnitude.astype(Dtype::F32)?.divide(norm)?.astype(y.dtype())?)
            }
        }
    }
}

fn shape_of(array: &Array) -> Vec<i64> {
    array.shape().iter().map(|&size| size as i64).collect()
}

/// ‖row‖₂ of [out, in]: [out].
fn row_norm(weight: &Array) -> Result<Array> {
    weight.square()?.sum(&[1], false)?.sqrt()
}

/// Rows of a table by index.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// [rows, width], plain or packed.
    pub weight: Array,
}

module!(Embedding { weight });

impl Embedding {
    /// indices [..] → [.., width], f32: the residual stream's dtype.
    pub fn forward(&self, indices: &Array) -> Result<Array> {
        Array::embedding(&self.weight, indices, Dtype::F32)
    }
}

/// x / rms(x) · weight.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// [width]
    pub weight: Array,
    /// Added to the mean square.
    pub eps: f32,
}

module!(RmsNorm { weight });

impl RmsNorm {
    /// Over the last axis.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        x.rms_norm(&self.weight, self.eps)
    }
}
