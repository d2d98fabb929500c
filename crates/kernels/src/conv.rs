//! Causal depthwise convolution over a few positions (three or four taps), forward and backward:
//! y[t, c] = Σ_j weight[c, j] · x[t - (taps - 1) + j, c] (+ bias\[c\]).
//!
//! The sum is one ascending chain over j from zero, then the bias. Before the start of a sequence
//! come the carried state (the last inputs of what came before) or zeros; at the borders of packed
//! sequences come zeros.

use mica_simd::{Isa, Kernel, LANES, Vector, dispatch};
use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::error::KernelError;
use crate::plan::{Plan, Workspace};
use crate::rows::{Rows, check_shape};

/// Elements that one chunk works on, about.
const CHUNK: usize = 32_768;
/// Positions of a sequence whose contribution to the gradient of the weight is summed apart.
const GRADIENT_ROWS: usize = 64;

/// What [`short_conv`] reads and writes. Floats are f32, bf16 or f16.
pub struct ShortConvArgs {
    /// `[batch, length, channels]`.
    pub x: DynView,
    /// `[channels, taps]`.
    pub weight: DynView,
    /// `[channels]`.
    pub bias: Option<DynView>,
    /// `[batch, taps - 1, channels]`: the inputs before position 0; absent means zeros.
    pub state: Option<DynView>,
    /// `[batch, length]` int32: where the packed sequence of each position begins; inputs before
    /// it count as zeros. A sequence that begins at 0 sees the state.
    pub starts: Option<DynView>,
    /// `[batch, length, channels]`. May not alias `x`.
    pub out: DynViewMut,
    /// `[batch, taps - 1, channels]`: the last inputs, state included, for the next call. May not
    /// alias `state`.
    pub next_state: Option<DynViewMut>,
}

/// What is common to both directions.
struct Shape {
    isa: Isa,
    batch: usize,
    length: usize,
    channels: usize,
    taps: usize,
    starts: Option<DynView>,
}

// SAFETY: holds a DynView, whose promises it inherits.
unsafe impl Send for Shape {}
// SAFETY: as above.
unsafe impl Sync for Shape {}

impl Shape {
    fn new(
        name: &'static str,
        isa: Isa,
        x: &DynView,
        weight: &DynView,
        starts: Option<DynView>,
    ) -> Result<Shape, KernelError> {
        let [batch, length, channels] = x.shape[..] else {
            let message = format!("x has shape {:?}, expected [batch, length, channels]", x.shape);
            return Err(KernelError::new(name, message));
        };
        let taps = weight.shape.last().copied().unwrap_or(0);
        check_shape(name, "weight", &weight.shape, &[channels, taps])?;
        if taps == 0 {
            return Err(KernelError::new(name, "a weight without taps"));
        }
        if let Some(view) = &starts {
            check_shape(name, "starts", &view.shape, &[batch, length])?;
            if view.dtype != Dtype::I32 {
                return Err(KernelError::new(name, format!("starts are {}, expected int32", view.dtype)));
            }
        }
        Ok(Shape { isa, batch, length, channels, taps, starts })
    }

    /// The first position whose input position `t` sees, as an offset that may be before 0.
    fn first(&self, batch: usize, t: usize) -> isize {
        let window = t as isize - (self.taps as isize - 1);
        let Some(view) = &self.starts else { return window };
        let at = batch as isize * view.strides[0] + t as isize * view.strides[1];
        // SAFETY: the shape was checked to be [batch, length].
        let start = unsafe { *view.pointer.cast::<i32>().offset(at) } as isize;
        if start > 0 { window.max(start) } else { window }
    }
}

/// The convolution.
pub fn short_conv(isa: Isa, args: ShortConvArgs) -> Result<Box<dyn Task>, KernelError> {
    let name = "short_conv";
    let shape = Shape::new(name, isa, &args.x, &args.weight, args.starts)?;
    let before = [shape.batch, shape.taps - 1, shape.channels];
    let bias = match &args.bias {
        None => None,
        Some(view) => {
            check_shape(name, "bias", &view.shape, &[shape.channels])?;
            Some(Rows::new(name, "bias", view)?)
        }
    };
    let state = match &args.state {
        None => None,
        Some(view) => {
            check_shape(name, "state", &view.shape, &before)?;
            Some(Rows::new(name, "state", view)?)
        }
    };
    let next_state = match &args.next_state {
        None => None,
        Some(view) => {
            check_shape(name, "next_state", &view.shape, &before)?;
            Some(Rows::new_mut(name, "next_state", view)?)
        }
    };
    check_shape(name, "out", &args.out.shape, &args.x.shape)?;
    Ok(Box::new(Forward {
        x: Rows::new(name, "x", &args.x)?,
        weight: Rows::new(name, "weight", &args.weight)?,
        bias,
        state,
        out: Rows::new_mut(name, "out", &args.out)?,
        next_state,
        shape,
    }))
}

struct Forward {
    shape: Shape,
    x: Rows,
    weight: Rows,
    bias: Option<Rows>,
    state: Option<Rows>,
    out: Rows,
    next_state: Option<Rows>,
}

impl Forward {
    fn positions(&self) -> usize {
        (CHUNK / self.shape.channels.max(1)).max(1)
    }

    /// Chunks of one sequence: its positions, and one for the state.
    fn parts(&self) -> usize {
        self.shape.length.div_ceil(self.positions()) + usize::from(self.next_state.is_some())
    }

    /// Loads the input at `t`, which may lie in the state or before it.
    ///
    /// # Safety
    /// As for [`Rows::load`].
    #[inline(always)]
    unsafe fn input<V: Vector>(&self, batch: usize, t: isize, out: &mut [f32]) {
        let before = self.shape.taps as isize - 1;
        // SAFETY: promised by the caller.
        unsafe {
            match &self.state {
                _ if t >= 0 => self.x.load::<V>(batch * self.shape.length + t as usize, out),
                Some(state) if t >= -before => {
                    state.load::<V>(batch * before as usize + (t + before) as usize, out)
                }
                _ => out.fill(0.0),
            }
        }
    }
}

impl Task for Forward {
    fn chunks(&self) -> usize {
        if self.shape.channels == 0 { 0 } else { self.shape.batch * self.parts() }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.shape.isa, ForwardChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        "short_conv"
    }
}

struct ForwardChunk<'a> {
    task: &'a Forward,
    chunk: usize,
    scratch: &'a Scratch,
}

/// The weight as `[taps, channels]`.
#[inline(always)]
fn turned<'a, V: Vector>(weight: &Rows, channels: usize, taps: usize, scratch: &'a Scratch) -> &'a [f32] {
    let out = scratch.take::<f32>(taps * channels);
    let row = scratch.take::<f32>(taps);
    for c in 0..channels {
        // SAFETY: the weight has a row for each channel; nobody writes it.
        unsafe { weight.load::<V>(c, row) };
        for (j, &value) in row.iter().enumerate() {
            out[j * channels + c] = value;
        }
    }
    out
}

impl Kernel for ForwardChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (task, scratch) = (self.task, self.scratch);
        let Shape { length, channels, taps, .. } = task.shape;
        let (batch, part) = (self.chunk / task.parts(), self.chunk % task.parts());
        let before = taps - 1;
        let row = scratch.take::<f32>(channels);
        let first = part * task.positions();
        if first >= length {
            // The part behind the last position: the state.
            if let Some(next) = &task.next_state {
                for i in 0..before {
                    // SAFETY: this chunk alone writes the state of its sequence.
                    unsafe {
                        task.input::<V>(batch, (length + i) as isize - before as isize, row);
                        next.store::<V>(batch * before + i, row);
                    }
                }
            }
            return;
        }
        let weight = turned::<V>(&task.weight, channels, taps, scratch);
        let bias = scratch.take::<f32>(channels);
        if let Some(rows) = &task.bias {
            // SAFETY: the bias is one row.
            unsafe { rows.load::<V>(0, bias) };
        }
        let count = task.positions().min(length - first);
        let inputs = scratch.take::<f32>((count + before) * channels);
        for (i, to) in inputs.chunks_mut(channels).enumerate() {
            // SAFETY: positions up to the last of this chunk.
            unsafe { task.input::<V>(batch, (first + i) as isize - before as isize, to) };
        }
        for i in 0..count {
            let t = first + i;
            let window = t as isize - before as isize;
            let skip = (task.shape.first(batch, t) - window) as usize;
            for at in (0..channels).step_by(LANES) {
                let end = (at + LANES).min(channels);
                let mut sum = V::zero();
                for j in skip..taps {
                    let x = V::from_slice(&inputs[(i + j) * channels..][at..end], 0.0);
                    sum = x.mul_add(V::from_slice(&weight[j * channels..][at..end], 0.0), sum);
                }
                if task.bias.is_some() {
                    sum = sum + V::from_slice(&bias[at..end], 0.0);
                }
                sum.to_slice(&mut row[at..end]);
            }
            // SAFETY: the positions of this chunk are written by it alone.
            unsafe { task.out.store::<V>(batch * length + t, row) };
        }
    }
}

/// What [`short_conv_backward`] reads and writes; shapes as in [`ShortConvArgs`]. There is no
/// state in training.
pub struct ShortConvBackwardArgs {
    /// `[batch, length, channels]`.
    pub x: DynView,
    /// `[channels, taps]`.
    pub weight: DynView,
    /// As in the forward pass.
    pub starts: Option<DynView>,
    /// The gradient of the output, `[batch, length, channels]`.
    pub dy: DynView,
    /// The gradient of `x`. May not alias `dy`.
    pub dx: DynViewMut,
    /// The gradient of the weight, `[channels, taps]`, if wanted.
    pub dweight: Option<DynViewMut>,
    /// The gradient of the bias, `[channels]`, if wanted.
    pub dbias: Option<DynViewMut>,
}

/// The gradients of [`short_conv`]. Those of weight and bias are sums over blocks of
/// `GRADIENT_ROWS` positions of each sequence, ascending, then over the blocks, ascending.
pub fn short_conv_backward(isa: Isa, args: ShortConvBackwardArgs) -> Result<Plan, KernelError> {
    let name = "short_conv_backward";
    let shape = Shape::new(name, isa, &args.x, &args.weight, args.starts)?;
    check_shape(name, "dy", &args.dy.shape, &args.x.shape)?;
    check_shape(name, "dx", &args.dx.shape, &args.x.shape)?;
    let (channels, taps) = (shape.channels, shape.taps);
    let dweight = match &args.dweight {
        None => None,
        Some(view) => {
            check_shape(name, "dweight", &view.shape, &[channels, taps])?;
            Some(Rows::new_mut(name, "dweight", view)?)
        }
    };
    let dbias = match &args.dbias {
        None => None,
        Some(view) => {
            check_shape(name, "dbias", &view.shape, &[channels])?;
            Some(Rows::new_mut(name, "dbias", view)?)
        }
    };
    let (x, weight) = (Rows::new(name, "x", &args.x)?, Rows::new(name, "weight", &args.weight)?);
    let (dy, dx) = (Rows::new(name, "dy", &args.dy)?, Rows::new_mut(name, "dx", &args.dx)?);
    let blocks = if channels == 0 { 0 } else { shape.batch * shape.length.div_ceil(GRADIENT_ROWS) };
    let wanted = dweight.is_some() || dbias.is_some();
    let bytes = if wanted { blocks * (taps + 1) * channels * size_of::<f32>() } else { 0 };
    Ok(Plan::new(bytes, move |workspace, list| {
        let sums = wanted.then_some(workspace);
        list.push(Box::new(Backward { shape, x, weight, dy, dx, blocks, sums }));
        if wanted && channels > 0 {
            list.push(Box::new(SumBlocks { isa, workspace, blocks, channels, taps, dweight, dbias }));
        }
    }))
}

struct Backward {
    shape: Shape,
    x: Rows,
    weight: Rows,
    dy: Rows,
    dx: Rows,
    blocks: usize,
    /// `[blocks, taps + 1, channels]`: partial sums of the weight's and the bias's gradients.
    sums: Option<Workspace>,
}

impl Task for Backward {
    fn chunks(&self) -> usize {
        self.blocks
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.shape.isa, BackwardChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        "short_conv_backward"
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
        let (task, scratch) = (self.task, self.scratch);
        let Shape { length, channels, taps, .. } = task.shape;
        let before = taps - 1;
        let parts = length.div_ceil(GRADIENT_ROWS);
        let (batch, first) = (self.chunk / parts, self.chunk % parts * GRADIENT_ROWS);
        let count = GRADIENT_ROWS.min(length - first);
        let weight = turned::<V>(&task.weight, channels, taps, scratch);
        let row = scratch.take::<f32>(channels);
        // Inputs from `taps - 1` before the block, upstream gradients to `taps - 1` behind it.
        let inputs = scratch.take::<f32>((count + before) * channels);
        let ups = scratch.take::<f32>((count + before) * channels);
        for (i, (input, up)) in inputs.chunks_mut(channels).zip(ups.chunks_mut(channels)).enumerate() {
            let (t, u) = (first + i, first + i);
            // SAFETY: the positions are inside the sequence.
            unsafe {
                if t >= before {
                    task.x.load::<V>(batch * length + t - before, input);
                } else {
                    input.fill(0.0);
                }
                if u < length {
                    task.dy.load::<V>(batch * length + u, up);
                }
            }
        }
        for i in 0..count {
            let t = first + i;
            for at in (0..channels).step_by(LANES) {
                let end = (at + LANES).min(channels);
                let mut sum = V::zero();
                // Output t + s reads this input with tap `before - s`.
                for s in 0..taps.min(length - t) {
                    if task.shape.first(batch, t + s) > t as isize {
                        continue;
                    }
                    let up = V::from_slice(&ups[(i + s) * channels..][at..end], 0.0);
                    sum = up.mul_add(V::from_slice(&weight[(before - s) * channels..][at..end], 0.0), sum);
                }
                sum.to_slice(&mut row[at..end]);
            }
            // SAFETY: the positions of this block are written by this chunk alone.
            unsafe { task.dx.store::<V>(batch * length + t, row) };
        }
        let Some(workspace) = task.sums else { return };
        let sums = scratch.take::<f32>((taps + 1) * channels);
        sums.fill(0.0);
        for i in 0..count {
            let t = first + i;
            let skip = (task.shape.first(batch, t) - (t as isize - before as isize)) as usize;
            for at in (0..channels).step_by(LANES) {
                let end = (at + LANES).min(channels);
                let up = V::from_slice(&ups[i * channels..][at..end], 0.0);
                for j in skip..taps {
                    let x = V::from_slice(&inputs[(i + j) * channels..][at..end], 0.0);
                    let sum = &mut sums[j * channels..][at..end];
                    up.mul_add(x, V::from_slice(sum, 0.0)).to_slice(sum);
                }
                let sum = &mut sums[taps * channels..][at..end];
                (V::from_slice(sum, 0.0) + up).to_slice(sum);
            }
        }
        // SAFETY: the plan gave each block (taps + 1) * channels places.
        unsafe {
            let to = workspace.f32s(self.chunk * sums.len());
            std::ptr::copy_nonoverlapping(sums.as_ptr(), to, sums.len());
        }
    }
}

/// Adds the blocks' partial sums, ascending.
struct SumBlocks {
    isa: Isa,
    workspace: Workspace,
    blocks: usize,
    channels: usize,
    taps: usize,
    dweight: Option<Rows>,
    dbias: Option<Rows>,
}

impl Task for SumBlocks {
    fn chunks(&self) -> usize {
        1
    }

    fn run(&self, _: usize, scratch: &mut Scratch) {
        dispatch(self.isa, SumBlocksChunk { task: self, scratch });
    }

    fn name(&self) -> &'static str {
        "short_conv_backward_sum"
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
        let one = (task.taps + 1) * task.channels;
        let sums = self.scratch.take::<f32>(one);
        let row = self.scratch.take::<f32>(task.taps);
        sums.fill(0.0);
        for block in 0..task.blocks {
            // SAFETY: the task before wrote `one` values a block; nobody writes now.
            let partial = unsafe { std::slice::from_raw_parts(task.workspace.f32s(block * one), one) };
            for (sum, value) in sums.chunks_mut(LANES).zip(partial.chunks(LANES)) {
                (V::from_slice(sum, 0.0) + V::from_slice(value, 0.0)).to_slice(sum);
            }
        }
        // SAFETY: outputs that only this task writes, of the checked shapes.
        unsafe {
            if let Some(out) = &task.dweight {
                for c in 0..task.channels {
                    for j in 0..task.taps {
                        row[j] = sums[j * task.channels + c];
                    }
                    out.store::<V>(c, row);
                }
            }
            if let Some(out) = &task.dbias {
                out.store::<V>(0, &sums[task.taps * task.channels..]);
            }
        }
    }
}

#[cfg(test)]
#[path = "conv_tests.rs"]
mod tests;
