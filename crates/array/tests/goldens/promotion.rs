//! The dtypes of results: fixtures/mlx/promotion.json (fixtures/make/make_mlx.py made it).

use mica_array::{Array, Complex32, Dtype, Result};
use mica_testkit::fixture;
use serde_json::Value;

fn table() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture("mlx/promotion.json")).unwrap()).unwrap()
}

/// The table's names are short.
const NAMES: [(&str, Dtype); 14] = [
    ("bool", Dtype::Bool),
    ("u8", Dtype::U8),
    ("u16", Dtype::U16),
    ("u32", Dtype::U32),
    ("u64", Dtype::U64),
    ("i8", Dtype::I8),
    ("i16", Dtype::I16),
    ("i32", Dtype::I32),
    ("i64", Dtype::I64),
    ("f16", Dtype::F16),
    ("bf16", Dtype::BF16),
    ("f32", Dtype::F32),
    ("f64", Dtype::F64),
    ("complex64", Dtype::C64),
];

fn ones(name: &str, shape: &[usize]) -> Array {
    let (_, dtype) = NAMES.iter().find(|(known, _)| *known == name).expect("a dtype of the table");
    Array::ones(shape, *dtype)
}

fn name_of(dtype: Dtype) -> &'static str {
    NAMES.iter().find(|(_, known)| *known == dtype).expect("all dtypes have names").0
}

/// Compares the dtype of every result with the table's, where MLX gives one.
fn check(name: &str, expected: &Value, got: Result<Array>, wrong: &mut Vec<String>) {
    let expected = expected.as_str().unwrap();
    let got = match &got {
        Ok(array) => name_of(array.dtype()).to_string(),
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
                "1j" => x.$method(Complex32 { re: 0.0, im: 1.0 }),
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
