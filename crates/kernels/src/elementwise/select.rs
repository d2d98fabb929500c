//! Ops that only move values: select, and the identity behind cast.

use super::tile::TileOp;

struct Select<T>(std::marker::PhantomData<fn(T)>);
struct Move(usize);

/// `out = condition ? a : b` for values of `size` bytes.
pub(crate) fn select_op(size: usize) -> Box<dyn TileOp> {
    fn make<T: Copy + 'static>() -> Box<dyn TileOp> {
        Box::new(Select::<T>(std::marker::PhantomData))
    }
    crate::layout::by_size!(size, make())
}

/// `out = a` for values of `size` bytes.
pub(crate) fn move_op(size: usize) -> Box<dyn TileOp> {
    Box::new(Move(size))
}

impl<T: Copy> TileOp for Select<T> {
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize) {
        let (condition, a, b) = (inputs[0], inputs[1].cast::<T>(), inputs[2].cast::<T>());
        let out = output.cast::<T>();
        // SAFETY: promised by the caller.
        unsafe {
            for i in 0..count {
                // Both are read, so that the compiler may make a blend of it.
                let (x, y) = (*a.add(i), *b.add(i));
                *out.add(i) = if *condition.add(i) != 0 { x } else { y };
            }
        }
    }
}

impl TileOp for Move {
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize) {
        // SAFETY: promised by the caller; input and output may be the same.
        unsafe { std::ptr::copy(inputs[0], output, count * self.0) }
    }
}
