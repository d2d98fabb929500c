//! From a resolved configuration to a finished run: what `mica train` and `mica lora` share.

use std::path::Path;

use mica_lm::config::ModelConfig;
use mica_tune::config::keys::{Settings, overlay, read};
use mica_tune::config::{ModelFacts, RunConfig};
use mica_tune::data::chat::ModelEncoder;
use mica_tune::events::{Event, Observers};
use mica_tune::session::{self, Start};
use mica_tune::trainer::Outcome;
use serde_json::{Value, json};

use crate::exit::{Stopped, Usage};
use crate::live::Live;
use crate::output::say;
use crate::signals::stop_flag;

/// A run, and what is to be done around it.
pub struct Job {
    /// Every setting.
    pub config: RunConfig,
    /// How it begins.
    pub start: Start,
    /// The command that goes on with it.
    pub resume_command: String,
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

/// What the variable `MICA_BUCKET_SIZE` has rows padded to multiples of, where neither flags nor the file say it.
pub fn bucket_of_environment() -> anyhow::Result<Option<usize>> {
    let Some(text) = std::env::var_os("MICA_BUCKET_SIZE").filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    match text.to_string_lossy().trim().parse() {
        Ok(size @ 1..) => Ok(Some(size)),
        _ => Err(Usage(format!("MICA_BUCKET_SIZE must be a number of at least 1, got {text:?}")).into()),
    }
}

/// What defaults need to know of the model.
pub fn facts(model: &str) -> anyhow::Result<ModelFacts> {
    Ok(session::facts(&mica_lm::locate::locate(model)?)?)
}

/// The settings of a run that is to go on: those it was begun with. Ones given anew may only say how long it
/// is, and what it reports, evaluates and saves.
pub fn resumed(given: Option<RunConfig>, output: &Path) -> anyhow::Result<RunConfig> {
    const FREE: [&str; 10] = [
        "duration",
        "report_every",
        "eval_every",
        "val_batches",
        "save_every",
        "test",
        "train",
        "cache_limit",
        // Which a run finds itself.
        "recomputed_blocks",
        "output",
    ];
    let begun = output.join("config.yaml");
    let Some(given) = given else {
        if !begun.is_file() {
            let what = "there is no run to resume (no config.yaml)".to_string();
            return Err(mica_tune::Error::Missing { path: output.into(), what }.into());
        }
        let text = std::fs::read_to_string(&begun).map_err(|e| mica_tune::Error::file(&begun, e))?;
        return Ok(RunConfig { output: output.into(), ..RunConfig::from_yaml(&text)? });
    };
    let mut given = given;
    if begun.is_file() {
        let text = std::fs::read_to_string(&begun).map_err(|e| mica_tune::Error::file(&begun, e))?;
        let run = RunConfig::from_yaml(&text)?;
        // What was found to fit then is kept.
        given.micro_batch_size = given.micro_batch_size.or(run.micro_batch_size);
        let (before, now) = (serde_json::to_value(run)?, serde_json::to_value(&given)?);
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
    let Job { config, start, resume_command, json: as_json } = job;
    let folder = mica_lm::locate::locate(&config.model)?;
    let vocabulary = ModelConfig::load(&folder)?.text_fields()?.get("vocab_size")?;
    let encoder = ModelEncoder::load(&folder, vocabulary)?;
    let stop = stop_flag()?;
    let mut test = None;
    let outcome = {
        let mut observers = Observers::default();
        let live = Live::new(config.report_every);
        observers.add(if as_json { live.without_summary() } else { live });
        observers.add(|event: &Event| {
            if let Event::Test(evaluation) = event {
                test = Some(evaluation.loss);
            }
        });
        session::run(&config, &folder, &encoder, start, &mut observers, &stop)?
    };
    let summary = match outcome {
        Outcome::Finished(summary) => summary,
        Outcome::Stopped { step, .. } => {
            let text = format!("stopped after step {step}, saved; go on with: {resume_command}");
            return Err(Stopped(text).into());
        }
    };
    if as_json {
        let mut document = if config.train { serde_json::to_value(&summary)? } else { json!({}) };
        document["output"] = config.output.display().to_string().into();
        if let Some(loss) = test {
            document["test_loss"] = loss.into();
            document["test_perplexity"] = loss.exp().into();
        }
        say!("{document}");
    } else if config.train {
        eprintln!(
            "Try it: mica generate --model {} --adapter-path {} --prompt \"…\"",
            config.model,
            config.output.display()
        );
    }
    Ok(())
}
