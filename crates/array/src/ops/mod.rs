//! The ops, a family a file: the functions that build nodes, their shape and dtype rules, and
//! their rules for transformations: gradients beside the constructor, tangents in
//! `<family>/jvp.rs`, batches in `<family>/vmap.rs`. docs/adding-an-op.md is the recipe.

pub mod arrange;
pub mod assign;
pub mod complex;
pub mod conv;
pub mod create;
pub mod custom;
pub mod diagonal;
pub mod einsum;
pub mod elementwise;
pub mod experts;
pub mod fast;
pub mod fft;
pub mod index;
pub mod layout;
pub mod linalg;
pub mod linear;
pub mod predicates;
pub mod products;
pub mod quantized;
pub mod random;
pub mod reduce;
pub mod scan;
pub mod select;
pub mod shape;
pub mod sort;
pub mod statistics;
pub mod stft;
pub mod windows;

use smallvec::{SmallVec, smallvec};

use crate::node::Inputs;
use crate::op::Op;
use crate::shape::Shape;
use crate::{Array, Dtype, Result};

/// Gradients of a node's inputs; `None` where there is none or nobody asked.
pub(crate) type Grads = SmallVec<[Option<Array>; 3]>;

/// What a gradient rule may look at.
pub(crate) struct Vjp<'a> {
    /// The node's inputs.
    pub inputs: &'a [Array],
    /// A handle on the node's first output; `sibling` gives the others.
    pub output: &'a Array,
    /// Per output, what stands for it if it was saved in another dtype.
    pub saved_outputs: &'a [Option<Array>],
    /// Per output, the gradient that arrives, if any does.
    pub cotangents: &'a [Option<Array>],
    /// Per input, whether a gradient is needed.
    pub needs: &'a [bool],
}

impl Vjp<'_> {
    /// The gradient of the only output.
    pub fn cotangent(&self) -> &Array {
        self.cotangents[0].as_ref().expect("a rule runs only when a cotangent has arrived")
    }

    /// An output's values, as saved.
    pub fn values(&self, output: usize) -> Array {
        let saved = self.saved_outputs.get(output).cloned().flatten();
        saved.unwrap_or_else(|| self.output.sibling(output))
    }

    /// One gradient for the first input.
    pub fn one(&self, grad: Array) -> Result<Grads> {
        Ok(smallvec![Some(grad)])
    }

    /// A gradient for the first input and none for the others.
    pub fn first(&self, grad: Array) -> Result<Grads> {
        let mut grads = self.none()?;
        grads[0] = Some(grad);
        Ok(grads)
    }

    /// No gradients at all.
    pub fn none(&self) -> Result<Grads> {
        Ok(self.inputs.iter().map(|_| None).collect())
    }
}

/// Tangents of a node's outputs; `None` where there is none or nobody asked.
pub(crate) type Tangents = SmallVec<[Option<Array>; 1]>;

/// What a tangent rule may look at. It runs only if some input has a tangent.
pub(crate) struct Jvp<'a> {
    /// The node's inputs.
    pub inputs: &'a [Array],
    /// A handle on the node's first output; `sibling` gives the others.
    pub output: &'a Array,
    /// Per input its tangent, if it has one: of its shape and dtype.
    pub tangents: &'a [Option<Array>],
}

impl Jvp<'_> {
    /// One tangent for the first output.
    pub fn one(&self, tangent: Array) -> Result<Tangents> {
        Ok(smallvec![Some(tangent)])
    }

    /// No tangents at all: an op that is constant almost everywhere.
    pub fn none(&self) -> Result<Tangents> {
        Ok(SmallVec::from_elem(None, self.output.node().outputs()))
    }

    /// The tangent of an input, zeros if it has none.
    pub fn tangent(&self, input: usize) -> Array {
        self.tangents[input].clone().unwrap_or_else(|| self.inputs[input].zeros_like())
    }

    /// An op that is linear in this input, and constant in the others, applied to its tangent.
    pub fn linear(&self, input: usize, apply: impl FnOnce(&Array) -> Result<Array>) -> Result<Tangents> {
        match &self.tangents[input] {
            Some(tangent) => self.one(apply(tangent)?),
            None => self.none(),
        }
    }

    /// Σ over the inputs that have a tangent of what `part(input, tangent)` gives for it.
    pub fn sum(&self, part: impl Fn(usize, &Array) -> Result<Array>) -> Result<Tangents> {
        let part = |(index, tangent): (usize, &Option<Array>)| {
            tangent.as_ref().map(|tangent| part(index, tangent)).transpose()
        };
        let parts = self.tangents.iter().enumerate().map(part).collect::<Result<Vec<_>>>()?;
        self.sum_of(parts.into_iter())
    }

    /// The sum of the parts that there are, for the first output.
    pub fn sum_of(&self, parts: impl Iterator<Item = Option<Array>>) -> Result<Tangents> {
        let mut parts = parts.flatten();
        let Some(first) = parts.next() else { return self.none() };
        self.one(parts.try_fold(first, |sum, part| sum.add(part))?)
    }
}

/// What a batching rule may look at: a node that was built for one example, and its inputs for all
/// of them. Some input has a batch.
pub(crate) struct Vmap<'a> {
    /// The inputs; where `batched` holds, of all examples, with the batch as first dimension.
    pub inputs: &'a [Array],
    /// Per input, whether it differs between examples.
    pub batched: &'a [bool],
    /// How many examples there are.
    pub size: usize,
    /// The node for one example: shapes, dtypes, and which outputs anybody wants.
    pub node: &'a Array,
}

impl Vmap<'_> {
    /// An input with a batch: repeated, if it is the same for all examples.
    pub fn full(&self, input: usize) -> Result<Array> {
        let array = &self.inputs[input];
        if self.batched[input] {
            return Ok(array.clone());
        }
        array.broadcast_to(&self.with_batch(array.shape()))
    }

    /// All inputs with a batch.
    pub fn all(&self) -> Result<Inputs> {
        (0..self.inputs.len()).map(|input| self.full(input)).collect()
    }

    /// A shape of one example, for all.
    pub fn with_batch(&self, shape: &[usize]) -> Shape {
        let mut full: Shape = smallvec![self.size];
        full.extend_from_slice(shape);
        full
    }

    /// The shape of one example of an input.
    pub fn example(&self, input: usize) -> &[usize] {
        let shape = self.inputs[input].shape();
        if self.batched[input] { &shape[1..] } else { shape }
    }

    /// The dtype of the first output.
    pub fn dtype(&self) -> Dtype {
        self.node.node().spec(0).dtype
    }

    /// The node of an op with one output, with a batch.
    pub fn build(&self, op: Op, inputs: Inputs) -> Result<Array> {
        let spec = self.node.node().spec(0);
        Ok(Array::lazy(op, inputs, self.with_batch(&spec.shape), spec.dtype))
    }

    /// Whether an output will be read.
    pub fn wants(&self, output: usize) -> bool {
        self.node.node().wants(output)
    }
}
