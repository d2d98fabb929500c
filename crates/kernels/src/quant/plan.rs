//! Products as tasks: which kernels a precision needs, and the checks before anything runs.

use std::ops::Range;
use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Lines, Scratch, Task};
use smallvec::{SmallVec, smallvec};

use super::fast::FastTask;
use super::few::FewTask;
use super::float::Dequantized;
use super::form::Numbers;
use super::sink::{Epilogue, Sink};
use super::stage::{Stage, Staged};
use super::tile::TILE_ROWS;
use super::weight::QuantWeight;
use crate::error::check_tier;
use crate::gemm::{self, FloatView, Gemm, check_part};
use crate::{KernelError, ViewMut};

const FORWARD: &str = "quantized product";
const TRANSPOSED: &str = "transposed quantized product";

/// How exactly a product is computed (docs/NUMERICS.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Activations as int8 per group: for inference. With weights of 8-bit floats, [`Precision::Bf16`]. Scales of 4-bit
    /// floats must be below 2¹²⁶: the bias of larger ones is infinite.
    Fast,
    /// Activations and dequantized weights in bf16, f32 sums: for training bf16 models.
    Bf16,
    /// Activations and dequantized weights in f32.
    Exact,
}

impl QuantWeight {
    /// y = x·wᵀ with int8 activations, from staged rows `[m, in]` to `[m, out]`. The task may run
    /// once the staging task has. The output may alias the residual, nothing else.
    pub fn product<'a>(
        &'a self,
        x: &Staged<'a>,
        out: ViewMut<'a, f32>,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<Box<dyn Task + 'a>, KernelError> {
        check_tier(FORWARD, isa)?;
        if self.layout.numbers == Numbers::Fp8 {
            let message = "weights of 8-bit floats have no product with int8 activations: use plan_forward";
            return Err(KernelError::new(FORWARD, message));
        }
        let wanted = self.group_size();
        if x.group != wanted {
            let message =
                format!("rows quantized in groups of {}, this weight has groups of {wanted}", x.group);
            return Err(KernelError::new(FORWARD, message));
        }
        let sink = self.sink(x.shape(), out, epilogue)?;
        Ok(Box::new(FastTask::new(self, x.clone(), sink, isa)))
    }

    /// The checked output of a product of rows `[m, k]`.
    fn sink<'a>(
        &self,
        [m, width]: [usize; 2],
        out: ViewMut<'a, f32>,
        epilogue: Epilogue<'a>,
    ) -> Result<Sink<'a>, KernelError> {
        let [n, k] = self.shape();
        if width != k {
            return Err(expects(FORWARD, [n, k], k, width));
        }
        Sink::new(FORWARD, out, epilogue, [m, n])
    }

    /// y = x·wᵀ: x `[m, in]`, out `[m, out]`. The output may alias the residual, nothing else.
    pub fn plan_forward<'a>(
        &'a self,
        x: impl Into<FloatView<'a>>,
        out: ViewMut<'a, f32>,
        precision: Precision,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<ProductPlan<'a>, KernelError> {
        let x = x.into();
        // Codes that are no integers are multiplied as bf16, which holds them exactly.
        let precision = match precision {
            Precision::Fast if self.layout.numbers == Numbers::Fp8 => Precision::Bf16,
            other => other,
        };
        if precision != Precision::Fast {
            return self.plan_part(0..self.out, x, out, false, precision, epilogue, isa);
        }
        let stage = Stage::new(x, self.group_size(), isa)?;
        let sink = self.sink(stage.shape(), out, epilogue)?;
        Ok(ProductPlan(Plan::Int8(Box::new(Int8Plan { stage, products: smallvec![(self, sink)], isa }))))
    }

    /// dx = dy·w for training through a frozen weight: dy `[m, out]`, dx `[m, in]`. Gradients are
    /// not quantized: the precision is bf16 or exact.
    pub fn plan_transposed<'a>(
        &'a self,
        dy: impl Into<FloatView<'a>>,
        dx: ViewMut<'a, f32>,
        precision: Precision,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<ProductPlan<'a>, KernelError> {
        self.plan_part(0..self.out, dy.into(), dx, true, precision, epilogue, isa)
    }

    /// Either product, in bf16 or exact, with some of the outputs alone, from a multiple of 16 on:
    /// those of a tile of a vocabulary, for instance.
    pub fn plan_part<'a>(
        &'a self,
        outputs: Range<usize>,
        x: FloatView<'a>,
        out: ViewMut<'a, f32>,
        transposed: bool,
        precision: Precision,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<ProductPlan<'a>, KernelError> {
        let kernel = if transposed { TRANSPOSED } else { FORWARD };
        check_tier(kernel, isa)?;
        let precision = match precision {
            Precision::Exact => gemm::Precision::Exact,
            Precision::Bf16 => gemm::Precision::Bf16,
            Precision::Fast => {
                let message = "precision fast is for inference: expected bf16 or exact";
                return Err(KernelError::new(kernel, message));
            }
        };
        check_part(kernel, &outputs, self.out)?;
        let (rows, columns) = (outputs.len(), self.inner);
        let (k, n) = if transposed { (rows, columns) } else { (columns, rows) };
        let &[m, width] = x.shape() else {
            return Err(KernelError::new(kernel, format!("expected rows [m, {k}], got {:?}", x.shape())));
        };
        if width != k {
            return Err(expects(kernel, [rows, columns], k, width));
        }
        if out.shape() != [m, n] {
            let message = format!("expected an output [{m}, {n}], got {:?}", out.shape());
            return Err(KernelError::new(kernel, message));
        }
        if !transposed && FewTask::takes(&x, precision, isa) {
            let sink = Sink::new(kernel, out, epilogue, [m, n])?;
            let tiles = (outputs.start / TILE_ROWS, outputs.len().div_ceil(TILE_ROWS));
            let task = FewTask::new(self, tiles, x, precision, sink, isa);
            return Ok(ProductPlan(Plan::Few(Box::new(task))));
        }
        let epilogue = gemm::Epilogue {
            bias: epilogue.bias.map(FloatView::F32),
            residual: epilogue.residual.map(FloatView::F32),
            accumulate: false,
        };
        let source = Arc::new(Dequantized::new(self, outputs, transposed));
        let gemm = Gemm::with_panels(x, (source, k), out.into(), precision, &epilogue, isa)?;
        Ok(ProductPlan(Plan::Float(gemm)))
    }
}

fn expects(kernel: &'static str, [n, k]: [usize; 2], wanted: usize, got: usize) -> KernelError {
    KernelError::new(kernel, format!("a weight [{n}, {k}] expects rows of {wanted} values, got {got}"))
}

/// A checked product: ask for the workspace, then for the tasks.
pub struct ProductPlan<'a>(Plan<'a>);

enum Plan<'a> {
    Int8(Box<Int8Plan<'a>>),
    Few(Box<FewTask<'a>>),
    Float(Gemm<'a>),
}

/// Staging and the products that read what is staged.
struct Int8Plan<'a> {
    stage: Stage<'a>,
    products: SmallVec<[(&'a QuantWeight, Sink<'a>); 1]>,
    isa: Isa,
}

impl<'a> ProductPlan<'a> {
    /// Bytes of workspace that [`ProductPlan::tasks`] needs.
    pub fn workspace_bytes(&self) -> usize {
        match &self.0 {
            Plan::Int8(plan) => plan.stage.workspace_bytes(),
            Plan::Few(_) => 0,
            Plan::Float(gemm) => gemm.workspace_bytes(),
        }
    }

    /// Takes the products of another plan in, if both quantize the same rows in the same way: they are quantized
    /// once, and the products run side by side. Else gives the other plan back.
    ///
    /// The other plan must not read what this one writes.
    pub fn join(&mut self, other: ProductPlan<'a>) -> Result<(), ProductPlan<'a>> {
        match (&mut self.0, other.0) {
            (Plan::Int8(plan), Plan::Int8(other))
                if plan.stage.same(&other.stage) && plan.isa == other.isa =>
            {
                plan.products.extend(other.products);
                Ok(())
            }
            (_, other) => Err(ProductPlan(other)),
        }
    }

    /// Appends the plan's tasks, in order.
    ///
    /// # Safety
    /// `workspace` is aligned to 64 and has [`ProductPlan::workspace_bytes`] bytes, which for `'a`
    /// nothing else uses.
    pub unsafe fn tasks(self, workspace: *mut u8, list: &mut Vec<Box<dyn Task + 'a>>) {
        // SAFETY: passed on.
        unsafe {
            match self.0 {
                Plan::Int8(plan) => plan.tasks(workspace, list),
                Plan::Few(task) => list.push(task),
                Plan::Float(gemm) => gemm.tasks(workspace, list),
            }
        }
    }
}

impl<'a> Int8Plan<'a> {
    /// # Safety
    /// As [`ProductPlan::tasks`].
    unsafe fn tasks(self, workspace: *mut u8, list: &mut Vec<Box<dyn Task + 'a>>) {
        // SAFETY: passed on.
        let (stage, staged) = unsafe { self.stage.bind(workspace) };
        list.push(stage);
        let products = self.products.into_iter();
        let products = products.map(|(weight, sink)| FastTask::new(weight, staged.clone(), sink, self.isa));
        list.push(Box::new(Together(products.collect())));
    }
}

/// Products of the same staged rows, with no barrier between them.
///
/// Where rows are cut into blocks, the chunks of a block come one after the other, so that a thread keeps its rows in
/// its cache from one product to the next.
struct Together<'a>(Vec<FastTask<'a>>);

impl<'a> Together<'a> {
    /// The product that a chunk belongs to, and its chunk of it.
    fn find(&self, chunk: usize) -> Option<(&FastTask<'a>, usize)> {
        let blocks = self.0.first()?.row_blocks();
        let per_block = self.chunks() / blocks;
        if per_block == 0 {
            return None;
        }
        let (block, mut rest) = (chunk / per_block, chunk % per_block);
        for task in &self.0 {
            let chunks = task.chunks() / blocks;
            if rest < chunks {
                return Some((task, block * chunks + rest));
            }
            rest -= chunks;
        }
        None
    }
}

impl Task for Together<'_> {
    fn chunks(&self) -> usize {
        self.0.iter().map(|task| task.chunks()).sum()
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        if let Some((task, chunk)) = self.find(chunk) {
            task.run(chunk, scratch);
        }
    }

    fn begins_with(&self, chunk: usize) -> Lines {
        self.find(chunk).map_or_else(Lines::default, |(task, chunk)| task.begins_with(chunk))
    }

    fn name(&self) -> &'static str {
        self.0.first().map_or("nothing", |task| task.name())
    }
}
