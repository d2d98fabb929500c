//! Elementwise ops over strided, broadcast views of any element type.
//!
//! The meaning of each op is MLX's. Half types compute in f32 and round once per op; integers
//! wrap; f32 functions are `simd::math`'s. Inputs of fewer dimensions or with size-1 dimensions
//! are broadcast to the output's shape. An output may be the same memory as an input if both have
//! exactly the same layout and element size; it may not overlap an input otherwise.
//!
//! `complex64` has the arithmetic of [`complex`]; the absolute value of a complex number is a
//! complex number.

mod binary;
mod compare;
pub mod complex;
pub(crate) mod convert;
mod erf64;
pub(crate) mod lanes;
mod math;
mod select;
pub(crate) mod tile;
mod unary;

use std::sync::OnceLock;

use mica_simd::Isa;
use mica_threads::Task;

pub use binary::BinaryOp;
pub use compare::CompareOp;
pub use unary::UnaryOp;
pub(crate) use {binary::binary_op, compare::compare_op, select::select_op, unary::unary_op};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::error::KernelError;
pub use tile::{Dense, Flat};
use tile::{Elementwise, TileOp, compute_dtype};

/// `out = op(a)`. `out` has `a`'s type; [`UnaryOp::LogicalNot`] takes any type and gives bool.
pub fn unary(op: UnaryOp, a: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    unary_on(Isa::get(), op, a, out)
}

pub(crate) fn unary_on(
    isa: Isa,
    op: UnaryOp,
    a: DynView,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let (kernel, compute) = unary_kernel(isa, op, a.dtype, out.dtype)?;
    Elementwise::task(op.name(), kernel, &[(&a, compute)], (&out, compute))
}

/// The loop for these types, and the type that it computes in.
fn unary_kernel(
    isa: Isa,
    op: UnaryOp,
    a: Dtype,
    out: Dtype,
) -> Result<(Box<dyn TileOp>, Dtype), KernelError> {
    let (compute, expected) =
        if op == UnaryOp::LogicalNot { (Dtype::Bool, Dtype::Bool) } else { (compute_dtype(a), a) };
    expect_output(op.name(), expected, out)?;
    let kernel = unary_op(isa, op, compute).ok_or_else(|| unsupported(op.name(), a))?;
    Ok((kernel, compute))
}

/// The loop of an op for a type on this machine, with the types that it computes in and gives. Made once: graphs of
/// small ops ask for it for every node.
#[derive(Clone, Copy)]
struct Loop {
    name: &'static str,
    kernel: &'static dyn TileOp,
    compute: Dtype,
    out: Dtype,
}

/// A place per op and type.
type Loops<const N: usize> = [OnceLock<Loop>; N];

impl Loop {
    #[cold]
    fn make(
        place: &'static OnceLock<Loop>,
        name: &'static str,
        (kernel, compute): (Box<dyn TileOp>, Dtype),
        out: Dtype,
    ) -> &'static Loop {
        place.get_or_init(|| Loop { name, kernel: Box::leak(kernel), compute, out })
    }
}

/// [`unary`] over so many dense elements.
///
/// The pointers must be readable and writable as those of views are.
#[inline]
pub fn unary_dense(op: UnaryOp, a: Flat, out: Flat, size: usize) -> Result<Dense, KernelError> {
    const TYPES: usize = Dtype::ALL.len();
    static LOOPS: Loops<{ UnaryOp::ALL.len() * TYPES }> =
        [const { OnceLock::new() }; UnaryOp::ALL.len() * TYPES];
    let place = &LOOPS[op as usize * TYPES + a.dtype as usize];
    let made = match place.get() {
        Some(made) => made,
        None => Loop::make(place, op.name(), unary_kernel(Isa::get(), op, a.dtype, out.dtype)?, out.dtype),
    };
    if made.out != out.dtype {
        expect_output(made.name, made.out, out.dtype)?;
    }
    Ok(Dense::new(made.name, made.kernel, &[a], out, made.compute, size))
}

/// `out = op(a, b)`: all of one type; the logical ops take any type and give bool.
pub fn binary(op: BinaryOp, a: DynView, b: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    binary_on(Isa::get(), op, a, b, out)
}

pub(crate) fn binary_on(
    isa: Isa,
    op: BinaryOp,
    a: DynView,
    b: DynView,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let (kernel, compute) = binary_kernel(isa, op, [a.dtype, b.dtype], out.dtype)?;
    Elementwise::task(op.name(), kernel, &[(&a, compute), (&b, compute)], (&out, compute))
}

/// The loop for these types, and the type that it computes in.
fn binary_kernel(
    isa: Isa,
    op: BinaryOp,
    [a, b]: [Dtype; 2],
    out: Dtype,
) -> Result<(Box<dyn TileOp>, Dtype), KernelError> {
    expect_same(op.name(), a, b)?;
    let (compute, expected) =
        if op.is_logical() { (Dtype::Bool, Dtype::Bool) } else { (compute_dtype(a), a) };
    expect_output(op.name(), expected, out)?;
    if a == Dtype::BF16
        && let Some(kernel) = binary::bfloat16(isa, op)
    {
        return Ok((kernel, a));
    }
    let kernel = binary_op(isa, op, compute).ok_or_else(|| unsupported(op.name(), a))?;
    Ok((kernel, compute))
}

/// [`binary`] over so many dense elements; see [`unary_dense`].
#[inline]
pub fn binary_dense(op: BinaryOp, a: Flat, b: Flat, out: Flat, size: usize) -> Result<Dense, KernelError> {
    const TYPES: usize = Dtype::ALL.len();
    static LOOPS: Loops<{ BinaryOp::ALL.len() * TYPES }> =
        [const { OnceLock::new() }; BinaryOp::ALL.len() * TYPES];
    let place = &LOOPS[op as usize * TYPES + a.dtype as usize];
    let made = match place.get() {
        Some(made) => made,
        None => {
            let kernel = binary_kernel(Isa::get(), op, [a.dtype, b.dtype], out.dtype)?;
            Loop::make(place, op.name(), kernel, out.dtype)
        }
    };
    if made.out != out.dtype || a.dtype != b.dtype {
        expect_same(made.name, a.dtype, b.dtype)?;
        expect_output(made.name, made.out, out.dtype)?;
    }
    Ok(Dense::new(made.name, made.kernel, &[a, b], out, made.compute, size))
}

/// `out = a op b` as bool; `a` and `b` of one type. Comparisons with NaN are false, `Ne` true.
pub fn compare(op: CompareOp, a: DynView, b: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    compare_on(Isa::get(), op, a, b, out)
}

pub(crate) fn compare_on(
    isa: Isa,
    op: CompareOp,
    a: DynView,
    b: DynView,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    expect_same(op.name(), a.dtype, b.dtype)?;
    expect_output(op.name(), Dtype::Bool, out.dtype)?;
    let compute = compute_dtype(a.dtype);
    let kernel = compare_op(isa, op, compute).ok_or_else(|| unsupported(op.name(), a.dtype))?;
    Elementwise::task(op.name(), kernel, &[(&a, compute), (&b, compute)], (&out, Dtype::Bool))
}

/// `out = condition ? a : b`. `condition` has any type (not zero is true); the others one type.
pub fn select(
    condition: DynView,
    a: DynView,
    b: DynView,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    expect_same("select", a.dtype, b.dtype)?;
    expect_output("select", a.dtype, out.dtype)?;
    // Values are only moved, so half types stay as they are.
    let dtype = a.dtype;
    let kernel = select_op(dtype.size());
    let inputs = [(&condition, Dtype::Bool), (&a, dtype), (&b, dtype)];
    Elementwise::task("select", kernel, &inputs, (&out, dtype))
}

/// `out = a` in `out`'s type: C's rules, but a float outside an integer's range saturates and NaN
/// becomes 0. Of a complex number the real part is kept (for bool, whether either is not zero).
pub fn cast(a: DynView, out: DynViewMut) -> Result<Box<dyn Task>, KernelError> {
    tile::Cast::task(&a, &out)
}

fn expect_same(name: &'static str, a: Dtype, b: Dtype) -> Result<(), KernelError> {
    if a == b {
        return Ok(());
    }
    Err(KernelError::new(name, format!("both inputs must have one type, got {a} and {b}: cast one first")))
}

fn expect_output(name: &'static str, expected: Dtype, got: Dtype) -> Result<(), KernelError> {
    if expected == got {
        return Ok(());
    }
    Err(KernelError::new(name, format!("the output is {expected}, got {got}")))
}

fn unsupported(name: &'static str, dtype: Dtype) -> KernelError {
    KernelError::new(name, format!("not defined for {dtype}: cast to a type that it supports first"))
}

#[cfg(test)]
mod tests;
