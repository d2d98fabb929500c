//! What workers do with their time, while somebody wants to know.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What one worker did with its time. The rest it was not in the pool, or in between tasks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Running tasks.
    pub tasks: Duration,
    /// Waiting, within lists, for what other workers ran.
    pub waiting: Duration,
}

/// Clocks of all workers. They stand still while the meter is off, which costs a look at a flag for each task.
pub(crate) struct Meter {
    on: AtomicBool,
    workers: Vec<Clocks>,
}

/// Nanoseconds, on a cache line of the worker's own.
#[repr(align(128))]
#[derive(Default)]
struct Clocks {
    tasks: AtomicU64,
    waiting: AtomicU64,
}

impl Meter {
    pub fn new(workers: usize) -> Meter {
        Meter { on: AtomicBool::new(false), workers: (0..workers).map(|_| Clocks::default()).collect() }
    }

    /// Begins, from zero.
    pub fn start(&self) {
        for worker in &self.workers {
            worker.tasks.store(0, Ordering::Relaxed);
            worker.waiting.store(0, Ordering::Relaxed);
        }
        self.on.store(true, Ordering::Relaxed);
    }

    /// Ends. What each worker did.
    pub fn stop(&self) -> Vec<Spent> {
        self.on.store(false, Ordering::Relaxed);
        let time = |clock: &AtomicU64| Duration::from_nanos(clock.load(Ordering::Relaxed));
        let spent = |clocks: &Clocks| Spent { tasks: time(&clocks.tasks), waiting: time(&clocks.waiting) };
        self.workers.iter().map(spent).collect()
    }

    /// The time, if it is measured.
    pub fn now(&self) -> Option<Instant> {
        self.on.load(Ordering::Relaxed).then(Instant::now)
    }

    /// A worker has run tasks since then.
    pub fn ran(&self, worker: usize, since: Option<Instant>) {
        add(&self.workers[worker].tasks, since);
    }

    /// A worker has waited since then.
    pub fn waited(&self, worker: usize, since: Option<Instant>) {
        add(&self.workers[worker].waiting, since);
    }
}

fn add(clock: &AtomicU64, since: Option<Instant>) {
    if let Some(since) = since {
        clock.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}
