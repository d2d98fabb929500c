//! Merging an adapter into its model: a model folder that needs no adapter any more.
//!
//! A merged weight is W + scale · (a · b)ᵀ, computed in f32 (with DoRA, its rows scaled to their magnitudes), and
//! stored as the base weight was: in its dtype, or quantized with its settings. Quantizing again rounds, so a
//! fused quantized model is not exactly the adapter on its base; `dequantize` keeps the merge exact and the
//! folder large.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use mica_array::Array;
use mica_lm::convert::{Converted, Recipe, convert};
use mica_lm::load::load;
use mica_lm::models::LanguageModel;
use mica_lm::weights::Packing;
use mica_nn::{Linear, parameters};

use crate::adapters::attach::full_name;
use crate::adapters::files::{self, Opened};
use crate::{Error, Result};

/// Writes the model of the folder `model` with the adapter of the folder `adapter` merged into it to the new folder
/// `target`. With `dequantize`, quantized weights (all of them) become plain. Once `stop` is set, it ends and leaves
/// nothing behind.
///
/// # Errors
/// A model or an adapter that cannot be opened, that do not fit each other, a target that is not empty, disk.
pub fn fuse(
    model: impl AsRef<Path>,
    adapter: impl AsRef<Path>,
    target: impl AsRef<Path>,
    dequantize: bool,
    stop: Option<&AtomicBool>,
) -> Result<Converted> {
    let mut loaded = load(model.as_ref(), Packing::Frozen)?;
    let opened = files::load(&mut *loaded.model, adapter.as_ref())?;
    let new = Merged::new(&mut *loaded.model, &opened);
    let replace = |name: &str| new.get(name).map_err(mica_lm::Error::from);
    let recipe = Recipe { dequantize, replace: Some(&replace), stop, ..Recipe::default() };
    let converted = convert(model.as_ref(), target.as_ref(), &recipe)?;
    let used = new.used.borrow().len();
    if used < new.adapted.len() + new.whole.len() {
        return Err(Error::Adapter {
            path: opened.file,
            cause: "a part of the adapter has no tensor in the model's files, so the fused folder lacks it"
                .into(),
        });
    }
    Ok(converted)
}

/// The weights that an adapter changes, by the names of their tensors.
struct Merged {
    /// Layers with an adapter; merged when they are asked for.
    adapted: HashMap<String, Linear>,
    /// Parameters that were trained themselves.
    whole: HashMap<String, Array>,
    used: std::cell::RefCell<std::collections::HashSet<String>>,
}

impl Merged {
    fn new(model: &mut dyn LanguageModel, opened: &Opened) -> Merged {
        let (mut adapted, mut whole) = (HashMap::new(), HashMap::new());
        for layer in 0..model.layers() {
            for (path, linear) in model.linears(layer) {
                if linear.adapter.is_some() {
                    adapted.insert(format!("{}.weight", full_name(layer, &path)), linear.clone());
                }
            }
        }
        if opened.settings.adapter.is_none() {
            let names: std::collections::HashSet<&String> = opened.names.iter().collect();
            whole =
                parameters(model.as_module()).into_iter().filter(|(name, _)| names.contains(name)).collect();
        }
        Merged { adapted, whole, used: Default::default() }
    }

    fn get(&self, name: &str) -> mica_array::Result<Option<Array>> {
        let new = match (self.adapted.get(name), self.whole.get(name)) {
            (Some(linear), _) => Some(linear.merged()?),
            (None, whole) => whole.cloned(),
        };
        if new.is_some() {
            self.used.borrow_mut().insert(name.to_string());
        }
        Ok(new)
    }
}
