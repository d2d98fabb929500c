//! The part of a graph between a function's inputs and its outputs: what transformations walk.

use std::collections::HashMap;

use crate::node::State;
use crate::op::Op;
use crate::{Array, Error, Result};

/// What a walk does at [`Op::StopGradient`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stops {
    /// Nothing behind it depends on anything: derivatives.
    Cut,
    /// It is an op like others.
    Pass,
}

/// The nodes between some arrays and the targets they depend on.
pub(crate) struct Dependents {
    /// The targets, then the others, inputs first.
    pub(crate) nodes: Vec<Array>,
    ids: HashMap<usize, bool>,
}

impl Dependents {
    pub(crate) fn contains(&self, id: usize) -> bool {
        self.ids.get(&id).copied().unwrap_or(false)
    }
}

/// What lies between `roots` and `targets`. Targets are not looked through.
pub(crate) fn dependents<'a>(
    roots: impl Iterator<Item = &'a Array>,
    targets: &[Array],
    stops: Stops,
) -> Dependents {
    let mut ids: HashMap<usize, bool> = targets.iter().map(|target| (target.id(), true)).collect();
    let mut nodes: Vec<Array> = targets.to_vec();
    let mut stack: Vec<(Array, usize)> = Vec::new();
    for root in roots {
        if ids.contains_key(&root.id()) {
            continue;
        }
        ids.insert(root.id(), false);
        stack.push((root.sibling(0), 0));
        while let Some((array, next)) = stack.last_mut() {
            let child = match &*array.node().state() {
                State::Lazy { op: Op::StopGradient, .. } if stops == Stops::Cut => None,
                State::Lazy { inputs, .. } => inputs.get(*next).cloned(),
                _ => None,
            };
            *next += 1;
            match child {
                Some(child) => {
                    if let Some(&depends) = ids.get(&child.id()) {
                        if depends {
                            let id = array.id();
                            ids.insert(id, true);
                        }
                    } else {
                        ids.insert(child.id(), false);
                        stack.push((child.sibling(0), 0));
                    }
                }
                None => {
                    let (array, _) = stack.pop().expect("the loop looks at the last one");
                    if ids[&array.id()] {
                        if let Some((parent, _)) = stack.last() {
                            ids.insert(parent.id(), true);
                        }
                        nodes.push(array);
                    }
                }
            }
        }
    }
    Dependents { nodes, ids }
}

/// The first error among these arrays: what a function returned and could not be built.
pub(crate) fn check_built(outputs: &[Array]) -> Result<()> {
    let failed = outputs.iter().find_map(|output| match &*output.node().state() {
        State::Failed(error) => Some(error.clone()),
        _ => None,
    });
    failed.map_or(Ok(()), Err::<(), Error>)
}
