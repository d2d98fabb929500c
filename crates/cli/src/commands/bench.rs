//! `mica bench`: speeds of a model, with the machine's ceilings measured in the same run, and where the time of a
//! step goes.

use std::time::{Duration, Instant};

use mica_array::kv::KvFormat;
use mica_array::{Precision, profile};
use mica_lm::cache::Cache;
use mica_lm::generate::{Options, advance, prefill};
use mica_lm::load::Loaded;
use mica_lm::models::Input;
use mica_nn::Context;
use mica_simd::Isa;

use super::{KvArgs, ModelArgs, bench_train};
use crate::exit::Usage;
use crate::machine::{self, Ceilings, peak_memory_gb};
use crate::output::say;

/// Measure the speed of prefill and decoding, or of training (--train)
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt
    #[arg(long, short, default_value_t = 512, value_name = "N", conflicts_with = "train")]
    prompt_tokens: usize,
    /// Tokens to generate
    #[arg(long, short, default_value_t = 128, value_name = "N", conflicts_with = "train")]
    generate_tokens: usize,
    /// Runs; the medians are reported
    #[arg(long, short = 'n', default_value_t = 5, value_name = "N", conflicts_with = "train")]
    runs: usize,
    /// Start decoding behind this many cached tokens, instead of behind the prompt
    #[arg(long, value_name = "N")]
    depth: Option<usize>,
    /// Decode so many sequences at once, or train on so many rows
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = parse_batch)]
    batch: usize,
    /// Form products exactly in f32
    #[arg(long)]
    exact: bool,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    train: bench_train::Args,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Sequences at once: far more than any machine decodes, few enough that no size of theirs overflows.
fn parse_batch(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(batch @ 1..=65_536) => Ok(batch),
        _ => Err("expected a number from 1 to 65536".to_string()),
    }
}

/// Bytes of the block that bandwidth is measured on.
pub const BLOCK: usize = 1 << 29;
/// How long filling a cache may take before a line says that it is done.
const PATIENCE: Duration = Duration::from_secs(5);
/// Steps whose ops are measured one by one.
const PROFILED: usize = 8;

struct Run {
    ttft_s: f64,
    prompt_tps: f64,
    generation_tps: f64,
    read_bandwidth_gbs: f64,
    bandwidth_fraction: f64,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.train.train {
        if args.model.adapter_path.is_some()
            || args.depth.is_some()
            || args.exact
            || args.kv.kv_bits.is_some()
        {
            let text = "--adapter-path, --depth, --exact and --kv-bits have no meaning with --train";
            return Err(Usage(text.to_string()).into());
        }
        return bench_train::run(&args.model.model, &args.train, args.batch, args.json);
    }
    if args.runs == 0 || args.prompt_tokens == 0 {
        return Err(Usage("-n and -p must be at least 1".to_string()).into());
    }
    let started = Instant::now();
    let loaded = args.model.open()?;
    let load_s = started.elapsed().as_secs_f64();
    let depth = args.depth.unwrap_or(args.prompt_tokens);
    let limit = loaded.model.info().max_positions;
    let longest = depth.max(args.prompt_tokens).saturating_add(args.generate_tokens);
    if longest > limit {
        return Err(Usage(format!(
            "{} cached and {} generated tokens are more than the model's {limit} positions",
            depth.max(args.prompt_tokens),
            args.generate_tokens
        ))
        .into());
    }
    let defaults = Options::for_model(&loaded);
    let (precision, kv_format) =
        if args.exact { (Precision::Exact, KvFormat::F32) } else { (defaults.precision, defaults.kv_format) };
    let kv_format = args.kv.format(kv_format)?;
    let types = (kv_format, precision);
    let model = loaded.model.as_ref();
    let needed = mica_lm::memory::generation(model, args.prompt_tokens, longest, args.batch, types)?;
    let what = format!("{longest} tokens in each of {} sequences", args.batch);
    mica_lm::memory::check(needed, &what, "lower -p, -g, --depth or --batch")?;
    let bench = Bench { args: &args, loaded: &loaded, precision, kv_format };
    let filling = Instant::now();
    let filled = if depth == args.prompt_tokens { None } else { Some(bench.filled(depth)?) };
    if filled.is_some() && filling.elapsed() > PATIENCE {
        eprintln!("{depth} tokens are cached after {:.0} s", filling.elapsed().as_secs_f64());
    }
    // One run to warm up, whose peak is the model's own: measuring the bandwidth takes memory too.
    bench.measure(filled.as_ref(), depth, None)?;
    let peak_memory_gb = peak_memory_gb();
    let ceilings = Ceilings::new(BLOCK);
    let mut runs = Vec::with_capacity(args.runs.min(1 << 16));
    for _ in 0..args.runs {
        runs.push(bench.measure(filled.as_ref(), depth, Some(&ceilings))?);
    }
    let steps = PROFILED.min(args.generate_tokens);
    let cache = match filled {
        Some(cache) => cache,
        None => bench.filled(depth)?,
    };
    let session = profile::start();
    bench.decode(cache, steps)?;
    let ops = session.finish();
    let measured = machine::measure(&ceilings);
    let median = |value: fn(&Run) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let weights_gb = loaded.weight_bytes as f64 / 1e9;
    if args.json {
        let list: Vec<serde_json::Value> = runs
            .iter()
            .map(|run| {
                serde_json::json!({
                    "ttft_s": run.ttft_s,
                    "prompt_tps": run.prompt_tps,
                    "generation_tps": run.generation_tps,
                    "read_bandwidth_gbs": run.read_bandwidth_gbs,
                    "bandwidth_fraction": run.bandwidth_fraction,
                })
            })
            .collect();
        let document = serde_json::json!({
            "model": args.model.model,
            "weights_gb": weights_gb,
            "threads": mica_array::threads(),
            "isa": Isa::get().name(),
            "load_s": load_s,
            "ttft_s": median(|run| run.ttft_s),
            "prompt_tokens": args.prompt_tokens,
            "prompt_tps": median(|run| run.prompt_tps),
            "generation_tokens": args.generate_tokens,
            "generation_tps": median(|run| run.generation_tps),
            "depth": depth,
            "batch": args.batch,
            "peak_memory_gb": peak_memory_gb,
            "read_bandwidth_gbs": median(|run| run.read_bandwidth_gbs),
            "bandwidth_fraction": median(|run| run.bandwidth_fraction),
            "ceilings": machine::json(&measured),
            "by_op": machine::by_op(&measured, &ops, steps),
            "runs": list,
        });
        say!("{document}");
        return Ok(());
    }
    say!("model        {} ({weights_gb:.2} GB, loaded in {load_s:.2} s)", args.model.model);
    say!("machine      {} threads, {}", mica_array::threads(), Isa::get());
    say!("prompt       {:.1} tokens/s ({} tokens)", median(|run| run.prompt_tps), args.prompt_tokens);
    say!(
        "generation   {:.2} tokens/s ({} tokens, batch {}, behind {depth})",
        median(|run| run.generation_tps),
        args.generate_tokens,
        args.batch
    );
    say!(
        "memory       {:.1} GB/s read bandwidth, of which decoding used {:.0} %; peak {:.2} GB",
        median(|run| run.read_bandwidth_gbs),
        100.0 * median(|run| run.bandwidth_fraction),
        peak_memory_gb
    );
    if steps > 0 {
        say!("ceilings     {}", machine::line(&measured));
        say!("\nA decode step by op, each op alone in the pool:");
        say!("{}", machine::table(&measured, &ops, steps).trim_end());
    }
    Ok(())
}

/// A model and how it is run.
struct Bench<'a> {
    args: &'a Args,
    loaded: &'a Loaded,
    precision: Precision,
    kv_format: KvFormat,
}

impl Bench<'_> {
    fn token(&self, i: usize) -> u32 {
        ((i * 7919) % self.loaded.model.info().vocabulary.min(15_000)) as u32
    }

    /// A cache that holds so many tokens.
    fn filled(&self, depth: usize) -> anyhow::Result<Cache> {
        let model = self.loaded.model.as_ref();
        let mut cache = model.new_cache(1, self.kv_format);
        let tokens: Vec<u32> = (0..depth.max(1)).map(|i| self.token(i)).collect();
        prefill(model, &mut cache, &tokens, self.precision)?;
        Ok(cache)
    }

    /// One run: the prompt, then decoding behind it or behind the tokens of `filled`.
    fn measure(
        &self,
        filled: Option<&Cache>,
        depth: usize,
        ceilings: Option<&Ceilings>,
    ) -> anyhow::Result<Run> {
        let (args, model) = (self.args, self.loaded.model.as_ref());
        let started = Instant::now();
        let prompt = self.filled(args.prompt_tokens)?;
        let ttft_s = started.elapsed().as_secs_f64();
        let cache = match filled {
            Some(filled) => {
                drop(prompt);
                filled.fork(&[0])?
            }
            None => prompt,
        };
        // Bandwidth is sampled on both sides of decoding: memory of shared machines changes speed.
        let sample = || ceilings.and_then(machine::bandwidth).unwrap_or(f64::NAN);
        let before = sample();
        let started = Instant::now();
        self.decode(cache, args.generate_tokens)?;
        let seconds = started.elapsed().as_secs_f64();
        let bandwidth = (before + sample()) / 2.0;
        let spec = model.new_cache(1, self.kv_format).kv.spec().clone();
        let positions = depth as f64 + args.generate_tokens as f64 / 2.0;
        let kv_bytes = spec.bytes_per_position() as f64 * positions * args.batch as f64;
        let steps_per_second = args.generate_tokens as f64 / seconds;
        let moved = (self.loaded.weight_bytes as f64 + kv_bytes) * steps_per_second / 1e9;
        Ok(Run {
            ttft_s,
            prompt_tps: args.prompt_tokens as f64 / ttft_s,
            generation_tps: steps_per_second * args.batch as f64,
            read_bandwidth_gbs: bandwidth,
            bandwidth_fraction: moved / bandwidth,
        })
    }

    /// Steps of one sequence, or of several that share the cached tokens.
    fn decode(&self, mut cache: Cache, steps: usize) -> anyhow::Result<()> {
        let (batch, model) = (self.args.batch, self.loaded.model.as_ref());
        if batch == 1 {
            for i in 0..steps {
                advance(model, &mut cache, &[self.token(i)], self.precision)?;
            }
            return Ok(());
        }
        let context = Context::new(self.precision);
        let mut cache = cache.fork(&vec![0; batch])?;
        for i in 0..steps {
            let tokens: Vec<[u32; 1]> = (0..batch).map(|row| [self.token(i * batch + row)]).collect();
            let rows: Vec<&[u32]> = tokens.iter().map(|row| row.as_slice()).collect();
            cache.reserve(1)?;
            let input = Input::new(&rows, &vec![cache.length(); batch])?;
            let logits = model.logits(&input, Some(&mut cache), &context)?;
            cache.advance(1);
            logits.eval()?;
        }
        Ok(())
    }
}
