//! MLX's fused functions, in MLX's layout `[batch, heads, length, head_dim]`.

use smallvec::SmallVec;

use crate::op::{AttentionSpec, Precision, RopeSpec, Scalar, first_failure};
use crate::shape::{Shape, broadcast_shapes};
use crate::{Array, Dtype, Error, Result, promote};

fn float(op: &'static str, x: &Array) -> Result<()> {
    first_failure(&[x])?;
    if !x.dtype().is_float() || x.rank() == 0 {
        return Err(Error::invalid(
            op,
            format!("needs an array of a float dtype and one dimension or more, got {x:?}"),
        ));
    }
    Ok(())
}

/// x / √(mean(x²) + eps) · weight over the last axis; without a weight, times one.
pub fn rms_norm(x: &Array, weight: Option<&Array>, eps: f32) -> Result<Array> {
    float("rms_norm", x)?;
    match weight {
        Some(weight) => {
            let dtype = promote(x.dtype(), weight.dtype());
            x.astype(dtype)?.rms_norm(&weight.astype(dtype)?, eps)
        }
        None => x.rms_norm(&Array::ones(&[x.dim(-1)], x.dtype()).contiguous()?, eps),
    }
}

/// (x − mean) / √(var + eps) · weight + bias over the last axis; what is not given is one or zero.
pub fn layer_norm(x: &Array, weight: Option<&Array>, bias: Option<&Array>, eps: f32) -> Result<Array> {
    float("layer_norm", x)?;
    let dtype = [weight, bias].iter().flatten().fold(x.dtype(), |dtype, array| promote(dtype, array.dtype()));
    let constant = |value: f64| Array::full(&[x.dim(-1)], value, dtype);
    let weight = weight.map_or_else(|| constant(1.0).contiguous(), |weight| weight.astype(dtype))?;
    let bias = bias.map_or_else(|| constant(0.0).contiguous(), |bias| bias.astype(dtype))?;
    if dtype == Dtype::F64 {
        // The kernel computes in f32.
        let centred = x.astype(dtype)?.subtract(x.astype(dtype)?.mean(&[-1], true)?)?;
        let scale = centred.square()?.mean(&[-1], true)?.add(eps as f64)?.rsqrt()?;
        return centred.multiply(scale)?.multiply(weight)?.add(bias);
    }
    x.astype(dtype)?.layer_norm(&weight, &bias, eps)
}

/// −log softmax(logits)\[target\] over the last axis: logits [.., classes], integer targets [..]. Computed in
/// the logits' dtype, given as f32.
pub fn cross_entropy(logits: &Array, targets: &Array) -> Result<Array> {
    float("cross_entropy", logits)?;
    if targets.shape() != &logits.shape()[..logits.rank() - 1] || !targets.dtype().is_integer() {
        return Err(Error::invalid(
            "cross_entropy",
            format!("needs integer targets {:?}, got {targets:?}", &logits.shape()[..logits.rank() - 1]),
        ));
    }
    let score = logits.take_along_axis(&targets.expand_dims(&[-1])?, -1)?.squeeze(&[-1])?;
    logits.logsumexp(-1, false)?.subtract(score)?.astype(Dtype::F32)
}

/// Where the angles of [`rope`] come from.
#[derive(Clone, Copy, Debug)]
pub enum RopeBase<'a> {
    /// Dimension pair i turns by position · base^(−2i / dims).
    Base(f32),
    /// Pair i turns by position / freqs\[i\].
    Freqs(&'a Array),
}

/// Rotary positions of x [batch, .., length, head_dim]: the first `dims` of the last axis turn.
///
/// `offset` is the position of the first row: one number, or an integer array of one or one per batch
/// entry. Positions are multiplied by `scale`. `traditional` pairs neighbours instead of halves.
pub fn rope(
    x: &Array,
    dims: usize,
    traditional: bool,
    base: RopeBase,
    scale: f32,
    offset: RopeOffset,
) -> Result<Array> {
    const NAME: &str = "rope";
    float(NAME, x)?;
    let fits = x.rank() >= 3 && dims > 0 && dims.is_multiple_of(2) && dims <= x.dim(-1);
    if !fits {
        return Err(Error::invalid(
            NAME,
            format!(
                "needs [batch, .., length, head_dim] and an even number of dims up to head_dim, got {x:?} and {dims}"
            ),
        ));
    }
    let frequencies = match base {
        RopeBase::Base(base) => {
            let step = (base as f64).ln() / (dims / 2) as f64;
            let values: Vec<f32> =
                (0..dims / 2).map(|i| ((-(i as f64) * step).exp() * scale as f64) as f32).collect();
            Array::from_slice(&values, &[dims / 2])?
        }
        RopeBase::Freqs(freqs) if freqs.shape() == [dims / 2] => {
            Array::scalar(Scalar::Float(scale as f64), Dtype::F32).divide(freqs.astype(Dtype::F32)?)?
        }
        RopeBase::Freqs(freqs) => {
            return Err(Error::invalid(NAME, format!("freqs should be [{}], got {freqs:?}", dims / 2)));
        }
    };
    let (batch, length, width) = (x.dim(0), x.dim(-2), x.dim(-1));
    let rows = Array::arange(0.0, length as f64, 1.0, Dtype::I32)?.expand_dims(&[0])?;
    let positions = match offset {
        RopeOffset::At(offset) => rows.add(Array::scalar(Scalar::Int(offset.into()), Dtype::I32))?,
        RopeOffset::Each(offset) => {
            if !offset.dtype().is_integer() || (offset.size() != 1 && offset.shape() != [batch]) {
                return Err(Error::invalid(
                    NAME,
                    format!("offsets are one integer or one per batch entry ({batch}), got {offset:?}"),
                ));
            }
            offset.astype(Dtype::I32)?.reshape(&[-1, 1])?.add(rows)?
        }
    };
    let positions = positions.broadcast_to(&[batch, length])?.contiguous()?;
    // [batch, heads, length, width] → [batch, length, heads, width] and back.
    let heads: usize = x.shape()[1..x.rank() - 2].iter().product();
    let four = x.reshape(&[batch as i64, heads as i64, length as i64, width as i64])?.swap_axes(1, 2)?;
    let spec = RopeSpec { dims, traditional, inverse: false, scale: 1.0 };
    let turned = four.rope(&positions, &frequencies, spec)?.swap_axes(1, 2)?;
    turned.reshape(&x.shape().iter().map(|&size| size as i64).collect::<SmallVec<[i64; 4]>>())
}

/// The position of the first row.
#[derive(Clone, Copy, Debug)]
pub enum RopeOffset<'a> {
    /// The same everywhere.
    At(i32),
    /// An integer array: one, or one per batch entry.
    Each(&'a Array),
}

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, Default)]
pub enum AttentionMask<'a> {
    /// All.
    #[default]
    None,
    /// Those up to its own place, the last query's being the last key.
    Causal,
    /// Bool: those where it holds. Float: added to the scores. Broadcasts to [batch, heads, queries, keys].
    Array(&'a Array),
}

/// softmax(q · kᵀ · scale + mask) · v for q [batch, heads, queries, head_dim] and k, v
/// [batch, kv_heads, keys, head_dim]; kv_heads divides heads.
///
/// `sinks` \[heads\] are scores of one more key per head that has no value. Without an array as mask,
/// sinks, or values of another width, scores are never stored.
pub fn scaled_dot_product_attention(
    q: &Array,
    k: &Array,
    v: &Array,
    scale: f32,
    mask: AttentionMask,
    sinks: Option<&Array>,
) -> Result<Array> {
    const NAME: &str = "scaled_dot_product_attention";
    first_failure(&[q, k, v])?;
    let dtype = promote(promote(q.dtype(), k.dtype()), v.dtype());
    let fits = q.rank() == 4
        && k.rank() == 4
        && v.rank() == 4
        && dtype.is_float()
        && k.shape()[..3] == v.shape()[..3]
        && q.dim(0) == k.dim(0)
        && q.dim(3) == k.dim(3)
        && k.dim(1) > 0
        && q.dim(1).is_multiple_of(k.dim(1));
    if !fits {
        return Err(Error::invalid(
            NAME,
            format!(
                "needs q [batch, heads, queries, head_dim] and k, v [batch, kv_heads, keys, …] of a float dtype, got {q:?}, {k:?}, {v:?}"
            ),
        ));
    }
    let (q, k, v) = (q.astype(dtype)?, k.astype(dtype)?, v.astype(dtype)?);
    let causal = matches!(mask, AttentionMask::Causal);
    let fused = sinks.is_none()
        && !matches!(mask, AttentionMask::Array(_))
        && v.dim(3) == k.dim(3)
        && dtype != Dtype::F64
        && (!causal || q.dim(2) <= k.dim(2));
    if fused {
        let spec = AttentionSpec {
            scale,
            causal,
            window: None,
            softcap: None,
            key_start: false,
            precision: Precision::Exact,
        };
        let time_first = |x: &Array| x.swap_axes(1, 2);
        return time_first(&q)?.attention(&time_first(&k)?, &time_first(&v)?, None, spec)?.swap_axes(1, 2);
    }
    // Scores in f32 at least; heads that share keys stand together: [batch, kv_heads, group, …].
    let wide = promote(dtype, Dtype::F32);
    let (batch, heads, queries) = (q.dim(0), q.dim(1), q.dim(2));
    let (shared, keys) = (k.dim(1), k.dim(2));
    let group = heads / shared;
    let split = |x: &Array, inner: usize| {
        let rest = [x.dim(2) as i64, x.dim(3) as i64];
        x.astype(wide)?.reshape(&[batch as i64, shared as i64, inner as i64, rest[0], rest[1]])
    };
    let scores = split(&q, group)?.multiply(scale)?.matmul(&split(&k, 1)?.swap_axes(-1, -2)?)?;
    let grouped = |x: &Array| -> Result<Array> {
        let full: Shape = [batch, heads, queries, keys][..].into();
        if broadcast_shapes(NAME, x.shape(), &full)? != full {
            return Err(Error::shapes(NAME, &x.shape().into(), &full));
        }
        x.broadcast_to(&full)?.reshape(&[
            batch as i64,
            shared as i64,
            group as i64,
            queries as i64,
            keys as i64,
        ])
    };
    // The lowest number and not −∞: a query that sees nothing gets the mean of all values, as in MLX.
    let lowest = if wide == Dtype::F64 { f64::MIN } else { f32::MIN as f64 };
    let hidden = Array::scalar(Scalar::Float(lowest), wide);
    let scores = match mask {
        AttentionMask::None => scores,
        AttentionMask::Causal => {
            let count = |size: usize| Array::arange(0.0, size as f64, 1.0, Dtype::I32);
            let shift = Array::scalar(Scalar::Int(keys as i64 - queries as i64), Dtype::I32);
            let seen = count(queries)?.add(shift)?.expand_dims(&[1])?.greater_equal(count(keys)?)?;
            Array::select(&seen, &scores, &hidden)?
        }
        AttentionMask::Array(mask) if mask.dtype() == Dtype::Bool => {
            Array::select(&grouped(mask)?, &scores, &hidden)?
        }
        AttentionMask::Array(mask) if promote(mask.dtype(), dtype) == dtype => {
            scores.add(grouped(&mask.astype(wide)?)?)?
        }
        AttentionMask::Array(mask) => {
            return Err(Error::dtype(
                NAME,
                &format!("a mask that is bool or promotes to {dtype}"),
                mask.dtype(),
            ));
        }
    };
    let weights = match sinks {
        None => scores.softmax(-1)?,
        Some(sinks) => {
            if sinks.shape() != [heads] {
                return Err(Error::invalid(NAME, format!("sinks should be [{heads}], got {sinks:?}")));
            }
            let each = sinks.astype(wide)?.reshape(&[1, shared as i64, group as i64, 1, 1])?;
            let mut column: Shape = scores.shape().into();
            *column.last_mut().expect("scores have five dimensions") = 1;
            let all = Array::concatenate(&[each.broadcast_to(&column)?, scores], -1)?.softmax(-1)?;
            all.narrow(-1, 1, keys + 1)?
        }
    };
    let out = weights.matmul(&split(&v, 1)?)?;
    let shape = [batch as i64, heads as i64, queries as i64, v.dim(3) as i64];
    out.reshape(&shape)?.astype(dtype)
}

/// The gated delta rule (Yang et al., "Gated Delta Networks"): a memory S [dv, dk] per head that
/// decays, and in which what a key stands for is replaced.
///
/// S ← γₜ · S, then S ← S + βₜ · (vₜ − S · kₜ) · kₜᵀ; the output is S · qₜ. `q` and `k` are
/// [batch, length, key_heads, dk], `v` [batch, length, heads, dv] (heads share keys in groups), `gamma`
/// [batch, length, heads] or with dk more, `beta` [batch, length, heads], the state
/// [batch, heads, dv, dk], zeros if none is given. Where `mask` [batch, length] is false, the state
/// stays and the output is zero.
///
/// Gives the outputs [batch, length, heads, dv] in the dtype of `q` and `k`, and the last state in f32, in
/// which all is computed. A composition, position by position: as long as its sequence.
pub fn gated_delta_update(
    q: &Array,
    k: &Array,
    v: &Array,
    gamma: &Array,
    beta: &Array,
    initial_state: Option<&Array>,
    mask: Option<&Array>,
) -> Result<(Array, Array)> {
    const NAME: &str = "gated_delta_update";
    first_failure(&[q, k, v, gamma, beta])?;
    let four = q.rank() == 4 && q.shape() == k.shape() && v.rank() == 4 && q.shape()[..2] == v.shape()[..2];
    let grouped = four && q.dim(2) > 0 && v.dim(2).is_multiple_of(q.dim(2)) && q.dim(1) > 0;
    let gates = grouped
        && beta.shape() == &v.shape()[..3]
        && (gamma.shape() == beta.shape()
            || (gamma.rank() == 4 && gamma.shape()[..3] == v.shape()[..3] && gamma.dim(3) == q.dim(3)));
    if !gates {
        return Err(Error::invalid(
            NAME,
            format!(
                "needs q, k [batch, length, key_heads, dk] and v [batch, length, heads, dv] of one position or more, gamma and beta [batch, length, heads], got {q:?}, {k:?}, {v:?}, {gamma:?}, {beta:?}"
            ),
        ));
    }
    let (batch, length, heads) = (q.dim(0), q.dim(1), v.dim(2));
    let state = [batch, heads, v.dim(3), q.dim(3)];
    if initial_state.is_some_and(|given| given.shape() != state) {
        return Err(Error::invalid(NAME, format!("the state should be {state:?}, got {initial_state:?}")));
    }
    if mask.is_some_and(|mask| mask.shape() != [batch, length] || mask.dtype() != Dtype::Bool) {
        return Err(Error::invalid(
            NAME,
            format!("the mask should be bools [{batch}, {length}], got {mask:?}"),
        ));
    }
    let group = heads / q.dim(2);
    let wide = |x: &Array| x.astype(Dtype::F32);
    let keys = |x: &Array| if group == 1 { wide(x) } else { wide(x)?.repeat(group, 2) };
    // At a position: keys [batch, heads, 1, dk], values [batch, heads, dv, 1], gates [batch, heads, 1, ·].
    let (queries, keys, values) = (keys(q)?.expand_dims(&[3])?, keys(k)?.expand_dims(&[3])?, wide(v)?);
    let gamma = if gamma.rank() == 4 { gamma.clone() } else { gamma.expand_dims(&[3])? };
    let (values, decay) = (values.expand_dims(&[4])?, wide(&gamma)?.expand_dims(&[3])?);
    let rate = wide(beta)?.expand_dims(&[3, 4])?;
    let at = |x: &Array, t: usize| x.narrow(1, t, t + 1)?.squeeze(&[1]);
    let mut s = match initial_state {
        Some(given) => wide(given)?,
        None => Array::zeros(&state, Dtype::F32),
    };
    let mut outputs = Vec::with_capacity(length);
    for t in 0..length {
        let key = at(&keys, t)?;
        let decayed = s.multiply(at(&decay, t)?)?;
        let known = decayed.multiply(&key)?.sum(&[-1], true)?;
        let change = at(&values, t)?.subtract(known)?.multiply(at(&rate, t)?)?;
        let next = decayed.add(change.multiply(&key)?)?;
        let output = next.multiply(at(&queries, t)?)?.sum(&[-1], false)?;
        let (next, output) = match mask {
            None => (next, output),
            Some(mask) => {
                let counts = at(mask, t)?.expand_dims(&[1, 2])?;
                let zero = Array::scalar(Scalar::Float(0.0), Dtype::F32);
                (
                    Array::select(&counts.expand_dims(&[3])?, &next, &s)?,
                    Array::select(&counts, &output, &zero)?,
                )
            }
        };
        s = next;
        outputs.push(output.astype(promote(q.dtype(), k.dtype()))?);
    }
    Ok((Array::stack(&outputs, 1)?, s))
}
