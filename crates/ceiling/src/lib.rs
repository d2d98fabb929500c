//! What a machine can do at most, measured: how fast its threads read memory, and how much arithmetic they do in
//! registers. `mica bench`, `mica doctor` and the benches of kernels say which part of it is reached.
//!
//! A shared machine changes speed from second to second: measure a ceiling right beside what is compared with it.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod block;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::time::Instant;

pub use block::{Block, block_bytes};

use mica_simd::Isa;
use mica_threads::{FnTask, Pool, Scratch, Task};

/// What products are formed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32 fused multiply-adds.
    F32,
    /// bf16 pairs with f32 sums; where the tier has no instruction for them, f32 multiply-adds.
    Bf16,
    /// 8-bit products with 32-bit sums.
    Int8,
}

/// Memory to measure ceilings with. The pool is lent: the threads that compute are those that are measured.
pub struct Ceilings {
    block: Option<Block>,
}

/// The ceilings of a moment.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// GB/s; `None` if there was no memory to measure with.
    pub read: Option<f64>,
    /// 10⁹ multiplications and additions a second in f32; `None`, as the next ones, on tiers without vectors.
    pub f32: Option<f64>,
    /// The same in bf16.
    pub bf16: Option<f64>,
    /// The same in 8-bit integers.
    pub int8: Option<f64>,
}

/// What an op or a kernel did in a time.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// How long it took.
    pub seconds: f64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Multiplications and additions of products.
    pub operations: u64,
    /// What they are formed in; `None` if there are none.
    pub arithmetic: Option<Arithmetic>,
}

impl Ceilings {
    /// With a block of so many bytes, written by the threads that will read it; without one, and where the system does
    /// not give it, the bandwidth stays unknown.
    pub fn new(bytes: Option<usize>, pool: &Pool) -> Ceilings {
        Ceilings { block: bytes.and_then(|bytes| Block::new(bytes, pool)) }
    }

    /// Read bandwidth in GB/s, if there was memory for the block.
    pub fn bandwidth(&self, pool: &Pool) -> Option<f64> {
        Some(self.block.as_ref()?.bandwidth(pool))
    }

    /// All of them, on the tier that this process uses.
    pub fn measure(&self, pool: &Pool) -> Measured {
        let peak = |arithmetic| peak(pool, Isa::get(), arithmetic);
        Measured {
            read: self.bandwidth(pool),
            f32: peak(Arithmetic::F32),
            bf16: peak(Arithmetic::Bf16),
            int8: peak(Arithmetic::Int8),
        }
    }
}

impl Measured {
    /// What bounds some work, and the part of that ceiling it reached: whichever of moving its bytes and doing its
    /// arithmetic would take longer at the ceiling. Data that was still in the caches can come faster than memory
    /// gives it, which shows as more than 1. `None` if nothing is known.
    pub fn bound(&self, work: &Work) -> Option<(&'static str, f64)> {
        let peak = match work.arithmetic {
            None => None,
            Some(Arithmetic::F32) => self.f32.map(|rate| ("f32", rate)),
            Some(Arithmetic::Bf16) => self.bf16.map(|rate| ("bf16", rate)),
            Some(Arithmetic::Int8) => self.int8.map(|rate| ("int8", rate)),
        };
        let memory = self.read.map(|rate| ("memory", work.bytes as f64 / rate / 1e9));
        let products = peak.map(|(name, rate)| (name, work.operations as f64 / rate / 1e9));
        let (name, floor) = memory.into_iter().chain(products).max_by(|a, b| a.1.total_cmp(&b.1))?;
        (work.seconds > 0.0).then(|| (name, floor / work.seconds))
    }
}

/// The one in the middle, of an even number the mean of the two; `None` of nothing.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.get(values.len().saturating_sub(1) / 2..values.len() / 2 + 1)?;
    Some(middle.iter().sum::<f64>() / middle.len() as f64)
}

/// What the system calls the processor, if it does.
pub fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    named.map(|(_, name)| name.trim().to_string()).or_else(brand)
}

#[cfg(target_os = "macos")]
fn brand() -> Option<String> {
    let output =
        std::process::Command::new("sysctl").args(["-n", "machdep.cpu.brand_string"]).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string()).filter(|name| !name.is_empty())
}

#[cfg(not(target_os = "macos"))]
fn brand() -> Option<String> {
    None
}

/// Seconds of a call.
pub fn seconds(run: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    run();
    begun.elapsed().as_secs_f64()
}

/// 10⁹ multiplications and additions a second, on all threads of the pool, of the tier's best instruction: the best
/// of a few passes of some milliseconds. `None` for tiers that have no vector instructions of their own here.
pub fn peak(pool: &Pool, isa: Isa, arithmetic: Arithmetic) -> Option<f64> {
    if !Isa::available().contains(&isa) {
        return None;
    }
    let (loops, operations) = innermost(isa, arithmetic)?;
    let work = |_: usize, _: &mut Scratch| loops(ROUNDS);
    let tasks: [Box<dyn Task + '_>; 1] = [Box::new(FnTask::new("peak", pool.threads(), work))];
    let pass = || seconds(|| pool.run(&tasks).expect("registers can't fail"));
    let best = (0..4).map(|_| pass()).fold(f64::INFINITY, f64::min);
    Some((operations * ROUNDS * pool.threads()) as f64 / best / 1e9)
}

/// Rounds of a pass: a few milliseconds at twelve instructions a round.
const ROUNDS: usize = 500_000;

/// A loop over registers, and the operations of one of its rounds.
type Loop = (fn(usize), usize);

#[cfg(target_arch = "x86_64")]
fn innermost(isa: Isa, arithmetic: Arithmetic) -> Option<Loop> {
    x86_64::innermost(isa, arithmetic)
}

#[cfg(target_arch = "aarch64")]
fn innermost(isa: Isa, arithmetic: Arithmetic) -> Option<Loop> {
    aarch64::innermost(isa, arithmetic)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn innermost(_: Isa, _: Arithmetic) -> Option<Loop> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn every_tier_with_vectors_has_peaks_that_rise_with_narrower_numbers() {
        let pool = Pool::new(1);
        for &isa in Isa::available() {
            let peaks =
                [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8].map(|kind| peak(&pool, isa, kind));
            let expected = isa != Isa::Scalar;
            assert!(peaks.iter().all(|rate| rate.is_some() == expected), "{isa}: {peaks:?}");
            assert!(peaks.iter().flatten().all(|&rate| rate.is_finite() && rate > 0.0), "{isa}: {peaks:?}");
        }
    }

    #[test]
    fn what_takes_longer_at_its_ceiling_bounds_the_work() {
        let measured = Measured { read: Some(10.0), f32: Some(100.0), bf16: Some(200.0), int8: Some(400.0) };
        let (f32, int8) = (Some(Arithmetic::F32), Some(Arithmetic::Int8));
        let cases = [
            ("bytes", int8, 10, 4, Some(("memory", 0.5))),
            ("products", int8, 10, 600, Some(("int8", 0.75))),
            ("slower products", f32, 10, 150, Some(("f32", 0.75))),
            ("no products", None, 20, 150, Some(("memory", 1.0))),
        ];
        let work = |arithmetic, bytes, operations| {
            let of = |count: u64| count * 1_000_000_000;
            Work { seconds: 2.0, bytes: of(bytes), operations: of(operations), arithmetic }
        };
        for (name, arithmetic, bytes, operations, expected) in cases {
            assert_eq!(measured.bound(&work(arithmetic, bytes, operations)), expected, "{name}");
        }
        let nothing = Measured { read: None, f32: None, bf16: None, int8: None };
        assert_eq!(nothing.bound(&work(int8, 1, 1)), None);
    }
}
