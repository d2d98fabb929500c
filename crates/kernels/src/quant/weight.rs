//! [`QuantWeight`]: a quantized matrix, repacked into tiles once, at load.

use half::{bf16, f16};
use mica_codec::minifloat::{E2M1, from_e4m3, from_e8m0};
use mica_codec::{QuantMode, QuantSpec, bits};

use super::form::Numbers;
use super::tile::{self, Layout, ScaleType, TILE_ROWS};
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
    /// Powers of two: their exponents.
    E8m0(&'a [u8]),
    /// 8-bit floats.
    E4m3(&'a [u8]),
}

impl<'a> Scales<'a> {
    /// The element type.
    pub fn kind(&self) -> ScaleType {
        match self {
            Scales::F32(_) => ScaleType::F32,
            Scales::Bf16(_) => ScaleType::Bf16,
            Scales::F16(_) => ScaleType::F16,
            Scales::E8m0(_) => ScaleType::E8m0,
            Scales::E4m3(_) => ScaleType::E4m3,
        }
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        match self {
            Scales::F32(values) => values.len(),
            Scales::Bf16(values) => values.len(),
            Scales::F16(values) => values.len(),
            Scales::E8m0(values) | Scales::E4m3(values) => values.len(),
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
            Scales::E8m0(values) | Scales::E4m3(values) => (values.as_ptr(), values.len()),
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
    /// Powers of two: their exponents.
    E8m0(Vec<u8>),
    /// 8-bit floats.
    E4m3(Vec<u8>),
}

impl ScaleVec {
    fn zeros(kind: ScaleType, count: usize) -> ScaleVec {
        match kind {
            ScaleType::F32 => ScaleVec::F32(vec![0.0; count]),
            ScaleType::Bf16 => ScaleVec::Bf16(vec![bf16::ZERO; count]),
            ScaleType::F16 => ScaleVec::F16(vec![f16::ZERO; count]),
            ScaleType::E8m0 => ScaleVec::E8m0(vec![0; count]),
            ScaleType::E4m3 => ScaleVec::E4m3(vec![0; count]),
        }
    }

    fn set(&mut self, at: usize, from: &[u8], lane: usize) {
        match self {
            ScaleVec::F32(values) => values[at] = f32::from_ne_bytes(element(from, lane)),
            ScaleVec::Bf16(values) => values[at] = bf16::from_ne_bytes(element(from, lane)),
            ScaleVec::F16(values) => values[at] = f16::from_ne_bytes(element(from, lane)),
            ScaleVec::E8m0(values) | ScaleVec::E4m3(values) => values[at] = from[lane],
        }
    }

    fn get(&self, at: usize) -> f32 {
        match self {
            ScaleVec::F32(values) => values[at],
            ScaleVec::Bf16(values) => values[at].to_f32(),
            ScaleVec::F16(values) => values[at].to_f32(),
            ScaleVec::E8m0(values) => from_e8m0(values[at]),
            ScaleVec::E4m3(values) => from_e4m3(values[at]),
        }
    }

    /// Writes a bias, which is never a code.
    fn put(&mut self, at: usize, value: f32) {
        match self {
            ScaleVec::F32(values) => values[at] = value,
            ScaleVec::Bf16(values) => values[at] = bf16::from_f32(value),
            ScaleVec::F16(values) => values[at] = f16::from_f32(value),
            ScaleVec::E8m0(_) | ScaleVec::E4m3(_) => unreachable!("scales that are codes have no biases"),
        }
    }

    /// The same values, borrowed.
    pub fn as_scales(&self) -> Scales<'_> {
        match self {
            ScaleVec::F32(values) => Scales::F32(values),
            ScaleVec::Bf16(values) => Scales::Bf16(values),
            ScaleVec::F16(values) => Scales::F16(values),
            ScaleVec::E8m0(values) => Scales::E8m0(values),
            ScaleVec::E4m3(values) => Scales::E4m3(values),
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
    /// `[out, in / group_size]`, of affine codes.
    pub biases: Option<ScaleVec>,
}

/// A quantized matrix `[out, in]`, packed into the tiles that every kernel here reads: the product
/// with it and with its transpose, in int8, bf16 and f32, and the gathering of its rows.
///
/// Packing MLX's tensors is a bijection: [`QuantWeight::unpack`] gives them back, bit for bit, so one copy in memory
/// is enough. It takes bits·out·in/8 bytes plus scales and biases, with `out` rounded up to a multiple of 16.
#[derive(Debug)]
pub struct QuantWeight {
    pub(super) out: usize,
    pub(super) inner: usize,
    pub(super) layout: Layout,
    /// All of them written, once there is a weight.
    pub(super) tiles: WeightBytes,
}

impl QuantWeight {
    /// MLX's tensors, bit for bit as they were packed, or of ggml's blocks the ones that hold the same numbers; `None`
    /// if MLX has no such format ([`QuantWeight::spec`]).
    pub fn unpack(&self) -> Option<Unpacked> {
        let spec = self.spec()?;
        let (scale, groups) = (self.layout.scale, self.layout.groups);
        let row_words = spec.words(self.inner);
        let mut words = vec![0u32; self.out * row_words];
        let mut scales = ScaleVec::zeros(scale, self.out * groups);
        let affine = spec.mode() == QuantMode::Affine;
        let mut biases = affine.then(|| ScaleVec::zeros(scale, self.out * groups));
        let mut codes = vec![0u8; self.inner];
        for at in 0..self.out {
            self.codes_of_row(at, &mut codes);
            bits::pack(&codes, spec.bits(), &mut words[at * row_words..][..row_words]);
            for (g, block) in self.blocks_of_row(at).enumerate() {
                let (place, row) = (at * groups + g, at % TILE_ROWS);
                scales.set(place, &block[self.layout.scales()..], row);
                match &mut biases {
                    Some(biases) if self.layout.numbers == Numbers::Affine => {
                        biases.set(place, &block[self.layout.biases()..], row);
                    }
                    Some(biases) => biases.put(place, -self.layout.centre() * scales.get(place)),
                    None => {}
                }
            }
        }
        Some(Unpacked { words, scales, biases })
    }

    /// A row's values in f64, from the definition of the format: slow, for whoever compares.
    pub fn row_values(&self, row: usize) -> Vec<f64> {
        let mut codes = vec![0u8; self.inner];
        self.codes_of_row(row, &mut codes);
        let mut values = Vec::with_capacity(self.inner);
        for (codes, block) in codes.chunks_exact(self.layout.group).zip(self.blocks_of_row(row)) {
            let number = |from: usize| {
                let mut one = ScaleVec::zeros(self.layout.scale, 1);
                one.set(0, &block[from..], row % TILE_ROWS);
                f64::from(one.get(0))
            };
            let scale = number(self.layout.scales());
            values.extend(codes.iter().map(|&code| match self.layout.numbers {
                Numbers::Affine => scale * f64::from(code) + number(self.layout.biases()),
                Numbers::Centred(centre) => scale * (f64::from(code) - f64::from(centre)),
                Numbers::Fp4 => scale * f64::from(E2M1[usize::from(code)]),
                Numbers::Fp8 => scale * f64::from(from_e4m3(code)),
            }));
        }
        values
    }

    /// A row's codes, as they were stored.
    fn codes_of_row(&self, row: usize, codes: &mut [u8]) {
        let Layout { bits, group, .. } = self.layout;
        let sub = self.layout.sub();
        for (codes, block) in codes.chunks_exact_mut(group).zip(self.blocks_of_row(row)) {
            let sub_blocks = block.chunks_exact(sub * TILE_ROWS * bits / 8);
            for (codes, sub_block) in codes.chunks_exact_mut(sub).zip(sub_blocks) {
                tile::get_codes(sub_block, bits, row % TILE_ROWS, codes);
            }
        }
    }

    /// The blocks that hold a row.
    fn blocks_of_row(&self, row: usize) -> std::slice::ChunksExact<'_, u8> {
        let tile = self.layout.tile;
        self.bytes_of_tiles()[row / TILE_ROWS * tile..][..tile].chunks_exact(self.layout.block)
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.out, self.inner]
    }

    /// Bits, group size and mode: MLX's name for the format. `None` of ggml's blocks with groups of 16 integers, which
    /// MLX does not have.
    pub fn spec(&self) -> Option<QuantSpec> {
        self.layout.form().as_mlx()
    }

    /// Values that share a scale.
    pub fn group_size(&self) -> usize {
        self.layout.group
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
