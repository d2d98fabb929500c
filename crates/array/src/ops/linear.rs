//! Products: matmul, and linear maps by a weight that may be packed.

pub(crate) mod jvp;
pub(crate) mod vmap;

use smallvec::smallvec;

use super::{Grads, Vjp};
use crate::dtype::promote;
use crate::op::{Op, Precision, first_failure};
use crate::shape::{Shape, broadcast_shapes};
use crate::{Array, Dtype, Error, Result};

impl Array {
    /// Matrix product, NumPy's rules: the last two dimensions multiply, leading ones broadcast,
    /// one-dimensional arrays are a row or a column.
    pub fn matmul(&self, rhs: &Array) -> Result<Array> {
        self.matmul_with(rhs, Precision::Exact)
    }

    /// [`Array::matmul`] with products of another precision.
    pub fn matmul_with(&self, rhs: &Array, precision: Precision) -> Result<Array> {
        first_failure(&[self, rhs])?;
        if self.rank() == 0 || rhs.rank() == 0 {
            return Err(Error::invalid("matmul", "a number has no matrix product; use multiply"));
        }
        if self.rank() == 1 {
            return self.expand_dims(&[0])?.matmul_with(rhs, precision)?.squeeze(&[if rhs.rank() == 1 {
                0
            } else {
                -2
            }]);
        }
        if rhs.rank() == 1 {
            return self.matmul_with(&rhs.expand_dims(&[1])?, precision)?.squeeze(&[-1]);
        }
        if self.dim(-1) != rhs.dim(-2) {
            return Err(Error::invalid(
                "matmul",
                format!(
                    "last dimension of {:?} differs from second-to-last of {:?}",
                    self.shape(),
                    rhs.shape()
                ),
            ));
        }
        let dtype = promote(self.dtype(), rhs.dtype());
        if !dtype.is_inexact() {
            return Err(Error::dtype("matmul", "float arrays", dtype));
        }
        let (a, b) = (self.astype(dtype)?, rhs.astype(dtype)?);
        Array::product(&a, &b, dtype, precision)
    }

    /// Matrix product in `dtype`, which the operands promote to. For f32 one of them stays as it is if it has a half
    /// type, since kernels read it as fast.
    fn product(a: &Array, b: &Array, dtype: Dtype, precision: Precision) -> Result<Array> {
        let is_half = |array: &Array| matches!(array.dtype(), Dtype::BF16 | Dtype::F16);
        let stays = |array: &Array, other: &Array| dtype == Dtype::F32 && is_half(array) && !is_half(other);
        let fit = |array: &Array, other: &Array| {
            if stays(array, other) { Ok(array.clone()) } else { array.astype(dtype) }
        };
        let (a, b) = (&fit(a, b)?, &fit(b, a)?);
        let lead = broadcast_shapes("matmul", &a.shape()[..a.rank() - 2], &b.shape()[..b.rank() - 2])?;
        let extend = |array: &Array| {
            let mut shape = lead.clone();
            shape.extend_from_slice(&array.shape()[array.rank() - 2..]);
            array.broadcast_to(&shape)
        };
        let mut shape: Shape = lead.clone();
        shape.extend([a.dim(-2), b.dim(-1)]);
        Ok(Array::lazy(Op::Matmul { precision }, smallvec![extend(a)?, extend(b)?], shape, dtype))
    }

    /// x · wᵀ (+ bias): x [.., in], w [out, in] plain or packed, bias \[out\].
    ///
    /// The result has x's dtype. With [`Precision::Exact`] products are formed in x's dtype, f32
    /// for f32, over the dequantized weight.
    pub fn linear(&self, weight: &Array, bias: Option<&Array>, precision: Precision) -> Result<Array> {
        first_failure(&[self, weight])?;
        if !self.dtype().is_float() {
            return Err(Error::dtype("linear", "a float input", self.dtype()));
        }
        if weight.rank() != 2 || self.rank() == 0 || self.dim(-1) != weight.dim(1) {
            return Err(Error::invalid(
                "linear",
                format!("input {:?} does not fit a weight [out, in] of {:?}", self.shape(), weight.shape()),
            ));
        }
        let mut shape: Shape = self.shape().into();
        *shape.last_mut().expect("rank is not 0") = weight.dim(0);
        let y = Array::lazy(
            Op::Linear { precision },
            smallvec![self.dense()?, weight.clone()],
            shape,
            self.dtype(),
        );
        match bias {
            Some(bias) => y.add(bias.astype(self.dtype())?),
            None => Ok(y),
        }
    }

    /// y · w: y [.., out], w [out, in] plain or packed. The transpose of [`Array::linear`].
    pub fn linear_transposed(&self, weight: &Array, precision: Precision) -> Result<Array> {
        first_failure(&[self, weight])?;
        if weight.rank() != 2 || self.rank() == 0 || self.dim(-1) != weight.dim(0) {
            return Err(Error::invalid(
                "linear_transposed",
                format!("input {:?} does not fit a weight [out, in] of {:?}", self.shape(), weight.shape()),
            ));
        }
        let mut shape: Shape = self.shape().into();
        *shape.last_mut().expect("rank is not 0") = weight.dim(1);
        let inputs = smallvec![self.astype(Dtype::F32)?.dense()?, weight.clone()];
        Array::lazy(Op::LinearTransposed { precision }, inputs, shape, Dtype::F32).astype(self.dtype())
    }

    /// Rows of a weight [rows, width], plain or packed, as `dtype`: indices [..] → [.., width].
    pub fn embedding(weight: &Array, indices: &Array, dtype: Dtype) -> Result<Array> {
        first_failure(&[weight, indices])?;
        if weight.rank() != 2 || !indices.dtype().is_integer() {
            return Err(Error::invalid(
                "embedding",
                format!(
                    "needs a weight of two dimensions and integer indices, got {weight:?} and {indices:?}"
                ),
            ));
        }
        let mut shape: Shape = indices.shape().into();
        shape.push(weight.dim(1));
        Ok(Array::lazy(Op::Embedding, smallvec![weight.clone(), indices.clone()], shape, dtype))
    }

    /// A packed weight as a plain array of its dtype, as `mlx.core.dequantize` gives it; a plain one as it is.
    pub fn dequantize(&self) -> Result<Array> {
        self.dequantize_to(self.dtype())
    }

    /// A weight as a plain array of `dtype`. In f32 the values of a quantized weight are those that products use:
    /// scale times code is not rounded to the dtype of the scales.
    pub fn dequantize_to(&self, dtype: Dtype) -> Result<Array> {
        first_failure(&[self])?;
        match self.packed().as_deref() {
            None => self.astype(dtype),
            Some(weight) if weight.quantization().is_some() && dtype == Dtype::F32 => {
                Ok(Array::lazy(Op::Dequantize, smallvec![self.clone()], self.shape(), dtype))
            }
            Some(_) => {
                Array::lazy(Op::Dequantize, smallvec![self.clone()], self.shape(), self.dtype()).astype(dtype)
            }
        }
    }
}

pub(crate) fn matmul_vjp(precision: Precision, rule: &Vjp) -> Result<Grads> {
    let (a, b, ct) = (&rule.inputs[0], &rule.inputs[1], rule.cotangent());
    let mut grads = Grads::new();
    let dtype = promote(rule.output.dtype(), ct.dtype());
    let product = |a: &Array, b: &Array, of: &Array| {
        Array::product(a, b, dtype, precision)?.astype(promote(of.dtype(), ct.dtype()))
    };
    let turned = |array: &Array| array.unwidened().swap_axes(-1, -2);
    grads.push(if rule.needs[0] { Some(product(ct, &turned(b)?, a)?) } else { None });
    grads.push(if rule.needs[1] { Some(product(&turned(a)?, ct, b)?) } else { None });
    Ok(grads)
}

/// No gradient of a frozen weight is formed; a plain weight that is trained gets dYᵀ · X.
pub(crate) fn linear_vjp(precision: Precision, rule: &Vjp) -> Result<Grads> {
    let (x, weight, ct) = (&rule.inputs[0], &rule.inputs[1], rule.cotangent());
    let mut grads = Grads::new();
    grads.push(if rule.needs[0] { Some(ct.linear_transposed(weight, training(precision))?) } else { None });
    grads.push(if rule.needs[1] { Some(weight_gradient(ct, x, weight, precision)?) } else { None });
    Ok(grads)
}

pub(crate) fn linear_transposed_vjp(precision: Precision, rule: &Vjp) -> Result<Grads> {
    let (y, weight, ct) = (&rule.inputs[0], &rule.inputs[1], rule.cotangent());
    let mut grads = Grads::new();
    grads.push(if rule.needs[0] { Some(ct.linear(weight, None, training(precision))?) } else { None });
    grads.push(if rule.needs[1] { Some(weight_gradient(y, ct, weight, precision)?) } else { None });
    Ok(grads)
}

/// int8 products are for inference: under gradients they become bf16.
pub(crate) fn training(precision: Precision) -> Precision {
    if precision == Precision::Fast { Precision::Bf16 } else { precision }
}

/// rowsᵀ · columns, summed over all leading dimensions: [out, in].
fn weight_gradient(rows: &Array, columns: &Array, weight: &Array, precision: Precision) -> Result<Array> {
    if weight.packed().is_some() {
        return Err(Error::unsupported(
            "linear",
            "a packed weight is frozen; dequantize it to train it, or train an adapter",
        ));
    }
    let dtype = promote(rows.dtype(), columns.dtype());
    let flat = |array: &Array| array.reshape(&[-1, array.dim(-1) as i64]);
    let (rows, columns) = (flat(rows)?.transpose(&[])?, flat(&columns.unwidened())?);
    let product = Array::product(&rows, &columns, dtype, training(precision))?;
    product.astype(weight.dtype())
}

pub(crate) fn embedding_vjp(rule: &Vjp) -> Result<Grads> {
    let (weight, indices, ct) = (&rule.inputs[0], &rule.inputs[1], rule.cotangent());
    if weight.packed().is_some() {
        return Err(Error::unsupported("embedding", "a packed weight is frozen; dequantize it to train it"));
    }
    let grad = Array::scatter_add(ct, indices, 0, weight.dim(0))?.astype(weight.dtype())?;
    Ok(smallvec![Some(grad), None])
}

pub(crate) fn dequantize_vjp(rule: &Vjp) -> Result<Grads> {
    Err(Error::unsupported("dequantize", format!("a packed weight is frozen; got {:?}", rule.inputs[0])))
}
