//! Quicksort of 32-bit keys by vectors of 16, after Blacher, Giesen and Kühne (2021).
//!
//! A partition compresses what is smaller and what is not apart, 16 keys in a few cycles and without a branch that
//! depends on them. Up to 256 keys are a sorting network. Needs AVX-512 (and POPCNT, which all processors with it
//! have); elsewhere [`super::radix`] sorts. Equal keys are one number, so the order is the same.

use std::arch::x86_64::*;

/// Keys that are one network.
const NETWORK: usize = 256;
/// What partitions write past the end of what they keep apart.
pub(super) const ROOM: usize = 16;

/// Sorts the keys.
///
/// # Safety
/// The processor has AVX-512 F and POPCNT; `other` has room for `keys.len() + ROOM`.
#[target_feature(enable = "avx512f,popcnt")]
pub(super) unsafe fn sort(keys: &mut [u32], other: &mut [u32]) {
    debug_assert!(other.len() >= keys.len() + ROOM);
    // More levels than this mean that pivots are chosen badly again and again.
    let levels = 2 * keys.len().max(1).ilog2() + 8;
    // SAFETY: the caller's.
    unsafe { sort_part(keys, other.as_mut_ptr(), levels) }
}

/// # Safety
/// As for [`sort`].
#[target_feature(enable = "avx512f,popcnt")]
unsafe fn sort_part(mut keys: &mut [u32], other: *mut u32, mut levels: u32) {
    loop {
        if keys.len() <= NETWORK {
            return network(keys);
        }
        if levels == 0 {
            return keys.sort_unstable();
        }
        levels -= 1;
        let pivot = pivot(keys);
        // SAFETY: the caller's.
        let smaller = unsafe { partition::<false>(keys, other, pivot) };
        if smaller == 0 {
            // The pivot is the smallest: those that are equal to it are in their place.
            // SAFETY: the caller's.
            let equal = unsafe { partition::<true>(keys, other, pivot) };
            keys = &mut keys[equal..];
            continue;
        }
        let (low, high) = keys.split_at_mut(smaller);
        // SAFETY: the caller's.
        unsafe { sort_part(low, other, levels) };
        keys = high;
    }
}

/// The key that is at place `at` in order, and how many are smaller. Reorders the keys.
///
/// # Safety
/// As for [`sort`]; `at` is one of the places.
#[target_feature(enable = "avx512f,popcnt")]
pub(super) unsafe fn select(mut keys: &mut [u32], other: &mut [u32], at: usize) -> (u32, usize) {
    debug_assert!(other.len() >= keys.len() + ROOM && at < keys.len());
    let mut before = 0;
    let mut levels = 2 * keys.len().ilog2() + 8;
    loop {
        let place = at - before;
        if keys.len() <= NETWORK || levels == 0 {
            match keys.len() <= NETWORK {
                true => network(keys),
                false => keys.sort_unstable(),
            }
            let found = keys[place];
            return (found, before + keys.partition_point(|&key| key < found));
        }
        levels -= 1;
        let pivot = pivot_beside(keys, place);
        // SAFETY: the caller's.
        let smaller = unsafe { partition::<false>(keys, other.as_mut_ptr(), pivot) };
        if place < smaller {
            keys = &mut keys[..smaller];
            continue;
        }
        keys = &mut keys[smaller..];
        before += smaller;
        if smaller == 0 {
            // SAFETY: the caller's.
            let equal = unsafe { partition::<true>(keys, other.as_mut_ptr(), pivot) };
            if place < equal {
                return (pivot, before);
            }
            keys = &mut keys[equal..];
            before += equal;
        }
    }
}

/// Parts words by their keys: those that sorting (stably) would put before place `at` to the front of `words`, in
/// their order, then the one at that place, then the others in their order. `middle` is the key at that place, and
/// so many are `smaller`.
///
/// # Safety
/// As for [`sort`]; `other` has room for `words.len() + ROOM`.
#[target_feature(enable = "avx512f,popcnt")]
pub(super) unsafe fn part(
    keys: &[u32],
    words: &mut [u32],
    other: &mut [u32],
    at: usize,
    (middle, smaller): (u32, usize),
) {
    let length = keys.len();
    assert!(words.len() == length && other.len() >= length + ROOM && at < length);
    let (from, words, other) = (keys.as_ptr(), words.as_mut_ptr(), other.as_mut_ptr());
    let pivot = _mm512_set1_epi32(middle as i32);
    // Of equal ones the first go before.
    let mut equal_before = at - smaller;
    let (mut low, mut high, mut at_middle) = (0, 0, None);
    for i in (0..length).step_by(16) {
        let there = lanes_of(length - i, 0);
        // SAFETY: only lanes that there are; what is kept at the front is never more than was read, and `other` has
        // room for a vector past the keys.
        unsafe {
            let v = _mm512_maskz_loadu_epi32(there, from.add(i).cast());
            let word = _mm512_maskz_loadu_epi32(there, words.add(i).cast());
            let mut before = _mm512_mask_cmplt_epu32_mask(there, v, pivot);
            let mut after = there & !before;
            let mut equal = _mm512_mask_cmpeq_epi32_mask(there, v, pivot);
            while equal != 0 && at_middle.is_none() {
                let first = equal & equal.wrapping_neg();
                equal ^= first;
                after ^= first;
                if equal_before > 0 {
                    equal_before -= 1;
                    before |= first;
                } else {
                    at_middle = Some(*words.add(i + first.trailing_zeros() as usize));
                }
            }
            let count = before.count_ones() as usize;
            // Not past what has been read: the rest of a last vector is not there.
            let kept = lanes_of(count, 0);
            _mm512_mask_storeu_epi32(words.add(low).cast(), kept, _mm512_maskz_compress_epi32(before, word));
            _mm512_storeu_si512(other.add(high).cast(), _mm512_maskz_compress_epi32(after, word));
            low += count;
            high += after.count_ones() as usize;
        }
    }
    assert!(low == at && high == length - at - 1, "the key is at this place");
    // SAFETY: all places, each once.
    unsafe {
        *words.add(at) = at_middle.expect("the key is one of them");
        std::ptr::copy_nonoverlapping(other.cast_const(), words.add(at + 1), high);
    }
}

/// Brings keys into the order of buckets, of which each but the first has a limit, the smallest key that may be in
/// it, ascending; `cuts` gets where these buckets begin.
///
/// # Safety
/// As for [`sort`].
#[target_feature(enable = "avx512f,popcnt")]
pub(super) unsafe fn split(keys: &mut [u32], other: &mut [u32], limits: &[u32], cuts: &mut [u32]) {
    debug_assert!(other.len() >= keys.len() + ROOM && limits.len() == cuts.len());
    // SAFETY: the caller's.
    unsafe { split_part(keys, 0, other.as_mut_ptr(), limits, cuts) }
}

/// # Safety
/// As for [`sort`].
#[target_feature(enable = "avx512f,popcnt")]
unsafe fn split_part(keys: &mut [u32], first: usize, other: *mut u32, limits: &[u32], cuts: &mut [u32]) {
    if limits.is_empty() {
        return;
    }
    let middle = limits.len() / 2;
    // SAFETY: the caller's.
    let below = unsafe { partition::<false>(keys, other, limits[middle]) };
    cuts[middle] = (first + below) as u32;
    let (low, high) = keys.split_at_mut(below);
    let (low_cuts, high_cuts) = cuts.split_at_mut(middle);
    // SAFETY: the caller's.
    unsafe {
        split_part(low, first, other, &limits[..middle], low_cuts);
        split_part(high, first + below, other, &limits[middle + 1..], &mut high_cuts[1..]);
    }
}

/// 128 of the keys.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn sample(keys: &[u32]) -> [__m512i; 8] {
    assert!(keys.len() > NETWORK);
    let step = (keys.len() - 16) / 7;
    let mut v = [_mm512_setzero_si512(); 8];
    for i in 0..8 {
        // SAFETY: seven steps and a vector are no more than there is.
        v[i] = unsafe { _mm512_loadu_si512(keys.as_ptr().add(i * step).cast()) };
    }
    v
}

/// A key that will likely be beside place `at` in order, nearer to the middle.
#[target_feature(enable = "avx512f,popcnt")]
fn pivot_beside(keys: &[u32], at: usize) -> u32 {
    let mut sorted = [0u32; 128];
    for (part, v) in sorted.chunks_exact_mut(16).zip(sample(keys)) {
        // SAFETY: 16 keys.
        unsafe { _mm512_storeu_si512(part.as_mut_ptr().cast(), v) };
    }
    network(&mut sorted);
    // The place in the sample varies by the root of p (1 - p) 128, p being the share of keys before.
    let before = at as f32 / keys.len() as f32;
    let margin = 1.5 + 2.0 * (before * (1.0 - before) * 128.0).sqrt();
    let place = before * 128.0 + if before < 0.5 { margin } else { -margin };
    sorted[place.clamp(0.0, 127.0) as usize]
}

/// A key near the middle: of the middle keys of 16 columns the middle one.
#[target_feature(enable = "avx512f,popcnt")]
fn pivot(keys: &[u32]) -> u32 {
    let mut v = sample(keys);
    sort_columns(&mut v);
    let mut middle = v[4];
    sort_lanes(&mut middle);
    let mut sorted = [0u32; 16];
    // SAFETY: 16 keys.
    unsafe { _mm512_storeu_si512(sorted.as_mut_ptr().cast(), middle) };
    sorted[8]
}

/// Sorts a vector: Batcher's bitonic network.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn sort_lanes(v: &mut __m512i) {
    macro_rules! steps {
        ($($flip:literal $bit:literal),*) => {{ $( *v = meet(*v, flipped::<$flip>(*v), const { with_bit($bit) }); )* }};
    }
    steps!(1 1, 3 2, 1 1, 7 4, 2 2, 1 1, 15 8, 4 4, 2 2, 1 1);
}

/// Moves the keys that are smaller than the pivot (or, if `OR_EQUAL`, equal) to the front and counts them.
///
/// # Safety
/// As for [`sort`].
#[target_feature(enable = "avx512f,popcnt")]
unsafe fn partition<const OR_EQUAL: bool>(keys: &mut [u32], other: *mut u32, pivot: u32) -> usize {
    let length = keys.len();
    let at = keys.as_mut_ptr();
    let middle = _mm512_set1_epi32(pivot as i32);
    let (mut low, mut high) = (0, 0);
    let whole = length / 16 * 16;
    // SAFETY: what is kept at the front is never more than was read, so a whole vector there covers nothing that
    // has not been read; `other` has room for a vector past the keys.
    unsafe {
        for i in (0..whole).step_by(16) {
            let v = _mm512_loadu_si512(at.add(i).cast());
            let is_low = match OR_EQUAL {
                true => _mm512_cmple_epu32_mask(v, middle),
                false => _mm512_cmplt_epu32_mask(v, middle),
            };
            _mm512_storeu_si512(at.add(low).cast(), _mm512_maskz_compress_epi32(is_low, v));
            _mm512_storeu_si512(other.add(high).cast(), _mm512_maskz_compress_epi32(!is_low, v));
            let count = is_low.count_ones() as usize;
            low += count;
            high += 16 - count;
        }
        for i in whole..length {
            let key = *at.add(i);
            let is_low = if OR_EQUAL { key <= pivot } else { key < pivot };
            *at.add(low) = key;
            *other.add(high) = key;
            low += is_low as usize;
            high += !is_low as usize;
        }
        std::ptr::copy_nonoverlapping(other.cast_const(), at.add(low), high);
    }
    low
}

/// Sorts up to [`NETWORK`] keys.
///
/// Keys stand in N vectors, of which each lane is a column. Columns are sorted by exchanging whole vectors. Then
/// neighbouring columns are merged to sorted runs of two, four, eight and sixteen columns: of a merge only the steps
/// over distances of a column or more move lanes. At the end columns are turned to rows.
#[target_feature(enable = "avx512f,popcnt")]
fn network(keys: &mut [u32]) {
    match keys.len() {
        0..2 => {}
        2..=64 => network_of::<4>(keys),
        65..=128 => network_of::<8>(keys),
        _ => network_of::<16>(keys),
    }
}

#[target_feature(enable = "avx512f,popcnt")]
fn network_of<const N: usize>(keys: &mut [u32]) {
    let length = keys.len();
    assert!(length <= 16 * N);
    let at = keys.as_mut_ptr();
    // Lanes past the end hold the largest key, and stay there.
    let mut v = [_mm512_set1_epi32(-1); N];
    for i in 0..N {
        // SAFETY: only lanes that there are.
        v[i] = unsafe {
            _mm512_mask_loadu_epi32(v[i], lanes_of(length, i), at.wrapping_add(16 * i).cast_const().cast())
        };
    }
    sort_columns(&mut v);
    merge::<N, 2, 1>(&mut v);
    merge::<N, 4, 3>(&mut v);
    merge::<N, 8, 7>(&mut v);
    merge::<N, 16, 15>(&mut v);
    turn(&mut v);
    for i in 0..N {
        // SAFETY: as above.
        unsafe { _mm512_mask_storeu_epi32(at.wrapping_add(16 * i).cast(), lanes_of(length, i), v[i]) };
    }
}

/// The lanes of a vector that there are of so many keys.
#[inline]
fn lanes_of(length: usize, vector: usize) -> u16 {
    ((1u32 << length.saturating_sub(16 * vector).min(16)) - 1) as u16
}

/// Sorts each column.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn sort_columns<const N: usize>(v: &mut [__m512i; N]) {
    macro_rules! exchanges {
        ($($i:literal $j:literal),*) => {{ $( exchange(v, $i, $j); )* }};
    }
    match N {
        4 => exchanges!(0 1, 2 3, 0 2, 1 3, 1 2),
        8 => {
            exchanges!(0 2, 1 3, 4 6, 5 7, 0 4, 1 5, 2 6, 3 7, 0 1, 2 3, 4 5, 6 7);
            exchanges!(2 4, 3 5, 1 4, 3 6, 1 2, 3 4, 5 6);
        }
        // Green's network of 60 exchanges.
        _ => {
            exchanges!(0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15);
            exchanges!(0 2, 1 3, 4 6, 5 7, 8 10, 9 11, 12 14, 13 15);
            exchanges!(0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15);
            exchanges!(0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15);
            exchanges!(5 10, 6 9, 3 12, 13 14, 4 8, 7 11, 1 2);
            exchanges!(1 4, 7 13, 2 8, 11 14);
            exchanges!(2 4, 5 6, 9 10, 11 13, 3 8, 7 12);
            exchanges!(6 8, 10 12, 3 5, 7 9);
            exchanges!(3 4, 5 6, 7 8, 9 10, 11 12);
            exchanges!(6 7, 8 9);
        }
    }
}

/// The smaller of each pair of lanes to vector `i`, the larger to vector `j`.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn exchange<const N: usize>(v: &mut [__m512i; N], i: usize, j: usize) {
    (v[i], v[j]) = (_mm512_min_epu32(v[i], v[j]), _mm512_max_epu32(v[i], v[j]));
}

/// One side of a step of a network: `v` meets `other`; lanes of `larger` keep the larger key.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn meet(v: __m512i, other: __m512i, larger: u16) -> __m512i {
    _mm512_mask_max_epu32(_mm512_min_epu32(v, other), larger, v, other)
}

/// The lanes of which the number has this bit.
const fn with_bit(bit: usize) -> u16 {
    let (mut lanes, mut lane) = (0, 0);
    while lane < 16 {
        lanes |= ((lane & bit != 0) as u16) << lane;
        lane += 1;
    }
    lanes
}

/// Lane i is lane i ^ `FLIP`.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn flipped<const FLIP: usize>(v: __m512i) -> __m512i {
    match FLIP {
        1 => _mm512_shuffle_epi32::<0b10_11_00_01>(v),
        2 => _mm512_shuffle_epi32::<0b01_00_11_10>(v),
        3 => _mm512_shuffle_epi32::<0b00_01_10_11>(v),
        4 => _mm512_shuffle_i32x4::<0b10_11_00_01>(v, v),
        7 => _mm512_permutexvar_epi32(
            _mm512_set_epi32(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7),
            v,
        ),
        8 => _mm512_shuffle_i32x4::<0b01_00_11_10>(v, v),
        _ => _mm512_permutexvar_epi32(
            _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
            v,
        ),
    }
}

/// Merges sorted runs of `WIDTH` / 2 columns to runs of `WIDTH`: Batcher's bitonic network.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn merge<const N: usize, const WIDTH: usize, const FLIP: usize>(v: &mut [__m512i; N]) {
    let larger = const { with_bit(WIDTH / 2) };
    for i in 0..N / 2 {
        let (a, b) = (v[i], v[N - 1 - i]);
        v[i] = meet(a, flipped::<FLIP>(b), larger);
        v[N - 1 - i] = meet(b, flipped::<FLIP>(a), larger);
    }
    for i in 0..N {
        if WIDTH > 8 {
            v[i] = meet(v[i], flipped::<4>(v[i]), const { with_bit(4) });
        }
        if WIDTH > 4 {
            v[i] = meet(v[i], flipped::<2>(v[i]), const { with_bit(2) });
        }
        if WIDTH > 2 {
            v[i] = meet(v[i], flipped::<1>(v[i]), const { with_bit(1) });
        }
    }
    if N > 8 {
        (0..N / 2).for_each(|i| exchange(v, i, i + N / 2));
    }
    if N > 4 {
        (0..N).filter(|i| i & 4 == 0).for_each(|i| exchange(v, i, i + 4));
    }
    (0..N).filter(|i| i & 2 == 0).for_each(|i| exchange(v, i, i + 2));
    (0..N).filter(|i| i & 1 == 0).for_each(|i| exchange(v, i, i + 1));
}

/// Turns columns into rows.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn turn<const N: usize>(v: &mut [__m512i; N]) {
    // Quarters of four keys of a column: quarter c of vector 4q + j holds rows 4q… of column 4c + j.
    for q in 0..N / 4 {
        let [a, b, c, d] = [v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]];
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (other_low, other_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        v[4 * q] = _mm512_unpacklo_epi64(low, other_low);
        v[4 * q + 1] = _mm512_unpackhi_epi64(low, other_low);
        v[4 * q + 2] = _mm512_unpacklo_epi64(high, other_high);
        v[4 * q + 3] = _mm512_unpackhi_epi64(high, other_high);
    }
    let quarters = *v;
    for group in 0..N / 4 {
        // The quarters of a row of the result, in their order.
        let from: [usize; 4] = match N {
            4 => [0, 1, 2, 3],
            8 => [2 * group, 4 + 2 * group, 2 * group + 1, 4 + 2 * group + 1],
            _ => [group, 4 + group, 8 + group, 12 + group],
        };
        let [a, b, c, d] = [quarters[from[0]], quarters[from[1]], quarters[from[2]], quarters[from[3]]];
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (other_even, other_odd) =
            (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        v[group] = _mm512_shuffle_i32x4::<0x88>(even, other_even);
        v[N / 4 + group] = _mm512_shuffle_i32x4::<0x88>(odd, other_odd);
        v[N / 2 + group] = _mm512_shuffle_i32x4::<0xdd>(even, other_even);
        v[3 * N / 4 + group] = _mm512_shuffle_i32x4::<0xdd>(odd, other_odd);
    }
}

#[cfg(test)]
mod tests {
    use mica_simd::Isa;
    use mica_testkit::Rng;

    use super::*;

    #[test]
    fn keys_are_sorted_and_selected() {
        if !Isa::available().contains(&Isa::Avx512) {
            return; // sorted by radix there
        }
        let mut rng = Rng::new(71);
        let lengths = (0..300).chain([500, 2048, 10_000, 100_001]);
        for length in lengths {
            for kinds in [u32::MAX, 1, 2, 5, 1000] {
                let keys: Vec<u32> = match kinds {
                    u32::MAX => (0..length).map(|_| rng.u64() as u32).collect(),
                    // Sorted already, falling, or few different ones with the largest of all among them.
                    1 => (0..length as u32).collect(),
                    2 => (0..length as u32).rev().collect(),
                    _ => (0..length).map(|_| u32::MAX - rng.range(0..kinds as usize) as u32).collect(),
                };
                let mut expected = keys.clone();
                expected.sort_unstable();
                let (mut sorted, mut other) = (keys.clone(), vec![0; length + ROOM]);
                // SAFETY: the tier is there, and so is the room.
                unsafe { sort(&mut sorted, &mut other) };
                assert!(sorted == expected, "{length} of {kinds}");
                for at in [0, length / 3, length.saturating_sub(1)].into_iter().filter(|&at| at < length) {
                    let smaller = expected.iter().filter(|&&key| key < expected[at]).count();
                    // SAFETY: as above.
                    let found = unsafe { select(&mut keys.clone(), &mut other, at) };
                    assert_eq!(found, (expected[at], smaller), "{at} of {length} of {kinds}");
                }
            }
        }
    }

    #[test]
    fn keys_are_split_at_limits() {
        if !Isa::available().contains(&Isa::Avx512) {
            return; // sorted there
        }
        let mut rng = Rng::new(72);
        for length in [0, 1, 15, 16, 17, 1000, 70_001] {
            for buckets in [1, 2, 3, 64, 255] {
                for below in [3, 1000, u32::MAX as usize] {
                    let keys: Vec<u32> = (0..length).map(|_| rng.range(0..below) as u32).collect();
                    let mut limits: Vec<u32> = (1..buckets).map(|_| rng.range(0..below) as u32).collect();
                    limits.sort_unstable();
                    let (mut split_keys, mut other) = (keys.clone(), vec![0; length + ROOM]);
                    let mut cuts = vec![u32::MAX; limits.len()];
                    // SAFETY: the tier is there, and so is the room.
                    unsafe { split(&mut split_keys, &mut other, &limits, &mut cuts) };
                    for (&cut, &limit) in cuts.iter().zip(&limits) {
                        let (low, high) = split_keys.split_at(cut as usize);
                        assert!(low.iter().all(|&key| key < limit), "{length} {buckets} {below}");
                        assert!(high.iter().all(|&key| key >= limit), "{length} {buckets} {below}");
                    }
                    let sorted = |mut keys: Vec<u32>| {
                        keys.sort_unstable();
                        keys
                    };
                    assert!(sorted(split_keys) == sorted(keys), "{length} {buckets} {below}");
                }
            }
        }
    }
}
