//! The bytes of packed tiles: zeroed, aligned, and on huge pages where the system has them.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::KernelError;

/// The size of a huge page on x86-64 and on AArch64 with 4 KiB pages.
const HUGE_PAGE: usize = 2 << 20;

/// An owned block of plain bytes.
#[derive(Debug)]
pub(super) struct TileBytes {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owned plain memory.
unsafe impl Send for TileBytes {}
// SAFETY: as above.
unsafe impl Sync for TileBytes {}

impl TileBytes {
    /// `bytes` zero bytes (at least one), or an error instead of an abort.
    pub fn zeroed(bytes: usize) -> Result<TileBytes, KernelError> {
        let too_large = || KernelError::new("quantized weight", format!("no memory for {bytes} bytes"));
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 64 };
        let layout = Layout::from_size_align(bytes.max(1), align).map_err(|_| too_large())?;
        // SAFETY: the layout has a non-zero size.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(too_large)?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE {
            // SAFETY: advice about pages that are wholly ours; failure changes nothing.
            unsafe { libc::madvise(pointer.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(TileBytes { pointer, layout })
    }

    pub fn len(&self) -> usize {
        self.layout.size()
    }

    pub fn pointer(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: owned and initialised.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len()) }
    }
}

impl Drop for TileBytes {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) }
    }
}
