//! Compiled functions in which rows are reduced between elementwise ops.

use mica_array::transforms::{compile, jvp, vmap};
use mica_array::{Array, Dtype, Result, pending_ops};
use mica_testkit::Rng;

type Function = fn(&[Array]) -> Result<Vec<Array>>;

/// Of x [.., n] and w \[n\]; each becomes one region.
const FUNCTIONS: [(&str, Function); 6] = [
    ("RMS norm", |x| {
        let scale = (x[0].square()?.mean(&[-1], true)? + 1e-5).rsqrt()?;
        Ok(vec![&x[0] * scale * &x[1]])
    }),
    ("layer norm", |x| {
        let centred = &x[0] - x[0].mean(&[-1], true)?;
        let scale = (centred.square()?.mean(&[-1], true)? + 1e-5).rsqrt()?;
        Ok(vec![&centred * &scale * &x[1], scale])
    }),
    ("softmax by hand", |x| {
        let e = (&x[0] * &x[1] - x[0].max(&[-1], true)?).exp()?;
        Ok(vec![&e / e.sum(&[-1], true)?])
    }),
    ("weighted softmax", |x| Ok(vec![(&x[0] * 0.3).softmax(-1)? * &x[1], x[0].logsumexp(-1, true)? * 2.0])),
    ("a number a row", |x| Ok(vec![(&x[0] * &x[1]).tanh()?.sum(&[-1], true)? + 1.0])),
    ("a range of values", |x| {
        let (low, high) = (x[0].min(&[-1], true)?, x[0].max(&[-1], true)?);
        Ok(vec![(&x[0] - &low) / (&high - &low) * &x[1]])
    }),
];

fn random(shape: &[usize], dtype: Dtype, seed: u64) -> Array {
    let mut rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal()).collect();
    let array = Array::from_slice(&values, shape).unwrap().astype(dtype).unwrap();
    array.eval().unwrap();
    array
}

fn values(array: &Array) -> Vec<f64> {
    array.astype(Dtype::F64).unwrap().to_vec().unwrap()
}

fn assert_same(name: &str, got: &[Array], expected: &[Array]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!((got.shape(), got.dtype()), (expected.shape(), expected.dtype()), "{name}");
        let same = values(got).iter().zip(values(expected)).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{name}: {got:?}, expected {expected:?}");
    }
}

#[test]
fn each_is_one_region_of_the_same_bits() {
    for (name, f) in FUNCTIONS {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for shape in [&[6, 40][..], &[3, 2, 1500], &[17, 2], &[40], &[4, 16_384]] {
                let x = random(shape, dtype, 1);
                let inputs = [x.clone(), random(&shape[shape.len() - 1..], dtype, 2)];
                let got = compile(f).call(&inputs).unwrap();
                let name = format!("{name}, {dtype} {shape:?}");
                assert_eq!(pending_ops(&got), ["fused"], "{name}");
                assert_same(&name, &got, &f(&inputs).unwrap());
            }
        }
    }
}

#[test]
fn rows_of_any_length_and_number_use_one_trace() {
    for (name, f) in FUNCTIONS {
        let compiled = compile(f).shapeless();
        // Longer than rows that are fused when their length is known; a prime; equal to the number of rows.
        for (rows, length) in [(5, 40), (3, 7), (9, 20_000), (1013, 6), (2, 3)] {
            let inputs = [random(&[rows, length], Dtype::F32, 3), random(&[length], Dtype::F32, 4)];
            let name = format!("{name}, {rows} x {length}");
            assert_same(&name, &compiled.call(&inputs).unwrap(), &f(&inputs).unwrap());
        }
        assert_eq!(compiled.signatures(), 1, "{name}");
    }
}

#[test]
fn batches_and_tangents_go_through() {
    for (name, f) in FUNCTIONS {
        let compiled = compile(f);
        let (x, w) = (random(&[4, 6, 30], Dtype::F32, 5), random(&[4, 30], Dtype::F32, 6));
        for axes in [[Some(0), Some(0)], [Some(0), None], [None, Some(0)], [Some(1), Some(0)]] {
            let inputs = [
                match axes[0] {
                    Some(0) => x.clone(),
                    Some(_) => x.transpose(&[1, 0, 2]).unwrap(),
                    None => x.narrow(0, 0, 1).unwrap().squeeze(&[0]).unwrap(),
                },
                if axes[1].is_some() { w.clone() } else { w.narrow(0, 0, 1).unwrap().squeeze(&[0]).unwrap() },
            ];
            let outputs = vec![Some(0); f(&[x.clone(), w.narrow(0, 0, 1).unwrap()]).unwrap().len()];
            let got = vmap(|x| compiled.call(x), &inputs, &axes, &outputs).unwrap();
            let expected = vmap(f, &inputs, &axes, &outputs).unwrap();
            assert_same(&format!("vmap {axes:?} of {name}"), &got, &expected);
        }
        let inputs = [random(&[6, 30], Dtype::F32, 7), random(&[30], Dtype::F32, 8)];
        let tangents = [random(&[6, 30], Dtype::F32, 9), random(&[30], Dtype::F32, 10)];
        let through = jvp(|x| compiled.call(x), &inputs, &tangents).unwrap();
        let eager = jvp(f, &inputs, &tangents).unwrap();
        for (got, eager) in through.1.iter().zip(&eager.1) {
            for (got, eager) in values(got).iter().zip(values(eager)) {
                // Sums in another order.
                assert!(
                    (got - eager).abs() <= 2e-5 * (1.0 + eager.abs()),
                    "jvp of {name}: {got}, eager {eager}"
                );
            }
        }
    }
}

#[test]
fn outputs_that_nobody_reads_are_left_out() {
    let x = random(&[20, 50], Dtype::F32, 11);
    let f: Function = |x| {
        let e = (&x[0] - x[0].max(&[-1], true)?).exp()?;
        let sum = e.sum(&[-1], true)?;
        Ok(vec![&e / &sum, sum, e])
    };
    let expected = f(std::slice::from_ref(&x)).unwrap();
    let compiled = compile(f);
    for kept in 0..3 {
        let mut outputs = compiled.call(std::slice::from_ref(&x)).unwrap();
        let output = outputs.swap_remove(kept);
        drop(outputs);
        assert_same("one output", &[output], &expected[kept..=kept]);
    }
}

#[test]
fn memory_of_dead_inputs_is_reused_where_it_may_be() {
    // As many rows as a row is long: the result has the size of the weights, whose memory it must not take,
    // since all rows read them.
    for n in [24, 700] {
        let f: Function = |x| Ok(vec![(&x[0] * &x[1]).sum(&[-1], true)? * 2.0]);
        let compiled = compile(f);
        let inputs = || [random(&[n, n], Dtype::F32, 12), random(&[n], Dtype::F32, 13) * 1.0];
        let expected = f(&inputs()).unwrap();
        let [x, w] = inputs();
        let got = compiled.call(&[x, w]).unwrap();
        assert_same("weights", &got, &expected);
    }
    // In place: a row is read whole before it is written.
    let f: Function = |x| {
        let e = (&x[0] - x[0].max(&[-1], true)?).exp()?;
        Ok(vec![&e / e.sum(&[-1], true)?])
    };
    let compiled = compile(f);
    for shape in [[300, 40], [9, 5000]] {
        let start = || random(&shape, Dtype::F32, 14) * 2.0;
        let got = compiled.call(&[start()]).unwrap();
        assert_same("in place", &got, &f(&[start()]).unwrap());
    }
}
