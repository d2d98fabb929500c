//! Containers and disk: what mica reads from files and how it writes them.
//!
//! This crate knows bytes, types of elements and shapes. It knows no array: `mica-array` and the
//! crates below it turn bytes into values.
//!
//! Two rules hold throughout.
//!
//! - **Every file read is input from a stranger.** Lengths, offsets and names are checked against
//!   the file before anything is allocated or followed; a malformed file is an [`Error`] that names
//!   it and says what is wrong, never a panic. Nothing is mapped into memory, because a file that
//!   is cut short under a mapping kills the process; reads are positioned reads (`pread`) and may
//!   run on many threads at once.
//! - **Every file written goes through [`atomic`]**: a reader sees the old content or the new one,
//!   never a part, whatever moment the process or the machine stops at.

pub mod atomic;
mod content;
mod dtype;
mod error;
pub mod gguf;
pub mod hash;
mod input;
pub mod jsonl;
pub mod npy;
pub mod npz;
pub mod safetensors;
mod strict_json;
pub mod weights;
mod zip;

pub use content::ContentResult;
pub use dtype::DType;
pub use error::{Error, ErrorKind, Result};
