//! Products with dequantized weights, in both directions, without ever materialising the weight.
//!
//! y = x·wᵀ, and dx = dy·w for training through a frozen weight. Weights are s·q + b in f32, one
//! fused multiply-add; as bf16 they and the rows are rounded once more and multiplied in pairs.
//! Per output there is one chain over k in ascending order, whatever m is (docs/NUMERICS.md).
//!
//! Outputs are cut into strips of 16 columns. For a block of k at a time, strips are dequantized
//! into a panel that lies in L2, `[strip][step][16]` with a step of one k (f32) or a pair (bf16,
//! low half first), and all rows of x pass over it. Forward, a strip is a tile; transposed, it is
//! 16 columns of a group, and k runs over the rows of the weight.

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::lanes::Lanes;
use super::sink::Sink;
use super::stage::{Form, Staged};
use super::tier::{PerTier, at_tier};
use super::tile::{SUB, TILE_ROWS, unpack_any};
use super::weight::QuantWeight;

/// Values of k per panel: two f32 strips are 64 KiB. A multiple of every group and of a tile.
const K_BLOCK: usize = 512;
/// Rows of x per chunk: dequantizing costs about one of them in 256.
const ROW_BLOCK: usize = 256;
/// Values of k that one AMX product takes: panels end on a multiple, in zeros.
const K_STEP: usize = 32;

/// See the module.
pub(super) struct FloatTask<'a> {
    pub weight: &'a QuantWeight,
    pub x: Staged<'a>,
    pub sink: Sink<'a>,
    pub isa: Isa,
    /// dx = dy·w rather than y = x·wᵀ.
    pub transposed: bool,
}

impl FloatTask<'_> {
    fn bf16(&self) -> bool {
        self.x.form == Form::Bf16
    }

    /// All strips of the output.
    fn strips(&self) -> usize {
        let layout = &self.weight.layout;
        if self.transposed { layout.groups * layout.group / TILE_ROWS } else { layout.tiles }
    }

    /// Strips that are dequantized together: a pair, or the columns of one group.
    fn strips_per_chunk(&self) -> usize {
        if self.transposed { self.weight.layout.group / TILE_ROWS } else { 2 }
    }
}

impl Task for FloatTask<'_> {
    fn chunks(&self) -> usize {
        self.strips().div_ceil(self.strips_per_chunk()) * self.x.m.div_ceil(ROW_BLOCK)
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let columns = self.strips().div_ceil(self.strips_per_chunk());
        let (strip, row) = (chunk % columns * self.strips_per_chunk(), chunk / columns * ROW_BLOCK);
        let strips = (strip, (strip + self.strips_per_chunk()).min(self.strips()));
        let rows = (row, (row + ROW_BLOCK).min(self.x.m));
        // SAFETY: the tier, the shapes and the views were checked when the task was made; chunks
        // cover disjoint strips or disjoint rows.
        unsafe { at_tier(self.isa, Block { task: self, strips, rows, scratch }) }
    }

    fn name(&self) -> &'static str {
        match (self.transposed, self.bf16()) {
            (false, false) => "quantized product, f32",
            (false, true) => "quantized product, bf16",
            (true, false) => "transposed quantized product, f32",
            (true, true) => "transposed quantized product, bf16",
        }
    }
}

struct Block<'a> {
    task: &'a FloatTask<'a>,
    strips: (usize, usize),
    rows: (usize, usize),
    scratch: &'a Scratch,
}

/// One panel and the chains that cross it.
struct Pass {
    /// `[strip][step][16]`, four bytes each.
    panel: *const u32,
    /// 32-bit values of a strip in the panel.
    strip: usize,
    /// Steps in this panel.
    steps: usize,
    /// The first k of the panel, in steps.
    first: usize,
    /// f32 sums `[row][strip][16]` between panels.
    sums: *mut f32,
    /// Whether chains start here.
    starts: bool,
    /// Whether chains end here.
    ends: bool,
}

impl PerTier for Block<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let task = self.task;
        let (count, rows) = (self.strips.1 - self.strips.0, self.rows.1 - self.rows.0);
        let per_step = if task.bf16() { 2 } else { 1 };
        let panel = self.scratch.take::<u32>(count * K_BLOCK / per_step * TILE_ROWS);
        let sums = self.scratch.take::<f32>(rows * count * TILE_ROWS).as_mut_ptr();
        let k = task.x.k;
        for first in (0..k).step_by(K_BLOCK) {
            let last = (first + K_BLOCK).min(k);
            let steps = (last - first).next_multiple_of(K_STEP) / per_step;
            let strip = steps * TILE_ROWS;
            // SAFETY: the panel has room for `count` strips of K_BLOCK values of k.
            unsafe {
                if task.transposed {
                    self.dequantize_columns::<L>(panel.as_mut_ptr(), strip, first, last);
                } else {
                    self.dequantize_rows::<L>(panel.as_mut_ptr(), strip, first, last);
                }
                let pass = Pass {
                    panel: panel.as_ptr(),
                    strip,
                    steps,
                    first: first / per_step,
                    sums,
                    starts: first == 0,
                    ends: last == k,
                };
                self.multiply::<L>(&pass);
            }
        }
    }
}

impl Block<'_> {
    /// Forward: k from `first` to `last` of each tile. A lane is a row of the tile.
    #[inline(always)]
    unsafe fn dequantize_rows<L: Lanes>(&self, panel: *mut u32, strip: usize, first: usize, last: usize) {
        let weight = self.task.weight;
        let layout = weight.layout;
        let bf16 = self.task.bf16();
        let mut units = [0u8; 128 * TILE_ROWS];
        for tile in self.strips.0..self.strips.1 {
            let mut to = panel.wrapping_add((tile - self.strips.0) * strip);
            for g in first / layout.group..last / layout.group {
                // SAFETY: the block exists; a unit is 64 bytes; a strip of the panel has room for
                // K_BLOCK values of k.
                unsafe {
                    let block = weight.tile_pointer(tile).add(g * layout.block);
                    unpack_any::<L>(layout.bits, block, units.as_mut_ptr(), layout.group / SUB);
                    let s = L::load_scales(block.add(layout.scales()), layout.scale);
                    let b = L::load_scales(block.add(layout.biases()), layout.scale);
                    for unit in 0..layout.group / 4 {
                        let q = L::load(units.as_ptr().add(unit * 64));
                        let w0 = L::fma(L::byte_f32::<0>(q), s, b);
                        let w1 = L::fma(L::byte_f32::<1>(q), s, b);
                        let w2 = L::fma(L::byte_f32::<2>(q), s, b);
                        let w3 = L::fma(L::byte_f32::<3>(q), s, b);
                        if bf16 {
                            L::store(to.cast(), L::bf16_pairs(w0, w1));
                            L::store(to.add(16).cast(), L::bf16_pairs(w2, w3));
                            to = to.add(32);
                        } else {
                            L::store_f32(to.cast(), w0);
                            L::store_f32(to.add(16).cast(), w1);
                            L::store_f32(to.add(32).cast(), w2);
                            L::store_f32(to.add(48).cast(), w3);
                            to = to.add(64);
                        }
                    }
                }
            }
        }
    }

    /// Transposed: rows `first` to `last` of the weight, the columns of one group. A lane is a
    /// column. Rows past the weight's last, up to a whole step, are zeros.
    #[inline(always)]
    unsafe fn dequantize_columns<L: Lanes>(&self, panel: *mut u32, strip: usize, first: usize, last: usize) {
        let weight = self.task.weight;
        let layout = weight.layout;
        let bf16 = self.task.bf16();
        let per_row = if bf16 { TILE_ROWS / 2 } else { TILE_ROWS };
        let g = self.strips.0 / (layout.group / TILE_ROWS);
        let strips = layout.group / TILE_ROWS;
        let mut units = [0u8; 128 * TILE_ROWS];
        let mut lines = [0u8; 128 * TILE_ROWS];
        let (mut s, mut b) = ([0f32; TILE_ROWS], [0f32; TILE_ROWS]);
        let end = last.next_multiple_of(K_STEP);
        for row in (first..end).step_by(TILE_ROWS) {
            let to = panel.wrapping_add((row - first) * per_row);
            // SAFETY: the block exists if the tile does; places in the panel are below
            // `strips` strips of `end - first` values of k.
            unsafe {
                if row / TILE_ROWS >= layout.tiles {
                    for strip_index in 0..strips {
                        to.add(strip_index * strip).write_bytes(0, TILE_ROWS * per_row);
                    }
                    continue;
                }
                let block = weight.tile_pointer(row / TILE_ROWS).add(g * layout.block);
                unpack_any::<L>(layout.bits, block, units.as_mut_ptr(), layout.group / SUB);
                L::store_f32(s.as_mut_ptr(), L::load_scales(block.add(layout.scales()), layout.scale));
                L::store_f32(b.as_mut_ptr(), L::load_scales(block.add(layout.biases()), layout.scale));
                transpose(&units, &mut lines, layout.group / 4);
                for strip_index in 0..strips {
                    let to = to.add(strip_index * strip);
                    let value = |r: usize| {
                        let codes = lines.as_ptr().add(r * layout.group + strip_index * TILE_ROWS);
                        value_of::<L>(codes, s[r], b[r])
                    };
                    for r in (0..TILE_ROWS).step_by(2) {
                        if bf16 {
                            L::store(to.add(r * per_row).cast(), L::bf16_pairs(value(r), value(r + 1)));
                        } else {
                            L::store_f32(to.add(r * per_row).cast(), value(r));
                            L::store_f32(to.add((r + 1) * per_row).cast(), value(r + 1));
                        }
                    }
                }
            }
        }
    }

    /// All rows over one panel, in passes as high as the registers allow.
    #[inline(always)]
    unsafe fn multiply<L: Lanes>(&self, pass: &Pass) {
        let (mut row, count) = (self.rows.0, self.strips.1 - self.strips.0);
        // SAFETY: a step of M rows starts only where M rows are left.
        unsafe {
            while row < self.rows.1 {
                let left = self.rows.1 - row;
                if L::MANY {
                    row += match left {
                        12.. => self.strips::<L, 2, 12>(pass, row, count),
                        4.. => self.strips::<L, 2, 4>(pass, row, count),
                        2.. => self.strips::<L, 2, 2>(pass, row, count),
                        _ => self.strips::<L, 2, 1>(pass, row, count),
                    };
                } else {
                    row += match left {
                        4.. => self.strips::<L, 1, 4>(pass, row, count),
                        _ => self.strips::<L, 1, 1>(pass, row, count),
                    };
                }
            }
        }
    }

    /// M rows over all strips of the panel, T strips at a time.
    #[inline(always)]
    unsafe fn strips<L: Lanes, const T: usize, const M: usize>(
        &self,
        pass: &Pass,
        row: usize,
        count: usize,
    ) -> usize {
        // SAFETY: strips below `count` are in the panel.
        unsafe {
            let mut strip = 0;
            while strip + T <= count {
                self.chains::<L, T, M>(pass, row, strip);
                strip += T;
            }
            if strip < count {
                self.chains::<L, 1, M>(pass, row, strip);
            }
        }
        M
    }

    /// T strips by M rows: T·M chains in registers.
    #[inline(always)]
    unsafe fn chains<L: Lanes, const T: usize, const M: usize>(&self, pass: &Pass, row: usize, strip: usize) {
        let FloatTask { x, sink, .. } = self.task;
        let count = self.strips.1 - self.strips.0;
        // SAFETY: rows are below m and hold `first + steps` steps (the end of a row is padded);
        // strips are in the panel; sums has a place per row and strip of the chunk.
        unsafe {
            let values: [*const u32; M] = std::array::from_fn(|c| {
                x.values.add((row + c) * x.stride).cast::<u32>().cast_const().add(pass.first)
            });
            let place =
                |t: usize, c: usize| pass.sums.add(((row + c - self.rows.0) * count + strip + t) * TILE_ROWS);
            let mut sums = [[L::splat(0.0); M]; T];
            if !pass.starts {
                for t in 0..T {
                    for c in 0..M {
                        sums[t][c] = L::load_f32(place(t, c));
                    }
                }
            }
            let panel = pass.panel.add(strip * pass.strip);
            if self.task.bf16() {
                for step in 0..pass.steps {
                    for t in 0..T {
                        let w = L::load(panel.add(t * pass.strip + step * TILE_ROWS).cast());
                        for c in 0..M {
                            sums[t][c] = L::dot_bf16(sums[t][c], w, values[c].add(step));
                        }
                    }
                }
            } else {
                for step in 0..pass.steps {
                    for t in 0..T {
                        let w = L::load_f32(panel.add(t * pass.strip + step * TILE_ROWS).cast());
                        for c in 0..M {
                            let x = L::splat(values[c].add(step).cast::<f32>().read());
                            sums[t][c] = L::fma(w, x, sums[t][c]);
                        }
                    }
                }
            }
            for t in 0..T {
                for c in 0..M {
                    if pass.ends {
                        sink.put::<L>(row + c, (self.strips.0 + strip + t) * TILE_ROWS, sums[t][c]);
                    } else {
                        L::store_f32(place(t, c), sums[t][c]);
                    }
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
