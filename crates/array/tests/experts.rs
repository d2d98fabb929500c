//! Rows that indices route to matrices: `gather_mm` against one product after another.

use mica_array::op::Precision;
use mica_array::quantized::{QuantMode, QuantSpec, quantize};
use mica_array::transforms::{jvp, vjp, vmap};
use mica_array::{Array, Dtype, PackedWeight, Result, eval, set_threads};
use mica_testkit::Rng;

fn normal(shape: &[usize], dtype: Dtype, seed: u64) -> Array {
    let mut rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal()).collect();
    Array::from_slice(&values, shape).unwrap().astype(dtype).unwrap()
}

fn bits(array: &Array) -> Vec<u32> {
    array.astype(Dtype::F32).unwrap().to_vec::<f32>().unwrap().iter().map(|value| value.to_bits()).collect()
}

fn largest_difference(a: &Array, b: &Array) -> f32 {
    let difference = a.astype(Dtype::F32).unwrap().subtract(b.astype(Dtype::F32).unwrap()).unwrap();
    difference.abs().unwrap().max(&[], false).unwrap().item::<f32>().unwrap()
}

const TOKENS: usize = 30;
const EXPERTS: usize = 7;
const CHOSEN: usize = 3;
const SHAPE: [usize; 2] = [36, 70];

/// The experts with the highest scores of each token: computed by the graph that the product is part of. Some experts
/// are never among them.
fn routes(scores: &Array) -> Array {
    let idle = Array::from_slice(&[0f32, 0.0, -99.0, 0.0, 0.0, -99.0, 0.0], &[EXPERTS]).unwrap();
    let order = scores.add(idle).unwrap().argsort(1).unwrap();
    order.narrow(1, EXPERTS - CHOSEN, EXPERTS).unwrap()
}

/// [tokens, chosen, out] of x [tokens, in] and weights [experts, in, out], one product after another.
fn one_at_a_time(x: &Array, weights: &Array, chosen: &[u32]) -> Array {
    let row = |at: usize| {
        let expert = chosen[at] as usize;
        let matrix = weights.narrow(0, expert, expert + 1)?.squeeze(&[0])?;
        x.narrow(0, at / CHOSEN, at / CHOSEN + 1)?.matmul(&matrix)
    };
    let rows: Vec<Array> = (0..chosen.len()).map(|at| row(at).unwrap()).collect();
    let shape = [TOKENS as i64, CHOSEN as i64, -1];
    Array::concatenate(&rows, 0).unwrap().reshape(&shape).unwrap()
}

#[test]
fn routed_rows_have_the_bits_of_their_products_alone() {
    let scores = normal(&[TOKENS, EXPERTS], Dtype::F32, 1);
    let chosen = routes(&scores).to_vec::<u32>().unwrap();
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64] {
        let [out, inputs] = SHAPE;
        let x = normal(&[TOKENS, inputs], dtype, 2);
        let columns = normal(&[EXPERTS, inputs, out], dtype, 3);
        let rows = normal(&[EXPERTS, out, inputs], dtype, 4).swap_axes(1, 2).unwrap();
        for (name, weights) in [("as columns", columns), ("as rows", rows)] {
            let expected = bits(&one_at_a_time(&x, &weights, &chosen));
            let tokens = x.expand_dims(&[1, 2]).unwrap();
            for threads in [1, 3] {
                set_threads(threads).unwrap();
                let got = tokens.gather_mm(&weights, None, Some(&routes(&scores)), false).unwrap();
                assert_eq!(got.shape(), [TOKENS, CHOSEN, 1, out]);
                assert!(bits(&got) == expected, "{dtype} {name}, {threads} threads");
            }
        }
    }
}

#[test]
fn gradients_are_sums_over_the_rows_of_each_matrix() {
    let scores = normal(&[TOKENS, EXPERTS], Dtype::F32, 5);
    let chosen = routes(&scores).to_vec::<u32>().unwrap();
    let [out, inputs] = SHAPE;
    for (dtype, bound) in [(Dtype::F32, 1e-4), (Dtype::BF16, 0.3)] {
        let x = normal(&[TOKENS, inputs], dtype, 6);
        let weights = normal(&[EXPERTS, inputs, out], dtype, 7);
        let ct = normal(&[TOKENS, CHOSEN, out], dtype, 8);
        let indices = routes(&scores);
        let grouped = |at: &[Array]| {
            let product = at[0].expand_dims(&[1, 2])?.gather_mm(&at[1], None, Some(&indices), false)?;
            Ok(vec![product.squeeze(&[2])?])
        };
        let alone = |at: &[Array]| Ok(vec![one_at_a_time(&at[0], &at[1], &chosen)]);
        let both = [x, weights];
        let (_, got) = vjp(grouped, &both, std::slice::from_ref(&ct)).unwrap();
        let (_, expected) = vjp(alone, &both, &[ct]).unwrap();
        eval(&got).unwrap();
        for (name, got, expected) in [("rows", &got[0], &expected[0]), ("weights", &got[1], &expected[1])] {
            let difference = largest_difference(got, expected);
            assert!(difference <= bound, "{dtype}, {name}: {difference}");
        }
        let idle = got[1].narrow(0, 2, 3).unwrap();
        assert!(bits(&idle).iter().all(|&bits| bits == 0), "{dtype}: no row, no gradient");
    }
}

#[test]
fn indices_out_of_range_are_errors_forward_and_backward() {
    let (x, weights) = (normal(&[2, 1, 4], Dtype::F32, 9), normal(&[3, 4, 5], Dtype::F32, 10));
    let ct = normal(&[2, 1, 5], Dtype::F32, 11);
    for (left, right) in [([0u32, 1], [1u32, 3]), ([0, 2], [0, 1]), ([0, 0], [u32::MAX, 1])] {
        let [left, right] = [left, right].map(|indices| Array::from_slice(&indices, &[2]).unwrap());
        let product = |at: &[Array]| Ok(vec![at[0].gather_mm(&at[1], Some(&left), Some(&right), false)?]);
        let both = [x.clone(), weights.clone()];
        let error = product(&both).unwrap()[0].eval().unwrap_err().to_string();
        assert!(error.contains("gather_mm") && error.contains("of 3 matrices"), "{error}");
        let (_, gradients) = vjp(product, &both, std::slice::from_ref(&ct)).unwrap();
        for gradient in gradients {
            assert!(gradient.eval().is_err(), "{left:?} {right:?}");
        }
    }
}

/// Experts in each form, and each of them alone.
fn forms(seed: u64) -> Vec<(&'static str, Array, Vec<Array>)> {
    let [out, inputs] = [40, 64];
    let plain = |dtype| normal(&[EXPERTS, out, inputs], dtype, seed);
    let slices = |stacked: &Array| -> Vec<Array> {
        let slice = |at| stacked.narrow(0, at, at + 1).unwrap().squeeze(&[0]).unwrap();
        (0..EXPERTS).map(slice).collect()
    };
    let mut forms = Vec::new();
    for (name, packed_name, dtype) in
        [("f32", "packed f32", Dtype::F32), ("bf16", "packed bf16", Dtype::BF16)]
    {
        let stacked = plain(dtype);
        let pack = |weight: &Array| Array::from_packed(PackedWeight::from_float(weight).unwrap());
        forms.push((packed_name, pack(&stacked), slices(&stacked).iter().map(pack).collect()));
        forms.push((name, stacked.clone(), slices(&stacked)));
    }
    for (name, format) in [
        ("4 bits", QuantSpec::affine(4, 32).unwrap()),
        ("8 bits", QuantSpec::affine(8, 32).unwrap()),
        ("mxfp4", QuantSpec::usual(QuantMode::Mxfp4)),
        ("nvfp4", QuantSpec::usual(QuantMode::Nvfp4)),
        ("mxfp8", QuantSpec::usual(QuantMode::Mxfp8)),
    ] {
        let pack = |weight: &Array| PackedWeight::quantize(weight, format).unwrap();
        let weights = slices(&plain(Dtype::BF16));
        let all = PackedWeight::experts(weights.iter().map(pack).collect()).unwrap();
        let each = weights.iter().map(|weight| Array::from_packed(pack(weight))).collect();
        forms.push((name, Array::from_packed(all), each));
    }
    forms
}

/// The same as [`one_at_a_time`], of linear maps.
fn linear_one_at_a_time(x: &Array, each: &[Array], chosen: &[u32], precision: Precision) -> Array {
    let row = |at: usize| {
        let rows = x.narrow(0, at / CHOSEN, at / CHOSEN + 1)?;
        rows.linear(&each[chosen[at] as usize], None, precision)
    };
    let rows: Vec<Array> = (0..chosen.len()).map(|at| row(at).unwrap()).collect();
    let shape = [(chosen.len() / CHOSEN) as i64, CHOSEN as i64, -1];
    Array::concatenate(&rows, 0).unwrap().reshape(&shape).unwrap()
}

#[test]
fn linear_maps_of_experts_have_the_bits_of_those_of_each() {
    let scores = normal(&[TOKENS, EXPERTS], Dtype::F32, 12);
    let chosen = routes(&scores).to_vec::<u32>().unwrap();
    for (name, experts, each) in forms(13) {
        for (dtype, precision) in [
            (Dtype::F32, Precision::Fast),
            (Dtype::F32, Precision::Bf16),
            (Dtype::F32, Precision::Exact),
            (Dtype::BF16, Precision::Bf16),
            (Dtype::F16, Precision::Exact),
        ] {
            let x = normal(&[TOKENS, experts.dim(2)], dtype, 14);
            // One quantized weight multiplies rows of f32 by its kernels, and others as the reference does.
            let alone = match experts.packed().and_then(|packed| packed.quantization()) {
                Some(_) => x.astype(Dtype::F32).unwrap(),
                None => x.clone(),
            };
            let expected = linear_one_at_a_time(&alone, &each, &chosen, precision).astype(dtype).unwrap();
            for threads in [1, 3] {
                set_threads(threads).unwrap();
                let tokens = x.expand_dims(&[1, 2]).unwrap();
                let got = tokens.gather_linear(&experts, None, Some(&routes(&scores)), precision).unwrap();
                assert_eq!((got.shape(), got.dtype()), (&[TOKENS, CHOSEN, 1, experts.dim(1)][..], dtype));
                assert!(bits(&got) == bits(&expected), "{name}, {dtype} {precision:?}, {threads} threads");
            }
        }
    }
}

#[test]
fn experts_are_differentiated_and_mapped_as_each_of_them() {
    let scores = normal(&[TOKENS, EXPERTS], Dtype::F32, 15);
    let chosen = routes(&scores).to_vec::<u32>().unwrap();
    let indices = routes(&scores);
    for (name, experts, each) in forms(16) {
        let precision = Precision::Exact;
        let x = normal(&[TOKENS, experts.dim(2)], Dtype::F32, 17);
        let ct = normal(&[TOKENS, CHOSEN, experts.dim(1)], Dtype::F32, 18);
        let grouped = |at: &[Array]| {
            let rows = at[0].expand_dims(&[1, 2])?;
            Ok(vec![rows.gather_linear(&experts, None, Some(&indices), precision)?.squeeze(&[2])?])
        };
        let alone = |at: &[Array]| Ok(vec![linear_one_at_a_time(&at[0], &each, &chosen, precision)]);
        let rows = std::slice::from_ref(&x);
        let (_, got) = vjp(grouped, rows, std::slice::from_ref(&ct)).unwrap();
        let (_, expected) = vjp(alone, rows, std::slice::from_ref(&ct)).unwrap();
        assert!(largest_difference(&got[0], &expected[0]) < 1e-3, "{name}");
        let (_, got) = jvp(grouped, rows, rows).unwrap();
        let same = grouped(rows).unwrap();
        assert!(bits(&got[0]) == bits(&same[0]), "{name}: a linear map is its own tangent");
        let two = Array::stack(&[x.clone(), x.multiply(2.0).unwrap()], 0).unwrap();
        let mapped = vmap(grouped, &[two], &[Some(0)], &[Some(0)]).unwrap();
        let doubled = Array::stack(&[same[0].clone(), same[0].multiply(2.0).unwrap()], 0).unwrap();
        assert!(bits(&mapped[0]) == bits(&doubled), "{name}: each example as it is alone");
        // Weights that are learnt have gradients.
        if experts.packed().is_some() {
            continue;
        }
        let of_weights = |at: &[Array]| {
            let rows = x.expand_dims(&[1, 2])?;
            Ok(vec![rows.gather_linear(&at[0], None, Some(&indices), precision)?.squeeze(&[2])?])
        };
        let stacked = |at: &[Array]| {
            let slice = |expert: usize| at[0].narrow(0, expert, expert + 1)?.squeeze(&[0]);
            let each = (0..EXPERTS).map(slice).collect::<Result<Vec<Array>>>()?;
            Ok(vec![linear_one_at_a_time(&x, &each, &chosen, precision)])
        };
        let weights = std::slice::from_ref(&experts);
        let (_, got) = vjp(of_weights, weights, std::slice::from_ref(&ct)).unwrap();
        // In f32, where adding up row after row loses little.
        let single = experts.astype(Dtype::F32).unwrap();
        let (_, expected) = vjp(stacked, &[single], &[ct]).unwrap();
        assert_eq!((got[0].shape(), got[0].dtype()), (experts.shape(), experts.dtype()));
        let bound = if experts.dtype() == Dtype::F32 { 1e-4 } else { 0.1 };
        assert!(largest_difference(&got[0], &expected[0]) < bound, "{name}: gradient of the weights");
    }
}

#[test]
fn packed_experts_give_back_what_they_were_made_of() {
    let plain = normal(&[3, 20, 64], Dtype::BF16, 19);
    let packed = Array::from_packed(PackedWeight::from_float(&plain).unwrap());
    assert_eq!((packed.shape(), packed.dtype()), (plain.shape(), Dtype::BF16));
    assert!(bits(&packed.dequantize().unwrap()) == bits(&plain));
    let slice = |at: usize| plain.narrow(0, at, at + 1).unwrap().squeeze(&[0]).unwrap();
    for mode in QuantMode::ALL {
        let format = QuantSpec::usual(mode);
        let each: Vec<_> = (0..3).map(|at| quantize(&slice(at), format, None).unwrap()).collect();
        let weights = each.iter().map(|parts| PackedWeight::from_mlx(parts).unwrap()).collect();
        let experts = PackedWeight::experts(weights).unwrap();
        assert_eq!((experts.quantization(), experts.shape().as_slice()), (Some(format), &[3, 20, 64][..]));
        let again = PackedWeight::from_mlx(&experts.to_mlx().unwrap()).unwrap();
        for (name, packed) in [("one by one", experts), ("stacked", again)] {
            let values = Array::from_packed(packed).dequantize().unwrap();
            for (at, parts) in each.iter().enumerate() {
                let one = Array::from_packed(PackedWeight::from_mlx(parts).unwrap());
                let got = values.narrow(0, at, at + 1).unwrap();
                let same = bits(&got) == bits(&one.dequantize().unwrap());
                assert!(same, "{}, {name}, {at}", mode.name());
            }
        }
    }
    let [four, eight] = [4, 8].map(|bits| QuantSpec::affine(bits, 32).unwrap());
    for (name, weights) in [
        ("none", vec![]),
        (
            "two kinds",
            vec![
                PackedWeight::from_float(&slice(0)).unwrap(),
                PackedWeight::quantize(&slice(1), four).unwrap(),
            ],
        ),
        (
            "two widths",
            vec![
                PackedWeight::quantize(&slice(0), eight).unwrap(),
                PackedWeight::quantize(&slice(1), four).unwrap(),
            ],
        ),
    ] {
        assert!(PackedWeight::experts(weights).is_err(), "{name}");
    }
    let x = normal(&[2, 64], Dtype::F32, 20);
    assert!(x.linear(&packed, None, Precision::Exact).is_err(), "a linear map is of one weight");
    let wrong = Array::from_slice(&[0u32, 3], &[2]).unwrap();
    let rows = x.expand_dims(&[1]).unwrap();
    let error =
        rows.gather_linear(&packed, None, Some(&wrong), Precision::Exact).unwrap().eval().unwrap_err();
    assert!(error.to_string().contains("3 of 3 matrices"), "{error}");
}
