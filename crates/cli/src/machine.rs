//! What this machine is and can do, and where the time of a step goes beside that.

use std::fmt::{self, Display, Formatter};
use std::time::{Duration, Instant};

use mica_array::memory;
use mica_array::profile::{self, Row};
use mica_ceiling::{Arithmetic, Work};
pub use mica_ceiling::{Ceilings, Measured, median, processor};
use mica_threads::Pool;
use serde_json::{Value, json};

/// Why a bandwidth is missing.
pub const NO_BLOCK: &str = "not measured: too little memory is left for what would be read";

/// To measure with as many threads as arrays use, on memory that leaves `reserved` bytes of what there is to others.
pub fn ceilings(reserved: u64) -> Ceilings {
    let room = memory::room().map(|room| room.bytes.saturating_sub(reserved));
    mica_array::with_pool(|pool| Ceilings::new(mica_ceiling::block_bytes(room), pool))
}

/// All ceilings, of the threads that arrays use.
pub fn measure(ceilings: &Ceilings) -> Measured {
    mica_array::with_pool(|pool| ceilings.measure(pool))
}

/// Their read bandwidth in GB/s, if there was memory to measure with.
pub fn bandwidth(ceilings: &Ceilings) -> Option<f64> {
    mica_array::with_pool(|pool| ceilings.bandwidth(pool))
}

/// What bounds an op, and the part of that ceiling it reaches.
fn bound(measured: &Measured, row: &Row) -> Option<(&'static str, f64)> {
    let arithmetic = match row.arithmetic {
        profile::Arithmetic::None => None,
        profile::Arithmetic::F32 => Some(Arithmetic::F32),
        profile::Arithmetic::Bf16 => Some(Arithmetic::Bf16),
        profile::Arithmetic::Int8 => Some(Arithmetic::Int8),
    };
    let &Row { seconds, bytes, operations, .. } = row;
    measured.bound(&Work { seconds, bytes, operations, arithmetic })
}

/// Where the time of a step goes, longest first; the rows are of so many steps.
pub fn by_op(measured: &Measured, rows: &[Row], steps: usize) -> Value {
    let total: f64 = rows.iter().map(|row| row.seconds).sum();
    let one = |row: &Row| {
        let bound = bound(measured, row);
        json!({
            "op": row.op,
            "arithmetic": row.arithmetic.name(),
            "calls": row.calls as f64 / steps as f64,
            "ms": row.seconds * 1e3 / steps as f64,
            "share": row.seconds / total,
            "gbs": row.bytes as f64 / row.seconds / 1e9,
            "gops": row.operations as f64 / row.seconds / 1e9,
            "bound": bound.map(|(name, _)| name),
            "fraction": bound.map(|(_, fraction)| fraction),
        })
    };
    rows.iter().filter(|row| row.seconds > 0.0).map(one).collect()
}

/// The same for people.
pub fn table(measured: &Measured, rows: &[Row], steps: usize) -> String {
    let mut text = format!(
        "{:>7} {:>9} {:>6} {:>7} {:>8} {:>15}  op\n",
        "calls", "ms", "share", "GB/s", "GOP/s", "of its ceiling"
    );
    let total: f64 = rows.iter().map(|row| row.seconds).sum();
    for row in rows.iter().filter(|row| row.seconds > 0.0) {
        let bound = bound(measured, row)
            .map_or_else(String::new, |(name, fraction)| format!("{:.0} % {name:>6}", 100.0 * fraction));
        text += &format!(
            "{:>7} {:>9.3} {:>5.1}% {:>7.1} {:>8.1} {bound:>15}  {}\n",
            row.calls / steps as u64,
            row.seconds * 1e3 / steps as f64,
            100.0 * row.seconds / total,
            row.bytes as f64 / row.seconds / 1e9,
            row.operations as f64 / row.seconds / 1e9,
            format!("{} {}", row.op, row.arithmetic.name()).trim_end(),
        );
    }
    text
}

/// The ceilings as a line.
pub fn line(measured: &Measured) -> String {
    let &Measured { read, f32, bf16, int8 } = measured;
    let reading = read.map_or(format!("reading {NO_BLOCK}"), |rate| format!("{rate:.1} GB/s reading"));
    let arithmetic = match (f32, bf16, int8) {
        (None, None, None) => "arithmetic not measured on this tier".to_string(),
        _ => {
            let rate = |value: Option<f64>| value.map_or("unknown".to_string(), |rate| format!("{rate:.0}"));
            format!("{}, {} and {} GOP/s in f32, bf16 and int8", rate(f32), rate(bf16), rate(int8))
        }
    };
    format!("{reading}; {arithmetic}")
}

/// The same as JSON.
pub fn json(measured: &Measured) -> Value {
    let &Measured { read, f32, bf16, int8 } = measured;
    json!({"read_gbs": read, "f32_gops": f32, "bf16_gops": bf16, "int8_gops": int8})
}

/// What the threads that compute did with their time: shares that add up to 1.
pub struct Spent {
    /// Running kernels.
    kernels: f64,
    /// Waiting for each other between kernels.
    waiting: f64,
    /// Neither: graphs were built and planned, tasks given out, threads woken.
    graph: f64,
}

/// What the threads do while this computes.
pub fn spent<E>(work: impl FnOnce() -> Result<(), E>) -> Result<Spent, E> {
    mica_array::with_pool(Pool::measure);
    let begun = Instant::now();
    let result = work();
    let all = begun.elapsed().as_secs_f64();
    let threads = mica_array::with_pool(Pool::spent);
    result?;
    let share = |time: fn(&mica_threads::Spent) -> Duration| {
        let total: Duration = threads.iter().map(time).sum();
        total.as_secs_f64() / (all * threads.len() as f64)
    };
    let (kernels, waiting) = (share(|spent| spent.tasks), share(|spent| spent.waiting));
    Ok(Spent { kernels, waiting, graph: 1.0 - kernels - waiting })
}

impl Spent {
    pub fn json(&self) -> Value {
        json!({"kernels": self.kernels, "waiting": self.waiting, "graph": self.graph})
    }
}

impl Display for Spent {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let [kernels, waiting, graph] = [self.kernels, self.waiting, self.graph].map(|share| 100.0 * share);
        write!(
            f,
            "{kernels:.1} % of their time in kernels, {waiting:.1} % waiting for each other, {graph:.1} % on graph \
             and scheduling"
        )
    }
}

/// The most memory that this process has had resident, in GB, if the system says.
pub fn peak_memory_gb() -> Option<f64> {
    Some(memory::peak_resident()? as f64 / 1e9)
}

/// Memory of the machine in GB, if the system says.
pub fn total_memory_gb() -> Option<f64> {
    Some(memory::total()? as f64 / 1e9)
}
