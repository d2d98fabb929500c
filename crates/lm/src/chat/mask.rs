//! Training examples: a conversation tokenized as a whole, and which of its tokens are learnt.
//!
//! Two masks. `assistant`: every turn of the assistant, from the template's `{% generation %}` blocks if it has them;
//! else a turn begins where the prompt for it ends (the conversation up to it, rendered with a generation prompt),
//! and ends where the conversation with it ends, or at the first end-of-sequence token after its content. Each
//! border is checked against the tokens of the whole, never assumed: templates that treat earlier turns differently
//! (Qwen 3 drops their reasoning) do not have the shorter conversation as a beginning of the longer.
//! `last`: the final message alone, as mlx-lm's `mask_prompt`.
//!
//! Masks say which tokens are *targets*; shifting by one is the loss's business.

use std::ops::Range;

use serde_json::Value;

use super::{ChatRequest, ChatTemplate, Conversation, Guard, Message, Rendered};
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// A rendered and tokenized conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChatTokens {
    /// The token ids.
    pub ids: Vec<u32>,
    /// For each token its bytes of the text.
    pub spans: Vec<Range<usize>>,
    /// The text, with what is known about places in it.
    pub rendered: Rendered,
}

impl ChatTokens {
    /// Which tokens stand in `{% generation %}` blocks: those that share a byte with one.
    pub fn generated(&self) -> Vec<bool> {
        let blocks = &self.rendered.generated;
        self.spans
            .iter()
            .map(|span| {
                let next = blocks.partition_point(|block| block.end <= span.start);
                blocks.get(next).is_some_and(|block| block.start < span.end.max(span.start + 1))
            })
            .collect()
    }
}

/// A training example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskedConversation {
    /// The token ids of the whole conversation.
    pub ids: Vec<u32>,
    /// True for the tokens of the assistant's turns, the token that ends each turn included; or why they could not
    /// be told.
    pub assistant: Result<Vec<bool>, String>,
    /// True for the tokens of the final message (mlx-lm's `mask_prompt`); or why they could not be told.
    pub last: Result<Vec<bool>, String>,
}

/// Tokenizes a conversation as a whole and finds the tokens to learn.
///
/// `extra` are further variables of the template. Text of others than the assistant does not become special tokens
/// ([`Guard::Dataset`]).
///
/// # Errors
/// The template refuses or fails, or the text cannot be encoded. That a mask cannot be told is no error of the whole:
/// it stands in the mask's place, for whoever wants that mask.
pub fn tokenize_conversation(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    extra: &serde_json::Map<String, Value>,
) -> Result<MaskedConversation> {
    let turns = Turns { template, tokenizer, conversation, extra };
    let whole = turns.encode(&conversation.messages, false)?;
    let assistant = turns.assistant_mask(&whole)?;
    let last = turns.last_mask(&whole)?;
    Ok(MaskedConversation { ids: whole.ids, assistant, last })
}

struct Turns<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    conversation: &'a Conversation,
    extra: &'a serde_json::Map<String, Value>,
}

impl Turns<'_> {
    fn encode(&self, messages: &[Message], add_generation_prompt: bool) -> Result<ChatTokens> {
        let request = ChatRequest {
            tools: self.conversation.tools.as_deref(),
            add_generation_prompt,
            extra: self.extra.clone(),
            guard: Guard::Dataset,
            ..ChatRequest::new(messages)
        };
        self.template.encode(&request, self.tokenizer)
    }

    /// The tokens of messages that may be refused by the template on their own (an empty list, say).
    fn encode_part(&self, messages: &[Message], add_generation_prompt: bool) -> Option<Vec<u32>> {
        self.encode(messages, add_generation_prompt).ok().map(|tokens| tokens.ids)
    }

    fn assistant_mask(&self, whole: &ChatTokens) -> Result<Result<Vec<bool>, String>> {
        let has_tools = self.conversation.tools.as_ref().is_some_and(|tools| !tools.is_empty());
        if self.template.marks_generation(has_tools) {
            return Ok(Ok(whole.generated()));
        }
        let mut mask = vec![false; whole.ids.len()];
        let mut done = 0;
        for (i, message) in self.conversation.messages.iter().enumerate() {
            if message.role() != "assistant" {
                continue;
            }
            let turn = self.start(whole, i).and_then(|start| Ok(start..self.end(whole, i, start)?));
            match turn {
                Ok(turn) if turn.start >= done && turn.start < turn.end => {
                    mask[turn.clone()].fill(true);
                    done = turn.end;
                }
                // Two messages that the template joins into one turn.
                Ok(turn) if turn.end <= done => {}
                Ok(turn) => {
                    return Ok(Err(format!(
                        "message {i} would be tokens {} to {}, the turn before it ends at {done}",
                        turn.start, turn.end
                    )));
                }
                Err(why) => return Ok(Err(format!("message {i}: {why}"))),
            }
        }
        Ok(Ok(mask))
    }

    fn last_mask(&self, whole: &ChatTokens) -> Result<Result<Vec<bool>, String>> {
        let count = self.conversation.messages.len();
        if count == 0 {
            return Ok(Err("there is no message".into()));
        }
        Ok(self.start(whole, count - 1).map(|start| (0..whole.ids.len()).map(|i| i >= start).collect()))
    }

    /// The token at which message `i` begins.
    fn start(&self, whole: &ChatTokens, i: usize) -> Result<usize, String> {
        let messages = &self.conversation.messages;
        let is_answer = messages[i].role() == "assistant";
        if let Some(prompt) = self.encode_part(&messages[..i], is_answer) {
            if whole.ids.starts_with(&prompt) {
                return Ok(prompt.len());
            }
            // The prompt for an answer may say more than a turn's beginning does (an opened `<think>`, say); then
            // the turn begins where they part, provided that everything before the prompt is the same.
            if is_answer
                && let Some(before) = self.encode_part(&messages[..i], false)
                && whole.ids.starts_with(&before)
            {
                let common = whole.ids.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
                if common > before.len() {
                    return Ok(common);
                }
            }
        }
        match self.content_place(whole, i, Side::Front) {
            Some(place) => Ok(whole.spans.partition_point(|span| span.end <= place)),
            None => Err("the conversation before it is not rendered as a beginning of the whole, and its content is \
                         not found in it; the template may rewrite earlier turns: mark them with {% generation %} \
                         blocks, or train on the last message only"
                .into()),
        }
    }

    /// The token after the last of message `i`.
    fn end(&self, whole: &ChatTokens, i: usize, start: usize) -> Result<usize, String> {
        let messages = &self.conversation.messages;
        if i + 1 == messages.len() {
            return Ok(whole.ids.len());
        }
        if let Some(with) = self.encode_part(&messages[..=i], false)
            && with.len() > start
            && whole.ids.starts_with(&with)
        {
            return Ok(with.len());
        }
        let from = match self.content_place(whole, i, Side::Back) {
            Some(place) => whole.spans.partition_point(|span| span.start < place).max(start),
            None => start,
        };
        let ends = self.tokenizer.eos_ids();
        match whole.ids[from..].iter().position(|id| ends.binary_search(id).is_ok()) {
            Some(at) => Ok(from + at + 1),
            None => {
                Err("its end is not found: the conversation up to it is not rendered as a beginning of the \
                         whole, and no end-of-sequence token follows"
                    .into())
            }
        }
    }

    /// Where the content of message `i` begins or ends in the whole text: where a rendering with a foreign character
    /// at that side of the content departs from it.
    fn content_place(&self, whole: &ChatTokens, i: usize, side: Side) -> Option<usize> {
        const FOREIGN: char = '\u{e0ff}';
        let mut messages = self.conversation.messages.clone();
        let Some(Value::String(content)) = messages[i].0.get_mut("content") else { return None };
        if content.is_empty() || whole.rendered.text.contains(FOREIGN) {
            return None;
        }
        match side {
            Side::Front => content.insert(0, FOREIGN),
            Side::Back => content.push(FOREIGN),
        }
        let changed = self.encode(&messages, false).ok()?.rendered.text;
        let place = changed.find(FOREIGN)?;
        // Only if it is the same text but for that character (and whitespace that it kept from being trimmed).
        let (before, after) = (&changed[..place], &changed[place + FOREIGN.len_utf8()..]);
        let text = &whole.rendered.text;
        let place = match side {
            Side::Front => text.starts_with(before).then_some(before.len()),
            Side::Back => text.ends_with(after).then(|| text.len() - after.len()),
        }?;
        Some(place)
    }
}

#[derive(Clone, Copy)]
enum Side {
    Front,
    Back,
}

#[cfg(test)]
#[path = "mask_tests.rs"]
mod tests;
