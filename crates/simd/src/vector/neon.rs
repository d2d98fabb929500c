//! NEON: four registers.
//!
//! Every unsafe block here calls intrinsics of NEON, which [`crate::Isa::Neon`] stands for; values
//! of this type exist only inside [`super::dispatch`]. (Where NEON is part of the target, as on most
//! systems, the compiler knows it and finds the blocks superfluous.)

#![allow(unused_unsafe)]

use std::arch::aarch64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::{LANES, Vector, bf16_bits};
use crate::Isa;
use crate::aarch64::{narrow_f16, widen_f16};

#[derive(Clone, Copy)]
pub struct F32x16([float32x4_t; 4]);

macro_rules! operator {
    ($($trait:ident $name:ident $intrinsic:ident;)*) => { $(
        impl $trait for F32x16 {
            type Output = F32x16;
            #[inline(always)]
            fn $name(self, other: F32x16) -> F32x16 {
                // SAFETY: see the module's documentation.
                F32x16(unsafe { [
                    $intrinsic(self.0[0], other.0[0]),
                    $intrinsic(self.0[1], other.0[1]),
                    $intrinsic(self.0[2], other.0[2]),
                    $intrinsic(self.0[3], other.0[3])
                ] })
            }
        }
    )* };
}
operator!(Add add vaddq_f32; Sub sub vsubq_f32; Mul mul vmulq_f32; Div div vdivq_f32;);

impl Neg for F32x16 {
    type Output = F32x16;
    #[inline(always)]
    fn neg(self) -> F32x16 {
        // SAFETY: see the module's documentation.
        F32x16(unsafe {
            [vnegq_f32(self.0[0]), vnegq_f32(self.0[1]), vnegq_f32(self.0[2]), vnegq_f32(self.0[3])]
        })
    }
}

#[inline(always)]
unsafe fn widen(p: *const bf16) -> float32x4_t {
    // SAFETY: the caller promises four values; see the module's documentation.
    unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
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

/// Trait functions that read memory.
macro_rules! memory {
    ($($name:ident($($arg:ident: $t:ty),*) -> $out:ty = $body:expr;)*) => { $(
        #[inline(always)]
        unsafe fn $name($($arg: $t),*) -> $out {
            // SAFETY: the caller promises the memory; for the instructions see the module.
            unsafe { $body }
        }
    )* };
}

impl Vector for F32x16 {
    type Mask = [uint32x4_t; 4];
    type Int = [int32x4_t; 4];
    const ISA: Isa = Isa::Neon;

    value! {
        splat(x: f32) -> Self = F32x16([vdupq_n_f32(x); 4]);
        from_array(x: [f32; LANES]) -> Self = Self::load(x.as_ptr());
        mul_add(self: Self, a: Self, b: Self) -> Self = F32x16([vfmaq_f32(b.0[0], self.0[0], a.0[0]), vfmaq_f32(b.0[1], self.0[1], a.0[1]), vfmaq_f32(b.0[2], self.0[2], a.0[2]), vfmaq_f32(b.0[3], self.0[3], a.0[3])]);
        neg_mul_add(self: Self, a: Self, b: Self) -> Self = F32x16([vfmsq_f32(b.0[0], self.0[0], a.0[0]), vfmsq_f32(b.0[1], self.0[1], a.0[1]), vfmsq_f32(b.0[2], self.0[2], a.0[2]), vfmsq_f32(b.0[3], self.0[3], a.0[3])]);
        min(self: Self, other: Self) -> Self = Self::select(self.lt(other), self, other);
        max(self: Self, other: Self) -> Self = Self::select(other.lt(self), self, other);
        sqrt(self: Self) -> Self = F32x16([vsqrtq_f32(self.0[0]), vsqrtq_f32(self.0[1]), vsqrtq_f32(self.0[2]), vsqrtq_f32(self.0[3])]);
        round(self: Self) -> Self = F32x16([vrndnq_f32(self.0[0]), vrndnq_f32(self.0[1]), vrndnq_f32(self.0[2]), vrndnq_f32(self.0[3])]);
        floor(self: Self) -> Self = F32x16([vrndmq_f32(self.0[0]), vrndmq_f32(self.0[1]), vrndmq_f32(self.0[2]), vrndmq_f32(self.0[3])]);
        trunc(self: Self) -> Self = F32x16([vrndq_f32(self.0[0]), vrndq_f32(self.0[1]), vrndq_f32(self.0[2]), vrndq_f32(self.0[3])]);
        lt(self: Self, other: Self) -> Self::Mask = [vcltq_f32(self.0[0], other.0[0]), vcltq_f32(self.0[1], other.0[1]), vcltq_f32(self.0[2], other.0[2]), vcltq_f32(self.0[3], other.0[3])];
        le(self: Self, other: Self) -> Self::Mask = [vcleq_f32(self.0[0], other.0[0]), vcleq_f32(self.0[1], other.0[1]), vcleq_f32(self.0[2], other.0[2]), vcleq_f32(self.0[3], other.0[3])];
        eq(self: Self, other: Self) -> Self::Mask = [vceqq_f32(self.0[0], other.0[0]), vceqq_f32(self.0[1], other.0[1]), vceqq_f32(self.0[2], other.0[2]), vceqq_f32(self.0[3], other.0[3])];
        select(mask: Self::Mask, a: Self, b: Self) -> Self = F32x16([vbslq_f32(mask[0], a.0[0], b.0[0]), vbslq_f32(mask[1], a.0[1], b.0[1]), vbslq_f32(mask[2], a.0[2], b.0[2]), vbslq_f32(mask[3], a.0[3], b.0[3])]);
        mask_and(a: Self::Mask, b: Self::Mask) -> Self::Mask = [vandq_u32(a[0], b[0]), vandq_u32(a[1], b[1]), vandq_u32(a[2], b[2]), vandq_u32(a[3], b[3])];
        mask_or(a: Self::Mask, b: Self::Mask) -> Self::Mask = [vorrq_u32(a[0], b[0]), vorrq_u32(a[1], b[1]), vorrq_u32(a[2], b[2]), vorrq_u32(a[3], b[3])];
        mask_not(a: Self::Mask) -> Self::Mask = [vmvnq_u32(a[0]), vmvnq_u32(a[1]), vmvnq_u32(a[2]), vmvnq_u32(a[3])];
        to_bits(self: Self) -> Self::Int = [vreinterpretq_s32_f32(self.0[0]), vreinterpretq_s32_f32(self.0[1]), vreinterpretq_s32_f32(self.0[2]), vreinterpretq_s32_f32(self.0[3])];
        from_bits(bits: Self::Int) -> Self = F32x16([vreinterpretq_f32_s32(bits[0]), vreinterpretq_f32_s32(bits[1]), vreinterpretq_f32_s32(bits[2]), vreinterpretq_f32_s32(bits[3])]);
        to_int(self: Self) -> Self::Int = [vcvtq_s32_f32(self.0[0]), vcvtq_s32_f32(self.0[1]), vcvtq_s32_f32(self.0[2]), vcvtq_s32_f32(self.0[3])];
        from_int(x: Self::Int) -> Self = F32x16([vcvtq_f32_s32(x[0]), vcvtq_f32_s32(x[1]), vcvtq_f32_s32(x[2]), vcvtq_f32_s32(x[3])]);
        int_splat(x: i32) -> Self::Int = [vdupq_n_s32(x); 4];
        int_from_array(x: [i32; LANES]) -> Self::Int = Self::int_load(x.as_ptr());
        int_add(a: Self::Int, b: Self::Int) -> Self::Int = [vaddq_s32(a[0], b[0]), vaddq_s32(a[1], b[1]), vaddq_s32(a[2], b[2]), vaddq_s32(a[3], b[3])];
        int_sub(a: Self::Int, b: Self::Int) -> Self::Int = [vsubq_s32(a[0], b[0]), vsubq_s32(a[1], b[1]), vsubq_s32(a[2], b[2]), vsubq_s32(a[3], b[3])];
        int_and(a: Self::Int, b: Self::Int) -> Self::Int = [vandq_s32(a[0], b[0]), vandq_s32(a[1], b[1]), vandq_s32(a[2], b[2]), vandq_s32(a[3], b[3])];
        int_or(a: Self::Int, b: Self::Int) -> Self::Int = [vorrq_s32(a[0], b[0]), vorrq_s32(a[1], b[1]), vorrq_s32(a[2], b[2]), vorrq_s32(a[3], b[3])];
        int_xor(a: Self::Int, b: Self::Int) -> Self::Int = [veorq_s32(a[0], b[0]), veorq_s32(a[1], b[1]), veorq_s32(a[2], b[2]), veorq_s32(a[3], b[3])];
        int_shl(a: Self::Int, bits: u32) -> Self::Int = [vshlq_s32(a[0], vdupq_n_s32(bits as i32)), vshlq_s32(a[1], vdupq_n_s32(bits as i32)), vshlq_s32(a[2], vdupq_n_s32(bits as i32)), vshlq_s32(a[3], vdupq_n_s32(bits as i32))];
        int_shr(a: Self::Int, bits: u32) -> Self::Int = [vshlq_s32(a[0], vdupq_n_s32(-(bits as i32))), vshlq_s32(a[1], vdupq_n_s32(-(bits as i32))), vshlq_s32(a[2], vdupq_n_s32(-(bits as i32))), vshlq_s32(a[3], vdupq_n_s32(-(bits as i32)))];
        int_shr_logical(a: Self::Int, bits: u32) -> Self::Int = [vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[0]), vdupq_n_s32(-(bits as i32)))), vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[1]), vdupq_n_s32(-(bits as i32)))), vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[2]), vdupq_n_s32(-(bits as i32)))), vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[3]), vdupq_n_s32(-(bits as i32))))];
        int_gt(a: Self::Int, b: Self::Int) -> Self::Mask = [vcgtq_s32(a[0], b[0]), vcgtq_s32(a[1], b[1]), vcgtq_s32(a[2], b[2]), vcgtq_s32(a[3], b[3])];
        int_eq(a: Self::Int, b: Self::Int) -> Self::Mask = [vceqq_s32(a[0], b[0]), vceqq_s32(a[1], b[1]), vceqq_s32(a[2], b[2]), vceqq_s32(a[3], b[3])];
    }

    memory! {
        load(p: *const f32) -> Self = F32x16([vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))]);
        load_bf16(p: *const bf16) -> Self = F32x16([widen(p), widen(p.add(4)), widen(p.add(8)), widen(p.add(12))]);
        int_load(p: *const i32) -> Self::Int = [vld1q_s32(p), vld1q_s32(p.add(4)), vld1q_s32(p.add(8)), vld1q_s32(p.add(12))];
    }

    #[inline(always)]
    fn scale_exp2(self, n: Self) -> Self {
        // Two factors: the first product is exact, so there is one rounding.
        let n = n.to_int();
        let half = Self::int_shr(n, 1);
        let bias = Self::int_splat(127);
        let rest = Self::int_shl(Self::int_add(Self::int_sub(n, half), bias), 23);
        let half = Self::int_shl(Self::int_add(half, bias), 23);
        self * Self::from_bits(half) * Self::from_bits(rest)
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
        let mut bits = 0;
        for k in 0..4 {
            // SAFETY: see the module's documentation.
            let set = unsafe { vaddvq_u32(vandq_u32(mask[k], vld1q_u32([1, 2, 4, 8].as_ptr()))) };
            bits |= (set as u16) << (4 * k);
        }
        bits
    }
    #[inline(always)]
    fn mask_from_bits(bits: u16) -> Self::Mask {
        let mut lanes = [0; LANES];
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = (bits >> i & 1) as i32;
        }
        Self::int_eq(Self::int_from_array(lanes), Self::int_splat(1))
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        for k in 0..4 {
            // SAFETY: the caller promises the memory; see the module's documentation.
            unsafe { vst1q_f32(p.add(4 * k), self.0[k]) };
        }
    }
    #[inline(always)]
    unsafe fn int_store(x: Self::Int, p: *mut i32) {
        for k in 0..4 {
            // SAFETY: the caller promises the memory; see the module's documentation.
            unsafe { vst1q_s32(p.add(4 * k), x[k]) };
        }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, count: usize, fill: f32) -> Self {
        let mut part = [fill; LANES];
        // SAFETY: the caller promises the memory; the copy stays inside the array.
        unsafe {
            std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), count.min(LANES));
            Self::load(part.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, count: usize) {
        let part = self.to_array();
        // SAFETY: the caller promises the memory; the copy stays inside the array.
        unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), p, count.min(LANES)) };
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16) {
        let bits = bf16_bits(self);
        for k in 0..4 {
            // SAFETY: the caller promises the memory; see the module's documentation.
            unsafe { vst1_u16(p.add(4 * k).cast(), vmovn_u32(vreinterpretq_u32_s32(bits[k]))) };
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        let p: *const u16 = p.cast();
        // SAFETY: the caller promises the memory; see the module's documentation.
        F32x16(std::array::from_fn(|k| widen_f16(unsafe { vld1_u16(p.add(4 * k)) })))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16) {
        for k in 0..4 {
            // SAFETY: the caller promises the memory; see the module's documentation.
            unsafe { vst1_u16(p.add(4 * k).cast(), narrow_f16(self.0[k])) };
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
        unsafe {
            let x = vaddq_f32(vaddq_f32(self.0[0], self.0[2]), vaddq_f32(self.0[1], self.0[3]));
            let x = vadd_f32(vget_low_f32(x), vget_high_f32(x));
            vget_lane_f32::<0>(x) + vget_lane_f32::<1>(x)
        }
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        // Not `vmaxvq_f32`, for which 0 is larger than -0.
        let mut lanes = self.to_array();
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                let (a, b) = (lanes[lane], lanes[lane + width]);
                lanes[lane] = if a > b { a } else { b };
            }
        }
        lanes[0]
    }
}
