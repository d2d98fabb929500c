//! Fine-tuning: datasets, adapters, methods, the loop, checkpoints.

pub mod adapters;
pub mod config;
pub mod data;
mod error;
pub mod events;
pub mod fuse;
pub mod lines;
pub mod methods;
pub mod quickstart;
pub mod report;
pub mod rng;
pub mod run;
pub mod schedule;
pub mod session;
pub mod summary;
pub mod trainer;

pub use error::{Error, Result};
