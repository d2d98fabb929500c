//! Products of complex matrices, in f64, and complex arrays as two real ones.

use num_complex::Complex64;

use super::dense::Dense;
use crate::backend::{HostView, Operand, Step};
use crate::op::Op;
use crate::shape::{Shape, size_of};
use crate::{Dtype, Result};

/// Whether a step is a product of complex matrices.
pub(super) fn takes(step: &Step) -> bool {
    matches!(step.op, Op::Matmul { .. })
        && matches!(&step.outputs[0], Operand::Host(view) if view.dtype == Dtype::C64)
}

pub(super) fn run(step: &Step) -> Result<()> {
    let input = |index: usize| Grid::load(step.inputs[index].host()?);
    let out = step.outputs[0].host()?;
    matmul(&input(0)?, &input(1)?, &out.shape).store(out)
}

/// Real (0) or imaginary (1) parts as f32.
pub(in crate::backend) fn part_of(view: &HostView, part: usize) -> HostView {
    HostView {
        pointer: view.pointer.wrapping_add(4 * part),
        shape: view.shape.clone(),
        strides: view.strides.iter().map(|stride| 2 * stride).collect(),
        dtype: Dtype::F32,
    }
}

/// A dense complex array.
struct Grid {
    shape: Shape,
    values: Vec<Complex64>,
}

impl Grid {
    fn load(view: &HostView) -> Result<Grid> {
        let part = |part| Dense::load(&Operand::Host(part_of(view, part)));
        let (re, im) = (part(0)?, part(1)?);
        let values = (0..re.size()).map(|i| Complex64::new(re.at(i), im.at(i))).collect();
        Ok(Grid { shape: view.shape.clone(), values })
    }

    fn store(&self, view: &HostView) -> Result<()> {
        let dense =
            |part: fn(&Complex64) -> f64| Dense::floats(&self.shape, self.values.iter().map(part).collect());
        dense(|z| z.re).store(&part_of(view, 0))?;
        dense(|z| z.im).store(&part_of(view, 1))
    }
}

fn matmul(a: &Grid, b: &Grid, shape: &[usize]) -> Grid {
    let rank = shape.len();
    let (m, n, k) = (shape[rank - 2], shape[rank - 1], a.shape[rank - 1]);
    let mut values = Vec::with_capacity(size_of(shape));
    for at in 0..size_of(shape) {
        let (batch, i, j) = (at / (m * n), at / n % m, at % n);
        let product = |p: usize| a.values[(batch * m + i) * k + p] * b.values[(batch * k + p) * n + j];
        values.push((0..k).map(product).sum());
    }
    Grid { shape: shape.into(), values }
}
