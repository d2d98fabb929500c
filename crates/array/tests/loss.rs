//! The output head with its loss over a vocabulary of several tiles, by weights in every form, against the same
//! from separate ops.

use mica_array::op::CrossEntropySpec;
use mica_array::quantized::{QuantSpec, QuantizedArray};
use mica_array::transforms::vjp;
use mica_array::{Array, Dtype, PackedWeight, Precision, eval};
use mica_testkit::Rng;

const WIDTH: usize = 64;
/// Two whole tiles and a part of a third, which does not end with a panel.
const VOCABULARY: usize = 9001;

fn normal(shape: &[usize], deviation: f32, seed: u64) -> Array {
    let mut rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| deviation * rng.normal()).collect();
    Array::from_slice(&values, shape).unwrap()
}

/// 4 bits in groups of 64, with random codes.
fn quantized() -> Array {
    let mut rng = Rng::new(3);
    let words: Vec<u32> = (0..VOCABULARY * WIDTH / 8).map(|_| rng.u32()).collect();
    let words = Array::from_slice(&words, &[VOCABULARY, WIDTH / 8]).unwrap();
    let scales = normal(&[VOCABULARY, 1], 0.05, 4).astype(Dtype::BF16).unwrap();
    let biases = scales.multiply(-8.0).unwrap();
    let codes = QuantizedArray::new(words, scales, Some(biases), QuantSpec::default(), None).unwrap();
    Array::from_packed(PackedWeight::from_mlx(&codes).unwrap())
}

/// Log-probabilities of the targets, and gradients of their negative sum: of the rows, and of the weight if it is trained.
fn fused(
    hidden: &Array,
    weight: &Array,
    targets: &Array,
    spec: CrossEntropySpec,
    trained: bool,
) -> Vec<Array> {
    let (_, rows) = hidden.linear_cross_entropy(weight, targets, spec).unwrap();
    let inputs = if trained { vec![hidden.clone(), weight.clone()] } else { vec![hidden.clone()] };
    let loss = |x: &[Array]| {
        let weight = if trained { &x[1] } else { weight };
        Ok(vec![x[0].linear_cross_entropy(weight, targets, spec)?.0])
    };
    let seed = Array::full(&[], 1.0, Dtype::F32);
    let (_, gradients) = vjp(loss, &inputs, &[seed]).unwrap();
    let mut all = vec![rows];
    all.extend(gradients);
    eval(&all).unwrap();
    all
}

/// The same from separate ops in f32.
fn separate(hidden: &Array, weight: &Array, targets: &Array, softcap: Option<f32>) -> Vec<Array> {
    let weight = weight.dequantize_to(Dtype::F32).unwrap();
    let sum = |x: &[Array]| {
        let logits = x[0].linear(&x[1], None, Precision::Exact)?;
        let logits = match softcap {
            Some(cap) => logits.divide(cap)?.tanh()?.multiply(cap)?,
            None => logits,
        };
        let rows = logits.log_softmax(-1)?.take_along_axis(&targets.expand_dims(&[1])?, 1)?.squeeze(&[1])?;
        Ok(vec![rows])
    };
    let seed = Array::full(&[hidden.dim(0)], -1.0, Dtype::F32);
    let (rows, gradients) = vjp(sum, &[hidden.clone(), weight], &[seed]).unwrap();
    rows.into_iter().chain(gradients).collect()
}

fn distance(got: &Array, expected: &Array) -> f64 {
    let [got, expected] = [got, expected].map(|x| x.astype(Dtype::F32).unwrap().to_vec::<f32>().unwrap());
    assert_eq!(got.len(), expected.len());
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let off = squares(&mut got.iter().zip(&expected).map(|(&x, &y)| x as f64 - y as f64));
    off / squares(&mut expected.iter().map(|&y| y as f64))
}

#[test]
fn weights_in_every_form_give_the_same() {
    let plain = normal(&[VOCABULARY, WIDTH], 0.3, 1);
    let half = plain.astype(Dtype::BF16).unwrap();
    let packed = |weight: &Array| Array::from_packed(PackedWeight::from_float(weight).unwrap());
    let forms = [
        ("plain f32", plain.clone(), true),
        ("plain bf16", half.clone(), true),
        ("packed f32", packed(&plain), false),
        ("packed bf16", packed(&half), false),
        ("4 bits", quantized(), false),
    ];
    // More rows than one block of tiles has.
    for rows in [70, 1100] {
        let hidden = normal(&[rows, WIDTH], 1.0, 2);
        let targets: Vec<i32> = (0..rows).map(|row| (row * 7919 % VOCABULARY) as i32).collect();
        let targets = Array::from_slice(&targets, &[rows]).unwrap();
        for (name, weight, trainable) in &forms {
            for softcap in if rows == 70 { vec![None, Some(3.0)] } else { vec![None] } {
                let expected = separate(&hidden, weight, &targets, softcap);
                for (precision, bound) in [(Precision::Exact, 1e-5), (Precision::Bf16, 1e-2)] {
                    let spec = CrossEntropySpec { precision, softcap };
                    let frozen = fused(&hidden, weight, &targets, spec, false);
                    let name = format!("{name}, {rows} rows, {softcap:?}, {precision:?}");
                    for (what, (got, expected)) in ["rows", "hidden"].iter().zip(frozen.iter().zip(&expected))
                    {
                        let off = distance(got, expected);
                        assert!(off < bound, "{name}: {what} is off by {off:e}");
                    }
                    if !trainable {
                        continue;
                    }
                    let trained = fused(&hidden, weight, &targets, spec, true);
                    for (what, (got, expected)) in
                        ["rows", "hidden", "weight"].iter().zip(trained.iter().zip(&expected))
                    {
                        let off = distance(got, expected);
                        let bound = if weight.dtype() == Dtype::BF16 { bound.max(4e-3) } else { bound };
                        assert!(off < bound, "{name}, trained: {what} is off by {off:e}");
                    }
                    let bits = |x: &Array| {
                        x.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<u32>>()
                    };
                    assert_eq!(bits(&frozen[0]), bits(&trained[0]), "{name}: log-probabilities");
                }
            }
        }
    }
}

/// A row's bits do not depend on the rows beside it.
#[test]
fn rows_do_not_depend_on_each_other() {
    let weight = quantized();
    let hidden = normal(&[33, WIDTH], 1.0, 5);
    let targets: Vec<i32> = (0..33).map(|row| row * 271).collect();
    let targets = Array::from_slice(&targets, &[33]).unwrap();
    let spec = CrossEntropySpec { precision: Precision::Bf16, softcap: None };
    let all = fused(&hidden, &weight, &targets, spec, false);
    let part =
        fused(&hidden.narrow(0, 5, 9).unwrap(), &weight, &targets.narrow(0, 5, 9).unwrap(), spec, false);
    for (all, part) in all.iter().zip(&part) {
        let all = all.narrow(0, 5, 9).unwrap();
        let [all, part] = [&all, part]
            .map(|x| x.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<u32>>());
        assert_eq!(all, part);
    }
}
