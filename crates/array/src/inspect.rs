//! Looking at graphs without computing them.

use std::collections::HashSet;

use crate::Array;
use crate::array::State;

/// The names of the ops that evaluating these arrays would run, inputs first. Views of other
/// arrays (transposes, broadcasts, slices …) are left out: nothing runs for them. Reshapes are
/// listed: they copy if they must.
pub fn pending_ops(arrays: &[Array]) -> Vec<&'static str> {
    let mut names = Vec::new();
    let mut seen = HashSet::new();
    // (node, next input to visit)
    let mut stack: Vec<(Array, usize)> = Vec::new();
    for root in arrays {
        if seen.insert(root.id()) {
            stack.push((root.clone(), 0));
        }
        while let Some((array, next)) = stack.last_mut() {
            let (child, name) = match &*array.node().state() {
                State::Lazy { op, inputs } => {
                    (inputs.get(*next).cloned(), (!op.is_view()).then(|| op.name()))
                }
                _ => (None, None),
            };
            *next += 1;
            match child {
                Some(child) if seen.insert(child.id()) => stack.push((child, 0)),
                Some(_) => {}
                None => {
                    names.extend(name);
                    stack.pop();
                }
            }
        }
    }
    names
}
