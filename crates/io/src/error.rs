//! The crate's error: always with the file's path, and a kind that the program maps to exit codes.

use std::io;
use std::path::{Path, PathBuf};

/// A result whose error names a file.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong with which file.
///
/// Names that come out of a file (tensors, keys) are shown escaped, so that a hostile file cannot
/// send control sequences to a terminal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// A verb: open, read, write, create, replace…
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// The file exists, but the thing looked for in it does not, or a folder lacks a file.
    #[error("{}: {what}", path.display())]
    Missing {
        /// The file or folder searched.
        path: PathBuf,
        /// What is missing, and what there is instead.
        what: String,
    },

    /// The file is not what its format demands.
    #[error("{}: {what}", path.display())]
    BadData {
        /// The file.
        path: PathBuf,
        /// Where and how it breaks the format.
        what: String,
    },

    /// The file's content is not the expected one.
    #[error(
        "{}: sha256 is {actual}, expected {expected}; the file is damaged or is another version, \
         fetch it again",
        path.display()
    )]
    Integrity {
        /// The file.
        path: PathBuf,
        /// Hexadecimal hash that was asked for.
        expected: String,
        /// Hexadecimal hash of what is there.
        actual: String,
    },

    /// The request cannot be carried out on this path.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        what: String,
    },

    /// Whoever supplies the content of a file being written failed. The file was not replaced.
    #[error("cannot write {}: {what}: {source}{}", path.display(), content_advice(source.as_ref()))]
    Content {
        /// The file that was to be written.
        path: PathBuf,
        /// Which part of it.
        what: String,
        /// The supplier's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Classes of errors, as far as the caller does something different about each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A file, a folder, or a tensor in it is not there.
    NotFound,
    /// Permissions, or a read-only file system.
    Access,
    /// No space, quota, or limit on file sizes.
    DiskFull,
    /// The content breaks its format, or ends early.
    BadData,
    /// The content is well-formed but not the expected one.
    Integrity,
    /// Everything else.
    Other,
}

impl Error {
    /// The system's `source` while doing `action` (a verb) to `path`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Error {
        Error::Io { action, path: path.as_ref().to_owned(), source }
    }

    /// The content of `path` breaks its format: `what`.
    pub fn bad_data(path: impl AsRef<Path>, what: impl Into<String>) -> Error {
        Error::BadData { path: path.as_ref().to_owned(), what: what.into() }
    }

    /// `path` lacks something: `what`.
    pub fn missing(path: impl AsRef<Path>, what: impl Into<String>) -> Error {
        Error::Missing { path: path.as_ref().to_owned(), what: what.into() }
    }

    /// The request does not fit `path`: `what`.
    pub fn invalid(path: impl AsRef<Path>, what: impl Into<String>) -> Error {
        Error::Invalid { path: path.as_ref().to_owned(), what: what.into() }
    }

    /// The file or folder concerned.
    pub fn path(&self) -> &Path {
        match self {
            Error::Io { path, .. }
            | Error::Missing { path, .. }
            | Error::BadData { path, .. }
            | Error::Integrity { path, .. }
            | Error::Invalid { path, .. }
            | Error::Content { path, .. } => path,
        }
    }

    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Io { source, .. } => ErrorKind::of(source),
            Error::Missing { .. } => ErrorKind::NotFound,
            Error::BadData { .. } => ErrorKind::BadData,
            Error::Integrity { .. } => ErrorKind::Integrity,
            Error::Invalid { .. } => ErrorKind::Other,
            Error::Content { source, .. } => {
                if let Some(inner) = source.downcast_ref::<Error>() {
                    inner.kind()
                } else if let Some(inner) = source.downcast_ref::<io::Error>() {
                    ErrorKind::of(inner)
                } else {
                    ErrorKind::Other
                }
            }
        }
    }
}

impl ErrorKind {
    /// The class of what the system said.
    pub fn of(error: &io::Error) -> ErrorKind {
        use io::ErrorKind as K;
        match error.kind() {
            K::NotFound | K::NotADirectory => ErrorKind::NotFound,
            K::PermissionDenied | K::ReadOnlyFilesystem => ErrorKind::Access,
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => ErrorKind::DiskFull,
            // A folder where a file should be is a folder of another make.
            K::UnexpectedEof | K::InvalidData | K::IsADirectory => ErrorKind::BadData,
            _ => ErrorKind::Other,
        }
    }
}

/// As [`advice`]; an error of this crate gives its own.
fn content_advice(error: &(dyn std::error::Error + Send + Sync + 'static)) -> &'static str {
    error.downcast_ref::<io::Error>().map_or("", advice)
}

fn advice(error: &io::Error) -> &'static str {
    match ErrorKind::of(error) {
        ErrorKind::DiskFull => {
            "; free some space or choose another folder (what was there before is unchanged)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn kinds_of_system_errors() {
        let cases = [
            (libc::ENOENT, ErrorKind::NotFound),
            (libc::ENOTDIR, ErrorKind::NotFound),
            (libc::EACCES, ErrorKind::Access),
            (libc::EPERM, ErrorKind::Access),
            (libc::EROFS, ErrorKind::Access),
            (libc::ENOSPC, ErrorKind::DiskFull),
            (libc::EDQUOT, ErrorKind::DiskFull),
            (libc::EFBIG, ErrorKind::DiskFull),
            (libc::EIO, ErrorKind::Other),
        ];
        for (code, kind) in cases {
            let error = Error::io("write", "f", io::Error::from_raw_os_error(code));
            assert_eq!(error.kind(), kind, "{error}");
            let wrapped = Error::Content { path: "g".into(), what: "tensor".into(), source: Box::new(error) };
            assert_eq!(wrapped.kind(), kind, "{wrapped}");
        }
    }

    #[test]
    fn messages_name_the_file_and_the_way_out() {
        let full = io::ErrorKind::StorageFull.into();
        let message = Error::io("write", "/a/b", full).to_string();
        assert!(message.starts_with("cannot write /a/b: "), "{message}");
        assert!(message.contains("free some space"), "{message}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_device_is_disk_full() {
        use std::io::Write;
        let mut device = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let error = device.write_all(b"x").unwrap_err();
        assert_eq!(Error::io("write", "/dev/full", error).kind(), ErrorKind::DiskFull);
    }
}
