//! Where tests find their files.

use std::path::{Path, PathBuf};

/// The root folder of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .and_then(Path::parent)
        .expect("crates/testkit lies two folders below the workspace")
}

/// A path inside the workspace's `fixtures/` folder. It need not exist.
pub fn fixture(relative: impl AsRef<Path>) -> PathBuf {
    workspace().join("fixtures").join(relative)
}

/// A path inside the `shared/` folder beside the workspace (or the folder named by `MICA_SHARED`),
/// which holds larger test data that is not part of the repository. When it is absent, says so on
/// stderr and returns None; the test then passes without having looked.
pub fn shared(relative: impl AsRef<Path>) -> Option<PathBuf> {
    let folder = match std::env::var_os("MICA_SHARED") {
        Some(folder) => PathBuf::from(folder),
        None => workspace().join("../shared"),
    };
    let path = folder.join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not there", path.display());
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workspace_is_the_folder_with_the_lock_file() {
        assert!(workspace().join("Cargo.lock").is_file());
        assert_eq!(fixture("a/b.json"), workspace().join("fixtures/a/b.json"));
    }

    #[test]
    fn shared_is_none_when_absent() {
        assert_eq!(shared("no such file"), None);
    }
}
