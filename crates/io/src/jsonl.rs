//! Files of one JSON value a line, read line by line.
//!
//! A dataset comes from anywhere: another system's line ends, a byte order mark, blank lines, a
//! last line without an end, a stray byte that is not UTF-8. The reader takes what can be taken
//! and says of the rest exactly where it is. After a bad line it goes on with the next, so that a
//! checker can list all of them.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Longest line read unless told otherwise: 64 MiB.
pub const DEFAULT_LIMIT: usize = 64 << 20;

/// One line that holds something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its number in the file; the first is 1, and blank ones count.
    pub number: usize,
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Its text without the line end.
    pub text: String,
}

/// Iterates over the lines of a file that are not blank.
#[derive(Debug)]
pub struct Lines<R = BufReader<File>> {
    path: PathBuf,
    input: R,
    limit: usize,
    number: usize,
    offset: u64,
    finished: bool,
}

impl Lines {
    /// Opens a file. Lines longer than [`DEFAULT_LIMIT`] are errors.
    pub fn open(path: impl AsRef<Path>) -> Result<Lines> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        Ok(Lines::new(path, BufReader::with_capacity(1 << 16, file)))
    }
}

impl<R: BufRead> Lines<R> {
    /// Reads lines from `input`; errors name `path`.
    pub fn new(path: impl AsRef<Path>, input: R) -> Lines<R> {
        Lines {
            path: path.as_ref().to_owned(),
            input,
            limit: DEFAULT_LIMIT,
            number: 0,
            offset: 0,
            finished: false,
        }
    }

    /// Makes lines of more than `bytes` bytes an error.
    pub fn limit(mut self, bytes: usize) -> Self {
        self.limit = bytes;
        self
    }

    /// The file that errors name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Parses a line of this file. The error names file, line and column.
    pub fn parse<T: DeserializeOwned>(&self, line: &Line) -> Result<T> {
        parse(&self.path, line)
    }

    /// The next line's bytes without its end; None at the end of the file.
    fn next_bytes(&mut self, line: &mut Vec<u8>) -> Result<Option<()>> {
        line.clear();
        // One byte more than a line of full length with its two-byte end tells "too long".
        let most = self.limit as u64 + 3;
        let n = (&mut self.input).take(most).read_until(b'\n', line).map_err(|e| self.fail(e))?;
        if n == 0 {
            return Ok(None);
        }
        self.number += 1;
        self.offset += n as u64;
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        } else if n as u64 == most {
            self.skip_line()?;
        }
        if line.len() > self.limit {
            let what = format!("line {}: longer than {} bytes", self.number, self.limit);
            return Err(Error::bad_data(&self.path, what));
        }
        Ok(Some(()))
    }

    /// Passes over the rest of a line without keeping it.
    fn skip_line(&mut self) -> Result<()> {
        loop {
            let buffer = match self.input.fill_buf() {
                Ok(buffer) => buffer,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.fail(e)),
            };
            let end = buffer.iter().position(|&b| b == b'\n');
            let n = end.map_or(buffer.len(), |i| i + 1);
            let at_end = end.is_some() || buffer.is_empty();
            self.input.consume(n);
            self.offset += n as u64;
            if at_end {
                return Ok(());
            }
        }
    }

    /// After the system's error nothing more can be read.
    fn fail(&mut self, error: io::Error) -> Error {
        self.finished = true;
        Error::io("read", &self.path, error)
    }

    fn next_line(&mut self) -> Result<Option<Line>> {
        let mut bytes = Vec::new();
        loop {
            let mut offset = self.offset;
            if self.next_bytes(&mut bytes)?.is_none() {
                return Ok(None);
            }
            if self.number == 1 {
                if bytes.starts_with(b"\xef\xbb\xbf") {
                    bytes.drain(..3);
                    offset += 3;
                } else if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
                    self.finished = true;
                    let what = "is UTF-16; save it as UTF-8";
                    return Err(Error::bad_data(&self.path, what));
                }
            }
            let text = String::from_utf8(bytes).map_err(|e| {
                let at = e.utf8_error().valid_up_to();
                let what = format!(
                    "line {}, column {}: byte 0x{:02x} is not UTF-8 here; save the file as UTF-8",
                    self.number,
                    at + 1,
                    e.as_bytes()[at],
                );
                Error::bad_data(&self.path, what)
            })?;
            if !text.trim_ascii().is_empty() {
                return Ok(Some(Line { number: self.number, offset, text }));
            }
            bytes = text.into_bytes();
        }
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Line>;

    fn next(&mut self) -> Option<Result<Line>> {
        if self.finished {
            return None;
        }
        let line = self.next_line().transpose();
        if line.is_none() {
            self.finished = true;
        }
        line
    }
}

/// Parses a line as one JSON value. The error names `path`, the line and the column (in bytes,
/// from 1).
pub fn parse<T: DeserializeOwned>(path: impl AsRef<Path>, line: &Line) -> Result<T> {
    serde_json::from_str(&line.text).map_err(|e| {
        let message = e.to_string();
        // serde_json puts its own " at line 1 column 7" behind the message.
        let message = message.rsplit_once(" at line ").map_or(&*message, |(what, _)| what);
        let what = format!("line {}, column {}: {message}", line.number, e.column());
        Error::bad_data(path, what)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], limit: usize) -> Vec<Result<(usize, u64, String), String>> {
        // A tiny buffer, so that lines cross its borders.
        let input = BufReader::with_capacity(3, bytes);
        Lines::new("f", input)
            .limit(limit)
            .map(|line| match line {
                Ok(line) => Ok((line.number, line.offset, line.text)),
                Err(e) => Err(e.to_string()),
            })
            .collect()
    }

    fn line(number: usize, offset: u64, text: &str) -> Result<(usize, u64, String), String> {
        Ok((number, offset, text.to_owned()))
    }

    #[test]
    fn line_ends_marks_and_blank_lines() {
        let cases: &[(&str, &[u8], Vec<_>)] = &[
            ("empty", b"", vec![]),
            ("one", b"ab\n", vec![line(1, 0, "ab")]),
            ("no last end", b"ab\ncd", vec![line(1, 0, "ab"), line(2, 3, "cd")]),
            ("crlf", b"ab\r\ncd\r\n", vec![line(1, 0, "ab"), line(2, 4, "cd")]),
            ("only one cr goes", b"ab\r\r\n", vec![line(1, 0, "ab\r")]),
            ("cr inside", b"a\rb\n", vec![line(1, 0, "a\rb")]),
            ("blank lines count", b"\n  \r\nab\n\t\n", vec![line(3, 5, "ab")]),
            ("mark", b"\xef\xbb\xbfab\n", vec![line(1, 3, "ab")]),
            ("mark alone", b"\xef\xbb\xbf\nab", vec![line(2, 4, "ab")]),
            ("mark later is text", b"a\n\xef\xbb\xbfb", vec![line(1, 0, "a"), line(2, 2, "\u{feff}b")]),
            ("other separators are text", "a\u{2028}b\x0b\n".as_bytes(), vec![line(1, 0, "a\u{2028}b\x0b")]),
        ];
        for (name, bytes, expected) in cases {
            assert_eq!(&read(bytes, 100), expected, "{name}");
        }
    }

    #[test]
    fn bad_bytes_are_placed_and_reading_goes_on() {
        let got = read(b"{}\nab\xffcd\n\xc3\xa9\xc3\nlast", 100);
        assert_eq!(got.len(), 4);
        assert_eq!(got[0], line(1, 0, "{}"));
        let error = got[1].as_ref().unwrap_err();
        assert!(error.starts_with("f: line 2, column 3: byte 0xff"), "{error}");
        let error = got[2].as_ref().unwrap_err();
        assert!(error.starts_with("f: line 3, column 3: byte 0xc3"), "{error}");
        assert_eq!(got[3], line(4, 13, "last"));

        let got = read(b"\xff\xfea\0\n\0", 100);
        assert_eq!(got.len(), 1);
        assert!(got[0].as_ref().unwrap_err().contains("UTF-16"));
    }

    #[test]
    fn lines_past_the_limit_are_passed_over() {
        for end in ["\n", "\r\n"] {
            let text = ["1234", "12345", "123456", "1234567", "12345678901234567890", "1"].join(end);
            let got = read(text.as_bytes(), 5);
            let ok: Vec<_> = got.iter().map(Result::is_ok).collect();
            assert_eq!(ok, [true, true, false, false, false, true], "{end:?}");
            let error = got[4].as_ref().unwrap_err();
            assert_eq!(error, "f: line 5: longer than 5 bytes");
            assert_eq!(got[5].as_ref().unwrap().0, 6);
        }
        assert!(read(b"123456", 5)[0].is_err());
        assert!(read(b"12345678", 5)[0].is_err());
        assert!(read(b"123456789", 5)[0].is_err());
        assert_eq!(read(b"12345", 5), [line(1, 0, "12345")]);
    }

    #[test]
    fn json_errors_name_line_and_column() {
        let at = |text: &str| Line { number: 7, offset: 0, text: text.to_owned() };
        let value: Vec<u8> = parse("f", &at("[1, 2]")).unwrap();
        assert_eq!(value, [1, 2]);
        let cases = [
            ("[1, x]", "f: line 7, column 5: expected value"),
            ("[1, 2", "f: line 7, column 5: EOF while parsing a list"),
            ("[1] [2]", "f: line 7, column 5: trailing characters"),
            ("[300]", "f: line 7, column 4: invalid value: integer `300`, expected u8"),
        ];
        for (text, message) in cases {
            let error = parse::<Vec<u8>>("f", &at(text)).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
        let deep = "[".repeat(100_000);
        assert!(parse::<serde_json::Value>("f", &at(&deep)).is_err());
    }
}
