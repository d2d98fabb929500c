//! Quantized products through the public door: every tier, width, group size and scale type.

mod cases;
mod experts;
mod forward;
mod modes;
mod rows;
mod transposed;
