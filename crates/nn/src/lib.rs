//! Modules, layers and optimizers over `mica-array`.
//!
//! A module is a struct whose fields are arrays and other modules; [`Module`] walks them by name,
//! so that weights can be loaded, saved, trained and counted. The crate does no I/O: it hands out
//! and takes named arrays.

mod context;
mod layers;
mod module;
pub mod optim;
mod train;

pub use context::Context;
pub use layers::{Adapter, Embedding, Linear, RmsNorm};
pub use module::{Module, join, parameters, set_parameters};
pub use train::{gradients, with_parameters};

pub use mica_array::{Error, Result};
