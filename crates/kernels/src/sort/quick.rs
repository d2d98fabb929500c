//! Quicksort of 32-bit keys by vectors of 16, after Blacher, Giesen and Kühne (2021).
//!
//! A partition compresses what is smaller and what is not apart, 16 keys in a few cycles and without a branch that
//! depends on them. Up to 128 keys are a sorting network. Needs AVX-512 (and POPCNT, which all processors with it
//! have); elsewhere [`super::radix`] sorts. Equal keys are one number, so the order is the same.

use std::arch::x86_64::*;

/// Keys that are one network.
const NETWORK: usize = 128;
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
        let pivot = pivot(keys);
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

/// The middle one of 16 keys.
#[target_feature(enable = "avx512f,popcnt")]
fn pivot(keys: &[u32]) -> u32 {
    let step = keys.len() / 16;
    let sample: [u32; 16] = std::array::from_fn(|i| keys[i * step + step / 2]);
    // SAFETY: 16 keys.
    unsafe {
        let mut v = [_mm512_loadu_si512(sample.as_ptr().cast())];
        sort_lanes(&mut v);
        let mut sorted = [0u32; 16];
        _mm512_storeu_si512(sorted.as_mut_ptr().cast(), v[0]);
        sorted[8]
    }
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
#[target_feature(enable = "avx512f,popcnt")]
fn network(keys: &mut [u32]) {
    let length = keys.len();
    debug_assert!(length <= NETWORK);
    let at = keys.as_mut_ptr();
    // Lanes past the end hold the largest key, and stay there.
    let lanes = |vector: usize| match length.saturating_sub(16 * vector) {
        count @ 0..16 => (1u16 << count) - 1,
        _ => u16::MAX,
    };
    // SAFETY: only lanes that there are.
    let load = |vector: usize| unsafe {
        let place = at.wrapping_add(16 * vector).cast_const().cast();
        _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), lanes(vector), place)
    };
    // SAFETY: as above.
    let store = |vector: usize, v: __m512i| unsafe {
        _mm512_mask_storeu_epi32(at.wrapping_add(16 * vector).cast(), lanes(vector), v)
    };
    let mut low = std::array::from_fn(load);
    sort_four(&mut low);
    if length <= 64 {
        return low.into_iter().enumerate().for_each(|(i, v)| store(i, v));
    }
    let mut high = std::array::from_fn(|i| load(4 + i));
    sort_four(&mut high);
    let (low, high) = merge_eight(low, high);
    low.into_iter().chain(high).enumerate().for_each(|(i, v)| store(i, v));
}

/// Sorts 64 keys.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn sort_four(v: &mut [__m512i; 4]) {
    sort_lanes(v);
    let (mut low, mut high) = ([v[0], v[1]], [v[2], v[3]]);
    merge_two(&mut low);
    merge_two(&mut high);
    *v = merge_four(low, high);
}

/// One step of a network in a vector: lane i meets lane i ^ `DISTANCE`; lanes of `LARGER` keep the larger key.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn meet<const N: usize, const DISTANCE: usize, const LARGER: u16>(v: &mut [__m512i; N]) {
    const LANES: [[i32; 16]; 9] = {
        let mut lanes = [[0; 16]; 9];
        let mut distance = 1;
        while distance < 9 {
            let mut lane = 0;
            while lane < 16 {
                lanes[distance][lane] = (lane ^ distance) as i32;
                lane += 1;
            }
            distance += 1;
        }
        lanes
    };
    // SAFETY: 16 numbers.
    let places = unsafe { _mm512_loadu_si512(LANES[DISTANCE].as_ptr().cast()) };
    for v in v {
        let other = _mm512_permutexvar_epi32(places, *v);
        let (low, high) = (_mm512_min_epu32(*v, other), _mm512_max_epu32(*v, other));
        *v = _mm512_mask_blend_epi32(LARGER, low, high);
    }
}

/// Sorts each vector: Batcher's bitonic network.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn sort_lanes<const N: usize>(v: &mut [__m512i; N]) {
    // Lane i of a step (size, distance) keeps the larger key if (i & distance != 0) ≠ (i & size != 0).
    meet::<N, 1, 0b0110_0110_0110_0110>(v);
    meet::<N, 2, 0b0011_1100_0011_1100>(v);
    meet::<N, 1, 0b0101_1010_0101_1010>(v);
    meet::<N, 4, 0b0000_1111_1111_0000>(v);
    meet::<N, 2, 0b0011_0011_1100_1100>(v);
    meet::<N, 1, 0b0101_0101_1010_1010>(v);
    merge_lanes(v);
}

/// Sorts vectors that rise and then fall.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn merge_lanes<const N: usize>(v: &mut [__m512i; N]) {
    meet::<N, 8, 0b1111_1111_0000_0000>(v);
    meet::<N, 4, 0b1111_0000_1111_0000>(v);
    meet::<N, 2, 0b1100_1100_1100_1100>(v);
    meet::<N, 1, 0b1010_1010_1010_1010>(v);
}

#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn reversed(v: __m512i) -> __m512i {
    _mm512_permutexvar_epi32(_mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), v)
}

/// Two sorted vectors as 32 sorted keys.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn merge_two(v: &mut [__m512i; 2]) {
    let other = reversed(v[1]);
    *v = [_mm512_min_epu32(v[0], other), _mm512_max_epu32(v[0], other)];
    merge_lanes(v);
}

/// Two times 32 sorted keys as 64.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn merge_four(a: [__m512i; 2], b: [__m512i; 2]) -> [__m512i; 4] {
    let b = [reversed(b[1]), reversed(b[0])];
    let mut v = [
        _mm512_min_epu32(a[0], b[0]),
        _mm512_min_epu32(a[1], b[1]),
        _mm512_max_epu32(a[0], b[0]),
        _mm512_max_epu32(a[1], b[1]),
    ];
    swap(&mut v, 0, 1);
    swap(&mut v, 2, 3);
    merge_lanes(&mut v);
    v
}

/// Two times 64 sorted keys as 128, in halves.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn merge_eight(a: [__m512i; 4], b: [__m512i; 4]) -> ([__m512i; 4], [__m512i; 4]) {
    let b = [reversed(b[3]), reversed(b[2]), reversed(b[1]), reversed(b[0])];
    let (mut low, mut high) = (a, a);
    for i in 0..4 {
        low[i] = _mm512_min_epu32(a[i], b[i]);
        high[i] = _mm512_max_epu32(a[i], b[i]);
    }
    for half in [&mut low, &mut high] {
        swap(half, 0, 2);
        swap(half, 1, 3);
        swap(half, 0, 1);
        swap(half, 2, 3);
        merge_lanes(half);
    }
    (low, high)
}

/// The smaller of each pair of lanes to vector `i`, the larger to vector `j`.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn swap(v: &mut [__m512i; 4], i: usize, j: usize) {
    (v[i], v[j]) = (_mm512_min_epu32(v[i], v[j]), _mm512_max_epu32(v[i], v[j]));
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
