//! AVX-512: one register.
//!
//! Every unsafe block here calls intrinsics of the features that [`crate::Isa::Avx512`] stands
//! for; values of this type exist only inside [`super::dispatch`], which has checked them.

use std::arch::x86_64::*;
use std::mem::transmute;
use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::{LANES, Vector, bf16_bits_by_integers};
use crate::Isa;

/// Folds eight lanes in the canonical order: 4, 2, 1.
macro_rules! fold {
    ($x:expr, $wide:ident, $single:ident) => {{
        let x = $x;
        let x = $wide(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = $wide(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32($single(x, _mm_movehdup_ps(x)))
    }};
}
pub(super) use fold;

#[derive(Clone, Copy)]
pub struct F32x16(__m512);

macro_rules! operator {
    ($($trait:ident $name:ident $intrinsic:ident;)*) => { $(
        impl $trait for F32x16 {
            type Output = F32x16;
            #[inline(always)]
            fn $name(self, other: F32x16) -> F32x16 {
                // SAFETY: see the module's documentation.
                F32x16(unsafe { $intrinsic(self.0, other.0) })
            }
        }
    )* };
}
operator!(Add add _mm512_add_ps; Sub sub _mm512_sub_ps; Mul mul _mm512_mul_ps; Div div _mm512_div_ps;);

impl Neg for F32x16 {
    type Output = F32x16;
    #[inline(always)]
    fn neg(self) -> F32x16 {
        // SAFETY: see the module's documentation.
        F32x16(unsafe { _mm512_xor_ps(self.0, _mm512_set1_ps(-0.0)) })
    }
}

/// The first `count` lanes.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    if count >= LANES { u16::MAX } else { (1u16 << count) - 1 }
}

/// Trait functions that are one expression of intrinsics.
macro_rules! value {
    ($($name:ident($($arg:ident: $t:ty),*) -> $out:ty = $body:expr;)*) => { $(
        #[inline(always)]
        fn $name($($arg: $t),*) -> $out {
            // SAFETY: see the module's documentation.
            unsafe { $body }
        }
    )* };
}

/// Trait functions that read or write memory.
macro_rules! memory {
    ($($name:ident($($arg:ident: $t:ty),*) -> $out:ty = $body:expr;)*) => { $(
        #[inline(always)]
        unsafe fn $name($($arg: $t),*) -> $out {
            // SAFETY: the caller promises the memory; for the instructions see the module.
            unsafe { $body }
        }
    )* };
}

pub(super) use {memory, value};

/// The nearest bf16 values. The instruction takes subnormal numbers for zero, which no other tier does.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn narrow(x: F32x16) -> __m256i {
    const SUBNORMAL: i32 = 0x20;
    if _mm512_fpclass_ps_mask::<SUBNORMAL>(x.0) == 0 {
        // SAFETY: 16 values of 16 bits in either type.
        unsafe { transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x.0)) }
    } else {
        _mm512_cvtepi32_epi16(bf16_bits_by_integers(x))
    }
}

/// Two vectors as one of pairs of bf16, subnormal numbers as zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pairs(low: F32x16, high: F32x16) -> __m512i {
    #[rustfmt::skip]
    let order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0,
    );
    // SAFETY: 32 values of 16 bits in either type.
    let both = unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high.0, low.0)) };
    _mm512_permutexvar_epi16(order, both)
}

impl Vector for F32x16 {
    type Mask = __mmask16;
    type Int = __m512i;
    const ISA: Isa = Isa::Avx512;

    value! {
        splat(x: f32) -> Self = F32x16(_mm512_set1_ps(x));
        from_array(x: [f32; LANES]) -> Self = F32x16(_mm512_loadu_ps(x.as_ptr()));
        mul_add(self: Self, a: Self, b: Self) -> Self = F32x16(_mm512_fmadd_ps(self.0, a.0, b.0));
        neg_mul_add(self: Self, a: Self, b: Self) -> Self = F32x16(_mm512_fnmadd_ps(self.0, a.0, b.0));
        min(self: Self, other: Self) -> Self = F32x16(_mm512_min_ps(self.0, other.0));
        max(self: Self, other: Self) -> Self = F32x16(_mm512_max_ps(self.0, other.0));
        sqrt(self: Self) -> Self = F32x16(_mm512_sqrt_ps(self.0));
        round(self: Self) -> Self = F32x16(_mm512_roundscale_ps::<0x08>(self.0));
        floor(self: Self) -> Self = F32x16(_mm512_roundscale_ps::<0x09>(self.0));
        trunc(self: Self) -> Self = F32x16(_mm512_roundscale_ps::<0x0b>(self.0));
        bf16_bits(self: Self) -> Self::Int = _mm512_cvtepu16_epi32(narrow(self));
        bf16_pairs_normal(self: Self, high: Self) -> Self::Int = pairs(self, high);
        scale_exp2(self: Self, n: Self) -> Self = F32x16(_mm512_scalef_ps(self.0, n.0));
        lt(self: Self, other: Self) -> Self::Mask = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0);
        le(self: Self, other: Self) -> Self::Mask = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(self.0, other.0);
        eq(self: Self, other: Self) -> Self::Mask = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0);
        ordered(self: Self, other: Self) -> Self::Mask = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(self.0, other.0);
        is_nan(self: Self) -> Self::Mask = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
        select(mask: Self::Mask, a: Self, b: Self) -> Self = F32x16(_mm512_mask_blend_ps(mask, b.0, a.0));
        to_bits(self: Self) -> Self::Int = _mm512_castps_si512(self.0);
        from_bits(bits: Self::Int) -> Self = F32x16(_mm512_castsi512_ps(bits));
        to_int(self: Self) -> Self::Int = _mm512_cvttps_epi32(self.0);
        from_int(x: Self::Int) -> Self = F32x16(_mm512_cvtepi32_ps(x));
        int_splat(x: i32) -> Self::Int = _mm512_set1_epi32(x);
        int_from_array(x: [i32; LANES]) -> Self::Int = _mm512_loadu_epi32(x.as_ptr());
        int_add(a: Self::Int, b: Self::Int) -> Self::Int = _mm512_add_epi32(a, b);
        int_sub(a: Self::Int, b: Self::Int) -> Self::Int = _mm512_sub_epi32(a, b);
        int_and(a: Self::Int, b: Self::Int) -> Self::Int = _mm512_and_si512(a, b);
        int_or(a: Self::Int, b: Self::Int) -> Self::Int = _mm512_or_si512(a, b);
        int_xor(a: Self::Int, b: Self::Int) -> Self::Int = _mm512_xor_si512(a, b);
        int_shl(a: Self::Int, bits: u32) -> Self::Int = _mm512_sllv_epi32(a, _mm512_set1_epi32(bits as i32));
        int_shr(a: Self::Int, bits: u32) -> Self::Int = _mm512_srav_epi32(a, _mm512_set1_epi32(bits as i32));
        int_shr_logical(a: Self::Int, bits: u32) -> Self::Int = _mm512_srlv_epi32(a, _mm512_set1_epi32(bits as i32));
        int_gt(a: Self::Int, b: Self::Int) -> Self::Mask = _mm512_cmpgt_epi32_mask(a, b);
        int_eq(a: Self::Int, b: Self::Int) -> Self::Mask = _mm512_cmpeq_epi32_mask(a, b);
        dot_bf16(self: Self, a: Self::Int, b: Self::Int) -> Self =
            F32x16(_mm512_dpbf16_ps(self.0, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)));
    }

    memory! {
        load(p: *const f32) -> Self = F32x16(_mm512_loadu_ps(p));
        store(self: Self, p: *mut f32) -> () = _mm512_storeu_ps(p, self.0);
        load_part(p: *const f32, count: usize, fill: f32) -> Self =
            F32x16(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(count), p));
        store_part(self: Self, p: *mut f32, count: usize) -> () = _mm512_mask_storeu_ps(p, first(count), self.0);
        load_bf16(p: *const bf16) -> Self =
            F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))));
        store_bf16(self: Self, p: *mut bf16) -> () =
            _mm256_storeu_si256(p.cast(), narrow(self));
        store_bf16_normal(self: Self, p: *mut bf16) -> () =
            _mm256_storeu_si256(p.cast(), transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0)));
        load_f16(p: *const f16) -> Self = F32x16(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())));
        store_f16(self: Self, p: *mut f16) -> () =
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
        int_load(p: *const i32) -> Self::Int = _mm512_loadu_epi32(p);
        int_store(x: Self::Int, p: *mut i32) -> () = _mm512_storeu_epi32(p, x);
    }

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: the array holds 16 values.
        unsafe { self.store(out.as_mut_ptr()) };
        out
    }
    #[inline(always)]
    fn int_to_array(x: Self::Int) -> [i32; LANES] {
        let mut out = [0; LANES];
        // SAFETY: the array holds 16 values.
        unsafe { Self::int_store(x, out.as_mut_ptr()) };
        out
    }
    #[inline(always)]
    fn mask_bits(mask: Self::Mask) -> u16 {
        mask
    }
    #[inline(always)]
    fn mask_from_bits(bits: u16) -> Self::Mask {
        bits
    }
    #[inline(always)]
    fn mask_and(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        a & b
    }
    #[inline(always)]
    fn mask_or(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        a | b
    }
    #[inline(always)]
    fn mask_not(a: Self::Mask) -> Self::Mask {
        !a
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: see the module's documentation.
        unsafe {
            let high = _mm512_extractf32x8_ps::<1>(self.0);
            fold!(_mm256_add_ps(_mm512_castps512_ps256(self.0), high), _mm_add_ps, _mm_add_ss)
        }
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: see the module's documentation.
        unsafe {
            let high = _mm512_extractf32x8_ps::<1>(self.0);
            fold!(_mm256_max_ps(_mm512_castps512_ps256(self.0), high), _mm_max_ps, _mm_max_ss)
        }
    }
}
