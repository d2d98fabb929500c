//! How a vocabulary spells bytes: what a token stands for, by the kind of decoder its `tokenizer.json` names.
//!
//! Three kinds cover the models that generate text: byte-level (each character of a token stands for one byte),
//! pieces with `▁` for a space and `<0x0A>` for bytes (SentencePiece as converted by Hugging Face), and `Metaspace`.
//! Anything else is decoded by the crate itself.

use tokenizers::DecoderWrapper;

/// The kind of decoder, with what is needed to do its work token by token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decoding {
    /// Each character is one byte ([`byte_level_bytes`]); the bytes of all tokens together are lossy UTF-8.
    ByteLevel,
    /// Replace, then bytes, then fuse, then strip.
    Pieces {
        /// Texts replaced in each token, in this order.
        replace: Vec<(String, String)>,
        /// Whether `<0x0A>` is a byte.
        bytes: bool,
        /// A character removed from the front of the whole text, and how many of it at most.
        strip: Option<(char, usize)>,
    },
    /// A character stands for a space.
    Metaspace {
        /// The character.
        mark: char,
        /// Whether those of the first token are dropped.
        drop_first: bool,
    },
    /// None of these.
    Other,
}

impl Decoding {
    pub fn of(decoder: Option<&DecoderWrapper>) -> Self {
        let Some(Ok(json)) = decoder.map(serde_json::to_value) else {
            return Decoding::Other;
        };
        Self::from_json(&json).unwrap_or(Decoding::Other)
    }

    fn from_json(json: &serde_json::Value) -> Option<Self> {
        match json["type"].as_str()? {
            "ByteLevel" => Some(Decoding::ByteLevel),
            "Metaspace" => Some(Decoding::Metaspace {
                mark: json["replacement"].as_str()?.chars().next()?,
                drop_first: json["prepend_scheme"].as_str()? != "never",
            }),
            "Sequence" => Self::from_steps(json["decoders"].as_array()?),
            _ => Self::from_steps(std::slice::from_ref(json)),
        }
    }

    /// Replace*, ByteFallback?, Fuse, Strip? in this order, or a lone other decoder.
    fn from_steps(steps: &[serde_json::Value]) -> Option<Self> {
        if let [only] = steps
            && matches!(only["type"].as_str(), Some("ByteLevel" | "Metaspace"))
        {
            return Self::from_json(only);
        }
        let (mut replace, mut bytes, mut fused, mut strip) = (Vec::new(), false, false, None);
        for step in steps {
            match step["type"].as_str()? {
                "Replace" if !bytes && !fused => {
                    let pattern = step["pattern"]["String"].as_str()?;
                    replace.push((pattern.to_owned(), step["content"].as_str()?.to_owned()));
                }
                "ByteFallback" if !bytes && !fused => bytes = true,
                "Fuse" if !fused => fused = true,
                "Strip" if fused && strip.is_none() && step["stop"].as_u64()? == 0 => {
                    let count = usize::try_from(step["start"].as_u64()?).ok()?;
                    strip = Some((step["content"].as_str()?.chars().next()?, count));
                }
                _ => return None,
            }
        }
        Some(Decoding::Pieces { replace, bytes, strip })
    }

    /// The bytes that a token of the vocabulary stands for.
    pub fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Decoding::ByteLevel => byte_level_bytes(token),
            Decoding::Pieces { replace, bytes, .. } => {
                let text = replaced(token, replace);
                match byte_token(&text) {
                    Some(byte) if *bytes => vec![byte],
                    _ => text.into_bytes(),
                }
            }
            Decoding::Metaspace { mark, .. } => token.replace(*mark, " ").into_bytes(),
            Decoding::Other => token.as_bytes().to_vec(),
        }
    }
}

/// A token's text after the replacements.
pub(crate) fn replaced(token: &str, replace: &[(String, String)]) -> String {
    replace.iter().fold(token.to_owned(), |text, (from, to)| text.replace(from.as_str(), to))
}

/// The byte of a token such as `<0x0A>`.
pub(crate) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The bytes of a token in GPT-2's byte-level spelling; a token with a character outside it stands for itself.
pub(crate) fn byte_level_bytes(token: &str) -> Vec<u8> {
    token.chars().map(char_byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a character stands for: printable Latin-1 is itself, the 68 others are counted up from U+0100.
fn char_byte(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8), // 0x00-0x20
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8), // 0x7f-0xa0
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The character that stands for a byte.
    pub(crate) fn byte_char(byte: u8) -> char {
        (0..=0x143u32)
            .filter_map(char::from_u32)
            .find(|&c| char_byte(c) == Some(byte))
            .expect("every byte has a character")
    }

    /// A small byte-level tokenizer: all bytes, a few merges, and added tokens of every kind.
    pub(crate) fn byte_level_json() -> String {
        let mut vocab = serde_json::Map::new();
        let mut add = |token: &str| {
            let next = vocab.len();
            vocab.entry(token).or_insert(next.into());
        };
        for byte in 0..=255u8 {
            add(&byte_char(byte).to_string());
        }
        let mut merges = Vec::new();
        for word in ["hello", "Ġhello", "Ġworld", "user", "assistant", "system", "ĊĊ", "Ã©", "ðŁĺĢ"]
        {
            let mut chars = word.chars();
            let mut left = chars.next().expect("a word").to_string();
            for c in chars {
                let merge = serde_json::json!([left, c.to_string()]);
                if !merges.contains(&merge) {
                    merges.push(merge);
                }
                left.push(c);
                add(&left);
            }
        }
        let base = vocab.len();
        let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad_both|>"];
        let plain = ["<think>", "</think>", "<tool_call>", "</tool_call>", "sword"];
        let added: Vec<_> = specials
            .iter()
            .map(|t| (t, true))
            .chain(plain.iter().map(|t| (t, false)))
            .enumerate()
            .map(|(i, (content, special))| {
                let strip = *content == "<|pad_both|>";
                serde_json::json!({"id": base + i, "content": content, "single_word": *content == "sword",
                    "lstrip": strip, "rstrip": strip, "normalized": *content == "</think>", "special": special})
            })
            .collect();
        serde_json::json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "added_tokens": added, "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges}
        })
        .to_string()
    }

    /// A small tokenizer in the manner of Llama 2: `▁` for spaces, bytes as `<0x..>`.
    pub(crate) fn pieces_json() -> String {
        let mut vocab = serde_json::Map::new();
        let mut add = |token: String| {
            let next = vocab.len();
            vocab.entry(token).or_insert(next.into());
        };
        for token in ["<unk>", "<s>", "</s>"] {
            add(token.into());
        }
        for byte in 0..=255u8 {
            add(format!("<0x{byte:02X}>"));
        }
        let mut merges = Vec::new();
        for c in "▁abcdefghijklmnopqrstuvwxyz<>|_/é".chars() {
            add(c.to_string());
        }
        for word in ["▁hello", "▁world", "▁▁"] {
            let mut chars = word.chars();
            let mut left = chars.next().expect("a word").to_string();
            for c in chars {
                let merge = serde_json::json!([left, c.to_string()]);
                if !merges.contains(&merge) {
                    merges.push(merge);
                }
                left.push(c);
                add(left.clone());
            }
        }
        let added: Vec<_> = ["<unk>", "<s>", "</s>"]
            .iter()
            .enumerate()
            .map(|(id, content)| {
                serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": merges}
        })
        .to_string()
    }

    #[test]
    fn every_byte_has_one_character() {
        let chars: std::collections::HashSet<char> = (0..=255).map(byte_char).collect();
        assert_eq!(chars.len(), 256);
        assert_eq!(byte_level_bytes("Ġworld"), b" world");
        assert_eq!(byte_level_bytes("Ċ"), b"\n");
        assert_eq!(byte_level_bytes("[PA D]"), b"[PA D]", "a space is no byte-level character");
    }

    #[test]
    fn decoders_are_told_apart() {
        let sequence = |steps: serde_json::Value| {
            Decoding::from_json(&serde_json::json!({"type": "Sequence", "decoders": steps}))
        };
        let replace = serde_json::json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let fuse = serde_json::json!({"type": "Fuse"});
        let bytes = serde_json::json!({"type": "ByteFallback"});
        let strip = serde_json::json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let pieces =
            |bytes, strip| Some(Decoding::Pieces { replace: vec![("▁".into(), " ".into())], bytes, strip });
        assert_eq!(sequence(serde_json::json!([replace, bytes, fuse, strip])), pieces(true, Some((' ', 1))));
        assert_eq!(sequence(serde_json::json!([replace, bytes, fuse])), pieces(true, None));
        assert_eq!(sequence(serde_json::json!([strip, fuse])), None, "strips every token");
        assert_eq!(sequence(serde_json::json!([{"type": "ByteLevel"}])), Some(Decoding::ByteLevel));
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xZZ>"), None);
        assert_eq!(byte_token("<0xé>"), None);
    }
}
