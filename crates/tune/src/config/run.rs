//! The resolved configuration of a run: every value decided, written to the run folder as `config.yaml`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::optimizer::Optimizer;
use crate::data::batch::{Gather, Lengths};
use crate::data::format::Columns;
use crate::data::sample::Rules;
use crate::schedule::{Decay, Mlx, Schedule, warmup_steps};
use crate::{Error, Result};

/// What is minimised. Each has its file in `methods/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Supervised fine-tuning.
    Sft,
    /// Continued pretraining: every token of running text.
    Cpt,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FineTune {
    /// Low-rank adapters.
    Lora,
    /// Low-rank adapters with magnitudes apart.
    Dora,
    /// The weights themselves.
    Full,
}

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Duration {
    /// Optimizer steps.
    Steps(u64),
    /// Passes over the data; the last one may be partial.
    Epochs(f64),
    /// Micro-batches (mlx-lm's `iters`); a partial last window is applied.
    Iters(u64),
}

/// The adapters of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// Rank of the two factors.
    pub rank: usize,
    /// What the product of the factors is multiplied by (alpha / rank, or alpha / √rank for rsLoRA).
    pub scale: f64,
    /// Share of the inputs dropped during training.
    pub dropout: f64,
    /// Layers by full path or suffix; `None` means all linear layers of the blocks.
    pub keys: Option<Vec<String>>,
    /// The last so many blocks; `None` means all.
    pub layers: Option<usize>,
}

/// How the learning rate goes, before the number of steps is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    /// Over the run, from its peak.
    Run {
        /// The highest rate.
        peak: f64,
        /// What follows the warm-up.
        decay: Decay,
        /// Steps of warm-up, if they were given.
        warmup_steps: Option<u64>,
        /// Else this share of the run.
        warmup_ratio: f64,
    },
    /// mlx's schedules, which know no end of the run.
    Mlx(Mlx),
}

impl Rate {
    /// The schedule of a run with this many optimizer steps.
    pub fn schedule(&self, total: u64) -> Schedule {
        match self {
            Rate::Run { peak, decay, warmup_steps: given, warmup_ratio } => {
                let warmup = given.unwrap_or_else(|| warmup_steps(*warmup_ratio, total)).min(total);
                Schedule::Run { peak: *peak, warmup, total, decay: *decay }
            }
            Rate::Mlx(mlx) => Schedule::Mlx(mlx.clone()),
        }
    }
}

/// An evaluation on the test set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestRun {
    /// How many batches; `None` means all.
    pub batches: Option<usize>,
}

/// Facts about the model on which defaults depend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFacts {
    /// Number of blocks.
    pub layers: usize,
    /// Bits of quantized weights; `None` for float weights.
    pub bits: Option<u32>,
    /// The longest sequence that the model was made for, if it says so.
    pub positions: Option<usize>,
}

/// Everything that a run does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    /// Folder or hub name of the model.
    pub model: String,
    /// Data file or folder.
    pub data: PathBuf,
    /// The run folder.
    pub output: PathBuf,
    /// What is minimised.
    pub method: Method,
    /// What is trained.
    pub fine_tune: FineTune,
    /// The adapters, unless the weights themselves are trained.
    pub adapter: Option<AdapterConfig>,
    /// Blocks that are trained in full fine-tuning, from the last; `None` means everything.
    pub full_layers: Option<usize>,
    /// Where randomness starts.
    pub seed: u64,
    /// Names of columns.
    pub columns: Columns,
    /// What of a record is learnt, and how long it may be.
    pub rules: Rules,
    /// Bad lines that may be passed over.
    pub skip_bad_lines: usize,
    /// Rows of training data held out for validation if there is no validation file; 0 holds out none.
    pub hold_out: usize,
    /// Rows of one optimizer step.
    pub batch_size: usize,
    /// Rows that are computed at once; `None` takes what fits into memory. Divides `batch_size`.
    pub micro_batch_size: Option<usize>,
    /// How samples share rows.
    pub gather: Gather,
    /// To what lengths rows are padded.
    pub lengths: Lengths,
    /// How long the run is.
    pub duration: Duration,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The learning rate.
    pub rate: Rate,
    /// Gradients are scaled down to this norm; `None` leaves them.
    pub clip: Option<f64>,
    /// Recompute the activations of all blocks in the backward pass to save memory, also where they would fit.
    pub grad_checkpoint: bool,
    /// In a run folder: how many blocks the last start recomputes. Each start finds it anew, for the memory that it
    /// has; no result depends on it.
    #[serde(default)]
    pub recomputed_blocks: usize,
    /// Steps between report lines (micro-batches if the duration counts those; the next three too).
    pub report_every: u64,
    /// Steps between validations; 0 means none.
    pub eval_every: u64,
    /// Batches of a validation; `None` means all.
    pub val_batches: Option<usize>,
    /// Steps between checkpoints; 0 means only at the end.
    pub save_every: u64,
    /// The evaluation on the test set at the end, if there is one.
    pub test: Option<TestRun>,
    /// Whether there is any training (mlx-lm's `train`; off for a test alone).
    pub train: bool,
    /// Adapter from which to start.
    pub resume_adapter_file: Option<PathBuf>,
    /// Bytes of freed memory kept for reuse; 0 keeps what the allocator likes.
    pub cache_limit: u64,
}

impl RunConfig {
    /// Cuts samples at the longest sequence that the model was made for, and says so if that is less than was
    /// asked for.
    pub fn fit(&mut self, facts: &ModelFacts) -> Option<String> {
        let (asked, most) = (self.rules.max_length, facts.positions?);
        if asked <= most {
            return None;
        }
        self.rules.max_length = most;
        Some(format!(
            "max_seq_length is {asked}, the model was made for {most} positions (max_position_embeddings): samples \
             are cut at {most} tokens"
        ))
    }

    /// Micro-batches of one optimizer step, once the micro-batch is chosen.
    pub fn accumulate(&self, micro_batch_size: usize) -> usize {
        self.batch_size.div_ceil(micro_batch_size.max(1))
    }

    /// Micro-batches of this size in so many batches of an evaluation: it covers the same rows whatever memory made of
    /// the micro-batch. (`mica lora` counts micro-batches, as mlx-lm does.)
    pub fn evaluated(&self, batches: Option<usize>, micro_batch_size: usize) -> Option<usize> {
        match self.duration {
            Duration::Iters(_) => batches,
            _ => batches.map(|batches| batches.saturating_mul(self.accumulate(micro_batch_size))),
        }
    }

    /// Optimizer steps of the run, for this many micro-batches in an epoch and in a step.
    pub fn total_steps(&self, micro_batches_in_epoch: usize, accumulate: usize) -> u64 {
        let accumulate = accumulate.max(1) as u64;
        match self.duration {
            Duration::Steps(steps) => steps,
            Duration::Iters(iters) => iters.div_ceil(accumulate),
            Duration::Epochs(epochs) => {
                let steps = (micro_batches_in_epoch as u64).div_ceil(accumulate);
                (epochs * steps as f64).ceil() as u64
            }
        }
    }

    /// As YAML, for the run folder.
    pub fn to_yaml(&self) -> Result<String> {
        serde_saphyr::to_string(self)
            .map_err(|e| Error::Config(format!("the resolved settings cannot be written: {e}")))
    }

    /// From the run folder's YAML.
    pub fn from_yaml(text: &str) -> Result<RunConfig> {
        serde_saphyr::from_str(text).map_err(|e| Error::Config(format!("config.yaml of the run folder: {e}")))
    }

    /// Refuses values that no run can have, with the names that a person would look for.
    pub(super) fn check(self) -> Result<RunConfig> {
        let fail = |cause: String| Err(Error::Config(cause));
        if self.batch_size == 0 {
            return fail("batch_size must be at least 1".into());
        }
        if let Some(micro) = self.micro_batch_size
            && (micro == 0 || !self.batch_size.is_multiple_of(micro))
        {
            return fail(format!("micro_batch_size {micro} must divide batch_size {}", self.batch_size));
        }
        if self.rules.max_length < 2 {
            return fail(format!("max_seq_length must be at least 2, got {}", self.rules.max_length));
        }
        match &self.lengths {
            Lengths::Multiple(0) => return fail("bucket_size must be at least 1".into()),
            Lengths::List(list) if list.is_empty() || list.contains(&0) => {
                return fail("bucket_sizes must be lengths of at least 1".into());
            }
            _ => {}
        }
        match self.duration {
            Duration::Steps(0) | Duration::Iters(0) if self.train => {
                return fail("steps or iters must be at least 1".into());
            }
            Duration::Epochs(epochs) if !(epochs > 0.0 && epochs.is_finite()) => {
                return fail(format!("epochs must be above 0, got {epochs}"));
            }
            _ => {}
        }
        if let Rate::Run { peak, warmup_ratio, .. } = &self.rate {
            if !(*peak >= 0.0 && peak.is_finite()) {
                return fail(format!("learning_rate must be 0 or more, got {peak}"));
            }
            if !(0.0..=1.0).contains(warmup_ratio) {
                return fail(format!("warmup_ratio must be between 0 and 1, got {warmup_ratio}"));
            }
        }
        if self.clip.is_some_and(|clip| clip.is_nan() || clip <= 0.0) {
            return fail("max_grad_norm must be above 0 (null turns clipping off)".into());
        }
        if let Some(adapter) = &self.adapter {
            if adapter.rank == 0 {
                return fail("the adapter's rank must be at least 1".into());
            }
            if !(0.0..1.0).contains(&adapter.dropout) {
                return fail(format!(
                    "the adapter's dropout must be at least 0 and less than 1, got {}",
                    adapter.dropout
                ));
            }
            if !adapter.scale.is_finite() {
                return fail("the adapter's scale must be a number".into());
            }
            if adapter.keys.as_ref().is_some_and(Vec::is_empty) {
                return fail("the adapter's keys are an empty list, so nothing would be trained; leave them out for all linear layers".into());
            }
        }
        if self.report_every == 0 {
            return fail("steps between reports must be at least 1".into());
        }
        Ok(self)
    }
}
