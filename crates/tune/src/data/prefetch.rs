//! Batches prepared on a thread of their own while the last one is being trained on.
//!
//! Each batch travels with the loader's state after it, so that what a checkpoint stores is the place
//! of the batch that was *consumed*, however far ahead the thread has read.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use super::batch::Batch;
use super::loader::{Loader, LoaderState};
use crate::{Error, Result};

/// A loader that works ahead.
pub struct Prefetch {
    state: LoaderState,
    queue: Option<Receiver<Result<Option<(Batch, LoaderState)>>>>,
    worker: Option<JoinHandle<()>>,
    ended: bool,
}

impl Prefetch {
    /// Starts a thread that keeps up to `ahead` batches ready (at least one).
    pub fn start(mut loader: Loader, ahead: usize) -> Result<Prefetch> {
        let state = loader.state().clone();
        let (sender, queue) = sync_channel(ahead.max(1));
        let work = move || {
            loop {
                let next =
                    loader.next_batch().map(|batch| batch.map(|batch| (batch, loader.state().clone())));
                let more = matches!(next, Ok(Some(_)));
                // The receiver is gone when the run is over: then so is this thread.
                if sender.send(next).is_err() || !more {
                    return;
                }
            }
        };
        let worker = std::thread::Builder::new()
            .name("mica-data".into())
            .spawn(work)
            .map_err(|e| Error::Config(format!("the thread that reads data could not be started: {e}")))?;
        Ok(Prefetch { state, queue: Some(queue), worker: Some(worker), ended: false })
    }

    /// The next batch, or `None` after the last epoch. Waits if none is ready.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let Some(queue) = self.queue.as_ref().filter(|_| !self.ended) else { return Ok(None) };
        match queue.recv() {
            Ok(Ok(Some((batch, state)))) => {
                self.state = state;
                Ok(Some(batch))
            }
            Ok(Ok(None)) => {
                self.ended = true;
                Ok(None)
            }
            Ok(Err(error)) => {
                self.ended = true;
                Err(error)
            }
            Err(_) => {
                self.ended = true;
                Err(Error::Config("the thread that reads data ended unexpectedly".into()))
            }
        }
    }

    /// Where the stream is: after the batch that was consumed last.
    pub fn state(&self) -> &LoaderState {
        &self.state
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        // Closing the queue first makes a waiting sender give up.
        self.queue = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::batch::{Gather, Lengths, Shape};
    use crate::data::loader::Options;
    use crate::data::sample::Sample;
    use crate::data::samples::InMemory;

    fn loader() -> Loader {
        let sample = |n: u32| Sample { tokens: (0..n).collect(), targets: (0..n).map(|t| t > 0).collect() };
        let samples = InMemory::from_samples(&(2..40).map(sample).collect::<Vec<_>>(), "x");
        let shape = Shape { rows: 3, max_length: 64, gather: Gather::Packed, lengths: Lengths::Multiple(1) };
        let options = Options { shape, shuffle: true, seed: 1, window: 10, epochs: Some(2) };
        Loader::new(Arc::new(samples), options).unwrap()
    }

    #[test]
    fn batches_and_states_are_those_of_the_loader() {
        for ahead in [0, 1, 3, 100] {
            let (mut plain, mut ahead_of) = (loader(), Prefetch::start(loader(), ahead).unwrap());
            assert_eq!(ahead_of.state(), plain.state());
            while let Some(batch) = plain.next_batch().unwrap() {
                assert_eq!(ahead_of.next_batch().unwrap(), Some(batch));
                assert_eq!(ahead_of.state(), plain.state());
            }
            assert_eq!(ahead_of.next_batch().unwrap(), None);
            assert_eq!(ahead_of.next_batch().unwrap(), None);
        }
    }

    #[test]
    fn dropping_it_early_ends_its_thread() {
        let mut prefetch = Prefetch::start(loader(), 1).unwrap();
        prefetch.next_batch().unwrap();
        drop(prefetch);
    }
}
