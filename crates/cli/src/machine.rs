//! What this machine can do, measured.

use std::time::Instant;

use mica_array::memory;

/// Read bandwidth of memory in GB/s: the best of a few passes over a block far larger than the
/// caches, with `threads` threads that each read four streams.
pub fn read_bandwidth(threads: usize, bytes: usize) -> Option<f64> {
    let words = bytes / 8 / threads.max(1) / 32 * 32;
    let mut blocks: Vec<Vec<u64>> = Vec::new();
    for _ in 0..threads.max(1) {
        let mut block = Vec::new();
        block.try_reserve_exact(words).ok()?;
        block.resize(words, 1u64);
        blocks.push(block);
    }
    let pass = || {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for block in &blocks {
                scope.spawn(move || std::hint::black_box(sum(block)));
            }
        });
        (words * 8 * blocks.len()) as f64 / started.elapsed().as_secs_f64() / 1e9
    };
    let mut rates: Vec<f64> = (0..5).map(|_| pass()).collect();
    rates.sort_by(f64::total_cmp);
    Some(rates[rates.len() / 2])
}

/// Adds four streams at once, so that the memory system always has requests in flight.
fn sum(block: &[u64]) -> u64 {
    let quarter = block.len() / 4;
    let (a, rest) = block.split_at(quarter);
    let (b, rest) = rest.split_at(quarter);
    let (c, d) = rest.split_at(quarter);
    let mut sums = [0u64; 8];
    for (((a, b), c), d) in
        a.chunks_exact(8).zip(b.chunks_exact(8)).zip(c.chunks_exact(8)).zip(d.chunks_exact(8))
    {
        for i in 0..8 {
            sums[i] = sums[i].wrapping_add(a[i]).wrapping_add(b[i]).wrapping_add(c[i]).wrapping_add(d[i]);
        }
    }
    sums.iter().fold(0, |sum, value| sum.wrapping_add(*value))
}

/// The most memory that this process has had resident, in GB; 0 where the system does not say.
pub fn peak_memory_gb() -> f64 {
    memory::peak_resident().unwrap_or(0) as f64 / 1e9
}

/// Memory of the machine in GB, if the system says.
pub fn total_memory_gb() -> Option<f64> {
    Some(memory::total()? as f64 / 1e9)
}

/// The processor's name, if the system says.
pub fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}
