//! How fast quantized products are here, beside what the memory can deliver in the same run.
//!
//! `cargo run --release -p mica-kernels --example quant_speed [bits] [threads] [out] [in]`
//! prints GB/s of weights for m = 1…8 rows, GOP/s for prefill and training shapes, and the read
//! bandwidth sampled between them. A ratio is a result, a time is not: other processes on the
//! machine change both.

use std::time::Instant;

use mica_codec::QuantSpec;
use mica_kernels::quant::{Epilogue, Precision, QuantWeight, ScaleType, Scales};
use mica_kernels::{View, ViewMut};
use mica_simd::Isa;
use mica_testkit::Rng;
use mica_threads::{FnTask, Pool, Task};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>().expect("a number"));
    let mut next = |default| arguments.next().unwrap_or(default);
    let (bits, threads) = (next(4), next(mica_threads::default_threads()));
    let (out, inner) = (next(256 * 1024), next(1024));
    let isa = Isa::get();
    let pool = Pool::new(threads);
    let spec = QuantSpec::affine(bits, 64).expect("a width that exists");
    let mut rng = Rng::new(1);
    let weight = |rng: &mut Rng, out: usize, inner: usize| {
        let words: Vec<u32> = (0..out * spec.words(inner)).map(|_| rng.u32()).collect();
        let scales = vec![half::bf16::from_f32(0.01); out * inner / 64];
        let scales = Scales::Bf16(&scales);
        QuantWeight::pack(&pool, spec, [out, inner], &words, scales, Some(scales)).expect("sizes fit")
    };
    let large = weight(&mut rng, out, inner);
    println!(
        "{isa}, {threads} threads, {bits} bits, groups of 64, {:?} scales, [{out}, {inner}] = {:.0} MB",
        ScaleType::Bf16,
        large.bytes() as f64 / 1e6
    );

    let mut y = vec![0f32; 8 * out];
    let bandwidth = vec![1u64; large.bytes().max(64 << 20) / 8];
    for m in 1..=8 {
        let x = rng.normals(m * inner);
        let (mut product, mut read) = (Vec::new(), Vec::new());
        for _ in 0..9 {
            read.push(bandwidth.len() as f64 * 8.0 / time(|| read_all(&pool, &bandwidth)) / 1e9);
            let seconds = time_product(&pool, &large, &x, m, &mut y[..m * out], Precision::Fast, isa, false);
            product.push(large.bytes() as f64 / seconds / 1e9);
        }
        let mut ratios: Vec<f64> = product.iter().zip(&read).map(|(p, r)| p / r).collect();
        println!(
            "m {m}: {:6.1} GB/s of weights, {:6.1} GB/s read, paired ratio {:.2}",
            median(&mut product),
            median(&mut read),
            median(&mut ratios)
        );
    }

    for (out, inner, m) in [(3072, 1024, 512), (1024, 3072, 512), (3072, 1024, 64), (3072, 1024, 16)] {
        let weight = weight(&mut rng, out, inner);
        let x = rng.normals(m * inner.max(out));
        let mut y = vec![0f32; m * out.max(inner)];
        for (name, precision, transposed) in [
            ("int8", Precision::Fast, false),
            ("bf16", Precision::Bf16, false),
            ("f32", Precision::Exact, false),
            ("bf16 transposed", Precision::Bf16, true),
            ("f32 transposed", Precision::Exact, true),
        ] {
            let (k, n) = if transposed { (out, inner) } else { (inner, out) };
            let mut times: Vec<f64> = (0..7)
                .map(|_| {
                    time_product(&pool, &weight, &x[..m * k], m, &mut y[..m * n], precision, isa, transposed)
                })
                .collect();
            let seconds = median(&mut times);
            let operations = 2.0 * (m * out * inner) as f64;
            println!("[{m}, {k}] x [{out}, {inner}], {name}: {:.0} GOP/s", operations / seconds / 1e9);
        }
    }
}

/// Seconds of one product, staging included, allocation not.
fn time_product(
    pool: &Pool,
    weight: &QuantWeight,
    x: &[f32],
    m: usize,
    y: &mut [f32],
    precision: Precision,
    isa: Isa,
    transposed: bool,
) -> f64 {
    let x_view = View::new(x, &[m, x.len() / m]).expect("sizes fit");
    let shape = [m, y.len() / m];
    let out = ViewMut::new(y, &shape).expect("sizes fit");
    let plan = if transposed {
        weight.plan_transposed(x_view, out, precision, Epilogue::none(), isa)
    } else {
        weight.plan_forward(x_view, out, precision, Epilogue::none(), isa)
    }
    .expect("sizes fit");
    let mut workspace = vec![0u8; plan.workspace_bytes() + 64];
    let offset = workspace.as_mut_ptr().align_offset(64);
    let mut tasks: Vec<Box<dyn Task + '_>> = Vec::new();
    // SAFETY: aligned, large enough, used by nothing else.
    unsafe { plan.tasks(workspace[offset..].as_mut_ptr(), &mut tasks) };
    pool.run(&tasks).expect("kernels do not panic");
    time(|| pool.run(&tasks).expect("kernels do not panic"))
}

/// Reads all of it, in ranges of 1 MB, four streams each.
fn read_all(pool: &Pool, data: &[u64]) {
    const RANGE: usize = (1 << 20) / 8;
    let read = |chunk: usize, _: &mut mica_threads::Scratch| {
        let range = &data[chunk * RANGE..(chunk * RANGE + RANGE).min(data.len())];
        let (a, b) = range.split_at(range.len() / 2);
        let ((a, b), (c, d)) = (a.split_at(a.len() / 2), b.split_at(b.len() / 2));
        let lines = a.chunks_exact(8).zip(b.chunks_exact(8)).zip(c.chunks_exact(8).zip(d.chunks_exact(8)));
        let mut sums = [0u64; 32];
        for ((a, b), (c, d)) in lines {
            for i in 0..8 {
                sums[i] |= a[i];
                sums[8 + i] |= b[i];
                sums[16 + i] |= c[i];
                sums[24 + i] |= d[i];
            }
        }
        std::hint::black_box(sums);
    };
    let task = FnTask::new("read", data.len().div_ceil(RANGE), read);
    pool.run(&[Box::new(task)]).expect("reading does not panic");
}

fn time(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
