//! The paged store of keys and values: growing state that is not a growing array.
//!
//! A page holds [`PAGE`] positions of one sequence for every layer. A sequence is a list of pages
//! and a length; forking one copies the list and shares the pages, of which only the last, partial
//! one is copied when it is written again. [`KvCache::attend`] is the op that appends to the store
//! and attends over it; a token array that each call takes and gives orders the calls that write
//! the same sequences, whatever else they depend on.

use std::sync::{Arc, OnceLock};

use mica_kernels::attention::PageShape;
pub use mica_kernels::attention::{Codes as KvCodes, PageFormat as KvFormat};
use smallvec::smallvec;

use crate::op::{Op, Precision, first_failure};
use crate::storage::{Buffer, Spec};
use crate::{Array, Dtype, Error, Result};

/// Positions in a page: one attention block.
pub const PAGE: usize = mica_kernels::attention::BLOCK;

/// Sizes of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvSpec {
    /// Layers that keep keys and values.
    pub layers: usize,
    /// Key and value heads per layer.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What numbers are kept in.
    pub format: KvFormat,
}

impl KvSpec {
    /// What the kernels call a page of this store in one layer.
    pub(crate) fn page_shape(&self) -> PageShape {
        PageShape {
            kv_heads: self.kv_heads,
            key_dim: self.head_dim,
            value_dim: self.head_dim,
            format: self.format,
        }
    }

    /// Bytes of the keys (or of the values) of one page in one layer.
    fn side_bytes(&self) -> usize {
        let shape = self.page_shape();
        shape.key_bytes().max(shape.value_bytes()).next_multiple_of(64)
    }

    /// Bytes that a position takes in all layers.
    pub fn bytes_per_position(&self) -> usize {
        let shape = self.page_shape();
        self.layers * (shape.key_bytes() + shape.value_bytes()) / PAGE
    }
}

/// [`PAGE`] positions of one sequence. A layer's memory comes with its first write.
#[derive(Debug)]
pub struct Page {
    layers: Vec<OnceLock<Buffer>>,
    side_bytes: usize,
}

impl Page {
    fn new(spec: &KvSpec) -> Page {
        Page { layers: (0..spec.layers).map(|_| OnceLock::new()).collect(), side_bytes: spec.side_bytes() }
    }

    /// Pointers to a layer's keys and values; what stands where is the kernels' business.
    pub(crate) fn layer(&self, layer: usize) -> Result<(*mut u8, *mut u8)> {
        let buffer = match self.layers[layer].get() {
            Some(buffer) => buffer,
            None => {
                let buffer = Buffer::new(2 * self.side_bytes, false)?;
                self.layers[layer].get_or_init(|| buffer)
            }
        };
        Ok((buffer.pointer(), buffer.pointer().wrapping_add(self.side_bytes)))
    }

    fn copy(&self) -> Result<Page> {
        let copy = Page {
            layers: (0..self.layers.len()).map(|_| OnceLock::new()).collect(),
            side_bytes: self.side_bytes,
        };
        for (layer, from) in self.layers.iter().enumerate() {
            if let Some(from) = from.get() {
                let (to, _) = copy.layer(layer)?;
                // SAFETY: both buffers hold keys and values of one layer; the copy is new.
                unsafe { std::ptr::copy_nonoverlapping(from.pointer(), to, 2 * self.side_bytes) };
            }
        }
        Ok(copy)
    }
}

#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<Arc<Page>>,
    length: usize,
}

/// Keys and values of a batch of sequences.
#[derive(Debug)]
pub struct KvCache {
    spec: KvSpec,
    sequences: Vec<Sequence>,
    /// Per layer, the token of the last call.
    tokens: Vec<Option<Array>>,
}

/// How a layer attends over its store.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PagedSpec {
    /// Multiplies q·k.
    pub scale: f32,
    /// Each query sees only the last `window` keys up to its own.
    pub window: Option<usize>,
    /// softcap · tanh(score / softcap).
    pub softcap: Option<f32>,
    /// Of the products.
    pub precision: Precision,
}

/// One call's view of the store: what [`Op::PagedAttention`] carries.
#[derive(Debug)]
pub struct PagedStep {
    /// The layer.
    pub layer: usize,
    /// Sizes.
    pub kv: KvSpec,
    /// How to attend.
    pub spec: PagedSpec,
    /// Per row of the batch: its pages, and how many positions came before.
    pub sequences: Vec<(Vec<Arc<Page>>, usize)>,
}

impl KvCache {
    /// An empty store for `batch` sequences.
    pub fn new(spec: KvSpec, batch: usize) -> KvCache {
        KvCache { tokens: vec![None; spec.layers], sequences: vec![Sequence::default(); batch], spec }
    }

    /// Sizes.
    pub fn spec(&self) -> &KvSpec {
        &self.spec
    }

    /// How many sequences there are.
    pub fn batch(&self) -> usize {
        self.sequences.len()
    }

    /// How many positions a sequence has.
    pub fn length(&self, row: usize) -> usize {
        self.sequences[row].length
    }

    /// Makes room for `count` more positions in every sequence. Called once a step, before the
    /// layers attend.
    ///
    /// # Errors
    /// If a shared page that has to be copied does not fit in memory.
    pub fn reserve(&mut self, count: usize) -> Result<()> {
        if self.sequences.iter().any(|sequence| {
            let partial = !sequence.length.is_multiple_of(PAGE);
            partial
                && sequence.pages.get(sequence.length / PAGE).is_some_and(|page| Arc::strong_count(page) > 1)
        }) {
            // What the shared page holds must be complete before it is copied.
            let pending: Vec<Array> = self.tokens.iter().flatten().cloned().collect();
            crate::eval::eval(&pending)?;
            self.tokens.fill(None);
        }
        for sequence in &mut self.sequences {
            if let Some(page) = sequence.pages.get_mut(sequence.length / PAGE)
                && Arc::strong_count(page) > 1
            {
                *page = Arc::new(page.copy()?);
            }
            let needed = (sequence.length + count).div_ceil(PAGE);
            while sequence.pages.len() < needed {
                sequence.pages.push(Arc::new(Page::new(&self.spec)));
            }
        }
        Ok(())
    }

    /// Appends k and v to a layer and attends with q over all that the layer holds, causally.
    ///
    /// q [batch, length, heads, head_dim]; k, v [batch, length, kv_heads, head_dim]. Room must
    /// have been made with [`KvCache::reserve`]; [`KvCache::advance`] comes after the last layer.
    pub fn attend(
        &mut self,
        layer: usize,
        q: &Array,
        k: &Array,
        v: &Array,
        spec: PagedSpec,
    ) -> Result<Array> {
        first_failure(&[q, k, v])?;
        let kv = &self.spec;
        let length = if q.rank() == 4 { q.dim(1) } else { 0 };
        let expected = [self.sequences.len(), length, kv.kv_heads, kv.head_dim];
        let fits = q.rank() == 4
            && k.shape() == expected
            && v.shape() == expected
            && q.dim(0) == expected[0]
            && q.dim(3) == kv.head_dim
            && q.dim(2).is_multiple_of(kv.kv_heads);
        if !fits || layer >= kv.layers {
            return Err(Error::invalid(
                "paged_attention",
                format!(
                    "q {:?}, k {:?}, v {:?} do not fit layer {layer} of a store of {} sequences, {kv:?}",
                    q.shape(),
                    k.shape(),
                    v.shape(),
                    self.sequences.len()
                ),
            ));
        }
        if self.sequences.iter().any(|sequence| sequence.pages.len() * PAGE < sequence.length + length) {
            return Err(Error::invalid("paged_attention", "no room was reserved for these positions"));
        }
        let step = PagedStep {
            layer,
            kv: kv.clone(),
            spec,
            sequences: self
                .sequences
                .iter()
                .map(|sequence| (sequence.pages.clone(), sequence.length))
                .collect(),
        };
        let dtype = q.dtype();
        let mut inputs: crate::node::Inputs = smallvec![q.clone(), k.astype(dtype)?, v.astype(dtype)?];
        inputs.extend(self.tokens[layer].take());
        let specs = vec![Spec::new(q.shape(), dtype), Spec::new(&[0][..], Dtype::U8)];
        let out = Array::lazy_many(Op::PagedAttention(Arc::new(step)), inputs, specs);
        // A view of it, which lets go of the call once that is planned: the token is kept, what was attended is not.
        self.tokens[layer] = Some(out.sibling(1).stop_gradient()?);
        Ok(out)
    }

    /// Counts `count` positions that all layers have appended.
    pub fn advance(&mut self, count: usize) {
        for sequence in &mut self.sequences {
            sequence.length += count;
        }
    }

    /// What must be evaluated for everything appended so far to be in the store.
    pub fn pending(&self) -> Vec<Array> {
        self.tokens.iter().flatten().cloned().collect()
    }

    /// Forgets the positions of a sequence from `length` on.
    pub fn truncate(&mut self, row: usize, length: usize) {
        let sequence = &mut self.sequences[row];
        if length < sequence.length {
            sequence.length = length;
            sequence.pages.truncate(length.div_ceil(PAGE));
        }
    }

    /// A store of the sequences of these rows (which may repeat), sharing pages with this one.
    pub fn fork(&self, rows: &[usize]) -> Result<KvCache> {
        crate::eval::eval(&self.pending())?;
        Ok(KvCache {
            spec: self.spec.clone(),
            sequences: rows.iter().map(|&row| self.sequences[row].clone()).collect(),
            tokens: vec![None; self.spec.layers],
        })
    }
}
