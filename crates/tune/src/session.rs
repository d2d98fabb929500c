//! A whole run from its settings: model, data, adapter, loop, and what the run folder holds at the end.
//!
//! Resolving settings and finding the model is the caller's business, and so is showing events and turning
//! outcomes into exit codes.

mod fitting;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use mica_array::{Dtype, Precision, memory};
use mica_lm::load::{Loaded, load};
use mica_lm::models::LanguageModel;
use mica_lm::weights::Packing;
use mica_nn::optim::AdamWConfig;
use serde_json::Value;

use crate::adapters::attach::{attach, trainable};
use crate::adapters::config::to_mlx;
use crate::adapters::files;
use crate::adapters::names::{Form, TensorName};
use crate::config::{Duration, FineTune, ModelFacts, Optimizer, RunConfig};
use crate::data::encode::Encode;
use crate::data::loader::{Loader, Options};
use crate::data::read::{BadLines, Source, Splits};
use crate::data::sample::{Sampler, Totals};
use crate::data::samples::{InMemory, Samples};
use crate::events::{Evaluation, Event, Observer};
use crate::methods::sft::Sft;
use crate::run::RunFolder;
use crate::run::folder::Existing;
use crate::run::metrics::METRICS;
use crate::trainer::update::evaluate;
use crate::trainer::{HeldOut, Outcome, Plan, Run, Update, UpdateSettings, limited, train};
use crate::{Error, Result, report};
pub use fitting::BESIDES;
use fitting::{Fitting, fitting, loader_options, micro_batch};

/// How a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Anew.
    New(Existing),
    /// From the newest whole checkpoint of the run folder.
    Resume,
}

/// What defaults depend on, of the model in a folder.
pub fn facts(model: &Path) -> Result<ModelFacts> {
    let config = mica_lm::config::ModelConfig::load(model)?;
    let layers = config.text_fields()?.get::<usize>("num_hidden_layers")?;
    let quantization = &config.quantization;
    let first = quantization.default.or_else(|| quantization.overrides.values().flatten().next().copied());
    let bits = first.filter(|_| quantization.is_quantized()).map(|spec| spec.bits() as u32);
    let positions = mica_lm::models::max_positions(&config)?;
    Ok(ModelFacts { layers, bits, positions })
}

/// Does what the settings say with the model of a folder.
///
/// # Errors
/// Whatever is wrong with settings, model, data or disk, told so that it can be mended; a loss that is not a number.
pub fn run(
    config: &RunConfig,
    model: &Path,
    encode: &dyn Encode,
    start: Start,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Outcome> {
    let optimizer = optimizer(&config.optimizer)?;
    if config.cache_limit > 0 {
        memory::set_cache_limit(config.cache_limit as usize);
    }
    // A test alone leaves the run folder as it is. A new run touches it only once everything else is known to be
    // well; one that goes on holds it from the beginning.
    let mut folder = match start {
        _ if !config.train => None,
        Start::New(existing) => {
            RunFolder::check(&config.output, existing)?;
            check_apart(&config.output, model)?;
            None
        }
        Start::Resume => Some(RunFolder::resume(&config.output)?),
    };
    let packing = if config.fine_tune == FineTune::Full { Packing::Quantized } else { Packing::Frozen };
    mica_lm::load::outline(model)?;
    let splits = Splits::open(&config.data, &config.columns)?;
    let mut data = Data::read(config, encode, &splits, observer)?;
    data.check(config)?;
    let mut loaded = load(model, packing)?;
    let names = match config.train {
        true => prepare(config, &mut *loaded.model, observer)?,
        false => trained_before(config, &mut *loaded.model, observer)?,
    };
    let precision = precision(&loaded);
    let mut outcome = Outcome::Finished(Default::default());
    let mut fitted = loader_options(config, micro_batch(config));
    if let Some(samples) = data.train.take() {
        let update =
            UpdateSettings { optimizer, clip: config.clip, precision, recompute: 0, seed: config.seed };
        let probe = Update::new(&*loaded.model, &names, update)?;
        let Fitting { micro, recompute, loader, options } =
            fitting(config, &samples, &mut *loaded.model, probe, observer)?;
        let update = UpdateSettings { recompute, ..update };
        let accumulate = config.accumulate(micro);
        let steps = config.total_steps(loader.batches_in_epoch(0)?, accumulate);
        let plan = Plan {
            steps,
            iters: if let Duration::Iters(iters) = config.duration { Some(iters) } else { None },
            accumulate,
            passes: matches!(config.duration, Duration::Epochs(_)),
            schedule: config.rate.schedule(steps),
            eval_every: if data.valid.is_some() { config.eval_every } else { 0 },
            val_batches: config.evaluated(config.val_batches, micro),
            save_every: config.save_every,
            keep: 2,
        };
        fitted = options.clone();
        let validation = data.valid.clone().map(|samples| HeldOut { samples, options });
        let folder = match (folder.take(), start) {
            (Some(folder), _) => folder,
            (None, Start::New(existing)) => RunFolder::create(&config.output, existing)?,
            (None, Start::Resume) => RunFolder::resume(&config.output)?,
        };
        let resolved =
            RunConfig { micro_batch_size: Some(micro), recomputed_blocks: recompute, ..config.clone() };
        folder.write_config(&resolved)?;
        let mut export = |model: &dyn LanguageModel, count: u64| export(config, model, count);
        outcome = train(
            Run {
                model: &mut *loaded.model,
                method: &Sft,
                names,
                validation,
                plan,
                update,
                folder: &folder,
                observer,
                stop,
                export: &mut export,
            },
            loader,
            start == Start::Resume,
        )?;
        draw(folder.path())?;
    }
    if let (Outcome::Finished(_), Some(test), Some(samples)) = (&outcome, config.test, data.test) {
        let begun = Instant::now();
        let most = config.evaluated(test.batches, fitted.shape.rows);
        let mut loader = Loader::new(samples, Options { shuffle: false, epochs: Some(1), ..fitted })?;
        let next = limited(|| loader.next_batch(), most);
        let (loss, tokens) = evaluate(&*loaded.model, &Sft, precision, next)?;
        let seconds = begun.elapsed().as_secs_f64();
        observer.event(&match tokens {
            0 => Event::Note { warning: true, text: "the test data have nothing to learn: no loss".into() },
            _ => Event::Test(Evaluation { step: 0, loss, tokens, seconds }),
        });
    }
    Ok(outcome)
}

/// Refuses a run folder among the files of a model: settings, checkpoints and adapters would mix with them.
fn check_apart(output: &Path, model: &Path) -> Result<()> {
    let same = match (output.canonicalize(), model.canonicalize()) {
        (Ok(output), Ok(model)) => output == model,
        _ => false,
    };
    let holds_model = || {
        let text = std::fs::read_to_string(output.join("config.json")).ok()?;
        serde_json::from_str::<Value>(&text).ok()?.get("model_type").cloned()
    };
    if !same && holds_model().is_none() {
        return Ok(());
    }
    Err(Error::Config(format!(
        "{} holds a model; choose another folder for the run (--output of mica train, --adapter-path of mica lora)",
        output.display()
    )))
}

/// What training computes with: exact products for f32 models, bf16 for all others.
pub fn precision(loaded: &Loaded) -> Precision {
    let exact = loaded.dtype == Dtype::F32 && !loaded.config.quantization.is_quantized();
    if exact { Precision::Exact } else { Precision::Bf16 }
}

fn optimizer(optimizer: &Optimizer) -> Result<AdamWConfig> {
    let (betas, eps, weight_decay, bias_correction) = match optimizer {
        Optimizer::Adam { betas, eps, bias_correction } => (betas, eps, 0.0, bias_correction),
        Optimizer::AdamW { betas, eps, weight_decay, bias_correction } => {
            (betas, eps, *weight_decay, bias_correction)
        }
        other => {
            let name =
                serde_json::to_value(other).ok().and_then(|value| value["name"].as_str().map(String::from));
            return Err(Error::Config(format!(
                "the optimizer {} is not there yet; adam and adamw are",
                name.unwrap_or_default()
            )));
        }
    };
    Ok(AdamWConfig {
        beta1: betas[0] as f32,
        beta2: betas[1] as f32,
        eps: *eps as f32,
        weight_decay: weight_decay as f32,
        bias_correction: *bias_correction,
    })
}

/// Attaches the adapter, if one is trained, and names what is trained.
fn prepare(
    config: &RunConfig,
    model: &mut dyn LanguageModel,
    observer: &mut dyn Observer,
) -> Result<Vec<String>> {
    if let Some(adapter) = config.adapter.as_ref().filter(|_| config.fine_tune != FineTune::Full) {
        let attached = attach(model, adapter, config.fine_tune == FineTune::Dora, config.seed)?;
        if let Some(text) = attached.note {
            observer.event(&Event::Note { warning: false, text });
        }
    }
    if let Some(file) = &config.resume_adapter_file {
        files::load_tensors(model, file)?;
    }
    trainable(model, config.fine_tune, config.full_layers)
}

/// Puts the adapter of the run folder on the model, for a test without training; trains nothing.
fn trained_before(
    config: &RunConfig,
    model: &mut dyn LanguageModel,
    observer: &mut dyn Observer,
) -> Result<Vec<String>> {
    if config.output.join("adapter_config.json").is_file() {
        files::load(model, &config.output)?;
    } else {
        let text = format!("{} holds no adapter: the model is tested as it is", config.output.display());
        observer.event(&Event::Note { warning: true, text });
    }
    Ok(Vec::new())
}

/// The tokenized sets of a run; empty ones are `None`.
struct Data {
    train: Option<Arc<dyn Samples>>,
    valid: Option<Arc<dyn Samples>>,
    test: Option<Arc<dyn Samples>>,
}

impl Data {
    fn read(
        config: &RunConfig,
        encode: &dyn Encode,
        splits: &Splits,
        observer: &mut dyn Observer,
    ) -> Result<Data> {
        let sampler = Sampler::new(encode, config.rules.clone());
        let mut bad = BadLines::allow(config.skip_bad_lines);
        let mut read = |name: &str, sources: &[Source]| -> Result<Option<InMemory>> {
            if sources.is_empty() {
                return Ok(None);
            }
            let (samples, totals): (InMemory, Totals) =
                InMemory::tokenize(sources, &sampler, &mut bad, &mut |_, _| {})?;
            if let Some(text) = totals.warning(config.rules.max_length) {
                observer.event(&Event::Note { warning: true, text: format!("{name}: {text}") });
            }
            Ok(Some(samples))
        };
        let mut train = if config.train { read("training data", &splits.train)? } else { None };
        let mut valid = if config.train { read("validation data", &splits.valid)? } else { None };
        let test = if config.test.is_some() { read("test data", &splits.test)? } else { None };
        if valid.is_none()
            && config.hold_out > 0
            && config.eval_every > 0
            && let Some(all) = train.take()
        {
            let (rest, held) = all.hold_out(config.hold_out, config.seed);
            train = Some(rest);
            valid = (held.len() > 0).then_some(held);
        }
        for text in bad.messages() {
            observer.event(&Event::Note { warning: true, text: format!("passed over: {text}") });
        }
        let shared = |samples: Option<InMemory>| samples.map(|samples| Arc::new(samples) as Arc<dyn Samples>);
        Ok(Data { train: shared(train), valid: shared(valid), test: shared(test) })
    }
}

impl Data {
    /// Whether there is all that was asked for, which is said before hours of training.
    fn check(&self, config: &RunConfig) -> Result<()> {
        let lacks = |cause: &str| Err(Error::Data { path: config.data.clone(), cause: cause.into() });
        let sets = [("training", &self.train), ("validation", &self.valid), ("test", &self.test)];
        for (name, samples) in sets {
            if samples.as_ref().is_some_and(|samples| samples.is_empty()) {
                let cause = "rows are empty, or cut before the answer (--max-seq-length)";
                return lacks(&format!("no row of the {name} data holds anything to learn: {cause}"));
            }
        }
        if config.train && self.train.is_none() {
            return lacks("holds no training data: a file, or a folder with train.jsonl, is needed");
        }
        if config.test.is_some() && self.test.is_none() {
            return lacks("holds no test data (test.jsonl), and a test was asked for");
        }
        Ok(())
    }
}

/// Writes what was trained for other programs, in mlx-lm's form; where micro-batches are counted, also under the
/// name with their count.
fn export(config: &RunConfig, model: &dyn LanguageModel, count: u64) -> Result<Vec<PathBuf>> {
    let names = trainable(model, config.fine_tune, config.full_layers)?;
    let keys: BTreeSet<String> = names
        .iter()
        .filter_map(|name| TensorName::parse(name))
        .filter_map(|(_, name)| {
            Some(name.module.strip_prefix("model.layers.")?.split_once('.')?.1.to_string())
        })
        .collect();
    let keys: Vec<String> = keys.into_iter().collect();
    let settings = to_mlx(config, &keys, model.layers());
    let mut written = files::save(model, &names, Form::Mlx, &settings, &config.output)?;
    written.truncate(1);
    if matches!(config.duration, Duration::Iters(_)) && config.fine_tune != FineTune::Full {
        let numbered = config.output.join(format!("{count:07}_adapters.safetensors"));
        let bytes = std::fs::read(&written[0]).map_err(|e| Error::file(&written[0], e))?;
        mica_io::atomic::write(&numbered, bytes)?;
        written.push(numbered);
    }
    Ok(written)
}

/// Draws `loss.svg` from the metrics of a run folder, which hold the steps of earlier parts of the run too.
pub fn draw(folder: &Path) -> Result<()> {
    let path = folder.join(METRICS);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let curve = |key: &str| -> Vec<(u64, f64)> {
        lines.iter().filter_map(|line| Some((line["step"].as_u64()?, line[key].as_f64()?))).collect()
    };
    mica_io::atomic::write(folder.join("loss.svg"), report::loss_svg(&curve("loss"), &curve("val_loss"))?)?;
    Ok(())
}
