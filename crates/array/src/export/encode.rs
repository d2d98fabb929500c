//! Graphs as JSON.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::spec_to_json;
use crate::graph::describe;
use crate::op::{Op, Precision, Scalar, ScatterOp, SortOrder};
use crate::ops::linalg::LinalgOp;
use crate::ops::quantized::CodecOp;
use crate::transforms::{Source, TracedGraph, Value};
use crate::{Array, Error, Result};

/// The arrays of a file, which the functions in it share.
#[derive(Clone, Default)]
pub(super) struct Constants {
    /// The entries of the file.
    pub(super) list: Vec<Json>,
    /// The tensors that these name.
    pub(super) tensors: Vec<(String, Array)>,
    /// Which array has which number; holding them keeps their ids theirs.
    arrays: Vec<Array>,
    by_id: HashMap<(usize, usize), usize>,
}

impl Constants {
    /// The arrays in the order of their numbers.
    pub(super) fn arrays(&self) -> &[Array] {
        &self.arrays
    }

    /// The number of an array, which is added if it is new.
    fn number(&mut self, array: &Array) -> Result<usize> {
        let id = (array.id(), array.output());
        if let Some(&number) = self.by_id.get(&id) {
            return Ok(number);
        }
        let number = self.list.len();
        self.list.push(constant(number, array, &mut self.tensors)?);
        self.arrays.push(array.clone());
        self.by_id.insert(id, number);
        Ok(number)
    }
}

/// Inputs, nodes and outputs of a graph; what it captured joins the constants.
pub(super) fn encode(graph: &TracedGraph, constants: &mut Constants) -> Result<Json> {
    let captured =
        graph.captured().iter().map(|array| constants.number(array)).collect::<Result<Vec<usize>>>()?;
    let mut nodes = Vec::with_capacity(graph.nodes.len());
    // Per node of the graph, what its outputs are called in the file.
    let mut names: Vec<Vec<String>> = Vec::with_capacity(graph.nodes.len());
    let name = |names: &[Vec<String>], value: &Value| match value.source {
        Source::Input(index) => format!("i{index}"),
        Source::Captured(index) => format!("c{}", captured[index]),
        Source::Node(index) => names[index][value.output].clone(),
    };
    for node in &graph.nodes {
        let inputs: Vec<String> = node.inputs.iter().map(|input| name(&names, input)).collect();
        match &node.op {
            // Their outputs are their inputs.
            Op::Tracer(_) => names.push(inputs),
            Op::Custom(custom) if custom.is_expanded() => names.push(inputs),
            op => {
                let mut object = attributes(op)?;
                object.insert("op".into(), op.name().into());
                object.insert("inputs".into(), inputs.into());
                let outputs: Vec<Json> = node.specs.iter().map(spec_to_json).collect();
                object.insert("outputs".into(), outputs.into());
                let index = nodes.len();
                names.push(match node.specs.len() {
                    1 => vec![format!("n{index}")],
                    count => (0..count).map(|output| format!("n{index}.{output}")).collect(),
                });
                nodes.push(Json::Object(object));
            }
        }
    }
    let outputs: Vec<String> = graph.outputs.iter().map(|output| name(&names, output)).collect();
    let inputs: Vec<Json> = graph.inputs.iter().map(spec_to_json).collect();
    Ok(json!({ "inputs": inputs, "nodes": nodes, "outputs": outputs }))
}

/// A constant's entry; its tensors are added to the list.
fn constant(index: usize, array: &Array, tensors: &mut Vec<(String, Array)>) -> Result<Json> {
    array.eval()?;
    let name = format!("c{index}");
    let Some(packed) = array.packed() else {
        tensors.push((name.clone(), array.clone()));
        return Ok(json!({ "tensor": name }));
    };
    let Some(format) = packed.quantization() else {
        if packed.is_quantized() {
            let message = "a weight of Q6_K blocks has no form in the file: dequantize it first";
            return Err(Error::invalid("export_function", message));
        }
        tensors.push((name.clone(), array.dequantize()?));
        return Ok(json!({ "tensor": name }));
    };
    let parts = packed.to_mlx()?;
    let mut entry = Map::new();
    let arrays = [("words", Some(parts.words)), ("scales", Some(parts.scales)), ("biases", parts.biases)];
    for (part, array) in arrays.into_iter().filter_map(|(part, array)| Some((part, array?))) {
        let tensor = format!("{name}.{part}");
        entry.insert(part.into(), tensor.clone().into());
        tensors.push((tensor, array));
    }
    entry.insert("mode".into(), format.mode().name().into());
    entry.insert("bits".into(), format.bits().into());
    entry.insert("group_size".into(), format.group_size().into());
    Ok(Json::Object(entry))
}

fn precision_name(precision: Precision) -> &'static str {
    match precision {
        Precision::Exact => "exact",
        Precision::Bf16 => "bf16",
        Precision::Fast => "fast",
    }
}

pub(super) fn scatter_name(op: ScatterOp) -> &'static str {
    match op {
        ScatterOp::Set => "set",
        ScatterOp::Add => "add",
        ScatterOp::Prod => "prod",
        ScatterOp::Max => "max",
        ScatterOp::Min => "min",
    }
}

fn scalar(value: Scalar) -> Json {
    match value {
        Scalar::Bool(value) => json!({ "bool": value }),
        Scalar::Int(value) => json!({ "int": value }),
        Scalar::UInt(value) => json!({ "uint": value }),
        // JSON has no infinities, and a NaN is as good as another.
        Scalar::Float(value) if !value.is_finite() => json!({ "float": value.to_string() }),
        Scalar::Float(value) => json!({ "float": value }),
    }
}

/// What an op carries besides its inputs and outputs.
fn attributes(op: &Op) -> Result<Map<String, Json>> {
    let json = match op {
        Op::StopGradient
        | Op::After
        | Op::SavedAs
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Compare(_)
        | Op::Select
        | Op::Cast
        | Op::Reshape
        | Op::Broadcast
        | Op::Contiguous
        | Op::Softmax
        | Op::LogSumExp
        | Op::Embedding
        | Op::Dequantize
        | Op::Bitcast => json!({}),
        Op::Full(value) => json!({ "value": scalar(*value) }),
        Op::Arange { start, step } => json!({ "start": start, "step": step }),
        Op::Transpose(order) => json!({ "axes": order.as_slice() }),
        Op::Slice { start, step } | Op::SliceUpdate { start, step } => {
            json!({ "start": start.as_slice(), "step": step.as_slice() })
        }
        Op::Reduce { axes, .. } => json!({ "axes": axes.as_slice() }),
        Op::Concatenate { axis }
        | Op::ArgReduce { axis, .. }
        | Op::Take { axis }
        | Op::TakeAlong { axis }
        | Op::ScatterAdd { axis }
        | Op::ScatterAddAlong { axis } => json!({ "axis": axis }),
        Op::Gather { axes, slice } => json!({ "axes": axes.as_slice(), "slice": slice.as_slice() }),
        Op::Scatter { op, axes } => json!({ "axes": axes.as_slice(), "how": scatter_name(*op) }),
        Op::ScatterAlong { op, axis } => json!({ "axis": axis, "how": scatter_name(*op) }),
        Op::Scan { axis, reverse, exclusive, .. } => {
            json!({ "axis": axis, "reverse": reverse, "exclusive": exclusive })
        }
        Op::Sort { axis, order } | Op::ArgSort { axis, order } => match order {
            SortOrder::Full => json!({ "axis": axis }),
            SortOrder::Partition(kth) => json!({ "axis": axis, "kth": kth }),
        },
        Op::AsStrided { strides, offset } => json!({ "step": strides.as_slice(), "offset": offset }),
        Op::Matmul { precision } | Op::Linear { precision } | Op::LinearTransposed { precision } => {
            json!({ "precision": precision_name(*precision) })
        }
        Op::RandomBits { width } => json!({ "width": width }),
        Op::RmsNorm { eps } | Op::RmsNormVjp { eps } | Op::LayerNorm { eps } => json!({ "eps": eps }),
        Op::Rope(spec) => json!({
            "dims": spec.dims,
            "traditional": spec.traditional,
            "inverse": spec.inverse,
            "scale": spec.scale,
        }),
        Op::Attention(spec) | Op::AttentionVjp(spec) => json!({
            "scale": spec.scale,
            "causal": spec.causal,
            "window": spec.window,
            "softcap": spec.softcap,
            "precision": precision_name(spec.precision),
        }),
        Op::ShortConv(spec) | Op::ShortConvVjp(spec) => {
            json!({ "state": spec.state, "starts": spec.starts })
        }
        Op::LinearCrossEntropy(spec) => {
            json!({ "precision": precision_name(spec.precision), "softcap": spec.softcap })
        }
        Op::AdamW(spec) => json!({
            "lr": spec.lr,
            "beta1": spec.beta1,
            "beta2": spec.beta2,
            "eps": spec.eps,
            "weight_decay": spec.weight_decay,
            "step": spec.step,
            "grad_scale": spec.grad_scale,
        }),
        Op::Tracer(_) | Op::Fused(_) | Op::Custom(_) => {
            return Err(Error::Kernel(format!("{} should have been opened", describe(op)).into()));
        }
        Op::GatherMatmul | Op::SegmentedMatmul => json!({}),
        Op::GatherLinear { precision, transposed } => {
            json!({ "precision": precision_name(*precision), "transposed": transposed })
        }
        Op::Hadamard { scale } => json!({ "scale": scale }),
        Op::Conv(spec) => json!({
            "stride": spec.stride.as_slice(),
            "low": spec.low.as_slice(),
            "high": spec.high.as_slice(),
            "kernel_dilation": spec.kernel_dilation.as_slice(),
            "input_dilation": spec.input_dilation.as_slice(),
            "groups": spec.groups,
            "flip": spec.flip,
        }),
        Op::Fft(spec) => json!({ "axis": spec.axis, "scale": spec.scale }),
        Op::Linalg(op) => match op {
            LinalgOp::Qr | LinalgOp::Inverse | LinalgOp::Lu | LinalgOp::Determinant => json!({}),
            LinalgOp::Svd { vectors } | LinalgOp::Eig { vectors } => json!({ "vectors": vectors }),
            LinalgOp::TriangularInverse { upper } | LinalgOp::Cholesky { upper } => json!({ "upper": upper }),
            LinalgOp::Eigh { upper, vectors } => json!({ "upper": upper, "vectors": vectors }),
        },
        Op::Codec(op) => match op {
            CodecOp::Quantize(format) | CodecOp::Dequantize(format) => json!({
                "mode": format.mode().name(),
                "bits": format.bits(),
                "group_size": format.group_size(),
            }),
            CodecOp::ToFp8 | CodecOp::FromFp8 => json!({}),
        },
        Op::PagedAttention(_) => {
            return Err(Error::unsupported(
                "export_function",
                format!("{} appends to a store, so it can't be exported", op.name()),
            ));
        }
    };
    match json {
        Json::Object(object) => Ok(object),
        other => Err(Error::Kernel(format!("attributes {other}").into())),
    }
}
