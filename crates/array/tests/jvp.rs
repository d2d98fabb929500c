//! Tangents against finite differences in f64 and against gradients, and second derivatives, for
//! every op of the table. The reference backend computes; the backend is the process's, so this
//! file uses no other.

use mica_array::backend::reference::Reference;
use mica_array::transforms::{compile, grad, jvp, vjp};
use mica_array::{Array, Dtype, Result, set_backend};

use cases::ops::{OpCase, op_cases};

mod cases;

fn values(array: &Array) -> Vec<f64> {
    array.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap()
}

fn is_moving(array: &Array) -> bool {
    array.dtype().is_inexact()
}

/// A direction: random for floats, zeros for what has no derivative.
fn direction(inputs: &[Array], seed: u64) -> Vec<Array> {
    let along = |(index, input): (usize, &Array)| match is_moving(input) {
        true => cases::random(input.shape(), input.dtype(), seed + index as u64),
        false => input.zeros_like(),
    };
    inputs.iter().enumerate().map(along).collect()
}

fn moved(inputs: &[Array], along: &[Array], step: f64) -> Vec<Array> {
    let one = |(input, along): (&Array, &Array)| match is_moving(input) {
        true => {
            let moved = input.add(along.multiply(step).unwrap()).unwrap();
            moved.eval().unwrap();
            moved
        }
        false => input.clone(),
    };
    inputs.iter().zip(along).map(one).collect()
}

/// (f(x + h·v) − f(x − h·v)) / 2h, of the fourth order.
fn difference(
    f: impl Fn(&[Array]) -> Vec<Array>,
    inputs: &[Array],
    along: &[Array],
    h: f64,
) -> Vec<Vec<f64>> {
    let at = |step: f64| -> Vec<Vec<f64>> { f(&moved(inputs, along, step)).iter().map(values).collect() };
    let (a, b, c, d) = (at(h), at(-h), at(h / 2.0), at(-h / 2.0));
    (0..a.len())
        .map(|output| {
            (0..a[output].len())
                .map(|i| {
                    let coarse = (a[output][i] - b[output][i]) / (2.0 * h);
                    let fine = (c[output][i] - d[output][i]) / h;
                    (4.0 * fine - coarse) / 3.0
                })
                .collect()
        })
        .collect()
}

fn check_close(name: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(1.0f64, |top, value| top.max(value.abs()));
    for (place, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() <= tolerance * largest,
            "{name}: element {place}: {got}, expected {expected}"
        );
    }
}

/// Steps and tolerances: cases with f32 inside have its rounding in their differences.
fn step_of(case: &OpCase) -> (f64, f64) {
    let f32_inputs = case.inputs.iter().any(|input| input.dtype() == Dtype::F32);
    if case.single || f32_inputs || case.name == "cast" { (4e-2, 2e-3) } else { (1e-3, 1e-7) }
}

/// Some gradients keep a log-sum-exp, a weight's gradient or a product in f32, so that differences
/// of them are as coarse.
fn gradient_step_of(case: &OpCase) -> (f64, f64) {
    let fused =
        ["linear", "rms_norm", "short_conv", "attention"].iter().any(|name| case.name.starts_with(name));
    let (h, tolerance) = step_of(case);
    if fused { (4e-2, 2e-3) } else { (h, tolerance.max(1e-5)) }
}

fn outputs(case: &OpCase, inputs: &[Array]) -> Vec<Array> {
    (case.f)(inputs).unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

fn is_piecewise(name: &str) -> bool {
    matches!(name, "Sign" | "Floor" | "Ceil" | "Round" | "FloorDivide")
}

fn differentiable() -> Vec<OpCase> {
    set_backend(Box::new(Reference));
    op_cases().into_iter().filter(|case| case.differentiable && !is_piecewise(case.name)).collect()
}

/// Casts to f32 and stopped gradients have derivatives that differences do not show.
fn shows_in_differences(case: &OpCase) -> bool {
    case.name != "stop_gradient"
}

#[test]
fn tangents_agree_with_finite_differences() {
    for case in differentiable().iter().filter(|case| shows_in_differences(case)) {
        let along = direction(&case.inputs, 1000);
        let (_, tangents) =
            jvp(case.f, &case.inputs, &along).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let (h, tolerance) = step_of(case);
        let expected = difference(|x| outputs(case, x), &case.inputs, &along, h);
        for (tangent, expected) in tangents.iter().zip(&expected) {
            check_close(case.name, &values(tangent), expected, tolerance);
        }
    }
}

#[test]
fn constant_functions_have_zero_tangents() {
    set_backend(Box::new(Reference));
    for case in op_cases().iter().filter(|case| !case.differentiable || is_piecewise(case.name)) {
        let along = direction(&case.inputs, 1100);
        let (results, tangents) =
            jvp(case.f, &case.inputs, &along).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        for (result, tangent) in results.iter().zip(&tangents) {
            assert_eq!((result.shape(), result.dtype()), (tangent.shape(), tangent.dtype()), "{}", case.name);
            assert!(values(tangent).iter().all(|&value| value == 0.0), "{}", case.name);
        }
    }
}

#[test]
fn tangents_and_gradients_are_transposes_of_each_other() {
    for case in &differentiable() {
        let along = direction(&case.inputs, 1200);
        let (results, tangents) = jvp(case.f, &case.inputs, &along).unwrap();
        let cotangents = direction(&results, 1300);
        let (_, grads) =
            vjp(case.f, &case.inputs, &cotangents).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let dot = |a: &[Array], b: &[Array]| -> f64 {
            let pair = |(a, b): (&Array, &Array)| -> f64 {
                if !is_moving(a) {
                    return 0.0;
                }
                values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum()
            };
            a.iter().zip(b).map(pair).sum()
        };
        let (forward, backward) = (dot(&tangents, &cotangents), dot(&along, &grads));
        let tolerance = if case.single || case.name == "cast" { 1e-4 } else { 1e-5 };
        check_close(case.name, &[forward], &[backward], tolerance);
    }
}

/// Σ f(x) · r over all float outputs, with one r per case.
fn projected(case: &OpCase, x: &[Array]) -> Result<Array> {
    let mut sum = Array::zeros(&[], Dtype::F64);
    for (index, output) in (case.f)(x)?.iter().enumerate().filter(|(_, output)| is_moving(output)) {
        let weights = cases::random(output.shape(), output.dtype(), 1400 + index as u64);
        sum = sum.add(output.multiply(weights)?.astype(Dtype::F64)?.sum(&[], false)?)?;
    }
    Ok(sum)
}

#[test]
fn second_derivatives_agree_with_differences_of_gradients() {
    for case in &differentiable() {
        let gradient = |x: &[Array]| grad(|y| projected(case, y), x);
        let along = direction(&case.inputs, 1500);
        // Forward over reverse.
        let (_, product) =
            jvp(gradient, &case.inputs, &along).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let (h, tolerance) = gradient_step_of(case);
        if shows_in_differences(case) {
            let expected = difference(|x| gradient(x).unwrap(), &case.inputs, &along, h);
            for ((product, expected), input) in product.iter().zip(&expected).zip(&case.inputs) {
                if is_moving(input) {
                    check_close(case.name, &values(product), expected, tolerance);
                }
            }
        }
        // Reverse over reverse: the Hessian is symmetric.
        let inner = |x: &[Array]| -> Result<Array> {
            let mut sum = Array::zeros(&[], Dtype::F64);
            for (gradient, along) in gradient(x)?.iter().zip(&along).filter(|(_, along)| is_moving(along)) {
                sum = sum.add(gradient.multiply(along)?.astype(Dtype::F64)?.sum(&[], false)?)?;
            }
            Ok(sum)
        };
        let twice = grad(inner, &case.inputs).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        for ((twice, product), input) in twice.iter().zip(&product).zip(&case.inputs) {
            if is_moving(input) {
                check_close(
                    case.name,
                    &values(twice),
                    &values(product),
                    if case.single { 1e-3 } else { 1e-5 },
                );
            }
        }
    }
}

#[test]
fn tangents_of_compiled_functions() {
    for case in &differentiable() {
        let cast =
            |x: &Array| if x.dtype() == Dtype::F64 { x.astype(Dtype::F32).unwrap() } else { x.clone() };
        let inputs: Vec<Array> = case.inputs.iter().map(cast).collect();
        let along = direction(&inputs, 1600);
        let compiled = compile(case.f);
        let (_, eager) = jvp(case.f, &inputs, &along).unwrap();
        let inside = jvp(|x| compiled.call(x), &inputs, &along);
        let (_, inside) = inside.unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let around = compile(|x: &[Array]| Ok(jvp(case.f, &x[..inputs.len()], &x[inputs.len()..])?.1));
        let both: Vec<Array> = inputs.iter().chain(&along).cloned().collect();
        let around = around.call(&both).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        for ((eager, inside), around) in eager.iter().zip(&inside).zip(&around) {
            check_close(case.name, &values(inside), &values(eager), 1e-5);
            check_close(case.name, &values(around), &values(eager), 1e-6);
        }
    }
}

#[test]
fn third_derivatives_and_mixed_modes() {
    set_backend(Box::new(Reference));
    let x = cases::random(&[4], Dtype::F64, 1700);
    let one = [x.ones_like()];
    let f = |x: &[Array]| Ok(vec![x[0].sin()?.multiply(&x[0])?]);
    let first = |x: &[Array]| -> Result<Vec<Array>> { Ok(jvp(f, x, &one)?.1) };
    let second = |x: &[Array]| -> Result<Vec<Array>> { Ok(jvp(first, x, &one)?.1) };
    let third = grad(|x| second(x)?.remove(0).sum(&[], false), std::slice::from_ref(&x)).unwrap();
    // (x · sin x)''' = −3 sin x − x cos x
    let expected: Vec<f64> = values(&x).iter().map(|x| -3.0 * x.sin() - x * x.cos()).collect();
    check_close("x sin x", &values(&third[0]), &expected, 1e-12);
}

#[test]
fn tangents_that_do_not_fit_are_errors() {
    let x = Array::zeros(&[2], Dtype::F32);
    let f = |x: &[Array]| Ok(x.to_vec());
    let error = jvp(f, std::slice::from_ref(&x), &[]).unwrap_err();
    assert!(error.to_string().contains("one tangent per input"), "{error}");
    let error = jvp(f, &[x], &[Array::zeros(&[3], Dtype::F32)]).unwrap_err();
    assert!(error.to_string().contains("its shape [2]"), "{error}");
}
