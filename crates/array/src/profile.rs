//! Where time goes: `MICA_PROFILE=1` measures every op and [`report`] prints the table.
//!
//! With profiling on, each step enters the pool alone, so that its time is its own; a decode step then
//! takes a little longer than without. `MICA_PROFILE=shapes` keeps the shapes of an op apart.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use crate::backend::{Operand, Step};
use crate::op::Op;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Off,
    Ops,
    Shapes,
}

static MODE: LazyLock<Mode> = LazyLock::new(|| match std::env::var("MICA_PROFILE").as_deref() {
    Err(_) | Ok("" | "0") => Mode::Off,
    Ok("shapes") => Mode::Shapes,
    Ok(_) => Mode::Ops,
});

#[derive(Clone, Copy, Default)]
struct Entry {
    calls: u64,
    time: Duration,
    bytes: u64,
    operations: u64,
}

static TABLE: Mutex<BTreeMap<String, Entry>> = Mutex::new(BTreeMap::new());

/// Whether ops are measured.
pub fn enabled() -> bool {
    *MODE != Mode::Off
}

/// Adds one run of a step.
pub(crate) fn record(step: &Step, time: Duration) {
    let mut name = step.op.name().to_string();
    if *MODE == Mode::Shapes {
        for operand in &step.inputs {
            let _ = match operand {
                Operand::Host(view) => write!(name, " {:?}", view.shape.as_slice()),
                Operand::Packed(weight) => write!(name, " packed {:?}", weight.shape()),
                Operand::Absent => Ok(()),
            };
        }
    }
    let bytes = |operand: &Operand| match operand {
        Operand::Host(view) => view.bytes() as u64,
        Operand::Packed(weight) => weight.bytes() as u64,
        Operand::Absent => 0,
    };
    let mut table = TABLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let entry = table.entry(name).or_default();
    entry.calls += 1;
    entry.time += time;
    entry.bytes += step.inputs.iter().chain(&step.outputs).map(bytes).sum::<u64>();
    entry.operations += operations(step);
}

/// Multiplications and additions of products; other ops are bound by memory and count as none.
fn operations(step: &Step) -> u64 {
    let shape = |operand: &Operand| match operand {
        Operand::Host(view) => view.shape.to_vec(),
        Operand::Packed(weight) => weight.shape().to_vec(),
        Operand::Absent => Vec::new(),
    };
    let size = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let first = step.inputs.first().map_or_else(Vec::new, shape);
    match &step.op {
        Op::Matmul { .. } | Op::Linear { .. } | Op::LinearTransposed { .. } => {
            2 * size(&shape(&step.outputs[0])) * first.last().copied().unwrap_or(1) as u64
        }
        // Logits, and as much again for each gradient that is formed.
        Op::LinearCrossEntropy(_) => {
            let formed = step.outputs.iter().skip(2).filter(|o| !matches!(o, Operand::Absent)).count() as u64;
            2 * size(&first) * shape(&step.inputs[1])[0] as u64 * (1 + formed)
        }
        // Scores and sums over all keys; half as much where queries see only keys before them.
        Op::Attention(spec) | Op::AttentionVjp(spec) => {
            let keys = shape(&step.inputs[1])[1] as u64;
            let products = if matches!(step.op, Op::Attention(_)) { 2 } else { 5 };
            2 * products * size(&first) * keys / if spec.causal { 2 } else { 1 }
        }
        _ => 0,
    }
}

/// The table of what was measured so far, longest first; `None` if nothing was.
pub fn report() -> Option<String> {
    let table = TABLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let total: f64 = table.values().map(|entry| entry.time.as_secs_f64()).sum();
    if total == 0.0 {
        return None;
    }
    let mut rows: Vec<(&String, &Entry)> = table.iter().collect();
    rows.sort_by_key(|(_, entry)| std::cmp::Reverse(entry.time));
    let mut text = format!("{:>8} {:>10} {:>6} {:>8} {:>9}  op\n", "calls", "ms", "share", "GB/s", "GFLOP/s");
    for (name, entry) in rows {
        let seconds = entry.time.as_secs_f64();
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds / 1e9 } else { 0.0 };
        let _ = writeln!(
            text,
            "{:>8} {:>10.2} {:>5.1}% {:>8.1} {:>9.1}  {name}",
            entry.calls,
            seconds * 1e3,
            100.0 * seconds / total,
            rate(entry.bytes),
            rate(entry.operations),
        );
    }
    Some(text)
}
