//! Functions in files, and graphs as text.

use mica_array::fft::{self, Norm};
use mica_array::quantized::{QuantMode, QuantSpec, QuantizedArray, quantize};
use mica_array::transforms::{checkpoint, compile, grad};
use mica_array::{
    Array, Dtype, Error, FunctionExporter, PackedWeight, Precision, Result, conv, export_function,
    graph::Graph, import_function, linalg,
};

use cases::ops::op_cases;

mod cases;

fn values(array: &Array) -> Vec<f64> {
    array.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap()
}

fn in_f32(array: &Array) -> Array {
    let array = if array.dtype() == Dtype::F64 { array.astype(Dtype::F32).unwrap() } else { array.clone() };
    array.eval().unwrap();
    array
}

fn check_same(name: &str, got: &[Array], expected: &[Array]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!((got.shape(), got.dtype()), (expected.shape(), expected.dtype()), "{name}");
        let (got, expected) = (values(got), values(expected));
        let same =
            got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
        assert!(same, "{name}: {got:?}, expected {expected:?}");
    }
}

#[test]
fn every_op_and_its_gradient_come_back_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.safetensors");
    for case in op_cases() {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        let gradient = |x: &[Array]| {
            grad(
                |x| {
                    let floats = (case.f)(x)?.into_iter().filter(|y| y.dtype().is_float());
                    floats
                        .into_iter()
                        .try_fold(Array::zeros(&[], Dtype::F32), |sum, y| sum.add(y.sin()?.sum(&[], false)?))
                },
                x,
            )
        };
        let functions: [(&str, &dyn Fn(&[Array]) -> Result<Vec<Array>>); 2] =
            [(case.name, &case.f), ("its gradient", &gradient)];
        for (name, f) in functions.into_iter().take(1 + case.differentiable as usize) {
            let name = format!("{}: {name}", case.name);
            export_function(&path, f, &inputs).unwrap_or_else(|error| panic!("{name}: {error}"));
            let imported = import_function(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            check_same(&name, &imported.call(&inputs).unwrap(), &compile(f).call(&inputs).unwrap());
        }
    }
}

type F = fn(&[Array]) -> Result<Vec<Array>>;

/// What is f32 and complex, or has several outputs, is not in the table of all ops.
fn algebra_cases() -> Vec<(&'static str, Vec<Array>, F)> {
    let normal = |shape: &[usize], seed| cases::random(shape, Dtype::F32, seed);
    let square = || vec![normal(&[2, 4, 4], 7)];
    fn spd(x: &Array) -> Result<Array> {
        x.matmul(&x.swap_axes(-1, -2)?)?.add(Array::eye(4, 4, 0, Dtype::F32)?)
    }
    let indices = |values: &[u32]| Array::from_slice(values, &[values.len()]).unwrap();
    let image = vec![normal(&[2, 6, 5, 4], 1), normal(&[6, 3, 2, 2], 2)];
    vec![
        ("conv", image, |x| Ok(vec![conv::conv2d(&x[0], &x[1], [2, 1], [1, 0], [1, 2], 2)?])),
        ("conv transposed", vec![normal(&[2, 6, 4], 3), normal(&[3, 3, 4], 4)], |x| {
            Ok(vec![conv::conv_transpose1d(&x[0], &x[1], [2], [3], [1], [1], 1)?])
        }),
        ("fft", vec![normal(&[3, 8], 5)], |x| {
            let spectrum = fft::rfft(&x[0], None, -1, Norm::Ortho)?;
            Ok(vec![
                spectrum.abs()?,
                fft::irfft(&spectrum.multiply(&spectrum)?, Some(7), -1, Norm::Backward)?,
            ])
        }),
        ("fft of two axes", vec![normal(&[3, 4], 6)], |x| {
            let there = fft::fft2(&x[0], None, None, Norm::Backward)?;
            Ok(vec![there.real()?, fft::ifft(&there, None, 0, Norm::Forward)?.imag()?])
        }),
        ("inverses", square(), |x| {
            Ok(vec![linalg::inv(&spd(&x[0])?)?, linalg::tri_inv(&spd(&x[0])?, true)?])
        }),
        ("cholesky", square(), |x| Ok(vec![linalg::cholesky(&spd(&x[0])?, true)?])),
        ("determinants", square(), |x| {
            let (sign, log) = linalg::slogdet(&x[0])?;
            Ok(vec![linalg::det(&x[0])?, sign, log])
        }),
        ("hadamard_transform", vec![normal(&[3, 12], 8)], |x| Ok(vec![x[0].hadamard_transform(None)?])),
        ("gather_mm", vec![normal(&[3, 2, 4], 9), normal(&[2, 4, 3], 10), indices(&[0, 1, 1])], |x| {
            Ok(vec![x[0].gather_mm(&x[1], None, Some(&x[2]), true)?])
        }),
        ("segmented_mm", vec![normal(&[3, 6], 11), normal(&[6, 2], 12), indices(&[0, 2, 2, 6])], |x| {
            Ok(vec![x[0].segmented_mm(&x[1], &x[2].reshape(&[2, 2])?)?])
        }),
    ]
}

/// What has no gradient.
fn rigid_cases() -> Vec<(&'static str, Vec<Array>, F)> {
    let normal = |shape: &[usize], seed| cases::random(shape, Dtype::F32, seed);
    fn codes(x: &Array, mode: QuantMode, global: Option<&Array>) -> Result<Vec<Array>> {
        let codes = quantize(x, QuantSpec::usual(mode), global)?;
        let mut all = vec![codes.dequantize(None)?, codes.words.clone(), codes.scales.clone()];
        all.extend(codes.biases);
        Ok(all)
    }
    let square = || vec![normal(&[2, 4, 4], 21)];
    vec![
        ("solve", square(), |x| {
            let well_posed = x[0].add(Array::eye(4, 4, 0, Dtype::F32)?.multiply(4.0)?)?;
            Ok(vec![linalg::solve(&well_posed, &x[0])?])
        }),
        ("pinv", square(), |x| Ok(vec![linalg::pinv(&x[0])?])),
        ("lu", square(), |x| {
            let (rows, lower, upper) = linalg::lu(&x[0])?;
            Ok(vec![rows, lower, upper])
        }),
        ("qr", vec![normal(&[5, 3], 22)], |x| {
            let (q, r) = linalg::qr(&x[0])?;
            Ok(vec![q, r])
        }),
        ("svd", square(), |x| {
            let (u, s, vt) = linalg::svd(&x[0])?;
            Ok(vec![u, s, vt, linalg::singular_values(&x[0])?])
        }),
        ("eigh", square(), |x| {
            let (values, vectors) = linalg::eigh(&x[0], true)?;
            Ok(vec![values, vectors, linalg::eigvalsh(&x[0], false)?])
        }),
        ("eig", square(), |x| {
            let (values, vectors) = linalg::eig(&x[0])?;
            Ok(vec![values.abs()?, vectors.abs()?, linalg::eigvals(&x[0])?.real()?])
        }),
        ("affine", vec![normal(&[3, 64], 23)], |x| codes(&x[0], QuantMode::Affine, None)),
        ("mxfp4", vec![normal(&[3, 64], 23)], |x| codes(&x[0], QuantMode::Mxfp4, None)),
        ("mxfp8", vec![normal(&[3, 64], 23)], |x| codes(&x[0], QuantMode::Mxfp8, None)),
        ("nvfp4", vec![normal(&[3, 64], 23)], |x| {
            codes(&x[0], QuantMode::Nvfp4, Some(&x[0].abs()?.max(&[], false)?))
        }),
        ("fp8", vec![normal(&[9], 24)], |x| {
            let codes = x[0].to_fp8()?;
            Ok(vec![codes.from_fp8(Dtype::F32)?, codes])
        }),
        ("partitions", vec![normal(&[3, 7], 25)], |x| {
            Ok(vec![x[0].partition(2, 1)?, x[0].argpartition(-2, 1)?, x[0].view(Dtype::U32)?])
        }),
    ]
}

fn check_file(name: &str, f: &dyn Fn(&[Array]) -> Result<Vec<Array>>, inputs: &[Array]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.safetensors");
    export_function(&path, f, inputs).unwrap_or_else(|error| panic!("{name}: {error}"));
    let imported = import_function(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
    check_same(name, &imported.call(inputs).unwrap(), &compile(f).call(inputs).unwrap());
}

#[test]
fn convolutions_transforms_and_algebra_come_back_with_their_gradients() {
    for (name, inputs, f) in algebra_cases() {
        check_file(name, &f, &inputs);
        let gradient = |x: &[Array]| {
            let floats: Vec<Array> = x.iter().filter(|x| x.dtype().is_float()).cloned().collect();
            let rest: Vec<Array> = x[floats.len()..].to_vec();
            grad(
                |floats| {
                    let all: Vec<Array> = floats.iter().chain(&rest).cloned().collect();
                    f(&all)?.iter().try_fold(Array::zeros(&[], Dtype::F32), |sum, y| {
                        sum.add(y.astype(Dtype::F32)?.sin()?.sum(&[], false)?)
                    })
                },
                &floats,
            )
        };
        check_file(&format!("gradient of {name}"), &gradient, &inputs);
    }
    for (name, inputs, f) in rigid_cases() {
        check_file(name, &f, &inputs);
    }
}

#[test]
fn traces_of_one_file_share_constants_and_are_chosen_by_the_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.safetensors");
    let w = cases::random(&[64, 64], Dtype::F32, 30);
    let sum = |x: &[Array]| {
        let sum = x[1..].iter().try_fold(x[0].clone(), |a, b| a.add(b))?;
        Ok(vec![sum.matmul(&w)?])
    };
    let x = [cases::random(&[2, 64], Dtype::F32, 31), cases::random(&[2, 64], Dtype::F32, 32)];
    let mut exporter = FunctionExporter::new(&path, sum).metadata("a sum");
    exporter.trace(&x[..1]).unwrap();
    exporter.trace(&x).unwrap();
    let error = exporter.trace(&x[1..]).unwrap_err().to_string();
    assert!(error.contains("a trace for such inputs already"), "{error}");
    exporter.finish().unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() < 2 * 64 * 64 * 4, "the matrix is there once");
    let f = import_function(&path).unwrap();
    assert_eq!((f.signatures().len(), f.metadata()), (2, Some("a sum")));
    for inputs in [&x[..1], &x] {
        check_same("a sum", &f.call(inputs).unwrap(), &sum(inputs).unwrap());
    }
    let error = f.call(&[cases::random(&[3, 64], Dtype::F32, 33)]).unwrap_err().to_string();
    assert!(error.contains("there are (float32[2, 64]), (float32[2, 64], float32[2, 64])"), "{error}");
}

#[test]
fn shapeless_functions_take_other_sizes_and_say_when_they_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.safetensors");
    let w = cases::random(&[6, 5], Dtype::F32, 40);
    let block = |x: &[Array]| {
        // [batch, length, 6]: merged, split, padded, reduced and normalized.
        let (batch, length) = (x[0].dim(0) as i64, x[0].dim(1) as i64);
        let rows = x[0].reshape(&[batch * length, 6])?.matmul(&w)?;
        let y = rows.reshape(&[batch, length, 5])?.add(&x[1])?.softmax(-1)?;
        let padded = y.pad_with(&[(0, 0), (1, 2), (0, 0)], 0.0)?;
        Ok(vec![padded.sum(&[1], false)?, padded.swap_axes(0, 1)?.max(&[-1], true)?])
    };
    let inputs = |batch: usize, length: usize| {
        [cases::random(&[batch, length, 6], Dtype::F32, 41), cases::random(&[length, 1], Dtype::F32, 42)]
    };
    let mut exporter = FunctionExporter::new(&path, block).shapeless();
    exporter.trace(&inputs(2, 3)).unwrap();
    exporter.finish().unwrap();
    let f = import_function(&path).unwrap();
    assert_eq!(f.signatures()[0][0].0.as_slice(), [0, 0, 6], "a matrix has the six");
    for (batch, length) in [(2, 3), (4, 9), (7, 7), (1, 2)] {
        let x = inputs(batch, length);
        check_same("a block", &f.call(&x).unwrap(), &block(&x).unwrap());
    }
    for (wrong, expected) in [
        ([inputs(2, 3)[0].clone(), inputs(2, 4)[1].clone()], "these sizes are one"),
        (
            [cases::random(&[2, 3, 7], Dtype::F32, 43), inputs(2, 3)[1].clone()],
            "input 0 must be float32[0, 0, 6]",
        ),
    ] {
        let error = f.call(&wrong).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let x = [cases::random(&[4, 3], Dtype::F32, 44)];
    let refused: [(&str, F, &str); 2] = [
        ("a mean", |x| Ok(vec![x[0].mean(&[0], false)?]), "depends on a size"),
        ("a middle", |x| Ok(vec![x[0].narrow(0, x[0].dim(0) / 2, x[0].dim(0))?]), "size"),
    ];
    for (name, f, expected) in refused {
        let error = FunctionExporter::new(&path, f).shapeless().trace(&x).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[test]
fn constants_compiled_functions_and_packed_weights_are_written_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.safetensors");
    let plain = cases::random(&[64, 64], Dtype::F32, 1);
    let format = QuantSpec::affine(4, 32).unwrap();
    let packed = Array::from_packed(PackedWeight::quantize(&plain, format).unwrap());
    let words = [packed.packed().unwrap().to_mlx().unwrap().words, cases::random(&[64, 8], Dtype::U32, 4)];
    let numbers = |seed| cases::random(&[2, 64, 2], Dtype::F32, seed);
    let words = Array::stack(&words, 0).unwrap();
    let stacked = QuantizedArray::new(words, numbers(5), Some(numbers(6)), format, None).unwrap();
    let experts = Array::from_packed(PackedWeight::from_mlx(&stacked).unwrap());
    let chosen = Array::from_slice(&[1u32, 0, 1], &[3]).unwrap();
    let bias = cases::random(&[64], Dtype::BF16, 2);
    let gate = compile(|x: &[Array]| Ok(vec![x[0].silu()? * &x[1]]));
    let f = |x: &[Array]| {
        let y = x[0].linear(&packed, None, Precision::Exact)?.add(&bias)?;
        let rows = y.expand_dims(&[1])?.astype(Dtype::F32)?;
        let y = y.add(rows.gather_linear(&experts, None, Some(&chosen), Precision::Exact)?.squeeze(&[1])?)?;
        let y = checkpoint(|y| Ok(vec![y[0].tanh()? * f64::NEG_INFINITY.exp()]), &[y])?;
        gate.call(&[y[0].clone(), x[0].clone()])
    };
    let x = [cases::random(&[3, 64], Dtype::F32, 3)];
    export_function(&path, f, &x).unwrap();
    let imported = import_function(&path).unwrap();
    check_same("a layer", &imported.call(&x).unwrap(), &f(&x).unwrap());
    assert_eq!(imported.signatures()[0][0].0.as_slice(), [3, 64]);
    // Gradients go through it like through any function.
    let loss = |g: &dyn Fn(&[Array]) -> Result<Vec<Array>>| grad(|x| g(x)?[0].sum(&[], false), &x).unwrap();
    check_same("its gradient", &loss(&|x| imported.call(x)), &loss(&f));
    for (inputs, expected) in [
        (vec![], "takes 1 inputs, got 0"),
        (vec![cases::random(&[2, 64], Dtype::F32, 3)], "input 0 must be float32[3, 64]"),
    ] {
        let error = imported.call(&inputs).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// A function file with this graph and a constant `c0` of two floats.
fn import_text(text: &str) -> Result<mica_array::ImportedFunction> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.safetensors");
    let c0 = ("c0".to_string(), Array::from_slice(&[1.0f32, 2.0], &[2]).unwrap());
    mica_array::files::save_safetensors(&path, &[c0], &[("mica_function", text)]).unwrap();
    import_function(&path)
}

#[test]
fn graphs_from_strangers_are_checked() {
    let with_node = |node: &str| {
        format!(
            r#"{{"version": 1, "constants": [{{"tensor": "c0"}}], "functions": [
                {{"inputs": [{{"dtype": "float32", "shape": [2]}}], "nodes": [{node}], "outputs": ["n0"]}}]}}"#
        )
    };
    let with_sizes = |sizes: &str, size: &str| {
        format!(
            r#"{{"version": 1, "constants": [], "functions": [{{"sizes": {sizes}, "nodes": [], "outputs": ["i0"],
                "inputs": [{{"dtype": "float32", "shape": [{size}]}}]}}]}}"#
        )
    };
    let f32s = |shape: &str| format!(r#""outputs": [{{"dtype": "float32", "shape": {shape}}}]"#);
    let two = f32s("[2]");
    let good = with_node(&format!(r#"{{"op": "add", "inputs": ["i0", "c0"], {two}}}"#));
    let f = import_text(&good).unwrap();
    let x = Array::from_slice(&[1.0f32, 1.0], &[2]).unwrap();
    assert_eq!(f.call(&[x]).unwrap()[0].to_vec::<f32>().unwrap(), [2.0, 3.0]);

    let three = f32s("[3]");
    for (name, text, expected) in [
        ("no JSON", "{".to_string(), "no JSON"),
        ("another version", r#"{"version": 7}"#.to_string(), "version 1"),
        ("nothing", r#"{"version": 1}"#.to_string(), "\"constants\" is missing"),
        (
            "no inputs",
            r#"{"version": 1, "constants": [], "functions": [{}]}"#.to_string(),
            "\"inputs\" is missing",
        ),
        (
            "an unknown op",
            with_node(&format!(r#"{{"op": "launch", "inputs": ["i0"], {two}}}"#)),
            "no op of this name",
        ),
        ("itself", with_node(&format!(r#"{{"op": "exp", "inputs": ["n0"], {two}}}"#)), "no node before"),
        (
            "an input too far",
            with_node(&format!(r#"{{"op": "exp", "inputs": ["i1"], {two}}}"#)),
            "is no input",
        ),
        (
            "no output of it",
            with_node(&format!(r#"{{"op": "exp", "inputs": ["i0.1"], {two}}}"#)),
            "is no input",
        ),
        ("a strange name", with_node(&format!(r#"{{"op": "exp", "inputs": ["é0"], {two}}}"#)), "is no input"),
        (
            "another shape",
            with_node(&format!(r#"{{"op": "exp", "inputs": ["i0"], {three}}}"#)),
            "the file says",
        ),
        ("too few", with_node(&format!(r#"{{"op": "add", "inputs": ["i0"], {two}}}"#)), "takes 2 inputs"),
        ("none", with_node(&format!(r#"{{"op": "reshape", "inputs": [], {two}}}"#)), "got none"),
        (
            "a slice outside",
            with_node(&format!(r#"{{"op": "slice", "inputs": ["i0"], "start": [1], "step": [1], {two}}}"#)),
            "leave the shape",
        ),
        (
            "an update outside",
            with_node(&format!(
                r#"{{"op": "slice_update", "inputs": ["i0", "c0"], "start": [1], "step": [1], {two}}}"#
            )),
            "leave the shape",
        ),
        (
            "an update of one place",
            with_node(&format!(
                r#"{{"op": "slice_update", "inputs": ["i0", "c0"], "start": [1], "step": [0], {two}}}"#
            )),
            "one place twice",
        ),
        (
            "an axis outside",
            with_node(&format!(r#"{{"op": "sum", "inputs": ["i0"], "axes": [4], {two}}}"#)),
            "out of range",
        ),
        (
            "a huge shape",
            with_node(&format!(
                r#"{{"op": "full", "inputs": [], "value": {{"int": 1}}, {}}}"#,
                f32s("[4294967296, 4294967296]")
            )),
            "too large",
        ),
        (
            "a negative size",
            with_node(&format!(r#"{{"op": "full", "inputs": [], "value": {{"int": 1}}, {}}}"#, f32s("[-1]"))),
            "no whole number",
        ),
        (
            "an unknown dtype",
            with_node(r#"{"op": "exp", "inputs": ["i0"], "outputs": [{"dtype": "float31", "shape": [2]}]}"#),
            "no dtype",
        ),
        (
            "a missing tensor",
            r#"{"version": 1, "constants": [{"tensor": "c9"}], "functions": []}"#.to_string(),
            "c9",
        ),
        (
            "strange weights",
            r#"{"version": 1, "functions": [], "constants":
                [{"words": "c0", "scales": "c0", "biases": "c0", "bits": 4, "group_size": 64}]}"#
                .to_string(),
            "quantized",
        ),
        (
            "an odd scatter",
            with_node(&format!(r#"{{"op": "scatter_add", "inputs": ["i0", "c0"], "axis": 9, {two}}}"#)),
            "no axis 9",
        ),
        (
            "an odd transform",
            with_node(&format!(r#"{{"op": "irfft", "inputs": ["i0"], "axis": 0, "scale": 1.0, {two}}}"#)),
            "needs complex64",
        ),
        (
            "a huge convolution",
            with_node(&format!(
                r#"{{"op": "conv", "inputs": ["i0", "c0"], "stride": [1], "low": [0], "high": [0],
                    "kernel_dilation": [1099511627776], "input_dilation": [1], "groups": 1, "flip": false, {two}}}"#
            )),
            "above 1048576",
        ),
        (
            "codes that are none",
            with_node(&format!(
                r#"{{"op": "dequantize", "inputs": ["i0", "c0", "c0"], "mode": "affine", "bits": 4,
                    "group_size": 32, {two}}}"#
            )),
            "words should be uint32",
        ),
        ("strange sizes", with_sizes(r#"{"s0": -1}"#, r#""s0""#), "no size in range"),
        ("an unknown size", with_sizes(r#"{"s0": 2}"#, r#""s1""#), "is no size"),
        ("a size too large", with_sizes(r#"{"s0": 1048576}"#, r#""s0*s0*s0""#), "out of range"),
        ("a size below zero", with_sizes(r#"{"s0": 2}"#, r#""s0-3""#), "out of range"),
    ] {
        let error = import_text(&text).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plain.safetensors");
    mica_array::files::save_safetensors(&path, &[], &[]).unwrap();
    assert!(import_function(&path).unwrap_err().to_string().contains("holds no function"));
    assert!(matches!(import_function(folder.path().join("none")).unwrap_err(), Error::File { .. }));
}

#[test]
fn graphs_as_text_and_as_pictures() {
    let x = Array::from_slice(&[1.0f32, 2.0, 3.0, 4.0], &[2, 2]).unwrap();
    let y = x.swap_axes(0, 1).unwrap().matmul(&x).unwrap().sum(&[1], false).unwrap();
    let graph = Graph::of(&[y, x]);
    let expected = "%0 = value float32[2, 2]\n\
                    %1 = transpose[1, 0] %0 float32[2, 2]\n\
                    %2 = matmul %1, %0 float32[2, 2]\n\
                    %3 = sum[1] %2 float32[2, 1]\n\
                    %4 = reshape %3 float32[2]\n\
                    return %4, %0\n";
    assert_eq!(graph.to_string(), expected);
    assert_eq!(graph.ops(), 3);
    assert_eq!(graph.bytes(), 16 + 8 + 8);
    assert_eq!(
        graph.count_by_name().into_iter().collect::<Vec<_>>(),
        [("matmul", 1), ("reshape", 1), ("sum", 1)]
    );
    let dot = graph.to_dot();
    for line in
        ["digraph {", "n2 [shape=ellipse, label=\"matmul\\nfloat32[2, 2]\"];", "n1 -> n2;", "n0 -> n2;"]
    {
        assert!(dot.contains(line), "{dot}");
    }
    // A million nodes are no recursion.
    let mut long = Array::ones(&[2], Dtype::F32);
    for _ in 0..100_000 {
        long = long.add(&long).unwrap();
    }
    assert_eq!(Graph::of(&[long]).count_by_name()["add"], 100_000);
}
