//! Vectorization: a function of one example becomes one of a batch.
//!
//! The function is called on tracers with the shapes of one example; the graph that it built is
//! walked from the inputs on, each op's rule building the op for all examples at once. Inside, the
//! batch is always the first dimension; what does not depend on a batched input has none, and is
//! computed once.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::dependents::{Stops, check_built, dependents};

use crate::node::{Inputs, State};
use crate::op::{Op, TraceGuard, TraceScope};
use crate::ops::custom::CustomOp;
use crate::ops::{self, Vmap};
use crate::shape::normalize_axis;
use crate::storage::Spec;
use crate::{Array, Error, Result, Shape};

/// Calls `f`, which is written for one example, on a batch of them.
///
/// `in_axes` says along which dimension of each input the examples are; `None`: all examples share
/// the input. `out_axes` says the same of the outputs; `None` is for an output that is the same
/// for all. Either may have one entry, which then holds for all. Axes may be negative.
///
/// It nests with itself and with the other transformations. Gradients per example:
///
/// ```
/// use mica_array::{Array, transforms::{grad, vmap}};
///
/// let w = Array::from_slice(&[1.0f32, 2.0], &[2])?;
/// let x = Array::from_slice(&[1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0], &[3, 2])?;
/// let loss = |v: &[Array]| v[0].multiply(&v[1])?.sum(&[], false)?.square();
/// // The gradient by w alone: x is captured.
/// let per_example = |v: &[Array]| grad(|w| loss(&[w[0].clone(), v[1].clone()]), &v[..1]);
/// let grads = vmap(per_example, &[w, x], &[None, Some(0)], &[Some(0)])?;
/// assert_eq!(grads[0].to_vec::<f32>()?, [2.0, 0.0, 0.0, 4.0, 6.0, 6.0]);
/// # Ok::<(), mica_array::Error>(())
/// ```
///
/// # Errors
/// Those of `f`; axes that do not fit or differ in size; an output said to be shared that is not;
/// ops that have no batched form (they name themselves).
pub fn vmap(
    f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
    inputs: &[Array],
    in_axes: &[Option<i32>],
    out_axes: &[Option<i32>],
) -> Result<Vec<Array>> {
    check_built(inputs)?;
    let in_axes = per_array("in_axes", in_axes, inputs.len())?;
    let mut size: Option<(usize, usize)> = None;
    let mut moved = Vec::with_capacity(inputs.len());
    for (index, (input, axis)) in inputs.iter().zip(&in_axes).enumerate() {
        let Some(axis) = axis else {
            moved.push(input.clone());
            continue;
        };
        let axis = normalize_axis("vmap", *axis, input.rank())?;
        if input.packed().is_some() {
            return Err(Error::unsupported(
                "vmap",
                format!("input {index} is a packed weight, which has no batch: its axis must be None"),
            ));
        }
        let count = input.shape()[axis];
        match size {
            Some((first, other)) if other != count => {
                return Err(Error::invalid(
                    "vmap",
                    format!("input {first} has {other} examples, input {index} has {count}"),
                ));
            }
            _ => size = size.or(Some((index, count))),
        }
        moved.push(move_axis(input, axis, 0)?);
    }
    let Some((_, size)) = size else {
        return Err(Error::invalid("vmap", "needs an input with a batch, all axes are None"));
    };
    let batched: Vec<bool> = in_axes.iter().map(Option::is_some).collect();
    let outputs = batch(f, &moved, &batched, size)?;
    let out_axes = per_array("out_axes", out_axes, outputs.len())?;
    outputs
        .into_iter()
        .zip(out_axes)
        .enumerate()
        .map(|(index, (output, axis))| match (axis, output) {
            (None, Mapped { array, batched: false }) => Ok(array),
            (None, Mapped { array, .. }) => Err(Error::invalid(
                "vmap",
                format!("output {index} differs between examples ({array:?}): its axis can't be None"),
            )),
            (Some(axis), output) => {
                let array = output.full(size)?;
                move_axis(&array, 0, normalize_axis("vmap", axis, array.rank())?)
            }
        })
        .collect()
}

fn per_array(name: &str, axes: &[Option<i32>], count: usize) -> Result<Vec<Option<i32>>> {
    match axes {
        [one] => Ok(vec![*one; count]),
        _ if axes.len() == count => Ok(axes.to_vec()),
        _ => Err(Error::invalid("vmap", format!("{name} has {} entries for {count} arrays", axes.len()))),
    }
}

/// The array with one dimension moved to another place.
pub(crate) fn move_axis(array: &Array, from: usize, to: usize) -> Result<Array> {
    let mut order: SmallVec<[i32; 4]> = (0..array.rank() as i32).collect();
    let axis = order.remove(from);
    order.insert(to, axis);
    array.transpose(&order)
}

/// An array for all examples: with the batch as first dimension, or the same for all.
#[derive(Clone, Debug)]
pub(crate) struct Mapped {
    pub(crate) array: Array,
    pub(crate) batched: bool,
}

impl Mapped {
    /// With a batch, whether there was one or not.
    pub(crate) fn full(self, size: usize) -> Result<Array> {
        if self.batched {
            return Ok(self.array);
        }
        let mut shape: Shape = smallvec::smallvec![size];
        shape.extend_from_slice(self.array.shape());
        self.array.broadcast_to(&shape)
    }
}

/// `f` on a batch: inputs have it first where `batched` holds.
pub(crate) fn batch(
    f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
    inputs: &[Array],
    batched: &[bool],
    size: usize,
) -> Result<Vec<Mapped>> {
    let scope = TraceScope::new();
    let mut known: HashMap<usize, SmallVec<[Option<Mapped>; 1]>> = HashMap::new();
    let mut targets = Vec::new();
    let examples: Vec<Array> = inputs
        .iter()
        .zip(batched)
        .map(|(input, &batched)| {
            if !batched {
                return input.clone();
            }
            // One example stands for all: it has no values, not even afterwards.
            let escaped = Error::invalid(
                "vmap",
                "an array of one example was used outside the function that vmap maps",
            );
            let example = scope.wrap(&Array::failed(escaped, &input.shape()[1..], input.dtype()));
            let mapped = Mapped { array: input.clone(), batched: true };
            known.insert(example.id(), smallvec::smallvec![Some(mapped)]);
            targets.push(example.clone());
            example
        })
        .collect();
    let outputs = {
        let _guard = TraceGuard(scope);
        f(&examples)?
    };
    check_built(&outputs)?;
    let order = dependents(outputs.iter(), &targets, Stops::Pass);
    let find =
        |known: &HashMap<usize, SmallVec<[Option<Mapped>; 1]>>, array: &Array| match known.get(&array.id()) {
            Some(outputs) => outputs[array.output()].clone().expect("wanted, since there is a handle on it"),
            None => Mapped { array: array.clone(), batched: false },
        };
    for node in &order.nodes[targets.len()..] {
        let (op, inputs) = match &*node.node().state() {
            State::Lazy { op, inputs } => (op.clone(), inputs.clone()),
            _ => continue,
        };
        let mapped: SmallVec<[Mapped; 4]> = inputs.iter().map(|input| find(&known, input)).collect();
        known.insert(node.id(), map_node(op, node, mapped, size)?);
    }
    Ok(outputs.iter().map(|output| find(&known, output)).collect())
}

/// The outputs of a node for all examples; those that nobody wants may be missing.
fn map_node(
    op: Op,
    node: &Array,
    inputs: SmallVec<[Mapped; 4]>,
    size: usize,
) -> Result<SmallVec<[Option<Mapped>; 1]>> {
    let count = node.node().outputs();
    match op {
        // The tracers of transformations within have done their work.
        Op::Tracer(_) => return Ok(inputs.into_iter().map(Some).collect()),
        // Waiting for a batch gives an array no batch.
        Op::After => {
            let array = inputs[0].array.after(&inputs[1].array);
            return Ok(smallvec::smallvec![Some(Mapped { array, batched: inputs[0].batched })]);
        }
        _ => {}
    }
    let batched: SmallVec<[bool; 4]> = inputs.iter().map(|input| input.batched).collect();
    let arrays: Inputs = inputs.into_iter().map(|input| input.array).collect();
    if !batched.contains(&true) {
        let specs: Vec<Spec> = (0..count).map(|output| node.node().spec(output).clone()).collect();
        let first = match specs.as_slice() {
            [spec] => Array::lazy(op, arrays, spec.shape.clone(), spec.dtype),
            _ => Array::lazy_many(op, arrays, specs),
        };
        let output = |output| node.node().wants(output).then(|| first.sibling(output));
        return Ok((0..count).map(|index| Some(Mapped { array: output(index)?, batched: false })).collect());
    }
    if size == 0 {
        // Whatever the op does, it gives nothing.
        let empty = |output: usize| {
            let spec = node.node().spec(output);
            let mut shape: Shape = smallvec::smallvec![0];
            shape.extend_from_slice(&spec.shape);
            Some(Mapped { array: Array::zeros(&shape, spec.dtype), batched: true })
        };
        return Ok((0..count).map(empty).collect());
    }
    let rule = Vmap { inputs: &arrays, batched: &batched, size, node };
    let outputs = rule_of(&op, &rule)?;
    debug_assert_eq!(outputs.len(), count);
    for (output, mapped) in outputs.iter().enumerate() {
        let Some(mapped) = mapped else { continue };
        let spec = node.node().spec(output);
        let (shape, lead) = (mapped.array.shape(), mapped.batched as usize);
        let fits = shape.len() == lead + spec.shape.len()
            && shape[lead..] == *spec.shape
            && shape[..lead].iter().all(|&count| count == size);
        if !fits || mapped.array.dtype() != spec.dtype {
            return Err(Error::invalid(
                "vmap",
                format!("{} gave {:?} where one of {size} examples gives {spec:?}", op.name(), mapped.array),
            ));
        }
    }
    Ok(outputs)
}

type Outputs = SmallVec<[Option<Mapped>; 1]>;

fn one(array: Array) -> Result<Outputs> {
    Ok(smallvec::smallvec![Some(Mapped { array, batched: true })])
}

fn rule_of(op: &Op, rule: &Vmap) -> Result<Outputs> {
    match op {
        Op::Tracer(_) | Op::After | Op::Full(_) | Op::Arange { .. } => {
            Err(Error::Kernel(format!("{} has no batched form", op.name()).into()))
        }
        Op::StopGradient
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Compare(_)
        | Op::Select
        | Op::Cast
        | Op::SavedAs
        | Op::Contiguous => one(rule.build(op.clone(), rule.all()?)?),
        Op::Reshape => one(ops::shape::vmap::reshape(rule)?),
        Op::Transpose(order) => one(ops::shape::vmap::transpose(order, rule)?),
        Op::Broadcast => one(ops::shape::vmap::broadcast(rule)?),
        Op::Slice { start, step } => one(ops::shape::vmap::slice(start, step, rule)?),
        Op::SliceUpdate { start, step } => one(ops::shape::vmap::slice_update(start, step, rule)?),
        Op::Concatenate { axis } => one(rule.build(Op::Concatenate { axis: axis + 1 }, rule.all()?)?),
        Op::Reduce { op, axes } => {
            let axes = axes.iter().map(|axis| axis + 1).collect();
            one(rule.build(Op::Reduce { op: *op, axes }, rule.all()?)?)
        }
        Op::ArgReduce { max, axis } => {
            one(rule.build(Op::ArgReduce { max: *max, axis: axis + 1 }, rule.all()?)?)
        }
        // Over the last axis, which the batch is not.
        Op::Softmax | Op::LogSumExp => one(rule.build(op.clone(), rule.all()?)?),
        Op::Take { axis } => one(ops::index::vmap::take(*axis, rule)?),
        Op::TakeAlong { axis } => one(rule.build(Op::TakeAlong { axis: axis + 1 }, rule.all()?)?),
        Op::ScatterAdd { axis } => one(ops::index::vmap::scatter_add(*axis, rule)?),
        Op::ScatterAddAlong { axis } => one(rule.build(Op::ScatterAddAlong { axis: axis + 1 }, rule.all()?)?),
        Op::Gather { axes, slice } => one(ops::index::vmap::gather(axes, slice, rule)?),
        Op::Scatter { op, axes } => one(ops::index::vmap::scatter(*op, axes, rule)?),
        Op::ScatterAlong { op, axis } => {
            one(rule.build(Op::ScatterAlong { op: *op, axis: axis + 1 }, rule.all()?)?)
        }
        Op::Scan { op, axis, reverse, exclusive } => {
            let (reverse, exclusive) = (*reverse, *exclusive);
            one(rule.build(Op::Scan { op: *op, axis: axis + 1, reverse, exclusive }, rule.all()?)?)
        }
        Op::Sort { axis, order } => one(rule.build(Op::Sort { axis: axis + 1, order: *order }, rule.all()?)?),
        Op::ArgSort { axis, order } => {
            one(rule.build(Op::ArgSort { axis: axis + 1, order: *order }, rule.all()?)?)
        }
        // Of the last axis, which the batch is not, or of single elements.
        Op::Bitcast => one(rule.build(op.clone(), rule.all()?)?),
        Op::AsStrided { strides, offset } => one(ops::layout::as_strided_vmap(strides, *offset, rule)?),
        Op::Matmul { precision } => one(ops::linear::vmap::matmul(*precision, rule)?),
        Op::Linear { precision } => one(ops::linear::vmap::linear(*precision, rule)?),
        Op::LinearTransposed { precision } => one(ops::linear::vmap::linear_transposed(*precision, rule)?),
        Op::Embedding => one(ops::linear::vmap::embedding(rule)?),
        Op::Dequantize => Err(Error::unsupported(op.name(), "a packed weight has no batch")),
        // Keys are [.., 2], and each fills its part of the result.
        Op::RandomBits { .. } => one(rule.build(op.clone(), rule.all()?)?),
        Op::RmsNorm { eps } => one(ops::fast::vmap::rms_norm(*eps, rule)?),
        Op::LayerNorm { eps } => one(ops::fast::vmap::layer_norm(*eps, rule)?),
        Op::Rope(spec) => ops::fast::vmap::rope(spec, rule),
        Op::Attention(spec) => ops::fast::vmap::attention(spec, rule),
        Op::AttentionVjp(spec) => ops::fast::vmap::attention_vjp(spec, rule),
        Op::ShortConv(spec) => ops::fast::vmap::short_conv(*spec, rule),
        Op::RmsNormVjp { .. } | Op::ShortConvVjp(_) | Op::LinearCrossEntropy(_) => {
            ops::fast::definition::vmap(op, rule)
        }
        Op::AdamW(_) => ops::fast::vmap::adamw(op, rule),
        Op::Fused(region) => Ok(ops::elementwise::vmap::fused(region, rule)?),
        Op::Custom(custom) => map_custom(custom, rule),
        // Whatever comes before the last dimensions is a batch to them, and axes count one more.
        Op::Hadamard { .. } => one(rule.build(op.clone(), rule.all()?)?),
        Op::Fft(spec) => {
            let spec = ops::fft::FftSpec { axis: spec.axis + 1, ..*spec };
            one(rule.build(Op::Fft(spec), rule.all()?)?)
        }
        Op::Linalg(_) | Op::Codec(_) => several(op, rule),
        Op::Conv(spec) => one(ops::conv::conv_vmap(spec, rule)?),
        Op::GatherMatmul | Op::GatherLinear { .. } => one(ops::products::gather_matmul_vmap(op, rule)?),
        Op::SegmentedMatmul => one(ops::products::segmented_matmul_vmap(rule)?),
        Op::PagedAttention(_) => Err(Error::unsupported(
            op.name(),
            "appends to a store, so it can't be mapped: attend over arrays with attention",
        )),
    }
}

/// An op with several outputs to which leading dimensions are a batch.
fn several(op: &Op, rule: &Vmap) -> Result<Outputs> {
    let node = rule.node.node();
    // Scales have as many dimensions as the words; one number for the whole array has fewer.
    let global = |at: usize| matches!(op, Op::Codec(_)) && rule.example(at).len() < rule.example(0).len();
    if (0..rule.inputs.len()).any(|at| rule.batched[at] && global(at)) {
        return Err(Error::unsupported(op.name(), "a global scale that differs between examples"));
    }
    let specs: Vec<Spec> = (0..node.outputs())
        .map(|output| Spec::new(rule.with_batch(&node.spec(output).shape), node.spec(output).dtype))
        .collect();
    let inputs = (0..rule.inputs.len())
        .map(|at| match op {
            Op::Codec(_) if global(at) => Ok(rule.inputs[at].clone()),
            Op::Codec(_) => rule.full(at)?.contiguous(),
            _ => rule.full(at),
        })
        .collect::<Result<_>>()?;
    let first = match specs.as_slice() {
        [spec] => Array::lazy(op.clone(), inputs, spec.shape.clone(), spec.dtype),
        _ => Array::lazy_many(op.clone(), inputs, specs),
    };
    Ok((0..node.outputs())
        .map(|output| node.wants(output).then(|| Mapped { array: first.sibling(output), batched: true }))
        .collect())
}

fn map_custom(custom: &Arc<dyn CustomOp>, rule: &Vmap) -> Result<Outputs> {
    let axes: Vec<Option<usize>> = rule.batched.iter().map(|&batched| batched.then_some(0)).collect();
    if let Some((outputs, axes)) = custom.vmap(rule.inputs, &axes)? {
        let count = rule.node.node().outputs();
        if outputs.len() != count || axes.len() != count {
            return Err(Error::invalid(
                custom.name(),
                format!("the vmap rule gave {} outputs and {} axes, not {count}", outputs.len(), axes.len()),
            ));
        }
        return outputs
            .into_iter()
            .zip(axes)
            .map(|(array, axis)| {
                Ok(Some(match axis {
                    Some(axis) if axis >= array.rank() => {
                        return Err(Error::invalid(
                            custom.name(),
                            format!("the vmap rule names axis {axis} of {array:?}"),
                        ));
                    }
                    Some(axis) => Mapped { array: move_axis(&array, axis, 0)?, batched: true },
                    None => Mapped { array, batched: false },
                }))
            })
            .collect();
    }
    let node = rule.node.node();
    let specs: Vec<Spec> = (0..node.outputs())
        .map(|output| Spec::new(rule.with_batch(&node.spec(output).shape), node.spec(output).dtype))
        .collect();
    let count = specs.len();
    let mapped = MappedCustom { inner: custom.clone(), batched: rule.batched.into(), size: rule.size };
    let first = Array::lazy_many(Op::Custom(Arc::new(mapped)), rule.inputs.into(), specs);
    Ok((0..count)
        .map(|output| {
            Some(Mapped { array: rule.wants(output).then(|| first.sibling(output))?, batched: true })
        })
        .collect())
}

/// A custom op over a batch: its meaning, its gradient and its tangents, each mapped.
#[derive(Clone, Debug)]
pub(super) struct MappedCustom {
    pub(super) inner: Arc<dyn CustomOp>,
    pub(super) batched: SmallVec<[bool; 4]>,
    pub(super) size: usize,
}

impl CustomOp for MappedCustom {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn expand(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        let outputs = batch(|example| self.inner.expand(example), inputs, &self.batched, self.size)?;
        outputs.into_iter().map(|output| output.full(self.size)).collect()
    }

    fn vjp(
        &self,
        inputs: &[Array],
        outputs: &[Array],
        cotangents: &[Option<Array>],
    ) -> Result<Vec<Option<Array>>> {
        let arrays: Vec<Array> =
            inputs.iter().chain(outputs).chain(cotangents.iter().flatten()).cloned().collect();
        let mut batched = self.batched.to_vec();
        batched.resize(arrays.len(), true);
        let mut given = Vec::new();
        let grads = batch(
            |example| {
                let (inputs, rest) = example.split_at(inputs.len());
                let (outputs, mut arrived) = (&rest[..outputs.len()], rest[outputs.len()..].iter().cloned());
                let cotangents: Vec<Option<Array>> = cotangents
                    .iter()
                    .map(|cotangent| cotangent.as_ref().and_then(|_| arrived.next()))
                    .collect();
                let grads = self.inner.vjp(inputs, outputs, &cotangents)?;
                given = grads.iter().map(Option::is_some).collect();
                Ok(grads.into_iter().flatten().collect())
            },
            &arrays,
            &batched,
            self.size,
        )?;
        let mut grads = grads.into_iter();
        given
            .iter()
            .enumerate()
            .map(|(index, &given)| {
                let Some(grad) = given.then(|| grads.next()).flatten() else { return Ok(None) };
                let full = grad.full(self.size)?;
                // What all examples share gets the gradients of all.
                if self.batched[index] { Ok(Some(full)) } else { full.sum(&[0], false).map(Some) }
            })
            .collect()
    }

    fn jvp(&self, inputs: &[Array], tangents: &[Option<Array>]) -> Result<Vec<Option<Array>>> {
        let arrays: Vec<Array> = inputs.iter().chain(tangents.iter().flatten()).cloned().collect();
        let mut batched = self.batched.to_vec();
        batched.extend(
            self.batched.iter().zip(tangents).filter(|(_, tangent)| tangent.is_some()).map(|(&b, _)| b),
        );
        let mut given = Vec::new();
        let found = batch(
            |example| {
                let (inputs, rest) = example.split_at(inputs.len());
                let mut rest = rest.iter().cloned();
                let tangents: Vec<Option<Array>> =
                    tangents.iter().map(|tangent| tangent.as_ref().and_then(|_| rest.next())).collect();
                let found = self.inner.jvp(inputs, &tangents)?;
                given = found.iter().map(Option::is_some).collect();
                Ok(found.into_iter().flatten().collect())
            },
            &arrays,
            &batched,
            self.size,
        )?;
        let mut found = found.into_iter();
        given
            .iter()
            .map(|&given| {
                given.then(|| found.next()).flatten().map(|tangent| tangent.full(self.size)).transpose()
            })
            .collect()
    }
}

/// The examples of some arrays one after another in their first dimension, and back: how an op
/// that has a batch dimension of its own takes another.
pub(crate) fn merged(array: &Array) -> Result<Array> {
    array.flatten_axes(0, 1)
}

/// The inverse of [`merged`]: `size` examples, each with a first dimension of `inner`.
pub(crate) fn unmerged(array: &Array, size: usize, inner: usize) -> Result<Array> {
    array.unflatten(0, &[size as i64, inner as i64])
}
