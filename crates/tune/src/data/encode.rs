//! The seam between training data and the tokenizer: what sampling needs of one, and nothing more.
//!
//! The real one (tokenizer + chat template) implements it in the crate that has them; tests use
//! [`ByteEncoder`], whose tokens can be counted by eye.

use std::ops::Range;

use serde_json::Value;

/// A conversation as tokens, tokenized in one go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The whole conversation through the chat template.
    pub tokens: Vec<u32>,
    /// For each assistant message, in order, the tokens that the model would have to write: from
    /// after the generation prompt to the end of the turn, its end mark included.
    pub assistant: Vec<Range<usize>>,
    /// Whether the template itself marks what the assistant writes (`{% generation %}` blocks).
    pub marked: bool,
}

/// Turns text and conversations into tokens. Errors are one line of cause.
pub trait Encode: Send + Sync {
    /// Running text, with the mark of the beginning if the tokenizer adds one and never with an end
    /// mark. Text in the data is only text: it never becomes a special token.
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
        let mut conversation = Conversation::default();
        let mut push = |text: &str| {
            conversation.tokens.extend(text.bytes().map(u32::from));
            conversation.tokens.len()
        };
        if !tools.is_empty() {
            push(&format!("<tools:{}>", Value::from(tools.to_vec())));
        }
        for message in messages {
            let role = message["role"].as_str().ok_or("no role")?;
            let content = message["content"].as_str().ok_or("content is no string")?;
            let start = push(&format!("<{role}:"));
            let end = push(&format!("{content}>"));
            if role == "assistant" {
                conversation.assistant.push(start..end);
            }
        }
        Ok(conversation)
    }

    fn has_template(&self) -> bool {
        true
    }

    fn vocabulary(&self) -> u32 {
        257
    }
}
