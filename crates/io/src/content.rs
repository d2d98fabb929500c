//! Where the bytes of a tensor come from while a file is written.

use std::io::{self, Write};
use std::path::Path;

use crate::{Error, Result};

/// What a closure that supplies a tensor's bytes returns. `?` turns any error into it.
pub type ContentResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

pub(crate) enum Source<'a> {
    Bytes(&'a [u8]),
    Stream(Box<dyn FnOnce(&mut dyn Write) -> ContentResult + 'a>),
}

impl Source<'_> {
    /// Whether this is known to supply another number of bytes than `len`: then, how many.
    pub fn mismatch(&self, len: usize) -> Option<usize> {
        match self {
            Source::Bytes(bytes) if bytes.len() != len => Some(bytes.len()),
            _ => None,
        }
    }

    /// Writes exactly `len` bytes to `out`. Errors name the file `path` and the tensor `name`.
    pub fn write(self, out: &mut impl Write, len: u64, path: &Path, name: &str) -> Result<()> {
        let content = match self {
            Source::Bytes(bytes) => {
                return out.write_all(bytes).map_err(|e| Error::io("write", path, e));
            }
            Source::Stream(content) => content,
        };
        let mut exact = Exact { out, left: len };
        content(&mut exact).map_err(|source| Error::Content {
            path: path.to_owned(),
            what: format!("tensor {name:?}"),
            source,
        })?;
        if exact.left > 0 {
            let supplied = len - exact.left;
            let what = format!("tensor {name:?} takes {len} bytes, {supplied} were supplied");
            return Err(Error::invalid(path, what));
        }
        Ok(())
    }
}

/// Lets so many bytes through and no more.
struct Exact<'w, W> {
    out: &'w mut W,
    left: u64,
}

impl<W: Write> Write for Exact<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            return Err(io::Error::other("more bytes than the tensor's type and shape allow"));
        }
        let n = self.out.write(bytes)?;
        self.left -= n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
