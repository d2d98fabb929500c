//! Function transformations: from closures over arrays to closures over arrays.
//!
//! All of them trace: they call the function on tracers, arrays whose values cannot be read, and
//! look at the graph that it built.

mod checkpoint;
mod compile;
mod custom_function;
mod dependents;
mod graph;
mod jvp;
mod recorded;
mod vjp;
mod vmap;

pub use checkpoint::checkpoint;
pub use compile::{Compiled, Region, compile, is_compile_disabled};
pub use custom_function::{CustomFunction, custom_function};
pub use jvp::jvp;
pub use vjp::{Grads, grad, value_and_grad, value_and_grad_many, vjp};
pub use vmap::vmap;

pub(crate) use compile::simplified;
pub(crate) use graph::{Source, TracedGraph, Value};
pub(crate) use jvp::{forward_from, trace_from};
pub(crate) use vjp::backward;
pub(crate) use vmap::{Mapped, batch, merged, move_axis, unmerged};
