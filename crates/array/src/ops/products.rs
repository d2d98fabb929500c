//! Products made of others, and those that choose their matrices by index.

use smallvec::{SmallVec, smallvec};

use super::sort::Side;
use super::{Grads, Jvp, Tangents, Vjp, Vmap};
use crate::dtype::promote;
use crate::node::Inputs;
use crate::op::{Op, first_failure};
use crate::shape::{Shape, broadcast_shapes, normalize_axis, size_of};
use crate::{Array, Dtype, Error, Result};

/// Rows of the Hadamard matrices of order 12, 20 and 28; bit j of a row is set where column j is −1.
/// (N. J. A. Sloane's had.12, had.20.will and had.28.will2, as MLX uses them.)
const HADAMARD_12: [u32; 12] =
    [0x2, 0xaab, 0x3c8, 0x96e, 0xf20, 0x5ba, 0xc8c, 0x6e6, 0x23c, 0xb96, 0x8f0, 0xe5a];
const HADAMARD_20: [u32; 20] = [
    0x933de, 0x2e3bd, 0x5477b, 0xa0ef7, 0x499ef, 0x637c1, 0xc6ba2, 0x8d764, 0x1aee8, 0x359f0, 0xfa53,
    0x174a7, 0x26d4e, 0x45e9c, 0x83d39, 0xf7a6d, 0xef4fa, 0xdedd5, 0xbdf8b, 0x7bf36,
];
const HADAMARD_28: [u32; 28] = [
    0xcd69e7e, 0x9ad7c7d, 0x37ab8fb, 0x6d571f7, 0xd8ae3ef, 0xb3587df, 0x66b4f3f, 0xb467f43, 0x6acbe87,
    0xd593d8e, 0xab27b9c, 0x564f7b8, 0xac9aff0, 0x5b31fe1, 0x87fb325, 0xff66ca, 0x1decd95, 0x39ddb2a,
    0x71bf654, 0xe17eca9, 0xc2fd9d2, 0xfcf1299, 0xfbe2532, 0xf7c4ae4, 0xef8d549, 0xdf1ea13, 0xbe3d4a6,
    0x7e7a94c,
];

/// The matrix of the odd factor of a size: its order, and its rows as in the table (order 1: none).
pub(crate) fn hadamard_factor(n: usize) -> Option<(usize, &'static [u32])> {
    let found: [(usize, &'static [u32]); 4] =
        [(1, &[]), (12, &HADAMARD_12), (20, &HADAMARD_20), (28, &HADAMARD_28)];
    found.into_iter().find(|&(m, _)| n.is_multiple_of(m) && (n / m).is_power_of_two())
}

/// Integers have no products of matrices, as in MLX.
fn real(op: &'static str, arrays: &[&Array]) -> Result<Dtype> {
    let dtype = arrays.iter().fold(arrays[0].dtype(), |dtype, array| promote(dtype, array.dtype()));
    if dtype.is_float() { Ok(dtype) } else { Err(Error::dtype(op, "arrays of a real float dtype", dtype)) }
}

impl Array {
    /// `beta · self + alpha · (a · b)`; `self` broadcasts to the product's shape.
    pub fn addmm(&self, a: &Array, b: &Array, alpha: f32, beta: f32) -> Result<Array> {
        let dtype = [a, b].iter().fold(self.dtype(), |dtype, array| promote(dtype, array.dtype()));
        if !dtype.is_inexact() {
            return Err(Error::dtype("addmm", "float arrays", dtype));
        }
        let product = a.astype(dtype)?.matmul(&b.astype(dtype)?)?;
        let c = self.astype(dtype)?;
        if broadcast_shapes("addmm", c.shape(), product.shape())?.as_slice() != product.shape() {
            return Err(Error::shapes("addmm", &c.shape().into(), &product.shape().into()));
        }
        let scaled = |x: Array, by: f32| if by == 1.0 { Ok(x) } else { x.multiply(by) };
        scaled(product, alpha)?.add(scaled(c, beta)?)
    }

    /// Σ over the last axes: [.., k] with [.., k] gives both leads together. A number multiplies.
    pub fn inner(&self, rhs: &Array) -> Result<Array> {
        if self.rank() == 0 || rhs.rank() == 0 {
            return self.multiply(rhs);
        }
        if self.dim(-1) != rhs.dim(-1) {
            return Err(Error::shapes("inner", &self.shape().into(), &rhs.shape().into()));
        }
        self.tensordot(rhs, &[-1], &[-1])
    }

    /// Every element times every element: [self.size, rhs.size].
    pub fn outer(&self, rhs: &Array) -> Result<Array> {
        self.reshape(&[-1, 1])?.multiply(rhs.flatten()?)
    }

    /// The Kronecker product: every element of `self` times the whole of `rhs`.
    pub fn kron(&self, rhs: &Array) -> Result<Array> {
        let rank = self.rank().max(rhs.rank());
        let size = |array: &Array, axis: usize| {
            (axis + array.rank()).checked_sub(rank).map_or(1, |at| array.shape()[at]) as i64
        };
        let (mut a, mut b, mut both) = (Vec::new(), Vec::new(), Vec::new());
        for axis in 0..rank {
            let (x, y) = (size(self, axis), size(rhs, axis));
            a.extend([x, 1]);
            b.extend([1, y]);
            both.push(x * y);
        }
        self.reshape(&a)?.multiply(rhs.reshape(&b)?)?.reshape(&both)
    }

    /// Σ over pairs of axes, `axes_a[i]` of this array with `axes_b[i]` of the other; the remaining
    /// dimensions follow, this array's first.
    pub fn tensordot(&self, rhs: &Array, axes_a: &[i32], axes_b: &[i32]) -> Result<Array> {
        const NAME: &str = "tensordot";
        first_failure(&[self, rhs])?;
        let axes = |array: &Array, axes: &[i32]| -> Result<SmallVec<[usize; 4]>> {
            axes.iter().map(|&axis| normalize_axis(NAME, axis, array.rank())).collect()
        };
        let (left, right) = (axes(self, axes_a)?, axes(rhs, axes_b)?);
        let pairs = left.len() == right.len()
            && left.iter().zip(&right).all(|(&a, &b)| self.shape()[a] == rhs.shape()[b]);
        if !pairs {
            return Err(Error::invalid(
                NAME,
                format!(
                    "axes {axes_a:?} of {:?} and {axes_b:?} of {:?} differ in size",
                    self.shape(),
                    rhs.shape()
                ),
            ));
        }
        let rest = |array: &Array, used: &[usize]| -> Vec<usize> {
            (0..array.rank()).filter(|axis| !used.contains(axis)).collect()
        };
        let (rest_a, rest_b) = (rest(self, &left), rest(rhs, &right));
        if rest_a.len() + left.len() != self.rank() || rest_b.len() + right.len() != rhs.rank() {
            return Err(Error::invalid(
                NAME,
                format!("axes {axes_a:?} or {axes_b:?} name a dimension twice"),
            ));
        }
        let order = |first: &[usize], second: &[usize]| -> Vec<i32> {
            first.iter().chain(second).map(|&axis| axis as i32).collect()
        };
        let sizes = |array: &Array, axes: &[usize]| -> Vec<i64> {
            axes.iter().map(|&axis| array.shape()[axis] as i64).collect()
        };
        let inner: i64 = sizes(self, &left).iter().product();
        let flat = |array: &Array, axes: &[usize]| sizes(array, axes).iter().product::<i64>();
        let a = self.transpose_or_same(&order(&rest_a, &left))?.reshape(&[flat(self, &rest_a), inner])?;
        let b = rhs.transpose_or_same(&order(&right, &rest_b))?.reshape(&[inner, flat(rhs, &rest_b)])?;
        let mut shape = sizes(self, &rest_a);
        shape.extend(sizes(rhs, &rest_b));
        if left.is_empty() {
            // No sum: integers multiply too.
            return a.multiply(b)?.reshape(&shape);
        }
        a.matmul(&b)?.reshape(&shape)
    }

    /// [`Array::transpose`] where an empty list means what it says.
    pub(crate) fn transpose_or_same(&self, order: &[i32]) -> Result<Array> {
        if order.is_empty() { Ok(self.clone()) } else { self.transpose(order) }
    }

    /// Products of the matrices [m, k] of this array and [k, n] of `rhs` that flat indices over their
    /// leading dimensions name; the indices broadcast. Without indices the matrices come in order.
    ///
    /// `sorted_indices` promises that the one list of indices ascends: then runs of one matrix of `rhs`
    /// are multiplied at once. They are found either way.
    pub fn gather_mm(
        &self,
        rhs: &Array,
        lhs_indices: Option<&Array>,
        rhs_indices: Option<&Array>,
        _sorted_indices: bool,
    ) -> Result<Array> {
        const NAME: &str = "gather_mm";
        first_failure(&[self, rhs])?;
        if lhs_indices.is_none() && rhs_indices.is_none() {
            return self.matmul(rhs);
        }
        if self.rank() == 0 || rhs.rank() == 0 {
            return Err(Error::invalid(NAME, "a number has no matrix product; use multiply"));
        }
        if self.rank() == 1 {
            let rows = self.expand_dims(&[0])?;
            return rows.gather_mm(rhs, lhs_indices, rhs_indices, _sorted_indices)?.squeeze(&[-2]);
        }
        if rhs.rank() == 1 {
            let columns = rhs.expand_dims(&[1])?;
            return self.gather_mm(&columns, lhs_indices, rhs_indices, _sorted_indices)?.squeeze(&[-1]);
        }
        if self.dim(-1) != rhs.dim(-2) {
            return Err(Error::shapes(NAME, &self.shape().into(), &rhs.shape().into()));
        }
        let dtype = real(NAME, &[self, rhs])?;
        let (lhs, right) =
            (matrix_indices(NAME, self, lhs_indices)?, matrix_indices(NAME, rhs, rhs_indices)?);
        let lead = broadcast_shapes(NAME, lhs.shape(), right.shape())?;
        let flat =
            |array: &Array| array.astype(dtype)?.reshape(&[-1, array.dim(-2) as i64, array.dim(-1) as i64]);
        let mut shape = lead.clone();
        shape.extend([self.dim(-2), rhs.dim(-1)]);
        let inputs = smallvec![
            flat(self)?,
            flat(rhs)?,
            lhs.broadcast_to(&lead)?.contiguous()?,
            right.broadcast_to(&lead)?.contiguous()?
        ];
        Ok(Array::lazy(Op::GatherMatmul, inputs, shape, dtype))
    }

    /// One product [m, n] per segment of the inner dimension: this array [m, k], `rhs` [k, n],
    /// `segments` [.., 2] integers (from, to).
    pub fn segmented_mm(&self, rhs: &Array, segments: &Array) -> Result<Array> {
        const NAME: &str = "segmented_mm";
        first_failure(&[self, rhs, segments])?;
        if self.rank() != 2 || rhs.rank() != 2 || self.dim(1) != rhs.dim(0) {
            return Err(Error::invalid(
                NAME,
                format!("needs matrices [m, k] and [k, n], got {self:?} and {rhs:?}"),
            ));
        }
        if segments.rank() == 0 || segments.dim(-1) != 2 || !segments.dtype().is_integer() {
            return Err(Error::invalid(NAME, format!("segments are integers [.., 2], got {segments:?}")));
        }
        let dtype = real(NAME, &[self, rhs])?;
        let mut shape: Shape = segments.shape()[..segments.rank() - 1].into();
        shape.extend([self.dim(0), rhs.dim(1)]);
        let segments = segments.astype(Dtype::U32)?.contiguous()?;
        let inputs = smallvec![self.astype(dtype)?, rhs.astype(dtype)?, segments];
        Ok(Array::lazy(Op::SegmentedMatmul, inputs, shape, dtype))
    }

    /// A product whose operands and result are multiplied by masks of one value per block of
    /// `block_size` × `block_size`; bool masks keep or drop a block.
    pub fn block_masked_mm(
        &self,
        rhs: &Array,
        block_size: usize,
        mask_out: Option<&Array>,
        mask_lhs: Option<&Array>,
        mask_rhs: Option<&Array>,
    ) -> Result<Array> {
        if block_size != 32 && block_size != 64 {
            return Err(Error::invalid(
                "block_masked_mm",
                format!("block_size should be 32 or 64, got {block_size}"),
            ));
        }
        let a = masked(self, mask_lhs, block_size)?;
        masked(&a.matmul(&masked(rhs, mask_rhs, block_size)?)?, mask_out, block_size)
    }

    /// The Walsh-Hadamard transform of the last axis, whose size is m · 2ᵏ with m one of 1, 12, 20, 28,
    /// times `scale` (1/√size if not given).
    pub fn hadamard_transform(&self, scale: Option<f32>) -> Result<Array> {
        first_failure(&[self])?;
        let dtype = if self.dtype().is_float() { self.dtype() } else { Dtype::F32 };
        if self.dtype() == Dtype::C64 {
            return Err(Error::dtype("hadamard_transform", "a real array", self.dtype()));
        }
        let n = self.shape().last().copied().unwrap_or(1);
        if self.size() == 0 {
            let message = format!("an array of {:?} is empty", self.shape());
            return Err(Error::invalid("hadamard_transform", message));
        }
        if hadamard_factor(n).is_none() {
            return Err(Error::invalid(
                "hadamard_transform",
                format!("the last axis should be m · 2ᵏ with m in (1, 12, 20, 28), got {n}"),
            ));
        }
        let scale = scale.unwrap_or((1.0 / (n as f64).sqrt()) as f32);
        Ok(Array::lazy(Op::Hadamard { scale }, smallvec![self.astype(dtype)?], self.shape(), dtype))
    }
}

/// Flat u32 indices of the matrices in an array's leading dimensions: those given, or all in order.
pub(crate) fn matrix_indices(op: &'static str, array: &Array, given: Option<&Array>) -> Result<Array> {
    let lead = &array.shape()[..array.rank() - 2];
    match given {
        Some(indices) if !indices.dtype().is_integer() => {
            Err(Error::dtype(op, "integer indices", indices.dtype()))
        }
        Some(indices) => indices.astype(Dtype::U32),
        None => {
            let shape: Vec<i64> = lead.iter().map(|&size| size as i64).collect();
            Array::arange(0.0, size_of(lead) as f64, 1.0, Dtype::U32)?.reshape(&shape)
        }
    }
}

/// An array times a mask of one value per block.
fn masked(x: &Array, mask: Option<&Array>, block: usize) -> Result<Array> {
    let Some(mask) = mask else { return Ok(x.clone()) };
    if x.rank() < 2 || mask.rank() < 2 {
        return Err(Error::invalid(
            "block_masked_mm",
            format!("a mask of {:?} for an array of {:?}", mask.shape(), x.shape()),
        ));
    }
    let (rows, columns) = (x.dim(-2), x.dim(-1));
    let blocks = [rows.div_ceil(block), columns.div_ceil(block)];
    let mut lead: Shape = x.shape()[..x.rank() - 2].into();
    lead.extend(blocks);
    let full = mask.broadcast_to(&lead)?;
    // Each value over its block: a new dimension behind both, broadcast and merged.
    let rank = lead.len() as i32;
    let spread = full.expand_dims(&[rank - 1, rank + 1])?;
    let mut wide: Shape = lead[..lead.len() - 2].into();
    wide.extend([blocks[0], block, blocks[1], block]);
    let mut merged: Vec<i64> = lead[..lead.len() - 2].iter().map(|&size| size as i64).collect();
    merged.extend([(blocks[0] * block) as i64, (blocks[1] * block) as i64]);
    let mask = spread.broadcast_to(&wide)?.reshape(&merged)?;
    let mask = mask.narrow(-2, 0, rows)?.narrow(-1, 0, columns)?;
    if mask.dtype() == Dtype::Bool {
        return Array::select(&mask, x, Array::scalar(crate::op::Scalar::Float(0.0), x.dtype()));
    }
    x.multiply(mask.astype(x.dtype())?)
}

pub(crate) fn gather_matmul_vjp(rule: &Vjp) -> Result<Grads> {
    let [a, b, lhs, rhs] = rule.inputs else {
        return rule.none();
    };
    let ct = rule.cotangent();
    let flat = |array: &Array| array.reshape(&[-1, array.dim(-2) as i64, array.dim(-1) as i64]);
    let ct = flat(ct)?;
    let each = Array::arange(0.0, ct.dim(0) as f64, 1.0, Dtype::U32)?;
    let (lhs, rhs) = (lhs.flatten()?, rhs.flatten()?);
    let mut grads: Grads = smallvec![None, None, None, None];
    if rule.needs[0] {
        let parts = ct.gather_mm(&b.swap_axes(-1, -2)?, Some(&each), Some(&rhs), false)?;
        grads[0] = Some(Array::scatter_add(&parts, &lhs, 0, a.dim(0))?);
    }
    if rule.needs[1] {
        grads[1] = Some(sum_by_matrix([a, &ct], [&lhs, &rhs], b.dim(0))?);
    }
    Ok(grads)
}

/// For each of `count` matrices Σ aᵀ · ct over the entries whose `rhs` names it, of the matrices of `a` that `lhs`
/// names and those of `ct` in order: the rows of a matrix put together are one segment of one long sum.
pub(crate) fn sum_by_matrix([a, ct]: [&Array; 2], [lhs, rhs]: [&Array; 2], count: usize) -> Result<Array> {
    let rows = |array: Array| array.reshape_to(&[array.dim(0) * array.dim(1), array.dim(2)]);
    // What names no matrix is an error here too, not an entry that belongs to no segment.
    let matrices = Array::arange(0.0, count as f64, 1.0, Dtype::U32)?;
    let rhs = matrices.take(rhs, 0)?;
    let order = rhs.argsort(0)?;
    let sorted = rhs.take(&order, 0)?;
    let left = rows(a.take(&lhs.take(&order, 0)?, 0)?)?;
    let right = rows(ct.take(&order, 0)?)?;
    let bound = |side: Side| sorted.searchsorted(&matrices, side)?.multiply(a.dim(1));
    let segments = Array::stack(&[bound(Side::Left)?, bound(Side::Right)?], 1)?;
    left.swap_axes(0, 1)?.segmented_mm(&right, &segments)
}

/// By masks over the inner dimension: the segments are data, so their sizes are not known here.
pub(crate) fn segmented_matmul_vjp(rule: &Vjp) -> Result<Grads> {
    let (a, b, segments, ct) = (&rule.inputs[0], &rule.inputs[1], &rule.inputs[2], rule.cotangent());
    let (m, n, k) = (a.dim(0) as i64, b.dim(1) as i64, a.dim(1));
    let ct = ct.reshape(&[-1, m, n])?;
    let bounds = segments.reshape(&[-1, 2])?.astype(Dtype::I64)?;
    let places = Array::arange(0.0, k as f64, 1.0, Dtype::I64)?;
    let inside =
        places.greater_equal(bounds.narrow(1, 0, 1)?)?.logical_and(places.less(bounds.narrow(1, 1, 2)?)?)?;
    let inside = inside.astype(ct.dtype())?;
    let mut grads: Grads = smallvec![None, None, None];
    if rule.needs[0] {
        let all = ct.matmul(&b.transpose(&[])?)?;
        grads[0] = Some(all.multiply(inside.expand_dims(&[1])?)?.sum(&[0], false)?);
    }
    if rule.needs[1] {
        let all = a.transpose(&[])?.matmul(&ct)?;
        grads[1] = Some(all.multiply(inside.expand_dims(&[2])?)?.sum(&[0], false)?);
    }
    Ok(grads)
}

/// H is symmetric up to the odd factor, whose transpose is not itself: the gradient multiplies by Hᵀ.
pub(crate) fn hadamard_vjp(scale: f32, rule: &Vjp) -> Result<Grads> {
    let ct = rule.cotangent();
    let n = ct.shape().last().copied().unwrap_or(1);
    match hadamard_factor(n) {
        Some((1, _)) => rule.one(ct.hadamard_transform(Some(scale))?),
        Some((m, rows)) => {
            // [.., m, 2ᵏ]: the power of two is symmetric, the factor is multiplied from the left.
            let mut split: Vec<i64> = ct.shape()[..ct.rank() - 1].iter().map(|&size| size as i64).collect();
            split.extend([m as i64, (n / m) as i64]);
            let halves = ct.reshape(&split)?.hadamard_transform(Some(scale))?;
            let signs: Vec<f32> =
                (0..m * m).map(|at| if rows[at % m] >> (at / m) & 1 == 1 { -1.0 } else { 1.0 }).collect();
            let transposed = Array::from_slice(&signs, &[m, m])?.astype(ct.dtype())?;
            let shape: Vec<i64> = ct.shape().iter().map(|&size| size as i64).collect();
            rule.one(transposed.matmul(&halves)?.reshape(&shape)?)
        }
        None => rule.none(),
    }
}

/// The op with another array in place of one of its inputs.
fn with_input(op: &Op, rule: &Jvp, at: usize, input: &Array) -> Array {
    let mut inputs: Inputs = rule.inputs.iter().cloned().collect();
    inputs[at] = input.clone();
    Array::lazy(op.clone(), inputs, rule.output.shape(), rule.output.dtype())
}

/// Of ops that are linear in their only input.
pub(crate) fn linear_jvp(op: &Op, rule: &Jvp) -> Result<Tangents> {
    rule.linear(0, |tangent| Ok(with_input(op, rule, 0, tangent)))
}

/// Of ops that are linear in each of their first two inputs; the others are indices.
pub(crate) fn bilinear_jvp(op: &Op, rule: &Jvp) -> Result<Tangents> {
    rule.sum(|at, tangent| Ok(with_input(op, rule, at, &tangent.contiguous()?)))
}

/// Each example's matrices stand in one list, so that its indices begin where its matrices do.
pub(crate) fn gather_matmul_vmap(op: &Op, rule: &Vmap) -> Result<Array> {
    let mut inputs: Inputs = rule.inputs.iter().cloned().collect();
    for side in 0..2 {
        let mut indices = rule.full(side + 2)?;
        if rule.batched[side] {
            let matrices = &rule.inputs[side];
            let count = matrices.dim(1);
            inputs[side] = matrices.reshape(&[-1, matrices.dim(2) as i64, matrices.dim(3) as i64])?;
            let mut shape = vec![1; indices.rank()];
            shape[0] = rule.size as i64;
            let starts = Array::arange(0.0, rule.size as f64, 1.0, Dtype::U32)?.multiply(count)?;
            indices = indices.add(starts.reshape(&shape)?)?;
        }
        inputs[side + 2] = indices.contiguous()?;
    }
    rule.build(op.clone(), inputs)
}

/// Segments are a list anyway. Matrices that differ are masked outside of each segment.
pub(crate) fn segmented_matmul_vmap(rule: &Vmap) -> Result<Array> {
    if !rule.batched[0] && !rule.batched[1] {
        let mut inputs = rule.all()?;
        inputs[0] = rule.inputs[0].clone();
        inputs[1] = rule.inputs[1].clone();
        inputs[2] = inputs[2].contiguous()?;
        return rule.build(Op::SegmentedMatmul, inputs);
    }
    let (a, b) = (rule.full(0)?, rule.full(1)?);
    let (size, k) = (rule.size as i64, a.dim(2));
    let bounds = rule.full(2)?.astype(Dtype::I64)?.reshape(&[size, -1, 2])?;
    let places = Array::arange(0.0, k as f64, 1.0, Dtype::I64)?;
    let inside = places
        .greater_equal(bounds.narrow(2, 0, 1)?)?
        .logical_and(places.less(bounds.narrow(2, 1, 2)?)?)?
        .expand_dims(&[2])?;
    let zero = Array::scalar(crate::op::Scalar::Float(0.0), a.dtype());
    let parts = Array::select(&inside, &a.expand_dims(&[1])?, &zero)?;
    let products = parts.matmul(&b.expand_dims(&[1])?)?;
    products.reshape(&rule.with_batch(rule.node.shape()).iter().map(|&n| n as i64).collect::<Vec<_>>())
}
