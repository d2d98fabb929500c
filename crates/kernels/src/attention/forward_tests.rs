use mica_testkit::{Golden, Rng, assert_bits_eq, assert_close, fixture, max_abs_rel_to_max};
use mica_threads::Pool;

use super::super::read_pages;
use super::*;
use crate::attention::{Codes, PageFormat, PageShape, PagedArgs, PagedSequence, paged_attention};
use crate::plan::run_plan;
use crate::testing::{Laid, Layout};

fn single(laid: &Laid) -> Vec<f32> {
    laid.values().into_iter().map(|v| v as f32).collect()
}

/// A problem with its arrays.
pub(crate) struct Case {
    pub q: Laid,
    pub k: Laid,
    pub v: Laid,
    pub rule: Rule,
}

impl Case {
    fn heads(&self) -> usize {
        self.q.shape[1]
    }

    /// Out and lse in f64.
    pub fn naive(&self) -> (Vec<f64>, Vec<f64>) {
        let (q, k, v) = (self.q.values(), self.k.values(), self.v.values());
        let [batch, heads, length, dim] = self.q.shape[..] else { panic!() };
        let (kv_heads, keys, value_dim) = (self.k.shape[1], self.k.shape[2], self.v.shape[3]);
        let mut out = vec![0.0; batch * heads * length * value_dim];
        let mut lse = vec![f64::NEG_INFINITY; batch * heads * length];
        for b in 0..batch {
            for h in 0..heads {
                for l in 0..length {
                    let unit = b * kv_heads + h / (heads / kv_heads);
                    let row = (b * heads + h) * length + l;
                    let position = keys as isize - length as isize + l as isize;
                    let (low, high) = self.rule.range(b, l, position, keys);
                    let mut scores = Vec::new();
                    for key in low..high {
                        let dot: f64 =
                            (0..dim).map(|d| q[row * dim + d] * k[(unit * keys + key) * dim + d]).sum();
                        let mut score = dot * self.rule.scale as f64;
                        if let Some(cap) = self.rule.soft_cap {
                            score = cap as f64 * (score / cap as f64).tanh();
                        }
                        if let Some(mask) = &self.rule.mask {
                            let at = b as isize * mask.strides[0]
                                + h as isize * mask.strides[1]
                                + l as isize * mask.strides[2]
                                + key as isize * mask.strides[3];
                            // SAFETY: the test's mask has that shape.
                            unsafe {
                                match mask.dtype {
                                    Dtype::Bool => {
                                        if *mask.pointer.offset(at) == 0 {
                                            score = f64::NEG_INFINITY;
                                        }
                                    }
                                    _ => score += *mask.pointer.cast::<f32>().offset(at) as f64,
                                }
                            }
                        }
                        scores.push(score);
                    }
                    let sink = self.rule.sink(h).map(|s| s as f64);
                    let all = scores.iter().copied().chain(sink);
                    let max = all.clone().fold(f64::NEG_INFINITY, f64::max);
                    if max == f64::NEG_INFINITY {
                        continue;
                    }
                    let total: f64 = all.map(|s| (s - max).exp()).sum();
                    lse[row] = max + total.ln();
                    for (key, score) in (low..high).zip(scores) {
                        let weight = (score - max).exp() / total;
                        for d in 0..value_dim {
                            out[row * value_dim + d] += weight * v[(unit * keys + key) * value_dim + d];
                        }
                    }
                }
            }
        }
        (out, lse)
    }

    pub fn run(&self, isa: Isa, pool: &Pool, precision: Precision, layout: Layout) -> (Vec<f32>, Vec<f32>) {
        let [batch, heads, length, _] = self.q.shape[..] else { panic!() };
        let mut out = Laid::poisoned(Dtype::F32, &[batch, heads, length, self.v.shape[3]], layout);
        let mut lse = Laid::poisoned(Dtype::F32, &[batch, heads, length], layout);
        let args = AttentionArgs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            rule: self.rule.clone(),
            precision,
            out: out.view_mut(),
            lse: Some(lse.view_mut()),
        };
        run_plan(pool, attention(isa, args).unwrap());
        out.check_untouched_outside();
        lse.check_untouched_outside();
        (single(&out), single(&lse))
    }
}

fn case(dtype: Dtype, layout: Layout, [b, h, hk, l, s, d, dv]: [usize; 7], rng: &mut Rng) -> Case {
    Case {
        q: Laid::random(dtype, &[b, h, l, d], layout, rng),
        k: Laid::random(dtype, &[b, hk, s, d], layout, rng),
        v: Laid::random(dtype, &[b, hk, s, dv], layout, rng),
        rule: Rule { scale: 1.0 / (d as f32).sqrt(), ..Rule::default() },
    }
}

/// Sizes [batch, heads, kv_heads, length, keys, dim, value_dim].
const SIZES: [[usize; 7]; 8] = [
    [1, 1, 1, 1, 1, 1, 1],
    [2, 6, 2, 13, 13, 16, 16],
    [1, 3, 1, 5, 515, 40, 40],
    [2, 4, 4, 1, 300, 33, 17],
    [1, 4, 2, 67, 67, 80, 80],
    [1, 2, 1, 20, 9, 24, 24],
    [1, 8, 1, 3, 769, 128, 64],
    [2, 2, 2, 0, 5, 8, 8],
];

#[test]
fn agrees_with_f64_for_every_rule() {
    let pool = Pool::new(2);
    let mut rng = Rng::new(1);
    for sizes in SIZES {
        let [b, h, _, l, s, ..] = sizes;
        for (variant, name) in
            ["full", "causal", "window", "ranges", "cap", "sinks", "bool", "additive"].into_iter().enumerate()
        {
            let layout =
                [Layout::Contiguous, Layout::Padded, Layout::Transposed, Layout::Reversed][variant % 4];
            let mut case = case(Dtype::F32, layout, sizes, &mut rng);
            let starts: Vec<f64> = (0..b * l).map(|_| rng.range(0..s + 1) as f64).collect();
            let ends: Vec<f64> = starts.iter().map(|&x| x + rng.range(0..s + 1) as f64).collect();
            let starts = Laid::new(Dtype::I32, &[b, l], Layout::Padded, &starts);
            let ends = Laid::new(Dtype::I32, &[b, l], Layout::Transposed, &ends);
            let sinks = Laid::random(Dtype::F32, &[h], Layout::Padded, &mut rng);
            let boolean = Laid::random(Dtype::Bool, &[b, 1, l, s], Layout::Padded, &mut rng);
            let additive = Laid::random(Dtype::F32, &[1, h, l, s], Layout::Transposed, &mut rng);
            let wide = |mask: &Laid| {
                let mut view = mask.view();
                for (axis, &size) in [b, h, l, s].iter().enumerate() {
                    if view.shape[axis] != size {
                        view.strides[axis] = 0;
                        view.shape[axis] = size;
                    } else if size == 1 {
                        view.strides[axis] = 0;
                    }
                }
                view
            };
            let rule = &mut case.rule;
            rule.causal = variant != 0 && variant != 3;
            match name {
                "window" => rule.window = Some(5),
                "ranges" => (rule.key_start, rule.key_end) = (Some(starts.view()), Some(ends.view())),
                "cap" => rule.soft_cap = Some(1.5),
                "sinks" => rule.sinks = Some(sinks.view()),
                "bool" => rule.mask = Some(wide(&boolean)),
                "additive" => rule.mask = Some(wide(&additive)),
                _ => {}
            }
            // Strides of dimensions of size one are never to be used; ranges index [b, l].
            for view in [&mut rule.key_start, &mut rule.key_end].into_iter().flatten() {
                for axis in 0..2 {
                    if view.shape[axis] == 1 {
                        view.strides[axis] = 0;
                    }
                }
            }
            let (out, lse) = case.naive();
            let out: Vec<f32> = out.iter().map(|&x| x as f32).collect();
            let lse: Vec<f32> = lse.iter().map(|&x| x as f32).collect();
            for &isa in Isa::available() {
                let label = format!("{isa} {name} {sizes:?} {layout:?}");
                let (got, log) = case.run(isa, &pool, Precision::Exact, layout);
                // f32 sums of up to 769 terms.
                assert_close(&label, &got, &out, 2e-5, 2e-6);
                assert_close(&format!("{label} lse"), &log, &lse, 2e-6, 2e-6);
                let (got, log) = case.run(isa, &pool, Precision::Bf16, layout);
                if !got.is_empty() && out.iter().any(|&x| x != 0.0) {
                    // bf16 has 8 bits: each of q, k, v and the weights is off by up to 2^-9.
                    let error = max_abs_rel_to_max(&got, &out);
                    assert!(error < 2e-2, "{label} bf16: {error}");
                }
                assert_close(&format!("{label} bf16 lse"), &log, &lse, 1e-2, 3e-2);
            }
        }
    }
}

#[test]
fn half_inputs_are_exact_on_their_own_values() {
    let pool = Pool::new(2);
    let mut rng = Rng::new(2);
    for dtype in [Dtype::BF16, Dtype::F16] {
        for sizes in SIZES {
            let mut case = case(dtype, Layout::Padded, sizes, &mut rng);
            case.rule.causal = true;
            let wide = Case {
                q: Laid::contiguous(Dtype::F32, &case.q.shape, &case.q.values()),
                k: Laid::contiguous(Dtype::F32, &case.k.shape, &case.k.values()),
                v: Laid::contiguous(Dtype::F32, &case.v.shape, &case.v.values()),
                rule: case.rule.clone(),
            };
            for &isa in Isa::available() {
                let got = case.run(isa, &pool, Precision::Exact, Layout::Contiguous);
                let expected = wide.run(isa, &pool, Precision::Exact, Layout::Contiguous);
                assert_bits_eq(&format!("{isa} {dtype} {sizes:?}"), &got.0, &expected.0);
                assert_bits_eq(&format!("{isa} {dtype} {sizes:?} lse"), &got.1, &expected.1);
            }
        }
    }
}

#[test]
fn goldens_from_torch() {
    let pool = Pool::new(2);
    let golden = Golden::load(fixture("ops/attention.safetensors"));
    let index = std::fs::read_to_string(fixture("ops/attention.json")).unwrap();
    let mut seen = 0;
    for line in index.lines().filter(|line| line.contains("\"inputs\"")) {
        let (name, case) = golden_case(&golden, line);
        for &isa in Isa::available() {
            let (out, lse) = case.run(isa, &pool, Precision::Exact, Layout::Contiguous);
            assert_close(&format!("{isa} {name}"), &out, &golden.f32s(&format!("{name}.out")), 1e-5, 1e-6);
            assert_close(
                &format!("{isa} {name} lse"),
                &lse,
                &golden.f32s(&format!("{name}.lse")),
                2e-6,
                2e-6,
            );
        }
        seen += 1;
    }
    assert!(seen > 10);
}

/// The case that a line of the goldens' index describes. Its views stay valid because their
/// arrays are leaked: a few kilobytes per test run.
pub(crate) fn golden_case(golden: &Golden, line: &str) -> (String, Case) {
    let field = |key: &str| {
        let rest = line.split(&format!("\"{key}\": ")).nth(1).unwrap();
        rest.split([',', '}']).next().unwrap().trim().trim_matches('"').to_string()
    };
    let name = field("name");
    let inputs = field("inputs");
    let laid = |key: &str| Laid::contiguous(Dtype::F32, golden.shape(key), &golden.f64s(key));
    let leak = |laid: Laid| Box::leak(Box::new(laid)).view();
    let number = |key: &str| field(key).parse::<f64>().ok();
    let [q, k, v] = ["q", "k", "v"].map(|part| laid(&format!("{inputs}.{part}")));
    let length = q.shape[2];
    let heads = q.shape[1];
    let mut rule = Rule {
        scale: number("scale").unwrap() as f32,
        causal: field("causal") == "true",
        window: number("window").map(|w| w as usize),
        soft_cap: number("softcap").map(|c| c as f32),
        ..Rule::default()
    };
    if field("segments") == "true" {
        let segments = golden.i64s("segments");
        let start: Vec<f64> =
            (0..length).map(|i| segments.iter().position(|&s| s == segments[i]).unwrap() as f64).collect();
        rule.key_start = Some(leak(Laid::contiguous(Dtype::I32, &[1, length], &start)));
    }
    if field("sinks") == "true" {
        rule.sinks = Some(leak(laid("sinks")));
    }
    if field("additive_mask") == "true" {
        let mut mask = leak(laid("mask"));
        mask.shape = [1, heads, length, k.shape[2]].as_slice().into();
        mask.strides[1] = 0;
        rule.mask = Some(mask);
    }
    (name, Case { q, k, v, rule })
}

/// Pages of poisoned memory, aligned to 64.
struct Memory {
    words: Vec<Vec<u64>>,
}

impl Memory {
    fn new(pages: usize, bytes: usize) -> Memory {
        Memory { words: vec![vec![u64::MAX; bytes.div_ceil(8) + 8]; pages] }
    }

    fn pages(&mut self) -> Vec<*mut u8> {
        self.words
            .iter_mut()
            .map(|page| {
                let pointer = page.as_mut_ptr().cast::<u8>();
                pointer.wrapping_add(pointer.align_offset(64))
            })
            .collect()
    }
}

/// Keys or values as pages of a format hold them.
fn kept(array: &Laid, format: PageFormat) -> Laid {
    let PageFormat::Codes(codes) = format else {
        return Laid::new(array.dtype, &array.shape, Layout::Contiguous, &array.values());
    };
    let dim = array.shape[3];
    let mut values: Vec<f32> = single(array);
    for group in values.chunks_mut(dim).flat_map(|row| row.chunks_mut(codes.group())) {
        let mut found = vec![0; group.len()];
        let ends = codes.encode(group, &mut found);
        group.iter_mut().zip(found).for_each(|(value, code)| *value = codes.decode(code, ends));
    }
    let values: Vec<f64> = values.into_iter().map(f64::from).collect();
    Laid::new(Dtype::F32, &array.shape, Layout::Contiguous, &values)
}

#[test]
fn codes_are_off_by_half_a_step_and_reach_both_ends() {
    let mut rng = Rng::new(9);
    for bits in [4, 8] {
        let codes = Codes::new(bits, 32).unwrap();
        let steps = (1u32 << bits) as f32 - 1.0;
        for scale in [1e-30, 1e-3, 1.0, 300.0] {
            for offset in [0.0, -5.0, 7.0] {
                let values: Vec<f32> = (0..32).map(|_| (rng.uniform(-1.0, 1.0) + offset) * scale).collect();
                let mut found = [0; 32];
                let ends = codes.encode(&values, &mut found);
                let low = values.iter().copied().fold(f32::INFINITY, f32::min);
                let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                // Rounding the bias down and the scale up makes a step at most so much longer.
                let step = (high - low + low.abs() / 128.0) / steps * (1.0 + 1.0 / 128.0);
                for (value, code) in values.iter().zip(found) {
                    let error = (codes.decode(code, ends) - value).abs();
                    assert!(error <= step * 0.5001, "{bits} bits, {value}: off by {error}, a step is {step}");
                }
            }
        }
        let same = |values: &[f32], expected: f32| {
            let mut found = vec![7; values.len()];
            let ends = codes.encode(values, &mut found);
            for code in found {
                let got = codes.decode(code, ends);
                assert!(got == expected || got.is_nan() && expected.is_nan(), "{values:?}: {got}");
            }
        };
        same(&[0.0; 5], 0.0);
        same(&[1.5; 3], 1.5);
        same(&[1.0, f32::NAN, 2.0], f32::NAN);
        same(&[f32::INFINITY, 0.0], f32::NAN);
        same(&[0.0, f32::NEG_INFINITY], f32::NAN);
    }
    for (bits, group) in [(3, 64), (8, 16), (4, 0), (0, 64), (256 + 8, 64), (8, 256 + 64)] {
        assert!(Codes::new(bits, group).is_err());
    }
}

#[test]
fn a_nan_is_not_lost_whatever_is_beside_it() {
    let pool = Pool::new(2);
    let mut rng = Rng::new(10);
    for &isa in Isa::available() {
        for precision in [Precision::Exact, Precision::Bf16] {
            for cap in [None, Some(30.0)] {
                for at in [0, 3, 15, 16, 95, 255, 256, 300] {
                    let mut case =
                        case(Dtype::F32, Layout::Contiguous, [1, 2, 1, 301, 301, 24, 24], &mut rng);
                    (case.rule.causal, case.rule.window, case.rule.soft_cap) = (true, Some(3), cap);
                    let mut q = case.q.values();
                    q[at * 24 + 5] = f64::NAN;
                    case.q = Laid::new(Dtype::F32, &case.q.shape, Layout::Contiguous, &q);
                    let (out, lse) = case.run(isa, &pool, precision, Layout::Contiguous);
                    for row in 0..2 * 301 {
                        let nan = row == at;
                        let all = out[row * 24..][..24].iter().all(|x| x.is_nan() == nan);
                        assert!(
                            all && lse[row].is_nan() == nan,
                            "{isa} {precision:?} {cap:?} {at} row {row}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn pages_have_the_bits_of_arrays_however_a_prompt_is_cut() {
    let mut rng = Rng::new(3);
    let pool = Pool::new(3);
    for [h, hk, total, d, dv] in [[6, 2, 530, 40, 24], [4, 4, 257, 17, 17], [8, 1, 40, 64, 64]] {
        for (dtype, format) in [
            (Dtype::BF16, PageFormat::Bf16),
            (Dtype::F32, PageFormat::F32),
            (Dtype::BF16, PageFormat::Codes(Codes::new(8, 32).unwrap())),
            (Dtype::F32, PageFormat::Codes(Codes::new(4, 64).unwrap())),
        ] {
            for precision in [Precision::Exact, Precision::Bf16] {
                if precision == Precision::Bf16 && format == PageFormat::F32 {
                    continue;
                }
                for window in [None, Some(270)] {
                    // Two sequences of different lengths.
                    let totals = [total, total / 2 + 1];
                    let mut cases: Vec<Case> = totals
                        .iter()
                        .map(|&n| case(dtype, Layout::Contiguous, [1, h, hk, n, n, d, dv], &mut rng))
                        .collect();
                    for case in &mut cases {
                        (case.rule.causal, case.rule.window) = (true, window);
                    }
                    // What pages will hold.
                    let kept: Vec<Case> = cases
                        .iter()
                        .map(|case| Case {
                            q: Laid::new(dtype, &case.q.shape, Layout::Contiguous, &case.q.values()),
                            k: kept(&case.k, format),
                            v: kept(&case.v, format),
                            rule: case.rule.clone(),
                        })
                        .collect();
                    for &isa in Isa::available() {
                        // Where operands are not rounded to bf16, codes count as what they are.
                        let coded = matches!(format, PageFormat::Codes(_));
                        let like =
                            if coded && !uses_pairs(isa, precision) { Precision::Exact } else { precision };
                        let expected: Vec<Vec<f32>> = kept
                            .iter()
                            .map(|case| case.run(isa, &pool, like, Layout::Contiguous).0)
                            .collect();
                        let shape = PageShape { kv_heads: hk, key_dim: d, value_dim: dv, format };
                        let mut memory: Vec<[Memory; 2]> = totals
                            .iter()
                            .map(|n| {
                                let pages = n.div_ceil(BLOCK);
                                [
                                    Memory::new(pages, shape.key_bytes()),
                                    Memory::new(pages, shape.value_bytes()),
                                ]
                            })
                            .collect();
                        // A prompt in uneven pieces, then tokens one by one.
                        let mut at = [0, 0];
                        for piece in [130, 7, 1, 1, 260, 1, 33, 98] {
                            let counts = [0, 1].map(|i| piece.min(totals[i] - at[i]));
                            let tokens = counts[0] + counts[1];
                            let mut rows = vec![0.0; tokens * h * d];
                            let mut sequences = Vec::new();
                            for i in 0..2 {
                                let case = &cases[i];
                                let (k, v) = (case.k.view(), case.v.view());
                                let part = |view: DynView| {
                                    let mut view = view;
                                    let strides = view.strides.clone();
                                    let skip = at[i] as isize * strides[2] * view.dtype.size() as isize;
                                    view.pointer = view.pointer.wrapping_offset(skip);
                                    let dim = view.shape[3];
                                    view.shape = [counts[i], hk, dim].as_slice().into();
                                    view.strides = [strides[2], strides[1], strides[3]].as_slice().into();
                                    view
                                };
                                let [keys, values] = &mut memory[i];
                                let (keys, values) = (keys.pages(), values.pages());
                                sequences.push(PagedSequence {
                                    keys: keys.clone(),
                                    values: values.clone(),
                                    k: part(k),
                                    v: part(v),
                                    first: if i == 0 { counts[1] } else { 0 },
                                    start: at[i],
                                });
                                let first = sequences[i].first;
                                let q = case.q.values();
                                for t in 0..counts[i] {
                                    for head in 0..h {
                                        let from = (head * totals[i] + at[i] + t) * d;
                                        let to = ((first + t) * h + head) * d;
                                        rows[to..to + d].copy_from_slice(&q[from..from + d]);
                                    }
                                }
                            }
                            let q = Laid::new(dtype, &[tokens, h, d], Layout::Padded, &rows);
                            // Into memory of its own, or over the queries.
                            let over = dtype == Dtype::F32 && d == dv && window.is_some();
                            let mut out = match over {
                                true => Laid::new(dtype, &[tokens, h, d], Layout::Padded, &rows),
                                false => Laid::poisoned(Dtype::F32, &[tokens, h, dv], Layout::Padded),
                            };
                            let firsts = [sequences[0].first, sequences[1].first];
                            let args = PagedArgs {
                                q: if over { out.view() } else { q.view() },
                                pages: shape,
                                sequences,
                                rule: Rule { scale: cases[0].rule.scale, window, ..Rule::default() },
                                precision,
                                out: out.view_mut(),
                            };
                            // SAFETY: pages of that shape, for this test alone.
                            run_plan(&pool, unsafe { paged_attention(isa, args) }.unwrap());
                            out.check_untouched_outside();
                            let got = single(&out);
                            for i in 0..2 {
                                for t in 0..counts[i] {
                                    for head in 0..h {
                                        let from = ((firsts[i] + t) * h + head) * dv;
                                        let to = (head * totals[i] + at[i] + t) * dv;
                                        let name = format!(
                                            "{isa} {dtype} {format} {precision:?} {window:?} position {} head {head}",
                                            at[i] + t
                                        );
                                        assert_bits_eq(
                                            &name,
                                            &got[from..from + dv],
                                            &expected[i][to..to + dv],
                                        );
                                    }
                                }
                                at[i] += counts[i];
                            }
                        }
                        // What was written can be read.
                        let [keys, values] = &mut memory[0];
                        let holds = kept[0].k.dtype;
                        let mut k = Laid::poisoned(holds, &[at[0], hk, d], Layout::Padded);
                        let mut v = Laid::poisoned(holds, &[at[0], hk, dv], Layout::Contiguous);
                        let constant = |pages: Vec<*mut u8>| {
                            pages.into_iter().map(|p| p.cast_const()).collect::<Vec<_>>()
                        };
                        let (keys, values) = (constant(keys.pages()), constant(values.pages()));
                        // SAFETY: written above.
                        let task =
                            unsafe { read_pages(isa, shape, keys, values, 0, k.view_mut(), v.view_mut()) };
                        pool.run(&[task.unwrap()]).unwrap();
                        let (k, all) = (k.values(), kept[0].k.values());
                        for t in 0..at[0] {
                            for head in 0..hk {
                                let (a, b) = ((t * hk + head) * d, (head * total + t) * d);
                                assert_eq!(k[a..a + d], all[b..b + d], "{isa} {format} key {t}");
                            }
                        }
                        let (v, all) = (v.values(), kept[0].v.values());
                        for t in 0..at[0] {
                            for head in 0..hk {
                                let (a, b) = ((t * hk + head) * dv, (head * total + t) * dv);
                                assert_eq!(v[a..a + dv], all[b..b + dv], "{isa} {format} value {t}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_on_the_rest_of_a_batch() {
    let mut rng = Rng::new(4);
    let mut all = case(Dtype::F32, Layout::Contiguous, [3, 4, 2, 50, 300, 32, 32], &mut rng);
    all.rule.causal = true;
    for precision in [Precision::Exact, Precision::Bf16] {
        let expected = all.run(Isa::best(), &Pool::new(1), precision, Layout::Contiguous);
        for threads in [2, 5] {
            let got = all.run(Isa::best(), &Pool::new(threads), precision, Layout::Contiguous);
            assert_bits_eq("threads", &got.0, &expected.0);
            assert_bits_eq("threads", &got.1, &expected.1);
        }
        let part = |laid: &Laid| {
            let one = laid.values().len() / 3;
            let mut shape = laid.shape.clone();
            shape[0] = 1;
            Laid::contiguous(Dtype::F32, &shape, &laid.values()[one..2 * one])
        };
        let one = Case { q: part(&all.q), k: part(&all.k), v: part(&all.v), rule: all.rule.clone() };
        let got = one.run(Isa::best(), &Pool::new(2), precision, Layout::Contiguous);
        assert_bits_eq("alone", &got.0, &expected.0[got.0.len()..2 * got.0.len()]);
        assert_eq!(one.heads(), 4);
    }
}

#[test]
fn problems_that_do_not_fit_are_refused() {
    let mut rng = Rng::new(5);
    let good = || case(Dtype::F32, Layout::Contiguous, [1, 4, 2, 3, 3, 8, 8], &mut Rng::new(6));
    let check = |case: Case, message: &str| {
        let mut out = Laid::poisoned(Dtype::F32, &[1, 4, 3, 8], Layout::Contiguous);
        let args = AttentionArgs {
            q: case.q.view(),
            k: case.k.view(),
            v: case.v.view(),
            rule: case.rule,
            precision: Precision::Exact,
            out: out.view_mut(),
            lse: None,
        };
        let error = attention(Isa::best(), args).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    let mut bad = good();
    bad.k = Laid::random(Dtype::F32, &[1, 2, 3, 7], Layout::Contiguous, &mut rng);
    check(bad, "k has shape [1, 2, 3, 7], expected [1, 2, 3, 8]");
    let mut bad = good();
    bad.k = Laid::random(Dtype::F32, &[1, 3, 3, 8], Layout::Contiguous, &mut rng);
    bad.v = Laid::random(Dtype::F32, &[1, 3, 3, 8], Layout::Contiguous, &mut rng);
    check(bad, "4 heads are no multiple of 3 KV heads");
    let mut bad = good();
    bad.rule.window = Some(2);
    check(bad, "a window needs causality");
    let mut bad = good();
    bad.q = Laid::random(Dtype::I32, &[1, 4, 3, 8], Layout::Contiguous, &mut rng);
    check(bad, "q is int32");
}
