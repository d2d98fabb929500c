//! How far the logits of deep models are from those of their dequantized weights, in each precision.
//!
//! The models are made here, with 28 layers, over which errors add up as in real models of this size. They have a
//! quarter of the width of Qwen3-0.6B and an eighth of that of Llama-3.2-1B, because the reference is a forward pass
//! of its own in f64. The error of a model this narrow differs by a quarter from one draw of its weights to the next
//! (that of a real width does not), so the limits hold for the mean over several draws. docs/NUMERICS.md has the
//! figures of a real width.

mod reference;

use std::path::Path;

use mica_array::files::save_safetensors;
use mica_array::kv::KvFormat;
use mica_array::{Array, Dtype, Precision};
use mica_lm::config::QuantSpec;
use mica_lm::convert::{Recipe, convert};
use mica_lm::load::{Loaded, load};
use mica_lm::models::Input;
use mica_lm::weights::Packing;
use mica_nn::Context;
use mica_testkit::{Rng, assert_bits_eq, relative_l2};

use crate::reference::{Activations, Reference, Shape};

/// Of exact products: f32 sums over 28 layers in another order than f64.
const EXACT: f64 = 1e-4;
/// Of bf16 products with a residual stream in f32.
const BF16: f64 = 0.013;
/// Of int8 activations.
const INT8: f64 = 0.032;
/// Error of int8 activations by that of llama.cpp's, for weights in groups as long as its blocks.
const TIMES_Q8_0: f64 = 1.15;

const TOKENS: usize = 16;
/// Draws of weights.
const DRAWS: u64 = 3;

const QWEN3: Shape = Shape {
    family: "qwen3",
    layers: 28,
    hidden: 256,
    heads: 8,
    kv_heads: 4,
    head_dim: 64,
    intermediate: 768,
    vocabulary: 1024,
    head_norm: true,
};
const LLAMA: Shape =
    Shape { family: "llama", heads: 4, kv_heads: 1, intermediate: 1024, head_norm: false, ..QWEN3 };

/// A quantized model with the logits of its weights in f64.
struct Case {
    loaded: Loaded,
    tokens: Vec<u32>,
    reference: Reference,
    expected: Vec<f32>,
}

/// Writes a model with random weights in bf16, as benches/peers/make_model.py does.
fn write_plain(folder: &Path, shape: Shape, seed: u64) {
    let mut rng = Rng::new(seed);
    let arrays: Vec<(String, Array)> = shape
        .parameters()
        .into_iter()
        .map(|(name, size)| {
            let count = size.iter().product();
            let values = match (&size[..], name.contains("embed")) {
                ([_], _) => vec![1.0; count],
                (_, embedding) => {
                    let deviation = if embedding { 0.02 } else { (size[1] as f32).powf(-0.5) };
                    rng.normals(count).into_iter().map(|x| x * deviation).collect()
                }
            };
            let array = Array::from_slice(&values, &size).unwrap().astype(Dtype::BF16).unwrap();
            (name, array)
        })
        .collect();
    std::fs::create_dir(folder).unwrap();
    save_safetensors(folder.join("model.safetensors"), &arrays, &[]).unwrap();
    std::fs::write(folder.join("config.json"), shape.config().to_string()).unwrap();
}

/// The model of a folder in 4 bits.
fn case(plain: &Path, shape: Shape, group_size: usize) -> Case {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let spec = QuantSpec::affine(4, group_size).unwrap();
    convert(plain, path("packed"), &Recipe { quantize: Some(spec), ..Recipe::default() }).unwrap();
    let dequantize = Recipe { dequantize: true, dtype: Some(Dtype::F32), ..Recipe::default() };
    convert(path("packed"), path("dequantized"), &dequantize).unwrap();
    let reference = Reference::open(&path("dequantized"), shape);
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| (i * 7919 + 11) % shape.vocabulary as u32).collect();
    Case {
        loaded: open(&path("packed")),
        expected: reference.logits(&tokens, Activations::Plain),
        tokens,
        reference,
    }
}

fn open(folder: &Path) -> Loaded {
    load(folder, Packing::Frozen).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

impl Case {
    /// Of one pass over all tokens.
    fn logits(&self, precision: Precision) -> Vec<f32> {
        let input = Input::new(&[&self.tokens], &[0]).unwrap();
        let logits = self.loaded.model.logits(&input, None, &Context::new(precision)).unwrap();
        logits.to_vec().unwrap()
    }

    /// Token by token, with keys and values kept in bf16, as in generation.
    fn generating(&self) -> Vec<f32> {
        let context = Context::new(Precision::Fast);
        let mut cache = self.loaded.model.new_cache(1, KvFormat::Bf16);
        let mut all = Vec::new();
        for (position, &token) in self.tokens.iter().enumerate() {
            cache.reserve(1).unwrap();
            let input = Input::new(&[&[token]], &[position]).unwrap();
            let logits = self.loaded.model.logits(&input, Some(&mut cache), &context).unwrap();
            cache.advance(1);
            all.extend(logits.to_vec::<f32>().unwrap());
        }
        all
    }
}

/// Mean errors over all draws.
#[derive(Default)]
struct Errors {
    exact: f64,
    bf16: f64,
    int8: f64,
    /// Of int8 with weights in groups of 32, and of llama.cpp's rounding of activations with the same weights.
    int8_of_32: f64,
    q8_0: f64,
}

fn errors(shape: Shape) -> Errors {
    let mut mean = Errors::default();
    for seed in 0..DRAWS {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        write_plain(&plain, shape, seed);
        let of = |case: &Case, logits: &[f32]| relative_l2(logits, &case.expected) / DRAWS as f64;
        let usual = case(&plain, shape, 64);
        mean.exact += of(&usual, &usual.logits(Precision::Exact));
        mean.bf16 += of(&usual, &usual.logits(Precision::Bf16));
        let fast = usual.logits(Precision::Fast);
        mean.int8 += of(&usual, &fast);
        // What one pass gives is what generation gives.
        assert_bits_eq("token by token", &usual.generating(), &fast);
        let short = case(&plain, shape, 32);
        mean.int8_of_32 += of(&short, &short.logits(Precision::Fast));
        mean.q8_0 += of(&short, &short.reference.logits(&short.tokens, Activations::Q8_0));
    }
    mean
}

fn check(shape: Shape) {
    let Errors { exact, bf16, int8, int8_of_32, q8_0 } = errors(shape);
    for (name, error, limit) in [
        ("exact", exact, EXACT),
        ("bf16", bf16, BF16),
        ("int8", int8, INT8),
        ("int8 beside Q8_0", int8_of_32, TIMES_Q8_0 * q8_0),
    ] {
        assert!(error <= limit, "{name}: relative L2 {error:.3e}, expected {limit:.3e} at most");
    }
    // Were one mode computed as another, their errors would not be so far apart.
    assert!(100.0 * exact < bf16 && 1.5 * bf16 < int8, "exact {exact:.3e}, bf16 {bf16:.3e}, int8 {int8:.3e}");
}

#[test]
fn logits_of_qwen3_are_as_near_as_each_precision_promises() {
    check(QWEN3);
}

#[test]
fn logits_of_llama_are_as_near_as_each_precision_promises() {
    check(LLAMA);
}
