//! The ops, a family a file: the functions that build nodes, their shape and dtype rules, and
//! their gradients. docs/adding-an-op.md is the recipe.

pub mod arrange;
pub mod assign;
pub mod create;
pub mod custom;
pub mod diagonal;
pub mod elementwise;
pub mod fast;
pub mod index;
pub mod layout;
pub mod linear;
pub mod predicates;
pub mod random;
pub mod reduce;
pub mod scan;
pub mod select;
pub mod shape;
pub mod sort;
pub mod statistics;
pub mod windows;

use smallvec::SmallVec;

use crate::{Array, Result};

/// Gradients of a node's inputs; `None` where there is none or nobody asked.
pub(crate) type Grads = SmallVec<[Option<Array>; 3]>;

/// What a gradient rule may look at.
pub(crate) struct Vjp<'a> {
    /// The node's inputs.
    pub inputs: &'a [Array],
    /// A handle on the node's first output; `sibling` gives the others.
    pub output: &'a Array,
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

    /// One gradient for the first input.
    pub fn one(&self, grad: Array) -> Result<Grads> {
        Ok(smallvec::smallvec![Some(grad)])
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
