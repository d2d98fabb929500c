//! What an op is besides its sizes: the numbers in its fields that sizes of arrays may have got
//! into, and whether two ops are the same apart from them.

use crate::Dtype;
use crate::op::{Op, Scalar};
use crate::transforms::recorded;

/// A number in an op's fields. Those that are elements of arrays come with the type of these.
pub(crate) enum Number<'a> {
    Size(&'a mut usize),
    Step(&'a mut isize),
    Float(&'a mut f64, Dtype),
    Value(&'a mut Scalar, Dtype),
}

/// Visits the numbers of an op that a size of an array may be, or be part of, always in the same
/// order. The op's result is of this dtype.
pub(crate) fn visit(op: &mut Op, dtype: Dtype, see: &mut dyn FnMut(Number)) {
    match op {
        Op::Full(value) => see(Number::Value(value, dtype)),
        Op::Arange { start, step } => {
            see(Number::Float(start, dtype));
            see(Number::Float(step, dtype));
        }
        Op::Slice { start, step } | Op::SliceUpdate { start, step } => {
            start.iter_mut().for_each(|start| see(Number::Size(start)));
            step.iter_mut().for_each(|step| see(Number::Step(step)));
        }
        Op::Gather { slice, .. } => slice.iter_mut().for_each(|size| see(Number::Size(size))),
        Op::AsStrided { strides, offset } => {
            strides.iter_mut().for_each(|stride| see(Number::Step(stride)));
            see(Number::Size(offset));
        }
        // Gradients of convolutions pad by what the sizes leave over.
        Op::Conv(spec) => {
            let spec = std::sync::Arc::make_mut(spec);
            spec.low.iter_mut().chain(&mut spec.high).for_each(|zeros| see(Number::Step(zeros)));
        }
        Op::Custom(custom) => recorded::visit(custom, see),
        _ => {}
    }
}

/// The op with zeros for the numbers that [`visit`] sees.
fn without_numbers(op: &Op) -> Op {
    let mut op = op.clone();
    visit(&mut op, Dtype::F32, &mut |number| match number {
        Number::Size(size) => *size = 0,
        Number::Step(step) => *step = 0,
        Number::Float(float, _) => *float = 0.0,
        // What kind of number it is stays.
        Number::Value(Scalar::Float(value), _) => *value = 0.0,
        Number::Value(Scalar::Int(value), _) => *value = 0,
        Number::Value(Scalar::UInt(value), _) => *value = 0,
        Number::Value(Scalar::Bool(_), _) => {}
    });
    op
}

/// Whether two ops are the same but for numbers that may be sizes.
pub(super) fn is_same_but_for_numbers(a: &Op, b: &Op) -> bool {
    match (a, b) {
        (Op::Custom(a), Op::Custom(b)) => recorded::is_same_but_for_numbers(a, b),
        _ => is_same(&without_numbers(a), &without_numbers(b)),
    }
}

/// Whether two ops on the same operands give the same. Ops with effects, or with rules of their
/// own, are never shared.
pub(super) fn is_same(a: &Op, b: &Op) -> bool {
    match (a, b) {
        (Op::Full(a), Op::Full(b)) => match (a, b) {
            // −0 is not 0, and a NaN is itself.
            (Scalar::Float(a), Scalar::Float(b)) => a.to_bits() == b.to_bits(),
            _ => a == b,
        },
        (Op::Arange { start: a, step: s }, Op::Arange { start: b, step: t }) => {
            a.to_bits() == b.to_bits() && s.to_bits() == t.to_bits()
        }
        (Op::Unary(a), Op::Unary(b)) => a == b,
        (Op::Binary(a), Op::Binary(b)) => a == b,
        (Op::Compare(a), Op::Compare(b)) => a == b,
        (Op::StopGradient, Op::StopGradient)
        | (Op::After, Op::After)
        | (Op::SavedAs, Op::SavedAs)
        | (Op::Select, Op::Select)
        | (Op::Cast, Op::Cast)
        | (Op::Reshape, Op::Reshape)
        | (Op::Broadcast, Op::Broadcast)
        | (Op::Contiguous, Op::Contiguous)
        | (Op::Softmax, Op::Softmax)
        | (Op::LogSumExp, Op::LogSumExp)
        | (Op::Bitcast, Op::Bitcast)
        | (Op::Embedding, Op::Embedding)
        | (Op::Dequantize, Op::Dequantize)
        | (Op::GatherMatmul, Op::GatherMatmul)
        | (Op::SegmentedMatmul, Op::SegmentedMatmul) => true,
        (Op::Transpose(a), Op::Transpose(b)) => a == b,
        (Op::Slice { start: a, step: s }, Op::Slice { start: b, step: t })
        | (Op::SliceUpdate { start: a, step: s }, Op::SliceUpdate { start: b, step: t }) => a == b && s == t,
        (Op::Concatenate { axis: a }, Op::Concatenate { axis: b })
        | (Op::Take { axis: a }, Op::Take { axis: b })
        | (Op::TakeAlong { axis: a }, Op::TakeAlong { axis: b })
        | (Op::ScatterAdd { axis: a }, Op::ScatterAdd { axis: b })
        | (Op::ScatterAddAlong { axis: a }, Op::ScatterAddAlong { axis: b }) => a == b,
        (Op::Gather { axes: a, slice: x }, Op::Gather { axes: b, slice: y }) => a == b && x == y,
        (Op::Scatter { op: a, axes: x }, Op::Scatter { op: b, axes: y }) => a == b && x == y,
        (Op::ScatterAlong { op: a, axis: x }, Op::ScatterAlong { op: b, axis: y }) => a == b && x == y,
        (
            Op::Scan { op: a, axis: x, reverse: r, exclusive: e },
            Op::Scan { op: b, axis: y, reverse: s, exclusive: f },
        ) => a == b && x == y && r == s && e == f,
        (Op::Sort { axis: a, order: x }, Op::Sort { axis: b, order: y })
        | (Op::ArgSort { axis: a, order: x }, Op::ArgSort { axis: b, order: y }) => a == b && x == y,
        (Op::AsStrided { strides: a, offset: x }, Op::AsStrided { strides: b, offset: y }) => {
            a == b && x == y
        }
        (Op::Reduce { op: a, axes: x }, Op::Reduce { op: b, axes: y }) => a == b && x == y,
        (Op::ArgReduce { max: a, axis: x }, Op::ArgReduce { max: b, axis: y }) => a == b && x == y,
        (Op::Matmul { precision: a }, Op::Matmul { precision: b })
        | (Op::Linear { precision: a }, Op::Linear { precision: b })
        | (Op::LinearTransposed { precision: a }, Op::LinearTransposed { precision: b }) => a == b,
        (
            Op::GatherLinear { precision: a, transposed: s },
            Op::GatherLinear { precision: b, transposed: t },
        ) => a == b && s == t,
        (Op::RandomBits { width: a }, Op::RandomBits { width: b }) => a == b,
        (Op::RmsNorm { eps: a }, Op::RmsNorm { eps: b })
        | (Op::RmsNormVjp { eps: a }, Op::RmsNormVjp { eps: b })
        | (Op::LayerNorm { eps: a }, Op::LayerNorm { eps: b }) => a == b,
        (Op::Rope(a), Op::Rope(b)) => a == b,
        (Op::Attention(a), Op::Attention(b)) | (Op::AttentionVjp(a), Op::AttentionVjp(b)) => a == b,
        (Op::ShortConv(a), Op::ShortConv(b)) | (Op::ShortConvVjp(a), Op::ShortConvVjp(b)) => a == b,
        (Op::LinearCrossEntropy(a), Op::LinearCrossEntropy(b)) => a == b,
        (Op::AdamW(a), Op::AdamW(b)) => a == b,
        (Op::Conv(a), Op::Conv(b)) => a == b,
        (Op::Fft(a), Op::Fft(b)) => a == b,
        (Op::Linalg(a), Op::Linalg(b)) => a == b,
        (Op::Hadamard { scale: a }, Op::Hadamard { scale: b }) => a == b,
        (Op::Codec(a), Op::Codec(b)) => a == b,
        // Tracers, stores, regions, functions with rules of their own.
        _ => false,
    }
}
