//! [`QuantWeight`]: a quantized matrix, repacked into tiles once, at load.

use half::{bf16, f16};
use mica_codec::{QuantSpec, bits};

use super::tile::{self, Layout, SUB, ScaleType, TILE_ROWS};
use crate::memory::WeightBytes;

/// Scales or biases as a file holds them, `[out, in / group_size]`.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// The upper half of an f32.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl<'a> Scales<'a> {
    /// The element type.
    pub fn kind(&self) -> ScaleType {
        match self {
            Scales::F32(_) => ScaleType::F32,
            Scales::Bf16(_) => ScaleType::Bf16,
            Scales::F16(_) => ScaleType::F16,
        }
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        match self {
            Scales::F32(values) => values.len(),
            Scales::Bf16(values) => values.len(),
            Scales::F16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as they are in memory.
    pub(super) fn bytes(self) -> &'a [u8] {
        let (pointer, bytes) = match self {
            Scales::F32(values) => (values.as_ptr().cast::<u8>(), size_of_val(values)),
            Scales::Bf16(values) => (values.as_ptr().cast(), size_of_val(values)),
            Scales::F16(values) => (values.as_ptr().cast(), size_of_val(values)),
        };
        // SAFETY: numbers without padding, borrowed as long as the result.
        unsafe { std::slice::from_raw_parts(pointer, bytes) }
    }
}

/// Scales or biases as a file holds them, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum ScaleVec {
    /// Single precision.
    F32(Vec<f32>),
    /// The upper half of an f32.
    Bf16(Vec<bf16>),
    /// IEEE half precision.
    F16(Vec<f16>),
}

impl ScaleVec {
    fn zeros(kind: ScaleType, count: usize) -> ScaleVec {
        match kind {
            ScaleType::F32 => ScaleVec::F32(vec![0.0; count]),
            ScaleType::Bf16 => ScaleVec::Bf16(vec![bf16::ZERO; count]),
            ScaleType::F16 => ScaleVec::F16(vec![f16::ZERO; count]),
        }
    }

    fn set(&mut self, at: usize, from: &[u8], lane: usize) {
        match self {
            ScaleVec::F32(values) => values[at] = f32::from_ne_bytes(element(from, lane)),
            ScaleVec::Bf16(values) => values[at] = bf16::from_ne_bytes(element(from, lane)),
            ScaleVec::F16(values) => values[at] = f16::from_ne_bytes(element(from, lane)),
        }
    }

    /// The same values, borrowed.
    pub fn as_scales(&self) -> Scales<'_> {
        match self {
            ScaleVec::F32(values) => Scales::F32(values),
            ScaleVec::Bf16(values) => Scales::Bf16(values),
            ScaleVec::F16(values) => Scales::F16(values),
        }
    }
}

fn element<const N: usize>(from: &[u8], lane: usize) -> [u8; N] {
    from[lane * N..][..N].try_into().expect("N bytes")
}

/// What [`QuantWeight::unpack`] gives back: the tensors of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Unpacked {
    /// `[out, in · bits / 32]`.
    pub words: Vec<u32>,
    /// `[out, in / group_size]`.
    pub scales: ScaleVec,
    /// `[out, in / group_size]`.
    pub biases: ScaleVec,
}

/// A quantized matrix `[out, in]`, packed into the tiles that every kernel here reads: the product
/// with it and with its transpose, in int8, bf16 and f32, and the gathering of its rows.
///
/// Packing is a bijection: [`QuantWeight::unpack`] gives back the file's tensors, bit for bit, so
/// one copy in memory is enough. It takes bits·out·in/8 bytes plus scales and biases, with `out`
/// rounded up to a multiple of 16.
#[derive(Debug)]
pub struct QuantWeight {
    pub(super) spec: QuantSpec,
    pub(super) out: usize,
    pub(super) inner: usize,
    pub(super) layout: Layout,
    /// All of them written, once there is a weight.
    pub(super) tiles: WeightBytes,
}

impl QuantWeight {
    /// The file's tensors, bit for bit.
    pub fn unpack(&self) -> Unpacked {
        let Layout { bits, group, groups, block, tile, scale, .. } = self.layout;
        let row_words = self.spec.words(self.inner);
        let mut words = vec![0u32; self.out * row_words];
        let mut scales = ScaleVec::zeros(scale, self.out * groups);
        let mut biases = ScaleVec::zeros(scale, self.out * groups);
        let mut codes = [0u8; SUB];
        for at in 0..self.out {
            let tile = &self.bytes_of_tiles()[at / TILE_ROWS * tile..][..tile];
            let row = at % TILE_ROWS;
            for g in 0..groups {
                let block = &tile[g * block..][..block];
                for sub in 0..group / SUB {
                    tile::get_codes(&block[sub * 64 * bits..][..64 * bits], bits, row, &mut codes);
                    let to = at * row_words + (g * group / SUB + sub) * bits;
                    bits::pack(&codes, bits, &mut words[to..to + bits]);
                }
                scales.set(at * groups + g, &block[self.layout.scales()..], row);
                biases.set(at * groups + g, &block[self.layout.biases()..], row);
            }
        }
        Unpacked { words, scales, biases }
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.out, self.inner]
    }

    /// Bits, group size and mode.
    pub fn spec(&self) -> QuantSpec {
        self.spec
    }

    /// The type of scales and biases.
    pub fn scale_type(&self) -> ScaleType {
        self.layout.scale
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.tiles.len()
    }

    /// The tiles as bytes. Private to this machine's layout: never write them to a file.
    pub(super) fn bytes_of_tiles(&self) -> &[u8] {
        // SAFETY: packing writes all of them, and gives out no weight before.
        unsafe { self.tiles.as_slice() }
    }

    /// The start of a tile.
    pub(super) fn tile_pointer(&self, tile: usize) -> *const u8 {
        debug_assert!(tile < self.layout.tiles);
        self.bytes_of_tiles()[tile * self.layout.tile..].as_ptr()
    }
}
