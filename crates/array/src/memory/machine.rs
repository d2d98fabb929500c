//! How much memory this process has and may still take, as far as the system says.
//!
//! What bounds a process is the least of several things: a limit that the person set, memory that nobody uses, the
//! limits of its control groups (containers), and its address space (`ulimit -v`).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The limit on the whole process; `u64::MAX` is none.
static LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Memory that a process may take, still ([`room`]) or in all ([`most`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes.
    pub bytes: u64,
    /// What bounds it.
    pub bound: Bound,
}

/// What bounds the memory of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// [`set_process_limit`].
    Limit(u64),
    /// Memory of the machine that is free or can be freed.
    Machine,
    /// A control group, such as a container's.
    Group,
    /// `ulimit -v`.
    AddressSpace,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Bound::Limit(bytes) => write!(f, "under the limit of {:.2} GB", *bytes as f64 / 1e9),
            Bound::Machine => f.write_str("on this machine"),
            Bound::Group => f.write_str("in this container (control group)"),
            Bound::AddressSpace => f.write_str("in the address space of the process (ulimit -v)"),
        }
    }
}

/// Sets the limit on the memory of the whole process, which [`room`] and [`super::enforce_process_limit`] heed.
pub fn set_process_limit(bytes: u64) {
    LIMIT.store(bytes, Ordering::Relaxed);
}

/// The limit on the memory of the whole process, if one was set.
pub fn process_limit() -> Option<u64> {
    Some(LIMIT.load(Ordering::Relaxed)).filter(|&limit| limit != u64::MAX)
}

/// Bytes of this process that are in memory now; `None` where the system does not say.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The most bytes of this process that were in memory at once; `None` where the system does not say.
pub fn peak_resident() -> Option<u64> {
    status("VmHWM:")
}

/// How much more memory this process may take; `None` where nothing is known.
pub fn room() -> Option<Room> {
    let within_limit = process_limit().map(|limit| Room {
        bytes: limit.saturating_sub(resident().unwrap_or(super::active() as u64)),
        bound: Bound::Limit(limit),
    });
    let machine =
        read_kib("/proc/meminfo", "MemAvailable:").map(|bytes| Room { bytes, bound: Bound::Machine });
    let group = groups().iter().map(Group::room).min().map(|bytes| Room { bytes, bound: Bound::Group });
    let addresses = address_space().and_then(|limit| {
        Some(Room { bytes: limit.saturating_sub(status("VmSize:")?), bound: Bound::AddressSpace })
    });
    least([within_limit, machine, group, addresses])
}

/// How much memory this process may have in all, its own of now included, whoever else uses how much; `None` where
/// nothing is known.
pub fn most() -> Option<Room> {
    let limit = process_limit().map(|bytes| Room { bytes, bound: Bound::Limit(bytes) });
    let machine = total().map(|bytes| Room { bytes, bound: Bound::Machine });
    let group =
        groups().iter().map(|group| group.limit).min().map(|bytes| Room { bytes, bound: Bound::Group });
    let addresses = address_space().map(|bytes| Room { bytes, bound: Bound::AddressSpace });
    least([limit, machine, group, addresses])
}

fn least(bounds: [Option<Room>; 4]) -> Option<Room> {
    bounds.into_iter().flatten().min_by_key(|room| room.bytes)
}

/// Memory of the machine; `None` where the system does not say.
pub fn total() -> Option<u64> {
    read_kib("/proc/meminfo", "MemTotal:")
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn status(key: &str) -> Option<u64> {
    read_kib("/proc/self/status", key)
}

/// `Key:  123 kB` of a file of such lines, in bytes.
fn read_kib(path: &str, key: &str) -> Option<u64> {
    let text = read(path);
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// A control group with a limit on memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    limit: u64,
    /// What of it is used and would not be given up: cached files are, before anything is refused.
    used: u64,
}

impl Group {
    fn room(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

fn groups() -> Vec<Group> {
    groups_of(Path::new("/sys/fs/cgroup"), &read("/proc/self/cgroup"))
}

/// The control groups that this process is in and that limit it, of version 2 or 1. `groups` is the text of
/// `/proc/self/cgroup`: lines `number:controllers:path`.
fn groups_of(root: &Path, groups: &str) -> Vec<Group> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (base, limit, usage, inactive) = match controllers {
            "" => (root.to_path_buf(), "memory.max", "memory.current", "inactive_file "),
            list if list.split(',').any(|name| name == "memory") => (
                root.join("memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file ",
            ),
            _ => continue,
        };
        // Each group above bounds the ones below. In a container the path may be that of the outside, of which
        // only the root is to be seen.
        let below = path.trim_start_matches('/');
        let mut folder: PathBuf = base.join(below);
        loop {
            let number = |name: &str| read(folder.join(name)).trim().parse::<u64>().ok();
            if let (Some(limit), Some(usage)) = (number(limit), number(usage)) {
                let stat = read(folder.join("memory.stat"));
                let cached =
                    stat.lines().find_map(|line| line.strip_prefix(inactive)?.trim().parse::<u64>().ok());
                found.push(Group { limit, used: usage.saturating_sub(cached.unwrap_or(0)) });
            }
            if folder == base || !folder.pop() {
                break;
            }
        }
    }
    // Version 1 says "no limit" with a number near 2⁶³.
    found.retain(|group| group.limit < 1 << 60);
    found
}

/// The limit on addresses, if there is one.
#[cfg(unix)]
fn address_space() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a struct of the type that the call fills.
    let answer = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    (answer == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

#[cfg(not(unix))]
fn address_space() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_groups_of_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("a/memory.max", "1000\n");
        put("a/memory.current", "600\n");
        put("a/memory.stat", "anon 1\ninactive_file 100\n");
        put("a/b/memory.max", "max\n");
        put("a/b/memory.current", "50\n");
        put("memory/c/memory.limit_in_bytes", "5000");
        put("memory/c/memory.usage_in_bytes", "1000");
        put("memory/c/memory.stat", "total_inactive_file 500");
        put("memory/memory.limit_in_bytes", "9223372036854771712");
        put("memory/memory.usage_in_bytes", "0");
        let (v2, v1) = (Group { limit: 1000, used: 500 }, Group { limit: 5000, used: 500 });
        for (name, groups, expected) in [
            ("the group above bounds", "0::/a/b\n", vec![v2]),
            ("version 1", "3:cpu:/x\n4:memory,hugetlb:/c\n", vec![v1]),
            ("no limit in version 1", "4:memory:/\n", vec![]),
            ("a path of the outside", "0::/elsewhere\n", vec![]),
            ("both", "4:memory:/c\n0::/a\n", vec![v1, v2]),
            ("none", "", vec![]),
        ] {
            assert_eq!(groups_of(root.path(), groups), expected, "{name}");
        }
        assert_eq!(v1.room(), 4500);
        assert_eq!(Group { limit: 10, used: 12 }.room(), 0, "over its limit");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_says_how_much_there_is() {
        let (resident, peak) = (resident().unwrap(), peak_resident().unwrap());
        assert!(resident > 100_000 && peak >= resident / 2, "{resident} {peak}");
        let most = most().unwrap();
        assert!(room().unwrap().bytes <= most.bytes, "{most:?}");
        assert!(most.bytes <= total().unwrap(), "{most:?}");
    }
}
