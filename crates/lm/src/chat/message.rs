//! Messages and conversations: JSON objects, kept as they came.
//!
//! Every family's template looks at other fields (`tool_calls`, `reasoning_content`, `name`, parts of content), so a
//! message keeps all of them; only what every message has gets a method.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result, json_type};

/// One message: an object with a `role`, and usually a `content` (text, a list of parts, or `null`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message(pub Map<String, Value>);

impl Message {
    /// A message of text.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        let mut map = Map::new();
        map.insert("role".into(), role.into());
        map.insert("content".into(), content.into().into());
        Self(map)
    }

    /// A message from JSON.
    ///
    /// # Errors
    /// Not an object, or without a `role` that is a string.
    pub fn from_json(value: Value) -> Result<Self> {
        match value {
            Value::Object(map) => match map.get("role") {
                Some(Value::String(_)) => Ok(Self(map)),
                Some(other) => {
                    Err(Error::Usage(format!("a message's role must be a string, got {}", json_type(other))))
                }
                None => Err(Error::Usage(format!(
                    "a message must have a role, got {}",
                    if map.is_empty() {
                        "an empty object".to_owned()
                    } else {
                        format!("only {}", map.keys().map(String::as_str).collect::<Vec<_>>().join(", "))
                    }
                ))),
            },
            other => Err(Error::Usage(format!("a message must be an object, got {}", json_type(&other)))),
        }
    }

    /// Who speaks: `system`, `user`, `assistant`, `tool`…; empty if the message has no role.
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The text of the content: the string itself, or its text parts joined; `None` for `null` or no content.
    pub fn text(&self) -> Option<String> {
        match self.0.get("content")? {
            Value::String(text) => Some(text.clone()),
            Value::Array(parts) => Some(parts.iter().filter_map(|part| part["text"].as_str()).collect()),
            _ => None,
        }
    }
}

/// Messages with the tools that were at hand.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Conversation {
    /// The messages, in order.
    pub messages: Vec<Message>,
    /// Definitions of tools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
}

impl Conversation {
    /// A conversation from a JSON object with `messages`, and maybe `tools`.
    ///
    /// # Errors
    /// `messages` is not a list of messages, or `tools` not a list.
    pub fn from_json(value: &Value) -> Result<Self> {
        let Some(Value::Array(list)) = value.get("messages") else {
            let got = value.get("messages").map_or_else(|| "none".to_owned(), json_type);
            return Err(Error::Usage(format!("a conversation must have a list of messages, got {got}")));
        };
        let mut messages = Vec::with_capacity(list.len());
        for (i, message) in list.iter().enumerate() {
            messages.push(
                Message::from_json(message.clone()).map_err(|e| Error::Usage(format!("message {i}: {e}")))?,
            );
        }
        let tools = match value.get("tools") {
            None | Some(Value::Null) => None,
            Some(Value::Array(tools)) => Some(tools.clone()),
            Some(other) => {
                return Err(Error::Usage(format!("tools must be a list, got {}", json_type(other))));
            }
        };
        Ok(Self { messages, tools })
    }
}

/// The message as templates see it: reasoning under all its names, as `transformers` passes it
/// (`_alias_reasoning_fields`).
pub(super) fn with_reasoning_aliases(message: &Message) -> Value {
    let mut map = message.0.clone();
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| map.get(*name).filter(|value| !value.is_null()))
        .cloned();
    if let Some(reasoning) = reasoning {
        map.entry("thinking").or_insert_with(|| reasoning.clone());
        map.insert("reasoning_content".into(), reasoning);
    }
    Value::Object(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn conversations_keep_everything() {
        let value = json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}], "odd": {"x": 1}}],
            "tools": [{"type": "function"}]});
        let conversation = Conversation::from_json(&value).unwrap();
        assert_eq!(conversation.messages[0].text().as_deref(), Some("ab"));
        assert_eq!(conversation.messages[1].text(), None);
        assert_eq!(conversation.messages[1].role(), "assistant");
        assert_eq!(serde_json::to_value(&conversation).unwrap(), value);
    }

    #[test]
    fn what_is_no_conversation_says_why() {
        for (value, words) in [
            (json!({}), "a list of messages, got none"),
            (json!({"messages": "hi"}), "the string \"hi\""),
            (
                json!({"messages": [{"content": "x"}]}),
                "message 0: a message must have a role, got only content",
            ),
            (json!({"messages": [{"role": 3}]}), "the number 3"),
            (json!({"messages": [{"role": "user"}, 4]}), "message 1: a message must be an object"),
            (json!({"messages": [], "tools": {}}), "tools must be a list"),
        ] {
            let error = Conversation::from_json(&value).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn reasoning_goes_by_all_its_names() {
        for name in ["reasoning_content", "thinking", "reasoning"] {
            let message = Message::from_json(json!({"role": "assistant", name: "hm"})).unwrap();
            let seen = with_reasoning_aliases(&message);
            assert_eq!(
                (&seen["reasoning_content"], &seen["thinking"]),
                (&json!("hm"), &json!("hm")),
                "{name}"
            );
        }
        let plain = Message::new("assistant", "x");
        assert_eq!(with_reasoning_aliases(&plain), json!({"role": "assistant", "content": "x"}));
    }
}
