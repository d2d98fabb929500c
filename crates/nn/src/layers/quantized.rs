//! Quantized weights: how, and what they are called in files.

use mica_array::{Array, PackedWeight, Quantized, Result};

use super::invalid;
use crate::{Module, join, load_parameters, parameters};

/// How a weight is quantized: MLX's affine codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Values that share a scale and a bias: 32, 64 or 128.
    pub group_size: usize,
    /// Of a code.
    pub bits: usize,
}

impl Default for Quantization {
    /// MLX's: 4 bits in groups of 64.
    fn default() -> Quantization {
        Quantization { group_size: 64, bits: 4 }
    }
}

impl Quantization {
    /// A weight [out, in], quantized and packed for the kernels.
    pub(super) fn pack(self, weight: &Array) -> Result<Array> {
        Ok(Array::from_packed(PackedWeight::quantize(weight, self.bits, self.group_size)?))
    }
}

const PARTS: [&str; 3] = ["weight", "scales", "biases"];

/// The parameters as files hold them: a quantized weight `x.weight` is three arrays, `x.weight`,
/// `x.scales` and `x.biases`, as MLX writes it. Other packed weights are plain.
pub fn file_parameters<M: Module + ?Sized>(module: &M) -> Result<Vec<(String, Array)>> {
    let mut list = Vec::new();
    for (name, array) in parameters(module) {
        match array.packed().filter(|packed| packed.quantization().is_some()) {
            Some(packed) => {
                let Quantized { words, scales, biases } = packed.to_mlx()?;
                let parts = PARTS.map(|part| part_name(&name, part)).into_iter();
                list.extend(parts.zip([words, scales, biases]));
            }
            None => list.push((name, array.dequantize()?)),
        }
    }
    Ok(list)
}

/// Takes what [`file_parameters`] gave. The module must be quantized as that one was.
///
/// # Errors
/// As [`load_parameters`], and if the parts of a quantized weight do not fit together.
pub fn load_file_parameters<M: Module + ?Sized>(
    module: &mut M,
    values: &[(String, Array)],
    strict: bool,
) -> Result<()> {
    let mut left: Vec<(String, Array)> = values.to_vec();
    let mut packed = Vec::new();
    for (name, array) in parameters(module) {
        let Some((bits, group_size)) = array.packed().and_then(|packed| packed.quantization()) else {
            continue;
        };
        let mut parts = Vec::new();
        for part in PARTS {
            let part = part_name(&name, part);
            if let Some(at) = left.iter().position(|(other, _)| *other == part) {
                parts.push(left.remove(at).1);
            }
        }
        let count = parts.len();
        match <[Array; 3]>::try_from(parts) {
            Ok([words, scales, biases]) => {
                let quantized = Quantized { words, scales, biases };
                let weight = PackedWeight::from_mlx(&quantized, bits, group_size)?;
                packed.push((name, Array::from_packed(weight)));
            }
            Err(_) if count == 0 && !strict => {}
            Err(_) => {
                let parts = PARTS.map(|part| part_name(&name, part)).join(", ");
                let message = format!("{name} is quantized and needs {parts}; {count} of them are given");
                return Err(invalid("load_parameters", message));
            }
        }
    }
    left.extend(packed);
    load_parameters(module, &left, strict)
}

/// `x.scales` for `x.weight`.
fn part_name(weight: &str, part: &str) -> String {
    match weight.rsplit_once('.') {
        Some((layer, _)) => join(layer, part),
        None => part.to_string(),
    }
}
