//! What a template may build while it runs: fuel counts its instructions, but one instruction can make a string or a
//! list of any size, out of which the next makes a larger one.
//!
//! Filters, methods and operators that make large values of small ones tell here, before they do, how large they will
//! be. The engine bounds repetition (`'x' * n`, `[x] * n`) itself, at 100 million; a repeated list takes no memory
//! until it is gone through, which is where it is counted.

use std::cell::Cell;

use minijinja::value::{Kwargs, Rest, StringInput, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, Output, State, filters};

/// Most bytes of one value.
const EACH: usize = 64 << 20;
/// Most bytes that are built in all. A loop that lengthens a text by its pieces builds a hundred times what it has in
/// the end, which makes this so much more.
const ALL: usize = 1 << 30;
/// What an item of a list is counted as.
const ITEM: usize = 32;
/// Lists within lists that are looked into.
const DEPTH: usize = 200;

/// The filter that counts the left operand of `~` and `+`.
pub(super) const PIECE: &str = "mica_piece";

std::thread_local! {
    static LEFT: Cell<usize> = const { Cell::new(ALL) };
}

/// Begins a rendering.
pub(super) fn begin() {
    LEFT.set(ALL);
}

/// Whether a value may have so many bytes.
pub(super) fn fits(bytes: usize) -> Result<(), Error> {
    if bytes <= EACH {
        return Ok(());
    }
    let text = format!("the template builds a value of more than {} MiB", EACH >> 20);
    Err(Error::new(ErrorKind::InvalidOperation, text))
}

/// Counts a value of so many bytes that is about to be built.
pub(super) fn charge(bytes: usize) -> Result<(), Error> {
    fits(bytes)?;
    let left = LEFT.get();
    if bytes > left {
        let text = format!("the template builds more than {} MiB of values", ALL >> 20);
        return Err(Error::new(ErrorKind::InvalidOperation, text));
    }
    LEFT.set(left - bytes);
    Ok(())
}

/// What replacing in `text` makes of it.
pub(super) fn replaced(text: &str, from: &str, to: &str, most: usize) -> Result<String, Error> {
    let found = if from.is_empty() { text.chars().count() + 1 } else { text.matches(from).count() };
    let found = found.min(most);
    charge((text.len() - found * from.len()).saturating_add(found.saturating_mul(to.len())))?;
    Ok(text.replacen(from, to, found))
}

/// The bytes of a value as text or as a list, with what lists within it hold; stops once it is too much.
pub(super) fn weight(value: &Value) -> usize {
    fn walk(value: &Value, depth: usize, sum: &mut usize) {
        if let Some(text) = value.as_str() {
            *sum = sum.saturating_add(text.len());
            return;
        }
        let kind = value.kind();
        if depth > DEPTH || !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
            return;
        }
        // What has no length is made while it is gone through, of something that was counted.
        let Some(count) = value.len() else { return };
        *sum = sum.saturating_add(count.saturating_mul(ITEM));
        if *sum > EACH {
            return;
        }
        for item in value.try_iter().into_iter().flatten() {
            walk(&item, depth + 1, sum);
            if kind == ValueKind::Map
                && let Ok(item) = value.get_item(&item)
            {
                walk(&item, depth + 1, sum);
            }
            if *sum > EACH {
                return;
            }
        }
    }
    let mut sum = 0;
    walk(value, 0, &mut sum);
    sum
}

/// The items of a value, not those of lists within it.
fn items(value: &Value) -> usize {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
            value.len().unwrap_or(0).saturating_mul(ITEM)
        }
        _ => 0,
    }
}

/// Has an environment count.
pub(super) fn add_to(env: &mut Environment<'static>) {
    env.set_formatter(print);
    env.add_filter(PIECE, piece);
    env.add_filter("replace", replace);
    env.add_filter("join", join);
    // These go through their value, and most of them make a list of it.
    for (name, filter) in [
        ("list", Value::from_function(filters::list)),
        ("sort", Value::from_function(filters::sort)),
        ("unique", Value::from_function(filters::unique)),
        ("reverse", Value::from_function(filters::reverse)),
        ("groupby", Value::from_function(filters::groupby)),
        ("batch", Value::from_function(filters::batch)),
        ("slice", Value::from_function(filters::slice)),
        ("map", Value::from_function(filters::map)),
        ("select", Value::from_function(filters::select)),
        ("reject", Value::from_function(filters::reject)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("sum", Value::from_function(filters::sum)),
        ("min", Value::from_function(filters::min)),
        ("max", Value::from_function(filters::max)),
        ("last", Value::from_function(filters::last)),
    ] {
        env.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            args.iter().try_for_each(|value| charge(items(value)))?;
            filter.call(state, &args)
        });
    }
    // These make text of their value.
    for (name, filter) in
        [("string", Value::from_function(filters::string)), ("pprint", Value::from_function(filters::pprint))]
    {
        env.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            args.iter().try_for_each(|value| charge(weight(value)))?;
            filter.call(state, &args)
        });
    }
    env.add_filter("indent", indent);
}

/// What `{{ value }}` writes; the output itself is bounded where it goes.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if value.as_str().is_none() {
        charge(weight(value))?;
    }
    minijinja::escape_formatter(out, state, value)
}

fn piece(value: Value) -> Result<Value, Error> {
    // A list that grows by one item in each round is shared, not copied: an item counts less here.
    charge(if value.as_str().is_some() { weight(&value) } else { items(&value) / 4 })?;
    Ok(value)
}

fn replace(value: StringInput<'_>, from: StringInput<'_>, to: StringInput<'_>) -> Result<String, Error> {
    replaced(value.as_str(), from.as_str(), to.as_str(), usize::MAX)
}

fn join(
    state: &mut State,
    value: &Value,
    joiner: Option<StringInput<'_>>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let between = joiner.as_ref().map_or(0, |joiner| joiner.as_str().len());
    charge(joined(value, between))?;
    filters::join(state, value, joiner, attribute, kwargs)
}

/// What joining the items of a value takes.
pub(super) fn joined(value: &Value, between: usize) -> usize {
    weight(value).saturating_add(value.len().unwrap_or(0).saturating_mul(between))
}

fn indent(state: &mut State, text: StringInput<'_>, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let width = args.iter().find_map(|value| match value.kind() {
        ValueKind::Number => value.as_usize(),
        // Keyword arguments.
        ValueKind::Map => value.get_attr("width").ok().and_then(|width| width.as_usize()),
        _ => None,
    });
    let lines = text.as_str().matches('\n').count() + 1;
    charge(text.as_str().len().saturating_add(lines.saturating_mul(width.unwrap_or(4))))?;
    let all: Vec<Value> = std::iter::once(Value::from(text.as_str())).chain(args).collect();
    Value::from_function(filters::indent).call(state, &all)
}
