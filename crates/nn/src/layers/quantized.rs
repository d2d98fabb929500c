//! Quantized weights: how, and what they are called in files.

use mica_array::quantized::{QuantMode, QuantSpec, QuantizedArray};
use mica_array::{Array, PackedWeight, Result};

use super::invalid;
use crate::{Module, join, load_parameters, parameters};

/// A weight [out, in], quantized and packed for the kernels.
pub(super) fn pack(weight: &Array, format: QuantSpec) -> Result<Array> {
    Ok(Array::from_packed(PackedWeight::quantize(weight, format)?))
}

/// What files call the parts of a weight: the first two if its codes need no biases.
const PARTS: [&str; 3] = ["weight", "scales", "biases"];

/// The parameters as files hold them: a quantized weight `x.weight` is `x.weight`, `x.scales` and, if affine,
/// `x.biases`, as MLX writes it. Other packed weights are plain.
pub fn file_parameters<M: Module + ?Sized>(module: &M) -> Result<Vec<(String, Array)>> {
    let mut list = Vec::new();
    for (name, array) in parameters(module) {
        match array.packed().filter(|packed| packed.quantization().is_some()) {
            Some(packed) => {
                let QuantizedArray { words, scales, biases, .. } = packed.to_mlx()?;
                let parts = PARTS.map(|part| part_name(&name, part)).into_iter();
                list.extend(parts.zip([Some(words), Some(scales), biases].into_iter().flatten()));
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
        let Some(format) = array.packed().and_then(|packed| packed.quantization()) else {
            continue;
        };
        let names = if format.mode() == QuantMode::Affine { &PARTS[..] } else { &PARTS[..2] };
        let mut parts = Vec::new();
        for part in names {
            let part = part_name(&name, part);
            if let Some(at) = left.iter().position(|(other, _)| *other == part) {
                parts.push(left.remove(at).1);
            }
        }
        match parts.as_slice() {
            [words, scales, biases @ ..] if parts.len() == names.len() => {
                let biases = biases.first().cloned();
                let quantized = QuantizedArray::new(words.clone(), scales.clone(), biases, format, None)?;
                packed.push((name, Array::from_packed(PackedWeight::from_mlx(&quantized)?)));
            }
            [] if !strict => {}
            some => {
                let needed: Vec<String> = names.iter().map(|part| part_name(&name, part)).collect();
                let (needed, count) = (needed.join(", "), some.len());
                let message = format!("{name} is quantized and needs {needed}; {count} of them are given");
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
