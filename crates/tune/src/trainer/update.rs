//! One optimizer step: gradients of a window of micro-batches, clipping, and the new parameters.

use mica_array::{Array, Dtype, Precision, memory, random};
use mica_lm::models::LanguageModel;
use mica_nn::optim::{AdamWConfig, FusedAdamW};
use mica_nn::{Context, Item, ItemMut, Module, gradients, parameters, set_parameters};

use crate::adapters::attach::block_of;
use crate::data::batch::Batch;
use crate::methods::Method;
use crate::rng::Rng;
use crate::{Error, Result};

/// Names the random stream from which dropout draws.
const DROPOUT: u64 = 0x6472_6f70;

/// How gradients are formed and applied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateSettings {
    /// The optimizer's numbers, all but the learning rate.
    pub optimizer: AdamWConfig,
    /// Gradients are scaled down to this global norm.
    pub clip: Option<f64>,
    /// Of products: exact for f32 models, bf16 for bf16 models.
    pub precision: Precision,
    /// How many blocks compute their activations again in the backward pass, which saves memory and changes no bit:
    /// from the lowest that trains on, whose values would be kept for longest. `usize::MAX` is all.
    pub recompute: usize,
    /// Where dropout starts.
    pub seed: u64,
}

/// The optimizer with the parameters that it moves.
#[derive(Debug)]
pub struct Update {
    /// Last layer first: the order in which gradients come into being, so that each is consumed at once.
    names: Vec<String>,
    /// The lowest block that a gradient goes through; those below keep nothing for the backward pass.
    lowest: usize,
    settings: UpdateSettings,
    optimizer: FusedAdamW,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stepped {
    /// Mean loss over the window's targets, before the step.
    pub loss: f64,
    /// The window's targets.
    pub tokens: u64,
    /// Norm of the mean gradient, before clipping.
    pub grad_norm: f64,
}

/// The parameter tree of a model, for functions that want one.
struct Tree<'a>(&'a mut dyn LanguageModel);

impl Module for Tree<'_> {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        self.0.as_module().visit(name, see);
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        self.0.as_module_mut().visit_mut(name, see);
    }
}

impl Update {
    /// Moves the parameters called `names`, each of which the model has.
    pub fn new(model: &dyn LanguageModel, names: &[String], settings: UpdateSettings) -> Result<Update> {
        let wanted: std::collections::HashSet<&String> = names.iter().collect();
        let ordered: Vec<String> = parameters(model.as_module())
            .into_iter()
            .map(|(name, _)| name)
            .filter(|name| wanted.contains(name))
            .rev()
            .collect();
        if ordered.len() != wanted.len() || ordered.is_empty() {
            return Err(Error::Config(format!(
                "{} parameters were to be trained, the model has {} of them",
                wanted.len(),
                ordered.len()
            )));
        }
        // What is in no block may stand below all of them, as the embedding does.
        let lowest = ordered.iter().map(|name| block_of(name).unwrap_or(0)).min().unwrap_or(0);
        Ok(Update { names: ordered, lowest, settings, optimizer: FusedAdamW::new(settings.optimizer) })
    }

    /// The names of the trained parameters, last layer first.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How many blocks keep activations for the backward pass, unless they are recomputed.
    pub fn blocks(&self, model: &dyn LanguageModel) -> usize {
        model.layers().saturating_sub(self.lowest)
    }

    /// Changes [`UpdateSettings::recompute`].
    pub fn set_recompute(&mut self, blocks: usize) {
        self.settings.recompute = blocks;
    }

    /// The optimizer, whose state a checkpoint holds.
    pub fn optimizer(&self) -> &FusedAdamW {
        &self.optimizer
    }

    /// The optimizer, to restore it.
    pub fn optimizer_mut(&mut self) -> &mut FusedAdamW {
        &mut self.optimizer
    }

    /// The trained parameters as they are now.
    pub fn parameters(&self, model: &dyn LanguageModel) -> Vec<(String, Array)> {
        let mut all: std::collections::HashMap<String, Array> =
            parameters(model.as_module()).into_iter().collect();
        let taken = self.names.iter().filter_map(|name| all.remove_entry(name));
        taken.collect()
    }

    /// The summed loss of a micro-batch and the gradients of the parameters, lazily.
    pub fn gradients(
        &self,
        model: &mut dyn LanguageModel,
        method: &dyn Method,
        batch: &Batch,
        micro: u64,
    ) -> Result<(Array, Vec<Array>)> {
        let key = random::key(Rng::new(self.settings.seed, &[DROPOUT, micro]).next_u64())?;
        let context = Context::training(self.settings.precision, key);
        let recompute = self.lowest..self.lowest.saturating_add(self.settings.recompute);
        let grads = gradients(&mut Tree(model), &self.names, |tree| {
            Ok(vec![method.loss(&*tree.0, batch, recompute, &context)?])
        })?;
        let loss = grads.value.into_iter().next().expect("one output was given");
        Ok((loss, grads.grads))
    }

    /// Takes a step over a window of micro-batches, of which at least one has a target. `micro` is the number of
    /// its first micro-batch since the beginning of the run.
    ///
    /// With clipping, a loss or norm that is not a number leaves everything as it was; the caller looks at the
    /// result. Without clipping the update is computed together with the gradients, so that each gradient is
    /// gone as soon as it was used.
    pub fn step(
        &mut self,
        model: &mut dyn LanguageModel,
        method: &dyn Method,
        window: &[Batch],
        micro: u64,
        lr: f64,
    ) -> Result<Stepped> {
        self.take(model, method, window, micro, lr, stepped)
    }

    /// How many bytes beyond those held now steps over such a window take, found by planning two of them without
    /// computing anything ([`memory::rehearse`]). Model and optimizer stay as they are.
    pub fn rehearse(
        &self,
        model: &mut dyn LanguageModel,
        method: &dyn Method,
        window: &[Batch],
    ) -> Result<u64> {
        let before = self.parameters(model);
        // What is still to be computed of the model must not be found computed, without values, afterwards.
        let all: Vec<Array> = parameters(model.as_module()).into_iter().map(|(_, array)| array).collect();
        mica_array::eval(&all)?;
        drop(all);
        let mut twin = Update {
            names: self.names.clone(),
            lowest: self.lowest,
            settings: self.settings,
            optimizer: FusedAdamW::new(self.settings.optimizer),
        };
        let unread = |_: &[Array], _: &[Array], tokens| Ok(Stepped { tokens, ..Stepped::default() });
        let (result, rehearsal) = memory::rehearse(|| {
            let mut result = twin.take(model, method, window, 0, 0.0, unread);
            if result.is_ok() {
                // From the second step on there are moments, and the old parameters are gone.
                memory::reset_rehearsed_peak();
                result = twin.take(model, method, window, 0, 0.0, unread);
            }
            set_parameters(model.as_module_mut(), &before)?;
            drop(twin);
            result
        });
        result?;
        // The second step's parameters take the place of those that are held now.
        let replaced: usize = before.iter().map(|(_, array)| array.size() * array.dtype().size()).sum();
        Ok(rehearsal.bytes.saturating_sub(replaced as u64))
    }

    fn take(
        &mut self,
        model: &mut dyn LanguageModel,
        method: &dyn Method,
        window: &[Batch],
        micro: u64,
        lr: f64,
        read: impl Fn(&[Array], &[Array], u64) -> Result<Stepped>,
    ) -> Result<Stepped> {
        let tokens: u64 = window.iter().map(|batch| batch.labelled as u64).sum();
        let live: Vec<(u64, &Batch)> =
            (micro..).zip(window).filter(|(_, batch)| batch.labelled > 0).collect();
        let (mut losses, mut sums): (Vec<Array>, Option<Vec<Array>>) = (Vec::new(), None);
        for (number, batch) in &live {
            let (loss, grads) = self.gradients(model, method, batch, *number)?;
            sums = Some(match sums.take() {
                None if live.len() == 1 => grads,
                // Several micro-batches are summed in f32 whatever the parameters are.
                None => grads.iter().map(|grad| grad.astype(Dtype::F32)).collect::<Result<_, _>>()?,
                Some(before) => before
                    .into_iter()
                    .zip(&grads)
                    .map(|(sum, grad)| sum.add(grad.astype(Dtype::F32)?))
                    .collect::<Result<_, _>>()?,
            });
            losses.push(loss);
            if live.len() > 1 {
                // Now, or the graphs of all micro-batches would be held until the end.
                compute(sums.as_deref(), losses.last())?;
            }
        }
        let grads = sums.ok_or_else(|| Error::Config("a window without a target has no gradient".into()))?;
        let squares = grads
            .iter()
            .map(|grad| grad.astype(Dtype::F32)?.square()?.sum(&[], false))
            .collect::<mica_array::Result<Vec<Array>>>()?;
        let scale = 1.0 / tokens as f64;
        if self.settings.clip.is_none() {
            let updated = self.update(model, grads, lr, scale)?;
            let mut roots: Vec<Array> =
                squares.iter().zip(updated).flat_map(|(square, new)| [square.clone(), new]).collect();
            roots.extend(losses.iter().cloned());
            mica_array::eval(&roots)?;
            return read(&losses, &squares, tokens);
        }
        let roots: Vec<Array> = grads
            .iter()
            .zip(&squares)
            .flat_map(|(grad, square)| [square.clone(), grad.clone()])
            .chain(losses.iter().cloned())
            .collect();
        mica_array::eval(&roots)?;
        drop(roots);
        let result = read(&losses, &squares, tokens)?;
        if result.loss.is_finite() && result.grad_norm.is_finite() {
            let clip = self.settings.clip.map_or(1.0, |limit| (limit / (result.grad_norm + 1e-6)).min(1.0));
            let updated = self.update(model, grads, lr, scale * clip)?;
            mica_array::eval(&updated)?;
        }
        Ok(result)
    }

    /// Puts the new parameters on the model, not yet computed. The old ones are held only by the graph.
    fn update(
        &mut self,
        model: &mut dyn LanguageModel,
        grads: Vec<Array>,
        lr: f64,
        scale: f64,
    ) -> Result<Vec<Array>> {
        let before = self.parameters(model);
        let updated = self.optimizer.step(&before, &grads, lr as f32, scale as f32)?;
        let named: Vec<(String, Array)> = self.names.iter().cloned().zip(updated.iter().cloned()).collect();
        set_parameters(model.as_module_mut(), &named)?;
        Ok(updated)
    }
}

/// Computes the sums so far and the loss.
fn compute(sums: Option<&[Array]>, loss: Option<&Array>) -> Result<()> {
    let roots: Vec<Array> = sums.into_iter().flatten().chain(loss).cloned().collect();
    Ok(mica_array::eval(&roots)?)
}

fn stepped(losses: &[Array], squares: &[Array], tokens: u64) -> Result<Stepped> {
    let sum = |arrays: &[Array]| -> Result<f64> {
        let mut sum = 0.0;
        for array in arrays {
            sum += f64::from(array.item::<f32>()?);
        }
        Ok(sum)
    };
    let tokens_f = tokens as f64;
    Ok(Stepped { loss: sum(losses)? / tokens_f, tokens, grad_norm: sum(squares)?.sqrt() / tokens_f })
}

/// The mean loss over the targets of some batches, with the targets; nothing is drawn at random.
pub fn evaluate(
    model: &dyn LanguageModel,
    method: &dyn Method,
    precision: Precision,
    mut next: impl FnMut() -> Result<Option<Batch>>,
) -> Result<(f64, u64)> {
    let context = Context::new(precision);
    let (mut sum, mut tokens) = (0.0, 0u64);
    while let Some(batch) = next()? {
        if batch.labelled > 0 {
            sum += f64::from(method.loss(model, &batch, 0..0, &context)?.item::<f32>()?);
            tokens += batch.labelled as u64;
        }
    }
    Ok((sum / tokens as f64, tokens))
}
