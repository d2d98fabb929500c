//! What is minimised: one file for each method, which says what the loss of a batch is, and nothing else.
//!
//! A method gives the *sum* of the loss over a batch's targets. The trainer adds up micro-batches and divides by
//! the targets of the whole window, so that a token weighs the same wherever it stands.

pub mod sft;

use std::ops::Range;

use mica_array::Array;
use mica_lm::models::{Asked, Input, LanguageModel};
use mica_nn::Context;

use crate::data::batch::Batch;

/// A training method.
pub trait Method: Send + Sync {
    /// The summed loss of a batch over its `labelled` targets, an f32 number; the batch has at least one.
    ///
    /// The blocks in `recompute` are computed again in the backward pass, to save memory.
    fn loss(
        &self,
        model: &dyn LanguageModel,
        batch: &Batch,
        recompute: Range<usize>,
        context: &Context,
    ) -> mica_array::Result<Array>;
}

/// A batch as a model's input.
pub fn input(batch: &Batch, recompute: Range<usize>) -> mica_array::Result<Input> {
    let shape = [batch.rows, batch.length];
    let i32s = |values: &[u32]| values.iter().map(|&value| value as i32).collect::<Vec<i32>>();
    // Plain rows need no isolation: padding comes after the sample, where no target looks.
    let key_start =
        if batch.is_plain() { None } else { Some(Array::from_slice(&key_starts(batch), &shape)?) };
    Ok(Input {
        tokens: Array::from_slice(&i32s(&batch.tokens), &shape)?,
        positions: Array::from_slice(&i32s(&batch.positions), &shape)?,
        key_start,
        checkpoint: recompute,
        asked: Asked::All,
    })
}

/// For each position of a packed batch, the place in its row where its own sample begins; padding is a
/// sample of its own.
fn key_starts(batch: &Batch) -> Vec<i32> {
    let mut starts = vec![0; batch.rows * batch.length];
    for (row, segments) in starts.chunks_mut(batch.length.max(1)).zip(&batch.segments) {
        let end = segments.iter().map(|segment| segment.end).max().unwrap_or(0);
        row[end..].fill(end as i32);
        for segment in segments {
            row[segment.clone()].fill(segment.start as i32);
        }
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_row_begin_where_they_begin() {
        let batch =
            Batch { rows: 2, length: 6, segments: vec![vec![0..2, 2..5], vec![0..6]], ..Batch::default() };
        assert_eq!(key_starts(&batch), [0, 0, 2, 2, 2, 5, 0, 0, 0, 0, 0, 0]);
    }
}
