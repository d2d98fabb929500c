//! The product with int8 activations: y = x·wᵀ for inference.
//!
//! y[n] = Σ_g s·d·(Σ q·a) + Σ_g b·e. The inner sum is exact in int32, then there is one f32 chain
//! over groups in ascending order, a second one for the bias term, and one final add: the same
//! operations for every m, tier and cut, so a row has the same bits alone and in a batch.
//!
//! Up to [`GEMV_ROWS`] rows the tiles are streamed once and unpacked in registers; the cost is
//! that of reading them. With more rows AVX-512 takes them in twos ([`super::fast_wide`]). Otherwise a panel of tiles
//! is unpacked to bytes once per [`ROW_BLOCK`] rows, and either multiplied by the same lanes or by AMX tiles.

use mica_simd::{Cores, Isa};
use mica_threads::{Lines, Scratch, Task};

#[cfg(target_arch = "x86_64")]
use super::fast_amx::AmxBlock;
use super::fast_wide::Wide;
use super::lanes::Lanes;
use super::sink::Sink;
use super::stage::{ROW_LANES, Staged};
use super::tier::{PerTier, at_tier};
use super::tile::{Codes, TILE_ROWS, each_unit, unit, unpack, with_codes};
use super::weight::QuantWeight;
use crate::layout::{prefetch_line, prefetch_once};

/// The most rows that are multiplied in registers, without unpacking to memory: up to here also faster than AMX (by
/// 1.2 to 1.4 times at 7 and 8 rows).
const GEMV_ROWS: usize = 8;
/// Rows of x per chunk of the larger product: unpacking a panel costs a few percent of it.
const ROW_BLOCK: usize = 512;
/// Tiles whose panel is unpacked at a time.
const PANEL_TILES: usize = 3;
/// Up to here [`Wide`] would be slower than passes of eight over one tile after the other: tiles come from memory.
const STREAM_ROWS: usize = 16;
/// Bytes of the rows of x that [`Wide`] multiplies by the tiles of a chunk before it goes on: with these they stay in
/// the L2 cache.
pub(super) const CACHED: usize = 256 << 10;
/// Rows of x of its chunks, and tiles: two, so that threads end at nearly the same time, but four where the rows do not
/// stay in the cache from one chunk to the next.
const WIDE_ROWS: usize = 258;
const WIDE_TILES: [usize; 2] = [2, 4];
/// A chunk of the smaller product reads at least this much where the matrix is large…
const CHUNK_BYTES: usize = 1 << 20;
/// …and a matrix above this size is cut into at least this many chunks.
const SMALL_BYTES: usize = 64 << 10;
const FEWEST_CHUNKS: usize = 8;

/// Bytes from what is multiplied to what is asked for, where tiles are one stream: with 2 to 4 KB eight rows take
/// 1.2 to 1.6 times as long.
const AHEAD: usize = 18 << 10;

/// Bytes that a waiting worker asks for: some microseconds of reading, and well below a core's second-level cache.
const COMING: usize = 256 << 10;

/// See the module.
pub(super) struct FastTask<'a> {
    pub weight: &'a QuantWeight,
    pub x: Staged<'a>,
    pub sink: Sink<'a>,
    pub isa: Isa,
    /// Whose habits the loops follow.
    pub cores: Cores,
}

impl Task for FastTask<'_> {
    fn chunks(&self) -> usize {
        let layout = &self.weight.layout;
        match self.x.m {
            0 => 0,
            _ if self.few() => gemv_chunks(layout.tiles, layout.tile),
            _ => layout.tiles.div_ceil(self.tiles_per_chunk()) * self.row_blocks(),
        }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let (tiles, m) = (self.weight.layout.tiles, self.x.m);
        let (range, rows) = if self.few() {
            let chunks = self.chunks();
            ((tiles * chunk / chunks, tiles * (chunk + 1) / chunks), (0, m))
        } else {
            let per_chunk = self.tiles_per_chunk();
            let panels = tiles.div_ceil(per_chunk);
            let (tile, row) = (chunk % panels * per_chunk, chunk / panels * self.rows_per_chunk());
            ((tile, (tile + per_chunk).min(tiles)), (row, (row + self.rows_per_chunk()).min(m)))
        };
        // SAFETY: the tier, the shapes and the views were checked when the task was made; chunks
        // cover disjoint tiles or disjoint rows.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.isa == Isa::Amx && !self.few() {
                return AmxBlock { task: self, tiles: range, rows, scratch }.run();
            }
            if self.few() {
                at_tier(self.isa, Gemv { task: self, range });
            } else if self.wide() {
                at_tier(self.isa, Wide { task: self, tiles: range, rows, scratch });
            } else {
                at_tier(self.isa, Gemm { task: self, range, rows, scratch });
            }
        }
    }

    fn begins_with(&self, chunk: usize) -> Lines {
        if !self.few() {
            return Lines::default();
        }
        let tiles = self.weight.layout.tiles;
        let tile = tiles * chunk / self.chunks();
        first_lines(self.weight, tile, tiles - tile)
    }

    fn name(&self) -> &'static str {
        "quantized product, int8"
    }
}

impl<'a> FastTask<'a> {
    /// For shapes that were checked.
    pub fn new(weight: &'a QuantWeight, x: Staged<'a>, sink: Sink<'a>, isa: Isa) -> FastTask<'a> {
        FastTask { weight, x, sink, isa, cores: Cores::get() }
    }

    /// Whether many rows are taken by [`Wide`].
    fn wide(&self) -> bool {
        matches!(self.isa, Isa::Avx512 | Isa::Avx512Bf16)
    }

    /// Whether tiles are read as streams, for all rows.
    fn few(&self) -> bool {
        self.x.m <= if self.wide() { STREAM_ROWS } else { GEMV_ROWS }
    }

    /// Tiles and rows of a chunk of the larger product.
    fn tiles_per_chunk(&self) -> usize {
        if !self.wide() {
            return PANEL_TILES;
        }
        let rows = WIDE_ROWS.min(self.x.m) * self.x.stride;
        WIDE_TILES[usize::from(rows > 2 * CACHED)]
    }

    /// Blocks that rows are cut into; chunks of a block follow each other.
    pub fn row_blocks(&self) -> usize {
        if self.few() { 1 } else { self.x.m.div_ceil(self.rows_per_chunk()) }
    }

    fn rows_per_chunk(&self) -> usize {
        if self.wide() { WIDE_ROWS } else { ROW_BLOCK }
    }
}

/// What of `count` tiles a worker asks for while it waits to read them.
pub(super) fn first_lines(weight: &QuantWeight, tile: usize, count: usize) -> Lines {
    Lines::new(weight.tile_pointer(tile), (count * weight.layout.tile).min(COMING))
}

/// Chunks of a product that streams `tiles` tiles of `tile` bytes.
pub(super) fn gemv_chunks(tiles: usize, tile: usize) -> usize {
    let bytes = tiles * tile;
    if bytes <= SMALL_BYTES { tiles.min(1) } else { (bytes / CHUNK_BYTES).max(FEWEST_CHUNKS).min(tiles) }
}

struct Gemv<'a> {
    task: &'a FastTask<'a>,
    /// Tiles.
    range: (usize, usize),
}

impl PerTier for Gemv<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: passed on.
        unsafe { with_codes!(&self.task.weight.layout, C => self.tiles::<L, C>()) }
    }
}

impl Gemv<'_> {
    /// All rows by all tiles.
    ///
    /// Where there are 32 registers, up to eight rows pass over one tile: what a thread reads is then one stream, all
    /// that the prefetchers of AMD's cores follow (several streams side by side come at two thirds of the speed).
    /// Intel's want the contrary, four streams for one row and two for more: one comes at half of the bandwidth. What
    /// comes from memory comes with the first pass, so there is one pass up to eight rows.
    #[inline(always)]
    unsafe fn tiles<L: Lanes, C: Codes>(&self) {
        let (mut tile, end) = self.range;
        let stream = L::MANY && self.task.cores != Cores::Intel;
        // SAFETY: tiles below `end` exist.
        unsafe {
            if L::MANY && !stream && self.task.x.m == 1 {
                while tile + 4 <= end {
                    self.block::<L, C, 4, 1, false>(tile, 0);
                    tile += 4;
                }
            } else if L::MANY && !stream && (C::BITS == 4 || C::BITS == 8) {
                while tile + 2 <= end {
                    self.rows::<L, C, 2, false>(tile);
                    tile += 2;
                }
            }
            while tile < end {
                if L::MANY && stream {
                    self.rows::<L, C, 1, true>(tile);
                } else {
                    self.rows::<L, C, 1, false>(tile);
                }
                tile += 1;
            }
        }
    }

    /// All rows of x by R tiles.
    #[inline(always)]
    unsafe fn rows<L: Lanes, C: Codes, const R: usize, const STREAM: bool>(&self, tile: usize) {
        let (mut row, end) = (0, self.task.x.m);
        // SAFETY: passed on.
        unsafe {
            while row < end {
                row += match end - row {
                    1 => self.block::<L, C, R, 1, STREAM>(tile, row),
                    2 => self.block::<L, C, R, 2, STREAM>(tile, row),
                    5.. if L::MANY => self.block::<L, C, R, 8, STREAM>(tile, row),
                    _ => self.block::<L, C, R, 4, STREAM>(tile, row),
                }
            }
        }
    }

    /// R tiles by M rows of x; rows past the last repeat it and are not written. `STREAM`: tiles are read one after
    /// the other.
    #[inline(always)]
    unsafe fn block<L: Lanes, C: Codes, const R: usize, const M: usize, const STREAM: bool>(
        &self,
        tile: usize,
        row: usize,
    ) -> usize {
        let FastTask { weight, x, sink, .. } = self.task;
        let layout = weight.layout;
        // SAFETY: tiles tile..tile+R exist; every row index is below m; a staged row holds all
        // groups.
        unsafe {
            let pointers: [*const u8; R] = std::array::from_fn(|r| weight.tile_pointer(tile + r));
            let at = |m: usize| (row + m).min(x.m - 1);
            let values: [*const i8; M] =
                std::array::from_fn(|m| x.values.add(at(m) * x.stride).cast::<i8>().cast_const());
            let scales = x.scale_offset(row, layout.groups);
            let (d, e) = (x.scales.add(scales).cast_const(), x.sums.add(scales).cast_const());
            let mut products = [[L::splat(0.0); M]; R];
            let mut biases = [[L::splat(0.0); M]; R];
            // The tiles of the next pass are asked for meanwhile: streams as short as a tile are over before the
            // processor has noticed them. A single stream goes on where the tile ends.
            let ahead = if STREAM { AHEAD } else { R * layout.tile };
            // What no further rows will read leaves the caches to activations, keys and values, and the graph's nodes.
            let once = STREAM && x.m <= M;
            let ask = |from: *const u8| {
                if once {
                    prefetch_once(from.wrapping_add(ahead));
                } else if row == 0 {
                    prefetch_line::<STREAM>(from.wrapping_add(ahead));
                }
            };
            // Sums of few rows would be chains as long as their latency: they are cut in up to four.
            let cut = if STREAM { 4 / M.min(4) } else { 1 };
            for g in 0..layout.groups {
                let mut parts = [[[L::zero(); M]; R]; 4];
                for sub in 0..layout.group / C::SUB {
                    let k = g * layout.group + sub * C::SUB;
                    let at = g * layout.block + sub * C::BYTES;
                    for r in 0..R {
                        (0..C::BYTES / 64).for_each(|vector| ask(pointers[r].add(at + vector * 64)));
                    }
                    macro_rules! units {
                        ($($unit:literal)*) => { $( if $unit * 4 < C::SUB {
                            let sums = &mut parts[$unit % cut];
                            for r in 0..R {
                                let q = unit::<L, C, $unit>(pointers[r].add(at));
                                for m in 0..M {
                                    sums[r][m] = dot::<L, C>(sums[r][m], q, values[m].add(k + 4 * $unit));
                                }
                            }
                        } )* };
                    }
                    each_unit!(units);
                }
                let mut sums = parts[0];
                for part in &parts[1..cut] {
                    for r in 0..R {
                        for m in 0..M {
                            sums[r][m] = L::add_int(sums[r][m], part[r][m]);
                        }
                    }
                }
                for r in 0..R {
                    (layout.codes..layout.block)
                        .step_by(64)
                        .for_each(|at| ask(pointers[r].add(g * layout.block + at)));
                }
                for r in 0..R {
                    let block = pointers[r].add(g * layout.block);
                    let (s, b) = layout.scales_of::<L>(block);
                    for m in 0..M {
                        let scale = L::mul(s, L::splat(*d.add(g * ROW_LANES + m)));
                        products[r][m] = L::fma(L::to_f32(sums[r][m]), scale, products[r][m]);
                        biases[r][m] = L::fma(b, L::splat(*e.add(g * ROW_LANES + m)), biases[r][m]);
                    }
                }
            }
            for r in 0..R {
                for m in 0..M.min(x.m - row) {
                    sink.put::<L>(row + m, (tile + r) * TILE_ROWS, L::add(products[r][m], biases[r][m]));
                }
            }
        }
        M
    }
}

#[inline(always)]
pub(super) unsafe fn dot<L: Lanes, C: Codes>(acc: L::I, q: L::I, a: *const i8) -> L::I {
    // SAFETY: passed on.
    unsafe { if C::WIDE { L::dot::<true>(acc, q, a) } else { L::dot::<false>(acc, q, a) } }
}

struct Gemm<'a> {
    task: &'a FastTask<'a>,
    /// Tiles, at most [`PANEL_TILES`].
    range: (usize, usize),
    /// Rows of x.
    rows: (usize, usize),
    scratch: &'a Scratch,
}

/// Tiles brought into the form that products read many times.
struct Panel<'a> {
    /// `[tile][k / 4][16 rows × 4]`, arranged.
    codes: &'a [u8],
    /// `[tile][group][16]`.
    scales: &'a [f32],
    /// `[tile][group][16]`.
    biases: &'a [f32],
}

impl PerTier for Gemm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: passed on; the panel has the tiles of the range.
        unsafe {
            let panel = self.unpack::<L>();
            let wide = self.task.weight.layout.bits == 8;
            for tile in 0..self.range.1 - self.range.0 {
                if wide {
                    self.multiply::<L, true>(&panel, tile);
                } else {
                    self.multiply::<L, false>(&panel, tile);
                }
            }
        }
    }
}

/// Rows of x per pass: on NEON the sums of a row take four of 32 registers.
const COLUMNS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 8 };

impl Gemm<'_> {
    #[inline(always)]
    unsafe fn unpack<L: Lanes>(&self) -> Panel<'_> {
        let weight = self.task.weight;
        let layout = weight.layout;
        let tiles = self.range.1 - self.range.0;
        let codes = self.scratch.take::<u8>(tiles * layout.groups * layout.group * TILE_ROWS);
        let scales = self.scratch.take::<f32>(tiles * layout.groups * TILE_ROWS);
        let biases = self.scratch.take::<f32>(tiles * layout.groups * TILE_ROWS);
        for tile in 0..tiles {
            for g in 0..layout.groups {
                let at = tile * layout.groups + g;
                // SAFETY: block g of a tile that exists; the panel has room for it.
                unsafe {
                    let block = weight.tile_pointer(self.range.0 + tile).add(g * layout.block);
                    let codes = codes.as_mut_ptr().add(at * layout.group * TILE_ROWS);
                    unpack::<L>(&layout, block, codes);
                    L::arrange(codes, layout.group / 4);
                    let (s, b) = layout.scales_of::<L>(block);
                    L::store_f32(scales.as_mut_ptr().add(at * TILE_ROWS), s);
                    L::store_f32(biases.as_mut_ptr().add(at * TILE_ROWS), b);
                }
            }
        }
        Panel { codes, scales, biases }
    }

    #[inline(always)]
    unsafe fn multiply<L: Lanes, const WIDE: bool>(&self, panel: &Panel, tile: usize) {
        let chains = self.scratch.take::<f32>(COLUMNS * TILE_ROWS);
        let mut row = self.rows.0;
        while row < self.rows.1 {
            chains.fill(0.0);
            // SAFETY: passed on; rows past the last are clamped.
            unsafe { self.block::<L, WIDE>(panel, tile, row, chains.as_mut_ptr()) };
            row += COLUMNS;
        }
    }

    /// A tile by [`COLUMNS`] rows of x. The int32 sums of a group live in registers, the f32 chains in L1.
    #[inline(always)]
    unsafe fn block<L: Lanes, const WIDE: bool>(
        &self,
        panel: &Panel,
        tile: usize,
        row: usize,
        chains: *mut f32,
    ) {
        let FastTask { weight, x, sink, .. } = self.task;
        let layout = weight.layout;
        let groups = layout.groups;
        let tile_codes = groups * layout.group * TILE_ROWS;
        // SAFETY: offsets stay inside the panel; row indices are clamped to the chunk's rows.
        unsafe {
            let at = |c: usize| (row + c).min(self.rows.1 - 1);
            let values: [*const i8; COLUMNS] =
                std::array::from_fn(|c| x.values.add(at(c) * x.stride).cast::<i8>().cast_const());
            let scales = x.scale_offset(row, groups);
            let (d, e) = (x.scales.add(scales).cast_const(), x.sums.add(scales).cast_const());
            for g in 0..groups {
                let codes = panel.codes.as_ptr().add(tile * tile_codes + g * layout.group * TILE_ROWS);
                let mut rows = values;
                for row in &mut rows {
                    *row = row.add(g * layout.group);
                }
                let sums = L::dots::<WIDE, COLUMNS>(codes, layout.group / 4, rows);
                let s = L::load_f32(panel.scales.as_ptr().add((tile * groups + g) * TILE_ROWS));
                for c in 0..COLUMNS {
                    let chain = chains.add(c * TILE_ROWS);
                    let scale = L::mul(s, L::splat(*d.add(g * ROW_LANES + c)));
                    L::store_f32(chain, L::fma(L::to_f32(sums[c]), scale, L::load_f32(chain)));
                }
            }
            let mut biases = [L::splat(0.0); COLUMNS];
            for g in 0..groups {
                let b = L::load_f32(panel.biases.as_ptr().add((tile * groups + g) * TILE_ROWS));
                for c in 0..COLUMNS {
                    biases[c] = L::fma(b, L::splat(*e.add(g * ROW_LANES + c)), biases[c]);
                }
            }
            for c in 0..COLUMNS.min(self.rows.1 - row) {
                let product = L::load_f32(chains.add(c * TILE_ROWS));
                sink.put::<L>(row + c, (self.range.0 + tile) * TILE_ROWS, L::add(product, biases[c]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mica_codec::QuantSpec;
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::super::sink::Epilogue;
    use super::super::stage::Stage;
    use super::super::weight::Scales;
    use super::*;
    use crate::gemm::WorkspaceBuf;
    use crate::{View, ViewMut};

    #[test]
    fn bits_do_not_depend_on_the_maker() {
        let (mut rng, pool) = (Rng::new(29), Pool::new(2));
        let (tiles, inner) = (11, 192);
        for bits in [3, 4, 8] {
            let spec = QuantSpec::affine(bits, 64).unwrap();
            let out = tiles * TILE_ROWS - 5;
            let words: Vec<u32> = (0..out * spec.words(inner)).map(|_| rng.u32()).collect();
            let scales: Vec<f32> = (0..out * inner / 64).map(|_| rng.normal()).collect();
            let scales = Scales::F32(&scales);
            let weight = QuantWeight::pack(&pool, spec, [out, inner], &words, scales, Some(scales)).unwrap();
            for m in (1..=STREAM_ROWS).chain([41]) {
                let x: Vec<f32> = (0..m * inner).map(|_| rng.normal()).collect();
                for &isa in Isa::available() {
                    let run = |cores| {
                        let stage = Stage::new(View::new(&x, &[m, inner]).unwrap(), 64, isa).unwrap();
                        let mut workspace = WorkspaceBuf::new(stage.workspace_bytes());
                        // SAFETY: the workspace is as large as asked for, and nothing else uses it.
                        let (stage, staged) = unsafe { stage.bind(workspace.pointer()) };
                        let mut y = vec![0.0f32; m * out];
                        let view = ViewMut::new(&mut y, &[m, out]).unwrap();
                        let sink = Sink::new("test", view, Epilogue::none(), [m, out]).unwrap();
                        let product = FastTask { cores, ..FastTask::new(&weight, staged, sink, isa) };
                        pool.run(&[stage, Box::new(product)]).unwrap();
                        y
                    };
                    let bits_of = |y: Vec<f32>| y.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                    assert!(
                        bits_of(run(Cores::Intel)) == bits_of(run(Cores::Other)),
                        "{isa}, {bits} bits, {m} rows"
                    );
                }
            }
        }
    }
}
