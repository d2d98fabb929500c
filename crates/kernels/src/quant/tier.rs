//! From an instruction-set tier to the code that was compiled for it.

use mica_simd::Isa;

use super::lanes::{Lanes, Scalar};

/// Work that is compiled once per tier.
pub(super) trait PerTier {
    type Output;

    /// Does the work with the lanes of the tier. Implementations are `#[inline(always)]`, so that
    /// they become part of a function which enables the tier's features.
    ///
    /// # Safety
    /// As for [`Lanes`], and what the work itself asks.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// Runs `work` at a tier. AMX has the lanes of AVX-512; what uses its tiles asks for them itself.
///
/// # Safety
/// The machine has the tier ([`crate::error::check_tier`] says so), and what the work itself asks.
pub(super) unsafe fn at_tier<W: PerTier>(isa: Isa, work: W) -> W::Output {
    // SAFETY: promised by the caller.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => avx512(work),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Vnni => avx2_vnni(work),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(work),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => neon_i8mm(work),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => neon_dot(work),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon(work),
            _ => work.run::<Scalar>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
unsafe fn avx512<W: PerTier>(work: W) -> W::Output {
    // SAFETY: the features are enabled here.
    unsafe { work.run::<super::lanes::Avx512>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<W: PerTier>(work: W) -> W::Output {
    // SAFETY: the features are enabled here.
    unsafe { work.run::<super::lanes::Avx2<false>>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn avx2_vnni<W: PerTier>(work: W) -> W::Output {
    // SAFETY: the features are enabled here.
    unsafe { work.run::<super::lanes::Avx2<true>>() }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon<W: PerTier>(work: W) -> W::Output {
    // SAFETY: the features are enabled here.
    unsafe { work.run::<super::lanes::Neon<{ super::lanes::neon::LONG }>>() }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod")]
unsafe fn neon_dot<W: PerTier>(work: W) -> W::Output {
    // SAFETY: the features are enabled here.
    unsafe { work.run::<super::lanes::Neon<{ super::lanes::neon::DOT }>>() }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn neon_i8mm<W: PerTier>(work: W) -> W::Output {
    // SAFETY: the features are enabled here.
    unsafe { work.run::<super::lanes::Neon<{ super::lanes::neon::I8MM }>>() }
}
