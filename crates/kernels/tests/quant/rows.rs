//! Rows of a quantized weight as numbers.

use half::bf16;
use mica_kernels::quant::{Floats, ScaleType};
use mica_kernels::{View, ViewMut};
use mica_testkit::{Rng, assert_bits_eq};
use mica_threads::Pool;

use crate::cases::{BITS, GROUPS, SCALES, Weight};

#[test]
fn gathered_and_dequantized_rows_are_those_of_the_codec_or_exact_in_f32() {
    let mut rng = Rng::new(31);
    let pool = Pool::new(2);
    for bits in BITS {
        for group in GROUPS {
            for scale in SCALES {
                let (out, inner) = (rng.range(1..50), group * rng.range(1..4));
                let case = format!("{bits} bits, groups of {group}, {scale:?}, [{out}, {inner}]");
                let weight = Weight::random(&mut rng, &pool, bits, group, scale, out, inner);
                let mut all = vec![f32::NAN; out * inner];
                let view = Floats::F32(ViewMut::new(&mut all, &[out, inner]).unwrap());
                pool.run(&[weight.packed.dequantize(view).unwrap()]).unwrap();
                // As f32 out of half scales, q·s is exact and the sum rounds once.
                let expected = match scale {
                    ScaleType::F32 => weight.dequantized.clone(),
                    _ => weight.exact.iter().map(|&value| value as f32).collect(),
                };
                assert_bits_eq(&case, &all, &expected);

                let ids: Vec<u32> = (0..rng.range(0..40)).map(|_| rng.range(0..out) as u32).collect();
                let mut some = vec![bf16::NAN; ids.len() * inner];
                let view = Floats::Bf16(ViewMut::new(&mut some, &[ids.len(), inner]).unwrap());
                let ids_view = View::new(&ids, &[ids.len()]).unwrap();
                pool.run(&[weight.packed.gather_rows(ids_view, view).unwrap()]).unwrap();
                for (at, &id) in ids.iter().enumerate() {
                    let row = &weight.dequantized[id as usize * inner..][..inner];
                    let expected: Vec<bf16> = row.iter().map(|&value| bf16::from_f32(value)).collect();
                    assert_eq!(some[at * inner..][..inner], expected, "{case}, row {id}");
                }
            }
        }
    }
}

#[test]
fn outputs_that_do_not_fit_are_refused_and_ids_past_the_end_fail_the_task() {
    let mut rng = Rng::new(32);
    let pool = Pool::new(1);
    let weight = Weight::random(&mut rng, &pool, 4, 32, crate::cases::SCALES[1], 10, 32).packed;
    for (name, ids, rows, columns, fits, runs) in [
        ("fits", vec![0u32, 9], 2, 32, true, true),
        ("none", vec![], 0, 32, true, true),
        ("past the end", vec![0, 10], 2, 32, true, false),
        ("huge", vec![u32::MAX], 1, 32, true, false),
        ("rows", vec![1, 2], 1, 32, false, false),
        ("columns", vec![1], 1, 31, false, false),
    ] {
        let mut out = vec![0f32; rows * columns];
        let view = Floats::F32(ViewMut::new(&mut out, &[rows, columns]).unwrap());
        let ids = View::new(&ids, &[ids.len()]).unwrap();
        match weight.gather_rows(ids, view) {
            Ok(task) => {
                assert!(fits, "{name}");
                assert_eq!(pool.run(&[task]).is_ok(), runs, "{name}");
            }
            Err(_) => assert!(!fits, "{name}"),
        }
    }
}
