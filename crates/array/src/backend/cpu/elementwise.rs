//! Steps whose kernels work on any dtype: elementwise, movement, reductions.

use mica_kernels::elementwise::{Dense, Flat};
use mica_kernels::index::{self, ScatterOp};
use mica_kernels::optimizer::{self, AdamWOptions, AdamWParameter};
use mica_kernels::reduce::ArgReduceOp;
use mica_kernels::scan::{self, ScanOptions};
use mica_kernels::{DynView, DynViewMut, copy, elementwise, random, reduce, sort};
use mica_threads::Task;
use smallvec::SmallVec;

use super::{Lowered, input, output};
use crate::backend::{OperandRef, Step, StepRef};
use crate::op::{AdamWSpec, Axes, Op, Scalar};
use crate::shape::{same, size_of};
use crate::storage::is_contiguous;
use crate::transforms::Region;
use crate::{Dtype, Result};

pub(super) fn lower(step: &Step) -> Result<Lowered> {
    if let Op::Fused(region) = &step.op {
        return fused(step, region);
    }
    let out = output(step, 0)?;
    let task: Box<dyn Task> = match &step.op {
        Op::Full(value) => fill(*value, out)?,
        Op::Arange { start, step } => copy::arange(*start, *step, out)?,
        Op::Unary(op) => elementwise::unary(*op, input(step, 0)?, out)?,
        Op::Binary(op) => elementwise::binary(*op, input(step, 0)?, input(step, 1)?, out)?,
        Op::Compare(op) => elementwise::compare(*op, input(step, 0)?, input(step, 1)?, out)?,
        Op::Select => elementwise::select(input(step, 0)?, input(step, 1)?, input(step, 2)?, out)?,
        Op::Cast => elementwise::cast(input(step, 0)?, out)?,
        Op::Contiguous => copy::copy(input(step, 0)?, out)?,
        Op::Reshape => {
            // Only strided inputs come here: others are views. The output is dense, so it can
            // take the input's shape.
            let source = input(step, 0)?;
            let mut target = out;
            target.shape = source.shape.clone();
            target.strides = mica_kernels::view::contiguous_strides(&source.shape);
            copy::copy(source, target)?
        }
        Op::Concatenate { axis } => {
            let mut low = vec![0; out.shape.len()];
            let mut tasks = Vec::with_capacity(step.inputs.len());
            for index in 0..step.inputs.len() {
                let piece = input(step, index)?;
                let part = copy::sub_view(&out, &low, &piece.shape);
                low[*axis] += piece.shape[*axis];
                tasks.push(copy::copy(piece, part)?);
            }
            return Ok(Lowered::Tasks(tasks));
        }
        Op::SliceUpdate { start, step: steps } => {
            let (base, update) = (input(step, 0)?, input(step, 1)?);
            let mut tasks = Vec::with_capacity(2);
            if base.pointer != out.pointer.cast_const() {
                tasks.push(copy::copy(base, out.clone())?);
            }
            let mut part = out;
            let offset: isize =
                start.iter().zip(&part.strides).map(|(&at, &stride)| at as isize * stride).sum();
            if !update.shape.contains(&0) {
                part.pointer = part.pointer.wrapping_offset(offset * part.dtype.size() as isize);
            }
            for (stride, step) in part.strides.iter_mut().zip(steps) {
                *stride *= step;
            }
            part.shape = update.shape.clone();
            tasks.push(copy::copy(update, part)?);
            return Ok(Lowered::Tasks(tasks));
        }
        Op::Reduce { op, axes } => reduce::reduce(*op, input(step, 0)?, axes, out)?,
        Op::Take { axis } => index::take(input(step, 0)?, *axis, input(step, 1)?, out)?,
        Op::TakeAlong { axis } => index::take_along_axis(input(step, 0)?, *axis, input(step, 1)?, out)?,
        Op::ScatterAdd { axis } => {
            let (indices, updates) = (input(step, 0)?, input(step, 1)?);
            let updates = scatter_layout(updates, *axis, indices.shape.len());
            let zero = copy::fill_f64(0.0, out.clone())?;
            let add = index::scatter(ScatterOp::Add, out, &[(*axis, indices)], updates)?;
            return Ok(Lowered::Tasks(vec![zero, add]));
        }
        Op::ScatterAddAlong { axis } => {
            let zero = copy::fill_f64(0.0, out.clone())?;
            let add =
                index::scatter_along_axis(ScatterOp::Add, out, *axis, input(step, 0)?, input(step, 1)?)?;
            return Ok(Lowered::Tasks(vec![zero, add]));
        }
        Op::Gather { axes, slice } => {
            index::gather(input(step, 0)?, &index_views(step, axes, 1)?, slice, out)?
        }
        Op::Scatter { op, axes } => {
            let indices = index_views(step, axes, 2)?;
            let updates = input(step, 1)?;
            return onto_base(step, out, |out| Ok(index::scatter(*op, out, &indices, updates)?));
        }
        Op::ScatterAlong { op, axis } => {
            let (indices, updates) = (input(step, 1)?, input(step, 2)?);
            return onto_base(step, out, |out| {
                Ok(index::scatter_along_axis(*op, out, *axis, indices, updates)?)
            });
        }
        Op::Scan { op, axis, reverse, exclusive } => {
            let options = ScanOptions { reverse: *reverse, exclusive: *exclusive };
            return Ok(scan::scan(*op, options, input(step, 0)?, *axis, out)?.into());
        }
        Op::Sort { axis, order } => {
            return Ok(sort::sort(input(step, 0)?, *axis, *order, out)?.into());
        }
        Op::ArgSort { axis, order } => {
            return Ok(sort::argsort(input(step, 0)?, *axis, *order, out)?.into());
        }
        Op::Bitcast => {
            // Only contiguous inputs that start at an odd place come here: others are views.
            let (source, count) = (input(step, 0)?, step.outputs[0].host()?.bytes());
            let source = DynView {
                pointer: source.pointer,
                dtype: Dtype::U8,
                shape: [count][..].into(),
                strides: [1][..].into(),
            };
            let target = DynViewMut {
                pointer: out.pointer,
                dtype: Dtype::U8,
                shape: [count][..].into(),
                strides: [1][..].into(),
            };
            copy::copy(source, target)?
        }
        Op::ArgReduce { max, axis } => {
            let op = if *max { ArgReduceOp::ArgMax } else { ArgReduceOp::ArgMin };
            reduce::arg_reduce(op, input(step, 0)?, *axis, out)?
        }
        Op::Softmax => reduce::softmax(input(step, 0)?, out)?,
        Op::LogSumExp => reduce::logsumexp(input(step, 0)?, out)?,
        Op::RandomBits { .. } => random::bits(input(step, 0)?, out)?,
        Op::AdamW(spec) => return adamw(step, spec),
        _ => return Ok(super::by_reference(step)),
    };
    Ok(task.into())
}

/// The task of an op over dense arrays of one shape, which graphs of small ops are made of: nothing is copied for it.
#[inline]
pub(super) fn dense(step: &StepRef) -> Option<Result<Dense>> {
    if !matches!(step.op, Op::Unary(_) | Op::Binary(_)) {
        return None;
    }
    let OperandRef::Host(target) = step.outputs.first()? else { return None };
    let flat = |operand: &OperandRef| match operand {
        OperandRef::Host(view)
            if same(view.shape, target.shape) && is_contiguous(view.shape, view.strides) =>
        {
            Some(Flat { pointer: view.pointer, dtype: view.dtype })
        }
        _ => None,
    };
    let (out, size) = (flat(&step.outputs[0])?, size_of(target.shape));
    Some(match (step.op, step.inputs) {
        (Op::Unary(op), [a]) => elementwise::unary_dense(*op, flat(a)?, out, size).map_err(Into::into),
        (Op::Binary(op), [a, b]) => {
            elementwise::binary_dense(*op, flat(a)?, flat(b)?, out, size).map_err(Into::into)
        }
        _ => return None,
    })
}

/// The index arrays from input `first` on, each with its axis.
fn index_views(step: &Step, axes: &Axes, first: usize) -> Result<Vec<(usize, DynView)>> {
    axes.iter().enumerate().map(|(index, &axis)| Ok((axis, input(step, first + index)?))).collect()
}

/// An update of the first input, which is copied first unless the output has its memory.
fn onto_base(
    step: &Step,
    out: DynViewMut,
    update: impl FnOnce(DynViewMut) -> Result<Box<dyn Task>>,
) -> Result<Lowered> {
    let base = input(step, 0)?;
    let mut tasks = Vec::with_capacity(2);
    if base.pointer != out.pointer.cast_const() {
        tasks.push(copy::copy(base, out.clone())?);
    }
    tasks.push(update(out)?);
    Ok(Lowered::Tasks(tasks))
}

/// A region's program; outputs that nobody asked for are left out of it.
fn fused(step: &Step, region: &Region) -> Result<Lowered> {
    let outputs: SmallVec<[Option<DynViewMut>; 4]> =
        (0..step.outputs.len()).map(|index| super::wanted(step, index)).collect();
    let wanted: SmallVec<[bool; 8]> = outputs.iter().map(Option::is_some).collect();
    let inputs: SmallVec<[DynView; 4]> =
        (0..step.inputs.len()).map(|index| input(step, index)).collect::<Result<_>>()?;
    let outputs: SmallVec<[DynViewMut; 4]> = outputs.into_iter().flatten().collect();
    Ok(region.program(&wanted)?.bind(&inputs, &outputs)?.into())
}

/// The kernel works in place: what was not donated is copied first.
fn adamw(step: &Step, spec: &AdamWSpec) -> Result<Lowered> {
    let mut tasks = Vec::new();
    let places = [(0, 0), (2, 1), (3, 2)];
    for (from, to) in places {
        let target = output(step, to)?;
        if target.pointer.cast_const() != input(step, from)?.pointer {
            tasks.push(copy::copy(input(step, from)?, target)?);
        }
    }
    let options = AdamWOptions {
        learning_rate: spec.lr,
        beta1: spec.beta1,
        beta2: spec.beta2,
        epsilon: spec.eps,
        weight_decay: spec.weight_decay,
        correct_bias: (spec.step > 0).then_some(spec.step as u64),
    };
    let parameter = AdamWParameter {
        parameter: output(step, 0)?,
        gradient: input(step, 1)?,
        m: output(step, 1)?,
        v: output(step, 2)?,
    };
    let factor = spec.grad_scale;
    Ok(Lowered::WithWorkspace(
        64,
        Box::new(move |workspace: *mut u8, list: &mut Vec<Box<dyn Task>>| {
            let scalar = |pointer| DynViewMut {
                pointer,
                dtype: Dtype::F32,
                shape: [][..].into(),
                strides: [][..].into(),
            };
            let scale = DynView {
                pointer: workspace,
                dtype: Dtype::F32,
                shape: [][..].into(),
                strides: [][..].into(),
            };
            list.extend(tasks);
            list.push(copy::fill(factor, scalar(workspace))?);
            list.push(optimizer::adamw(options, vec![parameter], Some(scale))?);
            Ok(())
        }),
    ))
}

fn fill(value: Scalar, out: DynViewMut) -> Result<Box<dyn Task>> {
    Ok(match (value, out.dtype) {
        // Through f64 these would lose their low bits.
        (Scalar::Int(value), Dtype::I64) => copy::fill(value, out)?,
        (Scalar::Int(value), Dtype::U64) => copy::fill(value as u64, out)?,
        (Scalar::UInt(value), Dtype::U64) => copy::fill(value, out)?,
        _ => copy::fill_f64(value.to_f64(), out)?,
    })
}

/// The kernel takes updates as (index dimensions, then a slice with size one on the axis); here
/// the index dimensions stand in the axis' place. Only strides move.
fn scatter_layout(updates: DynView, axis: usize, rank: usize) -> DynView {
    let order: Vec<usize> =
        (axis..axis + rank).chain(0..axis).chain(axis + rank..updates.shape.len()).collect();
    let mut view = updates.clone();
    view.shape = order.iter().map(|&from| updates.shape[from]).collect();
    view.strides = order.iter().map(|&from| updates.strides[from]).collect();
    view.shape.insert(rank + axis, 1);
    view.strides.insert(rank + axis, 0);
    view
}
