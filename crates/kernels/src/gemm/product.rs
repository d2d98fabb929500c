//! One product as tasks: the loops around the micro-kernel.
//!
//! A *chunk* is a block of `mc` rows by `nc` columns with the whole of k. It walks k in steps of
//! `kc`, with its sums in scratch memory, so a block of B (`kc` x a few panels) stays in the
//! first-level cache while the rows of A pass by. Cutting never changes a bit: each output is one
//! chain over k, whatever the blocks.
//!
//! A is packed by a task of its own when several chunks read the same rows, otherwise by the
//! chunk. Rows that an index chose ([`super::grouped`]) lie anywhere, and so do their outputs: they
//! are packed by way of lines that follow each other, and stored one by one.
//!
//! B is read in place when a packed weight has the right kind of lines, packed by a task when
//! several blocks of rows read it (twenty blocks that pack the same columns cost a tenth of a product),
//! and by the chunk otherwise or when the whole of it would take too much memory.

use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::cut::{Cut, FEW_ROWS};
use super::micro::{self, Call, Line, Micro};
use super::pack::{BSource, PackA, PackB};
use super::store::{Addends, Place, StoreFn, StoreJob, storer};
use super::types::{FloatType, Matrix, Precision};
use crate::layout::prefetch;
use crate::view::Dims;

/// Widening in the loop costs two operations per line and call; more rows than two panels repeat
/// it too often.
const WIDEN_ROWS: usize = 16;
/// Bytes of packed A that exist at one time.
const A_LIMIT: usize = 64 << 20;
/// Bytes of B up to which it is packed by a task; for AMX, whose products are so fast that packing twice would
/// show most, more.
const B_LIMIT: usize = 64 << 20;
const B_LIMIT_TILES: usize = 256 << 20;
/// The same of a packed weight that is read the other way: what a third-level cache holds. Quantized weights and
/// patches are never written out whole: from there they came back slower than each block of rows unpacks them.
const B_LIMIT_WEIGHT: usize = 16 << 20;
/// A product, checked and cut. Operands must outlive the tasks made from it.
pub(super) struct Product {
    isa: Isa,
    batch: Dims,
    m: usize,
    n: usize,
    k: usize,
    a: Matrix,
    b: BSource,
    out: Matrix,
    addends: Vec<Matrix>,
    micro: Micro,
    store: StoreFn,
    pack_a: PackA,
    pack_b: PackB,
    /// Rows are chosen by an index.
    chosen: bool,
    /// B panels are read where a packed weight has them.
    in_place: bool,
    cut: Cut,
    a_shared: bool,
    b_shared: bool,
}

// SAFETY: the pointers are operands of a checked product: inputs are only read, and chunks write
// disjoint places of the output.
unsafe impl Send for Product {}
// SAFETY: as above.
unsafe impl Sync for Product {}

/// What [`Product::new`] takes: checked matrices.
pub(super) struct Request {
    pub isa: Isa,
    pub threads: usize,
    pub precision: Precision,
    pub batch: Dims,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix,
    pub b: BSource,
    pub out: Matrix,
    pub addends: Vec<Matrix>,
    /// Blocks are of [`Chosen`] rows: `m` is how many a matrix of B has in the mean, batch entries are
    /// the matrices of B, and there are no addends.
    pub chosen: bool,
}

/// Rows of A that are multiplied by one matrix of B, wherever they are.
pub(super) struct Chosen<'a> {
    /// Where each row is: bytes behind the start of A, modulo 2⁶⁴.
    pub from: &'a [usize],
    /// Where each row of the output is, likewise.
    pub to: &'a [usize],
}

/// What a chunk computes: some columns of a block of rows, or of rows that were chosen.
pub(super) struct Block<'a> {
    pub entry: usize,
    pub row_block: usize,
    pub column_block: usize,
    pub chosen: Option<Chosen<'a>>,
    pub packed_a: Option<*const u8>,
    pub packed_b: *const u8,
}

impl Product {
    pub fn new(mut request: Request) -> Product {
        let chosen = request.chosen;
        if !chosen {
            request.fold_batch();
            request.turn_if_narrow();
        }
        let Request { isa, threads, precision, batch, m, n, k, mut a, mut b, out, addends, .. } = request;
        // A single row (column) is contiguous across whatever its stride says.
        if m == 1 && !chosen && a.column != a.float.size() as isize {
            a.row = a.float.size() as isize;
        }
        if let BSource::Strided(b) = &mut b
            && n == 1
            && b.row != b.float.size() as isize
        {
            b.column = b.float.size() as isize;
        }
        let pairs = micro::uses_pairs(isa, precision);
        let round = precision == Precision::Bf16;
        let panels_line = if pairs { Line::Pairs } else { Line::F32 };
        let place = match &b {
            BSource::Weight { tiles, transposed: false, .. } => match tiles.float {
                FloatType::F32 if !round => Some(Line::F32),
                FloatType::Bf16 if pairs => Some(Line::Pairs),
                FloatType::Bf16 if m <= WIDEN_ROWS => Some(Line::WidenBf16),
                FloatType::F16 if !round && m <= WIDEN_ROWS => Some(Line::WidenF16),
                _ => None,
            },
            _ => None,
        };
        let micro = micro::select(isa, place.unwrap_or(panels_line));
        let in_place = place.is_some();
        let batches: usize = batch.iter().product();
        let strided = matches!(b, BSource::Strided(_));
        // Whether panels can begin at any multiple of 32 k.
        let fine = match &b {
            BSource::Panels(source) => source.step() <= 32,
            BSource::Strided(_) | BSource::Weight { .. } => true,
        };
        let b_bytes = n.div_ceil(16) * micro.line.panel_bytes(k) * batches;
        let b_limit = match &b {
            BSource::Strided(_) if micro.tile_rows.is_some() => B_LIMIT_TILES,
            BSource::Strided(_) => B_LIMIT,
            BSource::Weight { .. } => B_LIMIT_WEIGHT,
            BSource::Panels(_) => 0,
        };
        let mut cut = Cut::new(&micro, in_place, strided, fine, batches, m, n, k);
        let mut apart = chosen;
        if chosen {
            cut.any_rows(&micro);
        } else {
            if !in_place && b_bytes <= b_limit && m > FEW_ROWS && pairs && micro.tile_rows.is_none() {
                cut.across(&micro, batches, m, n);
            }
            apart = strided && isa == Isa::Avx512 && cut.long(&micro, (batches, threads), m, n, k);
        }
        let lines = Matrix { column: a.float.size() as isize, row: line_step(&cut, a.float), ..a.clone() };
        Product {
            a_shared: m > FEW_ROWS && n > cut.nc && !apart,
            b_shared: !in_place && m > cut.mc && b_bytes <= b_limit && !apart,
            store: storer(isa),
            pack_a: PackA::new(isa, if chosen { &lines } else { &a }, micro.line, round),
            pack_b: PackB::new(isa, &b, panels_line, round),
            isa,
            batch,
            m,
            n,
            k,
            a,
            b,
            out,
            addends,
            micro,
            chosen,
            in_place,
            cut,
        }
    }

    fn batches(&self) -> usize {
        self.batch.iter().product()
    }

    fn row_blocks(&self) -> usize {
        self.m.div_ceil(self.cut.mc)
    }

    pub fn column_blocks(&self) -> usize {
        self.n.div_ceil(self.cut.nc)
    }

    /// Rows that a block has at most, and of which whole multiples are multiplied best.
    pub fn row_units(&self) -> (usize, usize) {
        (self.cut.mc, self.micro.rows)
    }

    /// Batch entries of A that differ.
    fn a_batches(&self) -> usize {
        if self.a.batch.iter().all(|&stride| stride == 0) { 1 } else { self.batches() }
    }

    fn a_block_bytes(&self) -> usize {
        self.cut.mc * PackA::row_bytes(self.micro.line, self.k)
    }

    /// Where the slab of k from `k0` (a multiple of `kc`) starts in a block. Slabs lie together: rows
    /// of whole K would alias in the caches when K is a power of two.
    fn slab(&self, k0: usize) -> usize {
        self.cut.mc * PackA::row_bytes(self.micro.line, k0)
    }

    /// Row blocks (of all batch entries) whose packed A exists at one time.
    fn a_group(&self) -> usize {
        let blocks = self.a_batches() * self.row_blocks();
        (A_LIMIT / self.a_block_bytes().max(1)).clamp(1, blocks.max(1))
    }

    /// Batch entries of B that differ.
    fn b_batches(&self) -> usize {
        match &self.b {
            BSource::Strided(b) if b.batch.iter().any(|&stride| stride != 0) => self.batches(),
            _ => 1,
        }
    }

    /// Where the matrix of a batch entry is, unless it writes its own panels.
    fn b_base(&self, entry: usize) -> *const u8 {
        match &self.b {
            BSource::Strided(b) => b.at(entry, &self.batch),
            BSource::Weight { others: Some(all), .. } => all[entry].pointer,
            BSource::Weight { tiles, .. } => tiles.pointer,
            BSource::Panels(_) => std::ptr::null(),
        }
    }

    fn b_panels(&self) -> usize {
        self.n.div_ceil(16)
    }

    fn b_bytes(&self) -> usize {
        if !self.b_shared {
            return 0;
        }
        self.b_batches() * self.b_panels() * self.micro.line.panel_bytes(self.k)
    }

    /// Where `k` elements from `k0` on of a panel start in the packed B, and how far it is to those of the next panel.
    /// Slabs of k lie together, like A's and for the same reason. For tiles whole panels follow each other: in products
    /// of 2,048 they were a tenth to a fifth faster that way.
    fn b_place(&self, entry: usize, panel: usize, (k0, k): (usize, usize)) -> (usize, usize) {
        let line = self.micro.line;
        let before = entry * self.b_panels() * line.panel_bytes(self.k);
        if self.micro.tile_rows.is_some() {
            let stride = line.panel_bytes(self.k);
            return (before + panel * stride + line.k_offset(k0), stride);
        }
        let stride = line.panel_bytes(k);
        (before + self.b_panels() * line.panel_bytes(k0) + panel * stride, stride)
    }

    pub fn workspace_bytes(&self) -> usize {
        let a = if self.a_shared { self.a_group() * self.a_block_bytes() } else { 0 };
        a + self.b_bytes()
    }

    /// Appends the product's tasks.
    ///
    /// # Safety
    /// The operands are valid while the tasks live; `workspace` is aligned to 64 bytes, as long as
    /// `workspace_bytes`, and used by nothing else while they run.
    pub unsafe fn tasks<'a>(self: &Arc<Self>, workspace: *mut u8, list: &mut Vec<Box<dyn Task + 'a>>) {
        if self.batches() * self.m * self.n == 0 {
            return;
        }
        let packed_b = workspace;
        let packed_a = workspace.wrapping_add(self.b_bytes());
        let stage =
            |first, blocks, what| Stage { product: self.clone(), packed_a, packed_b, first, blocks, what };
        let blocks = self.a_batches() * self.row_blocks();
        let group = if self.a_shared { self.a_group() } else { blocks };
        for first in (0..blocks).step_by(group) {
            let here = group.min(blocks - first);
            let with_b = self.b_shared && first == 0;
            if self.a_shared || with_b {
                list.push(Box::new(stage(first, here, What::Pack { with_b })));
            }
            list.push(Box::new(stage(first, here, What::Multiply)));
        }
    }

    /// Packs `k` elements from `k0` of row block `block` (over batch entries and rows): a slab, its
    /// panels one after another.
    ///
    /// # Safety
    /// `into` has room for a block.
    unsafe fn pack_rows(&self, block: usize, (k0, k): (usize, usize), into: *mut u8) {
        let (entry, block) = (block / self.row_blocks(), block % self.row_blocks());
        let first = block * self.cut.mc;
        let rows = self.cut.mc.min(self.m - first);
        let offset = first as isize * self.a.row + k0 as isize * self.a.column;
        let from = self.a.at(entry, &self.batch).wrapping_offset(offset);
        let padded = |here: usize| self.micro.padded(here, rows);
        // SAFETY: the rows are inside A; the caller promises the room.
        unsafe { self.pack_a.rows(from, (rows, self.micro.rows), padded, k, into) }
    }

    /// Packs `k` elements from `k0` of the rows of a block, by way of `lines` if they were chosen.
    ///
    /// # Safety
    /// `into` has room for the block's slab, and `lines` for a panel of lines.
    unsafe fn pack_block(&self, block: &Block, (k0, k): (usize, usize), lines: *mut u8, into: *mut u8) {
        let Some(chosen) = &block.chosen else {
            // SAFETY: passed on.
            return unsafe { self.pack_rows(self.row_unit(block), (k0, k), into) };
        };
        let from = self.a.pointer.wrapping_offset(k0 as isize * self.a.column);
        let padded = |here: usize| self.micro.padded(here, chosen.from.len());
        // SAFETY: the rows are inside A; the caller promises the room.
        unsafe {
            self.pack_a.chosen(
                (from, self.a.column, chosen.from),
                self.micro.rows,
                padded,
                k,
                (lines, line_step(&self.cut, self.a.float)),
                into,
            )
        }
    }

    /// The number of a block's rows over batch entries and row blocks of A.
    fn row_unit(&self, block: &Block) -> usize {
        if self.a_batches() == 1 {
            block.row_block
        } else {
            block.entry * self.row_blocks() + block.row_block
        }
    }

    /// The slab of A that a chunk's thread is likely to pack after this one: the block and its range of k.
    fn slab_after(&self, block: &Block, k0: usize) -> Option<(usize, (usize, usize))> {
        let kc = self.cut.kc;
        let unit = self.row_unit(block);
        if k0 + kc < self.k {
            return Some((unit, (k0 + kc, kc.min(self.k - k0 - kc))));
        }
        let more = block.chosen.is_none() && unit % self.row_blocks() + 1 < self.row_blocks();
        more.then(|| (unit + 1, (0, kc.min(self.k))))
    }

    /// Asks for part `part.0` of `part.1` of the elements of A that [`Product::pack_rows`] would read.
    fn ask_for_rows(&self, block: usize, (k0, k): (usize, usize), part: (usize, usize)) {
        let (entry, block) = (block / self.row_blocks(), block % self.row_blocks());
        let first = block * self.cut.mc;
        let rows = self.cut.mc.min(self.m - first);
        let size = self.a.float.size();
        let (runs, length, step) = if self.a.column == size as isize {
            (rows, k, self.a.row)
        } else if self.a.row == size as isize {
            (k, rows, self.a.column)
        } else {
            return;
        };
        let offset = first as isize * self.a.row + k0 as isize * self.a.column;
        let from = self.a.at(entry, &self.batch).wrapping_offset(offset);
        for run in runs * part.0 / part.1..runs * (part.0 + 1) / part.1 {
            prefetch(from.wrapping_offset(run as isize * step), length * size);
        }
    }

    /// The same of rows that were chosen.
    fn ask_for_chosen(&self, chosen: &Chosen, (k0, k): (usize, usize), part: (usize, usize)) {
        let size = self.a.float.size();
        if self.a.column != size as isize {
            return;
        }
        let count = chosen.from.len();
        for &offset in &chosen.from[count * part.0 / part.1..count * (part.0 + 1) / part.1] {
            prefetch(self.a.pointer.wrapping_add(offset + k0 * size), k * size);
        }
    }

    /// Stores sums of rows of a block, from `row` on.
    ///
    /// # Safety
    /// As [`StoreFn`], for the block's own rows.
    unsafe fn put(&self, block: &Block, row: usize, job: StoreJob) {
        let Some(chosen) = &block.chosen else {
            // SAFETY: passed on.
            return unsafe { (self.store)(&job) };
        };
        for (line, &to) in chosen.to[row..row + job.rows].iter().enumerate() {
            // SAFETY: a row of the job; its place in the output is this chunk's own.
            unsafe {
                let out = Place { pointer: job.out.pointer.wrapping_add(to), ..job.out };
                (self.store)(&StoreJob { sums: job.sums.add(line * 16), rows: 1, out, ..job });
            }
        }
    }

    /// Computes one block of the output.
    ///
    /// # Safety
    /// As [`Product::tasks`]; the packing tasks have run. Rows that were chosen, at most `mc`, are inside A and the
    /// output, and their matrix is one of B's.
    pub unsafe fn multiply(&self, block: &Block, scratch: &Scratch) {
        let &Block { entry, row_block, column_block, packed_a, packed_b, .. } = block;
        let Cut { mc, nc, kc } = self.cut;
        let micro = &self.micro;
        let (m0, n0) = (row_block * mc, column_block * nc);
        let rows = block.chosen.as_ref().map_or(mc.min(self.m - m0), |chosen| chosen.from.len());
        let columns = nc.min(self.n - n0);
        let panels = columns.div_ceil(16);
        let step = micro.panels_for(rows.min(micro.rows));
        let k_blocks = self.k.div_ceil(kc).max(1);
        let tile = micro.rows * 16;
        let row_panels = rows.div_ceil(micro.rows);
        // Few rows in one block of k read B straight through, from memory.
        let straight = k_blocks == 1 && rows <= FEW_ROWS;
        // Finished sums are stored at once, while they are in the first-level cache. Only products in tiles are so
        // fast that stores of a few columns would hold them up: there, whole rows are stored at the end.
        let later = micro.tile_rows.is_some() && !straight;
        // Sums of one block of k are finished at once; else those of the whole chunk wait for the next block.
        let all = later || k_blocks > 1;
        let sums = if all { row_panels * panels } else { step };
        let acc = scratch.take::<f32>(sums * tile).as_mut_ptr();
        let own_a = match packed_a {
            Some(_) => std::ptr::null_mut(),
            None => {
                let bytes = PackA::row_bytes(micro.line, kc.min(self.k));
                scratch.take::<u8>(row_panels * micro.rows * bytes).as_mut_ptr()
            }
        };
        let lines = match block.chosen {
            Some(_) => {
                scratch.take::<u8>(micro.rows * line_step(&self.cut, self.a.float) as usize).as_mut_ptr()
            }
            None => std::ptr::null_mut(),
        };
        let own_b = !self.in_place && !self.b_shared;
        let b_scratch = match own_b {
            true => scratch.take::<u8>(panels * micro.line.panel_bytes(kc)).as_mut_ptr(),
            false => std::ptr::null_mut(),
        };
        let b_base = self.b_base(entry);
        let panels_in_place: *const u8 = match &self.b {
            BSource::Weight { tiles, .. } if self.in_place => b_base.wrapping_add(tiles.offset(n0 / 16, 0)),
            _ => std::ptr::null(),
        };
        // Of rows that were chosen each has a place of its own.
        let across = |row: usize| if self.chosen { 0 } else { row };
        let out = Place::of(&self.out, entry, &self.batch).moved(across(m0), n0);
        let addends = Addends::of(&self.addends, entry, &self.batch, m0, n0);

        // SAFETY: packed panels and tiles have the sizes computed above; the output block is this
        // chunk's own.
        unsafe {
            let _tiles = micro.tile_rows.map(|_| super::tile_scope(rows));
            for k_block in 0..k_blocks {
                let k0 = k_block * kc;
                let k = kc.min(self.k - k0);
                let steps = if micro.line == Line::Pairs { k.div_ceil(2) } else { k };
                let a_row_bytes = PackA::row_bytes(micro.line, k);
                let slab = match packed_a {
                    Some(block) => block.wrapping_add(self.slab(k0)),
                    None => own_a as *const u8,
                };
                if packed_a.is_none() {
                    self.pack_block(block, (k0, k), lines, own_a);
                }
                // What will be packed next comes from memory while this slab is multiplied.
                let next = if packed_a.is_some() || straight { None } else { self.slab_after(block, k0) };
                let calls = panels.div_ceil(step) * row_panels;
                let (b, b_stride) = if own_b {
                    let (range, stride) = ((n0, self.n, panels), micro.line.panel_bytes(kc));
                    self.pack_b.panels((entry, b_base), range, (k0, k), b_scratch, stride);
                    (b_scratch as *const u8, stride)
                } else if self.b_shared {
                    let entry = if self.b_batches() == 1 { 0 } else { entry };
                    let (at, stride) = self.b_place(entry, n0 / 16, (k0, k));
                    (packed_b.wrapping_add(at), stride)
                } else {
                    let stride = micro.line.panel_bytes(self.k);
                    (panels_in_place.wrapping_add(micro.line.k_offset(k0)), stride)
                };
                for panel in (0..panels).step_by(step) {
                    let wide = step.min(panels - panel);
                    for row_panel in 0..row_panels {
                        let row = row_panel * micro.rows;
                        let here = micro.rows.min(rows - row);
                        let padded = micro.padded(here, rows);
                        let a = slab.wrapping_add(row * a_row_bytes);
                        let at = if all { row_panel * panels + panel } else { 0 };
                        let sums = acc.add(at * tile);
                        if !straight && !own_b {
                            // The next panels come from far away: fetch a share of them per call.
                            let bytes = micro.line.panel_bytes(k) / row_panels;
                            for p in 0..wide {
                                let next = b.wrapping_add((panel + wide + p) * b_stride + row_panel * bytes);
                                prefetch(next, bytes);
                            }
                        }
                        if let Some((unit, range)) = next {
                            let part = (panel / step * row_panels + row_panel, calls);
                            match &block.chosen {
                                Some(chosen) => self.ask_for_chosen(chosen, range, part),
                                None => self.ask_for_rows(unit, range, part),
                            }
                        }
                        micro.get(here, wide)(&Call {
                            steps,
                            a,
                            a_block: padded * 64,
                            b: b.wrapping_add(panel * b_stride),
                            b_panel: b_stride,
                            acc: sums,
                            acc_panel: tile,
                            load: k_block > 0,
                            stream: self.in_place && straight,
                        });
                        if k_block + 1 == k_blocks && !later {
                            let column = panel * 16;
                            self.put(
                                block,
                                row,
                                StoreJob {
                                    sums,
                                    panel: tile,
                                    rows: here,
                                    columns: (wide * 16).min(columns - column),
                                    out: out.moved(across(row), column),
                                    addends: addends.moved(row, column).as_slice(),
                                },
                            );
                        }
                    }
                }
            }
            if later {
                for row_panel in 0..row_panels {
                    let row = row_panel * micro.rows;
                    self.put(
                        block,
                        row,
                        StoreJob {
                            sums: acc.add(row_panel * panels * tile),
                            panel: tile,
                            rows: micro.rows.min(rows - row),
                            columns,
                            out: out.moved(across(row), 0),
                            addends: addends.moved(row, 0).as_slice(),
                        },
                    );
                }
            }
        }
    }
}

/// Bytes from one line of `kc` elements to the next: an odd number of cache lines, so that they do not share the same
/// few sets of a cache.
fn line_step(cut: &Cut, float: FloatType) -> isize {
    ((cut.kc * float.size()).div_ceil(64) | 1) as isize * 64
}

impl Request {
    /// Batch dimensions over which B stays the same are rows of A that follow each other: a
    /// `[batch, m, k]` by `[k, n]` product is one of `batch * m` rows.
    fn fold_batch(&mut self) {
        while let Some(&size) = self.batch.last() {
            let axis = self.batch.len() - 1;
            let b_stride = match &self.b {
                BSource::Strided(b) => b.batch[axis],
                BSource::Weight { .. } | BSource::Panels(_) => 0,
            };
            let m = self.m as isize;
            let mut walkers: Vec<&mut Matrix> = vec![&mut self.a, &mut self.out];
            walkers.extend(self.addends.iter_mut());
            let folds = |matrix: &Matrix| m == 1 || size == 1 || matrix.row * m == matrix.batch[axis];
            if (b_stride != 0 && size != 1) || !walkers.iter().all(|matrix| folds(matrix)) {
                return;
            }
            for matrix in walkers {
                let stride = matrix.batch.pop().expect("every matrix has all batch dimensions");
                if m == 1 && size != 1 {
                    matrix.row = stride;
                }
            }
            if let BSource::Strided(b) = &mut self.b {
                b.batch.pop();
            }
            self.batch.pop();
            self.m *= size;
        }
    }

    /// With fewer than 16 columns and more rows the product is turned around (Cᵀ = Bᵀ·Aᵀ, the
    /// same chains): lanes are columns, and most would be empty.
    fn turn_if_narrow(&mut self) {
        let BSource::Strided(b) = &self.b else { return };
        if self.n >= 16 || self.m <= self.n {
            return;
        }
        let b = b.clone();
        let a = std::mem::replace(&mut self.a, b.transposed());
        self.b = BSource::Strided(a.transposed());
        self.out = self.out.clone().transposed();
        for addend in &mut self.addends {
            *addend = addend.clone().transposed();
        }
        std::mem::swap(&mut self.m, &mut self.n);
    }
}

impl Line {
    /// Bytes in a panel before element `k` (a multiple of 32).
    fn k_offset(self, k: usize) -> usize {
        if self == Line::F32 { k * 64 } else { k * 32 }
    }
}

enum What {
    Pack { with_b: bool },
    Multiply,
}

/// A range of row blocks, packed or multiplied.
struct Stage {
    product: Arc<Product>,
    packed_a: *mut u8,
    packed_b: *mut u8,
    first: usize,
    blocks: usize,
    what: What,
}

// SAFETY: the workspace is the product's own while its tasks run; packing chunks write disjoint
// parts of it, multiplying chunks only read it.
unsafe impl Send for Stage {}
// SAFETY: as above.
unsafe impl Sync for Stage {}

/// B panels that one packing chunk takes at most, and at least: the lines that it reads should not be too short.
const PANELS_PER_CHUNK: usize = 8;
const FEW_PANELS: usize = 4;
/// Packing chunks of B to have for the threads, rather than long lines.
const PACKING_CHUNKS: usize = 8;

impl Stage {
    /// Products per row block: column blocks, times batch entries if they share A.
    fn columns(&self) -> usize {
        let product = &self.product;
        let entries = if product.a_batches() == 1 { product.batches() } else { 1 };
        entries * product.column_blocks()
    }

    fn a_chunks(&self) -> usize {
        if self.product.a_shared { self.blocks } else { 0 }
    }

    /// Panels that a packing chunk of B takes.
    fn panels_a_chunk(&self) -> usize {
        (self.product.b_panels() / PACKING_CHUNKS).clamp(FEW_PANELS, PANELS_PER_CHUNK)
    }
}

impl Task for Stage {
    fn chunks(&self) -> usize {
        let product = &self.product;
        match self.what {
            What::Pack { with_b: false } => self.a_chunks(),
            What::Pack { with_b: true } => {
                let groups = product.b_panels().div_ceil(self.panels_a_chunk());
                self.a_chunks() + product.b_batches() * groups
            }
            What::Multiply => self.blocks * self.columns(),
        }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let product = &*self.product;
        // Chunks that pack A and B take turns. A thread takes neighbouring chunks, so it then packs some of both, and
        // of B roughly those columns that it multiplies: they are in its caches.
        let a_chunks = self.a_chunks();
        let of_a = |chunk: usize| chunk * a_chunks / self.chunks();
        match self.what {
            What::Pack { .. } if of_a(chunk) < of_a(chunk + 1) => {
                let chunk = of_a(chunk);
                for k0 in (0..product.k).step_by(product.cut.kc) {
                    let k = product.cut.kc.min(product.k - k0);
                    // SAFETY: the workspace has room for `a_group` blocks.
                    unsafe {
                        let into = self.packed_a.add(chunk * product.a_block_bytes() + product.slab(k0));
                        product.pack_rows(self.first + chunk, (k0, k), into);
                    }
                }
            }
            What::Pack { .. } => {
                let chunk = chunk - of_a(chunk);
                let most = self.panels_a_chunk();
                let groups = product.b_panels().div_ceil(most);
                let (entry, first) = (chunk / groups, chunk % groups * most);
                let panels = most.min(product.b_panels() - first);
                let base = product.b_base(entry);
                for k0 in (0..product.k).step_by(product.cut.kc) {
                    let k = product.cut.kc.min(product.k - k0);
                    let (at, stride) = product.b_place(entry, first, (k0, k));
                    let range = (first * 16, product.n, panels);
                    // SAFETY: the workspace has room for all slabs.
                    unsafe {
                        let into = self.packed_b.add(at);
                        product.pack_b.panels((entry, base), range, (k0, k), into, stride)
                    }
                }
            }
            What::Multiply => {
                let (column, block) = (chunk / self.blocks, chunk % self.blocks);
                let unit = self.first + block;
                let (entry, column) = if product.a_batches() == 1 {
                    (column / product.column_blocks(), column % product.column_blocks())
                } else {
                    (unit / product.row_blocks(), column)
                };
                let packed =
                    product.a_shared.then(|| self.packed_a.wrapping_add(block * product.a_block_bytes()));
                let block = Block {
                    entry,
                    row_block: unit % product.row_blocks(),
                    column_block: column,
                    chosen: None,
                    packed_a: packed.map(|pointer| pointer as *const u8),
                    packed_b: self.packed_b,
                };
                // SAFETY: promised to `Product::tasks`.
                unsafe { product.multiply(&block, scratch) }
            }
        }
    }

    fn name(&self) -> &'static str {
        match self.what {
            What::Pack { .. } => "gemm pack",
            What::Multiply => "gemm",
        }
    }
}

impl std::fmt::Debug for Product {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "product {:?} x {}x{}x{} on {}: {:?} {:?}, A {}, B {}",
            self.batch,
            self.m,
            self.n,
            self.k,
            self.isa,
            self.micro.line,
            self.cut,
            if self.a_shared { "by a task" } else { "by chunks" },
            if self.in_place {
                "in place"
            } else if self.b_shared {
                "by a task"
            } else {
                "by chunks"
            },
        )
    }
}
