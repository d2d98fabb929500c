//! Sixteen 32-bit lanes: the one vector shape that the quantized kernels are written in.
//!
//! A tile of a quantized weight has 16 rows, so a lane is an output row whatever the instruction
//! set: one AVX-512 register, two AVX2 registers, four of NEON, or an array. Kernels are generic over [`Lanes`]
//! and are instantiated once per tier inside a function that enables the tier's features; every
//! method is inlined into it. [`at_tier`](super::tier::at_tier) picks the instance.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(super) use neon::Neon;
pub(super) use scalar::Scalar;

use super::tile::ScaleType;

/// From an exponent of bf16 to one of e4m3.
const TWO_TO_120: f32 = f32::from_bits((120 + 127) << 23);

/// 16 lanes of 32 bits. All methods are unsafe for one reason: the caller runs on a processor
/// (and inside a function) that has the tier's features; pointers are valid for what is read or
/// written and need no alignment.
#[allow(clippy::missing_safety_doc)] // stated once, above
pub(super) trait Lanes: Copy + 'static {
    /// 64 bytes of integers.
    type I: Copy;
    /// 16 f32.
    type F: Copy;

    /// Reads 64 bytes.
    unsafe fn load(from: *const u8) -> Self::I;
    /// Writes 64 bytes.
    unsafe fn store(to: *mut u8, value: Self::I);
    /// Whether there are 32 registers of 16 lanes, rather than the room of 8.
    const MANY: bool;

    /// All bytes the same.
    unsafe fn splat8(value: u8) -> Self::I;
    /// Byte `BYTE` of each lane, as f32.
    unsafe fn byte_f32<const BYTE: u32>(a: Self::I) -> Self::F;
    /// All bits zero.
    unsafe fn zero() -> Self::I;
    /// Bitwise and.
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    /// Sums of lanes.
    unsafe fn add_int(a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise or.
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Each lane shifted right by `count` (below 32), a constant after inlining.
    unsafe fn shift_right(a: Self::I, count: u32) -> Self::I;
    /// Each lane shifted left by `count` (below 32), a constant after inlining.
    unsafe fn shift_left(a: Self::I, count: u32) -> Self::I;

    /// acc + Σ over the four bytes of each lane of q (unsigned) · a (signed; the same four bytes,
    /// read at `a`, for every lane). Exact if q·a sums fit, which 8-bit codes do; `WIDE` says
    /// that codes may pass 127.
    unsafe fn dot<const WIDE: bool>(acc: Self::I, q: Self::I, a: *const i8) -> Self::I;

    /// Brings `units` units of 16 rows × 4 codes, an even number, into the order in which [`Lanes::dots`] reads them.
    #[inline(always)]
    unsafe fn arrange(codes: *mut u8, units: usize) {
        let _ = (codes, units);
    }
    /// Sums of the products of `units` arranged units with C rows of a.
    #[inline(always)]
    unsafe fn dots<const WIDE: bool, const C: usize>(
        codes: *const u8,
        units: usize,
        a: [*const i8; C],
    ) -> [Self::I; C] {
        // SAFETY: promised by the caller.
        unsafe { dots_by_unit::<Self, WIDE, C>(codes, units, a) }
    }

    /// Signed integers to f32.
    unsafe fn to_f32(a: Self::I) -> Self::F;
    /// All lanes the same.
    unsafe fn splat(value: f32) -> Self::F;
    /// Reads 16 f32.
    unsafe fn load_f32(from: *const f32) -> Self::F;
    /// Writes 16 f32.
    unsafe fn store_f32(to: *mut f32, value: Self::F);
    /// a + b.
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// a · b.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// Each byte of `index`, below 16, replaced by that byte of the table.
    unsafe fn lookup(table: &[u8; 16], index: Self::I) -> Self::I;
    /// Bytes 0 to 3 of each lane as 8-bit floats (e4m3), of which none is NaN.
    unsafe fn bytes_e4m3(a: Self::I) -> [Self::F; 4];
    /// acc + Σ over the two bf16 of each lane of w times those of x, by the instruction that products of pairs use: of
    /// tiers that have it ([`crate::gemm::uses_pairs`]).
    unsafe fn dot_pairs(acc: Self::F, w: Self::I, x: u32) -> Self::F;

    /// Reads 16 scales or biases of `kind`.
    unsafe fn load_scales(from: *const u8, kind: ScaleType) -> Self::F;
    /// Reads 16 bytes as unsigned integers, as f32.
    unsafe fn load_u8(from: *const u8) -> Self::F;
    /// Reads 16 bytes as 8-bit floats (e4m3), of which none is NaN.
    unsafe fn load_e4m3(from: *const u8) -> Self::F;

    /// Each lane: bf16(low) | bf16(high) << 16.
    unsafe fn bf16_pairs(low: Self::F, high: Self::F) -> Self::I;
    /// Rounded to bf16 and widened again.
    unsafe fn round_bf16(a: Self::F) -> Self::F;
}

/// [`Lanes::dots`] of units in the order of k.
#[inline(always)]
unsafe fn dots_by_unit<L: Lanes, const WIDE: bool, const C: usize>(
    codes: *const u8,
    units: usize,
    a: [*const i8; C],
) -> [L::I; C] {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = [L::zero(); C];
        for unit in 0..units {
            let q = L::load(codes.add(unit * 64));
            for c in 0..C {
                sums[c] = L::dot::<WIDE>(sums[c], q, a[c].add(unit * 4));
            }
        }
        sums
    }
}
