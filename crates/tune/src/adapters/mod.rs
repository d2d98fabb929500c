//! Adapters: their two on-disk forms, which layers they belong to, and a model that has them.
//!
//! mlx-lm writes `adapters.safetensors` with `model.layers.0.self_attn.q_proj.lora_a` `[in, r]` and `lora_b`
//! `[r, out]`; PEFT writes `adapter_model.safetensors` with
//! `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` `[r, in]` and `lora_B.weight` `[out, r]`. Each has
//! an `adapter_config.json` of its own. [`names`] maps names and layouts, [`config`] the settings, [`keys`] says
//! which layers a list of keys means; these three know no arrays. [`attach`] starts new adapters on a model, and
//! [`files`] reads and writes a model's.

pub mod attach;
pub mod config;
pub mod files;
pub mod keys;
pub mod names;
