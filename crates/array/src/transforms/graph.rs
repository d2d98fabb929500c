//! A traced function as data: its graph, its inputs, and the arrays that its closure captured.

use std::collections::HashMap;

use crate::array::{Inputs, State};
use crate::op::{Op, TraceGuard, TraceScope};
use crate::storage::Spec;
use crate::{Array, Error, Result};

/// The graph of a function, to be built again on other inputs.
#[derive(Debug)]
pub(crate) struct TracedGraph {
    nodes: Vec<TracedNode>,
    /// Where each output is.
    outputs: Vec<(Source, usize)>,
    /// Arrays that the function used without getting them as inputs.
    captured: Vec<Array>,
}

#[derive(Debug)]
struct TracedNode {
    op: Op,
    inputs: Vec<(Source, usize)>,
    specs: Vec<Spec>,
}

/// Where a value comes from; beside it stands the output's number.
#[derive(Clone, Copy, Debug)]
enum Source {
    Input(usize),
    Captured(usize),
    Node(usize),
}

impl TracedGraph {
    /// Calls `f` on tracers of `inputs`.
    ///
    /// Nodes that do not depend on the inputs are captured as they are, so that gradients flow to
    /// them and nothing is computed twice.
    pub(crate) fn trace(
        f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
        inputs: &[Array],
    ) -> Result<TracedGraph> {
        let scope = TraceScope::new();
        let tracers: Vec<Array> = inputs.iter().map(|input| scope.wrap(input)).collect();
        let outputs = {
            let _guard = TraceGuard(scope);
            f(&tracers)?
        };
        let mut graph = TracedGraph { nodes: Vec::new(), outputs: Vec::new(), captured: Vec::new() };
        let mut sources: HashMap<usize, Source> =
            tracers.iter().enumerate().map(|(index, tracer)| (tracer.id(), Source::Input(index))).collect();
        let depends = depends_on(&outputs, &tracers)?;
        for output in &outputs {
            let source = graph.visit(output, &depends, &mut sources)?;
            graph.outputs.push((source, output.output()));
        }
        Ok(graph)
    }

    /// Arrays that the function captured.
    pub(crate) fn captured(&self) -> &[Array] {
        &self.captured
    }

    /// Shape and dtype of each output.
    pub(crate) fn output_specs(&self, inputs: &[Array]) -> Vec<Spec> {
        self.outputs
            .iter()
            .map(|&(source, output)| match source {
                Source::Input(index) => Spec::new(inputs[index].shape(), inputs[index].dtype()),
                Source::Captured(index) => {
                    Spec::new(self.captured[index].shape(), self.captured[index].dtype())
                }
                Source::Node(index) => self.nodes[index].specs[output].clone(),
            })
            .collect()
    }

    /// The nodes, for passes that rewrite them.
    pub(crate) fn ops(&self) -> impl Iterator<Item = &Op> {
        self.nodes.iter().map(|node| &node.op)
    }

    /// Builds the graph on these inputs and captured arrays.
    pub(crate) fn build(&self, inputs: &[Array], captured: &[Array]) -> Vec<Array> {
        let mut built: Vec<Array> = Vec::with_capacity(self.nodes.len());
        let find = |built: &[Array], (source, output): (Source, usize)| match source {
            Source::Input(index) => inputs[index].clone(),
            Source::Captured(index) => captured[index].clone(),
            Source::Node(index) => built[index].sibling(output),
        };
        for node in &self.nodes {
            let node_inputs: Inputs = node.inputs.iter().map(|&input| find(&built, input)).collect();
            let array = match node.specs.as_slice() {
                [spec] => Array::lazy(node.op.clone(), node_inputs, spec.shape.clone(), spec.dtype),
                specs => Array::lazy_many(node.op.clone(), node_inputs, specs.to_vec()),
            };
            built.push(array);
        }
        self.outputs.iter().map(|&output| find(&built, output)).collect()
    }

    fn visit(
        &mut self,
        root: &Array,
        depends: &HashMap<usize, bool>,
        sources: &mut HashMap<usize, Source>,
    ) -> Result<Source> {
        let mut stack = vec![root.clone()];
        while let Some(array) = stack.last().cloned() {
            if sources.contains_key(&array.id()) {
                stack.pop();
                continue;
            }
            let lazy = match &*array.node().state() {
                State::Failed(error) => return Err(error.clone()),
                State::Lazy { op, inputs } if depends.get(&array.id()).copied().unwrap_or(false) => {
                    Some((op.clone(), inputs.clone()))
                }
                _ => None,
            };
            let Some((op, inputs)) = lazy else {
                sources.insert(array.id(), Source::Captured(self.captured.len()));
                // A handle per node: outputs are chosen where it is used.
                self.captured.push(array.clone());
                stack.pop();
                continue;
            };
            let missing: Vec<Array> =
                inputs.iter().filter(|input| !sources.contains_key(&input.id())).cloned().collect();
            if !missing.is_empty() {
                stack.extend(missing);
                continue;
            }
            let inputs = inputs.iter().map(|input| (sources[&input.id()], input.output())).collect();
            let specs = (0..array.node().outputs()).map(|output| array.node().spec(output).clone()).collect();
            sources.insert(array.id(), Source::Node(self.nodes.len()));
            self.nodes.push(TracedNode { op, inputs, specs });
            stack.pop();
        }
        match sources[&root.id()] {
            Source::Captured(index) if self.captured[index].output() != root.output() => {
                Err(Error::unsupported(
                    "trace",
                    "a function captured two outputs of one node; pass them as inputs",
                ))
            }
            source => Ok(source),
        }
    }
}

/// Which nodes under the outputs depend on the tracers.
fn depends_on(outputs: &[Array], tracers: &[Array]) -> Result<HashMap<usize, bool>> {
    let mut depends: HashMap<usize, bool> = tracers.iter().map(|tracer| (tracer.id(), true)).collect();
    let mut stack: Vec<(Array, usize)> = Vec::new();
    for output in outputs {
        if depends.contains_key(&output.id()) {
            continue;
        }
        depends.insert(output.id(), false);
        stack.push((output.clone(), 0));
        while let Some((array, next)) = stack.last_mut() {
            let child = match &*array.node().state() {
                State::Lazy { inputs, .. } => inputs.get(*next).cloned(),
                _ => None,
            };
            *next += 1;
            match child {
                Some(child) => match depends.get(&child.id()) {
                    Some(true) => {
                        let id = array.id();
                        depends.insert(id, true);
                    }
                    Some(false) => {}
                    None => {
                        depends.insert(child.id(), false);
                        stack.push((child, 0));
                    }
                },
                None => {
                    let (array, _) = stack.pop().expect("the loop looks at the last one");
                    if depends[&array.id()]
                        && let Some((parent, _)) = stack.last()
                    {
                        depends.insert(parent.id(), true);
                    }
                }
            }
        }
    }
    Ok(depends)
}
