//! Which core a thread runs on.
//!
//! A kernel that wakes a worker often puts it on the core of the thread that woke it, where the two take
//! turns until some balancing moves one: for milliseconds or for good, while another core idles. So a worker
//! that finds itself on the core of another goes elsewhere. Threads are not bound: a neighbour's load, or a
//! mask from outside, still moves them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where each worker was when it last looked.
pub(crate) struct Places(Vec<AtomicU32>);

const UNKNOWN: u32 = u32::MAX;
/// How long a worker stays where it went, whoever else comes there.
const REST: Duration = Duration::from_millis(1);

impl Places {
    pub fn new(threads: usize) -> Places {
        Places((0..threads).map(|_| AtomicU32::new(UNKNOWN)).collect())
    }

    /// Notes where this worker is. Whether one before it is there too.
    pub fn note(&self, worker: usize) -> bool {
        let Some(core) = core() else { return false };
        if self.0[worker].load(Ordering::Relaxed) != core {
            self.0[worker].store(core, Ordering::Relaxed);
        }
        self.0[..worker].iter().any(|other| other.load(Ordering::Relaxed) == core)
    }

    /// Moves this worker to a core on which no other worker was seen, if there is one that it may use.
    /// `moved` is when it last did.
    pub fn go_elsewhere(&self, worker: usize, moved: &mut Option<Instant>) {
        if moved.is_some_and(|moved| moved.elapsed() < REST) {
            return;
        }
        *moved = Some(Instant::now());
        let others = self.0.iter().enumerate().filter(|(other, _)| *other != worker);
        avoid(others.map(|(_, core)| core.load(Ordering::Relaxed)));
        self.note(worker);
    }
}

#[cfg(target_os = "linux")]
fn core() -> Option<u32> {
    // SAFETY: only asks.
    u32::try_from(unsafe { libc::sched_getcpu() }).ok()
}

#[cfg(not(target_os = "linux"))]
fn core() -> Option<u32> {
    None
}

/// Takes this thread off these cores, unless it may use no others; it may come back later.
#[cfg(target_os = "linux")]
fn avoid(cores: impl Iterator<Item = u32>) {
    let bytes = size_of::<libc::cpu_set_t>();
    // SAFETY: a set of cores is bits; the calls read and write one of that size, of this thread. Cores past
    // its end are not asked for.
    unsafe {
        let mut all: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, bytes, &mut all) != 0 {
            return;
        }
        let mut left = all;
        cores
            .map(|core| core as usize)
            .filter(|&core| core < 8 * bytes)
            .for_each(|core| libc::CPU_CLR(core, &mut left));
        if libc::CPU_COUNT(&left) > 0 && libc::CPU_COUNT(&left) < libc::CPU_COUNT(&all) {
            // The first call moves the thread, the second only lets it go again.
            libc::sched_setaffinity(0, bytes, &left);
            libc::sched_setaffinity(0, bytes, &all);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn avoid(_: impl Iterator<Item = u32>) {}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    fn allowed() -> Vec<usize> {
        // SAFETY: as in `avoid`.
        unsafe {
            let mut all: libc::cpu_set_t = std::mem::zeroed();
            assert_eq!(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut all), 0);
            (0..1024).filter(|&core| libc::CPU_ISSET(core, &all)).collect()
        }
    }

    #[test]
    fn a_thread_moves_and_keeps_its_mask() {
        let before = allowed();
        let places = Places::new(2);
        // Worker 0 stands where this thread is.
        assert!(!places.note(0));
        places.0[1].store(places.0[0].load(Ordering::Relaxed), Ordering::Relaxed);
        let mut moved = None;
        places.go_elsewhere(1, &mut moved);
        assert_eq!(allowed(), before);
        assert!(moved.is_some());
        // With all cores taken it stays.
        avoid(0..1024);
        assert_eq!(allowed(), before);
        avoid([UNKNOWN].into_iter());
        assert_eq!(allowed(), before);
    }
}
