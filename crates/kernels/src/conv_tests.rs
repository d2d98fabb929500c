use mica_testkit::{Golden, Rng, assert_bits_eq, assert_close, fixture};
use mica_threads::Pool;

use super::*;
use crate::plan::run_plan;
use crate::testing::{Laid, Layout, layouts};

fn single(laid: &Laid) -> Vec<f32> {
    laid.values().into_iter().map(|v| v as f32).collect()
}

struct Case {
    x: Laid,
    weight: Laid,
    bias: Option<Laid>,
    state: Option<Laid>,
    starts: Option<Laid>,
}

impl Case {
    /// Out and the next state.
    fn forward(&self, isa: Isa, threads: usize, layout: Layout) -> [Vec<f32>; 2] {
        let mut out = Laid::poisoned(Dtype::F32, &self.x.shape, layout);
        let before = [self.x.shape[0], self.weight.shape[1] - 1, self.x.shape[2]];
        let mut next = Laid::poisoned(Dtype::F32, &before, layout);
        let args = ShortConvArgs {
            x: self.x.view(),
            weight: self.weight.view(),
            bias: self.bias.as_ref().map(Laid::view),
            state: self.state.as_ref().map(Laid::view),
            starts: self.starts.as_ref().map(Laid::view),
            out: out.view_mut(),
            next_state: Some(next.view_mut()),
        };
        Pool::new(threads).run(&[short_conv(isa, args).unwrap()]).unwrap();
        out.check_untouched_outside();
        next.check_untouched_outside();
        [single(&out), single(&next)]
    }

    /// dx, dweight, dbias.
    fn backward(&self, dy: &Laid, isa: Isa, threads: usize, layout: Layout) -> [Vec<f32>; 3] {
        let mut dx = Laid::poisoned(Dtype::F32, &self.x.shape, layout);
        let mut dweight = Laid::poisoned(Dtype::F32, &self.weight.shape, layout);
        let mut dbias = Laid::poisoned(Dtype::F32, &[self.x.shape[2]], Layout::Padded);
        let args = ShortConvBackwardArgs {
            x: self.x.view(),
            weight: self.weight.view(),
            starts: self.starts.as_ref().map(Laid::view),
            dy: dy.view(),
            dx: dx.view_mut(),
            dweight: Some(dweight.view_mut()),
            dbias: Some(dbias.view_mut()),
        };
        run_plan(&Pool::new(threads), short_conv_backward(isa, args).unwrap());
        for laid in [&dx, &dweight, &dbias] {
            laid.check_untouched_outside();
        }
        [single(&dx), single(&dweight), single(&dbias)]
    }

    /// Out, dx, dweight, dbias in f64.
    fn naive(&self, dy: &Laid) -> [Vec<f32>; 4] {
        let [batch, length, channels] = self.x.shape[..] else { panic!() };
        let taps = self.weight.shape[1];
        let (x, w, up) = (self.x.values(), self.weight.values(), dy.values());
        let bias = self.bias.as_ref().map(Laid::values);
        let state = self.state.as_ref().map(Laid::values);
        let starts = self.starts.as_ref().map(Laid::values);
        let (mut out, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let (mut dw, mut db) = (vec![0.0; w.len()], vec![0.0; channels]);
        for b in 0..batch {
            for t in 0..length {
                let start = starts.as_ref().map_or(0, |s| s[b * length + t] as isize);
                for c in 0..channels {
                    let y = (b * length + t) * channels + c;
                    out[y] = bias.as_ref().map_or(0.0, |bias| bias[c]);
                    db[c] += up[y];
                    for j in 0..taps {
                        let from = t as isize + j as isize - (taps as isize - 1);
                        if from >= 0 && from >= start {
                            let at = (b * length + from as usize) * channels + c;
                            out[y] += w[c * taps + j] * x[at];
                            dx[at] += w[c * taps + j] * up[y];
                            dw[c * taps + j] += x[at] * up[y];
                        } else if from < 0 && start == 0 {
                            let row = (from + taps as isize - 1) as usize;
                            let at = (b * (taps - 1) + row) * channels + c;
                            out[y] += state.as_ref().map_or(0.0, |s| s[at]) * w[c * taps + j];
                        }
                    }
                }
            }
        }
        [out, dx, dw, db].map(|v| v.into_iter().map(|x| x as f32).collect())
    }
}

#[test]
fn agrees_with_f64_on_odd_shapes_types_and_borders() {
    let mut rng = Rng::new(1);
    for (index, (batch, length, channels, taps)) in
        [(2, 11, 12, 3), (1, 200, 33, 4), (3, 2, 5, 4), (1, 1, 1, 1), (2, 0, 3, 3), (1, 70, 600, 3)]
            .into_iter()
            .enumerate()
    {
        for variant in 0..3 {
            for dtype in [Dtype::F32, Dtype::BF16] {
                let shape = [batch, length, channels];
                let layout = layouts(&shape)[(index + variant) % 4];
                // Packed sequences of seven positions.
                let starts: Vec<f64> = (0..batch * length).map(|i| (i % length / 7 * 7) as f64).collect();
                let case = Case {
                    x: Laid::random(dtype, &shape, layout, &mut rng),
                    weight: Laid::random(Dtype::F32, &[channels, taps], Layout::Padded, &mut rng),
                    bias: (variant == 1).then(|| Laid::random(dtype, &[channels], Layout::Padded, &mut rng)),
                    state: (variant == 1)
                        .then(|| Laid::random(dtype, &[batch, taps - 1, channels], layout, &mut rng)),
                    starts: (variant == 2)
                        .then(|| Laid::new(Dtype::I32, &[batch, length], Layout::Padded, &starts)),
                };
                let dy = Laid::random(dtype, &shape, layout, &mut rng);
                let expected = case.naive(&dy);
                let mut bits: Option<Vec<f32>> = None;
                for &isa in Isa::available() {
                    let name = format!("{isa} {shape:?} {taps} {dtype} {layout:?} variant {variant}");
                    let [out, _] = case.forward(isa, 2, layout);
                    let [dx, dw, db] = case.backward(&dy, isa, 2, layout);
                    assert_close(&name, &out, &expected[0], 1e-6, 2e-6);
                    assert_close(&name, &dx, &expected[1], 1e-6, 2e-6);
                    // Sums over up to 200 positions.
                    assert_close(&name, &dw, &expected[2], 1e-5, 1e-5);
                    assert_close(&name, &db, &expected[3], 1e-5, 1e-5);
                    let all = [out, dx, dw, db].concat();
                    assert_bits_eq(&format!("{name} tiers"), bits.get_or_insert_with(|| all.clone()), &all);
                    let again = case.backward(&dy, isa, 5, Layout::Contiguous);
                    assert_bits_eq(
                        &format!("{name} threads"),
                        &again.concat(),
                        &all[all.len() - again.concat().len()..],
                    );
                }
            }
        }
    }
}

#[test]
fn cutting_a_sequence_and_carrying_the_state_changes_no_bit() {
    let mut rng = Rng::new(2);
    let (length, channels, taps) = (23, 19, 4);
    let case = Case {
        x: Laid::random(Dtype::F32, &[1, length, channels], Layout::Contiguous, &mut rng),
        weight: Laid::random(Dtype::F32, &[channels, taps], Layout::Contiguous, &mut rng),
        bias: Some(Laid::random(Dtype::F32, &[channels], Layout::Contiguous, &mut rng)),
        state: Some(Laid::contiguous(Dtype::F32, &[1, taps - 1, channels], &vec![0.0; 3 * channels])),
        starts: None,
    };
    for &isa in Isa::available() {
        let [whole, last] = case.forward(isa, 2, Layout::Contiguous);
        let mut state = case.state.clone();
        let (mut pieces, mut at, mut carried) = (Vec::new(), 0, Vec::new());
        for count in [5, 1, 1, 2, 14] {
            let values = &case.x.values()[at * channels..(at + count) * channels];
            let part = Case {
                x: Laid::contiguous(Dtype::F32, &[1, count, channels], values),
                weight: case.weight.clone(),
                bias: case.bias.clone(),
                state: state.take(),
                starts: None,
            };
            let [out, next] = part.forward(isa, 3, Layout::Contiguous);
            pieces.extend(out);
            let wide: Vec<f64> = next.iter().map(|&x| x as f64).collect();
            state = Some(Laid::contiguous(Dtype::F32, &[1, taps - 1, channels], &wide));
            carried = next;
            at += count;
        }
        assert_eq!(at, length);
        assert_bits_eq(isa.name(), &pieces, &whole);
        assert_bits_eq(isa.name(), &carried, &last);
    }
}

#[test]
fn goldens_from_torch() {
    let golden = Golden::load(fixture("ops/short_conv.safetensors"));
    let names: Vec<String> =
        golden.names().filter_map(|n| n.strip_suffix(".x")).map(str::to_string).collect();
    assert!(names.len() > 3);
    for name in names {
        let get = |part: &str| {
            let key = format!("{name}.{part}");
            golden
                .contains(&key)
                .then(|| Laid::contiguous(Dtype::F32, golden.shape(&key), &golden.f64s(&key)))
        };
        let starts = golden.contains(&format!("{name}.segments")).then(|| {
            let segments = golden.i64s(&format!("{name}.segments"));
            let start = |i: usize| segments.iter().position(|&s| s == segments[i]).unwrap() as f64;
            let starts: Vec<f64> = (0..segments.len()).map(start).collect();
            let mut laid = Laid::contiguous(Dtype::I32, &[1, segments.len()], &starts);
            laid.strides[0] = 0;
            laid
        });
        let case = Case {
            x: get("x").unwrap(),
            weight: get("weight").unwrap(),
            bias: get("bias"),
            state: None,
            starts,
        };
        let dy = get("dy").unwrap();
        for &isa in Isa::available() {
            let [out, state] = case.forward(isa, 2, Layout::Contiguous);
            let [dx, dw, db] = case.backward(&dy, isa, 2, Layout::Contiguous);
            for (part, values) in [("y", out), ("state", state), ("dx", dx), ("dweight", dw), ("dbias", db)] {
                if let Some(expected) = get(part) {
                    assert_close(&format!("{isa} {name} {part}"), &values, &single(&expected), 1e-5, 2e-6);
                }
            }
        }
    }
}
