//! Radix sort of long lines: least significant digit first, so stable. Its passes over memory do
//! not depend on the values but for digits that are all equal, which are skipped.
//!
//! Comparing sorts of n numbers read each about log₂ n times, which is 22 for four million; here 32-bit
//! numbers are read in three passes of 11 bits.

/// Bits of a digit: 2,048 counters of four bytes stay in the L1 cache beside the lines that are
/// written.
const BITS: u32 = 11;
const BUCKETS: usize = 1 << BITS;
/// Shorter lines are sorted by comparing.
pub(super) const FROM: usize = 2048;

/// An unsigned integer that is sorted by some of its bits.
pub(super) trait Key: Copy {
    /// The `BITS` bits from `shift` on.
    fn digit(self, shift: u32) -> usize;
}

impl Key for u32 {
    #[inline(always)]
    fn digit(self, shift: u32) -> usize {
        (self >> shift) as usize & (BUCKETS - 1)
    }
}

impl Key for u64 {
    #[inline(always)]
    fn digit(self, shift: u32) -> usize {
        (self >> shift) as usize & (BUCKETS - 1)
    }
}

/// Sorts by the bits from `low` up to `high`, which is where the key ends or zeros begin. `other`
/// has the keys' length and holds the result if this says so.
pub(super) fn sort<K: Key>(keys: &mut [K], other: &mut [K], low: u32, high: u32) -> bool {
    let mut from_keys = true;
    for shift in (low..high).step_by(BITS as usize) {
        let (from, to) = if from_keys { (&*keys, &mut *other) } else { (&*other, &mut *keys) };
        let mut places = [0u32; BUCKETS];
        from.iter().for_each(|key| places[key.digit(shift)] += 1);
        if places.iter().any(|&count| count as usize == from.len()) {
            continue;
        }
        let mut next = 0;
        for place in &mut places {
            next += std::mem::replace(place, next);
        }
        for &key in from {
            let place = &mut places[key.digit(shift)];
            to[*place as usize] = key;
            *place += 1;
        }
        from_keys = !from_keys;
    }
    !from_keys
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;

    use super::*;

    #[test]
    fn keys_are_sorted_by_their_bits() {
        let mut rng = Rng::new(5);
        for count in [0, 1, 2, 1000, 5000] {
            for mask in [u64::MAX, 0xffff_ffff_0000_0000, 0x7ff, 0] {
                let keys: Vec<u64> = (0..count).map(|_| rng.u64() & mask).collect();
                let mut expected = keys.clone();
                expected.sort_unstable();
                let (mut a, mut b) = (keys.clone(), vec![0; keys.len()]);
                let result = if sort(&mut a, &mut b, 0, 64) { b } else { a };
                assert_eq!(result, expected, "{count} keys, {mask:x}");
                // By the upper half alone, the lower one says where a key was.
                let marked: Vec<u64> = keys.iter().zip(0..).map(|(key, i)| key & !0xffff_ffff | i).collect();
                let mut expected = marked.clone();
                expected.sort_by_key(|key| key >> 32);
                let (mut a, mut b) = (marked, vec![0; count]);
                let result = if sort(&mut a, &mut b, 32, 64) { b } else { a };
                assert_eq!(result, expected, "{count} marked keys, {mask:x}");
            }
        }
    }
}
