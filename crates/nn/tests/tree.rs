//! The module tree: names, freezing, loading; and models that train.

use mica_array::quantized::{QuantMode, QuantSpec};
use mica_array::{Array, Dtype, Precision, random};
use mica_nn::losses::{Reduction, cross_entropy, mse_loss};
use mica_nn::optim::{Adam, AdamW, Optimizer, Sgd, Stepper};
use mica_nn::*;

#[derive(Debug)]
struct Net {
    embed: Embedding,
    blocks: Vec<Block>,
    head: Option<Linear>,
    scale: Parameter,
}

module!(Net { embed, blocks, head, scale });

#[derive(Debug)]
struct Block {
    norm: LayerNorm,
    proj: Linear,
}

module!(Block { norm, proj });

fn net() -> Net {
    let keys = &mut Keys::new(0).unwrap();
    let mut block = || Block {
        norm: LayerNorm::new(4, 1e-5, true, true).unwrap(),
        proj: Linear::new(4, 4, true, keys).unwrap(),
    };
    let blocks = vec![block(), block()];
    Net {
        embed: Embedding::new(5, 4, keys).unwrap(),
        blocks,
        head: Some(Linear::new(4, 3, false, keys).unwrap()),
        scale: Array::ones(&[4], Dtype::F32).into(),
    }
}

fn trained(net: &Net) -> Vec<String> {
    trainable_parameters(net).into_iter().map(|(name, _)| name).collect()
}

const ALL: [&str; 11] = [
    "embed.weight",
    "blocks.0.norm.weight",
    "blocks.0.norm.bias",
    "blocks.0.proj.weight",
    "blocks.0.proj.bias",
    "blocks.1.norm.weight",
    "blocks.1.norm.bias",
    "blocks.1.proj.weight",
    "blocks.1.proj.bias",
    "head.weight",
    "scale",
];

#[test]
fn parameters_and_modules_have_names() {
    let net = net();
    assert_eq!(trained(&net), ALL);
    assert_eq!(
        named_modules(&net),
        [
            ("", "Net"),
            ("embed", "Embedding"),
            ("blocks.0", "Block"),
            ("blocks.0.norm", "LayerNorm"),
            ("blocks.0.proj", "Linear"),
            ("blocks.1", "Block"),
            ("blocks.1.norm", "LayerNorm"),
            ("blocks.1.proj", "Linear"),
            ("head", "Linear"),
        ]
        .map(|(name, kind)| (name.to_string(), kind))
    );
    let names =
        |list: Vec<(String, &'static str)>| list.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(children(&net)), ["embed", "blocks.0", "blocks.1", "head"]);
    assert_eq!(
        names(leaf_modules(&net)),
        ["embed", "blocks.0.norm", "blocks.0.proj", "blocks.1.norm", "blocks.1.proj", "head"]
    );
    assert_eq!(names(leaf_modules(&net.embed)), [""]);
}

#[test]
fn freezing_by_name() {
    let all = Which::default();
    let keys = |keys| Which { keys, ..Which::default() };
    let here = |keys| Which { keys, recurse: false, strict: false };
    let cases: &[(&str, &[Which], &[&str])] = &[
        ("all", &[all], &[]),
        (
            "biases",
            &[keys(&["bias"])],
            &[
                "embed.weight",
                "blocks.0.norm.weight",
                "blocks.0.proj.weight",
                "blocks.1.norm.weight",
                "blocks.1.proj.weight",
                "head.weight",
                "scale",
            ],
        ),
        (
            "modules",
            &[keys(&["norm", "embed"])],
            &[
                "blocks.0.proj.weight",
                "blocks.0.proj.bias",
                "blocks.1.proj.weight",
                "blocks.1.proj.bias",
                "head.weight",
                "scale",
            ],
        ),
        (
            "a list item",
            &[keys(&["blocks.1"])],
            &[
                "embed.weight",
                "blocks.0.norm.weight",
                "blocks.0.norm.bias",
                "blocks.0.proj.weight",
                "blocks.0.proj.bias",
                "head.weight",
                "scale",
            ],
        ),
        ("own parameters", &[here(&[])], &ALL[..10]),
        ("own, by key", &[here(&["scale", "weight"])], &ALL[..10]),
        ("a part of a name", &[keys(&["wei", "eight"])], &ALL),
    ];
    for (name, steps, left) in cases {
        let mut net = net();
        for which in *steps {
            freeze(&mut net, *which).unwrap();
        }
        assert_eq!(trained(&net), *left, "{name}");
        unfreeze(&mut net, all).unwrap();
        assert_eq!(trained(&net), ALL, "{name}, unfrozen");
    }
    let mut net = net();
    freeze(&mut net, all).unwrap();
    unfreeze(&mut net.blocks[1], Which::default()).unwrap();
    assert_eq!(trained(&net), &ALL[5..9]);
    let strict = Which { keys: &["bias", "gamma"], recurse: true, strict: true };
    let error = unfreeze(&mut net, strict).unwrap_err().to_string();
    assert!(error.contains("nothing in the module is called gamma"), "{error}");
    assert_eq!(trained(&net), &ALL[5..9], "a failing call changes nothing");
    let shallow = Which { keys: &["bias"], recurse: false, strict: true };
    assert!(freeze(&mut net, shallow).is_err(), "bias is in modules below");
}

#[test]
fn state_is_never_trained() {
    let mut norm = BatchNorm::new(3, 1e-5, 0.1, true, true).unwrap();
    unfreeze(&mut norm, Which { keys: &["running_mean"], ..Which::default() }).unwrap();
    let names: Vec<String> = trainable_parameters(&norm).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["weight", "bias"]);
    assert_eq!(parameters(&norm).len(), 4);
}

#[test]
fn loading_is_strict_or_not() {
    let saved = parameters(&net());
    let mut other = net();
    apply(&mut other, |_, parameter| parameter.multiply(0.0)).unwrap();
    load_parameters(&mut other, &saved, true).unwrap();
    let values = |net: &Net| net.embed.weight.to_vec::<f32>().unwrap();
    assert_eq!(values(&other), values(&net()));
    let mut more = saved.clone();
    more.push(("head.bias".into(), Array::zeros(&[3], Dtype::F32)));
    let wrong = vec![("scale".to_string(), Array::ones(&[5], Dtype::F32))];
    for (name, arrays, strict, part) in [
        ("unknown", &more, true, Some("there is no parameter head.bias")),
        ("unknown, passed over", &more, false, None),
        ("missing", &saved[1..].to_vec(), true, Some("nothing is given for embed.weight")),
        ("missing, passed over", &saved[1..].to_vec(), false, None),
        ("shape", &wrong, false, Some("scale has the shape [4], got [5]")),
    ] {
        let result = load_parameters(&mut other, arrays, strict);
        match part {
            None => result.unwrap_or_else(|error| panic!("{name}: {error}")),
            Some(part) => {
                let error = result.expect_err(name).to_string();
                assert!(error.contains(part), "{name}: {error}");
            }
        }
    }
}

#[test]
fn dtypes_of_floats_change() {
    let mut net = net();
    set_dtype(&mut net, Dtype::BF16, Dtype::is_float).unwrap();
    assert!(parameters(&net).iter().all(|(_, array)| array.dtype() == Dtype::BF16));
    let x = Array::from_slice(&[0i32, 4], &[2]).unwrap();
    assert_eq!(net.embed.forward(&x, &Context::default()).unwrap().dtype(), Dtype::BF16);
    // As in MLX, a product of two float types is one of the wider.
    let y = net.head.as_ref().unwrap().forward(&Array::ones(&[1, 4], Dtype::F32), &Context::default());
    assert_eq!(y.unwrap().dtype(), Dtype::F32);
}

#[test]
fn quantization_is_chosen_by_name_and_module() {
    let wide = || {
        let keys = &mut Keys::new(0).unwrap();
        Sequential::new(vec![
            Box::new(Linear::new(64, 64, true, keys).unwrap()),
            Box::new(Relu),
            Box::new(Linear::new(64, 32, true, keys).unwrap()),
        ])
    };
    let mut model = wide();
    let mut asked = Vec::new();
    quantize(&mut model, |name, module| {
        asked.push(format!("{name} {}", module.kind()));
        (name == "layers.2").then(QuantSpec::default)
    })
    .unwrap();
    assert_eq!(asked, ["layers.0 Linear", "layers.2 Linear"]);
    let packed: Vec<String> = parameters(&model)
        .into_iter()
        .filter(|(_, array)| array.packed().is_some())
        .map(|(name, _)| name)
        .collect();
    assert_eq!(packed, ["layers.2.weight"]);
    let error = quantize(&mut wide(), |_, _| Some(QuantSpec::affine(4, 128).unwrap())).unwrap_err();
    assert!(error.to_string().contains("group size 128"), "{error}");
    let mut relu = Relu;
    assert!(relu.quantize(QuantSpec::default()).unwrap_err().to_string().contains("type Relu"));
}

#[derive(Debug)]
struct Mixed {
    body: Sequential,
    head: Box<dyn Layer>,
    fixed: Linear,
}

module!(Mixed { body, head, fixed });

fn mixed() -> Mixed {
    let keys = &mut Keys::new(0).unwrap();
    Mixed {
        body: Sequential::new(vec![
            Box::new(Embedding::new(5, 64, keys).unwrap()),
            Box::new(Relu),
            Box::new(Linear::new(64, 64, false, keys).unwrap()),
        ]),
        head: Box::new(Linear::new(64, 32, true, keys).unwrap()),
        fixed: Linear::new(64, 2, true, keys).unwrap(),
    }
}

fn kinds(module: &dyn Module) -> Vec<&'static str> {
    named_modules(module).into_iter().map(|(_, kind)| kind).collect()
}

#[test]
fn boxed_layers_are_replaced_by_name() {
    let keys = &mut Keys::new(1).unwrap();
    let mut linear = |out| -> Box<dyn Layer> { Box::new(Linear::new(64, out, true, keys).unwrap()) };
    let mut model = mixed();
    let new: Vec<(String, Box<dyn Layer>)> =
        vec![("head".into(), linear(7)), ("body.layers.1".into(), Box::new(Tanh))];
    update_modules(&mut model, new, true).unwrap();
    assert_eq!(kinds(&model), ["Mixed", "Sequential", "Embedding", "Tanh", "Linear", "Linear", "Linear"]);
    assert!(parameters(&model).iter().any(|(name, array)| name == "head.weight" && array.dim(0) == 7));
    for (name, part) in [
        ("fixed", "there is no boxed layer \"fixed\", those there are: body.layers.0, body.layers.1"),
        ("nothing", "there is no boxed layer"),
    ] {
        let update = vec![("head".to_string(), linear(9)), (name.to_string(), linear(9))];
        let error = update_modules(&mut model, update, true).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(parameters(&model).iter().all(|(_, array)| array.dim(0) != 9), "nothing is replaced then");
    }
    update_modules(&mut model, vec![("nothing".into(), linear(9)), ("head".into(), linear(9))], false)
        .unwrap();
    assert!(parameters(&model).iter().any(|(name, array)| name == "head.weight" && array.dim(0) == 9));
    let twice = vec![("head".to_string(), linear(3)), ("head".to_string(), linear(3))];
    assert!(update_modules(&mut model, twice, true).unwrap_err().to_string().contains("given twice"));
}

#[test]
fn boxed_layers_are_quantized_in_any_mode() {
    let how =
        |mode, quantize_input| Some(LayerQuantization { format: QuantSpec::usual(mode), quantize_input });
    let mut model = mixed();
    let mut asked = Vec::new();
    quantize_layers(&mut model, |name, layer| {
        asked.push(format!("{name} {}", layer.kind()));
        how(QuantMode::Nvfp4, name == "body.layers.2")
    })
    .unwrap();
    assert_eq!(asked, ["body.layers.0 Embedding", "body.layers.2 Linear", "head Linear"]);
    let expected =
        ["Mixed", "Sequential", "QuantizedEmbedding", "Relu", "QQLinear", "QuantizedLinear", "Linear"];
    assert_eq!(kinds(&model), expected);
    let x = Array::from_slice(&[1i32, 4], &[2]).unwrap();
    let hidden = model.body.forward(&x, &Context::default()).unwrap();
    assert_eq!(model.head.forward(&hidden, &Context::default()).unwrap().shape(), [2, 32]);
    // What is quantized is not asked for again.
    quantize_layers(&mut model, |name, _| panic!("{name}")).unwrap();
    for (mode, input, part) in [
        (QuantMode::Nvfp4, true, "inputs are indices"),
        (QuantMode::Affine, true, "inputs are indices"),
        (QuantMode::Mxfp4, false, ""),
    ] {
        let result = quantize_layers(&mut mixed(), |_, _| how(mode, input));
        match part {
            "" => result.unwrap(),
            part => assert!(result.unwrap_err().to_string().contains(part)),
        }
    }
    let error = Relu.to_quantized(how(QuantMode::Affine, false).unwrap()).unwrap_err().to_string();
    assert!(error.contains("type Relu has no quantized form"), "{error}");
}

#[test]
fn a_walk_tells_modules_from_parameters_and_what_learns() {
    let mut net = net();
    freeze(&mut net.embed, Which::default()).unwrap();
    let (mut modules, mut all, mut trained) = (Vec::new(), Vec::new(), Vec::new());
    net.visit("", &mut |name, item| match item {
        Item::Module(module) => modules.push((name.to_string(), module.kind())),
        Item::Parameter(parameter) => {
            all.push(name.to_string());
            if parameter.role() == Role::Trained {
                trained.push(name.to_string());
            }
        }
    });
    assert_eq!(modules, named_modules(&net));
    let names = |list: Vec<(String, Array)>| list.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(all, names(parameters(&net)));
    assert_eq!(trained, names(trainable_parameters(&net)));
    assert_eq!(trained.len() + 1, all.len());
    let mut seen = Vec::new();
    apply_to_modules(&mut net, |name, module| {
        seen.push((name.to_string(), module.kind()));
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, modules, "each before what is in it");
    let error = apply_to_modules(&mut net, |name, module| match name {
        "blocks.0" => module.quantize(QuantSpec::default()),
        "blocks.1" => panic!("it goes on after an error"),
        _ => Ok(()),
    });
    assert!(error.unwrap_err().to_string().contains("type Block"));
}

#[test]
fn frozen_parameters_get_no_gradient() {
    let mut net = net();
    freeze(&mut net, Which { keys: &["blocks", "embed"], ..Which::default() }).unwrap();
    let x = Array::from_slice(&[1i32, 2], &[2]).unwrap();
    let (_, grads) = value_and_grad(&mut net, |net| {
        let context = Context::default();
        let mut x = net.embed.forward(&x, &context)?;
        for block in &net.blocks {
            x = x.add(block.proj.forward(&block.norm.forward(&x, &context)?, &context)?)?;
        }
        let y = x.multiply(&net.scale)?;
        net.head.as_ref().expect("it has one").forward(&y, &context)?.square()?.mean(&[], false)
    })
    .unwrap();
    assert_eq!(grads.into_iter().map(|(name, _)| name).collect::<Vec<_>>(), ["head.weight", "scale"]);
}

#[test]
fn a_line_is_found_again() {
    let x = random::normal(&[128, 3], Dtype::F32, &random::key(1).unwrap()).unwrap();
    let truth = Array::from_slice(&[2.0f32, -1.0, 0.5], &[3, 1]).unwrap();
    let y = x.matmul(&truth).unwrap().add(0.25).unwrap();
    let mut model = Linear::new(3, 1, true, &mut Keys::new(0).unwrap()).unwrap();
    let mut optimizer = Stepper::new(0.1, Sgd { momentum: 0.9, ..Sgd::default() }).unwrap();
    for _ in 0..300 {
        let (_, grads) = value_and_grad(&mut model, |model| {
            mse_loss(&model.forward(&x, &Context::default())?, &y, Reduction::Mean)
        })
        .unwrap();
        optimizer.update(&mut model, &grads).unwrap();
        optimizer.eval(&model).unwrap();
    }
    let weight = model.weight.to_vec::<f32>().unwrap();
    mica_testkit::assert_close("weight", &weight, &[2.0, -1.0, 0.5], 0.0, 1e-3);
    let bias = model.bias.as_ref().unwrap().to_vec::<f32>().unwrap();
    mica_testkit::assert_close("bias", &bias, &[0.25], 0.0, 1e-3);
}

/// Two rings, one around the other: no line divides them.
fn rings() -> (Array, Array) {
    let (mut points, mut classes) = (Vec::new(), Vec::new());
    for i in 0..200 {
        let (angle, class) = (i as f32 * 0.37, i % 2);
        let radius = 1.0 + class as f32;
        points.extend([radius * angle.cos(), radius * angle.sin()]);
        classes.push(class);
    }
    (Array::from_slice(&points, &[200, 2]).unwrap(), Array::from_slice(&classes, &[200]).unwrap())
}

#[test]
fn a_network_with_dropout_and_batch_norm_learns_what_no_line_divides() {
    let (x, classes) = rings();
    let keys = &mut Keys::new(7).unwrap();
    let mut model = Sequential::new(vec![
        Box::new(Linear::new(2, 32, true, keys).unwrap()),
        Box::new(BatchNorm::new(32, 1e-5, 0.1, true, true).unwrap()),
        Box::new(Relu),
        Box::new(Dropout::new(0.1).unwrap()),
        Box::new(Linear::new(32, 2, true, keys).unwrap()),
    ]);
    let mut optimizer = Stepper::new(0.01, AdamW::default()).unwrap();
    let mut losses = Vec::new();
    for _ in 0..200 {
        let context = Context::training(Precision::Exact, keys.draw().unwrap());
        let (loss, grads) = value_and_grad(&mut model, |model| {
            cross_entropy(&model.forward(&x, &context)?, &classes, None, -1, 0.0, Reduction::Mean)
        })
        .unwrap();
        optimizer.update(&mut model, &grads).unwrap();
        optimizer.eval(&model).unwrap();
        losses.push(loss.item::<f32>().unwrap());
    }
    assert!(losses[0] > 0.5 && losses[199] < 0.2, "{} to {}", losses[0], losses[199]);
    let found = model.forward(&x, &Context::default()).unwrap().argmax(-1, false).unwrap();
    let right = found.astype(Dtype::I32).unwrap().equal(&classes).unwrap().astype(Dtype::F32).unwrap();
    let accuracy = right.mean(&[], false).unwrap().item::<f32>().unwrap();
    assert!(accuracy > 0.97, "{accuracy}");
}

#[test]
fn training_goes_on_from_saved_arrays() {
    let (x, classes) = rings();
    let new = || {
        let keys = &mut Keys::new(7).unwrap();
        let model = Sequential::new(vec![
            Box::new(Linear::new(2, 8, true, keys).unwrap()),
            Box::new(Tanh),
            Box::new(Linear::new(8, 2, true, keys).unwrap()),
        ]);
        (model, Stepper::new(0.05, Adam { bias_correction: true, ..Adam::default() }).unwrap())
    };
    let step = |model: &mut Sequential, optimizer: &mut Stepper<Adam>| {
        let (loss, grads) = value_and_grad(model, |model| {
            let logits = model.forward(&x, &Context::default())?;
            cross_entropy(&logits, &classes, None, -1, 0.0, Reduction::Mean)
        })
        .unwrap();
        optimizer.update(model, &grads).unwrap();
        optimizer.eval(model).unwrap();
        loss.item::<f32>().unwrap()
    };
    let (mut model, mut optimizer) = new();
    for _ in 0..3 {
        step(&mut model, &mut optimizer);
    }
    let (saved, state) = (parameters(&model), optimizer.state().unwrap());
    let expected: Vec<f32> = (0..3).map(|_| step(&mut model, &mut optimizer)).collect();
    let (mut model, mut optimizer) = new();
    load_parameters(&mut model, &saved, true).unwrap();
    optimizer.restore(&state).unwrap();
    let again: Vec<f32> = (0..3).map(|_| step(&mut model, &mut optimizer)).collect();
    assert_eq!(again, expected);
}
