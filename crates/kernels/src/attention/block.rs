//! Blocks of 256 keys and values in the order that products read them.
//!
//! Every path of attention (training, prefill, decode, pages) works on these blocks, so they
//! share one kernel and have the same bits. A block holds, for one KV head:
//!
//! - keys as 16 panels of 16 keys; a panel is a sequence over pairs of dimensions, each pair 16
//!   lanes (keys) of two values. Scores are products along the panel: no lane is ever summed
//!   with another.
//! - values as panels of 16 dimensions; a panel is a sequence over pairs of keys, each pair 16
//!   lanes (dimensions) of two values.
//!
//! With bf16 the two values of a lane lie together (what `vdpbf16ps` and AMX tiles want), with f32
//! a pair is two vectors, one after the other. Odd dimensions are padded with zeros.

use std::ops::Range;

use half::bf16;
use mica_simd::{Element, Vector};

use crate::gemm;

/// Keys of a block: absolute positions `256·b ..`, on every path.
pub const BLOCK: usize = 256;
/// Lanes of a panel.
pub(crate) const TILE: usize = 16;
/// Keys that are summed together where tiles multiply: what is read of a block begins and ends at
/// multiples of it (from the block's start), so that bits do not depend on what else is read. Keys
/// that do not count have weight zero; their values have to be finite.
pub(crate) const STEP: usize = 32;
/// Values of one pair of a panel.
pub(crate) const PAIR: usize = 2 * TILE;

/// Sizes of a block for one KV head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockShape {
    /// Dimensions of keys and of values.
    pub key_dim: usize,
    pub value_dim: usize,
}

impl BlockShape {
    /// Pairs of a key panel.
    pub fn key_pairs(self) -> usize {
        self.key_dim.div_ceil(2)
    }

    /// Panels of values.
    pub fn value_tiles(self) -> usize {
        self.value_dim.div_ceil(TILE)
    }

    /// Values in the keys of a block.
    pub fn key_len(self) -> usize {
        BLOCK / TILE * self.key_pairs() * PAIR
    }

    /// Values in the values of a block.
    pub fn value_len(self) -> usize {
        self.value_tiles() * BLOCK / 2 * PAIR
    }
}

/// The tiles of keys that hold `low..high` (inside a block, not empty), in whole steps.
pub(crate) fn step_tiles(low: usize, high: usize) -> Range<usize> {
    low / STEP * STEP / TILE..high.next_multiple_of(STEP) / TILE
}

/// What a block is made of.
pub(crate) trait Stored: Element {
    /// How the movers write panels of it.
    const LINES: gemm::block::Into;
    /// How they read and write rows of it.
    const VALUES: (gemm::block::From, gemm::block::Into);
    /// Rounds 16 values as the movers do. Subnormal ones may become zeros.
    ///
    /// # Safety
    /// `to` is valid for 16 values.
    unsafe fn write<V: Vector>(values: V, to: *mut Self);
    /// Place of (lane, parity) in a pair.
    fn inner(lane: usize, parity: usize) -> usize;
}

impl Stored for f32 {
    const LINES: gemm::block::Into = gemm::block::Into::F32;
    const VALUES: (gemm::block::From, gemm::block::Into) = (gemm::block::From::F32, gemm::block::Into::F32);

    #[inline(always)]
    unsafe fn write<V: Vector>(values: V, to: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { values.store(to) }
    }

    #[inline(always)]
    fn inner(lane: usize, parity: usize) -> usize {
        parity * TILE + lane
    }
}

impl Stored for bf16 {
    const LINES: gemm::block::Into = gemm::block::Into::Pairs;
    const VALUES: (gemm::block::From, gemm::block::Into) = (gemm::block::From::High, gemm::block::Into::High);

    #[inline(always)]
    unsafe fn write<V: Vector>(values: V, to: *mut bf16) {
        // SAFETY: promised by the caller.
        unsafe { values.store_bf16_normal(to) }
    }

    #[inline(always)]
    fn inner(lane: usize, parity: usize) -> usize {
        2 * lane + parity
    }
}

/// Place of (lane n, step k) in panels of `pairs` pairs each.
#[inline(always)]
pub(crate) fn panel_at<T: Stored>(n: usize, k: usize, pairs: usize) -> usize {
    (n / TILE * pairs + k / 2) * PAIR + T::inner(n % TILE, k % 2)
}

/// Writes `row` (of f32) as lane `n` of panels: step k gets `row[k]`, steps from there to the end
/// of the last pair zero.
///
/// # Safety
/// `to` holds panels of `pairs` pairs up to lane `n`, and `pairs` is at least half of the row.
#[inline(always)]
pub(crate) unsafe fn write_lane<V: Vector, T: Stored>(to: *mut T, n: usize, pairs: usize, row: &[f32]) {
    for first in (0..2 * pairs).step_by(TILE) {
        let values = rounded::<V, T>(row.get(first..).unwrap_or(&[]));
        for (i, &value) in values.iter().enumerate().take(2 * pairs - first) {
            // SAFETY: promised by the caller.
            unsafe { *to.add(panel_at::<T>(n, first + i, pairs)) = value };
        }
    }
}

/// Writes `row` (of f32) as step `k` of panels: lane n gets `row[n]`, lanes from there to the end
/// of the last panel zero.
///
/// # Safety
/// `to` holds panels of `pairs` pairs for all lanes of the row, and `k < 2 * pairs`.
#[inline(always)]
pub(crate) unsafe fn write_step<V: Vector, T: Stored>(to: *mut T, k: usize, pairs: usize, row: &[f32]) {
    for (tile, part) in row.chunks(TILE).enumerate() {
        for (lane, &value) in rounded::<V, T>(part).iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { *to.add(panel_at::<T>(tile * TILE + lane, k, pairs)) = value };
        }
    }
}

/// The first values of a row, rounded, and zeros behind its end: together, since one conversion after the other took
/// longer than attending to a hundred keys.
#[inline(always)]
fn rounded<V: Vector, T: Stored>(row: &[f32]) -> [T; TILE] {
    let mut values = [T::from_f32(0.0); TILE];
    // SAFETY: the array holds a vector.
    unsafe { T::write(V::from_slice(&row[..row.len().min(TILE)], 0.0), values.as_mut_ptr()) };
    values
}
