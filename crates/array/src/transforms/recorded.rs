//! What is inside custom ops, for those who play a recorded graph on other sizes.
//!
//! A checkpoint, and a call of a custom function, hold the graph of their function for the sizes
//! that it was traced with; a mapped op holds another and the size of its batch. The numbers of
//! these graphs are numbers of the op, so that a graph for any sizes can have such ops in it.

use std::any::Any;
use std::sync::Arc;

use smallvec::SmallVec;

use super::checkpoint::Checkpoint;
use super::compile::numbers::{self, Number};
use super::compile::shapes::can_be;
use super::compile::sizes::is_same_but_for_sizes;
use super::custom_function::CallOfCustom;
use super::graph::{Source, TracedGraph};
use super::vmap::MappedCustom;
use crate::Dtype;
use crate::ops::custom::CustomOp;

/// A custom op of one of the kinds that mica makes.
enum Kind<'a> {
    Checkpoint(&'a Checkpoint),
    Call(&'a CallOfCustom),
    Mapped(&'a MappedCustom),
}

fn kind(custom: &dyn CustomOp) -> Option<Kind<'_>> {
    let any = custom as &dyn Any;
    (any.downcast_ref().map(Kind::Checkpoint))
        .or_else(|| any.downcast_ref().map(Kind::Call))
        .or_else(|| any.downcast_ref().map(Kind::Mapped))
}

/// The graph of the function that a custom op, or the op that it maps, calls.
pub(super) fn graph_inside(custom: &dyn CustomOp) -> Option<&TracedGraph> {
    match kind(custom)? {
        Kind::Checkpoint(checkpoint) => Some(&checkpoint.graph),
        Kind::Call(call) => Some(&call.graph),
        Kind::Mapped(mapped) => graph_inside(mapped.inner.as_ref()),
    }
}

/// Visits the numbers inside a custom op, which is replaced by one that has them as they are then.
pub(super) fn visit(custom: &mut Arc<dyn CustomOp>, see: &mut dyn FnMut(Number)) {
    let changed: Arc<dyn CustomOp> = match kind(custom.as_ref()) {
        Some(Kind::Checkpoint(checkpoint)) => {
            let mut changed = checkpoint.clone();
            visit_graph(&mut changed.graph, see);
            Arc::new(changed)
        }
        Some(Kind::Call(call)) => {
            let mut changed = call.clone();
            visit_graph(&mut changed.graph, see);
            Arc::new(changed)
        }
        Some(Kind::Mapped(mapped)) => {
            let mut changed = mapped.clone();
            visit(&mut changed.inner, see);
            see(Number::Size(&mut changed.size));
            Arc::new(changed)
        }
        None => return,
    };
    *custom = changed;
}

fn visit_graph(graph: &mut TracedGraph, see: &mut dyn FnMut(Number)) {
    for node in &mut graph.nodes {
        let dtype = node.specs.first().map_or(Dtype::F32, |spec| spec.dtype);
        numbers::visit(&mut node.op, dtype, see);
        let sizes = node.specs.iter_mut().flat_map(|spec| spec.shape.iter_mut());
        sizes.for_each(|size| see(Number::Size(size)));
    }
}

/// Whether two custom ops are the same but for the numbers that [`visit`] sees.
pub(super) fn is_same_but_for_numbers(a: &Arc<dyn CustomOp>, b: &Arc<dyn CustomOp>) -> bool {
    match (kind(a.as_ref()), kind(b.as_ref())) {
        (Some(Kind::Checkpoint(a)), Some(Kind::Checkpoint(b))) => {
            a.inputs == b.inputs && is_same_but_for_sizes(&a.graph, &b.graph)
        }
        (Some(Kind::Call(a)), Some(Kind::Call(b))) => {
            a.inputs == b.inputs && a.has_rules_of(b) && is_same_but_for_sizes(&a.graph, &b.graph)
        }
        (Some(Kind::Mapped(a)), Some(Kind::Mapped(b))) => {
            a.batched == b.batched && is_same_but_for_numbers(&a.inner, &b.inner)
        }
        _ => Arc::ptr_eq(a, b),
    }
}

/// Whether the ops inside a custom op take inputs of these shapes.
pub(super) fn fits(custom: &dyn CustomOp, inputs: &[&[usize]]) -> bool {
    match kind(custom) {
        Some(Kind::Checkpoint(checkpoint)) => graph_fits(&checkpoint.graph, checkpoint.inputs, inputs),
        Some(Kind::Call(call)) => graph_fits(&call.graph, call.inputs, inputs),
        Some(Kind::Mapped(mapped)) => {
            let example: SmallVec<[&[usize]; 4]> =
                inputs.iter().zip(&mapped.batched).map(|(shape, &batch)| &shape[batch as usize..]).collect();
            fits(mapped.inner.as_ref(), &example)
        }
        None => true,
    }
}

/// As [`fits`] for a graph whose captured arrays come after so many inputs.
fn graph_fits(graph: &TracedGraph, count: usize, inputs: &[&[usize]]) -> bool {
    graph.nodes.iter().all(|node| {
        let shapes: SmallVec<[&[usize]; 4]> = (node.inputs.iter())
            .map(|value| match value.source {
                Source::Input(index) => inputs[index],
                Source::Captured(index) => inputs[count + index],
                Source::Node(index) => graph.nodes[index].specs[value.output].shape.as_slice(),
            })
            .collect();
        can_be(&node.op, &shapes, &node.specs)
    })
}
