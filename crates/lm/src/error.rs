//! What can go wrong in this crate, and of what kind it is.
//!
//! A message says what was expected, what came, where, and what to do. The kind is what a program's exit code or an
//! HTTP status is made from; it never has to be guessed from the text.

use std::path::{Path, PathBuf};

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of a failure, from which a program makes its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file, folder, model, template or token that was asked for does not exist.
    NotFound,
    /// It exists, but may not be read or written.
    Access,
    /// A file or a value from outside is not what it should be.
    BadData,
    /// It is well formed, but mica cannot do it.
    Unsupported,
    /// It does not fit in memory.
    Memory,
    /// The disk is full.
    DiskFull,
    /// A file is not what its checksum says.
    Integrity,
    /// The caller asked for something that has no meaning (an option out of range, say).
    Usage,
    /// A signal asked to stop.
    Interrupted,
    /// Anything else: reading failed half-way, for example.
    Failed,
}

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read.
    #[error("{path}: cannot read {what}: {source}", path = .path.display())]
    Read {
        /// What the file is for, such as `the tokenizer`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something that was looked for is in none of the places where it can be.
    #[error("{what} not found: {looked}{}", hint(.todo))]
    NotFound {
        /// What was looked for.
        what: String,
        /// Where it was looked for.
        looked: String,
        /// What to do; may be empty.
        todo: String,
    },
    /// A file does not hold what it should.
    #[error("{path}: {message}{}", hint(.todo), path = .path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What was expected and what came.
        message: String,
        /// What to do; may be empty.
        todo: String,
    },
    /// A field of a JSON file is missing or has the wrong type or value.
    #[error("{path}: field `{field}`: expected {expected}, got {got}", path = .path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, with dots for nesting.
        field: String,
        /// What was expected.
        expected: String,
        /// What came.
        got: String,
    },
    /// Well formed, but mica cannot do it.
    #[error("{what} is not supported{}", hint(.todo))]
    Unsupported {
        /// What it is, and where it stands.
        what: String,
        /// What is supported, or what to do.
        todo: String,
    },
    /// A chat template does not parse or did not render.
    #[error("chat template {name}: {message}")]
    Template {
        /// The template's name or file.
        name: String,
        /// What happened, with the line if known.
        message: String,
        /// Whether the template itself refused the messages (`raise_exception`), rather than being broken.
        refused: bool,
    },
    /// A text or a token could not be encoded or decoded.
    #[error("tokenizer: {0}")]
    Tokenize(String),
    /// Logits or sampling options that cannot be sampled from.
    #[error("sampling: {message}")]
    Sampling {
        /// What is wrong.
        message: String,
        /// Whether it is the options' fault (else it is the logits').
        usage: bool,
    },
    /// A file could not be read or written, or is broken.
    #[error(transparent)]
    File(#[from] mica_io::Error),
    /// Computing failed.
    #[error(transparent)]
    Array(#[from] mica_array::Error),
    /// An argument that has no meaning.
    #[error("{0}")]
    Usage(String),
    /// It would not fit in memory, and was not begun.
    #[error("{0}")]
    Memory(String),
    /// It was asked to stop before it was done, and left nothing behind.
    #[error("stopped; nothing was written")]
    Interrupted,
}

impl From<mica_io::ErrorKind> for ErrorKind {
    fn from(kind: mica_io::ErrorKind) -> ErrorKind {
        match kind {
            mica_io::ErrorKind::NotFound => ErrorKind::NotFound,
            mica_io::ErrorKind::Access => ErrorKind::Access,
            mica_io::ErrorKind::DiskFull => ErrorKind::DiskFull,
            mica_io::ErrorKind::BadData => ErrorKind::BadData,
            mica_io::ErrorKind::Integrity => ErrorKind::Integrity,
            mica_io::ErrorKind::Other => ErrorKind::Failed,
        }
    }
}

impl From<&mica_array::Error> for ErrorKind {
    fn from(error: &mica_array::Error) -> ErrorKind {
        match error {
            mica_array::Error::OutOfMemory { .. } => ErrorKind::Memory,
            mica_array::Error::File { kind, .. } => (*kind).into(),
            _ => ErrorKind::Failed,
        }
    }
}

impl Error {
    /// The kind of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Read { source, .. } => mica_io::ErrorKind::of(source).into(),
            Error::NotFound { .. } => ErrorKind::NotFound,
            Error::File(error) => error.kind().into(),
            Error::Array(error) => error.into(),
            Error::Memory(_) => ErrorKind::Memory,
            Error::Interrupted => ErrorKind::Interrupted,
            Error::BadFile { .. } | Error::Field { .. } | Error::Tokenize(_) => ErrorKind::BadData,
            Error::Template { .. } => ErrorKind::BadData,
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::Sampling { usage, .. } => {
                if *usage {
                    ErrorKind::Usage
                } else {
                    ErrorKind::BadData
                }
            }
            Error::Usage(_) => ErrorKind::Usage,
        }
    }

    /// A file that does not hold what it should.
    pub(crate) fn bad_file(path: &Path, message: impl Into<String>) -> Self {
        Error::BadFile { path: path.to_owned(), message: message.into(), todo: String::new() }
    }
}

fn hint(todo: &str) -> String {
    if todo.is_empty() { String::new() } else { format!("; {todo}") }
}

/// Reads a UTF-8 text file that a stranger wrote, of at most `limit` bytes.
///
/// `Ok(None)` if there is no such file, so that the caller decides whether it is optional.
pub(crate) fn read_text(path: &Path, what: &'static str, limit: u64) -> Result<Option<String>> {
    use std::io::Read;
    let failed = |source| Error::Read { what, path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(Error::bad_file(
            path,
            format!("expected at most {limit} bytes of {what}, the file is longer"),
        ));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))),
        Err(e) => Err(Error::bad_file(
            path,
            format!("expected UTF-8 text, byte {} is not", e.utf8_error().valid_up_to()),
        )),
    }
}

/// Reads a JSON object; `Ok(None)` if there is no such file.
pub(crate) fn read_json_object(
    path: &Path,
    what: &'static str,
) -> Result<Option<serde_json::Map<String, serde_json::Value>>> {
    let Some(text) = read_text(path, what, 256 << 20)? else {
        return Ok(None);
    };
    match serde_json::from_str(&text) {
        Ok(serde_json::Value::Object(map)) => Ok(Some(map)),
        Ok(other) => Err(Error::bad_file(
            path,
            format!("expected a JSON object with {what}, got {}", json_type(&other)),
        )),
        Err(e) => Err(Error::BadFile {
            path: path.to_owned(),
            message: format!("expected JSON with {what}: {e}"),
            todo: "the file may be cut short; fetch it again".into(),
        }),
    }
}

/// The type of a JSON value in words, with the value when it is short.
pub(crate) fn json_type(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => format!("the boolean {b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) if s.chars().count() <= 60 => format!("the string {s:?}"),
        Value::String(_) => "a long string".into(),
        Value::Array(a) => format!("a list of {}", a.len()),
        Value::Object(_) => "an object".into(),
    }
}
