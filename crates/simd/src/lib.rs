//! Instruction sets and vector mathematics.
//!
//! The only home of feature detection: every other crate asks [`Isa::get`] once and picks its
//! kernel by `match`, or writes it once over [`Vector`] and runs it with [`dispatch`]. A tier
//! promises all of its features together, so that a kernel needs one test, not five.

#[cfg(target_arch = "aarch64")]
pub mod aarch64;
mod convert;
mod isa;
pub mod math;
mod vector;

pub use convert::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use isa::{Cores, ISA_VARIABLE, Isa, IsaError};
pub use vector::{Element, Kernel, LANES, Vector, bf16_bits, dispatch};
