//! A rule at work: steps over named parameters, with their state.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;

use mica_array::{Array, Dtype, Error, Result};

use super::Rate;
use crate::{Module, join, parameters, set_parameters};

/// What an optimizer keeps of one parameter, by MLX's names: `m`, `v` …
pub type Slots = BTreeMap<String, Array>;

/// Where a step stands.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Its number, from 1.
    pub step: u64,
    /// Its learning rate; 0 if the rule finds its own.
    pub rate: f64,
}

/// The arithmetic of one parameter's step.
pub trait Rule: Debug + Send + Sync {
    /// # Errors
    /// If a setting is out of range, or the rule can't work at such a rate.
    fn check(&self, rate: &Rate) -> Result<()>;

    /// What is kept of a parameter before its first step.
    fn start(&self, parameter: &Array) -> Slots;

    /// The new parameter, and in `slots` what is kept for the next step.
    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array>;
}

/// Something that moves parameters along their gradients.
pub trait Optimizer: Debug + Send + Sync {
    /// Makes the state of these parameters, which otherwise comes with their first gradient.
    fn init(&mut self, parameters: &[(String, Array)]);

    /// The new values of the parameters that have a gradient, lazily.
    ///
    /// # Errors
    /// If there is a gradient of no parameter.
    fn apply(
        &mut self,
        gradients: &[(String, Array)],
        parameters: &[(String, Array)],
    ) -> Result<Vec<(String, Array)>>;

    /// The learning rate of the last step, or before it, of the first; none, if the rule finds its own.
    fn learning_rate(&self) -> Option<f64>;

    /// One rate from now on, in place of what it followed.
    fn set_learning_rate(&mut self, rate: f64);

    /// The state as named arrays, as MLX calls them: `step`, `learning_rate`, `<parameter>.m` …
    fn state(&self) -> Result<Vec<(String, Array)>>;

    /// Takes back what [`Optimizer::state`] gave.
    ///
    /// # Errors
    /// If something in it is of another kind of optimizer.
    fn restore(&mut self, state: &[(String, Array)]) -> Result<()>;

    /// Moves a module's parameters. Evaluate them with the state ([`Optimizer::eval`]), or the
    /// graph of all steps is held.
    ///
    /// # Errors
    /// As [`Optimizer::apply`].
    fn update(&mut self, module: &mut dyn Module, gradients: &[(String, Array)]) -> Result<()> {
        let updated = self.apply(gradients, &parameters(module))?;
        set_parameters(module, &updated)
    }

    /// Computes a module's parameters and the state now.
    ///
    /// # Errors
    /// Those of evaluation.
    fn eval(&self, module: &dyn Module) -> Result<()> {
        let all: Vec<Array> =
            parameters(module).into_iter().chain(self.state()?).map(|(_, array)| array).collect();
        mica_array::eval(&all)
    }
}

/// A rule, its rate, and the state of every parameter that has had a gradient.
#[derive(Debug, Clone)]
pub struct Stepper<R> {
    rule: R,
    rate: Rate,
    step: u64,
    /// Of the last step.
    used: Option<f64>,
    slots: BTreeMap<String, Slots>,
}

impl<R: Rule> Stepper<R> {
    /// Before the first step.
    ///
    /// # Errors
    /// If a setting of the rule is out of range.
    pub fn new(rate: impl Into<Rate>, rule: R) -> Result<Stepper<R>> {
        let rate = rate.into();
        rule.check(&rate)?;
        Ok(Stepper { rule, used: rate.at(0), rate, step: 0, slots: BTreeMap::new() })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }
}

fn invalid(message: String) -> Error {
    Error::Invalid { op: "optimizer", message: message.into() }
}

impl<R: Rule> Optimizer for Stepper<R> {
    fn init(&mut self, parameters: &[(String, Array)]) {
        for (name, parameter) in parameters {
            self.slots.entry(name.clone()).or_insert_with(|| self.rule.start(parameter));
        }
    }

    fn apply(
        &mut self,
        gradients: &[(String, Array)],
        parameters: &[(String, Array)],
    ) -> Result<Vec<(String, Array)>> {
        let parameters: HashMap<&str, &Array> =
            parameters.iter().map(|(name, array)| (name.as_str(), array)).collect();
        let found = gradients
            .iter()
            .map(|(name, gradient)| match parameters.get(name.as_str()) {
                Some(parameter) if parameter.shape() == gradient.shape() => Ok((name, gradient, *parameter)),
                Some(parameter) => Err(invalid(format!(
                    "{name} has the shape {:?}, its gradient {:?}",
                    parameter.shape(),
                    gradient.shape()
                ))),
                None => Err(invalid(format!("there is a gradient of {name}, but no such parameter"))),
            })
            .collect::<Result<Vec<_>>>()?;
        self.used = self.rate.at(self.step);
        self.step += 1;
        let at = At { step: self.step, rate: self.used.unwrap_or(0.0) };
        found
            .into_iter()
            .map(|(name, gradient, parameter)| {
                let slots = self.slots.entry(name.clone()).or_insert_with(|| self.rule.start(parameter));
                Ok((name.clone(), self.rule.step(at, gradient, parameter, slots)?))
            })
            .collect()
    }

    fn learning_rate(&self) -> Option<f64> {
        self.used
    }

    fn set_learning_rate(&mut self, rate: f64) {
        self.rate = Rate::Constant(rate);
        self.used = Some(rate);
    }

    fn state(&self) -> Result<Vec<(String, Array)>> {
        let mut list = vec![("step".to_string(), Array::from_slice(&[self.step], &[])?)];
        if let Some(rate) = self.used {
            list.push(("learning_rate".to_string(), Array::full(&[], rate, Dtype::F32)));
        }
        for (name, slots) in &self.slots {
            list.extend(slots.iter().map(|(slot, array)| (join(name, slot), array.clone())));
        }
        Ok(list)
    }

    fn restore(&mut self, state: &[(String, Array)]) -> Result<()> {
        let (mut step, mut used, mut slots) = (None, self.used, BTreeMap::<String, Slots>::new());
        for (name, array) in state {
            match name.rsplit_once('.') {
                Some((parameter, slot)) => {
                    slots.entry(parameter.to_string()).or_default().insert(slot.to_string(), array.clone());
                }
                None if name == "step" => step = Some(array.astype(Dtype::U64)?.item::<u64>()?),
                None if name == "learning_rate" => {
                    used = Some(f64::from(array.astype(Dtype::F32)?.item::<f32>()?));
                }
                None => return Err(invalid(format!("the state holds {name}, which is no state"))),
            }
        }
        let step = step.ok_or_else(|| invalid("the state does not say its step".to_string()))?;
        for (name, slots) in &slots {
            // What is kept depends on the rank of a parameter alone.
            let known: Vec<Slots> = [&[1][..], &[1, 1]]
                .iter()
                .map(|shape| self.rule.start(&Array::zeros(shape, Dtype::F32)))
                .collect();
            let fits = known.iter().any(|known| known.keys().eq(slots.keys()));
            if !fits {
                let got: Vec<&str> = slots.keys().map(String::as_str).collect();
                let message = format!("{:?} does not keep {} of {name}", self.rule, got.join(", "));
                return Err(invalid(message));
            }
        }
        (self.step, self.used, self.slots) = (step, used, slots);
        if let (Rate::Constant(rate), Some(used)) = (&mut self.rate, self.used) {
            // Rates are saved in single precision: keep the digits if it is the same one.
            if *rate as f32 != used as f32 {
                *rate = used;
            }
        }
        Ok(())
    }
}
