//! Fused regions, op by op.

use super::dense::{Dense, ravel, unravel};
use super::elementwise;
use crate::backend::{Operand, Step};
use crate::op::Op;
use crate::transforms::Region;
use crate::{Error, Result};

/// The outputs, each value rounded to its type as if it had been stored.
pub(super) fn region(region: &Region, step: &Step) -> Result<Vec<Dense>> {
    let mut values: Vec<Dense> = step.inputs.iter().map(Dense::load).collect::<Result<_>>()?;
    let outputs = step.outputs.iter().filter_map(|operand| match operand {
        Operand::Host(view) => Some(&view.shape[..]),
        _ => None,
    });
    let whole = region.shape(values.iter().map(|value| value.shape.as_slice()).chain(outputs))?;
    for node in region.steps() {
        let (own, read) = region.shapes_of(node, &whole);
        let operand = |index: usize| broadcast(values[node.operands[index]].clone(), &read);
        let value = match &node.op {
            Op::Full(value) => Dense::filled(&own, node.dtype, *value),
            Op::StopGradient | Op::Cast => operand(0),
            Op::Unary(op) => elementwise::unary(*op, &operand(0)),
            Op::Binary(op) => elementwise::binary(*op, &operand(0), &operand(1), node.dtype),
            Op::Compare(op) => elementwise::compare(*op, &operand(0), &operand(1)),
            Op::Select => elementwise::select(&operand(0), &operand(1), &operand(2)),
            Op::Reduce { op, .. } => elementwise::reduce(*op, &operand(0), &[whole.len() - 1], &own),
            Op::Softmax => elementwise::softmax(&operand(0)),
            Op::LogSumExp => elementwise::logsumexp(&operand(0), &own),
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
