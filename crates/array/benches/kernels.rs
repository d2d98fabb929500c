//! Kernels through their ops, one line each: what they reach, and which part of the ceiling that bounds them, measured
//! right beside. Bytes and operations are those of `MICA_PROFILE`, whose clock around the op is used as well, so
//! what a graph costs is not in it (the bench `graph` has that).
//!
//! `cargo bench -p mica-array --bench kernels`; words after `--` choose the lines that contain one, `MICA_THREADS` and
//! `MICA_ISA` threads and instruction set. A line is the median of rounds, each with ceilings of its own: on a
//! shared machine its share means more than its rates.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use mica_array::kv::{KvCache, KvFormat, KvSpec, PagedSpec};
use mica_array::op::{AttentionSpec, CrossEntropySpec, RopeSpec};
use mica_array::profile::{self, Row};
use mica_array::quantized::{QuantMode, QuantSpec, QuantizedArray};
use mica_array::transforms::{compile, vjp};
use mica_array::{Array, Dtype, PackedWeight, Precision, eval, random};
use mica_ceiling::{Arithmetic, Ceilings, Measured, Work, seconds};
use mica_simd::Isa;

/// Of the block whose reading is the ceiling: several times any cache that is one core's.
const BLOCK: usize = 1 << 29;
/// Rounds of a line, if they do not take too long.
const ROUNDS: usize = 7;
const LONGEST: Duration = Duration::from_secs(4);
/// Short ops are called again and again for so long in a round, as in a model: what they read may be in the caches, and
/// no thread sleeps.
const IN_A_ROW: Duration = Duration::from_millis(20);

struct Bench {
    words: Vec<String>,
    ceilings: Ceilings,
}

impl Bench {
    /// Measures the op of this name in what `run` evaluates. Inputs are made only if the line is asked for.
    fn line<T>(&self, name: &str, op: &str, setup: impl FnOnce() -> T, run: impl Fn(&T)) {
        if !self.words.is_empty() && !self.words.iter().any(|word| name.contains(word.as_str())) {
            return;
        }
        let inputs = setup();
        run(&inputs);
        let once = seconds(|| run(&inputs));
        let in_a_row = (IN_A_ROW.as_secs_f64() / once) as usize;
        let begun = Instant::now();
        let mut rounds = Vec::new();
        while rounds.len() < ROUNDS && (rounds.len() < 3 || begun.elapsed() < LONGEST) {
            let measured = mica_array::with_pool(|pool| self.ceilings.measure(pool));
            let session = profile::start();
            (0..in_a_row.max(1)).for_each(|_| run(&inputs));
            let rows = session.finish();
            let row = rows.into_iter().find(|row| row.op == op);
            let row = row.unwrap_or_else(|| panic!("{name}: no {op} was evaluated"));
            rounds.push((bound(&measured, &row), row));
        }
        rounds.sort_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds));
        let row = &rounds[rounds.len() / 2].1;
        let rate = |count: u64| count as f64 / row.seconds / 1e9;
        let mut shares: Vec<(&str, f64)> = rounds.iter().filter_map(|(bound, _)| *bound).collect();
        shares.sort_by(|a, b| a.1.total_cmp(&b.1));
        let share =
            shares.get(shares.len() / 2).map_or("no ceiling is known".to_string(), |(name, share)| {
                format!("{:4.0} % of {name}", 100.0 * share)
            });
        let ms = 1e3 * row.seconds / row.calls as f64;
        println!(
            "{name:44} {ms:9.3} ms {:7.1} GB/s {:8.1} GOP/s  {share}",
            rate(row.bytes),
            rate(row.operations)
        );
    }
}

fn bound(measured: &Measured, row: &Row) -> Option<(&'static str, f64)> {
    let arithmetic = match row.arithmetic {
        profile::Arithmetic::None => None,
        profile::Arithmetic::F32 => Some(Arithmetic::F32),
        profile::Arithmetic::Bf16 => Some(Arithmetic::Bf16),
        profile::Arithmetic::Int8 => Some(Arithmetic::Int8),
    };
    let &Row { seconds, bytes, operations, .. } = row;
    measured.bound(&Work { seconds, bytes, operations, arithmetic })
}

fn normal(shape: &[usize], dtype: Dtype) -> Array {
    let key = random::key(7).expect("a seed");
    let values = random::normal(shape, Dtype::F32, &key).and_then(|x| x.astype(dtype)).expect("floats");
    values.eval().expect("there is memory");
    values
}

/// Random affine codes in groups of 64, packed.
fn packed(shape: [usize; 2], bits: usize) -> Array {
    Array::from_packed(packed_weight(shape, bits))
}

fn packed_weight(shape: [usize; 2], bits: usize) -> PackedWeight {
    packed_as(shape, QuantSpec::affine(bits, 64).expect("a width that exists"))
}

/// Random codes, packed.
fn packed_as([out, inputs]: [usize; 2], format: QuantSpec) -> PackedWeight {
    let key = random::key(11).expect("a seed");
    let words = random::bits(&[out, format.words(inputs)], 4, &key).expect("words");
    let groups = [out, inputs / format.group_size()];
    let (words, scales, biases) = match format.mode() {
        QuantMode::Affine => {
            let of = |value| Array::full(&groups, value, Dtype::BF16);
            (words, of(0.01), Some(of(-0.08)))
        }
        // Of small magnitude, and no 8-bit float that is NaN or lacks an exponent: those are slow, and hardly ever there.
        mode => {
            let mask = |bits: u32| Array::full(&[1], f64::from(bits), Dtype::U32);
            let exponent = if mode == QuantMode::Mxfp8 { 0x2020_2020 } else { 0 };
            let numbers =
                words.bitwise_and(mask(0xbfbf_bfbf)).and_then(|words| words.bitwise_or(mask(exponent)));
            (numbers.expect("integers"), Array::full(&groups, 56.0, Dtype::U8), None)
        }
    };
    let codes = QuantizedArray::new(words, scales, biases, format, None).expect("sizes fit");
    PackedWeight::from_mlx(&codes).expect("sizes fit")
}

fn evaluate(result: mica_array::Result<Array>) {
    result.and_then(|array| array.eval()).expect("the inputs are right");
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let ceilings = mica_array::with_pool(|pool| Ceilings::new(Some(BLOCK), pool));
    let bench = Bench { words, ceilings };
    println!("{} threads, {}", mica_array::threads(), Isa::get());
    products(&bench);
    experts(&bench);
    heads(&bench);
    attention(&bench);
    rows(&bench);
}

fn products(bench: &Bench) {
    // Weights of 150 and 280 MB: more than a share of the last cache, so that they come from memory.
    const LONG: [usize; 2] = [65_536, 4096];
    for bits in [4, 8] {
        for m in [1, 2, 3, 4, 5, 6, 7, 8, 12, 16] {
            bench.line(
                &format!("quantized {bits} bits, {m} rows"),
                "linear",
                || (normal(&[m, LONG[1]], Dtype::F32), packed(LONG, bits)),
                |(x, weight)| evaluate(x.linear(weight, None, Precision::Fast)),
            );
        }
    }
    for mode in [QuantMode::Mxfp4, QuantMode::Nvfp4, QuantMode::Mxfp8] {
        for m in [1, 8] {
            bench.line(
                &format!("quantized {}, {m} rows", mode.name()),
                "linear",
                || {
                    (
                        normal(&[m, LONG[1]], Dtype::F32),
                        Array::from_packed(packed_as(LONG, QuantSpec::usual(mode))),
                    )
                },
                |(x, weight)| evaluate(x.linear(weight, None, Precision::Fast)),
            );
        }
    }
    const SQUARE: [usize; 2] = [4096, 4096];
    for mode in [QuantMode::Mxfp4, QuantMode::Nvfp4, QuantMode::Mxfp8] {
        bench.line(
            &format!("quantized {}, 512 rows", mode.name()),
            "linear",
            || {
                (
                    normal(&[512, SQUARE[1]], Dtype::F32),
                    Array::from_packed(packed_as(SQUARE, QuantSpec::usual(mode))),
                )
            },
            |(x, weight)| evaluate(x.linear(weight, None, Precision::Fast)),
        );
    }
    for bits in [4, 8] {
        for (name, precision) in
            [("int8", Precision::Fast), ("bf16", Precision::Bf16), ("f32", Precision::Exact)]
        {
            bench.line(
                &format!("quantized {bits} bits, 512 rows, {name}"),
                "linear",
                || (normal(&[512, SQUARE[1]], Dtype::F32), packed(SQUARE, bits)),
                |(x, weight)| evaluate(x.linear(weight, None, precision)),
            );
        }
        bench.line(
            &format!("quantized {bits} bits, 512 rows, bf16, transposed"),
            "linear_transposed",
            || (normal(&[512, SQUARE[0]], Dtype::F32), packed(SQUARE, bits)),
            |(y, weight)| evaluate(y.linear_transposed(weight, Precision::Bf16)),
        );
        bench.line(
            &format!("dequantize {bits} bits to bf16"),
            "dequantize",
            || packed(SQUARE, bits),
            |weight| evaluate(weight.dequantize_to(Dtype::BF16)),
        );
    }
    // Those of Qwen3-0.6B and Llama-3.2-1B.
    const SHAPES: [[usize; 2]; 8] = [
        [1024, 1024],
        [2048, 1024],
        [6144, 1024],
        [1024, 2048],
        [1024, 3072],
        [2048, 2048],
        [16_384, 2048],
        [2048, 8192],
    ];
    for [out, inputs] in SHAPES {
        bench.line(
            &format!("quantized {out} x {inputs}, 512 rows, int8"),
            "linear",
            || (normal(&[512, inputs], Dtype::F32), packed([out, inputs], 4)),
            |(x, weight)| evaluate(x.linear(weight, None, Precision::Fast)),
        );
    }
    for dtype in [Dtype::BF16, Dtype::F32] {
        for n in [512, 1024, 2048, 4096] {
            bench.line(
                &format!("{} product {n} x {n} x {n}", dtype.name()),
                "matmul",
                || (normal(&[n, n], dtype), normal(&[n, n], dtype)),
                |(a, b)| evaluate(a.matmul(b)),
            );
        }
    }
}

/// Matrices of 768 x 2048, 8 for each token.
const EXPERT: [usize; 2] = [768, 2048];
const CHOSEN: usize = 8;

/// The experts of each token, in several sets to take turns. A few tokens have others of many experts each time, as if
/// each time were another layer: they come from memory.
struct Routes {
    sets: Vec<Array>,
    turn: Cell<usize>,
}

impl Routes {
    fn new(tokens: usize, experts: usize, sets: usize) -> Routes {
        // Steps of 37, a prime to the number of experts, reach another one each time.
        let of = |set: usize| -> Vec<u32> {
            let of = |token: usize| (0..CHOSEN).map(move |i| token * token * 7919 + i * 37);
            (0..tokens).flat_map(of).map(|at| ((at + set * CHOSEN * 37) % experts) as u32).collect()
        };
        let sets = (0..sets).map(|set| Array::from_slice(&of(set), &[tokens, CHOSEN]).expect("indices"));
        Routes { sets: sets.collect(), turn: Cell::new(0) }
    }

    fn next(&self) -> &Array {
        self.turn.set((self.turn.get() + 1) % self.sets.len());
        &self.sets[self.turn.get()]
    }
}

/// Products of rows with the experts that they are routed to.
fn experts(bench: &Bench) {
    let [out, inputs] = EXPERT;
    for (tokens, count, sets) in [(1, 128, 16), (16, 128, 16), (512, 32, 1)] {
        let x = |dtype| normal(&[tokens, 1, 1, inputs], dtype);
        let name = |what: &str| format!("experts, 8 of {count}, {tokens} tokens, {what}");
        for dtype in [Dtype::BF16, Dtype::F32] {
            let weight = || {
                // Drawing all of them takes long: one is drawn, and they are its multiples.
                let one = normal(&[1, out, inputs], dtype);
                let factors: Vec<f32> = (1..=count).map(|expert| expert as f32 / count as f32).collect();
                let factors = Array::from_slice(&factors, &[count, 1, 1]).and_then(|x| x.astype(dtype));
                let weight = factors.and_then(|factors| one.multiply(factors)).expect("shapes fit");
                weight.eval().expect("there is memory");
                weight.swap_axes(1, 2).expect("three dimensions")
            };
            bench.line(
                &name(dtype.name()),
                "gather_mm",
                || (x(dtype), weight(), Routes::new(tokens, count, sets)),
                |(x, weight, routes)| evaluate(x.gather_mm(weight, None, Some(routes.next()), false)),
            );
        }
        let floats = || {
            let one = normal(&EXPERT, Dtype::BF16);
            let weights = (0..count).map(|_| PackedWeight::from_float(&one).expect("a matrix"));
            PackedWeight::experts(weights.collect()).expect("one shape")
        };
        let quantized = || {
            let weights = (0..count).map(|_| packed_weight(EXPERT, 4));
            PackedWeight::experts(weights.collect()).expect("one shape")
        };
        let packed: [(&str, &dyn Fn() -> PackedWeight, Precision); 3] = [
            ("packed bf16", &floats, Precision::Bf16),
            ("4 bits, int8", &quantized, Precision::Fast),
            ("4 bits, bf16", &quantized, Precision::Bf16),
        ];
        for (what, weight, precision) in packed {
            bench.line(
                &name(what),
                "gather_linear",
                || (x(Dtype::F32), Array::from_packed(weight()), Routes::new(tokens, count, sets)),
                |(x, weight, routes)| evaluate(x.gather_linear(weight, None, Some(routes.next()), precision)),
            );
        }
    }
}

/// The output head with its loss and gradients: of a frozen head (Qwen3-0.6B) and of one that is trained (a tiny model).
fn heads(bench: &Bench) {
    let inputs = |rows: usize, [vocabulary, width]: [usize; 2], frozen: bool| {
        let hidden = normal(&[rows, width], Dtype::F32);
        let weight = normal(&[vocabulary, width], Dtype::BF16);
        let targets: Vec<i32> = (0..rows).map(|row| (row * 7919 % vocabulary) as i32).collect();
        let targets = Array::from_slice(&targets, &[rows]).expect("targets");
        if !frozen {
            return (vec![hidden, weight], None, targets);
        }
        let weight = PackedWeight::from_float(&weight).expect("a matrix");
        (vec![hidden], Some(Array::from_packed(weight)), targets)
    };
    for (rows, shape, frozen) in [(1024, [151_936, 1024], true), (8192, [8192, 256], false)] {
        let [vocabulary, width] = shape;
        let what = if frozen { "frozen" } else { "trained" };
        bench.line(
            &format!("loss of {rows} rows of {width} over {vocabulary}, {what}"),
            "linear_cross_entropy",
            || inputs(rows, shape, frozen),
            |(learnt, head, targets)| {
                let spec = CrossEntropySpec { precision: Precision::Bf16, softcap: None };
                let loss = |x: &[Array]| {
                    let head = head.as_ref().unwrap_or_else(|| &x[1]);
                    Ok(vec![x[0].linear_cross_entropy(head, targets, spec)?.0])
                };
                let (_, gradients) =
                    vjp(loss, learnt, &[Array::full(&[], 1.0, Dtype::F32)]).expect("gradients");
                eval(&gradients).expect("the inputs are right");
            },
        );
    }
}

const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const WIDTH: usize = 128;

fn attention(bench: &Bench) {
    let spec = AttentionSpec {
        scale: (WIDTH as f32).powf(-0.5),
        causal: true,
        window: None,
        softcap: None,
        key_start: false,
        precision: Precision::Bf16,
    };
    let inputs = |batch: usize, length: usize, [heads, kv_heads, width]: [usize; 3]| {
        let kv = || normal(&[batch, length, kv_heads, width], Dtype::F32);
        [normal(&[batch, length, heads, width], Dtype::F32), kv(), kv()]
    };
    const LARGE: [usize; 3] = [HEADS, KV_HEADS, WIDTH];
    // The last is that of a tiny model.
    for (batch, length, heads) in
        [(1, 512, LARGE), (1, 1024, LARGE), (1, 2048, LARGE), (1, 4096, LARGE), (16, 512, [4, 4, 64])]
    {
        let name = match heads {
            LARGE => format!("attention over {length}"),
            _ => format!("attention over {length}, {batch} rows, {heads:?}"),
        };
        bench.line(
            &name,
            "attention",
            || inputs(batch, length, heads),
            |[q, k, v]| evaluate(q.attention(k, v, None, spec.clone())),
        );
        bench.line(
            &format!("{name}, backward"),
            "attention_vjp",
            || inputs(batch, length, heads),
            |inputs| {
                let seed = inputs[0].clone();
                let function = |x: &[Array]| Ok(vec![x[0].attention(&x[1], &x[2], None, spec.clone())?]);
                let (_, gradients) = vjp(function, inputs, &[seed]).expect("attention has gradients");
                eval(&gradients).expect("the inputs are right");
            },
        );
    }
    // The last is a step of four short texts, whose keys and values no cache has held since the step before.
    for (sequences, depth, layers) in
        [(1usize, 512usize, 1usize), (1, 4096, 1), (1, 32_768, 1), (4, 100, 1), (4, 100, 48)]
    {
        let kv = KvSpec { layers, kv_heads: KV_HEADS, head_dim: WIDTH, format: KvFormat::Bf16 };
        let paged = PagedSpec { scale: spec.scale, window: None, softcap: None, precision: Precision::Bf16 };
        let attend = move |cache: &mut KvCache, length: usize| {
            let row = |heads| normal(&[sequences, length, heads, WIDTH], Dtype::F32);
            cache.reserve(length).expect("there is memory");
            let attend = |layer| {
                let out = cache.attend(layer, &row(HEADS), &row(KV_HEADS), &row(KV_HEADS), paged);
                out.expect("sizes fit")
            };
            let outs: Vec<Array> = (0..layers).map(attend).collect();
            cache.advance(length);
            eval(&outs).expect("the inputs are right");
        };
        let name = match (sequences, layers) {
            (1, _) => format!("attention of a token over {depth}"),
            _ => format!("attention of a token over {depth}, {sequences} sequences, {layers} layers"),
        };
        bench.line(
            &name,
            "paged_attention",
            || {
                let mut cache = KvCache::new(kv.clone(), sequences);
                for _ in 0..depth.div_ceil(512) {
                    attend(&mut cache, depth.min(512));
                }
                RefCell::new(cache)
            },
            |cache| {
                let mut cache = cache.borrow_mut();
                attend(&mut cache, 1);
                (0..sequences).for_each(|row| cache.truncate(row, depth));
            },
        );
    }
}

fn rows(bench: &Bench) {
    const ROWS: usize = 16_384;
    for dtype in [Dtype::F32, Dtype::BF16] {
        bench.line(
            &format!("rms_norm of 1024, {dtype}"),
            "rms_norm",
            || (normal(&[ROWS, 1024], dtype), normal(&[1024], dtype)),
            |(x, weight)| evaluate(x.rms_norm(weight, 1e-6)),
        );
        bench.line(
            &format!("rope, {dtype}"),
            "rope",
            || {
                let positions: Vec<i32> = (0..ROWS as i32 / 16).collect();
                let frequencies: Vec<f32> = (0..64).map(|i| 1e6f32.powf(-i as f32 / 64.0)).collect();
                (
                    normal(&[1, positions.len(), HEADS, WIDTH], dtype),
                    Array::from_slice(&positions, &[1, positions.len()]).expect("positions"),
                    Array::from_slice(&frequencies, &[64]).expect("frequencies"),
                )
            },
            |(x, positions, frequencies)| {
                let spec = RopeSpec { dims: WIDTH, traditional: false, inverse: false, scale: 1.0 };
                evaluate(x.rope(positions, frequencies, spec))
            },
        );
        let gated = compile(|x: &[Array]| Ok(vec![x[0].sigmoid()?.multiply(&x[0])?.multiply(&x[1])?]));
        bench.line(
            &format!("silu(gate) * up, compiled, {dtype}"),
            "fused",
            || [normal(&[ROWS, 1024], dtype), normal(&[ROWS, 1024], dtype)],
            |inputs| {
                let outputs = gated.call(inputs).expect("shapes are equal");
                eval(&outputs).expect("floats");
            },
        );
    }
}
