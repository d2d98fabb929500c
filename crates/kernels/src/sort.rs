//! Sorting and selecting along an axis.
//!
//! Ascending and stable; NaN after everything else; -0 and 0 are equal; complex numbers by their
//! real parts, then by their imaginary ones. A line is sorted by
//! (value, place), so the answer is one, whatever the algorithm. Outputs may not alias sources.

mod radix;

use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::{CHUNK, TILE, TILE_BYTES, check_output, check_rank};
use crate::error::KernelError;
use crate::layout::{Linear, by_size, gather_run};
use crate::view::{Dims, Strides};

/// How much order is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SortOrder {
    /// All of it.
    Full,
    /// The element that sorting would put at this place is there, smaller ones before it, larger
    /// ones after it. (MLX leaves their order open; here it is that of a full sort up to this
    /// place and by original place after it.)
    Partition(usize),
}

/// `out` = the values along `axis`, in order. Both have one type and shape.
pub fn sort(
    source: DynView,
    axis: usize,
    order: SortOrder,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let name = if order == SortOrder::Full { "sort" } else { "partition" };
    let dtype = source.dtype;
    build(name, source, axis, order, out, dtype, false)
}

/// `out` (uint32) = the places along `axis` of the values in order.
pub fn argsort(
    source: DynView,
    axis: usize,
    order: SortOrder,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
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
) -> Result<Box<dyn Task>, KernelError> {
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
    Ok(Box::new(Sort {
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
    }))
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

/// A number with the order of the value that `bits` of `dtype` are.
#[inline(always)]
fn rank_of(dtype: Dtype, bits: u64) -> u64 {
    /// Sign and magnitude to two's order; zeros meet, NaN of either sign goes last.
    #[inline(always)]
    fn float(bits: u64, width: u32, infinity: u64) -> u64 {
        let top = 1u64 << (width - 1);
        let magnitude = bits & (top - 1);
        if magnitude > infinity {
            u64::MAX
        } else if bits & top != 0 {
            top - magnitude
        } else {
            top + magnitude
        }
    }
    match dtype {
        Dtype::Bool | Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => bits,
        Dtype::I8 => bits ^ 0x80,
        Dtype::I16 => bits ^ 0x8000,
        Dtype::I32 => bits ^ 0x8000_0000,
        Dtype::I64 => bits ^ (1 << 63),
        Dtype::F16 => float(bits, 16, 0x7c00),
        Dtype::BF16 => float(bits, 16, 0x7f80),
        Dtype::F32 => float(bits, 32, 0x7f80_0000),
        Dtype::F64 => float(bits, 64, 0x7ff0_0000_0000_0000),
        Dtype::C64 => {
            match (float(bits & 0xffff_ffff, 32, 0x7f80_0000), float(bits >> 32, 32, 0x7f80_0000)) {
                (u64::MAX, _) | (_, u64::MAX) => u64::MAX,
                (re, im) => re << 32 | im,
            }
        }
    }
}

/// An unsigned integer that holds the bits of a value.
trait Bits: Copy + Into<u64> + 'static {
    fn of(bits: u32) -> Self;
}

macro_rules! bits {
    ($($t:ty)*) => { $(
        impl Bits for $t {
            #[inline(always)]
            fn of(bits: u32) -> $t {
                bits as $t
            }
        }
    )* };
}
bits!(u8 u16 u32 u64);

/// Keys of values of at most 32 bits: unsigned integers of their order from which they come back
/// (NaN without its sign).
#[derive(Clone, Copy)]
struct KeyOrder {
    /// The sign bit; 0 for unsigned integers.
    sign: u32,
    /// All bits of the type.
    mask: u32,
    /// The bits of +∞; the mask for integers.
    infinity: u32,
}

impl KeyOrder {
    fn new(dtype: Dtype) -> KeyOrder {
        let mask = u32::MAX >> (32 - 8 * dtype.size().min(4) as u32);
        let top = mask ^ (mask >> 1);
        let (sign, infinity) = match dtype {
            Dtype::F16 => (top, 0x7c00),
            Dtype::BF16 => (top, 0x7f80),
            Dtype::F32 => (top, 0x7f80_0000),
            dtype if dtype.is_signed_integer() => (top, mask),
            _ => (0, mask),
        };
        KeyOrder { sign, mask, infinity }
    }

    fn is_float(self) -> bool {
        self.infinity != self.mask
    }

    fn negative_zero(self) -> u32 {
        self.zero().wrapping_sub(1)
    }

    fn zero(self) -> u32 {
        self.sign
    }

    #[inline(always)]
    fn key(self, bits: u32) -> u32 {
        if !self.is_float() {
            return bits ^ self.sign;
        }
        let magnitude = bits & !self.sign;
        if bits & self.sign == 0 || magnitude > self.infinity {
            magnitude | self.sign
        } else {
            !bits & self.mask
        }
    }

    #[inline(always)]
    fn value(self, key: u32) -> u32 {
        if !self.is_float() || key & self.sign != 0 { key ^ self.sign } else { !key & self.mask }
    }
}

impl Sort {
    /// # Safety
    /// `line` is one of the lines, T an unsigned integer of the type's size.
    unsafe fn line<T: Bits>(&self, line: usize, scratch: &Scratch, buffer: *mut u8) {
        let size = self.dtype.size() as isize;
        let source = self.source.wrapping_offset(self.source_lines.offset(line) * size);
        if self.order == SortOrder::Full && self.length >= radix::FROM && size <= 4 {
            // SAFETY: the caller's.
            return unsafe {
                match self.places {
                    true => self.long_line_places::<T>(line, source, scratch, buffer),
                    false => self.long_line_values::<T>(line, source, scratch, buffer),
                }
            };
        }
        let ranks = scratch.take::<u64>(self.length);
        let places = scratch.take::<u32>(self.length);
        for start in (0..self.length).step_by(TILE) {
            let count = TILE.min(self.length - start);
            // SAFETY: inside the line; the buffer holds a tile.
            let values = unsafe {
                gather_run::<T>(source, &self.source_line, start, count, buffer);
                std::slice::from_raw_parts(buffer.cast::<T>(), count)
            };
            for (i, &value) in values.iter().enumerate() {
                ranks[start + i] = rank_of(self.dtype, value.into());
                places[start + i] = (start + i) as u32;
            }
        }
        let key = |&place: &u32| (ranks[place as usize], place);
        match self.order {
            SortOrder::Full => places.sort_unstable_by_key(key),
            SortOrder::Partition(at) => {
                let (before, _, after) = places.select_nth_unstable_by_key(at, key);
                before.sort_unstable_by_key(key);
                after.sort_unstable();
            }
        }
        if self.places {
            let out = self.out.cast::<u32>().wrapping_offset(self.out_lines.offset(line));
            for (i, &place) in places.iter().enumerate() {
                // SAFETY: inside the output's line, this chunk's own.
                unsafe { *out.offset(i as isize * self.out_stride) = place }
            }
            return;
        }
        let out = self.out.cast::<T>().wrapping_offset(self.out_lines.offset(line));
        for (i, &place) in places.iter().enumerate() {
            // SAFETY: inside the line of each; the output's is this chunk's own.
            unsafe {
                *out.offset(i as isize * self.out_stride) =
                    *source.cast::<T>().offset(place as isize * self.source_stride);
            }
        }
    }

    /// The places of a long line of numbers of at most 32 bits: rank and place are one key.
    ///
    /// # Safety
    /// As for [`Sort::line`]; `source` is where the line begins.
    unsafe fn long_line_places<T: Bits>(
        &self,
        line: usize,
        source: *const u8,
        scratch: &Scratch,
        buffer: *mut u8,
    ) {
        let keys = scratch.take::<u64>(self.length);
        // SAFETY: the caller's.
        unsafe {
            self.read::<T>(source, buffer, |place, value| {
                // NaN has a rank past 32 bits; no other value's is as large as what it gets here.
                let rank = rank_of(self.dtype, value.into()).min(u32::MAX as u64);
                keys[place] = rank << 32 | place as u64;
            });
        }
        let other = scratch.take::<u64>(self.length);
        let bits = 8 * self.dtype.size() as u32;
        let sorted = if radix::sort(keys, other, 32, 32 + bits) { other } else { keys };
        let out = self.out.cast::<u32>().wrapping_offset(self.out_lines.offset(line));
        for (i, &key) in sorted.iter().enumerate() {
            // SAFETY: inside the output's line, this chunk's own.
            unsafe { *out.offset(i as isize * self.out_stride) = key as u32 }
        }
    }

    /// The values of a long line of numbers of at most 32 bits: keys from which the values come
    /// back, with -0 before 0.
    ///
    /// # Safety
    /// As for [`Sort::line`]; `source` is where the line begins.
    unsafe fn long_line_values<T: Bits>(
        &self,
        line: usize,
        source: *const u8,
        scratch: &Scratch,
        buffer: *mut u8,
    ) {
        let keys = scratch.take::<u32>(self.length);
        let width = 8 * self.dtype.size() as u32;
        let order = KeyOrder::new(self.dtype);
        let (mut negative_zeros, mut zeros) = (0, 0);
        // SAFETY: the caller's.
        unsafe {
            self.read::<T>(source, buffer, |place, value| {
                let key = order.key(Into::<u64>::into(value) as u32);
                keys[place] = key;
                negative_zeros += (key == order.negative_zero()) as usize;
                zeros += (key == order.zero()) as usize;
            });
        }
        let other = scratch.take::<u32>(self.length);
        let sorted = if radix::sort(keys, other, 0, width) { other } else { keys };
        if order.is_float() && negative_zeros > 0 && zeros > 0 {
            // Equal values keep their order.
            let mut next = sorted.partition_point(|&key| key < order.negative_zero());
            // SAFETY: the caller's.
            unsafe {
                self.read::<T>(source, buffer, |_, value| {
                    let key = order.key(Into::<u64>::into(value) as u32);
                    if key == order.negative_zero() || key == order.zero() {
                        sorted[next] = key;
                        next += 1;
                    }
                });
            }
        }
        let out = self.out.cast::<T>().wrapping_offset(self.out_lines.offset(line));
        for (i, &key) in sorted.iter().enumerate() {
            // SAFETY: inside the output's line, this chunk's own.
            unsafe { *out.offset(i as isize * self.out_stride) = T::of(order.value(key)) }
        }
    }

    /// Hands each value of a line on with its place.
    ///
    /// # Safety
    /// As for [`Sort::line`]; `source` is where the line begins.
    unsafe fn read<T: Bits>(&self, source: *const u8, buffer: *mut u8, mut each: impl FnMut(usize, T)) {
        for start in (0..self.length).step_by(TILE) {
            let count = TILE.min(self.length - start);
            // SAFETY: inside the line; the buffer holds a tile.
            let values = unsafe {
                gather_run::<T>(source, &self.source_line, start, count, buffer);
                std::slice::from_raw_parts(buffer.cast::<T>(), count)
            };
            values.iter().enumerate().for_each(|(i, &value)| each(start + i, value));
        }
    }

    fn lines_a_chunk(&self) -> usize {
        // Sorting costs more than reading: chunks are smaller.
        (CHUNK / 4 / self.length.max(1)).max(1)
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
                            let tasks = [
                                sort(a.view(), axis, by, sorted.view_mut()).unwrap(),
                                argsort(a.view(), axis, by, places.view_mut()).unwrap(),
                            ];
                            Pool::new(threads).run(&tasks).unwrap();
                            sorted.check_untouched_outside();
                            places.check_untouched_outside();
                            let (sorted, places) = (sorted.values(), places.values());
                            for line in lines(shape, axis) {
                                let name = format!("{dtype} {shape:?} {axis} {layout:?} {by:?}");
                                let own: Vec<f64> = line.iter().map(|&at| values[at]).collect();
                                let mut expected = order(&own);
                                if let Some(at) = partition {
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
