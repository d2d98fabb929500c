//! Whether something fits in memory, asked before it is begun.

use mica_array::kv::KvFormat;
use mica_array::{Array, Precision, memory};
use mica_nn::{Context, parameters};

use crate::generate::PREFILL;
use crate::models::{Asked, Input, LanguageModel};
use crate::{Error, Result};

/// Fails unless `bytes` more fit in memory; `what` takes them, and `todo` says how it could take less.
///
/// # Errors
/// [`Error::Memory`], with what is needed and what there is. Where the system does not say what there is, nothing
/// is refused.
pub fn check(bytes: u64, what: &str, todo: &str) -> Result<()> {
    let lacking = || memory::room().filter(|room| room.bytes < bytes);
    let Some(room) = lacking().and_then(|_| {
        // What was freed and is kept for reuse counts as used.
        memory::clear_cache();
        lacking()
    }) else {
        return Ok(());
    };
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
    pass(model, &[&vec![0; length]], all_logits, precision)
}

/// Bytes that a step of decoding takes for a moment, with a token and the logits of each of `batch` sequences.
pub fn step(model: &dyn LanguageModel, batch: usize, precision: Precision) -> Result<u64> {
    pass(model, &vec![&[0][..]; batch], false, precision)
}

fn pass(model: &dyn LanguageModel, rows: &[&[u32]], all_logits: bool, precision: Precision) -> Result<u64> {
    // What is still to be computed of the model must not be found computed, without values, afterwards.
    let all: Vec<_> = parameters(model.as_module()).into_iter().map(|(_, array)| array).collect();
    mica_array::eval(&all)?;
    let (result, rehearsal) = memory::rehearse(|| -> Result<()> {
        let asked = if all_logits { Asked::All } else { Asked::Last };
        let input = Input { asked, ..Input::new(rows, &vec![0; rows.len()])? };
        Ok(model.logits(&input, None, &Context::new(precision))?.eval()?)
    });
    result?;
    Ok(rehearsal.bytes)
}

/// Bytes that keys and values of `batch` sequences of `length` tokens take: whole pages.
pub fn kept(model: &dyn LanguageModel, length: usize, batch: usize, format: KvFormat) -> u64 {
    let pages = (length.div_ceil(mica_array::kv::PAGE) as u64).saturating_mul(batch as u64);
    pages.saturating_mul(model.new_cache(1, format).kv.spec().page_bytes())
}

/// Bytes of weights that a step of decoding reads, as they lie in memory: all but the table of embeddings, of which it
/// reads a row a sequence, unless that is the output head too.
pub fn weights_read(model: &dyn LanguageModel) -> u64 {
    let names = parameters(model.as_module());
    let has_head = names.iter().any(|(name, _)| name.starts_with("lm_head."));
    let bytes = |array: &Array| match array.packed() {
        Some(weight) => weight.bytes(),
        None => array.size() * array.dtype().size(),
    };
    let sum =
        |list: &mut dyn Iterator<Item = &(String, Array)>| list.map(|(_, array)| bytes(array) as u64).sum();
    let table = sum(&mut names.iter().filter(|(name, _)| name.starts_with("model.embed_tokens.")));
    read_a_step(sum(&mut names.iter()), table, !has_head)
}

/// What of these bytes of all weights a step of decoding reads, with those of the table of embeddings given, and
/// whether that is the output head too.
pub fn read_a_step(all: u64, table: u64, tied: bool) -> u64 {
    if tied { all } else { all - table }
}

/// Bytes that keys and values of `batch` sequences of `length` tokens and reading `prompt` tokens into them take.
pub fn generation(
    model: &dyn LanguageModel,
    prompt: usize,
    length: usize,
    batch: usize,
    (format, precision): (KvFormat, Precision),
) -> Result<u64> {
    let pass = forward(model, prompt.clamp(1, PREFILL), false, precision)?;
    Ok(kept(model, length, batch, format).saturating_add(pass))
}
