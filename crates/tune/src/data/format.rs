//! What one line of a data file means: its form, its columns, and the record it becomes.
//!
//! The forms are trl's and mlx-lm's (`messages`, `prompt` + `completion`, `text`, preference pairs,
//! labelled completions), token ids for data that was tokenized elsewhere, and the two older ones that
//! people still download: ShareGPT (`conversations` of `from`/`value`) and Alpaca (`instruction`,
//! `input`, `output`). A file has one form, decided by its first record; a later line of another form is
//! an error and not a silent change of meaning. Reading files is in [`super::read`], tokenizing in
//! [`super::sample`].

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A piece of a record: plain text, or messages `{"role", "content", …}` for the chat template.
#[derive(Clone, Debug, PartialEq)]
pub enum Turns {
    /// Text as it stands.
    Text(String),
    /// Chat messages, checked to be objects with a `role`.
    Messages(Vec<Value>),
}

/// One training example before tokenizing.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation, with the tools that were on offer (an empty list: none).
    Messages {
        /// At least one message.
        messages: Vec<Value>,
        /// Tool definitions in the chat template's form.
        tools: Vec<Value>,
    },
    /// A question and the answer to learn.
    PromptCompletion {
        /// What is given.
        prompt: Turns,
        /// What is to be learnt.
        completion: Turns,
        /// Tool definitions, for conversational prompts.
        tools: Vec<Value>,
    },
    /// Running text.
    Text(String),
    /// A prompt alone, for methods that write the answers themselves.
    Prompt {
        /// What is given.
        prompt: Turns,
        /// The rest of the line (answers to check against, for reward functions).
        extra: Map<String, Value>,
    },
    /// A better and a worse answer. Without a prompt of its own, the prompt is what both begin with.
    Preference {
        /// What is given, where the line says it apart.
        prompt: Option<Turns>,
        /// The better answer.
        chosen: Turns,
        /// The worse answer.
        rejected: Turns,
    },
    /// An answer with a verdict (KTO).
    Labelled {
        /// What is given.
        prompt: Turns,
        /// The answer.
        completion: Turns,
        /// Whether the answer is wanted.
        label: bool,
    },
    /// Tokens made elsewhere.
    TokenIds {
        /// Token ids.
        tokens: Vec<u32>,
        /// Which of them are to be learnt; `None` means all but the first.
        targets: Option<Vec<bool>>,
    },
}

/// The forms that a data file can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the variants are named after the record they give
pub enum Form {
    Messages,
    PromptCompletion,
    Text,
    Prompt,
    Preference,
    Labelled,
    TokenIds,
    ShareGpt,
    Alpaca,
}

/// What every error about a form ends with.
pub const EXPECTED_FORMS: &str = "expected one of: {\"messages\": [{\"role\", \"content\"}, …]} (+ \"tools\"), \
    {\"prompt\", \"completion\"}, {\"text\"}, {\"prompt\", \"chosen\", \"rejected\"}, \
    {\"prompt\", \"completion\", \"label\"}, {\"prompt\"}, {\"input_ids\"} (+ \"labels\"), \
    {\"conversations\": [{\"from\", \"value\"}, …]}, {\"instruction\", \"output\"} (+ \"input\", \"system\")";

/// Names of the columns, for files that call them otherwise (`prompt_feature` and so on in mlx-lm).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // each field is the column of that name
pub struct Columns {
    pub prompt: String,
    pub completion: String,
    pub chat: String,
    pub text: String,
    pub chosen: String,
    pub rejected: String,
    pub label: String,
    pub tools: String,
}

impl Default for Columns {
    fn default() -> Self {
        Columns {
            prompt: "prompt".into(),
            completion: "completion".into(),
            chat: "messages".into(),
            text: "text".into(),
            chosen: "chosen".into(),
            rejected: "rejected".into(),
            label: "label".into(),
            tools: "tools".into(),
        }
    }
}

impl Form {
    /// The form of a record by its columns, or why it has none.
    ///
    /// Columns that were renamed win over the built-in names, and a form with more of its columns
    /// present wins over one with fewer (`prompt` + `completion` + `label` over `prompt` + `completion`).
    pub fn detect(row: &Map<String, Value>, columns: &Columns) -> Result<Form, String> {
        let has = |name: &str| row.get(name).is_some_and(|value| !value.is_null());
        let prompt = has(&columns.prompt);
        let form = if has(&columns.chosen) && has(&columns.rejected) {
            Form::Preference
        } else if prompt && has(&columns.completion) && has(&columns.label) {
            Form::Labelled
        } else if prompt && has(&columns.completion) {
            Form::PromptCompletion
        } else if has(&columns.chat) {
            Form::Messages
        } else if has("conversations") {
            Form::ShareGpt
        } else if has("instruction") && has("output") {
            Form::Alpaca
        } else if has("input_ids") || has("tokens") {
            Form::TokenIds
        } else if has(&columns.text) {
            Form::Text
        } else if prompt {
            Form::Prompt
        } else {
            let keys: Vec<&str> = row.keys().map(String::as_str).collect();
            return Err(format!("no known form: the columns are [{}]; {EXPECTED_FORMS}", keys.join(", ")));
        };
        Ok(form)
    }

    /// Reads a row as a record of this form, or says what is missing or wrong.
    pub fn parse(self, mut row: Map<String, Value>, columns: &Columns) -> Result<Record, String> {
        let row = &mut row;
        Ok(match self {
            Form::Messages => {
                let (messages, tools) = (take_messages(row, &columns.chat)?, take_tools(row, columns)?);
                Record::Messages { messages, tools }
            }
            Form::PromptCompletion => {
                let (prompt, completion) =
                    (take_turns(row, &columns.prompt)?, take_turns(row, &columns.completion)?);
                same_kind(&[(&columns.prompt, &prompt), (&columns.completion, &completion)])?;
                Record::PromptCompletion { prompt, completion, tools: take_tools(row, columns)? }
            }
            Form::Text => match take(row, &columns.text)? {
                Value::String(text) => Record::Text(text),
                other => return Err(wrong(&columns.text, "a string", &other)),
            },
            Form::Prompt => {
                let prompt = take_turns(row, &columns.prompt)?;
                Record::Prompt { prompt, extra: std::mem::take(row) }
            }
            Form::Preference => {
                let prompt = match row.get(&columns.prompt) {
                    None | Some(Value::Null) => None,
                    Some(_) => Some(take_turns(row, &columns.prompt)?),
                };
                let (chosen, rejected) =
                    (take_turns(row, &columns.chosen)?, take_turns(row, &columns.rejected)?);
                let mut parts = vec![(&columns.chosen, &chosen), (&columns.rejected, &rejected)];
                parts.extend(prompt.as_ref().map(|prompt| (&columns.prompt, prompt)));
                same_kind(&parts)?;
                Record::Preference { prompt, chosen, rejected }
            }
            Form::Labelled => {
                let (prompt, completion) =
                    (take_turns(row, &columns.prompt)?, take_turns(row, &columns.completion)?);
                same_kind(&[(&columns.prompt, &prompt), (&columns.completion, &completion)])?;
                let label = match take(row, &columns.label)? {
                    Value::Bool(label) => label,
                    Value::Number(n) if n.as_u64() == Some(1) => true,
                    Value::Number(n) if n.as_u64() == Some(0) => false,
                    other => return Err(wrong(&columns.label, "true or false", &other)),
                };
                Record::Labelled { prompt, completion, label }
            }
            Form::TokenIds => token_ids(row)?,
            Form::ShareGpt => sharegpt(row, columns)?,
            Form::Alpaca => alpaca(row)?,
        })
    }
}

/// What a JSON value is, in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn wrong(name: &str, expected: &str, got: &Value) -> String {
    format!("\"{name}\" must be {expected}, got {}", kind(got))
}

fn take(row: &mut Map<String, Value>, name: &str) -> Result<Value, String> {
    match row.remove(name) {
        None | Some(Value::Null) => Err(format!("\"{name}\" is missing, as the file's first record has it")),
        Some(value) => Ok(value),
    }
}

fn take_string(row: &mut Map<String, Value>, name: &str) -> Result<String, String> {
    match take(row, name)? {
        Value::String(text) => Ok(text),
        other => Err(wrong(name, "a string", &other)),
    }
}

/// Text or messages, by what the column holds.
fn take_turns(row: &mut Map<String, Value>, name: &str) -> Result<Turns, String> {
    match take(row, name)? {
        Value::String(text) => Ok(Turns::Text(text)),
        Value::Array(list) => Ok(Turns::Messages(check_messages(list, name)?)),
        other => Err(wrong(name, "a string or a list of messages", &other)),
    }
}

fn take_messages(row: &mut Map<String, Value>, name: &str) -> Result<Vec<Value>, String> {
    match take(row, name)? {
        Value::Array(list) => check_messages(list, name),
        other => Err(wrong(name, "a list of messages", &other)),
    }
}

/// Every message is an object with a role, and with content or tool calls.
fn check_messages(list: Vec<Value>, name: &str) -> Result<Vec<Value>, String> {
    if list.is_empty() {
        return Err(format!("\"{name}\" is an empty list; a conversation needs at least one message"));
    }
    for (i, message) in list.iter().enumerate() {
        let Value::Object(message) = message else {
            return Err(wrong(&format!("{name}[{i}]"), "an object with \"role\" and \"content\"", message));
        };
        match message.get("role") {
            Some(Value::String(_)) => {}
            Some(other) => return Err(wrong(&format!("{name}[{i}].role"), "a string", other)),
            None => return Err(format!("\"{name}[{i}]\" has no \"role\"")),
        }
        match message.get("content") {
            Some(Value::String(_) | Value::Array(_)) => {}
            None | Some(Value::Null) if message.contains_key("tool_calls") => {}
            None => {
                return Err(format!("\"{name}[{i}]\" has neither \"content\" nor \"tool_calls\""));
            }
            Some(other) => {
                return Err(wrong(&format!("{name}[{i}].content"), "a string or a list of parts", other));
            }
        }
    }
    Ok(list)
}

/// Tools as a list; a string holding such a list is accepted, since that is how tables store it.
fn take_tools(row: &mut Map<String, Value>, columns: &Columns) -> Result<Vec<Value>, String> {
    let name = &columns.tools;
    match row.remove(name) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(tools)) => Ok(tools),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Vec::new()),
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(Value::Array(tools)) => Ok(tools),
            Ok(other) => Err(wrong(name, "a list of tools", &other)),
            Err(error) => Err(format!("\"{name}\" is a string that holds no JSON list: {error}")),
        },
        Some(other) => Err(wrong(name, "a list of tools", &other)),
    }
}

/// Strings and messages are not mixed within a record: how they would join is anyone's guess.
fn same_kind(parts: &[(&String, &Turns)]) -> Result<(), String> {
    let is_text = |turns: &Turns| matches!(turns, Turns::Text(_));
    let (first_name, first) = parts[0];
    match parts.iter().find(|(_, turns)| is_text(turns) != is_text(first)) {
        None => Ok(()),
        Some((name, _)) => {
            Err(format!("\"{first_name}\" and \"{name}\" must both be strings or both be lists of messages"))
        }
    }
}

fn token_ids(row: &mut Map<String, Value>) -> Result<Record, String> {
    let name = if row.contains_key("input_ids") { "input_ids" } else { "tokens" };
    let numbers = |name: &str, value: Value| match value {
        Value::Array(list) => Ok(list),
        other => Err(wrong(name, "a list of numbers", &other)),
    };
    let tokens = numbers(name, take(row, name)?)?
        .iter()
        .enumerate()
        .map(|(i, id)| {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| format!("\"{name}[{i}]\" is no token id (a whole number from 0)"))
        })
        .collect::<Result<Vec<u32>, String>>()?;
    let targets = match row.remove("labels") {
        None | Some(Value::Null) => None,
        Some(labels) => {
            let labels = numbers("labels", labels)?;
            if labels.len() != tokens.len() {
                return Err(format!("\"labels\" has {} entries for {} tokens", labels.len(), tokens.len()));
            }
            let target = |(i, label): (usize, &Value)| match label.as_i64() {
                Some(-100) => Ok(false),
                Some(id) if id == i64::from(tokens[i]) => Ok(true),
                _ => Err(format!(
                    "\"labels[{i}]\" must be the token itself ({}) or -100, got {label}",
                    tokens[i]
                )),
            };
            Some(labels.iter().enumerate().map(target).collect::<Result<Vec<bool>, String>>()?)
        }
    };
    Ok(Record::TokenIds { tokens, targets })
}

/// ShareGPT: `conversations` of `from`/`value` (or already `role`/`content`), `system` beside them.
fn sharegpt(row: &mut Map<String, Value>, columns: &Columns) -> Result<Record, String> {
    let name = "conversations";
    let Value::Array(list) = take(row, name)? else {
        return Err(format!("\"{name}\" must be a list"));
    };
    let mut messages = Vec::with_capacity(list.len() + 1);
    if let Some(Value::String(system)) = row.remove("system")
        && !system.is_empty()
    {
        messages.push(serde_json::json!({"role": "system", "content": system}));
    }
    for (i, turn) in list.into_iter().enumerate() {
        let Value::Object(mut turn) = turn else {
            return Err(wrong(&format!("{name}[{i}]"), "an object with \"from\" and \"value\"", &turn));
        };
        if turn.contains_key("role") {
            messages.push(Value::Object(turn));
            continue;
        }
        let inside = |cause: String| format!("{name}[{i}]: {cause}");
        let from = take_string(&mut turn, "from").map_err(inside)?;
        let value = take_string(&mut turn, "value").map_err(inside)?;
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "bot" | "model" => "assistant",
            "system" => "system",
            "observation" | "tool" | "function_response" => "tool",
            _ => {
                return Err(format!(
                    "\"{name}[{i}].from\" is \"{from}\"; known are human, user, gpt, assistant, system, tool, observation \
                     (calls of tools: use \"messages\" with \"tool_calls\")"
                ));
            }
        };
        messages.push(serde_json::json!({"role": role, "content": value}));
    }
    Ok(Record::Messages { messages: check_messages(messages, name)?, tools: take_tools(row, columns)? })
}

/// Alpaca: the instruction and, after an empty line, its input are the prompt; the output is learnt.
fn alpaca(row: &mut Map<String, Value>) -> Result<Record, String> {
    let mut prompt = take_string(row, "instruction")?;
    match row.remove("input") {
        None | Some(Value::Null) => {}
        Some(Value::String(input)) if input.is_empty() => {}
        Some(Value::String(input)) => {
            prompt.push_str("\n\n");
            prompt.push_str(&input);
        }
        Some(other) => return Err(wrong("input", "a string", &other)),
    }
    let completion = take_string(row, "output")?;
    let (prompt, completion) = match row.remove("system") {
        Some(Value::String(system)) if !system.is_empty() => {
            let message = |role: &str, content: String| serde_json::json!({"role": role, "content": content});
            (
                Turns::Messages(vec![message("system", system), message("user", prompt)]),
                Turns::Messages(vec![message("assistant", completion)]),
            )
        }
        _ => (Turns::Text(prompt), Turns::Text(completion)),
    };
    Ok(Record::PromptCompletion { prompt, completion, tools: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(line: Value, columns: &Columns) -> Result<(Form, Record), String> {
        let Value::Object(row) = line else { panic!("test lines are objects") };
        let form = Form::detect(&row, columns)?;
        Ok((form, form.parse(row, columns)?))
    }

    #[test]
    fn forms_are_recognised_by_their_columns() {
        let cases = [
            ("messages", json!({"messages": [{"role": "user", "content": "hi"}]}), Form::Messages),
            (
                "messages beside text",
                json!({"text": "x", "messages": [{"role": "user", "content": "hi"}]}),
                Form::Messages,
            ),
            ("null columns are absent", json!({"messages": null, "text": "x"}), Form::Text),
            ("pair", json!({"prompt": "a", "completion": "b", "id": 3}), Form::PromptCompletion),
            ("verdict", json!({"prompt": "a", "completion": "b", "label": true}), Form::Labelled),
            ("preference", json!({"prompt": "a", "chosen": "b", "rejected": "c"}), Form::Preference),
            ("implicit prompt", json!({"chosen": "ab", "rejected": "ac"}), Form::Preference),
            ("prompt only", json!({"prompt": "a", "answer": "42"}), Form::Prompt),
            ("token ids", json!({"input_ids": [1, 2], "labels": [-100, 2]}), Form::TokenIds),
            ("sharegpt", json!({"conversations": [{"from": "human", "value": "a"}]}), Form::ShareGpt),
            ("alpaca", json!({"instruction": "a", "input": "", "output": "b"}), Form::Alpaca),
        ];
        for (name, line, form) in cases {
            assert_eq!(read(line, &Columns::default()).map(|(form, _)| form), Ok(form), "{name}");
        }
    }

    #[test]
    fn renamed_columns_are_used() {
        let columns =
            Columns { prompt: "question".into(), completion: "answer".into(), ..Columns::default() };
        let line = json!({"question": "q", "answer": "a", "prompt": "not this"});
        let (_, record) = read(line, &columns).unwrap();
        let text = |t: &str| Turns::Text(t.into());
        assert_eq!(
            record,
            Record::PromptCompletion { prompt: text("q"), completion: text("a"), tools: vec![] }
        );
    }

    #[test]
    fn older_forms_become_modern_records() {
        let columns = Columns::default();
        let line = json!({"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]});
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        assert_eq!(
            read(line, &columns).unwrap().1,
            Record::Messages {
                messages: vec![message("system", "S"), message("user", "a"), message("assistant", "b")],
                tools: vec![]
            }
        );
        let line = json!({"instruction": "Add.", "input": "1 2", "output": "3"});
        let text = |t: &str| Turns::Text(t.into());
        assert_eq!(
            read(line, &columns).unwrap().1,
            Record::PromptCompletion { prompt: text("Add.\n\n1 2"), completion: text("3"), tools: vec![] }
        );
    }

    #[test]
    fn labels_of_token_ids_become_targets() {
        let record =
            read(json!({"tokens": [5, 6, 7], "labels": [-100, 6, -100]}), &Columns::default()).unwrap().1;
        assert_eq!(
            record,
            Record::TokenIds { tokens: vec![5, 6, 7], targets: Some(vec![false, true, false]) }
        );
    }

    #[test]
    fn tools_may_be_a_list_or_a_string_that_holds_one() {
        let messages = json!([{"role": "user", "content": "a"}]);
        for tools in [json!([{"name": "f"}]), json!("[{\"name\": \"f\"}]")] {
            let (_, record) =
                read(json!({"messages": messages, "tools": tools}), &Columns::default()).unwrap();
            let Record::Messages { tools, .. } = record else { panic!("{record:?}") };
            assert_eq!(tools, vec![json!({"name": "f"})]);
        }
    }

    #[test]
    fn bad_records_say_what_is_wrong() {
        let cases = [
            ("no form", json!({"foo": 1, "bar": 2}), "columns are [foo, bar]; expected one of"),
            ("empty conversation", json!({"messages": []}), "at least one message"),
            ("no role", json!({"messages": [{"content": "x"}]}), "messages[0]\" has no \"role\""),
            ("no content", json!({"messages": [{"role": "user"}]}), "neither \"content\" nor \"tool_calls\""),
            ("content is a number", json!({"messages": [{"role": "user", "content": 3}]}), "got a number"),
            ("text is a list", json!({"text": ["a"]}), "\"text\" must be a string, got a list"),
            (
                "mixed kinds",
                json!({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}),
                "must both be strings",
            ),
            ("label is a word", json!({"prompt": "a", "completion": "b", "label": "yes"}), "true or false"),
            ("negative id", json!({"input_ids": [1, -2]}), "input_ids[1]"),
            ("label of another token", json!({"input_ids": [1, 2], "labels": [1, 3]}), "labels[1]"),
            ("labels too short", json!({"input_ids": [1, 2], "labels": [1]}), "1 entries for 2 tokens"),
            ("unknown speaker", json!({"conversations": [{"from": "alien", "value": "a"}]}), "\"alien\""),
        ];
        for (name, line, part) in cases {
            let error = read(line, &Columns::default()).expect_err(name);
            assert!(error.contains(part), "{name}: {error}");
        }
    }
}
