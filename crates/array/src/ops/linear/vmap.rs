//! Products for a batch of examples. A weight that all examples share multiplies all their rows at
//! once; packed weights are always shared.

use smallvec::smallvec;

use crate::dtype::promote;
use crate::op::{Op, Precision};
use crate::ops::Vmap;
use crate::shape::Shape;
use crate::{Array, Result};

pub(crate) fn matmul(precision: Precision, rule: &Vmap) -> Result<Array> {
    let op = Op::Matmul { precision };
    if rule.batched[1] || rule.inputs[1].rank() != 2 {
        return rule.build(op, rule.all()?);
    }
    let (a, b) = (&rule.inputs[0], &rule.inputs[1]);
    let rows = a.flatten_axes(0, 1)?;
    rows.matmul_with(b, precision)?.unflatten(0, &[a.shape()[0] as i64, a.shape()[1] as i64])
}

/// Both as [batch, rows, width] and [batch, out, in], for a weight that differs.
fn per_example(rule: &Vmap) -> Result<(Array, Array)> {
    let (x, weight) = (rule.full(0)?, &rule.inputs[1]);
    let dtype = promote(x.dtype(), weight.dtype());
    let rows: usize = x.shape()[1..x.rank() - 1].iter().product();
    let shape: Shape = smallvec![rule.size, rows, x.dim(-1)];
    Ok((x.reshape_to(&shape)?.astype(dtype)?, weight.astype(dtype)?))
}

pub(crate) fn linear(precision: Precision, rule: &Vmap) -> Result<Array> {
    if !rule.batched[1] {
        let inputs = smallvec![rule.inputs[0].contiguous()?, rule.inputs[1].clone()];
        return rule.build(Op::Linear { precision }, inputs);
    }
    let (x, weight) = per_example(rule)?;
    let y = x.matmul_with(&weight.swap_axes(-1, -2)?, precision)?.astype(rule.dtype())?;
    y.reshape_to(&rule.with_batch(rule.node.shape()))
}

pub(crate) fn linear_transposed(precision: Precision, rule: &Vmap) -> Result<Array> {
    if !rule.batched[1] {
        let inputs = smallvec![rule.inputs[0].contiguous()?, rule.inputs[1].clone()];
        return rule.build(Op::LinearTransposed { precision }, inputs);
    }
    let (y, weight) = per_example(rule)?;
    let x = y.matmul_with(&weight, precision)?.astype(rule.dtype())?;
    x.reshape_to(&rule.with_batch(rule.node.shape()))
}

pub(crate) fn embedding(rule: &Vmap) -> Result<Array> {
    let (weight, indices) = (&rule.inputs[0], &rule.inputs[1]);
    if !rule.batched[0] {
        return rule.build(Op::Embedding, rule.inputs.into());
    }
    if !rule.batched[1] {
        return weight.take(indices, 1)?.astype(rule.dtype());
    }
    let rows = weight.flatten_axes(0, 1)?;
    let rows = rows.take(&crate::ops::index::vmap::offset(indices, weight.dim(1))?, 0)?;
    rows.astype(rule.dtype())
}
