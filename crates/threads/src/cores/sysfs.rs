//! What Linux tells of cores in `/sys/devices` (its Documentation/admin-guide/cputopology.rst).
//!
//! Every function takes the folder, so that machines that are not here can be tested. A file that is missing or is
//! not what it should be means that nothing is known; it is never an error.

use std::path::Path;

use super::Siblings;

/// Cores with at least this part of the largest capacity are performance cores, as quotient. Big and little cores are
/// a factor of two or more apart, big ones among themselves less than a fifth.
const FAST: (u32, u32) = (3, 4);
/// Numbers of CPUs are below this; Linux is built for 8,192 at most.
const CPUS: u32 = 1 << 16;

/// Which of these CPUs, and of their siblings, are one core.
pub fn siblings(devices: &Path, allowed: &[u32]) -> Option<Siblings> {
    let mut first = Vec::new();
    for &cpu in allowed {
        if first.get(cpu as usize).is_some_and(Option::is_some) {
            continue;
        }
        let topology = devices.join(format!("system/cpu/cpu{cpu}/topology"));
        // The name since Linux 5.3, and the one before.
        let core = ["core_cpus_list", "thread_siblings_list"]
            .into_iter()
            .find_map(|name| parse_list(&std::fs::read_to_string(topology.join(name)).ok()?))
            .filter(|core| core.contains(&cpu))?;
        let (least, most) = (*core.iter().min()?, *core.iter().max()?);
        first.resize(first.len().max(most as usize + 1), None);
        core.into_iter().for_each(|cpu| first[cpu as usize] = Some(least));
    }
    Some(Siblings(first))
}

/// Which of these CPUs are of performance cores; all of them if there are no two kinds.
pub fn fast(devices: &Path, allowed: &[u32]) -> Vec<u32> {
    let fast = fast_on_intel(devices, allowed).or_else(|| fast_by_capacity(devices, allowed));
    fast.filter(|fast| !fast.is_empty()).unwrap_or_else(|| allowed.to_vec())
}

/// Intel's hybrid processors count events of the two kinds with two units, each of which lists its CPUs.
fn fast_on_intel(devices: &Path, allowed: &[u32]) -> Option<Vec<u32>> {
    let fast = parse_list(&std::fs::read_to_string(devices.join("cpu_core/cpus")).ok()?)?;
    Some(allowed.iter().copied().filter(|cpu| fast.contains(cpu)).collect())
}

/// Elsewhere (big.LITTLE) each CPU has a capacity, of which the largest on the machine is 1,024.
fn fast_by_capacity(devices: &Path, allowed: &[u32]) -> Option<Vec<u32>> {
    let read = |cpu: &u32| {
        let file = devices.join(format!("system/cpu/cpu{cpu}/cpu_capacity"));
        std::fs::read_to_string(file).ok()?.trim().parse::<u32>().ok()
    };
    let capacities = allowed.iter().map(read).collect::<Option<Vec<u32>>>()?;
    let largest = u64::from(*capacities.iter().max()?);
    let is_fast = |capacity: u32| u64::from(capacity) * u64::from(FAST.1) >= largest * u64::from(FAST.0);
    Some(
        allowed
            .iter()
            .zip(capacities)
            .filter(|(_, capacity)| is_fast(*capacity))
            .map(|(&cpu, _)| cpu)
            .collect(),
    )
}

/// A list such as `0-3,8`, which has at least one number.
fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut list = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        if first > last || last >= CPUS {
            return None;
        }
        list.extend(first..=last);
    }
    Some(list)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// A machine: files below `/sys/devices` with their contents.
    fn machine(files: &[(String, String)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{text}\n")).unwrap();
        }
        folder
    }

    /// Files of a CPU each, for CPUs from 0 on.
    fn of_cpus(name: &str, texts: &[&str]) -> Vec<(String, String)> {
        let file = |(cpu, text): (usize, &&str)| (format!("system/cpu/cpu{cpu}/{name}"), text.to_string());
        texts.iter().enumerate().map(file).collect()
    }

    fn cores(machine: &TempDir, allowed: &[u32]) -> Option<usize> {
        siblings(machine.path(), allowed)?.count(&fast(machine.path(), allowed))
    }

    const OLD: &str = "topology/thread_siblings_list";
    const NEW: &str = "topology/core_cpus_list";

    #[test]
    fn cores_are_counted_among_those_allowed() {
        let intel = [
            of_cpus(NEW, &["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"]),
            vec![
                ("cpu_core/cpus".to_string(), "0-3".to_string()),
                ("cpu_atom/cpus".to_string(), "4-7".to_string()),
            ],
        ]
        .concat();
        let arm = [
            of_cpus(NEW, &["0", "1", "2", "3", "4", "5"]),
            of_cpus("cpu_capacity", &["250", "250", "250", "250", "870", "1024"]),
        ]
        .concat();
        let alike = [of_cpus(OLD, &["0", "1"]), of_cpus("cpu_capacity", &["1024", "1024"])].concat();
        let odd = [of_cpus(OLD, &["0", "1"]), of_cpus("cpu_capacity", &["1024", "big"])].concat();
        let no_fast = [of_cpus(OLD, &["0", "1"]), vec![("cpu_core/cpus".into(), "x".into())]].concat();
        let gap = of_cpus(NEW, &["0", "", "2"]);
        let cases: [(&str, &[(String, String)], &[u32], Option<usize>); 20] = [
            ("no SMT", &of_cpus(NEW, &["0", "1", "2", "3"]), &[0, 1, 2, 3], Some(4)),
            ("no SMT, half", &of_cpus(NEW, &["0", "1", "2", "3"]), &[1, 3], Some(2)),
            ("SMT, interleaved", &of_cpus(NEW, &["0,2", "1,3", "0,2", "1,3"]), &[0, 1, 2, 3], Some(2)),
            ("SMT, adjacent", &of_cpus(OLD, &["0-1", "0-1", "2-3", "2-3"]), &[0, 1, 2, 3], Some(2)),
            ("one sibling of each", &of_cpus(OLD, &["0-1", "0-1", "2-3", "2-3"]), &[1, 3], Some(2)),
            ("both of one core", &of_cpus(OLD, &["0-1", "0-1", "2-3", "2-3"]), &[2, 3], Some(1)),
            ("one sibling", &of_cpus(NEW, &["0,2", "1,3", "0,2", "1,3"]), &[2], Some(1)),
            ("four siblings", &of_cpus(NEW, &["0-3", "0-3", "0-3", "0-3"]), &[0, 1, 2, 3], Some(1)),
            ("hybrid", &intel, &[0, 1, 2, 3, 4, 5, 6, 7], Some(2)),
            ("hybrid, one P core", &intel, &[1, 6, 7], Some(1)),
            ("hybrid, only E cores", &intel, &[5, 6, 7], Some(3)),
            ("hybrid, its list is broken", &no_fast, &[0, 1], Some(2)),
            ("big.LITTLE", &arm, &[0, 1, 2, 3, 4, 5], Some(2)),
            ("big.LITTLE, only little", &arm, &[0, 1, 3], Some(3)),
            ("one capacity", &alike, &[0, 1], Some(2)),
            ("a capacity that is none", &odd, &[0, 1], Some(2)),
            ("no files", &[], &[0, 1], None),
            ("a file is missing", &of_cpus(NEW, &["0"]), &[0, 1], None),
            ("a list is empty", &gap, &[0, 1, 2], None),
            ("a list of others", &of_cpus(NEW, &["0", "0"]), &[0, 1], None),
        ];
        for (name, files, allowed, expected) in cases {
            assert_eq!(cores(&machine(files), allowed), expected, "{name}");
        }
        let newer_is_broken = [of_cpus(NEW, &["x", "x"]), of_cpus(OLD, &["0-1", "0-1"])].concat();
        assert_eq!(cores(&machine(&newer_is_broken), &[0, 1]), Some(1), "the old name serves");
    }

    #[test]
    fn siblings_are_known_also_where_only_one_is_allowed() {
        let machine = machine(&of_cpus(NEW, &["0,2", "1,3", "0,2", "1,3"]));
        let siblings = siblings(machine.path(), &[3]).unwrap();
        assert_eq!([0, 1, 2, 3].map(|cpu| siblings.core_of(cpu)), [0, 1, 2, 1]);
    }

    #[test]
    fn lists_are_read_or_refused() {
        let cases: [(&str, Option<&[u32]>); 13] = [
            ("0-3,8", Some(&[0, 1, 2, 3, 8])),
            ("0", Some(&[0])),
            ("0,2-3\n", Some(&[0, 2, 3])),
            ("7-7", Some(&[7])),
            ("", None),
            ("\n", None),
            ("x", None),
            ("3-0", None),
            ("1-", None),
            ("-1", None),
            ("0,,1", None),
            ("0-4294967295", None),
            ("0-9999999999", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_list(text).as_deref(), expected, "{text:?}");
        }
    }
}
