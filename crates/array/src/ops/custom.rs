//! Nodes with rules of their own.

use std::any::Any;
use std::fmt;

use super::{Grads, Jvp, Tangents, Vjp};
use crate::transforms::{forward_from, trace_from};
use crate::{Array, Error, Result};

/// Arrays for a batch of examples, and per array where the batch is: `None` if it is the same for
/// all examples.
pub type Batched = (Vec<Array>, Vec<Option<usize>>);

/// A function that brings its own meaning and gradient. It is expanded into other ops when it is
/// evaluated. [`crate::transforms::custom_function`] makes one from closures.
pub trait CustomOp: Any + fmt::Debug + Send + Sync {
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

    /// Tangents of the outputs, given those of the inputs (`None`: it has none). Unless a rule
    /// says otherwise, those of the expansion.
    fn jvp(&self, inputs: &[Array], tangents: &[Option<Array>]) -> Result<Vec<Option<Array>>> {
        let traced = trace_from(inputs, |index| tangents[index].is_some());
        let outputs = self.expand(&traced)?;
        let seeds = traced.into_iter().zip(tangents);
        let seeds = seeds.filter_map(|(input, tangent)| Some((input, tangent.clone()?))).collect();
        forward_from(seeds, &outputs)
    }

    /// The outputs for a batch of examples: `axes` says where the batch is in each input. `None`:
    /// there is no rule, and every part of this op (its meaning, its gradient, its tangents) is
    /// batched as any function would be.
    fn vmap(&self, inputs: &[Array], axes: &[Option<usize>]) -> Result<Option<Batched>> {
        let _ = (inputs, axes);
        Ok(None)
    }
}

pub(crate) fn custom_vjp(custom: &dyn CustomOp, rule: &Vjp) -> Result<Grads> {
    let outputs: Vec<Array> = (0..rule.cotangents.len()).map(|output| rule.output.sibling(output)).collect();
    let grads = custom.vjp(rule.inputs, &outputs, rule.cotangents)?;
    if grads.len() != rule.inputs.len() {
        return Err(Error::invalid(
            custom.name(),
            format!("the vjp rule gave {} gradients for {} inputs", grads.len(), rule.inputs.len()),
        ));
    }
    for (index, (grad, input)) in grads.iter().zip(rule.inputs).enumerate() {
        if let Some(grad) = grad
            && grad.shape() != input.shape()
        {
            return Err(Error::invalid(
                custom.name(),
                format!("the vjp rule gave {grad:?} for input {index} of {:?}", input.shape()),
            ));
        }
    }
    Ok(grads.into_iter().collect())
}

pub(crate) fn custom_jvp(custom: &dyn CustomOp, rule: &Jvp) -> Result<Tangents> {
    let tangents = custom.jvp(rule.inputs, rule.tangents)?;
    let outputs = rule.output.node().outputs();
    if tangents.len() != outputs {
        return Err(Error::invalid(
            custom.name(),
            format!("the jvp rule gave {} tangents for {outputs} outputs", tangents.len()),
        ));
    }
    for (output, tangent) in tangents.iter().enumerate() {
        let spec = rule.output.node().spec(output);
        if let Some(tangent) = tangent
            && tangent.shape() != spec.shape.as_slice()
        {
            return Err(Error::invalid(
                custom.name(),
                format!("the jvp rule gave {tangent:?} for output {output} of {:?}", spec.shape),
            ));
        }
    }
    Ok(tangents.into_iter().collect())
}
