//! `mica bench`: speeds of a model, with the machine's ceilings measured in the same run, and where the time of a
//! step goes.

use std::time::{Duration, Instant};

use mica_array::kv::KvFormat;
use mica_array::{Precision, profile};
use mica_lm::cache::Cache;
use mica_lm::decode::Decoder;
use mica_lm::generate::{Options, prefill};
use mica_lm::load::Loaded;
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
    /// Start decoding behind this many cached tokens, instead of behind the prompt; 0 is an empty cache
    #[arg(long, value_name = "N")]
    depth: Option<usize>,
    /// Decode so many sequences at once, each with a cache of its own, as a server does for so many people; or train on
    /// so many rows
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

/// How long filling a cache may take before a line says that it is done.
const PATIENCE: Duration = Duration::from_secs(5);
/// Steps whose ops are measured one by one.
const PROFILED: usize = 8;
/// Steps of which is measured what the threads do meanwhile.
const METERED: usize = 64;

/// What a run measured; `None` is what it did not.
struct Run {
    ttft_s: f64,
    prompt_tps: f64,
    generation_tps: Option<f64>,
    read_bandwidth_gbs: Option<f64>,
    bandwidth_fraction: Option<f64>,
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
    let defaults = Options::for_model(&loaded);
    let (precision, kv_format) =
        if args.exact { (Precision::Exact, KvFormat::F32) } else { (defaults.precision, defaults.kv_format) };
    let kv_format = args.kv.format(kv_format)?;
    let bench = Bench { args: &args, loaded: &loaded, precision, kv_format };
    let needed = bench.check(depth)?;
    let filling = Instant::now();
    let filled = if depth == args.prompt_tokens { None } else { Some(bench.filled(depth)?) };
    if filled.is_some() && filling.elapsed() > PATIENCE {
        eprintln!("{depth} tokens are cached after {:.0} s", filling.elapsed().as_secs_f64());
    }
    // One run to warm up, whose peak is the model's own: measuring the bandwidth takes memory too.
    bench.measure(filled.as_ref(), depth, None)?;
    let peak_memory_gb = peak_memory_gb();
    let ceilings = machine::ceilings(needed);
    let mut runs = Vec::with_capacity(args.runs.min(1 << 16));
    for _ in 0..args.runs {
        runs.push(bench.measure(filled.as_ref(), depth, Some(&ceilings))?);
    }
    let steps = PROFILED.min(args.generate_tokens);
    let mut ops = Vec::new();
    let mut spent = None;
    if steps > 0 {
        let filled = filled.map_or_else(|| bench.filled(depth), Ok)?;
        {
            let mut cache = bench.sequences(filled.fork(&[0])?)?;
            let metered = METERED.min(args.generate_tokens);
            spent = Some(machine::spent(|| bench.decode(&mut cache, metered))?);
        }
        let mut cache = bench.sequences(filled)?;
        let session = profile::start();
        bench.decode(&mut cache, steps)?;
        ops = session.finish();
    }
    let measured = machine::measure(&ceilings);
    let median = |value: fn(&Run) -> Option<f64>| machine::median(runs.iter().filter_map(value).collect());
    let [ttft_s, prompt_tps] = [median(|run| Some(run.ttft_s)), median(|run| Some(run.prompt_tps))];
    let generation_tps = median(|run| run.generation_tps);
    let read_bandwidth_gbs = median(|run| run.read_bandwidth_gbs);
    let bandwidth_fraction = median(|run| run.bandwidth_fraction);
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
            "ttft_s": ttft_s,
            "prompt_tokens": args.prompt_tokens,
            "prompt_tps": prompt_tps,
            "generation_tokens": args.generate_tokens,
            "generation_tps": generation_tps,
            "depth": depth,
            "batch": args.batch,
            "peak_memory_gb": peak_memory_gb,
            "read_bandwidth_gbs": read_bandwidth_gbs,
            "bandwidth_fraction": bandwidth_fraction,
            "ceilings": machine::json(&measured),
            "by_op": machine::by_op(&measured, &ops, steps),
            "threads_time": spent.map(|spent| spent.json()),
            "runs": list,
        });
        say!("{document}");
        return Ok(());
    }
    say!("model        {} ({weights_gb:.2} GB, loaded in {load_s:.2} s)", args.model.model);
    say!("machine      {} threads, {}", mica_array::threads(), Isa::get());
    if let Some(speed) = prompt_tps {
        say!("prompt       {speed:.1} tokens/s ({} tokens)", args.prompt_tokens);
    }
    if let Some(speed) = generation_tps {
        let (tokens, batch) = (args.generate_tokens, args.batch);
        say!("generation   {speed:.2} tokens/s ({tokens} tokens, batch {batch}, behind {depth})");
    }
    let mut memory = match read_bandwidth_gbs {
        Some(rate) => format!("{rate:.1} GB/s read bandwidth"),
        None => format!("read bandwidth {}", machine::NO_BLOCK),
    };
    if let Some(fraction) = bandwidth_fraction {
        memory += &format!(", of which decoding used {:.0} %", 100.0 * fraction);
    }
    if let Some(peak) = peak_memory_gb {
        memory += &format!("; peak {peak:.2} GB");
    }
    say!("memory       {memory}");
    if steps > 0 {
        say!("ceilings     {}", machine::line(&measured));
        if let Some(spent) = spent {
            say!("threads      {spent}");
        }
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

    /// Refuses what the model has no positions for, or the machine no memory: the prompt, filling the cache to this
    /// depth, and decoding behind it. The most bytes that one of them takes.
    fn check(&self, depth: usize) -> anyhow::Result<u64> {
        let (args, model) = (self.args, self.loaded.model.as_ref());
        let (prompt, generated, batch) = (args.prompt_tokens, args.generate_tokens, args.batch);
        let limit = model.info().max_positions;
        let longest = depth.saturating_add(generated);
        if prompt > limit {
            let text = format!("a prompt of {prompt} tokens (-p) is more than the model's {limit} positions");
            return Err(Usage(text).into());
        }
        if longest > limit {
            return Err(Usage(format!(
                "{depth} cached and {generated} generated tokens are more than the model's {limit} positions"
            ))
            .into());
        }
        let types = (self.kv_format, self.precision);
        let kept = |length, batch| mica_lm::memory::kept(model, length, batch, self.kv_format);
        let reading = |length| mica_lm::memory::generation(model, length, length, 1, types);
        // What the cache was filled with stays beside each prompt; of decoding, the first sequence shares it, but for
        // the last page.
        let (filled, last) = if depth == prompt { (0, 0) } else { (kept(depth, 1), kept(1, 1)) };
        let mut parts = vec![(
            reading(prompt)?.saturating_add(filled),
            format!("a prompt of {prompt} tokens"),
            "lower -p",
        )];
        if filled > 0 {
            parts.push((reading(depth)?, format!("a cache of {depth} tokens"), "lower --depth"));
        }
        if generated > 0 {
            let step = mica_lm::memory::step(model, batch, self.precision)?;
            let what = format!("decoding up to {longest} tokens in each of {batch} sequences");
            let bytes = kept(longest, batch).saturating_add(last + step);
            parts.push((bytes, what, "lower -g, --depth or --batch"));
        }
        for (bytes, what, todo) in &parts {
            mica_lm::memory::check(*bytes, what, todo)?;
        }
        Ok(parts.iter().map(|(bytes, ..)| *bytes).max().unwrap_or(0))
    }

    /// A cache that holds so many tokens.
    fn filled(&self, depth: usize) -> anyhow::Result<Cache> {
        let model = self.loaded.model.as_ref();
        let mut cache = model.new_cache(1, self.kv_format);
        let tokens: Vec<u32> = (0..depth).map(|i| self.token(i)).collect();
        if !tokens.is_empty() {
            prefill(model, &mut cache, &tokens, self.precision)?;
        }
        Ok(cache)
    }

    /// The sequences to decode: as many as are asked for, each with a copy of its own of what the cache holds. (What
    /// all of them share would come from memory once.)
    fn sequences(&self, mut cache: Cache) -> anyhow::Result<Cache> {
        if self.args.generate_tokens == 0 {
            return Ok(cache);
        }
        if self.args.batch > 1 {
            let mut sequences = cache.fork(&vec![0; self.args.batch])?;
            drop(cache);
            sequences.kv.unshare()?;
            mica_array::eval(&sequences.pending())?;
            cache = sequences;
        }
        // The page that is shared with what it was forked from is copied here, and not in the first step.
        cache.reserve(1)?;
        Ok(cache)
    }

    /// One run: the prompt, then decoding behind it or behind the tokens of `filled`.
    fn measure(
        &self,
        filled: Option<&Cache>,
        depth: usize,
        ceilings: Option<&Ceilings>,
    ) -> anyhow::Result<Run> {
        let args = self.args;
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
        let mut cache = self.sequences(cache)?;
        // Bandwidth is sampled on both sides of decoding: memory of shared machines changes speed.
        let sample = || ceilings.and_then(machine::bandwidth);
        let before = sample();
        let started = Instant::now();
        self.decode(&mut cache, args.generate_tokens)?;
        let seconds = started.elapsed().as_secs_f64();
        let bandwidth = before.zip(sample()).map(|(before, after)| (before + after) / 2.0);
        let decoded = args.generate_tokens > 0;
        let moved = decoded.then(|| self.moved(&cache, depth) as f64 / seconds / 1e9);
        let tokens = (args.generate_tokens * args.batch) as f64;
        Ok(Run {
            ttft_s,
            prompt_tps: args.prompt_tokens as f64 / ttft_s,
            generation_tps: decoded.then_some(tokens / seconds),
            read_bandwidth_gbs: bandwidth,
            bandwidth_fraction: moved.zip(bandwidth).map(|(moved, bandwidth)| moved / bandwidth),
        })
    }

    /// Bytes that the steps behind this depth had to read: weights, and keys and values of each sequence.
    fn moved(&self, cache: &Cache, depth: usize) -> u64 {
        let steps = depth..depth + self.args.generate_tokens;
        let weights = mica_lm::memory::weights_read(self.loaded.model.as_ref());
        steps.map(|before| weights + self.args.batch as u64 * cache.kv.bytes_read(before)).sum()
    }

    /// Steps of all sequences of the cache.
    fn decode(&self, cache: &mut Cache, steps: usize) -> anyhow::Result<()> {
        let batch = cache.batch();
        let mut decoder = Decoder::new(self.loaded.model.as_ref(), self.precision);
        for i in 0..steps {
            let tokens: Vec<u32> = (0..batch).map(|row| self.token(i * batch + row)).collect();
            decoder.step(cache, &tokens)?;
            decoder.logits()?;
        }
        Ok(())
    }
}
