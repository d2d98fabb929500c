//! Shapes, broadcasting and axes.

use smallvec::SmallVec;

use crate::{Error, Result};

/// Sizes per dimension; a scalar has none.
pub type Shape = SmallVec<[usize; 4]>;
/// Strides per dimension, in elements.
pub type Strides = SmallVec<[isize; 4]>;

/// The number of elements; `usize::MAX` if there are more than that.
#[inline]
pub fn size_of(shape: &[usize]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    shape.iter().fold(1, |count: usize, &size| count.saturating_mul(size))
}

/// Whether two short lists are equal; comparing memory by a call would take longer.
#[inline]
pub(crate) fn same(a: &[usize], b: &[usize]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b)
}

/// The shape that both broadcast to, as NumPy and MLX do.
pub fn broadcast_shapes(op: &'static str, a: &[usize], b: &[usize]) -> Result<Shape> {
    if same(a, b) {
        return Ok(Shape::from_slice(a));
    }
    let rank = a.len().max(b.len());
    let mut shape = Shape::from_elem(1, rank);
    for (position, size) in shape.iter_mut().enumerate() {
        let at = |s: &[usize]| (position + s.len()).checked_sub(rank).map_or(1, |i| s[i]);
        *size = match (at(a), at(b)) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => return Err(Error::shapes(op, &a.into(), &b.into())),
        };
    }
    Ok(shape)
}

/// Strides that read an array of `shape` and `strides` as if it had the shape `to`.
pub fn broadcast_strides(shape: &[usize], strides: &[isize], to: &[usize]) -> Strides {
    let lead = to.len() - shape.len();
    (0..to.len())
        .map(|position| match position.checked_sub(lead) {
            Some(i) if shape[i] == to[position] => strides[i],
            _ => 0,
        })
        .collect()
}

/// An axis that may be negative, made positive.
pub fn normalize_axis(op: &'static str, axis: i32, rank: usize) -> Result<usize> {
    let at = if axis < 0 { axis as i64 + rank as i64 } else { axis as i64 };
    if at < 0 || at >= rank as i64 {
        return Err(Error::invalid(
            op,
            format!("axis {axis} is out of range for an array of {rank} dimensions"),
        ));
    }
    Ok(at as usize)
}

/// Axes made positive, ascending and checked for duplicates; an empty list means all.
pub fn normalize_axes(op: &'static str, axes: &[i32], rank: usize) -> Result<SmallVec<[usize; 4]>> {
    if axes.is_empty() {
        return Ok((0..rank).collect());
    }
    let mut list =
        axes.iter().map(|&axis| normalize_axis(op, axis, rank)).collect::<Result<SmallVec<[usize; 4]>>>()?;
    list.sort_unstable();
    if list.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid(op, format!("axes {axes:?} name a dimension twice")));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasting() {
        let cases: [(&[usize], &[usize], Option<&[usize]>); 6] = [
            (&[2, 3], &[2, 3], Some(&[2, 3])),
            (&[2, 1], &[3], Some(&[2, 3])),
            (&[], &[4], Some(&[4])),
            (&[0, 1], &[1, 5], Some(&[0, 5])),
            (&[2], &[3], None),
            (&[5, 1, 2], &[4, 1], Some(&[5, 4, 2])),
        ];
        for (a, b, expected) in cases {
            let got = broadcast_shapes("test", a, b).ok();
            assert_eq!(got.as_deref(), expected, "{a:?} with {b:?}");
        }
        assert_eq!(broadcast_strides(&[2, 1], &[1, 1], &[7, 2, 3]).as_slice(), &[0, 1, 0]);
    }
}
