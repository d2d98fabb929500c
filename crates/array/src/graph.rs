//! Looking at graphs without computing them: printing, counting, drawing.
//!
//! ```
//! use mica_array::{Array, graph::Graph};
//!
//! let x = Array::from_slice(&[1.0f32, 2.0], &[2])?;
//! let y = (&x + &x).exp()?;
//! let graph = Graph::of(&[y]);
//! assert_eq!(graph.ops(), 2);
//! assert_eq!(
//!     graph.to_string(),
//!     "%0 = value float32[2]\n%1 = add %0, %0 float32[2]\n%2 = exp %1 float32[2]\nreturn %2\n"
//! );
//! # Ok::<(), mica_array::Error>(())
//! ```

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::Array;
use crate::node::State;
use crate::op::{Op, Scalar};
use crate::storage::Spec;

/// What evaluating some arrays would compute.
#[derive(Clone, Debug)]
pub struct Graph {
    /// Inputs first.
    nodes: Vec<GraphNode>,
    /// (node, output)
    roots: Vec<(usize, usize)>,
}

#[derive(Clone, Debug)]
struct GraphNode {
    label: String,
    name: &'static str,
    kind: Kind,
    inputs: Vec<(usize, usize)>,
    outputs: Vec<Spec>,
    /// Of the outputs that anybody wants.
    bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Computed already.
    Value,
    /// Another look at its input's memory: nothing runs.
    View,
    /// Something runs.
    Op,
    /// It could not be built.
    Failed,
}

impl Graph {
    /// The graph under these arrays. Arrays that are computed already are its leaves.
    pub fn of(arrays: &[Array]) -> Graph {
        let mut graph = Graph { nodes: Vec::new(), roots: Vec::new() };
        let mut places: HashMap<usize, usize> = HashMap::new();
        for root in arrays {
            // (node, next input to visit)
            let mut stack = vec![(root.clone(), 0)];
            while let Some((array, next)) = stack.last_mut() {
                let child = match &*array.node().state() {
                    State::Lazy { inputs, .. } => inputs.get(*next).cloned(),
                    _ => None,
                };
                *next += 1;
                match child {
                    Some(child) if places.contains_key(&child.id()) => {}
                    Some(child) => stack.push((child, 0)),
                    None => {
                        let (array, _) = stack.pop().expect("the loop looks at the last one");
                        if let Entry::Vacant(place) = places.entry(array.id()) {
                            place.insert(graph.nodes.len());
                            graph.nodes.push(GraphNode::of(&array, &places));
                        }
                    }
                }
            }
            graph.roots.push((places[&root.id()], root.output()));
        }
        graph
    }

    /// How many ops would run. Views are none, nor are arrays that are computed already; a reshape
    /// counts, since it copies if it must.
    pub fn ops(&self) -> usize {
        self.nodes.iter().filter(|node| node.kind == Kind::Op).count()
    }

    /// How often each op would run, by name.
    pub fn count_by_name(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for node in self.nodes.iter().filter(|node| node.kind == Kind::Op) {
            *counts.entry(node.name).or_default() += 1;
        }
        counts
    }

    /// Bytes of all results that would be written, if none took the memory of another.
    /// [`crate::memory::rehearse`] says how much memory computing them takes.
    pub fn bytes(&self) -> usize {
        self.nodes.iter().filter(|node| node.kind == Kind::Op).map(|node| node.bytes).sum()
    }

    /// The graph in DOT, the language of Graphviz.
    pub fn to_dot(&self) -> String {
        let mut dot = String::from("digraph {\n  rankdir=TB;\n  node [fontname=\"monospace\"];\n");
        for (index, node) in self.nodes.iter().enumerate() {
            let shape = match node.kind {
                Kind::Value => "box",
                Kind::View => "plaintext",
                Kind::Op => "ellipse",
                Kind::Failed => "octagon",
            };
            let outputs: Vec<String> = node.outputs.iter().map(spec_text).collect();
            let label = escaped(&format!("{}\n{}", node.label, outputs.join("\n")));
            dot += &format!("  n{index} [shape={shape}, label=\"{label}\"];\n");
        }
        for (index, node) in self.nodes.iter().enumerate() {
            for &(input, output) in &node.inputs {
                let tail = if output > 0 { format!(" [taillabel=\"{output}\"]") } else { String::new() };
                dot += &format!("  n{input} -> n{index}{tail};\n");
            }
        }
        dot + "}\n"
    }

    fn name_of(&self, (node, output): (usize, usize)) -> String {
        if self.nodes[node].outputs.len() > 1 { format!("%{node}.{output}") } else { format!("%{node}") }
    }
}

/// A line per node: its number, its op, its inputs, its shape.
impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, node) in self.nodes.iter().enumerate() {
            write!(f, "%{index} = {}", node.label)?;
            for (at, &input) in node.inputs.iter().enumerate() {
                write!(f, "{}{}", if at == 0 { " " } else { ", " }, self.name_of(input))?;
            }
            let outputs: Vec<String> = node.outputs.iter().map(spec_text).collect();
            writeln!(f, " {}", outputs.join(", "))?;
        }
        let roots: Vec<String> = self.roots.iter().map(|&root| self.name_of(root)).collect();
        writeln!(f, "return {}", roots.join(", "))
    }
}

/// Prints what evaluating these arrays would compute, a line per node, to the standard output.
pub fn print(arrays: &[Array]) {
    print!("{}", Graph::of(arrays));
}

impl GraphNode {
    fn of(array: &Array, places: &HashMap<usize, usize>) -> GraphNode {
        let node = array.node();
        let outputs = (0..node.outputs()).map(|output| node.spec(output).clone()).collect();
        let (label, name, kind, inputs) = match &*node.state() {
            State::Ready(_) => ("value".to_string(), "value", Kind::Value, Vec::new()),
            State::Failed(error) => (format!("failed ({error})"), "failed", Kind::Failed, Vec::new()),
            State::Lazy { op, inputs } => {
                let kind = if op.is_view() { Kind::View } else { Kind::Op };
                let inputs = inputs.iter().map(|input| (places[&input.id()], input.output())).collect();
                (describe(op), op.name(), kind, inputs)
            }
        };
        let wanted = (0..node.outputs()).filter(|&output| output == 0 || node.wants(output));
        let bytes = wanted.map(|output| node.spec(output).bytes()).sum();
        GraphNode { label, name, kind, inputs, outputs, bytes }
    }
}

fn spec_text(spec: &Spec) -> String {
    format!("{}{:?}", spec.dtype, spec.shape.as_slice())
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// An op with what it carries besides its inputs.
pub(crate) fn describe(op: &Op) -> String {
    let name = op.name();
    match op {
        Op::Full(value) => match value {
            Scalar::Bool(value) => format!("{name}({value})"),
            Scalar::Int(value) => format!("{name}({value})"),
            Scalar::UInt(value) => format!("{name}({value})"),
            Scalar::Float(value) => format!("{name}({value})"),
        },
        Op::Arange { start, step } => format!("{name}({start}, step {step})"),
        Op::Transpose(order) => format!("{name}{:?}", order.as_slice()),
        Op::Slice { start, step } | Op::SliceUpdate { start, step } => {
            let unit = step.iter().all(|&step| step == 1);
            let step = if unit { String::new() } else { format!(", step {:?}", step.as_slice()) };
            format!("{name}(from {:?}{step})", start.as_slice())
        }
        Op::Reduce { axes, .. } => format!("{name}{:?}", axes.as_slice()),
        Op::Concatenate { axis }
        | Op::ArgReduce { axis, .. }
        | Op::Take { axis }
        | Op::TakeAlong { axis }
        | Op::ScatterAdd { axis }
        | Op::ScatterAddAlong { axis } => format!("{name}[{axis}]"),
        Op::RmsNorm { eps } | Op::RmsNormVjp { eps } | Op::LayerNorm { eps } => format!("{name}(eps {eps})"),
        Op::Fused(region) => {
            let steps: Vec<&str> = region.steps().iter().map(|step| step.op.name()).collect();
            format!("{name}({})", steps.join(" "))
        }
        _ => name.to_string(),
    }
}
