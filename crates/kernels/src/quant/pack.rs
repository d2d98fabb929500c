//! Filling tiles: from tensors in memory, or from a file, piece by piece.

use std::ops::Range;

use mica_codec::{QuantSpec, bits};
use mica_simd::Isa;
use mica_threads::{Pool, Scratch};

use super::lanes::Lanes;
use super::tier::{PerTier, at_tier};
use super::tile::{self, Layout, SUB, ScaleType, TILE_ROWS};
use super::weight::{QuantWeight, Scales};
use crate::KernelError;
use crate::memory::WeightBytes;
use crate::pieces::in_pieces;

const NAME: &str = "quantized weight";

/// Bytes of tiles that a thread fills from one piece of each tensor: both stay in its cache.
const PIECE: usize = 256 << 10;

/// The tensors of a quantized weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// u32 `[out, in·bits/32]`.
    Words,
    /// `[out, in/group_size]`.
    Scales,
    /// `[out, in/group_size]`.
    Biases,
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
        let weight = QuantWeight::empty(spec, [out, inner], scales.kind())?;
        let (row_words, groups) = (spec.words(inner), weight.layout.groups);
        let refuse = |message: String| Err(KernelError::new(NAME, message));
        // Products that were found not to overflow.
        for (what, expected, got) in [
            ("words", out * row_words, words.len()),
            ("scales", out * groups, scales.len()),
            ("biases", out * groups, biases.len()),
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
        let row_scales = groups * scales.kind().size();
        let (scales, biases) = (scales.bytes(), biases.bytes());
        let piece = |index: usize, _: &mut Scratch| {
            let rows = weight.rows_of_piece(index);
            let of = |values: Range<usize>, size: usize| values.start * size..values.end * size;
            // SAFETY: each piece is filled once.
            unsafe {
                weight.fill(
                    rows.clone(),
                    &words[of(rows.clone(), row_words)],
                    &scales[of(rows.clone(), row_scales)],
                    &biases[of(rows, row_scales)],
                );
            }
            Ok::<(), std::convert::Infallible>(())
        };
        let Ok(()) = in_pieces(pool, weight.pieces(), piece)?;
        Ok(weight)
    }

    /// Packs tensors that come from somewhere else, in pieces, on all threads: `read` writes these rows of a tensor,
    /// as they lie in memory. The whole tensors are nowhere, so that there is one copy of a weight while it is read
    /// as afterwards.
    ///
    /// # Errors
    /// Outside sizes and too little memory, inside the first error of `read` in the order of rows.
    pub fn read<E: Send>(
        pool: &Pool,
        spec: QuantSpec,
        shape: [usize; 2],
        scale: ScaleType,
        read: impl Fn(Part, Range<usize>, &mut [u8]) -> Result<(), E> + Sync + Send,
    ) -> Result<Result<QuantWeight, E>, KernelError> {
        let weight = QuantWeight::empty(spec, shape, scale)?;
        let row_words = spec.words(shape[1]);
        let row_scales = weight.layout.groups * scale.size();
        let piece = |index: usize, scratch: &mut Scratch| {
            let rows = weight.rows_of_piece(index);
            let words = scratch.take::<u32>(rows.len() * row_words);
            let scales = scratch.take::<u8>(rows.len() * row_scales);
            let biases = scratch.take::<u8>(rows.len() * row_scales);
            // SAFETY: the same bytes, lent for this line; all bits are words.
            let bytes = unsafe {
                std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), size_of_val(words))
            };
            read(Part::Words, rows.clone(), bytes)?;
            read(Part::Scales, rows.clone(), scales)?;
            read(Part::Biases, rows.clone(), biases)?;
            // SAFETY: each piece is filled once.
            unsafe { weight.fill(rows, words, scales, biases) };
            Ok(())
        };
        Ok(in_pieces(pool, weight.pieces(), piece)?.map(|()| weight))
    }

    /// A weight whose tiles are not written yet.
    fn empty(
        spec: QuantSpec,
        [out, inner]: [usize; 2],
        scale: ScaleType,
    ) -> Result<QuantWeight, KernelError> {
        let groups = spec.groups(inner).map_err(|error| KernelError::new(NAME, error.to_string()))?;
        let layout = Layout::new(spec, out, groups, scale);
        let fits = out.checked_mul(spec.words(inner)).and(out.checked_mul(groups)).and(layout);
        let Some(layout) = fits else {
            return Err(KernelError::new(NAME, format!("[{out}, {inner}] is too large")));
        };
        Ok(QuantWeight { spec, out, inner, layout, tiles: WeightBytes::new(layout.bytes())? })
    }

    fn tiles_per_piece(&self) -> usize {
        (PIECE / self.layout.tile).max(1)
    }

    fn pieces(&self) -> usize {
        self.layout.tiles.div_ceil(self.tiles_per_piece())
    }

    fn rows_of_piece(&self, index: usize) -> Range<usize> {
        let rows = self.tiles_per_piece() * TILE_ROWS;
        index * rows..((index + 1) * rows).min(self.out)
    }

    /// Writes the tiles of these rows, which are a piece, from their part of each tensor.
    ///
    /// # Safety
    /// Nobody else has these tiles.
    unsafe fn fill(&self, rows: Range<usize>, words: &[u32], scales: &[u8], biases: &[u8]) {
        let tiles = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        let (row_words, row_scales) = (self.spec.words(self.inner), scales.len() / rows.len().max(1));
        for tile in tiles {
            let from = tile * TILE_ROWS - rows.start;
            let here = (rows.len() - from).min(TILE_ROWS);
            // SAFETY: inside the weight's tiles, and lent to this call alone. Every byte is written before one is
            // read: by `PackTile`.
            let to = unsafe {
                let to = self.tiles.pointer().add(tile * self.layout.tile);
                to.write_bytes(0, self.layout.tile);
                std::slice::from_raw_parts_mut(to, self.layout.tile)
            };
            let work = PackTile {
                layout: self.layout,
                rows: here,
                words: &words[from * row_words..][..here * row_words],
                scales: &scales[from * row_scales..][..here * row_scales],
                biases: &biases[from * row_scales..][..here * row_scales],
                to,
            };
            // SAFETY: the tier that this process uses; the work itself asks for nothing.
            unsafe { at_tier(Isa::get(), work) };
        }
    }
}

/// One tile from the rows of its tensors. Rows that do not exist are zeros.
struct PackTile<'a> {
    layout: Layout,
    rows: usize,
    words: &'a [u32],
    scales: &'a [u8],
    biases: &'a [u8],
    to: &'a mut [u8],
}

impl PerTier for PackTile<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        match self.layout.bits {
            1 => self.pack::<1>(),
            2 => self.pack::<2>(),
            3 => self.pack::<3>(),
            4 => self.pack::<4>(),
            5 => self.pack::<5>(),
            6 => self.pack::<6>(),
            8 => self.pack::<8>(),
            _ => unreachable!("QuantSpec has no other widths"),
        }
    }
}

impl PackTile<'_> {
    #[inline(always)]
    fn pack<const BITS: usize>(self) {
        let Layout { group, groups, block, .. } = self.layout;
        for (g, block) in self.to.chunks_exact_mut(block).enumerate() {
            let (codes, rest) = block.split_at_mut(self.layout.codes);
            let row_words = groups * group / SUB * BITS;
            put_words::<BITS>(self.words, row_words, g * group / SUB * BITS, self.rows, codes);
            let (scales, biases) = rest.split_at_mut(rest.len() / 2);
            match self.layout.scale.size() {
                2 => {
                    column::<2>(self.scales, groups, g, scales);
                    column::<2>(self.biases, groups, g, biases);
                }
                _ => {
                    column::<4>(self.scales, groups, g, scales);
                    column::<4>(self.biases, groups, g, biases);
                }
            }
        }
    }
}

/// Element `g` of each row, one after the other.
#[inline(always)]
fn column<const SIZE: usize>(from: &[u8], groups: usize, g: usize, to: &mut [u8]) {
    for (row, to) in from.chunks_exact(groups * SIZE).zip(to.chunks_exact_mut(SIZE)) {
        to.copy_from_slice(&row[g * SIZE..][..SIZE]);
    }
}

/// Words `at`… of each row as the vectors of sub-blocks, which start zeroed: lane r of each belongs to row r. What
/// [`put_codes`](tile::put_codes) does row after row and code after code.
#[inline(always)]
fn put_words<const BITS: usize>(words: &[u32], row_words: usize, at: usize, rows: usize, to: &mut [u8]) {
    for (sub, to) in to.chunks_exact_mut(64 * BITS).enumerate() {
        for (r, row) in words.chunks_exact(row_words).take(rows).enumerate() {
            let words = &row[at + sub * BITS..][..BITS];
            let lanes = if BITS == 4 || BITS == 8 {
                // At 4 and 8 bits a word is a lane.
                std::array::from_fn(|vector| words[vector])
            } else {
                lanes::<BITS>(words)
            };
            for (vector, lane) in to.chunks_exact_mut(64).zip::<[u32; BITS]>(lanes) {
                vector[r * 4..r * 4 + 4].copy_from_slice(&lane.to_le_bytes());
            }
        }
    }
    if BITS == 4 {
        // Only now, many vectors later: one that was just put together from lanes is slow to load.
        for lane in to.chunks_exact_mut(4) {
            let word = u32::from_le_bytes((&*lane).try_into().expect("4 bytes"));
            lane.copy_from_slice(&interleave_nibbles(word).to_le_bytes());
        }
    }
}

/// A row's lane of each vector of a sub-block.
#[inline(always)]
fn lanes<const BITS: usize>(words: &[u32]) -> [u32; BITS] {
    let mut codes = [0u8; SUB];
    bits::unpack(words, BITS, &mut codes);
    // Four codes at a time, a byte each: a lane of a unit.
    let units: [u32; SUB / 4] = std::array::from_fn(|unit| {
        u32::from_le_bytes(codes[unit * 4..unit * 4 + 4].try_into().expect("4 codes"))
    });
    let (mut lanes, mut plane) = ([0; BITS], 0);
    for (width, below) in tile::planes(BITS) {
        let slots = 8 / width.max(1);
        let mask = ((1 << width) - 1) * 0x0101_0101u32;
        for v in 0..width {
            let slot = |t: usize| (units[v * slots + t] >> below & mask) << (t * width);
            lanes[plane + v] = (0..slots).fold(0, |lane, t| lane | slot(t));
        }
        plane += width;
    }
    lanes
}

/// From nibble i at bit 4·i to byte i = nibble i | nibble i+4 << 4.
#[inline(always)]
fn interleave_nibbles(word: u32) -> u32 {
    let spread = |x: u32| {
        let x = (x | x << 8) & 0x00ff_00ff;
        (x | x << 4) & 0x0f0f_0f0f
    };
    spread(word & 0xffff) | spread(word >> 16) << 4
}

#[cfg(test)]
mod tests {
    use super::super::weight::{ScaleVec, Unpacked};
    use super::*;
    use half::{bf16, f16};
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
                        let read = |part, rows: Range<usize>, into: &mut [u8]| {
                            let from = match part {
                                // SAFETY: u32 are plain bytes.
                                Part::Words => unsafe {
                                    std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 4)
                                },
                                Part::Scales => s.as_scales().bytes(),
                                Part::Biases => b.as_scales().bytes(),
                            };
                            let row = from.len() / out;
                            into.copy_from_slice(&from[rows.start * row..rows.end * row]);
                            Ok::<(), ()>(())
                        };
                        let from_file =
                            QuantWeight::read(&pool, spec, [out, inner], kind, read).unwrap().unwrap();
                        assert_eq!(weight.bytes_of_tiles(), from_file.bytes_of_tiles(), "{case}");
                        let back = weight.unpack();
                        assert!(back == Unpacked { words, scales: s, biases: b }, "{case}");
                        assert_eq!((weight.shape(), weight.scale_type()), ([out, inner], kind), "{case}");
                    }
                }
            }
        }
    }

    /// Code after code, as the layout is defined.
    #[test]
    fn words_become_what_their_codes_make() {
        fn check<const BITS: usize>(rng: &mut Rng) {
            for rows in [1, 5, 16] {
                let row_words = 4 * BITS;
                let words: Vec<u32> = (0..rows * row_words).map(|_| rng.u32()).collect();
                let mut expected = vec![0u8; 2 * 64 * BITS];
                let mut codes = [0u8; SUB];
                for (sub, expected) in expected.chunks_exact_mut(64 * BITS).enumerate() {
                    for row in 0..rows {
                        bits::unpack(&words[row * row_words + (1 + sub) * BITS..][..BITS], BITS, &mut codes);
                        tile::put_codes(expected, BITS, row, &codes);
                    }
                }
                let mut got = vec![0u8; 2 * 64 * BITS];
                put_words::<BITS>(&words, row_words, BITS, rows, &mut got);
                assert_eq!(got, expected, "{BITS} bits, {rows} rows");
            }
        }
        let mut rng = Rng::new(6);
        check::<1>(&mut rng);
        check::<2>(&mut rng);
        check::<3>(&mut rng);
        check::<4>(&mut rng);
        check::<5>(&mut rng);
        check::<6>(&mut rng);
        check::<8>(&mut rng);
    }

    #[test]
    fn a_large_weight_is_read_in_pieces_of_whole_tiles() {
        let spec = QuantSpec::affine(4, 64).unwrap();
        // Five pieces and a part of one, the last tile with 3 rows.
        let [out, inner] = [5 * 8 * 16 + 35, 4096];
        let asked = std::sync::Mutex::new(Vec::new());
        let read = |part, rows: Range<usize>, into: &mut [u8]| {
            asked.lock().unwrap().push((part, rows.clone(), into.len()));
            into.fill(rows.start as u8);
            if rows.contains(&300) || rows.contains(&600) { Err(rows.start) } else { Ok(()) }
        };
        let pool = Pool::new(3);
        let error = QuantWeight::read(&pool, spec, [out, inner], ScaleType::Bf16, read).unwrap().unwrap_err();
        let asked_for = std::mem::take(&mut *asked.lock().unwrap());
        assert!(asked_for.iter().any(|(_, rows, _)| rows.start == error && rows.contains(&300)), "{error}");
        let read = |part, rows: Range<usize>, into: &mut [u8]| {
            asked.lock().unwrap().push((part, rows.clone(), into.len()));
            into.fill(0);
            Ok::<(), ()>(())
        };
        QuantWeight::read(&pool, spec, [out, inner], ScaleType::Bf16, read).unwrap().unwrap();
        let mut asked = asked.into_inner().unwrap();
        for (part, row) in [(Part::Words, inner / 2), (Part::Scales, 128), (Part::Biases, 128)] {
            let mut rows: Vec<Range<usize>> = Vec::new();
            asked.retain(|(which, range, bytes)| {
                if *which == part {
                    assert_eq!(*bytes, range.len() * row, "{part:?} {range:?}");
                    rows.push(range.clone());
                }
                *which != part
            });
            rows.sort_by_key(|rows| rows.start);
            assert!(rows.len() > 3, "{rows:?}");
            assert!(rows.windows(2).all(|pair| pair[0].end == pair[1].start), "{rows:?}");
            assert_eq!((rows[0].start, rows.last().unwrap().end), (0, out));
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
