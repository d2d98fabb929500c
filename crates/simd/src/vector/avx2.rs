//! AVX2 with FMA and F16C: two registers.
//!
//! Every unsafe block here calls intrinsics of the features that [`crate::Isa::Avx2`] stands for;
//! values of this type exist only inside [`super::dispatch`], which has checked them.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::avx512::{fold, memory, value};
use super::{LANES, Vector, bf16_bits};
use crate::Isa;

#[derive(Clone, Copy)]
pub struct F32x16([__m256; 2]);

macro_rules! operator {
    ($($trait:ident $name:ident $intrinsic:ident;)*) => { $(
        impl $trait for F32x16 {
            type Output = F32x16;
            #[inline(always)]
            fn $name(self, other: F32x16) -> F32x16 {
                // SAFETY: see the module's documentation.
                F32x16(unsafe { [$intrinsic(self.0[0], other.0[0]), $intrinsic(self.0[1], other.0[1])] })
            }
        }
    )* };
}
operator!(Add add _mm256_add_ps; Sub sub _mm256_sub_ps; Mul mul _mm256_mul_ps; Div div _mm256_div_ps;);

impl Neg for F32x16 {
    type Output = F32x16;
    #[inline(always)]
    fn neg(self) -> F32x16 {
        // SAFETY: see the module's documentation.
        F32x16(unsafe {
            [_mm256_xor_ps(self.0[0], _mm256_set1_ps(-0.0)), _mm256_xor_ps(self.0[1], _mm256_set1_ps(-0.0))]
        })
    }
}

/// A register whose first `count - 8 * half` lanes are all ones.
#[inline(always)]
unsafe fn first(count: usize, half: i32) -> __m256i {
    // SAFETY: see the module's documentation.
    unsafe {
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count.min(LANES) as i32 - 8 * half), lane)
    }
}

#[inline(always)]
unsafe fn widen(p: *const bf16) -> __m256 {
    // SAFETY: the caller promises eight values; see the module's documentation.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
}

/// x * 2^n: the power is built as two factors, so that the first product is exact.
#[inline(always)]
unsafe fn scale(x: __m256, n: __m256) -> __m256 {
    // SAFETY: see the module's documentation.
    unsafe {
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        let rest = _mm256_sub_epi32(n, half);
        let bias = _mm256_set1_epi32(127);
        let half = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias)));
        let rest = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias)));
        _mm256_mul_ps(_mm256_mul_ps(x, half), rest)
    }
}

impl Vector for F32x16 {
    type Mask = [__m256; 2];
    type Int = [__m256i; 2];
    const ISA: Isa = Isa::Avx2;

    value! {
        splat(x: f32) -> Self = F32x16([_mm256_set1_ps(x); 2]);
        from_array(x: [f32; LANES]) -> Self = Self::load(x.as_ptr());
        mul_add(self: Self, a: Self, b: Self) -> Self = F32x16([_mm256_fmadd_ps(self.0[0], a.0[0], b.0[0]), _mm256_fmadd_ps(self.0[1], a.0[1], b.0[1])]);
        neg_mul_add(self: Self, a: Self, b: Self) -> Self = F32x16([_mm256_fnmadd_ps(self.0[0], a.0[0], b.0[0]), _mm256_fnmadd_ps(self.0[1], a.0[1], b.0[1])]);
        min(self: Self, other: Self) -> Self = F32x16([_mm256_min_ps(self.0[0], other.0[0]), _mm256_min_ps(self.0[1], other.0[1])]);
        max(self: Self, other: Self) -> Self = F32x16([_mm256_max_ps(self.0[0], other.0[0]), _mm256_max_ps(self.0[1], other.0[1])]);
        sqrt(self: Self) -> Self = F32x16([_mm256_sqrt_ps(self.0[0]), _mm256_sqrt_ps(self.0[1])]);
        round(self: Self) -> Self = F32x16([_mm256_round_ps::<0x08>(self.0[0]), _mm256_round_ps::<0x08>(self.0[1])]);
        floor(self: Self) -> Self = F32x16([_mm256_round_ps::<0x09>(self.0[0]), _mm256_round_ps::<0x09>(self.0[1])]);
        trunc(self: Self) -> Self = F32x16([_mm256_round_ps::<0x0b>(self.0[0]), _mm256_round_ps::<0x0b>(self.0[1])]);
        lt(self: Self, other: Self) -> Self::Mask = [_mm256_cmp_ps::<_CMP_LT_OQ>(self.0[0], other.0[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(self.0[1], other.0[1])];
        le(self: Self, other: Self) -> Self::Mask = [_mm256_cmp_ps::<_CMP_LE_OQ>(self.0[0], other.0[0]), _mm256_cmp_ps::<_CMP_LE_OQ>(self.0[1], other.0[1])];
        eq(self: Self, other: Self) -> Self::Mask = [_mm256_cmp_ps::<_CMP_EQ_OQ>(self.0[0], other.0[0]), _mm256_cmp_ps::<_CMP_EQ_OQ>(self.0[1], other.0[1])];
        ordered(self: Self, other: Self) -> Self::Mask = [_mm256_cmp_ps::<_CMP_ORD_Q>(self.0[0], other.0[0]), _mm256_cmp_ps::<_CMP_ORD_Q>(self.0[1], other.0[1])];
        is_nan(self: Self) -> Self::Mask = [_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0[0], self.0[0]), _mm256_cmp_ps::<_CMP_UNORD_Q>(self.0[1], self.0[1])];
        select(mask: Self::Mask, a: Self, b: Self) -> Self = F32x16([_mm256_blendv_ps(b.0[0], a.0[0], mask[0]), _mm256_blendv_ps(b.0[1], a.0[1], mask[1])]);
        mask_bits(mask: Self::Mask) -> u16 = (_mm256_movemask_ps(mask[0]) | _mm256_movemask_ps(mask[1]) << 8) as u16;
        mask_and(a: Self::Mask, b: Self::Mask) -> Self::Mask = [_mm256_and_ps(a[0], b[0]), _mm256_and_ps(a[1], b[1])];
        mask_or(a: Self::Mask, b: Self::Mask) -> Self::Mask = [_mm256_or_ps(a[0], b[0]), _mm256_or_ps(a[1], b[1])];
        mask_not(a: Self::Mask) -> Self::Mask = [_mm256_xor_ps(a[0], _mm256_castsi256_ps(_mm256_set1_epi32(-1))), _mm256_xor_ps(a[1], _mm256_castsi256_ps(_mm256_set1_epi32(-1)))];
        to_bits(self: Self) -> Self::Int = [_mm256_castps_si256(self.0[0]), _mm256_castps_si256(self.0[1])];
        from_bits(bits: Self::Int) -> Self = F32x16([_mm256_castsi256_ps(bits[0]), _mm256_castsi256_ps(bits[1])]);
        to_int(self: Self) -> Self::Int = [_mm256_cvttps_epi32(self.0[0]), _mm256_cvttps_epi32(self.0[1])];
        from_int(x: Self::Int) -> Self = F32x16([_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])]);
        int_splat(x: i32) -> Self::Int = [_mm256_set1_epi32(x); 2];
        int_from_array(x: [i32; LANES]) -> Self::Int = Self::int_load(x.as_ptr());
        int_add(a: Self::Int, b: Self::Int) -> Self::Int = [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])];
        int_sub(a: Self::Int, b: Self::Int) -> Self::Int = [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])];
        int_and(a: Self::Int, b: Self::Int) -> Self::Int = [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])];
        int_or(a: Self::Int, b: Self::Int) -> Self::Int = [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])];
        int_xor(a: Self::Int, b: Self::Int) -> Self::Int = [_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])];
        int_shl(a: Self::Int, bits: u32) -> Self::Int = [_mm256_sllv_epi32(a[0], _mm256_set1_epi32(bits as i32)), _mm256_sllv_epi32(a[1], _mm256_set1_epi32(bits as i32))];
        int_shr(a: Self::Int, bits: u32) -> Self::Int = [_mm256_srav_epi32(a[0], _mm256_set1_epi32(bits as i32)), _mm256_srav_epi32(a[1], _mm256_set1_epi32(bits as i32))];
        int_shr_logical(a: Self::Int, bits: u32) -> Self::Int = [_mm256_srlv_epi32(a[0], _mm256_set1_epi32(bits as i32)), _mm256_srlv_epi32(a[1], _mm256_set1_epi32(bits as i32))];
        int_gt(a: Self::Int, b: Self::Int) -> Self::Mask = [_mm256_castsi256_ps(_mm256_cmpgt_epi32(a[0], b[0])), _mm256_castsi256_ps(_mm256_cmpgt_epi32(a[1], b[1]))];
        int_eq(a: Self::Int, b: Self::Int) -> Self::Mask = [_mm256_castsi256_ps(_mm256_cmpeq_epi32(a[0], b[0])), _mm256_castsi256_ps(_mm256_cmpeq_epi32(a[1], b[1]))];
        scale_exp2(self: Self, n: Self) -> Self = F32x16([scale(self.0[0], n.0[0]), scale(self.0[1], n.0[1])]);
    }

    memory! {
        load(p: *const f32) -> Self = F32x16([_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]);
        load_bf16(p: *const bf16) -> Self = F32x16([widen(p), widen(p.add(8))]);
        load_f16(p: *const f16) -> Self = F32x16([_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))]);
        int_load(p: *const i32) -> Self::Int = [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())];
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
    fn mask_from_bits(bits: u16) -> Self::Mask {
        // SAFETY: see the module's documentation.
        unsafe {
            let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let low = _mm256_and_si256(_mm256_set1_epi32(bits as i32), lane);
            let high = _mm256_and_si256(_mm256_set1_epi32((bits >> 8) as i32), lane);
            [
                _mm256_castsi256_ps(_mm256_cmpeq_epi32(low, lane)),
                _mm256_castsi256_ps(_mm256_cmpeq_epi32(high, lane)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller promises the memory; see the module's documentation.
        unsafe {
            _mm256_storeu_ps(p, self.0[0]);
            _mm256_storeu_ps(p.add(8), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, count: usize, fill: f32) -> Self {
        // SAFETY: masked lanes are not read; wrapping_add because p + 8 may lie past the memory.
        unsafe {
            let (low, high) = (first(count, 0), first(count, 1));
            let fill = _mm256_set1_ps(fill);
            let x = [_mm256_maskload_ps(p, low), _mm256_maskload_ps(p.wrapping_add(8), high)];
            F32x16([
                _mm256_blendv_ps(fill, x[0], _mm256_castsi256_ps(low)),
                _mm256_blendv_ps(fill, x[1], _mm256_castsi256_ps(high)),
            ])
        }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, count: usize) {
        // SAFETY: masked lanes are not written; wrapping_add because p + 8 may lie past the memory.
        unsafe {
            _mm256_maskstore_ps(p, first(count, 0), self.0[0]);
            _mm256_maskstore_ps(p.wrapping_add(8), first(count, 1), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16) {
        // SAFETY: the caller promises the memory; see the module's documentation.
        unsafe {
            let bits = bf16_bits(self);
            // Packing works in halves of each register: put the quarters in order afterwards.
            let packed = _mm256_packus_epi32(bits[0], bits[1]);
            _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16) {
        // SAFETY: the caller promises the memory; see the module's documentation.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0[0]));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0[1]));
        }
    }
    #[inline(always)]
    unsafe fn int_store(x: Self::Int, p: *mut i32) {
        // SAFETY: the caller promises the memory; see the module's documentation.
        unsafe {
            _mm256_storeu_si256(p.cast(), x[0]);
            _mm256_storeu_si256(p.add(8).cast(), x[1]);
        }
    }

    #[inline(always)]
    fn dot_bf16(self, a: Self::Int, b: Self::Int) -> Self {
        let high = Self::int_splat(0xffff_0000u32 as i32);
        let low = Self::from_bits(Self::int_shl(a, 16)).mul_add(Self::from_bits(Self::int_shl(b, 16)), self);
        Self::from_bits(Self::int_and(a, high)).mul_add(Self::from_bits(Self::int_and(b, high)), low)
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: see the module's documentation.
        unsafe { fold!(_mm256_add_ps(self.0[0], self.0[1]), _mm_add_ps, _mm_add_ss) }
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: see the module's documentation.
        unsafe { fold!(_mm256_max_ps(self.0[0], self.0[1]), _mm_max_ps, _mm_max_ss) }
    }
}
