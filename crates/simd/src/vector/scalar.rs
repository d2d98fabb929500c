//! The portable tier: an array, one lane at a time. The definition that the others are tested
//! against.

use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::{LANES, Vector};
use crate::Isa;

#[derive(Clone, Copy)]
pub struct F32x16([f32; LANES]);

macro_rules! lanes {
    ($i:ident => $value:expr) => {{
        let mut out = [Default::default(); LANES];
        for ($i, lane) in out.iter_mut().enumerate() {
            *lane = $value;
        }
        out
    }};
}

macro_rules! operator {
    ($($trait:ident $name:ident $op:tt;)*) => { $(
        impl $trait for F32x16 {
            type Output = F32x16;
            #[inline(always)]
            fn $name(self, other: F32x16) -> F32x16 {
                F32x16(lanes!(i => self.0[i] $op other.0[i]))
            }
        }
    )* };
}
operator!(Add add +; Sub sub -; Mul mul *; Div div /;);

impl Neg for F32x16 {
    type Output = F32x16;
    #[inline(always)]
    fn neg(self) -> F32x16 {
        F32x16(lanes!(i => -self.0[i]))
    }
}

impl Vector for F32x16 {
    type Mask = [bool; LANES];
    type Int = [i32; LANES];
    const ISA: Isa = Isa::Scalar;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        F32x16([x; LANES])
    }
    #[inline(always)]
    fn from_array(x: [f32; LANES]) -> Self {
        F32x16(x)
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        self.0
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: promised by the caller.
        F32x16(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, count: usize, fill: f32) -> Self {
        let mut out = [fill; LANES];
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), count.min(LANES)) };
        F32x16(out)
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, count: usize) {
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), p, count.min(LANES)) };
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: promised by the caller.
        F32x16(lanes!(i => f32::from_bits((unsafe { p.add(i).read_unaligned() }.to_bits() as u32) << 16)))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16) {
        for i in 0..LANES {
            // SAFETY: promised by the caller.
            unsafe { p.add(i).write_unaligned(bf16::from_f32(self.0[i])) };
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: promised by the caller.
        F32x16(lanes!(i => unsafe { p.add(i).read_unaligned() }.to_f32()))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16) {
        for i in 0..LANES {
            // SAFETY: promised by the caller.
            unsafe { p.add(i).write_unaligned(f16::from_f32(self.0[i])) };
        }
    }

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        F32x16(lanes!(i => self.0[i].mul_add(a.0[i], b.0[i])))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self, b: Self) -> Self {
        F32x16(lanes!(i => (-self.0[i]).mul_add(a.0[i], b.0[i])))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        F32x16(lanes!(i => if self.0[i] < other.0[i] { self.0[i] } else { other.0[i] }))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        F32x16(lanes!(i => if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] }))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        F32x16(lanes!(i => self.0[i].sqrt()))
    }
    #[inline(always)]
    fn round(self) -> Self {
        F32x16(lanes!(i => self.0[i].round_ties_even()))
    }
    #[inline(always)]
    fn floor(self) -> Self {
        F32x16(lanes!(i => self.0[i].floor()))
    }
    #[inline(always)]
    fn trunc(self) -> Self {
        F32x16(lanes!(i => self.0[i].trunc()))
    }
    #[inline(always)]
    fn scale_exp2(self, n: Self) -> Self {
        F32x16(lanes!(i => {
            // Two factors: the first product is exact, so there is one rounding.
            let n = n.0[i] as i32;
            let half = n >> 1;
            let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
            self.0[i] * power(half) * power(n - half)
        }))
    }

    #[inline(always)]
    fn lt(self, other: Self) -> Self::Mask {
        lanes!(i => self.0[i] < other.0[i])
    }
    #[inline(always)]
    fn le(self, other: Self) -> Self::Mask {
        lanes!(i => self.0[i] <= other.0[i])
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Self::Mask {
        lanes!(i => self.0[i] == other.0[i])
    }
    #[inline(always)]
    fn select(mask: Self::Mask, a: Self, b: Self) -> Self {
        F32x16(lanes!(i => if mask[i] { a.0[i] } else { b.0[i] }))
    }
    #[inline(always)]
    fn mask_bits(mask: Self::Mask) -> u16 {
        mask.iter().enumerate().fold(0, |bits, (i, &set)| bits | (set as u16) << i)
    }
    #[inline(always)]
    fn mask_from_bits(bits: u16) -> Self::Mask {
        lanes!(i => bits >> i & 1 == 1)
    }
    #[inline(always)]
    fn mask_and(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        lanes!(i => a[i] & b[i])
    }
    #[inline(always)]
    fn mask_or(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        lanes!(i => a[i] | b[i])
    }
    #[inline(always)]
    fn mask_not(a: Self::Mask) -> Self::Mask {
        lanes!(i => !a[i])
    }

    #[inline(always)]
    fn to_bits(self) -> Self::Int {
        lanes!(i => self.0[i].to_bits() as i32)
    }
    #[inline(always)]
    fn from_bits(bits: Self::Int) -> Self {
        F32x16(lanes!(i => f32::from_bits(bits[i] as u32)))
    }
    #[inline(always)]
    fn to_int(self) -> Self::Int {
        lanes!(i => self.0[i] as i32)
    }
    #[inline(always)]
    fn from_int(x: Self::Int) -> Self {
        F32x16(lanes!(i => x[i] as f32))
    }
    #[inline(always)]
    fn int_splat(x: i32) -> Self::Int {
        [x; LANES]
    }
    #[inline(always)]
    fn int_from_array(x: [i32; LANES]) -> Self::Int {
        x
    }
    #[inline(always)]
    fn int_to_array(x: Self::Int) -> [i32; LANES] {
        x
    }
    #[inline(always)]
    unsafe fn int_load(p: *const i32) -> Self::Int {
        // SAFETY: promised by the caller.
        unsafe { p.cast::<[i32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn int_store(x: Self::Int, p: *mut i32) {
        // SAFETY: promised by the caller.
        unsafe { p.cast::<[i32; LANES]>().write_unaligned(x) }
    }
    #[inline(always)]
    fn int_add(a: Self::Int, b: Self::Int) -> Self::Int {
        lanes!(i => a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn int_sub(a: Self::Int, b: Self::Int) -> Self::Int {
        lanes!(i => a[i].wrapping_sub(b[i]))
    }
    #[inline(always)]
    fn int_and(a: Self::Int, b: Self::Int) -> Self::Int {
        lanes!(i => a[i] & b[i])
    }
    #[inline(always)]
    fn int_or(a: Self::Int, b: Self::Int) -> Self::Int {
        lanes!(i => a[i] | b[i])
    }
    #[inline(always)]
    fn int_xor(a: Self::Int, b: Self::Int) -> Self::Int {
        lanes!(i => a[i] ^ b[i])
    }
    #[inline(always)]
    fn int_shl(a: Self::Int, bits: u32) -> Self::Int {
        lanes!(i => a[i] << bits)
    }
    #[inline(always)]
    fn int_shr(a: Self::Int, bits: u32) -> Self::Int {
        lanes!(i => a[i] >> bits)
    }
    #[inline(always)]
    fn int_shr_logical(a: Self::Int, bits: u32) -> Self::Int {
        lanes!(i => ((a[i] as u32) >> bits) as i32)
    }
    #[inline(always)]
    fn int_gt(a: Self::Int, b: Self::Int) -> Self::Mask {
        lanes!(i => a[i] > b[i])
    }
    #[inline(always)]
    fn int_eq(a: Self::Int, b: Self::Int) -> Self::Mask {
        lanes!(i => a[i] == b[i])
    }

    #[inline(always)]
    fn dot_bf16(self, a: Self::Int, b: Self::Int) -> Self {
        let low = |x: i32| f32::from_bits((x as u32) << 16);
        let high = |x: i32| f32::from_bits(x as u32 & 0xffff_0000);
        F32x16(lanes!(i => high(a[i]).mul_add(high(b[i]), low(a[i]).mul_add(low(b[i]), self.0[i]))))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let mut x = self.0;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] += x[i + half];
            }
        }
        x[0]
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        let mut lanes = self.0;
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                let (a, b) = (lanes[lane], lanes[lane + width]);
                lanes[lane] = if a > b { a } else { b };
            }
        }
        lanes[0]
    }
}
