//! What a backward pass keeps, and blocks that compute their activations again: what that changes (memory) and what
//! not (bits), and how a run chooses them. Apart from the other tests, because what is rehearsed and limits on memory are the whole process's.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mica_array::files::save_safetensors;
use mica_array::op::CrossEntropySpec;
use mica_array::{Array, Dtype, Precision, memory};
use mica_lm::config::ModelConfig;
use mica_lm::load::load;
use mica_lm::models::{LanguageModel, build};
use mica_lm::weights::{Packing, RandomSource};
use mica_nn::optim::AdamWConfig;
use mica_nn::{Context, parameters};
use mica_testkit::fixture;
use mica_tune::adapters::attach::{attach, trainable};
use mica_tune::config::keys::parse;
use mica_tune::config::{AdapterConfig, FineTune, RunConfig, TrainConfig};
use mica_tune::data::batch::{Batch, IGNORE};
use mica_tune::data::encode::ByteEncoder;
use mica_tune::data::sample::Sample;
use mica_tune::events::Event;
use mica_tune::methods::sft::Sft;
use mica_tune::methods::{Method, input};
use mica_tune::rng::Rng;
use mica_tune::run::folder::Existing;
use mica_tune::session::{Start, facts, run};
use mica_tune::trainer::{Outcome, Update, UpdateSettings};
use mica_tune::{Error, Result};

const BLOCKS: usize = 5;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    model: &'static str,
    /// The last blocks that get an adapter; all weights are trained without.
    adapted: Option<usize>,
    precision: Precision,
    /// How many blocks keep activations.
    blocks: usize,
}

const CASES: [Case; 5] = [
    Case { name: "llama", model: "llama", adapted: None, precision: Precision::Exact, blocks: BLOCKS },
    Case { name: "lfm2", model: "lfm2", adapted: None, precision: Precision::Bf16, blocks: BLOCKS },
    Case { name: "LoRA on llama", model: "llama", adapted: Some(3), precision: Precision::Bf16, blocks: 3 },
    Case { name: "LoRA on lfm2", model: "lfm2", adapted: Some(5), precision: Precision::Exact, blocks: 5 },
    Case {
        name: "LoRA, 4 bits",
        model: "qwen3-4bit",
        adapted: Some(2),
        precision: Precision::Bf16,
        blocks: 2,
    },
];

/// The configuration of a fixture with more blocks.
fn deep(name: &str) -> ModelConfig {
    let path = fixture(format!("models/{name}")).join("config.json");
    let mut raw: serde_json::Map<_, _> =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    raw.insert("num_hidden_layers".into(), BLOCKS.into());
    if raw.contains_key("layer_types") {
        let kinds: Vec<&str> = ["conv", "full_attention"].into_iter().cycle().take(BLOCKS).collect();
        raw.insert("layer_types".into(), kinds.into());
    }
    ModelConfig::new(path, raw).unwrap()
}

impl Case {
    fn model(&self) -> Box<dyn LanguageModel> {
        if self.model.ends_with("bit") {
            return load(fixture(format!("models/{}", self.model)), Packing::Frozen).unwrap().model;
        }
        let mut source = RandomSource::new(1, 0.1, Dtype::F32).unwrap();
        build(&deep(self.model), &mut source).unwrap()
    }

    /// The model with its adapters, and a way to train them.
    fn open(&self, recompute: usize) -> (Box<dyn LanguageModel>, Update) {
        self.open_with(recompute, 0.1)
    }

    fn open_with(&self, recompute: usize, dropout: f64) -> (Box<dyn LanguageModel>, Update) {
        let mut model = self.model();
        if self.adapted.is_some() {
            let config = AdapterConfig { rank: 2, scale: 4.0, dropout, keys: None, layers: self.adapted };
            attach(&mut *model, &config, false, 5).unwrap();
        }
        let fine_tune = if self.adapted.is_some() { FineTune::Lora } else { FineTune::Full };
        let names = trainable(&*model, fine_tune, None).unwrap();
        let settings = UpdateSettings {
            optimizer: AdamWConfig::default(),
            clip: None,
            precision: self.precision,
            recompute,
            seed: 3,
        };
        let update = Update::new(&*model, &names, settings).unwrap();
        assert_eq!(update.blocks(&*model), self.blocks, "{}", self.name);
        (model, update)
    }
}

fn batch(rows: usize, length: usize, seed: u64) -> Batch {
    let mut rng = Rng::new(seed, &[]);
    let mut sample = || Sample {
        tokens: (0..=length).map(|_| rng.index(96) as u32).collect(),
        targets: (0..=length).map(|i| i >= length / 2).collect(),
    };
    let samples: Vec<Sample> = (0..rows).map(|_| sample()).collect();
    Batch::assemble(&samples.iter().map(|sample| vec![sample]).collect::<Vec<_>>(), length)
}

#[test]
fn recomputing_any_number_of_blocks_changes_no_bit() {
    let _alone = alone();
    for case in CASES {
        let train = |recompute| {
            let (mut model, mut update) = case.open(recompute);
            let losses: Vec<[u64; 2]> = (0..3)
                .map(|step| {
                    let window = [batch(3, 12, step), batch(2, 9, 10 + step)];
                    let result = update.step(&mut *model, &Sft, &window, 2 * step, 1e-2).unwrap();
                    [result.loss.to_bits(), result.grad_norm.to_bits()]
                })
                .collect();
            let trained: Vec<u32> = (update.parameters(&*model).iter())
                .flat_map(|(_, array)| array.to_vec::<f32>().unwrap())
                .map(f32::to_bits)
                .collect();
            (losses, trained)
        };
        let kept = train(0);
        for recompute in [1, case.blocks - 1, case.blocks, usize::MAX] {
            assert!(train(recompute) == kept, "{}: {recompute} blocks recomputed", case.name);
        }
    }
}

#[test]
fn with_bf16_products_activations_are_kept_in_bf16() {
    let _alone = alone();
    for case in CASES {
        let window = [batch(16, 96, 1)];
        let take = |precision| {
            let (mut model, update) = Case { precision, ..case }.open(0);
            let needed = update.rehearse(&mut *model, &Sft, &window).unwrap();
            let (loss, grads) = update.gradients(&mut *model, &Sft, &window[0], 0).unwrap();
            let numbers: Vec<f32> = grads.iter().flat_map(|grad| grad.to_vec::<f32>().unwrap()).collect();
            (needed, loss.item::<f32>().unwrap(), numbers)
        };
        let ((exact, loss, expected), (bf16, rounded, got)) = (take(Precision::Exact), take(Precision::Bf16));
        assert!(bf16 * 20 < exact * 17, "{}: {exact} and {bf16} bytes", case.name);
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|v| v as f64 * v as f64).sum::<f64>().sqrt();
        let error =
            norm(&mut got.iter().zip(&expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied());
        println!("{}: {exact} and {bf16} bytes, gradients off by {error:.4}", case.name);
        assert!(error > 0.0 && error < 0.04 && (rounded / loss - 1.0).abs() < 1e-3, "{}: {error}", case.name);
    }
}

/// The loss of labelled tokens, with all states of the last block.
struct Dense;

impl Method for Dense {
    fn loss(
        &self,
        model: &dyn LanguageModel,
        batch: &Batch,
        recompute: Range<usize>,
        context: &Context,
    ) -> mica_array::Result<Array> {
        let hidden = model.hidden(&input(batch, recompute)?, None, context)?;
        let labelled = (0i32..).zip(&batch.targets).filter(|(_, target)| **target != IGNORE);
        let (rows, targets): (Vec<i32>, Vec<i32>) = labelled.map(|(row, &target)| (row, target)).unzip();
        let array = |values: &[i32]| Array::from_slice(values, &[values.len()]);
        let states = hidden.flatten_axes(0, 1)?.take(&array(&rows)?, 0)?;
        let spec = CrossEntropySpec { precision: context.precision, softcap: None };
        Ok(states.linear_cross_entropy(model.head(), &array(&targets)?, spec)?.0)
    }
}

#[test]
fn states_without_a_target_are_left_out_of_the_last_block_alone() {
    let _alone = alone();
    for case in CASES {
        let batch = batch(3, 12, 7);
        // Dropout would draw for other rows.
        let (mut model, update) = case.open_with(0, 0.0);
        let mut take = |method: &dyn Method| {
            let (loss, grads) = update.gradients(&mut *model, method, &batch, 0).unwrap();
            let grads: Vec<Vec<f32>> = grads.iter().map(|grad| grad.to_vec::<f32>().unwrap()).collect();
            (loss.item::<f32>().unwrap(), grads)
        };
        let ((loss, got), (expected_loss, expected)) = (take(&Sft), take(&Dense));
        assert_eq!(loss.to_bits(), expected_loss.to_bits(), "{}", case.name);
        for ((got, expected), name) in got.iter().zip(&expected).zip(update.names()) {
            let largest = expected.iter().fold(0.0f32, |top, value| top.max(value.abs()));
            let off = got.iter().zip(expected).fold(0.0f32, |top, (a, b)| top.max((a - b).abs()));
            let bound = if case.precision == Precision::Exact { 1e-5 } else { 1e-2 };
            assert!(off <= bound * largest, "{}: {name} is off by {off} of {largest}", case.name);
        }
    }
}

#[test]
fn each_recomputed_block_saves_memory() {
    let _alone = alone();
    for case in CASES {
        let window = [batch(16, 96, 1)];
        let (mut model, mut update) = case.open(0);
        let mut needs = |recompute| {
            update.set_recompute(recompute);
            update.rehearse(&mut *model, &Sft, &window).unwrap()
        };
        let needed: Vec<u64> = (0..=case.blocks).map(&mut needs).collect();
        println!("{}: {needed:?}", case.name);
        let (none, all) = (needed[0], needed[case.blocks]);
        // The last block is computed again right after it was computed, which may take more than it saves.
        let others = &needed[..case.blocks];
        assert!(others.is_sorted_by(|fewer, more| fewer >= more), "{}: {needed:?}", case.name);
        assert!((all as f64) < 1.1 * needed[case.blocks - 1] as f64, "{}: {needed:?}", case.name);
        // One block's activations are left, at the least those of the head.
        let least = all.min(needed[case.blocks - 1]);
        assert!((least as f64) < 0.9 * none as f64, "{}: {needed:?}", case.name);
        assert_eq!(needs(case.blocks + 1), all, "{}: blocks below keep nothing", case.name);
    }
}

/// A model and data in a folder, and how they are trained.
struct Runs {
    parent: tempfile::TempDir,
}

impl Runs {
    fn new() -> Runs {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("model");
        std::fs::create_dir_all(&folder).unwrap();
        let config = deep("llama");
        let mut source = RandomSource::new(1, 0.1, Dtype::F32).unwrap();
        let model = build(&config, &mut source).unwrap();
        save_safetensors(folder.join("model.safetensors"), &parameters(model.as_module()), &[]).unwrap();
        let text = serde_json::Value::from(config.raw).to_string();
        std::fs::write(folder.join("config.json"), text).unwrap();
        let line = |i: usize| format!("{{\"text\": \"{}\"}}\n", "the sea was calm ".repeat(15 + i % 2));
        std::fs::write(parent.path().join("data.jsonl"), (0..32).map(line).collect::<String>()).unwrap();
        Runs { parent }
    }

    fn config(&self, output: &str, more: &str) -> RunConfig {
        let root = self.parent.path().display();
        let settings = format!(
            "model: {root}/model\ndata: {root}/data.jsonl\noutput: {root}/{output}\nsteps: 3\nbatch_size: 16\n\
             max_seq_length: 256\n{more}"
        );
        let config = TrainConfig::new(parse(&settings).unwrap()).unwrap();
        config.resolve(&facts(&self.parent.path().join("model")).unwrap()).unwrap()
    }

    /// Runs until so many steps are done in all.
    fn go(&self, config: &RunConfig, start: Start, steps: u64) -> (Result<Outcome>, Told) {
        let stop = AtomicBool::new(steps == 0);
        let mut told = Told::default();
        let mut observer = |event: &Event| match event {
            Event::Step(step) => {
                told.losses.push(step.loss.to_bits());
                stop.store(step.step >= steps, Ordering::Relaxed);
            }
            Event::Note { text, .. } => told.notes.push(text.clone()),
            _ => {}
        };
        let model = self.parent.path().join("model");
        let outcome = run(config, &model, &ByteEncoder, start, &mut observer, &stop);
        (outcome, told)
    }
}

#[derive(Default)]
struct Told {
    losses: Vec<u64>,
    notes: Vec<String>,
}

impl Told {
    /// What stands between two texts in a note, as a number.
    fn number(&self, before: &str, after: &str) -> Option<f64> {
        let inside = |note: &String| Some(note.strip_prefix(before)?.split_once(after)?.0.parse().unwrap());
        self.notes.iter().find_map(inside)
    }

    fn peak(&self) -> f64 {
        self.number("Estimated peak memory ", " GB").unwrap_or_else(|| panic!("{:?}", self.notes))
    }

    fn recomputed(&self) -> Option<f64> {
        self.number("Recomputing the activations of ", &format!(" of {BLOCKS} blocks: otherwise"))
    }
}

/// A limit on the process's memory, until this is dropped.
struct Limit;

impl Limit {
    fn set(bytes: f64) -> Limit {
        memory::set_process_limit(bytes as u64);
        Limit
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        memory::set_process_limit(u64::MAX);
        memory::set_limit(usize::MAX);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_recomputes_as_little_as_its_memory_asks_for() {
    let _alone = alone();
    let runs = Runs::new();
    let new = Start::New(Existing::Replace);
    let rows = "micro_batch_size: 16";
    // Estimates, without a step.
    let (_, kept) = runs.go(&runs.config("kept", rows), new, 0);
    let (_, all) = runs.go(&runs.config("all", &format!("{rows}\ngrad_checkpoint: true")), new, 0);
    assert_eq!((kept.recomputed(), all.recomputed()), (None, None));
    let (most, least) = (kept.peak(), all.peak());
    assert!(least < 0.85 * most, "{least} of {most} GB");

    // Fewer rows at once come before recomputing.
    let (_, fewer) = {
        let _limit = Limit::set(least * 1e9);
        runs.go(&runs.config("fewer", ""), new, 0)
    };
    assert_eq!(fewer.recomputed(), None, "{:?}", fewer.notes);
    assert!(fewer.notes.iter().any(|note| note.starts_with("Micro-batches of ")), "{:?}", fewer.notes);

    let config = runs.config("tight", rows);
    // The peak counts from here, where the system can do that.
    let counts = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let limit = (most + least) / 2.0 * 1e9;
    let tight = {
        let _limit = Limit::set(limit);
        let (outcome, told) = runs.go(&config, new, 2);
        assert!(matches!(outcome, Ok(Outcome::Stopped { step: 2, .. })), "{outcome:?}");
        told
    };
    let peak = memory::peak_resident().unwrap() as f64;
    println!("{most} GB, or {least}; under {limit}: {:?}, peak {peak}", tight.notes);
    let recomputed = tight.recomputed().unwrap_or_else(|| panic!("{:?}", tight.notes));
    assert!(0.0 < recomputed && recomputed < BLOCKS as f64, "{recomputed} blocks");
    assert!(!counts || peak <= limit * 1.05, "{peak} bytes under a limit of {limit}");
    let before = format!(
        "Recomputing the activations of {recomputed} of {BLOCKS} blocks: otherwise the peak would be "
    );
    let told = tight.number(&before, " GB");
    assert!((told.unwrap() / most - 1.0).abs() < 0.1, "{told:?} GB, it was {most}");
    let written = std::fs::read_to_string(config.output.join("config.yaml")).unwrap();
    assert!(written.contains(&format!("recomputed_blocks: {recomputed}\n")), "{written}");

    // With room again the run goes on without, and has the losses of one that always had room.
    let resumed = RunConfig::from_yaml(&written).unwrap();
    let (outcome, rest) = runs.go(&resumed, Start::Resume, 3);
    assert!(matches!(outcome, Ok(Outcome::Finished(_))), "{outcome:?}");
    assert_eq!(rest.recomputed(), None);
    let (_, undisturbed) = runs.go(&runs.config("roomy", rows), new, 3);
    assert_eq!(undisturbed.losses, [tight.losses, rest.losses].concat());
}

#[cfg(target_os = "linux")]
#[test]
fn what_fits_in_no_way_is_refused_with_its_sizes() {
    let _alone = alone();
    let runs = Runs::new();
    let config = runs.config("run", "micro_batch_size: 16");
    let outcome = {
        let _limit = Limit::set(memory::resident().unwrap() as f64 + 12e6);
        runs.go(&config, Start::New(Existing::Refuse), 1).0
    };
    let Err(Error::Memory(text)) = outcome else { panic!("{outcome:?}") };
    for words in
        ["over 16 × 256 tokens needs ", " more with activations recomputed, and ", "under the limit of"]
    {
        assert!(text.contains(words), "{words:?} in {text}");
    }
    assert!(text.contains("--micro-batch-size 8") && !text.contains("--grad-checkpoint"), "{text}");
    assert!(!config.output.exists());
}
