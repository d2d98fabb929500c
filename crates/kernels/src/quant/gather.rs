//! Rows of a quantized weight as numbers: the embedding lookup of a tied head, and dequantizing.
//!
//! Written as the scales' type T, values are those of `mx.dequantize`: T(T(q·s) + b). Written as
//! f32, they are s·q + b in f32: from half scales the weights that the exact product multiplies
//! with, from f32 scales rounded twice, as `mx.dequantize` rounds them.

use half::{bf16, f16};
use mica_codec::affine::dequantize_value;
use mica_threads::{Scratch, Task};

use super::tile::{self, Layout, SUB, ScaleType, TILE_ROWS};
use super::weight::QuantWeight;
use crate::{KernelError, View, ViewMut};

const NAME: &str = "gather quantized rows";

/// Where dequantized rows go, `[rows, in]` with contiguous rows; values are rounded if this type
/// is narrower than the scales'.
#[derive(Clone, Debug)]
pub enum Floats<'a> {
    /// Single precision.
    F32(ViewMut<'a, f32>),
    /// The upper half of an f32.
    Bf16(ViewMut<'a, bf16>),
    /// IEEE half precision.
    F16(ViewMut<'a, f16>),
}

impl QuantWeight {
    /// A task that writes row `ids[i]` to row i of `out`. Ids are read when the task runs, so an
    /// earlier task may write them; one past the last row fails the task, with its number.
    pub fn gather_rows<'a>(
        &'a self,
        ids: View<'a, u32>,
        out: Floats<'a>,
    ) -> Result<Box<dyn Task + 'a>, KernelError> {
        let &[rows] = ids.shape() else {
            return Err(KernelError::new(NAME, format!("expected ids [rows], got {:?}", ids.shape())));
        };
        self.gather(Some(ids), rows, out)
    }

    /// A task that writes the whole matrix, as `mx.dequantize` gives it.
    pub fn dequantize<'a>(&'a self, out: Floats<'a>) -> Result<Box<dyn Task + 'a>, KernelError> {
        self.gather(None, self.shape()[0], out)
    }

    fn gather<'a>(
        &'a self,
        ids: Option<View<'a, u32>>,
        rows: usize,
        out: Floats<'a>,
    ) -> Result<Box<dyn Task + 'a>, KernelError> {
        let (shape, strides) = match &out {
            Floats::F32(view) => (view.shape(), view.strides()),
            Floats::Bf16(view) => (view.shape(), view.strides()),
            Floats::F16(view) => (view.shape(), view.strides()),
        };
        let inner = self.shape()[1];
        if shape != [rows, inner] || strides[1] != 1 || (rows > 1 && strides[0].unsigned_abs() < inner) {
            let message = format!(
                "expected an output [{rows}, {inner}] of contiguous rows, got {shape:?} with strides {strides:?}"
            );
            return Err(KernelError::new(NAME, message));
        }
        Ok(Box::new(Gather { weight: self, ids, rows, out }))
    }

    /// One row's values, group by group: computed in f32 if `wide`, else in the scales' type.
    fn row_values(&self, row: usize, wide: bool, mut group_values: impl FnMut(usize, &[f32])) {
        let Layout { bits, group, groups, block, tile, scale, .. } = self.layout;
        let tile = &self.bytes_of_tiles()[row / TILE_ROWS * tile..][..tile];
        let lane = row % TILE_ROWS;
        let (mut codes, mut values) = ([0u8; SUB], [0f32; 128]);
        for g in 0..groups {
            let block = &tile[g * block..][..block];
            let (s, b) = (&block[self.layout.scales()..], &block[self.layout.biases()..]);
            for sub in 0..group / SUB {
                let from = &block[sub * 64 * bits..][..64 * bits];
                match bits {
                    4 => nibbles(from, lane, &mut codes),
                    8 => bytes(from, lane, &mut codes),
                    _ => tile::get_codes(from, bits, lane, &mut codes),
                }
                let values = &mut values[sub * SUB..][..SUB];
                match scale {
                    ScaleType::F32 => values_of::<f32, 4>(&codes, s, b, lane, f32::from_ne_bytes, values),
                    ScaleType::Bf16 if wide => {
                        let read = |bytes| bf16::from_ne_bytes(bytes).to_f32();
                        values_of::<f32, 2>(&codes, s, b, lane, read, values)
                    }
                    ScaleType::Bf16 => values_of::<bf16, 2>(&codes, s, b, lane, bf16::from_ne_bytes, values),
                    ScaleType::F16 if wide => {
                        let read = |bytes| f16::from_ne_bytes(bytes).to_f32();
                        values_of::<f32, 2>(&codes, s, b, lane, read, values)
                    }
                    ScaleType::F16 => values_of::<f16, 2>(&codes, s, b, lane, f16::from_ne_bytes, values),
                }
            }
            group_values(g * group, &values[..group]);
        }
    }
}

fn values_of<T: mica_codec::Float, const N: usize>(
    codes: &[u8; SUB],
    scales: &[u8],
    biases: &[u8],
    lane: usize,
    read: impl Fn([u8; N]) -> T,
    values: &mut [f32],
) {
    let at = |from: &[u8]| read(from[lane * N..][..N].try_into().expect("N bytes"));
    let (s, b) = (at(scales), at(biases));
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = dequantize_value(code, s, b).to_f32();
    }
}

/// `get_codes` for 4 bits, where a row's codes are whole lanes.
fn nibbles(sub_block: &[u8], lane: usize, codes: &mut [u8; SUB]) {
    for (vector, codes) in sub_block.chunks_exact(64).zip(codes.chunks_exact_mut(8)) {
        for i in 0..4 {
            let byte = vector[lane * 4 + i];
            codes[i] = byte & 15;
            codes[i + 4] = byte >> 4;
        }
    }
}

/// `get_codes` for 8 bits.
fn bytes(sub_block: &[u8], lane: usize, codes: &mut [u8; SUB]) {
    for (vector, codes) in sub_block.chunks_exact(64).zip(codes.chunks_exact_mut(4)) {
        codes.copy_from_slice(&vector[lane * 4..][..4]);
    }
}

struct Gather<'a> {
    weight: &'a QuantWeight,
    /// All rows in order if there are none.
    ids: Option<View<'a, u32>>,
    rows: usize,
    out: Floats<'a>,
}

impl Gather<'_> {
    fn rows_per_chunk(&self) -> usize {
        (16384 / self.weight.shape()[1]).max(1)
    }
}

impl Task for Gather<'_> {
    fn chunks(&self) -> usize {
        self.rows.div_ceil(self.rows_per_chunk())
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        let first = chunk * self.rows_per_chunk();
        for to in first..(first + self.rows_per_chunk()).min(self.rows) {
            // SAFETY: the view has an id per row of the output.
            let row = self.ids.as_ref().map_or(to, |ids| unsafe { ids.run(&[to], 1)[0] } as usize);
            let rows = self.weight.shape()[0];
            assert!(row < rows, "row {row} of a quantized weight with {rows} rows");
            let wide = matches!(self.out, Floats::F32(_));
            self.weight.row_values(row, wide, |at, values| {
                // SAFETY: row `to` of the output is contiguous and this chunk's alone.
                unsafe {
                    match &self.out {
                        Floats::F32(out) => out.run_mut(&[to, at], values.len()).copy_from_slice(values),
                        Floats::Bf16(out) => {
                            let out = out.run_mut(&[to, at], values.len());
                            out.iter_mut().zip(values).for_each(|(out, &value)| *out = bf16::from_f32(value));
                        }
                        Floats::F16(out) => {
                            let out = out.run_mut(&[to, at], values.len());
                            out.iter_mut().zip(values).for_each(|(out, &value)| *out = f16::from_f32(value));
                        }
                    }
                }
            });
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }
}
