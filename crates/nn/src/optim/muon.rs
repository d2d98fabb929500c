//! Muon (Jordan et al. 2024): the momentum of a matrix, made orthogonal.

use mica_array::{Array, Result};

use super::rules::{get, mix, needs_rate, put};
use super::{At, Rate, Rule, Slots};

/// Settings, with MLX's defaults. Vectors take the momentum as it is: give them another rule with
/// [`MultiOptimizer`](super::MultiOptimizer).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    /// Decay of the mean of gradients.
    pub momentum: f64,
    /// Multiplies the parameter and is added to the gradient.
    pub weight_decay: f64,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
    /// Newton-Schulz iterations.
    pub ns_steps: usize,
}

impl Default for Muon {
    fn default() -> Muon {
        Muon { momentum: 0.95, weight_decay: 0.01, nesterov: true, ns_steps: 5 }
    }
}

impl Muon {
    /// A matrix with singular values near 1: a quintic iteration from one of norm 1.
    fn orthogonal(&self, matrix: &Array) -> Result<Array> {
        const A: f64 = 3.4445;
        const B: f64 = -4.7750;
        const C: f64 = 2.0315;
        let tall = matrix.dim(0) > matrix.dim(1);
        let wide = |x: &Array| if tall { x.transpose(&[]) } else { Ok(x.clone()) };
        let mut x = wide(matrix)?;
        x = x.divide(x.square()?.sum(&[], true)?.sqrt()?.add(1e-7)?)?;
        for _ in 0..self.ns_steps {
            let a = x.matmul(&x.transpose(&[])?)?;
            let b = a.multiply(B)?.add(a.matmul(&a)?.multiply(C)?)?;
            x = x.multiply(A)?.add(b.matmul(&x)?)?;
        }
        wide(&x)
    }
}

impl Rule for Muon {
    fn check(&self, rate: &Rate) -> Result<()> {
        needs_rate("Muon", rate)
    }

    fn start(&self, parameter: &Array) -> Slots {
        super::rules::zeros(parameter, ["v"])
    }

    fn step(&self, at: At, gradient: &Array, parameter: &Array, slots: &mut Slots) -> Result<Array> {
        let gradient = match self.weight_decay {
            0.0 => gradient.clone(),
            decay => gradient.add(parameter.multiply(decay)?)?,
        };
        let v = mix(self.momentum, &get(slots, "v", parameter), &gradient)?;
        put(slots, "v", &v);
        let update = if self.nesterov { mix(self.momentum, &v, &gradient)? } else { v };
        if update.rank() < 2 {
            return parameter.subtract(update.multiply(at.rate)?);
        }
        let shape: Vec<i64> = update.shape().iter().map(|&size| size as i64).collect();
        let (rows, columns) = (update.dim(-2) as f64, update.dim(-1) as f64);
        let flat = update.reshape(&[shape[0], -1])?;
        let update = self.orthogonal(&flat)?.reshape(&shape)?;
        parameter.subtract(update.multiply(at.rate * (rows / columns).max(1.0).sqrt())?)
    }
}
