//! LFM2 (Liquid AI 2025): gated short convolutions, with attention in some layers.

use std::sync::Arc;

use mica_array::kv::{KvFormat, KvSpec};
use mica_array::{Array, Dtype};
use mica_nn::{Context, Embedding, Layer, Linear, Module, RmsNorm, join, module};

use super::reader::Reader;
use super::{Input, LanguageModel, ModelInfo};
use crate::Result;
use crate::cache::Cache;
use crate::layers::attention::{self, Attention};
use crate::layers::mlp::{self, Activation, Mlp};
use crate::layers::rope::Rope;
use crate::layers::short_conv::ShortConv;
use crate::weights::{Source, head};

const ATTENTION: attention::Names =
    attention::Names { output: "out_proj", q_norm: "q_layernorm", k_norm: "k_layernorm" };
const FEED_FORWARD: mlp::Names = mlp::Names { gate: "w1", up: "w3", down: "w2" };

#[derive(Debug)]
struct Lfm2 {
    model: Body,
    lm_head: Option<Linear>,
    info: ModelInfo,
    conv_layers: usize,
}

module!(Lfm2 { model, lm_head });

#[derive(Debug)]
struct Body {
    embed_tokens: Embedding,
    layers: Vec<Block>,
    embedding_norm: RmsNorm,
}

module!(Body { embed_tokens, layers, embedding_norm });

/// Has either `self_attn` or `conv`.
#[derive(Debug)]
struct Block {
    operator_norm: RmsNorm,
    self_attn: Option<Attention>,
    conv: Option<ShortConv>,
    ffn_norm: RmsNorm,
    feed_forward: Mlp,
}

module!(Block { operator_norm, self_attn, conv, ffn_norm, feed_forward });

pub(super) fn build(config: &Reader, source: &mut dyn Source) -> Result<Box<dyn LanguageModel>> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.size_or("num_key_value_heads", heads)?;
    config.quotient(("num_attention_heads", heads), ("num_key_value_heads", kv_heads))?;
    let head_dim = match config.size_option("head_dim")? {
        Some(head_dim) => head_dim,
        None => config.quotient(("hidden_size", hidden), ("num_attention_heads", heads))?,
    };
    let eps = config.eps("norm_eps", 1e-5)?;
    let taps = config.size_or("conv_L_cache", 3)?;
    let conv_bias = config.fields().get_or("conv_bias", false)?;
    let inner = feed_forward_width(config)?;
    let rope = config.rope(1_000_000.0)?;
    let (max_positions, positions_note) = rope.reach(config.size_or("max_position_embeddings", 128_000)?);
    let info = ModelInfo {
        family: "lfm2",
        vocabulary: config.size_or("vocab_size", 65_536)?,
        hidden,
        kv_heads,
        head_dim,
        max_positions,
        positions_note,
        tied: config
            .fields()
            .get_or("tie_word_embeddings", config.fields().get_or("tie_embedding", true)?)?,
    };
    let rope = Arc::new(Rope::new(&rope, head_dim, info.max_positions)?);
    let norm = |source: &mut dyn Source, name: &str| -> Result<RmsNorm> {
        Ok(RmsNorm::from_array(source.tensor(&format!("{name}.weight"), &[hidden])?, eps))
    };
    let embed_tokens =
        Embedding { weight: source.weight("model.embed_tokens", info.vocabulary, hidden)?.into() };
    let (mut layers, mut attention_layers, mut conv_layers) = (Vec::new(), 0, 0);
    for (index, is_attention) in attention_flags(config)?.into_iter().enumerate() {
        let path = format!("model.layers.{index}");
        let operator_norm = norm(source, &join(&path, "operator_norm"))?;
        let (mut self_attn, mut conv) = (None, None);
        if is_attention {
            let shape = attention::Shape {
                hidden,
                heads,
                kv_heads,
                head_dim,
                qkv_bias: false,
                output_bias: false,
                head_norm: Some(eps),
                window: None,
            };
            let at = join(&path, "self_attn");
            self_attn = Some(Attention::new(source, &at, shape, rope.clone(), attention_layers, &ATTENTION)?);
            attention_layers += 1;
        } else {
            conv =
                Some(ShortConv::new(source, &join(&path, "conv"), (hidden, taps), conv_bias, conv_layers)?);
            conv_layers += 1;
        }
        let ffn_norm = norm(source, &join(&path, "ffn_norm"))?;
        let at = join(&path, "feed_forward");
        let feed_forward = Mlp::new(source, &at, (hidden, inner), false, Activation::Silu, &FEED_FORWARD)?;
        layers.push(Block { operator_norm, self_attn, conv, ffn_norm, feed_forward });
    }
    let embedding_norm = norm(source, "model.embedding_norm")?;
    let lm_head = head(source, &info)?;
    let model = Body { embed_tokens, layers, embedding_norm };
    Ok(Box::new(Lfm2 { model, lm_head, info, conv_layers }))
}

/// Which layers attend: `layer_types`, or the older `full_attn_idxs`.
fn attention_flags(config: &Reader) -> Result<Vec<bool>> {
    let layers = config.size("num_hidden_layers")?;
    if let Some(types) = config.fields().opt::<Vec<String>>("layer_types")? {
        if types.len() != layers {
            return Err(config.wrong("layer_types", &format!("{layers} entries"), &types.len().to_string()));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(true),
                "conv" => Ok(false),
                other => Err(config.wrong("layer_types", "full_attention or conv", other)),
            })
            .collect();
    }
    let attending = config.fields().opt::<Vec<i64>>("full_attn_idxs")?;
    Ok((0..layers as i64).map(|index| attending.as_ref().is_none_or(|list| list.contains(&index))).collect())
}

/// `block_ff_dim`, cut to two thirds and rounded up as the configuration says.
fn feed_forward_width(config: &Reader) -> Result<usize> {
    let width = match config.size_option("block_ff_dim")? {
        Some(width) => width,
        None => config.size_or("intermediate_size", 12_288)?,
    };
    if !config.fields().get_or("block_auto_adjust_ff_dim", true)? {
        return Ok(width);
    }
    let multiplier = config.fields().get_or::<f64>("block_ffn_dim_multiplier", 1.0)?;
    if !(multiplier > 0.0 && multiplier <= 1000.0) {
        return Err(config.fields().bad(
            "block_ffn_dim_multiplier",
            "a number above 0, at most 1000",
            &multiplier.into(),
        ));
    }
    let width = (multiplier * (2 * width / 3) as f64) as usize;
    Ok(width.next_multiple_of(config.size_or("block_multiple_of", 256)?))
}

impl Block {
    fn forward(
        &self,
        x: &Array,
        input: &Input,
        cache: Option<&mut Cache>,
        context: &Context,
    ) -> mica_array::Result<Array> {
        let normed = self.operator_norm.forward(&context.saved(x)?, context)?;
        let normed = context.saved(&normed)?;
        let mixed = match (&self.self_attn, &self.conv) {
            (Some(attention), _) => attention.forward(&normed, input, cache, context)?,
            (None, Some(conv)) => conv.forward(&normed, input, cache, context)?,
            (None, None) => unreachable!("`build` gives every block an operator"),
        };
        let h = input.asked.of(x)?.add(mixed)?;
        let normed = self.ffn_norm.forward(&context.saved(&h)?, context)?;
        h.add(self.feed_forward.forward(&context.saved(&normed)?, context)?)
    }
}

impl LanguageModel for Lfm2 {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn hidden(
        &self,
        input: &Input,
        mut cache: Option<&mut Cache>,
        context: &Context,
    ) -> mica_array::Result<Array> {
        let mut x = self.model.embed_tokens.rows(&input.tokens, Dtype::F32)?;
        let (layers, all) = (&self.model.layers, input.of_all());
        for (index, layer) in layers.iter().enumerate() {
            let input = if index + 1 < layers.len() { &all } else { input };
            let run = |x: &Array, cache: Option<&mut Cache>| layer.forward(x, input, cache, context);
            x = input.layer(index, x, cache.as_deref_mut(), run)?;
        }
        self.model.embedding_norm.forward(&x, context)
    }

    fn head(&self) -> &Array {
        self.lm_head.as_ref().map_or(&self.model.embed_tokens.weight, |head| &head.weight)
    }

    fn new_cache(&self, batch: usize, format: KvFormat) -> Cache {
        let layers = self.model.layers.len() - self.conv_layers;
        let spec = KvSpec { layers, kv_heads: self.info.kv_heads, head_dim: self.info.head_dim, format };
        Cache::new(spec, batch, self.conv_layers)
    }

    fn layers(&self) -> usize {
        self.model.layers.len()
    }

    fn linears(&mut self, layer: usize) -> Vec<(String, &mut Linear)> {
        let block = &mut self.model.layers[layer];
        let mut list = Vec::new();
        if let Some(attention) = &mut block.self_attn {
            list.extend(attention.linears().map(|(name, linear)| (join("self_attn", name), linear)));
        }
        if let Some(conv) = &mut block.conv {
            list.extend(conv.linears().map(|(name, linear)| (join("conv", name), linear)));
        }
        list.extend(block.feed_forward.linears().map(|(name, linear)| (join("feed_forward", name), linear)));
        list
    }

    fn as_module(&self) -> &dyn Module {
        self
    }

    fn as_module_mut(&mut self) -> &mut dyn Module {
        self
    }
}
