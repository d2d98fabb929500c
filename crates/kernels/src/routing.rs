//! Which rows belong to which matrix, where indices say so that are values of a task that may run just before.
//!
//! The cut is made when the task runs: *routing* counts the entries of each matrix, lists them matrix by matrix in
//! their order, and cuts their rows into blocks. How many blocks there can be at most is known before, by shape; those
//! that there are not are chunks that return at once.

use mica_threads::{Scratch, Task};

use crate::{KernelError, View};

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
    /// There is such an entry, and the indices are alive.
    unsafe fn at(self, entry: usize) -> usize {
        // SAFETY: promised by the caller.
        unsafe { self.pointer.offset(entry as isize * self.stride).read() as usize }
    }
}

/// What is known of the blocks before the indices are. They have to live as long as its tasks.
#[derive(Clone)]
pub(crate) struct Routing {
    name: &'static str,
    left: Indices,
    right: Indices,
    entries: usize,
    /// Rows of an entry.
    m: usize,
    /// Matrices on the left, on the right.
    counts: [usize; 2],
    /// Rows of a block at most, and what they are a multiple of unless they end it.
    units: (usize, usize),
    blocks: usize,
}

// SAFETY: the indices are borrowed for as long as the tasks, and only read.
unsafe impl Send for Routing {}
// SAFETY: as above.
unsafe impl Sync for Routing {}

/// Rows for one matrix.
#[derive(Clone, Copy)]
pub(crate) struct RowBlock {
    pub matrix: usize,
    /// The first one among the rows of all entries, in the order of their matrices.
    pub first: usize,
    /// At least one.
    pub rows: usize,
}

/// Where routing leaves what it finds: [`Routing::bytes`] of workspace.
#[derive(Clone, Copy)]
pub(crate) struct Table(pub *mut u8);

// SAFETY: one task of one chunk writes it, and later ones read it.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// Words of a block in the table.
const BLOCK_WORDS: usize = 3;

/// Refuses an output some of whose elements share a place: chunks would write them at the same time.
pub(crate) fn check_apart(name: &'static str, shape: &[usize], strides: &[isize]) -> Result<(), KernelError> {
    // Nothing shares no place, whatever its strides say.
    if shape.contains(&0) {
        return Ok(());
    }
    let mut steps: Vec<(usize, usize)> =
        shape.iter().zip(strides).map(|(&size, stride)| (stride.unsigned_abs(), size)).collect();
    steps.sort_unstable();
    let mut span = 1;
    for (step, size) in steps {
        if size > 1 && step < span {
            let message = format!("elements of the output overlap: strides {strides:?} of {shape:?}");
            return Err(KernelError::new(name, message));
        }
        span += size.saturating_sub(1) * step;
    }
    Ok(())
}

impl Routing {
    /// Checks that there are two lists of as many indices, of entries with `m` rows each, into `counts` matrices.
    pub fn new(
        name: &'static str,
        (left, right): (&View<u32>, &View<u32>),
        m: usize,
        counts: [usize; 2],
    ) -> Result<Routing, KernelError> {
        let (&[entries], &[others]) = (left.shape(), right.shape()) else {
            let message =
                format!("expected lists of indices, got {:?} and {:?}", left.shape(), right.shape());
            return Err(KernelError::new(name, message));
        };
        if entries != others {
            let message = format!("{entries} indices for the left side and {others} for the right one");
            return Err(KernelError::new(name, message));
        }
        if entries.checked_mul(m).is_none_or(|rows| rows > isize::MAX as usize / 64) {
            return Err(KernelError::new(name, format!("{entries} entries of {m} rows are too many")));
        }
        let (left, right) = (Indices::of(left), Indices::of(right));
        Ok(Routing { name, left, right, entries, m, counts, units: (1, 1), blocks: 0 })
    }

    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Rows of all entries.
    pub fn rows(&self) -> usize {
        self.entries * self.m
    }

    /// Matrices that have rows, at most.
    fn most(&self) -> usize {
        self.counts[1].min(self.entries)
    }

    /// Rows of a matrix that has some, in the mean if all have.
    pub fn mean(&self) -> usize {
        self.rows().div_ceil(self.most().max(1)).max(1)
    }

    /// Cuts blocks of up to `most` rows, a multiple of `unit`, each with a multiple of `unit` but for a matrix's last.
    pub fn cut(mut self, most: usize, unit: usize) -> Routing {
        self.units = (most, unit);
        // The last block of a matrix may be smaller, and there are no more of these than matrices.
        self.blocks = if self.rows() == 0 { 0 } else { self.rows() / most + self.most() };
        self
    }

    /// Blocks that there can be.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Blocks, the entries in their order, and a counter for each matrix.
    fn words(&self) -> usize {
        self.blocks * BLOCK_WORDS + self.entries + self.counts[1]
    }

    /// Bytes of the table.
    pub fn bytes(&self) -> usize {
        self.words() * size_of::<usize>()
    }

    /// The task that fills the table. An index that is out of range ends it, with a message that says so.
    pub fn task(&self, table: Table) -> Box<dyn Task> {
        Box::new(Route { routing: self.clone(), table })
    }

    /// # Safety
    /// The table is this call's alone.
    unsafe fn fill(&self, table: Table) -> Result<(), KernelError> {
        let words = table.0.cast::<usize>();
        // SAFETY: the workspace has so many words; once they are zeros they are numbers.
        let words = unsafe {
            words.write_bytes(0, self.words());
            std::slice::from_raw_parts_mut(words, self.words())
        };
        let (blocks, rest) = words.split_at_mut(self.blocks * BLOCK_WORDS);
        let (order, counts) = rest.split_at_mut(self.entries);
        for entry in 0..self.entries {
            // SAFETY: there is such an entry.
            let (x, y) = unsafe { (self.left.at(entry), self.right.at(entry)) };
            let [lefts, rights] = self.counts;
            if x >= lefts || y >= rights {
                let message = format!("indices {x} of {lefts} and {y} of {rights} matrices");
                return Err(KernelError::new(self.name, message));
            }
            counts[y] += 1;
        }
        let (most, unit) = self.units;
        let (mut before, mut free) = (0, blocks.chunks_exact_mut(BLOCK_WORDS));
        for (matrix, count) in counts.iter_mut().enumerate() {
            let rows = *count * self.m;
            // As few blocks as can be, of nearly the same size.
            let even = rows.div_ceil(rows.div_ceil(most).max(1)).max(1).next_multiple_of(unit);
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

    /// What the task found of a block, if there is such a block.
    ///
    /// # Safety
    /// The task has run.
    pub unsafe fn block(&self, table: Table, block: usize) -> Option<RowBlock> {
        // SAFETY: promised by the caller; nobody writes the table any more.
        let words = unsafe { std::slice::from_raw_parts(table.0.cast::<usize>().cast_const(), self.words()) };
        let block = words[..self.blocks * BLOCK_WORDS].get(block * BLOCK_WORDS..)?;
        let &[rows, first, matrix, ..] = block else { return None };
        (rows > 0).then_some(RowBlock { matrix, first, rows })
    }

    /// The entry of a row in the order of the matrices, which row of the entry it is, and its matrix on the left.
    ///
    /// # Safety
    /// The task has run, and there is such a row.
    pub unsafe fn place(&self, table: Table, row: usize) -> (usize, usize, usize) {
        // SAFETY: promised by the caller.
        unsafe {
            let order = table.0.cast::<usize>().add(self.blocks * BLOCK_WORDS);
            let entry = order.add(row / self.m).read();
            (entry, row % self.m, self.left.at(entry))
        }
    }
}

struct Route {
    routing: Routing,
    table: Table,
}

impl Task for Route {
    fn chunks(&self) -> usize {
        1
    }

    fn run(&self, _: usize, _: &mut Scratch) {
        // SAFETY: the only chunk.
        if let Err(error) = unsafe { self.routing.fill(self.table) } {
            // Not `panic!`: bad data is no bug, and no backtrace belongs on stderr.
            std::panic::resume_unwind(Box::new(error.to_string()));
        }
    }

    fn name(&self) -> &'static str {
        self.routing.name
    }
}
