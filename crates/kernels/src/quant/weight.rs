//! [`QuantWeight`]: a quantized matrix, repacked into tiles once, at load.

use half::{bf16, f16};
use mica_codec::{QuantSpec, bits};
use mica_threads::{FnTask, Pool, Scratch};

use super::memory::TileBytes;
use super::tile::{self, Layout, SUB, ScaleType, TILE_ROWS};
use crate::KernelError;

const NAME: &str = "quantized weight";

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

impl Scales<'_> {
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

    /// Writes value `from` at element `lane` of a block's scales.
    fn put(&self, from: usize, to: &mut [u8], lane: usize) {
        let size = self.kind().size();
        let to = &mut to[lane * size..][..size];
        match self {
            Scales::F32(values) => to.copy_from_slice(&values[from].to_ne_bytes()),
            Scales::Bf16(values) => to.copy_from_slice(&values[from].to_ne_bytes()),
            Scales::F16(values) => to.copy_from_slice(&values[from].to_ne_bytes()),
        }
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
    spec: QuantSpec,
    out: usize,
    inner: usize,
    pub(super) layout: Layout,
    pub(super) tiles: TileBytes,
}

impl QuantWeight {
    /// Packs MLX's tensors, in parallel: `words` u32 `[out, in·bits/32]`, `scales` and `biases`
    /// `[out, in/group_size]` of one type.
    pub fn pack(
        pool: &Pool,
        spec: QuantSpec,
        [out, inner]: [usize; 2],
        words: &[u32],
        scales: Scales<'_>,
        biases: Scales<'_>,
    ) -> Result<QuantWeight, KernelError> {
        let groups = spec.groups(inner).map_err(|error| KernelError::new(NAME, error.to_string()))?;
        let refuse = |message: String| Err(KernelError::new(NAME, message));
        let counts = (out.checked_mul(spec.words(inner)), out.checked_mul(groups));
        let (Some(word_count), Some(group_count)) = counts else {
            return refuse(format!("[{out}, {inner}] is too large"));
        };
        for (what, expected, got) in [
            ("words", word_count, words.len()),
            ("scales", group_count, scales.len()),
            ("biases", group_count, biases.len()),
        ] {
            if expected != got {
                return refuse(format!(
                    "{what} of [{out}, {inner}] at {} bits, groups of {}: expected {expected}, got {got}",
                    spec.bits(),
                    spec.group_size(),
                ));
            }
        }
        if scales.kind() != biases.kind() {
            return refuse(format!(
                "scales are {:?} and biases {:?}: expected one type",
                scales.kind(),
                biases.kind()
            ));
        }
        let Some(layout) = Layout::new(spec, out, groups, scales.kind()) else {
            return refuse(format!("[{out}, {inner}] is too large"));
        };
        let weight = QuantWeight { spec, out, inner, layout, tiles: TileBytes::zeroed(layout.bytes())? };
        let pack = |index: usize, _: &mut Scratch| {
            // SAFETY: chunk `index` is the only one that touches tile `index`, which lies inside.
            let tile = unsafe {
                std::slice::from_raw_parts_mut(weight.tiles.pointer().add(index * layout.tile), layout.tile)
            };
            weight.pack_tile(index, tile, words, scales, biases);
        };
        let task = Box::new(FnTask::new("pack quantized weight", layout.tiles, pack));
        pool.run(&[task]).map_err(|panic| KernelError::new(NAME, panic.to_string()))?;
        Ok(weight)
    }

    fn pack_tile(&self, index: usize, tile: &mut [u8], words: &[u32], scales: Scales, biases: Scales) {
        let Layout { bits, group, groups, block, .. } = self.layout;
        let row_words = self.spec.words(self.inner);
        let mut codes = [0u8; SUB];
        for row in 0..TILE_ROWS.min(self.out - index * TILE_ROWS) {
            let at = index * TILE_ROWS + row;
            let words = &words[at * row_words..][..row_words];
            for g in 0..groups {
                let block = &mut tile[g * block..][..block];
                let words = &words[g * group / 32 * bits..];
                for sub in 0..group / SUB {
                    let to = &mut block[sub * 64 * bits..][..64 * bits];
                    let words = &words[sub * bits..][..bits];
                    match bits {
                        4 => put_words(to, row, words, interleave_nibbles),
                        8 => put_words(to, row, words, |word| word),
                        _ => {
                            bits::unpack(words, bits, &mut codes);
                            tile::put_codes(to, bits, row, &codes);
                        }
                    }
                }
                scales.put(at * groups + g, &mut block[self.layout.scales()..], row);
                biases.put(at * groups + g, &mut block[self.layout.biases()..], row);
            }
        }
    }

    /// The file's tensors, bit for bit.
    pub fn unpack(&self) -> Unpacked {
        let Layout { bits, group, groups, block, tile, scale, .. } = self.layout;
        let row_words = self.spec.words(self.inner);
        let mut words = vec![0u32; self.out * row_words];
        let mut scales = ScaleVec::zeros(scale, self.out * groups);
        let mut biases = ScaleVec::zeros(scale, self.out * groups);
        let mut codes = [0u8; SUB];
        for at in 0..self.out {
            let tile = &self.tiles.as_slice()[at / TILE_ROWS * tile..][..tile];
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
    pub(super) fn tile_pointer(&self, tile: usize) -> *const u8 {
        debug_assert!(tile < self.layout.tiles);
        self.tiles.as_slice()[tile * self.layout.tile..].as_ptr()
    }
}

/// Writes one row's words as the 32-bit lane `row` of each vector: at 4 and 8 bits a word is a lane.
fn put_words(to: &mut [u8], row: usize, words: &[u32], lane: impl Fn(u32) -> u32) {
    for (vector, &word) in to.chunks_exact_mut(64).zip(words) {
        vector[row * 4..row * 4 + 4].copy_from_slice(&lane(word).to_le_bytes());
    }
}

/// From nibble i at bit 4·i to byte i = nibble i | nibble i+4 << 4.
fn interleave_nibbles(word: u32) -> u32 {
    let spread = |x: u32| {
        let x = (x | x << 8) & 0x00ff_00ff;
        (x | x << 4) & 0x0f0f_0f0f
    };
    spread(word & 0xffff) | spread(word >> 16) << 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_testkit::Rng;

    fn scales(rng: &mut Rng, kind: ScaleType, count: usize) -> ScaleVec {
        // Any bits but NaN, which would not compare equal.
        let values: Vec<f32> = rng.normals(count);
        match kind {
            ScaleType::F32 => ScaleVec::F32(values),
            ScaleType::Bf16 => ScaleVec::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            ScaleType::F16 => ScaleVec::F16(values.into_iter().map(f16::from_f32).collect()),
        }
    }

    #[test]
    fn packing_is_a_bijection() {
        let mut rng = Rng::new(5);
        let pool = Pool::new(2);
        for bits in [1, 2, 3, 4, 5, 6, 8] {
            for group in [32, 64, 128] {
                for kind in [ScaleType::F32, ScaleType::Bf16, ScaleType::F16] {
                    for [out, groups] in [[1, 1], [16, 2], [37, 3]] {
                        let case = format!("{bits} bits, groups of {group}, {kind:?}, {out} x {groups}");
                        let inner = groups * group;
                        let spec = QuantSpec::affine(bits, group).unwrap();
                        let words: Vec<u32> = (0..out * spec.words(inner)).map(|_| rng.u32()).collect();
                        let s = scales(&mut rng, kind, out * groups);
                        let b = scales(&mut rng, kind, out * groups);
                        let weight = QuantWeight::pack(
                            &pool,
                            spec,
                            [out, inner],
                            &words,
                            s.as_scales(),
                            b.as_scales(),
                        )
                        .unwrap();
                        let back = weight.unpack();
                        assert!(back == Unpacked { words, scales: s, biases: b }, "{case}");
                        assert_eq!((weight.shape(), weight.scale_type()), ([out, inner], kind), "{case}");
                    }
                }
            }
        }
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused() {
        let pool = Pool::new(1);
        let spec = QuantSpec::affine(4, 64).unwrap();
        let (w, s) = (vec![0u32; 64], vec![0f32; 8]);
        let halves = vec![f16::ZERO; 8];
        let pack = |shape, w: &[u32], s, b| QuantWeight::pack(&pool, spec, shape, w, s, b).map(|_| ());
        assert!(pack([4, 128], &w, Scales::F32(&s), Scales::F32(&s)).is_ok());
        for (name, shape, words, s, b) in [
            ("columns", [4, 96], &w[..], Scales::F32(&s), Scales::F32(&s)),
            ("no columns", [4, 0], &w[..0], Scales::F32(&s[..0]), Scales::F32(&s[..0])),
            ("words", [4, 128], &w[1..], Scales::F32(&s), Scales::F32(&s)),
            ("scales", [4, 128], &w[..], Scales::F32(&s[1..]), Scales::F32(&s)),
            ("biases", [4, 128], &w[..], Scales::F32(&s), Scales::F32(&s[1..])),
            ("types", [4, 128], &w[..], Scales::F32(&s), Scales::F16(&halves)),
            ("overflow", [usize::MAX / 2, 128], &w[..], Scales::F32(&s), Scales::F32(&s)),
        ] {
            assert!(pack(shape, words, s, b).is_err(), "{name}");
        }
        assert!(pack([0, 128], &[], Scales::F32(&[]), Scales::F32(&[])).is_ok(), "no rows is a weight");
    }
}
