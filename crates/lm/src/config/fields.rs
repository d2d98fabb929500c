//! Typed access to the fields of a JSON object, with errors that say which field of which file.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result, json_type};

/// The fields of an object within a file. `null` counts as absent everywhere, as in Hugging Face's configurations.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    /// The name of the object that this is, if it is not the file itself.
    above: Option<&'a str>,
}

/// A type that a field can have.
pub trait FromField: Sized {
    /// What the type is called in a message.
    const EXPECTED: &'static str;
    /// The value, if it is of this type.
    fn from_field(value: &Value) -> Option<Self>;
}

impl<'a> Fields<'a> {
    /// The fields of the object that a file consists of.
    pub fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { path, map, above: None }
    }

    /// The value of a field that must be there.
    ///
    /// # Errors
    /// It is not there, or of another type.
    pub fn get<T: FromField>(&self, name: &str) -> Result<T> {
        match self.opt(name)? {
            Some(value) => Ok(value),
            None => Err(Error::Field {
                path: self.path.to_owned(),
                field: self.full(name),
                expected: T::EXPECTED.into(),
                got: "nothing".into(),
            }),
        }
    }

    /// The value of a field, or `default` if it is absent.
    ///
    /// # Errors
    /// It is of another type.
    pub fn get_or<T: FromField>(&self, name: &str, default: T) -> Result<T> {
        Ok(self.opt(name)?.unwrap_or(default))
    }

    /// The value of a field, if it is there.
    ///
    /// # Errors
    /// It is of another type.
    pub fn opt<T: FromField>(&self, name: &str) -> Result<Option<T>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match T::from_field(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.bad(name, T::EXPECTED, value)),
            },
        }
    }

    /// The value of the first of several names that is there: a field that was renamed.
    ///
    /// # Errors
    /// It is of another type.
    pub fn first_of<T: FromField>(&self, names: &[&str]) -> Result<Option<T>> {
        for name in names {
            if let Some(value) = self.opt(name)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// The fields of an object within this one, if it is there.
    ///
    /// # Errors
    /// It is not an object.
    pub fn object(&self, name: &'a str) -> Result<Option<Fields<'a>>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { path: self.path, map, above: Some(name) })),
            Some(other) => Err(self.bad(name, "an object", other)),
        }
    }

    /// The fields of an object that was taken out of `outer` under `name`.
    pub(super) fn within(outer: &Fields<'a>, name: &'a str, map: &'a Map<String, Value>) -> Fields<'a> {
        Fields { path: outer.path, map, above: Some(name) }
    }

    /// Whether a field is there and not `null`.
    pub fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// All fields.
    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// The file.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// The error for a field whose value cannot be used.
    pub fn bad(&self, name: &str, expected: &str, got: &Value) -> Error {
        Error::Field {
            path: self.path.to_owned(),
            field: self.full(name),
            expected: expected.to_owned(),
            got: json_type(got),
        }
    }

    fn full(&self, name: &str) -> String {
        match self.above {
            Some(above) => format!("{above}.{name}"),
            None => name.to_owned(),
        }
    }
}

/// A whole number, also when it was written as `4096.0` or `1e6`.
fn whole(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        let number = value.as_f64()?;
        (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64)
    })
}

impl FromField for usize {
    const EXPECTED: &'static str = "a whole number of 0 or more";
    fn from_field(value: &Value) -> Option<Self> {
        usize::try_from(whole(value)?).ok()
    }
}

impl FromField for u32 {
    const EXPECTED: &'static str = "a whole number of 0 or more";
    fn from_field(value: &Value) -> Option<Self> {
        u32::try_from(whole(value)?).ok()
    }
}

impl FromField for i64 {
    const EXPECTED: &'static str = "a whole number";
    fn from_field(value: &Value) -> Option<Self> {
        whole(value)
    }
}

impl FromField for f64 {
    const EXPECTED: &'static str = "a number";
    fn from_field(value: &Value) -> Option<Self> {
        value.as_f64().filter(|number| number.is_finite())
    }
}

impl FromField for f32 {
    const EXPECTED: &'static str = "a number";
    fn from_field(value: &Value) -> Option<Self> {
        f64::from_field(value).map(|number| number as f32).filter(|number| number.is_finite())
    }
}

impl FromField for bool {
    const EXPECTED: &'static str = "true or false";
    fn from_field(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl FromField for String {
    const EXPECTED: &'static str = "a string";
    fn from_field(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
}

impl FromField for Value {
    const EXPECTED: &'static str = "a value";
    fn from_field(value: &Value) -> Option<Self> {
        Some(value.clone())
    }
}

macro_rules! list {
    ($element:ty, $expected:literal) => {
        impl FromField for Vec<$element> {
            const EXPECTED: &'static str = $expected;
            fn from_field(value: &Value) -> Option<Self> {
                value.as_array()?.iter().map(<$element>::from_field).collect()
            }
        }
    };
}
list!(usize, "a list of whole numbers of 0 or more");
list!(i64, "a list of whole numbers");
list!(f64, "a list of numbers");
list!(bool, "a list of true and false");
list!(String, "a list of strings");

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn types_and_absence() {
        let value = json!({"n": 4, "whole": 1e6, "half": 0.5, "neg": -1, "no": null, "s": "x", "l": [1, 2], "mixed": [1, "a"]});
        let map = value.as_object().unwrap();
        let f = Fields::new(Path::new("c.json"), map);
        assert_eq!(f.get::<usize>("n").unwrap(), 4);
        assert_eq!(f.get::<usize>("whole").unwrap(), 1_000_000);
        assert_eq!(f.get::<f32>("n").unwrap(), 4.0);
        assert_eq!(f.get::<Vec<usize>>("l").unwrap(), [1, 2]);
        assert_eq!(f.get_or("no", 7usize).unwrap(), 7, "null is absent");
        assert_eq!(f.first_of::<String>(&["absent", "no", "s"]).unwrap().as_deref(), Some("x"));
        for (name, error, words) in [
            ("absent", f.get::<usize>("absent").unwrap_err(), "got nothing"),
            ("fraction", f.get::<usize>("half").unwrap_err(), "0.5"),
            ("negative", f.get::<usize>("neg").unwrap_err(), "-1"),
            ("string", f.get::<f64>("s").unwrap_err(), "the string \"x\""),
            ("mixed list", f.get::<Vec<usize>>("mixed").unwrap_err(), "a list of 2"),
            ("no object", f.object("n").unwrap_err(), "an object"),
        ] {
            let text = error.to_string();
            assert!(text.starts_with("c.json: field `") && text.contains(words), "{name}: {text}");
        }
    }
}
