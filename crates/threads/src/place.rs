//! Which core a thread runs on.
//!
//! A kernel that wakes a worker often puts it on the core of the thread that woke it, where the two take
//! turns until some balancing moves one: for milliseconds or for good, while another core idles. So a worker
//! that finds itself on the core of another goes elsewhere. The siblings of a physical core ([`Siblings`]) are
//! one core here, as long as there are others. Threads are not bound: a neighbour's load, or a mask from
//! outside, still moves them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::cores::Siblings;

/// Where each worker was when it last looked: `core << 32 | CPU`.
pub(crate) struct Places {
    places: Vec<AtomicU64>,
    siblings: &'static Siblings,
}

const UNKNOWN: u64 = u64::MAX;
/// How long a worker stays where it went, whoever else comes there.
const REST: Duration = Duration::from_millis(1);

impl Places {
    pub fn new(threads: usize) -> Places {
        let places = (0..threads).map(|_| AtomicU64::new(UNKNOWN)).collect();
        Places { places, siblings: Siblings::known() }
    }

    /// Notes where this worker is. Whether one before it is on the same core.
    pub fn note(&self, worker: usize) -> bool {
        let Some(cpu) = cpu() else { return false };
        let core = self.siblings.core_of(cpu);
        let place = u64::from(core) << 32 | u64::from(cpu);
        if self.places[worker].load(Ordering::Relaxed) != place {
            self.places[worker].store(place, Ordering::Relaxed);
        }
        self.places[..worker].iter().any(|other| core_in(other.load(Ordering::Relaxed)) == core)
    }

    /// Moves this worker to a core on which no other worker was seen, if there is one that it may use. With
    /// more workers than cores, it only leaves the CPU of another. `moved` is when it last did.
    pub fn go_elsewhere(&self, worker: usize, moved: &mut Option<Instant>) {
        if moved.is_some_and(|moved| moved.elapsed() < REST) {
            return;
        }
        *moved = Some(Instant::now());
        let mine = self.places[worker].load(Ordering::Relaxed);
        let seen = self.places.iter().map(|place| place.load(Ordering::Relaxed)).enumerate();
        let others: Vec<u64> = seen
            .filter(|&(other, place)| other != worker && place != UNKNOWN)
            .map(|(_, place)| place)
            .collect();
        let cores = others.iter().flat_map(|&place| self.siblings.cpus_of(core_in(place)));
        if avoid(cores) || (others.contains(&mine) && avoid(others.iter().map(|&place| cpu_in(place)))) {
            self.note(worker);
        }
    }
}

fn core_in(place: u64) -> u32 {
    (place >> 32) as u32
}

fn cpu_in(place: u64) -> u32 {
    place as u32
}

#[cfg(target_os = "linux")]
fn cpu() -> Option<u32> {
    // SAFETY: only asks.
    u32::try_from(unsafe { libc::sched_getcpu() }).ok()
}

#[cfg(not(target_os = "linux"))]
fn cpu() -> Option<u32> {
    None
}

/// Takes this thread off these CPUs; it may come back later. Not done if it may use no others.
#[cfg(target_os = "linux")]
fn avoid(cpus: impl Iterator<Item = u32>) -> bool {
    let bytes = size_of::<libc::cpu_set_t>();
    let Some(all) = crate::cores::allowed() else { return false };
    let mut left = all;
    // SAFETY: the sets have that size, and CPUs past their end are left out; the calls are for this thread.
    unsafe {
        cpus.map(|cpu| cpu as usize)
            .filter(|&cpu| cpu < 8 * bytes)
            .for_each(|cpu| libc::CPU_CLR(cpu, &mut left));
        if libc::CPU_COUNT(&left) == 0 || libc::CPU_COUNT(&left) == libc::CPU_COUNT(&all) {
            return false;
        }
        // The first call moves the thread, the second only lets it go again.
        libc::sched_setaffinity(0, bytes, &left);
        libc::sched_setaffinity(0, bytes, &all);
    }
    true
}

#[cfg(not(target_os = "linux"))]
fn avoid(_: impl Iterator<Item = u32>) -> bool {
    false
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    fn allowed() -> Vec<u32> {
        let set = crate::cores::allowed().unwrap();
        // SAFETY: the numbers are below the bits of a set.
        (0..1024).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu as usize, &set) }).collect()
    }

    /// All CPUs of this machine as siblings of the first `cores` ones, in turns.
    fn places(threads: usize, cores: u32) -> Places {
        let first = |cpu: &u32| (cpu % cores) as usize;
        let allowed = allowed();
        let of = |cpu: u32| allowed.iter().position(|other| *other == cpu).map(|at| at as u32);
        let siblings = (0..1024).map(|cpu| Some(allowed[first(&of(cpu)?)])).collect();
        Places { siblings: Box::leak(Box::new(Siblings(siblings))), ..Places::new(threads) }
    }

    #[test]
    fn a_thread_moves_and_keeps_its_mask() {
        let before = allowed();
        let places = places(2, before.len() as u32);
        // Worker 0 stands where this thread is.
        assert!(!places.note(0));
        places.places[1].store(places.places[0].load(Ordering::Relaxed), Ordering::Relaxed);
        let mut moved = None;
        places.go_elsewhere(1, &mut moved);
        assert_eq!(allowed(), before);
        assert!(moved.is_some());
        // With all CPUs taken it stays.
        assert!(!avoid(0..1024));
        assert_eq!(allowed(), before);
        assert!(!avoid([u32::MAX].into_iter()));
        assert_eq!(allowed(), before);
    }

    #[test]
    fn siblings_are_one_core_while_there_are_others() {
        let cpus = allowed();
        for cores in 1..=cpus.len().min(4) {
            let places = places(3, cores as u32);
            let core = |cpu: u32| places.siblings.core_of(cpu);
            // Worker 0 stands on the first core, on the CPU that is its last.
            let taken = *cpus.iter().rev().find(|&&cpu| core(cpu) == core(cpus[0])).unwrap();
            places.places[0].store(u64::from(core(taken)) << 32 | u64::from(taken), Ordering::Relaxed);
            // Load may bring a thread back before it looks, but not each time.
            let went = (0..50).any(|_| {
                // SAFETY: as in `avoid`.
                unsafe {
                    let (bytes, all) = (size_of::<libc::cpu_set_t>(), crate::cores::allowed().unwrap());
                    let mut one: libc::cpu_set_t = std::mem::zeroed();
                    libc::CPU_SET(taken as usize, &mut one);
                    libc::sched_setaffinity(0, bytes, &one);
                    libc::sched_setaffinity(0, bytes, &all);
                }
                if places.note(2) {
                    places.go_elsewhere(2, &mut None);
                }
                assert_eq!(allowed(), cpus, "{cores} cores");
                let place = places.places[2].load(Ordering::Relaxed);
                if cores > 1 { core_in(place) != core(taken) } else { cpu_in(place) != taken }
            });
            assert_eq!(went, cpus.len() > 1, "{cores} cores of {cpus:?}");
        }
    }
}
