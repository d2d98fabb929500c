//! NaN checking. It is the process's, so this file has one test.

use mica_array::transforms::compile;
use mica_array::{Array, Error, eval, set_check_nan};

#[test]
fn the_first_op_that_makes_a_nan_is_named() {
    let before = set_check_nan(true);
    let x = Array::from_slice(&[1.0f32, -1.0], &[2]).unwrap();
    let error = x.log().unwrap().exp().unwrap().add(1.0).unwrap().eval().unwrap_err();
    assert!(matches!(error, Error::Nan { op: "log", .. }), "{error}");
    assert!(
        error.to_string().contains("1 of the 2 elements of output 0, float32[2], are NaN; no input had one"),
        "{error}"
    );
    let given = Array::from_slice(&[f32::NAN, 1.0], &[2]).unwrap();
    let error = given.exp().unwrap().eval().unwrap_err();
    assert!(error.to_string().contains("input 0 had one already"), "{error}");
    let fused = compile(|x: &[Array]| Ok(vec![(&x[0] * 2.0).sqrt()? + 1.0]));
    let error = eval(&fused.call(std::slice::from_ref(&x)).unwrap()).unwrap_err();
    assert!(error.to_string().contains("fused(") && error.to_string().contains("sqrt"), "{error}");
    // Infinities, NaNs that a selection drops, and integers are nothing to complain of.
    let fine = Array::select(&x.greater(0.0).unwrap(), &x, 0.0).unwrap().log().unwrap();
    assert_eq!(fine.to_vec::<f32>().unwrap(), [0.0, f32::NEG_INFINITY]);
    set_check_nan(before);
    assert!(x.log().unwrap().to_vec::<f32>().unwrap()[1].is_nan());
}
