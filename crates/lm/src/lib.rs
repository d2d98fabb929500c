//! Language models: configuration, model families, tokenizer, chat, caches, sampling, generation.

pub mod detokenizer;
pub mod error;
pub mod stop;
pub mod tokenizer;

pub use error::{Error, ErrorKind, Result};
