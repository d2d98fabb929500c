//! How a weight is coded: what its bits mean, and which weights the tiles can hold.

use mica_codec::gguf::GgufBlock;
use mica_codec::{QuantMode, QuantSpec};

use super::tile::ScaleType;

/// What the code q of a group with scale s stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    /// s·q + b, with b stored beside s.
    Affine,
    /// s·(q - centre).
    Centred(u8),
    /// s times a 4-bit float (e2m1).
    Fp4,
    /// s times an 8-bit float (e4m3).
    Fp8,
}

/// What tiles are laid out by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub bits: usize,
    pub group: usize,
    pub numbers: Numbers,
    pub scale: ScaleType,
}

impl Form {
    /// Of MLX's formats. `scale` is the type of an affine weight's scales; the other modes have their own, and `None`
    /// is one that the mode does not have.
    pub fn mlx(spec: QuantSpec, scale: ScaleType) -> Option<Form> {
        let floats = matches!(scale, ScaleType::F32 | ScaleType::Bf16 | ScaleType::F16);
        let (numbers, fits) = match spec.mode() {
            QuantMode::Affine => (Numbers::Affine, floats),
            QuantMode::Mxfp4 => (Numbers::Fp4, scale == ScaleType::E8m0),
            QuantMode::Mxfp8 => (Numbers::Fp8, scale == ScaleType::E8m0),
            QuantMode::Nvfp4 => (Numbers::Fp4, scale == ScaleType::E4m3),
        };
        fits.then_some(Form { bits: spec.bits(), group: spec.group_size(), numbers, scale })
    }

    /// Of ggml's blocks. Scales of the larger ones are products that half precision does not hold.
    pub fn gguf(block: GgufBlock) -> Form {
        let numbers = match block.centre() {
            Some(centre) => Numbers::Centred(centre),
            None if block == GgufBlock::MXFP4 => Numbers::Fp4,
            None => Numbers::Affine,
        };
        let scale = match block {
            GgufBlock::Q4_K | GgufBlock::Q5_K | GgufBlock::Q6_K => ScaleType::F32,
            GgufBlock::MXFP4 => ScaleType::E8m0,
            _ => ScaleType::F16,
        };
        Form { bits: block.bits(), group: block.group_size(), numbers, scale }
    }

    /// The format of MLX's that holds the same numbers, if there is one.
    pub fn as_mlx(self) -> Option<QuantSpec> {
        let mode = match (self.numbers, self.scale) {
            (Numbers::Affine | Numbers::Centred(_), _) => QuantMode::Affine,
            (Numbers::Fp4, ScaleType::E4m3) => QuantMode::Nvfp4,
            (Numbers::Fp4, _) => QuantMode::Mxfp4,
            (Numbers::Fp8, _) => QuantMode::Mxfp8,
        };
        QuantSpec::new(self.bits, self.group, mode).ok()
    }
}
