//! Streams: evaluation in the background, in order.
//!
//! A stream has a thread of its own and evaluates what it is given one after another, so a later
//! evaluation of a stream never overtakes an earlier one. Streams know nothing of each other's
//! order; results do not depend on it, because arrays say what they need. All of them compute with
//! the one backend of the process, which takes turns.
//!
//! Arrays belong to no stream: any thread may build on them, read them (which waits for whoever
//! computes them) and send them on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::ThreadId;

use crate::{Array, Error, Result, eval};

/// A line of evaluations that run in order, in the background.
///
/// ```
/// use mica_array::{Array, Stream};
///
/// let loads = Stream::named("loads");
/// let x = (Array::from_slice(&[1.0f32, 2.0], &[2])? * 2.0).exp()?;
/// loads.async_eval(&[x.clone()]); // returns at once
/// loads.synchronize()?;           // and here it is done
/// assert!(x.is_ready());
/// # Ok::<(), mica_array::Error>(())
/// ```
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    name: String,
    queue: Mutex<Sender<Work>>,
}

enum Work {
    Eval(Vec<Array>),
    /// Answered once all before it is done, with the first error since the last answer.
    Wait(Sender<Result<()>>),
}

/// The streams that were asked for by name, and the one that is used when none is; each with the
/// thread that asked first.
fn named() -> MutexGuard<'static, BTreeMap<String, (ThreadId, Stream)>> {
    static NAMED: Mutex<BTreeMap<String, (ThreadId, Stream)>> = Mutex::new(BTreeMap::new());
    NAMED.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What a thread knows of streams.
#[derive(Default)]
struct Own {
    /// Of [`Stream::with`], innermost last.
    current: Vec<Stream>,
    /// What it uses outside of these.
    default: Option<Stream>,
    /// Its own one of each [`ThreadLocalStream`], by number.
    local: BTreeMap<u64, Stream>,
}

thread_local! {
    static OWN: RefCell<Own> = RefCell::default();
}

impl Stream {
    /// The stream of this name: the same one whenever and wherever it is asked for.
    pub fn named(name: &str) -> Stream {
        let start = || (std::thread::current().id(), Stream::start(name));
        named().entry(name.to_string()).or_insert_with(start).1.clone()
    }

    /// A new stream, which nothing else finds by its name. Its thread ends once the last copy of it
    /// is gone and its work is done.
    pub fn new(name: &str) -> Stream {
        Stream::start(name)
    }

    /// The stream that this thread uses if none is named: that of the innermost [`Stream::with`],
    /// else the thread's default, else the process's stream `default`.
    pub fn current() -> Stream {
        let chosen = OWN.with_borrow(|own| own.current.last().or(own.default.as_ref()).cloned());
        chosen.unwrap_or_else(|| Stream::named("default"))
    }

    /// Makes this the stream that this thread uses outside of [`Stream::with`].
    pub fn set_default(&self) {
        OWN.with_borrow_mut(|own| own.default = Some(self.clone()));
    }

    fn start(name: &str) -> Stream {
        let (sender, receiver) = channel::<Work>();
        let run = move || {
            let mut failure: Option<Error> = None;
            for work in receiver {
                match work {
                    // The arrays keep the error for their readers, too.
                    Work::Eval(arrays) => failure = failure.or(eval_caught(&arrays).err()),
                    // Whoever waited may be gone.
                    Work::Wait(answer) => drop(answer.send(failure.take().map_or(Ok(()), Err))),
                }
            }
        };
        std::thread::Builder::new()
            .name(format!("mica-stream-{name}"))
            .spawn(run)
            .expect("the system can start a thread");
        Stream(Arc::new(Inner { name: name.to_string(), queue: Mutex::new(sender) }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Starts computing these arrays, after all that this stream was given before, and returns at
    /// once. A failure is returned by whoever reads the arrays, and by [`Stream::synchronize`].
    pub fn async_eval(&self, arrays: &[Array]) {
        self.send(Work::Eval(arrays.to_vec()));
    }

    /// Waits until everything that this stream was given is done.
    ///
    /// # Errors
    /// The first failure since the last call.
    pub fn synchronize(&self) -> Result<()> {
        let (sender, receiver) = channel();
        self.send(Work::Wait(sender));
        receiver.recv().expect("a stream's thread lives as long as the stream")
    }

    /// Makes this the current stream of this thread while `work` runs.
    pub fn with<R>(&self, work: impl FnOnce() -> R) -> R {
        /// Takes the stream away again, also when the work panics.
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                OWN.with_borrow_mut(|own| own.current.pop());
            }
        }
        OWN.with_borrow_mut(|own| own.current.push(self.clone()));
        let _end = End;
        work()
    }

    fn send(&self, work: Work) {
        let queue = self.0.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        queue.send(work).expect("a stream's thread lives as long as the stream");
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?})", self.0.name)
    }
}

impl PartialEq for Stream {
    fn eq(&self, other: &Stream) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Stream {}

/// A stream that is another one in every thread.
///
/// ```
/// use mica_array::{Stream, ThreadLocalStream};
///
/// let own = ThreadLocalStream::new("own");
/// assert_eq!(own.get(), own.get());
/// let (mine, other) = std::thread::scope(|scope| (own.get(), scope.spawn(|| own.get()).join().unwrap()));
/// assert_ne!(mine, other);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadLocalStream {
    name: String,
    number: u64,
}

impl ThreadLocalStream {
    /// One that is like no other, also of the same name.
    pub fn new(name: &str) -> ThreadLocalStream {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        ThreadLocalStream { name: name.to_string(), number: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// This thread's stream, which lives as long as the thread.
    pub fn get(&self) -> Stream {
        let start = || Stream::start(&self.name);
        OWN.with_borrow_mut(|own| own.local.entry(self.number).or_insert_with(start).clone())
    }
}

/// Forgets the streams that this thread asked for first, its own ones and its default. Work that
/// they were given is done; whoever still holds one may go on using it, but its name means a new
/// one from now on.
pub fn clear_streams() {
    let here = std::thread::current().id();
    named().retain(|_, (thread, _)| *thread != here);
    OWN.with_borrow_mut(|own| {
        own.local.clear();
        own.default = None;
    });
}

/// The functions of custom ops may panic, which must not end the stream.
fn eval_caught(arrays: &[Array]) -> Result<()> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| eval(arrays)))
        .unwrap_or_else(|_| Err(Error::Kernel("a function that is called while evaluating panicked".into())))
}

/// Starts computing on the current stream and returns at once: [`Stream::async_eval`].
pub fn async_eval(arrays: &[Array]) {
    Stream::current().async_eval(arrays);
}

/// Waits until everything given to the current stream is done: [`Stream::synchronize`].
///
/// # Errors
/// The first failure since the last call.
pub fn synchronize() -> Result<()> {
    Stream::current().synchronize()
}
