//! Sorting, and what runs along an axis.

use std::cmp::Ordering;

use mica_kernels::elementwise::complex;

use super::dense::{Dense, Values, ravel, unravel};
use super::elementwise;
use crate::Dtype;
use crate::dtype_info::iinfo;
use crate::op::{BinaryOp, ScanOp, SortOrder};

/// Per line along an axis, the row-major numbers of its elements.
fn lines(shape: &[usize], axis: usize) -> Vec<Vec<usize>> {
    let count: usize = shape.iter().product();
    (0..count)
        .filter(|&i| unravel(i, shape)[axis] == 0)
        .map(|first| {
            let mut index = unravel(first, shape);
            (0..shape[axis])
                .map(|at| {
                    index[axis] = at;
                    ravel(&index, shape)
                })
                .collect()
        })
        .collect()
}

/// Smallest and largest number of a dtype without fractions.
fn limits(dtype: Dtype) -> (i128, i128) {
    iinfo(dtype).map_or((0, 1), |info| (info.min, info.max))
}

pub(super) fn scan(
    op: ScanOp,
    x: &Dense,
    axis: usize,
    reverse: bool,
    exclusive: bool,
    dtype: Dtype,
) -> Dense {
    let mut result = x.clone();
    let joined = match op {
        ScanOp::Sum => BinaryOp::Add,
        ScanOp::Prod => BinaryOp::Multiply,
        ScanOp::Max => BinaryOp::Maximum,
        ScanOp::Min => BinaryOp::Minimum,
        ScanOp::LogSumExp => BinaryOp::LogAddExp,
    };
    for mut line in lines(&x.shape, axis) {
        if reverse {
            line.reverse();
        }
        macro_rules! run {
            ($values:expr, $own:expr, $neutral:expr, $join:expr) => {{
                let mut so_far = $neutral;
                for place in line {
                    let next = $join(so_far, $own(place));
                    $values[place] = if exclusive { so_far } else { next };
                    so_far = next;
                }
            }};
        }
        match &mut result.values {
            Values::Float(values) => {
                let neutral = match op {
                    ScanOp::Sum => 0.0,
                    ScanOp::Prod => 1.0,
                    ScanOp::Max | ScanOp::LogSumExp => f64::NEG_INFINITY,
                    ScanOp::Min => f64::INFINITY,
                };
                run!(values, |at| x.at(at), neutral, |a, b| elementwise::join_floats(joined, a, b));
            }
            Values::Int(values) => {
                let neutral = match op {
                    ScanOp::Sum | ScanOp::LogSumExp => 0,
                    ScanOp::Prod => 1,
                    ScanOp::Max => limits(dtype).0,
                    ScanOp::Min => limits(dtype).1,
                };
                run!(values, |at| x.int(at), neutral, |a: i128, b: i128| match op {
                    ScanOp::Sum | ScanOp::LogSumExp => a + b,
                    ScanOp::Prod => a.wrapping_mul(b),
                    ScanOp::Max => a.max(b),
                    ScanOp::Min => a.min(b),
                });
            }
            Values::Complex(values) => {
                let low = (f64::NEG_INFINITY, f64::NEG_INFINITY);
                let neutral = match op {
                    ScanOp::Sum => (0.0, 0.0),
                    ScanOp::Prod => (1.0, 0.0),
                    ScanOp::Max => low,
                    ScanOp::LogSumExp => (f64::NEG_INFINITY, 0.0),
                    ScanOp::Min => (f64::INFINITY, f64::INFINITY),
                };
                let join = complex::binary(joined).expect("complex numbers have it");
                run!(values, |at| x.pair(at), neutral, join);
            }
        }
    }
    result
}

/// Ascending, NaN last.
fn compare(x: &Dense, a: usize, b: usize) -> Ordering {
    match &x.values {
        Values::Int(values) => values[a].cmp(&values[b]),
        _ => {
            let (p, q) = (x.pair(a), x.pair(b));
            let nan = |p: complex::Pair| p.0.is_nan() || p.1.is_nan();
            match (nan(p), nan(q)) {
                (false, false) if complex::is_less(p, q) => Ordering::Less,
                (false, false) if complex::is_less(q, p) => Ordering::Greater,
                (false, true) => Ordering::Less,
                (true, false) => Ordering::Greater,
                _ => Ordering::Equal,
            }
        }
    }
}

/// Per element of the result, its place along the axis and its row-major number in `x`.
fn ordered(x: &Dense, axis: usize, order: SortOrder) -> (Vec<i128>, Vec<usize>) {
    let mut places = vec![0; x.size()];
    let mut sources = vec![0; x.size()];
    for line in lines(&x.shape, axis) {
        let mut by: Vec<usize> = (0..line.len()).collect();
        by.sort_by(|&a, &b| compare(x, line[a], line[b]).then(a.cmp(&b)));
        if let SortOrder::Partition(at) = order {
            by[..at].sort_unstable();
            by[at + 1..].sort_unstable();
        }
        for (&to, &from) in line.iter().zip(&by) {
            places[to] = from as i128;
            sources[to] = line[from];
        }
    }
    (places, sources)
}

pub(super) fn sort(x: &Dense, axis: usize, order: SortOrder) -> Dense {
    x.gathered(&x.shape, ordered(x, axis, order).1.into_iter())
}

pub(super) fn argsort(x: &Dense, axis: usize, order: SortOrder) -> Dense {
    Dense::ints(&x.shape, ordered(x, axis, order).0)
}
