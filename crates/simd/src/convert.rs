//! Slices of half types to f32 and back: exact one way, nearest with ties to even the other, NaN
//! stays NaN.

use half::{bf16, f16};

use crate::{Element, Isa, Kernel, LANES, Vector, dispatch};

struct Convert<'a, A, B> {
    from: &'a [A],
    to: &'a mut [B],
}

impl<A: Element, B: Element> Kernel for Convert<'_, A, B> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let count = self.from.len();
        let mut at = 0;
        while at < count {
            let part = (count - at).min(LANES);
            // SAFETY: `part` elements from `at` are inside both slices, which have one length.
            unsafe {
                let x = A::load_part::<V>(self.from.as_ptr().add(at), part);
                B::store_part(x, self.to.as_mut_ptr().add(at), part);
            }
            at += LANES;
        }
    }
}

macro_rules! conversions {
    ($($(#[$doc:meta])* $name:ident $from:ty => $to:ty;)*) => { $(
        $(#[$doc])*
        ///
        /// # Panics
        /// If the lengths differ.
        pub fn $name(isa: Isa, from: &[$from], to: &mut [$to]) {
            assert_eq!(from.len(), to.len(), "a conversion keeps the length");
            dispatch(isa, Convert { from, to });
        }
    )* };
}
conversions! {
    /// Widens exactly.
    bf16_to_f32 bf16 => f32;
    /// Rounds to nearest, ties to even.
    f32_to_bf16 f32 => bf16;
    /// Widens exactly.
    f16_to_f32 f16 => f32;
    /// Rounds to nearest, ties to even.
    f32_to_f16 f32 => f16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_value_survives_the_round_trip() {
        for &isa in Isa::available() {
            let bits: Vec<u16> = (0..=u16::MAX).collect();
            let b: Vec<bf16> = bits.iter().map(|&x| bf16::from_bits(x)).collect();
            let h: Vec<f16> = bits.iter().map(|&x| f16::from_bits(x)).collect();
            let (mut wide, mut b2, mut h2) = (vec![7.0; b.len()], b.clone(), h.clone());
            bf16_to_f32(isa, &b, &mut wide);
            f32_to_bf16(isa, &wide, &mut b2);
            for (a, c) in b.iter().zip(&b2) {
                assert!(a.to_bits() == c.to_bits() || (a.is_nan() && c.is_nan()), "{isa} {a:?} {c:?}");
            }
            f16_to_f32(isa, &h, &mut wide);
            for (a, &c) in h.iter().zip(&wide) {
                assert!(a.to_f32() == c || (a.is_nan() && c.is_nan()), "{isa} {a:?} {c:?}");
            }
            f32_to_f16(isa, &wide, &mut h2);
            for (a, c) in h.iter().zip(&h2) {
                assert!(a.to_bits() == c.to_bits() || (a.is_nan() && c.is_nan()), "{isa} {a:?} {c:?}");
            }
        }
    }

    #[test]
    fn rounding_equals_that_of_the_half_crate() {
        let mut rng = mica_testkit::Rng::new(5);
        let mut x: Vec<f32> = (0..100_003).map(|_| f32::from_bits(rng.u32())).collect();
        // Ties, the largest finite values, and values that round up to infinity.
        for bits in [0x3f80_8000u32, 0x3f81_8000, 0x7f7f_7fff, 0x7f7f_8000, 0x7f80_0001, 0xffff_ffff] {
            x.push(f32::from_bits(bits));
        }
        x.extend([65504.0, 65519.99, 65520.0, 5.9e-8, 2.9e-8, -0.0]);
        for &isa in Isa::available() {
            let mut b = vec![bf16::ZERO; x.len()];
            let mut h = vec![f16::ZERO; x.len()];
            f32_to_bf16(isa, &x, &mut b);
            f32_to_f16(isa, &x, &mut h);
            for i in 0..x.len() {
                assert_eq!(b[i].to_bits(), bf16::from_f32(x[i]).to_bits(), "{isa} {:?}", x[i]);
                let expected = f16::from_f32(x[i]);
                let same = h[i].to_bits() == expected.to_bits() || (h[i].is_nan() && expected.is_nan());
                assert!(same, "{isa} {:?}", x[i]);
            }
        }
    }
}
