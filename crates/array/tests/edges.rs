//! Sizes at the end of the number range, and values at the edge of what an op is defined for. Expected values are MLX's.

use mica_array::conv::conv1d;
use mica_array::fast::{AttentionMask, layer_norm, scaled_dot_product_attention};
use mica_array::transforms::grad;
use mica_array::{Array, Dtype, Error, PadMode, Result};

fn f32s(values: &[f32]) -> Array {
    Array::from_slice(values, &[values.len()]).unwrap()
}

fn values(array: &Array) -> Vec<f32> {
    array.astype(Dtype::F32).unwrap().to_vec().unwrap()
}

#[test]
fn what_is_larger_than_memory_can_be_is_an_error() {
    let huge = 1usize << 62;
    let x = f32s(&[1.0, 2.0]);
    let square = Array::from_slice(&[0f32; 16], &[16]).unwrap();
    let image = Array::zeros(&[1, 4, 1], Dtype::F32);
    let taps = Array::zeros(&[1, 2, 1], Dtype::F32);
    let cases: Vec<(&str, Result<Array>)> = vec![
        ("zeros whose size wraps to nothing", Ok(Array::zeros(&[huge, 4], Dtype::F32))),
        ("zeros whose bytes wrap", Ok(Array::zeros(&[huge], Dtype::F32))),
        ("their sum", Array::zeros(&[huge / 2, 2], Dtype::F32).sum(&[], false)),
        ("more bytes than addresses", Ok(Array::zeros(&[huge / 4], Dtype::F32))),
        ("reshape of nothing", Array::zeros(&[0], Dtype::F32).reshape(&[1 << 32, 1 << 32])),
        ("reshape", x.reshape(&[i64::MAX, i64::MAX, -1])),
        ("reshape to a product that wraps to two", x.reshape(&[1 << 63 >> 62, i64::MIN])),
        ("unflatten", x.unflatten(0, &[1 << 32, 1 << 32, 2])),
        ("broadcast", Array::zeros(&[1], Dtype::F32).broadcast_to(&[huge, 8])),
        ("repeat", x.repeat(1 << 63, 0)),
        ("tile", x.tile(&[1 << 63])),
        ("diag", x.diag((1 << 32) - 2)),
        ("diag backwards", x.diag(i64::MIN)),
        ("slice_update", square.slice_update(&square, &[usize::MAX - 15])),
        ("pad", x.pad(&[(usize::MAX, 0)], PadMode::Constant(0.0))),
        ("pad on both sides", x.pad(&[(huge, huge)], PadMode::Constant(0.0))),
        ("pad with the edge", x.pad(&[(huge, 1)], PadMode::Edge)),
        ("conv padding", conv1d(&image, &taps, [1], [usize::MAX], [1], 1)),
        ("conv dilation", conv1d(&image, &taps, [1], [0], [usize::MAX], 1)),
        ("split", x.split_sizes(&[usize::MAX, 3], 0).map(|parts| parts[0].clone())),
    ];
    for (name, outcome) in cases {
        let error = outcome.and_then(|array| array.eval()).expect_err(name);
        let clear = matches!(error, Error::Invalid { .. } | Error::OutOfMemory { .. });
        assert!(clear, "{name}: {error:?}");
    }
    // And all goes on as before.
    assert_eq!(values(&x.add(1).unwrap()), [2.0, 3.0]);
}

#[test]
fn numbers_that_a_dtype_has_not_are_an_error() {
    let x = Array::from_slice(&[1u8, 255], &[2]).unwrap();
    for (name, outcome) in [
        ("add", x.add(300)),
        ("add below zero", x.add(-1)),
        ("equal", x.equal(300)),
        ("less", Array::from_slice(&[7i32], &[1]).unwrap().less(3_000_000_000i64)),
    ] {
        let error = outcome.expect_err(name).to_string();
        assert!(error.contains("the number"), "{name}: {error}");
    }
    assert_eq!(x.add(255).unwrap().to_vec::<u8>().unwrap(), [0, 254], "wraps as integers do");
    let wide = Array::from_slice(&[1u64], &[1]).unwrap();
    assert_eq!(wide.maximum(usize::MAX).unwrap().to_vec::<u64>().unwrap(), [u64::MAX]);
    let error = f32s(&[1.0, 2.0, 3.0]).take(&Array::from_slice(&[u64::MAX], &[1]).unwrap(), None);
    let error = error.and_then(|array| array.eval()).unwrap_err().to_string();
    assert!(error.contains("18446744073709551615"), "{error}");
}

#[test]
fn statistics_of_odd_data() {
    let nan = f32::NAN;
    assert!(values(&f32s(&[1.0, nan, 2.0]).median(&[], false).unwrap())[0].is_nan());
    assert!(values(&f32s(&[1.0, nan, 2.0, 5.0]).median(&[], false).unwrap())[0].is_nan());
    assert_eq!(values(&f32s(&[1.0, 7.0, 2.0]).median(&[], false).unwrap()), [2.0]);
    assert_eq!(values(&f32s(&[1.0, 2.0]).var(&[], false, 3).unwrap()), [f32::INFINITY]);
    assert_eq!(Array::zeros(&[2, 0], Dtype::F32).softmax(-1).unwrap().shape(), [2, 0]);
    let range = Array::arange(0.0, 3.0, 1.0, Dtype::C64).unwrap();
    assert_eq!((range.dtype(), values(&range.real().unwrap())), (Dtype::C64, vec![0.0, 1.0, 2.0]));
}

#[test]
fn the_gradient_of_a_running_extreme_is_that_of_the_element_that_it_is() {
    type Scan = fn(&Array, bool, bool) -> Result<Array>;
    let (max, min): (Scan, Scan) = (|x, r, i| x.cummax(0, r, i), |x, r, i| x.cummin(0, r, i));
    let of = |f: Scan, x: &[f32], reverse: bool, inclusive: bool| -> Vec<f32> {
        let weights = Array::arange(1.0, 1.0 + x.len() as f64, 1.0, Dtype::F32).unwrap();
        let loss = |x: &[Array]| f(&x[0], reverse, inclusive)?.multiply(&weights)?.sum(&[], false);
        values(&grad(loss, &[f32s(x)]).unwrap()[0])
    };
    let x = [1.0, 3.0, 3.0, 2.0, 5.0];
    assert_eq!(of(max, &x, false, true), [1.0, 2.0, 7.0, 0.0, 5.0]);
    assert_eq!(of(max, &x, false, false), [2.0, 3.0, 9.0, 0.0, 0.0]);
    assert_eq!(of(max, &x, true, true), [0.0, 0.0, 0.0, 0.0, 15.0]);
    assert_eq!(of(max, &x, true, false), [0.0, 0.0, 0.0, 0.0, 10.0]);
    assert_eq!(of(min, &x, false, true), [15.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(of(min, &x, false, false), [14.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(of(min, &x, true, true), [1.0, 0.0, 0.0, 9.0, 5.0]);
    assert_eq!(of(min, &x, true, false), [0.0, 0.0, 0.0, 6.0, 4.0]);
}

#[test]
fn a_query_that_sees_no_key_gets_the_mean_of_the_values() {
    let array = |from: f64, shape: &[i64]| {
        let size: i64 = shape.iter().product();
        let line = Array::arange(0.0, size as f64, 1.0, Dtype::F32).unwrap();
        line.multiply(0.3).unwrap().add(from).unwrap().sin().unwrap().reshape(shape).unwrap()
    };
    let (q, k, v) = (array(0.1, &[1, 2, 3, 4]), array(0.2, &[1, 2, 2, 4]), array(0.3, &[1, 2, 2, 4]));
    let mean = values(&v.mean(&[2], false).unwrap());
    let seen = Array::from_slice(&[true, false, false, false, true, true], &[3, 2]).unwrap();
    for (name, mask, row) in [("bool", AttentionMask::Array(&seen), 1), ("causal", AttentionMask::Causal, 0)]
    {
        let out = scaled_dot_product_attention(&q, &k, &v, 0.5, mask, None).unwrap();
        let got = values(&out.narrow(2, row, row + 1).unwrap());
        mica_testkit::assert_close(name, &got, &mean, 1e-6, 1e-6);
    }
}

#[test]
fn layer_norm_of_doubles_is_computed_in_doubles() {
    let x = Array::from_slice(&[1.0f64, 2.0, 4.0, 1e9], &[2, 2]).unwrap();
    let y = layer_norm(&x, None, None, 0.0).unwrap().to_vec::<f64>().unwrap();
    assert!(y.iter().zip([-1.0, 1.0, -1.0, 1.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{y:?}");
}
