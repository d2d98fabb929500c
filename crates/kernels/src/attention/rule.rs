//! Which keys a query attends to, and how scores become weights.

use mica_simd::{Vector, math};

use super::block::{BLOCK, TILE};
use crate::dtype::{Dtype, DynView};
use crate::error::KernelError;
use crate::rows::{check_float, check_shape};

/// What turns products into scores, beside the products themselves.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    /// Factor of the products, usually 1/√head_dim.
    pub scale: f32,
    /// A query sees no later position than its own.
    pub causal: bool,
    /// With causality: it sees this many positions, its own included.
    pub window: Option<usize>,
    /// `[batch, length]` int32: the first key that each query sees.
    pub key_start: Option<DynView>,
    /// `[batch, length]` int32: one past the last key that each query sees.
    pub key_end: Option<DynView>,
    /// c: scores become c·tanh(score / c), before the mask.
    pub soft_cap: Option<f32>,
    /// `[heads]` f32: one more score per head that has no value.
    pub sinks: Option<DynView>,
    /// `[batch, heads, length, keys]` (broadcast it with strides of zero): bool (false hides a
    /// key) or a float that is added to the score.
    pub mask: Option<DynView>,
}

impl Rule {
    /// Checks the arrays against `[batch, heads, length]` queries and the number of keys.
    pub(crate) fn check(
        &self,
        kernel: &'static str,
        [batch, heads, length]: [usize; 3],
        keys: usize,
    ) -> Result<(), KernelError> {
        for (name, view) in [("key_start", &self.key_start), ("key_end", &self.key_end)] {
            if let Some(view) = view {
                check_shape(kernel, name, &view.shape, &[batch, length])?;
                if view.dtype != Dtype::I32 {
                    return Err(KernelError::new(
                        kernel,
                        format!("{name} is {}, expected int32", view.dtype),
                    ));
                }
            }
        }
        if let Some(sinks) = &self.sinks {
            check_shape(kernel, "sinks", &sinks.shape, &[heads])?;
            if sinks.dtype != Dtype::F32 {
                return Err(KernelError::new(kernel, format!("sinks are {}, expected float32", sinks.dtype)));
            }
        }
        if let Some(mask) = &self.mask {
            check_shape(kernel, "mask", &mask.shape, &[batch, heads, length, keys])?;
            if mask.dtype != Dtype::Bool {
                check_float(kernel, "mask (if not bool)", mask.dtype)?;
            }
        }
        if self.window == Some(0) {
            return Err(KernelError::new(
                kernel,
                "a window of 0 positions shows nothing, expected 1 or more",
            ));
        }
        if self.window.is_some() && !self.causal {
            return Err(KernelError::new(kernel, "a window needs causality"));
        }
        if self.soft_cap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
            return Err(KernelError::new(kernel, "a soft cap has to be positive"));
        }
        Ok(())
    }

    /// The keys that query `l` of sequence `batch` may see; it stands at `position`.
    #[inline(always)]
    pub(crate) fn range(&self, batch: usize, l: usize, position: isize, keys: usize) -> (usize, usize) {
        let (mut low, mut high) = (0, keys);
        if self.causal {
            // A query before the first key sees nothing.
            let end = (position + 1).max(0) as usize;
            high = high.min(end);
            if let Some(window) = self.window {
                low = end.saturating_sub(window);
            }
        }
        let entry = |view: &DynView| {
            let at = batch as isize * view.strides[0] + l as isize * view.strides[1];
            // SAFETY: the shape was checked to be [batch, length].
            let value = unsafe { *view.pointer.cast::<i32>().offset(at) };
            value.max(0) as usize
        };
        if let Some(view) = &self.key_start {
            low = low.max(entry(view));
        }
        if let Some(view) = &self.key_end {
            high = high.min(entry(view));
        }
        (low.min(high), high)
    }

    /// The sink of a head.
    #[inline(always)]
    pub(crate) fn sink(&self, head: usize) -> Option<f32> {
        let view = self.sinks.as_ref()?;
        // SAFETY: the shape was checked to be [heads].
        Some(unsafe { *view.pointer.cast::<f32>().offset(head as isize * view.strides[0]) })
    }

    /// Turns a block's products into scores, in place: for the tiles `tiles` of block `block`,
    /// keys outside `low..high` (within the block) become -∞. Returns the largest score.
    #[inline(always)]
    pub(crate) fn scores<V: Vector>(
        &self,
        row: &mut [f32],
        tiles: std::ops::Range<usize>,
        (low, high): (usize, usize),
        [batch, head, l, block]: [usize; 4],
    ) -> f32 {
        if self.soft_cap.is_none() && self.mask.is_none() {
            return self.plain_scores::<V>(row, tiles, (low, high));
        }
        let scale = V::splat(self.scale);
        let lanes = V::from_array(std::array::from_fn(|i| i as f32));
        let (first, end) = (V::splat(low as f32), V::splat(high as f32));
        let mut largest = V::splat(f32::NEG_INFINITY);
        for tile in tiles {
            let at = tile * TILE;
            let part = &mut row[at..at + TILE];
            let mut score = V::from_slice(part, 0.0) * scale;
            if let Some(cap) = self.soft_cap {
                score = math::tanh(score / V::splat(cap)) * V::splat(cap);
            }
            if let Some(mask) = &self.mask {
                let mut values = [0.0; TILE];
                self.mask_tile(
                    mask,
                    [batch, head, l, block * BLOCK + at],
                    low.max(at)..high.min(at + TILE),
                    at,
                    &mut values,
                );
                score = score + V::from_array(values);
            }
            if at < low || at + TILE > high {
                let key = lanes + V::splat(at as f32);
                let seen = V::mask_and(key.ge(first), key.lt(end));
                score = V::select(seen, score, V::splat(f32::NEG_INFINITY));
            }
            largest = largest.max(score);
            score.to_slice(part);
        }
        largest.max_lane()
    }

    /// [`Rule::scores`] without a soft cap or a mask, which most are: only tiles at the ends of the range
    /// are looked at lane by lane.
    #[inline(always)]
    fn plain_scores<V: Vector>(
        &self,
        row: &mut [f32],
        tiles: std::ops::Range<usize>,
        (low, high): (usize, usize),
    ) -> f32 {
        let scale = V::splat(self.scale);
        let lanes = V::from_array(std::array::from_fn(|i| i as f32));
        let (first, end) = (V::splat(low as f32), V::splat(high as f32));
        let mut largest = V::splat(f32::NEG_INFINITY);
        let whole_from = low.div_ceil(TILE).clamp(tiles.start, tiles.end);
        let whole_to = (high / TILE).clamp(whole_from, tiles.end);
        let row = row[..tiles.end * TILE].as_mut_ptr();
        for tile in (tiles.start..whole_from).chain(whole_to..tiles.end) {
            let at = tile * TILE;
            let key = lanes + V::splat(at as f32);
            let seen = V::mask_and(key.ge(first), key.lt(end));
            // SAFETY: the row has all tiles.
            unsafe {
                let score = V::load(row.add(at)) * scale;
                let score = V::select(seen, score, V::splat(f32::NEG_INFINITY));
                largest = largest.max(score);
                score.store(row.add(at));
            }
        }
        for tile in whole_from..whole_to {
            // SAFETY: as above.
            unsafe {
                let score = V::load(row.add(tile * TILE)) * scale;
                largest = largest.max(score);
                score.store(row.add(tile * TILE));
            }
        }
        largest.max_lane()
    }

    /// What the mask adds to the scores of the keys `seen` of a tile that begins at `at`.
    #[inline(always)]
    fn mask_tile(
        &self,
        mask: &DynView,
        [batch, head, l, key]: [usize; 4],
        seen: std::ops::Range<usize>,
        at: usize,
        values: &mut [f32; TILE],
    ) {
        let s = &mask.strides;
        let base = batch as isize * s[0] + head as isize * s[1] + l as isize * s[2] + key as isize * s[3];
        for k in seen {
            let offset = base + (k - at) as isize * s[3];
            // SAFETY: the key is one that the query may see, hence inside the checked shape.
            values[k - at] = unsafe {
                match mask.dtype {
                    Dtype::Bool => {
                        if *mask.pointer.offset(offset) != 0 {
                            0.0
                        } else {
                            f32::NEG_INFINITY
                        }
                    }
                    Dtype::BF16 => (*mask.pointer.cast::<half::bf16>().offset(offset)).to_f32(),
                    Dtype::F16 => (*mask.pointer.cast::<half::f16>().offset(offset)).to_f32(),
                    _ => *mask.pointer.cast::<f32>().offset(offset),
                }
            };
        }
    }
}
