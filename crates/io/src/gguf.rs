//! GGUF, the file of llama.cpp: typed metadata, then tensors, many of them in blocks of a few bits.
//!
//! ```text
//! "GGUF"  version u32  tensors u64  metadata entries u64
//! metadata   key, type, value; tokenizer and template of a model are here
//! tensors    name, dimensions (fastest first), type, offset
//! padding to the alignment (32 unless the metadata says otherwise)
//! data       each tensor at a multiple of the alignment
//! ```
//!
//! Reads versions 2 and 3, little-endian; writes version 3. Shapes are given as everywhere in mica,
//! the slowest dimension first. What the blocks mean is `mica-codec`'s business, what the metadata
//! mean is `mica-lm`'s.
//!
//! The reader refuses lengths and offsets that leave the file, tensors that overlap or do not lie
//! at the alignment, holes between them, and equal names. Bytes after the last tensor are let
//! pass: writers differ in the padding at the end.

mod kind;
mod metadata;
mod read;
mod write;

pub use kind::BlockType;
pub use metadata::{Array, Value};
pub use read::{Gguf, GgufTensor};
pub use write::GgufWriter;

const MAGIC: [u8; 4] = *b"GGUF";

/// Where tensors lie unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// The metadata key of the alignment.
const ALIGNMENT_KEY: &str = "general.alignment";

/// Most dimensions of a tensor, as in ggml.
const MAX_RANK: usize = 4;
