//! Some rows of queries on their way through the blocks of a KV head.

use std::ops::Range;

use mica_simd::{Isa, Vector, math};
use mica_threads::Scratch;

use super::ahead::Ahead;
use super::block::{BLOCK, BlockShape, PAIR, STEP, TILE, step_tiles};
use super::forward::{Blocks, Forward, Sequence};
use super::product::{Products, product};
use crate::rows::store_run;

/// Rows that one chunk carries through the blocks at most.
pub(super) const ROWS: usize = 48;

/// Rows that are taken together through a block that they see different parts of.
const BUNDLE: usize = 12;

/// Values between rows of scores: one vector more than a block, so that rows do not fall on the
/// same cache sets.
const SCORES: usize = BLOCK + TILE;
/// Values between rows of weights: whole cache lines of bf16, for tiles.
const WEIGHTS: usize = BLOCK + STEP;

/// Rows of one KV head and their state: maximum, sum and unnormalised output so far.
pub(super) struct Rows<'a, P: Products> {
    sequence: &'a Sequence,
    kv_head: usize,
    rows: Range<usize>,
    /// Which keys each row sees.
    ranges: [(usize, usize); ROWS],
    operands: &'a mut [P::Operand],
    scores: &'a mut [f32],
    weights: &'a mut [P::Operand],
    /// The block's maximum, sum and output of each row.
    pub block_max: [f32; ROWS],
    pub block_sum: [f32; ROWS],
    pub block_out: &'a mut [f32],
    /// Room for the panels of a block of codes that are unpacked at a time.
    unpacked: &'a mut [P::Stored],
}

/// Scratch for values that are no [`mica_threads::Plain`] type.
#[allow(clippy::mut_from_ref)] // each call lends a different range
pub(super) fn take<T>(scratch: &Scratch, count: usize) -> &mut [T] {
    let bytes = scratch.take::<u8>(count * size_of::<T>());
    // SAFETY: aligned to 64, long enough; T is f32 or bf16, of which every bit pattern is a value.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), count) }
}

impl<'a, P: Products> Rows<'a, P> {
    /// Reads the queries.
    #[inline(always)]
    pub fn new<V: Vector>(
        forward: &Forward,
        sequence: &'a Sequence,
        kv_head: usize,
        rows: Range<usize>,
        scratch: &'a Scratch,
    ) -> Rows<'a, P> {
        let (count, group) = (rows.len(), forward.group());
        let stride = 2 * forward.shape.key_pairs();
        let operands = take::<P::Operand>(scratch, count * stride);
        let row = scratch.take::<f32>(stride);
        row.fill(0.0);
        let mut ranges = [(0, 0); ROWS];
        let place = |at: usize| (at / group, kv_head * group + at % group);
        for at in rows.clone() {
            let (l, head) = place(at);
            forward.q.prefetch(sequence.q, head, l, forward.shape.key_dim);
        }
        for (i, at) in rows.clone().enumerate() {
            let (l, head) = place(at);
            // SAFETY: l and head are inside the checked shape; the row is copied into its place.
            unsafe {
                forward.q.load::<V>(sequence.q, head, l, &mut row[..forward.shape.key_dim]);
                store_run::<V, P::Operand>(operands.as_mut_ptr().add(i * stride), 1, row);
            }
            ranges[i] = forward.rule.range(sequence.index, l, sequence.start + l as isize, sequence.keys);
        }
        Rows {
            sequence,
            kv_head,
            rows,
            ranges,
            operands,
            scores: scratch.take::<f32>(count * SCORES),
            weights: take::<P::Operand>(scratch, count * WEIGHTS),
            block_max: [f32::NEG_INFINITY; ROWS],
            block_sum: [0.0; ROWS],
            block_out: scratch.take::<f32>(count * forward.width()),
            unpacked: take::<P::Stored>(scratch, unpacked(sequence, forward.shape)),
        }
    }

    /// The blocks that any row sees.
    pub fn blocks(&self) -> Range<usize> {
        let seen = self.ranges[..self.rows.len()].iter().filter(|(low, high)| low < high);
        let (low, high) = seen.fold((usize::MAX, 0), |a, b| (a.0.min(b.0), a.1.max(b.1)));
        if low < high { low / BLOCK..high.div_ceil(BLOCK) } else { 0..0 }
    }

    /// Scores, weights and the weighted sum of values of one block.
    ///
    /// Rows that see different parts of it go through it in bundles, so that little is computed which a row
    /// does not see: a tenth of the work where 48 rows attend to 512 keys causally.
    #[inline(always)]
    pub fn step<V: Vector>(&mut self, forward: &Forward, block: usize, ahead: &mut Ahead) {
        let count = self.rows.len();
        let same = (1..count).all(|i| within(self.ranges[i], block) == within(self.ranges[0], block));
        let bundle = if same || tiles_multiply::<P>(forward.isa) { count } else { BUNDLE };
        self.block_max = [f32::NEG_INFINITY; ROWS];
        let mut row = 0;
        while row < count {
            // No rest of a few rows.
            let next = if count - row < 2 * bundle { count } else { row + bundle };
            self.part::<V>(forward, block, row..next, ahead);
            row = next;
        }
    }

    /// What some rows see of a block, if anything.
    fn seen(&self, rows: Range<usize>, block: usize) -> Option<(usize, usize)> {
        let (mut low, mut high) = (BLOCK, 0);
        for &range in &self.ranges[rows] {
            let (from, to) = within(range, block);
            if from < to {
                (low, high) = (low.min(from), high.max(to));
            }
        }
        (low < high).then_some((low, high))
    }

    /// [`Rows::step`] of some rows.
    #[inline(always)]
    fn part<V: Vector>(&mut self, forward: &Forward, block: usize, rows: Range<usize>, ahead: &mut Ahead) {
        let group = forward.group();
        let Some((low, high)) = self.seen(rows.clone(), block) else { return };
        let (tiles, weighed) = parts::<P>(forward.isa, low, high);
        let pairs = forward.shape.key_pairs();
        let planes = forward.planes::<P>(self.sequence, self.kv_head, block);
        let panels = forward.block::<P>(self.sequence, self.kv_head, block).map(<*const u8>::cast);
        let unpacked = self.unpacked.as_mut_ptr();
        let mut multiply = |keys: *const P::Stored, panels: Range<usize>, first: usize, ahead: &mut Ahead| {
            // SAFETY: operands and scores have all rows; panels have `pairs` pairs, and their scores begin at `first`.
            unsafe {
                product::<P>(
                    forward.isa,
                    self.operands.as_ptr().add(rows.start * 2 * pairs),
                    2 * pairs,
                    rows.len(),
                    keys,
                    pairs * 2 * TILE,
                    panels,
                    0..pairs,
                    self.scores.as_mut_ptr().add(rows.start * SCORES + first * TILE),
                    SCORES,
                    false,
                    ahead,
                );
            }
        };
        match &planes {
            None => multiply(panels[0], tiles.clone(), 0, ahead),
            Some([keys, _]) => {
                for some in by(KEY_PANELS, tiles.clone()) {
                    // SAFETY: the caller of `paged_attention` promised the pages; there is room for so many panels.
                    unsafe { keys.unpack_keys::<V, P>(some.clone(), unpacked, ahead) };
                    multiply(unpacked, 0..some.len(), some.start, &mut Ahead::none());
                }
            }
        }
        for i in rows.clone() {
            let at = self.rows.start + i;
            let (l, head) = (at / group, self.kv_head * group + at % group);
            let scores = &mut self.scores[i * SCORES..][..BLOCK];
            let place = [self.sequence.index, head, l, block];
            let range = within(self.ranges[i], block);
            self.block_max[i] = forward.rule.scores::<V>(scores, tiles.clone(), range, place);
            // Whether a maximum keeps a NaN depends on what is beside it. Beside finite scores the weights keep it; with
            // nothing else it must not be taken for a row that sees nothing.
            let nothing = self.block_max[i] == f32::NEG_INFINITY;
            if nothing && range.0 < range.1 && scores[range.0..range.1].iter().any(|x| x.is_nan()) {
                self.block_max[i] = f32::NAN;
            }
        }
        // Apart from the loop above, so that no row waits for its own maximum.
        for i in rows.clone() {
            let largest = self.block_max[i];
            let middle = V::splat(largest);
            let scores = self.scores[i * SCORES..][..BLOCK].as_ptr();
            let weights = self.weights[i * WEIGHTS..].as_mut_ptr();
            let mut sum = V::zero();
            for at in tiles.clone().map(|tile| tile * TILE) {
                // SAFETY: the row has a place for each key of the block.
                unsafe {
                    let weight = if largest == f32::NEG_INFINITY {
                        V::zero()
                    } else {
                        math::exp_to_one(V::load(scores.add(at)) - middle)
                    };
                    sum = sum + weight;
                    P::store_weight(weight, weights.add(at));
                }
            }
            self.block_sum[i] = sum.sum();
        }
        let width = forward.width();
        let mut multiply =
            |values: *const P::Stored, panels: Range<usize>, first: usize, ahead: &mut Ahead| {
                // SAFETY: weights and output have all rows; panels of values have 128 pairs, and their sums begin at
                // `first`. The pairs lie inside the tiles whose weights were just written.
                unsafe {
                    product::<P>(
                        forward.isa,
                        self.weights.as_ptr().add(rows.start * WEIGHTS),
                        WEIGHTS,
                        rows.len(),
                        values,
                        BLOCK * TILE,
                        panels,
                        weighed.clone(),
                        self.block_out.as_mut_ptr().add(rows.start * width + first * TILE),
                        width,
                        false,
                        ahead,
                    );
                }
            };
        let all = 0..forward.shape.value_tiles();
        match &planes {
            None => multiply(panels[1], all, 0, ahead),
            Some([_, values]) => {
                let steps = 2 * weighed.start..2 * weighed.end;
                for some in by(VALUE_PANELS, all) {
                    // SAFETY: as for the keys.
                    unsafe { values.unpack_values::<V, P>(some.clone(), steps.clone(), unpacked, ahead) };
                    multiply(unpacked, 0..some.len(), some.start, &mut Ahead::none());
                }
            }
        }
    }
}

/// Panels of codes that are unpacked at a time: they stay in the nearest cache until they are multiplied.
const KEY_PANELS: usize = 4;
const VALUE_PANELS: usize = 2;

/// Values of the panels that are unpacked at a time.
fn unpacked(sequence: &Sequence, block: BlockShape) -> usize {
    match &sequence.blocks {
        Blocks::Pages { shape, .. } if shape.codes().is_some() => {
            PAIR * (KEY_PANELS * block.key_pairs()).max(VALUE_PANELS * BLOCK / 2)
        }
        _ => 0,
    }
}

/// A range in pieces of so many.
fn by(count: usize, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(count).map(move |start| start..(start + count).min(end))
}

/// The part of a range of keys that lies in a block, counted from its start.
#[inline(always)]
pub(super) fn within((low, high): (usize, usize), block: usize) -> (usize, usize) {
    let base = block * BLOCK;
    (low.clamp(base, base + BLOCK) - base, high.clamp(base, base + BLOCK) - base)
}

/// Tiles of keys that are read for `low..high` of a block, and pairs of keys whose weights may not be zero.
#[inline(always)]
fn parts<P: Products>(isa: Isa, low: usize, high: usize) -> (Range<usize>, Range<usize>) {
    if tiles_multiply::<P>(isa) {
        let tiles = step_tiles(low, high);
        (tiles.clone(), tiles.start * TILE / 2..tiles.end * TILE / 2)
    } else {
        (low / TILE..high.div_ceil(TILE), low / 2..high.div_ceil(2))
    }
}

/// Whether products run on AMX tiles.
pub(super) fn tiles_multiply<P: Products>(isa: Isa) -> bool {
    P::TILES && isa == Isa::Amx
}
