//! Self-attention with grouped queries, rotary positions, optional head norms and a window.

use std::sync::Arc;

use mica_array::kv::PagedSpec;
use mica_array::op::AttentionSpec;
use mica_array::{Array, Precision, Result};
use mica_nn::{Context, Item, ItemMut, Layer, Linear, Module, RmsNorm, join};

use crate::cache::Cache;
use crate::layers::rope::Rope;
use crate::models::Input;
use crate::weights::{Source, linear};

/// What the parameters are called in files.
#[derive(Debug)]
pub struct Names {
    /// Output projection.
    pub output: &'static str,
    /// Norm of each query head.
    pub q_norm: &'static str,
    /// Norm of each key head.
    pub k_norm: &'static str,
}

/// The names of most families.
pub const NAMES: Names = Names { output: "o_proj", q_norm: "q_norm", k_norm: "k_norm" };

/// Sizes and options of an attention layer.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Bias on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub output_bias: bool,
    /// RMS norm of each query and key head, with this eps.
    pub head_norm: Option<f32>,
    /// A query sees itself and the `window − 1` keys before it.
    pub window: Option<usize>,
}

/// softmax(q · kᵀ / √d) · v with projections around it.
#[derive(Debug)]
pub struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    shape: Shape,
    rope: Arc<Rope>,
    /// Which of the cache's layers this is.
    cache_layer: usize,
    names: &'static Names,
}

impl Module for Attention {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        see(name, Item::Module(self));
        self.q.visit(&join(name, "q_proj"), see);
        self.k.visit(&join(name, "k_proj"), see);
        self.v.visit(&join(name, "v_proj"), see);
        self.output.visit(&join(name, self.names.output), see);
        self.q_norm.visit(&join(name, self.names.q_norm), see);
        self.k_norm.visit(&join(name, self.names.k_norm), see);
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        see(name, ItemMut::Module(self));
        self.q.visit_mut(&join(name, "q_proj"), see);
        self.k.visit_mut(&join(name, "k_proj"), see);
        self.v.visit_mut(&join(name, "v_proj"), see);
        self.output.visit_mut(&join(name, self.names.output), see);
        self.q_norm.visit_mut(&join(name, self.names.q_norm), see);
        self.k_norm.visit_mut(&join(name, self.names.k_norm), see);
    }
}

impl Attention {
    /// Takes the parameters under `path` from a source.
    pub fn new(
        source: &mut dyn Source,
        path: &str,
        shape: Shape,
        rope: Arc<Rope>,
        cache_layer: usize,
        names: &'static Names,
    ) -> crate::Result<Attention> {
        let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let norm = |source: &mut dyn Source, field: &str| -> crate::Result<Option<RmsNorm>> {
            shape
                .head_norm
                .map(|eps| {
                    let weight = source.tensor(&format!("{path}.{field}.weight"), &[shape.head_dim])?;
                    Ok(RmsNorm::from_array(weight, eps))
                })
                .transpose()
        };
        Ok(Attention {
            q: linear(source, &join(path, "q_proj"), queries, shape.hidden, shape.qkv_bias)?,
            k: linear(source, &join(path, "k_proj"), keys, shape.hidden, shape.qkv_bias)?,
            v: linear(source, &join(path, "v_proj"), keys, shape.hidden, shape.qkv_bias)?,
            output: linear(source, &join(path, names.output), shape.hidden, queries, shape.output_bias)?,
            q_norm: norm(source, names.q_norm)?,
            k_norm: norm(source, names.k_norm)?,
            shape,
            rope,
            cache_layer,
            names,
        })
    }

    /// The projections, by name, for adapters.
    pub fn linears(&mut self) -> [(&'static str, &mut Linear); 4] {
        [
            ("q_proj", &mut self.q),
            ("k_proj", &mut self.k),
            ("v_proj", &mut self.v),
            (self.names.output, &mut self.output),
        ]
    }

    /// x [batch, length, hidden] → the same shape, or the positions that are asked for.
    pub fn forward(
        &self,
        x: &Array,
        input: &Input,
        cache: Option<&mut Cache>,
        context: &Context,
    ) -> Result<Array> {
        let shape = &self.shape;
        let heads = |y: Array, count: usize, norm: &Option<RmsNorm>| -> Result<Array> {
            let y = y.unflatten(-1, &[count as i64, shape.head_dim as i64])?;
            match norm {
                Some(norm) => norm.forward(&context.saved(&y)?, context),
                None => Ok(y),
            }
        };
        let q = heads(self.q.forward(x, context)?, shape.heads, &self.q_norm)?;
        let k = heads(self.k.forward(x, context)?, shape.kv_heads, &self.k_norm)?;
        let v = heads(self.v.forward(x, context)?, shape.kv_heads, &None)?;
        let q = self.rope.forward(&q, &input.positions)?;
        let k = self.rope.forward(&k, &input.positions)?;
        let scale = (shape.head_dim as f32).powf(-0.5);
        let precision = attention_precision(context.precision);
        let out = match cache {
            Some(cache) => {
                let spec = PagedSpec { scale, window: shape.window, softcap: None, precision };
                cache.kv.attend(self.cache_layer, &q, &k, &v, spec)?
            }
            None => {
                let spec = AttentionSpec {
                    scale,
                    causal: true,
                    window: shape.window,
                    softcap: None,
                    key_start: false,
                    precision,
                };
                let (q, k, v) = (context.saved(&q)?, context.saved(&k)?, context.saved(&v)?);
                context.saved(&q.attention(&k, &v, input.key_start.as_ref(), spec)?)?
            }
        };
        self.output.forward(&input.asked.of(&out)?.flatten_axes(2, 3)?, context)
    }
}

/// Attention has no int8 form: fast means bf16.
fn attention_precision(precision: Precision) -> Precision {
    if precision == Precision::Fast { Precision::Bf16 } else { precision }
}
