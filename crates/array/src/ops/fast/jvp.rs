//! Tangents of the fused ops that are linear in what moves.

use smallvec::smallvec;

use super::definition;
use crate::op::{ConvSpec, Op, RopeSpec};
use crate::ops::{Jvp, Tangents};
use crate::{Array, Result};

pub(crate) fn rope(spec: &RopeSpec, rule: &Jvp) -> Result<Tangents> {
    if rule.tangents[2].is_some() {
        return definition::jvp(&Op::Rope(spec.clone()), rule);
    }
    rule.linear(0, |tangent| tangent.rope(&rule.inputs[1], &rule.inputs[2], spec.clone()))
}

/// Linear in the input with its state, and in the weight.
pub(crate) fn short_conv(spec: ConvSpec, rule: &Jvp) -> Result<Tangents> {
    let (x, weight) = (&rule.inputs[0], &rule.inputs[1]);
    let state = spec.state.then(|| &rule.inputs[2]);
    let starts = spec.starts.then(|| &rule.inputs[2 + spec.state as usize]);
    let mut sum: Option<(Array, Option<Array>)> = None;
    let state_moves = spec.state && rule.tangents[2].is_some();
    if rule.tangents[0].is_some() || state_moves {
        let dstate = spec.state.then(|| rule.tangent(2));
        let (y, next) = rule.tangent(0).short_conv(weight, dstate.as_ref(), starts)?;
        sum = Some((y, Some(next)));
    }
    if let Some(dweight) = &rule.tangents[1] {
        // The state after the last position does not depend on the weight.
        let (y, _) = x.short_conv(dweight, state, starts)?;
        sum = Some(match sum {
            Some((before, next)) => (before.add(y)?, next),
            None => (y, None),
        });
    }
    match sum {
        Some((y, next)) => Ok(smallvec![Some(y), next]),
        None => rule.none(),
    }
}
