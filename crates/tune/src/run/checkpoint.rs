//! Checkpoints: folders that are whole or absent, with a manifest by which damage is noticed.
//!
//! What is in the files is their writers' business; this module makes a folder of them appear at once, says
//! later whether it is still what was written, and removes the ones that are no longer needed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mica_io::atomic::{AtomicDir, remove_leftovers};
use mica_io::hash::sha256_file;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::loader::LoaderState;
use crate::{Error, Result};

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const FORMAT: u32 = 1;

/// What a checkpoint was made by. Bits are promised only where all of it is the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Version of the program.
    pub version: String,
    /// Instruction set that the kernels used.
    pub isa: String,
    /// Types of weights, activations and optimizer state, in words.
    pub dtypes: String,
}

/// The state of a run that is neither weights nor optimizer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps done; the schedule goes on from here.
    pub step: u64,
    /// Micro-batches done.
    pub micro_batches: u64,
    /// Target tokens trained on.
    pub trained_tokens: u64,
    /// Seconds of training before this point.
    pub seconds: f64,
    /// Place in the data.
    pub loader: LoaderState,
    /// Length of metrics.jsonl in bytes.
    pub metrics_bytes: u64,
    /// Step with the lowest validation loss so far.
    pub best_step: Option<u64>,
    /// The lowest validation loss so far, as the bits of the f64 (text could round it).
    pub best_loss_bits: Option<u64>,
    /// Further state of the trainer: random keys, loss scale, windows of running means.
    #[serde(default)]
    pub extra: Map<String, Value>,
}

/// The manifest of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    step: u64,
    about: About,
    files: BTreeMap<String, FileEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileEntry {
    bytes: u64,
    sha256: String,
}

/// A checkpoint that was verified.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The folder with its files.
    pub path: PathBuf,
    /// Its step.
    pub step: u64,
    /// What it was made by.
    pub about: About,
    /// The state of the run.
    pub state: RunState,
    /// Newer checkpoints that were passed over, and why.
    pub passed_over: Vec<String>,
}

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    /// The checkpoints in this folder, which need not exist yet.
    pub fn new(folder: impl AsRef<Path>) -> Checkpoints {
        Checkpoints { folder: folder.as_ref().to_path_buf() }
    }

    /// The folder of a step.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step}"))
    }

    /// Saves a checkpoint: `write` puts its files into the folder that it is given, `state` is added, then the
    /// whole appears at once. If anything fails, a full disk included, nothing changes.
    pub fn save(
        &self,
        about: &About,
        state: &RunState,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let target = self.path(state.step);
        let folder = AtomicDir::create(&target)?;
        write(folder.path())?;
        write_json(&folder.path().join(STATE), state)?;
        let mut files = BTreeMap::new();
        for name in file_names(folder.path())? {
            let path = folder.path().join(&name);
            let bytes = std::fs::metadata(&path).map_err(|e| Error::file(&path, e))?.len();
            files.insert(name, FileEntry { bytes, sha256: sha256_file(&path)? });
        }
        let manifest = Manifest { format: FORMAT, step: state.step, about: about.clone(), files };
        write_json(&folder.path().join(MANIFEST), &manifest)?;
        folder.commit()?;
        Ok(target)
    }

    /// The steps of which there are checkpoints, whole or not, rising.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::file(&self.folder, e)),
        };
        let mut steps = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Error::file(&self.folder, e))?;
            let name = entry.file_name();
            let number =
                name.to_str().and_then(|name| name.strip_prefix("step-")).and_then(|n| n.parse().ok());
            // "step-007" would be another folder than the one that is meant.
            steps.extend(number.filter(|step| self.path(*step) == entry.path()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest checkpoint whose every file is what was written; `None` if there is no checkpoint at all.
    /// If there are some but none is whole, that is an error: starting afresh must be a person's decision.
    pub fn latest_valid(&self) -> Result<Option<Found>> {
        let mut passed_over = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match self.verify(step) {
                Ok((manifest, state)) => {
                    let (path, about) = (self.path(step), manifest.about);
                    return Ok(Some(Found { path, step, about, state, passed_over }));
                }
                Err(error) => passed_over.push(error.to_string()),
            }
        }
        if passed_over.is_empty() {
            return Ok(None);
        }
        let cause = format!(
            "no checkpoint is whole: {}; move the folder away to start afresh",
            passed_over.join("; ")
        );
        Err(Error::Checkpoint { path: self.folder.clone(), cause })
    }

    /// Checks every file of a checkpoint against its manifest.
    fn verify(&self, step: u64) -> Result<(Manifest, RunState)> {
        let folder = self.path(step);
        let bad = |cause: String| Error::Checkpoint { path: folder.clone(), cause };
        let manifest: Manifest = read_json(&folder.join(MANIFEST))?;
        if manifest.format != FORMAT {
            return Err(bad(format!("has format {}, this version reads format {FORMAT}", manifest.format)));
        }
        if manifest.step != step {
            return Err(bad(format!("says that it is step {}", manifest.step)));
        }
        for (name, entry) in &manifest.files {
            let path = folder.join(name);
            let inside =
                Path::new(name).components().all(|part| matches!(part, std::path::Component::Normal(_)));
            if !inside {
                return Err(bad(format!("names a file outside of itself: {name:?}")));
            }
            let bytes = std::fs::metadata(&path).map_err(|e| Error::file(&path, e))?.len();
            if bytes != entry.bytes {
                return Err(bad(format!("{name} has {bytes} bytes, {} were written", entry.bytes)));
            }
            if sha256_file(&path)? != entry.sha256 {
                return Err(bad(format!("{name} is not what was written (its hash differs)")));
            }
        }
        if !manifest.files.contains_key(STATE) {
            return Err(bad(format!("has no {STATE}")));
        }
        let state: RunState = read_json(&folder.join(STATE))?;
        Ok((manifest, state))
    }

    /// Removes all checkpoints up to step `now` but the newest `last` of them and the one of step `best`, and what
    /// crashes left behind. Later ones are of steps that the run, having passed them over, takes again.
    pub fn prune(&self, last: usize, now: u64, best: Option<u64>) -> Result<()> {
        if !self.folder.exists() {
            return Ok(());
        }
        remove_leftovers(&self.folder, std::time::Duration::ZERO)?;
        let mut steps = self.steps()?;
        steps.retain(|&step| step <= now);
        let old = steps.len().saturating_sub(last.max(1));
        for &step in steps[..old].iter().filter(|step| Some(**step) != best) {
            let path = self.path(step);
            // Without its manifest it is no checkpoint any more, so a crash half-way leaves no damaged one.
            let manifest = path.join(MANIFEST);
            match std::fs::remove_file(&manifest) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::file(&manifest, e)),
                _ => std::fs::remove_dir_all(&path).map_err(|e| Error::file(&path, e))?,
            }
        }
        Ok(())
    }
}

/// Names of all files below a folder, with `/` between parts.
fn file_names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))? {
        let entry = entry.map_err(|e| Error::file(folder, e))?;
        let name = entry.file_name().into_string().map_err(|name| Error::Checkpoint {
            path: folder.into(),
            cause: format!("the file name {name:?} is no text"),
        })?;
        if entry.path().is_dir() {
            names.extend(file_names(&entry.path())?.into_iter().map(|inner| format!("{name}/{inner}")));
        } else {
            names.push(name);
        }
    }
    Ok(names)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let broken = |e: serde_json::Error| Error::Checkpoint { path: path.into(), cause: e.to_string() };
    let text = serde_json::to_string_pretty(value).map_err(broken)?;
    std::fs::write(path, text + "\n").map_err(|e| Error::file(path, e))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Checkpoint { path: path.into(), cause: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About { version: "0.1.0".into(), isa: "avx512".into(), dtypes: "weights bf16".into() }
    }

    fn state(step: u64) -> RunState {
        let mut extra = Map::new();
        extra.insert("key".into(), Value::from(u64::MAX));
        RunState {
            step,
            metrics_bytes: step * 10,
            best_loss_bits: Some(0.1f64.to_bits()),
            extra,
            ..RunState::default()
        }
    }

    fn save(checkpoints: &Checkpoints, step: u64) -> PathBuf {
        let write = |folder: &Path| {
            std::fs::create_dir(folder.join("inner")).unwrap();
            std::fs::write(folder.join("weights"), vec![step as u8; 5000]).unwrap();
            std::fs::write(folder.join("inner/more"), "x").unwrap();
            Ok(())
        };
        checkpoints.save(&about(), &state(step), write).unwrap()
    }

    #[test]
    fn the_newest_whole_one_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path().join("checkpoints"));
        assert_eq!(checkpoints.latest_valid().unwrap(), None);
        save(&checkpoints, 9);
        save(&checkpoints, 100);
        let found = checkpoints.latest_valid().unwrap().unwrap();
        assert_eq!(
            (found.step, found.state, found.about, found.passed_over.len()),
            (100, state(100), about(), 0)
        );
        assert_eq!(std::fs::read(found.path.join("weights")).unwrap(), vec![100; 5000]);
    }

    #[test]
    fn every_kind_of_damage_is_noticed() {
        let flip = |path: &Path| {
            let mut bytes = std::fs::read(path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(path, bytes).unwrap();
        };
        let damages: [(&str, &dyn Fn(&Path)); 7] = [
            ("a flipped bit", &|path| flip(&path.join("weights"))),
            ("a flipped bit in a folder inside", &|path| flip(&path.join("inner/more"))),
            ("a flipped bit in the state", &|path| flip(&path.join(STATE))),
            ("a cut file", &|path| std::fs::write(path.join("weights"), [0; 10]).unwrap()),
            ("a lost file", &|path| std::fs::remove_file(path.join("weights")).unwrap()),
            ("a lost manifest", &|path| std::fs::remove_file(path.join(MANIFEST)).unwrap()),
            ("a cut manifest", &|path| std::fs::write(path.join(MANIFEST), "{\"format\": 1").unwrap()),
        ];
        for (name, damage) in damages {
            let folder = tempfile::tempdir().unwrap();
            let checkpoints = Checkpoints::new(folder.path());
            save(&checkpoints, 1);
            damage(&save(&checkpoints, 2));
            let found = checkpoints.latest_valid().unwrap().unwrap();
            assert_eq!((found.step, found.passed_over.len()), (1, 1), "{name}");
            damage(&checkpoints.path(1));
            assert!(
                checkpoints.latest_valid().unwrap_err().to_string().contains("no checkpoint is whole"),
                "{name}"
            );
        }
    }

    #[test]
    fn a_failed_save_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        save(&checkpoints, 1);
        let full = |folder: &Path| {
            std::fs::write(folder.join("weights"), "half").unwrap();
            std::fs::write("/dev/full", "x").map_err(|e| Error::file(folder, e))
        };
        if Path::new("/dev/full").exists() {
            for step in [1, 2] {
                let error = checkpoints.save(&about(), &state(step), full).unwrap_err();
                assert!(matches!(error, Error::DiskFull { .. }), "{error}");
            }
        }
        assert_eq!(checkpoints.steps().unwrap(), [1]);
        assert_eq!(checkpoints.latest_valid().unwrap().unwrap().step, 1);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
    }

    #[test]
    fn saving_a_step_again_replaces_it() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        save(&checkpoints, 1);
        checkpoints
            .save(&about(), &state(1), |folder| {
                std::fs::write(folder.join("other"), "y").map_err(|e| Error::file(folder, e))
            })
            .unwrap();
        let found = checkpoints.latest_valid().unwrap().unwrap();
        assert!(found.path.join("other").exists() && !found.path.join("weights").exists());
    }

    #[test]
    fn pruning_keeps_the_last_and_the_best() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        checkpoints.prune(2, 40, None).unwrap();
        for step in [10, 20, 30, 40] {
            save(&checkpoints, step);
        }
        std::fs::create_dir(folder.path().join("step-007")).unwrap();
        std::fs::create_dir(folder.path().join("notes")).unwrap();
        checkpoints.prune(2, 40, Some(10)).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [10, 30, 40]);
        checkpoints.prune(1, 30, Some(10)).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [10, 30, 40], "step 40 is yet to come");
        checkpoints.prune(0, 40, None).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [40]);
        assert!(folder.path().join("notes").exists());
    }
}
