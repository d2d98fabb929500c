//! The gradient of every differentiable op of elements, indices, shapes and order against central
//! differences, all in f64.

use mica_array::op::ScatterOp;
use mica_array::transforms::grad;
use mica_array::{Array, Dtype, Index, PadMode, Result};
use mica_testkit::Rng;

/// Numbers in (0.2, 0.9) of either sign if `signed`, all different by at least a step of the
/// differences, so that no order and no maximum changes under them.
fn numbers(shape: &[usize], seed: u64, signed: bool) -> Array {
    let mut rng = Rng::new(seed);
    let count: usize = shape.iter().product();
    let mut values: Vec<f64> =
        (0..count).map(|i| 0.2 + 0.7 * (i as f64 + 0.5 * rng.f64()) / count as f64).collect();
    rng.shuffle(&mut values);
    if signed {
        values.iter_mut().for_each(|value| *value = if rng.chance(0.5) { -*value } else { *value });
    }
    Array::from_slice(&values, shape).unwrap()
}

fn ints(values: &[i32], shape: &[usize]) -> Array {
    Array::from_slice(values, shape).unwrap()
}

type Function = Box<dyn Fn(&[Array]) -> Result<Array>>;

struct Case {
    name: &'static str,
    inputs: Vec<Array>,
    f: Function,
}

fn case(name: &'static str, inputs: Vec<Array>, f: impl Fn(&[Array]) -> Result<Array> + 'static) -> Case {
    Case { name, inputs, f: Box::new(f) }
}

/// Compares the gradient of Σ f(x) · r, r fixed and random, with central differences.
fn check(case: &Case) {
    let Case { name, inputs, f } = case;
    let loss = |x: &[Array]| -> Result<Array> {
        let y = f(x)?;
        y.multiply(numbers(y.shape(), 77, true))?.sum(&[], false)
    };
    let grads = grad(|x| loss(x), inputs).unwrap_or_else(|error| panic!("{name}: {error}"));
    for (index, gradient) in grads.iter().enumerate() {
        let got = gradient.to_vec::<f64>().unwrap_or_else(|error| panic!("{name}: {error}"));
        let base = inputs[index].to_vec::<f64>().unwrap();
        let at = |place: usize, delta: f64| {
            let mut moved = base.clone();
            moved[place] += delta;
            let mut all = inputs.clone();
            all[index] = Array::from_slice(&moved, inputs[index].shape()).unwrap();
            loss(&all).unwrap().item::<f64>().unwrap()
        };
        let step = 1e-5;
        let largest = got.iter().fold(1e-2f64, |top, value| top.max(value.abs()));
        for place in 0..base.len() {
            let expected = (at(place, step) - at(place, -step)) / (2.0 * step);
            // The difference's error is about step² and rounding over step.
            assert!(
                (got[place] - expected).abs() <= 2e-8 * largest.max(expected.abs()),
                "{name}: input {index}, element {place}: gradient {}, difference {expected}",
                got[place]
            );
        }
    }
}

fn check_all(cases: Vec<Case>) {
    cases.iter().for_each(check);
}

#[test]
fn elementwise() {
    let any = || vec![numbers(&[2, 3], 1, true)];
    let positive = || vec![numbers(&[2, 3], 2, false)];
    let above_one = || vec![numbers(&[2, 3], 3, false).add(1.0).unwrap()];
    macro_rules! unary {
        ($($domain:ident: $($name:ident)*;)*) => {
            vec![$($(case(stringify!($name), $domain(), |x| x[0].$name()),)*)*]
        };
    }
    check_all(unary! {
        any: abs negative square exp expm1 sin cos tan arcsin arccos arctan sinh cosh tanh arcsinh arctanh erf erfinv
            sigmoid silu gelu gelu_tanh softplus degrees radians positive real conjugate;
        positive: log log2 log10 log1p sqrt rsqrt reciprocal;
        above_one: arccosh;
    });
    let two = || vec![numbers(&[2, 3], 4, true), numbers(&[3], 5, false)];
    check_all(vec![
        case("add", two(), |x| x[0].add(&x[1])),
        case("subtract", two(), |x| x[0].subtract(&x[1])),
        case("multiply", two(), |x| x[0].multiply(&x[1])),
        case("divide", two(), |x| x[0].divide(&x[1])),
        case("remainder", two(), |x| x[0].remainder(&x[1])),
        case("power", vec![numbers(&[2, 3], 6, false), numbers(&[3], 7, true)], |x| x[0].power(&x[1])),
        case("maximum", two(), |x| x[0].maximum(&x[1])),
        case("minimum", two(), |x| x[0].minimum(&x[1])),
        case("logaddexp", two(), |x| x[0].logaddexp(&x[1])),
        case("arctan2", two(), |x| x[0].arctan2(&x[1])),
        case("divmod", two(), |x| Ok(x[0].divmod(&x[1])?.1)),
        case("where", two(), |x| Array::select(&x[0].greater(0.1)?, &x[0], &x[1])),
        case("clip", any(), |x| x[0].clip(-0.5, 0.5)),
        case("nan_to_num", any(), |x| x[0].nan_to_num(0.0, None, None)),
        case("astype", any(), |x| x[0].multiply(2.0)?.astype(Dtype::F64)),
    ]);
}

#[test]
fn steps_have_no_slope() {
    type Step = fn(&Array) -> Result<Array>;
    let x = numbers(&[5], 8, true);
    let cases: [(&str, Step); 7] = [
        ("floor", Array::floor),
        ("ceil", Array::ceil),
        ("round", Array::round),
        ("trunc", Array::trunc),
        ("sign", Array::sign),
        ("floor_divide", |x| x.floor_divide(0.3)),
        ("round_to", |x| x.round_to(1)),
    ];
    for (name, f) in cases {
        let slope = grad(|v| f(&v[0])?.sum(&[], false), std::slice::from_ref(&x)).unwrap();
        assert_eq!(slope[0].to_vec::<f64>().unwrap(), [0.0; 5], "{name}");
    }
}

#[test]
fn shapes() {
    let x = || vec![numbers(&[2, 3, 4], 10, true)];
    let m = || vec![numbers(&[3, 4], 11, true)];
    check_all(vec![
        case("reshape", x(), |x| x[0].reshape(&[4, -1])),
        case("transpose", x(), |x| x[0].transpose(&[2, 0, 1])),
        case("moveaxis", x(), |x| x[0].moveaxis(0, -1)),
        case("broadcast_to", m(), |x| x[0].broadcast_to(&[2, 3, 4])),
        case("flip", x(), |x| x[0].flip(&[0, 2])),
        case("roll", x(), |x| x[0].roll(&[1, -2], &[0, 2])),
        case("tile", m(), |x| x[0].tile(&[2, 1, 3])),
        case("repeat", m(), |x| x[0].repeat(3, 0)),
        case("concatenate", vec![numbers(&[2, 3], 12, true), numbers(&[1, 3], 13, true)], |x| {
            Array::concatenate(x, 0)
        }),
        case("stack", vec![numbers(&[2, 3], 14, true), numbers(&[2, 3], 15, true)], |x| Array::stack(x, 1)),
        case("split", m(), |x| Ok(x[0].split(2, 1)?.remove(1))),
        case("unstack", m(), |x| Ok(x[0].unstack(0)?.remove(1))),
        case("pad with a constant", m(), |x| x[0].pad(&[(1, 2), (0, 1)], PadMode::Constant(1.0))),
        case("pad with an array", vec![numbers(&[2, 2], 16, true), numbers(&[], 17, true)], |x| {
            x[0].pad_with(&[(1, 1)], &x[1])
        }),
        case("pad with edges", m(), |x| x[0].pad(&[(1, 2), (2, 0)], PadMode::Edge)),
        case("pad reflecting", m(), |x| x[0].pad(&[(2, 1)], PadMode::Reflect)),
        case("pad symmetrically", m(), |x| x[0].pad(&[(2, 5)], PadMode::Symmetric)),
        case("diagonal", x(), |x| x[0].diagonal(1, 0, 2)),
        case("diag of a vector", vec![numbers(&[3], 18, true)], |x| x[0].diag(-1)),
        case("trace", m(), |x| x[0].trace(0, 0, 1, None)),
        case("tril", x(), |x| x[0].tril(-1)),
        case("triu", x(), |x| x[0].triu(1)),
        case("as_strided", m(), |x| x[0].as_strided(&[2, 3, 3], &[4, 1, -1], 3)),
        case("contiguous", m(), |x| x[0].transpose(&[])?.contiguous()),
        case("meshgrid", vec![numbers(&[3], 19, true), numbers(&[2], 20, true)], |x| {
            let grids = Array::meshgrid(x, false, false)?;
            grids[0].multiply(&grids[1])
        }),
        case("linspace is a constant", m(), |x| {
            x[0].multiply(Array::linspace(0.0, 1.0, 4, true, Dtype::F64)?)
        }),
    ]);
}

#[test]
fn reductions_and_order() {
    let x = || vec![numbers(&[2, 3, 4], 30, true)];
    let positive = || vec![numbers(&[2, 3, 4], 31, false)];
    check_all(vec![
        case("sum", x(), |x| x[0].sum(&[0, 2], true)),
        case("prod", x(), |x| x[0].prod(&[1], false)),
        case("max", x(), |x| x[0].max(&[0, -1], false)),
        case("min", x(), |x| x[0].min(&[1], true)),
        case("minmax", x(), |x| {
            let (low, high) = x[0].minmax(&[1], false)?;
            low.multiply(high)
        }),
        case("mean", x(), |x| x[0].mean(&[1], false)),
        case("var", x(), |x| x[0].var(&[0, 1], false, 1)),
        case("std", x(), |x| x[0].std(&[2], false, 0)),
        case("median of an odd number", x(), |x| x[0].median(&[1], false)),
        case("median of an even number", x(), |x| x[0].median(&[0, 2], true)),
        case("logsumexp", x(), |x| x[0].logsumexp_axes(&[0, 2], false)),
        case("logsumexp over the last axis", x(), |x| x[0].logsumexp(-1, false)),
        case("softmax", x(), |x| x[0].softmax_axes(&[0, 1])),
        case("softmax over the last axis", x(), |x| x[0].softmax(-1)),
        case("cumsum", x(), |x| x[0].cumsum(1, false, true)),
        case("cumsum, reverse and exclusive", x(), |x| x[0].cumsum(None, true, false)),
        case("logcumsumexp", x(), |x| x[0].logcumsumexp(2, false, true)),
        case("logcumsumexp, reverse", x(), |x| x[0].logcumsumexp(0, true, true)),
        case("logcumsumexp, exclusive", positive(), |x| {
            // The first output is −∞ and has no gradient.
            x[0].logcumsumexp(2, false, false)?.narrow(2, 1, 4)
        }),
        case("prod of one axis of ones", vec![numbers(&[3, 1], 35, true)], |x| x[0].prod(&[1], true)),
        case("prod of all", x(), |x| x[0].prod(&[], false)),
        case("cumprod", x(), |x| x[0].cumprod(1, false, true)),
        case("cumprod, reverse and exclusive", x(), |x| x[0].cumprod(2, true, false)),
        case("sort", x(), |x| x[0].sort(1)),
        case("sort of all", x(), |x| x[0].sort(None)),
        case("partition", x(), |x| x[0].partition(2, -1)),
        case("topk", x(), |x| x[0].topk(2, 1)),
        case("diff", x(), |x| x[0].diff(2, 1)),
        case("vecdot", vec![numbers(&[2, 3], 32, true), numbers(&[2, 3], 33, true)], |x| {
            x[0].vecdot(&x[1], 0)
        }),
        case("unique", vec![numbers(&[5], 34, true)], |x| Ok(x[0].unique(4, None)?.values)),
    ]);
}

#[test]
fn products_with_zeros() {
    let x = Array::from_slice(&[2.0, 0.0, 3.0, 0.0, 0.0, 4.0], &[2, 3]).unwrap();
    let grads = grad(|v| v[0].prod(&[1], false)?.sum(&[], false), &[x]).unwrap();
    assert_eq!(grads[0].to_vec::<f64>().unwrap(), [0.0, 6.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn indices() {
    let x = || vec![numbers(&[4, 3, 2], 40, true)];
    let rows = ints(&[2, 0, 2, -1], &[2, 2]);
    let along = ints(&[1, 0, 3, 3, 2, 1], &[2, 3, 1]);
    let with = |shape: &[usize]| vec![numbers(&[4, 3, 2], 41, true), numbers(shape, 42, true)];
    let all = Index::ALL;
    let list = |items: &[Index]| items.to_vec();
    let mut cases = vec![];
    {
        let rows = rows.clone();
        cases.push(case("take", x(), move |x| x[0].take(&rows, 0)));
    }
    {
        let along = along.clone();
        cases.push(case("take_along_axis, broadcast", x(), move |x| {
            x[0].take_along_axis(&along.narrow(0, 0, 1)?, 0)
        }));
    }
    let picks: Vec<(&'static str, Vec<Index>)> = vec![
        ("a slice", list(&[Index::stepped(None, None, -2), 1.into(), Index::NewAxis])),
        ("an index array", list(&[all.clone(), (&ints(&[2, 0, 2], &[3])).into()])),
        ("two arrays", list(&[(&rows).into(), (&ints(&[0, 2], &[2])).into()])),
        (
            "arrays apart",
            list(&[(&ints(&[1, 1, 3], &[3])).into(), (1..).into(), (&ints(&[0, 1, 1], &[3])).into()]),
        ),
    ];
    for (name, index) in picks {
        let shape = x()[0].index(&index).unwrap().shape().to_vec();
        let own = index.clone();
        cases.push(case(name, x(), move |x| x[0].index(&own)));
        let own = index.clone();
        cases.push(case(name, with(&shape), move |x| x[0].at(&own).add(&x[1])));
        let own = index.clone();
        cases.push(case(name, with(&shape), move |x| x[0].at(&own).subtract(&x[1])));
        let own = index.clone();
        cases.push(case(name, with(&shape[shape.len() - 1..]), move |x| x[0].at(&own).add(&x[1])));
        let own = index.clone();
        cases.push(case(name, with(&shape), move |x| x[0].at(&own).maximum(&x[1])));
        let own = index.clone();
        cases.push(case(name, with(&shape), move |x| x[0].at(&own).minimum(&x[1])));
    }
    // Places named once: which of several values stays is open.
    let once: Vec<Index> = list(&[(&ints(&[2, 0], &[2])).into(), all.clone(), (&ints(&[1, 0], &[2])).into()]);
    let own = once.clone();
    cases.push(case("set", with(&[2, 3]), move |x| x[0].at(&own).set(&x[1])));
    cases.push(case("set a window", with(&[3]), |x| {
        x[0].at(&[Index::stepped(3i64, 0i64, -2), Index::ALL, 0.into()]).set(&x[1])
    }));
    cases.push(case("multiply a window", with(&[2]), |x| x[0].at(&[1.into()]).multiply(&x[1])));
    cases.push(case("divide a window", with(&[2]), |x| x[0].at(&[1.into()]).divide(&x[1])));
    let places = ints(&[3, 1, 0, 0, 2, 1], &[1, 3, 2]);
    let own = places.clone();
    cases.push(case("put_along_axis", with(&[1, 3, 2]), move |x| x[0].put_along_axis(&own, &x[1], 0)));
    let own = ints(&[3, 3, 0, 0, 2, 1], &[2, 3, 1]).broadcast_to(&[2, 3, 2]).unwrap();
    cases.push(case("scatter_add_axis", with(&[2, 3, 2]), move |x| x[0].scatter_add_axis(&own, &x[1], 0)));
    let start = ints(&[1, 0], &[2]);
    let own = start.clone();
    cases.push(case("dynamic_slice", x(), move |x| x[0].dynamic_slice(&own, &[0, 2], &[2, 3, 1])));
    cases.push(case("dynamic_slice_update", with(&[2, 3, 1]), move |x| {
        x[0].dynamic_slice_update(&x[1], &start, &[0, 2])
    }));
    let at = ints(&[3, 0, 3], &[3]);
    cases.push(case("scatter", with(&[3, 1, 3, 1]), move |x| {
        x[0].scatter(ScatterOp::Add, &[&at], &[0], &x[1])
    }));
    let mask = Array::from_slice(&[true, false, false, true], &[4]).unwrap();
    cases.push(case("masked_update", with(&[2, 3, 2]), move |x| x[0].masked_update(&mask, &x[1])));
    check_all(cases);
}

#[test]
fn second_order() {
    let x = numbers(&[6], 50, false);
    type F = fn(&Array) -> Result<Array>;
    let cases: [(&str, F); 6] = [
        ("logcumsumexp", |x| x.logcumsumexp(0, false, true)?.square()?.sum(&[], false)),
        ("sort", |x| {
            x.sort(0)?.multiply(Array::arange(0.0, 6.0, 1.0, Dtype::F64)?)?.square()?.sum(&[], false)
        }),
        ("gather", |x| x.index(&[(&ints(&[1, 1, 4], &[3])).into()])?.power(3.0)?.sum(&[], false)),
        ("scatter", |x| {
            x.at(&[(&ints(&[1, 1, 4], &[3])).into()]).add(x.narrow(0, 0, 3)?)?.power(3.0)?.sum(&[], false)
        }),
        ("std", |x| x.std(&[], false, 0)),
        ("cumsum", |x| x.cumsum(0, true, false)?.exp()?.sum(&[], false)),
    ];
    for (name, f) in cases {
        check(&case(name, vec![x.clone()], move |x| Ok(grad(|v| f(&v[0]), x)?.remove(0))));
    }
}

#[test]
fn parts_of_complex_numbers() {
    let x = Array::from_slice(&[1.0f32, -2.0], &[2]).unwrap();
    let y = Array::from_slice(&[0.5f32, 3.0], &[2]).unwrap();
    let grads = grad(
        |v| {
            let z = Array::complex(&v[0], &v[1])?;
            z.real()?.multiply(2.0)?.add(z.conjugate()?.imag()?.multiply(5.0)?)?.sum(&[], false)
        },
        &[x, y],
    )
    .unwrap();
    assert_eq!(grads[0].to_vec::<f32>().unwrap(), [2.0, 2.0]);
    assert_eq!(grads[1].to_vec::<f32>().unwrap(), [-5.0, -5.0]);
}
