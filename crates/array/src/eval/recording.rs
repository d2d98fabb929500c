//! Plans that are kept to be run again: what is noted while one is made, and whether it can be kept.

use std::collections::HashSet;
use std::sync::Arc;

use crate::Array;
use crate::backend::Kept;
use crate::kv::{KvSpec, Page, PagedStep, Sequences};
use crate::memory::{self, Block};
use crate::packed::PackedWeight;
use crate::storage::{Buffer, Storage};

/// What is noted while a plan is made that is to be kept.
#[derive(Default)]
pub(super) struct Recording {
    /// What it reads and does not write.
    read: Vec<triomphe::Arc<Buffer>>,
    /// Where the memory is that it writes.
    written: HashSet<usize>,
    /// The one call that attends over pages: sequences, how many positions each gets, and layers.
    attended: Option<(KvSpec, Sequences, usize, HashSet<usize>)>,
    /// Once it has run.
    kept: Option<(Box<dyn Kept>, Vec<Arc<PackedWeight>>, Vec<Block>)>,
}

/// How a plan attends over pages.
pub(crate) struct Attended {
    pub(crate) kv: KvSpec,
    /// How many sequences there are.
    pub(crate) batch: usize,
    /// Positions that each gets.
    pub(crate) length: usize,
}

/// A plan that has run, with all that running it again takes.
pub(crate) struct Recorded {
    pub(super) plan: Box<dyn Kept>,
    pub(crate) attended: Option<Attended>,
    /// The backend's number.
    pub(super) backend: u64,
    /// The memory that it writes.
    _blocks: Vec<Block>,
    /// The memory that it reads only.
    _read: Vec<triomphe::Arc<Buffer>>,
    _weights: Vec<Arc<PackedWeight>>,
}

/// What became of a plan that was to be kept.
pub(crate) enum Outcome {
    Kept(Recorded),
    /// Of an input or an output there are more handles than the one that is lent, or others have what it writes.
    Shared,
    /// Ops are looked at one by one, there is little memory, there are too many steps, the backend keeps no plans.
    NotKept,
}

impl Recording {
    /// A step of the plan with this number reads this memory. What the plan does not write itself stays as it is.
    pub(super) fn reads(&mut self, buffer: &triomphe::Arc<Buffer>, epoch: u64) {
        if buffer.epoch() != epoch {
            self.read.push(buffer.clone());
        }
    }

    /// A step writes this memory.
    pub(super) fn writes(&mut self, buffer: &Buffer) {
        self.written.insert(buffer.pointer() as usize);
    }

    /// A step attends over pages. Whether all such steps are one call: of the same sequences, in each layer once.
    pub(super) fn attends(&mut self, step: &PagedStep, length: usize) -> bool {
        let new = || (step.kv.clone(), step.sequences.clone(), length, HashSet::new());
        let (kv, sequences, positions, layers) = self.attended.get_or_insert_with(new);
        let same =
            |((pages, start), (others, other)): (&(Vec<Arc<Page>>, usize), &(Vec<Arc<Page>>, usize))| {
                start == other
                    && pages.len() == others.len()
                    && pages.iter().zip(others).all(|(page, other)| Arc::ptr_eq(page, other))
            };
        *kv == step.kv
            && *positions == length
            && sequences.len() == step.sequences.len()
            && sequences.iter().zip(step.sequences.iter()).all(same)
            && layers.insert(step.layer)
    }

    /// The plan has run: with it, what is needed to run it again.
    pub(super) fn keep(&mut self, plan: Box<dyn Kept>, weights: Vec<Arc<PackedWeight>>) {
        self.kept = Some((plan, weights, memory::keep_limbo(&self.written)));
    }

    /// What running the plan again takes, if nobody else sees what it writes or writes what it reads.
    pub(super) fn finish(self, backend: u64, inputs: &[Array], outputs: &[Array]) -> Outcome {
        let Recording { mut read, mut written, attended, kept } = self;
        let Some((plan, weights, blocks)) = kept else { return Outcome::NotKept };
        for block in &blocks {
            written.remove(&(block.pointer() as usize));
        }
        for buffer in outputs.iter().filter_map(own_buffer) {
            written.remove(&(buffer.pointer() as usize));
        }
        read.sort_by_key(|buffer| buffer.as_ptr());
        read.dedup_by_key(|buffer| buffer.as_ptr());
        let all = read.len();
        read.retain(|buffer| !inputs.iter().any(|input| holds(input, buffer)));
        let are_read = read.len() + inputs.len() == all;
        let are_own = inputs.iter().chain(outputs).all(|array| own_buffer(array).is_some());
        if !written.is_empty() || !are_read || !are_own {
            return Outcome::Shared;
        }
        let attended =
            attended.map(|(kv, sequences, length, _)| Attended { kv, batch: sequences.len(), length });
        Outcome::Kept(Recorded { plan, attended, backend, _blocks: blocks, _read: read, _weights: weights })
    }
}

/// The memory of a computed array, if the array has all of it, in order, and no other handle does.
pub(crate) fn own_buffer(array: &Array) -> Option<&triomphe::Arc<Buffer>> {
    match array.node().ready()?.get(array.output())? {
        Storage::Host(host)
            if array.node().is_only()
                && host.buffer.is_unique()
                && host.offset == 0
                && host.is_contiguous(array.shape()) =>
        {
            Some(&host.buffer)
        }
        _ => None,
    }
}

fn holds(array: &Array, buffer: &triomphe::Arc<Buffer>) -> bool {
    let storage = array.node().ready().and_then(|storage| storage.get(array.output()));
    matches!(storage, Some(Storage::Host(host)) if triomphe::Arc::ptr_eq(&host.buffer, buffer))
}
