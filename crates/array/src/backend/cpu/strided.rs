//! Places in strided memory, and tasks, for ops whose kernels are written here.

use mica_threads::{FnTask, Scratch, Task};

use crate::backend::HostView;
use crate::shape::Shape;

/// A pointer that tasks share. Whoever makes one sees that their chunks write disjoint places.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub *mut u8);

// SAFETY: the evaluator keeps the memory alive and ordered; chunks write disjoint places.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// The pointer (a method, so that closures capture the whole).
    pub fn get(&self) -> *mut u8 {
        self.0
    }
}

/// A task of `chunks` chunks.
pub(super) fn task(
    name: &'static str,
    chunks: usize,
    run: impl Fn(usize, &mut Scratch) + Send + Sync + 'static,
) -> Box<dyn Task> {
    Box::new(FnTask::new(name, chunks, run))
}

/// The index of an element per dimension.
pub(super) fn unravel(mut index: usize, shape: &[usize]) -> Shape {
    let mut result = Shape::from_elem(0, shape.len());
    for axis in (0..shape.len()).rev() {
        result[axis] = index % shape[axis].max(1);
        index /= shape[axis].max(1);
    }
    result
}

/// The offset of an index, in elements.
pub(super) fn offset(view: &HostView, index: &[usize]) -> isize {
    index.iter().zip(&view.strides).map(|(&at, &stride)| at as isize * stride).sum()
}

/// The first element of line number `line` along an axis.
pub(super) fn line_start(view: &HostView, axis: usize, line: usize) -> *mut u8 {
    let mut shape = view.shape.clone();
    shape[axis] = 1;
    let at = offset(view, &unravel(line, &shape));
    view.pointer.wrapping_offset(at * view.dtype.size() as isize)
}
