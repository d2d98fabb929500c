//! Gathering and scattering along several axes at once.

use mica_kernels::elementwise::complex;

use super::dense::{Dense, Values, ravel, unravel};
use super::movement::wrap;
use crate::op::{BinaryOp, ScatterOp};
use crate::shape::{Shape, broadcast_shapes};

/// The index that position `at` of the common shape has in an array that broadcasts to it.
fn broadcast_place(at: &[usize], shape: &[usize]) -> usize {
    let own: Shape = shape
        .iter()
        .zip(&at[at.len() - shape.len()..])
        .map(|(&size, &index)| if size == 1 { 0 } else { index })
        .collect();
    ravel(&own, shape)
}

/// Where the slice for position `at` begins.
fn origin(indices: &[Dense], axes: &[usize], at: &[usize], shape: &[usize]) -> Shape {
    let mut origin = Shape::from_elem(0, shape.len());
    for (index, &axis) in indices.iter().zip(axes) {
        origin[axis] = wrap(index.int(broadcast_place(at, &index.shape)), shape[axis]);
    }
    origin
}

fn common_shape(indices: &[Dense]) -> Shape {
    indices.iter().fold(Shape::new(), |shape, index| {
        broadcast_shapes("gather", &shape, &index.shape).expect("checked when the node was built")
    })
}

pub(super) fn gather(inputs: &[Dense], axes: &[usize], slice: &[usize], shape: &[usize]) -> Dense {
    let (x, indices) = (&inputs[0], &inputs[1..]);
    let rank = shape.len() - slice.len();
    let places = (0..shape.iter().product()).map(|i| {
        let index = unravel(i, shape);
        let mut place = origin(indices, axes, &index[..rank], &x.shape);
        place.iter_mut().zip(&index[rank..]).for_each(|(at, inside)| *at += inside);
        ravel(&place, &x.shape)
    });
    x.gathered(shape, places)
}

pub(super) fn scatter(op: ScatterOp, inputs: &[Dense], axes: &[usize]) -> Dense {
    let (updates, indices) = (&inputs[1], &inputs[2..]);
    let mut result = inputs[0].clone();
    let rank = common_shape(indices).len();
    for i in 0..updates.size() {
        let index = unravel(i, &updates.shape);
        let mut place = origin(indices, axes, &index[..rank], &result.shape);
        place.iter_mut().zip(&index[rank..]).for_each(|(at, inside)| *at += inside);
        let place = ravel(&place, &result.shape);
        join(op, &mut result, place, updates, i);
    }
    result
}

pub(super) fn scatter_along(op: ScatterOp, inputs: &[Dense], axis: usize) -> Dense {
    let (indices, updates) = (&inputs[1], &inputs[2]);
    let mut result = inputs[0].clone();
    for i in 0..indices.size() {
        let mut index = unravel(i, &indices.shape);
        index[axis] = wrap(indices.int(i), result.shape[axis]);
        let place = ravel(&index, &result.shape);
        join(op, &mut result, place, updates, i);
    }
    result
}

fn join(op: ScatterOp, into: &mut Dense, place: usize, updates: &Dense, from: usize) {
    match &mut into.values {
        Values::Int(values) => {
            let (old, new) = (values[place], updates.int(from));
            values[place] = match op {
                ScatterOp::Set => new,
                ScatterOp::Add => old + new,
                ScatterOp::Prod => old.wrapping_mul(new),
                ScatterOp::Max => old.max(new),
                ScatterOp::Min => old.min(new),
            };
        }
        Values::Float(values) => {
            let (old, new) = (values[place], updates.at(from));
            values[place] = match op {
                ScatterOp::Set => new,
                ScatterOp::Add => old + new,
                ScatterOp::Prod => old * new,
                ScatterOp::Max if old.is_nan() || old > new => old,
                ScatterOp::Min if old.is_nan() || old < new => old,
                ScatterOp::Max | ScatterOp::Min => new,
            };
        }
        Values::Complex(values) => {
            let new = updates.pair(from);
            let join = |op| complex::binary(op).expect("complex numbers have it")(values[place], new);
            values[place] = match op {
                ScatterOp::Set => new,
                ScatterOp::Add => join(BinaryOp::Add),
                ScatterOp::Prod => join(BinaryOp::Multiply),
                ScatterOp::Max => join(BinaryOp::Maximum),
                ScatterOp::Min => join(BinaryOp::Minimum),
            };
        }
    }
}
