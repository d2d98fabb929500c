//! The same function with fewer ops: constants folded, common subexpressions shared, what changes
//! nothing removed. No rewrite may change a bit of a result: x + 0 stays (it turns −0 into 0), and
//! sums are not reordered.

use std::collections::HashMap;
use std::mem::{Discriminant, discriminant};

use smallvec::{SmallVec, smallvec};

use super::numbers::is_same;
use super::region::{Region, is_narrow, narrowed};
use super::{constant, is_elementwise};
use crate::op::{Op, Scalar};
use crate::storage::Spec;
use crate::transforms::graph::{TracedGraph, TracedNode, Value};
use crate::{Dtype, Shape};

/// How far back elementwise ops are computed on picked elements alone.
const DEEPEST_PICK: usize = 64;

type Operands = SmallVec<[Value; 3]>;

/// The graph simplified, nodes that no output needs gone.
pub(super) fn simplify(graph: TracedGraph) -> TracedGraph {
    let TracedGraph { inputs, nodes, outputs, captured } = graph;
    let mut rewriter =
        Rewriter { graph: TracedGraph { inputs, captured, ..TracedGraph::default() }, seen: HashMap::new() };
    // Per node of the old graph, where its outputs are in the new one.
    let mut places: Vec<SmallVec<[Value; 1]>> = Vec::with_capacity(nodes.len());
    let moved = |places: &[SmallVec<[Value; 1]>], value: Value| match value.source {
        crate::transforms::graph::Source::Node(index) => places[index][value.output],
        _ => value,
    };
    for node in nodes {
        let inputs: Operands = node.inputs.iter().map(|&input| moved(&places, input)).collect();
        places.push(match (&node.op, node.specs.as_slice()) {
            (Op::Fused(region), specs) => rewriter.inline(region, &inputs, specs),
            (_, [spec]) => smallvec![rewriter.add(node.op, inputs, spec.clone())],
            (_, specs) => {
                let count = specs.len();
                let index = rewriter.graph.push(TracedNode::new(node.op, inputs, node.specs));
                (0..count).map(|output| Value::node(index, output)).collect()
            }
        });
    }
    rewriter.graph.outputs = outputs.into_iter().map(|output| moved(&places, output)).collect();
    rewriter.graph.sweep();
    rewriter.graph
}

struct Rewriter {
    graph: TracedGraph,
    /// Nodes by what a common subexpression must share; ops are compared then.
    seen: HashMap<(Discriminant<Op>, Operands, Shape, Dtype), SmallVec<[usize; 1]>>,
}

impl Rewriter {
    /// The value of a node with one output, which may be there already.
    fn add(&mut self, op: Op, inputs: Operands, spec: Spec) -> Value {
        if let Some(same) = self.unchanged(&op, &inputs, &spec) {
            return same;
        }
        if let Some(value) = self.folded(&op, &inputs, &spec) {
            return value;
        }
        if let Some(value) = self.picked_early(&op, &inputs, &spec) {
            return value;
        }
        let (op, inputs) = self.shortened(op, inputs);
        let key = (discriminant(&op), inputs.clone(), spec.shape.clone(), spec.dtype);
        let candidates = self.seen.entry(key).or_default();
        if let Some(&index) = candidates.iter().find(|&&index| is_same(&self.graph.nodes[index].op, &op)) {
            return Value::node(index, 0);
        }
        let index = self.graph.push(TracedNode::new(op, inputs, smallvec![spec]));
        candidates.push(index);
        Value::node(index, 0)
    }

    /// The operand, if the op gives just that.
    fn unchanged(&self, op: &Op, inputs: &[Value], spec: &Spec) -> Option<Value> {
        let &input = inputs.first()?;
        let from = self.graph.spec(input);
        let maker = self.graph.maker(input);
        let same = match op {
            Op::Tracer(scope) => !scope.is_active(),
            Op::Cast => from.dtype == spec.dtype,
            Op::Broadcast | Op::Reshape => from.shape == spec.shape,
            Op::Transpose(order) => order.iter().enumerate().all(|(at, &axis)| at == axis),
            // A kernel's result is contiguous already.
            Op::Contiguous => {
                maker.is_some_and(|maker| is_elementwise(&maker.op) && !matches!(maker.op, Op::StopGradient))
            }
            Op::StopGradient => maker.is_some_and(|maker| matches!(maker.op, Op::StopGradient)),
            _ => false,
        };
        if same {
            return Some(input);
        }
        match (op, maker) {
            // There and back through a type that holds every value.
            (Op::Cast, Some(TracedNode { op: Op::Cast, inputs, .. })) => {
                let origin = self.graph.spec(inputs[0]).dtype;
                (origin == spec.dtype && holds(from.dtype, origin)).then_some(inputs[0])
            }
            (Op::Select, _) => match self.literal(input)? {
                (value, _) if value.to_f64() != 0.0 => Some(inputs[1]),
                _ => Some(inputs[2]),
            },
            _ => None,
        }
    }

    /// The number that an op on numbers gives.
    fn folded(&mut self, op: &Op, inputs: &[Value], spec: &Spec) -> Option<Value> {
        if !is_elementwise(op) || matches!(op, Op::StopGradient) {
            return None;
        }
        let operands: SmallVec<[(Scalar, Dtype); 3]> =
            inputs.iter().map(|&input| self.literal(input)).collect::<Option<_>>()?;
        let value = constant::evaluate(op, &operands, spec.dtype)?;
        let number = Spec::new(&[][..], spec.dtype);
        let full = self.add(Op::Full(value), Operands::new(), number);
        Some(self.add(Op::Broadcast, smallvec![full], spec.clone()))
    }

    /// One element of each row of an elementwise result, from the same elements of its operands: what is
    /// not picked is not computed.
    fn picked_early(&mut self, op: &Op, inputs: &[Value], spec: &Spec) -> Option<Value> {
        let Op::TakeAlong { axis } = *op else { return None };
        let (from, indices) = (inputs[0], inputs[1]);
        let is_last = axis + 1 == spec.shape.len();
        if !is_last || spec.shape != narrowed(&self.graph.spec(from).shape) {
            return None;
        }
        let maker = self.graph.maker(from)?;
        if !is_elementwise(&maker.op) {
            return None;
        }
        let mut picked = HashMap::new();
        Some(self.pick(from, indices, &spec.shape, &mut picked, 0))
    }

    /// The elements of `value` at one index a row; `picked` has what was asked for already.
    fn pick(
        &mut self,
        value: Value,
        indices: Value,
        shape: &Shape,
        picked: &mut HashMap<Value, Value>,
        depth: usize,
    ) -> Value {
        if let Some(&found) = picked.get(&value) {
            return found;
        }
        let spec = Spec::new(shape.clone(), self.graph.spec(value).dtype);
        let maker = self.graph.maker(value).map(|maker| (maker.op.clone(), maker.inputs.clone()));
        let found = match maker {
            Some((Op::Broadcast, inputs)) if is_narrow(&self.graph.spec(inputs[0]).shape) => {
                self.add(Op::Broadcast, inputs, spec)
            }
            Some((op, inputs)) if is_elementwise(&op) && depth < DEEPEST_PICK => {
                let operands: Operands =
                    inputs.iter().map(|&input| self.pick(input, indices, shape, picked, depth + 1)).collect();
                self.add(op, operands, spec)
            }
            _ => {
                let axis = shape.len() - 1;
                self.add(Op::TakeAlong { axis }, smallvec![value, indices], spec)
            }
        };
        picked.insert(value, found);
        found
    }

    /// One movement in place of two.
    fn shortened(&self, op: Op, inputs: Operands) -> (Op, Operands) {
        let maker = inputs.first().and_then(|&input| self.graph.maker(input));
        match (&op, maker) {
            (Op::Reshape, Some(TracedNode { op: Op::Reshape, inputs, .. }))
            | (Op::Broadcast, Some(TracedNode { op: Op::Broadcast, inputs, .. })) => (op, inputs.clone()),
            _ => (op, inputs),
        }
    }

    fn literal(&self, value: Value) -> Option<(Scalar, Dtype)> {
        literal(&self.graph, value)
    }

    /// The ops of a region, for the fusion around it to take anew.
    fn inline(&mut self, region: &Region, inputs: &[Value], specs: &[Spec]) -> SmallVec<[Value; 1]> {
        let shapes = inputs.iter().map(|&input| &self.graph.spec(input).shape[..]);
        let shape = region
            .shape(shapes.chain(specs.iter().map(|spec| &spec.shape[..])))
            .expect("the shapes of a region broadcast");
        let mut values: Vec<Value> = inputs.to_vec();
        for step in region.steps() {
            let (own, read) = region.shapes_of(step, &shape);
            let operands: Operands = (step.operands.iter())
                .map(|&operand| {
                    let dtype = self.graph.spec(values[operand]).dtype;
                    self.add(Op::Broadcast, smallvec![values[operand]], Spec::new(read.clone(), dtype))
                })
                .collect();
            values.push(self.add(step.op_for(shape.len()), operands, Spec::new(own, step.dtype)));
        }
        region.outputs().iter().map(|&output| values[output]).collect()
    }
}

/// The number that a value is everywhere, if it stands in the program.
pub(super) fn literal(graph: &TracedGraph, mut value: Value) -> Option<(Scalar, Dtype)> {
    loop {
        let maker = graph.maker(value)?;
        match &maker.op {
            // A number that is made of sizes is another one on other inputs.
            Op::Full(number) if maker.sizes.as_ref().is_none_or(|sizes| sizes.op.is_empty()) => {
                return Some((*number, maker.specs[0].dtype));
            }
            Op::Broadcast | Op::Reshape | Op::Transpose(_) | Op::Contiguous => value = maker.inputs[0],
            _ => return None,
        }
    }
}

/// Whether every value of `small` is one of `wide`.
fn holds(wide: Dtype, small: Dtype) -> bool {
    use Dtype::*;
    matches!(
        (wide, small),
        (F32, F16 | BF16 | Bool) | (F64, F16 | BF16 | F32 | Bool) | (F16 | BF16 | I32, Bool)
    )
}
