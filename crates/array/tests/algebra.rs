//! Products, convolutions, Fourier transforms, linear algebra, quantized arrays, fused functions and
//! complex numbers against `mlx`, on the CPU backend.

mod algebra_cases;

use mica_array::quantized::{QuantMode, QuantSpec, QuantizedArray, gather_qqmm, qqmm, qqmm_floats, quantize};
use mica_array::transforms::{grad, jvp};
use mica_array::{Array, Dtype};
use mica_testkit::{Rng, assert_close};

#[test]
fn functions_are_those_of_mlx() {
    algebra_cases::check_all("algebra");
}

#[test]
fn every_dtype_and_edge_shape_gives_what_mlx_gives() {
    algebra_cases::check_all("algebra_edges");
}

fn normal(shape: &[usize], seed: u64) -> Array {
    let mut rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal()).collect();
    Array::from_slice(&values, shape).unwrap()
}

fn assert_same(name: &str, got: &Array, expected: &Array) {
    assert_eq!((got.shape(), got.dtype()), (expected.shape(), expected.dtype()), "{name}");
    let values = |x: &Array| x.astype(Dtype::F32).unwrap().to_vec::<f32>().unwrap();
    assert_close(name, &values(got), &values(expected), 1e-5, 1e-5);
}

/// The `mlx` package runs these products on GPUs only; its documentation says what they are.
#[test]
fn products_of_two_quantized_sides_are_products_of_what_the_codes_say() {
    for (mode, group) in [(QuantMode::Nvfp4, 16), (QuantMode::Mxfp8, 32)] {
        let format = QuantSpec::usual(mode);
        let round = |x: &Array, scale: Option<&Array>| {
            quantize(x, format, scale).unwrap().dequantize(Some(Dtype::F32)).unwrap()
        };
        let product = |a: &Array, b: &Array| a.matmul(&b.swap_axes(-1, -2).unwrap()).unwrap();
        let (x, w, ct) = (normal(&[2, group, 64], 1), normal(&[32, 64], 2), normal(&[2, group, 32], 3));
        let expected = product(&round(&x, None), &round(&w, None));
        let codes = quantize(&w, format, None).unwrap();
        assert_same("codes", &qqmm(&x, &codes, None).unwrap(), &expected);
        assert_same("floats", &qqmm_floats(&x, &w, format, None).unwrap(), &expected);
        let vector = x.reshape(&[-1, 64]).unwrap().narrow(0, 0, 1).unwrap().squeeze(&[0]).unwrap();
        let first = expected.reshape(&[-1, 32]).unwrap().narrow(0, 0, 1).unwrap().squeeze(&[0]).unwrap();
        assert_same("a vector", &qqmm(&vector, &codes, None).unwrap(), &first);

        // The gradients are such products of the cotangent, as MLX forms them.
        let loss = |y: &[Array]| qqmm_floats(&y[0], &y[1], format, None)?.multiply(&ct)?.sum(&[], false);
        let grads = grad(loss, &[x.clone(), w.clone()]).unwrap();
        let turned = |x: &Array| x.reshape(&[-1, x.dim(-1) as i64]).unwrap().transpose(&[]).unwrap();
        assert_same("dx", &grads[0], &product(&round(&ct, None), &round(&turned(&w), None)));
        assert_same("dw", &grads[1], &product(&round(&turned(&ct), None), &round(&turned(&x), None)));
        let tangent = jvp(
            |y| Ok(vec![qqmm_floats(&y[0], &w, format, None)?]),
            std::slice::from_ref(&x),
            std::slice::from_ref(&x),
        );
        assert!(tangent.unwrap_err().to_string().contains("no tangents"));
        let through_codes = grad(|y| qqmm(&y[0], &codes, None)?.sum(&[], false), std::slice::from_ref(&x));
        assert!(through_codes.unwrap_err().to_string().contains("no gradient"));

        let many = normal(&[3, 32, 64], 4);
        let codes = quantize(&many, format, None).unwrap();
        let (left, right) = (indices(&[1, 0]), indices(&[2, 0]));
        let got = gather_qqmm(&x, &codes, Some(&left), Some(&right), None, false).unwrap();
        let pick = |array: Array, places: &Array| array.take(places, 0).unwrap();
        let gathered = product(&pick(round(&x, None), &left), &pick(round(&many, None), &right));
        assert_same("gathered", &got, &gathered);

        if mode == QuantMode::Nvfp4 {
            let largest = |x: &Array| x.abs().unwrap().max(&[], false).unwrap();
            let (gx, gw, gc) = (largest(&x), largest(&w), largest(&ct));
            let codes = quantize(&w, format, Some(&gw)).unwrap();
            let expected = product(&round(&x, Some(&gx)), &round(&w, Some(&gw)));
            assert_same("global scales", &qqmm(&x, &codes, Some(&gx)).unwrap(), &expected);
            assert!(qqmm(&x, &codes, None).unwrap_err().to_string().contains("both global scales"));
            let loss = |y: &[Array]| {
                qqmm_floats(&y[0], &y[1], format, Some([&gx, &gw]))?.multiply(&ct)?.sum(&[], false)
            };
            let grads = grad(loss, &[x.clone(), w.clone()]).unwrap();
            let dx = product(&round(&ct, Some(&gc)), &round(&turned(&w), Some(&gw)));
            assert_same("dx with global scales", &grads[0], &dx);
            let dw = product(&round(&turned(&ct), Some(&gc)), &round(&turned(&x), Some(&gx)));
            assert_same("dw with global scales", &grads[1], &dw);
            // One scale per matrix.
            let each: Vec<Array> = (0..3).map(|i| pick(many.clone(), &indices(&[i]))).collect();
            let scales: Vec<Array> = each.iter().map(largest).collect();
            let parts: Vec<QuantizedArray> = each
                .iter()
                .zip(&scales)
                .map(|(w, scale)| quantize(w, format, Some(scale)).unwrap())
                .collect();
            let joined = |part: fn(&QuantizedArray) -> &Array| {
                let all: Vec<Array> = parts.iter().map(|one| part(one).clone()).collect();
                Array::concatenate(&all, 0).unwrap()
            };
            let (words, scale_codes) = (joined(|one| &one.words), joined(|one| &one.scales));
            let codes = QuantizedArray::new(words, scale_codes, None, format, None).unwrap();
            let all = Array::stack(&scales, 0).unwrap();
            let got = gather_qqmm(&x, &codes, Some(&left), Some(&right), Some([&gx, &all]), false).unwrap();
            let rounded: Vec<Array> =
                each.iter().zip(&scales).map(|(w, scale)| round(w, Some(scale))).collect();
            let rounded = pick(Array::concatenate(&rounded, 0).unwrap(), &right);
            let expected = product(&pick(round(&x, Some(&gx)), &left), &rounded);
            assert_same("gathered with global scales", &got, &expected);
        }
    }
    let affine = QuantSpec::usual(QuantMode::Affine);
    let error = qqmm_floats(&normal(&[2, 64], 5), &normal(&[4, 64], 6), affine, None).unwrap_err();
    assert!(error.to_string().contains("nvfp4 or mxfp8"), "{error}");
}

fn indices(values: &[u32]) -> Array {
    Array::from_slice(values, &[values.len()]).unwrap()
}
