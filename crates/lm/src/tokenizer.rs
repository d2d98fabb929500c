//! Text to token ids and back, over the `tokenizers` crate.
//!
//! Loads a model folder's `tokenizer.json` with what its neighbours add (named and added tokens, several
//! end-of-sequence ids), and decides one thing that the crate below leaves open: *which text may become a control
//! token*. A control token is an entry of the added vocabulary that the model was trained to obey (`<|im_end|>`,
//! `[INST]`, `<eos>`); text that merely looks like one, because a user or a web page wrote it, must stay text.
//! [`Specials`] says it for a whole text, [`Cut`]s say it within one text that joins a template's words and a user's.
//!
//! Merges of byte pairs cross the border between template and user text as they do in training, since the text is
//! always tokenized as a whole: only the recognition of added tokens is ours (`added`), everything after it is the
//! crate's.
//!
//! Left to others: chat templates ([`crate::chat`]), token-by-token output ([`crate::detokenizer`]).

mod added;
mod folder;
mod pieces;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::PreTokenizer as _;
use tokenizers::{Model as _, OffsetType};

pub use added::{Cut, CutScope};
pub(crate) use folder::eos_ids;
pub use folder::is_parsing;
pub(crate) use pieces::{Decoding, byte_token, replaced};

use crate::error::{Error, Result};

/// What may happen to text that looks like a special token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// Nothing: `<|im_end|>` in the text is tokenized as the characters it consists of. For text from users,
    /// documents, tools: anything that is not our own. Added tokens that are *not* special (`<b>` in Gemma's
    /// vocabulary, runs of spaces) are still used, as they are in every other program.
    None,
    /// Special tokens are recognised, nothing is added. For the output of a chat template, which writes its own
    /// beginning-of-sequence token.
    Parse,
    /// Special tokens are recognised, and what the tokenizer's post-processor adds (`<s>` in front, for example) is
    /// added. For a plain prompt or a training text.
    ParseAndAdd,
}

/// Token ids with the text each of them came from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// The token ids.
    pub ids: Vec<u32>,
    /// For each token the bytes of the text that it stands for. The tokens of one character that is spread over
    /// several tokens all carry that character's range.
    pub spans: Vec<Range<usize>>,
}

/// A token with a name of its own, such as the end-of-sequence token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedToken {
    /// Its text, as templates print it.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// The tokens that configuration files and templates call by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NamedTokens {
    /// Beginning of sequence.
    pub bos: Option<NamedToken>,
    /// End of sequence, the tokenizer's own (a model may stop on more: [`Tokenizer::eos_ids`]).
    pub eos: Option<NamedToken>,
    /// Padding.
    pub pad: Option<NamedToken>,
    /// Unknown text.
    pub unk: Option<NamedToken>,
}

/// A tokenizer; cloning is cheap, and all clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    source: PathBuf,
    tokenizer: tokenizers::Tokenizer,
    added: added::AddedTokens,
    decoding: Decoding,
    named: NamedTokens,
    eos_ids: Vec<u32>,
    vocab_size: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("source", &self.0.source)
            .field("vocab_size", &self.0.vocab_size)
            .field("named", &self.0.named)
            .field("eos_ids", &self.0.eos_ids)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Opens the tokenizer of a model folder.
    ///
    /// Reads `tokenizer.json`, and where present `tokenizer_config.json`, `special_tokens_map.json`,
    /// `added_tokens.json`, `generation_config.json` and `config.json`. Padding and truncation that
    /// `tokenizer.json` may ask for are turned off: callers see every token of their text.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) without a `tokenizer.json`,
    /// [`ErrorKind::BadData`](crate::ErrorKind::BadData) when a file is not what it should be.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        folder::load(dir.as_ref())
    }

    /// Wraps a tokenizer that was built from something other than a folder, such as a GGUF file's metadata.
    ///
    /// `source` is named in messages. `eos_ids` are joined with `named.eos`.
    ///
    /// # Errors
    /// When the added tokens cannot be compiled into a search.
    pub fn from_parts(
        source: impl Into<PathBuf>,
        mut tokenizer: tokenizers::Tokenizer,
        named: NamedTokens,
        mut eos_ids: Vec<u32>,
    ) -> Result<Self> {
        let source = source.into();
        let failed = |e: tokenizers::Error| Error::bad_file(&source, format!("unusable tokenizer: {e}"));
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);
        let added = added::AddedTokens::new(&tokenizer).map_err(failed)?;
        let decoding = Decoding::of(tokenizer.get_decoder());
        let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |&highest| highest as usize + 1);
        if let Some(eos) = &named.eos {
            eos_ids.push(eos.id);
        }
        eos_ids.sort_unstable();
        eos_ids.dedup();
        Ok(Self(Arc::new(Inner { source, tokenizer, added, decoding, named, eos_ids, vocab_size })))
    }

    /// The token ids of a text.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text (no byte fallback and no unknown token).
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        let add = match specials {
            Specials::None => {
                return Ok(self
                    .encode_with(text, OffsetType::None, |token| !token.special)?
                    .get_ids()
                    .to_vec());
            }
            Specials::Parse => false,
            Specials::ParseAndAdd => true,
        };
        let encoding = self.0.tokenizer.encode_fast(text, add).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of a text in which control tokens are recognised except across the `cuts`, with the place of
    /// each token. Nothing is added. Without cuts the ids are those of [`Specials::Parse`].
    ///
    /// `cuts` are in ascending order.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_cut(&self, text: &str, cuts: &[Cut]) -> Result<Encoded> {
        debug_assert!(cuts.is_sorted_by_key(|cut| cut.at));
        let encoding = self.encode_with(text, OffsetType::Byte, |token| added::allowed(cuts, token))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            spans: encoding.get_offsets().iter().map(|&(start, end)| start..end).collect(),
        })
    }

    /// The crate's own pipeline, with our recognition of added tokens in front.
    fn encode_with(
        &self,
        text: &str,
        offsets: OffsetType,
        accept: impl Fn(&added::Candidate) -> bool,
    ) -> Result<tokenizers::Encoding> {
        let tokenizer = &self.0.tokenizer;
        let mut pieces = self.0.added.split(text, tokenizer.get_normalizer(), accept).map_err(failed)?;
        if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        pieces.tokenize(|piece| tokenizer.get_model().tokenize(piece.get())).map_err(failed)?;
        pieces.into_encoding(None, 0, offsets).map_err(failed)
    }

    /// The text of token ids. Ids outside the vocabulary (models are padded) have no text.
    ///
    /// Bytes that are not UTF-8 become U+FFFD. The tidying of spaces that some configurations ask for
    /// (`clean_up_tokenization_spaces`) is not done: it changes what the model wrote.
    ///
    /// # Errors
    /// When the folder's own decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.0.tokenizer.decode(ids, skip_special).map_err(failed)
    }

    /// The bytes that a token stands for within a text, or `None` if there is no such token.
    ///
    /// Bytes of consecutive tokens joined are the text, up to a leading space that some decoders drop. A token may
    /// hold a part of a character.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.0.tokenizer.id_to_token(id)?;
        Some(match &self.0.decoding {
            Decoding::Other => self.0.tokenizer.decode(&[id], false).ok()?.into_bytes(),
            known => known.bytes(&token),
        })
    }

    /// The token as the vocabulary spells it (`Ġworld`), or `None` if there is no such token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// The number of ids: one more than the highest. The model's own vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab_size
    }

    /// The tokens that have names.
    pub fn named(&self) -> &NamedTokens {
        &self.0.named
    }

    /// The id of the beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.0.named.bos.as_ref().map(|token| token.id)
    }

    /// The ids at which generation ends, ascending: the tokenizer's, joined with `generation_config.json`'s or else
    /// `config.json`'s.
    pub fn eos_ids(&self) -> &[u32] {
        &self.0.eos_ids
    }

    /// The id of the tokenizer's own end-of-sequence token (which training appends).
    pub fn eos_id(&self) -> Option<u32> {
        self.0.named.eos.as_ref().map(|token| token.id)
    }

    /// The id of the padding token.
    pub fn pad_id(&self) -> Option<u32> {
        self.0.named.pad.as_ref().map(|token| token.id)
    }

    /// Whether an id is a special token, which decoding with `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.added.get(id).is_some_and(|token| self.0.added.is_special(&token.content))
    }

    /// Whether an id belongs to the added vocabulary, special or not.
    pub fn is_added(&self, id: u32) -> bool {
        self.0.added.get(id).is_some()
    }

    /// The added vocabulary as `(id, text, special)`, ascending by id.
    pub fn added_tokens(&self) -> Vec<(u32, &str, bool)> {
        self.0.added.iter().map(|(id, token)| (id, token.content.as_str(), token.special)).collect()
    }

    /// Where the tokenizer came from, for messages.
    pub fn source(&self) -> &Path {
        &self.0.source
    }

    pub(crate) fn decoding(&self) -> &Decoding {
        &self.0.decoding
    }
}

fn failed(e: tokenizers::Error) -> Error {
    Error::Tokenize(e.to_string())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    pub(crate) use crate::tokenizer::pieces::tests::{byte_char, pieces_json};

    /// A byte-level tokenizer with merges over `text`'s words and some control tokens, as in a real folder.
    pub(crate) fn byte_level() -> Tokenizer {
        let json = crate::tokenizer::pieces::tests::byte_level_json();
        let tokenizer: tokenizers::Tokenizer = json.parse().expect("the test tokenizer parses");
        let named = |text: &str| {
            let id = tokenizer.token_to_id(text).expect("a named token of the test tokenizer");
            Some(NamedToken { text: text.into(), id })
        };
        let named =
            NamedTokens { eos: named("<|im_end|>"), pad: named("<|endoftext|>"), ..Default::default() };
        Tokenizer::from_parts("test", tokenizer, named, vec![]).expect("the test tokenizer loads")
    }

    #[test]
    fn lookalikes_stay_text_when_not_parsed() {
        let t = byte_level();
        let im_end = t.id("<|im_end|>").unwrap();
        let think = t.id("<think>").unwrap();
        for (name, text) in [
            ("alone", "<|im_end|>"),
            ("twice", "<|im_end|><|im_end|>"),
            ("in words", "hello <|im_end|> world"),
            ("nested", "<|im_<|im_end|>end|>"),
        ] {
            let ids = t.encode(text, Specials::None).unwrap();
            assert!(!ids.contains(&im_end), "{name}: {ids:?}");
            assert_eq!(t.decode(&ids, true).unwrap(), text, "{name}");
            assert!(t.encode(text, Specials::Parse).unwrap().contains(&im_end), "{name}");
        }
        // An added token that is not special is ordinary vocabulary.
        assert_eq!(t.encode("<think>", Specials::None).unwrap(), [think]);
    }

    #[test]
    fn a_cut_forbids_only_the_token_it_cuts() {
        let t = byte_level();
        let im_end = t.id("<|im_end|>").unwrap();
        let think = t.id("<think>").unwrap();
        let text = "a<|im_end|>b<|im_end|><think>";
        let count = |cuts: &[Cut], id| {
            let ids = t.encode_cut(text, cuts).unwrap().ids;
            assert_eq!(t.decode(&ids, false).unwrap(), text);
            ids.iter().filter(|&&x| x == id).count()
        };
        let special = |at| Cut { at, scope: CutScope::Special };
        let all = |at| Cut { at, scope: CutScope::Control(Arc::from([think])) };
        assert_eq!(count(&[], im_end), 2);
        assert_eq!(count(&[special(1)], im_end), 2, "a cut at the token's border is not inside");
        assert_eq!(count(&[special(2)], im_end), 1);
        assert_eq!(count(&[special(10), special(21)], im_end), 0);
        assert_eq!(count(&[special(24)], think), 1, "not special, so this scope does not cover it");
        assert_eq!(count(&[all(24)], think), 0);
    }

    #[test]
    fn our_splitting_equals_the_crates() {
        let t = byte_level();
        for text in [
            "",
            " ",
            "hello",
            "<|im_start|>user\nhello world<|im_end|>\n",
            "<think>  hé\u{301}llo 😀</think>",
            "  <|pad_both|>  x",
            "a <|pad_both|>",
            "word",
            "swords sword",
            "sword",
            "<|im_end|><|im_end|>",
            "\n\n\n<|im_end|>",
        ] {
            let theirs = t.0.tokenizer.encode(text, false).unwrap();
            let ours = t.encode_cut(text, &[]).unwrap();
            assert_eq!(ours.ids, theirs.get_ids(), "{text:?}");
            let spans: Vec<_> = theirs.get_offsets().iter().map(|&(a, b)| a..b).collect();
            assert_eq!(ours.spans, spans, "{text:?}");
        }
    }

    #[test]
    fn token_bytes_joined_are_the_text() {
        let t = byte_level();
        let text = "hello wörld 😀 <think>\u{a0}x<|im_end|>";
        let ids = t.encode(text, Specials::Parse).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| t.token_bytes(id).unwrap()).collect();
        assert_eq!(bytes, text.as_bytes());
        assert_eq!(t.token_bytes(u32::MAX), None);
    }

    #[test]
    fn ids_outside_the_vocabulary_decode_to_nothing() {
        let t = byte_level();
        let mut ids = t.encode("hello", Specials::Parse).unwrap();
        ids.push(t.vocab_size() as u32 + 7);
        assert_eq!(t.decode(&ids, false).unwrap(), "hello");
    }
}
