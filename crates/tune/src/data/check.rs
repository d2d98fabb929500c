//! What `mica data check` finds: bad lines, duplicates, rows that are in two splits, and what would be cut.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::format::Form;
use super::read::{Source, Splits};
use super::sample::{Sampler, Totals};
use crate::{Error, Result};

/// A place in a data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The line, counted from 1.
    pub line: u64,
}

/// What was found in one split.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SplitReport {
    /// The files with their forms.
    pub files: Vec<(PathBuf, Option<Form>)>,
    /// Sums over its rows.
    pub totals: Totals,
    /// Messages about bad lines, at most [`SHOWN`] of them; `totals.bad_lines` counts all.
    pub bad: Vec<String>,
    /// Rows that say the same as an earlier row of this split.
    pub duplicates: usize,
    /// Some of them: (the earlier place, the later one).
    pub duplicate_places: Vec<(Place, Place)>,
    /// Tokens of the median sample, of the 95th percentile, and of the longest.
    pub lengths: [usize; 3],
}

/// What was found in all.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Training data.
    pub train: SplitReport,
    /// Validation data.
    pub valid: SplitReport,
    /// Test data.
    pub test: SplitReport,
    /// Rows of the validation or test data that are also in the training data.
    pub leaked: usize,
    /// Some of them: (in the training data, in the other).
    pub leaked_places: Vec<(Place, Place)>,
}

/// How many examples of each finding are listed.
pub const SHOWN: usize = 20;

impl Report {
    /// Whether a run on this data would stop at its first bad line.
    pub fn is_clean(&self) -> bool {
        [&self.train, &self.valid, &self.test].iter().all(|split| split.totals.bad_lines == 0)
    }
}

/// The hash of a row's samples, and the place (number of the file, line) of the first row that has it.
type Seen = HashMap<[u8; 16], (usize, u64)>;

/// Reads and tokenizes every row of all splits. Rows count as the same if their tokens and targets are.
pub fn check(splits: &Splits, sampler: &Sampler<'_>) -> Result<Report> {
    let (train, seen) = check_split(&splits.train, sampler)?;
    let mut report = Report { train, ..Report::default() };
    for (sources, slot) in [(&splits.valid, &mut report.valid), (&splits.test, &mut report.test)] {
        let (found, others) = check_split(sources, sampler)?;
        *slot = found;
        let mut leaks: Vec<_> =
            others.iter().filter_map(|(key, other)| Some((*seen.get(key)?, *other))).collect();
        leaks.sort_unstable();
        report.leaked += leaks.len();
        for (first, second) in leaks {
            if report.leaked_places.len() < SHOWN {
                report.leaked_places.push((place(&splits.train, first), place(sources, second)));
            }
        }
    }
    Ok(report)
}

fn place(sources: &[Source], (file, line): (usize, u64)) -> Place {
    Place { path: sources[file].path().into(), line }
}

fn check_split(sources: &[Source], sampler: &Sampler<'_>) -> Result<(SplitReport, Seen)> {
    let mut report = SplitReport::default();
    let (mut seen, mut lengths) = (Seen::new(), Vec::new());
    for (file, source) in sources.iter().enumerate() {
        report.files.push((source.path().into(), Some(source.form())));
        for row in 0..source.len() {
            let line = source.line(row);
            let read = source.record(row).and_then(|record| {
                let bad = |cause| Error::BadLine { path: source.path().into(), line, column: None, cause };
                sampler.samples(&record, &mut report.totals).map_err(bad)
            });
            let samples = match read {
                Ok(samples) => samples,
                Err(error @ Error::BadLine { .. }) => {
                    report.totals.bad_lines += 1;
                    if report.bad.len() < SHOWN {
                        report.bad.push(error.to_string());
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if samples.is_empty() {
                continue;
            }
            let mut hash = Sha256::new();
            for sample in &samples {
                lengths.push(sample.tokens.len());
                for (token, &target) in sample.tokens.iter().zip(&sample.targets) {
                    hash.update(token.to_le_bytes());
                    hash.update([u8::from(target)]);
                }
            }
            let mut key = [0; 16];
            key.copy_from_slice(&hash.finalize()[..16]);
            match seen.get(&key) {
                None => {
                    seen.insert(key, (file, line));
                }
                Some(&first) => {
                    report.duplicates += 1;
                    if report.duplicate_places.len() < SHOWN {
                        report.duplicate_places.push((place(sources, first), place(sources, (file, line))));
                    }
                }
            }
        }
    }
    lengths.sort_unstable();
    let at = |share: f64| {
        lengths.get(((lengths.len() as f64 * share) as usize).min(lengths.len().saturating_sub(1)))
    };
    report.lengths = [0.5, 0.95, 1.0].map(|share| at(share).copied().unwrap_or(0));
    Ok((report, seen))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::encode::ByteEncoder;
    use crate::data::format::Columns;
    use crate::data::sample::Rules;

    #[test]
    fn everything_that_is_wrong_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, lines: &[&str]| std::fs::write(folder.path().join(name), lines.join("\n")).unwrap();
        write(
            "train.jsonl",
            &["{\"text\": \"abc\"}", "{\"text\": \"long text\"}", "{oops", "{\"text\": \"abc\"}"],
        );
        write("valid.jsonl", &["{\"text\": \"new\"}", "{\"text\": \"long text\"}"]);
        let splits = Splits::open(folder.path(), &Columns::default()).unwrap();
        let report = check(&splits, &Sampler::new(&ByteEncoder, Rules::train(6, false))).unwrap();
        assert!(!report.is_clean());
        assert_eq!(
            (report.train.totals.rows, report.train.totals.bad_lines, report.train.totals.cut_rows),
            (3, 1, 1)
        );
        assert!(report.train.bad[0].contains("train.jsonl, line 3, column 2"), "{:?}", report.train.bad);
        assert_eq!((report.train.duplicates, report.leaked), (1, 1));
        let lines =
            |places: &[(Place, Place)]| places.iter().map(|(a, b)| (a.line, b.line)).collect::<Vec<_>>();
        assert_eq!(lines(&report.train.duplicate_places), [(1, 4)]);
        assert_eq!(lines(&report.leaked_places), [(2, 2)]);
        assert_eq!(report.train.lengths, [4, 6, 6]);
        assert_eq!(report.test, SplitReport::default());
    }
}
