//! Random bits: Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, 2011), laid out as
//! MLX lays them out, so that a seed gives the same numbers here and there.
//!
//! A key is two words. `n` words of a key come from ⌈n/2⌉ hashes: hash *i* of counter
//! (i, ⌈n/2⌉ + i) gives words *i* and ⌈n/2⌉ + *i*; the middle word of an odd number is the first
//! word of counter (⌊n/2⌋, 0). Distributions are made of these bits by the array's `random`.

use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::check_rank;
use crate::error::KernelError;
use crate::layout::Linear;
use crate::view::contiguous_strides;

const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];

/// Hashes done at a time; the compiler makes vectors of them.
const BLOCK: usize = 16;

/// Hashes in a chunk.
const HASHES: usize = 4096;

/// Sixteen hashes of one key: `(first[i], second[i])` in and out.
#[inline(always)]
fn hash(key: [u32; 2], first: &mut [u32; BLOCK], second: &mut [u32; BLOCK]) {
    let keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1bd1_1bda];
    for i in 0..BLOCK {
        first[i] = first[i].wrapping_add(keys[0]);
        second[i] = second[i].wrapping_add(keys[1]);
    }
    for round in 0..5 {
        for rotation in ROTATIONS[round % 2] {
            for i in 0..BLOCK {
                first[i] = first[i].wrapping_add(second[i]);
                second[i] = second[i].rotate_left(rotation) ^ first[i];
            }
        }
        for i in 0..BLOCK {
            first[i] = first[i].wrapping_add(keys[(round + 1) % 3]);
            second[i] = second[i].wrapping_add(keys[(round + 2) % 3]).wrapping_add(round as u32 + 1);
        }
    }
}

/// One hash.
pub fn threefry2x32(key: [u32; 2], counter: [u32; 2]) -> [u32; 2] {
    let (mut first, mut second) = ([counter[0]; BLOCK], [counter[1]; BLOCK]);
    hash(key, &mut first, &mut second);
    [first[0], second[0]]
}

/// The key of a seed: its high and its low word.
pub fn key(seed: u64) -> [u32; 2] {
    [(seed >> 32) as u32, seed as u32]
}

/// `count` keys made of one.
pub fn split(key: [u32; 2], count: usize) -> Vec<[u32; 2]> {
    let mut keys = vec![[0u32; 2]; count];
    // SAFETY: as many bytes as the keys have.
    let words = Words { pointer: keys.as_mut_ptr().cast(), bytes: count * 8 };
    for hash in (0..words.hashes()).step_by(BLOCK) {
        words.write(key, hash);
    }
    keys
}

/// Fills `out` with random bits. `keys` (uint32) has shape [k…, 2]; the first dimensions of `out`
/// are k…, each key fills its part. `out` is contiguous, of a type of 1, 2 or 4 bytes.
pub fn bits(keys: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "random_bits";
    check_rank(NAME, &keys.shape, &keys.strides)?;
    if keys.dtype != Dtype::U32 || keys.shape.last() != Some(&2) {
        let message = format!("keys are uint32 [..., 2], got {} {:?}", keys.dtype, keys.shape);
        return Err(KernelError::new(NAME, message));
    }
    if out.dtype.size() > 4 || out.dtype == Dtype::Bool {
        return Err(KernelError::new(NAME, format!("types of 1, 2 or 4 bytes, got {}", out.dtype)));
    }
    let batch = &keys.shape[..keys.shape.len() - 1];
    if !out.shape.starts_with(batch) {
        let message = format!("the output's shape {:?} does not start with the keys' {batch:?}", out.shape);
        return Err(KernelError::new(NAME, message));
    }
    let dense = contiguous_strides(&out.shape);
    if (0..out.shape.len()).any(|axis| out.shape[axis] > 1 && out.strides[axis] != dense[axis])
        && !out.shape.contains(&0)
    {
        return Err(KernelError::new(NAME, "the output must be contiguous"));
    }
    let elements: usize = out.shape[batch.len()..].iter().product();
    Ok(Box::new(Bits {
        first: Linear::new(batch, &keys.strides[..batch.len()]),
        second: *keys.strides.last().expect("keys have a dimension"),
        keys: keys.pointer.cast(),
        out: out.pointer,
        bytes: elements * out.dtype.size(),
    }))
}

/// Memory that one key fills.
struct Words {
    pointer: *mut u8,
    bytes: usize,
}

impl Words {
    fn hashes(&self) -> usize {
        self.bytes.div_ceil(4).div_ceil(2)
    }

    /// Writes word `at`, or as many of its bytes as there is room for.
    #[inline(always)]
    fn put(&self, at: usize, word: u32) {
        let room = (self.bytes - 4 * at).min(4);
        let bytes = word.to_le_bytes();
        // SAFETY: `room` bytes from word `at` are inside the memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer.add(4 * at), room) }
    }

    /// Writes the words of hashes `start ..` up to a block of them.
    fn write(&self, key: [u32; 2], start: usize) {
        let words = self.bytes.div_ceil(4);
        let (half, odd) = (words / 2, words % 2);
        let mut first = [0u32; BLOCK];
        let mut second = [0u32; BLOCK];
        for i in 0..BLOCK {
            first[i] = (start + i) as u32;
            second[i] = if start + i == half { 0 } else { (half + odd + start + i) as u32 };
        }
        hash(key, &mut first, &mut second);
        let pairs = BLOCK.min(half.saturating_sub(start));
        if pairs == BLOCK && 4 * (half + odd + start + BLOCK) <= self.bytes {
            // SAFETY: two blocks of whole words inside the memory.
            unsafe {
                self.pointer.add(4 * start).cast::<[u32; BLOCK]>().write_unaligned(first);
                self.pointer.add(4 * (half + odd + start)).cast::<[u32; BLOCK]>().write_unaligned(second);
            }
            return;
        }
        for i in 0..pairs {
            self.put(start + i, first[i]);
            self.put(half + odd + start + i, second[i]);
        }
        if odd == 1 && (start..start + BLOCK).contains(&half) {
            self.put(half, first[half - start]);
        }
    }
}

struct Bits {
    /// Places of the keys' first words, and how far the second is.
    first: Linear,
    second: isize,
    keys: *const u32,
    out: *mut u8,
    /// Bytes per key.
    bytes: usize,
}

// SAFETY: made of views that may be used from any thread (their maker's promise); chunks write
// disjoint words.
unsafe impl Send for Bits {}
// SAFETY: as above.
unsafe impl Sync for Bits {}

impl Bits {
    fn words(&self, key: usize) -> Words {
        Words { pointer: self.out.wrapping_add(key * self.bytes), bytes: self.bytes }
    }
}

impl Task for Bits {
    fn chunks(&self) -> usize {
        self.first.size() * self.words(0).hashes().div_ceil(HASHES)
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        let per_key = self.words(0).hashes().div_ceil(HASHES);
        let (at, part) = (chunk / per_key, chunk % per_key);
        let words = self.words(at);
        // SAFETY: inside the keys' view.
        let key = unsafe {
            let first = self.keys.offset(self.first.offset(at));
            [*first, *first.offset(self.second)]
        };
        for start in (part * HASHES..words.hashes().min((part + 1) * HASHES)).step_by(BLOCK) {
            words.write(key, start);
        }
    }

    fn name(&self) -> &'static str {
        "random_bits"
    }
}

#[cfg(test)]
mod tests {
    use mica_testkit::{Golden, fixture};
    use mica_threads::Pool;

    use super::*;
    use crate::testing::{Laid, Layout};

    #[test]
    fn the_published_test_vectors() {
        // From the Random123 distribution, kat_vectors: threefry2x32 with 20 rounds.
        for (key, counter, expected) in [
            ([0, 0], [0, 0], [0x6b20_0159, 0x99ba_4efe]),
            ([u32::MAX; 2], [u32::MAX; 2], [0x1cb9_96fc, 0xbb00_2be7]),
            ([0x1319_8a2e, 0x0370_7344], [0x243f_6a88, 0x85a3_08d3], [0xc492_3a9c, 0x483d_f7a0]),
        ] {
            assert_eq!(threefry2x32(key, counter), expected, "{key:x?} {counter:x?}");
        }
    }

    /// fixtures/mlx/random.json names the cases; the names hold all that is asked.
    #[test]
    fn bits_and_keys_are_mlx() {
        let golden = Golden::load(fixture("mlx/random.safetensors"));
        let (mut keys, mut splits, mut fills) = (0, 0, 0);
        for name in golden.names() {
            let parts: Vec<&str> = name.split('.').collect();
            let number = |at: usize| parts[at][1..].parse::<u64>().unwrap();
            match parts[0] {
                "key" => {
                    assert_eq!(golden.i64s(name), key(number(1)).map(i64::from), "{name}");
                    keys += 1;
                }
                "split" => {
                    let got = split(key(number(1)), number(2) as usize);
                    let got: Vec<i64> = got.into_iter().flatten().map(i64::from).collect();
                    assert_eq!(got, golden.i64s(name), "{name}");
                    splits += 1;
                }
                "bits" => {
                    let key = key(number(1)).map(f64::from);
                    let key = Laid::contiguous(Dtype::U32, &[2], &key);
                    let dtype = [Dtype::U8, Dtype::U16, Dtype::U32][number(2) as usize / 2];
                    let mut out = Laid::poisoned(dtype, &[number(3) as usize], Layout::Contiguous);
                    Pool::new(2).run(&[bits(key.view(), out.view_mut()).unwrap()]).unwrap();
                    let got: Vec<i64> = out.values().into_iter().map(|x| x as i64).collect();
                    assert_eq!(got, golden.i64s(name), "{name}");
                    out.check_untouched_outside();
                    fills += 1;
                }
                _ => {}
            }
        }
        assert!(keys >= 5 && splits >= 20 && fills >= 90, "{keys} {splits} {fills}");
    }

    /// Word by word as MLX's loop does it.
    fn slow(key: [u32; 2], bytes: usize) -> Vec<u8> {
        let words = bytes.div_ceil(4);
        let (half, odd) = (words / 2, words % 2);
        let mut out = vec![0u32; words];
        for i in 0..half {
            let [a, b] = threefry2x32(key, [i as u32, (half + odd + i) as u32]);
            (out[i], out[half + odd + i]) = (a, b);
        }
        if odd == 1 {
            out[half] = threefry2x32(key, [half as u32, 0])[0];
        }
        out.iter().flat_map(|word| word.to_le_bytes()).take(bytes).collect()
    }

    #[test]
    fn many_keys_of_any_layout_and_any_number_of_bytes() {
        for elements in [0usize, 1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 127, 130, 1001, 20_000, 40_003] {
            for dtype in [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::I8] {
                let keys = Laid::new(
                    Dtype::U32,
                    &[3, 2],
                    Layout::Transposed,
                    &[1.0, 2.0, 4294967295.0, 0.0, 7.0, 123456789.0],
                );
                let mut out = Laid::poisoned(dtype, &[3, elements], Layout::Contiguous);
                for threads in [1, 3] {
                    let task = bits(keys.view(), out.view_mut()).unwrap();
                    Pool::new(threads).run(&[task]).unwrap();
                    out.check_untouched_outside();
                    let got: &[u8] = bytemuck::cast_slice(&out.bytes);
                    let bytes = elements * dtype.size();
                    for (i, key) in [[1, 2], [u32::MAX, 0], [7, 123456789]].into_iter().enumerate() {
                        assert!(
                            got[i * bytes..(i + 1) * bytes] == slow(key, bytes),
                            "{dtype} {elements} key {i}"
                        );
                    }
                }
            }
        }
        let keys: Vec<u8> = split([5, 9], 70).into_iter().flatten().flat_map(u32::to_le_bytes).collect();
        assert_eq!(keys, slow([5, 9], 560));
    }

    #[test]
    fn misfits_are_refused() {
        let keys = Laid::contiguous(Dtype::U32, &[3, 2], &[0.0; 6]);
        for (part, dtype, shape, layout) in [
            ("does not start with", Dtype::U32, [2, 3], Layout::Contiguous),
            ("1, 2 or 4 bytes", Dtype::U64, [3, 3], Layout::Contiguous),
            ("contiguous", Dtype::U32, [3, 3], Layout::Padded),
        ] {
            let mut out = Laid::poisoned(dtype, &shape, layout);
            let error = bits(keys.view(), out.view_mut()).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
