//! Which weight is in which file.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::Deserialize;

use crate::input::InputFile;
use crate::strict_json::Members;
use crate::{Error, Result};

/// Longest index accepted, in bytes. Real ones stay under 10 MB.
const MAX_INDEX: u64 = 100_000_000;

#[derive(Deserialize)]
struct Index {
    weight_map: Members<String>,
}

/// Reads an index: name of a weight → name of its file, relative to the folder and inside it.
pub(super) fn read(path: &Path) -> Result<BTreeMap<String, String>> {
    let file = InputFile::open(path)?;
    if file.len() > MAX_INDEX {
        return Err(Error::bad_data(path, format!("has more than {MAX_INDEX} bytes")));
    }
    let text = file.read_vec(0, file.len() as usize)?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| Error::bad_data(path, e.to_string()))?;
    let members = index.weight_map.0;
    for (tensor, file) in &members {
        if !is_inside(file) {
            let what = format!("the file of {tensor:?}, {file:?}, leads out of the folder");
            return Err(Error::bad_data(path, what));
        }
    }
    Ok(members.into_iter().collect())
}

/// Whether a name given by a stranger stays in the folder that it is relative to.
///
/// Symbolic links in the folder are another matter: the person who keeps the folder made them.
fn is_inside(name: &str) -> bool {
    let mut components = Path::new(name).components().peekable();
    components.peek().is_some()
        && components.all(|c| matches!(c, Component::Normal(_)))
        && !name.contains(['\\', '\0'])
}

/// Whether sorted file names are `NAME-00001-of-0000N.safetensors` to `NAME-0000N-of-…`, all.
pub(super) fn is_complete_set(names: &[String]) -> bool {
    let Some((stem, _, count)) = names.first().and_then(|name| parse_shard(name)) else {
        return false;
    };
    count == names.len()
        && names.iter().zip(1..).all(|(name, number)| parse_shard(name) == Some((stem, number, count)))
}

/// Takes `NAME-00002-of-00007.safetensors` apart: NAME, 2, 7.
pub(super) fn parse_shard(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let parse = |text: &str| {
        let digits = text.len() >= 5 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok())?
    };
    Some((stem, parse(number)?, parse(count)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_stay_inside() {
        let cases = [
            ("a.safetensors", true),
            ("sub/a.safetensors", true),
            ("..a..b", true),
            ("", false),
            (".", false),
            ("..", false),
            ("../a", false),
            ("sub/../../a", false),
            ("sub/..", false),
            ("/etc/passwd", false),
            ("..\\a", false),
            ("C:\\a", false),
            ("a\0b", false),
        ];
        for (name, inside) in cases {
            assert_eq!(is_inside(name), inside, "{name:?}");
        }
    }

    #[test]
    fn shard_names() {
        let cases = [
            ("model-00002-of-00007.safetensors", Some(("model", 2, 7))),
            ("a-b-of-c-00001-of-00001.safetensors", Some(("a-b-of-c", 1, 1))),
            ("model-100000-of-100001.safetensors", Some(("model", 100000, 100001))),
            ("model-2-of-7.safetensors", None),
            ("model-+0002-of-00007.safetensors", None),
            ("model-00002-of-00007.bin", None),
            ("model.safetensors", None),
            ("model-99999999999999999999999-of-00007.safetensors", None),
        ];
        for (name, parts) in cases {
            assert_eq!(parse_shard(name), parts, "{name}");
        }
    }

    #[test]
    fn broken_indices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("i.json");
        let cases = [
            ("not JSON", "{", "EOF"),
            ("no map", "{}", "weight_map"),
            ("map is a list", r#"{"weight_map":[]}"#, "invalid type"),
            ("file is a number", r#"{"weight_map":{"a":1}}"#, "expected a string"),
            ("equal names", r#"{"weight_map":{"a":"x","a":"y"}}"#, "occurs twice"),
            ("absolute", r#"{"weight_map":{"a":"/x"}}"#, "leads out"),
        ];
        for (name, text, message) in cases {
            std::fs::write(&path, text).unwrap();
            let error = read(&path).expect_err(name).to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
        let deep = format!(r#"{{"metadata":{}"#, "[".repeat(100_000));
        std::fs::write(&path, deep).unwrap();
        assert!(read(&path).is_err());
    }
}
