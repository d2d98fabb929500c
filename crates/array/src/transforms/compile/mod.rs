//! `compile`: a function recorded once, simplified, and run with its elementwise ops fused.
//!
//! The stages, each a file: the function is traced ([`TracedGraph`]), `simplify` rewrites the
//! graph, `fuse` makes regions of elementwise ops ([`Op::Fused`]), and `cache` keeps the result by
//! the signature of the inputs. A call with a known signature builds the recorded graph on its
//! arguments; the closure does not run.
//!
//! What is recorded is a graph of ordinary nodes, so everything that works on nodes works on a
//! compiled function: gradients, checkpoints, evaluation with donation, compiling around it.

mod cache;
mod constant;
mod fuse;
mod region;
mod simplify;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use smallvec::SmallVec;

use super::TracedGraph;
use crate::op::{Op, first_failure};
use crate::{Array, Dtype, Error, Result, Shape};
use cache::Cache;

pub use region::Region;

/// Signatures that a compiled function keeps. A function that is called with ever new shapes is
/// traced again for each; this bounds what it holds.
const SIGNATURES: usize = 64;

/// A function from arrays to arrays that is traced once per signature: the shapes and dtypes of
/// its inputs.
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
    plans: Cache<Signature, Plan>,
    disabled: bool,
    warned: AtomicBool,
}

/// What a plan depends on.
type Signature = SmallVec<[(Shape, Dtype); 3]>;

#[derive(Clone)]
enum Plan {
    Graph(Arc<TracedGraph>),
    /// The function can't be recorded: its closure runs at every call.
    Eager,
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
    let disabled = std::env::var_os("MICA_DISABLE_COMPILE").is_some_and(|value| !value.is_empty() && value != "0");
    Compiled { f, plans: Cache::new(SIGNATURES), disabled, warned: AtomicBool::new(false) }
}

impl<F> Compiled<F>
where
    F: Fn(&[Array]) -> Result<Vec<Array>>,
{
    /// The outputs of the function, as lazy arrays.
    ///
    /// # Errors
    /// Those of the closure. A function that is fine but can't be recorded runs as its closure
    /// does, with a warning.
    pub fn call(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        if self.disabled {
            return (self.f)(inputs);
        }
        first_failure(&inputs.iter().collect::<SmallVec<[&Array; 4]>>())?;
        let signature = inputs.iter().map(|input| (input.shape().into(), input.dtype())).collect();
        match self.plans.get_or_make(signature, || self.plan(inputs))? {
            Plan::Graph(graph) => Ok(graph.build(inputs, graph.captured())),
            Plan::Eager => (self.f)(inputs),
        }
    }

    /// How many signatures there are plans for.
    pub fn signatures(&self) -> usize {
        self.plans.len()
    }

    fn plan(&self, inputs: &[Array]) -> Result<Plan> {
        let graph = TracedGraph::trace(&self.f, inputs)?;
        match recordable(&graph).and_then(|()| optimize(graph)) {
            Ok(graph) => Ok(Plan::Graph(Arc::new(graph))),
            Err(error) => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    eprintln!("mica: a function runs uncompiled: {error}");
                }
                Ok(Plan::Eager)
            }
        }
    }
}

impl<F> fmt::Debug for Compiled<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").field("disabled", &self.disabled).finish_non_exhaustive()
    }
}

/// Fails if playing the graph again would not do what the function does.
fn recordable(graph: &TracedGraph) -> Result<()> {
    match graph.nodes.iter().find(|node| matches!(node.op, Op::PagedAttention(_))) {
        // Its op names the pages of one call.
        Some(node) => Err(Error::unsupported(
            "compile",
            format!("{} changes a store and can't be played again: call it outside", node.op.name()),
        )),
        None => Ok(()),
    }
}

/// The graph of the same function, to be run in fewer passes.
fn optimize(graph: TracedGraph) -> Result<TracedGraph> {
    fuse::fuse(&simplify::simplify(graph))
}

fn is_elementwise(op: &Op) -> bool {
    matches!(op, Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select | Op::Cast | Op::StopGradient)
}
