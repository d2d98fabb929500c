//! Which recorded graph serves a call, and building it on the call's arguments.

use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use smallvec::SmallVec;

use super::cache::Cache;
use super::sizes::{self, Symbols};
use super::{fuse, simplify};
use crate::transforms::TracedGraph;
use crate::{Array, Dtype, Result, Shape};

/// Recorded graphs by signature. `E` is what else they depend on.
pub(super) struct Plans<E> {
    graphs: Cache<Key<E>, Plan>,
    /// By pattern, which sizes a graph can leave open.
    free: Cache<Key<E>, SmallVec<[bool; 8]>>,
    warned: AtomicBool,
}

/// What a graph is kept under.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key<E> {
    /// The shapes themselves, or, with `open`, their pattern.
    inputs: SmallVec<[(Shape, Dtype); 3]>,
    /// The sizes behind the pattern's numbers; none where any will do.
    open: Option<SmallVec<[Option<usize>; 8]>>,
    extra: E,
}

#[derive(Clone)]
enum Plan {
    Graph(Arc<TracedGraph>),
    /// No graph serves all sizes of this pattern.
    EachShape,
    /// There is no graph: the caller runs the function itself.
    Eager,
}

impl<E: Clone + Eq + Hash> Plans<E> {
    pub(super) fn new(bound: usize) -> Plans<E> {
        Plans { graphs: Cache::new(bound), free: Cache::new(bound), warned: AtomicBool::new(false) }
    }

    pub(super) fn len(&self) -> usize {
        self.graphs.len()
    }

    /// The outputs on these inputs, from a graph that `trace` makes if there is none; nothing if it
    /// can't be fused. With `any_size`, a graph may serve other sizes than it was recorded with.
    pub(super) fn build(
        &self,
        inputs: &[Array],
        extra: E,
        any_size: bool,
        trace: &dyn Fn(&[Array]) -> Result<TracedGraph>,
    ) -> Result<Option<Vec<Array>>> {
        if any_size && let Some(outputs) = self.build_open(inputs, &extra, trace)? {
            return Ok(Some(outputs));
        }
        let shapes = inputs.iter().map(|input| (input.shape().into(), input.dtype())).collect();
        let key = Key { inputs: shapes, open: None, extra };
        match self
            .graphs
            .get_or_make(key, || trace(inputs).map(|graph| self.plan(simplify::simplify(graph))))?
        {
            Plan::Graph(graph) => Ok(Some(graph.build(inputs, graph.captured()))),
            Plan::EachShape | Plan::Eager => Ok(None),
        }
    }

    /// The outputs, from a graph that leaves some sizes open; nothing if there is none.
    fn build_open(
        &self,
        inputs: &[Array],
        extra: &E,
        trace: &dyn Fn(&[Array]) -> Result<TracedGraph>,
    ) -> Result<Option<Vec<Array>>> {
        // What is empty is often treated in another way.
        if inputs.iter().any(|input| input.size() == 0) {
            return Ok(None);
        }
        let symbols = Symbols::of(inputs);
        let simplified = |inputs: &[Array]| trace(inputs).map(simplify::simplify);
        // A function that does not take other sizes may say so in any way.
        let probe = |inputs: &[Array]| {
            let traced = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| simplified(inputs)));
            traced.ok().and_then(Result::ok)
        };
        // What is found while looking for the open sizes is not thrown away.
        let mut found = None;
        let pattern = |open| Key { inputs: symbols.pattern.clone(), open, extra: extra.clone() };
        let free = self.free.get_or_make(pattern(None), || -> Result<_> {
            let (free, graph) = sizes::free_symbols(&symbols, &simplified(inputs)?, &probe);
            found = graph;
            Ok(free)
        })?;
        if !free.contains(&true) {
            return Ok(None);
        }
        let fixed = free.iter().zip(&symbols.values).map(|(&free, &size)| (!free).then_some(size)).collect();
        let plan = self.graphs.get_or_make(pattern(Some(fixed)), || -> Result<Plan> {
            let graph = match found {
                Some(graph) => Some(graph),
                None => sizes::general(&symbols, &free, &simplified(inputs)?, &probe),
            };
            Ok(graph.map_or(Plan::EachShape, |graph| self.plan(graph)))
        })?;
        match plan {
            Plan::Graph(graph) => Ok(graph.build_for(inputs, graph.captured(), &symbols.values)),
            Plan::EachShape | Plan::Eager => Ok(None),
        }
    }

    /// A graph to be played in few passes; if it can't be, a warning.
    fn plan(&self, simplified: TracedGraph) -> Plan {
        match fuse::fuse(&simplified) {
            Ok(fused) => Plan::Graph(Arc::new(fused)),
            Err(error) => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    eprintln!("mica: a function runs uncompiled: {error}");
                }
                Plan::Eager
            }
        }
    }
}
