//! Arrays as text, as MLX prints them: nested lists, long dimensions cut in the middle.

use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::{Array, Complex32, Dtype, Error, Result};

/// Dimensions longer than this show the first and last [`EDGE`] entries.
const LONGEST: usize = 6;
const EDGE: usize = 3;

/// Decimals of floats; negative: six significant digits.
static PRECISION: AtomicI32 = AtomicI32::new(-1);

/// How arrays are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PrintOptions {
    /// Decimals of floats; without it six significant digits.
    pub precision: Option<u16>,
}

/// The options in force.
pub fn print_options() -> PrintOptions {
    PrintOptions { precision: u16::try_from(PRECISION.load(Ordering::Relaxed)).ok() }
}

/// Sets the options for the whole program.
pub fn set_print_options(options: PrintOptions) {
    PRECISION.store(options.precision.map_or(-1, i32::from), Ordering::Relaxed);
}

/// Runs something with other options, then sets back the old ones.
pub fn with_print_options<R>(options: PrintOptions, run: impl FnOnce() -> R) -> R {
    struct Restore(PrintOptions);
    impl Drop for Restore {
        fn drop(&mut self) {
            set_print_options(self.0);
        }
    }
    let _restore = Restore(print_options());
    set_print_options(options);
    run()
}

/// The values, computed if they are not there yet: `array([1, 2, 3], dtype=int32)`. If computing
/// fails, the error stands in their place.
impl fmt::Display for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match shown(self) {
            Ok(text) => write!(f, "array({text}, dtype={})", self.dtype()),
            Err(error) => write!(f, "array({error}, dtype={})", self.dtype()),
        }
    }
}

fn shown(x: &Array) -> Result<String> {
    if x.size() == 0 && x.shape().first() == Some(&0) {
        return Ok("[]".to_string());
    }
    // Only what is shown is read.
    let mut part = x.clone();
    for (axis, &size) in x.shape().iter().enumerate() {
        if size > LONGEST {
            let axis = axis as i32;
            let ends = [part.narrow(axis, 0, EDGE)?, part.narrow(axis, size - EDGE, size)?];
            part = Array::concatenate(&ends, axis)?;
        }
    }
    let entries = entries(&part)?;
    let mut text = String::new();
    write_level(&mut text, &entries, x.shape(), "array(".len());
    Ok(text)
}

/// One dimension between brackets; `indent` is how far its entries stand from the margin.
fn write_level(text: &mut String, entries: &[String], shape: &[usize], indent: usize) {
    let Some((&size, inner)) = shape.split_first() else {
        text.push_str(&entries[0]);
        return;
    };
    text.push('[');
    let shown = if size > LONGEST { 2 * EDGE } else { size };
    let step = entries.len() / shown.max(1);
    for place in 0..shown {
        if place > 0 {
            separate(text, inner, indent + 1);
        }
        if size > LONGEST && place == EDGE {
            text.push_str("...");
            separate(text, inner, indent + 1);
        }
        write_level(text, &entries[place * step..(place + 1) * step], inner, indent + 1);
    }
    text.push(']');
}

fn separate(text: &mut String, inner: &[usize], indent: usize) {
    if inner.is_empty() {
        text.push_str(", ");
    } else {
        text.push_str(",\n");
        text.extend(std::iter::repeat_n(' ', indent));
    }
}

fn entries(x: &Array) -> Result<Vec<String>> {
    macro_rules! each {
        ($t:ty) => {
            x.to_vec::<$t>()?.iter().map(ToString::to_string).collect()
        };
    }
    Ok(match x.dtype() {
        Dtype::Bool => {
            let name = |value: &bool| if *value { "True" } else { "False" };
            x.to_vec::<bool>()?.iter().map(|value| name(value).to_string()).collect()
        }
        Dtype::U64 => each!(u64),
        Dtype::C64 => x.to_vec::<Complex32>()?.iter().map(complex).collect(),
        dtype if dtype.is_float() => {
            x.astype(Dtype::F64)?.to_vec::<f64>()?.iter().map(|&v| number(v)).collect()
        }
        dtype if dtype.is_integer() => {
            let x = x.astype(Dtype::I64)?;
            x.to_vec::<i64>()?.iter().map(ToString::to_string).collect()
        }
        dtype => return Err(Error::dtype("print", "a known dtype", dtype)),
    })
}

fn complex(value: &Complex32) -> String {
    let imaginary = number(value.im as f64);
    let sign = if imaginary.starts_with('-') { "" } else { "+" };
    format!("{}{sign}{imaginary}j", number(value.re as f64))
}

/// C's `%.pf` if a precision is set, else `%g`.
fn number(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_string();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_string();
    }
    match print_options().precision {
        Some(decimals) => format!("{value:.0$}", decimals as usize),
        None => general(value),
    }
}

/// Six significant digits, without trailing zeros; an exponent below −4 and from 6 on.
fn general(value: f64) -> String {
    const DIGITS: i32 = 6;
    if value == 0.0 {
        return if value.is_sign_negative() { "-0" } else { "0" }.to_string();
    }
    let scientific = format!("{value:.*e}", DIGITS as usize - 1);
    let (mantissa, exponent) = scientific.split_once('e').expect("has an exponent");
    let exponent: i32 = exponent.parse().expect("is a number");
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text.to_string(),
    };
    if (-4..DIGITS).contains(&exponent) {
        return trimmed(&format!("{value:.*}", (DIGITS - 1 - exponent) as usize));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trimmed(mantissa), exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_that_of_mlx() {
        let range = |count: usize, shape: &[i64]| {
            Array::arange(0.0, count as f64, 1.0, Dtype::I32).unwrap().reshape(shape).unwrap()
        };
        let floats = [1.0, 1e-8, 1e10, f32::NAN, f32::INFINITY, -0.0];
        let floats = Array::from_slice(&floats, &[6]).unwrap();
        let doubles = Array::from_slice(&[-1e-5, 1e-4, 123456.0, 1234567.0, 0.1, 1e100], &[6]).unwrap();
        let complex = Array::from_slice(&[Complex32 { re: 3.0, im: -0.5 }], &[1]).unwrap();
        for (array, expected) in [
            (range(1, &[]), "array(0, dtype=int32)"),
            (range(3, &[3]), "array([0, 1, 2], dtype=int32)"),
            (
                range(8, &[2, 2, 2]),
                "array([[[0, 1],\n        [2, 3]],\n       [[4, 5],\n        [6, 7]]], dtype=int32)",
            ),
            (range(2000, &[2000]), "array([0, 1, 2, ..., 1997, 1998, 1999], dtype=int32)"),
            (
                range(14, &[7, 2]),
                "array([[0, 1],\n       [2, 3],\n       [4, 5],\n       ...,\n       [8, 9],\n       [10, 11],\n       [12, 13]], dtype=int32)",
            ),
            (range(0, &[0, 3]), "array([], dtype=int32)"),
            (range(0, &[2, 0]), "array([[],\n       []], dtype=int32)"),
            (floats, "array([1, 1e-08, 1e+10, nan, inf, -0], dtype=float32)"),
            (doubles, "array([-1e-05, 0.0001, 123456, 1.23457e+06, 0.1, 1e+100], dtype=float64)"),
            (complex, "array([3-0.5j], dtype=complex64)"),
            (Array::from_slice(&[true, false], &[2]).unwrap(), "array([True, False], dtype=bool)"),
        ] {
            assert_eq!(array.to_string(), expected);
        }
        // In the same test, because the options are the program's.
        let text = with_print_options(PrintOptions { precision: Some(3) }, || number(1.23456));
        assert_eq!(text, "1.235");
    }

    #[test]
    fn failures_are_shown() {
        let failed = &Array::zeros(&[2], Dtype::F32) + Array::zeros(&[3], Dtype::F32);
        assert!(failed.to_string().contains("[add]"), "{failed}");
    }
}
