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
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};

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

/// The streams that were asked for by name, and the one that is used when none is.
fn named() -> &'static Mutex<BTreeMap<String, Stream>> {
    static NAMED: OnceLock<Mutex<BTreeMap<String, Stream>>> = OnceLock::new();
    NAMED.get_or_init(Mutex::default)
}

thread_local! {
    static CURRENT: RefCell<Vec<Stream>> = const { RefCell::new(Vec::new()) };
}

impl Stream {
    /// The stream of this name: the same one whenever and wherever it is asked for.
    pub fn named(name: &str) -> Stream {
        let mut named = named().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        named.entry(name.to_string()).or_insert_with(|| Stream::start(name)).clone()
    }

    /// The stream that this thread uses if none is named: that of the innermost [`Stream::with`],
    /// else the process's default stream.
    pub fn current() -> Stream {
        let innermost = CURRENT.with_borrow(|stack| stack.last().cloned());
        innermost.unwrap_or_else(|| Stream::named("default"))
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
                CURRENT.with_borrow_mut(Vec::pop);
            }
        }
        CURRENT.with_borrow_mut(|stack| stack.push(self.clone()));
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
