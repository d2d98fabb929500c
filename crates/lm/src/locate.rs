//! From what a person types after `--model` to a folder on this machine.
//!
//! Either a path, or a name `organisation/name[@revision]` that is looked up in the local Hugging Face cache, whose
//! layout is shared with Hugging Face's own tools:
//! `<cache>/models--organisation--name/refs/main` holds a commit, `snapshots/<commit>/` the files. Nothing is
//! downloaded here.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result, read_text};

/// The folder that `model` names.
///
/// A path that exists comes first, then the cache of [`HubCache::from_env`].
///
/// # Errors
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) with the places that were searched;
/// [`ErrorKind::BadData`](crate::ErrorKind::BadData) for a file, [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported)
/// for what is a GGUF file or holds nothing else.
pub fn locate(model: &str) -> Result<PathBuf> {
    locate_in(model, &HubCache::from_env())
}

/// [`locate`] with a given cache.
///
/// # Errors
/// As [`locate`].
pub fn locate_in(model: &str, cache: &HubCache) -> Result<PathBuf> {
    let path = Path::new(model);
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => {
            return gguf_alone(path).map_or_else(|| Ok(path.to_owned()), |file| Err(gguf(&file)));
        }
        Ok(_) if is_gguf(path) => return Err(gguf(path)),
        Ok(_) => return Err(Error::bad_file(path, "expected the folder of a model, got a file")),
        Err(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(Error::Read { what: "the model", path: path.to_owned(), source });
        }
        Err(_) => {}
    }
    match HubName::parse(model) {
        Some(name) => cache.snapshot(&name),
        None => Err(Error::NotFound {
            what: format!("model {model:?}"),
            looked: format!("there is no such folder or file, seen from {}", current_folder()),
            todo: "give the path of a model folder, or a name such as organisation/name".into(),
        }),
    }
}

/// A model's name on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `organisation/name`, or `name` alone for the oldest models.
    pub repository: String,
    /// A branch, tag or commit; `main` if none was given.
    pub revision: Option<String>,
}

impl HubName {
    /// Reads `organisation/name[@revision]`; `None` if it cannot be a name on the hub.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let parts: Vec<&str> = repository.split('/').collect();
        let plain = |part: &&str| {
            !part.is_empty()
                && part.len() <= 96
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.', '-'])
                && !part.contains("--")
                && !part.contains("..")
        };
        if parts.len() > 2 || !parts.iter().all(plain) || !revision.is_none_or(is_revision) {
            return None;
        }
        Some(Self { repository: repository.to_owned(), revision: revision.map(str::to_owned) })
    }
}

impl std::fmt::Display for HubName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.repository)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

/// Whether a revision stays below the folder that it is joined to.
fn is_revision(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && !text.contains(['\\', '\0', ':'])
        && Path::new(text).components().all(|part| matches!(part, Component::Normal(_)))
}

/// The local cache of Hugging Face's tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubCache {
    folder: PathBuf,
    /// Which variable named it, for messages.
    from: &'static str,
}

impl HubCache {
    /// A cache at a given folder.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), from: "" }
    }

    /// The cache that the environment names: `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `hub` in `HF_HOME`,
    /// else `huggingface/hub` in `XDG_CACHE_HOME`, else `~/.cache/huggingface/hub`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> Self {
        for (name, below) in [
            ("HF_HUB_CACHE", ""),
            ("HUGGINGFACE_HUB_CACHE", ""),
            ("HF_HOME", "hub"),
            ("XDG_CACHE_HOME", "huggingface/hub"),
            ("HOME", ".cache/huggingface/hub"),
            ("USERPROFILE", ".cache/huggingface/hub"),
        ] {
            if let Some(value) = get(name).filter(|value| !value.is_empty()) {
                let base = PathBuf::from(value);
                let base = match (base.strip_prefix("~"), get("HOME")) {
                    (Ok(rest), Some(home)) => Path::new(&home).join(rest),
                    _ => base,
                };
                return Self { folder: if below.is_empty() { base } else { base.join(below) }, from: name };
            }
        }
        Self { folder: PathBuf::from(".cache/huggingface/hub"), from: "" }
    }

    /// The cache's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of a model's files at a revision.
    ///
    /// # Errors
    /// The model or revision is not in the cache; a file of the cache is damaged.
    pub fn snapshot(&self, name: &HubName) -> Result<PathBuf> {
        let model = self.folder.join(format!("models--{}", name.repository.replace('/', "--")));
        if !model.is_dir() {
            return Err(self.missing(name, &model, None));
        }
        let revision = name.revision.as_deref().unwrap_or("main");
        let snapshots = model.join("snapshots");
        let commit = read_text(&model.join("refs").join(revision), "the model's revision", 4096)?
            .map(|commit| commit.trim().to_owned());
        let commit = match commit {
            Some(commit) if is_revision(&commit) && !commit.contains('/') => commit,
            Some(commit) => {
                return Err(Error::bad_file(
                    &model.join("refs").join(revision),
                    format!("expected the name of a commit, got {commit:?}"),
                ));
            }
            // A commit may be given itself.
            None => revision.to_owned(),
        };
        let snapshot = snapshots.join(&commit);
        if !snapshot.is_dir() {
            return Err(self.missing(name, &snapshot, Some(&snapshots)));
        }
        if !snapshot.join("config.json").is_file() {
            if let Some(file) = gguf_alone(&snapshot) {
                return Err(gguf(&file));
            }
            return Err(Error::NotFound {
                what: format!("a complete model {name}"),
                looked: format!("{} has no config.json", snapshot.display()),
                todo: format!("its download was not finished; {}", fetch(name)),
            });
        }
        Ok(snapshot)
    }

    fn missing(&self, name: &HubName, looked: &Path, snapshots: Option<&Path>) -> Error {
        let from = if self.from.is_empty() { String::new() } else { format!(" (from {})", self.from) };
        let here = snapshots.and_then(|folder| std::fs::read_dir(folder).ok()).map(|entries| {
            let mut names: Vec<String> =
                entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names.truncate(5);
            names
        });
        let others = match here {
            Some(names) if !names.is_empty() => {
                format!("; the cache has {} of it, add @ and one of these to the name", names.join(", "))
            }
            _ => String::new(),
        };
        Error::NotFound {
            what: format!("model {name}"),
            looked: format!(
                "no folder {:?} seen from {}, and in the Hugging Face cache{from} no {}{others}",
                name.repository,
                current_folder(),
                looked.display()
            ),
            todo: fetch(name),
        }
    }
}

/// What to do to get a model, as long as mica does not download.
fn fetch(name: &HubName) -> String {
    let revision = name.revision.as_ref().map(|r| format!(" --revision {r}")).unwrap_or_default();
    format!(
        "mica does not download models yet: run `hf download {}{revision}` (pip install huggingface_hub), or copy \
         the model's folder here and give its path",
        name.repository
    )
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// A GGUF file of a folder that is no model otherwise.
fn gguf_alone(folder: &Path) -> Option<PathBuf> {
    if folder.join("config.json").exists() {
        return None;
    }
    std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find(|path| is_gguf(path))
}

fn gguf(file: &Path) -> Error {
    Error::Unsupported {
        what: format!("{}: a model in a GGUF file", file.display()),
        todo: "mica opens folders with config.json and *.safetensors: take the model's original weights, or MLX's \
               version of them, and quantize with `mica convert -q`"
            .into(),
    }
}

fn current_folder() -> String {
    std::env::current_dir()
        .map_or_else(|_| "the current folder".into(), |folder| folder.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache() -> (tempfile::TempDir, HubCache) {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("models--org--name");
        for (path, text) in [
            ("refs/main", COMMIT),
            ("refs/v1/beta", "feed\n"),
            ("refs/empty", "cafe"),
            ("refs/evil", "../../../etc"),
            (&format!("snapshots/{COMMIT}/config.json"), "{}"),
            ("snapshots/feed/config.json", "{}"),
            ("refs/blocks", "b10c"),
            ("snapshots/b10c/model.gguf", "GGUF"),
            ("snapshots/cafe/README.md", ""),
        ] {
            let path = model.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let cache = HubCache::at(dir.path());
        (dir, cache)
    }

    #[test]
    fn names_are_found_in_the_cache() {
        let (dir, cache) = cache();
        let snapshots = dir.path().join("models--org--name/snapshots");
        for (name, commit) in [
            ("org/name", COMMIT),
            ("org/name@main", COMMIT),
            (&format!("org/name@{COMMIT}"), COMMIT),
            ("org/name@v1/beta", "feed"),
        ] {
            assert_eq!(locate_in(name, &cache).unwrap(), snapshots.join(commit), "{name}");
        }
        let path = snapshots.join("feed");
        assert_eq!(locate_in(path.to_str().unwrap(), &cache).unwrap(), path, "a path comes first");
    }

    #[test]
    fn what_is_not_there_says_where_it_was_looked_for() {
        let (dir, cache) = cache();
        for (name, kind, words) in [
            ("org/other", ErrorKind::NotFound, "models--org--other"),
            ("org/other@v2", ErrorKind::NotFound, "hf download org/other --revision v2"),
            ("org/name@v2", ErrorKind::NotFound, COMMIT),
            ("org/name@empty", ErrorKind::NotFound, "not finished"),
            ("org/name@evil", ErrorKind::BadData, "name of a commit"),
            ("org/name@blocks", ErrorKind::Unsupported, "model.gguf: a model in a GGUF file"),
            ("org/name@../../x", ErrorKind::NotFound, "no such folder"),
            ("/no/such/folder", ErrorKind::NotFound, "no such folder"),
            ("../x", ErrorKind::NotFound, "no such folder"),
            ("", ErrorKind::NotFound, "no such folder"),
        ] {
            let error = locate_in(name, &cache).unwrap_err();
            assert_eq!(error.kind(), kind, "{name}: {error}");
            assert!(error.to_string().contains(words), "{name}: {error}");
        }
        for (file, kind, words) in [
            ("b10c", ErrorKind::Unsupported, "model.gguf: a model in a GGUF file"),
            ("b10c/model.gguf", ErrorKind::Unsupported, "a model in a GGUF file"),
            ("feed/config.json", ErrorKind::BadData, "expected the folder of a model"),
        ] {
            let path = dir.path().join("models--org--name/snapshots").join(file);
            let error = locate_in(path.to_str().unwrap(), &cache).unwrap_err();
            assert_eq!(error.kind(), kind, "{file}: {error}");
            assert!(error.to_string().contains(words), "{file}: {error}");
        }
        let error = locate_in("org/other", &cache).unwrap_err().to_string();
        assert!(error.contains(&dir.path().display().to_string()), "{error}");
    }

    #[test]
    fn variables_in_their_order() {
        for (variables, expected) in [
            (&[("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b")][..], "/a"),
            (&[("HF_HUB_CACHE", ""), ("HF_HOME", "/b"), ("HOME", "/h")], "/b/hub"),
            (&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")], "/x/huggingface/hub"),
            (&[("HOME", "/h")], "/h/.cache/huggingface/hub"),
            (&[("HF_HOME", "~/hf"), ("HOME", "/h")], "/h/hf/hub"),
        ] {
            let cache = HubCache::from_variables(|name| {
                variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into())
            });
            assert_eq!(cache.folder(), Path::new(expected), "{variables:?}");
        }
    }

    #[test]
    fn names() {
        for (text, ok) in [
            ("org/name", true),
            ("gpt2", true),
            ("mlx-community/Qwen3-0.6B-4bit@main", true),
            ("a/b/c", false),
            ("org/", false),
            ("org/..", false),
            (".hidden/x", false),
            ("a b/c", false),
            ("org/name@", false),
            ("org/name@/etc", false),
        ] {
            assert_eq!(HubName::parse(text).is_some(), ok, "{text}");
        }
    }
}
