//! The cases of fixtures/mlx/algebra and algebra_edges (made by fixtures/make/make_algebra.py and
//! make_algebra_edges.py), and how each is run and compared: values, shapes and dtypes, and that what the package refuses is refused.

use mica_array::conv::{self, ConvNd};
use mica_array::fast::{self, AttentionMask, RopeBase, RopeOffset};
use mica_array::fft::{self, Stft};
use mica_array::linalg::{self, NormOrder};
use mica_array::op::{BinaryOp, CompareOp, UnaryOp};
use mica_array::quantized::{self, QuantMode, QuantSpec, QuantizedArray};
use mica_array::transforms::grad;
use mica_array::{Array, Complex32, Dtype, Result, einsum, einsum_path};
use mica_testkit::{Golden, fixture};
use serde_json::Value;

fn dtype_of(name: &str) -> Dtype {
    let all = [
        ("bool", Dtype::Bool),
        ("u8", Dtype::U8),
        ("u16", Dtype::U16),
        ("u32", Dtype::U32),
        ("u64", Dtype::U64),
        ("i8", Dtype::I8),
        ("i16", Dtype::I16),
        ("i32", Dtype::I32),
        ("i64", Dtype::I64),
        ("f16", Dtype::F16),
        ("bf16", Dtype::BF16),
        ("f32", Dtype::F32),
        ("f64", Dtype::F64),
        ("complex64", Dtype::C64),
    ];
    all.into_iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("dtype {name}")).1
}

/// A tensor of the file as an array; complex numbers are stored as pairs, f64 as f32.
fn load(golden: &Golden, name: &str, dtype: Dtype) -> Array {
    let shape = golden.shape(name);
    match dtype {
        Dtype::C64 => {
            let parts = golden.f32s(name);
            let values: Vec<Complex32> =
                parts.chunks_exact(2).map(|z| Complex32 { re: z[0], im: z[1] }).collect();
            Array::from_slice(&values, &shape[..shape.len() - 1]).unwrap()
        }
        Dtype::F64 => Array::from_slice(&golden.f64s(name), shape).unwrap(),
        _ => Array::from_bytes(golden.bytes(name), shape, dtype).unwrap(),
    }
}

/// Values as f64, complex numbers as pairs.
fn numbers(array: &Array) -> Result<Vec<f64>> {
    if array.dtype() == Dtype::C64 {
        let values = array.to_vec::<Complex32>()?;
        return Ok(values.iter().flat_map(|z| [z.re as f64, z.im as f64]).collect());
    }
    array.astype(Dtype::F64)?.to_vec::<f64>()
}

struct Args<'a>(&'a Value);

impl Args<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }
    fn int(&self, key: &str) -> Option<i64> {
        self.get(key).and_then(Value::as_i64)
    }
    fn usize(&self, key: &str) -> Option<usize> {
        self.int(key).map(|value| value as usize)
    }
    fn float(&self, key: &str) -> Option<f64> {
        self.get(key).and_then(Value::as_f64)
    }
    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }
    fn flag(&self, key: &str) -> Option<bool> {
        self.get(key).and_then(Value::as_bool)
    }
    /// A list, or one number as a list.
    fn ints(&self, key: &str) -> Option<Vec<i64>> {
        self.get(key).map(|value| match value {
            Value::Array(list) => list.iter().map(|item| item.as_i64().expect("an integer")).collect(),
            one => vec![one.as_i64().expect("an integer")],
        })
    }
    /// One number per spatial dimension.
    fn spatial<const N: usize>(&self, key: &str, default: usize) -> [usize; N] {
        match self.ints(key) {
            None => [default; N],
            Some(list) if list.len() == 1 => [list[0] as usize; N],
            Some(list) => std::array::from_fn(|at| list[at] as usize),
        }
    }
    fn indices(&self, key: &str) -> Option<Array> {
        let value = self.get(key)?;
        let list = |value: &Value| -> Vec<u32> {
            value
                .as_array()
                .expect("a list")
                .iter()
                .map(|item| item.as_u64().expect("an index") as u32)
                .collect()
        };
        let rows = value.as_array().expect("a list");
        Some(if rows[0].is_array() {
            let values: Vec<u32> = rows.iter().flat_map(list).collect();
            Array::from_slice(&values, &[rows.len(), values.len() / rows.len()]).unwrap()
        } else {
            let values = list(value);
            Array::from_slice(&values, &[values.len()]).unwrap()
        })
    }
    fn norm(&self) -> fft::Norm {
        self.text("norm").map_or(fft::Norm::Backward, |name| name.parse().unwrap())
    }
    fn format(&self) -> Result<QuantSpec> {
        let mode: QuantMode = self.text("mode").unwrap().parse()?;
        let (bits, group_size) = mode.defaults();
        let bits = self.usize("bits").unwrap_or(bits);
        Ok(QuantSpec::new(bits, self.usize("group_size").unwrap_or(group_size), mode)?)
    }
}

fn run(op: &str, x: &[Array], args: &Args) -> Result<Vec<Array>> {
    if let Some(result) = products(op, x, args)
        .or_else(|| convolutions(op, x, args))
        .or_else(|| fourier(op, x, args))
        .or_else(|| linear(op, x, args))
        .or_else(|| quantized_ops(op, x, args))
        .or_else(|| fused(op, x, args))
        .or_else(|| elementwise(op, x, args))
    {
        return result;
    }
    panic!("no such function in this test: {op}");
}

fn one(array: Result<Array>) -> Option<Result<Vec<Array>>> {
    Some(array.map(|array| vec![array]))
}

fn products(op: &str, x: &[Array], args: &Args) -> Option<Result<Vec<Array>>> {
    match op {
        "matmul" => one(x[0].matmul(&x[1])),
        "addmm" => {
            let number = |key| args.float(key).unwrap_or(1.0) as f32;
            one(x[0].addmm(&x[1], &x[2], number("alpha"), number("beta")))
        }
        "inner" => one(x[0].inner(&x[1])),
        "outer" => one(x[0].outer(&x[1])),
        "kron" => one(x[0].kron(&x[1])),
        "tensordot" => one(match args.get("axes").unwrap() {
            Value::Array(pair) => {
                let list = |value: &Value| -> Vec<i32> {
                    value.as_array().unwrap().iter().map(|axis| axis.as_i64().unwrap() as i32).collect()
                };
                x[0].tensordot(&x[1], &list(&pair[0]), &list(&pair[1]))
            }
            count => {
                let count = count.as_i64().unwrap() as i32;
                let left: Vec<i32> = (0..count).map(|axis| x[0].rank() as i32 - count + axis).collect();
                x[0].tensordot(&x[1], &left, &(0..count).collect::<Vec<_>>())
            }
        }),
        "einsum" => one(einsum(args.text("subscripts").unwrap(), x)),
        "gather_mm" => {
            let (lhs, rhs) = (args.indices("lhs"), args.indices("rhs"));
            one(x[0].gather_mm(&x[1], lhs.as_ref(), rhs.as_ref(), false))
        }
        "segmented_mm" => one(x[0].segmented_mm(&x[1], &x[2])),
        "block_masked_mm" => {
            let names = args.get("masks").unwrap().as_array().unwrap();
            let mask = |name: &str| names.iter().position(|known| known == name).map(|at| &x[2 + at]);
            let block = args.usize("block_size").unwrap();
            one(x[0].block_masked_mm(&x[1], block, mask("mask_out"), mask("mask_lhs"), mask("mask_rhs")))
        }
        "hadamard_transform" => one(x[0].hadamard_transform(args.float("scale").map(|scale| scale as f32))),
        _ => None,
    }
}

fn convolutions(op: &str, x: &[Array], args: &Args) -> Option<Result<Vec<Array>>> {
    let groups = args.usize("groups").unwrap_or(1);
    macro_rules! plain {
        ($f:path) => {
            one($f(
                &x[0],
                &x[1],
                args.spatial("stride", 1),
                args.spatial("padding", 0),
                args.spatial("dilation", 1),
                groups,
            ))
        };
    }
    macro_rules! transposed {
        ($f:path) => {
            one($f(
                &x[0],
                &x[1],
                args.spatial("stride", 1),
                args.spatial("padding", 0),
                args.spatial("dilation", 1),
                args.spatial("output_padding", 0),
                groups,
            ))
        };
    }
    match op {
        "conv1d" => plain!(conv::conv1d),
        "conv2d" => plain!(conv::conv2d),
        "conv3d" => plain!(conv::conv3d),
        "conv_transpose1d" => transposed!(conv::conv_transpose1d),
        "conv_transpose2d" => transposed!(conv::conv_transpose2d),
        "conv_transpose3d" => transposed!(conv::conv_transpose3d),
        "conv_general" => {
            let dimensions = x[0].rank() - 2;
            let list = |key: &str| args.ints(key).unwrap_or(vec![1; dimensions]);
            let sizes = |key: &str| list(key).into_iter().map(|n| n as usize).collect();
            let signed = |key: &str| list(key).into_iter().map(|n| n as isize).collect();
            let spec = ConvNd {
                stride: sizes("stride"),
                low: signed("low"),
                high: signed("high"),
                kernel_dilation: sizes("kernel_dilation"),
                input_dilation: sizes("input_dilation"),
                groups,
                flip: args.flag("flip").unwrap_or(false),
            };
            one(conv::conv_general(&x[0], &x[1], &spec))
        }
        "convolve" => one(conv::convolve(&x[0], &x[1], args.text("mode").unwrap().parse().unwrap())),
        _ => None,
    }
}

fn fourier(op: &str, x: &[Array], args: &Args) -> Option<Result<Vec<Array>>> {
    let (n, axis) = (args.usize("n"), args.int("axis").unwrap_or(-1) as i32);
    let sizes: Option<Vec<usize>> = args.ints("s").map(|list| list.into_iter().map(|n| n as usize).collect());
    let axes: Option<Vec<i32>> = args.ints("axes").map(|list| list.into_iter().map(|n| n as i32).collect());
    let (s, a, norm) = (sizes.as_deref(), axes.as_deref(), args.norm());
    let frames = Stft {
        n_fft: args.usize("n_fft"),
        hop_length: args.usize("hop_length"),
        win_length: args.usize("win_length"),
        window: x.get(1),
        center: args.flag("center").unwrap_or(true),
        pad_mode: args.text("pad_mode").map_or(Default::default(), |name| name.parse().unwrap()),
        norm,
        onesided: args.flag("onesided"),
    };
    match op {
        "fft" => one(fft::fft(&x[0], n, axis, norm)),
        "ifft" => one(fft::ifft(&x[0], n, axis, norm)),
        "rfft" => one(fft::rfft(&x[0], n, axis, norm)),
        "irfft" => one(fft::irfft(&x[0], n, axis, norm)),
        "fft2" => one(fft::fft2(&x[0], s, a, norm)),
        "ifft2" => one(fft::ifft2(&x[0], s, a, norm)),
        "rfft2" => one(fft::rfft2(&x[0], s, a, norm)),
        "irfft2" => one(fft::irfft2(&x[0], s, a, norm)),
        "fftn" => one(fft::fftn(&x[0], s, a, norm)),
        "ifftn" => one(fft::ifftn(&x[0], s, a, norm)),
        "rfftn" => one(fft::rfftn(&x[0], s, a, norm)),
        "irfftn" => one(fft::irfftn(&x[0], s, a, norm)),
        "fftfreq" => one(fft::fftfreq(n.unwrap(), args.float("d").unwrap())),
        "rfftfreq" => one(fft::rfftfreq(n.unwrap(), args.float("d").unwrap())),
        "fftshift" => one(fft::fftshift(&x[0], a.unwrap_or(&[]))),
        "ifftshift" => one(fft::ifftshift(&x[0], a.unwrap_or(&[]))),
        "stft" => one(fft::stft(&x[0], &frames)),
        "istft" => one(fft::istft(&x[0], &frames, args.usize("length"))),
        _ => None,
    }
}

fn linear(op: &str, x: &[Array], args: &Args) -> Option<Result<Vec<Array>>> {
    let upper = args.flag("upper").unwrap_or(args.text("UPLO") == Some("U"));
    match op {
        "inv" => one(linalg::inv(&x[0])),
        "det" => one(linalg::det(&x[0])),
        "slogdet" => Some(linalg::slogdet(&x[0]).map(|(sign, log)| vec![sign, log])),
        "tri_inv" => one(linalg::tri_inv(&x[0], upper)),
        "cholesky" => one(linalg::cholesky(&x[0], upper)),
        "cholesky_inv" => one(linalg::cholesky_inv(&x[0], upper)),
        "solve" => one(linalg::solve(&x[0], &x[1])),
        "solve_triangular" => one(linalg::solve_triangular(&x[0], &x[1], upper)),
        "lu" => Some(linalg::lu(&x[0]).map(|(p, l, u)| vec![p, l, u])),
        "lu_factor" => Some(linalg::lu_factor(&x[0]).map(|(lu, pivots)| vec![lu, pivots])),
        "qr" => Some(linalg::qr(&x[0]).map(|(q, r)| vec![q, r])),
        "pinv" => one(linalg::pinv(&x[0])),
        "svd_values" => one(linalg::singular_values(&x[0])),
        "eigvalsh" => one(linalg::eigvalsh(&x[0], upper)),
        "eigvals" => one(linalg::eigvals(&x[0])),
        "cross" => one(linalg::cross(&x[0], &x[1], args.int("axis").unwrap_or(-1) as i32)),
        "norm" => {
            let order = match args.get("ord") {
                None => NormOrder::Default,
                Some(Value::String(name)) => match name.as_str() {
                    "fro" => NormOrder::Frobenius,
                    "nuc" => NormOrder::Nuclear,
                    infinite => NormOrder::P(infinite.parse().unwrap()),
                },
                Some(number) => NormOrder::P(number.as_f64().unwrap()),
            };
            let axes: Option<Vec<i32>> =
                args.ints("axis").map(|list| list.into_iter().map(|axis| axis as i32).collect());
            one(linalg::norm(&x[0], order, axes.as_deref(), args.flag("keepdims").unwrap_or(false)))
        }
        _ => None,
    }
}

fn quantized_ops(op: &str, x: &[Array], args: &Args) -> Option<Result<Vec<Array>>> {
    let parts = |from: usize| -> Result<QuantizedArray> {
        let format = args.format()?;
        QuantizedArray::new(x[from].clone(), x[from + 1].clone(), x.get(from + 2).cloned(), format, None)
    };
    let transpose = args.flag("transpose").unwrap_or(true);
    match op {
        "quantize" => Some(
            args.format()
                .and_then(|format| quantized::quantize(&x[0], format, None))
                .map(|q| [Some(q.words), Some(q.scales), q.biases].into_iter().flatten().collect()),
        ),
        "dequantize" => one(parts(0).and_then(|w| w.dequantize(None))),
        "quantized_matmul" => one(parts(1).and_then(|w| quantized::quantized_matmul(&x[0], &w, transpose))),
        "gather_qmm" => one(parts(1).and_then(|w| {
            let (lhs, rhs) = (args.indices("lhs"), args.indices("rhs"));
            quantized::gather_qmm(&x[0], &w, lhs.as_ref(), rhs.as_ref(), transpose, false)
        })),
        "to_fp8" => one(x[0].to_fp8()),
        "from_fp8" => one(x[0].from_fp8(if x[0].size() > 2 { Dtype::F32 } else { Dtype::BF16 })),
        _ => None,
    }
}

fn gated_delta(x: &[Array], state: Option<&Array>, mask: Option<&Array>) -> Result<Vec<Array>> {
    let (y, state) = fast::gated_delta_update(&x[0], &x[1], &x[2], &x[3], &x[4], state, mask)?;
    Ok(vec![y, state])
}

fn fused(op: &str, x: &[Array], args: &Args) -> Option<Result<Vec<Array>>> {
    let eps = args.float("eps").unwrap_or(0.0) as f32;
    match op {
        "rms_norm" => one(fast::rms_norm(&x[0], x.get(1), eps)),
        "layer_norm" => {
            let weight = args.flag("weight").unwrap().then(|| &x[1]);
            let bias = args.flag("bias").unwrap().then(|| &x[x.len() - 1]);
            one(fast::layer_norm(&x[0], weight, bias, eps))
        }
        "cross_entropy" => one(fast::cross_entropy(&x[0], &x[1])),
        "rope" => {
            let base = match x.get(1) {
                Some(freqs) => RopeBase::Freqs(freqs),
                None => RopeBase::Base(args.float("base").unwrap() as f32),
            };
            let each =
                args.get("offset").is_some_and(Value::is_array).then(|| args.indices("offset").unwrap());
            let offset = match &each {
                Some(offsets) => RopeOffset::Each(offsets),
                None => RopeOffset::At(args.int("offset").unwrap() as i32),
            };
            let (dims, scale) = (args.usize("dims").unwrap(), args.float("scale").unwrap() as f32);
            one(fast::rope(&x[0], dims, args.flag("traditional").unwrap(), base, scale, offset))
        }
        "scaled_dot_product_attention" => {
            let mask = match args.text("mask") {
                Some("causal") => AttentionMask::Causal,
                Some(_) => AttentionMask::Array(&x[3]),
                None => AttentionMask::None,
            };
            let sinks = args.flag("sinks").unwrap_or(false).then(|| &x[x.len() - 1]);
            let scale = args.float("scale").unwrap() as f32;
            one(fast::scaled_dot_product_attention(&x[0], &x[1], &x[2], scale, mask, sinks))
        }
        "gated_delta_update" => {
            let state = args.flag("state").unwrap_or(false).then(|| &x[5]);
            let mask = args.flag("mask").unwrap_or(false).then(|| &x[x.len() - 1]);
            Some(gated_delta(x, state, mask))
        }
        "gated_delta_grads" => Some(grad(
            |y| {
                let outputs = gated_delta(y, Some(&y[5]), x.get(6))?;
                let sums = outputs.iter().map(|output| output.square()?.sum(&[], false));
                let sums = sums.collect::<Result<Vec<Array>>>()?;
                sums[0].add(&sums[1])
            },
            &x[..6],
        )),
        "cumprod_grad" => {
            let (axis, flags) = (args.int("axis").unwrap() as i32, ["reverse", "inclusive"]);
            let [reverse, inclusive] = flags.map(|key| args.flag(key).unwrap());
            Some(grad(|y| y[0].cumprod(axis, reverse, inclusive)?.multiply(&x[1])?.sum(&[], false), &x[..1]))
        }
        _ => None,
    }
}

fn elementwise(op: &str, x: &[Array], args: &Args) -> Option<Result<Vec<Array>>> {
    use UnaryOp::*;
    let unary = [
        ("abs", Abs),
        ("negative", Neg),
        ("sign", Sign),
        ("square", Square),
        ("reciprocal", Reciprocal),
        ("sqrt", Sqrt),
        ("rsqrt", Rsqrt),
        ("exp", Exp),
        ("log", Log),
        ("log2", Log2),
        ("log10", Log10),
        ("log1p", Log1p),
        ("sin", Sin),
        ("cos", Cos),
        ("tan", Tan),
        ("arcsin", Arcsin),
        ("arccos", Arccos),
        ("arctan", Arctan),
        ("sinh", Sinh),
        ("cosh", Cosh),
        ("tanh", Tanh),
        ("arcsinh", Arcsinh),
        ("arccosh", Arccosh),
        ("arctanh", Arctanh),
        ("round", Round),
        ("floor", Floor),
        ("sigmoid", Sigmoid),
        ("erf", Erf),
        ("logical_not", LogicalNot),
    ];
    let binary = [
        ("add", BinaryOp::Add),
        ("subtract", BinaryOp::Subtract),
        ("multiply", BinaryOp::Multiply),
        ("divide", BinaryOp::Divide),
        ("power", BinaryOp::Power),
        ("maximum", BinaryOp::Maximum),
        ("minimum", BinaryOp::Minimum),
        ("logaddexp", BinaryOp::LogAddExp),
        ("remainder", BinaryOp::Remainder),
        ("floor_divide", BinaryOp::FloorDivide),
    ];
    let compare = [
        ("equal", CompareOp::Eq),
        ("not_equal", CompareOp::Ne),
        ("less", CompareOp::Lt),
        ("less_equal", CompareOp::Le),
        ("greater", CompareOp::Gt),
        ("greater_equal", CompareOp::Ge),
    ];
    let axes: Vec<i32> = args.int("axis").map(|axis| axis as i32).into_iter().collect();
    if let Some((_, op)) = unary.into_iter().find(|(name, _)| *name == op) {
        return one(x[0].unary(op));
    }
    if let Some((_, op)) = binary.into_iter().find(|(name, _)| *name == op) {
        return one(x[0].binary(op, &x[1]));
    }
    if let Some((_, op)) = compare.into_iter().find(|(name, _)| *name == op) {
        return one(x[0].compare(op, &x[1]));
    }
    match op {
        "real" => one(x[0].real()),
        "imag" => one(x[0].imag()),
        "conjugate" => one(x[0].conjugate()),
        "softmax" => one(x[0].softmax(-1)),
        "logsumexp" => one(x[0].logsumexp(-1, false)),
        "sum" => one(x[0].sum(&axes, false)),
        "prod" => one(x[0].prod(&axes, false)),
        "max" => one(x[0].max(&axes, false)),
        "min" => one(x[0].min(&axes, false)),
        "mean" => one(x[0].mean(&axes, false)),
        "argmax" => one(x[0].argmax(-1, false)),
        "take" => one(x[0].take(&x[1], 0)),
        "concatenate" => one(Array::concatenate(x, 0)),
        _ => None,
    }
}

/// Largest errors, relative to the largest value: a few roundings of the dtype. Sums that cancel,
/// decompositions and MLX's own f32 arithmetic in its linear algebra need a hundred.
fn tolerance(op: &str, dtype: Dtype) -> f64 {
    let unit = match dtype {
        Dtype::F16 => 2f64.powi(-10),
        Dtype::BF16 => 2f64.powi(-7),
        Dtype::F32 | Dtype::F64 | Dtype::C64 => 2f64.powi(-23),
        _ => return 0.0,
    };
    let factor = match op {
        "inv" | "solve" | "pinv" | "solve_triangular" | "cholesky_inv" | "eigvals" | "eigvalsh" => 400.0,
        "svd_values" | "norm" | "det" | "slogdet" | "lu" | "lu_factor" | "qr" | "cholesky" | "tri_inv" => {
            40.0
        }
        "rope" => 40.0,
        _ => 16.0,
    };
    unit * factor
}

/// What a result's errors are measured against, however small it is: terms that cancel are rounded at their own
/// size, and sums of products may be formed in another order.
fn least_scale(op: &str, inputs: &[Array]) -> f64 {
    match op {
        "det" => 1.0,
        "inner" | "matmul" | "tensordot" | "einsum" | "addmm" => {
            let largest = |x: &Array| {
                let finite = numbers(x).unwrap().into_iter().filter(|v| v.is_finite());
                finite.fold(0f64, |top, v| top.max(v.abs()))
            };
            inputs.iter().map(largest).product::<f64>().min(1.0)
        }
        _ => 0.0,
    }
}

/// Eigenvalues come in no order: by real part (rounded, so that pairs stay together), then imaginary.
fn sorted(values: &[f64]) -> Vec<f64> {
    let mut pairs: Vec<[f64; 2]> = values.chunks_exact(2).map(|z| [z[0], z[1]]).collect();
    pairs.sort_by(|a, b| {
        let key = |z: &[f64; 2]| (z[0] * 1e3).round();
        key(a).total_cmp(&key(b)).then(a[1].total_cmp(&b[1]))
    });
    pairs.concat()
}

fn check(golden: &Golden, case: &Value) -> Result<(), String> {
    let (name, op) = (case["name"].as_str().unwrap(), case["op"].as_str().unwrap());
    let texts = |key: &str| -> Vec<&str> {
        case[key]
            .as_array()
            .map(|list| list.iter().map(|item| item.as_str().unwrap()).collect())
            .unwrap_or_default()
    };
    let inputs: Vec<Array> = texts("in_dtypes")
        .iter()
        .enumerate()
        .map(|(at, dtype)| load(golden, &format!("{name}.in{at}"), dtype_of(dtype)))
        .collect();
    let outputs = run(op, &inputs, &Args(&case["args"]))
        .and_then(|outputs| outputs.iter().try_for_each(Array::eval).map(|()| outputs));
    if let Some(refused) = case.get("error") {
        return match outputs {
            Ok(outputs) => Err(format!("gives {outputs:?}, should be refused: {refused}")),
            Err(_) => Ok(()),
        };
    }
    let outputs = outputs.map_err(|error| error.to_string())?;
    if let Some(path) = case.get("path") {
        let (got, info) = einsum_path(case["args"]["subscripts"].as_str().unwrap(), &inputs).unwrap();
        let got = serde_json::to_value(got).unwrap();
        if &got != path || info != case["info"].as_str().unwrap() {
            return Err(format!("path {got} {info}\nexpected {path} {}", case["info"].as_str().unwrap()));
        }
    }
    let dtypes = texts("dtypes");
    if outputs.len() != dtypes.len() {
        return Err(format!("{} outputs, expected {}", outputs.len(), dtypes.len()));
    }
    for (at, (output, dtype)) in outputs.iter().zip(dtypes).enumerate() {
        let dtype = dtype_of(dtype);
        let expected = load(golden, &format!("{name}.out{at}"), dtype);
        let shape: Vec<usize> =
            case["shapes"][at].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        if output.dtype() != dtype || output.shape() != shape {
            return Err(format!("output {at} is {output:?}, expected {dtype} {shape:?}"));
        }
        let (mut got, mut expected) = (numbers(output).unwrap(), numbers(&expected).unwrap());
        if op == "eigvals" {
            (got, expected) = (sorted(&got), sorted(&expected));
        }
        let largest = expected.iter().filter(|v| v.is_finite()).fold(0f64, |top, v| top.max(v.abs()));
        let bound = tolerance(op, dtype) * largest.max(least_scale(op, &inputs));
        for (place, (&a, &e)) in got.iter().zip(&expected).enumerate() {
            let same = a == e || (a.is_nan() && e.is_nan()) || (a - e).abs() <= bound;
            if !same {
                return Err(format!("output {at}, element {place}: {a:e}, expected {e:e} within {bound:e}"));
            }
        }
    }
    Ok(())
}

/// Every case of a file on the backend in force; panics with all that differ.
pub fn check_all(file: &str) {
    let golden = Golden::load(fixture(format!("mlx/{file}.safetensors")));
    let text = std::fs::read_to_string(fixture(format!("mlx/{file}.json"))).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let cases = file["cases"].as_array().unwrap();
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let (name, args) = (case["name"].as_str().unwrap(), &case["args"]);
            check(&golden, case).err().map(|what| format!("{name} {args}: {what}"))
        })
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {} cases differ:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}
