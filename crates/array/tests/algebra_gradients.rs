//! Gradients of products, convolutions, Fourier transforms and linear algebra against central
//! differences, in f64 where the op has it.

use mica_array::conv::{self, ConvNd};
use mica_array::fast::{self, AttentionMask, RopeBase, RopeOffset};
use mica_array::fft::{self, Norm};
use mica_array::quantized::{self, QuantSpec};
use mica_array::transforms::grad;
use mica_array::{Array, Complex32, Dtype, Result, einsum, linalg};
use mica_testkit::Rng;

fn normal(shape: &[usize], seed: u64) -> Array {
    let mut rng = Rng::new(seed);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.normal() as f64).collect();
    Array::from_slice(&values, shape).unwrap()
}

/// Compares the gradient of Σ f(x) · r, r random, with differences extrapolated to the fourth order:
/// their error is below 1e-7 in f64; in f32 ops it is rounding, below 4e-3.
fn check_within(name: &str, inputs: &[Array], step: f64, bound: f64, f: impl Fn(&[Array]) -> Result<Array>) {
    let projected = |x: &[Array]| -> Result<Array> {
        let y = f(x)?;
        let weights = normal(y.shape(), 99).astype(y.dtype())?;
        y.multiply(weights)?.astype(Dtype::F64)?.sum(&[], false)
    };
    let grads = grad(|x| projected(x), inputs).unwrap_or_else(|error| panic!("{name}: {error}"));
    for (index, gradient) in grads.iter().enumerate() {
        assert_eq!(gradient.shape(), inputs[index].shape(), "{name}: input {index}");
        let got = gradient.to_vec::<f64>().unwrap_or_else(|error| panic!("{name}: {error}"));
        let base = inputs[index].to_vec::<f64>().unwrap();
        let at = |place: usize, delta: f64| {
            let mut moved = base.clone();
            moved[place] += delta;
            let mut all = inputs.to_vec();
            all[index] = Array::from_slice(&moved, inputs[index].shape()).unwrap();
            projected(&all).unwrap().item::<f64>().unwrap()
        };
        let largest = got.iter().fold(1e-3, |top: f64, value| top.max(value.abs()));
        for place in (0..base.len()).step_by(1 + base.len() / 13) {
            let coarse = (at(place, step) - at(place, -step)) / (2.0 * step);
            let fine = (at(place, step / 2.0) - at(place, -step / 2.0)) / step;
            let expected = (4.0 * fine - coarse) / 3.0;
            assert!(
                (got[place] - expected).abs() <= bound * largest.max(expected.abs()),
                "{name}: input {index}, element {place}: gradient {}, difference {expected}",
                got[place]
            );
        }
    }
}

fn check(name: &str, inputs: &[Array], f: impl Fn(&[Array]) -> Result<Array>) {
    check_within(name, inputs, 1e-3, 1e-7, f);
}

/// For ops that compute in f32 whatever they get.
fn check_f32(name: &str, inputs: &[Array], f: impl Fn(&[Array]) -> Result<Array>) {
    check_within(name, inputs, 2e-2, 4e-3, f);
}

fn u32s(values: &[u32], shape: &[usize]) -> Array {
    Array::from_slice(values, shape).unwrap()
}

#[test]
fn products() {
    let (a, b) = (normal(&[2, 3, 4], 1), normal(&[2, 4, 5], 2));
    check("matmul", &[a.clone(), b.clone()], |x| x[0].matmul(&x[1]));
    check("addmm", &[normal(&[5], 3), a.clone(), b.clone()], |x| x[0].addmm(&x[1], &x[2], 0.5, 2.0));
    check("inner", &[a.clone(), normal(&[3, 4], 4)], |x| x[0].inner(&x[1]));
    check("kron", &[normal(&[2, 2], 5), normal(&[3], 6)], |x| x[0].kron(&x[1]));
    check("tensordot", &[a.clone(), normal(&[4, 3, 2], 7)], |x| x[0].tensordot(&x[1], &[1, 2], &[1, 0]));
    check("einsum", &[a.clone(), b.clone(), normal(&[5, 3], 8)], |x| einsum("bij,bjk,kl->li", x));
    check("einsum, diagonal", &[normal(&[3, 3], 9), normal(&[3, 2], 10)], |x| einsum("ii,ij->j", x));
    check("gather_mm", &[a.clone(), normal(&[3, 4, 5], 11)], |x| {
        x[0].gather_mm(&x[1], Some(&u32s(&[1, 0, 1], &[3])), Some(&u32s(&[2, 2, 0], &[3])), false)
    });
    check("gather_mm, runs", &[normal(&[5, 1, 4], 12), normal(&[3, 4, 2], 13)], |x| {
        x[0].gather_mm(&x[1], None, Some(&u32s(&[0, 0, 1, 2, 2], &[5])), true)
    });
    check("segmented_mm", &[normal(&[3, 7], 14), normal(&[7, 2], 15)], |x| {
        x[0].segmented_mm(&x[1], &u32s(&[0, 3, 2, 7, 4, 4], &[3, 2]))
    });
    let keep = Array::from_slice(&[true, false, false, true, true, true], &[2, 3]).unwrap();
    check("block_masked_mm", &[normal(&[40, 70], 16), normal(&[70, 3], 17)], |x| {
        x[0].block_masked_mm(&x[1], 32, None, Some(&keep), None)
    });
    for n in [8, 12, 40, 56] {
        check("hadamard_transform", &[normal(&[2, n], 18)], |x| x[0].hadamard_transform(None));
    }
}

#[test]
fn convolutions() {
    let spec = |edit: fn(&mut ConvNd), dimensions: usize| {
        let mut spec = ConvNd::new(dimensions);
        edit(&mut spec);
        spec
    };
    let cases: Vec<(&str, Vec<usize>, Vec<usize>, ConvNd)> = vec![
        ("plain", vec![2, 7, 3], vec![4, 3, 3], spec(|_| {}, 1)),
        (
            "stride and padding",
            vec![2, 8, 2],
            vec![3, 3, 2],
            spec(|s| (s.stride[0], s.low[0], s.high[0]) = (2, 1, 2), 1),
        ),
        ("dilated", vec![1, 9, 2], vec![3, 3, 2], spec(|s| (s.kernel_dilation[0], s.low[0]) = (2, 3), 1)),
        ("groups", vec![2, 6, 4], vec![6, 2, 2], spec(|s| (s.groups, s.high[0]) = (2, 1), 1)),
        ("depthwise", vec![2, 6, 4], vec![4, 3, 1], spec(|s| (s.groups, s.low[0]) = (4, 1), 1)),
        (
            "flipped",
            vec![1, 6, 2],
            vec![3, 3, 2],
            spec(|s| (s.flip, s.low[0], s.stride[0]) = (true, 1, 2), 1),
        ),
        (
            "dilated input",
            vec![1, 4, 4],
            vec![2, 3, 2],
            spec(|s| (s.input_dilation[0], s.groups, s.low[0], s.high[0]) = (3, 2, 2, -1), 1),
        ),
        ("cut", vec![1, 9, 2], vec![2, 2, 2], spec(|s| (s.low[0], s.high[0], s.stride[0]) = (-2, -1, 2), 1)),
        (
            "two dimensions",
            vec![2, 5, 6, 2],
            vec![3, 3, 2, 2],
            spec(
                |s| {
                    s.stride[1] = 2;
                    s.low[0] = 1;
                    s.kernel_dilation[1] = 2
                },
                2,
            ),
        ),
        ("three dimensions", vec![1, 3, 4, 3, 2], vec![2, 2, 2, 2, 2], spec(|s| s.stride[2] = 2, 3)),
    ];
    for (name, x, w, spec) in cases {
        check(name, &[normal(&x, 21), normal(&w, 22)], |v| conv::conv_general(&v[0], &v[1], &spec));
    }
    check("transposed", &[normal(&[1, 4, 2], 23), normal(&[3, 3, 2], 24)], |x| {
        conv::conv_transpose1d(&x[0], &x[1], [2], [1], [1], [1], 1)
    });
    check("second derivative", &[normal(&[1, 5, 2], 25), normal(&[2, 2, 2], 26)], |x| {
        let inner = |v: &[Array]| conv::conv1d(&v[0], &v[1], [2], [1], [1], 1)?.square()?.sum(&[], false);
        let grads = grad(|v| inner(v), x)?;
        Array::concatenate(&[grads[0].flatten()?, grads[1].flatten()?], 0)
    });
}

#[test]
fn fourier_transforms_and_complex_numbers() {
    let signal = normal(&[2, 6], 31);
    let pairs = |x: &Array| -> Result<Array> { Array::concatenate(&[x.real()?, x.imag()?], 0) };
    let complex = |x: &[Array]| Array::complex(&x[0], &x[1]);
    let both = [normal(&[2, 5], 32), normal(&[2, 5], 33)];
    for norm in [Norm::Backward, Norm::Ortho] {
        check_f32("fft", &both, |x| pairs(&fft::fft(&complex(x)?, None, -1, norm)?));
        check_f32("ifft", &both, |x| pairs(&fft::ifft(&complex(x)?, Some(7), 0, norm)?));
        check_f32("rfft", std::slice::from_ref(&signal), |x| pairs(&fft::rfft(&x[0], None, -1, norm)?));
        check_f32("rfft, cut", std::slice::from_ref(&signal), |x| {
            pairs(&fft::rfft(&x[0], Some(5), -1, norm)?)
        });
        for n in [None, Some(7), Some(9)] {
            check_f32("irfft", &both, |x| fft::irfft(&complex(x)?, n, -1, norm));
        }
        check_f32("fft2", &both, |x| pairs(&fft::fft2(&complex(x)?, None, None, norm)?));
    }
    let other = Array::from_slice(&[Complex32 { re: 0.5, im: -1.25 }], &[1]).unwrap();
    check_f32("multiply", &both, |x| pairs(&complex(x)?.multiply(&other)?));
    check_f32("divide", &both, |x| pairs(&other.divide(complex(x)?)?));
    check_f32("exp", &both, |x| pairs(&complex(x)?.exp()?));
    check_f32("square of abs", &both, |x| complex(x)?.abs()?.square());
    check_f32("matmul", &both, |x| pairs(&complex(x)?.matmul(&complex(x)?.conjugate()?.transpose(&[])?)?));
}

#[test]
fn linear_algebra() {
    let a = normal(&[2, 3, 3], 41);
    let one = std::slice::from_ref(&a);
    check("inv", one, |x| linalg::inv(&x[0]));
    check("det", one, |x| linalg::det(&x[0]));
    check("slogdet", one, |x| Ok(linalg::slogdet(&x[0])?.1));
    check("solve_triangular", &[a.clone(), normal(&[2, 3, 2], 42)], |x| {
        linalg::solve_triangular(&x[0], &x[1], false)
    });
    check("tri_inv", one, |x| linalg::tri_inv(&x[0], true));
    let positive = |x: &Array| -> Result<Array> {
        let eye = Array::from_slice(&[2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 2.0], &[3, 3])?;
        x.matmul(&x.swap_axes(-1, -2)?)?.add(eye)
    };
    for upper in [false, true] {
        check("cholesky", one, |x| linalg::cholesky(&positive(&x[0])?, upper));
    }
    check("norm", one, |x| linalg::norm(&x[0], Default::default(), Some(&[1, 2]), false));
    check("cross", &[normal(&[2, 3], 43), normal(&[2, 3], 44)], |x| linalg::cross(&x[0], &x[1], -1));
    let refused = grad(|x| linalg::qr(&x[0])?.0.sum(&[], false), one);
    assert!(refused.unwrap_err().to_string().contains("no gradient"));
}

#[test]
fn quantized_arrays_and_fused_functions() {
    let format = QuantSpec::affine(4, 32).unwrap();
    let w = quantized::quantize(&normal(&[5, 64], 51).astype(Dtype::F32).unwrap(), format, None).unwrap();
    check_f32("quantized_matmul", &[normal(&[3, 64], 52)], |x| {
        quantized::quantized_matmul(&x[0].astype(Dtype::F32)?, &w, true)
    });
    let (scales, biases) =
        (w.scales.astype(Dtype::F64).unwrap(), w.biases.clone().unwrap().astype(Dtype::F64).unwrap());
    check_f32("scales and biases", &[scales, biases], |x| {
        let scales = x[0].astype(Dtype::F32)?;
        let biases = Some(x[1].astype(Dtype::F32)?);
        quantized::QuantizedArray::new(w.words.clone(), scales, biases, format, None)?.dequantize(None)
    });
    let qkv = [normal(&[2, 4, 3, 6], 53), normal(&[2, 2, 5, 6], 54), normal(&[2, 2, 5, 6], 55)];
    let mask = normal(&[3, 5], 56).greater(-0.7).unwrap();
    check("attention with a mask", &qkv, |x| {
        fast::scaled_dot_product_attention(&x[0], &x[1], &x[2], 0.4, AttentionMask::Array(&mask), None)
    });
    let mut sunk = qkv.to_vec();
    sunk.push(normal(&[4], 57));
    check("attention with sinks", &sunk, |x| {
        fast::scaled_dot_product_attention(&x[0], &x[1], &x[2], 0.4, AttentionMask::Causal, Some(&x[3]))
    });
    check_f32("rope", &[normal(&[2, 3, 4, 6], 58)], |x| {
        fast::rope(&x[0].astype(Dtype::F32)?, 4, false, RopeBase::Base(100.0), 0.5, RopeOffset::At(3))
    });
}
