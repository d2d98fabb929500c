//! Where time goes: while a [`Session`] lives every op is measured. `MICA_PROFILE=1` does so for a whole process
//! and [`report`] prints the table.
//!
//! While it is on, each step enters the pool alone, so that its time is its own; a decode step then
//! takes a little longer than without. `MICA_PROFILE=shapes` keeps the shapes of an op apart.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

use crate::backend::{Operand, Step};
use crate::kv::{KvFormat, PagedSpec, PagedStep};
use crate::op::{AttentionSpec, Op, Precision};
use crate::ops::quantized::{QuantMode, QuantSpec};
use crate::shape::size_of;
use crate::{Dtype, PackedWeight};

const OFF: u8 = 0;
const OPS: u8 = 1;
const SHAPES: u8 = 2;

static MODE: AtomicU8 = AtomicU8::new(OFF);

fn mode() -> u8 {
    static ENVIRONMENT: Once = Once::new();
    ENVIRONMENT.call_once(|| {
        let mode = match std::env::var("MICA_PROFILE").as_deref() {
            Err(_) | Ok("" | "0") => OFF,
            Ok("shapes") => SHAPES,
            Ok(_) => OPS,
        };
        MODE.store(mode, Ordering::Relaxed);
    });
    MODE.load(Ordering::Relaxed)
}

/// How an op forms products, which says what arithmetic bounds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arithmetic {
    /// No products, or few: memory bounds it.
    None,
    /// In f32.
    F32,
    /// Of bf16 numbers.
    Bf16,
    /// Of 8-bit integers.
    Int8,
}

impl Arithmetic {
    /// As the tables say it; nothing where there are no products.
    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::None => "",
            Arithmetic::F32 => "f32",
            Arithmetic::Bf16 => "bf16",
            Arithmetic::Int8 => "int8",
        }
    }
}

/// What all runs of an op took together.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The op's name, with `MICA_PROFILE=shapes` followed by those of its inputs.
    pub op: String,
    /// What its products are formed in.
    pub arithmetic: Arithmetic,
    /// How often it ran.
    pub calls: u64,
    /// How long that took.
    pub seconds: f64,
    /// Bytes of what it read and wrote, each counted once a call.
    pub bytes: u64,
    /// Multiplications and additions of products.
    pub operations: u64,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    calls: u64,
    time: Duration,
    bytes: u64,
    operations: u64,
}

static TABLE: Mutex<BTreeMap<(String, Arithmetic), Entry>> = Mutex::new(BTreeMap::new());

/// Whether ops are measured.
pub fn enabled() -> bool {
    mode() != OFF
}

/// Ops are measured while this lives. What `MICA_PROFILE` measures is put aside until then.
pub struct Session {
    mode: u8,
    table: BTreeMap<(String, Arithmetic), Entry>,
}

/// Measures ops from now on, from zero. One session at a time: a second one would take the first one's ops.
pub fn start() -> Session {
    let mode = mode();
    let mut table = TABLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let session = Session { mode, table: std::mem::take(&mut *table) };
    MODE.store(mode.max(OPS), Ordering::Relaxed);
    session
}

impl Session {
    /// What was measured, longest first.
    pub fn finish(self) -> Vec<Row> {
        rows()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        MODE.store(self.mode, Ordering::Relaxed);
        *TABLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = std::mem::take(&mut self.table);
    }
}

/// Adds one run of a step.
pub(crate) fn record(step: &Step, time: Duration) {
    let mut name = step.op.name().to_string();
    if mode() == SHAPES {
        for operand in &step.inputs {
            let _ = match operand {
                Operand::Host(view) => write!(name, " {:?}", view.shape.as_slice()),
                Operand::Packed(weight) => write!(name, " packed {:?}", weight.shape()),
                Operand::Absent => Ok(()),
            };
        }
    }
    let mut table = TABLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let entry = table.entry((name, arithmetic(step))).or_default();
    entry.calls += 1;
    entry.time += time;
    entry.bytes += bytes(step);
    entry.operations += operations(step);
}

/// What a step reads and writes.
fn bytes(step: &Step) -> u64 {
    let of = |operand: &Operand| match operand {
        Operand::Host(view) => view.bytes() as u64,
        Operand::Packed(weight) => weight.bytes() as u64,
        Operand::Absent => 0,
    };
    let plain: u64 = step.inputs.iter().chain(&step.outputs).map(of).sum();
    match &step.op {
        // Of the table it reads as many rows as it gives.
        Op::Embedding => plain - of(&step.inputs[0]) + step.outputs.iter().map(of).sum::<u64>(),
        // Of the matrices at most one for each index.
        Op::GatherMatmul | Op::GatherLinear { .. } => {
            let count = |operand: &Operand| match operand {
                Operand::Host(view) => view.shape[0],
                Operand::Packed(weight) => weight.shape()[0],
                Operand::Absent => 0,
            };
            let chosen = step.outputs.first().map_or(0, |out| match out {
                Operand::Host(view) => size_of(&view.shape[..view.shape.len() - 2]),
                Operand::Packed(_) | Operand::Absent => 0,
            });
            let unread = |at: usize| {
                let there = count(&step.inputs[at]).max(1);
                of(&step.inputs[at]) / there as u64 * there.saturating_sub(chosen) as u64
            };
            plain - unread(0) - unread(1)
        }
        Op::PagedAttention(paged) => {
            let keys = seen(paged, &step.inputs[0]).map(|(keys, _)| keys).sum::<u64>();
            plain + keys * (paged.kv.bytes_per_position() / paged.kv.layers) as u64
        }
        _ => plain,
    }
}

/// Of each sequence: the keys that are read, and the pairs of a query and a key that it sees.
fn seen<'a>(paged: &'a PagedStep, queries: &'a Operand) -> impl Iterator<Item = (u64, u64)> + 'a {
    let length = match queries {
        Operand::Host(view) => view.shape.get(1).copied().unwrap_or(0),
        Operand::Packed(_) | Operand::Absent => 0,
    };
    let window = paged.spec.window;
    paged.sequences.iter().map(move |&(_, before)| {
        let keys = PagedSpec::keys_read(window, before, length) as u64;
        (keys, causal_pairs(before as i64, length, window))
    })
}

/// Pairs of a query and a key that it sees, of queries that stand behind so many keys (with fewer keys than queries:
/// behind less than none).
fn causal_pairs(before: i64, queries: usize, window: Option<usize>) -> u64 {
    let window = window.map_or(u64::MAX, |window| window as u64);
    (1..=queries as i64).map(|i| (before + i).max(0) as u64).map(|keys| keys.min(window)).sum()
}

/// The same of attention over arrays. (The beginnings of packed rows are data, so their keys count.)
fn pairs(spec: &AttentionSpec, queries: usize, keys: usize) -> u64 {
    match spec.causal {
        true => causal_pairs(keys as i64 - queries as i64, queries, spec.window),
        false => queries as u64 * keys as u64,
    }
}

/// What the CPU backend forms an op's products in (`backend/cpu/{products,fused}.rs`).
fn arithmetic(step: &Step) -> Arithmetic {
    let float = |precision: Precision| match precision {
        Precision::Exact => Arithmetic::F32,
        Precision::Bf16 | Precision::Fast => Arithmetic::Bf16,
    };
    // Products of two bf16 arrays are exact in bf16.
    let half = |x: &Operand| matches!(x, Operand::Host(view) if view.dtype == Dtype::BF16);
    let halves = || step.inputs.iter().all(half);
    // 8-bit floats have no int8 product, all other codes have.
    let integers = |weight: &PackedWeight| {
        let eight = |format: QuantSpec| format.mode() == QuantMode::Mxfp8;
        weight.is_quantized() && !weight.quantization().is_some_and(eight)
    };
    let quantized = || step.inputs.iter().any(|x| matches!(x, Operand::Packed(weight) if integers(weight)));
    match &step.op {
        Op::Linear { precision: Precision::Fast } if quantized() => Arithmetic::Int8,
        Op::GatherLinear { precision: Precision::Fast, .. } if quantized() => Arithmetic::Int8,
        Op::Matmul { .. } | Op::Linear { .. } | Op::LinearTransposed { .. } if halves() => Arithmetic::Bf16,
        Op::Matmul { precision } | Op::Linear { precision } | Op::LinearTransposed { precision } => {
            float(*precision)
        }
        Op::GatherMatmul | Op::GatherLinear { .. } if step.inputs[..2].iter().all(half) => Arithmetic::Bf16,
        Op::GatherLinear { precision, .. } => float(*precision),
        Op::GatherMatmul => Arithmetic::F32,
        Op::LinearCrossEntropy(spec) => float(spec.precision),
        Op::Attention(spec) | Op::AttentionVjp(spec) => float(spec.precision),
        // What is kept in f32 is not rounded for products.
        Op::PagedAttention(paged) if paged.kv.format == KvFormat::F32 => Arithmetic::F32,
        Op::PagedAttention(paged) => float(paged.spec.precision),
        _ => Arithmetic::None,
    }
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
        Op::Matmul { .. }
        | Op::Linear { .. }
        | Op::LinearTransposed { .. }
        | Op::GatherMatmul
        | Op::GatherLinear { .. } => {
            2 * size(&shape(&step.outputs[0])) * first.last().copied().unwrap_or(1) as u64
        }
        // Logits, and as much again for each gradient that is formed.
        Op::LinearCrossEntropy(_) => {
            let formed = step.outputs.iter().skip(2).filter(|o| !matches!(o, Operand::Absent)).count() as u64;
            2 * size(&first) * shape(&step.inputs[1])[0] as u64 * (1 + formed)
        }
        // Scores and sums over the keys that are seen; backward, the scores again and a product for each gradient of
        // theirs and of the three inputs.
        Op::Attention(spec) | Op::AttentionVjp(spec) => {
            let (queries, keys) = (first[1], shape(&step.inputs[1])[1]);
            let products = if matches!(step.op, Op::Attention(_)) { 2 } else { 5 };
            let a_query = size(&first) / queries.max(1) as u64;
            2 * products * a_query * pairs(spec, queries, keys)
        }
        Op::PagedAttention(paged) => {
            let pairs: u64 = seen(paged, &step.inputs[0]).map(|(_, pairs)| pairs).sum();
            let heads = size(&first[first.len().saturating_sub(2)..]);
            4 * heads * pairs
        }
        _ => 0,
    }
}

/// What was measured so far, longest first.
pub fn rows() -> Vec<Row> {
    let table = TABLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let row = |((op, arithmetic), entry): (&(String, Arithmetic), &Entry)| Row {
        op: op.clone(),
        arithmetic: *arithmetic,
        calls: entry.calls,
        seconds: entry.time.as_secs_f64(),
        bytes: entry.bytes,
        operations: entry.operations,
    };
    let mut rows: Vec<Row> = table.iter().map(row).collect();
    rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    rows
}

/// The table of what was measured so far, longest first; `None` if nothing was.
pub fn report() -> Option<String> {
    let rows = rows();
    let total: f64 = rows.iter().map(|row| row.seconds).sum();
    if total == 0.0 {
        return None;
    }
    let mut text = format!("{:>8} {:>10} {:>6} {:>8} {:>9}  op\n", "calls", "ms", "share", "GB/s", "GFLOP/s");
    for row in rows {
        let rate = |count: u64| if row.seconds > 0.0 { count as f64 / row.seconds / 1e9 } else { 0.0 };
        let _ = writeln!(
            text,
            "{:>8} {:>10.2} {:>5.1}% {:>8.1} {:>9.1}  {} {}",
            row.calls,
            row.seconds * 1e3,
            100.0 * row.seconds / total,
            rate(row.bytes),
            rate(row.operations),
            row.op,
            row.arithmetic.name(),
        );
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Array;
    use crate::backend::HostView;
    use crate::kv::KvSpec;
    use std::sync::Arc;

    fn plain(shape: &[usize], dtype: Dtype) -> Operand {
        let pointer = std::ptr::null_mut();
        let strides = mica_kernels::view::contiguous_strides(shape);
        Operand::Host(HostView { pointer, shape: shape.into(), strides, dtype })
    }

    fn step(op: Op, inputs: &[Operand], output: &[usize]) -> Step {
        Step {
            op,
            inputs: inputs.iter().cloned().collect(),
            outputs: std::iter::once(plain(output, Dtype::F32)).collect(),
        }
    }

    #[test]
    fn products_have_the_name_of_what_they_are_formed_in() {
        let float = PackedWeight::from_float(&Array::zeros(&[64, 64], Dtype::BF16)).unwrap();
        let quantized =
            PackedWeight::quantize(&Array::zeros(&[64, 64], Dtype::BF16), Default::default()).unwrap();
        let eight = QuantSpec::usual(QuantMode::Mxfp8);
        let eight = PackedWeight::quantize(&Array::zeros(&[64, 64], Dtype::BF16), eight).unwrap();
        let [float, quantized, eight] =
            [float, quantized, eight].map(|weight| Operand::Packed(Arc::new(weight)));
        let (halves, singles) = (plain(&[64, 64], Dtype::BF16), plain(&[64, 64], Dtype::F32));
        let paged = |format| {
            let kv = KvSpec { layers: 1, kv_heads: 1, head_dim: 64, format };
            let spec = PagedSpec { scale: 1.0, window: None, softcap: None, precision: Precision::Fast };
            Op::PagedAttention(Arc::new(PagedStep { layer: 0, kv, spec, sequences: Arc::new([]) }))
        };
        let linear = |precision| Op::Linear { precision };
        let experts = |precision| Op::GatherLinear { precision, transposed: false };
        let (fast, bf16, exact) = (Precision::Fast, Precision::Bf16, Precision::Exact);
        for (name, op, weight, expected) in [
            ("quantized", linear(fast), &quantized, Arithmetic::Int8),
            ("8-bit floats", linear(fast), &eight, Arithmetic::Bf16),
            ("packed floats have no 8-bit form", linear(fast), &float, Arithmetic::Bf16),
            ("plain floats", linear(fast), &singles, Arithmetic::Bf16),
            ("quantized experts", experts(fast), &quantized, Arithmetic::Int8),
            ("experts, bf16", experts(bf16), &quantized, Arithmetic::Bf16),
            ("plain experts, exact", experts(exact), &singles, Arithmetic::F32),
            ("quantized, bf16", linear(bf16), &quantized, Arithmetic::Bf16),
            ("quantized, exact", linear(exact), &quantized, Arithmetic::F32),
            ("backward", Op::LinearTransposed { precision: bf16 }, &quantized, Arithmetic::Bf16),
            ("exact", linear(exact), &halves, Arithmetic::F32),
            ("a cache of bf16", paged(KvFormat::Bf16), &singles, Arithmetic::Bf16),
            ("a cache of f32", paged(KvFormat::F32), &singles, Arithmetic::F32),
        ] {
            assert_eq!(
                arithmetic(&step(op, &[singles.clone(), weight.clone()], &[64, 64])),
                expected,
                "{name}"
            );
        }
        for op in [linear(exact), Op::Matmul { precision: exact }] {
            let inputs = [halves.clone(), halves.clone()];
            assert_eq!(arithmetic(&step(op, &inputs, &[64, 64])), Arithmetic::Bf16, "two of bf16 are exact");
        }
    }

    #[test]
    fn of_experts_only_those_count_that_can_be_read() {
        let indices = |count: usize| plain(&[count], Dtype::U32);
        let inputs = |count| {
            [plain(&[1, 1, 4], Dtype::F32), plain(&[9, 4, 5], Dtype::F32), indices(count), indices(count)]
        };
        for (count, read) in [(2, 2), (30, 9)] {
            let step = step(Op::GatherMatmul, &inputs(count), &[count, 1, 5]);
            assert_eq!(bytes(&step), (4 + read * 20 + 2 * count as u64 + 5 * count as u64) * 4, "{count}");
            assert_eq!(operations(&step), 2 * 4 * 5 * count as u64, "{count}");
        }
    }

    #[test]
    fn attention_counts_the_keys_that_are_seen() {
        let brute = |causal: bool, window: Option<usize>, queries: i64, keys: i64| {
            let sees = |query: i64, key: i64| {
                let own = query + keys - queries;
                !causal || key <= own && window.is_none_or(|window| key > own - window as i64)
            };
            let all = (0..queries).flat_map(|query| (0..keys).map(move |key| (query, key)));
            all.filter(|&(query, key)| sees(query, key)).count() as u64
        };
        for (causal, window, queries, keys) in [
            (false, None, 5, 7),
            (true, None, 6, 6),
            (true, None, 2, 9),
            (true, None, 5, 3),
            (true, Some(3), 8, 8),
            (true, Some(3), 2, 9),
            (true, Some(100), 6, 6),
        ] {
            let (scale, softcap, precision) = (1.0, None, Precision::Bf16);
            let spec = AttentionSpec { scale, causal, window, softcap, key_start: false, precision };
            let (q, k) = ([2, queries, 4, 16], [2, keys, 1, 16]);
            let inputs = [plain(&q, Dtype::F32), plain(&k, Dtype::F32), plain(&k, Dtype::F32)];
            let heads = 2 * 4 * 16;
            let seen = heads * brute(causal, window, queries as i64, keys as i64);
            let name = format!("{causal} {window:?} {queries} {keys}");
            assert_eq!(operations(&step(Op::Attention(spec.clone()), &inputs, &q)), 4 * seen, "{name}");
            assert_eq!(operations(&step(Op::AttentionVjp(spec), &inputs, &q)), 10 * seen, "{name}");
        }
    }
}
