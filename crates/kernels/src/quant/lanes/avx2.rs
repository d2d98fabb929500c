//! Lanes as two AVX2 registers.
//!
//! AVX-VNNI multiplies bytes in one instruction. Without it `vpmaddubsw` adds pairs of products in 16 bits with
//! saturation: 2·127·127 fits, 2·255·127 does not, so 8-bit codes are multiplied nibble by nibble.

use std::arch::x86_64::*;

use super::{Lanes, TWO_TO_120};
use crate::quant::tile::ScaleType;

/// Two ymm registers: lanes 0-7 and 8-15. With or without AVX-VNNI: products of integers are exact, so the bits are the
/// same.
#[derive(Clone, Copy)]
pub(in crate::quant) struct Avx2<const VNNI: bool>;

type I = [__m256i; 2];
type F = [__m256; 2];

macro_rules! shift {
    ($a:expr, $count:expr, $by:ident: $($n:literal)*) => {
        match $count {
            0 => $a,
            $($n => [$by::<$n>($a[0]), $by::<$n>($a[1])],)*
            _ => unreachable!("shifts by a byte or less, or by two bytes or three"),
        }
    };
}

/// Rounds to bf16, to nearest even, as integers; NaN stays NaN.
#[inline(always)]
unsafe fn bf16_bits(a: __m256) -> __m256i {
    // SAFETY: as below.
    unsafe {
        let bits = _mm256_castps_si256(a);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
    }
}

/// Four products per lane of unsigned q and signed a, added to acc.
#[inline(always)]
unsafe fn dot_half<const WIDE: bool, const VNNI: bool>(acc: __m256i, q: __m256i, a: __m256i) -> __m256i {
    // SAFETY: as below.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        if VNNI {
            _mm256_dpbusd_avx_epi32(acc, q, a)
        } else if WIDE {
            let nibble = _mm256_set1_epi8(15);
            let low = _mm256_and_si256(q, nibble);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble);
            let low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, a), ones);
            let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, a), ones);
            _mm256_add_epi32(acc, _mm256_add_epi32(low, _mm256_slli_epi32::<4>(high)))
        } else {
            _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(q, a), ones))
        }
    }
}

/// Eight bf16 as f32.
#[inline(always)]
unsafe fn widen_bf16(from: *const u8) -> __m256 {
    // SAFETY: as below.
    unsafe {
        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
}

/// Eight bytes as integers.
#[inline(always)]
unsafe fn widen_u8(from: *const u8) -> __m256i {
    // SAFETY: as below.
    unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())) }
}

/// Eight powers of two from their exponents. The smallest is half of the smallest normal number.
#[inline(always)]
unsafe fn e8m0(from: *const u8) -> __m256 {
    // SAFETY: as below.
    unsafe {
        let codes = widen_u8(from);
        let smallest = _mm256_cmpeq_epi32(codes, _mm256_setzero_si256());
        let powers = _mm256_slli_epi32::<23>(codes);
        _mm256_castsi256_ps(_mm256_blendv_epi8(powers, _mm256_set1_epi32(1 << 22), smallest))
    }
}

/// Codes of 8-bit floats, one a lane, as f32.
///
/// By way of half precision, whose exponent is larger by 8: f32 would make subnormal numbers of the smallest, which
/// are slow to multiply.
#[inline(always)]
unsafe fn e4m3(codes: __m256i) -> __m256 {
    // SAFETY: as below.
    unsafe {
        let sign = _mm256_slli_epi32::<8>(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)));
        let magnitude = _mm256_slli_epi32::<7>(_mm256_and_si256(codes, _mm256_set1_epi32(0x7f)));
        let halves = _mm256_or_si256(sign, magnitude);
        let halves = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
        _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0))
    }
}

/// Bytes 0 to 3 of each lane as 8-bit floats.
///
/// Two at a time as bf16, whose exponent is larger by 120. Their smallest are subnormal there, which is slow but rare:
/// they are below a 14,000th of the largest number of a group.
#[inline(always)]
unsafe fn four_e4m3(codes: __m256i) -> [__m256; 4] {
    // SAFETY: as below.
    unsafe {
        let halves = |codes: __m256i| {
            let sign = _mm256_slli_epi32::<8>(_mm256_and_si256(codes, _mm256_set1_epi32(0x0080_0080)));
            let magnitude = _mm256_slli_epi32::<4>(_mm256_and_si256(codes, _mm256_set1_epi32(0x007f_007f)));
            _mm256_or_si256(sign, magnitude)
        };
        let number = |bits| _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(TWO_TO_120));
        let (even, odd) = (halves(codes), halves(_mm256_srli_epi32::<8>(codes)));
        let upper = _mm256_set1_epi32(0xffff_0000u32 as i32);
        [
            number(_mm256_slli_epi32::<16>(even)),
            number(_mm256_slli_epi32::<16>(odd)),
            number(_mm256_and_si256(even, upper)),
            number(_mm256_and_si256(odd, upper)),
        ]
    }
}

// SAFETY of every block below: the features are enabled and the pointers valid, as `Lanes` asks.
impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    type I = I;
    type F = F;

    const MANY: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> I {
        // SAFETY: as above.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u8, value: I) {
        // SAFETY: as above.
        unsafe {
            _mm256_storeu_si256(to.cast(), value[0]);
            _mm256_storeu_si256(to.add(32).cast(), value[1]);
        }
    }
    #[inline(always)]
    unsafe fn splat8(value: u8) -> I {
        // SAFETY: as above.
        unsafe { [_mm256_set1_epi8(value as i8); 2] }
    }
    #[inline(always)]
    unsafe fn byte_f32<const BYTE: u32>(a: I) -> F {
        // SAFETY: as above.
        unsafe {
            let a = Self::shift_right(a, 8 * BYTE);
            let mask = _mm256_set1_epi32(255);
            [
                _mm256_cvtepi32_ps(_mm256_and_si256(a[0], mask)),
                _mm256_cvtepi32_ps(_mm256_and_si256(a[1], mask)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn zero() -> I {
        // SAFETY: as above.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        // SAFETY: as above.
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn add_int(a: I, b: I) -> I {
        // SAFETY: as above.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        // SAFETY: as above.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn shift_right(a: I, count: u32) -> I {
        // SAFETY: as above.
        unsafe { shift!(a, count, _mm256_srli_epi32: 1 2 3 4 5 6 7 8 16 24) }
    }
    #[inline(always)]
    unsafe fn shift_left(a: I, count: u32) -> I {
        // SAFETY: as above.
        unsafe { shift!(a, count, _mm256_slli_epi32: 1 2 3 4 5 6 7 8 16 24) }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(acc: I, q: I, a: *const i8) -> I {
        // SAFETY: as above.
        unsafe {
            let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
            [dot_half::<WIDE, VNNI>(acc[0], q[0], a), dot_half::<WIDE, VNNI>(acc[1], q[1], a)]
        }
    }
    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        // SAFETY: as above.
        unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> F {
        // SAFETY: as above.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> F {
        // SAFETY: as above.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store_f32(to: *mut f32, value: F) {
        // SAFETY: as above.
        unsafe {
            _mm256_storeu_ps(to, value[0]);
            _mm256_storeu_ps(to.add(8), value[1]);
        }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        // SAFETY: as above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], index: I) -> I {
        // SAFETY: as above.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [_mm256_shuffle_epi8(table, index[0]), _mm256_shuffle_epi8(table, index[1])]
        }
    }
    #[inline(always)]
    unsafe fn bytes_e4m3(a: I) -> [F; 4] {
        // SAFETY: as above.
        unsafe {
            let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (four_e4m3(a[0]), four_e4m3(a[1]));
            [[a0, b0], [a1, b1], [a2, b2], [a3, b3]]
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(_: F, _: I, _: u32) -> F {
        unreachable!("this tier's products are chains")
    }
    #[inline(always)]
    unsafe fn load_scales(from: *const u8, kind: ScaleType) -> F {
        // SAFETY: as above.
        unsafe {
            match kind {
                ScaleType::F32 => Self::load_f32(from.cast()),
                ScaleType::Bf16 => [widen_bf16(from), widen_bf16(from.add(16))],
                ScaleType::F16 => [
                    _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())),
                ],
                ScaleType::E8m0 => [e8m0(from), e8m0(from.add(8))],
                ScaleType::E4m3 => Self::load_e4m3(from),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> F {
        // SAFETY: as above.
        unsafe { [_mm256_cvtepi32_ps(widen_u8(from)), _mm256_cvtepi32_ps(widen_u8(from.add(8)))] }
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> F {
        // SAFETY: as above.
        unsafe { [e4m3(widen_u8(from)), e4m3(widen_u8(from.add(8)))] }
    }
    #[inline(always)]
    unsafe fn bf16_pairs(low: F, high: F) -> I {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_or_si256(bf16_bits(low[0]), _mm256_slli_epi32::<16>(bf16_bits(high[0]))),
                _mm256_or_si256(bf16_bits(low[1]), _mm256_slli_epi32::<16>(bf16_bits(high[1]))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn round_bf16(a: F) -> F {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bf16_bits(a[0]))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bf16_bits(a[1]))),
            ]
        }
    }
}
