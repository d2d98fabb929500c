//! A line of a bench: what a kernel reaches, and which part of what the machine can do (`mica_ceiling`) that is;
//! shared by the benches of this folder.
//!
//! `cargo bench --workspace --bench NAME -- [threads] [words]`: lines that contain one of the words, on 2 threads if
//! nothing is said.

#![allow(dead_code)] // each bench uses some of it

use std::time::Instant;

use mica_ceiling::{Arithmetic, Block};
use mica_kernels::gemm::Precision;
use mica_simd::Isa;
use mica_threads::{Pool, Task};

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

/// Times tasks that move so many bytes: GB/s, beside what reading a block with the same threads gives right then.
pub fn moved(pool: &Pool, name: &str, bytes: usize, block: &Block, tasks: &[Box<dyn Task + '_>]) {
    let (mut times, mut shares) = (Vec::new(), Vec::new());
    pool.run(tasks).expect("the inputs are right");
    for _ in 0..15 {
        let read = block.read(pool);
        let time = seconds(|| (0..5).for_each(|_| pool.run(tasks).expect("as before"))) / 5.0;
        times.push(time);
        shares.push(bytes as f64 / time / 1e9 / read);
    }
    let time = median(times);
    let rate = bytes as f64 / time / 1e9;
    println!("{name:44} {:8.3} ms {rate:6.1} GB/s, {:4.0} % of reading", time * 1e3, 100.0 * median(shares));
}

/// The median of at least one round.
pub fn median(values: Vec<f64>) -> f64 {
    mica_ceiling::median(values).expect("there is a round")
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

/// GFLOP/s of all threads at the tier's best instruction for the precision; NaN for tiers without vectors.
pub fn peak(pool: &Pool, isa: Isa, precision: Precision) -> f64 {
    let arithmetic = match precision {
        Precision::Exact => Arithmetic::F32,
        Precision::Bf16 => Arithmetic::Bf16,
    };
    mica_ceiling::peak(pool, isa, arithmetic).unwrap_or(f64::NAN)
}

/// Memory to read beside a kernel.
pub fn block(pool: &Pool, bytes: usize) -> Block {
    Block::new(bytes, pool).expect("there is memory for the block")
}
