//! One file, replaced as a whole.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use super::{TEMPORARY_SUFFIX, parent_of, sync_folder, temporary_prefix};
use crate::{Error, Result};

/// A file being written, which takes the place of its target at [`commit`](AtomicFile::commit).
///
/// Dropped without a commit it disappears and the target stays as it was. The target's permissions
/// are kept; a new file gets the usual ones (0666 less the umask). A target that is a symbolic link
/// is itself replaced, and what it pointed to is left alone: in the hub's cache links point to
/// content that is named by its hash. The folder must exist.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    /// Before `temporary`, so that it is closed before it is removed.
    file: BufWriter<File>,
    temporary: TempPath,
}

impl AtomicFile {
    /// Begins a new content for `target`.
    pub fn create(target: impl AsRef<Path>) -> Result<AtomicFile> {
        let target = target.as_ref();
        let prefix = temporary_prefix(target)?;
        // Renaming over a device such as /dev/null or /dev/stdout would destroy it.
        if fs::metadata(target).is_ok_and(|m| !m.is_file()) {
            return Err(Error::invalid(target, "exists and is not a regular file"));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(TEMPORARY_SUFFIX);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder.tempfile_in(parent_of(target)).map_err(|e| Error::io("create", target, e))?;
        let (file, temporary) = temporary.into_parts();
        // The sign to `remove_leftovers` that someone is still at work. Where the file system has
        // no locks, it leaves the file alone as well.
        let _ = file.try_lock();
        let file = BufWriter::with_capacity(1 << 18, file);
        Ok(AtomicFile { target: target.to_owned(), file, temporary })
    }

    /// Where the content will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Brings the content to disk and puts it in the target's place.
    pub fn commit(self) -> Result<()> {
        let AtomicFile { target, file, temporary } = self;
        let write = |e| Error::io("write", &target, e);
        let file = file.into_inner().map_err(|e| write(e.into_error()))?;
        if let Ok(existing) = fs::symlink_metadata(&target)
            && existing.is_file()
        {
            file.set_permissions(existing.permissions())
                .map_err(|e| Error::io("set the permissions of", &target, e))?;
        }
        file.sync_all().map_err(write)?;
        temporary.persist(&target).map_err(|e| Error::io("replace", &target, e.error))?;
        sync_folder(&parent_of(&target))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

/// Replaces the content of `path` by `bytes`.
pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<()> {
    write_with(path, |file| file.write_all(bytes.as_ref()))
}

/// Replaces the content of `path` by what `content` writes (buffered). If it fails, the file stays
/// as it was.
pub fn write_with(
    path: impl AsRef<Path>,
    content: impl FnOnce(&mut AtomicFile) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let mut file = AtomicFile::create(path)?;
    content(&mut file).map_err(|e| Error::io("write", path, e))?;
    file.commit()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let name = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn writes_replaces_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write(&path, "one").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write(&path, vec![7; 3_000_000]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![7; 3_000_000]);
        write(&path, "").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert_eq!(names(folder.path()), ["a.json"]);
    }

    #[test]
    fn target_is_untouched_until_the_commit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        write(&path, "old").unwrap();

        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        file.flush().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()).len(), 2);
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["f"]);

        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let error = write_with(&path, |file| {
            file.write_all(&[1; 1_000_000])?;
            Err(full())
        });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::DiskFull);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["f"]);
    }

    #[test]
    fn seeking_back_fills_in_a_header() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        write_with(&path, |file| {
            file.write_all(b"????body")?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(b"head")
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"headbody");
    }

    #[test]
    fn names_of_all_lengths() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["x".repeat(255), "é".repeat(127), "a b\n".to_owned()] {
            let path = folder.path().join(&name);
            write(&path, "1").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"1", "{name}");
        }
    }

    #[test]
    fn refused_targets() {
        let folder = tempfile::tempdir().unwrap();
        let missing = write(folder.path().join("no/f"), "").unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
        for path in [folder.path(), Path::new("/"), Path::new(".."), Path::new("")] {
            assert!(matches!(write(path, ""), Err(Error::Invalid { .. })), "{path:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn devices_and_what_links_point_to_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(write("/dev/null", ""), Err(Error::Invalid { .. })));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        assert!(matches!(write(&link, ""), Err(Error::Invalid { .. })));

        let blob = folder.path().join("blob");
        fs::write(&blob, "content").unwrap();
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&blob, &link).unwrap();
        write(&link, "other").unwrap();
        assert_eq!(fs::read(&blob).unwrap(), b"content");
        assert_eq!(fs::read(&link).unwrap(), b"other");
        assert!(fs::symlink_metadata(&link).unwrap().is_file());
    }

    #[cfg(unix)]
    #[test]
    fn permissions_are_kept_and_new_files_are_not_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        // What the umask of this process makes of a plain new file.
        let plain = folder.path().join("plain");
        fs::write(&plain, "").unwrap();
        let path = folder.path().join("f");
        write(&path, "1").unwrap();
        assert_eq!(mode(&path), mode(&plain));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        write(&path, "2").unwrap();
        assert_eq!(mode(&path), 0o640);
    }
}
