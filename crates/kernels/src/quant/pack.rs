//! Filling tiles: from tensors in memory, or from a file, piece by piece.

use std::ops::Range;

use mica_codec::{CodecError, QuantSpec, bits};
use mica_simd::Isa;
use mica_threads::{Pool, Scratch};

use super::form::{Form, Numbers};
use super::lanes::Lanes;
use super::tier::{PerTier, at_tier};
use super::tile::{self, Codes, Layout, SUB, ScaleType, TILE_ROWS, with_codes};
use super::weight::{QuantWeight, Scales};
use crate::KernelError;
use crate::memory::WeightBytes;
use crate::pieces::in_pieces;

pub(super) const NAME: &str = "quantized weight";

/// Bytes of tiles that a thread fills from one piece of each tensor: both stay in its cache.
const PIECE: usize = 256 << 10;

/// The tensors of a quantized weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// u32 `[out, in·bits/32]`.
    Words,
    /// `[out, in/group_size]`.
    Scales,
    /// `[out, in/group_size]`, of affine codes.
    Biases,
}

impl QuantWeight {
    /// Packs MLX's tensors, in parallel: `words` u32 `[out, in·bits/32]`, `scales` `[out, in/group_size]`, and if the
    /// codes are affine `biases` of the same shape and type.
    ///
    /// Codes and scales that are floats must not be NaN: they would be read as numbers.
    pub fn pack(
        pool: &Pool,
        spec: QuantSpec,
        [out, inner]: [usize; 2],
        words: &[u32],
        scales: Scales<'_>,
        biases: Option<Scales<'_>>,
    ) -> Result<QuantWeight, KernelError> {
        let weight = QuantWeight::empty(mlx_form(spec, scales.kind())?, [out, inner])?;
        let (row_words, groups) = (spec.words(inner), weight.layout.groups);
        let affine = weight.layout.numbers == Numbers::Affine;
        let refuse = |message: String| Err(KernelError::new(NAME, message));
        // Products that were found not to overflow.
        for (what, expected, got) in [
            ("words", out * row_words, words.len()),
            ("scales", out * groups, scales.len()),
            ("biases", if affine { out * groups } else { 0 }, biases.map_or(0, |biases| biases.len())),
        ] {
            if expected != got {
                return refuse(format!(
                    "{what} of [{out}, {inner}] as {}, {} bits, groups of {}: expected {expected}, got {got}",
                    spec.mode().name(),
                    spec.bits(),
                    spec.group_size(),
                ));
            }
        }
        if let Some(biases) = biases
            && scales.kind() != biases.kind()
        {
            return refuse(format!(
                "scales are {:?} and biases {:?}: expected one type",
                scales.kind(),
                biases.kind()
            ));
        }
        let row_scales = groups * scales.kind().size();
        let (scales, biases) = (scales.bytes(), biases.map_or(&[][..], Scales::bytes));
        let piece = |index: usize, _: &mut Scratch| {
            let rows = weight.rows_of_piece(index);
            let of = |values: Range<usize>, size: usize| values.start * size..values.end * size;
            // SAFETY: each piece is filled once.
            unsafe {
                weight.fill(
                    rows.clone(),
                    &words[of(rows.clone(), row_words)],
                    &scales[of(rows.clone(), row_scales)],
                    if affine { &biases[of(rows, row_scales)] } else { &[] },
                );
            }
            Ok::<(), std::convert::Infallible>(())
        };
        let Ok(()) = in_pieces(pool, weight.pieces(), piece)?;
        Ok(weight)
    }

    /// Packs tensors that come from somewhere else, in pieces, on all threads: `read` writes these rows of a tensor,
    /// as they lie in memory. The whole tensors are nowhere, so that there is one copy of a weight while it is read
    /// as afterwards. `scale` is the type of the scales, and of the biases where there are any.
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
        let weight = QuantWeight::empty(mlx_form(spec, scale)?, shape)?;
        let row_words = spec.words(shape[1]);
        let row_scales = weight.layout.groups * scale.size();
        let affine = weight.layout.numbers == Numbers::Affine;
        let piece = |index: usize, scratch: &mut Scratch| {
            let rows = weight.rows_of_piece(index);
            let words = scratch.take::<u32>(rows.len() * row_words);
            let scales = scratch.take::<u8>(rows.len() * row_scales);
            let biases = scratch.take::<u8>(if affine { rows.len() * row_scales } else { 0 });
            // SAFETY: the same bytes, lent for this line; all bits are words.
            let bytes = unsafe {
                std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), size_of_val(words))
            };
            read(Part::Words, rows.clone(), bytes)?;
            read(Part::Scales, rows.clone(), scales)?;
            if affine {
                read(Part::Biases, rows.clone(), biases)?;
            }
            // SAFETY: each piece is filled once.
            unsafe { weight.fill(rows, words, scales, biases) };
            Ok(())
        };
        Ok(in_pieces(pool, weight.pieces(), piece)?.map(|()| weight))
    }

    /// A weight whose tiles are not written yet.
    pub(super) fn empty(form: Form, [out, inner]: [usize; 2]) -> Result<QuantWeight, KernelError> {
        let Form { group, bits, .. } = form;
        if inner == 0 || !inner.is_multiple_of(group) {
            let error = CodecError::Columns { columns: inner, group_size: group };
            return Err(KernelError::new(NAME, error.to_string()));
        }
        let groups = inner / group;
        let fits = inner.checked_mul(bits).and_then(|row| out.checked_mul(row)).and(out.checked_mul(groups));
        match fits.and_then(|_| Layout::new(form, out, groups)) {
            Some(layout) => Ok(QuantWeight { out, inner, layout, tiles: WeightBytes::new(layout.bytes())? }),
            None => Err(KernelError::new(NAME, format!("[{out}, {inner}] is too large"))),
        }
    }

    /// A tile of zeros, to be filled.
    ///
    /// # Safety
    /// Nobody else has this tile.
    #[allow(clippy::mut_from_ref)] // Tiles are filled by several threads at once, each its own.
    pub(super) unsafe fn blank_tile(&self, tile: usize) -> &mut [u8] {
        debug_assert!(tile < self.layout.tiles);
        // SAFETY: inside the weight's tiles; the caller has it alone. Zeros are written before anything is read.
        unsafe {
            let to = self.tiles.pointer().add(tile * self.layout.tile);
            to.write_bytes(0, self.layout.tile);
            std::slice::from_raw_parts_mut(to, self.layout.tile)
        }
    }

    fn tiles_per_piece(&self) -> usize {
        (PIECE / self.layout.tile).max(1)
    }

    pub(super) fn pieces(&self) -> usize {
        self.layout.tiles.div_ceil(self.tiles_per_piece())
    }

    pub(super) fn rows_of_piece(&self, index: usize) -> Range<usize> {
        let rows = self.tiles_per_piece() * TILE_ROWS;
        index * rows..((index + 1) * rows).min(self.out)
    }

    /// Writes the tiles of these rows, which are a piece, from their part of each tensor.
    ///
    /// # Safety
    /// Nobody else has these tiles.
    unsafe fn fill(&self, rows: Range<usize>, words: &[u32], scales: &[u8], biases: &[u8]) {
        let row_words = words.len() / rows.len().max(1);
        let row_scales = scales.len() / rows.len().max(1);
        for from in (0..rows.len()).step_by(TILE_ROWS) {
            let here = (rows.len() - from).min(TILE_ROWS);
            // SAFETY: lent to this call alone.
            let to = unsafe { self.blank_tile((rows.start + from) / TILE_ROWS) };
            let work = PackTile {
                layout: self.layout,
                rows: here,
                words: &words[from * row_words..][..here * row_words],
                scales: &scales[from * row_scales..][..here * row_scales],
                biases: if biases.is_empty() {
                    biases
                } else {
                    &biases[from * row_scales..][..here * row_scales]
                },
                to,
            };
            // SAFETY: the tier that this process uses; the work itself asks for nothing.
            unsafe { at_tier(Isa::get(), work) };
        }
    }
}

fn mlx_form(spec: QuantSpec, scale: ScaleType) -> Result<Form, KernelError> {
    Form::mlx(spec, scale).ok_or_else(|| {
        let message = format!("scales of {scale:?} do not belong to {} codes", spec.mode().name());
        KernelError::new(NAME, message)
    })
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
        with_codes!(&self.layout, C => self.pack::<C>())
    }
}

impl PackTile<'_> {
    #[inline(always)]
    fn pack<C: Codes>(self) {
        let Layout { group, groups, block, .. } = self.layout;
        let group_words = group * C::BITS / 32;
        for (g, block) in self.to.chunks_exact_mut(block).enumerate() {
            let (codes, rest) = block.split_at_mut(self.layout.codes);
            put_words::<C>(self.words, groups * group_words, g * group_words, self.rows, codes);
            let (scales, biases) = rest.split_at_mut(TILE_ROWS * self.layout.scale.size());
            for (from, to) in [(self.scales, scales), (self.biases, biases)] {
                match self.layout.scale.size() {
                    1 => column::<1>(from, groups, g, to),
                    2 => column::<2>(from, groups, g, to),
                    _ => column::<4>(from, groups, g, to),
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
fn put_words<C: Codes>(words: &[u32], row_words: usize, at: usize, rows: usize, to: &mut [u8]) {
    let sub_words = C::SUB * C::BITS / 32;
    for (sub, to) in to.chunks_exact_mut(C::BYTES).enumerate() {
        for (r, row) in words.chunks_exact(row_words).take(rows).enumerate() {
            let words = &row[at + sub * sub_words..][..sub_words];
            if C::BITS == 4 || C::BITS == 8 {
                // At 4 and 8 bits a word is a lane.
                put_lanes(to, r, words);
            } else {
                let mut codes = [0u8; SUB];
                bits::unpack(words, C::BITS, &mut codes[..C::SUB]);
                put_lanes(to, r, &lanes::<C>(&codes)[..sub_words]);
            }
        }
    }
    if C::BITS == 4 {
        // Only now, many vectors later: one that was just put together from lanes is slow to load.
        for lane in to.chunks_exact_mut(4) {
            let word = u32::from_le_bytes((&*lane).try_into().expect("4 bytes"));
            lane.copy_from_slice(&interleave_nibbles(word).to_le_bytes());
        }
    }
}

/// Lane `r` of one vector after the other.
#[inline(always)]
pub(super) fn put_lanes(to: &mut [u8], r: usize, lanes: &[u32]) {
    for (vector, lane) in to.chunks_exact_mut(64).zip(lanes) {
        vector[r * 4..r * 4 + 4].copy_from_slice(&lane.to_le_bytes());
    }
}

/// A row's lane of each vector of a sub-block.
#[inline(always)]
pub(super) fn lanes<C: Codes>(codes: &[u8; SUB]) -> [u32; 8] {
    // Four codes at a time, a byte each: a lane of a unit.
    let units: [u32; SUB / 4] = std::array::from_fn(|unit| {
        u32::from_le_bytes(codes[unit * 4..unit * 4 + 4].try_into().expect("4 codes"))
    });
    let (mut lanes, mut plane) = ([0; 8], 0);
    for (width, below) in const { tile::planes(C::BITS) } {
        let slots = 8 / width.max(1);
        let mask = ((1 << width) - 1) * 0x0101_0101u32;
        let vectors = width * C::SUB / SUB;
        for v in 0..vectors {
            let slot = |t: usize| (units[v * slots + t] >> below & mask) << (t * width);
            lanes[plane + v] = (0..slots).fold(0, |lane, t| lane | slot(t));
        }
        plane += vectors;
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
    use mica_codec::QuantMode;
    use mica_testkit::Rng;

    fn scales(rng: &mut Rng, kind: ScaleType, count: usize) -> ScaleVec {
        // Any bits but NaN, which would not compare equal.
        let values: Vec<f32> = rng.normals(count);
        match kind {
            ScaleType::F32 => ScaleVec::F32(values),
            ScaleType::Bf16 => ScaleVec::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            ScaleType::F16 => ScaleVec::F16(values.into_iter().map(f16::from_f32).collect()),
            ScaleType::E8m0 => {
                ScaleVec::E8m0(values.into_iter().map(|value| value.to_bits() as u8).collect())
            }
            ScaleType::E4m3 => {
                ScaleVec::E4m3(values.into_iter().map(|value| value.to_bits() as u8).collect())
            }
        }
    }

    #[test]
    fn packing_is_a_bijection() {
        let mut rng = Rng::new(5);
        let pool = Pool::new(2);
        let mut forms = Vec::new();
        for bits in [1, 2, 3, 4, 5, 6, 8] {
            for group in [32, 64, 128] {
                let spec = QuantSpec::affine(bits, group).unwrap();
                forms.extend([ScaleType::F32, ScaleType::Bf16, ScaleType::F16].map(|kind| (spec, kind)));
            }
        }
        forms.push((QuantSpec::usual(QuantMode::Mxfp4), ScaleType::E8m0));
        forms.push((QuantSpec::usual(QuantMode::Mxfp8), ScaleType::E8m0));
        forms.push((QuantSpec::usual(QuantMode::Nvfp4), ScaleType::E4m3));
        for (spec, kind) in forms {
            for [out, groups] in [[1, 1], [16, 2], [37, 3]] {
                let case = format!("{spec:?}, {kind:?}, {out} x {groups}");
                let inner = groups * spec.group_size();
                let words: Vec<u32> = (0..out * spec.words(inner)).map(|_| rng.u32()).collect();
                let s = scales(&mut rng, kind, out * groups);
                let affine = spec.mode() == QuantMode::Affine;
                let b = affine.then(|| scales(&mut rng, kind, out * groups));
                let biases = b.as_ref().map(ScaleVec::as_scales);
                let weight =
                    QuantWeight::pack(&pool, spec, [out, inner], &words, s.as_scales(), biases).unwrap();
                let read = |part, rows: Range<usize>, into: &mut [u8]| {
                    let from = match part {
                        // SAFETY: u32 are plain bytes.
                        Part::Words => unsafe {
                            std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 4)
                        },
                        Part::Scales => s.as_scales().bytes(),
                        Part::Biases => biases.expect("only asked of affine codes").bytes(),
                    };
                    let row = from.len() / out;
                    into.copy_from_slice(&from[rows.start * row..rows.end * row]);
                    Ok::<(), ()>(())
                };
                let from_file = QuantWeight::read(&pool, spec, [out, inner], kind, read).unwrap().unwrap();
                assert_eq!(weight.bytes_of_tiles(), from_file.bytes_of_tiles(), "{case}");
                let back = weight.unpack();
                assert!(back == Some(Unpacked { words, scales: s, biases: b }), "{case}");
                assert_eq!((weight.shape(), weight.scale_type()), ([out, inner], kind), "{case}");
            }
        }
    }

    /// Code after code, as the layout is defined.
    #[test]
    fn words_become_what_their_codes_make() {
        fn check<C: Codes>(rng: &mut Rng) {
            let sub_words = C::SUB * C::BITS / 32;
            for rows in [1, 5, 16] {
                let row_words = 4 * sub_words;
                let words: Vec<u32> = (0..rows * row_words).map(|_| rng.u32()).collect();
                let mut expected = vec![0u8; 2 * C::BYTES];
                let mut codes = vec![0u8; C::SUB];
                for (sub, expected) in expected.chunks_exact_mut(C::BYTES).enumerate() {
                    for row in 0..rows {
                        let from = row * row_words + (1 + sub) * sub_words;
                        bits::unpack(&words[from..][..sub_words], C::BITS, &mut codes);
                        tile::put_codes(expected, C::BITS, row, &codes);
                    }
                }
                let mut got = vec![0u8; 2 * C::BYTES];
                put_words::<C>(&words, row_words, sub_words, rows, &mut got);
                assert_eq!(got, expected, "{} bits, {rows} rows", C::BITS);
            }
        }
        let mut rng = Rng::new(6);
        tile::all_codes!(check(&mut rng));
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
        let (halves, bytes) = (vec![f16::ZERO; 8], vec![0u8; 8]);
        let pack = |shape, w: &[u32], s, b| QuantWeight::pack(&pool, spec, shape, w, s, Some(b)).map(|_| ());
        assert!(pack([4, 128], &w, Scales::F32(&s), Scales::F32(&s)).is_ok());
        for (name, shape, words, s, b) in [
            ("columns", [4, 96], &w[..], Scales::F32(&s), Scales::F32(&s)),
            ("no columns", [4, 0], &w[..0], Scales::F32(&s[..0]), Scales::F32(&s[..0])),
            ("words", [4, 128], &w[1..], Scales::F32(&s), Scales::F32(&s)),
            ("scales", [4, 128], &w[..], Scales::F32(&s[1..]), Scales::F32(&s)),
            ("biases", [4, 128], &w[..], Scales::F32(&s), Scales::F32(&s[1..])),
            ("types", [4, 128], &w[..], Scales::F32(&s), Scales::F16(&halves)),
            ("bytes", [4, 128], &w[..], Scales::E8m0(&bytes), Scales::E8m0(&bytes)),
            ("overflow", [usize::MAX / 2, 128], &w[..], Scales::F32(&s), Scales::F32(&s)),
        ] {
            assert!(pack(shape, words, s, b).is_err(), "{name}");
        }
        assert!(pack([0, 128], &[], Scales::F32(&[]), Scales::F32(&[])).is_ok(), "no rows is a weight");
    }
}
