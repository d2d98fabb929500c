//! A run that was stopped or killed goes on as if nothing had happened, bit for bit.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mica_array::Precision;
use mica_lm::weights::Packing;
use mica_nn::optim::AdamWConfig;
use mica_tune::adapters::attach::{attach, trainable};
use mica_tune::config::{AdapterConfig, FineTune};
use mica_tune::data::batch::{Gather, Lengths, Shape};
use mica_tune::data::loader::{Loader, Options};
use mica_tune::data::sample::Sample;
use mica_tune::data::samples::{InMemory, Samples};
use mica_tune::events::Event;
use mica_tune::methods::sft::Sft;
use mica_tune::rng::Rng;
use mica_tune::run::RunFolder;
use mica_tune::run::folder::Existing;
use mica_tune::schedule::{Decay, Schedule};
use mica_tune::trainer::{HeldOut, Outcome, Plan, Run, UpdateSettings, train};
use serde_json::Value;

const STEPS: u64 = 7;

#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    model: &'static str,
    adapter: Option<FineTune>,
    precision: Precision,
    gather: Gather,
    clip: Option<f64>,
    iters: Option<u64>,
}

const CASES: [Case; 4] = [
    Case {
        name: "full, packed rows, no clipping",
        model: "llama-tied",
        adapter: None,
        precision: Precision::Exact,
        gather: Gather::Packed,
        clip: None,
        iters: None,
    },
    Case {
        name: "full in bf16, buckets",
        model: "llama-tied-bf16",
        adapter: None,
        precision: Precision::Bf16,
        gather: Gather::Buckets,
        clip: Some(1.0),
        iters: None,
    },
    Case {
        name: "LoRA with dropout on 4 bits, partial last window",
        model: "qwen3-4bit",
        adapter: Some(FineTune::Lora),
        precision: Precision::Exact,
        gather: Gather::Plain,
        clip: Some(0.5),
        iters: Some(2 * STEPS - 1),
    },
    Case {
        name: "DoRA on lfm2, packed rows",
        model: "lfm2",
        adapter: Some(FineTune::Dora),
        precision: Precision::Exact,
        gather: Gather::Packed,
        clip: Some(1.0),
        iters: None,
    },
];

fn samples(count: usize, seed: u64) -> Arc<dyn Samples> {
    let mut rng = Rng::new(seed, &[]);
    let samples: Vec<Sample> = (0..count)
        .map(|_| {
            let length = 3 + rng.index(14);
            let start = rng.index(90) as u32;
            let prompt = rng.index(length - 1) + 1;
            Sample {
                tokens: (0..length as u32).map(|i| (start + 3 * i) % 97).collect(),
                targets: (0..length).map(|i| i >= prompt).collect(),
            }
        })
        .collect();
    Arc::new(InMemory::from_samples(&samples, "made up"))
}

/// Runs until `stop_after` steps, or to the end of a plan of `steps`.
fn run(case: Case, folder: &Path, steps: u64, stop_after: Option<u64>, resume: bool) -> Outcome {
    let packing = if case.adapter.is_some() { Packing::Frozen } else { Packing::Quantized };
    let mut loaded = crate::model(case.model, packing);
    if let Some(kind) = case.adapter {
        let config = AdapterConfig { rank: 2, scale: 4.0, dropout: 0.1, keys: None, layers: Some(1) };
        attach(&mut *loaded.model, &config, kind == FineTune::Dora, 5).unwrap();
    }
    let names = trainable(&*loaded.model, case.adapter.unwrap_or(FineTune::Full), None).unwrap();
    let shape = Shape { rows: 2, max_length: 20, gather: case.gather, lengths: Lengths::Multiple(4) };
    // An epoch is over in the middle of the run.
    let options = Options { shape, shuffle: true, seed: 9, window: 11, epochs: None };
    let held = HeldOut { samples: samples(5, 2), options: options.clone() };
    let data = Loader::new(samples(17, 1), options).unwrap();
    let folder = if resume {
        RunFolder::resume(folder).unwrap()
    } else {
        RunFolder::create(folder, Existing::Refuse).unwrap()
    };
    let stop = AtomicBool::new(false);
    let mut observer = |event: &Event| {
        if let Event::Step(step) = event
            && Some(step.step) == stop_after
        {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let unit = if case.iters.is_some() { 2 } else { 1 };
    let plan = Plan {
        steps,
        iters: case.iters.map(|iters| if steps == STEPS { iters } else { 2 * steps }),
        accumulate: 2,
        passes: case.iters.is_none(),
        schedule: Schedule::Run { peak: 3e-3, warmup: 2, total: STEPS, decay: Decay::Cosine { end: 0.1 } },
        eval_every: 3 * unit,
        val_batches: Some(2),
        save_every: 2 * unit,
        keep: 2,
    };
    let update = UpdateSettings {
        optimizer: AdamWConfig { weight_decay: 0.01, ..AdamWConfig::default() },
        clip: case.clip,
        precision: case.precision,
        recompute: 0,
        seed: 3,
    };
    let run = Run {
        model: &mut *loaded.model,
        method: &Sft,
        names,
        validation: Some(held),
        plan,
        update,
        folder: &folder,
        observer: &mut observer,
        stop: &stop,
        export: &mut |_, _| Ok(Vec::new()),
    };
    train(run, data, resume).unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

/// The metrics without what a clock or the system says.
fn metrics(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            let map = line.as_object_mut().unwrap();
            for key in ["tokens_per_s", "it_per_s", "seconds", "peak_memory_gb"] {
                map.remove(key).unwrap_or_else(|| panic!("{key} is missing in {map:?}"));
            }
            line
        })
        .collect()
}

fn final_files(folder: &Path) -> [Vec<u8>; 2] {
    ["weights.safetensors", "optimizer.safetensors"]
        .map(|name| std::fs::read(folder.join(format!("checkpoints/step-{STEPS}/{name}"))).unwrap())
}

fn undisturbed(case: Case) -> (tempfile::TempDir, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(case, folder.path(), STEPS, None, false);
    assert!(
        matches!(&outcome, Outcome::Finished(summary) if summary.steps == STEPS),
        "{}: {outcome:?}",
        case.name
    );
    let lines = metrics(folder.path());
    assert_eq!(lines.len() as u64, STEPS, "{}", case.name);
    // After steps 3 and 6, and where micro-batches are counted at the end too.
    let validations = 2 + usize::from(case.iters.is_some());
    assert_eq!(
        lines.iter().filter(|line| line.get("val_loss").is_some()).count(),
        validations,
        "{}",
        case.name
    );
    (folder, lines)
}

#[test]
fn stopped_at_any_step_and_resumed() {
    for case in CASES {
        let (whole, lines) = undisturbed(case);
        for stops in [vec![1], vec![3], vec![2, 5, 6]] {
            let folder = tempfile::tempdir().unwrap();
            for (i, &stop) in stops.iter().enumerate() {
                let outcome = run(case, folder.path(), STEPS, Some(stop), i > 0);
                assert!(
                    matches!(outcome, Outcome::Stopped { step, .. } if step == stop),
                    "{}: {outcome:?}",
                    case.name
                );
            }
            let outcome = run(case, folder.path(), STEPS, None, true);
            assert!(matches!(outcome, Outcome::Finished(_)), "{}: {outcome:?}", case.name);
            assert_eq!(metrics(folder.path()), lines, "{}, stopped at {stops:?}", case.name);
            assert_eq!(final_files(folder.path()), final_files(whole.path()), "{}, {stops:?}", case.name);
        }
    }
}

#[test]
fn the_last_step_of_a_pass_may_be_smaller() {
    // 17 samples are nine batches of two rows.
    let (_, lines) = undisturbed(CASES[1]);
    let done: Vec<u64> = lines.iter().map(|line| line["iter"].as_u64().unwrap()).collect();
    assert_eq!(done, [2, 4, 6, 8, 9, 11, 13]);
}

#[test]
fn killed_after_steps_that_no_checkpoint_has() {
    let case = CASES[2];
    let (whole, lines) = undisturbed(case);
    for (killed_at, kept) in [(5, vec![4]), (3, vec![2]), (1, vec![])] {
        let folder = tempfile::tempdir().unwrap();
        run(case, folder.path(), killed_at, None, false);
        // What a kill after this step leaves: the lines are there, the checkpoint is not.
        std::fs::remove_dir_all(folder.path().join(format!("checkpoints/step-{killed_at}"))).unwrap();
        let checkpoints: Vec<u64> = RunFolder::resume(folder.path())
            .unwrap()
            .checkpoints()
            .steps()
            .unwrap()
            .into_iter()
            .rev()
            .take(1)
            .collect();
        assert_eq!(checkpoints, kept);
        run(case, folder.path(), STEPS, None, true);
        assert_eq!(metrics(folder.path()), lines, "killed at {killed_at}");
        assert_eq!(final_files(folder.path()), final_files(whole.path()), "killed at {killed_at}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let before = mica_array::threads();
    for case in CASES {
        let runs = [1, 2, 3].map(|threads| {
            mica_array::set_threads(threads).unwrap();
            let (folder, lines) = undisturbed(case);
            (lines, final_files(folder.path()))
        });
        assert_eq!(runs[0], runs[1], "{}", case.name);
        assert_eq!(runs[0], runs[2], "{}", case.name);
    }
    mica_array::set_threads(before).unwrap();
}

#[test]
fn checkpoints_are_the_last_two_and_the_best() {
    let (folder, lines) = undisturbed(CASES[0]);
    let held = RunFolder::resume(folder.path()).unwrap();
    let steps = held.checkpoints().steps().unwrap();
    let val = |line: &Value| line["val_loss"].as_f64().map(|loss| (loss, line["step"].as_u64().unwrap()));
    let best = lines.iter().filter_map(val).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap().1;
    assert!(steps.ends_with(&[6, 7]) && steps.contains(&best) && steps.len() <= 3, "{steps:?}, best {best}");
}
