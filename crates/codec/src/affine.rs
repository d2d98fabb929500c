//! MLX's running affine quantizer (`mx.quantize`, mode `affine`), bit for bit.
//!
//! Per group, in f32: s = max((max - min) / n, 1e-7) with n = 2^bits - 1, positive iff
//! |min| > |max|; edge is the end of larger magnitude; q0 = rint(edge / s). If q0 is not zero,
//! s = edge / q0 and b = edge, so that the larger end is met exactly; else b = 0. Codes are
//! clamp(rint((w - b) / s), 0, n) with the unrounded s and b, which are rounded to the source type
//! last. With one bit s = max(max - min, 1e-7) and b = min.
//!
//! Checked against `mlx` 0.32 by tests/affine_golden.rs.

use crate::{CodecError, Float, QuantSpec, bits};

/// The smallest scale.
const EPSILON: f32 = 1e-7;

/// The scale, the bias and the codes of one group, in f32.
///
/// `codes` gets one code per value. Values must be finite.
pub fn quantize_group(values: &[f32], bits: usize, codes: &mut [u8]) -> (f32, f32) {
    debug_assert_eq!(values.len(), codes.len());
    let largest = ((1u32 << bits) - 1) as f32;
    // Of zeros the first, as MLX has it: `f32::min` may take either, and does so by processor.
    let min = values.iter().copied().fold(f32::INFINITY, |min, value| if value < min { value } else { min });
    let max =
        values.iter().copied().fold(f32::NEG_INFINITY, |max, value| if value > max { value } else { max });
    let (scale, bias) = if bits == 1 {
        ((max - min).max(EPSILON), min)
    } else {
        let magnitude = ((max - min) / largest).max(EPSILON);
        let (scale, edge) = if min.abs() > max.abs() { (magnitude, min) } else { (-magnitude, max) };
        let steps = (edge / scale).round_ties_even();
        if steps != 0.0 { (edge / steps, edge) } else { (scale, 0.0) }
    };
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = ((value - bias) / scale).round_ties_even().clamp(0.0, largest) as u8;
    }
    (scale, bias)
}

/// Quantizes rows of `columns` values each.
///
/// `words` gets `spec.words(columns)` words a row, `scales` and `biases` one value per group.
/// NaN and infinities are refused, with their position.
pub fn quantize<T: Float>(
    values: &[T],
    columns: usize,
    spec: QuantSpec,
    words: &mut [u32],
    scales: &mut [T],
    biases: &mut [T],
) -> Result<(), CodecError> {
    check(values.len(), columns, spec, words.len(), scales.len(), biases.len())?;
    let (bits, group) = (spec.bits(), spec.group_size());
    let (mut floats, mut codes) = ([0f32; 128], [0u8; 128]);
    let (floats, codes) = (&mut floats[..group], &mut codes[..group]);
    let groups = values.chunks_exact(group).zip(words.chunks_exact_mut(spec.words(group)));
    for (index, ((values, words), (scale, bias))) in groups.zip(scales.iter_mut().zip(biases)).enumerate() {
        for (at, (float, value)) in floats.iter_mut().zip(values).enumerate() {
            *float = value.to_f32();
            if !float.is_finite() {
                return Err(CodecError::NotFinite { position: index * group + at, value: float.to_string() });
            }
        }
        let (s, b) = quantize_group(floats, bits, codes);
        (*scale, *bias) = (T::from_f32(s), T::from_f32(b));
        bits::pack(codes, bits, words);
    }
    Ok(())
}

/// The values of quantized rows, as `mx.dequantize` gives them: T(T(q·s) + b), each operation
/// rounded to the scales' type.
pub fn dequantize<T: Float>(
    words: &[u32],
    scales: &[T],
    biases: &[T],
    columns: usize,
    spec: QuantSpec,
    values: &mut [T],
) -> Result<(), CodecError> {
    check(values.len(), columns, spec, words.len(), scales.len(), biases.len())?;
    let group = spec.group_size();
    let mut codes = [0u8; 128];
    let codes = &mut codes[..group];
    let groups = values.chunks_exact_mut(group).zip(words.chunks_exact(spec.words(group)));
    for ((values, words), (scale, bias)) in groups.zip(scales.iter().zip(biases)) {
        bits::unpack(words, spec.bits(), codes);
        for (value, &code) in values.iter_mut().zip(codes.iter()) {
            *value = dequantize_value(code, *scale, *bias);
        }
    }
    Ok(())
}

/// One value of [`dequantize`].
#[inline(always)]
pub fn dequantize_value<T: Float>(code: u8, scale: T, bias: T) -> T {
    let product = T::from_f32(f32::from(code) * scale.to_f32());
    T::from_f32(product.to_f32() + bias.to_f32())
}

fn check(
    values: usize,
    columns: usize,
    spec: QuantSpec,
    words: usize,
    scales: usize,
    biases: usize,
) -> Result<(), CodecError> {
    let groups = spec.groups(columns)?;
    let rows = values / columns;
    for (what, expected, got) in [
        ("values", rows * columns, values),
        ("words", rows * spec.words(columns), words),
        ("scales", rows * groups, scales),
        ("biases", rows * groups, biases),
    ] {
        if expected != got {
            return Err(CodecError::Length { what, expected, got });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use mica_testkit::Rng;

    #[test]
    fn the_published_example() {
        let values: Vec<f32> = (0..32).map(|i| i as f32).collect();
        let spec = QuantSpec::affine(4, 32).unwrap();
        let (mut words, mut scales, mut biases) = ([0; 4], [0f32; 1], [0f32; 1]);
        quantize(&values, 32, spec, &mut words, &mut scales, &mut biases).unwrap();
        assert_eq!((scales[0], biases[0], words[0]), (-31.0 / 15.0, 31.0, 0xccdd_eeff));
    }

    #[test]
    fn edge_cases_by_hand() {
        let cases: &[(&str, usize, [f32; 2], f32, f32, [u8; 2])] = &[
            ("all zero", 4, [0.0, 0.0], -1e-7, 0.0, [0, 0]),
            ("one bit", 1, [-1.0, 3.0], 4.0, -1.0, [0, 1]),
            ("one bit, constant", 1, [2.0, 2.0], 1e-7, 2.0, [0, 0]),
            ("constant", 2, [1.5, 1.5], 1.5 / -15_000_000.0, 1.5, [0, 0]),
            ("negative end wins", 2, [-3.0, 1.0], 1.5, -3.0, [0, 3]),
            ("a tie goes to the positive end", 8, [-1.0, 1.0], 1.0 / -127.0, 1.0, [254, 0]),
        ];
        for (name, bits, ends, scale, bias, expected) in cases {
            let mut values = [ends[0]; 32];
            values[1] = ends[1];
            let mut codes = [9; 32];
            let (s, b) = quantize_group(&values, *bits, &mut codes);
            assert_eq!((s, b, &codes[..2]), (*scale, *bias, &expected[..]), "{name}");
        }
    }

    fn refuses<T: Float>(name: &str, bad: f32) {
        let mut values = vec![T::from_f32(1.0); 128];
        values[70] = T::from_f32(bad);
        let spec = QuantSpec::affine(4, 64).unwrap();
        let (mut s, mut b) = (vec![values[0]; 2], vec![values[0]; 2]);
        let error = quantize(&values, 128, spec, &mut [0; 16], &mut s, &mut b).unwrap_err();
        assert!(matches!(error, CodecError::NotFinite { position: 70, .. }), "{name}: {error}");
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            refuses::<f32>("f32", bad);
            refuses::<bf16>("bf16", bad);
            refuses::<f16>("f16", bad);
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let spec = QuantSpec::affine(4, 64).unwrap();
        for (name, values, columns, words, scales, biases) in [
            ("columns", 96, 96, 12, 1, 1),
            ("no columns", 0, 0, 0, 0, 0),
            ("part of a row", 200, 128, 16, 2, 2),
            ("words", 128, 128, 15, 2, 2),
            ("scales", 128, 128, 16, 3, 2),
            ("biases", 128, 128, 16, 2, 1),
        ] {
            let (mut w, mut s, mut b) = (vec![0; words], vec![0f32; scales], vec![0f32; biases]);
            let mut x = vec![0f32; values];
            assert!(quantize(&x, columns, spec, &mut w, &mut s, &mut b).is_err(), "{name}");
            assert!(dequantize(&w, &s, &b, columns, spec, &mut x).is_err(), "{name}");
        }
    }

    #[test]
    fn the_error_of_a_value_is_at_most_one_step() {
        let mut rng = Rng::new(2);
        for bits in [1, 2, 3, 4, 5, 6, 8] {
            for group in [32, 64, 128] {
                let spec = QuantSpec::affine(bits, group).unwrap();
                let values = rng.normals(3 * 256);
                let groups = values.len() / group;
                let (mut w, mut s, mut b) =
                    (vec![0; spec.words(768)], vec![0f32; groups], vec![0f32; groups]);
                quantize(&values, 256, spec, &mut w, &mut s, &mut b).unwrap();
                let mut back = vec![f32::NAN; values.len()];
                dequantize(&w, &s, &b, 256, spec, &mut back).unwrap();
                for (i, (x, y)) in values.iter().zip(&back).enumerate() {
                    // Half a step of rounding; the far end may be clamped by another half step.
                    let step = s[i / group].abs();
                    assert!((x - y).abs() <= step * 1.0001, "{bits} bits, group {group}: {x} became {y}");
                }
            }
        }
    }
}
