//! `metrics.jsonl`: one line a step, losses with all their digits.

use std::path::Path;

use mica_io::atomic::Appender;
use serde::Serialize;

use crate::{Error, Result};

/// Its name in the run folder.
pub const METRICS: &str = "metrics.jsonl";

/// The file, open for further lines.
#[derive(Debug)]
pub struct Metrics {
    file: Appender,
}

impl Metrics {
    /// Opens the file. With `bytes`, what was written after that length (by the run that was killed after its
    /// checkpoint) is dropped, so that resumed lines follow the checkpoint's without a gap or a repetition.
    pub fn open(path: impl AsRef<Path>, bytes: Option<u64>) -> Result<Metrics> {
        let file = match bytes {
            Some(bytes) => Appender::resume(path, bytes)?,
            None => Appender::open(path)?,
        };
        Ok(Metrics { file })
    }

    /// Adds a line. Numbers are written with as many digits as bring back the same number; what is not
    /// finite is written as null, which JSON has instead.
    pub fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(line)
            .map_err(|e| Error::Checkpoint { path: self.file.path().into(), cause: e.to_string() })?;
        Ok(self.file.append(&text)?)
    }

    /// Brings the lines to disk and returns the length, for a checkpoint to record.
    pub fn sync(&mut self) -> Result<u64> {
        self.file.sync()?;
        Ok(self.file.len())
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.file.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_resumed_file_is_that_of_an_undisturbed_run() {
        let folder = tempfile::tempdir().unwrap();
        let line = |step: u64| json!({"step": step, "loss": 1.0 / step as f64});
        let undisturbed = folder.path().join("a.jsonl");
        let mut metrics = Metrics::open(&undisturbed, None).unwrap();
        (1..=6).for_each(|step| metrics.write(&line(step)).unwrap());

        let killed = folder.path().join("b.jsonl");
        let mut metrics = Metrics::open(&killed, None).unwrap();
        (1..=3).for_each(|step| metrics.write(&line(step)).unwrap());
        let bytes = metrics.sync().unwrap();
        metrics.write(&line(4)).unwrap();
        drop(metrics);
        let mut torn = std::fs::read(&killed).unwrap();
        torn.extend_from_slice(b"{\"step\": 5, \"lo");
        std::fs::write(&killed, torn).unwrap();
        let mut metrics = Metrics::open(&killed, Some(bytes)).unwrap();
        (4..=6).for_each(|step| metrics.write(&line(step)).unwrap());
        assert_eq!(std::fs::read(&killed).unwrap(), std::fs::read(&undisturbed).unwrap());
    }

    #[test]
    fn lost_lines_are_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Metrics::open(folder.path().join("a.jsonl"), Some(10)).is_err());
    }
}
