//! Frequencies against `transformers` (fixtures/rope, made by fixtures/make/make_rope.py), and the dialects.

use super::*;
use crate::ErrorKind;
use serde_json::json;
use std::path::Path;

fn read(value: &Value, layer_type: Option<&str>) -> Result<RopeConfig> {
    RopeConfig::read(&Fields::new(Path::new("config.json"), value.as_object().unwrap()), 10_000.0, layer_type)
}

#[test]
fn frequencies_equal_transformers() {
    let text = std::fs::read_to_string(mica_testkit::fixture("rope/rope.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let cases = golden["cases"].as_object().unwrap();
    assert!(cases.len() >= 14);
    for (name, case) in cases {
        let rope = read(&case["config"], None).unwrap();
        let head_dim = case["config"]["head_dim"].as_u64().unwrap() as usize;
        let got = rope.frequencies(head_dim, case["seq_len"].as_u64().unwrap() as usize).unwrap();
        let expected: Vec<f32> =
            case["inv_freq"].as_array().unwrap().iter().map(|f| f.as_f64().unwrap() as f32).collect();
        assert_eq!(got.inv_freq.len(), expected.len(), "{name}");
        for (i, (got, expected)) in got.inv_freq.iter().zip(&expected).enumerate() {
            // torch's power may be off by a unit in the last place, and the steps after it keep that error.
            assert!((got - expected).abs() <= 4e-7 * expected.abs(), "{name}[{i}]: {got} {expected}");
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert!((f64::from(got.attention_factor) - factor).abs() < 1e-6, "{name}: attention factor");
    }
}

#[test]
fn settings_per_layer_type() {
    let config = json!({"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "chunked_attention": null}});
    let full = read(&config, Some("full_attention")).unwrap();
    assert_eq!((full.theta, full.kind), (1e6, RopeKind::Linear { factor: 8.0 }));
    assert_eq!(read(&config, Some("sliding_attention")).unwrap(), RopeConfig::new(10_000.0));
    for missing in [None, Some("chunked_attention"), Some("other")] {
        let error = read(&config, missing).unwrap_err();
        assert!(error.to_string().contains("full_attention, sliding_attention"), "{error}");
    }
    let one_for_all = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}});
    assert_eq!(read(&one_for_all, Some("full_attention")).unwrap(), RopeConfig::new(5.0));
}

#[test]
fn dialects_and_defaults() {
    for (name, config, expected) in [
        ("nothing", json!({}), RopeConfig::new(10_000.0)),
        ("theta alone", json!({"rope_theta": 5e5, "rope_scaling": null}), RopeConfig::new(5e5)),
        (
            "inner theta wins",
            json!({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 7.0}}),
            RopeConfig::new(7.0),
        ),
        (
            "older name of the kind",
            json!({"rope_scaling": {"type": "linear", "factor": 2}}),
            RopeConfig { kind: RopeKind::Linear { factor: 2.0 }, ..RopeConfig::new(10_000.0) },
        ),
        (
            "sections of images",
            json!({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}),
            RopeConfig::new(10_000.0),
        ),
        (
            "partial",
            json!({"partial_rotary_factor": 0.5}),
            RopeConfig { partial: 0.5, ..RopeConfig::new(10_000.0) },
        ),
    ] {
        assert_eq!(read(&config, None).unwrap(), expected, "{name}");
    }
}

#[test]
fn families_of_whole_heads_ignore_or_refuse_a_part() {
    let fields = |value: &Value, check: &dyn Fn(Result<RopeConfig>)| {
        let fields = Fields::new(Path::new("config.json"), value.as_object().unwrap());
        check(RopeConfig::read(&fields, 10_000.0, None).unwrap().of_whole_heads(&fields));
    };
    fields(&json!({"partial_rotary_factor": 0.5}), &|rope| {
        assert_eq!(rope.unwrap(), RopeConfig::new(10_000.0));
    });
    let scaled = json!({"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}});
    fields(&scaled, &|rope| {
        let error = rope.unwrap_err().to_string();
        assert!(error.contains("partial_rotary_factor") && error.contains("whole heads"), "{error}");
    });
    let proportional = json!({"rope_scaling": {"type": "proportional", "partial_rotary_factor": 0.5}});
    fields(&proportional, &|rope| assert_eq!(rope.unwrap().partial, 0.5));
}

#[test]
fn scaling_reaches_as_far_as_it_is_made_for() {
    let factors = json!([1.0, 1.0, 1.0, 1.0]);
    for (name, scaling, reach, bounded) in [
        ("none", Value::Null, 256, false),
        (
            "yarn as Qwen publishes it",
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
            1024,
            false,
        ),
        ("yarn without a context", json!({"type": "yarn", "factor": 2.0}), 512, false),
        (
            "yarn, stated already",
            json!({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}),
            256,
            false,
        ),
        ("linear", json!({"type": "linear", "factor": 4.0}), 1024, false),
        ("linear that shrinks", json!({"type": "linear", "factor": 0.5}), 256, false),
        ("huge", json!({"type": "linear", "factor": 1e300}), i32::MAX as usize, false),
        (
            "llama3, stated",
            json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}),
            256,
            false,
        ),
        (
            "llama3, not stated",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
            2048,
            false,
        ),
        ("dynamic", json!({"type": "dynamic", "factor": 4.0}), 256, true),
        (
            "longrope",
            json!({"type": "longrope", "short_factor": factors, "long_factor": factors,
                "original_max_position_embeddings": 32}),
            32,
            true,
        ),
    ] {
        let rope = read(&json!({"max_position_embeddings": 256, "rope_scaling": scaling}), None).unwrap();
        let (got, note) = rope.reach(256);
        assert_eq!((got, note.is_some()), (reach, bounded), "{name}");
    }
}

#[test]
fn impossible_settings_name_the_field() {
    for (name, config, words) in [
        ("kind", json!({"rope_scaling": {"type": "ntk"}}), "`rope_scaling.rope_type`"),
        ("factor missing", json!({"rope_scaling": {"type": "linear"}}), "`rope_scaling.factor`"),
        ("factor zero", json!({"rope_scaling": {"type": "linear", "factor": 0}}), "above 0"),
        ("theta", json!({"rope_theta": -1}), "`rope_theta`"),
        ("partial", json!({"partial_rotary_factor": 2}), "`partial_rotary_factor`"),
        ("type", json!({"rope_scaling": "linear"}), "`rope_scaling`: expected an object"),
        ("context", json!({"rope_scaling": {"type": "yarn", "factor": 4}}), "max_position_embeddings"),
        (
            "passage",
            json!({"max_position_embeddings": 8, "rope_scaling": {"rope_type": "llama3", "factor": 8,
                "low_freq_factor": 4, "high_freq_factor": 4}}),
            "high_freq_factor",
        ),
    ] {
        let error = read(&config, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData, "{name}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    for dim in [0, 1, 3] {
        assert!(RopeConfig::new(1e4).frequencies(dim, 1).is_err(), "{dim}");
    }
}
