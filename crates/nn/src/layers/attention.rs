//! Attention of several heads, with projections around it.

use mica_array::fast::AttentionMask;
use mica_array::{Array, Dtype, Result, fast};

use super::invalid;
use crate::{Context, Keys, Layer, Linear, module};

/// softmax(q · kᵀ / √d + mask) · v per head (Vaswani et al. 2017).
#[derive(Clone, Debug)]
pub struct MultiHeadAttention {
    /// To the queries of all heads.
    pub query_proj: Linear,
    /// To the keys of all heads.
    pub key_proj: Linear,
    /// To the values of all heads.
    pub value_proj: Linear,
    /// From what the heads give.
    pub out_proj: Linear,
    /// How many heads.
    pub num_heads: usize,
}

module!(MultiHeadAttention { query_proj, key_proj, value_proj, out_proj });

impl MultiHeadAttention {
    /// All widths are `dims`.
    pub fn new(dims: usize, num_heads: usize, bias: bool, keys: &mut Keys) -> Result<MultiHeadAttention> {
        MultiHeadAttention::with_widths(dims, num_heads, [dims; 3], dims, dims, bias, keys)
    }

    /// `inputs` are the widths of queries, keys and values before their projections, `value_dims`
    /// that of all heads' values, `output_dims` that of the result.
    pub fn with_widths(
        dims: usize,
        num_heads: usize,
        inputs: [usize; 3],
        value_dims: usize,
        output_dims: usize,
        bias: bool,
        keys: &mut Keys,
    ) -> Result<MultiHeadAttention> {
        if num_heads == 0 || !dims.is_multiple_of(num_heads) || !value_dims.is_multiple_of(num_heads) {
            let message = format!("{dims} and {value_dims} features must go evenly into {num_heads} heads");
            return Err(invalid("MultiHeadAttention", message));
        }
        Ok(MultiHeadAttention {
            query_proj: Linear::new(inputs[0], dims, bias, keys)?,
            key_proj: Linear::new(inputs[1], dims, bias, keys)?,
            value_proj: Linear::new(inputs[2], value_dims, bias, keys)?,
            out_proj: Linear::new(value_dims, output_dims, bias, keys)?,
            num_heads,
        })
    }

    /// Shapes: [batch, length, width]. A mask broadcasts to [batch, heads, queries, keys]: bool,
    /// where true is seen, or floats to be added to the scores.
    pub fn forward(
        &self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        mask: Option<&Array>,
        context: &Context,
    ) -> Result<Array> {
        let heads = |projection: &Linear, x: &Array| -> Result<Array> {
            let y = projection.forward(x, context)?;
            if y.rank() != 3 {
                let message = format!("expected [batch, length, width], got {:?}", x.shape());
                return Err(invalid("MultiHeadAttention", message));
            }
            y.unflatten(-1, &[self.num_heads as i64, -1])?.swap_axes(1, 2)
        };
        let q = heads(&self.query_proj, queries)?;
        let k = heads(&self.key_proj, keys)?;
        let v = heads(&self.value_proj, values)?;
        let scale = (1.0 / q.dim(-1) as f64).sqrt() as f32;
        let mask = mask.map_or(AttentionMask::None, AttentionMask::Array);
        let out = fast::scaled_dot_product_attention(&q, &k, &v, scale, mask, None)?;
        self.out_proj.forward(&out.swap_axes(1, 2)?.flatten_axes(-2, -1)?, context)
    }

    /// 0 where a query may look, the smallest float where not: [length, length].
    pub fn causal_mask(length: usize, dtype: Dtype) -> Result<Array> {
        let lowest = match dtype {
            Dtype::F16 => -65504.0,
            Dtype::BF16 => half::bf16::MIN.to_f64(),
            Dtype::F32 => f64::from(f32::MIN),
            _ => {
                let message = format!("expected float16, bfloat16 or float32, got {dtype}");
                return Err(invalid("causal_mask", message));
            }
        };
        let places = Array::arange(0.0, length as f64, 1.0, Dtype::I32)?;
        places.expand_dims(&[1])?.less(&places)?.astype(dtype)?.multiply(lowest)
    }
}
