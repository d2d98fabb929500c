//! Forward-mode differentiation: tangents of the outputs from tangents of the inputs.
//!
//! The function is called on tracers of its inputs; the graph that it built is walked from the
//! inputs on, each op's rule turning the tangents of its inputs into those of its outputs. The
//! primal values are those of the graph itself, so nothing is computed twice.

use std::collections::HashMap;

use smallvec::SmallVec;

use super::dependents::{Stops, check_built, dependents};
use super::vjp::trace;
use crate::node::State;
use crate::op::{Op, TraceScope};
use crate::ops::{self, Jvp, Tangents};
use crate::{Array, Error, Result};

/// The outputs of `f` at `primals`, and how they change along `tangents`: the Jacobian times a
/// vector, at about the cost of calling `f` twice.
///
/// A tangent has its primal's shape. Integers have no tangents: those given for them are ignored,
/// and integer outputs get zeros.
///
/// ```
/// use mica_array::{Array, transforms::jvp};
///
/// let (x, dx) = (Array::from_slice(&[3.0f32], &[1])?, Array::from_slice(&[1.0f32], &[1])?);
/// let (y, dy) = jvp(|x| Ok(vec![x[0].square()?]), &[x], &[dx])?;
/// assert_eq!((y[0].item::<f32>()?, dy[0].item::<f32>()?), (9.0, 6.0));
/// # Ok::<(), mica_array::Error>(())
/// ```
///
/// # Errors
/// Those of `f`; tangents that do not fit; ops without tangents (they name themselves).
pub fn jvp(
    f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
    primals: &[Array],
    tangents: &[Array],
) -> Result<(Vec<Array>, Vec<Array>)> {
    if primals.len() != tangents.len() {
        return Err(Error::invalid(
            "jvp",
            format!("needs one tangent per input, got {} for {}", tangents.len(), primals.len()),
        ));
    }
    for (index, (primal, tangent)) in primals.iter().zip(tangents).enumerate() {
        if primal.shape() != tangent.shape() {
            return Err(Error::invalid(
                "jvp",
                format!(
                    "the tangent of input {index} must have its shape {:?}, got {tangent:?}",
                    primal.shape()
                ),
            ));
        }
    }
    check_built(tangents)?;
    let (outputs, tracers) = trace(f, primals)?;
    check_built(&outputs)?;
    let moving = tracers.iter().zip(tangents).filter(|(tracer, _)| tracer.dtype().is_inexact());
    let seeds = moving.map(|(tracer, tangent)| Ok((tracer.clone(), tangent.astype(tracer.dtype())?)));
    let found = forward_from(seeds.collect::<Result<_>>()?, &outputs)?;
    let or_zeros = |(output, tangent): (&Array, Option<Array>)| match tangent {
        Some(tangent) => tangent.astype(output.dtype()),
        None => Ok(output.zeros_like()),
    };
    let tangents = outputs.iter().zip(found).map(or_zeros).collect::<Result<_>>()?;
    Ok((outputs, tangents))
}

/// Tracers, that nobody else holds, of the inputs that `is_traced` picks; the others as they are.
pub(crate) fn trace_from(inputs: &[Array], is_traced: impl Fn(usize) -> bool) -> Vec<Array> {
    let scope = TraceScope::new();
    scope.close();
    let one =
        |(index, input): (usize, &Array)| if is_traced(index) { scope.wrap(input) } else { input.clone() };
    inputs.iter().enumerate().map(one).collect()
}

/// Tangents of `outputs`, given those of some arrays that they were built from; `None` for an
/// output that does not depend on them.
pub(crate) fn forward_from(seeds: Vec<(Array, Array)>, outputs: &[Array]) -> Result<Vec<Option<Array>>> {
    let targets: Vec<Array> = seeds.iter().map(|(target, _)| target.clone()).collect();
    let order = dependents(outputs.iter(), &targets, Stops::Cut);
    // node → tangent per output
    let mut known: HashMap<usize, Tangents> = seeds
        .into_iter()
        .map(|(target, tangent)| (target.id(), smallvec::smallvec![Some(tangent)]))
        .collect();
    let find = |known: &HashMap<usize, Tangents>, array: &Array| {
        known.get(&array.id()).and_then(|tangents| tangents[array.output()].clone())
    };
    for node in &order.nodes[targets.len()..] {
        let (op, inputs) = match &*node.node().state() {
            State::Lazy { op, inputs } => (op.clone(), inputs.clone()),
            _ => continue,
        };
        let tangents: SmallVec<[Option<Array>; 4]> = inputs.iter().map(|input| find(&known, input)).collect();
        if tangents.iter().any(Option::is_some) {
            let rule = Jvp { inputs: &inputs, output: node, tangents: &tangents };
            known.insert(node.id(), rule_of(&op, &rule)?);
        }
    }
    Ok(outputs.iter().map(|output| find(&known, output)).collect())
}

fn rule_of(op: &Op, rule: &Jvp) -> Result<Tangents> {
    match op {
        Op::Tracer(_) | Op::Contiguous | Op::After | Op::SavedAs => {
            rule.linear(0, |tangent| Ok(tangent.clone()))
        }
        Op::StopGradient
        | Op::Full(_)
        | Op::Arange { .. }
        | Op::Compare(_)
        | Op::ArgReduce { .. }
        | Op::ArgSort { .. }
        | Op::RandomBits { .. } => rule.none(),
        Op::Unary(unary) => ops::elementwise::jvp::unary(*unary, rule),
        Op::Binary(binary) => ops::elementwise::jvp::binary(*binary, rule),
        Op::Select => ops::elementwise::jvp::select(rule),
        Op::Cast => ops::elementwise::jvp::cast(rule),
        Op::Reshape => ops::shape::jvp::reshape(rule),
        Op::Transpose(_) => ops::shape::jvp::moved(op, rule),
        Op::Broadcast => ops::shape::jvp::moved(op, rule),
        Op::Slice { .. } => ops::shape::jvp::moved(op, rule),
        Op::SliceUpdate { .. } | Op::Concatenate { .. } => ops::shape::jvp::joined(op, rule),
        Op::Reduce { op, axes } => ops::reduce::jvp::reduce(*op, axes, rule),
        Op::Softmax => ops::reduce::jvp::softmax(rule),
        Op::LogSumExp => ops::reduce::jvp::logsumexp(rule),
        Op::Take { .. } | Op::TakeAlong { .. } => ops::index::jvp::gathered(op, rule),
        Op::ScatterAdd { .. } | Op::ScatterAddAlong { .. } => ops::index::jvp::scattered(op, rule),
        Op::Gather { .. } => ops::index::jvp::gathered(op, rule),
        Op::Scatter { op: how, .. } => ops::index::jvp::joined(op, *how, [0, 1], rule),
        Op::ScatterAlong { op: how, .. } => ops::index::jvp::joined(op, *how, [0, 2], rule),
        Op::Scan { op: scan, axis, reverse, exclusive } => {
            ops::scan::scan_jvp(*scan, *axis, *reverse, *exclusive, rule)
        }
        Op::Sort { axis, order } => ops::sort::sort_jvp(*axis, *order, rule),
        Op::Bitcast => ops::layout::bitcast_jvp(rule),
        Op::AsStrided { .. } => ops::shape::jvp::moved(op, rule),
        Op::Matmul { precision } => ops::linear::jvp::matmul(*precision, rule),
        Op::Linear { precision } => ops::linear::jvp::linear(*precision, rule),
        Op::LinearTransposed { precision } => ops::linear::jvp::linear_transposed(*precision, rule),
        Op::Embedding => ops::linear::jvp::embedding(rule),
        Op::Dequantize => ops::linear::jvp::dequantize(rule),
        Op::Rope(spec) => ops::fast::jvp::rope(spec, rule),
        Op::ShortConv(spec) => ops::fast::jvp::short_conv(*spec, rule),
        Op::RmsNorm { .. }
        | Op::RmsNormVjp { .. }
        | Op::LayerNorm { .. }
        | Op::Attention(_)
        | Op::AttentionVjp(_)
        | Op::ShortConvVjp(_)
        | Op::LinearCrossEntropy(_)
        | Op::AdamW(_) => ops::fast::definition::jvp(op, rule),
        Op::Fused(region) => region.jvp(rule),
        Op::Custom(custom) => ops::custom::custom_jvp(custom.as_ref(), rule),
        Op::Conv(_) | Op::GatherMatmul | Op::SegmentedMatmul => ops::products::bilinear_jvp(op, rule),
        Op::GatherLinear { precision, transposed } => {
            ops::experts::gather_linear_jvp((*precision, *transposed), rule)
        }
        Op::Fft(_) | Op::Hadamard { .. } => ops::products::linear_jvp(op, rule),
        Op::Linalg(op) => ops::linalg::linalg_jvp(*op, rule),
        Op::Codec(op) => ops::quantized::codec_jvp(*op, rule),
        Op::PagedAttention(_) => Err(Error::unsupported(
            op.name(),
            "appends to a store, so it has no tangent: attend over arrays with attention",
        )),
    }
}
