//! The cases of fixtures/mlx/array.json and edges.json.

use std::collections::BTreeMap;

use mica_array::{Array, Dtype};
use mica_testkit::{Golden, fixture};
use serde_json::Value;

use crate::{call, compare};

/// One call with its inputs and what it gave.
pub(crate) struct Case {
    pub(crate) op: String,
    pub(crate) inputs: Vec<Array>,
    pub(crate) args: Value,
    /// The outputs, or nothing if MLX refused.
    pub(crate) outputs: Option<Vec<Array>>,
    pub(crate) name: String,
}

fn load(name: &str) -> Vec<Case> {
    let text = std::fs::read_to_string(fixture(format!("mlx/{name}.json"))).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let golden = Golden::load(fixture(format!("mlx/{name}.safetensors")));
    let array = |entry: &Value| {
        let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).unwrap();
        let dtype = Dtype::from_name(entry["dtype"].as_str().unwrap()).unwrap();
        Array::from_bytes(golden.bytes(entry["tensor"].as_str().unwrap()), &shape, dtype).unwrap()
    };
    let arrays = |list: &Value| list.as_array().unwrap().iter().map(array).collect::<Vec<Array>>();
    let case = |(number, case): (usize, &Value)| {
        let inputs = arrays(&case["inputs"]);
        let kinds: Vec<String> = inputs.iter().map(|x| format!("{}{:?}", x.dtype(), x.shape())).collect();
        let op = case["op"].as_str().unwrap().to_string();
        let label = case["label"].as_str().unwrap();
        Case {
            name: format!("#{number} {op} {label} of {} with {}", kinds.join(", "), case["args"]),
            op,
            inputs,
            args: case["args"].clone(),
            outputs: case.get("outputs").map(arrays),
        }
    };
    file["cases"].as_array().unwrap().iter().enumerate().map(case).collect()
}

/// Runs all cases of a file and fails with the ones that differ, a few of each function.
pub(crate) fn check_all(name: &str) {
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let cases = load(name);
    for case in cases.iter().filter(|case| !compare::is_slip(case)) {
        if let Err(message) = check(case) {
            wrong.entry(case.op.clone()).or_default().push(format!("{}: {message}", case.name));
        }
    }
    let count: usize = wrong.values().map(Vec::len).sum();
    let lines: Vec<&str> = wrong.values().flat_map(|list| list.iter().take(8)).map(String::as_str).collect();
    assert!(count == 0, "{count} of {} cases differ:\n{}", cases.len(), lines.join("\n"));
}

fn check(case: &Case) -> Result<(), String> {
    let got = call::call(case).and_then(|outputs| {
        outputs.iter().try_for_each(Array::eval)?;
        Ok(outputs)
    });
    match (&case.outputs, got) {
        (None, Err(_)) => Ok(()),
        (None, Ok(_)) if compare::takes_what_mlx_refuses(case) => Ok(()),
        (None, Ok(outputs)) => Err(format!("MLX refuses this, got {outputs:?}")),
        (Some(_), Err(error)) => Err(error.to_string()),
        (Some(expected), Ok(got)) => {
            if expected.len() != got.len() {
                return Err(format!("{} outputs, expected {}", got.len(), expected.len()));
            }
            got.iter().zip(expected).try_for_each(|(got, expected)| compare::same(case, got, expected))
        }
    }
}
