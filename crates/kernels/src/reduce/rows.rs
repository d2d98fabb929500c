//! Reductions of rows whose values are made on the way, a piece at a time: as [`super::reduce`] over the
//! last axis, bit for bit.

use mica_simd::{Isa, LANES};

use super::loops::{
    Join, Largest, Product, ROWS, Smallest, Sum, extreme_row, extreme_rows, fold, vector_row, vector_rows,
};
use super::{ReduceOp, SEGMENT};
use crate::elementwise::tile::TILE;

/// How rows of f32 are reduced.
#[derive(Clone, Copy)]
pub(crate) struct RowReduce {
    isa: Isa,
    neutral: f32,
    row: fn(&(), Isa, &mut [f32; LANES], &[f32]),
    rows: fn(&(), Isa, &mut [[f32; LANES]; ROWS], [&[f32]; ROWS]),
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
            ReduceOp::Sum => RowReduce::of::<Sum>(isa, vector_row::<Sum, ()>, vector_rows::<Sum, ()>),
            ReduceOp::Prod => {
                RowReduce::of::<Product>(isa, vector_row::<Product, ()>, vector_rows::<Product, ()>)
            }
            ReduceOp::Max | ReduceOp::Any => {
                RowReduce::of::<Largest>(isa, extreme_row::<Largest, ()>, extreme_rows::<Largest, ()>)
            }
            ReduceOp::Min | ReduceOp::All => {
                RowReduce::of::<Smallest>(isa, extreme_row::<Smallest, ()>, extreme_rows::<Smallest, ()>)
            }
        }
    }

    fn of<J: Join>(
        isa: Isa,
        row: fn(&(), Isa, &mut [f32; LANES], &[f32]),
        rows: fn(&(), Isa, &mut [[f32; LANES]; ROWS], [&[f32]; ROWS]),
    ) -> RowReduce {
        RowReduce { isa, neutral: J::NEUTRAL, row, rows, fold: fold::<J> }
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
        (self.row)(&(), self.isa, &mut partial.lanes, values);
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
        debug_assert!(length <= TILE && values.len() == length * results.len());
        let (fours, rest) = results.as_chunks_mut::<ROWS>();
        let (values, left) = values.split_at(fours.len() * ROWS * length);
        for (results, values) in fours.iter_mut().zip(values.chunks_exact(ROWS * length)) {
            let mut lanes = [[self.neutral; LANES]; ROWS];
            let rows = std::array::from_fn(|row| &values[row * length..(row + 1) * length]);
            (self.rows)(&(), self.isa, &mut lanes, rows);
            *results = lanes.map(|lanes| (self.fold)(self.isa, lanes));
        }
        for (result, values) in rest.iter_mut().zip(left.chunks_exact(length)) {
            let mut lanes = [self.neutral; LANES];
            (self.row)(&(), self.isa, &mut lanes, values);
            *result = (self.fold)(self.isa, lanes);
        }
    }
}
