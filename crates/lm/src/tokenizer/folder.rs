//! Opening the tokenizer of a model folder: `tokenizer.json`, and what its neighbours say.

use std::cell::Cell;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::{NamedToken, NamedTokens, Tokenizer};
use crate::error::{Error, Result, json_type, read_json_object, read_text};

/// Larger than any vocabulary (the largest known is 35 MB), small enough to refuse before memory runs out.
const MAX_TOKENIZER_BYTES: u64 = 1 << 30;

pub(super) fn load(dir: &Path) -> Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    let Some(json) = read_text(&path, "the tokenizer", MAX_TOKENIZER_BYTES)? else {
        return Err(missing(dir));
    };
    let mut tokenizer = parse(&path, &json)?;

    let config_path = dir.join("tokenizer_config.json");
    let config = read_json_object(&config_path, "the tokenizer's configuration")?.unwrap_or_default();
    let map_path = dir.join("special_tokens_map.json");
    let map = read_json_object(&map_path, "the special tokens")?.unwrap_or_default();

    add_tokens(dir, &config_path, &config, &mut tokenizer)?;
    let mut named = |name: &str| -> Result<Option<NamedToken>> {
        let (path, value) = match (config.get(name), map.get(name)) {
            (Some(value), _) => (&config_path, value),
            (None, Some(value)) => (&map_path, value),
            (None, None) => return Ok(None),
        };
        let Some(token) = token_of(path, name, value)? else {
            return Ok(None);
        };
        if tokenizer.token_to_id(&token.content).is_none() {
            // transformers adds named tokens that the vocabulary lacks.
            tokenizer.add_special_tokens(std::slice::from_ref(&token));
        }
        Ok(tokenizer.token_to_id(&token.content).map(|id| NamedToken { text: token.content, id }))
    };
    let named = NamedTokens {
        bos: named("bos_token")?,
        eos: named("eos_token")?,
        pad: named("pad_token")?,
        unk: named("unk_token")?,
    };
    set_post_processor(&config_path, &config, &named, &mut tokenizer)?;
    let eos_ids = model_eos_ids(dir)?;
    // What parsing needed for a moment is of no use to what follows.
    drop(json);
    mica_array::memory::clear_cache();
    Tokenizer::from_parts(path, tokenizer, named, eos_ids)
}

thread_local! {
    static PARSING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread parses a tokenizer: a panic then is no defect, and its hook need not tell of it.
pub fn is_parsing() -> bool {
    PARSING.get()
}

/// Parses `tokenizer.json`.
///
/// The crate's parser was written for files that its own writer made and panics on some broken ones; a panic is
/// turned into the error it should have been.
fn parse(path: &Path, json: &str) -> Result<tokenizers::Tokenizer> {
    let broken = |message: String| {
        Error::BadFile {
        path: path.to_owned(),
        message,
        todo: "the file may be cut short, or written by a newer version of the tokenizers library; fetch it again"
            .into(),
    }
    };
    PARSING.set(true);
    let parsed = std::panic::catch_unwind(|| json.parse::<tokenizers::Tokenizer>());
    PARSING.set(false);
    match parsed {
        Ok(Ok(tokenizer)) => Ok(tokenizer),
        Ok(Err(e)) => Err(broken(format!("expected a tokenizer: {e}"))),
        Err(_) => Err(broken("expected a tokenizer, its parts contradict each other".into())),
    }
}

fn missing(dir: &Path) -> Error {
    let other = ["tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"]
        .into_iter()
        .find(|name| dir.join(name).is_file());
    Error::NotFound {
        what: "the tokenizer".into(),
        looked: format!("expected {}", dir.join("tokenizer.json").display()),
        todo: match other {
            Some(name) => format!(
                "the folder has {name}, an older format; save it once with a `transformers` fast tokenizer \
                 (`AutoTokenizer.from_pretrained(dir).save_pretrained(dir)`) to get tokenizer.json"
            ),
            None => "fetch the model's tokenizer files into that folder".into(),
        },
    }
}

/// A token given as a string or as an object with its flags; `null` is none.
fn token_of(path: &Path, field: &str, value: &Value) -> Result<Option<AddedToken>> {
    let bad = |got: &Value| Error::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        expected: "a string, or an object with `content`".into(),
        got: json_type(got),
    };
    Ok(match value {
        Value::Null => None,
        Value::String(text) if text.is_empty() => None,
        Value::String(text) => Some(AddedToken::from(text.clone(), true)),
        Value::Object(object) => {
            let content = match object.get("content") {
                Some(Value::String(content)) => content,
                _ => return Err(bad(value)),
            };
            let flag =
                |name: &str, default: bool| object.get(name).and_then(Value::as_bool).unwrap_or(default);
            let special = flag("special", true);
            let mut token = AddedToken::from(content.clone(), special);
            token.normalized = flag("normalized", !special);
            token.single_word = flag("single_word", false);
            token.lstrip = flag("lstrip", false);
            token.rstrip = flag("rstrip", false);
            Some(token)
        }
        other => return Err(bad(other)),
    })
}

/// Adds the tokens that `added_tokens_decoder` (or the older `added_tokens.json`) lists and `tokenizer.json` lacks,
/// or has with other flags.
fn add_tokens(
    dir: &Path,
    config_path: &Path,
    config: &Map<String, Value>,
    tokenizer: &mut tokenizers::Tokenizer,
) -> Result<()> {
    let mut wanted: Vec<(u32, AddedToken)> = Vec::new();
    let mut source = config_path.to_owned();
    match config.get("added_tokens_decoder") {
        Some(Value::Object(entries)) => {
            for (key, value) in entries {
                let field = format!("added_tokens_decoder.{key}");
                let id: u32 = key.parse().map_err(|_| Error::Field {
                    path: config_path.to_owned(),
                    field: field.clone(),
                    expected: "a token id as the key".into(),
                    got: format!("{key:?}"),
                })?;
                if let Some(mut token) = token_of(config_path, &field, value)? {
                    if value.get("special").is_none() {
                        token.special = false;
                    }
                    wanted.push((id, token));
                }
            }
        }
        Some(Value::Null) | None => {
            source = dir.join("added_tokens.json");
            for (content, id) in read_json_object(&source, "the added tokens")?.unwrap_or_default() {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| Error::Field {
                    path: source.clone(),
                    field: content.clone(),
                    expected: "a token id".into(),
                    got: json_type(&id),
                })?;
                if tokenizer.token_to_id(&content).is_none() {
                    wanted.push((id, AddedToken::from(content, false)));
                }
            }
        }
        Some(other) => {
            return Err(Error::Field {
                path: config_path.to_owned(),
                field: "added_tokens_decoder".into(),
                expected: "an object from id to token".into(),
                got: json_type(other),
            });
        }
    }
    wanted.sort_unstable_by_key(|(id, _)| *id);
    let missing: Vec<AddedToken> = {
        let known = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let differs = |(id, token): &(u32, AddedToken)| match known.get(id) {
            None => true,
            Some(known) => {
                (
                    &known.content,
                    known.special,
                    known.normalized,
                    known.lstrip,
                    known.rstrip,
                    known.single_word,
                ) != (
                    &token.content,
                    token.special,
                    token.normalized,
                    token.lstrip,
                    token.rstrip,
                    token.single_word,
                )
            }
        };
        wanted.iter().filter(|entry| differs(entry)).map(|(_, token)| token.clone()).collect()
    };
    if missing.is_empty() {
        return Ok(());
    }
    tokenizer.add_tokens(&missing);
    for (id, token) in &wanted {
        let got = tokenizer.token_to_id(&token.content);
        if got != Some(*id) {
            return Err(Error::Field {
                path: source,
                field: format!("added_tokens_decoder.{id}"),
                expected: format!("the id that tokenizer.json gives {:?}", token.content),
                got: got.map_or("no id".into(), |got| format!("{id} there and {got} in tokenizer.json")),
            });
        }
    }
    Ok(())
}

/// What `transformers` does when `tokenizer_config.json` says `add_bos_token` or `add_eos_token`, for a tokenizer
/// that has no post-processor of its own.
fn set_post_processor(
    path: &Path,
    config: &Map<String, Value>,
    named: &NamedTokens,
    tokenizer: &mut tokenizers::Tokenizer,
) -> Result<()> {
    use tokenizers::processors::template::TemplateProcessing;
    if tokenizer.get_post_processor().is_some() {
        return Ok(());
    }
    let wants = |name: &str| config.get(name).and_then(Value::as_bool).unwrap_or(false);
    let bos = named.bos.as_ref().filter(|_| wants("add_bos_token"));
    let eos = named.eos.as_ref().filter(|_| wants("add_eos_token"));
    if bos.is_none() && eos.is_none() {
        return Ok(());
    }
    let pieces: Vec<String> =
        [bos.map(|_| "BOS".to_owned()), Some("$A".to_owned()), eos.map(|_| "EOS".to_owned())]
            .into_iter()
            .flatten()
            .collect();
    let special: Vec<(String, u32)> =
        [bos.map(|t| ("BOS".to_owned(), t.id)), eos.map(|t| ("EOS".to_owned(), t.id))]
            .into_iter()
            .flatten()
            .collect();
    let processor = TemplateProcessing::builder()
        .try_single(pieces)
        .and_then(|builder| builder.special_tokens(special).build().map_err(|e| e.to_string()))
        .map_err(|e| {
            Error::bad_file(path, format!("add_bos_token or add_eos_token cannot be followed: {e}"))
        })?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// The ids at which the model's own files say that generation ends: `generation_config.json`'s, else `config.json`'s
/// (at its top, or in the text part of a model with several).
pub(crate) fn model_eos_ids(dir: &Path) -> Result<Vec<u32>> {
    for (name, what) in
        [("generation_config.json", "the generation settings"), ("config.json", "the model's configuration")]
    {
        let path = dir.join(name);
        let Some(config) = read_json_object(&path, what)? else {
            continue;
        };
        let text_part = config.get("text_config").and_then(|text| text.get("eos_token_id"));
        for value in [config.get("eos_token_id"), text_part].into_iter().flatten() {
            if !value.is_null() {
                return eos_ids(&path, value);
            }
        }
    }
    Ok(Vec::new())
}

/// `eos_token_id` as one id or a list of them.
pub(crate) fn eos_ids(path: &Path, value: &Value) -> Result<Vec<u32>> {
    let bad = |got: &Value| Error::Field {
        path: path.to_owned(),
        field: "eos_token_id".into(),
        expected: "a token id or a list of them".into(),
        got: json_type(got),
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| bad(value));
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(values) => values.iter().map(id).collect(),
        value => Ok(vec![id(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::tokenizer::Specials;
    use crate::tokenizer::pieces::tests::{byte_level_json, pieces_json};

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn eos_ids_are_merged_as_mlx_lm_does() {
        let tokenizer = pieces_json();
        for (name, files, expected) in [
            ("nothing", vec![], vec![]),
            ("tokenizer only", vec![("tokenizer_config.json", r#"{"eos_token": "</s>"}"#)], vec![2]),
            ("map only", vec![("special_tokens_map.json", r#"{"eos_token": {"content": "</s>"}}"#)], vec![2]),
            (
                "null beats the map",
                vec![
                    ("tokenizer_config.json", r#"{"eos_token": null}"#),
                    ("special_tokens_map.json", r#"{"eos_token": "</s>"}"#),
                ],
                vec![],
            ),
            ("config", vec![("config.json", r#"{"eos_token_id": 7}"#)], vec![7]),
            (
                "generation config instead of config",
                vec![
                    ("config.json", r#"{"eos_token_id": 7}"#),
                    ("generation_config.json", r#"{"eos_token_id": [9, 8]}"#),
                    ("tokenizer_config.json", r#"{"eos_token": {"content": "</s>", "special": true}}"#),
                ],
                vec![2, 8, 9],
            ),
            (
                "generation config without",
                vec![("config.json", r#"{"eos_token_id": 7}"#), ("generation_config.json", "{}")],
                vec![7],
            ),
            ("nested", vec![("config.json", r#"{"text_config": {"eos_token_id": [1]}}"#)], vec![1]),
        ] {
            let mut all = vec![("tokenizer.json", tokenizer.as_str())];
            all.extend(files);
            let dir = folder(&all);
            assert_eq!(load(dir.path()).unwrap().eos_ids(), expected, "{name}");
        }
    }

    #[test]
    fn post_processor_adds_bos_only_when_asked() {
        let dir = folder(&[("tokenizer.json", &pieces_json())]);
        let t = load(dir.path()).unwrap();
        let plain = t.encode("hello world", Specials::Parse).unwrap();
        let added = t.encode("hello world", Specials::ParseAndAdd).unwrap();
        assert_eq!(added[0], 1);
        assert_eq!(added[1..], plain[..]);
        assert_eq!(t.decode(&added, true).unwrap(), "hello world");

        let config = r#"{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": true}"#;
        let dir = folder(&[("tokenizer.json", &byte_level_json()), ("tokenizer_config.json", config)]);
        let t = load(dir.path()).unwrap();
        assert_eq!(t.encode("hello", Specials::ParseAndAdd).unwrap()[0], t.bos_id().unwrap());
        assert_eq!(t.encode("hello", Specials::Parse).unwrap().len(), 1);
    }

    #[test]
    fn truncation_of_the_file_is_turned_off() {
        let dir = folder(&[("tokenizer.json", &byte_level_json())]);
        let t = load(dir.path()).unwrap();
        assert!(t.encode("a b c d e f g h", Specials::ParseAndAdd).unwrap().len() > 4);
    }

    #[test]
    fn tokens_of_the_config_are_added_and_reflagged() {
        let size = load(folder(&[("tokenizer.json", &byte_level_json())]).path()).unwrap().vocab_size();
        let base = load(folder(&[("tokenizer.json", &byte_level_json())]).path()).unwrap();
        let think = base.id("<think>").unwrap();
        let config = format!(
            r#"{{"added_tokens_decoder": {{"{size}": {{"content": "<|new|>", "special": true}},
                "{think}": {{"content": "<think>", "special": true, "normalized": false}}}}}}"#
        );
        let dir = folder(&[("tokenizer.json", &byte_level_json()), ("tokenizer_config.json", &config)]);
        let t = load(dir.path()).unwrap();
        assert_eq!(t.id("<|new|>"), Some(size as u32));
        assert!(t.is_special(size as u32) && t.is_special(think) && !base.is_special(think));
        assert!(!t.encode("<think>", Specials::None).unwrap().contains(&think));
    }

    #[test]
    fn broken_folders_say_what_is_wrong() {
        let good = pieces_json();
        let cut = &good[..good.len() / 2];
        for (name, files, kind, words) in [
            ("empty", vec![], ErrorKind::NotFound, "tokenizer.json"),
            ("older", vec![("tokenizer.model", "x")], ErrorKind::NotFound, "save_pretrained"),
            ("cut short", vec![("tokenizer.json", cut)], ErrorKind::BadData, "fetch it again"),
            ("not json", vec![("tokenizer.json", "<html>")], ErrorKind::BadData, "tokenizer.json"),
            ("empty object", vec![("tokenizer.json", "{}")], ErrorKind::BadData, "tokenizer.json"),
            (
                "config is a list",
                vec![("tokenizer.json", &good), ("tokenizer_config.json", "[]")],
                ErrorKind::BadData,
                "expected a JSON object",
            ),
            (
                "eos is a number",
                vec![("tokenizer.json", &good), ("tokenizer_config.json", r#"{"eos_token": 3}"#)],
                ErrorKind::BadData,
                "eos_token",
            ),
            (
                "eos id is negative",
                vec![("tokenizer.json", &good), ("config.json", r#"{"eos_token_id": -1}"#)],
                ErrorKind::BadData,
                "eos_token_id",
            ),
            (
                "ids contradict",
                vec![
                    ("tokenizer.json", &good),
                    ("tokenizer_config.json", r#"{"added_tokens_decoder": {"9999": {"content": "<new>"}}}"#),
                ],
                ErrorKind::BadData,
                "9999",
            ),
        ] {
            let dir = folder(&files);
            let error = load(dir.path()).unwrap_err();
            assert_eq!(error.kind(), kind, "{name}: {error}");
            assert!(error.to_string().contains(words), "{name}: {error}");
        }
    }
}
