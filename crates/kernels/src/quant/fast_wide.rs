//! The int8 product of many rows where there are 32 registers: two tiles by six rows of x.
//!
//! Twelve int32 sums and twelve f32 chains stay in registers, and each four bytes of a row that are loaded serve two
//! products: with one tile by eight rows the loads take as long as the products. The chains of the bias term follow
//! after the last group; beside the others they would need twelve registers more. On Zen 5 the loops alone reach 77 %
//! of the int8 peak at groups of 64, one tile by eight rows 69; three tiles by four rows and four by three do as well.
//! Operations of the f32 chains and of unpacking nibbles leave no more.
//!
//! Codes of 8 bits are read from the tiles themselves, and on AMD's cores those of 4 (unpacking first gained nothing on
//! Zen 5). Others are unpacked to 8 bits once a chunk (4 bits on Emerald Rapids: 8 to 11 % faster).

use mica_simd::Cores;
use mica_threads::Scratch;

use super::fast::{CACHED, FastTask, dot};
use super::form::Numbers;
use super::lanes::Lanes;
use super::stage::ROW_LANES;
use super::tier::PerTier;
use super::tile::{Codes, Plain, TILE_ROWS, unit, unpack};

/// Rows of x by two tiles, and by one.
const PAIR_ROWS: usize = 6;
const SINGLE_ROWS: usize = 8;

/// Tiles by rows of x, one chunk.
pub(super) struct Wide<'a> {
    pub task: &'a FastTask<'a>,
    pub tiles: (usize, usize),
    pub rows: (usize, usize),
    pub scratch: &'a Scratch,
}

/// Tiles in the form that products read many times.
#[derive(Clone, Copy)]
struct Panel {
    /// Codes of 4 or 8 bits, of the first tile.
    codes: *const u8,
    /// Bytes from group to group, and from tile to tile.
    block: usize,
    tile: usize,
    /// `[tile][group][scales, biases][16]`.
    scales: *const f32,
}

impl PerTier for Wide<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        if !L::MANY {
            unreachable!("other tiers have too few registers");
        }
        // SAFETY: passed on.
        unsafe {
            if self.task.weight.layout.bits == 4 && !self.unpacks() {
                self.multiply::<L, Plain<4>>(self.panel::<L>());
            } else {
                self.multiply::<L, Plain<8>>(self.panel::<L>());
            }
        }
    }
}

impl Wide<'_> {
    fn unpacks(&self) -> bool {
        let layout = &self.task.weight.layout;
        match layout.bits {
            4 if layout.numbers != Numbers::Fp4 => self.task.cores == Cores::Intel,
            bits => bits != 8,
        }
    }

    #[inline(always)]
    unsafe fn panel<L: Lanes>(&self) -> Panel {
        let weight = self.task.weight;
        let layout = weight.layout;
        let (groups, count) = (layout.groups, self.tiles.1 - self.tiles.0);
        let scales = self.scratch.take::<f32>(count * groups * 2 * TILE_ROWS).as_mut_ptr();
        let unpacked = self.unpacks();
        let block = layout.group * TILE_ROWS;
        let codes = self.scratch.take::<u8>(if unpacked { count * groups * block } else { 0 }).as_mut_ptr();
        for at in 0..count * groups {
            // SAFETY: a block of a tile that exists, and its places in the scratch.
            unsafe {
                let from = weight.tile_pointer(self.tiles.0 + at / groups).add(at % groups * layout.block);
                let to = scales.add(at * 2 * TILE_ROWS);
                let (s, b) = layout.scales_of::<L>(from);
                L::store_f32(to, s);
                L::store_f32(to.add(TILE_ROWS), b);
                if unpacked {
                    unpack::<L>(&layout, from, codes.add(at * block));
                }
            }
        }
        let (codes, block, tile) = if unpacked {
            (codes.cast_const(), block, groups * block)
        } else {
            (weight.tile_pointer(self.tiles.0), layout.block, layout.tile)
        };
        Panel { codes, block, tile, scales }
    }

    /// All of the chunk. Blocks of rows and the tiles both stay in the L2 cache.
    #[inline(always)]
    unsafe fn multiply<L: Lanes, C: Codes>(&self, panel: Panel) {
        let (mut row, count) = (self.rows.0, self.tiles.1 - self.tiles.0);
        let rows = self.rows.1 - self.rows.0;
        let blocks = (rows * self.task.x.stride).div_ceil(CACHED);
        let block = rows.div_ceil(blocks).next_multiple_of(PAIR_ROWS);
        while row < self.rows.1 {
            let next = (row + block).min(self.rows.1);
            for tile in (0..count).step_by(2) {
                // SAFETY: tiles and rows of the chunk.
                unsafe {
                    if tile + 2 <= count {
                        self.pair::<L, C>(panel, tile, (row, next));
                    } else {
                        self.single::<L, C>(panel, tile, (row, next));
                    }
                }
            }
            row = next;
        }
    }

    /// Rows of x by tiles `tile` and `tile + 1` of the chunk.
    #[inline(always)]
    unsafe fn pair<L: Lanes, C: Codes>(&self, panel: Panel, tile: usize, (mut row, end): (usize, usize)) {
        // SAFETY: passed on.
        unsafe {
            while row < end && !matches!(end - row, 7 | 8) {
                self.block::<L, C, 2, PAIR_ROWS>(panel, tile, (row, end));
                row += PAIR_ROWS;
            }
            if row < end {
                self.single::<L, C>(panel, tile, (row, end));
                self.single::<L, C>(panel, tile + 1, (row, end));
            }
        }
    }

    /// Rows of x by one tile.
    #[inline(always)]
    unsafe fn single<L: Lanes, C: Codes>(&self, panel: Panel, tile: usize, (mut row, end): (usize, usize)) {
        while row < end {
            // SAFETY: passed on.
            unsafe { self.block::<L, C, 1, SINGLE_ROWS>(panel, tile, (row, end)) };
            row += SINGLE_ROWS;
        }
    }

    /// R tiles by M rows of x; rows from `end` on repeat the last and are not written.
    #[inline(always)]
    unsafe fn block<L: Lanes, C: Codes, const R: usize, const M: usize>(
        &self,
        panel: Panel,
        tile: usize,
        (row, end): (usize, usize),
    ) {
        let FastTask { x, sink, weight, .. } = self.task;
        let (group, groups) = (weight.layout.group, weight.layout.groups);
        // SAFETY: tiles tile..tile+R exist; every row index is below `end`; a staged row holds all groups.
        unsafe {
            let mut codes: [*const u8; R] = std::array::from_fn(|r| panel.codes.add((tile + r) * panel.tile));
            let scales: [*const f32; R] =
                std::array::from_fn(|r| panel.scales.add((tile + r) * groups * 2 * TILE_ROWS));
            let of = |m: usize| (row + m).min(end - 1);
            let values: [*const i8; M] =
                std::array::from_fn(|m| x.values.add(of(m) * x.stride).cast::<i8>().cast_const());
            let factors: [*const f32; M] =
                std::array::from_fn(|m| x.scales.add(x.scale_offset(of(m), groups)).cast_const());
            let mut chains = [[L::splat(0.0); M]; R];
            for g in 0..groups {
                let mut sums = [[L::zero(); M]; R];
                // Two units at a time, in a loop: unrolled, the loads of many would come first and take registers.
                for step in 0..group / 8 {
                    let k = g * group + step * 8;
                    let q: [[L::I; 2]; R] =
                        std::array::from_fn(|r| two_units::<L, C>(codes[r].add(step * 16 * C::BITS)));
                    for unit in 0..2 {
                        for m in 0..M {
                            let a = values[m].add(k + 4 * unit);
                            for r in 0..R {
                                sums[r][m] = dot::<L, C>(sums[r][m], q[r][unit], a);
                            }
                        }
                    }
                }
                for r in 0..R {
                    codes[r] = codes[r].add(panel.block);
                    let s = L::load_f32(scales[r].add(g * 2 * TILE_ROWS));
                    for m in 0..M {
                        let scale = L::mul(s, L::splat(*factors[m].add(g * ROW_LANES)));
                        chains[r][m] = L::fma(L::to_f32(sums[r][m]), scale, chains[r][m]);
                    }
                }
            }
            let mut biases = [[L::splat(0.0); M]; R];
            let to_sums = x.sums.offset_from(x.scales);
            for g in 0..groups {
                for r in 0..R {
                    let b = L::load_f32(scales[r].add((2 * g + 1) * TILE_ROWS));
                    for m in 0..M {
                        let e = *factors[m].offset(to_sums).add(g * ROW_LANES);
                        biases[r][m] = L::fma(b, L::splat(e), biases[r][m]);
                    }
                }
            }
            for r in 0..R {
                for m in 0..M.min(end - row) {
                    let value = L::add(chains[r][m], biases[r][m]);
                    sink.put::<L>(row + m, (self.tiles.0 + tile + r) * TILE_ROWS, value);
                }
            }
        }
    }
}

/// Two units of 16 rows × 4 codes.
#[inline(always)]
unsafe fn two_units<L: Lanes, C: Codes>(at: *const u8) -> [L::I; 2] {
    // SAFETY: passed on.
    unsafe { [unit::<L, C, 0>(at), unit::<L, C, 1>(at)] }
}
