//! `adapter_config.json` of both forms.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::names::Form;
use crate::config::{AdapterConfig, FineTune, RunConfig};
use crate::{Error, Result};

/// What an adapter's settings say, whichever form they came in.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSettings {
    /// LoRA, DoRA, or full weights (mlx-lm saves those as an "adapter" too).
    pub fine_tune: FineTune,
    /// Rank, scale, keys and layers; `None` for full weights.
    pub adapter: Option<AdapterConfig>,
    /// The form that they came in.
    pub form: Form,
}

/// mlx-lm's settings, as far as loading an adapter needs them.
#[derive(Debug, Deserialize)]
struct Mlx {
    #[serde(default = "lora")]
    fine_tune_type: FineTune,
    #[serde(default = "sixteen")]
    num_layers: i64,
    lora_parameters: Option<MlxParameters>,
}

#[derive(Debug, Deserialize)]
struct MlxParameters {
    rank: usize,
    scale: Option<f64>,
    alpha: Option<f64>,
    #[serde(default)]
    dropout: f64,
    keys: Option<Vec<String>>,
}

fn lora() -> FineTune {
    FineTune::Lora
}

fn sixteen() -> i64 {
    16
}

/// PEFT's settings, as far as they decide what the adapter computes.
#[derive(Debug, Serialize, Deserialize)]
struct Peft {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    target_modules: Option<Value>,
    layers_to_transform: Option<Value>,
    #[serde(default)]
    rank_pattern: Map<String, Value>,
    #[serde(default)]
    alpha_pattern: Map<String, Value>,
    modules_to_save: Option<Value>,
    bias: Option<String>,
    #[serde(default)]
    fan_in_fan_out: bool,
}

impl AdapterSettings {
    /// Reads the `adapter_config.json` of a folder, in whichever form it is.
    pub fn read(folder: impl AsRef<Path>) -> Result<AdapterSettings> {
        let path = folder.as_ref().join("adapter_config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
        AdapterSettings::parse(&text).map_err(|cause| Error::Adapter { path, cause })
    }

    /// Reads settings from their text.
    pub fn parse(text: &str) -> std::result::Result<AdapterSettings, String> {
        let value: Value = serde_json::from_str(text).map_err(|e| format!("not valid JSON: {e}"))?;
        if value.get("peft_type").is_some() {
            AdapterSettings::peft(value)
        } else {
            AdapterSettings::mlx(value)
        }
    }

    fn mlx(value: Value) -> std::result::Result<AdapterSettings, String> {
        let said: Mlx =
            serde_json::from_value(value).map_err(|e| format!("not mlx-lm's settings of an adapter: {e}"))?;
        let layers = match said.num_layers {
            n if n < 0 => None,
            n => Some(n as usize),
        };
        if said.fine_tune_type == FineTune::Full {
            return Ok(AdapterSettings { fine_tune: FineTune::Full, adapter: None, form: Form::Mlx });
        }
        let given = said.lora_parameters.ok_or("\"lora_parameters\" is missing")?;
        if given.rank == 0 {
            return Err("\"rank\" is 0".into());
        }
        let scale = match (given.scale, given.alpha) {
            (Some(scale), _) => scale,
            (None, Some(alpha)) => alpha / given.rank as f64,
            (None, None) => return Err("\"lora_parameters\" has no \"scale\"".into()),
        };
        let adapter =
            AdapterConfig { rank: given.rank, scale, dropout: given.dropout, keys: given.keys, layers };
        Ok(AdapterSettings { fine_tune: said.fine_tune_type, adapter: Some(adapter), form: Form::Mlx })
    }

    fn peft(value: Value) -> std::result::Result<AdapterSettings, String> {
        let said: Peft =
            serde_json::from_value(value).map_err(|e| format!("not PEFT's settings of an adapter: {e}"))?;
        if said.peft_type != "LORA" {
            return Err(format!("peft_type is {}; only LORA is supported", said.peft_type));
        }
        if said.r == 0 {
            return Err("\"r\" is 0".into());
        }
        let refused = [
            ("rank_pattern", !said.rank_pattern.is_empty()),
            ("alpha_pattern", !said.alpha_pattern.is_empty()),
            (
                "modules_to_save",
                said.modules_to_save.as_ref().is_some_and(|v| !v.is_null() && *v != json!([])),
            ),
            ("layers_to_transform", said.layers_to_transform.as_ref().is_some_and(|v| !v.is_null())),
            ("bias", said.bias.as_deref().is_some_and(|bias| bias != "none")),
            ("fan_in_fan_out", said.fan_in_fan_out),
        ];
        if let Some((name, _)) = refused.iter().find(|(_, used)| *used) {
            return Err(format!("\"{name}\" is used, which is not supported"));
        }
        let keys = match said.target_modules {
            None | Some(Value::Null) => None,
            Some(Value::String(all)) if all == "all-linear" => None,
            Some(Value::Array(list)) => {
                let names: Option<Vec<String>> =
                    list.iter().map(|name| name.as_str().map(String::from)).collect();
                Some(names.ok_or("\"target_modules\" must be a list of names")?)
            }
            Some(other) => {
                return Err(format!(
                    "\"target_modules\" is {other}; supported are a list of names and \"all-linear\""
                ));
            }
        };
        let scale = scale(said.lora_alpha, said.r, said.use_rslora);
        let adapter = AdapterConfig { rank: said.r, scale, dropout: said.lora_dropout, keys, layers: None };
        let fine_tune = if said.use_dora { FineTune::Dora } else { FineTune::Lora };
        Ok(AdapterSettings { fine_tune, adapter: Some(adapter), form: Form::Peft })
    }

    /// The text of PEFT's `adapter_config.json`. `modules` are the names of the adapted layers (ends of paths);
    /// `base` is the model's name.
    pub fn to_peft(&self, base: &str, modules: &[String]) -> Result<String> {
        let Some(adapter) = &self.adapter else {
            return Err(Error::Config("full weights are no adapter and have no PEFT form".into()));
        };
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": adapter.rank,
            "lora_alpha": adapter.scale * adapter.rank as f64,
            "lora_dropout": adapter.dropout,
            "use_rslora": false,
            "use_dora": self.fine_tune == FineTune::Dora,
            "target_modules": modules,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "modules_to_save": null,
        });
        Ok(format!("{config:#}\n"))
    }
}

/// What the product of the factors is multiplied by.
pub fn scale(alpha: f64, rank: usize, rslora: bool) -> f64 {
    if rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 }
}

/// The text of mlx-lm's `adapter_config.json` for a run. `keys` are the names of the adapted layers (ends of paths
/// within a block), so that mlx-lm adapts the very same ones.
pub fn to_mlx(run: &RunConfig, keys: &[String], total_layers: usize) -> String {
    let layers = |given: Option<usize>| given.unwrap_or(total_layers);
    let parameters = run.adapter.as_ref().map(|adapter| {
        json!({"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": keys})
    });
    let config = json!({
        "model": run.model,
        "fine_tune_type": run.fine_tune,
        "num_layers": layers(run.adapter.as_ref().map_or(run.full_layers, |adapter| adapter.layers)),
        "lora_parameters": parameters,
        "data": run.data,
        "seed": run.seed,
        "batch_size": run.micro_batch_size.unwrap_or(run.batch_size),
        "max_seq_length": run.rules.max_length,
        "mask_prompt": run.rules.chat_learn != crate::data::sample::Learn::All,
        "grad_checkpoint": run.grad_checkpoint,
        "adapter_path": run.output,
    });
    format!("{config:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        let keys = |names: &[&str]| Some(names.iter().map(|name| name.to_string()).collect::<Vec<_>>());
        let adapter =
            |rank, scale, keys, layers| Some(AdapterConfig { rank, scale, dropout: 0.0, keys, layers });
        let cases = [
            (
                "mlx",
                json!({"fine_tune_type": "dora", "num_layers": 4, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["q_proj"]}, "iters": 3}),
                (FineTune::Dora, adapter(8, 20.0, keys(&["q_proj"]), Some(4)), Form::Mlx),
            ),
            (
                "mlx, older",
                json!({"num_layers": -1, "lora_parameters": {"rank": 8, "alpha": 16.0}}),
                (FineTune::Lora, adapter(8, 2.0, None, None), Form::Mlx),
            ),
            (
                "mlx, full",
                json!({"fine_tune_type": "full", "lora_parameters": null}),
                (FineTune::Full, None, Form::Mlx),
            ),
            (
                "peft",
                json!({"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["v_proj"], "bias": "none", "modules_to_save": null, "rank_pattern": {}}),
                (FineTune::Lora, adapter(16, 2.0, keys(&["v_proj"]), None), Form::Peft),
            ),
            (
                "peft, rank-stabilised",
                json!({"peft_type": "LORA", "r": 16, "lora_alpha": 8.0, "use_rslora": true, "use_dora": true, "target_modules": "all-linear"}),
                (FineTune::Dora, adapter(16, 2.0, None, None), Form::Peft),
            ),
        ];
        for (name, config, (fine_tune, adapter, form)) in cases {
            let read = AdapterSettings::parse(&config.to_string()).expect(name);
            assert_eq!(read, AdapterSettings { fine_tune, adapter, form }, "{name}");
        }
    }

    #[test]
    fn what_changes_the_result_and_is_not_known_is_refused() {
        let base = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 8});
        let cases = [
            ("another method", json!({"peft_type": "IA3"}), "IA3"),
            ("ranks by layer", json!({"rank_pattern": {"q": 3}}), "rank_pattern"),
            ("whole modules", json!({"modules_to_save": ["lm_head"]}), "modules_to_save"),
            ("biases", json!({"bias": "all"}), "bias"),
            ("a pattern", json!({"target_modules": ".*q_proj"}), "target_modules"),
            ("no rank", json!({"r": 0}), "\"r\" is 0"),
        ];
        for (name, over, part) in cases {
            let mut config = base.clone();
            let (Value::Object(all), Value::Object(over)) = (&mut config, over) else { unreachable!() };
            all.extend(over);
            let error = AdapterSettings::parse(&config.to_string()).expect_err(name);
            assert!(error.contains(part), "{name}: {error}");
        }
        for text in ["", "[]", "{}", "{\"lora_parameters\": {}}"] {
            assert!(AdapterSettings::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        use crate::config::keys::parse;
        use crate::config::{ModelFacts, TrainConfig};
        let settings = parse("model: m\ndata: d\noutput: o\nlora_parameters: {rank: 4, scale: 3.0}").unwrap();
        let run = TrainConfig::new(settings)
            .unwrap()
            .resolve(&ModelFacts { layers: 6, bits: None, positions: None })
            .unwrap();
        let names = vec!["self_attn.q_proj".to_string(), "mlp.up_proj".to_string()];
        let read = AdapterSettings::parse(&to_mlx(&run, &names, 6)).unwrap();
        let adapter =
            AdapterConfig { rank: 4, scale: 3.0, dropout: 0.0, keys: Some(names.clone()), layers: Some(6) };
        assert_eq!(
            read,
            AdapterSettings { fine_tune: FineTune::Lora, adapter: Some(adapter), form: Form::Mlx }
        );
        let peft = AdapterSettings::parse(&read.to_peft("m", &names).unwrap()).unwrap();
        assert_eq!(peft.adapter.unwrap().scale, 3.0);
    }
}
