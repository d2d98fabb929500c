//! The passes over a vocabulary: weights, thresholds and the largest few, without sorting it.

use super::Xtc;

/// Fills `weights` with exp(logit - max) and returns their sum.
///
/// Sixteen chains over blocks of 1024, joined in f64: one order of additions on every machine.
pub(super) fn weights(logits: &[f32], max: f32, weights: &mut Vec<f32>) -> f64 {
    weights.clear();
    weights.resize(logits.len(), 0.0);
    let mut total = 0.0f64;
    for (logits, weights) in logits.chunks(1024).zip(weights.chunks_mut(1024)) {
        let mut sums = [0.0f32; 16];
        for (logits, weights) in logits.chunks(16).zip(weights.chunks_mut(16)) {
            for ((&logit, weight), sum) in logits.iter().zip(weights).zip(&mut sums) {
                *weight = exp_of_negative(logit - max);
                *sum += *weight;
            }
        }
        total += sums.iter().map(|&sum| f64::from(sum)).sum::<f64>();
    }
    total
}

/// exp(x) for x ≤ 0, relative error below 3e-7, 0 below -87: branch-free, so that a loop over it is vectorised with
/// any instruction set and gives the same bits with all of them.
fn exp_of_negative(x: f32) -> f32 {
    let x_clamped = x.max(-87.0);
    // Adding and subtracting 1.5 · 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let n = (x_clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts, so that the remainder is exact.
    let r = x_clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    // Cephes' polynomial for exp on [-ln2/2, ln2/2].
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let y = p * r * r + r + 1.0;
    let scale = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { y * scale }
}

/// The smallest logit that top-p keeps: a token goes if those before it, from the most probable down, have a weight of
/// `wanted` or more. Equal logits stay or go together.
///
/// Tokens are counted into buckets of distance from the maximum; only the bucket in which `wanted` is reached is
/// sorted.
pub(super) fn top_p_threshold(logits: &[f32], weights: &[f32], max: f32, wanted: f64) -> f32 {
    const PER_UNIT: f32 = 32.0;
    const BUCKETS: usize = 2048;
    let bucket_of = |logit: f32| (((max - logit) * PER_UNIT) as usize).min(BUCKETS - 1);
    let mut masses = [0.0f64; BUCKETS];
    for (&logit, &weight) in logits.iter().zip(weights) {
        masses[bucket_of(logit)] += f64::from(weight);
    }
    let mut above = 0.0;
    let mut threshold = f32::NEG_INFINITY;
    for (bucket, &mass) in masses.iter().enumerate() {
        if above + mass < wanted {
            above += mass;
            continue;
        }
        let mut inside: Vec<f32> = logits.iter().copied().filter(|&l| bucket_of(l) == bucket).collect();
        inside.sort_unstable_by(|a, b| b.total_cmp(a));
        for logit in inside {
            if above >= wanted {
                return threshold;
            }
            above += f64::from(exp_of_negative(logit - max));
            threshold = logit;
        }
    }
    threshold
}

/// The `n`-th largest logit (1 is the largest), negative infinity if there are fewer.
pub(super) fn nth_largest(logits: &[f32], n: usize, order: &mut Vec<u32>) -> f32 {
    if n > logits.len() {
        return f32::NEG_INFINITY;
    }
    order.clear();
    order.extend(0..logits.len() as u32);
    let (_, &mut nth, _) =
        order.select_nth_unstable_by(n - 1, |&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    logits[nth as usize]
}

/// Leaves the `count` candidates with the largest logits, the lower id first among equals; stays ascending by id.
pub(super) fn keep_largest(candidates: &mut Vec<u32>, logits: &[f32], count: usize) {
    candidates.select_nth_unstable_by(count - 1, |&a, &b| {
        logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
    });
    candidates.truncate(count);
    candidates.sort_unstable();
}

/// Removes the candidates more probable than the least probable of those above the threshold.
pub(super) fn exclude_top_choices(candidates: &mut Vec<u32>, weights: &[f32], xtc: &Xtc) {
    let total: f64 = candidates.iter().map(|&id| f64::from(weights[id as usize])).sum();
    let probability = |id: u32| f64::from(weights[id as usize]) / total;
    let limit = candidates
        .iter()
        .map(|&id| probability(id))
        .filter(|&p| p > f64::from(xtc.threshold))
        .fold(f64::INFINITY, f64::min);
    candidates.retain(|&id| probability(id) <= limit || xtc.keep.contains(&id));
}

/// The ids of the `n` largest logits, largest first, the lower id first among equals; forbidden tokens never.
pub(super) fn top(logits: &[f32], n: usize) -> Vec<u32> {
    let mut top: Vec<u32> = Vec::with_capacity(n.min(logits.len()) + 1);
    if n == 0 {
        return top;
    }
    for (id, &logit) in logits.iter().enumerate() {
        let full = top.len() == n;
        if logit == f32::NEG_INFINITY || full && logit <= logits[top[n - 1] as usize] {
            continue;
        }
        let place = top.partition_point(|&other| logits[other as usize] >= logit);
        top.insert(place, id as u32);
        top.truncate(n);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_close_everywhere() {
        let mut worst = 0.0f64;
        for i in 0..200_000 {
            let x = -(i as f32) * 87.0 / 200_000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_of_negative(x)) - exact).abs() / exact);
        }
        assert!(worst < 3e-7, "{worst}");
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_of_negative(-1e30), 0.0);
    }

    #[test]
    fn top_lists_in_order_with_ties_by_id() {
        let logits = [1.0, 3.0, 3.0, f32::NEG_INFINITY, 2.0];
        assert!(top(&logits, 0).is_empty());
        assert_eq!(top(&logits, 1), [1]);
        assert_eq!(top(&logits, 3), [1, 2, 4]);
        assert_eq!(top(&logits, 9), [1, 2, 4, 0]);
    }
}
