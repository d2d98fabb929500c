//! Numbers with a name.

pub use std::f64::consts::{E, PI};

/// ∞.
pub const INF: f64 = f64::INFINITY;
/// Not a number.
pub const NAN: f64 = f64::NAN;
/// lim (Σ 1/k − ln n), the constant of Euler and Mascheroni.
pub const EULER_GAMMA: f64 = 0.577_215_664_901_532_9;
