//! Running a program over rows.

use std::sync::Arc;

use mica_threads::{Scratch, Task};
use smallvec::SmallVec;

use super::compile::{Place, Step};
use super::refuse;
use super::stages::{Room, RowCode, Stage, Whole};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::elementwise::tile::{CHUNK, Sink, Source, TILE, broadcast, check_output};
use crate::error::KernelError;
use crate::reduce::{Partial, logsumexp_of, softmax_of};

/// See [`super::Program::bind`]; there are as many inputs and outputs as the program has.
pub(super) fn bind(
    code: &Arc<RowCode>,
    inputs: &[DynView],
    outputs: &[DynViewMut],
) -> Result<Box<dyn Task>, KernelError> {
    let shapes = inputs.iter().map(|view| &view.shape).chain(outputs.iter().map(|view| &view.shape));
    let shape = joint_shape(shapes)?;
    let Some((&length, outer)) = shape.split_last() else {
        return Err(refuse("rows need a dimension, got scalars alone".to_string()));
    };
    let rows: usize = outer.iter().product();
    if length == 0 && rows > 0 {
        return Err(refuse(format!("rows of no elements: {shape:?}")));
    }
    let mut numbers = shape.clone();
    *numbers.last_mut().expect("a dimension") = 1;
    let mut sources = Vec::new();
    for (at, (view, input)) in inputs.iter().zip(&code.inputs).enumerate() {
        if view.dtype != input.dtype {
            return Err(refuse(format!("input {at} is {}, got {}", input.dtype, view.dtype)));
        }
        let shape = if input.wide { &shape } else { &numbers };
        sources.push(Source::new(&broadcast("program", view, shape)?, Dtype::F32));
    }
    let mut sinks = Vec::new();
    for (at, (view, output)) in outputs.iter().zip(&code.outputs).enumerate() {
        let shape = if output.wide { &shape } else { &numbers };
        if view.dtype != output.dtype || view.shape != *shape {
            return Err(refuse(format!(
                "output {at} is {} of {shape:?}, got {} of {:?}",
                output.dtype, view.dtype, view.shape
            )));
        }
        check_output("program", view)?;
        sinks.push(Sink::new(view, Dtype::F32));
    }
    let block = (TILE / length.max(1)).clamp(1, rows.max(1));
    let blocks = (CHUNK / (block * length).max(1)).max(1);
    Ok(Box::new(Bound { code: code.clone(), sources, sinks, rows, length, block, blocks }))
}

/// What all shapes broadcast to.
fn joint_shape<'a, S>(
    shapes: impl Iterator<Item = &'a S> + Clone,
) -> Result<SmallVec<[usize; 8]>, KernelError>
where
    S: AsRef<[usize]> + 'a,
{
    let rank = shapes.clone().map(|shape| shape.as_ref().len()).max().unwrap_or(0);
    let mut joint: SmallVec<[usize; 8]> = SmallVec::from_elem(1, rank);
    for shape in shapes {
        let shape = shape.as_ref();
        for (size, &own) in joint[rank - shape.len()..].iter_mut().zip(shape) {
            match (*size, own) {
                (1, own) => *size = own,
                (_, 1) => {}
                (size, own) if size == own => {}
                _ => return Err(refuse(format!("shape {shape:?} does not broadcast with the others"))),
            }
        }
    }
    Ok(joint)
}

struct Bound {
    code: Arc<RowCode>,
    sources: Vec<Source>,
    sinks: Vec<Sink>,
    rows: usize,
    length: usize,
    /// Rows at a time: one, or as many as fit a tile.
    block: usize,
    /// Blocks of a chunk.
    blocks: usize,
}

/// The memory that a chunk works with.
struct Frame {
    registers: SmallVec<[*mut u8; 16]>,
    /// Room for each input: a tile, whole rows, or one number a row.
    buffers: SmallVec<[*mut u8; 8]>,
    /// Where each input's present tile is, or its numbers of rows.
    loaded: SmallVec<[*const u8; 8]>,
    /// Inputs whose tile is the only one of the block, and loaded.
    complete: SmallVec<[bool; 8]>,
    /// Outputs of which the block is written already.
    written: SmallVec<[bool; 4]>,
    raw: *mut u8,
}

/// Rows that are worked on together.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    rows: usize,
    /// Elements, and of them in a tile.
    elements: usize,
    tile: usize,
}

impl Bound {
    fn frame(&self, scratch: &Scratch) -> Frame {
        let code = &*self.code;
        let whole = self.block * self.length;
        let tile = whole.min(TILE);
        let take = |count: usize| scratch.take::<f32>(count).as_mut_ptr().cast::<u8>();
        let register = |room: &Room| match room {
            Room::Numbers => take(self.block),
            Room::Tile => take(tile),
            Room::Rows => take(whole),
        };
        let registers: SmallVec<[*mut u8; 16]> = code.registers.iter().map(register).collect();
        for &(register, number) in &code.constants {
            // SAFETY: a register for constants holds a tile of f32.
            unsafe { std::slice::from_raw_parts_mut(registers[register].cast(), tile) }.fill(number);
        }
        let buffers: SmallVec<[*mut u8; 8]> = code
            .inputs
            .iter()
            .map(|input| match (input.wide, input.whole) {
                (true, true) => take(whole),
                (true, false) => take(tile),
                (false, _) => take(self.block),
            })
            .collect();
        let inputs = code.inputs.len();
        Frame {
            registers,
            buffers,
            loaded: SmallVec::from_elem(std::ptr::null(), inputs),
            complete: SmallVec::from_elem(false, inputs),
            written: SmallVec::from_elem(false, code.outputs.len()),
            raw: take(tile.max(self.block)),
        }
    }

    /// Where a value is, from element `start` of the block on.
    fn place(&self, frame: &Frame, place: Place, start: usize) -> *const u8 {
        match place {
            Place::Register(register) => self.register(frame, register, start).cast_const(),
            Place::Input(input) => frame.loaded[input],
        }
    }

    fn register(&self, frame: &Frame, register: usize, start: usize) -> *mut u8 {
        let offset = if self.code.registers[register] == Room::Rows { start * 4 } else { 0 };
        frame.registers[register].wrapping_add(offset)
    }

    /// Runs a step on `count` elements, into `target`.
    ///
    /// # Safety
    /// Its operands are `count` elements of f32, and the target is theirs or apart.
    unsafe fn step(&self, frame: &Frame, step: &Step, start: usize, count: usize, target: *mut u8) {
        let mut operands = [std::ptr::null(); 3];
        for (operand, &from) in operands.iter_mut().zip(&step.operands) {
            *operand = self.place(frame, from, start);
        }
        // SAFETY: promised by the caller.
        unsafe { step.op.run(&operands[..step.operands.len()], target, count) }
    }

    /// Makes an input's elements from `start` of the block on present.
    ///
    /// # Safety
    /// They are in the block.
    unsafe fn load(&self, frame: &mut Frame, input: usize, block: Block, start: usize, count: usize) {
        if frame.complete[input] {
            return;
        }
        let source = &self.sources[input];
        let own = &self.code.inputs[input];
        let first = block.first * self.length + start;
        let buffer = frame.buffers[input].wrapping_add(if own.whole { start * 4 } else { 0 });
        let constant = source.linear.is_constant();
        // SAFETY: inside the shape; the buffers hold a tile from there on.
        unsafe {
            let loaded = source.load(0, first, count, buffer, frame.raw);
            let must_move = own.copied || own.whole || constant;
            if must_move && loaded != buffer.cast_const() {
                std::ptr::copy_nonoverlapping(loaded, buffer, count * 4);
            }
            frame.loaded[input] = if must_move { buffer } else { loaded };
        }
        frame.complete[input] = block.tile >= block.elements;
    }

    /// # Safety
    /// The block is inside the shape, and this chunk's own.
    unsafe fn block(&self, frame: &mut Frame, block: Block) {
        let code = &*self.code;
        frame.written.fill(false);
        for (input, own) in code.inputs.iter().enumerate() {
            frame.complete[input] = false;
            if !own.wide {
                let buffer = frame.buffers[input];
                // SAFETY: inside the numbers of rows; the buffer holds as many. They are copied, since an
                // output may be the memory that they came from.
                unsafe {
                    let loaded = self.sources[input].load(0, block.first, block.rows, buffer, frame.raw);
                    if loaded != buffer.cast_const() {
                        std::ptr::copy_nonoverlapping(loaded, buffer, block.rows * 4);
                    }
                }
                frame.loaded[input] = buffer;
            }
        }
        for (index, stage) in code.stages.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.stage(frame, stage, index == code.stored, block) };
        }
        for (sink, output) in self.sinks.iter().zip(&code.outputs).filter(|(_, output)| !output.wide) {
            // SAFETY: the block's own rows.
            unsafe { sink.store(self.place(frame, output.place, 0), block.first, block.rows, frame.raw) }
        }
    }

    /// # Safety
    /// As [`Bound::block`].
    unsafe fn stage(&self, frame: &mut Frame, stage: &Stage, stores: bool, block: Block) {
        let code = &*self.code;
        for step in &stage.numbers {
            // SAFETY: registers of one number a row.
            unsafe { self.step(frame, step, 0, block.rows, frame.registers[step.target]) };
        }
        let in_tile = self.length.min(block.tile);
        for &(from, to) in &stage.spreads {
            let (from, to) = (self.place(frame, from, 0).cast::<f32>(), frame.registers[to].cast::<f32>());
            for row in 0..block.rows {
                // SAFETY: a number a row; the tile holds so many elements of each row.
                unsafe {
                    std::slice::from_raw_parts_mut(to.add(row * in_tile), in_tile).fill(*from.add(row))
                };
            }
        }
        let one_tile = block.tile >= block.elements;
        let mut partial: SmallVec<[Partial; 2]> =
            stage.reductions.iter().map(|reduction| reduction.reduce.start()).collect();
        let is_idle = stage.steps.is_empty() && stage.reductions.is_empty() && stage.wholes.is_empty();
        let end = if is_idle && !stores { 0 } else { block.elements };
        for start in (0..end).step_by(block.tile) {
            let count = block.tile.min(end - start);
            // SAFETY: tiles of the block, in registers that hold one or all of it; outputs of the block.
            unsafe {
                for &input in &stage.reads {
                    self.load(frame, input, block, start, count);
                }
                let first = block.first * self.length + start;
                // The last step may write to memory at once: all that the stage reads of this tile has been
                // read by then, but for its own operands, which may be the same memory.
                let direct = match code.last_output {
                    Some(output) if stores => self.sinks[output].direct(first, count),
                    _ => None,
                };
                let (others, last) = stage.steps.split_at(stage.steps.len() - direct.is_some() as usize);
                for step in others {
                    self.step(frame, step, start, count, self.register(frame, step.target, start));
                }
                if let (Some(target), [step]) = (direct, last) {
                    self.step(frame, step, start, count, target);
                }
                for (reduction, partial) in stage.reductions.iter().zip(&mut partial) {
                    let from = self.place(frame, reduction.from, start).cast::<f32>();
                    let values = std::slice::from_raw_parts(from, count);
                    if one_tile {
                        let to = frame.registers[reduction.to].cast::<f32>();
                        let results = std::slice::from_raw_parts_mut(to, block.rows);
                        reduction.reduce.whole(values, self.length, results);
                    } else {
                        reduction.reduce.push(partial, values);
                    }
                }
                if stores {
                    for (index, (sink, output)) in self.sinks.iter().zip(&code.outputs).enumerate() {
                        let written = direct.is_some() && code.last_output == Some(index);
                        if output.wide && !written && !frame.written[index] {
                            sink.store(self.place(frame, output.place, start), first, count, frame.raw);
                        }
                    }
                }
            }
        }
        for (reduction, partial) in stage.reductions.iter().zip(&partial) {
            let to = frame.registers[reduction.to];
            // SAFETY: a register of one number a row.
            unsafe {
                if !one_tile {
                    to.cast::<f32>().write(reduction.reduce.finish(partial));
                }
                if let Some(round) = &reduction.round {
                    round.run(&[to.cast_const()], to, block.rows);
                }
            }
        }
        for whole in &stage.wholes {
            // SAFETY: whole rows in registers that hold them, or in an input's buffer.
            unsafe { self.whole(frame, whole, block) };
        }
    }

    /// Where the next block starts in the first input that is read as it lies.
    fn ahead(&self, block: Block) -> Option<*const f32> {
        let start = (block.first + block.rows) * self.length;
        if block.first + 2 * block.rows > self.rows {
            return None;
        }
        let dense = |source: &Source| source.dense(0, start, block.elements);
        let mut wide = self.sources.iter().zip(&self.code.inputs).filter(|(_, input)| input.wide);
        wide.find_map(|(source, _)| dense(source)).map(<*const u8>::cast)
    }

    /// # Safety
    /// All of the block has been made.
    unsafe fn whole(&self, frame: &mut Frame, whole: &Whole, block: Block) {
        let from = match whole.from {
            Place::Register(register) => frame.registers[register].cast_const(),
            Place::Input(input) => frame.buffers[input].cast_const(),
        };
        let sink = whole.output.and_then(|output| {
            let place = self.sinks[output].direct(block.first * self.length, block.elements)?;
            frame.written[output] = true;
            Some(place)
        });
        let room = sink.unwrap_or(frame.registers[whole.room]);
        let ahead = self.ahead(block).unwrap_or(room.cast());
        for row in 0..block.rows {
            let at = row * self.length;
            // SAFETY: a row of each; promised by the caller. The output may be the memory of an input, which
            // nothing reads any more but this, row by row.
            unsafe {
                let (from, to) = (from.cast::<f32>().add(at), room.cast::<f32>().add(at));
                match whole.logsumexp {
                    Some(results) => {
                        let result = logsumexp_of(self.code.isa, from, to, self.length);
                        frame.registers[results].cast::<f32>().add(row).write(result);
                    }
                    None => {
                        let next = [ahead.wrapping_add(at), to.wrapping_add(self.length).cast_const()];
                        softmax_of(self.code.isa, from, to, self.length, next)
                    }
                }
            }
        }
        if let Some(round) = &whole.round {
            let (at, count) = match whole.logsumexp {
                Some(results) => (frame.registers[results], block.rows),
                None => (room, block.elements),
            };
            // SAFETY: what has been written just now.
            unsafe { round.run(&[at.cast_const()], at, count) };
        }
    }
}

impl Task for Bound {
    fn chunks(&self) -> usize {
        self.rows.div_ceil(self.block * self.blocks)
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let mut frame = self.frame(scratch);
        let start = chunk * self.block * self.blocks;
        let end = self.rows.min(start + self.block * self.blocks);
        for first in (start..end).step_by(self.block) {
            let rows = self.block.min(end - first);
            let elements = rows * self.length;
            let block = Block { first, rows, elements, tile: elements.min(TILE) };
            // SAFETY: rows of this chunk.
            unsafe { self.block(&mut frame, block) };
        }
    }

    fn name(&self) -> &'static str {
        "program"
    }
}
