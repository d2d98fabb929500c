//! Steps that are recorded and run again: the bits of steps that are built anew.

use mica_array::kv::{KvCodes, KvFormat, PAGE};
use mica_array::{Precision, set_threads};
use mica_lm::cache::Cache;
use mica_lm::decode::Decoder;
use mica_lm::generate::prefill;
use mica_lm::load::load;
use mica_lm::models::{Input, LanguageModel};
use mica_lm::weights::Packing;
use mica_nn::Context;
use mica_testkit::{assert_bits_eq, fixture};

const MODELS: [&str; 10] = [
    "llama",
    "llama-tied-bf16",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3-4bit",
    "llama-mixed",
    "qwen3-mxfp4",
    "lfm2",
    "lfm2-4bit",
];

/// A step, built and planned for itself.
fn plain(model: &dyn LanguageModel, cache: &mut Cache, tokens: &[u32], precision: Precision) -> Vec<f32> {
    let rows: Vec<&[u32]> = tokens.chunks(1).collect();
    cache.reserve(1).unwrap();
    let input = Input::new(&rows, &vec![cache.length(); rows.len()]).unwrap();
    let logits = model.logits(&input, Some(cache), &Context::new(precision)).unwrap();
    cache.advance(1);
    mica_array::eval(&cache.pending()).unwrap();
    logits.to_vec().unwrap()
}

#[test]
fn steps_have_the_same_bits_run_again_or_built() {
    let codes = KvFormat::Codes(KvCodes::new(8, 32).unwrap());
    for name in MODELS {
        let loaded = load(fixture(format!("models/{name}")), Packing::Frozen).unwrap();
        let (model, info) = (loaded.model.as_ref(), loaded.model.info());
        let steps = (info.max_positions - 1).min(PAGE + 10);
        for (batch, precision, format, threads) in [
            (1, Precision::Exact, KvFormat::F32, 1),
            (1, Precision::Fast, KvFormat::Bf16, 2),
            (3, Precision::Fast, KvFormat::Bf16, 3),
            (2, Precision::Bf16, codes, 2),
        ] {
            set_threads(threads).unwrap();
            let token = |step: usize, row: usize| ((step * 7919 + row * 31) % info.vocabulary) as u32;
            let mut decoder = Decoder::new(model, precision);
            let [mut expected, mut cache] = [0, 1].map(|_| model.new_cache(batch, format));
            assert!(decoder.logits().unwrap().is_empty());
            for step in 0..steps {
                let tokens: Vec<u32> = (0..batch).map(|row| token(step, row)).collect();
                let name = format!("{name}, batch {batch}, {precision:?}, step {step}");
                if step == 20 {
                    // What was recorded on one pool is no use on another.
                    set_threads(threads + 1).unwrap();
                }
                if step == 30 {
                    // The same decoder goes on with other sequences.
                    let rows: Vec<usize> = (0..batch).rev().collect();
                    [expected, cache] = [expected, cache].map(|cache| cache.fork(&rows).unwrap());
                }
                decoder.step(&mut cache, &tokens).unwrap();
                assert_bits_eq(
                    &name,
                    decoder.logits().unwrap(),
                    &plain(model, &mut expected, &tokens, precision),
                );
                assert!(decoder.is_recorded() || step < 2, "{name}");
            }
            // And with fewer of them.
            let [mut expected, mut cache] = [expected, cache].map(|cache| cache.fork(&[0]).unwrap());
            for step in 0..3 {
                let tokens = [token(step, 9)];
                if cache.length() < info.max_positions {
                    decoder.step(&mut cache, &tokens).unwrap();
                    assert_bits_eq(
                        name,
                        decoder.logits().unwrap(),
                        &plain(model, &mut expected, &tokens, precision),
                    );
                }
            }
        }
    }
}

#[test]
fn after_an_error_a_cache_is_what_it_was() {
    for name in ["llama-tied-bf16", "qwen3-4bit", "lfm2"] {
        let loaded = load(fixture(format!("models/{name}")), Packing::Frozen).unwrap();
        let (model, bad) = (loaded.model.as_ref(), loaded.model.info().vocabulary as u32);
        let precision = Precision::Fast;
        let [mut expected, mut cache] = [0, 1].map(|_| model.new_cache(1, KvFormat::Bf16));
        let failing = |cache: &mut Cache, tokens: &[u32]| {
            cache.attempt(|cache| {
                cache.reserve(tokens.len())?;
                let input = Input::new(&[tokens], &[cache.length()])?;
                let logits = model.logits(&input, Some(cache), &Context::new(precision))?;
                cache.advance(tokens.len());
                let mut roots = cache.pending();
                roots.push(logits);
                Ok(mica_array::eval(&roots)?)
            })
        };
        assert!(failing(&mut cache, &[1, bad]).is_err(), "{name}: in an empty cache");
        assert_eq!(cache.length(), 0, "{name}");
        let prompt = [5, 3, 8, 1, 2];
        let [before, read] =
            [&mut expected, &mut cache].map(|cache| prefill(model, cache, &prompt, precision));
        assert_bits_eq(name, &read.unwrap(), &before.unwrap());
        let mut decoder = Decoder::new(model, precision);
        for step in 0..5 {
            assert!(failing(&mut cache, &[7, 1, bad]).is_err(), "{name}, step {step}");
            assert!(prefill(model, &mut cache, &[1, bad], precision).is_err(), "{name}, step {step}");
            assert!(decoder.step(&mut cache, &[bad]).is_err(), "{name}, step {step}");
            assert_eq!((cache.length(), cache.kv.length(0)), (5 + step, 5 + step), "{name}");
            decoder.step(&mut cache, &[4]).unwrap();
            let name = format!("{name}, step {step}");
            assert_bits_eq(&name, decoder.logits().unwrap(), &plain(model, &mut expected, &[4], precision));
        }
        assert!(decoder.is_recorded(), "{name}");
    }
}
