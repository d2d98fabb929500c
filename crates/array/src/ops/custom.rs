//! Nodes with rules of their own.

use std::fmt;

use super::{Grads, Vjp};
use crate::{Array, Result};

/// A function that brings its own meaning and gradient. It is expanded into other ops when it is
/// evaluated.
pub trait CustomOp: fmt::Debug + Send + Sync {
    /// The name in messages and profiles.
    fn name(&self) -> &'static str;

    /// Whether the inputs are the outputs already; only the evaluator makes such a node.
    #[doc(hidden)]
    fn is_expanded(&self) -> bool {
        false
    }

    /// The outputs, built from the inputs.
    fn expand(&self, inputs: &[Array]) -> Result<Vec<Array>>;

    /// Gradients of the inputs, given those of the outputs (`None`: none arrived).
    fn vjp(
        &self,
        inputs: &[Array],
        outputs: &[Array],
        cotangents: &[Option<Array>],
    ) -> Result<Vec<Option<Array>>>;
}

pub(crate) fn custom_vjp(custom: &dyn CustomOp, rule: &Vjp) -> Result<Grads> {
    let outputs: Vec<Array> = (0..rule.cotangents.len()).map(|output| rule.output.sibling(output)).collect();
    Ok(custom.vjp(rule.inputs, &outputs, rule.cotangents)?.into_iter().collect())
}
