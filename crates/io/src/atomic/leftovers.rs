//! Cleaning up after processes that were killed while writing.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use super::TEMPORARY_SUFFIX;
use crate::{Error, Result};

/// Removes temporary files and folders in `folder` whose writer is gone, and says how many.
///
/// Only names that end in `.mica-tmp` are looked at, not in subfolders. One goes if nobody holds
/// its lock and it was last changed more than `older_than` ago (a minute is plenty: it covers the
/// moment between its creation and its lock). What cannot be removed stays, without an error.
pub fn remove_leftovers(folder: impl AsRef<Path>, older_than: Duration) -> Result<usize> {
    let folder = folder.as_ref();
    let read = |e| Error::io("read", folder, e);
    let mut removed = 0;
    for entry in fs::read_dir(folder).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.')
            && name.ends_with(TEMPORARY_SUFFIX)
            && is_abandoned(&entry, older_than)
            && remove(&entry.path()).is_ok()
        {
            removed += 1;
        }
    }
    Ok(removed)
}

fn is_abandoned(entry: &fs::DirEntry, older_than: Duration) -> bool {
    let Ok(metadata) = entry.metadata() else {
        return false;
    };
    let age = metadata.modified().ok().and_then(|t| t.elapsed().ok());
    if !(metadata.is_file() || metadata.is_dir()) || age.is_none_or(|age| age < older_than) {
        return false;
    }
    // The lock is given back at the end of the statement. Where locks do not work, this is an
    // error, and the file stays.
    File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok())
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::atomic::{AtomicDir, AtomicFile};

    #[test]
    fn only_abandoned_temporaries_go() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let file = AtomicFile::create(at("being-written")).unwrap();
        let folder = AtomicDir::create(at("being-built")).unwrap();
        fs::write(at(".model.abc.mica-tmp"), "left by a killed process").unwrap();
        fs::create_dir(at(".step-1.abc.mica-tmp")).unwrap();
        fs::write(at(".step-1.abc.mica-tmp/x"), "").unwrap();
        fs::write(at("kept.mica-tmp"), "").unwrap();
        fs::write(at(".other.tmp"), "").unwrap();
        std::os::unix::fs::symlink(at(".other.tmp"), at(".link.mica-tmp")).unwrap();

        assert_eq!(remove_leftovers(root.path(), Duration::from_secs(3600)).unwrap(), 0);
        assert_eq!(remove_leftovers(root.path(), Duration::ZERO).unwrap(), 2);
        assert!(!at(".model.abc.mica-tmp").exists());
        assert!(!at(".step-1.abc.mica-tmp").exists());
        assert!(at("kept.mica-tmp").exists() && at(".other.tmp").exists());
        assert!(at(".link.mica-tmp").is_symlink());

        file.commit().unwrap();
        folder.commit().unwrap();
        assert!(at("being-written").is_file() && at("being-built").is_dir());
        assert!(remove_leftovers(at("none"), Duration::ZERO).is_err());
    }
}
