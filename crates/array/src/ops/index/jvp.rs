//! Tangents of gathers and scatters, which are linear in what they move.

use smallvec::smallvec;

use crate::node::Inputs;
use crate::op::{Op, ScatterOp};
use crate::ops::{Jvp, Tangents};
use crate::{Array, Error, Result};

/// Inputs: the array, then index arrays.
pub(crate) fn gathered(op: &Op, rule: &Jvp) -> Result<Tangents> {
    let output = rule.output;
    rule.linear(0, |tangent| {
        let mut inputs: Inputs = smallvec![tangent.clone()];
        inputs.extend(rule.inputs[1..].iter().cloned());
        Ok(Array::lazy(op.clone(), inputs, output.shape(), output.dtype()))
    })
}

/// A scatter into an array: `parts` are the inputs that are joined, the array and its updates. The others are
/// indices.
pub(crate) fn joined(op: &Op, how: ScatterOp, parts: [usize; 2], rule: &Jvp) -> Result<Tangents> {
    if !matches!(how, ScatterOp::Set | ScatterOp::Add) {
        let what = "products and extremes have no tangents: compute them with a reduction and set the result";
        return Err(Error::unsupported(op.name(), what));
    }
    // Both are linear in the two together.
    let mut inputs: Inputs = rule.inputs.into();
    for part in parts {
        inputs[part] = rule.tangent(part);
    }
    rule.one(Array::lazy(op.clone(), inputs, rule.output.shape(), rule.output.dtype()))
}

/// Inputs: the indices, the updates.
pub(crate) fn scattered(op: &Op, rule: &Jvp) -> Result<Tangents> {
    let output = rule.output;
    rule.linear(1, |tangent| {
        let inputs = smallvec![rule.inputs[0].clone(), tangent.clone()];
        Ok(Array::lazy(op.clone(), inputs, output.shape(), output.dtype()))
    })
}
