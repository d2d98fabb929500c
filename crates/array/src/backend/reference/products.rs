//! Products, and the output head with its loss.

use super::dense::Dense;
use crate::Result;
use crate::op::CrossEntropySpec;
use crate::shape::size_of;

pub(super) fn matmul(a: &Dense, b: &Dense, shape: &[usize]) -> Dense {
    let rank = shape.len();
    let (m, n, k) = (shape[rank - 2], shape[rank - 1], a.shape[rank - 1]);
    let mut result = Vec::with_capacity(size_of(shape));
    for batch in 0..shape[..rank - 2].iter().product() {
        for i in 0..m {
            for j in 0..n {
                result.push(
                    (0..k).map(|p| a.at((batch * m + i) * k + p) * b.at((batch * k + p) * n + j)).sum(),
                );
            }
        }
    }
    Dense::floats(shape, result)
}

/// x · wᵀ, or x · w when `transposed`.
pub(super) fn linear(x: &Dense, weight: &Dense, shape: &[usize], transposed: bool) -> Dense {
    let (rows, width) = x.rows();
    let (w, columns) = (weight.to_f64(), weight.shape[1]);
    let out = *shape.last().expect("a linear result has a last axis");
    let mut result = Vec::with_capacity(rows * out);
    for row in 0..rows {
        for j in 0..out {
            let at = |p: usize| if transposed { w[p * columns + j] } else { w[j * columns + p] };
            result.push((0..width).map(|p| x.at(row * width + p) * at(p)).sum());
        }
    }
    Dense::floats(shape, result)
}

/// Outputs: Σ −log p, log p per row, d hidden, d weight.
pub(super) fn linear_cross_entropy(spec: &CrossEntropySpec, inputs: &[Dense]) -> Result<Vec<Dense>> {
    let (hidden, weight, targets) = (&inputs[0], &inputs[1], &inputs[2]);
    let (rows, width) = hidden.rows();
    let (h, w, vocabulary) = (hidden.to_f64(), weight.to_f64(), weight.shape[0]);
    let cap = spec.softcap.map(f64::from);
    let (mut sum, mut logprobs) = (0.0, Vec::with_capacity(rows));
    let (mut dh, mut dw) = (vec![0.0; h.len()], vec![0.0; w.len()]);
    for row in 0..rows {
        let x = &h[row * width..(row + 1) * width];
        let raw: Vec<f64> =
            (0..vocabulary).map(|v| x.iter().zip(&w[v * width..]).map(|(a, b)| a * b).sum()).collect();
        let logits: Vec<f64> =
            raw.iter().map(|&z: &f64| cap.map_or(z, |cap| cap * (z / cap).tanh())).collect();
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = top + logits.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
        let target = targets.int(row) as usize;
        let logprob = logits[target] - lse;
        sum -= logprob;
        logprobs.push(logprob);
        for v in 0..vocabulary {
            let slope = cap.map_or(1.0, |cap| 1.0 - (logits[v] / cap).powi(2));
            let grad = ((logits[v] - lse).exp() - (v == target) as u8 as f64) * slope;
            for p in 0..width {
                dh[row * width + p] += grad * w[v * width + p];
                dw[v * width + p] += grad * x[p];
            }
        }
    }
    Ok(vec![
        Dense::floats(&[], vec![sum]),
        Dense::floats(&targets.shape, logprobs),
        Dense::floats(&hidden.shape, dh),
        Dense::floats(&weight.shape, dw),
    ])
}
