//! The dtypes of results: fixtures/mlx/promotion.json (fixtures/make/make_mlx.py made it).

use mica_array::{Array, Complex32, Dtype, Result};
use mica_testkit::fixture;
use serde_json::Value;

fn table() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture("mlx/promotion.json")).unwrap()).unwrap()
}

fn ones(dtype: &str, shape: &[usize]) -> Array {
    Array::ones(shape, Dtype::from_name(dtype).unwrap())
}

/// Compares the dtype of every result with the table's, where MLX gives one.
fn check(name: &str, expected: &Value, got: Result<Array>, wrong: &mut Vec<String>) {
    let expected = expected.as_str().unwrap();
    let got = match &got {
        Ok(array) => array.dtype().name().to_string(),
        Err(error) => format!("error: {error}"),
    };
    let same = if expected.starts_with("error") { got.starts_with("error") } else { got == expected };
    if !same {
        wrong.push(format!("{name}: {got}, MLX {expected}"));
    }
}

#[test]
fn dtypes_of_two_arrays() {
    let (table, mut wrong) = (table(), Vec::new());
    for (op, rows) in table["binary"].as_object().unwrap() {
        for (left, row) in rows.as_object().unwrap() {
            for (right, expected) in row.as_object().unwrap() {
                let shape: &[usize] = if op == "matmul" { &[1, 1] } else { &[1] };
                let (a, b) = (ones(left, shape), ones(right, shape));
                let got = match op.as_str() {
                    "add" => a.add(&b),
                    "subtract" => a.subtract(&b),
                    "multiply" => a.multiply(&b),
                    "divide" => a.divide(&b),
                    "floor_divide" => a.floor_divide(&b),
                    "power" => a.power(&b),
                    "remainder" => a.remainder(&b),
                    "maximum" => a.maximum(&b),
                    "less" => a.less(&b),
                    "matmul" => a.matmul(&b),
                    "where" => Array::select(&ones("bool", &[1]), &a, &b),
                    "logaddexp" => a.logaddexp(&b),
                    "arctan2" => a.arctan2(&b),
                    other => panic!("no such function: {other}"),
                };
                check(&format!("{op} of {left} and {right}"), expected, got, &mut wrong);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn dtypes_of_an_array_and_a_number() {
    let (table, mut wrong) = (table(), Vec::new());
    type Of = fn(&Array, &str) -> Result<Array>;
    macro_rules! with_number {
        ($method:ident) => {
            |x, number| match number {
                "True" => x.$method(true),
                "1" => x.$method(1),
                "-1" => x.$method(-1),
                "1.5" => x.$method(1.5),
                "1j" => x.$method(Complex32::new(0.0, 1.0)),
                other => panic!("no such number: {other}"),
            }
        };
    }
    let functions: [(&str, Of); 3] = [
        ("scalar_add", with_number!(add)),
        ("scalar_multiply_left", with_number!(multiply)),
        ("scalar_divide", with_number!(divide)),
    ];
    for (name, of) in functions {
        for (dtype, row) in table[name].as_object().unwrap() {
            for (number, expected) in row.as_object().unwrap() {
                let got = of(&ones(dtype, &[1]), number);
                check(&format!("{name} of {dtype} and {number}"), expected, got, &mut wrong);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn dtypes_of_functions_of_one_array() {
    let (table, mut wrong) = (table(), Vec::new());
    for (op, row) in table["unary"].as_object().unwrap() {
        for (dtype, expected) in row.as_object().unwrap() {
            let x = ones(dtype, &[2]);
            let got = match op.as_str() {
                "sum" => x.sum(&[], false),
                "mean" => x.mean(&[], false),
                "prod" => x.prod(&[], false),
                "max" => x.max(&[], false),
                "argmax" => x.argmax(None, false),
                "cumsum" => x.cumsum(None, false, true),
                "var" => x.var(&[], false, 0),
                "std" => x.std(&[], false, 0),
                "logsumexp" => x.logsumexp(-1, false),
                "softmax" => x.softmax(-1),
                "all" => x.all(&[], false),
                "exp" => x.exp(),
                "sqrt" => x.sqrt(),
                "rsqrt" => x.rsqrt(),
                "abs" => x.abs(),
                "negative" => x.negative(),
                "sign" => x.sign(),
                "square" => x.square(),
                "floor" => x.floor(),
                "round" => x.round(),
                "sigmoid" => x.sigmoid(),
                "erf" => x.erf(),
                "sin" => x.sin(),
                "reciprocal" => x.reciprocal(),
                "isnan" => x.isnan(),
                "logical_not" => x.logical_not(),
                "invert" => x.bitwise_invert(),
                "sort" => x.sort(-1),
                "argsort" => x.argsort(-1),
                other => panic!("no such function: {other}"),
            };
            check(&format!("{op} of {dtype}"), expected, got, &mut wrong);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
