//! Shapes of a recorded graph on inputs of other sizes.
//!
//! Only ops whose result's shape follows from their operands' are known here. A graph with any
//! other op, such as a reshape, which names sizes, serves the sizes it was recorded with.

use smallvec::SmallVec;

use crate::op::{Op, SortOrder};
use crate::shape::broadcast_shapes;
use crate::transforms::TracedGraph;
use crate::{Error, Result, Shape};

/// The shape of an op's outputs, which all have one.
pub(super) fn infer(op: &Op, inputs: &[&[usize]]) -> Result<Shape> {
    let unknown = || {
        Error::unsupported("compile", format!("the shape of {} does not follow from {inputs:?}", op.name()))
    };
    let first = || inputs.first().map(|&shape| Shape::from(shape)).ok_or_else(unknown);
    match op {
        Op::Full(_) => Ok(Shape::new()),
        Op::Unary(_)
        | Op::Cast
        | Op::StopGradient
        | Op::After
        | Op::Contiguous
        | Op::Softmax
        | Op::Scan { .. }
        | Op::Sort { order: SortOrder::Full, .. }
        | Op::ArgSort { order: SortOrder::Full, .. }
        | Op::RmsNorm { .. }
        | Op::LayerNorm { .. } => first(),
        Op::Binary(_) | Op::Compare(_) | Op::Select => {
            let shape = first()?;
            if inputs.iter().all(|input| *input == shape.as_slice()) { Ok(shape) } else { Err(unknown()) }
        }
        Op::Fused(_) => {
            inputs.iter().try_fold(Shape::new(), |shape, input| broadcast_shapes("compile", &shape, input))
        }
        Op::Reduce { axes, .. } => {
            let mut shape = first()?;
            axes.iter().for_each(|&axis| shape[axis] = 1);
            Ok(shape)
        }
        Op::ArgReduce { axis, .. } => {
            let mut shape = first()?;
            shape[*axis] = 1;
            Ok(shape)
        }
        Op::LogSumExp => {
            let mut shape = first()?;
            *shape.last_mut().ok_or_else(unknown)? = 1;
            Ok(shape)
        }
        Op::Transpose(order) => {
            let shape = first()?;
            Ok(order.iter().map(|&axis| shape[axis]).collect())
        }
        _ => Err(unknown()),
    }
}

/// Whether the rules here give the shapes that were recorded: then the graph serves all sizes.
pub(super) fn is_any(graph: &TracedGraph) -> bool {
    graph.nodes.iter().all(|node| {
        let inputs: SmallVec<[&[usize]; 4]> =
            node.inputs.iter().map(|&input| graph.spec(input).shape.as_slice()).collect();
        infer(&node.op, &inputs).is_ok_and(|shape| node.specs.iter().all(|spec| spec.shape == shape))
    })
}
