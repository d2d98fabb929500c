//! Recognising added tokens in a text, with a say in each single match.
//!
//! This repeats what the `tokenizers` crate does first in `encode` (`AddedVocabulary::extract_and_normalize`, whose
//! pieces are private), so that a match can be refused for the place where it stands. Tests hold the two together.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, Input, MatchKind};
use tokenizers::normalizer::Range;
use tokenizers::{AddedToken, NormalizedString, Normalizer, NormalizerWrapper, PreTokenizedString, Token};

/// A place in a text that no control token may span: to its left and right stand texts of different origin, or one
/// text that only looks like a control token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Byte offset. A token that begins or ends exactly here is not affected.
    pub at: usize,
    /// What is forbidden here.
    pub scope: CutScope,
}

/// Which added tokens a [`Cut`] is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CutScope {
    /// Those marked special.
    Special,
    /// Those, and the listed ids (ascending): tokens such as `<tool_call>` that vocabularies do not mark special,
    /// and models obey all the same.
    Control(Arc<[u32]>),
}

/// An added token that stands in the text, and may be taken or refused.
pub(crate) struct Candidate {
    pub id: u32,
    pub special: bool,
    /// Where the text of the token itself stands, in bytes of the original text.
    pub range: std::ops::Range<usize>,
}

/// Whether no cut forbids the token.
pub(crate) fn allowed(cuts: &[Cut], token: &Candidate) -> bool {
    let first = cuts.partition_point(|cut| cut.at <= token.range.start);
    !cuts[first..].iter().take_while(|cut| cut.at < token.range.end).any(|cut| match &cut.scope {
        CutScope::Special => token.special,
        CutScope::Control(ids) => token.special || ids.binary_search(&token.id).is_ok(),
    })
}

/// The added vocabulary, compiled for searching.
pub(crate) struct AddedTokens {
    /// Ascending by id.
    tokens: Vec<(u32, AddedToken)>,
    /// Texts of the special ones.
    special: std::collections::HashSet<String>,
    /// Searched in the text as it is.
    raw: Search,
    /// Searched in the normalized text.
    normalized: Search,
}

struct Search {
    automaton: AhoCorasick,
    /// Index into `tokens` by pattern.
    token: Vec<usize>,
}

impl AddedTokens {
    pub fn new(tokenizer: &tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        let vocabulary = tokenizer.get_added_vocabulary();
        let mut tokens: Vec<(u32, AddedToken)> =
            vocabulary.get_added_tokens_decoder().iter().map(|(id, token)| (*id, token.clone())).collect();
        tokens.sort_unstable_by_key(|(id, _)| *id);
        let special = tokens
            .iter()
            .filter(|(_, token)| vocabulary.is_special_token(&token.content))
            .map(|(_, token)| token.content.clone())
            .collect();
        let search = |normalized: bool| -> tokenizers::Result<Search> {
            let mut patterns = Vec::new();
            let mut index = Vec::new();
            for (i, (_, token)) in tokens.iter().enumerate() {
                if token.normalized != normalized || token.content.is_empty() {
                    continue;
                }
                let mut content = NormalizedString::from(token.content.as_str());
                if let (true, Some(normalizer)) = (normalized, tokenizer.get_normalizer()) {
                    normalizer.normalize(&mut content)?;
                }
                if !content.get().is_empty() {
                    patterns.push(content.get().to_owned());
                    index.push(i);
                }
            }
            let automaton = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&patterns)?;
            Ok(Search { automaton, token: index })
        };
        Ok(Self { raw: search(false)?, normalized: search(true)?, special, tokens })
    }

    pub fn get(&self, id: u32) -> Option<&AddedToken> {
        self.tokens.binary_search_by_key(&id, |(id, _)| *id).ok().map(|i| &self.tokens[i].1)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &AddedToken)> {
        self.tokens.iter().map(|(id, token)| (*id, token))
    }

    pub fn is_special(&self, text: &str) -> bool {
        self.special.contains(text)
    }

    /// Splits a text into added tokens that `accept` takes, and normalized text between them.
    pub fn split(
        &self,
        text: &str,
        normalizer: Option<&NormalizerWrapper>,
        accept: impl Fn(&Candidate) -> bool,
    ) -> tokenizers::Result<PreTokenizedString> {
        let mut pieces = PreTokenizedString::from(text);
        pieces.split(|_, piece| self.split_piece(piece, &self.raw, &accept))?;
        pieces.split(|_, mut piece| {
            if let Some(normalizer) = normalizer {
                normalizer.normalize(&mut piece)?;
            }
            self.split_piece(piece, &self.normalized, &accept)
        })?;
        Ok(pieces)
    }

    fn split_piece(
        &self,
        piece: NormalizedString,
        search: &Search,
        accept: &impl Fn(&Candidate) -> bool,
    ) -> tokenizers::Result<Vec<(NormalizedString, Option<Vec<Token>>)>> {
        let slice = |range: std::ops::Range<usize>| {
            piece.slice(Range::Normalized(range)).ok_or("an added token's text cannot be cut out")
        };
        let text = piece.get();
        let mut splits = Vec::new();
        let mut done = 0;
        let mut from = 0;
        while let Some(found) = search.automaton.find(Input::new(text).range(from..)) {
            let (mut start, mut end) = (found.start(), found.end());
            let (id, token) = &self.tokens[search.token[found.pattern().as_usize()]];
            let (left, right) = (&text[..start], &text[end..]);
            if token.single_word
                && (left.chars().next_back().is_some_and(is_word)
                    || right.chars().next().is_some_and(is_word))
            {
                from = end;
                continue;
            }
            let (original_start, original_end) = slice(start..end)?.offsets_original();
            let candidate = Candidate {
                id: *id,
                special: self.is_special(&token.content),
                range: original_start..original_end,
            };
            if !accept(&candidate) {
                // Another token may begin inside the refused one.
                from = start + text[start..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            if token.lstrip {
                start = left.trim_end().len().max(done);
            }
            if token.rstrip {
                end = text.len() - right.trim_start().len();
            }
            if done < start {
                splits.push((slice(done..start)?, None));
            }
            let token_piece = slice(start..end)?;
            let value = token_piece.get().to_owned();
            let length = value.len();
            splits.push((token_piece, Some(vec![Token::new(*id, value, (0, length))])));
            done = end;
            from = end;
        }
        if done < text.len() {
            splits.push((slice(done..text.len())?, None));
        }
        Ok(splits)
    }
}

/// What a regular expression's `\w` matches, near enough for the letters that stand beside a token.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
