//! Functions in files, and graphs as text.

use mica_array::transforms::{checkpoint, compile, grad};
use mica_array::{
    Array, Dtype, Error, PackedWeight, Precision, Result, export_function, graph::Graph, import_function,
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

#[test]
fn constants_compiled_functions_and_packed_weights_are_written_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.safetensors");
    let plain = cases::random(&[64, 64], Dtype::F32, 1);
    let packed = Array::from_packed(PackedWeight::quantize(&plain, 4, 32).unwrap());
    let bias = cases::random(&[64], Dtype::BF16, 2);
    let gate = compile(|x: &[Array]| Ok(vec![x[0].silu()? * &x[1]]));
    let f = |x: &[Array]| {
        let y = x[0].linear(&packed, None, Precision::Exact)?.add(&bias)?;
        let y = checkpoint(|y| Ok(vec![y[0].tanh()? * f64::NEG_INFINITY.exp()]), &[y])?;
        gate.call(&[y[0].clone(), x[0].clone()])
    };
    let x = [cases::random(&[3, 64], Dtype::F32, 3)];
    export_function(&path, f, &x).unwrap();
    let imported = import_function(&path).unwrap();
    check_same("a layer", &imported.call(&x).unwrap(), &f(&x).unwrap());
    assert_eq!(imported.inputs()[0].0.as_slice(), [3, 64]);
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
            r#"{{"version": 1, "inputs": [{{"dtype": "float32", "shape": [2]}}],
                "constants": [{{"tensor": "c0"}}], "nodes": [{node}], "outputs": ["n0"]}}"#
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
        ("nothing", r#"{"version": 1}"#.to_string(), "\"inputs\" is missing"),
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
            r#"{"version": 1, "inputs": [], "constants": [{"tensor": "c9"}], "nodes": [], "outputs": []}"#
                .to_string(),
            "c9",
        ),
        (
            "strange weights",
            r#"{"version": 1, "inputs": [], "nodes": [], "outputs": [], "constants":
                [{"words": "c0", "scales": "c0", "biases": "c0", "bits": 4, "group_size": 64}]}"#
                .to_string(),
            "quantized",
        ),
        (
            "an odd scatter",
            with_node(&format!(r#"{{"op": "scatter_add", "inputs": ["i0", "c0"], "axis": 9, {two}}}"#)),
            "no axis 9",
        ),
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
