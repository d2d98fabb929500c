//! [`super::product`] on AMX tiles.
//!
//! A panel already has the layout of right-hand tiles: a row of one is a pair of 16 lanes.

use std::ops::Range;

use half::bf16;

use super::block::{PAIR, TILE};
use crate::amx::{Pairs, Sums, Tiles};

/// Pairs of a tile.
const PAIRS: usize = 16;

/// See [`super::product::product`].
///
/// # Safety
/// As there; the tier is `Isa::Amx`.
pub(super) unsafe fn product(
    a: *const bf16,
    a_stride: usize,
    rows: usize,
    b: *const bf16,
    panel: usize,
    panels: Range<usize>,
    pairs: Range<usize>,
    out: *mut f32,
    out_stride: usize,
    add: bool,
) {
    if rows == 0 || panels.is_empty() {
        return;
    }
    let whole = (pairs.end - pairs.start) / PAIRS * PAIRS;
    let rest = pairs.end - pairs.start - whole;
    for row in (0..rows).step_by(2 * TILE) {
        let here = (rows - row).min(2 * TILE);
        let mut block = Block {
            a: a.wrapping_add(row * a_stride + 2 * pairs.start),
            a_stride,
            b: b.wrapping_add(pairs.start * PAIR),
            panel,
            out: out.wrapping_add(row * out_stride),
            out_stride,
            add,
        };
        // SAFETY: rows, pairs and panels are those of the caller. Where nothing is to be multiplied the
        // whole part clears the sums.
        unsafe {
            if whole > 0 || rest == 0 {
                block.run(here, whole / PAIRS, PAIRS, panels.clone());
                block.add = true;
            }
            if rest > 0 {
                block.a = block.a.wrapping_add(2 * whole);
                block.b = block.b.wrapping_add(whole * PAIR);
                block.run(here, 1, rest, panels.clone());
            }
        }
    }
}

/// Up to 32 rows.
struct Block {
    a: *const bf16,
    a_stride: usize,
    b: *const bf16,
    panel: usize,
    out: *mut f32,
    out_stride: usize,
    add: bool,
}

impl Block {
    /// `steps` products of `pairs` pairs for each panel.
    ///
    /// # Safety
    /// As [`product`].
    unsafe fn run(&self, rows: usize, steps: usize, pairs: usize, panels: Range<usize>) {
        let (upper, lower) = (rows.min(TILE), rows.saturating_sub(TILE));
        let (a, b) = (4 * pairs, pairs);
        let lower_rows = lower.max(1);
        // SAFETY: promised by the caller.
        unsafe {
            let _tiles = Tiles::new([
                (upper, 64),
                (upper, 64),
                (lower_rows, 64),
                (lower_rows, 64),
                (upper, a),
                (lower_rows, a),
                (b, 64),
                (b, 64),
            ]);
            let mut panel = panels.start;
            while panel < panels.end {
                let wide = panel + 1 < panels.end;
                match (lower > 0, wide) {
                    (true, true) => self.columns::<true, true>(panel, steps),
                    (true, false) => self.columns::<true, false>(panel, steps),
                    (false, true) => self.columns::<false, true>(panel, steps),
                    (false, false) => self.columns::<false, false>(panel, steps),
                }
                panel += if wide { 2 } else { 1 };
            }
        }
    }

    /// One or two panels, one or two rows of tiles.
    ///
    /// # Safety
    /// As [`product`]; the tiles are configured.
    #[inline(always)]
    unsafe fn columns<const LOWER: bool, const WIDE: bool>(&self, panel: usize, steps: usize) {
        let (row, a_row) = (self.out_stride * size_of::<f32>(), self.a_stride * size_of::<bf16>());
        let at = self.out.wrapping_add(panel * TILE);
        let sums = Sums { at, row, below: TILE * row, right: TILE * size_of::<f32>() };
        let pairs = Pairs {
            steps,
            a: self.a.cast(),
            a_row,
            a_below: TILE * a_row,
            a_step: PAIRS * 2 * size_of::<bf16>(),
            b: self.b.wrapping_add(panel * self.panel).cast(),
            b_right: self.panel * size_of::<bf16>(),
        };
        // SAFETY: tiles are configured for the rows that exist; panels and operands are the caller's.
        unsafe { pairs.run::<LOWER, WIDE>(sums, self.add) }
    }
}
