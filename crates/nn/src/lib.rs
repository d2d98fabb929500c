//! Modules, layers, losses and optimizers over `mica-array`.
//!
//! A module is a struct whose fields are [`Parameter`]s and other modules; [`Module`] walks them by
//! name, so that weights can be loaded, saved, trained, frozen and counted. The crate does no I/O:
//! it hands out and takes named arrays, which `mica_array::files` writes and reads.
//!
//! New here? [`guide`] is an introduction to lazy arrays and to this crate.
//!
//! What a forward pass needs besides its inputs is in a [`Context`]: the precision of products, and
//! random numbers while training. New layers take their numbers from [`Keys`], the sequence that
//! MLX's global state goes through.

pub mod activations;
mod context;
#[doc = include_str!("../docs/guide.md")]
pub mod guide {}
pub mod init;
mod layers;
pub mod losses;
mod module;
mod nested;
pub mod optim;
mod parameter;
mod train;
mod tree;

pub use activations::*;
pub use context::{Context, Keys};
pub use layers::*;
pub use module::{Item, ItemMut, Module, join};
pub use nested::Nested;
pub use parameter::{Parameter, Role};
pub use train::{checkpoint, gradients, value_and_grad, with_parameters};
pub use tree::{
    Which, apply, apply_to_modules, children, filter_map, freeze, leaf_modules, load_parameters,
    named_modules, parameters, quantize, set_dtype, set_parameters, trainable_parameters, unfreeze,
    update_modules,
};

pub use mica_array::{Error, Result};
