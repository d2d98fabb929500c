//! The base model of the quickstart: made from nothing with mica itself, and read from the program.
//!
//! `mica quickstart --rebuild-base FOLDER` writes the corpus' tokenizer and trains a small Llama on the
//! generated corpus (`mica_tune::quickstart`). The files that ship were made so, with AMX,
//! by an earlier state of mica: where an order of summation has changed since, a rebuild has other roundings.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mica_array::files::save_safetensors;
use mica_array::{Dtype, Precision};
use mica_lm::chat::{ChatRequest, ChatTemplate, Message};
use mica_lm::config::ModelConfig;
use mica_lm::models::{LanguageModel, build};
use mica_lm::tokenizer::{Specials, Tokenizer};
use mica_lm::weights::RandomSource;
use mica_nn::optim::AdamWConfig;
use mica_nn::parameters;
use mica_tune::adapters::attach::trainable;
use mica_tune::config::FineTune;
use mica_tune::data::batch::{Gather, Lengths, Shape};
use mica_tune::data::loader::{Loader, Options};
use mica_tune::data::sample::Sample;
use mica_tune::data::samples::InMemory;
use mica_tune::methods::sft::Sft;
use mica_tune::quickstart::corpus::{Document, document};
use mica_tune::quickstart::tokenizer as text;
use mica_tune::run::RunFolder;
use mica_tune::run::folder::Existing;
use mica_tune::schedule::{Decay, Schedule};
use mica_tune::trainer::{self, Outcome, Plan, Run, UpdateSettings};
use serde_json::json;

use crate::exit::Stopped;
use crate::live::Live;
use crate::signals::stop_flag;

/// The files of the base model that ships.
pub const SHIPPED: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../../assets/quickstart/config.json")),
    ("tokenizer.json", include_bytes!("../../../assets/quickstart/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../assets/quickstart/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../../../assets/quickstart/model.safetensors")),
];

/// Where the corpus starts.
const SEED: u64 = 0;
/// Documents of the corpus, read again when they are used up.
const DOCUMENTS: u64 = 40_000;
/// Documents from which the tokenizer is learnt.
const TOKENIZER_DOCUMENTS: u64 = 4_000;
/// Tokens of the vocabulary.
const VOCABULARY: usize = 1536;
/// Longest sequence.
const CONTEXT: usize = 512;
/// Rows of a step, and positions of a row.
const BATCH: (usize, usize) = (4, 256);
/// The highest learning rate. Small steps of few tokens at a high rate: facts are learnt by the number of
/// updates that see them, and a model this narrow stands the rate.
const PEAK: f64 = 5e-3;

/// Trains the base model into a folder, or goes on with it if it was begun.
pub fn rebuild(folder: &Path, steps: u64) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| mica_tune::Error::file(folder, e))?;
    eprintln!("learning the tokenizer");
    write(folder, "tokenizer.json", &text::train(SEED, TOKENIZER_DOCUMENTS, VOCABULARY)?)?;
    write(folder, "tokenizer_config.json", &text::config(CONTEXT))?;
    let tokenizer = Tokenizer::load(folder)?;
    let end = tokenizer.id(text::END_OF_TEXT).unwrap_or_default();
    let config = config(tokenizer.vocab_size(), &[tokenizer.eos_id().unwrap_or(end), end]);
    write(folder, "config.json", &format!("{config:#}\n"))?;
    eprintln!("writing the corpus");
    let samples = samples(folder, &tokenizer, end)?;
    let config = ModelConfig::load(folder)?;
    let mut model = build(&config, &mut RandomSource::new(SEED, 0.04, Dtype::F32)?)?;
    let run = folder.join("run");
    let held =
        if run.is_dir() { RunFolder::resume(&run)? } else { RunFolder::create(&run, Existing::Refuse)? };
    let loader = Loader::new(Arc::new(samples), options())?;
    let names = trainable(&*model, FineTune::Full, None)?;
    let stop = stop_flag()?;
    let outcome = trainer::train(
        Run {
            model: &mut *model,
            method: &Sft,
            names,
            validation: None,
            plan: plan(steps),
            update: UpdateSettings {
                optimizer: AdamWConfig { beta2: 0.98, ..AdamWConfig::default() },
                clip: Some(1.0),
                precision: Precision::Bf16,
                recompute: 0,
                seed: SEED,
            },
            folder: &held,
            observer: &mut Live::new(20),
            stop: &stop,
            export: &mut |model, _| save(model, folder),
        },
        loader,
        true,
    )?;
    if let Outcome::Stopped { step, .. } = outcome {
        let text = format!("stopped after step {step}; the same command goes on");
        return Err(Stopped(text).into());
    }
    Ok(())
}

fn write(folder: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    Ok(mica_io::atomic::write(folder.join(name), text)?)
}

fn config(vocabulary: usize, eos: &[u32]) -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "bos_token_id": null,
        "eos_token_id": eos,
        "pad_token_id": eos.last(),
        "torch_dtype": "bfloat16",
    })
}

/// The corpus as samples, of which every token is learnt.
fn samples(folder: &Path, tokenizer: &Tokenizer, end: u32) -> anyhow::Result<InMemory> {
    let template = ChatTemplate::load(folder)?;
    let mut samples = Vec::with_capacity(DOCUMENTS as usize);
    for number in 0..DOCUMENTS {
        let mut tokens = match (document(SEED, number), &template) {
            (Document::Text(text), _) => tokenizer.encode(&text, Specials::None)?,
            (Document::Chat(turns), Some(template)) => {
                let roles = ["user", "assistant"].into_iter().cycle();
                let messages: Vec<Message> =
                    turns.iter().zip(roles).map(|(text, role)| Message::new(role, text.as_str())).collect();
                template.encode(&ChatRequest::new(&messages), tokenizer)?.ids
            }
            (Document::Chat(_), None) => continue,
        };
        tokens.push(end);
        tokens.truncate(BATCH.1 + 1);
        let targets = (0..tokens.len()).map(|i| i > 0).collect();
        samples.push(Sample { tokens, targets });
    }
    Ok(InMemory::from_samples(&samples, &format!("quickstart corpus {SEED} {DOCUMENTS}")))
}

fn options() -> Options {
    let shape =
        Shape { rows: BATCH.0, max_length: BATCH.1, gather: Gather::Packed, lengths: Lengths::Multiple(64) };
    Options { shape, shuffle: true, seed: SEED, window: Options::DEFAULT_WINDOW, epochs: None }
}

fn plan(steps: u64) -> Plan {
    let warmup = (steps / 20).clamp(1, 100);
    Plan {
        steps,
        iters: None,
        accumulate: 1,
        passes: false,
        schedule: Schedule::Run { peak: PEAK, warmup, total: steps, decay: Decay::Cosine { end: 0.05 } },
        eval_every: 0,
        val_batches: None,
        save_every: 250,
        keep: 1,
    }
}

/// Writes the weights as bfloat16, so that every checkpoint leaves a model that opens.
fn save(model: &dyn LanguageModel, folder: &Path) -> mica_tune::Result<Vec<PathBuf>> {
    let path = folder.join("model.safetensors");
    let weights = parameters(model.as_module())
        .into_iter()
        .map(|(name, array)| Ok((name, array.astype(Dtype::BF16)?)))
        .collect::<mica_array::Result<Vec<_>>>()?;
    save_safetensors(&path, &weights, &[("format", "pt")])?;
    Ok(vec![path])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change of the world, the corpus or the tokenizer asks for a new base model.
    #[test]
    fn what_ships_is_what_the_generator_writes() {
        let shipped = |name: &str| {
            let (_, bytes) = SHIPPED.iter().find(|(shipped, _)| *shipped == name).unwrap();
            std::str::from_utf8(bytes).unwrap()
        };
        let rebuild = "mica quickstart --rebuild-base makes a new one";
        assert!(
            shipped("tokenizer.json") == text::train(SEED, TOKENIZER_DOCUMENTS, VOCABULARY).unwrap(),
            "{rebuild}"
        );
        assert_eq!(shipped("tokenizer_config.json"), text::config(CONTEXT), "{rebuild}");
        let has: serde_json::Value = serde_json::from_str(shipped("config.json")).unwrap();
        let eos: Vec<u32> = serde_json::from_value(has["eos_token_id"].clone()).unwrap();
        assert_eq!(has, config(has["vocab_size"].as_u64().unwrap() as usize, &eos), "{rebuild}");
        let size: usize = SHIPPED.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(size <= 8_000_000, "{size} bytes");
    }
}
