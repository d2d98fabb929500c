//! The decoder that Llama-like families share: blocks of norm, attention, norm, feed-forward.

use std::sync::Arc;

use mica_array::kv::{KvFormat, KvSpec};
use mica_array::{Array, Dtype, Result};
use mica_nn::{Context, Embedding, Layer, Linear, Module, RmsNorm, join, module};

use crate::cache::Cache;
use crate::config::RopeConfig;
use crate::layers::attention::{self, Attention};
use crate::layers::mlp::{self, Activation, Mlp};
use crate::layers::rope::Rope;
use crate::models::{Input, LanguageModel, ModelInfo};
use crate::weights::{Source, head};

/// What a family's configuration says about the decoder.
#[derive(Debug, Clone)]
pub struct DecoderSpec {
    /// Sizes for everybody.
    pub info: ModelInfo,
    /// The attention of each layer.
    pub attention: Vec<attention::Shape>,
    /// Width inside the feed-forward block.
    pub intermediate: usize,
    /// Bias in the feed-forward block.
    pub mlp_bias: bool,
    /// Of the gate.
    pub activation: Activation,
    /// Of all norms.
    pub norm_eps: f32,
    /// Rotary positions.
    pub rope: RopeConfig,
}

/// A language model of decoder blocks.
#[derive(Debug)]
pub struct Decoder {
    model: Body,
    lm_head: Option<Linear>,
    info: ModelInfo,
}

module!(Decoder { model, lm_head });

#[derive(Debug)]
struct Body {
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
}

module!(Body { embed_tokens, layers, norm });

#[derive(Debug)]
struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

module!(Block { input_layernorm, self_attn, post_attention_layernorm, mlp });

impl Decoder {
    /// Takes all parameters from a source.
    pub fn new(spec: DecoderSpec, source: &mut dyn Source) -> crate::Result<Decoder> {
        let info = spec.info;
        let norm = |source: &mut dyn Source, name: String| -> crate::Result<RmsNorm> {
            let weight = source.tensor(&format!("{name}.weight"), &[info.hidden])?;
            Ok(RmsNorm::from_array(weight, spec.norm_eps))
        };
        let head_dim = spec.attention.first().map_or(0, |shape| shape.head_dim);
        let rope = Arc::new(Rope::new(&spec.rope, head_dim, info.max_positions)?);
        let embed_tokens =
            Embedding { weight: source.weight("model.embed_tokens", info.vocabulary, info.hidden)?.into() };
        let mut layers = Vec::with_capacity(spec.attention.len());
        for (index, shape) in spec.attention.into_iter().enumerate() {
            let path = format!("model.layers.{index}");
            let mlp_shape = (info.hidden, spec.intermediate);
            layers.push(Block {
                input_layernorm: norm(source, join(&path, "input_layernorm"))?,
                self_attn: Attention::new(
                    source,
                    &join(&path, "self_attn"),
                    shape,
                    rope.clone(),
                    index,
                    &attention::NAMES,
                )?,
                post_attention_layernorm: norm(source, join(&path, "post_attention_layernorm"))?,
                mlp: Mlp::new(
                    source,
                    &join(&path, "mlp"),
                    mlp_shape,
                    spec.mlp_bias,
                    spec.activation,
                    &mlp::NAMES,
                )?,
            });
        }
        let norm = norm(source, "model.norm".to_string())?;
        let lm_head = head(source, &info)?;
        Ok(Decoder { model: Body { embed_tokens, layers, norm }, lm_head, info })
    }
}

impl Block {
    fn forward(
        &self,
        x: &Array,
        input: &Input,
        cache: Option<&mut Cache>,
        context: &Context,
    ) -> Result<Array> {
        let normed = self.input_layernorm.forward(&context.saved(x)?, context)?;
        let attended = self.self_attn.forward(&context.saved(&normed)?, input, cache, context)?;
        let h = input.asked.of(x)?.add(attended)?;
        let normed = self.post_attention_layernorm.forward(&context.saved(&h)?, context)?;
        h.add(self.mlp.forward(&context.saved(&normed)?, context)?)
    }
}

impl LanguageModel for Decoder {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn hidden(&self, input: &Input, mut cache: Option<&mut Cache>, context: &Context) -> Result<Array> {
        let mut x = self.model.embed_tokens.rows(&input.tokens, Dtype::F32)?;
        let (layers, all) = (&self.model.layers, input.of_all());
        for (index, layer) in layers.iter().enumerate() {
            let input = if index + 1 < layers.len() { &all } else { input };
            let run = |x: &Array, cache: Option<&mut Cache>| layer.forward(x, input, cache, context);
            x = input.layer(index, x, cache.as_deref_mut(), run)?;
        }
        self.model.norm.forward(&x, context)
    }

    fn head(&self) -> &Array {
        self.lm_head.as_ref().map_or(&self.model.embed_tokens.weight, |head| &head.weight)
    }

    fn new_cache(&self, batch: usize, format: KvFormat) -> Cache {
        let info = &self.info;
        let spec = KvSpec {
            layers: self.model.layers.len(),
            kv_heads: info.kv_heads,
            head_dim: info.head_dim,
            format,
        };
        Cache::new(spec, batch, 0)
    }

    fn layers(&self) -> usize {
        self.model.layers.len()
    }

    fn linears(&mut self, layer: usize) -> Vec<(String, &mut Linear)> {
        let block = &mut self.model.layers[layer];
        let attention =
            block.self_attn.linears().into_iter().map(|(name, linear)| (join("self_attn", name), linear));
        let mlp = block.mlp.linears().into_iter().map(|(name, linear)| (join("mlp", name), linear));
        attention.chain(mlp).collect()
    }

    fn as_module(&self) -> &dyn Module {
        self
    }

    fn as_module_mut(&mut self) -> &mut dyn Module {
        self
    }
}
