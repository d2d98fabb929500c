//! Pages: where a running model keeps keys and values.
//!
//! A page holds 256 positions of all KV heads, keys and values each in memory of their own, in
//! the blocks' order (see [`super::block`]). The order inside is nobody else's business:
//! [`super::paged_attention`] appends and [`read_pages`] gives arrays back.

use std::ops::Range;

use half::bf16;
use mica_simd::{Isa, Kernel, Vector, dispatch};
use mica_threads::{Scratch, Task};

use super::block::{BLOCK, BlockShape, PAIR, STEP, Stored, TILE, panel_at, write_lane, write_step};
use super::heads::{Heads, Part};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::check_output;
use crate::error::KernelError;
use crate::layout::prefetch;
use crate::rows::{check_float, check_shape};

/// What the pages of a layer look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Entries of a key.
    pub key_dim: usize,
    /// Entries of a value.
    pub value_dim: usize,
    /// bf16 or f32.
    pub dtype: Dtype,
}

impl PageShape {
    pub(crate) fn check(&self, kernel: &'static str) -> Result<(), KernelError> {
        if !matches!(self.dtype, Dtype::BF16 | Dtype::F32) {
            let message = format!("pages are {}, expected bfloat16 or float32", self.dtype);
            return Err(KernelError::new(kernel, message));
        }
        if self.kv_heads == 0 || self.key_dim == 0 || self.value_dim == 0 {
            return Err(KernelError::new(kernel, format!("pages of no size: {self:?}")));
        }
        Ok(())
    }

    pub(super) fn block(&self) -> BlockShape {
        BlockShape { key_dim: self.key_dim, value_dim: self.value_dim }
    }

    /// Bytes of a page of keys.
    pub fn key_bytes(&self) -> usize {
        self.kv_heads * self.block().key_len() * self.dtype.size()
    }

    /// Bytes of a page of values.
    pub fn value_bytes(&self) -> usize {
        self.kv_heads * self.block().value_len() * self.dtype.size()
    }
}

/// The positions `start .. start + count` of one sequence, outside of pages: what is appended to them or read
/// from them.
#[derive(Clone)]
pub(super) struct Positions {
    pub start: usize,
    pub count: usize,
    k: Heads,
    v: Heads,
}

impl Positions {
    /// `k` and `v` are `[count, kv_heads, dim]`, f32, bf16 or f16 with any strides.
    pub fn new(
        kernel: &'static str,
        shape: PageShape,
        start: usize,
        k: &DynView,
        v: &DynView,
    ) -> Result<Positions, KernelError> {
        check_float(kernel, "k", k.dtype)?;
        check_float(kernel, "v", v.dtype)?;
        let count = k.shape.first().copied().unwrap_or(0);
        check_shape(kernel, "k", &k.shape, &[count, shape.kv_heads, shape.key_dim])?;
        check_shape(kernel, "v", &v.shape, &[count, shape.kv_heads, shape.value_dim])?;
        let heads = |view: &DynView| {
            let strides = [view.strides[1], view.strides[0], view.strides[2]];
            Heads::new(view.pointer.cast_mut(), view.dtype, &strides)
        };
        Ok(Positions { start, count, k: heads(k), v: heads(v) })
    }

    /// One past the last position.
    pub fn end(&self) -> usize {
        self.start + self.count
    }

    /// The pages that hold them.
    pub fn pages(&self) -> Range<usize> {
        if self.count == 0 { 0..0 } else { self.start / BLOCK..self.end().div_ceil(BLOCK) }
    }

    /// Those in a page.
    fn of(&self, page: usize) -> Range<usize> {
        self.start.max(page * BLOCK)..self.end().min((page + 1) * BLOCK)
    }

    /// Asks for the lines of a page that [`Positions::write`] changes to be brought near: stores to lines that are
    /// far away wait for each other.
    #[inline(always)]
    pub fn prefetch<T: Stored>(&self, shape: BlockShape, [keys, values]: [*mut T; 2], page: usize) {
        let positions = self.of(page);
        if positions.is_empty() {
            return;
        }
        let (at, pairs) = (positions.start % BLOCK, shape.key_pairs());
        let panel = keys.wrapping_add(panel_at::<T>(at / TILE * TILE, 0, pairs));
        prefetch(panel.cast(), pairs * PAIR * size_of::<T>());
        for tile in 0..shape.value_tiles() {
            let line = values.wrapping_add(panel_at::<T>(tile * TILE, at / 2 * 2, BLOCK / 2));
            prefetch(line.cast(), PAIR * size_of::<T>());
        }
    }

    /// Writes those of a page, one head, rounded to the pages' type (to nearest, ties to even).
    ///
    /// # Safety
    /// `keys` and `values` are that head's of that page, and nobody else's meanwhile.
    #[inline(always)]
    pub unsafe fn write<V: Vector, T: Stored>(
        &self,
        shape: BlockShape,
        [keys, values]: [*mut T; 2],
        page: usize,
        head: usize,
        scratch: &Scratch,
    ) {
        let Range { start: from, end: to } = self.of(page);
        let pairs = shape.key_pairs();
        // Tiles of 16 positions are turned as a whole.
        let first = from.next_multiple_of(TILE).min(to);
        let last = first.max(to / TILE * TILE);
        // SAFETY: promised by the caller; the positions are inside the arrays.
        unsafe {
            let part = |heads, dim| Part {
                heads,
                base: 0,
                head,
                position: first - self.start,
                count: last - first,
                dim,
            };
            let (at, count) = (first % BLOCK, last - first);
            if count > 0 {
                let keys = keys.add(panel_at::<T>(at, 0, pairs));
                part(&self.k, shape.key_dim).lanes::<V, T>(V::ISA, count, pairs, keys, scratch);
                let values = values.add(panel_at::<T>(0, at, BLOCK / 2));
                part(&self.v, shape.value_dim).steps::<V, T>(V::ISA, count, BLOCK / 2, values, scratch);
            }
        }
        let key = scratch.take::<f32>(shape.key_dim);
        let value = scratch.take::<f32>(shape.value_dim);
        for position in (from..first).chain(last..to) {
            let (row, at) = (position - self.start, position % BLOCK);
            // SAFETY: promised by the caller; row and head are inside the arrays.
            unsafe {
                self.k.load::<V>(0, head, row, key);
                self.v.load::<V>(0, head, row, value);
                write_lane::<V, T>(keys, at, pairs, key);
                write_step::<V, T>(values, at, BLOCK / 2, value);
            }
        }
        // The rest of the last step is read, with weight zero, before it is written. Whoever begins a step
        // clears it; rows that were written after that and taken back stay finite.
        if to / STEP * STEP >= from {
            value.fill(0.0);
            for at in to..to.next_multiple_of(STEP) {
                // SAFETY: the place is in this page, whose size is a multiple of STEP.
                unsafe { write_step::<V, T>(values, at % BLOCK, BLOCK / 2, value) };
            }
        }
    }

    /// Reads those of a page, one head.
    ///
    /// # Safety
    /// `keys` and `values` are that head's of that page, and the arrays are outputs.
    #[inline(always)]
    unsafe fn read<V: Vector, T: Stored>(
        &self,
        shape: BlockShape,
        [keys, values]: [*const T; 2],
        page: usize,
        head: usize,
        scratch: &Scratch,
    ) {
        let pairs = shape.key_pairs();
        let key = scratch.take::<f32>(shape.key_dim);
        let value = scratch.take::<f32>(shape.value_dim);
        for position in self.of(page) {
            let (row, at) = (position - self.start, position % BLOCK);
            // SAFETY: promised by the caller; row and head are inside the arrays.
            unsafe {
                for (d, x) in key.iter_mut().enumerate() {
                    *x = (*keys.add(panel_at::<T>(at, d, pairs))).to_f32();
                }
                for (d, x) in value.iter_mut().enumerate() {
                    *x = (*values.add(panel_at::<T>(d, at, BLOCK / 2))).to_f32();
                }
                self.k.store::<V>(0, head, row, key);
                self.v.store::<V>(0, head, row, value);
            }
        }
    }
}

/// Pointers to the pages of a sequence, keys and values.
pub(super) type Pages = [Vec<*mut u8>; 2];

/// That there are pages for so many positions.
pub(super) fn check_pages(
    kernel: &'static str,
    [keys, values]: [usize; 2],
    positions: usize,
) -> Result<(), KernelError> {
    let pages = positions.div_ceil(BLOCK);
    if keys < pages || values < pages {
        let message =
            format!("{keys} pages of keys and {values} of values, {positions} positions need {pages}");
        return Err(KernelError::new(kernel, message));
    }
    Ok(())
}

/// Reads the positions `start..` of one sequence back from its pages: `k` `[count, kv_heads, key_dim]`, `v`
/// `[count, kv_heads, value_dim]`, f32, bf16 or f16. `keys` and `values` are its pages from position 0.
///
/// # Safety
/// The pages that hold the positions are valid for reading while the task runs, are [`PageShape::key_bytes`] and
/// [`PageShape::value_bytes`] long, and were written by [`super::paged_attention`].
pub unsafe fn read_pages(
    isa: Isa,
    shape: PageShape,
    keys: Vec<*const u8>,
    values: Vec<*const u8>,
    start: usize,
    k: DynViewMut,
    v: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let name = "read_pages";
    shape.check(name)?;
    check_output(name, &k)?;
    check_output(name, &v)?;
    let view = |out: DynViewMut| DynView {
        pointer: out.pointer,
        dtype: out.dtype,
        shape: out.shape,
        strides: out.strides,
    };
    let positions = Positions::new(name, shape, start, &view(k), &view(v))?;
    check_pages(name, [keys.len(), values.len()], positions.end())?;
    let pages = [keys, values].map(|pages| pages.into_iter().map(<*const u8>::cast_mut).collect());
    Ok(Box::new(Move { isa, shape, pages, positions, read: true }))
}

/// Appends positions to pages that hold those before, or reads them back.
pub(super) struct Move {
    pub isa: Isa,
    pub shape: PageShape,
    pub pages: Pages,
    pub positions: Positions,
    /// From the pages to the arrays.
    pub read: bool,
}

// SAFETY: the callers promise the memory; chunks touch different heads.
unsafe impl Send for Move {}
// SAFETY: as above.
unsafe impl Sync for Move {}

impl Task for Move {
    fn chunks(&self) -> usize {
        self.positions.pages().len() * self.shape.kv_heads
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.isa, MoveChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        if self.read { "read_pages" } else { "append_to_pages" }
    }
}

struct MoveChunk<'a> {
    task: &'a Move,
    chunk: usize,
    scratch: &'a Scratch,
}

impl MoveChunk<'_> {
    #[inline(always)]
    fn of<V: Vector, T: Stored>(self) {
        let Move { shape, pages: [keys, values], positions, read, .. } = self.task;
        let (page, head) = (self.chunk / shape.kv_heads, self.chunk % shape.kv_heads);
        let (page, block) = (positions.pages().start + page, shape.block());
        let keys = keys[page].cast::<T>().wrapping_add(head * block.key_len());
        let values = values[page].cast::<T>().wrapping_add(head * block.value_len());
        // SAFETY: the maker of the task promised the pages; this chunk has one head of one page for itself.
        unsafe {
            if *read {
                positions.read::<V, T>(
                    block,
                    [keys.cast_const(), values.cast_const()],
                    page,
                    head,
                    self.scratch,
                )
            } else {
                positions.write::<V, T>(block, [keys, values], page, head, self.scratch)
            }
        }
    }
}

impl Kernel for MoveChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        match self.task.shape.dtype {
            Dtype::BF16 => self.of::<V, bf16>(),
            _ => self.of::<V, f32>(),
        }
    }
}
