//! The template engine as `transformers` sets it up, and bounded.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde_json::Map;

use super::{bounds, python, source};

const NAME: &str = "template";

std::thread_local! {
    /// The time for `strftime_now` during a rendering. Not a variable of the template, since macros see only those
    /// that they mention.
    static NOW: Cell<Option<Moment>> = const { Cell::new(None) };
}

/// A moment of local time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// The year.
    pub year: i32,
    /// 1 to 12.
    pub month: u32,
    /// 1 to 31.
    pub day: u32,
    /// 0 to 23.
    pub hour: u32,
    /// 0 to 59.
    pub minute: u32,
    /// 0 to 59.
    pub second: u32,
}

/// An environment that holds one template.
pub(super) fn new(source: String, fuel: u64, recursion: usize) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_fuel(Some(fuel));
    env.set_recursion_limit(recursion);
    env.set_unknown_method_callback(python::method);
    minijinja_contrib::add_to_environment(&mut env);
    bounds::add_to(&mut env);
    env.add_filter("tojson", python::tojson);
    env.add_filter(source::PERCENT, python::percent);
    env.add_filter("int", python::int);
    env.add_filter("float", python::float);
    env.add_test("sequence", |value: &Value| {
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    env.add_test("iterable", |value: &Value| {
        // Nothing of Python's own is iterable by the engine's leave only: `None` is not, an undefined value is.
        !value.is_none() && value.try_iter().is_ok()
    });
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_template_owned(NAME, source)?;
    Ok(env)
}

/// Renders, into at most `limit` bytes.
pub(super) fn run(
    env: &Environment<'static>,
    context: Map<String, serde_json::Value>,
    now: Option<Moment>,
    limit: usize,
) -> Result<String, Error> {
    let mut output = Bounded { bytes: Vec::new(), limit };
    let template = env.get_template(NAME)?;
    NOW.set(now);
    bounds::begin();
    // The engine panics on some slices that step backwards (`[][::-1]`, in 3.0.5).
    let result = catch_unwind(AssertUnwindSafe(|| {
        template.render_captured_to(Value::from(Serde(context)), &mut output).map(drop)
    }));
    NOW.set(None);
    result.map_err(|_| Error::new(ErrorKind::InvalidOperation, "the template engine failed"))??;
    String::from_utf8(output.bytes)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, "the output is not UTF-8").with_source(e))
}

struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other(format!("the output is longer than {} MiB", self.limit >> 20)));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The template's own refusal of the messages, which is told from a failure.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(message: Value) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
}

/// What the template said when it refused the messages, if it did.
pub(super) fn refusal(error: &Error) -> Option<String> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = source {
        if let Some(Refusal(message)) = e.downcast_ref() {
            return Some(message.clone());
        }
        source = e.source();
    }
    None
}

/// The message of an error with its causes and the line it happened on.
pub(super) fn describe(error: &Error) -> String {
    let mut text = match error.kind() {
        ErrorKind::OutOfFuel => "takes too many steps to render; it may not end".to_owned(),
        kind => match error.detail() {
            Some(detail) => format!("{kind}: {detail}"),
            None => kind.to_string(),
        },
    };
    if let Some(line) = error.line() {
        text.push_str(&format!(" (line {line})"));
    }
    let mut source = std::error::Error::source(error);
    while let Some(e) = source {
        let cause = match e.downcast_ref::<Error>() {
            Some(e) => e.detail().map_or_else(|| e.kind().to_string(), str::to_owned),
            None => e.to_string(),
        };
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = e.source();
    }
    text
}

fn strftime_now(format: &str) -> Result<String, Error> {
    use chrono::{Local, NaiveDate, NaiveDateTime};
    use std::fmt::Write;
    let wrong = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    let now: NaiveDateTime = match NOW.get() {
        None => Local::now().naive_local(),
        Some(m) => NaiveDate::from_ymd_opt(m.year, m.month, m.day)
            .and_then(|date| date.and_hms_opt(m.hour, m.minute, m.second))
            .ok_or_else(|| wrong(format!("{m:?} is no time")))?,
    };
    // A time without a zone, as Python's datetime.now() is: its zone prints as nothing.
    let format = format.replace("%Z", "").replace("%z", "");
    let mut text = String::new();
    write!(text, "{}", now.format(&format))
        .map_err(|_| wrong(format!("strftime_now: unknown format {format:?}")))?;
    Ok(text)
}
