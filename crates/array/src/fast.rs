//! MLX's fused functions, in MLX's layout `[batch, heads, length, head_dim]`.

use crate::op::{AttentionSpec, Precision};
use crate::{Array, Result};

/// softmax(q · kᵀ · scale) · v for q [batch, heads, queries, head_dim] and k, v
/// [batch, kv_heads, keys, head_dim].
pub fn scaled_dot_product_attention(
    q: &Array,
    k: &Array,
    v: &Array,
    scale: f32,
    causal: bool,
) -> Result<Array> {
    let spec = AttentionSpec {
        scale,
        causal,
        window: None,
        softcap: None,
        key_start: false,
        precision: Precision::Exact,
    };
    let time_first = |x: &Array| x.swap_axes(1, 2);
    time_first(q)?.attention(&time_first(k)?, &time_first(v)?, None, spec)?.swap_axes(1, 2)
}
