//! Numbers whose order is that of the values.

use mica_simd::Isa;

use crate::dtype::Dtype;

/// A number with the order of the value that `bits` of `dtype` are: zeros are equal, and so are NaNs, which go
/// last.
#[inline(always)]
pub(super) fn rank_of(dtype: Dtype, bits: u64) -> u64 {
    /// Sign and magnitude to two's order.
    #[inline(always)]
    fn float(bits: u64, width: u32, infinity: u64) -> u64 {
        let top = 1u64 << (width - 1);
        let magnitude = bits & (top - 1);
        if magnitude > infinity {
            u64::MAX
        } else if bits & top != 0 {
            top - magnitude
        } else {
            top + magnitude
        }
    }
    match dtype {
        Dtype::Bool | Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => bits,
        Dtype::I8 => bits ^ 0x80,
        Dtype::I16 => bits ^ 0x8000,
        Dtype::I32 => bits ^ 0x8000_0000,
        Dtype::I64 => bits ^ (1 << 63),
        Dtype::F16 => float(bits, 16, 0x7c00),
        Dtype::BF16 => float(bits, 16, 0x7f80),
        Dtype::F32 => float(bits, 32, 0x7f80_0000),
        Dtype::F64 => float(bits, 64, 0x7ff0_0000_0000_0000),
        Dtype::C64 => {
            match (float(bits & 0xffff_ffff, 32, 0x7f80_0000), float(bits >> 32, 32, 0x7f80_0000)) {
                (u64::MAX, _) | (_, u64::MAX) => u64::MAX,
                (re, im) => re << 32 | im,
            }
        }
    }
}

/// An unsigned integer that holds the bits of a value.
pub(super) trait Bits: Copy + Into<u64> + Send + Sync + 'static {
    fn of(bits: u32) -> Self;

    /// The low 32 bits.
    #[inline(always)]
    fn low(self) -> u32 {
        Into::<u64>::into(self) as u32
    }
}

macro_rules! bits {
    ($($t:ty)*) => { $(
        impl Bits for $t {
            #[inline(always)]
            fn of(bits: u32) -> $t {
                bits as $t
            }
        }
    )* };
}
bits!(u8 u16 u32 u64);

/// Keys of values of at most 32 bits.
#[derive(Clone, Copy)]
pub(super) struct KeyOrder {
    /// The sign bit; 0 for unsigned integers.
    sign: u32,
    /// All bits of the type.
    mask: u32,
    /// The bits of +∞; the mask for integers.
    infinity: u32,
}

impl KeyOrder {
    pub fn new(dtype: Dtype) -> KeyOrder {
        let mask = u32::MAX >> (32 - 8 * dtype.size().min(4) as u32);
        let top = mask ^ (mask >> 1);
        let (sign, infinity) = match dtype {
            Dtype::F16 => (top, 0x7c00),
            Dtype::BF16 => (top, 0x7f80),
            Dtype::F32 => (top, 0x7f80_0000),
            dtype if dtype.is_signed_integer() => (top, mask),
            _ => (0, mask),
        };
        KeyOrder { sign, mask, infinity }
    }

    pub fn is_float(self) -> bool {
        self.infinity != self.mask
    }

    /// The key of −0, one below that of 0.
    pub fn negative_zero(self) -> u32 {
        self.zero().wrapping_sub(1)
    }

    pub fn zero(self) -> u32 {
        self.sign
    }

    /// A key from which the value comes back (NaN without its sign): −0 is below 0, and NaN last.
    #[inline(always)]
    pub fn key(self, bits: u32) -> u32 {
        if !self.is_float() {
            return bits ^ self.sign;
        }
        let magnitude = bits & !self.sign;
        if bits & self.sign == 0 || magnitude > self.infinity {
            magnitude | self.sign
        } else {
            !bits & self.mask
        }
    }

    /// The value that has this key.
    #[inline(always)]
    pub fn value(self, key: u32) -> u32 {
        if !self.is_float() || key & self.sign != 0 { key ^ self.sign } else { !key & self.mask }
    }

    /// A key that is equal for equal values: for −0 and 0, and for all NaN.
    #[inline(always)]
    pub fn rank(self, bits: u32) -> u32 {
        if !self.is_float() {
            return bits ^ self.sign;
        }
        let magnitude = bits & !self.sign;
        if magnitude > self.infinity {
            self.mask
        } else if bits & self.sign == 0 || magnitude == 0 {
            magnitude | self.sign
        } else {
            !bits & self.mask
        }
    }
}

/// The keys of values, or their ranks.
pub(super) fn keys_of<T: Bits>(isa: Isa, order: KeyOrder, values: &[T], keys: &mut [u32], ranks: bool) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tier is the machine's.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { keys_avx512(order, values, keys, ranks) },
        _ => keys_loop(order, values, keys, ranks),
    }
}

/// The values of keys, written `stride` elements apart.
///
/// # Safety
/// There is room for them.
pub(super) unsafe fn write_values<T: Bits>(
    isa: Isa,
    order: KeyOrder,
    keys: &[u32],
    out: *mut T,
    stride: isize,
) {
    // SAFETY: the caller's; the tier is the machine's.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => values_avx512(order, keys, out, stride),
            _ => values_loop(order, keys, out, stride),
        }
    }
}

/// Words as what their low bits are, `stride` elements apart.
///
/// # Safety
/// There is room for them.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn write_words<T: Bits>(words: &[u32], out: *mut T, stride: isize) {
    // SAFETY: the caller's.
    unsafe { write_each(words, out, stride, |word| word) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn keys_avx512<T: Bits>(order: KeyOrder, values: &[T], keys: &mut [u32], ranks: bool) {
    keys_loop(order, values, keys, ranks)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn values_avx512<T: Bits>(order: KeyOrder, keys: &[u32], out: *mut T, stride: isize) {
    // SAFETY: the caller's.
    unsafe { values_loop(order, keys, out, stride) }
}

#[inline(always)]
fn keys_loop<T: Bits>(order: KeyOrder, values: &[T], keys: &mut [u32], ranks: bool) {
    if ranks {
        keys.iter_mut().zip(values).for_each(|(key, value)| *key = order.rank(value.low()));
    } else {
        keys.iter_mut().zip(values).for_each(|(key, value)| *key = order.key(value.low()));
    }
}

#[inline(always)]
unsafe fn values_loop<T: Bits>(order: KeyOrder, keys: &[u32], out: *mut T, stride: isize) {
    // SAFETY: the caller's.
    unsafe { write_each(keys, out, stride, |key| order.value(key)) }
}

#[inline(always)]
unsafe fn write_each<T: Bits>(keys: &[u32], out: *mut T, stride: isize, bits: impl Fn(u32) -> u32) {
    // SAFETY: the caller's.
    unsafe {
        if stride == 1 {
            let out = std::slice::from_raw_parts_mut(out, keys.len());
            out.iter_mut().zip(keys).for_each(|(out, &key)| *out = T::of(bits(key)));
        } else {
            for (i, &key) in keys.iter().enumerate() {
                *out.offset(i as isize * stride) = T::of(bits(key));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_order_of_values_and_come_back() {
        let order = KeyOrder::new(Dtype::F32);
        let ascending =
            [f32::NEG_INFINITY, -1e30, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 2.0, f32::INFINITY, f32::NAN];
        for pair in ascending.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|value| order.key(value.to_bits()));
            assert!(a < b, "{pair:?}");
            let [a, b] = [pair[0], pair[1]].map(|value| order.rank(value.to_bits()));
            assert!(a < b || pair[0] == pair[1], "{pair:?}");
        }
        assert_eq!(order.rank(0f32.to_bits()), order.rank((-0f32).to_bits()));
        assert_eq!(order.rank(f32::NAN.to_bits()), order.rank((-f32::NAN).to_bits() | 1));
        for dtype in [Dtype::Bool, Dtype::I8, Dtype::U8, Dtype::I16, Dtype::U16, Dtype::F16, Dtype::BF16] {
            let order = KeyOrder::new(dtype);
            for bits in 0..1u32 << (8 * dtype.size()) {
                let nan = order.is_float() && bits & !order.sign > order.infinity;
                let back = order.value(order.key(bits));
                assert!(back == bits || (nan && back == bits & !order.sign), "{dtype} {bits:x}");
                let other = (bits.wrapping_mul(40_503) ^ (bits >> 3)) & order.mask;
                let expected = rank_of(dtype, bits as u64).cmp(&rank_of(dtype, other as u64));
                assert_eq!(order.rank(bits).cmp(&order.rank(other)), expected, "{dtype} {bits:x} {other:x}");
            }
        }
    }
}
