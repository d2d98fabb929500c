//! Gathers and scatters for a batch of examples.

use smallvec::smallvec;

use crate::op::{Axes, Op, ScatterOp};
use crate::ops::Vmap;
use crate::shape::Shape;
use crate::transforms::move_axis;
use crate::{Array, Dtype, Result};

/// Indices [batch, ..] of each example into an axis of `count`, as indices into the axes of all
/// examples one after another. An index that is out of range stays within its example.
pub(crate) fn offset(indices: &Array, count: usize) -> Result<Array> {
    let indices = indices.astype(Dtype::I64)?;
    let count = count as i64;
    let positive = Array::select(&indices.less(0)?, &indices.add(count)?, &indices)?;
    let inside = positive.maximum(0)?.minimum((count - 1).max(0))?;
    let size = indices.dim(0);
    let mut shape: Shape = smallvec![1; indices.rank()];
    shape[0] = size;
    let first = Array::arange(0.0, size as f64, 1.0, Dtype::I64)?.multiply(count)?.reshape_to(&shape)?;
    inside.add(first)
}

pub(crate) fn take(axis: usize, rule: &Vmap) -> Result<Array> {
    let (x, indices) = (&rule.inputs[0], &rule.inputs[1]);
    match (rule.batched[0], rule.batched[1]) {
        (true, false) => x.take(indices, axis as i32 + 1),
        // The indices' batch lands where the axis was.
        (false, _) => move_axis(&x.take(indices, axis as i32)?, axis, 0),
        (true, true) => {
            let rank = indices.rank() - 1;
            let count = x.shape()[axis + 1];
            // [batch, n, before.., after..], then all examples' slices one after another.
            let rows = move_axis(x, axis + 1, 1)?.flatten_axes(0, 1)?;
            let taken = rows.take(&offset(indices, count)?, 0)?;
            // [batch, indices.., before.., after..]: the indices belong behind what is before.
            moved_block(&taken, 1..1 + rank, 1 + axis)
        }
    }
}

/// A run of dimensions moved to where it then begins.
fn moved_block(array: &Array, block: std::ops::Range<usize>, to: usize) -> Result<Array> {
    let mut order: Vec<i32> = (0..array.rank() as i32).collect();
    let moved: Vec<i32> = order.drain(block).collect();
    order.splice(to..to, moved);
    array.transpose(&order)
}

pub(crate) fn scatter_add(axis: usize, rule: &Vmap) -> Result<Array> {
    let indices = &rule.inputs[0];
    let updates = rule.full(1)?;
    if !rule.batched[0] {
        return rule.build(Op::ScatterAdd { axis: axis + 1 }, smallvec![indices.clone(), updates]);
    }
    let rank = indices.rank() - 1;
    let count = rule.node.shape()[axis];
    // Updates [batch, before.., indices.., after..]: the indices to the batch, whose examples'
    // slices then stand one after another.
    let updates = moved_block(&updates, 1 + axis..1 + axis + rank, 1)?;
    let all = Array::scatter_add(&updates, &offset(indices, count)?, 0, rule.size * count)?;
    move_axis(&all.unflatten(0, &[rule.size as i64, count as i64])?, 1, axis + 1)
}

/// The index arrays from input `first` on, of which each example has its own, for a gather or scatter over all
/// examples: each with the batch in front of the dimensions that they have together, and one that counts examples.
/// Gives also how many dimensions those are.
fn places(first: usize, rule: &Vmap) -> Result<(Vec<Array>, usize)> {
    let rank = (first..rule.inputs.len()).map(|input| rule.example(input).len()).max().unwrap_or(0);
    let spread = |array: &Array, batch: usize, example: &[usize]| {
        let mut shape: Shape = smallvec![batch];
        shape.resize(1 + rank - example.len(), 1);
        shape.extend_from_slice(example);
        array.reshape_to(&shape)
    };
    let mut all = vec![spread(&Array::arange(0.0, rule.size as f64, 1.0, Dtype::I64)?, rule.size, &[])?];
    for input in first..rule.inputs.len() {
        let batch = if rule.batched[input] { rule.size } else { 1 };
        all.push(spread(&rule.inputs[input], batch, rule.example(input))?);
    }
    Ok((all, rank))
}

/// The batch as an axis that is indexed too, in front of the others.
fn with_batch_axis(axes: &Axes) -> Axes {
    std::iter::once(0).chain(axes.iter().map(|axis| axis + 1)).collect()
}

pub(crate) fn gather(axes: &Axes, slice: &Shape, rule: &Vmap) -> Result<Array> {
    let (places, rank) = places(1, rule)?;
    let mut with_batch: Shape = smallvec![1];
    with_batch.extend_from_slice(slice);
    if !rule.batched[0] {
        // All examples read one array.
        let places: Vec<&Array> = places[1..].iter().collect();
        return rule.inputs[0].gather(&places, axes, slice);
    }
    let places: Vec<&Array> = places.iter().collect();
    // [batch, indices.., 1, slice..]
    rule.inputs[0].gather(&places, &with_batch_axis(axes), &with_batch)?.squeeze(&[1 + rank as i32])
}

pub(crate) fn scatter(op: ScatterOp, axes: &Axes, rule: &Vmap) -> Result<Array> {
    let (places, rank) = places(2, rule)?;
    let places: Vec<&Array> = places.iter().collect();
    let updates = rule.full(1)?.expand_dims(&[1 + rank as i32])?;
    rule.full(0)?.scatter(op, &places, &with_batch_axis(axes), &updates)
}
