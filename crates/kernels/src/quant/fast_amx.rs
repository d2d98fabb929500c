//! The int8 product on AMX tiles: the same sums and the same f32 chains as `fast`, so the same
//! bits.
//!
//! A tile of the weight is unpacked to bytes, which is the layout of a right-hand AMX tile: a row
//! holds 4 k of 16 outputs. Its left-hand partner is 16 rows of x. The int32 sums of a group go
//! through memory into the f32 chains, which live in registers; that, not the multiplication, is
//! what takes the time, so the tiles of the next group are already on their way.

use mica_threads::Scratch;

use super::fast::FastTask;
use super::lanes::{Avx512, Lanes};
use super::stage::ROW_LANES;
use super::tile::{TILE_ROWS, unpack};
use crate::amx::{self, Tiles};

/// Groups whose sums are under way at a time: a product and its way through memory take about as
/// long as the chains of three groups.
const AHEAD: usize = 4;

/// Tiles by rows of x, one chunk.
pub(super) struct AmxBlock<'a> {
    pub task: &'a FastTask<'a>,
    pub tiles: (usize, usize),
    pub rows: (usize, usize),
    pub scratch: &'a Scratch,
}

/// One unpacked tile.
struct Panel {
    /// `[k / 4][16 rows × 4]`.
    codes: *mut u8,
    /// `[group][16]`.
    scales: *mut f32,
    /// `[group][16]`.
    biases: *mut f32,
    /// Blocks of 16 × 16 int32 on their way to the chains.
    sums: *mut i32,
}

impl AmxBlock<'_> {
    /// # Safety
    /// The tier is `Isa::Amx`; tiles and rows exist.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
    pub unsafe fn run(self) {
        let layout = self.task.weight.layout;
        let panel = Panel {
            codes: self.scratch.take::<u8>(layout.groups * layout.group * TILE_ROWS).as_mut_ptr(),
            scales: self.scratch.take::<f32>(layout.groups * TILE_ROWS).as_mut_ptr(),
            biases: self.scratch.take::<f32>(layout.groups * TILE_ROWS).as_mut_ptr(),
            sums: self.scratch.take::<i32>(AHEAD * TILE_ROWS * TILE_ROWS).as_mut_ptr(),
        };
        let whole = (self.rows.1 - self.rows.0) / TILE_ROWS * TILE_ROWS;
        let rest = self.rows.1 - self.rows.0 - whole;
        // SAFETY: row blocks of 16 and the rest are inside the chunk's rows; tiles are configured
        // for as many rows.
        unsafe {
            if whole > 0 {
                let _tiles = configure(TILE_ROWS, layout.group);
                for tile in self.tiles.0..self.tiles.1 {
                    self.unpack::<Avx512>(&panel, tile);
                    for row in (self.rows.0..self.rows.0 + whole).step_by(TILE_ROWS) {
                        self.multiply::<Avx512, 16>(&panel, tile, row);
                    }
                }
            }
            if rest > 0 {
                let row = self.rows.0 + whole;
                let _tiles = configure(rest, layout.group);
                for tile in self.tiles.0..self.tiles.1 {
                    self.unpack::<Avx512>(&panel, tile);
                    match rest {
                        1..=2 => self.multiply::<Avx512, 2>(&panel, tile, row),
                        3..=4 => self.multiply::<Avx512, 4>(&panel, tile, row),
                        5..=8 => self.multiply::<Avx512, 8>(&panel, tile, row),
                        _ => self.multiply::<Avx512, 16>(&panel, tile, row),
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn unpack<L: Lanes>(&self, panel: &Panel, tile: usize) {
        let weight = self.task.weight;
        let layout = weight.layout;
        for g in 0..layout.groups {
            // SAFETY: block g of a tile that exists; the panel has room for all groups.
            unsafe {
                let block = weight.tile_pointer(tile).add(g * layout.block);
                unpack::<L>(&layout, block, panel.codes.add(g * layout.group * TILE_ROWS));
                let (s, b) = layout.scales_of::<L>(block);
                L::store_f32(panel.scales.add(g * TILE_ROWS), s);
                L::store_f32(panel.biases.add(g * TILE_ROWS), b);
            }
        }
    }

    /// One tile by up to M rows from `row` on, a multiple of 16. Rows past the chunk's last have
    /// d = 0 in the chains, times whatever the sums hold, and are not written.
    #[inline(always)]
    unsafe fn multiply<L: Lanes, const M: usize>(&self, panel: &Panel, tile: usize, row: usize) {
        let FastTask { weight, x, sink, .. } = self.task;
        let layout = weight.layout;
        let groups = layout.groups;
        let rows = M.min(self.rows.1 - row);
        // SAFETY: tiles are configured for `rows` rows; d and e exist for 16 rows at a time.
        unsafe {
            let scales = x.scale_offset(row, groups);
            let (d, e) = (x.scales.add(scales).cast_const(), x.sums.add(scales).cast_const());
            let values = x.values.add(row * x.stride);
            let mut chains = [L::splat(0.0); M];
            for g in 0..groups.min(AHEAD - 1) {
                group_sums(panel, values, x.stride, layout.group, g);
            }
            for g in 0..groups {
                if g + AHEAD - 1 < groups {
                    group_sums(panel, values, x.stride, layout.group, g + AHEAD - 1);
                }
                let sums = panel.sums.add(g % AHEAD * TILE_ROWS * TILE_ROWS);
                let s = L::load_f32(panel.scales.add(g * TILE_ROWS));
                for c in 0..M {
                    let scale = L::mul(s, L::splat(*d.add(g * ROW_LANES + c)));
                    let sum = L::to_f32(L::load(sums.add(c * TILE_ROWS).cast()));
                    chains[c] = L::fma(sum, scale, chains[c]);
                }
            }
            let mut biases = [L::splat(0.0); M];
            for g in 0..groups {
                let b = L::load_f32(panel.biases.add(g * TILE_ROWS));
                for c in 0..M {
                    biases[c] = L::fma(b, L::splat(*e.add(g * ROW_LANES + c)), biases[c]);
                }
            }
            for c in 0..rows {
                sink.put::<L>(row + c, tile * TILE_ROWS, L::add(chains[c], biases[c]));
            }
        }
    }
}

/// Tiles 0 to 3: sums; 4 and 5: x; 6 and 7: codes.
unsafe fn configure(rows: usize, group: usize) -> Tiles {
    let k = group.min(64);
    // SAFETY: 1 to 16 rows of 16, 32 or 64 bytes.
    unsafe {
        let (sums, x, codes) = ((rows, 64), (rows, k), (k / 4, 64));
        Tiles::new([sums, sums, sums, sums, x, x, codes, codes])
    }
}

/// The int32 sums of group g for all rows, written to their quarter of `panel.sums`.
#[inline(always)]
unsafe fn group_sums(panel: &Panel, values: *const u8, stride: usize, group: usize, g: usize) {
    // SAFETY: the group lies inside the row and the panel.
    unsafe {
        let to = panel.sums.add(g % AHEAD * TILE_ROWS * TILE_ROWS);
        let codes = panel.codes.add(g * group * TILE_ROWS);
        let values = values.add(g * group);
        macro_rules! product {
            ($sums:literal, $x:literal, $codes:literal) => {{
                amx::zero!($sums);
                amx::load!($x, values, stride);
                amx::load!($codes, codes, 64usize);
                amx::dot_i8_u8!($sums, $x, $codes);
                if group == 128 {
                    amx::load!($x, values.add(64), stride);
                    amx::load!($codes, codes.add(1024), 64usize);
                    amx::dot_i8_u8!($sums, $x, $codes);
                }
                amx::store!($sums, to, 64usize);
            }};
        }
        match g % AHEAD {
            0 => product!(0, 4, 6),
            1 => product!(1, 5, 7),
            2 => product!(2, 4, 6),
            _ => product!(3, 5, 7),
        }
    }
}
