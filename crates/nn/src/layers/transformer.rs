//! The encoder and decoder of "Attention is all you need", norms first or last.

use mica_array::{Array, Result};

use super::{Dropout, LayerNorm, MultiHeadAttention};
use crate::activations::relu;
use crate::{Context, Item, ItemMut, Keys, Layer, Linear, Module, checkpoint, join, module};

/// Sizes and options of a transformer.
#[derive(Clone, Debug)]
pub struct TransformerSpec {
    /// Width of the residual stream.
    pub dims: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Width of the feed-forward blocks.
    pub mlp_dims: usize,
    /// Dropout of what is added to the residual stream.
    pub dropout: f32,
    /// Of the feed-forward blocks.
    pub activation: fn(&Array) -> Result<Array>,
    /// Norms stand before attention and feed-forward, not after the sums.
    pub norm_first: bool,
    /// Computes each layer again in the backward pass instead of keeping what is in it.
    pub checkpoint: bool,
}

impl TransformerSpec {
    /// MLX's defaults: a feed-forward width of 4 · dims, no dropout, ReLU, norms first.
    pub fn new(dims: usize, num_heads: usize) -> TransformerSpec {
        TransformerSpec {
            dims,
            num_heads,
            mlp_dims: 4 * dims,
            dropout: 0.0,
            activation: relu,
            norm_first: true,
            checkpoint: false,
        }
    }

    fn norm(&self) -> Result<LayerNorm> {
        LayerNorm::new(self.dims, 1e-5, true, true)
    }

    /// A sub-layer with its norm and residual connection.
    fn residual(
        &self,
        x: &Array,
        norm: &LayerNorm,
        context: &Context,
        f: impl FnOnce(&Array) -> Result<Array>,
    ) -> Result<Array> {
        if self.norm_first {
            return x.add(f(&norm.forward(x, context)?)?);
        }
        norm.forward(&x.add(f(x)?)?, context)
    }

    /// Two linear maps with the activation and dropout between them.
    fn feed_forward(
        &self,
        x: &Array,
        [wide, narrow]: [&Linear; 2],
        dropout: &Dropout,
        context: &Context,
    ) -> Result<Array> {
        let y = (self.activation)(&wide.forward(x, context)?)?;
        narrow.forward(&dropout.forward(&y, context)?, context)
    }

    /// Layers one after another and the last norm.
    fn stack<L>(
        &self,
        x: &Array,
        layers: &[L],
        norm: &LayerNorm,
        context: &Context,
        forward: impl Fn(&L, &Array) -> Result<Array>,
    ) -> Result<Array> {
        let run = |x: Array, layer| match self.checkpoint {
            true => checkpoint(|x| forward(layer, x), &x),
            false => forward(layer, &x),
        };
        norm.forward(&layers.iter().try_fold(x.clone(), run)?, context)
    }
}

/// Self-attention and a feed-forward block.
#[derive(Clone, Debug)]
pub struct TransformerEncoderLayer {
    attention: MultiHeadAttention,
    ln1: LayerNorm,
    ln2: LayerNorm,
    linear1: Linear,
    linear2: Linear,
    dropout1: Dropout,
    dropout2: Dropout,
    spec: TransformerSpec,
}

module!(TransformerEncoderLayer { attention, ln1, ln2, linear1, linear2, dropout1, dropout2 });

impl TransformerEncoderLayer {
    /// A new layer.
    pub fn new(spec: &TransformerSpec, keys: &mut Keys) -> Result<TransformerEncoderLayer> {
        Ok(TransformerEncoderLayer {
            attention: MultiHeadAttention::new(spec.dims, spec.num_heads, false, keys)?,
            ln1: spec.norm()?,
            ln2: spec.norm()?,
            linear1: Linear::new(spec.dims, spec.mlp_dims, true, keys)?,
            linear2: Linear::new(spec.mlp_dims, spec.dims, true, keys)?,
            dropout1: Dropout::new(spec.dropout)?,
            dropout2: Dropout::new(spec.dropout)?,
            spec: spec.clone(),
        })
    }

    /// x [batch, length, dims]; the mask as in [`MultiHeadAttention::forward`].
    pub fn forward(&self, x: &Array, mask: Option<&Array>, context: &Context) -> Result<Array> {
        let x = self.spec.residual(x, &self.ln1, context, |y| {
            self.dropout1.forward(&self.attention.forward(y, y, y, mask, context)?, context)
        })?;
        let linears = [&self.linear1, &self.linear2];
        self.spec
            .residual(&x, &self.ln2, context, |y| self.spec.feed_forward(y, linears, &self.dropout2, context))
    }
}

/// Encoder layers and a norm.
#[derive(Clone, Debug)]
pub struct TransformerEncoder {
    /// The layers.
    pub layers: Vec<TransformerEncoderLayer>,
    ln: LayerNorm,
    spec: TransformerSpec,
}

module!(TransformerEncoder { layers, ln });

impl TransformerEncoder {
    /// New layers.
    pub fn new(num_layers: usize, spec: &TransformerSpec, keys: &mut Keys) -> Result<TransformerEncoder> {
        let layers =
            (0..num_layers).map(|_| TransformerEncoderLayer::new(spec, keys)).collect::<Result<_>>()?;
        Ok(TransformerEncoder { layers, ln: spec.norm()?, spec: spec.clone() })
    }

    /// x [batch, length, dims] → the same shape.
    pub fn forward(&self, x: &Array, mask: Option<&Array>, context: &Context) -> Result<Array> {
        self.spec.stack(x, &self.layers, &self.ln, context, |layer, x| layer.forward(x, mask, context))
    }
}

/// Self-attention, attention to the encoder's output, and a feed-forward block.
#[derive(Clone, Debug)]
pub struct TransformerDecoderLayer {
    self_attention: MultiHeadAttention,
    cross_attention: MultiHeadAttention,
    ln1: LayerNorm,
    ln2: LayerNorm,
    ln3: LayerNorm,
    linear1: Linear,
    linear2: Linear,
    dropout1: Dropout,
    dropout2: Dropout,
    dropout3: Dropout,
    spec: TransformerSpec,
}

module!(TransformerDecoderLayer {
    self_attention,
    cross_attention,
    ln1,
    ln2,
    ln3,
    linear1,
    linear2,
    dropout1,
    dropout2,
    dropout3
});

impl TransformerDecoderLayer {
    /// A new layer.
    pub fn new(spec: &TransformerSpec, keys: &mut Keys) -> Result<TransformerDecoderLayer> {
        Ok(TransformerDecoderLayer {
            self_attention: MultiHeadAttention::new(spec.dims, spec.num_heads, false, keys)?,
            cross_attention: MultiHeadAttention::new(spec.dims, spec.num_heads, false, keys)?,
            ln1: spec.norm()?,
            ln2: spec.norm()?,
            ln3: spec.norm()?,
            linear1: Linear::new(spec.dims, spec.mlp_dims, true, keys)?,
            linear2: Linear::new(spec.mlp_dims, spec.dims, true, keys)?,
            dropout1: Dropout::new(spec.dropout)?,
            dropout2: Dropout::new(spec.dropout)?,
            dropout3: Dropout::new(spec.dropout)?,
            spec: spec.clone(),
        })
    }

    /// x [batch, length, dims], `memory` [batch, other length, dims].
    pub fn forward(
        &self,
        x: &Array,
        memory: &Array,
        x_mask: Option<&Array>,
        memory_mask: Option<&Array>,
        context: &Context,
    ) -> Result<Array> {
        let x = self.spec.residual(x, &self.ln1, context, |y| {
            self.dropout1.forward(&self.self_attention.forward(y, y, y, x_mask, context)?, context)
        })?;
        let x = self.spec.residual(&x, &self.ln2, context, |y| {
            let y = self.cross_attention.forward(y, memory, memory, memory_mask, context)?;
            self.dropout2.forward(&y, context)
        })?;
        let linears = [&self.linear1, &self.linear2];
        self.spec
            .residual(&x, &self.ln3, context, |y| self.spec.feed_forward(y, linears, &self.dropout3, context))
    }
}

/// Decoder layers and a norm.
#[derive(Clone, Debug)]
pub struct TransformerDecoder {
    /// The layers.
    pub layers: Vec<TransformerDecoderLayer>,
    ln: LayerNorm,
    spec: TransformerSpec,
}

module!(TransformerDecoder { layers, ln });

impl TransformerDecoder {
    /// New layers.
    pub fn new(num_layers: usize, spec: &TransformerSpec, keys: &mut Keys) -> Result<TransformerDecoder> {
        let layers =
            (0..num_layers).map(|_| TransformerDecoderLayer::new(spec, keys)).collect::<Result<_>>()?;
        Ok(TransformerDecoder { layers, ln: spec.norm()?, spec: spec.clone() })
    }

    /// x [batch, length, dims] → the same shape.
    pub fn forward(
        &self,
        x: &Array,
        memory: &Array,
        x_mask: Option<&Array>,
        memory_mask: Option<&Array>,
        context: &Context,
    ) -> Result<Array> {
        self.spec.stack(x, &self.layers, &self.ln, context, |layer, x| {
            layer.forward(x, memory, x_mask, memory_mask, context)
        })
    }
}

/// What a [`Transformer`] may have as its encoder.
pub trait Encode: Module {
    /// The source as the decoder sees it: [batch, length, dims] → the same shape.
    fn encode(&self, source: &Array, mask: Option<&Array>, context: &Context) -> Result<Array>;
}

/// What a [`Transformer`] may have as its decoder.
pub trait Decode: Module {
    /// The target, given what the encoder made: [batch, length, dims] → the same shape.
    fn decode(
        &self,
        target: &Array,
        memory: &Array,
        target_mask: Option<&Array>,
        memory_mask: Option<&Array>,
        context: &Context,
    ) -> Result<Array>;
}

impl Encode for TransformerEncoder {
    fn encode(&self, source: &Array, mask: Option<&Array>, context: &Context) -> Result<Array> {
        self.forward(source, mask, context)
    }
}

impl Decode for TransformerDecoder {
    fn decode(
        &self,
        target: &Array,
        memory: &Array,
        target_mask: Option<&Array>,
        memory_mask: Option<&Array>,
        context: &Context,
    ) -> Result<Array> {
        self.forward(target, memory, target_mask, memory_mask, context)
    }
}

/// An encoder and a decoder that looks at what it gives. Either may be another than MLX's own: fill
/// in the fields.
#[derive(Clone, Debug)]
pub struct Transformer<E = TransformerEncoder, D = TransformerDecoder> {
    /// Of the source.
    pub encoder: E,
    /// Of the target.
    pub decoder: D,
}

impl<E: Module, D: Module> Module for Transformer<E, D> {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        see(name, Item::Module(self));
        self.encoder.visit(&join(name, "encoder"), see);
        self.decoder.visit(&join(name, "decoder"), see);
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        see(name, ItemMut::Module(self));
        self.encoder.visit_mut(&join(name, "encoder"), see);
        self.decoder.visit_mut(&join(name, "decoder"), see);
    }
}

impl Transformer {
    /// MLX's defaults are 6 and 6 layers of 512 features and 8 heads.
    pub fn new(
        num_encoder_layers: usize,
        num_decoder_layers: usize,
        spec: &TransformerSpec,
        keys: &mut Keys,
    ) -> Result<Transformer> {
        Ok(Transformer {
            encoder: TransformerEncoder::new(num_encoder_layers, spec, keys)?,
            decoder: TransformerDecoder::new(num_decoder_layers, spec, keys)?,
        })
    }
}

impl<E: Encode, D: Decode> Transformer<E, D> {
    /// `source` and `target` [batch, length, dims] → the target's shape.
    pub fn forward(
        &self,
        source: &Array,
        target: &Array,
        source_mask: Option<&Array>,
        target_mask: Option<&Array>,
        memory_mask: Option<&Array>,
        context: &Context,
    ) -> Result<Array> {
        let memory = self.encoder.encode(source, source_mask, context)?;
        self.decoder.decode(target, &memory, target_mask, memory_mask, context)
    }
}
