//! Starting a thread where memory is short.
//!
//! A thread that has been started takes memory for itself before it runs anything, for the stack on which overflows of
//! its stack are handled, and can only abort the process if there is none. So a thread is started only if more than its
//! stack is left, and the next one once it runs.

use std::io;
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;

/// What a thread's stack takes.
#[cfg(unix)]
const STACK: usize = 2 << 20;
/// What is to be left behind that: more than the thread takes besides.
#[cfg(unix)]
const REST: usize = 1 << 20;

/// Starts a thread and waits until it runs.
pub(crate) fn start(name: String, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    look_for_room()?;
    let running = Arc::new(Barrier::new(2));
    let is_running = running.clone();
    let handle = std::thread::Builder::new().name(name).spawn(move || {
        is_running.wait();
        work();
    })?;
    running.wait();
    Ok(handle)
}

/// Whether addresses for a thread are left.
#[cfg(unix)]
fn look_for_room() -> io::Result<()> {
    let bytes = STACK + REST;
    // SAFETY: a mapping of its own that nobody uses, and that goes at once.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANON,
            -1,
            0,
        );
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::munmap(at, bytes);
    }
    Ok(())
}

#[cfg(not(unix))]
fn look_for_room() -> io::Result<()> {
    Ok(())
}
