//! Gathers and scatters against loops over flat indices.

use mica_testkit::Rng;
use mica_threads::{Pool, Task};

use super::*;
use crate::dtype::DynViewMut;
use crate::testing::{Laid, Layout, layouts};

fn run_both(out: &mut Laid, make: impl Fn(DynViewMut) -> Box<dyn Task>) {
    let before = out.bytes.clone();
    Pool::new(1).run(&[make(out.view_mut())]).unwrap();
    let single = std::mem::replace(&mut out.bytes, before);
    Pool::new(3).run(&[make(out.view_mut())]).unwrap();
    assert!(single == out.bytes, "the number of threads changed the result");
    out.check_untouched_outside();
}

fn strides(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
}

fn unflatten(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for axis in (0..shape.len()).rev() {
        index[axis] = at % shape[axis];
        at /= shape[axis];
    }
    index
}

fn flatten(index: &[usize], shape: &[usize]) -> usize {
    index.iter().zip(strides(shape)).map(|(i, stride)| i * stride).sum()
}

/// Indices into `size` places, some negative if the type has them.
fn some_indices(dtype: Dtype, shape: &[usize], size: usize, rng: &mut Rng) -> (Laid, Vec<usize>) {
    let reach = if dtype == Dtype::U8 { size.min(256) } else { size };
    let real: Vec<usize> = (0..shape.iter().product()).map(|_| rng.range(0..reach)).collect();
    let values: Vec<f64> =
        real.iter()
            .map(|&at| {
                if dtype.is_signed_integer() && rng.chance(0.3) { at as f64 - size as f64 } else { at as f64 }
            })
            .collect();
    (Laid::new(dtype, shape, *rng.choose(&layouts(shape)), &values), real)
}

const INDEX_TYPES: [Dtype; 4] = [Dtype::I32, Dtype::U32, Dtype::I64, Dtype::U8];

#[test]
fn take_along_every_axis() {
    let mut rng = Rng::new(1);
    for shape in [&[50][..], &[50, 33], &[4, 50, 3], &[3, 50, 1, 40], &[20, 2000]] {
        for axis in 0..shape.len() {
            for index_shape in [&[][..], &[1], &[17], &[3, 5], &[0], &[2000]] {
                let dtype = *rng.choose(&[Dtype::F32, Dtype::BF16, Dtype::U8, Dtype::I64]);
                let a = Laid::random(dtype, shape, *rng.choose(&layouts(shape)), &mut rng);
                let (indices, real) =
                    some_indices(*rng.choose(&INDEX_TYPES), index_shape, shape[axis], &mut rng);
                let mut out_shape = shape[..axis].to_vec();
                out_shape.extend(index_shape);
                out_shape.extend(&shape[axis + 1..]);
                if out_shape.iter().product::<usize>() > 400_000 {
                    continue;
                }
                let mut out = Laid::poisoned(dtype, &out_shape, *rng.choose(&layouts(&out_shape)));
                run_both(&mut out, |view| take(a.view(), axis, indices.view(), view).unwrap());
                let values = a.values();
                let expected: Vec<f64> = (0..out_shape.iter().product())
                    .map(|at| {
                        let index = unflatten(at, &out_shape);
                        let place = real[flatten(&index[axis..axis + index_shape.len()], index_shape)];
                        let mut from = index[..axis].to_vec();
                        from.push(place);
                        from.extend(&index[axis + index_shape.len()..]);
                        values[flatten(&from, shape)]
                    })
                    .collect();
                assert!(out.values() == expected, "{shape:?} {axis} {index_shape:?}");
            }
        }
    }
}

#[test]
fn gather_with_several_index_arrays_and_windows() {
    let mut rng = Rng::new(2);
    let shape = [10, 12, 9];
    let a = Laid::random(Dtype::I32, &shape, Layout::Padded, &mut rng);
    for (axes, slices) in [
        (&[0usize, 2][..], [1usize, 12, 1]),
        (&[2, 0], [1, 3, 1]),
        (&[1], [10, 4, 9]),
        (&[0, 1, 2], [2, 3, 4]),
        (&[], [5, 5, 5]),
        (&[0, 1, 2], [1, 1, 1]),
    ] {
        let (rows, columns) = (4, 3);
        let mut views = Vec::new();
        for (i, &axis) in axes.iter().enumerate() {
            // The first index array is a column, the others whole: they broadcast.
            let index_shape = if i == 0 && axes.len() > 1 { vec![rows, 1] } else { vec![rows, columns] };
            let room = shape[axis] - slices[axis] + 1;
            let values: Vec<f64> =
                (0..index_shape.iter().product()).map(|_| rng.range(0..room) as f64).collect();
            views.push((axis, Laid::contiguous(Dtype::I32, &index_shape, &values)));
        }
        let index_shape = if axes.is_empty() { vec![] } else { vec![rows, columns] };
        let out_shape: Vec<usize> = index_shape.iter().chain(&slices).copied().collect();
        let mut out = Laid::poisoned(Dtype::I32, &out_shape, Layout::Padded);
        let indices: Vec<(usize, DynView)> = views.iter().map(|(axis, laid)| (*axis, laid.view())).collect();
        run_both(&mut out, |view| gather(a.view(), &indices, &slices, view).unwrap());
        let values = a.values();
        let expected: Vec<f64> = (0..out_shape.iter().product())
            .map(|at| {
                let index = unflatten(at, &out_shape);
                let (position, mut place) =
                    (&index[..index_shape.len()], index[index_shape.len()..].to_vec());
                for (axis, laid) in &views {
                    place[*axis] +=
                        laid.broadcast_value(&index_shape, flatten(position, &index_shape)) as usize;
                }
                values[flatten(&place, &shape)]
            })
            .collect();
        assert!(out.values() == expected, "{axes:?} {slices:?}");
    }
}

#[test]
fn along_an_axis_both_ways() {
    let mut rng = Rng::new(3);
    for (shape, axis, count) in [
        (&[30][..], 0, 50),
        (&[5, 40], 1, 3),
        (&[40, 5], 0, 70),
        (&[3, 20, 300], 1, 9),
        (&[600, 7], 1, 1),
        (&[2, 9000], 1, 9000),
    ] {
        for dtype in [Dtype::F32, Dtype::I32, Dtype::BF16] {
            let mut index_shape = shape.to_vec();
            index_shape[axis] = count;
            let (indices, real) =
                some_indices(*rng.choose(&INDEX_TYPES[..3]), &index_shape, shape[axis], &mut rng);
            let a = Laid::random(dtype, shape, *rng.choose(&layouts(shape)), &mut rng);
            let mut out = Laid::poisoned(dtype, &index_shape, *rng.choose(&layouts(shape)));
            run_both(&mut out, |view| take_along_axis(a.view(), axis, indices.view(), view).unwrap());
            let values = a.values();
            let place = |at: usize| {
                let mut index = unflatten(at, &index_shape);
                index[axis] = real[at];
                flatten(&index, shape)
            };
            let expected: Vec<f64> = (0..real.len()).map(|at| values[place(at)]).collect();
            assert!(out.values() == expected, "take {shape:?} {axis} {count}");

            let updates = Laid::random(dtype, &index_shape, *rng.choose(&layouts(shape)), &mut rng);
            let new = updates.values();
            for op in [ScatterOp::Set, ScatterOp::Add, ScatterOp::Prod, ScatterOp::Max, ScatterOp::Min] {
                let mut target = a.clone();
                run_both(&mut target, |view| {
                    scatter_along_axis(op, view, axis, indices.view(), updates.view()).unwrap()
                });
                let expected = joined(dtype, op, &values, (0..real.len()).map(|at| (place(at), new[at])));
                assert!(target.values() == expected, "{op:?} {dtype} {shape:?} {axis} {count}");
            }
        }
    }
}

/// Applies updates in order: f32 or i32, one rounding at the end.
fn joined(
    dtype: Dtype,
    op: ScatterOp,
    start: &[f64],
    updates: impl Iterator<Item = (usize, f64)>,
) -> Vec<f64> {
    let mut values = start.to_vec();
    for (at, new) in updates {
        let (a, b) = (values[at], new);
        values[at] = match (op, dtype) {
            (ScatterOp::Set, _) => b,
            (ScatterOp::Max, _) => a.max(b),
            (ScatterOp::Min, _) => a.min(b),
            (ScatterOp::Add, Dtype::I32) => (a as i32).wrapping_add(b as i32) as f64,
            (ScatterOp::Prod, Dtype::I32) => (a as i32).wrapping_mul(b as i32) as f64,
            (ScatterOp::Add, _) => (a as f32 + b as f32) as f64,
            (ScatterOp::Prod, _) => (a as f32 * b as f32) as f64,
        };
    }
    let shape = [values.len()];
    Laid::contiguous(dtype, &shape, &values).values()
}

#[test]
fn scatter_of_every_shape_of_slice() {
    let mut rng = Rng::new(4);
    for (shape, axes, slices, positions) in [
        (&[20, 300][..], &[0usize][..], &[1usize, 300][..], 500),
        (&[2000, 10], &[0], &[1, 10], 5000),
        (&[50_000], &[0], &[1], 30_000),
        (&[30, 40], &[0, 1], &[1, 1], 20_000),
        (&[30, 40], &[1], &[30, 1], 7),
        (&[30, 40], &[0, 1], &[3, 5], 50),
        (&[6, 40, 200], &[1], &[6, 1, 200], 90),
        (&[6, 40, 200], &[2, 0], &[1, 40, 1], 900),
        (&[7], &[0], &[1], 0),
    ] {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::I32] {
            let mut views = Vec::new();
            let mut real = Vec::new();
            for &axis in axes {
                let room = shape[axis] - slices[axis] + 1;
                let values: Vec<usize> = (0..positions).map(|_| rng.range(0..room)).collect();
                let stored: Vec<f64> = values
                    .iter()
                    .map(|&at| if rng.chance(0.3) { at as f64 - shape[axis] as f64 } else { at as f64 })
                    .collect();
                views.push((axis, Laid::contiguous(Dtype::I32, &[positions], &stored)));
                real.push(values);
            }
            let indices: Vec<(usize, DynView)> =
                views.iter().map(|(axis, laid)| (*axis, laid.view())).collect();
            let mut update_shape = vec![positions];
            update_shape.extend(slices);
            let updates = Laid::random(dtype, &update_shape, *rng.choose(&layouts(shape)), &mut rng);
            let new = updates.values();
            let a = Laid::random(dtype, shape, *rng.choose(&layouts(shape)), &mut rng);
            for op in [ScatterOp::Add, ScatterOp::Set, ScatterOp::Max, ScatterOp::Prod] {
                let mut out = a.clone();
                run_both(&mut out, |view| scatter(op, view, &indices, updates.view()).unwrap());
                let pairs = (0..new.len()).map(|at| {
                    let index = unflatten(at, &update_shape);
                    let mut place = index[1..].to_vec();
                    for (i, &axis) in axes.iter().enumerate() {
                        place[axis] += real[i][index[0]];
                    }
                    (flatten(&place, shape), new[at])
                });
                // The windows of half types that overlap are rounded once a window.
                let windows = slices != [1] && axes.iter().any(|&axis| slices[axis] > 1);
                if windows && dtype == Dtype::BF16 && matches!(op, ScatterOp::Add | ScatterOp::Prod) {
                    continue;
                }
                let expected = joined(dtype, op, &a.values(), pairs);
                assert!(out.values() == expected, "{op:?} {dtype} {shape:?} {axes:?} {slices:?}");
            }
        }
    }
}

#[test]
fn nan_stays_in_extremes() {
    let indices = Laid::contiguous(Dtype::I32, &[4], &[0.0, 0.0, 1.0, 2.0]);
    let updates = Laid::contiguous(Dtype::F32, &[4], &[f64::NAN, 5.0, 1.0, 1.0]);
    let mut out = Laid::contiguous(Dtype::F32, &[3], &[0.0, 7.0, f64::NAN]);
    run_both(&mut out, |view| {
        scatter_along_axis(ScatterOp::Max, view, 0, indices.view(), updates.view()).unwrap()
    });
    let values = out.values();
    assert!(values[0].is_nan() && values[1] == 7.0 && values[2].is_nan(), "{values:?}");
}

#[test]
fn indices_outside_end_the_task_with_a_message() {
    let a = Laid::contiguous(Dtype::F32, &[5, 4], &[0.0; 20]);
    for (index, part) in [(5.0, "index 5 is outside axis 0 of 5"), (-6.0, "index -6 is outside axis 0 of 5")]
    {
        let indices = Laid::contiguous(Dtype::I32, &[2], &[1.0, index]);
        let mut out = Laid::poisoned(Dtype::F32, &[2, 4], Layout::Contiguous);
        let task = take(a.view(), 0, indices.view(), out.view_mut()).unwrap();
        let error = Pool::new(2).run(&[task]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        let mut target = a.clone();
        let updates = Laid::contiguous(Dtype::F32, &[2, 1, 4], &[1.0; 8]);
        let task =
            scatter(ScatterOp::Add, target.view_mut(), &[(0, indices.view())], updates.view()).unwrap();
        let error = Pool::new(2).run(&[task]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    // Read as it is this number has the sign bit; from the end it would be a place.
    let indices = Laid::contiguous(Dtype::U32, &[2, 1], &[1.0, 4_294_967_294.0]);
    let mut out = Laid::poisoned(Dtype::F32, &[2, 1], Layout::Contiguous);
    let two = Laid::contiguous(Dtype::F32, &[2, 4], &[0.0; 8]);
    let task = take_along_axis(two.view(), 1, indices.view(), out.view_mut()).unwrap();
    let error = Pool::new(2).run(&[task]).unwrap_err().to_string();
    assert!(error.contains("index 4294967294 is outside axis 1 of 4"), "{error}");
    let indices = Laid::contiguous(Dtype::I32, &[1], &[4.0]);
    let mut out = Laid::poisoned(Dtype::F32, &[1, 2, 4], Layout::Contiguous);
    let task = gather(a.view(), &[(0, indices.view())], &[2, 4], out.view_mut()).unwrap();
    let error = Pool::new(2).run(&[task]).unwrap_err().to_string();
    assert!(error.contains("index 4 is outside axis 0 of 5 (slices of 2)"), "{error}");
}

#[test]
fn misfits_are_refused() {
    let a = Laid::contiguous(Dtype::F32, &[5, 4], &[0.0; 20]);
    let floats = Laid::contiguous(Dtype::F32, &[2], &[0.0; 2]);
    let ints = Laid::contiguous(Dtype::I32, &[2], &[0.0; 2]);
    let mut out = Laid::poisoned(Dtype::F32, &[2, 4], Layout::Contiguous);
    for (part, result) in [
        ("must be integers", take(a.view(), 0, floats.view(), out.view_mut())),
        ("not in shape", take(a.view(), 2, ints.view(), out.view_mut())),
        ("the output float32 of [2, 4]", take(a.view(), 1, ints.view(), out.view_mut())),
        (
            "distinct axes",
            gather(a.view(), &[(0, ints.view()), (0, ints.view())], &[1, 4], {
                let mut view = out.view_mut();
                view.shape.insert(1, 1);
                view.strides.insert(1, 0);
                view
            }),
        ),
        (
            "do not belong together",
            take_along_axis(a.view(), 0, ints.view(), {
                let mut view = out.view_mut();
                view.shape.pop();
                view.strides.pop();
                view
            }),
        ),
    ] {
        let message = result.err().unwrap().to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}
