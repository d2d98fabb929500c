//! Ctrl-C: once asks what runs to save or clean up and stop, twice ends the program at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The exit code of the signal that came last; 0 if none did.
static CODE: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// A flag that the first SIGINT or SIGTERM sets; the second ends the program with 130 or 143.
pub fn stop_flag() -> std::io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let last = CODE.get_or_init(Arc::default);
    for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
        // In this order: the first signal finds the flag unset, and sets it.
        flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))?;
        flag::register_usize(signal, Arc::clone(last), code as usize)?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// 130 or 143 if a signal asked to stop.
pub fn code() -> Option<u8> {
    let code = CODE.get()?.load(Ordering::Relaxed);
    u8::try_from(code).ok().filter(|&code| code > 0)
}
