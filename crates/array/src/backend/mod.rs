//! Backends: what runs a plan.
//!
//! A plan is given step by step, in the order in which steps are to run, each with its operands' memory, and then run
//! as a whole. That leaves a backend free to enter its device once, to batch, and to fuse; and what it does not keep of
//! a step is never copied, which is most of what graphs of small ops would cost.

pub mod cpu;
pub mod reference;

use std::any::Any;
use std::sync::Arc;

use mica_threads::Pool;
use smallvec::SmallVec;

use mica_kernels::{DynView, DynViewMut};

use crate::kv::Sequences;
use crate::op::Op;
use crate::packed::PackedWeight;
use crate::storage::{Spec, Storage};
use crate::{Array, Dtype, Error, Result};

/// Computes plans.
pub trait Backend: Send {
    /// The name.
    fn name(&self) -> &'static str;

    /// How many threads compute.
    fn threads(&self) -> usize {
        1
    }

    /// The pool that it computes with, if it computes on this machine's processor.
    fn pool(&self) -> Option<&Pool> {
        None
    }

    /// Begins a plan. Steps of one that was never run are forgotten: their memory may be gone.
    fn begin(&mut self);

    /// The next step. Shapes and strides are lent for this call; the memory stays until the plan has run.
    ///
    /// # Errors
    /// There is no kernel for it: the step is not part of the plan.
    fn step(&mut self, step: &StepRef) -> Result<()>;

    /// Runs the steps in order, which ends the plan.
    fn run(&mut self) -> Result<()>;

    /// [`Backend::begin`] of a plan that [`Backend::keep`] may end.
    fn begin_kept(&mut self) {
        self.begin();
    }

    /// [`Backend::run`], and what runs the same steps again; `None` from a backend that has no such thing.
    fn keep(&mut self) -> Result<Option<Box<dyn Kept>>> {
        self.run()?;
        Ok(None)
    }

    /// Runs a plan that this backend has kept, with these sequences where it attends over pages.
    fn run_again(&mut self, _plan: &mut dyn Kept, _sequences: &Sequences) -> Result<()> {
        Err(Error::Kernel("this backend keeps no plans".into()))
    }

    /// Ends the plan without running it: its operands have no memory. What running would take beyond them the
    /// backend tells to [`crate::memory`].
    fn rehearse(&mut self) -> Result<()>;

    /// Whether this output of `op` may be written into the memory of this input.
    fn aliases_output(&self, _op: &Op, _input: usize, _output: usize) -> bool {
        false
    }
}

/// A plan that a backend has kept, of a form of its own. Whoever has it keeps the memory that its steps use.
pub trait Kept: Any + Send {}

/// One op with the memory of its operands, lent to a backend.
#[derive(Clone, Copy)]
pub struct StepRef<'a> {
    /// The op.
    pub op: &'a Op,
    /// What it reads.
    pub inputs: &'a [OperandRef<'a>],
    /// What it writes.
    pub outputs: &'a [OperandRef<'a>],
}

/// The memory of an operand.
#[derive(Clone, Copy)]
pub enum OperandRef<'a> {
    /// Plain, strided memory.
    Host(ViewRef<'a>),
    /// A weight in a kernel's own layout.
    Packed(&'a Arc<PackedWeight>),
    /// An output that nobody asked for.
    Absent,
}

/// A window on memory.
#[derive(Clone, Copy, Debug)]
pub struct ViewRef<'a> {
    /// The first element.
    pub pointer: *mut u8,
    /// Sizes per dimension.
    pub shape: &'a [usize],
    /// In elements.
    pub strides: &'a [isize],
    /// The element type.
    pub dtype: Dtype,
}

impl StepRef<'_> {
    /// A copy, which may be kept until the plan has run.
    pub fn to_step(&self) -> Step {
        Step {
            op: self.op.clone(),
            inputs: self.inputs.iter().map(|operand| operand.to_operand()).collect(),
            outputs: self.outputs.iter().map(|operand| operand.to_operand()).collect(),
        }
    }
}

impl<'a> OperandRef<'a> {
    #[inline]
    pub(crate) fn new(spec: &'a Spec, storage: &'a Storage) -> OperandRef<'a> {
        match storage {
            Storage::Host(host) => OperandRef::Host(ViewRef {
                pointer: host.pointer(),
                shape: &spec.shape,
                strides: &host.strides,
                dtype: spec.dtype,
            }),
            Storage::Packed(weight) => OperandRef::Packed(weight),
            Storage::Absent => OperandRef::Absent,
        }
    }

    fn to_operand(self) -> Operand {
        match self {
            OperandRef::Host(view) => Operand::Host(HostView {
                pointer: view.pointer,
                shape: SmallVec::from_slice(view.shape),
                strides: SmallVec::from_slice(view.strides),
                dtype: view.dtype,
            }),
            OperandRef::Packed(weight) => Operand::Packed((*weight).clone()),
            OperandRef::Absent => Operand::Absent,
        }
    }
}

/// [`StepRef`] on its own.
#[derive(Clone)]
pub struct Step {
    /// The op.
    pub op: Op,
    /// What it reads.
    pub inputs: SmallVec<[Operand; 2]>,
    /// What it writes.
    pub outputs: SmallVec<[Operand; 1]>,
}

/// The memory of an operand.
#[derive(Clone)]
pub enum Operand {
    /// Plain, strided memory.
    Host(HostView),
    /// A weight in a kernel's own layout.
    Packed(Arc<PackedWeight>),
    /// An output that nobody asked for.
    Absent,
}

/// A window on memory.
#[derive(Clone, Debug)]
pub struct HostView {
    /// The first element.
    pub pointer: *mut u8,
    /// Sizes per dimension.
    pub shape: crate::Shape,
    /// In elements.
    pub strides: crate::shape::Strides,
    /// The element type.
    pub dtype: Dtype,
}

// SAFETY: the evaluator keeps the memory alive, and ordered, while a plan uses it.
unsafe impl Send for HostView {}
// SAFETY: as above.
unsafe impl Sync for HostView {}

impl Operand {
    /// The memory of an array that has been computed.
    pub(crate) fn of(array: &Array) -> Result<Operand> {
        let storage = crate::eval::ready_storage(array)?;
        if let Storage::Host(host) = &storage {
            crate::eval::wait_for(&host.buffer)?;
        }
        Ok(OperandRef::new(array.spec(), &storage).to_operand())
    }

    /// The plain memory.
    pub fn host(&self) -> Result<&HostView> {
        match self {
            Operand::Host(view) => Ok(view),
            Operand::Packed(weight) => Err(Error::unsupported(
                "eval",
                format!(
                    "this op does not read packed weights (a weight of {:?}): dequantize it first",
                    weight.shape()
                ),
            )),
            Operand::Absent => Err(Error::Kernel("an absent operand was used".into())),
        }
    }
}

impl HostView {
    /// Bytes of the elements if they were contiguous.
    pub fn bytes(&self) -> usize {
        crate::shape::size_of(&self.shape) * self.dtype.size()
    }

    /// Whether elements follow each other in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        crate::storage::is_contiguous(&self.shape, &self.strides)
    }

    /// For kernels that read.
    pub fn view(&self) -> DynView {
        DynView {
            pointer: self.pointer,
            dtype: self.dtype,
            shape: SmallVec::from_slice(&self.shape),
            strides: SmallVec::from_slice(&self.strides),
        }
    }

    /// For kernels that write.
    pub fn view_mut(&self) -> DynViewMut {
        DynViewMut {
            pointer: self.pointer,
            dtype: self.dtype,
            shape: SmallVec::from_slice(&self.shape),
            strides: SmallVec::from_slice(&self.strides),
        }
    }
}
