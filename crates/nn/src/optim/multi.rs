//! Several optimizers, each for its own parameters.

use std::fmt;
use std::sync::Arc;

use mica_array::{Array, Error, Result};

use super::Optimizer;

/// Picks parameters by name and gradient.
pub type Filter = Arc<dyn Fn(&str, &Array) -> bool + Send + Sync>;

/// Gives each parameter to the first optimizer whose filter picks it; the last takes the rest.
pub struct MultiOptimizer {
    optimizers: Vec<Box<dyn Optimizer>>,
    filters: Vec<Filter>,
}

impl fmt::Debug for MultiOptimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MultiOptimizer").field("optimizers", &self.optimizers).finish_non_exhaustive()
    }
}

fn invalid(message: String) -> Error {
    Error::Invalid { op: "MultiOptimizer", message: message.into() }
}

impl MultiOptimizer {
    /// # Errors
    /// Unless there is one filter less than optimizers.
    pub fn new(optimizers: Vec<Box<dyn Optimizer>>, filters: Vec<Filter>) -> Result<MultiOptimizer> {
        if optimizers.len() != filters.len() + 1 {
            let (given, needed) = (filters.len(), optimizers.len().saturating_sub(1));
            return Err(invalid(format!(
                "{} optimizers need {needed} filters, got {given}",
                optimizers.len()
            )));
        }
        Ok(MultiOptimizer { optimizers, filters })
    }

    fn split(&self, arrays: &[(String, Array)]) -> Vec<Vec<(String, Array)>> {
        let mut parts = vec![Vec::new(); self.optimizers.len()];
        for (name, array) in arrays {
            let place = self.filters.iter().position(|filter| filter(name, array));
            parts[place.unwrap_or(self.filters.len())].push((name.clone(), array.clone()));
        }
        parts
    }
}

impl Optimizer for MultiOptimizer {
    fn init(&mut self, parameters: &[(String, Array)]) {
        let parts = self.split(parameters);
        self.optimizers.iter_mut().zip(parts).for_each(|(optimizer, part)| optimizer.init(&part));
    }

    fn apply(
        &mut self,
        gradients: &[(String, Array)],
        parameters: &[(String, Array)],
    ) -> Result<Vec<(String, Array)>> {
        let parts = self.split(gradients);
        let mut updated = Vec::with_capacity(gradients.len());
        for (optimizer, part) in self.optimizers.iter_mut().zip(parts) {
            updated.extend(optimizer.apply(&part, parameters)?);
        }
        Ok(updated)
    }

    fn learning_rate(&self) -> Option<f64> {
        self.optimizers[0].learning_rate()
    }

    fn set_learning_rate(&mut self, rate: f64) {
        self.optimizers.iter_mut().for_each(|optimizer| optimizer.set_learning_rate(rate));
    }

    fn state(&self) -> Result<Vec<(String, Array)>> {
        let mut list = Vec::new();
        for (index, optimizer) in self.optimizers.iter().enumerate() {
            let part = optimizer.state()?.into_iter();
            list.extend(part.map(|(name, array)| (format!("states.{index}.{name}"), array)));
        }
        Ok(list)
    }

    fn restore(&mut self, state: &[(String, Array)]) -> Result<()> {
        let mut parts = vec![Vec::new(); self.optimizers.len()];
        for (name, array) in state {
            let place = name.strip_prefix("states.").and_then(|rest| rest.split_once('.'));
            let place = place.and_then(|(index, rest)| Some((index.parse::<usize>().ok()?, rest)));
            match place {
                Some((index, rest)) if index < parts.len() => {
                    parts[index].push((rest.to_string(), array.clone()));
                }
                _ => return Err(invalid(format!("the state holds {name}, which is no state"))),
            }
        }
        self.optimizers.iter_mut().zip(parts).try_for_each(|(optimizer, part)| optimizer.restore(&part))
    }
}
