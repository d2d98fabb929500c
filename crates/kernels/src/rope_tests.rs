use mica_testkit::{Golden, Rng, assert_bits_eq, assert_close, fixture};
use mica_threads::Pool;

use super::*;
use crate::testing::{Laid, Layout, layouts};

fn single(laid: &Laid) -> Vec<f32> {
    laid.values().into_iter().map(|v| v as f32).collect()
}

fn rotated(isa: Isa, x: &Laid, cos: &Laid, sin: &Laid, pairs: RopePairs, inverse: bool, out: &mut Laid) {
    let task = rope(isa, x.view(), cos.view(), sin.view(), pairs, inverse, out.view_mut()).unwrap();
    Pool::new(2).run(&[task]).unwrap();
    out.check_untouched_outside();
}

#[test]
fn goldens_from_transformers() {
    let golden = Golden::load(fixture("ops/rope.safetensors"));
    let index = std::fs::read_to_string(fixture("ops/rope.json")).unwrap();
    let names: Vec<String> =
        golden.names().filter_map(|n| n.strip_suffix(".inv_freq")).map(str::to_string).collect();
    assert!(names.len() > 5);
    let positions = Laid::contiguous(Dtype::I32, &[17], &golden.f64s("positions"));
    for name in names {
        let get = |part: &str, shape: &[usize]| {
            Laid::contiguous(Dtype::F32, shape, &golden.f64s(&format!("{name}.{part}")))
        };
        let half = golden.shape(&format!("{name}.inv_freq"))[0];
        let width = golden.shape(&format!("{name}.x"))[2];
        let entry = index.lines().find(|line| line.contains(&format!("\"name\": \"{name}\""))).unwrap();
        let factor = entry.split("\"attention_factor\": ").nth(1).unwrap();
        let factor: f32 = factor.split([',', '}']).next().unwrap().trim().parse().unwrap();
        let mut tables = [(); 2].map(|_| Laid::poisoned(Dtype::F32, &[17, half], Layout::Padded));
        let [cos, sin] = &mut tables;
        let inv_freq = get("inv_freq", &[half]);
        let each = Positions::Each(positions.view());
        let task = rope_table(each, inv_freq.view(), factor, cos.view_mut(), sin.view_mut()).unwrap();
        Pool::new(2).run(&[task]).unwrap();
        for (part, table) in [("cos", &*cos), ("sin", &*sin)] {
            table.check_untouched_outside();
            // Two units of the cosine and one rounding of the factor.
            let expected = single(&get(part, &[17, half]));
            assert_close(&format!("{name} {part}"), &single(table), &expected, 2e-7, 2e-7 * factor);
        }
        // The golden rotations use the exact product, so they get those tables.
        let (cos, sin) = (get("cos64", &[17, half]), get("sin64", &[17, half]));
        let x = get("x", &[17, 1, width]);
        for &isa in Isa::available() {
            for (part, pairs) in [("half", RopePairs::Halves), ("interleaved", RopePairs::Interleaved)] {
                let mut out = Laid::poisoned(Dtype::F32, &[17, 1, width], Layout::Contiguous);
                rotated(isa, &x, &cos, &sin, pairs, false, &mut out);
                let expected = single(&get(part, &[17, 1, width]));
                assert_close(&format!("{isa} {name} {part}"), &single(&out), &expected, 1e-6, 1e-6);
            }
        }
    }
}

#[test]
fn large_positions_are_accurate() {
    let inv_freq = Laid::contiguous(Dtype::F32, &[3], &[1.0, 0.31622776, 1e-4]);
    let start = 10_000_000;
    let [mut cos, mut sin] = [(); 2].map(|_| Laid::poisoned(Dtype::F32, &[40, 3], Layout::Contiguous));
    let table = rope_table(Positions::From(start), inv_freq.view(), 1.0, cos.view_mut(), sin.view_mut());
    Pool::new(1).run(&[table.unwrap()]).unwrap();
    for row in 0..40 {
        for i in 0..3 {
            let angle = (start + row as i64) as f32 * inv_freq.values()[i] as f32;
            // Two units in the last place.
            let name = format!("row {row} frequency {i}");
            let (c, s) = (cos.values()[row * 3 + i] as f32, sin.values()[row * 3 + i] as f32);
            assert_close(&name, &[c], &[(angle as f64).cos() as f32], 2.4e-7, 0.0);
            assert_close(&name, &[s], &[(angle as f64).sin() as f32], 2.4e-7, 0.0);
        }
    }
}

#[test]
fn odd_shapes_types_layouts_and_the_way_back() {
    let mut rng = Rng::new(1);
    let cases: [(&[usize], usize); 5] =
        [(&[2, 5, 3, 40], 17), (&[7, 1, 6], 3), (&[1, 130, 2, 64], 32), (&[3, 2, 9], 0), (&[0, 2, 8], 4)];
    for (shape, half) in cases {
        let rank = shape.len();
        let mut table_shape = shape[..rank - 1].to_vec();
        table_shape[rank - 2] = half;
        let angles = Laid::random(Dtype::F32, &table_shape, Layout::Contiguous, &mut rng).values();
        let cos: Vec<f64> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f64> = angles.iter().map(|a| a.sin()).collect();
        let (cosines, sines) = (cos.clone(), sin.clone());
        let (cos, sin) = (
            Laid::new(Dtype::F32, &table_shape, Layout::Padded, &cos),
            Laid::new(Dtype::F32, &table_shape, Layout::Contiguous, &sin),
        );
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for layout in layouts(shape) {
                let x = Laid::random(dtype, shape, layout, &mut rng);
                for pairs in [RopePairs::Halves, RopePairs::Interleaved] {
                    for &isa in Isa::available() {
                        let name = format!("{isa} {shape:?} {half} {dtype} {layout:?} {pairs:?}");
                        let mut out = Laid::poisoned(Dtype::F32, shape, layout);
                        rotated(isa, &x, &cos, &sin, pairs, false, &mut out);
                        let mut expected = x.values();
                        let (width, heads) = (shape[rank - 1], shape[rank - 2]);
                        for row in 0..expected.len() / width {
                            for i in 0..half {
                                let (c, s) = (cosines[row / heads * half + i], sines[row / heads * half + i]);
                                let (a, b) = match pairs {
                                    RopePairs::Halves => (i, i + half),
                                    RopePairs::Interleaved => (2 * i, 2 * i + 1),
                                };
                                let (x, y) = (expected[row * width + a], expected[row * width + b]);
                                expected[row * width + a] = x * c - y * s;
                                expected[row * width + b] = y * c + x * s;
                            }
                        }
                        let expected: Vec<f32> = expected.iter().map(|&v| v as f32).collect();
                        assert_close(&name, &single(&out), &expected, 1e-6, 1e-6);
                        // In place, backwards.
                        let task = rope(isa, out.view(), cos.view(), sin.view(), pairs, true, out.view_mut());
                        Pool::new(2).run(&[task.unwrap()]).unwrap();
                        assert_close(&format!("{name} back"), &single(&out), &single(&x), 2e-6, 2e-6);
                    }
                }
                let mut all = Laid::poisoned(dtype, shape, layout);
                let mut best = Laid::poisoned(dtype, shape, layout);
                rotated(Isa::Scalar, &x, &cos, &sin, RopePairs::Halves, false, &mut all);
                rotated(Isa::best(), &x, &cos, &sin, RopePairs::Halves, false, &mut best);
                assert_bits_eq("tiers", &single(&all), &single(&best));
            }
        }
    }
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let mut rng = Rng::new(2);
    let x = Laid::random(Dtype::F32, &[5, 2, 8], Layout::Contiguous, &mut rng);
    let mut out = Laid::poisoned(Dtype::F32, &[5, 2, 8], Layout::Contiguous);
    for shape in [&[4, 4][..], &[5, 5], &[5, 2, 4]] {
        let table = Laid::random(Dtype::F32, shape, Layout::Contiguous, &mut rng);
        let task =
            rope(Isa::best(), x.view(), table.view(), table.view(), RopePairs::Halves, false, out.view_mut());
        assert!(task.is_err(), "{shape:?}");
    }
}
