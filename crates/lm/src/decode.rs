//! Decoding: a token of each sequence, and what comes after it.

use mica_array::kv::KvSpec;
use mica_array::transforms::is_compile_disabled;
use mica_array::{Array, Precision, Record, Replay, eval};
use mica_nn::Context;

use crate::Result;
use crate::cache::Cache;
use crate::models::{Asked, Input, LanguageModel};

/// Decodes with one model, whose steps are recorded once and run again after that ([`Replay`]).
pub struct Decoder<'a> {
    model: &'a dyn LanguageModel,
    precision: Precision,
    /// A step of so many sequences of such a cache.
    recorded: Option<(usize, KvSpec, Box<Replay>)>,
    /// How often a step may still be recorded that could not be run again.
    tries: usize,
    /// Of the last step, unless it was run again.
    logits: Option<Array>,
}

/// The first step of a model may compute what is kept for all others, and can't be run again then.
const TRIES: usize = 2;

impl<'a> Decoder<'a> {
    /// With `MICA_DISABLE_COMPILE=1` every step is built and planned anew, which gives the same values.
    pub fn new(model: &'a dyn LanguageModel, precision: Precision) -> Decoder<'a> {
        let tries = if is_compile_disabled() { 0 } else { TRIES };
        Decoder { model, precision, recorded: None, tries, logits: None }
    }

    /// Reads one token more of each sequence.
    ///
    /// # Panics
    /// If there are not as many tokens as sequences: a mistake in the calling program.
    pub fn step(&mut self, cache: &mut Cache, tokens: &[u32]) -> Result<()> {
        assert_eq!(tokens.len(), cache.batch(), "a token of each sequence");
        cache.reserve(1)?;
        self.logits = None;
        if !self.run_again(cache, tokens)? {
            self.run(cache, tokens)?;
        }
        cache.advance(1);
        Ok(())
    }

    /// Whether steps like the last one are run again from now on.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// Reads the logits of the last step: of each sequence as many as the vocabulary has entries. Before the first step
    /// there are none.
    pub fn read_logits(&self, into: &mut Vec<f32>) -> Result<()> {
        match (&self.logits, &self.recorded) {
            (Some(logits), _) => logits.read(into)?,
            (None, Some((.., replay))) => replay.read(0, into)?,
            (None, None) => into.clear(),
        }
        Ok(())
    }

    fn run_again(&mut self, cache: &mut Cache, tokens: &[u32]) -> Result<bool> {
        // Put back if it ran.
        let Some((batch, spec, mut replay)) = self.recorded.take() else { return Ok(false) };
        let inputs = inputs(cache, tokens)?;
        let fits = batch == tokens.len() && spec == *cache.kv.spec() && inputs.len() == replay.inputs();
        if !fits || !replay.run(&inputs, Some(&cache.kv))? {
            return Ok(false);
        }
        for (index, state) in cache.conv.iter_mut().enumerate() {
            *state = Some(replay.output(1 + index)?);
        }
        self.recorded = Some((batch, spec, replay));
        Ok(true)
    }

    fn run(&mut self, cache: &mut Cache, tokens: &[u32]) -> Result<()> {
        let (spec, context) = (cache.kv.spec().clone(), Context::new(self.precision));
        let before = cache.conv.clone();
        let may_record = self.tries > 0 && before.iter().all(Option::is_some);
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
            true => Replay::record(inputs, build),
            false => build(&inputs).and_then(|(outputs, pending)| {
                // The cache first: what a layer attended goes with it, in the order of the layers.
                let roots: Vec<Array> = pending.iter().chain(&outputs).cloned().collect();
                eval(&roots).map(|()| Record::Once(outputs))
            }),
        };
        match result {
            Ok(Record::Again(replay)) => {
                for (index, state) in cache.conv.iter_mut().enumerate() {
                    *state = Some(replay.output(1 + index)?);
                }
                self.recorded = Some((tokens.len(), spec, replay));
            }
            Ok(Record::Once(outputs)) => {
                self.tries -= usize::from(may_record);
                let mut outputs = outputs.into_iter();
                self.logits = outputs.next();
                cache.conv.iter_mut().for_each(|state| *state = outputs.next());
            }
            Err(error) => {
                cache.conv = before;
                return Err(error.into());
            }
        }
        Ok(())
    }
}

/// Of a step: tokens and positions [batch, 1], and the states of convolutions before it.
fn inputs(cache: &Cache, tokens: &[u32]) -> Result<Vec<Array>> {
    let rows: Vec<&[u32]> = tokens.chunks(1).collect();
    let Input { tokens, positions, .. } = Input::new(&rows, &vec![cache.length(); rows.len()])?;
    Ok([tokens, positions].into_iter().chain(cache.conv.iter().flatten().cloned()).collect())
}
