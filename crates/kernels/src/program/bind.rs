//! Running a program over memory.

use std::sync::Arc;

use mica_threads::{Scratch, Task};
use smallvec::SmallVec;

use super::compile::{Code, Place, Step};
use super::refuse;
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::{CHUNK, Sink, Source, TILE, broadcast, check_output};
use crate::error::KernelError;

/// Memory that a worker's registers may take: half of a 48 KB L1 cache and some.
const L1_BYTES: usize = 32 * 1024;

/// See [`super::Program::bind`]; there are as many inputs and outputs as the program has.
pub(super) fn bind(
    code: &Arc<Code>,
    inputs: &[DynView],
    outputs: &[DynViewMut],
) -> Result<Box<dyn Task>, KernelError> {
    let Some(first) = outputs.first() else {
        return Err(refuse("has no outputs".to_string()));
    };
    let shape = first.shape.clone();
    let mut sources = Vec::new();
    for (at, (view, &dtype)) in inputs.iter().zip(&code.inputs).enumerate() {
        if view.dtype != dtype {
            return Err(refuse(format!("input {at} is {dtype}, got {}", view.dtype)));
        }
        sources.push(Source::new(&broadcast("program", view, &shape)?, Dtype::F32));
    }
    let mut sinks = Vec::new();
    for (at, (view, &(_, dtype))) in outputs.iter().zip(&code.outputs).enumerate() {
        if view.dtype != dtype || view.shape != shape {
            return Err(refuse(format!(
                "output {at} is {dtype} of {shape:?}, got {} of {:?}",
                view.dtype, view.shape
            )));
        }
        check_output("program", view)?;
        sinks.push(Sink::new(view, Dtype::F32));
    }
    let tiles = code.registers + inputs.len() + 1;
    let tile = (L1_BYTES / 4 / tiles).clamp(128, TILE) / 64 * 64;
    Ok(Box::new(Bound { code: code.clone(), sources, sinks, size: shape.iter().product(), tile }))
}

struct Bound {
    code: Arc<Code>,
    sources: Vec<Source>,
    sinks: Vec<Sink>,
    size: usize,
    /// Elements of a tile: all registers and loaded inputs fit in L1. No result depends on it.
    tile: usize,
}

impl Task for Bound {
    fn chunks(&self) -> usize {
        self.size.div_ceil(CHUNK)
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let code = &*self.code;
        let take = || scratch.take::<f32>(self.tile).as_mut_ptr().cast::<u8>();
        let registers: SmallVec<[*mut u8; 16]> = (0..code.registers).map(|_| take()).collect();
        let buffers: SmallVec<[*mut u8; 8]> = self.sources.iter().map(|_| take()).collect();
        let raw = take();
        for &(register, number) in &code.constants {
            // SAFETY: a register holds a tile of f32.
            unsafe { std::slice::from_raw_parts_mut(registers[register].cast(), self.tile) }.fill(number);
        }
        let end = self.size.min((chunk + 1) * CHUNK);
        let mut loaded: SmallVec<[*const u8; 8]> = SmallVec::from_elem(std::ptr::null(), self.sources.len());
        let mut first = true;
        for start in (chunk * CHUNK..end).step_by(self.tile) {
            let count = self.tile.min(end - start);
            for (i, source) in self.sources.iter().enumerate() {
                // A constant input is loaded once; the first tile is the longest.
                if !first && source.linear.is_constant() {
                    continue;
                }
                // SAFETY: inside the shape; the buffers hold a tile.
                unsafe {
                    loaded[i] = source.load(0, start, count, buffers[i], raw);
                    if (code.copied[i] || source.linear.is_constant()) && loaded[i] != buffers[i].cast_const()
                    {
                        std::ptr::copy_nonoverlapping(loaded[i], buffers[i], count * 4);
                        loaded[i] = buffers[i];
                    }
                }
            }
            first = false;
            let place = |place: Place| match place {
                Place::Register(register) => registers[register].cast_const(),
                Place::Input(input) => loaded[input],
            };
            // The last step may write to memory at once: everything has been read by then, but
            // for its own operands, which may be the same memory.
            let direct = code.last_output.and_then(|output| self.sinks[output].direct(start, count));
            let (others, last) = code.steps.split_at(code.steps.len() - direct.is_some() as usize);
            let run = |step: &Step, target: *mut u8| {
                let mut operands = [std::ptr::null(); 3];
                for (operand, &from) in operands.iter_mut().zip(&step.operands) {
                    *operand = place(from);
                }
                // SAFETY: tiles of f32; the target is apart from or the same as each operand.
                unsafe { step.op.run(&operands[..step.operands.len()], target, count) }
            };
            others.iter().for_each(|step| run(step, registers[step.target]));
            if let (Some(target), [step]) = (direct, last) {
                run(step, target);
            }
            for (index, (sink, &(value, _))) in self.sinks.iter().zip(&code.outputs).enumerate() {
                if direct.is_some() && code.last_output == Some(index) {
                    continue;
                }
                // SAFETY: inside the shape, this chunk's own elements. A sink may be the memory
                // of a source, whose tile has been used up or copied by now.
                unsafe { sink.store(place(value), start, count, raw) }
            }
        }
    }

    fn name(&self) -> &'static str {
        "program"
    }
}
