//! Radix sort: least significant byte first, so stable. Its passes over memory do not depend on the values but
//! for bytes that are all equal, which are skipped.
//!
//! Comparing sorts read n numbers about log₂ n times, which is 22 for four million; here 32-bit numbers are read
//! five times. Bytes rather than longer digits: 256 places to write to are pages that the TLB holds and counters
//! that are cheap to clear and add up for lines of a few hundred numbers, too.

pub(super) const BUCKETS: usize = 256;
/// Shorter lines are sorted by comparing.
pub(super) const FROM: usize = 256;

/// An unsigned integer that is sorted by some of its bytes.
pub(super) trait Key: Copy + Ord + Send + Sync + 'static {
    /// The byte from bit `shift` on.
    fn digit(self, shift: u32) -> u8;
}

impl Key for u32 {
    #[inline(always)]
    fn digit(self, shift: u32) -> u8 {
        (self >> shift) as u8
    }
}

impl Key for u64 {
    #[inline(always)]
    fn digit(self, shift: u32) -> u8 {
        (self >> shift) as u8
    }
}

/// Sorts by the `bytes` bytes from bit `low` on and calls `each(place, key)` for every key. `other` has the keys'
/// length; both are overwritten.
pub(super) fn sort<K: Key>(
    keys: &mut [K],
    other: &mut [K],
    low: u32,
    bytes: usize,
    each: impl FnMut(usize, K),
) {
    match bytes {
        1 => passes::<K, 1>(keys, other, low, each),
        2 => passes::<K, 2>(keys, other, low, each),
        _ => passes::<K, 4>(keys, other, low, each),
    }
}

fn passes<K: Key, const BYTES: usize>(
    keys: &mut [K],
    other: &mut [K],
    low: u32,
    mut each: impl FnMut(usize, K),
) {
    debug_assert!(other.len() == keys.len());
    let mut counts = [[0u32; BUCKETS]; BYTES];
    for key in &*keys {
        for (byte, counts) in counts.iter_mut().enumerate() {
            counts[key.digit(low + 8 * byte as u32) as usize] += 1;
        }
    }
    let length = keys.len();
    let matters = |byte: &usize| counts[*byte].iter().all(|&count| count as usize != length);
    let Some(last) = (0..BYTES).rev().find(matters) else {
        return keys.iter().enumerate().for_each(|(place, &key)| each(place, key));
    };
    let (mut from, mut to) = (keys, other);
    for byte in (0..last).filter(matters) {
        let (mut places, shift) = (starts(&counts[byte]), low + 8 * byte as u32);
        for &key in from.iter() {
            let place = &mut places[key.digit(shift) as usize];
            // SAFETY: places start at the sums of the counts before, and each is taken as often as it was
            // counted: they are below the length of both.
            unsafe { *to.get_unchecked_mut(*place as usize) = key };
            *place += 1;
        }
        std::mem::swap(&mut from, &mut to);
    }
    let (mut places, shift) = (starts(&counts[last]), low + 8 * last as u32);
    for &key in from.iter() {
        let place = &mut places[key.digit(shift) as usize];
        each(*place as usize, key);
        *place += 1;
    }
}

/// Where each bucket begins.
fn starts(counts: &[u32; BUCKETS]) -> [u32; BUCKETS] {
    let mut next = 0;
    counts.map(|count| {
        next += count;
        next - count
    })
}

/// The key that is at place `at` in order, and how many are smaller. Keys have `bytes` bytes; `other` has their
/// length and is overwritten.
pub(super) fn select(keys: &[u32], other: &mut [u32], bytes: usize, at: usize) -> (u32, usize) {
    let (mut found, mut smaller) = (0, 0);
    let mut left = keys.len();
    for byte in (0..bytes).rev() {
        let shift = 8 * byte as u32;
        let first = byte + 1 == bytes;
        let mut counts = [0usize; BUCKETS];
        let from = if first { keys } else { &other[..left] };
        from.iter().for_each(|key| counts[key.digit(shift) as usize] += 1);
        let mut bucket = 0;
        while smaller + counts[bucket] <= at {
            smaller += counts[bucket];
            bucket += 1;
        }
        found |= (bucket as u32) << shift;
        // Those of the bucket move to the front: a place is never written before it was read.
        let mut kept = 0;
        for i in 0..left {
            let key = if first { keys[i] } else { other[i] };
            other[kept] = key;
            kept += (key.digit(shift) as usize == bucket) as usize;
        }
        left = kept;
    }
    (found, smaller)
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;

    use super::*;

    fn sorted<K: Key>(keys: &[K], low: u32, bytes: usize) -> Vec<K> {
        let mut result = keys.to_vec();
        let (mut a, mut b) = (keys.to_vec(), keys.to_vec());
        sort(&mut a, &mut b, low, bytes, |place, key| result[place] = key);
        result
    }

    #[test]
    fn keys_are_sorted_by_their_bytes() {
        let mut rng = Rng::new(5);
        for count in [0usize, 1, 2, 1000, 5000] {
            for (mask, bytes) in [(u32::MAX, 4), (0xffff_0000, 4), (0x7ff, 2), (0xff, 1), (0, 4)] {
                let keys: Vec<u32> = (0..count).map(|_| rng.u64() as u32 & mask).collect();
                let mut expected = keys.clone();
                expected.sort_unstable();
                assert_eq!(sorted(&keys, 0, bytes), expected, "{count} keys, {mask:x}");
                for at in [0, count / 3, count.saturating_sub(1)].into_iter().filter(|&at| at < count) {
                    let smaller = expected.iter().filter(|&&key| key < expected[at]).count();
                    let found = select(&keys, &mut vec![7; count], bytes, at);
                    assert_eq!(found, (expected[at], smaller), "{at} of {count} keys, {mask:x}");
                }
                // By the upper half alone, the lower one says where a key was.
                let marked: Vec<u64> = keys.iter().zip(0..).map(|(&key, i)| (key as u64) << 32 | i).collect();
                let mut expected = marked.clone();
                expected.sort_by_key(|key| key >> 32);
                assert_eq!(sorted(&marked, 32, bytes), expected, "{count} marked keys, {mask:x}");
            }
        }
    }
}
