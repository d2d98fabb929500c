//! How steps are made to fit in memory: the rows that are computed at once, and the blocks that are recomputed.
//!
//! Nothing here knows what a model takes: steps over the largest batch that the data will give are rehearsed
//! ([`Update::rehearse`]) until one fits. Fewer rows at once come first, since they cost next to no time. Where
//! even the fewest are too many, blocks compute their activations again in the backward pass: as few as it takes,
//! since each costs one more of its forward passes.

use std::sync::Arc;

use mica_array::memory::{self, Bound, Room};
use mica_lm::memory::size as memory_size;
use mica_lm::models::LanguageModel;

use crate::config::{Duration, FineTune, RunConfig};
use crate::data::batch::{Batch, Shape};
use crate::data::loader::{Loader, Options};
use crate::data::samples::Samples;
use crate::events::{Event, Observer};
use crate::methods::sft::Sft;
use crate::trainer::Update;
use crate::{Error, Result};

/// Positions that are computed at once where the settings leave it open. Their activations take some 50 bytes a
/// position, layer and unit of width with bf16 products (twice as many with exact ones), so this is 0.1 GB a layer at
/// a width of 1,024.
const POSITIONS: usize = 2048;

/// What running takes beside arrays: pages of the program's code, scratch memory of its threads, batches made ahead.
/// Measured on x86-64 with 2 threads and short rows, where it was 6 to 11 MB with all models. With a row of 2,048 tokens
/// of Qwen3-0.6B in 4 bits it was 30 MB, with 8 threads 34, so such estimates are low by as much.
pub const BESIDES: u64 = 11_000_000;

/// How steps are taken so that they fit in memory.
pub(super) struct Fitting {
    /// Rows of a micro-batch.
    pub(super) micro: usize,
    /// Blocks to recompute.
    pub(super) recompute: usize,
    pub(super) loader: Loader,
    pub(super) options: Options,
}

/// Finds the micro-batch, the given one or the largest that fits, and how many blocks must be recomputed for it.
///
/// # Errors
/// [`Error::Memory`] if none fits, with what would.
pub(super) fn fitting(
    config: &RunConfig,
    samples: &Arc<dyn Samples>,
    model: &mut dyn LanguageModel,
    mut update: Update,
    observer: &mut dyn Observer,
) -> Result<Fitting> {
    let asked = micro_batch(config);
    // What was given is not changed.
    let smallest = if config.micro_batch_size.is_some() { asked } else { 1 };
    let blocks = update.blocks(model);
    let forced = if config.grad_checkpoint { blocks } else { 0 };
    update.set_recompute(forced);
    let mut tight = None;
    for micro in (smallest..=asked).rev().filter(|rows| config.batch_size.is_multiple_of(*rows)) {
        let trial = Trial::new(config, samples, micro)?;
        let step = trial.rehearse(model, &update)?;
        if step.lacking.is_none() {
            tell_rows(micro, asked, observer);
            tell_peak(step.peak(), observer);
            return trial.fits(samples, forced);
        }
        tight = Some((trial, step));
    }
    let Some((trial, kept)) = tight else {
        return Err(Error::Config(format!("batch_size {} has no micro-batch", config.batch_size)));
    };
    let (mut enough, mut step) = (blocks, kept);
    if forced < blocks {
        update.set_recompute(blocks);
        step = trial.rehearse(model, &update)?;
    }
    if step.lacking.is_some() && forced + 1 < blocks {
        // Computing the last block again right after it was computed may take more than it saves.
        update.set_recompute(blocks - 1);
        let tried = trial.rehearse(model, &update)?;
        if tried.needed < step.needed {
            (enough, step) = (blocks - 1, tried);
        }
    }
    if let Some(room) = step.lacking {
        return Err(Error::Memory(too_little(config, &trial, [kept.needed, step.needed], room)));
    }
    let mut too_few = forced;
    while too_few + 1 < enough {
        let middle = too_few.midpoint(enough);
        update.set_recompute(middle);
        let tried = trial.rehearse(model, &update)?;
        match tried.lacking {
            None => (enough, step) = (middle, tried),
            Some(_) => too_few = middle,
        }
    }
    tell_rows(trial.micro, asked, observer);
    let text = format!(
        "Recomputing the activations of {enough} of {blocks} blocks: otherwise the peak would be {:.3} GB",
        kept.peak() as f64 / 1e9
    );
    observer.event(&Event::Note { warning: false, text });
    tell_peak(step.peak(), observer);
    trial.fits(samples, enough)
}

/// Steps with micro-batches of so many rows.
struct Trial {
    micro: usize,
    options: Options,
    /// The largest batches of a step.
    window: Vec<Batch>,
    /// Bytes of all batches of a step, which are there before it begins.
    batches: u64,
}

/// What a step was found to take.
#[derive(Clone, Copy)]
struct Rehearsed {
    /// Bytes of the process that were in memory before.
    before: u64,
    /// Bytes beyond those.
    needed: u64,
    /// What is left, if that is not enough.
    lacking: Option<Room>,
}

impl Rehearsed {
    fn peak(&self) -> u64 {
        self.before + self.needed
    }
}

impl Trial {
    fn new(config: &RunConfig, samples: &Arc<dyn Samples>, micro: usize) -> Result<Trial> {
        let options = loader_options(config, micro);
        let batch = Loader::new(samples.clone(), options.clone())?
            .largest_batch()?
            .ok_or_else(|| Error::NothingToLearn("the data gives no batch".into()))?;
        let accumulate = config.accumulate(micro);
        let batches = accumulate.saturating_mul(batch.bytes()) as u64;
        // All micro-batches after the first of a window take the same.
        let window = vec![batch; accumulate.clamp(1, 2)];
        Ok(Trial { micro, options, window, batches })
    }

    fn rehearse(&self, model: &mut dyn LanguageModel, update: &Update) -> Result<Rehearsed> {
        let learns = self.window[0].labelled > 0;
        let needed = if learns { update.rehearse(model, &Sft, &self.window)? } else { 0 };
        let needed = needed + self.batches + BESIDES;
        memory::clear_cache();
        let (before, room) = (memory::resident().unwrap_or(0), memory::room());
        Ok(Rehearsed { before, needed, lacking: room.filter(|room| room.bytes < needed) })
    }

    fn fits(self, samples: &Arc<dyn Samples>, recompute: usize) -> Result<Fitting> {
        let loader = Loader::new(samples.clone(), self.options.clone())?;
        Ok(Fitting { micro: self.micro, recompute, loader, options: self.options })
    }
}

fn tell_rows(micro: usize, asked: usize, observer: &mut dyn Observer) {
    if micro < asked {
        let text = format!("Micro-batches of {micro} rows: {asked} would not fit in memory");
        observer.event(&Event::Note { warning: false, text });
    }
}

/// Tells the estimate, which is compared with the peak at the end.
fn tell_peak(peak: u64, observer: &mut dyn Observer) {
    let mut note = |warning, text| observer.event(&Event::Note { warning, text });
    note(false, format!("Estimated peak memory {:.3} GB", peak as f64 / 1e9));
    if let Some(text) = memory::most().and_then(|most| nearly_all(peak, most)) {
        note(true, text);
    }
}

/// A warning if a peak is most of what there is.
fn nearly_all(peak: u64, most: Room) -> Option<String> {
    let danger = match most.bound {
        Bound::Machine => "it may begin to swap",
        Bound::Limit(_) | Bound::Group | Bound::AddressSpace => {
            "a step that takes more than estimated would end the run"
        }
    };
    let all = match most.bound {
        Bound::Limit(_) => "the limit".to_string(),
        bound => format!("all memory {bound}"),
    };
    (peak > most.bytes / 10 * 7)
        .then(|| format!("that is more than 70 % of {all}, {}: {danger}", memory_size(most.bytes)))
}

/// Why nothing fits, and what would. `needed` is what a step needs with all activations kept, and with none.
fn too_little(config: &RunConfig, trial: &Trial, needed: [u64; 2], room: Room) -> String {
    let (micro, batch) = (trial.micro, &trial.window[0]);
    let counted = matches!(config.duration, Duration::Iters(_));
    let mut todo = Vec::new();
    if micro > 1 {
        todo.push(format!("--{} {}", if counted { "batch-size" } else { "micro-batch-size" }, micro / 2));
    }
    if batch.length > 64 {
        todo.push(format!("--max-seq-length {} (cuts longer samples)", batch.length / 2));
    }
    if config.fine_tune == FineTune::Full {
        todo.push("--fine-tune-type lora (trains few parameters)".into());
    }
    todo.push("a smaller or quantized model (mica convert -q)".into());
    let [kept, recomputed] = needed.map(memory_size);
    let kept = if config.grad_checkpoint { String::new() } else { format!("{kept} more memory, ") };
    format!(
        "a training step over {} × {} tokens needs {kept}{recomputed} more with activations recomputed, and {} \
         are left {}; try {}",
        batch.rows,
        batch.length,
        memory_size(room.bytes),
        room.bound,
        todo.join(", or ")
    )
}

/// The largest divisor of the batch whose rows stay within [`POSITIONS`].
pub(super) fn micro_batch(config: &RunConfig) -> usize {
    let most = (POSITIONS / config.rules.max_length).min(config.batch_size);
    let divides = |rows: &usize| config.batch_size.is_multiple_of(*rows);
    config.micro_batch_size.unwrap_or_else(|| (1..=most).rev().find(divides).unwrap_or(1))
}

pub(super) fn loader_options(config: &RunConfig, micro: usize) -> Options {
    let shape = Shape {
        rows: micro,
        max_length: config.rules.max_length,
        gather: config.gather,
        lengths: config.lengths.clone(),
    };
    Options { shape, shuffle: true, seed: config.seed, window: Options::DEFAULT_WINDOW, epochs: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_of_what_there_is_is_warned_of() {
        let gb = 1_000_000_000;
        for (bound, words) in [
            (Bound::Machine, "of all memory on this machine, 10.00 GB: it may begin to swap"),
            (Bound::Group, "of all memory in this container (control group), 10.00 GB: a step"),
            (Bound::Limit(10 * gb), "of the limit, 10.00 GB: a step"),
        ] {
            let most = Room { bytes: 10 * gb, bound };
            assert_eq!(nearly_all(7 * gb, most), None, "{bound:?}");
            let text = nearly_all(7 * gb + 1, most).unwrap();
            assert!(text.contains(words), "{text}");
        }
    }
}
