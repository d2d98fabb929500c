//! Parameters from a model folder: Hugging Face's, or one that MLX quantized.

use std::collections::HashSet;
use std::path::Path;

use mica_array::files::dtype_from_file;
use mica_array::{Array, Dtype, PackedWeight, Quantized};
use mica_io::weights::WeightFiles;

use super::{Source, wrong_shape};
use crate::config::{QuantConfig, QuantMode, QuantSpec};
use crate::{Error, Result};

/// Which weights to repack for the kernels. What is trained stays plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// All linear weights and embeddings: for inference and for training adapters.
    Frozen,
    /// Only quantized ones, which have no other form: for training all weights.
    Quantized,
}

/// A folder's tensors, each taken at most once.
pub struct FileSource {
    files: WeightFiles,
    quantization: QuantConfig,
    packing: Packing,
    taken: HashSet<String>,
}

impl FileSource {
    /// Opens the weights of a folder.
    pub fn open(folder: &Path, quantization: QuantConfig, packing: Packing) -> Result<FileSource> {
        let files = WeightFiles::open(folder)?;
        Ok(FileSource { files, quantization, packing, taken: HashSet::new() })
    }

    /// The dtype of the largest plain tensor: what the model was stored in.
    pub fn dtype(&self) -> Dtype {
        let plain = self.files.iter().filter_map(|weight| {
            let dtype = dtype_from_file(weight.dtype()).filter(|dtype| dtype.is_float())?;
            Some((weight.byte_len(), dtype))
        });
        plain.max_by_key(|(bytes, _)| *bytes).map_or(Dtype::F32, |(_, dtype)| dtype)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.files.byte_len()
    }

    /// Fails if a tensor of the files was not taken: the configuration does not describe them.
    pub fn finish(self) -> Result<()> {
        // Older Llama files carry the rotary table, which is computed here.
        let known = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
        let left: Vec<&str> =
            self.files.names().filter(|name| !self.taken.contains(*name) && !known(name)).collect();
        if left.is_empty() {
            return Ok(());
        }
        let shown = left.iter().take(8).copied().collect::<Vec<_>>().join(", ");
        let more = if left.len() > 8 { format!(" and {} more", left.len() - 8) } else { String::new() };
        Err(Error::BadFile {
            path: self.files.path().to_path_buf(),
            message: format!("{} tensors have no place in this model: {shown}{more}", left.len()),
            todo: "check that config.json belongs to these weights".to_string(),
        })
    }

    fn read(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Array> {
        let weight = self.files.require(name)?;
        if !shapes.contains(&weight.shape()) {
            return Err(wrong_shape(weight.path(), name, shapes, weight.shape()));
        }
        let dtype = dtype_from_file(weight.dtype()).ok_or_else(|| Error::Unsupported {
            what: format!("{}: tensor {name} of type {}", weight.path().display(), weight.dtype()),
            todo: "f32, f16, bf16 and integer tensors can be read".to_string(),
        })?;
        let array =
            Array::from_fill(weight.shape(), dtype, |bytes| weight.read_into(bytes).map_err(Error::from))?;
        self.taken.insert(name.to_string());
        Ok(array)
    }

    fn quantized(&mut self, path: &str, spec: QuantSpec, out: usize, inputs: usize) -> Result<Array> {
        if spec.mode != QuantMode::Affine {
            return Err(Error::Unsupported {
                what: format!("{}: {path} quantized as {}", self.files.path().display(), spec.mode.name()),
                todo: "affine quantization can be opened; convert the model with it".to_string(),
            });
        }
        let groups = inputs / spec.group_size.max(1);
        let words = self.read(&format!("{path}.weight"), &[&[out, inputs * spec.bits / 32]])?;
        let scales = self.read(&format!("{path}.scales"), &[&[out, groups]])?;
        let biases = self.read(&format!("{path}.biases"), &[&[out, groups]])?;
        let packed =
            PackedWeight::from_mlx(&Quantized { words, scales, biases }, spec.bits, spec.group_size)?;
        Ok(Array::from_packed(packed))
    }
}

impl Source for FileSource {
    fn has(&self, name: &str) -> bool {
        self.files.contains(name)
    }

    fn tensor_any(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Array> {
        self.read(name, shapes)
    }

    fn weight(&mut self, path: &str, out: usize, inputs: usize) -> Result<Array> {
        if self.has(&format!("{path}.scales")) {
            // The files say what is quantized; the configuration says how.
            let spec = self.quantization.spec(path).ok_or_else(|| Error::BadFile {
                path: self.files.path().to_path_buf(),
                message: format!("{path} has scales, but config.json does not say how it is quantized"),
                todo: "add its `quantization` entry (bits, group_size, mode)".to_string(),
            })?;
            return self.quantized(path, spec, out, inputs);
        }
        let plain = self.read(&format!("{path}.weight"), &[&[out, inputs]])?;
        match self.packing {
            Packing::Frozen => Ok(Array::from_packed(PackedWeight::from_float(&plain)?)),
            Packing::Quantized => Ok(plain),
        }
    }
}
