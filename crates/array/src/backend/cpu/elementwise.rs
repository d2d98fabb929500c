//! Steps whose kernels work on any dtype: elementwise, movement, reductions.

use mica_kernels::index::{self, ScatterOp};
use mica_kernels::{copy, elementwise, reduce};
use mica_threads::Task;

use super::{Lowered, input, output};
use crate::backend::Step;
use crate::op::{Op, Scalar};
use crate::{Dtype, Result};

pub(super) fn lower(step: &Step) -> Result<Lowered> {
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
        _ => return Ok(super::by_reference(step)),
    };
    Ok(task.into())
}

fn fill(value: Scalar, out: mica_kernels::DynViewMut) -> Result<Box<dyn Task>> {
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
fn scatter_layout(updates: mica_kernels::DynView, axis: usize, rank: usize) -> mica_kernels::DynView {
    let order: Vec<usize> =
        (axis..axis + rank).chain(0..axis).chain(axis + rank..updates.shape.len()).collect();
    let mut view = updates.clone();
    view.shape = order.iter().map(|&from| updates.shape[from]).collect();
    view.strides = order.iter().map(|&from| updates.strides[from]).collect();
    view.shape.insert(rank + axis, 1);
    view.strides.insert(rank + axis, 0);
    view
}
