//! `mica lora`: mlx-lm's LoRA command, with its flags, defaults and meanings.

use std::path::PathBuf;

use mica_tune::config::LoraConfig;
use mica_tune::run::folder::Existing;
use mica_tune::session::Start;
use serde::Serialize;
use serde_json::Value;

use super::train::AdapterFlags;
use crate::exit::Usage;
use crate::training::{Job, bucket_of_environment, facts, resumed, run as run_job, settings};

/// Fine-tune with mlx-lm's flags, defaults and meanings
#[derive(clap::Args)]
pub struct Args {
    /// Settings as YAML; flags win over it
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    adapter: AdapterFlags,
    /// Go on from the newest checkpoint in --adapter-path, bit for bit
    #[arg(long)]
    resume: bool,
    /// Print the summary as one JSON document
    #[arg(long)]
    json: bool,
}

/// Flags that are keys of the file too.
#[derive(clap::Args, Serialize)]
struct Flags {
    /// Model folder, or the name of one in the local Hugging Face cache
    #[arg(long)]
    model: Option<String>,
    /// Train
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    train: Option<bool>,
    /// A folder with {train,valid,test}.jsonl
    #[arg(long)]
    data: Option<PathBuf>,
    /// lora, dora or full
    #[arg(long)]
    fine_tune_type: Option<String>,
    /// adam or adamw
    #[arg(long)]
    optimizer: Option<String>,
    /// Learn only the last answer
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    mask_prompt: Option<bool>,
    /// The last N blocks; -1 means all
    #[arg(long, allow_negative_numbers = true)]
    num_layers: Option<i64>,
    /// Older name of --num-layers
    #[arg(long, hide = true, allow_negative_numbers = true)]
    lora_layers: Option<i64>,
    /// Rows of a micro-batch
    #[arg(long)]
    batch_size: Option<usize>,
    /// Micro-batches
    #[arg(long)]
    iters: Option<u64>,
    /// Batches of a validation; -1 means all
    #[arg(long, allow_negative_numbers = true)]
    val_batches: Option<i64>,
    /// The learning rate
    #[arg(long, value_parser = crate::parse_finite)]
    learning_rate: Option<f64>,
    /// Micro-batches between report lines
    #[arg(long)]
    steps_per_report: Option<u64>,
    /// Micro-batches between validations
    #[arg(long)]
    steps_per_eval: Option<u64>,
    /// Micro-batches of one optimizer step
    #[arg(long)]
    grad_accumulation_steps: Option<usize>,
    /// Start from the tensors of this adapter
    #[arg(long)]
    resume_adapter_file: Option<PathBuf>,
    /// Where the adapter and the run are written
    #[arg(long)]
    adapter_path: Option<PathBuf>,
    /// Micro-batches between checkpoints
    #[arg(long)]
    save_every: Option<u64>,
    /// Evaluate on the test file
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    test: Option<bool>,
    /// Batches of the test; -1 means all
    #[arg(long, allow_negative_numbers = true)]
    test_batches: Option<i64>,
    /// Most tokens of a sample; longer ones are cut and counted
    #[arg(long)]
    max_seq_length: Option<usize>,
    /// Recompute the activations of all blocks in the backward pass; without it, of as few as memory asks for
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    grad_checkpoint: Option<bool>,
    /// Freed memory that is kept for reuse, as 1GB or in bytes; 0 leaves it to the allocator
    #[arg(long, value_name = "SIZE")]
    clear_cache_threshold: Option<String>,
    /// Refused: there is no reporting to services
    #[arg(long, hide = true)]
    report_to: Option<String>,
    /// Belongs to --report-to
    #[arg(long, hide = true)]
    project_name: Option<String>,
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
    /// Bad lines that may be passed over
    #[arg(long)]
    skip_bad_lines: Option<usize>,
    /// Rows are padded to multiples of this [default: MICA_BUCKET_SIZE, or 64]
    #[arg(long)]
    bucket_size: Option<usize>,
    /// Rows are padded to the smallest of these that fits
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    bucket_sizes: Option<Vec<usize>>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut given = settings(args.config.as_deref(), &args.flags)?;
    args.adapter.overlay(&mut given);
    let output = given.get("adapter_path").and_then(Value::as_str).map(PathBuf::from);
    let output = output.unwrap_or_else(|| "adapters".into());
    let alone = given.keys().all(|key| key == "adapter_path");
    let config = if args.resume && alone {
        resumed(None, &output)?
    } else {
        let mut parsed = LoraConfig::new(given)?;
        if parsed.bucket_size.is_none() && parsed.bucket_sizes.is_none() {
            parsed.bucket_size = bucket_of_environment()?;
        }
        let model = parsed.model.clone().ok_or_else(|| Usage("--model is missing".to_string()))?;
        let facts = facts(&model)?;
        let (mut config, mut notes) = parsed.resolve(&facts)?;
        notes.extend(config.fit(&facts));
        notes.iter().for_each(|note| eprintln!("{note}"));
        if args.resume { resumed(Some(config), &output)? } else { config }
    };
    let adapter =
        [args.flags.num_layers, args.flags.lora_layers].iter().any(Option::is_some) || args.adapter.given();
    if !config.train && adapter {
        eprintln!(
            "Warning: without --train the adapter is tested as it was trained; flags of its shape have no effect"
        );
    }
    if !config.train && config.resume_adapter_file.is_some() {
        eprintln!(
            "Warning: without --train the adapter in {} is tested; --resume-adapter-file has no effect",
            config.output.display()
        );
    }
    let resume_command = format!("mica lora --resume --adapter-path {}", config.output.display());
    // As in mlx-lm, a new run takes the place of an older one.
    let resume = args.resume && config.output.is_dir();
    let start = if resume { Start::Resume } else { Start::New(Existing::Replace) };
    run_job(Job { config, start, resume_command, json: args.json })
}
