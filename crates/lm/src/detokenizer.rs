//! Text from tokens as they come.
//!
//! A token may end in the middle of a character, decoders drop a space at the very beginning, and byte tokens are
//! text only once their run is over. [`Streaming`] hands out text as soon as it is certain, so that the pieces joined
//! are exactly what [`Tokenizer::decode`] makes of the whole sequence.
//!
//! One consequence: in vocabularies with byte tokens (`<0xE5>`; Llama 2, Gemma) a run of them is text only if the
//! *whole* run is UTF-8, so it is held back until another token or the end comes.

use crate::error::Result;
use crate::tokenizer::{Decoding, Tokenizer, byte_token, replaced};

/// Turns token ids into pieces of text, one at a time; each id costs time in proportion to its own text.
#[derive(Debug, Clone)]
pub struct Streaming {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Whether a token has been seen (the first may be treated differently).
    started: bool,
    /// Bytes that are not text yet: the beginning of a character, or a run of byte tokens.
    held: Vec<u8>,
    /// How many characters may still be stripped from the beginning of the text.
    strip: usize,
    window: Window,
}

/// For decoders of unknown make: all ids, and where decoding has to start so that the next token's text comes out
/// as it does in the whole.
#[derive(Debug, Clone, Default)]
struct Window {
    ids: Vec<u32>,
    /// Decoding starts here.
    prefix: usize,
    /// The text of the ids up to here is out.
    read: usize,
    /// What is out.
    text: String,
}

impl Streaming {
    /// A detokenizer at the beginning of a sequence. With `skip_special`, special tokens make no text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let strip = match tokenizer.decoding() {
            Decoding::Pieces { strip: Some((_, count)), .. } => *count,
            _ => 0,
        };
        Self {
            tokenizer: tokenizer.clone(),
            skip_special,
            started: false,
            held: Vec::new(),
            strip,
            window: Window::default(),
        }
    }

    /// The text that a further token makes certain; often empty, never split inside a character.
    ///
    /// # Errors
    /// When the folder's own decoder fails (of the three common kinds none does).
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        let tokenizer = self.tokenizer.clone();
        let Some(token) = tokenizer.token(id) else {
            return Ok(String::new());
        };
        let first = !std::mem::replace(&mut self.started, true);
        Ok(match tokenizer.decoding() {
            Decoding::ByteLevel => {
                self.held.extend_from_slice(&tokenizer.decoding().bytes(&token));
                take_characters(&mut self.held)
            }
            Decoding::Pieces { replace, bytes, strip } => {
                let text = replaced(&token, replace);
                if let (true, Some(byte)) = (*bytes, byte_token(&text)) {
                    self.held.push(byte);
                    return Ok(String::new());
                }
                let text = self.end_byte_run() + &text;
                self.strip_front(text, strip.map(|(mark, _)| mark))
            }
            Decoding::Metaspace { mark, drop_first } => {
                token.replace(*mark, if first && *drop_first { "" } else { " " })
            }
            Decoding::Other => return self.window.push(&tokenizer, id, self.skip_special),
        })
    }

    /// The text that is still held back, at the end of the sequence. The detokenizer is then as new.
    ///
    /// # Errors
    /// As [`Streaming::push`].
    pub fn finish(&mut self) -> Result<String> {
        let rest = match self.tokenizer.decoding() {
            Decoding::Other => self.window.finish(&self.tokenizer, self.skip_special)?,
            Decoding::Pieces { strip, .. } => {
                let mark = strip.map(|(mark, _)| mark);
                let text = self.end_byte_run();
                self.strip_front(text, mark)
            }
            _ => String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned(),
        };
        *self = Self::new(&self.tokenizer, self.skip_special);
        Ok(rest)
    }

    /// The text of a run of byte tokens: itself if it is UTF-8, else U+FFFD for every byte, as the decoder has it.
    fn end_byte_run(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.held))
            .unwrap_or_else(|e| "\u{fffd}".repeat(e.as_bytes().len()))
    }

    fn strip_front(&mut self, text: String, mark: Option<char>) -> String {
        let Some(mark) = mark else { return text };
        let mut rest = text.as_str();
        while self.strip > 0 && !rest.is_empty() {
            match rest.strip_prefix(mark) {
                Some(after) => {
                    rest = after;
                    self.strip -= 1;
                }
                None => self.strip = 0,
            }
        }
        rest.to_owned()
    }
}

/// Takes the complete characters from the front of `bytes`, with U+FFFD for what can no longer become one, exactly
/// as `String::from_utf8_lossy` would; what may still become a character stays.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(e) => {
                let (valid, after) = rest.split_at(e.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                let Some(bad) = e.error_len() else { break };
                text.push('\u{fffd}');
                rest = &rest[bad..];
            }
        }
    }
    let kept = rest.len();
    bytes.drain(..bytes.len() - kept);
    text
}

impl Window {
    /// Decodes the last tokens with and without the new one; the difference is its text. (The method of the
    /// tokenizers crate's `DecodeStream`, with a bound on how long it waits for a character to be complete.)
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, skip_special: bool) -> Result<String> {
        const LONGEST_WAIT: usize = 16;
        self.ids.push(id);
        let before = tokenizer.decode(&self.ids[self.prefix..self.read], skip_special)?;
        let after = tokenizer.decode(&self.ids[self.prefix..], skip_special)?;
        let waited = self.ids.len() - self.read;
        if after.ends_with('\u{fffd}') && waited < LONGEST_WAIT {
            return Ok(String::new());
        }
        let Some(new) = after.strip_prefix(before.as_str()) else {
            return Ok(String::new());
        };
        let new = new.to_owned();
        self.prefix = self.read;
        self.read = self.ids.len();
        self.text.push_str(&new);
        Ok(new)
    }

    fn finish(&mut self, tokenizer: &Tokenizer, skip_special: bool) -> Result<String> {
        let whole = tokenizer.decode(&self.ids, skip_special)?;
        // A decoder that looks further back than the window can make this differ; what is out cannot be taken back.
        Ok(whole.strip_prefix(self.text.as_str()).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{NamedTokens, tests as samples};
    use proptest::prelude::*;

    fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
        let custom = |name: &'static str, decoder: serde_json::Value| {
            let mut json: serde_json::Value = serde_json::from_str(&samples::pieces_json()).unwrap();
            json["decoder"] = decoder;
            let inner = json.to_string().parse().unwrap();
            (name, Tokenizer::from_parts(name, inner, NamedTokens::default(), vec![]).unwrap())
        };
        vec![
            ("byte level", samples::byte_level()),
            custom(
                "pieces",
                serde_json::json!({"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
            ),
            custom(
                "pieces without strip",
                serde_json::json!({"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                    {"type": "Fuse"}]}),
            ),
            custom(
                "strip two",
                serde_json::json!({"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 2, "stop": 0}]}),
            ),
            custom(
                "metaspace",
                serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}),
            ),
            custom(
                "metaspace never",
                serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true}),
            ),
            custom("word pieces", serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
            custom("no decoder", serde_json::Value::Null),
        ]
    }

    fn stream(t: &Tokenizer, ids: &[u32], skip: bool) -> String {
        let mut streaming = Streaming::new(t, skip);
        let mut text: String = ids.iter().map(|&id| streaming.push(id).unwrap()).collect();
        text.push_str(&streaming.finish().unwrap());
        text
    }

    #[test]
    fn text_comes_as_soon_as_a_character_is_whole() {
        let t = samples::byte_level();
        let ids: Vec<u32> =
            "é😀".bytes().map(|b| t.id(&samples::byte_char(b).to_string()).unwrap()).collect();
        let mut streaming = Streaming::new(&t, false);
        let pieces: Vec<String> = ids.iter().map(|&id| streaming.push(id).unwrap()).collect();
        assert_eq!(pieces, ["", "é", "", "", "", "😀"]);
        assert_eq!(streaming.finish().unwrap(), "");
        streaming.push(ids[0]).unwrap();
        assert_eq!(streaming.finish().unwrap(), "\u{fffd}", "half a character at the end");
        assert_eq!(streaming.finish().unwrap(), "", "finish starts anew");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, ..Default::default() })]
        #[test]
        fn pieces_joined_are_the_whole(picks in prop::collection::vec((any::<u32>(), any::<bool>()), 0..60), skip: bool) {
            for (name, t) in tokenizers() {
                // Half of the tokens are bytes, so that runs of broken and whole UTF-8 are common; some ids do not exist.
                let size = t.vocab_size() as u32;
                let ids: Vec<u32> = picks.iter().map(|&(pick, byte)| pick % if byte { 259 } else { size + 3 }).collect();
                prop_assert_eq!(stream(&t, &ids, skip), t.decode(&ids, skip).unwrap(), "{}", name);
            }
        }

        #[test]
        fn text_survives_the_round_trip(text in "\\PC{0,40}") {
            let t = samples::byte_level();
            let ids = t.encode(&text, crate::tokenizer::Specials::None).unwrap();
            prop_assert_eq!(stream(&t, &ids, false), t.decode(&ids, false).unwrap());
        }
    }
}
