//! Finding the op that makes the first NaN.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};

use crate::backend::{HostView, Operand, Step};
use crate::graph::describe;
use crate::op::Op;
use crate::{Dtype, Error, Result};

/// Evaluates op by op, from now on, and stops with an error ([`Error::Nan`]) at the first result
/// that has a NaN: it names the op, its shapes, and whether an input had one already. Off again
/// with `false`. The environment variable `MICA_CHECK_NAN=1` turns it on from the start.
///
/// It costs a second look at every result, and in-between results can no longer be overlapped.
/// Gives what was set before.
pub fn set_check_nan(on: bool) -> bool {
    flag().swap(on, Ordering::Relaxed)
}

pub(crate) fn is_checked() -> bool {
    flag().load(Ordering::Relaxed)
}

fn flag() -> &'static AtomicBool {
    static FLAG: OnceLock<AtomicBool> = OnceLock::new();
    FLAG.get_or_init(|| {
        let asked = std::env::var_os("MICA_CHECK_NAN").is_some_and(|value| !value.is_empty() && value != "0");
        AtomicBool::new(asked)
    })
}

/// The first input of a step that has a NaN before it runs.
pub(crate) fn in_inputs(step: &Step) -> Result<Option<usize>> {
    for (index, input) in step.inputs.iter().enumerate() {
        if let Operand::Host(view) = input
            && count(view) > 0
        {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// Fails if an output of a step that has run has a NaN. `given`: the input that had one before.
pub(crate) fn check_outputs(step: &Step, given: Option<usize>) -> Result<()> {
    for (index, output) in step.outputs.iter().enumerate() {
        let Operand::Host(view) = output else { continue };
        let found = count(view);
        if found == 0 {
            continue;
        }
        let text = |view: &HostView| format!("{}{:?}", view.dtype, view.shape.as_slice());
        let inputs: Vec<String> = step
            .inputs
            .iter()
            .map(|input| match input {
                Operand::Host(view) => text(view),
                Operand::Packed(weight) => format!("a packed weight {:?}", weight.shape().as_slice()),
                Operand::Absent => "nothing".to_string(),
            })
            .collect();
        let origin = match given {
            Some(input) => format!("input {input} had one already, from outside this evaluation"),
            None => "no input had one".to_string(),
        };
        let op = match &step.op {
            Op::Fused(_) => format!("{}: ", describe(&step.op)),
            _ => String::new(),
        };
        let message = format!(
            "{op}{found} of the {} elements of output {index}, {}, are NaN; {origin}; inputs: {}",
            view.shape.iter().product::<usize>(),
            text(view),
            if inputs.is_empty() { "none".to_string() } else { inputs.join(", ") },
        );
        return Err(Error::Nan { op: step.op.name(), message: message.into() });
    }
    Ok(())
}

/// How many elements are NaN.
fn count(view: &HostView) -> usize {
    /// Elements of a type, by what tells a NaN.
    fn of<T: Copy>(view: &HostView, is_nan: impl Fn(T) -> bool) -> usize {
        let (shape, strides) = (&view.shape, &view.strides);
        if shape.contains(&0) {
            return 0;
        }
        let mut index = vec![0usize; shape.len()];
        let mut found = 0;
        loop {
            let offset: isize = index.iter().zip(strides).map(|(&at, &stride)| at as isize * stride).sum();
            // SAFETY: inside the view, whose memory the evaluator keeps alive, and which no step
            // writes at the moment.
            let value = unsafe { view.pointer.cast::<T>().offset(offset).read_unaligned() };
            found += is_nan(value) as usize;
            let mut axis = shape.len();
            loop {
                if axis == 0 {
                    return found;
                }
                axis -= 1;
                index[axis] += 1;
                if index[axis] < shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
    }
    match view.dtype {
        Dtype::F16 => of(view, |bits: u16| f16::from_bits(bits).is_nan()),
        Dtype::BF16 => of(view, |bits: u16| bf16::from_bits(bits).is_nan()),
        Dtype::F32 => of(view, f32::is_nan),
        Dtype::F64 => of(view, f64::is_nan),
        Dtype::C64 => of(view, |[re, im]: [f32; 2]| re.is_nan() || im.is_nan()),
        _ => 0,
    }
}
