//! Pages: where a running model keeps keys and values.
//!
//! A page holds 256 positions of all KV heads, keys and values each in memory of their own, in
//! the blocks' order (see [`super::block`]), or as codes (see [`super::codes`]). The order inside is
//! nobody else's business: [`super::paged_attention`] appends and [`read_pages`] gives arrays back.

use std::ops::Range;

use half::bf16;
use mica_simd::{Isa, Kernel, Vector, dispatch};
use mica_threads::{Scratch, Task};

use super::block::{BLOCK, BlockShape, PAIR, STEP, Stored, TILE, panel_at, write_lane, write_step};
use super::codes::{Codes, Plane};
use super::heads::{Heads, Part};
use crate::dtype::{DynView, DynViewMut};
use crate::elementwise::tile::check_output;
use crate::error::KernelError;
use crate::layout::prefetch;
use crate::rows::{check_float, check_shape};

/// What numbers are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFormat {
    /// As they are.
    F32,
    /// Rounded.
    Bf16,
    /// Rounded to codes with scales.
    Codes(Codes),
}

impl std::fmt::Display for PageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PageFormat::F32 => f.write_str("float32"),
            PageFormat::Bf16 => f.write_str("bfloat16"),
            PageFormat::Codes(codes) => write!(f, "{} bits in groups of {}", codes.bits(), codes.group()),
        }
    }
}

/// What the pages of a layer look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Entries of a key.
    pub key_dim: usize,
    /// Entries of a value.
    pub value_dim: usize,
    /// What they hold.
    pub format: PageFormat,
}

impl PageShape {
    pub(crate) fn check(&self, kernel: &'static str) -> Result<(), KernelError> {
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
        self.kv_heads * self.head_bytes()[0]
    }

    /// Bytes of a page of values.
    pub fn value_bytes(&self) -> usize {
        self.kv_heads * self.head_bytes()[1]
    }

    /// Bytes of the keys and of the values of one head.
    pub(super) fn head_bytes(&self) -> [usize; 2] {
        let block = self.block();
        let floats = |size| [block.key_len() * size, block.value_len() * size];
        match self.format {
            PageFormat::F32 => floats(size_of::<f32>()),
            PageFormat::Bf16 => floats(size_of::<bf16>()),
            PageFormat::Codes(codes) => [codes.key_bytes(self.key_dim), codes.value_bytes(self.value_dim)],
        }
    }

    /// How codes are formed, if pages hold them.
    pub(super) fn codes(&self) -> Option<Codes> {
        match self.format {
            PageFormat::Codes(codes) => Some(codes),
            PageFormat::F32 | PageFormat::Bf16 => None,
        }
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
    pub fn prefetch<T: Stored>(&self, shape: &PageShape, [keys, values]: [*mut u8; 2], page: usize) {
        let positions = self.of(page);
        if positions.is_empty() {
            return;
        }
        let (at, block) = (positions.start % BLOCK, shape.block());
        match shape.codes() {
            None => {
                let keys = keys.cast::<T>();
                let panel = keys.wrapping_add(panel_at::<T>(at / TILE * TILE, 0, block.key_pairs()));
                prefetch(panel.cast(), block.key_pairs() * PAIR * size_of::<T>());
                for tile in 0..block.value_tiles() {
                    let step = panel_at::<T>(tile * TILE, at / 2 * 2, BLOCK / 2);
                    prefetch(values.cast::<T>().wrapping_add(step).cast(), PAIR * size_of::<T>());
                }
            }
            Some(codes) => {
                let keys = Plane::keys(codes, shape.key_dim, keys);
                prefetch(keys.line(at / TILE, 0), keys.panel_bytes());
                let values = Plane::values(codes, shape.value_dim, values);
                (0..block.value_tiles()).for_each(|tile| prefetch(values.line(tile, at), 1));
            }
        }
    }

    /// Writes those of a page, one head, as the pages hold them: rounded (to nearest, ties to even), or as codes.
    ///
    /// # Safety
    /// `keys` and `values` are that head's of that page, and nobody else's meanwhile. `T` is what the pages hold, if
    /// that is no codes.
    #[inline(always)]
    pub unsafe fn write<V: Vector, T: Stored>(
        &self,
        shape: &PageShape,
        [keys, values]: [*mut u8; 2],
        page: usize,
        head: usize,
        scratch: &Scratch,
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            match shape.codes() {
                None => self.write_rounded::<V, T>(
                    shape.block(),
                    [keys.cast(), values.cast()],
                    page,
                    head,
                    scratch,
                ),
                Some(codes) => {
                    let keys = Plane::keys(codes, shape.key_dim, keys);
                    let values = Plane::values(codes, shape.value_dim, values);
                    self.write_codes::<V>(shape.block(), [keys, values], page, head, scratch)
                }
            }
        }
    }

    /// # Safety
    /// As [`Positions::write`].
    #[inline(always)]
    unsafe fn write_codes<V: Vector>(
        &self,
        shape: BlockShape,
        [keys, values]: [Plane; 2],
        page: usize,
        head: usize,
        scratch: &Scratch,
    ) {
        let Range { start: from, end: to } = self.of(page);
        let key = scratch.take::<f32>(shape.key_dim);
        let value = scratch.take::<f32>(shape.value_dim);
        for position in from..to {
            let (row, at) = (position - self.start, position % BLOCK);
            // SAFETY: promised by the caller; row and head are inside the arrays.
            unsafe {
                self.k.load::<V>(0, head, row, key);
                self.v.load::<V>(0, head, row, value);
                keys.write_lane::<V>(at, key);
                values.write_step::<V>(at, value);
            }
        }
        if let Some(rest) = unwritten(from, to) {
            // SAFETY: the places are in this page.
            unsafe { values.clear(rest) };
        }
    }

    /// # Safety
    /// As [`Positions::write`].
    #[inline(always)]
    unsafe fn write_rounded<V: Vector, T: Stored>(
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
        if let Some(rest) = unwritten(from, to) {
            value.fill(0.0);
            for at in rest {
                // SAFETY: the place is in this page.
                unsafe { write_step::<V, T>(values, at, BLOCK / 2, value) };
            }
        }
    }

    /// Reads those of a page, one head.
    ///
    /// # Safety
    /// `keys` and `values` are that head's of that page, `T` is what they hold (if that is no codes), and the arrays are
    /// outputs.
    #[inline(always)]
    unsafe fn read<V: Vector, T: Stored>(
        &self,
        shape: &PageShape,
        [keys, values]: [*const u8; 2],
        page: usize,
        head: usize,
        scratch: &Scratch,
    ) {
        let pairs = shape.block().key_pairs();
        let key = scratch.take::<f32>(shape.key_dim);
        let value = scratch.take::<f32>(shape.value_dim);
        let planes = shape.codes().map(|codes| {
            let keys = Plane::keys(codes, shape.key_dim, keys.cast_mut());
            [keys, Plane::values(codes, shape.value_dim, values.cast_mut())]
        });
        let (keys, values) = (keys.cast::<T>(), values.cast::<T>());
        for position in self.of(page) {
            let (row, at) = (position - self.start, position % BLOCK);
            // SAFETY: promised by the caller; row and head are inside the arrays.
            unsafe {
                for (d, x) in key.iter_mut().enumerate() {
                    *x = match &planes {
                        Some([keys, _]) => keys.at(at, d, d, at),
                        None => (*keys.add(panel_at::<T>(at, d, pairs))).to_f32(),
                    };
                }
                for (d, x) in value.iter_mut().enumerate() {
                    *x = match &planes {
                        Some([_, values]) => values.at(d, at, d, at),
                        None => (*values.add(panel_at::<T>(d, at, BLOCK / 2))).to_f32(),
                    };
                }
                self.k.store::<V>(0, head, row, key);
                self.v.store::<V>(0, head, row, value);
            }
        }
    }
}

/// The places of a block behind what was written, `from..to`, that have to count as zero: the rest of the last step is
/// read, with weight zero, before it is written. Whoever begins a step clears it; rows that were written after that and
/// taken back stay finite.
fn unwritten(from: usize, to: usize) -> Option<Range<usize>> {
    let rest = to % BLOCK..to % BLOCK + (to.next_multiple_of(STEP) - to);
    (to / STEP * STEP >= from && !rest.is_empty()).then_some(rest)
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
    let positions = Positions::new(name, shape, start, &k.as_view(), &v.as_view())?;
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
        let page = positions.pages().start + page;
        let [key_bytes, value_bytes] = shape.head_bytes();
        let keys = keys[page].wrapping_add(head * key_bytes);
        let values = values[page].wrapping_add(head * value_bytes);
        // SAFETY: the maker of the task promised the pages; this chunk has one head of one page for itself.
        unsafe {
            if *read {
                let from = [keys.cast_const(), values.cast_const()];
                positions.read::<V, T>(shape, from, page, head, self.scratch)
            } else {
                positions.write::<V, T>(shape, [keys, values], page, head, self.scratch)
            }
        }
    }
}

impl Kernel for MoveChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        match self.task.shape.format {
            PageFormat::F32 => self.of::<V, f32>(),
            PageFormat::Bf16 | PageFormat::Codes(_) => self.of::<V, bf16>(),
        }
    }
}
