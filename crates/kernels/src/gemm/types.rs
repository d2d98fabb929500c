//! What a product is asked for: operand views of three float types, precision, epilogue.

use half::{bf16, f16};

use crate::{KernelError, View, ViewMut};

/// Element types of operands and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// 32-bit IEEE.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// 16-bit IEEE.
    F16,
}

impl FloatType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::Bf16 | FloatType::F16 => 2,
        }
    }
}

/// How products are formed. Sums are f32 either way (docs/NUMERICS.md gives the orders).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Operands widen to f32; one fused multiply-add chain over k. The same bits on every tier.
    Exact,
    /// Operands are rounded to bf16 (nearest, ties to even). `avx512bf16` multiplies pairs
    /// (`vdpbf16ps`), `amx` blocks of 32 (`tdpbf16ps`); both take denormal numbers for zero.
    /// Lower tiers run the [`Precision::Exact`] chain over the rounded values.
    Bf16,
}

/// A view of any float type, to read.
#[derive(Clone, Debug)]
pub enum FloatView<'a> {
    /// 32-bit elements.
    F32(View<'a, f32>),
    /// bfloat16 elements.
    Bf16(View<'a, bf16>),
    /// 16-bit IEEE elements.
    F16(View<'a, f16>),
}

/// A view of any float type, to write.
#[derive(Clone, Debug)]
pub enum FloatViewMut<'a> {
    /// 32-bit elements.
    F32(ViewMut<'a, f32>),
    /// bfloat16 elements.
    Bf16(ViewMut<'a, bf16>),
    /// 16-bit IEEE elements.
    F16(ViewMut<'a, f16>),
}

macro_rules! from_views {
    ($($variant:ident $t:ty),*) => { $(
        impl<'a> From<View<'a, $t>> for FloatView<'a> {
            fn from(view: View<'a, $t>) -> Self {
                FloatView::$variant(view)
            }
        }
        impl<'a> From<ViewMut<'a, $t>> for FloatViewMut<'a> {
            fn from(view: ViewMut<'a, $t>) -> Self {
                FloatViewMut::$variant(view)
            }
        }
    )* };
}
from_views!(F32 f32, Bf16 bf16, F16 f16);

macro_rules! each {
    ($self:expr, $view:ident => $value:expr) => {
        match $self {
            Self::F32($view) => $value,
            Self::Bf16($view) => $value,
            Self::F16($view) => $value,
        }
    };
}

macro_rules! geometry {
    ($($name:ident),*) => { $(
        impl $name<'_> {
            /// Sizes per dimension.
            pub fn shape(&self) -> &[usize] {
                each!(self, view => view.shape())
            }

            /// Strides per dimension, in elements.
            pub fn strides(&self) -> &[isize] {
                each!(self, view => view.strides())
            }

            /// The element type.
            pub fn float_type(&self) -> FloatType {
                match self {
                    Self::F32(_) => FloatType::F32,
                    Self::Bf16(_) => FloatType::Bf16,
                    Self::F16(_) => FloatType::F16,
                }
            }

            pub(super) fn bytes(&self) -> *mut u8 {
                each!(self, view => view.pointer() as *mut u8)
            }
        }
    )* };
}
geometry!(FloatView, FloatViewMut);

/// What happens to a finished sum before it is stored: (sum + bias) + residual.
#[derive(Clone, Debug, Default)]
pub struct Epilogue<'a> {
    /// `[n]`, added to every row.
    pub bias: Option<FloatView<'a>>,
    /// Added to the output, same shape. May be the very same memory as the output (same start,
    /// same strides); any other overlap is undefined.
    pub residual: Option<FloatView<'a>>,
    /// Adds to what the output holds (C += A·B). Excludes `residual`.
    pub accumulate: bool,
}

impl<'a> Epilogue<'a> {
    /// Stores the sum.
    pub fn none() -> Self {
        Epilogue::default()
    }

    /// Adds a `[n]` bias.
    pub fn bias(bias: impl Into<FloatView<'a>>) -> Self {
        Epilogue { bias: Some(bias.into()), ..Epilogue::default() }
    }

    /// Adds a residual of the output's shape.
    pub fn residual(residual: impl Into<FloatView<'a>>) -> Self {
        Epilogue { residual: Some(residual.into()), ..Epilogue::default() }
    }

    /// Adds to what the output holds.
    pub fn accumulate() -> Self {
        Epilogue { accumulate: true, ..Epilogue::default() }
    }
}

/// A matrix per batch entry with byte strides: the form in which the driver sees any operand.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    pub pointer: *mut u8,
    pub float: FloatType,
    pub row: isize,
    pub column: isize,
    /// Byte strides of the batch dimensions, zero where this operand is broadcast.
    pub batch: crate::view::Strides,
}

impl Matrix {
    /// The last two dimensions of a view as a matrix, its leading ones broadcast to `batch`.
    pub fn of(
        what: &str,
        (pointer, float): (*mut u8, FloatType),
        shape: &[usize],
        strides: &[isize],
        batch: &[usize],
        (rows, columns): (usize, usize),
    ) -> Result<Matrix, KernelError> {
        let refuse = || {
            let message = format!(
                "{what} has shape {shape:?}; expected {batch:?} (or broadcast) x [{rows}, {columns}]"
            );
            Err(KernelError::new("gemm", message))
        };
        let rank = shape.len();
        if rank < 2 || rank - 2 > batch.len() || shape[rank - 2..] != [rows, columns] {
            return refuse();
        }
        let size = float.size() as isize;
        let lead = batch.len() - (rank - 2);
        let mut bytes = crate::view::Strides::from_elem(0, batch.len());
        for (axis, (&have, &stride)) in shape[..rank - 2].iter().zip(strides).enumerate() {
            if have != batch[lead + axis] && have != 1 {
                return refuse();
            }
            bytes[lead + axis] = if have == 1 { 0 } else { stride * size };
        }
        Ok(Matrix {
            pointer,
            float,
            row: strides[rank - 2] * size,
            column: strides[rank - 1] * size,
            batch: bytes,
        })
    }

    /// The matrix of batch entry `index` (row-major number over the batch dimensions).
    pub fn at(&self, index: usize, batch: &[usize]) -> *mut u8 {
        let mut offset = 0isize;
        let mut rest = index;
        for (&size, &stride) in batch.iter().zip(&self.batch).rev() {
            offset += (rest % size) as isize * stride;
            rest /= size;
        }
        self.pointer.wrapping_offset(offset)
    }

    pub fn transposed(mut self) -> Matrix {
        std::mem::swap(&mut self.row, &mut self.column);
        self
    }
}
