//! Workspace and running for tests and stand-alone use; the array backend has its own.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use mica_threads::{Pool, Task};

use crate::KernelError;

const ALIGN: usize = 64;
/// From this size on, memory is aligned to huge pages and the system is asked to use them.
const HUGE: usize = 2 << 20;

/// Zeroed bytes aligned to 64.
pub struct WorkspaceBuf {
    pointer: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the bytes are owned.
unsafe impl Send for WorkspaceBuf {}
// SAFETY: shared handles give no access to the bytes.
unsafe impl Sync for WorkspaceBuf {}

impl WorkspaceBuf {
    /// So many bytes; zero allocates nothing.
    pub fn new(bytes: usize) -> WorkspaceBuf {
        if bytes == 0 {
            return WorkspaceBuf { pointer: NonNull::<u128>::dangling().cast(), bytes };
        }
        let layout = layout(bytes);
        // SAFETY: the layout has a size.
        let pointer = unsafe { alloc(layout) };
        let Some(pointer) = NonNull::new(pointer) else { handle_alloc_error(layout) };
        #[cfg(target_os = "linux")]
        if layout.align() == HUGE {
            // SAFETY: whole pages of our own allocation; advice that fails changes nothing.
            unsafe { libc::madvise(pointer.as_ptr().cast(), bytes / HUGE * HUGE, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the allocation has so many bytes.
        unsafe { pointer.write_bytes(0, bytes) };
        WorkspaceBuf { pointer, bytes }
    }

    /// The first byte.
    pub fn pointer(&mut self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for WorkspaceBuf {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.pointer.as_ptr(), layout(self.bytes)) }
        }
    }
}

fn layout(bytes: usize) -> Layout {
    let align = if bytes >= HUGE { HUGE } else { ALIGN };
    Layout::from_size_align(bytes, align).expect("workspaces are far below isize::MAX")
}

/// Runs a task list; a panic in a task becomes a [`KernelError`].
pub fn run(pool: &Pool, tasks: &[Box<dyn Task + '_>]) -> Result<(), KernelError> {
    pool.run(tasks).map_err(|panic| KernelError::new("run", panic.to_string()))
}
