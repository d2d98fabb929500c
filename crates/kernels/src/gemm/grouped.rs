//! Products of rows by matrices that indices name: what tokens need that are routed to experts.
//!
//! `out[entry] = a[left[entry]] · b[right[entry]]`, each of the left matrices having `m` rows, most often one. Rows
//! for the same matrix of `b` are multiplied together, so it is read and packed once for all of a block of them.
//! A row has the bits of its product alone: it is a chain over k that knows nothing of its neighbours.
//!
//! Indices are values of a task that may run just before, so the cut is made when the task runs: *routing* counts
//! the entries of each matrix, lists them matrix by matrix in their order, and cuts their rows into blocks. How many
//! blocks there can be at most is known before, by shape; those that there are not are chunks that return at once.

use std::marker::PhantomData;
use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::pack::BSource;
use super::product::{Block, Chosen, Product, Request};
use super::types::{FloatView, FloatViewMut, Matrix, Precision};
use crate::view::Dims;
use crate::{KernelError, View};

const NAME: &str = "gather_mm";

/// What to multiply: `out[entry] = a[left[entry]] · b[right[entry]]` for every entry.
#[derive(Clone, Debug)]
pub struct GroupedSpec<'a> {
    /// `[lefts, m, k]`.
    pub a: FloatView<'a>,
    /// `[rights, k, n]`.
    pub b: FloatView<'a>,
    /// Which matrix of `a`: `[entries]`, checked when the task runs.
    pub left: View<'a, u32>,
    /// Which matrix of `b`, likewise.
    pub right: View<'a, u32>,
    /// `[entries, m, n]`.
    pub out: FloatViewMut<'a>,
    /// How products are formed.
    pub precision: Precision,
    /// The tier: [`Isa::get`] unless a test says otherwise.
    pub isa: Isa,
}

/// A checked grouped product, ready to give its tasks.
pub struct Grouped<'a> {
    product: Arc<Product>,
    routes: Routes,
    operands: PhantomData<&'a mut [u8]>,
}

impl<'a> Grouped<'a> {
    /// Checks the shapes and chooses blocks.
    pub fn plan(spec: &GroupedSpec<'a>) -> Result<Grouped<'a>, KernelError> {
        let (a, b, out) = (&spec.a, &spec.b, &spec.out);
        let ([lefts, m, k], [rights, _, n], &[entries]) =
            (three(a.shape())?, three(b.shape())?, spec.left.shape())
        else {
            return Err(KernelError::new(
                NAME,
                format!("expected a list of indices, got {:?}", spec.left.shape()),
            ));
        };
        if spec.right.shape() != [entries] {
            let message = format!("{entries} left indices, and right ones of shape {:?}", spec.right.shape());
            return Err(KernelError::new(NAME, message));
        }
        if out.shape().first() != Some(&entries) {
            let message = format!("{entries} indices and an output of {:?}", out.shape());
            return Err(KernelError::new(NAME, message));
        }
        let matrix = |what, bytes, shape: &[usize], strides: &[isize], count, size| {
            Matrix::of(what, bytes, shape, strides, &[count], size)
        };
        let a = matrix("a", (a.bytes(), a.float_type()), a.shape(), a.strides(), lefts, (m, k))?;
        let b = matrix("b", (b.bytes(), b.float_type()), b.shape(), b.strides(), rights, (k, n))?;
        let out =
            matrix("out", (out.bytes(), out.float_type()), out.shape(), out.strides(), entries, (m, n))?;
        let rows = entries.checked_mul(m).filter(|_| u32::try_from(entries).is_ok());
        let Some(rows) = rows else {
            return Err(KernelError::new(NAME, format!("{entries} entries of {m} rows are too many")));
        };
        let most = rights.min(entries);
        let mut routes = Routes {
            left: Indices::of(&spec.left),
            right: Indices::of(&spec.right),
            entries,
            m,
            counts: [lefts, rights],
            a: [a.batch[0], a.row],
            out: [out.batch[0], out.row],
            block: 0,
            panel: 0,
            blocks: 0,
        };
        // Rows have places of their own: batch entries of the product are the matrices of b.
        let still = |mut matrix: Matrix| {
            matrix.batch[0] = 0;
            matrix
        };
        // A tier that the machine lacks would be an illegal instruction.
        let isa = if Isa::available().contains(&spec.isa) { spec.isa } else { Isa::get() };
        let batch: Dims = [rights][..].into();
        let product = Product::new(Request {
            isa,
            threads: super::MANY_THREADS,
            precision: spec.precision,
            batch,
            m: rows.div_ceil(most.max(1)),
            n,
            k,
            a: still(a),
            b: BSource::Strided(b),
            out: still(out),
            addends: Vec::new(),
            chosen: true,
        });
        (routes.block, routes.panel) = product.row_units();
        // The last block of a matrix may be smaller, and there are no more of these than matrices.
        routes.blocks = if n == 0 { 0 } else { rows / routes.block + if rows == 0 { 0 } else { most } };
        Ok(Grouped { product: Arc::new(product), routes, operands: PhantomData })
    }

    /// Bytes of workspace that the tasks need.
    pub fn workspace_bytes(&self) -> usize {
        self.routes.words() * size_of::<usize>()
    }

    /// Appends the tasks: in this order, with barriers between. An index that is out of range ends the first one with
    /// a message that says so.
    ///
    /// # Safety
    /// `workspace` is aligned to 64 bytes, [`Grouped::workspace_bytes`] long, and left alone by others from the first
    /// of these tasks to the last.
    pub unsafe fn tasks(&self, workspace: *mut u8, list: &mut Vec<Box<dyn Task + 'a>>) {
        if self.routes.blocks == 0 && self.routes.entries == 0 {
            return;
        }
        let table = Table(workspace.cast());
        list.push(Box::new(Route { routes: self.routes.clone(), table }));
        list.push(Box::new(Multiply { product: self.product.clone(), routes: self.routes.clone(), table }));
    }
}

fn three(shape: &[usize]) -> Result<[usize; 3], KernelError> {
    shape
        .try_into()
        .map_err(|_| KernelError::new(NAME, format!("expected a list of matrices, got {shape:?}")))
}

/// Indices where they are.
#[derive(Clone, Copy)]
struct Indices {
    pointer: *const u32,
    stride: isize,
}

impl Indices {
    fn of(view: &View<u32>) -> Indices {
        Indices { pointer: view.pointer(), stride: view.strides()[0] }
    }

    /// # Safety
    /// There is such an entry.
    unsafe fn at(self, entry: usize) -> usize {
        // SAFETY: promised by the caller.
        unsafe { self.pointer.offset(entry as isize * self.stride).read() as usize }
    }
}

/// Which rows belong to which matrix, as far as it is known before the indices are.
#[derive(Clone)]
struct Routes {
    left: Indices,
    right: Indices,
    entries: usize,
    /// Rows of an entry.
    m: usize,
    /// Matrices on the left, on the right.
    counts: [usize; 2],
    /// Bytes from matrix to matrix and from row to row.
    a: [isize; 2],
    out: [isize; 2],
    /// Rows of a block at most, and what they are a multiple of unless they end it.
    block: usize,
    panel: usize,
    /// Blocks that there can be.
    blocks: usize,
}

// SAFETY: the indices are borrowed for as long as the plan and its tasks, and only read.
unsafe impl Send for Routes {}
// SAFETY: as above.
unsafe impl Sync for Routes {}

/// A block of rows for one matrix: how many, the first one among the rows of all entries in the order of their
/// matrices, and the matrix.
const BLOCK_WORDS: usize = 3;

impl Routes {
    /// Blocks, the entries in their order, and a counter for each matrix.
    fn words(&self) -> usize {
        self.blocks * BLOCK_WORDS + self.entries + self.counts[1]
    }

    /// Finds out. The order is that of the matrices, and for each that of its entries.
    ///
    /// # Safety
    /// The table is this task's alone.
    unsafe fn fill(&self, table: Table) -> Result<(), KernelError> {
        // SAFETY: the workspace has so many words, whose contents don't matter: they are zeroed.
        let words = unsafe {
            table.0.write_bytes(0, self.words());
            std::slice::from_raw_parts_mut(table.0, self.words())
        };
        let (blocks, rest) = words.split_at_mut(self.blocks * BLOCK_WORDS);
        let (order, counts) = rest.split_at_mut(self.entries);
        for entry in 0..self.entries {
            // SAFETY: there is such an entry.
            let (x, y) = unsafe { (self.left.at(entry), self.right.at(entry)) };
            let [lefts, rights] = self.counts;
            if x >= lefts || y >= rights {
                let message = format!("indices {x} of {lefts} and {y} of {rights} matrices");
                return Err(KernelError::new(NAME, message));
            }
            counts[y] += 1;
        }
        let (mut before, mut free) = (0, blocks.chunks_exact_mut(BLOCK_WORDS));
        for (matrix, count) in counts.iter_mut().enumerate() {
            let rows = *count * self.m;
            // As few blocks as can be, of nearly the same size.
            let even = rows.div_ceil(rows.div_ceil(self.block).max(1)).max(1).next_multiple_of(self.panel);
            // Without columns there are no blocks.
            for (first, block) in (0..rows).step_by(even).zip(&mut free) {
                block.copy_from_slice(&[even.min(rows - first), before * self.m + first, matrix]);
            }
            let entries = std::mem::replace(count, before);
            before += entries;
        }
        for entry in 0..self.entries {
            // SAFETY: there is such an entry.
            let place = &mut counts[unsafe { self.right.at(entry) }];
            order[*place] = entry;
            *place += 1;
        }
        Ok(())
    }
}

/// What routing finds, in the workspace.
#[derive(Clone, Copy)]
struct Table(*mut usize);

// SAFETY: one task of one chunk writes it, and the next ones read it.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

struct Route {
    routes: Routes,
    table: Table,
}

impl Task for Route {
    fn chunks(&self) -> usize {
        1
    }

    fn run(&self, _: usize, _: &mut Scratch) {
        // SAFETY: the only chunk.
        if let Err(error) = unsafe { self.routes.fill(self.table) } {
            // Not `panic!`: bad data is no bug, and no backtrace belongs on stderr.
            std::panic::resume_unwind(Box::new(error.to_string()));
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }
}

struct Multiply {
    product: Arc<Product>,
    routes: Routes,
    table: Table,
}

impl Task for Multiply {
    fn chunks(&self) -> usize {
        self.routes.blocks * self.product.column_blocks()
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let routes = &self.routes;
        // The blocks of columns of a block of rows follow each other: its rows are then in a cache.
        let columns = self.product.column_blocks();
        let (block, column_block) = (chunk / columns, chunk % columns);
        // SAFETY: routing has filled the table, and nobody writes it any more.
        let words = unsafe { std::slice::from_raw_parts(self.table.0.cast_const(), routes.words()) };
        let [rows, first, matrix] = words[block * BLOCK_WORDS..][..BLOCK_WORDS] else { return };
        if rows == 0 {
            return;
        }
        let order = &words[routes.blocks * BLOCK_WORDS..][..routes.entries];
        let (from, to) = (scratch.take::<usize>(rows), scratch.take::<usize>(rows));
        for (at, (from, to)) in from.iter_mut().zip(to.iter_mut()).enumerate() {
            let (entry, row) = (order[(first + at) / routes.m], ((first + at) % routes.m) as isize);
            // SAFETY: the order lists entries.
            let left = unsafe { routes.left.at(entry) } as isize;
            let place = |index: isize, [matrix, line]: [isize; 2]| (index * matrix + row * line) as usize;
            (*from, *to) = (place(left, routes.a), place(entry as isize, routes.out));
        }
        let block = Block {
            entry: matrix,
            row_block: 0,
            column_block,
            chosen: Some(Chosen { from, to }),
            packed_a: None,
            packed_b: std::ptr::null(),
        };
        // SAFETY: routing has checked the indices; rows of different blocks, and columns of the same, are disjoint.
        unsafe { self.product.multiply(&block, scratch) }
    }

    fn name(&self) -> &'static str {
        NAME
    }
}
