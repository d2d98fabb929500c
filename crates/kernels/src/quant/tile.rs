//! The tiles of a quantized weight: how codes, scales and biases lie in memory.
//!
//! A tile is 16 output rows, all groups in ascending order, so that one row range is one contiguous
//! stream. A group is a block: its codes, then 16 scales, then 16 biases, each in the file's type. Codes around a
//! fixed centre need no biases, and store none.
//!
//! Codes come in sub-blocks of 32 k. A sub-block of b bits is b vectors of 64 bytes, made of
//! planes (3 bits = a plane of 2 and one of 1, 5 = 4 + 1, 6 = 4 + 2): a plane of w bits has w
//! vectors, and in each vector the bytes of 32-bit lane r belong to row r. Byte i of vector v holds
//! k = 4·(v·8/w + t) + i in bits t·w…, so shifting and masking a vector of a plane gives vectors
//! of 16 rows × 4 k: the operand of `vpdpbusd`. For 4 bits: low nibbles k0-3, high nibbles k4-7.
//! For 8 bits the vectors are that operand already. No bit is wasted at any width. Groups of 16 are half a sub-block:
//! half of the vectors of each plane.
//!
//! Floats of 4 bits are integers from -12 to 12 halves: a table makes codes of 0 to 24 of them, around 12. Floats of 8
//! bits are no integers that products of bytes could use; they are dequantized.

use mica_codec::minifloat::E2M1;

use super::form::{Form, Numbers};
use super::lanes::Lanes;

/// Output rows per tile.
pub const TILE_ROWS: usize = 16;
/// Values of k per sub-block.
pub(super) const SUB: usize = 32;

/// The type of scales and biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// Single precision.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// A power of two: its exponent in one byte.
    E8m0,
    /// An 8-bit float.
    E4m3,
}

impl ScaleType {
    /// Bytes per value.
    pub fn size(self) -> usize {
        match self {
            ScaleType::F32 => 4,
            ScaleType::Bf16 | ScaleType::F16 => 2,
            ScaleType::E8m0 | ScaleType::E4m3 => 1,
        }
    }
}

/// Sizes and places inside the tiles of one weight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub bits: usize,
    pub group: usize,
    pub groups: usize,
    pub scale: ScaleType,
    pub numbers: Numbers,
    /// Bytes of codes in a block.
    pub codes: usize,
    /// Bytes of a block: codes, scales, biases.
    pub block: usize,
    /// Bytes of a tile.
    pub tile: usize,
    pub tiles: usize,
}

impl Layout {
    /// The layout of `out` rows of `groups` groups, or `None` if its size overflows.
    pub fn new(form: Form, out: usize, groups: usize) -> Option<Layout> {
        let Form { bits, group, numbers, scale } = form;
        let codes = group * TILE_ROWS * bits / 8;
        let vectors = if numbers == Numbers::Affine { 2 } else { 1 };
        let block = codes + vectors * TILE_ROWS * scale.size();
        let tile = block.checked_mul(groups)?;
        let tiles = out.div_ceil(TILE_ROWS);
        tile.checked_mul(tiles)?;
        Some(Layout { bits, group, groups, scale, numbers, codes, block, tile, tiles })
    }

    pub fn bytes(&self) -> usize {
        self.tile * self.tiles
    }

    pub fn form(&self) -> Form {
        Form { bits: self.bits, group: self.group, numbers: self.numbers, scale: self.scale }
    }

    /// Offset of the scales inside a block.
    pub fn scales(&self) -> usize {
        self.codes
    }

    /// Offset of the biases inside a block, if they are stored.
    pub fn biases(&self) -> usize {
        self.codes + TILE_ROWS * self.scale.size()
    }

    /// Values of k that a sub-block holds.
    pub fn sub(&self) -> usize {
        SUB.min(self.group)
    }

    /// The code that stands for zero; 0 where biases are stored.
    pub fn centre(&self) -> f32 {
        match self.numbers {
            Numbers::Affine | Numbers::Fp8 => 0.0,
            Numbers::Centred(centre) => f32::from(centre),
            Numbers::Fp4 => FP4_CENTRE,
        }
    }

    /// s and b of a block's 16 rows: a weight is s·q + b, with q the code as [`unit`] gives it.
    ///
    /// # Safety
    /// As for [`Lanes`]; `block` points to a block.
    #[inline(always)]
    pub unsafe fn scales_of<L: Lanes>(&self, block: *const u8) -> (L::F, L::F) {
        // SAFETY: passed on; biases are inside the block.
        unsafe {
            let s = self.scales_only::<L>(block);
            match self.numbers {
                Numbers::Affine => (s, L::load_scales(block.add(self.biases()), self.scale)),
                _ => (s, L::mul(s, L::splat(-self.centre()))),
            }
        }
    }

    /// s of a block's 16 rows.
    ///
    /// # Safety
    /// As for [`Layout::scales_of`].
    #[inline(always)]
    pub unsafe fn scales_only<L: Lanes>(&self, block: *const u8) -> L::F {
        // SAFETY: passed on; scales are inside the block.
        unsafe {
            let s = L::load_scales(block.add(self.scales()), self.scale);
            // What is read are halves.
            if self.numbers == Numbers::Fp4 { L::mul(s, L::splat(0.5)) } else { s }
        }
    }
}

/// The code of zero among those that [`FP4`] gives.
const FP4_CENTRE: f32 = 12.0;

/// Twice each 4-bit float, plus 12.
const FP4: [u8; 16] = {
    let (mut table, mut code) = ([0; 16], 0);
    while code < 16 {
        table[code] = (2.0 * E2M1[code] + FP4_CENTRE) as u8;
        code += 1;
    }
    table
};

/// How codes lie in a sub-block and what is read from them: what loops are compiled for.
pub(super) trait Codes: Copy {
    const BITS: usize;
    /// Values of k in a sub-block.
    const SUB: usize;
    /// What a code is read as, if not as itself.
    const TABLE: Option<[u8; 16]>;
    /// Bytes of a sub-block.
    const BYTES: usize = Self::SUB * TILE_ROWS * Self::BITS / 8;
    /// Whether what is read may pass 127.
    const WIDE: bool = Self::BITS == 8;
}

/// Integers.
#[derive(Clone, Copy)]
pub(super) struct Plain<const BITS: usize>;

impl<const BITS: usize> Codes for Plain<BITS> {
    const BITS: usize = BITS;
    const SUB: usize = SUB;
    const TABLE: Option<[u8; 16]> = None;
}

/// Integers in groups of 16.
#[derive(Clone, Copy)]
pub(super) struct Half<const BITS: usize>;

impl<const BITS: usize> Codes for Half<BITS> {
    const BITS: usize = BITS;
    const SUB: usize = SUB / 2;
    const TABLE: Option<[u8; 16]> = None;
}

/// 4-bit floats, in groups of 32 or (`HALF`) 16.
#[derive(Clone, Copy)]
pub(super) struct Fp4<const HALF: bool>;

impl<const HALF: bool> Codes for Fp4<HALF> {
    const BITS: usize = 4;
    const SUB: usize = if HALF { SUB / 2 } else { SUB };
    const TABLE: Option<[u8; 16]> = Some(FP4);
}

/// Evaluates an expression with `$codes` standing for the [`Codes`] of a layout.
macro_rules! with_codes {
    ($layout:expr, $codes:ident => $body:expr) => {{
        use $crate::quant::{form::Numbers, tile};
        macro_rules! body {
            ($type:ty) => {{
                type $codes = $type;
                $body
            }};
        }
        let layout: &tile::Layout = $layout;
        match (layout.numbers, layout.bits, layout.group) {
            (Numbers::Fp4, _, 16) => body!(tile::Fp4<true>),
            (Numbers::Fp4, ..) => body!(tile::Fp4<false>),
            (_, 6, 16) => body!(tile::Half<6>),
            (_, 1, _) => body!(tile::Plain<1>),
            (_, 2, _) => body!(tile::Plain<2>),
            (_, 3, _) => body!(tile::Plain<3>),
            (_, 4, _) => body!(tile::Plain<4>),
            (_, 5, _) => body!(tile::Plain<5>),
            (_, 6, _) => body!(tile::Plain<6>),
            (_, 8, _) => body!(tile::Plain<8>),
            _ => unreachable!("a Form has no other widths"),
        }
    }};
}
pub(super) use with_codes;

/// Calls a function for all [`Codes`] there are.
#[cfg(test)]
macro_rules! all_codes {
    ($check:ident($argument:expr)) => {
        $crate::quant::tile::all_codes!(@ $check($argument): tile::Plain<1>, tile::Plain<2>, tile::Plain<3>, tile::Plain<4>,
            tile::Plain<5>, tile::Plain<6>, tile::Plain<8>, tile::Half<6>, tile::Fp4<false>, tile::Fp4<true>)
    };
    (@ $check:ident($argument:expr): $($codes:ty),+) => {{
        use $crate::quant::tile;
        $($check::<$codes>($argument);)+
    }};
}
#[cfg(test)]
pub(super) use all_codes;

/// The planes of a code: (width, bits below it in the code), wide plane first. A width of 0 is
/// no plane.
pub(super) const fn planes(bits: usize) -> [(usize, usize); 2] {
    match bits {
        3 => [(2, 0), (1, 2)],
        5 => [(4, 0), (1, 4)],
        6 => [(4, 0), (2, 4)],
        _ => [(bits, 0), (0, 0)],
    }
}

/// Writes one row's codes into a sub-block (which starts zeroed): the layout, defined code by code. `pack` does
/// the same for all rows at once.
#[cfg(test)]
pub(super) fn put_codes(sub_block: &mut [u8], bits: usize, row: usize, codes: &[u8]) {
    each_place(bits, codes.len(), |k, plane, vector, shift, (width, below)| {
        let part = codes[k] >> below & ((1u16 << width) - 1) as u8;
        sub_block[plane + vector * 64 + row * 4 + k % 4] |= part << shift;
    });
}

/// Reads one row's codes from a sub-block: the inverse of [`put_codes`].
pub(super) fn get_codes(sub_block: &[u8], bits: usize, row: usize, codes: &mut [u8]) {
    codes.fill(0);
    each_place(bits, codes.len(), |k, plane, vector, shift, (width, below)| {
        let part = sub_block[plane + vector * 64 + row * 4 + k % 4] >> shift & ((1u16 << width) - 1) as u8;
        codes[k] |= part << below;
    });
}

#[inline(always)]
fn each_place(bits: usize, sub: usize, mut visit: impl FnMut(usize, usize, usize, usize, (usize, usize))) {
    let mut plane = 0;
    for (width, below) in planes(bits) {
        if width == 0 {
            continue;
        }
        let slots = 8 / width;
        for k in 0..sub {
            let unit = k / 4;
            visit(k, plane, unit / slots, unit % slots * width, (width, below));
        }
        plane += plane_bytes(width, sub);
    }
}

/// Bytes of a plane of a sub-block.
const fn plane_bytes(width: usize, sub: usize) -> usize {
    width * sub * TILE_ROWS / 8
}

/// Vector `UNIT` (below `C::SUB / 4`) of a sub-block: 16 rows × 4 codes, k = 4·UNIT….
///
/// # Safety
/// As for [`Lanes`]; `sub_block` points to `C::BYTES` bytes.
#[inline(always)]
pub(super) unsafe fn unit<L: Lanes, C: Codes, const UNIT: usize>(sub_block: *const u8) -> L::I {
    // SAFETY: the vectors of the planes lie inside the sub-block.
    unsafe {
        if C::BITS == 8 {
            return L::load(sub_block.add(UNIT * 64));
        }
        let [(width, _), (extra, below)] = const { planes(C::BITS) };
        let slots = 8 / width;
        let vector = L::load(sub_block.add(UNIT / slots * 64));
        let low = L::and(
            L::shift_right(vector, (UNIT % slots * width) as u32),
            L::splat8(((1u16 << width) - 1) as u8),
        );
        if let Some(table) = C::TABLE {
            return L::lookup(&table, low);
        }
        if extra == 0 {
            return low;
        }
        let slots = 8 / extra;
        let vector = L::load(sub_block.add(plane_bytes(width, C::SUB) + UNIT / slots * 64));
        let at = UNIT % slots * extra;
        // Bits that cross into a neighbouring byte are masked off.
        let placed = if at >= below {
            L::shift_right(vector, (at - below) as u32)
        } else {
            L::shift_left(vector, (below - at) as u32)
        };
        L::or(low, L::and(placed, L::splat8((((1u16 << extra) - 1) << below) as u8)))
    }
}

/// Calls a macro or function once for each unit of a sub-block of 32, with the unit as a constant.
macro_rules! each_unit {
    ($do:ident) => {
        $do!(0 1 2 3 4 5 6 7)
    };
}
pub(super) use each_unit;

/// Unpacks a block's codes to units of 64 bytes, 4 k each.
///
/// # Safety
/// As for [`Lanes`]; `from` points to a block of this layout, `to` to 16 bytes for each value of a group.
#[inline(always)]
pub(super) unsafe fn unpack<L: Lanes>(layout: &Layout, from: *const u8, to: *mut u8) {
    // SAFETY: passed on.
    unsafe { with_codes!(layout, C => unpack_as::<L, C>(from, to, layout.group / C::SUB)) }
}

/// [`unpack`] of affine codes: half of the code.
///
/// # Safety
/// As for [`unpack`].
#[inline(always)]
pub(super) unsafe fn unpack_affine<L: Lanes>(layout: &Layout, from: *const u8, to: *mut u8) {
    let subs = layout.group / SUB;
    // SAFETY: passed on.
    unsafe {
        match layout.bits {
            1 => unpack_as::<L, Plain<1>>(from, to, subs),
            2 => unpack_as::<L, Plain<2>>(from, to, subs),
            3 => unpack_as::<L, Plain<3>>(from, to, subs),
            4 => unpack_as::<L, Plain<4>>(from, to, subs),
            5 => unpack_as::<L, Plain<5>>(from, to, subs),
            6 => unpack_as::<L, Plain<6>>(from, to, subs),
            8 => unpack_as::<L, Plain<8>>(from, to, subs),
            _ => unreachable!("a Form has no other widths"),
        }
    }
}

/// [`unpack`] of sub-blocks.
#[inline(always)]
unsafe fn unpack_as<L: Lanes, C: Codes>(from: *const u8, to: *mut u8, sub_blocks: usize) {
    for sub in 0..sub_blocks {
        // SAFETY: inside what the caller promises.
        unsafe {
            let (from, to) = (from.add(sub * C::BYTES), to.add(sub * C::SUB * TILE_ROWS));
            macro_rules! units {
                ($($unit:literal)*) => { $(
                    if $unit * 4 < C::SUB {
                        L::store(to.add($unit * 64), unit::<L, C, $unit>(from));
                    }
                )* };
            }
            each_unit!(units);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Scalar;
    use super::*;
    use mica_testkit::Rng;

    fn check<C: Codes>(rng: &mut Rng) {
        let codes: Vec<Vec<u8>> = (0..TILE_ROWS)
            .map(|_| (0..C::SUB).map(|_| (rng.u32() & ((1 << C::BITS) - 1)) as u8).collect())
            .collect();
        let mut sub_block = vec![0u8; C::BYTES];
        for (row, codes) in codes.iter().enumerate() {
            put_codes(&mut sub_block, C::BITS, row, codes);
        }
        let mut units = vec![0u8; C::SUB * TILE_ROWS];
        // SAFETY: the scalar tier needs no features; both buffers have the sizes asked for.
        unsafe { unpack_as::<Scalar, C>(sub_block.as_ptr(), units.as_mut_ptr(), 1) };
        for (row, codes) in codes.iter().enumerate() {
            let mut back = vec![0xffu8; C::SUB];
            get_codes(&sub_block, C::BITS, row, &mut back);
            let case = format!("{} bits, {} at a time, row {row}", C::BITS, C::SUB);
            assert_eq!(back[..], codes[..], "{case}");
            for (k, &code) in codes.iter().enumerate() {
                let read = C::TABLE.map_or(code, |table| table[usize::from(code)]);
                assert_eq!(units[k / 4 * 64 + row * 4 + k % 4], read, "{case}, k {k}");
            }
        }
    }

    #[test]
    fn places_are_a_bijection_and_units_read_them() {
        let mut rng = Rng::new(11);
        all_codes!(check(&mut rng));
    }

    #[test]
    fn four_bits_are_laid_out_as_documented() {
        let mut sub_block = vec![0u8; 256];
        let codes: Vec<u8> = (0..32).map(|k| k % 16).collect();
        put_codes(&mut sub_block, 4, 2, &codes);
        assert_eq!(sub_block[8..12], [0x40, 0x51, 0x62, 0x73]);
        assert_eq!(sub_block[64 + 8..64 + 12], [0xc8, 0xd9, 0xea, 0xfb]);
    }

    #[test]
    fn the_table_of_small_floats_has_their_values() {
        for (value, code) in E2M1.iter().zip(FP4) {
            assert_eq!(0.5 * (f32::from(code) - FP4_CENTRE), *value);
        }
    }
}
