//! The forward pass, over arrays; [`super::paged`] leads pages through the same blocks.
//!
//! The rows of one problem are (query, head of the group) pairs: the heads that share a KV head
//! are the rows of one small product per block. Long rows of blocks for few queries (decoding)
//! are split: each chunk does one block, and the last that is done with a KV head merges them in the
//! order in which one chunk would have. So decoding is one task, in which the chunks also append the
//! new position to their pages.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use mica_simd::{Isa, Kernel, Vector, dispatch, math};
use mica_threads::{Lines, Scratch, Task};

use super::ahead::{Ahead, Runs};
use super::block::{BLOCK, BlockShape, TILE};
use super::block_rows::{ROWS, Rows, tiles_multiply, within};
use super::codes::Plane;
use super::heads::Heads;
use super::packing::Pack;
use super::pages::{Move, PageShape, Pages, Positions};
use super::product::{Halves, Products, Single, Widened, are_few};
use super::{Precision, Rule};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::check_output;
use crate::error::{KernelError, check_tier};
use crate::gemm::uses_pairs;
use crate::plan::{Plan, Workspace};
use crate::rows::{check_float, check_shape};

/// Rows that one chunk carries through the blocks: their scores (32 KB) stay in the nearest
/// caches beside a panel of keys. On AVX-512 whole bundles of six (48 were 3 % faster than 36 on Zen 5, since keys and
/// values are read less often), on AMX whole tiles.
fn chunk_rows(isa: Isa) -> usize {
    if matches!(isa, Isa::Avx512 | Isa::Avx512Bf16) { ROWS } else { 32 }
}

/// What [`attention`] reads and writes. Floats are f32, bf16 or f16, with any strides.
pub struct AttentionArgs {
    /// `[batch, heads, length, head_dim]`.
    pub q: DynView,
    /// `[batch, kv_heads, keys, head_dim]`; `kv_heads` divides `heads`.
    pub k: DynView,
    /// `[batch, kv_heads, keys, value_dim]`.
    pub v: DynView,
    /// Which keys count, and how.
    pub rule: Rule,
    /// How products are formed.
    pub precision: Precision,
    /// `[batch, heads, length, value_dim]`. May not alias an input.
    pub out: DynViewMut,
    /// `[batch, heads, length]` f32: the natural logarithm of the sum of exponentials of the
    /// scores (sinks included), which the backward pass needs.
    pub lse: Option<DynViewMut>,
}

/// The sizes of a checked problem.
pub(super) struct Sizes {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub length: usize,
    pub keys: usize,
    pub shape: BlockShape,
}

/// Checks q, k and v.
pub(super) fn sizes(name: &'static str, q: &DynView, k: &DynView, v: &DynView) -> Result<Sizes, KernelError> {
    for (what, view) in [("q", q), ("k", k), ("v", v)] {
        check_float(name, what, view.dtype)?;
        if view.shape.len() != 4 {
            let message = format!("{what} has shape {:?}, expected [batch, heads, length, dim]", view.shape);
            return Err(KernelError::new(name, message));
        }
    }
    let (batch, heads, length, key_dim) = (q.shape[0], q.shape[1], q.shape[2], q.shape[3]);
    let (kv_heads, keys, value_dim) = (k.shape[1], k.shape[2], v.shape[3]);
    check_shape(name, "k", &k.shape, &[batch, kv_heads, keys, key_dim])?;
    check_shape(name, "v", &v.shape, &[batch, kv_heads, keys, value_dim])?;
    if kv_heads == 0 || heads % kv_heads != 0 {
        let message = format!("{heads} heads are no multiple of {kv_heads} KV heads");
        return Err(KernelError::new(name, message));
    }
    Ok(Sizes { batch, heads, kv_heads, length, keys, shape: BlockShape { key_dim, value_dim } })
}

/// softmax(scores)·v for each query and head; see the module's documentation.
pub fn attention(isa: Isa, args: AttentionArgs) -> Result<Plan, KernelError> {
    let name = "attention";
    check_tier(name, isa)?;
    let Sizes { batch, heads, kv_heads, length, keys, shape } = sizes(name, &args.q, &args.k, &args.v)?;
    args.rule.check(name, [batch, heads, length], keys)?;
    check_shape(name, "out", &args.out.shape, &[batch, heads, length, shape.value_dim])?;
    check_float(name, "out", args.out.dtype)?;
    check_output(name, &args.out)?;
    let out = Heads::new(args.out.pointer, args.out.dtype, &args.out.strides[1..]);
    let lse = match &args.lse {
        None => None,
        Some(view) => {
            check_shape(name, "lse", &view.shape, &[batch, heads, length])?;
            if view.dtype != Dtype::F32 {
                return Err(KernelError::new(name, format!("lse is {}, expected float32", view.dtype)));
            }
            check_output(name, view)?;
            Some(Heads::new(view.pointer, view.dtype, &[view.strides[1], view.strides[2], 1]))
        }
    };
    let blocks = keys.div_ceil(BLOCK);
    let sequences = (0..batch)
        .map(|b| {
            let along = |strides: &[isize]| b as isize * strides[0];
            Sequence {
                index: b,
                length,
                keys,
                start: keys as isize - length as isize,
                q: along(&args.q.strides),
                out: along(&args.out.strides),
                lse: args.lse.as_ref().map_or(0, |view| along(&view.strides)),
                blocks: Blocks::Packed(b * kv_heads * blocks),
                ..Sequence::default()
            }
        })
        .collect();
    let forward = Forward {
        isa,
        rule: args.rule,
        shape,
        heads,
        kv_heads,
        q: Heads::new(args.q.pointer.cast_mut(), args.q.dtype, &args.q.strides[1..]),
        out,
        lse,
        sequences,
        packed: Workspace(std::ptr::null_mut()),
        partials: Workspace(std::ptr::null_mut()),
        merged: Box::default(),
    };
    let pack = Pack {
        isa,
        shape,
        kv_heads,
        keys,
        blocks,
        units: batch * kv_heads,
        k: args.k.clone(),
        v: args.v.clone(),
        to: Workspace(std::ptr::null_mut()),
    };
    let bf16 = args.k.dtype == Dtype::BF16 && args.v.dtype == Dtype::BF16;
    Ok(if uses_pairs(isa, args.precision) {
        plan::<Halves>(forward, Some(pack))
    } else if bf16 || args.precision == Precision::Bf16 {
        plan::<Widened>(forward, Some(pack))
    } else {
        plan::<Single>(forward, Some(pack))
    })
}

/// Lays out the workspace: packed blocks, then the partial results of split sequences.
pub(super) fn plan<P: Products>(mut forward: Forward, pack: Option<Pack>) -> Plan {
    let group = forward.heads / forward.kv_heads;
    let (width, most) = (forward.width(), chunk_rows(forward.isa));
    let (mut chunks, mut merges, mut partials) = (0, 0, 0);
    let mut appends: Vec<Box<dyn Task>> = Vec::new();
    for sequence in &mut forward.sequences {
        let rows = sequence.length * group;
        let blocks = sequence.keys.div_ceil(BLOCK);
        sequence.split = (1..=most).contains(&rows) && blocks > 1;
        sequence.first_chunk = chunks;
        sequence.first_merge = merges;
        sequence.partial = partials;
        if let Blocks::Pages { shape, pages, new } = &sequence.blocks {
            // If one chunk does all rows of a block, nobody else reads it before that chunk has written.
            sequence.appends = rows <= most;
            if !sequence.appends {
                let (shape, pages, positions) = (*shape, pages.clone(), new.clone());
                appends.push(Box::new(Move { isa: forward.isa, shape, pages, positions, read: false }));
            }
        }
        if sequence.split {
            chunks += forward.kv_heads * blocks;
            merges += forward.kv_heads;
            partials += forward.kv_heads * blocks * rows * (2 + width);
        } else {
            chunks += forward.kv_heads * rows.div_ceil(most);
        }
    }
    let block_bytes = (forward.shape.key_len() + forward.shape.value_len()) * size_of::<P::Stored>();
    let packed = pack.as_ref().map_or(0, |pack| pack.units * pack.blocks * block_bytes);
    let packed = packed.next_multiple_of(64);
    Plan::new(packed + partials * size_of::<f32>(), move |workspace, list| {
        list.extend(appends);
        forward.merged = (0..merges).map(|_| AtomicUsize::new(0)).collect();
        forward.packed = workspace;
        forward.partials = Workspace(workspace.0.wrapping_add(packed));
        if let Some(mut pack) = pack {
            pack.to = workspace;
            list.push(pack.task::<P>());
        }
        list.push(Box::new(Blockwise::<P> { forward, chunks, kind: PhantomData }));
    })
}

#[derive(Default)]
pub(super) enum Blocks {
    #[default]
    None,
    /// In the workspace; the number of the first.
    Packed(usize),
    /// Keys and values, and the positions that are to be appended.
    Pages { shape: PageShape, pages: Pages, new: Positions },
}

#[derive(Default)]
pub(super) struct Sequence {
    pub index: usize,
    pub length: usize,
    pub keys: usize,
    /// The position of query 0.
    pub start: isize,
    /// Where it begins in the arrays, in values.
    pub q: isize,
    pub out: isize,
    pub lse: isize,
    pub blocks: Blocks,
    pub split: bool,
    /// Its chunks append to its pages.
    pub appends: bool,
    pub first_chunk: usize,
    pub first_merge: usize,
    /// Where its partial results begin, in values.
    pub partial: usize,
}

impl Sequence {
    /// What its chunks append, page by page: to one page or all, whose memory `at` gives.
    #[inline(always)]
    fn appends(
        &self,
        only: Option<usize>,
        at: impl Fn(usize) -> [*const u8; 2] + Clone,
    ) -> impl Iterator<Item = (&PageShape, &Positions, usize, [*mut u8; 2])> + Clone {
        let new = match &self.blocks {
            Blocks::Pages { shape, new, .. } if self.appends => Some((shape, new)),
            _ => None,
        };
        let pages = new.into_iter().flat_map(|(shape, new)| new.pages().map(move |page| (shape, new, page)));
        let pages = pages.filter(move |(_, _, page)| only.is_none_or(|block| block == *page));
        pages.map(move |(shape, new, page)| (shape, new, page, at(page).map(<*const u8>::cast_mut)))
    }
}

pub(super) struct Forward {
    pub isa: Isa,
    pub rule: Rule,
    pub shape: BlockShape,
    pub heads: usize,
    pub kv_heads: usize,
    pub q: Heads,
    pub out: Heads,
    pub lse: Option<Heads>,
    pub sequences: Vec<Sequence>,
    pub packed: Workspace,
    pub partials: Workspace,
    /// For each KV head of each split sequence, how many blocks are done.
    pub merged: Box<[AtomicUsize]>,
}

// SAFETY: the caller of `paged_attention` allowed reading pages and writing new positions; what chunks write is in
// disjoint places.
unsafe impl Send for Forward {}
// SAFETY: as above.
unsafe impl Sync for Forward {}

impl Forward {
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Values of an output row in scratch: whole panels.
    pub fn width(&self) -> usize {
        self.shape.value_tiles() * TILE
    }

    /// Keys and values of a block of a KV head, as they are stored.
    pub fn block<P: Products>(&self, sequence: &Sequence, kv_head: usize, block: usize) -> [*const u8; 2] {
        match &sequence.blocks {
            Blocks::None => [std::ptr::null(); 2],
            Blocks::Packed(first) => {
                let size = size_of::<P::Stored>();
                let (key_bytes, value_bytes) = (self.shape.key_len() * size, self.shape.value_len() * size);
                let number = first + kv_head * sequence.keys.div_ceil(BLOCK) + block;
                let keys = self.packed.0.cast_const().wrapping_add(number * (key_bytes + value_bytes));
                [keys, keys.wrapping_add(key_bytes)]
            }
            Blocks::Pages { shape, pages: [keys, values], .. } => {
                let [key_bytes, value_bytes] = shape.head_bytes();
                [
                    keys[block].cast_const().wrapping_add(kv_head * key_bytes),
                    values[block].cast_const().wrapping_add(kv_head * value_bytes),
                ]
            }
        }
    }

    /// The planes of a block, if it is kept as codes.
    pub fn planes<P: Products>(
        &self,
        sequence: &Sequence,
        kv_head: usize,
        block: usize,
    ) -> Option<[Plane; 2]> {
        let Blocks::Pages { shape, .. } = &sequence.blocks else { return None };
        let codes = shape.codes()?;
        let [keys, values] = self.block::<P>(sequence, kv_head, block).map(<*const u8>::cast_mut);
        Some([Plane::keys(codes, shape.key_dim, keys), Plane::values(codes, shape.value_dim, values)])
    }

    /// Where the partial results of a block lie: for each row its maximum, its sum, its output.
    fn partial(&self, sequence: &Sequence, kv_head: usize, block: usize) -> *mut f32 {
        let blocks = sequence.keys.div_ceil(BLOCK);
        let one = sequence.length * self.group() * (2 + self.width());
        self.partials.f32s(sequence.partial + (kv_head * blocks + block) * one)
    }

    /// What a chunk does.
    fn place(&self, chunk: usize) -> Place<'_> {
        let sequence = &self.sequences[self.sequences.partition_point(|s| s.first_chunk <= chunk) - 1];
        let (chunk, count) = (chunk - sequence.first_chunk, sequence.length * self.group());
        if sequence.split {
            // Head after head of a block, as they lie in a page: what is asked for past the end of one is the
            // beginning of the next.
            let (block, kv_head) = (chunk / self.kv_heads, chunk % self.kv_heads);
            Place { sequence, kv_head, rows: 0..count, only: Some(block) }
        } else {
            let most = chunk_rows(self.isa);
            let parts = count.div_ceil(most);
            let first = chunk % parts * most;
            Place { sequence, kv_head: chunk / parts, rows: first..(first + most).min(count), only: None }
        }
    }
}

impl Forward {
    /// What a chunk of few rows reads of the keys and of the values: a part of one block, since more would be split.
    fn reads<P: Products>(&self, chunk: usize) -> [Runs; 2] {
        let Place { sequence, kv_head, rows, only } = self.place(chunk);
        let (mut low, mut high) = (usize::MAX, 0);
        for at in rows {
            let l = at / self.group();
            let position = sequence.start + l as isize;
            let (from, to) = self.rule.range(sequence.index, l, position, sequence.keys);
            (low, high) = (low.min(from), high.max(to));
        }
        let block = only.unwrap_or(low / BLOCK);
        let (low, high) = within((low, high), block);
        if low >= high {
            return [Runs::NONE; 2];
        }
        let tiles = low / TILE..high.div_ceil(TILE);
        if let Some([keys, values]) = self.planes::<P>(sequence, kv_head, block) {
            let steps = low..high;
            return [
                Runs {
                    start: keys.line(tiles.start, 0),
                    bytes: tiles.len() * keys.panel_bytes(),
                    stride: 0,
                    count: 1,
                },
                Runs {
                    start: values.line(0, low),
                    bytes: values.step_bytes(&steps),
                    stride: values.panel_bytes(),
                    count: self.shape.value_tiles(),
                },
            ];
        }
        let [keys, values] = self.block::<P>(sequence, kv_head, block);
        let size = size_of::<P::Stored>();
        let panel = 2 * self.shape.key_pairs() * TILE * size;
        let (pair, weighed) = (2 * TILE * size, low / 2..high.div_ceil(2));
        [
            Runs {
                start: keys.wrapping_add(tiles.start * panel),
                bytes: tiles.len() * panel,
                stride: 0,
                count: 1,
            },
            Runs {
                start: values.wrapping_add(weighed.start * pair),
                bytes: weighed.len() * pair,
                stride: BLOCK * TILE * size,
                count: self.shape.value_tiles(),
            },
        ]
    }
}

/// Rows of one KV head, through all blocks or one.
struct Place<'a> {
    sequence: &'a Sequence,
    kv_head: usize,
    rows: Range<usize>,
    only: Option<usize>,
}

/// The larger maximum of rows' states and of their blocks, and what each side is to be multiplied by
/// to be relative to it.
#[inline(always)]
fn factors<V: Vector>(max: V, block_max: V) -> (V, V, V) {
    let largest = V::select(max.gt(block_max), max, block_max);
    (largest, math::exp(max - largest), math::exp(block_max - largest))
}

/// Adds a block's result to a row's, both made relative to one maximum by the factors.
#[inline(always)]
fn merge<V: Vector>((keep, take): (f32, f32), sum: &mut f32, out: &mut [f32], block: (f32, &[f32])) {
    let (block_sum, block_out) = block;
    *sum = block_sum.mul_add(take, *sum * keep);
    let (keep, take) = (V::splat(keep), V::splat(take));
    for (out, add) in out.chunks_exact_mut(TILE).zip(block_out.chunks_exact(TILE)) {
        // SAFETY: a vector each.
        unsafe {
            let kept = V::load(out.as_ptr()) * keep;
            V::load(add.as_ptr()).mul_add(take, kept).store(out.as_mut_ptr());
        }
    }
}

/// Normalises a row, with its sink, and writes it.
#[inline(always)]
fn finish<V: Vector>(
    forward: &Forward,
    sequence: &Sequence,
    head: usize,
    l: usize,
    (mut max, mut sum): (f32, f32),
    out: &mut [f32],
) {
    if let Some(sink) = forward.rule.sink(head).filter(|&sink| sink != f32::NEG_INFINITY) {
        // One more block of one key, without a value.
        let largest = if max > sink { max } else { sink };
        let exps =
            V::from_array(std::array::from_fn(|i| if i == 0 { max - largest } else { sink - largest }));
        let exps = math::exp(exps).to_array();
        sum = sum * exps[0] + exps[1];
        max = largest;
        let keep = V::splat(exps[0]);
        for part in out.chunks_mut(TILE) {
            (V::from_slice(part, 0.0) * keep).to_slice(part);
        }
    }
    // One division a row: one a vector took longer than the products of a few dozen keys.
    let inverse = V::splat(1.0 / if sum == 0.0 { 1.0 } else { sum });
    for part in out.chunks_mut(TILE) {
        (V::from_slice(part, 0.0) * inverse).to_slice(part);
    }
    // SAFETY: the row belongs to this chunk, inside the checked shapes.
    unsafe {
        forward.out.store::<V>(sequence.out, head, l, &out[..forward.shape.value_dim]);
        if let Some(lse) = &forward.lse {
            let log = math::log(V::splat(sum)).to_array()[0];
            let value = if sum == 0.0 { f32::NEG_INFINITY } else { max + log };
            lse.store::<V>(sequence.lse, head, l, &[value]);
        }
    }
}

/// Rows through all their blocks, or one block of a split sequence.
struct Blockwise<P> {
    forward: Forward,
    chunks: usize,
    kind: PhantomData<P>,
}

impl<P: Products> Task for Blockwise<P> {
    fn chunks(&self) -> usize {
        self.chunks
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.forward.isa, BlockwiseChunk { task: self, chunk, scratch });
    }

    fn begins_with(&self, chunk: usize) -> Lines {
        let Place { sequence, rows, .. } = self.forward.place(chunk);
        // The ranges of keys in arrays may not have been computed yet.
        if !are_few(self.forward.isa, rows.len()) || !matches!(sequence.blocks, Blocks::Pages { .. }) {
            return Lines::default();
        }
        let [keys, _] = self.forward.reads::<P>(chunk);
        Lines::new(keys.start, keys.bytes)
    }

    fn name(&self) -> &'static str {
        "attention"
    }
}

struct BlockwiseChunk<'a, P> {
    task: &'a Blockwise<P>,
    chunk: usize,
    scratch: &'a Scratch,
}

impl<P: Products> Kernel for BlockwiseChunk<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let forward = &self.task.forward;
        let (group, width) = (forward.group(), forward.width());
        let Place { sequence, kv_head, rows, only } = forward.place(self.chunk);
        let appends = sequence.appends(only, |page| forward.block::<P>(sequence, kv_head, page));
        for (shape, new, page, to) in appends.clone() {
            new.prefetch::<P::Stored>(shape, to, page);
        }
        let mut work = Rows::<P>::new::<V>(forward, sequence, kv_head, rows.clone(), self.scratch);
        for (shape, new, page, to) in appends {
            // SAFETY: the caller of `paged_attention` lent these positions for writing, and this chunk has the head's
            // block for itself.
            unsafe { new.write::<V, P::Stored>(shape, to, page, kv_head, self.scratch) };
        }
        // The state of each row; a split block starts and ends with nothing but itself.
        let out = self.scratch.take::<f32>(rows.len() * width);
        let (mut max, mut sum) = ([f32::NEG_INFINITY; ROWS], [0f32; ROWS]);
        out.fill(0.0);
        let blocks = work.blocks();
        let blocks = match only {
            None => blocks,
            Some(block) if blocks.contains(&block) => block..block + 1,
            Some(_) => 0..0,
        };
        let none = blocks.is_empty();
        let mut ahead = if are_few(forward.isa, rows.len()) && !tiles_multiply::<P>(forward.isa) {
            let next = self.chunk + 1;
            let next = if next < self.task.chunks { forward.reads::<P>(next) } else { [Runs::NONE; 2] };
            Ahead::new(forward.reads::<P>(self.chunk), next)
        } else {
            Ahead::none()
        };
        for block in blocks {
            work.step::<V>(forward, block, &mut ahead);
            if only.is_some() {
                break;
            }
            let (mut keep, mut take) = ([0.0; ROWS], [0.0; ROWS]);
            for at in (0..rows.len()).step_by(TILE) {
                let lanes = at..at + TILE;
                let [old, new] = [&max, &work.block_max].map(|from| V::from_slice(&from[lanes.clone()], 0.0));
                let (largest, keeps, takes) = factors(old, new);
                largest.to_slice(&mut max[lanes.clone()]);
                keeps.to_slice(&mut keep[lanes.clone()]);
                takes.to_slice(&mut take[lanes]);
            }
            for i in 0..rows.len() {
                if work.block_max[i] != f32::NEG_INFINITY {
                    let block = (work.block_sum[i], &work.block_out[i * width..][..width]);
                    merge::<V>((keep[i], take[i]), &mut sum[i], &mut out[i * width..][..width], block);
                }
            }
        }
        if let Some(block) = only {
            let to = forward.partial(sequence, kv_head, block);
            for i in 0..rows.len() {
                let max = if none { f32::NEG_INFINITY } else { work.block_max[i] };
                // SAFETY: the plan gave each block 2 + width values a row.
                unsafe {
                    let to = to.add(i * (2 + width));
                    *to = max;
                    *to.add(1) = work.block_sum[i];
                    if max != f32::NEG_INFINITY {
                        std::ptr::copy_nonoverlapping(work.block_out[i * width..].as_ptr(), to.add(2), width);
                    }
                }
            }
            let done = &forward.merged[sequence.first_merge + kv_head];
            if done.fetch_add(1, Ordering::AcqRel) + 1 == sequence.keys.div_ceil(BLOCK) {
                done.store(0, Ordering::Relaxed); // for the next run
                merge_blocks::<V>(forward, sequence, kv_head, &mut out[..width]);
            }
            return;
        }
        for (i, at) in rows.enumerate() {
            let (l, head) = (at / group, kv_head * group + at % group);
            finish::<V>(forward, sequence, head, l, (max[i], sum[i]), &mut out[i * width..][..width]);
        }
    }
}

/// Joins the blocks of one KV head of a split sequence. `out` is a row's scratch.
#[inline(always)]
fn merge_blocks<V: Vector>(forward: &Forward, sequence: &Sequence, kv_head: usize, out: &mut [f32]) {
    let (group, width) = (forward.group(), forward.width());
    for row in 0..sequence.length * group {
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
        out.fill(0.0);
        for block in 0..sequence.keys.div_ceil(BLOCK) {
            let from = forward.partial(sequence, kv_head, block).wrapping_add(row * (2 + width));
            // SAFETY: the chunk of the block, which is done, wrote 2 + width values for each row (no output where the
            // maximum is -∞, and then none is read).
            let (block_max, block_sum, values) =
                unsafe { (*from, *from.add(1), std::slice::from_raw_parts(from.add(2), width)) };
            if block_max == f32::NEG_INFINITY {
                continue;
            }
            let (largest, keep, take) = factors(V::splat(max), V::splat(block_max));
            let [largest, keep, take] = [largest, keep, take].map(|x| x.to_array()[0]);
            max = largest;
            merge::<V>((keep, take), &mut sum, out, (block_sum, values));
        }
        finish::<V>(forward, sequence, kv_head * group + row % group, row / group, (max, sum), out);
    }
}

#[cfg(test)]
#[path = "forward_tests.rs"]
pub(crate) mod tests;
