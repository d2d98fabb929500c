//! How a model's weights are quantized: MLX's `quantization` field.
//!
//! `{"group_size": 64, "bits": 4, "mode": "affine"}` applies to every quantizable module, and further keys are
//! module paths with settings of their own, or `false` for a module left as it was. MLX writes the same object
//! again as `quantization_config`; other programs use that name for formats of theirs, which are refused.

use std::collections::HashMap;

use mica_codec::CodecError;
pub use mica_codec::{QuantMode, QuantSpec};
use serde_json::Value;

use super::Fields;
use crate::error::{Error, Result};

/// How a model's modules are quantized.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QuantConfig {
    /// For modules without settings of their own; `None` if the model is not quantized.
    ///
    /// A module is quantized only if the files hold scales for it: this says how, not whether.
    pub default: Option<QuantSpec>,
    /// Settings by module path (`model.layers.0.mlp.down_proj`); `None` for a module left as it was.
    pub overrides: HashMap<String, Option<QuantSpec>>,
}

impl QuantConfig {
    /// Reads `quantization`, or else `quantization_config`.
    ///
    /// # Errors
    /// A format of another program; bits, group size or mode that do not exist.
    pub fn read(fields: &Fields) -> Result<Self> {
        for name in ["quantization", "quantization_config"] {
            let Some(value) = fields.map().get(name).filter(|value| !value.is_null()) else { continue };
            let Value::Object(map) = value else { return Err(fields.bad(name, "an object", value)) };
            return Self::read_object(&Fields::within(fields, name, map));
        }
        Ok(Self::default())
    }

    fn read_object(fields: &Fields) -> Result<Self> {
        if let Some(method) = fields.opt::<String>("quant_method")?
            && method != "mlx"
        {
            return Err(foreign(fields, &method));
        }
        if !fields.has("bits") && !fields.has("mode") {
            return Err(foreign(fields, "an unknown method"));
        }
        let default = spec(fields)?;
        let mut overrides = HashMap::new();
        for (path, value) in fields.map() {
            let spec = match value {
                Value::Object(map) => Some(spec(&Fields::within(fields, path, map))?),
                Value::Bool(false) => None,
                Value::Bool(true) => Some(default),
                _ => continue,
            };
            overrides.insert(path.clone(), spec);
        }
        Ok(Self { default: Some(default), overrides })
    }

    /// How the module at `path` is quantized, if it is.
    pub fn spec(&self, path: &str) -> Option<QuantSpec> {
        self.overrides.get(path).copied().unwrap_or(self.default)
    }

    /// Whether any module is quantized.
    pub fn is_quantized(&self) -> bool {
        self.default.is_some()
    }
}

/// Bits, group size and mode of one object; what is missing is as MLX's `to_quantized` has it.
fn spec(fields: &Fields) -> Result<QuantSpec> {
    let mode = match fields.opt::<String>("mode")? {
        None => QuantMode::Affine,
        Some(name) => name
            .parse()
            .map_err(|_| fields.bad("mode", "affine, mxfp4, mxfp8 or nvfp4", &Value::String(name)))?,
    };
    let (bits, group_size) = mode.defaults();
    QuantSpec::new(fields.get_or("bits", bits)?, fields.get_or("group_size", group_size)?, mode).map_err(
        |error| {
            let (field, expected) = match error {
                CodecError::Bits { expected, .. } => ("bits", expected),
                CodecError::GroupSize { expected, .. } => ("group_size", expected),
                other => return fields.bad("mode", &other.to_string(), &Value::Null),
            };
            let got = fields.get_or(field, Value::Null).unwrap_or_default();
            fields.bad(field, &format!("{expected} in mode {}", mode.name()), &got)
        },
    )
}

fn foreign(fields: &Fields, method: &str) -> Error {
    Error::Unsupported {
        what: format!("{}: weights quantized by {method}", fields.path().display()),
        todo: "mica reads unquantized weights and MLX's quantization; take the model's original \
               (bf16 or f16) weights and quantize them with `mica convert -q`, or take an MLX version"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use serde_json::json;

    fn read(value: Value) -> Result<QuantConfig> {
        QuantConfig::read(&Fields::new(std::path::Path::new("config.json"), value.as_object().unwrap()))
    }

    fn affine(bits: usize, group_size: usize) -> Option<QuantSpec> {
        Some(QuantSpec::affine(bits, group_size).unwrap())
    }

    #[test]
    fn mlx_configurations() {
        let q = read(json!({"quantization": {"group_size": 64, "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 8},
            "lm_head": false,
            "model.layers.0.mlp.gate": {"bits": 8},
            "model.layers.1.mlp.experts": {"mode": "mxfp4"},
            "model.layers.2.mlp": true},
            "quantization_config": {"group_size": 128, "bits": 2}}))
        .unwrap();
        for (path, expected) in [
            ("model.layers.3.self_attn.q_proj", affine(4, 64)),
            ("model.embed_tokens", affine(8, 32)),
            ("lm_head", None),
            ("model.layers.0.mlp.gate", affine(8, 64)),
            ("model.layers.1.mlp.experts", Some(QuantSpec::usual(QuantMode::Mxfp4))),
            ("model.layers.2.mlp", affine(4, 64)),
        ] {
            assert_eq!(q.spec(path), expected, "{path}");
        }
        assert!(q.is_quantized());
        assert_eq!(
            read(json!({"quantization_config": {"group_size": 32, "bits": 3}})).unwrap().default,
            affine(3, 32)
        );
        assert!(!read(json!({"quantization": null})).unwrap().is_quantized());
        assert_eq!(read(json!({})).unwrap().spec("any"), None);
    }

    #[test]
    fn an_override_does_not_inherit() {
        // As MLX: `to_quantized(**override)`, whose defaults are the mode's, not the model's.
        let q = read(json!({"quantization": {"group_size": 32, "bits": 8, "a.b": {"bits": 4}}})).unwrap();
        assert_eq!(q.spec("a.b"), affine(4, 64));
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_advice() {
        for (name, value) in [
            ("gptq", json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false})),
            ("awq", json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true})),
            ("bitsandbytes", json!({"quant_method": "bitsandbytes", "load_in_4bit": true})),
            ("fp8", json!({"quant_method": "fp8", "activation_scheme": "dynamic"})),
            ("mxfp4", json!({"quant_method": "mxfp4", "modules_to_not_convert": ["a"]})),
            ("an unknown method", json!({"load_in_8bit": true})),
        ] {
            let error = read(json!({"quantization_config": value})).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{name}");
            let text = error.to_string();
            assert!(text.contains(name) && text.contains("mica convert -q"), "{text}");
        }
        for (name, value, words) in [
            ("bits", json!({"bits": 7, "group_size": 64}), "`quantization.bits`: expected 1, 2"),
            ("group", json!({"bits": 4, "group_size": 48}), "`quantization.group_size`: expected 32"),
            ("mode", json!({"bits": 4, "group_size": 64, "mode": "fp3"}), "affine, mxfp4"),
            ("mode's group", json!({"bits": 4, "group_size": 64, "mode": "nvfp4"}), "16 in mode nvfp4"),
            ("type", json!({"bits": "four", "group_size": 64}), "the string \"four\""),
            ("not an object", json!(4), "an object"),
        ] {
            let error = read(json!({"quantization": value})).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadData, "{name}");
            assert!(error.to_string().contains(words), "{name}: {error}");
        }
    }
}
