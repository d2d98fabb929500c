//! New adapters on a language model: which linear layers get one, how it starts, and what is trained.
//!
//! An adapter is LoRA (Hu et al. 2021), y += scale · (x · a) · b, or DoRA (Liu et al. 2024), which trains the
//! length of each row of the merged weight as well. They start as in mlx-lm: `a` uniform in ±1/√in, `b` zero,
//! magnitudes the lengths of the base's rows, so that a new adapter changes nothing. The
//! layer itself computes with them (`mica_nn::Linear`).

use std::collections::HashSet;

use mica_array::{Array, Dtype, random};
use mica_lm::models::LanguageModel;
use mica_nn::{Adapter, Linear, Parameter, parameters};

use super::keys::matching;
use super::names::TensorName;
use crate::config::{AdapterConfig, FineTune};
use crate::rng::Rng;
use crate::{Error, Result};

/// Names the random streams from which adapters start.
const START: u64 = 0x6c6f_7261;

/// The full name of a linear layer of a block.
pub(crate) fn full_name(layer: usize, path: &str) -> String {
    format!("model.layers.{layer}.{path}")
}

/// What [`attach`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Linear layers that have an adapter now, by full name, in the order of the model.
    pub modules: Vec<String>,
    /// Their paths below a block, each once: what other programs call `keys`.
    pub keys: Vec<String>,
    /// Something that the person should know.
    pub note: Option<String>,
}

/// Gives linear layers of the last blocks a new adapter, which changes nothing yet.
///
/// Where a layer has an adapter already, the new one replaces it.
///
/// # Errors
/// A key that no layer answers to, by full path or suffix: in mlx-lm, that silently trains nothing.
pub fn attach(
    model: &mut dyn LanguageModel,
    config: &AdapterConfig,
    dora: bool,
    seed: u64,
) -> Result<Attached> {
    let blocks = model.layers();
    let first = blocks - config.layers.unwrap_or(blocks).min(blocks);
    let note = config.layers.filter(|&asked| asked > blocks).map(|asked| {
        format!("adapters on the last {asked} blocks were asked for, the model has {blocks}: all get one")
    });
    let mut modules = Vec::new();
    for layer in first..blocks {
        modules.extend(model.linears(layer).into_iter().map(|(path, _)| full_name(layer, &path)));
    }
    let chosen: HashSet<String> =
        matching(config.keys.as_deref(), &modules)?.into_iter().map(|i| modules[i].clone()).collect();
    let mut attached = Attached { note, ..Attached::default() };
    for layer in first..blocks {
        for (place, (path, linear)) in model.linears(layer).into_iter().enumerate() {
            let name = full_name(layer, &path);
            if !chosen.contains(&name) {
                continue;
            }
            let seed = Rng::new(seed, &[START, layer as u64, place as u64]).next_u64();
            linear.adapter = Some(start(linear, config, dora, seed)?);
            attached.modules.push(name);
            if !attached.keys.contains(&path) {
                attached.keys.push(path);
            }
        }
    }
    if attached.modules.is_empty() {
        return Err(Error::Config("no layer would get an adapter: num_layers must not be 0".into()));
    }
    Ok(attached)
}

fn start(linear: &Linear, config: &AdapterConfig, dora: bool, seed: u64) -> Result<Adapter> {
    let (out, inputs) = (linear.weight.dim(0), linear.weight.dim(1));
    let bound = 1.0 / (inputs as f32).sqrt();
    let a = random::uniform(-bound, bound, &[inputs, config.rank], Dtype::F32, &random::key(seed)?)?;
    let b = Array::zeros(&[config.rank, out], Dtype::F32);
    let magnitude = if dora { Some(row_lengths(linear)?) } else { None };
    let all: Vec<Array> = [&a, &b].into_iter().chain(&magnitude).cloned().collect();
    mica_array::eval(&all)?;
    Ok(Adapter {
        a: a.into(),
        b: b.into(),
        scale: config.scale as f32,
        dropout: config.dropout as f32,
        magnitude: magnitude.map(Parameter::from),
    })
}

/// ‖row‖₂ of the base weight: [out] f32.
fn row_lengths(linear: &Linear) -> Result<Array> {
    let weight = linear.weight.dequantize_to(Dtype::F32)?;
    Ok(weight.square()?.sum(&[1], false)?.sqrt()?)
}

/// The names of the parameters that a run trains, as the parameter tree has them.
///
/// # Errors
/// Full fine-tuning of packed (quantized) weights, and nothing to train.
pub fn trainable(
    model: &dyn LanguageModel,
    fine_tune: FineTune,
    full_layers: Option<usize>,
) -> Result<Vec<String>> {
    let all = parameters(model.as_module());
    let names: Vec<String> = match fine_tune {
        FineTune::Lora | FineTune::Dora => {
            all.into_iter().map(|(name, _)| name).filter(|name| is_adapter(name)).collect()
        }
        FineTune::Full => {
            let first = model.layers() - full_layers.unwrap_or(model.layers()).min(model.layers());
            let mut names = Vec::new();
            for (name, array) in all {
                if full_layers.is_some() && block_of(&name).is_none_or(|block| block < first) {
                    continue;
                }
                if array.packed().is_some() {
                    return Err(Error::Config(format!(
                        "{name} is quantized, and full fine-tuning needs float weights; train an adapter \
                         (--fine-tune-type lora), or dequantize the model first (mica convert)"
                    )));
                }
                if array.dtype().is_float() {
                    names.push(name);
                }
            }
            names
        }
    };
    if names.is_empty() {
        return Err(Error::Config("nothing would be trained: no parameter is chosen".into()));
    }
    Ok(names)
}

/// Whether a parameter belongs to an adapter.
pub fn is_adapter(name: &str) -> bool {
    TensorName::parse(name).is_some()
}

/// The block that a parameter belongs to, if it is of one.
pub(crate) fn block_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}
