use mica_testkit::{Golden, Rng, assert_bits_eq, assert_close, fixture};
use mica_threads::Pool;

use super::*;
use crate::dtype::Dtype;
use crate::plan::run_plan;
use crate::testing::{Laid, Layout, layouts};

struct Case {
    kind: Norm,
    shape: Vec<usize>,
    weight: bool,
    bias: bool,
    eps: f32,
}

/// y, dx, dweight, dbias in f64.
fn naive(case: &Case, x: &[f64], w: &[f64], b: &[f64], dy: &[f64]) -> [Vec<f64>; 4] {
    let n = *case.shape.last().unwrap();
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let (mut dw, mut db) = (vec![0.0; n], vec![0.0; n]);
    for start in (0..x.len()).step_by(n) {
        let row = &x[start..start + n];
        let mean = if case.kind == Norm::Rms { 0.0 } else { row.iter().sum::<f64>() / n as f64 };
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        let r = 1.0 / (variance + case.eps as f64).sqrt();
        let normal: Vec<f64> = row.iter().map(|v| (v - mean) * r).collect();
        let g: Vec<f64> = (0..n).map(|i| dy[start + i] * w[i]).collect();
        let sum = if case.kind == Norm::Rms { 0.0 } else { g.iter().sum::<f64>() / n as f64 };
        let product = (0..n).map(|i| g[i] * normal[i]).sum::<f64>() / n as f64;
        for i in 0..n {
            y[start + i] = normal[i] * w[i] + b[i];
            dx[start + i] = r * (g[i] - sum - normal[i] * product);
            dw[i] += dy[start + i] * normal[i];
            db[i] += dy[start + i];
        }
    }
    [y, dx, dw, db]
}

fn single(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|v| v as f32).collect()
}

#[test]
fn agrees_with_f64_on_every_tier_type_and_layout() {
    let pool = Pool::new(2);
    let mut rng = Rng::new(1);
    let shapes: [&[usize]; 6] = [&[3, 1], &[2, 3, 97], &[5, 48], &[130, 33], &[7], &[0, 8]];
    for (index, shape) in shapes.iter().enumerate() {
        for kind in [Norm::Rms, Norm::Layer] {
            for (weight, bias) in [(true, true), (true, false), (false, false)] {
                let case = Case {
                    kind,
                    shape: shape.to_vec(),
                    weight,
                    bias: bias && kind == Norm::Layer,
                    eps: 1e-5,
                };
                for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
                    let layout = layouts(shape)[index % 4];
                    let x = Laid::random(dtype, shape, layout, &mut rng);
                    let dy = Laid::random(dtype, shape, Layout::Padded, &mut rng);
                    let n = *shape.last().unwrap();
                    let w = Laid::random(dtype, &[n], Layout::Contiguous, &mut rng);
                    let b = Laid::random(Dtype::F32, &[n], Layout::Padded, &mut rng);
                    let ones = if case.weight { w.values() } else { vec![1.0; n] };
                    let zeros = if case.bias { b.values() } else { vec![0.0; n] };
                    let expected = naive(&case, &x.values(), &ones, &zeros, &dy.values()).map(single);
                    for &isa in Isa::available() {
                        let name = format!("{isa} {kind:?} {shape:?} {dtype} {layout:?} {weight} {bias}");
                        let mut out = [(); 2].map(|_| Laid::poisoned(Dtype::F32, shape, layout));
                        let mut sums = [(); 2].map(|_| Laid::poisoned(Dtype::F32, &[n], Layout::Padded));
                        let task = norm(
                            isa,
                            NormArgs {
                                kind,
                                x: x.view(),
                                weight: case.weight.then(|| w.view()),
                                bias: case.bias.then(|| b.view()),
                                eps: case.eps,
                                residual: None,
                                out: out[0].view_mut(),
                            },
                        );
                        pool.run(&[task.unwrap()]).unwrap();
                        let plan = norm_backward(
                            isa,
                            NormBackwardArgs {
                                kind,
                                x: x.view(),
                                weight: case.weight.then(|| w.view()),
                                eps: case.eps,
                                dy: dy.view(),
                                dx: out[1].view_mut(),
                                dweight: Some(sums[0].view_mut()),
                                dbias: (kind == Norm::Layer).then(|| sums[1].view_mut()),
                            },
                        );
                        run_plan(&pool, plan.unwrap());
                        // Sums of up to 130 terms in f32; 1/r reaches 300 where a row is constant.
                        let check = |i: usize, laid: &Laid| {
                            laid.check_untouched_outside();
                            assert_close(
                                &format!("{name} [{i}]"),
                                &single(laid.values()),
                                &expected[i],
                                2e-5,
                                2e-5,
                            );
                        };
                        check(0, &out[0]);
                        if n > 1 || kind == Norm::Rms {
                            check(1, &out[1]);
                        }
                        check(2, &sums[0]);
                        if kind == Norm::Layer {
                            check(3, &sums[1]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn goldens_from_torch() {
    let pool = Pool::new(2);
    let golden = Golden::load(fixture("ops/norms.safetensors"));
    let names: Vec<String> =
        golden.names().filter_map(|n| n.strip_suffix(".x")).map(str::to_string).collect();
    assert!(!names.is_empty());
    for name in names {
        let kind = if name.starts_with("rms") { Norm::Rms } else { Norm::Layer };
        let eps = if ["rms_97", "rms_plain", "layer_plain"].contains(&name.as_str()) { 1e-6 } else { 1e-5 };
        let get = |part: &str| {
            let key = format!("{name}.{part}");
            golden
                .contains(&key)
                .then(|| Laid::contiguous(Dtype::F32, golden.shape(&key), &golden.f64s(&key)))
        };
        let (x, dy, w, b) = (get("x").unwrap(), get("dy").unwrap(), get("weight"), get("bias"));
        let n = *x.shape.last().unwrap();
        for &isa in Isa::available() {
            let mut out = [(); 2].map(|_| Laid::poisoned(Dtype::F32, &x.shape, Layout::Contiguous));
            let mut sums = [(); 2].map(|_| Laid::poisoned(Dtype::F32, &[n], Layout::Contiguous));
            let args = NormArgs {
                kind,
                x: x.view(),
                weight: w.as_ref().map(Laid::view),
                bias: b.as_ref().map(Laid::view),
                eps,
                residual: None,
                out: out[0].view_mut(),
            };
            pool.run(&[norm(isa, args).unwrap()]).unwrap();
            let args = NormBackwardArgs {
                kind,
                x: x.view(),
                weight: w.as_ref().map(Laid::view),
                eps,
                dy: dy.view(),
                dx: out[1].view_mut(),
                dweight: w.as_ref().map(|_| sums[0].view_mut()),
                dbias: b.as_ref().map(|_| sums[1].view_mut()),
            };
            run_plan(&pool, norm_backward(isa, args).unwrap());
            for (part, laid) in [("y", &out[0]), ("dx", &out[1]), ("dweight", &sums[0]), ("dbias", &sums[1])]
            {
                let Some(expected) = get(part) else { continue };
                let expected = single(expected.values());
                // Both sides round in f32; the extremes' gradients cancel, hence the absolute part.
                let largest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
                assert_close(
                    &format!("{isa} {name} {part}"),
                    &single(laid.values()),
                    &expected,
                    1e-5,
                    3e-6 * largest,
                );
            }
        }
    }
}

#[test]
fn a_fused_residual_has_the_bits_of_two_steps() {
    let pool = Pool::new(3);
    let mut rng = Rng::new(3);
    let shape = [9, 75];
    for dtype in [Dtype::F32, Dtype::BF16] {
        let x = Laid::random(Dtype::F32, &shape, Layout::Padded, &mut rng);
        let r = Laid::random(Dtype::BF16, &shape, Layout::Contiguous, &mut rng);
        let w = Laid::random(Dtype::F32, &[75], Layout::Contiguous, &mut rng);
        let sum: Vec<f64> =
            x.values().iter().zip(r.values()).map(|(a, b)| (*a as f32 + b as f32) as f64).collect();
        let sum = Laid::contiguous(dtype, &shape, &sum);
        for &isa in Isa::available() {
            let args = |x: DynView, residual, out| NormArgs {
                kind: Norm::Rms,
                x,
                weight: Some(w.view()),
                bias: None,
                eps: 1e-6,
                residual,
                out,
            };
            let mut out = [(); 2].map(|_| Laid::poisoned(Dtype::F32, &shape, Layout::Contiguous));
            let mut stored = Laid::poisoned(dtype, &shape, Layout::Padded);
            let residual = Some((r.view(), stored.view_mut()));
            pool.run(&[norm(isa, args(x.view(), residual, out[0].view_mut())).unwrap()]).unwrap();
            pool.run(&[norm(isa, args(sum.view(), None, out[1].view_mut())).unwrap()]).unwrap();
            assert_bits_eq("sum", &single(stored.values()), &single(sum.values()));
            assert_bits_eq("norm", &single(out[0].values()), &single(out[1].values()));
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_other_rows() {
    let mut rng = Rng::new(4);
    let x = Laid::random(Dtype::F32, &[700, 64], Layout::Contiguous, &mut rng);
    let dy = Laid::random(Dtype::F32, &[700, 64], Layout::Contiguous, &mut rng);
    let mut results = Vec::new();
    for threads in [1, 2, 5] {
        let pool = Pool::new(threads);
        let mut dx = Laid::poisoned(Dtype::F32, &[700, 64], Layout::Contiguous);
        let mut dw = Laid::poisoned(Dtype::F32, &[64], Layout::Contiguous);
        let args = NormBackwardArgs {
            kind: Norm::Rms,
            x: x.view(),
            weight: None,
            eps: 1e-6,
            dy: dy.view(),
            dx: dx.view_mut(),
            dweight: Some(dw.view_mut()),
            dbias: None,
        };
        run_plan(&pool, norm_backward(Isa::best(), args).unwrap());
        results.push([single(dx.values()), single(dw.values())].concat());
    }
    assert_bits_eq("two threads", &results[1], &results[0]);
    assert_bits_eq("five threads", &results[2], &results[0]);
    let pool = Pool::new(2);
    let forward = |shape: &[usize], values: &[f64]| {
        let x = Laid::contiguous(Dtype::F32, shape, values);
        let mut out = Laid::poisoned(Dtype::F32, shape, Layout::Contiguous);
        let args = NormArgs {
            kind: Norm::Rms,
            x: x.view(),
            weight: None,
            bias: None,
            eps: 1e-6,
            residual: None,
            out: out.view_mut(),
        };
        pool.run(&[norm(Isa::best(), args).unwrap()]).unwrap();
        single(out.values())
    };
    let all = forward(&[700, 64], &x.values());
    let one = forward(&[1, 64], &x.values()[64 * 31..64 * 32]);
    assert_bits_eq("a row alone", &one, &all[64 * 31..64 * 32]);
}

#[test]
fn arrays_that_do_not_fit_are_refused() {
    let mut rng = Rng::new(5);
    let x = Laid::random(Dtype::F32, &[2, 8], Layout::Contiguous, &mut rng);
    let ints = Laid::random(Dtype::I32, &[2, 8], Layout::Contiguous, &mut rng);
    let w = Laid::random(Dtype::F32, &[7], Layout::Contiguous, &mut rng);
    let mut out = Laid::poisoned(Dtype::F32, &[2, 8], Layout::Contiguous);
    let mut check = |x: &Laid, weight: Option<&Laid>, bias: Option<&Laid>, message: &str| {
        let args = NormArgs {
            kind: Norm::Rms,
            x: x.view(),
            weight: weight.map(Laid::view),
            bias: bias.map(Laid::view),
            eps: 1e-6,
            residual: None,
            out: out.view_mut(),
        };
        let error = norm(Isa::best(), args).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    check(&x, Some(&w), None, "weight has shape [7], expected [8]");
    check(&ints, None, None, "x is int32, expected float32");
    check(&x, None, Some(&Laid::contiguous(Dtype::F32, &[8], &[0.0; 8])), "no bias");
}
