//! Moving 16 x 16 blocks: the one primitive behind all packing and unpacking.
//!
//! A block is read as 16 *lines* of 16 elements along the direction in which the source is
//! contiguous, turned around if the destination wants the other direction, and stored in one of
//! five forms. Missing lines and elements become zero.

use half::f16;
use half::slice::HalfFloatSliceExt;
use mica_simd::Isa;

#[cfg(target_arch = "x86_64")]
use self::avx512::block as avx512_block;

/// What a line of the source holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum From {
    /// f32.
    F32,
    /// 16-bit words that become the upper half of an f32 unchanged: bf16, or any bits.
    High,
    /// f16.
    F16,
    /// Pair lines of a packed panel: line 2i is the lower halves, 2i + 1 the upper ones.
    Pairs,
    /// 32-bit words of which only the upper half counts.
    Words,
}

/// What a line of the destination holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Into {
    /// f32.
    F32,
    /// f32 rounded to bf16.
    Rounded,
    /// bf16, 32 bytes a line; sources that are 16 bits wide keep their bits.
    High,
    /// Lines 2i and 2i + 1 as pairs, 64 bytes; sources that are 16 bits wide keep their bits.
    Pairs,
}

/// One block to move.
pub(crate) struct Job {
    pub from: *const u8,
    /// Bytes from a source line to the next (for [`From::Pairs`] from a pair line to the next).
    pub from_step: isize,
    /// Source lines that exist (at most 16).
    pub lines: usize,
    /// Elements of a source line that exist (at most 16).
    pub lanes: usize,
    pub into: *mut u8,
    /// Bytes from a destination line (pair line for [`Into::Pairs`]) to the next.
    pub into_step: usize,
    /// Bytes from a line to what will be read after this block: a hint, which AVX-512 takes.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub ahead: isize,
    /// Destination lines to store (at most 16, all of them 16 elements long).
    pub into_lines: usize,
}

/// Moves a block.
///
/// # Safety
/// The processor has the tier's features; the source lines that exist are readable, the
/// destination lines writable.
pub(crate) type BlockFn = unsafe fn(&Job);

/// The mover for a tier; `turn` says that destination lines run across source lines.
pub(crate) fn mover(isa: Isa, from: From, turn: bool, into: Into) -> BlockFn {
    macro_rules! pick {
        ($function:ident; $($from:ident)*) => {
            match (from, turn, into) { $(
                (From::$from, false, Into::F32) => $function::<{ From::$from as u8 }, false, { Into::F32 as u8 }>,
                (From::$from, false, Into::Rounded) => $function::<{ From::$from as u8 }, false, { Into::Rounded as u8 }>,
                (From::$from, false, Into::High) => $function::<{ From::$from as u8 }, false, { Into::High as u8 }>,
                (From::$from, false, Into::Pairs) => $function::<{ From::$from as u8 }, false, { Into::Pairs as u8 }>,
                (From::$from, true, Into::F32) => $function::<{ From::$from as u8 }, true, { Into::F32 as u8 }>,
                (From::$from, true, Into::Rounded) => $function::<{ From::$from as u8 }, true, { Into::Rounded as u8 }>,
                (From::$from, true, Into::High) => $function::<{ From::$from as u8 }, true, { Into::High as u8 }>,
                (From::$from, true, Into::Pairs) => $function::<{ From::$from as u8 }, true, { Into::Pairs as u8 }>,
            )* }
        };
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => pick!(avx512_block; F32 High F16 Pairs Words),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx2Vnni => pick!(avx2_block; F32 High F16 Pairs Words),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => pick!(neon_block; F32 High F16 Pairs Words),
        _ => pick!(scalar_block; F32 High F16 Pairs Words),
    }
}

/// f32 to bf16, nearest, ties to even; NaN stays NaN (quiet).
#[inline(always)]
pub(super) fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if value.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

/// # Safety
/// As [`BlockFn`].
unsafe fn scalar_block<const S: u8, const T: bool, const D: u8>(job: &Job) {
    // SAFETY: promised by the caller.
    unsafe { portable::<S, T, D>(job, turn_around) }
}

/// # Safety
/// As [`BlockFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2_block<const S: u8, const T: bool, const D: u8>(job: &Job) {
    // SAFETY: promised by the caller.
    unsafe { portable::<S, T, D>(job, turn_around) }
}

/// # Safety
/// As [`BlockFn`].
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon_block<const S: u8, const T: bool, const D: u8>(job: &Job) {
    // SAFETY: promised by the caller.
    unsafe { portable::<S, T, D>(job, turn_fours) }
}

/// Turns 16 lines of 16 around.
#[inline(always)]
fn turn_around(lines: &mut [[f32; 16]; 16]) {
    let copy = *lines;
    for i in 0..16 {
        for j in 0..16 {
            lines[i][j] = copy[j][i];
        }
    }
}

/// The same by four lines of four at a time, which LLVM makes no vectors of.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn turn_fours(lines: &mut [[f32; 16]; 16]) {
    use std::arch::aarch64::*;
    let copy = *lines;
    for i in (0..16).step_by(4) {
        for j in (0..16).step_by(4) {
            // SAFETY: four values each, and NEON is part of all of AArch64.
            unsafe {
                let line = |k: usize| vld1q_f32(copy[j + k][i..].as_ptr());
                let wide = |even, odd| {
                    (
                        vreinterpretq_f64_f32(vtrn1q_f32(even, odd)),
                        vreinterpretq_f64_f32(vtrn2q_f32(even, odd)),
                    )
                };
                let (upper, lower) = (wide(line(0), line(1)), wide(line(2), line(3)));
                let turned = [
                    vtrn1q_f64(upper.0, lower.0),
                    vtrn1q_f64(upper.1, lower.1),
                    vtrn2q_f64(upper.0, lower.0),
                    vtrn2q_f64(upper.1, lower.1),
                ];
                for (k, turned) in turned.into_iter().enumerate() {
                    vst1q_f32(lines[i + k][j..].as_mut_ptr(), vreinterpretq_f32_f64(turned));
                }
            }
        }
    }
}

/// # Safety
/// As [`BlockFn`], but for the features: it uses those of the function it is inlined into.
#[inline(always)]
unsafe fn portable<const S: u8, const T: bool, const D: u8>(job: &Job, turn: impl Fn(&mut [[f32; 16]; 16])) {
    let mut lines = [[0f32; 16]; 16];
    // SAFETY: only lines and lanes that exist are read, only `into_lines` written.
    unsafe {
        for line in 0..job.lines {
            let step = if S == From::Pairs as u8 { line / 2 } else { line };
            let at = job.from.offset(step as isize * job.from_step);
            let out = &mut lines[line][..job.lanes];
            if S == From::F32 as u8 || S == From::Words as u8 {
                std::ptr::copy_nonoverlapping(at, out.as_mut_ptr().cast(), 4 * job.lanes);
            } else if S == From::Pairs as u8 {
                let shift = if line % 2 == 0 { 16 } else { 0 };
                for (lane, value) in out.iter_mut().enumerate() {
                    let pair = at.cast::<u32>().add(lane).read_unaligned();
                    *value = f32::from_bits(pair << shift & 0xffff_0000);
                }
            } else {
                let mut words = [0u16; 16];
                std::ptr::copy_nonoverlapping(at, words.as_mut_ptr().cast(), 2 * job.lanes);
                if S == From::F16 as u8 {
                    let halves: [f16; 16] = words.map(f16::from_bits);
                    halves[..job.lanes].convert_to_f32_slice(out);
                } else {
                    for (value, word) in out.iter_mut().zip(words) {
                        *value = f32::from_bits((word as u32) << 16);
                    }
                }
            }
        }
        if T {
            turn(&mut lines);
        }
        let exact = S != From::F32 as u8 && S != From::F16 as u8;
        let high = |value: f32| if exact { (value.to_bits() >> 16) as u16 } else { round_to_bf16(value) };
        if D == Into::Pairs as u8 {
            for pair in 0..job.into_lines.div_ceil(2) {
                let mut out = [0u32; 16];
                for lane in 0..16 {
                    out[lane] =
                        high(lines[2 * pair][lane]) as u32 | (high(lines[2 * pair + 1][lane]) as u32) << 16;
                }
                job.into.add(pair * job.into_step).cast::<[u32; 16]>().write_unaligned(out);
            }
            return;
        }
        for line in 0..job.into_lines {
            let at = job.into.add(line * job.into_step);
            if D == Into::High as u8 {
                at.cast::<[u16; 16]>().write_unaligned(lines[line].map(high));
            } else if D == Into::Rounded as u8 {
                let rounded = lines[line].map(|value| f32::from_bits((high(value) as u32) << 16));
                at.cast::<[f32; 16]>().write_unaligned(rounded);
            } else {
                at.cast::<[f32; 16]>().write_unaligned(lines[line]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512 {
    use std::arch::x86_64::*;

    use super::{From, Into, Job};

    /// # Safety
    /// As [`super::BlockFn`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn block<const S: u8, const T: bool, const D: u8>(job: &Job) {
        let whole = job.lanes == 16 && job.lines == job.into_lines;
        if S == From::High as u8 && !T && whole {
            // SAFETY: all lanes of the lines are there.
            unsafe {
                if D == Into::High as u8 {
                    return copy(job);
                }
                if D == Into::Pairs as u8 && job.lines == 16 {
                    return pair(job);
                }
            }
        }
        let mut lines = [_mm512_setzero_ps(); 16];
        // SAFETY: the lines exist, and the mask hides the elements that do not.
        unsafe {
            if job.lines == 16 && job.lanes == 16 {
                // The common case without a branch per line, so that the lines stay in registers.
                for line in 0..16 {
                    let step = if S == From::Pairs as u8 { line / 2 } else { line };
                    let at = job.from.offset(step as isize * job.from_step);
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(job.ahead).cast());
                    lines[line] = load::<S>(at, !0, line % 2 == 1);
                }
            } else {
                let mask: u16 = if job.lanes >= 16 { !0 } else { (1 << job.lanes) - 1 };
                for line in 0..job.lines {
                    let step = if S == From::Pairs as u8 { line / 2 } else { line };
                    let at = job.from.offset(step as isize * job.from_step);
                    lines[line] = load::<S>(at, mask, line % 2 == 1);
                }
            }
        }
        if T {
            transpose(&mut lines);
        }
        // SAFETY: stores only the lines that the caller asks for.
        unsafe {
            if job.into_lines == 16 {
                store::<S, D>(job, &lines, 16)
            } else {
                store::<S, D>(job, &lines, job.into_lines)
            }
        }
    }

    /// Whole lines of 16-bit words as they are.
    ///
    /// # Safety
    /// As [`super::BlockFn`], for lines without missing elements.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn copy(job: &Job) {
        for line in 0..job.lines {
            // SAFETY: promised by the caller.
            unsafe {
                let at = job.from.offset(line as isize * job.from_step);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(job.ahead).cast());
                let words = _mm256_loadu_si256(at.cast());
                _mm256_storeu_si256(job.into.add(line * job.into_step).cast(), words);
            }
        }
    }

    /// A whole block of 16-bit words that stay what they are, in pairs.
    ///
    /// # Safety
    /// As [`super::BlockFn`], for a whole block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn pair(job: &Job) {
        // SAFETY: promised by the caller.
        unsafe {
            let line = |line: usize| {
                let at = job.from.offset(line as isize * job.from_step);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(job.ahead).cast());
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()))
            };
            for pair in 0..8 {
                let (even, odd) = (line(2 * pair), line(2 * pair + 1));
                let both = _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd));
                _mm512_storeu_si512(job.into.add(pair * job.into_step).cast(), both);
            }
        }
    }

    /// # Safety
    /// The elements of the mask are readable.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn load<const S: u8>(at: *const u8, mask: u16, odd: bool) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe {
            if S == From::F32 as u8 || S == From::Words as u8 {
                _mm512_maskz_loadu_ps(mask, at.cast())
            } else if S == From::Pairs as u8 {
                let pairs = _mm512_maskz_loadu_epi32(mask, at.cast());
                let shifted = if odd { pairs } else { _mm512_slli_epi32::<16>(pairs) };
                _mm512_castsi512_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(0xffff_0000u32 as i32)))
            } else {
                let words = _mm256_maskz_loadu_epi16(mask, at.cast());
                if S == From::F16 as u8 {
                    _mm512_cvtph_ps(words)
                } else {
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
                }
            }
        }
    }

    /// # Safety
    /// `into_lines` lines are writable.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn store<const S: u8, const D: u8>(job: &Job, lines: &[__m512; 16], count: usize) {
        let exact = S != From::F32 as u8 && S != From::F16 as u8;
        let high_half = _mm512_set1_epi32(0xffff_0000u32 as i32);
        // SAFETY: promised by the caller.
        unsafe {
            if D == Into::Pairs as u8 {
                for pair in 0..count.div_ceil(2) {
                    let (even, odd) = (lines[2 * pair], lines[2 * pair + 1]);
                    let line = if exact {
                        let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
                        _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(odd), high_half))
                    } else {
                        interleave(even, odd)
                    };
                    _mm512_storeu_si512(job.into.add(pair * job.into_step).cast(), line);
                }
                return;
            }
            for line in 0..count {
                let at = job.into.add(line * job.into_step);
                let value = lines[line];
                if D == Into::F32 as u8 || (D == Into::Rounded as u8 && exact) {
                    _mm512_storeu_ps(at.cast(), value);
                    continue;
                }
                let words = if exact {
                    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_castps_si512(value)))
                } else {
                    std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value))
                };
                if D == Into::High as u8 {
                    _mm256_storeu_si256(at.cast(), words);
                } else {
                    _mm512_storeu_si512(at.cast(), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)));
                }
            }
        }
    }

    /// Two lines as one of pairs of bf16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(in crate::gemm) fn interleave(even: __m512, odd: __m512) -> __m512i {
        #[rustfmt::skip]
        let order = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
            23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0,
        );
        // SAFETY: the same bits under another name.
        let both = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even)) };
        _mm512_permutexvar_epi16(order, both)
    }

    /// Turns 16 lines of 16 around: pairs, quadruples, then 128-bit lanes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(in crate::gemm) fn transpose(r: &mut [__m512; 16]) {
        let mut t = [_mm512_setzero_ps(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut u = [_mm512_setzero_ps(); 16];
        for i in 0..4 {
            let quad = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]].map(|v| _mm512_castps_pd(v));
            u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(quad[0], quad[2]));
            u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(quad[0], quad[2]));
            u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(quad[1], quad[3]));
            u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(quad[1], quad[3]));
        }
        for j in 0..4 {
            let v0 = _mm512_shuffle_f32x4::<0x88>(u[j], u[4 + j]);
            let v1 = _mm512_shuffle_f32x4::<0x88>(u[8 + j], u[12 + j]);
            let v2 = _mm512_shuffle_f32x4::<0xdd>(u[j], u[4 + j]);
            let v3 = _mm512_shuffle_f32x4::<0xdd>(u[8 + j], u[12 + j]);
            r[j] = _mm512_shuffle_f32x4::<0x88>(v0, v1);
            r[8 + j] = _mm512_shuffle_f32x4::<0xdd>(v0, v1);
            r[4 + j] = _mm512_shuffle_f32x4::<0x88>(v2, v3);
            r[12 + j] = _mm512_shuffle_f32x4::<0xdd>(v2, v3);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use mica_testkit::Rng;

    use super::*;

    /// Every form, on every tier, against a definition written element by element; bytes outside
    /// the block stay poisoned.
    #[test]
    fn blocks_arrive_in_every_form() {
        let froms = [From::F32, From::High, From::F16, From::Pairs, From::Words];
        let intos = [Into::F32, Into::Rounded, Into::High, Into::Pairs];
        let mut rng = Rng::new(1);
        for &isa in Isa::available() {
            for (from, into) in froms.iter().flat_map(|&from| intos.map(|into| (from, into))) {
                for turn in [false, true] {
                    for _ in 0..8 {
                        let (lines, lanes) = (rng.range(0..17), rng.range(0..17));
                        let into_lines = rng.range(0..17);
                        check(&mut rng, isa, from, into, turn, lines, lanes, into_lines);
                    }
                    check(&mut rng, isa, from, into, turn, 16, 16, 16);
                }
            }
        }
    }

    fn check(
        rng: &mut Rng,
        isa: Isa,
        from: From,
        into: Into,
        turn: bool,
        lines: usize,
        lanes: usize,
        into_lines: usize,
    ) {
        let name =
            format!("{isa} {from:?} {into:?} turn {turn} lines {lines} lanes {lanes} into {into_lines}");
        let mut source = vec![0u8; 16 * 80];
        let mut values = [[0f32; 16]; 16];
        for line in 0..lines {
            for lane in 0..lanes {
                let x = rng.normal();
                let word = match from {
                    From::F16 => f16::from_f32(x).to_bits(),
                    _ => bf16::from_f32(x).to_bits(),
                };
                match from {
                    From::F32 => source[line * 80 + lane * 4..][..4].copy_from_slice(&x.to_le_bytes()),
                    From::Words => {
                        source[line * 80 + lane * 4 + 2..][..2].copy_from_slice(&word.to_le_bytes())
                    }
                    From::Pairs => source[line / 2 * 80 + lane * 4 + line % 2 * 2..][..2]
                        .copy_from_slice(&word.to_le_bytes()),
                    _ => source[line * 80 + lane * 2..][..2].copy_from_slice(&word.to_le_bytes()),
                }
                let value = match from {
                    From::F32 => x,
                    From::F16 => f16::from_bits(word).to_f32(),
                    _ => bf16::from_bits(word).to_f32(),
                };
                if turn { values[lane][line] = value } else { values[line][lane] = value }
            }
        }
        let step = 96;
        let mut out = vec![0xabu8; 17 * step];
        let mut expected = out.clone();
        let whole = if into == Into::Pairs { into_lines.next_multiple_of(2) } else { into_lines };
        for line in 0..whole {
            for lane in 0..16 {
                let value = values[line][lane];
                let rounded = bf16::from_f32(value);
                let (at, bytes) = match into {
                    Into::F32 => (line * step + lane * 4, value.to_le_bytes().to_vec()),
                    Into::Rounded => (line * step + lane * 4, rounded.to_f32().to_le_bytes().to_vec()),
                    Into::High => (line * step + lane * 2, rounded.to_le_bytes().to_vec()),
                    Into::Pairs => {
                        (line / 2 * step + lane * 4 + line % 2 * 2, rounded.to_le_bytes().to_vec())
                    }
                };
                expected[at..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
        let job = Job {
            from: source.as_ptr(),
            from_step: 80,
            lines,
            lanes,
            into: out.as_mut_ptr(),
            into_step: step,
            ahead: 64,
            into_lines,
        };
        // SAFETY: 16 source lines of up to 64 bytes at steps of 80, 16 destination lines at 96.
        unsafe { mover(isa, from, turn, into)(&job) };
        assert!(out == expected, "{name}");
    }

    #[test]
    fn rounding_agrees_with_half() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            assert_eq!(round_to_bf16(value), bf16::from_f32(value).to_bits(), "{bits:#x}");
        }
    }
}
