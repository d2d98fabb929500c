//! Elementwise ops that hang together become regions, with the reductions of rows among them.
//!
//! Two ops may be in one region if they have one shape and nothing outside the region lies between
//! them: a region runs as a whole, so it can't wait in the middle for its own result. What reduces
//! rows, the last axis, may be in it too: then ops on rows of that shape and ops on one number a row
//! are together. Broadcast inputs are read as the small arrays that they are, numbers become
//! constants, and a value that is needed outside becomes one more output.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::is_elementwise;
use super::region::{Region, RegionInput, RegionStep, has_fused_form, joins_rows, narrowed};
use super::simplify::literal;
use super::sizes::{Formula, NodeSizes, Num};
use crate::op::Op;
use crate::shape::{Shape, broadcast_shapes};
use crate::storage::Spec;
use crate::transforms::graph::{Source, TracedGraph, TracedNode, Value};
use crate::{Dtype, Result};

/// Ops of a region at most. Its registers should fit the L1 cache; the longest gradient rules
/// (of GELU) have some 30.
const MOST_OPS: usize = 128;
/// Arrays that a region reads, and writes, at most: more streams than this are slower together
/// than apart.
const MOST_INPUTS: usize = 16;
const MOST_OUTPUTS: usize = 8;
/// How long rows are that are reduced in a region: longer ones are better cut among the threads.
const ROWS: std::ops::RangeInclusive<usize> = 2..=16 * 1024;
/// Ops that share an input but not a result are joined if at most so many ops that are not
/// elementwise stand between them. Further apart, what is saved in reading is lost in keeping a
/// result that is not needed yet.
const NEAR: usize = 8;

/// The graph with its elementwise regions fused.
pub(super) fn fuse(graph: &TracedGraph) -> Result<TracedGraph> {
    let mut groups = Groups::new(graph);
    groups.join_chains();
    groups.join_readers_of_one_value();
    groups.choose();
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
    /// The shape of the rows that a group reduces, if it does.
    rows: Vec<Option<Shape>>,
    /// Whether a group becomes a region. All may until it is chosen.
    fused: Vec<bool>,
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
        let fusable: Vec<bool> = graph.nodes.iter().map(|node| is_fusable(graph, node)).collect();
        let rows = |(node, &fusable): (&TracedNode, &bool)| {
            (fusable && joins_rows(&node.op)).then(|| graph.spec(node.inputs[0]).shape.clone())
        };
        Groups {
            graph,
            rows: graph.nodes.iter().zip(&fusable).map(rows).collect(),
            fusable,
            fused: vec![true; count],
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
            for &input in &self.graph.nodes[index].inputs {
                if let Source::Node(from) = self.read(index, input).source {
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
        if group_a == group_b
            || !self.fusable[a]
            || !self.fusable[b]
            || !self.is_of_one_shape(group_a, group_b)
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
        if let Some(rows) = self.rows[from].take() {
            self.rows[into] = Some(rows);
        }
        let moved = std::mem::take(&mut self.members[from]);
        moved.iter().for_each(|&index| self.of[index] = into);
        self.members[into].extend(moved);
        self.members[into].sort_unstable();
    }

    /// Whether the groups work on one shape: on the same rows, and on one number for each of these.
    fn is_of_one_shape(&self, a: usize, b: usize) -> bool {
        // Without rows, all nodes of a group have one shape.
        let shape = |group: usize| &self.graph.nodes[self.members[group][0]].specs[0].shape;
        let belongs = |group: usize, rows: &Shape| {
            let shape = shape(group);
            shape == rows || *shape == narrowed(rows)
        };
        match (&self.rows[a], &self.rows[b]) {
            (None, None) => shape(a) == shape(b),
            (Some(rows), None) => belongs(b, rows),
            (None, Some(rows)) => belongs(a, rows),
            (Some(a), Some(b)) => a == b,
        }
    }

    fn is_too_large(&self, a: usize, b: usize) -> bool {
        let inside = |index: usize| self.of[index] == a || self.of[index] == b;
        let members = || self.members[a].iter().chain(&self.members[b]).copied();
        let outputs = members().filter(|&index| self.is_needed_outside(index, inside));
        let mut inputs: SmallVec<[Value; 16]> = SmallVec::new();
        for (index, &operand) in
            members().flat_map(|index| self.graph.nodes[index].inputs.iter().map(move |input| (index, input)))
        {
            let input = self.read(index, operand);
            let from_inside = matches!(input.source, Source::Node(index) if inside(index));
            if !from_inside && !inputs.contains(&input) && literal(self.graph, input).is_none() {
                inputs.push(input);
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

    /// Decides which groups become regions.
    fn choose(&mut self) {
        self.fused = (0..self.members.len())
            .map(|group| self.is_worth_fusing(group) && self.inputs_tell_rows(group))
            .collect();
    }

    /// Whether a group is better as one: an op alone gains nothing, unless it reads a number or a
    /// smaller array, which then need no nodes of their own.
    fn is_worth_fusing(&self, group: usize) -> bool {
        let nodes = self.members[group].iter().map(|&index| (index, &self.graph.nodes[index]));
        let mut ops =
            nodes.filter(|(index, node)| self.fusable[*index] && !matches!(node.op, Op::StopGradient));
        let reads_small = |node: &TracedNode| node.inputs.iter().any(|&input| is_small(self.graph, input));
        ops.clone().count() > 1 || ops.any(|(_, node)| is_elementwise(&node.op) && reads_small(node))
    }

    /// Whether the shape of a region's rows follows from its inputs: it is nowhere else if all outputs
    /// have one number a row.
    fn inputs_tell_rows(&self, group: usize) -> bool {
        let Some(rows) = &self.rows[group] else { return true };
        let inputs = self.inputs(group);
        let whole = inputs.iter().try_fold(Shape::new(), |whole, &input| {
            broadcast_shapes("fused", &whole, &self.graph.spec(input).shape)
        });
        whole.is_ok_and(|whole| whole == *rows)
    }

    /// What a group reads besides numbers that stand in the program.
    fn inputs(&self, group: usize) -> Vec<Value> {
        let mut inputs: Vec<Value> = Vec::new();
        for &index in &self.members[group] {
            for &operand in &self.graph.nodes[index].inputs {
                let input = self.read(index, operand);
                let outside = !self.is_inside(group, input) && literal(self.graph, operand).is_none();
                if outside && !inputs.contains(&input) {
                    inputs.push(input);
                }
            }
        }
        inputs
    }

    /// What a node reads as this operand: in a region, a small array in place of its broadcast.
    fn read(&self, index: usize, operand: Value) -> Value {
        match self.graph.maker(operand) {
            Some(TracedNode { op: Op::Broadcast, inputs, .. })
                if self.reads_through(index)
                    && self.fused[self.of[index]]
                    && literal(self.graph, operand).is_none() =>
            {
                inputs[0]
            }
            _ => operand,
        }
    }

    /// Whether a node in a region does without broadcasts.
    fn reads_through(&self, index: usize) -> bool {
        self.fusable[index] && is_elementwise(&self.graph.nodes[index].op)
    }

    fn is_inside(&self, group: usize, value: Value) -> bool {
        matches!(value.source, Source::Node(index) if self.of[index] == group)
    }

    /// Whether a node of a region is read by what is not in it, or by the caller.
    fn is_needed_outside(&self, index: usize, inside: impl Fn(usize) -> bool + Copy) -> bool {
        let is_outside = |&reader: &usize| match self.graph.nodes[reader].op {
            Op::Broadcast if self.is_output[reader] => true,
            Op::Broadcast => {
                self.readers[reader].iter().any(|&reader| !self.reads_through(reader) || !inside(reader))
            }
            _ => !inside(reader),
        };
        self.is_output[index] || self.readers[index].iter().any(is_outside)
    }

    /// The groups of what a group reads.
    fn makers(&self, group: usize) -> impl Iterator<Item = usize> {
        let inputs = self.members[group]
            .iter()
            .flat_map(|&index| self.graph.nodes[index].inputs.iter().map(move |&input| (index, input)));
        inputs.filter_map(|(index, input)| match self.read(index, input).source {
            Source::Node(index) => Some(self.of[index]),
            _ => None,
        })
    }
}

fn is_fusable(graph: &TracedGraph, node: &TracedNode) -> bool {
    let can_be = match &node.op {
        op if is_elementwise(op) => true,
        op if joins_rows(op) => {
            let rows = &graph.spec(node.inputs[0]).shape;
            let is_last = |axes: &[usize]| rows.len().checked_sub(1).is_some_and(|last| *axes == [last]);
            let fits = match op {
                Op::Reduce { axes, .. } => is_last(axes),
                _ => true,
            };
            fits && rows.last().is_some_and(|length| ROWS.contains(length))
                && !rows.contains(&0)
                && literal(graph, node.inputs[0]).is_none()
        }
        _ => false,
    };
    if !can_be {
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
        if self.groups.fused[group] {
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
        // Values are numbered inputs first, so these are counted before the steps.
        let inputs = groups.inputs(group);
        let mut numbers: HashMap<Value, usize> =
            inputs.iter().enumerate().map(|(number, &input)| (input, number)).collect();
        let mut steps: Vec<RegionStep> = Vec::new();
        for &index in members {
            let node = &graph.nodes[index];
            let mut operands: SmallVec<[usize; 3]> = SmallVec::new();
            for &operand in &node.inputs {
                operands.push(*numbers.entry(groups.read(index, operand)).or_insert_with(|| {
                    let (value, dtype) = literal(graph, operand).expect("what is no input is a number");
                    let operands = SmallVec::new();
                    steps.push(RegionStep { op: Op::Full(value), operands, dtype, narrow: true });
                    inputs.len() + steps.len() - 1
                }));
            }
            let Spec { shape, dtype } = &node.specs[0];
            let narrow = groups.rows[group].as_ref().is_some_and(|rows| shape != rows);
            steps.push(RegionStep { op: node.op.clone(), operands, dtype: *dtype, narrow });
            numbers.insert(Value::node(index, 0), inputs.len() + steps.len() - 1);
        }
        let inside = |index: usize| groups.of[index] == group;
        let outputs: SmallVec<[usize; 4]> =
            members.iter().copied().filter(|&index| groups.is_needed_outside(index, inside)).collect();
        let region = Region::new(
            inputs.iter().map(|&input| RegionInput::of(graph.spec(input))).collect(),
            steps,
            outputs.iter().map(|&index| numbers[&Value::node(index, 0)]).collect(),
        )?;
        let nodes = || outputs.iter().map(|&index| &graph.nodes[index]);
        // A formula for every size of every output, or none.
        let open = |node: &TracedNode| node.sizes.as_ref().is_some_and(|sizes| !sizes.shapes.is_empty());
        let shapes = |node: &TracedNode| match &node.sizes {
            Some(sizes) if !sizes.shapes.is_empty() => sizes.shapes.to_vec(),
            _ => node.specs[0].shape.iter().map(|&size| Formula::Fixed(Num::Whole(size as i128))).collect(),
        };
        let shapes: SmallVec<[Formula; 4]> =
            if nodes().any(open) { nodes().flat_map(shapes).collect() } else { SmallVec::new() };
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
