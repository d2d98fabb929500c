//! Chat templates: from messages to the text, and the tokens, that a model was trained on.
//!
//! A template is a program in the Jinja language that came with the model, so it is run bounded (instructions,
//! recursion, sizes of values and of the output) and without any access to files. It behaves as `transformers` runs it
//! (`apply_chat_template`): `trim_blocks` and `lstrip_blocks`, Python's methods on strings, lists and dictionaries,
//! JSON as `json.dumps` writes it, `raise_exception`, `strftime_now`, and `{% generation %}` blocks that mark what
//! the model is to learn.
//!
//! Text that people and tools supply never becomes a control token by looking like one; [`Guard`] says how far that
//! goes and `guard` how it is done.
//!
//! - [`Message`], [`Conversation`]: what is rendered; JSON, kept as it came.
//! - [`ChatTemplate`]: loading, rendering, encoding.
//! - [`tokenize_conversation`]: a training example with its loss masks.

mod bounds;
mod environment;
mod guard;
mod mask;
mod message;
mod python;
mod source;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::Environment;
use serde_json::{Map, Value};

pub use environment::Moment;
pub use guard::Guard;
pub use mask::{ChatTokens, MaskedConversation, tokenize_conversation};
pub use message::{Conversation, Message};

use crate::error::{Error, Result, json_type, read_json_object, read_text};
use crate::tokenizer::{Cut, Tokenizer};
use guard::Sentinels;

/// A chat template is a few kilobytes; the largest known is 20.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// What a rendering may produce.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// What a rendering may execute, in instructions of the template machine. A conversation of a thousand messages
/// needs about a hundred thousand.
const FUEL: u64 = 50_000_000;
/// How deep macros may call each other.
const RECURSION: usize = 200;

/// A model's chat template, or several by name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    default: Arc<Compiled>,
    named: Vec<(String, Arc<Compiled>)>,
    /// `bos_token`, `eos_token` and so on, as templates print them.
    tokens: Map<String, Value>,
}

#[derive(Debug)]
struct Compiled {
    name: String,
    source: String,
    environment: Environment<'static>,
    marks_generation: bool,
}

/// What to render.
#[derive(Debug, Clone)]
pub struct ChatRequest<'a> {
    /// The messages, in order.
    pub messages: &'a [Message],
    /// Definitions of tools, each a JSON object (`{"type": "function", "function": {…}}`).
    pub tools: Option<&'a [Value]>,
    /// Whether to end with what the template writes before an answer, so that the model answers.
    pub add_generation_prompt: bool,
    /// Whether to end in the middle of the last message, so that the model goes on with it. Excludes
    /// `add_generation_prompt`.
    pub continue_final_message: bool,
    /// Further variables: `enable_thinking`, `reasoning_effort`, `documents`…
    pub extra: Map<String, Value>,
    /// Which text is kept from becoming control tokens.
    pub guard: Guard,
    /// The time that `strftime_now` tells; the present if `None`.
    pub now: Option<Moment>,
}

impl<'a> ChatRequest<'a> {
    /// A request with the given messages and nothing else: no tools, no generation prompt, guarded.
    pub fn new(messages: &'a [Message]) -> Self {
        Self {
            messages,
            tools: None,
            add_generation_prompt: false,
            continue_final_message: false,
            extra: Map::new(),
            guard: Guard::Chat,
            now: None,
        }
    }
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Where control tokens are not to be recognised, ascending.
    pub cuts: Vec<Cut>,
    /// What stood in `{% generation %}` blocks, in bytes of the text, ascending.
    pub generated: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// The template of a model folder, `None` if it has none.
    ///
    /// Looked for in `chat_template.jinja` (with `additional_chat_templates/*.jinja`), then `chat_template.json`,
    /// then the `chat_template` of `tokenizer_config.json`, which is a string or a list of named ones.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that does not parse.
    pub fn load(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let dir = dir.as_ref();
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json_object(&config_path, "the tokenizer's configuration")?.unwrap_or_default();
        let map =
            read_json_object(&dir.join("special_tokens_map.json"), "the special tokens")?.unwrap_or_default();
        let mut tokens = Map::new();
        for (name, value) in map.iter().chain(&config) {
            if let (true, Some(text)) = (name.ends_with("_token"), token_text(value)) {
                tokens.insert(name.clone(), text.into());
            }
        }
        let jinja = dir.join("chat_template.jinja");
        let json = dir.join("chat_template.json");
        let (path, found) = if let Some(source) = read_text(&jinja, "the chat template", MAX_TEMPLATE_BYTES)?
        {
            let mut sources = vec![("default".to_owned(), source)];
            sources.extend(additional(&dir.join("additional_chat_templates"))?);
            (jinja, sources)
        } else if let Some(object) = read_json_object(&json, "the chat template")? {
            let sources = sources_of(&json, object.get("chat_template").unwrap_or(&Value::Null))?;
            (json, sources)
        } else {
            let sources = sources_of(&config_path, config.get("chat_template").unwrap_or(&Value::Null))?;
            (config_path, sources)
        };
        if found.is_empty() { Ok(None) } else { Self::from_sources(&path, found, tokens).map(Some) }
    }

    /// A template from its source. `tokens` are the variables `bos_token`, `eos_token` and so on.
    ///
    /// # Errors
    /// When it does not parse.
    pub fn new(name: &str, source: &str, tokens: Map<String, Value>) -> Result<Self> {
        Ok(Self { default: Arc::new(Compiled::new(name, source)?), named: Vec::new(), tokens })
    }

    fn from_sources(path: &Path, sources: Vec<(String, String)>, tokens: Map<String, Value>) -> Result<Self> {
        let mut named = Vec::new();
        for (name, source) in sources {
            let compiled = Compiled::new(&format!("{name} of {}", path.display()), &source)?;
            named.push((name, Arc::new(compiled)));
        }
        let default = named.iter().find(|(name, _)| name == "default").or(named.first());
        let Some((_, default)) = default else {
            return Err(Error::bad_file(path, "expected a chat template, got an empty list"));
        };
        Ok(Self { default: default.clone(), named, tokens })
    }

    /// The names of the templates, if there are several.
    pub fn names(&self) -> Vec<&str> {
        self.named.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// This template with another of its named ones as the default.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn with_default(&self, name: &str) -> Result<Self> {
        match self.named.iter().find(|(other, _)| other == name) {
            Some((_, compiled)) => {
                Ok(Self { default: compiled.clone(), named: Vec::new(), tokens: self.tokens.clone() })
            }
            None => Err(Error::NotFound {
                what: format!("chat template {name:?}"),
                looked: format!("the model has {:?}", self.names()),
                todo: String::new(),
            }),
        }
    }

    /// The source of the template that is used, with tools or without.
    pub fn source(&self, tools: bool) -> &str {
        &self.pick(tools).source
    }

    /// Whether the template marks what the model is to learn (`{% generation %}`).
    pub fn marks_generation(&self, tools: bool) -> bool {
        self.pick(tools).marks_generation
    }

    /// As `transformers`: the one called `tool_use` where there are tools, if there is one.
    fn pick(&self, tools: bool) -> &Compiled {
        let for_tools = self.named.iter().find(|(name, _)| tools && name == "tool_use");
        for_tools.map_or(&self.default, |(_, compiled)| compiled)
    }

    /// Renders messages to text, without a tokenizer and without guarding: for looking at.
    ///
    /// # Errors
    /// The template refuses the messages, fails, or exceeds its bounds.
    pub fn render(&self, request: &ChatRequest) -> Result<String> {
        Ok(self.render_with(request, None)?.text)
    }

    /// Renders messages, and says where control tokens of `tokenizer` may not be recognised.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_guarded(&self, request: &ChatRequest, tokenizer: &Tokenizer) -> Result<Rendered> {
        self.render_with(request, Some(tokenizer))
    }

    /// Renders and tokenizes messages. The text is tokenized as a whole, so that merges cross the borders between
    /// template and messages as they did in training.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], or the text cannot be encoded.
    pub fn encode(&self, request: &ChatRequest, tokenizer: &Tokenizer) -> Result<ChatTokens> {
        let rendered = self.render_guarded(request, tokenizer)?;
        let encoded = tokenizer.encode_cut(&rendered.text, &rendered.cuts)?;
        Ok(ChatTokens { ids: encoded.ids, spans: encoded.spans, rendered })
    }

    fn render_with(&self, request: &ChatRequest, tokenizer: Option<&Tokenizer>) -> Result<Rendered> {
        let compiled = self.pick(request.tools.is_some_and(|tools| !tools.is_empty()));
        let mut context = Map::new();
        for (name, value) in self.tokens.iter().chain(&request.extra) {
            context.insert(name.clone(), value.clone());
        }
        let messages = request.messages.iter().map(message::with_reasoning_aliases).collect();
        context.insert("messages".into(), Value::Array(messages));
        context.insert("tools".into(), request.tools.map_or(Value::Null, |tools| tools.to_vec().into()));
        context.entry("documents").or_insert(Value::Null);
        context.insert("add_generation_prompt".into(), request.add_generation_prompt.into());
        let sentinels = Sentinels::not_in(&context, &compiled.source)?;
        let control = match tokenizer {
            Some(tokenizer) if request.guard != Guard::Off => {
                let words = guard::Words::new(tokenizer, &compiled.source);
                words.mark(&mut context, request.guard, &sentinels, self.tokens.keys());
                words.control
            }
            _ => Arc::from([]),
        };
        sentinels.add_to(&mut context);
        let now = request.now;
        let output = environment::run(&compiled.environment, context, now, MAX_OUTPUT_BYTES)
            .map_err(|e| compiled.error(&e))?;
        let mut rendered = sentinels.take_out(&output, &control).map_err(|message| Error::Template {
            name: compiled.name.clone(),
            message,
            refused: false,
        })?;
        if request.continue_final_message {
            rendered.end_in(request)?;
        }
        Ok(rendered)
    }
}

impl Rendered {
    /// Cuts off what the template writes after the content of the last message.
    fn end_in(&mut self, request: &ChatRequest) -> Result<()> {
        if request.add_generation_prompt {
            return Err(Error::Usage(
                "a final message cannot be continued and answered at once: choose one".into(),
            ));
        }
        let content = match request.messages.last().and_then(|message| message.0.get("content")) {
            Some(Value::String(text)) => text.as_str(),
            Some(Value::Array(parts)) => {
                parts.iter().rev().find_map(|part| part["text"].as_str()).unwrap_or_default()
            }
            _ => "",
        };
        let Some(at) = self.text.rfind(content.trim()) else {
            return Err(Error::Usage(
                "the final message cannot be continued: the template changes its content".into(),
            ));
        };
        // Its trailing whitespace stays if the template kept it.
        let whole = content.trim_start();
        let kept = if self.text[at..].starts_with(whole) { whole.len() } else { content.trim().len() };
        let end = at + kept;
        self.text.truncate(end);
        self.cuts.retain(|cut| cut.at < end);
        self.generated.retain_mut(|block| {
            block.end = block.end.min(end);
            block.start < block.end
        });
        Ok(())
    }
}

impl Compiled {
    fn new(name: &str, source: &str) -> Result<Self> {
        let (rewritten, marks_generation) = source::rewrite(source);
        let environment = environment::new(rewritten, FUEL, RECURSION).map_err(|e| Error::Template {
            name: name.to_owned(),
            message: environment::describe(&e),
            refused: false,
        })?;
        Ok(Self { name: name.to_owned(), source: source.to_owned(), environment, marks_generation })
    }

    fn error(&self, e: &minijinja::Error) -> Error {
        let refusal = environment::refusal(e);
        Error::Template {
            name: self.name.clone(),
            refused: refusal.is_some(),
            message: refusal.unwrap_or_else(|| environment::describe(e)),
        }
    }
}

/// The text of a token given as a string or as an object.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// A template, or a list of named ones, in JSON.
fn sources_of(path: &Path, value: &Value) -> Result<Vec<(String, String)>> {
    let bad = |field: &str, expected: &str, got: &Value| Error::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        got: json_type(got),
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(source) => Ok(vec![("default".into(), source.clone())]),
        Value::Array(entries) => entries
            .iter()
            .map(|entry| match (&entry["name"], &entry["template"]) {
                (Value::String(name), Value::String(source)) => Ok((name.clone(), source.clone())),
                _ => Err(bad("chat_template", "a list of objects with `name` and `template`", entry)),
            })
            .collect(),
        Value::Object(entries) => entries
            .iter()
            .map(|(name, source)| match source {
                Value::String(source) => Ok((name.clone(), source.clone())),
                _ => Err(bad(&format!("chat_template.{name}"), "a template", source)),
            })
            .collect(),
        other => Err(bad("chat_template", "a template or a list of named templates", other)),
    }
}

/// The templates in a folder, by their file names.
fn additional(dir: &Path) -> Result<Vec<(String, String)>> {
    let failed = |source| Error::Read { what: "the chat templates", path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jinja"));
    paths.sort();
    let mut sources = Vec::new();
    for path in paths {
        let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        if let Some(source) = read_text(&path, "a chat template", MAX_TEMPLATE_BYTES)? {
            sources.push((name, source));
        }
    }
    Ok(sources)
}

#[cfg(test)]
mod tests;
