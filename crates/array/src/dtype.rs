//! Dtype promotion, as MLX defines it.

pub use mica_kernels::Dtype;
pub use mica_kernels::element::Complex32;

use half::{bf16, f16};

/// The dtype of a binary op's result.
///
/// Integers promote to the smallest integer that holds both; unsigned 64-bit with a signed one
/// gives f32; an integer with a float gives that float; f16 with bf16 gives f32.
pub fn promote(a: Dtype, b: Dtype) -> Dtype {
    use Dtype::*;
    if a == b {
        return a;
    }
    match (a, b) {
        (Bool, other) | (other, Bool) => other,
        (C64, _) | (_, C64) => C64,
        (x, y) if x.is_float() && y.is_float() => match (x, y) {
            (F64, _) | (_, F64) => F64,
            _ => F32,
        },
        (x, _) if x.is_float() => x,
        (_, y) if y.is_float() => y,
        (x, y) if x.is_signed_integer() == y.is_signed_integer() => {
            if x.size() >= y.size() {
                x
            } else {
                y
            }
        }
        (x, y) => {
            let (signed, unsigned) = if x.is_signed_integer() { (x, y) } else { (y, x) };
            match unsigned {
                U64 => F32,
                _ if signed.size() > unsigned.size() => signed,
                U8 => I16,
                U16 => I32,
                _ => I64,
            }
        }
    }
}

/// Rust types that are elements of arrays.
pub trait Element: Copy + Send + Sync + 'static {
    /// The dtype of arrays of this type.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($t:ty => $d:ident)*) => { $(
        impl Element for $t {
            const DTYPE: Dtype = Dtype::$d;
        }
    )* };
}
elements!(bool => Bool u8 => U8 u16 => U16 u32 => U32 u64 => U64 i8 => I8 i16 => I16 i32 => I32 i64 => I64
          f16 => F16 bf16 => BF16 f32 => F32 f64 => F64 Complex32 => C64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promotion_follows_mlx() {
        use Dtype::*;
        for (a, b, expected) in [
            (Bool, I8, I8),
            (I32, F16, F16),
            (F16, BF16, F32),
            (U64, I8, F32),
            (U8, I8, I16),
            (U16, I32, I32),
            (U32, I32, I64),
            (F32, F64, F64),
            (C64, F64, C64),
            (BF16, F32, F32),
        ] {
            assert_eq!(promote(a, b), expected, "{a} with {b}");
            assert_eq!(promote(b, a), expected, "{b} with {a}");
        }
    }
}
