//! Norms, rotary positions, attention, short convolution.

use half::bf16;

use super::dense::Dense;
use crate::Result;
use crate::backend::Step;
use crate::kv::{KvCodes, KvFormat, PAGE, PagedStep};
use crate::op::{AttentionSpec, ConvSpec, RopeSpec};
use crate::shape::size_of;

pub(super) fn rms_norm(eps: f32, x: &Dense, weight: &Dense) -> Dense {
    let (rows, width) = x.rows();
    let mut result = Vec::with_capacity(x.size());
    for row in 0..rows {
        let values: Vec<f64> = (0..width).map(|i| x.at(row * width + i)).collect();
        let scale = inverse_rms(&values, eps);
        result.extend(values.iter().enumerate().map(|(i, value)| value * scale * weight.at(i)));
    }
    Dense::floats(&x.shape, result)
}

fn inverse_rms(values: &[f64], eps: f32) -> f64 {
    1.0 / (values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64 + eps as f64).sqrt()
}

pub(super) fn rms_norm_vjp(eps: f32, inputs: &[Dense]) -> Vec<Dense> {
    let (x, weight, dy) = (&inputs[0], &inputs[1], &inputs[2]);
    let (rows, width) = x.rows();
    let mut dx = Vec::with_capacity(x.size());
    let mut dw = vec![0.0; width];
    for row in 0..rows {
        let values: Vec<f64> = (0..width).map(|i| x.at(row * width + i)).collect();
        let scale = inverse_rms(&values, eps);
        let ct: Vec<f64> = (0..width).map(|i| dy.at(row * width + i)).collect();
        let dot: f64 = (0..width).map(|i| ct[i] * weight.at(i) * values[i]).sum::<f64>() / width as f64;
        for i in 0..width {
            dx.push(scale * ct[i] * weight.at(i) - values[i] * scale.powi(3) * dot);
            dw[i] += ct[i] * values[i] * scale;
        }
    }
    vec![Dense::floats(&x.shape, dx), Dense::floats(&weight.shape, dw)]
}

pub(super) fn layer_norm(eps: f32, inputs: &[Dense]) -> Dense {
    let (x, weight, bias) = (&inputs[0], &inputs[1], &inputs[2]);
    let (rows, width) = x.rows();
    let mut result = Vec::with_capacity(x.size());
    for row in 0..rows {
        let values: Vec<f64> = (0..width).map(|i| x.at(row * width + i)).collect();
        let mean = values.iter().sum::<f64>() / width as f64;
        let centred: Vec<f64> = values.iter().map(|value| value - mean).collect();
        let scale = inverse_rms(&centred, eps);
        result.extend(centred.iter().enumerate().map(|(i, value)| value * scale * weight.at(i) + bias.at(i)));
    }
    Dense::floats(&x.shape, result)
}

/// x [batch, length, heads, head_dim], positions [batch, length], frequencies [dims / 2]. Angles
/// are formed in f32, as transformers does.
pub(super) fn rope(spec: &RopeSpec, inputs: &[Dense]) -> Dense {
    let (x, positions, frequencies) = (&inputs[0], &inputs[1], &inputs[2]);
    let (heads, head_dim) = (x.shape[2], x.shape[3]);
    let half = spec.dims / 2;
    let mut result = x.to_f64();
    for place in 0..positions.size() {
        for head in 0..heads {
            let base = (place * heads + head) * head_dim;
            for i in 0..half {
                let angle = (positions.at(place) as f32 * frequencies.at(i) as f32) as f64;
                let (sin, cos) = angle.sin_cos();
                let (sin, cos) = (sin * spec.scale as f64, cos * spec.scale as f64);
                let sin = if spec.inverse { -sin } else { sin };
                let (a, b) = if spec.traditional { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let (p, q) = (x.at(base + a), x.at(base + b));
                result[base + a] = p * cos - q * sin;
                result[base + b] = p * sin + q * cos;
            }
        }
    }
    Dense::floats(&x.shape, result)
}

/// The range of keys that a query sees.
fn visible(
    spec: &AttentionSpec,
    query: usize,
    (queries, keys): (usize, usize),
    start: usize,
) -> std::ops::Range<usize> {
    let own = query + keys - queries.min(keys);
    let end = if spec.causal { (own + 1).min(keys) } else { keys };
    let first = spec.window.map_or(0, |window| (own + 1).saturating_sub(window));
    first.max(start).min(end)..end
}

struct Heads<'a> {
    values: &'a [f64],
    length: usize,
    heads: usize,
    dim: usize,
}

impl Heads<'_> {
    fn offset(&self, batch: usize, place: usize, head: usize) -> usize {
        ((batch * self.length + place) * self.heads + head) * self.dim
    }

    fn row(&self, batch: usize, place: usize, head: usize) -> &[f64] {
        let at = self.offset(batch, place, head);
        &self.values[at..at + self.dim]
    }
}

fn heads<'a>(shape: &[usize], values: &'a [f64]) -> Heads<'a> {
    Heads { values, length: shape[1], heads: shape[2], dim: shape[3] }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// A score and its derivative by q·k·scale.
fn cap(softcap: Option<f32>, score: f64) -> (f64, f64) {
    match softcap {
        None => (score, 1.0),
        Some(cap) => {
            let tanh = (score / cap as f64).tanh();
            (cap as f64 * tanh, 1.0 - tanh * tanh)
        }
    }
}

/// Outputs: the result [batch, queries, heads, dim] and the log-sum-exp [batch, heads, queries].
pub(super) fn attention(spec: &AttentionSpec, inputs: &[Dense]) -> Vec<Dense> {
    let shape = &inputs[0].shape;
    let (batch, queries, count, keys) = (shape[0], shape[1], shape[2], inputs[1].shape[1]);
    let (q, k, v) = (inputs[0].to_f64(), inputs[1].to_f64(), inputs[2].to_f64());
    let (q, k, v) = (heads(shape, &q), heads(&inputs[1].shape, &k), heads(&inputs[2].shape, &v));
    let group = count / k.heads;
    let mut out = vec![0.0; size_of(shape)];
    let mut lse = vec![f64::NEG_INFINITY; batch * count * queries];
    for b in 0..batch {
        for t in 0..queries {
            let start = if spec.key_start { inputs[3].int(b * queries + t) as usize } else { 0 };
            let range = visible(spec, t, (queries, keys), start);
            for h in 0..count {
                let scores: Vec<f64> = range
                    .clone()
                    .map(|s| {
                        cap(spec.softcap, dot(q.row(b, t, h), k.row(b, s, h / group)) * spec.scale as f64).0
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
                if scores.is_empty() {
                    continue;
                }
                lse[(b * count + h) * queries + t] = top + sum.ln();
                let at = q.offset(b, t, h);
                for (s, score) in range.clone().zip(&scores) {
                    let weight = (score - top).exp() / sum;
                    for (slot, value) in out[at..at + q.dim].iter_mut().zip(v.row(b, s, h / group)) {
                        *slot += weight * value;
                    }
                }
            }
        }
    }
    vec![Dense::floats(shape, out), Dense::floats(&[batch, count, queries], lse)]
}

/// Inputs q, k, v, out, lse, dout, (key_start); outputs dq, dk, dv.
pub(super) fn attention_vjp(spec: &AttentionSpec, inputs: &[Dense]) -> Vec<Dense> {
    let (shape, kv_shape) = (&inputs[0].shape, &inputs[1].shape);
    let (batch, queries, count, keys) = (shape[0], shape[1], shape[2], kv_shape[1]);
    let data: Vec<Vec<f64>> = inputs[..6].iter().map(Dense::to_f64).collect();
    let (q, k, v) = (heads(shape, &data[0]), heads(kv_shape, &data[1]), heads(kv_shape, &data[2]));
    let (out, lse, dout) = (heads(shape, &data[3]), &data[4], heads(shape, &data[5]));
    let group = count / k.heads;
    let mut grads = [vec![0.0; size_of(shape)], vec![0.0; size_of(kv_shape)], vec![0.0; size_of(kv_shape)]];
    for b in 0..batch {
        for t in 0..queries {
            let start = if spec.key_start { inputs[6].int(b * queries + t) as usize } else { 0 };
            for h in 0..count {
                let delta = dot(out.row(b, t, h), dout.row(b, t, h));
                for s in visible(spec, t, (queries, keys), start) {
                    let raw = dot(q.row(b, t, h), k.row(b, s, h / group)) * spec.scale as f64;
                    let (score, slope) = cap(spec.softcap, raw);
                    let p = (score - lse[(b * count + h) * queries + t]).exp();
                    let ds = p
                        * (dot(dout.row(b, t, h), v.row(b, s, h / group)) - delta)
                        * slope
                        * spec.scale as f64;
                    let (at, kv) = (q.offset(b, t, h), k.offset(b, s, h / group));
                    for i in 0..q.dim {
                        grads[0][at + i] += ds * k.values[kv + i];
                        grads[1][kv + i] += ds * q.values[at + i];
                        grads[2][kv + i] += p * dout.values[at + i];
                    }
                }
            }
        }
    }
    let [dq, dk, dv] = grads;
    vec![Dense::floats(shape, dq), Dense::floats(kv_shape, dk), Dense::floats(kv_shape, dv)]
}

/// Appends k and v to the pages, then attends over them.
pub(super) fn paged_attention(paged: &PagedStep, step: &Step) -> Result<()> {
    let (q, k, v) =
        (Dense::load(&step.inputs[0])?, Dense::load(&step.inputs[1])?, Dense::load(&step.inputs[2])?);
    let (length, kv_heads, dim) = (k.shape[1], k.shape[2], k.shape[3]);
    let mut rows = Vec::new();
    for (row, (pages, start)) in paged.sequences.iter().enumerate() {
        for t in 0..length {
            let (keys, values) = pages[(start + t) / PAGE].layer(paged.layer)?;
            for h in 0..kv_heads {
                let from = ((row * length + t) * kv_heads + h) * dim;
                let to = h * PAGE + (start + t) % PAGE;
                for (page, array) in [(keys, &k), (values, &v)] {
                    let values: Vec<f32> = (from..from + dim).map(|i| array.at(i) as f32).collect();
                    // SAFETY: inside the page's [kv_heads, PAGE] rows; the token orders writers.
                    unsafe { put(page, to, paged.kv.format, &values) };
                }
            }
        }
        let total = start + length;
        let mut sides =
            [Vec::with_capacity(total * kv_heads * dim), Vec::with_capacity(total * kv_heads * dim)];
        for s in 0..total {
            let (keys, values) = pages[s / PAGE].layer(paged.layer)?;
            for h in 0..kv_heads {
                for (side, page) in sides.iter_mut().zip([keys, values]) {
                    // SAFETY: inside the page, and written before.
                    side.extend(unsafe { get(page, h * PAGE + s % PAGE, paged.kv.format, dim) });
                }
            }
        }
        let [keys, values] = sides;
        let per_row = length * q.shape[2] * dim;
        let queries = (0..per_row).map(|i| q.at(row * per_row + i)).collect();
        let spec = AttentionSpec {
            scale: paged.spec.scale,
            causal: true,
            window: paged.spec.window,
            softcap: paged.spec.softcap,
            key_start: false,
            precision: paged.spec.precision,
        };
        let shape = [1, total, kv_heads, dim];
        let inputs = [
            Dense::floats(&[1, length, q.shape[2], dim], queries),
            Dense::floats(&shape, keys),
            Dense::floats(&shape, values),
        ];
        rows.extend(attention(&spec, &inputs)[0].to_f64());
    }
    Dense::floats(&q.shape, rows).store(step.outputs[0].host()?)
}

/// Writes row `at` of a page as its format holds it; of codes first each group's scale and bias, then the codes.
///
/// # Safety
/// The row is inside the memory, which has room for rows of this length in this format.
unsafe fn put(page: *mut u8, at: usize, format: KvFormat, row: &[f32]) {
    // SAFETY: promised by the caller.
    unsafe {
        match format {
            KvFormat::F32 => page.cast::<f32>().add(at * row.len()).copy_from(row.as_ptr(), row.len()),
            KvFormat::Bf16 => {
                let to = page.cast::<bf16>().add(at * row.len());
                row.iter().enumerate().for_each(|(i, &x)| to.add(i).write(bf16::from_f32(x)));
            }
            KvFormat::Codes(codes) => {
                let place = CodedRow::new(page, at, codes, row.len());
                for (g, group) in row.chunks(codes.group()).enumerate() {
                    let mut found = vec![0; group.len()];
                    let (scale, bias) = codes.encode(group, &mut found);
                    place.ends.add(2 * g).write_unaligned(scale);
                    place.ends.add(2 * g + 1).write_unaligned(bias);
                    for (i, code) in (g * codes.group()..).zip(found) {
                        let (byte, shift) = place.place(i);
                        let mask = ((1u16 << codes.bits()) - 1) as u8;
                        byte.write(byte.read() & !(mask << shift) | code << shift);
                    }
                }
            }
        }
    }
}

/// Reads a row that [`put`] wrote.
///
/// # Safety
/// It wrote this row, of this length and format.
unsafe fn get(page: *mut u8, at: usize, format: KvFormat, dim: usize) -> Vec<f64> {
    // SAFETY: promised by the caller.
    unsafe {
        match format {
            KvFormat::F32 => (0..dim).map(|i| page.cast::<f32>().add(at * dim + i).read() as f64).collect(),
            KvFormat::Bf16 => {
                (0..dim).map(|i| page.cast::<bf16>().add(at * dim + i).read().to_f64()).collect()
            }
            KvFormat::Codes(codes) => {
                let place = CodedRow::new(page, at, codes, dim);
                let value = |i: usize| {
                    let ends = place.ends.add(i / codes.group() * 2);
                    let (byte, shift) = place.place(i);
                    let code = byte.read() >> shift & ((1u16 << codes.bits()) - 1) as u8;
                    let value = codes.decode(code, (ends.read_unaligned(), ends.add(1).read_unaligned()));
                    f64::from(value)
                };
                (0..dim).map(value).collect()
            }
        }
    }
}

/// Where a row of codes lies in a page.
struct CodedRow {
    ends: *mut bf16,
    codes: *mut u8,
    bits: usize,
}

impl CodedRow {
    fn new(page: *mut u8, at: usize, codes: KvCodes, dim: usize) -> CodedRow {
        let ends = codes.groups(dim) * 2 * std::mem::size_of::<bf16>();
        let row = page.wrapping_add(at * (ends + (dim * codes.bits()).div_ceil(8)));
        CodedRow { ends: row.cast(), codes: row.wrapping_add(ends), bits: codes.bits() }
    }

    /// The byte of a code, and how far it lies from its lowest bit.
    fn place(&self, i: usize) -> (*mut u8, usize) {
        (self.codes.wrapping_add(i * self.bits / 8), i * self.bits % 8)
    }
}

/// Where a tap of an output reads: a position of x, a place in the state, or nothing.
enum Tap {
    Input(usize),
    State(usize),
}

fn taps(place: usize, taps: usize, start: usize, state: bool) -> impl Iterator<Item = (usize, Tap)> {
    (0..taps).filter_map(move |tap| {
        let back = taps - 1 - tap;
        if place >= back + start {
            Some((tap, Tap::Input(place - back)))
        } else if state && start == 0 && place < back {
            Some((tap, Tap::State(taps - 1 + place - back)))
        } else {
            None
        }
    })
}

/// Outputs: y and the state after the last position.
pub(super) fn short_conv(spec: ConvSpec, inputs: &[Dense]) -> Vec<Dense> {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let (batch, length, channels, count) = (x.shape[0], x.shape[1], x.shape[2], weight.shape[1]);
    let state = spec.state.then(|| &inputs[2]);
    let starts = spec.starts.then(|| &inputs[2 + spec.state as usize]);
    let read = |b: usize, c: usize, tap: &Tap| match tap {
        Tap::Input(place) => x.at((b * length + place) * channels + c),
        Tap::State(place) => state.map_or(0.0, |state| state.at((b * (count - 1) + place) * channels + c)),
    };
    let mut y = Vec::with_capacity(x.size());
    let mut next = Vec::new();
    for b in 0..batch {
        for t in 0..length {
            let start = starts.map_or(0, |starts| starts.int(b * length + t) as usize);
            for c in 0..channels {
                let terms = taps(t, count, start, spec.state);
                y.push(terms.map(|(tap, from)| weight.at(c * count + tap) * read(b, c, &from)).sum());
            }
        }
        for place in 0..count - 1 {
            // The last count − 1 of (state, x).
            let at = length + place;
            for c in 0..channels {
                next.push(if at >= count - 1 {
                    read(b, c, &Tap::Input(at - (count - 1)))
                } else {
                    read(b, c, &Tap::State(at))
                });
            }
        }
    }
    vec![Dense::floats(&x.shape, y), Dense::floats(&[batch, count - 1, channels], next)]
}

/// Inputs x, weight, dy, (starts); outputs dx, dweight.
pub(super) fn short_conv_vjp(spec: ConvSpec, inputs: &[Dense]) -> Vec<Dense> {
    let (x, weight, dy) = (&inputs[0], &inputs[1], &inputs[2]);
    let (batch, length, channels, count) = (x.shape[0], x.shape[1], x.shape[2], weight.shape[1]);
    let (mut dx, mut dw) = (vec![0.0; x.size()], vec![0.0; weight.size()]);
    for b in 0..batch {
        for t in 0..length {
            let start = if spec.starts { inputs[3].int(b * length + t) as usize } else { 0 };
            for (tap, from) in taps(t, count, start, false) {
                let Tap::Input(place) = from else { continue };
                for c in 0..channels {
                    let ct = dy.at((b * length + t) * channels + c);
                    let at = (b * length + place) * channels + c;
                    dx[at] += weight.at(c * count + tap) * ct;
                    dw[c * count + tap] += x.at(at) * ct;
                }
            }
        }
    }
    vec![Dense::floats(&x.shape, dx), Dense::floats(&weight.shape, dw)]
}
