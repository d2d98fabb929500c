use super::*;

/// A function in f64 that the sweep compares with. The reference of erf is its series and
/// continued fraction, because std has none.
fn exact(function: Function, x: f64) -> f64 {
    let sigmoid = |x: f64| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) };
    match function {
        Function::Exp => x.exp(),
        Function::Expm1 => x.exp_m1(),
        Function::Log => x.ln(),
        Function::Log1p => x.ln_1p(),
        Function::Tanh => x.tanh(),
        Function::Sigmoid => sigmoid(x),
        Function::Silu => x * sigmoid(x),
        Function::Erf => erf(x),
        Function::Gelu => x * 0.5 * erfc(-x / std::f64::consts::SQRT_2),
        Function::GeluTanh => {
            x * sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x))
        }
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
    }
}

/// The error function: a Taylor series near zero, else from its complement.
fn erf(x: f64) -> f64 {
    if x.abs() >= 2.5 {
        return 1.0 - erfc(x);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// 1 - erf x: from the series near zero, else a continued fraction.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.5 {
        return 1.0 - erf(x);
    }
    let mut fraction = 0.0;
    for n in (1..200).rev() {
        fraction = n as f64 / 2.0 / (x + fraction);
    }
    (-x * x).exp() / std::f64::consts::PI.sqrt() / (x + fraction)
}

/// The distance in units in the last place of the f32 nearest to the exact value (subnormals
/// have the unit of the smallest normal's neighbour).
fn ulps(actual: f32, exact: f64) -> f64 {
    if (actual as f64) == exact || (actual.is_nan() && exact.is_nan()) || actual == exact as f32 {
        return 0.0;
    }
    if actual.is_nan() || exact.is_nan() || actual.is_infinite() {
        return f64::INFINITY;
    }
    let exponent = exact.abs().max(f32::MIN_POSITIVE as f64).log2().floor();
    (actual as f64 - exact).abs() / (exponent - 23.0).exp2()
}

fn sweep(low: f32, high: f32, count: usize) -> Vec<f32> {
    let mut rng = mica_testkit::Rng::new(1);
    let mut x: Vec<f32> = (0..count).map(|i| low + (high - low) * (i as f32 / count as f32)).collect();
    // Small magnitudes of both signs, too.
    for _ in 0..count {
        let magnitude = rng.uniform(-60.0, high.abs().max(low.abs()).log2()).exp2();
        let value = if rng.chance(0.5) { magnitude } else { -magnitude };
        if (low..=high).contains(&value) {
            x.push(value);
        }
    }
    x
}

#[test]
fn errors_stay_within_the_documented_units() {
    let cases = [
        (Function::Exp, -104.0, 88.8, 2.0),
        (Function::Expm1, -30.0, 88.8, 3.0),
        (Function::Log, 1e-45, 3e38, 2.0),
        (Function::Log, 0.5, 2.0, 2.0),
        (Function::Log1p, -0.99999, 100.0, 3.0),
        (Function::Tanh, -12.0, 12.0, 3.0),
        (Function::Sigmoid, -104.0, 40.0, 3.0),
        (Function::Silu, -80.0, 40.0, 3.0),
        (Function::Erf, -5.0, 5.0, 2.0),
        (Function::Gelu, -1.0, 10.0, 4.0),
        (Function::GeluTanh, -1.0, 10.0, 5.0),
        (Function::Sin, -50_000.0, 50_000.0, 2.0),
        (Function::Cos, -50_000.0, 50_000.0, 2.0),
        (Function::Sin, -10.0, 10.0, 2.0),
        (Function::Cos, -10.0, 10.0, 2.0),
    ];
    let mut failures = Vec::new();
    for (function, low, high, bound) in cases {
        let x = sweep(low, high, 200_000);
        let mut y = x.clone();
        function.of_slice(Isa::best(), &mut y);
        let (at, worst) = (0..x.len())
            .map(|i| (i, ulps(y[i], exact(function, x[i] as f64))))
            .fold((0, 0.0), |a, b| if b.1 > a.1 { b } else { a });
        println!("{function:?} [{low}, {high}]: {worst:.3} at {:e}", x[at]);
        if worst > bound {
            failures.push(format!(
                "{function:?} in [{low}, {high}]: {worst} units at {:e} -> {:e}",
                x[at], y[at]
            ));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn gelu_on_the_negative_side_is_absolutely_accurate() {
    for function in [Function::Gelu, Function::GeluTanh] {
        let x = sweep(-20.0, -1.0, 100_000);
        let mut y = x.clone();
        function.of_slice(Isa::best(), &mut y);
        for (&x, &y) in x.iter().zip(&y) {
            let error = (y as f64 - exact(function, x as f64)).abs();
            assert!(error <= x.abs() as f64 * 2f64.powi(-21), "{function:?}({x}) = {y}, error {error:e}");
        }
    }
}

#[test]
fn special_values() {
    const INF: f32 = f32::INFINITY;
    const NAN: f32 = f32::NAN;
    let cases = [
        (Function::Exp, -INF, 0.0),
        (Function::Exp, INF, INF),
        (Function::Exp, -1e30, 0.0),
        (Function::Exp, 88.73, INF),
        (Function::Exp, 0.0, 1.0),
        (Function::Expm1, -0.0, -0.0),
        (Function::Expm1, -INF, -1.0),
        (Function::Expm1, INF, INF),
        (Function::Log, 0.0, -INF),
        (Function::Log, -0.0, -INF),
        (Function::Log, -1.0, NAN),
        (Function::Log, -1e-45, NAN),
        (Function::Log, INF, INF),
        (Function::Log, 1.0, 0.0),
        (Function::Log1p, -1.0, -INF),
        (Function::Log1p, -0.0, -0.0),
        (Function::Log1p, INF, INF),
        (Function::Log1p, -2.0, NAN),
        (Function::Tanh, INF, 1.0),
        (Function::Tanh, -INF, -1.0),
        (Function::Tanh, -0.0, -0.0),
        (Function::Sigmoid, -INF, 0.0),
        (Function::Sigmoid, INF, 1.0),
        (Function::Sigmoid, 0.0, 0.5),
        (Function::Silu, INF, INF),
        (Function::Erf, INF, 1.0),
        (Function::Erf, -INF, -1.0),
        (Function::Erf, -0.0, -0.0),
        (Function::Gelu, INF, INF),
        (Function::Gelu, -INF, -0.0),
        (Function::GeluTanh, INF, INF),
        (Function::GeluTanh, -INF, -0.0),
        (Function::Sin, -0.0, -0.0),
        (Function::Sin, INF, NAN),
        (Function::Cos, -INF, NAN),
        (Function::Cos, 0.0, 1.0),
    ];
    for &isa in Isa::available() {
        for (function, x, expected) in cases {
            let mut y = [x];
            function.of_slice(isa, &mut y);
            let same = y[0] == expected && y[0].is_sign_negative() == expected.is_sign_negative();
            assert!(same || (y[0].is_nan() && expected.is_nan()), "{isa} {function:?}({x}) = {}", y[0]);
        }
        for function in Function::ALL {
            let mut y = [NAN];
            function.of_slice(isa, &mut y);
            assert!(y[0].is_nan(), "{isa} {function:?}(NaN) = {}", y[0]);
        }
    }
}

#[test]
fn every_tier_gives_the_same_bits() {
    let mut rng = mica_testkit::Rng::new(9);
    let mut x: Vec<f32> = (0..20_011).map(|_| f32::from_bits(rng.u32())).collect();
    x.extend((0..20_000).map(|_| rng.uniform(-100.0, 100.0)));
    for function in Function::ALL {
        let mut expected = x.clone();
        function.of_slice(Isa::Scalar, &mut expected);
        for &isa in Isa::available() {
            let mut y = x.clone();
            function.of_slice(isa, &mut y);
            for i in 0..x.len() {
                let same = y[i].to_bits() == expected[i].to_bits() || (y[i].is_nan() && expected[i].is_nan());
                assert!(same, "{isa} {function:?}({:e}): {:e} {:e}", x[i], y[i], expected[i]);
            }
        }
    }
}

#[test]
fn f64_trigonometry_matches_the_platform() {
    let mut rng = mica_testkit::Rng::new(2);
    for _ in 0..100_000 {
        let x = (rng.f64() - 0.5) * 2f64.powf(rng.f64() * 33.0);
        let (s, c) = sin_cos_f64(x);
        assert!((s - x.sin()).abs() < 2e-15 && (c - x.cos()).abs() < 2e-15, "{x}");
    }
}

#[test]
fn exponentials_up_to_one_are_those_of_exp() {
    struct Both(Vec<f32>);
    impl Kernel for Both {
        type Output = Vec<[u32; 2]>;

        fn run<V: Vector>(self) -> Vec<[u32; 2]> {
            let one =
                |&x: &f32| [exp(V::splat(x)), exp_to_one(V::splat(x))].map(|y| y.to_array()[0].to_bits());
            self.0.iter().map(one).collect()
        }
    }
    let mut x = sweep(-110.0, 0.0, 10_000);
    x.extend([f32::NEG_INFINITY, f32::NAN, -0.0, 0.0, -1e30]);
    for &isa in Isa::available() {
        for (x, [all, to_one]) in x.iter().zip(dispatch(isa, Both(x.clone()))) {
            let expected = if *x < EXP_TO_ONE_FROM { 0 } else { all };
            assert_eq!(expected, to_one, "{isa}: {x}");
        }
    }
}
