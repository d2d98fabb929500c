//! Tangents of moves, which are linear: the same move of the tangent.

use smallvec::smallvec;

use crate::op::Op;
use crate::ops::{Jvp, Tangents};
use crate::{Array, Result};

pub(crate) fn reshape(rule: &Jvp) -> Result<Tangents> {
    rule.linear(0, |tangent| tangent.reshape_to(rule.output.shape()))
}

/// An op with one input that says all about the move itself.
pub(crate) fn moved(op: &Op, rule: &Jvp) -> Result<Tangents> {
    rule.linear(0, |tangent| {
        let output = rule.output;
        Ok(Array::lazy(op.clone(), smallvec![tangent.clone()], output.shape(), output.dtype()))
    })
}

/// An op that puts inputs together: tangents that are not there are zeros.
pub(crate) fn joined(op: &Op, rule: &Jvp) -> Result<Tangents> {
    let output = rule.output;
    let tangents = (0..rule.inputs.len()).map(|input| rule.tangent(input)).collect();
    rule.one(Array::lazy(op.clone(), tangents, output.shape(), output.dtype()))
}
