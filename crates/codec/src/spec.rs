//! Which format a quantized weight is in.

use crate::micro::MicroMode;

/// How a group's values are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum QuantMode {
    /// scale · code + bias: 1 to 6 or 8 bits, groups of 32, 64 or 128.
    #[default]
    Affine,
    /// 4-bit floats (e2m1), groups of 32, scales that are powers of two.
    Mxfp4,
    /// 8-bit floats (e4m3), groups of 32, scales that are powers of two.
    Mxfp8,
    /// 4-bit floats (e2m1), groups of 16, scales that are 8-bit floats.
    Nvfp4,
}

impl QuantMode {
    /// All modes.
    pub const ALL: [QuantMode; 4] = [QuantMode::Affine, QuantMode::Mxfp4, QuantMode::Mxfp8, QuantMode::Nvfp4];

    /// The name in a model's `config.json`.
    pub fn name(self) -> &'static str {
        self.micro().map_or("affine", MicroMode::name)
    }

    /// The micro-scaled format, unless it is affine.
    pub fn micro(self) -> Option<MicroMode> {
        match self {
            QuantMode::Affine => None,
            QuantMode::Mxfp4 => Some(MicroMode::Mxfp4),
            QuantMode::Mxfp8 => Some(MicroMode::Mxfp8),
            QuantMode::Nvfp4 => Some(MicroMode::Nvfp4),
        }
    }

    /// Bits and group size where none are given: MLX's. Micro-scaled formats have no others.
    pub fn defaults(self) -> (usize, usize) {
        self.micro().map_or((4, 64), |micro| (micro.bits(), micro.group_size()))
    }
}

impl std::str::FromStr for QuantMode {
    type Err = CodecError;

    fn from_str(name: &str) -> Result<QuantMode, CodecError> {
        let known = QuantMode::ALL.into_iter().find(|mode| mode.name() == name);
        known.ok_or_else(|| CodecError::Mode(name.to_string()))
    }
}

/// A checked combination of bits, group size and mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantSpec {
    bits: u8,
    group_size: u16,
    mode: QuantMode,
}

/// What the codecs refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A mode that is not supported.
    #[error("[quantize] mode {0:?} is not supported: expected affine, mxfp4, mxfp8 or nvfp4")]
    Mode(String),
    /// A number of bits that the mode does not have.
    #[error("[quantize] {bits} bits are not supported in mode {mode}: expected {expected}")]
    Bits {
        /// The bits asked for.
        bits: usize,
        /// The mode's name.
        mode: &'static str,
        /// What the mode has.
        expected: String,
    },
    /// A group size that the mode does not have.
    #[error("[quantize] group size {group_size} is not supported in mode {mode}: expected {expected}")]
    GroupSize {
        /// The group size asked for.
        group_size: usize,
        /// The mode's name.
        mode: &'static str,
        /// What the mode has.
        expected: String,
    },
    /// Rows that groups do not divide.
    #[error(
        "[quantize] rows of {columns} values cannot be cut into groups of {group_size}: \
         choose a group size that divides the last dimension, or leave this weight unquantized"
    )]
    Columns {
        /// Values per row.
        columns: usize,
        /// Values per group.
        group_size: usize,
    },
    /// A slice whose length does not fit the others.
    #[error("[quantize] {what}: expected {expected} values, got {got}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// The length that fits.
        expected: usize,
        /// The length that came.
        got: usize,
    },
    /// A NaN or an infinity in a weight.
    #[error("[quantize] value {value} at position {position}: a weight to quantize must be finite")]
    NotFinite {
        /// Index in the slice given.
        position: usize,
        /// NaN or an infinity.
        value: String,
    },
}

impl Default for QuantSpec {
    /// MLX's: affine, 4 bits in groups of 64.
    fn default() -> QuantSpec {
        QuantSpec::usual(QuantMode::Affine)
    }
}

impl QuantSpec {
    /// Checks a combination.
    ///
    /// Affine has 1, 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128; of the others each has one combination.
    pub fn new(bits: usize, group_size: usize, mode: QuantMode) -> Result<QuantSpec, CodecError> {
        let (has_bits, has_group) = match mode.micro() {
            None => (matches!(bits, 1..=6 | 8), matches!(group_size, 32 | 64 | 128)),
            Some(micro) => (bits == micro.bits(), group_size == micro.group_size()),
        };
        let one_of = |many: &str, one: usize| match mode {
            QuantMode::Affine => many.to_string(),
            _ => one.to_string(),
        };
        let (usual_bits, usual_group) = mode.defaults();
        if !has_bits {
            let expected = one_of("1, 2, 3, 4, 5, 6 or 8", usual_bits);
            return Err(CodecError::Bits { bits, mode: mode.name(), expected });
        }
        if !has_group {
            let expected = one_of("32, 64 or 128", usual_group);
            return Err(CodecError::GroupSize { group_size, mode: mode.name(), expected });
        }
        Ok(QuantSpec { bits: bits as u8, group_size: group_size as u16, mode })
    }

    /// The mode with what it usually has: for affine 4 bits in groups of 64.
    pub fn usual(mode: QuantMode) -> QuantSpec {
        let (bits, group_size) = mode.defaults();
        QuantSpec { bits: bits as u8, group_size: group_size as u16, mode }
    }

    /// [`QuantSpec::new`] with [`QuantMode::Affine`].
    pub fn affine(bits: usize, group_size: usize) -> Result<QuantSpec, CodecError> {
        QuantSpec::new(bits, group_size, QuantMode::Affine)
    }

    /// Bits per value.
    pub fn bits(self) -> usize {
        self.bits.into()
    }

    /// Values per group.
    pub fn group_size(self) -> usize {
        self.group_size.into()
    }

    /// How a group is coded.
    pub fn mode(self) -> QuantMode {
        self.mode
    }

    /// The largest code, 2^bits - 1.
    pub fn largest(self) -> u32 {
        (1 << self.bits) - 1
    }

    /// Groups in a row of `columns` values, or why there is no whole number of them.
    pub fn groups(self, columns: usize) -> Result<usize, CodecError> {
        if columns == 0 || !columns.is_multiple_of(self.group_size()) {
            return Err(CodecError::Columns { columns, group_size: self.group_size() });
        }
        Ok(columns / self.group_size())
    }

    /// u32 words in a row of `columns` values, which must be whole groups.
    pub fn words(self, columns: usize) -> usize {
        columns / self.group_size() * (self.group_size() * self.bits() / 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn combinations() {
        for (bits, group, ok) in [
            (4, 64, true),
            (1, 32, true),
            (8, 128, true),
            (7, 64, false),
            (0, 64, false),
            (16, 64, false),
            (4, 16, false),
            (4, 0, false),
            (4, 65, false),
            (usize::MAX, usize::MAX, false),
        ] {
            assert_eq!(QuantSpec::affine(bits, group).is_ok(), ok, "{bits} bits, groups of {group}");
        }
        let message = QuantSpec::affine(7, 64).unwrap_err().to_string();
        assert!(message.contains("7 bits") && message.contains("6 or 8"), "{message}");
        assert!("fp3".parse::<QuantMode>().unwrap_err().to_string().contains("mxfp4"));
        for mode in QuantMode::ALL {
            assert_eq!(mode.name().parse(), Ok(mode));
            let (bits, group) = mode.defaults();
            assert_eq!(QuantSpec::new(bits, group, mode), Ok(QuantSpec::usual(mode)));
        }
        let message = QuantSpec::new(4, 32, QuantMode::Nvfp4).unwrap_err().to_string();
        assert!(message.contains("nvfp4: expected 16"), "{message}");
        let message = QuantSpec::new(4, 32, QuantMode::Mxfp8).unwrap_err().to_string();
        assert!(message.contains("mxfp8: expected 8"), "{message}");
    }

    #[test]
    fn sizes() {
        assert_eq!(QuantSpec::usual(QuantMode::Nvfp4).words(48), 6);
        let spec = QuantSpec::affine(3, 64).unwrap();
        assert_eq!((spec.largest(), spec.words(128), spec.groups(128)), (7, 12, Ok(2)));
        for columns in [0, 32, 96] {
            assert!(spec.groups(columns).is_err(), "{columns} columns");
        }
    }
}
