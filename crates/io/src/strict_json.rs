//! JSON objects whose keys must be unique.
//!
//! Ordinary parsers keep the last of two equal keys, which lets two programs see two different
//! files. Headers and indices are parsed through this type instead, which also keeps their order.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// The members of a JSON object in the order of the text; equal keys are an error.
#[derive(Debug)]
pub(crate) struct Members<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Members<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor(PhantomData))
    }
}

struct MembersVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for MembersVisitor<V> {
    type Value = Members<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!("{key:?} occurs twice")));
            }
            members.push((key, map.next_value()?));
        }
        Ok(Members(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_and_refuses_equal_keys() {
        let members: Members<u8> = serde_json::from_str(r#"{"b":1,"a":2}"#).unwrap();
        assert_eq!(members.0, [("b".to_owned(), 1), ("a".to_owned(), 2)]);
        // The second spelling of the key is an escape.
        let error = serde_json::from_str::<Members<u8>>(r#"{"a":1,"\u0061":2}"#).unwrap_err();
        assert!(error.to_string().contains("\"a\" occurs twice"), "{error}");
        assert!(serde_json::from_str::<Members<u8>>("[]").is_err());
    }
}
