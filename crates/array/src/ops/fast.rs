//! Fused ops with gradients of their own: norms, rotary positions, attention, short convolution,
//! the output head with its loss, an optimizer step.
//!
//! Layout: time comes before heads, `[batch, length, heads, head_dim]`, which is how a projection
//! leaves its result, so that a model needs no transposed copies. The functions in [`crate::fast`]
//! take MLX's `[batch, heads, length, head_dim]`.

pub(crate) mod definition;
pub(crate) mod jvp;
pub(crate) mod vmap;

use smallvec::smallvec;

use super::{Grads, Vjp};
use crate::op::{AdamWSpec, AttentionSpec, ConvSpec, CrossEntropySpec, Op, RopeSpec, first_failure};
use crate::shape::Shape;
use crate::storage::Spec;
use crate::{Array, Dtype, Error, Result};

impl Array {
    /// x / √(mean(x²) + eps) · weight over the last axis; weight \[width\].
    pub fn rms_norm(&self, weight: &Array, eps: f32) -> Result<Array> {
        first_failure(&[self, weight])?;
        check_norm("rms_norm", self, weight)?;
        Ok(Array::lazy(
            Op::RmsNorm { eps },
            smallvec![self.clone(), weight.clone()],
            self.shape(),
            self.dtype(),
        ))
    }

    /// (x − mean) / √(var + eps) · weight + bias over the last axis.
    pub fn layer_norm(&self, weight: &Array, bias: &Array, eps: f32) -> Result<Array> {
        first_failure(&[self, weight, bias])?;
        check_norm("layer_norm", self, weight)?;
        check_norm("layer_norm", self, bias)?;
        let inputs = smallvec![self.clone(), weight.clone(), bias.clone()];
        Ok(Array::lazy(Op::LayerNorm { eps }, inputs, self.shape(), self.dtype()))
    }

    /// Turns pairs of the last axis by position · frequency.
    ///
    /// Shapes: self [batch, length, heads, head_dim], `positions` [batch, length] i32,
    /// `frequencies` [dims / 2] f32.
    pub fn rope(&self, positions: &Array, frequencies: &Array, spec: RopeSpec) -> Result<Array> {
        first_failure(&[self, positions, frequencies])?;
        let fits = self.rank() == 4
            && positions.shape() == &self.shape()[..2]
            && frequencies.shape() == [spec.dims / 2]
            && spec.dims.is_multiple_of(2)
            && spec.dims <= self.dim(3);
        if !fits || positions.dtype() != Dtype::I32 || frequencies.dtype() != Dtype::F32 {
            return Err(Error::invalid(
                "rope",
                format!(
                    "needs x [batch, length, heads, head_dim], i32 positions [batch, length] and {} f32 frequencies, got {self:?}, {positions:?}, {frequencies:?}",
                    spec.dims / 2
                ),
            ));
        }
        let inputs = smallvec![self.clone(), positions.clone(), frequencies.clone()];
        Ok(Array::lazy(Op::Rope(spec), inputs, self.shape(), self.dtype()))
    }

    /// softmax(q · kᵀ · scale + mask) · v, never storing the scores.
    ///
    /// Shapes: q [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim];
    /// `key_start` [batch, queries] i32 is the first key that each query may see (packed
    /// sequences).
    pub fn attention(
        &self,
        k: &Array,
        v: &Array,
        key_start: Option<&Array>,
        spec: AttentionSpec,
    ) -> Result<Array> {
        first_failure(&[self, k, v])?;
        let fits = self.rank() == 4
            && k.rank() == 4
            && k.shape() == v.shape()
            && k.dim(0) == self.dim(0)
            && k.dim(3) == self.dim(3)
            && k.dim(2) > 0
            && self.dim(2).is_multiple_of(k.dim(2));
        if !fits {
            return Err(Error::invalid(
                "attention",
                format!("q {:?}, k {:?} and v {:?} do not fit together", self.shape(), k.shape(), v.shape()),
            ));
        }
        if let Some(starts) = key_start
            && (starts.shape() != &self.shape()[..2] || starts.dtype() != Dtype::I32)
        {
            return Err(Error::invalid(
                "attention",
                format!("key_start must be i32 [batch, queries], got {starts:?}"),
            ));
        }
        let dtype = self.dtype();
        let mut inputs = smallvec![self.clone(), k.astype(dtype)?, v.astype(dtype)?];
        inputs.extend(key_start.cloned());
        let spec = AttentionSpec { key_start: key_start.is_some(), ..spec };
        let lse: Shape = smallvec![self.dim(0), self.dim(2), self.dim(1)];
        let specs = vec![Spec::new(self.shape(), dtype), Spec::new(lse, Dtype::F32)];
        Ok(Array::lazy_many(Op::Attention(spec), inputs, specs))
    }

    /// Causal depthwise convolution: self [batch, length, channels], weight [channels, taps].
    ///
    /// `state` [batch, taps − 1, channels] are the inputs before the first; `starts`
    /// [batch, length] i32 is the first position of each position's own sequence (packing). Gives
    /// the output and the state after the last position.
    pub fn short_conv(
        &self,
        weight: &Array,
        state: Option<&Array>,
        starts: Option<&Array>,
    ) -> Result<(Array, Array)> {
        first_failure(&[self, weight])?;
        let fits =
            self.rank() == 3 && weight.rank() == 2 && weight.dim(0) == self.dim(2) && weight.dim(1) > 0;
        if !fits {
            return Err(Error::invalid(
                "short_conv",
                format!(
                    "needs x [batch, length, channels] and a weight [channels, taps], got {self:?} and {weight:?}"
                ),
            ));
        }
        let before: Shape = smallvec![self.dim(0), weight.dim(1) - 1, self.dim(2)];
        if let Some(state) = state
            && state.shape() != before.as_slice()
        {
            return Err(Error::shapes("short_conv", &state.shape().into(), &before));
        }
        if let Some(starts) = starts
            && (starts.shape() != &self.shape()[..2] || starts.dtype() != Dtype::I32)
        {
            return Err(Error::invalid(
                "short_conv",
                format!("starts must be i32 [batch, length], got {starts:?}"),
            ));
        }
        let mut inputs = smallvec![self.clone(), weight.clone()];
        for extra in [state, starts].into_iter().flatten() {
            inputs.push(extra.clone());
        }
        let spec = ConvSpec { state: state.is_some(), starts: starts.is_some() };
        let specs = vec![Spec::new(self.shape(), self.dtype()), Spec::new(before, self.dtype())];
        let y = Array::lazy_many(Op::ShortConv(spec), inputs, specs);
        let next = y.sibling(1);
        Ok((y, next))
    }

    /// Σ over rows of −log softmax(hidden · weightᵀ)\[target\], without storing logits.
    ///
    /// hidden [rows, width], weight [vocabulary, width] plain or packed, targets \[rows\] i32.
    /// Gives the sum, f32, and each row's log-probability.
    pub fn linear_cross_entropy(
        &self,
        weight: &Array,
        targets: &Array,
        spec: CrossEntropySpec,
    ) -> Result<(Array, Array)> {
        first_failure(&[self, weight, targets])?;
        let fits = self.rank() == 2
            && weight.rank() == 2
            && weight.dim(1) == self.dim(1)
            && targets.shape() == &self.shape()[..1]
            && targets.dtype() == Dtype::I32;
        if !fits {
            return Err(Error::invalid(
                "linear_cross_entropy",
                format!(
                    "needs hidden [rows, width], weight [vocabulary, width] and i32 targets [rows], got {self:?}, {weight:?}, {targets:?}"
                ),
            ));
        }
        let specs = vec![
            Spec::new(&[][..], Dtype::F32),
            Spec::new(targets.shape(), Dtype::F32),
            Spec::new(self.shape(), Dtype::F32),
            Spec::new(weight.shape(), Dtype::F32),
        ];
        let inputs = smallvec![self.astype(Dtype::F32)?.dense()?, weight.clone(), targets.dense()?];
        let sum = Array::lazy_many(Op::LinearCrossEntropy(spec), inputs, specs);
        let rows = sum.sibling(1);
        Ok((sum, rows))
    }

    /// One step of AdamW on a parameter: gives the parameter and its moments afterwards.
    pub fn adamw(
        &self,
        gradient: &Array,
        mean: &Array,
        square: &Array,
        spec: AdamWSpec,
    ) -> Result<[Array; 3]> {
        first_failure(&[self, gradient, mean, square])?;
        let gradient = gradient.astype(Dtype::F32)?;
        for other in [&gradient, mean, square] {
            if other.shape() != self.shape() || other.dtype() != Dtype::F32 {
                return Err(Error::invalid(
                    "adamw",
                    format!("{other:?} does not fit the parameter {self:?}"),
                ));
            }
        }
        let specs = vec![
            Spec::new(self.shape(), self.dtype()),
            Spec::new(self.shape(), Dtype::F32),
            Spec::new(self.shape(), Dtype::F32),
        ];
        let inputs = smallvec![self.clone(), gradient, mean.clone(), square.clone()];
        let parameter = Array::lazy_many(Op::AdamW(spec), inputs, specs);
        let moments = [parameter.sibling(1), parameter.sibling(2)];
        let [mean, square] = moments;
        Ok([parameter, mean, square])
    }
}

fn check_norm(op: &'static str, x: &Array, weight: &Array) -> Result<()> {
    if x.rank() == 0 || weight.shape() != [x.dim(-1)] || !x.dtype().is_float() {
        return Err(Error::invalid(op, format!("a weight of {:?} does not fit {x:?}", weight.shape())));
    }
    Ok(())
}

pub(crate) fn rms_norm_vjp(eps: f32, rule: &Vjp) -> Result<Grads> {
    let (x, weight, ct) = (&rule.inputs[0], &rule.inputs[1], rule.cotangent());
    let specs = vec![Spec::new(x.shape(), x.dtype()), Spec::new(weight.shape(), Dtype::F32)];
    let inputs = smallvec![x.clone(), weight.clone(), ct.clone()];
    let dx = Array::lazy_many(Op::RmsNormVjp { eps }, inputs, specs);
    let dweight = if rule.needs[1] { Some(dx.sibling(1).astype(weight.dtype())?) } else { None };
    Ok(smallvec![Some(dx), dweight])
}

pub(crate) fn layer_norm_vjp(eps: f32, rule: &Vjp) -> Result<Grads> {
    let (x, weight, bias, ct) = (&rule.inputs[0], &rule.inputs[1], &rule.inputs[2], rule.cotangent());
    let centred = x.subtract(x.mean(&[-1], true)?)?;
    let inverse = centred.square()?.mean(&[-1], true)?.add(eps)?.rsqrt()?;
    let normed = centred.multiply(&inverse)?;
    let weighted = ct.multiply(weight.astype(ct.dtype())?)?;
    let pulled = weighted.subtract(weighted.mean(&[-1], true)?)?;
    let along = normed.multiply(weighted.multiply(&normed)?.mean(&[-1], true)?)?;
    let dx = pulled.subtract(along)?.multiply(&inverse)?;
    let dweight = super::shape::sum_to(&ct.multiply(&normed)?, weight.shape())?.astype(weight.dtype())?;
    let dbias = super::shape::sum_to(ct, bias.shape())?.astype(bias.dtype())?;
    Ok(smallvec![Some(dx), Some(dweight), Some(dbias)])
}

pub(crate) fn rope_vjp(spec: &RopeSpec, rule: &Vjp) -> Result<Grads> {
    let mut grads =
        if rule.needs[2] { definition::vjp(&Op::Rope(spec.clone()), rule)? } else { rule.none()? };
    // The same whether the frequencies' is asked for or not: a checkpoint asks for those of all it captured.
    let back = RopeSpec { inverse: !spec.inverse, ..spec.clone() };
    grads[0] = Some(rule.cotangent().rope(&rule.inputs[1], &rule.inputs[2], back)?);
    Ok(grads)
}

pub(crate) fn attention_vjp(spec: &AttentionSpec, rule: &Vjp) -> Result<Grads> {
    if rule.cotangents[1].is_some() {
        return definition::vjp(&Op::Attention(spec.clone()), rule);
    }
    let (q, k, v) = (&rule.inputs[0], &rule.inputs[1], &rule.inputs[2]);
    let mut inputs = smallvec![
        q.clone(),
        k.clone(),
        v.clone(),
        rule.values(0),
        rule.values(1),
        rule.cotangent().astype(q.dtype())?,
    ];
    inputs.extend(rule.inputs.get(3).cloned());
    let specs = [q, k, v].map(|input| Spec::new(input.shape(), input.dtype())).to_vec();
    let dq = Array::lazy_many(Op::AttentionVjp(spec.clone()), inputs, specs);
    let (dk, dv) = (dq.sibling(1), dq.sibling(2));
    Ok(smallvec![Some(dq), Some(dk), Some(dv), None])
}

pub(crate) fn short_conv_vjp(spec: &ConvSpec, rule: &Vjp) -> Result<Grads> {
    if spec.state || rule.cotangents[1].is_some() {
        return definition::vjp(&Op::ShortConv(*spec), rule);
    }
    let (x, weight) = (&rule.inputs[0], &rule.inputs[1]);
    let mut inputs = smallvec![x.clone(), weight.clone(), rule.cotangent().clone()];
    inputs.extend(rule.inputs.get(2).cloned());
    let specs = vec![Spec::new(x.shape(), x.dtype()), Spec::new(weight.shape(), Dtype::F32)];
    let dx = Array::lazy_many(Op::ShortConvVjp(*spec), inputs, specs);
    let dweight = if rule.needs[1] { Some(dx.sibling(1).astype(weight.dtype())?) } else { None };
    Ok(smallvec![Some(dx), dweight, None])
}

/// The gradients for a cotangent of one were formed on the way; whoever asks for more, the
/// log-probabilities' gradient or a second derivative, gets the definition's, with all logits.
pub(crate) fn linear_cross_entropy_vjp(op: &Op, rule: &Vjp) -> Result<Grads> {
    if rule.cotangents[1..].iter().any(Option::is_some) {
        return definition::vjp(op, rule);
    }
    let Some(ct) = &rule.cotangents[0] else { return rule.none() };
    let (hidden, weight) = (&rule.inputs[0], &rule.inputs[1]);
    if rule.needs[1] && weight.packed().is_some() {
        return Err(Error::unsupported(
            "linear_cross_entropy",
            "a packed weight is frozen; dequantize it to train it",
        ));
    }
    let scaled = |output: usize, dtype: Dtype| rule.output.sibling(output).multiply(ct)?.astype(dtype);
    let dhidden = if rule.needs[0] { Some(scaled(2, hidden.dtype())?) } else { None };
    let dweight = if rule.needs[1] { Some(scaled(3, weight.dtype())?) } else { None };
    Ok(smallvec![dhidden, dweight, None])
}
