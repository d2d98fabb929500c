//! Whether an op of a recorded graph can be played on inputs of other sizes.

use smallvec::SmallVec;

use crate::op::{Op, SortOrder};
use crate::storage::Spec;
use crate::transforms::recorded;

/// Whether these sizes are ones that the op's constructor would accept. That sizes which must be
/// equal are equal follows from how they were found; what is asked here is what holds for some
/// sizes and not for others: that slices lie within their arrays, and that nothing is empty.
pub(crate) fn can_be(op: &Op, inputs: &[&[usize]], outputs: &[Spec]) -> bool {
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let shape = outputs[0].shape.as_slice();
    if outputs.iter().any(|spec| spec.shape.contains(&0)) {
        return false;
    }
    match op {
        Op::Slice { start, step } => is_inside(start, step, shape, inputs[0]),
        Op::SliceUpdate { start, step } => is_inside(start, step, inputs[1], inputs[0]),
        Op::Reshape => count(shape) == count(inputs[0]),
        Op::AsStrided { strides, offset } => {
            let reach = |forward: bool| -> isize {
                let far = |(&size, &stride): (&usize, &isize)| (size as isize - 1) * stride;
                shape.iter().zip(strides).map(far).filter(|far| (*far > 0) == forward).sum()
            };
            let last = *offset as isize + reach(true);
            *offset as isize + reach(false) >= 0 && last < count(inputs[0]) as isize
        }
        Op::Gather { slice, .. } => slice.iter().zip(inputs[0]).all(|(size, whole)| size <= whole),
        Op::Sort { axis, order: SortOrder::Partition(kth) }
        | Op::ArgSort { axis, order: SortOrder::Partition(kth) } => *kth < inputs[0][*axis],
        Op::Custom(custom) => recorded::fits(custom.as_ref(), inputs),
        _ => true,
    }
}

/// Whether a slice of this shape lies inside an array of the other.
fn is_inside(
    start: &SmallVec<[usize; 4]>,
    step: &SmallVec<[isize; 4]>,
    slice: &[usize],
    whole: &[usize],
) -> bool {
    slice.iter().zip(whole).enumerate().all(|(axis, (&size, &whole))| {
        let first = start[axis] as isize;
        let last = first + (size as isize - 1) * step[axis];
        let inside = |place: isize| (0..whole as isize).contains(&place);
        size == 0 || (inside(first) && inside(last))
    })
}
