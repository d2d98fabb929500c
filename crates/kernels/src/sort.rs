//! Sorting and selecting along an axis.
//!
//! Ascending and stable; NaN after everything else; -0 and 0 are equal; complex numbers by their
//! real parts, then by their imaginary ones. A line is sorted by
//! (value, place), so the answer is one, whatever the algorithm. Outputs may not alias sources.

mod keys;
mod long;
#[cfg(target_arch = "x86_64")]
mod quick;
mod radix;
mod shared;

use std::ops::Range;
use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::{CHUNK, TILE, TILE_BYTES, check_output, check_rank};
use crate::error::KernelError;
use crate::layout::{Linear, by_size, gather_run};
use crate::plan::Plan;
use crate::view::{Dims, Strides};
#[cfg(target_arch = "x86_64")]
use keys::write_words;
use keys::{Bits, KeyOrder, keys_of, rank_of, write_values};

/// How much order is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SortOrder {
    /// All of it.
    Full,
    /// The element that sorting would put at this place is there, those that would come before it before it,
    /// the others after it. (MLX leaves their order open; here they stay in their original order.)
    Partition(usize),
}

/// `out` = the values along `axis`, in order. Both have one type and shape.
pub fn sort(source: DynView, axis: usize, order: SortOrder, out: DynViewMut) -> Result<Plan, KernelError> {
    let name = if order == SortOrder::Full { "sort" } else { "partition" };
    let dtype = source.dtype;
    build(name, source, axis, order, out, dtype, false)
}

/// `out` (uint32) = the places along `axis` of the values in order.
pub fn argsort(source: DynView, axis: usize, order: SortOrder, out: DynViewMut) -> Result<Plan, KernelError> {
    let name = if order == SortOrder::Full { "argsort" } else { "argpartition" };
    build(name, source, axis, order, out, Dtype::U32, true)
}

fn build(
    name: &'static str,
    source: DynView,
    axis: usize,
    order: SortOrder,
    out: DynViewMut,
    expected: Dtype,
    places: bool,
) -> Result<Plan, KernelError> {
    check_rank(name, &source.shape, &source.strides)?;
    if out.dtype != expected || out.shape != source.shape {
        let message = format!(
            "the result is {expected} of {:?}, the output {} of {:?}",
            source.shape, out.dtype, out.shape
        );
        return Err(KernelError::new(name, message));
    }
    check_output(name, &out)?;
    if axis >= source.shape.len() {
        return Err(KernelError::new(name, format!("axis {axis} is not in shape {:?}", source.shape)));
    }
    let length = source.shape[axis];
    if length > u32::MAX as usize {
        return Err(KernelError::new(name, format!("lines of at most 2^32 elements, got {length}")));
    }
    if let SortOrder::Partition(at) = order
        && at >= length
        && length > 0
    {
        return Err(KernelError::new(name, format!("place {at} is not on an axis of {length}")));
    }
    let sort = Sort {
        name,
        dtype: source.dtype,
        source: source.pointer,
        out: out.pointer,
        source_line: Linear::new(&[length], &[source.strides[axis]]),
        out_stride: out.strides[axis],
        source_stride: source.strides[axis],
        source_lines: lines_of(&source.shape, &source.strides, axis),
        out_lines: lines_of(&out.shape, &out.strides, axis),
        length,
        order,
        places,
    };
    Ok(sort.plan())
}

/// Places of the lines along an axis.
fn lines_of(shape: &Dims, strides: &Strides, axis: usize) -> Linear {
    let (mut shape, mut strides) = (shape.clone(), strides.clone());
    shape.remove(axis);
    strides.remove(axis);
    Linear::new(&shape, &strides)
}

struct Sort {
    name: &'static str,
    dtype: Dtype,
    source: *const u8,
    out: *mut u8,
    source_line: Linear,
    source_stride: isize,
    out_stride: isize,
    source_lines: Linear,
    out_lines: Linear,
    length: usize,
    order: SortOrder,
    places: bool,
}

// SAFETY: made of views that may be used from any thread (their maker's promise); chunks write
// disjoint lines.
unsafe impl Send for Sort {}
// SAFETY: as above.
unsafe impl Sync for Sort {}

impl Sort {
    fn plan(self) -> Plan {
        let lines = self.source_lines.size();
        let is_long = self.order == SortOrder::Full
            && self.dtype.size() <= 4
            && self.length >= long::FROM
            && lines < long::LINES;
        if !is_long {
            return Plan::new(0, |_, list| list.push(Box::new(self)));
        }
        let places = self.places;
        let bytes = match places {
            true => long::Places::new(self.length).bytes,
            false => shared::Places::new(self.length).bytes,
        };
        Plan::new(bytes, move |memory, list| {
            let sort = Arc::new(self);
            for line in 0..lines {
                match (places, sort.dtype.size()) {
                    (false, 1) => shared::line::<u8>(&sort, line, memory, list),
                    (false, 2) => shared::line::<u16>(&sort, line, memory, list),
                    (false, _) => shared::line::<u32>(&sort, line, memory, list),
                    (true, 1) => long::line::<u8>(&sort, line, memory, list),
                    (true, 2) => long::line::<u16>(&sort, line, memory, list),
                    (true, _) => long::line::<u32>(&sort, line, memory, list),
                }
            }
        })
    }

    /// # Safety
    /// `line` is one of the lines, T an unsigned integer of the type's size; the buffer holds a tile.
    unsafe fn line<T: Bits>(&self, line: usize, scratch: &Scratch, buffer: *mut u8) {
        let size = self.dtype.size() as isize;
        let source = self.source.wrapping_offset(self.source_lines.offset(line) * size);
        let out_size = if self.places { 4 } else { size };
        let out = self.out.wrapping_offset(self.out_lines.offset(line) * out_size);
        // SAFETY: the caller's.
        unsafe {
            match (self.order, self.places) {
                _ if size > 4 => self.wide::<T>(source, out, scratch, buffer),
                (SortOrder::Full, true) => self.ordered_places::<T>(source, out, scratch, buffer),
                (SortOrder::Full, false) => self.ordered_values::<T>(source, out, scratch, buffer),
                (SortOrder::Partition(at), _) => self.parted::<T>(at, source, out, scratch, buffer),
            }
        }
    }

    /// Types of eight bytes: places are compared by what they stand for.
    ///
    /// # Safety
    /// `source` and `out` are where a line begins, the rest as for [`Sort::line`].
    unsafe fn wide<T: Bits>(&self, source: *const u8, out: *mut u8, scratch: &Scratch, buffer: *mut u8) {
        let ranks = scratch.take::<u64>(self.length);
        let places = scratch.take::<u32>(self.length);
        // SAFETY: the caller's.
        unsafe {
            self.tiles::<T>(source, 0..self.length, buffer, |start, values| {
                for (i, &value) in values.iter().enumerate() {
                    ranks[start + i] = rank_of(self.dtype, value.into());
                    places[start + i] = (start + i) as u32;
                }
            });
        }
        let key = |&place: &u32| (ranks[place as usize], place);
        match self.order {
            SortOrder::Full => places.sort_unstable_by_key(key),
            SortOrder::Partition(at) => {
                let (before, _, after) = places.select_nth_unstable_by_key(at, key);
                before.sort_unstable();
                after.sort_unstable();
            }
        }
        for (i, &place) in places.iter().enumerate() {
            let to = i as isize * self.out_stride;
            // SAFETY: inside the line of each; the output's is this chunk's own.
            unsafe {
                if self.places {
                    *out.cast::<u32>().offset(to) = place;
                } else {
                    *out.cast::<T>().offset(to) =
                        *source.cast::<T>().offset(place as isize * self.source_stride);
                }
            }
        }
    }

    /// Rank and place are one key.
    ///
    /// # Safety
    /// As for [`Sort::wide`].
    unsafe fn ordered_places<T: Bits>(
        &self,
        source: *const u8,
        out: *mut u8,
        scratch: &Scratch,
        buffer: *mut u8,
    ) {
        let keys = scratch.take::<u64>(self.length);
        // SAFETY: the caller's.
        unsafe { self.marked_ranks::<T>(source, keys, buffer) }
        let write = |i: usize, key: u64| {
            // SAFETY: inside the output's line, this chunk's own.
            unsafe { *out.cast::<u32>().offset(i as isize * self.out_stride) = key as u32 }
        };
        if self.length < radix::FROM {
            keys.sort_unstable();
            keys.iter().enumerate().for_each(|(i, &key)| write(i, key));
        } else {
            radix::sort(keys, scratch.take::<u64>(self.length), 32, self.dtype.size(), write);
        }
    }

    /// The rank above, the place below.
    ///
    /// # Safety
    /// As for [`Sort::wide`].
    unsafe fn marked_ranks<T: Bits>(&self, source: *const u8, keys: &mut [u64], buffer: *mut u8) {
        let order = KeyOrder::new(self.dtype);
        // SAFETY: the caller's.
        unsafe {
            self.tiles::<T>(source, 0..self.length, buffer, |start, values| {
                for (i, (key, value)) in keys[start..].iter_mut().zip(values).enumerate() {
                    *key = (order.rank(value.low()) as u64) << 32 | (start + i) as u64;
                }
            });
        }
    }

    /// Keys from which the values come back, with -0 before 0.
    ///
    /// # Safety
    /// As for [`Sort::wide`].
    unsafe fn ordered_values<T: Bits>(
        &self,
        source: *const u8,
        out: *mut u8,
        scratch: &Scratch,
        buffer: *mut u8,
    ) {
        let keys = scratch.take::<u32>(self.length);
        let (isa, order) = (Isa::get(), KeyOrder::new(self.dtype));
        let (mut has_negative_zero, mut has_zero) = (false, false);
        // SAFETY: the caller's.
        unsafe {
            self.tiles::<T>(source, 0..self.length, buffer, |start, values| {
                let keys = &mut keys[start..start + values.len()];
                keys_of(isa, order, values, keys, false);
                if order.is_float() {
                    let has = |zero: u32| keys.iter().fold(false, |has, &key| has | (key == zero));
                    has_negative_zero |= has(order.negative_zero());
                    has_zero |= has(order.zero());
                }
            });
            sort_keys(isa, keys, self.dtype.size(), scratch);
            write_values(isa, order, keys, out.cast::<T>(), self.out_stride);
        }
        if has_negative_zero && has_zero {
            // SAFETY: the caller's; the line has been written.
            unsafe { self.order_zeros::<T>(source, out, buffer) }
        }
    }

    /// Writes the zeros of a sorted line once more, in their original order: -0 and 0 are equal.
    ///
    /// # Safety
    /// As for [`Sort::wide`].
    unsafe fn order_zeros<T: Bits>(&self, source: *const u8, out: *mut u8, buffer: *mut u8) {
        let order = KeyOrder::new(self.dtype);
        let (first, last) = (order.negative_zero(), order.zero());
        let mut next = 0;
        // SAFETY: the caller's.
        unsafe {
            self.tiles::<T>(source, 0..self.length, buffer, |_, values| {
                next += values.iter().filter(|value| order.key(value.low()) < first).count();
            });
            self.tiles::<T>(source, 0..self.length, buffer, |_, values| {
                for &value in values.iter().filter(|value| (first..=last).contains(&order.key(value.low()))) {
                    *out.cast::<T>().offset(next as isize * self.out_stride) = value;
                    next += 1;
                }
            });
        }
    }

    /// The line with what belongs before place `at` before it, in the original order on both sides.
    ///
    /// # Safety
    /// As for [`Sort::wide`].
    unsafe fn parted<T: Bits>(
        &self,
        at: usize,
        source: *const u8,
        out: *mut u8,
        scratch: &Scratch,
        buffer: *mut u8,
    ) {
        let (isa, order) = (Isa::get(), KeyOrder::new(self.dtype));
        let ranks = scratch.take::<u32>(self.length);
        // SAFETY: the caller's.
        unsafe {
            self.tiles::<T>(source, 0..self.length, buffer, |start, values| {
                keys_of(isa, order, values, &mut ranks[start..start + values.len()], true);
            });
        }
        let ranks = &*ranks;
        let (middle, smaller) = select(isa, ranks, self.dtype.size(), at, scratch);
        #[cfg(target_arch = "x86_64")]
        if matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx) {
            let words = scratch.take::<u32>(self.length);
            // SAFETY: the caller's; the tier is the machine's, and there is room.
            unsafe {
                if self.places {
                    words.iter_mut().zip(0..).for_each(|(word, place)| *word = place);
                } else {
                    self.tiles::<T>(source, 0..self.length, buffer, |start, values| {
                        words[start..].iter_mut().zip(values).for_each(|(word, value)| *word = value.low());
                    });
                }
                let other = scratch.take::<u32>(self.length + quick::ROOM);
                quick::part(ranks, words, other, at, (middle, smaller));
                if self.places {
                    write_words(words, out.cast::<u32>(), self.out_stride);
                } else {
                    write_words(words, out.cast::<T>(), self.out_stride);
                }
            }
            return;
        }
        // Of equal ones the first go before.
        let mut equal = (0..self.length).filter(|&place| ranks[place] == middle);
        let middle_place = equal.nth(at - smaller).expect("as many are equal as were counted");
        let (mut before, mut after) = (0, at + 1);
        // SAFETY: the caller's; `at` elements are before the middle one, so every place is written once.
        unsafe {
            self.tiles::<T>(source, 0..self.length, buffer, |start, values| {
                for (i, (&rank, &value)) in ranks[start..].iter().zip(values).enumerate() {
                    let place = start + i;
                    let is_before = (rank < middle) | ((rank == middle) & (place < middle_place));
                    let is_middle = place == middle_place;
                    let side = if is_before { before } else { after };
                    let to = if is_middle { at } else { side } as isize * self.out_stride;
                    before += is_before as usize;
                    after += !(is_before | is_middle) as usize;
                    if self.places {
                        *out.cast::<u32>().offset(to) = place as u32;
                    } else {
                        *out.cast::<T>().offset(to) = value;
                    }
                }
            });
        }
    }

    /// Hands on the elements of a range of a line with the place of the first, some at a time.
    ///
    /// # Safety
    /// `source` is where the line begins, T an unsigned integer of the type's size; the buffer holds a tile.
    unsafe fn tiles<T: Bits>(
        &self,
        source: *const u8,
        range: Range<usize>,
        buffer: *mut u8,
        mut each: impl FnMut(usize, &[T]),
    ) {
        for start in range.clone().step_by(TILE) {
            let count = TILE.min(range.end - start);
            // SAFETY: inside the line; the buffer holds a tile.
            let values = unsafe {
                let place = match self.source_line.contiguous_from(start, count) {
                    Some(offset) => source.cast::<T>().offset(offset),
                    None => {
                        gather_run::<T>(source, &self.source_line, start, count, buffer);
                        buffer.cast::<T>().cast_const()
                    }
                };
                std::slice::from_raw_parts(place, count)
            };
            each(start, values);
        }
    }

    fn lines_a_chunk(&self) -> usize {
        // Sorting costs more than reading: chunks are smaller.
        (CHUNK / 4 / self.length.max(1)).max(1)
    }
}

/// Sorts keys of so many bytes.
fn sort_keys(isa: Isa, keys: &mut [u32], bytes: usize, scratch: &Scratch) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
            let other = scratch.take::<u32>(keys.len() + quick::ROOM);
            // SAFETY: the tier is the machine's, and there is room.
            unsafe { quick::sort(keys, other) }
        }
        _ if keys.len() < radix::FROM => keys.sort_unstable(),
        _ => {
            let sorted = scratch.take::<u32>(keys.len());
            radix::sort(keys, scratch.take::<u32>(keys.len()), 0, bytes, |place, key| sorted[place] = key);
            keys.copy_from_slice(sorted);
        }
    }
}

/// The key (of so many bytes) at place `at` in order, and how many are smaller.
fn select(isa: Isa, keys: &[u32], bytes: usize, at: usize, scratch: &Scratch) -> (u32, usize) {
    let other = scratch.take::<u32>(keys.len() + 16);
    if keys.len() >= radix::FROM && !matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx) {
        return radix::select(keys, &mut other[..keys.len()], bytes, at);
    }
    let copy = scratch.take::<u32>(keys.len());
    copy.copy_from_slice(keys);
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tier is the machine's, and there is room.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { quick::select(copy, other, at) },
        _ => {
            let (before, &mut found, _) = copy.select_nth_unstable(at);
            (found, before.iter().filter(|&&key| key < found).count())
        }
    }
}

unsafe fn sort_line<T: Bits>(sort: &Sort, line: usize, scratch: &Scratch, buffer: *mut u8) {
    // SAFETY: promised by the caller.
    unsafe { sort.line::<T>(line, scratch, buffer) }
}

impl Task for Sort {
    fn chunks(&self) -> usize {
        if self.length == 0 { 0 } else { self.source_lines.size().div_ceil(self.lines_a_chunk()) }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let step = self.lines_a_chunk();
        for line in chunk * step..self.source_lines.size().min((chunk + 1) * step) {
            let buffer = scratch.take::<u8>(TILE_BYTES).as_mut_ptr();
            // SAFETY: lines of this chunk, integers of the type's size.
            unsafe { by_size!(self.dtype.size(), sort_line(self, line, scratch, buffer)) }
            scratch.reset();
        }
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::*;
    use crate::plan::run_plan;
    use crate::testing::{Laid, Layout, layouts};

    /// Stable ascending order, NaN last.
    fn order(line: &[f64]) -> Vec<usize> {
        let mut places: Vec<usize> = (0..line.len()).collect();
        places.sort_by(|&a, &b| {
            let (a, b) = (line[a], line[b]);
            a.is_nan().cmp(&b.is_nan()).then(a.partial_cmp(&b).unwrap_or(std::cmp::Ordering::Equal))
        });
        places
    }

    fn lines(shape: &[usize], axis: usize) -> Vec<Vec<usize>> {
        let stride: usize = shape[axis + 1..].iter().product();
        (0..shape.iter().product())
            .filter(|at| (at / stride).is_multiple_of(shape[axis]))
            .map(|first| (0..shape[axis]).map(|i| first + i * stride).collect())
            .collect()
    }

    #[test]
    fn sorts_every_type_axis_and_layout() {
        let mut rng = Rng::new(41);
        for (shape, axis) in
            [(&[1][..], 0), (&[50], 0), (&[5000], 0), (&[30, 20], 1), (&[30, 20], 0), (&[3, 9, 40], 1)]
        {
            for dtype in Dtype::ALL {
                let a = Laid::random(dtype, shape, Layout::Contiguous, &mut rng);
                let mut values = a.values();
                if dtype.is_float() {
                    let n = values.len();
                    for special in
                        [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, f64::NAN, -f64::NAN]
                    {
                        values[rng.range(0..n)] = special;
                    }
                }
                for layout in layouts(shape) {
                    let a = Laid::new(dtype, shape, layout, &values);
                    for partition in [None, Some(0), Some(shape[axis] / 2), Some(shape[axis] - 1)] {
                        let by = partition.map_or(SortOrder::Full, SortOrder::Partition);
                        let mut sorted = Laid::poisoned(dtype, shape, layout);
                        let mut places = Laid::poisoned(Dtype::U32, shape, Layout::Padded);
                        for threads in [1, 3] {
                            let pool = Pool::new(threads);
                            run_plan(&pool, sort(a.view(), axis, by, sorted.view_mut()).unwrap());
                            run_plan(&pool, argsort(a.view(), axis, by, places.view_mut()).unwrap());
                            sorted.check_untouched_outside();
                            places.check_untouched_outside();
                            let (sorted, places) = (sorted.values(), places.values());
                            for line in lines(shape, axis) {
                                let name = format!("{dtype} {shape:?} {axis} {layout:?} {by:?}");
                                let own: Vec<f64> = line.iter().map(|&at| values[at]).collect();
                                let mut expected = order(&own);
                                if let Some(at) = partition {
                                    expected[..at].sort_unstable();
                                    expected[at + 1..].sort_unstable();
                                }
                                let got: Vec<usize> = line.iter().map(|&at| places[at] as usize).collect();
                                assert_eq!(got, expected, "{name}");
                                for (i, &at) in line.iter().enumerate() {
                                    let (got, want) = (sorted[at], own[expected[i]]);
                                    assert!(
                                        got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
                                        "{name}"
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// Lines that threads share, and one element less.
    #[test]
    fn long_lines_are_the_same_on_any_number_of_threads() {
        let mut rng = Rng::new(43);
        for length in [long::FROM - 1, long::FROM, long::FROM + 33_333] {
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::I32, Dtype::U8] {
                let mut values = Laid::random(dtype, &[2, length], Layout::Contiguous, &mut rng).values();
                if dtype.is_float() {
                    for special in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, 0.0, -0.0] {
                        values[rng.range(0..length)] = special;
                    }
                }
                // The second line has few values: most bytes are alike.
                values[length..].iter_mut().for_each(|value| *value = if *value > 0.5 { 1.0 } else { 0.0 });
                for layout in [Layout::Contiguous, Layout::Padded] {
                    let a = Laid::new(dtype, &[2, length], layout, &values);
                    let mut sorted = Laid::poisoned(dtype, &[2, length], layout);
                    let mut places = Laid::poisoned(Dtype::U32, &[2, length], layout);
                    for threads in [1, 3] {
                        let pool = Pool::new(threads);
                        run_plan(&pool, sort(a.view(), 1, SortOrder::Full, sorted.view_mut()).unwrap());
                        run_plan(&pool, argsort(a.view(), 1, SortOrder::Full, places.view_mut()).unwrap());
                        sorted.check_untouched_outside();
                        places.check_untouched_outside();
                        let (sorted, places) = (sorted.values(), places.values());
                        for line in 0..2 {
                            let range = line * length..(line + 1) * length;
                            let own = &values[range.clone()];
                            let expected = order(own);
                            for (i, at) in range.enumerate() {
                                let want = own[expected[i]];
                                assert!(
                                    places[at] as usize == expected[i],
                                    "{dtype} {length} {layout:?} {i}"
                                );
                                let same = sorted[at].to_bits() == want.to_bits();
                                assert!(
                                    same || (sorted[at].is_nan() && want.is_nan()),
                                    "{dtype} {length} {i}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn misfits_are_refused() {
        let a = Laid::contiguous(Dtype::F32, &[3], &[1.0, 2.0, 3.0]);
        let mut out = Laid::poisoned(Dtype::F32, &[3], Layout::Contiguous);
        for (part, result) in [
            ("not in shape", sort(a.view(), 1, SortOrder::Full, out.view_mut())),
            ("place 3", sort(a.view(), 0, SortOrder::Partition(3), out.view_mut())),
            ("uint32", argsort(a.view(), 0, SortOrder::Full, out.view_mut())),
        ] {
            let error = result.err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
