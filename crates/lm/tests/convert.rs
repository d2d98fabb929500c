//! Converted folders against those of `mlx_lm.convert`.

use std::path::Path;

use half::bf16;
use mica_array::{Array, Dtype, Precision};
use mica_lm::config::{QuantMode, QuantSpec};
use mica_lm::convert::{Recipe, convert};
use mica_lm::load::load;
use mica_lm::models::Input;
use mica_lm::weights::Packing;
use mica_nn::Context;
use mica_testkit::{Golden, fixture, max_abs_rel_to_max};
use serde_json::Value;

fn affine(bits: usize, group_size: usize) -> QuantSpec {
    QuantSpec::affine(bits, group_size).unwrap()
}

fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn quantized_folders_are_those_of_mlx_lm() {
    let (four, eight) = (affine(4, 32), affine(8, 32));
    let cases = [
        ("llama-4bit", "llama", four, Dtype::F32),
        ("llama-8bit", "llama", eight, Dtype::F32),
        ("llama-4bit-bf16", "llama", four, Dtype::BF16),
        ("llama-tied-4bit", "llama-tied", four, Dtype::BF16),
        ("qwen3-4bit", "qwen3", four, Dtype::F32),
        ("qwen3-8bit", "qwen3", eight, Dtype::F32),
        ("qwen3-mxfp4", "qwen3", QuantSpec::usual(QuantMode::Mxfp4), Dtype::BF16),
        ("qwen3-mxfp8", "qwen3", QuantSpec::usual(QuantMode::Mxfp8), Dtype::BF16),
        ("qwen3-nvfp4", "qwen3", QuantSpec::usual(QuantMode::Nvfp4), Dtype::BF16),
        ("lfm2-4bit", "lfm2", four, Dtype::F32),
        ("lfm2-8bit", "lfm2", eight, Dtype::F32),
    ];
    for (name, source, spec, dtype) in cases {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let recipe = Recipe { quantize: Some(spec), dtype: Some(dtype), ..Recipe::default() };
        let converted = convert(fixture(format!("models/{source}")), &target, &recipe).unwrap();
        let expected = Golden::load(fixture(format!("models/{name}/model.safetensors")));
        let got = Golden::load(target.join("model.safetensors"));
        let mut names = [expected.names().collect::<Vec<_>>(), got.names().collect()];
        names.iter_mut().for_each(|names| names.sort_unstable());
        assert_eq!(names[1], names[0], "{name}");
        for tensor in &names[0] {
            assert_eq!(got.shape(tensor), expected.shape(tensor), "{name}: {tensor}");
            assert_eq!(got.dtype(tensor), expected.dtype(tensor), "{name}: {tensor}");
            assert_eq!(got.bytes(tensor), expected.bytes(tensor), "{name}: {tensor}");
        }
        let quantized = names[0].iter().filter(|name| name.ends_with(".scales")).count();
        assert_eq!(converted.quantized, quantized, "{name}");
        let (config, theirs) =
            (json(target.join("config.json")), json(fixture(format!("models/{name}/config.json"))));
        for key in ["quantization", "quantization_config"] {
            assert_eq!(config[key], theirs[key], "{name}: {key}");
        }
        load(&target, Packing::Frozen).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

fn logits(folder: &Path) -> Vec<f32> {
    let tokens: Vec<u32> = (0..23).collect();
    let loaded = load(folder, Packing::Frozen).unwrap();
    let input = Input::new(&[&tokens], &[0]).unwrap();
    loaded.model.logits(&input, None, &Context::new(Precision::Exact)).unwrap().to_vec().unwrap()
}

#[test]
fn dequantized_models_compute_the_same() {
    for name in [
        "llama-4bit",
        "llama-mixed",
        "lfm2-8bit",
        "llama-tied-4bit",
        "llama-4bit-bf16",
        "qwen3-mxfp4",
        "qwen3-mxfp8",
        "qwen3-nvfp4",
    ] {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let source = fixture(format!("models/{name}"));
        let recipe = Recipe { dequantize: true, dtype: Some(Dtype::F32), ..Recipe::default() };
        let converted = convert(&source, &target, &recipe).unwrap();
        assert_eq!(converted.quantized, 0, "{name}");
        let config = json(target.join("config.json"));
        assert!(
            config.get("quantization").is_none() && config.get("quantization_config").is_none(),
            "{name}"
        );
        let error = max_abs_rel_to_max(&logits(&target), &logits(&source));
        assert!(error <= 1e-5, "{name}: {error:.1e}");
    }
}

#[test]
fn dtypes_are_cast() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("out");
    convert(fixture("models/qwen2"), &target, &Recipe { dtype: Some(Dtype::BF16), ..Recipe::default() })
        .unwrap();
    let loaded = load(&target, Packing::Quantized).unwrap();
    assert_eq!(loaded.dtype, Dtype::BF16);
    let source = load(fixture("models/qwen2"), Packing::Quantized).unwrap();
    let values = |loaded: &mica_lm::load::Loaded| mica_nn::parameters(loaded.model.as_module());
    for ((name, got), (_, source)) in values(&loaded).into_iter().zip(values(&source)) {
        let expected: Vec<bf16> = source.to_vec::<f32>().unwrap().into_iter().map(bf16::from_f32).collect();
        assert_eq!(got.to_vec::<bf16>().unwrap(), expected, "{name}");
    }
    let config = json(target.join("config.json"));
    assert!([&config["dtype"], &config["torch_dtype"]].contains(&&Value::from("bfloat16")), "{config}");
}

#[test]
fn new_weights_take_the_place_of_old_ones() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("out");
    let zero = |name: &str| {
        Ok((name == "model.layers.0.mlp.down_proj.weight").then(|| Array::zeros(&[96, 64], Dtype::F32)))
    };
    convert(fixture("models/llama-8bit"), &target, &Recipe { replace: Some(&zero), ..Recipe::default() })
        .unwrap();
    let (before, after) = (
        Golden::load(fixture("models/llama-8bit/model.safetensors")),
        Golden::load(target.join("model.safetensors")),
    );
    for name in before.names() {
        let same = before.bytes(name) == after.bytes(name);
        assert_eq!(same, !name.starts_with("model.layers.0.mlp.down_proj."), "{name}");
    }
    assert!(after.f32s("model.layers.0.mlp.down_proj.biases").iter().all(|&bias| bias == 0.0));
}

/// Scales that are codes stay what they are, whatever the other floats become; new weights are coded the same way.
#[test]
fn weights_of_small_floats_are_kept_and_replaced() {
    for name in ["qwen3-mxfp4", "qwen3-mxfp8", "qwen3-nvfp4"] {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let one = |tensor: &str| {
            Ok((tensor == "model.layers.0.self_attn.o_proj.weight")
                .then(|| Array::ones(&[96, 192], Dtype::F32)))
        };
        let source = Golden::load(fixture(format!("models/{name}/model.safetensors")));
        let shape = source.shape("model.layers.0.self_attn.o_proj.weight");
        let recipe = Recipe { replace: Some(&one), dtype: Some(Dtype::F32), ..Recipe::default() };
        convert(fixture(format!("models/{name}")), &target, &recipe).unwrap();
        let after = Golden::load(target.join("model.safetensors"));
        for tensor in source.names().filter(|tensor| after.dtype(tensor) != "F32") {
            let kept = source.bytes(tensor) == after.bytes(tensor);
            assert_eq!(kept, !tensor.starts_with("model.layers.0.self_attn.o_proj."), "{name}: {tensor}");
        }
        assert_eq!(after.shape("model.layers.0.self_attn.o_proj.weight"), shape);
        load(&target, Packing::Frozen).unwrap();
    }
}

/// A code or a scale that is NaN is damage: told by the tensor and the place, when a model is opened and when it is
/// converted.
#[test]
fn small_floats_that_are_no_numbers_are_refused() {
    for (name, part, code, place) in [
        ("qwen3-mxfp8", "weight", 0x7f, 5),
        ("qwen3-mxfp8", "weight", 0xff, 97),
        ("qwen3-mxfp8", "scales", 0xff, 3),
        ("qwen3-mxfp4", "scales", 0xff, 4),
        ("qwen3-nvfp4", "scales", 0x7f, 2),
    ] {
        let parent = tempfile::tempdir().unwrap();
        let broken = parent.path().join("broken");
        std::fs::create_dir(&broken).unwrap();
        std::fs::copy(fixture(format!("models/{name}/config.json")), broken.join("config.json")).unwrap();
        let mut bytes = std::fs::read(fixture(format!("models/{name}/model.safetensors"))).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let tensors: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
        let tensor = format!("model.layers.1.mlp.down_proj.{part}");
        let start = tensors[&tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        bytes[header + start + place] = code;
        std::fs::write(broken.join("model.safetensors"), bytes).unwrap();
        let opened = load(&broken, Packing::Frozen).err().unwrap().to_string();
        assert!(opened.contains(&tensor) && opened.contains(&format!("element {place}")), "{name}: {opened}");
        let recipe = Recipe { dequantize: true, ..Recipe::default() };
        let converted = convert(&broken, parent.path().join("out"), &recipe).unwrap_err().to_string();
        assert!(converted.contains(&tensor) && converted.contains("NaN"), "{name}: {converted}");
    }
}

#[test]
fn what_would_harm_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    std::fs::write(parent.path().join("precious"), "x").unwrap();
    let quantized = Recipe { quantize: Some(affine(4, 32)), ..Recipe::default() };
    let other = parent.path().join("new");
    let coarse = Recipe { quantize: Some(affine(4, 128)), ..Recipe::default() };
    let cases: [(&str, &str, &Path, Recipe, &str); 3] = [
        ("groups wider than all rows", "llama", &other, coarse, "rows of 64, 96 weights"),
        ("a folder with something in it", "llama", parent.path(), Recipe::default(), "not empty"),
        ("quantized twice", "llama-4bit", &other, quantized, "quantized already"),
    ];
    for (name, source, target, recipe, words) in cases {
        let error = convert(fixture(format!("models/{source}")), target, &recipe).unwrap_err().to_string();
        assert!(error.contains(words), "{name}: {error}");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1, "{name} leaves nothing behind");
    }
}
