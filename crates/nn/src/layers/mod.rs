//! The layers, a file per family.
//!
//! Inputs and parameters have MLX's layouts: features last, images as
//! `[batch, height, width, channels]`.

mod attention;
mod codes;
mod conv;
mod dropout;
mod embedding;
mod linear;
mod norm;
mod pool;
mod position;
mod quantized;
mod recurrent;
mod sequential;
mod transformer;
mod upsample;

pub use attention::MultiHeadAttention;
pub use codes::{LayerQuantization, QQLinear, QuantizedEmbedding, QuantizedLinear, quantize_layers};
pub use conv::{
    Conv, Conv1d, Conv2d, Conv3d, ConvTranspose, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d,
};
pub use dropout::{Dropout, Dropout2d, Dropout3d};
pub use embedding::Embedding;
pub use linear::{Adapter, Bilinear, Identity, Linear};
pub use norm::{BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RmsNorm};
pub use pool::{AvgPool, AvgPool1d, AvgPool2d, AvgPool3d, MaxPool, MaxPool1d, MaxPool2d, MaxPool3d};
pub use position::{ALiBi, RoPE, SinusoidalPositionalEncoding};
pub use quantized::{file_parameters, load_file_parameters};
pub use recurrent::{Gru, Lstm, Rnn};
pub use sequential::Sequential;
pub use transformer::{
    Decode, Encode, Transformer, TransformerDecoder, TransformerDecoderLayer, TransformerEncoder,
    TransformerEncoderLayer, TransformerSpec,
};
pub use upsample::{Interpolation, Upsample};

use mica_array::{Array, Error, Result};

use crate::{Context, Module};

/// A module of one input and one output.
pub trait Layer: Module + std::fmt::Debug + Send + Sync {
    /// The output.
    fn forward(&self, x: &Array, context: &Context) -> Result<Array>;

    /// Whether [`Layer::to_quantized`] works.
    fn has_quantized_form(&self) -> bool {
        false
    }

    /// The same layer with its weight in codes; with `quantize_input`, one that quantizes its
    /// inputs too. [`quantize_layers`] puts it in this one's place.
    ///
    /// # Errors
    /// If there is no such layer, or the format does not fit the weight.
    fn to_quantized(&self, _: LayerQuantization) -> Result<Box<dyn Layer>> {
        Err(invalid("to_quantized", format!("a layer of type {} has no quantized form", self.kind())))
    }
}

macro_rules! boxed_layer {
    ($type:ty $(, $($bound:tt)*)?) => {
        impl$(<$($bound)*>)? Layer for $type {
            fn forward(&self, x: &Array, context: &Context) -> Result<Array> {
                (**self).forward(x, context)
            }

            fn has_quantized_form(&self) -> bool {
                (**self).has_quantized_form()
            }

            fn to_quantized(&self, how: LayerQuantization) -> Result<Box<dyn Layer>> {
                (**self).to_quantized(how)
            }
        }
    };
}
boxed_layer!(Box<L>, L: Layer);
boxed_layer!(Box<dyn Layer>);

fn invalid(op: &'static str, message: String) -> Error {
    Error::Invalid { op, message: message.into() }
}
