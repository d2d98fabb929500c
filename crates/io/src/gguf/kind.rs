//! How ggml stores the elements of a tensor.

use std::fmt;

/// A type of ggml: elements, or blocks of elements along the fastest dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The names are ggml's.
#[allow(non_camel_case_types)]
pub enum BlockType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ2_XXS,
    IQ2_XS,
    IQ3_XXS,
    IQ1_S,
    IQ4_NL,
    IQ3_S,
    IQ2_S,
    IQ4_XS,
    I8,
    I16,
    I32,
    I64,
    F64,
    IQ1_M,
    BF16,
    TQ1_0,
    TQ2_0,
    MXFP4,
    NVFP4,
    Q1_0,
    Q2_0,
}

/// Type, number in files, name, elements of a block, bytes of a block. From ggml's type traits.
const TABLE: [(BlockType, u32, &str, usize, usize); 35] = [
    (BlockType::F32, 0, "F32", 1, 4),
    (BlockType::F16, 1, "F16", 1, 2),
    (BlockType::Q4_0, 2, "Q4_0", 32, 18),
    (BlockType::Q4_1, 3, "Q4_1", 32, 20),
    (BlockType::Q5_0, 6, "Q5_0", 32, 22),
    (BlockType::Q5_1, 7, "Q5_1", 32, 24),
    (BlockType::Q8_0, 8, "Q8_0", 32, 34),
    (BlockType::Q8_1, 9, "Q8_1", 32, 36),
    (BlockType::Q2_K, 10, "Q2_K", 256, 84),
    (BlockType::Q3_K, 11, "Q3_K", 256, 110),
    (BlockType::Q4_K, 12, "Q4_K", 256, 144),
    (BlockType::Q5_K, 13, "Q5_K", 256, 176),
    (BlockType::Q6_K, 14, "Q6_K", 256, 210),
    (BlockType::Q8_K, 15, "Q8_K", 256, 292),
    (BlockType::IQ2_XXS, 16, "IQ2_XXS", 256, 66),
    (BlockType::IQ2_XS, 17, "IQ2_XS", 256, 74),
    (BlockType::IQ3_XXS, 18, "IQ3_XXS", 256, 98),
    (BlockType::IQ1_S, 19, "IQ1_S", 256, 50),
    (BlockType::IQ4_NL, 20, "IQ4_NL", 32, 18),
    (BlockType::IQ3_S, 21, "IQ3_S", 256, 110),
    (BlockType::IQ2_S, 22, "IQ2_S", 256, 82),
    (BlockType::IQ4_XS, 23, "IQ4_XS", 256, 136),
    (BlockType::I8, 24, "I8", 1, 1),
    (BlockType::I16, 25, "I16", 1, 2),
    (BlockType::I32, 26, "I32", 1, 4),
    (BlockType::I64, 27, "I64", 1, 8),
    (BlockType::F64, 28, "F64", 1, 8),
    (BlockType::IQ1_M, 29, "IQ1_M", 256, 56),
    (BlockType::BF16, 30, "BF16", 1, 2),
    (BlockType::TQ1_0, 34, "TQ1_0", 256, 54),
    (BlockType::TQ2_0, 35, "TQ2_0", 256, 66),
    (BlockType::MXFP4, 39, "MXFP4", 32, 17),
    (BlockType::NVFP4, 40, "NVFP4", 64, 36),
    (BlockType::Q1_0, 41, "Q1_0", 128, 18),
    (BlockType::Q2_0, 42, "Q2_0", 64, 18),
];

impl BlockType {
    /// All types known.
    pub fn all() -> impl Iterator<Item = BlockType> {
        TABLE.iter().map(|entry| entry.0)
    }

    /// The type with this number in files.
    pub fn from_number(number: u32) -> Option<BlockType> {
        TABLE.iter().find(|entry| entry.1 == number).map(|entry| entry.0)
    }

    /// The type that ggml calls `name`, e.g. `Q4_K`.
    pub fn from_name(name: &str) -> Option<BlockType> {
        TABLE.iter().find(|entry| entry.2 == name).map(|entry| entry.0)
    }

    /// The number in files.
    pub fn number(self) -> u32 {
        TABLE[self as usize].1
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].2
    }

    /// Elements of one block; 1 for plain types.
    pub fn block_elements(self) -> usize {
        TABLE[self as usize].3
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        TABLE[self as usize].4
    }

    /// Bytes of a tensor of this shape, the slowest dimension first. The error says why there is
    /// no such tensor: the number overflows, or the last dimension does not fill its blocks.
    pub fn bytes_of(self, shape: &[usize]) -> Result<usize, String> {
        let (block, bytes) = (self.block_elements(), self.block_bytes());
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(block) {
            return Err(format!(
                "{self} {shape:?}: rows are cut in blocks of {block}, which {row} is not a multiple of"
            ));
        }
        // As for safetensors: an empty tensor's other dimensions must be possible sizes too.
        let nonzero = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
        let Some(nonzero) = nonzero.and_then(|n| (n.div_ceil(block)).checked_mul(bytes)) else {
            return Err(format!("{self} {shape:?} is no possible size"));
        };
        Ok(if shape.contains(&0) { 0 } else { nonzero })
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_order_of_the_enum() {
        for (i, (kind, number, name, ..)) in TABLE.into_iter().enumerate() {
            assert_eq!(kind as usize, i);
            assert_eq!(BlockType::from_number(number), Some(kind));
            assert_eq!(BlockType::from_name(name), Some(kind));
        }
        // Numbers of types that were removed.
        for number in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(BlockType::from_number(number), None, "{number}");
        }
    }

    #[test]
    fn sizes() {
        let cases: &[(BlockType, &[usize], Option<usize>)] = &[
            (BlockType::F32, &[], Some(4)),
            (BlockType::F32, &[3, 5], Some(60)),
            (BlockType::Q4_0, &[3, 64], Some(108)),
            (BlockType::Q4_K, &[2, 512], Some(576)),
            (BlockType::Q8_0, &[0, 32], Some(0)),
            (BlockType::Q8_0, &[32, 0], Some(0)),
            (BlockType::Q8_0, &[64, 33], None),
            (BlockType::Q8_0, &[], None),
            (BlockType::F32, &[1 << 62], None),
            (BlockType::Q8_0, &[1 << 60, 1 << 10], None),
            (BlockType::Q8_0, &[1 << 60, 0, 1 << 10], None),
        ];
        for &(kind, shape, bytes) in cases {
            assert_eq!(kind.bytes_of(shape).ok(), bytes, "{kind} {shape:?}");
        }
    }
}
