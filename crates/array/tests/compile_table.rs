//! Compiled functions against eager ones, on the table of all ops.

use mica_array::transforms::{compile, vmap};
use mica_array::{Array, Dtype};

use cases::ops::op_cases;

mod cases;

fn in_f32(array: &Array) -> Array {
    let array = if array.dtype() == Dtype::F64 { array.astype(Dtype::F32).unwrap() } else { array.clone() };
    array.eval().unwrap();
    array
}

fn check_bits(name: &str, got: &[Array], expected: &[Array]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!((got.shape(), got.dtype()), (expected.shape(), expected.dtype()), "{name}");
        let values = |array: &Array| array.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap();
        let (got, expected) = (values(got), values(expected));
        let same =
            got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
        assert!(same, "{name}: {got:?}, expected {expected:?}");
    }
}

#[test]
fn compiled_is_eager_bit_for_bit() {
    for case in op_cases() {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        let compiled = compile(case.f);
        for _ in 0..2 {
            let got = compiled.call(&inputs).unwrap_or_else(|error| panic!("{}: {error}", case.name));
            check_bits(case.name, &got, &(case.f)(&inputs).unwrap());
        }
        assert_eq!(compiled.signatures(), 1, "{}", case.name);
    }
}

#[test]
fn a_changing_batch_is_right_and_is_not_traced_again() {
    let mut traced_for_each = Vec::new();
    for case in op_cases() {
        let inputs: Vec<Array> = case.inputs.iter().map(in_f32).collect();
        let mapped = |x: &[Array]| vmap(case.f, x, &[Some(0)], &[Some(0)]);
        let compiled = compile(mapped).shapeless();
        // None is equal to another size of a case.
        for batch in [11, 13, 17, 40] {
            let stacked: Vec<Array> =
                inputs.iter().map(|input| Array::stack(&vec![input.clone(); batch], 0).unwrap()).collect();
            let got = compiled.call(&stacked).unwrap_or_else(|error| panic!("{}: {error}", case.name));
            check_bits(case.name, &got, &mapped(&stacked).unwrap());
        }
        if compiled.signatures() > 1 {
            traced_for_each.push(case.name);
        }
    }
    assert!(traced_for_each.is_empty(), "these are traced for each batch: {traced_for_each:?}");
}
