//! The learning rate as a function of the optimizer step, computed in f64 and free of any state.
//!
//! Two dialects: the schedules of `transformers` (a factor over a whole run, with warm-up), which `mica
//! train` uses, and mlx's (`cosine_decay` and so on with positional arguments), which `mica lora` takes from
//! its configuration. Step 0 is the first update; as in both originals, a warm-up that starts at 0 makes
//! the first update one of rate 0.

use std::f64::consts::PI;

pub use mica_nn::optim::Schedule as Mlx;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// How the rate falls after the warm-up, as a factor of the peak.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// It stays.
    Constant,
    /// A straight line to `end` (a share of the peak) at the last step.
    Linear {
        /// Share of the peak at the end.
        end: f64,
    },
    /// Half a cosine wave to `end` at the last step.
    Cosine {
        /// Share of the peak at the end.
        end: f64,
    },
    /// `cycles` half waves, each starting again from the peak.
    CosineRestarts {
        /// How many.
        cycles: u32,
        /// Share of the peak at each end.
        end: f64,
    },
    /// Warm-up, stable, decay: the peak until `decay_steps` before the end, then a straight line.
    Wsd {
        /// Length of the decay.
        decay_steps: u64,
        /// Share of the peak at the end.
        end: f64,
    },
    /// Multiplied by `factor` every `every` steps.
    Step {
        /// Steps between falls.
        every: u64,
        /// What remains after a fall.
        factor: f64,
    },
    /// Multiplied by `factor` every step.
    Exponential {
        /// What remains after a step.
        factor: f64,
    },
}

/// A learning-rate schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Warm-up from 0 to the peak in a straight line, then a decay (the formulas of `transformers`).
    Run {
        /// The highest rate.
        peak: f64,
        /// Steps of warm-up.
        warmup: u64,
        /// Steps of the run.
        total: u64,
        /// What follows the warm-up.
        decay: Decay,
    },
    /// mlx's schedules.
    Mlx(Mlx),
}

impl Schedule {
    /// One rate for all steps.
    pub fn constant(rate: f64) -> Schedule {
        Schedule::Run { peak: rate, warmup: 0, total: 0, decay: Decay::Constant }
    }

    /// The rate of an update, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        match self {
            Schedule::Run { peak, warmup, .. } if step < *warmup => peak * (step as f64 / *warmup as f64),
            Schedule::Run { peak, warmup, total, decay } => {
                peak * decay.factor(step - warmup, total.saturating_sub(*warmup))
            }
            Schedule::Mlx(mlx) => mlx.at(step),
        }
    }
}

/// Warm-up steps of a share of the run, rounded up as `transformers` does.
pub fn warmup_steps(ratio: f64, total: u64) -> u64 {
    (ratio * total as f64).ceil().clamp(0.0, total as f64) as u64
}

impl Decay {
    /// The share of the peak `step` steps after the warm-up, of `length` such steps.
    fn factor(self, step: u64, length: u64) -> f64 {
        let progress = (step as f64 / length.max(1) as f64).min(1.0);
        let between = |end: f64, share: f64| end + (1.0 - end) * share;
        match self {
            Decay::Constant => 1.0,
            Decay::Linear { end } => between(end, 1.0 - progress),
            Decay::Cosine { end } => between(end, 0.5 * (1.0 + (PI * progress).cos())),
            Decay::CosineRestarts { end, .. } if progress >= 1.0 => end,
            Decay::CosineRestarts { cycles, end } => {
                let phase = (f64::from(cycles.max(1)) * progress).fract();
                between(end, 0.5 * (1.0 + (PI * phase).cos()))
            }
            Decay::Wsd { decay_steps, end } => {
                let stable = length.saturating_sub(decay_steps);
                if step < stable {
                    return 1.0;
                }
                let progress = ((step - stable) as f64 / (length - stable).max(1) as f64).min(1.0);
                between(end, 1.0 - progress)
            }
            Decay::Step { every, factor } => factor.powf((step / every.max(1)) as f64),
            Decay::Exponential { factor } => factor.powf(step as f64),
        }
    }
}

/// Reads mlx-lm's `lr_schedule`: `{name, arguments: […], warmup, warmup_init}`.
///
/// Of `join_schedules`, the arguments are a list of such objects and a list of boundaries.
pub fn mlx_from_config(config: &Value) -> Result<Mlx> {
    let fail = |cause: String| Error::Config(format!("lr_schedule: {cause}"));
    let Value::Object(map) = config else {
        return Err(fail("expected {name, arguments, warmup, warmup_init}".into()));
    };
    const KEYS: [&str; 4] = ["name", "arguments", "warmup", "warmup_init"];
    if let Some(key) = map.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(fail(format!("unknown key \"{key}\"; known are {}", KEYS.join(", "))));
    }
    let name = map.get("name").and_then(Value::as_str).ok_or_else(|| fail("\"name\" is missing".into()))?;
    let arguments = match map.get("arguments") {
        Some(Value::Array(list)) => list.as_slice(),
        _ => return Err(fail(format!("\"arguments\" of {name} must be a list"))),
    };
    let main = mlx_named(name, arguments).map_err(fail)?;
    let number = |key: &str| match map.get(key) {
        None | Some(Value::Null) => Ok(0.0),
        Some(value) => value
            .as_f64()
            .filter(|x| *x >= 0.0)
            .ok_or_else(|| fail(format!("\"{key}\" must be a number from 0"))),
    };
    let (warmup, warmup_init) = (number("warmup")?, number("warmup_init")?);
    if warmup == 0.0 {
        return Ok(main);
    }
    if warmup.fract() != 0.0 {
        return Err(fail("\"warmup\" is a number of steps and must be whole".into()));
    }
    let steps = warmup as u64;
    let rise = Mlx::LinearSchedule { init: warmup_init, end: main.init(), steps };
    // mlx-lm joins one step after the warm-up, so that the peak is reached before the decay starts.
    Ok(Mlx::JoinSchedules { schedules: vec![rise, main], boundaries: vec![steps + 1] })
}

fn mlx_named(name: &str, arguments: &[Value]) -> Result<Mlx, String> {
    let signature = match name {
        "exponential_decay" => "init, decay_rate",
        "step_decay" => "init, decay_rate, step_size",
        "cosine_decay" => "init, decay_steps, end=0",
        "linear_schedule" => "init, end, steps",
        "join_schedules" => "[schedule, …], [boundary, …]",
        _ => {
            return Err(format!(
                "unknown schedule \"{name}\"; known are cosine_decay, linear_schedule, exponential_decay, \
                 step_decay, join_schedules"
            ));
        }
    };
    let wrong = |what: &str| format!("{name}({signature}): {what}");
    if name == "join_schedules" {
        return mlx_join(arguments).map_err(|cause| wrong(&cause));
    }
    let expected = signature.split(", ").count();
    let fewest = expected - usize::from(signature.contains('='));
    if !(fewest..=expected).contains(&arguments.len()) {
        return Err(wrong(&format!("{} arguments given", arguments.len())));
    }
    let float = |i: usize| {
        let value = arguments[i].as_f64().filter(|x| x.is_finite());
        value.ok_or_else(|| wrong(&format!("argument {} is no number", i + 1)))
    };
    let steps = |i: usize| {
        let value = float(i)?;
        let whole = value >= 1.0 && value.fract() == 0.0;
        whole
            .then_some(value as u64)
            .ok_or_else(|| wrong(&format!("argument {} must be a whole number from 1", i + 1)))
    };
    Ok(match name {
        "exponential_decay" => Mlx::ExponentialDecay { init: float(0)?, decay_rate: float(1)? },
        "step_decay" => Mlx::StepDecay { init: float(0)?, decay_rate: float(1)?, step_size: steps(2)? },
        "cosine_decay" => {
            let end = if arguments.len() == 3 { float(2)? } else { 0.0 };
            Mlx::CosineDecay { init: float(0)?, decay_steps: steps(1)?, end }
        }
        _ => Mlx::LinearSchedule { init: float(0)?, end: float(1)?, steps: steps(2)? },
    })
}

fn mlx_join(arguments: &[Value]) -> Result<Mlx, String> {
    let [Value::Array(schedules), Value::Array(boundaries)] = arguments else {
        return Err("expected two lists".into());
    };
    if schedules.is_empty() || schedules.len() != boundaries.len() + 1 {
        return Err("there must be one boundary less than schedules".into());
    }
    let schedules: Vec<Mlx> =
        schedules.iter().map(|s| mlx_from_config(s).map_err(|e| e.to_string())).collect::<Result<_, _>>()?;
    let boundaries: Option<Vec<u64>> = boundaries.iter().map(Value::as_u64).collect();
    let boundaries =
        boundaries.filter(|list| list.is_sorted()).ok_or("boundaries must be rising whole numbers")?;
    Ok(Mlx::JoinSchedules { schedules, boundaries })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(warmup: u64, total: u64, decay: Decay) -> Schedule {
        Schedule::Run { peak: 2.0, warmup, total, decay }
    }

    #[test]
    fn rates_follow_their_formulas() {
        let half = 1.0 + (PI / 4.0).cos();
        let cases: &[(&str, Schedule, &[(u64, f64)])] = &[
            ("constant", Schedule::constant(0.5), &[(0, 0.5), (1000, 0.5)]),
            ("warm-up", run(4, 8, Decay::Constant), &[(0, 0.0), (1, 0.5), (3, 1.5), (4, 2.0), (99, 2.0)]),
            (
                "linear",
                run(2, 10, Decay::Linear { end: 0.0 }),
                &[(1, 1.0), (2, 2.0), (6, 1.0), (10, 0.0), (11, 0.0)],
            ),
            ("linear to a tenth", run(0, 10, Decay::Linear { end: 0.1 }), &[(0, 2.0), (5, 1.1), (10, 0.2)]),
            (
                "cosine",
                run(0, 8, Decay::Cosine { end: 0.0 }),
                &[(0, 2.0), (2, half), (4, 1.0), (8, 0.0), (20, 0.0)],
            ),
            ("cosine to an end", run(0, 8, Decay::Cosine { end: 0.5 }), &[(4, 1.5), (8, 1.0)]),
            (
                "restarts",
                run(0, 16, Decay::CosineRestarts { cycles: 2, end: 0.0 }),
                &[(0, 2.0), (2, half), (4, 1.0), (8, 2.0), (12, 1.0), (16, 0.0)],
            ),
            (
                "wsd",
                run(2, 12, Decay::Wsd { decay_steps: 4, end: 0.0 }),
                &[(2, 2.0), (7, 2.0), (8, 2.0), (10, 1.0), (12, 0.0)],
            ),
            (
                "step",
                run(0, 9, Decay::Step { every: 3, factor: 0.5 }),
                &[(0, 2.0), (2, 2.0), (3, 1.0), (8, 0.5)],
            ),
            ("exponential", run(1, 9, Decay::Exponential { factor: 0.5 }), &[(1, 2.0), (3, 0.5)]),
            ("no steps", run(0, 0, Decay::Cosine { end: 0.0 }), &[(0, 2.0)]),
        ];
        for (name, schedule, points) in cases {
            for &(step, rate) in *points {
                let got = schedule.at(step);
                assert!((got - rate).abs() < 1e-12, "{name} at {step}: {got}, expected {rate}");
            }
        }
    }

    #[test]
    fn mlx_configurations_mean_what_they_mean_there() {
        // Values from mlx.optimizers.schedulers (its documentation's examples and formulas).
        let cases: &[(&str, Value, &[(u64, f64)])] = &[
            (
                "exponential",
                json!({"name": "exponential_decay", "arguments": [0.1, 0.9]}),
                &[(0, 0.1), (4, 0.06561)],
            ),
            ("step", json!({"name": "step_decay", "arguments": [0.1, 0.9, 10]}), &[(9, 0.1), (20, 0.081)]),
            (
                "cosine",
                json!({"name": "cosine_decay", "arguments": [0.1, 1000]}),
                &[(4, 0.0999960522), (1000, 0.0), (2000, 0.0)],
            ),
            (
                "cosine to an end",
                json!({"name": "cosine_decay", "arguments": [1e-5, 1000, 1e-7]}),
                &[(500, 5.05e-6), (1000, 1e-7)],
            ),
            (
                "linear",
                json!({"name": "linear_schedule", "arguments": [0, 0.1, 100]}),
                &[(0, 0.0), (50, 0.05), (101, 0.1)],
            ),
            (
                "warm-up",
                json!({"name": "cosine_decay", "arguments": [1e-5, 1000, 1e-7], "warmup": 100, "warmup_init": 1e-7}),
                &[(0, 1e-7), (50, 5.05e-6), (100, 1e-5), (101, 1e-5), (601, 5.05e-6), (1101, 1e-7)],
            ),
            (
                "join",
                json!({"name": "join_schedules", "arguments": [[
                    {"name": "linear_schedule", "arguments": [0, 0.1, 10]},
                    {"name": "step_decay", "arguments": [0.1, 0.5, 5]},
                    {"name": "exponential_decay", "arguments": [0.01, 0.5]}], [10, 20]]}),
                &[(5, 0.05), (10, 0.1), (15, 0.05), (20, 0.01), (21, 0.005)],
            ),
        ];
        for (name, config, points) in cases {
            let schedule = Schedule::Mlx(mlx_from_config(config).unwrap());
            for &(step, rate) in *points {
                let got = schedule.at(step);
                assert!((got - rate).abs() < 1e-9, "{name} at {step}: {got}, expected {rate}");
            }
        }
    }

    #[test]
    fn wrong_configurations_are_named() {
        let cases = [
            ("name", json!({"name": "cosin", "arguments": []}), "unknown schedule \"cosin\""),
            (
                "key",
                json!({"name": "cosine_decay", "arguments": [1, 2], "warmpu": 3}),
                "unknown key \"warmpu\"",
            ),
            ("few", json!({"name": "step_decay", "arguments": [1]}), "1 arguments given"),
            ("many", json!({"name": "cosine_decay", "arguments": [1, 2, 3, 4]}), "4 arguments given"),
            ("zero steps", json!({"name": "cosine_decay", "arguments": [1, 0]}), "whole number from 1"),
            ("text", json!({"name": "exponential_decay", "arguments": ["a", 1]}), "argument 1 is no number"),
            (
                "negative warm-up",
                json!({"name": "cosine_decay", "arguments": [1, 2], "warmup": -1}),
                "from 0",
            ),
            ("boundaries", json!({"name": "join_schedules", "arguments": [[], []]}), "one boundary less"),
        ];
        for (name, config, part) in cases {
            let error = mlx_from_config(&config).expect_err(name).to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
    }

    #[test]
    fn warm_up_is_a_share_rounded_up() {
        for (ratio, total, expected) in
            [(0.03, 100, 3), (0.03, 101, 4), (0.0, 50, 0), (1.5, 10, 10), (0.03, 0, 0)]
        {
            assert_eq!(warmup_steps(ratio, total), expected);
        }
    }
}
