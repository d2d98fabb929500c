//! Loops over registers: as many independent chains as hide the latency of the instruction, nothing from memory.

use std::arch::asm;

use mica_simd::Isa;

use crate::{Arithmetic, Loop};

/// Only called for tiers that the machine has.
pub fn innermost(isa: Isa, arithmetic: Arithmetic) -> Option<Loop> {
    // Twelve instructions a round on vectors, four on tiles of 16 × 16 sums.
    Some(match (isa, arithmetic) {
        (Isa::Amx | Isa::Avx512Bf16 | Isa::Avx512, Arithmetic::F32) => (avx512_f32, 12 * 32),
        (Isa::Avx512, Arithmetic::Bf16) => (avx512_f32, 12 * 32),
        (Isa::Avx512Bf16, Arithmetic::Bf16) => (avx512_bf16, 12 * 64),
        (Isa::Avx512 | Isa::Avx512Bf16, Arithmetic::Int8) => (avx512_int8, 12 * 128),
        (Isa::Amx, Arithmetic::Bf16) => (amx_bf16, 4 * 16 * 16 * 64),
        (Isa::Amx, Arithmetic::Int8) => (amx_int8, 4 * 16 * 16 * 128),
        (Isa::Avx2 | Isa::Avx2Vnni, Arithmetic::F32 | Arithmetic::Bf16) => (avx2_f32, 12 * 16),
        (Isa::Avx2Vnni, Arithmetic::Int8) => (avx2_vnni_int8, 12 * 64),
        (Isa::Avx2, Arithmetic::Int8) => (avx2_int8, 4 * 64),
        (Isa::Scalar | Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, _) => return None,
    })
}

/// A loop of twelve instructions, each with a sum of its own and the same two factors.
macro_rules! twelve {
    ($(#[$doc:meta])* $name:ident, $instruction:literal, $register:literal) => {
        $(#[$doc])*
        fn $name(rounds: usize) {
            // SAFETY: registers only, all declared; whoever chose this loop made sure of the tier.
            unsafe {
                asm!("2:",
                    twelve!(@ $instruction, $register, "0"), twelve!(@ $instruction, $register, "1"),
                    twelve!(@ $instruction, $register, "2"), twelve!(@ $instruction, $register, "3"),
                    twelve!(@ $instruction, $register, "4"), twelve!(@ $instruction, $register, "5"),
                    twelve!(@ $instruction, $register, "6"), twelve!(@ $instruction, $register, "7"),
                    twelve!(@ $instruction, $register, "8"), twelve!(@ $instruction, $register, "9"),
                    twelve!(@ $instruction, $register, "10"), twelve!(@ $instruction, $register, "11"),
                    "dec {n}", "jnz 2b", n = inout(reg) rounds.max(1) => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    inout("xmm12") 0f32 => _, inout("xmm13") 0f32 => _, options(nostack, nomem));
            }
        }
    };
    (@ $instruction:literal, $register:literal, $sum:literal) => {
        concat!($instruction, " ", $register, $sum, ", ", $register, "12, ", $register, "13")
    };
}

twelve!(avx512_f32, "vfmadd231ps", "zmm");
twelve!(avx512_bf16, "vdpbf16ps", "zmm");
twelve!(avx512_int8, "vpdpbusd", "zmm");
twelve!(avx2_f32, "vfmadd231ps", "ymm");
twelve!(avx2_vnni_int8, "{{vex}} vpdpbusd", "ymm");

/// Bytes to pairs, pairs to fours, added: what AVX2 has in place of one instruction.
fn avx2_int8(rounds: usize) {
    // SAFETY: as above.
    unsafe {
        asm!("2:",
            "vpmaddubsw ymm4, ymm12, ymm13", "vpmaddwd ymm4, ymm4, ymm14", "vpaddd ymm0, ymm0, ymm4",
            "vpmaddubsw ymm5, ymm12, ymm13", "vpmaddwd ymm5, ymm5, ymm14", "vpaddd ymm1, ymm1, ymm5",
            "vpmaddubsw ymm6, ymm12, ymm13", "vpmaddwd ymm6, ymm6, ymm14", "vpaddd ymm2, ymm2, ymm6",
            "vpmaddubsw ymm7, ymm12, ymm13", "vpmaddwd ymm7, ymm7, ymm14", "vpaddd ymm3, ymm3, ymm7",
            "dec {n}", "jnz 2b", n = inout(reg) rounds.max(1) => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _,
            inout("xmm12") 0f32 => _, inout("xmm13") 0f32 => _, inout("xmm14") 0f32 => _,
            options(nostack, nomem));
    }
}

/// What `ldtilecfg` reads: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

fn full_tiles() -> Config {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    row_bytes[..8].fill(64);
    rows[..8].fill(16);
    Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
}

fn amx_bf16(rounds: usize) {
    let config = full_tiles();
    // SAFETY: the tier is there, its tiles are zeroed by the configuration, and the compiler allocates none.
    unsafe {
        asm!("ldtilecfg [{c}]", "2:",
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm5, tmm6",
            "tdpbf16ps tmm2, tmm4, tmm7", "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {n}", "jnz 2b", "tilerelease",
            n = inout(reg) rounds.max(1) => _, c = in(reg) &config, options(nostack, readonly));
    }
}

fn amx_int8(rounds: usize) {
    let config = full_tiles();
    // SAFETY: as above.
    unsafe {
        asm!("ldtilecfg [{c}]", "2:",
            "tdpbssd tmm0, tmm4, tmm6", "tdpbssd tmm1, tmm5, tmm6",
            "tdpbssd tmm2, tmm4, tmm7", "tdpbssd tmm3, tmm5, tmm7",
            "dec {n}", "jnz 2b", "tilerelease",
            n = inout(reg) rounds.max(1) => _, c = in(reg) &config, options(nostack, readonly));
    }
}
