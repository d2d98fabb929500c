//! The values of one long line, sorted by all threads.
//!
//! Samples of chunks of a fixed size give the limits of buckets; every chunk is split at these limits, by vectors
//! where there is AVX-512, else by sorting it; and the parts of all chunks that fall into a bucket are sorted
//! together. Keys that are equal are one number, so the result is one, and every step reads and writes memory in its
//! order.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::keys::{Bits, KeyOrder, keys_of, write_values};
#[cfg(target_arch = "x86_64")]
use super::quick;
use super::{Sort, sort_keys};
use crate::elementwise::tile::TILE_BYTES;
use crate::plan::Workspace;

/// Elements of a chunk: splitting and sorting it stay in the second-level cache.
const CHUNK: usize = 1 << 16;
/// Samples of a chunk. Of a sorted one they keep buckets below twice their share, but for equal keys; of one that is
/// not they come from anywhere in it, and it takes bad luck.
const SAMPLES: usize = 64;
/// Buckets at most.
const BUCKETS: usize = 256;

/// Where things are in the workspace, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Places {
    keys: usize,
    /// The smallest key of each bucket but the first.
    limits: usize,
    samples: usize,
    /// For every chunk where its keys of each bucket begin, and where the last ends.
    cuts: usize,
    /// Whether a chunk has a −0, and a 0 (a byte each).
    zeros: usize,
    pub bytes: usize,
}

impl Places {
    pub fn new(length: usize) -> Places {
        let chunks = length.div_ceil(CHUNK);
        let mut bytes = 0;
        let mut next = |size: usize| {
            bytes += size.next_multiple_of(64);
            bytes - size.next_multiple_of(64)
        };
        let (keys, limits, samples) = (next(length * 4), next(BUCKETS * 4), next(chunks * SAMPLES * 4));
        let (cuts, zeros) = (next(chunks * (BUCKETS + 1) * 4), next(chunks * 2));
        Places { keys, limits, samples, cuts, zeros, bytes }
    }
}

/// Appends the tasks that sort one line.
pub(super) fn line<T: Bits>(sort: &Arc<Sort>, line: usize, memory: Workspace, list: &mut Vec<Box<dyn Task>>) {
    let places = Places::new(sort.length);
    for step in [Step::Chunk, Step::Limits, Step::Cut, Step::Bucket, Step::Zeros] {
        list.push(Box::new(Pass::<T> { sort: sort.clone(), line, places, memory, step, types: PhantomData }));
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Makes the keys of a chunk (and sorts them, without AVX-512), and takes samples.
    Chunk,
    Limits,
    /// Brings the keys of a chunk into the order of their buckets.
    Cut,
    /// Brings the keys of a bucket together and writes their values.
    Bucket,
    /// Zeros of either sign are equal: they keep their order.
    Zeros,
}

struct Pass<T> {
    sort: Arc<Sort>,
    line: usize,
    places: Places,
    memory: Workspace,
    step: Step,
    types: PhantomData<fn(T)>,
}

impl<T: Bits> Pass<T> {
    fn at<V>(&self, offset: usize) -> *mut V {
        self.memory.0.wrapping_add(offset).cast()
    }

    fn lengths(&self) -> (usize, usize) {
        let chunks = self.sort.length.div_ceil(CHUNK);
        (chunks, chunks.min(BUCKETS))
    }

    fn range(&self, chunk: usize) -> Range<usize> {
        chunk * CHUNK..self.sort.length.min((chunk + 1) * CHUNK)
    }

    /// The keys of a chunk.
    ///
    /// # Safety
    /// They have been written, and nobody writes them meanwhile.
    unsafe fn keys(&self, chunk: usize) -> &[u32] {
        let range = self.range(chunk);
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(self.at::<u32>(self.places.keys).add(range.start), range.len()) }
    }

    fn cuts(&self, chunk: usize) -> *mut u32 {
        self.at::<u32>(self.places.cuts).wrapping_add(chunk * (BUCKETS + 1))
    }

    fn source(&self) -> *const u8 {
        let size = self.sort.dtype.size() as isize;
        self.sort.source.wrapping_offset(self.sort.source_lines.offset(self.line) * size)
    }

    fn out(&self) -> *mut T {
        self.sort.out.cast::<T>().wrapping_offset(self.sort.out_lines.offset(self.line))
    }

    fn chunk(&self, chunk: usize, scratch: &Scratch) {
        let (isa, order, range) = (Isa::get(), KeyOrder::new(self.sort.dtype), self.range(chunk));
        let buffer = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        // SAFETY: this chunk's own keys, samples and flags; T has the size of the line's type.
        unsafe {
            let keys = self.at::<u32>(self.places.keys).add(range.start);
            let keys = std::slice::from_raw_parts_mut(keys, range.len());
            let mut zeros = [false; 2];
            self.sort.tiles::<T>(self.source(), range.clone(), buffer, |start, values| {
                let keys = &mut keys[start - range.start..][..values.len()];
                keys_of(isa, order, values, keys, false);
                if order.is_float() {
                    let has = |zero: u32| keys.iter().fold(false, |has, &key| has | (key == zero));
                    zeros[0] |= has(order.negative_zero());
                    zeros[1] |= has(order.zero());
                }
            });
            *self.at::<[u8; 2]>(self.places.zeros).add(chunk) = zeros.map(u8::from);
            let splits = splits(isa);
            if !splits {
                sort_keys(isa, keys, self.sort.dtype.size(), scratch);
            }
            for i in 0..SAMPLES {
                let place = match splits {
                    true => anywhere(chunk * SAMPLES + i, keys.len()),
                    false => (2 * i + 1) * keys.len() / (2 * SAMPLES),
                };
                *self.at::<u32>(self.places.samples).add(chunk * SAMPLES + i) = keys[place];
            }
        }
    }

    fn limits(&self) {
        let (chunks, buckets) = self.lengths();
        // SAFETY: all chunks have left their samples; nothing else runs beside this.
        unsafe {
            let samples = self.at::<u32>(self.places.samples);
            let samples = std::slice::from_raw_parts_mut(samples, chunks * SAMPLES);
            samples.sort_unstable();
            for bucket in 1..buckets {
                let limit = samples[bucket * samples.len() / buckets];
                *self.at::<u32>(self.places.limits).add(bucket) = limit;
            }
        }
    }

    fn cut(&self, chunk: usize, scratch: &Scratch) {
        let (_, buckets) = self.lengths();
        let range = self.range(chunk);
        // SAFETY: written by the steps before; the keys and cuts are this chunk's own.
        let (keys, cuts, limits) = unsafe {
            let keys = self.at::<u32>(self.places.keys).add(range.start);
            let limits = self.at::<u32>(self.places.limits);
            (
                std::slice::from_raw_parts_mut(keys, range.len()),
                std::slice::from_raw_parts_mut(self.cuts(chunk), buckets + 1),
                std::slice::from_raw_parts(limits.add(1), buckets - 1),
            )
        };
        cuts[0] = 0;
        cuts[buckets] = keys.len() as u32;
        split(Isa::get(), keys, limits, &mut cuts[1..buckets], scratch);
    }

    fn bucket(&self, bucket: usize, scratch: &Scratch) {
        let (chunks, _) = self.lengths();
        // SAFETY: written by the steps before.
        let part = |chunk: usize| unsafe {
            let cuts = self.cuts(chunk);
            *cuts.add(bucket) as usize..*cuts.add(bucket + 1) as usize
        };
        // As many keys are below the bucket as all chunks have before it.
        let start: usize = (0..chunks).map(|chunk| part(chunk).start).sum();
        let length: usize = (0..chunks).map(|chunk| part(chunk).len()).sum();
        let keys = scratch.take::<u32>(length);
        let mut at = 0;
        for chunk in 0..chunks {
            // SAFETY: all chunks are split, and only read from now on.
            let part = unsafe { &self.keys(chunk)[part(chunk)] };
            keys[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        let (isa, order, stride) = (Isa::get(), KeyOrder::new(self.sort.dtype), self.sort.out_stride);
        sort_keys(isa, keys, self.sort.dtype.size(), scratch);
        // SAFETY: the bucket's places of the output are its own.
        unsafe { write_values(isa, order, keys, self.out().offset(start as isize * stride), stride) }
    }

    fn zeros(&self, scratch: &Scratch) {
        let (chunks, _) = self.lengths();
        // SAFETY: all chunks have left theirs.
        let zeros = unsafe { std::slice::from_raw_parts(self.at::<[u8; 2]>(self.places.zeros), chunks) };
        let has = |sign: usize| zeros.iter().any(|zeros| zeros[sign] != 0);
        if has(0) && has(1) {
            let buffer = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
            // SAFETY: the line is complete, and nothing else runs beside this.
            unsafe { self.sort.order_zeros::<T>(self.source(), self.out().cast(), buffer) }
        }
    }
}

/// Whether keys are split where they are not sorted.
fn splits(isa: Isa) -> bool {
    matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx)
}

/// One of so many places, by a number: places of consecutive numbers have no pattern that data could share.
fn anywhere(number: usize, places: usize) -> usize {
    let mixed = (number as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    ((mixed * places as u64) >> 32) as usize
}

/// Orders keys by bucket and notes where each but the first begins; keys below its limit are before it.
fn split(isa: Isa, keys: &mut [u32], limits: &[u32], cuts: &mut [u32], scratch: &Scratch) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
            let other = scratch.take::<u32>(keys.len() + quick::ROOM);
            // SAFETY: the tier is the machine's, and there is room.
            unsafe { quick::split(keys, other, limits, cuts) }
        }
        _ => {
            let _ = scratch;
            for (cut, &limit) in cuts.iter_mut().zip(limits) {
                *cut = keys.partition_point(|&key| key < limit) as u32;
            }
        }
    }
}

impl<T: Bits> Task for Pass<T> {
    fn chunks(&self) -> usize {
        let (chunks, buckets) = self.lengths();
        match self.step {
            Step::Chunk | Step::Cut => chunks,
            Step::Bucket => buckets,
            Step::Limits | Step::Zeros => 1,
        }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        match self.step {
            Step::Chunk => self.chunk(chunk, scratch),
            Step::Limits => self.limits(),
            Step::Cut => self.cut(chunk, scratch),
            Step::Bucket => self.bucket(chunk, scratch),
            Step::Zeros => self.zeros(scratch),
        }
    }

    fn name(&self) -> &'static str {
        self.sort.name
    }
}
