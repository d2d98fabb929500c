//! Block formats of quantized weights, over slices.
//!
//! Knows how numbers become bits and bits become numbers, nothing of files, arrays or kernels:
//! [`affine`] is MLX's running quantizer, bit for bit; [`bits`] packs the bit stream that its
//! words hold; [`micro`] has MLX's micro-scaled formats, [`minifloat`] their numbers; [`gguf`] takes ggml's blocks apart;
//! [`QuantSpec`] names a format of MLX's and refuses the combinations that do not exist.

pub mod affine;
pub mod bits;
mod float;
pub mod gguf;
pub mod micro;
pub mod minifloat;
mod spec;

pub use float::Float;
pub use spec::{CodecError, QuantMode, QuantSpec};
