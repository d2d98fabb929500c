//! Speed of float products as a fraction of what this core does in registers.
//!
//! `cargo bench --workspace --bench gemm -- [threads] [words]`. Peaks and products alternate, medians are shown;
//! the bandwidth is a sum over 1 GiB with the same threads.

mod ceiling;

use half::bf16;
use mica_ceiling::Block;
use mica_kernels::gemm::{Epilogue, FloatView, FloatWeight, Gemm, GemmSpec, Precision, WorkspaceBuf};
use mica_kernels::{View, ViewMut};
use mica_simd::Isa;
use mica_threads::Pool;

use ceiling::{arguments, block, is_asked_for, median, peak, seconds};

/// Everything is exact and small: the peak loops run on values that stay finite.
fn operand(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5).collect()
}

fn main() {
    let (threads, words) = arguments();
    let pool = Pool::new(threads);
    println!(
        "{threads} threads; medians and best; share of the peak (large) or of the read bandwidth (few rows)"
    );
    for &isa in Isa::available().iter().filter(|&&isa| isa > Isa::Scalar) {
        for precision in [Precision::Exact, Precision::Bf16] {
            for (m, n, k) in [(512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (512, 3072, 1024)] {
                for kind in ["rows", "weight order", "packed", "packed transposed"] {
                    let name = format!("{isa} {precision:?} {m}x{n}x{k} {kind}");
                    if is_asked_for(&name, &words) {
                        large(&pool, &name, isa, precision, (m, n, k), kind);
                    }
                }
            }
        }
    }
    for &isa in Isa::available().iter().filter(|&&isa| isa > Isa::Scalar) {
        for (rows, inputs, outputs) in
            [(8192, 256, 256), (8192, 256, 768), (8192, 768, 256), (1024, 1024, 3072)]
        {
            for kind in ["forward", "backward", "gradient"] {
                let name = format!("{isa} Bf16 training {rows} rows {inputs} to {outputs} {kind}");
                if is_asked_for(&name, &words) {
                    training(&pool, &name, isa, (rows, inputs, outputs), kind);
                }
            }
        }
    }
    let mut memory = None;
    for &isa in Isa::available().iter().filter(|&&isa| isa > Isa::Scalar) {
        for precision in [Precision::Exact, Precision::Bf16] {
            for kind in ["rows", "weight order", "packed"] {
                for m in [1, 2, 4, 8, 16] {
                    let name = format!("{isa} {precision:?} few rows {m} {kind}");
                    if is_asked_for(&name, &words) {
                        let block = memory.get_or_insert_with(|| block(&pool, 1 << 30));
                        few(&pool, &name, isa, precision, m, kind, block);
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
            (spec.precision, spec.isa, spec.threads) = (precision, isa, pool.threads());
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

/// Zeros on pages such as arrays have.
fn on_huge_pages(count: usize) -> Vec<f32> {
    let values = vec![0f32; count];
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = (values.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (values.as_ptr() as usize + 4 * count) / PAGE * PAGE;
        // SAFETY: advice on whole pages of the vector; it changes no contents.
        unsafe { libc::madvise(start as *mut libc::c_void, end.saturating_sub(start), libc::MADV_HUGEPAGE) };
    }
    values
}

/// One of the three products of a layer that is trained, on activations that no cache holds any more.
fn training(pool: &Pool, name: &str, isa: Isa, (rows, inputs, outputs): (usize, usize, usize), kind: &str) {
    const SETS: usize = 6;
    let weight: Vec<bf16> = operand(inputs * outputs).iter().map(|&x| bf16::from_f32(x)).collect();
    let filled = |count: usize| {
        let mut values = on_huge_pages(count);
        values.copy_from_slice(&operand(count));
        values
    };
    let xs: Vec<Vec<f32>> = (0..SETS).map(|_| filled(rows * inputs)).collect();
    let mut ys: Vec<Vec<f32>> = (0..SETS).map(|_| filled(rows * outputs)).collect();
    let mut outs: Vec<Vec<f32>> =
        (0..SETS).map(|_| on_huge_pages((rows * inputs).max(inputs * outputs))).collect();
    let mut plans = Vec::new();
    for ((x, y), out) in xs.iter().zip(&mut ys).zip(&mut outs) {
        let x = View::new(x, &[rows, inputs]).unwrap();
        let mut spec = match kind {
            "forward" => {
                let strides = [1, inputs as isize];
                let weight = View::strided(&weight, 0, &[inputs, outputs], &strides).unwrap();
                GemmSpec::new(x, weight, ViewMut::new(y, &[rows, outputs]).unwrap())
            }
            "backward" => {
                let weight = View::new(&weight, &[outputs, inputs]).unwrap();
                let out = ViewMut::new(&mut out[..rows * inputs], &[rows, inputs]).unwrap();
                GemmSpec::new(View::new(y, &[rows, outputs]).unwrap(), weight, out)
            }
            _ => {
                let turned = View::strided(y, 0, &[outputs, rows], &[1, outputs as isize]).unwrap();
                let out = ViewMut::new(&mut out[..inputs * outputs], &[outputs, inputs]).unwrap();
                GemmSpec::new(turned, x, out)
            }
        };
        (spec.precision, spec.isa, spec.threads) = (Precision::Bf16, isa, pool.threads());
        plans.push(Gemm::plan(&spec).unwrap());
    }
    let mut workspace = WorkspaceBuf::new(plans[0].workspace_bytes());
    let mut list = Vec::new();
    // SAFETY: the workspace outlives the list, and is used by one product at a time.
    plans.iter().for_each(|plan| unsafe { plan.tasks(workspace.pointer(), &mut list) });
    let flops = 2.0 * (rows * inputs * outputs * SETS) as f64;
    let (mut rates, mut shares) = (Vec::new(), Vec::new());
    for _ in 0..15 {
        let peak = peak(pool, isa, Precision::Bf16);
        let rate = flops / seconds(|| pool.run(&list).unwrap()) / 1e9;
        rates.push(rate);
        shares.push(if peak.is_nan() { 0.0 } else { rate / peak });
    }
    println!("{name:55} {:8.1} GFLOP/s {:5.1} %", median(rates), 100.0 * median(shares));
}

fn few(pool: &Pool, name: &str, isa: Isa, precision: Precision, m: usize, kind: &str, block: &Block) {
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
            (spec.precision, spec.isa, spec.threads) = (precision, isa, pool.threads());
            Gemm::plan(&spec).unwrap()
        }
    };
    let mut workspace = WorkspaceBuf::new(plan.workspace_bytes());
    let mut list = Vec::new();
    // SAFETY: the workspace outlives the list.
    unsafe { plan.tasks(workspace.pointer(), &mut list) };
    let (mut rates, mut shares) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let read = block.read(pool);
        let rate = (n * k * 2) as f64 / seconds(|| pool.run(&list).unwrap()) / 1e9;
        rates.push(rate);
        shares.push(rate / read);
    }
    println!("{name:55} {:8.1} GB/s    {:5.1} %", median(rates), 100.0 * median(shares));
}
