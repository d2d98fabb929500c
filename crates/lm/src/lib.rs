//! Language models: configuration, model families, tokenizer, chat, caches, sampling, generation.

pub mod cache;
pub mod chat;
pub mod config;
pub mod convert;
pub mod decode;
pub mod detokenizer;
pub mod error;
pub mod generate;
pub mod layers;
pub mod load;
pub mod locate;
pub mod memory;
pub mod models;
pub mod sample;
pub mod stop;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, ErrorKind, Result};
