//! Computations that are run again on other values, without a graph: the steps of decoding.
//!
//! Building and planning a graph costs as much for one row of numbers as for a thousand. A step that computes little,
//! thousands of times over, is recorded once and run again after that: the same tasks on the same memory, where only
//! the inputs are others, and the places of keys and values in a [`KvCache`].

use std::sync::Arc;

use crate::eval::{self, Outcome, Recorded};
use crate::kv::KvCache;
use crate::{Array, Element, Error, Result};

/// A computation that can be run again.
///
/// It owns all memory that it writes. That is why it takes the inputs, and gives values of the outputs.
pub struct Replay {
    inputs: Vec<Array>,
    outputs: Vec<Array>,
    /// Until a run fails.
    recorded: Option<Recorded>,
}

/// What [`Replay::record`] gives. The computation has run in either case.
pub enum Record {
    /// It can be run again.
    Again(Box<Replay>),
    /// It can't, since others have what it writes. Its outputs.
    Shared(Vec<Array>),
    /// It was not kept this time: ops are being profiled or checked for NaNs, there is little memory, it has too many
    /// steps, the backend can't. Its outputs.
    Once(Vec<Array>),
}

impl Replay {
    /// Computes what `build` makes of the inputs: outputs and, of a [`KvCache`] that it attends over, what is pending.
    ///
    /// To be run again it may depend on the values of the inputs by ops alone, and must keep no handle on the inputs,
    /// the outputs or anything else that is computed from them; all calls that attend must be of the same positions,
    /// in each layer one.
    ///
    /// # Errors
    /// Those of `build`, and of [`eval`](crate::eval).
    pub fn record(
        inputs: Vec<Array>,
        build: impl FnOnce(&[Array]) -> Result<(Vec<Array>, Vec<Array>)>,
    ) -> Result<Record> {
        let (outputs, pending) = build(&inputs)?;
        Ok(match eval::record(&inputs, &outputs, &pending)? {
            Outcome::Kept(recorded) => {
                Record::Again(Box::new(Replay { inputs, outputs, recorded: Some(recorded) }))
            }
            Outcome::Shared => Record::Shared(outputs),
            Outcome::NotKept => Record::Once(outputs),
        })
    }

    /// Computes the same of other values and, if it attends, of this cache, to which it appends what the recorded call
    /// appended to its own. Whether it did: that it can't any more, because the number of threads has changed, ops are
    /// profiled, or the last run failed, is no error.
    ///
    /// # Errors
    /// Values of another number, shape or dtype than the inputs; no cache, one of another kind, or one without room;
    /// and those of [`eval`](crate::eval).
    pub fn run(&mut self, values: &[Array], cache: Option<&KvCache>) -> Result<bool> {
        let fits = |(input, values): (&Array, &Array)| {
            input.dtype() == values.dtype() && input.shape() == values.shape()
        };
        if values.len() != self.inputs.len() || !self.inputs.iter().zip(values).all(fits) {
            let list = |arrays: &[Array]| -> Vec<String> {
                arrays.iter().map(|array| format!("{}{:?}", array.dtype(), array.shape())).collect()
            };
            let (needed, got) = (list(&self.inputs).join(", "), list(values).join(", "));
            return Err(Error::invalid("replay", format!("needs values for {needed}, got {got}")));
        }
        eval::eval(values)?;
        let Some(recorded) = &mut self.recorded else { return Ok(false) };
        let sequences = match (&recorded.attended, cache) {
            (None, _) => Arc::new([]),
            (Some(attended), Some(cache))
                if *cache.spec() == attended.kv && cache.batch() == attended.batch =>
            {
                // What other calls have appended is read.
                eval::eval(&cache.pending())?;
                cache.tables(attended.length)?
            }
            (Some(attended), cache) => {
                let got = cache.map(|cache| (cache.batch(), cache.spec()));
                let expected = (attended.batch, &attended.kv);
                return Err(Error::invalid("replay", format!("needs a cache of {expected:?}, got {got:?}")));
            }
        };
        for (input, values) in self.inputs.iter().zip(values) {
            let buffer = eval::own_buffer(input).expect("what was recorded has inputs of its own");
            // SAFETY: the buffer holds an array of this size, which nobody else has; the last run is over, and so is
            // what else reads it.
            values.with_bytes(|bytes| unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.pointer(), bytes.len());
            })?;
        }
        let result = eval::run_again(recorded, &sequences);
        if result.is_err() {
            // Some of the outputs are new, and tasks may have stopped half-way.
            self.recorded = None;
        }
        result
    }

    /// How many inputs there are.
    pub fn inputs(&self) -> usize {
        self.inputs.len()
    }

    /// The values of an output, for the caller to change until the next run.
    ///
    /// # Errors
    /// If the dtype is not `T`'s, or the last run failed.
    pub fn values<T: Element>(&mut self, output: usize) -> Result<&mut [T]> {
        let array = self.array(output)?;
        if array.dtype() != T::DTYPE {
            let message = format!("output {output} is {}, asked for {}", array.dtype(), T::DTYPE);
            return Err(Error::invalid("replay", message));
        }
        let buffer = eval::own_buffer(array).expect("what was recorded has outputs of its own");
        // SAFETY: the buffer holds an array of this type and size, which nobody else has while the replay is borrowed.
        Ok(unsafe { std::slice::from_raw_parts_mut(buffer.pointer().cast::<T>(), array.size()) })
    }

    fn array(&self, output: usize) -> Result<&Array> {
        match self.recorded {
            Some(_) => Ok(&self.outputs[output]),
            None => Err(Error::invalid("replay", "the last run failed, so there are no outputs")),
        }
    }

    /// A copy of an output.
    ///
    /// # Errors
    /// If the last run failed, or there is no memory for it.
    pub fn output(&self, output: usize) -> Result<Array> {
        let array = self.array(output)?;
        array.with_bytes(|bytes| Array::from_bytes(bytes, array.shape(), array.dtype()))?
    }
}
