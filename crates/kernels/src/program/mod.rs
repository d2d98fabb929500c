//! Fused chains of elementwise ops: a short program run over tiles that fit the L1 cache.
//!
//! A [`Program`] is data: a list of instructions, each of which makes one value from earlier
//! ones. Running it, a tile of every input is loaded, each instruction is a loop over dense tiles,
//! and only the outputs go back to memory. Loops, loads and stores are those of
//! [`crate::elementwise`], and an intermediate of a half type is rounded to it, so a program's
//! results are those of its ops run one by one, bit for bit.
//!
//! Values are bool or float up to f32; programs with integers, f64 or complex numbers are
//! refused, and the caller runs the ops one by one. Reductions are not part of programs yet: a
//! later pass can be added behind [`Instruction`], with a row as the tile.

mod bind;
mod compile;

use std::sync::Arc;

use mica_simd::Isa;

use crate::dtype::Dtype;
use crate::elementwise::{BinaryOp, CompareOp, UnaryOp};
use crate::error::KernelError;
use compile::Code;

/// A value: the number of the instruction that makes it.
pub type Value = usize;

/// One step of a program.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Instruction {
    /// The elements of an input, by its number.
    Input(usize),
    /// One number everywhere, of a type that it is rounded to.
    Constant(f32, Dtype),
    /// As [`crate::elementwise::unary`].
    Unary(UnaryOp, Value),
    /// As [`crate::elementwise::binary`].
    Binary(BinaryOp, Value, Value),
    /// As [`crate::elementwise::compare`].
    Compare(CompareOp, Value, Value),
    /// As [`crate::elementwise::select`]: condition, then, else.
    Select(Value, Value, Value),
    /// As [`crate::elementwise::cast`].
    Cast(Dtype, Value),
}

/// A checked program, ready to be bound to memory any number of times.
#[derive(Clone)]
pub struct Program {
    code: Arc<Code>,
}

impl Program {
    /// A program over inputs of these types. `outputs` are the values that are stored.
    ///
    /// Fails if a value is used before it is made, if types do not fit, or if an op or a type
    /// has no fused form; the message says which.
    pub fn new(
        inputs: &[Dtype],
        instructions: &[Instruction],
        outputs: &[Value],
    ) -> Result<Program, KernelError> {
        Program::on(Isa::get(), inputs, instructions, outputs)
    }

    pub(crate) fn on(
        isa: Isa,
        inputs: &[Dtype],
        instructions: &[Instruction],
        outputs: &[Value],
    ) -> Result<Program, KernelError> {
        Ok(Program { code: Arc::new(Code::new(isa, inputs, instructions, outputs)?) })
    }

    /// The type of a value.
    pub fn dtype(&self, value: Value) -> Dtype {
        self.code.dtypes[value]
    }

    /// How many instructions there are.
    pub fn len(&self) -> usize {
        self.code.dtypes.len()
    }

    /// Whether there is no instruction.
    pub fn is_empty(&self) -> bool {
        self.code.dtypes.is_empty()
    }
}

fn refuse(message: String) -> KernelError {
    KernelError::new("program", message)
}

#[cfg(test)]
mod tests;
