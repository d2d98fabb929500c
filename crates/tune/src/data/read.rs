//! Data files as lists of records that are read when they are needed.
//!
//! Opening a file walks through it once and keeps 16 bytes a record (where it is and on which line), so
//! a file may be far larger than memory; [`Source::record`] reads and parses one record. The walk also
//! takes the file's SHA-256, by which a resumed run notices that its data changed. What a record *means*
//! is [`super::format`]'s subject.
//!
//! Containers: JSON lines (`.jsonl`, `.ndjson`, or any other ending), one JSON list of objects (`.json`),
//! comma- or tab-separated tables with a header line (`.csv`, `.tsv`, quotes as in RFC 4180), and plain
//! text (`.txt`, `.md`: the file is one record).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::format::{Columns, EXPECTED_FORMS, Form, Record};
use crate::{Error, Result};

/// An opened data file: records by number.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    file: File,
    container: Container,
    spans: Vec<Span>,
    header: Vec<String>,
    columns: Columns,
    form: Form,
    sha256: String,
}

/// Where a record is in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    offset: u64,
    length: u32,
    /// Line on which it starts, counted from 1.
    line: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    JsonLines,
    JsonList,
    Table { separator: u8 },
    Text,
}

impl Source {
    /// Opens a data file, finds its records, and decides its form by the first one.
    ///
    /// Lines after the first are not parsed here; [`Source::record`] reports them when they are read.
    pub fn open(path: impl AsRef<Path>, columns: &Columns) -> Result<Source> {
        let path = path.as_ref().to_path_buf();
        let file = File::open(&path).map_err(|e| Error::file(&path, e))?;
        if file.metadata().map_err(|e| Error::file(&path, e))?.is_dir() {
            return Err(Error::Data { path, cause: "is a folder; expected a data file".into() });
        }
        let container = Container::of(&path, &file)?;
        let (mut spans, sha256) = scan(&path, &file, container)?;
        let mut source = Source {
            path,
            file,
            container,
            spans: Vec::new(),
            header: Vec::new(),
            columns: columns.clone(),
            form: Form::Text,
            sha256,
        };
        if let Container::Table { separator } = container {
            if spans.is_empty() {
                return Err(source.fault("is empty; expected a header line with the names of the columns"));
            }
            let first = spans.remove(0);
            let bytes = source.bytes(first)?;
            source.header = fields(&bytes, separator).map_err(|cause| source.bad(first, None, cause))?;
        }
        source.spans = spans;
        if source.spans.is_empty() {
            return Err(source.fault(&format!("has no records; {EXPECTED_FORMS}")));
        }
        if container != Container::Text {
            source.form = source.first_form()?;
        }
        Ok(source)
    }

    /// The first record that parses as JSON decides; if none of the first hundred does, the first error is told.
    fn first_form(&self) -> Result<Form> {
        let mut first_error = None;
        for i in 0..self.spans.len().min(100) {
            let found = self.row(i).and_then(|row| {
                Form::detect(&row, &self.columns).map_err(|cause| self.bad(self.spans[i], None, cause))
            });
            match found {
                Ok(form) => return Ok(form),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or_else(|| self.fault("has no records")))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many records there are, bad ones included.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Never true: a file without records does not open.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The form of all records of this file.
    pub fn form(&self) -> Form {
        self.form
    }

    /// SHA-256 of the whole file, in hexadecimal digits.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The line on which record `index` starts, counted from 1.
    pub fn line(&self, index: usize) -> u64 {
        u64::from(self.spans[index].line)
    }

    /// Reads and parses record `index` (`0..len`).
    pub fn record(&self, index: usize) -> Result<Record> {
        if self.container == Container::Text {
            let bytes = self.bytes(self.spans[index])?;
            let text =
                String::from_utf8(bytes).map_err(|e| self.not_text(self.spans[index], &e.utf8_error()))?;
            return Ok(Record::Text(text));
        }
        let row = self.row(index)?;
        self.form.parse(row, &self.columns).map_err(|cause| self.bad(self.spans[index], None, cause))
    }

    /// Record `index` as an object of columns.
    fn row(&self, index: usize) -> Result<Map<String, Value>> {
        let span = self.spans[index];
        let bytes = self.bytes(span)?;
        if let Container::Table { separator } = self.container {
            return self.table_row(span, &bytes, separator);
        }
        if let Err(error) = std::str::from_utf8(&bytes) {
            return Err(self.not_text(span, &error));
        }
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(row)) => Ok(row),
            Ok(_) => Err(self.bad(span, None, format!("is JSON but no object; {EXPECTED_FORMS}"))),
            Err(error) => {
                let at = Span { line: span.line + (error.line() as u32).saturating_sub(1), ..span };
                let text = error.to_string();
                let cause = text.split(" at line ").next().unwrap_or(&text);
                Err(self.bad(at, Some(error.column()), format!("not valid JSON: {cause}")))
            }
        }
    }

    /// A table's row: strings by column name; columns that hold lists are JSON inside.
    fn table_row(&self, span: Span, bytes: &[u8], separator: u8) -> Result<Map<String, Value>> {
        let bad = |cause: String| self.bad(span, None, cause);
        let fields = fields(bytes, separator).map_err(bad)?;
        if fields.len() != self.header.len() {
            return Err(bad(format!("has {} fields; the header names {}", fields.len(), self.header.len())));
        }
        let structured = [&self.columns.chat, &self.columns.tools, &self.columns.label];
        let is_structured = |name: &String| {
            structured.contains(&name)
                || ["conversations", "input_ids", "tokens", "labels"].contains(&name.as_str())
        };
        let mut row = Map::new();
        for (name, field) in self.header.iter().zip(fields) {
            let value = if field.is_empty() && is_structured(name) {
                Value::Null
            } else if is_structured(name) {
                let text = if *name == self.columns.label { field.to_lowercase() } else { field };
                serde_json::from_str(&text)
                    .map_err(|e| bad(format!("column \"{name}\" should hold JSON: {e}")))?
            } else {
                Value::String(field)
            };
            row.insert(name.clone(), value);
        }
        Ok(row)
    }

    fn bytes(&self, span: Span) -> Result<Vec<u8>> {
        let mut bytes = vec![0; span.length as usize];
        self.file.read_exact_at(&mut bytes, span.offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => self.fault("became shorter while it was in use"),
            _ => Error::file(&self.path, e),
        })?;
        Ok(bytes)
    }

    fn bad(&self, span: Span, column: Option<usize>, cause: String) -> Error {
        Error::BadLine { path: self.path.clone(), line: u64::from(span.line), column, cause }
    }

    fn not_text(&self, span: Span, error: &std::str::Utf8Error) -> Error {
        self.bad(span, Some(error.valid_up_to() + 1), "not valid UTF-8".into())
    }

    fn fault(&self, cause: &str) -> Error {
        Error::Data { path: self.path.clone(), cause: cause.into() }
    }
}

impl Container {
    fn of(path: &Path, file: &File) -> Result<Container> {
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_lowercase();
        Ok(match ending.as_str() {
            "csv" => Container::Table { separator: b',' },
            "tsv" => Container::Table { separator: b'\t' },
            "txt" | "md" => Container::Text,
            "parquet" | "arrow" | "gz" | "zst" | "zip" => {
                let cause =
                    format!("files ending in .{ending} are not read; convert to .jsonl, .json or .csv");
                return Err(Error::Data { path: path.into(), cause });
            }
            // JSON lines are often called .json, so the first character decides.
            _ => {
                let mut start = [0; 256];
                let read = file.read_at(&mut start, 0).map_err(|e| Error::file(path, e))?;
                let start = start[..read].strip_prefix(b"\xef\xbb\xbf").unwrap_or(&start[..read]);
                match start.iter().find(|b| !b.is_ascii_whitespace()) {
                    Some(b'[') => Container::JsonList,
                    _ => Container::JsonLines,
                }
            }
        })
    }
}

/// One pass over the file: the spans of its records, and its hash.
fn scan(path: &Path, file: &File, container: Container) -> Result<(Vec<Span>, String)> {
    let mut scanner = Scanner { container, ..Scanner::default() };
    let (mut hash, mut buffer, mut reader) = (Sha256::new(), vec![0u8; 1 << 20], file);
    loop {
        let read = match reader.read(&mut buffer) {
            Ok(read) => read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::file(path, e)),
        };
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        scanner.feed(&buffer[..read]);
    }
    let fault = |cause: String| Error::Data { path: path.into(), cause };
    let spans = scanner.finish().map_err(fault)?;
    let hex = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((spans, hex))
}

/// Finds where records begin and end, a piece of the file at a time.
struct Scanner {
    container: Container,
    spans: Vec<Span>,
    position: u64,
    line: u64,
    /// Start, line and end (after the last byte that is not white space) of the record being read.
    open: Option<(u64, u64)>,
    end: u64,
    depth: u32,
    in_string: bool,
    escaped: bool,
    closed: bool,
    fault: Option<String>,
}

impl Default for Scanner {
    fn default() -> Self {
        Scanner {
            container: Container::JsonLines,
            spans: Vec::new(),
            position: 0,
            line: 1,
            open: None,
            end: 0,
            depth: 0,
            in_string: false,
            escaped: false,
            closed: false,
            fault: None,
        }
    }
}

impl Scanner {
    fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            let bom = self.position < 3 && byte == b"\xef\xbb\xbf"[self.position as usize];
            if !bom || self.container == Container::Text {
                match self.container {
                    Container::JsonLines => self.line_byte(byte),
                    Container::JsonList => self.list_byte(byte),
                    Container::Table { .. } => self.table_byte(byte),
                    Container::Text => self.extend(),
                }
            }
            self.position += 1;
            self.line += u64::from(byte == b'\n');
        }
    }

    /// The current byte belongs to the record that is open, or opens one.
    fn extend(&mut self) {
        self.open.get_or_insert((self.position, self.line));
        self.end = self.position + 1;
    }

    fn close(&mut self) {
        let Some((offset, line)) = self.open.take() else {
            return;
        };
        match (u32::try_from(self.end - offset), u32::try_from(line)) {
            (Ok(length), Ok(line)) => self.spans.push(Span { offset, length, line }),
            _ => self.fail(format!(
                "line {line}: records above 4 GiB and files above 4,294,967,295 lines are not read"
            )),
        }
    }

    fn fail(&mut self, cause: String) {
        self.fault.get_or_insert(cause);
    }

    fn line_byte(&mut self, byte: u8) {
        match byte {
            b'\n' => self.close(),
            b' ' | b'\t' | b'\r' => {}
            _ => self.extend(),
        }
    }

    fn table_byte(&mut self, byte: u8) {
        match byte {
            b'"' => {
                self.in_string = !self.in_string;
                self.extend();
            }
            b'\n' if !self.in_string => self.close(),
            b'\r' if !self.in_string => {}
            _ => self.extend(),
        }
    }

    /// Elements of the outermost list: from their first byte to the comma or bracket at depth 1.
    fn list_byte(&mut self, byte: u8) {
        if self.in_string {
            self.extend();
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return;
        }
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {}
            _ if self.closed => self.fail(format!("line {}: text after the end of the list", self.line)),
            b'[' if self.depth == 0 => self.depth = 1,
            b']' if self.depth == 1 => {
                self.close();
                self.depth = 0;
                self.closed = true;
            }
            b',' if self.depth == 1 => {
                if self.open.is_none() {
                    self.fail(format!("line {}: a comma without an element before it", self.line));
                }
                self.close();
            }
            b'"' => {
                self.in_string = true;
                self.extend();
            }
            b'[' | b'{' => {
                self.depth += 1;
                self.extend();
            }
            b']' | b'}' => {
                if self.depth <= 1 {
                    self.fail(format!("line {}: unexpected \"{}\"", self.line, byte as char));
                } else {
                    self.depth -= 1;
                }
                self.extend();
            }
            _ => self.extend(),
        }
    }

    fn finish(mut self) -> Result<Vec<Span>, String> {
        match self.container {
            Container::JsonList if !self.closed => {
                self.fail("the list is not closed by \"]\"; the file is cut short".into());
            }
            Container::Table { .. } if self.in_string => {
                let line = self.open.map_or(self.line, |(_, line)| line);
                self.fail(format!("line {line}: a quoted field is never closed"));
            }
            _ => self.close(),
        }
        self.fault.map_or(Ok(self.spans), Err)
    }
}

/// The fields of one table record (RFC 4180: quotes around a field, doubled inside it).
fn fields(bytes: &[u8], separator: u8) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut field = Vec::new();
    let mut quoted = false;
    let mut i = 0;
    while i < bytes.len() {
        match bytes[i] {
            b'"' if quoted && bytes.get(i + 1) == Some(&b'"') => {
                field.push(b'"');
                i += 1;
            }
            b'"' if quoted => quoted = false,
            b'"' if field.is_empty() => quoted = true,
            byte if byte == separator && !quoted => fields.push(std::mem::take(&mut field)),
            byte => field.push(byte),
        }
        i += 1;
    }
    fields.push(field);
    let text = |field: Vec<u8>| String::from_utf8(field).map_err(|_| "not valid UTF-8".to_string());
    fields.into_iter().map(text).collect()
}

/// The data of a run: training, validation and test files.
#[derive(Debug)]
pub struct Splits {
    /// Files to train on, usually one.
    pub train: Vec<Source>,
    /// Files to validate on during training.
    pub valid: Vec<Source>,
    /// Files to test on afterwards.
    pub test: Vec<Source>,
}

const ENDINGS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "txt"];

impl Splits {
    /// Opens a data file (all of it training data), or a folder.
    ///
    /// A folder holds `train`, and perhaps `valid` and `test`, with one of the known endings
    /// (mlx-lm's layout); a folder with `.txt` and `.md` files and no files of records is a corpus of documents.
    pub fn open(path: impl AsRef<Path>, columns: &Columns) -> Result<Splits> {
        let path = path.as_ref();
        let about = std::fs::metadata(path).map_err(|e| Error::file(path, e))?;
        if !about.is_dir() {
            let train = vec![Source::open(path, columns)?];
            return Ok(Splits { train, valid: Vec::new(), test: Vec::new() });
        }
        let split = |name: &str| -> Result<Vec<Source>> {
            let mut found: Vec<PathBuf> = ENDINGS.iter().map(|e| path.join(format!("{name}.{e}"))).collect();
            found.retain(|file| file.is_file());
            if let [first, second, ..] = &found[..] {
                let cause = format!("both {} and {} are there; keep one", first.display(), second.display());
                return Err(Error::Data { path: path.into(), cause });
            }
            found.iter().map(|file| Source::open(file, columns)).collect()
        };
        let mut splits = Splits { train: split("train")?, valid: split("valid")?, test: split("test")? };
        if splits.train.is_empty() && splits.valid.is_empty() && splits.test.is_empty() {
            let records = records(path)?;
            if !records.is_empty() {
                let cause = format!(
                    "has no train.jsonl (or .json, .csv, .tsv, .txt), valid.jsonl or test.jsonl; it holds {}: rename \
                     the file to train on, or give it itself as the data",
                    records.join(", ")
                );
                return Err(Error::Data { path: path.into(), cause });
            }
            splits.train =
                documents(path)?.iter().map(|file| Source::open(file, columns)).collect::<Result<_>>()?;
        }
        if splits.train.is_empty() && splits.valid.is_empty() && splits.test.is_empty() {
            let cause = "has no train.jsonl (or .json, .csv, .tsv, .txt), valid.jsonl or test.jsonl, and no text files";
            return Err(Error::Data { path: path.into(), cause: cause.into() });
        }
        Ok(splits)
    }
}

/// The names of a folder's files that look like lists of records, a few of them.
fn records(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))? {
        let file = entry.map_err(|e| Error::file(folder, e))?.path();
        let ending = file.extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase();
        let of_records =
            ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow"].contains(&ending.as_str());
        if of_records && file.is_file() {
            names.extend(file.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    if names.len() > 5 {
        names.truncate(5);
        names.push("…".into());
    }
    Ok(names)
}

/// The text files of a folder, in the order of their names.
fn documents(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))? {
        let file = entry.map_err(|e| Error::file(folder, e))?.path();
        let is_text = file.extension().is_some_and(|e| e == "txt" || e == "md");
        let empty = std::fs::metadata(&file).map_or(true, |about| about.len() == 0 || about.is_dir());
        if is_text && !empty {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// Bad lines seen so far, against the number that may be passed over (`skip_bad_lines`).
#[derive(Debug, Default)]
pub struct BadLines {
    allowed: usize,
    seen: Vec<(PathBuf, u64)>,
    messages: Vec<String>,
}

impl BadLines {
    /// None may be passed over with 0.
    pub fn allow(allowed: usize) -> Self {
        BadLines { allowed, ..Self::default() }
    }

    /// Takes a failure: a bad line within the limit is noted and passed over, anything else comes back.
    /// A line that is met again (in the next epoch) counts once.
    pub fn forgive(&mut self, error: Error) -> Result<()> {
        let Error::BadLine { path, line, .. } = &error else {
            return Err(error);
        };
        let key = (path.clone(), *line);
        if self.seen.contains(&key) {
            return Ok(());
        }
        if self.allowed == 0 {
            return Err(error);
        }
        self.seen.push(key);
        if self.seen.len() > self.allowed {
            let (count, allowed) = (self.seen.len(), self.allowed);
            return Err(Error::TooManyBadLines { count, allowed, latest: Box::new(error) });
        }
        self.messages.push(error.to_string());
        Ok(())
    }

    /// What was passed over, one message a line.
    pub fn messages(&self) -> &[String] {
        &self.messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::format::Turns;

    fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn texts(source: &Source) -> Vec<String> {
        (0..source.len())
            .map(|i| match source.record(i).unwrap() {
                Record::Text(text) => text,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn every_container_gives_the_same_records() {
        let folder = tempfile::tempdir().unwrap();
        let cases = [
            ("lines.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\\n\\\"c\\\", d\"}\n".to_string()),
            (
                "no last newline, blank lines.jsonl",
                "\n{\"text\": \"a\"}\r\n  \n\n {\"text\": \"b\\n\\\"c\\\", d\"}".into(),
            ),
            ("byte order mark.jsonl", "\u{feff}{\"text\": \"a\"}\n{\"text\": \"b\\n\\\"c\\\", d\"}\n".into()),
            ("lines called.json", "{\"text\": \"a\"}\n{\"text\": \"b\\n\\\"c\\\", d\"}\n".into()),
            (
                "list.json",
                "[{\"text\": \"a\", \"x\": [1, {\"y\": \"]}\"}]},\n {\"text\":\n\"b\\n\\\"c\\\", d\"}]\n"
                    .into(),
            ),
            ("table.csv", "id,text\n1,a\n2,\"b\n\"\"c\"\", d\"\n".into()),
            ("table.tsv", "text\tid\r\na\t1\r\n\"b\n\"\"c\"\", d\"\t2\r\n".into()),
        ];
        for (name, text) in cases {
            let source = Source::open(write(folder.path(), name, text), &Columns::default()).unwrap();
            assert_eq!(texts(&source), ["a", "b\n\"c\", d"], "{name}");
        }
        let source =
            Source::open(write(folder.path(), "whole.txt", "one\ntwo\n"), &Columns::default()).unwrap();
        assert_eq!(texts(&source), ["one\ntwo\n"]);
    }

    #[test]
    fn records_larger_than_the_read_buffer_are_whole() {
        let folder = tempfile::tempdir().unwrap();
        let long = "x".repeat(3 << 20);
        let path =
            write(folder.path(), "a.jsonl", format!("{{\"text\": \"{long}\"}}\n{{\"text\": \"b\"}}\n"));
        let source = Source::open(path, &Columns::default()).unwrap();
        assert_eq!(texts(&source), [long, "b".to_string()]);
    }

    #[test]
    fn errors_name_file_line_and_column() {
        let folder = tempfile::tempdir().unwrap();
        let cases: [(&str, &str, usize, &[&str]); 6] = [
            (
                "a.jsonl",
                "{\"text\": \"a\"}\n\n{\"text\": }\n",
                1,
                &["a.jsonl, line 3, column 10", "not valid JSON"],
            ),
            ("b.jsonl", "{\"text\": \"a\"}\n[1]\n", 1, &["line 2", "no object", "expected one of"]),
            (
                "c.jsonl",
                "{\"text\": \"a\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n",
                1,
                &["line 2", "\"text\" is missing"],
            ),
            (
                "d.json",
                "[{\"text\": \"a\"},\n\n{\"text\":\n oops}]",
                1,
                &["line 4, column 2", "not valid JSON"],
            ),
            ("e.csv", "text\na\nb,c\n", 1, &["line 3", "2 fields", "header names 1"]),
            ("f.jsonl", "{\"text\": \"a\"}\n{\"text\": 1}", 1, &["line 2", "must be a string"]),
        ];
        for (name, text, record, parts) in cases {
            let source = Source::open(write(folder.path(), name, text), &Columns::default()).unwrap();
            let error = source.record(record).expect_err(name).to_string();
            for part in parts {
                assert!(error.contains(part), "{name}: {error}");
            }
        }
        let path = write(folder.path(), "utf8.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}");
        let error = Source::open(path, &Columns::default()).unwrap().record(1).unwrap_err().to_string();
        assert!(error.contains("line 2, column 11") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn files_that_cannot_be_used_do_not_open() {
        let folder = tempfile::tempdir().unwrap();
        let cases = [
            ("empty.jsonl", "", "has no records"),
            ("blank.jsonl", "\n \n", "has no records"),
            ("no form.jsonl", "{\"foo\": 1}", "columns are [foo]"),
            ("cut.json", "[{\"text\": \"a\"}, {\"te", "not closed"),
            ("after.json", "[{\"text\": \"a\"}] 3", "after the end"),
            ("quotes.csv", "text\n\"a\nb\n", "line 2: a quoted field is never closed"),
            ("a.parquet", "PAR1", "convert to .jsonl"),
            ("empty list.json", "[]", "has no records"),
        ];
        for (name, text, part) in cases {
            let error = Source::open(write(folder.path(), name, text), &Columns::default())
                .expect_err(name)
                .to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
    }

    #[test]
    fn tables_may_hold_conversations_and_verdicts() {
        let folder = tempfile::tempdir().unwrap();
        let text = "prompt,completion,label\nq,a,True\nq,b,0\n";
        let source = Source::open(write(folder.path(), "kto.csv", text), &Columns::default()).unwrap();
        let verdict = |i| match source.record(i).unwrap() {
            Record::Labelled { prompt: Turns::Text(_), label, .. } => label,
            other => panic!("{other:?}"),
        };
        assert_eq!([verdict(0), verdict(1)], [true, false]);
        let text = "messages\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"hi\"\"}]\"\n";
        let source = Source::open(write(folder.path(), "chat.csv", text), &Columns::default()).unwrap();
        assert!(matches!(source.record(0).unwrap(), Record::Messages { .. }));
    }

    #[test]
    fn folders_have_splits_or_documents() {
        let folder = tempfile::tempdir().unwrap();
        let columns = Columns::default();
        assert!(Splits::open(folder.path(), &columns).unwrap_err().to_string().contains("train.jsonl"));
        write(folder.path(), "b.txt", "second");
        write(folder.path(), "a.md", "first");
        let splits = Splits::open(folder.path(), &columns).unwrap();
        assert_eq!(splits.train.iter().flat_map(texts).collect::<Vec<_>>(), ["first", "second"]);
        // Beside a file of records a text is a note, and not what was meant.
        for name in ["data.jsonl", "rows.CSV", "x.parquet"] {
            let file = write(folder.path(), name, "{\"text\": \"t\"}");
            let error = Splits::open(folder.path(), &columns).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("train.jsonl"), "{error}");
            std::fs::remove_file(file).unwrap();
        }
        write(folder.path(), "train.jsonl", "{\"text\": \"t\"}");
        write(folder.path(), "valid.csv", "text\nv\n");
        let splits = Splits::open(folder.path(), &columns).unwrap();
        assert_eq!((texts(&splits.train[0]), texts(&splits.valid[0])), (vec!["t".into()], vec!["v".into()]));
        assert!(splits.test.is_empty());
        write(folder.path(), "train.json", "[]");
        assert!(Splits::open(folder.path(), &columns).unwrap_err().to_string().contains("keep one"));
    }

    #[test]
    fn bad_lines_are_forgiven_up_to_the_limit_and_once_each() {
        let bad = |line| Error::BadLine { path: "f".into(), line, column: None, cause: "c".into() };
        assert!(matches!(BadLines::allow(0).forgive(bad(1)), Err(Error::BadLine { .. })));
        let mut lines = BadLines::allow(2);
        for line in [1, 2, 1, 2] {
            lines.forgive(bad(line)).unwrap();
        }
        assert_eq!(lines.messages().len(), 2);
        assert!(matches!(lines.forgive(bad(3)), Err(Error::TooManyBadLines { count: 3, allowed: 2, .. })));
        assert!(matches!(lines.forgive(Error::Tokenize("x".into())), Err(Error::Tokenize(_))));
    }
}
