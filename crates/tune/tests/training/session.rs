//! A run from its settings to the files in its folder.

use std::sync::atomic::{AtomicBool, Ordering};

use mica_lm::weights::Packing;
use mica_testkit::fixture;
use mica_tune::adapters::files;
use mica_tune::config::keys::parse;
use mica_tune::config::{LoraConfig, RunConfig, TrainConfig};
use mica_tune::data::encode::ByteEncoder;
use mica_tune::events::Event;
use mica_tune::run::folder::Existing;
use mica_tune::session::{Start, facts, run};
use mica_tune::trainer::Outcome;

fn data(folder: &std::path::Path) {
    let line = |i: usize| {
        format!("{{\"text\": \"{}\"}}\n", "the sea was calm and the boat went out ".repeat(1 + i % 3))
    };
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("train.jsonl"), (0..24).map(line).collect::<String>()).unwrap();
    std::fs::write(folder.join("valid.jsonl"), (0..4).map(line).collect::<String>()).unwrap();
    std::fs::write(folder.join("test.jsonl"), (0..4).map(line).collect::<String>()).unwrap();
}

fn go(config: &RunConfig, start: Start, stop_after: Option<u64>) -> (Outcome, Vec<Event>) {
    let stop = AtomicBool::new(false);
    let mut events = Vec::new();
    let mut observer = |event: &Event| {
        if let Event::Step(step) = event
            && Some(step.step) == stop_after
        {
            stop.store(true, Ordering::Relaxed);
        }
        events.push(event.clone());
    };
    let model = fixture("models/llama");
    let outcome = run(config, &model, &ByteEncoder, start, &mut observer, &stop).unwrap();
    (outcome, events)
}

#[test]
fn train_stops_resumes_and_leaves_an_adapter() {
    let parent = tempfile::tempdir().unwrap();
    data(&parent.path().join("data"));
    let root = parent.path().display();
    let settings = format!(
        "model: llama\ndata: {root}/data\noutput: {root}/run\nsteps: 12\nbatch_size: 4\nlearning_rate: 0.02\nmax_seq_length: 64"
    );
    let config = TrainConfig::new(parse(&settings).unwrap()).unwrap();
    let config = config.resolve(&facts(&fixture("models/llama")).unwrap()).unwrap();
    let (outcome, _) = go(&config, Start::New(Existing::Refuse), Some(5));
    assert!(matches!(outcome, Outcome::Stopped { step: 5, .. }), "{outcome:?}");
    let (outcome, events) = go(&config, Start::Resume, None);
    assert!(matches!(outcome, Outcome::Finished(_)), "{outcome:?}");
    let loss = |event: &Event| if let Event::Step(step) = event { Some(step.loss) } else { None };
    let losses: Vec<f64> = events.iter().filter_map(loss).collect();
    let metrics = std::fs::read_to_string(parent.path().join("run/metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert_eq!((losses.len(), metrics.lines().count()), (7, 12));
    assert!(losses[6] < 0.8 * first["loss"].as_f64().unwrap(), "{losses:?} after {first}");
    let mut loaded = crate::model("llama", Packing::Frozen);
    let opened = files::load(&mut *loaded.model, parent.path().join("run")).unwrap();
    assert_eq!(opened.names.len(), 2 * 7 * 2);
    assert!(parent.path().join("run/loss.svg").exists() && parent.path().join("run/config.yaml").exists());
}

#[test]
fn lora_counts_micro_batches_and_tests() {
    let parent = tempfile::tempdir().unwrap();
    data(&parent.path().join("data"));
    let root = parent.path().display();
    let settings = format!(
        "model: llama\ntrain: true\ntest: true\ndata: {root}/data\nadapter_path: {root}/run\niters: 7\nbatch_size: 2\n\
         grad_accumulation_steps: 2\nnum_layers: 1\nsteps_per_eval: 4\nsave_every: 4\nval_batches: 1\nmax_seq_length: 64"
    );
    let config = LoraConfig::new(parse(&settings).unwrap()).unwrap();
    let (config, _) = config.resolve(&facts(&fixture("models/llama")).unwrap()).unwrap();
    let (outcome, events) = go(&config, Start::New(Existing::Refuse), None);
    assert!(matches!(outcome, Outcome::Finished(_)), "{outcome:?}");
    let iters: Vec<u64> = events
        .iter()
        .filter_map(|event| if let Event::Step(step) = event { Some(step.iter) } else { None })
        .collect();
    assert_eq!(iters, [2, 4, 6, 7]);
    let validations: Vec<u64> = events
        .iter()
        .filter_map(
            |event| if let Event::Validation(evaluation) = event { Some(evaluation.step) } else { None },
        )
        .collect();
    assert_eq!(validations, [1, 4, 7]);
    assert_eq!(events.iter().filter(|event| matches!(event, Event::Test(_))).count(), 1);
    for name in ["adapters.safetensors", "0000004_adapters.safetensors", "0000007_adapters.safetensors"] {
        assert!(parent.path().join("run").join(name).exists(), "{name}");
    }
}
