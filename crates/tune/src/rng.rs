//! A small counter-based random generator for everything that must be repeatable without an array.
//!
//! SplitMix64 (Steele, Lea, Flood 2014): the state is one 64-bit counter, so the position of a stream
//! is one number in a checkpoint, and streams for different purposes are made by mixing a name into
//! the seed instead of by drawing from each other. Random numbers *inside a model* (dropout,
//! initialisation, sampling) come from the array crate's keys, not from here.

use serde::{Deserialize, Serialize};

/// One stream of repeatable random numbers. Cloning forks it: both copies continue alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rng {
    state: u64,
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// The stream that belongs to a seed and a path of numbers, such as `[epoch, window]`.
    ///
    /// Different paths give unrelated streams, `[1, 2]` and `[2, 1]` included.
    pub fn new(seed: u64, path: &[u64]) -> Self {
        let mut state = mix(seed ^ GOLDEN);
        for &part in path {
            state = mix(state.wrapping_add(GOLDEN) ^ mix(part.wrapping_add(GOLDEN)));
        }
        Rng { state }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// A number in `0..bound`, each equally likely (Lemire's multiplication with rejection).
    ///
    /// `bound` of 0 gives 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound <= 1 {
            return 0;
        }
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// An index into a slice of this length. The slice must not be empty for the index to be valid.
    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// A number in `[0, 1)` with 53 random bits.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One element of a slice that is not empty.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.index(items.len())]
    }

    /// Puts a slice into random order (Fisher-Yates; every order equally likely up to the 64-bit state).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.index(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_matches_its_published_sequence() {
        // First outputs of SplitMix64 from state 1234567 (Vigna's reference C code).
        let mut rng = Rng { state: 1_234_567 };
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        for value in expected {
            assert_eq!(rng.next_u64(), value);
        }
    }

    #[test]
    fn paths_are_ordered_and_distinct() {
        let first = |path: &[u64]| Rng::new(7, path).next_u64();
        let all = [first(&[]), first(&[0]), first(&[1]), first(&[0, 0]), first(&[1, 2]), first(&[2, 1])];
        for (i, a) in all.iter().enumerate() {
            assert!(!all[..i].contains(a), "streams {i} collides");
        }
    }

    #[test]
    fn below_is_in_range_and_covers_it() {
        let mut rng = Rng::new(1, &[]);
        for bound in [1u64, 2, 3, 7, 100, u64::MAX] {
            for _ in 0..200 {
                assert!(rng.below(bound) < bound);
            }
        }
        let mut seen = [0usize; 5];
        for _ in 0..5000 {
            seen[rng.index(5)] += 1;
        }
        assert!(seen.iter().all(|&n| n > 800 && n < 1200), "{seen:?}");
    }

    #[test]
    fn shuffle_is_a_permutation_and_repeats() {
        let mut a: Vec<u32> = (0..100).collect();
        let mut b = a.clone();
        Rng::new(3, &[4]).shuffle(&mut a);
        Rng::new(3, &[4]).shuffle(&mut b);
        assert_eq!(a, b);
        let mut sorted = a.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_ne!(a, sorted);
    }
}
