//! Opening a model folder.

use std::path::{Path, PathBuf};

use mica_array::Dtype;

use crate::Result;
use crate::config::ModelConfig;
use crate::memory;
use crate::models::{self, LanguageModel};
use crate::weights::{FileSource, Packing};

/// A model with what its folder says about it.
#[derive(Debug)]
pub struct Loaded {
    /// The folder.
    pub folder: PathBuf,
    /// config.json.
    pub config: ModelConfig,
    /// The model.
    pub model: Box<dyn LanguageModel>,
    /// What plain weights are stored in.
    pub dtype: Dtype,
    /// Bytes of the weights on disk.
    pub weight_bytes: u64,
}

/// What the headers of a model folder say.
#[derive(Debug)]
pub struct Outline {
    /// config.json.
    pub config: ModelConfig,
    /// The model without its weights: every tensor is a placeholder that must not be computed with.
    pub model: Box<dyn LanguageModel>,
    /// Bytes of the weights on disk.
    pub weight_bytes: u64,
}

/// Looks at a folder without reading a weight: whether it is a model that can be opened, with all tensors as its
/// configuration describes them.
///
/// # Errors
/// All that is wrong, in one message.
pub fn outline(folder: impl AsRef<Path>) -> Result<Outline> {
    let folder = folder.as_ref();
    let config = ModelConfig::load(folder)?;
    models::check_family(&config)?;
    let mut source = FileSource::outline(folder, config.quantization.clone())?;
    let weight_bytes = source.bytes();
    let model = models::build(&config, &mut source)?;
    source.finish()?;
    Ok(Outline { config, model, weight_bytes })
}

/// Opens a folder: reads its configuration, builds the model of its family and takes every tensor,
/// checked for name, shape, dtype and finite values; none may be missing, none left over.
///
/// # Errors
/// Whatever is wrong with the folder, and too little memory, both before anything is read.
pub fn load(folder: impl AsRef<Path>, packing: Packing) -> Result<Loaded> {
    let folder = folder.as_ref();
    // First everything that can be known without reading, and all of it at once.
    let Outline { config, weight_bytes, .. } = outline(folder)?;
    let what = format!("opening {}", folder.display());
    let todo = "quantize the model (mica convert -q), take a smaller one, or end other programs";
    // Weights are repacked as they are read, in pieces: there is one copy of each at any time.
    memory::check(weight_bytes, &what, todo)?;
    let mut source = FileSource::open(folder, config.quantization.clone(), packing)?;
    let dtype = source.dtype();
    let model = models::build(&config, &mut source)?;
    source.finish()?;
    // What loading needed for a moment is of no use to what follows.
    mica_array::memory::clear_cache();
    mica_array::memory::enforce_process_limit();
    Ok(Loaded { folder: folder.to_path_buf(), config, model, dtype, weight_bytes })
}
