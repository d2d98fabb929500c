//! Packing rows of A into pairs of bf16 in whole blocks of 32 k: what [`super::block`] does in halves,
//! with half of its conversions and stores. For the tiers that have the conversion.

use mica_simd::Isa;

use super::types::FloatType;

/// Packs what of a panel is whole.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    /// Rows whose k follow each other.
    pub along: AlongFn,
    /// Sixteen rows of which each k follow each other.
    pub turned: TurnedFn,
}

/// `(from, row_step, rows, blocks, into, block_step)`: `blocks` blocks of 32 k of `rows` rows that lie
/// `row_step` bytes apart, a line of 64 bytes a row, blocks `block_step` bytes apart.
///
/// # Safety
/// The processor has AVX-512 with BF16; the elements are readable, the lines writable.
pub(super) type AlongFn = unsafe fn(*const u8, isize, usize, usize, *mut u8, usize);

/// `(from, k_step, into)`: one block of 32 k, lines of 16 rows that lie `k_step` bytes apart. The first eight rows go
/// to one place, the other eight to another.
///
/// # Safety
/// As for [`AlongFn`].
pub(super) type TurnedFn = unsafe fn(*const u8, isize, [*mut u8; 2]);

impl Blocks {
    /// For operands of these types on tiers that have it.
    pub fn get(isa: Isa, float: FloatType) -> Option<Blocks> {
        match (isa, float) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx, FloatType::F32) => {
                Some(Blocks { along: avx512::along::<true>, turned: avx512::turned::<true> })
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx, FloatType::Bf16) => {
                Some(Blocks { along: avx512::along::<false>, turned: avx512::turned::<false> })
            }
            _ => None,
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use crate::gemm::block::avx512::{interleave, transpose};

    /// Bytes that are asked for ahead along a row.
    const AHEAD: usize = 512;

    /// # Safety
    /// As [`super::AlongFn`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn along<const F32: bool>(
        from: *const u8,
        row_step: isize,
        rows: usize,
        blocks: usize,
        into: *mut u8,
        block_step: usize,
    ) {
        let bytes = if F32 { 128 } else { 64 };
        for block in 0..blocks {
            for row in 0..rows {
                let at = from.wrapping_offset(row as isize * row_step).wrapping_add(block * bytes);
                // SAFETY: promised by the caller.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                    let line = if F32 {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + 64).cast());
                        let (low, high) = (_mm512_loadu_ps(at.cast()), _mm512_loadu_ps(at.add(64).cast()));
                        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
                    } else {
                        _mm512_loadu_si512(at.cast())
                    };
                    _mm512_storeu_si512(into.add(block * block_step + row * 64).cast(), line);
                }
            }
        }
    }

    /// # Safety
    /// As [`super::TurnedFn`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn turned<const F32: bool>(from: *const u8, k_step: isize, into: [*mut u8; 2]) {
        let mut lines = [_mm512_setzero_ps(); 16];
        for (pair, line) in lines.iter_mut().enumerate() {
            let at = from.wrapping_offset(2 * pair as isize * k_step);
            let next = at.wrapping_offset(k_step);
            // SAFETY: promised by the caller.
            *line = unsafe {
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(32 * k_step).cast());
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_offset(32 * k_step).cast());
                _mm512_castsi512_ps(if F32 {
                    interleave(_mm512_loadu_ps(at.cast()), _mm512_loadu_ps(next.cast()))
                } else {
                    let even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                    let odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(next.cast()));
                    _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))
                })
            };
        }
        transpose(&mut lines);
        for (row, line) in lines.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(into[row / 8].add(row % 8 * 64).cast(), line) }
        }
    }
}
