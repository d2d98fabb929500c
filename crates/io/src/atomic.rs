//! Writing so that a crash loses nothing.
//!
//! A file or folder is built under a temporary name beside its target, brought to disk (`fsync`),
//! and renamed into place; then the folder that holds it is brought to disk too. Whoever opens the
//! target sees the old content or the new one. A write that fails (a full disk, say) or is given
//! up leaves the target as it was and removes the temporary.
//!
//! After a `kill -9` a temporary stays behind. Its name ends in `.mica-tmp` and its owner held a
//! lock on it, so [`remove_leftovers`] can tell it from one that is still being written.
//!
//! The one kind of file that grows in place is a log of lines: [`Appender`].

mod append;
mod file;
mod folder;
mod leftovers;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

pub use append::Appender;
pub use file::{AtomicFile, write, write_with};
pub use folder::AtomicDir;
pub use leftovers::remove_leftovers;

use crate::{Error, Result};

/// How the names of temporary files and folders end.
const TEMPORARY_SUFFIX: &str = ".mica-tmp";

/// The folder that holds `target`.
fn parent_of(target: &Path) -> PathBuf {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// How the temporary name for `target` begins: a dot and (up to 100 bytes of) its name.
fn temporary_prefix(target: &Path) -> Result<String> {
    let Some(name) = target.file_name() else {
        return Err(Error::invalid(target, "is not the name of a file or folder"));
    };
    let name = name.to_string_lossy();
    let cut = (0..=name.len().min(100)).rev().find(|&i| name.is_char_boundary(i)).expect("0 is a boundary");
    Ok(format!(".{}.", &name[..cut]))
}

/// Brings the entries of a folder to disk, so that a rename in it survives a power cut.
fn sync_folder(folder: &Path) -> Result<()> {
    // Other systems have no such call; there, a rename is as durable as they make it.
    if cfg!(not(unix)) {
        return Ok(());
    }
    match File::open(folder).and_then(|f| f.sync_all()) {
        // Some network and FUSE file systems cannot sync a folder and say so.
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        result => result.map_err(|e| Error::io("sync", folder, e)),
    }
}
