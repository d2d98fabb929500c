//! dx = dy·w in f32 and bf16.

use mica_kernels::quant::{Epilogue, Precision, ScaleType};
use mica_kernels::{View, ViewMut};
use mica_simd::Isa;
use mica_testkit::{Rng, assert_bits_eq, relative_l2};
use mica_threads::Pool;

use crate::cases::{BITS, GROUPS, Weight, rows, with_workspace};

pub fn run(pool: &Pool, weight: &Weight, dy: &[f32], precision: Precision, isa: Isa) -> Vec<f32> {
    let [out, inner] = weight.packed.shape();
    let m = dy.len() / out;
    let mut dx = vec![f32::NAN; m * inner];
    {
        let view = ViewMut::new(&mut dx, &[m, inner]).unwrap();
        let plan =
            weight.packed.plan_transposed(rows(dy, out), view, precision, Epilogue::none(), isa).unwrap();
        with_workspace(plan.workspace_bytes(), |workspace| {
            let mut tasks = Vec::new();
            // SAFETY: aligned, large enough, used by nothing else.
            unsafe { plan.tasks(workspace, &mut tasks) };
            pool.run(&tasks).unwrap();
        });
    }
    dx
}

pub fn expected(weight: &Weight, dy: &[f32]) -> Vec<f32> {
    let [out, inner] = weight.packed.shape();
    let mut dx = vec![0f64; dy.len() / out * inner];
    for (dx, dy) in dx.chunks_exact_mut(inner).zip(dy.chunks_exact(out)) {
        for (n, &dy) in dy.iter().enumerate() {
            for (dx, w) in dx.iter_mut().zip(&weight.exact[n * inner..]) {
                *dx += f64::from(dy) * w;
            }
        }
    }
    dx.into_iter().map(|value| value as f32).collect()
}

#[test]
fn transposed_products_are_near_the_dequantized_product_at_every_tier() {
    let mut rng = Rng::new(41);
    let pool = Pool::new(2);
    for bits in BITS {
        for group in GROUPS {
            let scale = *rng.choose(&[ScaleType::F32, ScaleType::Bf16, ScaleType::F16]);
            // Past one block of k (512 rows of the weight) now and then.
            let out = if rng.chance(0.3) { rng.range(500..1100) } else { rng.range(1..90) };
            let inner = group * rng.range(1..4);
            let weight = Weight::random(&mut rng, &pool, bits, group, scale, out, inner);
            for m in [1, rng.range(2..12), rng.range(12..40)] {
                let dy = rng.normals(m * out);
                let expected = expected(&weight, &dy);
                for (precision, bound) in [(Precision::Bf16, 0.004), (Precision::Exact, 4e-6)] {
                    for &isa in Isa::available() {
                        let dx = run(&pool, &weight, &dy, precision, isa);
                        let error = relative_l2(&dx, &expected);
                        let few = 1.0 + 10.0 / ((m * inner) as f64);
                        assert!(
                            error <= bound * few,
                            "{bits} bits, groups of {group}, {scale:?}, [{m}, {out}] x [{out}, {inner}], {precision:?}, {isa}: error {error}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_a_batch_on_any_number_of_threads() {
    let mut rng = Rng::new(42);
    let pools = [Pool::new(1), Pool::new(3)];
    for &isa in Isa::available() {
        for precision in [Precision::Bf16, Precision::Exact] {
            let out = 600;
            let weight = Weight::random(&mut rng, &pools[0], 4, 64, ScaleType::Bf16, out, 128);
            let m = 300;
            let dy = rng.normals(m * out);
            let all = run(&pools[0], &weight, &dy, precision, isa);
            assert_bits_eq(
                &format!("{isa}, {precision:?}, threads"),
                &run(&pools[1], &weight, &dy, precision, isa),
                &all,
            );
            for count in (1..=18).chain([33, 257]) {
                let first = rng.range(0..m - count + 1);
                let some = run(&pools[1], &weight, &dy[first * out..(first + count) * out], precision, isa);
                let name = format!("{isa}, {precision:?}, rows {first}..+{count}");
                assert_bits_eq(&name, &some, &all[first * 128..(first + count) * 128]);
            }
        }
    }
}

#[test]
fn int8_gradients_and_shapes_that_do_not_fit_are_refused() {
    let mut rng = Rng::new(43);
    let pool = Pool::new(1);
    let weight = Weight::random(&mut rng, &pool, 4, 64, ScaleType::Bf16, 64, 128).packed;
    let data = [0f32; 4096];
    let view = |shape: &[usize]| View::new(&data[..shape.iter().product()], shape).unwrap();
    let mut dx = vec![0f32; 256];
    let to = |shape: &[usize]| {
        // SAFETY: nothing is run.
        unsafe { ViewMut::from_raw(dx.as_ptr().cast_mut(), shape, &[shape[1] as isize, 1]) }
    };
    let plan = |dy: &[usize], dx: &[usize], precision| {
        weight.plan_transposed(view(dy), to(dx), precision, Epilogue::none(), Isa::Scalar).map(|_| ())
    };
    assert!(plan(&[2, 64], &[2, 128], Precision::Exact).is_ok());
    for (name, dy, out, precision) in [
        ("int8", [2, 64], [2, 128], Precision::Fast),
        ("columns", [2, 63], [2, 128], Precision::Exact),
        ("rows of the output", [2, 64], [1, 128], Precision::Exact),
        ("columns of the output", [2, 64], [2, 64], Precision::Exact),
    ] {
        assert!(plan(&dy, &out, precision).is_err(), "{name}");
    }
    dx.clear();
}
