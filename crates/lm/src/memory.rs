//! Whether something fits in memory, asked before it is begun.

use mica_array::{Dtype, Precision, memory};
use mica_nn::{Context, parameters};

use crate::generate::PREFILL;
use crate::models::{Input, LanguageModel};
use crate::{Error, Result};

/// Fails unless `bytes` more fit in memory; `what` takes them, and `todo` says how it could take less.
///
/// # Errors
/// [`Error::Memory`], with what is needed and what there is. Where the system does not say what there is, nothing
/// is refused.
pub fn check(bytes: u64, what: &str, todo: &str) -> Result<()> {
    let Some(room) = memory::room().filter(|room| room.bytes < bytes) else { return Ok(()) };
    Err(Error::Memory(format!(
        "{what} needs {} more memory, and {} are left {}: {todo}",
        size(bytes),
        size(room.bytes),
        room.bound
    )))
}

/// Bytes in the unit that suits them.
pub fn size(bytes: u64) -> String {
    match bytes {
        100_000_000.. => format!("{:.2} GB", bytes as f64 / 1e9),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

/// Bytes that a forward pass over `length` tokens takes for a moment, with the logits of all of them or of the last.
/// Found by planning it, without computing anything.
pub fn forward(
    model: &dyn LanguageModel,
    length: usize,
    all_logits: bool,
    precision: Precision,
) -> Result<u64> {
    // What is still to be computed of the model must not be found computed, without values, afterwards.
    let all: Vec<_> = parameters(model.as_module()).into_iter().map(|(_, array)| array).collect();
    mica_array::eval(&all)?;
    let tokens = vec![0; length];
    let (result, rehearsal) = memory::rehearse(|| -> Result<()> {
        let hidden = model.hidden(&Input::new(&[&tokens], &[0])?, None, &Context::new(precision))?;
        let read = if all_logits { hidden } else { hidden.narrow(1, length - 1, length)? };
        Ok(read.linear(model.head(), None, precision)?.eval()?)
    });
    result?;
    Ok(rehearsal.bytes)
}

/// Bytes that keys and values of `batch` sequences of `length` tokens and reading `prompt` tokens into them take.
pub fn generation(
    model: &dyn LanguageModel,
    prompt: usize,
    length: usize,
    batch: usize,
    (dtype, precision): (Dtype, Precision),
) -> Result<u64> {
    let cache = model.new_cache(1, dtype);
    let page = mica_array::kv::PAGE;
    let positions = length.div_ceil(page) as u64 * page as u64 * batch as u64;
    let kept = positions * cache.kv.spec().bytes_per_position() as u64;
    Ok(kept + forward(model, prompt.clamp(1, PREFILL), false, precision)?)
}
