//! The places of one long line in order, found by all threads.
//!
//! The passes of [`super::radix`], each over chunks of a fixed size: every chunk counts its bytes, one step turns
//! all counts into places, and every chunk moves its keys there. A stable order is one order, so neither the
//! chunks nor the threads can be seen in the result.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use mica_threads::{Scratch, Task};

use super::Sort;
use super::keys::{Bits, KeyOrder};
use super::radix::{BUCKETS, Key};
use crate::elementwise::tile::TILE_BYTES;
use crate::plan::Workspace;

/// Lines of fewer elements are one thread's.
pub(super) const FROM: usize = 1 << 17;
/// With so many lines every thread has some anyway.
pub(super) const LINES: usize = 8;
/// Elements of a chunk: a few times the 256 counters that it costs.
const CHUNK: usize = 1 << 15;

/// Where things are in the workspace, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// Keys, twice: the rank above, the place below.
    keys: [usize; 2],
    /// 256 counters (u32) a chunk; later where the chunk's keys of that byte go.
    counts: usize,
    /// Whether a byte is the same in all keys (u32 each).
    skipped: usize,
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
        let keys = [next(length * 8), next(length * 8)];
        let (counts, skipped) = (next(chunks * BUCKETS * 4), next(4 * 4));
        Places { keys, counts, skipped, bytes }
    }
}

/// Appends the tasks for one line.
pub(super) fn line<T: Bits>(sort: &Arc<Sort>, line: usize, memory: Workspace, list: &mut Vec<Box<dyn Task>>) {
    let (bytes, places) = (sort.dtype.size(), Places::new(sort.length));
    let mut push = |step: Step, chunks: usize| {
        list.push(Box::new(Pass::<T> {
            sort: sort.clone(),
            line,
            places,
            memory,
            step,
            chunks,
            types: PhantomData,
        }));
    };
    let chunks = sort.length.div_ceil(CHUNK);
    for byte in 0..bytes {
        push(if byte == 0 { Step::Read } else { Step::Count(byte) }, chunks);
        push(Step::Add(byte), 1);
        push(Step::Move(byte), chunks);
    }
}

enum Step {
    /// Makes the keys and counts their first bytes.
    Read,
    Count(usize),
    /// Counts become places.
    Add(usize),
    /// The last byte moves keys to the output.
    Move(usize),
}

struct Pass<T> {
    sort: Arc<Sort>,
    line: usize,
    places: Places,
    memory: Workspace,
    step: Step,
    chunks: usize,
    types: PhantomData<fn(T)>,
}

impl<T: Bits> Pass<T> {
    fn at<V>(&self, offset: usize) -> *mut V {
        self.memory.0.wrapping_add(offset).cast()
    }

    fn range(&self, chunk: usize) -> Range<usize> {
        chunk * CHUNK..self.sort.length.min((chunk + 1) * CHUNK)
    }

    /// The keys before `byte` was sorted by, and after.
    fn keys(&self, byte: usize) -> (*mut u64, *mut u64) {
        // SAFETY: flags of bytes below this one, written by steps before.
        let moved = (0..byte).filter(|&byte| unsafe { *self.at::<u32>(self.places.skipped).add(byte) == 0 });
        let from = moved.count() % 2;
        (self.at(self.places.keys[from]), self.at(self.places.keys[1 - from]))
    }

    fn counts(&self, chunk: usize) -> *mut [u32; BUCKETS] {
        self.at::<[u32; BUCKETS]>(self.places.counts).wrapping_add(chunk)
    }

    fn source(&self) -> *const u8 {
        let size = self.sort.dtype.size() as isize;
        self.sort.source.wrapping_offset(self.sort.source_lines.offset(self.line) * size)
    }

    fn out(&self) -> *mut u8 {
        self.sort.out.wrapping_offset(self.sort.out_lines.offset(self.line) * 4)
    }

    /// # Safety
    /// As [`Sort::tiles`] asks.
    unsafe fn read(&self, chunk: usize, buffer: *mut u8) {
        let order = KeyOrder::new(self.sort.dtype);
        let keys = self.at::<u64>(self.places.keys[0]);
        let mut counts = [0u32; BUCKETS];
        // SAFETY: this chunk's own keys and counters.
        unsafe {
            self.sort.tiles::<T>(self.source(), self.range(chunk), buffer, |start, values| {
                for (i, value) in values.iter().enumerate() {
                    let key = (order.rank(value.low()) as u64) << 32 | (start + i) as u64;
                    *keys.add(start + i) = key;
                    counts[key.digit(32) as usize] += 1;
                }
            });
            *self.counts(chunk) = counts;
        }
    }

    fn count(&self, byte: usize, chunk: usize) {
        let (keys, _) = self.keys(byte);
        let range = self.range(chunk);
        let mut counts = [0u32; BUCKETS];
        // SAFETY: keys that steps before have written; this chunk's counters.
        unsafe {
            let keys = std::slice::from_raw_parts(keys.add(range.start), range.len());
            let shift = 32 + 8 * byte as u32;
            keys.iter().for_each(|key| counts[key.digit(shift) as usize] += 1);
            *self.counts(chunk) = counts;
        }
    }

    fn add(&self, byte: usize) {
        let chunks = self.sort.length.div_ceil(CHUNK);
        // SAFETY: all chunks have left their counters; nothing else runs beside this.
        let counts = unsafe { std::slice::from_raw_parts_mut(self.counts(0), chunks) };
        let mut next = 0;
        let mut alike = false;
        for bucket in 0..BUCKETS {
            let first = next;
            for counts in counts.iter_mut() {
                next += std::mem::replace(&mut counts[bucket], next);
            }
            alike |= (next - first) as usize == self.sort.length;
        }
        let is_last = byte + 1 == self.sort.dtype.size();
        // SAFETY: as above.
        unsafe { *self.at::<u32>(self.places.skipped).add(byte) = (alike && !is_last) as u32 }
    }

    fn move_keys(&self, byte: usize, chunk: usize) {
        // SAFETY: written by the step before.
        if unsafe { *self.at::<u32>(self.places.skipped).add(byte) } != 0 {
            return;
        }
        let (from, to) = self.keys(byte);
        let range = self.range(chunk);
        // SAFETY: this chunk's keys go to places that are its alone: every place of the line is given out once.
        unsafe {
            let mut places = *self.counts(chunk);
            let keys = std::slice::from_raw_parts(from.add(range.start), range.len());
            let shift = 32 + 8 * byte as u32;
            if byte + 1 < self.sort.dtype.size() {
                for &key in keys {
                    let place = &mut places[key.digit(shift) as usize];
                    *to.add(*place as usize) = key;
                    *place += 1;
                }
                return;
            }
            let (out, stride) = (self.out().cast::<u32>(), self.sort.out_stride);
            for &key in keys {
                let place = &mut places[key.digit(shift) as usize];
                *out.offset(*place as isize * stride) = key as u32;
                *place += 1;
            }
        }
    }
}

impl<T: Bits> Task for Pass<T> {
    fn chunks(&self) -> usize {
        self.chunks
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let buffer = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
        match self.step {
            // SAFETY: the buffer holds a tile; T has the size of the line's type.
            Step::Read => unsafe { self.read(chunk, buffer) },
            Step::Count(byte) => self.count(byte, chunk),
            Step::Add(byte) => self.add(byte),
            Step::Move(byte) => self.move_keys(byte, chunk),
        }
    }

    fn name(&self) -> &'static str {
        self.sort.name
    }
}
