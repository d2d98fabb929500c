//! Tangents of gathers and scatters, which are linear in what they move.

use smallvec::smallvec;

use crate::op::Op;
use crate::ops::{Jvp, Tangents};
use crate::{Array, Result};

/// Inputs: the array, the indices.
pub(crate) fn gathered(op: &Op, rule: &Jvp) -> Result<Tangents> {
    let output = rule.output;
    rule.linear(0, |tangent| {
        let inputs = smallvec![tangent.clone(), rule.inputs[1].clone()];
        Ok(Array::lazy(op.clone(), inputs, output.shape(), output.dtype()))
    })
}

/// Inputs: the indices, the updates.
pub(crate) fn scattered(op: &Op, rule: &Jvp) -> Result<Tangents> {
    let output = rule.output;
    rule.linear(1, |tangent| {
        let inputs = smallvec![rule.inputs[0].clone(), tangent.clone()];
        Ok(Array::lazy(op.clone(), inputs, output.shape(), output.dtype()))
    })
}
