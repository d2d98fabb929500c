//! Fourier transforms, a group of lines per chunk.

use std::sync::{LazyLock, Mutex, PoisonError};

use mica_threads::Scratch;
use num_complex::Complex32;
use realfft::RealFftPlanner;
use rustfft::FftPlanner;

use super::Lowered;
use super::strided::{line_start, task};
use crate::backend::{HostView, Step};
use crate::ops::fft::{FftKind, FftSpec};
use crate::{Error, Result};

/// Elements per chunk: a chunk should cost much more than handing it out.
const CHUNK: usize = 1 << 14;

/// Lengths up to which twiddle factors are kept from call to call.
const KEPT: usize = 1 << 16;
static COMPLEX: LazyLock<Mutex<FftPlanner<f32>>> = LazyLock::new(|| Mutex::new(FftPlanner::new()));
static REAL: LazyLock<Mutex<RealFftPlanner<f32>>> = LazyLock::new(|| Mutex::new(RealFftPlanner::new()));

pub(super) fn lower(spec: &FftSpec, step: &Step) -> Result<Lowered> {
    let (x, out) = (step.inputs[0].host()?.clone(), step.outputs[0].host()?.clone());
    let (axis, scale, name) = (spec.axis, spec.scale, spec.name());
    let (have, gives) = (x.shape[axis], out.shape[axis]);
    let lines = x.shape.iter().product::<usize>() / have.max(1);
    let per_chunk = (CHUNK / have.max(gives).max(1)).max(1);
    let chunks = lines.div_ceil(per_chunk);
    let range = move |chunk: usize| chunk * per_chunk..lines.min((chunk + 1) * per_chunk);
    Ok(match spec.kind {
        FftKind::Forward | FftKind::Backward => {
            let plan_in = |planner: &mut FftPlanner<f32>| match spec.kind {
                FftKind::Forward => planner.plan_fft_forward(have),
                _ => planner.plan_fft_inverse(have),
            };
            let plan = match have <= KEPT {
                true => plan_in(&mut *COMPLEX.lock().map_err(poisoned)?),
                false => plan_in(&mut FftPlanner::new()),
            };
            task(name, chunks, move |chunk, scratch| {
                let line = complex(scratch, have);
                let work = complex(scratch, plan.get_inplace_scratch_len());
                for at in range(chunk) {
                    gather(&x, axis, at, line);
                    plan.process_with_scratch(line, work);
                    line.iter_mut().for_each(|z| *z *= scale);
                    scatter(&out, axis, at, line);
                }
            })
            .into()
        }
        FftKind::RealForward => {
            let plan = match have <= KEPT {
                true => REAL.lock().map_err(poisoned)?.plan_fft_forward(have),
                false => RealFftPlanner::new().plan_fft_forward(have),
            };
            task(name, chunks, move |chunk, scratch| {
                let (line, spectrum) = (scratch.take::<f32>(have), complex(scratch, have / 2 + 1));
                let work = complex(scratch, plan.get_scratch_len());
                for at in range(chunk) {
                    gather(&x, axis, at, line);
                    plan.process_with_scratch(line, spectrum, work)
                        .expect("the buffers are as long as the plan's");
                    spectrum.iter_mut().for_each(|z| *z *= scale);
                    scatter(&out, axis, at, spectrum);
                }
            })
            .into()
        }
        FftKind::RealBackward => {
            let plan = match gives <= KEPT {
                true => REAL.lock().map_err(poisoned)?.plan_fft_inverse(gives),
                false => RealFftPlanner::new().plan_fft_inverse(gives),
            };
            task(name, chunks, move |chunk, scratch| {
                let (spectrum, line) = (complex(scratch, gives / 2 + 1), scratch.take::<f32>(gives));
                let work = complex(scratch, plan.get_scratch_len());
                for at in range(chunk) {
                    gather(&x, axis, at, spectrum);
                    // These do not count, and the plan refuses others.
                    spectrum[0].im = 0.0;
                    if gives.is_multiple_of(2) {
                        spectrum[gives / 2].im = 0.0;
                    }
                    plan.process_with_scratch(spectrum, line, work)
                        .expect("the buffers are as long as the plan's, the ends are real");
                    line.iter_mut().for_each(|value| *value *= scale);
                    scatter(&out, axis, at, line);
                }
            })
            .into()
        }
    })
}

/// Complex numbers of the worker's own, which the memory limit is for too.
#[allow(clippy::mut_from_ref)] // as `Scratch::take`: each call lends a different range
fn complex(scratch: &Scratch, count: usize) -> &mut [Complex32] {
    let parts = scratch.take::<f32>(2 * count);
    // SAFETY: a Complex32 is two f32, one after the other, and aligned as they are.
    unsafe { std::slice::from_raw_parts_mut(parts.as_mut_ptr().cast(), count) }
}

fn poisoned<T>(_: PoisonError<T>) -> Error {
    Error::Kernel("an earlier Fourier transform failed".into())
}

/// Copies a line of the view, whose elements are of type T.
fn gather<T: Copy>(view: &HostView, axis: usize, line: usize, into: &mut [T]) {
    let (start, stride) = (line_start(view, axis, line).cast::<T>(), view.strides[axis]);
    for (i, value) in into.iter_mut().enumerate() {
        // SAFETY: inside the view, which has been computed.
        *value = unsafe { start.wrapping_offset(i as isize * stride).read() };
    }
}

fn scatter<T: Copy>(view: &HostView, axis: usize, line: usize, from: &[T]) {
    let (start, stride) = (line_start(view, axis, line).cast::<T>(), view.strides[axis]);
    for (i, value) in from.iter().enumerate() {
        // SAFETY: inside the output; lines of different chunks are disjoint.
        unsafe { start.wrapping_offset(i as isize * stride).write(*value) };
    }
}
