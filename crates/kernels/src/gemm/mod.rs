//! Float matrix products.
//!
//! [`Gemm`] multiplies operands of any strides; [`FloatWeight`] is a weight packed once that
//! multiplies in both directions; [`MatmulTask`] covers f64 and integers. Quantized weights are
//! not here.
//!
//! A plan knows its [`Gemm::workspace_bytes`]; the caller allocates them and appends the plan's
//! tasks to a list. The same bits come out for any number of rows, threads, and any cutting:
//! docs/NUMERICS.md has the orders. [`Grouped`] multiplies rows by the matrices that indices name.
//!
//! Files: `types` what is asked; `cut` blocks, `product` the loops over them; `grouped` rows for experts; `pack`
//! and `block` packing; `store` the epilogue; `weight` packed weights, `read` from files; `micro` the table of
//! innermost loops, one file per tier.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod block;
mod cut;
mod generic;
mod grouped;
mod micro;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod pairs;
mod product;
mod read;
mod scalar;
mod store;
mod types;
mod weight;
mod workspace;

use std::marker::PhantomData;
use std::sync::Arc;

use mica_simd::Isa;
use mica_threads::{Pool, Task};

pub use generic::{MatmulTask, Number};
pub use grouped::{FloatExperts, Grouped, GroupedSpec, Matrices};
pub use types::{Epilogue, FloatType, FloatView, FloatViewMut, Precision};
pub use weight::{FloatWeight, WeightPacking};
pub use workspace::{WorkspaceBuf, run};

pub(crate) use self::micro::uses_pairs;
pub(crate) use self::pack::{PanelForm, PanelRange, PanelSource};
pub(crate) use self::weight::check_part;

use self::pack::BSource;
use self::product::{Product, Request};
use self::types::Matrix;
use crate::KernelError;

/// What to multiply: `out[.., m, n] = epilogue(a[.., m, k] · b[.., k, n])`.
///
/// Leading dimensions are batch dimensions and are those of `out`; `a` and `b` may lack them or
/// have size 1 there (broadcast). All strides are free, those of `out` too as long as no two
/// elements share a place. `out` must not overlap `a` or `b`.
#[derive(Clone, Debug)]
pub struct GemmSpec<'a> {
    /// `[.., m, k]`.
    pub a: FloatView<'a>,
    /// `[.., k, n]`.
    pub b: FloatView<'a>,
    /// `[.., m, n]`.
    pub out: FloatViewMut<'a>,
    /// How products are formed.
    pub precision: Precision,
    /// What is added before storing.
    pub epilogue: Epilogue<'a>,
    /// The tier: [`Isa::get`] unless a test says otherwise.
    pub isa: Isa,
    /// Threads that will likely run it: a product of long sums is cut for as many. Bits do not depend on it.
    pub threads: usize,
}

/// Threads that a product is cut for if nobody says how many there are.
const MANY_THREADS: usize = 16;

impl<'a> GemmSpec<'a> {
    /// An exact product without epilogue on the process's tier.
    pub fn new(
        a: impl Into<FloatView<'a>>,
        b: impl Into<FloatView<'a>>,
        out: impl Into<FloatViewMut<'a>>,
    ) -> Self {
        GemmSpec {
            a: a.into(),
            b: b.into(),
            out: out.into(),
            precision: Precision::Exact,
            epilogue: Epilogue::none(),
            isa: Isa::get(),
            threads: MANY_THREADS,
        }
    }
}

/// A checked product, ready to give its tasks.
#[derive(Debug)]
pub struct Gemm<'a> {
    product: Arc<Product>,
    operands: PhantomData<&'a mut [u8]>,
}

impl<'a> Gemm<'a> {
    /// Checks the shapes and chooses blocks.
    pub fn plan(spec: &GemmSpec<'a>) -> Result<Gemm<'a>, KernelError> {
        let (a, b, out) = (&spec.a, &spec.b, &spec.out);
        let rank = out.shape().len();
        if rank < 2 || a.shape().len() < 2 || b.shape().len() < 2 {
            let message = format!(
                "operands need two dimensions or more, got a {:?}, b {:?}, out {:?}",
                a.shape(),
                b.shape(),
                out.shape()
            );
            return Err(KernelError::new("gemm", message));
        }
        let (m, n) = (out.shape()[rank - 2], out.shape()[rank - 1]);
        let k = a.shape()[a.shape().len() - 1];
        let batch = &out.shape()[..rank - 2];
        let a = Matrix::of("a", (a.bytes(), a.float_type()), a.shape(), a.strides(), batch, (m, k))?;
        let b = Matrix::of("b", (b.bytes(), b.float_type()), b.shape(), b.strides(), batch, (k, n))?;
        let out =
            Matrix::of("out", (out.bytes(), out.float_type()), out.shape(), out.strides(), batch, (m, n))?;
        let addends = addends_of(&spec.epilogue, &out, batch, m, n)?;
        Ok(Gemm::from_request(Request {
            isa: spec.isa,
            threads: spec.threads,
            precision: spec.precision,
            batch: batch.into(),
            m,
            n,
            k,
            a,
            b: BSource::Strided(b),
            out,
            addends,
            chosen: false,
        }))
    }

    /// Plans `out [m, n] = epilogue(a [m, k] · b)` where `b` `[k, n]` writes its own panels. What
    /// `b` reads must live as long as `'a`.
    pub(crate) fn with_panels(
        a: FloatView<'a>,
        (b, k): (Arc<dyn PanelSource>, usize),
        out: FloatViewMut<'a>,
        precision: Precision,
        epilogue: &Epilogue<'a>,
        isa: Isa,
    ) -> Result<Gemm<'a>, KernelError> {
        let &[m, n] = out.shape() else {
            return Err(KernelError::new(
                "gemm",
                format!("expected an output [m, n], got {:?}", out.shape()),
            ));
        };
        let a = Matrix::of("x", (a.bytes(), a.float_type()), a.shape(), a.strides(), &[], (m, k))?;
        let out =
            Matrix::of("out", (out.bytes(), out.float_type()), out.shape(), out.strides(), &[], (m, n))?;
        let addends = addends_of(epilogue, &out, &[], m, n)?;
        let (batch, b) = (Default::default(), BSource::Panels(b));
        Ok(Gemm::from_request(Request {
            isa,
            threads: MANY_THREADS,
            precision,
            batch,
            m,
            n,
            k,
            a,
            b,
            out,
            addends,
            chosen: false,
        }))
    }

    fn from_request(request: Request) -> Gemm<'a> {
        // A tier that the machine lacks would be an illegal instruction.
        let isa = if Isa::available().contains(&request.isa) { request.isa } else { Isa::get() };
        Gemm { product: Arc::new(Product::new(Request { isa, ..request })), operands: PhantomData }
    }

    /// Bytes of workspace that the tasks need (possibly none).
    pub fn workspace_bytes(&self) -> usize {
        self.product.workspace_bytes()
    }

    /// Appends the tasks: in this order, with barriers between.
    ///
    /// # Safety
    /// `workspace` is aligned to 64 bytes, [`Gemm::workspace_bytes`] long, and left alone by
    /// others from the first of these tasks to the last.
    pub unsafe fn tasks(&self, workspace: *mut u8, list: &mut Vec<Box<dyn Task + 'a>>) {
        // SAFETY: the operands are borrowed for 'a; the workspace is promised by the caller.
        unsafe { self.product.tasks(workspace, list) }
    }

    /// Runs the product alone, with a workspace of its own.
    pub fn run(&self, pool: &Pool) -> Result<(), KernelError> {
        let mut workspace = WorkspaceBuf::new(self.workspace_bytes());
        let mut list: Vec<Box<dyn Task + '_>> = Vec::new();
        // SAFETY: the workspace is new and outlives the run.
        unsafe { self.product.tasks(workspace.pointer(), &mut list) };
        run(pool, &list)
    }
}

/// Bias and residual as matrices, in the order in which they are added.
fn addends_of(
    epilogue: &Epilogue,
    out: &Matrix,
    batch: &[usize],
    m: usize,
    n: usize,
) -> Result<Vec<Matrix>, KernelError> {
    let mut addends = Vec::new();
    if let Some(bias) = &epilogue.bias {
        if bias.shape() != [n] {
            let message = format!("bias has shape {:?}; expected [{n}]", bias.shape());
            return Err(KernelError::new("gemm", message));
        }
        let shape = [m, n];
        let strides = [0, bias.strides()[0]];
        let float = (bias.bytes(), bias.float_type());
        addends.push(Matrix::of("bias", float, &shape, &strides, batch, (m, n))?);
    }
    match (&epilogue.residual, epilogue.accumulate) {
        (Some(_), true) => {
            let message = "accumulate and residual exclude each other: the output is the residual";
            return Err(KernelError::new("gemm", message));
        }
        (Some(residual), false) => {
            let float = (residual.bytes(), residual.float_type());
            let (shape, strides) = (residual.shape(), residual.strides());
            let one_row = [1, n];
            let one_row_strides = [0, strides.first().copied().unwrap_or(0)];
            let (shape, strides) = if shape.len() == 1 && m == 1 {
                (&one_row[..], &one_row_strides[..])
            } else {
                (shape, strides)
            };
            addends.push(Matrix::of("residual", float, shape, strides, batch, (m, n))?);
        }
        (None, true) => addends.push(out.clone()),
        (None, false) => {}
    }
    Ok(addends)
}

/// The tile configuration of a chunk, on the tier that has tiles.
///
/// # Safety
/// The tier is [`Isa::Amx`].
#[cfg(target_arch = "x86_64")]
unsafe fn tile_scope(rows: usize) -> crate::amx::Tiles {
    // SAFETY: promised by the caller.
    unsafe { amx::tiles(rows) }
}

/// No tiles on this architecture.
///
/// # Safety
/// None to keep.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn tile_scope(_: usize) {}
