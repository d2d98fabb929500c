//! Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases on q, k and v, and windows on some layers.

use super::LanguageModel;
use super::reader::Reader;
use crate::Result;
use crate::layers::decoder::{Decoder, DecoderSpec};
use crate::weights::Source;

pub(super) fn build(config: &Reader, source: &mut dyn Source) -> Result<Box<dyn LanguageModel>> {
    let mut spec = super::llama::spec(config, "qwen2")?;
    for shape in &mut spec.attention {
        (shape.qkv_bias, shape.output_bias) = (true, false);
    }
    set_windows(config, &mut spec)?;
    Ok(Box::new(Decoder::new(spec, source)?))
}

/// Qwen's windows: off unless `use_sliding_window`, then on the layers that `layer_types` names,
/// or from `max_window_layers` on.
pub(super) fn set_windows(config: &Reader, spec: &mut DecoderSpec) -> Result<()> {
    if !config.fields().get_or("use_sliding_window", false)? {
        return Ok(());
    }
    let window = config.size_or("sliding_window", 4096)?;
    let full = config.fields().get_or::<i64>("max_window_layers", 28)?;
    let types = config.fields().opt::<Vec<String>>("layer_types")?;
    for (index, shape) in spec.attention.iter_mut().enumerate() {
        let slides = match &types {
            Some(types) => types.get(index).is_some_and(|kind| kind == "sliding_attention"),
            None => index as i64 >= full,
        };
        shape.window = slides.then_some(window);
    }
    Ok(())
}
