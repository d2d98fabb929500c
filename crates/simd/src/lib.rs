//! Instruction sets and vector mathematics.
//!
//! The only home of feature detection: every other crate asks [`Isa::get`] once and picks its
//! kernel by `match`. A tier promises all of its features together, so that a kernel needs one
//! test, not five.

mod isa;

pub use isa::{Isa, IsaError};
