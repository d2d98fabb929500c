//! The memory of arrays: accounting, limits, and a cache of freed blocks.
//!
//! Blocks come in size buckets and are kept for reuse when an array dies, up to the cache limit.
//! Large blocks are aligned to 2 MiB and advised to be huge pages.
//!
//! While a plan is being made and run, blocks that die go to *limbo*: the planner may reuse them at
//! once, because its tasks run in order, but nobody else may until the tasks have run. That is
//! what makes planning ahead of execution safe.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Mutex;

use crate::{Error, Result};

const SMALL_ALIGN: usize = 64;
const HUGE: usize = 2 << 20;

struct State {
    active: usize,
    peak: usize,
    cached: usize,
    limit: usize,
    cache_limit: usize,
    planning: bool,
    free: BTreeMap<usize, Vec<Address>>,
    limbo: BTreeMap<usize, Vec<Address>>,
}

#[derive(Clone, Copy)]
struct Address(NonNull<u8>);
// SAFETY: an address of a block that the pool owns; no thread-bound state.
unsafe impl Send for Address {}

static STATE: Mutex<State> = Mutex::new(State {
    active: 0,
    peak: 0,
    cached: 0,
    limit: usize::MAX,
    cache_limit: 1 << 30,
    planning: false,
    free: BTreeMap::new(),
    limbo: BTreeMap::new(),
});

fn state() -> std::sync::MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Bytes in use by arrays.
pub fn active() -> usize {
    state().active
}

/// The most bytes that were in use at once since the start or [`reset_peak`].
pub fn peak() -> usize {
    state().peak
}

/// Makes the present use the peak.
pub fn reset_peak() {
    let mut state = state();
    state.peak = state.active;
}

/// Bytes of freed blocks kept for reuse.
pub fn cache() -> usize {
    state().cached
}

/// Sets the limit on bytes in use and returns the former one. An allocation past it is
/// [`Error::OutOfMemory`].
pub fn set_limit(bytes: usize) -> usize {
    std::mem::replace(&mut state().limit, bytes)
}

/// Sets the limit on cached bytes and returns the former one.
pub fn set_cache_limit(bytes: usize) -> usize {
    let mut state = state();
    let former = std::mem::replace(&mut state.cache_limit, bytes);
    state.trim(bytes);
    former
}

/// Gives all cached blocks back to the system.
pub fn clear_cache() {
    state().trim(0);
}

/// A block of memory; back to the pool when dropped.
#[derive(Debug)]
pub(crate) struct Block {
    pointer: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a Block owns its memory; who may touch it when is the evaluator's business.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

/// Bucket sizes grow by an eighth of a power of two, so that at most 12.5 % is wasted.
fn bucket(bytes: usize) -> usize {
    let bytes = bytes.max(SMALL_ALIGN);
    let step = (bytes.next_power_of_two() / 16).max(SMALL_ALIGN);
    bytes.next_multiple_of(step)
}

fn layout(bytes: usize) -> Layout {
    let align = if bytes >= HUGE { HUGE } else { SMALL_ALIGN };
    Layout::from_size_align(bytes, align).expect("bucket sizes are below isize::MAX")
}

impl Block {
    /// A block of at least `bytes`. `planner` is true for the evaluator, which may take from limbo.
    pub(crate) fn new(bytes: usize, planner: bool) -> Result<Block> {
        let size = bytes.checked_next_power_of_two().map_or(usize::MAX, |_| bucket(bytes));
        let mut state = state();
        if size > isize::MAX as usize || state.active.saturating_add(size) > state.limit {
            return Err(Error::OutOfMemory { requested: bytes, active: state.active, limit: state.limit });
        }
        let reused =
            (planner.then(|| take(&mut state.limbo, size)).flatten()).or_else(|| take(&mut state.free, size));
        let (pointer, size) = match reused {
            Some((address, size)) => {
                state.cached -= size;
                (address.0, size)
            }
            None => {
                // SAFETY: the size is not zero.
                let Some(pointer) = NonNull::new(unsafe { alloc(layout(size)) }) else {
                    return Err(Error::OutOfMemory {
                        requested: bytes,
                        active: state.active,
                        limit: state.limit,
                    });
                };
                advise_huge(pointer, size);
                (pointer, size)
            }
        };
        state.active += size;
        state.peak = state.peak.max(state.active);
        Ok(Block { pointer, bytes: size })
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The smallest kept block that fits without wasting more than a quarter.
fn take(kept: &mut BTreeMap<usize, Vec<Address>>, size: usize) -> Option<(Address, usize)> {
    let (&found, list) = kept.range_mut(size..=size + size / 4).next()?;
    let address = list.pop()?;
    if list.is_empty() {
        kept.remove(&found);
    }
    Some((address, found))
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut state = state();
        state.active -= self.bytes;
        state.cached += self.bytes;
        let kept = if state.planning { &mut state.limbo } else { &mut state.free };
        kept.entry(self.bytes).or_default().push(Address(self.pointer));
        if !state.planning && state.cached > state.cache_limit {
            let limit = state.cache_limit;
            state.trim(limit);
        }
    }
}

impl State {
    /// Frees cached blocks, largest first, until at most `limit` bytes are cached.
    fn trim(&mut self, limit: usize) {
        while self.cached > limit {
            let Some((&size, list)) = self.free.iter_mut().next_back() else { return };
            let address = list.pop().expect("empty lists are removed");
            if list.is_empty() {
                self.free.remove(&size);
            }
            self.cached -= size;
            // SAFETY: allocated in `Block::new` with this layout; the pool owns it.
            unsafe { dealloc(address.0.as_ptr(), layout(size)) }
        }
    }
}

/// From now on freed blocks go to limbo. Only the holder of the engine calls this.
pub(crate) fn begin_planning() {
    state().planning = true;
}

/// The planned tasks have run: what is in limbo is free for everybody.
pub(crate) fn end_planning() {
    let mut state = state();
    state.planning = false;
    for (size, list) in std::mem::take(&mut state.limbo) {
        state.free.entry(size).or_default().extend(list);
    }
    let limit = state.cache_limit;
    state.trim(limit);
}

#[cfg(target_os = "linux")]
fn advise_huge(pointer: NonNull<u8>, bytes: usize) {
    if bytes >= HUGE {
        // SAFETY: advice on a range that was just allocated; it changes no contents.
        unsafe { libc::madvise(pointer.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge(_: NonNull<u8>, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_waste_little() {
        for bytes in [1, 64, 65, 1000, 4097, 1 << 20, (1 << 20) + 1, 123_456_789] {
            let size = bucket(bytes);
            assert!(size >= bytes && size <= (bytes + bytes / 8).max(bytes + 64), "{bytes} -> {size}");
        }
    }
}
