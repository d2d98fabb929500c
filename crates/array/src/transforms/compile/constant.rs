//! Single values at compile time, computed by the kernels that would compute them at run time:
//! folding a constant cannot change a bit.

use smallvec::{SmallVec, smallvec};

use crate::Dtype;
use crate::backend::{HostView, Operand, Step, cpu};
use crate::op::{Op, Scalar};

/// What `op` gives for single values, if a kernel computes it and the result is one number.
pub(super) fn evaluate(op: &Op, operands: &[(Scalar, Dtype)], dtype: Dtype) -> Option<Scalar> {
    let mut cells: SmallVec<[u64; 4]> = SmallVec::from_elem(0, operands.len() + 1);
    let memory = cells.as_mut_ptr();
    let view = |index: usize, dtype: Dtype| {
        Operand::Host(HostView {
            pointer: memory.wrapping_add(index).cast(),
            shape: SmallVec::new(),
            strides: SmallVec::new(),
            dtype,
        })
    };
    let representable = |dtype: Dtype| dtype != Dtype::C64;
    if !representable(dtype) || !operands.iter().all(|&(_, dtype)| representable(dtype)) {
        return None;
    }
    let mut inputs: SmallVec<[Operand; 2]> = SmallVec::new();
    for (index, &(value, dtype)) in operands.iter().enumerate() {
        let step =
            Step { op: Op::Full(value), inputs: SmallVec::new(), outputs: smallvec![view(index, dtype)] };
        cpu::run_alone(&step).ok()?;
        inputs.push(view(index, dtype));
    }
    let step = Step { op: op.clone(), inputs, outputs: smallvec![view(operands.len(), dtype)] };
    cpu::run_alone(&step).ok()?;
    let bits = cells[operands.len()];
    Some(match dtype {
        Dtype::Bool => Scalar::Bool(bits as u8 != 0),
        Dtype::U8 => Scalar::Int(bits as u8 as i64),
        Dtype::U16 => Scalar::Int(bits as u16 as i64),
        Dtype::U32 => Scalar::Int(bits as u32 as i64),
        Dtype::U64 => Scalar::UInt(bits),
        Dtype::I8 => Scalar::Int(bits as i8 as i64),
        Dtype::I16 => Scalar::Int(bits as i16 as i64),
        Dtype::I32 => Scalar::Int(bits as i32 as i64),
        Dtype::I64 => Scalar::Int(bits as i64),
        Dtype::F16 => Scalar::Float(half::f16::from_bits(bits as u16).to_f64()),
        Dtype::BF16 => Scalar::Float(half::bf16::from_bits(bits as u16).to_f64()),
        Dtype::F32 => Scalar::Float(f32::from_bits(bits as u32) as f64),
        Dtype::F64 => Scalar::Float(f64::from_bits(bits)),
        Dtype::C64 => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{BinaryOp, CompareOp, UnaryOp};

    #[test]
    fn values_are_those_of_the_dtype() {
        use Scalar::*;
        let float = |value| (Float(value), Dtype::F32);
        for (name, op, operands, dtype, expected) in [
            ("rounded", Op::Full(Float(0.1)), vec![], Dtype::BF16, Some(Float(0.100_097_656_25))),
            ("cast", Op::Cast, vec![float(-1.5)], Dtype::I32, Some(Int(-1))),
            ("i64", Op::Cast, vec![(Int(i64::MIN), Dtype::I64)], Dtype::I64, Some(Int(i64::MIN))),
            ("u64", Op::Full(UInt(u64::MAX)), vec![], Dtype::U64, Some(UInt(u64::MAX))),
            ("sqrt", Op::Unary(UnaryOp::Sqrt), vec![float(2.25)], Dtype::F32, Some(Float(1.5))),
            ("less", Op::Compare(CompareOp::Lt), vec![float(1.0), float(2.0)], Dtype::Bool, Some(Bool(true))),
            (
                "wraps",
                Op::Binary(BinaryOp::Add),
                vec![(Int(127), Dtype::I8), (Int(1), Dtype::I8)],
                Dtype::I8,
                Some(Int(-128)),
            ),
            (
                "no kernel",
                Op::Binary(BinaryOp::Atan2),
                vec![(Int(1), Dtype::I32), (Int(1), Dtype::I32)],
                Dtype::I32,
                None,
            ),
            ("complex", Op::Cast, vec![float(1.0)], Dtype::C64, None),
        ] {
            assert_eq!(evaluate(&op, &operands, dtype), expected, "{name}");
        }
    }
}
