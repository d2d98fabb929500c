//! Gradient checkpointing: compute again instead of keeping.

use std::fmt;
use std::sync::Arc;

use super::TracedGraph;
use super::vjp::backward;
use crate::node::Inputs;
use crate::op::{Op, TraceScope};
use crate::ops::custom::CustomOp;
use crate::{Array, Result};

/// Calls `f` so that nothing inside it is kept for the gradient: the backward pass computes it
/// again from the inputs. Gradients also reach the arrays that `f` captured.
pub fn checkpoint(f: impl FnOnce(&[Array]) -> Result<Vec<Array>>, inputs: &[Array]) -> Result<Vec<Array>> {
    let mut graph = TracedGraph::trace(f, inputs)?;
    let specs = graph.output_specs();
    let captured = std::mem::take(&mut graph.captured);
    let all: Inputs = inputs.iter().cloned().chain(captured).collect();
    let count = specs.len();
    let custom = Checkpoint { graph, inputs: inputs.len() };
    let first = Array::lazy_many(Op::Custom(Arc::new(custom)), all, specs);
    Ok((0..count).map(|output| first.sibling(output)).collect())
}

#[derive(Clone)]
pub(super) struct Checkpoint {
    pub(super) graph: TracedGraph,
    /// How many inputs come before the captured arrays, which are inputs of the node too.
    pub(super) inputs: usize,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({} ops)", self.graph.nodes.len())
    }
}

impl CustomOp for Checkpoint {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn expand(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        Ok(self.graph.build(&inputs[..self.inputs], &inputs[self.inputs..]))
    }

    fn vjp(&self, inputs: &[Array], _: &[Array], cotangents: &[Option<Array>]) -> Result<Vec<Option<Array>>> {
        // The second forward pass hangs on fresh tracers, so that it shares nothing with the first,
        // and waits for the gradient that needs it: else all layers would be recomputed at once.
        let scope = TraceScope::new();
        let Some(gradient) = cotangents.iter().flatten().next() else { return Ok(vec![None; inputs.len()]) };
        let tracers: Vec<Array> = inputs.iter().map(|input| scope.wrap(&input.after(gradient))).collect();
        scope.close();
        let outputs = self.graph.build(&tracers[..self.inputs], &tracers[self.inputs..]);
        let seeds = outputs
            .into_iter()
            .zip(cotangents)
            .filter_map(|(output, cotangent)| Some((output, cotangent.clone()?)))
            .collect();
        let float: Vec<Array> =
            tracers.iter().filter(|tracer| tracer.dtype().is_inexact()).cloned().collect();
        let mut grads = backward(seeds, &float)?.into_iter();
        Ok(tracers
            .iter()
            .map(|tracer| if tracer.dtype().is_inexact() { grads.next() } else { None })
            .collect())
    }
}
