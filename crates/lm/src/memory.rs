//! Whether something fits in memory, asked before it is begun.

use mica_array::kv::KvFormat;
use mica_array::{Precision, memory};
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

/// A number of bytes with or without a unit; as for memory chips, K, M and G are powers of 1000 and Ki, Mi and Gi of
/// 1024.
///
/// # Errors
/// What was expected, in words.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let bad = || format!("expected a size such as 8GB, 500MB or 2GiB, got {text:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| bad())?;
    let unit = match text[digits..].trim().trim_end_matches(['B', 'b']).to_ascii_lowercase().as_str() {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "t" => 1e12,
        "ki" => 1024.0,
        "mi" => 1024.0 * 1024.0,
        "gi" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(bad()),
    };
    let bytes = number * unit;
    if bytes < 1e18 { Ok(bytes as u64) } else { Err(bad()) }
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
        let input = Input { last_only: !all_logits, ..Input::new(&[&tokens], &[0])? };
        Ok(model.logits(&input, None, &Context::new(precision))?.eval()?)
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
    (format, precision): (KvFormat, Precision),
) -> Result<u64> {
    let cache = model.new_cache(1, format);
    let page = mica_array::kv::PAGE;
    let positions = length.div_ceil(page) as u64 * page as u64 * batch as u64;
    let kept = positions * cache.kv.spec().bytes_per_position() as u64;
    Ok(kept + forward(model, prompt.clamp(1, PREFILL), false, precision)?)
}
