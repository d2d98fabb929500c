//! Products and the output head.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mica_kernels::elementwise::cast;
use mica_kernels::gemm::{self, FloatView, FloatViewMut, FloatWeight, Gemm, GemmSpec};
use mica_kernels::quant::{self, Floats, QuantWeight};
use mica_kernels::{View, ViewMut, index};
use mica_simd::Isa;
use mica_threads::{FnTask, Scratch, Task};

use super::{Lowered, by_reference};
use crate::backend::{HostView, Operand, Step};
use crate::op::{Op, Precision};
use crate::{Dtype, PackedWeight, Result};

pub(super) fn lower(step: &Step) -> Result<Lowered> {
    let transposed = matches!(step.op, Op::LinearTransposed { .. });
    match (&step.op, packed(step)) {
        (Op::Linear { precision } | Op::LinearTransposed { precision }, _) => {
            let (x, out) = (step.inputs[0].host()?, step.outputs[0].host()?);
            let is_quantized = matches!(packed(step), Some(PackedWeight::Quant(_)));
            if is_quantized && !(is(x, &[Dtype::F32]) && is(out, &[Dtype::F32])) {
                return Ok(by_reference(step));
            }
            linear(x, &step.inputs[1], out, *precision, transposed)
        }
        (Op::LinearCrossEntropy(spec), _) => super::loss::lower(step, spec),
        (Op::Matmul { precision }, _) => matmul(step, *precision),
        (Op::Embedding, weight) => {
            let (ids, out) = (step.inputs[1].host()?, step.outputs[0].host()?);
            let rounds = matches!(weight, Some(PackedWeight::Float(_))) && out.dtype != Dtype::F32;
            if weight.is_some() && (rounds || !is(ids, &[Dtype::U32, Dtype::I32])) {
                return Ok(by_reference(step));
            }
            lookup(&step.inputs[0], ids, out)
        }
        (Op::Dequantize, Some(PackedWeight::Quant(weight))) => {
            Ok(keep(weight).dequantize(floats(step.outputs[0].host()?)?)?.into())
        }
        (Op::Dequantize, Some(PackedWeight::Float(weight))) => {
            Ok(keep(weight).unpack(write(step.outputs[0].host()?)?)?.into())
        }
        (Op::Dequantize, Some(PackedWeight::Experts(weights))) => {
            super::experts::dequantize(keep(weights), step.outputs[0].host()?)
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
pub(super) fn keep<W>(weight: &W) -> &'static W {
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
    [size(view).checked_div(width).unwrap_or(0), width]
}

pub(super) fn floats(view: &HostView) -> Result<Floats<'static>> {
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

/// x · wᵀ, or x · w when `transposed`, by a weight in any form.
pub(super) fn linear(
    x: &HostView,
    weight: &Operand,
    out: &HostView,
    precision: Precision,
    transposed: bool,
) -> Result<Lowered> {
    match weight {
        Operand::Packed(packed) => match packed.as_ref() {
            PackedWeight::Quant(weight) => quantized_linear(x, weight, out, precision, transposed),
            PackedWeight::Float(weight) => float_linear(x, weight, out, precision, transposed),
            PackedWeight::Experts(_) => Err(needs_indices()),
        },
        other => plain_linear(x, other.host()?, out, precision, transposed),
    }
}

fn quantized_linear(
    x: &HostView,
    weight: &QuantWeight,
    out: &HostView,
    precision: Precision,
    transposed: bool,
) -> Result<Lowered> {
    let ([m, k], [_, n]) = (rows(x), rows(out));
    // SAFETY: the constructor of the op made x contiguous f32; outputs always are; the evaluator
    // keeps both alive and ordered.
    let (x, out) = unsafe {
        (
            View::<f32>::from_raw(x.pointer.cast(), &[m, k], &[k as isize, 1]),
            ViewMut::<f32>::from_raw(out.pointer.cast(), &[m, n], &[n as isize, 1]),
        )
    };
    let precision = quantized_precision(precision);
    let weight = keep(weight);
    Ok(Lowered::Product(if transposed {
        weight.plan_transposed(x, out, precision, quant::Epilogue::none(), Isa::get())?
    } else {
        weight.plan_forward(x, out, precision, quant::Epilogue::none(), Isa::get())?
    }))
}

/// A strided view of any float type that the products read.
pub(super) fn read(view: &HostView) -> Result<FloatView<'static>> {
    let (shape, strides) = (view.shape.as_slice(), view.strides.as_slice());
    // SAFETY: the evaluator keeps the memory alive and ordered while the plan runs.
    Ok(unsafe {
        match view.dtype {
            Dtype::F32 => FloatView::F32(View::from_raw(view.pointer.cast(), shape, strides)),
            Dtype::BF16 => FloatView::Bf16(View::from_raw(view.pointer.cast(), shape, strides)),
            Dtype::F16 => FloatView::F16(View::from_raw(view.pointer.cast(), shape, strides)),
            other => return Err(crate::Error::dtype("matmul", "a float dtype of at most 32 bits", other)),
        }
    })
}

pub(super) fn write(view: &HostView) -> Result<FloatViewMut<'static>> {
    let (shape, strides) = (view.shape.as_slice(), view.strides.as_slice());
    // SAFETY: outputs are alive and written by this step alone.
    Ok(unsafe {
        match view.dtype {
            Dtype::F32 => FloatViewMut::F32(ViewMut::from_raw(view.pointer.cast(), shape, strides)),
            Dtype::BF16 => FloatViewMut::Bf16(ViewMut::from_raw(view.pointer.cast(), shape, strides)),
            Dtype::F16 => FloatViewMut::F16(ViewMut::from_raw(view.pointer.cast(), shape, strides)),
            other => return Err(crate::Error::dtype("matmul", "a float dtype of at most 32 bits", other)),
        }
    })
}

pub(super) fn quantized_precision(precision: Precision) -> quant::Precision {
    match precision {
        Precision::Exact => quant::Precision::Exact,
        Precision::Bf16 => quant::Precision::Bf16,
        Precision::Fast => quant::Precision::Fast,
    }
}

pub(super) fn float_precision(precision: Precision) -> gemm::Precision {
    match precision {
        Precision::Exact => gemm::Precision::Exact,
        Precision::Bf16 | Precision::Fast => gemm::Precision::Bf16,
    }
}

pub(super) fn lowered(plan: Gemm<'static>) -> Lowered {
    let bytes = plan.workspace_bytes();
    Lowered::WithWorkspace(
        bytes,
        Box::new(move |workspace, list: &mut Vec<Box<dyn Task>>| {
            // SAFETY: the workspace is that large, aligned, and used by one step's tasks at a time.
            unsafe { plan.tasks(workspace, list) };
            Ok(())
        }),
    )
}

/// [.., width] as a matrix; the constructor of the op made it contiguous.
fn matrix(view: &HostView) -> HostView {
    let [m, n] = rows(view);
    HostView { shape: [m, n][..].into(), strides: [n as isize, 1][..].into(), ..view.clone() }
}

fn float_linear(
    x: &HostView,
    weight: &FloatWeight,
    out: &HostView,
    precision: Precision,
    transposed: bool,
) -> Result<Lowered> {
    let (x, out) = (read(&matrix(x))?, write(&matrix(out))?);
    let (precision, none) = (float_precision(precision), gemm::Epilogue::none());
    Ok(lowered(keep(weight).plan(x, out, transposed, precision, none, Isa::get())?))
}

/// By a weight in plain memory, read as it lies.
fn plain_linear(
    x: &HostView,
    weight: &HostView,
    out: &HostView,
    precision: Precision,
    transposed: bool,
) -> Result<Lowered> {
    let mut right = weight.clone();
    if !transposed {
        right.shape.reverse();
        right.strides.reverse();
    }
    product(&matrix(x), &right, &matrix(out), precision, false)
}

/// x · wᵀ, or x · w when `transposed`, in bf16 or exact, with the rows `outputs` of w alone (from a
/// multiple of 16 on), added to what `out`, f32, holds if asked for.
pub(super) fn linear_part(
    x: &HostView,
    (weight, outputs): (&Operand, Range<usize>),
    out: &HostView,
    precision: Precision,
    transposed: bool,
    accumulate: bool,
) -> Result<Lowered> {
    let Operand::Packed(packed) = weight else {
        let mut right = super::rows_of(weight.host()?, outputs);
        if !transposed {
            right.shape.reverse();
            right.strides.reverse();
        }
        return product(x, &right, out, precision, accumulate);
    };
    match packed.as_ref() {
        PackedWeight::Float(weight) => {
            let epilogue = gemm::Epilogue { accumulate, ..gemm::Epilogue::none() };
            let precision = float_precision(precision);
            let plan = keep(weight).plan_part(
                outputs,
                read(x)?,
                write(out)?,
                transposed,
                precision,
                epilogue,
                Isa::get(),
            )?;
            Ok(lowered(plan))
        }
        PackedWeight::Quant(weight) => {
            let (shape, strides) = (out.shape.as_slice(), out.strides.as_slice());
            // SAFETY: as in `write`.
            let (into, before) = unsafe {
                let pointer = out.pointer.cast::<f32>();
                (ViewMut::from_raw(pointer, shape, strides), View::from_raw(pointer, shape, strides))
            };
            let epilogue =
                if accumulate { quant::Epilogue::residual(before) } else { quant::Epilogue::none() };
            let precision = quantized_precision(precision);
            let plan = keep(weight).plan_part(
                outputs,
                read(x)?,
                into,
                transposed,
                precision,
                epilogue,
                Isa::get(),
            )?;
            Ok(Lowered::Product(plan))
        }
        PackedWeight::Experts(_) => Err(needs_indices()),
    }
}

/// Constructors of ops that read one weight refuse several.
fn needs_indices() -> crate::Error {
    crate::Error::unsupported("linear", "a product with experts needs indices")
}

fn matmul(step: &Step, precision: Precision) -> Result<Lowered> {
    let (a, b, out) = (step.inputs[0].host()?, step.inputs[1].host()?, step.outputs[0].host()?);
    if a.dtype == Dtype::C64 {
        return super::complex::matmul(step);
    }
    product(a, b, out, precision, false)
}

/// a · b, added to what `out` holds if asked for.
pub(super) fn product(
    a: &HostView,
    b: &HostView,
    out: &HostView,
    precision: Precision,
    accumulate: bool,
) -> Result<Lowered> {
    if a.dtype == Dtype::F64 && !accumulate {
        return product_f64(a, b, out);
    }
    let mut spec = GemmSpec::new(read(a)?, read(b)?, write(out)?);
    spec.threads = super::THREADS.load(Ordering::Relaxed);
    if accumulate {
        spec.epilogue = gemm::Epilogue::accumulate();
    }
    spec.precision = own_precision(a, b, precision);
    Ok(lowered(Gemm::plan(&spec)?))
}

/// Products in their own dtype lose nothing: those of two bf16 are exact in f32.
pub(super) fn own_precision(a: &HostView, b: &HostView, precision: Precision) -> gemm::Precision {
    match (a.dtype, b.dtype) {
        (Dtype::BF16, Dtype::BF16) => gemm::Precision::Bf16,
        _ => float_precision(precision),
    }
}

/// In f64, a task per matrix of a batch whose leading dimensions are more than one.
fn product_f64(a: &HostView, b: &HostView, out: &HostView) -> Result<Lowered> {
    let lead = out.shape.len() - 2;
    let kept = lead.min(1);
    let outer = &out.shape[..lead - kept];
    let mut tasks: Vec<Box<dyn Task>> = Vec::new();
    for entry in 0..outer.iter().product() {
        let index = super::strided::unravel(entry, outer);
        let part = |view: &HostView| {
            let pointer = view.pointer.cast::<f64>().wrapping_offset(super::strided::offset(view, &index));
            let (mut shape, mut strides) =
                (view.shape[lead - kept..].to_vec(), view.strides[lead - kept..].to_vec());
            if kept == 0 {
                shape.insert(0, 1);
                strides.insert(0, 0);
            }
            (pointer, shape, strides)
        };
        let ((a, a_shape, a_strides), (b, b_shape, b_strides)) = (part(a), part(b));
        let (o, shape, strides) = part(out);
        // SAFETY: entries of live views; the output's are written by this step alone.
        let (a, b, o) = unsafe {
            (
                View::from_raw(a, &a_shape, &a_strides),
                View::from_raw(b, &b_shape, &b_strides),
                ViewMut::from_raw(o, &shape, &strides),
            )
        };
        tasks.push(Box::new(gemm::MatmulTask::<f64>::new(a, b, o)?));
    }
    Ok(Lowered::Tasks(tasks))
}

/// Rows of a weight. Ids of a packed one are contiguous and of 32 bits, and a packed float one gives f32.
pub(super) fn lookup(weight: &Operand, ids: &HostView, out: &HostView) -> Result<Lowered> {
    let Operand::Packed(packed) = weight else { return plain_rows(weight.host()?, ids, out) };
    match packed.as_ref() {
        PackedWeight::Quant(weight) => {
            // SAFETY: token ids are checked where they enter, so i32 reads as u32; the
            // evaluator keeps the memory alive and ordered.
            let ids = unsafe { View::from_raw(ids.pointer.cast(), &[size(ids)], &[1]) };
            Ok(keep(weight).gather_rows(ids, floats(out)?)?.into())
        }
        PackedWeight::Float(weight) => Ok(gather(keep(weight), ids, out)),
        PackedWeight::Experts(_) => Err(needs_indices()),
    }
}

/// Rows of a plain weight: taken as they are, then made what the output is.
fn plain_rows(weight: &HostView, ids: &HostView, out: &HostView) -> Result<Lowered> {
    if weight.dtype == out.dtype {
        return Ok(index::take(weight.view(), 0, ids.view(), out.view_mut())?.into());
    }
    let (weight, ids, out) = (weight.clone(), ids.clone(), out.clone());
    Ok(Lowered::WithWorkspace(
        size(&out) * weight.dtype.size(),
        Box::new(move |workspace, list: &mut Vec<Box<dyn Task>>| {
            let taken = super::dense(workspace, &out.shape, weight.dtype);
            list.push(index::take(weight.view(), 0, ids.view(), taken.view_mut())?);
            list.push(cast(taken.view(), out.view_mut())?);
            Ok(())
        }),
    ))
}

/// Rows of a packed weight by ids that are known only when the task runs.
fn gather(weight: &'static FloatWeight, ids: &HostView, out: &HostView) -> Lowered {
    const ROWS: usize = 16;
    let (count, width) = (size(ids), weight.inputs());
    let views = (ids.clone(), out.clone());
    let run = move |chunk: usize, scratch: &mut Scratch| {
        let (ids, out) = &views;
        for row in chunk * ROWS..count.min((chunk + 1) * ROWS) {
            // SAFETY: inside the ids, which are contiguous and have been computed.
            let id = [unsafe { ids.pointer.cast::<u32>().add(row).read() }];
            let at = out.pointer.cast::<f32>().wrapping_add(row * width);
            // SAFETY: row `row` of the contiguous output, this chunk's alone.
            let row = unsafe { ViewMut::from_raw(at, &[1, width], &[width as isize, 1]) };
            match weight.gather(&id, row) {
                Ok(task) => (0..task.chunks()).for_each(|part| task.run(part, scratch)),
                // Bad data and not a bug: no message of a panic belongs on stderr.
                Err(error) => std::panic::resume_unwind(Box::new(error.to_string())),
            }
        }
    };
    let task: Box<dyn Task> = Box::new(FnTask::new("embedding", count.div_ceil(ROWS), run));
    task.into()
}
