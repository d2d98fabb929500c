//! From instructions to steps on registers.

use mica_simd::Isa;
use smallvec::{SmallVec, smallvec};

use super::{Instruction, Value, refuse};
use crate::dtype::Dtype;
use crate::element::round_bf16;
use crate::elementwise::lanes::{map1, map2};
use crate::elementwise::tile::TileOp;
use crate::elementwise::{BinaryOp, CompareOp, UnaryOp, binary_op, unary_op};
use crate::error::KernelError;
use crate::reduce::ReduceOp;

/// Where a value's tile is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Place {
    /// A register: f32 tile number so many.
    Register(usize),
    /// The tile of an input, wherever loading it left it.
    Input(usize),
}

pub(super) struct Step {
    pub op: Box<dyn TileOp>,
    pub operands: SmallVec<[Place; 3]>,
    pub target: usize,
}

pub(super) struct Code {
    pub inputs: Vec<Dtype>,
    /// Values that are the same everywhere: register and number.
    pub constants: Vec<(usize, f32)>,
    pub steps: Vec<Step>,
    pub outputs: Vec<(Place, Dtype)>,
    /// The output that the last step makes, if it is one output alone.
    pub last_output: Option<usize>,
    pub registers: usize,
    /// Inputs that are outputs as they are: their tile must be a copy, since a store may change
    /// the memory it came from.
    pub copied: Vec<bool>,
}

impl Code {
    pub fn new(
        isa: Isa,
        inputs: &[Dtype],
        instructions: &[Instruction],
        dtypes: &[Dtype],
        outputs: &[Value],
    ) -> Result<Code, KernelError> {
        // The last step that reads a value; outputs live to the end.
        let mut last = vec![0; instructions.len()];
        for (at, instruction) in instructions.iter().enumerate() {
            operands(instruction).for_each(|value| last[value] = at);
        }
        let mut is_operand = vec![false; instructions.len()];
        instructions.iter().flat_map(operands).for_each(|value| is_operand[value] = true);
        for &value in outputs {
            last[value] = usize::MAX;
        }
        let mut code = Code {
            inputs: inputs.to_vec(),
            constants: Vec::new(),
            steps: Vec::new(),
            outputs: Vec::new(),
            last_output: None,
            registers: 0,
            copied: vec![false; inputs.len()],
        };
        let mut places: Vec<Place> = Vec::new();
        let mut free: Vec<usize> = Vec::new();
        for (at, instruction) in instructions.iter().enumerate() {
            let place = match instruction {
                Instruction::Input(input) => Place::Input(*input),
                Instruction::Constant(number, dtype) => {
                    // Constants are filled once a chunk, so their registers are never reused.
                    code.constants.push((code.registers, rounded(*number, *dtype)));
                    code.registers += 1;
                    Place::Register(code.registers - 1)
                }
                _ => {
                    let values: Vec<Value> = operands(instruction).collect();
                    let sources: SmallVec<[Place; 3]> = values.iter().map(|&value| places[value]).collect();
                    // An operand that dies here leaves its register to the result.
                    for (i, &value) in values.iter().enumerate() {
                        let constant = matches!(instructions[value], Instruction::Constant(..));
                        let again = values[..i].contains(&value);
                        if let Place::Register(register) = places[value]
                            && last[value] == at
                            && !constant
                            && !again
                        {
                            free.push(register);
                        }
                    }
                    let target = free.pop().unwrap_or_else(|| {
                        code.registers += 1;
                        code.registers - 1
                    });
                    let dtype = dtypes[at];
                    let from = values.first().map_or(dtype, |&value| dtypes[value]);
                    let op = operation(isa, instruction, from, dtype)?;
                    code.steps.push(Step { op, operands: sources, target });
                    // What is only stored is rounded there, and in the same way.
                    let is_rounded_later = dtype == Dtype::BF16 && !is_operand[at];
                    if is_half(dtype) && !is_exact(instruction) && !is_rounded_later {
                        let operands = smallvec![Place::Register(target)];
                        code.steps.push(Step { op: round_to(isa, dtype), operands, target });
                    }
                    if last[at] == 0 {
                        free.push(target); // nobody reads it
                    }
                    Place::Register(target)
                }
            };
            places.push(place);
        }
        for &value in outputs {
            if let Place::Input(input) = places[value] {
                code.copied[input] = true;
            }
            code.outputs.push((places[value], dtypes[value]));
        }
        code.last_output = last_output(&code);
        Ok(code)
    }
}

/// The output that the last step makes, if no other output is the same value: that one would
/// be stored from the register.
fn last_output(code: &Code) -> Option<usize> {
    let made = Place::Register(code.steps.last()?.target);
    let mut places = code.outputs.iter().map(|&(place, _)| place);
    let index = places.position(|place| place == made)?;
    places.all(|place| place != made).then_some(index)
}

pub(super) fn is_half(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16)
}

/// Whether the result of a half type needs no rounding: values are only chosen or signs changed.
pub(super) fn is_exact(instruction: &Instruction) -> bool {
    use BinaryOp::{Maximum, Minimum};
    use UnaryOp::{Abs, Neg, Sign};
    matches!(
        instruction,
        Instruction::Select(..)
            | Instruction::Unary(Abs | Neg | Sign, _)
            | Instruction::Binary(Maximum | Minimum, ..)
            | Instruction::Cast(..)
    )
}

pub(super) fn operands(instruction: &Instruction) -> impl Iterator<Item = Value> + use<> {
    let (count, values) = match *instruction {
        Instruction::Input(_) | Instruction::RowInput(_) | Instruction::Constant(..) => (0, [0; 3]),
        Instruction::Unary(_, a)
        | Instruction::Cast(_, a)
        | Instruction::Spread(a)
        | Instruction::Reduce(_, a)
        | Instruction::Softmax(a)
        | Instruction::LogSumExp(a) => (1, [a, 0, 0]),
        Instruction::Binary(_, a, b) | Instruction::Compare(_, a, b) => (2, [a, b, 0]),
        Instruction::Select(c, a, b) => (3, [c, a, b]),
    };
    values.into_iter().take(count)
}

/// The type of every value.
pub(super) fn types(inputs: &[Dtype], instructions: &[Instruction]) -> Result<Vec<Dtype>, KernelError> {
    let fused = |dtype: Dtype| match dtype {
        Dtype::Bool | Dtype::F16 | Dtype::BF16 | Dtype::F32 => Ok(dtype),
        other => Err(refuse(format!("{other} has no fused form"))),
    };
    let mut dtypes: Vec<Dtype> = Vec::new();
    for (at, instruction) in instructions.iter().enumerate() {
        if let Some(value) = operands(instruction).find(|&value| value >= at) {
            return Err(refuse(format!("value {value} is used by instruction {at}, before it is made")));
        }
        let same = |a: Value, b: Value| match dtypes[a] == dtypes[b] {
            true => Ok(dtypes[a]),
            false => Err(refuse(format!(
                "instruction {at}, {instruction:?}, joins {} and {}",
                dtypes[a], dtypes[b]
            ))),
        };
        let dtype = match *instruction {
            Instruction::Input(input) | Instruction::RowInput(input) => *inputs
                .get(input)
                .ok_or_else(|| refuse(format!("instruction {at} takes input {input} of {}", inputs.len())))?,
            Instruction::Constant(_, dtype) | Instruction::Cast(dtype, _) => dtype,
            Instruction::Unary(UnaryOp::LogicalNot, _) => Dtype::Bool,
            Instruction::Unary(_, a) => dtypes[a],
            Instruction::Binary(op, a, b) => {
                let dtype = same(a, b)?;
                if op.is_logical() { Dtype::Bool } else { dtype }
            }
            Instruction::Compare(_, a, b) => {
                same(a, b)?;
                Dtype::Bool
            }
            Instruction::Select(_, a, b) => same(a, b)?,
            Instruction::Spread(a) => dtypes[a],
            Instruction::Reduce(ReduceOp::All | ReduceOp::Any, a) if dtypes[a] != Dtype::Bool => {
                return Err(refuse(format!("instruction {at} asks for the truth of {}", dtypes[a])));
            }
            Instruction::Reduce(op, a) => op.output_dtype(dtypes[a]),
            Instruction::Softmax(a) | Instruction::LogSumExp(a) if dtypes[a] == Dtype::Bool => {
                return Err(refuse(format!("instruction {at}, {instruction:?}, takes floats, got bool")));
            }
            Instruction::Softmax(a) | Instruction::LogSumExp(a) => dtypes[a],
        };
        dtypes.push(fused(dtype)?);
    }
    Ok(dtypes)
}

pub(super) fn rounded(number: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::Bool => (number != 0.0) as u8 as f32,
        Dtype::BF16 => round_bf16(number).to_f32(),
        Dtype::F16 => half::f16::from_f32(number).to_f32(),
        _ => number,
    }
}

/// f32 values to the nearest of a half type.
pub(super) fn round_to(isa: Isa, dtype: Dtype) -> Box<dyn TileOp> {
    match dtype {
        Dtype::BF16 => map1(isa, |x: f32| f32::from_bits((round_bf16(x).to_bits() as u32) << 16)),
        _ => Box::new(RoundF16(isa)),
    }
}

struct RoundF16(Isa);

impl TileOp for RoundF16 {
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize) {
        let mut narrow = [half::f16::ZERO; 64];
        for at in (0..count).step_by(64) {
            let length = 64.min(count - at);
            let narrow = &mut narrow[..length];
            // SAFETY: `length` values from `at` are inside both arrays (TileOp's promise); the
            // two slices do not live at the same time.
            unsafe {
                let from = std::slice::from_raw_parts(inputs[0].cast::<f32>().add(at), length);
                mica_simd::f32_to_f16(self.0, from, narrow);
                let to = std::slice::from_raw_parts_mut(output.cast::<f32>().add(at), length);
                mica_simd::f16_to_f32(self.0, narrow, to);
            }
        }
    }
}

/// The loop of an instruction whose first operand has type `from` and whose result `dtype`.
/// Truth values are 0 and 1 in f32.
pub(super) fn operation(
    isa: Isa,
    instruction: &Instruction,
    from: Dtype,
    dtype: Dtype,
) -> Result<Box<dyn TileOp>, KernelError> {
    let no_form = || refuse(format!("{instruction:?} of {from} has no fused form"));
    match *instruction {
        Instruction::Input(_)
        | Instruction::RowInput(_)
        | Instruction::Constant(..)
        | Instruction::Spread(_)
        | Instruction::Reduce(..)
        | Instruction::Softmax(_)
        | Instruction::LogSumExp(_) => unreachable!("they are no steps"),
        Instruction::Select(..) => Ok(Box::new(Select)),
        Instruction::Cast(..) => Ok(match dtype {
            Dtype::Bool => map1(isa, |x: f32| if x != 0.0 { 1.0f32 } else { 0.0 }),
            Dtype::BF16 | Dtype::F16 if from != dtype => round_to(isa, dtype),
            _ => map1(isa, |x: f32| x),
        }),
        Instruction::Compare(op, ..) => Ok(compare(isa, op)),
        Instruction::Unary(UnaryOp::LogicalNot, _) => {
            Ok(map1(isa, |x: f32| if x != 0.0 { 0.0f32 } else { 1.0 }))
        }
        Instruction::Binary(op, ..) if op.is_logical() => Ok(logical(isa, op == BinaryOp::LogicalOr)),
        Instruction::Binary(op, ..) if from == Dtype::Bool => match op {
            BinaryOp::BitwiseAnd | BinaryOp::Multiply | BinaryOp::Minimum => Ok(logical(isa, false)),
            BinaryOp::BitwiseOr | BinaryOp::Add | BinaryOp::Maximum => Ok(logical(isa, true)),
            BinaryOp::BitwiseXor | BinaryOp::Subtract => Ok(compare(isa, CompareOp::Ne)),
            _ => Err(no_form()),
        },
        Instruction::Unary(op, _) if from == Dtype::Bool => match op {
            UnaryOp::BitwiseInvert => Ok(map1(isa, |x: f32| 1.0 - x)),
            _ => Err(no_form()),
        },
        Instruction::Unary(op, _) => unary_op(isa, op, Dtype::F32).ok_or_else(no_form),
        Instruction::Binary(op, ..) => binary_op(isa, op, Dtype::F32).ok_or_else(no_form),
    }
}

fn compare(isa: Isa, op: CompareOp) -> Box<dyn TileOp> {
    macro_rules! truth {
        ($compare:expr) => {
            map2(isa, |a: f32, b: f32| {
                let holds: fn(&f32, &f32) -> bool = $compare;
                if holds(&a, &b) { 1.0f32 } else { 0.0 }
            })
        };
    }
    match op {
        CompareOp::Eq => truth!(f32::eq),
        CompareOp::Ne => truth!(f32::ne),
        CompareOp::Lt => truth!(f32::lt),
        CompareOp::Le => truth!(f32::le),
        CompareOp::Gt => truth!(f32::gt),
        CompareOp::Ge => truth!(f32::ge),
    }
}

fn logical(isa: Isa, or: bool) -> Box<dyn TileOp> {
    if or {
        map2(isa, |a: f32, b: f32| if (a != 0.0) | (b != 0.0) { 1.0f32 } else { 0.0 })
    } else {
        map2(isa, |a: f32, b: f32| if (a != 0.0) & (b != 0.0) { 1.0f32 } else { 0.0 })
    }
}

struct Select;

impl TileOp for Select {
    unsafe fn run(&self, inputs: &[*const u8], output: *mut u8, count: usize) {
        const BLOCK: usize = 16;
        let (condition, a, b) = (inputs[0].cast::<f32>(), inputs[1].cast::<f32>(), inputs[2].cast::<f32>());
        let out = output.cast::<f32>();
        let mut i = 0;
        // SAFETY: promised by the caller; each element is read before it is written.
        unsafe {
            // A block is read whole before it is written, so that it becomes vectors.
            while i + BLOCK <= count {
                let [c, x, y] = [condition, a, b].map(|from| from.add(i).cast::<[f32; BLOCK]>().read());
                let chosen: [f32; BLOCK] =
                    std::array::from_fn(|lane| if c[lane] != 0.0 { x[lane] } else { y[lane] });
                out.add(i).cast::<[f32; BLOCK]>().write(chosen);
                i += BLOCK;
            }
            while i < count {
                let (x, y) = (*a.add(i), *b.add(i));
                *out.add(i) = if *condition.add(i) != 0.0 { x } else { y };
                i += 1;
            }
        }
    }
}
