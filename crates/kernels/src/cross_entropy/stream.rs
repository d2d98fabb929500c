//! Cross-entropy of a vocabulary that passes by, and the gradient of the hidden rows.
//!
//! With weights W and hidden rows h the gradient is Σ p·w over the vocabulary less w of the label,
//! p = exp(h·w) / Σ exp: attention of h over W. So as attention does, [`fold`] turns the logits of a
//! tile into exponentials relative to the largest logit so far, whose product with the tile's
//! weights the caller adds to `sums`, after shrinking what is there. When the vocabulary has
//! passed, [`finish`] divides by the sum of the exponentials.
//!
//! The label's own exponential stays out of the product (it is written as zero), and its weights
//! are added at the end times p - 1: near 1, p less 1 would be lost in a rounded p.

use mica_simd::{Isa, Kernel, LANES, Vector, dispatch, math};
use mica_threads::{Scratch, Task};

use super::{Labels, State, Targets, VOCABULARY_TILE, check_f32, column, matrix, rows_per_chunk};
use crate::dtype::{DynView, DynViewMut};
use crate::error::KernelError;
use crate::rows::{Rows, check_shape};

/// Numbers that are kept of a row: maximum, sum, logit of the target.
pub const STATE: usize = 3;

/// What [`fold`] reads and writes.
pub struct FoldArgs {
    /// `[rows, entries]` of one tile, f32, bf16 or f16.
    pub logits: DynView,
    /// The tile's first entry, a multiple of [`VOCABULARY_TILE`]. The tile of 0 begins the state;
    /// the others follow in ascending order.
    pub first: usize,
    /// Entries of the whole vocabulary.
    pub vocabulary: usize,
    /// The labels of the rows.
    pub targets: Targets,
    /// `[rows, 3]` f32.
    pub state: DynViewMut,
    /// For gradients.
    pub gradient: Option<FoldGradient>,
}

/// What is left behind for the gradient.
pub struct FoldGradient {
    /// `[rows, entries]`: what the tile's weights count. A row of it may begin where that of the
    /// logits does, in a type that is no larger.
    pub factors: DynViewMut,
    /// `[rows, width]` f32: Σ factors·weights of the tiles before, made relative to the new
    /// maximum. Not touched at the first tile.
    pub sums: DynViewMut,
}

/// What [`finish`] reads and writes.
pub struct FinishArgs {
    /// `[rows, 3]` f32, after the last tile.
    pub state: DynView,
    /// Entries of the whole vocabulary.
    pub vocabulary: usize,
    /// The labels of the rows.
    pub targets: Targets,
    /// `[rows]` f32: -ln softmax(logits)\[label\], 0 for ignored rows.
    pub loss: Option<DynViewMut>,
    /// Σ factors·weights, which becomes the gradient of the hidden rows (0 of ignored ones), and
    /// the weights of each row's label: both `[rows, width]` f32.
    pub gradient: Option<(DynViewMut, DynView)>,
}

/// Adds the logits of a tile to the rows' states.
pub fn fold(isa: Isa, args: FoldArgs) -> Result<Box<dyn Task>, KernelError> {
    let name = "cross_entropy_fold";
    let (first, vocabulary) = (args.first, args.vocabulary);
    let logits = matrix(name, "logits", &args.logits)?;
    let end = first + logits.width;
    if !first.is_multiple_of(VOCABULARY_TILE) || end != vocabulary.min(first + VOCABULARY_TILE) {
        let message = format!(
            "entries {first}..{end} of {vocabulary}: expected a tile of {VOCABULARY_TILE}, or what is left"
        );
        return Err(KernelError::new(name, message));
    }
    check_shape(name, "state", &args.state.shape, &[logits.count(), STATE])?;
    check_f32(name, "state", args.state.dtype)?;
    let labels = Labels::new(name, args.targets, logits.count(), vocabulary)?;
    let state = Rows::new_mut(name, "state", &args.state)?;
    let gradient = match args.gradient {
        None => None,
        Some(FoldGradient { factors, sums }) => {
            check_shape(name, "factors", &factors.shape, &args.logits.shape)?;
            Some((Rows::new_mut(name, "factors", &factors)?, sums_of(name, &sums, logits.count())?))
        }
    };
    Ok(Box::new(Fold { isa, logits, first, labels, state, gradient }))
}

/// Losses and gradients of rows that saw the whole vocabulary.
pub fn finish(isa: Isa, args: FinishArgs) -> Result<Box<dyn Task>, KernelError> {
    let name = "cross_entropy_finish";
    check_f32(name, "state", args.state.dtype)?;
    let state = matrix(name, "state", &args.state)?;
    if state.width != STATE {
        return Err(KernelError::new(
            name,
            format!("a state of {} numbers a row, expected {STATE}", state.width),
        ));
    }
    let rows = state.count();
    let labels = Labels::new(name, args.targets, rows, args.vocabulary)?;
    let loss = column(name, "loss", args.loss, rows)?;
    let gradient = match args.gradient {
        None => None,
        Some((sums, weights)) => {
            check_shape(name, "the labels' weights", &weights.shape, &sums.shape)?;
            check_f32(name, "the labels' weights", weights.dtype)?;
            let weights = Rows::new(name, "the labels' weights", &weights)?;
            Some((sums_of(name, &sums, rows)?, weights))
        }
    };
    Ok(Box::new(Finish { isa, state, labels, loss, gradient }))
}

/// Sums `[rows, width]` f32 of contiguous rows.
fn sums_of(name: &'static str, sums: &DynViewMut, rows: usize) -> Result<Rows, KernelError> {
    check_f32(name, "sums", sums.dtype)?;
    if sums.shape.len() != 2 || sums.shape[0] != rows || (sums.shape[1] > 1 && sums.strides[1] != 1) {
        let message = format!(
            "sums have shape {:?} and strides {:?}, expected {rows} contiguous rows",
            sums.shape, sums.strides
        );
        return Err(KernelError::new(name, message));
    }
    Rows::new_mut(name, "sums", sums)
}

/// A row of sums.
///
/// # Safety
/// The row exists, and nobody else uses it.
#[expect(clippy::mut_from_ref, reason = "rows of an output, which the caller divides up")]
unsafe fn row_of(sums: &Rows, row: usize) -> &mut [f32] {
    // SAFETY: rows are contiguous f32, by `sums_of`.
    unsafe { std::slice::from_raw_parts_mut(sums.address(row).0.cast_mut().cast(), sums.width) }
}

struct Fold {
    isa: Isa,
    logits: Rows,
    first: usize,
    labels: Labels,
    state: Rows,
    gradient: Option<(Rows, Rows)>,
}

impl Task for Fold {
    fn chunks(&self) -> usize {
        self.logits.count().div_ceil(rows_per_chunk(self.logits.width))
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.isa, FoldChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        "cross_entropy_fold"
    }
}

struct FoldChunk<'a> {
    task: &'a Fold,
    chunk: usize,
    scratch: &'a Scratch,
}

impl Kernel for FoldChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Fold { logits, first, labels, state, gradient, .. } = self.task;
        let tile = self.scratch.take::<f32>(logits.width);
        let uncapped = self.scratch.take::<f32>(if labels.soft_cap.is_some() { logits.width } else { 0 });
        let start = self.chunk * rows_per_chunk(logits.width);
        for row in start..(start + rows_per_chunk(logits.width)).min(logits.count()) {
            let label = labels.of(row);
            let place = label.map(|label| label.wrapping_sub(*first));
            // SAFETY: the row exists, and what belongs to it is written here alone.
            unsafe {
                let mut before = State::EMPTY;
                if *first > 0 {
                    let mut values = [0.0; STATE];
                    state.load::<V>(row, &mut values);
                    before = State { max: values[0], sum: values[1], target: values[2] };
                }
                logits.load_from::<V>(row, 0, tile);
                let after = before.fold::<V>(labels, tile, place);
                state.store::<V>(row, &[after.max, after.sum, after.target]);
                let Some((factors, sums)) = gradient else { continue };
                if label.is_none() {
                    tile.fill(0.0);
                } else {
                    if let Some(place) = place
                        && place < tile.len()
                    {
                        tile[place] = 0.0;
                    }
                    if labels.soft_cap.is_some() {
                        logits.load_from::<V>(row, 0, uncapped);
                        slopes::<V>(labels, uncapped, tile);
                    }
                }
                factors.store_from::<V>(row, 0, tile);
                let shrink = before.shrink::<V>(after.max);
                if *first > 0 && shrink != 1.0 {
                    for part in row_of(sums, row).chunks_mut(LANES) {
                        (V::from_slice(part, 0.0) * V::splat(shrink)).to_slice(part);
                    }
                }
            }
        }
    }
}

/// Multiplies exponentials by what a soft cap makes of a small change of their logits.
#[inline(always)]
fn slopes<V: Vector>(labels: &Labels, logits: &[f32], tile: &mut [f32]) {
    for (part, logits) in tile.chunks_mut(LANES).zip(logits.chunks(LANES)) {
        let capped = labels.cap(V::from_slice(logits, 0.0));
        if let Some(slope) = labels.slope(capped) {
            (V::from_slice(part, 0.0) * slope).to_slice(part);
        }
    }
}

struct Finish {
    isa: Isa,
    state: Rows,
    labels: Labels,
    loss: Option<Rows>,
    gradient: Option<(Rows, Rows)>,
}

impl Finish {
    fn rows_per_chunk(&self) -> usize {
        rows_per_chunk(self.gradient.as_ref().map_or(STATE, |(sums, _)| sums.width))
    }
}

impl Task for Finish {
    fn chunks(&self) -> usize {
        self.state.count().div_ceil(self.rows_per_chunk())
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.isa, FinishChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        "cross_entropy_finish"
    }
}

struct FinishChunk<'a> {
    task: &'a Finish,
    chunk: usize,
    scratch: &'a Scratch,
}

impl Kernel for FinishChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Finish { state, labels, loss, gradient, .. } = self.task;
        let per_chunk = self.task.rows_per_chunk();
        let width = gradient.as_ref().map_or(0, |(sums, _)| sums.width);
        let of_label = self.scratch.take::<f32>(width);
        let start = self.chunk * per_chunk;
        for row in start..(start + per_chunk).min(state.count()) {
            let label = labels.of(row);
            // SAFETY: the row exists, and what belongs to it is written here alone.
            unsafe {
                let mut values = [0.0; STATE];
                state.load::<V>(row, &mut values);
                let [max, sum, target] = values;
                let total = State { max, sum, target }.finish::<V>(row, label, loss, &None);
                let Some((sums, weights)) = gradient else { continue };
                let sums = row_of(sums, row);
                if label.is_none() {
                    sums.fill(0.0);
                    continue;
                }
                weights.load::<V>(row, of_label);
                let target = V::splat(target);
                let mut factor = math::exp(target - V::splat(total)) - V::splat(1.0);
                if let Some(slope) = labels.slope(target) {
                    factor = factor * slope;
                }
                let share = V::splat(1.0 / sum);
                for (part, weight) in sums.chunks_mut(LANES).zip(of_label.chunks(LANES)) {
                    let others = V::from_slice(part, 0.0) * share;
                    V::from_slice(weight, 0.0).mul_add(factor, others).to_slice(part);
                }
            }
        }
    }
}
