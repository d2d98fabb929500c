//! Fine-tuning: datasets, adapters, methods, the loop, checkpoints.

pub mod data;
mod error;
pub mod rng;

pub use error::{Error, Result};
