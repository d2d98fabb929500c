//! CPU kernels over checked views.
//!
//! A kernel is a struct that implements [`mica_threads::Task`]. Its constructor takes
//! [`View`]s, checks every size, and fails with a [`KernelError`]; after that running it cannot
//! go out of bounds. Kernels know no graph and no Array, draw nothing and allocate nothing but
//! scratch and the memory of packed weights. Each says which inputs may alias its output.
//!
//! The numeric contract is docs/NUMERICS.md: every reduction has one order,
//! however the work was cut, a row's result does not depend on its neighbours.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod conv;
pub mod copy;
pub mod cross_entropy;
pub mod dtype;
pub mod element;
pub mod elementwise;
mod error;
pub mod gemm;
pub mod index;
mod layout;
mod memory;
pub mod norm;
pub mod optimizer;
pub mod patches;
mod pieces;
mod plan;
pub mod program;
pub mod quant;
pub mod random;
pub mod reduce;
pub mod rope;
mod routing;
mod rows;
pub mod scan;
pub mod sort;
#[cfg(test)]
mod testing;
pub mod view;

pub use dtype::{Dtype, DynView, DynViewMut};
pub use error::KernelError;
pub use pieces::in_pieces;
pub use plan::Plan;
pub use view::{View, ViewMut};
