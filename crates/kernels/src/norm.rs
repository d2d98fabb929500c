//! RMS and layer normalisation over the last dimension, forward and backward.
//!
//! Sums over a row are in the canonical 16 lanes (docs/NUMERICS.md), in f32 whatever the types.
//! A row is y = ((x - mean)·r)·weight + bias with r = 1/√(variance + eps); the RMS form has no
//! mean and no bias. Gradients of weight and bias are sums over rows: blocks of
//! `GRADIENT_ROWS` rows ascending, then the blocks ascending.

use mica_simd::{Isa, Kernel, LANES, Vector, dispatch};
use mica_threads::{Scratch, Task};

use crate::dtype::{DynView, DynViewMut};
use crate::error::KernelError;
use crate::layout::prefetch;
use crate::plan::{Plan, Workspace};
use crate::rows::{Rows, check_shape};

/// Elements that one chunk works on, about.
const CHUNK: usize = 16_384;
/// Rows whose contribution to the gradient of the weight is summed apart.
const GRADIENT_ROWS: usize = 64;

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Zhang and Sennrich 2019: by the root of the mean of squares.
    Rms,
    /// Ba, Kiros and Hinton 2016: by mean and standard deviation (of the population).
    Layer,
}

impl Norm {
    fn name(self) -> &'static str {
        match self {
            Norm::Rms => "rms_norm",
            Norm::Layer => "layer_norm",
        }
    }
}

/// What [`norm`] reads and writes. `x` is `[.., width]` of f32, bf16 or f16; so is every other
/// array, each of its own type.
pub struct NormArgs {
    /// Which one.
    pub kind: Norm,
    /// `[.., width]`.
    pub x: DynView,
    /// `[width]`; absent means ones.
    pub weight: Option<DynView>,
    /// `[width]`, for [`Norm::Layer`] only.
    pub bias: Option<DynView>,
    /// Added to the variance.
    pub eps: f32,
    /// A residual `[.., width]` that is added to `x` first, and where the sum goes. The norm is
    /// of the sum as it is stored. The sum may alias `x` or the residual.
    pub residual: Option<(DynView, DynViewMut)>,
    /// `[.., width]`. May alias `x` (same layout).
    pub out: DynViewMut,
}

/// Normalises each row.
pub fn norm(isa: Isa, args: NormArgs) -> Result<Box<dyn Task>, KernelError> {
    let name = args.kind.name();
    let x = Rows::new(name, "x", &args.x)?;
    let shape = args.x.shape.clone();
    let vector = |what: &str, view: Option<DynView>| -> Result<Option<Rows>, KernelError> {
        let Some(view) = view else { return Ok(None) };
        check_shape(name, what, &view.shape, &[x.width])?;
        Rows::new(name, what, &view).map(Some)
    };
    let weight = vector("weight", args.weight)?;
    let bias = vector("bias", args.bias)?;
    if bias.is_some() && args.kind == Norm::Rms {
        return Err(KernelError::new(name, "an RMS norm has no bias"));
    }
    let residual = match args.residual {
        None => None,
        Some((addend, sum)) => {
            check_shape(name, "the residual", &addend.shape, &shape)?;
            check_shape(name, "the sum", &sum.shape, &shape)?;
            Some((Rows::new(name, "the residual", &addend)?, Rows::new_mut(name, "the sum", &sum)?))
        }
    };
    check_shape(name, "out", &args.out.shape, &shape)?;
    let out = Rows::new_mut(name, "out", &args.out)?;
    Ok(Box::new(Forward { isa, kind: args.kind, eps: args.eps, x, weight, bias, residual, out }))
}

struct Forward {
    isa: Isa,
    kind: Norm,
    eps: f32,
    x: Rows,
    weight: Option<Rows>,
    bias: Option<Rows>,
    residual: Option<(Rows, Rows)>,
    out: Rows,
}

fn rows_per_chunk(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

impl Task for Forward {
    fn chunks(&self) -> usize {
        if self.x.width == 0 { 0 } else { self.x.count().div_ceil(rows_per_chunk(self.x.width)) }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.isa, ForwardChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        self.kind.name()
    }
}

struct ForwardChunk<'a> {
    task: &'a Forward,
    chunk: usize,
    scratch: &'a Scratch,
}

impl Kernel for ForwardChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let task = self.task;
        let width = task.x.width;
        let weight = load_vector::<V>(&task.weight, width, self.scratch);
        let bias = load_vector::<V>(&task.bias, width, self.scratch);
        let mut memory = Memory {
            x: self.scratch.take::<f32>(TOGETHER * width).as_mut_ptr(),
            other: self.scratch.take::<f32>(if task.residual.is_some() { width } else { 0 }),
            weight,
            bias,
        };
        let start = self.chunk * rows_per_chunk(width);
        let end = (start + rows_per_chunk(width)).min(task.x.count());
        let mut row = start;
        while row < end {
            // SAFETY: rows of this chunk are touched by this chunk alone, and are in range.
            unsafe {
                if row + TOGETHER <= end {
                    task.normalise::<V, TOGETHER>(row, &mut memory);
                    row += TOGETHER;
                } else {
                    task.normalise::<V, 1>(row, &mut memory);
                    row += 1;
                }
            }
        }
    }
}

/// Rows whose sums are formed at once: a chain of additions alone waits for each of them.
const TOGETHER: usize = 4;

/// What a chunk works with.
struct Memory<'a> {
    /// Room for [`TOGETHER`] rows.
    x: *mut f32,
    other: &'a mut [f32],
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
}

impl Forward {
    /// Normalises `N` rows from `row` on. Dense f32 is read and written where it is.
    ///
    /// # Safety
    /// The rows exist, and nobody else touches them.
    #[inline(always)]
    unsafe fn normalise<V: Vector, const N: usize>(&self, row: usize, memory: &mut Memory) {
        let width = self.x.width;
        let mut from = [std::ptr::null::<f32>(); N];
        for (i, from) in from.iter_mut().enumerate() {
            if let (Some(dense), None) = (self.x.dense(row + i), &self.residual) {
                *from = dense;
                continue;
            }
            // SAFETY: room for `TOGETHER` rows; this row is in range.
            unsafe {
                let x = std::slice::from_raw_parts_mut(memory.x.add(i * width), width);
                self.x.load::<V>(row + i, x);
                if let Some((addend, sum)) = &self.residual {
                    addend.load::<V>(row + i, memory.other);
                    for (x, y) in x.chunks_mut(LANES).zip(memory.other.chunks(LANES)) {
                        (V::from_slice(x, 0.0) + V::from_slice(y, 0.0)).to_slice(x);
                    }
                    sum.store::<V>(row + i, x);
                    if !sum.is_f32() {
                        sum.load::<V>(row + i, x);
                    }
                }
                *from = x.as_ptr();
            }
        }
        // SAFETY: whole rows.
        let statistics = unsafe { statistics::<V, N>(self.kind, self.eps, from, width) };
        for i in 0..N {
            // SAFETY: the rooms of different rows are apart.
            let place =
                self.out.dense(row + i).map_or(unsafe { memory.x.add(i * width) }, <*const f32>::cast_mut);
            // While a row is worked on in cache, memory has nothing to do.
            let next = [self.x.address(row + N + i), self.out.address(row + N + i)];
            for at in (0..width).step_by(LANES) {
                let count = LANES.min(width - at);
                for (address, size) in next {
                    prefetch(address.wrapping_add(at * size), LANES * size);
                }
                // SAFETY: inside the row, which is read before the same place is written.
                unsafe {
                    let value = statistics[i].normalise(load::<V>(from[i].add(at), count, 0.0));
                    let value = match memory.weight {
                        Some(weight) => value * load::<V>(weight.as_ptr().add(at), count, 0.0),
                        None => value,
                    };
                    let value = match memory.bias {
                        Some(bias) => value + load::<V>(bias.as_ptr().add(at), count, 0.0),
                        None => value,
                    };
                    if count == LANES {
                        value.store(place.add(at))
                    } else {
                        value.store_part(place.add(at), count)
                    }
                }
            }
            if self.out.dense(row + i).is_none() {
                // SAFETY: as above.
                unsafe { self.out.store::<V>(row + i, std::slice::from_raw_parts(place, width)) };
            }
        }
    }
}

/// Up to a vector of values, with `fill` for those that are missing.
///
/// # Safety
/// `count` values are there.
#[inline(always)]
unsafe fn load<V: Vector>(from: *const f32, count: usize, fill: f32) -> V {
    // SAFETY: promised by the caller.
    unsafe { if count == LANES { V::load(from) } else { V::load_part(from, count, fill) } }
}

/// The vector widened, or None if it is absent (one fewer operation, same bits).
#[inline(always)]
fn load_vector<'a, V: Vector>(rows: &Option<Rows>, width: usize, scratch: &'a Scratch) -> Option<&'a [f32]> {
    let rows = rows.as_ref()?;
    let out = scratch.take::<f32>(width);
    // SAFETY: a vector is one row, which no task writes.
    unsafe { rows.load::<V>(0, out) };
    Some(out)
}

/// What is subtracted from a row, in two parts, and 1/√(variance + eps).
#[derive(Clone, Copy)]
struct Statistics<V> {
    mean: V,
    rest: V,
    scale: V,
}

impl<V: Vector> Statistics<V> {
    #[inline(always)]
    fn normalise(&self, x: V) -> V {
        ((x - self.mean) - self.rest) * self.scale
    }
}

/// The statistics of some rows; for RMS there is nothing to subtract. The mean is rounded to f32 and
/// what that lost is found from the differences, so that rows far from zero keep their digits.
///
/// # Safety
/// `width` elements are there at each place.
#[inline(always)]
unsafe fn statistics<V: Vector, const N: usize>(
    kind: Norm,
    eps: f32,
    rows: [*const f32; N],
    width: usize,
) -> [Statistics<V>; N] {
    let count = width as f32;
    let mut means = [0.0; N];
    if kind == Norm::Layer {
        let mut sums = [V::zero(); N];
        for at in (0..width).step_by(LANES) {
            for (sum, row) in sums.iter_mut().zip(rows) {
                // SAFETY: inside the row.
                *sum = *sum + unsafe { load::<V>(row.add(at), LANES.min(width - at), 0.0) };
            }
        }
        for i in 0..N {
            means[i] = sums[i].sum() / count;
        }
    }
    // Loops rather than closures, which would be functions of their own without the tier's instructions.
    let mut middle = [V::zero(); N];
    for i in 0..N {
        middle[i] = V::splat(means[i]);
    }
    let (mut sums, mut squares) = ([V::zero(); N], [V::zero(); N]);
    for at in (0..width).step_by(LANES) {
        for i in 0..N {
            // SAFETY: inside the row. Padding with the mean makes the missing lanes zero.
            let value = unsafe { load::<V>(rows[i].add(at), LANES.min(width - at), means[i]) } - middle[i];
            sums[i] = sums[i] + value;
            squares[i] = value.mul_add(value, squares[i]);
        }
    }
    let mut statistics = [Statistics { mean: V::zero(), rest: V::zero(), scale: V::zero() }; N];
    for i in 0..N {
        let rest = match kind {
            Norm::Rms => 0.0,
            Norm::Layer => sums[i].sum() / count,
        };
        let variance = squares[i].sum() / count - rest * rest;
        let scale = V::splat(1.0 / (variance + eps).sqrt());
        statistics[i] = Statistics { mean: middle[i], rest: V::splat(rest), scale };
    }
    statistics
}

/// What [`norm_backward`] reads and writes; types and shapes as in [`NormArgs`].
pub struct NormBackwardArgs {
    /// Which one.
    pub kind: Norm,
    /// The input of the norm (with a residual: the sum), `[.., width]`.
    pub x: DynView,
    /// `[width]`; absent means ones.
    pub weight: Option<DynView>,
    /// The eps of the forward pass.
    pub eps: f32,
    /// The gradient of the output, `[.., width]`.
    pub dy: DynView,
    /// The gradient of `x`, `[.., width]`. May alias `dy`.
    pub dx: DynViewMut,
    /// The gradient of the weight, `[width]`, if wanted.
    pub dweight: Option<DynViewMut>,
    /// The gradient of the bias, `[width]`, if wanted.
    pub dbias: Option<DynViewMut>,
}

/// The gradients of [`norm`].
pub fn norm_backward(isa: Isa, args: NormBackwardArgs) -> Result<Plan, KernelError> {
    let name = args.kind.name();
    let x = Rows::new(name, "x", &args.x)?;
    let width = x.width;
    check_shape(name, "dy", &args.dy.shape, &args.x.shape)?;
    check_shape(name, "dx", &args.dx.shape, &args.x.shape)?;
    if args.dbias.is_some() && args.kind == Norm::Rms {
        return Err(KernelError::new(name, "an RMS norm has no bias"));
    }
    let weight = match &args.weight {
        None => None,
        Some(view) => {
            check_shape(name, "weight", &view.shape, &[width])?;
            Some(Rows::new(name, "weight", view)?)
        }
    };
    let vector = |what: &str, view: &Option<DynViewMut>| -> Result<Option<Rows>, KernelError> {
        let Some(view) = view else { return Ok(None) };
        check_shape(name, what, &view.shape, &[width])?;
        Rows::new_mut(name, what, view).map(Some)
    };
    let sums = [vector("dweight", &args.dweight)?, vector("dbias", &args.dbias)?];
    let dy = Rows::new(name, "dy", &args.dy)?;
    let dx = Rows::new_mut(name, "dx", &args.dx)?;
    let blocks = if width == 0 { 0 } else { x.count().div_ceil(GRADIENT_ROWS) };
    let wanted = sums.iter().flatten().count();
    let bytes = blocks * wanted * width * size_of::<f32>();
    let (kind, eps) = (args.kind, args.eps);
    Ok(Plan::new(bytes, move |workspace, list| {
        let mut part = 0;
        let parts = [0, 1].map(|i| {
            sums[i].as_ref().map(|_| {
                part += 1;
                (part - 1) * blocks * width
            })
        });
        list.push(Box::new(Backward { isa, kind, eps, x, weight, dy, dx, blocks, parts, workspace }));
        for (rows, part) in sums.into_iter().zip(parts) {
            if let (Some(out), Some(part)) = (rows, part) {
                list.push(Box::new(SumBlocks { isa, name, workspace, part, blocks, width, out }));
            }
        }
    }))
}

struct Backward {
    isa: Isa,
    kind: Norm,
    eps: f32,
    x: Rows,
    weight: Option<Rows>,
    dy: Rows,
    dx: Rows,
    blocks: usize,
    /// Where the partial sums of dweight and dbias begin in the workspace.
    parts: [Option<usize>; 2],
    workspace: Workspace,
}

impl Task for Backward {
    fn chunks(&self) -> usize {
        self.blocks
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.isa, BackwardChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        "norm_backward"
    }
}

struct BackwardChunk<'a> {
    task: &'a Backward,
    chunk: usize,
    scratch: &'a Scratch,
}

impl Kernel for BackwardChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let task = self.task;
        let width = task.x.width;
        let x = self.scratch.take::<f32>(width);
        let dy = self.scratch.take::<f32>(width);
        let weight = load_vector::<V>(&task.weight, width, self.scratch);
        let dweight = self.scratch.take::<f32>(width);
        let dbias = self.scratch.take::<f32>(width);
        dweight.fill(0.0);
        dbias.fill(0.0);
        let start = self.chunk * GRADIENT_ROWS;
        for row in start..(start + GRADIENT_ROWS).min(task.x.count()) {
            // SAFETY: rows of this chunk are touched by this chunk alone, and are in range.
            unsafe {
                task.x.load::<V>(row, x);
                task.dy.load::<V>(row, dy);
            }
            // SAFETY: a whole row.
            let [statistics] = unsafe { statistics::<V, 1>(task.kind, task.eps, [x.as_ptr()], x.len()) };
            // x becomes the normalised row, dy·weight replaces dy; their two sums on the way.
            let (mut sum, mut product) = (V::zero(), V::zero());
            for at in (0..width).step_by(LANES) {
                let end = (at + LANES).min(width);
                let normal = statistics.normalise(V::from_slice(&x[at..end], 0.0));
                let up = V::from_slice(&dy[at..end], 0.0);
                let dw = up.mul_add(normal, V::from_slice(&dweight[at..end], 0.0));
                dw.to_slice(&mut dweight[at..end]);
                (V::from_slice(&dbias[at..end], 0.0) + up).to_slice(&mut dbias[at..end]);
                let up = match weight {
                    Some(weight) => up * V::from_slice(&weight[at..end], 0.0),
                    None => up,
                };
                // The upper lanes of a last part are zero in `up`.
                sum = sum + up;
                product = up.mul_add(normal, product);
                normal.to_slice(&mut x[at..end]);
                up.to_slice(&mut dy[at..end]);
            }
            let count = width as f32;
            let sum = match task.kind {
                Norm::Rms => V::zero(),
                Norm::Layer => V::splat(sum.sum() / count),
            };
            let product = V::splat(product.sum() / count);
            for at in (0..width).step_by(LANES) {
                let end = (at + LANES).min(width);
                let up = V::from_slice(&dy[at..end], 0.0) - sum;
                let value = V::from_slice(&x[at..end], 0.0).neg_mul_add(product, up) * statistics.scale;
                value.to_slice(&mut dy[at..end]);
            }
            // SAFETY: as above.
            unsafe { task.dx.store::<V>(row, dy) };
        }
        for (part, sums) in task.parts.into_iter().zip([&*dweight, &*dbias]) {
            if let Some(part) = part {
                let to = task.workspace.f32s(part + self.chunk * width);
                // SAFETY: the plan gave each block `width` places of each part.
                unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), to, width) };
            }
        }
    }
}

/// Adds the blocks' partial sums, ascending.
struct SumBlocks {
    isa: Isa,
    name: &'static str,
    workspace: Workspace,
    part: usize,
    blocks: usize,
    width: usize,
    out: Rows,
}

impl Task for SumBlocks {
    fn chunks(&self) -> usize {
        1
    }

    fn run(&self, _: usize, scratch: &mut Scratch) {
        dispatch(self.isa, SumBlocksChunk { task: self, scratch });
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

struct SumBlocksChunk<'a> {
    task: &'a SumBlocks,
    scratch: &'a Scratch,
}

impl Kernel for SumBlocksChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let task = self.task;
        let sums = self.scratch.take::<f32>(task.width);
        sums.fill(0.0);
        for block in 0..task.blocks {
            let from = task.workspace.f32s(task.part + block * task.width);
            // SAFETY: the task before wrote `width` values per block; nobody writes now.
            let partial = unsafe { std::slice::from_raw_parts(from, task.width) };
            for (sum, value) in sums.chunks_mut(LANES).zip(partial.chunks(LANES)) {
                (V::from_slice(sum, 0.0) + V::from_slice(value, 0.0)).to_slice(sum);
            }
        }
        if task.width > 0 {
            // SAFETY: the vector is one row, written here alone.
            unsafe { task.out.store::<V>(0, sums) };
        }
    }
}

#[cfg(test)]
#[path = "norm_tests.rs"]
mod tests;
