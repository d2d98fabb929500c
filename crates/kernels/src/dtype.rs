//! Element types, and views whose element type is known only at run time.

use std::fmt;

use crate::view::{Dims, Strides};

/// The type of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// One byte, 0 or 1.
    Bool,
    /// 8-bit unsigned.
    U8,
    /// 16-bit unsigned.
    U16,
    /// 32-bit unsigned.
    U32,
    /// 64-bit unsigned.
    U64,
    /// 8-bit signed.
    I8,
    /// 16-bit signed.
    I16,
    /// 32-bit signed.
    I32,
    /// 64-bit signed.
    I64,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// Single precision.
    F32,
    /// Double precision.
    F64,
    /// Two f32: real and imaginary.
    C64,
}

impl Dtype {
    /// All types, in declaration order.
    pub const ALL: [Dtype; 14] = [
        Dtype::Bool,
        Dtype::U8,
        Dtype::U16,
        Dtype::U32,
        Dtype::U64,
        Dtype::I8,
        Dtype::I16,
        Dtype::I32,
        Dtype::I64,
        Dtype::F16,
        Dtype::BF16,
        Dtype::F32,
        Dtype::F64,
        Dtype::C64,
    ];

    /// Bytes per element.
    #[inline]
    pub const fn size(self) -> usize {
        match self {
            Dtype::Bool | Dtype::U8 | Dtype::I8 => 1,
            Dtype::U16 | Dtype::I16 | Dtype::F16 | Dtype::BF16 => 2,
            Dtype::U32 | Dtype::I32 | Dtype::F32 => 4,
            Dtype::U64 | Dtype::I64 | Dtype::F64 | Dtype::C64 => 8,
        }
    }

    /// f16, bf16, f32 or f64.
    pub const fn is_float(self) -> bool {
        matches!(self, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
    }

    /// A float or complex type.
    pub const fn is_inexact(self) -> bool {
        self.is_float() || matches!(self, Dtype::C64)
    }

    /// A signed or unsigned integer; not bool.
    pub const fn is_integer(self) -> bool {
        !self.is_inexact() && !matches!(self, Dtype::Bool)
    }

    /// A signed integer.
    pub const fn is_signed_integer(self) -> bool {
        matches!(self, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64)
    }

    /// The name, as MLX spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::Bool => "bool",
            Dtype::U8 => "uint8",
            Dtype::U16 => "uint16",
            Dtype::U32 => "uint32",
            Dtype::U64 => "uint64",
            Dtype::I8 => "int8",
            Dtype::I16 => "int16",
            Dtype::I32 => "int32",
            Dtype::I64 => "int64",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            Dtype::F32 => "float32",
            Dtype::F64 => "float64",
            Dtype::C64 => "complex64",
        }
    }

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Dtype> {
        Dtype::ALL.into_iter().find(|dtype| dtype.name() == name)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A [`View`](crate::View) whose element type is known at run time.
#[derive(Clone, Debug)]
pub struct DynView {
    /// The first element.
    pub pointer: *const u8,
    /// The element type.
    pub dtype: Dtype,
    /// Sizes per dimension.
    pub shape: Dims,
    /// Strides per dimension, in elements.
    pub strides: Strides,
}

/// A [`ViewMut`](crate::ViewMut) whose element type is known at run time.
#[derive(Clone, Debug)]
pub struct DynViewMut {
    /// The first element.
    pub pointer: *mut u8,
    /// The element type.
    pub dtype: Dtype,
    /// Sizes per dimension.
    pub shape: Dims,
    /// Strides per dimension, in elements.
    pub strides: Strides,
}

impl DynViewMut {
    /// The same memory, to be read.
    pub fn as_view(&self) -> DynView {
        let DynViewMut { pointer, dtype, ref shape, ref strides } = *self;
        DynView { pointer, dtype, shape: shape.clone(), strides: strides.clone() }
    }
}

// SAFETY: as for View: whoever makes one promises that the memory is readable while it is used.
unsafe impl Send for DynView {}
// SAFETY: as above.
unsafe impl Sync for DynView {}
// SAFETY: as for ViewMut: chunks that share one write disjoint elements.
unsafe impl Send for DynViewMut {}
// SAFETY: as above.
unsafe impl Sync for DynViewMut {}
