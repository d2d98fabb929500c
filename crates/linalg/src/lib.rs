//! Decompositions of dense matrices, over row-major slices of f64 or complex f64.
//!
//! Knows no array: the caller converts, and calls once per matrix. [`direct`] has decompositions that are
//! a finite number of steps, [`spectral`] those that iterate. A library such as `faer` would be faster on
//! matrices of thousands of rows, and takes longer to compile than the rest of mica's dependencies
//! together.

pub mod direct;
mod field;
pub mod spectral;

pub use num_complex::Complex64;

/// Why a decomposition does not exist, or was not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// A pivot is zero.
    #[error("the matrix is singular: pivot {0} is zero")]
    Singular(usize),
    /// A leading minor is not positive.
    #[error("the matrix is not positive definite: its leading minor of order {0} is not positive")]
    NotPositive(usize),
    /// The iteration has not converged, as happens with values that are not finite.
    #[error("the iteration does not converge: is every value finite?")]
    NoConvergence,
}
