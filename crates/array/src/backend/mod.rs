//! Backends: what runs a plan.
//!
//! A backend gets whole plans, not single ops: steps in order, each with its operands' memory.
//! That leaves it free to enter its device once, to batch, and to fuse.

pub mod cpu;
pub mod reference;

use std::sync::Arc;

use mica_threads::Pool;
use smallvec::SmallVec;

use mica_kernels::{DynView, DynViewMut};

use crate::op::Op;
use crate::packed::PackedWeight;
use crate::storage::{Buffer, Spec, Storage};
use crate::{Array, Dtype, Error, Result};

/// Computes plans.
pub trait Backend: Send + Sync {
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

    /// Runs the steps in order.
    fn run(&self, plan: &Plan) -> Result<()>;

    /// Does all that running takes but the computing: the plan's operands have no memory. What a backend would
    /// take beyond them it tells to [`crate::memory`].
    fn rehearse(&self, _plan: &Plan) -> Result<()> {
        Ok(())
    }

    /// Whether some output of `op` may be written into the memory of this input.
    fn may_alias(&self, op: &Op, input: usize) -> bool {
        (0..3).any(|output| self.aliases_output(op, input, output))
    }

    /// Whether this output of `op` may be written into the memory of this input.
    fn aliases_output(&self, _op: &Op, _input: usize, _output: usize) -> bool {
        false
    }
}

/// Steps in the order in which they run.
#[derive(Default)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
    /// Inputs of the step that is being planned, alive until its outputs have their memory.
    pub(crate) current: SmallVec<[Arc<Buffer>; 4]>,
    /// Weights that steps read, alive until the plan has run.
    pub(crate) weights: Vec<Arc<PackedWeight>>,
}

impl Plan {
    /// An empty plan in the memory of another one's steps.
    pub(crate) fn reusing(steps: Vec<Step>) -> Plan {
        Plan { steps, ..Plan::default() }
    }
}

/// One op with the memory of its operands.
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
    pub(crate) fn new(spec: &Spec, storage: &Storage) -> Result<Operand> {
        Ok(match storage {
            Storage::Host(host) => Operand::Host(HostView {
                pointer: host.pointer(),
                shape: SmallVec::from_slice(&spec.shape),
                strides: SmallVec::from_slice(&host.strides),
                dtype: spec.dtype,
            }),
            Storage::Packed(weight) => Operand::Packed(weight.clone()),
            Storage::Absent => {
                return Err(Error::Kernel("an output was read that was never asked for".into()));
            }
        })
    }

    /// The memory of an array that has been computed.
    pub(crate) fn of(array: &Array) -> Result<Operand> {
        let spec = Spec::new(array.shape(), array.dtype());
        let storage = crate::eval::ready_storage(array)?;
        if let Storage::Host(host) = &storage {
            crate::eval::wait_for(&host.buffer)?;
        }
        Operand::new(&spec, &storage)
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
