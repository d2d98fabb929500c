//! GGUF, as MLX reads and writes it: plain tensors as they are, blocks of Q4_0, Q4_1 and Q8_0 as affine
//! words, scales and biases (`x.weight`, `x.scales`, `x.biases`). And matrices of all kinds that kernels read, packed for
//! them.

use std::ops::Range;
use std::path::Path;

use half::f16;
use mica_codec::gguf::{GgufBlock, Groups};
use mica_io::gguf::{BlockType, Gguf, GgufTensor, GgufWriter, Value};

use super::file_error;
use crate::{Array, Dtype, Error, PackedWeight, Result};

/// Named arrays, and the metadata.
pub type GgufContent = (Vec<(String, Array)>, Vec<(String, Value)>);

/// All tensors of a GGUF file, in the file's order, and its metadata.
pub fn load_gguf(path: impl AsRef<Path>) -> Result<GgufContent> {
    let fail = file_error("load_gguf");
    let file = Gguf::open(path).map_err(&fail)?;
    let mut arrays = Vec::new();
    for tensor in file.tensors() {
        let name = tensor.name();
        if let Some(dtype) = plain(tensor.block_type()) {
            let array = Array::from_fill(tensor.shape(), dtype, |bytes| {
                file.read_into(tensor, bytes).map_err(&fail)
            })?;
            arrays.push((name.to_string(), array));
            continue;
        }
        let bytes = file.read(name).map_err(&fail)?;
        let [words, scales, biases] = quantized(tensor, &bytes)?;
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        arrays.push((name.to_string(), words));
        arrays.push((format!("{stem}.scales"), scales));
        arrays.push((format!("{stem}.biases"), biases));
    }
    Ok((arrays, file.metadata().to_vec()))
}

fn plain(kind: BlockType) -> Option<Dtype> {
    Some(match kind {
        BlockType::F32 => Dtype::F32,
        BlockType::F16 => Dtype::F16,
        BlockType::BF16 => Dtype::BF16,
        BlockType::F64 => Dtype::F64,
        BlockType::I8 => Dtype::I8,
        BlockType::I16 => Dtype::I16,
        BlockType::I32 => Dtype::I32,
        BlockType::I64 => Dtype::I64,
        _ => return None,
    })
}

/// Words, scales and biases (f16, groups of 32) of a tensor of blocks.
fn quantized(tensor: &GgufTensor, bytes: &[u8]) -> Result<[Array; 3]> {
    let (kind, shape) = (tensor.block_type(), tensor.shape());
    let block = match (kind, GgufBlock::from_name(kind.name())) {
        (BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q8_0, Some(block)) => block,
        (other, _) => {
            return Err(Error::unsupported(
                "load_gguf",
                format!(
                    "{}: blocks of {other}; read are F32, F16, BF16, F64, integers, Q4_0, Q4_1 and Q8_0",
                    tensor.name()
                ),
            ));
        }
    };
    let (bits, blocks) = (block.bits(), bytes.len() / block.bytes());
    let (mut words, mut scales, mut biases) =
        (vec![0u32; blocks * bits], Vec::with_capacity(blocks), Vec::with_capacity(blocks));
    let mut groups = Groups::default();
    for (bytes, words) in bytes.chunks_exact(block.bytes()).zip(words.chunks_exact_mut(bits)) {
        block.take_apart(bytes, &mut groups);
        mica_codec::bits::pack(&groups.codes[..32], bits, words);
        let (scale, centre) = (groups.scales[0], block.centre().map(f32::from));
        scales.push(f16::from_f32(scale));
        biases.push(f16::from_f32(centre.map_or(groups.biases[0], |centre| -centre * scale)));
    }
    let last = |per: usize, of: usize| -> Vec<usize> {
        let mut shape = shape.to_vec();
        if let Some(size) = shape.last_mut() {
            *size = *size / of * per;
        }
        shape
    };
    Ok([
        Array::from_slice(&words, &last(bits, 32))?,
        Array::from_slice(&scales, &last(1, 32))?,
        Array::from_slice(&biases, &last(1, 32))?,
    ])
}

/// A matrix of a GGUF file, packed for products as it is read: floats, or blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K,
/// Q5_K, Q6_K and MXFP4.
///
/// ```no_run
/// # fn main() -> mica_array::Result<()> {
/// use mica_array::{Array, Precision, files};
/// let file = files::open_gguf("model.gguf")?;
/// let weight = Array::from_packed(files::pack_gguf(&file, "blk.0.attn_q.weight")?);
/// let y = Array::zeros(&[1, weight.dim(1)], mica_array::Dtype::F32).linear(&weight, None, Precision::Fast)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A tensor that is missing, no matrix or of another kind, and a block whose scale is NaN or infinite. Plain floats are
/// taken as they are.
pub fn pack_gguf(file: &Gguf, name: &str) -> Result<PackedWeight> {
    let fail = file_error("pack_gguf");
    let tensor = file.require(name).map_err(&fail)?;
    let kind = tensor.block_type();
    let &[out, inner] = tensor.shape() else {
        return Err(Error::invalid("pack_gguf", format!("{name} is no matrix: {:?}", tensor.shape())));
    };
    let read = |rows: Range<usize>, into: &mut [u8]| -> Result<()> {
        let row = into.len() / rows.len().max(1);
        file.read_range(tensor, rows.start * row, into).map_err(&fail)
    };
    if let Some(dtype) = plain(kind).filter(|dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)) {
        return PackedWeight::read_float([out, inner], dtype, read);
    }
    match GgufBlock::from_name(kind.name()) {
        Some(block) => PackedWeight::read_gguf([out, inner], block, read).map_err(|error| {
            let text = error.to_string();
            let text = text.strip_prefix("[quantized_weight] ").unwrap_or(&text);
            Error::invalid("pack_gguf", format!("{}: tensor {name}: {text}", file.path().display()))
        }),
        None => {
            let known: Vec<&str> = GgufBlock::ALL.iter().map(|block| block.name()).collect();
            let message =
                format!("{name}: blocks of {kind}; packed are F32, F16, BF16, {}", known.join(", "));
            Err(Error::unsupported("pack_gguf", message))
        }
    }
}

/// Opens a GGUF file for [`pack_gguf`]: reads its list of tensors and its metadata.
pub fn open_gguf(path: impl AsRef<Path>) -> Result<Gguf> {
    Gguf::open(path).map_err(file_error("open_gguf"))
}

/// Writes arrays and metadata to a GGUF file, atomically. GGUF has no bool, unsigned or complex tensors.
pub fn save_gguf(
    path: impl AsRef<Path>,
    arrays: &[(String, Array)],
    metadata: &[(String, Value)],
) -> Result<()> {
    crate::eval(&arrays.iter().map(|(_, array)| array.clone()).collect::<Vec<_>>())?;
    let mut writer = GgufWriter::new();
    for (key, value) in metadata {
        writer.metadata(key.clone(), value.clone());
    }
    for (name, array) in arrays {
        let kind = match array.dtype() {
            Dtype::F32 => BlockType::F32,
            Dtype::F16 => BlockType::F16,
            Dtype::BF16 => BlockType::BF16,
            Dtype::F64 => BlockType::F64,
            Dtype::I8 => BlockType::I8,
            Dtype::I16 => BlockType::I16,
            Dtype::I32 => BlockType::I32,
            Dtype::I64 => BlockType::I64,
            other => return Err(Error::unsupported("save_gguf", format!("{name}: GGUF has no {other}"))),
        };
        let array = array.clone();
        let shape = array.shape().to_vec();
        writer.stream(name.clone(), kind, &shape, move |out| {
            array.with_bytes(|bytes| out.write_all(bytes))??;
            Ok(())
        });
    }
    writer.write(path).map_err(file_error("save_gguf"))
}
