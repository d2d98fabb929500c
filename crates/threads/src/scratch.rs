//! A worker's scratch memory: a bump arena that lives as long as the worker.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::OnceLock;

/// Types of which every bit pattern is a value, so that recycled scratch bytes can be lent out.
///
/// # Safety
/// Implementors have no padding, no invalid bit patterns, and an alignment of at most 64.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($t:ty)*) => { $(
        // SAFETY: a primitive number: no padding, every bit pattern valid.
        unsafe impl Plain for $t {}
    )* };
}
plain!(u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 usize);

const ALIGN: usize = 64;
/// Larger blocks are told to the [`Account`]: what kernels need for tiles is not. They are mappings of their own, so that
/// what an arena outgrows goes back to the system, and not to a heap of each worker that keeps it.
const SMALL: usize = 1 << 20;
/// A worker keeps no block larger than this from chunk to chunk.
const KEPT: usize = 32 << 20;

/// Who keeps account of memory.
#[derive(Clone, Copy)]
pub struct Account {
    /// Whether so many bytes may be taken; they are counted if so.
    pub take: fn(usize) -> bool,
    /// They are given back.
    pub give: fn(usize),
}

static ACCOUNT: OnceLock<Account> = OnceLock::new();

/// Lets large scratch blocks be counted, and refused: the task that asks then ends with
/// [`TaskPanic::refused`](crate::TaskPanic::refused). The first call counts.
pub fn set_account(account: Account) {
    // A second account would not know what the first one gave.
    let _ = ACCOUNT.set(account);
}

/// What a task ends with that gets no scratch.
pub(crate) struct Refused {
    pub(crate) bytes: usize,
}

/// Memory that a chunk may use while it runs. [`Scratch::take`] lends disjoint slices; all are
/// given back when the chunk ends. Contents are whatever the last user left.
pub struct Scratch {
    block: Cell<Block>,
    used: Cell<usize>,
    wanted: Cell<usize>,
    overflow: RefCell<Vec<Block>>,
}

#[derive(Clone, Copy)]
struct Block {
    pointer: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the blocks are owned by the Scratch and reached through it alone.
unsafe impl Send for Scratch {}

impl Block {
    const EMPTY: Block = Block { pointer: NonNull::dangling(), bytes: 0 };

    /// Nothing if there is no memory for it.
    fn new(bytes: usize) -> Option<Block> {
        if bytes == 0 {
            return Some(Block::EMPTY);
        }
        if bytes > SMALL && ACCOUNT.get().is_some_and(|account| !(account.take)(bytes)) {
            return None;
        }
        let pointer = if cfg!(unix) && bytes > SMALL { map(bytes) } else { allocate(bytes) };
        if pointer.is_none() {
            Block::tell_given(bytes);
        }
        Some(Block { pointer: pointer?, bytes })
    }

    fn tell_given(bytes: usize) {
        if bytes > SMALL
            && let Some(account) = ACCOUNT.get()
        {
            (account.give)(bytes);
        }
    }

    fn free(self) {
        if self.bytes > 0 {
            if cfg!(unix) && self.bytes > SMALL {
                unmap(self.pointer, self.bytes);
            } else {
                let layout = Layout::from_size_align(self.bytes, ALIGN).expect("checked by `allocate`");
                // SAFETY: made by `allocate` with the same layout, freed once by the owner.
                unsafe { dealloc(self.pointer.as_ptr(), layout) }
            }
            Block::tell_given(self.bytes);
        }
    }
}

/// Zeroed memory.
fn allocate(bytes: usize) -> Option<NonNull<u8>> {
    let layout = Layout::from_size_align(bytes, ALIGN).ok()?;
    // SAFETY: blocks have a non-zero size.
    NonNull::new(unsafe { alloc_zeroed(layout) })
}

/// A mapping, which is zero and begins with a page.
#[cfg(unix)]
fn map(bytes: usize) -> Option<NonNull<u8>> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
    // SAFETY: a new mapping at a place of the system's choice affects no other.
    let pointer = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if pointer == libc::MAP_FAILED { None } else { NonNull::new(pointer.cast()) }
}

#[cfg(unix)]
fn unmap(pointer: NonNull<u8>, bytes: usize) {
    // SAFETY: made by `map` with this size; nobody has its addresses any more.
    unsafe { libc::munmap(pointer.as_ptr().cast(), bytes) };
}

#[cfg(not(unix))]
fn map(_: usize) -> Option<NonNull<u8>> {
    unreachable!("only asked for on unix")
}

#[cfg(not(unix))]
fn unmap(_: NonNull<u8>, _: usize) {
    unreachable!("only asked for on unix")
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch::new()
    }
}

impl Scratch {
    /// An empty arena; it grows to what its chunks ask for.
    pub fn new() -> Scratch {
        Scratch {
            block: Cell::new(Block::EMPTY),
            used: Cell::new(0),
            wanted: Cell::new(0),
            overflow: RefCell::new(Vec::new()),
        }
    }

    /// Lends `count` values, aligned to 64 bytes, with unspecified contents.
    #[allow(clippy::mut_from_ref)] // each call lends a different range
    pub fn take<T: Plain>(&self, count: usize) -> &mut [T] {
        let bytes = count.saturating_mul(size_of::<T>()).saturating_add(ALIGN - 1) / ALIGN * ALIGN;
        self.wanted.set(self.wanted.get().saturating_add(bytes));
        let block = self.block.get();
        let pointer = if bytes <= block.bytes - self.used.get() {
            let at = self.used.get();
            self.used.set(at + bytes);
            // SAFETY: at + bytes is inside the block.
            unsafe { block.pointer.add(at) }
        } else {
            let Some(block) = Block::new(bytes) else {
                // No panic: no memory is no bug, and no backtrace belongs on stderr.
                std::panic::resume_unwind(Box::new(Refused { bytes }));
            };
            self.overflow.borrow_mut().push(block);
            block.pointer
        };
        // SAFETY: the range is inside a live block (zeroed at birth, so initialised), lent once
        // until `reset`, which takes `&mut self`; T is Plain, aligned to 64 or less.
        unsafe { std::slice::from_raw_parts_mut(pointer.cast::<T>().as_ptr(), count) }
    }

    /// Bytes that the present chunk has taken.
    pub fn taken(&self) -> usize {
        self.wanted.get()
    }

    /// What the [`Account`] is told of a worker whose chunks take so many bytes.
    pub fn counted(bytes: usize) -> usize {
        match bytes.next_power_of_two() {
            ..=SMALL => 0,
            kept @ ..=KEPT => kept,
            _ => bytes,
        }
    }

    /// Takes everything back. If the chunk had to overflow, the main block grows so that the
    /// next one does not, within reason.
    pub fn reset(&mut self) {
        let overflow = std::mem::take(self.overflow.get_mut());
        if !overflow.is_empty() {
            overflow.into_iter().for_each(Block::free);
            self.block.replace(Block::EMPTY).free();
            let size = self.wanted.get().next_power_of_two();
            if size <= KEPT {
                self.block.set(Block::new(size).unwrap_or(Block::EMPTY));
            }
        }
        self.used.set(0);
        self.wanted.set(0);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.overflow.get_mut().drain(..).for_each(Block::free);
        self.block.get().free();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_disjoint_aligned_and_survive_growth() {
        let mut scratch = Scratch::new();
        for round in 0..3 {
            let a = scratch.take::<f32>(1000);
            let b = scratch.take::<u8>(3);
            let c = scratch.take::<i32>(5000);
            a.fill(1.0);
            b.fill(2);
            c.fill(3);
            assert!(a.iter().all(|&x| x == 1.0) && b.iter().all(|&x| x == 2), "round {round}");
            assert_eq!(c.as_ptr() as usize % 64, 0);
            scratch.reset();
        }
        assert!(scratch.overflow.borrow().is_empty());
    }

    #[test]
    fn zero_sized_requests_are_fine() {
        let scratch = Scratch::new();
        assert!(scratch.take::<f32>(0).is_empty());
    }
}
