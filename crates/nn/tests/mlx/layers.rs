//! Layers: outputs, and gradients of Σ y² by input and parameters.

use mica_array::quantized::{QuantMode, QuantSpec};
use mica_array::transforms::grad;
use mica_array::{Array, Dtype, Precision, Result, random};
use mica_nn::*;
use mica_testkit::Golden;

use super::{array, assert_all_ran, assert_matches, golden};

/// Sums of products in other orders, through two layers at most.
const CLOSE: f32 = 1e-5;

struct Cases {
    golden: Golden,
    ran: Vec<&'static str>,
}

/// The inputs of a case by name; `x` may be a tracer.
struct Inputs<'a> {
    golden: &'a Golden,
    case: &'a str,
    x: Array,
}

impl Inputs<'_> {
    fn at(&self, name: &str) -> Array {
        array(self.golden, &format!("layer.{}.{name}", self.case))
    }
}

fn sum_of_squares(ys: &[Array]) -> Result<Array> {
    let sums = ys.iter().map(|y| y.square()?.sum(&[], false)).collect::<Result<Vec<_>>>()?;
    sums[1..].iter().try_fold(sums[0].clone(), |a, b| a.add(b))
}

impl Cases {
    fn check<M: Module>(
        &mut self,
        case: &'static str,
        mut module: M,
        f: impl Fn(&M, &Inputs) -> Result<Vec<Array>>,
    ) {
        self.ran.push(case);
        let golden = &self.golden;
        let prefix = format!("layer.{case}.param.");
        let given: Vec<(String, Array)> = golden
            .names()
            .filter_map(|name| Some((name.strip_prefix(&prefix)?.to_string(), array(golden, name))))
            .collect();
        load_parameters(&mut module, &given, true).unwrap_or_else(|error| panic!("{case}: {error}"));
        let x = array(golden, &format!("layer.{case}.x"));
        let inputs = |x: &Array| Inputs { golden, case, x: x.clone() };
        let ys = f(&module, &inputs(&x)).unwrap_or_else(|error| panic!("{case}: {error}"));
        for (index, y) in ys.iter().enumerate() {
            let name = if index == 0 { "y".to_string() } else { format!("y{index}") };
            assert_matches(golden, &format!("layer.{case}.{name}"), y, CLOSE);
        }
        let dx = format!("layer.{case}.dx");
        if golden.contains(&dx) {
            let grads = grad(|x| sum_of_squares(&f(&module, &inputs(&x[0]))?), std::slice::from_ref(&x));
            let grads = grads.unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_matches(golden, &dx, &grads[0], 2.0 * CLOSE);
        }
        let (_, grads) = value_and_grad(&mut module, |module| sum_of_squares(&f(module, &inputs(&x))?))
            .unwrap_or_else(|error| panic!("{case}: {error}"));
        let prefix = format!("layer.{case}.grad.");
        let expected: Vec<&str> = golden.names().filter(|name| name.starts_with(&prefix)).collect();
        assert_eq!(grads.len(), expected.len(), "{case}: gradients of {expected:?}");
        for (name, grad) in grads {
            assert_matches(golden, &format!("{prefix}{name}"), &grad, 2.0 * CLOSE);
        }
    }

    fn layer(&mut self, case: &'static str, layer: impl Layer) {
        self.check(case, layer, |layer, at| Ok(vec![layer.forward(&at.x, &Context::default())?]));
    }
}

#[test]
fn layers_and_their_gradients() {
    let mut cases = Cases { golden: golden(), ran: Vec::new() };
    let keys = &mut Keys::new(0).unwrap();
    dense(&mut cases, keys);
    norms(&mut cases);
    attention(&mut cases, keys);
    recurrent(&mut cases, keys);
    positions(&mut cases);
    pools(&mut cases);
    upsampling(&mut cases);
    convolutions(&mut cases, keys);
    assert_all_ran(&cases.golden, "layer", &cases.ran);
}

fn dense(cases: &mut Cases, keys: &mut Keys) {
    cases.layer("linear", Linear::new(8, 6, true, keys).unwrap());
    cases.layer("linear_no_bias", Linear::new(8, 6, false, keys).unwrap());
    cases.layer("embedding", Embedding::new(9, 4, keys).unwrap());
    cases.check("bilinear", Bilinear::new(8, 4, 3, true, keys).unwrap(), |layer, at| {
        Ok(vec![layer.forward(&at.x, &at.at("x2"))?])
    });
}

fn norms(cases: &mut Cases) {
    cases.layer("layer_norm", LayerNorm::new(8, 1e-5, true, true).unwrap());
    cases.layer("layer_norm_no_bias", LayerNorm::new(8, 1e-5, true, false).unwrap());
    cases.layer("layer_norm_plain", LayerNorm::new(8, 1e-5, false, true).unwrap());
    cases.layer("rms_norm", RmsNorm::new(8, 1e-5).unwrap());
    cases.layer("instance_norm", InstanceNorm::new(6, 1e-5, false).unwrap());
    cases.layer("instance_norm_affine", InstanceNorm::new(6, 1e-5, true).unwrap());
    cases.layer("group_norm", GroupNorm::new(2, 6, 1e-5, true, false).unwrap());
    cases.layer("group_norm_pytorch", GroupNorm::new(3, 6, 1e-5, true, true).unwrap());
    cases.layer("group_norm_plain", GroupNorm::new(2, 6, 1e-5, false, false).unwrap());
    cases.layer("batch_norm_eval", BatchNorm::new(6, 1e-5, 0.1, true, true).unwrap());
    cases.layer("batch_norm_untracked", BatchNorm::new(6, 1e-5, 0.1, false, false).unwrap());
}

fn attention(cases: &mut Cases, keys: &mut Keys) {
    let context = Context::default;
    cases.check("attention", MultiHeadAttention::new(8, 2, false, keys).unwrap(), |layer, at| {
        Ok(vec![layer.forward(&at.x, &at.x, &at.x, None, &context())?])
    });
    for (case, bias) in [("attention_mask", true), ("attention_bool", false)] {
        cases.check(case, MultiHeadAttention::new(8, 2, bias, keys).unwrap(), |layer, at| {
            Ok(vec![layer.forward(&at.x, &at.x, &at.x, Some(&at.at("mask")), &context())?])
        });
    }
    let widths = MultiHeadAttention::with_widths(8, 2, [8, 3, 4], 12, 5, false, keys).unwrap();
    cases.check("attention_widths", widths, |layer, at| {
        Ok(vec![layer.forward(&at.x, &at.at("k"), &at.at("v"), None, &context())?])
    });
    let first = TransformerSpec { mlp_dims: 12, ..TransformerSpec::new(8, 2) };
    let last = TransformerSpec { norm_first: false, ..first.clone() };
    let kept_less = TransformerSpec { checkpoint: true, ..first.clone() };
    let gelu = TransformerSpec { activation: gelu, ..last.clone() };
    for (case, layers, spec) in
        [("encoder", 2, &first), ("encoder", 2, &kept_less), ("encoder_last", 1, &gelu)]
    {
        cases.check(case, TransformerEncoder::new(layers, spec, keys).unwrap(), |encoder, at| {
            Ok(vec![encoder.forward(&at.x, Some(&at.at("mask")), &context())?])
        });
    }
    for (case, spec) in [("transformer", &first), ("transformer", &kept_less), ("transformer_last", &last)] {
        cases.check(case, Transformer::new(1, 1, spec, keys).unwrap(), |model, at| {
            let (target, mask) = (at.at("target"), at.at("mask"));
            Ok(vec![model.forward(&at.x, &target, None, Some(&mask), None, &context())?])
        });
    }
}

fn recurrent(cases: &mut Cases, keys: &mut Keys) {
    cases
        .check("rnn", Rnn::new(8, 4, true, keys).unwrap(), |layer, at| Ok(vec![layer.forward(&at.x, None)?]));
    let mut relu_rnn = Rnn::new(8, 4, false, keys).unwrap();
    relu_rnn.nonlinearity = relu;
    cases.check("rnn_relu", relu_rnn, |layer, at| Ok(vec![layer.forward(&at.x, Some(&at.at("h")))?]));
    for (case, bias, hidden) in
        [("gru", true, false), ("gru_hidden", true, true), ("gru_no_bias", false, false)]
    {
        cases.check(case, Gru::new(8, 4, bias, keys).unwrap(), |layer, at| {
            let h = hidden.then(|| at.at("h"));
            Ok(vec![layer.forward(&at.x, h.as_ref())?])
        });
    }
    cases.check("lstm", Lstm::new(8, 4, true, keys).unwrap(), |layer, at| {
        let (hidden, cell) = layer.forward(&at.x, None, None)?;
        Ok(vec![hidden, cell])
    });
    cases.check("lstm_hidden", Lstm::new(8, 4, false, keys).unwrap(), |layer, at| {
        let (hidden, cell) = layer.forward(&at.x, Some(&at.at("h")), Some(&at.at("c")))?;
        Ok(vec![hidden, cell])
    });
}

fn positions(cases: &mut Cases) {
    cases.check("rope", RoPE::new(8), |layer, at| Ok(vec![layer.at(&at.x, 3)?]));
    cases.layer("rope_traditional", RoPE { dims: 4, traditional: true, base: 100.0, scale: 0.5 });
    let plain = SinusoidalPositionalEncoding::new(6, 1e-4, 1.0, None, false, false).unwrap();
    cases.layer("sinusoidal", plain);
    let other = SinusoidalPositionalEncoding::new(4, 0.1, 0.9, Some(2.0), true, true).unwrap();
    cases.layer("sinusoidal_other", other);
    cases.check("alibi", ALiBi, |layer, at| Ok(vec![layer.forward(&at.x, 0, None)?]));
    cases.check("alibi_six", ALiBi, |layer, at| Ok(vec![layer.forward(&at.x, 2, Some(&at.at("mask")))?]));
}

fn pools(cases: &mut Cases) {
    cases.layer("max_pool1d", MaxPool1d::new([3], None, [0]).unwrap());
    cases.layer("max_pool1d_overlap", MaxPool1d::new([3], Some([2]), [1]).unwrap());
    cases.layer("avg_pool1d", AvgPool1d::new([2], Some([1]), [1]).unwrap());
    cases.layer("max_pool2d", MaxPool2d::new([3, 2], Some([2, 2]), [0, 0]).unwrap());
    cases.layer("max_pool2d_padding", MaxPool2d::new([2, 2], None, [1, 0]).unwrap());
    cases.layer("avg_pool2d", AvgPool2d::new([2, 3], Some([1, 3]), [0, 1]).unwrap());
    cases.layer("max_pool3d", MaxPool3d::new([2; 3], Some([1; 3]), [0; 3]).unwrap());
    cases.layer("avg_pool3d", AvgPool3d::new([2, 1, 3], None, [0; 3]).unwrap());
}

fn convolutions(cases: &mut Cases, keys: &mut Keys) {
    cases.layer("conv1d", Conv1d::new(3, 4, [3], 1, true, keys).unwrap());
    let grouped = Conv1d::new(3, 6, [2], 3, false, keys).unwrap();
    cases.layer("conv1d_groups", Conv1d { stride: [2], padding: [1], dilation: [2], ..grouped });
    let conv = Conv2d::new(3, 4, [3, 2], 1, true, keys).unwrap();
    cases.layer("conv2d", Conv2d { stride: [2, 1], padding: [1, 0], ..conv });
    let grouped = Conv2d::new(3, 3, [2, 2], 3, true, keys).unwrap();
    cases.layer("conv2d_dilated", Conv2d { dilation: [2, 2], ..grouped });
    let conv = Conv3d::new(2, 3, [2; 3], 1, true, keys).unwrap();
    cases.layer("conv3d", Conv3d { padding: [1; 3], stride: [2; 3], ..conv });
    let conv = ConvTranspose1d::new(3, 4, [3], true, keys).unwrap();
    cases.layer(
        "conv_transpose1d",
        ConvTranspose1d { stride: [2], padding: [1], output_padding: [1], ..conv },
    );
    let conv = ConvTranspose2d::new(3, 4, [3, 2], true, keys).unwrap();
    cases.layer("conv_transpose2d", ConvTranspose2d { stride: [2, 1], dilation: [1, 2], ..conv });
    let conv = ConvTranspose3d::new(2, 3, [2; 3], false, keys).unwrap();
    cases.layer("conv_transpose3d", ConvTranspose3d { stride: [2; 3], ..conv });
    let error = Conv2d::new(3, 4, [2, 2], 2, true, keys).unwrap_err().to_string();
    assert!(error.contains("3 and 4 channels"), "{error}");
}

fn upsampling(cases: &mut Cases) {
    use Interpolation::*;
    let all: [(&'static str, &[f64], Interpolation, bool, bool); 24] = [
        ("upsample_nearest_2", &[2.0], Nearest, false, false),
        ("upsample_nearest_1_7", &[1.7], Nearest, false, false),
        ("upsample_nearest_0_6", &[0.6], Nearest, false, false),
        ("upsample_linear_2", &[2.0], Linear, false, false),
        ("upsample_linear_2_corners", &[2.0], Linear, true, false),
        ("upsample_linear_2_smooth", &[2.0], Linear, false, true),
        ("upsample_linear_1_7", &[1.7], Linear, false, false),
        ("upsample_linear_1_7_corners", &[1.7], Linear, true, false),
        ("upsample_linear_1_7_smooth", &[1.7], Linear, false, true),
        ("upsample_linear_0_6", &[0.6], Linear, false, false),
        ("upsample_linear_0_6_corners", &[0.6], Linear, true, false),
        ("upsample_linear_0_6_smooth", &[0.6], Linear, false, true),
        ("upsample_cubic_2", &[2.0], Cubic, false, false),
        ("upsample_cubic_2_corners", &[2.0], Cubic, true, false),
        ("upsample_cubic_2_smooth", &[2.0], Cubic, false, true),
        ("upsample_cubic_1_7", &[1.7], Cubic, false, false),
        ("upsample_cubic_1_7_corners", &[1.7], Cubic, true, false),
        ("upsample_cubic_1_7_smooth", &[1.7], Cubic, false, true),
        ("upsample_cubic_0_6", &[0.6], Cubic, false, false),
        ("upsample_cubic_0_6_corners", &[0.6], Cubic, true, false),
        ("upsample_cubic_0_6_smooth", &[0.6], Cubic, false, true),
        ("upsample_axes", &[2.0, 1.5], Linear, false, false),
        ("upsample_signal", &[3.0], Cubic, false, false),
        ("upsample_volume", &[1.5], Linear, false, false),
    ];
    for (case, factors, mode, corners, smooth) in all {
        cases.layer(case, Upsample::new(factors, mode, corners, smooth).unwrap());
    }
}

#[test]
fn batch_norm_moves_its_statistics_while_training() {
    let golden = golden();
    let at = |name: &str| array(&golden, &format!("norm.batch.{name}"));
    let mut norm = BatchNorm::new(6, 1e-5, 0.3, true, true).unwrap();
    let training = Context::training(Precision::Exact, random::key(0).unwrap());
    for step in ["0", "1"] {
        let x = at(&format!("x{step}"));
        // As in training: under a gradient, whose tracers the statistics outlive.
        let mut outputs = Vec::new();
        let (loss, _) = value_and_grad(&mut norm, |norm| {
            outputs.push(norm.forward(&x, &training)?);
            outputs[0].sum(&[], false)
        })
        .unwrap();
        loss.eval().unwrap();
        assert_matches(&golden, &format!("norm.batch.y{step}"), &outputs[0], CLOSE);
    }
    assert_matches(&golden, "norm.batch.y", &norm.forward(&at("x0"), &Context::default()).unwrap(), CLOSE);
    for (name, array) in parameters(&norm).iter().filter(|(name, _)| name.starts_with("running")) {
        assert_matches(&golden, &format!("norm.batch.{name}"), array, CLOSE);
    }
    let trained: Vec<String> = trainable_parameters(&norm).into_iter().map(|(name, _)| name).collect();
    assert_eq!(trained, ["weight", "bias"]);
    let one = Array::ones(&[1, 6], Dtype::F32);
    assert!(norm.forward(&one, &training).unwrap_err().to_string().contains("more than one value"));
}

#[test]
fn new_layers_draw_what_mlx_draws() {
    let golden = golden();
    let keys = &mut Keys::new(13).unwrap();
    let new = |module: &dyn Module, index: usize| {
        for (name, array) in parameters(module) {
            assert_matches(&golden, &format!("init.layers.{index}.{name}"), &array, 1e-6);
        }
    };
    new(&Linear::new(5, 3, true, keys).unwrap(), 0);
    new(&Linear::new(4, 2, false, keys).unwrap(), 1);
    new(&Embedding::new(6, 4, keys).unwrap(), 2);
    new(&Bilinear::new(3, 2, 4, true, keys).unwrap(), 3);
    new(&Lstm::new(3, 2, true, keys).unwrap(), 4);
    new(&Gru::new(3, 2, true, keys).unwrap(), 5);
    new(&Rnn::new(3, 2, true, keys).unwrap(), 6);
    new(&Conv2d::new(4, 6, [3, 3], 2, true, keys).unwrap(), 7);
    new(&ConvTranspose1d::new(4, 2, [3], true, keys).unwrap(), 8);
    new(&MultiHeadAttention::new(4, 2, false, keys).unwrap(), 9);
}

#[test]
fn dropout_zeroes_the_share_that_it_says_and_only_while_training() {
    let x = Array::ones(&[2, 64, 64, 3], Dtype::F32);
    let training = Context::training(Precision::Exact, random::key(3).unwrap());
    let layers: [(&str, Box<dyn Layer>, usize); 3] = [
        ("values", Box::new(Dropout::new(0.25).unwrap()), 1),
        ("images", Box::new(Dropout2d::new(0.25).unwrap()), 64 * 64),
        ("volumes", Box::new(Dropout3d::new(0.25).unwrap()), 64 * 64 * 2),
    ];
    for (name, layer, shared) in layers {
        let still = layer.forward(&x, &Context::default()).unwrap().to_vec::<f32>().unwrap();
        assert!(still.iter().all(|&value| value == 1.0), "{name}");
        let x = if shared == 64 * 64 * 2 { x.expand_dims(&[0]).unwrap() } else { x.clone() };
        let y = layer.forward(&x, &training).unwrap();
        let values = y.to_vec::<f32>().unwrap();
        assert!(values.iter().all(|&value| value == 0.0 || (value - 4.0 / 3.0).abs() < 1e-6), "{name}");
        if shared == 1 {
            let zeros = values.iter().filter(|&&value| value == 0.0).count() as f64;
            assert!((zeros / values.len() as f64 - 0.25).abs() < 0.02, "{name}: {zeros}");
        }
        // All of a channel alike.
        let axes: &[i32] = if shared == 1 { &[] } else { &[-2, -3] };
        if !axes.is_empty() {
            let (low, high) = (y.min(axes, false).unwrap(), y.max(axes, false).unwrap());
            assert_eq!(low.to_vec::<f32>().unwrap(), high.to_vec::<f32>().unwrap(), "{name}");
        }
    }
    assert!(Dropout::new(1.0).is_err());
    assert!(Dropout2d::new(0.5).unwrap().forward(&Array::ones(&[2, 2], Dtype::F32), &training).is_err());
}

#[test]
fn causal_masks_hide_the_future() {
    let mask = MultiHeadAttention::causal_mask(3, Dtype::F32).unwrap().to_vec::<f32>().unwrap();
    let low = f32::MIN;
    assert_eq!(mask, [0.0, low, low, 0.0, 0.0, low, 0.0, 0.0, 0.0]);
    assert!(MultiHeadAttention::causal_mask(3, Dtype::I32).is_err());
}

#[test]
fn affine_quantization_packs_what_mlx_quantizes() {
    let golden = golden();
    for (bits, group_size) in [(4, 64), (8, 32), (3, 32)] {
        let at = |name: &str| array(&golden, &format!("quant.affine_{bits}_{group_size}.{name}"));
        let quantization = QuantSpec::affine(bits, group_size).unwrap();
        let mut model = Model {
            linear: Linear::from_arrays(at("weight"), Some(at("bias"))),
            embedding: Embedding { weight: at("table").into() },
        };
        quantize(&mut model, |_, _| Some(quantization)).unwrap();
        let name = |what: &str| format!("quant.affine_{bits}_{group_size}.{what}");
        let context = Context::default();
        let y = model.linear.forward(&at("x"), &context).unwrap();
        assert_matches(&golden, &name("y"), &y, CLOSE);
        let rows = model.embedding.forward(&at("indices"), &context).unwrap();
        assert_matches(&golden, &name("rows"), &rows, CLOSE);
        let logits = model.embedding.as_linear(&at("x"), &context).unwrap();
        assert_matches(&golden, &name("logits"), &logits, CLOSE);
        let saved = file_parameters(&model).unwrap();
        for (part, array) in &saved {
            assert_matches(&golden, &name(part), array, 0.0);
        }
        assert_eq!(saved.len(), 7, "weight, scales and biases twice, and a bias");
        // What was frozen stays frozen, what was saved can be loaded.
        assert_eq!(trainable_parameters(&model).len(), 1);
        let mut other = Model {
            linear: Linear::new(64, 16, true, &mut Keys::new(0).unwrap()).unwrap(),
            embedding: Embedding::new(9, 64, &mut Keys::new(1).unwrap()).unwrap(),
        };
        quantize(&mut other, |_, _| Some(quantization)).unwrap();
        load_file_parameters(&mut other, &saved, true).unwrap();
        let again = other.linear.forward(&at("x"), &context).unwrap();
        assert_eq!(again.to_vec::<f32>().unwrap(), y.to_vec::<f32>().unwrap());
        let error = load_file_parameters(&mut other, &saved[1..], true).unwrap_err().to_string();
        assert!(error.contains("linear.weight is quantized and needs"), "{error}");
    }
}

const FORMATS: [(QuantMode, usize, usize); 6] = [
    (QuantMode::Affine, 4, 64),
    (QuantMode::Affine, 8, 32),
    (QuantMode::Affine, 3, 32),
    (QuantMode::Mxfp4, 4, 32),
    (QuantMode::Nvfp4, 4, 16),
    (QuantMode::Mxfp8, 8, 32),
];

#[test]
fn layers_of_codes_are_mlxs_in_every_mode() {
    let golden = golden();
    let context = Context::default();
    for (mode, bits, group_size) in FORMATS {
        let case = format!("quant.{}_{bits}_{group_size}", mode.name());
        let at = |name: &str| array(&golden, &format!("{case}.{name}"));
        let format = QuantSpec::new(bits, group_size, mode).unwrap();
        let plain = Linear::from_arrays(at("weight"), Some(at("bias")));
        let table = Embedding { weight: at("table").into() };
        let linear = QuantizedLinear::from_linear(&plain, format).unwrap();
        let embedding = QuantizedEmbedding::from_embedding(&table, format).unwrap();
        let check = |name: &str, y: Result<Array>| {
            let y = y.unwrap_or_else(|error| panic!("{case}.{name}: {error}"));
            assert_matches(&golden, &format!("{case}.{name}"), &y, CLOSE);
        };
        check("y", linear.forward(&at("x"), &context));
        check("rows", embedding.forward(&at("indices"), &context));
        check("logits", embedding.as_linear(&at("x")));
        let dx = grad(|x| linear.forward(&x[0], &context)?.square()?.sum(&[], false), &[at("x")]);
        check("dx", dx.map(|mut grads| grads.remove(0)));
        let mut count = 0;
        for (module, name) in [(&linear as &dyn Module, "linear"), (&embedding, "embedding")] {
            for (part, array) in parameters(module) {
                assert_matches(&golden, &format!("{case}.{name}.{part}"), &array, 0.0);
                count += 1;
            }
        }
        let affine = mode == QuantMode::Affine;
        assert_eq!(count, if affine { 7 } else { 5 }, "{case}");
        // As in MLX, the bias of a quantized layer learns, and nothing else until it is unfrozen.
        let mut linear = linear;
        let trained = |linear: &QuantizedLinear| {
            trainable_parameters(linear).into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(trained(&linear), ["bias"]);
        unfreeze(&mut linear, Which::default()).unwrap();
        let learns: &[&str] = if affine { &["scales", "biases", "bias"] } else { &["bias"] };
        assert_eq!(trained(&linear), learns, "{case}");
        let (_, grads) =
            value_and_grad(&mut linear, |l| l.forward(&at("x"), &context)?.square()?.sum(&[], false))
                .unwrap();
        assert!(grads.iter().all(|(_, grad)| grad.eval().is_ok()), "{case}");
        // Another layer takes what was saved.
        let mut other = QuantizedLinear::from_linear(
            &Linear::new(64, 16, true, &mut Keys::new(3).unwrap()).unwrap(),
            format,
        )
        .unwrap();
        load_parameters(&mut other, &parameters(&linear), true).unwrap();
        check("y", other.forward(&at("x"), &context));
    }
}

#[test]
fn layers_that_quantize_their_inputs_learn_and_keep_codes() {
    let golden = golden();
    let context = Context::default();
    for (mode, group) in [(QuantMode::Nvfp4, 16), (QuantMode::Mxfp8, 32)] {
        let format = QuantSpec::usual(mode);
        let weight = array(&golden, "quant.nvfp4_4_16.weight");
        let weight = Array::concatenate(&[weight.clone(), weight], 0).unwrap();
        let x = random::normal(&[group, 64], Dtype::F32, &random::key(8).unwrap()).unwrap();
        let round = |x: &Array| {
            let codes = mica_array::quantized::quantize(x, format, None).unwrap();
            codes.dequantize(Some(Dtype::F32)).unwrap()
        };
        let turned = round(&weight).transpose(&[]).unwrap();
        let expected = round(&x).matmul(&turned).unwrap().to_vec::<f32>().unwrap();
        let mut layer = QQLinear::from_linear(&Linear::from_arrays(weight, None), format).unwrap();
        let close = |name: &str, layer: &QQLinear| {
            let y = layer.forward(&x, &context).unwrap().to_vec::<f32>().unwrap();
            mica_testkit::assert_close(name, &y, &expected, 1e-5, 1e-5);
        };
        close("floats", &layer);
        let (_, grads) =
            value_and_grad(&mut layer, |layer| layer.forward(&x, &context)?.sum(&[], false)).unwrap();
        assert_eq!(grads.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["weight"]);
        assert_eq!(grads[0].1.shape(), [32, 64]);
        grads[0].1.eval().unwrap();
        layer.quantize().unwrap();
        close("codes", &layer);
        assert!(trainable_parameters(&layer).is_empty());
        assert_eq!(parameters(&layer).len(), 2);
        layer.dequantize().unwrap();
        // Codes of what codes say are the same codes.
        close("floats again", &layer);
        assert_eq!(trainable_parameters(&layer).len(), 1);
    }
    let biased = Linear::new(64, 32, true, &mut Keys::new(0).unwrap()).unwrap();
    let error = QQLinear::from_linear(&biased, QuantSpec::usual(QuantMode::Nvfp4));
    assert!(error.unwrap_err().to_string().contains("without bias"));
}

#[test]
fn a_transformer_takes_other_encoders_and_decoders() {
    #[derive(Debug)]
    struct Doubled(TransformerEncoder);
    impl Module for Doubled {
        fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
            self.0.visit(name, see);
        }

        fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
            self.0.visit_mut(name, see);
        }
    }
    impl Encode for Doubled {
        fn encode(&self, source: &Array, mask: Option<&Array>, context: &Context) -> Result<Array> {
            self.0.forward(source, mask, context)?.multiply(2.0)
        }
    }
    let (keys, context) = (&mut Keys::new(5).unwrap(), Context::default());
    let model = Transformer::new(1, 1, &TransformerSpec::new(8, 2), keys).unwrap();
    let names =
        |module: &dyn Module| parameters(module).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let expected = names(&model);
    let (encoder, decoder) = (model.encoder.clone(), model.decoder.clone());
    let other = Transformer { encoder: Doubled(model.encoder), decoder: model.decoder };
    assert_eq!(names(&other), expected);
    let x = random::normal(&[2, 3, 8], Dtype::F32, &random::key(6).unwrap()).unwrap();
    let memory = encoder.forward(&x, None, &context).unwrap().multiply(2.0).unwrap();
    let expected = decoder.forward(&x, &memory, None, None, &context).unwrap().to_vec::<f32>().unwrap();
    let y = other.forward(&x, &x, None, None, None, &context).unwrap().to_vec::<f32>().unwrap();
    assert_eq!(y, expected);
}

struct Model {
    linear: Linear,
    embedding: Embedding,
}

module!(Model { linear, embedding });
