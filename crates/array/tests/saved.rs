//! Arrays whose gradients are given a copy in a narrower dtype (`Array::saved_as`).

use std::slice::from_ref;

use mica_array::op::AttentionSpec;
use mica_array::transforms::{checkpoint, compile, grad, jvp, value_and_grad, vjp, vmap};
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
fn gradients_that_compare_or_order_take_the_array() {
    // In bf16 the three are one number.
    let x = Array::from_slice(&[1.0f32, 1.001, 1.0005], &[3]).unwrap();
    let weights = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3]).unwrap();
    let by = |f: &dyn Fn(&Array) -> Result<Array>| {
        let loss = |x: &[Array]| f(&x[0].saved_as(Dtype::BF16)?)?.multiply(&weights)?.sum(&[], false);
        grad(loss, from_ref(&x)).unwrap()[0].to_vec::<f32>().unwrap()
    };
    assert_eq!(by(&|x| x.max(&[], true)), [0.0, 6.0, 0.0]);
    assert_eq!(by(&|x| x.sort(-1)), [1.0, 3.0, 2.0]);
    assert_eq!(by(&|x| x.cummax(0, false, true)), [1.0, 5.0, 0.0]);
    assert_eq!(by(&|x| x.maximum(1.0002)), [0.0, 2.0, 3.0]);
    let rounded = |x: &Array| Ok(checkpoint(|x| Ok(vec![x[0].maximum(1.0002)?]), from_ref(x))?.remove(0));
    assert_eq!(by(&rounded), [0.0, 2.0, 3.0]);
    let fused = compile(|x| Ok(vec![x[0].maximum(1.0002)?.multiply(1.0)?]));
    assert_eq!(by(&|x| Ok(fused.call(from_ref(x))?.remove(0))), [0.0, 2.0, 3.0]);
}

#[test]
fn products_take_cotangents_of_any_dtype() {
    let (x, w) = (numbers(&[4, 3], 20), numbers(&[5, 3], 21));
    type Product = fn(&[Array]) -> Result<Vec<Array>>;
    let products: [Product; 4] = [
        |x| Ok(vec![x[0].linear(&x[1], None, Precision::Exact)?]),
        |x| Ok(vec![x[0].matmul(&x[1].transpose(&[])?)?]),
        |x| Ok(vec![x[0].saved_as(Dtype::BF16)?.linear(&x[1], None, Precision::Bf16)?]),
        |x| {
            let (x, w) = (x[0].saved_as(Dtype::BF16)?, x[1].saved_as(Dtype::BF16)?);
            Ok(vec![x.matmul(&w.transpose(&[])?)?])
        },
    ];
    for (index, product) in products.into_iter().enumerate() {
        let inputs = [x.clone(), w.clone()];
        let by = |dtype| {
            let seed = Array::full(&[4, 5], 2.0, dtype);
            vjp(product, &inputs, &[seed]).unwrap().1
        };
        let expected = by(Dtype::F32);
        for dtype in [Dtype::F64, Dtype::BF16, Dtype::F16, Dtype::I32] {
            for (got, expected) in by(dtype).iter().zip(&expected) {
                assert_eq!(got.dtype(), Dtype::F32, "{index}, {dtype}");
                assert_close(got, expected, 0.01);
            }
        }
    }
}

#[test]
fn gradients_of_gradients_and_tangents_of_gradients() {
    let (x, w) = (numbers(&[4, 3], 22), numbers(&[2, 3], 23));
    // Rows in bf16 by inputs with copies: neither operand of the weight's gradient was f32 to begin with.
    let loss = |saved: bool| {
        move |v: &[Array]| {
            let keep = |x: &Array| if saved { x.saved_as(Dtype::BF16) } else { Ok(x.clone()) };
            let y = keep(&v[0])?.linear(&v[1], None, Precision::Exact)?.tanh()?;
            keep(&y)?.astype(Dtype::BF16)?.astype(Dtype::F32)?.square()?.sum(&[], false)
        }
    };
    let inputs = [x, w];
    let second = |saved| {
        let first = move |v: &[Array]| {
            let grads = grad(loss(saved), v)?;
            grads[0].square()?.sum(&[], false)?.add(grads[1].square()?.sum(&[], false)?)
        };
        grad(first, &inputs).unwrap()
    };
    let along = |saved| {
        let tangents = inputs.clone().map(|input| input.ones_like());
        jvp(move |v| grad(loss(saved), v), &inputs, &tangents).unwrap().1
    };
    let each: [&dyn Fn(bool) -> Vec<Array>; 2] = [&second, &along];
    for derivatives in each {
        for (got, expected) in derivatives(true).iter().zip(&derivatives(false)) {
            assert_eq!((got.dtype(), got.shape()), (expected.dtype(), expected.shape()));
            assert_close(got, expected, 0.04);
        }
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
