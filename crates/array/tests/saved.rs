//! Arrays whose gradients are given a copy in a narrower dtype (`Array::saved_as`).

use std::slice::from_ref;

use mica_array::op::AttentionSpec;
use mica_array::transforms::{checkpoint, compile, grad, value_and_grad, vmap};
use mica_array::{Array, Dtype, Precision, Result, random};

fn numbers(shape: &[usize], seed: u64) -> Array {
    random::uniform(-2.0, 2.0, shape, Dtype::F32, &random::key(seed).unwrap()).unwrap()
}

fn bits(array: &Array) -> Vec<u32> {
    array.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn rounded(x: &Array) -> Array {
    x.astype(Dtype::BF16).unwrap().astype(Dtype::F32).unwrap()
}

fn assert_close(got: &Array, expected: &Array, bound: f32) {
    let (got, expected) = (got.to_vec::<f32>().unwrap(), expected.to_vec::<f32>().unwrap());
    let largest = expected.iter().fold(0.0f32, |top, value| top.max(value.abs()));
    for (got, expected) in got.iter().zip(&expected) {
        assert!((got - expected).abs() <= bound * largest, "{got} {expected}");
    }
}

/// Σ x³ by ops whose rules ask for x, its square and views of both.
fn cubes(x: &Array) -> Result<Array> {
    let square = x.multiply(x)?;
    square.reshape(&[-1])?.multiply(x.reshape(&[-1])?)?.sum(&[], false)
}

#[test]
fn values_stay_and_gradients_take_the_copy() {
    let x = numbers(&[5, 7], 1);
    let plain = value_and_grad(|x| cubes(&x[0]), from_ref(&x)).unwrap();
    let saved = value_and_grad(|x| cubes(&x[0].saved_as(Dtype::BF16)?), from_ref(&x)).unwrap();
    assert_eq!(bits(&saved.value), bits(&plain.value));
    // d(x² · x) = x² + 2x · x: the square has no copy, x has one.
    let (square, copy) = (x.multiply(&x).unwrap(), rounded(&x));
    let along = copy.multiply(&copy).unwrap();
    let expected = along.add(&along).unwrap().add(&square).unwrap();
    assert_close(&saved.grads[0], &expected, 1e-6);
    assert_ne!(bits(&saved.grads[0]), bits(&plain.grads[0]));
}

#[test]
fn the_copy_counts_for_whatever_reads_the_array() {
    let x = numbers(&[6], 2);
    // The product reads the array itself, the copy belongs to what is built from it.
    let beside = |x: &[Array]| {
        let saved = x[0].saved_as(Dtype::BF16)?;
        saved.add(x[0].multiply(&x[0])?)?.sum(&[], false)
    };
    let expected = rounded(&x).multiply(2.0).unwrap().add(1.0).unwrap();
    assert_close(&grad(beside, &[x]).unwrap()[0], &expected, 1e-6);
}

#[test]
fn outputs_of_attention_are_rounded_for_its_own_gradient() {
    let spec = AttentionSpec {
        scale: 0.3,
        causal: true,
        window: None,
        softcap: None,
        key_start: false,
        precision: Precision::Exact,
    };
    let inputs = [numbers(&[1, 9, 2, 8], 3), numbers(&[1, 9, 1, 8], 4), numbers(&[1, 9, 1, 8], 5)];
    let weights = numbers(&[1, 9, 2, 8], 6);
    let loss = |saved: bool| {
        let (weights, spec) = (weights.clone(), spec.clone());
        move |x: &[Array]| {
            let mut y = x[0].attention(&x[1], &x[2], None, spec)?;
            if saved {
                y = y.saved_as(Dtype::BF16)?;
            }
            y.multiply(&weights)?.sum(&[], false)
        }
    };
    let plain = value_and_grad(loss(false), &inputs).unwrap();
    let saved = value_and_grad(loss(true), &inputs).unwrap();
    assert_eq!(bits(&saved.value), bits(&plain.value));
    // The output stands in the gradients of q and k, and not in that of v.
    assert_eq!(bits(&saved.grads[2]), bits(&plain.grads[2]));
    for input in 0..2 {
        assert_ne!(bits(&saved.grads[input]), bits(&plain.grads[input]));
        assert_close(&saved.grads[input], &plain.grads[input], 0.01);
    }
}

#[test]
fn transformations_pass_through() {
    let x = numbers(&[4, 3], 7);
    let f = |x: &[Array]| Ok(vec![cubes(&x[0].saved_as(Dtype::BF16)?)?]);
    let expected = grad(|x| Ok(f(x)?.remove(0)), from_ref(&x)).unwrap();
    let kept = grad(|x| Ok(checkpoint(f, x)?.remove(0)), from_ref(&x)).unwrap();
    assert_eq!(bits(&kept[0]), bits(&expected[0]));
    let compiled = compile(f);
    let fused = grad(|x| Ok(compiled.call(x)?.remove(0)), from_ref(&x)).unwrap();
    assert_close(&fused[0], &expected[0], 1e-6);
    let each = |x: &[Array]| grad(|x| Ok(f(x)?.remove(0)), x);
    let mapped = vmap(each, &[x], &[Some(0)], &[Some(0)]).unwrap();
    assert_eq!(bits(&mapped[0]), bits(&expected[0]));
}

#[test]
fn what_can_not_be_narrower_stays() {
    let x = numbers(&[3], 8);
    let error = x.astype(Dtype::I32).unwrap().saved_as(Dtype::BF16).unwrap_err().to_string();
    assert!(error.contains("saved_as") && error.contains("int32"), "{error}");
    let error = x.saved_as(Dtype::I8).unwrap_err().to_string();
    assert!(error.contains("saved_as") && error.contains("int8"), "{error}");
    // Not narrower, or saved already: the gradient is that of the array, or of its one copy.
    let cubed = |f: fn(&Array) -> Result<Array>| grad(|x| cubes(&f(&x[0])?), from_ref(&x)).unwrap().remove(0);
    assert_eq!(bits(&cubed(|x| x.saved_as(Dtype::F32))), bits(&cubed(|x| Ok(x.clone()))));
    let once = cubed(|x| x.saved_as(Dtype::BF16));
    assert_eq!(bits(&cubed(|x| x.saved_as(Dtype::BF16)?.saved_as(Dtype::F16))), bits(&once));
}
