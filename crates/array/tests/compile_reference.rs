//! Compiled functions on the reference backend. The backend is the process's, so this file has
//! one test.

use mica_array::backend::reference::Reference;
use mica_array::transforms::compile;
use mica_array::{Array, Dtype, set_backend};

mod cases;

#[test]
fn regions_on_the_reference_backend_agree_with_eager_ops() {
    // Made before the backend changes: inputs are values.
    let cases = cases::cases();
    let values = |array: &Array| array.astype(Dtype::F64).unwrap().to_vec::<f64>().unwrap();
    let cpu: Vec<Vec<Vec<f64>>> = cases
        .iter()
        .map(|case| compile(case.f).call(&case.inputs).unwrap().iter().map(values).collect())
        .collect();
    set_backend(Box::new(Reference));
    for (case, cpu) in cases.iter().zip(cpu) {
        let eager = (case.f)(&case.inputs).unwrap();
        let compiled = compile(case.f).call(&case.inputs).unwrap();
        for ((got, eager), cpu) in compiled.iter().zip(&eager).zip(&cpu) {
            let (got, eager) = (values(got), values(eager));
            // Both round after each op.
            let same =
                got.iter().zip(&eager).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
            assert!(same, "{}: {got:?} {eager:?}", case.name);
            // The CPU's functions differ from the reference's by units in the last place, which a
            // chain of half types turns into steps of theirs.
            let step = if case.inputs.iter().any(|input| input.dtype().size() < 4) { 0.04 } else { 2e-5 };
            for (a, b) in got.iter().zip(cpu) {
                let close = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= step * (1.0 + b.abs());
                assert!(close, "{}: {a} on the reference, {b} on the CPU", case.name);
            }
        }
    }
}
