//! Reductions against plain loops in the documented order, bit for bit.

use mica_testkit::Rng;
use mica_threads::Pool;

use super::*;
use crate::testing::{Laid, Layout, layouts};

fn run_both(out: &mut Laid, make: impl Fn(DynViewMut) -> Box<dyn Task>) {
    let poisoned = out.bytes.clone();
    let task = make(out.view_mut());
    Pool::new(1).run(std::slice::from_ref(&task)).unwrap();
    let single = std::mem::replace(&mut out.bytes, poisoned);
    // The same task again, on more threads: partial results must not linger.
    let pool = Pool::new(3);
    let task = make(out.view_mut());
    pool.run(std::slice::from_ref(&task)).unwrap();
    pool.run(std::slice::from_ref(&task)).unwrap();
    assert!(single == out.bytes, "the number of threads changed the result");
    out.check_untouched_outside();
}

/// Elements of each output as [outer][row], from the shape alone; and whether the row is there.
fn cut(shape: &[usize], axes: &[usize]) -> (Vec<Vec<Vec<usize>>>, bool) {
    let rank = shape.len();
    let last = (0..rank).rev().find(|&axis| shape[axis] != 1);
    let has_row = last.is_some_and(|axis| axes.contains(&axis));
    let mut row_from = rank;
    if has_row {
        while row_from > 0 && (axes.contains(&(row_from - 1)) || shape[row_from - 1] == 1) {
            row_from -= 1;
        }
    }
    let mut outputs: std::collections::BTreeMap<
        Vec<usize>,
        std::collections::BTreeMap<Vec<usize>, Vec<usize>>,
    > = Default::default();
    for at in 0..shape.iter().product() {
        let mut index = vec![0; rank];
        let mut rest = at;
        for axis in (0..rank).rev() {
            index[axis] = rest % shape[axis];
            rest /= shape[axis];
        }
        let pick = |keep: &dyn Fn(usize) -> bool| (0..rank).filter(|&a| keep(a)).map(|a| index[a]).collect();
        let kept: Vec<usize> = pick(&|a| !axes.contains(&a));
        let outer: Vec<usize> = pick(&|a| axes.contains(&a) && a < row_from);
        outputs.entry(kept).or_default().entry(outer).or_default().push(at);
    }
    (outputs.into_values().map(|outer| outer.into_values().collect()).collect(), has_row)
}

/// The documented order, written once more.
fn expected_f32(
    values: &[f32],
    (outputs, has_row): &(Vec<Vec<Vec<usize>>>, bool),
    neutral: f32,
    join: fn(f32, f32) -> f32,
) -> Vec<f32> {
    let fold = |parts: Vec<f32>| parts[1..].iter().fold(parts[0], |a, &b| join(a, b));
    outputs
        .iter()
        .map(|outer| {
            if !*has_row {
                let parts = outer
                    .chunks(512)
                    .map(|segment| segment.iter().fold(neutral, |a, at| join(a, values[at[0]])));
                return fold(parts.collect());
            }
            let row = |elements: &[usize]| {
                let mut lanes = [neutral; 16];
                for (i, &at) in elements.iter().enumerate() {
                    lanes[i % 16] = join(lanes[i % 16], values[at]);
                }
                for width in [8, 4, 2, 1] {
                    for i in 0..width {
                        lanes[i] = join(lanes[i], lanes[i + width]);
                    }
                }
                lanes[0]
            };
            let pieces: Vec<f32> = outer.iter().flat_map(|r| r.chunks(16_384)).map(row).collect();
            let a_group = (16_384 / outer[0].len().min(16_384)).max(1);
            fold(pieces.chunks(a_group).map(|group| fold(group.to_vec())).collect())
        })
        .collect()
}

const CASES: &[(&[usize], &[usize])] = &[
    (&[1], &[0]),
    (&[7], &[0]),
    (&[1, 5], &[0]),
    (&[1000], &[0]),
    (&[200_000], &[0]),
    (&[3, 70_000], &[1]),
    (&[5, 33], &[1]),
    (&[5, 33], &[0]),
    (&[5, 33], &[0, 1]),
    (&[2000, 3], &[0]),
    (&[1300, 300], &[0]),
    (&[4, 600, 5], &[0, 2]),
    (&[700, 3, 200], &[0, 2]),
    (&[3, 4, 5, 6], &[1, 3]),
    (&[3, 4, 5, 6], &[0, 2]),
    (&[3, 4, 1, 6], &[2]),
    (&[6, 5, 1], &[1, 2]),
    (&[6, 5, 1], &[2]),
    (&[2, 3, 4], &[]),
];

#[test]
fn floats_follow_the_documented_order() {
    let mut rng = Rng::new(11);
    for &(shape, axes) in CASES {
        let outputs = cut(shape, axes);
        for layout in layouts(shape) {
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
                let a = Laid::random(dtype, shape, layout, &mut rng);
                let values: Vec<f32> = a.values().iter().map(|&value| value as f32).collect();
                let kept: Vec<usize> =
                    (0..shape.len()).filter(|axis| !axes.contains(axis)).map(|axis| shape[axis]).collect();
                for (op, neutral, join) in [
                    (ReduceOp::Sum, 0.0, (|a, b| a + b) as fn(f32, f32) -> f32),
                    (ReduceOp::Prod, 1.0, |a, b| a * b),
                    (ReduceOp::Max, f32::NEG_INFINITY, f32::max),
                    (ReduceOp::Min, f32::INFINITY, f32::min),
                ] {
                    let mut out = Laid::poisoned(dtype, &kept, Layout::Padded);
                    run_both(&mut out, |view| reduce(op, a.view(), axes, view).unwrap());
                    let expected: Vec<f64> =
                        expected_f32(&values, &outputs, neutral, join).into_iter().map(f64::from).collect();
                    let expected = Laid::contiguous(dtype, &kept, &expected).values();
                    assert!(out.values() == expected, "{op:?} {dtype} {shape:?} {axes:?} {layout:?}");
                }
            }
        }
    }
}

#[test]
fn chunks_of_several_segments_keep_the_order() {
    let mut rng = Rng::new(15);
    let (shape, axes) = ([2, 1_150_000], [1]);
    let outputs = cut(&shape, &axes);
    for layout in [Layout::Contiguous, Layout::Padded] {
        let a = Laid::random(Dtype::F32, &shape, layout, &mut rng);
        let values: Vec<f32> = a.values().iter().map(|&value| value as f32).collect();
        let mut out = Laid::poisoned(Dtype::F32, &[2], Layout::Contiguous);
        run_both(&mut out, |view| reduce(ReduceOp::Sum, a.view(), &axes, view).unwrap());
        let expected: Vec<f64> =
            expected_f32(&values, &outputs, 0.0, |a, b| a + b).into_iter().map(f64::from).collect();
        assert_eq!(out.values(), expected, "{layout:?}");
    }
}

#[test]
fn tiers_agree() {
    let mut rng = Rng::new(14);
    for (shape, axis) in
        [([3, 5000], 1), ([2, 90], 1), ([7, 63], 1), ([600, 1100], 0), ([5, 70], 0), ([6, 1], 0)]
    {
        for special in [None, Some(f64::NAN), Some(f64::INFINITY), Some(-0.0)] {
            let mut values: Vec<f64> = (0..shape[0] * shape[1]).map(|_| rng.normal() as f64).collect();
            if let Some(special) = special {
                for _ in 0..values.len() / 50 + 1 {
                    let at = rng.range(0..values.len());
                    values[at] = special;
                    let at = rng.range(0..values.len());
                    values[at] = 0.0;
                }
            }
            for dtype in [Dtype::F32, Dtype::BF16] {
                let a = Laid::new(dtype, &shape, *rng.choose(&layouts(&shape)), &values);
                for op in [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Max, ReduceOp::Min] {
                    let kept = [shape[1 - axis]];
                    let result = |isa| {
                        let mut out = Laid::poisoned(dtype, &kept, Layout::Contiguous);
                        run_both(&mut out, |view| reduce_on(isa, op, a.view(), &[axis], view).unwrap());
                        out.values()
                            .into_iter()
                            .map(|x| if x.is_nan() { 1 } else { x.to_bits() })
                            .collect::<Vec<_>>()
                    };
                    let expected = result(Isa::Scalar);
                    for &isa in Isa::available() {
                        assert!(result(isa) == expected, "{isa} {op:?} {dtype} {shape:?} {special:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn integers_and_truth_match_plain_loops() {
    let mut rng = Rng::new(12);
    for &(shape, axes) in CASES {
        let keep: Vec<usize> =
            (0..shape.len()).map(|axis| if axes.contains(&axis) { 1 } else { shape[axis] }).collect();
        let (outputs, _) = cut(shape, axes);
        for dtype in
            [Dtype::Bool, Dtype::U8, Dtype::I8, Dtype::I16, Dtype::I32, Dtype::U64, Dtype::I64, Dtype::F64]
        {
            let a = Laid::random(dtype, shape, *rng.choose(&layouts(shape)), &mut rng);
            let values: Vec<f64> =
                a.values().into_iter().map(|x| if dtype == Dtype::F64 { x.round() } else { x }).collect();
            let a = Laid::new(dtype, shape, Layout::Padded, &values);
            for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min, ReduceOp::All, ReduceOp::Any] {
                let mut out = Laid::poisoned(op.output_dtype(dtype), &keep, Layout::Contiguous);
                run_both(&mut out, |view| reduce(op, a.view(), axes, view).unwrap());
                let expected: Vec<f64> = outputs
                    .iter()
                    .map(|output| {
                        let all = output.iter().flatten().map(|&at| values[at]);
                        match op {
                            ReduceOp::Sum => all.sum(),
                            ReduceOp::Max => all.fold(f64::NEG_INFINITY, f64::max),
                            ReduceOp::Min => all.fold(f64::INFINITY, f64::min),
                            ReduceOp::All => all.fold(1.0, |a, b| if b == 0.0 { 0.0 } else { a }),
                            _ => all.fold(0.0, |a, b| if b != 0.0 { 1.0 } else { a }),
                        }
                    })
                    .collect();
                assert_eq!(out.values(), expected, "{op:?} {dtype} {shape:?} {axes:?}");
            }
        }
    }
}

#[test]
fn nan_wins_and_empty_sums_are_neutral() {
    for (length, at) in [(3, 1), (41, 20), (2000, 1999), (2000, 0)] {
        let mut values = vec![1.0; length];
        values[at] = f64::NAN;
        for op in [ReduceOp::Max, ReduceOp::Min, ReduceOp::Sum] {
            for (shape, axis) in [([length, 1], 0), ([1, length], 1)] {
                let a = Laid::contiguous(Dtype::F32, &shape, &values);
                let mut out = Laid::poisoned(Dtype::F32, &[1], Layout::Contiguous);
                run_both(&mut out, |view| reduce(op, a.view(), &[axis], view).unwrap());
                assert!(out.values()[0].is_nan(), "{op:?} {shape:?} {at}");
            }
        }
        let a = Laid::contiguous(Dtype::F32, &[length], &values);
        let mut out = Laid::poisoned(Dtype::U32, &[], Layout::Contiguous);
        run_both(&mut out, |view| arg_reduce(ArgReduceOp::ArgMin, a.view(), 0, view).unwrap());
        assert_eq!(out.values(), [at as f64]);
    }
    let a = Laid::contiguous(Dtype::F32, &[0, 3], &[]);
    for (op, expected) in
        [(ReduceOp::Sum, 0.0), (ReduceOp::Prod, 1.0), (ReduceOp::All, 1.0), (ReduceOp::Any, 0.0)]
    {
        let mut out = Laid::poisoned(op.output_dtype(Dtype::F32), &[3], Layout::Contiguous);
        run_both(&mut out, |view| reduce(op, a.view(), &[0], view).unwrap());
        assert_eq!(out.values(), [expected; 3], "{op:?}");
        let mut out = Laid::poisoned(op.output_dtype(Dtype::F32), &[0], Layout::Contiguous);
        run_both(&mut out, |view| reduce(op, a.view(), &[1], view).unwrap());
        let mut out = Laid::poisoned(op.output_dtype(Dtype::F32), &[], Layout::Contiguous);
        run_both(&mut out, |view| reduce(op, a.view(), &[0, 1], view).unwrap());
        assert_eq!(out.values(), [expected], "{op:?}");
    }
    let mut out = Laid::poisoned(Dtype::F32, &[3], Layout::Contiguous);
    assert!(
        reduce(ReduceOp::Max, a.view(), &[0], out.view_mut())
            .err()
            .unwrap()
            .to_string()
            .contains("no elements")
    );
}

#[test]
fn places_of_extremes() {
    let mut rng = Rng::new(13);
    for (shape, axis) in [
        (&[40][..], 0),
        (&[5000], 0),
        (&[3, 1000], 1),
        (&[1000, 3], 0),
        (&[4, 5, 300], 1),
        (&[4, 300, 1], 1),
        (&[2, 3, 1], 2),
    ] {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::I32, Dtype::U8, Dtype::F64] {
            for layout in layouts(shape) {
                let mut values: Vec<f64> =
                    (0..shape.iter().product()).map(|_| rng.range(0..30) as f64).collect();
                if dtype.is_float() {
                    let at = rng.range(0..values.len());
                    values[at] = f64::NAN;
                }
                let a = Laid::new(dtype, shape, layout, &values);
                let mut kept = shape.to_vec();
                kept.remove(axis);
                let (outputs, _) = cut(shape, &[axis]);
                for (op, sign) in [(ArgReduceOp::ArgMax, 1.0), (ArgReduceOp::ArgMin, -1.0)] {
                    let mut out = Laid::poisoned(Dtype::U32, &kept, Layout::Padded);
                    run_both(&mut out, |view| arg_reduce(op, a.view(), axis, view).unwrap());
                    let expected: Vec<f64> = outputs
                        .iter()
                        .map(|output| {
                            let line: Vec<f64> =
                                output.iter().flatten().map(|&at| values[at] * sign).collect();
                            let top = line.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                            let nan = line.iter().position(|x| x.is_nan());
                            nan.unwrap_or_else(|| line.iter().position(|&x| x == top).unwrap()) as f64
                        })
                        .collect();
                    assert_eq!(out.values(), expected, "{op:?} {dtype} {shape:?} {axis} {layout:?}");
                }
            }
        }
    }
}

#[test]
fn misfits_are_refused() {
    let a = Laid::contiguous(Dtype::I8, &[2, 3], &[0.0; 6]);
    for (part, axes, dtype, shape) in [
        ("gives int32", &[0][..], Dtype::I8, &[3][..]),
        ("distinct axes", &[0, 0], Dtype::I32, &[3]),
        ("distinct axes", &[2], Dtype::I32, &[3]),
        ("the output has [2]", &[0], Dtype::I32, &[2]),
    ] {
        let mut out = Laid::poisoned(dtype, shape, Layout::Contiguous);
        let error = reduce(ReduceOp::Sum, a.view(), axes, out.view_mut()).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
}
