//! Batches of fused regions. Single elementwise ops take a batch as they are.

use smallvec::{SmallVec, smallvec};

use crate::node::Inputs;
use crate::op::Op;
use crate::ops::Vmap;
use crate::shape::Shape;
use crate::storage::Spec;
use crate::transforms::{Mapped, Region};
use crate::{Array, Result};

/// Inputs of a region broadcast to one shape of as many dimensions as the outputs have: a batch must
/// stand before all of them.
pub(crate) fn fused(region: &std::sync::Arc<Region>, rule: &Vmap) -> Result<SmallVec<[Option<Mapped>; 1]>> {
    let node = rule.node.node();
    let rank = node.spec(0).shape.len();
    let inputs: Inputs = (0..rule.inputs.len())
        .map(|index| {
            let example = rule.example(index);
            if !rule.batched[index] || example.len() == rank {
                return Ok(rule.inputs[index].clone());
            }
            let mut shape: Shape = smallvec![rule.size];
            shape.extend(std::iter::repeat_n(1, rank - example.len()));
            shape.extend_from_slice(example);
            rule.inputs[index].reshape_to(&shape)
        })
        .collect::<Result<_>>()?;
    let specs: Vec<Spec> = (0..node.outputs())
        .map(|output| Spec::new(rule.with_batch(&node.spec(output).shape), node.spec(output).dtype))
        .collect();
    let op = Op::Fused(region.clone());
    let first = match specs.as_slice() {
        [spec] => Array::lazy(op, inputs, spec.shape.clone(), spec.dtype),
        _ => Array::lazy_many(op, inputs, specs),
    };
    Ok((0..node.outputs())
        .map(|output| {
            Some(Mapped { array: rule.wants(output).then(|| first.sibling(output))?, batched: true })
        })
        .collect())
}
