//! Products of rows by matrices that indices name: what tokens need that are routed to experts.
//!
//! `out[entry] = a[left[entry]] · b[right[entry]]`, each of the left matrices having `m` rows, most often one. Rows
//! for the same matrix of `b` are multiplied together ([`crate::routing`]), so it is read and packed once for all of a
//! block of them. A row has the bits of its product alone: it is a chain over k that knows nothing of its neighbours.

use std::marker::PhantomData;
use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::pack::{BSource, PanelSource};
use super::product::{Block, Chosen, Product, Request};
use super::types::{FloatView, FloatViewMut, Matrix, Precision};
use super::weight::{FloatWeight, Tiles};
use crate::error::check_tier;
use crate::routing::{Routing, Table, check_apart};
use crate::view::Dims;
use crate::{KernelError, View};

const NAME: &str = "gather_mm";

/// What to multiply: `out[entry] = a[left[entry]] · b[right[entry]]` for every entry.
#[derive(Clone, Debug)]
pub struct GroupedSpec<'a> {
    /// `[lefts, m, k]`.
    pub a: FloatView<'a>,
    /// Matrices `[k, n]`.
    pub b: Matrices<'a>,
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

/// The matrices on the right.
#[derive(Clone, Debug)]
pub enum Matrices<'a> {
    /// `[rights, k, n]`.
    Plain(FloatView<'a>),
    /// Weights `[out, in]` that were packed: k runs over `in` and n over `out`, or `transposed`, the other way around.
    Packed {
        /// The weights.
        experts: &'a FloatExperts,
        /// dX = dY·W in place of Y = X·Wᵀ.
        transposed: bool,
    },
}

/// Packed float weights of one shape and type, of which an index names one.
#[derive(Clone, Debug)]
pub struct FloatExperts(Arc<[FloatWeight]>);

impl FloatExperts {
    /// Checks that there is one, and that all have the shape and the type of the first.
    pub fn new(weights: Vec<FloatWeight>) -> Result<FloatExperts, KernelError> {
        let of = |weight: &FloatWeight| (weight.out(), weight.inputs(), weight.float_type());
        match weights.first() {
            Some(first) if weights.iter().all(|weight| of(weight) == of(first)) => {
                Ok(FloatExperts(weights.into()))
            }
            _ => Err(KernelError::new(NAME, "experts are weights of one shape and type, at least one")),
        }
    }

    /// All of them.
    pub fn weights(&self) -> &[FloatWeight] {
        &self.0
    }

    /// `[experts, out, in]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.0.len(), self.0[0].out(), self.0[0].inputs()]
    }
}

/// A checked grouped product, ready to give its tasks.
pub struct Grouped<'a> {
    product: Arc<Product>,
    routing: Routing,
    /// Bytes from matrix to matrix and from row to row.
    a: [isize; 2],
    out: [isize; 2],
    operands: PhantomData<&'a mut [u8]>,
}

impl<'a> Grouped<'a> {
    /// Checks the shapes and chooses blocks.
    pub fn plan(spec: &GroupedSpec<'a>) -> Result<Grouped<'a>, KernelError> {
        let (b, shape) = match &spec.b {
            Matrices::Plain(b) => {
                let shape = three(b.shape())?;
                let [rights, k, n] = shape;
                let bytes = (b.bytes(), b.float_type());
                let matrix = Matrix::of("b", bytes, b.shape(), b.strides(), &[rights], (k, n))?;
                (BSource::Strided(matrix), shape)
            }
            &Matrices::Packed { experts, transposed } => {
                let [count, out, inputs] = experts.shape();
                let (k, n) = if transposed { (out, inputs) } else { (inputs, out) };
                let all: Arc<[Tiles]> = experts.0.iter().map(|weight| weight.tiles().clone()).collect();
                let b = BSource::Weight { tiles: all[0].clone(), transposed, others: Some(all) };
                (b, [count, k, n])
            }
        };
        let indices = (&spec.left, &spec.right);
        Self::with_source(spec.a.clone(), (b, shape), indices, spec.out.clone(), spec.precision, spec.isa)
    }

    /// Plans the product by `[rights, k, n]` matrices that write their own panels. What `b` reads must live as long
    /// as `'a`.
    pub(crate) fn with_panels(
        a: FloatView<'a>,
        (b, shape): (Arc<dyn PanelSource>, [usize; 3]),
        indices: (&View<'a, u32>, &View<'a, u32>),
        out: FloatViewMut<'a>,
        precision: Precision,
        isa: Isa,
    ) -> Result<Grouped<'a>, KernelError> {
        Self::with_source(a, (BSource::Panels(b), shape), indices, out, precision, isa)
    }

    fn with_source(
        a: FloatView<'a>,
        (b, [rights, k, n]): (BSource, [usize; 3]),
        indices: (&View<'a, u32>, &View<'a, u32>),
        out: FloatViewMut<'a>,
        precision: Precision,
        isa: Isa,
    ) -> Result<Grouped<'a>, KernelError> {
        check_tier(NAME, isa)?;
        let [lefts, m, _] = three(a.shape())?;
        let routing = Routing::new(NAME, indices, m, [lefts, rights])?;
        let entries = routing.entries();
        if out.shape().first() != Some(&entries) {
            let message = format!("{entries} indices and an output of {:?}", out.shape());
            return Err(KernelError::new(NAME, message));
        }
        check_apart(NAME, out.shape(), out.strides())?;
        let bytes = (a.bytes(), a.float_type());
        let mut a = Matrix::of("a", bytes, a.shape(), a.strides(), &[lefts], (m, k))?;
        let bytes = (out.bytes(), out.float_type());
        let mut out = Matrix::of("out", bytes, out.shape(), out.strides(), &[entries], (m, n))?;
        // Rows have places of their own: the batch entries of the product are the matrices of b.
        let steps = |matrix: &mut Matrix| [std::mem::take(&mut matrix.batch[0]), matrix.row];
        let (a_steps, out_steps) = (steps(&mut a), steps(&mut out));
        let batch: Dims = [rights][..].into();
        let product = Product::new(Request {
            isa,
            threads: super::MANY_THREADS,
            precision,
            batch,
            m: routing.mean(),
            n,
            k,
            a,
            b,
            out,
            addends: Vec::new(),
            chosen: true,
        });
        let (most, unit) = product.row_units();
        let (product, routing) = (Arc::new(product), routing.cut(most, unit));
        Ok(Grouped { product, routing, a: a_steps, out: out_steps, operands: PhantomData })
    }

    /// Bytes of workspace that the tasks need.
    pub fn workspace_bytes(&self) -> usize {
        self.routing.bytes()
    }

    /// Appends the tasks: in this order, with barriers between. An index that is out of range ends the first one with
    /// a message that says so.
    ///
    /// # Safety
    /// `workspace` is aligned to 64 bytes, [`Grouped::workspace_bytes`] long, and left alone by others from the first
    /// of these tasks to the last.
    pub unsafe fn tasks(&self, workspace: *mut u8, list: &mut Vec<Box<dyn Task + 'a>>) {
        if self.routing.entries() == 0 {
            return;
        }
        let table = Table(workspace);
        list.push(self.routing.task(table));
        let (product, routing) = (self.product.clone(), self.routing.clone());
        list.push(Box::new(Multiply { product, routing, a: self.a, out: self.out, table }));
    }
}

fn three(shape: &[usize]) -> Result<[usize; 3], KernelError> {
    shape
        .try_into()
        .map_err(|_| KernelError::new(NAME, format!("expected a list of matrices, got {shape:?}")))
}

struct Multiply {
    product: Arc<Product>,
    routing: Routing,
    a: [isize; 2],
    out: [isize; 2],
    table: Table,
}

impl Task for Multiply {
    fn chunks(&self) -> usize {
        self.routing.blocks() * self.product.column_blocks()
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        // The blocks of columns of a block of rows follow each other: its rows are then in a cache.
        let columns = self.product.column_blocks();
        // SAFETY: routing has run.
        let Some(block) = (unsafe { self.routing.block(self.table, chunk / columns) }) else { return };
        let (from, to) = (scratch.take::<usize>(block.rows), scratch.take::<usize>(block.rows));
        for (at, (from, to)) in from.iter_mut().zip(to.iter_mut()).enumerate() {
            // SAFETY: a row of the block.
            let (entry, row, left) = unsafe { self.routing.place(self.table, block.first + at) };
            let place = |index: usize, [matrix, line]: [isize; 2]| {
                (index as isize * matrix + row as isize * line) as usize
            };
            (*from, *to) = (place(left, self.a), place(entry, self.out));
        }
        let block = Block {
            entry: block.matrix,
            row_block: 0,
            column_block: chunk % columns,
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
