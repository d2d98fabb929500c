//! A log of lines that grows in place.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::{parent_of, sync_folder};
use crate::{Error, Result};

/// Appends lines to a file such as `metrics.jsonl`.
///
/// A line is written, with its end, in one call. A last line without an end, torn by a crash, is
/// dropped when the file is opened, so that the file always holds whole lines. While it is open,
/// no second `Appender` can open the same file: two runs writing into one folder would ruin both.
#[derive(Debug)]
pub struct Appender {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    len: u64,
}

impl Appender {
    /// Opens a file to add lines at its end; creates it if there is none.
    pub fn open(path: impl AsRef<Path>) -> Result<Appender> {
        Appender::open_limited(path.as_ref(), None)
    }

    /// Opens a file as it was when it held `len` bytes: what was added later is dropped.
    ///
    /// Used when a run resumes from a checkpoint that has recorded [`len`](Appender::len). A file
    /// that is shorter than that is an error, for lines have been lost.
    pub fn resume(path: impl AsRef<Path>, len: u64) -> Result<Appender> {
        Appender::open_limited(path.as_ref(), Some(len))
    }

    fn open_limited(path: &Path, limit: Option<u64>) -> Result<Appender> {
        let open = |e| Error::io("open", path, e);
        let new = match fs::metadata(path) {
            Ok(metadata) if !metadata.is_file() => {
                return Err(Error::invalid(path, "exists and is not a regular file"));
            }
            Ok(_) => false,
            Err(e) if e.kind() == io::ErrorKind::NotFound => true,
            Err(e) => return Err(open(e)),
        };
        let mut file = File::options().read(true).append(true).create(true).open(path).map_err(open)?;
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            let what = "another run is writing to it; wait for it, stop it, or choose another folder";
            return Err(Error::invalid(path, what));
        }
        let actual = file.metadata().map_err(open)?.len();
        let limit = limit.unwrap_or(actual);
        if actual < limit {
            let what = format!("has {actual} bytes, but had {limit} when the checkpoint was made");
            return Err(Error::bad_data(path, what));
        }
        let len = end_of_last_line(&mut file, limit).map_err(|e| Error::io("read", path, e))?;
        if len != actual {
            file.set_len(len).map_err(|e| Error::io("write", path, e))?;
        }
        if new {
            sync_folder(&parent_of(path))?;
        }
        Ok(Appender { path: path.to_owned(), file, len })
    }

    /// Adds one line. `line` must not hold a line feed, and gets one.
    ///
    /// When this fails, the file holds the lines before it and no part of this one. Lines survive a
    /// killed process at once and a power cut from the next [`sync`](Appender::sync) on.
    pub fn append(&mut self, line: &str) -> Result<()> {
        if line.contains('\n') {
            return Err(Error::invalid(&self.path, format!("{line:?} is more than one line")));
        }
        let mut bytes = Vec::with_capacity(line.len() + 1);
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
        if let Err(e) = self.file.write_all(&bytes) {
            // Drop what a full disk let through of it. Should that fail too, the next opening does.
            let _ = self.file.set_len(self.len);
            return Err(Error::io("write", &self.path, e));
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Brings all lines to disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("write", &self.path, e))
    }

    /// Length of the file in bytes: what a checkpoint records for [`resume`](Appender::resume).
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no line yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The position after the last line feed within the first `limit` bytes.
fn end_of_last_line(file: &mut File, limit: u64) -> io::Result<u64> {
    let mut buffer = [0; 4096];
    let mut end = limit;
    while end > 0 {
        let n = end.min(buffer.len() as u64);
        file.seek(SeekFrom::Start(end - n))?;
        let piece = &mut buffer[..n as usize];
        file.read_exact(piece)?;
        if let Some(i) = piece.iter().rposition(|&b| b == b'\n') {
            return Ok(end - n + i as u64 + 1);
        }
        end -= n;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn lines_are_added_across_openings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.jsonl");
        let mut log = Appender::open(&path).unwrap();
        assert!(log.is_empty());
        log.append("{\"step\":1}").unwrap();
        log.append("").unwrap();
        log.sync().unwrap();
        assert_eq!(log.len(), 12);
        drop(log);
        let mut log = Appender::open(&path).unwrap();
        assert_eq!(log.len(), 12);
        log.append("é").unwrap();
        assert_eq!(read(&path), "{\"step\":1}\n\né\n");
        assert!(log.append("two\nlines").is_err());
        assert_eq!(read(&path), "{\"step\":1}\n\né\n");
    }

    #[test]
    fn torn_last_lines_are_dropped() {
        let long = "x".repeat(10_000);
        let cases = [
            ("", ""),
            ("torn", ""),
            ("a\n", "a\n"),
            ("a\ntorn", "a\n"),
            ("a\n\n{\"step\":", "a\n\n"),
            (&long, ""),
            (&format!("a\n{long}"), "a\n"),
            (&format!("{long}\nb"), &format!("{long}\n")),
        ];
        let folder = tempfile::tempdir().unwrap();
        for (i, (before, after)) in cases.into_iter().enumerate() {
            let path = folder.path().join(i.to_string());
            fs::write(&path, before).unwrap();
            let mut log = Appender::open(&path).unwrap();
            assert_eq!(read(&path), after, "case {i}");
            log.append("next").unwrap();
            assert_eq!(read(&path), format!("{after}next\n"), "case {i}");
        }
    }

    #[test]
    fn resuming_drops_what_came_after_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let cases = [(0, ""), (2, "a\n"), (3, "a\n"), (4, "a\nb\n"), (6, "a\nb\nc\n")];
        for (len, kept) in cases {
            fs::write(&path, "a\nb\nc\n").unwrap();
            let mut log = Appender::resume(&path, len).unwrap();
            log.append("d").unwrap();
            assert_eq!(read(&path), format!("{kept}d\n"), "{len}");
        }
        fs::write(&path, "a\n").unwrap();
        let error = Appender::resume(&path, 3).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData);
        assert_eq!(read(&path), "a\n");
    }

    #[test]
    fn one_writer_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let first = Appender::open(&path).unwrap();
        let error = Appender::open(&path).unwrap_err();
        assert!(error.to_string().contains("another run"), "{error}");
        drop(first);
        Appender::open(&path).unwrap();
        assert!(Appender::open(folder.path()).is_err());
    }
}
