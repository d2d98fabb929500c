//! Learning rates as a function of the step, computed in f64 and free of any state.

use std::f64::consts::PI;
use std::fmt;
use std::sync::Arc;

use mica_array::{Error, Result};
use serde::{Deserialize, Serialize};

/// MLX's schedules (`mlx.optimizers.schedulers`), by its names and arguments. Step 0 is the first.
///
/// The functions of this type check the arguments, as MLX does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // arguments are named as in mlx
pub enum Schedule {
    ExponentialDecay { init: f64, decay_rate: f64 },
    StepDecay { init: f64, decay_rate: f64, step_size: u64 },
    CosineDecay { init: f64, decay_steps: u64, end: f64 },
    LinearSchedule { init: f64, end: f64, steps: u64 },
    JoinSchedules { schedules: Vec<Schedule>, boundaries: Vec<u64> },
}

fn positive(op: &'static str, name: &str, steps: u64) -> Result<u64> {
    if steps > 0 {
        return Ok(steps);
    }
    Err(Error::Invalid { op, message: format!("{name} must be at least 1, got {steps}").into() })
}

impl Schedule {
    /// init · rate^step
    pub fn exponential_decay(init: f64, decay_rate: f64) -> Schedule {
        Schedule::ExponentialDecay { init, decay_rate }
    }

    /// init · rate^⌊step / size⌋
    pub fn step_decay(init: f64, decay_rate: f64, step_size: u64) -> Result<Schedule> {
        positive("step_decay", "step_size", step_size)?;
        Ok(Schedule::StepDecay { init, decay_rate, step_size })
    }

    /// Half a cosine wave from `init` to `end`, where it stays.
    pub fn cosine_decay(init: f64, decay_steps: u64, end: f64) -> Result<Schedule> {
        positive("cosine_decay", "decay_steps", decay_steps)?;
        Ok(Schedule::CosineDecay { init, decay_steps, end })
    }

    /// A straight line from `init` to `end`, where it stays.
    pub fn linear_schedule(init: f64, end: f64, steps: u64) -> Result<Schedule> {
        positive("linear_schedule", "steps", steps)?;
        Ok(Schedule::LinearSchedule { init, end, steps })
    }

    /// One after another: from each boundary on, the next, which counts its steps from there.
    ///
    /// # Errors
    /// Unless there is one boundary less than schedules, in rising order.
    pub fn join_schedules(schedules: Vec<Schedule>, boundaries: Vec<u64>) -> Result<Schedule> {
        if schedules.len() != boundaries.len() + 1 || !boundaries.is_sorted() {
            let message = format!(
                "{} schedules need {} rising boundaries, got {boundaries:?}",
                schedules.len(),
                schedules.len().saturating_sub(1)
            );
            return Err(Error::Invalid { op: "join_schedules", message: message.into() });
        }
        Ok(Schedule::JoinSchedules { schedules, boundaries })
    }

    /// The rate of a step.
    pub fn at(&self, step: u64) -> f64 {
        match self {
            Schedule::ExponentialDecay { init, decay_rate } => init * decay_rate.powf(step as f64),
            Schedule::StepDecay { init, decay_rate, step_size } => {
                init * decay_rate.powf((step / step_size) as f64)
            }
            Schedule::CosineDecay { init, decay_steps, end } => {
                let step = step.min(*decay_steps) as f64;
                end + 0.5 * (1.0 + (PI / *decay_steps as f64 * step).cos()) * (init - end)
            }
            Schedule::LinearSchedule { init, end, steps } => {
                step.min(*steps) as f64 * ((end - init) / *steps as f64) + init
            }
            Schedule::JoinSchedules { schedules, boundaries } => {
                // As mlx: each schedule counts from its own boundary, which is absolute.
                let reached = boundaries.iter().filter(|&&boundary| step >= boundary).count();
                let start = if reached == 0 { 0 } else { boundaries[reached - 1] };
                schedules[reached].at(step - start)
            }
        }
    }

    /// The first argument: of a decay, the highest rate.
    pub fn init(&self) -> f64 {
        match self {
            Schedule::ExponentialDecay { init, .. }
            | Schedule::StepDecay { init, .. }
            | Schedule::CosineDecay { init, .. }
            | Schedule::LinearSchedule { init, .. } => *init,
            Schedule::JoinSchedules { schedules, .. } => schedules.first().map_or(0.0, Schedule::init),
        }
    }
}

/// A learning rate.
#[derive(Clone)]
pub enum Rate {
    /// One for all steps.
    Constant(f64),
    /// One of MLX's schedules.
    Schedule(Schedule),
    /// Any function of the step, from 0.
    Function(Arc<dyn Fn(u64) -> f64 + Send + Sync>),
    /// The rule finds it by itself, as [`Adafactor`](super::Adafactor) can.
    Relative,
}

impl Rate {
    /// The rate of a step, if it is known from outside.
    pub fn at(&self, step: u64) -> Option<f64> {
        match self {
            Rate::Constant(rate) => Some(*rate),
            Rate::Schedule(schedule) => Some(schedule.at(step)),
            Rate::Function(rate) => Some(rate(step)),
            Rate::Relative => None,
        }
    }
}

impl From<f64> for Rate {
    fn from(rate: f64) -> Rate {
        Rate::Constant(rate)
    }
}

impl From<Schedule> for Rate {
    fn from(schedule: Schedule) -> Rate {
        Rate::Schedule(schedule)
    }
}

impl fmt::Debug for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rate::Constant(rate) => write!(f, "Constant({rate})"),
            Rate::Schedule(schedule) => write!(f, "Schedule({schedule:?})"),
            Rate::Function(_) => f.write_str("Function"),
            Rate::Relative => f.write_str("Relative"),
        }
    }
}
