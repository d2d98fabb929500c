//! `mica lora`: mlx-lm's keys, defaults and meanings.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::keys::{Settings, typed};
use super::optimizer::{Optimizer, section};
use super::run::{AdapterConfig, Duration, FineTune, Method, ModelFacts, Rate, RunConfig, TestRun};
use super::train::{batches, layers, lengths};
use crate::data::batch::Gather;
use crate::data::format::Columns;
use crate::data::sample::Rules;
use crate::schedule::{Decay, mlx_from_config};
use crate::{Error, Result};

/// The keys of mlx-lm's LoRA configuration; what is `None` was not given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // named and documented by mlx-lm
pub struct LoraConfig {
    pub model: Option<String>,
    pub train: Option<bool>,
    pub fine_tune_type: Option<FineTune>,
    pub optimizer: Option<String>,
    pub optimizer_config: Option<Settings>,
    pub data: Option<PathBuf>,
    pub seed: Option<u64>,
    pub num_layers: Option<i64>,
    /// mlx-lm's older name of `num_layers`.
    pub lora_layers: Option<i64>,
    pub batch_size: Option<usize>,
    pub iters: Option<u64>,
    pub val_batches: Option<i64>,
    pub learning_rate: Option<f64>,
    pub steps_per_report: Option<u64>,
    pub steps_per_eval: Option<u64>,
    pub resume_adapter_file: Option<PathBuf>,
    pub adapter_path: Option<PathBuf>,
    pub save_every: Option<u64>,
    pub test: Option<bool>,
    pub test_batches: Option<i64>,
    pub max_seq_length: Option<usize>,
    pub config: Option<Value>,
    pub grad_checkpoint: Option<bool>,
    pub grad_accumulation_steps: Option<usize>,
    /// A number of bytes, or a size with a unit.
    pub clear_cache_threshold: Option<Value>,
    pub lr_schedule: Option<Value>,
    pub lora_parameters: Option<Settings>,
    pub mask_prompt: Option<bool>,
    pub report_to: Option<Value>,
    pub project_name: Option<Value>,
    pub trust_remote_code: Option<bool>,
    pub prompt_feature: Option<String>,
    pub completion_feature: Option<String>,
    pub chat_feature: Option<String>,
    pub text_feature: Option<String>,
    // mica's own.
    pub skip_bad_lines: Option<usize>,
    pub bucket_size: Option<usize>,
    pub bucket_sizes: Option<Vec<usize>>,
}

/// The section `lora_parameters`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct LoraParameters {
    rank: Option<usize>,
    scale: Option<f64>,
    dropout: Option<f64>,
    keys: Option<Vec<String>>,
    /// Older files of mlx-lm have it: scale = alpha / rank.
    alpha: Option<f64>,
}

impl LoraConfig {
    /// From settings by name; flags with dashes and the older names are taken too.
    pub fn new(settings: Settings) -> Result<LoraConfig> {
        typed(settings, "")
    }

    /// Decides every value. The second result is what to tell the person.
    ///
    /// `iters` counts micro-batches of `batch_size` rows; an optimizer step takes `grad_accumulation_steps` of them.
    pub fn resolve(self, facts: &ModelFacts) -> Result<(RunConfig, Vec<String>)> {
        let fail = |cause: &str| Err(Error::Config(cause.into()));
        let mut notes = Vec::new();
        if !matches!(self.report_to, None | Some(Value::Null)) {
            return fail(
                "report_to: reporting to web services is not built in; read metrics.jsonl of the run folder instead",
            );
        }
        if self.trust_remote_code == Some(true) {
            return fail(
                "trust_remote_code: code from a model folder is never run; supported models need none",
            );
        }
        if self.project_name.as_ref().is_some_and(|name| !name.is_null()) {
            notes.push("project_name names a project of a reporting service and has no effect here".into());
        }
        let (train, test) = (self.train.unwrap_or(false), self.test.unwrap_or(false));
        if !train && !test {
            return fail("nothing to do: give --train, --test or both");
        }
        let fine_tune = self.fine_tune_type.unwrap_or(FineTune::Lora);
        let asked = match (self.num_layers, self.lora_layers) {
            (Some(_), Some(_)) => return fail("num_layers and lora_layers are the same setting; keep one"),
            (given, older) => given.or(older).unwrap_or(16),
        };
        if asked > facts.layers as i64 {
            notes.push(format!(
                "num_layers is {asked}, the model has {}: all of them are trained",
                facts.layers
            ));
        }
        let layers = layers(asked, facts)?;
        let adapter = self.adapter(fine_tune, layers)?;
        if fine_tune == FineTune::Full && facts.bits.is_some() {
            return fail(
                "quantized weights cannot be trained in full; use fine_tune_type lora or dora, or a float model",
            );
        }
        let name = self.optimizer.as_deref().unwrap_or("adam");
        let optimizer = Optimizer::mlx(name, section(self.optimizer_config.as_ref(), name)?)?;
        let rate = match &self.lr_schedule {
            None | Some(Value::Null) => {
                let peak = self.learning_rate.unwrap_or(1e-5);
                Rate::Run { peak, decay: Decay::Constant, warmup_steps: Some(0), warmup_ratio: 0.0 }
            }
            Some(config) => {
                if self.learning_rate.is_some() {
                    notes.push(
                        "lr_schedule holds the learning rate in its arguments; learning_rate has no effect"
                            .into(),
                    );
                }
                Rate::Mlx(mlx_from_config(config)?)
            }
        };
        let micro = self.batch_size.unwrap_or(4);
        let accumulate = self.grad_accumulation_steps.unwrap_or(1);
        if accumulate == 0 {
            return fail("grad_accumulation_steps must be at least 1");
        }
        let columns = Columns::default();
        let columns = Columns {
            prompt: self.prompt_feature.unwrap_or(columns.prompt),
            completion: self.completion_feature.unwrap_or(columns.completion),
            chat: self.chat_feature.unwrap_or(columns.chat),
            text: self.text_feature.unwrap_or(columns.text),
            ..columns
        };
        let missing =
            |key: &str| Error::Config(format!("\"{key}\" is missing: give --{key} or the key in the file"));
        let cache_limit = match &self.clear_cache_threshold {
            None | Some(Value::Null) => 0,
            Some(Value::String(text)) => mica_lm::memory::parse_size(text)
                .map_err(|cause| Error::Config(format!("clear_cache_threshold: {cause}")))?,
            Some(number) => number.as_u64().ok_or_else(|| {
                Error::Config(format!(
                    "clear_cache_threshold is {number}; expected bytes, or a size such as 1GB"
                ))
            })?,
        };
        let test_batches = batches("test_batches", self.test_batches.unwrap_or(500))?;
        let run = RunConfig {
            model: self.model.ok_or_else(|| missing("model"))?,
            data: self.data.ok_or_else(|| missing("data"))?,
            output: self.adapter_path.unwrap_or_else(|| "adapters".into()),
            method: Method::Sft,
            fine_tune,
            adapter,
            full_layers: layers.filter(|_| fine_tune == FineTune::Full),
            seed: self.seed.unwrap_or(0),
            columns,
            rules: Rules::lora(self.max_seq_length.unwrap_or(2048), self.mask_prompt.unwrap_or(false)),
            skip_bad_lines: self.skip_bad_lines.unwrap_or(0),
            hold_out: 0,
            batch_size: micro.saturating_mul(accumulate),
            micro_batch_size: Some(micro),
            gather: Gather::Buckets,
            lengths: lengths(self.bucket_size, self.bucket_sizes)?,
            duration: Duration::Iters(self.iters.unwrap_or(1000)),
            optimizer,
            rate,
            clip: None,
            grad_checkpoint: self.grad_checkpoint.unwrap_or(false),
            recomputed_blocks: 0,
            report_every: self.steps_per_report.unwrap_or(10),
            eval_every: self.steps_per_eval.unwrap_or(200),
            val_batches: batches("val_batches", self.val_batches.unwrap_or(25))?,
            save_every: self.save_every.unwrap_or(100),
            test: test.then_some(TestRun { batches: test_batches }),
            train,
            resume_adapter_file: self.resume_adapter_file,
            cache_limit,
        };
        Ok((run.check()?, notes))
    }

    fn adapter(&self, fine_tune: FineTune, layers: Option<usize>) -> Result<Option<AdapterConfig>> {
        let given: LoraParameters =
            typed(self.lora_parameters.clone().unwrap_or_default(), "lora_parameters")?;
        if fine_tune == FineTune::Full {
            return Ok(None);
        }
        let rank = given.rank.unwrap_or(8);
        let scale = match (given.scale, given.alpha) {
            (Some(_), Some(_)) => {
                return Err(Error::Config(
                    "lora_parameters: scale and alpha say the same twice; keep one".into(),
                ));
            }
            (None, Some(alpha)) => alpha / rank as f64,
            (scale, None) => scale.unwrap_or(20.0),
        };
        Ok(Some(AdapterConfig {
            rank,
            scale,
            dropout: given.dropout.unwrap_or(0.0),
            keys: given.keys,
            layers,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::parse;
    use super::*;
    use crate::data::batch::Lengths;

    fn resolve(text: &str) -> Result<(RunConfig, Vec<String>)> {
        let facts = ModelFacts { layers: 24, bits: Some(4), positions: None };
        LoraConfig::new(parse(&format!("model: m\ndata: d\n{text}")).unwrap())?.resolve(&facts)
    }

    #[test]
    fn defaults_are_those_of_mlx_lm() {
        let (run, notes) = resolve("train: true").unwrap();
        let adapter = AdapterConfig { rank: 8, scale: 20.0, dropout: 0.0, keys: None, layers: Some(16) };
        let expected = RunConfig {
            model: "m".into(),
            data: "d".into(),
            output: "adapters".into(),
            method: Method::Sft,
            fine_tune: FineTune::Lora,
            adapter: Some(adapter),
            full_layers: None,
            seed: 0,
            columns: Columns::default(),
            rules: Rules::lora(2048, false),
            skip_bad_lines: 0,
            hold_out: 0,
            batch_size: 4,
            micro_batch_size: Some(4),
            gather: Gather::Buckets,
            lengths: Lengths::Multiple(64),
            duration: Duration::Iters(1000),
            optimizer: Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false },
            rate: Rate::Run { peak: 1e-5, decay: Decay::Constant, warmup_steps: Some(0), warmup_ratio: 0.0 },
            clip: None,
            grad_checkpoint: false,
            recomputed_blocks: 0,
            report_every: 10,
            eval_every: 200,
            val_batches: Some(25),
            save_every: 100,
            test: None,
            train: true,
            resume_adapter_file: None,
            cache_limit: 0,
        };
        assert_eq!((run, notes), (expected, vec![]));
    }

    /// The example file that mlx-lm ships, with its comments left out.
    #[test]
    fn an_mlx_lm_file_is_understood() {
        let text = "train: true\nfine_tune_type: lora\noptimizer: adamw\noptimizer_config:\n  adamw:\n    betas: [0.9, 0.98]\n    eps: 1e-6\n\
                    \n    weight_decay: 0.05\n    bias_correction: true\nseed: 0\nnum_layers: -1\nbatch_size: 2\niters: 101\nval_batches: -1\n\
                    learning_rate: 1e-5\nsteps_per_report: 5\nsteps_per_eval: 50\nresume_adapter_file: null\nadapter_path: \"out\"\n\
                    save_every: 20\ntest: true\ntest_batches: 100\nmax_seq_length: 512\ngrad_checkpoint: true\ngrad_accumulation_steps: 4\n\
                    lora_parameters:\n  keys: [\"self_attn.q_proj\", \"v_proj\"]\n  rank: 4\n  scale: 10.0\n  dropout: 0.1\n\
                    lr_schedule:\n  name: cosine_decay\n  warmup: 10\n  warmup_init: 1e-7\n  arguments: [1e-5, 1000, 1e-7]\nmask_prompt: true\n";
        let (run, notes) = resolve(text).unwrap();
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert_eq!((run.batch_size, run.micro_batch_size, run.accumulate(2)), (8, Some(2), 4));
        assert_eq!(run.total_steps(0, 4), 26);
        assert_eq!(
            run.optimizer,
            Optimizer::AdamW { betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.05, bias_correction: true }
        );
        let adapter = run.adapter.unwrap();
        assert_eq!((adapter.rank, adapter.scale, adapter.dropout, adapter.layers), (4, 10.0, 0.1, None));
        assert_eq!(adapter.keys, Some(vec!["self_attn.q_proj".into(), "v_proj".into()]));
        assert_eq!(
            (run.val_batches, run.test, run.rules),
            (None, Some(TestRun { batches: Some(100) }), Rules::lora(512, true))
        );
        assert!((run.rate.schedule(26).at(10) - 1e-5).abs() < 1e-15);
    }

    #[test]
    fn sizes_have_units_as_in_mlx_lm() {
        for (given, bytes) in
            [("1GB", 1_000_000_000), ("1.5 M", 1_500_000), ("0", 0), ("\"0\"", 0), ("4096", 4096)]
        {
            let (run, _) = resolve(&format!("train: true\nclear_cache_threshold: {given}")).unwrap();
            assert_eq!(run.cache_limit, bytes, "{given}");
        }
        for given in ["-1", "lots", "1XB", "[1]"] {
            let error =
                resolve(&format!("train: true\nclear_cache_threshold: {given}")).unwrap_err().to_string();
            assert!(
                error.contains("clear_cache_threshold") && error.contains("1GB") | error.contains("8GB"),
                "{error}"
            );
        }
    }

    #[test]
    fn notes_and_older_names() {
        let (run, notes) = resolve("train: true\nlora_layers: 40").unwrap();
        assert_eq!(run.adapter.unwrap().layers, None);
        assert!(notes[0].contains("num_layers is 40, the model has 24"), "{notes:?}");
        let (run, _) = resolve("train: true\nlora_parameters: {rank: 4, alpha: 16}").unwrap();
        assert_eq!(run.adapter.unwrap().scale, 4.0);
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let cases = [
            ("nothing to do", "seed: 1", "--train"),
            ("unknown key", "train: true\nlearning_rte: 1", "did you mean \"learning_rate\"?"),
            ("nested unknown key", "train: true\nlora_parameters: {key: [a]}", "did you mean \"keys\"?"),
            ("reporting", "train: true\nreport_to: wandb", "metrics.jsonl"),
            ("foreign code", "train: true\ntrust_remote_code: true", "never run"),
            ("full on quantized", "train: true\nfine_tune_type: full", "quantized"),
            ("accumulation", "train: true\ngrad_accumulation_steps: 0", "at least 1"),
            ("both names", "train: true\nnum_layers: 2\nlora_layers: 2", "keep one"),
            ("batch", "train: true\nbatch_size: 0", "at least 1"),
            ("no test batch", "test: true\ntest_batches: 0", "test_batches must be −1"),
            ("no validation batch", "train: true\nval_batches: 0", "val_batches must be −1"),
            ("optimizer", "train: true\noptimizer: adan", "did you mean \"adam\"?"),
        ];
        for (name, text, part) in cases {
            let error = resolve(text).expect_err(name).to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
    }
}
