//! Reductions of rows whose values are made on the way, a piece at a time: as [`super::reduce`] over the
//! last axis, bit for bit.

use mica_simd::{Isa, LANES};

use super::loops::{
    AnyOrder, InOrder, Join, Largest, Order, Product, Smallest, Sum, Whole, fold, join_row, whole_rows,
};
use super::{ReduceOp, SEGMENT};
use crate::elementwise::tile::TILE;

/// How rows of f32 are reduced.
#[derive(Clone, Copy)]
pub(crate) struct RowReduce {
    isa: Isa,
    neutral: f32,
    row: fn(Isa, &mut [f32; LANES], &[f32]),
    rows: unsafe fn(Isa, Whole<f32>, &mut [f32]),
    fold: fn(Isa, [f32; LANES]) -> f32,
}

/// A row that is not complete.
pub(crate) struct Partial {
    lanes: [f32; LANES],
    /// Elements so far.
    count: usize,
    /// Of the segments before this one.
    total: Option<f32>,
}

impl RowReduce {
    /// `All` and `Any` are of truth values: 0 and 1.
    pub fn new(isa: Isa, op: ReduceOp) -> RowReduce {
        match op {
            ReduceOp::Sum => RowReduce::of::<InOrder<Sum>>(isa),
            ReduceOp::Prod => RowReduce::of::<InOrder<Product>>(isa),
            ReduceOp::Max | ReduceOp::Any => RowReduce::of::<AnyOrder<Largest>>(isa),
            ReduceOp::Min | ReduceOp::All => RowReduce::of::<AnyOrder<Smallest>>(isa),
        }
    }

    fn of<O: Order>(isa: Isa) -> RowReduce {
        RowReduce {
            isa,
            neutral: O::Join::NEUTRAL,
            row: join_row::<O>,
            rows: whole_rows::<O>,
            fold: fold::<O::Join>,
        }
    }

    /// A row of which nothing was seen.
    pub fn start(&self) -> Partial {
        Partial { lanes: [self.neutral; LANES], count: 0, total: None }
    }

    /// The row goes on. All pieces but the last are as long as a tile.
    pub fn push(&self, partial: &mut Partial, values: &[f32]) {
        debug_assert!(partial.count.is_multiple_of(TILE) && values.len() <= TILE);
        if partial.count == SEGMENT {
            partial.total = Some(self.finish(partial));
            (partial.lanes, partial.count) = ([self.neutral; LANES], 0);
        }
        (self.row)(self.isa, &mut partial.lanes, values);
        partial.count += values.len();
    }

    /// The result of a row that is complete.
    pub fn finish(&self, partial: &Partial) -> f32 {
        let segment = (self.fold)(self.isa, partial.lanes);
        match partial.total {
            // Two numbers fold as two rows' totals join.
            Some(total) => {
                let mut lanes = [self.neutral; LANES];
                lanes[..2].copy_from_slice(&[total, segment]);
                (self.fold)(self.isa, lanes)
            }
            None => segment,
        }
    }

    /// The results of whole rows of `length` values, at most a tile.
    pub fn whole(&self, values: &[f32], length: usize, results: &mut [f32]) {
        debug_assert!(length <= TILE);
        assert_eq!(values.len(), length * results.len(), "a row for each result");
        let rows = Whole { first: values.as_ptr(), stride: length as isize, length, neutral: self.neutral };
        // SAFETY: there are as many rows as results.
        unsafe { (self.rows)(self.isa, rows, results) }
    }
}
