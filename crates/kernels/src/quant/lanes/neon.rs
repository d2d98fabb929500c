//! Lanes as four NEON registers.
//!
//! FEAT_I8MM multiplies unsigned by signed bytes in one instruction (`usdot`), FEAT_DotProd signed by signed ones
//! (`sdot`): codes below 128 are both. Larger ones are multiplied as q − 128, and what that leaves out, 128·Σa, is
//! added. Without either, products are 16 bits wide. With many rows FEAT_I8MM multiplies two rows of eight codes by two
//! rows of a at once (`usmmla`), twice the products of `usdot`. The instructions are written out because their
//! intrinsics are not stable in Rust.

use std::arch::aarch64::*;
use std::arch::asm;

use mica_simd::aarch64::widen_f16;

use super::{Lanes, TWO_TO_120, dots_by_unit};
use crate::quant::tile::ScaleType;

/// How bytes are multiplied: in long products of 16 bits, …
pub(in crate::quant) const LONG: u8 = 0;
/// … by `sdot`, …
pub(in crate::quant) const DOT: u8 = 1;
/// … by `usdot`.
pub(in crate::quant) const I8MM: u8 = 2;

/// Four q registers: lanes 0-3, 4-7, 8-11 and 12-15. Whatever `PRODUCTS` are formed by, integers are exact, so the bits
/// are the same.
#[derive(Clone, Copy)]
pub(in crate::quant) struct Neon<const PRODUCTS: u8>;

type I = [uint32x4_t; 4];
type F = [float32x4_t; 4];

/// The same of each register (or of each pair of registers): closures would not be part of the tier's function.
macro_rules! each {
    ($($operand:ident),+ => $value:expr) => {{
        macro_rules! at {
            ($k:literal) => {{
                $(let $operand = $operand[$k];)+
                $value
            }};
        }
        [at!(0), at!(1), at!(2), at!(3)]
    }};
}

/// Shifts by an immediate: `count` is a constant after inlining, so one arm is left.
macro_rules! shift {
    ($a:expr, $count:expr, $by:ident: $($n:literal)*) => {{
        let a = $a;
        match $count {
            0 => a,
            $($n => each!(a => $by::<$n>(a)),)*
            _ => unreachable!("shifts by a byte or less, or by two bytes or three"),
        }
    }};
}

/// acc + the four products of each lane of signed q and the first four bytes of a.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(acc: int32x4_t, q: int8x16_t, a: int8x16_t) -> int32x4_t {
    let mut acc = acc;
    // SAFETY: the feature is enabled, and only registers are touched.
    unsafe {
        asm!("sdot {acc:v}.4s, {q:v}.16b, {a:v}.4b[0]", acc = inout(vreg) acc, q = in(vreg) q, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// acc + the four products of each lane of unsigned q and the first four bytes, signed, of a.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usdot(acc: int32x4_t, q: uint8x16_t, a: int8x16_t) -> int32x4_t {
    let mut acc = acc;
    // SAFETY: the feature is enabled, and only registers are touched.
    unsafe {
        asm!("usdot {acc:v}.4s, {q:v}.16b, {a:v}.4b[0]", acc = inout(vreg) acc, q = in(vreg) q, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// acc + the products of two rows of eight q, unsigned, by two rows of eight a, signed: q0·a0, q0·a1, q1·a0, q1·a1.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usmmla(acc: int32x4_t, q: uint8x16_t, a: int8x16_t) -> int32x4_t {
    let mut acc = acc;
    // SAFETY: the feature is enabled, and only registers are touched.
    unsafe {
        asm!("usmmla {acc:v}.4s, {q:v}.16b, {a:v}.16b", acc = inout(vreg) acc, q = in(vreg) q, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// q − 128, as signed bytes.
#[inline(always)]
unsafe fn centred(q: uint8x16_t) -> int8x16_t {
    // SAFETY: as below.
    unsafe { vreinterpretq_s8_u8(veorq_u8(q, vdupq_n_u8(0x80))) }
}

/// f32 whose upper half is the value rounded to bf16, to nearest even, as integers; NaN stays NaN.
#[inline(always)]
unsafe fn bf16_bits(a: float32x4_t) -> uint32x4_t {
    // SAFETY: as below.
    unsafe {
        let bits = vreinterpretq_u32_f32(a);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vbslq_u32(vceqq_f32(a, a), rounded, quiet)
    }
}

/// Sixteen bytes as integers.
#[inline(always)]
unsafe fn widen_u8(from: *const u8) -> I {
    // SAFETY: as below.
    unsafe {
        let bytes = vld1q_u8(from);
        let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
        [
            vmovl_u16(vget_low_u16(low)),
            vmovl_high_u16(low),
            vmovl_u16(vget_low_u16(high)),
            vmovl_high_u16(high),
        ]
    }
}

/// The low byte of each half of a lane, an 8-bit float (e4m3), as bf16 divided by 2¹²⁰.
#[inline(always)]
unsafe fn halves_of_e4m3(codes: uint32x4_t) -> uint32x4_t {
    // SAFETY: as below.
    unsafe {
        let sign = vshlq_n_u32::<8>(vandq_u32(codes, vdupq_n_u32(0x0080_0080)));
        vorrq_u32(sign, vshlq_n_u32::<4>(vandq_u32(codes, vdupq_n_u32(0x007f_007f))))
    }
}

// SAFETY of every block below: the features are enabled and the pointers valid, as `Lanes` asks.
#[allow(unused_unsafe)] // where NEON is part of the target, most intrinsics are safe
impl<const PRODUCTS: u8> Lanes for Neon<PRODUCTS> {
    type I = I;
    type F = F;

    // 32 registers, of which 16 lanes take four.
    const MANY: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> I {
        let from: *const u32 = from.cast();
        // SAFETY: as above.
        unsafe { [vld1q_u32(from), vld1q_u32(from.add(4)), vld1q_u32(from.add(8)), vld1q_u32(from.add(12))] }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u8, value: I) {
        let to: *mut u32 = to.cast();
        for k in 0..4 {
            // SAFETY: as above.
            unsafe { vst1q_u32(to.add(4 * k), value[k]) }
        }
    }
    #[inline(always)]
    unsafe fn splat8(value: u8) -> I {
        // SAFETY: as above.
        unsafe { [vreinterpretq_u32_u8(vdupq_n_u8(value)); 4] }
    }
    #[inline(always)]
    unsafe fn byte_f32<const BYTE: u32>(a: I) -> F {
        // SAFETY: as above.
        unsafe {
            let a = Self::shift_right(a, 8 * BYTE);
            each!(a => vcvtq_f32_u32(vandq_u32(a, vdupq_n_u32(255))))
        }
    }
    #[inline(always)]
    unsafe fn zero() -> I {
        // SAFETY: as above.
        unsafe { [vdupq_n_u32(0); 4] }
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        // SAFETY: as above.
        unsafe { each!(a, b => vandq_u32(a, b)) }
    }
    #[inline(always)]
    unsafe fn add_int(a: I, b: I) -> I {
        // SAFETY: as above.
        unsafe { each!(a, b => vaddq_u32(a, b)) }
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        // SAFETY: as above.
        unsafe { each!(a, b => vorrq_u32(a, b)) }
    }
    #[inline(always)]
    unsafe fn shift_right(a: I, count: u32) -> I {
        // SAFETY: as above.
        unsafe { shift!(a, count, vshrq_n_u32: 1 2 3 4 5 6 7 8 16 24) }
    }
    #[inline(always)]
    unsafe fn shift_left(a: I, count: u32) -> I {
        // SAFETY: as above.
        unsafe { shift!(a, count, vshlq_n_u32: 1 2 3 4 5 6 7 8 16 24) }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(acc: I, q: I, a: *const i8) -> I {
        // SAFETY: as above.
        unsafe {
            let four = a.cast::<i32>().read_unaligned();
            // Dot products pick the four bytes by lane: a plain load, where repeating them takes a vector operation.
            let four =
                if PRODUCTS == LONG { vdupq_n_s32(four) } else { vsetq_lane_s32::<0>(four, vdupq_n_s32(0)) };
            let a = vreinterpretq_s8_s32(four);
            let acc = each!(acc => vreinterpretq_s32_u32(acc));
            let q = each!(q => vreinterpretq_u8_u32(q));
            let sums = match PRODUCTS {
                I8MM => each!(acc, q => usdot(acc, q, a)),
                DOT if WIDE => {
                    let rest = vshlq_n_s32::<7>(sdot(vdupq_n_s32(0), vdupq_n_s8(1), a));
                    each!(acc, q => vaddq_s32(acc, sdot(rest, centred(q), a)))
                }
                DOT => each!(acc, q => sdot(acc, vreinterpretq_s8_u8(q), a)),
                _ if WIDE => {
                    // Two products of −128·−128 would not fit 16 bits: they are added in 32.
                    let rest = vshlq_n_s32::<7>(vpaddlq_s16(vpaddlq_s8(a)));
                    each!(acc, q => {
                        let q = centred(q);
                        let low = vpaddlq_s16(vmull_s8(vget_low_s8(q), vget_low_s8(a)));
                        let high = vpaddlq_s16(vmull_high_s8(q, a));
                        vaddq_s32(vaddq_s32(acc, rest), vpaddq_s32(low, high))
                    })
                }
                // Two products of codes below 128 fit: 2·127·128 < 2¹⁵.
                _ => each!(acc, q => {
                    let q = vreinterpretq_s8_u8(q);
                    let low = vmull_s8(vget_low_s8(q), vget_low_s8(a));
                    vpadalq_s16(acc, vpaddq_s16(low, vmull_high_s8(q, a)))
                }),
            };
            each!(sums => vreinterpretq_u32_s32(sums))
        }
    }
    #[inline(always)]
    unsafe fn arrange(codes: *mut u8, units: usize) {
        if PRODUCTS != I8MM {
            return;
        }
        // Rows side by side, eight codes each: what `usmmla` takes.
        for pair in 0..units / 2 {
            // SAFETY: as above.
            unsafe {
                let at = codes.add(pair * 128);
                let (low, high) = (Self::load(at), Self::load(at.add(64)));
                for k in 0..4 {
                    vst1q_u32(at.add(k * 32).cast(), vzip1q_u32(low[k], high[k]));
                    vst1q_u32(at.add(k * 32 + 16).cast(), vzip2q_u32(low[k], high[k]));
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn dots<const WIDE: bool, const C: usize>(
        codes: *const u8,
        units: usize,
        a: [*const i8; C],
    ) -> [I; C] {
        // SAFETY: as above.
        unsafe {
            if PRODUCTS != I8MM {
                return dots_by_unit::<Self, WIDE, C>(codes, units, a);
            }
            // By pairs of rows of a (of which half as many are used as there are), then by pairs of rows of q.
            const { assert!(C.is_multiple_of(2)) };
            let mut squares = [[vdupq_n_s32(0); 8]; C];
            for pair in 0..units / 2 {
                let mut rows = [vdupq_n_s8(0); C];
                for c in 0..C / 2 {
                    rows[c] =
                        vcombine_s8(vld1_s8(a[2 * c].add(pair * 8)), vld1_s8(a[2 * c + 1].add(pair * 8)));
                }
                for k in 0..8 {
                    let q = vld1q_u8(codes.add(pair * 128 + k * 16));
                    for c in 0..C / 2 {
                        squares[c][k] = usmmla(squares[c][k], q, rows[c]);
                    }
                }
            }
            let mut sums = [[vdupq_n_u32(0); 4]; C];
            for c in 0..C / 2 {
                for k in 0..4 {
                    let (upper, lower) = (squares[c][2 * k], squares[c][2 * k + 1]);
                    sums[2 * c][k] = vreinterpretq_u32_s32(vuzp1q_s32(upper, lower));
                    sums[2 * c + 1][k] = vreinterpretq_u32_s32(vuzp2q_s32(upper, lower));
                }
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        // SAFETY: as above.
        unsafe { each!(a => vcvtq_f32_s32(vreinterpretq_s32_u32(a))) }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> F {
        // SAFETY: as above.
        unsafe { [vdupq_n_f32(value); 4] }
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> F {
        // SAFETY: as above.
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4)), vld1q_f32(from.add(8)), vld1q_f32(from.add(12))] }
    }
    #[inline(always)]
    unsafe fn store_f32(to: *mut f32, value: F) {
        for k in 0..4 {
            // SAFETY: as above.
            unsafe { vst1q_f32(to.add(4 * k), value[k]) }
        }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { each!(a, b => vaddq_f32(a, b)) }
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { each!(a, b => vmulq_f32(a, b)) }
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        // SAFETY: as above.
        unsafe { each!(a, b, c => vfmaq_f32(c, a, b)) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], index: I) -> I {
        // SAFETY: as above.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            each!(index => vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(index))))
        }
    }
    #[inline(always)]
    unsafe fn bytes_e4m3(a: I) -> [F; 4] {
        // SAFETY: as above.
        unsafe {
            // Two at a time as bf16, whose exponent is larger by 120.
            let even = each!(a => halves_of_e4m3(a));
            let odd = each!(a => halves_of_e4m3(vshrq_n_u32::<8>(a)));
            let scale = vdupq_n_f32(TWO_TO_120);
            let upper = vdupq_n_u32(0xffff_0000);
            [
                each!(even => vmulq_f32(vreinterpretq_f32_u32(vshlq_n_u32::<16>(even)), scale)),
                each!(odd => vmulq_f32(vreinterpretq_f32_u32(vshlq_n_u32::<16>(odd)), scale)),
                each!(even => vmulq_f32(vreinterpretq_f32_u32(vandq_u32(even, upper)), scale)),
                each!(odd => vmulq_f32(vreinterpretq_f32_u32(vandq_u32(odd, upper)), scale)),
            ]
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
            let halves: *const u16 = from.cast();
            match kind {
                ScaleType::F32 => Self::load_f32(from.cast()),
                ScaleType::Bf16 => {
                    let halves = [halves, halves.add(4), halves.add(8), halves.add(12)];
                    each!(halves => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(halves))))
                }
                ScaleType::F16 => {
                    let halves = [halves, halves.add(4), halves.add(8), halves.add(12)];
                    each!(halves => widen_f16(vld1_u16(halves)))
                }
                ScaleType::E8m0 => {
                    // The smallest is half of the smallest normal number.
                    let smallest = vdupq_n_u32(1 << 22);
                    let codes = widen_u8(from);
                    each!(codes => {
                        let powers = vshlq_n_u32::<23>(codes);
                        vreinterpretq_f32_u32(vbslq_u32(vceqzq_u32(codes), smallest, powers))
                    })
                }
                ScaleType::E4m3 => Self::load_e4m3(from),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> F {
        // SAFETY: as above.
        unsafe {
            let codes = widen_u8(from);
            each!(codes => vcvtq_f32_u32(codes))
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> F {
        // SAFETY: as above.
        unsafe {
            let codes = widen_u8(from);
            let scale = vdupq_n_f32(TWO_TO_120);
            each!(codes => {
                let bits = vshlq_n_u32::<16>(halves_of_e4m3(codes));
                vmulq_f32(vreinterpretq_f32_u32(bits), scale)
            })
        }
    }
    #[inline(always)]
    unsafe fn bf16_pairs(low: F, high: F) -> I {
        // SAFETY: as above.
        unsafe { each!(low, high => vsriq_n_u32::<16>(bf16_bits(high), bf16_bits(low))) }
    }
    #[inline(always)]
    unsafe fn round_bf16(a: F) -> F {
        // SAFETY: as above.
        unsafe { each!(a => vreinterpretq_f32_u32(vandq_u32(bf16_bits(a), vdupq_n_u32(0xffff_0000)))) }
    }
}
