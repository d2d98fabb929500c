//! Products of complex matrices, as four real ones.

use mica_threads::Task;

use super::Lowered;
use super::products::product;
use crate::backend::reference::complex::part_of;
use crate::backend::{HostView, Step};
use crate::op::{Precision, UnaryOp};
use crate::{Dtype, Result};

/// (A + iB)(C + iD) = (AC − BD) + i(AD + BC): each part one chain over AC or AD, then −BD or BC added.
pub(super) fn matmul(step: &Step) -> Result<Lowered> {
    let (x, y, out) = (step.inputs[0].host()?, step.inputs[1].host()?, step.outputs[0].host()?);
    let (a, b) = (part_of(x, 0), part_of(x, 1));
    let (c, d) = (part_of(y, 0), part_of(y, 1));
    let (re, im) = (part_of(out, 0), part_of(out, 1));
    let negated = x.shape.iter().product::<usize>() * 4;
    let rest = negated.next_multiple_of(64);
    let shape = x.shape.clone();
    let minus_b = move |workspace: *mut u8| HostView {
        pointer: workspace,
        strides: mica_kernels::view::contiguous_strides(&shape).as_slice().into(),
        shape: shape.clone(),
        dtype: Dtype::F32,
    };
    let bytes = {
        let placeholder = minus_b(std::ptr::dangling_mut::<u64>().cast());
        let re_ac = product(&a, &c, &re, Precision::Exact, false)?.bytes();
        let re_bd = product(&placeholder, &d, &re, Precision::Exact, true)?.bytes();
        let im_ad = product(&a, &d, &im, Precision::Exact, false)?.bytes();
        let im_bc = product(&b, &c, &im, Precision::Exact, true)?.bytes();
        re_ac.max(re_bd).max(im_ad).max(im_bc)
    };
    Ok(Lowered::WithWorkspace(
        rest + bytes,
        Box::new(move |workspace, list: &mut Vec<Box<dyn Task>>| {
            let minus = minus_b(workspace);
            list.push(mica_kernels::elementwise::unary(UnaryOp::Neg, b.view(), minus.view_mut())?);
            for (left, right, to, accumulate) in
                [(&a, &c, &re, false), (&minus, &d, &re, true), (&a, &d, &im, false), (&b, &c, &im, true)]
            {
                product(left, right, to, Precision::Exact, accumulate)?
                    .give(workspace.wrapping_add(rest), list)?;
            }
            Ok(())
        }),
    ))
}
