//! The pool: persistent workers, static ranges with stealing, phases that whoever is there runs.
//!
//! Nobody waits for a worker that has nothing to do. A list of tasks is cut into *phases*; workers that
//! are awake join the phase that is open, take chunks, and leave. The last to leave, when no chunk is
//! left, opens the next one. A worker that wakes late joins where the others are, or finds nothing open
//! and goes back to sleep: waking one takes from some microseconds to a millisecond, which is longer
//! than most lists. Within a list workers sleep too, but not before a phase has been closed to them for
//! longer than that.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::meter::{Meter, Spent};
use crate::place::Places;
use crate::scratch::Refused;
use crate::start::start;
use crate::wait::{Sleep, Wait};
use crate::{Lines, Scratch, Task};

/// How long a worker looks for a job before it parks: longer than the gap between two lists of a decoded
/// token, shorter than anything a neighbour would notice.
const PATIENCE: Duration = Duration::from_micros(100);
/// The same within a list, where the others wait for something that will come, often soon: a worker that sleeps then
/// comes up to a millisecond late to the next phase, which this keeps small beside what it waited.
const LONG: Duration = Duration::from_millis(2);

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

/// The system does not start as many threads as a pool was to have. Those that were started have ended.
#[derive(Debug, thiserror::Error)]
#[error(
    "{asked} threads can't be started, {possible} can ({reason}): ask for fewer (--threads, MICA_THREADS), \
     or raise the limit of processes (ulimit -u, pids.max of the control group) or of memory (ulimit -v)"
)]
pub struct TooManyThreads {
    /// How many were asked for, the caller's own included.
    pub asked: usize,
    /// How many there were when starting one more failed, the caller's own included.
    pub possible: usize,
    /// What the system said.
    pub reason: std::io::Error,
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
    /// Where workers sleep until there is a list.
    idle: Sleep,
    /// Where they sleep until a phase is over.
    late: Sleep,
    stop: AtomicBool,
    failed: AtomicBool,
    failure: Mutex<Option<TaskPanic>>,
    ranges: Vec<Range>,
    places: Places,
    meter: Meter,
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
        // In one order with the flags of [`Sleep`].
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
    ///
    /// # Panics
    /// The system does not start so many threads. [`Pool::try_new`] and [`Pool::up_to`] tell, for counts that
    /// a user chose or that are a guess.
    pub fn new(threads: usize) -> Pool {
        Pool::try_new(threads).unwrap_or_else(|error| panic!("{error}"))
    }

    /// [`Pool::new`], or the error if the system does not start so many threads.
    pub fn try_new(threads: usize) -> Result<Pool, TooManyThreads> {
        Pool::start(threads, |worker, work| start(format!("mica-{worker}"), work))
    }

    /// A pool of up to `threads` workers. If the system does not start so many, one fewer than it starts, and the
    /// error that says so: what else the program starts, such as a reader of data, needs a thread too.
    pub fn up_to(threads: usize) -> (Pool, Option<TooManyThreads>) {
        Pool::most(threads, Pool::try_new)
    }

    fn most(
        threads: usize,
        try_new: impl Fn(usize) -> Result<Pool, TooManyThreads>,
    ) -> (Pool, Option<TooManyThreads>) {
        let (mut now, mut first) = (threads, None);
        loop {
            match try_new(now) {
                Ok(pool) => return (pool, first),
                Err(error) => {
                    // One worker, the caller, is always possible.
                    now = (error.possible - 1).max(1);
                    first.get_or_insert(error);
                }
            }
        }
    }

    fn start(
        threads: usize,
        spawn: impl Fn(usize, Box<dyn FnOnce() + Send>) -> std::io::Result<JoinHandle<()>>,
    ) -> Result<Pool, TooManyThreads> {
        let threads = threads.max(1);
        if threads as u64 > CREW {
            let reason = std::io::Error::other(format!("a pool has at most {CREW}"));
            return Err(TooManyThreads { asked: threads, possible: CREW as usize, reason });
        }
        let no_task: &'static dyn Task = &Nothing;
        let no_tasks: &'static [&'static dyn Task] = &[];
        let shared = Arc::new(Shared {
            threads,
            state: State(AtomicU64::new(IDLE)),
            job: UnsafeCell::new(Job { task: no_task, rest: no_tasks }),
            idle: Sleep::default(),
            late: Sleep::default(),
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            ranges: (0..threads).map(|_| Range::default()).collect(),
            places: Places::new(threads),
            meter: Meter::new(threads),
        });
        let workers = Vec::with_capacity(threads - 1);
        let mut pool = Pool { shared, run_lock: Mutex::new(Scratch::new()), workers, begun: false };
        for worker in 1..threads {
            let shared = pool.shared.clone();
            match spawn(worker, Box::new(move || worker_loop(&shared, worker))) {
                Ok(handle) => pool.workers.push(handle),
                // The pool goes, and ends those that were started.
                Err(reason) => return Err(TooManyThreads { asked: threads, possible: worker, reason }),
            }
        }
        Ok(pool)
    }

    /// The number of workers, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Measures from now on what each worker does with its time, until [`Pool::spent`].
    pub fn measure(&self) {
        self.shared.meter.start();
    }

    /// What each worker, the caller of [`Pool::run`] first, has done since [`Pool::measure`].
    pub fn spent(&self) -> Vec<Spent> {
        self.shared.meter.stop()
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
            run_alone(shared, 0, tasks, &mut scratch);
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
        self.shared.idle.tell();
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
                // Until a phase is open, or the pool ends.
                shared.idle.until(|| {
                    shared.state.0.load(Ordering::SeqCst) & IDLE == 0 || shared.stop.load(Ordering::SeqCst)
                });
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
        self.open_next(0, scratch);
        if self.state.load() & IDLE == 0 {
            self.idle.tell();
        }
    }

    /// How the list ended.
    fn outcome(&self) -> Result<(), TaskPanic> {
        match self.failure.lock().expect("no code panics while it holds the failure").take() {
            Some(panic) => Err(panic),
            None => Ok(()),
        }
    }

    /// Runs small tasks up to the next that has several chunks, deals these out and opens its phase; or
    /// ends the job.
    ///
    /// Called by the one thread that may touch the job: the state is BUSY by its own doing, or IDLE.
    fn open_next(&self, worker: usize, scratch: &mut Scratch) {
        // SAFETY: see above. The list lives until the state is IDLE.
        let mut rest: &[&dyn Task] = unsafe { &*(*self.job.get()).rest };
        let small = rest.iter().take_while(|task| task.chunks() <= 1).count();
        run_alone(self, worker, &rest[..small], scratch);
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
        self.late.tell();
    }
}

/// Runs chunks of every phase that is open, until there is none.
fn take_part(shared: &Shared, worker: usize, scratch: &mut Scratch) {
    // The phase that this worker has been through.
    let mut over = None;
    let mut wait = Wait::default();
    let mut coming = Lines::default();
    let mut waiting = shared.meter.now();
    loop {
        let state = shared.state.load();
        if state & IDLE != 0 {
            shared.meter.waited(worker, waiting);
            return;
        }
        if state & BUSY != 0 || over == Some(state / PHASE) {
            coming.ask(ASKED);
            if wait.moment() > LONG {
                // In this phase there is nothing more for this worker to do: who has been through finds no chunk
                // left, and who sees it closed can't join.
                let phase = state / PHASE;
                shared.late.until(|| shared.state.0.load(Ordering::SeqCst) / PHASE != phase);
                wait = Wait::default();
            }
        } else if shared.state.join(state) {
            // SAFETY: the phase is open and stays so while this worker takes part, and the job with it.
            let task = unsafe { &*(*shared.job.get()).task };
            shared.meter.waited(worker, waiting);
            let begun = shared.meter.now();
            run_task(shared, worker, task, scratch);
            shared.meter.ran(worker, begun);
            over = Some(state / PHASE);
            // SAFETY: as above.
            coming = coming_lines(unsafe { &*(*shared.job.get()).rest }, worker, shared.threads);
            if shared.state.leave() {
                shared.open_next(worker, scratch);
            }
            wait = Wait::default();
            waiting = shared.meter.now();
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

/// Runs tasks one after another on this thread alone.
fn run_alone<'a>(shared: &Shared, worker: usize, tasks: &[&'a (dyn Task + 'a)], scratch: &mut Scratch) {
    let begun = shared.meter.now();
    for task in tasks {
        if shared.failed.load(Ordering::Relaxed) {
            break;
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
    shared.meter.ran(worker, begun);
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
mod tests;
