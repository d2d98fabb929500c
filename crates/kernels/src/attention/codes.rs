//! Keys and values as codes of 8 or 4 bits: half or a quarter of the memory of bf16.
//!
//! A group of dimensions of one position and head has a scale and a bias, both bf16, and a value counts as
//! `code · scale + bias`, one fused multiply-add. The bias is the least value of the group rounded down, the scale the
//! rest of the range by the largest code rounded up, so no value lies outside of what codes reach, and none is off by
//! more than half a step.
//!
//! Codes lie as panels do (see [`super::block`]), but so that a lane's 32 bits hold what follows in the panel: four
//! steps of 8 bits, or eight of 4. Scales and biases stand behind the codes, 256 positions for each group. A few panels
//! at a time are unpacked and multiplied, so products are the same as over f32 arrays that hold these values.

use std::ops::Range;

use half::bf16;
use mica_simd::{Element, Vector};

use super::ahead::Ahead;
use super::block::{BLOCK, PAIR, TILE};
use super::product::Products;
use crate::error::KernelError;

/// How codes are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codes {
    bits: u8,
    group: u8,
}

impl Codes {
    /// Codes of 8 or 4 bits for groups of 32, 64 or 128 dimensions. (The last group of a head may be shorter.)
    pub fn new(bits: usize, group: usize) -> Result<Codes, KernelError> {
        if !matches!((bits, group), (4 | 8, 32 | 64 | 128)) {
            let message = format!(
                "keys and values in {bits} bits with groups of {group}: expected 4 or 8 bits and groups of 32, 64 or 128"
            );
            return Err(KernelError::new("pages", message));
        }
        Ok(Codes { bits: bits as u8, group: group as u8 })
    }

    /// Bits of a code.
    pub fn bits(self) -> usize {
        usize::from(self.bits)
    }

    /// Dimensions that share a scale.
    pub fn group(self) -> usize {
        usize::from(self.group)
    }

    /// Groups of a head.
    pub fn groups(self, dim: usize) -> usize {
        dim.div_ceil(self.group())
    }

    fn largest(self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Steps of a panel in the 32 bits of a lane.
    fn steps(self) -> usize {
        32 / self.bits()
    }

    /// Words of a lane for so many steps.
    fn words(self, steps: usize) -> usize {
        steps.div_ceil(self.steps())
    }

    /// Bytes that one head's keys of a block take.
    pub(super) fn key_bytes(self, dim: usize) -> usize {
        BLOCK / TILE * self.words(dim) * WORDS + self.scale_bytes(dim)
    }

    /// Bytes that one head's values of a block take.
    pub(super) fn value_bytes(self, dim: usize) -> usize {
        dim.div_ceil(TILE) * self.words(BLOCK) * WORDS + self.scale_bytes(dim)
    }

    fn scale_bytes(self, dim: usize) -> usize {
        self.groups(dim) * 2 * BLOCK * size_of::<bf16>()
    }

    /// The scale and the bias of a group, and its codes. A group with a value that is no finite number gives NaN for
    /// all of it.
    pub fn encode(self, values: &[f32], codes: &mut [u8]) -> (bf16, bf16) {
        let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
        for &value in values {
            (low, high) = (low.min(value), high.max(value));
        }
        let ends = Ends::of(low, high, values.iter().all(|value| value.is_finite()), self.largest());
        for (code, &value) in codes.iter_mut().zip(values) {
            *code = ((value - ends.bias) * ends.inverse).round_ties_even().clamp(0.0, self.largest()) as u8;
        }
        (bf16::from_f32(ends.scale), bf16::from_f32(ends.bias))
    }

    /// What a code counts as.
    pub fn decode(self, code: u8, (scale, bias): (bf16, bf16)) -> f32 {
        f32::from(code).mul_add(scale.to_f32(), bias.to_f32())
    }
}

/// Bytes of a panel's words: 32 bits for each of 16 lanes.
const WORDS: usize = 64;

/// A group's scale and bias, as f32 that bf16 holds, and what values are multiplied by.
struct Ends {
    scale: f32,
    bias: f32,
    inverse: f32,
}

impl Ends {
    #[inline(always)]
    fn of(low: f32, high: f32, finite: bool, largest: f32) -> Ends {
        let bias = toward(low, true);
        let scale = toward((high - bias) / largest, false);
        if !finite || !scale.is_finite() {
            return Ends { scale: f32::NAN, bias: f32::NAN, inverse: 0.0 };
        }
        // A range that has no normal step is not worth codes.
        let flat = scale < f32::MIN_POSITIVE;
        let scale = if flat { 0.0 } else { scale };
        Ends { scale, bias, inverse: if flat { 0.0 } else { 1.0 / scale } }
    }
}

/// The next number of bf16 that is not above (or not below) x.
#[inline(always)]
fn toward(x: f32, down: bool) -> f32 {
    let cut = f32::from_bits(x.to_bits() & 0xffff_0000);
    // Cutting goes toward zero.
    if cut == x || x.is_sign_negative() != down {
        cut
    } else {
        f32::from_bits(cut.to_bits().wrapping_add(0x1_0000))
    }
}

/// One head's keys or values of a block.
#[derive(Clone, Copy)]
pub(super) struct Plane {
    codes: Codes,
    dim: usize,
    /// Words of a panel.
    words: usize,
    start: *mut u8,
    scales: *mut bf16,
}

impl Plane {
    /// Keys: panels of 16 positions along dimensions.
    pub fn keys(codes: Codes, dim: usize, start: *mut u8) -> Plane {
        let words = codes.words(dim);
        Plane { codes, dim, words, start, scales: start.wrapping_add(BLOCK / TILE * words * WORDS).cast() }
    }

    /// Values: panels of 16 dimensions along positions.
    pub fn values(codes: Codes, dim: usize, start: *mut u8) -> Plane {
        let words = codes.words(BLOCK);
        Plane {
            codes,
            dim,
            words,
            start,
            scales: start.wrapping_add(dim.div_ceil(TILE) * words * WORDS).cast(),
        }
    }

    /// The words of a panel, from the one that holds a step on.
    #[inline(always)]
    pub fn line(&self, panel: usize, step: usize) -> *mut u8 {
        // No division by how many steps a word has: this is in the loops that read and write.
        self.start.wrapping_add((panel * self.words + step * self.codes.bits() / 32) * WORDS)
    }

    /// Bytes of a panel.
    pub fn panel_bytes(&self) -> usize {
        self.words * WORDS
    }

    /// Bytes of the words that hold these steps of a panel.
    pub fn step_bytes(&self, steps: &Range<usize>) -> usize {
        (steps.end.div_ceil(self.codes.steps()) - steps.start / self.codes.steps()) * WORDS
    }

    fn scale(&self, group: usize, position: usize) -> *mut bf16 {
        self.scales.wrapping_add(2 * group * BLOCK + position)
    }

    /// What lane `n` of step `k` counts as; it is of this dimension and position of the block.
    ///
    /// # Safety
    /// The plane is valid for reading, and all are inside.
    pub unsafe fn at(&self, n: usize, k: usize, dimension: usize, position: usize) -> f32 {
        let (bits, group) = (self.codes.bits(), dimension / self.codes.group());
        // SAFETY: promised by the caller.
        let (word, scale, bias) = unsafe {
            let word = *self.line(n / TILE, k).cast::<u32>().add(n % TILE);
            (word, *self.scale(group, position), *self.scale(group, position).add(BLOCK))
        };
        let code = word >> (k % self.codes.steps() * bits) & ((1 << bits) - 1);
        self.codes.decode(code as u8, (scale, bias))
    }

    /// Writes one position as lane `at` of the panels (keys).
    ///
    /// # Safety
    /// The plane is valid for writing, and `row` is as long as a head.
    #[inline(always)]
    pub unsafe fn write_lane<V: Vector>(&self, at: usize, row: &[f32]) {
        let (bits, steps) = (self.codes.bits(), self.codes.steps());
        for (g, group) in row.chunks(self.codes.group()).enumerate() {
            // SAFETY: promised by the caller.
            let ends = unsafe { self.write_ends::<V>(g, at, group) };
            for (first, part) in (g * self.codes.group()..).step_by(TILE).zip(group.chunks(TILE)) {
                let codes = encode::<V>(part, &ends, self.codes.largest());
                for (step, codes) in
                    (first..).step_by(steps).zip(codes.chunks(steps)).take(part.len().div_ceil(steps))
                {
                    let word = codes.iter().rev().fold(0u32, |word, &code| word << bits | code as u32);
                    // SAFETY: a lane of the word that holds the step; groups are whole words.
                    unsafe { self.line(at / TILE, step).cast::<u32>().add(at % TILE).write(word) };
                }
            }
        }
    }

    /// Writes one position as step `at` of the panels (values).
    ///
    /// # Safety
    /// As [`Plane::write_lane`].
    #[inline(always)]
    pub unsafe fn write_step<V: Vector>(&self, at: usize, row: &[f32]) {
        let shift = (at % self.codes.steps() * self.codes.bits()) as u32;
        let keep = V::int_splat(!((self.codes.largest() as u32) << shift) as i32);
        for (g, group) in row.chunks(self.codes.group()).enumerate() {
            // SAFETY: promised by the caller.
            let ends = unsafe { self.write_ends::<V>(g, at, group) };
            for (panel, part) in (g * self.codes.group() / TILE..).zip(group.chunks(TILE)) {
                let codes = V::int_from_array(encode::<V>(part, &ends, self.codes.largest()));
                let word = self.line(panel, at).cast::<i32>();
                // SAFETY: a word for each of 16 lanes. What it held of other steps stays.
                unsafe {
                    V::int_store(
                        V::int_or(V::int_and(V::int_load(word), keep), V::int_shl(codes, shift)),
                        word,
                    )
                };
            }
        }
    }

    /// Makes positions count as zeros, whatever their codes.
    ///
    /// # Safety
    /// The plane is valid for writing, and the positions are in its block.
    #[inline(always)]
    pub unsafe fn clear(&self, positions: Range<usize>) {
        for g in 0..self.codes.groups(self.dim) {
            for at in positions.clone() {
                // SAFETY: promised by the caller.
                unsafe {
                    self.scale(g, at).write(bf16::ZERO);
                    self.scale(g, at).add(BLOCK).write(bf16::ZERO);
                }
            }
        }
    }

    /// Finds and writes a group's scale and bias.
    ///
    /// # Safety
    /// As [`Plane::write_lane`].
    #[inline(always)]
    unsafe fn write_ends<V: Vector>(&self, g: usize, at: usize, group: &[f32]) -> Ends {
        let (mut low, mut high) = (V::splat(f32::INFINITY), V::splat(f32::NEG_INFINITY));
        let mut odd = V::zero();
        for part in group.chunks(TILE) {
            // Lanes without a value repeat one that is there.
            let values = V::from_slice(part, part[0]);
            (low, high) = (low.min(values), high.max(values));
            // Zero if finite, else NaN, which stays.
            odd = values.mul_add(V::zero(), odd);
        }
        let finite = !V::any(odd.is_nan());
        let ends = Ends::of(low.min_lane(), high.max_lane(), finite, self.codes.largest());
        // SAFETY: promised by the caller.
        unsafe {
            self.scale(g, at).write(bf16::from_f32(ends.scale));
            self.scale(g, at).add(BLOCK).write(bf16::from_f32(ends.bias));
        }
        ends
    }

    /// Unpacks these panels of keys.
    ///
    /// # Safety
    /// The plane is valid for reading, and there is room for as many panels.
    #[inline(always)]
    pub unsafe fn unpack_keys<V: Vector, P: Products>(
        &self,
        panels: Range<usize>,
        to: *mut P::Stored,
        ahead: &mut Ahead,
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            match self.codes.bits() {
                4 => self.keys_of::<V, P, 4>(panels, to, ahead),
                _ => self.keys_of::<V, P, 8>(panels, to, ahead),
            }
        }
    }

    /// Unpacks the words that hold these steps (from an even one on) of some panels of values.
    ///
    /// # Safety
    /// As [`Plane::unpack_keys`].
    #[inline(always)]
    pub unsafe fn unpack_values<V: Vector, P: Products>(
        &self,
        panels: Range<usize>,
        steps: Range<usize>,
        to: *mut P::Stored,
        ahead: &mut Ahead,
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            match self.codes.bits() {
                4 => self.values_of::<V, P, 4>(panels, steps, to, ahead),
                _ => self.values_of::<V, P, 8>(panels, steps, to, ahead),
            }
        }
    }

    /// # Safety
    /// As [`Plane::unpack_keys`], of codes of so many bits.
    #[inline(always)]
    unsafe fn keys_of<V: Vector, P: Products, const BITS: usize>(
        &self,
        panels: Range<usize>,
        to: *mut P::Stored,
        ahead: &mut Ahead,
    ) {
        let (a_word, pairs) = (32 / BITS, self.dim.div_ceil(2));
        for (at, panel) in panels.enumerate() {
            let to = to.wrapping_add(at * pairs * PAIR);
            for g in 0..self.codes.groups(self.dim) {
                let first = g * self.codes.group();
                let last = (first + self.codes.group()).min(2 * pairs);
                // SAFETY: promised by the caller; a position's scales lie in lanes.
                unsafe {
                    let scale = bf16::load::<V>(self.scale(g, panel * TILE));
                    let bias = bf16::load::<V>(self.scale(g, panel * TILE).add(BLOCK));
                    for step in (first..last).step_by(a_word) {
                        ahead.ask();
                        let words = V::int_load(self.line(panel, step).cast());
                        let to = to.add(step / 2 * PAIR);
                        let ends = [[scale; 2], [bias; 2]];
                        // All of a word, so that its loop has no branches, but for the last of odd sizes.
                        if step + a_word <= last {
                            (0..a_word / 2).for_each(|pair| write_pair::<V, P, BITS>(words, pair, ends, to));
                        } else {
                            let rest = (last - step) / 2;
                            (0..rest).for_each(|pair| write_pair::<V, P, BITS>(words, pair, ends, to));
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`Plane::unpack_values`], of codes of so many bits.
    #[inline(always)]
    unsafe fn values_of<V: Vector, P: Products, const BITS: usize>(
        &self,
        panels: Range<usize>,
        steps: Range<usize>,
        to: *mut P::Stored,
        ahead: &mut Ahead,
    ) {
        let a_word = 32 / BITS;
        let steps = steps.start / a_word * a_word..steps.end.next_multiple_of(a_word);
        let (mut scales, mut biases) = ([0f32; BLOCK], [0f32; BLOCK]);
        let mut widened = None;
        for (at, panel) in panels.enumerate() {
            let g = panel * TILE / self.codes.group();
            if widened != Some(g) {
                widened = Some(g);
                // So that a step's is a load into all lanes.
                for at in (steps.start / TILE * TILE..steps.end).step_by(TILE) {
                    // SAFETY: promised by the caller; a block is whole tiles.
                    unsafe {
                        bf16::load::<V>(self.scale(g, at)).store(scales[at..].as_mut_ptr());
                        bf16::load::<V>(self.scale(g, at).add(BLOCK)).store(biases[at..].as_mut_ptr());
                    }
                }
            }
            let to = to.wrapping_add(at * BLOCK / 2 * PAIR);
            for step in steps.clone().step_by(a_word) {
                ahead.ask();
                // SAFETY: promised by the caller; the words are in the panel, and so are their steps.
                unsafe {
                    let words = V::int_load(self.line(panel, step).cast());
                    let to = to.add(step / 2 * PAIR);
                    for pair in 0..a_word / 2 {
                        let at = step + 2 * pair;
                        let ends = [&scales, &biases].map(|all| [V::splat(all[at]), V::splat(all[at + 1])]);
                        write_pair::<V, P, BITS>(words, pair, ends, to);
                    }
                }
            }
        }
    }
}

/// Writes a pair of a word's steps; `scales` and `biases` are of the first and of the second.
///
/// # Safety
/// `to` is where the word's first pair belongs.
#[inline(always)]
unsafe fn write_pair<V: Vector, P: Products, const BITS: usize>(
    words: V::Int,
    pair: usize,
    [scales, biases]: [[V; 2]; 2],
    to: *mut P::Stored,
) {
    let mask = V::int_splat((1 << BITS) - 1);
    let value = |next: usize| {
        let code = V::int_shr_logical(words, ((2 * pair + next) * BITS) as u32);
        V::from_int(V::int_and(code, mask)).mul_add(scales[next], biases[next])
    };
    // SAFETY: promised by the caller.
    unsafe { P::store_pair(value(0), value(1), to.add(pair * PAIR)) };
}

/// Codes of 16 values; of lanes without one any code.
#[inline(always)]
fn encode<V: Vector>(values: &[f32], ends: &Ends, largest: f32) -> [i32; TILE] {
    let x = V::from_slice(values, 0.0);
    let code = ((x - V::splat(ends.bias)) * V::splat(ends.inverse)).round();
    // In this order a NaN becomes zero.
    V::int_to_array(code.max(V::zero()).min(V::splat(largest)).to_int())
}
