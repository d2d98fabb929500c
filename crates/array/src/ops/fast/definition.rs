//! The fused ops as compositions of other ops: what transformations look at where a fused op has
//! no rule of its own.
//!
//! Second derivatives come from here: the gradient op of a fused op is one step of arithmetic like
//! any other, and its composition is differentiated. Attention's definition holds all scores in
//! memory, which the fused op exists to avoid: that is the price of a second derivative.

use smallvec::{SmallVec, smallvec};

use crate::op::{AdamWSpec, AttentionSpec, ConvSpec, CrossEntropySpec, Op, RopeSpec};
use crate::ops::{Grads, Jvp, Tangents, Vjp, Vmap};
use crate::shape::Shape;
use crate::transforms::{Mapped, backward, batch, forward_from, trace_from};
use crate::{Array, Dtype, Error, Result};

/// Gradients through the definition.
pub(crate) fn vjp(op: &Op, rule: &Vjp) -> Result<Grads> {
    let traced = trace_from(rule.inputs, |index| rule.needs[index]);
    let outputs = define(op, &traced, |output| rule.cotangents[output].is_some())?;
    let seeds = outputs.into_iter().zip(rule.cotangents);
    let seeds = seeds.filter_map(|(output, cotangent)| Some((output?, cotangent.clone()?))).collect();
    let needed = |index: &usize| rule.needs[*index] && traced[*index].dtype().is_inexact();
    let targets: Vec<Array> = (0..traced.len()).filter(needed).map(|index| traced[index].clone()).collect();
    let mut grads = backward(seeds, &targets)?.into_iter();
    Ok((0..traced.len()).map(|index| if needed(&index) { grads.next() } else { None }).collect())
}

/// Tangents through the definition.
pub(crate) fn jvp(op: &Op, rule: &Jvp) -> Result<Tangents> {
    let traced = trace_from(rule.inputs, |index| rule.tangents[index].is_some());
    let node = rule.output.node();
    let outputs = define(op, &traced, |output| node.wants(output))?;
    let seeds = traced.into_iter().zip(rule.tangents);
    let seeds = seeds.filter_map(|(input, tangent)| Some((input, tangent.clone()?))).collect();
    let wanted: Vec<Array> = outputs.iter().flatten().cloned().collect();
    let mut found = forward_from(seeds, &wanted)?.into_iter();
    Ok(outputs.iter().map(|output| output.as_ref().and_then(|_| found.next().flatten())).collect())
}

/// The definition on a batch.
pub(crate) fn vmap(op: &Op, rule: &Vmap) -> Result<SmallVec<[Option<Mapped>; 1]>> {
    let count = rule.node.node().outputs();
    let define = |inputs: &[Array]| {
        Ok(define(op, inputs, |output| rule.wants(output))?.into_iter().flatten().collect::<Vec<Array>>())
    };
    let mut mapped = batch(define, rule.inputs, rule.batched, rule.size)?.into_iter();
    Ok((0..count).map(|output| rule.wants(output).then(|| mapped.next()).flatten()).collect())
}

/// The outputs of a fused op that are wanted, by ops that have rules.
fn define(op: &Op, inputs: &[Array], wants: impl Fn(usize) -> bool) -> Result<Vec<Option<Array>>> {
    let outputs: Vec<Option<Array>> = match op {
        Op::RmsNorm { eps } => vec![Some(rms_norm(*eps, inputs)?)],
        Op::RmsNormVjp { eps } => rms_norm_vjp(*eps, inputs, &wants)?.into(),
        Op::LayerNorm { eps } => vec![Some(layer_norm(*eps, inputs)?)],
        Op::Rope(spec) => vec![Some(rope(spec, inputs)?)],
        Op::Attention(spec) => attention(spec, inputs)?.map(Some).into(),
        Op::AttentionVjp(spec) => attention_vjp(spec, inputs)?.map(Some).into(),
        Op::ShortConv(spec) => short_conv(*spec, inputs)?.map(Some).into(),
        Op::ShortConvVjp(spec) => short_conv_vjp(*spec, inputs, &wants)?.into(),
        Op::LinearCrossEntropy(spec) => linear_cross_entropy(spec, inputs, &wants)?.into(),
        Op::AdamW(spec) => adamw(spec, inputs)?.map(Some).into(),
        _ => return Err(Error::Kernel(format!("{} is no composition", op.name()).into())),
    };
    Ok(outputs.into_iter().enumerate().map(|(index, output)| output.filter(|_| wants(index))).collect())
}

/// The dtype that fused ops compute in.
fn wide(dtype: Dtype) -> Dtype {
    if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 }
}

/// 1 / √(mean of squares + eps), and a gradient or value in the wide type.
fn inverse_rms(x: &Array, eps: f32) -> Result<Array> {
    x.square()?.mean(&[-1], true)?.add(eps)?.rsqrt()
}

fn rms_norm(eps: f32, inputs: &[Array]) -> Result<Array> {
    let dtype = wide(inputs[0].dtype());
    let (x, weight) = (inputs[0].astype(dtype)?, inputs[1].astype(dtype)?);
    x.multiply(inverse_rms(&x, eps)?)?.multiply(weight)?.astype(inputs[0].dtype())
}

/// Inputs x, weight, dy; outputs dx, dweight.
fn rms_norm_vjp(eps: f32, inputs: &[Array], wants: impl Fn(usize) -> bool) -> Result<[Option<Array>; 2]> {
    let dtype = wide(inputs[0].dtype());
    let (x, weight, dy) = (inputs[0].astype(dtype)?, inputs[1].astype(dtype)?, inputs[2].astype(dtype)?);
    let inverse = inverse_rms(&x, eps)?;
    let normed = x.multiply(&inverse)?;
    let weighted = dy.multiply(weight)?;
    let along = normed.multiply(weighted.multiply(&normed)?.mean(&[-1], true)?)?;
    let dx = weighted.subtract(along)?.multiply(inverse)?.astype(inputs[0].dtype())?;
    let dweight = || -> Result<Array> {
        super::super::shape::sum_to(&dy.multiply(&normed)?, inputs[1].shape())?.astype(Dtype::F32)
    };
    Ok([Some(dx), if wants(1) { Some(dweight()?) } else { None }])
}

fn layer_norm(eps: f32, inputs: &[Array]) -> Result<Array> {
    let dtype = wide(inputs[0].dtype());
    let (x, weight, bias) = (inputs[0].astype(dtype)?, inputs[1].astype(dtype)?, inputs[2].astype(dtype)?);
    let centred = x.subtract(x.mean(&[-1], true)?)?;
    let normed = centred.multiply(inverse_rms(&centred, eps)?)?;
    normed.multiply(weight)?.add(bias)?.astype(inputs[0].dtype())
}

/// x [batch, length, heads, head_dim], positions [batch, length], frequencies [dims / 2]; angles
/// are formed in f32.
fn rope(spec: &RopeSpec, inputs: &[Array]) -> Result<Array> {
    let dtype = wide(inputs[0].dtype());
    let x = inputs[0].astype(dtype)?;
    let half = spec.dims / 2;
    let angles = inputs[1].astype(Dtype::F32)?.expand_dims(&[2])?.multiply(&inputs[2])?;
    let angles = angles.expand_dims(&[2])?.astype(dtype)?;
    let (cos, sin) = (angles.cos()?.multiply(spec.scale)?, angles.sin()?.multiply(spec.scale)?);
    let sin = if spec.inverse { sin.negative()? } else { sin };
    let turn = |p: &Array, q: &Array| -> Result<[Array; 2]> {
        Ok([p.multiply(&cos)?.subtract(q.multiply(&sin)?)?, p.multiply(&sin)?.add(q.multiply(&cos)?)?])
    };
    let turned = x.narrow(-1, 0, spec.dims)?;
    let turned = if spec.traditional {
        let pairs = turned.unflatten(-1, &[half as i64, 2])?;
        let side = |index: usize| pairs.narrow(-1, index, index + 1)?.squeeze(&[-1]);
        Array::stack(&turn(&side(0)?, &side(1)?)?, -1)?.flatten_axes(-2, -1)?
    } else {
        Array::concatenate(&turn(&turned.narrow(-1, 0, half)?, &turned.narrow(-1, half, spec.dims)?)?, -1)?
    };
    if spec.dims == x.dim(-1) {
        return turned.astype(inputs[0].dtype());
    }
    let rest = x.narrow(-1, spec.dims, x.dim(-1))?;
    Array::concatenate(&[turned, rest], -1)?.astype(inputs[0].dtype())
}

/// Scores [batch, kv_heads, group, queries, keys] before and after masking, and what they are made
/// of: q, k and v with heads first.
struct Scores {
    q: Array,
    k: Array,
    v: Array,
    masked: Array,
    /// Derivative of a score by the product of its vectors; one without a soft cap.
    slope: Option<Array>,
    /// Whether a query sees any key at all: [.., queries, 1].
    sees: Array,
}

/// Takes heads [batch, length, heads, dim] to [batch, kv_heads, group, length, dim].
fn grouped(x: &Array, kv_heads: usize) -> Result<Array> {
    let [batch, length, heads, dim] = [x.dim(0), x.dim(1), x.dim(2), x.dim(3)];
    let shape: Shape = smallvec![batch, length, kv_heads, heads / kv_heads, dim];
    x.reshape_to(&shape)?.transpose(&[0, 2, 3, 1, 4])
}

fn ungrouped(x: &Array) -> Result<Array> {
    x.transpose(&[0, 3, 1, 2, 4])?.flatten_axes(2, 3)
}

fn scores(spec: &AttentionSpec, q: &Array, k: &Array, v: &Array, starts: Option<&Array>) -> Result<Scores> {
    let dtype = wide(q.dtype());
    let kv_heads = k.dim(2);
    let (queries, keys) = (q.dim(1), k.dim(1));
    let q = grouped(&q.astype(dtype)?, kv_heads)?;
    let (k, v) = (grouped(&k.astype(dtype)?, kv_heads)?, grouped(&v.astype(dtype)?, kv_heads)?);
    let raw = q.matmul_with(&k.swap_axes(-1, -2)?, spec.precision)?.multiply(spec.scale)?;
    let (score, slope) = match spec.softcap {
        None => (raw, None),
        Some(cap) => {
            let tanh = raw.divide(cap)?.tanh()?;
            (tanh.multiply(cap)?, Some(tanh.square()?.negative()?.add(1.0)?))
        }
    };
    // Query t stands at key t + keys − queries.
    let own = Array::arange(0.0, queries as f64, 1.0, Dtype::I32)?
        .add(keys as i32 - queries.min(keys) as i32)?
        .expand_dims(&[1])?;
    let place = Array::arange(0.0, keys as f64, 1.0, Dtype::I32)?;
    let mut visible = Array::ones(&[queries, keys], Dtype::Bool);
    if spec.causal {
        visible = visible.logical_and(place.less_equal(&own)?)?;
    }
    if let Some(window) = spec.window {
        visible = visible.logical_and(place.greater(own.subtract(window as i32)?)?)?;
    }
    if let Some(starts) = starts {
        let starts = starts.expand_dims(&[1, 2, 4])?;
        visible = visible.logical_and(place.greater_equal(starts)?)?;
    }
    let sees = visible.any(&[-1], true)?;
    let masked = Array::select(&visible, &score, f64::NEG_INFINITY)?;
    Ok(Scores { q, k, v, masked, slope, sees })
}

/// softmax over the keys; zeros for a query that sees none.
fn weights(scores: &Scores) -> Result<Array> {
    // Without this a row of −∞ alone would be 0 / 0.
    let safe = Array::select(&scores.sees, &scores.masked, 0.0)?;
    Array::select(&scores.sees, &safe.softmax(-1)?, 0.0)
}

/// Outputs: the result and the log-sum-exp.
fn attention(spec: &AttentionSpec, inputs: &[Array]) -> Result<[Array; 2]> {
    let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
    let scores = scores(spec, q, k, v, inputs.get(3))?;
    let out = weights(&scores)?.matmul_with(&scores.v, spec.precision)?;
    let safe = Array::select(&scores.sees, &scores.masked, 0.0)?;
    let lse = Array::select(&scores.sees, &safe.logsumexp(-1, true)?, f64::NEG_INFINITY)?;
    let lse = lse.squeeze(&[-1])?.flatten_axes(1, 2)?.astype(Dtype::F32)?;
    Ok([ungrouped(&out)?.astype(q.dtype())?, lse])
}

/// Inputs q, k, v, out, lse, dout, (key_start); outputs dq, dk, dv. The result and the log-sum-exp
/// are functions of q, k and v, and are formed anew, so that a derivative knows.
fn attention_vjp(spec: &AttentionSpec, inputs: &[Array]) -> Result<[Array; 3]> {
    let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
    let scores = scores(spec, q, k, v, inputs.get(6))?;
    let dout = grouped(&inputs[5].astype(scores.q.dtype())?, k.dim(2))?;
    let weights = weights(&scores)?;
    let dweights = dout.matmul_with(&scores.v.swap_axes(-1, -2)?, spec.precision)?;
    let delta = weights.multiply(&dweights)?.sum(&[-1], true)?;
    let mut dscores = weights.multiply(dweights.subtract(delta)?)?;
    if let Some(slope) = &scores.slope {
        dscores = dscores.multiply(slope)?;
    }
    let dscores = dscores.multiply(spec.scale)?;
    // Heads of a group share their keys and values.
    let shared = |x: Array| x.sum(&[2], true);
    let dq = dscores.matmul_with(&scores.k, spec.precision)?;
    let dk = shared(dscores.swap_axes(-1, -2)?.matmul_with(&scores.q, spec.precision)?)?;
    let dv = shared(weights.swap_axes(-1, -2)?.matmul_with(&dout, spec.precision)?)?;
    Ok([
        ungrouped(&dq)?.astype(q.dtype())?,
        ungrouped(&dk)?.astype(k.dtype())?,
        ungrouped(&dv)?.astype(v.dtype())?,
    ])
}

/// x with what comes before it (the state, or zeros), and per tap the mask of places at which it
/// reads within its sequence, if there is one.
struct Taps {
    /// [batch, taps − 1 + length, channels]
    padded: Array,
    length: usize,
    count: usize,
    starts: Option<Array>,
    state: bool,
}

impl Taps {
    fn new(
        spec: ConvSpec,
        x: &Array,
        count: usize,
        state: Option<&Array>,
        starts: Option<&Array>,
    ) -> Result<Taps> {
        let before: Shape = smallvec![x.dim(0), count - 1, x.dim(2)];
        let before = match state {
            Some(state) => state.astype(x.dtype())?,
            None => Array::zeros(&before, x.dtype()),
        };
        let padded = Array::concatenate(&[before, x.clone()], 1)?;
        Ok(Taps { padded, length: x.dim(1), count, starts: starts.cloned(), state: spec.state })
    }

    /// What a tap reads at every position: [batch, length, channels].
    fn read(&self, tap: usize) -> Result<Array> {
        let read = self.padded.narrow(1, tap, tap + self.length)?;
        match self.mask(tap)? {
            Some(mask) => Array::select(&mask, &read, 0.0),
            None => Ok(read),
        }
    }

    fn mask(&self, tap: usize) -> Result<Option<Array>> {
        let Some(starts) = &self.starts else { return Ok(None) };
        let back = (self.count - 1 - tap) as i32;
        let place = Array::arange(0.0, self.length as f64, 1.0, Dtype::I32)?.subtract(back)?;
        let mut inside = place.greater_equal(starts)?;
        if self.state {
            inside = inside.logical_or(starts.equal(0)?)?;
        }
        inside.expand_dims(&[2]).map(Some)
    }
}

/// Column `tap` of a weight [channels, taps], as [channels].
fn column(weight: &Array, tap: usize) -> Result<Array> {
    weight.narrow(1, tap, tap + 1)?.squeeze(&[1])
}

/// Outputs: y, and the state after the last position.
fn short_conv(spec: ConvSpec, inputs: &[Array]) -> Result<[Array; 2]> {
    let dtype = wide(inputs[0].dtype());
    let (x, weight) = (inputs[0].astype(dtype)?, inputs[1].astype(dtype)?);
    let state = if spec.state { Some(inputs[2].astype(dtype)?) } else { None };
    let starts = spec.starts.then(|| &inputs[2 + spec.state as usize]);
    let taps = Taps::new(spec, &x, weight.dim(1), state.as_ref(), starts)?;
    let mut y = x.zeros_like();
    for tap in 0..taps.count {
        y = y.add(taps.read(tap)?.multiply(column(&weight, tap)?)?)?;
    }
    let next = taps.padded.narrow(1, taps.length, taps.length + taps.count - 1)?;
    Ok([y.astype(inputs[0].dtype())?, next.astype(inputs[0].dtype())?])
}

/// Inputs x, weight, dy, (starts); outputs dx, dweight.
fn short_conv_vjp(
    spec: ConvSpec,
    inputs: &[Array],
    wants: impl Fn(usize) -> bool,
) -> Result<[Option<Array>; 2]> {
    let dtype = wide(inputs[0].dtype());
    let (x, weight, dy) = (inputs[0].astype(dtype)?, inputs[1].astype(dtype)?, inputs[2].astype(dtype)?);
    let taps = Taps::new(spec, &x, weight.dim(1), None, inputs.get(3))?;
    let mut dpadded = taps.padded.zeros_like();
    let mut columns = Vec::with_capacity(taps.count);
    for tap in 0..taps.count {
        let given = match taps.mask(tap)? {
            Some(mask) => Array::select(&mask, &dy, 0.0)?,
            None => dy.clone(),
        };
        let part = given.multiply(column(&weight, tap)?)?;
        let zeros = |length: usize| Array::zeros(&[x.dim(0), length, x.dim(2)], dtype);
        let placed = Array::concatenate(&[zeros(tap), part, zeros(taps.count - 1 - tap)], 1)?;
        dpadded = dpadded.add(placed)?;
        if wants(1) {
            columns.push(dy.multiply(taps.read(tap)?)?.sum(&[0, 1], false)?);
        }
    }
    let dx = dpadded.narrow(1, taps.count - 1, taps.count - 1 + taps.length)?.astype(inputs[0].dtype())?;
    let dweight = if wants(1) { Some(Array::stack(&columns, 1)?.astype(Dtype::F32)?) } else { None };
    Ok([Some(dx), dweight])
}

/// Outputs: Σ −log p, log p per row, d hidden, d weight.
fn linear_cross_entropy(
    spec: &CrossEntropySpec,
    inputs: &[Array],
    wants: impl Fn(usize) -> bool,
) -> Result<[Option<Array>; 4]> {
    let (hidden, weight, targets) = (&inputs[0], &inputs[1], &inputs[2]);
    let raw = hidden.linear(weight, None, spec.precision)?;
    let (logits, slope) = match spec.softcap {
        None => (raw, None),
        Some(cap) => {
            let tanh = raw.divide(cap)?.tanh()?;
            (tanh.multiply(cap)?, Some(tanh.square()?.negative()?.add(1.0)?))
        }
    };
    let logprobs = logits.log_softmax(-1)?;
    let rows = logprobs.take_along_axis(&targets.expand_dims(&[1])?, 1)?.squeeze(&[1])?;
    let sum = rows.sum(&[], false)?.negative()?;
    let (mut dhidden, mut dweight) = (None, None);
    if wants(2) || wants(3) {
        let vocabulary = Array::arange(0.0, weight.dim(0) as f64, 1.0, Dtype::I32)?;
        let target = targets.expand_dims(&[1])?.equal(vocabulary)?.astype(Dtype::F32)?;
        let mut dlogits = logits.softmax(-1)?.subtract(target)?;
        if let Some(slope) = slope {
            dlogits = dlogits.multiply(slope)?;
        }
        if wants(2) {
            dhidden = Some(dlogits.linear_transposed(weight, spec.precision)?);
        }
        if wants(3) {
            let precision = super::super::linear::training(spec.precision);
            dweight = Some(dlogits.swap_axes(0, 1)?.matmul_with(hidden, precision)?);
        }
    }
    Ok([Some(sum), wants(1).then_some(rows), dhidden, dweight])
}

/// Inputs parameter, gradient, m, v; outputs parameter, m, v.
fn adamw(spec: &AdamWSpec, inputs: &[Array]) -> Result<[Array; 3]> {
    let parameter = inputs[0].astype(Dtype::F32)?;
    let gradient = inputs[1].multiply(spec.grad_scale)?;
    let mix = |old: &Array, new: &Array, beta: f32| old.multiply(beta)?.add(new.multiply(1.0 - beta)?);
    let m = mix(&inputs[2], &gradient, spec.beta1)?;
    let v = mix(&inputs[3], &gradient.square()?, spec.beta2)?;
    let correction =
        |beta: f32| if spec.step == 0 { 1.0 } else { 1.0 - (beta as f64).powi(spec.step as i32) };
    let mean = m.multiply(1.0 / correction(spec.beta1))?;
    let root = v.multiply(1.0 / correction(spec.beta2))?.sqrt()?.add(spec.eps)?;
    let decayed = parameter.multiply(1.0 - spec.lr * spec.weight_decay)?;
    let moved = decayed.subtract(mean.divide(root)?.multiply(spec.lr)?)?;
    Ok([moved.astype(inputs[0].dtype())?, m, v])
}
