//! NEON micro-kernels: 6 rows x 1 panel, 24 sums in 32 registers; 5 rows where B is widened on the way.
//!
//! Four steps at a time: a register then holds a row's elements of A for all of them, which the multiplication picks by
//! lane, so that four fifths of the loads are of B. B is read a register at a time, each of which serves all rows.

use std::arch::aarch64::*;

use mica_simd::aarch64::widen_f16;

use super::micro::{Call, Line, Micro, MicroFn};
use crate::layout::prefetch_line;

const F32: u8 = 0;
const BF16: u8 = 1;
const F16: u8 = 2;

/// How far ahead of a stream to ask, as on AVX2; not measured.
const AHEAD: usize = 2048;

/// One ascending fused chain per output.
///
/// # Safety
/// As [`MicroFn`].
#[target_feature(enable = "neon")]
unsafe fn chain<const R: usize, const P: usize, const L: u8>(call: &Call) {
    let mut acc = [[[vdupq_n_f32(0.0); 4]; P]; R];
    // SAFETY: the caller promises the panels and the tiles.
    unsafe {
        if call.load {
            for r in 0..R {
                for p in 0..P {
                    let tile = call.acc.add(p * call.acc_panel + r * 16);
                    for part in 0..4 {
                        acc[r][p][part] = vld1q_f32(tile.add(4 * part));
                    }
                }
            }
        }
        let mut step = 0;
        let mut block = call.a;
        while step < call.steps {
            let end = (step + 16).min(call.steps);
            if call.stream {
                for p in 0..P {
                    let ahead = call.b.add(p * call.b_panel).wrapping_add(step * line_bytes::<L>() + AHEAD);
                    for line in 0..16 * line_bytes::<L>() / 64 {
                        prefetch_line::<true>(ahead.wrapping_add(line * 64));
                    }
                }
            }
            let mut a = block.cast::<f32>();
            while step + 4 <= end {
                let x: [float32x4_t; R] = std::array::from_fn(|r| vld1q_f32(a.add(r * 16)));
                macro_rules! two_steps {
                    ($first:literal $second:literal) => {
                        for p in 0..P {
                            for part in 0..4 {
                                let [w0, w1] =
                                    two_lines::<L>(call.b.add(p * call.b_panel), step + $first, part);
                                for r in 0..R {
                                    let sum = vfmaq_laneq_f32::<$first>(acc[r][p][part], w0, x[r]);
                                    acc[r][p][part] = vfmaq_laneq_f32::<$second>(sum, w1, x[r]);
                                }
                            }
                        }
                    };
                }
                two_steps!(0 1);
                two_steps!(2 3);
                step += 4;
                a = a.add(4);
            }
            while step < end {
                for p in 0..P {
                    for part in 0..4 {
                        let w = line::<L>(call.b.add(p * call.b_panel), step, part);
                        for r in 0..R {
                            acc[r][p][part] = vfmaq_n_f32(acc[r][p][part], w, *a.add(r * 16));
                        }
                    }
                }
                step += 1;
                a = a.add(1);
            }
            block = block.add(call.a_block);
        }
        for r in 0..R {
            for p in 0..P {
                let tile = call.acc.add(p * call.acc_panel + r * 16);
                for part in 0..4 {
                    vst1q_f32(tile.add(4 * part), acc[r][p][part]);
                }
            }
        }
    }
}

/// Bytes of B per step.
const fn line_bytes<const L: u8>() -> usize {
    if L == F32 { 64 } else { 32 }
}

/// Four columns of lines `step`, an even one, and `step + 1` of a panel, widened.
///
/// # Safety
/// The panel has those lines.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn two_lines<const L: u8>(b: *const u8, step: usize, part: usize) -> [float32x4_t; 2] {
    // SAFETY: promised by the caller.
    unsafe {
        if L != BF16 {
            return [line::<L>(b, step, part), line::<L>(b, step + 1, part)];
        }
        let pairs = vld1q_u32(b.add(step * 32).cast::<u32>().add(4 * part));
        let high = vandq_u32(pairs, vdupq_n_u32(0xffff_0000));
        [vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)), vreinterpretq_f32_u32(high)]
    }
}

/// Four columns of line `step` of a panel, widened.
///
/// # Safety
/// The panel has that line.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn line<const L: u8>(b: *const u8, step: usize, part: usize) -> float32x4_t {
    // SAFETY: promised by the caller.
    unsafe {
        match L {
            F32 => vld1q_f32(b.add(step * 64).cast::<f32>().add(4 * part)),
            BF16 => {
                let pairs = vld1q_u32(b.add(step / 2 * 64).cast::<u32>().add(4 * part));
                vreinterpretq_f32_u32(if step.is_multiple_of(2) {
                    vshlq_n_u32::<16>(pairs)
                } else {
                    vandq_u32(pairs, vdupq_n_u32(0xffff_0000))
                })
            }
            _ => widen_f16(vld1_u16(b.add(step * 32).cast::<u16>().add(4 * part))),
        }
    }
}

/// As many sums as leave registers for A and B: with more, LLVM keeps some in memory.
static F32_TABLE: [&[MicroFn]; 6] = [
    &[chain::<1, 1, F32>, chain::<1, 2, F32>, chain::<1, 3, F32>, chain::<1, 4, F32>],
    &[chain::<2, 1, F32>, chain::<2, 2, F32>, chain::<2, 3, F32>],
    &[chain::<3, 1, F32>, chain::<3, 2, F32>],
    &[chain::<4, 1, F32>],
    &[chain::<5, 1, F32>],
    &[chain::<6, 1, F32>],
];

/// Widening takes some more.
macro_rules! widened {
    ($l:expr) => {
        [
            &[chain::<1, 1, $l> as MicroFn, chain::<1, 2, $l>, chain::<1, 3, $l>],
            &[chain::<2, 1, $l>, chain::<2, 2, $l>],
            &[chain::<3, 1, $l>],
            &[chain::<4, 1, $l>],
            &[chain::<5, 1, $l>],
        ]
    };
}

static BF16_TABLE: [&[MicroFn]; 5] = widened!(BF16);
static F16_TABLE: [&[MicroFn]; 5] = widened!(F16);

pub(super) fn micro(line: Line) -> Micro {
    let (table, panels): (&'static [&'static [MicroFn]], &'static [usize]) = match line {
        Line::F32 => (&F32_TABLE, &[4, 3, 2, 1, 1, 1]),
        Line::WidenBf16 => (&BF16_TABLE, &[3, 2, 1, 1, 1]),
        Line::WidenF16 => (&F16_TABLE, &[3, 2, 1, 1, 1]),
        Line::Pairs => unreachable!("pairs are packed for avx512bf16 and amx only"),
    };
    Micro { rows: table.len(), line, panels, table, tile_rows: None }
}
