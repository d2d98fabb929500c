//! Instruction-set tiers and their detection.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// An instruction-set tier. Ordered on one architecture: a higher tier has all that a lower one
/// has, in instructions of its own if need be ([`Isa::Avx512`] multiplies bytes without AVX-VNNI).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust, what every architecture gets.
    Scalar,
    /// AArch64, all of which has NEON.
    Neon,
    /// [`Isa::Neon`] with dot products of bytes (FEAT_DotProd: Cortex-A76, Neoverse N1, Apple M1 and later): int8 products
    /// of codes below 128 in one instruction. All results have the bits of [`Isa::Neon`].
    NeonDot,
    /// [`Isa::NeonDot`] with products of unsigned by signed bytes (FEAT_I8MM: Cortex-A710, Neoverse V1 and N2, Apple M2
    /// and later): those of all codes. All results have the bits of [`Isa::Neon`].
    NeonI8mm,
    /// AVX2, FMA and F16C.
    Avx2,
    /// [`Isa::Avx2`] with AVX-VNNI (Alder Lake and later without AVX-512, Zen 5): int8 products in one instruction in
    /// place of three. All results have the bits of [`Isa::Avx2`].
    Avx2Vnni,
    /// AVX-512 F, BW, DQ, VL, VNNI and BF16 (Zen 4, Sapphire Rapids and later); products of bf16 are f32 chains over
    /// widened values.
    Avx512,
    /// [`Isa::Avx512`] where products of bf16 are formed in pairs (`vdpbf16ps`): twice the rate of f32 on AMD's cores,
    /// half of it on Intel's.
    Avx512Bf16,
    /// [`Isa::Avx512Bf16`] plus AMX tiles for bf16 and int8, enabled for this process by the kernel.
    Amx,
}

const ALL: [Isa; 9] = [
    Isa::Scalar,
    Isa::Neon,
    Isa::NeonDot,
    Isa::NeonI8mm,
    Isa::Avx2,
    Isa::Avx2Vnni,
    Isa::Avx512,
    Isa::Avx512Bf16,
    Isa::Amx,
];

/// The environment variable that lowers the tier, for tests and comparisons.
pub const ISA_VARIABLE: &str = "MICA_ISA";

impl Isa {
    /// The tier that this process uses: the best of the machine, or the one that `MICA_ISA`
    /// names if the machine has it (otherwise the variable is reported once on stderr and the
    /// best tier is used).
    pub fn get() -> Isa {
        static TIER: OnceLock<Isa> = OnceLock::new();
        *TIER.get_or_init(|| match std::env::var(ISA_VARIABLE) {
            Ok(name) if !name.is_empty() => match name.parse::<Isa>() {
                Ok(isa) if Isa::available().contains(&isa) => isa,
                Ok(isa) => {
                    eprintln!("{ISA_VARIABLE}={isa} is not available on this machine; using {}", Isa::best());
                    Isa::best()
                }
                Err(error) => {
                    eprintln!("{ISA_VARIABLE}: {error}; using {}", Isa::best());
                    Isa::best()
                }
            },
            _ => Isa::best(),
        })
    }

    /// The fastest tier of the machine: the highest, but not [`Isa::Avx512Bf16`] on Intel's processors.
    pub fn best() -> Isa {
        match *Isa::available().last().expect("Scalar is always there") {
            Isa::Avx512Bf16 if Cores::get() == Cores::Intel => Isa::Avx512,
            highest => highest,
        }
    }

    /// All tiers that this machine can run, lowest first. Tests run every kernel on each.
    pub fn available() -> &'static [Isa] {
        static ALL: OnceLock<Vec<Isa>> = OnceLock::new();
        ALL.get_or_init(detect)
    }

    /// The name that `MICA_ISA` takes and checkpoints record.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::NeonDot => "neondot",
            Isa::NeonI8mm => "neoni8mm",
            Isa::Avx2 => "avx2",
            Isa::Avx2Vnni => "avx2vnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tier name that does not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IsaError(String);

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ALL.map(Isa::name).join(", ");
        write!(f, "unknown instruction set {:?}: expected one of {names}", self.0)
    }
}

impl std::error::Error for IsaError {}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Isa, IsaError> {
        ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| IsaError(name.to_string()))
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Isa> {
    let mut tiers = vec![Isa::Scalar];
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    {
        tiers.push(Isa::Avx2);
        if is_x86_feature_detected!("avxvnni") {
            tiers.push(Isa::Avx2Vnni);
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512bf16")
        {
            tiers.extend([Isa::Avx512, Isa::Avx512Bf16]);
            if amx_enabled() {
                tiers.push(Isa::Amx);
            }
        }
    }
    tiers
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Vec<Isa> {
    use std::arch::is_aarch64_feature_detected;
    let mut tiers = vec![Isa::Scalar, Isa::Neon];
    if is_aarch64_feature_detected!("dotprod") {
        tiers.push(Isa::NeonDot);
        if is_aarch64_feature_detected!("i8mm") {
            tiers.push(Isa::NeonI8mm);
        }
    }
    tiers
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Vec<Isa> {
    vec![Isa::Scalar]
}

/// Whose cores run this process: what is fastest differs between processors of one tier. No result depends on it, but for
/// the tier that [`Isa::best`] picks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cores {
    /// Intel's.
    Intel,
    /// AMD's, and all others.
    Other,
}

impl Cores {
    /// Those of this machine.
    pub fn get() -> Cores {
        static CORES: OnceLock<Cores> = OnceLock::new();
        *CORES.get_or_init(Cores::detect)
    }

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Cores {
        let leaf = std::arch::x86_64::__cpuid(0);
        let maker = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
        if maker == b"GenuineIntel" { Cores::Intel } else { Cores::Other }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Cores {
        Cores::Other
    }
}

/// Whether the processor has AMX with bf16 and int8, and the operating system lets this process
/// use the tile registers (on Linux they must be asked for, once, before the first use).
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_enabled() -> bool {
    use std::arch::x86_64::__cpuid_count;
    let leaf7 = __cpuid_count(7, 0).edx;
    let (bf16, tile, int8) = (leaf7 >> 22 & 1, leaf7 >> 24 & 1, leaf7 >> 25 & 1);
    if bf16 & tile & int8 == 0 {
        return false;
    }
    const SYS_ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: arch_prctl(ARCH_REQ_XCOMP_PERM) reads no memory of ours; the clobbered registers
    // are those of the Linux system-call convention.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx_enabled() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in ALL {
            assert_eq!(isa.name().parse::<Isa>(), Ok(isa));
        }
        assert!("sse9".parse::<Isa>().unwrap_err().to_string().contains("avx512"));
    }

    #[test]
    fn scalar_comes_first_and_tiers_ascend() {
        let tiers = Isa::available();
        assert_eq!(tiers[0], Isa::Scalar);
        assert!(tiers.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
