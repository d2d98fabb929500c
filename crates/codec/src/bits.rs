//! The bit stream of a quantized row: value *i* sits at bit *i*·bits, least significant bit first,
//! in little-endian u32 words. 3-, 5- and 6-bit values straddle words.

/// Packs `codes` (each below 2^bits) into `words`.
///
/// # Panics
/// Unless `words` holds exactly `codes.len() * bits` bits and bits is 1 to 8.
pub fn pack(codes: &[u8], bits: usize, words: &mut [u32]) {
    check(codes.len(), bits, words.len());
    let (mut pending, mut held) = (0u64, 0);
    let mut words = words.iter_mut();
    for &code in codes {
        debug_assert!(u32::from(code) < 1 << bits);
        pending |= u64::from(code) << held;
        held += bits;
        if held >= 32 {
            *words.next().expect("lengths were checked") = pending as u32;
            pending >>= 32;
            held -= 32;
        }
    }
}

/// Unpacks `words` into `codes`: the inverse of [`pack`].
///
/// # Panics
/// Unless `words` holds exactly `codes.len() * bits` bits and bits is 1 to 8.
pub fn unpack(words: &[u32], bits: usize, codes: &mut [u8]) {
    check(codes.len(), bits, words.len());
    let mask = (1u64 << bits) - 1;
    let (mut pending, mut held) = (0u64, 0);
    let mut words = words.iter();
    for code in codes {
        if held < bits {
            pending |= u64::from(*words.next().expect("lengths were checked")) << held;
            held += 32;
        }
        *code = (pending & mask) as u8;
        pending >>= bits;
        held -= bits;
    }
}

fn check(codes: usize, bits: usize, words: usize) {
    assert!((1..=8).contains(&bits), "{bits} bits: expected 1 to 8");
    assert_eq!(codes * bits, words * 32, "{codes} values of {bits} bits do not fill {words} words");
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_testkit::Rng;

    #[test]
    fn pack_is_the_bit_stream_and_unpack_its_inverse() {
        let mut rng = Rng::new(1);
        for bits in 1..=8usize {
            let codes: Vec<u8> = (0..96).map(|_| (rng.u32() as u8) & ((1u32 << bits) - 1) as u8).collect();
            let mut words = vec![!0u32; 96 * bits / 32];
            pack(&codes, bits, &mut words);
            for (i, &code) in codes.iter().enumerate() {
                for bit in 0..bits {
                    let at = i * bits + bit;
                    assert_eq!(
                        words[at / 32] >> (at % 32) & 1,
                        u32::from(code >> bit & 1),
                        "{bits} bits, value {i}"
                    );
                }
            }
            let mut back = vec![0xaa; 96];
            unpack(&words, bits, &mut back);
            assert_eq!(back, codes, "{bits} bits");
        }
    }
}
