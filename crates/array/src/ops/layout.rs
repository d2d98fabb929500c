//! The same memory seen in another way: other dtypes, other strides, parts of complex numbers.

use smallvec::smallvec;

use super::{Grads, Jvp, Tangents, Vjp, Vmap};
use crate::op::{Op, first_failure};
use crate::shape::{Shape, Strides};
use crate::{Array, Dtype, Error, Result};

impl Array {
    /// The same bytes as elements of another dtype. Between dtypes of different sizes the last
    /// dimension becomes longer or shorter.
    pub fn view(&self, dtype: Dtype) -> Result<Array> {
        first_failure(&[self])?;
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        let (from, to) = (self.dtype().size(), dtype.size());
        let mut shape: Shape = self.shape().into();
        if from == to {
            return Ok(Array::lazy(Op::Bitcast, smallvec![self.clone()], shape, dtype));
        }
        let fits = shape.last().is_some_and(|&last| (last * from).is_multiple_of(to));
        if !fits {
            return Err(Error::invalid(
                "view",
                format!(
                    "{} of {:?} as {dtype}: the last dimension must be a whole number of elements",
                    self.dtype(),
                    self.shape()
                ),
            ));
        }
        let last = shape.len() - 1;
        shape[last] = shape[last] * from / to;
        Ok(Array::lazy(Op::Bitcast, smallvec![self.contiguous()?], shape, dtype))
    }

    /// The elements of this array, as if it were contiguous, through other strides (in elements),
    /// beginning with element `offset`. Nothing is copied; elements may be seen several times.
    pub fn as_strided(&self, shape: &[usize], strides: &[i64], offset: usize) -> Result<Array> {
        first_failure(&[self])?;
        if strides.len() != shape.len() {
            return Err(Error::invalid(
                "as_strided",
                format!("needs a stride per dimension, got shape {shape:?} and strides {strides:?}"),
            ));
        }
        if !shape.contains(&0) {
            let reach = |positive: bool| -> i128 {
                let steps = shape.iter().zip(strides).filter(|&(_, &stride)| (stride > 0) == positive);
                steps.map(|(&size, &stride)| (size as i128 - 1) * stride as i128).sum()
            };
            let (low, high) = (offset as i128 + reach(false), offset as i128 + reach(true));
            if low < 0 || high >= self.size() as i128 {
                return Err(Error::invalid(
                    "as_strided",
                    format!(
                        "shape {shape:?}, strides {strides:?} and offset {offset} reach elements {low} to \
                         {high}, the array has {}",
                        self.size()
                    ),
                ));
            }
        }
        let strides: Strides = strides.iter().map(|&stride| stride as isize).collect();
        let op = Op::AsStrided { strides, offset };
        Ok(Array::lazy(op, smallvec![self.contiguous()?], shape, self.dtype()))
    }

    /// A complex array of real and imaginary parts.
    pub fn complex(real: &Array, imaginary: &Array) -> Result<Array> {
        let shape = crate::shape::broadcast_shapes("complex", real.shape(), imaginary.shape())?;
        let part = |x: &Array| x.astype(Dtype::F32)?.broadcast_to(&shape);
        let pairs = Array::stack(&[part(real)?, part(imaginary)?], -1)?;
        pairs.view(Dtype::C64)?.squeeze(&[-1])
    }

    /// The real part; of an array that is not complex, itself.
    pub fn real(&self) -> Result<Array> {
        if self.dtype() == Dtype::C64 { self.part(0) } else { Ok(self.clone()) }
    }

    /// The imaginary part; of an array that is not complex, zeros.
    pub fn imag(&self) -> Result<Array> {
        if self.dtype() == Dtype::C64 { self.part(1) } else { Ok(self.zeros_like()) }
    }

    /// The number with the sign of its imaginary part changed; of an array that is not complex,
    /// itself.
    pub fn conjugate(&self) -> Result<Array> {
        if self.dtype() != Dtype::C64 {
            return Ok(self.clone());
        }
        Array::complex(&self.real()?, &self.imag()?.negative()?)
    }

    fn part(&self, which: usize) -> Result<Array> {
        let pairs = self.expand_dims(&[-1])?.view(Dtype::F32)?;
        pairs.narrow(-1, which, which + 1)?.squeeze(&[-1])
    }
}

/// A view is a permutation of bytes, so the gradient goes through the same one: between real and
/// complex numbers that is the gradient of the parts. Bits of anything else have none.
pub(crate) fn bitcast_vjp(rule: &Vjp) -> Result<Grads> {
    let to = rule.inputs[0].dtype();
    let parts = |dtype: Dtype| matches!(dtype, Dtype::F32 | Dtype::C64);
    if !parts(to) || !parts(rule.output.dtype()) {
        return rule.none();
    }
    rule.one(rule.cotangent().view(to)?)
}

pub(crate) fn as_strided_vjp(strides: &[isize], offset: usize, rule: &Vjp) -> Result<Grads> {
    let (x, ct) = (&rule.inputs[0], rule.cotangent());
    // The row-major number of the element behind each place of the result.
    let mut places = Array::full(&[], offset as f64, Dtype::I64);
    for (&size, &stride) in ct.shape().iter().zip(strides) {
        let steps = Array::arange(0.0, size as f64, 1.0, Dtype::I64)?.multiply(stride as i64)?;
        places = places.expand_dims(&[-1])?.add(steps)?;
    }
    let flat = Array::scatter_add(&ct.flatten()?, &places.flatten()?, 0, x.size())?;
    rule.one(flat.reshape(&x.shape().iter().map(|&size| size as i64).collect::<Vec<_>>())?)
}

/// As the gradient: the parts of complex numbers have tangents, other bits none.
pub(crate) fn bitcast_jvp(rule: &Jvp) -> Result<Tangents> {
    let parts = |dtype: Dtype| matches!(dtype, Dtype::F32 | Dtype::C64);
    let to = rule.output.dtype();
    if !parts(to) || !parts(rule.inputs[0].dtype()) {
        return rule.none();
    }
    rule.linear(0, |tangent| tangent.view(to))
}

/// The examples follow one another, each of the input's size.
pub(crate) fn as_strided_vmap(strides: &Strides, offset: usize, rule: &Vmap) -> Result<Array> {
    let example: usize = rule.example(0).iter().product();
    let mut all: Strides = smallvec![example as isize];
    all.extend_from_slice(strides);
    rule.build(Op::AsStrided { strides: all, offset }, smallvec![rule.full(0)?.contiguous()?])
}
