//! Softmax cross-entropy over a vocabulary with its gradient, of whole rows or tile by tile.
//!
//! [`cross_entropy`] takes logits that are there: loss, log-sum-exp and gradient in one pass over
//! each row, the gradient in place of the logits if wanted. [`stream`] sees one tile of the
//! vocabulary after another, so that no more than a tile of logits exists at a time, and forms the
//! gradient of what the logits were made from as it goes.
//!
//! One order on every path (docs/NUMERICS.md): the vocabulary in tiles of [`VOCABULARY_TILE`]
//! ascending, exponentials relative to the largest logit so far, summed in 16 lanes within a tile;
//! what was summed before shrinks when the largest grows.

pub mod stream;

use mica_simd::{Isa, Kernel, LANES, Vector, dispatch, math};
use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::error::KernelError;
use crate::rows::{Rows, check_shape};

/// Entries of the vocabulary whose exponentials are summed apart.
pub const VOCABULARY_TILE: usize = 4096;

/// The right answers, and what they count.
#[derive(Clone, Debug)]
pub struct Targets {
    /// `[rows]` int32, uint32 or int64: an entry of the vocabulary, or [`Targets::ignore`]. Any
    /// other value stops the task with a panic that names it (the pool returns it as an error).
    pub labels: DynView,
    /// The label of rows without loss, usually -100.
    pub ignore: i64,
    /// c: logits become c·tanh(logit / c).
    pub soft_cap: Option<f32>,
}

/// Factors of the gradient.
#[derive(Clone, Debug)]
pub struct GradientScale {
    /// For all rows.
    pub factor: f32,
    /// `[rows]` f32, multiplied in if present.
    pub rows: Option<DynView>,
}

/// What [`cross_entropy`] reads and writes.
pub struct CrossEntropyArgs {
    /// `[rows, vocabulary]`, f32, bf16 or f16.
    pub logits: DynView,
    /// The labels of the rows.
    pub targets: Targets,
    /// `[rows]` f32: -ln softmax(logits)\[label\], 0 for ignored rows.
    pub loss: Option<DynViewMut>,
    /// `[rows]` f32: ln Σ exp(logits), ignored rows too.
    pub lse: Option<DynViewMut>,
    /// `[rows, vocabulary]`: (softmax - one-hot)·scale, 0 for ignored rows, f32, bf16 or f16.
    /// A row of it may begin where that of the logits does, in a type that is no larger.
    pub gradient: Option<(DynViewMut, GradientScale)>,
}

/// Loss, log-sum-exp and gradient of whole rows.
pub fn cross_entropy(isa: Isa, args: CrossEntropyArgs) -> Result<Box<dyn Task>, KernelError> {
    let name = "cross_entropy";
    let logits = matrix(name, "logits", &args.logits)?;
    let labels = Labels::new(name, args.targets, logits.count(), logits.width)?;
    if labels.size == 0 && logits.count() > 0 {
        return Err(KernelError::new(name, "a vocabulary of no entries"));
    }
    let loss = column(name, "loss", args.loss, logits.count())?;
    let lse = column(name, "lse", args.lse, logits.count())?;
    let gradient = match args.gradient {
        None => None,
        Some((view, scale)) => {
            check_shape(name, "gradient", &view.shape, &args.logits.shape)?;
            Some((Rows::new_mut(name, "gradient", &view)?, Scale::new(name, scale, logits.count())?))
        }
    };
    Ok(Box::new(CrossEntropy { isa, logits, labels, loss, lse, gradient }))
}

fn matrix(name: &'static str, what: &str, view: &DynView) -> Result<Rows, KernelError> {
    if view.shape.len() != 2 {
        let message = format!("{what} has shape {:?}, expected [rows, vocabulary]", view.shape);
        return Err(KernelError::new(name, message));
    }
    Rows::new(name, what, view)
}

fn check_f32(name: &'static str, what: &str, dtype: Dtype) -> Result<(), KernelError> {
    if dtype == Dtype::F32 {
        return Ok(());
    }
    Err(KernelError::new(name, format!("{what} is {dtype}, expected float32")))
}

/// A vector as rows of one.
fn as_column(pointer: *const u8, view: &DynView) -> DynView {
    DynView {
        pointer,
        dtype: view.dtype,
        shape: [view.shape[0], 1].as_slice().into(),
        strides: [view.strides[0], 1].as_slice().into(),
    }
}

/// An output `[rows]` f32.
fn column(
    name: &'static str,
    what: &str,
    view: Option<DynViewMut>,
    rows: usize,
) -> Result<Option<Rows>, KernelError> {
    let Some(view) = view else { return Ok(None) };
    check_shape(name, what, &view.shape, &[rows])?;
    check_f32(name, what, view.dtype)?;
    let view = DynViewMut {
        pointer: view.pointer,
        dtype: view.dtype,
        shape: [rows, 1].as_slice().into(),
        strides: [view.strides[0], 1].as_slice().into(),
    };
    Rows::new_mut(name, what, &view).map(Some)
}

/// Checked labels.
struct Labels {
    view: DynView,
    ignore: i64,
    soft_cap: Option<f32>,
    /// Entries of the whole vocabulary.
    size: usize,
}

impl Labels {
    fn new(name: &'static str, targets: Targets, rows: usize, size: usize) -> Result<Labels, KernelError> {
        let view = targets.labels;
        check_shape(name, "labels", &view.shape, &[rows])?;
        if !matches!(view.dtype, Dtype::I32 | Dtype::U32 | Dtype::I64) {
            let message = format!("labels are {}, expected int32, uint32 or int64", view.dtype);
            return Err(KernelError::new(name, message));
        }
        if targets.soft_cap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
            return Err(KernelError::new(name, "a soft cap has to be positive"));
        }
        Ok(Labels { view, ignore: targets.ignore, soft_cap: targets.soft_cap, size })
    }

    /// The label of a row, or None if it is ignored.
    fn of(&self, row: usize) -> Option<usize> {
        let at = row as isize * self.view.strides[0];
        // SAFETY: the shape was checked to be [rows].
        let label = unsafe {
            match self.view.dtype {
                Dtype::I32 => *self.view.pointer.cast::<i32>().offset(at) as i64,
                Dtype::U32 => *self.view.pointer.cast::<u32>().offset(at) as i64,
                _ => *self.view.pointer.cast::<i64>().offset(at),
            }
        };
        if label == self.ignore {
            return None;
        }
        assert!(
            (0..self.size as i64).contains(&label),
            "row {row} has the label {label}, expected 0..{} or {} for none",
            self.size,
            self.ignore
        );
        Some(label as usize)
    }

    #[inline(always)]
    fn cap<V: Vector>(&self, x: V) -> V {
        match self.soft_cap {
            Some(cap) => math::tanh(x / V::splat(cap)) * V::splat(cap),
            None => x,
        }
    }

    /// The derivative of a capped logit by the one that was there before.
    #[inline(always)]
    fn slope<V: Vector>(&self, capped: V) -> Option<V> {
        let ratio = capped / V::splat(self.soft_cap?);
        Some(ratio.neg_mul_add(ratio, V::splat(1.0)))
    }
}

struct Scale {
    factor: f32,
    rows: Option<Rows>,
}

impl Scale {
    fn new(name: &'static str, scale: GradientScale, rows: usize) -> Result<Scale, KernelError> {
        let view = match &scale.rows {
            None => None,
            Some(view) => {
                check_shape(name, "the rows' factors", &view.shape, &[rows])?;
                Some(Rows::new(name, "the rows' factors", &as_column(view.pointer, view))?)
            }
        };
        Ok(Scale { factor: scale.factor, rows: view })
    }

    #[inline(always)]
    fn of<V: Vector>(&self, row: usize) -> f32 {
        let mut own = [1.0];
        if let Some(rows) = &self.rows {
            // SAFETY: there is one factor a row; nobody writes it.
            unsafe { rows.load::<V>(row, &mut own) };
        }
        self.factor * own[0]
    }
}

struct CrossEntropy {
    isa: Isa,
    logits: Rows,
    labels: Labels,
    loss: Option<Rows>,
    lse: Option<Rows>,
    gradient: Option<(Rows, Scale)>,
}

/// Entries that one chunk works on, about; a row is never cut.
const CHUNK: usize = 32_768;

/// Rows of so many entries in a chunk.
fn rows_per_chunk(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

impl Task for CrossEntropy {
    fn chunks(&self) -> usize {
        self.logits.count().div_ceil(rows_per_chunk(self.logits.width))
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.isa, Chunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        "cross_entropy"
    }
}

struct Chunk<'a> {
    task: &'a CrossEntropy,
    chunk: usize,
    scratch: &'a Scratch,
}

impl Kernel for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let task = self.task;
        let width = task.logits.width;
        let buffer = self.scratch.take::<f32>(VOCABULARY_TILE.min(width));
        let start = self.chunk * rows_per_chunk(width);
        for row in start..(start + rows_per_chunk(width)).min(task.logits.count()) {
            let label = task.labels.of(row);
            let mut state = State::EMPTY;
            // SAFETY: all rows are in range, and outputs of this row are written here alone.
            unsafe {
                if label.is_some() || task.lse.is_some() {
                    for at in (0..width).step_by(VOCABULARY_TILE) {
                        let tile = &mut buffer[..VOCABULARY_TILE.min(width - at)];
                        task.logits.load_from::<V>(row, at, tile);
                        state =
                            state.fold::<V>(&task.labels, tile, label.map(|label| label.wrapping_sub(at)));
                    }
                }
                let total = state.finish::<V>(row, label, &task.loss, &task.lse);
                if let Some((gradient, scale)) = &task.gradient {
                    differentiate::<V>(task, row, label, total, scale, gradient, buffer);
                }
            }
        }
    }
}

/// What is known of a row so far.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
    target: f32,
}

impl State {
    const EMPTY: State = State { max: f32::NEG_INFINITY, sum: 0.0, target: f32::NEG_INFINITY };

    /// Adds a tile of logits, which become their exponentials relative to the new maximum. `place`
    /// is where the label's is, if it lies in the tile.
    #[inline(always)]
    fn fold<V: Vector>(self, labels: &Labels, tile: &mut [f32], place: Option<usize>) -> State {
        let lowest = f32::NEG_INFINITY;
        let mut max = V::splat(lowest);
        for part in tile.chunks_mut(LANES) {
            let x = labels.cap(V::from_slice(part, lowest));
            // The bound -c that a cap gives to the padding is no larger than any entry.
            max = max.max(x);
            x.to_slice(part);
        }
        let max = max.max_lane();
        let target = match place {
            Some(place) if place < tile.len() => tile[place],
            _ => self.target,
        };
        let max = if self.max > max { self.max } else { max };
        if max == lowest {
            tile.fill(0.0);
            return State { target, ..self };
        }
        let mut sum = V::zero();
        for part in tile.chunks_mut(LANES) {
            let value = math::exp_to_one(V::from_slice(part, lowest) - V::splat(max));
            sum = sum + value;
            value.to_slice(part);
        }
        State { max, sum: self.sum.mul_add(self.shrink::<V>(max), sum.sum()), target }
    }

    /// The factor of what was summed relative to the maximum so far, now that it is `max`.
    #[inline(always)]
    fn shrink<V: Vector>(&self, max: f32) -> f32 {
        if self.max == max { 1.0 } else { math::exp(V::splat(self.max - max)).to_array()[0] }
    }

    /// Writes loss and log-sum-exp; returns the latter.
    #[inline(always)]
    unsafe fn finish<V: Vector>(
        self,
        row: usize,
        label: Option<usize>,
        loss: &Option<Rows>,
        lse: &Option<Rows>,
    ) -> f32 {
        let log = math::log(V::splat(self.sum)).to_array()[0];
        // SAFETY: promised by the caller.
        unsafe {
            if let Some(loss) = loss {
                // (max - target) is exact where the target is likely, which keeps small losses.
                let value = if label.is_some() { (self.max - self.target) + log } else { 0.0 };
                loss.store::<V>(row, &[value]);
            }
            if let Some(lse) = lse {
                lse.store::<V>(row, &[self.max + log]);
            }
        }
        self.max + log
    }
}

/// Writes the gradient of a row.
#[inline(always)]
unsafe fn differentiate<V: Vector>(
    task: &CrossEntropy,
    row: usize,
    label: Option<usize>,
    lse: f32,
    scale: &Scale,
    gradient: &Rows,
    buffer: &mut [f32],
) {
    let width = task.logits.width;
    let factor = scale.of::<V>(row);
    let (total, scale) = (V::splat(lse), V::splat(factor));
    for at in (0..width).step_by(VOCABULARY_TILE) {
        let tile = &mut buffer[..VOCABULARY_TILE.min(width - at)];
        match label {
            None => tile.fill(0.0),
            Some(label) => {
                // SAFETY: promised by the caller; the tile ends inside the row.
                unsafe { task.logits.load_from::<V>(row, at, tile) };
                let place = label.wrapping_sub(at);
                for (index, part) in tile.chunks_mut(LANES).enumerate() {
                    let x = task.labels.cap(V::from_slice(part, 0.0));
                    let mut probability = math::exp_to_one(x - total);
                    let lane = place.wrapping_sub(index * LANES);
                    if lane < LANES {
                        let hot = V::mask_from_bits(1 << lane);
                        probability = V::select(hot, probability - V::splat(1.0), probability);
                    }
                    let mut value = probability * scale;
                    if let Some(slope) = task.labels.slope(x) {
                        value = value * slope;
                    }
                    value.to_slice(part);
                }
            }
        }
        // SAFETY: as above.
        unsafe { gradient.store_from::<V>(row, at, tile) };
    }
}

#[cfg(test)]
mod tests;
