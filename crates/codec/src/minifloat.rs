//! Floats of four and eight bits: e4m3 (values and scales), e2m1 (values), e8m0 (scales).

/// The nearest e4m3 value, ties to even; beyond ±448 the largest one, as MLX's `to_fp8`. NaN also
/// becomes 448: the conversion has no NaN.
pub fn to_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return 126;
    }
    if magnitude >= 448.0 {
        return sign | 126;
    }
    // Steps of 2⁻⁹ below 2⁻⁶, of an eighth of the power of two above.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    let steps = (magnitude / step).round_ties_even() as u32;
    // Eight steps are the next power of two, and the codes go on there.
    sign | ((((exponent + 6) as u32) << 3) + steps) as u8
}

/// The value of an e4m3 code; 127 and 255 are NaN.
pub fn from_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * power_of_two(exponent - 7),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// The values of the e2m1 codes.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The nearest e2m1 code. Of two as near the one of smaller magnitude, as MLX.
pub fn to_e2m1(value: f32) -> u8 {
    let magnitude = value.abs();
    let code = match () {
        _ if magnitude <= 0.25 => return 0,
        _ if magnitude <= 0.75 => 1,
        _ if magnitude <= 1.25 => 2,
        _ if magnitude <= 1.75 => 3,
        _ if magnitude <= 2.5 => 4,
        _ if magnitude <= 3.5 => 5,
        _ if magnitude <= 5.0 => 6,
        _ => 7,
    };
    if value < 0.0 { code | 8 } else { code }
}

/// The e8m0 code of the power of two that is not below `scale`: 127 for zero, as MLX.
///
/// The smallest is 2⁻¹²⁷ (where MLX's code wraps around to that of NaN).
pub fn to_e8m0(scale: f32) -> u8 {
    if scale == 0.0 {
        return 127;
    }
    // The logarithm is rounded to f32 first, so that a scale a hair above a power keeps it.
    let exponent = (f64::from(scale).log2() as f32).ceil();
    (exponent + 127.0).clamp(0.0, 254.0) as u8
}

/// The value of an e8m0 code.
pub fn from_e8m0(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        0 => f32::from_bits(1 << 22),
        code => f32::from_bits(u32::from(code) << 23),
    }
}

fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes_come_back_and_ties_go_to_even() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(from_e4m3(code)), code, "{code}");
        }
        assert!(from_e4m3(127).is_nan() && from_e4m3(255).is_nan());
        // As `mlx.core.to_fp8` gives them.
        for (value, code) in [
            (449.0, 126),
            (1e9, 126),
            (f32::INFINITY, 126),
            (f32::NEG_INFINITY, 254),
            (f32::NAN, 126),
            (0.000_976_562_5, 0),
            (0.000_986_313, 1),
            (0.002_929_687_5, 2),
            (17.0, 88),
            (19.0, 90),
            (-3.3, 197),
            (-0.0, 128),
        ] {
            assert_eq!(to_e4m3(value), code, "{value}");
        }
        for pair in 0..125u8 {
            let middle = (from_e4m3(pair) + from_e4m3(pair + 1)) / 2.0;
            assert_eq!(to_e4m3(middle), pair + pair % 2, "between {pair} and the next");
        }
    }

    #[test]
    fn e2m1_ties_go_towards_zero() {
        for code in 0..16u8 {
            let expected = if code == 8 { 0 } else { code };
            assert_eq!(to_e2m1(E2M1[code as usize]), expected);
        }
        for (value, code) in
            [(0.25, 0), (0.75, 1), (1.25, 2), (2.5, 4), (5.0, 6), (5.1, 7), (-0.2, 0), (99.0, 7)]
        {
            assert_eq!(to_e2m1(value), code, "{value}");
        }
    }

    #[test]
    fn e8m0_rounds_up() {
        for (value, code) in [(1.0, 127), (1.5, 128), (0.3, 126), (0.0, 127), (1e-38, 1), (1e-45, 0)] {
            assert_eq!(to_e8m0(value), code, "{value}");
        }
        for code in 0..255u8 {
            assert_eq!(to_e8m0(from_e8m0(code)), code, "{code}");
        }
    }
}
