//! Losses, with MLX's names, arguments and order of arguments.

use mica_array::{Array, Error, Result};

/// What becomes of the losses of the single examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Reduction {
    /// They are the result.
    #[default]
    None,
    /// Their mean.
    Mean,
    /// Their sum.
    Sum,
}

impl Reduction {
    fn of(self, loss: Array) -> Result<Array> {
        match self {
            Reduction::None => Ok(loss),
            Reduction::Mean => loss.mean(&[], false),
            Reduction::Sum => loss.sum(&[], false),
        }
    }
}

fn same_shapes(op: &'static str, what: &str, a: &Array, b: &Array) -> Result<()> {
    if a.shape() == b.shape() {
        return Ok(());
    }
    let message = format!("expected {what} of the same shape, got {:?} and {:?}", a.shape(), b.shape());
    Err(Error::Invalid { op, message: message.into() })
}

fn weighted(op: &'static str, loss: Array, weights: Option<&Array>) -> Result<Array> {
    match weights {
        None => Ok(loss),
        Some(weights) => {
            same_shapes(op, "losses and weights", &loss, weights)?;
            loss.multiply(weights)
        }
    }
}

/// x at the targets' indices along an axis, which goes away.
fn at_targets(x: &Array, targets: &Array, axis: i32) -> Result<Array> {
    x.take_along_axis(&targets.expand_dims(&[axis])?, axis)?.squeeze(&[axis])
}

/// −log softmax(logits)\[target\] along `axis`.
///
/// Targets are class indices (of the logits' shape without the axis) or probabilities (of the
/// logits' shape). MLX's defaults: no weights, the last axis, no smoothing.
pub fn cross_entropy(
    logits: &Array,
    targets: &Array,
    weights: Option<&Array>,
    axis: i32,
    label_smoothing: f64,
    reduction: Reduction,
) -> Result<Array> {
    const OP: &str = "cross_entropy";
    let invalid = |message: String| Error::Invalid { op: OP, message: message.into() };
    if !(0.0..1.0).contains(&label_smoothing) {
        return Err(invalid(format!("expected a label smoothing in [0, 1), got {label_smoothing}")));
    }
    let logits = &logits.subtract(logits.max(&[axis], true)?.stop_gradient()?)?;
    let mut dropped = logits.shape().to_vec();
    dropped.remove((if axis < 0 { axis + logits.rank() as i32 } else { axis }) as usize);
    let score = if targets.shape() == logits.shape() {
        logits.multiply(targets)?.sum(&[axis], false)?
    } else if targets.shape() == dropped {
        at_targets(logits, targets, axis)?
    } else {
        let (targets, logits) = (targets.shape(), logits.shape());
        return Err(invalid(format!("targets {targets:?} do not fit logits {logits:?} along axis {axis}")));
    };
    let total = logits.logsumexp(axis, false)?;
    let loss = if label_smoothing > 0.0 {
        let smoothed = logits.mean(&[axis], false)?.negative()?.multiply(label_smoothing)?;
        total.subtract(score.multiply(1.0 - label_smoothing)?)?.add(smoothed)?
    } else {
        total.subtract(score)?
    };
    reduction.of(weighted(OP, loss, weights)?)
}

/// The cross-entropy of two classes. With `with_logits` (MLX's default), inputs are logits, else
/// probabilities, whose logarithms are cut off at −100.
pub fn binary_cross_entropy(
    inputs: &Array,
    targets: &Array,
    weights: Option<&Array>,
    with_logits: bool,
    reduction: Reduction,
) -> Result<Array> {
    const OP: &str = "binary_cross_entropy";
    same_shapes(OP, "inputs and targets", inputs, targets)?;
    let loss = if with_logits {
        inputs.softplus()?.subtract(inputs.multiply(targets)?)?
    } else {
        let one_minus = |x: &Array| x.negative()?.add(1);
        let log = inputs.log()?.maximum(-100)?;
        let log_not = one_minus(inputs)?.log()?.maximum(-100)?;
        targets.multiply(log)?.add(one_minus(targets)?.multiply(log_not)?)?.negative()?
    };
    reduction.of(weighted(OP, loss, weights)?)
}

/// |prediction − target|
pub fn l1_loss(predictions: &Array, targets: &Array, reduction: Reduction) -> Result<Array> {
    same_shapes("l1_loss", "predictions and targets", predictions, targets)?;
    reduction.of(predictions.subtract(targets)?.abs()?)
}

/// (prediction − target)²
pub fn mse_loss(predictions: &Array, targets: &Array, reduction: Reduction) -> Result<Array> {
    same_shapes("mse_loss", "predictions and targets", predictions, targets)?;
    reduction.of(predictions.subtract(targets)?.square()?)
}

/// −inputs\[target\]: inputs are log-probabilities along `axis`.
pub fn nll_loss(inputs: &Array, targets: &Array, axis: i32, reduction: Reduction) -> Result<Array> {
    reduction.of(at_targets(inputs, targets, axis)?.negative()?)
}

/// The negative log-likelihood of normal distributions with means `inputs` and variances `vars`,
/// which are at least `eps` (MLX: 1e-6); with its constant if `full`.
pub fn gaussian_nll_loss(
    inputs: &Array,
    targets: &Array,
    vars: &Array,
    full: bool,
    eps: f64,
    reduction: Reduction,
) -> Result<Array> {
    same_shapes("gaussian_nll_loss", "inputs and targets", inputs, targets)?;
    same_shapes("gaussian_nll_loss", "inputs and variances", inputs, vars)?;
    let vars = vars.maximum(eps)?;
    let square = targets.subtract(inputs)?.square()?;
    let loss = vars.log()?.add(square.divide(vars)?)?.multiply(0.5)?;
    reduction.of(if full { loss.add(0.5 * (2.0 * std::f64::consts::PI).ln())? } else { loss })
}

/// Σ e^target · (target − input) along `axis`: both are log-probabilities.
pub fn kl_div_loss(inputs: &Array, targets: &Array, axis: i32, reduction: Reduction) -> Result<Array> {
    reduction.of(targets.exp()?.multiply(targets.subtract(inputs)?)?.sum(&[axis], false)?)
}

/// 0.5 · d² / beta for differences d below `beta` (MLX: 1), |d| − 0.5 · beta above.
pub fn smooth_l1_loss(
    predictions: &Array,
    targets: &Array,
    beta: f64,
    reduction: Reduction,
) -> Result<Array> {
    same_shapes("smooth_l1_loss", "predictions and targets", predictions, targets)?;
    let diff = predictions.subtract(targets)?.abs()?;
    let near = diff.square()?.multiply(0.5)?.divide(beta)?;
    let far = diff.abs()?.subtract(0.5 * beta)?;
    reduction.of(Array::select(&diff.less(beta)?, &near, far)?)
}

/// max(‖anchor − positive‖ₚ − ‖anchor − negative‖ₚ + margin, 0) along `axis`. MLX's defaults:
/// the last axis, p 2, margin 1, eps 1e-6 (added to the sums of powers).
pub fn triplet_loss(
    anchors: &Array,
    positives: &Array,
    negatives: &Array,
    axis: i32,
    p: i32,
    margin: f64,
    eps: f64,
    reduction: Reduction,
) -> Result<Array> {
    let distance = |others: &Array| -> Result<Array> {
        let powers = anchors.subtract(others)?.abs()?.power(p)?;
        powers.sum(&[axis], false)?.add(eps)?.power(1.0 / f64::from(p))
    };
    reduction.of(distance(positives)?.subtract(distance(negatives)?)?.add(margin)?.maximum(0)?)
}

/// max(1 − input · target, 0): targets are −1 or 1.
pub fn hinge_loss(inputs: &Array, targets: &Array, reduction: Reduction) -> Result<Array> {
    reduction.of(inputs.multiply(targets)?.negative()?.add(1)?.maximum(0)?)
}

/// 0.5 · d² for differences d up to `delta` (MLX: 1), delta · (|d| − 0.5 · delta) above.
pub fn huber_loss(inputs: &Array, targets: &Array, delta: f64, reduction: Reduction) -> Result<Array> {
    let errors = inputs.subtract(targets)?.abs()?;
    let quadratic = errors.minimum(delta)?;
    let linear = errors.subtract(&quadratic)?;
    reduction.of(quadratic.square()?.multiply(0.5)?.add(linear.multiply(delta)?)?)
}

/// log(cosh(input − target))
pub fn log_cosh_loss(inputs: &Array, targets: &Array, reduction: Reduction) -> Result<Array> {
    let errors = inputs.subtract(targets)?;
    reduction.of(errors.logaddexp(errors.negative()?)?.subtract(std::f64::consts::LN_2)?)
}

/// x₁ · x₂ / max(‖x₁‖ · ‖x₂‖, eps) along `axis`. MLX's defaults are axis 1 and eps 1e-8.
pub fn cosine_similarity_loss(
    x1: &Array,
    x2: &Array,
    axis: i32,
    eps: f64,
    reduction: Reduction,
) -> Result<Array> {
    let norm = |x: &Array| x.square()?.sum(&[axis], false)?.sqrt();
    let product = x1.multiply(x2)?.sum(&[axis], false)?;
    reduction.of(product.divide(norm(x1)?.multiply(norm(x2)?)?.maximum(eps)?)?)
}

/// max(0, −target · (input₁ − input₂) + margin): targets are −1 or 1. MLX's default margin is 0.
pub fn margin_ranking_loss(
    inputs1: &Array,
    inputs2: &Array,
    targets: &Array,
    margin: f64,
    reduction: Reduction,
) -> Result<Array> {
    same_shapes("margin_ranking_loss", "both inputs", inputs1, inputs2)?;
    same_shapes("margin_ranking_loss", "inputs and targets", inputs1, targets)?;
    let differences = inputs1.subtract(inputs2)?;
    reduction.of(targets.negative()?.multiply(differences)?.add(margin)?.maximum(0)?)
}
