//! What `mica quickstart` shows: the base model asked, fine-tuned, and asked again.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mica_lm::load::{Loaded, load};
use mica_lm::weights::Packing;
use mica_nn::optim::AdamWConfig;
use mica_nn::parameters;
use mica_tune::adapters::attach::{attach, trainable};
use mica_tune::adapters::config::to_mlx;
use mica_tune::adapters::files;
use mica_tune::adapters::names::Form as AdapterForm;
use mica_tune::config::{AdapterConfig, FineTune, ModelFacts, RunConfig, TrainConfig};
use mica_tune::data::batch::{Gather, Lengths, Shape};
use mica_tune::data::loader::{Loader, Options};
use mica_tune::events::{Event, Observer, Observers};
use mica_tune::methods::sft::Sft;
use mica_tune::quickstart::questions::{Part, Question, accuracy};
use mica_tune::quickstart::world::PEOPLE;
use mica_tune::report::ascii_curve;
use mica_tune::run::RunFolder;
use mica_tune::run::folder::Existing;
use mica_tune::schedule::{Decay, Schedule};
use mica_tune::session::{draw, precision};
use mica_tune::trainer::{self, Outcome, Plan, Run, UpdateSettings};
use serde_json::{Value, json};

use super::base::SHIPPED;
use super::speaker::Speaker;
use crate::exit::{Stopped, Usage};
use crate::live::Live;
use crate::machine::peak_memory_gb;
use crate::signals::stop_flag;

/// Questions to train on.
const TRAINING: usize = 4000;
/// Rows of a step.
const ROWS: usize = 8;
/// The highest learning rate.
const PEAK: f64 = 5e-3;
/// Positions of a row; several questions are packed into one.
const LENGTH: usize = 160;
/// Widest line of text that is printed, where the terminal is not narrower.
const WIDTH: usize = 80;

/// How long the tour is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Steps of fine-tuning.
    pub steps: u64,
    /// Held-out questions, asked before and after.
    pub questions: usize,
    /// Divides the people into those of training and those of held-out questions, and starts the training.
    pub seed: u64,
}

/// Runs the tour.
pub fn run(output: &Path, from: Option<&Path>, size: Size, as_json: bool) -> anyhow::Result<()> {
    let begun = Instant::now();
    if size.steps == 0 || size.questions == 0 {
        return Err(Usage("--steps and --questions must be at least 1".to_string()).into());
    }
    let width =
        console::Term::stdout().size_checked().map_or(WIDTH, |(_, columns)| WIDTH.min(columns.into()));
    let say = |text: &str| {
        if !as_json {
            println!("{}", wrap(text, width));
        }
    };
    let stop = stop_flag()?;
    let (base, adapter) = (output.join("base"), output.join("adapter"));
    std::fs::create_dir_all(&base).map_err(|e| mica_tune::Error::file(&base, e))?;
    put_base(&base, from)?;
    let mut loaded = load(&base, Packing::Frozen)?;
    let (speaker, arithmetic) = (Speaker::new(&base, &stop)?, precision(&loaded));
    let questions = Question::some(size.seed, Part::HeldOut, size.questions);
    let training = Question::some(size.seed, Part::Train, TRAINING);

    say(&format!(
        "The base model ({:.1} million parameters, trained by mica itself) has read about {PEOPLE} people who do not \
         exist. It has never seen a question about them. Now it is asked {}, and each has to be answered in one sentence.",
        millions(&loaded),
        questions.len()
    ));
    let known = speaker.knows(&loaded, &questions)?.into_iter().filter(|known| *known).count();
    let before = speaker.ask(&loaded, &questions)?;
    let accuracy_before = accuracy(&questions, &before);
    let known = percent(known as f64 / questions.len() as f64);
    say(&format!(
        "\nKnows the answer   {known}   ({} …)\nAnswers right      {}",
        questions[0].fact.unfinished(),
        percent(accuracy_before)
    ));

    let attached = attach(&mut *loaded.model, &lora(), false, size.seed)?;
    let names = trainable(&*loaded.model, FineTune::Lora, None)?;
    say(&format!(
        "\nFine-tuning: LoRA on {} layers, {} steps, with questions about other people.",
        attached.modules.len(),
        size.steps
    ));
    let name = format!("quickstart questions {} {TRAINING}", size.seed);
    let samples = speaker.samples(&loaded, &training, LENGTH + 1, &name)?;
    let folder = RunFolder::create(&adapter, Existing::Replace)?;
    let mut losses = Vec::new();
    let described = described(&base, &adapter, size.seed, loaded.model.layers())?;
    folder.write_config(&described)?;
    let outcome = {
        let mut observers = Observers::default();
        observers.add(Live::new(20).without_summary());
        observers.add(|event: &Event| {
            if let Event::Step(step) = event {
                losses.push(step.loss);
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
                    recompute: 0,
                    seed: size.seed,
                },
                folder: &folder,
                observer: &mut observers as &mut dyn Observer,
                stop: &stop,
                export: &mut |model, _| {
                    let settings = to_mlx(&described, &attached.keys, model.layers());
                    files::save(model, &export_names, AdapterForm::Mlx, &settings, &adapter)
                },
            },
            Loader::new(Arc::new(samples), loader_options(size.seed))?,
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
    // The curve's axis takes eleven columns.
    println!(
        "\nLoss ({})\n{}",
        picture.display(),
        ascii_curve(&losses, width.saturating_sub(11).clamp(1, 60), 8)
    );
    for i in examples(&questions, &before, &after) {
        println!("{}", questions[i].prompt);
        println!("  expected  {}", questions[i].answer);
        println!("  before    {}", one_line(&before[i]));
        println!("  after     {}\n", one_line(&after[i]));
    }
    println!("Right before fine-tuning  {}", percent(accuracy_before));
    println!("Right after               {}", percent(accuracy_after));
    if let Some(speed) = summary.tokens_per_s.mean {
        println!("Training speed            {speed:.0} tokens/s");
    }
    if let Some(peak) = peak_memory_gb() {
        println!("Peak memory               {peak:.2} GB");
    }
    println!("Time in all               {seconds:.0} s");
    let (base, adapter, fused) = (base.display(), adapter.display(), output.join("fused"));
    println!("\nNext:");
    println!("  mica chat --model {base} --adapter-path {adapter}");
    println!(
        "  mica generate --model {base} --adapter-path {adapter} --prompt \"{}\"",
        questions[questions.len() - 1].prompt
    );
    println!("  mica fuse --model {base} --adapter-path {adapter} --output {}", fused.display());
    println!("  mica train --model MODEL --data data.jsonl --output run   # your own model and data");
    Ok(())
}

fn percent(share: f64) -> String {
    format!("{:5.1} %", 100.0 * share)
}

/// Parameters in millions.
fn millions(loaded: &Loaded) -> f64 {
    let sizes = parameters(loaded.model.as_module()).into_iter().map(|(_, array)| array.size());
    sizes.sum::<usize>() as f64 / 1e6
}

/// Breaks lines between words so that none is wider than `width`, if no word is.
fn wrap(text: &str, width: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        if console::measure_text_width(line) <= width {
            lines.push(line.to_string());
            continue;
        }
        let mut current = String::new();
        for word in line.split_whitespace() {
            let wide = console::measure_text_width(&current) + 1 + console::measure_text_width(word);
            if !current.is_empty() && wide > width {
                lines.push(std::mem::take(&mut current));
            }
            if !current.is_empty() {
                current.push(' ');
            }
            current.push_str(word);
        }
        lines.push(current);
    }
    lines.join("\n")
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
fn described(base: &Path, adapter: &Path, seed: u64, layers: usize) -> anyhow::Result<RunConfig> {
    let AdapterConfig { rank, scale, .. } = lora();
    let settings = json!({
        "model": base, "data": "built in", "output": adapter, "seed": seed, "max_seq_length": LENGTH + 1,
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
        passes: false,
        schedule: Schedule::Run { peak: PEAK, warmup, total: steps, decay: Decay::Cosine { end: 0.0 } },
        eval_every: 0,
        val_batches: None,
        save_every: 0,
        keep: 1,
    }
}

fn loader_options(seed: u64) -> Options {
    let shape =
        Shape { rows: ROWS, max_length: LENGTH, gather: Gather::Packed, lengths: Lengths::Multiple(32) };
    Options { shape, shuffle: true, seed, window: Options::DEFAULT_WINDOW, epochs: None }
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
