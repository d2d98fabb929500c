//! A region: elementwise ops over one shape that run as one.
//!
//! It is data, a list of steps over the values before them, so that each backend reads it in its
//! own way: the CPU as a register program over tiles ([`mica_kernels::program`]), the reference op
//! by op. Its gradient is derived from its steps and compiled like any function.

use std::fmt;

use mica_kernels::program::{Instruction, Program};
use smallvec::SmallVec;

use super::constant;
use super::plan::Plans;
use crate::node::Inputs;
use crate::op::Op;
use crate::ops::{Grads, Jvp, Tangents, Vjp};
use crate::transforms::TracedGraph;
use crate::transforms::{backward, forward_from};
use crate::{Array, Dtype, Result};

/// Gradients, and tangents, that a region keeps: per shapes and per what is asked for.
const BACKWARD_BOUND: usize = 16;

/// Elementwise ops that run as one. Values are numbered: the inputs first, then the steps. Inputs
/// broadcast to the shape of the outputs, which all have one.
pub struct Region {
    inputs: SmallVec<[Dtype; 4]>,
    steps: Vec<RegionStep>,
    outputs: SmallVec<[usize; 2]>,
    program: Program,
    backward: Plans<Asked>,
    forward: Plans<SmallVec<[bool; 4]>>,
}

/// One op of a region.
#[derive(Clone, Debug)]
pub(crate) struct RegionStep {
    /// [`Op::Full`], [`Op::StopGradient`], or elementwise.
    pub(crate) op: Op,
    /// Numbers of earlier values.
    pub(crate) operands: SmallVec<[usize; 3]>,
    pub(crate) dtype: Dtype,
}

/// Which inputs need a gradient, and from which outputs one arrives.
type Asked = (SmallVec<[bool; 4]>, SmallVec<[bool; 4]>);

impl Region {
    /// A region, if the kernels have a fused form of each step.
    pub(crate) fn new(
        inputs: SmallVec<[Dtype; 4]>,
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

    pub(crate) fn inputs(&self) -> &[Dtype] {
        &self.inputs
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

    /// The outputs, op by op.
    fn expand(&self, inputs: &[Array], shape: &[usize]) -> Result<Vec<Array>> {
        let mut values: Vec<Array> =
            inputs.iter().map(|input| input.broadcast_to(shape)).collect::<Result<_>>()?;
        for step in &self.steps {
            let operands: Inputs = step.operands.iter().map(|&operand| values[operand].clone()).collect();
            values.push(Array::lazy(step.op.clone(), operands, shape, step.dtype));
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
            .map(|(&needed, dtype)| needed && dtype.is_inexact())
            .collect();
        let arrives = rule.cotangents.iter().map(Option::is_some).collect();
        let operands: Vec<Array> =
            rule.inputs.iter().chain(rule.cotangents.iter().flatten()).cloned().collect();
        let gradients = |tracers: &[Array]| {
            let (inputs, cotangents) = tracers.split_at(self.inputs.len());
            let outputs = self.expand(inputs, cotangents[0].shape())?.into_iter().zip(rule.cotangents);
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
            let outputs = self.expand(inputs, like.shape())?;
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

/// Whether a step over operands of these types has a fused form.
pub(super) fn has_fused_form(op: &Op, operands: &[Dtype], dtype: Dtype) -> bool {
    let step = RegionStep { op: op.clone(), operands: (0..operands.len()).collect(), dtype };
    program(operands, &[step], &[operands.len()]).is_ok()
}

fn program(inputs: &[Dtype], steps: &[RegionStep], outputs: &[usize]) -> Result<Program> {
    let mut code: Vec<Instruction> = (0..inputs.len()).map(Instruction::Input).collect();
    // Where each value is in the program: a stopped gradient is its operand.
    let mut places: Vec<usize> = (0..inputs.len()).collect();
    for step in steps {
        let at = |index: usize| places[step.operands[index]];
        let instruction = match &step.op {
            Op::StopGradient => {
                places.push(at(0));
                continue;
            }
            Op::Full(value) => {
                // Rounded to the type first, since a program's constants are f32.
                let rounded = constant::evaluate(&Op::Full(*value), &[], step.dtype);
                let value = rounded.ok_or_else(|| no_form(step))?.to_f64();
                Instruction::Constant(value as f32, step.dtype)
            }
            Op::Unary(op) => Instruction::Unary(*op, at(0)),
            Op::Binary(op) => Instruction::Binary(*op, at(0), at(1)),
            Op::Compare(op) => Instruction::Compare(*op, at(0), at(1)),
            Op::Select => Instruction::Select(at(0), at(1), at(2)),
            Op::Cast => Instruction::Cast(step.dtype, at(0)),
            _ => return Err(no_form(step)),
        };
        places.push(code.len());
        code.push(instruction);
    }
    let outputs: Vec<usize> = outputs.iter().map(|&value| places[value]).collect();
    Ok(Program::new(inputs, &code, &outputs)?)
}

fn no_form(step: &RegionStep) -> crate::Error {
    crate::Error::unsupported("compile", format!("{} has no fused form", step.op.name()))
}
