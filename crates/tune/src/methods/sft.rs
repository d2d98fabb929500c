//! Supervised fine-tuning and continued pretraining: −log p of every target.
//!
//! The two differ only in which tokens are targets, and that is the data's business. The output head is
//! applied to the labelled positions alone (what is called a sparse loss elsewhere, and exact), and logits are
//! never stored.

use std::ops::Range;

use mica_array::Array;
use mica_array::op::CrossEntropySpec;
use mica_lm::models::LanguageModel;
use mica_nn::Context;

use super::{Method, input};
use crate::data::batch::{Batch, IGNORE};

/// The negative log-likelihood of the targets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sft;

impl Method for Sft {
    fn loss(
        &self,
        model: &dyn LanguageModel,
        batch: &Batch,
        recompute: Range<usize>,
        context: &Context,
    ) -> mica_array::Result<Array> {
        let hidden = model.hidden(&input(batch, recompute)?, None, context)?;
        let (rows, targets): (Vec<i32>, Vec<i32>) = (0i32..)
            .zip(&batch.targets)
            .filter(|(_, target)| **target != IGNORE)
            .map(|(row, &target)| (row, target))
            .unzip();
        let count = [rows.len()];
        let flat = hidden.reshape(&[-1, hidden.dim(-1) as i64])?;
        let labelled = flat.take(&Array::from_slice(&rows, &count)?, 0)?;
        let targets = Array::from_slice(&targets, &count)?;
        let spec = CrossEntropySpec { precision: context.precision, softcap: None };
        Ok(labelled.linear_cross_entropy(model.head(), &targets, spec)?.0)
    }
}
