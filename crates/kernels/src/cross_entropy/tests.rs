use mica_testkit::{Golden, Rng, assert_bits_eq, assert_close, fixture};
use mica_threads::Pool;

use super::*;
use crate::testing::{Laid, Layout};

fn single(laid: &Laid) -> Vec<f32> {
    laid.values().into_iter().map(|v| v as f32).collect()
}

/// Loss, lse and gradient in f64.
fn naive(logits: &Laid, labels: &[f64], cap: Option<f32>, scales: &[f64]) -> [Vec<f64>; 3] {
    let [rows, width] = logits.shape[..] else { panic!() };
    let values = logits.values();
    let (mut loss, mut lse, mut gradient) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows * width]);
    for row in 0..rows {
        let raw = &values[row * width..(row + 1) * width];
        let x: Vec<f64> = raw.iter().map(|&x| cap.map_or(x, |c| c as f64 * (x / c as f64).tanh())).collect();
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        lse[row] = max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        if labels[row] == -100.0 {
            continue;
        }
        loss[row] = lse[row] - x[labels[row] as usize];
        for i in 0..width {
            let hot = if i == labels[row] as usize { 1.0 } else { 0.0 };
            let slope = cap.map_or(1.0, |c| 1.0 - (x[i] / c as f64).powi(2));
            gradient[row * width + i] = ((x[i] - lse[row]).exp() - hot) * slope * scales[row];
        }
    }
    [loss, lse, gradient]
}

fn targets(labels: &Laid, soft_cap: Option<f32>) -> Targets {
    Targets { labels: labels.view(), ignore: -100, soft_cap }
}

#[test]
fn agrees_with_f64_on_every_tier() {
    let mut rng = Rng::new(1);
    for (rows, width) in [(1, 1), (5, 37), (3, 4096), (4, 9001), (70, 130), (0, 10)] {
        for (dtype, label_type) in
            [(Dtype::F32, Dtype::I32), (Dtype::BF16, Dtype::I64), (Dtype::F16, Dtype::I32)]
        {
            for soft_cap in [None, Some(2.0)] {
                let logits = Laid::random(dtype, &[rows, width], Layout::Padded, &mut rng);
                let labels: Vec<f64> = (0..rows)
                    .map(|_| if rng.chance(0.2) { -100.0 } else { rng.range(0..width) as f64 })
                    .collect();
                let scales = Laid::random(Dtype::F32, &[rows], Layout::Padded, &mut rng);
                let labels_laid = Laid::new(label_type, &[rows], Layout::Padded, &labels);
                let expected = naive(&logits, &labels, soft_cap, &scales.values())
                    .map(|v| v.into_iter().map(|v| v as f32).collect::<Vec<_>>());
                let mut bits: Option<[Vec<f32>; 3]> = None;
                for &isa in Isa::available() {
                    let name = format!("{isa} {rows}x{width} {dtype} {soft_cap:?}");
                    let scale = || GradientScale { factor: 1.0, rows: Some(scales.view()) };
                    let vector = || Laid::poisoned(Dtype::F32, &[rows], Layout::Padded);
                    let (mut loss, mut lse) = (vector(), vector());
                    let mut gradient = Laid::poisoned(Dtype::F32, &[rows, width], Layout::Padded);
                    let args = CrossEntropyArgs {
                        logits: logits.view(),
                        targets: targets(&labels_laid, soft_cap),
                        loss: Some(loss.view_mut()),
                        lse: Some(lse.view_mut()),
                        gradient: Some((gradient.view_mut(), scale())),
                    };
                    Pool::new(2).run(&[cross_entropy(isa, args).unwrap()]).unwrap();
                    for laid in [&loss, &lse, &gradient] {
                        laid.check_untouched_outside();
                    }
                    let got = [single(&loss), single(&lse), single(&gradient)];
                    assert_close(&name, &got[0], &expected[0], 2e-6, 2e-6);
                    assert_close(&name, &got[1], &expected[1], 2e-6, 2e-6);
                    assert_close(&name, &got[2], &expected[2], 1e-5, 1e-7);
                    let first = bits.get_or_insert_with(|| got.clone());
                    for i in 0..3 {
                        assert_bits_eq(&format!("{name} tiers"), &got[i], &first[i]);
                    }
                }
            }
        }
    }
}

/// Tiles that pass by give the losses of the whole, bit for bit, and the gradient of the hidden rows that
/// a product with the whole gradient gives.
#[test]
fn a_vocabulary_that_passes_by_agrees_with_the_whole() {
    let mut rng = Rng::new(4);
    for (rows, vocabulary, width) in [(1, 1, 3), (5, 37, 20), (3, 4096, 16), (9, 9001, 33), (0, 10, 4)] {
        for (soft_cap, scale) in [(None, 1.0), (Some(2.0), 1.0), (None, 30.0)] {
            let name = format!("{rows}x{vocabulary}x{width} {soft_cap:?} {scale}");
            let mut logits = Laid::random(Dtype::F32, &[rows, vocabulary], Layout::Contiguous, &mut rng);
            let mut values: Vec<f64> = logits.values().iter().map(|x| x * scale).collect();
            // One label that is almost certain.
            let mut labels: Vec<f64> = (0..rows)
                .map(|_| if rng.chance(0.2) { -100.0 } else { rng.range(0..vocabulary) as f64 })
                .collect();
            if let Some(first) = labels.first_mut() {
                *first = (vocabulary - 1) as f64;
                values[vocabulary - 1] += 25.0;
            }
            logits = Laid::new(Dtype::F32, &logits.shape, Layout::Contiguous, &values);
            let weights = Laid::random(Dtype::F32, &[vocabulary, width], Layout::Contiguous, &mut rng);
            let weight = weights.values();
            let labels_laid = Laid::new(Dtype::I32, &[rows], Layout::Padded, &labels);
            let [_, _, gradient] = naive(&logits, &labels, soft_cap, &vec![1.0; rows]);
            let expected: Vec<f32> = (0..rows * width)
                .map(|i| {
                    let row = &gradient[i / width * vocabulary..][..vocabulary];
                    row.iter().enumerate().map(|(v, g)| g * weight[v * width + i % width]).sum::<f64>() as f32
                })
                .collect();
            let vector = || Laid::poisoned(Dtype::F32, &[rows], Layout::Padded);
            let mut bits: Option<Vec<f32>> = None;
            for &isa in Isa::available() {
                let (mut whole_loss, mut loss) = (vector(), vector());
                let args = CrossEntropyArgs {
                    logits: logits.view(),
                    targets: targets(&labels_laid, soft_cap),
                    loss: Some(whole_loss.view_mut()),
                    lse: None,
                    gradient: None,
                };
                Pool::new(2).run(&[cross_entropy(isa, args).unwrap()]).unwrap();
                let mut state = Laid::poisoned(Dtype::F32, &[rows, stream::STATE], Layout::Padded);
                let mut sums = Laid::poisoned(Dtype::F32, &[rows, width], Layout::Padded);
                for first in (0..vocabulary).step_by(VOCABULARY_TILE) {
                    let end = vocabulary.min(first + VOCABULARY_TILE);
                    let part: Vec<f64> =
                        (0..rows).flat_map(|row| values[row * vocabulary..][first..end].to_vec()).collect();
                    let shape = [rows, end - first];
                    let part = Laid::new(Dtype::F32, &shape, Layout::Contiguous, &part);
                    let mut factors = Laid::poisoned(Dtype::F32, &shape, Layout::Contiguous);
                    let args = stream::FoldArgs {
                        logits: part.view(),
                        first,
                        vocabulary,
                        targets: targets(&labels_laid, soft_cap),
                        state: state.view_mut(),
                        gradient: Some(stream::FoldGradient {
                            factors: factors.view_mut(),
                            sums: sums.view_mut(),
                        }),
                    };
                    Pool::new(3).run(&[stream::fold(isa, args).unwrap()]).unwrap();
                    let (factors, mut next) = (factors.values(), sums.values());
                    for (i, sum) in next.iter_mut().enumerate() {
                        let (row, column) = (i / width, i % width);
                        let product: f64 = (first..end)
                            .map(|v| factors[row * (end - first) + v - first] * weight[v * width + column])
                            .sum();
                        *sum = product + if first > 0 { *sum } else { 0.0 };
                    }
                    sums = Laid::new(Dtype::F32, &[rows, width], Layout::Padded, &next);
                }
                let of_labels: Vec<f64> = (0..rows * width)
                    .map(|i| weight[labels[i / width].max(0.0) as usize * width + i % width])
                    .collect();
                let of_labels = Laid::new(Dtype::F32, &[rows, width], Layout::Padded, &of_labels);
                let args = stream::FinishArgs {
                    state: state.view(),
                    vocabulary,
                    targets: targets(&labels_laid, soft_cap),
                    loss: Some(loss.view_mut()),
                    gradient: Some((sums.view_mut(), of_labels.view())),
                };
                Pool::new(2).run(&[stream::finish(isa, args).unwrap()]).unwrap();
                for laid in [&loss, &sums, &state] {
                    laid.check_untouched_outside();
                }
                assert_bits_eq(&format!("{isa} {name} losses"), &single(&loss), &single(&whole_loss));
                let got = single(&sums);
                assert_close(&format!("{isa} {name} gradient"), &got, &expected, 2e-5, 2e-6);
                let first = bits.get_or_insert_with(|| got.clone());
                assert_bits_eq(&format!("{isa} {name} tiers"), &got, first);
            }
        }
    }
}

#[test]
fn a_range_that_is_no_tile_is_refused() {
    let logits = Laid::poisoned(Dtype::F32, &[2, 10], Layout::Contiguous);
    let labels = Laid::contiguous(Dtype::I32, &[2], &[1.0, 2.0]);
    for (first, vocabulary) in [(1, 11), (0, 11), (4096, 4107)] {
        let mut state = Laid::poisoned(Dtype::F32, &[2, stream::STATE], Layout::Contiguous);
        let args = stream::FoldArgs {
            logits: logits.view(),
            first,
            vocabulary,
            targets: targets(&labels, None),
            state: state.view_mut(),
            gradient: None,
        };
        let error = stream::fold(Isa::best(), args).err().expect("no tile").to_string();
        assert!(error.contains("expected a tile of 4096, or what is left"), "{error}");
    }
}

#[test]
fn goldens_from_torch() {
    let golden = Golden::load(fixture("ops/cross_entropy.safetensors"));
    let names: Vec<String> =
        golden.names().filter_map(|n| n.strip_suffix(".nll")).map(str::to_string).collect();
    assert!(names.len() > 3);
    for name in names {
        let get = |part: &str| golden.f64s(&format!("{name}.{part}"));
        let [vocabulary, dim] = *golden.shape(&format!("{name}.head")) else { panic!() };
        let rows = golden.shape(&format!("{name}.hidden"))[0];
        let (head, hidden, labels) = (get("head"), get("hidden"), get("labels"));
        let dot =
            |r: usize, v: usize| -> f64 { (0..dim).map(|d| hidden[r * dim + d] * head[v * dim + d]).sum() };
        let logits: Vec<f64> = (0..rows * vocabulary).map(|i| dot(i / vocabulary, i % vocabulary)).collect();
        let logits = Laid::contiguous(Dtype::F32, &[rows, vocabulary], &logits);
        let labels_laid = Laid::contiguous(Dtype::I32, &[rows], &labels);
        let labelled = labels.iter().filter(|&&l| l != -100.0).count();
        let soft_cap = (name == "softcap").then_some(3.0);
        let weighted = golden.contains(&format!("{name}.weights"));
        let scales: Vec<f64> =
            if weighted { get("weights") } else { vec![1.0 / labelled.max(1) as f64; rows] };
        let scales = Laid::contiguous(Dtype::F32, &[rows], &scales);
        for &isa in Isa::available() {
            let [mut loss, mut lse] =
                [(); 2].map(|_| Laid::poisoned(Dtype::F32, &[rows], Layout::Contiguous));
            let mut values = logits.clone();
            let scale = GradientScale { factor: 1.0, rows: Some(scales.view()) };
            let args = CrossEntropyArgs {
                logits: values.view(),
                targets: targets(&labels_laid, soft_cap),
                loss: Some(loss.view_mut()),
                lse: Some(lse.view_mut()),
                gradient: Some((values.view_mut(), scale)),
            };
            Pool::new(2).run(&[cross_entropy(isa, args).unwrap()]).unwrap();
            let label = format!("{isa} {name}");
            let expected = |part: &str| golden.f32s(&format!("{name}.{part}"));
            // Logits of up to ±100 ("sharp") are rounded to f32 on the way in.
            assert_close(&label, &single(&loss), &expected("nll"), 1e-5, 1e-5);
            assert_close(&label, &single(&lse), &expected("logsumexp"), 1e-5, 1e-5);
            let gradient = values.values();
            let dhidden: Vec<f32> = (0..rows * dim)
                .map(|i| {
                    let row = &gradient[i / dim * vocabulary..][..vocabulary];
                    row.iter().enumerate().map(|(v, g)| g * head[v * dim + i % dim]).sum::<f64>() as f32
                })
                .collect();
            assert_close(&label, &dhidden, &expected("dhidden"), 2e-5, 2e-6);
        }
    }
}

#[test]
fn a_label_outside_the_vocabulary_is_an_error_that_names_it() {
    let mut rng = Rng::new(2);
    let logits = Laid::random(Dtype::F32, &[3, 10], Layout::Contiguous, &mut rng);
    let labels = Laid::contiguous(Dtype::I32, &[3], &[1.0, 10.0, -100.0]);
    let mut loss = Laid::poisoned(Dtype::F32, &[3], Layout::Contiguous);
    let args = CrossEntropyArgs {
        logits: logits.view(),
        targets: targets(&labels, None),
        loss: Some(loss.view_mut()),
        lse: None,
        gradient: None,
    };
    let error = Pool::new(1).run(&[cross_entropy(Isa::best(), args).unwrap()]).unwrap_err();
    assert!(error.to_string().contains("row 1 has the label 10, expected 0..10"), "{error}");
}

#[test]
fn bf16_gradients_are_the_rounded_f32_ones() {
    let mut rng = Rng::new(3);
    let logits = Laid::random(Dtype::F32, &[4, 300], Layout::Contiguous, &mut rng);
    let labels = Laid::contiguous(Dtype::U32, &[4], &[0.0, 299.0, 17.0, 5.0]);
    let run = |dtype| {
        let mut gradient = Laid::poisoned(dtype, &[4, 300], Layout::Padded);
        let args = CrossEntropyArgs {
            logits: logits.view(),
            targets: targets(&labels, None),
            loss: None,
            lse: None,
            gradient: Some((gradient.view_mut(), GradientScale { factor: 0.125, rows: None })),
        };
        Pool::new(2).run(&[cross_entropy(Isa::best(), args).unwrap()]).unwrap();
        single(&gradient)
    };
    let rounded: Vec<f32> = run(Dtype::F32).iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
    assert_bits_eq("bf16", &run(Dtype::BF16), &rounded);
}
