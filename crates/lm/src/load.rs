//! Opening a model folder.

use std::path::{Path, PathBuf};

use mica_array::Dtype;

use crate::Result;
use crate::config::ModelConfig;
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

/// Opens a folder: reads its configuration, builds the model of its family and takes every tensor,
/// checked for name, shape and dtype; none may be missing, none left over.
pub fn load(folder: impl AsRef<Path>, packing: Packing) -> Result<Loaded> {
    let folder = folder.as_ref();
    let config = ModelConfig::load(folder)?;
    let mut source = FileSource::open(folder, config.quantization.clone(), packing)?;
    let (dtype, weight_bytes) = (source.dtype(), source.bytes());
    let model = models::build(&config, &mut source)?;
    source.finish()?;
    Ok(Loaded { folder: folder.to_path_buf(), config, model, dtype, weight_bytes })
}
