//! Quantized layers in MLX's own layout, in every mode.
//!
//! The codes stay as they are and are unpacked with every product. A [`Linear`] whose weight was
//! packed once ([`quantize`](crate::quantize())) computes much faster, in every mode; these layers
//! are for programs that share the arrays with something else, and for inputs that are quantized too.

use mica_array::quantized::{
    QuantMode, QuantSpec, QuantizedArray, qqmm, qqmm_floats, quantize, quantized_matmul,
};
use mica_array::{Array, Result};

use super::{Layer, invalid};
use crate::{Context, Embedding, Item, ItemMut, Linear, Module, Parameter, Role, join, module};

/// A quantized weight as named arrays: `weight`, `scales` and, if affine, `biases`. Part of a layer
/// and no module of its own.
#[derive(Clone, Debug)]
struct Codes {
    weight: Parameter,
    scales: Parameter,
    biases: Option<Parameter>,
    format: QuantSpec,
}

impl Module for Codes {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        self.weight.visit(&join(name, "weight"), see);
        self.scales.visit(&join(name, "scales"), see);
        self.biases.visit(&join(name, "biases"), see);
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        self.weight.visit_mut(&join(name, "weight"), see);
        self.scales.visit_mut(&join(name, "scales"), see);
        self.biases.visit_mut(&join(name, "biases"), see);
    }
}

impl Codes {
    fn of(weight: &Array, format: QuantSpec) -> Result<Codes> {
        let QuantizedArray { words, scales, biases, .. } = quantize(weight, format, None)?;
        // Scales that are bytes are codes too.
        let scale_role = if scales.dtype().is_float() { Role::Frozen } else { Role::State };
        Ok(Codes {
            weight: Parameter::new(words, Role::State),
            scales: Parameter::new(scales, scale_role),
            biases: biases.map(|array| Parameter::new(array, Role::Frozen)),
            format,
        })
    }

    fn array(&self) -> Result<QuantizedArray> {
        let biases = self.biases.as_ref().map(|biases| biases.array().clone());
        let (words, scales) = (self.weight.array().clone(), self.scales.array().clone());
        QuantizedArray::new(words, scales, biases, self.format, None)
    }
}

/// x · wᵀ + bias with w in codes.
///
/// The codes are frozen; affine scales and biases learn once they are unfrozen.
#[derive(Clone, Debug)]
pub struct QuantizedLinear {
    codes: Codes,
    /// \[out\]
    pub bias: Option<Parameter>,
}

module!(QuantizedLinear { codes as "", bias });

impl QuantizedLinear {
    /// The layer, quantized.
    ///
    /// # Errors
    /// If the format does not fit the weight, or the layer has an adapter.
    pub fn from_linear(linear: &Linear, format: QuantSpec) -> Result<QuantizedLinear> {
        if linear.adapter.is_some() {
            return Err(invalid("QuantizedLinear", "merge the layer's adapter first".to_string()));
        }
        let codes = Codes::of(&linear.weight.dequantize()?, format)?;
        Ok(QuantizedLinear { codes, bias: linear.bias.clone() })
    }

    /// How the weight is coded.
    pub fn format(&self) -> QuantSpec {
        self.codes.format
    }
}

/// [.., in] → [.., out]
impl Layer for QuantizedLinear {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        let y = quantized_matmul(x, &self.codes.array()?, true)?;
        match &self.bias {
            Some(bias) => y.add(bias),
            None => Ok(y),
        }
    }
}

/// Rows of a table in codes.
#[derive(Clone, Debug)]
pub struct QuantizedEmbedding {
    codes: Codes,
}

module!(QuantizedEmbedding { codes as "" });

impl QuantizedEmbedding {
    /// The table, quantized.
    pub fn from_embedding(embedding: &Embedding, format: QuantSpec) -> Result<QuantizedEmbedding> {
        Ok(QuantizedEmbedding { codes: Codes::of(&embedding.weight.dequantize()?, format)? })
    }

    /// How the table is coded.
    pub fn format(&self) -> QuantSpec {
        self.codes.format
    }

    /// x · weightᵀ: [.., width] → [.., rows].
    pub fn as_linear(&self, x: &Array) -> Result<Array> {
        quantized_matmul(x, &self.codes.array()?, true)
    }
}

/// indices [..] → [.., width] in the scales' dtype; bf16 where these are bytes.
impl Layer for QuantizedEmbedding {
    fn forward(&self, indices: &Array, _: &Context) -> Result<Array> {
        let codes = self.codes.array()?;
        let rows = |array: &Array| array.take(indices, 0);
        let biases = codes.biases.as_ref().map(rows).transpose()?;
        QuantizedArray::new(rows(&codes.words)?, rows(&codes.scales)?, biases, codes.format, None)?
            .dequantize(None)
    }
}

/// x · wᵀ with both sides quantized on the way, as `nvfp4` or `mxfp8`.
///
/// The weight is either floats, which can be trained: the gradients are products of quantized
/// arrays as well; or codes, for inference. MLX switches between the two with `train` and `eval`;
/// here [`QQLinear::quantize`] and [`QQLinear::dequantize`] do.
#[derive(Clone, Debug)]
pub struct QQLinear {
    weight: Parameter,
    scales: Option<Parameter>,
    format: QuantSpec,
}

module!(QQLinear { weight, scales });

impl QQLinear {
    /// The layer with its float weight.
    ///
    /// # Errors
    /// If it has a bias or an adapter, or the mode is neither `nvfp4` nor `mxfp8`.
    pub fn from_linear(linear: &Linear, format: QuantSpec) -> Result<QQLinear> {
        if linear.adapter.is_some() {
            return Err(invalid("QQLinear", "merge the layer's adapter first".to_string()));
        }
        if linear.bias.is_some() || !matches!(format.mode(), QuantMode::Nvfp4 | QuantMode::Mxfp8) {
            let bias = if linear.bias.is_some() { "with" } else { "without" };
            let message = format!(
                "expected a layer without bias and nvfp4 or mxfp8, got one {bias} bias and {:?}",
                format.mode()
            );
            return Err(invalid("QQLinear", message));
        }
        Ok(QQLinear { weight: linear.weight.dequantize()?.into(), scales: None, format })
    }

    /// How both sides are coded.
    pub fn format(&self) -> QuantSpec {
        self.format
    }

    /// Keeps the weight as codes from now on.
    pub fn quantize(&mut self) -> Result<()> {
        if self.scales.is_none() {
            let codes = quantize(&self.weight, self.format, None)?;
            self.weight = Parameter::new(codes.words, Role::State);
            self.scales = Some(Parameter::new(codes.scales, Role::State));
        }
        Ok(())
    }

    /// Keeps the weight as floats from now on, to be trained: bf16, as MLX does.
    pub fn dequantize(&mut self) -> Result<()> {
        if let Some(scales) = &self.scales {
            self.weight = self.codes(scales)?.dequantize(None)?.into();
            self.scales = None;
        }
        Ok(())
    }

    fn codes(&self, scales: &Parameter) -> Result<QuantizedArray> {
        let (words, scales) = (self.weight.array().clone(), scales.array().clone());
        QuantizedArray::new(words, scales, None, self.format, None)
    }
}

/// [.., in] → [.., out]
impl Layer for QQLinear {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        match &self.scales {
            Some(scales) => qqmm(x, &self.codes(scales)?, None),
            None => qqmm_floats(x, &self.weight, self.format, None),
        }
    }
}

/// How [`quantize_layers`] treats a layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerQuantization {
    /// Of the weight.
    pub format: QuantSpec,
    /// Inputs too: a [`Linear`] becomes a [`QQLinear`].
    pub quantize_input: bool,
}

/// Replaces boxed layers by quantized ones, in any mode: `mlx.nn.quantize`.
///
/// `choose` is asked for each boxed layer that has a quantized form, and says how; `None` leaves it
/// alone. Layers that stand in a field as a [`Linear`] or [`Embedding`] keep that type and are
/// passed over: [`quantize`](crate::quantize()) packs their weights.
///
/// # Errors
/// If a format does not fit a weight; those before it are replaced then.
pub fn quantize_layers<M: Module + ?Sized>(
    module: &mut M,
    mut choose: impl FnMut(&str, &dyn Layer) -> Option<LayerQuantization>,
) -> Result<()> {
    let mut result = Ok(());
    module.visit_mut("", &mut |name, item| {
        let ItemMut::Layer(layer) = item else { return };
        if result.is_err() || !layer.has_quantized_form() {
            return;
        }
        if let Some(how) = choose(name, &**layer) {
            match layer.to_quantized(how) {
                Ok(quantized) => *layer = quantized,
                Err(error) => result = Err(error),
            }
        }
    });
    result
}
