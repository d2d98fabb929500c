//! Fine-tuning: datasets, adapters, methods, the loop, checkpoints.

pub mod data;
mod error;
pub mod quickstart;
pub mod rng;
pub mod schedule;

pub use error::{Error, Result};
