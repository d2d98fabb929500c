//! Adapters as files: their two on-disk forms, and which layers they belong to. No arrays here.
//!
//! mlx-lm writes `adapters.safetensors` with `model.layers.0.self_attn.q_proj.lora_a` `[in, r]` and `lora_b`
//! `[r, out]`; PEFT writes `adapter_model.safetensors` with
//! `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` `[r, in]` and `lora_B.weight` `[out, r]`. Each has
//! an `adapter_config.json` of its own. [`names`] maps names and layouts, [`config`] the settings, [`keys`] says
//! which layers a list of keys means.

pub mod config;
pub mod keys;
pub mod names;
