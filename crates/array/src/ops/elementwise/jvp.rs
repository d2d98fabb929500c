//! Tangents of elementwise ops. Their Jacobian is diagonal, hence its own transpose: the rules are
//! those of the gradients, with a tangent in place of a cotangent.

use super::{binary_vjp, unary_vjp};
use crate::op::{BinaryOp, UnaryOp};
use crate::ops::{Jvp, Tangents, Vjp};
use crate::{Array, Dtype, Result};

pub(crate) fn unary(op: UnaryOp, rule: &Jvp) -> Result<Tangents> {
    if op == UnaryOp::Abs && rule.output.dtype() == Dtype::C64 {
        // Not analytic: d|z| = Re(conj(z / |z|) dz).
        return rule.linear(0, |tangent| {
            let along = rule.inputs[0].sign()?.conjugate()?.multiply(tangent)?;
            along.real()?.astype(Dtype::C64)
        });
    }
    let pushed = Vjp {
        inputs: rule.inputs,
        output: rule.output,
        saved_outputs: &[],
        cotangents: rule.tangents,
        needs: &[true],
    };
    let mut parts = unary_vjp(op, &pushed)?;
    rule.sum_of(parts.iter_mut().map(Option::take))
}

pub(crate) fn binary(op: BinaryOp, rule: &Jvp) -> Result<Tangents> {
    let part = |index: usize| -> Result<Option<Array>> {
        let Some(tangent) = &rule.tangents[index] else { return Ok(None) };
        let pushed = Vjp {
            inputs: rule.inputs,
            output: rule.output,
            saved_outputs: &[],
            cotangents: &[Some(tangent.clone())],
            needs: &[index == 0, index == 1],
        };
        Ok(binary_vjp(op, &pushed)?[index].take())
    };
    rule.sum_of([part(0)?, part(1)?].into_iter())
}

pub(crate) fn select(rule: &Jvp) -> Result<Tangents> {
    if rule.tangents[1].is_none() && rule.tangents[2].is_none() {
        return rule.none();
    }
    rule.one(Array::select(&rule.inputs[0], &rule.tangent(1), rule.tangent(2))?)
}

pub(crate) fn cast(rule: &Jvp) -> Result<Tangents> {
    if !rule.output.dtype().is_inexact() {
        return rule.none();
    }
    rule.linear(0, |tangent| tangent.astype(rule.output.dtype()))
}
