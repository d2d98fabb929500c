//! Products with quantized weights, in both directions, from one packed copy.
//!
//! [`QuantWeight`] holds a matrix in tiles. A product has two steps: a [`Stage`] brings the
//! activations into the form of a [`Precision`] (once for all weights that read them), then
//! [`QuantWeight::product`] is a task that multiplies. [`QuantWeight::plan_forward`] does both for
//! the usual case of one weight.
//!
//! Files: `tile` is the memory layout, `lanes` the vector type all kernels are written in, `fast`
//! the int8 product, `float` the bf16 and f32 products, `gather` rows as numbers. The codes themselves are mica-codec's subject.

#[cfg(target_arch = "x86_64")]
mod amx;
mod fast;
#[cfg(target_arch = "x86_64")]
mod fast_amx;
mod float;
mod gather;
mod lanes;
mod memory;
mod plan;
mod sink;
mod stage;
mod tier;
mod tile;
mod weight;

pub use gather::Floats;
pub use plan::{Precision, ProductPlan, Together};
pub use sink::Epilogue;
pub use stage::{Form, Rows, Stage, Staged};
pub use tile::{ScaleType, TILE_ROWS};
pub use weight::{QuantWeight, ScaleVec, Scales, Unpacked};
