//! Products that choose their matrices, the Hadamard transform, number formats.

use half::{bf16, f16};
use mica_codec::{QuantSpec, affine, micro, minifloat};

use super::dense::Dense;
use crate::backend::{HostView, Operand, Step};
use crate::op::CodecOp;
use crate::ops::products::hadamard_factor;
use crate::shape::size_of;
use crate::{Dtype, Error, Result};

/// Products of the matrices that indices name; the right ones are [n, k] if they are `turned`.
pub(super) fn gather_matmul(inputs: &[Dense], shape: &[usize], turned: bool) -> Result<Dense> {
    let (a, b, lhs, rhs) = (&inputs[0], &inputs[1], &inputs[2], &inputs[3]);
    let rank = shape.len();
    let (m, n, k) = (shape[rank - 2], shape[rank - 1], a.shape[2]);
    let index = |indices: &Dense, at: usize, count: usize| {
        let index = indices.int(at);
        if index < 0 || index >= count as i128 {
            return Err(Error::invalid("gather_mm", format!("index {index} of {count} matrices")));
        }
        Ok(index as usize)
    };
    let mut result = Vec::with_capacity(size_of(shape));
    for at in 0..lhs.size() {
        let (x, y) = (index(lhs, at, a.shape[0])?, index(rhs, at, b.shape[0])?);
        for i in 0..m * n {
            let right =
                |p: usize| b.at(if turned { (y * n + i % n) * k + p } else { (y * k + p) * n + i % n });
            let product = |p: usize| a.at((x * m + i / n) * k + p) * right(p);
            result.push((0..k).map(product).sum());
        }
    }
    Ok(Dense::floats(shape, result))
}

/// One product per segment of the inner dimension. What lies beyond its end does not count.
pub(super) fn segmented_matmul(inputs: &[Dense], shape: &[usize]) -> Dense {
    let (a, b, segments) = (&inputs[0], &inputs[1], &inputs[2]);
    let (m, k, n) = (a.shape[0], a.shape[1], b.shape[1]);
    let mut result = Vec::with_capacity(size_of(shape));
    for segment in 0..segments.size() / 2 {
        let (from, to) = (segments.int(2 * segment) as usize, segments.int(2 * segment + 1) as usize);
        for i in 0..m * n {
            let product = |p: usize| a.at(i / n * k + p) * b.at(p * n + i % n);
            result.push((from..to.min(k)).map(product).sum());
        }
    }
    Dense::floats(shape, result)
}

/// The factor's matrix over blocks, Sylvester's within them.
pub(super) fn hadamard(scale: f32, x: &Dense) -> Dense {
    let (rows, n) = x.rows();
    let (m, factor) = hadamard_factor(n).expect("the constructor checked the size");
    let power = n / m;
    let sign = |i: usize, j: usize| {
        let block = !factor.is_empty() && factor[i / power] >> (j / power) & 1 == 1;
        let inner = ((i % power) & (j % power)).count_ones() % 2 == 1;
        if block != inner { -1.0 } else { 1.0 }
    };
    let mut result = Vec::with_capacity(x.size());
    for row in 0..rows {
        for i in 0..n {
            let sum: f64 = (0..n).map(|j| sign(i, j) * x.at(row * n + j)).sum();
            result.push(sum * scale as f64);
        }
    }
    Dense::floats(&x.shape, result)
}

/// Elements of a contiguous operand.
///
/// # Safety
/// `T` is the view's element type, its memory is alive, and nobody writes it.
unsafe fn slice<T>(view: &HostView) -> &[T] {
    // SAFETY: promised by the caller; the constructors of these ops make operands contiguous.
    unsafe { std::slice::from_raw_parts(view.pointer.cast(), size_of(&view.shape)) }
}

/// Elements of a contiguous output.
///
/// # Safety
/// As [`slice`], and nobody else uses it.
#[allow(clippy::mut_from_ref)] // the memory is the evaluator's, the view only its address
unsafe fn slice_mut<T>(view: &HostView) -> &mut [T] {
    // SAFETY: promised by the caller; outputs are contiguous.
    unsafe { std::slice::from_raw_parts_mut(view.pointer.cast(), size_of(&view.shape)) }
}

/// Values that a piece of a codec step covers: whole groups of every format.
const PIECE: usize = 1 << 13;

/// How many pieces there are.
pub(in crate::backend) fn codec_pieces(op: CodecOp, step: &Step) -> usize {
    let values = match op {
        CodecOp::Quantize(_) => &step.inputs[0],
        _ => &step.outputs[0],
    };
    values.host().map_or(0, |view| size_of(&view.shape).div_ceil(PIECE))
}

/// One piece of a conversion. Pieces write disjoint places.
pub(in crate::backend) fn codec(op: CodecOp, step: &Step, piece: usize) -> Result<()> {
    let host = |operand: &Operand| operand.host().cloned();
    let (x, out) = (host(&step.inputs[0])?, host(&step.outputs[0])?);
    let part = |view: &HostView, values: usize, of: usize| {
        // `of` values of the whole take `values` elements of this view.
        let total = size_of(&view.shape);
        let (from, to) = (piece * PIECE / of * values, ((piece + 1) * PIECE / of * values).min(total));
        HostView {
            pointer: view.pointer.wrapping_add(from * view.dtype.size()),
            shape: [to.saturating_sub(from)][..].into(),
            strides: [1][..].into(),
            dtype: view.dtype,
        }
    };
    match op {
        CodecOp::ToFp8 => {
            let (x, out) = (part(&x, 1, 1), part(&out, 1, 1));
            // SAFETY: f32 and u8 of equal length; this piece's alone.
            let (x, out) = unsafe { (slice::<f32>(&x), slice_mut::<u8>(&out)) };
            out.iter_mut().zip(x).for_each(|(code, &value)| *code = minifloat::to_e4m3(value));
            Ok(())
        }
        CodecOp::FromFp8 => {
            let (x, out) = (part(&x, 1, 1), part(&out, 1, 1));
            // SAFETY: as above.
            let (x, out) = unsafe { (slice::<u8>(&x), slice_mut::<f32>(&out)) };
            out.iter_mut().zip(x).for_each(|(value, &code)| *value = minifloat::from_e4m3(code));
            Ok(())
        }
        CodecOp::Quantize(format) => {
            let (bits, group) = (format.bits(), format.group_size());
            let outputs: Vec<HostView> = step.outputs.iter().map(host).collect::<Result<_>>()?;
            let parts: Vec<HostView> = outputs
                .iter()
                .enumerate()
                .map(|(at, view)| if at == 0 { part(view, bits, 32) } else { part(view, 1, group) })
                .collect();
            quantize(format, &part(&x, 1, 1), global(&step.inputs[1..])?, &parts)
        }
        CodecOp::Dequantize(format) => {
            let (bits, group) = (format.bits(), format.group_size());
            let affine = format.mode().micro().is_none();
            let scales = part(&host(&step.inputs[1])?, 1, group);
            let biases = if affine { Some(part(&host(&step.inputs[2])?, 1, group)) } else { None };
            let global = global(&step.inputs[if affine { 3 } else { 2 }..])?;
            dequantize(format, &part(&x, bits, 32), &scales, biases.as_ref(), global, &part(&out, 1, 1))
        }
    }
}

fn global(rest: &[Operand]) -> Result<Option<f32>> {
    let Some(operand) = rest.first() else { return Ok(None) };
    // SAFETY: the constructor checked that it is one f32.
    Ok(Some(unsafe { operand.host()?.pointer.cast::<f32>().read_unaligned() }))
}

/// Runs `$body` with `$T` being the type of a float dtype of at most 32 bits.
macro_rules! with_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            Dtype::F32 => {
                type $T = f32;
                $body
            }
            Dtype::BF16 => {
                type $T = bf16;
                $body
            }
            Dtype::F16 => {
                type $T = f16;
                $body
            }
            other => return Err(Error::dtype("quantize", "float32, float16 or bfloat16", other)),
        }
    };
}

fn quantize(format: QuantSpec, x: &HostView, global: Option<f32>, outputs: &[HostView]) -> Result<()> {
    with_float!(x.dtype, T => {
        // SAFETY: the types are those that the constructor gave; outputs are this piece's alone.
        let (x, words) = unsafe { (slice::<T>(x), slice_mut::<u32>(&outputs[0])) };
        match format.mode().micro() {
            Some(mode) => {
                // SAFETY: as above.
                let scales = unsafe { slice_mut::<u8>(&outputs[1]) };
                Ok(micro::quantize(x, mode, global, words, scales)?)
            }
            None => {
                // SAFETY: as above.
                let (scales, biases) = unsafe { (slice_mut::<T>(&outputs[1]), slice_mut::<T>(&outputs[2])) };
                Ok(affine::quantize(x, x.len().max(1), format, words, scales, biases)?)
            }
        }
    })
}

fn dequantize(
    format: QuantSpec,
    words: &HostView,
    scales: &HostView,
    biases: Option<&HostView>,
    global: Option<f32>,
    out: &HostView,
) -> Result<()> {
    with_float!(out.dtype, T => {
        // SAFETY: the types are those that the constructor gave; the output is this piece's alone.
        let (words, out) = unsafe { (slice::<u32>(words), slice_mut::<T>(out)) };
        match (format.mode().micro(), biases) {
            (Some(mode), _) => {
                // SAFETY: as above.
                let scales = unsafe { slice::<u8>(scales) };
                Ok(micro::dequantize(words, scales, mode, global, out)?)
            }
            (None, Some(biases)) => {
                // SAFETY: as above; affine values have the dtype of their scales.
                let (scales, biases) = unsafe { (slice::<T>(scales), slice::<T>(biases)) };
                Ok(affine::dequantize(words, scales, biases, out.len().max(1), format, out)?)
            }
            (None, None) => Err(Error::Kernel("affine without biases".into())),
        }
    })
}
