//! Fused ops for a batch of examples: where an op has a batch dimension of its own, the examples
//! are merged into it; where that can't be, the op's definition is mapped.

use smallvec::{SmallVec, smallvec};

use super::definition;
use crate::node::Inputs;
use crate::op::{AttentionSpec, ConvSpec, Op, RopeSpec};
use crate::ops::Vmap;
use crate::shape::Shape;
use crate::storage::Spec;
use crate::transforms::{Mapped, merged, unmerged};
use crate::{Array, Dtype, Result};

type Outputs = SmallVec<[Option<Mapped>; 1]>;

/// A norm's weight or bias [batch, width] against x [batch, .., width].
fn per_example(rule: &Vmap, input: usize) -> Result<Array> {
    let x = rule.node.shape();
    let mut shape: Shape = smallvec![1; x.len() + 1];
    let array = &rule.inputs[input];
    if rule.batched[input] {
        shape[0] = rule.size;
    }
    shape[x.len()] = array.dim(-1);
    array.reshape_to(&shape)?.astype(wide(rule.dtype()))
}

fn wide(dtype: Dtype) -> Dtype {
    if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 }
}

pub(crate) fn rms_norm(eps: f32, rule: &Vmap) -> Result<Array> {
    if !rule.batched[1] {
        return rule.build(Op::RmsNorm { eps }, rule.inputs.into());
    }
    let x = rule.full(0)?.astype(wide(rule.dtype()))?;
    let normed = x.rms_norm(&Array::ones(&[x.dim(-1)], x.dtype()), eps)?;
    normed.multiply(per_example(rule, 1)?)?.astype(rule.dtype())
}

pub(crate) fn layer_norm(eps: f32, rule: &Vmap) -> Result<Array> {
    if !rule.batched[1] && !rule.batched[2] {
        return rule.build(Op::LayerNorm { eps }, rule.inputs.into());
    }
    let x = rule.full(0)?.astype(wide(rule.dtype()))?;
    let width = [x.dim(-1)];
    let normed = x.layer_norm(&Array::ones(&width, x.dtype()), &Array::zeros(&width, x.dtype()), eps)?;
    normed.multiply(per_example(rule, 1)?)?.add(per_example(rule, 2)?)?.astype(rule.dtype())
}

/// The op on all inputs with the examples merged into their first dimension; so are its outputs.
fn with_merged(op: Op, inputs: Inputs, rule: &Vmap) -> Result<Outputs> {
    let node = rule.node.node();
    let specs: Vec<Spec> = (0..node.outputs())
        .map(|output| {
            let mut spec = node.spec(output).clone();
            spec.shape[0] *= rule.size;
            spec
        })
        .collect();
    let first = match specs.as_slice() {
        [spec] => Array::lazy(op, inputs, spec.shape.clone(), spec.dtype),
        _ => Array::lazy_many(op, inputs, specs),
    };
    (0..node.outputs())
        .map(|output| {
            if !rule.wants(output) {
                return Ok(None);
            }
            let array = unmerged(&first.sibling(output), rule.size, node.spec(output).shape[0])?;
            Ok(Some(Mapped { array, batched: true }))
        })
        .collect()
}

pub(crate) fn rope(spec: &RopeSpec, rule: &Vmap) -> Result<Outputs> {
    let op = Op::Rope(spec.clone());
    if rule.batched[2] {
        return definition::vmap(&op, rule);
    }
    let inputs = smallvec![merged(&rule.full(0)?)?, merged(&rule.full(1)?)?, rule.inputs[2].clone()];
    with_merged(op, inputs, rule)
}

pub(crate) fn attention(spec: &AttentionSpec, rule: &Vmap) -> Result<Outputs> {
    let inputs = rule.all()?.iter().map(merged).collect::<Result<_>>()?;
    with_merged(Op::Attention(spec.clone()), inputs, rule)
}

pub(crate) fn attention_vjp(spec: &AttentionSpec, rule: &Vmap) -> Result<Outputs> {
    let inputs = rule.all()?.iter().map(merged).collect::<Result<_>>()?;
    with_merged(Op::AttentionVjp(spec.clone()), inputs, rule)
}

pub(crate) fn short_conv(spec: ConvSpec, rule: &Vmap) -> Result<Outputs> {
    let op = Op::ShortConv(spec);
    if rule.batched[1] {
        return definition::vmap(&op, rule);
    }
    let merge =
        |input: usize| if input == 1 { Ok(rule.inputs[1].clone()) } else { merged(&rule.full(input)?) };
    let inputs = (0..rule.inputs.len()).map(merge).collect::<Result<_>>()?;
    with_merged(op, inputs, rule)
}

/// Elementwise, so a batch is more elements.
pub(crate) fn adamw(op: &Op, rule: &Vmap) -> Result<Outputs> {
    let node = rule.node.node();
    let specs: Vec<Spec> = (0..node.outputs())
        .map(|output| Spec::new(rule.with_batch(&node.spec(output).shape), node.spec(output).dtype))
        .collect();
    let first = Array::lazy_many(op.clone(), rule.all()?, specs);
    Ok((0..node.outputs())
        .map(|output| {
            Some(Mapped { array: rule.wants(output).then(|| first.sibling(output))?, batched: true })
        })
        .collect())
}
