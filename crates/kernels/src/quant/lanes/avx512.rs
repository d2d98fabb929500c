//! Lanes as one AVX-512 register, with VNNI and BF16.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::{Lanes, TWO_TO_120};
use crate::quant::tile::ScaleType;

/// One zmm register.
#[derive(Clone, Copy)]
pub(in crate::quant) struct Avx512;

/// Shifts by an immediate: `count` is a constant after inlining, so one arm is left.
macro_rules! shift {
    ($a:expr, $count:expr, $by:ident: $($n:literal)*) => {
        match $count {
            0 => $a,
            $($n => $by::<$n>($a),)*
            _ => unreachable!("shifts by a byte or less, or by two bytes or three"),
        }
    };
}

/// Codes of 8-bit floats, one a lane, as f32.
///
/// By way of half precision, whose exponent is larger by 8: f32 would make subnormal numbers of the smallest, which
/// are slow to multiply.
#[inline(always)]
unsafe fn e4m3(codes: __m512i) -> __m512 {
    // SAFETY: as below.
    unsafe {
        let sign = _mm512_slli_epi32::<8>(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)));
        let magnitude = _mm512_slli_epi32::<7>(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)));
        let halves = _mm512_cvtepi32_epi16(_mm512_or_si512(sign, magnitude));
        _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0))
    }
}

// SAFETY of every block below: the features are enabled and the pointers valid, as `Lanes` asks.
impl Lanes for Avx512 {
    type I = __m512i;
    type F = __m512;

    const MANY: bool = true;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u8, value: __m512i) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(to.cast(), value) }
    }
    #[inline(always)]
    unsafe fn splat8(value: u8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi8(value as i8) }
    }
    #[inline(always)]
    unsafe fn byte_f32<const BYTE: u32>(a: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let byte = _mm512_and_si512(Self::shift_right(a, 8 * BYTE), _mm512_set1_epi32(255));
            _mm512_cvtepi32_ps(byte)
        }
    }
    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn add_int(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn shift_right(a: __m512i, count: u32) -> __m512i {
        // SAFETY: as above.
        unsafe { shift!(a, count, _mm512_srli_epi32: 1 2 3 4 5 6 7 8 16 24) }
    }
    #[inline(always)]
    unsafe fn shift_left(a: __m512i, count: u32) -> __m512i {
        // SAFETY: as above.
        unsafe { shift!(a, count, _mm512_slli_epi32: 1 2 3 4 5 6 7 8 16 24) }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(acc: __m512i, q: __m512i, a: *const i8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(acc, q, _mm512_set1_epi32(a.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn to_f32(a: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store_f32(to: *mut f32, value: __m512) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], index: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, index)
        }
    }
    #[inline(always)]
    unsafe fn bytes_e4m3(a: __m512i) -> [__m512; 4] {
        // SAFETY: as above.
        unsafe {
            // Two at a time as bf16, whose exponent is larger by 120. Their smallest are subnormal there, which is slow
            // but rare: they are below a 14,000th of the largest number of a group.
            let halves = |codes: __m512i| {
                let sign = _mm512_slli_epi32::<8>(_mm512_and_si512(codes, _mm512_set1_epi32(0x0080_0080)));
                let magnitude = _mm512_and_si512(codes, _mm512_set1_epi32(0x007f_007f));
                _mm512_or_si512(sign, _mm512_slli_epi32::<4>(magnitude))
            };
            let number = |bits| _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(TWO_TO_120));
            let (even, odd) = (halves(a), halves(_mm512_srli_epi32::<8>(a)));
            let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
            [
                number(_mm512_slli_epi32::<16>(even)),
                number(_mm512_slli_epi32::<16>(odd)),
                number(_mm512_and_si512(even, upper)),
                number(_mm512_and_si512(odd, upper)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m512, w: __m512i, x: u32) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let x = _mm512_set1_epi32(x as i32);
            _mm512_dpbf16_ps(acc, transmute::<__m512i, __m512bh>(x), transmute::<__m512i, __m512bh>(w))
        }
    }
    #[inline(always)]
    unsafe fn load_scales(from: *const u8, kind: ScaleType) -> __m512 {
        // SAFETY: as above.
        unsafe {
            match kind {
                ScaleType::F32 => _mm512_loadu_ps(from.cast()),
                ScaleType::Bf16 => {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
                ScaleType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
                ScaleType::E8m0 => {
                    let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                    // The smallest is half of the smallest normal number.
                    let smallest = _mm512_cmpeq_epi32_mask(codes, _mm512_setzero_si512());
                    let powers = _mm512_slli_epi32::<23>(codes);
                    _mm512_castsi512_ps(_mm512_mask_mov_epi32(powers, smallest, _mm512_set1_epi32(1 << 22)))
                }
                ScaleType::E4m3 => Self::load_e4m3(from),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { e4m3(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn bf16_pairs(low: __m512, high: __m512) -> __m512i {
        // SAFETY: as above.
        unsafe {
            // Lower half from `low`, upper half from `high`, then interleaved.
            let halves: __m512i = transmute(_mm512_cvtne2ps_pbh(high, low));
            let low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
            let high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(halves));
            _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
        }
    }
    #[inline(always)]
    unsafe fn round_bf16(a: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(a)));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }
}
