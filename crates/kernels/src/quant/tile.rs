//! The tiles of a quantized weight: how codes, scales and biases lie in memory.
//!
//! A tile is 16 output rows, all groups in ascending order, so that one row range is one contiguous
//! stream. A group is a block: its codes, then 16 scales, then 16 biases, each in the file's type.
//!
//! Codes come in sub-blocks of 32 k. A sub-block of b bits is b vectors of 64 bytes, made of
//! planes (3 bits = a plane of 2 and one of 1, 5 = 4 + 1, 6 = 4 + 2): a plane of w bits has w
//! vectors, and in each vector the bytes of 32-bit lane r belong to row r. Byte i of vector v holds
//! k = 4·(v·8/w + t) + i in bits t·w…, so shifting and masking a vector of a plane gives vectors
//! of 16 rows × 4 k: the operand of `vpdpbusd`. For 4 bits: low nibbles k0-3, high nibbles k4-7.
//! For 8 bits the vectors are that operand already. No bit is wasted at any width.

use mica_codec::QuantSpec;

use super::lanes::Lanes;

/// Output rows per tile.
pub const TILE_ROWS: usize = 16;
/// Values of k per sub-block.
pub(super) const SUB: usize = 32;
/// Bytes of a sub-block of 8-bit codes, which is what unpacking gives.
pub(super) const SUB_BYTES: usize = SUB * TILE_ROWS;

/// The type of scales and biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// Single precision.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl ScaleType {
    /// Bytes per value.
    pub fn size(self) -> usize {
        match self {
            ScaleType::F32 => 4,
            ScaleType::Bf16 | ScaleType::F16 => 2,
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
    pub fn new(spec: QuantSpec, out: usize, groups: usize, scale: ScaleType) -> Option<Layout> {
        let (bits, group) = (spec.bits(), spec.group_size());
        let codes = group / SUB * 64 * bits;
        let block = codes + 2 * TILE_ROWS * scale.size();
        let tile = block.checked_mul(groups)?;
        let tiles = out.div_ceil(TILE_ROWS);
        tile.checked_mul(tiles)?;
        Some(Layout { bits, group, groups, scale, codes, block, tile, tiles })
    }

    pub fn bytes(&self) -> usize {
        self.tile * self.tiles
    }

    /// Offset of the scales inside a block.
    pub fn scales(&self) -> usize {
        self.codes
    }

    /// Offset of the biases inside a block.
    pub fn biases(&self) -> usize {
        self.codes + TILE_ROWS * self.scale.size()
    }
}

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

/// Writes one row's 32 codes into a sub-block (which starts zeroed): the layout, defined code by code. `pack` does
/// the same for all rows at once.
#[cfg(test)]
pub(super) fn put_codes(sub_block: &mut [u8], bits: usize, row: usize, codes: &[u8]) {
    each_place(bits, |k, plane, vector, shift, (width, below)| {
        let part = codes[k] >> below & ((1u16 << width) - 1) as u8;
        sub_block[plane + vector * 64 + row * 4 + k % 4] |= part << shift;
    });
}

/// Reads one row's 32 codes from a sub-block: the inverse of [`put_codes`].
pub(super) fn get_codes(sub_block: &[u8], bits: usize, row: usize, codes: &mut [u8]) {
    codes.fill(0);
    each_place(bits, |k, plane, vector, shift, (width, below)| {
        let part = sub_block[plane + vector * 64 + row * 4 + k % 4] >> shift & ((1u16 << width) - 1) as u8;
        codes[k] |= part << below;
    });
}

#[inline(always)]
fn each_place(bits: usize, mut visit: impl FnMut(usize, usize, usize, usize, (usize, usize))) {
    let mut plane = 0;
    for (width, below) in planes(bits) {
        if width == 0 {
            continue;
        }
        let slots = 8 / width;
        for k in 0..SUB {
            let unit = k / 4;
            visit(k, plane, unit / slots, unit % slots * width, (width, below));
        }
        plane += width * 64;
    }
}

/// Vector `UNIT` (0 to 7) of a sub-block: 16 rows × 4 codes, k = 4·UNIT….
///
/// # Safety
/// As for [`Lanes`]; `sub_block` points to 64·BITS bytes.
#[inline(always)]
pub(super) unsafe fn unit<L: Lanes, const BITS: usize, const UNIT: usize>(sub_block: *const u8) -> L::I {
    // SAFETY: the vectors of the planes lie inside the sub-block.
    unsafe {
        if BITS == 8 {
            return L::load(sub_block.add(UNIT * 64));
        }
        let [(width, _), (extra, below)] = const { planes(BITS) };
        let slots = 8 / width;
        let vector = L::load(sub_block.add(UNIT / slots * 64));
        let low = L::and(
            L::shift_right(vector, (UNIT % slots * width) as u32),
            L::splat8(((1u16 << width) - 1) as u8),
        );
        if extra == 0 {
            return low;
        }
        let slots = 8 / extra;
        let vector = L::load(sub_block.add(width * 64 + UNIT / slots * 64));
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

/// Calls a macro or function once for each unit of a sub-block, with the unit as a constant.
macro_rules! each_unit {
    ($do:ident) => {
        $do!(0 1 2 3 4 5 6 7)
    };
}
pub(super) use each_unit;

/// Unpacks `sub_blocks` sub-blocks to 8-bit units, 512 bytes each.
///
/// # Safety
/// As for [`Lanes`]; `from` points to `sub_blocks`·64·BITS bytes, `to` to `sub_blocks`·512.
#[inline(always)]
pub(super) unsafe fn unpack<L: Lanes, const BITS: usize>(from: *const u8, to: *mut u8, sub_blocks: usize) {
    for sub in 0..sub_blocks {
        // SAFETY: inside what the caller promises.
        unsafe {
            let (from, to) = (from.add(sub * 64 * BITS), to.add(sub * SUB_BYTES));
            macro_rules! units {
                ($($unit:literal)*) => { $( L::store(to.add($unit * 64), unit::<L, BITS, $unit>(from)); )* };
            }
            each_unit!(units);
        }
    }
}

/// [`unpack`] with the width chosen at run time.
///
/// # Safety
/// As for [`unpack`].
#[inline(always)]
pub(super) unsafe fn unpack_any<L: Lanes>(bits: usize, from: *const u8, to: *mut u8, sub_blocks: usize) {
    // SAFETY: passed on.
    unsafe {
        match bits {
            1 => unpack::<L, 1>(from, to, sub_blocks),
            2 => unpack::<L, 2>(from, to, sub_blocks),
            3 => unpack::<L, 3>(from, to, sub_blocks),
            4 => unpack::<L, 4>(from, to, sub_blocks),
            5 => unpack::<L, 5>(from, to, sub_blocks),
            6 => unpack::<L, 6>(from, to, sub_blocks),
            8 => unpack::<L, 8>(from, to, sub_blocks),
            _ => unreachable!("QuantSpec has no other widths"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Scalar;
    use super::*;
    use mica_testkit::Rng;

    #[test]
    fn places_are_a_bijection_and_units_read_them() {
        let mut rng = Rng::new(11);
        for bits in [1, 2, 3, 4, 5, 6, 8] {
            let codes: Vec<Vec<u8>> = (0..TILE_ROWS)
                .map(|_| (0..SUB).map(|_| (rng.u32() & ((1 << bits) - 1)) as u8).collect())
                .collect();
            let mut sub_block = vec![0u8; 64 * bits];
            for (row, codes) in codes.iter().enumerate() {
                put_codes(&mut sub_block, bits, row, codes);
            }
            let mut units = vec![0u8; SUB_BYTES];
            // SAFETY: the scalar tier needs no features; both buffers have the sizes asked for.
            unsafe { unpack_any::<Scalar>(bits, sub_block.as_ptr(), units.as_mut_ptr(), 1) };
            for (row, codes) in codes.iter().enumerate() {
                let mut back = [0xffu8; SUB];
                get_codes(&sub_block, bits, row, &mut back);
                assert_eq!(back[..], codes[..], "{bits} bits, row {row}");
                for (k, &code) in codes.iter().enumerate() {
                    assert_eq!(units[k / 4 * 64 + row * 4 + k % 4], code, "{bits} bits, row {row}, k {k}");
                }
            }
        }
    }

    #[test]
    fn four_bits_are_laid_out_as_documented() {
        let mut sub_block = vec![0u8; 256];
        let codes: Vec<u8> = (0..32).map(|k| k % 16).collect();
        put_codes(&mut sub_block, 4, 2, &codes);
        assert_eq!(sub_block[8..12], [0x40, 0x51, 0x62, 0x73]);
        assert_eq!(sub_block[64 + 8..64 + 12], [0xc8, 0xd9, 0xea, 0xfb]);
    }
}
