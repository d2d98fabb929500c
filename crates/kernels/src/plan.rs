//! Kernels that are several tasks with shared temporary memory between them.

use mica_threads::Task;

/// A checked kernel that waits for its temporary memory.
///
/// The caller provides [`Plan::workspace_bytes`] of memory aligned to 64 and gets the tasks, to
/// be run in their order (with barriers between them, as [`mica_threads::Pool::run`] does).
pub struct Plan {
    bytes: usize,
    build: Box<dyn FnOnce(Workspace, &mut Vec<Box<dyn Task>>) + Send>,
}

impl Plan {
    pub(crate) fn new(
        bytes: usize,
        build: impl FnOnce(Workspace, &mut Vec<Box<dyn Task>>) + Send + 'static,
    ) -> Plan {
        Plan { bytes, build: Box::new(build) }
    }

    /// How much memory the tasks share. May be zero.
    pub fn workspace_bytes(&self) -> usize {
        self.bytes
    }

    /// Appends the tasks to a list.
    ///
    /// # Safety
    /// `workspace` is aligned to 64, valid for [`Plan::workspace_bytes`] (any contents), and used
    /// by nothing else until the tasks have run. It may be anything if that is zero.
    pub unsafe fn tasks(self, workspace: *mut u8, list: &mut Vec<Box<dyn Task>>) {
        (self.build)(Workspace(workspace), list)
    }
}

/// A pointer to shared temporary memory, sent between workers that write disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct Workspace(pub *mut u8);

// SAFETY: the tasks that share it write disjoint places, or are separated by a barrier.
unsafe impl Send for Workspace {}
// SAFETY: as above.
unsafe impl Sync for Workspace {}

impl Workspace {
    /// The f32 values that begin `offset` values into the memory.
    pub fn f32s(self, offset: usize) -> *mut f32 {
        self.0.cast::<f32>().wrapping_add(offset)
    }
}

/// Runs a plan on a pool with fresh, poisoned memory.
#[cfg(test)]
pub(crate) fn run_plan(pool: &mica_threads::Pool, plan: Plan) {
    let mut list = Vec::new();
    let words = plan.workspace_bytes().div_ceil(8) + 8;
    let mut memory = vec![u64::from_ne_bytes([0xff; 8]); words];
    let pointer = memory.as_mut_ptr().cast::<u8>();
    let pointer = pointer.wrapping_add(pointer.align_offset(64));
    // SAFETY: aligned, large enough with the spare 64 bytes, and alive until the pool is done.
    unsafe { plan.tasks(pointer, &mut list) };
    pool.run(&list).expect("no task panics");
    drop(memory);
}
