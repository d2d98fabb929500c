//! The backward pass, from the log-sum-exp that the forward pass saved.
//!
//! With P = exp(S - lse), D = rowsum(dO∘O) and dS = P∘(dO·Vᵀ - D)·scale:
//! dV = Pᵀ·dO, dK = dSᵀ·Q, dQ = dS·K (Dao 2023, algorithm 2).
//!
//! One chunk is one KV head of one sequence with all heads of its group inside, so sums need no
//! atomics and have one order: a key's over blocks of [`ROWS`] (query, head) rows ascending, a
//! query's over key blocks ascending. A key block stays in the second-level cache, panels and sums,
//! while the rows pass by. dK and dV are summed transposed (dimensions × keys), because then
//! P and dS are written as panels with pairs along rows, straight from the registers in which they
//! were computed, and nothing large is transposed.

use std::marker::PhantomData;

use half::bf16;
use mica_simd::{Isa, Kernel, Vector, dispatch, math};
use mica_threads::{Scratch, Task};

use super::ahead::Ahead;
use super::block::{BLOCK, BlockShape, PAIR, STEP, Stored, TILE, step_tiles};
use super::block_rows::take;
use super::forward::{Sizes, sizes};
use super::heads::{Heads, Part, turn};
use super::product::{Halves, Products, Single, Widened, product};
use super::{Precision, Rule};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::check_output;
use crate::error::{KernelError, check_tier};
use crate::gemm::uses_pairs;
use crate::plan::{Plan, Workspace};
use crate::rows::{check_float, check_shape, store_run};

/// Rows that meet a key block together: their products with it stay in the second-level cache beside
/// the block (measured on 2 MB; 1 MB holds them too).
const ROWS: usize = 64;
/// Values between rows of products: see the forward pass.
const STRIDE: usize = BLOCK + TILE;
/// Values between rows of operands: whole cache lines of bf16, for tiles.
const OPERANDS: usize = BLOCK + STEP;

/// What [`attention_backward`] reads and writes; shapes as in [`super::AttentionArgs`].
pub struct AttentionBackwardArgs {
    /// `[batch, heads, length, head_dim]`.
    pub q: DynView,
    /// `[batch, kv_heads, keys, head_dim]`.
    pub k: DynView,
    /// `[batch, kv_heads, keys, value_dim]`.
    pub v: DynView,
    /// As in the forward pass. A mask gets no gradient.
    pub rule: Rule,
    /// As in the forward pass.
    pub precision: Precision,
    /// The forward pass's result, `[batch, heads, length, value_dim]`.
    pub out: DynView,
    /// The forward pass's log-sum-exp, `[batch, heads, length]` f32.
    pub lse: DynView,
    /// The gradient of `out`.
    pub dout: DynView,
    /// The gradient of `q`, if wanted: f32, bf16 or f16 like the next two. No output may alias an
    /// input.
    pub dq: Option<DynViewMut>,
    /// The gradient of `k`, if wanted.
    pub dk: Option<DynViewMut>,
    /// The gradient of `v`, if wanted.
    pub dv: Option<DynViewMut>,
    /// The gradient of the sinks, `[heads]` f32, if the rule has sinks and it is wanted.
    pub dsinks: Option<DynViewMut>,
}

/// The gradients of [`super::attention`].
pub fn attention_backward(isa: Isa, args: AttentionBackwardArgs) -> Result<Plan, KernelError> {
    let name = "attention_backward";
    check_tier(name, isa)?;
    let Sizes { batch, heads, kv_heads, length, keys, shape } = sizes(name, &args.q, &args.k, &args.v)?;
    args.rule.check(name, [batch, heads, length], keys)?;
    let out_shape = [batch, heads, length, shape.value_dim];
    for (what, view, expected) in [
        ("out", &args.out, &out_shape[..]),
        ("dout", &args.dout, &out_shape),
        ("lse", &args.lse, &out_shape[..3]),
    ] {
        check_shape(name, what, &view.shape, expected)?;
        check_float(name, what, view.dtype)?;
    }
    for (what, view, like) in
        [("dq", &args.dq, &args.q), ("dk", &args.dk, &args.k), ("dv", &args.dv, &args.v)]
    {
        let Some(view) = view else { continue };
        check_shape(name, what, &view.shape, &like.shape)?;
        check_float(name, what, view.dtype)?;
        check_output(name, view)?;
    }
    if let Some(view) = &args.dsinks {
        check_shape(name, "dsinks", &view.shape, &[heads])?;
        check_output(name, view)?;
        if view.dtype != Dtype::F32 || args.rule.sinks.is_none() {
            let message = format!("dsinks is {}, expected float32 and a rule with sinks", view.dtype);
            return Err(KernelError::new(name, message));
        }
    }
    let read = |view: &DynView| Along::new(view.pointer.cast_mut(), view.dtype, &view.strides);
    let write = |view: &Option<DynViewMut>| {
        let view = view.as_ref()?;
        Some(Along::new(view.pointer, view.dtype, &view.strides))
    };
    let lse = Along {
        batch: args.lse.strides[0],
        heads: Heads::new(
            args.lse.pointer.cast_mut(),
            args.lse.dtype,
            &[args.lse.strides[1], args.lse.strides[2], 1],
        ),
    };
    let backward = Backward {
        isa,
        shape,
        batch,
        heads,
        kv_heads,
        length,
        keys,
        q: read(&args.q),
        k: read(&args.k),
        v: read(&args.v),
        out: read(&args.out),
        dout: read(&args.dout),
        lse,
        dq: write(&args.dq),
        dk: write(&args.dk),
        dv: write(&args.dv),
        rule: args.rule,
        sinks: None,
    };
    let bytes = if args.dsinks.is_some() { batch * heads * size_of::<f32>() } else { 0 };
    let (precision, dsinks) = (args.precision, args.dsinks);
    Ok(Plan::new(bytes, move |workspace, list| {
        let sinks = dsinks.is_some().then_some(workspace);
        let backward = Backward { sinks, ..backward };
        if uses_pairs(isa, precision) {
            list.push(Box::new(Units::<Halves> { backward, kind: PhantomData }));
        } else if precision == Precision::Bf16 {
            list.push(Box::new(Units::<Widened> { backward, kind: PhantomData }));
        } else {
            list.push(Box::new(Units::<Single> { backward, kind: PhantomData }));
        }
        if let Some(out) = dsinks {
            list.push(Box::new(SumSinks { workspace, batch, heads, out }));
        }
    }))
}

/// Scratch memory that a chunk of [`attention_backward`] takes, in bytes, and how many chunks there are. It grows with the
/// length, since all rows of a KV head are in it.
pub fn backward_scratch(
    isa: Isa,
    precision: Precision,
    [batch, heads, kv_heads, length]: [usize; 4],
    [key_dim, value_dim]: [usize; 2],
) -> (usize, usize) {
    let number = size_of::<f32>();
    let operand = if uses_pairs(isa, precision) { size_of::<bf16>() } else { number };
    let stored = if precision == Precision::Bf16 { size_of::<bf16>() } else { number };
    let widths = Widths::new(BlockShape { key_dim, value_dim });
    let row = (widths.q + widths.dout) * operand + (2 + widths.dq) * number + 2 * size_of::<usize>();
    let keys = (widths.keys.key_len() + widths.values.key_len() + widths.values.value_len()) * stored
        + (key_dim + value_dim) * (STRIDE * number + ROWS * operand);
    let meeting = ROWS * (2 * STRIDE * number + OPERANDS * operand + 2 * BLOCK * stored) + 2 * BLOCK * number;
    (length * (heads / kv_heads.max(1)) * row + keys + meeting, batch * kv_heads)
}

/// An array `[batch, heads, positions, dim]`.
struct Along {
    batch: isize,
    heads: Heads,
}

impl Along {
    fn new(pointer: *mut u8, dtype: Dtype, strides: &[isize]) -> Along {
        Along { batch: strides[0], heads: Heads::new(pointer, dtype, &strides[1..]) }
    }

    /// All of `count` positions from `position` of a head.
    fn part(&self, batch: usize, head: usize, (position, count): (usize, usize), dim: usize) -> Part<'_> {
        Part { heads: &self.heads, base: batch as isize * self.batch, head, position, count, dim }
    }

    /// # Safety
    /// As for [`Heads::load`].
    #[inline(always)]
    unsafe fn load<V: Vector>(&self, batch: usize, head: usize, position: usize, out: &mut [f32]) {
        // SAFETY: promised by the caller.
        unsafe { self.heads.load::<V>(batch as isize * self.batch, head, position, out) }
    }

    /// # Safety
    /// As for [`Heads::store`].
    #[inline(always)]
    unsafe fn store<V: Vector>(&self, batch: usize, head: usize, position: usize, values: &[f32]) {
        // SAFETY: promised by the caller.
        unsafe { self.heads.store::<V>(batch as isize * self.batch, head, position, values) }
    }
}

struct Backward {
    isa: Isa,
    shape: BlockShape,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    length: usize,
    keys: usize,
    q: Along,
    k: Along,
    v: Along,
    out: Along,
    dout: Along,
    lse: Along,
    dq: Option<Along>,
    dk: Option<Along>,
    dv: Option<Along>,
    rule: Rule,
    /// Where the sinks' gradients of each sequence go, `[batch, heads]`.
    sinks: Option<Workspace>,
}

struct Units<P> {
    backward: Backward,
    kind: PhantomData<P>,
}

impl<P: Products<Operand: Stored>> Task for Units<P> {
    fn chunks(&self) -> usize {
        self.backward.batch * self.backward.kv_heads
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.backward.isa, Unit::<P> { task: &self.backward, chunk, scratch, kind: PhantomData });
    }

    fn name(&self) -> &'static str {
        "attention_backward"
    }
}

struct Unit<'a, P> {
    task: &'a Backward,
    chunk: usize,
    scratch: &'a Scratch,
    kind: PhantomData<P>,
}

/// What belongs to the rows of a unit, (query, head) by (query, head).
struct Rows<'a, P: Products> {
    total: usize,
    /// As operands, 2 · pairs values a row.
    q: &'a mut [P::Operand],
    dout: &'a mut [P::Operand],
    lse: &'a mut [f32],
    /// rowsum(dO∘O).
    dsum: &'a mut [f32],
    /// The keys that a row sees: first and past the last.
    ranges: &'a mut [usize],
    /// The sums of the gradients of the queries.
    dq: &'a mut [f32],
}

/// The keys and values of a block as panels, and the sums of their gradients.
struct Keys<'a, P: Products> {
    /// Keys as lanes, pairs along dimensions.
    keys: &'a mut [P::Stored],
    /// Values the same way.
    values: &'a mut [P::Stored],
    /// Dimensions as lanes, pairs along keys.
    across: &'a mut [P::Stored],
    /// Dimensions × [`STRIDE`] keys.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

/// What [`ROWS`] rows and a block make of each other.
struct Meeting<'a, P: Products> {
    q_turned: &'a mut [P::Operand],
    dout_turned: &'a mut [P::Operand],
    scores: &'a mut [f32],
    dweights: &'a mut [f32],
    slopes: &'a mut [f32],
    ds: &'a mut [P::Operand],
    weight_panels: &'a mut [P::Stored],
    ds_panels: &'a mut [P::Stored],
}

/// Sizes that follow from those of a head.
#[derive(Clone, Copy)]
struct Widths {
    keys: BlockShape,
    /// Values have the shape of keys of their own dimension, and the other way round.
    values: BlockShape,
    /// Values of a row of queries, and of gradients of the output, as operands.
    q: usize,
    dout: usize,
    /// Of a row of gradients of the queries.
    dq: usize,
}

impl Widths {
    fn new(keys: BlockShape) -> Widths {
        let values = BlockShape { key_dim: keys.value_dim, value_dim: keys.key_dim };
        let (q, dout) = (2 * keys.key_pairs(), 2 * values.key_pairs());
        Widths { keys, values, q, dout, dq: keys.key_dim.next_multiple_of(TILE) }
    }
}

impl<P: Products<Operand: Stored>> Kernel for Unit<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (task, scratch) = (self.task, self.scratch);
        let (batch, kv_head) = (self.chunk / task.kv_heads, self.chunk % task.kv_heads);
        let BlockShape { key_dim, value_dim } = task.shape;
        let widths = Widths::new(task.shape);
        let group = task.heads / task.kv_heads;
        let dsinks = scratch.take::<f32>(group);
        let mut rows = read_rows::<V, P>(task, (batch, kv_head), scratch, dsinks);
        let mut keys = Keys::<P> {
            keys: take::<P::Stored>(scratch, widths.keys.key_len()),
            values: take::<P::Stored>(scratch, widths.values.key_len()),
            across: take::<P::Stored>(scratch, widths.values.value_len()),
            dk: scratch.take::<f32>(key_dim * STRIDE),
            dv: scratch.take::<f32>(value_dim * STRIDE),
        };
        let mut meeting = Meeting::<P> {
            q_turned: take::<P::Operand>(scratch, key_dim * ROWS),
            dout_turned: take::<P::Operand>(scratch, value_dim * ROWS),
            scores: scratch.take::<f32>(ROWS * STRIDE),
            dweights: scratch.take::<f32>(ROWS * STRIDE),
            slopes: scratch.take::<f32>(2 * BLOCK),
            ds: take::<P::Operand>(scratch, ROWS * OPERANDS),
            weight_panels: take::<P::Stored>(scratch, ROWS * BLOCK),
            ds_panels: take::<P::Stored>(scratch, ROWS * BLOCK),
        };
        let turned = scratch.take::<f32>(TILE * key_dim.max(value_dim).next_multiple_of(TILE));
        for block in 0..task.keys.div_ceil(BLOCK) {
            let positions = (block * BLOCK, (task.keys - block * BLOCK).min(BLOCK));
            keys.dk.fill(0.0);
            keys.dv.fill(0.0);
            pack::<V, P>(task, (batch, kv_head), positions, &mut keys, scratch);
            for first in (0..rows.total).step_by(ROWS) {
                meet::<V, P>(task, (batch, kv_head), block, first, &mut rows, &mut keys, &mut meeting);
            }
            for (sums, to, dim) in [(&*keys.dk, &task.dk, key_dim), (&*keys.dv, &task.dv, value_dim)] {
                let Some(to) = to else { continue };
                let part = to.part(batch, kv_head, positions, dim);
                // SAFETY: the heads of this unit are written by this chunk alone; there are `dim` rows of sums.
                unsafe { Heads::store_turned::<V>(part, sums.as_ptr(), STRIDE, task.isa, turned) };
            }
        }
        if let Some(to) = &task.dq {
            for (row, sums) in rows.dq.chunks(widths.dq.max(1)).enumerate() {
                let (l, head) = (row / group, kv_head * group + row % group);
                // SAFETY: the rows of this unit are written by this chunk alone.
                unsafe { to.store::<V>(batch, head, l, &sums[..key_dim]) };
            }
        }
        if let Some(workspace) = task.sinks {
            for (g, &value) in dsinks.iter().enumerate() {
                // SAFETY: the workspace has a place for each head of each sequence.
                unsafe { *workspace.f32s(batch * task.heads + kv_head * group + g) = value };
            }
        }
    }
}

/// How many rows ahead memory is asked for.
const AHEAD: usize = 8;

/// Brings the rows of a unit into the order in which they are used.
#[inline(always)]
fn read_rows<'a, V: Vector, P: Products>(
    task: &Backward,
    (batch, kv_head): (usize, usize),
    scratch: &'a Scratch,
    dsinks: &mut [f32],
) -> Rows<'a, P> {
    let BlockShape { key_dim, value_dim } = task.shape;
    let widths = Widths::new(task.shape);
    let group = task.heads / task.kv_heads;
    let total = task.length * group;
    let rows = Rows::<P> {
        total,
        q: take::<P::Operand>(scratch, total * widths.q),
        dout: take::<P::Operand>(scratch, total * widths.dout),
        lse: scratch.take::<f32>(total),
        dsum: scratch.take::<f32>(total),
        ranges: scratch.take::<usize>(2 * total),
        dq: scratch.take::<f32>(total * widths.dq),
    };
    rows.dq.fill(0.0);
    dsinks.fill(0.0);
    let row = scratch.take::<f32>(widths.q.max(widths.dout));
    let other = scratch.take::<f32>(value_dim);
    let place = |row: usize| (row / group, kv_head * group + row % group);
    for i in 0..total {
        let (l, head) = place(i);
        let (next, next_head) = place((i + AHEAD).min(total - 1));
        for (array, dim) in [(&task.q, key_dim), (&task.dout, value_dim), (&task.out, value_dim)] {
            array.heads.prefetch(batch as isize * array.batch, next_head, next, dim);
        }
        // SAFETY: places are inside the checked shapes; operands have their sizes.
        unsafe {
            row.fill(0.0);
            task.q.load::<V>(batch, head, l, &mut row[..key_dim]);
            store_run::<V, P::Operand>(rows.q.as_mut_ptr().add(i * widths.q), 1, &row[..widths.q]);
            row.fill(0.0);
            task.dout.load::<V>(batch, head, l, &mut row[..value_dim]);
            store_run::<V, P::Operand>(rows.dout.as_mut_ptr().add(i * widths.dout), 1, &row[..widths.dout]);
            task.out.load::<V>(batch, head, l, other);
            task.lse.load::<V>(batch, head, l, &mut rows.lse[i..i + 1]);
        }
        let mut sum = V::zero();
        for (a, b) in row[..value_dim].chunks(TILE).zip(other.chunks(TILE)) {
            sum = V::from_slice(a, 0.0).mul_add(V::from_slice(b, 0.0), sum);
        }
        rows.dsum[i] = sum.sum();
        let position = task.keys as isize - task.length as isize + l as isize;
        let (low, high) = task.rule.range(batch, l, position, task.keys);
        rows.ranges[2 * i..2 * i + 2].copy_from_slice(&[low, high]);
        if let Some(sink) = task.rule.sink(head) {
            let weight = math::exp(V::splat(sink - rows.lse[i])).to_array()[0];
            let slot = &mut dsinks[i % group];
            *slot = (-weight).mul_add(rows.dsum[i], *slot);
        }
    }
    rows
}

/// Adds what [`ROWS`] rows from `first` on and the keys of a block are to each other's gradients.
#[inline(always)]
fn meet<V: Vector, P: Products<Operand: Stored>>(
    task: &Backward,
    (batch, kv_head): (usize, usize),
    block: usize,
    first: usize,
    rows: &mut Rows<P>,
    keys: &mut Keys<P>,
    meeting: &mut Meeting<P>,
) {
    let BlockShape { key_dim, value_dim } = task.shape;
    let widths = Widths::new(task.shape);
    let group = task.heads / task.kv_heads;
    let count = ROWS.min(rows.total - first);
    let base = block * BLOCK;
    let ranges = &rows.ranges[2 * first..2 * (first + count)];
    let within = |i: usize| {
        let clamped = |key: usize| key.clamp(base, base + BLOCK) - base;
        (clamped(ranges[2 * i]), clamped(ranges[2 * i + 1]))
    };
    let (mut low, mut high) = (BLOCK, 0);
    for (from, to) in (0..count).map(within) {
        if from < to {
            (low, high) = (low.min(from), high.max(to));
        }
    }
    if low >= high {
        return;
    }
    let tiles = step_tiles(low, high);
    let Meeting { q_turned, dout_turned, scores, dweights, slopes, ds, weight_panels, ds_panels } = meeting;
    let (q, dout) = (rows.q[first * widths.q..].as_ptr(), rows.dout[first * widths.dout..].as_ptr());
    // SAFETY: the operands of `count` rows are there; both turned sides have ROWS columns; the tiles lie inside the
    // block.
    unsafe {
        turn(task.isa, q, widths.q, (count, key_dim), q_turned.as_mut_ptr(), ROWS);
        turn(task.isa, dout, widths.dout, (count, value_dim), dout_turned.as_mut_ptr(), ROWS);
        product::<P>(
            task.isa,
            q,
            widths.q,
            count,
            keys.keys.as_ptr(),
            widths.q / 2 * PAIR,
            tiles.clone(),
            0..widths.q / 2,
            scores.as_mut_ptr(),
            STRIDE,
            false,
            &mut Ahead::none(),
        );
        product::<P>(
            task.isa,
            dout,
            widths.dout,
            count,
            keys.values.as_ptr(),
            widths.dout / 2 * PAIR,
            tiles.clone(),
            0..widths.dout / 2,
            dweights.as_mut_ptr(),
            STRIDE,
            false,
            &mut Ahead::none(),
        );
    }
    let (lse, dsum) = (&rows.lse[first..][..count], &rows.dsum[first..][..count]);
    for i in (0..count).step_by(2) {
        for j in i..(i + 2).min(count) {
            let (l, head) = ((first + j) / group, kv_head * group + (first + j) % group);
            let scores = &mut scores[j * STRIDE..][..BLOCK];
            if let Some(cap) = task.rule.soft_cap {
                let slopes = &mut slopes[(j - i) * BLOCK..][..BLOCK];
                for tile in tiles.clone() {
                    let part = tile * TILE..(tile + 1) * TILE;
                    let x = V::from_slice(&scores[part.clone()], 0.0) * V::splat(task.rule.scale);
                    let t = math::tanh(x / V::splat(cap));
                    t.neg_mul_add(t, V::splat(1.0)).to_slice(&mut slopes[part]);
                }
            }
            task.rule.scores::<V>(scores, tiles.clone(), within(j), [batch, head, l, block]);
        }
        let two = i + 1 < count;
        let row = |j: usize| {
            let row = i + if two { j } else { 0 };
            // A row that sees nothing has scores of -∞, whose weights are zero beside any number.
            let lse = if lse[row] == f32::NEG_INFINITY { 0.0 } else { lse[row] };
            (row, V::splat(lse), V::splat(dsum[row]))
        };
        let rows = [row(0), row(1)];
        let scale = V::splat(task.rule.scale);
        for tile in tiles.clone() {
            let at = tile * TILE;
            let (mut weight, mut gradient) = ([V::zero(); 2], [V::zero(); 2]);
            for (j, (row, lse, dsum)) in rows.into_iter().enumerate() {
                if j == 1 && !two {
                    continue;
                }
                // SAFETY: rows have a place for each key of the block.
                unsafe {
                    let place = row * STRIDE + at;
                    let (score, up) =
                        (V::load(scores.as_ptr().add(place)), V::load(dweights.as_ptr().add(place)));
                    weight[j] = math::exp_to_one(score - lse);
                    gradient[j] = weight[j] * (up - dsum) * scale;
                    if task.rule.soft_cap.is_some() {
                        gradient[j] = gradient[j] * V::load(slopes.as_ptr().add(j * BLOCK + at));
                    }
                    P::store_weight(gradient[j], ds.as_mut_ptr().add(row * OPERANDS + at));
                }
            }
            // SAFETY: panels of ROWS / 2 pairs for 16 tiles.
            unsafe {
                let to = (tile * (ROWS / 2) + i / 2) * PAIR;
                P::store_pair(weight[0], weight[1], weight_panels.as_mut_ptr().add(to));
                P::store_pair(gradient[0], gradient[1], ds_panels.as_mut_ptr().add(to));
            }
        }
    }
    // SAFETY: panels and ds were written for the tiles and rows that are read; sums have their sizes.
    unsafe {
        let pairs = 0..count.div_ceil(2);
        product::<P>(
            task.isa,
            dout_turned.as_ptr(),
            ROWS,
            value_dim,
            weight_panels.as_ptr(),
            ROWS / 2 * PAIR,
            tiles.clone(),
            pairs.clone(),
            keys.dv.as_mut_ptr(),
            STRIDE,
            true,
            &mut Ahead::none(),
        );
        product::<P>(
            task.isa,
            q_turned.as_ptr(),
            ROWS,
            key_dim,
            ds_panels.as_ptr(),
            ROWS / 2 * PAIR,
            tiles.clone(),
            pairs,
            keys.dk.as_mut_ptr(),
            STRIDE,
            true,
            &mut Ahead::none(),
        );
        product::<P>(
            task.isa,
            ds.as_ptr(),
            OPERANDS,
            count,
            keys.across.as_ptr(),
            BLOCK * TILE,
            0..widths.dq / TILE,
            tiles.start * TILE / 2..tiles.end * TILE / 2,
            rows.dq[first * widths.dq..].as_mut_ptr(),
            widths.dq,
            true,
            &mut Ahead::none(),
        );
    }
}

/// Brings the keys and values of a block into panels; keys past the end are zeros.
#[inline(always)]
fn pack<V: Vector, P: Products>(
    task: &Backward,
    (batch, kv_head): (usize, usize),
    positions: (usize, usize),
    panels: &mut Keys<P>,
    scratch: &Scratch,
) {
    let widths = Widths::new(task.shape);
    let keys = task.k.part(batch, kv_head, positions, task.shape.key_dim);
    let values = task.v.part(batch, kv_head, positions, task.shape.value_dim);
    // SAFETY: the positions are inside the arrays; panels have room for a whole block.
    unsafe {
        keys.lanes::<V, P::Stored>(task.isa, BLOCK, widths.q / 2, panels.keys.as_mut_ptr(), scratch);
        keys.steps::<V, P::Stored>(task.isa, BLOCK, BLOCK / 2, panels.across.as_mut_ptr(), scratch);
        values.lanes::<V, P::Stored>(task.isa, BLOCK, widths.dout / 2, panels.values.as_mut_ptr(), scratch);
    }
}

/// Adds the sequences' gradients of the sinks, ascending.
struct SumSinks {
    workspace: Workspace,
    batch: usize,
    heads: usize,
    out: DynViewMut,
}

impl Task for SumSinks {
    fn chunks(&self) -> usize {
        1
    }

    fn run(&self, _: usize, _: &mut Scratch) {
        for head in 0..self.heads {
            let mut sum = 0.0;
            for batch in 0..self.batch {
                // SAFETY: written by the task before.
                sum += unsafe { *self.workspace.f32s(batch * self.heads + head) };
            }
            // SAFETY: the shape was checked to be [heads].
            unsafe { *self.out.pointer.cast::<f32>().offset(head as isize * self.out.strides[0]) = sum };
        }
    }

    fn name(&self) -> &'static str {
        "attention_backward_sinks"
    }
}

#[cfg(test)]
#[path = "backward_tests.rs"]
mod tests;
