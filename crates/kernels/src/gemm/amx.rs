//! AMX micro-kernels: 2 x 2 tiles of 16 x 16 sums, or 1 x 4 when there are at most 16 rows.
//!
//! A tile product (16 cycles) needs one tile of A and one of B (8 cycles each to load): 2 x 2
//! loads four tiles for four products. Per block of 32 k and output, `tdpbf16ps` sums even and odd
//! k apart, adds the two, and adds that to the output: one chain over blocks. Rows do not meet,
//! so padding rows change nothing.
//!
//! The loops are assembly; the compiler never touches tile registers (see [`crate::amx`]).

use std::arch::asm;

use super::micro::{Call, Line, Micro, MicroFn};
use crate::amx::Tiles;

/// Rows of a tile.
const TILE: usize = 16;

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

/// Loads or clears the sums, runs the blocks, stores the sums.
macro_rules! tiles {
    ($(#[$doc:meta])* $name:ident, load: [$($load:literal),*], zero: [$($zero:literal),*],
     block: [$($block:literal),*], store: [$($store:literal),*]) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As [`MicroFn`], while the [`tiles`] of the block's rows live.
        unsafe fn $name(call: &Call) {
            let panel = call.acc_panel * 4;
            // SAFETY: the caller promises panels and tiles; the tile registers are nobody's else.
            unsafe {
                asm!(
                    "test {load}, {load}",
                    "jz 3f",
                    $($load,)*
                    "jmp 4f",
                    "3:",
                    $($zero,)*
                    "4:",
                    "test {blocks}, {blocks}",
                    "jz 5f",
                    "2:",
                    $($block,)*
                    "add {a}, {a_block}",
                    "add {b0}, 1024",
                    "add {b2}, 1024",
                    "dec {blocks}",
                    "jnz 2b",
                    "5:",
                    $($store,)*
                    load = in(reg) call.load as usize,
                    blocks = inout(reg) call.steps.div_ceil(16) => _,
                    a = inout(reg) call.a => _,
                    a_block = in(reg) call.a_block,
                    b0 = inout(reg) call.b => _,
                    b2 = inout(reg) call.b.wrapping_add(2 * call.b_panel) => _,
                    b_panel = in(reg) call.b_panel,
                    c0 = in(reg) call.acc,
                    c1 = in(reg) call.acc.wrapping_byte_add(panel),
                    c2 = in(reg) call.acc.wrapping_byte_add(2 * panel),
                    c3 = in(reg) call.acc.wrapping_byte_add(3 * panel),
                    row = in(reg) 64usize,
                    options(nostack),
                );
            }
        }
    };
}

tiles!(
    /// One row of tiles, one panel.
    one_by_one,
    load: ["tileloadd tmm0, [{c0} + {row}*1]", "/* {c1} {c2} {c3} {b_panel} */"],
    zero: ["tilezero tmm0"],
    block: [
        "tileloadd tmm4, [{a} + {row}*1]",
        "tileloadd tmm6, [{b0} + {row}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6"
    ],
    store: ["tilestored [{c0} + {row}*1], tmm0"]
);

tiles!(
    /// One row of tiles, two panels.
    one_by_two,
    load: [
        "tileloadd tmm0, [{c0} + {row}*1]",
        "tileloadd tmm1, [{c1} + {row}*1]",
        "/* {c2} {c3} */"
    ],
    zero: ["tilezero tmm0", "tilezero tmm1"],
    block: [
        "tileloadd tmm4, [{a} + {row}*1]",
        "tileloadd tmm6, [{b0} + {row}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "add {b0}, {b_panel}",
        "tileloadd tmm7, [{b0} + {row}*1]",
        "sub {b0}, {b_panel}",
        "tdpbf16ps tmm1, tmm4, tmm7"
    ],
    store: ["tilestored [{c0} + {row}*1], tmm0", "tilestored [{c1} + {row}*1], tmm1"]
);

tiles!(
    /// One row of tiles, three panels.
    one_by_three,
    load: [
        "tileloadd tmm0, [{c0} + {row}*1]",
        "tileloadd tmm1, [{c1} + {row}*1]",
        "tileloadd tmm2, [{c2} + {row}*1]",
        "/* {c3} */"
    ],
    zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2"],
    block: [
        "tileloadd tmm4, [{a} + {row}*1]",
        "tileloadd tmm6, [{b0} + {row}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "add {b0}, {b_panel}",
        "tileloadd tmm7, [{b0} + {row}*1]",
        "sub {b0}, {b_panel}",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tileloadd tmm5, [{b2} + {row}*1]",
        "tdpbf16ps tmm2, tmm4, tmm5"
    ],
    store: [
        "tilestored [{c0} + {row}*1], tmm0",
        "tilestored [{c1} + {row}*1], tmm1",
        "tilestored [{c2} + {row}*1], tmm2"
    ]
);

tiles!(
    /// One row of tiles, four panels: four streams for products with few rows.
    one_by_four,
    load: [
        "tileloadd tmm0, [{c0} + {row}*1]",
        "tileloadd tmm1, [{c1} + {row}*1]",
        "tileloadd tmm2, [{c2} + {row}*1]",
        "tileloadd tmm3, [{c3} + {row}*1]"
    ],
    zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    block: [
        "tileloadd tmm4, [{a} + {row}*1]",
        "tileloadd tmm6, [{b0} + {row}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm5, [{b2} + {row}*1]",
        "tdpbf16ps tmm2, tmm4, tmm5",
        "add {b0}, {b_panel}",
        "add {b2}, {b_panel}",
        "tileloadd tmm7, [{b0} + {row}*1]",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tileloadd tmm6, [{b2} + {row}*1]",
        "tdpbf16ps tmm3, tmm4, tmm6",
        "sub {b0}, {b_panel}",
        "sub {b2}, {b_panel}"
    ],
    store: [
        "tilestored [{c0} + {row}*1], tmm0",
        "tilestored [{c1} + {row}*1], tmm1",
        "tilestored [{c2} + {row}*1], tmm2",
        "tilestored [{c3} + {row}*1], tmm3"
    ]
);

tiles!(
    /// Two rows of tiles, one panel.
    two_by_one,
    load: [
        "tileloadd tmm0, [{c0} + {row}*1]",
        "tileloadd tmm2, [{c0} + {row}*1 + 1024]",
        "/* {c1} {c2} {c3} {b_panel} */"
    ],
    zero: ["tilezero tmm0", "tilezero tmm2"],
    block: [
        "tileloadd tmm4, [{a} + {row}*1]",
        "tileloadd tmm6, [{b0} + {row}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm5, [{a} + {row}*1 + 1024]",
        "tdpbf16ps tmm2, tmm5, tmm6"
    ],
    store: ["tilestored [{c0} + {row}*1], tmm0", "tilestored [{c0} + {row}*1 + 1024], tmm2"]
);

tiles!(
    /// Two rows of tiles, two panels: the one that large products run.
    two_by_two,
    load: [
        "tileloadd tmm0, [{c0} + {row}*1]",
        "tileloadd tmm1, [{c1} + {row}*1]",
        "tileloadd tmm2, [{c0} + {row}*1 + 1024]",
        "tileloadd tmm3, [{c1} + {row}*1 + 1024]",
        "/* {c2} {c3} */"
    ],
    zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    block: [
        "tileloadd tmm6, [{b0} + {row}*1]",
        "tileloadd tmm4, [{a} + {row}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm5, [{a} + {row}*1 + 1024]",
        "tdpbf16ps tmm2, tmm5, tmm6",
        "add {b0}, {b_panel}",
        "tileloadd tmm7, [{b0} + {row}*1]",
        "sub {b0}, {b_panel}",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tdpbf16ps tmm3, tmm5, tmm7"
    ],
    store: [
        "tilestored [{c0} + {row}*1], tmm0",
        "tilestored [{c1} + {row}*1], tmm1",
        "tilestored [{c0} + {row}*1 + 1024], tmm2",
        "tilestored [{c1} + {row}*1 + 1024], tmm3"
    ]
);

static TABLE: [&[MicroFn]; 2] =
    [&[one_by_one as MicroFn, one_by_two, one_by_three, one_by_four], &[two_by_one, two_by_two]];

/// Four panels up to 16 rows, then two.
static PANELS: [usize; 17] = [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 2];

pub(super) fn micro() -> Micro {
    Micro { rows: 2 * TILE, line: Line::Pairs, panels: &PANELS, table: &TABLE, tile_rows: Some(TILE) }
}
