//! The one loop of all methods: window of micro-batches → step → events, evaluation, checkpoints.
//!
//! What is random in a run is a function of the seed and of counters, what is remembered from step to step is
//! in a checkpoint ([`store`]), and results do not depend on the number of threads: so a run that was killed
//! and goes on prints the numbers of the undisturbed one, bit for bit. The gradient of a window is that of the
//! summed loss divided by the window's targets ([`update`]), last partial window included.
//!
//! Which model, data and options there are is decided by the caller; nothing here draws or reads flags.

pub mod store;
pub mod update;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mica_lm::models::LanguageModel;
use mica_nn::parameters;

use crate::data::batch::Batch;
use crate::data::loader::{Loader, Options};
use crate::data::prefetch::Prefetch;
use crate::data::samples::Samples;
use crate::events::{Evaluation, Event, Observer, Started, Step};
use crate::methods::Method;
use crate::run::checkpoint::RunState;
use crate::run::{Metrics, RunFolder};
use crate::schedule::Schedule;
use crate::summary::{Recorder, Summary};
use crate::{Error, Result};
pub use update::{Stepped, Update, UpdateSettings};

/// Batches that are prepared ahead of the one in training.
const AHEAD: usize = 4;
/// Micro-batches without a single target that may come in a row; more means that the data holds none.
const MOST_EMPTY: usize = 10_000;

/// How long a run is and what happens in between.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Optimizer steps of the run; it also ends where the data does.
    pub steps: u64,
    /// Micro-batches of the run, if those are counted (`mica lora`); the last window may be partial.
    pub iters: Option<u64>,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Whether a step's micro-batches are of one pass over the data, so that the last step of a pass may be smaller.
    pub passes: bool,
    /// The learning rate.
    pub schedule: Schedule,
    /// Steps (micro-batches if those are counted) between evaluations; 0 means none.
    pub eval_every: u64,
    /// Batches of an evaluation; `None` means all.
    pub val_batches: Option<usize>,
    /// Steps (micro-batches if those are counted) between checkpoints; 0 means only at the end.
    pub save_every: u64,
    /// How many of the newest checkpoints are kept, besides the best one.
    pub keep: usize,
}

/// A set of samples for evaluation.
#[derive(Clone)]
pub struct HeldOut {
    /// The samples.
    pub samples: Arc<dyn Samples>,
    /// How they form batches; one pass is made, without shuffling.
    pub options: Options,
}

/// Everything that a run needs.
pub struct Run<'a> {
    /// The model, adapters attached.
    pub model: &'a mut dyn LanguageModel,
    /// What is minimised.
    pub method: &'a dyn Method,
    /// The parameters that are trained, by name.
    pub names: Vec<String>,
    /// What to evaluate on.
    pub validation: Option<HeldOut>,
    /// Steps.
    pub plan: Plan,
    /// Gradients.
    pub update: UpdateSettings,
    /// The run folder, held.
    pub folder: &'a RunFolder,
    /// Who listens.
    pub observer: &'a mut dyn Observer,
    /// Set from outside (Ctrl-C): save after the present step, and stop.
    pub stop: &'a AtomicBool,
    /// Writes what other programs read (an adapter) after each checkpoint; gets the model and the count of steps
    /// or micro-batches, gives the files.
    pub export: &'a mut dyn FnMut(&dyn LanguageModel, u64) -> Result<Vec<PathBuf>>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done.
    Finished(Box<Summary>),
    /// It was stopped, and can go on from its last checkpoint.
    Stopped {
        /// Steps done.
        step: u64,
        /// The checkpoint.
        checkpoint: PathBuf,
    },
}

/// A run under way.
struct Trainer<'a> {
    run: Run<'a>,
    update: Update,
    data: Prefetch,
    metrics: Metrics,
    state: RunState,
    recorder: Recorder,
    saved: Option<(u64, PathBuf)>,
    started: Instant,
    seconds_before: f64,
}

/// Trains on `data`, a loader at its beginning, until the plan is done, the data ends, or `stop` is set. With
/// `resume`, goes on from the newest checkpoint that is whole, or begins if there is none.
///
/// # Errors
/// Data, disk and memory; a loss that is not a number ([`Error::NotFinite`]); a checkpoint of another run.
pub fn train(run: Run<'_>, data: Loader, resume: bool) -> Result<Outcome> {
    let update = Update::new(&*run.model, &run.names, run.update)?;
    Trainer::open(run, update, data, resume)?.go()
}

fn note(observer: &mut dyn Observer, warning: bool, text: String) {
    observer.event(&Event::Note { warning, text });
}

impl<'a> Trainer<'a> {
    fn open(run: Run<'a>, mut update: Update, mut data: Loader, resume: bool) -> Result<Trainer<'a>> {
        let found = if resume { run.folder.checkpoints().latest_valid()? } else { None };
        let mut state = RunState::default();
        if let Some(found) = found {
            for reason in &found.passed_over {
                note(run.observer, true, format!("a newer checkpoint was passed over: {reason}"));
            }
            let now = store::about(&*run.model, &update);
            if found.about != now {
                let text = format!(
                    "the checkpoint was made by {:?}, this is {now:?}: the numbers to come may differ in their \
                     last bits",
                    found.about
                );
                note(run.observer, true, text);
            }
            store::restore(&found.path, &found.state, run.model, &mut update)?;
            data.restore(found.state.loader.clone())?;
            state = found.state;
        } else if resume {
            note(run.observer, false, "there is no checkpoint yet: the run begins".into());
        }
        let metrics = run.folder.metrics(resume.then_some(state.metrics_bytes))?;
        let (data, seconds_before) = (Prefetch::start(data, AHEAD)?, state.seconds);
        let recorder = Recorder::default();
        Ok(Trainer {
            run,
            update,
            data,
            metrics,
            state,
            recorder,
            saved: None,
            started: Instant::now(),
            seconds_before,
        })
    }

    fn go(mut self) -> Result<Outcome> {
        let trainable = size(self.update.parameters(&*self.run.model));
        let all = size(parameters(self.run.model.as_module()));
        let started = Started {
            total_steps: self.run.plan.steps,
            done_steps: self.state.step,
            trainable,
            parameters: all,
        };
        self.run.observer.event(&Event::Started(started));
        if self.state.step == 0 && self.run.plan.eval_every > 0 {
            // mlx-lm calls the evaluation before the first micro-batch that of micro-batch 1.
            self.validate(u64::from(self.run.plan.iters.is_some()))?;
        }
        while !self.is_done() {
            if self.run.stop.load(Ordering::Relaxed) {
                let checkpoint = self.save()?;
                return Ok(Outcome::Stopped { step: self.state.step, checkpoint });
            }
            let begun = Instant::now();
            let window = self.next_window()?;
            if window.is_empty() {
                break;
            }
            self.step(&window, begun)?;
        }
        self.save()?;
        let summary = self.recorder.summary(self.started.elapsed().as_secs_f64(), trainable, all);
        self.run.observer.event(&Event::Finished(summary.clone()));
        Ok(Outcome::Finished(Box::new(summary)))
    }

    fn is_done(&self) -> bool {
        let plan = &self.run.plan;
        match plan.iters {
            Some(iters) => self.state.micro_batches >= iters,
            None => self.state.step >= plan.steps,
        }
    }

    /// The unit in which evaluations and checkpoints are counted.
    fn count(&self) -> u64 {
        if self.run.plan.iters.is_some() { self.state.micro_batches } else { self.state.step }
    }

    /// The micro-batches of the next step: fewer than asked for at the end of the run, of the data or (if passes are
    /// counted) of a pass, more if they hold no target at all.
    fn next_window(&mut self) -> Result<Vec<Batch>> {
        let left = self.run.plan.iters.map_or(u64::MAX, |iters| iters - self.state.micro_batches);
        let wanted = left.min(self.run.plan.accumulate.max(1) as u64);
        let (mut window, mut targets) = (Vec::new(), 0);
        let pass = self.data.state().epoch;
        while (window.len() as u64) < wanted || targets == 0 {
            if window.len() as u64 >= left || window.len() >= MOST_EMPTY {
                break;
            }
            let Some(batch) = self.data.next_batch()? else { break };
            targets += batch.labelled;
            window.push(batch);
            if self.run.plan.passes && targets > 0 && self.data.state().epoch != pass {
                break;
            }
        }
        if targets == 0 && window.len() >= MOST_EMPTY {
            return Err(Error::NothingToLearn(format!(
                "{MOST_EMPTY} batches in a row hold nothing to learn: check masks and columns"
            )));
        }
        if targets == 0 {
            window.clear();
        }
        Ok(window)
    }

    fn step(&mut self, window: &[Batch], begun: Instant) -> Result<()> {
        let lr = self.run.plan.schedule.at(self.state.step);
        let result =
            self.update.step(self.run.model, self.run.method, window, self.state.micro_batches, lr)?;
        for (what, value) in [("loss", result.loss), ("norm of the gradient", result.grad_norm)] {
            if !value.is_finite() {
                let step = self.state.step + 1;
                let batch = store::save_window(self.run.folder.path(), step, window)?;
                return Err(Error::NotFinite { step, what, value, batch });
            }
        }
        let before = self.count();
        self.state.step += 1;
        self.state.micro_batches += window.len() as u64;
        self.state.trained_tokens += result.tokens;
        self.state.loader = self.data.state().clone();
        let seconds = begun.elapsed().as_secs_f64();
        let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        let mut step = Step {
            step: self.state.step,
            iter: self.state.micro_batches,
            count: self.count(),
            loss: result.loss,
            tokens: result.tokens,
            trained_tokens: self.state.trained_tokens,
            tokens_per_s: per_second(result.tokens as f64),
            it_per_s: per_second(window.len() as f64),
            seconds,
            lr,
            grad_norm: result.grad_norm,
            peak_memory_gb: store::peak_memory() as f64 / 1e9,
            ..Step::default()
        };
        self.recorder.step(&step);
        self.run.observer.event(&Event::Step(step.clone()));
        let due = |every: u64, now: u64| every > 0 && now / every > before / every;
        let mut better = false;
        // As in mlx-lm, where micro-batches are counted the last one has an evaluation too.
        let last = self.run.plan.iters == Some(self.state.micro_batches) && self.run.plan.eval_every > 0;
        if (last || due(self.run.plan.eval_every, self.count()))
            && let Some((loss, best)) = self.validate(self.count())?
        {
            step.extra.insert("val_loss".into(), loss.into());
            better = best;
        }
        self.metrics.write(&step)?;
        // A new best is worth keeping, but not where checkpoints were turned off.
        if due(self.run.plan.save_every, self.count()) || (better && self.run.plan.save_every > 0) {
            self.save()?;
        }
        Ok(())
    }

    /// The loss on held-out data, if there is any, and whether it is the lowest so far.
    fn validate(&mut self, at: u64) -> Result<Option<(f64, bool)>> {
        let Some(held) = self.run.validation.clone() else { return Ok(None) };
        let begun = Instant::now();
        let options = Options { shuffle: false, epochs: Some(1), ..held.options };
        let mut loader = Loader::new(held.samples, options)?;
        let next = limited(|| loader.next_batch(), self.run.plan.val_batches);
        let (loss, tokens) =
            update::evaluate(&*self.run.model, self.run.method, self.run.update.precision, next)?;
        if tokens == 0 {
            note(self.run.observer, true, "the validation set has nothing to learn: no loss".into());
            return Ok(None);
        }
        let seconds = begun.elapsed().as_secs_f64();
        self.run.observer.event(&Event::Validation(Evaluation { step: at, loss, tokens, seconds }));
        let best = self.state.best_loss_bits.map_or(f64::INFINITY, f64::from_bits);
        // Before the first step there is nothing to keep.
        let better = self.state.step > 0 && loss < best;
        if better {
            self.state.best_loss_bits = Some(loss.to_bits());
            self.state.best_step = Some(self.state.step);
        }
        Ok(Some((loss, better)))
    }

    /// Saves a checkpoint of the present step, unless there is one.
    fn save(&mut self) -> Result<PathBuf> {
        if let Some((step, path)) = &self.saved
            && *step == self.state.step
        {
            return Ok(path.clone());
        }
        self.state.metrics_bytes = self.metrics.sync()?;
        self.state.seconds = self.seconds_before + self.started.elapsed().as_secs_f64();
        self.state.loader = self.data.state().clone();
        let checkpoints = self.run.folder.checkpoints();
        let path = store::save(&checkpoints, &mut self.state, &*self.run.model, &self.update)?;
        checkpoints.prune(self.run.plan.keep, self.state.step, self.state.best_step)?;
        self.saved = Some((self.state.step, path.clone()));
        self.run.observer.event(&Event::CheckpointSaved { step: self.state.step, path: path.clone() });
        let count = self.count();
        let files = (self.run.export)(&*self.run.model, count)?;
        if !files.is_empty() {
            self.run.observer.event(&Event::AdapterSaved { step: count, files });
        }
        Ok(path)
    }
}

/// At most so many of what `next` gives.
pub fn limited<T>(
    mut next: impl FnMut() -> Result<Option<T>>,
    most: Option<usize>,
) -> impl FnMut() -> Result<Option<T>> {
    let mut left = most.unwrap_or(usize::MAX);
    move || {
        if left == 0 {
            return Ok(None);
        }
        left -= 1;
        next()
    }
}

/// Elements of all arrays.
fn size(arrays: Vec<(String, mica_array::Array)>) -> u64 {
    arrays.iter().map(|(_, array)| array.size() as u64).sum()
}
