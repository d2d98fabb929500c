//! AVX2 micro-kernels: 6 rows x 1 panel, 12 sums in 16 registers.

use std::arch::x86_64::*;

use super::micro::{Call, Line, Micro, MicroFn};

const F32: u8 = 0;
const BF16: u8 = 1;
const F16: u8 = 2;

/// How far ahead of a stream to ask: the processor's own prefetching stops at each page.
const AHEAD: usize = 2048;

/// One ascending fused chain per output.
///
/// # Safety
/// As [`MicroFn`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn chain<const R: usize, const P: usize, const L: u8>(call: &Call) {
    let mut acc = [[[_mm256_setzero_ps(); 2]; P]; R];
    // SAFETY: the caller promises the panels and the tiles.
    unsafe {
        if call.load {
            for r in 0..R {
                for p in 0..P {
                    let tile = call.acc.add(p * call.acc_panel + r * 16);
                    acc[r][p] = [_mm256_loadu_ps(tile), _mm256_loadu_ps(tile.add(8))];
                }
            }
        }
        let mut step = 0;
        let mut block = call.a;
        while step < call.steps {
            let here = (call.steps - step).min(16);
            if call.stream {
                let line_bytes = if L == F32 { 64 } else { 32 };
                for p in 0..P {
                    let ahead = call.b.add(p * call.b_panel).wrapping_add(step * line_bytes + AHEAD);
                    for line in 0..16 * line_bytes / 64 {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64).cast());
                    }
                }
            }
            for within in 0..here {
                let a = block.add(within * 4).cast::<f32>();
                let at = step + within;
                for p in 0..P {
                    let [low, high] = line::<L>(call.b.add(p * call.b_panel), at);
                    for r in 0..R {
                        let x = _mm256_broadcast_ss(&*a.add(r * 16));
                        acc[r][p][0] = _mm256_fmadd_ps(x, low, acc[r][p][0]);
                        acc[r][p][1] = _mm256_fmadd_ps(x, high, acc[r][p][1]);
                    }
                }
            }
            step += here;
            block = block.add(call.a_block);
        }
        for r in 0..R {
            for p in 0..P {
                let tile = call.acc.add(p * call.acc_panel + r * 16);
                _mm256_storeu_ps(tile, acc[r][p][0]);
                _mm256_storeu_ps(tile.add(8), acc[r][p][1]);
            }
        }
    }
}

/// Line `step` of a panel, widened.
///
/// # Safety
/// The panel has that line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn line<const L: u8>(b: *const u8, step: usize) -> [__m256; 2] {
    // SAFETY: promised by the caller.
    unsafe {
        match L {
            F32 => {
                let at = b.add(step * 64).cast::<f32>();
                [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]
            }
            BF16 => {
                let at = b.add(step / 2 * 64).cast::<__m256i>();
                let pairs = [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))];
                if step.is_multiple_of(2) {
                    pairs.map(|pair| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pair)))
                } else {
                    let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
                    pairs.map(|pair| _mm256_castsi256_ps(_mm256_and_si256(pair, mask)))
                }
            }
            _ => {
                let at = b.add(step * 32).cast::<__m128i>();
                [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))]
            }
        }
    }
}

macro_rules! table {
    ($l:expr) => {
        [
            &[chain::<1, 1, $l> as MicroFn, chain::<1, 2, $l>, chain::<1, 3, $l>, chain::<1, 4, $l>],
            &[chain::<2, 1, $l>, chain::<2, 2, $l>, chain::<2, 3, $l>],
            &[chain::<3, 1, $l>, chain::<3, 2, $l>],
            &[chain::<4, 1, $l>],
            &[chain::<5, 1, $l>],
            &[chain::<6, 1, $l>],
        ]
    };
}

static F32_TABLE: [&[MicroFn]; 6] = table!(F32);
static BF16_TABLE: [&[MicroFn]; 6] = table!(BF16);
static F16_TABLE: [&[MicroFn]; 6] = table!(F16);

pub(super) fn micro(line: Line) -> Micro {
    let table = match line {
        Line::F32 => &F32_TABLE,
        Line::WidenBf16 => &BF16_TABLE,
        Line::WidenF16 => &F16_TABLE,
        Line::Pairs => unreachable!("pairs are packed for avx512bf16 and amx only"),
    };
    Micro { rows: 6, line, panels: &[4, 3, 2, 1, 1, 1], table, tile_rows: None }
}
