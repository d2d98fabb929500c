//! Samples by row number: all of them tokenized in memory, or tokenized when they are asked for.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::encode::Encode;
use super::read::{BadLines, Source};
use super::sample::{Rules, Sample, Sampler, Totals};
use crate::rng::Rng;
use crate::{Error, Result};

/// A list of rows, each of which gives samples: one as a rule, several if it was split, none if it was
/// passed over. Asking twice gives the same.
pub trait Samples: Send + Sync {
    /// Number of rows.
    fn len(&self) -> usize;

    /// Whether there are no rows.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The samples of a row (`0..len`).
    fn row(&self, row: usize) -> Result<Vec<Sample>>;

    /// A hash over the content (data and rules), by which a resumed run notices that it changed.
    fn fingerprint(&self) -> String;
}

/// Samples in memory: 4 bytes a token and one bit a target.
#[derive(Clone, Debug, Default)]
pub struct InMemory {
    tokens: Vec<u32>,
    targets: Vec<u64>,
    /// Where each sample ends in `tokens`.
    ends: Vec<usize>,
    fingerprint: String,
}

impl InMemory {
    /// Reads and tokenizes every record of the sources.
    ///
    /// `progress` is told (rows done, rows in all) now and then. Bad lines go to `bad`.
    pub fn tokenize(
        sources: &[Source],
        sampler: &Sampler<'_>,
        bad: &mut BadLines,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(InMemory, Totals)> {
        let mut samples =
            InMemory { fingerprint: fingerprint(sources, sampler.rules()), ..InMemory::default() };
        let mut totals = Totals::default();
        let rows = sources.iter().map(Source::len).sum();
        let mut done = 0usize;
        for source in sources {
            for i in 0..source.len() {
                match read_row(source, i, sampler, &mut totals) {
                    Ok(row) => row.iter().for_each(|sample| samples.push(sample)),
                    Err(error) => {
                        bad.forgive(error)?;
                        totals.bad_lines += 1;
                    }
                }
                done += 1;
                if done.is_multiple_of(256) || done == rows {
                    progress(done, rows);
                }
            }
        }
        Ok((samples, totals))
    }

    /// Samples made elsewhere; `fingerprint` names their content.
    pub fn from_samples(samples: &[Sample], fingerprint: &str) -> InMemory {
        let mut all = InMemory { fingerprint: fingerprint.into(), ..InMemory::default() };
        samples.iter().for_each(|sample| all.push(sample));
        all
    }

    fn push(&mut self, sample: &Sample) {
        for (&token, &target) in sample.tokens.iter().zip(&sample.targets) {
            let at = self.tokens.len();
            if at.is_multiple_of(64) {
                self.targets.push(0);
            }
            self.targets[at / 64] |= u64::from(target) << (at % 64);
            self.tokens.push(token);
        }
        self.ends.push(self.tokens.len());
    }

    fn get(&self, index: usize) -> Sample {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        let range = start..self.ends[index];
        let targets = range.clone().map(|at| self.targets[at / 64] >> (at % 64) & 1 == 1).collect();
        Sample { tokens: self.tokens[range].to_vec(), targets }
    }

    /// Divides the samples at random (by `seed`) into those to train on and `count` held-out ones, both in
    /// their original order. Equal samples stay on one side, so that nothing is validated on a row that
    /// is trained on; because of that, `count` may be missed by some.
    pub fn hold_out(&self, count: usize, seed: u64) -> (InMemory, InMemory) {
        let total = self.ends.len();
        let count = count.min(total.saturating_sub(1));
        let samples: Vec<Sample> = (0..total).map(|i| self.get(i)).collect();
        let mut groups = std::collections::HashMap::<&Sample, Vec<usize>>::new();
        for (i, sample) in samples.iter().enumerate() {
            groups.entry(sample).or_default().push(i);
        }
        let mut order: Vec<usize> = (0..total).collect();
        Rng::new(seed, &[HOLD_OUT]).shuffle(&mut order);
        let mut held = vec![false; total];
        let mut taken = 0;
        for i in order {
            let group = &groups[&samples[i]];
            if !held[i] && taken + group.len() <= count {
                group.iter().for_each(|&member| held[member] = true);
                taken += group.len();
            }
        }
        let side = |which: bool, name: &str| {
            let mut part = InMemory {
                fingerprint: format!("{}/{name}-{count}-{seed}", self.fingerprint),
                ..InMemory::default()
            };
            samples
                .iter()
                .zip(&held)
                .filter(|(_, held)| **held == which)
                .for_each(|(sample, _)| part.push(sample));
            part
        };
        (side(false, "train"), side(true, "held-out"))
    }
}

/// Names the random stream of [`InMemory::hold_out`].
const HOLD_OUT: u64 = 0x68_6f6c_6465_6e00;

impl Samples for InMemory {
    fn len(&self) -> usize {
        self.ends.len()
    }

    fn row(&self, row: usize) -> Result<Vec<Sample>> {
        Ok(vec![self.get(row)])
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}

/// Samples that are read and tokenized each time, for files larger than memory.
pub struct Streamed {
    sources: Vec<Source>,
    starts: Vec<usize>,
    encode: Arc<dyn Encode>,
    rules: Rules,
    bad: Mutex<BadLines>,
    fingerprint: String,
}

impl Streamed {
    /// Rows of these sources, one source after another.
    pub fn new(sources: Vec<Source>, encode: Arc<dyn Encode>, rules: Rules, bad: BadLines) -> Streamed {
        let mut starts = vec![0];
        starts.extend(sources.iter().scan(0, |sum, source| {
            *sum += source.len();
            Some(*sum)
        }));
        let fingerprint = fingerprint(&sources, &rules);
        Streamed { sources, starts, encode, rules, bad: Mutex::new(bad), fingerprint }
    }
}

impl Samples for Streamed {
    fn len(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    fn row(&self, row: usize) -> Result<Vec<Sample>> {
        let source = self.starts.partition_point(|&start| start <= row) - 1;
        let sampler = Sampler::new(&*self.encode, self.rules.clone());
        let read =
            read_row(&self.sources[source], row - self.starts[source], &sampler, &mut Totals::default());
        read.or_else(|error| {
            // A poisoned lock means a panic elsewhere; the list of bad lines is still whole.
            self.bad.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).forgive(error)?;
            Ok(Vec::new())
        })
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}

fn read_row(source: &Source, i: usize, sampler: &Sampler<'_>, totals: &mut Totals) -> Result<Vec<Sample>> {
    let record = source.record(i)?;
    sampler.samples(&record, totals).map_err(|cause| Error::BadLine {
        path: PathBuf::from(source.path()),
        line: source.line(i),
        column: None,
        cause,
    })
}

fn fingerprint(sources: &[Source], rules: &Rules) -> String {
    let mut hash = Sha256::new();
    for source in sources {
        hash.update(source.sha256());
    }
    hash.update(serde_json::to_string(rules).unwrap_or_default());
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::encode::ByteEncoder;
    use crate::data::format::Columns;

    fn open(folder: &std::path::Path, name: &str, lines: &[&str]) -> Source {
        let path = folder.join(name);
        std::fs::write(&path, lines.join("\n")).unwrap();
        Source::open(path, &Columns::default()).unwrap()
    }

    #[test]
    fn in_memory_and_streamed_rows_agree() {
        let folder = tempfile::tempdir().unwrap();
        let sources = || {
            vec![
                open(folder.path(), "a.jsonl", &["{\"text\": \"abc\"}", "oops", "{\"text\": \"\"}"]),
                open(
                    folder.path(),
                    "b.jsonl",
                    &[
                        "{\"prompt\": \"d\", \"completion\": \"e\"}",
                        "{\"prompt\": \"f\", \"completion\": \"gh\"}",
                    ],
                ),
            ]
        };
        let rules = Rules::train(8, false);
        let sampler = Sampler::new(&ByteEncoder, rules.clone());
        let mut calls = Vec::new();
        let (memory, totals) =
            InMemory::tokenize(&sources(), &sampler, &mut BadLines::allow(1), &mut |done, all| {
                calls.push((done, all))
            })
            .unwrap();
        assert_eq!(calls, [(5, 5)]);
        assert_eq!((totals.rows, totals.samples, totals.bad_lines, totals.unlabelled_rows), (4, 3, 1, 1));
        let streamed = Streamed::new(sources(), Arc::new(ByteEncoder), rules, BadLines::allow(1));
        let flat = |samples: &dyn Samples| {
            (0..samples.len()).flat_map(|i| samples.row(i).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(flat(&memory), flat(&streamed));
        assert_eq!(memory.fingerprint(), streamed.fingerprint());
        let error =
            InMemory::tokenize(&sources(), &sampler, &mut BadLines::allow(0), &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("a.jsonl, line 2"), "{error}");
    }

    #[test]
    fn held_out_rows_are_disjoint_and_repeatable() {
        let sample =
            |i: u32| Sample { tokens: vec![i % 40, 1, 2], targets: vec![false, true, i.is_multiple_of(2)] };
        let all = InMemory::from_samples(&(0..100).map(sample).collect::<Vec<_>>(), "x");
        let (train, held) = all.hold_out(20, 5);
        let list = |part: &InMemory| (0..part.len()).map(|i| part.get(i)).collect::<Vec<_>>();
        assert_eq!(train.len() + held.len(), 100);
        assert!(held.len() >= 18 && held.len() <= 20, "{}", held.len());
        assert!(list(&held).iter().all(|sample| !list(&train).contains(sample)));
        assert_eq!(list(&all.hold_out(20, 5).1), list(&held));
        assert_ne!(list(&all.hold_out(20, 6).1), list(&held));
        assert_ne!(train.fingerprint(), held.fingerprint());
        let same = InMemory::from_samples(&vec![sample(1); 4], "x");
        assert_eq!(same.hold_out(2, 0).1.len(), 0);
    }
}
