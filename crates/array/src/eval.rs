//! Evaluation: from a lazy graph to values.
//!
//! One evaluation at a time holds the engine. It walks the graph depth-first without recursion,
//! gives each node its memory in the order in which nodes will run, and detaches inputs as soon as
//! they are consumed, so that dead buffers serve the nodes after them. The steps that the backend is
//! given this way form a plan, which it runs in one go; very large graphs run in several plans.
//!
//! Values may be read once the run that writes them is complete: buffers carry the number of
//! their run ([`Buffer::epoch`]).

mod recording;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use mica_threads::Pool;
use smallvec::SmallVec;

use crate::backend::{Backend, OperandRef, StepRef, cpu::Cpu};
use crate::kv::{PagedStep, Sequences};
use crate::node::{Node, State, ready};
use crate::op::{Op, Precision};
use crate::packed::PackedWeight;
use crate::shape::{Strides, broadcast_strides, same};
use crate::storage::{Buffer, HostStorage, Spec, Storage};
use crate::{Array, Error, Result, memory};

use recording::Recording;
pub(crate) use recording::{Outcome, Recorded, own_buffer};

/// Steps per plan. Enough that entering the pool costs nothing, few enough that the plan of a
/// million-node graph needs no memory to speak of.
const PLAN_STEPS: usize = 2048;
/// The same of a plan that is to be kept, which can't be cut.
const KEPT_STEPS: usize = 16 * 1024;
/// Nodes of a walk for which the memory is kept until the next one.
const KEPT_ORDER: usize = 64 * 1024;

/// The number of the last run that is complete.
static COMPLETED: AtomicU64 = AtomicU64::new(0);
/// Runs that failed, whose buffers hold nothing.
static FAILED: Mutex<BTreeMap<u64, Error>> = Mutex::new(BTreeMap::new());
/// Whether there are any: it is asked for every operand.
static ANY_FAILED: AtomicBool = AtomicBool::new(false);

struct Engine {
    backend: Box<dyn Backend>,
    /// The run that is being planned.
    epoch: u64,
    /// Marks nodes that the present walk has seen.
    walk: u64,
    /// Steps of the present plan.
    steps: usize,
    /// What steps of the plan read besides buffers, alive until it has run.
    weights: Vec<Arc<PackedWeight>>,
    pages: Vec<Arc<PagedStep>>,
    /// Of a plan that is to be kept.
    recording: Option<Recording>,
    /// Counts backends.
    backends: u64,
    /// The memory of walks, for the next one's.
    visits: Vec<Visit>,
    order: Vec<NodePointer>,
}

static ENGINE: Mutex<Option<Engine>> = Mutex::new(None);

thread_local! {
    static EVALUATING: Cell<bool> = const { Cell::new(false) };
}

fn engine() -> MutexGuard<'static, Option<Engine>> {
    let mut engine = lock();
    engine.get_or_insert_with(|| Engine::new(Box::new(default_backend())));
    engine
}

fn lock() -> MutexGuard<'static, Option<Engine>> {
    ENGINE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// With `MICA_THREADS` threads, or one for each physical (or performance) core that this process may use; with fewer
/// if the system does not start so many, which is said.
fn default_backend() -> Cpu {
    let asked = threads_of_environment().unwrap_or_else(|error| {
        eprintln!("mica: {error}; it is ignored");
        None
    });
    let (backend, error) = Cpu::up_to(asked.unwrap_or_else(mica_threads::default_threads));
    if let Some(error) = error {
        eprintln!("mica: {error}; computing with {}", backend.threads());
    }
    backend
}

/// What the variable `MICA_THREADS` asks for, if it is set (and not empty).
///
/// # Errors
/// It is no number from 1 to 1024, in words.
pub fn threads_of_environment() -> std::result::Result<Option<usize>, String> {
    let Some(text) = std::env::var_os("MICA_THREADS").filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    parse_threads(&text.to_string_lossy()).map(Some)
}

fn parse_threads(text: &str) -> std::result::Result<usize, String> {
    match text.trim().parse() {
        Ok(threads @ 1..=1024) => Ok(threads),
        _ => Err(format!("MICA_THREADS must be a number from 1 to 1024, got {text:?}")),
    }
}

/// Sets how many threads compute, from the next evaluation on. Results do not depend on it.
///
/// # Errors
/// [`Error::Threads`]: the system does not start so many. Nothing has changed then.
pub fn set_threads(threads: usize) -> Result<()> {
    set_backend(Box::new(Cpu::new(threads)?));
    Ok(())
}

/// How many threads compute.
pub fn threads() -> usize {
    engine().as_ref().expect("made by engine()").backend.threads()
}

/// Sets the backend that computes, from the next evaluation on.
pub fn set_backend(backend: Box<dyn Backend>) {
    match &mut *lock() {
        Some(engine) => {
            engine.backend = backend;
            engine.backends += 1;
        }
        // The threads of a default backend are not even started.
        none => *none = Some(Engine::new(backend)),
    }
}

/// Work on the backend's pool that is no op of a graph: repacking weights, measuring the machine. Evaluations wait
/// meanwhile, so `work` must not evaluate. A backend that has no pool leaves the work to the calling thread.
pub fn with_pool<R>(work: impl FnOnce(&Pool) -> R) -> R {
    let engine = engine();
    match engine.as_ref().expect("made by engine()").backend.pool() {
        Some(pool) => work(pool),
        None => work(&Pool::new(1)),
    }
}

/// Computes these arrays and all that they need.
///
/// # Errors
/// The first error of the graph: of an op that could not be built, of a kernel, of memory. The
/// arrays that failed keep it.
pub fn eval(arrays: &[Array]) -> Result<()> {
    if arrays.iter().all(is_done) {
        return Ok(());
    }
    evaluating(|engine| engine.eval(arrays))
}

/// Computes `outputs` and `others`, and gives what computes them again once there are other values in the memory of
/// `inputs`.
pub(crate) fn record(inputs: &[Array], outputs: &[Array], others: &[Array]) -> Result<Outcome> {
    evaluating(|engine| {
        let roots: Vec<Array> = others.iter().chain(outputs).cloned().collect();
        engine.recording = may_keep_plans().then(Recording::default);
        let result = engine.compute(&roots);
        let recording = engine.recording.take();
        drop(roots);
        result?;
        Ok(recording.map_or(Outcome::NotKept, |recording| recording.finish(engine.backends, inputs, outputs)))
    })
}

/// Runs a plan again, with these sequences where it attends over pages. Whether it did: not on another backend than the
/// one that kept it, and not while ops are looked at one by one.
pub(crate) fn run_again(recorded: &mut Recorded, sequences: &Sequences) -> Result<bool> {
    evaluating(|engine| {
        if recorded.backend != engine.backends || !may_keep_plans() {
            return Ok(false);
        }
        engine.backend.run_again(recorded.plan.as_mut(), sequences).map(|()| true)
    })
}

/// Whether plans run as a whole, and for their values.
fn may_keep_plans() -> bool {
    !crate::nan::is_checked() && !crate::profile::enabled() && !memory::is_rehearsing()
}

/// Uses the engine to evaluate.
fn evaluating<R>(work: impl FnOnce(&mut Engine) -> Result<R>) -> Result<R> {
    if EVALUATING.with(Cell::get) {
        return Err(Error::unsupported("eval", "called from inside an evaluation"));
    }
    /// Ends the evaluation, also when a custom op panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            EVALUATING.with(|flag| flag.set(false));
        }
    }
    let mut guard = engine();
    EVALUATING.with(|flag| flag.set(true));
    let _end = End;
    work(guard.as_mut().expect("made by engine()"))
}

fn is_done(array: &Array) -> bool {
    match array.node().ready().map(|storage| &storage[array.output()]) {
        Some(Storage::Host(host)) => is_complete(&host.buffer),
        Some(Storage::Packed(_)) => true,
        Some(Storage::Absent) | None => false,
    }
}

fn is_complete(buffer: &Buffer) -> bool {
    let epoch = buffer.epoch();
    epoch == 0 || (epoch <= COMPLETED.load(Ordering::Acquire) && !has_failed(epoch))
}

#[inline]
fn has_failed(epoch: u64) -> bool {
    ANY_FAILED.load(Ordering::Acquire) && FAILED.lock().is_ok_and(|failed| failed.contains_key(&epoch))
}

fn rehearsed() -> Error {
    Error::unsupported("eval", "an array that was only rehearsed has no values")
}

/// Waits until the run that writes this buffer is complete.
pub(crate) fn wait_for(buffer: &Buffer) -> Result<()> {
    if buffer.is_rehearsed() {
        return Err(rehearsed());
    }
    let epoch = buffer.epoch();
    if epoch > COMPLETED.load(Ordering::Acquire) {
        // Whoever runs it holds the engine.
        drop(engine());
    }
    match FAILED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get(&epoch) {
        Some(error) => Err(error.clone()),
        None => Ok(()),
    }
}

/// A pointer to a node that the roots, or a consumer that has not been planned yet, keep alive.
#[derive(Clone, Copy, PartialEq)]
struct NodePointer(*const Node);

// SAFETY: an address; who follows it says why the node is alive.
unsafe impl Send for NodePointer {}

/// Over how many nodes a product moves to stand behind another.
const MOVED: usize = 32;

/// A node before its inputs, and after them.
enum Visit {
    Enter(NodePointer),
    Leave(NodePointer),
    /// An int8 product, with the node and the output that are its rows.
    LeaveProduct(NodePointer, (NodePointer, usize)),
}

impl NodePointer {
    fn of(array: &Array) -> NodePointer {
        NodePointer(array.node().pointer())
    }

    /// # Safety
    /// The node is alive.
    unsafe fn get<'a>(self) -> &'a Node {
        // SAFETY: promised by the caller.
        unsafe { &*self.0 }
    }
}

impl Engine {
    fn new(backend: Box<dyn Backend>) -> Engine {
        Engine {
            backend,
            epoch: 1,
            walk: 0,
            steps: 0,
            weights: Vec::new(),
            pages: Vec::new(),
            recording: None,
            backends: 0,
            visits: Vec::new(),
            order: Vec::new(),
        }
    }

    fn eval(&mut self, roots: &[Array]) -> Result<()> {
        // One is left if what was to be recorded has panicked.
        self.recording = None;
        self.compute(roots)
    }

    fn compute(&mut self, roots: &[Array]) -> Result<()> {
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        let result = self.find_order(roots, &mut order).and_then(|()| {
            memory::begin_planning();
            let result = self.run(&order);
            memory::end_planning();
            result
        });
        // A walk over a very large graph does not keep its memory for good.
        order.clear();
        order.shrink_to(KEPT_ORDER);
        self.order = order;
        result
    }

    /// The nodes to compute, inputs first.
    fn find_order(&mut self, roots: &[Array], order: &mut Vec<NodePointer>) -> Result<()> {
        self.walk += 1;
        let mut stack = std::mem::take(&mut self.visits);
        // The rows of the last product, and the place behind it.
        let mut last = ((NodePointer(std::ptr::null()), 0), 0);
        stack.clear();
        stack.extend(roots.iter().rev().map(|root| Visit::Enter(NodePointer::of(root))));
        while let Some(visit) = stack.pop() {
            let pointer = match visit {
                Visit::Enter(pointer) => pointer,
                Visit::Leave(pointer) => {
                    order.push(pointer);
                    continue;
                }
                // Products of the same rows one behind the other: a backend may make one of them.
                Visit::LeaveProduct(pointer, rows) => {
                    let near = last.0 == rows && order.len() - last.1 <= MOVED;
                    let place = if near { last.1 } else { order.len() };
                    order.insert(place, pointer);
                    last = (rows, place + 1);
                    continue;
                }
            };
            // SAFETY: the roots, and the inputs of nodes that the roots keep alive, are alive; nothing
            // is detached during the walk, and what a custom op is replaced by is entered at once.
            let node = unsafe { pointer.get() };
            if node.mark.load(Ordering::Relaxed) == self.walk {
                continue;
            }
            if node.ready().is_none() {
                let state = node.state();
                match &*state {
                    State::Ready(_) => {}
                    State::Failed(error) => return Err(error.clone()),
                    State::Lazy { op: Op::Tracer(scope), .. } if scope.is_active() => {
                        return Err(Error::Tracing { op: "eval" });
                    }
                    State::Lazy { op: Op::Custom(custom), .. } if !custom.is_expanded() => {
                        drop(state);
                        expand(node)?;
                        // Again, now that its inputs are what it stands for.
                        stack.push(Visit::Enter(pointer));
                        continue;
                    }
                    State::Lazy { op, inputs } => {
                        stack.push(match (op, inputs.as_slice()) {
                            (Op::Linear { precision: Precision::Fast }, [x, weight])
                                if weight.node().ready().is_some() =>
                            {
                                Visit::LeaveProduct(pointer, (NodePointer::of(x), x.output()))
                            }
                            _ => Visit::Leave(pointer),
                        });
                        // Copies that nobody else has: no gradient asked for them.
                        let needless = |index, input: &Array| {
                            matches!(op, Op::SavedAs) && index > 0 && input.node().is_only()
                        };
                        // The first input on top: it is entered first.
                        for (index, input) in inputs.iter().enumerate().rev() {
                            if input.node().ready().is_none() && !needless(index, input) {
                                stack.push(Visit::Enter(NodePointer::of(input)));
                            }
                        }
                    }
                }
            }
            node.mark.store(self.walk, Ordering::Relaxed);
        }
        stack.shrink_to(KEPT_ORDER);
        self.visits = stack;
        Ok(())
    }

    fn run(&mut self, order: &[NodePointer]) -> Result<()> {
        self.begin();
        for &pointer in order {
            // SAFETY: a node in the order is kept alive by the roots or by a consumer that comes
            // later in the order and has not been planned yet.
            let node = unsafe { pointer.get() };
            if let Err(error) = self.plan(node) {
                drop(node.replace(State::Failed(error.clone())));
                self.recording = None;
                self.flush()?;
                return Err(error);
            }
            if self.steps >= self.recording.as_ref().map_or(PLAN_STEPS, |_| KEPT_STEPS) {
                self.recording = None;
                self.flush()?;
            } else if memory::is_crowded() && self.steps > 0 {
                // What died in this plan can be given back once it has run.
                self.recording = None;
                self.flush()?;
                memory::end_planning();
                memory::begin_planning();
            }
        }
        self.flush()
    }

    fn begin(&mut self) {
        match self.recording {
            Some(_) => self.backend.begin_kept(),
            None => self.backend.begin(),
        }
        self.steps = 0;
        self.weights.clear();
        self.pages.clear();
    }

    /// Runs the plan; afterwards its buffers may be read.
    fn flush(&mut self) -> Result<()> {
        let result = match self.steps {
            0 => Ok(()),
            _ if memory::is_rehearsing() => self.backend.rehearse(),
            _ => match &mut self.recording {
                Some(recording) => self.backend.keep().map(|plan| {
                    if let Some(plan) = plan {
                        recording.keep(plan, std::mem::take(&mut self.weights));
                    }
                }),
                None => self.backend.run(),
            },
        };
        if let Err(error) = &result {
            let mut failed = FAILED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            failed.insert(self.epoch, error.clone());
            ANY_FAILED.store(true, Ordering::Release);
        }
        COMPLETED.store(self.epoch, Ordering::Release);
        self.epoch += 1;
        self.begin();
        result
    }

    /// Gives a node its outputs: views of its inputs, or memory that a step of the plan writes.
    fn plan(&mut self, node: &Node) -> Result<()> {
        // Held until the node has its values: nobody may take a handle on an input whose memory an output takes.
        let state = node.state();
        let State::Lazy { op, inputs } = &*state else { return Ok(()) };
        let mut storages: SmallVec<[Storage; 1]> = SmallVec::new();
        match view(op, node.spec(0), inputs) {
            Some(storage) => storages.push(storage),
            None if matches!(op, Op::Custom(_)) => storages = tuple(node, inputs)?,
            None => self.plan_step(node, op, inputs, &mut storages)?,
        };
        // The op and its inputs are dropped here: what only they held may serve the next node.
        state.finish(storages);
        Ok(())
    }

    fn plan_step(
        &mut self,
        node: &Node,
        op: &Op,
        inputs: &[Array],
        storages: &mut SmallVec<[Storage; 1]>,
    ) -> Result<()> {
        let rehearsing = memory::is_rehearsing();
        let mut operands: SmallVec<[OperandRef; 3]> = SmallVec::new();
        // The first inputs whose memory nobody else has, a bit each: an output may take it.
        let mut free = 0u32;
        for (index, input) in inputs.iter().enumerate() {
            let storage = ready(input.node(), input.output())?;
            let spec = input.spec();
            operands.push(OperandRef::new(spec, storage));
            match storage {
                Storage::Host(host) => {
                    if host.buffer.is_rehearsed() && !rehearsing {
                        return Err(rehearsed());
                    }
                    if has_failed(host.buffer.epoch()) {
                        return wait_for(&host.buffer);
                    }
                    if let Some(recording) = &mut self.recording {
                        recording.reads(&host.buffer, self.epoch);
                    }
                    let only = input.node().is_only() && host.buffer.is_unique();
                    if only && host.offset == 0 && host.is_contiguous(&spec.shape) {
                        free |= 1u32.checked_shl(index as u32).unwrap_or(0);
                    }
                }
                Storage::Packed(weight) => self.weights.push(weight.clone()),
                Storage::Absent => {
                    return Err(Error::Kernel("an output was read that was never asked for".into()));
                }
            }
        }
        if let Op::PagedAttention(step) = op {
            self.pages.push(step.clone());
            if self.recording.as_mut().is_some_and(|recording| !recording.attends(step, inputs[0].dim(1))) {
                self.recording = None;
            }
        }
        for output in 0..node.outputs() {
            let spec = node.spec(output);
            if output > 0 && !node.wants(output) {
                storages.push(Storage::Absent);
                continue;
            }
            let buffer = match self.donor(op, inputs, &mut free, output, spec) {
                Some(buffer) => buffer.clone(),
                // What is empty, as tokens of caches are, may outlive a plan that is kept: not in its memory.
                None => {
                    let planner = self.recording.is_none() || spec.bytes() > 0;
                    triomphe::Arc::new(Buffer::new(spec.bytes(), planner)?)
                }
            };
            buffer.set_epoch(self.epoch);
            if let Some(recording) = &mut self.recording
                && spec.bytes() > 0
            {
                recording.writes(&buffer);
            }
            storages.push(Storage::Host(HostStorage::contiguous(buffer, &spec.shape)));
        }
        self.give(node, op, &operands, storages)
    }

    /// The memory of a free input that this output may take; the input is free no more.
    #[inline]
    fn donor<'a>(
        &self,
        op: &Op,
        inputs: &'a [Array],
        free: &mut u32,
        output: usize,
        spec: &Spec,
    ) -> Option<&'a triomphe::Arc<Buffer>> {
        let mut left = *free;
        while left != 0 {
            let index = left.trailing_zeros() as usize;
            left &= left - 1;
            let input = &inputs[index];
            let fits = input.dtype() == spec.dtype
                && (same(input.shape(), &spec.shape) || input.nbytes() == spec.bytes());
            if fits && self.backend.aliases_output(op, index, output) {
                *free &= !(1 << index);
                return match ready(input.node(), input.output()) {
                    Ok(Storage::Host(host)) => Some(&host.buffer),
                    _ => None,
                };
            }
        }
        None
    }

    /// Gives the backend a step.
    fn give(&mut self, node: &Node, op: &Op, inputs: &[OperandRef], storages: &[Storage]) -> Result<()> {
        let outputs: SmallVec<[OperandRef; 2]> = storages
            .iter()
            .enumerate()
            .map(|(output, storage)| OperandRef::new(node.spec(output), storage))
            .collect();
        let step = StepRef { op, inputs, outputs: &outputs };
        if crate::nan::is_checked() && !memory::is_rehearsing() {
            return self.run_checked(&step);
        }
        self.backend.step(&step)?;
        self.steps += 1;
        Ok(())
    }

    /// Runs one step here and now, and looks whether it made a NaN.
    fn run_checked(&mut self, step: &StepRef) -> Result<()> {
        let copy = step.to_step();
        // Before it runs: the output may take an input's memory.
        let given = crate::nan::in_inputs(&copy)?;
        self.backend.step(step)?;
        self.backend.run()?;
        crate::nan::check_outputs(&copy, given)
    }
}

/// Expands all custom ops under these arrays.
pub(crate) fn expand_all(arrays: &[Array]) -> Result<()> {
    let mut seen: std::collections::HashSet<usize> = std::collections::HashSet::new();
    let mut stack: Vec<Array> = arrays.to_vec();
    while let Some(array) = stack.pop() {
        if seen.insert(array.id()) {
            expand(array.node())?;
            if let State::Lazy { inputs, .. } = &*array.node().state() {
                stack.extend(inputs.iter().cloned());
            }
        }
    }
    Ok(())
}

/// Replaces a custom op by what it expands to.
fn expand(node: &Node) -> Result<()> {
    let due =
        |state: &State| matches!(state, State::Lazy { op: Op::Custom(custom), .. } if !custom.is_expanded());
    let (custom, inputs) = match &*node.state() {
        State::Lazy { op: Op::Custom(custom), inputs } if !custom.is_expanded() => {
            (custom.clone(), inputs.clone())
        }
        _ => return Ok(()),
    };
    let outputs = custom.expand(&inputs)?;
    if outputs.len() != node.outputs() {
        return Err(Error::invalid(
            custom.name(),
            format!("promised {} outputs, expanded to {}", node.outputs(), outputs.len()),
        ));
    }
    let op = Op::Custom(Arc::new(Expanded(custom.name())));
    // Another thread may have been faster.
    drop(node.replace_if(State::Lazy { op, inputs: outputs.into() }, due));
    Ok(())
}

/// What is left of a custom op once it is expanded: its inputs are its outputs.
#[derive(Debug)]
struct Expanded(&'static str);

impl crate::ops::custom::CustomOp for Expanded {
    fn name(&self) -> &'static str {
        self.0
    }

    fn is_expanded(&self) -> bool {
        true
    }

    fn expand(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        Ok(inputs.to_vec())
    }

    fn vjp(&self, _: &[Array], _: &[Array], _: &[Option<Array>]) -> Result<Vec<Option<Array>>> {
        Err(Error::Tracing { op: self.0 })
    }
}

fn tuple(node: &Node, inputs: &[Array]) -> Result<SmallVec<[Storage; 1]>> {
    inputs
        .iter()
        .enumerate()
        .map(|(output, input)| {
            let expected = node.spec(output);
            if expected.shape.as_slice() != input.shape() || expected.dtype != input.dtype() {
                return Err(Error::invalid(
                    "custom",
                    format!("output {output} should be {expected:?}, got {input:?}"),
                ));
            }
            ready_storage(input)
        })
        .collect()
}

/// What an array that has been computed holds.
pub(crate) fn ready_storage(array: &Array) -> Result<Storage> {
    ready(array.node(), array.output()).cloned()
}

/// The result of an op that only looks at its input's memory in another way.
fn view(op: &Op, spec: &Spec, inputs: &[Array]) -> Option<Storage> {
    let input = inputs.first()?;
    let viewable = op.is_view() || matches!(op, Op::Reshape | Op::Contiguous | Op::Bitcast);
    if !viewable {
        return None;
    }
    let host = match ready(input.node(), input.output()).ok()? {
        Storage::Host(host) => host,
        packed @ Storage::Packed(_) if matches!(op, Op::Tracer(_) | Op::StopGradient | Op::After) => {
            return Some(packed.clone());
        }
        _ => return None,
    };
    let shape = input.shape();
    let (offset, strides): (isize, Strides) = match op {
        Op::Tracer(_) | Op::StopGradient | Op::After | Op::SavedAs => (0, host.strides.clone()),
        Op::Transpose(order) => (0, order.iter().map(|&axis| host.strides[axis]).collect()),
        Op::Broadcast => (0, broadcast_strides(shape, &host.strides, &spec.shape)),
        Op::Slice { start, step } => (
            start.iter().zip(&host.strides).map(|(&at, &stride)| at as isize * stride).sum(),
            step.iter().zip(&host.strides).map(|(&step, &stride)| step * stride).collect(),
        ),
        Op::Contiguous if host.is_contiguous(shape) => (0, host.strides.clone()),
        Op::Reshape => (0, reshape_strides(shape, &host.strides, &spec.shape)?),
        Op::Bitcast => (0, bitcast_strides(host, input, spec)?),
        Op::AsStrided { strides, offset } if host.is_contiguous(shape) => (*offset as isize, strides.clone()),
        _ => return None,
    };
    // An empty slice may start past the end; its offset is never used.
    let offset = if spec.shape.contains(&0) { 0 } else { offset };
    let offset = (host.offset as isize + offset * spec.dtype.size() as isize) as usize;
    Some(Storage::Host(HostStorage { buffer: host.buffer.clone(), offset, strides }))
}

/// Strides with which the same bytes are elements of another size, if there are any.
fn bitcast_strides(host: &HostStorage, input: &Array, spec: &Spec) -> Option<Strides> {
    let (from, to) = (input.dtype().size(), spec.dtype.size());
    if from == to {
        return Some(host.strides.clone());
    }
    // Elements must start at multiples of their size.
    let dense = host.is_contiguous(input.shape()) && host.offset.is_multiple_of(to);
    dense.then(|| mica_kernels::view::contiguous_strides(&spec.shape).as_slice().into())
}

/// Strides with which the same memory has another shape, if there are any.
fn reshape_strides(shape: &[usize], strides: &[isize], to: &[usize]) -> Option<Strides> {
    if shape.contains(&0) {
        return Some(mica_kernels::view::contiguous_strides(to).as_slice().into());
    }
    // Runs of dimensions that are dense among themselves: (size, stride of the innermost).
    let mut runs: SmallVec<[(usize, isize); 4]> = SmallVec::new();
    for (&size, &stride) in shape.iter().zip(strides) {
        if size == 1 {
            continue;
        }
        match runs.last_mut() {
            Some((run, inner)) if *inner == stride * size as isize => (*run, *inner) = (*run * size, stride),
            _ => runs.push((size, stride)),
        }
    }
    let mut result = Strides::from_elem(0, to.len());
    let mut runs = runs.into_iter().rev();
    let (mut left, mut stride) = (1, 1);
    for (axis, &size) in to.iter().enumerate().rev() {
        if size == 1 {
            result[axis] = stride;
            continue;
        }
        if left == 1 {
            (left, stride) = runs.next()?;
        }
        if left % size != 0 {
            return None;
        }
        result[axis] = stride;
        left /= size;
        stride *= size as isize;
    }
    Some(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshapes_that_need_no_copy() {
        let cases: [(&str, &[usize], &[isize], &[usize], Option<&[isize]>); 6] = [
            ("merge", &[2, 3, 4], &[12, 4, 1], &[6, 4], Some(&[4, 1])),
            ("split", &[6, 4], &[4, 1], &[2, 3, 2, 2], Some(&[12, 4, 2, 1])),
            ("transposed", &[3, 2], &[1, 3], &[6], None),
            ("rows of a wider array", &[2, 4], &[10, 1], &[2, 2, 2], Some(&[10, 2, 1])),
            ("across a gap", &[2, 4], &[10, 1], &[8], None),
            ("broadcast", &[2, 3], &[0, 1], &[2, 1, 3], Some(&[0, 3, 1])),
        ];
        for (name, shape, strides, to, expected) in cases {
            let got = reshape_strides(shape, strides, to);
            assert_eq!(got.as_deref(), expected, "{name}");
        }
    }
}
