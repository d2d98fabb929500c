//! Rows of a quantized weight as numbers.

use half::bf16;
use mica_kernels::quant::Floats;
use mica_kernels::{View, ViewMut};
use mica_testkit::{Rng, assert_bits_eq};
use mica_threads::Pool;

use crate::cases::{BITS, GROUPS, SCALES, Weight};

#[test]
fn gathered_and_dequantized_rows_are_those_of_the_codec() {
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
                assert_bits_eq(&case, &all, &weight.dequantized);

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
fn ids_and_outputs_that_do_not_fit_are_refused() {
    let mut rng = Rng::new(32);
    let pool = Pool::new(1);
    let weight = Weight::random(&mut rng, &pool, 4, 32, crate::cases::SCALES[1], 10, 32).packed;
    for (name, ids, rows, columns, ok) in [
        ("fits", vec![0u32, 9], 2, 32, true),
        ("none", vec![], 0, 32, true),
        ("past the end", vec![10], 1, 32, false),
        ("huge", vec![u32::MAX], 1, 32, false),
        ("rows", vec![1, 2], 1, 32, false),
        ("columns", vec![1], 1, 31, false),
    ] {
        let mut out = vec![0f32; rows * columns];
        let view = Floats::F32(ViewMut::new(&mut out, &[rows, columns]).unwrap());
        let ids = View::new(&ids, &[ids.len()]).unwrap();
        assert_eq!(weight.gather_rows(ids, view).is_ok(), ok, "{name}");
    }
}
