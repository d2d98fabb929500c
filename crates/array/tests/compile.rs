//! Compiled functions against their closures, through the public door.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use mica_array::kv::{KvCache, KvFormat, KvSpec, PagedSpec};
use mica_array::transforms::{CustomFunction, checkpoint, compile, custom_function, grad, value_and_grad};
use mica_array::{Array, Dtype, PadMode, Precision, Result, eval, memory, pending_ops};
use mica_testkit::Rng;

mod cases;

use cases::{cases, random};

/// Memory figures are the process's: tests that read or hold much take turns.
static MEMORY: Mutex<()> = Mutex::new(());

#[track_caller]
fn assert_same(name: &str, got: &[Array], expected: &[Array]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(
            (got.shape(), got.dtype()),
            (expected.shape(), expected.dtype()),
            "{name}, output {index}"
        );
        let bytes = |array: &Array| {
            // One NaN is as good as another.
            let array = match array.dtype() {
                dtype if dtype.is_float() => {
                    let nan = array.not_equal(array).unwrap();
                    Array::select(&nan, &Array::full(&[], f64::NAN, dtype), array).unwrap()
                }
                _ => array.clone(),
            };
            array.with_bytes(<[u8]>::to_vec).unwrap_or_else(|error| panic!("{name}, output {index}: {error}"))
        };
        assert!(bytes(got) == bytes(expected), "{name}, output {index}: {got:?}\n{}", shown(got, expected));
    }
}

/// The first values that differ.
fn shown(got: &Array, expected: &Array) -> String {
    let values = |array: &Array| array.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap();
    let differing: Vec<String> = (values(got).iter().zip(&values(expected)).enumerate())
        .filter(|(_, (a, b))| a.to_bits() != b.to_bits())
        .take(5)
        .map(|(at, (a, b))| format!("element {at}: got {a}, expected {b}"))
        .collect();
    differing.join("\n")
}

#[test]
fn compiled_equals_eager_bit_for_bit() {
    for case in cases() {
        let eager = (case.f)(&case.inputs).unwrap();
        let compiled = compile(case.f);
        for call in ["first", "second"] {
            let got = compiled.call(&case.inputs).unwrap_or_else(|error| panic!("{}: {error}", case.name));
            assert_eq!(pending_ops(&got), case.ops, "{}, {call} call", case.name);
            assert_same(case.name, &got, &eager);
        }
    }
}

/// A random function of four inputs, as the list of its ops.
#[derive(Clone, Debug)]
enum Node {
    Unary(usize, usize),
    Binary(usize, usize, usize),
    Compare(usize, usize, usize),
    Select(usize, usize, usize),
    Cast(Dtype, usize),
    Number(f64, usize),
    Rows(usize, usize),
    Stop(usize),
    /// An op with a size in it; the shape stays, or broadcasts to what it was.
    Sized(usize, usize),
}

fn random_nodes(rng: &mut Rng) -> Vec<Node> {
    (4..4 + rng.range(3..25))
        .map(|count| {
            // Recent values are likelier, so that chains grow long.
            let mut value = || count - 1 - rng.range(0..count).min(rng.range(0..count));
            let (a, b, c) = (value(), value(), value());
            match rng.range(0..14) {
                0..3 => Node::Unary(rng.range(0..9), a),
                3..6 => Node::Binary(rng.range(0..6), a, b),
                6 => Node::Compare(rng.range(0..3), a, b),
                7 => Node::Select(a, b, c),
                8 => {
                    let to = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::I32, Dtype::Bool];
                    Node::Cast(*rng.choose(&to), a)
                }
                9 => Node::Number(rng.normal() as f64, a),
                10 => Node::Rows(rng.range(0..10), a),
                11 => Node::Stop(a),
                _ => Node::Sized(rng.range(0..8), a),
            }
        })
        .collect()
}

fn interpret(nodes: &[Node], inputs: &[Array]) -> Result<Vec<Array>> {
    let mut values = inputs.to_vec();
    // Integers stay small, so that no cast between them and floats is out of range.
    let float = |x: &Array| if x.dtype().is_float() { Ok(x.clone()) } else { x.astype(Dtype::F32) };
    for node in nodes {
        let value = match *node {
            Node::Unary(op, a) => {
                let x = float(&values[a])?;
                match op {
                    0 => x.tanh(),
                    1 => x.negative()?.sigmoid(),
                    2 => x.silu(),
                    3 => x.abs()?.sqrt(),
                    4 => x.erf(),
                    5 => x.gelu_tanh(),
                    6 => x.sin(),
                    7 => x.round(),
                    _ => values[a].logical_not(),
                }
            }
            Node::Binary(op, a, b) => {
                let (x, y) = (float(&values[a])?, float(&values[b])?);
                match op {
                    0 => x.add(y),
                    1 => x.subtract(y),
                    2 => x.tanh()?.multiply(y),
                    3 => x.divide(y.abs()?.add(1.0)?),
                    4 => x.maximum(y),
                    _ => values[a].logical_and(&values[b]),
                }
            }
            Node::Compare(op, a, b) => match op {
                0 => values[a].less(&values[b]),
                1 => values[a].greater_equal(&values[b]),
                _ => values[a].not_equal(&values[b]),
            },
            Node::Select(c, a, b) => Array::select(&values[c], &values[a], &values[b]),
            Node::Cast(to, a) => match to {
                Dtype::I32 => values[a].astype(Dtype::F32)?.tanh()?.multiply(8.0)?.astype(to),
                to => values[a].astype(to),
            },
            Node::Number(number, a) => float(&values[a])?.multiply(number),
            Node::Rows(op, a) if values[a].rank() == 2 => {
                let x = float(&values[a])?.tanh()?;
                match op {
                    0 => x.max(&[-1], true),
                    1 => x.min(&[-1], true),
                    2 => x.prod(&[-1], true),
                    3 => x.mean(&[-1], true),
                    4 => x.softmax(-1),
                    5 => x.logsumexp(-1, true),
                    6 => values[a].any(&[-1], true),
                    7 => values[a].not_equal(0.0)?.all(&[-1], true),
                    _ => x.sum(&[-1], true),
                }
            }
            Node::Rows(_, a) => values[a].abs_or_self(),
            Node::Stop(a) => values[a].stop_gradient(),
            Node::Sized(op, a) if values[a].rank() == 2 && values[a].dim(0) > 1 => {
                let x = float(&values[a])?.tanh()?;
                let (rows, columns) = (x.dim(0), x.dim(1));
                let range = |size: usize| Array::arange(0.0, size as f64, 1.0, x.dtype());
                match op {
                    0 => x.mean(&[0], true),
                    1 => x.var(&[0, 1], true, 1)?.multiply(rows as f64),
                    2 => Array::concatenate(&[x.narrow(0, 1, rows)?, x.narrow(0, 0, 1)?], 0),
                    3 => x.flatten()?.flip(&[0])?.reshape(&[rows as i64, -1]),
                    4 => x.multiply(range(rows)?.expand_dims(&[1])?.multiply(0.01)?),
                    5 => x.cumsum(0, false, true)?.multiply(1.0 / rows as f64),
                    6 => x.transpose(&[1, 0])?.reshape(&[rows as i64, columns as i64]),
                    _ => x.pad(&[(1, 2), (0, 0)], PadMode::Constant(0.5))?.narrow(0, 2, rows + 2),
                }
            }
            Node::Sized(_, a) => values[a].abs_or_self(),
        }?;
        values.push(value);
    }
    // The last value, and some before it.
    Ok(values.into_iter().rev().step_by(3).take(4).collect())
}

trait AbsOrSelf {
    fn abs_or_self(&self) -> Result<Array>;
}

impl AbsOrSelf for Array {
    fn abs_or_self(&self) -> Result<Array> {
        if self.dtype() == Dtype::Bool { Ok(self.clone()) } else { self.abs() }
    }
}

#[test]
fn random_functions_equal_their_closures_bit_for_bit() {
    let mut rng = Rng::new(71);
    for round in 0..300 {
        let length = *rng.choose(&[33, 33, 5, 1500]);
        let shapes: [&[usize]; 4] = [&[5, length], &[length], &[5, 1], &[]];
        let dtypes = [Dtype::F32, Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::Bool, Dtype::I32];
        let inputs: Vec<Array> = (0..4)
            .map(|at| {
                let shape = if at == 0 { shapes[0] } else { *rng.choose(&shapes) };
                let seed = rng.u32() as u64;
                random(shape, *rng.choose(&dtypes), seed)
            })
            .collect();
        let nodes = random_nodes(&mut rng);
        let eager = interpret(&nodes, &inputs).unwrap();
        let name = format!("round {round}, {inputs:?}, {nodes:?}");
        let got = compile(|x| interpret(&nodes, x)).call(&inputs).unwrap();
        assert!(pending_ops(&got).len() <= pending_ops(&eager).len(), "{name}");
        assert_same(&name, &got, &eager);
        check_gradients(&name, &nodes, &inputs);
    }
}

#[test]
fn random_functions_serve_other_sizes_from_one_trace() {
    let mut rng = Rng::new(72);
    for round in 0..200 {
        let dtypes = [Dtype::F32, Dtype::F32, Dtype::BF16, Dtype::I32];
        let dtypes: Vec<Dtype> = (0..4).map(|_| *rng.choose(&dtypes)).collect();
        let (nodes, seed) = (random_nodes(&mut rng), rng.u32() as u64);
        let compiled = compile(|x| interpret(&nodes, x)).shapeless();
        for (rows, columns) in [(5, 33), (12, 33), (7, 20), (300, 9)] {
            let shapes: [&[usize]; 4] = [&[rows, columns], &[columns], &[rows, 1], &[]];
            let inputs: Vec<Array> =
                shapes.iter().zip(&dtypes).map(|(shape, &dtype)| random(shape, dtype, seed)).collect();
            let name = format!("round {round}, {rows} x {columns}, {dtypes:?}, {nodes:?}");
            assert_same(&name, &compiled.call(&inputs).unwrap(), &interpret(&nodes, &inputs).unwrap());
        }
        assert_eq!(compiled.signatures(), 1, "{nodes:?}");
    }
}

/// Through a compiled function within rounding; of a compiled gradient bit for bit.
fn check_gradients(name: &str, nodes: &[Node], inputs: &[Array]) {
    let loss = |outputs: Vec<Array>| {
        let sum = |x: &Array| x.astype(Dtype::F32)?.tanh()?.sum(&[], false);
        outputs.iter().try_fold(Array::zeros(&[], Dtype::F32), |total, x| total.add(sum(x)?))
    };
    let eager = grad(|x| loss(interpret(nodes, x)?), inputs).unwrap();
    let compiled = compile(|x| grad(|y| loss(interpret(nodes, y)?), x)).call(inputs).unwrap();
    assert_same(&format!("compiled gradient, {name}"), &compiled, &eager);
    let inner = compile(|x| interpret(nodes, x));
    let through = grad(|x| loss(inner.call(x)?), inputs).unwrap();
    for (index, (got, eager)) in through.iter().zip(&eager).enumerate() {
        assert_eq!(got.dtype(), eager.dtype(), "{name}");
        let values = |array: &Array| array.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap();
        let largest = values(eager).iter().fold(1e-3f64, |top, value| top.max(value.abs()));
        // A sum of gradients in another order: some roundings of the type that they have.
        let half = |dtype: Dtype| dtype.is_float() && dtype.size() == 2;
        let halves = inputs.iter().any(|input| half(input.dtype()))
            || nodes.iter().any(|node| matches!(node, Node::Cast(to, _) if half(*to)));
        let unit = if halves { 0.05 } else { 1e-5 };
        for (a, b) in values(got).iter().zip(values(eager)) {
            let close = (a - b).abs() <= unit * largest || (a.is_nan() && b.is_nan());
            assert!(close, "gradient {index} through the compiled function: {a}, eager {b}, {name}");
        }
    }
}

#[test]
fn gradients_through_a_compiled_function() {
    let (gate, up) = (random(&[6, 100], Dtype::F32, 1), random(&[6, 100], Dtype::F32, 2));
    let swiglu = |x: &[Array]| Ok(vec![x[0].silu()?.multiply(&x[1])?]);
    let compiled = compile(swiglu);
    let weight = random(&[6, 100], Dtype::F32, 3);
    let loss = |y: Vec<Array>| y[0].multiply(&weight)?.sum(&[], false);
    let inputs = [gate, up];
    let eager = value_and_grad(|x| loss(swiglu(x)?), &inputs).unwrap();
    let got = value_and_grad(|x| loss(compiled.call(x)?), &inputs).unwrap();
    // Forward: the chain and the product with the weight. Backward: both gradients at once.
    assert_eq!(pending_ops(std::slice::from_ref(&got.value)), ["fused", "multiply", "sum", "reshape"]);
    assert_eq!(pending_ops(&got.grads), ["full", "reshape", "multiply", "fused"]);
    assert_same("value", &[got.value], &[eager.value]);
    // Nothing is used twice on the way back except by the rule itself: the same bits.
    assert_same("gradients", &got.grads, &eager.grads);

    // One of the inputs alone, and a second time from the cache.
    for _ in 0..2 {
        let partial = |f: &dyn Fn(&[Array]) -> Result<Vec<Array>>| {
            grad(|x| loss(f(&[inputs[0].clone(), x[0].clone()])?), &inputs[1..]).unwrap()
        };
        assert_same("of one input", &partial(&|x| compiled.call(x)), &partial(&swiglu));
    }
    // Second order, through the gradient of a region.
    let slope = |f: &dyn Fn(&[Array]) -> Result<Vec<Array>>, x: &[Array]| -> Result<Array> {
        let first = grad(|y| loss(f(y)?), x)?;
        first[0].multiply(&first[1])?.sum(&[], false)
    };
    let second = |f: &dyn Fn(&[Array]) -> Result<Vec<Array>>| grad(|x| slope(f, x), &inputs).unwrap();
    let (got, eager) = (second(&|x| compiled.call(x)), second(&swiglu));
    for (got, eager) in got.iter().zip(&eager) {
        let (got, eager) = (got.to_vec::<f32>().unwrap(), eager.to_vec::<f32>().unwrap());
        let largest = eager.iter().fold(0f32, |top, value| top.max(value.abs()));
        mica_testkit::assert_close("second order", &got, &eager, 0.0, 2e-6 * largest);
    }
    // Inside a checkpoint.
    let kept = grad(|x| loss(checkpoint(|y| compiled.call(y), x)?), &inputs).unwrap();
    assert_same("in a checkpoint", &kept, &grad(|x| loss(swiglu(x)?), &inputs).unwrap());
}

#[test]
fn gradients_reach_captured_arrays() {
    let (x, w) = (random(&[4, 30], Dtype::F32, 1), random(&[30], Dtype::F32, 2));
    let through = |compiled: bool| {
        grad(
            |w| {
                let f = |x: &[Array]| Ok(vec![(&x[0] * &w[0]).tanh()?]);
                let y = if compiled {
                    compile(f).call(std::slice::from_ref(&x))?
                } else {
                    f(std::slice::from_ref(&x))?
                };
                y[0].sum(&[], false)
            },
            std::slice::from_ref(&w),
        )
        .unwrap()
    };
    assert_same("captured", &through(true), &through(false));
}

#[test]
fn a_stopped_gradient_stays_stopped_in_a_region() {
    let x = random(&[50], Dtype::F32, 1);
    let f = |x: &[Array]| {
        let y = &x[0] * 2.0;
        Ok(vec![y.exp()?.stop_gradient()? * &y])
    };
    let of = |f: &dyn Fn(&[Array]) -> Result<Vec<Array>>| {
        grad(|x| f(x)?[0].sum(&[], false), std::slice::from_ref(&x)).unwrap()
    };
    let compiled = compile(f);
    assert_eq!(pending_ops(&compiled.call(std::slice::from_ref(&x)).unwrap()), ["fused"]);
    assert_same("stopped", &of(&|x| compiled.call(x)), &of(&f));
}

#[test]
fn the_closure_runs_once_per_signature() {
    let calls = AtomicUsize::new(0);
    let f = compile(|x| {
        calls.fetch_add(1, Ordering::Relaxed);
        Ok(vec![(&x[0] * 2.0).exp()?])
    });
    let of = |rows: usize, dtype: Dtype| random(&[rows, 3], dtype, rows as u64);
    // (rows, dtype, traces after the call)
    for (step, (rows, dtype, traces)) in [
        (4, Dtype::F32, 1),
        (4, Dtype::F32, 1),
        (5, Dtype::F32, 2),
        (4, Dtype::BF16, 3),
        (5, Dtype::F32, 3),
        (4, Dtype::F32, 3),
    ]
    .into_iter()
    .enumerate()
    {
        let x = of(rows, dtype);
        let got = f.call(std::slice::from_ref(&x)).unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), traces, "step {step}");
        assert_same(&format!("step {step}"), &got, &[(&x * 2.0).exp().unwrap()]);
    }
    assert_eq!(f.signatures(), 3);
}

#[test]
fn a_shapeless_function_is_traced_once_for_all_sizes() {
    let plain = |x: &[Array]| -> Result<Vec<Array>> {
        let y = (&x[0] * &x[1]).silu()? * 2.0;
        Ok(vec![y.sum(&[-1], true)? + &y, y])
    };
    let calls = AtomicUsize::new(0);
    let f = compile(|x| {
        calls.fetch_add(1, Ordering::Relaxed);
        plain(x)
    })
    .shapeless();
    let loss = |y: Vec<Array>| y[0].multiply(&y[1])?.sum(&[], false);
    // (shapes, signatures after the call)
    let mut traced = (0, 0);
    for (x, row, signatures) in [
        (vec![4, 30], vec![30], 1),
        (vec![7, 30], vec![30], 1),
        (vec![2, 50], vec![50], 1),
        (vec![0, 9], vec![9], 2), // so does zero stand for itself
        (vec![1, 9], vec![9], 3), // a size of one broadcasts
        (vec![8, 8], vec![8], 4), // equal sizes can't be told apart
        (vec![3, 6], vec![1], 5),
        (vec![2, 3, 6], vec![6], 6), // another rank
        (vec![5, 11], vec![11], 6),
    ] {
        let name = format!("{x:?} with {row:?}");
        let inputs = [random(&x, Dtype::F32, 1), random(&row, Dtype::F32, 2)];
        assert_same(&name, &f.call(&inputs).unwrap(), &plain(&inputs).unwrap());
        assert_eq!(f.signatures(), signatures, "{name}");
        // A signature is traced on its own sizes and on others, once.
        let calls = calls.load(Ordering::Relaxed);
        assert_eq!(calls > traced.1, signatures > traced.0, "{name}: {calls} traces");
        traced = (signatures, calls);
        let through = grad(|x| loss(f.call(x)?), &inputs[..]).unwrap();
        for (got, eager) in through.iter().zip(grad(|x| loss(plain(x)?), &inputs[..]).unwrap()) {
            let (got, eager) = (got.to_vec::<f32>().unwrap(), eager.to_vec::<f32>().unwrap());
            // Sums of gradients in another order.
            let largest = eager.iter().fold(0f32, |top, value| top.max(value.abs()));
            mica_testkit::assert_close(&name, &got, &eager, 0.0, 4e-6 * largest);
        }
    }
    let error = f.call(&[Array::zeros(&[5, 4], Dtype::F32), Array::zeros(&[3], Dtype::F32)]).unwrap_err();
    assert!(error.to_string().contains("[3]"), "{error}");
}

type OfArrays = fn(&[Array]) -> Result<Array>;

#[test]
fn sizes_that_get_into_the_graph_are_formulas_of_the_inputs_sizes() {
    let cases: [(&str, OfArrays); 18] = [
        ("a mean", |x| (&x[0] * 2.0).exp()?.mean(&[0], false)),
        ("a variance of a sample", |x| x[0].var(&[0, 1], true, 1)),
        ("a size as a number", |x| (&x[0] * x[0].dim(0) as f64).exp()),
        ("a reshape", |x| (&x[0] * 2.0).exp()?.flatten()),
        ("a reshape that names sizes", |x| {
            let (rows, columns) = (x[0].dim(0) as i64, x[0].dim(1) as i64);
            x[0].reshape(&[columns, 1, rows])?.multiply(&x[0].transpose(&[1, 0])?.expand_dims(&[1])?)
        }),
        ("a range", |x| {
            (&x[0] * 2.0).add(Array::arange(0.0, x[0].dim(0) as f64, 1.0, Dtype::F32)?.expand_dims(&[1])?)
        }),
        ("a causal mask", |x| {
            let scores = x[0].matmul(&x[0].transpose(&[1, 0])?)?;
            let at = Array::arange(0.0, x[0].dim(0) as f64, 1.0, Dtype::I32)?;
            let seen = at.expand_dims(&[1])?.greater_equal(&at)?;
            Array::select(&seen, &scores, f32::NEG_INFINITY)?.softmax(-1)
        }),
        ("a slice off the end", |x| {
            x[0].narrow(0, 1, x[0].dim(0))?.add(x[0].narrow(0, 0, x[0].dim(0) - 1)?)
        }),
        ("backwards", |x| x[0].flip(&[0])?.cumsum(0, false, true)),
        ("twice as many", |x| Array::concatenate(&[x[0].clone(), x[0].exp()?], 0)),
        ("a captured list of places", |x| x[0].take(&Array::from_slice(&[2u32, 0], &[2])?, 1)),
        ("a captured weight", |x| x[0].matmul(&Array::full(&[3, 4], 0.5, Dtype::F32))?.tanh()),
        ("a column", |x| x[0].narrow(1, 1, 2)?.squeeze(&[1])),
        ("a sort", |x| x[0].argsort(0)?.astype(Dtype::F32)?.add(x[0].max(&[0], true)?)),
        ("a checkpoint", |x| {
            let inner = |y: &[Array]| Ok(vec![y[0].mean(&[0], true)?.subtract(&y[0])?.flatten()?]);
            checkpoint(inner, &x[..1])?.remove(0).tanh()
        }),
        ("a checkpoint that captures a range of the batch", |x| {
            let at = Array::arange(0.0, x[0].dim(0) as f64, 1.0, Dtype::F32)?.expand_dims(&[1])?;
            let inner = |y: &[Array]| Ok(vec![y[0].multiply(&at)?.multiply(1.0 / at.dim(0) as f64)?]);
            Ok(checkpoint(inner, &[x[0].exp()?])?.remove(0))
        }),
        ("a checkpoint in a checkpoint", |x| {
            let inner = |y: &[Array]| Ok(vec![y[0].narrow(0, 1, y[0].dim(0))?.sum(&[0], false)?]);
            let outer = |y: &[Array]| checkpoint(inner, &[y[0].sin()?]);
            Ok(checkpoint(outer, &x[..1])?.remove(0))
        }),
        ("a function with a rule", |x| {
            let scaled = custom_function(|x| Ok(vec![x[0].multiply(x[0].dim(0) as f64)?]))
                .with_vjp(|_, cotangents, _| Ok(vec![cotangents[0].minimum(1.0)?]));
            scaled.call(&x[..1])?.remove(0).add(1.0)
        }),
    ];
    for (name, f) in cases {
        let calls = AtomicUsize::new(0);
        let compiled = compile(|x| {
            calls.fetch_add(1, Ordering::Relaxed);
            Ok(vec![f(x)?])
        })
        .shapeless();
        let mut traces = None;
        for rows in [4, 7, 2, 19, 300] {
            let x = random(&[rows, 3], Dtype::F32, rows as u64);
            let got = compiled.call(std::slice::from_ref(&x)).unwrap();
            assert_same(&format!("{name}, {rows} rows"), &got, &[f(std::slice::from_ref(&x)).unwrap()]);
            let calls = calls.load(Ordering::Relaxed);
            assert_eq!(*traces.get_or_insert(calls), calls, "{name}: traced again for {rows} rows");
        }
        assert_eq!(compiled.signatures(), 1, "{name}");
    }
}

#[test]
fn sizes_without_a_formula_are_traced_for_each() {
    let cases: [(&str, OfArrays); 5] = [
        ("a logarithm of a size", |x| x[0].multiply((x[0].dim(0) as f64).ln())),
        ("a loop over a size", |x| {
            (0..x[0].dim(0)).try_fold(Array::zeros(&[3], Dtype::F32), |sum, row| {
                sum.tanh()?.add(x[0].narrow(0, row, row + 1)?.squeeze(&[0])?)
            })
        }),
        ("a decision by a size", |x| if x[0].dim(0) > 6 { x[0].exp() } else { x[0].sin() }),
        ("at most so many rows", |x| x[0].narrow(0, 0, x[0].dim(0).min(6))?.exp()),
        ("a constant of the program", |x| {
            let noise = random(&[x[0].dim(0), 3], Dtype::F32, 5);
            x[0].multiply(&noise)
        }),
    ];
    for (name, f) in cases {
        let compiled = compile(|x| Ok(vec![f(x)?])).shapeless();
        for rows in [4, 4, 5, 9, 4, 5] {
            let x = random(&[rows, 3], Dtype::F32, 1);
            let got = compiled.call(std::slice::from_ref(&x)).unwrap();
            assert_same(&format!("{name}, {rows} rows"), &got, &[f(std::slice::from_ref(&x)).unwrap()]);
        }
        assert_eq!(compiled.signatures(), 3, "{name}");
    }
}

#[test]
fn rules_reach_gradients_through_a_function_of_any_size() {
    // The gradient is cut off at a number of its own for each, so that the rules can be told apart.
    let clipped = |limit: f64| -> CustomFunction {
        custom_function(|x| Ok(vec![x[0].square()?.mean(&[0], false)?]))
            .with_vjp(move |x, cotangents, _| Ok(vec![x[0].multiply(cotangents[0].minimum(limit)?)?]))
    };
    let outside = clipped(0.5);
    let f = |x: &[Array]| {
        let rows = x[0].dim(0);
        let inner = |y: &[Array]| Ok(vec![y[0].exp()?.multiply(1.0 / rows as f64)?.tanh()?]);
        let y = checkpoint(inner, &x[..1])?.remove(0);
        outside.call(&[y])
    };
    let compiled = compile(f).shapeless();
    for rows in [4, 9, 2, 30] {
        let x = [random(&[rows, 3], Dtype::F32, rows as u64)];
        let loss = |y: Vec<Array>| y[0].multiply(2.0)?.sum(&[], false);
        let got = grad(|x| loss(compiled.call(x)?), &x).unwrap();
        assert_same(&format!("{rows} rows"), &got, &grad(|x| loss(f(x)?), &x).unwrap());
    }
    assert_eq!(compiled.signatures(), 1);

    // A rule that captured something is known again only if it is the same one.
    let calls = AtomicUsize::new(0);
    let made_anew = compile(|x| {
        calls.fetch_add(1, Ordering::Relaxed);
        clipped(x[0].dim(0) as f64 / 8.0).call(x)
    })
    .shapeless();
    for rows in [4, 9, 2] {
        let x = [random(&[rows, 3], Dtype::F32, rows as u64)];
        let loss = |y: Vec<Array>| y[0].multiply(2.0)?.sum(&[], false);
        let got = grad(|x| loss(made_anew.call(x)?), &x).unwrap();
        let eager = grad(|x| loss(clipped(rows as f64 / 8.0).call(x)?), &x).unwrap();
        assert_same(&format!("{rows} rows, a rule made anew"), &got, &eager);
    }
    assert_eq!(made_anew.signatures(), 3);
}

/// What is right for the sizes that were traced and wrong for others is an error there, as without compiling.
#[test]
fn a_slice_past_the_end_is_refused() {
    let slice: fn(&[Array]) -> Result<Vec<Array>> = |x| Ok(vec![x[0].narrow(0, 3, 6)?.exp()?]);
    check_slice(slice);
    check_slice(|x| checkpoint(|x| Ok(vec![x[0].narrow(0, 3, 6)?.exp()?]), x));
}

fn check_slice(f: fn(&[Array]) -> Result<Vec<Array>>) {
    let compiled = compile(f).shapeless();
    for (rows, fits) in [(8, true), (6, true), (12, true), (5, false), (2, false), (7, true)] {
        let x = random(&[rows, 2], Dtype::F32, 1);
        let (got, eager) = (compiled.call(std::slice::from_ref(&x)), f(std::slice::from_ref(&x)));
        assert_eq!((got.is_ok(), eager.is_ok()), (fits, fits), "{rows} rows");
        if let (Ok(got), Ok(eager)) = (got, eager) {
            assert_same("a slice", &got, &eager);
        }
    }
    assert_eq!(compiled.signatures(), 1);
}

#[test]
fn a_size_tied_to_a_weight_is_fixed_and_the_batch_is_free() {
    let weight = random(&[6, 8], Dtype::F32, 3);
    let plain = |x: &[Array]| {
        let (batch, length) = (x[0].dim(0) as i64, x[0].dim(1) as i64);
        let heads = x[0].matmul(&weight)?.reshape(&[batch, length, 2, 4])?.transpose(&[0, 2, 1, 3])?;
        let scores = heads.matmul(&heads.transpose(&[0, 1, 3, 2])?)?.multiply(0.5)?.softmax(-1)?;
        let mixed = scores.matmul(&heads)?.transpose(&[0, 2, 1, 3])?.reshape(&[batch, length, 8])?;
        Ok(vec![mixed.mean(&[1], false)?])
    };
    let compiled = compile(plain).shapeless();
    for (batch, length) in [(3, 5), (4, 5), (3, 7), (9, 2), (6, 11)] {
        let x = random(&[batch, length, 6], Dtype::F32, 1);
        let got = compiled.call(std::slice::from_ref(&x)).unwrap();
        assert_same("attention", &got, &plain(std::slice::from_ref(&x)).unwrap());
    }
    // 6 rows of width 6 are another pattern.
    assert_eq!(compiled.signatures(), 2);
    let loss = |y: Vec<Array>| y[0].square()?.sum(&[], false);
    let x = [random(&[5, 3, 6], Dtype::F32, 2)];
    let through = grad(|x| loss(compiled.call(x)?), &x[..]).unwrap();
    let eager = grad(|x| loss(plain(x)?), &x[..]).unwrap();
    let (got, eager) = (through[0].to_vec::<f32>().unwrap(), eager[0].to_vec::<f32>().unwrap());
    let largest = eager.iter().fold(0f32, |top, value| top.max(value.abs()));
    mica_testkit::assert_close("gradient", &got, &eager, 0.0, 4e-6 * largest);
}

#[test]
fn the_cache_is_bounded() {
    let calls = AtomicUsize::new(0);
    let f = compile(|x| {
        calls.fetch_add(1, Ordering::Relaxed);
        Ok(vec![&x[0] + 1.0])
    });
    for rows in 0..200 {
        f.call(&[Array::zeros(&[rows], Dtype::F32)]).unwrap();
    }
    assert_eq!(calls.load(Ordering::Relaxed), 200);
    assert!(f.signatures() <= 64, "{} plans are kept", f.signatures());
    f.call(&[Array::zeros(&[199], Dtype::F32)]).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 200, "the latest plan is kept");
    f.call(&[Array::zeros(&[0], Dtype::F32)]).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 201, "the oldest plan is gone");
}

#[test]
fn compiled_functions_nest() {
    let x = random(&[3, 70], Dtype::F32, 1);
    let inner = compile(|x| Ok(vec![(&x[0] * 2.0).tanh()?, &x[0] + 1.0]));
    let f = |x: &[Array], inner: &dyn Fn(&[Array]) -> Result<Vec<Array>>| {
        let y = inner(&[&x[0] * 0.5])?;
        Ok(vec![(&y[0] * &y[1]).exp()?])
    };
    let outer = compile(|x| f(x, &|y| inner.call(y)));
    let got = outer.call(std::slice::from_ref(&x)).unwrap();
    assert_eq!(pending_ops(&got), ["fused"], "the regions within are one");
    let plain = |x: &[Array]| Ok(vec![(&x[0] * 2.0).tanh()?, &x[0] + 1.0]);
    assert_same("nested", &got, &f(std::slice::from_ref(&x), &plain).unwrap());
}

#[test]
fn only_some_outputs_may_be_read() {
    let x = random(&[1000], Dtype::F32, 1);
    let f = compile(|x| {
        let y = (&x[0] * 2.0).tanh()?;
        Ok(vec![&y + 1.0, y.exp()?, y])
    });
    for kept in 0..3 {
        let mut outputs = f.call(std::slice::from_ref(&x)).unwrap();
        let output = outputs.swap_remove(kept);
        drop(outputs);
        let y = (&x * 2.0).tanh().unwrap();
        let expected = [&y + 1.0, y.exp().unwrap(), y.clone()][kept].clone();
        assert_same("one output", &[output], &[expected]);
    }
}

#[test]
fn a_dead_input_gives_its_memory_to_the_result() {
    let _turn = MEMORY.lock();
    let bytes = 1 << 22;
    let f = compile(|x| Ok(vec![((&x[0] * 1.5).tanh()? + &x[0]).abs()?]));
    let x = Array::from_slice(&vec![1.0f32; bytes / 4], &[bytes / 4]).unwrap();
    f.call(std::slice::from_ref(&x)).unwrap()[0].eval().unwrap();
    memory::reset_peak();
    let before = memory::active();
    // A chain of calls: the first result needs memory beside x, the others take it over.
    let mut y = x.clone();
    for _ in 0..20 {
        y = f.call(&[y]).unwrap().remove(0);
    }
    y.eval().unwrap();
    let grown = memory::peak() - before;
    assert!(grown < bytes * 5 / 4, "the chain took {grown} bytes beside its input of {bytes}");
}

#[test]
fn what_fails() {
    let x = random(&[3], Dtype::F32, 1);
    let reads = compile(|x| Ok(vec![&x[0] * x[0].sum(&[], false)?.item::<f32>()?]));
    let error = reads.call(std::slice::from_ref(&x)).unwrap_err().to_string();
    assert!(error.contains("compile traces it"), "{error}");
    let wrong = compile(|x| Ok(vec![x[0].add(&x[1])?]));
    let error = wrong.call(&[x.clone(), random(&[4], Dtype::F32, 2)]).unwrap_err().to_string();
    assert!(error.contains("[3]") && error.contains("[4]"), "{error}");
    let operator = compile(|x| Ok(vec![&x[0] + &x[1]]));
    let error = operator.call(&[x.clone(), random(&[4], Dtype::F32, 2)]).unwrap_err().to_string();
    assert!(error.contains("compile.rs"), "{error}");
    // A failure is not kept.
    assert!(wrong.call(&[x.clone(), x.clone()]).is_ok());
    let failed = &x + &random(&[4], Dtype::F32, 2);
    assert!(compile(|x| Ok(vec![x[0].clone()])).call(&[failed]).is_err());
}

#[test]
fn appending_to_a_store_is_refused() {
    let kv = KvSpec { layers: 1, kv_heads: 1, head_dim: 16, format: KvFormat::F32 };
    let mut store = KvCache::new(kv, 1);
    store.reserve(1).unwrap();
    let store = Mutex::new(store);
    let spec = PagedSpec { scale: 1.0, window: None, softcap: None, precision: Precision::Exact };
    let f = compile(|x| Ok(vec![store.lock().unwrap().attend(0, &x[0], &x[0], &x[0], spec)?]));
    let within = compile(|x| {
        let appends = |x: &[Array]| Ok(vec![store.lock().unwrap().attend(0, &x[0], &x[0], &x[0], spec)?]);
        checkpoint(appends, x)
    });
    let x = [random(&[1, 1, 1, 16], Dtype::F32, 1)];
    for error in [f.call(&x).unwrap_err().to_string(), within.call(&x).unwrap_err().to_string()] {
        assert!(error.contains("store") && error.contains("outside"), "{error}");
    }
}

#[test]
fn captured_arrays_are_computed_once_and_kept() {
    let w = (&random(&[64], Dtype::F32, 1) * 2.0).exp().unwrap();
    let f = compile(|x| Ok(vec![(&x[0] + &w).tanh()?]));
    let x = random(&[64], Dtype::F32, 2);
    let first = f.call(std::slice::from_ref(&x)).unwrap();
    assert!(pending_ops(&first).len() > 1, "w is not computed yet");
    let expected = (&x + &w).tanh().unwrap();
    assert_same("first", &first, std::slice::from_ref(&expected));
    let second = f.call(std::slice::from_ref(&x)).unwrap();
    assert_eq!(pending_ops(&second), ["fused"]);
    assert_same("second", &second, &[expected]);
}

#[test]
fn threads_may_call_one_compiled_function() {
    let f = compile(|x| Ok(vec![(&x[0] * 2.0).tanh()?]));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let f = &f;
            scope.spawn(move || {
                for round in 0..20 {
                    let x = random(&[1 + round % 5], Dtype::F32, thread * 100 + round as u64);
                    let got = f.call(std::slice::from_ref(&x)).unwrap();
                    assert_same("thread", &got, &[(&x * 2.0).tanh().unwrap()]);
                }
            });
        }
    });
    assert_eq!(f.signatures(), 5);
}

#[test]
fn a_long_chain_is_cut_into_regions() {
    let x = random(&[100], Dtype::F32, 1);
    let f = |x: &[Array]| {
        let mut y = x[0].clone();
        for step in 0..1000 {
            y = if step % 2 == 0 { y.sin()? } else { &y * 1.25 };
        }
        Ok(vec![y])
    };
    let got = compile(f).call(std::slice::from_ref(&x)).unwrap();
    let ops = pending_ops(&got);
    assert!(ops.len() < 20 && ops.iter().all(|&op| op == "fused"), "{ops:?}");
    assert_same("chain", &got, &f(std::slice::from_ref(&x)).unwrap());
}

#[test]
fn the_environment_turns_it_off() {
    let variable = "MICA_DISABLE_COMPILE";
    if std::env::var_os(variable).is_some() {
        let calls = AtomicUsize::new(0);
        let f = compile(|x| {
            calls.fetch_add(1, Ordering::Relaxed);
            Ok(vec![(&x[0] * 2.0).exp()?])
        });
        let x = random(&[3], Dtype::F32, 1);
        let got: Vec<Array> = (0..3).flat_map(|_| f.call(std::slice::from_ref(&x)).unwrap()).collect();
        assert_eq!(calls.load(Ordering::Relaxed), 3);
        assert!(!pending_ops(&got).contains(&"fused"));
        eval(&got).unwrap();
        return;
    }
    let this = std::env::current_exe().unwrap();
    let output = std::process::Command::new(this)
        .args(["--exact", "the_environment_turns_it_off"])
        .env(variable, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
