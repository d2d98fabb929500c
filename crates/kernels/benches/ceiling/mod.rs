//! What the machine can do, to say of a kernel which part of it it reaches; shared by the benches of this folder.
//!
//! `cargo bench --workspace --bench NAME -- [threads] [words]`: lines that contain one of the words, on 2 threads if
//! nothing is said.

#![allow(dead_code)] // each bench uses some of it

use std::hint::black_box;
use std::time::Instant;

use mica_kernels::gemm::Precision;
use mica_simd::Isa;
use mica_threads::{FnTask, Pool, Scratch, Task};

/// Threads and words of the command line. Words that start with a dash are cargo's.
pub fn arguments() -> (usize, Vec<String>) {
    let mut words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let threads = words.first().and_then(|word| word.parse().ok());
    if threads.is_some() {
        words.remove(0);
    }
    (threads.unwrap_or(2), words)
}

/// Whether a line is asked for.
pub fn is_asked_for(name: &str, words: &[String]) -> bool {
    words.is_empty() || words.iter().any(|word| name.contains(word.as_str()))
}

/// Times tasks that move so many bytes: GB/s, beside what reading `data` with the same threads gives right then.
pub fn moved(pool: &Pool, name: &str, bytes: usize, data: &[u64], tasks: &[Box<dyn Task + '_>]) {
    let (mut times, mut shares) = (Vec::new(), Vec::new());
    pool.run(tasks).expect("the inputs are right");
    for _ in 0..15 {
        let read = bandwidth(pool, data);
        let time = seconds(|| (0..5).for_each(|_| pool.run(tasks).expect("as before"))) / 5.0;
        times.push(time);
        shares.push(bytes as f64 / time / 1e9 / read);
    }
    let time = median(times);
    let rate = bytes as f64 / time / 1e9;
    println!("{name:44} {:8.3} ms {rate:6.1} GB/s, {:4.0} % of reading", time * 1e3, 100.0 * median(shares));
}

pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Wall time; with `CPU_TIME=1` and one thread the processor time of this thread, which a busy
/// machine disturbs less.
pub fn seconds(mut run: impl FnMut()) -> f64 {
    let cpu = std::env::var_os("CPU_TIME").is_some();
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the struct is ours.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    };
    let (start, start_cpu) = (Instant::now(), now());
    run();
    if cpu { now() - start_cpu } else { start.elapsed().as_secs_f64() }
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::asm;

    /// f32 FMA on 12 registers of 512 bits; flops.
    ///
    /// # Safety
    /// AVX-512 is there.
    pub unsafe fn fma(rounds: usize) -> f64 {
        // SAFETY: registers only, all declared.
        unsafe {
            asm!("2:",
                "vfmadd231ps zmm0, zmm12, zmm13", "vfmadd231ps zmm1, zmm12, zmm13", "vfmadd231ps zmm2, zmm12, zmm13",
                "vfmadd231ps zmm3, zmm12, zmm13", "vfmadd231ps zmm4, zmm12, zmm13", "vfmadd231ps zmm5, zmm12, zmm13",
                "vfmadd231ps zmm6, zmm12, zmm13", "vfmadd231ps zmm7, zmm12, zmm13", "vfmadd231ps zmm8, zmm12, zmm13",
                "vfmadd231ps zmm9, zmm12, zmm13", "vfmadd231ps zmm10, zmm12, zmm13", "vfmadd231ps zmm11, zmm12, zmm13",
                "dec {n}", "jnz 2b", n = inout(reg) rounds => _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                inout("xmm12") 0f32 => _, inout("xmm13") 0f32 => _);
        }
        rounds as f64 * 12.0 * 32.0
    }

    /// `vdpbf16ps` on 12 registers; flops.
    ///
    /// # Safety
    /// AVX-512 with BF16 is there.
    pub unsafe fn pairs(rounds: usize) -> f64 {
        // SAFETY: registers only, all declared.
        unsafe {
            asm!("2:",
                "vdpbf16ps zmm0, zmm12, zmm13", "vdpbf16ps zmm1, zmm12, zmm13", "vdpbf16ps zmm2, zmm12, zmm13",
                "vdpbf16ps zmm3, zmm12, zmm13", "vdpbf16ps zmm4, zmm12, zmm13", "vdpbf16ps zmm5, zmm12, zmm13",
                "vdpbf16ps zmm6, zmm12, zmm13", "vdpbf16ps zmm7, zmm12, zmm13", "vdpbf16ps zmm8, zmm12, zmm13",
                "vdpbf16ps zmm9, zmm12, zmm13", "vdpbf16ps zmm10, zmm12, zmm13", "vdpbf16ps zmm11, zmm12, zmm13",
                "dec {n}", "jnz 2b", n = inout(reg) rounds => _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                inout("xmm12") 0f32 => _, inout("xmm13") 0f32 => _);
        }
        rounds as f64 * 12.0 * 64.0
    }

    /// `tdpbf16ps` on 4 tiles; flops.
    ///
    /// # Safety
    /// AMX is there and permitted.
    pub unsafe fn tiles(rounds: usize) -> f64 {
        #[repr(align(64))]
        struct Config([u8; 64]);
        let mut config = Config([0; 64]);
        config.0[0] = 1;
        for tile in 0..8 {
            config.0[16 + 2 * tile] = 64;
            config.0[48 + tile] = 16;
        }
        // SAFETY: the compiler allocates no tiles.
        unsafe {
            asm!("ldtilecfg [{c}]", "2:",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm5, tmm6",
                "tdpbf16ps tmm2, tmm4, tmm7", "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}", "jnz 2b", "tilerelease", n = inout(reg) rounds => _, c = in(reg) &config);
        }
        rounds as f64 * 4.0 * 16.0 * 16.0 * 64.0
    }
}

/// GFLOP/s of `threads` threads at the tier's best instruction for the precision.
pub fn peak(pool: &Pool, isa: Isa, precision: Precision) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        let work = |_: usize, _: &mut Scratch| {
            // SAFETY: the tier is available.
            unsafe {
                match (isa, precision) {
                    (_, Precision::Exact) => black_box(peak::fma(1_000_000)),
                    (Isa::Avx512, _) => black_box(peak::pairs(500_000)),
                    _ => black_box(peak::tiles(200_000)),
                };
            }
        };
        let flops = match (isa, precision) {
            (_, Precision::Exact) => 1e6 * 12.0 * 32.0,
            (Isa::Avx512, _) => 5e5 * 12.0 * 64.0,
            _ => 2e5 * 65536.0,
        };
        let task: [Box<dyn Task + '_>; 1] = [Box::new(FnTask::new("peak", pool.threads(), work))];
        let time = seconds(|| pool.run(&task).unwrap());
        return flops * pool.threads() as f64 / time / 1e9;
    }
    let _ = (pool, isa, precision);
    f64::NAN
}

/// GB/s of reading, 4 streams a thread.
pub fn bandwidth(pool: &Pool, data: &[u64]) -> f64 {
    let share = data.len() / pool.threads() / 4;
    let work = |thread: usize, _: &mut Scratch| {
        let base = &data[thread * share * 4..][..share * 4];
        let (a, rest) = base.split_at(share);
        let (b, rest) = rest.split_at(share);
        let (c, d) = rest.split_at(share);
        let mut sums = [0u64; 32];
        for (((a, b), c), d) in
            a.chunks_exact(8).zip(b.chunks_exact(8)).zip(c.chunks_exact(8)).zip(d.chunks_exact(8))
        {
            for i in 0..8 {
                sums[i] ^= a[i];
                sums[8 + i] ^= b[i];
                sums[16 + i] ^= c[i];
                sums[24 + i] ^= d[i];
            }
        }
        black_box(sums);
    };
    let task: [Box<dyn Task + '_>; 1] = [Box::new(FnTask::new("read", pool.threads(), work))];
    (share * 4 * pool.threads() * 8) as f64 / seconds(|| pool.run(&task).unwrap()) / 1e9
}
