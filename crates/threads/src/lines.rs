//! What a worker that waits can do for the next task: ask for the memory that the task begins with.

/// Memory that may be worth asking for. It need not be there any more when it is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Lines {
    next: *const u8,
    left: usize,
}

impl Default for Lines {
    fn default() -> Lines {
        Lines { next: std::ptr::null(), left: 0 }
    }
}

impl Lines {
    /// So many bytes from `start` on.
    pub fn new(start: *const u8, bytes: usize) -> Lines {
        Lines { next: start, left: bytes.div_ceil(LINE) }
    }

    /// Asks for some of it.
    pub(crate) fn ask(&mut self, lines: usize) {
        let count = lines.min(self.left);
        for _ in 0..count {
            prefetch(self.next);
            self.next = self.next.wrapping_add(LINE);
        }
        self.left -= count;
    }
}

const LINE: usize = 64;

/// Asks for a line, into the second-level cache.
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch touches nothing and cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{}]", in(reg) at, options(nomem, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}
