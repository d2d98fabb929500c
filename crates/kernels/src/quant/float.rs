//! Products with dequantized weights, in both directions, without ever materialising the weight.
//!
//! y = x·wᵀ, and dx = dy·w for training through a frozen weight. Weights are s·q + b in f32, one
//! fused multiply-add, and for bf16 rounded once more. The product itself is `gemm`'s: this file
//! dequantizes tiles into its panels as it asks for them, so a quantized product has the bits of
//! the float product with the dequantized weight, on every tier.
//!
//! A panel is 16 columns of the product, a line of 16 values (or pairs) per k. Forward, a panel is
//! a tile and a lane one of its rows; transposed, it is 16 columns of a group, and k runs over the
//! rows of the weight.

use std::ops::Range;

use mica_simd::Isa;

use super::lanes::Lanes;
use super::tier::{PerTier, at_tier};
use super::tile::{Layout, SUB, TILE_ROWS, unpack_any};
use super::weight::QuantWeight;
use crate::gemm::{PanelForm, PanelRange, PanelSource};

/// The tiles of a weight as the second operand of a float product.
#[derive(Debug)]
pub(super) struct Dequantized {
    tiles: *const u8,
    layout: Layout,
    /// dx = dy·w rather than y = x·wᵀ.
    transposed: bool,
}

// SAFETY: the tiles are only read; whoever makes one keeps the weight alive.
unsafe impl Send for Dequantized {}
// SAFETY: as above.
unsafe impl Sync for Dequantized {}

impl Dequantized {
    /// Reads the rows `outputs` of `weight` (from a whole tile on), which must outlive it.
    pub fn new(weight: &QuantWeight, outputs: Range<usize>, transposed: bool) -> Dequantized {
        let mut layout = weight.layout;
        let first = outputs.start / TILE_ROWS;
        layout.tiles = outputs.end.div_ceil(TILE_ROWS) - first;
        Dequantized { tiles: weight.tiles.pointer().wrapping_add(first * layout.tile), layout, transposed }
    }

    /// The block of group `g` of a tile.
    fn block(&self, tile: usize, g: usize) -> *const u8 {
        self.tiles.wrapping_add(tile * self.layout.tile + g * self.layout.block)
    }
}

impl PanelSource for Dequantized {
    unsafe fn panels(&self, isa: Isa, form: PanelForm, range: PanelRange) {
        // SAFETY: promised by the caller.
        unsafe { at_tier(isa, Fill { source: self, form, range }) }
    }
}

struct Fill<'a> {
    source: &'a Dequantized,
    form: PanelForm,
    range: PanelRange,
}

impl PerTier for Fill<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: passed on.
        unsafe { if self.source.transposed { self.columns::<L>() } else { self.rows::<L>() } }
    }
}

impl Fill<'_> {
    /// Forward: `range.k` from `range.k0` of each tile, whole groups. A lane is a row.
    #[inline(always)]
    unsafe fn rows<L: Lanes>(&self) {
        let layout = self.source.layout;
        let PanelRange { n0, panels, k0, k, into, stride } = self.range;
        let mut units = [0u8; 128 * TILE_ROWS];
        for panel in 0..panels {
            let mut to = into.wrapping_add(panel * stride);
            for g in k0 / layout.group..(k0 + k).div_ceil(layout.group) {
                // SAFETY: the block exists; a unit is 64 bytes; a panel has room for its k.
                unsafe {
                    let block = self.source.block(n0 / TILE_ROWS + panel, g);
                    unpack_any::<L>(layout.bits, block, units.as_mut_ptr(), layout.group / SUB);
                    let s = L::load_scales(block.add(layout.scales()), layout.scale);
                    let b = L::load_scales(block.add(layout.biases()), layout.scale);
                    for unit in 0..layout.group / 4 {
                        let q = L::load(units.as_ptr().add(unit * 64));
                        let w0 = L::fma(L::byte_f32::<0>(q), s, b);
                        let w1 = L::fma(L::byte_f32::<1>(q), s, b);
                        let w2 = L::fma(L::byte_f32::<2>(q), s, b);
                        let w3 = L::fma(L::byte_f32::<3>(q), s, b);
                        self.put::<L>(to, w0, w1);
                        let step = self.pair_bytes();
                        self.put::<L>(to.add(step), w2, w3);
                        to = to.add(2 * step);
                    }
                }
            }
        }
    }

    /// Transposed: rows `range.k0`… of the weight, 16 columns per panel. A lane is a column. Rows
    /// past the last tile, up to a whole block of k, are zeros.
    #[inline(always)]
    unsafe fn columns<L: Lanes>(&self) {
        let layout = self.source.layout;
        let PanelRange { n0, panels, k0, k, into, stride } = self.range;
        let per_group = layout.group / TILE_ROWS;
        let (first, last) = (n0 / TILE_ROWS, n0 / TILE_ROWS + panels);
        let tile_bytes = TILE_ROWS / 2 * self.pair_bytes();
        let end = k0 + self.form.padded(k);
        let mut units = [0u8; 128 * TILE_ROWS];
        let mut lines = [0u8; 128 * TILE_ROWS];
        let (mut s, mut b) = ([0f32; TILE_ROWS], [0f32; TILE_ROWS]);
        for row in (k0..end).step_by(TILE_ROWS) {
            let to = into.wrapping_add((row - k0) / TILE_ROWS * tile_bytes);
            // SAFETY: the block exists if the tile does; a panel has room for its k.
            unsafe {
                if row / TILE_ROWS >= layout.tiles {
                    for panel in 0..panels {
                        to.add(panel * stride).write_bytes(0, tile_bytes);
                    }
                    continue;
                }
                for g in first / per_group..last.div_ceil(per_group) {
                    let block = self.source.block(row / TILE_ROWS, g);
                    unpack_any::<L>(layout.bits, block, units.as_mut_ptr(), layout.group / SUB);
                    L::store_f32(s.as_mut_ptr(), L::load_scales(block.add(layout.scales()), layout.scale));
                    L::store_f32(b.as_mut_ptr(), L::load_scales(block.add(layout.biases()), layout.scale));
                    transpose(&units, &mut lines, layout.group / 4);
                    for strip in (g * per_group).max(first)..((g + 1) * per_group).min(last) {
                        let mut to = to.add((strip - first) * stride);
                        for r in (0..TILE_ROWS).step_by(2) {
                            let codes = lines.as_ptr().add(r * layout.group + strip % per_group * TILE_ROWS);
                            let even = value_of::<L>(codes, s[r], b[r]);
                            let odd = value_of::<L>(codes.add(layout.group), s[r + 1], b[r + 1]);
                            self.put::<L>(to, even, odd);
                            to = to.add(self.pair_bytes());
                        }
                    }
                }
            }
        }
    }

    /// Bytes that two k take in a panel.
    #[inline(always)]
    fn pair_bytes(&self) -> usize {
        if self.form == PanelForm::Pairs { 64 } else { 128 }
    }

    /// Writes the lines of two k.
    #[inline(always)]
    unsafe fn put<L: Lanes>(&self, to: *mut u8, even: L::F, odd: L::F) {
        // SAFETY: passed on.
        unsafe {
            match self.form {
                PanelForm::Pairs => L::store(to, L::bf16_pairs(even, odd)),
                PanelForm::Rounded => {
                    L::store_f32(to.cast(), L::round_bf16(even));
                    L::store_f32(to.add(64).cast(), L::round_bf16(odd));
                }
                PanelForm::F32 => {
                    L::store_f32(to.cast(), even);
                    L::store_f32(to.add(64).cast(), odd);
                }
            }
        }
    }
}

/// Sixteen codes of one row as weights.
#[inline(always)]
unsafe fn value_of<L: Lanes>(codes: *const u8, s: f32, b: f32) -> L::F {
    // SAFETY: passed on.
    unsafe { L::fma(L::load_u8(codes), L::splat(s), L::splat(b)) }
}

/// From units `[k / 4][16 rows][4]` to rows `[16][k]`.
#[inline(always)]
fn transpose(units: &[u8], lines: &mut [u8], count: usize) {
    for row in 0..TILE_ROWS {
        for unit in 0..count {
            let from = &units[unit * 64 + row * 4..][..4];
            lines[(row * count + unit) * 4..][..4].copy_from_slice(from);
        }
    }
}
