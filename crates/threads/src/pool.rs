//! The pool: persistent workers, static ranges with stealing, barriers between tasks.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use crate::scratch::Refused;
use crate::{Scratch, Task};

/// How many times a waiting worker looks before it parks: some tens of microseconds, longer than
/// the gap between two tasks of one list, shorter than anything a neighbour would notice.
const SPINS: u32 = 20_000;

/// A chunk panicked. The rest of the list did not run.
#[derive(Debug, thiserror::Error)]
#[error("{task} panicked: {message}")]
pub struct TaskPanic {
    /// [`Task::name`] of the task.
    pub task: &'static str,
    /// The panic's message.
    pub message: String,
    /// The bytes of scratch memory that the task asked for and did not get, if it ended for that.
    pub refused: Option<usize>,
}

/// A fixed set of workers. The caller of [`Pool::run`] is worker 0.
pub struct Pool {
    shared: Arc<Shared>,
    run_lock: Mutex<Scratch>,
    workers: Vec<JoinHandle<()>>,
}

type TaskList = *const [&'static dyn Task];

struct Shared {
    threads: usize,
    job: Mutex<Job>,
    wake: Condvar,
    /// Counts jobs, so that a spinning worker sees a new one without the lock.
    epoch: AtomicU64,
    arrived: AtomicUsize,
    generation: AtomicUsize,
    failed: AtomicBool,
    failure: Mutex<Option<TaskPanic>>,
    ranges: Vec<Range>,
}

struct Job {
    tasks: Option<TaskList>,
    epoch: u64,
    stop: bool,
}

// SAFETY: the pointer is to a task list that `Pool::run` keeps alive until every worker is done.
unsafe impl Send for Job {}

/// The chunks that are left to one worker: `start << 32 | end`, on a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Range(AtomicU64);

impl Range {
    fn set(&self, start: usize, end: usize) {
        self.0.store((start as u64) << 32 | end as u64, Ordering::Relaxed);
    }

    fn take_front(&self) -> Option<usize> {
        self.take(|start, end| (start, (start + 1, end)))
    }

    fn take_back(&self) -> Option<usize> {
        self.take(|start, end| (end - 1, (start, end - 1)))
    }

    fn take(&self, pick: impl Fn(u64, u64) -> (u64, (u64, u64))) -> Option<usize> {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = (now >> 32, now & u32::MAX as u64);
            if start >= end {
                return None;
            }
            let (chunk, (start, end)) = pick(start, end);
            match self.0.compare_exchange_weak(now, start << 32 | end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(chunk as usize),
                Err(seen) => now = seen,
            }
        }
    }
}

impl Pool {
    /// A pool of `threads` workers, the caller included; zero means one.
    pub fn new(threads: usize) -> Pool {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            threads,
            job: Mutex::new(Job { tasks: None, epoch: 0, stop: false }),
            wake: Condvar::new(),
            epoch: AtomicU64::new(0),
            arrived: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            ranges: (0..threads).map(|_| Range::default()).collect(),
        });
        let workers = (1..threads)
            .map(|worker| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("mica-{worker}"))
                    .spawn(move || worker_loop(&shared, worker))
                    .expect("the system can start a thread")
            })
            .collect();
        Pool { shared, run_lock: Mutex::new(Scratch::new()), workers }
    }

    /// The number of workers, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Runs the tasks one after another, each on all workers; returns when the last is done.
    ///
    /// Calls from several threads take turns. A task that calls `run` on its own pool would wait
    /// for itself: kernels never do.
    pub fn run(&self, tasks: &[Box<dyn Task + '_>]) -> Result<(), TaskPanic> {
        let list: Vec<&(dyn Task + '_)> = tasks.iter().map(|task| task.as_ref()).collect();
        self.run_all(&list)
    }

    /// [`Pool::run`] for tasks that live anywhere.
    pub fn run_all<'a>(&self, tasks: &[&'a (dyn Task + 'a)]) -> Result<(), TaskPanic> {
        if tasks.is_empty() {
            return Ok(());
        }
        // Chunk numbers are halves of a word.
        if let Some(task) = tasks.iter().find(|task| task.chunks() > u32::MAX as usize) {
            let message = format!("has {} chunks, a task has at most 2^32", task.chunks());
            return Err(TaskPanic { task: task.name(), message, refused: None });
        }
        let mut scratch = self.run_lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased. Every worker leaves the list before the final
        // barrier of `run_list`, which this call waits for.
        let list: TaskList = unsafe { std::mem::transmute::<*const [&'a (dyn Task + 'a)], TaskList>(tasks) };
        shared.failed.store(false, Ordering::Relaxed);
        // A list of small tasks is not worth waking anybody for.
        let alone = shared.threads == 1 || tasks.iter().all(|task| task.chunks() <= 1);
        if !alone {
            let mut job = shared.job.lock().expect("no code panics while it holds the job");
            job.tasks = Some(list);
            job.epoch += 1;
            shared.epoch.store(job.epoch, Ordering::Release);
            shared.wake.notify_all();
        }
        if alone {
            run_alone(shared, tasks, &mut scratch);
        } else {
            // SAFETY: `tasks` is borrowed for this call.
            run_list(shared, 0, unsafe { &*list }, &mut scratch);
        }
        match shared.failure.lock().expect("no code panics while it holds the failure").take() {
            Some(panic) => Err(panic),
            None => Ok(()),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Ok(mut job) = self.shared.job.lock() {
            job.stop = true;
            job.epoch += 1;
            self.shared.epoch.store(job.epoch, Ordering::Release);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn worker_loop(shared: &Shared, worker: usize) {
    let mut scratch = Scratch::new();
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen && spins < SPINS {
            std::hint::spin_loop();
            spins += 1;
        }
        let mut job = shared.job.lock().expect("no code panics while it holds the job");
        while job.epoch == seen {
            job = shared.wake.wait(job).expect("no code panics while it holds the job");
        }
        seen = job.epoch;
        if job.stop {
            return;
        }
        let list = job.tasks.expect("a new epoch that does not stop has tasks");
        drop(job);
        // SAFETY: `Pool::run` keeps the list alive until this worker has passed the last barrier.
        run_list(shared, worker, unsafe { &*list }, &mut scratch);
    }
}

/// Tasks that one worker runs between two barriers: one task, or several small ones in a row.
fn stage<'a, 'b>(tasks: &'b [&'a (dyn Task + 'a)]) -> &'b [&'a (dyn Task + 'a)] {
    let small = tasks.iter().take_while(|task| task.chunks() <= 1).count();
    &tasks[..small.max(1)]
}

fn run_list(shared: &Shared, worker: usize, tasks: &[&dyn Task], scratch: &mut Scratch) {
    let mut rest = tasks;
    barrier(shared, || deal(shared, rest));
    while !rest.is_empty() {
        let now = stage(rest);
        rest = &rest[now.len()..];
        if let [task] = now {
            run_task(shared, worker, *task, scratch);
        } else if worker == 0 {
            run_alone(shared, now, scratch);
        }
        barrier(shared, || deal(shared, rest));
    }
}

/// Runs tasks one after another on this thread alone.
fn run_alone<'a>(shared: &Shared, tasks: &[&'a (dyn Task + 'a)], scratch: &mut Scratch) {
    for task in tasks {
        if shared.failed.load(Ordering::Relaxed) {
            return;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            for chunk in 0..task.chunks() {
                task.run(chunk, scratch);
                scratch.reset();
            }
        }));
        if let Err(payload) = outcome {
            scratch.reset();
            fail(shared, task.name(), payload.as_ref());
        }
    }
}

/// Gives each worker a contiguous range of the next task's chunks.
fn deal(shared: &Shared, rest: &[&dyn Task]) {
    let chunks = match rest.first() {
        Some(task) if !shared.failed.load(Ordering::Relaxed) => task.chunks(),
        _ => 0,
    };
    for (worker, range) in shared.ranges.iter().enumerate() {
        range.set(chunks * worker / shared.threads, chunks * (worker + 1) / shared.threads);
    }
}

fn run_task(shared: &Shared, worker: usize, task: &dyn Task, scratch: &mut Scratch) {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut run = |chunk| {
            task.run(chunk, scratch);
            scratch.reset();
        };
        while let Some(chunk) = shared.ranges[worker].take_front() {
            run(chunk);
        }
        for step in 1..shared.threads {
            let victim = (worker + step) % shared.threads;
            while let Some(chunk) = shared.ranges[victim].take_back() {
                run(chunk);
            }
        }
    }));
    if let Err(payload) = outcome {
        scratch.reset();
        fail(shared, task.name(), payload.as_ref());
    }
}

/// Keeps the first panic and empties what is left to do.
fn fail(shared: &Shared, task: &'static str, payload: &(dyn Any + Send)) {
    shared.failed.store(true, Ordering::Relaxed);
    for range in &shared.ranges {
        range.set(0, 0);
    }
    let mut failure = shared.failure.lock().expect("no code panics while it holds the failure");
    let refused = payload.downcast_ref::<Refused>().map(|refused| refused.bytes);
    failure.get_or_insert(TaskPanic { task, message: message_of(payload), refused });
}

fn message_of(payload: &(dyn Any + Send)) -> String {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text.to_string(),
        (_, Some(text)) => text.clone(),
        _ if payload.is::<Refused>() => "there is no memory for its scratch".to_string(),
        _ => "unknown panic".to_string(),
    }
}

/// Waits until all workers are here; the last to arrive runs `last` before anybody leaves.
fn barrier(shared: &Shared, last: impl FnOnce()) {
    if shared.threads == 1 {
        return last();
    }
    let generation = shared.generation.load(Ordering::Acquire);
    if shared.arrived.fetch_add(1, Ordering::AcqRel) + 1 == shared.threads {
        last();
        shared.arrived.store(0, Ordering::Relaxed);
        shared.generation.store(generation.wrapping_add(1), Ordering::Release);
        return;
    }
    let mut spins = 0u32;
    while shared.generation.load(Ordering::Acquire) == generation {
        spins += 1;
        if spins < SPINS {
            std::hint::spin_loop();
        } else {
            // A neighbour holds the core that the last worker needs.
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FnTask;

    #[test]
    fn every_chunk_runs_once_and_tasks_are_ordered() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            let list: Vec<Box<dyn Task + '_>> = (0..5)
                .map(|round| {
                    let counts = &counts;
                    let count_all = move |chunk: usize, _: &mut Scratch| {
                        assert_eq!(counts[chunk].fetch_add(1, Ordering::Relaxed), round);
                    };
                    Box::new(FnTask::new("count", 1000, count_all)) as Box<dyn Task + '_>
                })
                .collect();
            pool.run(&list).unwrap();
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 5), "{threads} threads");
        }
    }

    #[test]
    fn a_panic_comes_back_and_the_pool_still_works() {
        let pool = Pool::new(3);
        let ran_after = AtomicBool::new(false);
        let list: Vec<Box<dyn Task + '_>> = vec![
            Box::new(FnTask::new("bad", 10, |chunk, _: &mut Scratch| assert!(chunk != 4, "chunk four"))),
            Box::new(FnTask::new("after", 1, |_, _: &mut Scratch| ran_after.store(true, Ordering::Relaxed))),
        ];
        let error = pool.run(&list).unwrap_err();
        assert_eq!(error.to_string(), "bad panicked: chunk four");
        assert!(!ran_after.load(Ordering::Relaxed));
        for _ in 0..100 {
            pool.run(&[Box::new(FnTask::new("fine", 8, |_, _: &mut Scratch| ()))]).unwrap();
        }
    }

    #[test]
    fn several_threads_take_turns() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let add = |_: usize, _: &mut Scratch| {
                            total.fetch_add(1, Ordering::Relaxed);
                        };
                        pool.run(&[Box::new(FnTask::new("add", 3, add))]).unwrap();
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 600);
    }
}
