//! Fused regions, op by op.

use super::dense::{Dense, ravel, unravel};
use super::elementwise;
use crate::backend::{Operand, Step};
use crate::op::Op;
use crate::transforms::Region;
use crate::{Error, Result};

/// The outputs, each value rounded to its type as if it had been stored.
pub(super) fn region(region: &Region, step: &Step) -> Result<Vec<Dense>> {
    let out = step.outputs.iter().find_map(|operand| match operand {
        Operand::Host(view) => Some(view),
        _ => None,
    });
    let shape = &out.ok_or_else(|| Error::Kernel("a region without outputs".into()))?.shape;
    let mut values: Vec<Dense> = Vec::new();
    for operand in &step.inputs {
        values.push(broadcast(Dense::load(operand)?, shape));
    }
    for node in region.steps() {
        let operand = |index: usize| &values[node.operands[index]];
        let value = match &node.op {
            Op::Full(value) => Dense::filled(shape, node.dtype, *value),
            Op::StopGradient | Op::Cast => operand(0).clone(),
            Op::Unary(op) => elementwise::unary(*op, operand(0)),
            Op::Binary(op) => elementwise::binary(*op, operand(0), operand(1), node.dtype),
            Op::Compare(op) => elementwise::compare(*op, operand(0), operand(1)),
            Op::Select => elementwise::select(operand(0), operand(1), operand(2)),
            other => return Err(Error::unsupported(other.name(), "no op of a region")),
        };
        values.push(value.rounded(node.dtype)?);
    }
    Ok(region.outputs().iter().map(|&output| values[output].clone()).collect())
}

fn broadcast(value: Dense, shape: &[usize]) -> Dense {
    if value.shape.as_slice() == shape {
        return value;
    }
    let lead = shape.len() - value.shape.len();
    let from = |index: usize| {
        let at = unravel(index, shape);
        let own: Vec<usize> =
            at[lead..].iter().zip(&value.shape).map(|(&at, &size)| if size == 1 { 0 } else { at }).collect();
        ravel(&own, &value.shape)
    };
    let count = crate::shape::size_of(shape);
    value.gathered(shape, (0..count).map(from))
}
