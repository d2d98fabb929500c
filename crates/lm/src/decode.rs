//! Decoding: a token of each sequence, and what comes after it.

use mica_array::kv::KvSpec;
use mica_array::transforms::is_compile_disabled;
use mica_array::{Array, Precision, Record, Replay, eval};
use mica_nn::Context;

use crate::Result;
use crate::cache::Cache;
use crate::generate::check_vocabulary;
use crate::models::{Asked, Input, LanguageModel};

/// Decodes with one model, whose steps are recorded once and run again after that ([`Replay`]).
pub struct Decoder<'a> {
    model: &'a dyn LanguageModel,
    precision: Precision,
    /// A step of so many sequences of such a cache.
    recorded: Option<(usize, KvSpec, Box<Replay>)>,
    /// How many steps may still turn out not to be the decoder's alone.
    tries: usize,
    /// Of the last step, unless it was recorded.
    logits: Vec<f32>,
}

/// Steps that others have something of: the first one of a model may compute what the model keeps.
const TRIES: usize = 2;

impl<'a> Decoder<'a> {
    /// With `MICA_DISABLE_COMPILE=1` every step is built and planned anew, which gives the same values.
    pub fn new(model: &'a dyn LanguageModel, precision: Precision) -> Decoder<'a> {
        let tries = if is_compile_disabled() { 0 } else { TRIES };
        Decoder { model, precision, recorded: None, tries, logits: Vec::new() }
    }

    /// Reads one token more of each sequence.
    ///
    /// # Errors
    /// A token outside of the vocabulary, too little memory. The cache has not advanced then.
    ///
    /// # Panics
    /// If there are not as many tokens as sequences: a mistake in the calling program.
    pub fn step(&mut self, cache: &mut Cache, tokens: &[u32]) -> Result<()> {
        assert_eq!(tokens.len(), cache.batch(), "a token of each sequence");
        check_vocabulary(self.model, tokens)?;
        cache.reserve(1)?;
        if !self.run_again(cache, tokens)? {
            cache.attempt(|cache| self.run(cache, tokens))?;
        }
        cache.advance(1);
        Ok(())
    }

    /// Whether steps like the last one are run again from now on.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// The logits of the last step, of each sequence as many as the vocabulary has entries, for the caller to change. Before
    /// the first step, and after one that failed as it was computed, there are none.
    pub fn logits(&mut self) -> Result<&mut [f32]> {
        match &mut self.recorded {
            Some((.., replay)) => Ok(replay.values(0)?),
            None => Ok(&mut self.logits),
        }
    }

    fn run_again(&mut self, cache: &mut Cache, tokens: &[u32]) -> Result<bool> {
        self.logits.clear();
        // Put back if it ran.
        let Some((batch, spec, mut replay)) = self.recorded.take() else { return Ok(false) };
        let inputs = inputs(cache, tokens)?;
        let fits = batch == tokens.len() && spec == *cache.kv.spec() && inputs.len() == replay.inputs();
        if !fits || !replay.run(&inputs, Some(&cache.kv))? {
            return Ok(false);
        }
        cache.conv = states(&replay, cache.conv.len())?;
        self.recorded = Some((batch, spec, replay));
        Ok(true)
    }

    fn run(&mut self, cache: &mut Cache, tokens: &[u32]) -> Result<()> {
        let (spec, context) = (cache.kv.spec().clone(), Context::new(self.precision));
        let convolutions = cache.conv.len();
        let may_record = self.tries > 0 && cache.conv.iter().all(Option::is_some);
        let mut inputs = inputs(cache, tokens)?;
        if may_record {
            // Of the replay alone: forks of the cache may have the states too.
            for state in &mut inputs[2..] {
                *state =
                    state.with_bytes(|bytes| Array::from_bytes(bytes, state.shape(), state.dtype()))??;
            }
        }
        // The logits, the states of convolutions after the step, and what is pending of the rest.
        let mut build = |inputs: &[Array]| -> mica_array::Result<(Vec<Array>, Vec<Array>)> {
            let (tokens, positions) = (inputs[0].clone(), inputs[1].clone());
            let input = Input { tokens, positions, asked: Asked::Last, key_start: None, checkpoint: 0..0 };
            for (state, given) in cache.conv.iter_mut().filter(|state| state.is_some()).zip(&inputs[2..]) {
                *state = Some(given.clone());
            }
            let mut outputs = vec![self.model.logits(&input, Some(cache), &context)?];
            // Views, which let go of what came with them.
            for state in cache.conv.iter_mut().filter_map(Option::take) {
                outputs.push(state.stop_gradient()?);
            }
            Ok((outputs, cache.kv.pending()))
        };
        let result = match may_record {
            true => Replay::record(inputs, build).inspect(|record| {
                self.tries -= usize::from(matches!(record, Record::Shared(_)));
            }),
            false => build(&inputs).and_then(|(outputs, pending)| {
                // The cache first: what a layer attended goes with it, in the order of the layers.
                let roots: Vec<Array> = pending.iter().chain(&outputs).cloned().collect();
                eval(&roots).map(|()| Record::Once(outputs))
            }),
        };
        cache.conv = match result? {
            Record::Again(replay) => {
                let states = states(&replay, convolutions)?;
                self.recorded = Some((tokens.len(), spec, replay));
                states
            }
            Record::Shared(mut outputs) | Record::Once(mut outputs) => {
                let states = outputs.split_off(1);
                self.logits = outputs[0].to_vec()?;
                states.into_iter().map(Some).collect()
            }
        };
        Ok(())
    }
}

/// The states of so many convolutions after a step.
fn states(replay: &Replay, count: usize) -> mica_array::Result<Vec<Option<Array>>> {
    (0..count).map(|index| replay.output(1 + index).map(Some)).collect()
}

/// Of a step: tokens and positions [batch, 1], and the states of convolutions before it.
fn inputs(cache: &Cache, tokens: &[u32]) -> Result<Vec<Array>> {
    let rows: Vec<&[u32]> = tokens.chunks(1).collect();
    let Input { tokens, positions, .. } = Input::new(&rows, &vec![cache.length(); rows.len()])?;
    Ok([tokens, positions].into_iter().chain(cache.conv.iter().flatten().cloned()).collect())
}
