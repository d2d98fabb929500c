//! AVX-512 micro-kernels: 8 rows x 3 panels, 24 sums and 3 B lines in 32 registers.
//!
//! With two FMA ports and latency 4 the loop needs at least 8 chains; 24 leave room for the 11
//! loads per 24 products. Calls of few rows take 4 panels instead: four streams from memory, which
//! a product with one row needs to reach the read bandwidth.

use std::arch::x86_64::*;

use super::micro::{Call, Line, Micro, MicroFn};

const F32: u8 = 0;
const BF16: u8 = 1;
const F16: u8 = 2;
const PAIRS: u8 = 3;

/// How far ahead of a stream to ask: the processor's own prefetching stops at each page.
const AHEAD: usize = 2048;

/// One ascending chain per output over f32, or over pairs of bf16 if `L` is `PAIRS`.
///
/// # Safety
/// As [`MicroFn`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn chain<const R: usize, const P: usize, const L: u8>(call: &Call) {
    let mut acc = [[_mm512_setzero_ps(); P]; R];
    // SAFETY: the caller promises the panels and the tiles.
    unsafe {
        if call.load {
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = _mm512_loadu_ps(call.acc.add(p * call.acc_panel + r * 16));
                }
            }
        }
        let mut a = call.a;
        let mut b: [*const u8; P] = std::array::from_fn(|p| call.b.add(p * call.b_panel));
        for _ in 0..call.steps / 16 {
            if call.stream {
                for p in 0..P {
                    for line in 0..16 * line_bytes::<L>() / 64 {
                        _mm_prefetch::<_MM_HINT_T0>(b[p].wrapping_add(AHEAD + line * 64).cast());
                    }
                }
            }
            // Two steps at a time: a line of widened bf16 holds two.
            for pair in 0..8 {
                two_steps::<R, P, L>(&mut acc, a.add(pair * 8), &b, pair * 2, true);
            }
            a = a.add(call.a_block);
            for p in 0..P {
                b[p] = b[p].add(16 * line_bytes::<L>());
            }
        }
        let rest = call.steps % 16;
        for pair in 0..rest / 2 {
            two_steps::<R, P, L>(&mut acc, a.add(pair * 8), &b, pair * 2, true);
        }
        if rest % 2 == 1 {
            two_steps::<R, P, L>(&mut acc, a.add((rest - 1) * 4), &b, rest - 1, false);
        }
        for r in 0..R {
            for p in 0..P {
                _mm512_storeu_ps(call.acc.add(p * call.acc_panel + r * 16), acc[r][p]);
            }
        }
    }
}

/// Bytes of B per step.
const fn line_bytes<const L: u8>() -> usize {
    if L == F32 || L == PAIRS { 64 } else { 32 }
}

/// Adds step `step` (even if a second follows), and the next one if `second`.
///
/// # Safety
/// As [`MicroFn`]; `a` points at the step's element of row 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn two_steps<const R: usize, const P: usize, const L: u8>(
    acc: &mut [[__m512; P]; R],
    a: *const u8,
    b: &[*const u8; P],
    step: usize,
    second: bool,
) {
    let mut lines = [[_mm512_setzero_ps(); P]; 2];
    // SAFETY: the caller promises the panels.
    unsafe {
        for p in 0..P {
            let line = b[p].add(step * line_bytes::<L>());
            match L {
                BF16 => {
                    let pairs = _mm512_loadu_si512(line.cast());
                    lines[0][p] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
                    lines[1][p] = _mm512_castsi512_ps(_mm512_and_si512(
                        pairs,
                        _mm512_set1_epi32(0xffff_0000u32 as i32),
                    ));
                }
                F16 => {
                    lines[0][p] = _mm512_cvtph_ps(_mm256_loadu_si256(line.cast()));
                    if second {
                        lines[1][p] = _mm512_cvtph_ps(_mm256_loadu_si256(line.add(32).cast()));
                    }
                }
                _ => {
                    lines[0][p] = _mm512_loadu_ps(line.cast());
                    if second {
                        lines[1][p] = _mm512_loadu_ps(line.add(64).cast());
                    }
                }
            }
        }
        for which in 0..1 + second as usize {
            for r in 0..R {
                let x = _mm512_set1_ps(a.add(r * 64 + which * 4).cast::<f32>().read());
                for p in 0..P {
                    let w = lines[which][p];
                    acc[r][p] = if L == PAIRS {
                        _mm512_dpbf16_ps(
                            acc[r][p],
                            std::mem::transmute::<__m512, __m512bh>(x),
                            std::mem::transmute::<__m512, __m512bh>(w),
                        )
                    } else {
                        _mm512_fmadd_ps(x, w, acc[r][p])
                    };
                }
            }
        }
    }
}

macro_rules! table {
    ($l:expr) => {
        [
            &[chain::<1, 1, $l> as MicroFn, chain::<1, 2, $l>, chain::<1, 3, $l>, chain::<1, 4, $l>],
            &[chain::<2, 1, $l>, chain::<2, 2, $l>, chain::<2, 3, $l>, chain::<2, 4, $l>],
            &[chain::<3, 1, $l>, chain::<3, 2, $l>, chain::<3, 3, $l>, chain::<3, 4, $l>],
            &[chain::<4, 1, $l>, chain::<4, 2, $l>, chain::<4, 3, $l>, chain::<4, 4, $l>],
            &[chain::<5, 1, $l>, chain::<5, 2, $l>, chain::<5, 3, $l>, chain::<5, 4, $l>],
            &[chain::<6, 1, $l>, chain::<6, 2, $l>, chain::<6, 3, $l>, chain::<6, 4, $l>],
            &[chain::<7, 1, $l>, chain::<7, 2, $l>, chain::<7, 3, $l>],
            &[chain::<8, 1, $l>, chain::<8, 2, $l>, chain::<8, 3, $l>],
        ]
    };
}

static F32_TABLE: [&[MicroFn]; 8] = table!(F32);
static BF16_TABLE: [&[MicroFn]; 8] = table!(BF16);
static F16_TABLE: [&[MicroFn]; 8] = table!(F16);
static PAIRS_TABLE: [&[MicroFn]; 8] = table!(PAIRS);

pub(super) fn micro(line: Line) -> Micro {
    let table = match line {
        Line::F32 => &F32_TABLE,
        Line::WidenBf16 => &BF16_TABLE,
        Line::WidenF16 => &F16_TABLE,
        Line::Pairs => &PAIRS_TABLE,
    };
    Micro { rows: 8, line, panels: &[4, 4, 4, 4, 4, 4, 3, 3], table, tile_rows: None }
}
