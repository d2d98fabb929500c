//! Discrete Fourier transforms, as `mlx.core.fft` has them.
//!
//! The primitive transforms one axis and multiplies by a number; transforms of several axes, padding
//! and normalization are made of it. Everything is complex64 or float32.

use smallvec::smallvec;

pub use super::stft::{PadMode, Stft, istft, stft};
use super::{Grads, Vjp};
use crate::op::{Op, first_failure};
use crate::shape::{Shape, normalize_axis};
use crate::{Array, Dtype, Error, Result};

/// One transform along one axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FftSpec {
    /// What is transformed into what.
    pub kind: FftKind,
    /// Along which axis.
    pub axis: usize,
    /// Every result is multiplied by this.
    pub scale: f32,
}

/// Which transform, before its scale. `n` is the length of the signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FftKind {
    /// X\[k\] = Σ x\[j\] e^(−2πi jk / n), complex.
    Forward,
    /// x\[j\] = Σ X\[k\] e^(+2πi jk / n), complex.
    Backward,
    /// The first ⌊n/2⌋ + 1 results of [`FftKind::Forward`] of real numbers.
    RealForward,
    /// [`FftKind::Backward`] of a spectrum of real numbers, given as its first ⌊n/2⌋ + 1 values. The
    /// imaginary parts of the first, and of the last if n is even, do not count.
    RealBackward,
}

/// Where the factor 1/n stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Norm {
    /// On the inverse.
    #[default]
    Backward,
    /// Its root, on both.
    Ortho,
    /// On the forward transform.
    Forward,
}

impl FftSpec {
    /// The name in messages and profiles.
    pub fn name(&self) -> &'static str {
        match self.kind {
            FftKind::Forward => "fft",
            FftKind::Backward => "ifft",
            FftKind::RealForward => "rfft",
            FftKind::RealBackward => "irfft",
        }
    }
}

impl std::str::FromStr for Norm {
    type Err = Error;

    fn from_str(name: &str) -> Result<Norm> {
        Ok(match name {
            "backward" => Norm::Backward,
            "ortho" => Norm::Ortho,
            "forward" => Norm::Forward,
            other => {
                return Err(Error::invalid(
                    "fft",
                    format!("norm should be \"backward\", \"ortho\" or \"forward\", got {other:?}"),
                ));
            }
        })
    }
}

impl Norm {
    fn scale(self, n: usize, inverse: bool) -> f32 {
        let n = n as f64;
        (match (self, inverse) {
            (Norm::Ortho, _) => 1.0 / n.sqrt(),
            (Norm::Backward, true) | (Norm::Forward, false) => 1.0 / n,
            _ => 1.0,
        }) as f32
    }
}

fn transform(x: &Array, kind: FftKind, axis: usize, n: usize, norm: Norm) -> Result<Array> {
    let inverse = matches!(kind, FftKind::Backward | FftKind::RealBackward);
    raw(x, FftSpec { kind, axis, scale: norm.scale(n, inverse) }, n)
}

/// The node; `x` has its right dtype and length along the axis.
pub(crate) fn raw(x: &Array, spec: FftSpec, n: usize) -> Result<Array> {
    let mut shape: Shape = x.shape().into();
    let dtype = if spec.kind == FftKind::RealBackward { Dtype::F32 } else { Dtype::C64 };
    shape[spec.axis] = if spec.kind == FftKind::RealForward { n / 2 + 1 } else { n };
    Ok(Array::lazy(Op::Fft(spec), smallvec![x.clone()], shape, dtype))
}

/// The first `n` along an axis, zeros where there are fewer.
fn resize(x: &Array, axis: usize, n: usize) -> Result<Array> {
    let have = x.shape()[axis];
    if have >= n {
        return x.narrow(axis as i32, 0, n);
    }
    let mut rest: Shape = x.shape().into();
    rest[axis] = n - have;
    Array::concatenate(&[x.clone(), Array::zeros(&rest, x.dtype())], axis as i32)
}

/// Which axes, and how long each signal is.
fn plan(
    name: &'static str,
    x: &Array,
    sizes: Option<&[usize]>,
    axes: Option<&[i32]>,
    real_inverse: bool,
) -> Result<(Vec<usize>, Vec<usize>)> {
    first_failure(&[x])?;
    if x.rank() == 0 {
        return Err(Error::invalid(name, "needs at least one dimension"));
    }
    let axes: Vec<usize> = match (axes, sizes) {
        (Some(axes), _) => {
            axes.iter().map(|&axis| normalize_axis(name, axis, x.rank())).collect::<Result<_>>()?
        }
        (None, Some(sizes)) => {
            return Err(Error::invalid(
                name,
                format!("sizes {sizes:?} need axes: MLX refuses to guess them"),
            ));
        }
        (None, None) => (0..x.rank()).collect(),
    };
    if axes.is_empty() {
        return Err(Error::invalid(name, "needs at least one axis"));
    }
    let sizes: Vec<usize> = match sizes {
        Some(sizes) => sizes.to_vec(),
        None => {
            let mut sizes: Vec<usize> = axes.iter().map(|&axis| x.shape()[axis]).collect();
            if let (true, Some(last)) = (real_inverse, sizes.last_mut()) {
                *last = 2 * last.saturating_sub(1);
            }
            sizes
        }
    };
    if sizes.len() != axes.len() {
        return Err(Error::invalid(name, format!("{} sizes for {} axes", sizes.len(), axes.len())));
    }
    let mut seen = axes.clone();
    seen.sort_unstable();
    if seen.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid(name, format!("axes {axes:?} name a dimension twice")));
    }
    if let Some(at) = sizes.iter().position(|&size| size == 0) {
        return Err(Error::invalid(name, format!("a signal of length 0 along axis {}", axes[at])));
    }
    Ok((axes, sizes))
}

/// Transforms of several axes; what is real is so along the last of them.
fn several(
    name: &'static str,
    kind: FftKind,
    a: &Array,
    s: Option<&[usize]>,
    axes: Option<&[i32]>,
    norm: Norm,
) -> Result<Array> {
    use FftKind::{Backward, Forward, RealBackward, RealForward};
    let (axes, sizes) = plan(name, a, s, axes, kind == RealBackward)?;
    let last = axes.len() - 1;
    let mut order: Vec<usize> = (0..=last).rev().collect();
    // Real numbers come out of the last step, and go into the first.
    if kind == RealBackward {
        order.reverse();
    }
    let mut x = a.astype(if kind == RealForward { Dtype::F32 } else { Dtype::C64 })?;
    for at in order {
        let (axis, n) = (axes[at], sizes[at]);
        let kind = match kind {
            RealForward if at != last => Forward,
            RealBackward if at != last => Backward,
            kind => kind,
        };
        let length = if kind == RealBackward { n / 2 + 1 } else { n };
        x = transform(&resize(&x, axis, length)?, kind, axis, n, norm)?;
    }
    Ok(x)
}

macro_rules! transforms {
    ($($(#[$doc:meta])* $one:ident $two:ident $many:ident: |$name:ident, $a:ident, $s:ident, $axes:ident, $norm:ident| $body:expr;)*) => { $(
        $(#[$doc])*
        ///
        /// `n` is the signal's length: shorter arrays are padded with zeros, longer ones cut.
        pub fn $one($a: &Array, n: Option<usize>, axis: i32, $norm: Norm) -> Result<Array> {
            let ($name, $s, $axes) = (stringify!($one), n.as_ref().map(std::slice::from_ref), Some(&[axis][..]));
            $body
        }

        #[doc = concat!("[`", stringify!($one), "`] over two axes; the last two if none are named.")]
        pub fn $two($a: &Array, $s: Option<&[usize]>, axes: Option<&[i32]>, $norm: Norm) -> Result<Array> {
            let ($name, $axes) = (stringify!($two), axes.or(Some(&[-2, -1])));
            $body
        }

        #[doc = concat!("[`", stringify!($one), "`] over several axes; all if none are named. Sizes need axes.")]
        pub fn $many($a: &Array, $s: Option<&[usize]>, $axes: Option<&[i32]>, $norm: Norm) -> Result<Array> {
            let $name = stringify!($many);
            $body
        }
    )* };
}
transforms! {
    /// The Fourier transform along an axis.
    fft fft2 fftn: |name, a, s, axes, norm| several(name, FftKind::Forward, a, s, axes, norm);
    /// The inverse of [`fft`].
    ifft ifft2 ifftn: |name, a, s, axes, norm| several(name, FftKind::Backward, a, s, axes, norm);
    /// The transform of real numbers: n/2 + 1 complex ones along the (last) axis. Complex input is
    /// cast to its real part.
    rfft rfft2 rfftn: |name, a, s, axes, norm| several(name, FftKind::RealForward, a, s, axes, norm);
    /// The inverse of [`rfft`]; n is 2 (size − 1) unless it is given.
    irfft irfft2 irfftn: |name, a, s, axes, norm| several(name, FftKind::RealBackward, a, s, axes, norm);
}

/// The frequencies of [`fft`]'s results for samples `d` apart: \[n\] f32.
pub fn fftfreq(n: usize, d: f64) -> Result<Array> {
    let step = 1.0 / (n as f64 * d);
    let half = n.div_ceil(2);
    let values: Vec<f32> = (0..n as i64)
        .map(|k| ((if k < half as i64 { k } else { k - n as i64 }) as f64 * step) as f32)
        .collect();
    Array::from_slice(&values, &[n])
}

/// The frequencies of [`rfft`]'s results for samples `d` apart: [n/2 + 1] f32.
pub fn rfftfreq(n: usize, d: f64) -> Result<Array> {
    let step = 1.0 / (n as f64 * d);
    let values: Vec<f32> = (0..=n / 2).map(|k| (k as f64 * step) as f32).collect();
    Array::from_slice(&values, &[n / 2 + 1])
}

fn shift(name: &'static str, a: &Array, axes: &[i32], by: impl Fn(usize) -> usize) -> Result<Array> {
    let axes = crate::shape::normalize_axes(name, axes, a.rank())?;
    let mut x = a.clone();
    for axis in axes {
        let size = x.shape()[axis];
        let by = by(size);
        if by == 0 || size == 0 {
            continue;
        }
        let parts = [x.narrow(axis as i32, size - by, size)?, x.narrow(axis as i32, 0, size - by)?];
        x = Array::concatenate(&parts, axis as i32)?;
    }
    Ok(x)
}

/// The zero frequency moved to the middle of these axes, or of all if none are named.
pub fn fftshift(a: &Array, axes: &[i32]) -> Result<Array> {
    shift("fftshift", a, axes, |size| size / 2)
}

/// The inverse of [`fftshift`].
pub fn ifftshift(a: &Array, axes: &[i32]) -> Result<Array> {
    shift("ifftshift", a, axes, |size| size.div_ceil(2) % size.max(1))
}

/// Adjoint transforms: e^(−…) becomes e^(+…), and what a half spectrum leaves out is counted.
pub(crate) fn fft_vjp(spec: &FftSpec, rule: &Vjp) -> Result<Grads> {
    let (x, ct) = (&rule.inputs[0], rule.cotangent());
    let n = x.shape()[spec.axis];
    let grad = match spec.kind {
        FftKind::Forward => raw(ct, FftSpec { kind: FftKind::Backward, ..*spec }, n)?,
        FftKind::Backward => raw(ct, FftSpec { kind: FftKind::Forward, ..*spec }, n)?,
        FftKind::RealForward => {
            raw(&resize(ct, spec.axis, n)?, FftSpec { kind: FftKind::Backward, ..*spec }, n)?.real()?
        }
        FftKind::RealBackward => {
            let length = ct.shape()[spec.axis];
            let half = raw(ct, FftSpec { kind: FftKind::RealForward, ..*spec }, length)?;
            let twice = |k: usize| k > 0 && 2 * k != length;
            let weights: Vec<f32> = (0..n).map(|k| if twice(k) { 2.0 } else { 1.0 }).collect();
            let mut shape = vec![1; x.rank()];
            shape[spec.axis] = n as i64;
            half.multiply(Array::from_slice(&weights, &[n])?.reshape(&shape)?)?
        }
    };
    rule.one(grad)
}
