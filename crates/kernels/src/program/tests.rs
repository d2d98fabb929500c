//! Programs against their ops run one by one: the same bits.

use mica_testkit::Rng;
use mica_threads::Pool;

use super::*;
use crate::elementwise::{binary_on, cast, compare_on, select, unary_on};
use crate::testing::{Laid, Layout, layouts};

/// Runs instruction by instruction, each into an array of its own.
fn unfused(isa: Isa, program: &Program, inputs: &[Laid], code: &[Instruction], shape: &[usize]) -> Vec<Laid> {
    let mut values: Vec<Laid> = Vec::new();
    for (at, instruction) in code.iter().enumerate() {
        let mut out = Laid::poisoned(program.dtype(at), shape, Layout::Contiguous);
        let view = out.view_mut();
        let task = match *instruction {
            Instruction::Input(i) => cast(inputs[i].view(), view),
            Instruction::Constant(x, _) => crate::copy::fill_f64(x as f64, view),
            Instruction::Unary(op, a) => unary_on(isa, op, values[a].view(), view),
            Instruction::Binary(op, a, b) => binary_on(isa, op, values[a].view(), values[b].view(), view),
            Instruction::Compare(op, a, b) => compare_on(isa, op, values[a].view(), values[b].view(), view),
            Instruction::Select(c, a, b) => {
                select(values[c].view(), values[a].view(), values[b].view(), view)
            }
            Instruction::Cast(_, a) => cast(values[a].view(), view),
            _ => unreachable!("an instruction of rows"),
        };
        Pool::new(1).run(&[task.unwrap()]).unwrap();
        values.push(out);
    }
    values
}

/// A random well-typed program over four inputs.
fn random_code(rng: &mut Rng, inputs: &[Dtype]) -> Vec<Instruction> {
    let mut code: Vec<Instruction> = (0..inputs.len()).map(Instruction::Input).collect();
    let mut dtypes = inputs.to_vec();
    let unary = [
        UnaryOp::Abs,
        UnaryOp::Neg,
        UnaryOp::Exp,
        UnaryOp::Tanh,
        UnaryOp::Silu,
        UnaryOp::Square,
        UnaryOp::Erf,
        UnaryOp::Reciprocal,
        UnaryOp::Round,
        UnaryOp::LogicalNot,
        UnaryOp::Sign,
        UnaryOp::GeluTanh,
    ];
    let binary = [
        BinaryOp::Add,
        BinaryOp::Subtract,
        BinaryOp::Multiply,
        BinaryOp::Divide,
        BinaryOp::Maximum,
        BinaryOp::Minimum,
        BinaryOp::LogicalAnd,
        BinaryOp::LogAddExp,
        BinaryOp::Remainder,
    ];
    let halves = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::Bool];
    while code.len() < 24 {
        let a = rng.range(0..code.len());
        let of_type: Vec<usize> = (0..code.len()).filter(|&b| dtypes[b] == dtypes[a]).collect();
        let b = *rng.choose(&of_type);
        let float = dtypes[a].is_float();
        let (instruction, dtype) = match rng.range(0..7) {
            0 | 1 if float => {
                let op = *rng.choose(&unary);
                let bool_out = op == UnaryOp::LogicalNot;
                (Instruction::Unary(op, a), if bool_out { Dtype::Bool } else { dtypes[a] })
            }
            2 | 3 if float => {
                let op = *rng.choose(&binary);
                (Instruction::Binary(op, a, b), if op.is_logical() { Dtype::Bool } else { dtypes[a] })
            }
            2 => (
                Instruction::Binary(
                    *rng.choose(&[BinaryOp::BitwiseXor, BinaryOp::Add, BinaryOp::BitwiseAnd]),
                    a,
                    b,
                ),
                Dtype::Bool,
            ),
            4 => (Instruction::Compare(*rng.choose(CompareOp::ALL), a, b), Dtype::Bool),
            5 => (Instruction::Select(rng.range(0..code.len()), a, b), dtypes[a]),
            6 => {
                let to = *rng.choose(&halves);
                (Instruction::Cast(to, a), to)
            }
            _ => {
                let to = *rng.choose(&halves);
                (Instruction::Constant(rng.normal(), to), to)
            }
        };
        code.push(instruction);
        dtypes.push(dtype);
    }
    code
}

#[test]
fn random_programs_equal_their_ops_bit_for_bit_on_every_tier() {
    let mut rng = Rng::new(51);
    for round in 0..40 {
        let shapes: [&[usize]; 6] = [&[3, 1050], &[40_000], &[2, 3, 70], &[5], &[1], &[17, 129]];
        let shape = shapes[rng.range(0..6)];
        let dtypes = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::Bool];
        let inputs: Vec<Laid> = dtypes
            .iter()
            .map(|&dtype| {
                // Some inputs are one row, or one number.
                let own: &[usize] = match rng.range(0..4) {
                    0 => &shape[shape.len() - 1..],
                    1 => &[],
                    _ => shape,
                };
                Laid::random(dtype, own, *rng.choose(&layouts(own)), &mut rng)
            })
            .collect();
        let code = random_code(&mut rng, &dtypes);
        let mut outputs: Vec<usize> = (0..3).map(|_| rng.range(4..code.len())).collect();
        outputs.push(code.len() - 1);
        outputs.push(rng.range(0..4));
        for &isa in Isa::available() {
            let program = Program::on(isa, &dtypes, &code, &outputs).unwrap();
            let expected = unfused(isa, &program, &inputs, &code, shape);
            for threads in [1, 3] {
                let mut results: Vec<Laid> = outputs
                    .iter()
                    .map(|&value| Laid::poisoned(program.dtype(value), shape, *rng.choose(&layouts(shape))))
                    .collect();
                let views: Vec<_> = results.iter_mut().map(|laid| laid.view_mut()).collect();
                let sources: Vec<_> = inputs.iter().map(|laid| laid.view()).collect();
                Pool::new(threads).run(&[program.bind(&sources, &views).unwrap()]).unwrap();
                for (result, &value) in results.iter().zip(&outputs) {
                    result.check_untouched_outside();
                    let same = result
                        .values()
                        .iter()
                        .zip(expected[value].values())
                        .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
                    assert!(same, "round {round} {isa} value {value} of {code:?}");
                }
            }
        }
    }
}

#[test]
fn outputs_may_be_inputs() {
    let mut rng = Rng::new(52);
    let mut a = Laid::random(Dtype::F32, &[3000], Layout::Contiguous, &mut rng);
    let mut b = Laid::random(Dtype::F32, &[3000], Layout::Contiguous, &mut rng);
    let (x, y) = (a.values(), b.values());
    // a, b = a + b, a: the second output is an input that the first one overwrites.
    let code = [Instruction::Input(0), Instruction::Input(1), Instruction::Binary(BinaryOp::Add, 0, 1)];
    let program = Program::new(&[Dtype::F32; 2], &code, &[2, 0]).unwrap();
    let task = program.bind(&[a.view(), b.view()], &[a.view_mut(), b.view_mut()]).unwrap();
    Pool::new(2).run(&[task]).unwrap();
    let sum: Vec<f64> = x.iter().zip(&y).map(|(x, y)| (*x as f32 + *y as f32) as f64).collect();
    assert_eq!(a.values(), sum);
    assert_eq!(b.values(), x);
}

#[test]
fn what_has_no_fused_form_is_refused_with_reasons() {
    use Instruction::*;
    for (part, inputs, code, outputs) in [
        ("int32 has no fused form", &[Dtype::I32][..], &[Input(0)][..], &[0][..]),
        ("before it is made", &[Dtype::F32], &[Input(0), Unary(UnaryOp::Exp, 1)], &[0]),
        (
            "joins float32 and bfloat16",
            &[Dtype::F32, Dtype::BF16],
            &[Input(0), Input(1), Binary(BinaryOp::Add, 0, 1)],
            &[2],
        ),
        ("takes input 3 of 1", &[Dtype::F32], &[Input(3)], &[0]),
        ("output 4 of 1", &[Dtype::F32], &[Input(0)], &[4]),
        ("BitwiseAnd", &[Dtype::F32], &[Input(0), Binary(BinaryOp::BitwiseAnd, 0, 0)], &[1]),
        ("of bool has no fused form", &[Dtype::Bool], &[Input(0), Unary(UnaryOp::Exp, 0)], &[1]),
    ] {
        let message = Program::new(inputs, code, outputs).err().expect(part).to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    let program = Program::new(&[Dtype::F32], &[Input(0)], &[0]).unwrap();
    let a = Laid::contiguous(Dtype::BF16, &[2], &[1.0, 2.0]);
    let mut out = Laid::poisoned(Dtype::F32, &[2], Layout::Contiguous);
    let message = program.bind(&[a.view()], &[out.view_mut()]).err().unwrap().to_string();
    assert!(message.contains("input 0 is float32"), "{message}");
}
