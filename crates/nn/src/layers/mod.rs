//! The layers, a file per family.
//!
//! Inputs and parameters have MLX's layouts: features last, images as
//! `[batch, height, width, channels]`.

mod attention;
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
pub use dropout::{Dropout, Dropout2d, Dropout3d};
pub use embedding::Embedding;
pub use linear::{Adapter, Bilinear, Identity, Linear};
pub use norm::{BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RmsNorm};
pub use pool::{AvgPool, AvgPool1d, AvgPool2d, AvgPool3d, MaxPool, MaxPool1d, MaxPool2d, MaxPool3d};
pub use position::{ALiBi, RoPE, SinusoidalPositionalEncoding};
pub use quantized::{Quantization, file_parameters, load_file_parameters};
pub use recurrent::{Gru, Lstm, Rnn};
pub use sequential::Sequential;
pub use transformer::{
    Transformer, TransformerDecoder, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer,
    TransformerSpec,
};
pub use upsample::{Interpolation, Upsample};

use mica_array::{Array, Error, Result};

use crate::{Context, Module};

/// A module of one input and one output.
pub trait Layer: Module + std::fmt::Debug + Send + Sync {
    /// The output.
    fn forward(&self, x: &Array, context: &Context) -> Result<Array>;
}

impl<L: Layer + ?Sized> Layer for Box<L> {
    fn forward(&self, x: &Array, context: &Context) -> Result<Array> {
        (**self).forward(x, context)
    }
}

fn invalid(op: &'static str, message: String) -> Error {
    Error::Invalid { op, message: message.into() }
}
