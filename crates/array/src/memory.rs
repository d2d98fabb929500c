//! The memory of arrays: accounting, limits, and a cache of freed blocks.
//!
//! Blocks come in size buckets and are kept for reuse when an array dies, but no more of them than recent plans
//! needed beside the arrays that were alive (and never more than the cache limit): work whose sizes change from step to
//! step does not collect blocks of every size. Large blocks are mappings of their own, aligned to 2 MiB and advised to
//! be huge pages, so that what is given back is given back.
//!
//! Besides memory there are *rehearsals* ([`rehearse`]): evaluations are planned with addresses that have no memory
//! behind them and not run, which says exactly what they would take before any of it is taken.
//!
//! While a plan is being made and run, blocks that die go to *limbo*: the planner may reuse them at
//! once, because its tasks run in order, but nobody else may until the tasks have run. That is
//! what makes planning ahead of execution safe.

mod machine;
mod shelves;

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::collections::HashSet;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

pub use machine::{
    Bound, Room, most, peak_resident, process_limit, resident, room, set_process_limit, total,
};

use crate::{Error, Result};
pub(crate) use shelves::bucket;
use shelves::{Address, Shelves};

const SMALL_ALIGN: usize = shelves::SMALLEST;
const HUGE: usize = 2 << 20;

/// What a large plan needed is forgotten slowly: by this part of what each later one needs itself,
const DEMAND_PLANS: usize = 256;
/// and by this part of it with each plan. A training step is one large plan and as many small ones as there are
/// parameters, which say nothing of what the next step needs.
const SMALL_PLANS: usize = 65_536;

struct State {
    real: Blocks,
    /// Of rehearsals, which reserve addresses and no memory.
    rehearsed: Blocks,
    /// What backends would take once for all plans of a rehearsal.
    rehearsed_workspace: usize,
    /// What tasks hold while they run.
    scratch: usize,
    limit: usize,
    cache_limit: usize,
    planning: bool,
}

/// Blocks of one kind: in use, and kept.
struct Blocks {
    active: usize,
    peak: usize,
    cached: usize,
    /// The most bytes that were in use or kept at once.
    held_peak: usize,
    free: Shelves,
    limbo: Shelves,
    /// Of `cached`, what is in limbo.
    limbo_bytes: usize,
    /// The most bytes that were in use or in limbo at once since the last plan ended.
    need: usize,
    /// What recent plans needed: the largest `need`, forgotten slowly.
    demand: usize,
    /// Bytes that were in use when the last plan ended.
    before: usize,
    /// Counts blocks that died.
    clock: u64,
    release: fn(NonNull<u8>, usize),
}

static STATE: Mutex<State> = Mutex::new(State {
    real: Blocks::new(free_block),
    rehearsed: Blocks::new(unmap),
    rehearsed_workspace: 0,
    scratch: 0,
    limit: usize::MAX,
    cache_limit: 1 << 30,
    planning: false,
});

/// Whether so much of the limit is used that running what is planned, so that its dead blocks can be given back, is
/// better than planning on.
static CROWDED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread rehearses.
    static REHEARSING: Cell<bool> = const { Cell::new(false) };
}

fn state() -> std::sync::MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Bytes in use by arrays.
pub fn active() -> usize {
    state().real.active
}

/// The most bytes that were in use at once since the start or [`reset_peak`].
pub fn peak() -> usize {
    state().real.peak
}

/// Makes the present use the peak.
pub fn reset_peak() {
    let mut state = state();
    state.real.peak = state.real.active;
}

/// Bytes of freed blocks kept for reuse.
pub fn cache() -> usize {
    state().real.cached
}

/// The limit on bytes in use or kept for reuse; `usize::MAX` if there is none.
pub fn limit() -> usize {
    state().limit
}

/// Sets the limit on bytes in use or kept for reuse and returns the former one. An allocation past it is
/// [`Error::OutOfMemory`]; kept blocks are given back first.
pub fn set_limit(bytes: usize) -> usize {
    let mut state = state();
    let former = std::mem::replace(&mut state.limit, bytes);
    let free = bytes.saturating_sub(state.real.active);
    state.real.trim(free);
    state.look_around();
    former
}

/// Sets the limit on cached bytes and returns the former one.
pub fn set_cache_limit(bytes: usize) -> usize {
    let mut state = state();
    let former = std::mem::replace(&mut state.cache_limit, bytes);
    state.real.trim(bytes);
    former
}

/// Gives all cached blocks, and what the allocator keeps, back to the system.
pub fn clear_cache() {
    state().real.trim(0);
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: gives unused memory of the allocator back; no memory in use is touched.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Makes arrays heed the limit on the whole process, if there is one: they get what the rest of the process (weights
/// in the kernels' layouts, data, code) leaves of it now. Called once that rest is there.
pub fn enforce_process_limit() {
    let Some(limit) = process_limit() else { return };
    clear_cache();
    let arrays = state().real.active as u64;
    let others = resident().unwrap_or(arrays).saturating_sub(arrays);
    set_limit(usize::try_from(limit.saturating_sub(others)).unwrap_or(usize::MAX));
}

/// Does `work`, in which evaluations are planned but not run, and gives the most memory that they would have taken
/// beyond what arrays hold now, in bytes. Arrays that were "evaluated" have shapes and no values: reading one is an
/// error, and so is computing with one afterwards. Another thread's rehearsal is waited for.
///
/// # Panics
/// Within a rehearsal of the same thread.
pub fn rehearse<R>(work: impl FnOnce() -> R) -> (R, Rehearsal) {
    /// What is counted is of one rehearsal at a time.
    static ONE: Mutex<()> = Mutex::new(());
    assert!(!is_rehearsing(), "a rehearsal within a rehearsal");
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    /// Ends the rehearsal, also when the work panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            REHEARSING.with(|flag| flag.set(false));
            state().rehearsed.trim(0);
        }
    }
    {
        let mut state = state();
        state.rehearsed.trim(0);
        state.rehearsed.held_peak = state.rehearsed.active;
        state.rehearsed_workspace = 0;
    }
    REHEARSING.with(|flag| flag.set(true));
    let end = End;
    let result = work();
    let bytes = {
        let state = state();
        state.rehearsed.held_peak + state.rehearsed_workspace
    };
    drop(end);
    (result, Rehearsal { bytes: bytes as u64 })
}

/// What a rehearsal came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rehearsal {
    /// Bytes that were in use or kept for reuse at most.
    pub bytes: u64,
}

/// Within a rehearsal: counts the peak anew from here.
pub fn reset_rehearsed_peak() {
    let mut state = state();
    state.rehearsed.held_peak = state.rehearsed.active + state.rehearsed.cached;
}

/// Within a rehearsal: a backend would take so much more memory, and keep it.
pub(crate) fn rehearse_workspace(bytes: usize) {
    let mut state = state();
    state.rehearsed_workspace = state.rehearsed_workspace.max(bytes);
}

/// Whether this thread rehearses.
pub(crate) fn is_rehearsing() -> bool {
    REHEARSING.with(Cell::get)
}

/// Whether a plan should be run before more is planned.
pub(crate) fn is_crowded() -> bool {
    CROWDED.load(Ordering::Relaxed)
}

/// Large scratch memory of tasks, which the limit is for too.
pub(crate) const SCRATCH: mica_threads::Account =
    mica_threads::Account { take: take_scratch, give: give_scratch };

fn take_scratch(bytes: usize) -> bool {
    let mut state = state();
    let others = state.real.active.saturating_add(state.scratch);
    let Some(room) = state.limit.checked_sub(others.saturating_add(bytes)) else { return false };
    if state.real.cached > room {
        state.real.trim(room);
    }
    // What is in limbo cannot be given back while its plan runs.
    let fits = state.real.cached <= room;
    state.scratch += if fits { bytes } else { 0 };
    fits
}

fn give_scratch(bytes: usize) {
    state().scratch -= bytes;
}

/// A block of memory; back to the pool when dropped.
#[derive(Debug)]
pub(crate) struct Block {
    pointer: NonNull<u8>,
    bytes: usize,
    /// Addresses without memory.
    rehearsed: bool,
}

// SAFETY: a Block owns its memory; who may touch it when is the evaluator's business.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

fn layout(bytes: usize) -> Layout {
    let align = if bytes >= HUGE { HUGE } else { SMALL_ALIGN };
    Layout::from_size_align(bytes, align).expect("bucket sizes are below isize::MAX")
}

impl Block {
    /// A block of at least `bytes`. `planner` is true for the evaluator, which may take from limbo, and whose blocks
    /// are addresses only while it rehearses.
    pub(crate) fn new(bytes: usize, planner: bool) -> Result<Block> {
        let size = bytes.checked_next_power_of_two().map_or(usize::MAX, |_| bucket(bytes));
        let rehearsed = planner && is_rehearsing();
        let mut guard = state();
        let state = &mut *guard;
        let limit = if rehearsed { usize::MAX } else { state.limit.saturating_sub(state.scratch) };
        let blocks = if rehearsed { &mut state.rehearsed } else { &mut state.real };
        let refused = Error::OutOfMemory { requested: bytes, active: blocks.active, limit };
        if size > isize::MAX as usize || blocks.active.saturating_add(size) > limit {
            return Err(refused);
        }
        let (pointer, size) = match blocks.take(size, planner) {
            Some(found) => found,
            None => {
                // What is kept counts too, and goes first.
                let room = (limit - blocks.active - size).min(blocks.spare(size));
                if blocks.cached > room {
                    blocks.trim(room);
                }
                if blocks.cached > limit - blocks.active - size {
                    return Err(refused);
                }
                let pointer = if rehearsed { reserve(size) } else { allocate(size) };
                (pointer.ok_or(refused)?, size)
            }
        };
        blocks.active += size;
        blocks.peak = blocks.peak.max(blocks.active);
        blocks.held_peak = blocks.held_peak.max(blocks.active + blocks.cached);
        blocks.need = blocks.need.max(blocks.active + blocks.limbo_bytes);
        if !rehearsed {
            state.look_around();
        }
        Ok(Block { pointer, bytes: size, rehearsed })
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_rehearsed(&self) -> bool {
        self.rehearsed
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut guard = state();
        let state = &mut *guard;
        let keep = if self.rehearsed && !is_rehearsing() { 0 } else { state.cache_limit };
        let blocks = if self.rehearsed { &mut state.rehearsed } else { &mut state.real };
        blocks.put(self.pointer, self.bytes, state.planning);
        if !state.planning && blocks.cached > keep {
            blocks.trim(keep);
        }
    }
}

impl State {
    fn look_around(&self) {
        let held = self.real.active + self.real.cached;
        // Early: the next block may be as large as all that is held, and dead blocks of this plan cannot be given
        // back for it.
        let crowded = self.limit != usize::MAX && self.real.cached > 0 && held > self.limit / 3;
        CROWDED.store(crowded, Ordering::Relaxed);
    }
}

impl Blocks {
    const fn new(release: fn(NonNull<u8>, usize)) -> Blocks {
        Blocks {
            active: 0,
            peak: 0,
            cached: 0,
            held_peak: 0,
            free: Shelves::new(),
            limbo: Shelves::new(),
            limbo_bytes: 0,
            need: 0,
            demand: 0,
            before: 0,
            clock: 0,
            release,
        }
    }

    /// How much may be kept beside a new block of this size, so that all together stays at what plans need: this
    /// one, if it already needs more than recent ones.
    fn spare(&self, size: usize) -> usize {
        let needed = self.active + self.limbo_bytes + size;
        self.demand.max(needed) - self.active - size
    }

    /// A kept block that fits; only the planner may take from limbo.
    fn take(&mut self, size: usize, planner: bool) -> Option<(NonNull<u8>, usize)> {
        let limbo = if planner { self.limbo.take(size) } else { None };
        self.limbo_bytes -= limbo.map_or(0, |(_, size)| size);
        let (address, size) = limbo.or_else(|| self.free.take(size))?;
        self.cached -= size;
        Some((address.pointer, size))
    }

    /// Keeps the block of an array that died.
    fn put(&mut self, pointer: NonNull<u8>, bytes: usize, planning: bool) {
        self.active -= bytes;
        self.cached += bytes;
        self.clock += 1;
        self.limbo_bytes += if planning { bytes } else { 0 };
        let kept = if planning { &mut self.limbo } else { &mut self.free };
        kept.put(bytes, Address { pointer, since: self.clock });
    }

    /// Frees cached blocks, those that have lain longest first, until at most `limit` bytes are cached.
    fn trim(&mut self, limit: usize) {
        while self.cached > limit {
            let Some((address, size)) = self.free.take_oldest() else { return };
            self.cached -= size;
            (self.release)(address.pointer, size);
        }
    }

    /// The plan has run: frees what is kept beyond `limit` and beyond what plans like it need.
    fn leave_limbo(&mut self, limit: usize) {
        self.free.append(&mut self.limbo);
        self.limbo_bytes = 0;
        let own = self.need.saturating_sub(self.before);
        let forgotten = own / DEMAND_PLANS + self.demand / SMALL_PLANS;
        self.demand = self.need.max(self.demand.saturating_sub(forgotten));
        (self.need, self.before) = (self.active, self.active);
        self.trim(limit.min(self.demand.saturating_sub(self.active)));
    }
}

/// From now on freed blocks go to limbo. Only the holder of the engine calls this.
pub(crate) fn begin_planning() {
    state().planning = true;
}

/// Blocks in limbo at these addresses, for a plan that is to be run again: in use from now on.
pub(crate) fn keep_limbo(addresses: &HashSet<usize>) -> Vec<Block> {
    let mut state = state();
    let blocks = &mut state.real;
    let mut kept = Vec::new();
    let mut all = std::mem::replace(&mut blocks.limbo, Shelves::new());
    while let Some((address, bytes)) = all.take_oldest() {
        if !addresses.contains(&(address.pointer.as_ptr() as usize)) {
            blocks.limbo.put(bytes, address);
            continue;
        }
        blocks.cached -= bytes;
        blocks.limbo_bytes -= bytes;
        blocks.active += bytes;
        kept.push(Block { pointer: address.pointer, bytes, rehearsed: false });
    }
    blocks.peak = blocks.peak.max(blocks.active);
    kept
}

/// The planned tasks have run: what is in limbo is free for everybody.
pub(crate) fn end_planning() {
    let mut state = state();
    state.planning = false;
    // Of what a limit leaves, arrays in use come first.
    let keep = state.cache_limit.min(state.limit.saturating_sub(state.real.active));
    state.real.leave_limbo(keep);
    let keep = state.cache_limit;
    state.rehearsed.leave_limbo(keep);
    state.look_around();
}

fn allocate(bytes: usize) -> Option<NonNull<u8>> {
    if cfg!(unix) && bytes >= HUGE {
        return map_aligned(bytes);
    }
    // SAFETY: the size is not zero.
    NonNull::new(unsafe { alloc(layout(bytes)) })
}

fn free_block(pointer: NonNull<u8>, bytes: usize) {
    if cfg!(unix) && bytes >= HUGE {
        return unmap(pointer, bytes);
    }
    // SAFETY: allocated in `allocate` with this layout; the pool owns it.
    unsafe { dealloc(pointer.as_ptr(), layout(bytes)) }
}

/// A mapping that starts at a multiple of [`HUGE`]: one that is too long, without its ends.
#[cfg(unix)]
fn map_aligned(bytes: usize) -> Option<NonNull<u8>> {
    let length = bytes.checked_add(HUGE)?;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
    // SAFETY: a new mapping at a place of the system's choice affects no other.
    let whole = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
    if whole == libc::MAP_FAILED {
        return None;
    }
    let whole = whole.cast::<u8>();
    let before = whole.align_offset(HUGE);
    let pointer = whole.wrapping_add(before);
    let page_end = bytes.next_multiple_of(page());
    let ends = [(whole, before), (pointer.wrapping_add(page_end), length - before - page_end)];
    for (end, length) in ends {
        if length > 0 {
            // SAFETY: whole pages of the mapping that was just made, outside the block.
            unsafe { libc::munmap(end.cast(), length) };
        }
    }
    let pointer = NonNull::new(pointer)?;
    advise_huge(pointer, bytes);
    Some(pointer)
}

#[cfg(unix)]
fn page() -> usize {
    // SAFETY: a question without side effects.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(not(unix))]
fn map_aligned(_: usize) -> Option<NonNull<u8>> {
    unreachable!("only asked for on unix")
}

/// Addresses that nothing else has and that nothing may touch.
#[cfg(unix)]
fn reserve(bytes: usize) -> Option<NonNull<u8>> {
    // A system that counts reserved addresses would refuse more of them than it has memory; none is needed.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at a place of the system's choice affects no other.
    let pointer = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
    if pointer == libc::MAP_FAILED { None } else { NonNull::new(pointer.cast()) }
}

#[cfg(unix)]
fn unmap(pointer: NonNull<u8>, bytes: usize) {
    // SAFETY: made by `reserve` or `map_aligned` with this size; nobody has its addresses any more.
    unsafe { libc::munmap(pointer.as_ptr().cast(), bytes) };
}

// Where addresses cannot be had without memory, memory is taken, which systems give only when it is touched.
#[cfg(not(unix))]
fn reserve(bytes: usize) -> Option<NonNull<u8>> {
    allocate(bytes)
}

#[cfg(not(unix))]
fn unmap(pointer: NonNull<u8>, bytes: usize) {
    free_block(pointer, bytes);
}

#[cfg(target_os = "linux")]
fn advise_huge(pointer: NonNull<u8>, bytes: usize) {
    // SAFETY: advice on a range that was just mapped; it changes no contents.
    unsafe { libc::madvise(pointer.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(all(unix, not(target_os = "linux")))]
fn advise_huge(_: NonNull<u8>, _: usize) {}
