//! The seam between training data and the tokenizer: what sampling needs of one, and nothing more.
//!
//! The real one (tokenizer + chat template) implements it in the crate that has them; tests use
//! [`ByteEncoder`], whose tokens can be counted by eye.

use std::ops::Range;

use serde_json::Value;

/// A conversation as tokens, tokenized in one go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// The whole conversation through the chat template.
    pub tokens: Vec<u32>,
    /// For each turn of the assistant, in order, the tokens that the model would have to write: from
    /// after the generation prompt to the end of the turn, its end mark included. Or why they cannot be told.
    pub assistant: Result<Vec<Range<usize>>, String>,
    /// The same of the last message alone, whoever speaks.
    pub last: Result<Vec<Range<usize>>, String>,
    /// Whether the template itself marks what the assistant writes (`{% generation %}` blocks).
    pub marked: bool,
}

/// Turns text and conversations into tokens. Errors are one line of cause.
pub trait Encode: Send + Sync {
    /// Running text, with what the tokenizer adds by itself (a mark of the beginning, often). Special tokens
    /// that are written out in it count as such, since prepared texts contain them.
    fn text(&self, text: &str) -> Result<Vec<u32>, String>;

    /// The mark of the end of a text, which is also learnt. `None` if the tokenizer has none.
    fn eos(&self) -> Option<u32>;

    /// A conversation through the chat template, without a generation prompt at its end.
    fn conversation(&self, messages: &[Value], tools: &[Value]) -> Result<Conversation, String>;

    /// Whether conversations can be encoded at all.
    fn has_template(&self) -> bool;

    /// One past the largest token id, for checking ids made elsewhere.
    fn vocabulary(&self) -> u32;
}

/// A tokenizer for tests: a token is a byte, and a conversation is `<role:content>` one after another,
/// where `<assistant:` is the generation prompt and `>` the end of the turn.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByteEncoder;

impl ByteEncoder {
    /// The end mark.
    pub const EOS: u32 = 256;
}

impl Encode for ByteEncoder {
    fn text(&self, text: &str) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn eos(&self) -> Option<u32> {
        Some(Self::EOS)
    }

    fn conversation(&self, messages: &[Value], tools: &[Value]) -> Result<Conversation, String> {
        let (mut tokens, mut assistant, mut last) = (Vec::new(), Vec::new(), 0..0);
        let mut push = |text: &str| {
            tokens.extend(text.bytes().map(u32::from));
            tokens.len()
        };
        if !tools.is_empty() {
            push(&format!("<tools:{}>", Value::from(tools.to_vec())));
        }
        for message in messages {
            let role = message["role"].as_str().ok_or("no role")?;
            let content = message["content"].as_str().ok_or("content is no string")?;
            let start = push(&format!("<{role}:"));
            last = start..push(&format!("{content}>"));
            if role == "assistant" {
                assistant.push(last.clone());
            }
        }
        Ok(Conversation { tokens, assistant: Ok(assistant), last: Ok(vec![last]), marked: false })
    }

    fn has_template(&self) -> bool {
        true
    }

    fn vocabulary(&self) -> u32 {
        257
    }
}
