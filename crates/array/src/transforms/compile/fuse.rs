//! Elementwise ops that hang together become regions.
//!
//! Two ops may be in one region if they have one shape and nothing outside the region lies between
//! them: a region runs as a whole, so it can't wait in the middle for its own result. Broadcast
//! inputs are read as the small arrays that they are, numbers become constants, and a value that
//! is needed outside becomes one more output.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::is_elementwise;
use super::region::{Region, RegionStep, has_fused_form};
use super::simplify::literal;
use super::sizes::{Formula, NodeSizes};
use crate::op::Op;
use crate::transforms::graph::{Source, TracedGraph, TracedNode, Value};
use crate::{Dtype, Result};

/// Ops of a region at most. Its registers should fit the L1 cache; the longest gradient rules
/// (of GELU) have some 30.
const MOST_OPS: usize = 128;
/// Arrays that a region reads, and writes, at most: more streams than this are slower together
/// than apart.
const MOST_INPUTS: usize = 16;
const MOST_OUTPUTS: usize = 8;
/// Ops that share an input but not a result are joined if at most so many ops that are not
/// elementwise stand between them. Further apart, what is saved in reading is lost in keeping a
/// result that is not needed yet.
const NEAR: usize = 8;

/// The graph with its elementwise regions fused.
pub(super) fn fuse(graph: &TracedGraph) -> Result<TracedGraph> {
    let mut groups = Groups::new(graph);
    groups.join_chains();
    groups.join_readers_of_one_value();
    let mut fused = emit(&groups)?;
    fused.sweep();
    Ok(fused)
}

/// A partition of the nodes; what can't be fused is alone.
struct Groups<'a> {
    graph: &'a TracedGraph,
    /// Whether a node has a fused form.
    fusable: Vec<bool>,
    /// The group of each node.
    of: Vec<usize>,
    /// The nodes of each group, ascending; empty once it is part of another.
    members: Vec<Vec<usize>>,
    /// The nodes that read each node.
    readers: Vec<SmallVec<[usize; 2]>>,
    /// Whether a node is an output of the graph.
    is_output: Vec<bool>,
    /// The last search that visited each group.
    marks: Vec<usize>,
    searches: usize,
}

impl<'a> Groups<'a> {
    fn new(graph: &'a TracedGraph) -> Groups<'a> {
        let count = graph.nodes.len();
        let mut readers = vec![SmallVec::new(); count];
        for (index, node) in graph.nodes.iter().enumerate() {
            for &input in &node.inputs {
                if let Source::Node(from) = input.source
                    && readers[from].last() != Some(&index)
                {
                    readers[from].push(index);
                }
            }
        }
        let mut is_output = vec![false; count];
        for output in &graph.outputs {
            if let Source::Node(index) = output.source {
                is_output[index] = true;
            }
        }
        Groups {
            graph,
            fusable: graph.nodes.iter().map(|node| is_fusable(graph, node)).collect(),
            of: (0..count).collect(),
            members: (0..count).map(|index| vec![index]).collect(),
            readers,
            is_output,
            marks: vec![0; count],
            searches: 0,
        }
    }

    /// Joins ops with what they read.
    fn join_chains(&mut self) {
        for index in 0..self.graph.nodes.len() {
            for input in &self.graph.nodes[index].inputs {
                if let Source::Node(from) = input.source {
                    self.try_join(from, index);
                }
            }
        }
    }

    /// Joins groups that read the same array, such as the gradients of a product.
    fn join_readers_of_one_value(&mut self) {
        let mut heavy = 0;
        let heavy_before: Vec<usize> = (self.graph.nodes.iter().zip(&self.fusable))
            .map(|(node, &fusable)| {
                heavy += !(fusable || node.op.is_view() || matches!(node.op, Op::Full(_))) as usize;
                heavy
            })
            .collect();
        let mut readers: HashMap<Value, Vec<usize>> = HashMap::new();
        for (index, node) in self.graph.nodes.iter().enumerate() {
            // Reading a number or a small array twice costs nothing.
            let is_stored = |input: &&Value| !is_small(self.graph, **input);
            for &input in node.inputs.iter().filter(|_| self.fusable[index]).filter(is_stored) {
                readers.entry(input).or_default().push(index);
            }
        }
        let mut lists: Vec<Vec<usize>> = readers.into_values().filter(|list| list.len() > 1).collect();
        // The map's order is random; plans should not be.
        lists.sort_unstable();
        for list in lists {
            for pair in list.windows(2) {
                if heavy_before[pair[1]] - heavy_before[pair[0]] <= NEAR {
                    self.try_join(pair[0], pair[1]);
                }
            }
        }
    }

    /// Joins the groups of two nodes if they may be one region.
    fn try_join(&mut self, a: usize, b: usize) {
        let (group_a, group_b) = (self.of[a], self.of[b]);
        let nodes = &self.graph.nodes;
        if group_a == group_b
            || !self.fusable[a]
            || !self.fusable[b]
            || nodes[a].specs[0].shape != nodes[b].specs[0].shape
            || self.is_too_large(group_a, group_b)
            || self.is_cyclic(group_a, group_b)
        {
            return;
        }
        let (into, from) = if self.members[group_a].len() >= self.members[group_b].len() {
            (group_a, group_b)
        } else {
            (group_b, group_a)
        };
        let moved = std::mem::take(&mut self.members[from]);
        moved.iter().for_each(|&index| self.of[index] = into);
        self.members[into].extend(moved);
        self.members[into].sort_unstable();
    }

    fn is_too_large(&self, a: usize, b: usize) -> bool {
        let inside = |index: usize| self.of[index] == a || self.of[index] == b;
        let members = || self.members[a].iter().chain(&self.members[b]).copied();
        let outputs = members().filter(|&index| {
            self.is_output[index] || self.readers[index].iter().any(|&reader| !inside(reader))
        });
        let mut inputs: SmallVec<[Value; 16]> = SmallVec::new();
        for input in members().flat_map(|index| &self.graph.nodes[index].inputs) {
            let from_inside = matches!(input.source, Source::Node(index) if inside(index));
            if !from_inside && !inputs.contains(input) && literal(self.graph, *input).is_none() {
                inputs.push(*input);
            }
        }
        members().count() > MOST_OPS || inputs.len() > MOST_INPUTS || outputs.count() > MOST_OUTPUTS
    }

    /// Whether the two groups as one would wait for themselves: whether a way leads from one to
    /// the other through a third.
    fn is_cyclic(&mut self, a: usize, b: usize) -> bool {
        self.searches += 1;
        let search = self.searches;
        let outside = |maker: &usize| *maker != a && *maker != b;
        let mut stack: Vec<usize> = self.makers(a).chain(self.makers(b)).filter(outside).collect();
        while let Some(group) = stack.pop() {
            if group == a || group == b {
                return true;
            }
            if std::mem::replace(&mut self.marks[group], search) != search {
                stack.extend(self.makers(group).filter(|&maker| maker != group));
            }
        }
        false
    }

    /// Whether a group is better as one: an op alone gains nothing, unless it reads a number or a
    /// smaller array, which then need no nodes of their own.
    fn is_worth_fusing(&self, group: usize) -> bool {
        let nodes = self.members[group].iter().map(|&index| (index, &self.graph.nodes[index]));
        let mut ops =
            nodes.filter(|(index, node)| self.fusable[*index] && !matches!(node.op, Op::StopGradient));
        ops.clone().count() > 1
            || ops.any(|(_, node)| node.inputs.iter().any(|&input| is_small(self.graph, input)))
    }

    fn is_inside(&self, group: usize, value: Value) -> bool {
        matches!(value.source, Source::Node(index) if self.of[index] == group)
    }

    /// Whether a node is read by another group, or by the caller.
    fn is_needed_outside(&self, index: usize) -> bool {
        self.is_output[index] || self.readers[index].iter().any(|&reader| self.of[reader] != self.of[index])
    }

    /// The groups of what a group reads.
    fn makers(&self, group: usize) -> impl Iterator<Item = usize> {
        let inputs = self.members[group].iter().flat_map(|&index| &self.graph.nodes[index].inputs);
        inputs.filter_map(|input| match input.source {
            Source::Node(index) => Some(self.of[index]),
            _ => None,
        })
    }
}

fn is_fusable(graph: &TracedGraph, node: &TracedNode) -> bool {
    if !is_elementwise(&node.op) {
        return false;
    }
    let operands: SmallVec<[Dtype; 3]> = node.inputs.iter().map(|&input| graph.spec(input).dtype).collect();
    has_fused_form(&node.op, &operands, node.specs[0].dtype)
}

/// Whether a value is a number or a broadcast array.
fn is_small(graph: &TracedGraph, value: Value) -> bool {
    graph.maker(value).is_some_and(|maker| matches!(maker.op, Op::Broadcast))
        || literal(graph, value).is_some()
}

/// The graph with each group that is worth it as one node.
fn emit(groups: &Groups) -> Result<TracedGraph> {
    let graph = groups.graph;
    let mut emitter = Emitter {
        groups,
        fused: TracedGraph {
            inputs: graph.inputs.clone(),
            captured: graph.captured.clone(),
            ..TracedGraph::default()
        },
        places: HashMap::new(),
    };
    // Depth first: a group after the groups that it reads.
    let mut entered = vec![false; graph.nodes.len()];
    for &root in &groups.of {
        let mut stack: Vec<(usize, bool)> = vec![(root, false)];
        while let Some((group, read)) = stack.pop() {
            if read {
                emitter.group(group)?;
            } else if !std::mem::replace(&mut entered[group], true) {
                stack.push((group, true));
                stack.extend(
                    groups.makers(group).filter(|&maker| !entered[maker]).map(|maker| (maker, false)),
                );
            }
        }
    }
    let Emitter { mut fused, places, .. } = emitter;
    let place = |&output: &Value| places.get(&output).copied().unwrap_or(output);
    fused.outputs = graph.outputs.iter().map(place).collect();
    Ok(fused)
}

struct Emitter<'a> {
    groups: &'a Groups<'a>,
    fused: TracedGraph,
    /// Where values of the old graph are in the new one; inputs and captured arrays stay.
    places: HashMap<Value, Value>,
}

impl Emitter<'_> {
    fn group(&mut self, group: usize) -> Result<()> {
        if self.groups.is_worth_fusing(group) {
            return self.region(group);
        }
        let graph = self.groups.graph;
        for &index in &self.groups.members[group] {
            let node = &graph.nodes[index];
            let inputs = node.inputs.iter().map(|&input| self.place(input)).collect();
            let at = self.fused.push(TracedNode { inputs, ..node.clone() });
            for output in 0..node.specs.len() {
                self.places.insert(Value::node(index, output), Value::node(at, output));
            }
        }
        Ok(())
    }

    fn place(&self, value: Value) -> Value {
        self.places.get(&value).copied().unwrap_or(value)
    }

    fn region(&mut self, group: usize) -> Result<()> {
        let (groups, graph) = (self.groups, self.groups.graph);
        let members = &groups.members[group];
        // What is read in place of an operand: numbers stand for themselves.
        let read = |operand: Value| match graph.maker(operand) {
            Some(TracedNode { op: Op::Broadcast, inputs, .. }) if literal(graph, operand).is_none() => {
                inputs[0]
            }
            _ => operand,
        };
        // Values are numbered inputs first, so these are counted before the steps.
        let mut inputs: Vec<Value> = Vec::new();
        for &operand in members.iter().flat_map(|&index| &graph.nodes[index].inputs) {
            let outside = !groups.is_inside(group, operand) && literal(graph, operand).is_none();
            if outside && !inputs.contains(&read(operand)) {
                inputs.push(read(operand));
            }
        }
        let mut numbers: HashMap<Value, usize> =
            inputs.iter().enumerate().map(|(number, &input)| (input, number)).collect();
        let mut steps: Vec<RegionStep> = Vec::new();
        for &index in members {
            let node = &graph.nodes[index];
            let mut operands: SmallVec<[usize; 3]> = SmallVec::new();
            for &operand in &node.inputs {
                operands.push(*numbers.entry(read(operand)).or_insert_with(|| {
                    let (value, dtype) = literal(graph, operand).expect("what is no input is a number");
                    steps.push(RegionStep { op: Op::Full(value), operands: SmallVec::new(), dtype });
                    inputs.len() + steps.len() - 1
                }));
            }
            steps.push(RegionStep { op: node.op.clone(), operands, dtype: node.specs[0].dtype });
            numbers.insert(Value::node(index, 0), inputs.len() + steps.len() - 1);
        }
        let outputs: SmallVec<[usize; 4]> =
            members.iter().copied().filter(|&index| groups.is_needed_outside(index)).collect();
        let region = Region::new(
            inputs.iter().map(|&input| graph.spec(input).dtype).collect(),
            steps,
            outputs.iter().map(|&index| numbers[&Value::node(index, 0)]).collect(),
        )?;
        let nodes = || outputs.iter().map(|&index| &graph.nodes[index]);
        let shapes =
            |node: &TracedNode| node.sizes.iter().flat_map(|sizes| sizes.shapes.clone()).collect::<Vec<_>>();
        let shapes: SmallVec<[Formula; 4]> = nodes().flat_map(shapes).collect();
        let at = self.fused.push(TracedNode {
            op: Op::Fused(Arc::new(region)),
            inputs: inputs.iter().map(|&input| self.place(input)).collect(),
            specs: nodes().map(|node| node.specs[0].clone()).collect(),
            sizes: (!shapes.is_empty()).then(|| Arc::new(NodeSizes { op: SmallVec::new(), shapes })),
        });
        for (output, &index) in outputs.iter().enumerate() {
            self.places.insert(Value::node(index, 0), Value::node(at, output));
        }
        Ok(())
    }
}
