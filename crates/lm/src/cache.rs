//! What a model remembers of the tokens it has seen: keys and values, convolution states.

use mica_array::kv::{KvCache, KvSpec};
use mica_array::{Array, Result};

/// The memory of a batch of sequences.
#[derive(Debug)]
pub struct Cache {
    /// Keys and values of the attention layers.
    pub kv: KvCache,
    /// The last inputs of each convolution layer: [batch, taps − 1, channels].
    pub conv: Vec<Option<Array>>,
    length: usize,
}

impl Cache {
    /// Empty, for a model with `conv` convolution layers.
    pub fn new(spec: KvSpec, batch: usize, conv: usize) -> Cache {
        Cache { kv: KvCache::new(spec, batch), conv: vec![None; conv], length: 0 }
    }

    /// Positions seen so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Sequences in the batch.
    pub fn batch(&self) -> usize {
        self.kv.batch()
    }

    /// Makes room for `count` positions. Called before a forward pass.
    pub fn reserve(&mut self, count: usize) -> Result<()> {
        self.kv.reserve(count)
    }

    /// Counts the positions of a forward pass.
    pub fn advance(&mut self, count: usize) {
        self.kv.advance(count);
        self.length += count;
    }

    /// Runs a pass; if it fails, the cache is what it was before.
    pub fn attempt<T>(&mut self, pass: impl FnOnce(&mut Cache) -> crate::Result<T>) -> crate::Result<T> {
        let (mark, conv, length) = (self.kv.mark(), self.conv.clone(), self.length);
        let result = pass(self);
        if result.is_err() {
            self.kv.restore(mark);
            (self.conv, self.length) = (conv, length);
        }
        result
    }

    /// A memory of these rows (which may repeat), sharing pages with this one.
    pub fn fork(&self, rows: &[usize]) -> Result<Cache> {
        let indices: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        let indices = Array::from_slice(&indices, &[rows.len()])?;
        let conv =
            self.conv.iter().map(|state| state.as_ref().map(|state| state.take(&indices, 0)).transpose());
        Ok(Cache { kv: self.kv.fork(rows)?, conv: conv.collect::<Result<_>>()?, length: self.length })
    }

    /// What must be evaluated for the cache to be complete.
    pub fn pending(&self) -> Vec<Array> {
        self.kv.pending().into_iter().chain(self.conv.iter().flatten().cloned()).collect()
    }
}
