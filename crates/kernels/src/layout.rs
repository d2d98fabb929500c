//! One operand's memory in the row-major order of a shape.
//!
//! Kernels number elements by the row-major order of the logical shape, whatever the strides are:
//! work is cut, and reductions are ordered, by that number alone. [`Linear`] turns a range of such
//! numbers into runs of memory with one stride.

use smallvec::SmallVec;

use crate::view::{Dims, Strides};

/// A shape with strides, with neighbouring dimensions merged where memory allows it.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    shape: Dims,
    strides: Strides,
    size: usize,
}

impl Linear {
    pub fn new(shape: &[usize], strides: &[isize]) -> Linear {
        debug_assert_eq!(shape.len(), strides.len());
        let size = shape.iter().product();
        let mut merged = Linear { shape: Dims::new(), strides: Strides::new(), size };
        for (&count, &stride) in shape.iter().zip(strides) {
            if count == 1 {
                continue;
            }
            match (merged.shape.last_mut(), merged.strides.last_mut()) {
                (Some(last), Some(step)) if *step == stride * count as isize => {
                    *last *= count;
                    *step = stride;
                }
                _ => {
                    merged.shape.push(count);
                    merged.strides.push(stride);
                }
            }
        }
        merged
    }

    /// The number of elements.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Every element is the same place.
    pub fn is_constant(&self) -> bool {
        self.strides.iter().all(|&stride| stride == 0)
    }

    /// Memory offset of element `at`, in elements.
    pub fn offset(&self, at: usize) -> isize {
        let (mut rest, mut offset) = (at, 0isize);
        for (&count, &stride) in self.shape.iter().zip(&self.strides).rev() {
            offset += (rest % count) as isize * stride;
            rest /= count;
        }
        offset
    }

    /// Offset of element `at` if `count` elements from it lie next to each other.
    pub fn contiguous_from(&self, at: usize, count: usize) -> Option<isize> {
        match (self.shape.last(), self.strides.last()) {
            (Some(&inner), Some(1)) if at % inner + count <= inner => Some(self.offset(at)),
            (None, None) => Some(0),
            _ if count == 1 => Some(self.offset(at)),
            _ => None,
        }
    }

    /// Calls `run(offset, stride, length)` for the runs that make up `count` elements from `start`.
    #[inline(always)]
    pub fn runs(&self, start: usize, count: usize, mut run: impl FnMut(isize, isize, usize)) {
        if count == 0 {
            return;
        }
        debug_assert!(start + count <= self.size);
        let Some((&inner, outer)) = self.shape.split_last() else {
            return run(0, 0, count);
        };
        let stride = *self.strides.last().expect("as many strides as sizes");
        let mut index: SmallVec<[usize; 8]> = SmallVec::from_elem(0, outer.len());
        let mut rest = start / inner;
        let mut base = 0isize;
        for axis in (0..outer.len()).rev() {
            index[axis] = rest % outer[axis];
            base += index[axis] as isize * self.strides[axis];
            rest /= outer[axis];
        }
        let mut at = start % inner;
        let mut left = count;
        loop {
            let length = left.min(inner - at);
            run(base + at as isize * stride, stride, length);
            left -= length;
            if left == 0 {
                return;
            }
            at = 0;
            for axis in (0..outer.len()).rev() {
                index[axis] += 1;
                base += self.strides[axis];
                if index[axis] < outer[axis] {
                    break;
                }
                base -= self.strides[axis] * outer[axis] as isize;
                index[axis] = 0;
            }
        }
    }
}

/// Values of `$size` bytes, moved without looking at them: calls `$f::<unsigned integer>($args)`.
macro_rules! by_size {
    ($size:expr, $f:ident($($arg:expr),* $(,)?)) => {
        match $size {
            1 => $f::<u8>($($arg),*),
            2 => $f::<u16>($($arg),*),
            4 => $f::<u32>($($arg),*),
            _ => $f::<u64>($($arg),*),
        }
    };
}
pub(crate) use by_size;

/// Asks for bytes to be brought into the second-level cache; any address is fine.
#[inline(always)]
pub(crate) fn prefetch(from: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(64) {
        prefetch_line::<false>(from.wrapping_add(at));
    }
}

/// The same for one line, into the first-level cache if `NEAR`.
#[inline(always)]
pub(crate) fn prefetch_line<const NEAR: bool>(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch touches nothing and cannot fault.
        unsafe {
            if NEAR {
                _mm_prefetch::<_MM_HINT_T0>(at.cast());
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at.cast());
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        if NEAR {
            std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nomem, nostack, preserves_flags));
        } else {
            std::arch::asm!("prfm pldl2keep, [{}]", in(reg) at, options(nomem, nostack, preserves_flags));
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// The same for a line that is read once and not soon again: other lines stay in the caches.
#[inline(always)]
pub(crate) fn prefetch_once(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_NTA, _mm_prefetch};
        // SAFETY: a prefetch touches nothing and cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(at.cast()) }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1strm, [{}]", in(reg) at, options(nomem, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Copies elements `start .. start + count` of `linear` at `source` to `target`, densely.
///
/// # Safety
/// `linear` is inside the memory at `source`; `target` holds `count` elements; both are aligned.
pub(crate) unsafe fn gather_run<T: Copy>(
    source: *const u8,
    linear: &Linear,
    start: usize,
    count: usize,
    target: *mut u8,
) {
    let (source, mut target) = (source.cast::<T>(), target.cast::<T>());
    linear.runs(start, count, |offset, stride, length| {
        // SAFETY: promised by the caller.
        unsafe {
            let from = source.offset(offset);
            match stride {
                1 if length >= 16 => std::ptr::copy_nonoverlapping(from, target, length),
                0 => {
                    let value = *from;
                    for i in 0..length {
                        *target.add(i) = value;
                    }
                }
                _ => {
                    for i in 0..length {
                        *target.add(i) = *from.offset(i as isize * stride);
                    }
                }
            }
            target = target.add(length);
        }
    });
}

/// Copies `count` dense elements at `source` to elements `start .. start + count` of `linear` at
/// `target`.
///
/// # Safety
/// As for [`gather_run`], the other way round.
pub(crate) unsafe fn scatter_run<T: Copy>(
    source: *const u8,
    target: *mut u8,
    linear: &Linear,
    start: usize,
    count: usize,
) {
    let (mut source, target) = (source.cast::<T>(), target.cast::<T>());
    linear.runs(start, count, |offset, stride, length| {
        // SAFETY: promised by the caller.
        unsafe {
            let to = target.offset(offset);
            if stride == 1 && length >= 16 {
                std::ptr::copy_nonoverlapping(source, to, length);
            } else {
                for i in 0..length {
                    *to.offset(i as isize * stride) = *source.add(i);
                }
            }
            source = source.add(length);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_visit_every_element_in_row_major_order() {
        let cases: &[(&str, &[usize], &[isize], usize)] = &[
            ("scalar", &[], &[], 0),
            ("contiguous", &[3, 4, 5], &[20, 5, 1], 1),
            ("unit dimensions", &[1, 3, 1, 4], &[9, 4, 77, 1], 1),
            ("transposed", &[4, 3], &[1, 4], 2),
            ("row broadcast", &[3, 4], &[0, 1], 2),
            ("all broadcast", &[3, 4], &[0, 0], 1),
            ("reversed", &[3, 4], &[-4, -1], 1),
            ("padded rows", &[2, 3, 4], &[30, 10, 1], 2),
            ("nothing merges", &[2, 3, 4], &[100, 10, 2], 3),
        ];
        for &(name, shape, strides, rank) in cases {
            let linear = Linear::new(shape, strides);
            assert_eq!(linear.shape.len(), rank, "{name}");
            let size: usize = shape.iter().product();
            let expected: Vec<isize> = (0..size)
                .map(|at| {
                    let (mut rest, mut offset) = (at, 0);
                    for (&count, &stride) in shape.iter().zip(strides).rev() {
                        offset += (rest % count) as isize * stride;
                        rest /= count;
                    }
                    offset
                })
                .collect();
            for start in 0..size {
                assert_eq!(linear.offset(start), expected[start], "{name}");
                for count in 0..=size - start {
                    let mut got = Vec::new();
                    linear.runs(start, count, |offset, stride, length| {
                        got.extend((0..length as isize).map(|i| offset + i * stride));
                    });
                    assert_eq!(got, expected[start..start + count], "{name} {start} {count}");
                    if let Some(offset) = linear.contiguous_from(start, count)
                        && count > 0
                    {
                        let dense: Vec<isize> = (0..count as isize).map(|i| offset + i).collect();
                        assert_eq!(dense, got, "{name} {start} {count}");
                    }
                }
            }
        }
    }
}
