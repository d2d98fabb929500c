//! A graph from JSON that a stranger wrote.

use serde_json::Value as Json;
use smallvec::{SmallVec, smallvec};

use super::encode::scatter_name;
use super::{MOST_ELEMENTS, algebra};
use crate::node::Inputs;
use crate::op::{
    AdamWSpec, AttentionSpec, Axes, BinaryOp, CompareOp, ConvSpec, CrossEntropySpec, Op, Precision, ReduceOp,
    RopeSpec, Scalar, ScanOp, ScatterOp, UnaryOp,
};
use crate::ops::quantized::{QuantSpec, QuantizedArray};
use crate::shape::Shape;
use crate::storage::Spec;
use crate::transforms::TracedGraph;
use crate::{Array, Dtype, Error, PackedWeight, Result, random};

pub(super) fn bad(what: impl AsRef<str>) -> Error {
    Error::invalid("import_function", what)
}

/// The constants of a file, which `load` reads by their tensors' names.
pub(super) fn constants(json: &Json, load: impl Fn(&str) -> Result<Array>) -> Result<Vec<Array>> {
    list(json, "constants")?.iter().map(|entry| constant(entry, &load)).collect()
}

/// The graph of a function.
pub(super) fn decode(json: &Json, constants: &[Array]) -> Result<TracedGraph> {
    let inputs = list(json, "inputs")?
        .iter()
        .map(|spec| spec_of(spec).map(|spec| Array::zeros(&spec.shape, spec.dtype)))
        .collect::<Result<Vec<Array>>>()?;
    let build = |inputs: &[Array]| {
        let mut graph = Built { inputs, constants, nodes: Vec::new() };
        for (index, node) in list(json, "nodes")?.iter().enumerate() {
            let outputs = graph.node(node).map_err(|error| bad(format!("node {index}: {error}")))?;
            graph.nodes.push(outputs);
        }
        list(json, "outputs")?.iter().map(|name| graph.find(name)).collect::<Result<Vec<Array>>>()
    };
    TracedGraph::trace(build, &inputs)
}

struct Built<'a> {
    inputs: &'a [Array],
    constants: &'a [Array],
    /// The outputs of each node so far.
    nodes: Vec<Vec<Array>>,
}

impl Built<'_> {
    fn find(&self, name: &Json) -> Result<Array> {
        let unknown = || bad(format!("{name} is no input, no constant and no node before this one"));
        let text = name.as_str().ok_or_else(unknown)?;
        let (kind, rest) = text.split_at_checked(1).ok_or_else(unknown)?;
        let (index, output) = rest.split_once('.').unwrap_or((rest, "0"));
        let (index, output): (usize, usize) =
            (index.parse().map_err(|_| unknown())?, output.parse().map_err(|_| unknown())?);
        let found = match kind {
            "n" => self.nodes.get(index).and_then(|outputs| outputs.get(output)),
            "i" if output == 0 => self.inputs.get(index),
            "c" if output == 0 => self.constants.get(index),
            _ => None,
        };
        found.cloned().ok_or_else(unknown)
    }

    /// The outputs of a node, each of which has the shape and dtype that the file says.
    fn node(&self, node: &Json) -> Result<Vec<Array>> {
        let name = text(node, "op")?;
        let inputs =
            list(node, "inputs")?.iter().map(|name| self.find(name)).collect::<Result<Vec<Array>>>()?;
        let specs = list(node, "outputs")?.iter().map(spec_of).collect::<Result<Vec<Spec>>>()?;
        let first = specs.first().ok_or_else(|| bad("has no outputs"))?;
        let outputs = build(name, node, &inputs, first).map_err(|error| bad(format!("{name}: {error}")))?;
        let same = outputs.len() == specs.len()
            && outputs.iter().zip(&specs).all(|(output, spec)| output.spec() == spec);
        if same {
            return Ok(outputs);
        }
        Err(bad(format!("{name} of {inputs:?} gives {outputs:?}, the file says {specs:?}")))
    }
}

pub(super) fn field<'a>(object: &'a Json, key: &str) -> Result<&'a Json> {
    object.get(key).ok_or_else(|| bad(format!("{key:?} is missing")))
}

pub(super) fn list<'a>(object: &'a Json, key: &str) -> Result<&'a Vec<Json>> {
    field(object, key)?.as_array().ok_or_else(|| bad(format!("{key:?} is no list")))
}

pub(super) fn text<'a>(object: &'a Json, key: &str) -> Result<&'a str> {
    field(object, key)?.as_str().ok_or_else(|| bad(format!("{key:?} is no text")))
}

pub(super) fn whole(object: &Json, key: &str) -> Result<usize> {
    let value = field(object, key)?.as_u64().and_then(|value| usize::try_from(value).ok());
    value
        .filter(|&value| value <= MOST_ELEMENTS)
        .ok_or_else(|| bad(format!("{key:?} is no whole number in range")))
}

pub(super) fn number(object: &Json, key: &str) -> Result<f64> {
    field(object, key)?.as_f64().ok_or_else(|| bad(format!("{key:?} is no number")))
}

pub(super) fn flag(object: &Json, key: &str) -> Result<bool> {
    field(object, key)?.as_bool().ok_or_else(|| bad(format!("{key:?} is neither true nor false")))
}

/// A number that may be null.
fn maybe<T>(object: &Json, key: &str, read: impl Fn(&Json, &str) -> Result<T>) -> Result<Option<T>> {
    if field(object, key)?.is_null() { Ok(None) } else { read(object, key).map(Some) }
}

pub(super) fn wholes(object: &Json, key: &str) -> Result<Shape> {
    let one = |value: &Json| {
        value.as_u64().and_then(|value| usize::try_from(value).ok()).filter(|&v| v <= MOST_ELEMENTS)
    };
    let all: Option<Shape> = list(object, key)?.iter().map(one).collect();
    all.ok_or_else(|| bad(format!("{key:?} has an entry that is no whole number in range")))
}

/// Whole numbers of either sign.
pub(super) fn signed_wholes(object: &Json, key: &str) -> Result<SmallVec<[isize; 4]>> {
    let most = MOST_ELEMENTS as isize;
    let one = |value: &Json| {
        value
            .as_i64()
            .and_then(|value| isize::try_from(value).ok())
            .filter(|value| (-most..=most).contains(value))
    };
    let all: Option<SmallVec<[isize; 4]>> = list(object, key)?.iter().map(one).collect();
    all.ok_or_else(|| bad(format!("{key:?} has an entry that is no whole number in range")))
}

fn steps(object: &Json) -> Result<SmallVec<[isize; 4]>> {
    signed_wholes(object, "step")
}

fn axes(object: &Json) -> Result<Axes> {
    wholes(object, "axes")
}

/// Axes as the functions of arrays take them: none of a file counts from the end.
fn signed(axes: &[usize]) -> Result<Vec<i32>> {
    axes.iter()
        .map(|&axis| i32::try_from(axis).map_err(|_| bad(format!("there is no axis {axis}"))))
        .collect()
}

fn axis(object: &Json) -> Result<i32> {
    Ok(signed(&[whole(object, "axis")?])?[0])
}

fn spec_of(json: &Json) -> Result<Spec> {
    let name = text(json, "dtype")?;
    let dtype = Dtype::from_name(name).ok_or_else(|| bad(format!("there is no dtype {name:?}")))?;
    let shape = wholes(json, "shape")?;
    let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size.max(1)));
    if shape.len() > 64 || elements.is_none_or(|elements| elements > MOST_ELEMENTS) {
        return Err(bad(format!("the shape {shape:?} is too large")));
    }
    Ok(Spec::new(shape, dtype))
}

pub(super) fn precision(object: &Json) -> Result<Precision> {
    match text(object, "precision")? {
        "exact" => Ok(Precision::Exact),
        "bf16" => Ok(Precision::Bf16),
        "fast" => Ok(Precision::Fast),
        other => Err(bad(format!("there is no precision {other:?}: exact, bf16, fast"))),
    }
}

fn how(object: &Json) -> Result<ScatterOp> {
    let name = text(object, "how")?;
    let all = [ScatterOp::Set, ScatterOp::Add, ScatterOp::Prod, ScatterOp::Max, ScatterOp::Min];
    all.into_iter()
        .find(|&op| scatter_name(op) == name)
        .ok_or_else(|| bad(format!("there is no way to scatter called {name:?}")))
}

fn constant(entry: &Json, load: &impl Fn(&str) -> Result<Array>) -> Result<Array> {
    if entry.get("tensor").is_some() {
        return load(text(entry, "tensor")?);
    }
    let part = |key: &str| load(text(entry, key)?);
    let biases = entry.get("biases").is_some().then(|| part("biases")).transpose()?;
    // Files from before there were modes hold affine codes.
    let mode = entry.get("mode").is_some().then(|| text(entry, "mode")).transpose()?.unwrap_or("affine");
    let format = QuantSpec::new(whole(entry, "bits")?, whole(entry, "group_size")?, mode.parse()?)?;
    let quantized = QuantizedArray::new(part("words")?, part("scales")?, biases, format, None)?;
    Ok(Array::from_packed(PackedWeight::from_mlx(&quantized)?))
}

fn scalar(json: &Json) -> Result<Scalar> {
    if let Some(value) = json.get("bool").and_then(Json::as_bool) {
        return Ok(Scalar::Bool(value));
    }
    if let Some(value) = json.get("int").and_then(Json::as_i64) {
        return Ok(Scalar::Int(value));
    }
    if let Some(value) = json.get("uint").and_then(Json::as_u64) {
        return Ok(Scalar::UInt(value));
    }
    let float = json.get("float").ok_or_else(|| bad(format!("{json} is no number")))?;
    let value = float.as_f64().or_else(|| float.as_str()?.parse().ok());
    value.map(Scalar::Float).ok_or_else(|| bad(format!("{json} is no number")))
}

/// A node by the function that a program would call, so that its checks are the same.
fn build(name: &str, node: &Json, inputs: &[Array], spec: &Spec) -> Result<Vec<Array>> {
    let count = |expected: usize| match inputs.len() == expected {
        true => Ok(()),
        false => Err(bad(format!("takes {expected} inputs, got {}", inputs.len()))),
    };
    let shape = spec.shape.as_slice();
    if let Some(op) = UnaryOp::ALL.iter().find(|op| op.name() == name) {
        count(1)?;
        let y = inputs[0].unary(*op)?;
        // The kernel's magnitude of a complex number is one too; nodes of their own take its real part.
        if *op == UnaryOp::Abs && inputs[0].dtype() == Dtype::C64 && spec.dtype == Dtype::C64 {
            return Ok(vec![Array::lazy(
                Op::Unary(*op),
                smallvec![inputs[0].clone()],
                y.shape(),
                spec.dtype,
            )]);
        }
        return Ok(vec![y]);
    }
    if let Some(op) = BinaryOp::ALL.iter().find(|op| op.name() == name) {
        count(2)?;
        return Ok(vec![inputs[0].binary(*op, &inputs[1])?]);
    }
    if let Some(op) = CompareOp::ALL.iter().find(|op| op.name() == name) {
        count(2)?;
        return Ok(vec![inputs[0].compare(*op, &inputs[1])?]);
    }
    let reductions =
        [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Max, ReduceOp::Min, ReduceOp::All, ReduceOp::Any];
    if let Some(op) = reductions.into_iter().find(|op| op.name() == name) {
        count(1)?;
        let axes = axes(node)?;
        // No axes are none here, while to a program they are all.
        if axes.is_empty() && inputs[0].rank() > 0 {
            return Ok(vec![inputs[0].contiguous()?]);
        }
        return Ok(vec![inputs[0].reduce(op, &signed(&axes)?, true)?]);
    }
    let scans = [ScanOp::Sum, ScanOp::Prod, ScanOp::Max, ScanOp::Min, ScanOp::LogSumExp];
    if let Some(op) = scans.into_iter().find(|op| op.name() == name) {
        count(1)?;
        let (reverse, inclusive) = (flag(node, "reverse")?, !flag(node, "exclusive")?);
        return Ok(vec![inputs[0].scan(op, Some(axis(node)?), reverse, inclusive)?]);
    }
    let (x, y) = (inputs.first(), inputs.get(1));
    let x = || x.ok_or_else(|| bad("takes inputs, got none"));
    let y = || y.ok_or_else(|| bad("takes two inputs or more, got fewer"));
    let one = |array: Array| Ok(vec![array]);
    match name {
        "stop_gradient" => one(x()?.stop_gradient()?),
        "after" => one(x()?.after(y()?)),
        "saved_as" => one(x()?.with_copy(y()?)?),
        "full" => {
            one(Array::lazy(Op::Full(scalar(field(node, "value")?)?), Inputs::new(), shape, spec.dtype))
        }
        "arange" => {
            if shape.len() != 1 {
                return Err(bad(format!("a range has one dimension, not {shape:?}")));
            }
            let op = Op::Arange { start: number(node, "start")?, step: number(node, "step")? };
            one(Array::lazy(op, Inputs::new(), shape, spec.dtype))
        }
        "where" => {
            count(3)?;
            one(Array::select(&inputs[0], &inputs[1], &inputs[2])?)
        }
        "astype" => one(x()?.astype(spec.dtype)?),
        "reshape" => {
            let sizes: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
            one(x()?.reshape(&sizes)?)
        }
        "transpose" => {
            let order = signed(&axes(node)?)?;
            if order.is_empty() { one(x()?.clone()) } else { one(x()?.transpose(&order)?) }
        }
        "broadcast_to" => one(x()?.broadcast_to(shape)?),
        "slice" => one(x()?.window(&wholes(node, "start")?, shape, &steps(node)?)?),
        "slice_update" => {
            let (x, update) = (x()?, y()?.astype(spec.dtype)?);
            let (start, step) = (wholes(node, "start")?, steps(node)?);
            // What can be read there can be written there, if no place is named twice.
            x.window(&start, update.shape(), &step)?;
            if step.iter().zip(update.shape()).any(|(&step, &size)| step == 0 && size > 1) {
                return Err(bad("a step of zero writes one place twice"));
            }
            let op = Op::SliceUpdate { start, step };
            one(Array::lazy(op, smallvec![x.clone(), update], x.shape(), x.dtype()))
        }
        "contiguous" => one(x()?.contiguous()?),
        "concatenate" => one(Array::concatenate(inputs, axis(node)?)?),
        "argmax" => one(x()?.argmax(axis(node)?, true)?),
        "argmin" => one(x()?.argmin(axis(node)?, true)?),
        "softmax" => one(x()?.softmax(-1)?),
        "logsumexp" => one(x()?.logsumexp(-1, true)?),
        "take" => one(x()?.take(y()?, axis(node)?)?),
        "take_along_axis" => one(x()?.take_along_axis(y()?, axis(node)?)?),
        "scatter_add" => {
            let axis = whole(node, "axis")?;
            let size = *shape.get(axis).ok_or_else(|| bad(format!("{shape:?} has no axis {axis}")))?;
            if y()?.rank() < axis {
                return Err(bad(format!("{:?} has no axis {axis}", y()?)));
            }
            one(Array::scatter_add(y()?, x()?, axis, size)?)
        }
        "scatter_add_along_axis" => {
            let (axis, indices, updates) = (whole(node, "axis")?, x()?, y()?);
            let fits = indices.shape() == updates.shape()
                && indices.dtype().is_integer()
                && shape.len() == updates.rank()
                && axis < shape.len()
                && (0..shape.len()).all(|at| at == axis || shape[at] == updates.shape()[at])
                && (shape[axis] > 0 || updates.size() == 0);
            if !fits {
                return Err(bad(format!("{updates:?} at {indices:?} do not scatter into {shape:?}")));
            }
            let op = Op::ScatterAddAlong { axis };
            one(Array::lazy(op, smallvec![indices.clone(), updates.clone()], shape, updates.dtype()))
        }
        "matmul" => one(x()?.matmul_with(y()?, precision(node)?)?),
        "linear" => one(x()?.linear(y()?, None, precision(node)?)?),
        "linear_transposed" => one(x()?.linear_transposed(y()?, precision(node)?)?),
        "embedding" => {
            if !spec.dtype.is_float() {
                return Err(bad(format!("gives floats, not {}", spec.dtype)));
            }
            one(Array::embedding(x()?, y()?, spec.dtype)?)
        }
        // Of MLX's layout; without a mode it is that of a packed weight.
        "dequantize" if node.get("mode").is_some() => algebra::build(name, node, inputs, spec),
        "dequantize" => {
            if !spec.dtype.is_float() {
                return Err(bad(format!("gives floats, not {}", spec.dtype)));
            }
            one(x()?.dequantize_to(spec.dtype)?)
        }
        "gather" => {
            let indices: Vec<&Array> = inputs.iter().skip(1).collect();
            one(x()?.gather(&indices, &axes(node)?, &wholes(node, "slice")?)?)
        }
        "scatter" => {
            let indices: Vec<&Array> = inputs.iter().skip(2).collect();
            one(x()?.scatter(how(node)?, &indices, &axes(node)?, y()?)?)
        }
        "put_along_axis" => {
            count(3)?;
            one(x()?.scatter_along(how(node)?, y()?, &inputs[2], Some(axis(node)?))?)
        }
        "sort" => one(x()?.sort(axis(node)?)?),
        "argsort" => one(x()?.argsort(axis(node)?)?),
        "partition" => one(x()?.partition(whole(node, "kth")? as i64, axis(node)?)?),
        "argpartition" => one(x()?.argpartition(whole(node, "kth")? as i64, axis(node)?)?),
        "view" => one(x()?.view(spec.dtype)?),
        "as_strided" => {
            let step: Vec<i64> = steps(node)?.iter().map(|&step| step as i64).collect();
            one(x()?.as_strided(shape, &step, whole(node, "offset")?)?)
        }
        "random_bits" => one(random_bits(x()?, shape, whole(node, "width")?)?),
        _ => fused(name, node, inputs, spec),
    }
}

/// Bits of one key or of many.
fn random_bits(keys: &Array, shape: &[usize], width: usize) -> Result<Array> {
    let lead = keys.rank().saturating_sub(1);
    if keys.shape() == [2] {
        return random::bits(shape, width, keys);
    }
    let fits = keys.rank() > 0
        && keys.dim(-1) == 2
        && keys.dtype() == Dtype::U32
        && shape.starts_with(&keys.shape()[..lead]);
    let dtype = match width {
        1 => Dtype::U8,
        2 => Dtype::U16,
        4 => Dtype::U32,
        _ => return Err(bad(format!("a width of 1, 2 or 4 bytes, got {width}"))),
    };
    if !fits {
        return Err(bad(format!("{keys:?} are no keys for {shape:?}")));
    }
    Ok(Array::lazy(Op::RandomBits { width }, smallvec![keys.clone()], shape, dtype))
}

fn fused(name: &str, node: &Json, inputs: &[Array], spec: &Spec) -> Result<Vec<Array>> {
    let few = || bad(format!("got {} inputs, which is too few", inputs.len()));
    let input = |index: usize| inputs.get(index).ok_or_else(few);
    let eps = || number(node, "eps").map(|eps| eps as f32);
    let same = |a: &Array, b: &Array| match a.shape() == b.shape() {
        true => Ok(()),
        false => Err(bad(format!("{a:?} and {b:?} do not fit together"))),
    };
    let siblings = |first: Array, count: usize| (0..count).map(|output| first.sibling(output)).collect();
    match name {
        "rms_norm" => Ok(vec![input(0)?.rms_norm(input(1)?, eps()?)?]),
        "rms_norm_vjp" => {
            let (x, weight, dy) = (input(0)?, input(1)?, input(2)?);
            x.rms_norm(weight, eps()?)?;
            same(x, dy)?;
            let specs = vec![x.spec().clone(), Spec::new(weight.shape(), Dtype::F32)];
            Ok(siblings(Array::lazy_many(Op::RmsNormVjp { eps: eps()? }, inputs[..3].into(), specs), 2))
        }
        "layer_norm" => Ok(vec![input(0)?.layer_norm(input(1)?, input(2)?, eps()?)?]),
        "rope" => {
            let spec = RopeSpec {
                dims: whole(node, "dims")?,
                traditional: flag(node, "traditional")?,
                inverse: flag(node, "inverse")?,
                scale: number(node, "scale")? as f32,
            };
            Ok(vec![input(0)?.rope(input(1)?, input(2)?, spec)?])
        }
        "attention" => {
            let spec = attention_spec(node, inputs.len() == 4)?;
            Ok(siblings(input(0)?.attention(input(1)?, input(2)?, inputs.get(3), spec)?, 2))
        }
        "attention_vjp" => {
            let spec = attention_spec(node, inputs.len() == 7)?;
            let (q, k, v) = (input(0)?, input(1)?, input(2)?);
            let forward = q.attention(k, v, inputs.get(6), spec.clone())?;
            let given = [(forward.clone(), input(3)?), (forward.sibling(1), input(4)?), (forward, input(5)?)];
            for (expected, got) in &given {
                same(expected, got)?;
                if expected.dtype() != got.dtype() {
                    return Err(bad(format!("needs {expected:?}, got {got:?}")));
                }
            }
            if k.dtype() != q.dtype() || v.dtype() != q.dtype() {
                return Err(bad("q, k and v have different dtypes"));
            }
            let specs = [q, k, v].map(|array| array.spec().clone()).to_vec();
            Ok(siblings(Array::lazy_many(Op::AttentionVjp(spec), inputs.into(), specs), 3))
        }
        "short_conv" => {
            let spec = conv_spec(node)?;
            let state = if spec.state { Some(input(2)?) } else { None };
            let starts = if spec.starts { Some(input(2 + spec.state as usize)?) } else { None };
            let (y, next) = input(0)?.short_conv(input(1)?, state, starts)?;
            Ok(vec![y, next])
        }
        "short_conv_vjp" => {
            let spec = conv_spec(node)?;
            if spec.state {
                return Err(bad("has no state"));
            }
            let (x, weight, dy) = (input(0)?, input(1)?, input(2)?);
            let starts = if spec.starts { Some(input(3)?) } else { None };
            x.short_conv(weight, None, starts)?;
            same(x, dy)?;
            let specs = vec![x.spec().clone(), Spec::new(weight.shape(), Dtype::F32)];
            Ok(siblings(Array::lazy_many(Op::ShortConvVjp(spec), inputs.into(), specs), 2))
        }
        "linear_cross_entropy" => {
            let softcap = maybe(node, "softcap", number)?.map(|cap| cap as f32);
            let spec = CrossEntropySpec { precision: precision(node)?, softcap };
            Ok(siblings(input(0)?.linear_cross_entropy(input(1)?, input(2)?, spec)?.0, 4))
        }
        "adamw" => {
            let float = |key: &str| number(node, key).map(|value| value as f32);
            let spec = AdamWSpec {
                lr: float("lr")?,
                beta1: float("beta1")?,
                beta2: float("beta2")?,
                eps: float("eps")?,
                weight_decay: float("weight_decay")?,
                step: u32::try_from(whole(node, "step")?).map_err(|_| bad("\"step\" is too large"))?,
                grad_scale: float("grad_scale")?,
            };
            Ok(input(0)?.adamw(input(1)?, input(2)?, input(3)?, spec)?.into())
        }
        _ => algebra::build(name, node, inputs, spec),
    }
}

fn attention_spec(node: &Json, key_start: bool) -> Result<AttentionSpec> {
    Ok(AttentionSpec {
        scale: number(node, "scale")? as f32,
        causal: flag(node, "causal")?,
        window: maybe(node, "window", whole)?,
        softcap: maybe(node, "softcap", number)?.map(|cap| cap as f32),
        key_start,
        precision: precision(node)?,
    })
}

fn conv_spec(node: &Json) -> Result<ConvSpec> {
    Ok(ConvSpec { state: flag(node, "state")?, starts: flag(node, "starts")? })
}
