//! Tangents of reductions.

use super::extremum_share;
use crate::Result;
use crate::op::{Axes, ReduceOp};
use crate::ops::{Jvp, Tangents};

pub(crate) fn reduce(op: ReduceOp, axes: &Axes, rule: &Jvp) -> Result<Tangents> {
    let (x, y) = (&rule.inputs[0], rule.output);
    let axes: Vec<i32> = axes.iter().map(|&axis| axis as i32).collect();
    if axes.is_empty() {
        // Over no axes every element is its own result, except for the ops that give bools.
        return match op {
            ReduceOp::All | ReduceOp::Any => rule.none(),
            _ => rule.linear(0, |tangent| Ok(tangent.clone())),
        };
    }
    match op {
        ReduceOp::Sum => rule.linear(0, |tangent| tangent.sum(&axes, true)),
        ReduceOp::Max | ReduceOp::Min => rule.linear(0, |tangent| {
            extremum_share(x, y, tangent.dtype(), &axes)?.multiply(tangent)?.sum(&axes, true)
        }),
        ReduceOp::Prod => rule.linear(0, |tangent| y.multiply(tangent.divide(x)?.sum(&axes, true)?)),
        ReduceOp::All | ReduceOp::Any => rule.none(),
    }
}

pub(crate) fn softmax(rule: &Jvp) -> Result<Tangents> {
    let y = rule.output;
    rule.linear(0, |tangent| {
        let weighted = y.multiply(tangent)?;
        weighted.subtract(y.multiply(weighted.sum(&[-1], true)?)?)
    })
}

pub(crate) fn logsumexp(rule: &Jvp) -> Result<Tangents> {
    rule.linear(0, |tangent| rule.inputs[0].softmax(-1)?.multiply(tangent)?.sum(&[-1], true))
}
