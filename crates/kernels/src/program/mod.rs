//! Fused chains of elementwise ops and reductions of rows: a short program run over tiles that fit
//! the caches.
//!
//! A [`Program`] is data: a list of instructions, each of which makes one value from earlier
//! ones. Running it, a tile of every input is loaded, each instruction is a loop over dense tiles,
//! and only the outputs go back to memory. Loops, loads and stores are those of
//! [`crate::elementwise`] and [`crate::reduce`], and an intermediate of a half type is rounded to it,
//! so a program's results are those of its ops run one by one, bit for bit.
//!
//! A program with reductions over the last axis works on rows: values are *wide*, a number for every
//! element, or have one number a row. It runs in stages, since a row's sum is known when all of the
//! row has been seen: `stages` orders the instructions, `rows` runs them, several short rows at a
//! time, a long row tile by tile. Between stages, a row stays in the L2 cache.
//!
//! Values are bool or float up to f32; programs with integers, f64 or complex numbers are
//! refused, and the caller runs the ops one by one.

mod bind;
mod compile;
mod rows;
mod stages;

use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::Task;

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::{BinaryOp, CompareOp, UnaryOp};
use crate::error::KernelError;
use crate::reduce::ReduceOp;
use compile::Code;
use stages::RowCode;

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
    /// An input that has one number a row, by its number.
    RowInput(usize),
    /// A row's number for each of its elements. Ops take either wide values or numbers of rows.
    Spread(Value),
    /// As [`crate::reduce::reduce`] over the last axis: one number a row. Truth only of bool.
    Reduce(ReduceOp, Value),
    /// As [`crate::reduce::softmax`].
    Softmax(Value),
    /// As [`crate::reduce::logsumexp`]: one number a row.
    LogSumExp(Value),
}

impl Instruction {
    /// Whether only programs over rows have it.
    fn is_of_rows(&self) -> bool {
        use Instruction::*;
        matches!(self, RowInput(_) | Spread(_) | Reduce(..) | Softmax(_) | LogSumExp(_))
    }

    /// Whether it needs all of a row.
    fn joins_rows(&self) -> bool {
        matches!(self, Instruction::Reduce(..) | Instruction::Softmax(_) | Instruction::LogSumExp(_))
    }
}

/// A checked program, ready to be bound to memory any number of times.
#[derive(Clone)]
pub struct Program {
    dtypes: Arc<[Dtype]>,
    code: Flow,
}

/// How a program runs.
#[derive(Clone)]
enum Flow {
    Tiles(Arc<Code>),
    Rows(Arc<RowCode>),
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
        let dtypes = compile::types(inputs, instructions)?;
        if let Some(value) = outputs.iter().find(|&&value| value >= instructions.len()) {
            return Err(refuse(format!("output {value} of {} values", instructions.len())));
        }
        let code = if instructions.iter().any(Instruction::is_of_rows) {
            Flow::Rows(Arc::new(RowCode::new(isa, inputs, instructions, &dtypes, outputs)?))
        } else {
            Flow::Tiles(Arc::new(Code::new(isa, inputs, instructions, &dtypes, outputs)?))
        };
        Ok(Program { dtypes: dtypes.into(), code })
    }

    /// A task that runs the program: inputs broadcast to one shape, the outputs'; over rows, outputs of
    /// one number a row have size 1 in the last place. An output may be the memory of an input with the
    /// same layout and element size, if both are wide or both have one number a row.
    pub fn bind(&self, inputs: &[DynView], outputs: &[DynViewMut]) -> Result<Box<dyn Task>, KernelError> {
        let (takes, gives) = match &self.code {
            Flow::Tiles(code) => (code.inputs.len(), code.outputs.len()),
            Flow::Rows(code) => (code.inputs.len(), code.outputs.len()),
        };
        if (inputs.len(), outputs.len()) != (takes, gives) {
            let message = format!(
                "takes {takes} inputs and {gives} outputs, got {} and {}",
                inputs.len(),
                outputs.len()
            );
            return Err(refuse(message));
        }
        match &self.code {
            Flow::Tiles(code) => bind::bind(code, inputs, outputs),
            Flow::Rows(code) => rows::bind(code, inputs, outputs),
        }
    }

    /// The type of a value.
    pub fn dtype(&self, value: Value) -> Dtype {
        self.dtypes[value]
    }

    /// How many instructions there are.
    pub fn len(&self) -> usize {
        self.dtypes.len()
    }

    /// Whether there is no instruction.
    pub fn is_empty(&self) -> bool {
        self.dtypes.is_empty()
    }
}

fn refuse(message: String) -> KernelError {
    KernelError::new("program", message)
}

#[cfg(test)]
mod row_tests;
#[cfg(test)]
mod tests;
