//! A file opened for positioned reads.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A regular file and its length when it was opened.
///
/// Reads take `&self`, have no position in common, and may run on many threads at once.
#[derive(Debug)]
pub(crate) struct InputFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl InputFile {
    /// Opens a regular file, or a symbolic link to one (the hub's cache is made of links).
    ///
    /// Folders, pipes and devices are refused before they are opened: opening a pipe would wait
    /// for a writer that may never come.
    pub fn open(path: &Path) -> Result<InputFile> {
        let error = |e| Error::io("open", path, e);
        if !fs::metadata(path).map_err(error)?.is_file() {
            return Err(Error::bad_data(path, "is not a regular file"));
        }
        let file = File::open(path).map_err(error)?;
        let len = file.metadata().map_err(error)?.len();
        Ok(InputFile { path: path.to_owned(), file, len })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when the file was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills `out` from byte `offset` of the file on.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, offset, out).map_err(|e| {
            if e.kind() == std::io::ErrorKind::UnexpectedEof {
                let end = offset.saturating_add(out.len() as u64);
                let what = format!(
                    "ends before byte {end}; it was {} bytes long when opened, so something has \
                     cut it short since",
                    self.len
                );
                Error::bad_data(&self.path, what)
            } else {
                Error::io("read", &self.path, e)
            }
        })
    }

    /// `len` bytes from `offset` on, in a new vector. The caller has checked that they are there.
    pub fn read_vec(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        out.try_reserve_exact(len).map_err(|_| {
            let source = std::io::ErrorKind::OutOfMemory.into();
            Error::io("find memory to read", &self.path, source)
        })?;
        out.resize(len, 0);
        self.read_at(offset, &mut out)?;
        Ok(out)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !out.is_empty() {
        match file.seek_read(out, offset) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                out = &mut out[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn refuses_what_is_not_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |path: &Path| InputFile::open(path).unwrap_err().kind();
        assert_eq!(kind(folder.path()), ErrorKind::BadData);
        assert_eq!(kind(&folder.path().join("none")), ErrorKind::NotFound);
        #[cfg(unix)]
        assert_eq!(kind(Path::new("/dev/null")), ErrorKind::BadData);
    }

    #[test]
    fn a_file_cut_short_after_opening_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, b"0123456789").unwrap();
        let file = InputFile::open(&path).unwrap();
        assert_eq!(file.read_vec(2, 3).unwrap(), b"234");
        File::options().write(true).open(&path).unwrap().set_len(4).unwrap();
        assert_eq!(file.read_vec(2, 3).unwrap_err().kind(), ErrorKind::BadData);
        assert_eq!(file.read_vec(2, 2).unwrap(), b"23");
    }
}
