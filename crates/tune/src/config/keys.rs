//! Reading settings from YAML or flags, with errors that name the key and the nearest known one.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Settings by name, before they have types.
pub type Settings = Map<String, Value>;

/// Most bytes of a configuration file.
const LARGEST: u64 = 4 << 20;

/// Reads a YAML (or JSON) file of settings. An empty file has none.
pub fn read(path: impl AsRef<Path>) -> Result<Settings> {
    let path = path.as_ref();
    let about = std::fs::metadata(path).map_err(|e| Error::file(path, e))?;
    if about.len() > LARGEST {
        return Err(Error::Data {
            path: path.into(),
            cause: format!("is larger than {LARGEST} bytes, too large for settings"),
        });
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    parse(&text).map_err(|cause| Error::Data { path: path.into(), cause })
}

/// Settings from YAML text.
pub fn parse(text: &str) -> std::result::Result<Settings, String> {
    match serde_saphyr::from_str::<Value>(text) {
        Ok(Value::Object(settings)) => Ok(settings),
        Ok(Value::Null) => Ok(Settings::new()),
        Ok(_) => Err("expected settings as \"key: value\" lines".into()),
        Err(error) => Err(format!("not valid YAML: {error}")),
    }
}

/// Lays `over` upon `settings`: sections are merged, other values replaced.
pub fn overlay(settings: &mut Settings, over: Settings) {
    for (key, value) in over {
        match (settings.get_mut(&key), value) {
            (Some(Value::Object(section)), Value::Object(inner)) => overlay(section, inner),
            (_, value) => {
                settings.insert(key, value);
            }
        }
    }
}

/// Gives settings their types. `T`'s default must serialise with all of its keys; a key that `T` does not
/// have, and a value of the wrong type, are errors that name the key (after `section`, if that is not empty).
pub fn typed<T: Serialize + DeserializeOwned + Default>(settings: Settings, section: &str) -> Result<T> {
    let full = |key: &str| if section.is_empty() { key.to_string() } else { format!("{section}.{key}") };
    let Ok(Value::Object(known)) = serde_json::to_value(T::default()) else {
        return Err(Error::Config("this type has no keys".into()));
    };
    for key in settings.keys() {
        if !known.contains_key(key) {
            let names: Vec<&str> = known.keys().map(String::as_str).collect();
            return Err(Error::Config(unknown("key", &full(key), key, &names)));
        }
    }
    let attempt = |settings: &Settings| serde_json::from_value::<T>(Value::Object(settings.clone()));
    attempt(&settings).map_err(|error| {
        // Alone, only the guilty key fails.
        let guilty = settings.iter().find_map(|(key, value)| {
            let alone = Settings::from_iter([(key.clone(), value.clone())]);
            attempt(&alone).err().map(|error| (key, value, error))
        });
        Error::Config(match guilty {
            Some((key, value, error)) => format!("{} is {value}: {error}", full(key)),
            None => error.to_string(),
        })
    })
}

/// The message for a name that is not known: the nearest one, and all of them if there are few.
pub fn unknown(what: &str, shown: &str, name: &str, known: &[&str]) -> String {
    let nearest = known.iter().min_by_key(|candidate| distance(name, candidate));
    let close = nearest
        .filter(|candidate| distance(name, candidate) <= 1 + name.chars().count().max(candidate.len()) / 3);
    let mut message = format!("unknown {what} \"{shown}\"");
    if let Some(close) = close {
        message.push_str(&format!("; did you mean \"{close}\"?"));
    }
    if known.len() <= 12 || close.is_none() {
        message.push_str(&format!(" Known are: {}", known.join(", ")));
    }
    message
}

/// Edits (insert, delete, replace, swap of neighbours) that lead from one name to the other; `-` counts as `_`.
fn distance(a: &str, b: &str) -> usize {
    let letters = |s: &str| s.to_lowercase().replace('-', "_").chars().take(64).collect::<Vec<_>>();
    let (a, b) = (letters(a), letters(b));
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let mut best = change.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default)]
    struct Some {
        batch_size: Option<usize>,
        learning_rate: Option<f64>,
        name: Option<String>,
    }

    #[test]
    fn yaml_has_numbers_as_people_write_them() {
        let settings = parse("learning_rate: 1e-5\nbatch_size: 4\nname: \"a\"\n").unwrap();
        let some: Some = typed(settings, "").unwrap();
        assert_eq!(
            (some.learning_rate, some.batch_size, some.name.as_deref()),
            (Some(1e-5), Some(4), Some("a"))
        );
        assert!(parse("").unwrap().is_empty());
        assert!(parse("# nothing\n").unwrap().is_empty());
        assert!(parse("- a\n").unwrap_err().contains("key: value"));
        assert!(parse("a: [1\n").unwrap_err().contains("not valid YAML"));
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_named() {
        let cases = [
            (
                "a letter missing",
                json!({"batch_sze": 4}),
                "unknown key \"s.batch_sze\"; did you mean \"batch_size\"?",
            ),
            ("swapped", json!({"nmae": "x"}), "did you mean \"name\"?"),
            ("dash", json!({"learning-rate": 1}), "did you mean \"learning_rate\"?"),
            ("far away", json!({"zzzzzzzzzz": 1}), "Known are: batch_size, learning_rate, name"),
            ("type", json!({"learning_rate": 1.0, "batch_size": "four"}), "s.batch_size is \"four\""),
            ("negative", json!({"batch_size": -1}), "s.batch_size is -1"),
        ];
        for (name, value, part) in cases {
            let Value::Object(settings) = value else { unreachable!() };
            let error = typed::<Some>(settings, "s").expect_err(name).to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
    }

    #[test]
    fn numbers_that_json_lacks_are_refused_and_not_dropped() {
        for text in ["rate: .nan", "rate: .inf", "a: {b: [1, -.inf]}"] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("non-finite"), "{text}: {error}");
        }
        let settings = parse("a: {b: [1, -2, 0.5, null, true, x]}\nc: 1e-5").unwrap();
        let expected = json!({"a": {"b": [1, -2, 0.5, null, true, "x"]}, "c": 1e-5});
        assert_eq!(Value::Object(settings), expected);
    }

    #[test]
    fn overlays_merge_sections() {
        let Value::Object(mut settings) = json!({"a": {"b": 1, "c": 2}, "d": 3}) else { unreachable!() };
        let Value::Object(over) = json!({"a": {"c": 4}, "d": 5, "e": 6}) else { unreachable!() };
        overlay(&mut settings, over);
        assert_eq!(Value::Object(settings), json!({"a": {"b": 1, "c": 4}, "d": 5, "e": 6}));
    }
}
