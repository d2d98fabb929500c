//! The tokenizer of the quickstart model: byte-level BPE, learnt from the same corpus.
//!
//! Written as `tokenizer.json` and `tokenizer_config.json`, which any program that reads Hugging Face
//! folders opens. Chat marks are ChatML's.

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, TokenizerBuilder};

use super::corpus::{Document, document};
use crate::{Error, Result};

/// The end of a document.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// The beginning of a chat turn.
pub const TURN_START: &str = "<|im_start|>";
/// The end of a chat turn.
pub const TURN_END: &str = "<|im_end|>";

/// The chat template (ChatML), with the marks that say which text the assistant writes.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Learns a tokenizer of at most `vocabulary` tokens (at least 300) from `documents` documents of the corpus;
/// returns the text of its `tokenizer.json`.
pub fn train(seed: u64, documents: u64, vocabulary: usize) -> Result<String> {
    let fail = |cause: tokenizers::Error| Error::Tokenize(cause.to_string());
    if vocabulary < 300 {
        return Err(Error::Config(format!(
            "a byte-level vocabulary needs at least 300 tokens, got {vocabulary}"
        )));
    }
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >::new()
    .with_model(BPE::default())
    .with_normalizer(None)
    .with_pre_tokenizer(Some(byte_level.into()))
    .with_post_processor(None)
    .with_decoder(Some(byte_level.into()))
    .build()
    .map_err(fail)?;
    // The alphabet in a fixed order: the set that the crate offers iterates in a random one, and the
    // trainer sorts it only partly.
    let marks = [END_OF_TEXT, TURN_START, TURN_END].map(|mark| AddedToken::from(mark, true));
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocabulary)
        .min_frequency(2)
        .special_tokens(marks.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let texts = (0..documents).map(|number| match document(seed, number) {
        Document::Text(text) => text,
        Document::Chat(turns) => turns.join("\n"),
    });
    tokenizer.train(&mut trainer, texts).map_err(fail)?;
    tokenizer.to_string(true).map_err(fail)
}

/// The text of `tokenizer_config.json`.
pub fn config(context: usize) -> String {
    let config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": null,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": null,
        "clean_up_tokenization_spaces": false,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    });
    format!("{config:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::world::{Attribute, Person};

    #[test]
    fn it_is_learnt_alike_every_time_and_loses_no_text() {
        let text = train(5, 400, 1024).unwrap();
        assert_eq!(text, train(5, 400, 1024).unwrap());
        let tokenizer: tokenizers::Tokenizer = text.parse().unwrap();
        assert!(tokenizer.get_vocab_size(true) <= 1024);
        assert_eq!(tokenizer.token_to_id(END_OF_TEXT), Some(0));
        for text in ["Ada lives in Oslo.\nAda: city=Oslo", " {\"name\": \"Zoe\"}", "häß 漢字 \u{1F600} 123"]
        {
            let encoding = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), text);
        }
    }

    #[test]
    fn most_words_are_one_token() {
        let tokenizer: tokenizers::Tokenizer = train(5, 3000, 1536).unwrap().parse().unwrap();
        let mut words: Vec<String> = Person::all().map(Person::name).collect();
        for attribute in Attribute::ALL {
            words.extend(attribute.values().iter().map(ToString::to_string));
        }
        let whole = words
            .iter()
            .filter(|word| tokenizer.encode(format!(" {word}"), false).unwrap().len() == 1)
            .count();
        assert!(whole * 10 > words.len() * 9, "{whole} of {}", words.len());
    }

    #[test]
    fn too_small_a_vocabulary_is_refused() {
        assert!(train(5, 10, 100).is_err());
    }
}
