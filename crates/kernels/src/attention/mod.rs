//! Scaled dot-product attention: forward for training, prefill and decode, over arrays or pages,
//! and backward.
//!
//! One order on every path (docs/NUMERICS.md): keys in absolute blocks of 256; in a block each
//! score is one ascending chain over dimensions, the exponentials are relative to the block's own
//! maximum and summed in 16 lanes, the output is one ascending chain over keys from zero; blocks
//! are merged in ascending order. So a token's result has the same bits whether it was computed in
//! a prompt of any length, a chunk of it, or alone, from arrays or from pages.
//!
//! A query attends to the keys that all of these allow: causality (query i of L stands at position
//! S - L + i, or behind the tokens already in the pages), a sliding window, its own range
//! `key_start..key_end` (packing), and a mask. A query that may attend to nothing gives zeros, and
//! -∞ as its log-sum-exp. Keys outside a query's range count as weight zero, so an infinity among
//! the *values* of a neighbouring position can still turn its block into NaN.

mod ahead;
mod backward;
mod block;
mod block_rows;
mod codes;
mod forward;
mod heads;
mod packing;
mod paged;
mod pages;
mod product;
mod rule;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub use crate::gemm::Precision;
pub use backward::{AttentionBackwardArgs, attention_backward, backward_scratch};
pub use block::BLOCK;
pub use codes::Codes;
pub use forward::{AttentionArgs, attention};
pub use paged::{PagedArgs, PagedSequence, paged_attention};
pub use pages::{PageFormat, PageShape, read_pages};
pub use rule::Rule;
