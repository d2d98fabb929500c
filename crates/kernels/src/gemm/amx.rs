//! AMX micro-kernels: 2 x 2 tiles of 16 x 16 sums, or 1 x 4 when there are at most 16 rows.
//!
//! A tile product (16 cycles) needs one tile of A and one of B (8 cycles each to load): 2 x 2
//! loads four tiles for four products. Per block of 32 k and output, `tdpbf16ps` sums even and odd
//! k apart, adds the two, and adds that to the output: one chain over blocks. Rows do not meet,
//! so padding rows change nothing.

use super::micro::{Call, Line, Micro, MicroFn};
use crate::amx::{Pairs, Sums, Tiles, dot_bf16, load, store, zero};

/// Rows of a tile.
const TILE: usize = 16;
/// Bytes of a tile, and of a row of one.
const TILE_BYTES: usize = 1024;
const ROW_BYTES: usize = 64;

/// The tiles of one chunk with blocks of `rows` rows: 0-3 are sums, 4 is A, 5 is A or B, 6 and 7 are
/// B. With fewer than 16 rows the tiles are that short.
///
/// # Safety
/// As [`Tiles::new`].
pub(super) unsafe fn tiles(rows: usize) -> Tiles {
    let (short, whole) = ((rows.clamp(1, TILE), 64), (TILE, 64));
    // SAFETY: promised by the caller.
    unsafe { Tiles::new([short, short, short, short, short, whole, whole, whole]) }
}

/// Up to two rows of tiles by up to two panels: what large products run.
///
/// # Safety
/// As [`MicroFn`], while the [`tiles`] of the block's rows live.
unsafe fn pairs<const LOWER: bool, const WIDE: bool>(call: &Call) {
    let right = call.acc_panel * size_of::<f32>();
    let sums = Sums { at: call.acc, row: ROW_BYTES, below: TILE_BYTES, right };
    let pairs = Pairs {
        steps: call.steps.div_ceil(16),
        a: call.a,
        a_row: ROW_BYTES,
        a_below: TILE_BYTES,
        a_step: call.a_block,
        b: call.b,
        b_right: call.b_panel,
    };
    // SAFETY: promised by the caller.
    unsafe { pairs.run::<LOWER, WIDE>(sums, call.load) }
}

/// One row of tiles by three or four panels: as many streams for products with few rows, which are
/// bound by reading B.
///
/// # Safety
/// As [`pairs`].
unsafe fn streams<const FOUR: bool>(call: &Call) {
    let panel = call.acc_panel * size_of::<f32>();
    let sums: [*mut f32; 4] = std::array::from_fn(|i| call.acc.wrapping_byte_add(i * panel));
    let (mut a, mut b) = (call.a, call.b);
    // SAFETY: promised by the caller.
    unsafe {
        if call.load {
            load!(0, sums[0], ROW_BYTES);
            load!(1, sums[1], ROW_BYTES);
            load!(2, sums[2], ROW_BYTES);
            if FOUR {
                load!(3, sums[3], ROW_BYTES);
            }
        } else {
            zero!(0);
            zero!(1);
            zero!(2);
            zero!(3);
        }
        for _ in 0..call.steps.div_ceil(16) {
            load!(4, a, ROW_BYTES);
            load!(6, b, ROW_BYTES);
            dot_bf16!(0, 4, 6);
            load!(5, b.wrapping_add(2 * call.b_panel), ROW_BYTES);
            dot_bf16!(2, 4, 5);
            load!(7, b.wrapping_add(call.b_panel), ROW_BYTES);
            dot_bf16!(1, 4, 7);
            if FOUR {
                load!(6, b.wrapping_add(3 * call.b_panel), ROW_BYTES);
                dot_bf16!(3, 4, 6);
            }
            a = a.wrapping_add(call.a_block);
            b = b.wrapping_add(TILE_BYTES);
        }
        store!(0, sums[0], ROW_BYTES);
        store!(1, sums[1], ROW_BYTES);
        store!(2, sums[2], ROW_BYTES);
        if FOUR {
            store!(3, sums[3], ROW_BYTES);
        }
    }
}

static TABLE: [&[MicroFn]; 2] = [
    &[pairs::<false, false> as MicroFn, pairs::<false, true>, streams::<false>, streams::<true>],
    &[pairs::<true, false>, pairs::<true, true>],
];

/// Four panels up to 16 rows, then two.
static PANELS: [usize; 17] = [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 2];

pub(super) fn micro() -> Micro {
    Micro { rows: 2 * TILE, line: Line::Pairs, panels: &PANELS, table: &TABLE, tile_rows: Some(TILE) }
}
