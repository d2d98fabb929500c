//! Programs over rows against their ops run one by one: the same bits.

use mica_testkit::Rng;
use mica_threads::Pool;

use super::*;
use crate::elementwise::{binary_on, cast, compare_on, select, unary_on};
use crate::reduce::{logsumexp_on, reduce_on, softmax_on};
use crate::testing::{Laid, Layout, layouts};

/// A program as it is made, with what each value is.
struct Code {
    instructions: Vec<Instruction>,
    dtypes: Vec<Dtype>,
    /// Whether a value is wide; constants are neither.
    wide: Vec<Option<bool>>,
}

impl Code {
    fn push(&mut self, instruction: Instruction, dtype: Dtype, wide: Option<bool>) {
        self.instructions.push(instruction);
        self.dtypes.push(dtype);
        self.wide.push(wide);
    }

    /// A value of this type that goes with wide ones, or with numbers of rows.
    fn operand(&mut self, rng: &mut Rng, dtype: Dtype, wide: bool) -> Value {
        let fits = |value: &Value| {
            self.dtypes[*value] == dtype && (self.wide[*value] == Some(wide) || self.wide[*value].is_none())
        };
        let found: Vec<Value> = (0..self.dtypes.len()).filter(fits).collect();
        if !found.is_empty() && rng.range(0..5) > 0 {
            return *rng.choose(&found);
        }
        let rows: Vec<Value> = (0..self.dtypes.len())
            .filter(|&value| self.dtypes[value] == dtype && self.wide[value] == Some(false))
            .collect();
        if wide && !rows.is_empty() {
            self.push(Instruction::Spread(*rng.choose(&rows)), dtype, Some(true));
        } else {
            self.push(Instruction::Constant(rng.normal(), dtype), dtype, None);
        }
        self.dtypes.len() - 1
    }
}

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

fn random_code(rng: &mut Rng, inputs: &[(Dtype, bool)]) -> Code {
    let mut code = Code { instructions: Vec::new(), dtypes: Vec::new(), wide: Vec::new() };
    for (index, &(dtype, wide)) in inputs.iter().enumerate() {
        let input = if wide { Instruction::Input(index) } else { Instruction::RowInput(index) };
        code.push(input, dtype, Some(wide));
    }
    let length = rng.range(12..40);
    while code.dtypes.len() < length {
        let wide = rng.range(0..3) > 0;
        let dtype = *rng.choose(&FLOATS);
        match rng.range(0..8) {
            0 => {
                let op =
                    *rng.choose(&[UnaryOp::Exp, UnaryOp::Round, UnaryOp::Sign, UnaryOp::Tanh, UnaryOp::Neg]);
                let a = code.operand(rng, dtype, wide);
                let extent = code.wide[a].map_or(Some(false), Some);
                code.push(Instruction::Unary(op, a), dtype, extent);
            }
            1 | 2 => {
                let op =
                    *rng.choose(&[BinaryOp::Add, BinaryOp::Multiply, BinaryOp::Maximum, BinaryOp::Divide]);
                let (a, b) = (code.operand(rng, dtype, wide), code.operand(rng, dtype, wide));
                let extent = Some(code.wide[a] == Some(true) || code.wide[b] == Some(true));
                code.push(Instruction::Binary(op, a, b), dtype, extent);
            }
            3 => {
                let (a, b) = (code.operand(rng, dtype, wide), code.operand(rng, dtype, wide));
                let extent = Some(code.wide[a] == Some(true) || code.wide[b] == Some(true));
                code.push(Instruction::Compare(CompareOp::Lt, a, b), Dtype::Bool, extent);
            }
            4 => {
                let c = code.operand(rng, Dtype::Bool, wide);
                let (a, b) = (code.operand(rng, dtype, wide), code.operand(rng, dtype, wide));
                let extent = Some([a, b, c].iter().any(|&value| code.wide[value] == Some(true)));
                code.push(Instruction::Select(c, a, b), dtype, extent);
            }
            kind => {
                let bools = rng.range(0..5) == 0;
                let dtype = if bools { Dtype::Bool } else { dtype };
                let fits = |value: &Value| {
                    code.dtypes[*value] == dtype
                        && code.wide[*value] == Some(true)
                        && !matches!(code.instructions[*value], Instruction::Spread(_))
                };
                let found: Vec<Value> = (0..code.dtypes.len()).filter(fits).collect();
                let Some(&a) = found.get(rng.range(0..found.len().max(1))) else { continue };
                let (instruction, extent) = match kind {
                    5 if !bools => (Instruction::Softmax(a), true),
                    6 if !bools => (Instruction::LogSumExp(a), false),
                    _ if bools => {
                        let ops = [ReduceOp::All, ReduceOp::Any, ReduceOp::Max];
                        (Instruction::Reduce(*rng.choose(&ops), a), false)
                    }
                    _ => {
                        let ops =
                            [ReduceOp::Sum, ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min, ReduceOp::Prod];
                        (Instruction::Reduce(*rng.choose(&ops), a), false)
                    }
                };
                code.push(instruction, dtype, Some(extent));
            }
        }
    }
    code
}

fn unfused(isa: Isa, code: &Code, inputs: &[Laid], shape: &[usize], numbers: &[usize]) -> Vec<Laid> {
    let last = shape.len() - 1;
    let mut values: Vec<Laid> = Vec::new();
    for (at, instruction) in code.instructions.iter().enumerate() {
        let own: &[usize] = match code.wide[at] {
            Some(true) => shape,
            Some(false) => numbers,
            None => &[],
        };
        let mut out = Laid::poisoned(code.dtypes[at], own, Layout::Contiguous);
        let view = out.view_mut();
        let of = |value: Value| values[value].view();
        let task = match *instruction {
            Instruction::Input(i) | Instruction::RowInput(i) => cast(inputs[i].view(), view),
            Instruction::Constant(x, _) => crate::copy::fill_f64(x as f64, view),
            Instruction::Unary(op, a) => unary_on(isa, op, of(a), view),
            Instruction::Binary(op, a, b) => binary_on(isa, op, of(a), of(b), view),
            Instruction::Compare(op, a, b) => compare_on(isa, op, of(a), of(b), view),
            Instruction::Select(c, a, b) => select(of(c), of(a), of(b), view),
            Instruction::Cast(_, a) | Instruction::Spread(a) => cast(of(a), view),
            Instruction::Reduce(op, a) => reduce_on(isa, op, of(a), &[last], view),
            Instruction::Softmax(a) => softmax_on(isa, of(a), view),
            Instruction::LogSumExp(a) => logsumexp_on(isa, of(a), view),
        };
        Pool::new(1).run(&[task.unwrap()]).unwrap();
        values.push(out);
    }
    values
}

fn same_bits(a: &Laid, b: &Laid) -> bool {
    let pairs = a.values().into_iter().zip(b.values());
    pairs.into_iter().all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
}

#[test]
fn random_programs_over_rows_equal_their_ops_bit_for_bit_on_every_tier() {
    let mut rng = Rng::new(61);
    // Rows that share a tile, that are one, and that take several; more than a segment of a sum.
    let shapes: [&[usize]; 9] = [
        &[3, 1050],
        &[40],
        &[700, 3],
        &[2, 3, 70],
        &[5, 1024],
        &[257, 16],
        &[4, 5000],
        &[2, 33_000],
        &[9, 1],
    ];
    for round in 0..90 {
        let shape = shapes[round % shapes.len()];
        let mut numbers = shape.to_vec();
        *numbers.last_mut().unwrap() = 1;
        let kinds = [
            (Dtype::F32, true),
            (Dtype::BF16, true),
            (Dtype::F16, true),
            (Dtype::Bool, true),
            (Dtype::F32, false),
            (Dtype::BF16, false),
        ];
        let inputs: Vec<Laid> = kinds
            .iter()
            .enumerate()
            .map(|(index, &(dtype, wide))| {
                let whole: &[usize] = if wide { shape } else { &numbers };
                let own = match rng.range(0..4) {
                    0 if index > 0 && wide => &whole[whole.len() - 1..],
                    1 if index > 0 => &[],
                    _ => whole,
                };
                Laid::random(dtype, own, *rng.choose(&layouts(own)), &mut rng)
            })
            .collect();
        let code = random_code(&mut rng, &kinds);
        let made: Vec<Value> = (0..code.dtypes.len()).filter(|&value| code.wide[value].is_some()).collect();
        let mut outputs: Vec<Value> = (0..3).map(|_| *rng.choose(&made)).collect();
        outputs.push(*made.last().unwrap());
        if !code.instructions.iter().any(Instruction::joins_rows) {
            continue;
        }
        let dtypes: Vec<Dtype> = kinds.iter().map(|kind| kind.0).collect();
        for &isa in Isa::available() {
            let program = Program::on(isa, &dtypes, &code.instructions, &outputs).unwrap();
            let expected = unfused(isa, &code, &inputs, shape, &numbers);
            for threads in [1, 3] {
                let mut results: Vec<Laid> = outputs
                    .iter()
                    .map(|&value| {
                        let own = if code.wide[value] == Some(true) { shape } else { &numbers };
                        Laid::poisoned(code.dtypes[value], own, *rng.choose(&layouts(own)))
                    })
                    .collect();
                let views: Vec<_> = results.iter_mut().map(|laid| laid.view_mut()).collect();
                let sources: Vec<_> = inputs.iter().map(|laid| laid.view()).collect();
                Pool::new(threads).run(&[program.bind(&sources, &views).unwrap()]).unwrap();
                for (result, &value) in results.iter().zip(&outputs) {
                    result.check_untouched_outside();
                    assert!(
                        same_bits(result, &expected[value]),
                        "round {round} {isa} {shape:?} value {value} of {:?}",
                        code.instructions
                    );
                }
            }
        }
    }
}

#[test]
fn outputs_may_be_inputs() {
    use Instruction::*;
    let mut rng = Rng::new(62);
    for shape in [[7, 3000], [300, 40]] {
        let numbers = [shape[0], 1];
        let mut x = Laid::random(Dtype::F32, &shape, Layout::Contiguous, &mut rng);
        let mut r = Laid::random(Dtype::F32, &numbers, Layout::Contiguous, &mut rng);
        // x, r = r · x / Σ x, Σ x: both inputs are overwritten.
        let code = Code {
            instructions: vec![
                Input(0),
                RowInput(1),
                Reduce(ReduceOp::Sum, 0),
                Binary(BinaryOp::Divide, 1, 2),
                Spread(3),
                Binary(BinaryOp::Multiply, 0, 4),
            ],
            dtypes: vec![Dtype::F32; 6],
            wide: [true, false, false, false, true, true].map(Some).to_vec(),
        };
        let copies = [
            Laid::contiguous(Dtype::F32, &shape, &x.values()),
            Laid::contiguous(Dtype::F32, &numbers, &r.values()),
        ];
        let expected = unfused(Isa::get(), &code, &copies, &shape, &numbers);
        let program = Program::new(&[Dtype::F32; 2], &code.instructions, &[5, 2]).unwrap();
        let task = program.bind(&[x.view(), r.view()], &[x.view_mut(), r.view_mut()]).unwrap();
        Pool::new(2).run(&[task]).unwrap();
        assert!(same_bits(&x, &expected[5]) && same_bits(&r, &expected[2]), "{shape:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_reasons() {
    use Instruction::*;
    let f32s = [Dtype::F32; 2];
    for (part, code, outputs) in [
        ("spread those", &[Input(0), RowInput(1), Binary(BinaryOp::Add, 0, 1)][..], &[2][..]),
        ("is wide and has one number a row", &[Input(0), RowInput(0), Softmax(0)], &[2]),
        ("of a value that is Row", &[Input(0), RowInput(1), Softmax(1)], &[2]),
        ("of one number a row", &[Input(0), RowInput(1), Spread(1), Softmax(2)], &[3]),
        ("asks for the truth of float32", &[Input(0), Reduce(ReduceOp::All, 0)], &[1]),
    ] {
        let message = Program::new(&f32s, code, outputs).err().expect(part).to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    let program = Program::new(&f32s[..1], &[Input(0), Reduce(ReduceOp::Max, 0)], &[1]).unwrap();
    let empty = Laid::contiguous(Dtype::F32, &[2, 0], &[]);
    let mut out = Laid::poisoned(Dtype::F32, &[2, 1], Layout::Contiguous);
    let message = program.bind(&[empty.view()], &[out.view_mut()]).err().unwrap().to_string();
    assert!(message.contains("no elements") || message.contains("does not broadcast"), "{message}");
}
