//! Which cores compute: how many threads there are if nobody says, and which logical CPUs are one core.
//!
//! Two threads on the two siblings of a physical core share its arithmetic and its caches, and a product that is cut
//! in equal parts ends with its slowest core. So there is a thread for each physical core, and on processors with
//! cores of two kinds for each performance core, among those that this process may use. Threads are not bound to
//! them: that the fast cores are taken first is left to the system.

#[cfg(any(target_os = "linux", test))]
mod sysfs;

#[cfg(target_os = "linux")]
use std::path::Path;
use std::sync::OnceLock;

/// How many threads compute if nobody says: as many as there are physical cores, on hybrid processors performance
/// cores, that this process may use. At least one, and never more than
/// [`available_parallelism`](std::thread::available_parallelism), which knows the quotas of control groups, and which
/// is the answer where the system does not tell cores apart.
pub fn default_threads() -> usize {
    let most = std::thread::available_parallelism().map_or(1, |count| count.get());
    fast_cores().map_or(most, |cores| cores.clamp(1, most))
}

/// Which logical CPUs are one physical core: by CPU, the first CPU of its core.
#[derive(Debug, Default)]
pub(crate) struct Siblings(pub Vec<Option<u32>>);

impl Siblings {
    /// Those of this machine, as it was when first asked. Where the system does not say, none.
    pub fn known() -> &'static Siblings {
        static KNOWN: OnceLock<Siblings> = OnceLock::new();
        KNOWN.get_or_init(|| read_siblings().unwrap_or_default())
    }

    /// The core of a CPU; one of which nothing is known is its own.
    pub fn core_of(&self, cpu: u32) -> u32 {
        self.0.get(cpu as usize).copied().flatten().unwrap_or(cpu)
    }

    /// The CPUs of a core.
    pub fn cpus_of(&self, core: u32) -> impl Iterator<Item = u32> {
        let siblings = (0..).zip(&self.0).filter(move |(_, first)| **first == Some(core));
        // A core of which nothing is known is one CPU.
        std::iter::once(core).chain(siblings.map(|(cpu, _)| cpu))
    }

    /// How many cores these CPUs are; `None` if it is not known of all.
    #[cfg(any(target_os = "linux", test))]
    fn count(&self, cpus: &[u32]) -> Option<usize> {
        let cores = cpus.iter().map(|&cpu| self.0.get(cpu as usize).copied().flatten());
        Some(cores.collect::<Option<std::collections::BTreeSet<u32>>>()?.len())
    }
}

#[cfg(target_os = "linux")]
const DEVICES: &str = "/sys/devices";

#[cfg(target_os = "linux")]
fn fast_cores() -> Option<usize> {
    Siblings::known().count(&sysfs::fast(Path::new(DEVICES), &numbers(&allowed()?)))
}

#[cfg(target_os = "linux")]
fn read_siblings() -> Option<Siblings> {
    sysfs::siblings(Path::new(DEVICES), &numbers(&allowed()?))
}

/// The logical CPUs that this thread may use; `None` if there are more than the set holds (1,024).
#[cfg(target_os = "linux")]
pub(crate) fn allowed() -> Option<libc::cpu_set_t> {
    // SAFETY: a set of CPUs is bits, of which none is a set too; the call writes one of that size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        (libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) == 0).then_some(set)
    }
}

#[cfg(target_os = "linux")]
fn numbers(set: &libc::cpu_set_t) -> Vec<u32> {
    // SAFETY: the numbers are below the bits of a set.
    (0..8 * size_of::<libc::cpu_set_t>())
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, set) })
        .map(|cpu| cpu as u32)
        .collect()
}

/// Performance cores are level 0; processors of one kind, and older systems, have no levels.
#[cfg(target_os = "macos")]
fn fast_cores() -> Option<usize> {
    [c"hw.perflevel0.physicalcpu", c"hw.physicalcpu"].into_iter().find_map(|name| {
        let (mut count, mut bytes) = (0i32, size_of::<i32>());
        // SAFETY: the name ends with a zero; the call writes at most `bytes` bytes, which the number has.
        let status = unsafe {
            libc::sysctlbyname(
                name.as_ptr(),
                (&raw mut count).cast(),
                &raw mut bytes,
                std::ptr::null_mut(),
                0,
            )
        };
        usize::try_from(count).ok().filter(|&count| status == 0 && bytes == size_of::<i32>() && count > 0)
    })
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn fast_cores() -> Option<usize> {
    None
}

#[cfg(not(target_os = "linux"))]
fn read_siblings() -> Option<Siblings> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_default_within_what_the_system_grants() {
        let most = std::thread::available_parallelism().map_or(1, |count| count.get());
        assert!((1..=most).contains(&default_threads()), "{} of {most}", default_threads());
    }

    #[test]
    fn a_cpu_of_which_nothing_is_known_is_its_own_core() {
        let siblings = Siblings(vec![Some(0), None, Some(0), Some(3)]);
        let cases: [(u32, u32, &[u32]); 5] =
            [(0, 0, &[0, 2]), (1, 1, &[1]), (2, 0, &[0, 2]), (3, 3, &[3]), (9, 9, &[9])];
        for (cpu, core, cpus) in cases {
            assert_eq!(siblings.core_of(cpu), core, "CPU {cpu}");
            let mut got: Vec<u32> = siblings.cpus_of(core).collect();
            got.sort_unstable();
            got.dedup();
            assert_eq!(got, cpus, "CPU {cpu}");
        }
        assert_eq!(siblings.count(&[0, 2, 3]), Some(2));
        assert_eq!(siblings.count(&[0, 1]), None);
        assert_eq!(siblings.count(&[0, 4]), None);
    }
}
