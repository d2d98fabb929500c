//! What a run tells: the trainer emits events, and whoever listens draws, writes or sends them.

use serde::{Deserialize, Serialize};

use crate::summary::Summary;

/// Something that happened in a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The run begins (or goes on).
    Started(Started),
    /// An optimizer step was done.
    Step(Step),
    /// The validation set was evaluated.
    Validation(Evaluation),
    /// The test set was evaluated.
    Test(Evaluation),
    /// A checkpoint is on disk.
    CheckpointSaved {
        /// The step after which it was made.
        step: u64,
        /// Where it is.
        path: std::path::PathBuf,
    },
    /// The adapter was saved for other programs.
    AdapterSaved {
        /// The micro-batch (`mica lora`) or step after which it was saved.
        step: u64,
        /// Where it is.
        files: Vec<std::path::PathBuf>,
    },
    /// Something the person should know.
    Note {
        /// Whether it is a warning.
        warning: bool,
        /// What to know.
        text: String,
    },
    /// The run is over.
    Finished(Summary),
}

/// What is known when a run starts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps done before, if it goes on.
    pub done_steps: u64,
    /// Number of parameters that are trained.
    pub trainable: u64,
    /// Number of all parameters.
    pub parameters: u64,
}

/// One optimizer step; also a line of metrics.jsonl.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Steps done, this one included.
    pub step: u64,
    /// Micro-batches done.
    pub iter: u64,
    /// Done in the run's own unit, in which report lines, evaluations and checkpoints are counted: micro-batches
    /// (`mica lora`) or steps.
    #[serde(skip)]
    pub count: u64,
    /// Mean loss over the step's targets.
    pub loss: f64,
    /// Targets in this step.
    pub tokens: u64,
    /// Targets since the beginning.
    pub trained_tokens: u64,
    /// Targets a second in this step.
    pub tokens_per_s: f64,
    /// Micro-batches a second in this step: data, forward, backward and optimizer.
    pub it_per_s: f64,
    /// Seconds of this step.
    pub seconds: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Largest memory use so far, in 10⁹ bytes.
    pub peak_memory_gb: f64,
    /// The method's own numbers (accuracy, margin …).
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// A set was evaluated.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Micro-batches (`mica lora`) or steps done before.
    pub step: u64,
    /// Mean loss over all targets.
    pub loss: f64,
    /// Targets.
    pub tokens: u64,
    /// Seconds.
    pub seconds: f64,
}

/// Somebody who listens to a run.
pub trait Observer {
    /// Takes an event. Must not fail: a listener's trouble is no reason to lose a run.
    fn event(&mut self, event: &Event);
}

impl<F: FnMut(&Event)> Observer for F {
    fn event(&mut self, event: &Event) {
        self(event);
    }
}

/// Several listeners as one.
#[derive(Default)]
pub struct Observers<'a> {
    all: Vec<Box<dyn Observer + 'a>>,
}

impl<'a> Observers<'a> {
    /// Adds a listener.
    pub fn add(&mut self, observer: impl Observer + 'a) {
        self.all.push(Box::new(observer));
    }
}

impl Observer for Observers<'_> {
    fn event(&mut self, event: &Event) {
        self.all.iter_mut().for_each(|observer| observer.event(event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_json_and_reach_everyone() {
        let mut step = Step { step: 3, loss: 0.1 + 0.2, ..Step::default() };
        step.extra.insert("accuracy".into(), 0.5.into());
        let event = Event::Step(step);
        let text = serde_json::to_string(&event).unwrap();
        assert!(
            text.starts_with("{\"event\":\"step\",\"step\":3,") && text.contains("0.30000000000000004"),
            "{text}"
        );
        assert!(text.contains("\"accuracy\":0.5"), "{text}");
        let (mut a, mut b) = (0, 0);
        let mut observers = Observers::default();
        observers.add(|_: &Event| a += 1);
        observers.add(|_: &Event| b += 1);
        observers.event(&event);
        drop(observers);
        assert_eq!((a, b), (1, 1));
    }
}
