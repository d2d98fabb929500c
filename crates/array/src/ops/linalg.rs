//! Linear algebra, as `mlx.core.linalg` has it.
//!
//! Decompositions are computed in f64 whatever the dtype, each matrix of a batch as one piece of work.
//! Signs of singular and eigenvectors, and the order of the eigenvalues of [`eig`], are not defined.

use smallvec::smallvec;

use super::{Grads, Jvp, Tangents, Vjp};
use crate::op::{Op, Scalar, first_failure};
use crate::shape::{Shape, normalize_axes, normalize_axis};
use crate::storage::Spec;
use crate::{Array, Dtype, Error, Result};

/// A decomposition of the matrices in the last two dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinalgOp {
    /// Outputs Q [.., m, k] and R [.., k, n].
    Qr,
    /// Outputs U [.., m, m], S [.., k], Vᴴ [.., n, n]; only S without vectors.
    Svd {
        /// Whether U and V are wanted.
        vectors: bool,
    },
    /// The inverse.
    Inverse,
    /// The inverse of a triangle.
    TriangularInverse {
        /// The upper one.
        upper: bool,
    },
    /// L, or Lᵀ.
    Cholesky {
        /// Lᵀ.
        upper: bool,
    },
    /// Outputs L and U in one, the row exchanged at each step, per row of L·U the row of the matrix, and
    /// the inverse of that.
    Lu,
    /// Outputs the eigenvalues and eigenvectors of a symmetric or Hermitian matrix.
    Eigh {
        /// The triangle that is read.
        upper: bool,
        /// Whether vectors are wanted.
        vectors: bool,
    },
    /// Outputs the complex eigenvalues and eigenvectors of any matrix.
    Eig {
        /// Whether vectors are wanted.
        vectors: bool,
    },
    /// Outputs the determinant, its sign, and the logarithm of its magnitude.
    Determinant,
}

impl LinalgOp {
    /// The name in messages and profiles.
    pub fn name(self) -> &'static str {
        match self {
            LinalgOp::Qr => "qr",
            LinalgOp::Svd { .. } => "svd",
            LinalgOp::Inverse => "inv",
            LinalgOp::TriangularInverse { .. } => "tri_inv",
            LinalgOp::Cholesky { .. } => "cholesky",
            LinalgOp::Lu => "lu",
            LinalgOp::Eigh { .. } => "eigh",
            LinalgOp::Eig { .. } => "eig",
            LinalgOp::Determinant => "det",
        }
    }
}

/// A checked operand: leading dimensions, rows, columns.
fn matrices(op: &'static str, a: &Array, complex: bool, square: bool) -> Result<(Shape, usize, usize)> {
    first_failure(&[a])?;
    let known = matches!(a.dtype(), Dtype::F32 | Dtype::F64) || (complex && a.dtype() == Dtype::C64);
    if !known {
        let expected = if complex { "float32, float64 or complex64" } else { "float32 or float64" };
        return Err(Error::dtype(op, expected, a.dtype()));
    }
    if a.rank() < 2 {
        return Err(Error::invalid(op, format!("needs two dimensions or more, got {:?}", a.shape())));
    }
    if square && a.dim(-1) != a.dim(-2) {
        return Err(Error::invalid(op, format!("needs square matrices, got {:?}", a.shape())));
    }
    Ok((a.shape()[..a.rank() - 2].into(), a.dim(-2), a.dim(-1)))
}

fn with(lead: &Shape, rest: &[usize]) -> Shape {
    lead.iter().chain(rest).copied().collect()
}

/// The dtype of singular values and of a Hermitian matrix' eigenvalues.
fn real_of(dtype: Dtype) -> Dtype {
    if dtype == Dtype::C64 { Dtype::F32 } else { dtype }
}

fn node(a: &Array, op: LinalgOp, specs: Vec<Spec>) -> Array {
    Array::lazy_many(Op::Linalg(op), smallvec![a.clone()], specs)
}

fn one(a: &Array, op: LinalgOp, shape: Shape) -> Array {
    Array::lazy(Op::Linalg(op), smallvec![a.clone()], shape, a.dtype())
}

/// Q and R with a = Q·R: Q [.., m, k] with orthonormal columns, R [.., k, n] upper triangular.
pub fn qr(a: &Array) -> Result<(Array, Array)> {
    let (lead, m, n) = matrices("qr", a, false, false)?;
    let k = m.min(n);
    let specs = vec![Spec::new(with(&lead, &[m, k]), a.dtype()), Spec::new(with(&lead, &[k, n]), a.dtype())];
    let q = node(a, LinalgOp::Qr, specs);
    let r = q.sibling(1);
    Ok((q, r))
}

/// U [.., m, m], the singular values [.., k] in descending order, and Vᴴ [.., n, n].
pub fn svd(a: &Array) -> Result<(Array, Array, Array)> {
    let (lead, m, n) = matrices("svd", a, true, false)?;
    let specs = vec![
        Spec::new(with(&lead, &[m, m]), a.dtype()),
        Spec::new(with(&lead, &[m.min(n)]), real_of(a.dtype())),
        Spec::new(with(&lead, &[n, n]), a.dtype()),
    ];
    let u = node(a, LinalgOp::Svd { vectors: true }, specs);
    let (s, vt) = (u.sibling(1), u.sibling(2));
    Ok((u, s, vt))
}

/// The singular values alone: [.., k], descending.
pub fn singular_values(a: &Array) -> Result<Array> {
    let (lead, m, n) = matrices("svd", a, true, false)?;
    let specs = vec![Spec::new(with(&lead, &[m.min(n)]), real_of(a.dtype()))];
    Ok(node(a, LinalgOp::Svd { vectors: false }, specs))
}

/// The inverse of square matrices. A singular one is an error when it is computed.
pub fn inv(a: &Array) -> Result<Array> {
    matrices("inv", a, false, true)?;
    Ok(one(a, LinalgOp::Inverse, a.shape().into()))
}

/// The inverse of triangular matrices; the other triangle is not read.
pub fn tri_inv(a: &Array, upper: bool) -> Result<Array> {
    matrices("tri_inv", a, false, true)?;
    Ok(one(a, LinalgOp::TriangularInverse { upper }, a.shape().into()))
}

/// L with a = L·Lᵀ of symmetric positive definite matrices, or Lᵀ. Only that triangle is read; the
/// other is zero in the result. A matrix that is not positive definite is an error when it is computed.
pub fn cholesky(a: &Array, upper: bool) -> Result<Array> {
    matrices("cholesky", a, false, true)?;
    Ok(one(a, LinalgOp::Cholesky { upper }, a.shape().into()))
}

/// The inverse of L·Lᵀ (or of Lᵀ·L, if the factor is upper), given the Cholesky factor.
pub fn cholesky_inv(factor: &Array, upper: bool) -> Result<Array> {
    let inverse = tri_inv(factor, upper)?;
    let turned = inverse.swap_axes(-1, -2)?;
    if upper { inverse.matmul(&turned) } else { turned.matmul(&inverse) }
}

/// The node: the outputs of [`LinalgOp::Lu`].
pub(crate) fn lu_outputs(a: &Array) -> Result<Array> {
    let (lead, m, n) = matrices("lu", a, false, false)?;
    let k = m.min(n);
    let specs = vec![
        Spec::new(a.shape(), a.dtype()),
        Spec::new(with(&lead, &[k]), Dtype::U32),
        Spec::new(with(&lead, &[m]), Dtype::U32),
        Spec::new(with(&lead, &[m]), Dtype::U32),
    ];
    Ok(node(a, LinalgOp::Lu, specs))
}

/// L and U in one matrix (L's ones are not stored), and per step the row that was exchanged with it, u32.
pub fn lu_factor(a: &Array) -> Result<(Array, Array)> {
    let lu = lu_outputs(a)?;
    let pivots = lu.sibling(1);
    Ok((lu, pivots))
}

/// Rows p (u32), L and U with a = (L·U)\[p\].
pub fn lu(a: &Array) -> Result<(Array, Array, Array)> {
    let packed = lu_outputs(a)?;
    let (m, n) = (a.dim(-2), a.dim(-1));
    let k = m.min(n);
    let lower = triangle(&packed.narrow(-1, 0, k)?, false)?;
    let ones = identity(m, k, a.dtype())?;
    Ok((packed.sibling(3), lower.add(ones)?, triangle(&packed.narrow(-2, 0, k)?, true)?))
}

/// On and above the diagonal, or strictly below it; zeros elsewhere.
fn triangle(a: &Array, upper: bool) -> Result<Array> {
    let (rows, columns) = places(a.dim(-2), a.dim(-1))?;
    let keep = if upper { columns.greater_equal(&rows)? } else { columns.less(&rows)? };
    Array::select(&keep, a, Array::scalar(Scalar::Float(0.0), a.dtype()))
}

/// Row numbers [m, 1] and column numbers [1, n].
fn places(m: usize, n: usize) -> Result<(Array, Array)> {
    let count = |size: usize| Array::arange(0.0, size as f64, 1.0, Dtype::I32);
    Ok((count(m)?.reshape(&[-1, 1])?, count(n)?.reshape(&[1, -1])?))
}

fn identity(m: usize, n: usize, dtype: Dtype) -> Result<Array> {
    let (rows, columns) = places(m, n)?;
    rows.equal(&columns)?.astype(dtype)
}

/// x with a·x = b: a [.., n, n], b [.., n] or [.., n, k].
pub fn solve(a: &Array, b: &Array) -> Result<Array> {
    let (b, vector) = right_hand_side("solve", a, b)?;
    let packed = lu_outputs(a)?;
    let order = packed.sibling(2).expand_dims(&[-1])?;
    let lead = crate::shape::broadcast_shapes(
        "solve",
        &order.shape()[..order.rank() - 2],
        &b.shape()[..b.rank() - 2],
    )?;
    let full = with(&lead, &[b.dim(-2), b.dim(-1)]);
    let moved = b.broadcast_to(&full)?.take_along_axis(&order.broadcast_to(&full)?, -2)?;
    let ones = identity(a.dim(-2), a.dim(-1), a.dtype())?;
    let lower = triangle(&packed, false)?.add(ones)?;
    let y = tri_inv(&lower, false)?.matmul(&moved)?;
    let x = tri_inv(&packed, true)?.matmul(&y)?;
    if vector { x.squeeze(&[-1]) } else { Ok(x) }
}

/// x with a·x = b for triangular a [.., n, n]; b [.., n] or [.., n, k].
pub fn solve_triangular(a: &Array, b: &Array, upper: bool) -> Result<Array> {
    let (b, vector) = right_hand_side("solve_triangular", a, b)?;
    let x = tri_inv(a, upper)?.matmul(&b)?;
    if vector { x.squeeze(&[-1]) } else { Ok(x) }
}

/// b as matrices, and whether it was a vector.
fn right_hand_side(op: &'static str, a: &Array, b: &Array) -> Result<(Array, bool)> {
    matrices(op, a, false, true)?;
    first_failure(&[b])?;
    let vector = b.rank() == a.rank() - 1 || b.rank() == 1;
    let rows = if vector { b.rank().checked_sub(1) } else { b.rank().checked_sub(2) };
    if rows.is_none_or(|axis| b.shape()[axis] != a.dim(-1)) {
        return Err(Error::shapes(op, &a.shape().into(), &b.shape().into()));
    }
    let b = b.astype(a.dtype())?;
    Ok((if vector { b.expand_dims(&[-1])? } else { b }, vector))
}

/// The pseudo-inverse [.., n, m], singular values below 10 · max(m, n) · ε · the largest counting as zero.
pub fn pinv(a: &Array) -> Result<Array> {
    let (_, m, n) = matrices("pinv", a, true, false)?;
    let (u, s, vt) = svd(a)?;
    let k = m.min(n);
    if k == 0 {
        return a.swap_axes(-1, -2);
    }
    let epsilon = if s.dtype() == Dtype::F64 { f64::EPSILON } else { f32::EPSILON as f64 };
    let cutoff = s.max(&[-1], true)?.multiply(10.0 * m.max(n) as f64 * epsilon)?;
    let inverse =
        Array::select(&s.greater(&cutoff)?, &s.reciprocal()?, Array::scalar(Scalar::Float(0.0), s.dtype()))?;
    let v = vt.narrow(-2, 0, k)?.conjugate()?.swap_axes(-1, -2)?;
    let ut = u.narrow(-1, 0, k)?.conjugate()?.swap_axes(-1, -2)?;
    v.matmul(&inverse.expand_dims(&[-1])?.multiply(&ut)?)
}

/// Eigenvalues [.., n] ascending and eigenvectors [.., n, n] (columns) of symmetric or Hermitian
/// matrices, of which the lower or the upper triangle is read.
pub fn eigh(a: &Array, upper: bool) -> Result<(Array, Array)> {
    let (lead, n, _) = matrices("eigh", a, true, true)?;
    let specs = vec![Spec::new(with(&lead, &[n]), real_of(a.dtype())), Spec::new(a.shape(), a.dtype())];
    let values = node(a, LinalgOp::Eigh { upper, vectors: true }, specs);
    let vectors = values.sibling(1);
    Ok((values, vectors))
}

/// The eigenvalues of [`eigh`] alone.
pub fn eigvalsh(a: &Array, upper: bool) -> Result<Array> {
    let (lead, n, _) = matrices("eigvalsh", a, true, true)?;
    let specs = vec![Spec::new(with(&lead, &[n]), real_of(a.dtype()))];
    Ok(node(a, LinalgOp::Eigh { upper, vectors: false }, specs))
}

/// Complex eigenvalues [.., n] and right eigenvectors [.., n, n] (columns, of norm 1) of any square
/// matrices.
pub fn eig(a: &Array) -> Result<(Array, Array)> {
    let (lead, n, _) = matrices("eig", a, true, true)?;
    let specs = vec![Spec::new(with(&lead, &[n]), Dtype::C64), Spec::new(a.shape(), Dtype::C64)];
    let values = node(a, LinalgOp::Eig { vectors: true }, specs);
    let vectors = values.sibling(1);
    Ok((values, vectors))
}

/// The eigenvalues of [`eig`] alone.
pub fn eigvals(a: &Array) -> Result<Array> {
    let (lead, n, _) = matrices("eigvals", a, true, true)?;
    Ok(node(a, LinalgOp::Eig { vectors: false }, vec![Spec::new(with(&lead, &[n]), Dtype::C64)]))
}

/// The node: the outputs of [`LinalgOp::Determinant`].
pub(crate) fn determinant(op: &'static str, a: &Array) -> Result<Array> {
    // Integers become f32 here, and only here.
    let a =
        if a.dtype().is_integer() || a.dtype() == Dtype::Bool { a.astype(Dtype::F32)? } else { a.clone() };
    let (lead, ..) = matrices(op, &a, false, true)?;
    let spec = Spec::new(lead, a.dtype());
    Ok(node(&a, LinalgOp::Determinant, vec![spec.clone(), spec.clone(), spec]))
}

/// The determinant.
pub fn det(a: &Array) -> Result<Array> {
    determinant("det", a)
}

/// The determinant's sign (0 of a singular matrix) and the logarithm of its magnitude.
pub fn slogdet(a: &Array) -> Result<(Array, Array)> {
    let all = determinant("slogdet", a)?;
    Ok((all.sibling(1), all.sibling(2)))
}

/// The cross product along an axis of two or three; a missing third component is zero.
pub fn cross(a: &Array, b: &Array, axis: i32) -> Result<Array> {
    const NAME: &str = "cross";
    first_failure(&[a, b])?;
    let size =
        |array: &Array| -> Result<usize> { Ok(array.shape()[normalize_axis(NAME, axis, array.rank())?]) };
    let (na, nb) = (size(a)?, size(b)?);
    if !(2..=3).contains(&na) || !(2..=3).contains(&nb) {
        return Err(Error::invalid(NAME, format!("axis {axis} should have size 2 or 3, got {na} and {nb}")));
    }
    let dtype = crate::dtype::promote(a.dtype(), b.dtype());
    let (a, b) = (a.astype(dtype)?, b.astype(dtype)?);
    let part = |array: &Array, at: usize| -> Result<Array> {
        if at < size(array)? {
            return array.narrow(axis, at, at + 1);
        }
        Ok(array.narrow(axis, 0, 1)?.zeros_like())
    };
    let parts: Vec<Array> = [(1, 2), (2, 0), (0, 1)]
        .into_iter()
        .map(|(i, j)| part(&a, i)?.multiply(part(&b, j)?)?.subtract(part(&a, j)?.multiply(part(&b, i)?)?))
        .collect::<Result<_>>()?;
    Array::concatenate(&parts, axis)
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub enum NormOrder {
    /// The 2-norm of vectors, the Frobenius norm of matrices.
    #[default]
    Default,
    /// Of matrices: the root of the sum of squares.
    Frobenius,
    /// Of matrices: the sum of singular values.
    Nuclear,
    /// p; may be infinite. Of matrices ±1, ±2 and ±∞.
    P(f64),
}

/// The norm of vectors (one axis) or matrices (two axes). Without axes: of the whole array, which then
/// has one or two dimensions unless the order is the default.
pub fn norm(a: &Array, order: NormOrder, axes: Option<&[i32]>, keepdims: bool) -> Result<Array> {
    const NAME: &str = "norm";
    first_failure(&[a])?;
    let a = if a.dtype().is_inexact() { a.clone() } else { a.astype(Dtype::F32)? };
    if axes.is_none() && order == NormOrder::Default {
        // However many dimensions: all elements.
        let all: Vec<i32> = (0..a.rank() as i32).collect();
        return if all.is_empty() { a.abs() } else { two_norm(&a, &all, keepdims) };
    }
    let axes: Vec<i32> = match axes {
        Some(axes) => axes
            .iter()
            .map(|&axis| normalize_axis(NAME, axis, a.rank()).map(|axis| axis as i32))
            .collect::<Result<_>>()?,
        None => (0..a.rank() as i32).collect(),
    };
    if axes.len() == 2 {
        normalize_axes(NAME, &axes, a.rank())?;
    }
    match (axes.len(), order) {
        (1, NormOrder::Default) | (2, NormOrder::Default | NormOrder::Frobenius) => {
            two_norm(&a, &axes, keepdims)
        }
        // All but 2-norms of complex numbers are complex numbers, in MLX and here.
        (1, NormOrder::P(p)) => {
            vector_norm(&a, p, &axes, keepdims)?.astype(if p == 2.0 { real_of(a.dtype()) } else { a.dtype() })
        }
        (2, NormOrder::Nuclear) => spectral(&a, &axes, keepdims, |s| s.sum(&[-1], false)),
        (2, NormOrder::P(p)) => matrix_norm(&a, p, &axes, keepdims)?.astype(a.dtype()),
        (1, _) => Err(Error::invalid(NAME, format!("{order:?} is a norm of matrices; one axis was given"))),
        (count, _) => Err(Error::invalid(
            NAME,
            format!("norms are over one axis or two, got {count} of {:?}", a.shape()),
        )),
    }
}

fn two_norm(a: &Array, axes: &[i32], keepdims: bool) -> Result<Array> {
    let squares =
        if a.dtype() == Dtype::C64 { a.real()?.square()?.add(a.imag()?.square()?)? } else { a.square()? };
    squares.sum(axes, keepdims)?.sqrt()
}

fn vector_norm(a: &Array, p: f64, axes: &[i32], keepdims: bool) -> Result<Array> {
    let magnitude = a.abs()?;
    if p == 0.0 {
        return a.not_equal(0.0)?.astype(magnitude.dtype())?.sum(axes, keepdims);
    }
    match p {
        1.0 => magnitude.sum(axes, keepdims),
        2.0 => two_norm(a, axes, keepdims),
        f64::INFINITY => magnitude.max(axes, keepdims),
        f64::NEG_INFINITY => magnitude.min(axes, keepdims),
        p => magnitude.power(p)?.sum(axes, keepdims)?.power(1.0 / p),
    }
}

fn matrix_norm(a: &Array, p: f64, axes: &[i32], keepdims: bool) -> Result<Array> {
    let (rows, columns) = (axes[0], axes[1]);
    let extreme = |x: &Array, axis: i32| if p > 0.0 { x.max(&[axis], true) } else { x.min(&[axis], true) };
    let drop = |x: Array| if keepdims { Ok(x) } else { x.squeeze(axes) };
    match p.abs() {
        1.0 => drop(extreme(&a.abs()?.sum(&[rows], true)?, columns)?),
        f64::INFINITY => drop(extreme(&a.abs()?.sum(&[columns], true)?, rows)?),
        2.0 => spectral(a, axes, keepdims, |s| extreme(s, -1)?.squeeze(&[-1])),
        _ => Err(Error::invalid("norm", format!("matrices have norms of order ±1, ±2 and ±∞, got {p}"))),
    }
}

/// A function of the singular values of the matrices in two axes.
fn spectral(a: &Array, axes: &[i32], keepdims: bool, f: impl Fn(&Array) -> Result<Array>) -> Result<Array> {
    let rest: Vec<i32> = (0..a.rank() as i32).filter(|axis| !axes.contains(axis)).collect();
    let order: Vec<i32> = rest.iter().chain(axes).copied().collect();
    let value = f(&singular_values(&a.transpose(&order)?)?)?;
    if !keepdims {
        return Ok(value);
    }
    value.expand_dims(axes)
}

pub(crate) fn linalg_vjp(op: LinalgOp, rule: &Vjp) -> Result<Grads> {
    let (a, y) = (&rule.inputs[0], rule.output);
    let turn = |x: &Array| x.swap_axes(-1, -2);
    match op {
        LinalgOp::Inverse => rule.one(turn(y)?.matmul(rule.cotangent())?.matmul(&turn(y)?)?.negative()?),
        LinalgOp::TriangularInverse { upper } => {
            let full = turn(y)?.matmul(rule.cotangent())?.matmul(&turn(y)?)?.negative()?;
            // What the other triangle holds was not read.
            let kept = if upper { triangle(&full, true)? } else { turn(&triangle(&turn(&full)?, true)?)? };
            rule.one(kept)
        }
        LinalgOp::Cholesky { upper } => {
            // Ā = L⁻ᵀ Φ(Lᵀ L̄) L⁻¹, Φ taking the lower triangle with half the diagonal; of that the
            // symmetric part, since A is symmetric.
            let (l, ct) = if upper {
                (turn(y)?, turn(rule.cotangent())?)
            } else {
                (y.clone(), rule.cotangent().clone())
            };
            let product = turn(&l)?.matmul(&ct)?;
            let diagonal = product.multiply(identity(a.dim(-1), a.dim(-1), a.dtype())?)?.multiply(0.5)?;
            let phi = triangle(&product, false)?.add(diagonal)?;
            let inverse = tri_inv(&l, false)?;
            let s = turn(&inverse)?.matmul(&phi)?.matmul(&inverse)?;
            rule.one(s.add(turn(&s)?)?.multiply(0.5)?)
        }
        LinalgOp::Determinant => {
            // d det = det · tr(A⁻¹ dA), d log|det| = tr(A⁻¹ dA).
            let mut weight: Option<Array> = None;
            if let Some(ct) = &rule.cotangents[0] {
                weight = Some(ct.multiply(y.sibling(0))?);
            }
            if let Some(ct) = &rule.cotangents[2] {
                weight = Some(match weight {
                    Some(before) => before.add(ct)?,
                    None => ct.clone(),
                });
            }
            let Some(weight) = weight else { return rule.none() };
            rule.one(turn(&inv(a)?)?.multiply(weight.expand_dims(&[-1, -2])?)?)
        }
        LinalgOp::Qr | LinalgOp::Svd { .. } | LinalgOp::Lu | LinalgOp::Eigh { .. } | LinalgOp::Eig { .. } => {
            Err(Error::unsupported(op.name(), "this decomposition has no gradient"))
        }
    }
}

pub(crate) fn linalg_jvp(op: LinalgOp, rule: &Jvp) -> Result<Tangents> {
    let (a, y) = (&rule.inputs[0], rule.output);
    let turn = |x: &Array| x.swap_axes(-1, -2);
    let Some(da) = &rule.tangents[0] else { return rule.none() };
    match op {
        LinalgOp::Inverse => rule.one(y.matmul(da)?.matmul(y)?.negative()?),
        LinalgOp::TriangularInverse { upper } => {
            let read = if upper { triangle(da, true)? } else { turn(&triangle(&turn(da)?, true)?)? };
            rule.one(y.matmul(&read)?.matmul(y)?.negative()?)
        }
        LinalgOp::Cholesky { upper } => {
            // dL = L Φ(L⁻¹ dA L⁻ᵀ), Φ taking the lower triangle with half the diagonal.
            let l = if upper { turn(y)? } else { y.clone() };
            let inverse = tri_inv(&l, false)?;
            let symmetric = da.add(turn(da)?)?.multiply(0.5)?;
            let inner = inverse.matmul(&symmetric)?.matmul(&turn(&inverse)?)?;
            let half = inner.multiply(identity(a.dim(-1), a.dim(-1), a.dtype())?)?.multiply(0.5)?;
            let dl = l.matmul(&triangle(&inner, false)?.add(half)?)?;
            rule.one(if upper { turn(&dl)? } else { dl })
        }
        LinalgOp::Determinant => {
            let trace = turn(&inv(a)?)?.multiply(da)?.sum(&[-1, -2], false)?;
            Ok(smallvec![Some(trace.multiply(y.sibling(0))?), None, Some(trace)])
        }
        LinalgOp::Qr | LinalgOp::Svd { .. } | LinalgOp::Lu | LinalgOp::Eigh { .. } | LinalgOp::Eig { .. } => {
            Err(Error::unsupported(op.name(), "this decomposition has no tangent"))
        }
    }
}
