//! Parameters from a model folder: Hugging Face's, or one that MLX quantized.

use std::collections::HashSet;
use std::path::Path;

use mica_array::files::dtype_from_file;
use mica_array::{Array, Dtype, PackedWeight, Quantized};
use mica_io::weights::{Weight, WeightFiles};

use super::Source;
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
///
/// As an *outline* it reads only headers: it gives placeholders and collects everything that is wrong, so that a
/// folder is known to be whole before anything is read, computed or written.
pub struct FileSource {
    files: WeightFiles,
    quantization: QuantConfig,
    packing: Packing,
    taken: HashSet<String>,
    /// What is wrong so far, of an outline; `None` for a source that reads.
    problems: Option<Vec<String>>,
}

/// Bytes that are read at once: still in the cache when they are looked at.
const PIECE: usize = 1 << 20;

/// Tensors that a message names.
const SHOWN: usize = 8;

impl FileSource {
    /// Opens the weights of a folder.
    pub fn open(folder: &Path, quantization: QuantConfig, packing: Packing) -> Result<FileSource> {
        let files = WeightFiles::open(folder)?;
        Ok(FileSource { files, quantization, packing, taken: HashSet::new(), problems: None })
    }

    /// Opens the weights of a folder to look at their names, shapes and types only.
    pub fn outline(folder: &Path, quantization: QuantConfig) -> Result<FileSource> {
        let source = FileSource::open(folder, quantization, Packing::Quantized)?;
        Ok(FileSource { problems: Some(Vec::new()), ..source })
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

    /// Bytes of the largest tensor, which is in memory twice while it is repacked.
    pub fn largest(&self) -> u64 {
        self.files.iter().map(|weight| weight.byte_len() as u64).max().unwrap_or(0)
    }

    /// Fails if a tensor was missing or is not what the configuration describes, or if one was not taken.
    pub fn finish(self) -> Result<()> {
        // Older Llama files carry the rotary table, which is computed here.
        let known = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
        let left: Vec<&str> =
            self.files.names().filter(|name| !self.taken.contains(*name) && !known(name)).collect();
        let mut problems = self.problems.unwrap_or_default();
        if !left.is_empty() {
            problems.push(format!("{} tensors have no place in this model: {}", left.len(), listed(&left)));
        }
        if problems.is_empty() {
            return Ok(());
        }
        let more = match problems.len().saturating_sub(SHOWN) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        problems.truncate(SHOWN);
        Err(Error::BadFile {
            path: self.files.path().to_path_buf(),
            message: problems.join("; ") + &more,
            todo:
                "config.json does not describe these weights: check that they belong together, or fetch the \
                   model again"
                    .to_string(),
        })
    }

    /// Fails at once, or notes the failure and goes on with a placeholder of this shape.
    fn wrong(&mut self, name: &str, problem: String, shape: &[usize]) -> Result<Array> {
        match &mut self.problems {
            Some(problems) => {
                problems.push(problem);
                self.taken.insert(name.to_string());
                Ok(Array::zeros(shape, Dtype::F32))
            }
            None => Err(Error::bad_file(self.files.path(), problem)),
        }
    }

    fn read(&mut self, name: &str, shapes: &[&[usize]], kind: Kind) -> Result<Array> {
        let Some(weight) = self.files.get(name) else {
            return self.wrong(name, format!("the tensor {name} is missing"), shapes[0]);
        };
        let (shape, stored) = (weight.shape(), weight.dtype());
        if !shapes.contains(&shape) {
            let expected: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
            let problem =
                format!("tensor {name} should have the shape {}, it has {shape:?}", expected.join(" or "));
            return self.wrong(name, problem, shapes[0]);
        }
        let Some(dtype) = dtype_from_file(stored).filter(|dtype| kind.allows(*dtype)) else {
            let problem = format!("tensor {name} should hold {}, it holds {stored}", kind.name());
            return self.wrong(name, problem, shapes[0]);
        };
        if self.problems.is_some() {
            let placeholder = Array::zeros(shape, dtype);
            self.taken.insert(name.to_string());
            return Ok(placeholder);
        }
        let array = read_finite(&weight, dtype)?;
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
        let weight = format!("{path}.weight");
        if !inputs.is_multiple_of(spec.group_size) {
            let problem =
                format!("{weight} has rows of {inputs}, which are no groups of {}", spec.group_size);
            return self.wrong(&weight, problem, &[out, inputs]);
        }
        let groups = inputs / spec.group_size;
        let words = self.read(&weight, &[&[out, inputs * spec.bits / 32]], Kind::Words)?;
        let scales = self.read(&format!("{path}.scales"), &[&[out, groups]], Kind::Float)?;
        let biases = self.read(&format!("{path}.biases"), &[&[out, groups]], Kind::Float)?;
        if scales.dtype() != biases.dtype() {
            let problem = format!("{path} has scales of {} and biases of {}", scales.dtype(), biases.dtype());
            return self.wrong(&weight, problem, &[out, inputs]);
        }
        if self.problems.is_some() {
            return Ok(Array::zeros(&[out, inputs], scales.dtype()));
        }
        let packed =
            PackedWeight::from_mlx(&Quantized { words, scales, biases }, spec.bits, spec.group_size)?;
        Ok(Array::from_packed(packed))
    }
}

/// The values of a tensor, of which each must be a number: the damage of a file that can be told from what is in it.
pub(crate) fn read_finite(weight: &Weight, dtype: Dtype) -> Result<Array> {
    Array::from_fill(weight.shape(), dtype, |bytes| {
        for (number, piece) in bytes.chunks_mut(PIECE).enumerate() {
            let start = number * PIECE;
            weight.read_range(start, piece)?;
            if let Some(at) = not_finite(piece, dtype) {
                return Err(Error::BadFile {
                    path: weight.path().to_path_buf(),
                    message: format!(
                        "tensor {} of shape {:?} holds NaN or infinity, first at element {}",
                        weight.name(),
                        weight.shape(),
                        start / dtype.size() + at
                    ),
                    todo: "the file is damaged: fetch it again".to_string(),
                });
            }
        }
        Ok(())
    })
}

/// What a tensor may hold.
#[derive(Clone, Copy)]
enum Kind {
    Float,
    /// Codes of quantized weights.
    Words,
}

impl Kind {
    fn allows(self, dtype: Dtype) -> bool {
        match self {
            Kind::Float => matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16),
            Kind::Words => dtype == Dtype::U32,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Float => "F32, F16 or BF16",
            Kind::Words => "U32",
        }
    }
}

/// The first element of these bytes that is NaN or infinite: whose exponent has all bits set.
pub(crate) fn not_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> {
    // Looked at without branches first, which is done at the speed of memory.
    macro_rules! find {
        ($uint:ty, $exponent:literal) => {{
            let bad = |piece: &[u8]| {
                let bits = <$uint>::from_le_bytes(piece.try_into().expect("pieces of this size"));
                bits & $exponent == $exponent
            };
            const SIZE: usize = size_of::<$uint>();
            match bytes.chunks_exact(SIZE).fold(false, |any, piece| any | bad(piece)) {
                true => bytes.chunks_exact(SIZE).position(bad),
                false => None,
            }
        }};
    }
    match dtype {
        Dtype::F32 => find!(u32, 0x7f80_0000),
        Dtype::F16 => find!(u16, 0x7c00),
        Dtype::BF16 => find!(u16, 0x7f80),
        _ => None,
    }
}

fn listed(names: &[&str]) -> String {
    let more = match names.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ") + &more
}

impl Source for FileSource {
    fn has(&self, name: &str) -> bool {
        self.files.contains(name)
    }

    fn tensor_any(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Array> {
        self.read(name, shapes, Kind::Float)
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
        let plain = self.read(&format!("{path}.weight"), &[&[out, inputs]], Kind::Float)?;
        match self.packing {
            Packing::Frozen => Ok(Array::from_packed(PackedWeight::from_float(&plain)?)),
            Packing::Quantized => Ok(plain),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_found() {
        let mut values: Vec<f32> = (0..1000).map(|i| i as f32 * 1e30).collect();
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        assert_eq!(not_finite(&bytes(&values), Dtype::F32), None);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[777] = bad;
            assert_eq!(not_finite(&bytes(&values), Dtype::F32), Some(777), "{bad}");
        }
        let halves = |bits: u16| [0x3c00u16, bits].iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<u8>>();
        for (dtype, bits, expected) in [
            (Dtype::F16, 0x7bff, None),
            (Dtype::F16, 0xfc00, Some(1)),
            (Dtype::BF16, 0x7f7f, None),
            (Dtype::BF16, 0xffc0, Some(1)),
            (Dtype::U32, 0xffff, None),
        ] {
            assert_eq!(not_finite(&halves(bits), dtype), expected, "{dtype} {bits:x}");
        }
    }
}
