use mica_testkit::{Golden, Rng, assert_bits_eq, assert_close, fixture, max_abs_rel_to_max};
use mica_threads::Pool;

use super::super::forward::tests::{Case, golden_case};
use super::*;
use crate::plan::run_plan;
use crate::testing::{Laid, Layout};

fn single(laid: &Laid) -> Vec<f32> {
    laid.values().into_iter().map(|v| v as f32).collect()
}

/// dq, dk, dv and dsinks.
fn run(
    case: &Case,
    dout: &Laid,
    isa: Isa,
    pool: &Pool,
    precision: Precision,
    layout: Layout,
) -> [Vec<f32>; 4] {
    run_by(case, dout, (isa, pool, precision, layout), |plan| run_plan(pool, plan))
}

fn run_by(
    case: &Case,
    dout: &Laid,
    (isa, pool, precision, layout): (Isa, &Pool, Precision, Layout),
    by: impl FnOnce(Plan),
) -> [Vec<f32>; 4] {
    let (out, lse) = case.run(isa, pool, precision, layout);
    let wide = |values: &[f32]| values.iter().map(|&x| x as f64).collect::<Vec<_>>();
    let out = Laid::contiguous(Dtype::F32, &dout.shape, &wide(&out));
    let lse = Laid::contiguous(Dtype::F32, &dout.shape[..3], &wide(&lse));
    let [mut dq, mut dk, mut dv] =
        [&case.q, &case.k, &case.v].map(|laid| Laid::poisoned(Dtype::F32, &laid.shape, layout));
    let mut dsinks = Laid::poisoned(Dtype::F32, &[case.q.shape[1]], Layout::Padded);
    let args = AttentionBackwardArgs {
        q: case.q.view(),
        k: case.k.view(),
        v: case.v.view(),
        rule: case.rule.clone(),
        precision,
        out: out.view(),
        lse: lse.view(),
        dout: dout.view(),
        dq: Some(dq.view_mut()),
        dk: Some(dk.view_mut()),
        dv: Some(dv.view_mut()),
        dsinks: case.rule.sinks.as_ref().map(|_| dsinks.view_mut()),
    };
    by(attention_backward(isa, args).unwrap());
    for laid in [&dq, &dk, &dv, &dsinks] {
        laid.check_untouched_outside();
    }
    [single(&dq), single(&dk), single(&dv), single(&dsinks)]
}

#[test]
fn goldens_from_torch() {
    let pool = Pool::new(2);
    let golden = Golden::load(fixture("ops/attention.safetensors"));
    let index = std::fs::read_to_string(fixture("ops/attention.json")).unwrap();
    let mut seen = 0;
    for line in index.lines().filter(|line| line.contains("\"inputs\"")) {
        let (name, case) = golden_case(&golden, line);
        let inputs = line.split("\"inputs\": \"").nth(1).unwrap().split('"').next().unwrap();
        let key = format!("{inputs}.do");
        let dout = Laid::contiguous(Dtype::F32, golden.shape(&key), &golden.f64s(&key));
        for &isa in Isa::available() {
            for precision in [Precision::Exact, Precision::Bf16] {
                let got = run(&case, &dout, isa, &pool, precision, Layout::Contiguous);
                for (part, values) in ["dq", "dk", "dv", "dsinks"].into_iter().zip(&got) {
                    let key = format!("{name}.{part}");
                    if !golden.contains(&key) {
                        continue;
                    }
                    let expected = golden.f32s(&key);
                    let label = format!("{isa} {precision:?} {key}");
                    match precision {
                        Precision::Exact => assert_close(&label, values, &expected, 2e-5, 5e-6),
                        // bf16 operands, and a difference (dO·V - D) of values of order one. The
                        // gradients of sinks are sums that cancel.
                        // A window of one position has no gradient but that of its value.
                        _ if expected.iter().all(|x| x.abs() < 1e-6) => {
                            assert!(values.iter().all(|x| x.abs() < 2e-2), "{label}");
                        }
                        _ => {
                            let error = max_abs_rel_to_max(values, &expected);
                            assert!(error < 3e-2, "{label}: {error}");
                        }
                    }
                }
            }
        }
        seen += 1;
    }
    assert!(seen > 10);
}

/// The gradients in f64, from the definition, for rules without sinks and masks.
fn naive(case: &Case, dout: &Laid) -> [Vec<f32>; 3] {
    let [batch, heads, length, dim] = case.q.shape[..] else { panic!() };
    let (kv_heads, keys, value_dim) = (case.k.shape[1], case.k.shape[2], case.v.shape[3]);
    let (q, k, v, up) = (case.q.values(), case.k.values(), case.v.values(), dout.values());
    let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|x| vec![0.0; x.len()]);
    for b in 0..batch {
        for h in 0..heads {
            let unit = b * kv_heads + h / (heads / kv_heads);
            for l in 0..length {
                let row = (b * heads + h) * length + l;
                let position = keys as isize - length as isize + l as isize;
                let (low, high) = case.rule.range(b, l, position, keys);
                let scale = case.rule.scale as f64;
                let at = |x: &[f64], y: &[f64], i: usize, j: usize, n: usize| -> f64 {
                    (0..n).map(|d| x[i * n + d] * y[j * n + d]).sum()
                };
                let scores: Vec<f64> =
                    (low..high).map(|j| at(&q, &k, row, unit * keys + j, dim) * scale).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|s| (s - max).exp() / total).collect();
                let dp: Vec<f64> =
                    (low..high).map(|j| at(&up, &v, row, unit * keys + j, value_dim)).collect();
                let mean: f64 = p.iter().zip(&dp).map(|(a, b)| a * b).sum();
                for (i, j) in (low..high).enumerate() {
                    let key = unit * keys + j;
                    let ds = p[i] * (dp[i] - mean) * scale;
                    for d in 0..dim {
                        dq[row * dim + d] += ds * k[key * dim + d];
                        dk[key * dim + d] += ds * q[row * dim + d];
                    }
                    for d in 0..value_dim {
                        dv[key * value_dim + d] += p[i] * up[row * value_dim + d];
                    }
                }
            }
        }
    }
    [dq, dk, dv].map(|x| x.into_iter().map(|x| x as f32).collect())
}

#[test]
fn agrees_with_f64_on_odd_shapes_and_is_the_same_on_any_number_of_threads() {
    let mut rng = Rng::new(1);
    for [b, h, hk, l, s, d, dv] in [
        [2, 4, 2, 37, 37, 24, 24],
        [1, 6, 2, 70, 300, 33, 17],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 2, 1, 9, 4, 16, 40],
        [1, 4, 4, 130, 515, 128, 128],
        [1, 2, 1, 0, 3, 8, 8],
    ] {
        for (layout, window, ranges) in [
            (Layout::Contiguous, None, false),
            (Layout::Transposed, Some(21), false),
            (Layout::Padded, None, true),
        ] {
            let starts: Vec<f64> = (0..b * l).map(|i| (i % l.max(1) / 16 * 16) as f64).collect();
            let starts = Laid::contiguous(Dtype::I32, &[b, l], &starts);
            let mut case = Case {
                q: Laid::random(Dtype::F32, &[b, h, l, d], layout, &mut rng),
                k: Laid::random(Dtype::BF16, &[b, hk, s, d], layout, &mut rng),
                v: Laid::random(Dtype::F16, &[b, hk, s, dv], layout, &mut rng),
                rule: Rule { scale: 0.7 / (d as f32).sqrt(), causal: true, window, ..Rule::default() },
            };
            if ranges {
                let mut view = starts.view();
                view.strides = [l as isize, 1].as_slice().into();
                case.rule.key_start = Some(view);
            }
            let dout = Laid::random(Dtype::F32, &[b, h, l, dv], layout, &mut rng);
            let expected = naive(&case, &dout);
            for &isa in Isa::available() {
                for precision in [Precision::Exact, Precision::Bf16] {
                    let got = run(&case, &dout, isa, &Pool::new(1), precision, layout);
                    let again = run(&case, &dout, isa, &Pool::new(3), precision, Layout::Contiguous);
                    for i in 0..3 {
                        let name =
                            format!("{isa} {precision:?} {:?} {layout:?} [{i}]", [b, h, hk, l, s, d, dv]);
                        assert_bits_eq(&format!("{name} threads"), &again[i], &got[i]);
                        let error = max_abs_rel_to_max(&got[i], &expected[i]);
                        // A lone key has gradients of zero, formed as a difference.
                        if expected[i].iter().all(|x| x.abs() < 1e-6) {
                            assert!(got[i].iter().all(|x| x.abs() < 2e-2), "{name}");
                            continue;
                        }
                        let bound = if precision == Precision::Exact { 5e-6 } else { 2e-2 };
                        assert!(error < bound, "{name}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn scratch_is_what_was_said() {
    let mut rng = Rng::new(3);
    for [b, h, hk, l, d, dv] in [[2, 4, 2, 200, 24, 40], [1, 4, 2, 150, 128, 128], [1, 3, 1, 100, 80, 80]] {
        let mut laid = |shape: &[usize]| Laid::random(Dtype::F32, shape, Layout::Contiguous, &mut rng);
        let (q, k, v) = (laid(&[b, h, l, d]), laid(&[b, hk, l, d]), laid(&[b, hk, l, dv]));
        let dout = laid(&[b, h, l, dv]);
        let case = Case { q, k, v, rule: Rule { scale: 0.1, causal: true, ..Rule::default() } };
        for &isa in Isa::available() {
            for precision in [Precision::Exact, Precision::Bf16] {
                let (said, chunks) = backward_scratch(isa, precision, [b, h, hk, l], [d, dv]);
                let how = (isa, &Pool::new(1), precision, Layout::Contiguous);
                run_by(&case, &dout, how, |plan| {
                    let mut list = Vec::new();
                    // SAFETY: without sinks nothing is written to the workspace.
                    unsafe { plan.tasks(std::ptr::null_mut(), &mut list) };
                    assert_eq!((list.len(), list[0].chunks()), (1, chunks));
                    let mut scratch = Scratch::new();
                    for chunk in 0..chunks {
                        list[0].run(chunk, &mut scratch);
                        let taken = scratch.taken();
                        // Slices begin at multiples of 64 bytes.
                        let name = format!("{isa} {precision:?} {:?}: {taken}", [b, h, hk, l, d, dv]);
                        assert!((said..said + said / 50 + 24 * 64).contains(&taken), "{name} of {said}");
                        scratch.reset();
                    }
                });
            }
        }
    }
}
