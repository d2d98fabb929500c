//! The rules that treat every value of a parameter alike, to the letter of `mlx.optimizers`.
//!
//! State has the parameter's dtype.

use mica_array::op::AdamWSpec;
use mica_array::{Array, Dtype, Error, Result};

use super::{At, Rate, Rule, Slots};

/// Zeros of the parameter under these names.
pub(super) fn zeros<const N: usize>(parameter: &Array, names: [&str; N]) -> Slots {
    names.into_iter().map(|name| (name.to_string(), parameter.zeros_like())).collect()
}

/// What is kept under a name; zeros if it is missing.
pub(super) fn get(slots: &Slots, name: &str, parameter: &Array) -> Array {
    slots.get(name).cloned().unwrap_or_else(|| parameter.zeros_like())
}

pub(super) fn put(slots: &mut Slots, name: &str, value: &Array) {
    slots.insert(name.to_string(), value.clone());
}

pub(super) fn require(rule: &'static str, holds: bool, expected: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Invalid { op: rule, message: format!("expected {expected}").into() })
}

pub(super) fn needs_rate(rule: &'static str, rate: &Rate) -> Result<()> {
    require(rule, !matches!(rate, Rate::Relative), "a learning rate")
}

/// share · a + (1 − share) · b
pub(super) fn mix(share: f64, a: &Array, b: &Array) -> Result<Array> {
    a.multiply(share)?.add(b.multiply(1.0 - share)?)
}

/// Gradient descent, with momentum.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sgd {
    /// Share of the last update in the next.
    pub momentum: f64,
    /// Multiplies the parameter and is added to the gradient.
    pub weight_decay: f64,
    /// Share of the gradient that does not enter the momentum.
    pub dampening: f64,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
}

impl Rule for Sgd {
    fn check(&self, rate: &Rate) -> Result<()> {
        needs_rate("SGD", rate)?;
        let fits = !self.nesterov || (self.momentum > 0.0 && self.dampening == 0.0);
        require("SGD", fits, "momentum and no dampening for Nesterov's")
    }

    fn start(&self, parameter: &Array) -> Slots {
        zeros(parameter, ["v"])
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        let gradient = match self.weight_decay {
            0.0 => gradient.clone(),
            decay => gradient.add(parameter.multiply(decay)?)?,
        };
        if self.momentum <= 0.0 {
            return parameter.subtract(gradient.multiply(at.rate)?);
        }
        let kept = get(slots, "v", parameter).multiply(self.momentum)?;
        let v = match self.dampening {
            dampening if dampening > 0.0 => kept.add(gradient.multiply(1.0 - dampening)?)?,
            _ => kept.add(&gradient)?,
        };
        put(slots, "v", &v);
        let update = if self.nesterov { gradient.add(v.multiply(self.momentum)?)? } else { v };
        parameter.subtract(update.multiply(at.rate)?)
    }
}

/// RMSprop (Tieleman & Hinton 2012).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsProp {
    /// Decay of the mean square.
    pub alpha: f64,
    /// Added to the root.
    pub eps: f64,
}

impl Default for RmsProp {
    fn default() -> RmsProp {
        RmsProp { alpha: 0.99, eps: 1e-8 }
    }
}

impl Rule for RmsProp {
    fn check(&self, rate: &Rate) -> Result<()> {
        needs_rate("RMSprop", rate)?;
        require("RMSprop", self.alpha >= 0.0 && self.eps > 0.0, "alpha of at least 0 and eps above 0")
    }

    fn start(&self, parameter: &Array) -> Slots {
        zeros(parameter, ["v"])
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        let v = mix(self.alpha, &get(slots, "v", parameter), &gradient.square()?)?;
        put(slots, "v", &v);
        parameter.subtract(gradient.multiply(at.rate)?.divide(v.sqrt()?.add(self.eps)?)?)
    }
}

/// Adagrad (Duchi et al. 2011).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adagrad {
    /// Added to the root.
    pub eps: f64,
}

impl Default for Adagrad {
    fn default() -> Adagrad {
        Adagrad { eps: 1e-8 }
    }
}

impl Rule for Adagrad {
    fn check(&self, rate: &Rate) -> Result<()> {
        needs_rate("Adagrad", rate)?;
        require("Adagrad", self.eps > 0.0, "eps above 0")
    }

    fn start(&self, parameter: &Array) -> Slots {
        zeros(parameter, ["v"])
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        let v = get(slots, "v", parameter).add(gradient.square()?)?;
        put(slots, "v", &v);
        parameter.subtract(gradient.multiply(at.rate)?.divide(v.sqrt()?.add(self.eps)?)?)
    }
}

/// AdaDelta (Zeiler 2012).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaDelta {
    /// Decay of the mean squares.
    pub rho: f64,
    /// Added under the roots.
    pub eps: f64,
}

impl Default for AdaDelta {
    fn default() -> AdaDelta {
        AdaDelta { rho: 0.9, eps: 1e-6 }
    }
}

impl Rule for AdaDelta {
    fn check(&self, rate: &Rate) -> Result<()> {
        needs_rate("AdaDelta", rate)?;
        require("AdaDelta", self.rho >= 0.0 && self.eps > 0.0, "rho of at least 0 and eps above 0")
    }

    fn start(&self, parameter: &Array) -> Slots {
        zeros(parameter, ["v", "u"])
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        let root = |x: &Array| x.add(self.eps)?.sqrt();
        let v = mix(self.rho, &get(slots, "v", parameter), &gradient.square()?)?;
        let u = get(slots, "u", parameter);
        let update = root(&u)?.divide(root(&v)?)?.multiply(gradient)?;
        let u = mix(self.rho, &u, &update.square()?)?;
        put(slots, "v", &v);
        put(slots, "u", &u);
        parameter.subtract(update.multiply(at.rate)?)
    }
}

fn check_betas(rule: &'static str, betas: [f64; 2]) -> Result<()> {
    let fit = betas.iter().all(|beta| (0.0..1.0).contains(beta));
    require(rule, fit, &format!("betas of at least 0 and less than 1, not {betas:?}"))
}

/// Adam (Kingma & Ba 2015).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Decay of the mean and of the mean square.
    pub betas: [f64; 2],
    /// Added to the root.
    pub eps: f64,
    /// Divides the moments by 1 − βᵗ, as the paper does and MLX by default does not.
    pub bias_correction: bool,
}

impl Default for Adam {
    fn default() -> Adam {
        Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false }
    }
}

impl Rule for Adam {
    fn check(&self, rate: &Rate) -> Result<()> {
        needs_rate("Adam", rate)?;
        check_betas("Adam", self.betas)?;
        require("Adam", self.eps >= 0.0, "eps of at least 0")
    }

    fn start(&self, parameter: &Array) -> Slots {
        zeros(parameter, ["m", "v"])
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        adam(*self, 0.0, at, gradient, parameter, slots)
    }
}

/// Adam with decoupled weight decay (Loshchilov & Hutter 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// As in [`Adam`].
    pub betas: [f64; 2],
    /// As in [`Adam`].
    pub eps: f64,
    /// Times the learning rate, the share that the parameter loses.
    pub weight_decay: f64,
    /// As in [`Adam`].
    pub bias_correction: bool,
}

impl Default for AdamW {
    fn default() -> AdamW {
        AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, bias_correction: false }
    }
}

impl AdamW {
    fn adam(&self) -> Adam {
        Adam { betas: self.betas, eps: self.eps, bias_correction: self.bias_correction }
    }
}

impl Rule for AdamW {
    fn check(&self, rate: &Rate) -> Result<()> {
        self.adam().check(rate)
    }

    fn start(&self, parameter: &Array) -> Slots {
        self.adam().start(parameter)
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        adam(self.adam(), self.weight_decay, at, gradient, parameter, slots)
    }
}

/// The step of [`Adam`] and [`AdamW`]; in single precision, one kernel.
fn adam(
    rule: Adam,
    weight_decay: f64,
    at: At,
    gradient: &Array,
    parameter: &Array,
    slots: &mut Slots,
) -> Result<Array> {
    let (m, v) = (get(slots, "m", parameter), get(slots, "v", parameter));
    let [b1, b2] = rule.betas;
    if [parameter, gradient, &m, &v].iter().all(|array| array.dtype() == Dtype::F32) {
        let spec = AdamWSpec {
            lr: at.rate as f32,
            beta1: b1 as f32,
            beta2: b2 as f32,
            eps: rule.eps as f32,
            weight_decay: weight_decay as f32,
            step: if rule.bias_correction { at.step as u32 } else { 0 },
            grad_scale: 1.0,
        };
        let [parameter, m, v] = parameter.adamw(gradient, &m, &v, spec)?;
        put(slots, "m", &m);
        put(slots, "v", &v);
        return Ok(parameter);
    }
    let parameter = parameter.multiply(1.0 - at.rate * weight_decay)?;
    let m = mix(b1, &m, gradient)?;
    let v = mix(b2, &v, &gradient.square()?)?;
    put(slots, "m", &m);
    put(slots, "v", &v);
    let (mut scale, mut root) = (at.rate, v.sqrt()?);
    if rule.bias_correction {
        let left = |beta: f64| 1.0 - beta.powf(at.step as f64);
        scale /= left(b1);
        root = root.multiply(1.0 / left(b2).sqrt())?;
    }
    parameter.subtract(m.multiply(scale)?.divide(root.add(rule.eps)?)?)
}

/// Adam with the largest gradient in place of the mean square (Kingma & Ba 2015).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adamax {
    /// Decay of the mean and of the largest.
    pub betas: [f64; 2],
    /// Added to the largest.
    pub eps: f64,
}

impl Default for Adamax {
    fn default() -> Adamax {
        Adamax { betas: [0.9, 0.999], eps: 1e-8 }
    }
}

impl Rule for Adamax {
    fn check(&self, rate: &Rate) -> Result<()> {
        needs_rate("Adamax", rate)?;
        check_betas("Adamax", self.betas)?;
        require("Adamax", self.eps >= 0.0, "eps of at least 0")
    }

    fn start(&self, parameter: &Array) -> Slots {
        zeros(parameter, ["m", "v"])
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        let [b1, b2] = self.betas;
        let m = mix(b1, &get(slots, "m", parameter), gradient)?;
        let v = get(slots, "v", parameter).multiply(b2)?.maximum(gradient.abs()?)?;
        put(slots, "m", &m);
        put(slots, "v", &v);
        parameter.subtract(m.multiply(at.rate)?.divide(v.add(self.eps)?)?)
    }
}

/// Lion (Chen et al. 2023): the sign of the momentum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Share of the momentum in the update, and its decay.
    pub betas: [f64; 2],
    /// Times the learning rate, the share that the parameter loses.
    pub weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Lion {
        Lion { betas: [0.9, 0.99], weight_decay: 0.0 }
    }
}

impl Rule for Lion {
    fn check(&self, rate: &Rate) -> Result<()> {
        needs_rate("Lion", rate)?;
        check_betas("Lion", self.betas)
    }

    fn start(&self, parameter: &Array) -> Slots {
        zeros(parameter, ["m"])
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        let m = get(slots, "m", parameter);
        let update = mix(self.betas[0], &m, gradient)?.sign()?;
        put(slots, "m", &mix(self.betas[1], &m, gradient)?);
        let parameter = match self.weight_decay {
            decay if decay > 0.0 => parameter.multiply(1.0 - at.rate * decay)?,
            _ => parameter.clone(),
        };
        parameter.subtract(update.multiply(at.rate)?)
    }
}
