//! Softmax cross-entropy over a vocabulary, whole or tile by tile, with its gradient.
//!
//! [`cross_entropy`] takes logits that are there: loss, log-sum-exp and gradient in one pass over
//! each row, the gradient in place of the logits if wanted. Fused linear cross-entropy drives it
//! on a block of rows at a time (logits = H·Wᵀ of the block, loss and gradient in place,
//! dH = gradient·W), so that the logits of all rows are never stored. Where even a block of rows
//! is too much, [`cross_entropy_tile`] folds one range of the vocabulary after another into a
//! state of three numbers a row, [`cross_entropy_finish`] turns that into losses, and
//! [`cross_entropy_gradient`] gives the gradient of a range whose logits were formed again.
//!
//! One order on every path (docs/NUMERICS.md): the vocabulary in tiles of [`VOCABULARY_TILE`];
//! in a tile the exponentials are relative to the tile's maximum and summed in 16 lanes; tiles
//! are merged ascending. Ranges that begin at multiples of the tile have the bits of the whole.

use mica_simd::{Isa, Kernel, LANES, Vector, dispatch, math};
use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::error::KernelError;
use crate::rows::{Rows, check_shape};

/// Entries of the vocabulary whose exponentials are summed apart.
pub const VOCABULARY_TILE: usize = 4096;
/// Numbers that [`cross_entropy_tile`] keeps a row: maximum, sum, logit of the target.
pub const STATE: usize = 3;

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
    /// May alias the logits (same layout).
    pub gradient: Option<(DynViewMut, GradientScale)>,
}

/// Loss, log-sum-exp and gradient of whole rows.
pub fn cross_entropy(isa: Isa, args: CrossEntropyArgs) -> Result<Box<dyn Task>, KernelError> {
    let name = "cross_entropy";
    let logits = matrix(name, "logits", &args.logits)?;
    let labels = Labels::new(name, args.targets, logits.count(), 0, logits.width)?;
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
    Ok(Box::new(CrossEntropy { isa, logits, labels, work: Work::Whole { loss, lse, gradient } }))
}

/// Folds the logits of the vocabulary entries `first ..` into `state`, `[rows, 3]` f32. The range
/// of `first` 0 starts the state; the others follow in ascending order. `first` has to be a
/// multiple of [`VOCABULARY_TILE`], and `vocabulary` is its whole size.
pub fn cross_entropy_tile(
    isa: Isa,
    logits: DynView,
    first: usize,
    vocabulary: usize,
    targets: Targets,
    state: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let name = "cross_entropy_tile";
    let logits = matrix(name, "logits", &logits)?;
    if !first.is_multiple_of(VOCABULARY_TILE) || first + logits.width > vocabulary {
        let message = format!(
            "entries {first}..{} of {vocabulary}: expected to begin at a multiple of {VOCABULARY_TILE} and to end inside",
            first + logits.width
        );
        return Err(KernelError::new(name, message));
    }
    check_shape(name, "state", &state.shape, &[logits.count(), STATE])?;
    check_f32(name, "state", state.dtype)?;
    let labels = Labels::new(name, targets, logits.count(), first, vocabulary)?;
    let state = Rows::new_mut(name, "state", &state)?;
    Ok(Box::new(CrossEntropy { isa, logits, labels, work: Work::Fold { state } }))
}

/// Losses and log-sum-exps (both `[rows]` f32) of states that saw the whole vocabulary.
pub fn cross_entropy_finish(
    isa: Isa,
    state: DynView,
    vocabulary: usize,
    targets: Targets,
    loss: Option<DynViewMut>,
    lse: Option<DynViewMut>,
) -> Result<Box<dyn Task>, KernelError> {
    let name = "cross_entropy_finish";
    check_f32(name, "state", state.dtype)?;
    let state = matrix(name, "state", &state)?;
    if state.width != STATE {
        return Err(KernelError::new(
            name,
            format!("a state of {} numbers a row, expected {STATE}", state.width),
        ));
    }
    let labels = Labels::new(name, targets, state.count(), 0, vocabulary)?;
    let loss = column(name, "loss", loss, state.count())?;
    let lse = column(name, "lse", lse, state.count())?;
    Ok(Box::new(CrossEntropy { isa, logits: state, labels, work: Work::Finish { loss, lse } }))
}

/// The gradient of the vocabulary entries `first ..` from their logits and the rows'
/// log-sum-exps (`[rows]` f32). `gradient` has the shape of `logits` and may alias it.
pub fn cross_entropy_gradient(
    isa: Isa,
    logits: DynView,
    first: usize,
    vocabulary: usize,
    targets: Targets,
    lse: DynView,
    scale: GradientScale,
    gradient: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let name = "cross_entropy_gradient";
    check_shape(name, "gradient", &gradient.shape, &logits.shape)?;
    let logits = matrix(name, "logits", &logits)?;
    check_shape(name, "lse", &lse.shape, &[logits.count()])?;
    check_f32(name, "lse", lse.dtype)?;
    let labels = Labels::new(name, targets, logits.count(), first, vocabulary)?;
    let lse = Rows::new(name, "lse", &as_column(lse.pointer, &lse))?;
    let scale = Scale::new(name, scale, logits.count())?;
    let gradient = Rows::new_mut(name, "gradient", &gradient)?;
    Ok(Box::new(CrossEntropy { isa, logits, labels, work: Work::Gradient { lse, scale, gradient } }))
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
    /// The first vocabulary entry of the logits at hand.
    first: usize,
    /// The whole vocabulary.
    size: usize,
}

impl Labels {
    fn new(
        name: &'static str,
        targets: Targets,
        rows: usize,
        first: usize,
        size: usize,
    ) -> Result<Labels, KernelError> {
        let view = targets.labels;
        check_shape(name, "labels", &view.shape, &[rows])?;
        if !matches!(view.dtype, Dtype::I32 | Dtype::U32 | Dtype::I64) {
            let message = format!("labels are {}, expected int32, uint32 or int64", view.dtype);
            return Err(KernelError::new(name, message));
        }
        if targets.soft_cap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
            return Err(KernelError::new(name, "a soft cap has to be positive"));
        }
        Ok(Labels { view, ignore: targets.ignore, soft_cap: targets.soft_cap, first, size })
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

enum Work {
    Whole { loss: Option<Rows>, lse: Option<Rows>, gradient: Option<(Rows, Scale)> },
    Fold { state: Rows },
    Finish { loss: Option<Rows>, lse: Option<Rows> },
    Gradient { lse: Rows, scale: Scale, gradient: Rows },
}

struct CrossEntropy {
    isa: Isa,
    logits: Rows,
    labels: Labels,
    work: Work,
}

/// Entries that one chunk works on, about; a row is never cut.
const CHUNK: usize = 32_768;

impl CrossEntropy {
    fn rows_per_chunk(&self) -> usize {
        (CHUNK / self.logits.width.max(1)).max(1)
    }
}

impl Task for CrossEntropy {
    fn chunks(&self) -> usize {
        self.logits.count().div_ceil(self.rows_per_chunk())
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
        let tile = self.scratch.take::<f32>(VOCABULARY_TILE.min(task.logits.width.max(STATE)));
        let start = self.chunk * task.rows_per_chunk();
        for row in start..(start + task.rows_per_chunk()).min(task.logits.count()) {
            let label = task.labels.of(row);
            // SAFETY: all rows are in range, and outputs of this row are written here alone.
            unsafe {
                match &task.work {
                    Work::Whole { loss, lse, gradient } => {
                        let mut state = State::EMPTY;
                        if label.is_some() || lse.is_some() {
                            state = fold::<V>(task, row, label, state, tile);
                        }
                        let total = state.finish::<V>(row, label, loss, lse);
                        if let Some((gradient, scale)) = gradient {
                            differentiate::<V>(task, row, label, total, scale, gradient, tile);
                        }
                    }
                    Work::Fold { state: rows } => {
                        let mut values = [0.0; STATE];
                        let mut state = State::EMPTY;
                        if task.labels.first > 0 {
                            rows.load::<V>(row, &mut values);
                            state = State { max: values[0], sum: values[1], target: values[2] };
                        }
                        let state = fold::<V>(task, row, label, state, tile);
                        rows.store::<V>(row, &[state.max, state.sum, state.target]);
                    }
                    Work::Finish { loss, lse } => {
                        let mut values = [0.0; STATE];
                        task.logits.load::<V>(row, &mut values);
                        let state = State { max: values[0], sum: values[1], target: values[2] };
                        state.finish::<V>(row, label, loss, lse);
                    }
                    Work::Gradient { lse, scale, gradient } => {
                        let mut total = [0.0];
                        lse.load::<V>(row, &mut total);
                        differentiate::<V>(task, row, label, total[0], scale, gradient, tile);
                    }
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

/// Adds the logits of a row to its state, tile by tile.
#[inline(always)]
unsafe fn fold<V: Vector>(
    task: &CrossEntropy,
    row: usize,
    label: Option<usize>,
    mut state: State,
    buffer: &mut [f32],
) -> State {
    let width = task.logits.width;
    let lowest = f32::NEG_INFINITY;
    for at in (0..width).step_by(VOCABULARY_TILE) {
        let tile = &mut buffer[..VOCABULARY_TILE.min(width - at)];
        // SAFETY: promised by the caller; the tile ends inside the row.
        unsafe { task.logits.load_from::<V>(row, at, tile) };
        let mut max = V::splat(lowest);
        for part in tile.chunks_mut(LANES) {
            let x = task.labels.cap(V::from_slice(part, lowest));
            // The bound -c that a cap gives to the padding is no larger than any entry.
            max = max.max(x);
            x.to_slice(part);
        }
        let max = max.max_lane();
        if let Some(label) = label {
            let place = label.wrapping_sub(task.labels.first + at);
            if place < tile.len() {
                state.target = tile[place];
            }
        }
        if max == lowest {
            continue;
        }
        let mut sum = V::zero();
        for part in tile.chunks(LANES) {
            sum = sum + math::exp(V::from_slice(part, lowest) - V::splat(max));
        }
        let sum = sum.sum();
        // Merge, as attention does.
        let largest = if state.max > max { state.max } else { max };
        let lanes = std::array::from_fn(|i| if i == 0 { state.max - largest } else { max - largest });
        let exps = math::exp(V::from_array(lanes)).to_array();
        state.sum = sum.mul_add(exps[1], state.sum * exps[0]);
        state.max = largest;
    }
    state
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
                let place = label.wrapping_sub(task.labels.first + at);
                for (index, part) in tile.chunks_mut(LANES).enumerate() {
                    let x = task.labels.cap(V::from_slice(part, 0.0));
                    let mut probability = math::exp(x - total);
                    let lane = place.wrapping_sub(index * LANES);
                    if lane < LANES {
                        let hot = V::mask_from_bits(1 << lane);
                        probability = V::select(hot, probability - V::splat(1.0), probability);
                    }
                    let mut value = probability * scale;
                    if let Some(cap) = task.labels.soft_cap {
                        let ratio = x / V::splat(cap);
                        value = value * ratio.neg_mul_add(ratio, V::splat(1.0));
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
#[path = "cross_entropy_tests.rs"]
mod tests;
