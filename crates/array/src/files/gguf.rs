//! GGUF, as MLX reads and writes it: plain tensors as they are, blocks of Q4_0, Q4_1 and Q8_0 as affine
//! words, scales and biases (`x.weight`, `x.scales`, `x.biases`).

use std::path::Path;

use half::f16;
use mica_io::gguf::{BlockType, Gguf, GgufTensor, GgufWriter, Value};

use super::file_error;
use crate::{Array, Dtype, Error, Result};

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
    let bits = match kind {
        BlockType::Q4_0 | BlockType::Q4_1 => 4,
        BlockType::Q8_0 => 8,
        other => {
            return Err(Error::unsupported(
                "load_gguf",
                format!(
                    "{}: blocks of {other}; read are F32, F16, BF16, F64, integers, Q4_0, Q4_1 and Q8_0",
                    tensor.name()
                ),
            ));
        }
    };
    let size = kind.block_bytes();
    let blocks = bytes.len() / size;
    let (mut words, mut scales, mut biases) =
        (vec![0u32; blocks * bits], Vec::with_capacity(blocks), Vec::with_capacity(blocks));
    let number = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]);
    for (block, words) in bytes.chunks_exact(size).zip(words.chunks_exact_mut(bits)) {
        let scale = number(block);
        let mut codes = [0u8; 32];
        let bias = match kind {
            BlockType::Q8_0 => {
                // Signed codes: 128 more, and that much less bias.
                codes.iter_mut().zip(&block[2..]).for_each(|(code, &byte)| *code = byte ^ 0x80);
                f16::from_f32(-128.0 * scale.to_f32())
            }
            _ => {
                let nibbles = &block[size - 16..];
                for (i, &byte) in nibbles.iter().enumerate() {
                    (codes[i], codes[i + 16]) = (byte & 15, byte >> 4);
                }
                if kind == BlockType::Q4_1 {
                    number(&block[2..])
                } else {
                    f16::from_f32(-8.0 * scale.to_f32())
                }
            }
        };
        mica_codec::bits::pack(&codes, bits, words);
        scales.push(scale);
        biases.push(bias);
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
