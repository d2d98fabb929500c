//! Pieces that model families share. Each says which shapes it takes and which names its
//! parameters have in files.

pub mod attention;
pub mod decoder;
pub mod mlp;
pub mod rope;
pub mod short_conv;
