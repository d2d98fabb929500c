//! The bytes of packed weights: aligned, and on huge pages where the system has them.
//!
//! Finding a page costs more than filling it: with pages of 4 KiB a thread gets some 3 GB/s of new memory, with huge
//! ones 20. Most weights of a small model are smaller than a huge page, so they share slabs. A slab lives as long as
//! one of its weights, which come and go together.

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::KernelError;

/// The size of a huge page on x86-64 and on AArch64 with 4 KiB pages.
const HUGE_PAGE: usize = 2 << 20;
/// Addresses of a slab that weights share. What no weight has is never touched.
const SLAB: usize = 16 << 20;
/// Blocks as large as this have a slab of their own: the rest of a shared one is smaller than this.
const LARGE: usize = SLAB / 4;
/// Blocks smaller than this come from the allocator, which has such.
const SMALL: usize = 64 << 10;
/// Of blocks inside a slab: a line of the cache.
const ALIGN: usize = 64;

/// An owned block of plain bytes that nobody has written yet.
///
/// Nothing is zeroed here: the threads that fill a weight find its pages in parallel.
#[derive(Debug)]
pub(crate) struct WeightBytes {
    pointer: NonNull<u8>,
    bytes: usize,
    _slab: Arc<Slab>,
}

// SAFETY: owned plain memory, no part of which another block has.
unsafe impl Send for WeightBytes {}
// SAFETY: as above.
unsafe impl Sync for WeightBytes {}

/// Slabs that small blocks are cut from, and how much of each is taken. A block that does not fit leaves the slab to
/// smaller ones: the rest of its last huge page is there whether a weight has it or not.
static SHARED: Mutex<Vec<(Weak<Slab>, usize)>> = Mutex::new(Vec::new());

impl WeightBytes {
    /// So many bytes (at least one), or an error instead of an abort.
    pub fn new(bytes: usize) -> Result<WeightBytes, KernelError> {
        let bytes = bytes.max(1);
        if !(SMALL..LARGE).contains(&bytes) {
            let slab = Arc::new(Slab::new(bytes)?);
            return Ok(WeightBytes { pointer: slab.pointer, bytes, _slab: slab });
        }
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|(slab, taken)| slab.strong_count() > 0 && taken + SMALL <= SLAB);
        let found = shared.iter_mut().find(|(_, taken)| taken + bytes <= SLAB);
        let fitting = found.and_then(|(slab, taken)| Some((slab.upgrade()?, taken)));
        let (slab, start) = match fitting {
            Some((slab, taken)) => {
                let start = *taken;
                *taken += bytes.next_multiple_of(ALIGN);
                (slab, start)
            }
            None => {
                let slab = Arc::new(Slab::new(SLAB)?);
                shared.push((Arc::downgrade(&slab), bytes.next_multiple_of(ALIGN)));
                (slab, 0)
            }
        };
        // SAFETY: inside the slab.
        let pointer = unsafe { slab.pointer.add(start) };
        Ok(WeightBytes { pointer, bytes, _slab: slab })
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn pointer(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// # Safety
    /// All of them have been written.
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: owned, and initialised as the caller says.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.bytes) }
    }
}

/// Memory of one block, or of several.
#[derive(Debug)]
struct Slab {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: only blocks give access to the bytes.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    fn new(bytes: usize) -> Result<Slab, KernelError> {
        let too_large = || KernelError::new("weight", format!("no memory for {bytes} bytes"));
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { ALIGN };
        let layout = Layout::from_size_align(bytes, align).map_err(|_| too_large())?;
        // SAFETY: the layout has a non-zero size.
        let pointer = NonNull::new(unsafe { alloc(layout) }).ok_or_else(too_large)?;
        // Before a byte is touched: a page that is there already stays what it is.
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE {
            let whole = bytes / HUGE_PAGE * HUGE_PAGE;
            // SAFETY: whole pages of our own; advice that fails changes nothing.
            unsafe { libc::madvise(pointer.as_ptr().cast(), whole, libc::MADV_HUGEPAGE) };
        }
        Ok(Slab { pointer, layout })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and no block is left.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_disjoint_and_stay_when_others_go() {
        let sizes =
            [0, 1, 1000, SMALL, SMALL + 1, 3 << 20, 3 << 20, 3 << 20, 3 << 20, 3 << 20, LARGE, SLAB + 5];
        let mut blocks: Vec<WeightBytes> =
            sizes.iter().map(|&size| WeightBytes::new(size).unwrap()).collect();
        for (index, block) in blocks.iter().enumerate() {
            assert_eq!(block.len(), sizes[index].max(1));
            assert_eq!(block.pointer() as usize % ALIGN, 0, "{index}");
            // SAFETY: the block's own bytes.
            unsafe { block.pointer().write_bytes(index as u8, block.len()) };
        }
        blocks.remove(6);
        blocks.remove(4);
        for block in &blocks {
            // SAFETY: written above.
            let bytes = unsafe { block.as_slice() };
            assert!(
                bytes.iter().all(|&byte| byte == bytes[0]) && sizes[bytes[0] as usize].max(1) == bytes.len()
            );
        }
        assert!(WeightBytes::new(usize::MAX / 2 + 2).is_err());
    }
}
