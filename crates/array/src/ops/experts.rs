//! Linear maps by the weights of experts, of which indices choose.

use smallvec::smallvec;

use super::linear::training;
use super::products::{matrix_indices, sum_by_matrix};
use super::{Grads, Jvp, Tangents, Vjp};
use crate::op::{Op, Precision, first_failure};
use crate::shape::{Shape, broadcast_shapes, size_of};
use crate::{Array, Dtype, Error, Result};

const NAME: &str = "gather_linear";

impl Array {
    /// x · wᵀ with the x [.., m, in] and the w of [experts, out, in], plain or packed, that flat indices over leading
    /// dimensions name: [indices, m, out]. The indices broadcast; without them matrices come in order.
    ///
    /// A token in `k` of its experts: x [tokens, 1, 1, in], `rhs_indices` [tokens, k], result [tokens, k, 1, out].
    /// As with [`Array::linear`] the result has x's dtype, and packed experts are frozen. Rows that are routed to the
    /// same expert are multiplied together, and each has the bits of its product alone (of a row in half precision by a
    /// quantized weight: of its product as f32, rounded).
    pub fn gather_linear(
        &self,
        weight: &Array,
        lhs_indices: Option<&Array>,
        rhs_indices: Option<&Array>,
        precision: Precision,
    ) -> Result<Array> {
        self.gather_linear_either(weight, lhs_indices, rhs_indices, (precision, false))
    }

    /// The same, or x [.., m, out] · w if transposed.
    pub(crate) fn gather_linear_either(
        &self,
        weight: &Array,
        lhs_indices: Option<&Array>,
        rhs_indices: Option<&Array>,
        (precision, transposed): (Precision, bool),
    ) -> Result<Array> {
        first_failure(&[self, weight])?;
        if !self.dtype().is_float() {
            return Err(Error::dtype(NAME, "a float input", self.dtype()));
        }
        if self.rank() == 1 {
            let rows = self.expand_dims(&[0])?;
            let product =
                rows.gather_linear_either(weight, lhs_indices, rhs_indices, (precision, transposed))?;
            return product.squeeze(&[-2]);
        }
        let (inner, outer) = if transposed { (1, 2) } else { (2, 1) };
        let fits = weight.rank() == 3 && weight.dtype().is_float() && self.rank() > 1;
        if !fits || self.dim(-1) != weight.dim(inner) {
            return Err(Error::invalid(
                NAME,
                format!("input {self:?} does not fit weights [experts, out, in] of {weight:?}"),
            ));
        }
        let quantized = weight.packed().is_some_and(|packed| packed.is_quantized());
        if transposed && precision == Precision::Fast && quantized {
            return Err(Error::invalid(NAME, "precision fast is for inference: expected bf16 or exact"));
        }
        let lhs = matrix_indices(NAME, self, lhs_indices)?;
        let right = matrix_indices(NAME, weight, rhs_indices)?;
        let lead = broadcast_shapes(NAME, lhs.shape(), right.shape())?;
        let rank = self.rank();
        let flat: Shape = smallvec![size_of(&self.shape()[..rank - 2]), self.dim(-2), self.dim(-1)];
        let mut shape = lead.clone();
        shape.extend([self.dim(-2), weight.dim(outer)]);
        let inputs = smallvec![
            self.reshape_to(&flat)?.dense()?,
            weight.clone(),
            lhs.broadcast_to(&lead)?.contiguous()?,
            right.broadcast_to(&lead)?.contiguous()?
        ];
        Ok(Array::lazy(Op::GatherLinear { precision, transposed }, inputs, shape, self.dtype()))
    }
}

/// The rows' gradients are products with the same experts. Those of plain weights are sums over the rows of each, in
/// the dtype of the rows, whatever the precision of the products is.
pub(crate) fn gather_linear_vjp((precision, transposed): (Precision, bool), rule: &Vjp) -> Result<Grads> {
    let [x, weight, lhs, rhs] = rule.inputs else {
        return rule.none();
    };
    let (lhs, rhs) = (lhs.flatten()?, rhs.flatten()?);
    let ct = rule.cotangent();
    let ct = ct.reshape_to(&[lhs.size(), ct.dim(-2), ct.dim(-1)])?;
    let mut grads: Grads = smallvec![None, None, None, None];
    if rule.needs[0] {
        let each = Array::arange(0.0, lhs.size() as f64, 1.0, Dtype::U32)?;
        let how = (training(precision), !transposed);
        let parts = ct.gather_linear_either(weight, Some(&each), Some(&rhs), how)?;
        grads[0] = Some(Array::scatter_add(&parts, &lhs, 0, x.dim(0))?.astype(x.dtype())?);
    }
    if rule.needs[1] {
        if weight.packed().is_some() {
            return Err(Error::unsupported(
                NAME,
                "packed experts are frozen; dequantize them to train them, or train an adapter",
            ));
        }
        let sums = sum_by_matrix([x, &ct], [&lhs, &rhs], weight.dim(0))?.astype(weight.dtype())?;
        grads[1] = Some(if transposed { sums } else { sums.swap_axes(1, 2)? });
    }
    Ok(grads)
}

pub(crate) fn gather_linear_jvp((precision, transposed): (Precision, bool), rule: &Jvp) -> Result<Tangents> {
    let how = (training(precision), transposed);
    let (x, weight) = (&rule.inputs[0], &rule.inputs[1]);
    let indices = (Some(&rule.inputs[2]), Some(&rule.inputs[3]));
    rule.sum(|index, tangent| match index {
        0 => tangent.gather_linear_either(weight, indices.0, indices.1, how),
        _ => x.gather_linear_either(tangent, indices.0, indices.1, how),
    })
}
