//! What a checkpoint of a run holds, and how the run is put back from it.

use std::path::{Path, PathBuf};

use mica_array::files::{load_safetensors, safetensors_writer};
use mica_array::{Array, memory};
use mica_lm::models::LanguageModel;
use mica_nn::set_parameters;
use mica_simd::Isa;

use super::update::Update;
use crate::data::batch::Batch;
use crate::run::checkpoint::RunState;
use crate::run::{About, Checkpoints};
use crate::{Error, Result};

/// The trained parameters.
const WEIGHTS: &str = "weights.safetensors";
/// The optimizer's moments.
const OPTIMIZER: &str = "optimizer.safetensors";
/// Key of the optimizer's own count of steps.
const OPTIMIZER_STEP: &str = "optimizer_step";

/// What the bits of a run depend on.
pub(super) fn about(model: &dyn LanguageModel, update: &Update) -> About {
    let mut dtypes: Vec<String> =
        update.parameters(model).iter().map(|(_, array)| array.dtype().to_string()).collect();
    dtypes.sort();
    dtypes.dedup();
    About {
        version: env!("CARGO_PKG_VERSION").into(),
        isa: Isa::get().name().into(),
        dtypes: format!("trained {}, moments float32", dtypes.join(" and ")),
    }
}

/// Saves a checkpoint of the present state.
pub(super) fn save(
    checkpoints: &Checkpoints,
    state: &mut RunState,
    model: &dyn LanguageModel,
    update: &Update,
) -> Result<PathBuf> {
    state.extra.insert(OPTIMIZER_STEP.into(), update.optimizer().step_count().into());
    checkpoints.save(&about(model, update), state, |folder| {
        write(&folder.join(WEIGHTS), &update.parameters(model))?;
        write(&folder.join(OPTIMIZER), &update.optimizer().state())
    })
}

fn write(path: &Path, arrays: &[(String, Array)]) -> Result<()> {
    // Not `save_safetensors`, whose error does not tell a full disk apart.
    Ok(safetensors_writer(arrays, &[])?.write(path)?)
}

/// Puts weights and optimizer back.
pub(super) fn restore(
    folder: &Path,
    state: &RunState,
    model: &mut dyn LanguageModel,
    update: &mut Update,
) -> Result<()> {
    let bad = |cause: String| Error::Checkpoint { path: folder.into(), cause };
    let weights = load_safetensors(folder.join(WEIGHTS))?;
    let present = update.parameters(model);
    if weights.len() != present.len() {
        return Err(bad(format!(
            "holds {} trained parameters, this run trains {}: its settings changed since",
            weights.len(),
            present.len()
        )));
    }
    for (name, array) in &present {
        let same = weights.iter().any(|(other, value)| other == name && value.dtype() == array.dtype());
        if !same {
            return Err(bad(format!(
                "has no {name} of {}: the settings of the run changed since",
                array.dtype()
            )));
        }
    }
    drop(present);
    set_parameters(model.as_module_mut(), &weights).map_err(|e| bad(e.to_string()))?;
    let step = state.extra.get(OPTIMIZER_STEP).and_then(serde_json::Value::as_u64);
    let step = step.and_then(|step| u32::try_from(step).ok());
    let step = step.ok_or_else(|| bad(format!("says nothing about {OPTIMIZER_STEP}")))?;
    update
        .optimizer_mut()
        .restore(step, load_safetensors(folder.join(OPTIMIZER))?)
        .map_err(|e| bad(e.to_string()))
}

/// Saves the batches of a step that failed, to look at them.
pub(super) fn save_window(folder: &Path, step: u64, window: &[Batch]) -> Result<PathBuf> {
    let path = folder.join(format!("failed-step-{step}.json"));
    let text = serde_json::to_string(window)
        .map_err(|e| Error::Checkpoint { path: path.clone(), cause: e.to_string() })?;
    mica_io::atomic::write(&path, text)?;
    Ok(path)
}

/// The most memory that this process has used, in bytes: what the system says, or else that of arrays.
pub fn peak_memory() -> u64 {
    memory::peak_resident().unwrap_or_else(|| memory::peak() as u64)
}
