//! Fused ops: norms, rotary positions, attention, convolution.

use mica_kernels::attention::{
    AttentionArgs, AttentionBackwardArgs, PagedArgs, PagedSequence, Rule, attention, attention_backward,
    backward_scratch, paged_attention,
};
use mica_kernels::conv::{ShortConvArgs, ShortConvBackwardArgs, short_conv, short_conv_backward};
use mica_kernels::gemm;
use mica_kernels::norm::{Norm, NormArgs, NormBackwardArgs, norm, norm_backward};
use mica_kernels::rope::{Positions, RopePairs, rope, rope_table};
use mica_kernels::view::contiguous_strides;
use mica_kernels::{Dtype, DynView, DynViewMut, Plan};
use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::{Lowered, by_reference, input, output, wanted};
use crate::Result;
use crate::backend::Step;
use crate::kv::{KvFormat, PagedStep};
use crate::op::{AttentionSpec, Op, Precision, RopeSpec};

pub(super) fn lower(step: &Step) -> Result<Lowered> {
    match &step.op {
        Op::RmsNorm { eps } => Ok(norm(
            Isa::get(),
            NormArgs {
                kind: Norm::Rms,
                x: input(step, 0)?,
                weight: Some(input(step, 1)?),
                bias: None,
                eps: *eps,
                residual: None,
                out: output(step, 0)?,
            },
        )?
        .into()),
        Op::LayerNorm { eps } => Ok(norm(
            Isa::get(),
            NormArgs {
                kind: Norm::Layer,
                x: input(step, 0)?,
                weight: Some(input(step, 1)?),
                bias: Some(input(step, 2)?),
                eps: *eps,
                residual: None,
                out: output(step, 0)?,
            },
        )?
        .into()),
        Op::RmsNormVjp { eps } => Ok(norm_backward(
            Isa::get(),
            NormBackwardArgs {
                kind: Norm::Rms,
                x: input(step, 0)?,
                weight: Some(input(step, 1)?),
                eps: *eps,
                dy: input(step, 2)?,
                dx: output(step, 0)?,
                dweight: wanted(step, 1),
                dbias: None,
            },
        )?
        .into()),
        Op::Rope(spec) => rotate(step, spec),
        Op::Attention(spec) => forward(step, spec),
        Op::AttentionVjp(spec) => backward(step, spec),
        Op::PagedAttention(paged) => over_pages(step, paged),
        Op::ShortConv(spec) => Ok(short_conv(
            Isa::get(),
            ShortConvArgs {
                x: input(step, 0)?,
                weight: input(step, 1)?,
                bias: None,
                state: if spec.state { Some(input(step, 2)?) } else { None },
                starts: if spec.starts { Some(input(step, 2 + spec.state as usize)?) } else { None },
                out: output(step, 0)?,
                next_state: wanted(step, 1),
            },
        )?
        .into()),
        Op::ShortConvVjp(spec) => Ok(short_conv_backward(
            Isa::get(),
            ShortConvBackwardArgs {
                x: input(step, 0)?,
                weight: input(step, 1)?,
                starts: if spec.starts { Some(input(step, 3)?) } else { None },
                dy: input(step, 2)?,
                dx: output(step, 0)?,
                dweight: wanted(step, 1),
                dbias: None,
            },
        )?
        .into()),
        _ => Ok(by_reference(step)),
    }
}

/// [batch, time, heads, dim] as the kernels' [batch, heads, time, dim].
fn heads_first(mut view: DynView) -> DynView {
    view.shape.swap(1, 2);
    view.strides.swap(1, 2);
    view
}

fn heads_first_mut(mut view: DynViewMut) -> DynViewMut {
    view.shape.swap(1, 2);
    view.strides.swap(1, 2);
    view
}

fn precision(precision: Precision) -> gemm::Precision {
    match precision {
        Precision::Exact => gemm::Precision::Exact,
        Precision::Bf16 | Precision::Fast => gemm::Precision::Bf16,
    }
}

fn rule(spec: &AttentionSpec, key_start: Option<DynView>) -> Rule {
    Rule {
        scale: spec.scale,
        causal: spec.causal,
        window: spec.window,
        key_start,
        soft_cap: spec.softcap,
        ..Rule::default()
    }
}

fn forward(step: &Step, spec: &AttentionSpec) -> Result<Lowered> {
    let key_start = if spec.key_start { Some(input(step, 3)?) } else { None };
    let args = AttentionArgs {
        q: heads_first(input(step, 0)?),
        k: heads_first(input(step, 1)?),
        v: heads_first(input(step, 2)?),
        rule: rule(spec, key_start),
        precision: precision(spec.precision),
        out: heads_first_mut(output(step, 0)?),
        lse: wanted(step, 1),
    };
    Ok(attention(Isa::get(), args)?.into())
}

/// Inputs q, k, v, out, lse, dout, (key_start); outputs dq, dk, dv.
fn backward(step: &Step, spec: &AttentionSpec) -> Result<Lowered> {
    let key_start = if spec.key_start { Some(input(step, 6)?) } else { None };
    let gradient = |index: usize| wanted(step, index).map(heads_first_mut);
    let args = AttentionBackwardArgs {
        q: heads_first(input(step, 0)?),
        k: heads_first(input(step, 1)?),
        v: heads_first(input(step, 2)?),
        rule: rule(spec, key_start),
        precision: precision(spec.precision),
        out: heads_first(input(step, 3)?),
        lse: input(step, 4)?,
        dout: heads_first(input(step, 5)?),
        dq: gradient(0),
        dk: gradient(1),
        dv: gradient(2),
        dsinks: None,
    };
    Ok(attention_backward(Isa::get(), args)?.into())
}

/// Scratch memory that a step takes on so many threads, where that grows with its sizes. What kernels need for tiles is
/// not counted.
pub(super) fn scratch(step: &Step, threads: usize) -> Result<usize> {
    let Op::AttentionVjp(spec) = &step.op else { return Ok(0) };
    let (q, v) = (input(step, 0)?.shape, input(step, 2)?.shape);
    let (sizes, dims) = ([q[0], q[2], v[2], q[1]], [q[3], v[3]]);
    let (bytes, chunks) = backward_scratch(Isa::get(), precision(spec.precision), sizes, dims);
    Ok(chunks.min(threads).saturating_mul(Scratch::counted(bytes)))
}

/// Appends to the pages of every sequence, then attends over them.
fn over_pages(step: &Step, paged: &PagedStep) -> Result<Lowered> {
    let (q, k, v, out) = (input(step, 0)?, input(step, 1)?, input(step, 2)?, output(step, 0)?);
    let (pages, length) = (paged.kv.page_shape(), q.shape[1]);
    let mut sequences = Vec::with_capacity(paged.sequences.len());
    for (row, (table, start)) in paged.sequences.iter().enumerate() {
        let pointers = table.iter().map(|page| page.layer(paged.layer)).collect::<Result<Vec<_>>>()?;
        let (keys, values) = pointers.into_iter().unzip();
        let of_row = |view: &DynView| {
            let offset = row as isize * view.strides[0] * view.dtype.size() as isize;
            DynView {
                pointer: view.pointer.wrapping_offset(offset),
                dtype: view.dtype,
                shape: view.shape[1..].into(),
                strides: view.strides[1..].into(),
            }
        };
        let (k, v) = (of_row(&k), of_row(&v));
        sequences.push(PagedSequence { keys, values, k, v, first: row * length, start: *start });
    }
    let flat = |shape: &[usize], strides: &[isize]| {
        let shape = [shape[0] * shape[1], shape[2], shape[3]];
        (shape, [strides[1], strides[2], strides[3]])
    };
    // Rows of the batch follow each other at equal distances only if time is dense.
    let dense = q.shape[0] == 1 || q.strides[0] == q.strides[1] * length as isize;
    if !dense {
        return Err(crate::Error::Kernel("queries of paged attention are not dense over time".into()));
    }
    let ((q_shape, q_strides), (out_shape, out_strides)) =
        (flat(&q.shape, &q.strides), flat(&out.shape, &out.strides));
    let exact = paged.kv.format == KvFormat::F32;
    let args = PagedArgs {
        q: DynView { shape: q_shape[..].into(), strides: q_strides[..].into(), ..q },
        pages,
        sequences,
        rule: Rule {
            scale: paged.spec.scale,
            causal: true,
            window: paged.spec.window,
            soft_cap: paged.spec.softcap,
            ..Rule::default()
        },
        precision: if exact { gemm::Precision::Exact } else { precision(paged.spec.precision) },
        out: DynViewMut { shape: out_shape[..].into(), strides: out_strides[..].into(), ..out },
    };
    // SAFETY: the step's Arc keeps the pages alive; the token orders the steps that write them; sequences that share
    // pages share only full ones, which are not written.
    Ok(unsafe { paged_attention(Isa::get(), args)? }.into())
}

impl From<Plan> for Lowered {
    fn from(plan: Plan) -> Lowered {
        let bytes = plan.workspace_bytes();
        let make = move |workspace: *mut u8, list: &mut Vec<Box<dyn Task>>| {
            // SAFETY: the workspace is that large, aligned, and used by one step's tasks at a time.
            unsafe { plan.tasks(workspace, list) };
            Ok(())
        };
        Lowered::WithWorkspace(bytes, Box::new(make))
    }
}

fn rotate(step: &Step, spec: &RopeSpec) -> Result<Lowered> {
    let (x, positions, frequencies) = (input(step, 0)?, input(step, 1)?, input(step, 2)?);
    let (out, spec) = (output(step, 0)?, spec.clone());
    let shape = [x.shape[0], x.shape[1], spec.dims / 2];
    let bytes = (shape.iter().product::<usize>() * 4).next_multiple_of(64);
    Ok(Lowered::WithWorkspace(
        2 * bytes,
        Box::new(move |workspace: *mut u8, list: &mut Vec<Box<dyn Task>>| {
            let table = |pointer: *mut u8| DynViewMut {
                pointer,
                dtype: Dtype::F32,
                shape: shape[..].into(),
                strides: contiguous_strides(&shape),
            };
            let (cos, sin) = (table(workspace), table(workspace.wrapping_add(bytes)));
            let pairs = if spec.traditional { RopePairs::Interleaved } else { RopePairs::Halves };
            let (cos_read, sin_read) = (cos.as_view(), sin.as_view());
            list.push(rope_table(Positions::Each(positions), frequencies, spec.scale, cos, sin)?);
            list.push(rope(Isa::get(), x, cos_read, sin_read, pairs, spec.inverse, out)?);
            Ok(())
        }),
    ))
}
