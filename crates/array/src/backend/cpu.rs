//! The CPU backend: lowers each step of a plan to kernel tasks, then runs all of them in one entry
//! of the pool.
//!
//! Kernels that need temporary memory say how much; all steps share one workspace, because their
//! tasks run one after another.

mod complex;
mod conv;
mod elementwise;
mod experts;
mod fft;
mod fused;
mod gathered;
mod kept;
mod loss;
mod products;
mod strided;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use mica_kernels::elementwise::Dense;
use mica_kernels::quant::ProductPlan;
use mica_threads::{Pool, Task, TooManyThreads};

use super::{Backend, HostView, Kept, Operand, Step, StepRef};
use crate::kv::Sequences;
use crate::op::Op;
use crate::storage::Buffer;
use crate::{Dtype, Error, Result, memory, profile};

/// Tasks of a step, or a promise of tasks once there is a workspace.
pub(crate) enum Lowered {
    /// In place: graphs of small ops are made of these.
    Dense(Dense),
    Task(Box<dyn Task>),
    Tasks(Vec<Box<dyn Task>>),
    /// Products by one weight, or by several of the same rows.
    Product(ProductPlan<'static>),
    /// Bytes needed, and the function that makes the tasks from a 64-byte aligned pointer to them.
    WithWorkspace(usize, MakeTasks),
}

type MakeTasks = Box<dyn FnOnce(*mut u8, &mut Vec<Box<dyn Task>>) -> Result<()> + Send>;

impl Lowered {
    /// Bytes of workspace that the tasks need.
    fn bytes(&self) -> usize {
        match self {
            Lowered::WithWorkspace(bytes, _) => *bytes,
            Lowered::Product(plan) => plan.workspace_bytes(),
            _ => 0,
        }
    }

    /// Adds the tasks, which may use the workspace.
    fn give(self, workspace: *mut u8, list: &mut Vec<Box<dyn Task>>) -> Result<()> {
        match self {
            Lowered::Dense(task) => list.push(Box::new(task)),
            Lowered::Task(task) => list.push(task),
            Lowered::Tasks(tasks) => list.extend(tasks),
            Lowered::WithWorkspace(_, make) => make(workspace, list)?,
            // SAFETY: the workspace is that large, aligned, and used by one step's tasks at a time.
            Lowered::Product(plan) => unsafe { plan.tasks(workspace, list) },
        }
        Ok(())
    }

    /// Makes the tasks that were promised.
    #[inline]
    fn fulfil(&mut self, workspace: *mut u8) -> Result<()> {
        if let Lowered::WithWorkspace(..) | Lowered::Product(_) = self {
            let mut tasks = Vec::new();
            std::mem::replace(self, Lowered::Tasks(Vec::new())).give(workspace, &mut tasks)?;
            *self = Lowered::Tasks(tasks);
        }
        Ok(())
    }

    /// Adds the tasks to a list.
    fn list<'a>(&'a self, tasks: &mut Vec<&'a dyn Task>) {
        match self {
            Lowered::Dense(task) => tasks.push(task),
            Lowered::Task(task) => tasks.push(task.as_ref()),
            Lowered::Tasks(list) => tasks.extend(list.iter().map(|task| task.as_ref())),
            Lowered::WithWorkspace(..) | Lowered::Product(_) => {}
        }
    }
}

impl From<Box<dyn Task>> for Lowered {
    fn from(task: Box<dyn Task>) -> Lowered {
        Lowered::Task(task)
    }
}

/// Threads of the backend that plans: there is one at a time, and only speed depends on it.
static THREADS: AtomicUsize = AtomicUsize::new(1);

/// After so many steps of a plan the other threads begin with them.
const STARTED: usize = 32;

/// The backend. One pool, used by one plan at a time.
pub struct Cpu {
    pool: Pool,
    /// The steps of the plan, without those that have been started.
    plan: Vec<Lowered>,
    /// The first steps of a long plan: other threads run them while the rest is planned.
    started: Vec<Lowered>,
    /// Their tasks.
    started_tasks: Vec<&'static dyn Task>,
    /// Why they failed, if nobody could be given them and they have run at once.
    failure: Option<Error>,
    /// Bytes of workspace that the plan needs.
    needed: usize,
    /// Of a plan that is rehearsed: bytes of scratch memory that its steps take on all threads at most.
    scratch: usize,
    /// Kept between plans, grown when a plan needs more.
    workspace: Option<Buffer>,
    /// Of a plan that is to be kept.
    notes: Option<kept::Notes>,
}

impl Cpu {
    /// A backend with a pool of so many threads.
    ///
    /// # Errors
    /// [`Error::Threads`]: the system does not start so many.
    pub fn new(threads: usize) -> Result<Cpu> {
        Ok(Cpu::with(Pool::try_new(threads)?))
    }

    /// A backend with a pool of up to so many threads, and why there are fewer, if there are.
    pub fn up_to(threads: usize) -> (Cpu, Option<TooManyThreads>) {
        let (pool, error) = Pool::up_to(threads);
        (Cpu::with(pool), error)
    }

    fn with(pool: Pool) -> Cpu {
        mica_threads::set_account(memory::SCRATCH);
        Cpu {
            pool,
            plan: Vec::new(),
            started: Vec::new(),
            started_tasks: Vec::new(),
            failure: None,
            needed: 0,
            scratch: 0,
            workspace: None,
            notes: None,
        }
    }

    /// Adds a step. Products of the same rows that follow each other become one: the second can't read what the
    /// first writes.
    fn push(&mut self, lowered: Lowered) {
        let lowered = match (self.plan.last_mut(), lowered) {
            (Some(Lowered::Product(last)), Lowered::Product(plan)) => match last.join(plan) {
                Ok(()) => return,
                Err(plan) => Lowered::Product(plan),
            },
            (_, lowered) => lowered,
        };
        self.plan.push(lowered);
    }

    /// Lets the other threads begin with the steps so far; if there are none, or nothing for them, this one does.
    fn start(&mut self) -> Result<()> {
        let pointer = self.workspace()?;
        for lowered in &mut self.plan {
            lowered.fulfil(pointer)?;
        }
        std::mem::swap(&mut self.plan, &mut self.started);
        let mut tasks: Vec<&dyn Task> = Vec::with_capacity(2 * self.started.len());
        self.started.iter().for_each(|lowered| lowered.list(&mut tasks));
        // SAFETY: only the lifetime is erased: steps that were started stay where they are until the pool is done
        // with them.
        self.started_tasks = unsafe { std::mem::transmute::<Vec<&dyn Task>, Vec<&'static dyn Task>>(tasks) };
        // SAFETY: as above.
        let begun = unsafe { self.pool.begin(&self.started_tasks) }.map_err(told)?;
        if !begun {
            // Now, since their memory is that of the workspace, which may have to grow for steps that come.
            self.failure = self.pool.run_all(&self.started_tasks).map_err(told).err();
        }
        Ok(())
    }

    /// Waits for the steps that were started.
    fn finish(&mut self) -> Result<()> {
        let result = self.pool.finish().map_err(told);
        self.started_tasks.clear();
        self.started.clear();
        result
    }

    /// The workspace, as large as the plan needs it.
    fn workspace(&mut self) -> Result<*mut u8> {
        if self.workspace.as_ref().is_none_or(|buffer| buffer.bytes() < self.needed) {
            self.finish()?;
            self.workspace = None;
            self.workspace = Some(Buffer::new(self.needed, false)?);
        }
        Ok(self.workspace.as_ref().expect("made above").pointer())
    }

    fn run_plan(&mut self) -> Result<()> {
        let pointer = self.workspace()?;
        let mut tasks: Vec<&dyn Task> = Vec::with_capacity(self.plan.len());
        for lowered in &mut self.plan {
            lowered.fulfil(pointer)?;
        }
        self.plan.iter().for_each(|lowered| lowered.list(&mut tasks));
        self.pool.finish().map_err(told)?;
        match self.failure.take() {
            Some(error) => Err(error),
            None => self.pool.run_all(&tasks).map_err(told),
        }
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn pool(&self) -> Option<&Pool> {
        Some(&self.pool)
    }

    fn begin(&mut self) {
        // After an error nobody has waited for them yet, and nobody wants them.
        let _ = self.finish();
        THREADS.store(self.pool.threads(), Ordering::Relaxed);
        self.plan.clear();
        (self.needed, self.scratch) = (0, 0);
        self.notes = None;
        self.failure = None;
    }

    fn step(&mut self, step: &StepRef) -> Result<()> {
        if self.plan.len() == STARTED
            && self.started.is_empty()
            && self.notes.is_none()
            && !memory::is_rehearsing()
        {
            self.start()?;
        }
        match elementwise::dense(step) {
            Some(task) => self.plan.push(Lowered::Dense(task?)),
            None => {
                let step = step.to_step();
                let lowered = lower(&step)?;
                if let Some(notes) = &mut self.notes {
                    notes.note(self.plan.len(), &step);
                }
                self.needed = self.needed.max(lowered.bytes());
                if memory::is_rehearsing() {
                    self.scratch = fused::scratch(&step, self.pool.threads())?.max(self.scratch);
                }
                self.push(lowered);
            }
        }
        if profile::enabled() && !memory::is_rehearsing() {
            let begun = Instant::now();
            self.run()?;
            profile::record(&step.to_step(), begun.elapsed());
        }
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        let result = self.run_plan();
        self.begin();
        result
    }

    fn begin_kept(&mut self) {
        self.begin();
        self.notes = Some(kept::Notes::default());
    }

    fn keep(&mut self) -> Result<Option<Box<dyn Kept>>> {
        let result = match self.notes.take() {
            Some(notes) => self.run_and_keep(notes),
            None => self.run_plan().map(|()| None),
        };
        self.begin();
        result
    }

    fn run_again(&mut self, plan: &mut dyn Kept, sequences: &Sequences) -> Result<()> {
        self.run_kept(plan, sequences)
    }

    fn rehearse(&mut self) -> Result<()> {
        let there = self.workspace.as_ref().map_or(0, Buffer::bytes);
        memory::rehearse_workspace(self.needed.saturating_sub(there) + self.scratch);
        self.begin();
        Ok(())
    }

    fn aliases_output(&self, op: &Op, input: usize, output: usize) -> bool {
        match op {
            Op::Unary(_) | Op::Binary(_) | Op::Select => output == 0,
            Op::Fused(region) => region.may_alias(input, output),
            Op::RmsNorm { .. } | Op::Rope(_) | Op::Softmax | Op::PagedAttention(_) => {
                input == 0 && output == 0
            }
            Op::SliceUpdate { .. } | Op::Scatter { .. } | Op::ScatterAlong { .. } => {
                input == 0 && output == 0
            }
            Op::Scan { .. } => input == 0 && output == 0,
            // Parameter, gradient, mean, square → parameter, mean, square.
            Op::AdamW(_) => matches!((input, output), (0, 0) | (2, 1) | (3, 2)),
            _ => false,
        }
    }
}

/// What a task could not do. Steps that fail because of their data (a singular matrix) panic with the
/// message of an error, `[op] …`; that is no defect and comes back as what it says.
fn told(panic: mica_threads::TaskPanic) -> Error {
    if let Some(requested) = panic.refused {
        return Error::OutOfMemory { requested, active: memory::active(), limit: memory::limit() };
    }
    match panic.message.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((_, message)) => Error::invalid(panic.task, message),
        None => Error::Kernel(panic.to_string().into()),
    }
}

fn workspace_bytes(lowered: &[Lowered]) -> usize {
    lowered.iter().map(Lowered::bytes).max().unwrap_or(0)
}

/// A view that float kernels read. The caller keeps the memory alive while they run.
pub(crate) fn float_view(view: &HostView) -> Result<mica_kernels::gemm::FloatView<'static>> {
    products::read(view)
}

/// Runs one elementwise step here and now, without the pool: for single values.
pub(crate) fn run_alone(step: &Step) -> Result<()> {
    let lowered = lower(step)?;
    if lowered.bytes() > 0 {
        return Err(Error::unsupported(step.op.name(), "needs a workspace"));
    }
    let mut tasks = Vec::new();
    lowered.list(&mut tasks);
    for task in &tasks {
        (0..task.chunks()).for_each(|chunk| task.run(chunk, &mut mica_threads::Scratch::new()));
    }
    Ok(())
}

fn lower(step: &Step) -> Result<Lowered> {
    let result = match &step.op {
        Op::Full(_)
        | Op::Arange { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Compare(_)
        | Op::Select
        | Op::Cast
        | Op::Reshape
        | Op::Contiguous
        | Op::Concatenate { .. }
        | Op::SliceUpdate { .. }
        | Op::Reduce { .. }
        | Op::ArgReduce { .. }
        | Op::Softmax
        | Op::LogSumExp
        | Op::Take { .. }
        | Op::TakeAlong { .. }
        | Op::ScatterAdd { .. }
        | Op::ScatterAddAlong { .. }
        | Op::Gather { .. }
        | Op::Scatter { .. }
        | Op::ScatterAlong { .. }
        | Op::Scan { .. }
        | Op::Sort { .. }
        | Op::ArgSort { .. }
        | Op::Bitcast
        | Op::RandomBits { .. }
        | Op::AdamW(_)
        | Op::Fused(_) => elementwise::lower(step),
        Op::Matmul { .. }
        | Op::Linear { .. }
        | Op::LinearTransposed { .. }
        | Op::Embedding
        | Op::Dequantize
        | Op::LinearCrossEntropy(_) => products::lower(step),
        Op::RmsNorm { .. }
        | Op::RmsNormVjp { .. }
        | Op::LayerNorm { .. }
        | Op::Rope(_)
        | Op::Attention(_)
        | Op::AttentionVjp(_)
        | Op::PagedAttention(_)
        | Op::ShortConv(_)
        | Op::ShortConvVjp(_) => fused::lower(step),
        Op::Conv(spec) => conv::lower(spec, step),
        Op::Fft(spec) => fft::lower(spec, step),
        Op::Linalg(op) => Ok(gathered::decomposition(*op, step)),
        Op::Hadamard { scale } => gathered::hadamard(*scale, step),
        Op::GatherMatmul => gathered::gather_matmul(step),
        Op::GatherLinear { precision, transposed } => experts::gather_linear(step, *precision, *transposed),
        Op::SegmentedMatmul => gathered::segmented_matmul(step),
        Op::Codec(op) => Ok(gathered::codec(*op, step)),
        Op::Tracer(_)
        | Op::StopGradient
        | Op::After
        | Op::SavedAs
        | Op::Transpose(_)
        | Op::Broadcast
        | Op::Slice { .. }
        | Op::AsStrided { .. } => Err(Error::Kernel("a view of a packed weight was asked for".into())),
        Op::Custom(_) => Err(Error::Kernel("custom ops are expanded before they run".into())),
    };
    result.map_err(|error| match error {
        Error::Unsupported { op: "eval", message } => Error::Unsupported { op: step.op.name(), message },
        other => other,
    })
}

/// The first input's or output's plain memory.
fn input(step: &Step, index: usize) -> Result<mica_kernels::DynView> {
    Ok(step.inputs[index].host()?.view())
}

fn output(step: &Step, index: usize) -> Result<mica_kernels::DynViewMut> {
    Ok(step.outputs[index].host()?.view_mut())
}

/// A step that has no kernel runs as the reference does: right, but slow and on one thread.
fn by_reference(step: &Step) -> Lowered {
    let (name, step) = (step.op.name(), step.clone());
    let run = move |_: usize, _: &mut mica_threads::Scratch| {
        if let Err(error) = super::reference::run_step(&step) {
            panic!("{error}");
        }
    };
    let task: Box<dyn Task> = Box::new(mica_threads::FnTask::new(name, 1, run));
    task.into()
}

/// An output that may not be wanted.
fn wanted(step: &Step, index: usize) -> Option<mica_kernels::DynViewMut> {
    match &step.outputs[index] {
        Operand::Host(view) => Some(view.view_mut()),
        _ => None,
    }
}

/// A dense view of memory that is not an operand.
fn dense(pointer: *mut u8, shape: &[usize], dtype: Dtype) -> HostView {
    let strides = mica_kernels::view::contiguous_strides(shape);
    HostView { pointer, shape: shape.into(), strides: strides.as_slice().into(), dtype }
}

/// Some rows of a view.
fn rows_of(view: &HostView, rows: Range<usize>) -> HostView {
    let mut part = view.clone();
    part.pointer =
        view.pointer.wrapping_offset(rows.start as isize * view.strides[0] * view.dtype.size() as isize);
    part.shape[0] = rows.len();
    part
}
