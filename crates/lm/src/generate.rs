//! Generation: an iterator from a prompt to tokens and text.
//!
//! The prompt is read in pieces of [`PREFILL`] tokens, which bounds memory; the result does not
//! depend on the cut (docs/NUMERICS.md). Drawing on a terminal, HTTP and chat history belong to the
//! callers.

use std::time::Instant;

use mica_array::kv::KvFormat;
use mica_array::{Dtype, Precision, eval};
use mica_nn::Context;

use crate::cache::Cache;
use crate::decode::Decoder;
use crate::detokenizer::Streaming;
use crate::load::Loaded;
use crate::memory;
use crate::models::{Asked, Input, LanguageModel};
use crate::sample::{Sampler, SamplingParams};
use crate::stop::StopStrings;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Prompt tokens per forward pass: enough rows to keep the arithmetic units busy, few enough that
/// the activations of a wide model stay small.
pub const PREFILL: usize = 512;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Options {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Go on past end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Of the products.
    pub precision: Precision,
    /// What keys and values are kept in.
    pub kv_format: KvFormat,
}

impl Options {
    /// Greedy, with the arithmetic that suits the model: int8 activations for quantized weights,
    /// bf16 for bf16 ones, exact for f32.
    pub fn for_model(loaded: &Loaded) -> Options {
        let exact = loaded.dtype == Dtype::F32 && !loaded.config.quantization.is_quantized();
        Options {
            max_tokens: 256,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            ignore_eos: false,
            precision: if exact { Precision::Exact } else { Precision::Fast },
            kv_format: if exact { KvFormat::F32 } else { KvFormat::Bf16 },
        }
    }
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token or a stop text.
    Stop,
    /// `max_tokens`, or the model's longest sequence.
    Length,
}

impl FinishReason {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// One generated token.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The token.
    pub token: u32,
    /// Text that became certain with it; often empty.
    pub text: String,
    /// Its log-probability under the model, if asked for.
    pub logprob: Option<f32>,
    /// Set on the last piece.
    pub finish: Option<FinishReason>,
}

/// Measured while generating.
#[derive(Debug, Clone, Copy, Default)]
pub struct Statistics {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// From the start to the first token's logits.
    pub prompt_seconds: f64,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// From the first token's logits to the last token.
    pub generation_seconds: f64,
}

impl Statistics {
    /// Prompt tokens a second.
    pub fn prompt_tps(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_seconds.max(1e-9)
    }

    /// Generated tokens a second; the first comes with the prompt, so that one alone has no rate.
    pub fn generation_tps(&self) -> Option<f64> {
        let decoded = self.generated_tokens.checked_sub(1).filter(|&decoded| decoded > 0)?;
        Some(decoded as f64 / self.generation_seconds.max(1e-9))
    }
}

/// Generates one sequence, a [`Piece`] at a time.
pub struct Generator<'a> {
    model: &'a dyn LanguageModel,
    options: Options,
    eos: Vec<u32>,
    cache: Cache,
    decoder: Decoder<'a>,
    sampler: Sampler,
    text: Option<(Streaming, StopStrings)>,
    history: Vec<u32>,
    /// After the prompt.
    logits: Vec<f32>,
    statistics: Statistics,
    first_token: Option<Instant>,
    done: bool,
}

impl<'a> Generator<'a> {
    /// Checks the prompt and reads it. Without a tokenizer pieces have no text, and stop texts
    /// cannot be watched for.
    ///
    /// # Errors
    /// An empty prompt, a token outside the vocabulary, a prompt longer than the model's longest
    /// sequence, too little memory for all tokens.
    pub fn new(
        model: &'a dyn LanguageModel,
        tokenizer: Option<&Tokenizer>,
        eos: &[u32],
        prompt: &[u32],
        options: Options,
    ) -> Result<Generator<'a>> {
        check_tokens(model, prompt)?;
        if tokenizer.is_none() && !options.stop.is_empty() {
            return Err(Error::Usage(
                "stop texts need a tokenizer, and this model folder has none".to_string(),
            ));
        }
        let longest = prompt.len().saturating_add(options.max_tokens).min(model.info().max_positions);
        let types = (options.kv_format, options.precision);
        memory::check(
            memory::generation(model, prompt.len(), longest, 1, types)?,
            &format!("generating after {} tokens, up to {longest} in all,", prompt.len()),
            "shorten the prompt, or lower the number of tokens to generate (--max-tokens)",
        )?;
        let sampler = Sampler::new(options.sampling.clone())?;
        let started = Instant::now();
        let mut cache = model.new_cache(1, options.kv_format);
        let logits = prefill(model, &mut cache, prompt, options.precision)?;
        let statistics = Statistics {
            prompt_tokens: prompt.len(),
            prompt_seconds: started.elapsed().as_secs_f64(),
            ..Statistics::default()
        };
        let text = tokenizer
            .map(|tokenizer| (Streaming::new(tokenizer, true), StopStrings::new(options.stop.clone())));
        Ok(Generator {
            model,
            eos: if options.ignore_eos { Vec::new() } else { eos.to_vec() },
            cache,
            decoder: Decoder::new(model, options.precision),
            sampler,
            text,
            history: prompt.to_vec(),
            logits,
            statistics,
            first_token: None,
            done: options.max_tokens == 0,
            options,
        })
    }

    /// What was measured so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Prompt and generated tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.history
    }

    fn step(&mut self) -> Result<Piece> {
        let now = Instant::now();
        let started = *self.first_token.get_or_insert(now);
        if self.statistics.generated_tokens > 0 {
            let token = *self.history.last().expect("a token was generated");
            self.decoder.step(&mut self.cache, &[token])?;
        }
        let position = self.statistics.generated_tokens as u64;
        let logits = if position == 0 { &mut self.logits } else { self.decoder.logits()? };
        let sampled = self.sampler.sample(logits, &self.history, position)?;
        self.history.push(sampled.token);
        self.statistics.generated_tokens += 1;
        let is_eos = self.eos.contains(&sampled.token);
        let full = self.statistics.generated_tokens >= self.options.max_tokens
            || self.history.len() >= self.model.info().max_positions;
        let mut piece =
            Piece { token: sampled.token, text: String::new(), logprob: sampled.logprob, finish: None };
        if is_eos {
            piece.finish = Some(FinishReason::Stop);
        } else if full {
            piece.finish = Some(FinishReason::Length);
        }
        if let Some((streaming, stops)) = &mut self.text {
            let mut fresh = if is_eos { String::new() } else { streaming.push(sampled.token)? };
            if piece.finish.is_some() {
                fresh.push_str(&streaming.finish()?);
            }
            let checked = stops.push(&fresh);
            piece.text = checked.text;
            if checked.stopped.is_some() {
                piece.finish = Some(FinishReason::Stop);
            } else if piece.finish.is_some() {
                piece.text.push_str(&stops.finish());
            }
        }
        self.done = piece.finish.is_some();
        self.statistics.generation_seconds = started.elapsed().as_secs_f64();
        Ok(piece)
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        if self.done {
            return None;
        }
        let piece = self.step();
        self.done |= piece.is_err();
        Some(piece)
    }
}

/// Whether the model can read these tokens as one sequence.
pub fn check_tokens(model: &dyn LanguageModel, tokens: &[u32]) -> Result<()> {
    let info = model.info();
    if tokens.is_empty() {
        return Err(Error::Usage("the prompt is empty: give at least one token".to_string()));
    }
    check_vocabulary(model, tokens)?;
    if tokens.len() > info.max_positions {
        let note = info.positions_note.map(|note| format!(" ({note})")).unwrap_or_default();
        return Err(Error::Usage(format!(
            "the prompt has {} tokens, the model reads at most {}{note}: shorten it",
            tokens.len(),
            info.max_positions
        )));
    }
    Ok(())
}

/// Whether the model has a row for each of these tokens.
pub fn check_vocabulary(model: &dyn LanguageModel, tokens: &[u32]) -> Result<()> {
    let info = model.info();
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= info.vocabulary) {
        return Err(Error::Usage(format!(
            "token {token} is outside the model's vocabulary of {}",
            info.vocabulary
        )));
    }
    Ok(())
}

/// Reads a prompt into the cache and gives the logits after its last token.
///
/// # Errors
/// A token outside of the vocabulary, too little memory. The cache holds what it held before then.
pub fn prefill(
    model: &dyn LanguageModel,
    cache: &mut Cache,
    prompt: &[u32],
    precision: Precision,
) -> Result<Vec<f32>> {
    check_vocabulary(model, prompt)?;
    cache.attempt(|cache| read(model, cache, prompt, precision))
}

fn read(
    model: &dyn LanguageModel,
    cache: &mut Cache,
    prompt: &[u32],
    precision: Precision,
) -> Result<Vec<f32>> {
    let (body, last) = prompt.split_at((prompt.len() - 1) / PREFILL * PREFILL);
    let context = Context::new(precision);
    for piece in body.chunks(PREFILL) {
        cache.reserve(piece.len())?;
        let input = Input::new(&[piece], &[cache.length()])?;
        // The last layer's output is of no use; the cache is.
        let _hidden = model.hidden(&input, Some(cache), &context)?;
        cache.advance(piece.len());
        eval(&cache.pending())?;
    }
    cache.reserve(last.len())?;
    let input = Input { asked: Asked::Last, ..Input::new(&[last], &[cache.length()])? };
    let logits = model.logits(&input, Some(cache), &context)?;
    cache.advance(last.len());
    // The cache first: what a layer attended goes with it, in the order of the layers.
    let mut roots = cache.pending();
    roots.push(logits.clone());
    eval(&roots)?;
    Ok(logits.to_vec::<f32>()?)
}
