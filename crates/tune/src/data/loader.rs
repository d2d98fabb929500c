//! The stream of batches that a run consumes, and the small state from which it goes on.
//!
//! Rows are taken in the epoch's order, a *window* of them at a time. A window's samples are divided into
//! batches ([`super::batch`]), the batches are shuffled (else long ones would come first), and handed
//! out; samples that did not fill a batch are carried over to the next window. Everything is a function
//! of the options and of [`LoaderState`], so resuming reads the current window again and skips what
//! was handed out: the batches that follow are exactly those of the undisturbed run.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::batch::{Batch, IGNORE, Plan, Shape};
use super::order::epoch_order;
use super::sample::Sample;
use super::samples::Samples;
use crate::rng::Rng;
use crate::{Error, Result};

/// Names the random stream that orders the batches of a window.
const BATCHES: u64 = 0x6261_7463_6865_7300;

/// How a loader goes through its rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// How batches are formed.
    pub shape: Shape,
    /// Whether rows and batches come in random order.
    pub shuffle: bool,
    /// Where randomness starts.
    pub seed: u64,
    /// Rows taken at a time. More rows pack better and need more memory; packing leaves under 1 % of
    /// the positions empty from about 2,000 rows on.
    pub window: usize,
    /// Stop after so many passes; `None` never stops.
    pub epochs: Option<u64>,
}

impl Options {
    /// A window that holds all rows of an ordinary fine-tuning set at once.
    pub const DEFAULT_WINDOW: usize = 16_384;
}

/// Where a loader is. Small, and all that a checkpoint needs of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// Pass over the data to which the next batch belongs, from 0.
    pub epoch: u64,
    /// Place in the epoch's order at which the current window starts.
    pub position: usize,
    /// Samples carried into the current window: row and number within the row.
    pub carried: Vec<(u32, u32)>,
    /// Batches of the current window that were handed out.
    pub emitted: usize,
    /// Batches handed out since the beginning.
    pub batches: u64,
    /// What the state belongs to; checked when it is restored.
    pub fingerprint: String,
}

/// Hands out batches.
pub struct Loader {
    samples: Arc<dyn Samples>,
    options: Options,
    state: LoaderState,
    order: Option<(u64, Vec<u32>)>,
    window: Option<Window>,
}

/// The rows that are being handed out.
struct Window {
    pool: Vec<((u32, u32), Sample)>,
    plans: Vec<Plan>,
    rest: Vec<(u32, u32)>,
    last: bool,
}

impl Loader {
    /// A loader at the beginning of the first epoch.
    pub fn new(samples: Arc<dyn Samples>, options: Options) -> Result<Loader> {
        if options.shape.rows == 0 || options.shape.max_length == 0 || options.window == 0 {
            return Err(Error::Config("batch size, maximum length and window must be at least 1".into()));
        }
        if samples.is_empty() {
            return Err(Error::NothingToLearn("there is nothing to load: the data set has no rows".into()));
        }
        let state = LoaderState { fingerprint: fingerprint(&*samples, &options), ..LoaderState::default() };
        Ok(Loader { samples, options, state, order: None, window: None })
    }

    /// Where the loader is: after the batch that was handed out last.
    pub fn state(&self) -> &LoaderState {
        &self.state
    }

    /// Goes to a saved place. Fails if data or options are not the ones that it was saved with.
    pub fn restore(&mut self, state: LoaderState) -> Result<()> {
        if state.fingerprint != self.state.fingerprint {
            return Err(Error::Config(
                "the data or its settings (files, batch size, lengths, packing, seed, masks) changed since the checkpoint; \
                 restore them, or start a new run from the saved weights"
                    .into(),
            ));
        }
        let rows = self.samples.len();
        if state.position > rows || state.carried.iter().any(|&(row, _)| row as usize >= rows) {
            return Err(Error::Config("the saved place in the data is outside of it".into()));
        }
        self.state = state;
        self.window = None;
        Ok(())
    }

    /// The next batch, or `None` after the last epoch.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        loop {
            if self.options.epochs.is_some_and(|epochs| self.state.epoch >= epochs) {
                return Ok(None);
            }
            let window = match self.window.take() {
                Some(window) => window,
                None => self.read_window()?,
            };
            if let Some(plan) = window.plans.get(self.state.emitted) {
                let batch = self.assemble(&window, plan);
                self.state.emitted += 1;
                self.state.batches += 1;
                // At once, so that the state says when a pass is over.
                if self.state.emitted == window.plans.len() && window.last {
                    self.advance(window)?;
                } else {
                    self.window = Some(window);
                }
                return Ok(Some(batch));
            }
            self.advance(window)?;
        }
    }

    /// How many batches an epoch has. Goes through all of its rows, so it is meant for data in memory.
    pub fn batches_in_epoch(&self, epoch: u64) -> Result<usize> {
        let mut count = 0;
        self.walk(epoch, |_, window| count += window.plans.len())?;
        Ok(count)
    }

    /// A batch of the first epoch with the most positions, with as many targets as any batch has there: none takes
    /// more memory. Goes through all rows.
    pub fn largest_batch(&self) -> Result<Option<Batch>> {
        let (mut largest, mut targets) = (None::<Batch>, 0);
        self.walk(0, |scout, window| {
            for plan in &window.plans {
                let samples = || plan.iter().flatten().map(|&at| &window.pool[at].1);
                targets = samples().map(Sample::labelled).sum::<usize>().max(targets);
                let positions = scout.positions(window, plan);
                if largest.as_ref().is_none_or(|batch| plan.len() * positions > batch.rows * batch.length) {
                    largest = Some(scout.assemble(window, plan));
                }
            }
        })?;
        if let Some(batch) = &mut largest {
            let missing = targets.saturating_sub(batch.labelled);
            batch
                .targets
                .iter_mut()
                .filter(|target| **target == IGNORE)
                .take(missing)
                .for_each(|target| *target = 0);
            batch.labelled = batch.targets.iter().filter(|&&target| target != IGNORE).count();
        }
        Ok(largest)
    }

    /// Shows all windows of an epoch.
    fn walk(&self, epoch: u64, mut visit: impl FnMut(&Loader, &Window)) -> Result<()> {
        let options = Options { epochs: Some(epoch + 1), ..self.options.clone() };
        let state = LoaderState { epoch, ..LoaderState::default() };
        let mut scout = Loader { samples: self.samples.clone(), options, state, order: None, window: None };
        loop {
            let window = scout.read_window()?;
            visit(&scout, &window);
            let last = window.last;
            // An epoch without any batch is reported when it is read, not here.
            scout.state.emitted = window.plans.len();
            scout.state.batches += window.plans.len() as u64;
            if last {
                return Ok(());
            }
            scout.advance(window)?;
        }
    }

    /// Leaves a finished window behind.
    fn advance(&mut self, window: Window) -> Result<()> {
        if window.last {
            if self.state.batches == 0 {
                let text = "there is nothing to learn in any row of the data set";
                return Err(Error::NothingToLearn(text.into()));
            }
            self.state = LoaderState {
                epoch: self.state.epoch + 1,
                batches: self.state.batches,
                fingerprint: std::mem::take(&mut self.state.fingerprint),
                ..LoaderState::default()
            };
        } else {
            self.state.position += self.options.window;
            self.state.carried = window.rest;
            self.state.emitted = 0;
        }
        Ok(())
    }

    fn read_window(&mut self) -> Result<Window> {
        let (epoch, rows) = (self.state.epoch, self.samples.len());
        let order = match self.order.take() {
            Some((of, order)) if of == epoch => order,
            _ => epoch_order(rows, self.options.seed, epoch, self.options.shuffle)?,
        };
        let start = self.state.position.min(rows);
        let end = (start + self.options.window).min(rows);
        let mut pool = Vec::with_capacity(end - start + self.state.carried.len());
        for &(row, part) in &self.state.carried {
            let sample = self.samples.row(row as usize)?.into_iter().nth(part as usize);
            pool.extend(sample.map(|sample| ((row, part), sample)));
        }
        for &row in &order[start..end] {
            let samples = self.samples.row(row as usize)?;
            pool.extend(samples.into_iter().enumerate().map(|(part, sample)| ((row, part as u32), sample)));
        }
        // A sample of one token has no position; there is nothing to predict in it.
        pool.retain(|(_, sample)| sample.positions() > 0);
        let last = end == rows;
        let (plans, rest) = self.plan(&pool, last);
        let rest = rest.into_iter().map(|i| pool[i].0).collect();
        self.order = Some((epoch, order));
        Ok(Window { pool, plans, rest, last })
    }

    fn plan(&self, pool: &[((u32, u32), Sample)], last: bool) -> (Vec<Plan>, Vec<usize>) {
        let positions: Vec<usize> = pool.iter().map(|(_, sample)| sample.positions()).collect();
        let (mut plans, rest) = self.options.shape.plan(&positions, last);
        if self.options.shuffle {
            let path = [BATCHES, self.state.epoch, self.state.position as u64];
            Rng::new(self.options.seed, &path).shuffle(&mut plans);
        }
        (plans, rest)
    }

    fn assemble(&self, window: &Window, plan: &Plan) -> Batch {
        let rows: Vec<Vec<&Sample>> =
            plan.iter().map(|row| row.iter().map(|&i| &window.pool[i].1).collect()).collect();
        Batch::assemble(&rows, self.positions(window, plan))
    }

    /// Positions of each row of a batch.
    fn positions(&self, window: &Window, plan: &Plan) -> usize {
        let filled = |row: &Vec<usize>| row.iter().map(|&at| window.pool[at].1.positions()).sum();
        self.options.shape.padded(plan.iter().map(filled).max().unwrap_or(0))
    }
}

fn fingerprint(samples: &dyn Samples, options: &Options) -> String {
    // The number of epochs may be raised when a run goes on; everything else decides what comes.
    let options = Options { epochs: None, ..options.clone() };
    format!("{}:{}", samples.fingerprint(), serde_json::to_string(&options).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::{Gather, Lengths};
    use crate::data::samples::InMemory;
    use proptest::prelude::*;

    fn samples(lengths: &[usize]) -> Arc<dyn Samples> {
        let sample = |(i, &n): (usize, &usize)| Sample {
            tokens: (0..n).map(|t| (1 + i * 1000 + t) as u32).collect(),
            targets: (0..n).map(|t| t > 0).collect(),
        };
        Arc::new(InMemory::from_samples(&lengths.iter().enumerate().map(sample).collect::<Vec<_>>(), "test"))
    }

    fn options(gather: Gather, rows: usize, window: usize, epochs: Option<u64>) -> Options {
        let shape = Shape { rows, max_length: 64, gather, lengths: Lengths::Multiple(8) };
        Options { shape, shuffle: true, seed: 3, window, epochs }
    }

    fn rest_of(loader: &mut Loader) -> Vec<Batch> {
        std::iter::from_fn(|| loader.next_batch().unwrap()).collect()
    }

    /// What a list of batches teaches: every (input, target) pair, sorted.
    fn pairs(batches: &[Batch]) -> Vec<(u32, i32)> {
        let all =
            batches.iter().flat_map(|batch| batch.tokens.iter().copied().zip(batch.targets.iter().copied()));
        let mut pairs: Vec<_> = all.filter(|&(_, target)| target != IGNORE).collect();
        pairs.sort_unstable();
        pairs
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Stopping after any batch, storing the state as JSON and going on in a new loader gives the
        /// very batches that the undisturbed loader gives; and each epoch teaches every target once.
        #[test]
        fn resuming_changes_nothing(
            lengths in proptest::collection::vec(2usize..=65, 1..60),
            gather in prop_oneof![Just(Gather::Plain), Just(Gather::Buckets), Just(Gather::Packed)],
            rows in 1usize..5,
            window in 1usize..80,
            stop in 0.0f64..1.0,
        ) {
            let data = samples(&lengths);
            let options = options(gather, rows, window, Some(2));
            let undisturbed = rest_of(&mut Loader::new(data.clone(), options.clone()).unwrap());
            let stop = (stop * (undisturbed.len() + 1) as f64) as usize;
            let mut first = Loader::new(data.clone(), options.clone()).unwrap();
            let mut all: Vec<Batch> = (0..stop).map(|_| first.next_batch().unwrap().unwrap()).collect();
            let saved = serde_json::to_string(first.state()).unwrap();
            let mut second = Loader::new(data.clone(), options.clone()).unwrap();
            second.restore(serde_json::from_str(&saved).unwrap()).unwrap();
            all.extend(rest_of(&mut second));
            prop_assert_eq!(&all, &undisturbed);

            let mut loader = Loader::new(data, options).unwrap();
            let count = loader.batches_in_epoch(0).unwrap();
            let largest = loader.largest_batch().unwrap().unwrap();
            let most = |size: fn(&Batch) -> usize| undisturbed[..count].iter().map(size).max();
            prop_assert_eq!(Some(largest.rows * largest.length), most(|batch| batch.rows * batch.length));
            prop_assert_eq!(Some(largest.labelled), most(|batch| batch.labelled));
            for at in 1..=count {
                loader.next_batch().unwrap();
                prop_assert_eq!(loader.state().epoch, u64::from(at == count));
            }
            let expected: usize = lengths.iter().map(|n| n - 1).sum();
            prop_assert_eq!(pairs(&undisturbed[..count]).len(), expected);
            prop_assert_eq!(pairs(&undisturbed[..count]), pairs(&undisturbed[count..]));
            prop_assert_eq!(loader.batches_in_epoch(1).unwrap(), undisturbed.len() - count);
            if gather != Gather::Packed {
                prop_assert_eq!(count, lengths.len().div_ceil(rows));
            }
        }
    }

    #[test]
    fn epochs_differ_in_order() {
        let lengths: Vec<usize> = (0..40).map(|i| 2 + i).collect();
        let mut loader = Loader::new(samples(&lengths), options(Gather::Plain, 1, 16, Some(2))).unwrap();
        let batches = rest_of(&mut loader);
        assert_ne!(batches[..40], batches[40..]);
        assert_eq!(loader.state().batches, 80);
    }

    #[test]
    fn without_shuffling_rows_come_as_they_are() {
        let options = Options { shuffle: false, ..options(Gather::Plain, 2, 3, Some(1)) };
        let mut loader = Loader::new(samples(&[3, 9, 4, 5, 6]), options).unwrap();
        let firsts: Vec<Vec<u32>> = rest_of(&mut loader)
            .iter()
            .map(|batch| batch.tokens.chunks(batch.length).map(|row| row[0] / 1000).collect())
            .collect();
        assert_eq!(firsts, [vec![0, 1], vec![2, 3], vec![4]]);
    }

    #[test]
    fn a_state_of_other_data_or_options_is_refused() {
        let data = samples(&[3, 4, 5]);
        let loader = Loader::new(data.clone(), options(Gather::Plain, 2, 8, None)).unwrap();
        let state = loader.state().clone();
        let mut more_rows = Loader::new(data.clone(), options(Gather::Plain, 3, 8, None)).unwrap();
        assert!(more_rows.restore(state.clone()).unwrap_err().to_string().contains("changed since"));
        let mut more_epochs = Loader::new(data, options(Gather::Plain, 2, 8, Some(7))).unwrap();
        more_epochs.restore(state).unwrap();
    }

    #[test]
    fn data_without_anything_to_learn_is_an_error_and_no_endless_loop() {
        let empty: Arc<dyn Samples> = Arc::new(InMemory::from_samples(&[], "x"));
        assert!(Loader::new(empty, options(Gather::Plain, 1, 1, None)).is_err());
        let mut loader = Loader::new(samples(&[1, 1]), options(Gather::Plain, 1, 1, None)).unwrap();
        let error = loader.next_batch().unwrap_err();
        assert!(error.to_string().contains("nothing to learn"), "{error}");
        assert_eq!(error.kind(), mica_lm::ErrorKind::BadData);
    }
}
