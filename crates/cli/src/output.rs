//! Results on stdout. A disk that is full, or whatever else keeps them from being written, is an error like others.

use std::fmt::Arguments;
use std::io::Write;

use anyhow::Context;

/// Writes a line to stdout, or returns from the function with an error.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::line(format_args!($($text)*))? };
}
pub(crate) use say;

/// Writes a line to stdout.
pub fn line(text: Arguments) -> anyhow::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes to stdout.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("cannot write the result to stdout")
}
