//! `compile`: a function recorded once, simplified, and run with its elementwise ops fused.
//!
//! The stages, each a file: the function is traced ([`TracedGraph`]), `simplify` rewrites the
//! graph, `fuse` makes regions of elementwise ops ([`Op::Fused`]), and `plan` keeps the result by
//! the signature of the inputs. A call with a known signature builds the recorded graph on its
//! arguments; the closure does not run.
//!
//! What is recorded is a graph of ordinary nodes, so everything that works on nodes works on a
//! compiled function: gradients, checkpoints, evaluation with donation, compiling around it.

mod cache;
mod constant;
mod fuse;
pub(super) mod numbers;
mod plan;
mod region;
pub(super) mod shapes;
mod simplify;
pub(super) mod sizes;

use std::fmt;

use smallvec::SmallVec;

use super::TracedGraph;
use super::recorded::graph_inside;
use crate::op::{Op, first_failure};
use crate::{Array, Error, Result};
use plan::Plans;

pub use region::Region;

/// Signatures that a compiled function keeps. A function that is called with ever new shapes is
/// traced again for each; this bounds what it holds.
const SIGNATURES: usize = 64;

/// A function from arrays to arrays that is traced once per signature: the exact shapes and the
/// dtypes of its inputs. [`Compiled::shapeless`] lets one trace serve other sizes.
///
/// The closure runs only while it is traced. What it reads besides its inputs (numbers, other
/// arrays, the sizes of its inputs) is what it was at the first call with that signature; random
/// keys, and anything else that changes from call to call, must be inputs. While it is traced, its
/// inputs have no values: reading one is an error.
///
/// The results are those of the closure, bit for bit. Gradients through a compiled function are
/// those of its simplified graph, in which a shared subexpression adds its gradients up before
/// passing them on: they agree within rounding. Compiling a function that calls `grad` gives the
/// gradients of the closure, bit for bit. docs/NUMERICS.md says why.
///
/// The environment variable `MICA_DISABLE_COMPILE=1`, read when the function is compiled, makes
/// every call run the closure.
pub struct Compiled<F> {
    f: F,
    plans: Plans<()>,
    shapeless: bool,
    disabled: bool,
}

/// Compiles a function: see [`Compiled`]. Nothing is traced before the first call.
///
/// ```
/// use mica_array::{Array, transforms::compile};
///
/// let gelu = compile(|x| {
///     let x = &x[0];
///     Ok(vec![((x * std::f64::consts::FRAC_1_SQRT_2).erf()? + 1.0) * x * 0.5])
/// });
/// let x = Array::from_slice(&[-1.0f32, 0.0, 2.0], &[3])?;
/// let y = gelu.call(&[x])?; // one pass over memory
/// assert_eq!(y[0].to_vec::<f32>()?[1], 0.0);
/// # Ok::<(), mica_array::Error>(())
/// ```
pub fn compile<F>(f: F) -> Compiled<F>
where
    F: Fn(&[Array]) -> Result<Vec<Array>>,
{
    Compiled { f, plans: Plans::new(SIGNATURES), shapeless: false, disabled: is_compile_disabled() }
}

/// Whether the environment asks for graphs that are built at every call (`MICA_DISABLE_COMPILE=1`).
pub fn is_compile_disabled() -> bool {
    std::env::var_os("MICA_DISABLE_COMPILE").is_some_and(|value| !value.is_empty() && value != "0")
}

impl<F> Compiled<F>
where
    F: Fn(&[Array]) -> Result<Vec<Array>>,
{
    /// Lets one trace serve inputs of other sizes: only ranks, dtypes, which sizes are equal and
    /// which are zero or one make a signature. A batch of another size is then no reason to trace
    /// again.
    ///
    /// Where sizes get into the graph (a mean divides by one, a reshape names them) is found out at
    /// the first call, by tracing the function on several other sizes: what changes must be explained
    /// by formulas in the inputs' sizes. Sizes for which that fails, because a captured weight has
    /// them, say, stay part of the signature; so do all of them if the function makes another graph
    /// on other sizes. A function that decides by a size what to do must not be compiled this way.
    pub fn shapeless(self) -> Self {
        Compiled { shapeless: true, ..self }
    }

    /// The outputs of the function, as lazy arrays.
    ///
    /// # Errors
    /// Those of the closure, and if it appends to a KV store. A graph that can't be fused is no
    /// error: there is a warning, and the closure runs at every call.
    pub fn call(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        if self.disabled {
            return (self.f)(inputs);
        }
        first_failure(&inputs.iter().collect::<SmallVec<[&Array; 4]>>())?;
        let trace = |inputs: &[Array]| self.trace(inputs);
        match self.plans.build(inputs, (), self.shapeless, &trace)? {
            Some(outputs) => Ok(outputs),
            None => (self.f)(inputs),
        }
    }

    /// How many signatures there are plans for.
    pub fn signatures(&self) -> usize {
        self.plans.len()
    }

    fn trace(&self, inputs: &[Array]) -> Result<TracedGraph> {
        let graph = match self.shapeless {
            true => TracedGraph::trace_with_sizes(&self.f, inputs)?,
            false => TracedGraph::trace(&self.f, inputs)?,
        };
        refuse_effects(&graph)?;
        Ok(graph)
    }
}

impl<F> fmt::Debug for Compiled<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").field("disabled", &self.disabled).finish_non_exhaustive()
    }
}

/// Fails if the function changes something: playing its graph would do to the same place what was
/// done at the first call, and running the closure after its trace would do it twice.
fn refuse_effects(graph: &TracedGraph) -> Result<()> {
    graph.nodes.iter().try_for_each(|node| match &node.op {
        Op::PagedAttention(_) => Err(Error::unsupported(
            "compile",
            format!("{} appends to a store, so it can't be recorded: call it outside", node.op.name()),
        )),
        Op::Custom(custom) => graph_inside(custom.as_ref()).map_or(Ok(()), refuse_effects),
        _ => Ok(()),
    })
}

/// The graph of the same function with fewer ops, and without fused regions.
pub(crate) fn simplified(graph: TracedGraph) -> TracedGraph {
    simplify::simplify(graph)
}

fn is_elementwise(op: &Op) -> bool {
    matches!(op, Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select | Op::Cast | Op::StopGradient)
}
