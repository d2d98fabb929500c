//! The run folder as a whole: taking hold of it, and its settings.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::checkpoint::Checkpoints;
use super::metrics::{METRICS, Metrics};
use crate::config::RunConfig;
use crate::{Error, Result};

const LOCK: &str = "run.lock";
const CONFIG: &str = "config.yaml";

/// What to do with a run that is in the folder already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Refuse to begin.
    Refuse,
    /// Remove its checkpoints and metrics and begin anew.
    Replace,
}

/// A run folder that this process holds. The hold ends when this is dropped or the process dies.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Takes a folder for a new run; creates it if needed.
    pub fn create(path: impl AsRef<Path>, existing: Existing) -> Result<RunFolder> {
        let path = path.as_ref();
        std::fs::create_dir_all(path).map_err(|e| Error::file(path, e))?;
        let folder = RunFolder { path: path.into(), _lock: lock(path)? };
        if !is_taken(path)? {
            return Ok(folder);
        }
        if existing == Existing::Refuse {
            return Err(Error::Taken { path: path.into() });
        }
        let metrics = path.join(METRICS);
        let checkpoints = path.join("checkpoints");
        if checkpoints.exists() {
            std::fs::remove_dir_all(&checkpoints).map_err(|e| Error::file(&checkpoints, e))?;
        }
        if metrics.exists() {
            std::fs::remove_file(&metrics).map_err(|e| Error::file(&metrics, e))?;
        }
        Ok(folder)
    }

    /// Whether [`create`](RunFolder::create) would be refused, as far as can be told without touching anything:
    /// asked before the long work that precedes a run.
    pub fn check(path: impl AsRef<Path>, existing: Existing) -> Result<()> {
        let path = path.as_ref();
        if path.exists() && !path.is_dir() {
            let source = std::io::ErrorKind::NotADirectory.into();
            return Err(Error::File { path: path.into(), source });
        }
        if existing == Existing::Refuse && is_taken(path)? {
            return Err(Error::Taken { path: path.into() });
        }
        Ok(())
    }

    /// Takes the folder of a run that is to go on.
    pub fn resume(path: impl AsRef<Path>) -> Result<RunFolder> {
        let path = path.as_ref();
        if !path.is_dir() {
            let what = "there is no such folder to resume from".into();
            return Err(Error::Missing { path: path.into(), what });
        }
        Ok(RunFolder { path: path.into(), _lock: lock(path)? })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its checkpoints.
    pub fn checkpoints(&self) -> Checkpoints {
        Checkpoints::new(self.path.join("checkpoints"))
    }

    /// Its metrics: all lines if `bytes` is `None`, else those of the first so many bytes.
    pub fn metrics(&self, bytes: Option<u64>) -> Result<Metrics> {
        Metrics::open(self.path.join(METRICS), bytes)
    }

    /// Writes the settings as resolved.
    pub fn write_config(&self, config: &RunConfig) -> Result<()> {
        mica_io::atomic::write(self.path.join(CONFIG), config.to_yaml()?)?;
        Ok(())
    }

    /// The settings with which the run was begun.
    pub fn read_config(&self) -> Result<RunConfig> {
        let path = self.path.join(CONFIG);
        RunConfig::from_yaml(&std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?)
    }
}

/// Whether a folder holds a run.
fn is_taken(path: &Path) -> Result<bool> {
    let begun = std::fs::metadata(path.join(METRICS)).is_ok_and(|about| about.len() > 0);
    Ok(begun || !Checkpoints::new(path.join("checkpoints")).steps()?.is_empty())
}

/// Takes the lock, which the system gives back when this process ends in whatever way.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| Error::file(&path, e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let owner = std::fs::read_to_string(&path).unwrap_or_default();
            let owner =
                Some(owner.trim().to_string()).filter(|owner| !owner.is_empty()).unwrap_or("unknown".into());
            return Err(Error::Locked { path: folder.into(), owner });
        }
        // Some network file systems have no locks; a run there is better than none.
        Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => return Ok(file),
        Err(TryLockError::Error(e)) => return Err(Error::file(&path, e)),
    }
    // Only for people to read; the lock itself is the system's.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::parse;
    use crate::config::{ModelFacts, TrainConfig};

    #[test]
    fn two_cannot_hold_one_folder() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        let first = RunFolder::create(&path, Existing::Refuse).unwrap();
        let error = RunFolder::resume(&path).unwrap_err().to_string();
        assert!(
            error.contains("in use by process") && error.contains(&std::process::id().to_string()),
            "{error}"
        );
        drop(first);
        RunFolder::resume(&path).unwrap();
    }

    #[test]
    fn a_run_is_not_overwritten_by_accident() {
        let parent = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(parent.path(), Existing::Refuse).unwrap();
        folder.metrics(None).unwrap().write(&serde_json::json!({"step": 1})).unwrap();
        drop(folder);
        let error = RunFolder::create(parent.path(), Existing::Refuse).unwrap_err().to_string();
        assert!(error.contains("--resume"), "{error}");
        let folder = RunFolder::create(parent.path(), Existing::Replace).unwrap();
        assert_eq!(folder.metrics(None).unwrap().bytes(), 0);
        assert!(RunFolder::resume(parent.path().join("nowhere")).is_err());
    }

    #[test]
    fn settings_come_back() {
        let parent = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(parent.path(), Existing::Refuse).unwrap();
        let settings = parse("model: m\ndata: d\noutput: o\nlearning_rate: 3.3e-5").unwrap();
        let config = TrainConfig::new(settings)
            .unwrap()
            .resolve(&ModelFacts { layers: 2, bits: None, positions: None })
            .unwrap();
        folder.write_config(&config).unwrap();
        assert_eq!(folder.read_config().unwrap(), config);
    }
}
