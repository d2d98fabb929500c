//! Everything of `mlx.nn` and `mlx.optimizers` against values that the `mlx` package computed
//! (fixtures/make/make_nn.py, fixtures/make/make_optimizers.py).

mod functions;
mod layers;
mod optimizers;

use std::collections::BTreeSet;

use mica_array::{Array, Dtype};
use mica_testkit::{Golden, fixture};

fn golden() -> Golden {
    Golden::load(fixture("mlx/nn.safetensors"))
}

/// The cases of a family, as `relu` for `act.relu.y`.
fn cases(golden: &Golden, family: &str) -> BTreeSet<String> {
    let rest = golden.names().filter_map(|name| name.strip_prefix(family)?.strip_prefix('.'));
    rest.filter_map(|rest| Some(rest.split_once('.')?.0.to_string())).collect()
}

/// Fails unless the cases of a family are exactly those that were run.
fn assert_all_ran(golden: &Golden, family: &str, ran: &[&str]) {
    let ran: BTreeSet<String> = ran.iter().map(|name| name.to_string()).collect();
    assert_eq!(ran, cases(golden, family), "cases of {family}: those run, those in the file");
}

fn array(golden: &Golden, name: &str) -> Array {
    let shape = golden.shape(name);
    match golden.dtype(name) {
        "F32" => Array::from_slice(&golden.f32s(name), shape),
        "BF16" => Array::from_slice(&golden.f32s(name), shape).and_then(|array| array.astype(Dtype::BF16)),
        "U32" => Array::from_slice(&golden.u32s(name), shape),
        "U8" => {
            let bytes: Vec<u8> = golden.i64s(name).into_iter().map(|value| value as u8).collect();
            Array::from_slice(&bytes, shape)
        }
        "BOOL" => {
            let bits: Vec<bool> = golden.i64s(name).into_iter().map(|value| value != 0).collect();
            Array::from_slice(&bits, shape)
        }
        _ => {
            let values: Vec<i32> = golden.i64s(name).into_iter().map(|value| value as i32).collect();
            Array::from_slice(&values, shape)
        }
    }
    .unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Fails unless shape and dtype are equal and values differ by at most `tolerance` of the largest
/// expected one (of 1, if all are smaller: gradients that cancel are rounding noise around 0).
#[track_caller]
fn assert_matches(golden: &Golden, name: &str, actual: &Array, tolerance: f32) {
    assert_eq!(actual.shape(), golden.shape(name), "{name}: shape");
    assert_eq!(actual.dtype(), array(golden, name).dtype(), "{name}: dtype");
    if actual.dtype() == Dtype::U32 {
        assert_eq!(actual.to_vec::<u32>().unwrap(), golden.u32s(name), "{name}");
        return;
    }
    let actual = actual.astype(Dtype::F32).and_then(|x| x.to_vec::<f32>());
    let actual = actual.unwrap_or_else(|error| panic!("{name}: {error}"));
    let expected = golden.f32s(name);
    let largest = expected.iter().filter(|x| x.is_finite()).fold(1.0f32, |a, b| a.max(b.abs()));
    mica_testkit::assert_close(name, &actual, &expected, 0.0, tolerance * largest);
}
