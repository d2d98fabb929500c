//! A region: elementwise ops, and reductions of rows among them, that run as one.
//!
//! It is data, a list of steps over the values before them, so that each backend reads it in its
//! own way: the CPU as a register program over tiles ([`mica_kernels::program`]), the reference op
//! by op. Its gradient is derived from its steps and compiled like any function.

use std::collections::HashMap;
use std::fmt;

use mica_kernels::program::{Instruction, Program};
use smallvec::{SmallVec, smallvec};

use super::constant;
use super::plan::Plans;
use crate::node::Inputs;
use crate::op::{BinaryOp, Op, ReduceOp, UnaryOp};
use crate::ops::{Grads, Jvp, Tangents, Vjp};
use crate::shape::{Shape, broadcast_shapes};
use crate::storage::Spec;
use crate::transforms::TracedGraph;
use crate::transforms::{backward, forward_from};
use crate::{Array, Dtype, Result};

/// Gradients, and tangents, that a region keeps: per shapes and per what is asked for.
const BACKWARD_BOUND: usize = 16;

/// Ops that run as one. Values are numbered: the inputs first, then the steps.
///
/// Inputs broadcast to one shape, which elementwise steps and the outputs have. If rows are reduced
/// there are also values with one number a row: they have that shape with size 1 in the last place.
pub struct Region {
    inputs: SmallVec<[RegionInput; 4]>,
    steps: Vec<RegionStep>,
    outputs: SmallVec<[usize; 2]>,
    program: Program,
    backward: Plans<Asked>,
    forward: Plans<SmallVec<[bool; 4]>>,
}

/// What a region reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RegionInput {
    pub(crate) dtype: Dtype,
    /// Its last size is 1, or it is a scalar.
    pub(crate) narrow: bool,
}

impl RegionInput {
    pub(super) fn of(spec: &Spec) -> RegionInput {
        RegionInput { dtype: spec.dtype, narrow: is_narrow(&spec.shape) }
    }
}

/// One op of a region.
#[derive(Clone, Debug)]
pub(crate) struct RegionStep {
    /// [`Op::Full`], [`Op::StopGradient`], elementwise, or what joins rows ([`joins_rows`]).
    pub(crate) op: Op,
    /// Numbers of earlier values.
    pub(crate) operands: SmallVec<[usize; 3]>,
    pub(crate) dtype: Dtype,
    /// One number a row, which only regions that join rows have.
    pub(crate) narrow: bool,
}

impl RegionStep {
    /// The op on arrays of so many dimensions, which are more than when it was recorded if a batch was
    /// put before them.
    pub(crate) fn op_for(&self, rank: usize) -> Op {
        match &self.op {
            Op::Reduce { op, .. } => Op::Reduce { op: *op, axes: smallvec![rank - 1] },
            op => op.clone(),
        }
    }
}

/// Whether an op needs all of a row at once: its one operand's last axis.
pub(super) fn joins_rows(op: &Op) -> bool {
    matches!(op, Op::Reduce { .. } | Op::Softmax | Op::LogSumExp)
}

/// Which inputs need a gradient, and from which outputs one arrives.
type Asked = (SmallVec<[bool; 4]>, SmallVec<[bool; 4]>);

impl Region {
    /// A region, if the kernels have a fused form of each step.
    pub(crate) fn new(
        inputs: SmallVec<[RegionInput; 4]>,
        steps: Vec<RegionStep>,
        outputs: SmallVec<[usize; 2]>,
    ) -> Result<Region> {
        let program = program(&inputs, &steps, &outputs)?;
        Ok(Region {
            inputs,
            steps,
            outputs,
            program,
            backward: Plans::new(BACKWARD_BOUND),
            forward: Plans::new(BACKWARD_BOUND),
        })
    }

    /// Whether no step compares, orders or rounds: then the gradient, which forms everything between again, may do so
    /// from rounded inputs.
    pub(crate) fn is_smooth(&self) -> bool {
        self.steps.iter().all(|step| match &step.op {
            Op::Full(_) | Op::StopGradient | Op::Select | Op::Softmax | Op::LogSumExp => true,
            Op::Cast => step.dtype.is_float(),
            Op::Unary(op) => {
                use UnaryOp::*;
                !matches!(op, Sign | Floor | Ceil | Round | LogicalNot | BitwiseInvert)
            }
            Op::Binary(op) => {
                use BinaryOp::*;
                matches!(op, Add | Subtract | Multiply | Divide | Power | Atan2 | LogAddExp)
            }
            Op::Reduce { op, .. } => *op == ReduceOp::Sum,
            _ => false,
        })
    }

    /// Whether an output may take the memory of an input of the same type and size: where each of its
    /// elements is read before it is written.
    pub(crate) fn may_alias(&self, input: usize, output: usize) -> bool {
        !self.steps.iter().any(|step| joins_rows(&step.op))
            || self.inputs[input].narrow == self.is_narrow(self.outputs[output])
    }

    /// Whether a value has one number a row.
    fn is_narrow(&self, value: usize) -> bool {
        match value.checked_sub(self.inputs.len()) {
            Some(step) => self.steps[step].narrow,
            None => self.inputs[value].narrow,
        }
    }

    /// The shape of what is not narrow, from those of the inputs and of any outputs.
    pub(crate) fn shape<'a>(&self, shapes: impl IntoIterator<Item = &'a [usize]>) -> Result<Shape> {
        shapes.into_iter().try_fold(Shape::new(), |whole, shape| broadcast_shapes("fused", &whole, shape))
    }

    pub(crate) fn steps(&self) -> &[RegionStep] {
        &self.steps
    }

    pub(crate) fn outputs(&self) -> &[usize] {
        &self.outputs
    }

    /// The program that computes these outputs, by one flag each.
    pub(crate) fn program(&self, wanted: &[bool]) -> Result<Program> {
        if wanted.iter().all(|&wanted| wanted) {
            return Ok(self.program.clone());
        }
        let outputs: SmallVec<[usize; 2]> =
            self.outputs.iter().zip(wanted).filter(|(_, wanted)| **wanted).map(|(&value, _)| value).collect();
        program(&self.inputs, &self.steps, &outputs)
    }

    /// The shape of a step's result and that of its operands, in a region of this shape.
    pub(crate) fn shapes_of(&self, step: &RegionStep, whole: &[usize]) -> (Shape, Shape) {
        let shape = |narrow: bool| if narrow { narrowed(whole) } else { Shape::from_slice(whole) };
        match &step.op {
            Op::Full(_) => (Shape::new(), Shape::new()),
            op if joins_rows(op) => (shape(step.narrow), shape(false)),
            _ => (shape(step.narrow), shape(step.narrow)),
        }
    }

    /// The outputs, op by op.
    fn expand(&self, inputs: &[Array], shape: &[usize]) -> Result<Vec<Array>> {
        let mut values: Vec<Array> = inputs.to_vec();
        for step in &self.steps {
            let (own, read) = self.shapes_of(step, shape);
            let operands: Inputs = step
                .operands
                .iter()
                .map(|&operand| values[operand].broadcast_to(&read))
                .collect::<Result<_>>()?;
            values.push(Array::lazy(step.op_for(shape.len()), operands, own, step.dtype));
        }
        Ok(self.outputs.iter().map(|&value| values[value].clone()).collect())
    }

    /// The gradients, as a compiled function of the inputs and the gradients that arrive: what lies
    /// between is computed again, which costs less than keeping it.
    pub(crate) fn vjp(&self, rule: &Vjp) -> Result<Grads> {
        let needs: SmallVec<[bool; 4]> = rule
            .needs
            .iter()
            .zip(&self.inputs)
            .map(|(&needed, input)| needed && input.dtype.is_inexact())
            .collect();
        let arrives = rule.cotangents.iter().map(Option::is_some).collect();
        // What was widened is widened in the same pass.
        let inputs = rule.inputs.iter().map(Array::unwidened);
        let operands: Vec<Array> = inputs.chain(rule.cotangents.iter().flatten().cloned()).collect();
        let gradients = |tracers: &[Array]| {
            let (inputs, cotangents) = tracers.split_at(self.inputs.len());
            let shape = self.shape(tracers.iter().map(Array::shape))?;
            let inputs: Vec<Array> = (inputs.iter().zip(&self.inputs))
                .map(|(tracer, input)| tracer.astype(input.dtype))
                .collect::<Result<_>>()?;
            let outputs = self.expand(&inputs, &shape)?.into_iter().zip(rule.cotangents);
            let reached = outputs.filter(|(_, cotangent)| cotangent.is_some()).map(|(output, _)| output);
            let seeds = reached.zip(cotangents.iter().cloned()).collect();
            let wanted = inputs.iter().zip(&needs).filter(|(_, needed)| **needed);
            let targets: Vec<Array> = wanted.map(|(input, _)| input.clone()).collect();
            backward(seeds, &targets)
        };
        let trace = |operands: &[Array]| TracedGraph::trace_with_sizes(gradients, operands);
        let grads = self.backward.build(&operands, (needs.clone(), arrives), true, &trace)?;
        let mut grads = grads.expect("the graph of a region can be recorded").into_iter();
        Ok(needs.iter().map(|&needed| if needed { grads.next() } else { None }).collect())
    }
}

impl Region {
    /// The tangents of the outputs, as a compiled function of the inputs and their tangents.
    pub(crate) fn jvp(&self, rule: &Jvp) -> Result<Tangents> {
        let moves: SmallVec<[bool; 4]> = rule.tangents.iter().map(Option::is_some).collect();
        // Inputs may all be smaller than the outputs, whose shape is an operand therefore.
        let like = rule.output.zeros_like();
        let operands: Vec<Array> =
            rule.inputs.iter().chain(rule.tangents.iter().flatten()).cloned().chain([like]).collect();
        let tangents = |tracers: &[Array]| {
            let (like, tracers) = tracers.split_last().expect("one is like the outputs");
            let (inputs, tangents) = tracers.split_at(self.inputs.len());
            let moving =
                inputs.iter().zip(&moves).filter(|(_, moves)| **moves).map(|(input, _)| input.clone());
            let shape = self.shape(inputs.iter().chain([like]).map(Array::shape))?;
            let outputs = self.expand(inputs, &shape)?;
            let found = forward_from(moving.zip(tangents.iter().cloned()).collect(), &outputs)?;
            let zeros =
                |(output, tangent): (&Array, Option<Array>)| tangent.unwrap_or_else(|| output.zeros_like());
            Ok(outputs.iter().zip(found).map(zeros).collect())
        };
        let trace = |operands: &[Array]| TracedGraph::trace_with_sizes(tangents, operands);
        let found = self.forward.build(&operands, moves.clone(), true, &trace)?;
        let found = found.expect("the tangents of a region can be recorded").into_iter();
        Ok(found.map(|tangent| tangent.dtype().is_inexact().then_some(tangent)).collect())
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Region({} inputs, {} ops, {} outputs)",
            self.inputs.len(),
            self.steps.len(),
            self.outputs.len()
        )
    }
}

/// Whether arrays of this shape have one number a row, whatever they broadcast to.
pub(super) fn is_narrow(shape: &[usize]) -> bool {
    shape.last().is_none_or(|&last| last == 1)
}

/// A shape with one number a row.
pub(super) fn narrowed(shape: &[usize]) -> Shape {
    let mut narrow = Shape::from_slice(shape);
    if let Some(last) = narrow.last_mut() {
        *last = 1;
    }
    narrow
}

/// Whether a step over operands of these types has a fused form.
pub(super) fn has_fused_form(op: &Op, operands: &[Dtype], dtype: Dtype) -> bool {
    let narrow = matches!(op, Op::Reduce { .. } | Op::LogSumExp);
    let step = RegionStep { op: op.clone(), operands: (0..operands.len()).collect(), dtype, narrow };
    let inputs: SmallVec<[RegionInput; 4]> =
        operands.iter().map(|&dtype| RegionInput { dtype, narrow: false }).collect();
    program(&inputs, &[step], &[operands.len()]).is_ok()
}

/// Instructions, and where each value of the region is among them.
struct Coder<'a> {
    inputs: &'a [RegionInput],
    steps: &'a [RegionStep],
    joins: bool,
    code: Vec<Instruction>,
    places: Vec<usize>,
    /// Per instruction, whether it has one number a row; numbers that stand in the program are as wide as
    /// what they meet.
    narrow: Vec<Option<bool>>,
    /// The instruction that spreads another one's numbers.
    spread: HashMap<usize, usize>,
}

impl Coder<'_> {
    fn push(&mut self, instruction: Instruction, narrow: Option<bool>) -> usize {
        self.code.push(instruction);
        self.narrow.push(narrow);
        self.code.len() - 1
    }

    fn step(&mut self, step: &RegionStep) -> Result<()> {
        let operands: SmallVec<[usize; 3]> =
            step.operands.iter().map(|&operand| self.places[operand]).collect();
        let is_wide = self.joins && !step.narrow;
        let any_wide = operands.iter().any(|&at| self.narrow[at] == Some(false));
        let operands: SmallVec<[usize; 3]> = operands
            .into_iter()
            .enumerate()
            .map(|(index, at)| match self.narrow[at] {
                Some(true) if is_wide => self.spread(at),
                // Nothing else says how wide it is.
                None if is_wide && !any_wide && index == 0 && !matches!(step.op, Op::Full(_)) => {
                    self.spread(at)
                }
                _ => at,
            })
            .collect();
        let at = |index: usize| operands[index];
        let instruction = match &step.op {
            Op::StopGradient => {
                self.places.push(at(0));
                return Ok(());
            }
            Op::Full(value) => {
                // Rounded to the type first, since a program's constants are f32.
                let rounded = constant::evaluate(&Op::Full(*value), &[], step.dtype);
                let value = rounded.ok_or_else(|| no_form(step))?.to_f64();
                let place = self.push(Instruction::Constant(value as f32, step.dtype), None);
                self.places.push(place);
                return Ok(());
            }
            Op::Unary(op) => Instruction::Unary(*op, at(0)),
            Op::Binary(op) => Instruction::Binary(*op, at(0), at(1)),
            Op::Compare(op) => Instruction::Compare(*op, at(0), at(1)),
            Op::Select => Instruction::Select(at(0), at(1), at(2)),
            Op::Cast => Instruction::Cast(step.dtype, at(0)),
            Op::Reduce { op, .. } => Instruction::Reduce(*op, at(0)),
            Op::Softmax => Instruction::Softmax(at(0)),
            Op::LogSumExp => Instruction::LogSumExp(at(0)),
            _ => return Err(no_form(step)),
        };
        let place = self.push(instruction, Some(step.narrow));
        self.places.push(place);
        Ok(())
    }

    fn spread(&mut self, at: usize) -> usize {
        if let Some(&spread) = self.spread.get(&at) {
            return spread;
        }
        let spread = self.push(Instruction::Spread(at), Some(false));
        self.spread.insert(at, spread);
        spread
    }
}

fn program(inputs: &[RegionInput], steps: &[RegionStep], outputs: &[usize]) -> Result<Program> {
    let joins = steps.iter().any(|step| joins_rows(&step.op));
    let mut coder = Coder {
        inputs,
        steps,
        joins,
        code: Vec::new(),
        places: Vec::new(),
        narrow: Vec::new(),
        spread: HashMap::new(),
    };
    for (index, input) in coder.inputs.iter().enumerate() {
        let narrow = joins && input.narrow;
        let instruction = if narrow { Instruction::RowInput(index) } else { Instruction::Input(index) };
        let place = coder.push(instruction, Some(narrow));
        coder.places.push(place);
    }
    for step in coder.steps {
        coder.step(step)?;
    }
    let outputs: Vec<usize> = outputs.iter().map(|&value| coder.places[value]).collect();
    let dtypes: SmallVec<[Dtype; 4]> = inputs.iter().map(|input| input.dtype).collect();
    Ok(Program::new(&dtypes, &coder.code, &outputs)?)
}

fn no_form(step: &RegionStep) -> crate::Error {
    crate::Error::unsupported("compile", format!("{} has no fused form", step.op.name()))
}
