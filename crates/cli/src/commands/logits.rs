//! `mica logits`: a model's raw logits, for comparing and debugging.

use std::path::PathBuf;

use mica_array::kv::KvFormat;
use mica_array::{Array, Dtype, Precision};
use mica_lm::decode::Decoder;
use mica_lm::generate::{Options, check_tokens};
use mica_lm::models::Input;
use mica_lm::tokenizer::{Specials, Tokenizer};
use mica_nn::Context;

use super::{KvArgs, ModelArgs, Tokens, parse_tokens};
use crate::exit::Usage;

/// Write a model's logits as [tokens, vocabulary] f32 to a npy file
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids
    #[arg(long, value_name = "1,2,3", value_parser = parse_tokens)]
    tokens: Option<Tokens>,
    /// Text, tokenized as it is
    #[arg(long, short, value_name = "TEXT", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// The file to write
    #[arg(long, short, value_name = "F.npy")]
    output: PathBuf,
    /// Form products exactly in f32
    #[arg(long)]
    exact: bool,
    /// Form products in bf16, as training does, instead of with int8 activations
    #[arg(long, conflicts_with = "exact")]
    bf16: bool,
    /// One pass over all tokens without a cache, instead of token by token
    #[arg(long, conflicts_with = "kv_bits")]
    no_cache: bool,
    #[command(flatten)]
    kv: KvArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    if std::fs::metadata(&args.output).is_ok_and(|about| !about.is_file()) {
        let text = "is a folder or a device; name a file to write, as logits.npy";
        return Err(Usage(format!("--output {}: {text}", args.output.display())).into());
    }
    let loaded = args.model.open()?;
    let tokens = match (args.tokens, args.prompt) {
        (Some(tokens), _) => tokens,
        (None, Some(text)) => Tokenizer::load(&loaded.folder)?.encode(&text, Specials::ParseAndAdd)?,
        (None, None) => return Err(Usage("give --tokens 1,2,3 or --prompt TEXT".to_string()).into()),
    };
    check_tokens(loaded.model.as_ref(), &tokens)?;
    let defaults = Options::for_model(&loaded);
    let (precision, kv_format) = match (args.exact, args.bf16) {
        (true, _) => (Precision::Exact, KvFormat::F32),
        (_, true) => (Precision::Bf16, KvFormat::Bf16),
        _ => (defaults.precision, defaults.kv_format),
    };
    let kv_format = args.kv.format(kv_format)?;
    let model = loaded.model.as_ref();
    let (kept, needed) = (4 * (tokens.len() * model.info().vocabulary) as u64, (kv_format, precision));
    let needed = match args.no_cache {
        true => mica_lm::memory::forward(model, tokens.len(), true, precision)?,
        false => kept + mica_lm::memory::generation(model, 1, tokens.len(), 1, needed)?,
    };
    // Once more for the copy that is written.
    mica_lm::memory::check(
        needed + kept,
        &format!("the logits of {} tokens", tokens.len()),
        "give fewer tokens",
    )?;
    let rows = if args.no_cache {
        vec![model.logits(&Input::new(&[&tokens], &[0])?, None, &Context::new(precision))?]
    } else {
        let mut cache = model.new_cache(1, kv_format);
        let mut rows = Vec::with_capacity(tokens.len());
        let mut decoder = Decoder::new(model, precision);
        for &token in &tokens {
            decoder.step(&mut cache, &[token])?;
            rows.push(Array::from_slice(decoder.logits()?, &[1, 1, model.info().vocabulary])?);
        }
        rows
    };
    let all = Array::concatenate(&rows, 1)?;
    let shape = [tokens.len(), model.info().vocabulary];
    let values = all.astype(Dtype::F32)?.reshape(&[shape[0] as i64, shape[1] as i64])?;
    values.with_bytes(|bytes| mica_io::npy::write(&args.output, mica_io::DType::F32, &shape, bytes))??;
    eprintln!("wrote {} × {} logits to {}", shape[0], shape[1], args.output.display());
    Ok(())
}
