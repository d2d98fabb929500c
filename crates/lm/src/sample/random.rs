//! Random numbers by counter: Philox4x32-10.
//!
//! "Parallel random numbers: as easy as 1, 2, 3" (Salmon et al., SC 2011). A number is a function of a key (the seed)
//! and a counter (the position in the sequence); there is no state that could get out of step.

/// What a number is for; different streams are independent of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// Which token is picked.
    Token = 0,
    /// Whether XTC is done.
    Xtc = 1,
    /// Whether a drafted token is accepted, in speculative decoding.
    Accept = 2,
}

/// A number in [0, 1) with 53 random bits.
pub fn uniform(seed: u64, position: u64, stream: Stream) -> f64 {
    let counter = [position as u32, (position >> 32) as u32, stream as u32, 0];
    let [a, b, ..] = philox(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Ten rounds of Philox 4x32.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let wide = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    for _ in 0..10 {
        let (high0, low0) = wide(0xD251_1F53, counter[0]);
        let (high1, low1) = wide(0xCD9E_8D57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the authors' Random123 library.
    #[test]
    fn known_answers() {
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), expected);
        }
    }

    #[test]
    fn streams_and_positions_differ() {
        let mut seen = std::collections::HashSet::new();
        for seed in [0, 1, 1 << 40] {
            for position in [0, 1, 1 << 40] {
                for stream in [Stream::Token, Stream::Xtc, Stream::Accept] {
                    let u = uniform(seed, position, stream);
                    assert!((0.0..1.0).contains(&u));
                    assert!(seen.insert(u.to_bits()), "{seed} {position} {stream:?}");
                }
            }
        }
    }
}
