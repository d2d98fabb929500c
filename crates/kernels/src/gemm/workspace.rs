//! Workspace and running for tests and stand-alone use; the array backend has its own.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use mica_threads::{Pool, Task};

use crate::KernelError;

const ALIGN: usize = 64;

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
        let layout = Layout::from_size_align(bytes, ALIGN).expect("workspaces are far below isize::MAX");
        // SAFETY: the layout has a size.
        let pointer = unsafe { alloc_zeroed(layout) };
        let Some(pointer) = NonNull::new(pointer) else { handle_alloc_error(layout) };
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
            let layout = Layout::from_size_align(self.bytes, ALIGN).expect("checked when it was allocated");
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.pointer.as_ptr(), layout) }
        }
    }
}

/// Runs a task list; a panic in a task becomes a [`KernelError`].
pub fn run(pool: &Pool, tasks: &[Box<dyn Task + '_>]) -> Result<(), KernelError> {
    pool.run(tasks).map_err(|panic| KernelError::new("run", panic.to_string()))
}
