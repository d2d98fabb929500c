//! Mistral 7B and its descendants (Jiang et al. 2023): Llama with a sliding window.

use super::LanguageModel;
use super::reader::Reader;
use crate::Result;
use crate::layers::decoder::Decoder;
use crate::weights::Source;

pub(super) fn build(config: &Reader, source: &mut dyn Source) -> Result<Box<dyn LanguageModel>> {
    let mut spec = super::llama::spec(config, "mistral")?;
    let window = config.size_option("sliding_window")?;
    for shape in &mut spec.attention {
        (shape.qkv_bias, shape.output_bias) = (false, false);
        shape.window = window;
    }
    Ok(Box::new(Decoder::new(spec, source)?))
}
