//! MLX's micro-scaled formats `mxfp4`, `mxfp8` and `nvfp4`: small floats in groups with a scale of one
//! byte and no bias, bit for bit.
//!
//! The scale is the group's largest magnitude over the format's largest value (6 or 448): rounded up to
//! a power of two, or for `nvfp4` to e4m3. `nvfp4` may have one more scale for the whole array, its
//! largest magnitude g; then scales count in units of g / (448 · 6).

use crate::minifloat::{E2M1, from_e4m3, from_e8m0, to_e2m1, to_e4m3, to_e8m0};
use crate::{CodecError, Float, bits};

/// A micro-scaled format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MicroMode {
    /// e2m1 in groups of 32, scales e8m0.
    Mxfp4,
    /// e4m3 in groups of 32, scales e8m0.
    Mxfp8,
    /// e2m1 in groups of 16, scales e4m3.
    Nvfp4,
}

impl MicroMode {
    /// The name, as MLX has it.
    pub fn name(self) -> &'static str {
        match self {
            MicroMode::Mxfp4 => "mxfp4",
            MicroMode::Mxfp8 => "mxfp8",
            MicroMode::Nvfp4 => "nvfp4",
        }
    }

    /// Bits per value.
    pub fn bits(self) -> usize {
        if self == MicroMode::Mxfp8 { 8 } else { 4 }
    }

    /// Values per group.
    pub fn group_size(self) -> usize {
        if self == MicroMode::Nvfp4 { 16 } else { 32 }
    }

    fn largest(self) -> f32 {
        if self == MicroMode::Mxfp8 { 448.0 } else { 6.0 }
    }

    fn encode_scale(self, scale: f32) -> u8 {
        if self == MicroMode::Nvfp4 { to_e4m3(scale) } else { to_e8m0(scale) }
    }

    fn decode_scale(self, code: u8) -> f32 {
        if self == MicroMode::Nvfp4 { from_e4m3(code) } else { from_e8m0(code) }
    }

    fn encode(self, value: f32) -> u8 {
        if self == MicroMode::Mxfp8 { to_e4m3(value) } else { to_e2m1(value) }
    }

    fn decode(self, code: u8) -> f32 {
        if self == MicroMode::Mxfp8 { from_e4m3(code) } else { E2M1[usize::from(code)] }
    }

    /// Checks lengths: whole groups, their words and scales.
    fn check(self, values: usize, words: usize, scales: usize) -> Result<(), CodecError> {
        let group = self.group_size();
        if !values.is_multiple_of(group) {
            return Err(CodecError::Columns { columns: values, group_size: group });
        }
        for (what, expected, got) in
            [("words", values * self.bits() / 32, words), ("scales", values / group, scales)]
        {
            if expected != got {
                return Err(CodecError::Length { what, expected, got });
            }
        }
        Ok(())
    }
}

/// Quantizes whole groups. `global` is the scale of the whole array, for `nvfp4`.
pub fn quantize<T: Float>(
    values: &[T],
    mode: MicroMode,
    global: Option<f32>,
    words: &mut [u32],
    scales: &mut [u8],
) -> Result<(), CodecError> {
    mode.check(values.len(), words.len(), scales.len())?;
    let group = mode.group_size();
    let unit = global.map(|global| (448.0 * 6.0) / global);
    let mut codes = [0u8; 32];
    let codes = &mut codes[..group];
    let groups = values.chunks_exact(group).zip(words.chunks_exact_mut(group * mode.bits() / 32));
    for (index, ((values, words), code)) in groups.zip(scales).enumerate() {
        let mut largest = 0f32;
        for (at, value) in values.iter().enumerate() {
            let value = value.to_f32();
            if !value.is_finite() {
                return Err(CodecError::NotFinite { position: index * group + at, value: value.to_string() });
            }
            largest = largest.max(value.abs());
        }
        let scale = largest / mode.largest() * unit.unwrap_or(1.0);
        *code = mode.encode_scale(scale);
        let scale = mode.decode_scale(*code);
        for (code, value) in codes.iter_mut().zip(values) {
            // A scale that rounded to zero stands for values that do.
            let scaled = if scale == 0.0 { 0.0 } else { value.to_f32() * unit.unwrap_or(1.0) / scale };
            *code = mode.encode(scaled);
        }
        bits::pack(codes, mode.bits(), words);
    }
    Ok(())
}

/// The values of whole groups, rounded to `T` once.
pub fn dequantize<T: Float>(
    words: &[u32],
    scales: &[u8],
    mode: MicroMode,
    global: Option<f32>,
    values: &mut [T],
) -> Result<(), CodecError> {
    mode.check(values.len(), words.len(), scales.len())?;
    let group = mode.group_size();
    let unit = global.map_or(1.0, |global| global / (448.0 * 6.0));
    let mut codes = [0u8; 32];
    let codes = &mut codes[..group];
    let groups = values.chunks_exact_mut(group).zip(words.chunks_exact(group * mode.bits() / 32));
    for ((values, words), &scale) in groups.zip(scales) {
        bits::unpack(words, mode.bits(), codes);
        let scale = mode.decode_scale(scale) * unit;
        for (value, &code) in values.iter_mut().zip(codes.iter()) {
            *value = T::from_f32(mode.decode(code) * scale);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_values_that_do_not_fit_are_refused() {
        let (mut words, mut scales) = (vec![0; 4], vec![0; 1]);
        assert!(quantize(&[1f32; 31], MicroMode::Mxfp4, None, &mut words, &mut scales).is_err());
        assert!(quantize(&[1f32; 32], MicroMode::Mxfp8, None, &mut words, &mut scales).is_err());
        let mut values = [1f32; 32];
        values[5] = f32::NAN;
        let error = quantize(&values, MicroMode::Mxfp4, None, &mut words, &mut scales).unwrap_err();
        assert!(matches!(error, CodecError::NotFinite { position: 5, .. }), "{error}");
    }
}
