//! Products of rows by matrices that indices name.

use mica_kernels::elementwise::cast;
use mica_kernels::gemm::{self, Grouped, GroupedSpec, Matrices};
use mica_kernels::{View, ViewMut};
use mica_simd::Isa;
use mica_threads::Task;

use super::products::{self, float_precision, keep, own_precision, quantized_precision};
use super::{Lowered, by_reference};
use crate::backend::{HostView, Operand, Step};
use crate::op::Precision;
use crate::packed::Experts;
use crate::{Dtype, PackedWeight, Result};

/// Indices of a side, and the output as one matrix an entry.
struct Entries {
    left: View<'static, u32>,
    right: View<'static, u32>,
    out: HostView,
}

impl Entries {
    fn of(step: &Step) -> Result<Entries> {
        let out = step.outputs[0].host()?;
        let rank = out.shape.len();
        let count: usize = out.shape[..rank - 2].iter().product();
        let indices = |at: usize| -> Result<View<'static, u32>> {
            let pointer = step.inputs[at].host()?.pointer.cast();
            // SAFETY: the constructor made the indices contiguous; the evaluator keeps them alive and ordered.
            Ok(unsafe { View::from_raw(pointer, &[count], &[1]) })
        };
        let shape = [count, out.shape[rank - 2], out.shape[rank - 1]];
        let out = super::dense(out.pointer, &shape, out.dtype);
        Ok(Entries { left: indices(2)?, right: indices(3)?, out })
    }
}

/// Whether there is nothing to multiply, or nothing that the kernels multiply.
fn is_odd(x: &HostView, out: &HostView) -> bool {
    out.shape.contains(&0) || x.shape[2] == 0 || [x.dtype, out.dtype].contains(&Dtype::F64)
}

/// [`crate::op::Op::GatherMatmul`], of all dtypes but f64.
pub(super) fn gather_matmul(step: &Step) -> Result<Lowered> {
    let (a, b) = (step.inputs[0].host()?, step.inputs[1].host()?);
    let precision = own_precision(a, b, Precision::Exact);
    grouped(a, Matrices::Plain(products::read(b)?), Entries::of(step)?, precision)
}

/// [`crate::op::Op::GatherLinear`].
pub(super) fn gather_linear(step: &Step, precision: Precision, transposed: bool) -> Result<Lowered> {
    let (x, out) = (step.inputs[0].host()?, step.outputs[0].host()?);
    if is_odd(x, out) {
        return Ok(by_reference(step));
    }
    let float = float_precision(precision);
    match &step.inputs[1] {
        Operand::Host(weight) if weight.dtype != Dtype::F64 => {
            let mut matrices = weight.clone();
            if !transposed {
                matrices.shape.swap(1, 2);
                matrices.strides.swap(1, 2);
            }
            let precision = own_precision(x, weight, precision);
            grouped(x, Matrices::Plain(products::read(&matrices)?), Entries::of(step)?, precision)
        }
        Operand::Packed(weight) => match weight.as_ref() {
            PackedWeight::Experts(Experts::Float(experts)) => {
                let matrices = Matrices::Packed { experts: keep(experts), transposed };
                grouped(x, matrices, Entries::of(step)?, float)
            }
            PackedWeight::Experts(Experts::Quant(_)) => quantized(step, precision, transposed),
            PackedWeight::Float(_) | PackedWeight::Quant(_) => Ok(by_reference(step)),
        },
        _ => Ok(by_reference(step)),
    }
}

fn grouped(
    a: &HostView,
    b: Matrices<'static>,
    entries: Entries,
    precision: gemm::Precision,
) -> Result<Lowered> {
    let Entries { left, right, out } = entries;
    let (a, out) = (products::read(a)?, products::write(&out)?);
    let plan = Grouped::plan(&GroupedSpec { a, b, left, right, out, precision, isa: Isa::get() })?;
    let bytes = plan.workspace_bytes();
    let make = move |workspace, list: &mut Vec<Box<dyn Task>>| {
        // SAFETY: the workspace is that large, aligned, and used by one step's tasks at a time.
        unsafe { plan.tasks(workspace, list) };
        Ok(())
    };
    Ok(Lowered::WithWorkspace(bytes, Box::new(make)))
}

/// Sums are f32; an output of another dtype is made of them afterwards.
fn quantized(step: &Step, precision: Precision, transposed: bool) -> Result<Lowered> {
    let Operand::Packed(weight) = &step.inputs[1] else { return Ok(by_reference(step)) };
    let PackedWeight::Experts(Experts::Quant(experts)) = weight.as_ref() else {
        return Ok(by_reference(step));
    };
    let Entries { left, right, out } = Entries::of(step)?;
    let x = products::read(step.inputs[0].host()?)?;
    let experts = keep(experts);
    let precision = quantized_precision(precision);
    let plan = move |out: &HostView| {
        // SAFETY: dense f32, alive and written by this step alone.
        let sums = unsafe { ViewMut::<f32>::from_raw(out.pointer.cast(), &out.shape, &out.strides) };
        experts.plan(x.clone(), (&left, &right), sums, transposed, precision, Isa::get())
    };
    // What it needs does not depend on where the output is.
    let bytes = plan(&out)?.workspace_bytes().next_multiple_of(64);
    let apart = if out.dtype == Dtype::F32 { 0 } else { out.shape.iter().product::<usize>() * 4 };
    let make = move |workspace: *mut u8, list: &mut Vec<Box<dyn Task>>| {
        let sums = match apart {
            0 => out.clone(),
            _ => super::dense(workspace.wrapping_add(bytes), &out.shape, Dtype::F32),
        };
        // SAFETY: the workspace is that large, aligned, and used by one step's tasks at a time.
        unsafe { plan(&sums)?.tasks(workspace, list) };
        if apart > 0 {
            list.push(cast(sums.view(), out.view_mut())?);
        }
        Ok(())
    };
    Ok(Lowered::WithWorkspace(bytes + apart, Box::new(make)))
}

/// Experts as plain arrays, one after another.
pub(super) fn dequantize(experts: &'static Experts, out: &HostView) -> Result<Lowered> {
    let one = |at: usize| {
        let place = at * out.shape[1] * out.shape[2] * out.dtype.size();
        super::dense(out.pointer.wrapping_add(place), &out.shape[1..], out.dtype)
    };
    let mut tasks: Vec<Box<dyn Task>> = Vec::new();
    match experts {
        Experts::Float(experts) => {
            for (at, weight) in experts.weights().iter().enumerate() {
                tasks.push(weight.unpack(products::write(&one(at))?)?);
            }
        }
        Experts::Quant(experts) => {
            for (at, weight) in experts.weights().iter().enumerate() {
                tasks.push(weight.dequantize(products::floats(&one(at))?)?);
            }
        }
    }
    Ok(Lowered::Tasks(tasks))
}
