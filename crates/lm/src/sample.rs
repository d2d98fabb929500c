//! From logits to a token.
//!
//! The chain is mlx-lm's: logit bias, repetition, presence and frequency penalty change the logits; top-p, min-p, XTC
//! and top-k then remove tokens, judged by probabilities *before* the temperature; the temperature shapes what is
//! left, and one uniform number picks from it. Log-probabilities are those of the changed logits, before removal and
//! temperature.
//!
//! The uniform number is a function of the seed and the position and of nothing else ([`random`]), so that a
//! sequence's tokens do not depend on what else is in the batch, on speculation, or on a restart.
//!
//! A vocabulary of 150,000 is passed over a few times and never sorted; only candidates near a threshold are.

mod filter;
pub mod random;

use crate::error::{Error, Result};

/// What to sample by. The default is greedy: the most probable token, the first of equals.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the most probable token; filters then have no effect. Larger is more varied.
    pub temperature: f32,
    /// Keep the most probable tokens whose probabilities sum to this; 0 and 1 keep all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as probable as the most probable; 0 keeps all.
    pub min_p: f32,
    /// Tokens that `min_p` may not remove, whatever their probability. At least 1.
    pub min_tokens_to_keep: usize,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: usize,
    /// Exclude top choices (XTC), off with `None`.
    pub xtc: Option<Xtc>,
    /// Positive logits of recent tokens are divided by it, negative ones multiplied; 1 and 0 change nothing.
    pub repetition_penalty: f32,
    /// How many recent tokens `repetition_penalty` looks at.
    pub repetition_context: usize,
    /// Subtracted once from the logit of every recent token.
    pub presence_penalty: f32,
    /// How many recent tokens `presence_penalty` looks at.
    pub presence_context: usize,
    /// Subtracted from the logit of a recent token as often as it occurs.
    pub frequency_penalty: f32,
    /// How many recent tokens `frequency_penalty` looks at.
    pub frequency_context: usize,
    /// Added to the logits of these ids; negative infinity forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// The seed.
    pub seed: u64,
    /// Whether to compute the chosen token's log-probability (a further pass when greedy).
    pub logprobs: bool,
    /// How many of the most probable tokens to list with their log-probabilities; more than 0 implies `logprobs`.
    pub top_logprobs: usize,
}

/// Exclude top choices: with some probability, all tokens above a threshold but the least probable of them are
/// removed, which leads away from the commonplace.
#[derive(Debug, Clone, PartialEq)]
pub struct Xtc {
    /// How often it is done, 0 to 1.
    pub probability: f32,
    /// Tokens more probable than this are top choices, 0 to 0.5.
    pub threshold: f32,
    /// Ids never removed (newline and end of sequence, in mlx-lm).
    pub keep: Vec<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 0.0,
            min_p: 0.0,
            min_tokens_to_keep: 1,
            top_k: 0,
            xtc: None,
            repetition_penalty: 1.0,
            repetition_context: 20,
            presence_penalty: 0.0,
            presence_context: 20,
            frequency_penalty: 0.0,
            frequency_context: 20,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: false,
            top_logprobs: 0,
        }
    }
}

/// A token and its log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The chosen token.
    pub token: u32,
    /// Its natural-log probability, if asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens with their log-probabilities, best first, the lower id first among equals.
    pub top: Vec<(u32, f32)>,
}

/// A sampler for one sequence; keeps its working memory between tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    weights: Vec<f32>,
    candidates: Vec<u32>,
    seen: Vec<u32>,
}

impl Sampler {
    /// Checks the options.
    ///
    /// # Errors
    /// An option that is out of its range, by name.
    pub fn new(params: SamplingParams) -> Result<Self> {
        let usage = |message: String| Error::Sampling { message, usage: true };
        let range = |name: &str, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) && value.is_finite() {
                Ok(())
            } else if high == f32::MAX {
                Err(usage(format!("{name} must be a number of at least {low}, got {value}")))
            } else {
                Err(usage(format!("{name} must be between {low} and {high}, got {value}")))
            }
        };
        range("temperature", params.temperature, 0.0, f32::MAX)?;
        range("top_p", params.top_p, 0.0, 1.0)?;
        range("min_p", params.min_p, 0.0, 1.0)?;
        range("repetition_penalty", params.repetition_penalty, 0.0, f32::MAX)?;
        range("presence_penalty", params.presence_penalty, f32::MIN, f32::MAX)?;
        range("frequency_penalty", params.frequency_penalty, f32::MIN, f32::MAX)?;
        if let Some(xtc) = &params.xtc {
            range("xtc_probability", xtc.probability, 0.0, 1.0)?;
            range("xtc_threshold", xtc.threshold, 0.0, 0.5)?;
        }
        if params.min_tokens_to_keep == 0 {
            return Err(usage("min_tokens_to_keep must be at least 1, got 0".into()));
        }
        if let Some((id, bias)) =
            params.logit_bias.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY)
        {
            return Err(usage(format!(
                "logit_bias of token {id} must be a number or negative infinity, got {bias}"
            )));
        }
        Ok(Self { params, weights: Vec::new(), candidates: Vec::new(), seen: Vec::new() })
    }

    /// The options.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Picks the token at `position` of the sequence.
    ///
    /// `logits` `[vocab]` are changed by biases and penalties; negative infinity marks tokens that may not come.
    /// `history` holds the tokens so far, prompt included. `position` must differ from token to token (the number of
    /// tokens so far does).
    ///
    /// # Errors
    /// No logits, a NaN or positive infinity among them, or no token left to choose; a bias for a token that the
    /// model does not have.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32], position: u64) -> Result<Sampled> {
        self.adjust(logits, history)?;
        let best = checked_argmax(logits)?;
        let wants_logprob = self.params.logprobs || self.params.top_logprobs > 0;
        let greedy = self.params.temperature == 0.0;
        let max = logits[best];
        let mut total = 0.0;
        if wants_logprob || !greedy {
            total = filter::weights(logits, max, &mut self.weights);
        }
        let token = if greedy { best } else { self.pick(logits, max, total, position) };
        let log_total = f64::from(max) + total.ln();
        let logprob = |id: usize| (f64::from(logits[id]) - log_total) as f32;
        let top = filter::top(logits, self.params.top_logprobs);
        Ok(Sampled {
            token: token as u32,
            logprob: wants_logprob.then(|| logprob(token)),
            top: top.into_iter().map(|id| (id, logprob(id as usize))).collect(),
        })
    }

    /// Bias and penalties.
    fn adjust(&mut self, logits: &mut [f32], history: &[u32]) -> Result<()> {
        let vocab = logits.len();
        for &(id, bias) in &self.params.logit_bias {
            match logits.get_mut(id as usize) {
                Some(logit) => *logit += bias,
                None => {
                    return Err(Error::Sampling {
                        message: format!("logit_bias names token {id}, the model has {vocab}"),
                        usage: true,
                    });
                }
            }
        }
        let recent = |context: usize| &history[history.len().saturating_sub(context)..];
        let p = &self.params;
        if p.repetition_penalty != 1.0 && p.repetition_penalty != 0.0 {
            for &id in distinct(&mut self.seen, recent(p.repetition_context)) {
                if let Some(logit) = logits.get_mut(id as usize) {
                    let to = match *logit < 0.0 {
                        true => *logit * p.repetition_penalty,
                        false => *logit / p.repetition_penalty,
                    };
                    change(logit, to, "repetition_penalty", p.repetition_penalty)?;
                }
            }
        }
        if p.presence_penalty != 0.0 {
            for &id in distinct(&mut self.seen, recent(p.presence_context)) {
                if let Some(logit) = logits.get_mut(id as usize) {
                    change(logit, *logit - p.presence_penalty, "presence_penalty", p.presence_penalty)?;
                }
            }
        }
        if p.frequency_penalty != 0.0 {
            for &id in recent(p.frequency_context) {
                if let Some(logit) = logits.get_mut(id as usize) {
                    change(logit, *logit - p.frequency_penalty, "frequency_penalty", p.frequency_penalty)?;
                }
            }
        }
        Ok(())
    }

    /// Filters, then draws. `weights` hold exp(logit - max), `total` their sum.
    fn pick(&mut self, logits: &[f32], max: f32, total: f64, position: u64) -> usize {
        let p = &self.params;
        let mut threshold = f32::NEG_INFINITY;
        if p.top_p > 0.0 && p.top_p < 1.0 {
            threshold = filter::top_p_threshold(logits, &self.weights, max, f64::from(p.top_p) * total);
        }
        if p.min_p > 0.0 {
            let mut floor = max + p.min_p.ln();
            if p.min_tokens_to_keep > 1 {
                floor = floor.min(filter::nth_largest(logits, p.min_tokens_to_keep, &mut self.candidates));
            }
            threshold = threshold.max(floor);
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(
            (0..logits.len() as u32)
                .filter(|&id| logits[id as usize] >= threshold && logits[id as usize] > f32::NEG_INFINITY),
        );
        if let Some(xtc) = &p.xtc
            && xtc.probability > 0.0
            && random::uniform(p.seed, position, random::Stream::Xtc) <= f64::from(xtc.probability)
        {
            filter::exclude_top_choices(candidates, &self.weights, xtc);
        }
        if p.top_k > 0 && p.top_k < candidates.len() {
            filter::keep_largest(candidates, logits, p.top_k);
        }
        let inverse = 1.0 / f64::from(p.temperature);
        let weight = |id: u32| (f64::from(logits[id as usize] - max) * inverse).exp();
        // Drawn in ascending order of ids, in f64: one fixed order of additions.
        let sum: f64 = candidates.iter().map(|&id| weight(id)).sum();
        let mut left = random::uniform(p.seed, position, random::Stream::Token) * sum;
        let mut last = candidates[0];
        for &id in candidates.iter() {
            let w = weight(id);
            if w > 0.0 {
                last = id;
                left -= w;
                if left < 0.0 {
                    break;
                }
            }
        }
        last as usize
    }
}

/// The ids of `recent`, each once.
fn distinct<'a>(seen: &'a mut Vec<u32>, recent: &[u32]) -> &'a [u32] {
    seen.clear();
    seen.extend_from_slice(recent);
    seen.sort_unstable();
    seen.dedup();
    seen
}

/// Puts a penalty on a logit.
///
/// # Errors
/// One so extreme that the logit becomes infinite.
fn change(logit: &mut f32, to: f32, option: &str, value: f32) -> Result<()> {
    if to == f32::INFINITY && logit.is_finite() {
        let message =
            format!("{option} {value:e} makes a logit of {logit} infinite: give a less extreme number");
        return Err(Error::Sampling { message, usage: true });
    }
    *logit = to;
    Ok(())
}

/// The first of the largest logits.
fn checked_argmax(logits: &[f32]) -> Result<usize> {
    let bad = |message: String| Err(Error::Sampling { message, usage: false });
    if logits.is_empty() {
        return bad("expected logits for a vocabulary, got none".into());
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // `max` ignores NaN, a sum does not: with no infinity among the values, only NaN makes it NaN.
    let suspicious = max == f32::INFINITY || logits.iter().map(|&l| l * 0.0).any(f32::is_nan);
    if suspicious && let Some(i) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
        return bad(format!(
            "logit {i} of {} is {}; the model's weights or the computation are broken, nothing can be sampled",
            logits.len(),
            logits[i]
        ));
    }
    if max == f32::NEG_INFINITY {
        return bad(format!(
            "none of the {} tokens is allowed: every logit is negative infinity",
            logits.len()
        ));
    }
    Ok(logits.iter().position(|&l| l == max).expect("the maximum is among the values"))
}

#[cfg(test)]
mod tests;
