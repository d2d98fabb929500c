//! Lanes in portable Rust: the definition that the other tiers are tested against.

use half::{bf16, f16};
use mica_codec::minifloat::{from_e4m3, from_e8m0};

use super::Lanes;
use crate::quant::tile::ScaleType;

/// Arrays of 16.
#[derive(Clone, Copy)]
pub(in crate::quant) struct Scalar;

#[inline(always)]
fn each<A: Copy, B>(a: [A; 16], f: impl FnMut(A) -> B) -> [B; 16] {
    a.map(f)
}

#[inline(always)]
fn zip<A: Copy, B: Copy, C>(a: [A; 16], b: [B; 16], mut f: impl FnMut(A, B) -> C) -> [C; 16] {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

// SAFETY of every block below: pointers are valid for the bytes read or written, as `Lanes` asks.
impl Lanes for Scalar {
    type I = [u32; 16];
    type F = [f32; 16];

    const MANY: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [u32; 16] {
        // SAFETY: as above.
        unsafe { from.cast::<[u32; 16]>().read_unaligned() }.map(u32::from_le)
    }
    #[inline(always)]
    unsafe fn store(to: *mut u8, value: [u32; 16]) {
        // SAFETY: as above.
        unsafe { to.cast::<[u32; 16]>().write_unaligned(value.map(u32::to_le)) }
    }
    #[inline(always)]
    unsafe fn splat8(value: u8) -> [u32; 16] {
        [u32::from_ne_bytes([value; 4]); 16]
    }
    #[inline(always)]
    unsafe fn byte_f32<const BYTE: u32>(a: [u32; 16]) -> [f32; 16] {
        each(a, |a| f32::from((a >> (8 * BYTE)) as u8))
    }
    #[inline(always)]
    unsafe fn zero() -> [u32; 16] {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn and(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn add_int(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn or(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn shift_right(a: [u32; 16], count: u32) -> [u32; 16] {
        each(a, |a| a >> count)
    }
    #[inline(always)]
    unsafe fn shift_left(a: [u32; 16], count: u32) -> [u32; 16] {
        each(a, |a| a << count)
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(acc: [u32; 16], q: [u32; 16], a: *const i8) -> [u32; 16] {
        // SAFETY: as above.
        let a = unsafe { a.cast::<[i8; 4]>().read() }.map(i32::from);
        zip(acc, q, |acc, q| {
            let q = q.to_le_bytes();
            let sum: i32 = (0..4).map(|at| i32::from(q[at]) * a[at]).sum();
            acc.wrapping_add(sum as u32)
        })
    }
    #[inline(always)]
    unsafe fn to_f32(a: [u32; 16]) -> [f32; 16] {
        each(a, |a| a as i32 as f32)
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 16] {
        [value; 16]
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> [f32; 16] {
        // SAFETY: as above.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_f32(to: *mut f32, value: [f32; 16]) {
        // SAFETY: as above.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], index: [u32; 16]) -> [u32; 16] {
        each(index, |index| u32::from_ne_bytes(index.to_ne_bytes().map(|byte| table[usize::from(byte & 15)])))
    }
    #[inline(always)]
    unsafe fn bytes_e4m3(a: [u32; 16]) -> [[f32; 16]; 4] {
        std::array::from_fn(|byte| each(a, |a| from_e4m3((a >> (8 * byte)) as u8)))
    }
    #[inline(always)]
    unsafe fn dot_pairs(_: [f32; 16], _: [u32; 16], _: u32) -> [f32; 16] {
        unreachable!("portable products are chains")
    }
    #[inline(always)]
    unsafe fn load_scales(from: *const u8, kind: ScaleType) -> [f32; 16] {
        // SAFETY: as above.
        unsafe {
            match kind {
                ScaleType::F32 => from.cast::<[f32; 16]>().read_unaligned(),
                ScaleType::Bf16 => each(from.cast::<[bf16; 16]>().read_unaligned(), bf16::to_f32),
                ScaleType::F16 => each(from.cast::<[f16; 16]>().read_unaligned(), f16::to_f32),
                ScaleType::E8m0 => each(from.cast::<[u8; 16]>().read_unaligned(), from_e8m0),
                ScaleType::E4m3 => Self::load_e4m3(from),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> [f32; 16] {
        // SAFETY: as above.
        each(unsafe { from.cast::<[u8; 16]>().read_unaligned() }, f32::from)
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> [f32; 16] {
        // SAFETY: as above.
        each(unsafe { from.cast::<[u8; 16]>().read_unaligned() }, from_e4m3)
    }
    #[inline(always)]
    unsafe fn bf16_pairs(low: [f32; 16], high: [f32; 16]) -> [u32; 16] {
        let bits = |value: f32| u32::from(bf16::from_f32(value).to_bits());
        zip(low, high, |low, high| bits(low) | bits(high) << 16)
    }
    #[inline(always)]
    unsafe fn round_bf16(a: [f32; 16]) -> [f32; 16] {
        each(a, |a| bf16::from_f32(a).to_f32())
    }
}
