//! Products that choose their matrices, the Hadamard transform, decompositions, number formats.

use mica_threads::{Scratch, Task};

use super::products::product;
use super::strided::{line_start, task};
use super::{Lowered, by_reference};
use crate::backend::reference::{gathered, linalg};
use crate::backend::{HostView, Step};
use crate::op::{CodecOp, LinalgOp, Precision};
use crate::ops::products::hadamard_factor;
use crate::{Dtype, Result};

/// What a task reports goes to the reader of its result: see `Cpu::run`.
fn report(result: Result<()>) {
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Memory of one task's product, aligned for the kernels.
struct Block(Vec<u64>);

impl Block {
    fn pointer(&mut self, bytes: usize) -> *mut u8 {
        if self.0.len() * 8 < bytes + 64 {
            self.0 = vec![0; bytes / 8 + 9];
        }
        let start = self.0.as_mut_ptr().cast::<u8>();
        start.wrapping_add(start.align_offset(64))
    }
}

/// Runs a product within a task.
fn run_now(
    a: &HostView,
    b: &HostView,
    out: &HostView,
    memory: &mut Block,
    scratch: &mut Scratch,
) -> Result<()> {
    let mut list: Vec<Box<dyn Task>> = Vec::new();
    let lowered = product(a, b, out, Precision::Exact, false)?;
    let workspace = memory.pointer(lowered.bytes());
    lowered.give(workspace, &mut list)?;
    for task in &list {
        for chunk in 0..task.chunks() {
            scratch.reset();
            task.run(chunk, scratch);
        }
    }
    Ok(())
}

fn matrix_of(view: &HostView, index: usize) -> HostView {
    HostView {
        pointer: view.pointer.wrapping_offset(index as isize * view.strides[0] * view.dtype.size() as isize),
        shape: view.shape[1..].into(),
        strides: view.strides[1..].into(),
        dtype: view.dtype,
    }
}

/// Rows of one right matrix are multiplied together, but for f64.
pub(super) fn gather_matmul(step: &Step) -> Result<Lowered> {
    let host = |at: usize| step.inputs[at].host().cloned();
    let (a, b, lhs, rhs) = (host(0)?, host(1)?, host(2)?, host(3)?);
    let out = step.outputs[0].host()?.clone();
    if out.shape.contains(&0) || a.shape[2] == 0 {
        return Ok(by_reference(step));
    }
    if a.dtype != Dtype::F64 {
        return super::experts::gather_matmul(step);
    }
    let entries = lhs.shape.iter().product();
    Ok(one_after_another([a, b, lhs, rhs, out], entries))
}

/// Runs of one right matrix over left matrices that lie one after another are one product: rows do not
/// depend on each other.
fn one_after_another([a, b, lhs, rhs, out]: [HostView; 5], entries: usize) -> Lowered {
    let rank = out.shape.len();
    let (m, n) = (out.shape[rank - 2], out.shape[rank - 1]);
    // A chunk should have some rows to multiply.
    let per_chunk = 64usize.div_ceil(m).min(entries).max(1);
    let stacked = a.strides[0] == m as isize * a.strides[1];
    task("gather_mm", entries.div_ceil(per_chunk), move |chunk, scratch| {
        // Whole views, which may cross threads; their pointers alone may not.
        let (a, b, lhs, rhs, out) = (&a, &b, &lhs, &rhs, &out);
        // SAFETY: contiguous u32 of `entries` elements, which have been computed.
        let (lhs, rhs) = unsafe {
            (
                std::slice::from_raw_parts(lhs.pointer.cast::<u32>(), entries),
                std::slice::from_raw_parts(rhs.pointer.cast::<u32>(), entries),
            )
        };
        let mut memory = Block(Vec::new());
        let mut at = chunk * per_chunk;
        let end = entries.min(at + per_chunk);
        while at < end {
            let (x, y) = (lhs[at] as usize, rhs[at] as usize);
            let mut run = 1;
            while stacked && at + run < end && rhs[at + run] == rhs[at] && lhs[at + run] as usize == x + run {
                run += 1;
            }
            if x + run > a.shape[0] || y >= b.shape[0] {
                report(Err(crate::Error::invalid(
                    "gather_mm",
                    format!("indices {x} of {} and {y} of {} matrices", a.shape[0], b.shape[0]),
                )));
            }
            let mut left = matrix_of(a, x);
            left.shape[0] = m * run;
            let to = HostView {
                pointer: out.pointer.wrapping_add(at * m * n * out.dtype.size()),
                shape: [m * run, n][..].into(),
                strides: [n as isize, 1][..].into(),
                dtype: out.dtype,
            };
            report(run_now(&left, &matrix_of(b, y), &to, &mut memory, scratch));
            at += run;
        }
    })
    .into()
}

pub(super) fn segmented_matmul(step: &Step) -> Result<Lowered> {
    let host = |at: usize| step.inputs[at].host().cloned();
    let (a, b, segments) = (host(0)?, host(1)?, host(2)?);
    let out = step.outputs[0].host()?.clone();
    if out.shape.contains(&0) || a.shape[1] == 0 {
        return Ok(by_reference(step));
    }
    let (m, k, n) = (a.shape[0], a.shape[1], b.shape[1]);
    let count: usize = segments.shape.iter().product::<usize>() / 2;
    const ROWS: usize = 64;
    let blocks = m.div_ceil(ROWS);
    Ok(task("segmented_mm", count * blocks, move |chunk, scratch| {
        let (a, b, segments, out) = (&a, &b, &segments, &out);
        let (segment, row) = (chunk / blocks, chunk % blocks * ROWS);
        // SAFETY: contiguous u32, two per segment, which have been computed.
        let bound =
            |at: usize| unsafe { segments.pointer.cast::<u32>().add(2 * segment + at).read() } as usize;
        let to = bound(1).min(k);
        let from = bound(0).min(to);
        let rows = ROWS.min(m - row);
        let part = |view: &HostView, start: [usize; 2], shape: [usize; 2]| HostView {
            pointer: view.pointer.wrapping_offset(
                (start[0] as isize * view.strides[0] + start[1] as isize * view.strides[1])
                    * view.dtype.size() as isize,
            ),
            shape: shape[..].into(),
            strides: view.strides.clone(),
            dtype: view.dtype,
        };
        let target = HostView {
            pointer: out.pointer.wrapping_add((segment * m + row) * n * out.dtype.size()),
            shape: [rows, n][..].into(),
            strides: [n as isize, 1][..].into(),
            dtype: out.dtype,
        };
        if from == to {
            // SAFETY: these rows of the output are this chunk's alone.
            unsafe { std::ptr::write_bytes(target.pointer, 0, rows * n * out.dtype.size()) };
            return;
        }
        let left = part(a, [row, from], [rows, to - from]);
        let right = part(b, [from, 0], [to - from, n]);
        report(run_now(&left, &right, &target, &mut Block(Vec::new()), scratch));
    })
    .into())
}

/// Butterflies within blocks of a power of two, the odd factor's matrix across blocks.
pub(super) fn hadamard(scale: f32, step: &Step) -> Result<Lowered> {
    let (x, out) = (step.inputs[0].host()?.clone(), step.outputs[0].host()?.clone());
    let n = x.shape.last().copied().unwrap_or(1);
    if x.dtype != Dtype::F32 || x.shape.is_empty() || n == 0 {
        return Ok(by_reference(step));
    }
    let (m, factor) = hadamard_factor(n).expect("the constructor checked the size");
    let axis = x.shape.len() - 1;
    let lines = x.shape.iter().product::<usize>() / n;
    let per_chunk = ((1usize << 14) / n).max(1);
    let power = n / m;
    Ok(task("hadamard_transform", lines.div_ceil(per_chunk), move |chunk, _| {
        let (mut line, mut mixed) = (vec![0f32; n], vec![0f32; if m > 1 { n } else { 0 }]);
        for at in chunk * per_chunk..lines.min((chunk + 1) * per_chunk) {
            let start = line_start(&x, axis, at).cast::<f32>();
            for (i, value) in line.iter_mut().enumerate() {
                // SAFETY: inside the view, which has been computed.
                *value = unsafe { start.wrapping_offset(i as isize * x.strides[axis]).read() };
            }
            let mut half = 1;
            while half < power {
                for pair in line.chunks_exact_mut(2 * half) {
                    let (low, high) = pair.split_at_mut(half);
                    for (a, b) in low.iter_mut().zip(high) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
                half *= 2;
            }
            if m > 1 {
                mixed.fill(0.0);
                for (row, sums) in mixed.chunks_exact_mut(power).enumerate() {
                    for (column, values) in line.chunks_exact(power).enumerate() {
                        let minus = factor[row] >> column & 1 == 1;
                        for (sum, &value) in sums.iter_mut().zip(values) {
                            *sum += if minus { -value } else { value };
                        }
                    }
                }
                std::mem::swap(&mut line, &mut mixed);
            }
            let to = line_start(&out, axis, at).cast::<f32>();
            for (i, value) in line.iter().enumerate() {
                // SAFETY: inside the output; lines of different chunks are disjoint.
                unsafe { to.wrapping_offset(i as isize * out.strides[axis]).write(value * scale) };
            }
        }
    })
    .into())
}

/// A matrix per chunk.
pub(super) fn decomposition(op: LinalgOp, step: &Step) -> Lowered {
    let step = step.clone();
    let count = linalg::count(&step);
    task(op.name(), count, move |at, _| report(linalg::run_one(op, &step, at))).into()
}

/// A piece per chunk.
pub(super) fn codec(op: CodecOp, step: &Step) -> Lowered {
    let step = step.clone();
    let pieces = gathered::codec_pieces(op, &step);
    task(op.name(), pieces, move |piece, _| report(gathered::codec(op, &step, piece))).into()
}
