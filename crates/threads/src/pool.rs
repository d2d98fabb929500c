//! The pool: persistent workers, static ranges with stealing, phases that whoever is there runs.
//!
//! Nobody waits for a worker that has nothing to do. A list of tasks is cut into *phases*; workers that
//! are awake join the phase that is open, take chunks, and leave. The last to leave, when no chunk is
//! left, opens the next one. A worker that wakes late joins where the others are, or finds nothing open
//! and goes back to sleep: waking one takes from some microseconds to a millisecond, which is longer
//! than most lists.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::place::Places;
use crate::scratch::Refused;
use crate::{Lines, Scratch, Task};

/// How long a worker looks for a job before it parks: longer than the gap between two lists of a decoded
/// token, shorter than anything a neighbour would notice.
const PATIENCE: Duration = Duration::from_micros(100);
/// How long it looks before it offers its core between looks.
const GRACE: Duration = Duration::from_micros(10);

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
    /// Whether a list was begun and not finished.
    begun: bool,
}

struct Shared {
    threads: usize,
    state: State,
    job: UnsafeCell<Job>,
    /// Workers that are parked, or about to be.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
    failed: AtomicBool,
    failure: Mutex<Option<TaskPanic>>,
    ranges: Vec<Range>,
    places: Places,
}

// SAFETY: `job` is written by whoever has taken the state to BUSY, or holds `run_lock` while it is IDLE,
// and read by workers of an open phase: see [`State`].
unsafe impl Sync for Shared {}
// SAFETY: as above; the tasks behind its pointers may be used from any thread.
unsafe impl Send for Shared {}

/// What is being run.
#[derive(Clone, Copy)]
struct Job {
    /// The task of the open phase.
    task: *const (dyn Task + 'static),
    /// What comes after it.
    rest: *const [&'static dyn Task],
}

/// The number of a phase, what is going on, and how many workers take part.
///
/// - Open (no flag): workers may join. While one takes part, the phase stays, and with it the job.
/// - [`BUSY`]: the last worker to leave prepares what comes next, and has the job for itself.
/// - [`IDLE`]: there is no job. Nobody touches one until a caller of [`Pool::run`] opens a phase.
#[repr(align(128))]
struct State(AtomicU64);

const CREW: u64 = (1 << 16) - 1;
const BUSY: u64 = 1 << 16;
const IDLE: u64 = 1 << 17;
const PHASE: u64 = 1 << 18;

impl State {
    fn load(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Takes part in the phase that was seen open, if it still is.
    fn join(&self, seen: u64) -> bool {
        debug_assert!(seen & (BUSY | IDLE) == 0);
        self.0.compare_exchange(seen, seen + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Takes part no more. Whether this was the last worker, which then has to prepare what comes next.
    fn leave(&self) -> bool {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let last = now & CREW == 1;
            let next = if last { (now - 1) | BUSY } else { now - 1 };
            match self.0.compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return last,
                Err(seen) => now = seen,
            }
        }
    }

    /// Ends what is going on: a new phase is open, or there is none any more.
    fn next(&self, flag: u64) {
        let now = self.0.load(Ordering::Relaxed);
        debug_assert!(now & (BUSY | IDLE) != 0 && now & CREW == 0);
        // In one order with `sleepers`: either a worker sees this, or it is seen to sleep.
        self.0.store(((now / PHASE + 1) * PHASE) | flag, Ordering::SeqCst);
    }
}

/// The chunks that are left to one worker: `start << 32 | end`, on a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Range(AtomicU64);

impl Range {
    fn set(&self, start: usize, end: usize) {
        self.0.store((start as u64) << 32 | end as u64, Ordering::Relaxed);
    }

    /// The first chunk that is left.
    fn take_front(&self) -> Option<usize> {
        self.take(|start, end| (start + 1, end)).map(|(start, _)| start)
    }

    /// The second half of what is left, at least one chunk: where it starts and ends.
    fn take_half(&self) -> Option<(usize, usize)> {
        let middle = |start, end| start + (end - start) / 2;
        self.take(|start, end| (start, middle(start, end))).map(|(start, end)| (middle(start, end), end))
    }

    /// Leaves what `leave` says of a range that is not empty; what it was before.
    fn take(&self, leave: impl Fn(usize, usize) -> (usize, usize)) -> Option<(usize, usize)> {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = ((now >> 32) as usize, (now & u32::MAX as u64) as usize);
            if start >= end {
                return None;
            }
            let (from, to) = leave(start, end);
            let next = (from as u64) << 32 | to as u64;
            match self.0.compare_exchange_weak(now, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some((start, end)),
                Err(seen) => now = seen,
            }
        }
    }
}

impl Pool {
    /// A pool of `threads` workers, the caller included; zero means one.
    pub fn new(threads: usize) -> Pool {
        let threads = threads.max(1);
        assert!(threads as u64 <= CREW, "{threads} threads, a pool has at most {CREW}");
        let no_task: &'static dyn Task = &Nothing;
        let no_tasks: &'static [&'static dyn Task] = &[];
        let shared = Arc::new(Shared {
            threads,
            state: State(AtomicU64::new(IDLE)),
            job: UnsafeCell::new(Job { task: no_task, rest: no_tasks }),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            ranges: (0..threads).map(|_| Range::default()).collect(),
            places: Places::new(threads),
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
        Pool { shared, run_lock: Mutex::new(Scratch::new()), workers, begun: false }
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
        assert!(!self.begun, "another list was begun and not finished");
        if tasks.is_empty() {
            return Ok(());
        }
        check(tasks)?;
        let mut scratch = self.run_lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        shared.failed.store(false, Ordering::Relaxed);
        // A list of small tasks is not worth waking anybody for.
        if shared.threads == 1 || tasks.iter().all(|task| task.chunks() <= 1) {
            run_alone(shared, tasks, &mut scratch);
        } else {
            // SAFETY: the state is IDLE, and this call holds `run_lock`. Nobody reads the list once the state is IDLE
            // again, which this call waits for.
            unsafe { shared.open(tasks, &mut scratch) };
            take_part(shared, 0, &mut scratch);
        }
        shared.outcome()
    }

    /// Begins with a list of tasks: the other workers run it while the caller does something else, until
    /// [`Pool::finish`]. Whether there is anybody who does so; if not, nothing has begun.
    ///
    /// # Safety
    /// The list and its tasks live until [`Pool::finish`] has returned, or the pool is dropped.
    pub unsafe fn begin<'a>(&mut self, tasks: &[&'a (dyn Task + 'a)]) -> Result<bool, TaskPanic> {
        self.finish()?;
        check(tasks)?;
        if self.shared.threads == 1 || tasks.iter().all(|task| task.chunks() <= 1) {
            return Ok(false);
        }
        let scratch = self.run_lock.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.shared.failed.store(false, Ordering::Relaxed);
        self.begun = true;
        // SAFETY: the state is IDLE and the pool is borrowed by this call alone; the rest is promised.
        unsafe { self.shared.open(tasks, scratch) };
        Ok(true)
    }

    /// Takes part in the list that was begun, if any; returns when it is done.
    pub fn finish(&mut self) -> Result<(), TaskPanic> {
        if !self.begun {
            return Ok(());
        }
        let scratch = self.run_lock.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        take_part(&self.shared, 0, scratch);
        self.begun = false;
        self.shared.outcome()
    }
}

/// Chunk numbers are halves of a word.
fn check(tasks: &[&dyn Task]) -> Result<(), TaskPanic> {
    match tasks.iter().find(|task| task.chunks() > u32::MAX as usize) {
        None => Ok(()),
        Some(task) => {
            let message = format!("has {} chunks, a task has at most 2^32", task.chunks());
            Err(TaskPanic { task: task.name(), message, refused: None })
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // What failed has nobody left to be told.
        let _ = self.finish();
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Ok(_guard) = self.shared.sleep.lock() {
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// The task of a pool that has none yet.
struct Nothing;

impl Task for Nothing {
    fn chunks(&self) -> usize {
        0
    }

    fn run(&self, _: usize, _: &mut Scratch) {}
}

fn worker_loop(shared: &Shared, worker: usize) {
    let mut scratch = Scratch::new();
    let mut moved = None;
    loop {
        let mut wait = Wait::default();
        while shared.state.load() & IDLE != 0 {
            if shared.stop.load(Ordering::SeqCst) {
                return;
            }
            if wait.moment() > PATIENCE {
                shared.park();
            }
        }
        if shared.places.note(worker) {
            shared.places.go_elsewhere(worker, &mut moved);
        }
        take_part(shared, worker, &mut scratch);
    }
}

impl Shared {
    /// Makes a list the job, and opens its first phase.
    ///
    /// # Safety
    /// The state is IDLE and nobody else opens a list. The list and its tasks live until the state is IDLE again.
    unsafe fn open<'a>(&self, tasks: &[&'a (dyn Task + 'a)], scratch: &mut Scratch) {
        self.places.note(0);
        // SAFETY: only the lifetime is erased; the rest is promised.
        unsafe {
            (*self.job.get()).rest =
                std::mem::transmute::<*const [&'a (dyn Task + 'a)], *const [&'static dyn Task]>(tasks);
        }
        self.open_next(scratch);
        if self.state.load() & IDLE == 0 && self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = self.sleep.lock().expect("no code panics while it holds this");
            self.wake.notify_all();
        }
    }

    /// How the list ended.
    fn outcome(&self) -> Result<(), TaskPanic> {
        match self.failure.lock().expect("no code panics while it holds the failure").take() {
            Some(panic) => Err(panic),
            None => Ok(()),
        }
    }

    /// Sleeps until a phase is open, or the pool ends.
    fn park(&self) {
        let mut guard = self.sleep.lock().expect("no code panics while it holds this");
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.state.0.load(Ordering::SeqCst) & IDLE != 0 && !self.stop.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).expect("no code panics while it holds this");
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Runs small tasks up to the next that has several chunks, deals these out and opens its phase; or
    /// ends the job.
    ///
    /// Called by the one thread that may touch the job: the state is BUSY by its own doing, or IDLE.
    fn open_next(&self, scratch: &mut Scratch) {
        // SAFETY: see above. The list lives until the state is IDLE.
        let mut rest: &[&dyn Task] = unsafe { &*(*self.job.get()).rest };
        let small = rest.iter().take_while(|task| task.chunks() <= 1).count();
        run_alone(self, &rest[..small], scratch);
        rest = &rest[small..];
        match rest.split_first() {
            Some((&task, rest)) if !self.failed.load(Ordering::Relaxed) => {
                deal(self, task.chunks());
                // SAFETY: as above; only lifetimes are erased.
                unsafe {
                    *self.job.get() = Job {
                        task: std::mem::transmute::<*const dyn Task, *const (dyn Task + 'static)>(task),
                        rest: std::mem::transmute::<*const [&dyn Task], *const [&'static dyn Task]>(rest),
                    };
                }
                self.state.next(0);
            }
            _ => self.state.next(IDLE),
        }
    }
}

/// Runs chunks of every phase that is open, until there is none.
fn take_part(shared: &Shared, worker: usize, scratch: &mut Scratch) {
    // The phase that this worker has been through.
    let mut over = None;
    let mut wait = Wait::default();
    let mut coming = Lines::default();
    loop {
        let state = shared.state.load();
        if state & IDLE != 0 {
            return;
        }
        if state & BUSY != 0 || over == Some(state / PHASE) {
            coming.ask(ASKED);
            wait.moment();
        } else if shared.state.join(state) {
            // SAFETY: the phase is open and stays so while this worker takes part, and the job with it.
            let task = unsafe { &*(*shared.job.get()).task };
            run_task(shared, worker, task, scratch);
            over = Some(state / PHASE);
            // SAFETY: as above.
            coming = coming_lines(unsafe { &*(*shared.job.get()).rest }, worker, shared.threads);
            if shared.state.leave() {
                shared.open_next(scratch);
            }
            wait = Wait::default();
        }
    }
}

/// Lines asked for between two looks.
const ASKED: usize = 4;

/// What a worker will begin with in the next task of several chunks.
fn coming_lines(rest: &[&dyn Task], worker: usize, threads: usize) -> Lines {
    match rest.iter().find(|task| task.chunks() > 1) {
        Some(task) => task.begins_with(task.chunks() * worker / threads),
        None => Lines::default(),
    }
}

/// Looking again and again.
#[derive(Default)]
struct Wait {
    looks: u32,
    since: Option<Instant>,
}

impl Wait {
    /// Waits for a moment, or offers the core if it has been long: whoever is waited for may have been woken
    /// on the same one. How long it has been, now and then, since the clock costs more than a look.
    fn moment(&mut self) -> Duration {
        std::hint::spin_loop();
        self.looks += 1;
        if !self.looks.is_multiple_of(64) {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let waited = now - *self.since.get_or_insert(now);
        if waited > GRACE {
            std::thread::yield_now();
        }
        waited
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

/// Gives each worker a contiguous range of a task's chunks.
fn deal(shared: &Shared, chunks: usize) {
    for (worker, range) in shared.ranges.iter().enumerate() {
        range.set(chunks * worker / shared.threads, chunks * (worker + 1) / shared.threads);
    }
}

/// Runs chunks until none is left: a worker's own, then half of what another has left, and so on. What a worker runs
/// in a row follows each other, as what the chunks read does.
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
            while let Some((first, end)) = shared.ranges[victim].take_half() {
                shared.ranges[worker].set(first + 1, end);
                run(first);
                while let Some(chunk) = shared.ranges[worker].take_front() {
                    run(chunk);
                }
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
    fn every_chunk_runs_once_whether_workers_sleep_or_not() {
        // Lists of tasks of all sizes, after pauses in which workers fall asleep and without.
        let pool = Pool::new(4);
        for round in 0..200 {
            let ran: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
            let list: Vec<Box<dyn Task + '_>> = [64, 1, 0, 3, 64]
                .into_iter()
                .map(|chunks| {
                    let ran = &ran;
                    let count = move |chunk: usize, _: &mut Scratch| {
                        ran[chunk].fetch_add(1, Ordering::Relaxed);
                    };
                    Box::new(FnTask::new("count", chunks, count)) as Box<dyn Task + '_>
                })
                .collect();
            pool.run(&list).unwrap();
            let total: usize = ran.iter().map(|count| count.load(Ordering::Relaxed)).sum();
            assert_eq!(total, 64 + 1 + 3 + 64, "round {round}");
            if round % 20 == 0 {
                // Long enough for all to park.
                std::thread::sleep(PATIENCE * 20);
            }
        }
    }

    #[test]
    fn what_one_task_wrote_the_next_reads() {
        let pool = Pool::new(3);
        let cells: Vec<AtomicUsize> = (0..97).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..300 {
            cells.iter().for_each(|cell| cell.store(0, Ordering::Relaxed));
            let list: Vec<Box<dyn Task + '_>> = (0..20)
                .map(|step| {
                    let cells = &cells;
                    // Each chunk reads what another chunk of the task before has written.
                    let shift = move |chunk: usize, _: &mut Scratch| {
                        if step % 2 == 0 {
                            cells[chunk].fetch_add(1, Ordering::Relaxed);
                        } else {
                            let other = cells[(chunk * 31 + 7) % 97].load(Ordering::Relaxed);
                            assert_eq!(other, step / 2 + 1);
                        }
                    };
                    Box::new(FnTask::new("shift", 97, shift)) as Box<dyn Task + '_>
                })
                .collect();
            pool.run(&list).unwrap();
        }
    }

    #[test]
    fn a_list_that_was_begun_runs_meanwhile_and_is_finished() {
        let mut pool = Pool::new(3);
        for round in 0..100 {
            let ran: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
            let count = |chunk: usize, _: &mut Scratch| {
                ran[chunk].fetch_add(1, Ordering::Relaxed);
            };
            let tasks = [1, 64, 1, 5].map(|chunks| FnTask::new("count", chunks, count));
            let list: Vec<&dyn Task> = tasks.iter().map(|task| task as &dyn Task).collect();
            // SAFETY: the list is finished below.
            assert!(unsafe { pool.begin(&list) }.unwrap());
            if round % 2 == 0 {
                // The others do all of it.
                while ran.iter().map(|count| count.load(Ordering::Relaxed)).sum::<usize>() < 71 {
                    std::thread::yield_now();
                }
            }
            pool.finish().unwrap();
            assert_eq!(ran.iter().map(|count| count.load(Ordering::Relaxed)).sum::<usize>(), 71);
            pool.finish().unwrap();
            pool.run_all(&list).unwrap();
        }
        let fail = FnTask::new("bad", 4, |chunk, _: &mut Scratch| assert!(chunk != 2, "chunk two"));
        // SAFETY: the list is finished in the next line.
        assert!(unsafe { pool.begin(&[&fail]) }.unwrap());
        assert_eq!(pool.finish().unwrap_err().to_string(), "bad panicked: chunk two");
    }

    #[test]
    fn a_pool_ends_what_was_begun_before_it_goes_and_one_thread_begins_nothing() {
        let ran = AtomicUsize::new(0);
        let count = |_: usize, _: &mut Scratch| {
            ran.fetch_add(1, Ordering::Relaxed);
        };
        let task = FnTask::new("count", 9, count);
        let list: [&dyn Task; 2] = [&task, &task];
        let mut pool = Pool::new(2);
        // SAFETY: the pool is dropped before the list.
        assert!(unsafe { pool.begin(&list) }.unwrap());
        drop(pool);
        assert_eq!(ran.load(Ordering::Relaxed), 18);
        let mut alone = Pool::new(1);
        // SAFETY: as above.
        assert!(!unsafe { alone.begin(&list) }.unwrap());
        alone.finish().unwrap();
        assert_eq!(ran.load(Ordering::Relaxed), 18);
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
