//! The forward pass over pages, to which it appends first.

use mica_simd::Isa;

use super::block::BlockShape;
use super::forward::{Blocks, Forward, Sequence, plan};
use super::heads::Heads;
use super::pages::{PageFormat, PageShape, Positions, check_pages};
use super::product::{Halves, Single, Widened};
use super::{Precision, Rule};
use crate::dtype::{DynView, DynViewMut};
use crate::elementwise::tile::check_output;
use crate::error::{KernelError, check_tier};
use crate::gemm::uses_pairs;
use crate::plan::{Plan, Workspace};
use crate::rows::{check_float, check_shape};

/// One sequence of [`paged_attention`].
pub struct PagedSequence {
    /// A page of keys for each 256 positions, from position 0.
    pub keys: Vec<*mut u8>,
    /// A page of values for each 256 positions.
    pub values: Vec<*mut u8>,
    /// The keys of its queries' positions, `[length, kv_heads, key_dim]`: f32, bf16 or f16.
    pub k: DynView,
    /// The values, `[length, kv_heads, value_dim]`.
    pub v: DynView,
    /// The first of its queries among the rows of `q`.
    pub first: usize,
    /// The position of its first query: as many keys come before it.
    pub start: usize,
}

/// What [`paged_attention`] reads and writes.
pub struct PagedArgs {
    /// `[tokens, heads, head_dim]`: the queries of all sequences, f32, bf16 or f16.
    pub q: DynView,
    /// What pages look like.
    pub pages: PageShape,
    /// The sequences. `k` and `v` of each are written to its pages, rounded (to nearest, ties to even) or as codes. Query i sees the keys of positions up to `start + i`.
    pub sequences: Vec<PagedSequence>,
    /// Scale, window, soft cap and sinks; always causal. Masks and ranges are for arrays only.
    pub rule: Rule,
    /// How products are formed. bf16 needs pages of bf16 or codes.
    pub precision: Precision,
    /// `[tokens, heads, value_dim]`. May be `q` itself, element for element: a chunk reads its queries before it writes
    /// their results, and where several share queries, the last of them writes.
    pub out: DynViewMut,
}

/// Appends to pages and attends over them, for prefill and decode of any number of sequences at once. The bits are
/// those of `attention` over the same keys and values.
///
/// # Safety
/// While the tasks run, the pages are valid, [`PageShape::key_bytes`] and [`PageShape::value_bytes`] long and aligned
/// to 64; those of positions before `start` were written by this function, and those from there on are read or
/// written by nobody else. (Pages of other positions are not touched and may be anything.)
pub unsafe fn paged_attention(isa: Isa, args: PagedArgs) -> Result<Plan, KernelError> {
    let name = "paged_attention";
    check_tier(name, isa)?;
    let PageShape { kv_heads, key_dim, value_dim, format } = args.pages;
    args.pages.check(name)?;
    check_float(name, "q", args.q.dtype)?;
    check_float(name, "out", args.out.dtype)?;
    if args.q.shape.len() != 3 || args.q.shape[2] != key_dim {
        let message = format!("q has shape {:?}, expected [tokens, heads, {key_dim}]", args.q.shape);
        return Err(KernelError::new(name, message));
    }
    let (tokens, heads) = (args.q.shape[0], args.q.shape[1]);
    if heads == 0 || heads % kv_heads != 0 {
        return Err(KernelError::new(
            name,
            format!("{heads} heads are not one or several for each of {kv_heads} KV heads"),
        ));
    }
    check_shape(name, "out", &args.out.shape, &[tokens, heads, value_dim])?;
    check_output(name, &args.out)?;
    let mut rule = args.rule;
    if rule.mask.is_some() || rule.key_start.is_some() || rule.key_end.is_some() {
        return Err(KernelError::new(name, "masks and key ranges are for attention over arrays"));
    }
    rule.causal = true;
    rule.check(name, [1, heads, tokens], 0)?;
    if args.precision == Precision::Bf16 && format == PageFormat::F32 {
        return Err(KernelError::new(name, format!("bf16 products need bfloat16 pages, these are {format}")));
    }
    let mut covered = vec![false; tokens];
    let mut sequences = Vec::with_capacity(args.sequences.len());
    for (index, sequence) in args.sequences.into_iter().enumerate() {
        let PagedSequence { keys, values, k, v, first, start } = sequence;
        let new = Positions::new(name, args.pages, start, &k, &v)?;
        let length = new.count;
        check_pages(name, [keys.len(), values.len()], new.end())
            .map_err(|error| KernelError::new(name, format!("sequence {index}: {error}")))?;
        let rows = covered.get_mut(first..first + length);
        if rows.is_none_or(|rows| rows.iter_mut().any(|row| std::mem::replace(row, true))) {
            let message = format!(
                "sequence {index} has the queries {first}..{}, which are not among the {tokens} or another's",
                first + length
            );
            return Err(KernelError::new(name, message));
        }
        sequences.push(Sequence {
            index,
            length,
            keys: start + length,
            start: start as isize,
            q: first as isize * args.q.strides[0],
            out: first as isize * args.out.strides[0],
            lse: 0,
            blocks: Blocks::Pages { shape: args.pages, pages: [keys, values], new },
            ..Sequence::default()
        });
    }
    let by_head = |strides: &[isize]| [strides[1], strides[0], strides[2]];
    let forward = Forward {
        isa,
        rule,
        shape: BlockShape { key_dim, value_dim },
        heads,
        kv_heads,
        q: Heads::new(args.q.pointer.cast_mut(), args.q.dtype, &by_head(&args.q.strides)),
        out: Heads::new(args.out.pointer, args.out.dtype, &by_head(&args.out.strides)),
        lse: None,
        sequences,
        packed: Workspace(std::ptr::null_mut()),
        partials: Workspace(std::ptr::null_mut()),
        merged: Box::default(),
    };
    Ok(if uses_pairs(isa, args.precision) {
        plan::<Halves>(forward, None)
    } else if format == PageFormat::Bf16 {
        plan::<Widened>(forward, None)
    } else {
        plan::<Single>(forward, None)
    })
}
