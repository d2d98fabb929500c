//! Rust types behind each [`Dtype`], and how one turns into another.

use half::{bf16, f16};

use crate::dtype::Dtype;

/// A stored bool: one byte, 0 or 1 (a Rust `bool` would make any other byte undefined behaviour).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Bool8(pub u8);

/// A complex number of two f32.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(8))]
pub struct Complex32 {
    /// Real part.
    pub re: f32,
    /// Imaginary part.
    pub im: f32,
}

impl From<bool> for Bool8 {
    #[inline(always)]
    fn from(value: bool) -> Bool8 {
        Bool8(value as u8)
    }
}

/// A type that arrays are made of.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Its name at run time.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($t:ty => $dtype:ident),* $(,)?) => { $(
        impl Element for $t {
            const DTYPE: Dtype = Dtype::$dtype;
        }
    )* };
}
elements! {
    Bool8 => Bool, u8 => U8, u16 => U16, u32 => U32, u64 => U64, i8 => I8, i16 => I16, i32 => I32,
    i64 => I64, f16 => F16, bf16 => BF16, f32 => F32, f64 => F64, Complex32 => C64,
}

/// Runs `$body` with `$T` being the type behind `$dtype`, one of all.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {{
        use $crate::dtype::Dtype as D;
        use $crate::element as e;
        match $dtype {
            D::Bool => {
                type $T = e::Bool8;
                $body
            }
            D::U8 => {
                type $T = u8;
                $body
            }
            D::U16 => {
                type $T = u16;
                $body
            }
            D::U32 => {
                type $T = u32;
                $body
            }
            D::U64 => {
                type $T = u64;
                $body
            }
            D::I8 => {
                type $T = i8;
                $body
            }
            D::I16 => {
                type $T = i16;
                $body
            }
            D::I32 => {
                type $T = i32;
                $body
            }
            D::I64 => {
                type $T = i64;
                $body
            }
            D::F16 => {
                type $T = half::f16;
                $body
            }
            D::BF16 => {
                type $T = half::bf16;
                $body
            }
            D::F32 => {
                type $T = f32;
                $body
            }
            D::F64 => {
                type $T = f64;
                $body
            }
            D::C64 => {
                type $T = e::Complex32;
                $body
            }
        }
    }};
}
pub(crate) use with_element;

/// Conversion between element types: C's rules, except that a float outside an integer's range
/// saturates and NaN becomes 0 (C leaves both undefined).
pub(crate) trait CastTo<T> {
    fn cast(self) -> T;
}

macro_rules! cast_numbers {
    ($from:ty => $($to:ty)*) => { $(
        impl CastTo<$to> for $from {
            #[inline(always)]
            fn cast(self) -> $to {
                self as $to
            }
        }
    )* };
}
macro_rules! cast_all {
    ($($from:ty)*) => { $(
        cast_numbers!($from => u8 u16 u32 u64 i8 i16 i32 i64 f32 f64);
        impl CastTo<Bool8> for $from {
            #[inline(always)]
            fn cast(self) -> Bool8 {
                Bool8((self != (0 as $from)) as u8)
            }
        }
        impl CastTo<Complex32> for $from {
            #[inline(always)]
            fn cast(self) -> Complex32 {
                Complex32 { re: self as f32, im: 0.0 }
            }
        }
    )* };
}
cast_all!(u8 u16 u32 u64 i8 i16 i32 i64 f32 f64);

macro_rules! cast_to_half {
    ($($from:ty)*) => { $(
        impl CastTo<f16> for $from {
            #[inline(always)]
            fn cast(self) -> f16 {
                f16::from_f32(self as f32)
            }
        }
        impl CastTo<bf16> for $from {
            #[inline(always)]
            fn cast(self) -> bf16 {
                round_bf16(self as f32)
            }
        }
    )* };
}
cast_to_half!(u8 u16 u32 u64 i8 i16 i32 i64 f32);

impl CastTo<f16> for f64 {
    fn cast(self) -> f16 {
        f16::from_f32(round_to_odd(self))
    }
}
impl CastTo<bf16> for f64 {
    fn cast(self) -> bf16 {
        round_bf16(round_to_odd(self))
    }
}

/// The f32 that rounds on to any narrower type as `value` itself would: of the two neighbours
/// of an inexact value the odd one (Boldo and Melquiond, 2008). The `half` crate's `from_f64`
/// drops the low 32 bits instead.
fn round_to_odd(value: f64) -> f32 {
    let near = value as f32;
    if near as f64 == value || near.is_nan() || near.is_infinite() && value.is_infinite() {
        return near;
    }
    let away = (near as f64).abs() > value.abs();
    let towards_zero = near.to_bits() - away as u32;
    f32::from_bits(towards_zero | 1)
}

/// Round to nearest even, without a branch, so that loops over it vectorise.
#[inline(always)]
pub(crate) fn round_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    bf16::from_bits(if value.is_nan() { nan } else { rounded } as u16)
}

/// Types that convert by way of another one.
macro_rules! cast_through {
    ($from:ty, $value:ident => $middle:expr; $($to:ty)*) => { $(
        impl CastTo<$to> for $from {
            #[inline(always)]
            fn cast(self) -> $to {
                let $value = self;
                $middle.cast()
            }
        }
    )* };
}
cast_through!(Bool8, x => x.0; u8 u16 u32 u64 i8 i16 i32 i64 f16 bf16 f32 f64 Bool8 Complex32);
cast_through!(f16, x => x.to_f32(); u8 u16 u32 u64 i8 i16 i32 i64 f16 bf16 f32 f64 Bool8 Complex32);
cast_through!(bf16, x => f32::from_bits((x.to_bits() as u32) << 16);
    u8 u16 u32 u64 i8 i16 i32 i64 f16 bf16 f32 f64 Bool8 Complex32);
cast_through!(Complex32, x => x.re; u8 u16 u32 u64 i8 i16 i32 i64 f16 bf16 f32 f64);

impl CastTo<Bool8> for Complex32 {
    fn cast(self) -> Bool8 {
        Bool8((self.re != 0.0 || self.im != 0.0) as u8)
    }
}
impl CastTo<Complex32> for Complex32 {
    fn cast(self) -> Complex32 {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f64_rounds_once_to_half_types() {
        // Just above, at and below the middle between two neighbours, where two roundings differ.
        let above = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
        for (name, value, expected) in [
            ("above the middle", above, 1.0 + 2f32.powi(-7)),
            ("the middle", 1.0 + 2f64.powi(-8), 1.0),
            ("below the middle", 1.0 + 3.0 * 2f64.powi(-8) - 2f64.powi(-40), 1.0 + 2f32.powi(-7)),
            ("negative", -above, -1.0 - 2f32.powi(-7)),
            ("too large", 1e300, f32::INFINITY),
            ("too small", 1e-300, 0.0),
            ("infinite", f64::NEG_INFINITY, f32::NEG_INFINITY),
        ] {
            let got: bf16 = value.cast();
            assert_eq!(got.to_f32(), expected, "{name}");
        }
        let got: f16 = (1.0 + 2f64.powi(-11) + 2f64.powi(-45)).cast();
        assert_eq!(got.to_f32(), 1.0 + 2f32.powi(-10));
    }

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for bits in
            (0..u32::MAX - 4099).step_by(4099).chain([0x7f80_0000, 0xff80_0001, 0x7fff_ffff, 0x7f7f_ffff])
        {
            let value = f32::from_bits(bits);
            let (got, expected) = (round_bf16(value), bf16::from_f32(value));
            assert!(got == expected || (got.is_nan() && expected.is_nan()), "{bits:#x}: {got} {expected}");
        }
    }
}
