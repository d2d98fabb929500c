//! `mica bench --train`: the speed of training steps, through the step that `mica train` takes.
//!
//! What a step takes is rehearsed first, and refused if there is less memory than that.
//!
//! One batch of random tokens, so that speed depends on no data; training on it again and again must bring its
//! loss down. All tokens are targets, or with `--labelled` the last part of each row, like answers behind prompts.

use std::time::Instant;

use mica_array::profile;
use mica_lm::load::load;
use mica_lm::weights::Packing;
use mica_nn::optim::AdamWConfig;
use mica_nn::parameters;
use mica_simd::Isa;
use mica_tune::adapters::attach::{attach, trainable};
use mica_tune::config::{AdapterConfig, FineTune};
use mica_tune::data::batch::Batch;
use mica_tune::data::sample::Sample;
use mica_tune::methods::sft::Sft;
use mica_tune::rng::Rng;
use mica_tune::session::{BESIDES, precision};
use mica_tune::trainer::{Update, UpdateSettings};

use crate::exit::Usage;
use crate::machine::{self, peak_memory_gb};
use crate::output::say;

/// Positions of a step: more than fit into any memory.
const MOST_POSITIONS: usize = 1 << 22;

/// What to train.
#[derive(clap::Args)]
#[command(next_help_heading = "Training (--train)")]
pub struct Args {
    /// Measure training steps instead of generation
    #[arg(long)]
    pub train: bool,
    /// Tokens of a row
    #[arg(long, value_name = "N", default_value_t = 1024, requires = "train")]
    seq: usize,
    /// The part of each row whose tokens are learnt, its last: the loss is that of these alone
    #[arg(long, value_name = "R", default_value_t = 1.0, requires = "train", value_parser = parse_part)]
    labelled: f64,
    /// Steps; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5, requires = "train")]
    steps: usize,
    /// lora, dora or full
    #[arg(long, value_name = "TYPE", default_value = "lora", requires = "train", value_parser = parse_type)]
    fine_tune_type: FineTune,
    /// The last N blocks; -1 means all
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true, requires = "train")]
    num_layers: i64,
    /// Layers that get an adapter, by path or suffix [default: all linear layers]
    #[arg(long, value_delimiter = ',', value_name = "q_proj,v_proj", requires = "train")]
    lora_keys: Option<Vec<String>>,
    /// Rank of the adapters [default: 8]
    #[arg(long, value_name = "N", requires = "train")]
    lora_rank: Option<usize>,
    /// The learning rate
    #[arg(long, value_name = "R", default_value_t = 1e-4, requires = "train", value_parser = crate::parse_finite)]
    learning_rate: f64,
    /// Gradients are scaled down to this norm; 0 turns it off
    #[arg(long, value_name = "R", default_value_t = 1.0, requires = "train", value_parser = parse_norm)]
    max_grad_norm: f64,
    /// Recompute activations in the backward pass, to save memory
    #[arg(long, requires = "train")]
    grad_checkpoint: bool,
}

fn parse_type(text: &str) -> Result<FineTune, String> {
    match text {
        "lora" => Ok(FineTune::Lora),
        "dora" => Ok(FineTune::Dora),
        "full" => Ok(FineTune::Full),
        _ => Err("expected lora, dora or full".to_string()),
    }
}

fn parse_norm(text: &str) -> Result<f64, String> {
    crate::parse_finite(text)
        .ok()
        .filter(|norm| *norm >= 0.0)
        .ok_or_else(|| "expected a number of at least 0".to_string())
}

fn parse_part(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(part) if part > 0.0 && part <= 1.0 => Ok(part),
        _ => Err("expected a number above 0 and up to 1".to_string()),
    }
}

/// Runs the measurement on a batch of so many rows.
pub fn run(model_name: &str, args: &Args, rows: usize, as_json: bool) -> anyhow::Result<()> {
    let rank = args.lora_rank.unwrap_or(8);
    if args.steps == 0 || args.seq == 0 || rank == 0 {
        return Err(Usage("--seq, --steps and --lora-rank must be at least 1".to_string()).into());
    }
    let asked = match args.num_layers {
        -1 => None,
        n if n > 0 => Some(n as usize),
        n => return Err(Usage(format!("--num-layers must be -1 or at least 1, got {n}")).into()),
    };
    let full = args.fine_tune_type == FineTune::Full;
    if full && (args.lora_keys.is_some() || args.lora_rank.is_some()) {
        let text = "--lora-keys and --lora-rank have no meaning for full fine-tuning";
        return Err(Usage(text.to_string()).into());
    }
    let begun = Instant::now();
    let folder = mica_lm::locate::locate(model_name)?;
    let mut loaded = load(&folder, if full { Packing::Quantized } else { Packing::Frozen })?;
    let load_s = begun.elapsed().as_secs_f64();
    let longest = loaded.model.info().max_positions;
    if args.seq > longest {
        return Err(Usage(format!("--seq {} is more than the model's {longest} positions", args.seq)).into());
    }
    if rows.saturating_mul(args.seq) > MOST_POSITIONS {
        let text =
            format!("--batch {rows} of --seq {} tokens is more than {MOST_POSITIONS} positions", args.seq);
        return Err(Usage(text).into());
    }
    let blocks = loaded.model.layers();
    let num_layers = asked.map(|asked| asked.min(blocks));
    if let Some(asked) = asked.filter(|&asked| asked > blocks) {
        eprintln!("--num-layers {asked} is more than the model's {blocks} blocks: all are trained");
    }
    // As `mica train` takes it: all blocks are the whole model.
    let layers = num_layers.filter(|&layers| layers < blocks);
    if !full {
        let adapter = AdapterConfig { rank, scale: 20.0, dropout: 0.0, keys: args.lora_keys.clone(), layers };
        attach(&mut *loaded.model, &adapter, args.fine_tune_type == FineTune::Dora, 0)?;
    }
    let names = trainable(&*loaded.model, args.fine_tune_type, layers)?;
    let settings = UpdateSettings {
        optimizer: AdamWConfig::default(),
        clip: Some(args.max_grad_norm).filter(|norm| *norm > 0.0),
        precision: precision(&loaded),
        recompute: if args.grad_checkpoint { usize::MAX } else { 0 },
        seed: 0,
    };
    let mut update = Update::new(&*loaded.model, &names, settings)?;
    let size =
        |list: Vec<(String, mica_array::Array)>| list.iter().map(|(_, array)| array.size()).sum::<usize>();
    let (trainable, all) =
        (size(update.parameters(&*loaded.model)), size(parameters(loaded.model.as_module())));
    let batch = batch(rows, args.seq, args.labelled, loaded.model.info().vocabulary);
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    let window = std::slice::from_ref(&batch);
    check(args, rows, update.rehearse(&mut *loaded.model, &Sft, window)?)?;
    for step in 0..args.steps {
        let begun = Instant::now();
        let stepped = update.step(&mut *loaded.model, &Sft, window, step as u64, args.learning_rate)?;
        seconds.push(begun.elapsed().as_secs_f64());
        losses.push(stepped.loss);
    }
    let peak_memory_gb = peak_memory_gb();
    let session = profile::start();
    update.step(&mut *loaded.model, &Sft, window, args.steps as u64, args.learning_rate)?;
    let ops = session.finish();
    let measured = machine::measure(&machine::ceilings(0));
    let step_s = machine::median(seconds.clone()).expect("at least one step was run");
    let tokens_per_s = (rows * args.seq) as f64 / step_s;
    if as_json {
        let document = serde_json::json!({
            "model": model_name,
            "threads": mica_array::threads(),
            "isa": Isa::get().name(),
            "fine_tune_type": args.fine_tune_type,
            "num_layers": num_layers.map_or(-1, |layers| layers as i64),
            "lora_keys": args.lora_keys,
            "lora_rank": if full { None } else { Some(rank) },
            "max_grad_norm": args.max_grad_norm,
            "batch": rows,
            "seq": args.seq,
            "labelled": batch.labelled,
            "steps": args.steps,
            "load_s": load_s,
            "step_s": step_s,
            "tokens_per_s": tokens_per_s,
            "trainable": trainable,
            "parameters": all,
            "peak_memory_gb": peak_memory_gb,
            "loss_first": losses.first(),
            "loss_last": losses.last(),
            "losses": losses,
            "ceilings": machine::json(&measured),
            "by_op": machine::by_op(&measured, &ops, 1),
            "runs": seconds,
        });
        say!("{document}");
        return Ok(());
    }
    say!(
        "model      {model_name} (loaded in {load_s:.2} s), {} threads, {}",
        mica_array::threads(),
        Isa::get()
    );
    say!("trained    {trainable} of {all} parameters");
    let learnt = match batch.labelled {
        labelled if labelled == rows * args.seq => String::new(),
        labelled => format!(", {labelled} of them learnt"),
    };
    say!("step       {step_s:.3} s for {rows} × {} tokens{learnt}: {tokens_per_s:.1} tokens/s", args.seq);
    say!("loss       {:.4} → {:.4} in {} steps", losses[0], losses[losses.len() - 1], losses.len());
    if let Some(peak) = peak_memory_gb {
        say!("memory     peak {peak:.2} GB");
    }
    say!("ceilings   {}", machine::line(&measured));
    say!("\nA step by op, each op alone in the pool:");
    say!("{}", machine::table(&measured, &ops, 1).trim_end());
    Ok(())
}

/// Refuses steps that need more memory than there is.
fn check(args: &Args, rows: usize, rehearsed: u64) -> anyhow::Result<()> {
    let mut todo = Vec::new();
    if rows > 1 {
        todo.push(format!("--batch {}", rows / 2));
    }
    if !args.grad_checkpoint {
        todo.push("--grad-checkpoint (recomputes activations)".to_string());
    }
    if args.seq > 64 {
        todo.push(format!("--seq {}", args.seq / 2));
    }
    if args.fine_tune_type == FineTune::Full {
        todo.push("--fine-tune-type lora (trains few parameters)".to_string());
    }
    todo.push("a smaller or quantized model (mica convert -q)".to_string());
    let what = format!("a training step over {rows} × {} tokens", args.seq);
    let todo = format!("try {}", todo.join(", or "));
    Ok(mica_lm::memory::check(rehearsed + BESIDES, &what, &todo)?)
}

/// Random rows of which the last part is to be predicted, one token at least.
fn batch(rows: usize, seq: usize, part: f64, vocabulary: usize) -> Batch {
    let labelled = ((part * seq as f64).round() as usize).clamp(1, seq);
    let samples: Vec<Sample> = (0..rows as u64)
        .map(|row| {
            let mut rng = Rng::new(0, &[row]);
            let tokens = (0..=seq).map(|_| rng.below(vocabulary as u64) as u32).collect();
            Sample { tokens, targets: (0..=seq).map(|i| i > seq - labelled).collect() }
        })
        .collect();
    let rows: Vec<Vec<&Sample>> = samples.iter().map(|sample| vec![sample]).collect();
    Batch::assemble(&rows, seq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_tune::data::batch::IGNORE;

    #[test]
    fn the_last_part_of_every_row_has_targets() {
        for (part, learnt) in [(1.0, 7), (0.4, 3), (0.5, 4), (0.01, 1)] {
            let batch = batch(3, 7, part, 11);
            assert_eq!((batch.rows, batch.length, batch.labelled), (3, 7, 3 * learnt), "{part}");
            assert!(batch.tokens.iter().all(|&token| token < 11), "{part}");
            for row in batch.targets.chunks(7) {
                let (prompt, answer) = row.split_at(7 - learnt);
                assert!(prompt.iter().all(|&target| target == IGNORE), "{part}: {row:?}");
                assert!(answer.iter().all(|&target| target != IGNORE), "{part}: {row:?}");
            }
        }
    }
}
