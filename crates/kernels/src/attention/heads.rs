//! One sequence's `[heads, positions, dim]` in memory, and moving it into panels and back.
//!
//! Panels are written in blocks of 16 × 16 by the movers of the float product where a head's values
//! lie together, else value by value.

use mica_simd::{Isa, Vector};
use mica_threads::Scratch;

use super::block::{BlockShape, Stored, TILE, panel_at, write_lane, write_step};
use crate::dtype::Dtype;
use crate::gemm::block::{self, Job};
use crate::layout::prefetch;
use crate::rows::{load_any, store_any};

/// An array `[heads, positions, dim]` of one sequence.
#[derive(Clone)]
pub(super) struct Heads {
    pointer: *mut u8,
    dtype: Dtype,
    strides: [isize; 3],
}

// SAFETY: made from views, whose promises they inherit.
unsafe impl Send for Heads {}
// SAFETY: as above.
unsafe impl Sync for Heads {}

/// Some positions of one head: what the packing functions read.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub heads: &'a Heads,
    /// Where the sequence begins, in values.
    pub base: isize,
    pub head: usize,
    /// The first position.
    pub position: usize,
    pub count: usize,
    pub dim: usize,
}

impl Heads {
    pub fn new(pointer: *mut u8, dtype: Dtype, strides: &[isize]) -> Heads {
        Heads { pointer, dtype, strides: [strides[0], strides[1], strides[2]] }
    }

    /// Asks for one head of one position to be brought near.
    #[inline(always)]
    pub fn prefetch(&self, base: isize, head: usize, position: usize, dim: usize) {
        if self.strides[2] == 1 {
            let at = base + head as isize * self.strides[0] + position as isize * self.strides[1];
            let size = self.dtype.size();
            prefetch(self.pointer.wrapping_offset(at * size as isize), dim * size);
        }
    }

    /// Widens one head of one position.
    ///
    /// # Safety
    /// Both are inside the array, which begins `base` values into the memory.
    #[inline(always)]
    pub unsafe fn load<V: Vector>(&self, base: isize, head: usize, position: usize, out: &mut [f32]) {
        let at = base + head as isize * self.strides[0] + position as isize * self.strides[1];
        // SAFETY: promised by the caller.
        unsafe { load_any(V::ISA, self.dtype, self.pointer, at, self.strides[2], out) }
    }

    /// Rounds and writes one head of one position.
    ///
    /// # Safety
    /// As for `load`; the array is an output, and nobody else touches the place.
    #[inline(always)]
    pub unsafe fn store<V: Vector>(&self, base: isize, head: usize, position: usize, values: &[f32]) {
        let at = base + head as isize * self.strides[0] + position as isize * self.strides[1];
        // SAFETY: promised by the caller.
        unsafe { store_any(V::ISA, self.dtype, self.pointer, at, self.strides[2], values) }
    }

    /// Writes sums that lie turned: `sums[d * stride + position]` is value d of a position. `rows` is
    /// room for 16 rows of whole tiles.
    ///
    /// # Safety
    /// As for `store`, for `part`'s positions; the sums are there.
    #[inline(always)]
    pub unsafe fn store_turned<V: Vector>(
        part: Part,
        sums: *const f32,
        stride: usize,
        isa: Isa,
        rows: &mut [f32],
    ) {
        let Part { heads, base, head, position, count, dim } = part;
        let mover = block::mover(isa, block::From::F32, true, block::Into::F32);
        let width = dim.next_multiple_of(TILE);
        for first in (0..count).step_by(TILE) {
            let here = (count - first).min(TILE);
            for d in (0..dim).step_by(TILE) {
                // SAFETY: the sums of these dimensions and positions; `rows` has 16 rows of whole tiles.
                unsafe {
                    mover(&Job {
                        from: sums.add(d * stride + first).cast(),
                        from_step: (stride * size_of::<f32>()) as isize,
                        lines: (dim - d).min(TILE),
                        lanes: here,
                        into: rows.as_mut_ptr().add(d).cast(),
                        into_step: width * size_of::<f32>(),
                        ahead: 0,
                        into_lines: TILE,
                    });
                }
            }
            for (i, row) in rows.chunks(width.max(1)).take(here).enumerate() {
                // SAFETY: promised by the caller.
                unsafe { heads.store::<V>(base, head, position + first + i, &row[..dim]) };
            }
        }
    }
}

impl Part<'_> {
    fn pointer(&self, position: usize) -> *const u8 {
        let [head, step, _] = self.heads.strides;
        let at = self.base + self.head as isize * head + (self.position + position) as isize * step;
        self.heads.pointer.wrapping_offset(at * self.heads.dtype.size() as isize)
    }

    /// What the movers call the source, if a head's values lie together.
    fn lines(&self) -> Option<block::From> {
        match self.heads.dtype {
            _ if self.heads.strides[2] != 1 => None,
            Dtype::F32 => Some(block::From::F32),
            Dtype::BF16 => Some(block::From::High),
            Dtype::F16 => Some(block::From::F16),
            _ => None,
        }
    }

    fn step(&self) -> isize {
        self.heads.strides[1] * self.heads.dtype.size() as isize
    }

    /// Writes the positions as lanes of panels of `pairs` pairs (keys of [`BlockShape`]); lanes from
    /// `count` to `padded` become zero.
    ///
    /// # Safety
    /// The positions are inside the array; `to` holds the panels of `padded` lanes, in whole tiles.
    #[inline(always)]
    pub unsafe fn lanes<V: Vector, T: Stored>(
        &self,
        isa: Isa,
        padded: usize,
        pairs: usize,
        to: *mut T,
        scratch: &Scratch,
    ) {
        let Some(from) = self.lines() else {
            let row = scratch.take::<f32>(self.dim);
            for lane in 0..padded {
                row.fill(0.0);
                // SAFETY: promised by the caller.
                unsafe {
                    if lane < self.count {
                        self.heads.load::<V>(self.base, self.head, self.position + lane, row);
                    }
                    write_lane::<V, T>(to, lane, pairs, row);
                }
            }
            return;
        };
        let mover = block::mover(isa, from, true, T::LINES);
        for lane in (0..padded).step_by(TILE) {
            for d in (0..2 * pairs).step_by(TILE) {
                let offset = d as isize * self.heads.dtype.size() as isize;
                // SAFETY: lines and lanes that exist; a panel has room for the pairs.
                unsafe {
                    mover(&Job {
                        from: self.pointer(lane).wrapping_offset(offset),
                        from_step: self.step(),
                        lines: self.count.saturating_sub(lane).min(TILE),
                        lanes: self.dim.saturating_sub(d).min(TILE),
                        into: to.add(panel_at::<T>(lane, d, pairs)).cast(),
                        into_step: LINE_BYTES,
                        ahead: TILE as isize * self.step(),
                        into_lines: (2 * pairs - d).min(TILE),
                    });
                }
            }
        }
    }

    /// Writes the positions as steps of panels (values of [`BlockShape`]); steps from `count` to
    /// `padded` become zero.
    ///
    /// # Safety
    /// As [`Part::lanes`], `pairs` being at least half of `padded`, a multiple of 16.
    #[inline(always)]
    pub unsafe fn steps<V: Vector, T: Stored>(
        &self,
        isa: Isa,
        padded: usize,
        pairs: usize,
        to: *mut T,
        scratch: &Scratch,
    ) {
        let Some(from) = self.lines() else {
            let row = scratch.take::<f32>(self.dim);
            for step in 0..padded {
                row.fill(0.0);
                // SAFETY: promised by the caller.
                unsafe {
                    if step < self.count {
                        self.heads.load::<V>(self.base, self.head, self.position + step, row);
                    }
                    write_step::<V, T>(to, step, pairs, row);
                }
            }
            return;
        };
        let mover = block::mover(isa, from, false, T::LINES);
        for step in (0..padded).step_by(TILE) {
            for d in (0..self.dim).step_by(TILE) {
                let offset = d as isize * self.heads.dtype.size() as isize;
                // SAFETY: lines and lanes that exist; panels have room for whole tiles.
                unsafe {
                    mover(&Job {
                        from: self.pointer(step).wrapping_offset(offset),
                        from_step: self.step(),
                        lines: self.count.saturating_sub(step).min(TILE),
                        lanes: (self.dim - d).min(TILE),
                        into: to.add(panel_at::<T>(d, step, pairs)).cast(),
                        into_step: LINE_BYTES,
                        ahead: TILE as isize * self.step(),
                        into_lines: TILE,
                    });
                }
            }
        }
    }
}

/// Bytes of a line of 16 f32, or of a line of 16 pairs of bf16.
const LINE_BYTES: usize = 64;

/// Turns operand rows: `to[d * to_stride + r] = rows[r * stride + d]` for `count` rows of `dim` values;
/// places of rows up to the next multiple of 16 become zero.
///
/// # Safety
/// Both sides have these values.
#[inline(always)]
pub(super) unsafe fn turn<T: Stored>(
    isa: Isa,
    rows: *const T,
    stride: usize,
    (count, dim): (usize, usize),
    to: *mut T,
    to_stride: usize,
) {
    let mover = block::mover(isa, T::VALUES.0, true, T::VALUES.1);
    let size = size_of::<T>();
    for r in (0..count).step_by(TILE) {
        for d in (0..dim).step_by(TILE) {
            // SAFETY: promised by the caller.
            unsafe {
                mover(&Job {
                    from: rows.add(r * stride + d).cast(),
                    from_step: (stride * size) as isize,
                    lines: (count - r).min(TILE),
                    lanes: (dim - d).min(TILE),
                    into: to.add(d * to_stride + r).cast(),
                    into_step: to_stride * size,
                    ahead: 0,
                    into_lines: (dim - d).min(TILE),
                });
            }
        }
    }
}

/// Panels of a block, for [`Part::lanes`] and [`Part::steps`].
impl BlockShape {
    /// Writes `keys` and `values` (the positions of one block) as the block at `to`; the last step's
    /// missing values are zero.
    ///
    /// # Safety
    /// As [`Part::lanes`]; `to` holds a block.
    #[inline(always)]
    pub unsafe fn pack<V: Vector, T: Stored>(
        self,
        isa: Isa,
        keys: Part,
        values: Part,
        to: *mut T,
        scratch: &Scratch,
    ) {
        let padded = keys.count.next_multiple_of(super::block::STEP);
        // SAFETY: promised by the caller.
        unsafe {
            keys.lanes::<V, T>(isa, padded, self.key_pairs(), to, scratch);
            let to = to.add(self.key_len());
            values.steps::<V, T>(isa, padded, super::block::BLOCK / 2, to, scratch);
        }
    }
}
