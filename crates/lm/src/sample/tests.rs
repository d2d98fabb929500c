//! Behaviour of the sampler, against a plain reading of mlx-lm's chain that sorts everything.

use super::*;
use crate::ErrorKind;
use proptest::prelude::*;

fn sampler(change: impl FnOnce(&mut SamplingParams)) -> Sampler {
    let mut params = SamplingParams::default();
    change(&mut params);
    Sampler::new(params).unwrap()
}

/// Seeded logits with many ties, as bf16 logits have.
fn logits(n: usize, seed: u64) -> Vec<f32> {
    (0..n)
        .map(|i| {
            let u = random::uniform(seed, i as u64, random::Stream::Token);
            let v = random::uniform(seed, i as u64, random::Stream::Accept);
            let normal = (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos();
            ((normal * 3.0 * 16.0).round() / 16.0) as f32
        })
        .collect()
}

/// The set of tokens that mlx-lm's filters leave, by sorting, with ties of top-k by id.
fn plain_filter(logits: &[f32], p: &SamplingParams) -> Vec<u32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight: Vec<f64> = logits.iter().map(|&l| f64::from(l - max).exp()).collect();
    let total: f64 = weight.iter().sum();
    let mut order: Vec<u32> =
        (0..logits.len() as u32).filter(|&i| logits[i as usize] > f32::NEG_INFINITY).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    if p.top_p > 0.0 && p.top_p < 1.0 {
        let mut above = 0.0;
        let mut threshold = max;
        for &id in &order {
            if above >= f64::from(p.top_p) * total {
                break;
            }
            above += weight[id as usize];
            threshold = logits[id as usize];
        }
        order.retain(|&id| logits[id as usize] >= threshold);
    }
    if p.min_p > 0.0 {
        let floor = max + p.min_p.ln();
        let kept = order.iter().take_while(|&&id| logits[id as usize] >= floor).count();
        order.truncate(kept.max(p.min_tokens_to_keep));
    }
    if p.top_k > 0 {
        order.truncate(p.top_k);
    }
    order.sort_unstable();
    order
}

#[test]
fn greedy_takes_the_first_of_equals() {
    let mut s = sampler(|p| p.top_k = 1);
    let out = s.sample(&mut [1.0, 5.0, 5.0, -1.0], &[], 0).unwrap();
    assert_eq!(out, Sampled { token: 1, logprob: None, top: vec![] });
}

#[test]
fn every_token_left_by_the_filters_comes_and_no_other() {
    let base = SamplingParams { temperature: 3.0, ..Default::default() };
    let cases: Vec<(&str, SamplingParams)> = vec![
        ("top_p", SamplingParams { top_p: 0.8, ..base.clone() }),
        ("top_p small", SamplingParams { top_p: 1e-6, ..base.clone() }),
        ("min_p", SamplingParams { min_p: 0.2, ..base.clone() }),
        ("min_p keeps some", SamplingParams { min_p: 0.99, min_tokens_to_keep: 5, ..base.clone() }),
        ("top_k", SamplingParams { top_k: 7, ..base.clone() }),
        ("top_k more than all", SamplingParams { top_k: 7000, min_p: 0.3, ..base.clone() }),
        ("all", SamplingParams { top_p: 0.9, min_p: 0.1, top_k: 9, ..base }),
    ];
    for (name, params) in cases {
        for seed in 0..4 {
            let logits = logits(64, seed);
            let allowed = plain_filter(&logits, &params);
            let mut s = Sampler::new(params.clone()).unwrap();
            let mut seen: Vec<u32> =
                (0..6000).map(|at| s.sample(&mut logits.clone(), &[], at).unwrap().token).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, allowed, "{name}, seed {seed}");
        }
    }
}

#[test]
fn frequencies_follow_the_temperature() {
    let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
    for temperature in [0.5f32, 1.0, 2.0] {
        let mut s = sampler(|p| p.temperature = temperature);
        let draws = 40_000;
        let mut counts = [0usize; 4];
        for at in 0..draws {
            counts[s.sample(&mut logits.to_vec(), &[], at).unwrap().token as usize] += 1;
        }
        let weights: Vec<f64> = logits.iter().map(|&l| f64::from(l / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (id, &count) in counts.iter().enumerate() {
            let p = weights[id] / total;
            let deviation = (draws as f64 * p * (1.0 - p)).sqrt();
            let off = (count as f64 - draws as f64 * p).abs();
            // Five standard deviations; the numbers are fixed by the seed, so this never flickers.
            assert!(off <= 5.0 * deviation, "temperature {temperature}, token {id}: {count}");
        }
    }
}

#[test]
fn the_draw_depends_on_seed_and_position_alone() {
    let logits = logits(1000, 3);
    let draw = |seed, position| {
        let mut s = sampler(|p| (p.temperature, p.seed) = (1.0, seed));
        s.sample(&mut logits.clone(), &[], position).unwrap().token
    };
    let mut long_lived = sampler(|p| (p.temperature, p.seed) = (1.0, 7));
    let backwards: Vec<u32> =
        (0..50).rev().map(|at| long_lived.sample(&mut logits.clone(), &[], at).unwrap().token).collect();
    let fresh: Vec<u32> = (0..50).rev().map(|at| draw(7, at)).collect();
    assert_eq!(backwards, fresh);
    assert_ne!(fresh, (0..50).rev().map(|at| draw(8, at)).collect::<Vec<_>>());
}

#[test]
fn penalties_follow_mlx_lm() {
    let start = vec![2.0f32, -2.0, 1.0, 0.5, 0.0];
    let cases: Vec<(&str, SamplingParams, &[u32], Vec<f32>)> = vec![
        (
            "repetition, each once, by sign",
            SamplingParams { repetition_penalty: 2.0, ..Default::default() },
            &[0, 1, 0, 0],
            vec![1.0, -4.0, 1.0, 0.5, 0.0],
        ),
        (
            "repetition, recent only",
            SamplingParams { repetition_penalty: 2.0, repetition_context: 1, ..Default::default() },
            &[0, 1],
            vec![2.0, -4.0, 1.0, 0.5, 0.0],
        ),
        (
            "zero is off, as in mlx-lm",
            SamplingParams { repetition_penalty: 0.0, ..Default::default() },
            &[0, 1],
            start.clone(),
        ),
        (
            "presence, once",
            SamplingParams { presence_penalty: 0.5, ..Default::default() },
            &[2, 2, 3],
            vec![2.0, -2.0, 0.5, 0.0, 0.0],
        ),
        (
            "frequency, every time",
            SamplingParams { frequency_penalty: 0.5, ..Default::default() },
            &[2, 2, 3],
            vec![2.0, -2.0, 0.0, 0.0, 0.0],
        ),
        (
            "bias before penalty",
            SamplingParams { logit_bias: vec![(1, 3.0)], repetition_penalty: 2.0, ..Default::default() },
            &[1],
            vec![2.0, 0.5, 1.0, 0.5, 0.0],
        ),
        (
            "ids that the model lacks are passed over in the history",
            SamplingParams { frequency_penalty: 0.5, ..Default::default() },
            &[77, 4],
            vec![2.0, -2.0, 1.0, 0.5, -0.5],
        ),
    ];
    for (name, params, history, expected) in cases {
        let mut logits = start.clone();
        Sampler::new(params).unwrap().sample(&mut logits, history, 0).unwrap();
        assert_eq!(logits, expected, "{name}");
    }
}

#[test]
fn log_probabilities_are_a_log_softmax() {
    for n in [1, 5, 1000, 20_000] {
        let logits = logits(n, 11);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exact = f64::from(max) + logits.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln();
        let mut s = sampler(|p| (p.temperature, p.top_p, p.top_logprobs) = (0.7, 0.5, 5));
        let out = s.sample(&mut logits.clone(), &[], 1).unwrap();
        let expected = |id: u32| f64::from(logits[id as usize]) - exact;
        // The weights are good to 3e-7 each, and the result is rounded to f32.
        assert!((f64::from(out.logprob.unwrap()) - expected(out.token)).abs() < 2e-6, "{n}");
        assert_eq!(out.top.len(), n.min(5));
        for pair in out.top.windows(2) {
            assert!(pair[0].1 >= pair[1].1);
        }
        for &(id, logprob) in &out.top {
            assert!((f64::from(logprob) - expected(id)).abs() < 2e-6, "{n}");
        }
    }
}

#[test]
fn xtc_leaves_the_least_of_the_top_choices() {
    let logits = [3.0f32, 2.5, 2.0, -4.0];
    let with = |probability, keep: Vec<u32>| {
        let mut s = sampler(|p| {
            p.temperature = 1.0;
            p.xtc = Some(Xtc { probability, threshold: 0.1, keep });
        });
        let mut seen: Vec<u32> =
            (0..3000).map(|at| s.sample(&mut logits.to_vec(), &[], at).unwrap().token).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    };
    assert_eq!(with(1.0, vec![]), [2, 3]);
    assert_eq!(with(1.0, vec![0]), [0, 2, 3]);
    assert_eq!(with(0.0, vec![]), [0, 1, 2, 3]);
}

#[test]
fn broken_input_is_an_error() {
    let bad = |change: fn(&mut SamplingParams), words: &str| {
        let mut params = SamplingParams::default();
        change(&mut params);
        let error = Sampler::new(params).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains(words), "{error}");
    };
    bad(|p| p.temperature = -1.0, "temperature");
    bad(|p| p.temperature = f32::NAN, "temperature");
    bad(|p| p.top_p = 1.5, "top_p");
    bad(|p| p.min_p = -0.1, "min_p");
    bad(|p| p.repetition_penalty = -1.0, "repetition_penalty");
    bad(|p| p.presence_penalty = f32::INFINITY, "presence_penalty");
    bad(|p| p.min_tokens_to_keep = 0, "min_tokens_to_keep");
    bad(|p| p.logit_bias = vec![(1, f32::NAN)], "logit_bias");
    for temperature in [0.0, 1.0] {
        for (name, mut logits) in [
            ("NaN", vec![1.0, f32::NAN, 2.0]),
            ("infinity", vec![1.0, f32::INFINITY]),
            ("nothing allowed", vec![f32::NEG_INFINITY; 3]),
            ("empty", vec![]),
        ] {
            let error = sampler(|p| p.temperature = temperature).sample(&mut logits, &[], 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadData, "{name}: {error}");
        }
    }
    let extreme: [(fn(&mut SamplingParams), f32, &str); 3] = [
        (|p| p.repetition_penalty = 1e-40, 1.0, "repetition_penalty 1e-40"),
        (|p| p.presence_penalty = f32::MIN, 1e38, "presence_penalty -3.4028235e38"),
        (|p| p.frequency_penalty = f32::MIN, 1e38, "frequency_penalty -3.4028235e38"),
    ];
    for (change, logit, words) in extreme {
        let error = sampler(change).sample(&mut [logit, 0.0], &[0], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    let mut s = sampler(|p| p.logit_bias = vec![(9, 1.0)]);
    assert_eq!(s.sample(&mut [0.0; 3], &[], 0).unwrap_err().kind(), ErrorKind::Usage);
    let mut s = sampler(|p| p.temperature = 1e-30);
    assert_eq!(s.sample(&mut [0.0, 1.0, 0.5], &[], 0).unwrap().token, 1, "a tiny temperature is greedy");
}

proptest! {
    #[test]
    fn a_draw_is_always_within_the_filters(
        seed in 0u64..1000, n in 1usize..3000, top_p in 0f32..1.0, min_p in 0f32..0.5, top_k in 0usize..50,
        temperature in 0.01f32..5.0,
    ) {
        let logits = logits(n, seed);
        let params = SamplingParams { temperature, top_p, min_p, top_k, seed, ..Default::default() };
        let allowed = plain_filter(&logits, &params);
        let mut s = Sampler::new(params).unwrap();
        for at in 0..20 {
            let token = s.sample(&mut logits.clone(), &[], at).unwrap().token;
            prop_assert!(allowed.contains(&token));
        }
    }
}
