//! Fused ops: norms, rotary positions, attention, convolution.

use super::Lowered;
use crate::Result;
use crate::backend::Step;

pub(super) fn lower(step: &Step) -> Result<Lowered> {
    Ok(super::by_reference(step))
}
