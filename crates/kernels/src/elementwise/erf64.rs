//! The error function in f64, for `float64` arrays (finite-difference checks, mostly): accuracy
//! over speed.

/// erf(x), to a few 2⁻⁵³.
pub(super) fn erf(x: f64) -> f64 {
    let y = x.abs();
    if x.is_nan() {
        x
    } else if y < 1.5 {
        series(x)
    } else {
        (1.0 - tail(y)).copysign(x)
    }
}

/// 1 - erf(x) for x ≥ 0, without cancellation where it is small.
fn erfc(x: f64) -> f64 {
    if x < 1.5 { 1.0 - series(x) } else { tail(x) }
}

/// 2/√π e^(-x²) Σ 2ⁿ x²ⁿ⁺¹ / (2n+1)!!: no term cancels another.
fn series(x: f64) -> f64 {
    let square = x * x;
    let (mut term, mut sum) = (x, x);
    let mut n = 1.0;
    while term.abs() > sum.abs() * 1e-17 {
        n += 2.0;
        term *= 2.0 * square / n;
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-square).exp() * sum
}

/// e^(-x²) / (√π · continued fraction), for x of at least 1.5 (Abramowitz and Stegun 7.1.14).
fn tail(x: f64) -> f64 {
    if x > 27.5 {
        return 0.0;
    }
    // From the inside out; 120 terms are enough at 1.5.
    let mut fraction = x;
    for k in (1..=120).rev() {
        fraction = x + k as f64 * 0.5 / fraction;
    }
    // x² split in two, so that its rounding does not come back magnified by exp.
    let high = f64::from_bits(x.to_bits() & !0x7ff_ffff);
    let low = (x - high) * (x + high);
    (-high * high).exp() * (-low).exp() / fraction * (std::f64::consts::FRAC_2_SQRT_PI * 0.5)
}

/// The x with erf(x) = `y`; ±∞ at ±1, NaN outside.
pub(super) fn erf_inv(y: f64) -> f64 {
    let size = y.abs();
    if size >= 1.0 || y.is_nan() {
        return if size == 1.0 { f64::INFINITY.copysign(y) } else { f64::NAN };
    }
    if size < 1e-8 {
        return y / std::f64::consts::FRAC_2_SQRT_PI;
    }
    // Winitzki's approximation, right to three digits, then Halley steps, which treble them.
    let log = (-size).ln_1p() + size.ln_1p();
    let a = 0.147;
    let b = 2.0 / (std::f64::consts::PI * a) + log * 0.5;
    let mut x = ((b * b - log / a).sqrt() - b).sqrt();
    for _ in 0..4 {
        let slope = std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp();
        let error = if size > 0.5 { (1.0 - size) - erfc(x) } else { erf(x) - size };
        let step = error / slope;
        if slope == 0.0 {
            break;
        }
        x -= step / (1.0 + x * step);
    }
    x.copysign(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // Computed with 40 digits.
        for (x, expected) in [
            (0.0, 0.0),
            (1e-10, 1.1283791670955126e-10),
            (0.5, 0.5204998778130465),
            (1.0, 0.8427007929497149),
            (1.4999999, 0.96610513458228),
            (1.5, 0.9661051464753108),
            (2.0, 0.9953222650189527),
            (3.0, 0.9999779095030014),
            (-0.3, -0.3286267594591274),
        ] {
            assert!((erf(x) - expected).abs() <= 1e-15 * expected.abs(), "erf({x}) = {:?}", erf(x));
        }
        assert_eq!(erf(f64::INFINITY), 1.0);
        assert!((erfc(5.0) / 1.537_459_794_428_035e-12 - 1.0).abs() < 1e-14);
    }

    #[test]
    fn the_inverse_inverts() {
        for i in -999..1000 {
            let y = i as f64 / 1000.0;
            assert!((erf(erf_inv(y)) - y).abs() < 1e-15, "{y}");
        }
        for exponent in 2..15 {
            let rest = 10f64.powi(-exponent);
            let y = 1.0 - rest;
            assert!((erfc(erf_inv(y)) / (1.0 - y) - 1.0).abs() < 1e-12, "1 - 1e-{exponent}");
        }
        assert_eq!(erf_inv(1.0), f64::INFINITY);
        assert!(erf_inv(1.1).is_nan());
    }
}
