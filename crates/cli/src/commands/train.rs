//! `mica train`: fine-tuning with the conventions of trl and peft.

use std::path::PathBuf;

use mica_tune::config::TrainConfig;
use mica_tune::config::keys::Settings;
use mica_tune::run::folder::Existing;
use mica_tune::session::Start;
use serde::Serialize;
use serde_json::{Value, json};

use crate::exit::Usage;
use crate::training::{Job, bucket_of_environment, facts, resumed, run as run_job, settings};

/// Fine-tune a model: LoRA, DoRA or all weights
#[derive(clap::Args)]
pub struct Args {
    /// Settings as YAML; flags win over it
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    adapter: AdapterFlags,
    /// Go on from the newest checkpoint of the run folder, bit for bit
    #[arg(long)]
    resume: bool,
    /// Begin anew where the run folder holds another run, whose checkpoints are removed
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Print the summary as one JSON document
    #[arg(long)]
    json: bool,
}

/// Flags that are keys of the file too.
#[derive(clap::Args, Serialize)]
struct Flags {
    /// Model folder, or the name of one in the local Hugging Face cache
    #[arg(long, short)]
    model: Option<String>,
    /// A data file, or a folder with train, valid and test files
    #[arg(long, short)]
    data: Option<PathBuf>,
    /// The run folder
    #[arg(long, short)]
    output: Option<PathBuf>,
    /// sft or cpt
    #[arg(long)]
    method: Option<String>,
    /// lora, dora or full
    #[arg(long)]
    fine_tune_type: Option<String>,
    /// The last N blocks; -1 means all
    #[arg(long, allow_negative_numbers = true)]
    num_layers: Option<i64>,
    /// Where randomness starts
    #[arg(long)]
    seed: Option<u64>,
    /// Name of the column
    #[arg(long)]
    prompt_feature: Option<String>,
    /// Name of the column
    #[arg(long)]
    completion_feature: Option<String>,
    /// Name of the column
    #[arg(long)]
    chat_feature: Option<String>,
    /// Name of the column
    #[arg(long)]
    text_feature: Option<String>,
    /// Learn only what the assistant says
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    mask_prompt: Option<bool>,
    /// Most tokens of a sample; longer ones are cut and counted
    #[arg(long)]
    max_seq_length: Option<usize>,
    /// Bad lines that may be passed over
    #[arg(long)]
    skip_bad_lines: Option<usize>,
    /// Samples held out for validation if there is no validation file
    #[arg(long)]
    hold_out: Option<usize>,
    /// Rows of one optimizer step
    #[arg(long, visible_alias = "batch")]
    batch_size: Option<usize>,
    /// Rows computed at once; divides the batch
    #[arg(long)]
    micro_batch_size: Option<usize>,
    /// Several samples a row, isolated from each other
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    packing: Option<bool>,
    /// Rows are padded to multiples of this [default: MICA_BUCKET_SIZE, or 64]
    #[arg(long)]
    bucket_size: Option<usize>,
    /// Rows are padded to the smallest of these that fits
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    bucket_sizes: Option<Vec<usize>>,
    /// Optimizer steps
    #[arg(long)]
    steps: Option<u64>,
    /// Passes over the data
    #[arg(long, value_parser = crate::parse_finite)]
    epochs: Option<f64>,
    /// adamw or adam
    #[arg(long)]
    optimizer: Option<String>,
    /// Weight decay
    #[arg(long, value_parser = crate::parse_finite)]
    weight_decay: Option<f64>,
    /// The highest learning rate
    #[arg(long, visible_alias = "lr", value_parser = crate::parse_finite)]
    learning_rate: Option<f64>,
    /// constant, linear, cosine; others need their numbers in the file
    #[arg(long)]
    lr_schedule: Option<String>,
    /// Steps of warm-up
    #[arg(long)]
    warmup_steps: Option<u64>,
    /// Share of the run that is warm-up
    #[arg(long, value_parser = crate::parse_finite)]
    warmup_ratio: Option<f64>,
    /// Gradients are scaled down to this norm; 0 turns it off
    #[arg(long, value_parser = crate::parse_finite)]
    max_grad_norm: Option<f64>,
    /// Recompute the activations of all blocks in the backward pass; without it, of as few as memory asks for
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    grad_checkpoint: Option<bool>,
    /// Steps between report lines
    #[arg(long)]
    report_every: Option<u64>,
    /// Steps between validations; 0 means none
    #[arg(long)]
    eval_every: Option<u64>,
    /// Batches (of --batch-size rows) of a validation; -1 means all
    #[arg(long, allow_negative_numbers = true)]
    val_batches: Option<i64>,
    /// Steps between checkpoints; 0 means only at the end
    #[arg(long)]
    save_every: Option<u64>,
    /// Evaluate on the test file at the end
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    test: Option<bool>,
    /// Batches (of --batch-size rows) of the test; -1 means all
    #[arg(long, allow_negative_numbers = true)]
    test_batches: Option<i64>,
    /// Start from the tensors of this adapter
    #[arg(long)]
    resume_adapter_file: Option<PathBuf>,
}

/// The section `lora_parameters` as flags.
#[derive(clap::Args)]
pub struct AdapterFlags {
    /// Rank of the adapters
    #[arg(long, visible_alias = "lora-rank", value_name = "N")]
    pub rank: Option<usize>,
    /// Adapters are scaled by alpha / rank
    #[arg(long, value_name = "A", value_parser = crate::parse_finite)]
    pub lora_alpha: Option<f64>,
    /// Adapters are scaled by this
    #[arg(long, value_name = "S", conflicts_with = "lora_alpha", value_parser = crate::parse_finite)]
    pub lora_scale: Option<f64>,
    /// Share of an adapter's inputs that is dropped
    #[arg(long, value_name = "P", value_parser = crate::parse_finite)]
    pub lora_dropout: Option<f64>,
    /// Layers that get an adapter, by path or suffix
    #[arg(long, value_delimiter = ',', value_name = "q_proj,v_proj")]
    pub lora_keys: Option<Vec<String>>,
}

impl AdapterFlags {
    /// Whether there is any.
    pub fn given(&self) -> bool {
        let numbers = [self.lora_alpha, self.lora_scale, self.lora_dropout];
        self.rank.is_some() || numbers.iter().any(Option::is_some) || self.lora_keys.is_some()
    }

    /// Lays the flags over the section.
    pub fn overlay(&self, settings: &mut Settings) {
        let mut section = json!({
            "rank": self.rank, "alpha": self.lora_alpha, "scale": self.lora_scale, "dropout": self.lora_dropout,
            "keys": self.lora_keys,
        });
        let Value::Object(section) = &mut section else { return };
        section.retain(|_, value| !value.is_null());
        if section.is_empty() {
            return;
        }
        // A flag for the scale replaces whichever way the file says it.
        if let Some(Value::Object(before)) = settings.get_mut("lora_parameters")
            && (section.contains_key("alpha") || section.contains_key("scale"))
        {
            before.remove("alpha");
            before.remove("scale");
        }
        let over = Settings::from_iter([("lora_parameters".to_string(), Value::Object(section.clone()))]);
        mica_tune::config::keys::overlay(settings, over);
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut given = settings(args.config.as_deref(), &args.flags)?;
    args.adapter.overlay(&mut given);
    let output = given.get("output").and_then(Value::as_str).map(PathBuf::from);
    let alone = given.keys().all(|key| key == "output");
    let config = if args.resume && alone {
        let output = output.ok_or_else(|| Usage("--resume needs --output, the run folder".to_string()))?;
        resumed(None, &output)?
    } else {
        let mut parsed = TrainConfig::new(given)?;
        if parsed.bucket_size.is_none() && parsed.bucket_sizes.is_none() {
            parsed.bucket_size = bucket_of_environment()?;
        }
        let model = parsed.model.clone();
        let model = model.ok_or_else(|| Usage("--model is missing".to_string()))?;
        let facts = facts(&model)?;
        let mut config = parsed.resolve(&facts)?;
        config.fit(&facts).iter().for_each(|note| eprintln!("Warning: {note}"));
        if args.resume {
            let output = config.output.clone();
            resumed(Some(config), &output)?
        } else {
            config
        }
    };
    let resume_command = format!("mica train --resume --output {}", config.output.display());
    let start = match (args.resume && config.output.is_dir(), args.overwrite) {
        (true, _) => Start::Resume,
        (_, true) => Start::New(Existing::Replace),
        _ => Start::New(Existing::Refuse),
    };
    run_job(Job { config, start, resume_command, json: args.json })
}
