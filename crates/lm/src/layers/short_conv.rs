//! LFM2's operator: a gated causal convolution over a few positions.

use mica_array::{Array, Result};
use mica_nn::{Context, Layer, Linear, Parameter, join, module};

use crate::cache::Cache;
use crate::models::Input;
use crate::weights::{Source, linear};

/// out(C · conv(B · x)) with B, C, x = in(input).
#[derive(Debug)]
pub struct ShortConv {
    conv: Taps,
    in_proj: Linear,
    out_proj: Linear,
    /// Which of the cache's convolution states is this layer's.
    cache_layer: usize,
}

module!(ShortConv { conv, in_proj, out_proj });

#[derive(Debug)]
struct Taps {
    /// [channels, taps]
    weight: Parameter,
    /// [channels]
    bias: Option<Parameter>,
}

module!(Taps { weight, bias });

impl ShortConv {
    /// Takes the parameters under `path` from a source.
    pub fn new(
        source: &mut dyn Source,
        path: &str,
        (hidden, taps): (usize, usize),
        bias: bool,
        cache_layer: usize,
    ) -> crate::Result<ShortConv> {
        // [channels, 1, taps] in Hugging Face's files, [channels, taps, 1] in MLX's.
        let name = format!("{path}.conv.weight");
        let weight = source.tensor_any(&name, &[&[hidden, 1, taps], &[hidden, taps, 1]])?;
        let bias_taps =
            if bias { Some(source.tensor(&format!("{path}.conv.bias"), &[hidden])?) } else { None };
        Ok(ShortConv {
            conv: Taps {
                weight: weight.reshape(&[hidden as i64, taps as i64])?.into(),
                bias: bias_taps.map(Parameter::from),
            },
            in_proj: linear(source, &join(path, "in_proj"), 3 * hidden, hidden, bias)?,
            out_proj: linear(source, &join(path, "out_proj"), hidden, hidden, bias)?,
            cache_layer,
        })
    }

    /// The projections, by name, for adapters.
    pub fn linears(&mut self) -> [(&'static str, &mut Linear); 2] {
        [("in_proj", &mut self.in_proj), ("out_proj", &mut self.out_proj)]
    }

    /// x [batch, length, hidden] → the same shape, or the positions that are asked for.
    pub fn forward(
        &self,
        x: &Array,
        input: &Input,
        cache: Option<&mut Cache>,
        context: &Context,
    ) -> Result<Array> {
        let hidden = x.dim(-1);
        let parts = context.saved(&self.in_proj.forward(x, context)?)?.split_sizes(&[hidden; 3], -1)?;
        let gated = context.saved(&parts[0].multiply(&parts[2])?)?;
        let y = match cache {
            Some(cache) => {
                let slot = &mut cache.conv[self.cache_layer];
                let (y, next) = gated.short_conv(&self.conv.weight, slot.as_ref(), None)?;
                *slot = Some(next);
                y
            }
            None => gated.short_conv(&self.conv.weight, None, input.key_start.as_ref())?.0,
        };
        let y = match &self.conv.bias {
            Some(bias) => y.add(bias.astype(y.dtype())?)?,
            None => y,
        };
        let mixed = input.asked.of(&parts[1])?.multiply(input.asked.of(&context.saved(&y)?)?)?;
        self.out_proj.forward(&context.saved(&mixed)?, context)
    }
}
