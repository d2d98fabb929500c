//! Adapters that mlx-lm and peft wrote: their logits, and ours after writing them ourselves.

use mica_array::Precision;
use mica_lm::load::Loaded;
use mica_lm::models::Input;
use mica_lm::weights::Packing;
use mica_nn::Context;
use mica_testkit::{Golden, fixture, max_abs_rel_to_max};
use mica_tune::adapters::attach::{attach, trainable};
use mica_tune::adapters::config::AdapterSettings;
use mica_tune::adapters::files::{load, load_tensors, save};
use mica_tune::adapters::names::Form;
use mica_tune::config::{AdapterConfig, FineTune};

fn logits(loaded: &Loaded, tokens: &[u32]) -> Vec<f32> {
    let input = Input::new(&[tokens], &[0]).unwrap();
    let context = Context::new(Precision::Exact);
    loaded.model.logits(&input, None, &context).unwrap().to_vec().unwrap()
}

const CASES: [(&str, &str, FineTune); 5] = [
    ("mlx-lm", "llama", FineTune::Lora),
    ("mlx-lm-dora", "qwen3", FineTune::Dora),
    ("mlx-lm-lfm2", "lfm2", FineTune::Lora),
    ("peft", "llama", FineTune::Lora),
    ("peft-dora", "qwen3", FineTune::Dora),
];

#[test]
fn logits_are_those_of_the_programs_that_wrote_them() {
    for (name, model, fine_tune) in CASES {
        let golden = Golden::load(fixture(format!("adapters/{name}/golden.safetensors")));
        let tokens = golden.u32s("tokens");
        for (suffix, key) in [("", "logits"), ("-4bit", "logits_4bit")] {
            if !golden.contains(key) {
                continue;
            }
            let mut loaded = crate::model(&format!("{model}{suffix}"), Packing::Frozen);
            let opened = load(&mut *loaded.model, fixture(format!("adapters/{name}"))).unwrap();
            assert_eq!(opened.settings.fine_tune, fine_tune, "{name}");
            let expected = golden.f32s(key);
            let error = max_abs_rel_to_max(&logits(&loaded, &tokens), &expected);
            assert!(error <= 1e-4, "{name}{suffix}: largest error {error:.1e} of the largest logit");
        }
    }
}

#[test]
fn an_adapter_survives_both_formats() {
    for (name, model, fine_tune) in CASES {
        let tokens: Vec<u32> = (0..23).collect();
        let mut loaded = crate::model(model, Packing::Frozen);
        let opened = load(&mut *loaded.model, fixture(format!("adapters/{name}"))).unwrap();
        let expected = logits(&loaded, &tokens);
        let adapter = opened.settings.adapter.clone().unwrap();
        let names = trainable(&*loaded.model, fine_tune, None).unwrap();
        let mut sorted = opened.names.clone();
        sorted.sort();
        assert_eq!(sorted.len(), names.len(), "{name}");
        let mlx = serde_json::json!({
            "fine_tune_type": fine_tune, "num_layers": -1,
            "lora_parameters": {"rank": adapter.rank, "scale": adapter.scale, "dropout": 0.0},
        });
        let peft = AdapterSettings::to_peft(&opened.settings, model, &["q_proj".to_string()]).unwrap();
        for (form, settings) in [(Form::Mlx, mlx.to_string()), (Form::Peft, peft)] {
            let folder = tempfile::tempdir().unwrap();
            save(&*loaded.model, &names, form, &settings, folder.path()).unwrap();
            let mut again = crate::model(model, Packing::Frozen);
            let opened = load(&mut *again.model, folder.path()).unwrap();
            assert_eq!((opened.settings.fine_tune, opened.settings.form), (fine_tune, form), "{name}");
            assert_eq!(logits(&again, &tokens), expected, "{name} through {form:?}");
        }
    }
}

#[test]
fn a_new_adapter_changes_nothing_and_is_that_of_its_seed() {
    let tokens: Vec<u32> = (0..23).collect();
    for (model, dora) in [("llama", false), ("lfm2", true), ("qwen3-4bit", false), ("qwen3-4bit", true)] {
        let before = logits(&crate::model(model, Packing::Frozen), &tokens);
        let config = AdapterConfig { rank: 3, scale: 20.0, dropout: 0.0, keys: None, layers: None };
        let start = |seed| {
            let mut loaded = crate::model(model, Packing::Frozen);
            attach(&mut *loaded.model, &config, dora, seed).unwrap();
            let error = max_abs_rel_to_max(&logits(&loaded, &tokens), &before);
            assert!(error <= if dora { 1e-5 } else { 0.0 }, "{model}: {error:.1e}");
            let names = trainable(&*loaded.model, FineTune::Lora, None).unwrap();
            let values = mica_nn::parameters(loaded.model.as_module());
            let values = values.into_iter().filter(|(name, _)| names.contains(name));
            values.flat_map(|(_, array)| array.to_vec::<f32>().unwrap()).collect::<Vec<f32>>()
        };
        let one = start(1);
        assert_eq!(one, start(1), "{model}");
        assert_ne!(one, start(2), "{model}");
    }
}

#[test]
fn keys_and_layers_choose() {
    let keys = |list: &[&str]| Some(list.iter().map(|key| key.to_string()).collect());
    let config = |keys, layers| AdapterConfig { rank: 2, scale: 1.0, dropout: 0.0, keys, layers };
    let cases: [(&str, &str, AdapterConfig, usize, &[&str]); 5] = [
        ("all", "llama", config(None, None), 7 * 2, &["self_attn.q_proj", "mlp.down_proj"]),
        ("suffix", "llama", config(keys(&["q_proj", "v_proj"]), None), 2 * 2, &["self_attn.v_proj"]),
        ("full path, last block", "llama", config(keys(&["mlp.up_proj"]), Some(1)), 1, &["mlp.up_proj"]),
        ("more than there are", "llama", config(keys(&["o_proj"]), Some(99)), 2, &["self_attn.o_proj"]),
        (
            "a key given twice",
            "llama",
            config(keys(&["o_proj", "self_attn.o_proj"]), None),
            2,
            &["self_attn.o_proj"],
        ),
    ];
    for (name, model, config, count, among) in cases {
        let mut loaded = crate::model(model, Packing::Frozen);
        let attached = attach(&mut *loaded.model, &config, false, 0).unwrap();
        assert_eq!(attached.modules.len(), count, "{name}: {attached:?}");
        assert!(among.iter().all(|key| attached.keys.iter().any(|k| k == key)), "{name}: {attached:?}");
        assert_eq!(attached.note.is_some(), name == "more than there are", "{name}");
    }
    for (name, key) in [("typo", "q_prj"), ("part of a name", "proj"), ("head", "lm_head")] {
        let mut loaded = crate::model("llama", Packing::Frozen);
        let error =
            attach(&mut *loaded.model, &config(keys(&[key]), None), false, 0).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("q_proj"), "{name}: {error}");
    }
    let mut loaded = crate::model("llama", Packing::Frozen);
    assert!(attach(&mut *loaded.model, &config(None, Some(0)), false, 0).is_err());
}

#[test]
fn what_is_trained_in_full_fine_tuning() {
    let loaded = crate::model("llama", Packing::Quantized);
    let all = trainable(&*loaded.model, FineTune::Full, None).unwrap();
    assert!(
        all.iter().any(|name| name == "model.embed_tokens.weight")
            && all.iter().any(|name| name == "lm_head.weight")
    );
    let last = trainable(&*loaded.model, FineTune::Full, Some(1)).unwrap();
    assert!(last.len() == 9 && last.iter().all(|name| name.starts_with("model.layers.1.")), "{last:?}");
    let error =
        trainable(&*crate::model("llama-4bit", Packing::Quantized).model, FineTune::Full, None).unwrap_err();
    assert!(error.to_string().contains("quantized"), "{error}");
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let cases: [(&str, &str, &str); 3] = [
        ("another model", "mlx-lm-lfm2", "no linear layer"),
        ("another width", "mlx-lm-dora", "do not fit"),
        ("patterns", "peft-patterns", "pattern"),
    ];
    for (name, adapter, words) in cases {
        let mut loaded = crate::model("llama", Packing::Frozen);
        let error = load(&mut *loaded.model, fixture(format!("adapters/{adapter}"))).unwrap_err().to_string();
        assert!(error.contains(words), "{name}: {error}");
    }
    let mut loaded = crate::model("mistral", Packing::Frozen);
    let error = load(&mut *loaded.model, fixture("adapters/peft-embed")).unwrap_err().to_string();
    assert!(error.contains("adapter that can be read") || error.contains("cannot be read"), "{error}");
    let mut loaded = crate::model("llama", Packing::Frozen);
    let empty = tempfile::tempdir().unwrap();
    assert!(load(&mut *loaded.model, empty.path()).unwrap_err().to_string().contains("adapter_config.json"));
    // An adapter of one rank does not go on as one of another.
    let config = AdapterConfig { rank: 3, scale: 1.0, dropout: 0.0, keys: None, layers: None };
    attach(&mut *loaded.model, &config, false, 0).unwrap();
    let error =
        load_tensors(&mut *loaded.model, fixture("adapters/mlx-lm/adapters.safetensors")).unwrap_err();
    assert!(error.to_string().contains("shape"), "{error}");
}
