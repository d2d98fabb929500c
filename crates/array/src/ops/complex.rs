//! How gradients pass through functions of complex numbers.
//!
//! Gradients are adjoints, as in MLX: y = f(z) with a complex derivative f′ gives z the gradient
//! conj(f′) · ȳ, so that a step against the gradient of a real loss lowers it.

use super::{Grads, Vjp};
use crate::{Array, Dtype, Result};

/// Applies a gradient rule that is written for ȳ · f′ to complex arrays: conj(rule(conj ȳ)).
pub(crate) fn adjoint(rule: &Vjp, apply: impl Fn(&Vjp) -> Result<Grads>) -> Result<Grads> {
    if rule.output.dtype() != Dtype::C64 {
        return apply(rule);
    }
    let conjugate = |array: &Option<Array>| array.as_ref().map(Array::conjugate).transpose();
    let cotangents = rule.cotangents.iter().map(conjugate).collect::<Result<Vec<_>>>()?;
    let inner = Vjp { cotangents: &cotangents, ..*rule };
    apply(&inner)?.iter().map(conjugate).collect()
}
