//! Products as tasks: which staging a precision needs, and the checks before anything runs.

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::fast::FastTask;
use super::float::FloatTask;
use super::sink::{Epilogue, Sink};
use super::stage::{Form, Rows, Stage, Staged};
use super::tier;
use super::weight::QuantWeight;
use crate::{KernelError, ViewMut};

const FORWARD: &str = "quantized product";
const TRANSPOSED: &str = "transposed quantized product";

/// How exactly a product is computed (docs/NUMERICS.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Activations as int8 per group: for inference.
    Fast,
    /// Activations and dequantized weights in bf16, f32 sums: for training bf16 models.
    Bf16,
    /// Activations and dequantized weights in f32.
    Exact,
}

impl QuantWeight {
    /// The form that activations take for a product with this weight.
    pub fn form(&self, precision: Precision) -> Form {
        match precision {
            Precision::Fast => Form::Int8 { group: self.spec().group_size() },
            Precision::Bf16 => Form::Bf16,
            Precision::Exact => Form::F32,
        }
    }

    /// y = x·wᵀ from staged rows `[m, in]` to `[m, out]`, in the precision of their form. The task
    /// may run once the staging task has. The output may alias the residual, nothing else.
    pub fn product<'a>(
        &'a self,
        x: &Staged<'a>,
        out: ViewMut<'a, f32>,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<Box<dyn Task + 'a>, KernelError> {
        tier::check(FORWARD, isa)?;
        let [n, k] = self.shape();
        if x.k != k {
            let message = format!("a weight [{n}, {k}] expects rows of {k} values, got {}", x.k);
            return Err(KernelError::new(FORWARD, message));
        }
        let sink = Sink::new(FORWARD, out, epilogue, [x.m, n])?;
        let x = x.clone();
        match x.form {
            Form::Int8 { group } if group != self.spec().group_size() => {
                let wanted = self.spec().group_size();
                let message =
                    format!("rows quantized in groups of {group}, this weight has groups of {wanted}");
                Err(KernelError::new(FORWARD, message))
            }
            Form::Int8 { .. } => Ok(Box::new(FastTask { weight: self, x, sink, isa })),
            Form::Bf16 | Form::F32 => {
                Ok(Box::new(FloatTask { weight: self, x, sink, isa, transposed: false }))
            }
        }
    }

    /// dx = dy·w from staged rows dy `[m, out]` to `[m, in]`, for training through a frozen weight.
    /// The rows are staged as [`Form::F32`] or [`Form::Bf16`].
    pub fn product_transposed<'a>(
        &'a self,
        dy: &Staged<'a>,
        dx: ViewMut<'a, f32>,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<Box<dyn Task + 'a>, KernelError> {
        tier::check(TRANSPOSED, isa)?;
        let [n, k] = self.shape();
        if dy.k != n {
            let message = format!("a weight [{n}, {k}] expects rows of {n} values, got {}", dy.k);
            return Err(KernelError::new(TRANSPOSED, message));
        }
        let sink = Sink::new(TRANSPOSED, dx, epilogue, [dy.m, k])?;
        match dy.form {
            Form::Int8 { .. } => {
                let message = "expected rows as bf16 or f32, got int8: gradients are not quantized";
                Err(KernelError::new(TRANSPOSED, message))
            }
            Form::Bf16 | Form::F32 => {
                Ok(Box::new(FloatTask { weight: self, x: dy.clone(), sink, isa, transposed: true }))
            }
        }
    }

    /// Staging and transposed product in one: dx = dy·w, dy `[m, out]`, dx `[m, in]`.
    pub fn plan_transposed<'a>(
        &'a self,
        dy: impl Into<Rows<'a>>,
        dx: ViewMut<'a, f32>,
        precision: Precision,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<ProductPlan<'a>, KernelError> {
        let form = match precision {
            Precision::Fast => {
                let message = "precision fast is for inference: expected bf16 or exact";
                return Err(KernelError::new(TRANSPOSED, message));
            }
            precision => self.form(precision),
        };
        ProductPlan {
            stage: Stage::new(dy, form, isa)?,
            weight: self,
            out: dx,
            epilogue,
            isa,
            transposed: true,
        }
        .checked()
    }

    /// Staging and product in one: y = x·wᵀ, x `[m, in]`, out `[m, out]`.
    pub fn plan_forward<'a>(
        &'a self,
        x: impl Into<Rows<'a>>,
        out: ViewMut<'a, f32>,
        precision: Precision,
        epilogue: Epilogue<'a>,
        isa: Isa,
    ) -> Result<ProductPlan<'a>, KernelError> {
        let stage = Stage::new(x, self.form(precision), isa)?;
        ProductPlan { stage, weight: self, out, epilogue, isa, transposed: false }.checked()
    }
}

/// A product that owns its staging: ask for the workspace, then for the tasks.
#[derive(Clone)]
pub struct ProductPlan<'a> {
    stage: Stage<'a>,
    weight: &'a QuantWeight,
    out: ViewMut<'a, f32>,
    epilogue: Epilogue<'a>,
    isa: Isa,
    transposed: bool,
}

impl<'a> ProductPlan<'a> {
    /// Runs the product's checks, so that a plan that exists can be run.
    fn checked(self) -> Result<ProductPlan<'a>, KernelError> {
        // SAFETY: the tasks are dropped unrun, so nobody touches the null workspace.
        unsafe { self.clone().tasks(std::ptr::null_mut(), &mut Vec::new())? };
        Ok(self)
    }

    /// Bytes of workspace that [`ProductPlan::tasks`] needs.
    pub fn workspace_bytes(&self) -> usize {
        self.stage.workspace_bytes()
    }

    /// Appends the plan's tasks, in order.
    ///
    /// # Safety
    /// `workspace` is aligned to 64 and has [`ProductPlan::workspace_bytes`] bytes, which for `'a`
    /// nothing else uses.
    pub unsafe fn tasks(
        self,
        workspace: *mut u8,
        list: &mut Vec<Box<dyn Task + 'a>>,
    ) -> Result<(), KernelError> {
        // SAFETY: passed on.
        let (stage, staged) = unsafe { self.stage.bind(workspace) };
        let ProductPlan { weight, out, epilogue, isa, .. } = self;
        let product = if self.transposed {
            weight.product_transposed(&staged, out, epilogue, isa)?
        } else {
            weight.product(&staged, out, epilogue, isa)?
        };
        list.push(stage);
        list.push(product);
        Ok(())
    }
}

/// Tasks that need no barrier between them, as one: several products of the same staged rows.
pub struct Together<'a>(Vec<Box<dyn Task + 'a>>);

impl<'a> Together<'a> {
    /// The tasks must write disjoint places and read nothing that another of them writes.
    pub fn new(tasks: Vec<Box<dyn Task + 'a>>) -> Together<'a> {
        Together(tasks)
    }
}

impl Task for Together<'_> {
    fn chunks(&self) -> usize {
        self.0.iter().map(|task| task.chunks()).sum()
    }

    fn run(&self, mut chunk: usize, scratch: &mut Scratch) {
        for task in &self.0 {
            let chunks = task.chunks();
            if chunk < chunks {
                return task.run(chunk, scratch);
            }
            chunk -= chunks;
        }
    }

    fn name(&self) -> &'static str {
        self.0.first().map_or("nothing", |task| task.name())
    }
}
