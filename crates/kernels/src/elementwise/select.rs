//! Select: an op that only moves values.

use super::tile::TileOp;

struct Select<T>(std::marker::PhantomData<fn(T)>);

/// `out = condition ? a : b` for values of `size` bytes.
pub(crate) fn select_op(size: usize) -> Box<dyn TileOp> {
    fn make<T: Copy + 'static>() -> Box<dyn TileOp> {
        Box::new(Select::<T>(std::marker::PhantomData))
    }
    crate::layout::by_size!(size, make())
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
