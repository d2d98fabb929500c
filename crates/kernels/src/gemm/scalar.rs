//! Portable micro-kernels: the definition that the other tiers are tested against.
//!
//! `f32::mul_add` is a library call where the build does not assume a fused instruction, so this
//! tier is for correctness.

use half::f16;

use super::micro::{Call, Line, Micro, MicroFn};

const ROWS: usize = 4;

/// One ascending fused chain per output.
///
/// # Safety
/// As [`MicroFn`]; needs no feature.
unsafe fn chain<const R: usize, const L: u8>(call: &Call) {
    let mut acc = [[0f32; 16]; R];
    // SAFETY: the caller promises the panels and the tile.
    unsafe {
        if call.load {
            for r in 0..R {
                acc[r] = call.acc.add(r * 16).cast::<[f32; 16]>().read();
            }
        }
        for step in 0..call.steps {
            let a = call.a.add(step / 16 * call.a_block + step % 16 * 4).cast::<f32>();
            let line = line::<L>(call.b, step);
            for r in 0..R {
                let x = a.add(r * 16).read();
                for (sum, &w) in acc[r].iter_mut().zip(&line) {
                    *sum = x.mul_add(w, *sum);
                }
            }
        }
        for r in 0..R {
            call.acc.add(r * 16).cast::<[f32; 16]>().write(acc[r]);
        }
    }
}

/// Line `step` of a panel as f32.
///
/// # Safety
/// The panel has that line.
#[inline(always)]
unsafe fn line<const L: u8>(b: *const u8, step: usize) -> [f32; 16] {
    // SAFETY: promised by the caller.
    unsafe {
        match L {
            0 => b.add(step * 64).cast::<[f32; 16]>().read(),
            1 => {
                let pairs = b.add(step / 2 * 64).cast::<[u32; 16]>().read();
                pairs.map(|pair| {
                    f32::from_bits(if step.is_multiple_of(2) { pair << 16 } else { pair & 0xffff_0000 })
                })
            }
            _ => b.add(step * 32).cast::<[u16; 16]>().read().map(|bits| f16::from_bits(bits).to_f32()),
        }
    }
}

const fn table<const L: u8>() -> [&'static [MicroFn]; ROWS] {
    const { [&[chain::<1, L> as MicroFn], &[chain::<2, L>], &[chain::<3, L>], &[chain::<4, L>]] }
}

pub(super) fn micro(line: Line) -> Micro {
    static F32: [&[MicroFn]; ROWS] = table::<0>();
    static BF16: [&[MicroFn]; ROWS] = table::<1>();
    static F16: [&[MicroFn]; ROWS] = table::<2>();
    let table = match line {
        Line::F32 => &F32,
        Line::WidenBf16 => &BF16,
        Line::WidenF16 => &F16,
        Line::Pairs => unreachable!("pairs are packed for avx512bf16 and amx only"),
    };
    Micro { rows: ROWS, line, panels: &[1], table, tile_rows: None }
}
