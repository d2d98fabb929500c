//! Packing: from operands with any strides, or from packed weights, into the panels that the
//! micro-kernels read (their layouts are in [`super::micro`]).

use std::sync::Arc;

use half::f16;
use mica_simd::Isa;

use super::block::{self, BlockFn, Job};
use super::micro::Line;
use super::pairs::Blocks;
use super::types::{FloatType, Matrix};
use super::weight::Tiles;

/// How a [`PanelSource`] writes its lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PanelForm {
    /// A line of 16 f32 per k.
    F32,
    /// The same, rounded to bf16.
    Rounded,
    /// A line of 16 pairs of bf16 per two k, the even one in the lower half.
    Pairs,
}

impl PanelForm {
    /// `k` up to a whole block: what a panel must hold, zeros at the end.
    pub fn padded(self, k: usize) -> usize {
        k.next_multiple_of(if self == PanelForm::Pairs { 32 } else { 16 })
    }
}

/// Which panels to write, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PanelRange {
    /// The first column, a multiple of 16.
    pub n0: usize,
    /// Panels of 16 columns.
    pub panels: usize,
    /// The first k: a multiple of [`PanelSource::step`].
    pub k0: usize,
    /// How many of k: to the end, or a multiple of the step.
    pub k: usize,
    pub into: *mut u8,
    /// Bytes from panel to panel.
    pub stride: usize,
}

/// A second operand that writes its own panels: quantized weights.
pub(crate) trait PanelSource: std::fmt::Debug + Send + Sync {
    /// Writes the panels, each padded to [`PanelForm::padded`]; columns past the last are zeros.
    ///
    /// # Safety
    /// The tier is available; the range lies inside the operand and the destination is writable.
    unsafe fn panels(&self, isa: Isa, form: PanelForm, range: PanelRange);

    /// The same of one of several matrices.
    ///
    /// # Safety
    /// As above, and there is such a matrix.
    unsafe fn panels_of(&self, _matrix: usize, isa: Isa, form: PanelForm, range: PanelRange) {
        // SAFETY: passed on.
        unsafe { self.panels(isa, form, range) }
    }

    /// Ranges begin at multiples of so many k.
    fn step(&self) -> usize {
        256
    }
}

/// The second operand.
#[derive(Clone, Debug)]
pub(super) enum BSource {
    /// Rows are k, columns are n.
    Strided(Matrix),
    /// A packed weight `[out, in]`: k runs over `in` and n over `out`, or the other way around. If batch entries
    /// have weights of their own, `others` are those of all, the first one included.
    Weight { tiles: Tiles, transposed: bool, others: Option<Arc<[Tiles]>> },
    /// Whatever writes panels.
    Panels(Arc<dyn PanelSource>),
}

/// In which direction an operand is contiguous, and the block mover for it.
#[derive(Clone, Copy)]
struct Reader {
    /// Byte strides along k and along the other direction (rows of A, columns of B).
    along_k: isize,
    along_other: isize,
    float: FloatType,
    how: How,
    block: BlockFn,
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    /// Lines run along k.
    LinesAlongK,
    /// Lines run along the other direction.
    LinesAlongOther,
    /// Elements are collected one by one into lines along the other direction.
    Gather,
}

impl Reader {
    /// `turn_for` is the kind of line that has to be turned around.
    fn new(
        isa: Isa,
        float: FloatType,
        along_k: isize,
        along_other: isize,
        turned: How,
        into: block::Into,
    ) -> Reader {
        let size = float.size() as isize;
        let how = if along_k == size {
            How::LinesAlongK
        } else if along_other == size {
            How::LinesAlongOther
        } else {
            How::Gather
        };
        let from = match (float, how) {
            (FloatType::Bf16, How::Gather) => block::From::Words,
            (FloatType::F32, _) | (FloatType::F16, How::Gather) => block::From::F32,
            (FloatType::Bf16, _) => block::From::High,
            (FloatType::F16, _) => block::From::F16,
        };
        let lines = if how == How::Gather { How::LinesAlongOther } else { how };
        Reader { along_k, along_other, float, how, block: block::mover(isa, from, lines == turned, into) }
    }

    /// Moves `ks` x `others` elements (each at most 16) that start at `from`.
    ///
    /// # Safety
    /// Those elements are readable and the destination is writable.
    unsafe fn read(
        &self,
        from: *const u8,
        (ks, others): (usize, usize),
        into: *mut u8,
        into_step: usize,
        into_lines: usize,
    ) {
        let (from_step, lines, lanes) = match self.how {
            How::LinesAlongK => (self.along_other, others, ks),
            How::LinesAlongOther => (self.along_k, ks, others),
            // SAFETY: the caller's.
            How::Gather => return unsafe { self.gather(from, (ks, others), into, into_step, into_lines) },
        };
        let ahead = if self.how == How::LinesAlongK { 512 } else { 16 * from_step };
        // SAFETY: the lines are those of the caller.
        unsafe { (self.block)(&Job { from, from_step, lines, lanes, into, into_step, ahead, into_lines }) }
    }

    /// [`Reader::read`] of elements that are collected one by one.
    ///
    /// # Safety
    /// As there.
    unsafe fn gather(
        &self,
        from: *const u8,
        (ks, others): (usize, usize),
        into: *mut u8,
        into_step: usize,
        into_lines: usize,
    ) {
        let mut gathered = [[0u32; 16]; 16];
        for (k, line) in gathered[..ks].iter_mut().enumerate() {
            for (other, word) in line[..others].iter_mut().enumerate() {
                let offset = k as isize * self.along_k + other as isize * self.along_other;
                let at = from.wrapping_offset(offset);
                // SAFETY: inside the elements that the caller promises.
                *word = unsafe {
                    match self.float {
                        FloatType::F32 => at.cast::<u32>().read(),
                        FloatType::Bf16 => (at.cast::<u16>().read() as u32) << 16,
                        FloatType::F16 => at.cast::<f16>().read().to_f32().to_bits(),
                    }
                };
            }
        }
        let (from, from_step, lines, lanes) = (gathered.as_ptr().cast(), 64, ks, others);
        let job = Job { from, from_step, lines, lanes, into, into_step, ahead: 0, into_lines };
        // SAFETY: the lines are those of `gathered`, the destination is the caller's.
        unsafe { (self.block)(&job) }
    }
}

/// Packs rows of A.
pub(super) struct PackA {
    reader: Reader,
    pairs: bool,
    /// For whole blocks.
    blocks: Option<Blocks>,
}

impl PackA {
    pub fn new(isa: Isa, a: &Matrix, line: Line, round: bool) -> PackA {
        let pairs = line == Line::Pairs;
        let into = match (pairs, round) {
            (true, _) => block::Into::High,
            (false, true) => block::Into::Rounded,
            (false, false) => block::Into::F32,
        };
        let reader = Reader::new(isa, a.float, a.column, a.row, How::LinesAlongOther, into);
        PackA { reader, pairs, blocks: if pairs { Blocks::get(isa, a.float) } else { None } }
    }

    /// Bytes per row for `k` elements.
    pub fn row_bytes(line: Line, k: usize) -> usize {
        let block = if line == Line::Pairs { 32 } else { 16 };
        k.div_ceil(block) * 64
    }

    /// Packs rows in panels of `panel` rows each, one after another: `rows` rows by `k` elements, from
    /// `from`. `padded` says how many rows a panel of so many rows is stored as.
    ///
    /// # Safety
    /// The elements are readable, `row_bytes(k)` bytes for each padded row from `into` writable.
    pub unsafe fn rows(
        &self,
        from: *const u8,
        (rows, panel): (usize, usize),
        padded: impl Fn(usize) -> usize,
        k: usize,
        into: *mut u8,
    ) {
        let line = if self.pairs { Line::Pairs } else { Line::F32 };
        let row_bytes = PackA::row_bytes(line, k);
        let mut row = 0;
        while row < rows {
            let from = from.wrapping_offset(row as isize * self.reader.along_other);
            // SAFETY: the rows are inside A; panels follow each other.
            unsafe {
                let into = into.add(row * row_bytes);
                match self.blocks {
                    Some(blocks) if self.turns() && panel == 8 && rows - row >= 16 => {
                        let whole = k / 32;
                        self.turned(blocks, from, whole, [into, into.add(8 * row_bytes)], 8);
                        for half in 0..2 {
                            let from = from.wrapping_offset(8 * half as isize * self.reader.along_other);
                            self.blocks_of_16(from, (8, 8), (32 * whole, k), into.add(8 * half * row_bytes));
                        }
                        row += 16;
                    }
                    _ => {
                        let here = panel.min(rows - row);
                        self.panel(from, here, padded(here), k, into);
                        row += panel;
                    }
                }
            }
        }
    }

    /// [`PackA::rows`] of rows that lie anywhere: at these offsets (bytes, modulo 2⁶⁴) from `from`, elements `column`
    /// bytes apart. They are copied to `lines`, the rows that this packer was made for, a panel at a time.
    ///
    /// # Safety
    /// As there, and `lines` has room for a panel of lines, so many bytes apart, of `k` elements.
    pub unsafe fn chosen(
        &self,
        (from, column, offsets): (*const u8, isize, &[usize]),
        panel: usize,
        padded: impl Fn(usize) -> usize,
        k: usize,
        (lines, step): (*mut u8, isize),
        into: *mut u8,
    ) {
        let size = self.reader.float.size();
        let row_bytes = PackA::row_bytes(if self.pairs { Line::Pairs } else { Line::F32 }, k);
        for (at, offsets) in offsets.chunks(panel).enumerate() {
            for (line, &offset) in offsets.iter().enumerate() {
                let from = from.wrapping_add(offset);
                let line = lines.wrapping_offset(line as isize * step);
                // SAFETY: promised by the caller.
                unsafe {
                    if column == size as isize {
                        std::ptr::copy_nonoverlapping(from, line, k * size);
                    } else if size == 4 {
                        copy_apart::<u32>(from, column, k, line);
                    } else {
                        copy_apart::<u16>(from, column, k, line);
                    }
                }
            }
            let here = offsets.len();
            // SAFETY: the lines were just written; panels follow each other.
            unsafe { self.rows(lines, (here, panel), &padded, k, into.add(at * panel * row_bytes)) }
        }
    }

    /// Whether rows have to be turned around.
    fn turns(&self) -> bool {
        self.reader.how == How::LinesAlongOther
    }

    /// `whole` blocks of 16 rows that have to be turned around, eight to each of two places in panels of `padded` rows.
    ///
    /// # Safety
    /// As [`PackA::rows`].
    unsafe fn turned(
        &self,
        blocks: Blocks,
        from: *const u8,
        whole: usize,
        into: [*mut u8; 2],
        padded: usize,
    ) {
        for block in 0..whole {
            let from = from.wrapping_offset(32 * block as isize * self.reader.along_k);
            // SAFETY: promised by the caller.
            unsafe {
                let into = into.map(|into| into.add(block * padded * 64));
                (blocks.turned)(from, self.reader.along_k, into);
            }
        }
    }

    /// One panel: `rows` rows (stored as `padded`) by `k` elements.
    ///
    /// # Safety
    /// As [`PackA::rows`].
    unsafe fn panel(&self, from: *const u8, rows: usize, padded: usize, k: usize, into: *mut u8) {
        let whole = k / 32;
        // SAFETY: promised by the caller; the rows are all there.
        let done = unsafe {
            match (self.blocks, self.reader.how) {
                (Some(blocks), How::LinesAlongK) if rows == padded => {
                    (blocks.along)(from, self.reader.along_other, rows, whole, into, padded * 64);
                    whole
                }
                (Some(blocks), How::LinesAlongOther) if rows == padded && rows.is_multiple_of(16) => {
                    for row in (0..rows).step_by(16) {
                        let from = from.wrapping_offset(row as isize * self.reader.along_other);
                        let into = into.add(row * 64);
                        self.turned(blocks, from, whole, [into, into.add(8 * 64)], padded);
                    }
                    whole
                }
                _ => 0,
            }
        };
        // SAFETY: promised by the caller.
        unsafe { self.blocks_of_16(from, (rows, padded), (32 * done, k), into) }
    }

    /// What is left of a panel from `k0` (a multiple of 32) on.
    ///
    /// # Safety
    /// As [`PackA::rows`].
    unsafe fn blocks_of_16(
        &self,
        from: *const u8,
        (rows, padded): (usize, usize),
        (k0, k): (usize, usize),
        into: *mut u8,
    ) {
        let k_padded = if self.pairs { k.next_multiple_of(32) } else { k.next_multiple_of(16) };
        for k0 in (k0..k_padded).step_by(16) {
            let ks = k.saturating_sub(k0).min(16);
            let (block, half) = if self.pairs { (k0 / 32, k0 / 16 % 2 * 32) } else { (k0 / 16, 0) };
            for row in (0..padded).step_by(16) {
                let offset = k0 as isize * self.reader.along_k + row as isize * self.reader.along_other;
                // SAFETY: as promised by the caller; rows and k beyond the end are not read.
                unsafe {
                    let into = into.add(block * padded * 64 + row * 64 + half);
                    let there = rows.saturating_sub(row).min(16);
                    let from = from.wrapping_offset(offset);
                    self.reader.read(from, (ks, there), into, 64, (padded - row).min(16));
                }
            }
        }
    }
}

/// Copies `count` elements that lie `step` bytes apart.
///
/// # Safety
/// They are readable, and as many writable in a row.
unsafe fn copy_apart<T>(from: *const u8, step: isize, count: usize, into: *mut u8) {
    for at in 0..count {
        // SAFETY: promised by the caller.
        unsafe {
            let value = from.wrapping_offset(at as isize * step).cast::<T>().read();
            into.cast::<T>().add(at).write(value);
        }
    }
}

/// Packs panels of B.
pub(super) struct PackB {
    isa: Isa,
    form: PanelForm,
    source: BSource,
    reader: Option<Reader>,
    block: Option<BlockFn>,
    line: Line,
}

impl PackB {
    pub fn new(isa: Isa, source: &BSource, line: Line, round: bool) -> PackB {
        let into = match (line, round) {
            (Line::Pairs, _) => block::Into::Pairs,
            (_, true) => block::Into::Rounded,
            _ => block::Into::F32,
        };
        let form = match (line, round) {
            (Line::Pairs, _) => PanelForm::Pairs,
            (_, true) => PanelForm::Rounded,
            _ => PanelForm::F32,
        };
        let (reader, block) = match source {
            BSource::Panels(_) => (None, None),
            BSource::Strided(b) => {
                (Some(Reader::new(isa, b.float, b.row, b.column, How::LinesAlongK, into)), None)
            }
            BSource::Weight { tiles, transposed, .. } => {
                let from = match tiles.float {
                    FloatType::F32 => block::From::F32,
                    FloatType::Bf16 => block::From::Pairs,
                    FloatType::F16 => block::From::F16,
                };
                (None, Some(block::mover(isa, from, *transposed, into)))
            }
        };
        PackB { isa, form, source: source.clone(), reader, block, line }
    }

    /// Packs `k` elements from `k0` (a multiple of 32) of `panels` panels from column `n0` (a
    /// multiple of 16), of a product with `n` columns. `base` is where the batch entry's matrix is, unless
    /// it writes its panels itself.
    ///
    /// # Safety
    /// The operand has those elements; `panels * stride` bytes from `into` are writable, and
    /// `stride` is at least `line.panel_bytes(k)`.
    pub unsafe fn panels(
        &self,
        (entry, base): (usize, *const u8),
        (n0, n, panels): (usize, usize, usize),
        (k0, k): (usize, usize),
        into: *mut u8,
        stride: usize,
    ) {
        if let BSource::Panels(source) = &self.source {
            // SAFETY: passed on.
            return unsafe {
                let range = PanelRange { n0, panels, k0, k, into, stride };
                source.panels_of(entry, self.isa, self.form, range)
            };
        }
        let (k_padded, step) = match self.line {
            Line::Pairs => (k.next_multiple_of(32), 32),
            _ => (k.next_multiple_of(16), 64),
        };
        let one = |panel: usize, at: usize| {
            let ks = k.saturating_sub(at).min(16);
            let column = n0 + panel * 16;
            let columns = (n - column).min(16);
            // SAFETY: inside what the caller promises.
            unsafe {
                let into = into.add(panel * stride + at * step);
                match (&self.source, self.reader, self.block) {
                    (BSource::Strided(_), Some(reader), _) => {
                        let offset =
                            (k0 + at) as isize * reader.along_k + column as isize * reader.along_other;
                        reader.read(base.wrapping_offset(offset), (ks, columns), into, 64, 16);
                    }
                    (BSource::Weight { tiles, transposed, .. }, _, Some(block)) => {
                        let exists = if ks == 0 { 0 } else { 16 };
                        let (panel, within) =
                            if *transposed { ((k0 + at) / 16, column) } else { (column / 16, k0 + at) };
                        let from = base.wrapping_add(tiles.offset(panel, within));
                        let from_step = if tiles.float == FloatType::F16 { 32 } else { 64 };
                        block(&Job {
                            from,
                            from_step,
                            lines: exists,
                            lanes: 16,
                            into,
                            into_step: 64,
                            ahead: 2048,
                            into_lines: 16,
                        });
                    }
                    _ => unreachable!("a reader for strided operands, a block for weights"),
                }
            }
        };
        let panel_by_panel = match &self.source {
            BSource::Strided(_) => self.reader.is_some_and(|reader| reader.how == How::LinesAlongK),
            BSource::Weight { transposed, .. } => !transposed,
            BSource::Panels(_) => unreachable!("these have written their panels above"),
        };
        if panel_by_panel {
            for panel in 0..panels {
                for at in (0..k_padded).step_by(16) {
                    one(panel, at);
                }
            }
        } else {
            // Rows of memory cross the panels: 16 of them at a time.
            for at in (0..k_padded).step_by(16) {
                for panel in 0..panels {
                    one(panel, at);
                }
            }
        }
    }
}
