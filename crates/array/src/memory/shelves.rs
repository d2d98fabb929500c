//! Kept blocks by size.

use std::collections::VecDeque;
use std::ptr::NonNull;

/// Sizes are multiples of it.
pub(super) const SMALLEST: usize = 64;
/// Sizes per power of two.
const PER_OCTAVE: usize = 8;
/// Up to here, sizes are the multiples of [`SMALLEST`].
const EVEN: usize = 1024;
const SHELVES: usize =
    EVEN / SMALLEST + PER_OCTAVE * (usize::BITS as usize - 1 - EVEN.trailing_zeros() as usize);
const WORD: usize = u64::BITS as usize;

/// Bucket sizes grow by an eighth of a power of two, so that at most 12.5 % is wasted.
pub(crate) fn bucket(bytes: usize) -> usize {
    let bytes = bytes.max(SMALLEST);
    bytes.next_multiple_of(step(bytes))
}

/// What bucket sizes up to the next power of two are multiples of.
fn step(bytes: usize) -> usize {
    (bytes.next_power_of_two() / (2 * PER_OCTAVE)).max(SMALLEST)
}

/// Which shelf a bucket size has.
fn shelf(size: usize) -> usize {
    if size <= EVEN {
        return size / SMALLEST - 1;
    }
    let top = size.next_power_of_two();
    let octave = (top / EVEN).trailing_zeros() as usize - 1;
    EVEN / SMALLEST + octave * PER_OCTAVE + (size - top / 2) / step(size) - 1
}

/// The bucket size of a shelf.
fn size_of(shelf: usize) -> usize {
    let even = EVEN / SMALLEST;
    if shelf < even {
        return (shelf + 1) * SMALLEST;
    }
    let (octave, place) = ((shelf - even) / PER_OCTAVE, (shelf - even) % PER_OCTAVE);
    (EVEN << octave) + (place + 1) * ((EVEN << octave) / PER_OCTAVE)
}

/// A block that nobody uses.
#[derive(Clone, Copy)]
pub(super) struct Address {
    pub(super) pointer: NonNull<u8>,
    /// When it died.
    pub(super) since: u64,
}
// SAFETY: an address of a block that the pool owns; no thread-bound state.
unsafe impl Send for Address {}

/// Kept blocks, a shelf a size. On each, those that came later are behind.
pub(super) struct Shelves {
    shelves: Vec<VecDeque<Address>>,
    /// A bit per shelf that is not empty.
    filled: [u64; SHELVES.div_ceil(WORD)],
}

impl Shelves {
    pub(super) const fn new() -> Shelves {
        Shelves { shelves: Vec::new(), filled: [0; SHELVES.div_ceil(WORD)] }
    }

    pub(super) fn put(&mut self, size: usize, address: Address) {
        let at = shelf(size);
        self.shelf_mut(at).push_back(address);
    }

    /// The latest of the smallest blocks that fit without wasting more than a quarter, and its size.
    pub(super) fn take(&mut self, size: usize) -> Option<(Address, usize)> {
        let found = (shelf(size)..self.shelves.len())
            .take_while(|&at| size_of(at) <= size + size / 4)
            .find(|&at| self.is_filled(at))?;
        let address = self.shelves[found].pop_back();
        self.note(found);
        Some((address?, size_of(found)))
    }

    /// The block that has lain longest.
    pub(super) fn take_oldest(&mut self) -> Option<(Address, usize)> {
        let since = |&at: &usize| self.shelves[at].front().map_or(u64::MAX, |address| address.since);
        let oldest = self.filled_shelves().min_by_key(since)?;
        let address = self.shelves[oldest].pop_front();
        self.note(oldest);
        Some((address?, size_of(oldest)))
    }

    /// Takes over all that the other has.
    pub(super) fn append(&mut self, other: &mut Shelves) {
        let shelves: Vec<usize> = other.filled_shelves().collect();
        for at in shelves {
            self.shelf_mut(at).append(&mut other.shelves[at]);
        }
        other.filled = [0; SHELVES.div_ceil(WORD)];
    }

    /// A shelf that is about to be filled.
    fn shelf_mut(&mut self, at: usize) -> &mut VecDeque<Address> {
        if self.shelves.len() <= at {
            self.shelves.resize_with(at + 1, VecDeque::new);
        }
        self.filled[at / WORD] |= 1 << (at % WORD);
        &mut self.shelves[at]
    }

    fn note(&mut self, at: usize) {
        if self.shelves[at].is_empty() {
            self.filled[at / WORD] &= !(1 << (at % WORD));
        }
    }

    fn is_filled(&self, at: usize) -> bool {
        self.filled[at / WORD] >> (at % WORD) & 1 == 1
    }

    fn filled_shelves(&self) -> impl Iterator<Item = usize> {
        let bits = |(word, &bits): (usize, &u64)| {
            (0..WORD).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * WORD + bit)
        };
        self.filled.iter().enumerate().filter(|(_, bits)| **bits != 0).flat_map(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_waste_little_and_have_a_shelf_each() {
        for bytes in
            [1, 64, 65, 1000, 1024, 1025, 2048, 2049, 4097, 1 << 20, (1 << 20) + 1, 123_456_789, 1 << 45]
        {
            let size = bucket(bytes);
            assert!(size >= bytes && size <= (bytes + bytes / 8).max(bytes + 64), "{bytes} -> {size}");
            assert_eq!(size_of(shelf(size)), size, "{bytes}");
        }
        assert!((0..SHELVES - 1).all(|at| shelf(size_of(at)) == at && size_of(at) < size_of(at + 1)));
    }

    #[test]
    fn the_smallest_that_fits_and_the_oldest_are_found() {
        let mut shelves = Shelves::new();
        let address = |since: u64| Address { pointer: NonNull::dangling(), since };
        for (since, size) in [(1, 4096), (2, 64), (3, 4608), (4, 4096), (5, 1 << 20)] {
            shelves.put(size, address(since));
        }
        let take = |shelves: &mut Shelves, size| shelves.take(size).map(|(found, size)| (found.since, size));
        assert_eq!(take(&mut shelves, 4096), Some((4, 4096)), "the latest of that size");
        assert_eq!(take(&mut shelves, 3584), Some((1, 4096)), "a little larger");
        assert_eq!(take(&mut shelves, 3584), None, "too much larger");
        assert_eq!(take(&mut shelves, 128), None, "too small");
        let mut other = Shelves::new();
        other.put(64, address(0));
        other.append(&mut shelves);
        let mut oldest = || other.take_oldest().map(|(found, size)| (found.since, size));
        assert_eq!(oldest(), Some((0, 64)));
        assert_eq!(oldest(), Some((2, 64)));
        assert_eq!(oldest(), Some((3, 4608)));
        assert_eq!(oldest(), Some((5, 1 << 20)));
        assert_eq!(oldest(), None);
        assert!(shelves.take_oldest().is_none());
    }
}
