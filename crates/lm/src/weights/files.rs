//! Parameters from a model folder: Hugging Face's, or one that MLX quantized.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use mica_array::files::dtype_from_file;
use mica_array::{Array, Dtype, PackedWeight, Part};
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

/// Bytes that a thread reads at once: still in its cache when they are looked at.
const PIECE: usize = 256 << 10;

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

    /// Fails at once; an outline notes the failure and goes on.
    fn wrong(&mut self, name: &str, problem: String) -> Result<()> {
        match &mut self.problems {
            Some(problems) => {
                problems.push(problem);
                self.taken.insert(name.to_string());
                Ok(())
            }
            None => Err(Error::bad_file(self.files.path(), problem)),
        }
    }

    fn is_outline(&self) -> bool {
        self.problems.is_some()
    }

    /// The dtype of a tensor that is there, has one of these shapes and holds what it should. `None` is something
    /// wrong that an outline has noted.
    fn take(&mut self, name: &str, shapes: &[&[usize]], kind: Kind) -> Result<Option<Dtype>> {
        let Some(weight) = self.files.get(name) else {
            self.wrong(name, format!("the tensor {name} is missing"))?;
            return Ok(None);
        };
        let (shape, stored) = (weight.shape(), weight.dtype());
        if !shapes.contains(&shape) {
            let expected: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
            let problem =
                format!("tensor {name} should have the shape {}, it has {shape:?}", expected.join(" or "));
            self.wrong(name, problem)?;
            return Ok(None);
        }
        let Some(dtype) = dtype_from_file(stored).filter(|dtype| kind.allows(*dtype)) else {
            let problem = format!("tensor {name} should hold {}, it holds {stored}", kind.name());
            self.wrong(name, problem)?;
            return Ok(None);
        };
        self.taken.insert(name.to_string());
        Ok(Some(dtype))
    }

    /// A tensor that [`FileSource::take`] has found.
    fn taken(&self, name: &str) -> Weight<'_> {
        self.files.get(name).expect("it was found")
    }

    fn quantized(&mut self, path: &str, spec: QuantSpec, out: usize, inputs: usize) -> Result<Array> {
        let affine = spec.mode() == QuantMode::Affine;
        let names: Vec<String> = ["weight", "scales", "biases"]
            .iter()
            .take(if affine { 3 } else { 2 })
            .map(|part| format!("{path}.{part}"))
            .collect();
        let weight = &names[0];
        let Ok(groups) = spec.groups(inputs) else {
            let problem =
                format!("{weight} has rows of {inputs}, which are no groups of {}", spec.group_size());
            self.wrong(weight, problem)?;
            return Ok(Array::zeros(&[out, inputs], Dtype::F32));
        };
        let scale = if affine { Kind::Float } else { Kind::Bytes };
        let mut found = Vec::new();
        for (part, name) in names.iter().enumerate() {
            let (width, kind) = if part == 0 { (spec.words(inputs), Kind::Words) } else { (groups, scale) };
            found.push(self.take(name, &[&[out, width]], kind)?);
        }
        if let [_, Some(scales), Some(biases)] = found[..]
            && scales != biases
        {
            self.wrong(weight, format!("{path} has scales of {scales} and biases of {biases}"))?;
        }
        if self.is_outline() {
            let dtype = found[1].filter(|dtype| dtype.is_float());
            return Ok(Array::zeros(
                &[out, inputs],
                dtype.unwrap_or(if affine { Dtype::F32 } else { Dtype::BF16 }),
            ));
        }
        let parts: Vec<(Weight, Dtype)> = names
            .iter()
            .zip(found)
            .map(|(name, dtype)| (self.taken(name), dtype.expect("only an outline goes on without one")))
            .collect();
        let read = |part: Part, rows: Range<usize>, into: &mut [u8]| {
            let (weight, dtype) = &parts[part as usize];
            read_rows(weight, *dtype, rows, into)
        };
        let packed = PackedWeight::read_mlx([out, inputs], spec, parts[1].1, read)
            .map_err(|error| bad_codes(self.files.path(), path, error))?;
        Ok(Array::from_packed(packed))
    }
}

/// The values of a tensor, of which each must be a number: the damage of a file that can be told from what is in it.
pub(crate) fn read_finite(weight: &Weight, dtype: Dtype) -> Result<Array> {
    Array::from_pieces(weight.shape(), dtype, PIECE, |start, piece| read_range(weight, dtype, start, piece))
}

/// Some rows of a matrix, checked as by [`read_finite`].
fn read_rows(weight: &Weight, dtype: Dtype, rows: Range<usize>, into: &mut [u8]) -> Result<()> {
    let row = into.len() / rows.len().max(1);
    read_range(weight, dtype, rows.start * row, into)
}

fn read_range(weight: &Weight, dtype: Dtype, start: usize, into: &mut [u8]) -> Result<()> {
    weight.read_range(start, into)?;
    let Some(at) = not_finite(into, dtype) else {
        return Ok(());
    };
    Err(Error::BadFile {
        path: weight.path().to_path_buf(),
        message: format!(
            "tensor {} of shape {:?} holds NaN or infinity, first at element {}",
            weight.name(),
            weight.shape(),
            start / dtype.size() + at
        ),
        todo: DAMAGED.to_string(),
    })
}

const DAMAGED: &str = "the file is damaged: fetch it again";

/// Says where codes are that no weight can be made of.
pub(crate) fn bad_codes(file: &Path, module: &str, error: Error) -> Error {
    match error {
        Error::Array(mica_array::Error::Invalid { message, .. }) => Error::BadFile {
            path: file.to_path_buf(),
            message: format!("{module}.{message}"),
            todo: DAMAGED.to_string(),
        },
        other => other,
    }
}

/// What a tensor may hold.
#[derive(Clone, Copy)]
enum Kind {
    Float,
    /// Codes of quantized weights.
    Words,
    /// Their scales, where these are codes too.
    Bytes,
}

impl Kind {
    fn allows(self, dtype: Dtype) -> bool {
        match self {
            Kind::Float => matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16),
            Kind::Words => dtype == Dtype::U32,
            Kind::Bytes => dtype == Dtype::U8,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Float => "F32, F16 or BF16",
            Kind::Words => "U32",
            Kind::Bytes => "U8",
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
        match self.take(name, shapes, Kind::Float)? {
            None => Ok(Array::zeros(shapes[0], Dtype::F32)),
            Some(dtype) if self.is_outline() => Ok(Array::zeros(self.taken(name).shape(), dtype)),
            Some(dtype) => read_finite(&self.taken(name), dtype),
        }
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
        let name = format!("{path}.weight");
        if self.is_outline() || self.packing == Packing::Quantized {
            return self.tensor(&name, &[out, inputs]);
        }
        let dtype = self.take(&name, &[&[out, inputs]], Kind::Float)?;
        let dtype = dtype.expect("only an outline goes on without one");
        let weight = self.taken(&name);
        let read = |rows: Range<usize>, into: &mut [u8]| read_rows(&weight, dtype, rows, into);
        Ok(Array::from_packed(PackedWeight::read_float([out, inputs], dtype, read)?))
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
