//! `mica train`: keys and defaults after trl and peft.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::keys::{Settings, typed, unknown};
use super::optimizer::Optimizer;
use super::run::{AdapterConfig, Duration, FineTune, Method, ModelFacts, Rate, RunConfig, TestRun};
use crate::data::batch::{Gather, Lengths};
use crate::data::format::Columns;
use crate::data::sample::{Learn, Rules};
use crate::schedule::{Decay, mlx_from_config};
use crate::{Error, Result};

/// The keys of `mica train`; what is `None` was not given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // the defaults are documented where they are resolved
pub struct TrainConfig {
    pub model: Option<String>,
    pub data: Option<PathBuf>,
    pub output: Option<PathBuf>,
    pub method: Option<Method>,
    pub fine_tune_type: Option<FineTune>,
    pub lora_parameters: Option<Settings>,
    pub num_layers: Option<i64>,
    pub seed: Option<u64>,
    pub prompt_feature: Option<String>,
    pub completion_feature: Option<String>,
    pub chat_feature: Option<String>,
    pub text_feature: Option<String>,
    pub mask_prompt: Option<bool>,
    pub max_seq_length: Option<usize>,
    pub skip_bad_lines: Option<usize>,
    pub hold_out: Option<usize>,
    pub batch_size: Option<usize>,
    pub micro_batch_size: Option<usize>,
    pub packing: Option<bool>,
    pub bucket_size: Option<usize>,
    pub bucket_sizes: Option<Vec<usize>>,
    pub steps: Option<u64>,
    pub epochs: Option<f64>,
    pub optimizer: Option<String>,
    pub optimizer_config: Option<Settings>,
    pub weight_decay: Option<f64>,
    pub learning_rate: Option<f64>,
    pub lr_schedule: Option<Value>,
    pub warmup_steps: Option<u64>,
    pub warmup_ratio: Option<f64>,
    /// 0 turns clipping off.
    pub max_grad_norm: Option<f64>,
    pub grad_checkpoint: Option<bool>,
    pub report_every: Option<u64>,
    pub eval_every: Option<u64>,
    pub val_batches: Option<i64>,
    pub save_every: Option<u64>,
    pub test: Option<bool>,
    pub test_batches: Option<i64>,
    pub resume_adapter_file: Option<PathBuf>,
}

/// The section `lora_parameters`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct LoraParameters {
    rank: Option<usize>,
    alpha: Option<f64>,
    scale: Option<f64>,
    dropout: Option<f64>,
    keys: Option<Vec<String>>,
    rslora: Option<bool>,
}

/// The section `lr_schedule` in its long form (mlx's form is also taken).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct ScheduleParameters {
    name: Option<String>,
    end: Option<f64>,
    cycles: Option<u32>,
    decay_steps: Option<u64>,
    every: Option<u64>,
    factor: Option<f64>,
}

const SCHEDULES: [&str; 7] =
    ["constant", "linear", "cosine", "cosine_with_restarts", "wsd", "step", "exponential"];

impl TrainConfig {
    /// From settings by name.
    pub fn new(settings: Settings) -> Result<TrainConfig> {
        typed(settings, "")
    }

    /// Decides every value.
    ///
    /// Defaults: sft, LoRA of rank 16 with alpha 32 on all linear layers, AdamW without decay, cosine with 3 %
    /// warm-up, clip 1.0, 8 rows a step, 1 epoch, at most 1024 tokens, packing for sft and cpt; the rate is
    /// 2e-4 for adapters (1e-4 on 8-bit weights), 2e-5 for full fine-tuning, 5e-5 for cpt.
    pub fn resolve(self, facts: &ModelFacts) -> Result<RunConfig> {
        let missing =
            |key: &str| Error::Config(format!("\"{key}\" is missing: give --{key} or the key in the file"));
        let method = self.method.unwrap_or(Method::Sft);
        let fine_tune = self.fine_tune_type.unwrap_or(FineTune::Lora);
        let max_length = self.max_seq_length.unwrap_or(1024);
        let rules = match method {
            Method::Sft => Rules::train(max_length, self.mask_prompt.unwrap_or(false)),
            Method::Cpt if self.mask_prompt == Some(true) => {
                return Err(Error::Config(
                    "mask_prompt has no meaning for cpt, which learns every token".into(),
                ));
            }
            Method::Cpt => Rules::pretrain(max_length),
        };
        // An explicit "no" asks for the whole of pairs and marked conversations too.
        let rules = match self.mask_prompt {
            Some(false) => Rules { pairs_learn: Learn::All, chat_learn: Learn::All, ..rules },
            _ => rules,
        };
        let (adapter, full_layers) = self.adapter(fine_tune, facts)?;
        let save_every = self.save_every.unwrap_or(100);
        let peak = self.learning_rate.unwrap_or(match (fine_tune, method) {
            (_, Method::Cpt) => 5e-5,
            (FineTune::Full, Method::Sft) => 2e-5,
            (_, Method::Sft) if facts.bits == Some(8) => 1e-4,
            (_, Method::Sft) => 2e-4,
        });
        let duration = match (self.steps, self.epochs) {
            (Some(_), Some(_)) => {
                return Err(Error::Config("steps and epochs are both given; keep one".into()));
            }
            (Some(steps), None) => Duration::Steps(steps),
            (None, epochs) => Duration::Epochs(epochs.unwrap_or(1.0)),
        };
        let columns = Columns::default();
        let columns = Columns {
            prompt: self.prompt_feature.clone().unwrap_or(columns.prompt),
            completion: self.completion_feature.clone().unwrap_or(columns.completion),
            chat: self.chat_feature.clone().unwrap_or(columns.chat),
            text: self.text_feature.clone().unwrap_or(columns.text),
            ..columns
        };
        let packing = self.packing.unwrap_or(true);
        if self.test_batches.is_some() && self.test != Some(true) {
            return Err(Error::Config("test_batches has no effect without test (--test)".into()));
        }
        let test_batches = batches("test_batches", self.test_batches.unwrap_or(-1))?;
        let test = self.test.unwrap_or(false).then_some(TestRun { batches: test_batches });
        RunConfig {
            rate: self.rate(peak)?,
            optimizer: self.optimizer()?,
            lengths: lengths(self.bucket_size, self.bucket_sizes)?,
            model: self.model.ok_or_else(|| missing("model"))?,
            data: self.data.ok_or_else(|| missing("data"))?,
            output: self.output.ok_or_else(|| missing("output"))?,
            method,
            fine_tune,
            adapter,
            full_layers,
            seed: self.seed.unwrap_or(0),
            columns,
            rules,
            skip_bad_lines: self.skip_bad_lines.unwrap_or(0),
            hold_out: self.hold_out.unwrap_or(0),
            batch_size: self.batch_size.unwrap_or(8),
            micro_batch_size: self.micro_batch_size,
            gather: if packing { Gather::Packed } else { Gather::Buckets },
            duration,
            clip: match self.max_grad_norm {
                Some(0.0) => None,
                given => Some(given.unwrap_or(1.0)),
            },
            grad_checkpoint: self.grad_checkpoint.unwrap_or(false),
            recomputed_blocks: 0,
            report_every: self.report_every.unwrap_or(1),
            eval_every: self.eval_every.unwrap_or(save_every.max(200)),
            val_batches: batches("val_batches", self.val_batches.unwrap_or(5))?,
            save_every,
            test,
            train: true,
            resume_adapter_file: self.resume_adapter_file,
            cache_limit: 0,
        }
        .check()
    }

    fn adapter(
        &self,
        fine_tune: FineTune,
        facts: &ModelFacts,
    ) -> Result<(Option<AdapterConfig>, Option<usize>)> {
        let layers = layers(self.num_layers.unwrap_or(-1), facts)?;
        if fine_tune == FineTune::Full {
            if self.lora_parameters.is_some() {
                return Err(Error::Config("lora_parameters have no meaning for full fine-tuning".into()));
            }
            if facts.bits.is_some() {
                return Err(Error::Config(
                    "quantized weights cannot be trained in full; use fine_tune_type lora or dora, or a float model".into(),
                ));
            }
            return Ok((None, layers));
        }
        let given: LoraParameters =
            typed(self.lora_parameters.clone().unwrap_or_default(), "lora_parameters")?;
        let rank = given.rank.unwrap_or(16);
        let scale = match (given.scale, given.alpha) {
            (Some(_), Some(_)) => {
                return Err(Error::Config(
                    "lora_parameters: scale and alpha say the same twice; keep one".into(),
                ));
            }
            (Some(_), None) if given.rslora == Some(true) => {
                return Err(Error::Config(
                    "lora_parameters: rslora divides alpha by √rank; give alpha, not scale".into(),
                ));
            }
            (Some(scale), None) => scale,
            (None, alpha) if given.rslora == Some(true) => alpha.unwrap_or(32.0) / (rank as f64).sqrt(),
            (None, alpha) => alpha.unwrap_or(32.0) / rank as f64,
        };
        let adapter =
            AdapterConfig { rank, scale, dropout: given.dropout.unwrap_or(0.0), keys: given.keys, layers };
        Ok((Some(adapter), None))
    }

    fn optimizer(&self) -> Result<Optimizer> {
        let name = self.optimizer.as_deref().unwrap_or("adamw");
        let mut settings = self.optimizer_config.clone().unwrap_or_default();
        if let Some(decay) = self.weight_decay {
            settings.insert("weight_decay".into(), Value::from(decay));
        }
        Optimizer::torch(name, settings)
    }

    fn rate(&self, peak: f64) -> Result<Rate> {
        let given: ScheduleParameters = match &self.lr_schedule {
            None | Some(Value::Null) => ScheduleParameters::default(),
            Some(Value::String(name)) => {
                ScheduleParameters { name: Some(name.clone()), ..Default::default() }
            }
            Some(config @ Value::Object(map)) if map.contains_key("arguments") => {
                if self.learning_rate.is_some() || self.warmup_steps.is_some() || self.warmup_ratio.is_some()
                {
                    return Err(Error::Config(
                        "lr_schedule with arguments holds rate and warm-up itself; leave out learning_rate, warmup_steps and warmup_ratio".into(),
                    ));
                }
                return Ok(Rate::Mlx(mlx_from_config(config)?));
            }
            Some(Value::Object(map)) => typed(map.clone(), "lr_schedule")?,
            Some(other) => {
                return Err(Error::Config(format!("lr_schedule must be a name or a section, got {other}")));
            }
        };
        let name = given.name.clone().unwrap_or_else(|| "cosine".into()).replace('-', "_");
        let need = |what: &str| Error::Config(format!("lr_schedule {name} needs \"{what}\""));
        let end = given.end.unwrap_or(0.0);
        let (decay, used): (Decay, &[&str]) = match name.as_str() {
            "constant" | "constant_with_warmup" => (Decay::Constant, &[]),
            "linear" => (Decay::Linear { end }, &["end"]),
            "cosine" => (Decay::Cosine { end }, &["end"]),
            "cosine_with_restarts" => {
                (Decay::CosineRestarts { cycles: given.cycles.unwrap_or(1), end }, &["end", "cycles"])
            }
            "wsd" => (
                Decay::Wsd { decay_steps: given.decay_steps.ok_or_else(|| need("decay_steps"))?, end },
                &["end", "decay_steps"],
            ),
            "step" => (
                Decay::Step {
                    every: given.every.filter(|n| *n > 0).ok_or_else(|| need("every"))?,
                    factor: given.factor.ok_or_else(|| need("factor"))?,
                },
                &["every", "factor"],
            ),
            "exponential" => {
                (Decay::Exponential { factor: given.factor.ok_or_else(|| need("factor"))? }, &["factor"])
            }
            _ => return Err(Error::Config(unknown("lr_schedule", &name, &name, &SCHEDULES))),
        };
        if let Ok(Value::Object(all)) = serde_json::to_value(&given)
            && let Some((key, _)) = all
                .iter()
                .find(|(key, value)| !value.is_null() && *key != "name" && !used.contains(&key.as_str()))
        {
            return Err(Error::Config(format!("lr_schedule {name} does not use \"{key}\"")));
        }
        if self.warmup_steps.is_some() && self.warmup_ratio.is_some() {
            return Err(Error::Config("warmup_steps and warmup_ratio are both given; keep one".into()));
        }
        let default_ratio = if name == "constant" { 0.0 } else { 0.03 };
        let warmup_ratio = self.warmup_ratio.unwrap_or(default_ratio);
        Ok(Rate::Run { peak, decay, warmup_steps: self.warmup_steps, warmup_ratio })
    }
}

/// A number of batches, −1 meaning all.
pub(super) fn batches(name: &str, given: i64) -> Result<Option<usize>> {
    match given {
        -1 => Ok(None),
        n if n > 0 => Ok(Some(n as usize)),
        _ => Err(Error::Config(format!("{name} must be −1 (all) or at least 1, got {given}"))),
    }
}

/// A number of blocks from the last, −1 meaning all; more than there are means all.
pub(super) fn layers(given: i64, facts: &ModelFacts) -> Result<Option<usize>> {
    match given {
        -1 => Ok(None),
        n if n > 0 => Ok(Some(n as usize).filter(|n| *n < facts.layers)),
        _ => Err(Error::Config(format!("num_layers must be −1 (all) or at least 1, got {given}"))),
    }
}

/// Padding, from the two ways to say it.
pub(super) fn lengths(size: Option<usize>, sizes: Option<Vec<usize>>) -> Result<Lengths> {
    match (size, sizes) {
        (Some(_), Some(_)) => {
            Err(Error::Config("bucket_size and bucket_sizes are both given; keep one".into()))
        }
        (None, Some(sizes)) => Ok(Lengths::List(sizes)),
        (size, None) => Ok(Lengths::Multiple(size.unwrap_or(64))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::parse;
    use super::*;

    const BASE: &str = "model: m\ndata: d\noutput: o\n";

    fn resolve(text: &str, facts: &ModelFacts) -> Result<RunConfig> {
        TrainConfig::new(parse(&format!("{BASE}{text}")).unwrap())?.resolve(facts)
    }

    fn facts() -> ModelFacts {
        ModelFacts { layers: 24, bits: None, positions: None }
    }

    #[test]
    fn defaults_are_those_of_trl_and_peft() {
        let run = resolve("", &facts()).unwrap();
        assert_eq!(
            run.adapter,
            Some(AdapterConfig { rank: 16, scale: 2.0, dropout: 0.0, keys: None, layers: None })
        );
        assert_eq!(
            (run.batch_size, run.rules.max_length, run.clip, run.gather),
            (8, 1024, Some(1.0), Gather::Packed)
        );
        assert_eq!((run.duration, run.eval_every, run.val_batches), (Duration::Epochs(1.0), 200, Some(5)));
        assert_eq!(
            run.optimizer,
            Optimizer::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, bias_correction: true }
        );
        assert_eq!(
            run.rate,
            Rate::Run {
                peak: 2e-4,
                decay: Decay::Cosine { end: 0.0 },
                warmup_steps: None,
                warmup_ratio: 0.03
            }
        );
        assert_eq!(run.rules, Rules::train(1024, false));
    }

    #[test]
    fn an_evaluation_covers_the_same_rows_whatever_the_micro_batch() {
        let run = resolve("batch_size: 12\n", &facts()).unwrap();
        for micro in [1, 3, 4, 12] {
            assert_eq!(run.evaluated(Some(5), micro).unwrap() * micro, 5 * 12);
        }
        assert_eq!(run.evaluated(None, 4), None, "all of it");
        let counted = RunConfig { duration: Duration::Iters(100), ..run };
        assert_eq!(counted.evaluated(Some(5), 4), Some(5));
    }

    #[test]
    fn defaults_depend_on_model_and_method() {
        let peak = |text: &str, bits| match resolve(text, &ModelFacts { layers: 24, bits, positions: None })
            .unwrap()
            .rate
        {
            Rate::Run { peak, .. } => peak,
            other => panic!("{other:?}"),
        };
        assert_eq!(peak("", Some(4)), 2e-4);
        assert_eq!(peak("", Some(8)), 1e-4);
        assert_eq!(peak("fine_tune_type: full", None), 2e-5);
        assert_eq!(peak("method: cpt", None), 5e-5);
        assert_eq!(peak("method: cpt\nlearning_rate: 1e-3", None), 1e-3);
    }

    #[test]
    fn what_is_given_is_used() {
        let text = "lora_parameters: {rank: 4, alpha: 8, rslora: true, keys: [q_proj]}\nnum_layers: 99\nsteps: 7\npacking: false\n\
                    bucket_sizes: [256, 512]\nmax_grad_norm: 0\nlr_schedule: {name: step, every: 10, factor: 0.5}\nweight_decay: 0.1\n\
                    prompt_feature: q\nmask_prompt: true\nval_batches: -1\nwarmup_steps: 3\n";
        let run = resolve(text, &facts()).unwrap();
        assert_eq!(
            run.adapter,
            Some(AdapterConfig {
                rank: 4,
                scale: 4.0,
                dropout: 0.0,
                keys: Some(vec!["q_proj".into()]),
                layers: None
            })
        );
        assert_eq!(
            (run.duration, run.gather, run.clip, run.val_batches),
            (Duration::Steps(7), Gather::Buckets, None, None)
        );
        assert_eq!(run.lengths, Lengths::List(vec![256, 512]));
        assert_eq!(run.rate.schedule(7).at(3), 2e-4);
        assert_eq!((run.columns.prompt.as_str(), run.rules.chat_learn), ("q", Learn::Assistant));
    }

    #[test]
    fn resolved_settings_survive_the_run_folder() {
        for text in [
            "",
            "lr_schedule: {name: cosine_decay, arguments: [1e-4, 100], warmup: 5}\nbucket_sizes: [64]",
            "method: cpt\ntest: true",
        ] {
            let run = resolve(text, &facts()).unwrap();
            assert_eq!(RunConfig::from_yaml(&run.to_yaml().unwrap()).unwrap(), run);
        }
    }

    #[test]
    fn steps_are_counted_in_windows() {
        let steps = |text: &str, batches, accumulate| {
            resolve(text, &facts()).unwrap().total_steps(batches, accumulate)
        };
        assert_eq!(steps("epochs: 3", 10, 4), 9);
        assert_eq!(steps("epochs: 0.5", 10, 1), 5);
        assert_eq!(steps("steps: 12", 10, 4), 12);
    }

    #[test]
    fn contradictions_are_refused() {
        let quantized = ModelFacts { layers: 4, bits: Some(4), positions: None };
        let cases = [
            ("typo", "batchsize: 3", "did you mean \"batch_size\"?"),
            (
                "nested typo",
                "lora_parameters: {rnak: 3}",
                "unknown key \"lora_parameters.rnak\"; did you mean \"rank\"?",
            ),
            ("steps and epochs", "steps: 3\nepochs: 2", "keep one"),
            ("alpha and scale", "lora_parameters: {alpha: 3, scale: 2}", "keep one"),
            ("full and quantized", "fine_tune_type: full", "quantized weights"),
            ("schedule name", "lr_schedule: cosin", "did you mean \"cosine\"?"),
            ("schedule key", "lr_schedule: {name: linear, every: 3}", "does not use \"every\""),
            ("schedule needs", "lr_schedule: wsd", "needs \"decay_steps\""),
            ("micro-batch", "micro_batch_size: 3", "must divide batch_size 8"),
            ("no layers", "num_layers: 0", "num_layers"),
            ("empty keys", "lora_parameters: {keys: []}", "nothing would be trained"),
            ("masked cpt", "method: cpt\nmask_prompt: true", "no meaning"),
            ("unknown method", "method: sftt", "method is \"sftt\""),
            ("warm-up twice", "warmup_steps: 1\nwarmup_ratio: 0.1", "keep one"),
            ("dropout", "lora_parameters: {dropout: 1.0}", "dropout"),
            ("no validation batch", "val_batches: 0", "val_batches must be −1"),
            ("no test batch", "test: true\ntest_batches: -2", "test_batches must be −1"),
            ("batches of no test", "test_batches: 2", "without test"),
        ];
        for (name, text, part) in cases {
            let error = resolve(text, &quantized).expect_err(name).to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
        let error = TrainConfig::default().resolve(&facts()).unwrap_err().to_string();
        assert!(error.contains("\"model\" is missing"), "{error}");
    }
}
