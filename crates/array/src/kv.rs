//! The paged store of keys and values: growing state that is not a growing array.
//!
//! A page holds [`PAGE`] positions of one sequence for every layer. A sequence is a list of pages
//! and a length; forking one copies the list and shares the pages, of which only the last, partial
//! one is copied when it is written again. [`KvCache::attend`] is the op that appends to the store
//! and attends over it; a token array that each call takes and gives orders the calls that write
//! the same sequences, whatever else they depend on.

use std::collections::HashSet;
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

    /// Bytes of memory that a page takes in all layers.
    pub fn page_bytes(&self) -> u64 {
        self.layers as u64 * crate::memory::bucket(2 * self.side_bytes()) as u64
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
    /// Per layer, the window of the last call.
    windows: Vec<Option<usize>>,
}

/// Where a store stood ([`KvCache::mark`]).
#[derive(Clone, Debug)]
pub struct Mark {
    tokens: Vec<Option<Array>>,
    windows: Vec<Option<usize>>,
    lengths: Vec<usize>,
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

impl PagedSpec {
    /// How many keys `length` queries behind `before` positions read together: one outside of all their windows is
    /// not read.
    pub(crate) fn keys_read(window: Option<usize>, before: usize, length: usize) -> usize {
        let seen = window.map_or(usize::MAX, |window| window.saturating_add(length.saturating_sub(1)));
        before.saturating_add(length).min(seen)
    }
}

/// Pages of each sequence, and how many positions came before.
pub type Sequences = Arc<[(Vec<Arc<Page>>, usize)]>;

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
    pub sequences: Sequences,
}

impl KvCache {
    /// An empty store for `batch` sequences.
    pub fn new(spec: KvSpec, batch: usize) -> KvCache {
        let (tokens, windows) = (vec![None; spec.layers], vec![None; spec.layers]);
        KvCache { tokens, windows, sequences: vec![Sequence::default(); batch], spec }
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
        let step = PagedStep { layer, kv: kv.clone(), spec, sequences: self.tables(length)? };
        self.windows[layer] = spec.window;
        let dtype = q.dtype();
        let mut inputs: crate::node::Inputs = smallvec![q.clone(), k.astype(dtype)?, v.astype(dtype)?];
        inputs.extend(self.tokens[layer].take());
        let specs = vec![Spec::new(q.shape(), dtype), Spec::new(&[0][..], Dtype::U8)];
        let out = Array::lazy_many(Op::PagedAttention(Arc::new(step)), inputs, specs);
        // A view of it, which lets go of the call once that is planned: the token is kept, what was attended is not.
        self.tokens[layer] = Some(out.sibling(1).stop_gradient()?);
        Ok(out)
    }

    /// Where so many more positions of each sequence go.
    pub(crate) fn tables(&self, length: usize) -> Result<Sequences> {
        if self.sequences.iter().any(|sequence| sequence.pages.len() * PAGE < sequence.length + length) {
            return Err(Error::invalid("paged_attention", "no room was reserved for these positions"));
        }
        Ok(self.sequences.iter().map(|sequence| (sequence.pages.clone(), sequence.length)).collect())
    }

    /// Counts `count` positions that all layers have appended.
    pub fn advance(&mut self, count: usize) {
        for sequence in &mut self.sequences {
            sequence.length += count;
        }
    }

    /// Where the store stands, for [`KvCache::restore`].
    pub fn mark(&self) -> Mark {
        Mark {
            tokens: self.tokens.clone(),
            windows: self.windows.clone(),
            lengths: self.sequences.iter().map(|sequence| sequence.length).collect(),
        }
    }

    /// Forgets what was appended since the mark was made. After an error of a pass the calls of its layers would
    /// fail whatever comes after them.
    pub fn restore(&mut self, mark: Mark) {
        for (sequence, length) in self.sequences.iter_mut().zip(mark.lengths) {
            sequence.length = length;
        }
        (self.tokens, self.windows) = (mark.tokens, mark.windows);
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
        // Room that was only reserved is not shared: of what several write, nothing but the page that is partly
        // filled is copied first.
        let filled = |sequence: &Sequence| Sequence {
            pages: sequence.pages[..sequence.length.div_ceil(PAGE)].to_vec(),
            length: sequence.length,
        };
        Ok(KvCache {
            spec: self.spec.clone(),
            sequences: rows.iter().map(|&row| filled(&self.sequences[row])).collect(),
            tokens: vec![None; self.spec.layers],
            windows: self.windows.clone(),
        })
    }

    /// Gives each sequence a copy of its own of the pages that it shares with another one of this store.
    ///
    /// # Errors
    /// If the copies do not fit in memory.
    pub fn unshare(&mut self) -> Result<()> {
        // What the pages hold must be complete before they are copied.
        crate::eval::eval(&self.pending())?;
        self.tokens.fill(None);
        let mut taken = HashSet::new();
        for page in self.sequences.iter_mut().flat_map(|sequence| &mut sequence.pages) {
            if !taken.insert(Arc::as_ptr(page)) {
                *page = Arc::new(page.copy()?);
            }
        }
        Ok(())
    }

    /// Bytes of keys and values that a query behind so many positions of a sequence reads in all layers, its own
    /// included. Of a layer with a window these are at most the window's, once something has attended there.
    pub fn bytes_read(&self, before: usize) -> u64 {
        let a_layer = (self.spec.bytes_per_position() / self.spec.layers.max(1)) as u64;
        self.windows.iter().map(|&window| PagedSpec::keys_read(window, before, 1) as u64 * a_layer).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: KvSpec = KvSpec { layers: 2, kv_heads: 1, head_dim: 16, format: KvFormat::F32 };

    /// Appends positions to all sequences; layer 1 has a window of 40. What the layers attended.
    fn attend(cache: &mut KvCache, length: usize, seed: u64) -> Vec<f32> {
        let shape = [cache.batch(), length, 1, 16];
        let key = crate::random::key(seed).unwrap();
        let x = crate::random::normal(&shape, Dtype::F32, &key).unwrap();
        cache.reserve(length).unwrap();
        let mut sum = Vec::new();
        for (layer, window) in [None, Some(40)].into_iter().enumerate() {
            let spec = PagedSpec { scale: 0.25, window, softcap: None, precision: Precision::Exact };
            sum.extend(cache.attend(layer, &x, &x, &x, spec).unwrap().to_vec::<f32>().unwrap());
        }
        cache.advance(length);
        sum
    }

    #[test]
    fn sequences_that_no_longer_share_pages_hold_what_they_held() {
        for length in [PAGE - 3, 2 * PAGE, 2 * PAGE + 5] {
            let mut one = KvCache::new(SPEC, 1);
            attend(&mut one, length, 1);
            let (mut shared, mut own) = (one.fork(&[0, 0, 0]).unwrap(), one.fork(&[0, 0, 0]).unwrap());
            own.unshare().unwrap();
            let pages: HashSet<_> = own.sequences.iter().flat_map(|s| &s.pages).map(Arc::as_ptr).collect();
            assert_eq!(pages.len(), 3 * length.div_ceil(PAGE), "{length}");
            assert_eq!(attend(&mut own, 1, 2), attend(&mut shared, 1, 2), "{length}");
        }
    }

    #[test]
    fn forks_do_not_share_room_that_was_only_reserved() {
        let mut one = KvCache::new(SPEC, 1);
        attend(&mut one, PAGE + 3, 1);
        one.reserve(4 * PAGE).unwrap();
        let mut forked = one.fork(&[0, 0]).unwrap();
        forked.reserve(3 * PAGE).unwrap();
        let pages: Vec<_> = forked.sequences.iter().flat_map(|s| &s.pages).map(Arc::as_ptr).collect();
        let own: HashSet<_> = pages.iter().collect();
        assert_eq!((pages.len(), own.len()), (2 * 5, 2 * 5 - 1), "only the full page is shared");
    }

    #[test]
    fn of_a_layer_with_a_window_no_more_keys_are_read() {
        let mut cache = KvCache::new(SPEC, 1);
        attend(&mut cache, 1, 3);
        let a_key = 2 * 16 * 4;
        for (before, keys) in [(0, 1 + 1), (39, 40 + 40), (40, 41 + 40), (1000, 1001 + 40)] {
            assert_eq!(cache.bytes_read(before), keys * a_key, "behind {before}");
            assert_eq!(cache.fork(&[0]).unwrap().bytes_read(before), keys * a_key, "a fork behind {before}");
        }
        for (window, before, length, keys) in [(None, 7, 3, 10), (Some(4), 7, 3, 6), (Some(4), 0, 3, 3)] {
            assert_eq!(PagedSpec::keys_read(window, before, length), keys, "{window:?} {before} {length}");
        }
    }
}
