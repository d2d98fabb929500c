//! Products with dequantized weights, in both directions, without ever materialising the weight.
//!
//! y = x·wᵀ, and dx = dy·w for training through a frozen weight. Weights are s·q + b in f32, one
//! fused multiply-add (of codes without biases the number times the scale, rounded once), and for bf16 rounded once
//! more. The product itself is `gemm`'s: this file dequantizes tiles into its panels as it asks for them, so a quantized
//! product has the bits of the float product with the dequantized weight, on every tier.
//!
//! A panel is 16 columns of the product, a line of 16 values (or pairs) per k. Forward, a panel is
//! a tile and a lane one of its rows; transposed, it is 16 columns of a group, and k runs over the
//! rows of the weight.

use std::ops::Range;

use mica_simd::Isa;

use super::form::Numbers;
use super::lanes::Lanes;
use super::tier::{PerTier, at_tier};
use super::tile::{Layout, TILE_ROWS, unpack, unpack_affine};
use super::weight::QuantWeight;
use crate::gemm::{PanelForm, PanelRange, PanelSource};
use crate::layout::prefetch;

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
        unsafe {
            match self.source.layout.numbers {
                Numbers::Affine => self.fill::<L, Affine>(),
                Numbers::Centred(_) | Numbers::Fp4 => self.fill::<L, Centred>(),
                Numbers::Fp8 => self.fill::<L, Fp8>(),
            }
        }
    }
}

/// How bytes of unpacked codes become weights, with s and what else a group has: z.
pub(super) trait Values {
    /// Whether bf16 holds all of them as they are, but for those below its smallest (2⁻¹³³), which stay what they are.
    const HALF: bool;
    /// Bytes 0 to 3 of each lane.
    unsafe fn of_lanes<L: Lanes>(q: L::I, s: L::F, z: L::F) -> [L::F; 4];
    /// Sixteen codes side by side.
    unsafe fn of_line<L: Lanes>(codes: *const u8, s: L::F, z: L::F) -> L::F;
    /// s and z of a block's 16 rows.
    unsafe fn factors<L: Lanes>(layout: &Layout, block: *const u8) -> (L::F, L::F);
    /// A block's codes as units, in `room` or where they are.
    unsafe fn units<L: Lanes>(layout: &Layout, block: *const u8, room: &mut Units) -> *const u8;
}

/// Bytes 0 to 3 of each lane as numbers.
#[inline(always)]
unsafe fn bytes<L: Lanes>(q: L::I) -> [L::F; 4] {
    // SAFETY: passed on.
    unsafe { [L::byte_f32::<0>(q), L::byte_f32::<1>(q), L::byte_f32::<2>(q), L::byte_f32::<3>(q)] }
}

/// Room for the unpacked codes of a group.
pub(super) type Units = [u8; 128 * TILE_ROWS];

/// s·q + z.
pub(super) struct Affine;
/// (q + z)·s.
pub(super) struct Centred;
/// The 8-bit float q times s.
pub(super) struct Fp8;

// SAFETY of the blocks below: what `Lanes` asks, passed on.
impl Values for Affine {
    const HALF: bool = false;
    #[inline(always)]
    unsafe fn of_lanes<L: Lanes>(q: L::I, s: L::F, z: L::F) -> [L::F; 4] {
        // SAFETY: as above.
        unsafe { bytes::<L>(q).map(|q| L::fma(q, s, z)) }
    }
    #[inline(always)]
    unsafe fn of_line<L: Lanes>(codes: *const u8, s: L::F, z: L::F) -> L::F {
        // SAFETY: as above.
        unsafe { L::fma(L::load_u8(codes), s, z) }
    }
    #[inline(always)]
    unsafe fn factors<L: Lanes>(layout: &Layout, block: *const u8) -> (L::F, L::F) {
        // SAFETY: as above.
        unsafe { layout.scales_of::<L>(block) }
    }
    #[inline(always)]
    unsafe fn units<L: Lanes>(layout: &Layout, block: *const u8, room: &mut Units) -> *const u8 {
        // SAFETY: as above.
        unsafe { unpack_affine::<L>(layout, block, room.as_mut_ptr()) };
        room.as_ptr()
    }
}

impl Values for Centred {
    const HALF: bool = false;
    #[inline(always)]
    unsafe fn of_lanes<L: Lanes>(q: L::I, s: L::F, z: L::F) -> [L::F; 4] {
        // SAFETY: as above.
        unsafe { bytes::<L>(q).map(|q| L::mul(L::add(q, z), s)) }
    }
    #[inline(always)]
    unsafe fn of_line<L: Lanes>(codes: *const u8, s: L::F, z: L::F) -> L::F {
        // SAFETY: as above.
        unsafe { L::mul(L::add(L::load_u8(codes), z), s) }
    }
    #[inline(always)]
    unsafe fn factors<L: Lanes>(layout: &Layout, block: *const u8) -> (L::F, L::F) {
        // SAFETY: as above.
        unsafe { (layout.scales_only::<L>(block), L::splat(-layout.centre())) }
    }
    #[inline(always)]
    unsafe fn units<L: Lanes>(layout: &Layout, block: *const u8, room: &mut Units) -> *const u8 {
        // SAFETY: as above.
        unsafe { unpack::<L>(layout, block, room.as_mut_ptr()) };
        room.as_ptr()
    }
}

impl Values for Fp8 {
    const HALF: bool = true;
    #[inline(always)]
    unsafe fn of_lanes<L: Lanes>(q: L::I, s: L::F, _: L::F) -> [L::F; 4] {
        // SAFETY: as above.
        unsafe { L::bytes_e4m3(q).map(|number| L::mul(number, s)) }
    }
    #[inline(always)]
    unsafe fn of_line<L: Lanes>(codes: *const u8, s: L::F, _: L::F) -> L::F {
        // SAFETY: as above.
        unsafe { L::mul(L::load_e4m3(codes), s) }
    }
    #[inline(always)]
    unsafe fn factors<L: Lanes>(layout: &Layout, block: *const u8) -> (L::F, L::F) {
        // SAFETY: as above.
        unsafe { (layout.scales_only::<L>(block), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn units<L: Lanes>(_: &Layout, block: *const u8, _: &mut Units) -> *const u8 {
        block
    }
}

impl Fill<'_> {
    #[inline(always)]
    unsafe fn fill<L: Lanes, V: Values>(&self) {
        // SAFETY: passed on.
        unsafe { if self.source.transposed { self.columns::<L, V>() } else { self.rows::<L, V>() } }
    }

    /// Forward: `range.k` from `range.k0` of each tile, whole groups. A lane is a row.
    #[inline(always)]
    unsafe fn rows<L: Lanes, V: Values>(&self) {
        let layout = self.source.layout;
        let PanelRange { n0, panels, k0, k, into, stride } = self.range;
        // Groups of 16 may end within a line's block.
        let padding = self.form.padded(k) - k;
        let mut room: Units = [0; 128 * TILE_ROWS];
        for panel in 0..panels {
            let mut to = into.wrapping_add(panel * stride);
            // SAFETY: a panel has room for its padding.
            unsafe { to.add(self.pair_bytes() * k / 2).write_bytes(0, self.pair_bytes() * padding / 2) };
            for g in k0 / layout.group..(k0 + k).div_ceil(layout.group) {
                // SAFETY: the block exists; a unit is 64 bytes; a panel has room for its k.
                unsafe {
                    let block = self.source.block(n0 / TILE_ROWS + panel, g);
                    if panel + 1 < panels {
                        prefetch(block.wrapping_add(layout.tile), layout.block);
                    }
                    let units = V::units::<L>(&layout, block, &mut room);
                    let (s, z) = V::factors::<L>(&layout, block);
                    for unit in 0..layout.group / 4 {
                        let q = L::load(units.add(unit * 64));
                        let [w0, w1, w2, w3] = V::of_lanes::<L>(q, s, z);
                        self.put::<L, V>(to, w0, w1);
                        let step = self.pair_bytes();
                        self.put::<L, V>(to.add(step), w2, w3);
                        to = to.add(2 * step);
                    }
                }
            }
        }
    }

    /// Transposed: rows `range.k0`… of the weight, 16 columns per panel. A lane is a column. Rows
    /// past the last tile, up to a whole block of k, are zeros.
    #[inline(always)]
    unsafe fn columns<L: Lanes, V: Values>(&self) {
        let layout = self.source.layout;
        let PanelRange { n0, panels, k0, k, into, stride } = self.range;
        let per_group = layout.group / TILE_ROWS;
        let (first, last) = (n0 / TILE_ROWS, n0 / TILE_ROWS + panels);
        let tile_bytes = TILE_ROWS / 2 * self.pair_bytes();
        let end = k0 + self.form.padded(k);
        let mut room: Units = [0; 128 * TILE_ROWS];
        let mut lines = [0u8; 128 * TILE_ROWS];
        let (mut s, mut z) = ([0f32; TILE_ROWS], [0f32; TILE_ROWS]);
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
                    let units = V::units::<L>(&layout, block, &mut room);
                    let units = std::slice::from_raw_parts(units, layout.group * TILE_ROWS);
                    let factors = V::factors::<L>(&layout, block);
                    L::store_f32(s.as_mut_ptr(), factors.0);
                    L::store_f32(z.as_mut_ptr(), factors.1);
                    transpose(units, &mut lines, layout.group / 4);
                    for strip in (g * per_group).max(first)..((g + 1) * per_group).min(last) {
                        let mut to = to.add((strip - first) * stride);
                        for r in (0..TILE_ROWS).step_by(2) {
                            let codes = lines.as_ptr().add(r * layout.group + strip % per_group * TILE_ROWS);
                            let of = |codes, r: usize| V::of_line::<L>(codes, L::splat(s[r]), L::splat(z[r]));
                            let (even, odd) = (of(codes, r), of(codes.add(layout.group), r + 1));
                            self.put::<L, V>(to, even, odd);
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
    unsafe fn put<L: Lanes, V: Values>(&self, to: *mut u8, even: L::F, odd: L::F) {
        // SAFETY: passed on.
        unsafe {
            match self.form {
                PanelForm::Pairs => L::store(to, L::bf16_pairs(even, odd)),
                PanelForm::Rounded if !V::HALF => {
                    L::store_f32(to.cast(), L::round_bf16(even));
                    L::store_f32(to.add(64).cast(), L::round_bf16(odd));
                }
                PanelForm::F32 | PanelForm::Rounded => {
                    L::store_f32(to.cast(), even);
                    L::store_f32(to.add(64).cast(), odd);
                }
            }
        }
    }
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
