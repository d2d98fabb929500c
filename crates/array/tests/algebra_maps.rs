//! jvp and vmap of products, convolutions, Fourier transforms, linear algebra and quantized arrays: jvp
//! against differences and against the gradient, vmap against a loop.

use mica_array::conv::{self, ConvNd};
use mica_array::fft::{self, Norm};
use mica_array::quantized::{self, QuantSpec};
use mica_array::transforms::{jvp, vmap};
use mica_array::{Array, Dtype, Result, linalg};
use mica_testkit::Rng;

fn normal(shape: &[usize], seed: u64) -> Array {
    let mut rng = Rng::new(seed);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.normal() as f64).collect();
    Array::from_slice(&values, shape).unwrap()
}

fn u32s(values: &[u32]) -> Array {
    Array::from_slice(values, &[values.len()]).unwrap()
}

struct Case {
    name: &'static str,
    /// Shapes of the inputs.
    inputs: Vec<Vec<usize>>,
    f: fn(&[Array]) -> Result<Array>,
    /// Whether it computes in f32 whatever it gets.
    single: bool,
}

fn cases() -> Vec<Case> {
    let case = |name, inputs: &[&[usize]], f| Case {
        name,
        inputs: inputs.iter().map(|shape| shape.to_vec()).collect(),
        f,
        single: false,
    };
    let single = |name, inputs: &[&[usize]], f| Case { single: true, ..case(name, inputs, f) };
    vec![
        case("conv", &[&[2, 6, 4], &[4, 3, 2]], |x| {
            let mut spec = ConvNd::new(1);
            (spec.groups, spec.stride[0], spec.low[0], spec.flip) = (2, 2, 1, true);
            conv::conv_general(&x[0], &x[1], &spec)
        }),
        case("conv_transpose2d", &[&[1, 3, 4, 2], &[3, 2, 2, 2]], |x| {
            conv::conv_transpose2d(&x[0], &x[1], [2, 1], [1, 0], [1, 1], [0, 0], 1)
        }),
        case("gather_mm", &[&[3, 2, 4], &[2, 4, 3]], |x| {
            x[0].gather_mm(&x[1], Some(&u32s(&[2, 0, 1, 1])), Some(&u32s(&[1, 0, 0, 1])), false)
        }),
        case("segmented_mm", &[&[3, 5], &[5, 2]], |x| {
            let segments = Array::from_slice(&[0u32, 2, 1, 5], &[2, 2])?;
            x[0].segmented_mm(&x[1], &segments)
        }),
        case("hadamard_transform", &[&[2, 24]], |x| x[0].hadamard_transform(None)),
        case("inv", &[&[3, 3]], |x| linalg::inv(&x[0])),
        case("tri_inv", &[&[3, 3]], |x| linalg::tri_inv(&x[0], true)),
        case("cholesky", &[&[3, 3]], |x| {
            let gram = x[0].matmul(&x[0].swap_axes(-1, -2)?)?;
            linalg::cholesky(
                &gram.add(Array::from_slice(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], &[3, 3])?)?,
                false,
            )
        }),
        case("det", &[&[3, 3]], |x| linalg::det(&x[0])),
        case("slogdet", &[&[2, 2]], |x| Ok(linalg::slogdet(&x[0])?.1)),
        single("rfft", &[&[2, 6]], |x| {
            let y = fft::rfft(&x[0], None, -1, Norm::Ortho)?;
            Array::concatenate(&[y.real()?, y.imag()?], 0)
        }),
        single("fft and irfft", &[&[3, 4], &[3, 4]], |x| {
            fft::irfft(
                &fft::fft(&Array::complex(&x[0], &x[1])?, None, 0, Norm::Backward)?,
                Some(5),
                1,
                Norm::Backward,
            )
        }),
        single("abs of complex", &[&[3], &[3]], |x| {
            // Away from zero, where it bends sharply.
            Array::complex(&x[0], &x[1].add(4.0)?)?.abs()
        }),
        single("dequantize", &[&[2, 2], &[2, 2]], |x| {
            let words = Array::from_slice(
                &(0..16u32).map(|i| i.wrapping_mul(0x1234_5677)).collect::<Vec<_>>(),
                &[2, 8],
            )?;
            let format = QuantSpec::affine(4, 32)?;
            let parts = [x[0].astype(Dtype::F32)?, x[1].astype(Dtype::F32)?];
            let [scales, biases] = parts;
            quantized::QuantizedArray::new(words, scales, Some(biases), format, None)?.dequantize(None)
        }),
    ]
}

fn values(array: &Array) -> Vec<f64> {
    array.astype(Dtype::F64).unwrap().to_vec().unwrap()
}

fn close(name: &str, got: &[f64], expected: &[f64], bound: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(1e-3, |top: f64, value| top.max(value.abs()));
    for (place, (a, e)) in got.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= bound * largest, "{name}, element {place}: {a}, expected {e}");
    }
}

#[test]
fn tangents_are_differences() {
    for case in cases() {
        let seeded = |seed: u64| -> Vec<Array> {
            case.inputs.iter().zip(seed..).map(|(shape, seed)| normal(shape, seed)).collect()
        };
        let (x, dx) = (seeded(1), seeded(11));
        let (_, tangents) =
            jvp(|v| Ok(vec![(case.f)(v)?]), &x, &dx).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let step = if case.single { 1e-2 } else { 1e-4 };
        let at = |by: f64| -> Vec<f64> {
            let moved: Vec<Array> =
                x.iter().zip(&dx).map(|(x, dx)| x.add(dx.multiply(by).unwrap()).unwrap()).collect();
            values(&(case.f)(&moved).unwrap())
        };
        let expected: Vec<f64> =
            at(step).iter().zip(at(-step)).map(|(high, low)| (high - low) / (2.0 * step)).collect();
        // Central differences: their error is of the order of step², or f32's rounding over the step.
        let bound = if case.single { 2e-3 } else { 1e-5 };
        close(case.name, &values(&tangents[0]), &expected, bound);
    }
}

#[test]
fn a_mapped_function_equals_a_loop() {
    const EXAMPLES: usize = 3;
    for case in cases() {
        let count = case.inputs.len();
        for pattern in 1..1u32 << count {
            let batched = |at: usize| pattern >> at & 1 == 1;
            let inputs: Vec<Array> = (0..count)
                .map(|at| {
                    let mut shape = case.inputs[at].clone();
                    if batched(at) {
                        shape.insert(0, EXAMPLES);
                    }
                    normal(&shape, 21 + at as u64)
                })
                .collect();
            let axes: Vec<Option<i32>> = (0..count).map(|at| batched(at).then_some(0)).collect();
            let name = format!("{}, batched {axes:?}", case.name);
            let mapped = vmap(|v| Ok(vec![(case.f)(v)?]), &inputs, &axes, &[Some(0)])
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            let mut expected = Vec::new();
            for example in 0..EXAMPLES {
                let one: Vec<Array> = (0..count)
                    .map(|at| {
                        if !batched(at) {
                            return inputs[at].clone();
                        }
                        inputs[at].narrow(0, example, example + 1).unwrap().squeeze(&[0]).unwrap()
                    })
                    .collect();
                expected.extend(values(&(case.f)(&one).unwrap()));
            }
            close(&name, &values(&mapped[0]), &expected, if case.single { 2e-6 } else { 1e-12 });
        }
    }
}

#[test]
fn decompositions_of_a_batch() {
    let a = normal(&[4, 3, 3], 31);
    let each = |v: &[Array]| {
        let (q, r) = linalg::qr(&v[0])?;
        let s = linalg::singular_values(&v[0])?;
        Ok(vec![q.matmul(&r)?, s])
    };
    let mapped = vmap(each, std::slice::from_ref(&a), &[Some(0)], &[Some(0)]).unwrap();
    close("QR", &values(&mapped[0]), &values(&a), 1e-12);
    close("singular values", &values(&mapped[1]), &values(&linalg::singular_values(&a).unwrap()), 1e-12);
    let w = normal(&[3, 2, 64], 32).astype(Dtype::F32).unwrap();
    let format = QuantSpec::usual(Default::default());
    let quantize = |v: &[Array]| {
        let q = quantized::quantize(&v[0], format, None)?;
        Ok(vec![q.words.clone(), q.dequantize(None)?])
    };
    let mapped = vmap(quantize, std::slice::from_ref(&w), &[Some(0)], &[Some(0)]).unwrap();
    let whole = quantized::quantize(&w, format, None).unwrap();
    assert_eq!(mapped[0].to_vec::<u32>().unwrap(), whole.words.to_vec::<u32>().unwrap());
    assert_eq!(mapped[1].to_vec::<f32>().unwrap(), whole.dequantize(None).unwrap().to_vec::<f32>().unwrap());
}
