//! The memory limit under every op. One test, because the limit is of the whole process.

use mica_array::{Array, Dtype, Error, eval, memory};

use cases::ops::op_cases;

mod cases;

/// The inputs of a case, in f32 and evaluated.
fn inputs_of(case: &cases::ops::OpCase) -> Vec<Array> {
    let inputs: Vec<Array> = case
        .inputs
        .iter()
        .map(|array| match array.dtype() {
            Dtype::F64 => array.astype(Dtype::F32).unwrap(),
            _ => array.clone(),
        })
        .collect();
    eval(&inputs).unwrap();
    inputs
}

#[test]
fn without_room_every_op_is_an_error_and_with_room_it_is_right_again() {
    let bits = |arrays: &[Array]| -> Vec<Vec<u64>> {
        let values = |array: &Array| array.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap();
        arrays.iter().map(|array| values(array).iter().map(|value| value.to_bits()).collect()).collect()
    };
    let mut refused = 0;
    for case in op_cases() {
        let inputs = inputs_of(&case);
        let expected = bits(&(case.f)(&inputs).unwrap());
        memory::clear_cache();
        let former = memory::set_limit(memory::active());
        let outcome = (case.f)(&inputs).and_then(|outputs| eval(&outputs).map(|()| outputs));
        memory::set_limit(former);
        match outcome {
            Err(Error::OutOfMemory { .. }) => refused += 1,
            Err(error) => panic!("{}: {error}", case.name),
            // A view needs no memory.
            Ok(outputs) => assert_eq!(bits(&outputs), expected, "{}", case.name),
        }
        assert_eq!(bits(&(case.f)(&inputs).unwrap()), expected, "{} afterwards", case.name);
    }
    assert!(refused > 100, "only {refused} ops needed memory");

    // What a task takes while it runs counts too. Before it has run: a backend keeps its workspace.
    let x = Array::arange(0.0, (1 << 21) as f64, 1.0, Dtype::F32).unwrap().sin().unwrap();
    x.eval().unwrap();
    let sorted = |x: &Array| x.argsort(0).unwrap().to_vec::<u32>();
    memory::clear_cache();
    let former = memory::set_limit(memory::active() + x.nbytes() + (1 << 20));
    let outcome = sorted(&x);
    memory::set_limit(former);
    assert!(matches!(outcome, Err(Error::OutOfMemory { .. })), "{:?}", outcome.map(|_| "computed"));
    let values = x.to_vec::<f32>().unwrap();
    assert!(sorted(&x).unwrap().windows(2).all(|pair| values[pair[0] as usize] <= values[pair[1] as usize]));
}
