//! Dense conversion loops between element types.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use mica_simd::Isa;

use crate::dtype::Dtype;
use crate::element::{CastTo, Element, round_bf16, with_element};

/// Converts `count` dense values: `(from, to, count)`, aligned, apart from each other.
pub(crate) type Convert = unsafe fn(*const u8, *mut u8, usize);

/// The loop from one type to another.
pub(crate) fn converter(from: Dtype, to: Dtype) -> Convert {
    match (from, to) {
        (Dtype::BF16, Dtype::F32) => widen_for(Isa::get()),
        (Dtype::F32, Dtype::BF16) => narrow_for(Isa::get()),
        (Dtype::F16, Dtype::F32) => f16_to_f32,
        (Dtype::F32, Dtype::F16) => f32_to_f16,
        _ => with_element!(from, A => with_element!(to, B => generic::<A, B> as Convert)),
    }
}

/// # Safety
/// As [`Convert`].
unsafe fn generic<A: Element + CastTo<B>, B: Element>(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: promised by the caller.
    let (from, to) = unsafe {
        (
            std::slice::from_raw_parts(from.cast::<A>(), count),
            std::slice::from_raw_parts_mut(to.cast::<B>(), count),
        )
    };
    for (to, &from) in to.iter_mut().zip(from) {
        *to = from.cast();
    }
}

/// # Safety
/// As [`Convert`].
unsafe fn f16_to_f32(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        let from = std::slice::from_raw_parts(from.cast::<f16>(), count);
        from.convert_to_f32_slice(std::slice::from_raw_parts_mut(to.cast::<f32>(), count));
    }
}

/// # Safety
/// As [`Convert`].
unsafe fn f32_to_f16(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        let to = std::slice::from_raw_parts_mut(to.cast::<f16>(), count);
        to.convert_from_f32_slice(std::slice::from_raw_parts(from.cast::<f32>(), count));
    }
}

#[inline(always)]
unsafe fn widen(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: promised by the caller.
    unsafe { generic::<bf16, f32>(from, to, count) }
}

#[inline(always)]
unsafe fn narrow(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: promised by the caller.
    let (from, to) = unsafe {
        (
            std::slice::from_raw_parts(from.cast::<f32>(), count),
            std::slice::from_raw_parts_mut(to.cast::<bf16>(), count),
        )
    };
    for (to, &from) in to.iter_mut().zip(from) {
        *to = round_bf16(from);
    }
}

macro_rules! tiers {
    ($body:ident: $avx2:ident $avx512:ident $pick:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $avx2(from: *const u8, to: *mut u8, count: usize) {
            // SAFETY: promised by the caller.
            unsafe { $body(from, to, count) }
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn $avx512(from: *const u8, to: *mut u8, count: usize) {
            // SAFETY: promised by the caller.
            unsafe { $body(from, to, count) }
        }

        /// The same bits on every tier; only the width of the vectors differs.
        fn $pick(isa: Isa) -> Convert {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 | Isa::Avx2Vnni => $avx2,
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => $avx512,
                _ => $body,
            }
        }
    };
}
tiers!(widen: widen_avx2 widen_avx512 widen_for);
tiers!(narrow: narrow_avx2 narrow_avx512 narrow_for);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_conversions_have_the_same_bits_on_every_tier() {
        let values: Vec<f32> = (0..100_003u32).map(|i| f32::from_bits(i.wrapping_mul(42_949_673))).collect();
        let mut expected = vec![bf16::ZERO; values.len()];
        for (to, &from) in expected.iter_mut().zip(&values) {
            *to = round_bf16(from);
        }
        for &isa in Isa::available() {
            let mut narrow = vec![bf16::ZERO; values.len()];
            let mut wide = vec![0f32; values.len()];
            // SAFETY: both hold as many values as are converted; the tier is available.
            unsafe {
                narrow_for(isa)(values.as_ptr().cast(), narrow.as_mut_ptr().cast(), values.len());
                widen_for(isa)(narrow.as_ptr().cast(), wide.as_mut_ptr().cast(), values.len());
            }
            for i in 0..values.len() {
                assert_eq!(narrow[i].to_bits(), expected[i].to_bits(), "{isa} {i}");
                assert_eq!(wide[i].to_bits(), (expected[i].to_bits() as u32) << 16, "{isa} {i}");
            }
        }
    }
}
