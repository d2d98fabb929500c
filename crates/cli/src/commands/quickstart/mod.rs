//! `mica quickstart`: from nothing to a fine-tuned model on this machine, without a network.

mod base;
mod speaker;
mod tour;

use std::path::PathBuf;

/// Fine-tune a small model on this machine in some seconds, with nothing to download
#[derive(clap::Args)]
pub struct Args {
    /// Where the model, the adapter and the loss curve are written; what an earlier run left there is replaced
    #[arg(long, short, value_name = "FOLDER", default_value = "mica-quickstart")]
    output: PathBuf,
    /// Steps of fine-tuning
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: u64,
    /// Held-out questions that are asked before and after
    #[arg(long, value_name = "N", default_value_t = 100)]
    questions: usize,
    /// Which people are asked about in training and which later, and how training starts
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Begin with the base model of this folder, made by --rebuild-base, instead of the one that ships
    #[arg(long, value_name = "FOLDER")]
    base: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Train the base model anew into this folder, as the one that ships was trained, and nothing else
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["output", "steps", "questions", "seed", "json", "base"])]
    rebuild_base: Option<PathBuf>,
    /// Steps of --rebuild-base
    #[arg(long, value_name = "N", default_value_t = 3000, requires = "rebuild_base")]
    base_steps: u64,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    match &args.rebuild_base {
        Some(folder) => base::rebuild(folder, args.base_steps),
        None => {
            let size = tour::Size { steps: args.steps, questions: args.questions, seed: args.seed };
            tour::run(&args.output, args.base.as_deref(), size, args.json)
        }
    }
}
