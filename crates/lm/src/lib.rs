//! Language models: configuration, model families, tokenizer, chat, caches, sampling, generation.

pub mod config;
pub mod detokenizer;
pub mod error;
pub mod sample;
pub mod stop;
pub mod tokenizer;

pub use error::{Error, ErrorKind, Result};
