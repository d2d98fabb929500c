//! A traced function as data: its graph, its inputs, and the arrays that its closure captured.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::compile::shapes::can_be;
use super::compile::sizes::NodeSizes;
use crate::node::{Inputs, State};
use crate::op::{Op, TraceGuard, TraceScope};
use crate::storage::Spec;
use crate::{Array, Result};

/// The graph of a function, to be built again on other inputs.
#[derive(Clone, Debug, Default)]
pub(crate) struct TracedGraph {
    /// What the inputs were when the function was traced.
    pub(crate) inputs: Vec<Spec>,
    /// Inputs first.
    pub(crate) nodes: Vec<TracedNode>,
    pub(crate) outputs: Vec<Value>,
    /// Arrays that the function used without getting them as inputs.
    pub(crate) captured: Vec<Array>,
}

#[derive(Clone, Debug)]
pub(crate) struct TracedNode {
    pub(crate) op: Op,
    pub(crate) inputs: SmallVec<[Value; 3]>,
    pub(crate) specs: SmallVec<[Spec; 1]>,
    /// What of it depends on the inputs' sizes, if the graph is for any.
    pub(crate) sizes: Option<Arc<NodeSizes>>,
}

impl TracedNode {
    /// A node for the sizes that were recorded.
    pub(crate) fn new(op: Op, inputs: SmallVec<[Value; 3]>, specs: SmallVec<[Spec; 1]>) -> TracedNode {
        TracedNode { op, inputs, specs, sizes: None }
    }
}

/// An array of the graph: one output of whatever makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Value {
    pub(crate) source: Source,
    /// Zero except for nodes with several outputs.
    pub(crate) output: usize,
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Input(usize),
    Captured(usize),
    Node(usize),
}

impl Value {
    /// An output of a node.
    pub(crate) fn node(index: usize, output: usize) -> Value {
        Value { source: Source::Node(index), output }
    }
}

impl TracedGraph {
    /// Calls `f` on tracers of `inputs`.
    ///
    /// Nodes that do not depend on the inputs are captured as they are, so that gradients flow to
    /// them and nothing is computed twice. Literals, that is numbers and what is made of nothing
    /// but numbers, are recorded: they cost less than keeping them.
    pub(crate) fn trace(
        f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
        inputs: &[Array],
    ) -> Result<TracedGraph> {
        TracedGraph::record(f, inputs, false)
    }

    /// As [`TracedGraph::trace`], with what sizes of inputs may get into recorded too: ranges, and views
    /// of captured arrays.
    pub(crate) fn trace_with_sizes(
        f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
        inputs: &[Array],
    ) -> Result<TracedGraph> {
        TracedGraph::record(f, inputs, true)
    }

    fn record(
        f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
        inputs: &[Array],
        sizes: bool,
    ) -> Result<TracedGraph> {
        let scope = TraceScope::new();
        let tracers: Vec<Array> = inputs.iter().map(|input| scope.wrap(input)).collect();
        let outputs = {
            let _guard = TraceGuard(scope);
            f(&tracers)?
        };
        let graph = TracedGraph {
            inputs: inputs.iter().map(|input| input.spec().clone()).collect(),
            ..TracedGraph::default()
        };
        let places = tracers.iter().enumerate().map(|(index, tracer)| (tracer.id(), Source::Input(index)));
        let mut recorder = Recorder {
            places: places.collect(),
            kinds: classify(&outputs, &tracers, sizes),
            graph,
            captured: HashMap::new(),
        };
        for output in &outputs {
            let value = recorder.record(output)?;
            recorder.graph.outputs.push(value);
        }
        Ok(recorder.graph)
    }

    /// Arrays that the function captured.
    pub(crate) fn captured(&self) -> &[Array] {
        &self.captured
    }

    /// Shape and dtype of a value.
    pub(crate) fn spec(&self, value: Value) -> &Spec {
        match value.source {
            Source::Input(index) => &self.inputs[index],
            Source::Captured(index) => self.captured[index].spec(),
            Source::Node(index) => &self.nodes[index].specs[value.output],
        }
    }

    /// The node that makes a value, if one does.
    pub(crate) fn maker(&self, value: Value) -> Option<&TracedNode> {
        match value.source {
            Source::Node(index) => Some(&self.nodes[index]),
            _ => None,
        }
    }

    /// Shape and dtype of each output.
    pub(crate) fn output_specs(&self) -> Vec<Spec> {
        self.outputs.iter().map(|&output| self.spec(output).clone()).collect()
    }

    /// Adds a node; its inputs are there already.
    pub(crate) fn push(&mut self, node: TracedNode) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// Builds the graph on these inputs and captured arrays, with the recorded shapes.
    pub(crate) fn build(&self, inputs: &[Array], captured: &[Array]) -> Vec<Array> {
        self.build_nodes(inputs, captured, |_, _, _, _| Some(())).expect("recorded shapes fit")
    }

    /// Builds a graph for any sizes on inputs of these, which are numbered as when it was made.
    /// Nothing if the function is another one for them.
    pub(crate) fn build_for(
        &self,
        inputs: &[Array],
        captured: &[Array],
        symbols: &[usize],
    ) -> Option<Vec<Array>> {
        self.build_nodes(inputs, captured, |node, inputs, op, specs| {
            if let Some(sizes) = &node.sizes {
                sizes.apply(symbols, op, specs)?;
            }
            let shapes: SmallVec<[&[usize]; 4]> = inputs.iter().map(Array::shape).collect();
            can_be(op, &shapes, specs).then_some(())
        })
    }

    /// Builds the graph; `adapt` may change a node's op and specs, or give up.
    fn build_nodes(
        &self,
        inputs: &[Array],
        captured: &[Array],
        adapt: impl Fn(&TracedNode, &[Array], &mut Op, &mut [Spec]) -> Option<()>,
    ) -> Option<Vec<Array>> {
        let mut built: Vec<Array> = Vec::with_capacity(self.nodes.len());
        let find = |built: &[Array], value: &Value| match value.source {
            Source::Input(index) => inputs[index].clone(),
            Source::Captured(index) => captured[index].clone(),
            Source::Node(index) => built[index].sibling(value.output),
        };
        for node in &self.nodes {
            let node_inputs: Inputs = node.inputs.iter().map(|input| find(&built, input)).collect();
            let (mut op, mut specs) = (node.op.clone(), node.specs.clone());
            adapt(node, &node_inputs, &mut op, &mut specs)?;
            built.push(match specs.as_slice() {
                [spec] => Array::lazy(op, node_inputs, spec.shape.clone(), spec.dtype),
                _ => Array::lazy_many(op, node_inputs, specs.into_vec()),
            });
        }
        Some(self.outputs.iter().map(|output| find(&built, output)).collect())
    }

    /// Drops the nodes and captured arrays that no output needs.
    pub(crate) fn sweep(&mut self) {
        let mut used = vec![false; self.nodes.len()];
        let mut captured_used = vec![false; self.captured.len()];
        let mut mark = |value: &Value, used: &mut [bool]| match value.source {
            Source::Node(index) => used[index] = true,
            Source::Captured(index) => captured_used[index] = true,
            Source::Input(_) => {}
        };
        self.outputs.iter().for_each(|output| mark(output, &mut used));
        for index in (0..self.nodes.len()).rev() {
            if used[index] {
                self.nodes[index].inputs.iter().for_each(|input| mark(input, &mut used));
            }
        }
        let place = |used: &[bool]| {
            used.iter()
                .scan(0, |next, &used| {
                    *next += used as usize;
                    Some(next.wrapping_sub(1))
                })
                .collect::<Vec<usize>>()
        };
        let (nodes, captured) = (place(&used), place(&captured_used));
        let moved = |value: &mut Value| match &mut value.source {
            Source::Node(index) => *index = nodes[*index],
            Source::Captured(index) => *index = captured[*index],
            Source::Input(_) => {}
        };
        let mut keep = used.iter();
        self.nodes.retain(|_| *keep.next().expect("one per node"));
        let mut keep = captured_used.iter();
        self.captured.retain(|_| *keep.next().expect("one per array"));
        self.nodes.iter_mut().flat_map(|node| &mut node.inputs).for_each(moved);
        self.outputs.iter_mut().for_each(moved);
    }
}

struct Recorder {
    graph: TracedGraph,
    kinds: HashMap<usize, Kind>,
    /// Nodes, by their id.
    places: HashMap<usize, Source>,
    /// Captured arrays, by the id and the output of their node.
    captured: HashMap<(usize, usize), usize>,
}

impl Recorder {
    fn record(&mut self, root: &Array) -> Result<Value> {
        let mut stack = vec![root.clone()];
        while let Some(array) = stack.last().cloned() {
            if self.is_recorded(&array) {
                stack.pop();
                continue;
            }
            let lazy = match &*array.node().state() {
                State::Failed(error) => return Err(error.clone()),
                State::Lazy { op, inputs } if self.kind(&array) != Kind::Fixed => {
                    Some((op.clone(), inputs.clone()))
                }
                _ => None,
            };
            let Some((op, inputs)) = lazy else {
                let key = (array.id(), array.output());
                self.captured.insert(key, self.graph.captured.len());
                self.graph.captured.push(array);
                stack.pop();
                continue;
            };
            let before = stack.len();
            stack.extend(inputs.iter().filter(|input| !self.is_recorded(input)).cloned());
            if stack.len() > before {
                continue;
            }
            let inputs = inputs.iter().map(|input| self.value(input)).collect();
            let specs = (0..array.node().outputs()).map(|output| array.node().spec(output).clone()).collect();
            let index = self.graph.push(TracedNode::new(op, inputs, specs));
            self.places.insert(array.id(), Source::Node(index));
            stack.pop();
        }
        Ok(self.value(root))
    }

    fn kind(&self, array: &Array) -> Kind {
        self.kinds.get(&array.id()).copied().unwrap_or(Kind::Fixed)
    }

    fn is_recorded(&self, array: &Array) -> bool {
        self.places.contains_key(&array.id()) || self.captured.contains_key(&(array.id(), array.output()))
    }

    fn value(&self, array: &Array) -> Value {
        match self.places.get(&array.id()) {
            Some(&source) => Value { source, output: array.output() },
            None => {
                let index = self.captured[&(array.id(), array.output())];
                Value { source: Source::Captured(index), output: 0 }
            }
        }
    }
}

/// What a node under the outputs is to the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It depends on an input, or is made anew at every call like what does.
    Dependent,
    /// It is made of numbers that stand in the program.
    Literal,
    /// It is an array from outside.
    Fixed,
}

fn classify(outputs: &[Array], tracers: &[Array], sizes: bool) -> HashMap<usize, Kind> {
    let mut kinds: HashMap<usize, Kind> =
        tracers.iter().map(|tracer| (tracer.id(), Kind::Dependent)).collect();
    let mut stack: Vec<(Array, usize)> = Vec::new();
    for output in outputs {
        if kinds.contains_key(&output.id()) {
            continue;
        }
        kinds.insert(output.id(), Kind::Fixed);
        stack.push((output.clone(), 0));
        while let Some((array, next)) = stack.last_mut() {
            let child = match &*array.node().state() {
                State::Lazy { inputs, .. } => inputs.get(*next).cloned(),
                _ => None,
            };
            *next += 1;
            match child {
                Some(child) if kinds.contains_key(&child.id()) => {}
                Some(child) => {
                    kinds.insert(child.id(), Kind::Fixed);
                    stack.push((child, 0));
                }
                None => {
                    let kind = kind_of(array, &kinds, sizes);
                    kinds.insert(array.id(), kind);
                    stack.pop();
                }
            }
        }
    }
    kinds
}

/// The kind of a node whose inputs have theirs.
fn kind_of(array: &Array, kinds: &HashMap<usize, Kind>, sizes: bool) -> Kind {
    let state = array.node().state();
    let State::Lazy { op, inputs } = &*state else { return Kind::Fixed };
    let literal = matches!(
        op,
        Op::Full(_)
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Compare(_)
            | Op::Select
            | Op::Cast
            | Op::Reshape
            | Op::Broadcast
    ) || (sizes && matches!(op, Op::Arange { .. }));
    let mut kinds = inputs.iter().map(|input| kinds[&input.id()]);
    let viewed = sizes && !inputs.is_empty() && (op.is_view() || matches!(op, Op::Reshape));
    if viewed || kinds.clone().any(|kind| kind == Kind::Dependent) {
        Kind::Dependent
    } else if literal && kinds.all(|kind| kind == Kind::Literal) {
        Kind::Literal
    } else {
        Kind::Fixed
    }
}
