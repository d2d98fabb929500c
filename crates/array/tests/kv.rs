//! The store of keys and values, in each of its formats, beside the reference backend.

use mica_array::backend::reference::Reference;
use mica_array::kv::{KvCache, KvCodes, KvFormat, KvSpec, PagedSpec};
use mica_array::{Array, Precision, eval, set_backend, set_threads};
use mica_testkit::{Rng, assert_bits_eq, relative_l2};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const LAYERS: usize = 2;

fn formats() -> Vec<KvFormat> {
    let codes = |bits, group| KvFormat::Codes(KvCodes::new(bits, group).unwrap());
    vec![KvFormat::F32, KvFormat::Bf16, codes(8, 32), codes(8, 64), codes(4, 32), codes(4, 128)]
}

/// Positions of a sequence: queries, keys, values.
struct Tokens([Vec<f32>; 3], usize);

impl Tokens {
    fn new(count: usize, dim: usize, rng: &mut Rng) -> Tokens {
        let mut normal = |heads| (0..count * heads * dim).map(|_| rng.uniform(-2.0, 2.0)).collect();
        Tokens([normal(HEADS), normal(KV_HEADS), normal(KV_HEADS)], dim)
    }

    /// Those of a range, of as many sequences as there are, side by side.
    fn rows(all: &[&Tokens], from: usize, to: usize) -> [Array; 3] {
        [0, 1, 2].map(|which| {
            let (heads, dim) = (if which == 0 { HEADS } else { KV_HEADS }, all[0].1);
            let row = |tokens: &&Tokens| tokens.0[which][from * heads * dim..to * heads * dim].to_vec();
            let values: Vec<f32> = all.iter().flat_map(row).collect();
            Array::from_slice(&values, &[all.len(), to - from, heads, dim]).unwrap()
        })
    }
}

/// What attention gives for the tokens `from..to`, appended in pieces.
fn attend(
    cache: &mut KvCache,
    all: &[&Tokens],
    (from, to): (usize, usize),
    piece: usize,
    window: Option<usize>,
) -> Vec<f32> {
    let spec = PagedSpec { scale: 0.3, window, softcap: None, precision: Precision::Exact };
    let mut got = Vec::new();
    for at in (from..to).step_by(piece) {
        let end = (at + piece).min(to);
        let [q, k, v] = Tokens::rows(all, at, end);
        cache.reserve(end - at).unwrap();
        let outs: Vec<Array> =
            (0..LAYERS).map(|layer| cache.attend(layer, &q, &k, &v, spec).unwrap()).collect();
        cache.advance(end - at);
        eval(&outs).unwrap();
        got.extend(outs[LAYERS - 1].to_vec::<f32>().unwrap());
    }
    got
}

#[test]
fn every_format_agrees_with_the_reference_and_forks_go_their_own_way() {
    let mut on_cpu = Vec::new();
    // The backend is the process's: first all on one, then all on the other.
    for reference in [false, true] {
        let mut rng = Rng::new(5);
        match reference {
            true => set_backend(Box::new(Reference)),
            false => set_threads(2).unwrap(),
        }
        let mut results = Vec::new();
        for format in formats() {
            for (dim, window) in [(40, None), (64, Some(9)), (17, None)] {
                let spec = KvSpec { layers: LAYERS, kv_heads: KV_HEADS, head_dim: dim, format };
                let [a, b] = [0, 1].map(|_| Tokens::new(300, dim, &mut rng));
                let mut cache = KvCache::new(spec.clone(), 1);
                let mut got = attend(&mut cache, &[&a], (0, 250), 125, window);
                // Two go on from the same 250, one with the tokens of another.
                let mut fork = cache.fork(&[0, 0]).unwrap();
                got.extend(attend(&mut fork, &[&a, &b], (250, 270), 5, window));
                let once = attend(&mut cache, &[&a], (250, 300), 1, window);
                // Taken back and given again: the same.
                cache.truncate(0, 261);
                let again = attend(&mut cache, &[&a], (261, 300), 13, window);
                if !reference {
                    let name = format!("{format} {dim}");
                    assert_bits_eq(&name, &again, &once[11 * HEADS * dim..]);
                }
                got.extend(once);
                results.push((format!("{format}, dim {dim}"), got));
            }
        }
        match reference {
            false => on_cpu = results,
            true => {
                for ((name, got), (_, expected)) in on_cpu.iter().zip(&results) {
                    let error = relative_l2(got, expected);
                    assert!(error < 2e-6, "{name}: {error}");
                }
            }
        }
    }
}

#[test]
fn codes_take_the_memory_that_they_say() {
    let bytes = |format| KvSpec { layers: 3, kv_heads: 2, head_dim: 128, format }.bytes_per_position();
    let floats = 3 * 2 * 2 * 128;
    assert_eq!(bytes(KvFormat::F32), 4 * floats);
    assert_eq!(bytes(KvFormat::Bf16), 2 * floats);
    // A byte or half of one each, and a scale and a bias of two bytes for each 64.
    let codes = |bits| KvFormat::Codes(KvCodes::new(bits, 64).unwrap());
    assert_eq!(bytes(codes(8)), floats + floats / 64 * 4);
    assert_eq!(bytes(codes(4)), floats / 2 + floats / 64 * 4);
}
