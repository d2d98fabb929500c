//! Products with quantized weights, in both directions, from one packed copy.
//!
//! [`QuantWeight`] holds a matrix in tiles. [`QuantWeight::plan_forward`] multiplies by it and
//! [`QuantWeight::plan_transposed`] by its transpose, in a [`Precision`]. For inference activations
//! are quantized first; several weights that read the same ones share that step ([`ProductPlan::join`], or
//! [`Stage`], then [`QuantWeight::product`] per weight).
//!
//! Files: `form` says how a weight is coded, `tile` is the memory layout, `pack` and `blocks` fill it, `lanes` the
//! vector type all kernels are written in, `tier` their dispatch, `fast`, `fast_wide` and `fast_amx` the int8 product,
//! `float` dequantizes into the panels of `gemm`, `few` multiplies few rows without panels, `gather` gives rows as
//! numbers, `grouped` multiplies rows by the weights that indices name. The codes themselves are mica-codec's subject.

mod blocks;
mod fast;
#[cfg(target_arch = "x86_64")]
mod fast_amx;
mod fast_wide;
mod few;
mod float;
mod form;
mod gather;
mod grouped;
mod lanes;
mod pack;
mod plan;
mod sink;
mod stage;
mod tier;
mod tile;
mod weight;

pub use gather::Floats;
pub use grouped::{ExpertsPlan, QuantExperts};
pub use pack::Part;
pub use plan::{Precision, ProductPlan};
pub use sink::Epilogue;
pub use stage::{Stage, Staged};
pub use tile::{ScaleType, TILE_ROWS};
pub use weight::{QuantWeight, ScaleVec, Scales, Unpacked};
