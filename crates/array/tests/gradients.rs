//! Every differentiable op against finite differences in f64-like steps, through the public door.

use mica_array::op::{AttentionSpec, CrossEntropySpec, Precision, RopeSpec};
use mica_array::transforms::{checkpoint, grad, value_and_grad};
use mica_array::{Array, Dtype, Result, eval};
use mica_testkit::Rng;

fn normal(shape: &[usize], seed: u64) -> Array {
    let mut rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal()).collect();
    Array::from_slice(&values, shape).unwrap()
}

fn ints(values: &[i32], shape: &[usize]) -> Array {
    Array::from_slice(values, shape).unwrap()
}

/// Compares the gradient of Σ f(x) · r, r random, with central differences. In f32 ops the
/// differences carry rounding noise of about 1e-3 relative to the largest gradient.
fn check(name: &str, inputs: &[Array], f: impl Fn(&[Array]) -> Result<Array>) {
    let projected = |x: &[Array]| -> Result<Array> {
        let y = f(x)?;
        y.multiply(normal(y.shape(), 99).astype(y.dtype())?)?.astype(Dtype::F32)?.sum(&[], false)
    };
    let grads = grad(|x| projected(x), inputs).unwrap_or_else(|error| panic!("{name}: {error}"));
    for (index, gradient) in grads.iter().enumerate() {
        let got =
            gradient.astype(Dtype::F32).unwrap().to_vec::<f32>().unwrap_or_else(|e| panic!("{name}: {e}"));
        let base = inputs[index].to_vec::<f32>().unwrap();
        let step = 1e-2f32;
        let at = |place: usize, delta: f32| {
            let mut moved = base.clone();
            moved[place] += delta;
            let mut all = inputs.to_vec();
            all[index] = Array::from_slice(&moved, inputs[index].shape()).unwrap();
            projected(&all).unwrap().item::<f32>().unwrap() as f64
        };
        let largest = got.iter().fold(1e-3f32, |top, value| top.max(value.abs()));
        for place in (0..base.len()).step_by(1 + base.len() / 17) {
            // Richardson: the error of the difference falls to the fourth order.
            let coarse = (at(place, step) - at(place, -step)) / (2.0 * step as f64);
            let fine = (at(place, step / 2.0) - at(place, -step / 2.0)) / step as f64;
            let expected = ((4.0 * fine - coarse) / 3.0) as f32;
            assert!(
                (got[place] - expected).abs() <= 4e-3 * largest.max(expected.abs()),
                "{name}: input {index}, element {place}: gradient {}, difference {expected}",
                got[place]
            );
        }
    }
}

#[test]
fn unary_ops() {
    let x = normal(&[3, 5], 1);
    let positive = x.abs().unwrap().add(0.5).unwrap();
    let small = x.tanh().unwrap().multiply(0.9).unwrap();
    type F = fn(&Array) -> Result<Array>;
    let cases: [(&str, &Array, F); 22] = [
        ("exp", &x, Array::exp),
        ("expm1", &x, Array::expm1),
        ("log", &positive, Array::log),
        ("log2", &positive, Array::log2),
        ("log10", &positive, Array::log10),
        ("log1p", &positive, Array::log1p),
        ("sqrt", &positive, Array::sqrt),
        ("rsqrt", &positive, Array::rsqrt),
        ("reciprocal", &positive, Array::reciprocal),
        ("square", &x, Array::square),
        ("sin", &x, Array::sin),
        ("cos", &x, Array::cos),
        ("tanh", &x, Array::tanh),
        ("erf", &x, Array::erf),
        ("sigmoid", &x, Array::sigmoid),
        ("silu", &x, Array::silu),
        ("gelu", &x, Array::gelu),
        ("gelu_tanh", &x, Array::gelu_tanh),
        ("softplus", &x, Array::softplus),
        ("negative", &x, Array::negative),
        ("abs", &positive, Array::abs),
        ("expm1 of small", &small, Array::expm1),
    ];
    for (name, x, f) in cases {
        check(name, std::slice::from_ref(x), |x| f(&x[0]));
    }
}

#[test]
fn binary_ops_with_broadcasting() {
    let (a, b) = (normal(&[4, 3], 2), normal(&[3], 3).abs().unwrap().add(0.7).unwrap());
    let column = normal(&[4, 1], 4);
    check("add", &[a.clone(), b.clone()], |x| x[0].add(&x[1]));
    check("subtract", &[column.clone(), b.clone()], |x| x[0].subtract(&x[1]));
    check("multiply", &[a.clone(), column.clone()], |x| x[0].multiply(&x[1]));
    check("divide", &[a.clone(), b.clone()], |x| x[0].divide(&x[1]));
    check("power", &[b.clone(), column.clone()], |x| x[0].power(&x[1]));
    check("maximum", &[a.clone(), column.clone()], |x| x[0].maximum(&x[1]));
    check("minimum", &[a.clone(), column.clone()], |x| x[0].minimum(&x[1]));
    check("logaddexp", &[a.clone(), column], |x| x[0].logaddexp(&x[1]));
    check("operators", &[a, b], |x| Ok((&x[0] * &x[1] + 2.0) / (&x[1] - 0.1)));
}

#[test]
fn shapes_indices_and_reductions() {
    let x = normal(&[2, 3, 4], 5);
    let one = std::slice::from_ref(&x);
    check("reshape and transpose", one, |x| x[0].transpose(&[2, 0, 1])?.reshape(&[4, -1]));
    check("window", one, |x| x[0].window(&[0, 2, 3], &[2, 2, 2], &[1, -1, -2]));
    check("concatenate", &[x.clone(), normal(&[2, 1, 4], 6)], |x| Array::concatenate(x, 1));
    check("slice_update", &[x.clone(), normal(&[1, 2, 2], 7)], |x| x[0].slice_update(&x[1], &[1, 0, 2]));
    let indices = ints(&[2, 0, 2, -1], &[2, 2]);
    check("take", one, |x| x[0].take(&indices, 1));
    let along = ints(&[1, 0, 3, 3, 2, 1], &[2, 3, 1]);
    check("take_along_axis", one, |x| x[0].take_along_axis(&along, 2));
    check("sum", one, |x| x[0].sum(&[0, 2], true));
    check("mean", one, |x| x[0].mean(&[1], false));
    check("max", one, |x| x[0].max(&[-1], false));
    check("var", one, |x| x[0].var(&[-1], false, 1));
    check("softmax", one, |x| x[0].softmax(-1));
    check("softmax over another axis", one, |x| x[0].softmax(1));
    check("logsumexp", one, |x| x[0].logsumexp(-1, false));
    check("log_softmax", one, |x| x[0].log_softmax(-1));
}

#[test]
fn products_and_fused_ops() {
    let (a, b) = (normal(&[2, 3, 4], 8), normal(&[4, 5], 9));
    check("matmul", &[a.clone(), b.clone()], |x| x[0].matmul(&x[1]));
    check("linear", &[a.clone(), normal(&[6, 4], 10), normal(&[6], 11)], |x| {
        x[0].linear(&x[1], Some(&x[2]), Precision::Exact)
    });
    check("linear_transposed", &[a.clone(), normal(&[4, 7], 12)], |x| {
        x[0].linear_transposed(&x[1], Precision::Exact)
    });
    check("embedding", &[normal(&[5, 3], 13)], |x| {
        Array::embedding(&x[0], &ints(&[4, 0, 4], &[3]), Dtype::F32)
    });
    check("rms_norm", &[a.clone(), normal(&[4], 14)], |x| x[0].rms_norm(&x[1], 1e-5));
    check("layer_norm", &[a, normal(&[4], 15), normal(&[4], 16)], |x| x[0].layer_norm(&x[1], &x[2], 1e-5));
    let heads = normal(&[2, 3, 2, 6], 17);
    let positions = ints(&[0, 1, 2, 5, 6, 7], &[2, 3]);
    let frequencies = Array::from_slice(&[1.0f32, 0.1], &[2]).unwrap();
    let spec = RopeSpec { dims: 4, traditional: false, inverse: false, scale: 1.3 };
    check("rope", &[heads], |x| x[0].rope(&positions, &frequencies, spec.clone()));
    check("short_conv", &[normal(&[2, 5, 3], 18), normal(&[3, 3], 19)], |x| {
        Ok(x[0].short_conv(&x[1], None, None)?.0)
    });
    let starts = ints(&[0, 0, 2, 2, 4, 0, 0, 0, 3, 3], &[2, 5]);
    check("short_conv, packed", &[normal(&[2, 5, 3], 18), normal(&[3, 3], 19)], |x| {
        Ok(x[0].short_conv(&x[1], None, Some(&starts))?.0)
    });
    let targets = ints(&[3, 0, 6], &[3]);
    for softcap in [None, Some(3.0)] {
        let spec = CrossEntropySpec { precision: Precision::Exact, softcap };
        check("linear_cross_entropy", &[normal(&[3, 4], 20), normal(&[7, 4], 21)], |x| {
            Ok(x[0].linear_cross_entropy(&x[1], &targets, spec)?.0)
        });
    }
}

#[test]
fn attention_in_all_its_forms() {
    let base = AttentionSpec {
        scale: 0.4,
        causal: true,
        window: None,
        softcap: None,
        key_start: false,
        precision: Precision::Exact,
    };
    let inputs = [normal(&[2, 5, 4, 3], 22), normal(&[2, 5, 2, 3], 23), normal(&[2, 5, 2, 3], 24)];
    let starts = ints(&[0, 0, 2, 2, 2, 0, 0, 0, 3, 3], &[2, 5]);
    for (name, spec, packed) in [
        ("causal", base.clone(), false),
        ("full", AttentionSpec { causal: false, ..base.clone() }, false),
        ("window", AttentionSpec { window: Some(2), ..base.clone() }, false),
        ("softcap", AttentionSpec { softcap: Some(1.5), ..base.clone() }, false),
        ("packed", base.clone(), true),
    ] {
        check(name, &inputs, |x| x[0].attention(&x[1], &x[2], packed.then_some(&starts), spec.clone()));
    }
}

#[test]
fn checkpointing_changes_nothing_and_reaches_captured_arrays() {
    let (x, w) = (normal(&[3, 4], 25), normal(&[4, 4], 26));
    let plain = value_and_grad(
        |v| {
            let h = v[0].matmul(&v[1])?.tanh()?;
            h.matmul(&v[1])?.silu()?.sum(&[], false)
        },
        &[x.clone(), w.clone()],
    )
    .unwrap();
    let saved = value_and_grad(
        |v| {
            let h = checkpoint(|inner| Ok(vec![inner[0].matmul(&v[1])?.tanh()?]), &v[..1])?;
            let out = checkpoint(|inner| Ok(vec![inner[0].matmul(&v[1])?.silu()?]), &h)?;
            out[0].sum(&[], false)
        },
        &[x, w],
    )
    .unwrap();
    assert_eq!(plain.value.to_vec::<f32>().unwrap(), saved.value.to_vec::<f32>().unwrap());
    for (a, b) in plain.grads.iter().zip(&saved.grads) {
        assert_eq!(a.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap());
    }
}

#[test]
fn second_derivatives() {
    let x = normal(&[5], 27);
    let second =
        grad(|v| grad(|u| u[0].power(3.0)?.sum(&[], false), v)?[0].sum(&[], false), std::slice::from_ref(&x))
            .unwrap();
    let expected: Vec<f32> = x.to_vec::<f32>().unwrap().iter().map(|x| 6.0 * x).collect();
    mica_testkit::assert_close("6x", &second[0].to_vec::<f32>().unwrap(), &expected, 1e-5, 1e-5);
}

#[test]
fn values_cannot_be_read_while_traced() {
    let x = normal(&[3], 28);
    let error = grad(
        |v| {
            let y = v[0].exp()?;
            y.eval()?;
            y.sum(&[], false)
        },
        std::slice::from_ref(&x),
    )
    .unwrap_err();
    assert!(error.to_string().contains("traces"), "{error}");
    // Afterwards everything can be read, also what was built from tracers.
    let mut kept = None;
    let grads = grad(
        |v| {
            kept = Some(v[0].exp()?);
            v[0].exp()?.sum(&[], false)
        },
        &[x],
    )
    .unwrap();
    let kept = kept.unwrap();
    eval(&[grads[0].clone(), kept.clone()]).unwrap();
    assert_eq!(grads[0].to_vec::<f32>().unwrap(), kept.to_vec::<f32>().unwrap());
}
