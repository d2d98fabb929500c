//! Memory whose reading is the ceiling of what moves bytes, and how much of it there has to be.

use std::hint::black_box;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use mica_threads::{FnTask, Pool, Scratch, Task};

use crate::seconds;

/// Of a block this many times as large as the last caches, hardly anything is found there when it is read again.
const CACHES: usize = 8;
/// A pass should take milliseconds also where caches are small.
const SHORTEST: usize = 128 << 20;
/// However large the caches are, half a second of a slow machine's reading is enough for the five passes.
const LONGEST: usize = 1 << 30;
/// What is read where nobody says how large the caches are, and what has to do where they are very large: with less,
/// a bandwidth would be that of the caches.
const USUAL: usize = 512 << 20;

/// How many bytes to measure read bandwidth on, if so many may still be taken (`None`: as many as one likes). At most
/// half of that, since others want memory too; `None` if it would be too little to say anything about memory.
pub fn block_bytes(room: Option<u64>) -> Option<usize> {
    fitting(last_caches(Path::new("/sys/devices/system/cpu")), room)
}

fn fitting(caches: Option<usize>, room: Option<u64>) -> Option<usize> {
    let wanted = caches.map_or(USUAL, |caches| caches.saturating_mul(CACHES)).clamp(SHORTEST, LONGEST);
    let most = room.map_or(wanted, |room| usize::try_from(room / 2).unwrap_or(usize::MAX));
    Some(wanted.min(most)).filter(|&bytes| bytes >= wanted.min(USUAL))
}

/// Bytes of the last caches of all processors together; `None` where the system does not say.
fn last_caches(processors: &Path) -> Option<usize> {
    // Those that share a cache name the same list; each is counted once.
    let mut found: Vec<(String, usize)> = Vec::new();
    for processor in std::fs::read_dir(processors).ok()?.flatten() {
        let Ok(caches) = std::fs::read_dir(processor.path().join("cache")) else { continue };
        let described = caches.flatten().filter_map(|cache| {
            let text =
                |name: &str| Some(std::fs::read_to_string(cache.path().join(name)).ok()?.trim().to_string());
            let level: u32 = text("level")?.parse().ok()?;
            Some((level, text("shared_cpu_list")?, size(&text("size")?)?))
        });
        let Some((_, shared, bytes)) = described.max_by_key(|(level, ..)| *level) else { continue };
        if !found.iter().any(|(known, _)| *known == shared) {
            found.push((shared, bytes));
        }
    }
    (!found.is_empty()).then(|| found.iter().fold(0usize, |sum, (_, bytes)| sum.saturating_add(*bytes)))
}

/// `32768K` or `32M` in bytes.
fn size(text: &str) -> Option<usize> {
    let units = [("K", 1 << 10), ("M", 1 << 20), ("", 1)];
    let (number, unit) = units.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)))?;
    number.parse::<usize>().ok()?.checked_mul(*unit)
}

/// Memory to read from, far larger than the caches should be.
pub struct Block(Vec<u64>);

impl Block {
    /// Memory of so many bytes, all of it touched, each part by a thread of the pool: on a machine of several nodes a
    /// part then lies near a thread that reads it. `None` if the system does not give it.
    pub fn new(bytes: usize, pool: &Pool) -> Option<Block> {
        let (mut words, length) = (Vec::new(), bytes / 8);
        words.try_reserve_exact(length).ok()?;
        let share = share(length, pool.threads());
        let parts: Vec<Mutex<&mut [MaybeUninit<u64>]>> =
            words.spare_capacity_mut()[..length].chunks_mut(share.max(1)).map(Mutex::new).collect();
        let work = |part: usize, _: &mut Scratch| {
            for word in parts[part].lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
                word.write(1);
            }
        };
        let tasks: [Box<dyn Task + '_>; 1] = [Box::new(FnTask::new("touch", parts.len(), work))];
        pool.run(&tasks).ok()?;
        drop(tasks);
        drop(parts);
        // SAFETY: so many words are within the capacity, and the parts, which cover them, were all written: a run
        // that was cut short has returned above.
        unsafe { words.set_len(length) };
        Some(Block(words))
    }

    /// GB/s of one pass in which every thread reads four streams, so that the memory system always has requests in
    /// flight.
    pub fn read(&self, pool: &Pool) -> f64 {
        let threads = pool.threads();
        let share = share(self.0.len(), threads);
        let work = |thread: usize, _: &mut Scratch| {
            black_box(sum(&self.0[thread * share..][..share]));
        };
        let tasks: [Box<dyn Task + '_>; 1] = [Box::new(FnTask::new("read", threads, work))];
        (share * threads * 8) as f64 / seconds(|| pool.run(&tasks).expect("reading can't fail")) / 1e9
    }

    /// The median of some passes.
    pub fn bandwidth(&self, pool: &Pool) -> f64 {
        let mut rates: Vec<f64> = (0..5).map(|_| self.read(pool)).collect();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    }
}

/// Words of a thread's part: whole groups of those that [`sum`] adds at once.
fn share(words: usize, threads: usize) -> usize {
    words / threads / 32 * 32
}

/// Adds four streams at once.
fn sum(words: &[u64]) -> u64 {
    let quarter = words.len() / 4;
    let (a, rest) = words.split_at(quarter);
    let (b, rest) = rest.split_at(quarter);
    let (c, d) = rest.split_at(quarter);
    let mut sums = [0u64; 8];
    for (((a, b), c), d) in
        a.chunks_exact(8).zip(b.chunks_exact(8)).zip(c.chunks_exact(8)).zip(d.chunks_exact(8))
    {
        for i in 0..8 {
            sums[i] = sums[i].wrapping_add(a[i]).wrapping_add(b[i]).wrapping_add(c[i]).wrapping_add(d[i]);
        }
    }
    sums.iter().fold(0, |sum, value| sum.wrapping_add(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn all_words_are_touched_and_read() {
        assert_eq!(sum(&(0..64).collect::<Vec<u64>>()), 63 * 64 / 2);
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads);
            // Also a size that its parts do not divide.
            for bytes in [1 << 16, (1 << 16) + 8 * 5] {
                let block = Block::new(bytes, &pool).expect("64 KiB");
                assert_eq!(block.0, vec![1; bytes / 8], "{threads} threads, {bytes} bytes");
                assert!(block.bandwidth(&pool) > 0.0, "{threads} threads, {bytes} bytes");
            }
        }
        assert!(Block::new(usize::MAX, &Pool::new(1)).is_none());
    }

    #[test]
    fn a_block_is_far_larger_than_caches_and_leaves_half_of_the_room() {
        let gib = 1024 * MIB;
        for (name, caches, room, expected) in [
            ("small caches", Some(32 * MIB), Some(64 * gib), Some(256 * MIB)),
            ("hardly any", Some(MIB), Some(64 * gib), Some(SHORTEST)),
            ("very large caches", Some(384 * MIB), Some(64 * gib), Some(LONGEST)),
            ("nobody says", None, Some(64 * gib), Some(USUAL)),
            ("no bound", Some(32 * MIB), None, Some(256 * MIB)),
            ("just enough", Some(32 * MIB), Some(512 * MIB), Some(256 * MIB)),
            ("too little", Some(32 * MIB), Some(511 * MIB), None),
            ("less than wanted", Some(384 * MIB), Some(3 * gib / 2), Some(768 * MIB)),
            ("a container of 1 GB", Some(384 * MIB), Some(1_000_000_000), None),
            ("nothing", None, Some(0), None),
        ] {
            assert_eq!(fitting(caches, room.map(|room| room as u64)), expected, "{name}");
        }
    }

    #[test]
    fn caches_that_processors_share_count_once() {
        let root = std::env::temp_dir().join(format!("mica-caches-{}", std::process::id()));
        let put = |processor: usize, index: usize, level: &str, shared: &str, size: &str| {
            let folder = root.join(format!("cpu{processor}/cache/index{index}"));
            std::fs::create_dir_all(&folder).unwrap();
            for (name, text) in [("level", level), ("shared_cpu_list", shared), ("size", size)] {
                std::fs::write(folder.join(name), format!("{text}\n")).unwrap();
            }
        };
        assert_eq!(last_caches(&root), None);
        for processor in 0..4 {
            put(processor, 0, "1", &processor.to_string(), "32K");
            put(processor, 3, "3", if processor < 2 { "0-1" } else { "2-3" }, "16M");
        }
        std::fs::create_dir_all(root.join("cpufreq")).unwrap();
        let found = last_caches(&root);
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, Some(32 * MIB));
        for (text, expected) in
            [("266240K", Some(266_240 << 10)), ("512", Some(512)), ("", None), ("xK", None)]
        {
            assert_eq!(size(text), expected, "{text:?}");
        }
    }
}
