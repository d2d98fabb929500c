//! Fourier transforms by their sums.

use num_complex::Complex64;

use super::dense::Dense;
use crate::Result;
use crate::backend::{Operand, Step};
use crate::ops::fft::{FftKind, FftSpec};

use super::complex::part_of;

pub(super) fn run(spec: &FftSpec, step: &Step) -> Result<()> {
    let (x, out) = (step.inputs[0].host()?, step.outputs[0].host()?);
    let real_input = spec.kind == FftKind::RealForward;
    let re = Dense::load(&Operand::Host(if real_input { x.clone() } else { part_of(x, 0) }))?;
    let im = if real_input { None } else { Some(Dense::load(&Operand::Host(part_of(x, 1)))?) };
    let (have, gives) = (x.shape[spec.axis], out.shape[spec.axis]);
    let length = if spec.kind == FftKind::RealBackward { gives } else { have };
    let inner: usize = x.shape[spec.axis + 1..].iter().product();
    let lines: usize = x.shape.iter().product::<usize>() / have.max(1);
    let sign = if matches!(spec.kind, FftKind::Forward | FftKind::RealForward) { -1.0 } else { 1.0 };
    let turn = |j: usize, k: usize| {
        let angle = sign * std::f64::consts::TAU * ((j * k) % length) as f64 / length as f64;
        Complex64::from_polar(1.0, angle)
    };
    let mut values = vec![Complex64::ZERO; lines * gives];
    for line in 0..lines {
        let (outer, inside) = (line / inner, line % inner);
        let at = |j: usize| {
            let place = (outer * have + j) * inner + inside;
            Complex64::new(re.at(place), im.as_ref().map_or(0.0, |im| im.at(place)))
        };
        for k in 0..gives {
            let sum: Complex64 = if spec.kind == FftKind::RealBackward {
                // The other half of the spectrum is this one's conjugate.
                (0..length)
                    .map(|j| if j < have { at(j) } else { at(length - j).conj() } * turn(j, k))
                    .map(|term| Complex64::new(term.re, 0.0))
                    .sum()
            } else {
                (0..length).map(|j| at(j) * turn(j, k)).sum()
            };
            values[(outer * gives + k) * inner + inside] = sum * spec.scale as f64;
        }
    }
    let part = |part: fn(&Complex64) -> f64| Dense::floats(&out.shape, values.iter().map(part).collect());
    if spec.kind == FftKind::RealBackward {
        return part(|z| z.re).store(out);
    }
    part(|z| z.re).store(&part_of(out, 0))?;
    part(|z| z.im).store(&part_of(out, 1))
}
