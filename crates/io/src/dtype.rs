//! Types of elements as files name them.

use std::fmt;

/// The type of a tensor's elements on disk.
///
/// The names and the order are those of the safetensors format: the order is by alignment, and
/// writers lay tensors out from the largest to the smallest. All are little-endian. Nothing here
/// says that mica can compute with a type; that is `mica-array`'s business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // The names are the documentation.
#[allow(non_camel_case_types)]
pub enum DType {
    /// One byte, 0 or 1. Other values are not checked for here.
    Bool,
    /// Two elements a byte.
    F4,
    /// Four elements in three bytes.
    F6_E2M3,
    /// Four elements in three bytes.
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    /// An exponent only: the scales of the mx formats.
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    /// Two F32: real part, imaginary part.
    C64,
    F64,
    I64,
    U64,
}

/// Type, name in safetensors, bits of an element.
const TABLE: [(DType, &str, usize); 22] = [
    (DType::Bool, "BOOL", 8),
    (DType::F4, "F4", 4),
    (DType::F6_E2M3, "F6_E2M3", 6),
    (DType::F6_E3M2, "F6_E3M2", 6),
    (DType::U8, "U8", 8),
    (DType::I8, "I8", 8),
    (DType::F8_E5M2, "F8_E5M2", 8),
    (DType::F8_E4M3, "F8_E4M3", 8),
    (DType::F8_E8M0, "F8_E8M0", 8),
    (DType::F8_E4M3FNUZ, "F8_E4M3FNUZ", 8),
    (DType::F8_E5M2FNUZ, "F8_E5M2FNUZ", 8),
    (DType::I16, "I16", 16),
    (DType::U16, "U16", 16),
    (DType::F16, "F16", 16),
    (DType::BF16, "BF16", 16),
    (DType::I32, "I32", 32),
    (DType::U32, "U32", 32),
    (DType::F32, "F32", 32),
    (DType::C64, "C64", 64),
    (DType::F64, "F64", 64),
    (DType::I64, "I64", 64),
    (DType::U64, "U64", 64),
];

impl DType {
    /// All types, in the order of the enum.
    pub fn all() -> impl Iterator<Item = DType> {
        TABLE.iter().map(|&(dtype, ..)| dtype)
    }

    /// The type that safetensors calls `name`, e.g. `BF16`.
    pub fn from_name(name: &str) -> Option<DType> {
        let entry = TABLE.iter().find(|&&(_, known, _)| known == name);
        entry.map(|&(dtype, ..)| dtype)
    }

    /// The name in safetensors.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// Bits of one element.
    pub fn bits(self) -> usize {
        TABLE[self as usize].2
    }

    /// Bytes of one element; None for types of less than a byte.
    pub fn size(self) -> Option<usize> {
        let bits = self.bits();
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Bytes of a tensor of this shape; None when the number overflows, or when elements of less
    /// than a byte do not fill the last byte.
    pub fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        // A zero makes the tensor empty, but the other dimensions must still be possible sizes, so
        // that nobody overflows on strides.
        let nonzero = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))?;
        let bits = nonzero.checked_mul(self.bits())?;
        if shape.contains(&0) {
            return Some(0);
        }
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_order_of_the_enum() {
        for (i, (dtype, name, _)) in TABLE.into_iter().enumerate() {
            assert_eq!(dtype as usize, i);
            assert_eq!(DType::from_name(name), Some(dtype));
            assert_eq!(dtype.to_string(), name);
        }
        assert_eq!(DType::from_name("f32"), None);
        assert_eq!(DType::from_name(""), None);
    }

    #[test]
    fn sizes() {
        let cases: &[(DType, &[usize], Option<usize>)] = &[
            (DType::F32, &[], Some(4)),
            (DType::F32, &[2, 3], Some(24)),
            (DType::BF16, &[0, 3], Some(0)),
            (DType::F4, &[3, 2], Some(3)),
            (DType::F4, &[3], None),
            (DType::F6_E2M3, &[4], Some(3)),
            (DType::U8, &[usize::MAX], None),
            (DType::U8, &[1 << 32, 1 << 32], None),
            (DType::F64, &[1 << 61], None),
            (DType::F32, &[1 << 60, 0, 1 << 60], None),
            (DType::F4, &[3, 0], Some(0)),
        ];
        for &(dtype, shape, bytes) in cases {
            assert_eq!(dtype.bytes_of(shape), bytes, "{dtype} {shape:?}");
        }
        assert_eq!(DType::F4.size(), None);
        assert_eq!(DType::C64.size(), Some(8));
    }
}
