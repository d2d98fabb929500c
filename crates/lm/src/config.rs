//! A model folder's `config.json`: what every family needs from it, and typed access to the rest.
//!
//! Two dialects are written into the same names (FORMATS in the design): the older one with `rope_theta`,
//! `rope_scaling` and `torch_dtype`, the newer one with `rope_parameters` (per layer type where a model has several)
//! and `dtype`. [`RopeConfig`] and [`ModelConfig`] read both. Defaults for missing fields belong to the model
//! families, which ask through [`Fields`]; an error names the file, the field, what was expected and what came.

mod fields;
mod quant;
mod rope;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use fields::{Fields, FromField};
pub use quant::{QuantConfig, QuantMode, QuantSpec};
pub use rope::{RopeConfig, RopeFrequencies, RopeKind};

use crate::error::{Error, Result, read_json_object};

/// The element type that a model's weights were saved in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    BF16,
}

/// A model's configuration.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Everything in the file, in its order.
    pub raw: Map<String, Value>,
    /// Which family it is (`llama`, `qwen3`, …).
    pub model_type: String,
    /// The classes it was made for (`LlamaForCausalLM`); may be empty.
    pub architectures: Vec<String>,
    /// The type of its weights, if it says so. The files have the last word.
    pub dtype: Option<WeightType>,
    /// Ids at which generation ends, as this file alone has it. [`Tokenizer::eos_ids`](crate::tokenizer::Tokenizer)
    /// joins all files.
    pub eos_ids: Vec<u32>,
    /// How its weights are quantized.
    pub quantization: QuantConfig,
    path: PathBuf,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// No such file; not a JSON object; no `model_type`; weights quantized in a way of another program.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join("config.json");
        match read_json_object(&path, "the model's configuration")? {
            Some(raw) => Self::new(path, raw),
            None => Err(Error::NotFound {
                what: "the model's configuration".into(),
                looked: format!("expected {}", path.display()),
                todo: "name a folder that holds a model (config.json, tokenizer.json, *.safetensors)".into(),
            }),
        }
    }

    /// A configuration from its fields; `path` is named in messages.
    ///
    /// # Errors
    /// As [`ModelConfig::load`].
    pub fn new(path: impl Into<PathBuf>, raw: Map<String, Value>) -> Result<Self> {
        let path = path.into();
        let fields = Fields::new(&path, &raw);
        let model_type = fields.get::<String>("model_type")?;
        let architectures = fields.get_or("architectures", Vec::new())?;
        let dtype = weight_type(&fields)?;
        let eos_ids = match raw.get("eos_token_id") {
            Some(value) => crate::tokenizer::eos_ids(&path, value)?,
            None => Vec::new(),
        };
        let quantization = QuantConfig::read(&fields)?;
        Ok(Self { model_type, architectures, dtype, eos_ids, quantization, path, raw })
    }

    /// The fields at the top of the file.
    pub fn fields(&self) -> Fields<'_> {
        Fields::new(&self.path, &self.raw)
    }

    /// The fields of the language model: `text_config` in a model with several parts, else the top.
    ///
    /// # Errors
    /// When `text_config` is not an object.
    pub fn text_fields(&self) -> Result<Fields<'_>> {
        Ok(self.fields().object("text_config")?.unwrap_or_else(|| self.fields()))
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// `dtype` or the older `torch_dtype`, at the top or in the text part.
fn weight_type(fields: &Fields) -> Result<Option<WeightType>> {
    let text = fields.object("text_config")?;
    for part in [Some(*fields), text].into_iter().flatten() {
        for name in ["dtype", "torch_dtype"] {
            let Some(value) = part.opt::<String>(name)? else { continue };
            return match value.strip_prefix("torch.").unwrap_or(&value) {
                "float32" | "float" => Ok(Some(WeightType::F32)),
                "float16" | "half" => Ok(Some(WeightType::F16)),
                "bfloat16" => Ok(Some(WeightType::BF16)),
                "auto" => Ok(None),
                _ => Err(part.bad(name, "float32, float16 or bfloat16", &Value::String(value))),
            };
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use serde_json::json;

    pub(crate) fn config(value: Value) -> Result<ModelConfig> {
        let Value::Object(raw) = value else { panic!("an object") };
        ModelConfig::new("config.json", raw)
    }

    #[test]
    fn both_dialects_of_dtype() {
        for (name, value, expected) in [
            ("newer", json!({"dtype": "bfloat16"}), Some(WeightType::BF16)),
            ("older", json!({"torch_dtype": "float16"}), Some(WeightType::F16)),
            ("newer first", json!({"dtype": "float32", "torch_dtype": "float16"}), Some(WeightType::F32)),
            ("null falls through", json!({"dtype": null, "torch_dtype": "float16"}), Some(WeightType::F16)),
            ("with torch's name", json!({"torch_dtype": "torch.bfloat16"}), Some(WeightType::BF16)),
            ("nested", json!({"text_config": {"dtype": "bfloat16"}}), Some(WeightType::BF16)),
            ("none", json!({}), None),
        ] {
            let mut value = value;
            value["model_type"] = "llama".into();
            assert_eq!(config(value).unwrap().dtype, expected, "{name}");
        }
        let error = config(json!({"model_type": "x", "dtype": "int8"})).unwrap_err();
        assert!(error.to_string().contains("`dtype`") && error.to_string().contains("int8"), "{error}");
    }

    #[test]
    fn a_file_without_model_type_says_so() {
        let error = config(json!({"architectures": ["LlamaForCausalLM"]})).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData);
        assert!(
            error.to_string().contains("config.json") && error.to_string().contains("model_type"),
            "{error}"
        );
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ModelConfig::load(dir.path()).unwrap_err().kind(), ErrorKind::NotFound);
        std::fs::write(dir.path().join("config.json"), "{\"model_type\": ").unwrap();
        assert_eq!(ModelConfig::load(dir.path()).unwrap_err().kind(), ErrorKind::BadData);
    }

    #[test]
    fn the_text_part_is_found() {
        let nested = config(json!({"model_type": "gemma3", "text_config": {"hidden_size": 8}})).unwrap();
        assert_eq!(nested.text_fields().unwrap().get::<usize>("hidden_size").unwrap(), 8);
        let error = nested.text_fields().unwrap().get::<usize>("layers").unwrap_err();
        assert!(error.to_string().contains("`text_config.layers`"), "{error}");
        let flat = config(json!({"model_type": "llama", "hidden_size": 4})).unwrap();
        assert_eq!(flat.text_fields().unwrap().get::<usize>("hidden_size").unwrap(), 4);
    }
}
