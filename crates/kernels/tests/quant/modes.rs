//! Small floats and ggml's blocks in the same tiles.

use half::bf16;
use mica_codec::gguf::GgufBlock;
use mica_codec::micro::MicroMode;
use mica_kernels::gemm::{Gemm, GemmSpec};
use mica_kernels::quant::{Epilogue, Floats, Precision, QuantWeight, Stage};
use mica_kernels::{View, ViewMut, gemm};
use mica_simd::Isa;
use mica_testkit::{Rng, assert_bits_eq, relative_l2};
use mica_threads::Pool;

use crate::cases::{Weight, rows, run_forward};
use crate::forward::{PRECISIONS, bound};
use crate::transposed;

/// A weight of each mode and of each kind of block, with its name.
fn weights(rng: &mut Rng, pool: &Pool) -> Vec<(String, Weight)> {
    let mut all = Vec::new();
    for mode in [MicroMode::Mxfp4, MicroMode::Mxfp8, MicroMode::Nvfp4] {
        let (out, inner) = (rng.range(1..90), mode.group_size() * rng.range(1..9));
        let weight = Weight::micro(rng, pool, mode, out, inner);
        all.push((format!("{}, [{out}, {inner}]", mode.name()), weight));
    }
    // Groups of 16 that end within a line's block, past the first slab of k.
    all.push(("nvfp4, [20, 784]".to_string(), Weight::micro(rng, pool, MicroMode::Nvfp4, 20, 784)));
    for block in GgufBlock::ALL {
        let (out, inner) = (rng.range(1..90), block.values() * rng.range(1..5));
        let weight = Weight::gguf(rng, pool, block, out, inner);
        all.push((format!("{}, [{out}, {inner}]", block.name()), weight));
    }
    all
}

#[test]
fn products_are_near_the_dequantized_product_at_every_tier_in_both_directions() {
    let (mut rng, pool) = (Rng::new(51), Pool::new(2));
    for _ in 0..4 {
        for (name, weight) in weights(&mut rng, &pool) {
            let [out, inner] = weight.packed.shape();
            for m in [1, rng.range(2..9), rng.range(9..40)] {
                let (x, dy) = (rng.normals(m * inner), rng.normals(m * out));
                let (y, dx) = (weight.forward(&x), transposed::expected(&weight, &dy));
                for precision in PRECISIONS {
                    for &isa in Isa::available() {
                        let case = format!("{name}, {m} rows, {precision:?}, {isa}");
                        let rows = rows(&x, inner);
                        let got =
                            run_forward(&pool, &weight.packed, rows, m, precision, Epilogue::none(), isa);
                        // Rows of few groups differ in how their groups' magnitudes weigh.
                        let few = 1.5 + 10.0 / ((m * out) as f64);
                        let error = relative_l2(&got, &y);
                        assert!(error <= bound(precision) * few, "{case}: error {error}");
                        if precision != Precision::Fast {
                            let got = transposed::run(&pool, &weight, &dy, precision, isa);
                            let few = 1.5 + 10.0 / ((m * inner) as f64);
                            let error = relative_l2(&got, &dx);
                            assert!(error <= bound(precision) * few, "{case}, transposed: error {error}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bits_depend_neither_on_the_tier_nor_on_other_rows_nor_on_threads() {
    let (mut rng, pools) = (Rng::new(52), [Pool::new(1), Pool::new(3)]);
    for (name, weight) in weights(&mut rng, &pools[0]) {
        let [out, inner] = weight.packed.shape();
        let m = 37;
        let mut x = rng.normals(m * inner);
        // Some tiers take subnormal numbers for zero as they round to bf16.
        x.iter_mut().step_by(7).for_each(|x| *x *= 1e-39);
        for precision in PRECISIONS {
            let run = |pool, x: &[f32], isa| {
                let (m, rows) = (x.len() / inner, rows(x, inner));
                run_forward(pool, &weight.packed, rows, m, precision, Epilogue::none(), isa)
            };
            let scalar = run(&pools[0], &x, Isa::Scalar);
            for &isa in Isa::available() {
                let case = format!("{name}, {precision:?}, {isa}");
                let all = run(&pools[0], &x, isa);
                // Products of bf16 are formed in pairs on some tiers.
                if precision != Precision::Bf16 && (precision == Precision::Exact || !name.contains("mxfp8"))
                {
                    assert_bits_eq(&format!("{case} and scalar"), &all, &scalar);
                }
                assert_bits_eq(&format!("{case}, threads"), &run(&pools[1], &x, isa), &all);
                for count in (1..=20).chain([33]) {
                    let first = rng.range(0..m - count + 1);
                    let some = run(&pools[1], &x[first * inner..(first + count) * inner], isa);
                    let expected = &all[first * out..(first + count) * out];
                    assert_bits_eq(&format!("{case}, rows {first}..+{count}"), &some, expected);
                }
            }
        }
    }
}

#[test]
fn exact_and_bf16_products_have_the_bits_of_the_float_product() {
    let (mut rng, pool) = (Rng::new(53), Pool::new(2));
    for (name, weight) in weights(&mut rng, &pool) {
        let [out, inner] = weight.packed.shape();
        let m = 7;
        let x = rng.normals(m * inner);
        // Rounded once, as a fused multiply-add does.
        let dense: Vec<f32> = weight.exact.iter().map(|&value| value as f32).collect();
        for &isa in Isa::available() {
            for (precision, float) in
                [(Precision::Exact, gemm::Precision::Exact), (Precision::Bf16, gemm::Precision::Bf16)]
            {
                let none = Epilogue::none();
                let y = run_forward(&pool, &weight.packed, rows(&x, inner), m, precision, none, isa);
                let mut expected = vec![f32::NAN; m * out];
                let dense = View::strided(&dense, 0, &[inner, out], &[1, inner as isize]);
                let output = ViewMut::new(&mut expected, &[m, out]).unwrap();
                let spec = GemmSpec {
                    precision: float,
                    isa,
                    ..GemmSpec::new(rows(&x, inner), dense.unwrap(), output)
                };
                Gemm::plan(&spec).unwrap().run(&pool).unwrap();
                assert_bits_eq(&format!("{name}, {precision:?}, {isa}"), &y, &expected);
            }
        }
    }
}

#[test]
fn rows_are_the_codec_s_numbers() {
    let (mut rng, pool) = (Rng::new(54), Pool::new(2));
    for (name, weight) in weights(&mut rng, &pool) {
        let [out, inner] = weight.packed.shape();
        let mut all = vec![f32::NAN; out * inner];
        let view = Floats::F32(ViewMut::new(&mut all, &[out, inner]).unwrap());
        pool.run(&[weight.packed.dequantize(view).unwrap()]).unwrap();
        assert_eq!(all, weight.dequantized, "{name}");
        let values: Vec<f64> = (0..out).flat_map(|row| weight.packed.row_values(row)).collect();
        assert_eq!(values, weight.exact, "{name}");
        let ids: Vec<u32> = (0..20).map(|_| rng.range(0..out) as u32).collect();
        let mut some = vec![bf16::NAN; ids.len() * inner];
        let view = Floats::Bf16(ViewMut::new(&mut some, &[ids.len(), inner]).unwrap());
        let ids_view = View::new(&ids, &[ids.len()]).unwrap();
        pool.run(&[weight.packed.gather_rows(ids_view, view).unwrap()]).unwrap();
        for (row, &id) in some.chunks_exact(inner).zip(&ids) {
            let expected = &weight.dequantized[id as usize * inner..][..inner];
            // Affine values with scales of half precision are rounded to it on the way, as MLX's are.
            let halves = name.starts_with("Q4_1") || name.starts_with("Q5_1");
            let near = |a: bf16, b: f32| (a.to_f32() - b).abs() <= b.abs() / 128.0 + 1e-3;
            let same = |(a, &b): (&bf16, &f32)| *a == bf16::from_f32(b) || halves && near(*a, b);
            assert!(row.iter().zip(expected).all(same), "{name}, row {id}");
        }
    }
}

/// Eight-bit floats have no product of bytes: asked for fast they are bf16, and staged rows are refused.
#[test]
fn eight_bit_floats_are_multiplied_as_bf16() {
    let (mut rng, pool) = (Rng::new(55), Pool::new(2));
    let weight = Weight::micro(&mut rng, &pool, MicroMode::Mxfp8, 20, 64);
    let x = rng.normals(3 * 64);
    let run = |precision| {
        run_forward(&pool, &weight.packed, rows(&x, 64), 3, precision, Epilogue::none(), Isa::get())
    };
    assert_bits_eq("fast", &run(Precision::Fast), &run(Precision::Bf16));
    let stage = Stage::new(rows(&x, 64), 32, Isa::get()).unwrap();
    let mut y = vec![0f32; 60];
    crate::cases::with_workspace(stage.workspace_bytes(), |workspace| {
        // SAFETY: aligned, large enough, used by nothing else.
        let (_, staged) = unsafe { stage.bind(workspace) };
        let view = ViewMut::new(&mut y, &[3, 20]).unwrap();
        let error = weight.packed.product(&staged, view, Epilogue::none(), Isa::get()).err().unwrap();
        assert!(error.to_string().contains("8-bit floats"), "{error}");
    });
}

/// MLX's tensors of the same numbers, packed again.
#[test]
fn blocks_become_what_mlx_would_have() {
    let (mut rng, pool) = (Rng::new(56), Pool::new(2));
    for block in GgufBlock::ALL {
        let (out, inner) = (rng.range(1..50), block.values() * rng.range(1..4));
        let weight = Weight::gguf(&mut rng, &pool, block, out, inner);
        let Some(parts) = weight.packed.unpack() else {
            assert_eq!((block, weight.packed.spec()), (GgufBlock::Q6_K, None));
            continue;
        };
        let (spec, biases) = (weight.packed.spec().unwrap(), parts.biases.as_ref());
        let biases = biases.map(|biases| biases.as_scales());
        let again =
            QuantWeight::pack(&pool, spec, [out, inner], &parts.words, parts.scales.as_scales(), biases);
        let again = again.unwrap();
        for row in 0..out {
            assert_eq!(again.row_values(row), weight.packed.row_values(row), "{}, row {row}", block.name());
        }
    }
    let nothing = |_: std::ops::Range<usize>, _: &mut [u8]| Ok::<(), ()>(());
    for (block, shape) in [
        (GgufBlock::Q4_0, [4, 48]),
        (GgufBlock::Q4_K, [4, 128]),
        (GgufBlock::Q8_0, [4, 0]),
        (GgufBlock::Q8_0, [usize::MAX / 2, 64]),
    ] {
        assert!(QuantWeight::read_gguf(&pool, block, shape, nothing).is_err(), "{} {shape:?}", block.name());
    }
    let fail = |rows: std::ops::Range<usize>, _: &mut [u8]| Err(rows.start);
    assert_eq!(QuantWeight::read_gguf(&pool, GgufBlock::Q4_0, [4000, 256], fail).unwrap().unwrap_err(), 0);
}
