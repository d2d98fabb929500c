//! Every op against plain loops, over layouts, types and tiers.

use mica_simd::Isa;
use mica_testkit::Rng;
use mica_threads::Pool;

use super::*;
use crate::testing::{Laid, layouts};

/// Runs on one and on three threads and checks that both leave the same bytes.
fn run_both(out: &mut Laid, make: impl Fn(DynViewMut) -> Box<dyn Task>) {
    let poisoned = out.bytes.clone();
    Pool::new(1).run(&[make(out.view_mut())]).unwrap();
    let single = std::mem::replace(&mut out.bytes, poisoned);
    Pool::new(3).run(&[make(out.view_mut())]).unwrap();
    assert!(single == out.bytes, "the number of threads changed the result");
    out.check_untouched_outside();
}

const SHAPES: &[&[usize]] =
    &[&[], &[0, 3], &[1], &[7], &[3, 5], &[2, 1, 33], &[5, 1024], &[3, 7, 129], &[40_001]];

#[test]
fn float_ops_match_scalar_loops_on_every_tier_and_layout() {
    let mut rng = Rng::new(1);
    for &isa in Isa::available() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64] {
            for &shape in SHAPES {
                for layout in layouts(shape) {
                    let size: usize = shape.iter().product();
                    let a_values: Vec<f64> = (0..size).map(|_| rng.normal() as f64 * 3.0).collect();
                    let b_values: Vec<f64> = (0..size).map(|_| rng.normal() as f64 * 3.0).collect();
                    let a = Laid::new(dtype, shape, layout, &a_values);
                    let b = Laid::contiguous(dtype, shape, &b_values);
                    let mut out = Laid::poisoned(dtype, shape, layouts(shape)[rng.range(0..2)]);
                    let name = format!("{isa} {dtype} {shape:?} {layout:?}");
                    run_both(&mut out, |view| {
                        binary_on(isa, BinaryOp::Subtract, a.view(), b.view(), view).unwrap()
                    });
                    let (x, y) = (a.values(), b.values());
                    let expected: Vec<f64> = (0..size)
                        .map(|i| match dtype {
                            Dtype::F64 => x[i] - y[i],
                            _ => dtype_round(dtype, (x[i] as f32 - y[i] as f32) as f64),
                        })
                        .collect();
                    assert_eq!(out.values(), expected, "{name}");
                    run_both(&mut out, |view| unary_on(isa, UnaryOp::Floor, a.view(), view).unwrap());
                    let expected: Vec<f64> = x.iter().map(|x| x.floor()).collect();
                    assert_eq!(out.values(), expected, "{name}");
                    let mut flags = Laid::poisoned(Dtype::Bool, shape, layout);
                    run_both(&mut flags, |view| {
                        compare_on(isa, CompareOp::Lt, a.view(), b.view(), view).unwrap()
                    });
                    let expected: Vec<f64> = (0..size).map(|i| (x[i] < y[i]) as u8 as f64).collect();
                    assert_eq!(flags.values(), expected, "{name}");
                    run_both(&mut out, |view| select(flags.view(), a.view(), b.view(), view).unwrap());
                    let expected: Vec<f64> =
                        (0..size).map(|i| if x[i] < y[i] { x[i] } else { y[i] }).collect();
                    assert_eq!(out.values(), expected, "{name}");
                }
            }
        }
    }
}

fn dtype_round(dtype: Dtype, value: f64) -> f64 {
    Laid::contiguous(dtype, &[1], &[value]).values()[0]
}

#[test]
fn operands_broadcast_as_in_numpy() {
    let mut rng = Rng::new(5);
    for (a_shape, b_shape, shape) in [
        (&[4, 5][..], &[5][..], &[4, 5][..]),
        (&[4, 1], &[1, 5], &[4, 5]),
        (&[], &[3, 2000], &[3, 2000]),
        (&[3, 1, 700], &[2, 1], &[3, 2, 700]),
        (&[1], &[1], &[1, 1]),
    ] {
        let count = |shape: &[usize]| shape.iter().product::<usize>();
        let a = Laid::contiguous(Dtype::I32, a_shape, &rng_ints(&mut rng, count(a_shape)));
        let b = Laid::contiguous(Dtype::I32, b_shape, &rng_ints(&mut rng, count(b_shape)));
        let mut out = Laid::poisoned(Dtype::I32, shape, layouts(shape)[0]);
        run_both(&mut out, |view| binary(BinaryOp::Multiply, a.view(), b.view(), view).unwrap());
        let expected: Vec<f64> =
            (0..count(shape)).map(|at| a.broadcast_value(shape, at) * b.broadcast_value(shape, at)).collect();
        assert_eq!(out.values(), expected, "{a_shape:?} {b_shape:?}");
    }
}

fn rng_ints(rng: &mut Rng, count: usize) -> Vec<f64> {
    (0..count).map(|_| rng.range(0..200) as f64 - 100.0).collect()
}

#[test]
fn an_output_may_be_an_input() {
    let mut rng = Rng::new(9);
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::I64, Dtype::U8] {
        for layout in layouts(&[37, 1030]) {
            let values: Vec<f64> = (0..37 * 1030).map(|_| rng.range(0..100) as f64).collect();
            let mut a = Laid::new(dtype, &[37, 1030], layout, &values);
            let b = Laid::contiguous(dtype, &[1030], &values[..1030]);
            let task = binary(BinaryOp::Maximum, a.view(), b.view(), a.view_mut()).unwrap();
            Pool::new(2).run(&[task]).unwrap();
            let expected: Vec<f64> =
                values.iter().enumerate().map(|(i, &value)| value.max(values[i % 1030])).collect();
            assert_eq!(a.values(), expected, "{dtype} {layout:?}");
        }
    }
}

/// Values as MLX 0.32.4 gives them.
#[test]
fn integer_and_bool_ops_are_mlx() {
    use BinaryOp::*;
    let cases: &[(&str, BinaryOp, Dtype, &[f64], &[f64], &[f64])] = &[
        (
            "floor",
            FloorDivide,
            Dtype::I32,
            &[-7., 7., -7., 7., 5., -5., 5.],
            &[2., -2., -2., 2., 3., 3., 0.],
            &[-4., -4., 3., 3., 1., -2., 0.],
        ),
        (
            "rem",
            Remainder,
            Dtype::I32,
            &[-7., 7., -7., 7., 5., -5., 5.],
            &[2., -2., -2., 2., 3., 3., 0.],
            &[1., -1., -1., 1., 2., 1., 5.],
        ),
        ("rem u8", Remainder, Dtype::U8, &[7., 200.], &[3., 7.], &[1., 4.]),
        (
            "pow",
            Power,
            Dtype::I32,
            &[2., 2., 3., -2., 0., 2., 2.],
            &[3., 0., 4., 3., 0., 31., -1.],
            &[8., 1., 81., -8., 1., -2147483648., 0.],
        ),
        ("left", LeftShift, Dtype::I32, &[1., 1., -1.], &[31., 32., 2.], &[-2147483648., 1., -4.]),
        ("right", RightShift, Dtype::I32, &[-8., 8., -1.], &[1., 33., 31.], &[-4., 4., -1.]),
        ("right u8", RightShift, Dtype::U8, &[200.], &[9.], &[0.]),
        ("left u8", LeftShift, Dtype::U8, &[200.], &[9.], &[0.]),
        ("wrap", Add, Dtype::I8, &[127., -128.], &[1., -1.], &[-128., 127.]),
        ("most negative", Divide, Dtype::I32, &[-2147483648.], &[-1.], &[-2147483648.]),
        ("bool add", Add, Dtype::Bool, &[1., 0., 1.], &[1., 1., 0.], &[1., 1., 1.]),
        ("bool sub", Subtract, Dtype::Bool, &[1., 0., 1.], &[1., 1., 0.], &[0., 1., 1.]),
        ("bool mul", Multiply, Dtype::Bool, &[1., 0., 1.], &[1., 1., 0.], &[1., 0., 0.]),
        ("bool pow", Power, Dtype::Bool, &[1., 0., 1.], &[1., 1., 0.], &[1., 0., 1.]),
        ("bool rem", Remainder, Dtype::Bool, &[1., 1., 0.], &[1., 1., 1.], &[0., 0., 0.]),
    ];
    for &(name, op, dtype, a, b, expected) in cases {
        let (a, b) = (Laid::contiguous(dtype, &[a.len()], a), Laid::contiguous(dtype, &[b.len()], b));
        let mut out = Laid::poisoned(dtype, &[expected.len()], layouts(&[1])[0]);
        run_both(&mut out, |view| binary(op, a.view(), b.view(), view).unwrap());
        assert_eq!(out.values(), expected, "{name}");
    }
    let a = Laid::contiguous(Dtype::I8, &[2], &[-128., -5.]);
    let mut out = Laid::poisoned(Dtype::I8, &[2], layouts(&[2])[0]);
    run_both(&mut out, |view| unary(UnaryOp::Abs, a.view(), view).unwrap());
    assert_eq!(out.values(), [-128., 5.]);
}

/// Values as MLX 0.32.4 gives them, bit for bit in sign of zero and NaN.
#[test]
fn float_edges_are_mlx() {
    use BinaryOp::*;
    const N: f64 = f64::NAN;
    const I: f64 = f64::INFINITY;
    let cases: &[(&str, BinaryOp, &[f64], &[f64], &[f64])] = &[
        (
            "remainder",
            Remainder,
            &[-7., 7., -7., 7., 5.5, -5.5, 1., I, 1., N, -1e-30, -0., 4., -4., -1., 1.],
            &[2., -2., -2., 2., 3., 3., 0., 2., I, 2., 1., 1., 2., 2., I, -I],
            &[1., -1., -1., 1., 2.5, 0.5, N, N, 1., N, 1., -0., 0., -0., I, -I],
        ),
        (
            "floor divide",
            FloorDivide,
            &[-7., 7., 1., 1., 5.5, -5.5, -0.5],
            &[2., -2., 0., I, 0.1, 2., 1.],
            &[-4., -4., I, 0., 55., -3., -1.],
        ),
        ("maximum", Maximum, &[N, 1., N, -0., 0.], &[1., N, N, 0., -0.], &[N, N, N, 0., -0.]),
        ("minimum", Minimum, &[N, 1., N, -0., 0.], &[1., N, N, 0., -0.], &[N, N, N, 0., -0.]),
        (
            "power",
            Power,
            &[0., -1., -2., N, 1., 2., I, -8.],
            &[0., 2., 0.5, 0., N, -1., -1., 1. / 3.],
            &[1., 1., N, 1., 1., 0.5, 0., N],
        ),
        ("logaddexp", LogAddExp, &[-I, I, N, -I], &[-I, I, 1., 3.], &[-I, I, N, 3.]),
    ];
    for &isa in Isa::available() {
        for dtype in [Dtype::F32, Dtype::F64] {
            for &(name, op, a, b, expected) in cases {
                // Once as they are, once repeated, so that vector bodies see them too.
                for times in [1, 40] {
                    let shape = [a.len() * times];
                    let (a, b) = (a.repeat(times), b.repeat(times));
                    let a = Laid::contiguous(dtype, &shape, &a);
                    let b = Laid::contiguous(dtype, &shape, &b);
                    let mut out = Laid::poisoned(dtype, &shape, layouts(&shape)[0]);
                    run_both(&mut out, |view| binary_on(isa, op, a.view(), b.view(), view).unwrap());
                    for (i, (got, expected)) in out.values().iter().zip(expected.repeat(times)).enumerate() {
                        let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
                        assert!(same, "{isa} {dtype} {name} [{i}]: {got} is not {expected}");
                    }
                }
            }
        }
        let x = [N, -2., 0., -0., I, 0.5, 1.5, 2.5, -0.5, -1.5];
        let a = Laid::contiguous(Dtype::F32, &[10], &x);
        let mut out = Laid::poisoned(Dtype::F32, &[10], layouts(&[10])[0]);
        run_both(&mut out, |view| unary_on(isa, UnaryOp::Sign, a.view(), view).unwrap());
        assert_eq!(out.values(), [0., -1., 0., 0., 1., 1., 1., 1., -1., -1.]);
        run_both(&mut out, |view| unary_on(isa, UnaryOp::Round, a.view(), view).unwrap());
        assert_eq!(out.values()[4..], [I, 0., 2., 2., -0., -2.]);
    }
}

#[test]
fn every_type_casts_to_every_type() {
    let values = [0.0, 1.0, 2.0, 100.0, 1.0, 7.0, 0.0, 3.0];
    for from in Dtype::ALL {
        for to in Dtype::ALL {
            for layout in layouts(&[2, 4]) {
                let a = Laid::new(from, &[2, 4], layout, &values);
                let mut out = Laid::poisoned(to, &[2, 4], layout);
                run_both(&mut out, |view| cast(a.view(), view).unwrap());
                let expected: Vec<f64> = match (from, to) {
                    (Dtype::Bool, _) | (_, Dtype::Bool) => {
                        values.iter().map(|&x| (x != 0.0) as u8 as f64).collect()
                    }
                    _ => values.to_vec(),
                };
                assert_eq!(out.values(), expected, "{from} to {to}");
            }
        }
    }
    for (name, from, to, value, expected) in [
        ("saturates", Dtype::F32, Dtype::I32, 1e10, 2147483647.0),
        ("truncates", Dtype::F32, Dtype::I32, -1.7, -1.0),
        ("nan", Dtype::F32, Dtype::I64, f64::NAN, 0.0),
        ("nan is true", Dtype::F32, Dtype::Bool, f64::NAN, 1.0),
        ("negative zero is false", Dtype::F32, Dtype::Bool, -0.0, 0.0),
        ("half is true", Dtype::BF16, Dtype::Bool, 0.5, 1.0),
        ("wraps", Dtype::I32, Dtype::U16, 70000.0, 4464.0),
        ("wraps below", Dtype::I32, Dtype::U16, -1.0, 65535.0),
        ("to even", Dtype::F32, Dtype::BF16, 1.001953125 + 0.001953125, 1.0),
    ] {
        let a = Laid::contiguous(from, &[1], &[value]);
        let mut out = Laid::poisoned(to, &[1], layouts(&[1])[0]);
        run_both(&mut out, |view| cast(a.view(), view).unwrap());
        assert_eq!(out.values(), [expected], "{name}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_reasons() {
    let f = Laid::contiguous(Dtype::F32, &[2, 3], &[0.0; 6]);
    let i = Laid::contiguous(Dtype::I32, &[2, 3], &[0.0; 6]);
    let mut out = Laid::poisoned(Dtype::F32, &[2, 3], layouts(&[2, 3])[0]);
    let message = |result: Result<Box<dyn Task>, KernelError>| match result {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    for (part, result) in [
        ("one type", binary(BinaryOp::Add, f.view(), i.view(), out.view_mut())),
        ("output is int32", unary(UnaryOp::Abs, i.view(), out.view_mut())),
        ("not defined for int32", {
            let mut out = Laid::poisoned(Dtype::I32, &[2, 3], layouts(&[2, 3])[0]);
            unary(UnaryOp::Exp, i.view(), out.view_mut())
        }),
        ("does not broadcast", {
            let mut out = Laid::poisoned(Dtype::F32, &[3, 2], layouts(&[3, 2])[0]);
            unary(UnaryOp::Exp, f.view(), out.view_mut())
        }),
        ("written more than once", {
            let mut view = out.view_mut();
            view.strides[0] = 0;
            unary(UnaryOp::Exp, f.view(), view)
        }),
    ] {
        let message = message(result);
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}
