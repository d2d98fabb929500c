//! Which samples form a batch, and the batch itself as plain vectors.
//!
//! A batch is `rows × length` positions. A row holds one sample, or several one after another (packing),
//! each with positions that restart at 0 and a segment of its own, to which attention, short
//! convolutions and recurrent states must keep. What is left of a row is padding: never a target, and
//! outside every segment.
//!
//! Targets are already shifted: `targets[t]` is the token that follows position t, or [`IGNORE`]. The last
//! token of a sample has no position of its own, since nothing is predicted from it.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::sample::Sample;

/// The target of positions at which nothing is learnt (PyTorch's number for it).
pub const IGNORE: i32 = -100;

/// A batch of tokens; all vectors are row-major `[rows, length]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Number of rows.
    pub rows: usize,
    /// Positions of each row.
    pub length: usize,
    /// Input tokens; padding holds token 0.
    pub tokens: Vec<u32>,
    /// The token after each position, or [`IGNORE`].
    pub targets: Vec<i32>,
    /// Position of each token in its own sample.
    pub positions: Vec<u32>,
    /// For each row, where its samples are; what is in none of them is padding.
    pub segments: Vec<Vec<Range<usize>>>,
    /// Number of targets that are not [`IGNORE`].
    pub labelled: usize,
}

impl Batch {
    /// Lays out rows of samples, one after another in a row. Every row must fit `length`.
    pub fn assemble(rows: &[Vec<&Sample>], length: usize) -> Batch {
        let size = rows.len() * length;
        let mut batch = Batch {
            rows: rows.len(),
            length,
            tokens: vec![0; size],
            targets: vec![IGNORE; size],
            positions: vec![0; size],
            segments: Vec::with_capacity(rows.len()),
            labelled: 0,
        };
        for (r, samples) in rows.iter().enumerate() {
            let (mut at, mut segments) = (0, Vec::with_capacity(samples.len()));
            for sample in samples {
                let count = sample.positions();
                for i in 0..count {
                    let p = r * length + at + i;
                    batch.tokens[p] = sample.tokens[i];
                    batch.positions[p] = i as u32;
                    if sample.targets[i + 1] {
                        batch.targets[p] = sample.tokens[i + 1] as i32;
                        batch.labelled += 1;
                    }
                }
                segments.push(at..at + count);
                at += count;
            }
            batch.segments.push(segments);
        }
        batch
    }

    /// The number of each position's segment within its row, −1 for padding: `[rows, length]`.
    pub fn segment_ids(&self) -> Vec<i32> {
        let mut ids = vec![-1; self.rows * self.length];
        for (r, segments) in self.segments.iter().enumerate() {
            for (s, segment) in segments.iter().enumerate() {
                ids[r * self.length..][segment.clone()].fill(s as i32);
            }
        }
        ids
    }

    /// Bytes of its vectors.
    pub fn bytes(&self) -> usize {
        let segments: usize = self.segments.iter().map(Vec::len).sum();
        size_of_val(&self.tokens[..])
            + size_of_val(&self.targets[..])
            + size_of_val(&self.positions[..])
            + segments * size_of::<Range<usize>>()
            + size_of_val(&self.segments[..])
    }

    /// Positions that hold a token of a sample.
    pub fn filled(&self) -> usize {
        self.segments.iter().flatten().map(Range::len).sum()
    }

    /// Whether every row is one sample from position 0 on, so that plain causal attention is right.
    pub fn is_plain(&self) -> bool {
        self.segments.iter().all(|segments| segments.len() <= 1)
    }
}

/// How samples are gathered into rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gather {
    /// One sample a row, in the order in which they come.
    Plain,
    /// One sample a row, together with others of about its length.
    Buckets,
    /// As many samples a row as fit, the fullest rows first found (best fit decreasing).
    Packed,
}

/// Lengths to which rows are padded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lengths {
    /// Multiples of a number (`--bucket-size`; 1 pads to the longest row only).
    Multiple(usize),
    /// The smallest of these that fits (`--bucket-sizes`), or the maximum where none does.
    List(Vec<usize>),
}

/// How batches are formed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Rows of a full batch.
    pub rows: usize,
    /// Most positions of a row.
    pub max_length: usize,
    /// How samples share rows and batches.
    pub gather: Gather,
    /// To what lengths rows are padded.
    pub lengths: Lengths,
}

/// The samples of one batch, row by row, as numbers into the pool that was planned.
pub type Plan = Vec<Vec<usize>>;

impl Shape {
    /// The padded length of a batch whose longest row has this many positions.
    pub fn padded(&self, positions: usize) -> usize {
        let length = match &self.lengths {
            Lengths::Multiple(step) => positions.next_multiple_of((*step).max(1)),
            Lengths::List(list) => {
                list.iter().copied().filter(|&l| l >= positions).min().unwrap_or(self.max_length)
            }
        };
        length.min(self.max_length).max(positions)
    }

    /// Divides a pool of samples, given by their positions, into batches.
    ///
    /// Unless this is the `last` pool of an epoch, only full batches are formed, and the second result
    /// lists the samples that must come again with the next pool. Every sample is in exactly one place.
    pub fn plan(&self, pool: &[usize], last: bool) -> (Vec<Plan>, Vec<usize>) {
        let rows = match self.gather {
            Gather::Plain => (0..pool.len()).map(|i| vec![i]).collect(),
            Gather::Buckets => return self.plan_buckets(pool, last),
            Gather::Packed => pack(pool, self.max_length),
        };
        let full = if last { rows.len() } else { rows.len() / self.rows * self.rows };
        let mut rest: Vec<usize> = rows[full..].iter().flatten().copied().collect();
        rest.sort_unstable();
        (rows[..full].chunks(self.rows).map(<[Vec<usize>]>::to_vec).collect(), rest)
    }

    /// Full batches within each bucket; at the end of an epoch the rests of all buckets are joined, the
    /// longest first, so that an epoch has ⌈samples / rows⌉ batches.
    fn plan_buckets(&self, pool: &[usize], last: bool) -> (Vec<Plan>, Vec<usize>) {
        let mut buckets = std::collections::BTreeMap::<usize, Vec<usize>>::new();
        for (i, &positions) in pool.iter().enumerate() {
            buckets.entry(self.padded(positions)).or_default().push(i);
        }
        let batch = |samples: &[usize]| samples.iter().map(|&i| vec![i]).collect::<Plan>();
        let (mut plans, mut rest) = (Vec::new(), Vec::new());
        for samples in buckets.values().rev() {
            let chunks = samples.chunks_exact(self.rows);
            rest.extend_from_slice(chunks.remainder());
            plans.extend(chunks.map(batch));
        }
        if last {
            plans.extend(rest.chunks(self.rows).map(batch));
            rest.clear();
        }
        rest.sort_unstable();
        (plans, rest)
    }
}

/// Best fit decreasing: the longest sample first, each into the fullest row that has room for it.
/// Rows come fullest first. Within 11/9 of the fewest possible rows (Johnson 1973).
fn pack(pool: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..pool.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(pool[i]), i));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut room: BTreeSet<(usize, usize)> = BTreeSet::new();
    for i in order {
        let need = pool[i];
        let found = room.range((need, 0)..).next().copied();
        let (free, row) = found.unwrap_or_else(|| {
            rows.push(Vec::new());
            (capacity.max(need), rows.len() - 1)
        });
        room.remove(&(free, row));
        rows[row].push(i);
        room.insert((free - need, row));
    }
    room.into_iter().map(|(_, row)| std::mem::take(&mut rows[row])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(first: u32, targets: &str) -> Sample {
        let targets: Vec<bool> = targets.chars().map(|c| c == '^').collect();
        Sample { tokens: (first..).take(targets.len()).collect(), targets }
    }

    fn shape(rows: usize, max_length: usize, gather: Gather, lengths: Lengths) -> Shape {
        Shape { rows, max_length, gather, lengths }
    }

    #[test]
    fn rows_are_laid_out_shifted_and_isolated() {
        let (a, b, c) = (sample(10, ".^.^"), sample(20, "..^"), sample(30, ".^"));
        let batch = Batch::assemble(&[vec![&a, &b], vec![&c]], 6);
        let x = IGNORE;
        assert_eq!(batch.tokens, [10, 11, 12, 20, 21, 0, 30, 0, 0, 0, 0, 0]);
        assert_eq!(batch.targets, [11, x, 13, x, 22, x, 31, x, x, x, x, x]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(batch.segment_ids(), [0, 0, 0, 1, 1, -1, 0, -1, -1, -1, -1, -1]);
        assert_eq!((batch.labelled, batch.filled(), batch.is_plain()), (4, 6, false));
    }

    #[test]
    fn lengths_are_padded_and_capped() {
        let multiple = |step| shape(4, 200, Gather::Plain, Lengths::Multiple(step));
        let list = shape(4, 600, Gather::Plain, Lengths::List(vec![512, 256, 384]));
        let cases = [
            ("multiple of 64", multiple(64), 65, 128),
            ("exact multiple", multiple(64), 128, 128),
            ("capped", multiple(64), 193, 200),
            ("no padding", multiple(1), 77, 77),
            ("list", list.clone(), 257, 384),
            ("list, beyond", list.clone(), 513, 600),
            ("list, exact", list, 256, 256),
        ];
        for (name, shape, positions, expected) in cases {
            assert_eq!(shape.padded(positions), expected, "{name}");
        }
    }

    #[test]
    fn packing_fills_rows() {
        let rows = pack(&[6, 5, 4, 3, 2], 10);
        assert_eq!(rows, [vec![0, 2], vec![1, 3, 4]]);
    }

    #[test]
    fn buckets_hold_samples_of_one_length_until_the_rest() {
        let shape = shape(2, 256, Gather::Buckets, Lengths::Multiple(64));
        let pool = [10, 100, 200, 60, 64, 120, 20];
        let (plans, rest) = shape.plan(&pool, false);
        assert_eq!(
            (plans, rest),
            (vec![vec![vec![1], vec![5]], vec![vec![0], vec![3]], vec![vec![4], vec![6]]], vec![2])
        );
        assert_eq!(shape.plan(&pool, true).0.len(), 4);
    }

    fn gathers() -> impl Strategy<Value = Gather> {
        prop_oneof![Just(Gather::Plain), Just(Gather::Buckets), Just(Gather::Packed)]
    }

    proptest! {
        /// Every sample is in one batch or in the rest, rows fit, and only the end has a short batch.
        #[test]
        fn plans_lose_and_repeat_nothing(
            pool in proptest::collection::vec(1usize..=96, 0..200),
            rows in 1usize..9,
            gather in gathers(),
            last in any::<bool>(),
        ) {
            let shape = shape(rows, 96, gather, Lengths::Multiple(16));
            let (plans, rest) = shape.plan(&pool, last);
            let mut seen: Vec<usize> = plans.iter().flatten().flatten().copied().chain(rest.iter().copied()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..pool.len()).collect::<Vec<_>>());
            prop_assert!(!last || rest.is_empty());
            for plan in &plans {
                prop_assert!(!plan.is_empty() && plan.len() <= rows);
                prop_assert!(last || plan.len() == rows);
                for row in plan {
                    prop_assert!(!row.is_empty());
                    prop_assert!(row.iter().map(|&i| pool[i]).sum::<usize>() <= 96);
                }
            }
            if last && gather != Gather::Packed {
                prop_assert_eq!(plans.len(), pool.len().div_ceil(rows));
            }
            if last && gather == Gather::Packed {
                let used: usize = plans.iter().map(Vec::len).sum();
                let fewest = pool.iter().sum::<usize>().div_ceil(96);
                // No two rows would fit into one.
                prop_assert!(used <= 2 * fewest, "{} rows for at least {}", used, fewest);
            }
        }

        /// A packed batch holds the same (input, target, position) triples as the samples alone.
        #[test]
        fn packing_changes_no_target(lengths in proptest::collection::vec(2usize..30, 1..30)) {
            let samples: Vec<Sample> = lengths.iter().enumerate().map(|(i, &n)| Sample {
                tokens: (0..n).map(|t| (i * 100 + t) as u32).collect(),
                targets: (0..n).map(|t| t > 0 && (t + i) % 3 != 0).collect(),
            }).collect();
            let pool: Vec<usize> = samples.iter().map(Sample::positions).collect();
            let triples = |gather| {
                let (plans, _) = shape(4, 64, gather, Lengths::Multiple(8)).plan(&pool, true);
                let mut all = Vec::new();
                for plan in plans {
                    let rows: Vec<Vec<&Sample>> = plan.iter().map(|row| row.iter().map(|&i| &samples[i]).collect()).collect();
                    let batch = Batch::assemble(&rows, 64);
                    let ids = batch.segment_ids();
                    for p in 0..batch.tokens.len() {
                        if ids[p] >= 0 {
                            all.push((batch.tokens[p], batch.targets[p], batch.positions[p]));
                        } else {
                            assert_eq!(batch.targets[p], IGNORE);
                        }
                    }
                }
                all.sort_unstable();
                all
            };
            prop_assert_eq!(triples(Gather::Packed), triples(Gather::Plain));
        }
    }
}
