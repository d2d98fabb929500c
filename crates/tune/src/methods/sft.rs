//! Supervised fine-tuning and continued pretraining: −log p of every target.
//!
//! The two differ only in which tokens are targets, and that is the data's business. The output head, and of
//! the last block what follows its attention, are applied to the labelled positions alone (what is called a
//! sparse loss elsewhere, and exact), and logits are never stored.

use std::ops::Range;

use mica_array::Array;
use mica_array::op::CrossEntropySpec;
use mica_lm::models::{Asked, Input, LanguageModel};
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
        let (positions, targets): (Vec<i32>, Vec<i32>) = (0i32..)
            .zip(&batch.targets)
            .filter(|(_, target)| **target != IGNORE)
            .map(|(position, &target)| (position, target))
            .unzip();
        let count = [positions.len()];
        let asked = match positions.len() < batch.targets.len() {
            true => Asked::These(Array::from_slice(&positions, &count)?),
            false => Asked::All,
        };
        let hidden = model.hidden(&Input { asked, ..input(batch, recompute)? }, None, context)?;
        let labelled = hidden.flatten_axes(0, 1)?;
        let targets = Array::from_slice(&targets, &count)?;
        let spec = CrossEntropySpec { precision: context.precision, softcap: None };
        Ok(labelled.linear_cross_entropy(model.head(), &targets, spec)?.0)
    }
}
