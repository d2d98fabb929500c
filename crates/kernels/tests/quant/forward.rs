//! y = x·wᵀ in each precision.

use mica_kernels::quant::{Epilogue, Precision, ProductPlan, ScaleType};
use mica_kernels::{View, ViewMut, gemm};
use mica_simd::Isa;
use mica_testkit::{Rng, assert_bits_eq, relative_l2};
use mica_threads::Pool;

use crate::cases::{BITS, GROUPS, SCALES, Weight, rows, run_forward};

/// Relative L2 error against f64 over the dequantized weight, on normal data.
///
/// Fast: a step of int8 is amax / 127; with amax about 2.5 standard deviations its rounding error
/// is 2.5 / 127 / √12 = 0.6 %. Bf16: two roundings of 2⁻⁹ / √3. Exact: sums in f32.
pub fn bound(precision: Precision) -> f64 {
    match precision {
        Precision::Fast => 0.012,
        Precision::Bf16 => 0.004,
        Precision::Exact => 2e-6,
    }
}

pub const PRECISIONS: [Precision; 3] = [Precision::Fast, Precision::Bf16, Precision::Exact];

#[test]
fn products_are_near_the_dequantized_product_at_every_tier() {
    let mut rng = Rng::new(21);
    let pool = Pool::new(2);
    for bits in BITS {
        for group in GROUPS {
            for scale in SCALES {
                let (out, inner) = (rng.range(1..90), group * rng.range(1..5));
                let weight = Weight::random(&mut rng, &pool, bits, group, scale, out, inner);
                for m in [1, rng.range(2..9), rng.range(9..40)] {
                    let x = rng.normals(m * inner);
                    let expected = weight.forward(&x);
                    for precision in PRECISIONS {
                        for &isa in Isa::available() {
                            let case = format!(
                                "{bits} bits, groups of {group}, {scale:?}, [{m}, {inner}] x [{out}, {inner}]ᵀ, {precision:?}, {isa}"
                            );
                            let y = run_forward(
                                &pool,
                                &weight.packed,
                                rows(&x, inner),
                                m,
                                precision,
                                Epilogue::none(),
                                isa,
                            );
                            let error = relative_l2(&y, &expected);
                            // Few outputs have errors above the average of many.
                            let few = 1.0 + 10.0 / ((m * out) as f64);
                            assert!(error <= bound(precision) * few, "{case}: error {error}");
                        }
                    }
                }
            }
        }
    }
}

/// The float product with the dequantized weight is the definition: same chain, same bits.
#[test]
fn exact_and_bf16_products_have_the_bits_of_the_float_product() {
    let mut rng = Rng::new(28);
    let pool = Pool::new(2);
    for (bits, group, out, inner, m) in [(4, 64, 50, 192, 7), (8, 32, 33, 1056, 70), (3, 128, 100, 640, 1)] {
        let weight = Weight::random(&mut rng, &pool, bits, group, ScaleType::F32, out, inner);
        // s·q + b in f64 rounds once to f32, as a fused multiply-add does: the product is exact.
        let dense: Vec<f32> = weight.exact.iter().map(|&value| value as f32).collect();
        let x = rng.normals(m * inner);
        for &isa in Isa::available() {
            for (precision, float) in
                [(Precision::Exact, gemm::Precision::Exact), (Precision::Bf16, gemm::Precision::Bf16)]
            {
                let y =
                    run_forward(&pool, &weight.packed, rows(&x, inner), m, precision, Epilogue::none(), isa);
                let mut expected = vec![f32::NAN; m * out];
                let spec = gemm::GemmSpec {
                    precision: float,
                    isa,
                    ..gemm::GemmSpec::new(
                        rows(&x, inner),
                        View::strided(&dense, 0, &[inner, out], &[1, inner as isize]).unwrap(),
                        ViewMut::new(&mut expected, &[m, out]).unwrap(),
                    )
                };
                gemm::Gemm::plan(&spec).unwrap().run(&pool).unwrap();
                assert_bits_eq(
                    &format!("{bits} bits, groups of {group}, {precision:?}, {isa}"),
                    &y,
                    &expected,
                );
            }
        }
    }
}

#[test]
fn int8_products_have_the_same_bits_at_every_tier() {
    let mut rng = Rng::new(22);
    let pool = Pool::new(2);
    for bits in BITS {
        for group in GROUPS {
            let (out, inner) = (rng.range(1..70), group * rng.range(1..4));
            let weight = Weight::random(&mut rng, &pool, bits, group, ScaleType::Bf16, out, inner);
            for m in [1, 3, 7, 17] {
                let x = rng.normals(m * inner);
                let run = |isa| {
                    run_forward(
                        &pool,
                        &weight.packed,
                        rows(&x, inner),
                        m,
                        Precision::Fast,
                        Epilogue::none(),
                        isa,
                    )
                };
                let expected = run(Isa::Scalar);
                for &isa in Isa::available() {
                    assert_bits_eq(
                        &format!("{bits} bits, groups of {group}, m {m}, {isa}"),
                        &run(isa),
                        &expected,
                    );
                }
            }
        }
    }
}

/// More rows than are multiplied before the next tile, and more than a chunk has: each as if it were alone.
#[test]
fn int8_products_of_many_rows_have_the_bits_of_one() {
    let mut rng = Rng::new(29);
    let pool = Pool::new(2);
    for (bits, out, inner, m) in [(4, 150, 4096, 131), (8, 40, 64, 1030), (3, 33, 128, 21)] {
        let weight = Weight::random(&mut rng, &pool, bits, 64, ScaleType::Bf16, out, inner);
        let x = rng.normals(m * inner);
        for &isa in Isa::available() {
            let run = |x: &[f32], m| {
                let none = Epilogue::none();
                run_forward(&pool, &weight.packed, rows(x, inner), m, Precision::Fast, none, isa)
            };
            let all = run(&x, m);
            for row in [0, 7, 8, 15, 16, m / 2, m - 3, m - 1] {
                let one = run(&x[row * inner..][..inner], 1);
                let case = format!("{bits} bits, row {row} of {m}, {isa}");
                assert_bits_eq(&case, &all[row * out..][..out], &one);
            }
        }
    }
}

/// Largest codes times largest activations: where a 16-bit intermediate would saturate.
#[test]
fn int8_products_do_not_saturate() {
    let pool = Pool::new(1);
    for bits in BITS {
        let inner = 128;
        let spec = mica_codec::QuantSpec::affine(bits, 128).unwrap();
        let words = vec![u32::MAX; 16 * spec.words(inner)];
        let (s, b) = (vec![1f32; 16], vec![0f32; 16]);
        let (s, b) = (mica_kernels::quant::Scales::F32(&s), mica_kernels::quant::Scales::F32(&b));
        let weight =
            mica_kernels::quant::QuantWeight::pack(&pool, spec, [16, inner], &words, s, Some(b)).unwrap();
        for (m, sign) in [(1, 1.0), (1, -1.0), (12, 1.0), (12, -1.0)] {
            let x = vec![sign * 127.0; m * inner];
            let expected = vec![sign * 127.0 * 128.0 * spec.largest() as f32; m * 16];
            for &isa in Isa::available() {
                let y =
                    run_forward(&pool, &weight, rows(&x, inner), m, Precision::Fast, Epilogue::none(), isa);
                assert_bits_eq(&format!("{bits} bits, m {m}, sign {sign}, {isa}"), &y, &expected);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_a_batch_on_any_number_of_threads() {
    let mut rng = Rng::new(23);
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    for &isa in Isa::available() {
        for bits in [3, 4, 8] {
            for precision in PRECISIONS {
                let (out, inner) = (rng.range(100..150), 192);
                let weight = Weight::random(&mut rng, &pools[0], bits, 64, ScaleType::Bf16, out, inner);
                let m = 37;
                let x = rng.normals(m * inner);
                let run = |pool: &Pool, x: &[f32]| {
                    run_forward(
                        pool,
                        &weight.packed,
                        rows(x, inner),
                        x.len() / inner,
                        precision,
                        Epilogue::none(),
                        isa,
                    )
                };
                let all = run(&pools[0], &x);
                for pool in &pools[1..] {
                    assert_bits_eq(
                        &format!("{isa}, {bits} bits, {precision:?}, threads"),
                        &run(pool, &x),
                        &all,
                    );
                }
                for count in (1..=20).chain([33]) {
                    let first = rng.range(0..m - count + 1);
                    let some = run(&pools[1], &x[first * inner..(first + count) * inner]);
                    let name = format!("{isa}, {bits} bits, {precision:?}, rows {first}..+{count}");
                    assert_bits_eq(&name, &some, &all[first * out..(first + count) * out]);
                }
            }
        }
    }
}

#[test]
fn epilogues_add_and_the_residual_may_be_the_output() {
    let mut rng = Rng::new(24);
    let pool = Pool::new(2);
    let (out, inner) = (45, 128);
    let weight = Weight::random(&mut rng, &pool, 4, 64, ScaleType::F16, out, inner);
    for &isa in Isa::available() {
        for precision in PRECISIONS {
            for m in [1, 5, 19] {
                let x = rng.normals(m * inner);
                let (bias, residual) = (rng.normals(out), rng.normals(m * out));
                let run = |epilogue| {
                    run_forward(&pool, &weight.packed, rows(&x, inner), m, precision, epilogue, isa)
                };
                let plain = run(Epilogue::none());
                let both = Epilogue {
                    bias: Some(View::new(&bias, &[out]).unwrap()),
                    residual: Some(View::new(&residual, &[m, out]).unwrap()),
                };
                let expected: Vec<f32> =
                    plain.iter().enumerate().map(|(i, y)| (y + bias[i % out]) + residual[i]).collect();
                assert_bits_eq(&format!("{isa}, {precision:?}, m {m}"), &run(both), &expected);

                let expected: Vec<f32> = plain.iter().zip(&residual).map(|(y, r)| y + r).collect();
                let mut aliased = residual.clone();
                let pointer = aliased.as_mut_ptr();
                // SAFETY: both views are of `aliased`, which outlives the tasks; aliasing is allowed.
                let (from, to) = unsafe {
                    let strides = [out as isize, 1];
                    (
                        View::from_raw(pointer, &[m, out], &strides),
                        ViewMut::from_raw(pointer, &[m, out], &strides),
                    )
                };
                let plan = weight
                    .packed
                    .plan_forward(rows(&x, inner), to, precision, Epilogue::residual(from), isa)
                    .unwrap();
                crate::cases::with_workspace(plan.workspace_bytes(), |workspace| {
                    let mut tasks = Vec::new();
                    // SAFETY: aligned and large enough.
                    unsafe { plan.tasks(workspace, &mut tasks) };
                    pool.run(&tasks).unwrap();
                });
                assert_bits_eq(&format!("{isa}, {precision:?}, m {m}, in place"), &aliased, &expected);
            }
        }
    }
}

#[test]
fn products_of_the_same_rows_are_one_with_the_same_bits() {
    let mut rng = Rng::new(25);
    let (inner, outs) = (128, [45, 16, 300]);
    let pool = Pool::new(3);
    let weights = [(4, 45), (8, 16), (4, 300)]
        .map(|(bits, out)| Weight::random(&mut rng, &pool, bits, 64, ScaleType::Bf16, out, inner));
    for &isa in Isa::available() {
        for m in [1, 4, 40, 530] {
            let x = rng.normals(m * inner);
            let mut results = outs.map(|out| vec![0f32; m * out]);
            let mut joined: Option<ProductPlan> = None;
            for (weight, y) in weights.iter().zip(&mut results) {
                let out = ViewMut::new(y, &[m, weight.packed.shape()[0]]).unwrap();
                let plan = weight
                    .packed
                    .plan_forward(rows(&x, inner), out, Precision::Fast, Epilogue::none(), isa)
                    .unwrap();
                match &mut joined {
                    None => joined = Some(plan),
                    Some(joined) => assert!(joined.join(plan).is_ok()),
                }
            }
            let joined = joined.unwrap();
            crate::cases::with_workspace(joined.workspace_bytes(), |workspace| {
                let mut tasks = Vec::new();
                // SAFETY: aligned and large enough.
                unsafe { joined.tasks(workspace, &mut tasks) };
                assert_eq!(tasks.len(), 2);
                pool.run(&tasks).unwrap();
            });
            for (weight, y) in weights.iter().zip(&results) {
                let (rows, none) = (rows(&x, inner), Epilogue::none());
                let alone = run_forward(&pool, &weight.packed, rows, m, Precision::Fast, none, isa);
                assert_bits_eq(&format!("{isa}, m {m}"), y, &alone);
            }
        }
    }
}

#[test]
fn products_of_other_rows_groups_or_precisions_stay_apart() {
    let mut rng = Rng::new(26);
    let (inner, out) = (128, 16);
    let pool = Pool::new(1);
    let [wide, narrow] =
        [64, 32].map(|group| Weight::random(&mut rng, &pool, 4, group, ScaleType::Bf16, out, inner));
    let (x, other) = (rng.normals(inner), rng.normals(inner));
    let mut y = vec![vec![0f32; out]; 5];
    let mut plans = y.iter_mut().zip([
        (&wide, &x, Precision::Fast),
        (&wide, &other, Precision::Fast),
        (&narrow, &x, Precision::Fast),
        (&wide, &x, Precision::Bf16),
        (&wide, &x, Precision::Fast),
    ]);
    let mut plans = std::iter::from_fn(|| {
        let (y, (weight, x, precision)) = plans.next()?;
        let out = ViewMut::new(y, &[1, out]).unwrap();
        Some(
            weight.packed.plan_forward(rows(x, inner), out, precision, Epilogue::none(), Isa::get()).unwrap(),
        )
    });
    let mut first = plans.next().unwrap();
    let joined: Vec<bool> = plans.map(|plan| first.join(plan).is_ok()).collect();
    assert_eq!(joined, [false, false, false, true]);
}

#[test]
fn strided_rows_and_outputs() {
    let mut rng = Rng::new(25);
    let pool = Pool::new(2);
    let (m, out, inner) = (11, 37, 64);
    let weight = Weight::random(&mut rng, &pool, 4, 32, ScaleType::Bf16, out, inner);
    let x = rng.normals(m * inner);
    let mut wide = vec![f32::NAN; m * (inner + 7)];
    for row in 0..m {
        wide[row * (inner + 7)..][..inner].copy_from_slice(&x[row * inner..][..inner]);
    }
    for &isa in Isa::available() {
        for precision in PRECISIONS {
            let expected =
                run_forward(&pool, &weight.packed, rows(&x, inner), m, precision, Epilogue::none(), isa);
            let mut y = vec![7f32; m * (out + 3)];
            let view = ViewMut::strided(&mut y, 0, &[m, out], &[(out + 3) as isize, 1]).unwrap();
            let from = View::strided(&wide, 0, &[m, inner], &[(inner + 7) as isize, 1]).unwrap();
            let plan = weight.packed.plan_forward(from, view, precision, Epilogue::none(), isa).unwrap();
            crate::cases::with_workspace(plan.workspace_bytes(), |workspace| {
                let mut tasks = Vec::new();
                // SAFETY: aligned and large enough.
                unsafe { plan.tasks(workspace, &mut tasks) };
                pool.run(&tasks).unwrap();
            });
            for (row, y) in y.chunks(out + 3).enumerate() {
                assert_bits_eq(
                    &format!("{isa}, {precision:?}, row {row}"),
                    &y[..out],
                    &expected[row * out..][..out],
                );
                assert_eq!(y[out..], [7.0; 3], "{isa}, {precision:?}, row {row}: the gap stays");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut rng = Rng::new(26);
    let pool = Pool::new(1);
    let weight = Weight::random(&mut rng, &pool, 4, 64, ScaleType::Bf16, 20, 128).packed;
    let data = [0f32; 4096];
    let plan = |x: &[usize], out: &[usize], epilogue| {
        let mut y = vec![0f32; 4096];
        let x = View::new(&data[..x.iter().product()], x).unwrap();
        let size = out.iter().product();
        let view = ViewMut::new(&mut y[..size], out).unwrap();
        weight.plan_forward(x, view, Precision::Fast, epilogue, Isa::Scalar).map(|_| ())
    };
    let view = |shape: &[usize]| View::new(&data[..shape.iter().product()], shape).unwrap();
    assert!(plan(&[2, 128], &[2, 20], Epilogue::none()).is_ok());
    assert!(plan(&[0, 128], &[0, 20], Epilogue::none()).is_ok());
    for (name, x, out, epilogue) in [
        ("columns of x", &[2, 64][..], &[2, 20][..], Epilogue::none()),
        ("rank of x", &[128], &[1, 20], Epilogue::none()),
        ("rows of the output", &[2, 128], &[3, 20], Epilogue::none()),
        ("columns of the output", &[2, 128], &[2, 21], Epilogue::none()),
        ("bias", &[2, 128], &[2, 20], Epilogue::bias(view(&[2]))),
        ("residual", &[2, 128], &[2, 20], Epilogue::residual(view(&[20]))),
    ] {
        assert!(plan(x, out, epilogue).is_err(), "{name}");
    }
}

#[test]
fn a_nan_in_a_row_stays_in_its_row() {
    let mut rng = Rng::new(27);
    let pool = Pool::new(2);
    let (out, inner) = (33, 128);
    let weight = Weight::random(&mut rng, &pool, 4, 64, ScaleType::Bf16, out, inner);
    for &isa in Isa::available() {
        for precision in PRECISIONS {
            for m in [4, 20] {
                let mut x = rng.normals(m * inner);
                x[2 * inner + 70] = f32::NAN;
                let y =
                    run_forward(&pool, &weight.packed, rows(&x, inner), m, precision, Epilogue::none(), isa);
                for (row, y) in y.chunks(out).enumerate() {
                    let all = y.iter().all(|y| y.is_nan() == (row == 2));
                    assert!(all, "{isa}, {precision:?}, m {m}, row {row}: {y:?}");
                }
            }
        }
    }
}
