//! Filling tiles from ggml's blocks.

use std::ops::Range;

use half::f16;
use mica_codec::gguf::{GgufBlock, Groups};
use mica_threads::{Pool, Scratch};

use super::form::Form;
use super::pack::{NAME, lanes, put_lanes};
use super::tile::{Codes, Layout, SUB, ScaleType, TILE_ROWS, with_codes};
use super::weight::QuantWeight;
use crate::KernelError;
use crate::pieces::in_pieces;

impl QuantWeight {
    /// Packs rows of ggml's blocks, `[out, in]`, on all threads as they come: `read` writes the blocks of these rows.
    /// There is no other copy of the weight. Numbers are the blocks' own; scales must be finite
    /// ([`GgufBlock::first_not_finite`]).
    ///
    /// # Errors
    /// Outside sizes and too little memory, inside the first error of `read` in the order of rows.
    pub fn read_gguf<E: Send>(
        pool: &Pool,
        block: GgufBlock,
        [out, inner]: [usize; 2],
        read: impl Fn(Range<usize>, &mut [u8]) -> Result<(), E> + Sync + Send,
    ) -> Result<Result<QuantWeight, E>, KernelError> {
        if !inner.is_multiple_of(block.values()) {
            let (name, values) = (block.name(), block.values());
            let message =
                format!("rows of {inner} values are no whole blocks of {name}, which hold {values}");
            return Err(KernelError::new(NAME, message));
        }
        let weight = QuantWeight::empty(Form::gguf(block), [out, inner])?;
        let row = inner / block.values() * block.bytes();
        let piece = |index: usize, scratch: &mut Scratch| {
            let rows = weight.rows_of_piece(index);
            let bytes = scratch.take::<u8>(rows.len() * row);
            read(rows.clone(), bytes)?;
            for (at, bytes) in bytes.chunks(TILE_ROWS * row).enumerate() {
                // SAFETY: each piece, and each tile in it, is filled once.
                let to = unsafe { weight.blank_tile(rows.start / TILE_ROWS + at) };
                with_codes!(&weight.layout, C => fill::<C>(&weight.layout, block, bytes, row, to));
            }
            Ok(())
        };
        Ok(in_pieces(pool, weight.pieces(), piece)?.map(|()| weight))
    }
}

/// One tile, of zeros, from up to 16 rows of blocks.
fn fill<C: Codes>(layout: &Layout, block: GgufBlock, rows: &[u8], row_bytes: usize, tile: &mut [u8]) {
    let mut groups = Groups::default();
    let mut sub_block = [0u8; SUB];
    for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
        let per_block = block.values() / layout.group * layout.block;
        for (bytes, to) in row.chunks_exact(block.bytes()).zip(tile.chunks_exact_mut(per_block)) {
            block.take_apart(bytes, &mut groups);
            for (g, to) in to.chunks_exact_mut(layout.block).enumerate() {
                let (codes, rest) = to.split_at_mut(layout.codes);
                let from = &groups.codes[g * layout.group..][..layout.group];
                for (from, to) in from.chunks_exact(C::SUB).zip(codes.chunks_exact_mut(C::BYTES)) {
                    sub_block[..C::SUB].copy_from_slice(from);
                    put_lanes(to, lane, &lanes::<C>(&sub_block));
                }
                let (scales, biases) = rest.split_at_mut(TILE_ROWS * layout.scale.size());
                put_number(scales, layout.scale, lane, groups.scales[g]);
                if block.has_biases() {
                    put_number(biases, layout.scale, lane, groups.biases[g]);
                }
            }
        }
    }
}

/// Writes a number that this type holds exactly.
fn put_number(to: &mut [u8], scale: ScaleType, lane: usize, value: f32) {
    match scale {
        ScaleType::F16 => to[lane * 2..][..2].copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
        // A power of two; the smallest has an exponent of 0, as here.
        ScaleType::E8m0 => to[lane] = (value.to_bits() >> 23) as u8,
        _ => to[lane * 4..][..4].copy_from_slice(&value.to_ne_bytes()),
    }
}
