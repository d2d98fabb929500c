//! `vmap` against a loop: every op of the table, every choice of batched inputs, every axis; and
//! nested with the other transformations.

use mica_array::op::Precision;
use mica_array::transforms::{checkpoint, compile, custom_function, grad, jvp, vjp, vmap};
use mica_array::{Array, Dtype, PackedWeight, Result, eval, random};

use cases::ops::op_cases;

mod cases;

const EXAMPLES: usize = 3;

fn values(array: &Array) -> Vec<f64> {
    array.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap()
}

fn in_f32(array: &Array) -> Array {
    let array = if array.dtype() == Dtype::F64 { array.astype(Dtype::F32).unwrap() } else { array.clone() };
    array.eval().unwrap();
    array
}

/// Other inputs like these: floats a little larger, the others in another order.
fn examples(input: &Array) -> Vec<Array> {
    (0..EXAMPLES)
        .map(|example| {
            let other = if input.dtype().is_inexact() {
                input.multiply(1.0 + 0.1 * example as f64).unwrap()
            } else {
                let size = input.size().max(1) as i32;
                let order: Vec<i32> = (0..input.size() as i32).map(|i| (i + example as i32) % size).collect();
                let order = Array::from_slice(&order, &[input.size()]).unwrap();
                let shape: Vec<i64> = input.shape().iter().map(|&size| size as i64).collect();
                input.flatten().unwrap().take(&order, 0).unwrap().reshape(&shape).unwrap()
            };
            other.eval().unwrap();
            other
        })
        .collect()
}

fn check_close(name: &str, got: &Array, expected: &Array, tolerance: f64) {
    assert_eq!(got.shape(), expected.shape(), "{name}");
    assert_eq!(got.dtype(), expected.dtype(), "{name}");
    let (got, expected) = (values(got), values(expected));
    let finite = expected.iter().filter(|value| value.is_finite());
    let largest = finite.fold(1.0f64, |top, value| top.max(value.abs()));
    for (place, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let close = got == expected
            || (got.is_nan() && expected.is_nan())
            || (got - expected).abs() <= tolerance * largest;
        assert!(close, "{name}: element {place}: {got}, a loop gives {expected}");
    }
}

/// Compares vmap(f) with a loop over the examples, for one choice of axes.
fn check(
    name: &str,
    f: &dyn Fn(&[Array]) -> Result<Vec<Array>>,
    shared: &[Array],
    batched: &[Option<(Vec<Array>, usize)>],
    out_axis: i32,
) {
    let fail = |error: mica_array::Error| -> ! { panic!("{name}: {error}") };
    let inputs: Vec<Array> = shared
        .iter()
        .zip(batched)
        .map(|(shared, batched)| match batched {
            Some((examples, axis)) => Array::stack(examples, *axis as i32).unwrap(),
            None => shared.clone(),
        })
        .collect();
    let axes: Vec<Option<i32>> = batched.iter().map(|b| b.as_ref().map(|(_, axis)| *axis as i32)).collect();
    let mapped = vmap(f, &inputs, &axes, &[Some(out_axis)]).unwrap_or_else(|error| fail(error));
    let looped: Vec<Vec<Array>> = (0..EXAMPLES)
        .map(|example| {
            let of = |(shared, batched): (&Array, &Option<(Vec<Array>, usize)>)| match batched {
                Some((examples, _)) => examples[example].clone(),
                None => shared.clone(),
            };
            let inputs: Vec<Array> = shared.iter().zip(batched).map(of).collect();
            f(&inputs).unwrap_or_else(|error| fail(error))
        })
        .collect();
    eval(&mapped).unwrap_or_else(|error| fail(error));
    for (output, mapped) in mapped.iter().enumerate() {
        let each: Vec<Array> = looped.iter().map(|outputs| outputs[output].clone()).collect();
        check_close(name, mapped, &Array::stack(&each, out_axis).unwrap(), 2e-5);
    }
}

/// All choices of which inputs have a batch, along all axes.
fn check_all(name: &str, f: &dyn Fn(&[Array]) -> Result<Vec<Array>>, inputs: &[Array]) {
    let other: Vec<Vec<Array>> = inputs.iter().map(examples).collect();
    for choice in 1..1usize << inputs.len() {
        let highest = inputs.iter().map(Array::rank).max().unwrap_or(0);
        for axis in 0..=highest {
            let batched: Vec<Option<(Vec<Array>, usize)>> = inputs
                .iter()
                .enumerate()
                .map(|(index, input)| {
                    (choice >> index & 1 == 1).then(|| (other[index].clone(), axis.min(input.rank())))
                })
                .collect();
            let out_axis = if axis % 2 == 0 { 0 } else { -1 };
            check(&format!("{name}, inputs {choice:b}, axis {axis}"), f, inputs, &batched, out_axis);
        }
    }
}

#[test]
fn every_op_equals_a_loop() {
    for case in op_cases() {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        check_all(case.name, &case.f, &inputs);
    }
}

/// f(x) with random weights, a number.
fn projected(f: fn(&[Array]) -> Result<Vec<Array>>, x: &[Array]) -> Result<Array> {
    let mut sum = Array::zeros(&[], Dtype::F32);
    for (index, output) in f(x)?.iter().enumerate().filter(|(_, output)| output.dtype().is_inexact()) {
        let weights = cases::random(output.shape(), output.dtype(), 300 + index as u64);
        sum = sum.add(output.multiply(weights)?.astype(Dtype::F32)?.sum(&[], false)?)?;
    }
    Ok(sum)
}

#[test]
fn gradients_per_example() {
    for case in op_cases().iter().filter(|case| case.differentiable) {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        let gradient = |x: &[Array]| grad(|y| projected(case.f, y), x);
        for choice in [1, (1 << inputs.len()) - 1] {
            let batched: Vec<Option<(Vec<Array>, usize)>> = inputs
                .iter()
                .enumerate()
                .map(|(index, input)| (choice >> index & 1 == 1).then(|| (examples(input), 0)))
                .collect();
            check(&format!("vmap(grad({})), inputs {choice:b}", case.name), &gradient, &inputs, &batched, 0);
        }
    }
}

#[test]
fn tangents_per_example_and_tangents_of_batches() {
    for case in op_cases().iter().filter(|case| case.differentiable) {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        let all: Vec<Option<(Vec<Array>, usize)>> =
            inputs.iter().map(|input| Some((examples(input), 0))).collect();
        let tangents = |x: &[Array]| -> Result<Vec<Array>> {
            let along: Vec<Array> = x.iter().map(Array::ones_like).collect();
            Ok(jvp(case.f, x, &along)?.1)
        };
        check(&format!("vmap(jvp({}))", case.name), &tangents, &inputs, &all, 0);

        let stacked: Vec<Array> =
            inputs.iter().map(|input| Array::stack(&examples(input), 0).unwrap()).collect();
        let ones: Vec<Array> = stacked.iter().map(Array::ones_like).collect();
        let over_batch = jvp(|x| vmap(case.f, x, &[Some(0)], &[Some(0)]), &stacked, &ones)
            .unwrap_or_else(|error| panic!("jvp(vmap({})): {error}", case.name));
        let per_example = vmap(tangents, &stacked, &[Some(0)], &[Some(0)]).unwrap();
        for (a, b) in over_batch.1.iter().zip(&per_example) {
            check_close(&format!("jvp(vmap({}))", case.name), a, b, 2e-5);
        }
    }
}

#[test]
fn gradients_of_batches() {
    for case in op_cases().iter().filter(|case| case.differentiable) {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        let stacked: Vec<Array> =
            inputs.iter().map(|input| Array::stack(&examples(input), 0).unwrap()).collect();
        let f = |x: &[Array]| Ok(vec![projected(case.f, x)?]);
        let of_batch = grad(|x| vmap(f, x, &[Some(0)], &[Some(0)])?[0].sum(&[], false), &stacked)
            .unwrap_or_else(|error| panic!("grad(vmap({})): {error}", case.name));
        let gradient = |x: &[Array]| grad(|y| projected(case.f, y), x);
        let per_example = vmap(gradient, &stacked, &[Some(0)], &[Some(0)]).unwrap();
        for (a, b) in of_batch.iter().zip(&per_example) {
            check_close(&format!("grad(vmap({}))", case.name), a, b, 2e-5);
        }
    }
}

#[test]
fn batches_of_batches() {
    for case in op_cases() {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        // An outer batch of two, an inner of three; the inner one last in the first input.
        let outer: Vec<Array> = inputs
            .iter()
            .map(|input| {
                let inner = Array::stack(&examples(input), input.rank() as i32).unwrap();
                Array::stack(&examples(&inner)[..2], 0).unwrap()
            })
            .collect();
        let axes: Vec<Option<i32>> = inputs.iter().map(|input| Some(input.rank() as i32)).collect();
        let both = vmap(|x| vmap(case.f, x, &axes, &[Some(-1)]), &outer, &[Some(0)], &[Some(0)])
            .unwrap_or_else(|error| panic!("{}: {error}", case.name));
        eval(&both).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        for (output, both) in both.iter().enumerate() {
            let one = |i: usize, j: usize| {
                let pick = |array: &Array, axis: i32, at: usize| {
                    array.narrow(axis, at, at + 1).unwrap().squeeze(&[axis]).unwrap()
                };
                let x: Vec<Array> = outer.iter().map(|array| pick(&pick(array, 0, i), -1, j)).collect();
                (case.f)(&x).unwrap()[output].clone()
            };
            let rows: Vec<Array> = (0..2)
                .map(|i| Array::stack(&(0..EXAMPLES).map(|j| one(i, j)).collect::<Vec<_>>(), -1).unwrap())
                .collect();
            check_close(case.name, both, &Array::stack(&rows, 0).unwrap(), 2e-5);
        }
    }
}

#[test]
fn compiled_functions_inside_and_around() {
    for case in op_cases() {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        let stacked: Vec<Array> =
            inputs.iter().map(|input| Array::stack(&examples(input), 0).unwrap()).collect();
        let eager = vmap(case.f, &stacked, &[Some(0)], &[Some(0)]).unwrap();
        let compiled = compile(case.f);
        let inside = vmap(|x| compiled.call(x), &stacked, &[Some(0)], &[Some(0)])
            .unwrap_or_else(|error| panic!("vmap(compile({})): {error}", case.name));
        let around = compile(|x: &[Array]| vmap(case.f, x, &[Some(0)], &[Some(0)]));
        let around =
            around.call(&stacked).unwrap_or_else(|error| panic!("compile(vmap({})): {error}", case.name));
        for ((eager, inside), around) in eager.iter().zip(&inside).zip(&around) {
            check_close(&format!("vmap(compile({}))", case.name), inside, eager, 1e-6);
            check_close(&format!("compile(vmap({}))", case.name), around, eager, 1e-6);
        }
    }
}

#[test]
fn fused_regions_with_shared_and_batched_operands() {
    let f = compile(|x: &[Array]| {
        let scaled = (&x[0] * &x[1] + &x[2]).tanh()?;
        Ok(vec![&scaled * 2.0, scaled.exp()?])
    });
    let inputs = [
        cases::random(&[3, 4], Dtype::F32, 1),
        cases::random(&[4], Dtype::F32, 2),
        cases::random(&[3, 1], Dtype::F32, 3),
    ];
    check_all("a region", &|x| f.call(x), &inputs);
    let gradient = |x: &[Array]| grad(|y| f.call(y)?[0].multiply(&f.call(y)?[1])?.sum(&[], false), x);
    check_all("the gradient of a region", &gradient, &inputs);
}

#[test]
fn packed_weights_are_shared() {
    let plain = cases::random(&[64, 64], Dtype::F32, 4);
    let quantized = Array::from_packed(
        PackedWeight::quantize(&plain, mica_array::quantized::QuantSpec::affine(4, 32).unwrap()).unwrap(),
    );
    let (x, ids) = (cases::random(&[2, 64], Dtype::F32, 5), Array::from_slice(&[3i32, 0, 63], &[3]).unwrap());
    let linear = |x: &[Array]| Ok(vec![x[0].linear(&quantized, None, Precision::Exact)?.square()?]);
    check_all("quantized linear", &linear, std::slice::from_ref(&x));
    let slopes = |x: &[Array]| grad(|x| linear(x)?[0].sum(&[], false), x);
    check_all("its gradient", &slopes, std::slice::from_ref(&x));
    let along = |x: &[Array]| Ok(jvp(linear, x, &[x[0].cos()?])?.1);
    check_all("its tangent", &along, std::slice::from_ref(&x));
    let rows = |ids: &[Array]| Ok(vec![Array::embedding(&quantized, &ids[0], Dtype::F32)?]);
    check_all("quantized embedding", &rows, std::slice::from_ref(&ids));
    let saved = |x: &[Array]| {
        let inner = |x: &[Array]| checkpoint(linear, x);
        grad(|x| inner(x)?[0].sum(&[], false), x)
    };
    check_all("under a checkpoint", &saved, std::slice::from_ref(&x));

    // As an argument: shared it works, with a batch it is an error that says so.
    let f = |x: &[Array]| Ok(vec![x[0].linear(&x[1], None, Precision::Exact)?]);
    let batch = Array::stack(&examples(&x), 0).unwrap();
    let inputs = [batch, quantized];
    vmap(f, &inputs, &[Some(0), None], &[Some(0)]).unwrap()[0].eval().unwrap();
    let error = vmap(f, &inputs, &[Some(0), Some(0)], &[Some(0)]).unwrap_err();
    assert!(error.to_string().contains("packed weight"), "{error}");
}

#[test]
fn checkpoints_in_batches() {
    let inputs = [cases::random(&[3, 4], Dtype::F32, 6), cases::random(&[4, 4], Dtype::F32, 7)];
    let f = |x: &[Array]| -> Result<Array> {
        let inner = |y: &[Array]| Ok(vec![y[0].matmul(&x[1])?.tanh()?]);
        checkpoint(inner, &checkpoint(inner, &x[..1])?)?[0].square()?.sum(&[], false)
    };
    check_all("vmap(grad(checkpoint))", &|x| grad(f, x), &inputs);
    let stacked: Vec<Array> = inputs.iter().map(|input| Array::stack(&examples(input), 0).unwrap()).collect();
    let saved = grad(
        |x| vmap(|y| checkpoint(|z| Ok(vec![f(z)?]), y), x, &[Some(0)], &[Some(0)])?[0].sum(&[], false),
        &stacked,
    );
    let plain = vmap(|x| grad(f, x), &stacked, &[Some(0)], &[Some(0)]).unwrap();
    for (saved, plain) in saved.unwrap().iter().zip(&plain) {
        check_close("grad(vmap(checkpoint))", saved, plain, 2e-5);
    }
}

#[test]
fn outputs_that_do_not_depend_on_a_batch() {
    let (x, w) =
        (Array::from_slice(&[1.0f32, 2.0], &[2]).unwrap(), Array::from_slice(&[3.0f32], &[1]).unwrap());
    let f = |x: &[Array]| Ok(vec![x[1].square()?, x[0].add(&x[1])?]);
    let out = vmap(f, &[x.clone(), w.clone()], &[Some(0), None], &[None, Some(0)]).unwrap();
    assert_eq!(out[0].to_vec::<f32>().unwrap(), [9.0]);
    let out = vmap(f, &[x.clone(), w.clone()], &[Some(0), None], &[Some(0)]).unwrap();
    assert_eq!(out[0].to_vec::<f32>().unwrap(), [9.0, 9.0]);
    assert_eq!(out[1].to_vec::<f32>().unwrap(), [4.0, 5.0]);
    let error = vmap(f, &[x, w], &[Some(0), None], &[None]).unwrap_err();
    assert!(error.to_string().contains("differs between examples"), "{error}");
}

#[test]
fn batches_of_no_examples_and_of_one() {
    for case in op_cases() {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        for count in [0, 1] {
            let stacked: Vec<Array> = inputs
                .iter()
                .map(|input| Array::stack(&examples(input)[..1], 0).unwrap().narrow(0, 0, count).unwrap())
                .collect();
            let mapped = vmap(case.f, &stacked, &[Some(0)], &[Some(0)])
                .unwrap_or_else(|error| panic!("{} of {count}: {error}", case.name));
            eval(&mapped).unwrap_or_else(|error| panic!("{} of {count}: {error}", case.name));
            for (mapped, one) in mapped.iter().zip((case.f)(&inputs).unwrap()) {
                assert_eq!(mapped.shape()[0], count, "{}", case.name);
                assert_eq!(&mapped.shape()[1..], one.shape(), "{}", case.name);
                if count == 1 {
                    check_close(case.name, &mapped.squeeze(&[0]).unwrap(), &one, 2e-5);
                }
            }
        }
    }
}

#[test]
fn an_index_out_of_range_stays_within_its_example() {
    let x = Array::from_slice(&[1.0f32, 2.0, 3.0, 4.0], &[2, 2]).unwrap();
    let ids = Array::from_slice(&[5i32, -7], &[2, 1]).unwrap();
    let out = vmap(|x| Ok(vec![x[0].take(&x[1], 0)?]), &[x, ids], &[Some(0)], &[Some(0)]).unwrap();
    assert_eq!(out[0].to_vec::<f32>().unwrap(), [2.0, 3.0]);
}

#[test]
fn keys_per_example() {
    let keys = random::split(&random::key(7).unwrap(), 4).unwrap();
    let f = |key: &[Array]| Ok(vec![random::normal(&[2, 3], Dtype::F32, &key[0])?]);
    let mapped = vmap(f, std::slice::from_ref(&keys), &[Some(0)], &[Some(0)]).unwrap();
    for example in 0..4 {
        let key = keys.narrow(0, example, example + 1).unwrap().squeeze(&[0]).unwrap();
        let own = mapped[0].narrow(0, example, example + 1).unwrap().squeeze(&[0]).unwrap();
        assert_eq!(own.to_vec::<f32>().unwrap(), f(&[key]).unwrap()[0].to_vec::<f32>().unwrap());
    }
}

#[test]
fn captured_arrays_are_shared_and_get_gradients() {
    let (x, w) = (cases::random(&[5, 3], Dtype::F32, 8), cases::random(&[3], Dtype::F32, 9));
    let loss = |w: &[Array]| {
        let f = |x: &[Array]| Ok(vec![x[0].multiply(&w[0])?.tanh()?.sum(&[], false)?]);
        vmap(f, std::slice::from_ref(&x), &[Some(0)], &[Some(0)])?[0].sum(&[], false)
    };
    let plain = |w: &[Array]| x.multiply(&w[0])?.tanh()?.sum(&[], false);
    let (a, b) = (grad(loss, std::slice::from_ref(&w)).unwrap(), grad(plain, &[w]).unwrap());
    check_close("captured", &a[0], &b[0], 1e-5);
}

#[test]
fn the_hessian_as_a_batch_of_products() {
    let x = cases::random(&[4], Dtype::F32, 10);
    let f = |x: &[Array]| -> Result<Array> {
        let y = x[0].square()?.sum(&[], false)?;
        x[0].sin()?.sum(&[], false)?.multiply(y)
    };
    let identity = Array::arange(0.0, 4.0, 1.0, Dtype::F32)
        .and_then(|i| i.expand_dims(&[1])?.equal(&i)?.astype(Dtype::F32))
        .unwrap();
    let row = |v: &[Array]| Ok(jvp(|x| grad(f, x), &v[..1], &v[1..])?.1);
    let forward = vmap(row, &[x.clone(), identity.clone()], &[None, Some(0)], &[Some(0)]).unwrap();
    let row = |v: &[Array]| Ok(vjp(|x| grad(f, x), &v[..1], &v[1..])?.1);
    let backward = vmap(row, &[x.clone(), identity], &[None, Some(0)], &[Some(0)]).unwrap();
    check_close("forward and backward", &forward[0], &backward[0], 1e-5);
    check_close("symmetric", &forward[0], &forward[0].swap_axes(0, 1).unwrap(), 1e-5);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let x = Array::zeros(&[2, 3], Dtype::F32);
    let f = |x: &[Array]| Ok(vec![x[0].add(&x[x.len() - 1])?]);
    for (inputs, in_axes, out_axes, expected) in [
        (vec![x.clone(), x.clone()], vec![Some(0), Some(1)], vec![Some(0)], "2 examples, input 1 has 3"),
        (vec![x.clone()], vec![Some(2)], vec![Some(0)], "out of range"),
        (vec![x.clone()], vec![None], vec![Some(0)], "all axes are None"),
        (vec![x.clone()], vec![Some(0)], vec![Some(0), Some(0)], "out_axes has 2 entries for 1"),
        (vec![x.clone()], vec![], vec![Some(0)], "in_axes has 0 entries for 1"),
    ] {
        let error = vmap(f, &inputs, &in_axes, &out_axes).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    // One example has no value, neither during the call nor after it.
    let error = vmap(|x| x[0].eval().map(|()| x.to_vec()), std::slice::from_ref(&x), &[Some(0)], &[Some(0)]);
    assert!(error.unwrap_err().to_string().contains("traces"));
    let mut kept = None;
    let keep = |x: &[Array]| {
        kept = Some(x[0].exp()?);
        Ok(x.to_vec())
    };
    vmap(keep, &[x], &[Some(0)], &[Some(0)]).unwrap();
    let error = kept.unwrap().eval().unwrap_err();
    assert!(error.to_string().contains("outside the function"), "{error}");
}

#[test]
fn custom_functions() {
    // Rules that differ from what the function does show which of them ran.
    let f = custom_function(|x| Ok(vec![x[0].multiply(&x[1])?]))
        .named("product")
        .with_vjp(|primals, cotangents, _| {
            Ok(vec![cotangents[0].multiply(&primals[1])?.multiply(10.0)?, primals[1].zeros_like()])
        })
        .with_jvp(|primals, tangents| Ok(vec![tangents[0].multiply(&primals[1])?.multiply(100.0)?]));
    let x =
        [Array::from_slice(&[1.0f32, 2.0], &[2]).unwrap(), Array::from_slice(&[3.0f32, 4.0], &[2]).unwrap()];
    let loss = |x: &[Array]| f.call(x)?[0].sum(&[], false);
    assert_eq!(f.call(&x).unwrap()[0].to_vec::<f32>().unwrap(), [3.0, 8.0]);
    let grads = grad(loss, &x).unwrap();
    assert_eq!(grads[0].to_vec::<f32>().unwrap(), [30.0, 40.0]);
    assert_eq!(grads[1].to_vec::<f32>().unwrap(), [0.0, 0.0]);
    let ones = [x[0].ones_like(), x[1].ones_like()];
    let (_, tangents) = jvp(|x| f.call(x), &x, &ones).unwrap();
    assert_eq!(tangents[0].to_vec::<f32>().unwrap(), [300.0, 400.0]);

    // Without a rule for batches all three are mapped, in both orders and compiled.
    check_all("a batch", &|x| f.call(x), &x);
    check_all("gradients per example", &|x| grad(loss, x), &x);
    check_all("tangents per example", &|x| Ok(jvp(|x| f.call(x), x, &ones)?.1), &x);
    let of_batch = |x: &[Array]| vmap(|x| f.call(x), x, &[None, Some(0)], &[Some(0)])?[0].sum(&[], false);
    let stacked = [x[0].clone(), Array::stack(&examples(&x[1]), 0).unwrap()];
    let grads = grad(of_batch, &stacked).unwrap();
    // What is shared gets the gradients of all examples: 10 · Σ of the second input.
    let expected = stacked[1].sum(&[0], false).unwrap().multiply(10.0).unwrap();
    check_close("shared", &grads[0], &expected, 1e-5);
    let compiled = compile(|x: &[Array]| grad(loss, x));
    assert_eq!(compiled.call(&x).unwrap()[0].to_vec::<f32>().unwrap(), [30.0, 40.0]);
    // The second derivative is the rule's.
    let twice = grad(|y| grad(loss, y)?[0].multiply(&y[0])?.sum(&[], false), &x).unwrap();
    assert_eq!(twice[1].to_vec::<f32>().unwrap(), [10.0, 20.0]);

    // With a rule for batches, it runs.
    let g = f.with_vmap(|inputs, axes| {
        assert_eq!(axes, [Some(0), None]);
        Ok((vec![inputs[0].multiply(&inputs[1])?.add(1000.0)?], vec![Some(0)]))
    });
    let stacked = [Array::stack(&examples(&x[0]), 0).unwrap(), x[1].clone()];
    let out = vmap(|x| g.call(x), &stacked, &[Some(0), None], &[Some(0)]).unwrap();
    assert_eq!(out[0].to_vec::<f32>().unwrap()[..2], [1003.0, 1008.0]);
}

#[test]
fn custom_functions_and_captured_arrays() {
    let x =
        [Array::from_slice(&[1.0f32, 2.0], &[2]).unwrap(), Array::from_slice(&[3.0f32, 4.0], &[2]).unwrap()];
    // The second input is captured: the rule does not speak of it, so its gradient is the product's.
    let loss = |x: &[Array]| {
        let captured = x[1].clone();
        let f = custom_function(move |y| Ok(vec![y[0].multiply(&captured)?]))
            .with_vjp(|primals, _, _| Ok(vec![primals[0].multiply(0.0)?.add(7.0)?]))
            .with_jvp(|_, tangents| Ok(vec![tangents[0].multiply(5.0)?]));
        f.call(&x[..1])
    };
    let sum = |x: &[Array]| loss(x)?[0].sum(&[], false);
    let grads = grad(sum, &x).unwrap();
    assert_eq!(grads[0].to_vec::<f32>().unwrap(), [7.0, 7.0]);
    assert_eq!(grads[1].to_vec::<f32>().unwrap(), [1.0, 2.0]);
    let ones = [x[0].ones_like(), x[1].ones_like()];
    let (_, tangents) = jvp(loss, &x, &ones).unwrap();
    assert_eq!(tangents[0].to_vec::<f32>().unwrap(), [6.0, 7.0]);
    check_all("captured and mapped", &loss, &x);
    check_all("its gradients", &|x| grad(sum, x), &x);
}

#[test]
fn custom_rules_that_do_not_fit_are_errors() {
    let x = [Array::zeros(&[2], Dtype::F32)];
    let f = custom_function(|x| Ok(x.to_vec())).named("odd").with_vjp(|_, _, _| Ok(vec![]));
    let error = grad(|x| f.call(x)?[0].sum(&[], false), &x).unwrap_err();
    assert!(error.to_string().contains("[odd] the vjp rule gave 0 arrays, 1"), "{error}");
    let f = custom_function(|x| Ok(x.to_vec())).with_vjp(|_, _, _| Ok(vec![Array::zeros(&[3], Dtype::F32)]));
    let error = grad(|x| f.call(x)?[0].sum(&[], false), &x).unwrap_err();
    assert!(error.to_string().contains("for input 0 of [2]"), "{error}");
    let f = custom_function(|x| Ok(x.to_vec())).with_vmap(|x, _| Ok((x.to_vec(), vec![])));
    let error = vmap(|x| f.call(x), &x, &[Some(0)], &[Some(0)]).unwrap_err();
    assert!(error.to_string().contains("1 outputs and 0 axes"), "{error}");
    let f = custom_function(|x| Ok(x.to_vec())).with_vmap(|_, _| {
        let other = Array::zeros(&[5], Dtype::F32);
        Ok((vec![other], vec![Some(0)]))
    });
    let error = vmap(|x| f.call(x), &x, &[Some(0)], &[Some(0)]).unwrap_err();
    assert!(error.to_string().contains("one of 2 examples"), "{error}");
}
