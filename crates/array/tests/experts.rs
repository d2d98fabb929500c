//! Rows that indices route to matrices: `gather_mm` against one product after another.

use mica_array::transforms::vjp;
use mica_array::{Array, Dtype, eval, set_threads};
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
