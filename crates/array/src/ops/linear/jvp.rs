//! Tangents of products, which are linear in each factor.

use crate::Result;
use crate::op::Precision;
use crate::ops::{Jvp, Tangents};
use crate::{Array, Error};

pub(crate) fn matmul(precision: Precision, rule: &Jvp) -> Result<Tangents> {
    rule.sum(|index, tangent| match index {
        0 => tangent.matmul_with(&rule.inputs[1], precision),
        _ => rule.inputs[0].matmul_with(tangent, precision),
    })
}

pub(crate) fn linear(precision: Precision, rule: &Jvp) -> Result<Tangents> {
    rule.sum(|index, tangent| match index {
        0 => tangent.linear(&rule.inputs[1], None, super::training(precision)),
        _ => rule.inputs[0].linear(tangent, None, super::training(precision)),
    })
}

pub(crate) fn linear_transposed(precision: Precision, rule: &Jvp) -> Result<Tangents> {
    rule.sum(|index, tangent| match index {
        0 => tangent.linear_transposed(&rule.inputs[1], super::training(precision)),
        _ => rule.inputs[0].linear_transposed(tangent, super::training(precision)),
    })
}

pub(crate) fn embedding(rule: &Jvp) -> Result<Tangents> {
    rule.linear(0, |tangent| Array::embedding(tangent, &rule.inputs[1], rule.output.dtype()))
}

/// Tangents are arrays, and a packed weight is none.
pub(crate) fn dequantize(rule: &Jvp) -> Result<Tangents> {
    Err(Error::unsupported(
        "dequantize",
        format!("a packed weight is frozen and has no tangent; got {:?}", rule.inputs[0]),
    ))
}
