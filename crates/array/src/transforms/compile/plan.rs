//! Which recorded graph serves a call, and building it on the call's arguments.

use std::hash::Hash;
use std::sync::Arc;

use smallvec::SmallVec;

use super::cache::Cache;
use super::shapes;
use crate::transforms::TracedGraph;
use crate::{Array, Dtype, Result, Shape};

/// Recorded graphs by signature. `E` is what else they depend on.
pub(super) struct Plans<E> {
    cache: Cache<Key<E>, Plan>,
}

/// A function as a graph.
pub(super) struct Recorded {
    pub(super) simplified: TracedGraph,
    pub(super) fused: TracedGraph,
}

#[derive(Clone)]
enum Plan {
    Graph(Arc<TracedGraph>),
    /// As [`Plan::Graph`], for all shapes of its pattern.
    AnyShape(Arc<TracedGraph>),
    /// Stands for a pattern of which each shape needs a graph of its own.
    EachShape,
    /// There is no graph: the caller runs the function itself.
    Eager,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key<E> {
    is_pattern: bool,
    inputs: SmallVec<[(Shape, Dtype); 3]>,
    extra: E,
}

impl<E: Clone + Eq + Hash> Plans<E> {
    pub(super) fn new(bound: usize) -> Plans<E> {
        Plans { cache: Cache::new(bound) }
    }

    pub(super) fn len(&self) -> usize {
        self.cache.len()
    }

    /// The outputs on these inputs, from a graph that `record` makes if there is none; nothing if
    /// it makes none. A graph of which `any_shape` holds may serve other sizes than it was
    /// recorded with.
    pub(super) fn build(
        &self,
        inputs: &[Array],
        extra: E,
        any_shape: Option<&dyn Fn(&TracedGraph) -> bool>,
        record: impl Fn() -> Result<Option<Recorded>>,
    ) -> Result<Option<Vec<Array>>> {
        let exact = |extra: E| Key {
            is_pattern: false,
            inputs: inputs.iter().map(|input| (input.shape().into(), input.dtype())).collect(),
            extra,
        };
        let plan = |recorded: Option<Recorded>| match recorded {
            Some(recorded) => Plan::Graph(Arc::new(recorded.fused)),
            None => Plan::Eager,
        };
        let mut found = Plan::EachShape;
        if let Some(any_shape) = any_shape {
            // Whether sizes matter is found out by recording; that graph is not thrown away.
            let mut kept = None;
            let key = Key { is_pattern: true, inputs: pattern(inputs), extra: extra.clone() };
            found = self.cache.get_or_make(key, || -> Result<Plan> {
                let recorded = record()?;
                let serves_all =
                    |recorded: &Recorded| shapes::is_any(&recorded.fused) && any_shape(&recorded.simplified);
                if recorded.as_ref().is_some_and(serves_all) {
                    let fused = recorded.expect("it serves all sizes").fused;
                    return Ok(Plan::AnyShape(Arc::new(fused)));
                }
                kept = Some(plan(recorded));
                Ok(Plan::EachShape)
            })?;
            if let Some(kept) = kept {
                found = self.cache.get_or_make(exact(extra.clone()), || Ok::<_, crate::Error>(kept))?;
            }
        }
        if matches!(found, Plan::EachShape) {
            found = self.cache.get_or_make(exact(extra), || record().map(plan))?;
        }
        match found {
            Plan::Graph(graph) => Ok(Some(graph.build(inputs, graph.captured()))),
            Plan::AnyShape(graph) => graph
                .build_with(inputs, graph.captured(), |node, inputs| {
                    let shapes: SmallVec<[&[usize]; 4]> = inputs.iter().map(Array::shape).collect();
                    shapes::infer(&node.op, &shapes).map(Some)
                })
                .map(Some),
            Plan::Eager | Plan::EachShape => Ok(None),
        }
    }
}

/// Lazy arrays like these with other sizes: equal ones stay equal, different ones different, ones
/// one.
pub(super) fn resized(inputs: &[Array]) -> Vec<Array> {
    let size = |&size: &usize| if size == 1 { 1 } else { 2 * size + 3 };
    let shape = |input: &Array| input.shape().iter().map(size).collect::<Shape>();
    inputs.iter().map(|input| Array::zeros(&shape(input), input.dtype())).collect()
}

/// The shapes with each size replaced by the number of the first equal one: functions that do not
/// look at sizes do the same on all shapes with one pattern. A size of one is its own, since it
/// broadcasts.
fn pattern(inputs: &[Array]) -> SmallVec<[(Shape, Dtype); 3]> {
    let mut sizes: SmallVec<[usize; 16]> = smallvec::smallvec![1];
    let mut number = |&size: &usize| {
        sizes.iter().position(|&known| known == size).unwrap_or_else(|| {
            sizes.push(size);
            sizes.len() - 1
        })
    };
    inputs.iter().map(|input| (input.shape().iter().map(&mut number).collect(), input.dtype())).collect()
}
