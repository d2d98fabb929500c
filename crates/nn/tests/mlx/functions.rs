//! Activations, losses and initializers.

use mica_array::transforms::{grad, vjp};
use mica_array::{Array, Dtype, Result};
use mica_nn::init::{self, Fan};
use mica_nn::losses::{self, Reduction};
use mica_nn::{activations as act, *};

use super::{array, assert_all_ran, assert_matches, golden};

/// Single precision through functions that the two programs compute with other polynomials.
const CLOSE: f32 = 4e-6;

#[test]
fn activations_and_their_gradients() {
    let golden = golden();
    let (x, alpha) = (array(&golden, "act.x"), array(&golden, "act.alpha"));
    let cases: &[(&str, &dyn Fn(&Array) -> Result<Array>)] = &[
        ("sigmoid", &act::sigmoid),
        ("relu", &act::relu),
        ("relu2", &act::relu2),
        ("relu6", &act::relu6),
        ("leaky_relu", &|x| LeakyRelu::default().forward(x, &Context::default())),
        ("leaky_relu_2", &|x| act::leaky_relu(x, 0.2)),
        ("log_softmax", &|x| LogSoftmax::default().forward(x, &Context::default())),
        ("log_softmax_0", &|x| act::log_softmax(x, 0)),
        ("elu", &|x| Elu::default().forward(x, &Context::default())),
        ("elu_2", &|x| act::elu(x, 0.5)),
        ("softmax", &|x| Softmax::default().forward(x, &Context::default())),
        ("softmax_0", &|x| act::softmax(x, 0)),
        ("softmin", &|x| Softmin::default().forward(x, &Context::default())),
        ("softplus", &act::softplus),
        ("softsign", &act::softsign),
        ("softshrink", &|x| Softshrink::default().forward(x, &Context::default())),
        ("softshrink_2", &|x| act::softshrink(x, 1.0)),
        ("celu", &|x| Celu::default().forward(x, &Context::default())),
        ("celu_2", &|x| act::celu(x, 2.0)),
        ("silu", &act::silu),
        ("log_sigmoid", &act::log_sigmoid),
        ("gelu", &act::gelu),
        ("gelu_approx", &|x| Gelu::Tanh.forward(x, &Context::default())),
        ("gelu_fast_approx", &|x| Gelu::Fast.forward(x, &Context::default())),
        ("selu", &act::selu),
        ("prelu", &|x| act::prelu(x, &alpha)),
        ("mish", &act::mish),
        ("hardswish", &|x| Hardswish.forward(x, &Context::default())),
        ("hard_tanh", &|x| HardTanh::default().forward(x, &Context::default())),
        ("hard_tanh_2", &|x| act::hard_tanh(x, -2.0, 0.5)),
        ("hard_shrink", &|x| HardShrink::default().forward(x, &Context::default())),
        ("hard_shrink_2", &|x| act::hard_shrink(x, 1.0)),
        ("tanh", &act::tanh),
        ("glu", &|x| Glu::default().forward(x, &Context::default())),
        ("glu_0", &|x| act::glu(&x.narrow(0, 0, 4)?, 0)),
        ("step", &|x| Step::default().forward(x, &Context::default())),
        ("step_2", &|x| act::step(x, 1.5)),
    ];
    for (name, f) in cases {
        let y = f(&x).unwrap();
        assert_matches(&golden, &format!("act.{name}.y"), &y, CLOSE);
        if golden.contains(&format!("act.{name}.dx")) {
            // The cotangent is y + 1/2: one that differs from place to place.
            let cotangent = y.add(0.5).unwrap();
            let (_, grads) = vjp(|x| Ok(vec![f(&x[0])?]), std::slice::from_ref(&x), &[cotangent]).unwrap();
            assert_matches(&golden, &format!("act.{name}.dx"), &grads[0], CLOSE);
        }
    }
    let ran: Vec<&str> = cases.iter().map(|(name, _)| *name).collect();
    assert_all_ran(&golden, "act", &ran);
}

#[test]
fn activations_keep_half_precision() {
    let x = Array::from_slice(&[-1.5f32, 0.25, 2.0, 4.0], &[4]).unwrap();
    for dtype in [Dtype::F16, Dtype::BF16] {
        let x = x.astype(dtype).unwrap();
        for f in [act::relu6, act::selu, act::mish, act::hardswish, act::softsign, act::log_sigmoid] {
            assert_eq!(f(&x).unwrap().dtype(), dtype);
        }
    }
}

#[test]
fn glu_wants_an_even_axis() {
    let x = Array::ones(&[2, 3], Dtype::F32);
    assert!(act::glu(&x, -1).is_err());
    assert!(act::glu(&x, 2).unwrap_err().to_string().contains("no axis 2"));
}

#[test]
fn losses_in_all_reductions() {
    let golden = golden();
    let at = |name: &str| array(&golden, &format!("loss.{name}"));
    let (a, b, c) = (at("a"), at("b"), at("c"));
    let (classes, classes_0) = (at("classes"), at("classes_0"));
    let (weights, weights_full) = (at("weights"), at("weights_full"));
    let (probs, binary, signs, inside) = (at("probs"), at("binary"), at("signs"), at("inside"));
    let (logs_a, logs_b, vars) = (at("logs_a"), at("logs_b"), at("vars"));
    type Loss<'a> = &'a dyn Fn(&Array, Reduction) -> Result<Array>;
    use losses::*;
    let cases: &[(&str, &Array, Loss)] = &[
        ("cross_entropy", &a, &|x, r| cross_entropy(x, &classes, None, -1, 0.0, r)),
        ("cross_entropy_probs", &a, &|x, r| cross_entropy(x, &probs, None, -1, 0.0, r)),
        ("cross_entropy_axis", &a, &|x, r| cross_entropy(x, &classes_0, None, 0, 0.0, r)),
        ("cross_entropy_weights", &a, &|x, r| cross_entropy(x, &classes, Some(&weights), -1, 0.0, r)),
        ("cross_entropy_smooth", &a, &|x, r| cross_entropy(x, &classes, None, -1, 0.3, r)),
        ("cross_entropy_probs_smooth", &a, &|x, r| cross_entropy(x, &probs, None, -1, 0.1, r)),
        ("binary_cross_entropy", &a, &|x, r| binary_cross_entropy(x, &binary, None, true, r)),
        ("binary_cross_entropy_weights", &a, &|x, r| {
            binary_cross_entropy(x, &binary, Some(&weights_full), true, r)
        }),
        ("binary_cross_entropy_probs", &inside, &|x, r| binary_cross_entropy(x, &binary, None, false, r)),
        ("l1", &a, &|x, r| l1_loss(x, &b, r)),
        ("mse", &a, &|x, r| mse_loss(x, &b, r)),
        ("nll", &logs_a, &|x, r| nll_loss(x, &classes, -1, r)),
        ("nll_axis", &logs_a, &|x, r| nll_loss(x, &classes_0, 0, r)),
        ("gaussian_nll", &a, &|x, r| gaussian_nll_loss(x, &b, &vars, false, 1e-6, r)),
        ("gaussian_nll_full", &a, &|x, r| gaussian_nll_loss(x, &b, &vars, true, 1e-2, r)),
        ("kl_div", &logs_a, &|x, r| kl_div_loss(x, &logs_b, -1, r)),
        ("kl_div_axis", &logs_a, &|x, r| kl_div_loss(x, &logs_b, 0, r)),
        ("smooth_l1", &a, &|x, r| smooth_l1_loss(x, &b, 1.0, r)),
        ("smooth_l1_beta", &a, &|x, r| smooth_l1_loss(x, &b, 0.3, r)),
        ("triplet", &a, &|x, r| triplet_loss(x, &b, &c, -1, 2, 1.0, 1e-6, r)),
        ("triplet_p", &a, &|x, r| triplet_loss(x, &b, &c, 0, 3, 0.5, 1e-4, r)),
        ("hinge", &a, &|x, r| hinge_loss(x, &signs, r)),
        ("huber", &a, &|x, r| huber_loss(x, &b, 1.0, r)),
        ("huber_delta", &a, &|x, r| huber_loss(x, &b, 0.4, r)),
        ("log_cosh", &a, &|x, r| log_cosh_loss(x, &b, r)),
        ("cosine_similarity", &a, &|x, r| cosine_similarity_loss(x, &b, 1, 1e-8, r)),
        ("cosine_similarity_axis", &a, &|x, r| cosine_similarity_loss(x, &b, 0, 3.0, r)),
        ("margin_ranking", &a, &|x, r| margin_ranking_loss(x, &b, &signs, 0.0, r)),
        ("margin_ranking_margin", &a, &|x, r| margin_ranking_loss(x, &b, &signs, 0.7, r)),
    ];
    let reductions = [("none", Reduction::None), ("mean", Reduction::Mean), ("sum", Reduction::Sum)];
    for (name, x, loss) in cases {
        for (what, reduction) in reductions {
            let value = loss(x, reduction).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_matches(&golden, &format!("loss.{name}.{what}"), &value, CLOSE);
        }
        let grads = grad(|x| loss(&x[0], Reduction::Mean), std::slice::from_ref(*x)).unwrap();
        assert_matches(&golden, &format!("loss.{name}.dx"), &grads[0], CLOSE);
    }
    let ran: Vec<&str> = cases.iter().map(|(name, ..)| *name).collect();
    assert_all_ran(&golden, "loss", &ran);
}

#[test]
fn losses_refuse_what_does_not_fit() {
    let (a, b) = (Array::ones(&[2, 3], Dtype::F32), Array::ones(&[3, 2], Dtype::F32));
    let r = Reduction::Mean;
    for (name, result, part) in [
        ("mse", losses::mse_loss(&a, &b, r), "[2, 3] and [3, 2]"),
        ("targets", losses::cross_entropy(&a, &b, None, -1, 0.0, r), "do not fit logits [2, 3]"),
        ("axis", losses::cross_entropy(&a, &b, None, 5, 0.0, r), "axis"),
        ("smoothing", losses::cross_entropy(&a, &a, None, -1, 1.0, r), "[0, 1)"),
        ("weights", losses::cross_entropy(&a, &a, Some(&a), -1, 0.0, r), "losses and weights"),
        ("ranking", losses::margin_ranking_loss(&a, &b, &a, 0.0, r), "both inputs"),
    ] {
        let error = result.expect_err(name).to_string();
        assert!(error.contains(part), "{name}: {error}");
    }
}

#[test]
fn initializers_draw_what_mlx_draws() {
    let golden = golden();
    let f32 = Dtype::F32;
    type Init<'a> = &'a dyn Fn(&[usize], &mut Keys) -> Result<Array>;
    let pairs: &[(&str, Init)] = &[
        ("normal", &|shape, keys| init::normal(shape, 0.5, 2.0, f32, keys)),
        ("uniform", &|shape, keys| init::uniform(shape, -0.25, 0.5, f32, keys)),
        ("glorot_normal", &|shape, keys| init::glorot_normal(shape, 2.0, f32, keys)),
        ("glorot_uniform", &|shape, keys| init::glorot_uniform(shape, 1.0, f32, keys)),
        ("he_normal", &|shape, keys| init::he_normal(shape, Fan::In, 1.0, f32, keys)),
        ("he_normal_out", &|shape, keys| init::he_normal(shape, Fan::Out, 3.0, f32, keys)),
        ("he_uniform", &|shape, keys| init::he_uniform(shape, Fan::In, 1.0, f32, keys)),
        ("he_uniform_out", &|shape, keys| init::he_uniform(shape, Fan::Out, 1.0, f32, keys)),
    ];
    for (name, f) in pairs {
        for kind in ["matrix", "kernel"] {
            let name = format!("init.{name}.{kind}.y");
            let y = f(golden.shape(&name), &mut Keys::new(11).unwrap()).unwrap();
            assert_matches(&golden, &name, &y, 1e-6);
        }
    }
    let single: &[(&str, Init)] = &[
        ("sparse", &|shape, keys| init::sparse(shape, 0.4, 0.5, 2.0, f32, keys)),
        ("orthogonal", &|shape, keys| init::orthogonal(shape, 1.5, f32, keys)),
        ("orthogonal_wide", &|shape, keys| init::orthogonal(shape, 1.0, f32, keys)),
        ("identity", &|shape, _| init::identity(shape, f32)),
        ("constant", &|shape, _| Ok(init::constant(shape, 0.5, f32))),
    ];
    for (name, f) in single {
        let name = format!("init.{name}.y");
        let y = f(golden.shape(&name), &mut Keys::new(12).unwrap()).unwrap();
        // LAPACK orthogonalizes in single precision.
        assert_matches(&golden, &name, &y, 2e-5);
    }
    let ran: Vec<&str> = pairs.iter().chain(single).map(|(name, _)| *name).chain(["layers"]).collect();
    assert_all_ran(&golden, "init", &ran);
}

#[test]
fn initializers_refuse_shapes_that_they_have_no_meaning_for() {
    let keys = &mut Keys::new(0).unwrap();
    for (name, result) in [
        ("identity", init::identity(&[2, 3], Dtype::F32)),
        ("fans", init::glorot_normal(&[3], 1.0, Dtype::F32, keys)),
        ("orthogonal", init::orthogonal(&[2, 2, 2], 1.0, Dtype::F32, keys)),
        ("sparse", init::sparse(&[4], 0.5, 0.0, 1.0, Dtype::F32, keys)),
        ("sparsity", init::sparse(&[4, 4], 1.5, 0.0, 1.0, Dtype::F32, keys)),
    ] {
        assert!(result.is_err(), "{name}");
    }
}
