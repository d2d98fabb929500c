//! Products of rows by quantized matrices that indices name: experts.
//!
//! In bf16 and f32 they are `gemm`'s, from panels that are dequantized as it asks for them. With int8 activations rows
//! are quantized once, as for one weight, while routing finds out which matrix has which rows ([`crate::routing`]);
//! then the quantized rows of each block are put together, and each block is a product of its own by the kernels of
//! one weight. So a row has the bits of its product alone.

use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::fast::FastTask;
use super::float::Dequantized;
use super::form::Numbers;
use super::plan::Precision;
use super::sink::Sink;
use super::stage::{ROW_LANES, Stage, Staged};
use super::weight::QuantWeight;
use crate::error::check_tier;
use crate::gemm::{self, FloatView, Grouped, PanelForm, PanelRange, PanelSource};
use crate::plan::Workspace;
use crate::routing::{Routing, RowBlock, Table, check_apart};
use crate::{KernelError, View, ViewMut};

const NAME: &str = "gather_qmm";

/// Rows of a block of int8 products at most, and what they are a multiple of: rows are multiplied six at a time by
/// vectors and sixteen by AMX tiles.
const BLOCK_ROWS: usize = 240;
const BLOCK_UNIT: usize = 48;
/// Chunks that the outputs of a block are cut into.
const PARTS: usize = 8;

/// Quantized weights of one shape and format, of which an index names one.
#[derive(Debug)]
pub struct QuantExperts(Vec<QuantWeight>);

impl QuantExperts {
    /// Checks that there is one, and that all have the shape and the format of the first.
    pub fn new(weights: Vec<QuantWeight>) -> Result<QuantExperts, KernelError> {
        let of = |weight: &QuantWeight| (weight.shape(), weight.layout.form());
        match weights.first() {
            Some(first) if weights.iter().all(|weight| of(weight) == of(first)) => Ok(QuantExperts(weights)),
            _ => Err(KernelError::new(NAME, "experts are weights of one shape and format, at least one")),
        }
    }

    /// All of them.
    pub fn weights(&self) -> &[QuantWeight] {
        &self.0
    }

    /// `[experts, out, in]`.
    pub fn shape(&self) -> [usize; 3] {
        let [out, inner] = self.0[0].shape();
        [self.0.len(), out, inner]
    }

    /// Plans `out[entry] = x[left[entry]]·wᵀ` with the weight w that `right[entry]` names: x `[lefts, m, in]`, out
    /// `[entries, m, out]` of contiguous rows. `transposed`, it is x·w: x `[lefts, m, out]`, out `[entries, m, in]`,
    /// in bf16 or exact.
    pub fn plan<'a>(
        &'a self,
        x: FloatView<'a>,
        indices: (&View<'a, u32>, &View<'a, u32>),
        out: ViewMut<'a, f32>,
        transposed: bool,
        precision: Precision,
        isa: Isa,
    ) -> Result<ExpertsPlan<'a>, KernelError> {
        check_tier(NAME, isa)?;
        let [count, rows, columns] = self.shape();
        let (k, n) = if transposed { (rows, columns) } else { (columns, rows) };
        let precision = match precision {
            // As of one weight: codes that are no integers have no int8 product.
            Precision::Fast if !transposed && self.0[0].layout.numbers == Numbers::Fp8 => {
                gemm::Precision::Bf16
            }
            Precision::Fast if transposed => {
                let message = "precision fast is for inference: expected bf16 or exact";
                return Err(KernelError::new(NAME, message));
            }
            Precision::Fast => return self.plan_int8(x, indices, out, isa),
            Precision::Bf16 => gemm::Precision::Bf16,
            Precision::Exact => gemm::Precision::Exact,
        };
        let panels = self.0.iter().map(|weight| Dequantized::new(weight, 0..rows, transposed));
        let source = (Arc::new(Panels(panels.collect())) as Arc<dyn PanelSource>, [count, k, n]);
        let plan = Grouped::with_panels(x, source, indices, out.into(), precision, isa)?;
        Ok(ExpertsPlan(Plan::Float(plan)))
    }

    fn plan_int8<'a>(
        &'a self,
        x: FloatView<'a>,
        indices: (&View<'a, u32>, &View<'a, u32>),
        out: ViewMut<'a, f32>,
        isa: Isa,
    ) -> Result<ExpertsPlan<'a>, KernelError> {
        let [count, n, k] = self.shape();
        let &[lefts, m, width] = x.shape() else {
            return Err(KernelError::new(NAME, format!("expected rows [.., m, {k}], got {:?}", x.shape())));
        };
        if width != k {
            let message = format!("weights [{n}, {k}] expect rows of {k} values, got {width}");
            return Err(KernelError::new(NAME, message));
        }
        let routing = Routing::new(NAME, indices, m, [lefts, count])?.cut(BLOCK_ROWS, BLOCK_UNIT);
        if out.shape() != [routing.entries(), m, n] || (n > 1 && out.strides()[2] != 1) {
            let message = format!(
                "expected an output [{}, {m}, {n}] of contiguous rows, got {:?} with strides {:?}",
                routing.entries(),
                out.shape(),
                out.strides()
            );
            return Err(KernelError::new(NAME, message));
        }
        check_apart(NAME, out.shape(), out.strides())?;
        let stage = Stage::new(as_rows(&x)?, self.0[0].group_size(), isa)?;
        Ok(ExpertsPlan(Plan::Int8(Box::new(Int8 { experts: self, stage, routing, m, out, isa }))))
    }
}

/// `[lefts, m, k]` as `[lefts · m, k]`.
fn as_rows<'a>(x: &FloatView<'a>) -> Result<FloatView<'a>, KernelError> {
    let (shape, strides) = (x.shape(), x.strides());
    let step = if shape[1] == 1 { strides[0] } else { strides[1] };
    if shape[0] > 1 && shape[1] > 1 && strides[0] != step * shape[1] as isize {
        let message = format!("rows must lie equally far apart, got strides {strides:?}: copy them first");
        return Err(KernelError::new(NAME, message));
    }
    let (shape, strides) = ([shape[0] * shape[1], shape[2]], [step, strides[2]]);
    // SAFETY: the same elements.
    Ok(unsafe {
        match x {
            FloatView::F32(view) => FloatView::F32(View::from_raw(view.pointer(), &shape, &strides)),
            FloatView::Bf16(view) => FloatView::Bf16(View::from_raw(view.pointer(), &shape, &strides)),
            FloatView::F16(view) => FloatView::F16(View::from_raw(view.pointer(), &shape, &strides)),
        }
    })
}

/// The tiles of all experts as the second operands of a float product.
#[derive(Debug)]
struct Panels(Vec<Dequantized>);

impl PanelSource for Panels {
    unsafe fn panels(&self, isa: Isa, form: PanelForm, range: PanelRange) {
        // SAFETY: passed on.
        unsafe { self.panels_of(0, isa, form, range) }
    }

    unsafe fn panels_of(&self, matrix: usize, isa: Isa, form: PanelForm, range: PanelRange) {
        // SAFETY: passed on.
        unsafe { self.0[matrix].panels(isa, form, range) }
    }
}

/// A checked product with experts: ask for the workspace, then for the tasks.
pub struct ExpertsPlan<'a>(Plan<'a>);

enum Plan<'a> {
    Int8(Box<Int8<'a>>),
    Float(Grouped<'a>),
}

impl<'a> ExpertsPlan<'a> {
    /// Bytes of workspace that [`ExpertsPlan::tasks`] needs.
    pub fn workspace_bytes(&self) -> usize {
        match &self.0 {
            Plan::Int8(plan) => plan.places().bytes,
            Plan::Float(plan) => plan.workspace_bytes(),
        }
    }

    /// Appends the plan's tasks, in order. An index that is out of range ends the first one with a message that says
    /// so.
    ///
    /// # Safety
    /// `workspace` is aligned to 64 and has [`ExpertsPlan::workspace_bytes`] bytes, which for `'a`
    /// nothing else uses.
    pub unsafe fn tasks(self, workspace: *mut u8, list: &mut Vec<Box<dyn Task + 'a>>) {
        // SAFETY: passed on.
        unsafe {
            match self.0 {
                Plan::Int8(plan) => plan.tasks(workspace, list),
                Plan::Float(plan) => plan.tasks(workspace, list),
            }
        }
    }
}

struct Int8<'a> {
    experts: &'a QuantExperts,
    stage: Stage<'a>,
    routing: Routing,
    m: usize,
    out: ViewMut<'a, f32>,
    isa: Isa,
}

/// Where things begin in the workspace, behind the rows as they were staged.
struct Places {
    table: usize,
    /// Rows put together: values, their d, their e.
    values: usize,
    scales: usize,
    sums: usize,
    bytes: usize,
}

impl<'a> Int8<'a> {
    /// Rows that there is room for, so that each block begins at a multiple of [`ROW_LANES`].
    fn room(&self) -> usize {
        (self.routing.rows() + ROW_LANES * self.routing.blocks()).next_multiple_of(ROW_LANES)
    }

    fn places(&self) -> Places {
        let [_, k] = self.stage.shape();
        let scale_bytes = self.room() * (k / self.stage.group()) * size_of::<f32>();
        let table = self.stage.workspace_bytes().next_multiple_of(64);
        let values = table + self.routing.bytes().next_multiple_of(64);
        let scales = values + self.room() * self.stage.stride();
        let sums = scales + scale_bytes;
        Places { table, values, scales, sums, bytes: sums + scale_bytes }
    }

    /// # Safety
    /// As [`ExpertsPlan::tasks`].
    unsafe fn tasks(self, workspace: *mut u8, list: &mut Vec<Box<dyn Task + 'a>>) {
        if self.routing.entries() == 0 {
            return;
        }
        let (places, room) = (self.places(), self.room());
        let Int8 { experts, stage, routing, m, out, isa } = self;
        // SAFETY: the first bytes of the workspace.
        let (staging, staged) = unsafe { stage.bind(workspace) };
        let table = Table(workspace.wrapping_add(places.table));
        let at = |offset: usize| workspace.wrapping_add(offset);
        let together =
            staged.elsewhere(room, at(places.values), at(places.scales).cast(), at(places.sums).cast());
        list.push(Box::new(Beside([staging, routing.task(table)])));
        let shared = Shared { routing, table, m, from: staged, rows: together };
        list.push(Box::new(Gather(shared.clone())));
        let out = (Workspace(out.pointer().cast()), [out.strides()[0], out.strides()[1]]);
        list.push(Box::new(Multiply { shared, experts, out, isa }));
    }
}

/// Two tasks with no barrier between them.
struct Beside<'a>([Box<dyn Task + 'a>; 2]);

impl Task for Beside<'_> {
    fn chunks(&self) -> usize {
        self.0.iter().map(|task| task.chunks()).sum()
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let [first, second] = &self.0;
        match chunk.checked_sub(first.chunks()) {
            None => first.run(chunk, scratch),
            Some(chunk) => second.run(chunk, scratch),
        }
    }

    fn name(&self) -> &'static str {
        self.0[0].name()
    }
}

#[derive(Clone)]
struct Shared<'a> {
    routing: Routing,
    table: Table,
    /// Rows of an entry.
    m: usize,
    /// Rows as they were staged, and put together by matrices.
    from: Staged<'a>,
    rows: Staged<'a>,
}

impl Shared<'_> {
    /// Where the rows of a block begin. From one block to the next it is more than its rows, and a multiple of
    /// [`ROW_LANES`].
    fn begin(&self, number: usize, block: &RowBlock) -> usize {
        ROW_LANES * (number + block.first / ROW_LANES)
    }
}

/// Puts the rows of each block together; a chunk is a group of [`ROW_LANES`] rows, whose d and e lie side by side.
struct Gather<'a>(Shared<'a>);

const GROUPS: usize = BLOCK_ROWS / ROW_LANES;

impl Task for Gather<'_> {
    fn chunks(&self) -> usize {
        self.0.routing.blocks() * GROUPS
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        let Shared { routing, table, m, from, rows } = &self.0;
        let (number, skipped) = (chunk / GROUPS, chunk % GROUPS * ROW_LANES);
        // SAFETY: routing has run.
        let Some(block) = (unsafe { routing.block(*table, number) }) else { return };
        let begin = self.0.begin(number, &block) + skipped;
        let here = block.rows.saturating_sub(skipped).min(ROW_LANES);
        for lane in 0..here {
            // SAFETY: a row of the block, whose index routing has checked; its place is this chunk's.
            unsafe {
                let (_, row, left) = routing.place(*table, block.first + skipped + lane);
                from.copy_row(left * m + row, rows, begin + lane);
            }
        }
        if here > 0 {
            // SAFETY: places of this chunk.
            unsafe { rows.clear_scales(begin + here..begin + ROW_LANES) };
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }
}

struct Multiply<'a> {
    shared: Shared<'a>,
    experts: &'a QuantExperts,
    /// The output, and its steps from entry to entry and from row to row.
    out: (Workspace, [isize; 2]),
    isa: Isa,
}

impl Task for Multiply<'_> {
    fn chunks(&self) -> usize {
        self.shared.routing.blocks() * PARTS
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let Shared { routing, table, rows, .. } = &self.shared;
        let (number, part) = (chunk / PARTS, chunk % PARTS);
        // SAFETY: routing has run.
        let Some(block) = (unsafe { routing.block(*table, number) }) else { return };
        let (out, [entry_step, row_step]) = &self.out;
        let mut places = [0isize; BLOCK_ROWS];
        let places = &mut places[..block.rows];
        for (at, place) in places.iter_mut().enumerate() {
            // SAFETY: a row of the block.
            let (entry, row, _) = unsafe { routing.place(*table, block.first + at) };
            *place = entry as isize * entry_step + row as isize * row_step;
        }
        let weight = &self.experts.0[block.matrix];
        // SAFETY: rows of the output, of which each chunk writes columns of its own.
        let sink = unsafe { Sink::scattered(out.f32s(0), places, weight.shape()[0]) };
        let rows = rows.part(self.shared.begin(number, &block), block.rows);
        let product = FastTask::new(weight, rows, sink, self.isa);
        let all = product.chunks();
        for chunk in all * part / PARTS..all * (part + 1) / PARTS {
            scratch.reset();
            product.run(chunk, scratch);
        }
    }

    fn name(&self) -> &'static str {
        "quantized product, int8"
    }
}
