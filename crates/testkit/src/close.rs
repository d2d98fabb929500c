//! Comparing numbers with a stated tolerance.
//!
//! All measures treat a NaN or an infinity that the other side lacks as an infinite error: a
//! comparison that NaN slips through is how broken kernels pass.

/// The error between two values: 0 for equal ones (also two NaN, two equal infinities), infinite
/// when only one is NaN or they are different infinities.
fn error(actual: f32, expected: f32) -> f64 {
    if actual == expected || (actual.is_nan() && expected.is_nan()) {
        return 0.0;
    }
    let e = (actual as f64 - expected as f64).abs();
    if e.is_nan() { f64::INFINITY } else { e }
}

fn check_lengths(name: &str, actual: usize, expected: usize) {
    assert_eq!(actual, expected, "{name}: {actual} values, expected {expected}");
}

/// Panics unless |actual - expected| <= atol + rtol * |expected| holds for every element.
///
/// The message names the case, the element that is furthest past its bound with both values, and
/// how many are past it. State the reason of the tolerance where you call this.
#[track_caller]
pub fn assert_close(name: &str, actual: &[f32], expected: &[f32], rtol: f32, atol: f32) {
    check_lengths(name, actual.len(), expected.len());
    let mut worst: Option<(usize, f64)> = None;
    let mut failures = 0usize;
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let error = error(a, e);
        let bound = if e.is_finite() { atol as f64 + rtol as f64 * (e as f64).abs() } else { 0.0 };
        if error > bound {
            failures += 1;
            let excess = error - bound;
            if worst.is_none_or(|(_, w)| excess > w) {
                worst = Some((i, excess));
            }
        }
    }
    if let Some((i, _)) = worst {
        panic!(
            "{name}: {failures} of {} values differ; worst at [{i}]: actual {:e}, expected {:e}, \
             error {:e}, allowed {atol:e} + {rtol:e} * |expected|",
            actual.len(),
            actual[i],
            expected[i],
            error(actual[i], expected[i]),
        );
    }
}

/// Largest |actual - expected| divided by largest |expected|.
///
/// 0 when both are equal everywhere, infinite when a non-finite value differs or when `expected` is
/// all zero and `actual` is not. The usual measure for kernels, where single small outputs are sums
/// of large terms that cancel.
#[track_caller]
pub fn max_abs_rel_to_max(actual: &[f32], expected: &[f32]) -> f64 {
    check_lengths("max_abs_rel_to_max", actual.len(), expected.len());
    let worst = actual.iter().zip(expected).map(|(&a, &e)| error(a, e)).fold(0.0, f64::max);
    let largest = expected.iter().filter(|e| e.is_finite()).map(|&e| (e as f64).abs()).fold(0.0, f64::max);
    ratio(worst, largest)
}

/// ‖actual - expected‖₂ / ‖expected‖₂, summed in f64, with the same rules for zero and non-finite
/// values as [`max_abs_rel_to_max`].
#[track_caller]
pub fn relative_l2(actual: &[f32], expected: &[f32]) -> f64 {
    check_lengths("relative_l2", actual.len(), expected.len());
    let difference = actual.iter().zip(expected).map(|(&a, &e)| error(a, e).powi(2)).sum::<f64>();
    let norm = expected.iter().filter(|e| e.is_finite()).map(|&e| (e as f64).powi(2)).sum::<f64>();
    ratio(difference.sqrt(), norm.sqrt())
}

fn ratio(error: f64, scale: f64) -> f64 {
    if error == 0.0 { 0.0 } else { error / scale }
}

/// Panics unless both slices hold the same bits: -0 differs from 0, and NaN payloads count.
#[track_caller]
pub fn assert_bits_eq(name: &str, actual: &[f32], expected: &[f32]) {
    check_lengths(name, actual.len(), expected.len());
    let differs = |(a, e): (&f32, &f32)| a.to_bits() != e.to_bits();
    let failures = actual.iter().zip(expected).filter(|&p| differs(p)).count();
    if let Some(i) = actual.iter().zip(expected).position(differs) {
        let (a, e) = (actual[i], expected[i]);
        panic!(
            "{name}: {failures} of {} values differ in bits; first at [{i}]: actual {a:e} \
             ({:#010x}), expected {e:e} ({:#010x})",
            actual.len(),
            a.to_bits(),
            e.to_bits(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;

    fn panics(f: impl FnOnce() + std::panic::UnwindSafe) -> Option<String> {
        std::panic::catch_unwind(f).err().map(|e| e.downcast_ref::<String>().expect("a message").clone())
    }

    #[test]
    fn assert_close_judges_each_case() {
        let cases: &[(&str, &[f32], &[f32], bool)] = &[
            ("empty", &[], &[], true),
            ("equal", &[1.0, -2.0], &[1.0, -2.0], true),
            ("inside relative", &[100.9], &[100.0], true),
            ("outside relative", &[101.2], &[100.0], false),
            ("inside absolute", &[0.05], &[0.0], true),
            ("outside absolute", &[0.2], &[0.0], false),
            ("both nan", &[NAN], &[NAN], true),
            ("nan in actual", &[NAN], &[1.0], false),
            ("nan in expected", &[1.0], &[NAN], false),
            ("same infinity", &[INF], &[INF], true),
            ("other infinity", &[-INF], &[INF], false),
            ("finite for infinity", &[1.0], &[INF], false),
            ("infinity for finite", &[INF], &[1.0], false),
            ("length", &[1.0], &[1.0, 1.0], false),
        ];
        for &(name, actual, expected, passes) in cases {
            let outcome = panics(|| assert_close(name, actual, expected, 0.01, 0.1));
            assert_eq!(outcome.is_none(), passes, "{name}: {outcome:?}");
        }
    }

    #[test]
    fn assert_close_names_the_worst_element() {
        let actual = [1.0, 2.5, 9.0, 4.1];
        let message = panics(|| assert_close("case", &actual, &[1.0, 2.0, 3.0, 4.0], 0.0, 0.2));
        let message = message.expect("values differ");
        assert!(message.contains("2 of 4"), "{message}");
        assert!(message.contains("worst at [2]: actual 9e0, expected 3e0"), "{message}");
    }

    #[test]
    fn measures_of_error() {
        assert_eq!(max_abs_rel_to_max(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert_eq!(max_abs_rel_to_max(&[0.0], &[0.0]), 0.0);
        assert_eq!(max_abs_rel_to_max(&[1e-30], &[0.0]), f64::INFINITY);
        assert_eq!(max_abs_rel_to_max(&[NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(max_abs_rel_to_max(&[INF, 1.0], &[INF, 1.0]), 0.0);
        assert_eq!(relative_l2(&[3.0, 4.0], &[0.0, 5.0]), 10f64.sqrt() / 5.0);
        assert_eq!(relative_l2(&[], &[]), 0.0);
        assert_eq!(relative_l2(&[NAN], &[1.0]), f64::INFINITY);
    }

    #[test]
    fn bits_tell_zeros_and_nans_apart() {
        assert_bits_eq("same nan", &[NAN, 1.0], &[NAN, 1.0]);
        assert!(panics(|| assert_bits_eq("sign of zero", &[-0.0], &[0.0])).is_some());
        assert!(panics(|| assert_bits_eq("one ulp", &[1.0 + f32::EPSILON], &[1.0])).is_some());
    }
}
