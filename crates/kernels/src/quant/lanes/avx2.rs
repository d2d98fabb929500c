//! Lanes as two AVX2 registers.
//!
//! AVX-VNNI multiplies bytes in one instruction. Without it `vpmaddubsw` adds pairs of products in 16 bits with saturation: 2·127·127 fits, 2·255·127 does
//! not, so 8-bit codes are multiplied nibble by nibble.

use std::arch::x86_64::*;

use super::Lanes;
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
            }
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> F {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()))),
            ]
        }
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
