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
