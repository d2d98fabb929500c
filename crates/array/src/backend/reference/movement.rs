//! Concatenation, gathering, scattering.

use super::dense::{Dense, Values, ravel, unravel};
use crate::shape::{Shape, size_of};

/// A result of `like`'s kind whose element `i` is element `from(i).1` of `from(i).0`.
fn gathered<'a>(shape: &[usize], like: &Dense, from: impl Fn(usize) -> (&'a Dense, usize)) -> Dense {
    let picks = (0..size_of(shape)).map(from);
    match &like.values {
        Values::Int(_) => Dense::ints(shape, picks.map(|(x, at)| x.int(at)).collect()),
        Values::Float(_) => Dense::floats(shape, picks.map(|(x, at)| x.at(at)).collect()),
        Values::Complex(_) => Dense::complex(shape, picks.map(|(x, at)| x.pair(at)).collect()),
    }
}

pub(super) fn concatenate(inputs: &[Dense], axis: usize, shape: &[usize]) -> Dense {
    gathered(shape, &inputs[0], |i| {
        let mut index = unravel(i, shape);
        for input in inputs {
            if index[axis] < input.shape[axis] {
                return (input, ravel(&index, &input.shape));
            }
            index[axis] -= input.shape[axis];
        }
        unreachable!("sizes along the axis add up")
    })
}

pub(super) fn slice_update(x: &Dense, update: &Dense, start: &[usize], step: &[isize]) -> Dense {
    let mut result = x.clone();
    for i in 0..update.size() {
        let index: Shape = unravel(i, &update.shape)
            .iter()
            .enumerate()
            .map(|(axis, &at)| (start[axis] as isize + at as isize * step[axis]) as usize)
            .collect();
        let at = ravel(&index, &x.shape);
        match &mut result.values {
            Values::Float(values) => values[at] = update.at(i),
            Values::Int(values) => values[at] = update.int(i),
            Values::Complex(values) => values[at] = update.pair(i),
        }
    }
    result
}

/// An index, counted from the end if negative, kept inside.
pub(super) fn wrap(index: i128, size: usize) -> usize {
    let index = if index < 0 { index + size as i128 } else { index };
    index.clamp(0, size.max(1) as i128 - 1) as usize
}

pub(super) fn take(x: &Dense, indices: &Dense, axis: usize, shape: &[usize]) -> Dense {
    let rank = indices.shape.len();
    gathered(shape, x, |i| {
        let index = unravel(i, shape);
        let at = ravel(&index[axis..axis + rank], &indices.shape);
        let mut source: Shape = index[..axis].into();
        source.push(wrap(indices.int(at), x.shape[axis]));
        source.extend_from_slice(&index[axis + rank..]);
        (x, ravel(&source, &x.shape))
    })
}

pub(super) fn take_along(x: &Dense, indices: &Dense, axis: usize) -> Dense {
    gathered(&indices.shape, x, |i| {
        let mut index = unravel(i, &indices.shape);
        index[axis] = wrap(indices.int(i), x.shape[axis]);
        (x, ravel(&index, &x.shape))
    })
}

pub(super) fn scatter_add(indices: &Dense, updates: &Dense, axis: usize, shape: &[usize]) -> Dense {
    let rank = indices.shape.len();
    let mut result = vec![(0.0, 0.0); size_of(shape)];
    for i in 0..updates.size() {
        let index = unravel(i, &updates.shape);
        let at = ravel(&index[axis..axis + rank], &indices.shape);
        let mut target: Shape = index[..axis].into();
        target.push(wrap(indices.int(at), shape[axis]));
        target.extend_from_slice(&index[axis + rank..]);
        add(&mut result[ravel(&target, shape)], updates.pair(i));
    }
    summed(shape, result, updates)
}

pub(super) fn scatter_add_along(indices: &Dense, updates: &Dense, axis: usize, shape: &[usize]) -> Dense {
    let mut result = vec![(0.0, 0.0); size_of(shape)];
    for i in 0..updates.size() {
        let mut index = unravel(i, &updates.shape);
        index[axis] = wrap(indices.int(i), shape[axis]);
        add(&mut result[ravel(&index, shape)], updates.pair(i));
    }
    summed(shape, result, updates)
}

fn add(sum: &mut (f64, f64), value: (f64, f64)) {
    *sum = (sum.0 + value.0, sum.1 + value.1);
}

fn summed(shape: &[usize], sums: Vec<(f64, f64)>, like: &Dense) -> Dense {
    if like.is_complex() {
        Dense::complex(shape, sums)
    } else {
        Dense::floats(shape, sums.into_iter().map(|sum| sum.0).collect())
    }
}
