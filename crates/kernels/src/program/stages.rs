//! From instructions over rows to stages.
//!
//! A row's sum is known when all of the row has been seen, so what needs it waits for the next stage.
//! A stage has steps on one number a row, then steps on tiles of the row, then what joins the row.
//! Steps on tiles run as late as their readers allow: a value that is made in one stage and read in
//! another takes room for whole rows, others for a tile.

use mica_simd::Isa;
use smallvec::SmallVec;

use super::compile::{Place, Step, is_exact, is_half, operands, operation, round_to, rounded};
use super::{Instruction, Value, refuse};
use crate::dtype::Dtype;
use crate::elementwise::tile::TileOp;
use crate::error::KernelError;
use crate::reduce::RowReduce;

/// What a register holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Room {
    /// One number a row.
    Numbers,
    Tile,
    /// Whole rows.
    Rows,
}

pub(super) struct RowInput {
    pub dtype: Dtype,
    /// A number for every element, rather than one a row.
    pub wide: bool,
    /// It is an output as it is: see [`super::compile::Code::copied`].
    pub copied: bool,
    /// Some instruction takes whole rows of it.
    pub whole: bool,
}

pub(super) struct RowOutput {
    pub place: Place,
    pub dtype: Dtype,
    pub wide: bool,
}

/// A value for every row from a place.
pub(super) struct Reduction {
    pub reduce: RowReduce,
    pub from: Place,
    pub to: usize,
    /// To the value's type.
    pub round: Option<Box<dyn TileOp>>,
}

/// What takes a whole row at a time.
pub(super) struct Whole {
    pub from: Place,
    /// Room for whole rows, which may be that of `from`.
    pub room: usize,
    /// Where log-sum-exps go; softmax stays in the room.
    pub logsumexp: Option<usize>,
    /// To the value's type.
    pub round: Option<Box<dyn TileOp>>,
    /// The output that a softmax may be written to at once: no wide input is read after it, and nothing
    /// else needs it.
    pub output: Option<usize>,
}

#[derive(Default)]
pub(super) struct Stage {
    /// On one number a row.
    pub numbers: Vec<Step>,
    /// Numbers of rows to tiles.
    pub spreads: Vec<(Place, usize)>,
    /// Wide inputs that this stage reads.
    pub reads: SmallVec<[usize; 8]>,
    /// On tiles.
    pub steps: Vec<Step>,
    pub reductions: Vec<Reduction>,
    pub wholes: Vec<Whole>,
}

pub(super) struct RowCode {
    pub isa: Isa,
    pub inputs: Vec<RowInput>,
    /// Values that are the same everywhere: register (a tile) and number.
    pub constants: Vec<(usize, f32)>,
    pub registers: Vec<Room>,
    pub stages: Vec<Stage>,
    /// The stage in which wide outputs go to memory; none after it reads wide inputs.
    pub stored: usize,
    pub outputs: Vec<RowOutput>,
    /// The output that the last step on tiles of that stage makes, if nothing else needs it.
    pub last_output: Option<usize>,
}

/// How much of a value there is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Extent {
    /// The same number everywhere.
    Constant,
    /// One number a row.
    Row,
    Wide,
}

fn extents(instructions: &[Instruction]) -> Result<Vec<Extent>, KernelError> {
    let mut extents: Vec<Extent> = Vec::with_capacity(instructions.len());
    for (at, instruction) in instructions.iter().enumerate() {
        let of = |value: Value| extents[value];
        let extent = match *instruction {
            Instruction::Input(_) => Extent::Wide,
            Instruction::Constant(..) => Extent::Constant,
            Instruction::RowInput(_) => Extent::Row,
            Instruction::Spread(a) if of(a) != Extent::Wide => Extent::Wide,
            Instruction::Softmax(a) | Instruction::LogSumExp(a)
                if matches!(instructions[a], Instruction::Spread(_)) =>
            {
                return Err(refuse(format!("instruction {at}, {instruction:?}, of one number a row")));
            }
            Instruction::Softmax(a) if of(a) == Extent::Wide => Extent::Wide,
            Instruction::Reduce(_, a) | Instruction::LogSumExp(a) if of(a) == Extent::Wide => Extent::Row,
            Instruction::Spread(a)
            | Instruction::Softmax(a)
            | Instruction::Reduce(_, a)
            | Instruction::LogSumExp(a) => {
                let message = format!("instruction {at}, {instruction:?}, of a value that is {:?}", of(a));
                return Err(refuse(message));
            }
            _ => {
                let found = |extent: Extent| operands(instruction).any(|value| of(value) == extent);
                match (found(Extent::Row), found(Extent::Wide)) {
                    (true, true) => {
                        let message = format!(
                            "instruction {at}, {instruction:?}, joins numbers of rows and of elements: spread those"
                        );
                        return Err(refuse(message));
                    }
                    (_, true) => Extent::Wide,
                    (_, false) => Extent::Row,
                }
            }
        };
        extents.push(extent);
    }
    Ok(extents)
}

/// When instructions run.
struct Schedule {
    /// Values that something needs.
    alive: Vec<bool>,
    /// The stage of each instruction.
    stage: Vec<usize>,
    /// Instructions that are steps of some kind, in the order in which they run.
    order: Vec<Value>,
    stages: usize,
    stored: usize,
}

impl Schedule {
    fn new(instructions: &[Instruction], extents: &[Extent], outputs: &[Value]) -> Schedule {
        let count = instructions.len();
        let mut alive = vec![false; count];
        outputs.iter().for_each(|&output| alive[output] = true);
        for at in (0..count).rev() {
            if alive[at] {
                operands(&instructions[at]).for_each(|value| alive[value] = true);
            }
        }
        // The stage in which each value can be read.
        let mut ready = vec![0; count];
        for at in 0..count {
            let latest = operands(&instructions[at]).map(|value| ready[value]).max().unwrap_or(0);
            ready[at] = latest + instructions[at].joins_rows() as usize;
        }
        let runs_on_tiles = |at: usize| {
            extents[at] == Extent::Wide
                && !matches!(
                    instructions[at],
                    Instruction::Input(_) | Instruction::Spread(_) | Instruction::Softmax(_)
                )
        };
        let living = || (0..count).filter(|&at| alive[at]);
        let joins = living().filter(|&at| instructions[at].joins_rows()).map(|at| ready[at] - 1);
        let wide = outputs.iter().filter(|&&at| extents[at] == Extent::Wide).map(|&at| ready[at]);
        let stored = joins.chain(wide).max().unwrap_or(0);
        let mut stage: Vec<usize> =
            (0..count).map(|at| ready[at] - instructions[at].joins_rows() as usize).collect();
        // As late as the readers allow, which come after it.
        let mut latest = vec![stored; count];
        for at in (0..count).rev().filter(|&at| alive[at]) {
            if runs_on_tiles(at) {
                stage[at] = latest[at];
            }
            if runs_on_tiles(at) || instructions[at].joins_rows() {
                operands(&instructions[at]).for_each(|value| latest[value] = latest[value].min(stage[at]));
            }
        }
        let phase = |at: usize| match instructions[at] {
            Instruction::Spread(_) => 1,
            Instruction::Reduce(..) => 3,
            Instruction::Softmax(_) | Instruction::LogSumExp(_) => 4,
            _ if extents[at] == Extent::Wide => 2,
            _ => 0,
        };
        let is_source = |at: usize| operands(&instructions[at]).next().is_none();
        let mut order: Vec<Value> = living().filter(|&at| !is_source(at)).collect();
        order.sort_by_key(|&at| (stage[at], phase(at), at));
        let stages = living().map(|at| ready[at]).max().unwrap_or(0) + 1;
        Schedule { alive, stage, order, stages, stored }
    }
}

/// Registers that are free, by what they hold.
#[derive(Default)]
struct Registers {
    all: Vec<Room>,
    free: Vec<usize>,
}

impl Registers {
    fn take(&mut self, room: Room) -> usize {
        match self.free.iter().position(|&register| self.all[register] == room) {
            Some(index) => self.free.swap_remove(index),
            None => {
                self.all.push(room);
                self.all.len() - 1
            }
        }
    }
}

impl RowCode {
    pub fn new(
        isa: Isa,
        inputs: &[Dtype],
        instructions: &[Instruction],
        dtypes: &[Dtype],
        outputs: &[Value],
    ) -> Result<RowCode, KernelError> {
        let extents = extents(instructions)?;
        let schedule = Schedule::new(instructions, &extents, outputs);
        let stage = &schedule.stage;
        // By their place in the order: the last reader of a value, and the last stage that reads it.
        let mut last = vec![0; instructions.len()];
        let mut last_stage = stage.clone();
        let mut is_operand = vec![false; instructions.len()];
        let mut taken_whole = vec![false; instructions.len()];
        for (position, &at) in schedule.order.iter().enumerate() {
            for value in operands(&instructions[at]) {
                last[value] = position;
                last_stage[value] = last_stage[value].max(stage[at]);
                is_operand[value] = true;
                taken_whole[value] |=
                    matches!(instructions[at], Instruction::Softmax(_) | Instruction::LogSumExp(_));
            }
        }
        for &output in outputs {
            last[output] = usize::MAX;
            last_stage[output] = last_stage[output].max(schedule.stored);
        }
        let mut code = RowCode {
            isa,
            inputs: row_inputs(inputs, instructions)?,
            constants: Vec::new(),
            registers: Vec::new(),
            stages: (0..schedule.stages).map(|_| Stage::default()).collect(),
            stored: schedule.stored,
            outputs: Vec::new(),
            last_output: None,
        };
        let mut registers = Registers::default();
        // Where each value is: sources first.
        let mut places: Vec<Place> = vec![Place::Register(usize::MAX); instructions.len()];
        for (at, instruction) in instructions.iter().enumerate().filter(|(at, _)| schedule.alive[*at]) {
            match *instruction {
                Instruction::Input(input) | Instruction::RowInput(input) => {
                    code.inputs[input].whole |= taken_whole[at];
                    places[at] = Place::Input(input);
                }
                Instruction::Constant(number, dtype) => {
                    let register = registers.take(Room::Tile);
                    code.constants.push((register, rounded(number, dtype)));
                    places[at] = Place::Register(register);
                }
                _ => {}
            }
        }
        for (position, &at) in schedule.order.iter().enumerate() {
            let instruction = &instructions[at];
            let values: SmallVec<[Value; 3]> = operands(instruction).collect();
            let sources: SmallVec<[Place; 3]> = values.iter().map(|&value| places[value]).collect();
            // An operand that dies here leaves its register to the result. What is filled once for many
            // tiles keeps it.
            for (i, &value) in values.iter().enumerate() {
                let kept = matches!(instructions[value], Instruction::Constant(..) | Instruction::Spread(_));
                if let Place::Register(register) = places[value]
                    && last[value] == position
                    && !kept
                    && !values[..i].contains(&value)
                {
                    registers.free.push(register);
                }
            }
            let room = match extents[at] {
                Extent::Wide if last_stage[at] > stage[at] || taken_whole[at] => Room::Rows,
                Extent::Wide => Room::Tile,
                _ => Room::Numbers,
            };
            let spread = matches!(instruction, Instruction::Spread(_));
            let target = registers.take(if spread { Room::Tile } else { room });
            places[at] = Place::Register(target);
            let dtype = dtypes[at];
            let round = || is_half(dtype).then(|| round_to(isa, dtype));
            let steps = &mut code.stages[stage[at]];
            if matches!(extents[at], Extent::Wide) || instruction.joins_rows() {
                for &source in &sources {
                    if let Place::Input(input) = source
                        && code.inputs[input].wide
                        && !steps.reads.contains(&input)
                    {
                        steps.reads.push(input);
                    }
                }
            }
            match *instruction {
                Instruction::Spread(_) => steps.spreads.push((sources[0], target)),
                Instruction::Reduce(op, _) => steps.reductions.push(Reduction {
                    reduce: RowReduce::new(isa, op),
                    from: sources[0],
                    to: target,
                    round: round(),
                }),
                Instruction::Softmax(_) => steps.wholes.push(Whole {
                    from: sources[0],
                    room: target,
                    logsumexp: None,
                    round: round(),
                    output: None,
                }),
                Instruction::LogSumExp(_) => {
                    let room = registers.take(Room::Rows);
                    registers.free.push(room);
                    steps.wholes.push(Whole {
                        from: sources[0],
                        room,
                        logsumexp: Some(target),
                        round: round(),
                        output: None,
                    });
                }
                _ => {
                    let from = values.first().map_or(dtype, |&value| dtypes[value]);
                    let op = operation(isa, instruction, from, dtype)?;
                    let list =
                        if extents[at] == Extent::Wide { &mut steps.steps } else { &mut steps.numbers };
                    list.push(Step { op, operands: sources, target });
                    // What is only stored is rounded there, and in the same way.
                    let is_rounded_later = dtype == Dtype::BF16 && !is_operand[at];
                    if is_half(dtype) && !is_exact(instruction) && !is_rounded_later {
                        let operands = SmallVec::from_slice(&[Place::Register(target)]);
                        list.push(Step { op: round_to(isa, dtype), operands, target });
                    }
                }
            }
        }
        for &value in outputs {
            let wide = extents[value] == Extent::Wide;
            if let Place::Input(input) = places[value] {
                code.inputs[input].copied = true;
                let reads = &mut code.stages[code.stored].reads;
                if wide && !reads.contains(&input) {
                    reads.push(input);
                }
            }
            code.outputs.push(RowOutput { place: places[value], dtype: dtypes[value], wide });
        }
        code.last_output = last_output(&code);
        code.write_softmax_at_once(&is_operand, outputs, &places);
        code.registers = registers.all;
        Ok(code)
    }
}

impl RowCode {
    /// See [`Whole::output`].
    fn write_softmax_at_once(&mut self, is_operand: &[bool], outputs: &[Value], places: &[Place]) {
        let (before, stored) = self.stages.split_at_mut(self.stored);
        let (Some(stage), true) = (before.last_mut(), stored[0].reads.is_empty()) else { return };
        for (index, &value) in outputs.iter().enumerate() {
            let once = outputs.iter().filter(|&&other| other == value).count() == 1;
            for whole in stage.wholes.iter_mut().filter(|_| once && !is_operand[value]) {
                if whole.logsumexp.is_none() && places[value] == Place::Register(whole.room) {
                    whole.output = Some(index);
                }
            }
        }
    }
}

fn row_inputs(inputs: &[Dtype], instructions: &[Instruction]) -> Result<Vec<RowInput>, KernelError> {
    let input = |(input, &dtype): (usize, &Dtype)| {
        let wide = instructions.contains(&Instruction::Input(input));
        if wide && instructions.contains(&Instruction::RowInput(input)) {
            return Err(refuse(format!("input {input} is wide and has one number a row")));
        }
        Ok(RowInput { dtype, wide, copied: false, whole: false })
    };
    inputs.iter().enumerate().map(input).collect()
}

/// See [`RowCode::last_output`].
fn last_output(code: &RowCode) -> Option<usize> {
    let stage = &code.stages[code.stored];
    let made = Place::Register(stage.steps.last()?.target);
    let joined = stage.reductions.iter().map(|reduction| reduction.from);
    if joined.chain(stage.wholes.iter().map(|whole| whole.from)).any(|from| from == made) {
        return None;
    }
    let mut places = code.outputs.iter().map(|output| output.place);
    let index = places.position(|place| place == made)?;
    places.all(|place| place != made).then_some(index)
}
