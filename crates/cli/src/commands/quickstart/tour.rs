//! What `mica quickstart` shows: the base model asked, fine-tuned, and asked again.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mica_lm::chat::{ChatRequest, ChatTemplate, Message};
use mica_lm::generate::{Generator, Options as Generation};
use mica_lm::load::{Loaded, load};
use mica_lm::tokenizer::Tokenizer;
use mica_lm::weights::Packing;
use mica_nn::optim::AdamWConfig;
use mica_tune::adapters::attach::{attach, trainable};
use mica_tune::adapters::config::to_mlx;
use mica_tune::adapters::files;
use mica_tune::adapters::names::Form as AdapterForm;
use mica_tune::config::{AdapterConfig, FineTune, ModelFacts, RunConfig, TrainConfig};
use mica_tune::data::batch::{Gather, Lengths, Shape};
use mica_tune::data::chat::ModelEncoder;
use mica_tune::data::format::{Columns, Form};
use mica_tune::data::loader::{Loader, Options};
use mica_tune::data::sample::{Rules, Sampler, Totals};
use mica_tune::data::samples::InMemory;
use mica_tune::events::{Event, Observer, Observers};
use mica_tune::methods::sft::Sft;
use mica_tune::quickstart::questions::{Part, Question, accuracy};
use mica_tune::report::ascii_curve;
use mica_tune::run::RunFolder;
use mica_tune::run::folder::Existing;
use mica_tune::schedule::{Decay, Schedule};
use mica_tune::session::{draw, precision};
use mica_tune::trainer::{self, Outcome, Plan, Run, UpdateSettings};
use serde_json::{Value, json};

use super::base::SHIPPED;
use crate::exit::{Stopped, Usage};
use crate::live::Live;
use crate::machine::peak_memory_gb;
use crate::signals::stop_flag;

/// Where the questions start; other than the corpus' seed, so that no text is met twice.
const SEED: u64 = 1;
/// Questions to train on.
const TRAINING: u64 = 4000;
/// Rows of a step.
const ROWS: usize = 16;
/// The highest learning rate.
const PEAK: f64 = 2e-3;
/// Longest sample.
const LENGTH: usize = 160;

/// How long the tour is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Steps of fine-tuning.
    pub steps: u64,
    /// Held-out questions, asked before and after.
    pub questions: usize,
}

/// Runs the tour.
pub fn run(output: &Path, from: Option<&Path>, size: Size, as_json: bool) -> anyhow::Result<()> {
    let begun = Instant::now();
    let say = |text: &str| {
        if !as_json {
            println!("{text}");
        }
    };
    if size.steps == 0 || size.questions == 0 {
        return Err(Usage("--steps and --questions must be at least 1".to_string()).into());
    }
    let (base, adapter) = (output.join("base"), output.join("adapter"));
    std::fs::create_dir_all(&base).map_err(|e| mica_tune::Error::file(&base, e))?;
    put_base(&base, from)?;
    let mut loaded = load(&base, Packing::Frozen)?;
    let (speaker, arithmetic) = (Speaker::new(&base)?, precision(&loaded));
    let questions: Vec<Question> =
        (0..size.questions as u64).map(|number| Question::new(SEED, Part::HeldOut, number)).collect();

    say(&format!(
        "A small base model (trained with mica, shipped inside it) answers {} held-out questions. It can read, but was \
         never shown the task: one line of JSON.",
        questions.len()
    ));
    let before = speaker.ask(&loaded, &questions)?;
    let accuracy_before = accuracy(&questions, &before);
    say(&format!("Right before fine-tuning: {:.1} %\n", 100.0 * accuracy_before));

    let attached = attach(&mut *loaded.model, &lora(), false, SEED)?;
    let names = trainable(&*loaded.model, FineTune::Lora, None)?;
    say(&format!("LoRA on {} layers, {} training questions:", attached.modules.len(), TRAINING));
    let samples = speaker.samples(&loaded)?;
    let folder = RunFolder::create(&adapter, Existing::Replace)?;
    let (mut losses, mut tokens_per_s) = (Vec::new(), Vec::new());
    let stop = stop_flag()?;
    let described = described(&base, &adapter, loaded.model.layers())?;
    folder.write_config(&described)?;
    let outcome = {
        let mut observers = Observers::default();
        observers.add(Live::new(20).without_summary());
        observers.add(|event: &Event| {
            if let Event::Step(step) = event {
                losses.push(step.loss);
                tokens_per_s.push((step.tokens, step.seconds));
            }
        });
        let export_names = names.clone();
        trainer::train(
            Run {
                model: &mut *loaded.model,
                method: &Sft,
                names,
                validation: None,
                plan: plan(size.steps),
                update: UpdateSettings {
                    optimizer: AdamWConfig::default(),
                    clip: Some(1.0),
                    precision: arithmetic,
                    recompute: false,
                    seed: SEED,
                },
                folder: &folder,
                observer: &mut observers as &mut dyn Observer,
                stop: &stop,
                export: &mut |model, _| {
                    let settings = to_mlx(&described, &attached.keys, model.layers());
                    files::save(model, &export_names, AdapterForm::Mlx, &settings, &adapter)
                },
            },
            Loader::new(Arc::new(samples), loader_options())?,
            false,
        )?
    };
    let summary = match outcome {
        Outcome::Finished(summary) => summary,
        Outcome::Stopped { step, .. } => {
            let text = format!("stopped after step {step}; start mica quickstart again");
            return Err(Stopped(text).into());
        }
    };
    draw(&adapter)?;
    let picture = output.join("loss.svg");
    std::fs::rename(adapter.join("loss.svg"), &picture).map_err(|e| mica_tune::Error::file(&picture, e))?;

    let after = speaker.ask(&loaded, &questions)?;
    let accuracy_after = accuracy(&questions, &after);
    let seconds = begun.elapsed().as_secs_f64();
    if as_json {
        let document = json!({
            "accuracy_before": accuracy_before,
            "accuracy_after": accuracy_after,
            "questions": questions.len(),
            "loss_first": losses.first(),
            "loss_last": losses.last(),
            "tokens_per_s": summary.tokens_per_s.mean,
            "peak_memory_gb": peak_memory_gb(),
            "seconds": seconds,
        });
        println!("{document}");
        return Ok(());
    }
    println!("\nLoss over {} steps ({}):\n{}", losses.len(), picture.display(), ascii_curve(&losses, 60, 8));
    for i in examples(&questions, &before, &after) {
        let Question { prompt, answer, .. } = &questions[i];
        println!(
            "{prompt}\n  expected  {answer}\n  before    {}\n  after     {}\n",
            one_line(&before[i]),
            one_line(&after[i])
        );
    }
    println!("Right before fine-tuning  {:5.1} %", 100.0 * accuracy_before);
    println!("Right after               {:5.1} %", 100.0 * accuracy_after);
    println!(
        "Training {:.0} targets/s, peak memory {:.2} GB, {seconds:.1} s in all",
        summary.tokens_per_s.mean,
        peak_memory_gb()
    );
    println!("\nNext:");
    let (base, adapter) = (base.display(), adapter.display());
    println!(
        "  mica generate --model {base} --adapter-path {adapter} --system-prompt \"Answer with JSON.\" \\"
    );
    println!("      --prompt \"Ada lives in Oslo. Ben keeps a cat.\nWho lives in Oslo?\"");
    println!("  mica chat --model {base} --adapter-path {adapter}");
    println!("  mica train --model MODEL --data data.jsonl --output run    # your own model and data");
    Ok(())
}

/// Writes the base model's files: those that ship, or those of a folder.
fn put_base(base: &Path, from: Option<&Path>) -> anyhow::Result<()> {
    if from.is_none() && SHIPPED.iter().any(|(_, bytes)| bytes.is_empty()) {
        return Err(anyhow::anyhow!(
            "this build has no base model; make it with mica quickstart --rebuild-base"
        ));
    }
    for (name, bytes) in SHIPPED {
        let bytes = match from.map(|from| from.join(name)) {
            None => bytes.to_vec(),
            Some(path) => std::fs::read(&path).map_err(|e| mica_tune::Error::file(&path, e))?,
        };
        mica_io::atomic::write(base.join(name), bytes)?;
    }
    Ok(())
}

fn lora() -> AdapterConfig {
    AdapterConfig { rank: 16, scale: 2.0, dropout: 0.0, keys: None, layers: None }
}

/// The run in the words of `mica train`.
fn described(base: &Path, adapter: &Path, layers: usize) -> anyhow::Result<RunConfig> {
    let AdapterConfig { rank, scale, .. } = lora();
    let settings = json!({
        "model": base, "data": "built in", "output": adapter, "seed": SEED, "max_seq_length": LENGTH + 1,
        "lora_parameters": {"rank": rank, "scale": scale}, "batch_size": ROWS, "learning_rate": PEAK,
        "mask_prompt": true,
    });
    let Value::Object(settings) = settings else { unreachable!("json! was given an object") };
    Ok(TrainConfig::new(settings)?.resolve(&ModelFacts { layers, bits: None, positions: None })?)
}

fn plan(steps: u64) -> Plan {
    let warmup = (steps / 20).max(1);
    Plan {
        steps,
        iters: None,
        accumulate: 1,
        schedule: Schedule::Run { peak: PEAK, warmup, total: steps, decay: Decay::Cosine { end: 0.0 } },
        eval_every: 0,
        val_batches: None,
        save_every: 0,
        keep: 1,
    }
}

fn loader_options() -> Options {
    let shape =
        Shape { rows: ROWS, max_length: LENGTH, gather: Gather::Packed, lengths: Lengths::Multiple(32) };
    Options { shape, shuffle: true, seed: SEED, window: Options::DEFAULT_WINDOW, epochs: None }
}

/// Puts questions to the model, and makes samples of them.
struct Speaker {
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Speaker {
    fn new(folder: &Path) -> anyhow::Result<Speaker> {
        let template = ChatTemplate::load(folder)?;
        let template = template.ok_or_else(|| anyhow::anyhow!("the base model has no chat template"))?;
        Ok(Speaker { tokenizer: Tokenizer::load(folder)?, template })
    }

    /// Greedy answers.
    fn ask(&self, loaded: &Loaded, questions: &[Question]) -> anyhow::Result<Vec<String>> {
        questions.iter().map(|question| self.answer(loaded, question)).collect()
    }

    fn answer(&self, loaded: &Loaded, question: &Question) -> anyhow::Result<String> {
        let messages =
            question.messages().into_iter().map(Message::from_json).collect::<Result<Vec<_>, _>>()?;
        let request = ChatRequest { add_generation_prompt: true, ..ChatRequest::new(&messages) };
        let prompt = self.template.encode(&request, &self.tokenizer)?.ids;
        let options = Generation { max_tokens: 40, ..Generation::for_model(loaded) };
        let eos = self.tokenizer.eos_ids();
        let mut text = String::new();
        for piece in Generator::new(loaded.model.as_ref(), Some(&self.tokenizer), eos, &prompt, options)? {
            text.push_str(&piece?.text);
        }
        Ok(text)
    }

    /// The training questions.
    fn samples(&self, loaded: &Loaded) -> anyhow::Result<InMemory> {
        let vocabulary = loaded.model.info().vocabulary;
        let encoder = ModelEncoder::new(self.tokenizer.clone(), Some(self.template.clone()), vocabulary);
        let sampler = Sampler::new(&encoder, Rules::train(LENGTH + 1, true));
        let (mut samples, mut totals) = (Vec::new(), Totals::default());
        for number in 0..TRAINING {
            let Value::Object(line) = Question::new(SEED, Part::Train, number).line() else { continue };
            let record = Form::Messages.parse(line, &Columns::default()).map_err(anyhow::Error::msg)?;
            samples.extend(sampler.samples(&record, &mut totals).map_err(anyhow::Error::msg)?);
        }
        Ok(InMemory::from_samples(&samples, &format!("quickstart questions {SEED} {TRAINING}")))
    }
}

/// Up to three questions: first those that fine-tuning mended.
fn examples(questions: &[Question], before: &[String], after: &[String]) -> Vec<usize> {
    let mended = |i: &usize| !questions[*i].is_correct(&before[*i]) && questions[*i].is_correct(&after[*i]);
    let (mut first, rest): (Vec<usize>, Vec<usize>) = (0..questions.len()).partition(mended);
    first.extend(rest);
    first.truncate(3);
    first
}

fn one_line(text: &str) -> String {
    let text = text.trim().replace('\n', " ⏎ ");
    if text.is_empty() { "(nothing)".to_string() } else { text }
}
