//! AdamW (Loshchilov & Hutter 2019) for trainers: moments in f32, clipping and update in one pass.

use std::collections::BTreeMap;

use mica_array::op::AdamWSpec;
use mica_array::{Array, Dtype, Error, Result};

/// Settings of [`FusedAdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean.
    pub beta1: f32,
    /// Decay of the mean square.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Decoupled decay, times the learning rate.
    pub weight_decay: f32,
    /// Divide the moments by 1 − βᵗ, as torch does and MLX does not.
    pub bias_correction: bool,
}

impl Default for AdamWConfig {
    fn default() -> AdamWConfig {
        AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, bias_correction: true }
    }
}

/// The optimizer with its moments, f32, by parameter name.
#[derive(Debug, Clone)]
pub struct FusedAdamW {
    config: AdamWConfig,
    step: u32,
    moments: BTreeMap<String, (Array, Array)>,
}

impl FusedAdamW {
    /// Without moments yet.
    pub fn new(config: AdamWConfig) -> FusedAdamW {
        FusedAdamW { config, step: 0, moments: BTreeMap::new() }
    }

    /// Steps taken.
    pub fn step_count(&self) -> u32 {
        self.step
    }

    /// One step. `grad_scale` multiplies the gradients first (clipping). Gives the new parameters,
    /// lazily; evaluating them computes the moments too.
    pub fn step(
        &mut self,
        parameters: &[(String, Array)],
        grads: &[Array],
        lr: f32,
        grad_scale: f32,
    ) -> Result<Vec<Array>> {
        if parameters.len() != grads.len() {
            return Err(Error::Invalid {
                op: "adamw",
                message: format!("{} parameters but {} gradients", parameters.len(), grads.len()).into(),
            });
        }
        self.step += 1;
        let spec = AdamWSpec {
            lr,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: self.config.eps,
            weight_decay: self.config.weight_decay,
            step: if self.config.bias_correction { self.step } else { 0 },
            grad_scale,
        };
        let mut updated = Vec::with_capacity(parameters.len());
        for ((name, parameter), grad) in parameters.iter().zip(grads) {
            let zeros = || Array::zeros(parameter.shape(), Dtype::F32);
            let (mean, square) = self.moments.remove(name).unwrap_or_else(|| (zeros(), zeros()));
            let [parameter, mean, square] = parameter.adamw(grad, &mean, &square, spec)?;
            self.moments.insert(name.clone(), (mean, square));
            updated.push(parameter);
        }
        Ok(updated)
    }

    /// The moments as named arrays, for a checkpoint: `<name>.mean` and `<name>.square`.
    pub fn state(&self) -> Vec<(String, Array)> {
        self.moments
            .iter()
            .flat_map(|(name, (mean, square))| {
                [(format!("{name}.mean"), mean.clone()), (format!("{name}.square"), square.clone())]
            })
            .collect()
    }

    /// Takes back what [`FusedAdamW::state`] and [`FusedAdamW::step_count`] gave.
    pub fn restore(&mut self, step: u32, state: Vec<(String, Array)>) -> Result<()> {
        let mut parts: BTreeMap<String, Array> = state.into_iter().collect();
        let names: Vec<String> =
            parts.keys().filter_map(|key| key.strip_suffix(".mean").map(str::to_string)).collect();
        self.moments.clear();
        for name in names {
            let mean = parts.remove(&format!("{name}.mean")).expect("the name came from the map");
            let square = parts.remove(&format!("{name}.square")).ok_or_else(|| Error::Invalid {
                op: "adamw",
                message: format!("the state of {name} has a mean but no mean square").into(),
            })?;
            self.moments.insert(name, (mean, square));
        }
        if let Some(name) = parts.keys().next() {
            return Err(Error::Invalid { op: "adamw", message: format!("unknown state {name}").into() });
        }
        self.step = step;
        Ok(())
    }
}
