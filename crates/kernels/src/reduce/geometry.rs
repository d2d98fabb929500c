//! Cutting a shape into kept, outer and row axes.

use smallvec::SmallVec;

use crate::dtype::DynView;
use crate::elementwise::tile::check_rank;
use crate::error::KernelError;
use crate::layout::Linear;
use crate::view::{Dims, Strides};

pub(super) struct Geometry {
    /// The axes that stay: one element per output.
    pub kept: Linear,
    /// Reduced axes before the row; all of them if `by_columns`.
    pub outer: Linear,
    /// The last axes, as far as they are reduced.
    pub row: Linear,
    /// The last axis (of more than one element) is kept.
    pub by_columns: bool,
}

impl Geometry {
    pub fn new(
        name: &'static str,
        source: &DynView,
        axes: &[usize],
        out_shape: &[usize],
    ) -> Result<Geometry, KernelError> {
        check_rank(name, &source.shape, &source.strides)?;
        let rank = source.shape.len();
        let mut reduced: SmallVec<[bool; 8]> = SmallVec::from_elem(false, rank);
        for &axis in axes {
            if axis >= rank || reduced[axis] {
                let message = format!("axes {axes:?} are not distinct axes of shape {:?}", source.shape);
                return Err(KernelError::new(name, message));
            }
            reduced[axis] = true;
        }
        let short: Dims = (0..rank).filter(|&axis| !reduced[axis]).map(|axis| source.shape[axis]).collect();
        let long: Dims = (0..rank).map(|axis| if reduced[axis] { 1 } else { source.shape[axis] }).collect();
        if out_shape != short.as_slice() && out_shape != long.as_slice() {
            let message = format!(
                "shape {:?} without axes {axes:?} gives {short:?}, the output has {out_shape:?}",
                source.shape
            );
            return Err(KernelError::new(name, message));
        }
        let large = |axis: &usize| source.shape[*axis] != 1;
        let by_columns = (0..rank).rev().find(large).is_none_or(|axis| !reduced[axis]);
        let row_from = if by_columns {
            rank
        } else {
            (0..rank).rev().filter(large).find(|&axis| !reduced[axis]).map_or(0, |axis| axis + 1)
        };
        let part = |pick: &dyn Fn(usize) -> bool| {
            let mut shape = Dims::new();
            let mut strides = Strides::new();
            for axis in (0..rank).filter(|&axis| pick(axis)) {
                shape.push(source.shape[axis]);
                strides.push(source.strides[axis]);
            }
            Linear::new(&shape, &strides)
        };
        Ok(Geometry {
            kept: part(&|axis| !reduced[axis]),
            outer: part(&|axis| reduced[axis] && axis < row_from),
            row: part(&|axis| reduced[axis] && axis >= row_from),
            by_columns,
        })
    }

    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.kept.size()
    }

    /// Elements of one output.
    pub fn reduced(&self) -> usize {
        self.outer.size() * self.row.size()
    }
}
