//! Decompositions, by `mica-linalg` in f64.

use mica_linalg::{Complex64, Failure, direct, spectral};

use super::complex::part_of;
use super::dense::Dense;
use crate::backend::{HostView, Operand, Step};
use crate::op::LinalgOp;
use crate::shape::size_of;
use crate::{Dtype, Error, Result};

/// How many matrices a step decomposes.
pub(in crate::backend) fn count(step: &Step) -> usize {
    step.inputs[0].host().map_or(0, |view| size_of(&view.shape[..view.shape.len() - 2]))
}

pub(super) fn run(op: LinalgOp, step: &Step) -> Result<()> {
    (0..count(step)).try_for_each(|at| run_one(op, step, at))
}

/// One matrix of a batch.
pub(in crate::backend) fn run_one(op: LinalgOp, step: &Step, at: usize) -> Result<()> {
    let x = step.inputs[0].host()?;
    let rank = x.shape.len();
    let (m, n) = (x.shape[rank - 2], x.shape[rank - 1]);
    let entry = |view: &HostView, kept: usize| entry_of(view, kept, at);
    let real = || Dense::load(&Operand::Host(entry(x, 2))).map(|dense| dense.to_f64());
    let complex = || -> Result<Vec<Complex64>> {
        let x = entry(x, 2);
        if x.dtype != Dtype::C64 {
            return Ok(Dense::load(&Operand::Host(x))?.to_f64().into_iter().map(Complex64::from).collect());
        }
        let part = |part| Dense::load(&Operand::Host(part_of(&x, part))).map(|dense| dense.to_f64());
        Ok(part(0)?.into_iter().zip(part(1)?).map(|(re, im)| Complex64::new(re, im)).collect())
    };
    let fail = |failure: Failure| Error::invalid(op.name(), failure.to_string());
    let put = |output: usize, kept: usize, values: Vec<f64>| match &step.outputs[output] {
        Operand::Host(view) => {
            let view = entry(view, kept);
            Dense::floats(&view.shape.clone(), values).store(&view)
        }
        _ => Ok(()),
    };
    let put_complex = |output: usize, kept: usize, values: Vec<Complex64>| match &step.outputs[output] {
        Operand::Host(view) => {
            let view = entry(view, kept);
            for (part, pick) in [|z: &Complex64| z.re, |z: &Complex64| z.im].into_iter().enumerate() {
                Dense::floats(&view.shape, values.iter().map(pick).collect()).store(&part_of(&view, part))?;
            }
            Ok(())
        }
        _ => Ok(()),
    };
    match op {
        LinalgOp::Qr => {
            let (q, r) = direct::qr(&real()?, m, n);
            put(0, 2, q)?;
            put(1, 2, r)
        }
        LinalgOp::Inverse => put(0, 2, direct::inverse(&real()?, n).map_err(fail)?),
        LinalgOp::TriangularInverse { upper } => {
            put(0, 2, direct::triangular_inverse(&real()?, n, upper).map_err(fail)?)
        }
        LinalgOp::Cholesky { upper } => put(0, 2, direct::cholesky(&real()?, n, upper).map_err(fail)?),
        LinalgOp::Lu => {
            let lu = direct::lu(&real()?, m, n);
            let mut inverse = vec![0.0; m];
            lu.order.iter().enumerate().for_each(|(row, &from)| inverse[from as usize] = row as f64);
            put(0, 2, lu.packed)?;
            put(1, 1, lu.pivots.into_iter().map(f64::from).collect())?;
            put(2, 1, lu.order.into_iter().map(f64::from).collect())?;
            put(3, 1, inverse)
        }
        LinalgOp::Determinant => {
            let lu = direct::lu(&real()?, n, n);
            let diagonal = || (0..n).map(|i| lu.packed[i * n + i]);
            let parity = if lu.swaps % 2 == 1 { -1.0 } else { 1.0 };
            let sign = |x: f64| if x == 0.0 { 0.0 } else { x.signum() };
            put(0, 0, vec![diagonal().product::<f64>() * parity])?;
            put(1, 0, vec![diagonal().map(sign).product::<f64>() * parity])?;
            put(2, 0, vec![diagonal().map(|x| x.abs().ln()).sum()])
        }
        LinalgOp::Svd { vectors: false } => {
            let s = match x.dtype {
                Dtype::C64 => spectral::svd_complex(&complex()?, m, n).map(|svd| svd.s),
                _ => spectral::svd_real(&real()?, m, n).map(|svd| svd.s),
            };
            put(0, 1, s.map_err(fail)?)
        }
        LinalgOp::Svd { vectors: true } if x.dtype == Dtype::C64 => {
            let svd = spectral::svd_complex(&complex()?, m, n).map_err(fail)?;
            put_complex(0, 2, svd.u)?;
            put(1, 1, svd.s)?;
            put_complex(2, 2, svd.vt)
        }
        LinalgOp::Svd { vectors: true } => {
            let svd = spectral::svd_real(&real()?, m, n).map_err(fail)?;
            put(0, 2, svd.u)?;
            put(1, 1, svd.s)?;
            put(2, 2, svd.vt)
        }
        LinalgOp::Eigh { upper, vectors } if x.dtype == Dtype::C64 => {
            let eigen = spectral::eigh_complex(&complex()?, n, upper).map_err(fail)?;
            put(0, 1, eigen.values)?;
            if vectors { put_complex(1, 2, eigen.vectors) } else { Ok(()) }
        }
        LinalgOp::Eigh { upper, vectors } => {
            let eigen = spectral::eigh_real(&real()?, n, upper).map_err(fail)?;
            put(0, 1, eigen.values)?;
            if vectors { put(1, 2, eigen.vectors) } else { Ok(()) }
        }
        LinalgOp::Eig { vectors } => {
            let eigen = spectral::eig(&complex()?, n).map_err(fail)?;
            put_complex(0, 1, eigen.values)?;
            if vectors { put_complex(1, 2, eigen.vectors) } else { Ok(()) }
        }
    }
}

/// Entry `at` of a batch of arrays of the last `kept` dimensions.
fn entry_of(view: &HostView, kept: usize, at: usize) -> HostView {
    let lead = view.shape.len() - kept;
    let index = super::dense::unravel(at, &view.shape[..lead]);
    let offset: isize = index.iter().zip(&view.strides).map(|(&i, &stride)| i as isize * stride).sum();
    HostView {
        pointer: view.pointer.wrapping_offset(offset * view.dtype.size() as isize),
        shape: view.shape[lead..].into(),
        strides: view.strides[lead..].into(),
        dtype: view.dtype,
    }
}
