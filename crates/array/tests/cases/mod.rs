//! Functions to compile, with inputs for them; the table of all ops is in `ops`.

#![allow(dead_code)] // each file that uses this module uses a part of it

pub mod ops;

use mica_array::transforms::{checkpoint, grad};
use mica_array::{Array, Dtype, Result};
use mica_testkit::Rng;

pub struct Case {
    pub name: &'static str,
    pub inputs: Vec<Array>,
    pub f: fn(&[Array]) -> Result<Vec<Array>>,
    /// What runs at evaluation.
    pub ops: &'static [&'static str],
}

/// Random numbers of a dtype; integers between −8 and 7.
pub fn random(shape: &[usize], dtype: Dtype, seed: u64) -> Array {
    let mut rng = Rng::new(seed);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|_| match dtype {
            Dtype::Bool => rng.range(0..2) as f32,
            dtype if dtype.is_float() => rng.normal(),
            _ => rng.range(0..16) as f32 - 8.0,
        })
        .collect();
    let array = Array::from_slice(&values, shape).unwrap().astype(dtype).unwrap();
    array.eval().unwrap();
    array
}

fn f32s(shape: &[usize], seed: u64) -> Array {
    random(shape, Dtype::F32, seed)
}

fn one(x: Array) -> Result<Vec<Array>> {
    Ok(vec![x])
}

pub fn cases() -> Vec<Case> {
    use Dtype::*;
    let case = |name, inputs, f, ops| Case { name, inputs, f, ops };
    let mut cases = vec![
        case(
            "gelu by erf",
            vec![f32s(&[3, 700], 1)],
            |x| one(((&x[0] * std::f64::consts::FRAC_1_SQRT_2).erf()? + 1.0) * &x[0] * 0.5),
            &["fused"],
        ),
        case(
            "gelu by tanh",
            vec![f32s(&[2100], 2)],
            |x| {
                let x = &x[0];
                let inner = (x.square()? * x * 0.044715 + x) * 0.797_884_560_802_865_4;
                one((inner.tanh()? + 1.0) * x * 0.5)
            },
            &["fused"],
        ),
        case("quick gelu", vec![f32s(&[5, 31], 3)], |x| one((&x[0] * 1.702).sigmoid()? * &x[0]), &["fused"]),
        case(
            "swiglu",
            vec![f32s(&[2, 5, 96], 4), f32s(&[2, 5, 96], 5)],
            |x| one(x[0].silu()? * &x[1]),
            &["fused"],
        ),
        case(
            "swiglu in bf16",
            vec![random(&[7, 96], BF16, 4), random(&[7, 96], BF16, 5)],
            |x| one(x[0].silu()? * &x[1]),
            &["fused"],
        ),
        case("soft cap", vec![f32s(&[9, 40], 6)], |x| one((&x[0] / 30.0).tanh()? * 30.0), &["fused"]),
        case(
            "masked add",
            vec![f32s(&[2, 4, 8, 8], 7), random(&[8, 8], Bool, 8), f32s(&[2, 1, 1, 8], 9)],
            |x| {
                let low = Array::full(&[], -1e9, Dtype::F32);
                one(Array::select(&x[1], &(&x[0] * 0.125 + &x[2]), &low)?)
            },
            &["fused"],
        ),
        case(
            "f32 with bf16",
            vec![f32s(&[6, 50], 10), random(&[6, 50], BF16, 11)],
            |x| one(((&x[1] * 1.1 + 0.3) * &x[0]).astype(Dtype::BF16)?.exp()?),
            &["fused"],
        ),
        case(
            "f16 with bf16 and bool",
            vec![random(&[4, 33], F16, 12), random(&[4, 33], BF16, 13), random(&[4, 33], Bool, 14)],
            |x| {
                let sum = &x[0] + &x[1];
                let picked = Array::select(&x[2].logical_not()?, &sum, &x[0])?;
                one(picked.astype(Dtype::F16)? * 3.0 - &x[0])
            },
            &["fused"],
        ),
        case(
            "integers stay outside",
            vec![random(&[3, 20], I32, 15), f32s(&[3, 20], 16)],
            |x| {
                let odd = x[0].remainder(2)?.equal(1)?;
                one(Array::select(&odd, &(&x[1] * 2.0).exp()?, &(&x[1] - 1.0))?)
            },
            &["full", "remainder", "full", "equal", "fused"],
        ),
        case(
            "integers cast inside",
            vec![random(&[3, 20], I32, 17), f32s(&[3, 20], 18)],
            |x| one((x[0].astype(Dtype::F32)? * &x[1]).tanh()?.astype(Dtype::I32)?),
            &["astype", "fused", "astype"],
        ),
        case(
            "f64 stays outside",
            vec![random(&[50], F64, 19)],
            |x| one(x[0].exp()?.sqrt()?),
            &["exp", "sqrt"],
        ),
        case(
            "a row, a column and a number",
            vec![f32s(&[6, 130], 20), f32s(&[130], 21), f32s(&[6, 1], 22), f32s(&[], 23)],
            |x| one(((&x[0] * &x[1] + &x[2]) * &x[3]).exp()?),
            &["fused"],
        ),
        case(
            "both sides broadcast",
            vec![f32s(&[6, 1], 24), f32s(&[1, 130], 25)],
            |x| one((&x[0] * &x[1]).sigmoid()?),
            &["fused"],
        ),
        case(
            "a small chain before a large one",
            vec![f32s(&[200], 26), f32s(&[7, 200], 27)],
            |x| {
                let row = (x[0].square()? + 1.0).rsqrt()?;
                one((&x[1] * row).tanh()?)
            },
            &["fused", "fused"],
        ),
        case(
            "several outputs",
            vec![f32s(&[900], 28), f32s(&[900], 29)],
            |x| {
                let sum = &x[0] + &x[1];
                let act = sum.silu()?;
                Ok(vec![&act * &x[0], sum.clone(), act, &sum * 2.0])
            },
            &["fused"],
        ),
        case(
            "an output twice, and an input as it is",
            vec![f32s(&[40], 30)],
            |x| {
                let y = (&x[0] * 2.0).exp()?;
                Ok(vec![y.clone(), x[0].clone(), y])
            },
            &["fused"],
        ),
        case(
            "an input used many times",
            vec![f32s(&[1000], 31)],
            |x| one((&x[0] * &x[0] + &x[0]) * (&x[0] - x[0].exp()?) / &x[0]),
            &["fused"],
        ),
        case(
            "empty",
            vec![f32s(&[0, 4], 32), f32s(&[4], 33)],
            |x| one((&x[0] * &x[1]).exp()? + 1.0),
            &["fused"],
        ),
        case("one number", vec![f32s(&[], 34)], |x| one((&x[0] * 2.0).exp()? + 1.0), &["fused"]),
        case(
            "special values",
            vec![
                Array::from_slice(&[0.0, -0.0, f32::NAN, f32::INFINITY, -f32::INFINITY, 1e-42, 3e38], &[7])
                    .unwrap(),
            ],
            |x| {
                let y = (&x[0] + 0.0) * 1.0;
                Ok(vec![y.reciprocal()?, y.maximum(0.0)? - 1.0, y.equal(&x[0])?.logical_not()?])
            },
            &["fused"],
        ),
        case(
            "around a product and a reduction",
            vec![f32s(&[8, 32], 35), f32s(&[32, 32], 36)],
            |x| {
                let y = (&x[0] * 0.5).tanh()?.matmul(&x[1])?;
                let scaled = (&y - y.mean(&[-1], true)?).exp()? * 0.1;
                one(&scaled * &x[0] + x[0].square()?)
            },
            &["fused", "matmul", "fused"],
        ),
        case(
            "a result that its own chain waits for",
            vec![f32s(&[16, 24], 37)],
            |x| {
                let e = (&x[0] * 0.3).exp()?;
                one(&e / e.sum(&[-1], true)? * 2.0)
            },
            &["fused"],
        ),
        case(
            "masked softmax",
            vec![f32s(&[2, 9, 40], 60), random(&[9, 40], Bool, 61)],
            |x| {
                let low = Array::full(&[], -1e9, Dtype::F32);
                one(Array::select(&x[1], &(&x[0] * 0.125), &low)?.softmax(-1)?)
            },
            &["fused"],
        ),
        case(
            "softmax by hand",
            vec![random(&[5, 33], BF16, 62)],
            |x| {
                let e = (&x[0] - x[0].max(&[-1], true)?).exp()?;
                one(&e / e.sum(&[-1], true)?)
            },
            &["fused"],
        ),
        case(
            "RMS norm by hand",
            vec![f32s(&[3, 1500], 63), f32s(&[1500], 64)],
            |x| {
                let scale = (x[0].square()?.mean(&[-1], true)? + 1e-5).rsqrt()?;
                one(&x[0] * scale * &x[1])
            },
            &["fused"],
        ),
        case(
            "layer norm by hand, and what it needs",
            vec![random(&[6, 70], F16, 65), random(&[70], F16, 66), random(&[70], F16, 67)],
            |x| {
                let mean = x[0].mean(&[-1], true)?;
                let centred = &x[0] - &mean;
                let scale = (centred.square()?.mean(&[-1], true)? + 1e-3).rsqrt()?;
                Ok(vec![&centred * &scale * &x[1] + &x[2], mean, scale])
            },
            &["fused"],
        ),
        case(
            "log-softmax and a gather",
            vec![f32s(&[7, 50], 68), random(&[7, 1], Bool, 69)],
            |x| {
                let log = (&x[0] * 2.0) - (&x[0] * 2.0).logsumexp(-1, true)?;
                one(log.take_along_axis(&x[1].astype(Dtype::I32)?, -1)? * -1.0)
            },
            &["astype", "take_along_axis", "fused"],
        ),
        case(
            "numbers of rows alone",
            vec![f32s(&[11, 20], 70), random(&[11, 20], Bool, 71)],
            |x| {
                let sums = x[0].tanh()?.sum(&[-1], true)? * 0.5;
                let both = x[1].logical_not()?.any(&[-1], true)?;
                Ok(vec![sums, both, x[0].min(&[-1], true)?, (&x[0] * &x[0]).prod(&[-1], true)?])
            },
            &["fused", "fused"],
        ),
        case(
            "rows that are as many as they are long",
            vec![f32s(&[24, 24], 72), f32s(&[24], 73)],
            |x| {
                let weighted = &x[0] * (&x[1] * 1.0);
                Ok(vec![weighted.sum(&[-1], true)?, weighted])
            },
            &["fused", "fused"],
        ),
        case(
            "what is between a sum and its use stays outside",
            vec![f32s(&[12, 12], 74)],
            |x| {
                let sums = x[0].square()?.sum(&[-1], true)?;
                let turned = sums.cumsum(0, false, true)?;
                one(&x[0] * &sums + turned * &x[0])
            },
            &["fused", "cumsum", "fused"],
        ),
        case(
            "the gradient of an RMS norm by hand",
            vec![f32s(&[5, 36], 75), f32s(&[36], 76)],
            |x| {
                let f = |y: &[Array]| {
                    let scale = (y[0].square()?.mean(&[-1], true)? + 1e-5).rsqrt()?;
                    (&y[0] * scale * &y[1]).tanh()?.sum(&[], false)
                };
                grad(f, x)
            },
            &["fused", "sum", "reshape"],
        ),
        case(
            "common subexpressions",
            vec![f32s(&[300], 38)],
            |x| one(x[0].exp()? * x[0].exp()? + x[0].exp()?.sqrt()?),
            &["fused"],
        ),
        case(
            "constants",
            vec![f32s(&[300], 39)],
            |x| {
                let c = Array::full(&[], 2.0, Dtype::F32).sqrt()?.multiply(0.1)?;
                let ones = Array::ones(&[300], Dtype::BF16).astype(Dtype::F32)?;
                one((&x[0] * c + ones).tanh()?)
            },
            &["fused"],
        ),
        case(
            "casts there and back",
            vec![random(&[64], BF16, 40)],
            |x| one(x[0].astype(Dtype::F32)?.astype(Dtype::BF16)?.astype(Dtype::F32)?),
            &["astype"],
        ),
        case("nothing to do", vec![f32s(&[5], 41)], |x| one(x[0].astype(Dtype::F32)?.reshape(&[5])?), &[]),
        case(
            "the gradient of swiglu",
            vec![f32s(&[4, 60], 42), f32s(&[4, 60], 43), f32s(&[4, 60], 44)],
            |x| {
                let f = |y: &[Array]| (y[0].silu()?.multiply(&y[1])? * &x[2]).sum(&[], false);
                grad(f, &x[..2])
            },
            &["fused"],
        ),
        case(
            "the gradient of broadcasting",
            vec![f32s(&[5, 40], 45), f32s(&[40], 46)],
            |x| grad(|y| (&y[0] * &y[1]).gelu_tanh()?.square()?.sum(&[], false), x),
            &["fused", "sum", "reshape"],
        ),
        case(
            "the gradient of the gradient",
            vec![f32s(&[50], 47)],
            |x| {
                let slope = |y: &[Array]| -> Result<Array> {
                    Ok(grad(|z| (z[0].tanh()? * 0.7).sum(&[], false), y)?.remove(0))
                };
                grad(|y| slope(y)?.multiply(&y[0])?.sum(&[], false), x)
            },
            &["fused"],
        ),
        case(
            "a checkpoint and its gradient",
            vec![f32s(&[50], 48)],
            |x| {
                let f = |y: &[Array]| {
                    let inner = checkpoint(|z| Ok(vec![z[0].silu()? * &z[0]]), y)?;
                    (inner[0].tanh()? + 1.0).sum(&[], false)
                };
                grad(f, x)
            },
            // Once on the way forward; on the way back after the gradient that it is needed for.
            &["checkpoint", "fused", "fused"],
        ),
    ];
    let wide = f32s(&[30, 44], 50);
    let views: [(&'static str, Array); 4] = [
        ("transposed", wide.transpose(&[1, 0]).unwrap()),
        ("every second row", wide.window(&[0, 0], &[15, 44], &[2, 1]).unwrap()),
        ("backwards", wide.window(&[29, 43], &[30, 44], &[-1, -1]).unwrap()),
        ("a slice of columns", wide.narrow(1, 7, 20).unwrap()),
    ];
    for (name, view) in views {
        let row = f32s(&view.shape()[1..], 51);
        cases.push(case(name, vec![view, row], |x| one((&x[0] + &x[1]).silu()? * &x[0]), &["fused"]));
    }
    cases
}
