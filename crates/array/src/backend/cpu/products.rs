//! Products and the output head.

use std::sync::Arc;

use mica_kernels::quant::{self, Epilogue, Floats, QuantWeight};
use mica_kernels::{View, ViewMut};
use mica_simd::Isa;
use mica_threads::Task;

use super::{Lowered, by_reference};
use crate::backend::{HostView, Operand, Step};
use crate::op::{Op, Precision};
use crate::{Dtype, PackedWeight, Result};

pub(super) fn lower(step: &Step) -> Result<Lowered> {
    match (&step.op, packed(step)) {
        (Op::Linear { precision }, Some(PackedWeight::Quant(weight))) => {
            linear(step, weight, *precision, false)
        }
        (Op::LinearTransposed { precision }, Some(PackedWeight::Quant(weight))) => {
            linear(step, weight, *precision, true)
        }
        (Op::Embedding, Some(PackedWeight::Quant(weight)))
            if is(step.inputs[1].host()?, &[Dtype::U32, Dtype::I32]) =>
        {
            let ids = step.inputs[1].host()?;
            // SAFETY: ids are not negative (checked where tokens enter), so i32 reads as u32; the
            // evaluator keeps the memory alive and ordered.
            let ids = unsafe { View::from_raw(ids.pointer.cast(), &[size(ids)], &[1]) };
            Ok(keep(weight).gather_rows(ids, floats(step.outputs[0].host()?)?)?.into())
        }
        (Op::Dequantize, Some(PackedWeight::Quant(weight))) => {
            Ok(keep(weight).dequantize(floats(step.outputs[0].host()?)?)?.into())
        }
        _ => Ok(by_reference(step)),
    }
}

/// The packed weight among the inputs.
fn packed(step: &Step) -> Option<&PackedWeight> {
    step.inputs.iter().find_map(|operand| match operand {
        Operand::Packed(weight) => Some(Arc::as_ref(weight)),
        _ => None,
    })
}

/// A weight for as long as the plan runs.
fn keep(weight: &QuantWeight) -> &'static QuantWeight {
    // SAFETY: the plan holds an Arc of every packed weight its steps read until its tasks are done,
    // and tasks do not outlive the plan.
    unsafe { &*std::ptr::from_ref(weight) }
}

fn size(view: &HostView) -> usize {
    view.shape.iter().product()
}

fn is(view: &HostView, dtypes: &[Dtype]) -> bool {
    dtypes.contains(&view.dtype) && view.is_contiguous()
}

/// [.., width] as rows.
fn rows(view: &HostView) -> [usize; 2] {
    let width = view.shape.last().copied().unwrap_or(1);
    [if width == 0 { 0 } else { size(view) / width }, width]
}

fn floats(view: &HostView) -> Result<Floats<'static>> {
    let [m, n] = rows(view);
    let strides = [n as isize, 1];
    // SAFETY: outputs are contiguous, alive and written by this step alone.
    Ok(unsafe {
        match view.dtype {
            Dtype::F32 => Floats::F32(ViewMut::from_raw(view.pointer.cast(), &[m, n], &strides)),
            Dtype::BF16 => Floats::Bf16(ViewMut::from_raw(view.pointer.cast(), &[m, n], &strides)),
            Dtype::F16 => Floats::F16(ViewMut::from_raw(view.pointer.cast(), &[m, n], &strides)),
            other => {
                return Err(crate::Error::dtype("dequantize", "a float dtype of at most 32 bits", other));
            }
        }
    })
}

fn linear(step: &Step, weight: &QuantWeight, precision: Precision, transposed: bool) -> Result<Lowered> {
    let (x, out) = (step.inputs[0].host()?, step.outputs[0].host()?);
    let ([m, k], [_, n]) = (rows(x), rows(out));
    // SAFETY: the constructor of the op made x contiguous f32; outputs always are; the evaluator
    // keeps both alive and ordered.
    let (x, out) = unsafe {
        (
            View::<f32>::from_raw(x.pointer.cast(), &[m, k], &[k as isize, 1]),
            ViewMut::<f32>::from_raw(out.pointer.cast(), &[m, n], &[n as isize, 1]),
        )
    };
    let precision = match precision {
        Precision::Exact => quant::Precision::Exact,
        Precision::Bf16 => quant::Precision::Bf16,
        Precision::Fast => quant::Precision::Fast,
    };
    let weight = keep(weight);
    let plan = if transposed {
        weight.plan_transposed(x, out, precision, Epilogue::none(), Isa::get())?
    } else {
        weight.plan_forward(x, out, precision, Epilogue::none(), Isa::get())?
    };
    let bytes = plan.workspace_bytes();
    Ok(Lowered::WithWorkspace(
        bytes,
        Box::new(move |workspace, list: &mut Vec<Box<dyn Task>>| {
            // SAFETY: the workspace is that large, aligned, and used by one step's tasks at a time.
            Ok(unsafe { plan.tasks(workspace, list) }?)
        }),
    ))
}
