//! Which format a quantized weight is in.

/// How a group's values are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantMode {
    /// w = s·q + b with a scale and a bias per group (MLX's `affine`).
    Affine,
}

impl QuantMode {
    /// The name in a model's `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            QuantMode::Affine => "affine",
        }
    }
}

impl std::str::FromStr for QuantMode {
    type Err = CodecError;

    fn from_str(name: &str) -> Result<QuantMode, CodecError> {
        match name {
            "affine" => Ok(QuantMode::Affine),
            other => Err(CodecError::Mode(other.to_string())),
        }
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
    #[error("[quantize] mode {0:?} is not supported: expected \"affine\"")]
    Mode(String),
    /// A number of bits that the mode does not have.
    #[error("[quantize] {bits} bits are not supported in mode {mode}: expected 1, 2, 3, 4, 5, 6 or 8")]
    Bits {
        /// The bits asked for.
        bits: usize,
        /// The mode's name.
        mode: &'static str,
    },
    /// A group size that the mode does not have.
    #[error("[quantize] group size {group_size} is not supported in mode {mode}: expected 32, 64 or 128")]
    GroupSize {
        /// The group size asked for.
        group_size: usize,
        /// The mode's name.
        mode: &'static str,
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

impl QuantSpec {
    /// Checks a combination.
    ///
    /// Affine has 1, 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128.
    pub fn new(bits: usize, group_size: usize, mode: QuantMode) -> Result<QuantSpec, CodecError> {
        if !matches!(bits, 1..=6 | 8) {
            return Err(CodecError::Bits { bits, mode: mode.name() });
        }
        if !matches!(group_size, 32 | 64 | 128) {
            return Err(CodecError::GroupSize { group_size, mode: mode.name() });
        }
        Ok(QuantSpec { bits: bits as u8, group_size: group_size as u16, mode })
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

    /// u32 words in a row of `columns` values, which must be a multiple of 32.
    pub fn words(self, columns: usize) -> usize {
        columns / 32 * self.bits()
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
        assert!("mxfp4".parse::<QuantMode>().unwrap_err().to_string().contains("mxfp4"));
        assert_eq!("affine".parse(), Ok(QuantMode::Affine));
    }

    #[test]
    fn sizes() {
        let spec = QuantSpec::affine(3, 64).unwrap();
        assert_eq!((spec.largest(), spec.words(128), spec.groups(128)), (7, 12, Ok(2)));
        for columns in [0, 32, 96] {
            assert!(spec.groups(columns).is_err(), "{columns} columns");
        }
    }
}
