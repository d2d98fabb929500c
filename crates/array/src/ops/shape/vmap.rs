//! Moves for a batch of examples.

use smallvec::{SmallVec, smallvec};

use crate::op::{Axes, Op};
use crate::ops::Vmap;
use crate::shape::Shape;
use crate::{Array, Result};

pub(crate) fn reshape(rule: &Vmap) -> Result<Array> {
    rule.inputs[0].reshape_to(&rule.with_batch(rule.node.shape()))
}

pub(crate) fn transpose(order: &Axes, rule: &Vmap) -> Result<Array> {
    let mut full: Axes = smallvec![0];
    full.extend(order.iter().map(|axis| axis + 1));
    rule.build(Op::Transpose(full), rule.inputs.into())
}

pub(crate) fn broadcast(rule: &Vmap) -> Result<Array> {
    let (example, to) = (rule.example(0), rule.node.shape());
    let mut shape: Shape = smallvec![rule.size];
    shape.extend(std::iter::repeat_n(1, to.len() - example.len()));
    shape.extend_from_slice(example);
    rule.inputs[0].reshape_to(&shape)?.broadcast_to(&rule.with_batch(to))
}

fn with_batch(start: &[usize], step: &[isize]) -> (SmallVec<[usize; 4]>, SmallVec<[isize; 4]>) {
    let (mut starts, mut steps): (SmallVec<[usize; 4]>, SmallVec<[isize; 4]>) = (smallvec![0], smallvec![1]);
    starts.extend_from_slice(start);
    steps.extend_from_slice(step);
    (starts, steps)
}

pub(crate) fn slice(start: &[usize], step: &[isize], rule: &Vmap) -> Result<Array> {
    let (start, step) = with_batch(start, step);
    rule.build(Op::Slice { start, step }, rule.inputs.into())
}

pub(crate) fn slice_update(start: &[usize], step: &[isize], rule: &Vmap) -> Result<Array> {
    let (start, step) = with_batch(start, step);
    rule.build(Op::SliceUpdate { start, step }, rule.all()?)
}
