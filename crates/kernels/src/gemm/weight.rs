//! A float weight, packed once: `FloatWeight`.
//!
//! `[out, in]` becomes panels of 16 outputs; within a panel, `in` ascends: for f32 and f16 a line
//! of 16 outputs per input, for bf16 a line of 16 pairs (two inputs) per two inputs. The one copy
//! serves products in both directions and both precisions, row lookups, and gives back the source
//! bits. `out` is padded to 16 and `in` to 16 (f32) or 32 with zeros.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use mica_simd::Isa;
use mica_threads::{Pool, Scratch, Task};

use super::block::{self, Job};
use super::micro::Line;
use super::pack::BSource;
use super::types::{Epilogue, FloatType, FloatView, FloatViewMut, Precision};
use super::{Gemm, WorkspaceBuf, addends_of, run};
use crate::{KernelError, ViewMut};

/// Where panels are: what the packing code knows of a weight.
#[derive(Clone, Debug)]
pub(super) struct Tiles {
    pub pointer: *mut u8,
    pub float: FloatType,
    pub inputs: usize,
}

impl Tiles {
    fn line(float: FloatType) -> Line {
        match float {
            FloatType::F32 => Line::F32,
            FloatType::Bf16 => Line::WidenBf16,
            FloatType::F16 => Line::WidenF16,
        }
    }

    pub fn panel_bytes(&self) -> usize {
        Self::line(self.float).panel_bytes(self.inputs)
    }

    /// Bytes from the start to the line of input `input` (even for bf16) in a panel.
    pub fn offset(&self, panel: usize, input: usize) -> usize {
        let within = match self.float {
            FloatType::F32 => input * 64,
            FloatType::F16 => input * 32,
            FloatType::Bf16 => input / 2 * 64,
        };
        panel * self.panel_bytes() + within
    }
}

/// A packed `[out, in]` weight of bf16, f16 or f32. Clones share the one copy.
#[derive(Clone)]
pub struct FloatWeight {
    tiles: Tiles,
    out: usize,
    /// Keeps the packed copy alive.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: packed bytes are only read once the weight exists; the owner keeps them alive.
unsafe impl Send for FloatWeight {}
// SAFETY: as above.
unsafe impl Sync for FloatWeight {}

impl std::fmt::Debug for FloatWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FloatWeight([{}, {}], {:?})", self.out, self.tiles.inputs, self.tiles.float)
    }
}

/// A weight that is being packed: run the task, then take the weight.
pub struct WeightPacking<'a> {
    weight: FloatWeight,
    source: FloatView<'a>,
}

impl FloatWeight {
    /// Bytes that a packed `[out, in]` weight takes.
    pub fn packed_bytes(out: usize, inputs: usize, float: FloatType) -> usize {
        out.div_ceil(16) * Tiles::line(float).panel_bytes(inputs)
    }

    /// Packs a `[out, in]` view into memory of its own.
    pub fn pack<'a>(source: impl Into<FloatView<'a>>, pool: &Pool) -> Result<FloatWeight, KernelError> {
        let packing = Self::plan_pack(source)?;
        let mut tasks = Vec::new();
        packing.tasks(&mut tasks);
        run(pool, &tasks)?;
        drop(tasks);
        // SAFETY: the tasks have run.
        Ok(unsafe { packing.finish() })
    }

    /// Prepares packing of a `[out, in]` view into newly allocated memory.
    pub fn plan_pack<'a>(source: impl Into<FloatView<'a>>) -> Result<WeightPacking<'a>, KernelError> {
        let source = source.into();
        let [out, inputs] = *source.shape() else {
            return Err(not_a_matrix(source.shape()));
        };
        let mut buffer = WorkspaceBuf::new(Self::packed_bytes(out, inputs, source.float_type()));
        let pointer = buffer.pointer();
        // SAFETY: the buffer is new, large enough, and kept by the weight.
        unsafe { Self::plan_pack_into(source, pointer, Arc::new(buffer)) }
    }

    /// Prepares packing into the caller's memory, which `owner` keeps alive.
    ///
    /// # Safety
    /// `pointer` is aligned to 64 bytes and writable for [`FloatWeight::packed_bytes`] until the
    /// packing is done, and from then on nobody writes there while `owner` lives.
    pub unsafe fn plan_pack_into<'a>(
        source: impl Into<FloatView<'a>>,
        pointer: *mut u8,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<WeightPacking<'a>, KernelError> {
        let source = source.into();
        let [out, inputs] = *source.shape() else {
            return Err(not_a_matrix(source.shape()));
        };
        let tiles = Tiles { pointer, float: source.float_type(), inputs };
        Ok(WeightPacking { weight: FloatWeight { tiles, out, _owner: owner }, source })
    }

    /// Takes bytes that were packed before, for example by another handle.
    ///
    /// # Safety
    /// `pointer` is aligned to 64 bytes and holds [`FloatWeight::packed_bytes`] of a packed weight
    /// of this shape and type, which stay as they are while `owner` lives.
    pub unsafe fn from_packed(
        pointer: *const u8,
        out: usize,
        inputs: usize,
        float: FloatType,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> FloatWeight {
        FloatWeight { tiles: Tiles { pointer: pointer.cast_mut(), float, inputs }, out, _owner: owner }
    }

    /// Where the panels are.
    pub(super) fn tiles(&self) -> &Tiles {
        &self.tiles
    }

    /// Outputs: rows of the logical matrix.
    pub fn out(&self) -> usize {
        self.out
    }

    /// Inputs: columns of the logical matrix.
    pub fn inputs(&self) -> usize {
        self.tiles.inputs
    }

    /// The element type.
    pub fn float_type(&self) -> FloatType {
        self.tiles.float
    }

    /// Bytes of the packed copy.
    pub fn bytes(&self) -> usize {
        Self::packed_bytes(self.out, self.tiles.inputs, self.tiles.float)
    }

    /// The start of the packed copy.
    pub fn pointer(&self) -> *const u8 {
        self.tiles.pointer
    }

    /// Plans Y = X·Wᵀ: `x [.., in]`, `out [.., out]`.
    pub fn plan_forward<'a>(
        &'a self,
        x: impl Into<FloatView<'a>>,
        out: impl Into<FloatViewMut<'a>>,
        precision: Precision,
        epilogue: Epilogue<'a>,
    ) -> Result<Gemm<'a>, KernelError> {
        self.plan(x.into(), out.into(), false, precision, epilogue, Isa::get())
    }

    /// Plans dX = dY·W: `dy [.., out]`, `dx [.., in]`.
    pub fn plan_transposed<'a>(
        &'a self,
        dy: impl Into<FloatView<'a>>,
        dx: impl Into<FloatViewMut<'a>>,
        precision: Precision,
        epilogue: Epilogue<'a>,
    ) -> Result<Gemm<'a>, KernelError> {
        self.plan(dy.into(), dx.into(), true, precision, epilogue, Isa::get())
    }

    /// Either product on an explicit tier, for tests.
    pub fn plan<'a>(
        &'a self,
        x: FloatView<'a>,
        out: FloatViewMut<'a>,
        transposed: bool,
        precision: Precision,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<Gemm<'a>, KernelError> {
        self.plan_part(0..self.out, x, out, transposed, precision, epilogue, isa)
    }

    /// Either product with some of the outputs alone, from a multiple of 16 on: those of a tile of
    /// a vocabulary, for instance.
    pub fn plan_part<'a>(
        &'a self,
        outputs: Range<usize>,
        x: FloatView<'a>,
        out: FloatViewMut<'a>,
        transposed: bool,
        precision: Precision,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<Gemm<'a>, KernelError> {
        check_part("linear", &outputs, self.out)?;
        let count = outputs.len();
        let (k, n) = if transposed { (count, self.inputs()) } else { (self.inputs(), count) };
        let mut tiles = self.tiles.clone();
        tiles.pointer = tiles.pointer.wrapping_add(tiles.offset(outputs.start / PANEL, 0));
        let b = BSource::Weight { tiles, transposed, others: None };
        let as_matrix = |shape: &[usize]| match shape {
            [one] => vec![1, *one],
            more => more.to_vec(),
        };
        let (x_shape, out_shape) = (as_matrix(x.shape()), as_matrix(out.shape()));
        let rank = out_shape.len();
        // A scalar has no last dimension.
        if rank == 0 || x_shape.len() != rank || x_shape[..rank - 1] != out_shape[..rank - 1] {
            let message = format!(
                "x {:?} and output {:?} of a [{count}, {}] weight differ before the last dimension",
                x.shape(),
                out.shape(),
                self.inputs()
            );
            return Err(KernelError::new("linear", message));
        }
        let with_row = |strides: &[isize]| match strides {
            [one] => vec![0, *one],
            more => more.to_vec(),
        };
        let m = out_shape[rank - 2];
        let batch = &out_shape[..rank - 2];
        let a = super::types::Matrix::of(
            "x",
            (x.bytes(), x.float_type()),
            &x_shape,
            &with_row(x.strides()),
            batch,
            (m, k),
        )?;
        let o = super::types::Matrix::of(
            "the output",
            (out.bytes(), out.float_type()),
            &out_shape,
            &with_row(out.strides()),
            batch,
            (m, n),
        )?;
        let addends = addends_of(&epilogue, &o, batch, m, n)?;
        Ok(Gemm::from_request(super::product::Request {
            threads: super::MANY_THREADS,
            isa,
            precision,
            batch: batch.into(),
            m,
            n,
            k,
            a,
            b,
            out: o,
            addends,
            chosen: false,
        }))
    }

    /// Looks up rows: `out[i, ..] = W[rows[i], ..]`, widened to f32. `out` is `[rows.len(), in]`.
    pub fn gather<'a>(
        &'a self,
        rows: &'a [u32],
        out: ViewMut<'a, f32>,
    ) -> Result<Box<dyn Task + 'a>, KernelError> {
        if out.shape() != [rows.len(), self.inputs()] {
            let message = format!(
                "the output has shape {:?}; expected [{}, {}]",
                out.shape(),
                rows.len(),
                self.inputs()
            );
            return Err(KernelError::new("gather rows", message));
        }
        if let Some(bad) = rows.iter().find(|&&row| row as usize >= self.out) {
            let message = format!("row {bad} of a weight with {} rows", self.out);
            return Err(KernelError::new("gather rows", message));
        }
        Ok(Box::new(Gather { weight: self, rows, out }))
    }

    /// One element, widened.
    fn element(&self, row: usize, input: usize) -> f32 {
        let line = self.tiles.pointer.wrapping_add(self.tiles.offset(row / 16, input & !1));
        let lane = row % 16;
        // SAFETY: row and input are inside the weight: both callers iterate over its shape, with
        // rows checked by `gather`.
        unsafe {
            match self.tiles.float {
                FloatType::F32 => line.cast::<f32>().add(input % 2 * 16 + lane).read(),
                FloatType::Bf16 => line.cast::<bf16>().add(lane * 2 + input % 2).read().to_f32(),
                FloatType::F16 => line.cast::<f16>().add(input % 2 * 16 + lane).read().to_f32(),
            }
        }
    }

    /// Gives back the `[out, in]` source, bit for bit, as a task. `out` has the weight's type and
    /// contiguous rows.
    pub fn unpack<'a>(&'a self, out: impl Into<FloatViewMut<'a>>) -> Result<Box<dyn Task + 'a>, KernelError> {
        let out = out.into();
        let fits = out.shape() == [self.out, self.inputs()]
            && out.float_type() == self.tiles.float
            && (out.strides()[1] == 1 || self.inputs() <= 1);
        if !fits {
            let message = format!(
                "cannot unpack {self:?} into {:?} {:?} with strides {:?}: expected the same shape and type and contiguous rows",
                out.float_type(),
                out.shape(),
                out.strides()
            );
            return Err(KernelError::new("unpack weight", message));
        }
        let row_bytes = out.strides()[0] * self.tiles.float.size() as isize;
        Ok(Box::new(Move { weight: self, unpack: true, rows: out.bytes(), row: row_bytes, column: 0 }))
    }
}

/// Outputs of a panel.
const PANEL: usize = 16;
/// What sums over outputs are padded to where tiles multiply.
const STEP: usize = 32;

/// Refuses outputs that a weight does not have, or that do not begin with a panel of its packed copy.
pub(crate) fn check_part(
    kernel: &'static str,
    outputs: &Range<usize>,
    out: usize,
) -> Result<(), KernelError> {
    // Sums over a part read whole steps of it: what stands behind its end must be nothing.
    let whole = outputs.end == out || outputs.len().is_multiple_of(STEP);
    if outputs.start <= outputs.end && outputs.end <= out && outputs.start.is_multiple_of(PANEL) && whole {
        return Ok(());
    }
    let message = format!(
        "outputs {outputs:?} of {out}: expected a range from a multiple of {PANEL} on, of a multiple of {STEP} or to the end"
    );
    Err(KernelError::new(kernel, message))
}

fn not_a_matrix(shape: &[usize]) -> KernelError {
    KernelError::new("pack weight", format!("a weight is [out, in], got {shape:?}"))
}

impl<'a> WeightPacking<'a> {
    /// Appends the packing task.
    pub fn tasks<'t>(&'t self, list: &mut Vec<Box<dyn Task + 't>>) {
        let size = self.source.float_type().size() as isize;
        let strides = self.source.strides();
        list.push(Box::new(Move {
            weight: &self.weight,
            unpack: false,
            rows: self.source.bytes(),
            row: strides[0] * size,
            column: strides[1] * size,
        }));
    }

    /// The packed weight.
    ///
    /// # Safety
    /// The task has run to its end.
    pub unsafe fn finish(self) -> FloatWeight {
        self.weight
    }
}

struct Gather<'a> {
    weight: &'a FloatWeight,
    rows: &'a [u32],
    out: ViewMut<'a, f32>,
}

impl Task for Gather<'_> {
    fn chunks(&self) -> usize {
        self.rows.len()
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        let row = self.rows[chunk] as usize;
        let strides = self.out.strides();
        let start = self.out.pointer().wrapping_offset(chunk as isize * strides[0]);
        for input in 0..self.weight.inputs() {
            // SAFETY: the shape was checked; each chunk writes its own row.
            unsafe {
                start.wrapping_offset(input as isize * strides[1]).write(self.weight.element(row, input))
            };
        }
    }

    fn name(&self) -> &'static str {
        "gather rows"
    }
}

/// Between rows in memory and panels, either way; a chunk is a panel. Bits are moved, not values.
struct Move<'a> {
    weight: &'a FloatWeight,
    unpack: bool,
    rows: *mut u8,
    /// Byte strides of the rows' side.
    row: isize,
    column: isize,
}

// SAFETY: a chunk writes its own panel (packing) or its own rows (unpacking).
unsafe impl Send for Move<'_> {}
// SAFETY: as above.
unsafe impl Sync for Move<'_> {}

impl Move<'_> {
    /// # Safety
    /// The weight's memory is writable and the rows readable.
    unsafe fn pack_panel(&self, panel: usize) {
        let tiles = &self.weight.tiles;
        let size = tiles.float.size();
        let outs = (self.weight.out - panel * 16).min(16);
        let (from, into) = match tiles.float {
            FloatType::F32 => (block::From::F32, block::Into::F32),
            FloatType::Bf16 => (block::From::High, block::Into::Pairs),
            FloatType::F16 => (block::From::High, block::Into::High),
        };
        let isa = Isa::get();
        let along_in = block::mover(isa, from, true, into);
        let along_out = block::mover(isa, from, false, into);
        let unit = if tiles.float == FloatType::F32 { 16 } else { 32 };
        for input in (0..tiles.inputs.next_multiple_of(unit)).step_by(16) {
            let inputs = tiles.inputs.saturating_sub(input).min(16);
            let offset = (panel * 16) as isize * self.row + input as isize * self.column;
            let from = self.rows.wrapping_offset(offset) as *const u8;
            let into = tiles.pointer.wrapping_add(tiles.offset(panel, input));
            let into_step = if tiles.float == FloatType::F16 { 32 } else { 64 };
            let mut gathered = [0u8; 16 * 64];
            let (mover, from, from_step, lines, lanes) = if self.column == size as isize {
                (along_in, from, self.row, outs, inputs)
            } else if self.row == size as isize {
                (along_out, from, self.column, inputs, outs)
            } else {
                for i in 0..inputs {
                    for o in 0..outs {
                        let at = from.wrapping_offset(o as isize * self.row + i as isize * self.column);
                        let to = gathered[i * 64 + o * size..].as_mut_ptr();
                        // SAFETY: inside the source; 16 lines of 16 elements fit.
                        unsafe { std::ptr::copy_nonoverlapping(at, to, size) };
                    }
                }
                (along_out, gathered.as_ptr(), 64, inputs, outs)
            };
            // SAFETY: existing elements are read; the panel has room for 16 lines here.
            unsafe {
                mover(&Job { from, from_step, lines, lanes, into, into_step, ahead: 512, into_lines: 16 })
            };
        }
    }

    /// # Safety
    /// The rows are writable.
    unsafe fn unpack_panel(&self, panel: usize) {
        let tiles = &self.weight.tiles;
        let size = tiles.float.size();
        let outs = (self.weight.out - panel * 16).min(16);
        let (from, into) = match tiles.float {
            FloatType::F32 => (block::From::F32, block::Into::F32),
            FloatType::Bf16 => (block::From::Pairs, block::Into::High),
            FloatType::F16 => (block::From::High, block::Into::High),
        };
        let mover = block::mover(Isa::get(), from, true, into);
        let mut lines = [0u8; 16 * 64];
        for input in (0..tiles.inputs).step_by(16) {
            let inputs = (tiles.inputs - input).min(16);
            // SAFETY: the panel has 16 lines here; `lines` has room for 16.
            unsafe {
                mover(&Job {
                    from: tiles.pointer.wrapping_add(tiles.offset(panel, input)),
                    from_step: if tiles.float == FloatType::F16 { 32 } else { 64 },
                    lines: 16,
                    lanes: 16,
                    into: lines.as_mut_ptr(),
                    into_step: 64,
                    ahead: 2048,
                    into_lines: 16,
                });
            }
            for o in 0..outs {
                let row = self.rows.wrapping_offset((panel * 16 + o) as isize * self.row);
                // SAFETY: the output was checked to have these rows.
                unsafe {
                    let to = row.add(input * size);
                    std::ptr::copy_nonoverlapping(lines[o * 64..].as_ptr(), to, inputs * size);
                }
            }
        }
    }
}

impl Task for Move<'_> {
    fn chunks(&self) -> usize {
        if self.unpack && self.weight.inputs() == 0 { 0 } else { self.weight.out.div_ceil(16) }
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        // SAFETY: the views were checked when the task was made; a chunk is one panel.
        unsafe {
            if self.unpack {
                self.unpack_panel(chunk);
            } else {
                self.pack_panel(chunk);
            }
        }
    }

    fn name(&self) -> &'static str {
        if self.unpack { "unpack weight" } else { "pack weight" }
    }
}
