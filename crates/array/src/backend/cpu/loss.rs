//! The output head with its loss: logits exist for a few rows at a time.
//!
//! For each block of rows: logits = h · wᵀ; loss, and the logits' gradient in their own place;
//! dh = dlogits · w; dw += dlogitsᵀ · h. Rows do not depend on the cut.

use mica_kernels::cross_entropy::{CrossEntropyArgs, GradientScale, Targets, cross_entropy};
use mica_kernels::elementwise::{UnaryOp, unary};
use mica_kernels::reduce::{ReduceOp, reduce};
use mica_kernels::{DynViewMut, copy};
use mica_simd::Isa;
use mica_threads::Task;

use super::{Lowered, dense};
use super::products::{linear, product};
use crate::backend::{HostView, Operand, Step};
use crate::op::{CrossEntropySpec, Precision};
use crate::{Dtype, Result};

/// Logits held at once: 128 MB of f32. Each block of rows reads and unpacks the whole head twice, so few rows
/// would spend their time on that.
const LOGITS: usize = 32 << 20;

pub(super) fn lower(step: &Step, spec: &CrossEntropySpec) -> Result<Lowered> {
    let head = Head {
        hidden: step.inputs[0].host()?.clone(),
        weight: step.inputs[1].clone(),
        targets: step.inputs[2].host()?.clone(),
        sum: step.outputs[0].host()?.clone(),
        logprobs: optional(&step.outputs[1]),
        dhidden: optional(&step.outputs[2]),
        dweight: optional(&step.outputs[3]),
        vocabulary: match &step.inputs[1] {
            Operand::Packed(weight) => weight.shape()[0],
            other => other.host()?.shape[0],
        },
        precision: if spec.precision == Precision::Fast { Precision::Bf16 } else { spec.precision },
        softcap: spec.softcap,
    };
    // Sizes depend on shapes alone, so a trial without memory tells them.
    let sizes = head.sizes();
    let mut products = 0;
    head.blocks(std::ptr::null_mut(), |lowered| {
        products = products.max(lowered.bytes());
        Ok(())
    })?;
    let bytes = sizes.losses + sizes.logits + products;
    Ok(Lowered::WithWorkspace(
        bytes,
        Box::new(move |workspace: *mut u8, list: &mut Vec<Box<dyn Task>>| {
            let shared = workspace.wrapping_add(sizes.losses + sizes.logits);
            head.blocks(workspace, |lowered| lowered.give(shared, list))
        }),
    ))
}

fn optional(operand: &Operand) -> Option<HostView> {
    match operand {
        Operand::Host(view) => Some(view.clone()),
        _ => None,
    }
}

struct Head {
    hidden: HostView,
    weight: Operand,
    targets: HostView,
    sum: HostView,
    logprobs: Option<HostView>,
    dhidden: Option<HostView>,
    dweight: Option<HostView>,
    vocabulary: usize,
    precision: Precision,
    softcap: Option<f32>,
}

/// Bytes of the parts of the workspace.
struct Sizes {
    losses: usize,
    logits: usize,
}

impl Head {
    fn rows(&self) -> usize {
        self.hidden.shape[0]
    }

    fn block_rows(&self) -> usize {
        let most = (LOGITS / self.vocabulary.max(1)).clamp(16, 512);
        // Blocks of about the same size, in whole panels of rows.
        let rows = self.rows().max(1);
        rows.div_ceil(rows.div_ceil(most)).next_multiple_of(16).min(rows)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            losses: (self.rows() * 4).next_multiple_of(64),
            logits: (self.block_rows() * self.vocabulary * 4).next_multiple_of(64),
        }
    }

    /// Hands over all tasks in order. Memory that is not an operand begins at `workspace`.
    fn blocks(&self, workspace: *mut u8, mut add: impl FnMut(Lowered) -> Result<()>) -> Result<()> {
        let (rows, vocabulary) = (self.rows(), self.vocabulary);
        let losses = dense(workspace, &[rows], Dtype::F32);
        let logits_at = workspace.wrapping_add(self.sizes().losses);
        if let Some(dweight) = &self.dweight {
            add(copy::fill_f64(0.0, dweight.view_mut())?.into())?;
        }
        let block = self.block_rows();
        for first in (0..rows).step_by(block) {
            let count = block.min(rows - first);
            let logits = dense(logits_at, &[count, vocabulary], Dtype::F32);
            let hidden = part(&self.hidden, first, count);
            add(linear(&hidden, &self.weight, &logits, self.precision, false)?)?;
            let learns = self.dhidden.is_some() || self.dweight.is_some();
            let args = CrossEntropyArgs {
                logits: logits.view(),
                targets: Targets {
                    labels: part(&self.targets, first, count).view(),
                    ignore: i64::MIN,
                    soft_cap: self.softcap,
                },
                loss: Some(part(&losses, first, count).view_mut()),
                lse: None,
                gradient: learns.then(|| (logits.view_mut(), GradientScale { factor: 1.0, rows: None })),
            };
            add(cross_entropy(Isa::get(), args)?.into())?;
            if let Some(dhidden) = &self.dhidden {
                add(linear(&logits, &self.weight, &part(dhidden, first, count), self.precision, true)?)?;
            }
            if let Some(dweight) = &self.dweight {
                let mut left = logits.clone();
                left.shape.reverse();
                left.strides.reverse();
                add(product(&left, &hidden, dweight, self.precision, true)?)?;
            }
        }
        let scalar = DynViewMut { shape: [][..].into(), strides: [][..].into(), ..self.sum.view_mut() };
        add(reduce(ReduceOp::Sum, losses.view(), &[0], scalar)?.into())?;
        if let Some(logprobs) = &self.logprobs {
            add(unary(UnaryOp::Neg, losses.view(), logprobs.view_mut())?.into())?;
        }
        Ok(())
    }
}

/// Some rows of a view.
fn part(view: &HostView, first: usize, count: usize) -> HostView {
    let mut part = view.clone();
    part.pointer =
        view.pointer.wrapping_offset(first as isize * view.strides[0] * view.dtype.size() as isize);
    part.shape[0] = count;
    part
}
