//! Fused models compute what the adapter on its base computes.

use mica_array::quantized::{QuantSpec, quantize};
use mica_array::{Array, Precision};
use mica_lm::load::{Loaded, load};
use mica_lm::models::Input;
use mica_lm::weights::Packing;
use mica_nn::{Context, parameters};
use mica_testkit::{Golden, fixture, max_abs_rel_to_max};
use mica_tune::adapters::attach::trainable;
use mica_tune::adapters::files;
use mica_tune::adapters::names::Form;
use mica_tune::config::FineTune;
use mica_tune::fuse::fuse;

fn logits(loaded: &Loaded, tokens: &[u32]) -> Vec<f32> {
    let input = Input::new(&[tokens], &[0]).unwrap();
    loaded.model.logits(&input, None, &Context::new(Precision::Exact)).unwrap().to_vec().unwrap()
}

#[test]
fn merged_weights_give_the_adapters_logits() {
    // (adapter, model, dequantize, which golden)
    let cases = [
        ("mlx-lm", "llama", false, "logits"),
        ("mlx-lm-dora", "qwen3", false, "logits"),
        ("mlx-lm-lfm2", "lfm2", false, "logits"),
        ("peft", "llama", false, "logits"),
        ("peft-dora", "qwen3", false, "logits"),
        ("mlx-lm", "llama-4bit", true, "logits_4bit"),
        ("mlx-lm-lfm2", "lfm2-4bit", true, "logits_4bit"),
    ];
    for (adapter, model, dequantize, key) in cases {
        let golden = Golden::load(fixture(format!("adapters/{adapter}/golden.safetensors")));
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("fused");
        let base = fixture(format!("models/{model}"));
        fuse(&base, fixture(format!("adapters/{adapter}")), &target, dequantize, None).unwrap();
        let fused = load(&target, Packing::Frozen).unwrap();
        assert!(!fused.config.quantization.is_quantized(), "{adapter} on {model}");
        let error = max_abs_rel_to_max(&logits(&fused, &golden.u32s("tokens")), &golden.f32s(key));
        assert!(error <= 1e-4, "{adapter} on {model}: largest error {error:.1e} of the largest logit");
        assert_eq!(base.join("tokenizer.json").exists(), target.join("tokenizer.json").exists());
    }
}

#[test]
fn a_quantized_base_is_quantized_again_where_it_changed() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("fused");
    let (base, adapter) = (fixture("models/llama-4bit"), fixture("adapters/mlx-lm"));
    fuse(&base, &adapter, &target, false, None).unwrap();
    let mut loaded = load(&base, Packing::Frozen).unwrap();
    files::load(&mut *loaded.model, &adapter).unwrap();
    let (before, after) =
        (Golden::load(base.join("model.safetensors")), Golden::load(target.join("model.safetensors")));
    let mut expected = std::collections::HashMap::new();
    for layer in 0..loaded.model.layers() {
        for (path, linear) in loaded.model.linears(layer) {
            if linear.adapter.is_some() {
                let made =
                    quantize(&linear.merged().unwrap(), QuantSpec::affine(4, 32).unwrap(), None).unwrap();
                for (field, array) in
                    [("weight", made.words), ("scales", made.scales), ("biases", made.biases.unwrap())]
                {
                    let bytes = array.with_bytes(|bytes: &[u8]| bytes.to_vec()).unwrap();
                    expected.insert(format!("model.layers.{layer}.{path}.{field}"), bytes);
                }
            }
        }
    }
    assert_eq!(expected.len(), 9);
    let names: Vec<&str> = before.names().collect();
    assert_eq!(after.names().count(), names.len());
    for name in names {
        match expected.get(name) {
            Some(bytes) => assert_eq!(after.bytes(name), bytes, "{name}"),
            None => assert_eq!(after.bytes(name), before.bytes(name), "{name}"),
        }
    }
    assert!(load(&target, Packing::Frozen).unwrap().config.quantization.is_quantized());
}

#[test]
fn fully_trained_weights_become_a_model() {
    for model in ["lfm2", "llama-tied-bf16"] {
        let mut loaded = crate::model(model, Packing::Quantized);
        let names = trainable(&*loaded.model, FineTune::Full, None).unwrap();
        let moved: Vec<(String, Array)> = parameters(loaded.model.as_module())
            .into_iter()
            .map(|(name, array)| {
                let dtype = array.dtype();
                (name, array.multiply(1.5f32).unwrap().astype(dtype).unwrap())
            })
            .collect();
        mica_nn::set_parameters(loaded.model.as_module_mut(), &moved).unwrap();
        let parent = tempfile::tempdir().unwrap();
        let settings = "{\"fine_tune_type\": \"full\"}";
        files::save(&*loaded.model, &names, Form::Mlx, settings, parent.path().join("adapter")).unwrap();
        let target = parent.path().join("fused");
        fuse(fixture(format!("models/{model}")), parent.path().join("adapter"), &target, false, None)
            .unwrap();
        let tokens: Vec<u32> = (0..20).collect();
        let fused = load(&target, Packing::Quantized).unwrap();
        assert_eq!(logits(&fused, &tokens), logits(&loaded, &tokens), "{model}");
        assert_eq!(fused.dtype, load(fixture(format!("models/{model}")), Packing::Quantized).unwrap().dtype);
    }
}
