//! Reverse-mode differentiation.
//!
//! The function is called on tracers of its inputs; the graph that it built is walked from the
//! outputs back, each op's rule turning the gradient of its output into those of its inputs. The
//! result is again a lazy graph, so gradients nest.

use std::collections::HashMap;

use smallvec::{SmallVec, smallvec};

use super::dependents::{Stops, dependents};
use crate::node::{Inputs, State};
use crate::op::{Op, TraceGuard, TraceScope, UnaryOp};
use crate::ops::{self, Vjp};
use crate::{Array, Dtype, Error, Result};

/// The outputs of a function and the gradients of its inputs.
#[derive(Debug, Clone)]
pub struct Grads<T> {
    /// What the function returned.
    pub value: T,
    /// One gradient per differentiated input, of its shape and dtype.
    pub grads: Vec<Array>,
}

/// The outputs of `f` at `primals` and, for these gradients of the outputs, those of the inputs.
pub fn vjp(
    f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
    primals: &[Array],
    cotangents: &[Array],
) -> Result<(Vec<Array>, Vec<Array>)> {
    let (outputs, tracers) = trace(f, primals)?;
    if outputs.len() != cotangents.len() {
        return Err(Error::invalid(
            "vjp",
            format!("the function returned {} arrays, got {} cotangents", outputs.len(), cotangents.len()),
        ));
    }
    let seeds = outputs.iter().cloned().zip(cotangents.iter().cloned()).collect();
    let grads = backward(seeds, &tracers)?;
    Ok((outputs, grads))
}

/// The gradients of a function whose first output is a number, with all its outputs.
pub fn value_and_grad_many(
    f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
    primals: &[Array],
) -> Result<Grads<Vec<Array>>> {
    let (outputs, tracers) = trace(f, primals)?;
    let loss = outputs.first().ok_or_else(|| Error::invalid("grad", "the function returned nothing"))?;
    if loss.size() != 1 || !loss.dtype().is_float() {
        return Err(Error::invalid("grad", format!("the function must return one float, got {loss:?}")));
    }
    let seed = loss.ones_like();
    let grads = backward(vec![(loss.clone(), seed)], &tracers)?;
    Ok(Grads { value: outputs, grads })
}

/// The value of a scalar function and its gradients.
pub fn value_and_grad(f: impl FnOnce(&[Array]) -> Result<Array>, primals: &[Array]) -> Result<Grads<Array>> {
    let many = value_and_grad_many(|inputs| Ok(vec![f(inputs)?]), primals)?;
    let value = many.value.into_iter().next().expect("one output was given");
    Ok(Grads { value, grads: many.grads })
}

/// The gradients of a scalar function.
pub fn grad(f: impl FnOnce(&[Array]) -> Result<Array>, primals: &[Array]) -> Result<Vec<Array>> {
    Ok(value_and_grad(f, primals)?.grads)
}

pub(crate) fn trace(
    f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
    primals: &[Array],
) -> Result<(Vec<Array>, Vec<Array>)> {
    let scope = TraceScope::new();
    let tracers: Vec<Array> = primals.iter().map(|primal| scope.wrap(primal)).collect();
    let guard = TraceGuard(scope);
    let outputs = f(&tracers)?;
    drop(guard);
    Ok((outputs, tracers))
}

/// Gradients of `targets`, given those of some arrays built from them.
pub(crate) fn backward(seeds: Vec<(Array, Array)>, targets: &[Array]) -> Result<Vec<Array>> {
    let order = dependents(seeds.iter().map(|(array, _)| array), targets, Stops::Cut);
    let mut copies = Copies::of(&order.nodes);
    // node → gradient per output
    let mut arrived: HashMap<usize, SmallVec<[Option<Array>; 1]>> = HashMap::new();
    for (array, seed) in seeds {
        if seed.shape() != array.shape() {
            return Err(Error::shapes("vjp", &seed.shape().into(), &array.shape().into()));
        }
        if order.contains(array.id()) {
            deliver(&mut arrived, &array, seed.astype(array.dtype())?)?;
        }
    }
    for node in order.nodes.iter().rev() {
        let is_target = targets.iter().any(|target| target.id() == node.id());
        if is_target {
            continue;
        }
        let Some(cotangents) = arrived.remove(&node.id()) else { continue };
        let (op, inputs) = match &*node.node().state() {
            State::Lazy { op, inputs } => (op.clone(), inputs.clone()),
            _ => continue,
        };
        let needs: SmallVec<[bool; 4]> = inputs.iter().map(|input| order.contains(input.id())).collect();
        let takes_copies = op.gradient_takes_copies();
        let values: Inputs = match takes_copies {
            true => inputs.iter().map(|input| copies.input(input)).collect::<Result<_>>()?,
            false => inputs.clone(),
        };
        let saved_outputs = if takes_copies { copies.outputs(node)? } else { SmallVec::new() };
        let rule = Vjp {
            inputs: &values,
            output: node,
            saved_outputs: &saved_outputs,
            cotangents: &cotangents,
            needs: &needs,
        };
        let grads = rule_of(&op, &rule)?;
        for ((input, grad), &needed) in inputs.iter().zip(grads).zip(&needs) {
            if let (true, Some(grad)) = (needed, grad) {
                deliver(&mut arrived, input, grad)?;
            }
        }
    }
    targets
        .iter()
        .map(|target| {
            let grad = arrived.get(&target.id()).and_then(|grads| grads[0].clone());
            match grad {
                Some(grad) => grad.astype(target.dtype()),
                None => Ok(target.zeros_like()),
            }
        })
        .collect()
}

/// What gradient rules are given in place of arrays that have copies in another dtype ([`Op::SavedAs`]).
struct Copies {
    /// By node and output of arrays that have a gradient. (Other arrays have copies too, behind their own
    /// [`Op::SavedAs`].)
    of: HashMap<(usize, usize), Array>,
    /// By copy: its values in the dtype of what it stands for, once somebody has asked.
    values: HashMap<usize, Array>,
}

/// How many views are looked through for a copy.
const VIEWS: usize = 8;

impl Copies {
    fn of(nodes: &[Array]) -> Copies {
        let mut of = HashMap::new();
        for node in nodes {
            if let State::Lazy { op: Op::SavedAs, inputs } = &*node.node().state() {
                let (node, first) = (inputs[0].id(), inputs[0].output());
                for (index, copy) in inputs[1..].iter().enumerate() {
                    of.entry((node, first + index)).or_insert_with(|| copy.clone());
                }
            }
        }
        Copies { of, values: HashMap::new() }
    }

    fn values(&mut self, copy: &Array, dtype: Dtype) -> Result<Array> {
        if let Some(values) = self.values.get(&copy.id()) {
            return Ok(values.clone());
        }
        let values = copy.astype(dtype)?;
        self.values.insert(copy.id(), values.clone());
        Ok(values)
    }

    /// Per output of a node, what a rule is given for it if it has a copy.
    fn outputs(&mut self, node: &Array) -> Result<SmallVec<[Option<Array>; 1]>> {
        let mut output = |output: usize| {
            let copy = self.of.get(&(node.id(), output)).cloned();
            copy.map(|copy| self.values(&copy, node.node().spec(output).dtype)).transpose()
        };
        (0..node.node().outputs()).map(&mut output).collect()
    }

    /// What a rule is given for this input: of a view of what has a copy, the same view of the copy.
    fn input(&mut self, array: &Array) -> Result<Array> {
        let mut views: SmallVec<[(Op, Array); 2]> = SmallVec::new();
        let mut at = array.clone();
        let copy = loop {
            if let Some(copy) = self.of.get(&(at.id(), at.output())) {
                break copy.clone();
            }
            let before = match &*at.node().state() {
                State::Lazy { op: Op::SavedAs, inputs } => break inputs[1].clone(),
                State::Lazy { op, inputs } if op.is_saved_view() && views.len() < VIEWS => {
                    (op.clone(), inputs[0].clone())
                }
                _ => return Ok(array.clone()),
            };
            views.push((before.0, std::mem::replace(&mut at, before.1)));
        };
        if views.is_empty() {
            return self.values(&copy, array.dtype());
        }
        let dtype = copy.dtype();
        let view = |before, (op, view): (Op, Array)| Array::lazy(op, smallvec![before], view.shape(), dtype);
        views.into_iter().rev().fold(copy, view).astype(array.dtype())
    }
}

fn deliver(
    arrived: &mut HashMap<usize, SmallVec<[Option<Array>; 1]>>,
    to: &Array,
    grad: Array,
) -> Result<()> {
    let outputs = to.node().outputs();
    let slot = &mut arrived.entry(to.id()).or_insert_with(|| SmallVec::from_elem(None, outputs))[to.output()];
    *slot = Some(match slot.take() {
        Some(before) => before.add(grad)?,
        None => grad,
    });
    Ok(())
}

fn rule_of(op: &Op, rule: &Vjp) -> Result<ops::Grads> {
    match op {
        Op::Tracer(_) => rule.one(rule.cotangent().clone()),
        Op::Contiguous | Op::After | Op::SavedAs => rule.one(rule.cotangent().clone()),
        Op::StopGradient
        | Op::Full(_)
        | Op::Arange { .. }
        | Op::Compare(_)
        | Op::ArgReduce { .. }
        | Op::ArgSort { .. }
        | Op::RandomBits { .. } => rule.none(),
        // The absolute value has no complex derivative: its rule is an adjoint as it stands.
        Op::Unary(unary @ UnaryOp::Abs) => ops::elementwise::unary_vjp(*unary, rule),
        Op::Unary(unary) => ops::complex::adjoint(rule, |rule| ops::elementwise::unary_vjp(*unary, rule)),
        Op::Binary(binary) => ops::complex::adjoint(rule, |rule| ops::elementwise::binary_vjp(*binary, rule)),
        Op::Select => ops::elementwise::select_vjp(rule),
        Op::Cast => ops::elementwise::cast_vjp(rule),
        Op::Reshape => ops::shape::reshape_vjp(rule),
        Op::Transpose(order) => ops::shape::transpose_vjp(order, rule),
        Op::Broadcast => ops::shape::broadcast_vjp(rule),
        Op::Slice { start, step } => ops::shape::slice_vjp(start, step, rule),
        Op::SliceUpdate { start, step } => ops::shape::slice_update_vjp(start, step, rule),
        Op::Concatenate { axis } => ops::shape::concatenate_vjp(*axis, rule),
        Op::Reduce { op, axes } => {
            ops::complex::adjoint(rule, |rule| ops::reduce::reduce_vjp(*op, axes, rule))
        }
        Op::Softmax => ops::complex::adjoint(rule, ops::reduce::softmax_vjp),
        Op::LogSumExp => ops::complex::adjoint(rule, ops::reduce::logsumexp_vjp),
        Op::Take { axis } => ops::index::take_vjp(*axis, rule),
        Op::TakeAlong { axis } => ops::index::take_along_vjp(*axis, rule),
        Op::ScatterAdd { axis } => ops::index::scatter_add_vjp(*axis, rule),
        Op::ScatterAddAlong { axis } => ops::index::scatter_add_along_vjp(*axis, rule),
        Op::Gather { axes, .. } => ops::index::gather_vjp(axes, rule),
        Op::Scatter { op, axes } => ops::index::scatter_vjp(*op, axes, rule),
        Op::ScatterAlong { op, axis } => ops::index::scatter_along_vjp(*op, *axis, rule),
        Op::Scan { op, axis, reverse, exclusive } => {
            ops::scan::scan_vjp(*op, *axis, *reverse, *exclusive, rule)
        }
        Op::Sort { axis, order } => ops::sort::sort_vjp(*axis, *order, rule),
        Op::Bitcast => ops::layout::bitcast_vjp(rule),
        Op::AsStrided { strides, offset } => ops::layout::as_strided_vjp(strides, *offset, rule),
        Op::Matmul { precision } => {
            ops::complex::adjoint(rule, |rule| ops::linear::matmul_vjp(*precision, rule))
        }
        Op::Linear { precision } => ops::linear::linear_vjp(*precision, rule),
        Op::LinearTransposed { precision } => ops::linear::linear_transposed_vjp(*precision, rule),
        Op::Embedding => ops::linear::embedding_vjp(rule),
        Op::Dequantize => ops::linear::dequantize_vjp(rule),
        Op::RmsNorm { eps } => ops::fast::rms_norm_vjp(*eps, rule),
        Op::LayerNorm { eps } => ops::fast::layer_norm_vjp(*eps, rule),
        Op::Rope(spec) => ops::fast::rope_vjp(spec, rule),
        Op::Attention(spec) => ops::fast::attention_vjp(spec, rule),
        Op::ShortConv(spec) => ops::fast::short_conv_vjp(spec, rule),
        Op::LinearCrossEntropy(_) => ops::fast::linear_cross_entropy_vjp(op, rule),
        Op::Fused(region) => region.vjp(rule),
        Op::Conv(spec) => ops::conv::conv_vjp(spec, rule),
        Op::Fft(spec) => ops::fft::fft_vjp(spec, rule),
        Op::Linalg(op) => ops::linalg::linalg_vjp(*op, rule),
        Op::Hadamard { scale } => ops::products::hadamard_vjp(*scale, rule),
        Op::GatherMatmul => ops::products::gather_matmul_vjp(rule),
        Op::GatherLinear { precision, transposed } => {
            ops::experts::gather_linear_vjp((*precision, *transposed), rule)
        }
        Op::SegmentedMatmul => ops::products::segmented_matmul_vjp(rule),
        Op::Codec(op) => ops::quantized::codec_vjp(*op, rule),
        Op::Custom(custom) => ops::custom::custom_vjp(custom.as_ref(), rule),
        Op::RmsNormVjp { .. } | Op::AttentionVjp(_) | Op::ShortConvVjp(_) | Op::AdamW(_) => {
            ops::fast::definition::vjp(op, rule)
        }
        Op::PagedAttention(_) => Err(Error::unsupported(
            op.name(),
            "appends to a store, so it has no gradient: train with attention over arrays",
        )),
    }
}
