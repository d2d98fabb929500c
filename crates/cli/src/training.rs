//! From a resolved configuration to a finished run: what `mica train` and `mica lora` share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mica_array::{Dtype, Precision};
use mica_lm::config::ModelConfig;
use mica_lm::load::{Loaded, load};
use mica_lm::models::LanguageModel;
use mica_lm::weights::Packing;
use mica_nn::optim::AdamWConfig;
use mica_tune::adapters::attach::{attach, trainable};
use mica_tune::adapters::config::to_mlx;
use mica_tune::adapters::files;
use mica_tune::adapters::names::Form;
use mica_tune::config::keys::{Settings, overlay, read};
use mica_tune::config::{FineTune, ModelFacts, Optimizer, RunConfig};
use mica_tune::data::batch::Shape;
use mica_tune::data::chat::ModelEncoder;
use mica_tune::data::loader::{Loader, Options};
use mica_tune::data::read::{BadLines, Source, Splits};
use mica_tune::data::sample::{Rules, Sampler, Totals};
use mica_tune::data::samples::InMemory;
use mica_tune::events::{Evaluation, Event, Observer};
use mica_tune::methods::sft::Sft;
use mica_tune::report::loss_svg;
use mica_tune::run::RunFolder;
use mica_tune::run::folder::Existing;
use mica_tune::summary::Summary;
use mica_tune::trainer::{self, HeldOut, Outcome, Plan, Run, UpdateSettings, update};
use serde_json::{Value, json};

use crate::exit::{Stopped, Usage};
use crate::live::Live;
use crate::signals::stop_flag;

/// Positions that are computed at once where the micro-batch is not given.
const POSITIONS: usize = 4096;

/// A run, and what is to be done around it.
pub struct Job {
    /// Every setting.
    pub config: RunConfig,
    /// Go on from the newest checkpoint.
    pub resume: bool,
    /// What to do with a run that is there already.
    pub existing: Existing,
    /// The command that goes on with it.
    pub resume_command: String,
    /// Also write `0000100_adapters.safetensors`, as mlx-lm does.
    pub numbered: bool,
    /// Print one JSON document.
    pub json: bool,
}

/// Settings of a file, with flags laid over them.
pub fn settings(file: Option<&Path>, flags: impl serde::Serialize) -> anyhow::Result<Settings> {
    let mut settings = match file {
        Some(file) => read(file)?,
        None => Settings::new(),
    };
    if let Value::Object(mut flags) = serde_json::to_value(flags)? {
        flags.retain(|_, value| !value.is_null());
        overlay(&mut settings, flags);
    }
    Ok(settings)
}

/// What defaults need to know of the model.
pub fn facts(model: &str) -> anyhow::Result<ModelFacts> {
    let config = ModelConfig::load(mica_lm::locate::locate(model)?)?;
    let quantization = &config.quantization;
    let first = quantization.default.or_else(|| quantization.overrides.values().flatten().next().copied());
    let bits = first.filter(|_| quantization.is_quantized()).map(|spec| spec.bits as u32);
    Ok(ModelFacts { layers: config.text_fields()?.get("num_hidden_layers")?, bits })
}

/// The settings of a run that is to go on: those it was begun with. Ones given anew may only say how long it
/// is, and what it reports, evaluates and saves.
pub fn resumed(given: Option<RunConfig>, output: &Path) -> anyhow::Result<RunConfig> {
    const FREE: [&str; 9] = [
        "duration",
        "report_every",
        "eval_every",
        "val_batches",
        "save_every",
        "test",
        "train",
        "cache_limit",
        "output",
    ];
    let begun = output.join("config.yaml");
    let Some(given) = given else {
        if !begun.is_file() {
            let text = format!("{}: there is no run to resume (no config.yaml)", output.display());
            return Err(Usage(text).into());
        }
        let text = std::fs::read_to_string(&begun).map_err(|e| mica_tune::Error::file(&begun, e))?;
        return Ok(RunConfig { output: output.into(), ..RunConfig::from_yaml(&text)? });
    };
    if begun.is_file() {
        let text = std::fs::read_to_string(&begun).map_err(|e| mica_tune::Error::file(&begun, e))?;
        let (before, now) =
            (serde_json::to_value(RunConfig::from_yaml(&text)?)?, serde_json::to_value(&given)?);
        if let (Value::Object(before), Value::Object(now)) = (&before, &now) {
            let differs = |key: &String| before.get(key) != now.get(key) && !FREE.contains(&key.as_str());
            let changed: Vec<&String> = now.keys().filter(|key| differs(key)).collect();
            if let Some(key) = changed.first() {
                return Err(Usage(format!(
                    "the run in {} was begun with {key} {}, now it is {}: give the same settings, or --resume \
                     with the folder alone",
                    output.display(),
                    before[key.as_str()],
                    now[key.as_str()]
                ))
                .into());
            }
        }
    }
    Ok(given)
}

/// Runs a job from start to end.
pub fn run(job: Job) -> anyhow::Result<()> {
    let config = &job.config;
    let optimizer = optimizer(&config.optimizer)?;
    let folder = mica_lm::locate::locate(&config.model)?;
    let full = config.fine_tune == FineTune::Full;
    let mut loaded = load(&folder, if full { Packing::Quantized } else { Packing::Frozen })?;
    if config.cache_limit > 0 {
        mica_array::memory::set_cache_limit(usize::try_from(config.cache_limit).unwrap_or(usize::MAX));
    }
    let mut live = Live::new(config.report_every);
    if job.json {
        live = live.without_summary();
    }
    let precision = precision(&loaded);
    let data = Data::open(config, &loaded, &mut live)?;
    let summary = if config.train {
        Some(fit(&job, &mut loaded, &data, optimizer, precision, &mut live)?)
    } else {
        put_adapter(&mut loaded, config)?;
        None
    };
    let test = match (&config.test, &data.test) {
        (None, _) => None,
        (Some(_), None) => {
            return Err(Usage(format!("--test: {} has no test file", config.data.display())).into());
        }
        (Some(test), Some(samples)) => {
            let begun = std::time::Instant::now();
            let options = Options { shuffle: false, epochs: Some(1), ..data.options(config, false) };
            let mut loader = Loader::new(Arc::clone(samples) as _, options)?;
            let mut left = test.batches.unwrap_or(usize::MAX);
            let next = || {
                if left == 0 {
                    return Ok(None);
                }
                left -= 1;
                loader.next_batch()
            };
            let (loss, tokens) = update::evaluate(&*loaded.model, &Sft, precision, next)?;
            let done = summary.as_ref().map_or(0, |summary: &Summary| summary.steps);
            let seconds = begun.elapsed().as_secs_f64();
            let evaluation = Evaluation { step: done, loss, tokens, seconds };
            live.event(&Event::Test(evaluation.clone()));
            Some(evaluation)
        }
    };
    if job.json {
        let mut document = match &summary {
            Some(summary) => serde_json::to_value(summary)?,
            None => json!({}),
        };
        document["output"] = config.output.display().to_string().into();
        if let Some(test) = &test {
            document["test_loss"] = test.loss.into();
            document["test_perplexity"] = test.loss.exp().into();
        }
        println!("{document}");
    } else if config.train {
        eprintln!(
            "Try it: mica generate --model {} --adapter-path {} --prompt \"…\"",
            config.model,
            config.output.display()
        );
    }
    Ok(())
}

/// Exact for f32 models, bf16 for all others: what training computes with.
pub fn precision(loaded: &Loaded) -> Precision {
    match loaded.dtype == Dtype::F32 && !loaded.config.quantization.is_quantized() {
        true => Precision::Exact,
        false => Precision::Bf16,
    }
}

/// What can be optimised with so far.
fn optimizer(optimizer: &Optimizer) -> anyhow::Result<AdamWConfig> {
    let with = |betas: [f64; 2], eps: f64, weight_decay: f64, bias_correction: bool| AdamWConfig {
        beta1: betas[0] as f32,
        beta2: betas[1] as f32,
        eps: eps as f32,
        weight_decay: weight_decay as f32,
        bias_correction,
    };
    match *optimizer {
        Optimizer::Adam { betas, eps, bias_correction } => Ok(with(betas, eps, 0.0, bias_correction)),
        Optimizer::AdamW { betas, eps, weight_decay, bias_correction } => {
            Ok(with(betas, eps, weight_decay, bias_correction))
        }
        ref other => {
            let name = serde_json::to_value(other)?["name"].clone();
            let text = format!("the optimizer {name} is not built yet: adam and adamw are");
            Err(Usage(text).into())
        }
    }
}

/// The adapter of the run folder, for a test without training.
fn put_adapter(loaded: &mut Loaded, config: &RunConfig) -> anyhow::Result<()> {
    if config.output.join("adapter_config.json").is_file() {
        files::load(&mut *loaded.model, &config.output)?;
    } else {
        eprintln!("{} holds no adapter: the model is tested as it is", config.output.display());
    }
    Ok(())
}

/// The samples of a run.
struct Data {
    train: Arc<InMemory>,
    valid: Option<Arc<InMemory>>,
    test: Option<Arc<InMemory>>,
    max_length: usize,
    micro: usize,
}

impl Data {
    fn open(config: &RunConfig, loaded: &Loaded, live: &mut Live) -> anyhow::Result<Data> {
        let splits = Splits::open(&config.data, &config.columns)?;
        let encoder = ModelEncoder::load(&loaded.folder, loaded.model.info().vocabulary)?;
        let longest = loaded.model.info().max_positions;
        let max_length = config.rules.max_length.min(longest.saturating_add(1));
        let rules = Rules { max_length, ..config.rules.clone() };
        let sampler = Sampler::new(&encoder, rules);
        let mut bad = BadLines::allow(config.skip_bad_lines);
        let mut read = |sources: &[Source], name: &str| -> anyhow::Result<Option<Arc<InMemory>>> {
            if sources.is_empty() {
                return Ok(None);
            }
            let (samples, totals) = InMemory::tokenize(sources, &sampler, &mut bad, &mut |_, _| {})?;
            note(live, &totals, name, max_length);
            Ok(Some(Arc::new(samples)))
        };
        let train = if config.train { read(&splits.train, "training")? } else { None };
        let mut valid = if config.train { read(&splits.valid, "validation")? } else { None };
        let test = if config.test.is_some() { read(&splits.test, "test")? } else { None };
        for message in bad.messages() {
            live.event(&Event::Note { warning: true, text: format!("passed over: {message}") });
        }
        let mut train = match train {
            Some(train) => train,
            None if config.train => {
                return Err(Usage(format!("{} has no training file", config.data.display())).into());
            }
            None => Arc::new(InMemory::default()),
        };
        if valid.is_none() && config.hold_out > 0 {
            let (kept, held) = train.hold_out(config.hold_out, config.seed);
            (train, valid) = (Arc::new(kept), Some(Arc::new(held)));
        }
        let micro = config.micro_batch_size.unwrap_or_else(|| micro_batch(config.batch_size, max_length));
        Ok(Data { train, valid, test, max_length, micro })
    }

    fn options(&self, config: &RunConfig, shuffle: bool) -> Options {
        let shape = Shape {
            rows: self.micro,
            max_length: self.max_length - 1,
            gather: config.gather,
            lengths: config.lengths.clone(),
        };
        Options { shape, shuffle, seed: config.seed, window: Options::DEFAULT_WINDOW, epochs: None }
    }
}

/// The largest divisor of the batch that stays within [`POSITIONS`].
fn micro_batch(batch: usize, max_length: usize) -> usize {
    (1..=batch).rev().find(|n| batch.is_multiple_of(*n) && n * max_length <= POSITIONS).unwrap_or(1)
}

fn note(live: &mut Live, totals: &Totals, name: &str, max_length: usize) {
    let text = format!("{} {name} samples, {} tokens to learn", totals.samples, totals.labelled_tokens);
    live.event(&Event::Note { warning: false, text });
    if let Some(text) = totals.warning(max_length) {
        live.event(&Event::Note { warning: true, text });
    }
}

/// Trains, and leaves the trained model in `loaded`.
fn fit(
    job: &Job,
    loaded: &mut Loaded,
    data: &Data,
    optimizer: AdamWConfig,
    precision: Precision,
    live: &mut Live,
) -> anyhow::Result<Summary> {
    let config = &job.config;
    let mut keys = Vec::new();
    if let Some(adapter) = &config.adapter {
        let attached = attach(&mut *loaded.model, adapter, config.fine_tune == FineTune::Dora, config.seed)?;
        if let Some(text) = attached.note {
            live.event(&Event::Note { warning: true, text });
        }
        keys = attached.keys;
    }
    if let Some(file) = &config.resume_adapter_file {
        files::load_tensors(&mut *loaded.model, file)?;
    }
    let names = trainable(&*loaded.model, config.fine_tune, config.full_layers)?;
    let loader = Loader::new(Arc::clone(&data.train) as _, data.options(config, true))?;
    let accumulate = config.accumulate(data.micro);
    let steps = config.total_steps(loader.batches_in_epoch(0)?, accumulate);
    let iters = match config.duration {
        mica_tune::config::Duration::Iters(iters) => Some(iters),
        _ => None,
    };
    let plan = Plan {
        steps,
        iters,
        accumulate,
        schedule: config.rate.schedule(steps),
        eval_every: if data.valid.is_some() { config.eval_every } else { 0 },
        val_batches: config.val_batches,
        save_every: config.save_every,
        keep: 2,
    };
    let folder = if job.resume && config.output.is_dir() {
        RunFolder::resume(&config.output)?
    } else {
        RunFolder::create(&config.output, job.existing)?
    };
    folder.write_config(config)?;
    let validation = data
        .valid
        .as_ref()
        .map(|samples| HeldOut { samples: Arc::clone(samples) as _, options: data.options(config, false) });
    let stop = stop_flag()?;
    let export = Export { job, names: names.clone(), keys };
    let outcome = trainer::train(
        Run {
            model: &mut *loaded.model,
            method: &Sft,
            names,
            validation,
            plan,
            update: UpdateSettings {
                optimizer,
                clip: config.clip,
                precision,
                recompute: config.grad_checkpoint,
                seed: config.seed,
            },
            folder: &folder,
            observer: live,
            stop: &stop,
            export: &mut |model, count| export.write(model, count),
        },
        loader,
        job.resume,
    )?;
    write_curve(&config.output)?;
    match outcome {
        Outcome::Finished(summary) => Ok(summary),
        Outcome::Stopped { step, .. } => {
            let command = &job.resume_command;
            Err(Stopped(format!("stopped after step {step}, saved; go on with: {command}")).into())
        }
    }
}

/// Writes the trained parameters for other programs.
struct Export<'a> {
    job: &'a Job,
    names: Vec<String>,
    keys: Vec<String>,
}

impl Export<'_> {
    fn write(&self, model: &dyn LanguageModel, count: u64) -> mica_tune::Result<Vec<PathBuf>> {
        let config = &self.job.config;
        let settings = to_mlx(config, &self.keys, model.layers());
        let mut written = files::save(model, &self.names, Form::Mlx, &settings, &config.output)?;
        written.truncate(1);
        if self.job.numbered
            && let Some(tensors) = written.first().cloned()
        {
            let numbered = config.output.join(format!("{count:07}_adapters.safetensors"));
            let bytes = std::fs::read(&tensors).map_err(|e| mica_tune::Error::file(&tensors, e))?;
            mica_io::atomic::write(&numbered, bytes)?;
            written.push(numbered);
        }
        Ok(written)
    }
}

/// Draws loss.svg from metrics.jsonl, which holds the steps of earlier parts of the run too.
pub fn write_curve(folder: &Path) -> anyhow::Result<PathBuf> {
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    let metrics = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&metrics).map_err(|e| mica_tune::Error::file(&metrics, e))?;
    for line in text.lines() {
        let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
        let Some(step) = line["step"].as_u64() else { continue };
        training.extend(line["loss"].as_f64().map(|loss| (step, loss)));
        validation.extend(line["val_loss"].as_f64().map(|loss| (step, loss)));
    }
    let path = folder.join("loss.svg");
    mica_io::atomic::write(&path, loss_svg(&training, &validation)?)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_divide_the_batch() {
        for (batch, length, expected) in [(8, 1024, 4), (8, 512, 8), (6, 1024, 3), (4, 9000, 1), (7, 1024, 1)]
        {
            assert_eq!(micro_batch(batch, length), expected, "{batch} rows of {length}");
        }
    }
}
