//! One persistent pool that runs task lists.
//!
//! A [`Task`] is cut into chunks *by its shape alone*, never by the number of threads: which
//! worker runs a chunk cannot change a result. [`Pool::run`] takes a list of tasks, enters the
//! pool once, and begins a task when the one before it is done. A panic in a chunk ends the list
//! and comes back as [`TaskPanic`]. Workers that are not awake in time are not waited for.
//!
//! The pool knows nothing of arrays or kernels.

mod cores;
mod lines;
mod meter;
mod place;
mod pool;
mod scratch;
mod start;
mod wait;

pub use cores::default_threads;
pub use lines::Lines;
pub use meter::Spent;
pub use pool::{Pool, TaskPanic, TooManyThreads};
pub use scratch::{Account, Plain, Scratch, set_account};

/// A unit of parallel work.
///
/// Chunks of one task run in any order and at the same time, so they write disjoint places.
pub trait Task: Send + Sync {
    /// How many chunks there are: a function of the shape, never of the thread count. Zero is
    /// allowed and runs nothing.
    fn chunks(&self) -> usize;

    /// Runs one chunk. `scratch` is the worker's own memory, empty at the start of each chunk.
    fn run(&self, chunk: usize, scratch: &mut Scratch);

    /// Memory that a chunk begins with and that is likely in no cache. A worker that waits for this task asks for
    /// it meanwhile.
    fn begins_with(&self, _chunk: usize) -> Lines {
        Lines::default()
    }

    /// What profiles and panics call this task.
    fn name(&self) -> &'static str {
        "task"
    }
}

/// A task made of a closure, for callers that have no struct of their own.
pub struct FnTask<F> {
    name: &'static str,
    chunks: usize,
    run: F,
}

impl<F: Fn(usize, &mut Scratch) + Send + Sync> FnTask<F> {
    /// A task of `chunks` chunks, each of which calls `run(chunk, scratch)`.
    pub fn new(name: &'static str, chunks: usize, run: F) -> FnTask<F> {
        FnTask { name, chunks, run }
    }
}

impl<F: Fn(usize, &mut Scratch) + Send + Sync> Task for FnTask<F> {
    fn chunks(&self) -> usize {
        self.chunks
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        (self.run)(chunk, scratch)
    }

    fn name(&self) -> &'static str {
        self.name
    }
}
