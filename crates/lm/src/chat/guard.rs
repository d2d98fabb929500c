//! Keeping text that only looks like a control token from becoming one.
//!
//! Before rendering, a sentinel character is put into every string of the request where a control token might be
//! read: after the first character of a lookalike, and wherever a string ends with the beginning of a token or begins
//! with the end of one, since a template may put two strings side by side. After rendering the sentinels are taken
//! out again; what remains of them are [`Cut`]s, places that no control token may span. The text is then tokenized as
//! a whole, with those cuts.
//!
//! Strings without a `<` or another such character are not touched at all, and in the others only templates that look
//! for control tokens *inside user text* can see a difference: they no longer find any, as it should be.
//!
//! Which tokens count: all special ones, and those of the added vocabulary that stand in the template's source
//! (`<think>`, `<tool_call>`), which vocabularies often do not mark special. `transformers` chooses the same
//! (`sanitize_control_tokens`).
//!
//! Not covered: a template that builds a token around a whole string, as Phi's `'<|' + role + '|>'`. Roles are
//! structure; whoever takes them from outside checks them.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::Rendered;
use super::source::{BEGIN, END};
use crate::error::{Error, Result};
use crate::tokenizer::{Cut, CutScope, Tokenizer};

/// Which text is kept from becoming control tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Guard {
    /// For answering people. Messages of users and tools, definitions of tools and further variables cannot make any
    /// control token. Messages of the system and the assistant cannot make special tokens, but they can write tokens
    /// such as `<think>` and `<tool_call>` that are not marked special, as instructions and earlier answers do.
    #[default]
    Chat,
    /// For training. Messages of the assistant are left alone, since a dataset may write out its control tokens;
    /// all others cannot make special tokens.
    Dataset,
    /// Everything may make any token, as in `transformers` by default.
    Off,
}

/// How a string is marked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Care {
    None,
    /// Against special tokens, only where there is one.
    Special,
    /// Against all control tokens, after every character that might begin one.
    Control,
}

/// The control tokens of a tokenizer and a template.
pub(super) struct Words {
    special: Lookalikes,
    /// Special ones included.
    all: Lookalikes,
    /// Ids of those that are not special, ascending.
    pub control: Arc<[u32]>,
}

/// Tokens, arranged by what a text that looks like one of them begins with.
#[derive(Default)]
struct Lookalikes {
    /// Tokens by their first character.
    tokens: BTreeMap<char, Vec<String>>,
    /// Ends of tokens by their first character.
    ends: BTreeMap<char, Vec<String>>,
    /// The length of the longest token.
    longest: usize,
}

impl Lookalikes {
    fn add(&mut self, token: &str) {
        let Some(first) = token.chars().next() else { return };
        self.longest = self.longest.max(token.len());
        self.tokens.entry(first).or_default().push(token.to_owned());
        for end in proper_suffixes(token) {
            let ends = self.ends.entry(end.chars().next().unwrap_or_default()).or_default();
            if !ends.iter().any(|other| other == end) {
                ends.push(end.to_owned());
            }
        }
    }

    /// The places in a text at which it must be cut: `care` says how far that goes.
    fn places(&self, text: &str, care: Care) -> Vec<usize> {
        let mut places = Vec::new();
        // In front, if the text (or what is left of it once trimmed) begins with the end of a token.
        let head = text.trim_start();
        if let Some(ends) = head.chars().next().and_then(|first| self.ends.get(&first))
            && ends.iter().any(|end| head.starts_with(end.as_str()))
        {
            places.push(text.len() - head.len());
        }
        let tail = text.trim_end();
        for (&first, tokens) in &self.tokens {
            // Everywhere it might begin: a template that removes something may join what was apart. Letters are
            // too common for that.
            let everywhere = care == Care::Control && !first.is_alphanumeric();
            for (at, _) in text.match_indices(first) {
                // To the end of the text, or of what is left of it once trimmed, a beginning is enough.
                let is_beginning = |token: &String| {
                    text[at..].starts_with(token.as_str())
                        || text.len() - at < self.longest && token.starts_with(&text[at..])
                        || at < tail.len() && tail.len() - at < self.longest && token.starts_with(&tail[at..])
                };
                if everywhere || tokens.iter().any(is_beginning) {
                    places.push(at + first.len_utf8());
                }
            }
        }
        places.sort_unstable();
        places.dedup();
        places
    }
}

impl Words {
    pub fn new(tokenizer: &Tokenizer, source: &str) -> Self {
        let (mut special, mut all, mut control) = (Lookalikes::default(), Lookalikes::default(), Vec::new());
        for (id, text, is_special) in tokenizer.added_tokens() {
            // Whitespace is ordinary text, also where a vocabulary has tokens for it.
            if text.trim().is_empty() {
                continue;
            }
            if is_special {
                special.add(text);
            } else if source.contains(text) {
                control.push(id);
            } else {
                continue;
            }
            all.add(text);
        }
        Self { special, all, control: control.into() }
    }

    /// Marks the strings of a context, all but the template's own tokens.
    pub fn mark<'a>(
        &self,
        context: &mut Map<String, Value>,
        guard: Guard,
        sentinels: &Sentinels,
        own: impl Iterator<Item = &'a String>,
    ) {
        let own: Vec<&String> = own.collect();
        let others = if guard == Guard::Dataset { Care::Special } else { Care::Control };
        for (name, value) in context.iter_mut() {
            match value {
                Value::Array(messages) if name == "messages" => {
                    for message in messages {
                        let care = match (guard, message["role"].as_str()) {
                            (Guard::Off, _) | (Guard::Dataset, Some("assistant")) => Care::None,
                            (Guard::Chat, Some("assistant" | "system" | "developer")) => Care::Special,
                            _ => others,
                        };
                        self.mark_value(message, care, sentinels);
                    }
                }
                value if !own.contains(&name) => self.mark_value(value, others, sentinels),
                _ => {}
            }
        }
    }

    fn mark_value(&self, value: &mut Value, care: Care, sentinels: &Sentinels) {
        match value {
            Value::String(text) => {
                if let Some(marked) = self.mark_text(text, care, sentinels) {
                    *text = marked;
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark_value(item, care, sentinels)),
            Value::Object(map) => {
                // Keys too (a tool's parameters are named by others). Equal strings stay equal, so lookups work.
                *map = std::mem::take(map)
                    .into_iter()
                    .map(|(key, mut value)| {
                        self.mark_value(&mut value, care, sentinels);
                        (self.mark_text(&key, care, sentinels).unwrap_or(key), value)
                    })
                    .collect();
            }
            _ => {}
        }
    }

    /// The text with sentinels, `None` if it needs none.
    fn mark_text(&self, text: &str, care: Care, sentinels: &Sentinels) -> Option<String> {
        let (words, sentinel) = match care {
            Care::None => return None,
            Care::Special => (&self.special, sentinels.special),
            Care::Control => (&self.all, sentinels.control),
        };
        let places = words.places(text, care);
        if places.is_empty() {
            return None;
        }
        let mut marked = String::with_capacity(text.len() + 4 * places.len());
        let mut done = 0;
        for at in places {
            marked.push_str(&text[done..at]);
            marked.push(sentinel);
            done = at;
        }
        marked.push_str(&text[done..]);
        Some(marked)
    }
}

/// The ends of a word, without the whole. A letter alone is too common to be the end of anything.
fn proper_suffixes(word: &str) -> impl Iterator<Item = &str> {
    word.char_indices()
        .skip(1)
        .map(|(at, _)| &word[at..])
        .filter(|end| end.chars().count() > 1 || !end.starts_with(char::is_alphanumeric))
}

/// Characters that stand for places, and occur nowhere in the request.
pub(super) struct Sentinels {
    /// Special tokens may not span this place.
    special: char,
    /// Control tokens may not span this place.
    control: char,
    begin: char,
    end: char,
}

/// Unicode's noncharacters, reserved for use inside of programs, and the last private ones.
fn candidates() -> impl Iterator<Item = char> {
    ('\u{fdd0}'..='\u{fdef}').chain('\u{10ff00}'..='\u{10fffd}')
}

/// Whether a character can have been chosen as a sentinel.
pub(super) fn may_be_sentinel(c: char) -> bool {
    matches!(c, '\u{fdd0}'..='\u{fdef}' | '\u{10ff00}'..='\u{10fffd}')
}

impl Sentinels {
    /// Four characters that are not in the context's strings, nor in the template.
    ///
    /// # Errors
    /// When all 286 are used, which only someone who means it can do; or when JSON is nested too deep.
    pub fn not_in(context: &Map<String, Value>, source: &str) -> Result<Self> {
        let mut used = std::collections::HashSet::new();
        let mut note = |text: &str| used.extend(text.chars().filter(|&c| may_be_sentinel(c)));
        note(source);
        for (name, value) in context {
            note(name);
            visit(value, 0, &mut note)?;
        }
        let mut free = candidates().filter(|c| !used.contains(c));
        match (free.next(), free.next(), free.next(), free.next()) {
            (Some(special), Some(control), Some(begin), Some(end)) => {
                Ok(Self { special, control, begin, end })
            }
            _ => Err(Error::Usage("the messages use up all noncharacters of Unicode".into())),
        }
    }

    /// Gives the template the characters that enclose generated text.
    pub fn add_to(&self, context: &mut Map<String, Value>) {
        context.insert(BEGIN.into(), self.begin.to_string().into());
        context.insert(END.into(), self.end.to_string().into());
    }

    /// Takes the sentinels out of a rendered text, and says where they were.
    pub fn take_out(&self, output: &str, control: &Arc<[u32]>) -> Result<Rendered, String> {
        let mut rendered = Rendered { text: String::with_capacity(output.len()), ..Default::default() };
        let mut begun = None;
        for c in output.chars() {
            let at = rendered.text.len();
            if c == self.special {
                rendered.cuts.push(Cut { at, scope: CutScope::Special });
            } else if c == self.control {
                rendered.cuts.push(Cut { at, scope: CutScope::Control(control.clone()) });
            } else if c == self.begin {
                if begun.replace(at).is_some() {
                    return Err("a generation block stands inside of another".into());
                }
            } else if c == self.end {
                match begun.take() {
                    Some(start) if start < at => rendered.generated.push(start..at),
                    Some(_) => {}
                    None => return Err("a generation block ends that did not begin".into()),
                }
            } else {
                rendered.text.push(c);
            }
        }
        if begun.is_some() {
            return Err("the output ends inside of a generation block".into());
        }
        Ok(rendered)
    }
}

/// Calls `note` with every string and key of a JSON value.
fn visit(value: &Value, depth: usize, note: &mut impl FnMut(&str)) -> Result<()> {
    const DEEPEST: usize = 128;
    if depth > DEEPEST {
        return Err(Error::Usage(format!("messages or tools are nested more than {DEEPEST} deep")));
    }
    match value {
        Value::String(text) => note(text),
        Value::Array(items) => items.iter().try_for_each(|item| visit(item, depth + 1, note))?,
        Value::Object(map) => {
            for (key, value) in map {
                note(key);
                visit(value, depth + 1, note)?;
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
