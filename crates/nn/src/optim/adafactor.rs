//! Adafactor (Shazeer & Stern 2018): the mean squares of a matrix from those of its rows and columns.

use mica_array::{Array, Result};

use super::rules::{get, put, require};
use super::{At, Rate, Rule, Slots};

/// Settings, with MLX's defaults. With `relative_step` the rule finds its own learning rate and
/// takes [`Rate::Relative`]; without it, it needs one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// Added to the squares of gradients, and the least scale of a parameter.
    pub eps: [f64; 2],
    /// Updates are scaled down to this root mean square.
    pub clip_threshold: f64,
    /// The decay of the mean squares is 1 − step^decay_rate.
    pub decay_rate: f64,
    /// Decay of the mean of updates, if it is kept.
    pub beta_1: Option<f64>,
    /// Times the learning rate, the share that the parameter loses.
    pub weight_decay: f64,
    /// The learning rate is relative to the parameter's root mean square.
    pub scale_parameter: bool,
    /// The learning rate is min(1/100, 1/√step).
    pub relative_step: bool,
    /// … with step · 1e-6 in place of 1/100.
    pub warmup_init: bool,
}

impl Default for Adafactor {
    fn default() -> Adafactor {
        Adafactor {
            eps: [1e-30, 1e-3],
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta_1: None,
            weight_decay: 0.0,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
        }
    }
}

fn rms(x: &Array) -> Result<Array> {
    x.square()?.mean(&[], false)?.sqrt()
}

impl Adafactor {
    fn rate(&self, at: At, parameter: &Array) -> Result<Array> {
        let step = at.step as f64;
        let rate = match self.relative_step {
            true => (if self.warmup_init { 1e-6 * step } else { 1e-2 }).min(1.0 / step.sqrt()),
            false => at.rate,
        };
        match self.scale_parameter {
            true => rms(parameter)?.maximum(self.eps[1])?.multiply(rate),
            false => Ok(Array::full(&[], rate, parameter.dtype())),
        }
    }
}

impl Rule for Adafactor {
    fn check(&self, rate: &Rate) -> Result<()> {
        let expected = "either relative_step or a learning rate, not both";
        require("Adafactor", self.relative_step == matches!(rate, Rate::Relative), expected)
    }

    fn start(&self, parameter: &Array) -> Slots {
        let mut slots = Slots::new();
        let shape = parameter.shape();
        if let [lead @ .., rows, columns] = shape {
            let of = |size: &usize| Array::zeros(&[lead, &[*size]].concat(), parameter.dtype());
            put(&mut slots, "exp_avg_sq_row", &of(rows));
            put(&mut slots, "exp_avg_sq_col", &of(columns));
        } else {
            put(&mut slots, "exp_avg_sq", &parameter.zeros_like());
        }
        if self.beta_1.is_some() {
            put(&mut slots, "exp_avg", &parameter.zeros_like());
        }
        slots
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        let rate = self.rate(at, parameter)?;
        let share = 1.0 - (at.step as f64).powf(self.decay_rate);
        let start = self.start(parameter);
        let mut mixed = |name: &str, new: Array| -> Result<Array> {
            let old = slots.get(name).or(start.get(name)).cloned().unwrap_or_else(|| new.zeros_like());
            let mean = old.multiply(share)?.add(new.multiply(1.0 - share)?)?;
            put(slots, name, &mean);
            Ok(mean)
        };
        let square = gradient.square()?.add(self.eps[0])?;
        let update = if gradient.rank() >= 2 {
            let rows = mixed("exp_avg_sq_row", square.mean(&[-1], false)?)?;
            let columns = mixed("exp_avg_sq_col", square.mean(&[-2], false)?)?;
            let rows = rows.divide(rows.mean(&[-1], true)?)?.rsqrt()?;
            rows.expand_dims(&[-1])?.multiply(columns.rsqrt()?.expand_dims(&[-2])?)?.multiply(gradient)?
        } else {
            mixed("exp_avg_sq", square)?.rsqrt()?.multiply(gradient)?
        };
        let above = rms(&update)?.divide(self.clip_threshold)?.maximum(1.0)?;
        let mut update = update.divide(above)?.multiply(&rate)?;
        if let Some(beta) = self.beta_1 {
            update = get(slots, "exp_avg", parameter).multiply(beta)?.add(update.multiply(1.0 - beta)?)?;
            put(slots, "exp_avg", &update);
        }
        let parameter = match self.weight_decay {
            0.0 => parameter.clone(),
            decay => parameter.add(parameter.multiply(rate.multiply(-decay)?)?)?,
        };
        parameter.subtract(update)
    }
}
