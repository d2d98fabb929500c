//! Strided views on memory: what kernels read and write.
//!
//! A view is a pointer to its first element, a shape, and strides in elements (which may be zero
//! or negative). The constructors check that every element lies inside the memory they are given,
//! so kernels index without checking again. A [`ViewMut`] is shared by all workers of a task:
//! chunks promise to write disjoint elements.

use std::marker::PhantomData;

use smallvec::SmallVec;

use crate::KernelError;

/// Sizes per dimension.
pub type Dims = SmallVec<[usize; 4]>;
/// Strides per dimension, in elements.
pub type Strides = SmallVec<[isize; 4]>;

/// Row-major strides of a contiguous array of this shape.
#[inline]
pub fn contiguous_strides(shape: &[usize]) -> Strides {
    let mut strides: Strides = SmallVec::from_elem(0, shape.len());
    let mut step = 1isize;
    for (stride, &size) in strides.iter_mut().zip(shape).rev() {
        *stride = step;
        step *= size.max(1) as isize;
    }
    strides
}

/// Lowest and highest element offset that a shape with strides touches, or `None` if it is empty.
pub fn extent(shape: &[usize], strides: &[isize]) -> Option<(isize, isize)> {
    let (mut low, mut high) = (0isize, 0isize);
    for (&size, &stride) in shape.iter().zip(strides) {
        if size == 0 {
            return None;
        }
        // Saturated, an overflow lies outside any memory.
        let reach = isize::try_from(size - 1).unwrap_or(isize::MAX).saturating_mul(stride);
        if reach < 0 { low = low.saturating_add(reach) } else { high = high.saturating_add(reach) }
    }
    Some((low, high))
}

/// Memory that a task reads.
#[derive(Clone, Debug)]
pub struct View<'a, T> {
    pointer: *const T,
    shape: Dims,
    strides: Strides,
    life: PhantomData<&'a [T]>,
}

/// Memory that a task writes.
#[derive(Clone, Debug)]
pub struct ViewMut<'a, T> {
    pointer: *mut T,
    shape: Dims,
    strides: Strides,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: a View is a shared borrow of plain data.
unsafe impl<T: Sync> Send for View<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for View<'_, T> {}
// SAFETY: a ViewMut is an exclusive borrow of plain data; workers that share it write disjoint
// elements, which each unsafe access promises.
unsafe impl<T: Send> Send for ViewMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for ViewMut<'_, T> {}

fn check(len: usize, offset: usize, shape: &[usize], strides: &[isize]) -> Result<(), KernelError> {
    if shape.len() != strides.len() {
        return Err(KernelError::new(
            "view",
            format!("shape {shape:?} and strides {strides:?} differ in rank"),
        ));
    }
    if let Some((low, high)) = extent(shape, strides) {
        let offset_signed = isize::try_from(offset).unwrap_or(isize::MAX);
        let (first, last) = (offset_signed.saturating_add(low), offset_signed.saturating_add(high));
        if first < 0 || last >= len as isize {
            return Err(KernelError::new(
                "view",
                format!(
                    "shape {shape:?} with strides {strides:?} at {offset} leaves the {len} elements given"
                ),
            ));
        }
    }
    Ok(())
}

impl<'a, T> View<'a, T> {
    /// A contiguous view of the whole slice.
    pub fn new(data: &'a [T], shape: &[usize]) -> Result<View<'a, T>, KernelError> {
        View::strided(data, 0, shape, &contiguous_strides(shape))
    }

    /// A view that starts at `data[offset]`.
    pub fn strided(
        data: &'a [T],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<View<'a, T>, KernelError> {
        check(data.len(), offset, shape, strides)?;
        Ok(View {
            pointer: data.as_ptr().wrapping_add(offset),
            shape: shape.into(),
            strides: strides.into(),
            life: PhantomData,
        })
    }

    /// A view of memory that is not borrowed from a slice.
    ///
    /// # Safety
    /// Every element that shape and strides reach from `pointer` is valid to read, and not
    /// written, for `'a`.
    pub unsafe fn from_raw(pointer: *const T, shape: &[usize], strides: &[isize]) -> View<'a, T> {
        assert_eq!(shape.len(), strides.len(), "shape and strides differ in rank");
        View { pointer, shape: shape.into(), strides: strides.into(), life: PhantomData }
    }
}

impl<'a, T> ViewMut<'a, T> {
    /// A contiguous view of the whole slice.
    pub fn new(data: &'a mut [T], shape: &[usize]) -> Result<ViewMut<'a, T>, KernelError> {
        ViewMut::strided(data, 0, shape, &contiguous_strides(shape))
    }

    /// A view that starts at `data[offset]`.
    pub fn strided(
        data: &'a mut [T],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<ViewMut<'a, T>, KernelError> {
        check(data.len(), offset, shape, strides)?;
        Ok(ViewMut {
            pointer: data.as_mut_ptr().wrapping_add(offset),
            shape: shape.into(),
            strides: strides.into(),
            life: PhantomData,
        })
    }

    /// A view of memory that is not borrowed from a slice.
    ///
    /// # Safety
    /// Every element that shape and strides reach from `pointer` is valid to read and write for
    /// `'a`, and reached by nobody else except as the kernel's documentation allows.
    pub unsafe fn from_raw(pointer: *mut T, shape: &[usize], strides: &[isize]) -> ViewMut<'a, T> {
        assert_eq!(shape.len(), strides.len(), "shape and strides differ in rank");
        ViewMut { pointer, shape: shape.into(), strides: strides.into(), life: PhantomData }
    }

    /// The first element.
    pub fn pointer(&self) -> *mut T {
        self.pointer
    }

    /// A contiguous run of elements as a slice.
    ///
    /// # Safety
    /// `index` is inside the shape, `count` elements from it are contiguous and inside the view,
    /// and no other chunk touches them while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn run_mut(&self, index: &[usize], count: usize) -> &mut [T] {
        debug_assert!(index.len() == self.shape.len());
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.offset(offset_of(index, &self.strides)), count) }
    }
}

/// Element offset of an index.
#[inline]
pub fn offset_of(index: &[usize], strides: &[isize]) -> isize {
    index.iter().zip(strides).map(|(&at, &stride)| at as isize * stride).sum()
}

macro_rules! geometry {
    ($($view:ident)*) => { $(
        impl<T> $view<'_, T> {
            /// Sizes per dimension.
            pub fn shape(&self) -> &[usize] {
                &self.shape
            }

            /// Strides per dimension, in elements.
            pub fn strides(&self) -> &[isize] {
                &self.strides
            }

            /// The number of dimensions.
            pub fn rank(&self) -> usize {
                self.shape.len()
            }

            /// The number of elements.
            pub fn size(&self) -> usize {
                self.shape.iter().product()
            }

            /// Whether elements follow each other in row-major order without gaps.
            pub fn is_contiguous(&self) -> bool {
                let mut step = 1isize;
                for (&size, &stride) in self.shape.iter().zip(&self.strides).rev() {
                    if size != 1 && stride != step {
                        return size == 0;
                    }
                    step *= size as isize;
                }
                true
            }
        }
    )* };
}
geometry!(View ViewMut);

impl<'a, T> View<'a, T> {
    /// The first element.
    pub fn pointer(&self) -> *const T {
        self.pointer
    }

    /// All elements, if they are contiguous.
    pub fn as_slice(&self) -> Option<&'a [T]> {
        // SAFETY: contiguous and, by construction, all inside the borrowed memory.
        self.is_contiguous().then(|| unsafe { std::slice::from_raw_parts(self.pointer, self.size()) })
    }

    /// A contiguous run of elements as a slice.
    ///
    /// # Safety
    /// `index` is inside the shape, and `count` elements from it are contiguous and inside the
    /// view.
    pub unsafe fn run(&self, index: &[usize], count: usize) -> &'a [T] {
        debug_assert!(index.len() == self.shape.len());
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts(self.pointer.offset(offset_of(index, &self.strides)), count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_that_leave_their_memory_are_refused() {
        let data = [0f32; 12];
        for (name, offset, shape, strides, ok) in [
            ("whole", 0, [3, 4], [4, 1], true),
            ("transposed", 0, [4, 3], [1, 4], true),
            ("one too many", 0, [3, 5], [4, 1], false),
            ("reversed", 11, [3, 4], [-4, -1], true),
            ("reversed from the start", 0, [3, 4], [-4, -1], false),
            ("broadcast", 3, [1000, 4], [0, 1], true),
            ("strides that overflow", 0, [3, 4], [isize::MAX, 1], false),
            ("strides that overflow downwards", 11, [3, 4], [isize::MIN, 1], false),
            ("empty anywhere", 12, [0, 4], [4, 1], true),
        ] {
            assert_eq!(View::strided(&data, offset, &shape, &strides).is_ok(), ok, "{name}");
        }
    }

    #[test]
    fn contiguity_ignores_unit_dimensions() {
        let data = [0f32; 12];
        assert!(View::strided(&data, 0, &[1, 12], &[99, 1]).unwrap().is_contiguous());
        assert!(!View::strided(&data, 0, &[4, 3], &[1, 4]).unwrap().is_contiguous());
    }
}
