//! ggml's blocks, as GGUF files hold them: integer codes in groups with a scale, and a bias or a fixed centre.
//!
//! A value is s·q + b. In `Q4_0`, `Q5_0`, `Q8_0` and `Q6_K` b is -centre·s, in `Q4_1` and `Q5_1` it is stored. The
//! larger blocks of `Q4_K`, `Q5_K` and `Q6_K` hold 256 values and scale their groups' small integer scales once more.
//! `MXFP4` has 4-bit floats in place of integers, and powers of two as scales.

use half::f16;

use crate::minifloat::{E2M1, from_e8m0};
use crate::{CodecError, Float};

/// A kind of block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The names are ggml's.
#[allow(non_camel_case_types)]
pub enum GgufBlock {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
    MXFP4,
}

/// Most values of a block.
pub const MOST_VALUES: usize = 256;
/// Most groups of a block.
pub const MOST_GROUPS: usize = 16;

/// A block taken apart.
#[derive(Clone, Debug)]
pub struct Groups {
    /// A code per value, in order.
    pub codes: [u8; MOST_VALUES],
    /// A scale per group.
    pub scales: [f32; MOST_GROUPS],
    /// A bias per group, where they are stored.
    pub biases: [f32; MOST_GROUPS],
}

impl Default for Groups {
    fn default() -> Groups {
        Groups { codes: [0; MOST_VALUES], scales: [0.0; MOST_GROUPS], biases: [0.0; MOST_GROUPS] }
    }
}

impl GgufBlock {
    /// All kinds.
    pub const ALL: [GgufBlock; 9] = [
        GgufBlock::Q4_0,
        GgufBlock::Q4_1,
        GgufBlock::Q5_0,
        GgufBlock::Q5_1,
        GgufBlock::Q8_0,
        GgufBlock::Q4_K,
        GgufBlock::Q5_K,
        GgufBlock::Q6_K,
        GgufBlock::MXFP4,
    ];

    /// The name, as ggml has it.
    pub fn name(self) -> &'static str {
        match self {
            GgufBlock::Q4_0 => "Q4_0",
            GgufBlock::Q4_1 => "Q4_1",
            GgufBlock::Q5_0 => "Q5_0",
            GgufBlock::Q5_1 => "Q5_1",
            GgufBlock::Q8_0 => "Q8_0",
            GgufBlock::Q4_K => "Q4_K",
            GgufBlock::Q5_K => "Q5_K",
            GgufBlock::Q6_K => "Q6_K",
            GgufBlock::MXFP4 => "MXFP4",
        }
    }

    /// The kind that ggml calls `name`.
    pub fn from_name(name: &str) -> Option<GgufBlock> {
        GgufBlock::ALL.into_iter().find(|block| block.name() == name)
    }

    /// Values of a block.
    pub fn values(self) -> usize {
        match self {
            GgufBlock::Q4_K | GgufBlock::Q5_K | GgufBlock::Q6_K => 256,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            GgufBlock::Q4_0 => 18,
            GgufBlock::Q4_1 => 20,
            GgufBlock::Q5_0 => 22,
            GgufBlock::Q5_1 => 24,
            GgufBlock::Q8_0 => 34,
            GgufBlock::Q4_K => 144,
            GgufBlock::Q5_K => 176,
            GgufBlock::Q6_K => 210,
            GgufBlock::MXFP4 => 17,
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            GgufBlock::Q4_0 | GgufBlock::Q4_1 | GgufBlock::Q4_K | GgufBlock::MXFP4 => 4,
            GgufBlock::Q5_0 | GgufBlock::Q5_1 | GgufBlock::Q5_K => 5,
            GgufBlock::Q6_K => 6,
            GgufBlock::Q8_0 => 8,
        }
    }

    /// Values of a group, which have one scale.
    pub fn group_size(self) -> usize {
        if self == GgufBlock::Q6_K { 16 } else { 32 }
    }

    /// The code of zero, where no biases are stored and codes are integers.
    pub fn centre(self) -> Option<u8> {
        match self {
            GgufBlock::Q4_0 => Some(8),
            GgufBlock::Q5_0 => Some(16),
            GgufBlock::Q6_K => Some(32),
            GgufBlock::Q8_0 => Some(128),
            GgufBlock::Q4_1 | GgufBlock::Q5_1 | GgufBlock::Q4_K | GgufBlock::Q5_K | GgufBlock::MXFP4 => None,
        }
    }

    /// Takes a block of [`GgufBlock::bytes`] apart. Past its values and groups, `to` keeps what it had.
    ///
    /// # Panics
    /// If the block has another length.
    #[inline]
    pub fn take_apart(self, block: &[u8], to: &mut Groups) {
        assert_eq!(block.len(), self.bytes(), "bytes of a block of {}", self.name());
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let Groups { codes, scales, biases } = to;
        match self {
            GgufBlock::Q4_0 => {
                scales[0] = half(0);
                nibbles(&block[2..], codes);
            }
            GgufBlock::Q4_1 => {
                (scales[0], biases[0]) = (half(0), half(2));
                nibbles(&block[4..], codes);
            }
            GgufBlock::Q5_0 => {
                scales[0] = half(0);
                nibbles(&block[6..], codes);
                fifth_bits(&block[2..6], codes);
            }
            GgufBlock::Q5_1 => {
                (scales[0], biases[0]) = (half(0), half(2));
                nibbles(&block[8..], codes);
                fifth_bits(&block[4..8], codes);
            }
            GgufBlock::Q8_0 => {
                scales[0] = half(0);
                // Signed codes: 128 more are unsigned ones around 128.
                codes.iter_mut().zip(&block[2..]).for_each(|(code, &byte)| *code = byte ^ 0x80);
            }
            GgufBlock::MXFP4 => {
                scales[0] = from_e8m0(block[0]);
                nibbles(&block[1..], codes);
            }
            GgufBlock::Q4_K | GgufBlock::Q5_K => {
                let (d, least) = (half(0), half(2));
                for group in 0..8 {
                    let (scale, bias) = six_bits(&block[4..16], group);
                    scales[group] = d * f32::from(scale);
                    biases[group] = -least * f32::from(bias);
                }
                let low = &block[self.bytes() - 128..];
                for (codes, low) in codes.chunks_exact_mut(64).zip(low.chunks_exact(32)) {
                    nibbles(low, codes);
                }
                if self == GgufBlock::Q5_K {
                    for (group, codes) in codes.chunks_exact_mut(32).enumerate() {
                        for (code, high) in codes.iter_mut().zip(&block[16..48]) {
                            *code |= (high >> group & 1) << 4;
                        }
                    }
                }
            }
            GgufBlock::Q6_K => {
                let (low, high, small) = (&block[..128], &block[128..192], &block[192..208]);
                let d = half(208);
                for (scale, &small) in scales.iter_mut().zip(small) {
                    *scale = d * f32::from(small as i8);
                }
                for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
                    // Each half of the block: two parts of low nibbles, two of high ones.
                    let (half, within) = (part / 4, part % 4);
                    let low = &low[half * 64 + within % 2 * 32..][..32];
                    for ((code, low), high) in codes.iter_mut().zip(low).zip(&high[half * 32..]) {
                        *code = low >> (within / 2 * 4) & 15 | (high >> (2 * within) & 3) << 4;
                    }
                }
            }
        }
    }

    /// The values of whole blocks, in f32 rounded to `T` once.
    pub fn dequantize<T: Float>(self, blocks: &[u8], values: &mut [T]) -> Result<(), CodecError> {
        let count = values.len() / self.values();
        if !values.len().is_multiple_of(self.values()) {
            return Err(CodecError::Columns { columns: values.len(), group_size: self.values() });
        }
        if blocks.len() != count * self.bytes() {
            let expected = count * self.bytes();
            return Err(CodecError::Length { what: "bytes of blocks", expected, got: blocks.len() });
        }
        let mut groups = Groups::default();
        for (block, values) in blocks.chunks_exact(self.bytes()).zip(values.chunks_exact_mut(self.values())) {
            self.take_apart(block, &mut groups);
            for (at, value) in values.iter_mut().enumerate() {
                let (code, group) = (groups.codes[at], at / self.group_size());
                let number = match self {
                    GgufBlock::MXFP4 => E2M1[usize::from(code)],
                    _ => f32::from(code) - f32::from(self.centre().unwrap_or(0)),
                };
                let bias = if self.has_biases() { groups.biases[group] } else { 0.0 };
                *value = T::from_f32(groups.scales[group] * number + bias);
            }
        }
        Ok(())
    }

    /// Whether groups have biases of their own.
    pub fn has_biases(self) -> bool {
        self.centre().is_none() && self != GgufBlock::MXFP4
    }

    /// The first of these whole blocks that has a scale or bias which is NaN or infinite.
    pub fn first_not_finite(self, blocks: &[u8]) -> Option<usize> {
        let not_finite = |block: &[u8], at: usize| block[at + 1] & 0x7c == 0x7c;
        blocks.chunks_exact(self.bytes()).position(|block| match self {
            GgufBlock::Q4_0 | GgufBlock::Q5_0 | GgufBlock::Q8_0 => not_finite(block, 0),
            GgufBlock::Q4_1 | GgufBlock::Q5_1 | GgufBlock::Q4_K | GgufBlock::Q5_K => {
                not_finite(block, 0) || not_finite(block, 2)
            }
            GgufBlock::Q6_K => not_finite(block, 208),
            GgufBlock::MXFP4 => block[0] == 0xff,
        })
    }
}

/// All low nibbles, then all high ones.
fn nibbles(from: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(from.len().min(codes.len() / 2));
    for ((low, high), byte) in low.iter_mut().zip(high).zip(from) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// The fifth bits of 32 codes, one after the other.
fn fifth_bits(from: &[u8], codes: &mut [u8]) {
    for (at, code) in codes.iter_mut().enumerate().take(32) {
        *code |= (from[at / 8] >> (at % 8) & 1) << 4;
    }
}

/// Scale and bias of a group, 6 bits each: the first four groups' in the low bits of 8 bytes, the others' in the 4
/// bytes that follow and the two bits left.
fn six_bits(from: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (from[group] & 63, from[group + 4] & 63);
    }
    let last = from[group + 4];
    (last & 15 | from[group - 4] >> 6 << 4, last >> 4 | from[group] >> 6 << 4)
}
