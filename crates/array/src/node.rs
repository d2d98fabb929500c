//! The node of the lazy graph behind an array.
//!
//! Graphs are made of many small nodes, so what a node costs counts: it is allocated once and used again after it
//! died, it is read without a lock once it is computed, and counting its handles is all that a handle costs.

use std::cell::{RefCell, UnsafeCell};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use smallvec::SmallVec;
use triomphe::{Arc, UniqueArc};

use crate::op::Op;
use crate::storage::{Spec, Storage};
use crate::{Array, Error, Result};

/// The inputs of a node.
pub(crate) type Inputs = SmallVec<[Array; 3]>;

pub(crate) struct Node {
    first: Spec,
    more: Option<Box<[Spec]>>,
    state: UnsafeCell<State>,
    /// The evaluation that last visited this node; written under the engine's lock alone.
    pub(crate) mark: AtomicU64,
    /// One bit per output to which a handle was made; others need not be computed.
    wanted: AtomicU32,
    /// One of the phases below; says who may touch the state.
    phase: AtomicU8,
}

/// [`State::Lazy`], and nobody looks.
const LAZY: u8 = 0;
/// [`State::Lazy`], and one thread reads or changes it.
const HELD: u8 = 1;
/// [`State::Ready`], for good: anybody may read.
const READY: u8 = 2;
/// [`State::Failed`], for good: anybody may read.
const FAILED: u8 = 3;

const fn may_be_shared<T: Send + Sync>() {}
const _: () = may_be_shared::<State>();

// SAFETY: the state is changed only by who has moved the phase from LAZY to HELD, read only by that thread or once the
// phase is READY or FAILED, which never ends. What it holds may be sent and shared.
unsafe impl Sync for Node {}

pub(crate) enum State {
    /// Not computed: an op on inputs.
    Lazy { op: Op, inputs: Inputs },
    /// Computed, or planned by the run that the buffers name.
    Ready(SmallVec<[Storage; 1]>),
    /// Computing failed; every reader gets the error.
    Failed(Error),
}

impl State {
    fn phase(&self) -> u8 {
        match self {
            State::Lazy { .. } => LAZY,
            State::Ready(_) => READY,
            State::Failed(_) => FAILED,
        }
    }
}

/// Nodes that died, for those made next. So many are kept by each thread: some 3 MB.
const SPARES: usize = 16 * 1024;

thread_local! {
    static SPARE: RefCell<Vec<UniqueArc<Node>>> = const { RefCell::new(Vec::new()) };
}

impl Node {
    #[inline]
    pub(crate) fn new(first: Spec, more: Option<Box<[Spec]>>, state: State) -> Arc<Node> {
        let phase = state.phase();
        // None at the end of a thread.
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop()).ok().flatten();
        let Some(mut node) = spare else {
            return Arc::new(Node {
                first,
                more,
                state: UnsafeCell::new(state),
                mark: AtomicU64::new(0),
                wanted: AtomicU32::new(1),
                phase: AtomicU8::new(phase),
            });
        };
        node.first = first;
        node.more = more;
        *node.state.get_mut() = state;
        *node.mark.get_mut() = 0;
        *node.wanted.get_mut() = 1;
        *node.phase.get_mut() = phase;
        node.shareable()
    }

    /// Waits until nobody looks at a lazy state and takes it; `false` if the state is final.
    #[inline]
    fn hold(&self) -> bool {
        let mut looks = 0u32;
        loop {
            match self.phase.load(Ordering::Acquire) {
                READY | FAILED => return false,
                LAZY if self.take() => return true,
                _ => {}
            }
            looks += 1;
            // Whoever holds it clones an op or plans one step; it may have lost its core meanwhile.
            if looks < 64 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }

    #[inline]
    fn take(&self) -> bool {
        self.phase.compare_exchange_weak(LAZY, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// The state; while it is lazy, other threads wait until this is dropped.
    #[inline]
    pub(crate) fn state(&self) -> StateRef<'_> {
        StateRef { held: self.hold(), node: self }
    }

    /// What was computed, if it was: without a lock.
    #[inline]
    pub(crate) fn ready(&self) -> Option<&[Storage]> {
        if self.phase.load(Ordering::Acquire) != READY {
            return None;
        }
        // SAFETY: READY is final.
        match unsafe { &*self.state.get() } {
            State::Ready(storage) => Some(storage),
            _ => None,
        }
    }

    /// Changes a lazy state, and gives what it was. A final state stays, and the new one is given back.
    pub(crate) fn replace(&self, state: State) -> State {
        self.replace_if(state, |_| true)
    }

    /// [`Node::replace`] if the present state is lazy and `is_due`.
    pub(crate) fn replace_if(&self, state: State, is_due: impl FnOnce(&State) -> bool) -> State {
        if !self.hold() {
            return state;
        }
        // SAFETY: held, so this thread alone looks at it.
        let present = unsafe { &mut *self.state.get() };
        if !is_due(present) {
            self.phase.store(LAZY, Ordering::Release);
            return state;
        }
        let phase = state.phase();
        let former = std::mem::replace(present, state);
        self.phase.store(phase, Ordering::Release);
        former
    }

    /// The error, if computing this failed.
    #[inline]
    pub(crate) fn failure(&self) -> Option<Error> {
        if self.phase.load(Ordering::Acquire) != FAILED {
            return None;
        }
        // SAFETY: FAILED is final.
        match unsafe { &*self.state.get() } {
            State::Failed(error) => Some(error.clone()),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn outputs(&self) -> usize {
        1 + self.more.as_ref().map_or(0, |more| more.len())
    }

    #[inline]
    pub(crate) fn spec(&self, output: usize) -> &Spec {
        if output == 0 { &self.first } else { &self.more.as_ref().expect("output exists")[output - 1] }
    }

    pub(crate) fn want(&self, output: usize) {
        self.wanted.fetch_or(bit(output), Ordering::Relaxed);
    }

    pub(crate) fn wants(&self, output: usize) -> bool {
        self.wanted.load(Ordering::Relaxed) & bit(output) != 0
    }

    /// Empties it.
    fn take_inputs(&mut self) -> Inputs {
        match std::mem::replace(self.state.get_mut(), State::Ready(SmallVec::new())) {
            State::Lazy { inputs, .. } => inputs,
            _ => Inputs::new(),
        }
    }
}

/// The bit of an output; all from the 32nd on share one, since wanting too much is no error.
fn bit(output: usize) -> u32 {
    1 << output.min(31)
}

/// A look at a node's state.
pub(crate) struct StateRef<'a> {
    node: &'a Node,
    held: bool,
}

impl Deref for StateRef<'_> {
    type Target = State;

    #[inline]
    fn deref(&self) -> &State {
        // SAFETY: held, or final.
        unsafe { &*self.node.state.get() }
    }
}

impl StateRef<'_> {
    /// Gives a lazy node its values; the op and the inputs go.
    pub(crate) fn finish(self, storage: SmallVec<[Storage; 1]>) {
        if !self.held {
            return;
        }
        let node = ManuallyDrop::new(self).node;
        // SAFETY: held, so this thread alone looks at it.
        let present = unsafe { &mut *node.state.get() };
        let inputs = match present {
            State::Lazy { inputs, .. } => std::mem::take(inputs),
            _ => Inputs::new(),
        };
        *present = State::Ready(storage);
        node.phase.store(READY, Ordering::Release);
        // What only this node held goes last: others may be waiting.
        drop(inputs);
    }
}

impl Drop for StateRef<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.held {
            self.node.phase.store(LAZY, Ordering::Release);
        }
    }
}

/// A handle on a node. The last one takes the node with it, and what only that node held; without recursion, however
/// long the chain.
#[derive(Clone)]
pub(crate) struct Handle(ManuallyDrop<Arc<Node>>);

impl Handle {
    #[inline]
    pub(crate) fn new(node: Arc<Node>) -> Handle {
        Handle(ManuallyDrop::new(node))
    }

    /// Whether there is no other handle on the node.
    #[inline]
    pub(crate) fn is_only(&self) -> bool {
        self.0.is_unique()
    }

    pub(crate) fn pointer(&self) -> *const Node {
        self.0.as_ptr()
    }

    #[inline]
    fn into_node(self) -> Arc<Node> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: taken once, here: `this` is forgotten.
        unsafe { ManuallyDrop::take(&mut this.0) }
    }
}

impl Deref for Handle {
    type Target = Node;

    #[inline]
    fn deref(&self) -> &Node {
        &self.0
    }
}

impl Drop for Handle {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: taken once, here.
        let node = unsafe { ManuallyDrop::take(&mut self.0) };
        if let Some(node) = Arc::into_unique(node) {
            bury(node);
        }
    }
}

/// Takes apart a node that nobody has any more, and those that only it held.
fn bury(mut node: UniqueArc<Node>) {
    let mut stack = node.take_inputs();
    keep(node);
    while let Some(array) = stack.pop() {
        if let Some(mut node) = Arc::into_unique(array.into_handle().into_node()) {
            stack.extend(node.take_inputs());
            keep(node);
        }
    }
}

/// Keeps an empty node for the next one that is made here.
fn keep(node: UniqueArc<Node>) {
    // At the end of a thread, and beyond what is kept, it is dropped.
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < SPARES {
            spare.push(node);
        }
    });
}

/// The error of a reader that found a lazy node.
pub(crate) fn not_computed() -> Error {
    Error::Kernel("an input was not computed".into())
}

/// What one output of a computed node holds.
#[inline]
pub(crate) fn ready(node: &Node, output: usize) -> Result<&Storage> {
    match node.ready() {
        Some(storage) => Ok(&storage[output]),
        None => Err(node.failure().unwrap_or_else(not_computed)),
    }
}
