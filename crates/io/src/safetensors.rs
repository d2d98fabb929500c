//! The safetensors container: a JSON header, then the tensors' bytes.
//!
//! ```text
//! 8 bytes          length of the header, little-endian
//! header           {"name": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}, …}
//! data             row-major, little-endian; the offsets count from its first byte
//! ```
//!
//! Reading ([`SafeTensors`]) looks at the header only and checks it against the file: the tensors
//! must fill the data exactly, without holes, overlaps or bytes left over, so that every byte of
//! the file has one meaning and nothing can be smuggled beside the tensors. Writing ([`Writer`])
//! lays tensors out as the format's own library does, and streams their bytes.

mod header;
mod read;
mod write;

pub use read::{SafeTensors, TensorInfo};
pub(crate) use write::Entry;
pub use write::Writer;

/// The key of the header that is no tensor but a table of texts.
const METADATA: &str = "__metadata__";

/// Longest header accepted, in bytes: the limit of the format's own library.
const MAX_HEADER: u64 = 100_000_000;

/// Most dimensions accepted: no framework makes more.
const MAX_RANK: usize = 64;
