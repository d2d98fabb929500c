//! Qwen 3, dense (Yang et al. 2025): no biases, a norm on every query and key head.

use super::LanguageModel;
use super::reader::Reader;
use crate::Result;
use crate::layers::decoder::Decoder;
use crate::weights::Source;

pub(super) fn build(config: &Reader, source: &mut dyn Source) -> Result<Box<dyn LanguageModel>> {
    let mut spec = super::llama::spec(config, "qwen3")?;
    // The family's default; Qwen 3 always states it.
    if config.size_option("head_dim")?.is_none() {
        spec.info.head_dim = 128;
    }
    for shape in &mut spec.attention {
        shape.head_dim = spec.info.head_dim;
        shape.head_norm = Some(spec.norm_eps);
    }
    super::qwen2::set_windows(config, &mut spec)?;
    Ok(Box::new(Decoder::new(spec, source)?))
}
