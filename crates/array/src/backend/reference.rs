//! The reference backend: naive loops in f64 and i128, the executable definition of every op.
//!
//! It is the oracle of tests, and what the CPU backend runs for an op that has no kernel yet. It
//! rounds once, when a result is stored; kernels that round in between agree within their dtype's
//! tolerance.

pub(super) mod complex;
mod conv;
mod dense;
mod elementwise;
mod fft;
mod fused;
pub(super) mod gathered;
mod indexing;
pub(super) mod linalg;
mod movement;
mod order;
mod products;
mod region;

use super::{Backend, Operand, Step, StepRef};
use crate::op::{Op, UnaryOp};
use crate::{Dtype, Error, Result};

use dense::Dense;

/// The backend. Single-threaded.
pub struct Reference;

impl Backend for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn begin(&mut self) {}

    /// At once: there is no device to enter, and the steps before it have run.
    fn step(&mut self, step: &StepRef) -> Result<()> {
        if crate::memory::is_rehearsing() { Ok(()) } else { run_step(&step.to_step()) }
    }

    fn run(&mut self) -> Result<()> {
        Ok(())
    }

    fn rehearse(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Computes one step.
pub(crate) fn run_step(step: &Step) -> Result<()> {
    if let Op::PagedAttention(paged) = &step.op {
        return fused::paged_attention(paged, step);
    }
    match &step.op {
        _ if complex::takes(step) => return complex::run(step),
        Op::Fft(spec) => return fft::run(spec, step),
        Op::Linalg(op) => return linalg::run(*op, step),
        Op::Codec(op) => {
            return (0..gathered::codec_pieces(*op, step))
                .try_for_each(|piece| gathered::codec(*op, step, piece));
        }
        _ => {}
    }
    let outputs = compute(step)?;
    for (operand, value) in step.outputs.iter().zip(outputs) {
        if let Operand::Host(view) = operand {
            value.store(view)?;
        }
    }
    Ok(())
}

fn compute(step: &Step) -> Result<Vec<Dense>> {
    let input = |index: usize| Dense::load(&step.inputs[index]);
    let out = step.outputs[0].host()?;
    let all = || (0..step.inputs.len()).map(input).collect::<Result<Vec<Dense>>>();
    let one = |value: Dense| Ok(vec![value]);
    match &step.op {
        Op::Full(value) => one(Dense::filled(&out.shape, out.dtype, *value)),
        Op::Arange { start, step } => {
            let values = (0..out.shape[0]).map(|i| start + i as f64 * step).collect();
            one(Dense::floats(&out.shape, values))
        }
        // Of a bool the one bit that it has.
        Op::Unary(UnaryOp::BitwiseInvert) if out.dtype == Dtype::Bool => {
            one(elementwise::unary(UnaryOp::LogicalNot, &input(0)?))
        }
        Op::Unary(op) => one(elementwise::unary(*op, &input(0)?)),
        Op::Binary(op) => one(elementwise::binary(*op, &input(0)?, &input(1)?, out.dtype)),
        Op::Compare(op) => one(elementwise::compare(*op, &input(0)?, &input(1)?)),
        Op::Select => one(elementwise::select(&input(0)?, &input(1)?, &input(2)?)),
        Op::Cast | Op::Dequantize | Op::Contiguous => one(input(0)?),
        Op::Reshape => one(input(0)?.with_shape(&out.shape)),
        Op::Concatenate { axis } => one(movement::concatenate(&all()?, *axis, &out.shape)),
        Op::SliceUpdate { start, step } => one(movement::slice_update(&input(0)?, &input(1)?, start, step)),
        Op::Reduce { op, axes } => one(elementwise::reduce(*op, &input(0)?, axes, &out.shape)),
        Op::ArgReduce { max, axis } => one(elementwise::arg_reduce(*max, &input(0)?, *axis, &out.shape)),
        Op::Softmax => one(elementwise::softmax(&input(0)?)),
        Op::LogSumExp => one(elementwise::logsumexp(&input(0)?, &out.shape)),
        Op::Take { axis } => one(movement::take(&input(0)?, &input(1)?, *axis, &out.shape)),
        Op::TakeAlong { axis } => one(movement::take_along(&input(0)?, &input(1)?, *axis)),
        Op::ScatterAdd { axis } => one(movement::scatter_add(&input(0)?, &input(1)?, *axis, &out.shape)),
        Op::ScatterAddAlong { axis } => {
            one(movement::scatter_add_along(&input(0)?, &input(1)?, *axis, &out.shape))
        }
        Op::Gather { axes, slice } => one(indexing::gather(&all()?, axes, slice, &out.shape)),
        Op::Scatter { op, axes } => one(indexing::scatter(*op, &all()?, axes)),
        Op::ScatterAlong { op, axis } => one(indexing::scatter_along(*op, &all()?, *axis)),
        Op::Scan { op, axis, reverse, exclusive } => {
            one(order::scan(*op, &input(0)?, *axis, *reverse, *exclusive, out.dtype))
        }
        Op::Sort { axis, order } => one(order::sort(&input(0)?, *axis, *order)),
        Op::ArgSort { axis, order } => one(order::argsort(&input(0)?, *axis, *order)),
        Op::Bitcast => one(input(0)?.bitcast(step.inputs[0].host()?.dtype, out.dtype, &out.shape)?),
        Op::Matmul { .. } => one(products::matmul(&input(0)?, &input(1)?, &out.shape)),
        Op::Linear { .. } => one(products::linear(&input(0)?, &input(1)?, &out.shape, false)),
        Op::LinearTransposed { .. } => one(products::linear(&input(0)?, &input(1)?, &out.shape, true)),
        Op::Embedding => one(movement::take(&input(0)?, &input(1)?, 0, &out.shape)),
        Op::LinearCrossEntropy(spec) => products::linear_cross_entropy(spec, &all()?),
        Op::RandomBits { width } => one(elementwise::random_bits(*width, &input(0)?, &out.shape)),
        Op::RmsNorm { eps } => one(fused::rms_norm(*eps, &input(0)?, &input(1)?)),
        Op::RmsNormVjp { eps } => Ok(fused::rms_norm_vjp(*eps, &all()?)),
        Op::LayerNorm { eps } => one(fused::layer_norm(*eps, &all()?)),
        Op::Rope(spec) => one(fused::rope(spec, &all()?)),
        Op::Attention(spec) => Ok(fused::attention(spec, &all()?)),
        Op::AttentionVjp(spec) => Ok(fused::attention_vjp(spec, &all()?)),
        Op::ShortConv(spec) => Ok(fused::short_conv(*spec, &all()?)),
        Op::ShortConvVjp(spec) => Ok(fused::short_conv_vjp(*spec, &all()?)),
        Op::AdamW(spec) => Ok(elementwise::adamw(spec, &all()?)),
        Op::Conv(spec) => one(conv::conv(spec, &input(0)?, &input(1)?, &out.shape)),
        Op::Hadamard { scale } => one(gathered::hadamard(*scale, &input(0)?)),
        Op::GatherMatmul => one(gathered::gather_matmul(&all()?, &out.shape, false)?),
        Op::GatherLinear { transposed, .. } => {
            one(gathered::gather_matmul(&all()?, &out.shape, !transposed)?)
        }
        Op::SegmentedMatmul => one(gathered::segmented_matmul(&all()?, &out.shape)),
        Op::Fused(fused) => region::region(fused, step),
        Op::PagedAttention(_)
        | Op::Fft(_)
        | Op::Linalg(_)
        | Op::Codec(_)
        | Op::Tracer(_)
        | Op::StopGradient
        | Op::After
        | Op::SavedAs
        | Op::Transpose(_)
        | Op::Broadcast
        | Op::Slice { .. }
        | Op::AsStrided { .. }
        | Op::Custom(_) => Err(Error::unsupported(
            step.op.name(),
            "the reference backend runs no such step (views and expansions)",
        )),
    }
}
