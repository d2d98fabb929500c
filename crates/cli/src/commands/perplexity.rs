//! `mica perplexity`: how well a model predicts a text.
//!
//! The text is cut into windows of `--length` tokens that overlap by `--overlap`; of each window but the first
//! only the tokens behind the overlap are counted, so that every token is counted once and has context.

use std::path::PathBuf;

use mica_array::op::CrossEntropySpec;
use mica_array::{Array, Precision};
use mica_lm::generate::check_vocabulary;
use mica_lm::load::Loaded;
use mica_lm::models::Input;
use mica_lm::tokenizer::{Specials, Tokenizer};
use mica_nn::Context;
use mica_tune::session::precision;

use super::ModelArgs;
use crate::exit::Usage;
use crate::output::say;

/// Measure a model's perplexity on a text file
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text, UTF-8
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a window [default: 2048, or the model's longest sequence]
    #[arg(long, value_name = "N")]
    length: Option<usize>,
    /// Tokens of a window that are only context [default: a quarter of the length]
    #[arg(long, value_name = "N")]
    overlap: Option<usize>,
    /// Stop after so many tokens of the text
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Form products with int8 activations, as generation does, instead of on the training path
    #[arg(long, conflicts_with = "exact")]
    fast: bool,
    /// Form products exactly in f32
    #[arg(long)]
    exact: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let loaded = args.model.open()?;
    let longest = loaded.model.info().max_positions;
    let length = args.length.unwrap_or(longest.min(2048));
    let overlap = args.overlap.unwrap_or(length / 4);
    if length < 2 || length > longest || overlap >= length - 1 {
        let text = format!(
            "--length must be from 2 to the model's {longest} positions and more than --overlap + 1, got {length} \
             and {overlap}"
        );
        return Err(Usage(text).into());
    }
    let bytes = std::fs::read(&args.file).map_err(|e| mica_tune::Error::file(&args.file, e))?;
    let text = String::from_utf8(bytes).map_err(|_| mica_tune::Error::Data {
        path: args.file.clone(),
        cause: "is not UTF-8 text".to_string(),
    })?;
    let tokenizer = Tokenizer::load(&loaded.folder)?;
    let mut tokens = tokenizer.encode(&text, Specials::ParseAndAdd)?;
    if tokens.len() < 2 || text.is_empty() {
        let cause = format!("comes to {} tokens; two at least are needed", tokens.len());
        return Err(mica_tune::Error::Data { path: args.file.clone(), cause }.into());
    }
    tokens.truncate(args.max_tokens.unwrap_or(usize::MAX));
    if tokens.len() < 2 {
        return Err(Usage("--max-tokens must be at least 2".to_string()).into());
    }
    // The text may be of any length: only windows of it are read.
    check_vocabulary(loaded.model.as_ref(), &tokens)?;
    let precision = match (args.fast, args.exact) {
        (true, _) => Precision::Fast,
        (_, true) => Precision::Exact,
        _ => precision(&loaded),
    };
    let window = length.min(tokens.len());
    let needed = mica_lm::memory::forward(loaded.model.as_ref(), window, false, precision)?;
    mica_lm::memory::check(needed, &format!("a window of {window} tokens"), "lower --length")?;
    let mut sums = Sums::default();
    for (start, end, counted) in windows(tokens.len(), length, overlap) {
        for nll in losses(&loaded, &tokens[start..end], counted - start, precision)? {
            sums.add(nll);
        }
    }
    let (nll, error) = (sums.mean(), sums.standard_error());
    if args.json {
        let document = serde_json::json!({
            "perplexity": nll.exp(), "nll": nll, "tokens": sums.count, "stderr": error,
        });
        say!("{document}");
    } else {
        say!("perplexity  {:.4}", nll.exp());
        say!("nll         {nll:.6} ± {error:.6} over {} tokens", sums.count);
    }
    Ok(())
}

/// (start, end, first token that is counted) of each window.
fn windows(tokens: usize, length: usize, overlap: usize) -> Vec<(usize, usize, usize)> {
    let mut windows = Vec::new();
    let mut counted = 1;
    while counted < tokens {
        let start = if counted == 1 { 0 } else { counted - overlap.max(1) };
        let end = (start + length).min(tokens);
        windows.push((start, end, counted));
        counted = end;
    }
    windows
}

/// −log p of the tokens from `first` on, given those before them in the window.
fn losses(loaded: &Loaded, window: &[u32], first: usize, precision: Precision) -> anyhow::Result<Vec<f64>> {
    let model = loaded.model.as_ref();
    let input = Input::new(&[&window[..window.len() - 1]], &[0])?;
    let hidden = model.hidden(&input, None, &Context::new(precision))?;
    let rows = (window.len() - first) as i64;
    let hidden = hidden.reshape(&[-1, hidden.dim(-1) as i64])?;
    let hidden = hidden.narrow(0, first - 1, window.len() - 1)?.contiguous()?;
    let targets: Vec<i32> = window[first..].iter().map(|&token| token as i32).collect();
    let targets = Array::from_slice(&targets, &[rows as usize])?;
    let spec = CrossEntropySpec { precision, softcap: None };
    let (_, per_row) = hidden.linear_cross_entropy(model.head(), &targets, spec)?;
    Ok(per_row.to_vec::<f32>()?.into_iter().map(|value| -f64::from(value)).collect())
}

/// Sums for a mean and its standard error (Welford 1962).
#[derive(Default)]
struct Sums {
    count: u64,
    mean: f64,
    squares: f64,
}

impl Sums {
    fn add(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.mean;
        self.mean += before / self.count as f64;
        self.squares += before * (value - self.mean);
    }

    fn mean(&self) -> f64 {
        self.mean
    }

    /// Of the mean, taking tokens as independent.
    fn standard_error(&self) -> f64 {
        let count = self.count as f64;
        if self.count < 2 { 0.0 } else { (self.squares / (count - 1.0) / count).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_counted_once() {
        for (tokens, length, overlap) in
            [(2, 8, 2), (8, 8, 2), (9, 8, 2), (100, 8, 2), (100, 8, 0), (31, 8, 6)]
        {
            let windows = windows(tokens, length, overlap);
            let mut next = 1;
            for (start, end, counted) in windows {
                assert_eq!(counted, next);
                assert!(end - start <= length && counted > start && end > counted);
                assert!(start == 0 || counted - start >= overlap);
                next = end;
            }
            assert_eq!(next, tokens, "{tokens} tokens, {length}, {overlap}");
        }
    }

    #[test]
    fn means_have_errors() {
        let mut sums = Sums::default();
        [1.0, 2.0, 3.0, 4.0].into_iter().for_each(|value| sums.add(value));
        assert_eq!(sums.mean(), 2.5);
        assert!((sums.standard_error() - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
    }
}
