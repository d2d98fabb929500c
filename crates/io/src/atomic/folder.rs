//! A whole folder, put in place at once.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{TEMPORARY_SUFFIX, parent_of, sync_folder, temporary_prefix};
use crate::{Error, Result};

/// A folder being built, which takes the place of its target at [`commit`](AtomicDir::commit).
///
/// Write into [`path`](AtomicDir::path). Dropped without a commit it disappears with all its
/// content and the target stays as it was. A target that is a symbolic link to a folder means that
/// folder (people link their outputs to a larger disk).
#[derive(Debug)]
pub struct AtomicDir {
    target: PathBuf,
    temporary: TempDir,
    /// Held open for its lock: the sign to `remove_leftovers` that someone is still at work.
    _lock: Option<File>,
}

impl AtomicDir {
    /// Begins a new content for the folder `target`. Missing folders above it are created.
    pub fn create(target: impl AsRef<Path>) -> Result<AtomicDir> {
        let mut target = target.as_ref().to_owned();
        if fs::symlink_metadata(&target).is_ok_and(|m| m.is_symlink()) {
            target = fs::canonicalize(&target).map_err(|e| Error::io("open", &target, e))?;
        }
        let prefix = temporary_prefix(&target)?;
        if fs::metadata(&target).is_ok_and(|m| !m.is_dir()) {
            return Err(Error::invalid(&target, "exists and is not a folder"));
        }
        let parent = parent_of(&target);
        if fs::metadata(&parent).is_ok_and(|m| !m.is_dir()) {
            return Err(Error::io("create", &target, io::ErrorKind::NotADirectory.into()));
        }
        fs::create_dir_all(&parent).map_err(|e| Error::io("create", &parent, e))?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(TEMPORARY_SUFFIX);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let temporary = builder.tempdir_in(&parent).map_err(|e| Error::io("create", &target, e))?;
        let lock = File::open(temporary.path()).ok();
        if let Some(lock) = &lock {
            let _ = lock.try_lock();
        }
        Ok(AtomicDir { target, temporary, _lock: lock })
    }

    /// Where to build the content.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Where the content will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Brings every file to disk and puts the folder in the target's place. The folder that was
    /// there is replaced as a whole and removed.
    ///
    /// On Linux and macOS both change places in one step. Elsewhere (and on file systems that
    /// cannot), the old folder is moved aside first: a crash between the two steps leaves it
    /// beside the target under a name ending in `.old.mica-tmp`.
    pub fn commit(self) -> Result<()> {
        sync_tree(self.path())?;
        let parent = parent_of(&self.target);
        let replace = |e| Error::io("replace", &self.target, e);
        if self.target.is_dir() {
            match exchange(self.path(), &self.target) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                    move_aside_and_rename(self.path(), &self.target).map_err(replace)?;
                }
                Err(e) => return Err(replace(e)),
            }
            sync_folder(&parent)?;
            // The temporary name now holds the old folder, if it exists; dropping removes it. A
            // failure to remove leaves a leftover, not a wrong result.
        } else {
            fs::rename(self.path(), &self.target).map_err(replace)?;
            sync_folder(&parent)?;
        }
        Ok(())
    }
}

/// Brings all files and folders below `folder`, and itself, to disk. Links are not followed.
fn sync_tree(folder: &Path) -> Result<()> {
    let read = |e| Error::io("read", folder, e);
    for entry in fs::read_dir(folder).map_err(read)? {
        let entry = entry.map_err(read)?;
        let path = entry.path();
        let kind = entry.file_type().map_err(read)?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            // Windows wants write access for this.
            let open = File::options().read(true).write(cfg!(windows)).open(&path);
            open.and_then(|file| file.sync_all()).map_err(|e| Error::io("write", &path, e))?;
        }
    }
    sync_folder(folder)
}

/// Lets two folders change places in one step, or answers `Unsupported`.
#[cfg(any(target_os = "linux", target_os = "macos"))]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    let a = CString::new(a.as_os_str().as_bytes())?;
    let b = CString::new(b.as_os_str().as_bytes())?;
    #[cfg(target_os = "linux")]
    // SAFETY: both pointers are NUL-terminated strings that live until the call returns, and the
    // arguments have the types of renameat2(2).
    let status = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    #[cfg(target_os = "macos")]
    // SAFETY: both pointers are NUL-terminated strings that live until the call returns.
    let status = unsafe { libc::renamex_np(a.as_ptr(), b.as_ptr(), libc::RENAME_SWAP) };
    if status == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL | libc::ENOTSUP) => Err(io::ErrorKind::Unsupported.into()),
        _ => Err(error),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Two renames where one exchange is not to be had; the old folder comes back if the second fails.
fn move_aside_and_rename(new: &Path, target: &Path) -> io::Result<()> {
    let mut aside = new.as_os_str().to_owned();
    aside.push(".old");
    aside.push(TEMPORARY_SUFFIX);
    let aside = PathBuf::from(aside);
    fs::rename(target, &aside)?;
    if let Err(e) = fs::rename(new, target) {
        fs::rename(&aside, target)?;
        return Err(e);
    }
    let _ = fs::remove_dir_all(&aside);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(folder: &Path) -> Vec<(String, String)> {
        let mut out = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                for (inner, content) in tree(&path) {
                    out.push((format!("{name}/{inner}"), content));
                }
            } else {
                out.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
        out.sort();
        out
    }

    fn build(target: &Path, files: &[(&str, &str)]) -> AtomicDir {
        let folder = AtomicDir::create(target).unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        folder
    }

    fn pairs(files: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = |&(name, content): &(&str, &str)| (name.to_owned(), content.to_owned());
        files.iter().map(own).collect()
    }

    #[test]
    fn new_folder_below_missing_ones() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("a/b/step-1");
        build(&target, &[("x", "1"), ("deep/er/y", "2")]).commit().unwrap();
        assert_eq!(tree(root.path()), pairs(&[("a/b/step-1/deep/er/y", "2"), ("a/b/step-1/x", "1")]));
    }

    #[test]
    fn replaces_a_folder_as_a_whole() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("d");
        build(&target, &[("old", "1"), ("both", "1")]).commit().unwrap();
        let folder = build(&target, &[("both", "2"), ("sub/new", "2")]);
        assert_eq!(tree(&target), pairs(&[("both", "1"), ("old", "1")]));
        folder.commit().unwrap();
        assert_eq!(tree(root.path()), pairs(&[("d/both", "2"), ("d/sub/new", "2")]));
    }

    #[test]
    fn dropping_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("d");
        build(&target, &[("old", "1")]).commit().unwrap();
        drop(build(&target, &[("new", "2")]));
        drop(build(&root.path().join("other"), &[("new", "2")]));
        assert_eq!(tree(root.path()), pairs(&[("d/old", "1")]));
    }

    #[test]
    fn the_way_with_two_renames() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("d");
        let new = root.path().join("n");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), "1").unwrap();
        // The second rename fails: the old folder comes back.
        assert!(move_aside_and_rename(&new, &target).is_err());
        assert_eq!(tree(root.path()), pairs(&[("d/old", "1")]));
        fs::create_dir(&new).unwrap();
        fs::write(new.join("new"), "2").unwrap();
        move_aside_and_rename(&new, &target).unwrap();
        assert_eq!(tree(root.path()), pairs(&[("d/new", "2")]));
    }

    #[test]
    fn a_file_in_the_way_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("f");
        fs::write(&target, "file").unwrap();
        assert!(matches!(AtomicDir::create(&target), Err(Error::Invalid { .. })));
        assert_eq!(fs::read_to_string(&target).unwrap(), "file");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_folder_stays_and_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let real = root.path().join("big-disk");
        fs::create_dir(&real).unwrap();
        fs::write(real.join("old"), "1").unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        build(&link, &[("new", "2")]).commit().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(tree(&real), pairs(&[("new", "2")]));
    }
}
