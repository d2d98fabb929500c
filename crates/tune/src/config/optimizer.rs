//! Which optimizer, with which settings: names and defaults of both dialects.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::keys::{Settings, unknown};
use crate::{Error, Result};

/// An optimizer with all of its settings but the learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
#[allow(missing_docs)] // fields are named as in mlx and torch
pub enum Optimizer {
    Adam {
        betas: [f64; 2],
        eps: f64,
        bias_correction: bool,
    },
    AdamW {
        betas: [f64; 2],
        eps: f64,
        weight_decay: f64,
        bias_correction: bool,
    },
    Sgd {
        momentum: f64,
        weight_decay: f64,
        dampening: f64,
        nesterov: bool,
    },
    Lion {
        betas: [f64; 2],
        weight_decay: f64,
    },
    Muon {
        momentum: f64,
        weight_decay: f64,
        nesterov: bool,
        ns_steps: u32,
    },
    Adafactor {
        eps: [f64; 2],
        clip_threshold: f64,
        decay_rate: f64,
        beta_1: Option<f64>,
        weight_decay: f64,
        scale_parameter: bool,
        relative_step: bool,
        warmup_init: bool,
    },
}

/// The names that are known.
pub const NAMES: [&str; 6] = ["adam", "adamw", "sgd", "lion", "muon", "adafactor"];

impl Optimizer {
    /// `mica lora`: mlx's defaults (Adam without bias correction, decay 0.01 in AdamW and Muon).
    pub fn mlx(name: &str, settings: Settings) -> Result<Optimizer> {
        Optimizer::named(name, settings, false, 0.01)
    }

    /// `mica train`: torch's conventions (bias correction on), without weight decay.
    pub fn torch(name: &str, settings: Settings) -> Result<Optimizer> {
        Optimizer::named(name, settings, true, 0.0)
    }

    fn named(name: &str, settings: Settings, bias_correction: bool, weight_decay: f64) -> Result<Optimizer> {
        let name = name.to_lowercase();
        let optimizer = match name.as_str() {
            "adam" => Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction },
            "adamw" => Optimizer::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay, bias_correction },
            "sgd" => Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0, dampening: 0.0, nesterov: false },
            "lion" => Optimizer::Lion { betas: [0.9, 0.99], weight_decay: 0.0 },
            "muon" => Optimizer::Muon { momentum: 0.95, weight_decay, nesterov: true, ns_steps: 5 },
            "adafactor" => Optimizer::Adafactor {
                eps: [1e-30, 1e-3],
                clip_threshold: 1.0,
                decay_rate: -0.8,
                beta_1: None,
                weight_decay: 0.0,
                // A given learning rate is used as it is; mlx's relative steps would ignore it.
                scale_parameter: true,
                relative_step: false,
                warmup_init: false,
            },
            _ => return Err(Error::Config(unknown("optimizer", &name, &name, &NAMES))),
        };
        optimizer.with(&name, settings)
    }

    /// With these settings in place of the defaults.
    fn with(self, name: &str, settings: Settings) -> Result<Optimizer> {
        let section = format!("optimizer_config.{name}");
        let fail = |cause: String| Error::Config(format!("{section}: {cause}"));
        let Ok(Value::Object(mut all)) = serde_json::to_value(&self) else { return Ok(self) };
        let known: Vec<String> = all.keys().filter(|key| *key != "name").cloned().collect();
        for (key, value) in settings {
            if !known.contains(&key) {
                let names: Vec<&str> = known.iter().map(String::as_str).collect();
                return Err(Error::Config(unknown("key", &format!("{section}.{key}"), &key, &names)));
            }
            all.insert(key, value);
        }
        let optimizer: Optimizer =
            serde_json::from_value(Value::Object(all)).map_err(|e| fail(e.to_string()))?;
        optimizer.check().map_err(fail)?;
        Ok(optimizer)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let share = |name: &str, value: f64| match (0.0..1.0).contains(&value) {
            true => Ok(()),
            false => Err(format!("{name} must be at least 0 and less than 1, got {value}")),
        };
        let positive = |name: &str, value: f64| match value >= 0.0 && value.is_finite() {
            true => Ok(()),
            false => Err(format!("{name} must be 0 or more, got {value}")),
        };
        match self {
            Optimizer::Adam { betas, eps, .. } => {
                betas.iter().try_for_each(|&beta| share("betas", beta))?;
                positive("eps", *eps)
            }
            Optimizer::AdamW { betas, eps, weight_decay, .. } => {
                betas.iter().try_for_each(|&beta| share("betas", beta))?;
                positive("eps", *eps)?;
                positive("weight_decay", *weight_decay)
            }
            Optimizer::Sgd { momentum, weight_decay, dampening, nesterov } => {
                share("momentum", *momentum)?;
                positive("weight_decay", *weight_decay)?;
                if *nesterov && (*momentum == 0.0 || *dampening != 0.0) {
                    return Err("nesterov needs a momentum and no dampening".into());
                }
                Ok(())
            }
            Optimizer::Lion { betas, weight_decay } => {
                betas.iter().try_for_each(|&beta| share("betas", beta))?;
                positive("weight_decay", *weight_decay)
            }
            Optimizer::Muon { momentum, weight_decay, ns_steps, .. } => {
                share("momentum", *momentum)?;
                positive("weight_decay", *weight_decay)?;
                if *ns_steps == 0 { Err("ns_steps must be at least 1".into()) } else { Ok(()) }
            }
            Optimizer::Adafactor {
                eps, clip_threshold, weight_decay, relative_step, warmup_init, ..
            } => {
                eps.iter().try_for_each(|&eps| positive("eps", eps))?;
                positive("clip_threshold", *clip_threshold)?;
                positive("weight_decay", *weight_decay)?;
                if *warmup_init && !relative_step {
                    return Err("warmup_init needs relative_step".into());
                }
                Ok(())
            }
        }
    }
}

/// The settings of one optimizer out of mlx-lm's `optimizer_config`, which has a section for each name.
pub fn section(config: Option<&Settings>, name: &str) -> Result<Settings> {
    let Some(config) = config else { return Ok(Settings::new()) };
    for key in config.keys() {
        if !NAMES.contains(&key.as_str()) {
            return Err(Error::Config(unknown("section", &format!("optimizer_config.{key}"), key, &NAMES)));
        }
    }
    match config.get(&name.to_lowercase()) {
        None | Some(Value::Null) => Ok(Settings::new()),
        Some(Value::Object(settings)) => Ok(settings.clone()),
        Some(other) => Err(Error::Config(format!("optimizer_config.{name} must be a section, got {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn settings(value: Value) -> Settings {
        let Value::Object(settings) = value else { panic!("{value}") };
        settings
    }

    #[test]
    fn dialects_differ_in_bias_correction_and_decay() {
        let adam = |bias_correction| Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction };
        assert_eq!(Optimizer::mlx("adam", Settings::new()).unwrap(), adam(false));
        assert_eq!(Optimizer::torch("Adam", Settings::new()).unwrap(), adam(true));
        let decay = |optimizer| match optimizer {
            Optimizer::AdamW { weight_decay, .. } => weight_decay,
            other => panic!("{other:?}"),
        };
        assert_eq!(decay(Optimizer::mlx("adamw", Settings::new()).unwrap()), 0.01);
        assert_eq!(decay(Optimizer::torch("adamw", Settings::new()).unwrap()), 0.0);
        let given = settings(json!({"weight_decay": 0.1, "betas": [0.8, 0.9]}));
        assert_eq!(decay(Optimizer::mlx("adamw", given).unwrap()), 0.1);
    }

    #[test]
    fn every_name_has_defaults_that_pass() {
        for name in NAMES {
            let optimizer = Optimizer::mlx(name, Settings::new()).unwrap();
            let value = serde_json::to_value(&optimizer).unwrap();
            assert_eq!(serde_json::from_value::<Optimizer>(value).unwrap(), optimizer);
        }
    }

    #[test]
    fn wrong_settings_are_named() {
        let cases = [
            ("name", "adamm", json!({}), "did you mean \"adam\"?"),
            ("key", "adam", json!({"beta": [0.9, 0.99]}), "did you mean \"betas\"?"),
            ("range", "adamw", json!({"betas": [0.9, 1.0]}), "less than 1"),
            ("type", "sgd", json!({"momentum": "high"}), "optimizer_config.sgd"),
            ("nesterov", "sgd", json!({"nesterov": true}), "needs a momentum"),
        ];
        for (case, name, value, part) in cases {
            let error = Optimizer::torch(name, settings(value)).expect_err(case).to_string();
            assert!(error.contains(part), "{case}: {error}");
        }
        let config = settings(json!({"adma": {}}));
        assert!(section(Some(&config), "adam").unwrap_err().to_string().contains("\"adam\""));
    }
}
