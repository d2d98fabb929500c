//! Real and complex numbers under one name.

use std::ops::{Add, AddAssign, Mul, Neg, Sub, SubAssign};

use num_complex::Complex64;

/// f64 or complex f64.
pub(crate) trait Field:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Mul<f64, Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
{
    fn of(value: f64) -> Self;
    fn conj(self) -> Self;
    fn re(self) -> f64;
    fn norm_sqr(self) -> f64;
    fn is_finite(self) -> bool;
}

impl Field for f64 {
    fn of(value: f64) -> f64 {
        value
    }
    fn conj(self) -> f64 {
        self
    }
    fn re(self) -> f64 {
        self
    }
    fn norm_sqr(self) -> f64 {
        self * self
    }
    fn is_finite(self) -> bool {
        f64::is_finite(self)
    }
}

impl Field for Complex64 {
    fn of(value: f64) -> Complex64 {
        Complex64::new(value, 0.0)
    }
    fn conj(self) -> Complex64 {
        Complex64::new(self.re, -self.im)
    }
    fn re(self) -> f64 {
        self.re
    }
    fn norm_sqr(self) -> f64 {
        self.re * self.re + self.im * self.im
    }
    fn is_finite(self) -> bool {
        self.re.is_finite() && self.im.is_finite()
    }
}

/// Σ conj(a) · b
pub(crate) fn dot<T: Field>(a: &[T], b: &[T]) -> T {
    a.iter().zip(b).fold(T::of(0.0), |sum, (&x, &y)| sum + x.conj() * y)
}

pub(crate) fn norm_sqr<T: Field>(a: &[T]) -> f64 {
    a.iter().map(|x| x.norm_sqr()).sum()
}

/// A reflection I − τ v vᴴ whose adjoint takes `x` to (β, 0, …), as LAPACK's `larfg`: β and τ; `x` becomes
/// v, whose first element is 1. None if `x` is (β, 0, …) already.
pub(crate) fn reflection<T: Field>(x: &mut [T]) -> Option<(f64, T)> {
    let alpha = x[0];
    let tail = norm_sqr(&x[1..]);
    if tail == 0.0 && alpha.norm_sqr() == alpha.re() * alpha.re() {
        return None;
    }
    let beta = -(alpha.norm_sqr() + tail).sqrt().copysign(alpha.re());
    let tau = (T::of(beta) - alpha) * (1.0 / beta);
    let difference = alpha - T::of(beta);
    let inverse = difference.conj() * (1.0 / difference.norm_sqr());
    x.iter_mut().for_each(|value| *value = *value * inverse);
    x[0] = T::of(1.0);
    Some((beta, tau))
}
