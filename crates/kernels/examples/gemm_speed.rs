//! Speed of float products as a fraction of what this core does in registers.
//!
//! `cargo run --release -p mica-kernels --example gemm_speed [threads] [filter]`. Peaks and
//! products alternate, medians are shown; the bandwidth is a sum over 1 GiB with the same threads.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use mica_kernels::gemm::{Epilogue, FloatView, FloatWeight, Gemm, GemmSpec, Precision, WorkspaceBuf};
use mica_kernels::{View, ViewMut};
use mica_simd::Isa;
use mica_threads::{FnTask, Pool, Scratch, Task};

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Wall time; with `CPU_TIME=1` and one thread the processor time of this thread, which a busy
/// machine disturbs less.
fn seconds(mut run: impl FnMut()) -> f64 {
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

/// Everything is exact and small: the peak loops run on values that stay finite.
fn operand(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5).collect()
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
fn peak(pool: &Pool, isa: Isa, precision: Precision) -> f64 {
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
fn bandwidth(pool: &Pool, data: &[u64]) -> f64 {
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

fn main() {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    let filter = std::env::args().nth(2).unwrap_or_default();
    let pool = Pool::new(threads);
    println!(
        "{threads} threads; medians and best; share of the peak (large) or of the read bandwidth (few rows)"
    );
    for &isa in Isa::available().iter().filter(|&&isa| isa > Isa::Scalar) {
        for precision in [Precision::Exact, Precision::Bf16] {
            for (m, n, k) in [(512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (512, 3072, 1024)] {
                for kind in ["rows", "weight order", "packed", "packed transposed"] {
                    let name = format!("{isa} {precision:?} {m}x{n}x{k} {kind}");
                    if name.contains(&filter) {
                        large(&pool, &name, isa, precision, (m, n, k), kind);
                    }
                }
            }
        }
    }
    let mut data = Vec::new();
    for &isa in Isa::available().iter().filter(|&&isa| isa > Isa::Scalar) {
        for precision in [Precision::Exact, Precision::Bf16] {
            for kind in ["rows", "weight order", "packed"] {
                for m in [1, 2, 4, 8, 16] {
                    let name = format!("{isa} {precision:?} few rows {m} {kind}");
                    if name.contains(&filter) {
                        data.resize((1 << 30) / 8, 1u64);
                        few(&pool, &name, isa, precision, m, kind, &data);
                    }
                }
            }
        }
    }
}

fn large(
    pool: &Pool,
    name: &str,
    isa: Isa,
    precision: Precision,
    (m, n, k): (usize, usize, usize),
    kind: &str,
) {
    let (a, b) = (operand(m * k), operand(k * n));
    let half: Vec<bf16> = b.iter().map(|&x| bf16::from_f32(x)).collect();
    let mut out = vec![0f32; m * n];
    let a = View::new(&a, &[m, k]).unwrap();
    let weight = match kind {
        "packed" => Some(FloatWeight::pack(View::new(&half, &[n, k]).unwrap(), pool).unwrap()),
        "packed transposed" => Some(FloatWeight::pack(View::new(&half, &[k, n]).unwrap(), pool).unwrap()),
        _ => None,
    };
    let out = ViewMut::new(&mut out, &[m, n]).unwrap();
    let plan = match &weight {
        Some(weight) => {
            let turned = kind.ends_with("transposed");
            weight.plan(FloatView::F32(a), out.into(), turned, precision, Epilogue::none(), isa).unwrap()
        }
        None => {
            let strides = if kind == "rows" { [n as isize, 1] } else { [1, k as isize] };
            let b = View::strided(&b, 0, &[k, n], &strides).unwrap();
            let mut spec = GemmSpec::new(a, b, out);
            (spec.precision, spec.isa) = (precision, isa);
            Gemm::plan(&spec).unwrap()
        }
    };
    let mut workspace = WorkspaceBuf::new(plan.workspace_bytes());
    let mut list = Vec::new();
    // SAFETY: the workspace outlives the list.
    unsafe { plan.tasks(workspace.pointer(), &mut list) };
    let flops = 2.0 * (m * n * k) as f64;
    let repeats = (2e9 / flops).ceil() as usize;
    let (mut rates, mut shares) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let peak = peak(pool, isa, precision);
        let time = seconds(|| (0..repeats).for_each(|_| pool.run(&list).unwrap()));
        let rate = flops * repeats as f64 / time / 1e9;
        rates.push(rate);
        shares.push(if peak.is_nan() { 0.0 } else { rate / peak });
    }
    let best = rates.iter().copied().fold(0.0, f64::max);
    println!("{name:55} {:8.1} GFLOP/s {:5.1} %, best {best:8.1}", median(rates), 100.0 * median(shares));
}

fn few(pool: &Pool, name: &str, isa: Isa, precision: Precision, m: usize, kind: &str, data: &[u64]) {
    // 400 MB of bf16 weights or 800 MB of f32: far more than any cache share.
    let (n, k) = (50_000, 4096);
    let a = operand(m * k);
    let a = View::new(&a, &[m, k]).unwrap();
    let mut out = vec![0f32; m * n];
    let out = ViewMut::new(&mut out, &[m, n]).unwrap();
    let half = vec![bf16::from_f32(0.5); n * k];
    let b = View::new(&half, &[n, k]).unwrap();
    let weight = (kind == "packed").then(|| FloatWeight::pack(b.clone(), pool).unwrap());
    let plan = match &weight {
        Some(weight) => {
            weight.plan(FloatView::F32(a), out.into(), false, precision, Epilogue::none(), isa).unwrap()
        }
        None => {
            let strides = if kind == "rows" { [n as isize, 1] } else { [1, k as isize] };
            let b = View::strided(&half, 0, &[k, n], &strides).unwrap();
            let mut spec = GemmSpec::new(a, b, out);
            (spec.precision, spec.isa) = (precision, isa);
            Gemm::plan(&spec).unwrap()
        }
    };
    let mut workspace = WorkspaceBuf::new(plan.workspace_bytes());
    let mut list = Vec::new();
    // SAFETY: the workspace outlives the list.
    unsafe { plan.tasks(workspace.pointer(), &mut list) };
    let (mut rates, mut shares) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let read = bandwidth(pool, data);
        let rate = (n * k * 2) as f64 / seconds(|| pool.run(&list).unwrap()) / 1e9;
        rates.push(rate);
        shares.push(rate / read);
    }
    println!("{name:55} {:8.1} GB/s    {:5.1} %", median(rates), 100.0 * median(shares));
}
