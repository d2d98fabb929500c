//! Laziness, memory and failure, through the public door.

use std::sync::Mutex;

use mica_array::{Array, Dtype, PackedWeight, Precision, async_eval, eval, memory};

/// Memory figures are the process's: tests that read them take turns.
static MEMORY: Mutex<()> = Mutex::new(());

#[test]
fn a_long_chain_neither_overflows_when_evaluated_nor_when_dropped() {
    let _turn = MEMORY.lock();
    let one = Array::ones(&[4], Dtype::F32);
    let mut x = one.clone();
    for _ in 0..300_000 {
        x = x.add(&one).unwrap();
    }
    assert_eq!(x.to_vec::<f32>().unwrap(), [300_001.0; 4]);
    let mut y = one.clone();
    for _ in 0..300_000 {
        y = y.add(&one).unwrap();
    }
    drop(y);
}

#[test]
fn a_chain_of_large_ops_needs_two_buffers() {
    let _turn = MEMORY.lock();
    let bytes = 1 << 22;
    let x = Array::from_slice(&vec![1.0f32; bytes / 4], &[bytes / 4]).unwrap();
    memory::reset_peak();
    let before = memory::active();
    let mut y = x.clone();
    for _ in 0..50 {
        y = y.multiply(1.5).unwrap().abs().unwrap();
    }
    y.eval().unwrap();
    let grown = memory::peak() - before;
    assert!(grown < bytes * 5 / 4, "the chain took {grown} bytes beside its input of {bytes}");
    drop(x);
}

#[test]
fn the_limit_is_an_error_and_nothing_is_lost() {
    let _turn = MEMORY.lock();
    memory::clear_cache();
    let limit = memory::set_limit(memory::active() + (64 << 20));
    let x = Array::zeros(&[1 << 23], Dtype::F32);
    let error = x.add(1.0).unwrap().concat_with_itself().eval().unwrap_err();
    memory::set_limit(limit);
    assert!(error.to_string().contains("limit"), "{error}");
    assert_eq!(Array::ones(&[3], Dtype::F32).to_vec::<f32>().unwrap(), [1.0; 3]);
}

trait Doubled {
    fn concat_with_itself(&self) -> Array;
}

impl Doubled for Array {
    fn concat_with_itself(&self) -> Array {
        Array::concatenate(&[self.clone(), self.clone(), self.clone()], 0).unwrap()
    }
}

#[test]
fn operators_report_their_place_once_evaluated() {
    let (a, b) = (Array::zeros(&[2], Dtype::F32), Array::zeros(&[3], Dtype::F32));
    let sum = &a + &b;
    let later = (&sum * 2.0).exp().unwrap_err();
    let error = sum.eval().unwrap_err().to_string();
    assert!(error.contains("[2]") && error.contains("[3]") && error.contains("evaluation.rs"), "{error}");
    assert_eq!(later.to_string(), error, "the first error is what later ops report");
}

#[test]
fn inputs_may_be_used_after_donation_was_possible() {
    let x = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3]).unwrap();
    let y = x.multiply(2.0).unwrap();
    let z = y.add(1.0).unwrap();
    let w = y.multiply(&y).unwrap();
    eval(&[z.clone(), w.clone()]).unwrap();
    assert_eq!(x.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(y.to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0]);
    assert_eq!(z.to_vec::<f32>().unwrap(), [3.0, 5.0, 7.0]);
    assert_eq!(w.to_vec::<f32>().unwrap(), [4.0, 16.0, 36.0]);
}

#[test]
fn products_of_the_same_rows_are_the_same_side_by_side() {
    // As in attention: what follows a product comes before the next product of the same rows.
    let values = |count: usize, seed: u32| -> Vec<f32> {
        (0..count as u32)
            .map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) % 1000) as f32 / 500.0 - 1.0)
            .collect()
    };
    let weights = [48, 16, 32].map(|out| {
        let plain = Array::from_slice(&values(out * 64, out as u32), &[out, 64]).unwrap();
        Array::from_packed(
            PackedWeight::quantize(&plain, mica_array::quantized::QuantSpec::affine(4, 64).unwrap()).unwrap(),
        )
    });
    let product = |x: &Array, i: usize| x.linear(&weights[i], None, Precision::Fast).unwrap();
    for rows in [1, 5] {
        let given = Array::from_slice(&values(rows * 64, 7), &[rows, 64]).unwrap();
        let doubled = || given.add(&given).unwrap();
        let alone = [0, 1, 2].map(|i| product(&doubled(), i).to_vec::<f32>().unwrap());
        let x = doubled();
        let sums = [0, 1, 2].map(|i| {
            let y = product(&x, i);
            y.add(&y).unwrap()
        });
        drop(x);
        eval(&sums).unwrap();
        for (sum, alone) in sums.iter().zip(&alone) {
            let expected: Vec<f32> = alone.iter().map(|y| y + y).collect();
            assert_eq!(sum.to_vec::<f32>().unwrap(), expected, "{rows} rows");
        }
    }
}

#[test]
fn views_of_views() {
    let values: Vec<i32> = (0..24).collect();
    let x = Array::from_slice(&values, &[2, 3, 4]).unwrap();
    let y = x.transpose(&[2, 0, 1]).unwrap().narrow(0, 1, 3).unwrap().reshape(&[4, 3]).unwrap();
    assert_eq!(y.to_vec::<i32>().unwrap(), [1, 5, 9, 13, 17, 21, 2, 6, 10, 14, 18, 22]);
    let z = x.window(&[1, 2, 3], &[2, 2, 2], &[-1, -1, -3]).unwrap();
    assert_eq!(z.to_vec::<i32>().unwrap(), [23, 20, 19, 16, 11, 8, 7, 4]);
    assert!(x.narrow(1, 3, 3).unwrap().to_vec::<i32>().unwrap().is_empty());
}

#[test]
fn arrays_can_be_evaluated_from_any_thread() {
    let x = Array::from_slice(&[0.5f32; 1000], &[1000]).unwrap();
    let sums: Vec<f32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|i| {
                let x = x.clone();
                scope.spawn(move || x.multiply(i).unwrap().sum(&[], false).unwrap().item::<f32>().unwrap())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(sums, (0..8).map(|i| 500.0 * i as f32).collect::<Vec<_>>());
}

#[test]
fn async_evaluation_hands_its_failure_to_the_reader() {
    let good = Array::ones(&[10], Dtype::F32).multiply(3.0).unwrap();
    let bad = (&Array::ones(&[2], Dtype::F32) + &Array::ones(&[3], Dtype::F32)).stop_gradient();
    async_eval(std::slice::from_ref(&good));
    assert_eq!(good.to_vec::<f32>().unwrap(), [3.0; 10]);
    assert!(bad.is_err());
}

#[test]
fn bad_calls_say_what_came() {
    let x = Array::zeros(&[2, 3], Dtype::F32);
    for (name, result, expected) in [
        ("reshape", x.reshape(&[4]), "[reshape]"),
        ("axis", x.sum(&[5], false), "out of range"),
        ("axis twice", x.sum(&[0, -2], false), "twice"),
        ("matmul", x.matmul(&x), "[matmul]"),
        ("float index", x.take(&x, 0), "integer"),
        ("negate bool", Array::zeros(&[1], Dtype::Bool).negative(), "number"),
        ("values", Array::from_slice(&[1.0f32], &[2]), "2 elements"),
        ("permutation", x.transpose(&[0, 0]), "permute"),
    ] {
        let error = result.expect_err(name).to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
}
