//! Looking at graphs without computing them.

use std::collections::HashSet;
use std::sync::Arc;

use crate::node::State;
use crate::storage::Storage;
use crate::{Array, Error, Result};

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

/// Bytes of the memory behind these arrays; a block that several of them see counts once.
///
/// # Errors
/// If one of them has not been evaluated.
pub fn buffer_bytes(arrays: &[Array]) -> Result<usize> {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for array in arrays {
        let storage = match &*array.node().state() {
            State::Ready(storage) => Some(storage[array.output()].clone()),
            State::Failed(error) => return Err(error.clone()),
            State::Lazy { .. } => None,
        };
        // Printing an array looks at its state, which is free again here.
        let Some(storage) = storage else {
            return Err(Error::invalid("buffer_bytes", format!("{array:?} must be evaluated first")));
        };
        let (block, size) = match &storage {
            Storage::Host(host) => (host.buffer.pointer() as usize, host.buffer.bytes()),
            Storage::Packed(weight) => (Arc::as_ptr(weight) as usize, weight.bytes()),
            Storage::Absent => continue,
        };
        if seen.insert(block) {
            bytes += size;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn shared_memory_counts_once() {
        let x = Array::arange(0.0, 1000.0, 1.0, Dtype::F32).unwrap();
        let view = x.narrow(0, 10, 20).unwrap();
        assert!(buffer_bytes(std::slice::from_ref(&view)).is_err());
        crate::eval(&[x.clone(), view.clone()]).unwrap();
        let one = buffer_bytes(std::slice::from_ref(&x)).unwrap();
        assert!(one >= 4000);
        assert_eq!(buffer_bytes(&[x, view]).unwrap(), one);
    }
}
