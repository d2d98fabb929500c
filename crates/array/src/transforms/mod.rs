//! Function transformations: from closures over arrays to closures over arrays.
//!
//! All of them trace: they call the function on tracers, arrays whose values cannot be read, and
//! look at the graph that it built.

mod checkpoint;
mod compile;
mod graph;
mod vjp;

pub use checkpoint::checkpoint;
pub use compile::{Compiled, Region, compile};
pub use vjp::{Grads, grad, value_and_grad, value_and_grad_many, vjp};

pub(crate) use graph::TracedGraph;
