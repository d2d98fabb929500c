//! Loops over registers, as on x86-64: twenty-four chains, since large cores have four pipes with a latency of four.

use std::arch::asm;

use mica_simd::Isa;

use crate::{Arithmetic, Loop};

/// Only called for tiers that the machine has.
pub fn innermost(isa: Isa, arithmetic: Arithmetic) -> Option<Loop> {
    Some(match (isa, arithmetic) {
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Arithmetic::F32 | Arithmetic::Bf16) => (fmla, 24 * 8),
        (Isa::NeonI8mm, Arithmetic::Int8) => (usmmla, 24 * 64),
        (Isa::NeonDot, Arithmetic::Int8) => (sdot, 24 * 32),
        (Isa::Neon, Arithmetic::Int8) => (long, 6 * 32),
        _ => return None,
    })
}

/// A loop over instructions whose clobbered registers are the first 30; v30 and v31 are zero.
macro_rules! rounds {
    ($name:ident, $features:literal, $($line:expr),+ $(,)?) => {
        fn $name(rounds: usize) {
            /// # Safety
            /// The processor has the features.
            #[target_feature(enable = $features)]
            unsafe fn run(rounds: usize) {
                // SAFETY: registers only, all declared.
                unsafe {
                    asm!("2:", $($line,)+ "subs {n}, {n}, #1", "b.ne 2b", n = inout(reg) rounds.max(1) => _,
                        out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _,
                        out("v7") _, out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _,
                        out("v13") _, out("v14") _, out("v15") _, out("v16") _, out("v17") _, out("v18") _,
                        out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _, out("v24") _,
                        out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _,
                        inout("v30") 0f32 => _, inout("v31") 0f32 => _, options(nostack, nomem));
                }
            }
            // SAFETY: whoever chose this loop made sure of the tier.
            unsafe { run(rounds) }
        }
    };
}

/// Twenty-four times the same instruction, each with a sum of its own and the same two factors.
macro_rules! chains {
    ($name:ident, $features:literal, $instruction:literal, $factors:literal) => {
        chains!(@ $name, $features, $instruction, $factors,
            0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23);
    };
    (@ $name:ident, $features:literal, $instruction:literal, $factors:literal, $($sum:literal)*) => {
        rounds!($name, $features, $(concat!($instruction, " v", $sum, ".4s, ", $factors)),*);
    };
}

chains!(fmla, "neon", "fmla", "v30.4s, v31.4s");
chains!(sdot, "neon,dotprod", "sdot", "v30.16b, v31.16b");
chains!(usmmla, "neon,i8mm", "usmmla", "v30.16b, v31.16b");

/// Products of 16 bits, in pairs, in fours: what NEON has in place of one instruction.
macro_rules! fours {
    ($($sum:literal: $low:literal $high:literal),*) => {
        rounds!(long, "neon", $(
            concat!("smull v", $low, ".8h, v30.8b, v31.8b"),
            concat!("smull2 v", $high, ".8h, v30.16b, v31.16b"),
            concat!("addp v", $low, ".8h, v", $low, ".8h, v", $high, ".8h"),
            concat!("sadalp v", $sum, ".4s, v", $low, ".8h")
        ),*);
    };
}

fours!(0: 6 7, 1: 8 9, 2: 10 11, 3: 12 13, 4: 14 15, 5: 16 17);
