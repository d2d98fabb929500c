//! The backward pass, from the log-sum-exp that the forward pass saved.
//!
//! With P = exp(S - lse), D = rowsum(dO∘O) and dS = P∘(dO·Vᵀ - D)·scale:
//! dV = Pᵀ·dO, dK = dSᵀ·Q, dQ = dS·K (Dao 2023, algorithm 2).
//!
//! One chunk is one KV head of one sequence with all heads of its group inside, so sums over
//! queries need no atomics and have one order: blocks of [`ROWS`] (query, head) rows ascending; in
//! each, key blocks ascending. dK and dV are summed transposed (dimensions × keys), because then
//! P and dS are written as panels with pairs along rows, straight from the registers in which they
//! were computed, and nothing large is transposed.

use std::marker::PhantomData;

use mica_simd::{Element, Isa, Kernel, Vector, dispatch, math};
use mica_threads::{Scratch, Task};

use super::block::{BLOCK, BlockShape, PAIR, STEP, TILE, step_tiles};
use super::forward::{Sizes, sizes, take};
use super::heads::{Heads, Part, turn};
use super::product::{Halves, Products, Single, product};
use super::{Precision, Rule};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::check_output;
use crate::error::KernelError;
use crate::plan::{Plan, Workspace};
use crate::rows::{check_float, check_shape, store_run};

/// Rows that go through the key blocks together: their products with a block stay in the second
/// cache beside the block (measured on 2 MB; 1 MB holds them too).
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
        match precision {
            Precision::Bf16 => list.push(Box::new(Units::<Halves> { backward, kind: PhantomData })),
            Precision::Exact => list.push(Box::new(Units::<Single> { backward, kind: PhantomData })),
        }
        if let Some(out) = dsinks {
            list.push(Box::new(SumSinks { workspace, batch, heads, out }));
        }
    }))
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

impl<P: Products<Operand = <P as Products>::Stored>> Task for Units<P> {
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

/// The keys and values of a unit as panels, and the sums of their gradients.
struct Blocks<'a, P: Products> {
    /// Per block: keys as lanes, pairs along dimensions.
    keys: &'a mut [P::Stored],
    /// Per block: values the same way.
    values: &'a mut [P::Stored],
    /// Per block: dimensions as lanes, pairs along keys.
    across: &'a mut [P::Stored],
    /// Per block: dimensions × [`STRIDE`] keys.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl<P: Products<Operand = <P as Products>::Stored>> Kernel for Unit<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (task, scratch) = (self.task, self.scratch);
        let (batch, kv_head) = (self.chunk / task.kv_heads, self.chunk % task.kv_heads);
        let BlockShape { key_dim, value_dim } = task.shape;
        let group = task.heads / task.kv_heads;
        let blocks = task.keys.div_ceil(BLOCK);
        // Values have the shape of keys of their own dimension, and the other way round.
        let turned = BlockShape { key_dim: value_dim, value_dim: key_dim };
        let (key_len, value_len) = (task.shape.key_len(), turned.key_len());
        let across_len = turned.value_len();
        let mut panels = Blocks::<P> {
            keys: take::<P::Stored>(scratch, blocks * key_len),
            values: take::<P::Stored>(scratch, blocks * value_len),
            across: take::<P::Stored>(scratch, blocks * across_len),
            dk: scratch.take::<f32>(blocks * key_dim * STRIDE),
            dv: scratch.take::<f32>(blocks * value_dim * STRIDE),
        };
        panels.dk.fill(0.0);
        panels.dv.fill(0.0);
        pack::<V, P>(task, batch, kv_head, &mut panels, scratch);

        let (key_pairs, value_pairs) = (task.shape.key_pairs(), turned.key_pairs());
        let dq_width = key_dim.next_multiple_of(TILE);
        // A block of rows: as operands, and transposed as operands.
        let q = take::<P::Operand>(scratch, ROWS * 2 * key_pairs);
        let dout = take::<P::Operand>(scratch, ROWS * 2 * value_pairs);
        let q_turned = take::<P::Operand>(scratch, key_dim * ROWS);
        let dout_turned = take::<P::Operand>(scratch, value_dim * ROWS);
        let scores = scratch.take::<f32>(ROWS * STRIDE);
        let dweights = scratch.take::<f32>(ROWS * STRIDE);
        let slopes = scratch.take::<f32>(2 * BLOCK);
        let ds = take::<P::Operand>(scratch, ROWS * OPERANDS);
        let weight_panels = take::<P::Stored>(scratch, ROWS * BLOCK);
        let ds_panels = take::<P::Stored>(scratch, ROWS * BLOCK);
        let dq = scratch.take::<f32>(ROWS * dq_width);
        let row = scratch.take::<f32>(2 * key_pairs.max(value_pairs));
        let other = scratch.take::<f32>(value_dim);
        let dsinks = scratch.take::<f32>(group);
        dsinks.fill(0.0);

        let total = task.length * group;
        for first in (0..total).step_by(ROWS) {
            let count = ROWS.min(total - first);
            let place = |i: usize| ((first + i) / group, kv_head * group + (first + i) % group);
            let (mut ranges, mut lse, mut dsum) = ([(0, 0); ROWS], [0f32; ROWS], [0f32; ROWS]);
            dq.fill(0.0);
            for i in 0..count {
                let (l, head) = place(i);
                // SAFETY: places are inside the checked shapes; operands have their sizes.
                unsafe {
                    row.fill(0.0);
                    task.q.load::<V>(batch, head, l, &mut row[..key_dim]);
                    let to = q.as_mut_ptr().add(i * 2 * key_pairs);
                    store_run::<V, P::Operand>(to, 1, &row[..2 * key_pairs]);
                    row.fill(0.0);
                    task.dout.load::<V>(batch, head, l, &mut row[..value_dim]);
                    let to = dout.as_mut_ptr().add(i * 2 * value_pairs);
                    store_run::<V, P::Operand>(to, 1, &row[..2 * value_pairs]);
                    task.out.load::<V>(batch, head, l, other);
                    task.lse.load::<V>(batch, head, l, &mut lse[i..i + 1]);
                }
                let mut sum = V::zero();
                for (a, b) in row[..value_dim].chunks(TILE).zip(other.chunks(TILE)) {
                    sum = V::from_slice(a, 0.0).mul_add(V::from_slice(b, 0.0), sum);
                }
                dsum[i] = sum.sum();
                let position = task.keys as isize - task.length as isize + l as isize;
                ranges[i] = task.rule.range(batch, l, position, task.keys);
                if let Some(sink) = task.rule.sink(head) {
                    let weight = math::exp(V::splat(sink - lse[i])).to_array()[0];
                    let slot = &mut dsinks[(first + i) % group];
                    *slot = (-weight).mul_add(dsum[i], *slot);
                }
            }
            // SAFETY: the operands of `count` rows were just written; both turned sides have ROWS columns.
            unsafe {
                let (isa, q, dout) = (task.isa, q.as_ptr(), dout.as_ptr());
                turn(isa, q, 2 * key_pairs, (count, key_dim), q_turned.as_mut_ptr(), ROWS);
                turn(isa, dout, 2 * value_pairs, (count, value_dim), dout_turned.as_mut_ptr(), ROWS);
            }
            for block in 0..blocks {
                let base = block * BLOCK;
                let within = |(low, high): (usize, usize)| {
                    (low.clamp(base, base + BLOCK) - base, high.clamp(base, base + BLOCK) - base)
                };
                let (mut low, mut high) = (BLOCK, 0);
                for &range in &ranges[..count] {
                    let (from, to) = within(range);
                    if from < to {
                        (low, high) = (low.min(from), high.max(to));
                    }
                }
                if low >= high {
                    continue;
                }
                let tiles = step_tiles(low, high);
                // SAFETY: sizes as declared above; the tiles lie inside the block.
                unsafe {
                    product::<P>(
                        task.isa,
                        q.as_ptr(),
                        2 * key_pairs,
                        count,
                        panels.keys.as_ptr().add(block * key_len),
                        key_pairs * PAIR,
                        tiles.clone(),
                        0..key_pairs,
                        scores.as_mut_ptr(),
                        STRIDE,
                        false,
                    );
                    product::<P>(
                        task.isa,
                        dout.as_ptr(),
                        2 * value_pairs,
                        count,
                        panels.values.as_ptr().add(block * value_len),
                        value_pairs * PAIR,
                        tiles.clone(),
                        0..value_pairs,
                        dweights.as_mut_ptr(),
                        STRIDE,
                        false,
                    );
                }
                for i in (0..count).step_by(2) {
                    for j in i..(i + 2).min(count) {
                        let (l, head) = place(j);
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
                        task.rule.scores::<V>(
                            scores,
                            tiles.clone(),
                            within(ranges[j]),
                            [batch, head, l, block],
                        );
                    }
                    for tile in tiles.clone() {
                        let at = tile * TILE;
                        let (mut weight, mut gradient) = ([V::zero(); 2], [V::zero(); 2]);
                        for j in 0..2.min(count - i) {
                            let row = i + j;
                            if lse[row] == f32::NEG_INFINITY {
                                // SAFETY: the row has a place for each key of the block.
                                unsafe {
                                    P::Operand::store(V::zero(), ds.as_mut_ptr().add(row * OPERANDS + at))
                                };
                                continue;
                            }
                            let score = V::from_slice(&scores[row * STRIDE + at..][..TILE], 0.0);
                            let up = V::from_slice(&dweights[row * STRIDE + at..][..TILE], 0.0);
                            weight[j] = math::exp(score - V::splat(lse[row]));
                            let mut value =
                                weight[j] * (up - V::splat(dsum[row])) * V::splat(task.rule.scale);
                            if task.rule.soft_cap.is_some() {
                                value = value * V::from_slice(&slopes[j * BLOCK + at..][..TILE], 0.0);
                            }
                            gradient[j] = value;
                            // SAFETY: as above.
                            unsafe { P::Operand::store(value, ds.as_mut_ptr().add(row * OPERANDS + at)) };
                        }
                        // SAFETY: panels of ROWS / 2 pairs for 16 tiles.
                        unsafe {
                            let to = (tile * (ROWS / 2) + i / 2) * PAIR;
                            P::store_pair(weight[0], weight[1], weight_panels.as_mut_ptr().add(to));
                            P::store_pair(gradient[0], gradient[1], ds_panels.as_mut_ptr().add(to));
                        }
                    }
                }
                // SAFETY: sizes as declared above; panels and ds were written for the tiles and
                // rows that are read.
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
                        panels.dv.as_mut_ptr().add(block * value_dim * STRIDE),
                        STRIDE,
                        true,
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
                        panels.dk.as_mut_ptr().add(block * key_dim * STRIDE),
                        STRIDE,
                        true,
                    );
                    product::<P>(
                        task.isa,
                        ds.as_ptr(),
                        OPERANDS,
                        count,
                        panels.across.as_ptr().add(block * across_len),
                        BLOCK * TILE,
                        0..dq_width / TILE,
                        tiles.start * TILE / 2..tiles.end * TILE / 2,
                        dq.as_mut_ptr(),
                        dq_width,
                        true,
                    );
                }
            }
            for i in 0..count {
                let (l, head) = place(i);
                if let Some(to) = &task.dq {
                    // SAFETY: the rows of this unit are written by this chunk alone.
                    unsafe { to.store::<V>(batch, head, l, &dq[i * dq_width..][..key_dim]) };
                }
            }
        }
        for block in 0..blocks {
            let positions = (block * BLOCK, (task.keys - block * BLOCK).min(BLOCK));
            for (sums, to, dim) in [(&*panels.dk, &task.dk, key_dim), (&*panels.dv, &task.dv, value_dim)] {
                let Some(to) = to else { continue };
                let part = to.part(batch, kv_head, positions, dim);
                let sums = sums[block * dim * STRIDE..].as_ptr();
                // SAFETY: as above; a block has `dim` rows of sums.
                unsafe { Heads::store_turned::<V>(part, sums, STRIDE, task.isa, scratch) };
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

/// Brings the keys and values of a unit into panels; keys past the end are zeros.
#[inline(always)]
fn pack<V: Vector, P: Products>(
    task: &Backward,
    batch: usize,
    kv_head: usize,
    panels: &mut Blocks<P>,
    scratch: &Scratch,
) {
    let BlockShape { key_dim, value_dim } = task.shape;
    let turned = BlockShape { key_dim: value_dim, value_dim: key_dim };
    for first in (0..task.keys).step_by(BLOCK) {
        let (block, positions) = (first / BLOCK, (first, (task.keys - first).min(BLOCK)));
        let keys = task.k.part(batch, kv_head, positions, key_dim);
        let values = task.v.part(batch, kv_head, positions, value_dim);
        // SAFETY: the positions are inside the arrays; panels have room for whole blocks.
        unsafe {
            let to = panels.keys.as_mut_ptr().add(block * task.shape.key_len());
            keys.lanes::<V, P::Stored>(task.isa, BLOCK, task.shape.key_pairs(), to, scratch);
            let to = panels.across.as_mut_ptr().add(block * turned.value_len());
            keys.steps::<V, P::Stored>(task.isa, BLOCK, BLOCK / 2, to, scratch);
            let to = panels.values.as_mut_ptr().add(block * turned.key_len());
            values.lanes::<V, P::Stored>(task.isa, BLOCK, turned.key_pairs(), to, scratch);
        }
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
