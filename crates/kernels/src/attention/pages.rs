//! Pages: where a running model keeps keys and values.
//!
//! A page holds 256 positions of all KV heads, keys and values each in memory of their own, in
//! the blocks' order (see [`super::block`]). The order inside is nobody else's business:
//! [`append_to_pages`] writes and [`read_pages`] gives arrays back.

use half::bf16;
use mica_simd::{Isa, Kernel, Vector, dispatch};
use mica_threads::{Scratch, Task};

use super::block::{BLOCK, BlockShape, STEP, Stored, panel_at, write_lane, write_step};
use super::heads::Heads;
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::check_output;
use crate::error::KernelError;
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

    fn block(&self) -> BlockShape {
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

/// Pointers to the pages of a sequence.
struct PageTable {
    shape: PageShape,
    keys: Vec<*mut u8>,
    values: Vec<*mut u8>,
}

// SAFETY: the callers promise the memory; chunks touch different heads.
unsafe impl Send for PageTable {}
// SAFETY: as above.
unsafe impl Sync for PageTable {}

impl PageTable {
    fn new(
        kernel: &'static str,
        shape: PageShape,
        keys: Vec<*mut u8>,
        values: Vec<*mut u8>,
        positions: usize,
    ) -> Result<PageTable, KernelError> {
        shape.check(kernel)?;
        let pages = positions.div_ceil(BLOCK);
        if keys.len() < pages || values.len() < pages {
            let message = format!(
                "{} pages of keys and {} of values, {positions} positions need {pages}",
                keys.len(),
                values.len()
            );
            return Err(KernelError::new(kernel, message));
        }
        Ok(PageTable { shape, keys, values })
    }

    fn keys<T>(&self, page: usize, head: usize) -> *mut T {
        self.keys[page].cast::<T>().wrapping_add(head * self.shape.block().key_len())
    }

    fn values<T>(&self, page: usize, head: usize) -> *mut T {
        self.values[page].cast::<T>().wrapping_add(head * self.shape.block().value_len())
    }
}

/// Checks that `k` and `v` are `[count, kv_heads, dim]`.
fn check_rows(
    kernel: &'static str,
    shape: PageShape,
    [k, v]: [(&[usize], Dtype); 2],
) -> Result<usize, KernelError> {
    check_float(kernel, "k", k.1)?;
    check_float(kernel, "v", v.1)?;
    let count = k.0.first().copied().unwrap_or(0);
    check_shape(kernel, "k", k.0, &[count, shape.kv_heads, shape.key_dim])?;
    check_shape(kernel, "v", v.0, &[count, shape.kv_heads, shape.value_dim])?;
    Ok(count)
}

/// Writes keys and values of the positions `start..` of one sequence into its pages, rounded to
/// the pages' type (to nearest, ties to even).
///
/// `k` is `[count, kv_heads, key_dim]`, `v` is `[count, kv_heads, value_dim]`: f32, bf16 or f16
/// with any strides. `keys` and `values` are the sequence's pages from position 0.
///
/// # Safety
/// The pages that hold positions `start .. start + count` are valid for writing while the task
/// runs, [`PageShape::key_bytes`] and [`PageShape::value_bytes`] long and aligned to 64, and read
/// or written by nobody else. (Pages of other positions are not touched and may be anything.)
pub unsafe fn append_to_pages(
    isa: Isa,
    shape: PageShape,
    keys: Vec<*mut u8>,
    values: Vec<*mut u8>,
    start: usize,
    k: DynView,
    v: DynView,
) -> Result<Box<dyn Task>, KernelError> {
    let name = "append_to_pages";
    let count = check_rows(name, shape, [(&k.shape, k.dtype), (&v.shape, v.dtype)])?;
    let table = PageTable::new(name, shape, keys, values, start + count)?;
    let heads = |view: &DynView| {
        let strides = [view.strides[1], view.strides[0], view.strides[2]];
        Heads::new(view.pointer.cast_mut(), view.dtype, &strides)
    };
    Ok(Box::new(Append { isa, table, start, count, k: heads(&k), v: heads(&v), read: false }))
}

/// Reads the positions `start..` of one sequence back from its pages; the arrays as in
/// [`append_to_pages`].
///
/// # Safety
/// The pages that hold the positions are valid for reading while the task runs and were written
/// by [`append_to_pages`].
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
    let count = check_rows(name, shape, [(&k.shape, k.dtype), (&v.shape, v.dtype)])?;
    check_output(name, &k)?;
    check_output(name, &v)?;
    let mutable = |pages: Vec<*const u8>| pages.into_iter().map(<*const u8>::cast_mut).collect();
    let table = PageTable::new(name, shape, mutable(keys), mutable(values), start + count)?;
    let heads = |view: &DynViewMut| {
        let strides = [view.strides[1], view.strides[0], view.strides[2]];
        Heads::new(view.pointer, view.dtype, &strides)
    };
    Ok(Box::new(Append { isa, table, start, count, k: heads(&k), v: heads(&v), read: true }))
}

struct Append {
    isa: Isa,
    table: PageTable,
    start: usize,
    count: usize,
    k: Heads,
    v: Heads,
    /// The other direction.
    read: bool,
}

impl Append {
    /// Pages that are touched.
    fn pages(&self) -> usize {
        if self.count == 0 { 0 } else { (self.start + self.count).div_ceil(BLOCK) - self.start / BLOCK }
    }
}

impl Task for Append {
    fn chunks(&self) -> usize {
        self.pages() * self.table.shape.kv_heads
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.isa, AppendChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        if self.read { "read_pages" } else { "append_to_pages" }
    }
}

struct AppendChunk<'a> {
    task: &'a Append,
    chunk: usize,
    scratch: &'a Scratch,
}

impl Kernel for AppendChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        // SAFETY: the caller of `append_to_pages` promised the pages; this chunk has one head of
        // one page for itself.
        unsafe {
            match self.task.table.shape.dtype {
                Dtype::BF16 => copy::<V, bf16>(self.task, self.chunk, self.scratch),
                _ => copy::<V, f32>(self.task, self.chunk, self.scratch),
            }
        }
    }
}

#[inline(always)]
unsafe fn copy<V: Vector, T: Stored>(task: &Append, chunk: usize, scratch: &Scratch) {
    let shape = task.table.shape;
    let (page, head) = (task.start / BLOCK + chunk / shape.kv_heads, chunk % shape.kv_heads);
    let (keys, values) = (task.table.keys::<T>(page, head), task.table.values::<T>(page, head));
    let pairs = shape.block().key_pairs();
    let key = scratch.take::<f32>(shape.key_dim);
    let value = scratch.take::<f32>(shape.value_dim);
    let from = task.start.max(page * BLOCK);
    let to = (task.start + task.count).min((page + 1) * BLOCK);
    for position in from..to {
        let (row, at) = (position - task.start, position % BLOCK);
        // SAFETY: promised by the caller; row and head are inside the arrays.
        unsafe {
            if task.read {
                for (d, x) in key.iter_mut().enumerate() {
                    *x = (*keys.add(panel_at::<T>(at, d, pairs))).to_f32();
                }
                for (d, x) in value.iter_mut().enumerate() {
                    *x = (*values.add(panel_at::<T>(d, at, BLOCK / 2))).to_f32();
                }
                task.k.store::<V>(0, head, row, key);
                task.v.store::<V>(0, head, row, value);
            } else {
                task.k.load::<V>(0, head, row, key);
                task.v.load::<V>(0, head, row, value);
                write_lane(keys, at, pairs, key);
                write_step(values, at, BLOCK / 2, value);
            }
        }
    }
    // The rest of the last step is read, with weight zero, before it is written. Whoever begins a step
    // clears it; rows that were written after that and taken back stay finite.
    if !task.read && to / STEP * STEP >= from {
        value.fill(0.0);
        for at in to..to.next_multiple_of(STEP) {
            // SAFETY: the place is in the page of `to`, whose size is a multiple of STEP.
            unsafe { write_step(values, at % BLOCK, BLOCK / 2, value) };
        }
    }
}
