//! Llama 2 and 3, SmolLM and others of their shape (Touvron et al. 2023, Grattafiori et al. 2024).

use super::reader::Reader;
use super::{LanguageModel, ModelInfo};
use crate::Result;
use crate::layers::attention;
use crate::layers::decoder::{Decoder, DecoderSpec};
use crate::layers::mlp::Activation;
use crate::weights::Source;

pub(super) fn build(config: &Reader, source: &mut dyn Source) -> Result<Box<dyn LanguageModel>> {
    Ok(Box::new(Decoder::new(spec(config, "llama")?, source)?))
}

/// The fields that Llama-like families share, with Llama's defaults; families change what differs.
pub(super) fn spec(config: &Reader, family: &'static str) -> Result<DecoderSpec> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.size_or("num_key_value_heads", heads)?;
    let head_dim = match config.size_option("head_dim")? {
        Some(head_dim) => head_dim,
        None => config.quotient(("hidden_size", hidden), ("num_attention_heads", heads))?,
    };
    config.quotient(("num_attention_heads", heads), ("num_key_value_heads", kv_heads))?;
    let layers = config.size("num_hidden_layers")?;
    let rope = config.rope(10_000.0)?;
    let (max_positions, positions_note) = rope.reach(config.size_or("max_position_embeddings", 2048)?);
    let attention_bias = config.fields().get_or("attention_bias", false)?;
    let activation_name = config.fields().get_or("hidden_act", "silu".to_string())?;
    let shape = attention::Shape {
        hidden,
        heads,
        kv_heads,
        head_dim,
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        head_norm: None,
        window: None,
    };
    Ok(DecoderSpec {
        info: ModelInfo {
            family,
            vocabulary: config.size("vocab_size")?,
            hidden,
            kv_heads,
            head_dim,
            max_positions,
            positions_note,
            tied: config.fields().get_or("tie_word_embeddings", false)?,
        },
        attention: vec![shape; layers],
        intermediate: config.size("intermediate_size")?,
        mlp_bias: config.fields().get_or("mlp_bias", false)?,
        activation: Activation::from_name(&activation_name)
            .ok_or_else(|| config.wrong("hidden_act", "silu, gelu or gelu_pytorch_tanh", &activation_name))?,
        norm_eps: config.eps("rms_norm_eps", 1e-6)?,
        rope,
    })
}
