//! Rows of a quantized weight as numbers: the embedding lookup of a tied head, and dequantizing.
//!
//! Written as the scales' type T, values are those of `mx.dequantize`: T(T(q·s) + b). Written as
//! f32, they are s·q + b in f32: from half scales the weights that the exact product multiplies
//! with, from f32 scales rounded twice, as `mx.dequantize` rounds them. Codes without biases stand for a number times
//! a scale, rounded to the output's type once.

use std::marker::PhantomData;

use half::{bf16, f16};
use mica_codec::minifloat::{E2M1, from_e4m3, from_e8m0};
use mica_simd::{Element, Isa, Kernel, Vector, dispatch};
use mica_threads::{Scratch, Task};

use super::form::Numbers;
use super::tile::{self, Codes, ScaleType, TILE_ROWS, with_codes};
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
}

/// One row's values from its codes, 16 at a time: S is the type of scales and biases, R the one that each operation is
/// rounded to (of f32, no rounding at all), O the output's.
struct Row<'a, S, R, O> {
    weight: &'a QuantWeight,
    row: usize,
    codes: &'a [u8],
    to: &'a mut [O],
    types: PhantomData<(S, R)>,
}

impl<S: Element, R: Element, O: Element> Kernel for Row<'_, S, R, O> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let layout = self.weight.layout;
        let lane = self.row % TILE_ROWS;
        for (block, codes, to) in groups_of(self.weight, self.row, self.codes, self.to) {
            let s = V::splat(scale_of::<S>(&block[layout.scales()..], lane));
            let b = V::splat(scale_of::<S>(&block[layout.biases()..], lane));
            for (codes, to) in codes.chunks_exact(16).zip(to.chunks_exact_mut(16)) {
                let mut q = [0; 16];
                for (q, &code) in q.iter_mut().zip(codes) {
                    *q = i32::from(code);
                }
                let q = V::from_int(V::int_from_array(q));
                let value = rounded::<V, R>(rounded::<V, R>(q * s) + b);
                // SAFETY: there are 16 places.
                unsafe { O::store(value, to.as_mut_ptr()) };
            }
        }
    }
}

/// One row's values from codes without biases: numbers times scales.
struct Scaled<'a, O> {
    weight: &'a QuantWeight,
    row: usize,
    codes: &'a [u8],
    to: &'a mut [O],
}

impl<O: Element> Kernel for Scaled<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let layout = self.weight.layout;
        let lane = self.row % TILE_ROWS;
        for (block, codes, to) in groups_of(self.weight, self.row, self.codes, self.to) {
            let scales = &block[layout.scales()..];
            let s = V::splat(match layout.scale {
                ScaleType::F32 => scale_of::<f32>(scales, lane),
                ScaleType::Bf16 => scale_of::<bf16>(scales, lane),
                ScaleType::F16 => scale_of::<f16>(scales, lane),
                ScaleType::E8m0 => from_e8m0(scales[lane]),
                ScaleType::E4m3 => from_e4m3(scales[lane]),
            });
            for (codes, to) in codes.chunks_exact(16).zip(to.chunks_exact_mut(16)) {
                let mut numbers = [0f32; 16];
                for (number, &code) in numbers.iter_mut().zip(codes) {
                    *number = match layout.numbers {
                        Numbers::Fp4 => E2M1[usize::from(code)],
                        Numbers::Fp8 => from_e4m3(code),
                        Numbers::Affine | Numbers::Centred(_) => f32::from(code) - layout.centre(),
                    };
                }
                // SAFETY: there are 16 numbers and 16 places.
                unsafe { O::store(f32::load::<V>(numbers.as_ptr()) * s, to.as_mut_ptr()) };
            }
        }
    }
}

/// The blocks of a row with the codes in them and the places of their values.
#[inline(always)]
fn groups_of<'a, O>(
    weight: &'a QuantWeight,
    row: usize,
    codes: &'a [u8],
    to: &'a mut [O],
) -> impl Iterator<Item = (&'a [u8], &'a [u8], &'a mut [O])> {
    let blocks = tile_of(weight, row).chunks_exact(weight.layout.block);
    let values = codes.chunks_exact(weight.layout.group).zip(to.chunks_exact_mut(weight.layout.group));
    blocks.zip(values).map(|(block, (codes, to))| (block, codes, to))
}

fn tile_of(weight: &QuantWeight, row: usize) -> &[u8] {
    let tile = weight.layout.tile;
    &weight.bytes_of_tiles()[row / TILE_ROWS * tile..][..tile]
}

/// A row's scale or bias.
#[inline(always)]
fn scale_of<S: Element>(from: &[u8], lane: usize) -> f32 {
    let from = from[..TILE_ROWS * size_of::<S>()].as_ptr().cast::<S>();
    // SAFETY: the lane is one of 16; plain numbers, at any address.
    unsafe { from.add(lane).read_unaligned() }.to_f32()
}

/// Rounded to a type and widened again.
#[inline(always)]
fn rounded<V: Vector, R: Element>(x: V) -> V {
    let mut values = [R::default(); 16];
    // SAFETY: there are 16 places.
    unsafe {
        R::store(x, values.as_mut_ptr());
        R::load(values.as_ptr())
    }
}

/// A row's codes, four at a time: what [`get_codes`](tile::get_codes) does code after code. The whole row, because
/// vectors of codes that were just put together from fours are slow to load.
fn codes_of_row(weight: &QuantWeight, row: usize, codes: &mut [u8]) {
    with_codes!(&weight.layout, C => unpack_row::<C>(weight, row, codes))
}

fn unpack_row<C: Codes>(weight: &QuantWeight, row: usize, codes: &mut [u8]) {
    let lane = row % TILE_ROWS * 4;
    let blocks = tile_of(weight, row).chunks_exact(weight.layout.block);
    let subs = blocks.flat_map(|block| block[..weight.layout.codes].chunks_exact(C::BYTES));
    for (sub_block, codes) in subs.zip(codes.chunks_exact_mut(C::SUB)) {
        let mut units = [0u32; tile::SUB / 4];
        let mut vector = 0;
        for (width, below) in const { tile::planes(C::BITS) } {
            let slots = 8 / width.max(1);
            let mask = ((1 << width) - 1) * 0x0101_0101u32;
            let vectors = width * C::SUB / tile::SUB;
            for v in 0..vectors {
                let word = &sub_block[(vector + v) * 64 + lane..][..4];
                let word = u32::from_le_bytes(word.try_into().expect("4 bytes"));
                for t in 0..slots {
                    units[v * slots + t] |= (word >> (t * width) & mask) << below;
                }
            }
            vector += vectors;
        }
        for (codes, unit) in codes.chunks_exact_mut(4).zip(units) {
            codes.copy_from_slice(&unit.to_le_bytes());
        }
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
        let rows = (16384 / self.weight.shape()[1]).max(1);
        // Rows in order read the same tiles.
        if self.ids.is_none() { rows.next_multiple_of(TILE_ROWS) } else { rows }
    }

    /// `HalfBf16` and `HalfF16` are what scales of these types round to.
    fn write<HalfBf16: Element, HalfF16: Element, O: Element>(&self, row: usize, codes: &[u8], to: &mut [O]) {
        let (weight, isa) = (self.weight, Isa::get());
        if weight.layout.numbers != Numbers::Affine {
            return dispatch(isa, Scaled { weight, row, codes, to });
        }
        match weight.layout.scale {
            ScaleType::F32 => {
                dispatch(isa, Row::<f32, f32, O> { weight, row, codes, to, types: PhantomData })
            }
            ScaleType::Bf16 => {
                dispatch(isa, Row::<bf16, HalfBf16, O> { weight, row, codes, to, types: PhantomData })
            }
            ScaleType::F16 => {
                dispatch(isa, Row::<f16, HalfF16, O> { weight, row, codes, to, types: PhantomData })
            }
            ScaleType::E8m0 | ScaleType::E4m3 => unreachable!("affine scales are floats of 16 bits or more"),
        }
    }
}

impl Task for Gather<'_> {
    fn chunks(&self) -> usize {
        self.rows.div_ceil(self.rows_per_chunk())
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let columns = self.weight.shape()[1];
        let codes = scratch.take::<u8>(columns);
        let first = chunk * self.rows_per_chunk();
        for to in first..(first + self.rows_per_chunk()).min(self.rows) {
            // SAFETY: the view has an id per row of the output.
            let row = self.ids.as_ref().map_or(to, |ids| unsafe { ids.run(&[to], 1)[0] } as usize);
            let rows = self.weight.shape()[0];
            if row >= rows {
                // Bad data and not a bug: no message of a panic belongs on stderr.
                std::panic::resume_unwind(Box::new(format!(
                    "[{NAME}] row {row} of a weight with {rows} rows"
                )));
            }
            codes_of_row(self.weight, row, codes);
            // SAFETY: row `to` of the output is contiguous and this chunk's alone.
            unsafe {
                match &self.out {
                    Floats::F32(out) => {
                        self.write::<f32, f32, f32>(row, codes, out.run_mut(&[to, 0], columns))
                    }
                    Floats::Bf16(out) => {
                        self.write::<bf16, f16, _>(row, codes, out.run_mut(&[to, 0], columns))
                    }
                    Floats::F16(out) => {
                        self.write::<bf16, f16, _>(row, codes, out.run_mut(&[to, 0], columns))
                    }
                }
            }
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }
}
