//! Conversions of f16 by NEON, which Rust has no stable intrinsics for: exact one way, nearest with ties to even the
//! other, NaN stays NaN.

use std::arch::aarch64::{float32x4_t, uint16x4_t};
use std::arch::asm;

/// Four f16, as bits, to f32.
#[inline(always)]
pub fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: `fcvtl` is part of NEON, which all of AArch64 has, and touches its registers alone.
    unsafe {
        asm!("fcvtl {wide:v}.4s, {halves:v}.4h", wide = lateout(vreg) wide, halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    wide
}

/// Four f32 to f16, as bits.
#[inline(always)]
pub fn narrow_f16(values: float32x4_t) -> uint16x4_t {
    let halves;
    // SAFETY: as above.
    unsafe {
        asm!("fcvtn {halves:v}.4h, {values:v}.4s", halves = lateout(vreg) halves, values = in(vreg) values,
            options(pure, nomem, nostack, preserves_flags));
    }
    halves
}
