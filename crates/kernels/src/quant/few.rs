//! y = x·wᵀ of few rows in bf16 or f32: decoding with weights whose codes are no integers, and in exact mode.
//!
//! The tiles pass by once, several side by side, and are dequantized in registers. `gemm` would write them into panels
//! for each row again. Each output is one chain over k, as there, so a row has the same bits alone and among many.

use mica_codec::Float;
use mica_simd::Isa;
use mica_threads::{Lines, Scratch, Task};

use super::fast::{first_lines, gemv_chunks};
use super::float::{Affine, Centred, Fp8, Units, Values};
use super::form::Numbers;
use super::lanes::Lanes;
use super::sink::Sink;
use super::tier::{PerTier, at_tier};
use super::tile::TILE_ROWS;
use super::weight::QuantWeight;
use crate::gemm::{FloatView, Precision, uses_pairs};
use crate::layout::prefetch_line;

/// The most rows that pass over the tiles together. `gemm` takes more.
const ROWS: usize = 8;

/// See the module.
pub(super) struct FewTask<'a> {
    weight: &'a QuantWeight,
    /// The first tile, and how many.
    tiles: (usize, usize),
    x: FloatView<'a>,
    m: usize,
    precision: Precision,
    sink: Sink<'a>,
    isa: Isa,
}

impl<'a> FewTask<'a> {
    /// Whether these rows are few, and products of this tier are chains of vectors: AMX has other sums.
    pub fn takes(x: &FloatView, precision: Precision, isa: Isa) -> bool {
        let contiguous = x.shape()[1] <= 1 || x.strides()[1] == 1;
        x.shape()[0] <= ROWS && contiguous && !(isa == Isa::Amx && uses_pairs(isa, precision))
    }

    /// For shapes that were checked: rows of x by `count` tiles from `first` on.
    pub fn new(
        weight: &'a QuantWeight,
        tiles: (usize, usize),
        x: FloatView<'a>,
        precision: Precision,
        sink: Sink<'a>,
        isa: Isa,
    ) -> FewTask<'a> {
        FewTask { weight, tiles, m: x.shape()[0], x, precision, sink, isa }
    }

    fn pairs(&self) -> bool {
        uses_pairs(self.isa, self.precision)
    }

    /// The rows as products read them: f32, rounded to bf16 if need be, or pairs of bf16.
    fn stage<'s>(&self, scratch: &'s Scratch) -> &'s [u32] {
        let k = self.weight.inner;
        let width = if self.pairs() { k / 2 } else { k };
        let staged = scratch.take::<u32>(self.m * width);
        let rounded = self.precision == Precision::Bf16;
        for row in 0..self.m {
            let to = &mut staged[row * width..][..width];
            let pairs = self.pairs();
            // SAFETY: the row is inside the view and contiguous, and as long as there are inputs; the tier was checked.
            unsafe {
                match &self.x {
                    FloatView::F32(view) => {
                        at_tier(self.isa, StageRow { from: view.run(&[row, 0], k), to, rounded, pairs })
                    }
                    FloatView::F16(view) => {
                        at_tier(self.isa, StageRow { from: view.run(&[row, 0], k), to, rounded, pairs })
                    }
                    // Nothing is left to round.
                    FloatView::Bf16(view) => {
                        let from = view.run(&[row, 0], k);
                        at_tier(self.isa, StageRow { from, to, rounded: false, pairs })
                    }
                }
            }
        }
        staged
    }
}

/// One row, rounded as the tier's `gemm` rounds: some tiers take subnormal numbers for zero.
struct StageRow<'a, T> {
    /// A multiple of 16.
    from: &'a [T],
    to: &'a mut [u32],
    rounded: bool,
    pairs: bool,
}

impl<T: Float> PerTier for StageRow<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let width = if self.pairs { 8 } else { 16 };
        for (from, to) in self.from.chunks_exact(16).zip(self.to.chunks_exact_mut(width)) {
            let mut values = [0f32; 16];
            values.iter_mut().zip(from).for_each(|(value, from)| *value = from.to_f32());
            if self.rounded {
                // SAFETY: there are 16 values.
                unsafe { L::store_f32(values.as_mut_ptr(), L::round_bf16(L::load_f32(values.as_ptr()))) };
            }
            let bits = values.map(f32::to_bits);
            if self.pairs {
                for (to, pair) in to.iter_mut().zip(bits.chunks_exact(2)) {
                    *to = pair[0] >> 16 | pair[1] & 0xffff_0000;
                }
            } else {
                to.copy_from_slice(&bits);
            }
        }
    }
}

impl Task for FewTask<'_> {
    fn chunks(&self) -> usize {
        if self.m == 0 { 0 } else { gemv_chunks(self.tiles.1, self.weight.layout.tile) }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let (tiles, chunks) = (self.tiles.1, self.chunks());
        let range = (tiles * chunk / chunks, tiles * (chunk + 1) / chunks);
        let x = self.stage(scratch);
        // SAFETY: the tier, the shapes and the views were checked when the task was made; chunks cover disjoint tiles.
        unsafe { at_tier(self.isa, Few { task: self, range, x }) }
    }

    fn begins_with(&self, chunk: usize) -> Lines {
        let tile = self.tiles.1 * chunk / self.chunks().max(1);
        first_lines(self.weight, self.tiles.0 + tile, self.tiles.1 - tile)
    }

    fn name(&self) -> &'static str {
        "quantized product, few rows"
    }
}

struct Few<'a> {
    task: &'a FewTask<'a>,
    /// Tiles, from the task's first on.
    range: (usize, usize),
    x: &'a [u32],
}

impl PerTier for Few<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: passed on.
        unsafe {
            match self.task.weight.layout.numbers {
                Numbers::Affine => self.form::<L, Affine>(),
                Numbers::Centred(_) | Numbers::Fp4 => self.form::<L, Centred>(),
                Numbers::Fp8 => self.form::<L, Fp8>(),
            }
        }
    }
}

/// How a product of two k follows another.
trait Chain {
    /// k in an entry of staged rows.
    const WIDE: usize;
    /// Adds x times two lines of weights.
    unsafe fn add<L: Lanes>(acc: L::F, x: *const u32, w: [L::F; 2]) -> L::F;
    /// What is multiplied of a weight.
    unsafe fn weight<L: Lanes, V: Values>(w: L::F) -> L::F;
}

/// One fused multiply-add after the other, `ROUND` over weights rounded to bf16.
struct Single<const ROUND: bool>;
/// Pairs of bf16.
struct Pairs;

// SAFETY of the blocks below: what `Lanes` asks, passed on.
impl<const ROUND: bool> Chain for Single<ROUND> {
    const WIDE: usize = 1;
    #[inline(always)]
    unsafe fn add<L: Lanes>(acc: L::F, x: *const u32, [even, odd]: [L::F; 2]) -> L::F {
        // SAFETY: as above.
        unsafe {
            let acc = L::fma(L::splat(f32::from_bits(*x)), even, acc);
            L::fma(L::splat(f32::from_bits(*x.add(1))), odd, acc)
        }
    }
    #[inline(always)]
    unsafe fn weight<L: Lanes, V: Values>(w: L::F) -> L::F {
        // SAFETY: as above.
        unsafe { if ROUND && !V::HALF { L::round_bf16(w) } else { w } }
    }
}

impl Chain for Pairs {
    const WIDE: usize = 2;
    #[inline(always)]
    unsafe fn add<L: Lanes>(acc: L::F, x: *const u32, [even, odd]: [L::F; 2]) -> L::F {
        // SAFETY: as above.
        unsafe { L::dot_pairs(acc, L::bf16_pairs(even, odd), *x) }
    }
    #[inline(always)]
    unsafe fn weight<L: Lanes, V: Values>(w: L::F) -> L::F {
        w
    }
}

impl Few<'_> {
    #[inline(always)]
    unsafe fn form<L: Lanes, V: Values>(&self) {
        // SAFETY: passed on.
        unsafe {
            match self.task.precision {
                Precision::Exact => self.tiles::<L, V, Single<false>>(),
                Precision::Bf16 if L::MANY && self.task.pairs() => self.tiles::<L, V, Pairs>(),
                Precision::Bf16 => self.tiles::<L, V, Single<true>>(),
            }
        }
    }

    /// All rows by all tiles, in blocks whose sums leave registers for what they are made of.
    #[inline(always)]
    unsafe fn tiles<L: Lanes, V: Values, C: Chain>(&self) {
        // SAFETY: passed on.
        unsafe {
            match self.task.m {
                1 if L::MANY => self.pass::<L, V, C, 4, 1>(),
                1 => self.pass::<L, V, C, 2, 1>(),
                2 if L::MANY => self.pass::<L, V, C, 4, 2>(),
                2..=4 => self.pass::<L, V, C, 1, 4>(),
                _ => self.pass::<L, V, C, 1, 8>(),
            }
        }
    }

    #[inline(always)]
    unsafe fn pass<L: Lanes, V: Values, C: Chain, const R: usize, const M: usize>(&self) {
        let (mut tile, end) = self.range;
        // SAFETY: tiles below `end` exist.
        unsafe {
            while tile + R <= end {
                self.block::<L, V, C, R, M>(tile);
                tile += R;
            }
            while R > 1 && tile < end {
                self.block::<L, V, C, 1, M>(tile);
                tile += 1;
            }
        }
    }

    /// R tiles by all rows of x, which are M or fewer: those past the last repeat it and are not written.
    #[inline(always)]
    unsafe fn block<L: Lanes, V: Values, C: Chain, const R: usize, const M: usize>(&self, tile: usize) {
        let FewTask { weight, tiles, m, sink, .. } = self.task;
        let layout = &weight.layout;
        // SAFETY: the tiles exist; staged rows hold all of k.
        unsafe {
            let pointers: [*const u8; R] = std::array::from_fn(|r| weight.tile_pointer(tiles.0 + tile + r));
            let width = weight.inner / C::WIDE;
            let x: [*const u32; M] = std::array::from_fn(|row| self.x.as_ptr().add(row.min(m - 1) * width));
            let mut room: [Units; R] = [[0; 128 * TILE_ROWS]; R];
            let mut sums = [[L::splat(0.0); M]; R];
            for g in 0..layout.groups {
                let mut parts = [(room[0].as_ptr(), L::splat(0.0), L::splat(0.0)); R];
                for r in 0..R {
                    let block = pointers[r].add(g * layout.block);
                    // The tiles of the next pass: streams as short as a tile are over before they are noticed.
                    for line in (0..layout.block).step_by(64) {
                        prefetch_line::<false>(block.wrapping_add(R * layout.tile + line));
                    }
                    let (s, z) = V::factors::<L>(layout, block);
                    parts[r] = (V::units::<L>(layout, block, &mut room[r]), s, z);
                }
                for unit in 0..layout.group / 4 {
                    let at = (g * layout.group + unit * 4) / C::WIDE;
                    for r in 0..R {
                        let (units, s, z) = parts[r];
                        let weights = V::of_lanes::<L>(L::load(units.add(unit * 64)), s, z);
                        let [w0, w1, w2, w3] = weights.map(|w| C::weight::<L, V>(w));
                        for row in 0..M {
                            let x = x[row].add(at);
                            let sum = C::add::<L>(sums[r][row], x, [w0, w1]);
                            sums[r][row] = C::add::<L>(sum, x.add(2 / C::WIDE), [w2, w3]);
                        }
                    }
                }
            }
            for r in 0..R {
                for row in 0..M.min(*m) {
                    sink.put::<L>(row, (tile + r) * TILE_ROWS, sums[r][row]);
                }
            }
        }
    }
}
