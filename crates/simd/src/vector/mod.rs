//! Sixteen f32 lanes on every tier.
//!
//! [`Vector`] is the one shape that kernels are written for: AVX-512 keeps it in one register,
//! AVX2 in two, NEON in four, the scalar tier in an array. All operations give the same bits on
//! every tier (division and square root are correctly rounded everywhere; `min`, `max` and the
//! conversions are defined below to the letter), so a kernel written once has one result.
//!
//! The types that implement it are private. The only way to get one is [`dispatch`], which
//! enters a function compiled for the tier after checking that the machine has it: that is why
//! the arithmetic is safe to call. A [`Kernel`]'s `run`, and everything generic that it calls,
//! has to be `#[inline(always)]`, or it is compiled without the tier's instructions (slow, not
//! wrong). Closures inside need `#[inline(always)]` too, or better, plain loops.
//!
//! ```
//! use mica_simd::{Isa, Kernel, LANES, Vector, dispatch};
//!
//! struct Double<'a>(&'a mut [f32]);
//!
//! impl Kernel for Double<'_> {
//!     type Output = ();
//!     #[inline(always)]
//!     fn run<V: Vector>(self) {
//!         for chunk in self.0.chunks_mut(LANES) {
//!             let x = V::from_slice(chunk, 0.0);
//!             (x + x).to_slice(chunk);
//!         }
//!     }
//! }
//!
//! let mut values = vec![1.5f32; 19];
//! dispatch(Isa::get(), Double(&mut values));
//! assert!(values.iter().all(|&v| v == 3.0));
//! ```

use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use crate::Isa;

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

/// Lanes of every [`Vector`].
pub const LANES: usize = 16;

/// Sixteen f32 values; see the module's documentation.
///
/// Comparisons with NaN are false except `ne`.
pub trait Vector:
    Copy
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// One truth value a lane.
    type Mask: Copy;
    /// Sixteen 32-bit integers.
    type Int: Copy;
    /// The tier whose instructions this type uses (higher ones run on [`Isa::Avx512`]'s type too).
    const ISA: Isa;

    /// The same value in all lanes.
    fn splat(x: f32) -> Self;
    /// Lanes from an array.
    fn from_array(x: [f32; LANES]) -> Self;
    /// Lanes as an array.
    fn to_array(self) -> [f32; LANES];

    /// Reads 16 values.
    ///
    /// # Safety
    /// `p` is valid for reading 16 values; no alignment is asked for.
    unsafe fn load(p: *const f32) -> Self;
    /// Writes 16 values.
    ///
    /// # Safety
    /// `p` is valid for writing 16 values.
    unsafe fn store(self, p: *mut f32);
    /// Reads `count` values (16 if it is more); the other lanes are `fill`. Nothing past them is
    /// touched.
    ///
    /// # Safety
    /// `p` is valid for reading `count.min(16)` values.
    unsafe fn load_part(p: *const f32, count: usize, fill: f32) -> Self;
    /// Writes the first `count` lanes (16 if it is more) and nothing past them.
    ///
    /// # Safety
    /// `p` is valid for writing `count.min(16)` values.
    unsafe fn store_part(self, p: *mut f32, count: usize);
    /// Reads 16 bf16 values, exactly widened.
    ///
    /// # Safety
    /// `p` is valid for reading 16 values.
    unsafe fn load_bf16(p: *const bf16) -> Self;
    /// Rounds to nearest, ties to even, NaN stays NaN (quieted), and writes 16 values.
    ///
    /// # Safety
    /// `p` is valid for writing 16 values.
    unsafe fn store_bf16(self, p: *mut bf16);
    /// [`Vector::store_bf16`] where subnormal values may become zeros, which is cheaper on some tiers.
    ///
    /// # Safety
    /// `p` is valid for writing 16 values.
    #[inline(always)]
    unsafe fn store_bf16_normal(self, p: *mut bf16) {
        // SAFETY: promised by the caller.
        unsafe { self.store_bf16(p) }
    }
    /// Reads 16 f16 values, exactly widened (a signalling NaN is quieted).
    ///
    /// # Safety
    /// `p` is valid for reading 16 values.
    unsafe fn load_f16(p: *const f16) -> Self;
    /// Rounds to nearest, ties to even, NaN stays NaN (quieted), and writes 16 values.
    ///
    /// # Safety
    /// `p` is valid for writing 16 values.
    unsafe fn store_f16(self, p: *mut f16);

    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// `b - self * a`, rounded once.
    fn neg_mul_add(self, a: Self, b: Self) -> Self;
    /// `self < other ? self : other`: the second operand if either is NaN or both are zeros.
    fn min(self, other: Self) -> Self;
    /// `self > other ? self : other`: the second operand if either is NaN or both are zeros.
    fn max(self, other: Self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// The nearest integer, ties to even.
    fn round(self) -> Self;
    /// Down to an integer.
    fn floor(self) -> Self;
    /// Towards zero to an integer.
    fn trunc(self) -> Self;
    /// See [`bf16_bits`].
    #[inline(always)]
    fn bf16_bits(self) -> Self::Int {
        bf16_bits_by_integers(self)
    }
    /// Pairs of bf16: `self` in the lower halves of the lanes, `high` in the upper ones. Subnormal values may become
    /// zeros, which is cheaper on some tiers.
    #[inline(always)]
    fn bf16_pairs_normal(self, high: Self) -> Self::Int {
        Self::int_or(self.bf16_bits(), Self::int_shl(high.bf16_bits(), 16))
    }
    /// `self * 2^n` rounded once (subnormals too), for integral `n` in [-252, 254].
    fn scale_exp2(self, n: Self) -> Self;

    /// `self < other`.
    fn lt(self, other: Self) -> Self::Mask;
    /// `self <= other`.
    fn le(self, other: Self) -> Self::Mask;
    /// `self == other`.
    fn eq(self, other: Self) -> Self::Mask;
    /// `self > other`.
    #[inline(always)]
    fn gt(self, other: Self) -> Self::Mask {
        other.lt(self)
    }
    /// `self >= other`.
    #[inline(always)]
    fn ge(self, other: Self) -> Self::Mask {
        other.le(self)
    }
    /// Lanes where neither is NaN.
    #[inline(always)]
    fn ordered(self, other: Self) -> Self::Mask {
        Self::mask_and(self.eq(self), other.eq(other))
    }
    /// Where a lane is NaN.
    #[inline(always)]
    fn is_nan(self) -> Self::Mask {
        Self::mask_not(self.eq(self))
    }
    /// `mask ? a : b`.
    fn select(mask: Self::Mask, a: Self, b: Self) -> Self;
    /// Lane i is bit i.
    fn mask_bits(mask: Self::Mask) -> u16;
    /// Bit i is lane i.
    fn mask_from_bits(bits: u16) -> Self::Mask;
    /// Both.
    fn mask_and(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Either.
    fn mask_or(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Neither of them.
    fn mask_not(a: Self::Mask) -> Self::Mask;
    /// Whether any lane is set.
    #[inline(always)]
    fn any(mask: Self::Mask) -> bool {
        Self::mask_bits(mask) != 0
    }
    /// Whether all lanes are set.
    #[inline(always)]
    fn all(mask: Self::Mask) -> bool {
        Self::mask_bits(mask) == u16::MAX
    }

    /// The bits of the lanes as integers.
    fn to_bits(self) -> Self::Int;
    /// Lanes from bits.
    fn from_bits(bits: Self::Int) -> Self;
    /// Towards zero, for values that fit in an i32 (others are unspecified).
    fn to_int(self) -> Self::Int;
    /// The nearest f32, ties to even.
    fn from_int(x: Self::Int) -> Self;
    /// The same integer in all lanes.
    fn int_splat(x: i32) -> Self::Int;
    /// Integers from an array.
    fn int_from_array(x: [i32; LANES]) -> Self::Int;
    /// Integers as an array.
    fn int_to_array(x: Self::Int) -> [i32; LANES];
    /// Reads 16 integers.
    ///
    /// # Safety
    /// `p` is valid for reading 16 integers; no alignment is asked for.
    unsafe fn int_load(p: *const i32) -> Self::Int;
    /// Writes 16 integers.
    ///
    /// # Safety
    /// `p` is valid for writing 16 integers.
    unsafe fn int_store(x: Self::Int, p: *mut i32);
    /// Wrapping sum.
    fn int_add(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Wrapping difference.
    fn int_sub(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Bitwise and.
    fn int_and(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Bitwise or.
    fn int_or(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Bitwise exclusive or.
    fn int_xor(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Left by `bits` < 32.
    fn int_shl(a: Self::Int, bits: u32) -> Self::Int;
    /// Right by `bits` < 32, sign kept.
    fn int_shr(a: Self::Int, bits: u32) -> Self::Int;
    /// Right by `bits` < 32, zeros in.
    fn int_shr_logical(a: Self::Int, bits: u32) -> Self::Int;
    /// Signed `a > b`.
    fn int_gt(a: Self::Int, b: Self::Int) -> Self::Mask;
    /// `a == b`.
    fn int_eq(a: Self::Int, b: Self::Int) -> Self::Mask;

    /// `self + a.lo * b.lo + a.hi * b.hi` over pairs of bf16 in each 32-bit lane (`lo` is the
    /// lower half, the first in memory). With the instruction (AVX-512) subnormals count as zero
    /// and the two products are added in its own order; elsewhere it is two fused multiply-adds,
    /// low half first. The bits belong to the tier.
    fn dot_bf16(self, a: Self::Int, b: Self::Int) -> Self;

    /// All lanes zero.
    #[inline(always)]
    fn zero() -> Self {
        Self::splat(0.0)
    }
    /// Magnitude.
    #[inline(always)]
    fn abs(self) -> Self {
        Self::from_bits(Self::int_and(self.to_bits(), Self::int_splat(0x7fff_ffff)))
    }
    /// Magnitude of `self`, sign of `sign`.
    #[inline(always)]
    fn copy_sign(self, sign: Self) -> Self {
        let bit = Self::int_and(sign.to_bits(), Self::int_splat(i32::MIN));
        Self::from_bits(Self::int_or(self.abs().to_bits(), bit))
    }
    /// Reads up to 16 values of a slice; the other lanes are `fill`.
    #[inline(always)]
    fn from_slice(x: &[f32], fill: f32) -> Self {
        // SAFETY: reads no more than the slice holds.
        unsafe {
            if x.len() >= LANES { Self::load(x.as_ptr()) } else { Self::load_part(x.as_ptr(), x.len(), fill) }
        }
    }
    /// Writes the first lanes into a slice of up to 16 values (of a longer one, its first 16).
    #[inline(always)]
    fn to_slice(self, x: &mut [f32]) {
        // SAFETY: writes no more than the slice holds.
        unsafe {
            if x.len() >= LANES {
                self.store(x.as_mut_ptr())
            } else {
                self.store_part(x.as_mut_ptr(), x.len())
            }
        }
    }

    /// Sum of the lanes in the canonical order: lane i with i+8, then i+4, i+2, i+1.
    fn sum(self) -> f32;
    /// Largest lane, in the order of [`Vector::sum`] (of zeros the later one is taken); unspecified if one is NaN.
    fn max_lane(self) -> f32;
    /// Smallest lane; unspecified if one is NaN.
    #[inline(always)]
    fn min_lane(self) -> f32 {
        -(-self).max_lane()
    }
}

/// Code that is compiled once per tier. See the module's documentation for the rules.
pub trait Kernel {
    /// What `run` returns.
    type Output;
    /// The body; must be `#[inline(always)]`.
    fn run<V: Vector>(self) -> Self::Output;
}

/// Runs a kernel with the instructions of a tier. If the machine lacks the tier, the scalar body
/// runs instead (it gives the same values for everything but [`Vector::dot_bf16`]).
#[inline]
pub fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    if !Isa::available().contains(&isa) {
        return kernel.run::<scalar::F32x16>();
    }
    match isa {
        // SAFETY: the machine has the tier, which stands for these features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx2Vnni => unsafe { run_avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => unsafe { run_neon(kernel) },
        _ => kernel.run::<scalar::F32x16>(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<avx512::F32x16>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<avx2::F32x16>()
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
fn run_neon<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<neon::F32x16>()
}

/// Element types that are loaded into and stored from f32 lanes.
///
/// # Safety
/// Implementors are plain numbers; the functions touch `count.min(16)` elements and no more.
pub unsafe trait Element: Copy + Send + Sync + Default + 'static {
    /// The name in messages: `f32`, `bf16`, `f16`.
    const NAME: &'static str;
    /// Exactly widened.
    fn to_f32(self) -> f32;
    /// Rounded to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
    /// Reads 16 values.
    ///
    /// # Safety
    /// `p` is valid for reading 16 values.
    unsafe fn load<V: Vector>(p: *const Self) -> V;
    /// Writes 16 values, rounded to nearest, ties to even.
    ///
    /// # Safety
    /// `p` is valid for writing 16 values.
    unsafe fn store<V: Vector>(x: V, p: *mut Self);
    /// Reads `count` values (16 if it is more); the other lanes are zero.
    ///
    /// # Safety
    /// `p` is valid for reading `count.min(16)` values.
    #[inline(always)]
    unsafe fn load_part<V: Vector>(p: *const Self, count: usize) -> V {
        // SAFETY: promised by the caller; the copy stays inside the array.
        unsafe {
            if count >= LANES {
                return Self::load::<V>(p);
            }
            let mut part = [Self::default(); LANES];
            std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), count);
            Self::load::<V>(part.as_ptr())
        }
    }
    /// Writes the first `count` lanes (16 if it is more).
    ///
    /// # Safety
    /// `p` is valid for writing `count.min(16)` values.
    #[inline(always)]
    unsafe fn store_part<V: Vector>(x: V, p: *mut Self, count: usize) {
        // SAFETY: promised by the caller; the copy stays inside the array.
        unsafe {
            if count >= LANES {
                return Self::store::<V>(x, p);
            }
            let mut part = [Self::default(); LANES];
            Self::store::<V>(x, part.as_mut_ptr());
            std::ptr::copy_nonoverlapping(part.as_ptr(), p, count);
        }
    }
}

// SAFETY: forwards to the vector's own loads and stores.
unsafe impl Element for f32 {
    const NAME: &'static str = "f32";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const f32) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load(p) }
    }
    #[inline(always)]
    unsafe fn store<V: Vector>(x: V, p: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { x.store(p) }
    }
    #[inline(always)]
    unsafe fn load_part<V: Vector>(p: *const f32, count: usize) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load_part(p, count, 0.0) }
    }
    #[inline(always)]
    unsafe fn store_part<V: Vector>(x: V, p: *mut f32, count: usize) {
        // SAFETY: promised by the caller.
        unsafe { x.store_part(p, count) }
    }
}

macro_rules! half_element {
    ($t:ty, $name:literal, $load:ident, $store:ident) => {
        // SAFETY: forwards to the vector's own loads and stores.
        unsafe impl Element for $t {
            const NAME: &'static str = $name;
            #[inline(always)]
            fn to_f32(self) -> f32 {
                <$t>::to_f32(self)
            }
            #[inline(always)]
            fn from_f32(x: f32) -> $t {
                <$t>::from_f32(x)
            }
            #[inline(always)]
            unsafe fn load<V: Vector>(p: *const $t) -> V {
                // SAFETY: promised by the caller.
                unsafe { V::$load(p) }
            }
            #[inline(always)]
            unsafe fn store<V: Vector>(x: V, p: *mut $t) {
                // SAFETY: promised by the caller.
                unsafe { x.$store(p) }
            }
        }
    };
}
half_element!(bf16, "bf16", load_bf16, store_bf16);
half_element!(f16, "f16", load_f16, store_f16);

/// The bits of 16 f32 values as bf16 in the low halves: nearest, ties to even, NaN kept.
#[inline(always)]
pub fn bf16_bits<V: Vector>(x: V) -> V::Int {
    x.bf16_bits()
}

/// [`bf16_bits`] in integers, for tiers without an instruction.
#[inline(always)]
fn bf16_bits_by_integers<V: Vector>(x: V) -> V::Int {
    let bits = x.to_bits();
    let odd = V::int_and(V::int_shr_logical(bits, 16), V::int_splat(1));
    let rounded = V::int_shr_logical(V::int_add(V::int_add(bits, V::int_splat(0x7fff)), odd), 16);
    let quiet = V::int_or(V::int_shr_logical(bits, 16), V::int_splat(0x40));
    V::select(x.is_nan(), V::from_bits(quiet), V::from_bits(rounded)).to_bits()
}

#[cfg(test)]
mod tests;
