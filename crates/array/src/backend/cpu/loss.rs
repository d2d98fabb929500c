//! The output head with its loss: no more logits exist at a time than a few rows' or a tile's.
//!
//! Without a gradient of the weight, tiles of the vocabulary pass by: logits = h · wᵀ of the tile;
//! their exponentials, in their own place; dh += exponentials · w. A tile's logits and weights stay
//! in the caches, and no exponential is formed twice.
//!
//! The gradient of the weight sums over rows and needs the rows' totals first, so there it goes by
//! blocks of rows: logits of the whole vocabulary; loss, and the logits' gradient in their own
//! place; dh = dlogits · w; dw += dlogitsᵀ · h. Rows do not depend on the cut, nor losses on the way.

use mica_kernels::cross_entropy::stream::{self, FinishArgs, FoldArgs, FoldGradient, STATE};
use mica_kernels::cross_entropy::{CrossEntropyArgs, GradientScale, Targets, VOCABULARY_TILE, cross_entropy};
use mica_kernels::elementwise::{UnaryOp, unary};
use mica_kernels::reduce::{ReduceOp, reduce};
use mica_kernels::{DynViewMut, copy};
use mica_simd::Isa;
use mica_threads::Task;

use super::products::{linear_part, lookup, product};
use super::{Lowered, dense, rows_of};
use crate::backend::{HostView, Operand, Step};
use crate::op::{CrossEntropySpec, Precision};
use crate::{Dtype, Result};

/// Bytes of f32 logits at once where a tile at a time is held: they should stay in a third-level cache.
const TILE_BYTES: usize = 16 << 20;
/// The same where the whole vocabulary of some rows is: each block of rows reads and packs the whole
/// head twice, so few rows would spend their time on that.
const BLOCK_BYTES: usize = 128 << 20;

pub(super) fn lower(step: &Step, spec: &CrossEntropySpec) -> Result<Lowered> {
    let head = Head {
        hidden: step.inputs[0].host()?.clone(),
        weight: step.inputs[1].clone(),
        targets: step.inputs[2].host()?.clone(),
        sum: step.outputs[0].host()?.clone(),
        logprobs: optional(&step.outputs[1]),
        dhidden: optional(&step.outputs[2]),
        dweight: optional(&step.outputs[3]),
        vocabulary: match &step.inputs[1] {
            Operand::Packed(weight) => weight.shape()[0],
            other => other.host()?.shape[0],
        },
        precision: if spec.precision == Precision::Fast { Precision::Bf16 } else { spec.precision },
        softcap: spec.softcap,
    };
    // Sizes depend on shapes alone, so a trial without memory tells them.
    let own = head.places(std::ptr::null_mut()).end as usize;
    let mut products = 0;
    head.tasks(std::ptr::null_mut(), |lowered| {
        products = products.max(lowered.bytes());
        Ok(())
    })?;
    Ok(Lowered::WithWorkspace(
        own + products,
        Box::new(move |workspace: *mut u8, list: &mut Vec<Box<dyn Task>>| {
            let shared = head.places(workspace).end;
            head.tasks(workspace, |lowered| lowered.give(shared, list))
        }),
    ))
}

fn optional(operand: &Operand) -> Option<HostView> {
    match operand {
        Operand::Host(view) => Some(view.clone()),
        _ => None,
    }
}

struct Head {
    hidden: HostView,
    weight: Operand,
    targets: HostView,
    sum: HostView,
    logprobs: Option<HostView>,
    dhidden: Option<HostView>,
    dweight: Option<HostView>,
    vocabulary: usize,
    precision: Precision,
    softcap: Option<f32>,
}

/// The parts of the workspace.
struct Places {
    /// `[rows]`.
    losses: HostView,
    /// Room for `block_rows` rows.
    logits: *mut u8,
    /// `[block rows, 3]`, if tiles pass by.
    state: *mut u8,
    /// `[block rows, width]`: the weights of the labels, if they are wanted.
    of_labels: *mut u8,
    end: *mut u8,
}

impl Head {
    fn rows(&self) -> usize {
        self.hidden.shape[0]
    }

    fn width(&self) -> usize {
        self.hidden.shape[1]
    }

    /// Whether tiles of the vocabulary pass by, rather than blocks of rows.
    fn streams(&self) -> bool {
        self.dweight.is_none()
    }

    /// Entries of the vocabulary whose logits are there at a time.
    fn entries(&self) -> usize {
        if self.streams() { self.vocabulary.min(VOCABULARY_TILE) } else { self.vocabulary }
    }

    fn block_rows(&self) -> usize {
        let (bytes, least, most) = match self.streams() {
            true => (TILE_BYTES, 64, usize::MAX),
            false => (BLOCK_BYTES, 16, 512),
        };
        let most = (bytes / 4 / self.entries().max(1)).clamp(least, most);
        // Blocks of about the same size, in whole panels of rows.
        let rows = self.rows().max(1);
        rows.div_ceil(rows.div_ceil(most)).next_multiple_of(16).min(rows)
    }

    fn places(&self, workspace: *mut u8) -> Places {
        let block = self.block_rows();
        let mut end = workspace;
        let mut take = |numbers: usize| {
            let start = end;
            end = end.wrapping_add((numbers * 4).next_multiple_of(64));
            start
        };
        let losses = dense(take(self.rows()), &[self.rows()], Dtype::F32);
        let logits = take(block * self.row_step());
        let state = take(if self.streams() { block * STATE } else { 0 });
        let learns = self.streams() && self.dhidden.is_some();
        let of_labels = take(if learns { block * self.width() } else { 0 });
        Places { losses, logits, state, of_labels, end }
    }

    /// Hands over all tasks in order. Memory that is not an operand begins at `workspace`.
    fn tasks(&self, workspace: *mut u8, mut add: impl FnMut(Lowered) -> Result<()>) -> Result<()> {
        let places = self.places(workspace);
        if let Some(dweight) = &self.dweight {
            add(copy::fill_f64(0.0, dweight.view_mut())?.into())?;
        }
        let block = self.block_rows();
        for first in (0..self.rows()).step_by(block) {
            let count = block.min(self.rows() - first);
            match self.streams() {
                true => self.stream(first, count, &places, &mut add)?,
                false => self.whole(first, count, &places, &mut add)?,
            }
        }
        let losses = &places.losses;
        let scalar = DynViewMut { shape: [][..].into(), strides: [][..].into(), ..self.sum.view_mut() };
        add(reduce(ReduceOp::Sum, losses.view(), &[0], scalar)?.into())?;
        if let Some(logprobs) = &self.logprobs {
            add(unary(UnaryOp::Neg, losses.view(), logprobs.view_mut())?.into())?;
        }
        Ok(())
    }

    fn targets_of(&self, first: usize, count: usize) -> Targets {
        let labels = rows_of(&self.targets, first..first + count).view();
        Targets { labels, ignore: i64::MIN, soft_cap: self.softcap }
    }

    /// From one row of logits to the next: an odd number of cache lines, so that a column of a block does not fall into
    /// one set of a cache.
    fn row_step(&self) -> usize {
        self.entries().next_multiple_of(32) + 16
    }

    fn logits(&self, places: &Places, rows: usize, entries: usize) -> HostView {
        let mut logits = dense(places.logits, &[rows, entries], Dtype::F32);
        logits.strides[0] = self.row_step() as isize;
        logits
    }

    /// What logits become for the next product: its operand, in their own place.
    fn in_place(&self, logits: &HostView) -> HostView {
        if self.precision == Precision::Exact {
            return logits.clone();
        }
        let mut half = logits.clone();
        half.dtype = Dtype::BF16;
        half.strides[0] *= 2;
        half
    }

    /// `count` rows from `first` on, by tiles of the vocabulary.
    fn stream(
        &self,
        first: usize,
        count: usize,
        places: &Places,
        add: &mut impl FnMut(Lowered) -> Result<()>,
    ) -> Result<()> {
        let isa = Isa::get();
        let hidden = rows_of(&self.hidden, first..first + count);
        let sums = self.dhidden.as_ref().map(|dhidden| rows_of(dhidden, first..first + count));
        let state = dense(places.state, &[count, STATE], Dtype::F32);
        for entry in (0..self.vocabulary).step_by(VOCABULARY_TILE) {
            let entries = entry..self.vocabulary.min(entry + VOCABULARY_TILE);
            let tile = (&self.weight, entries.clone());
            let logits = self.logits(places, count, entries.len());
            add(linear_part(&hidden, tile.clone(), &logits, self.precision, false, false)?)?;
            let factors = self.in_place(&logits);
            let gradient =
                sums.as_ref().map(|sums| FoldGradient { factors: factors.view_mut(), sums: sums.view_mut() });
            let args = FoldArgs {
                logits: logits.view(),
                first: entry,
                vocabulary: self.vocabulary,
                targets: self.targets_of(first, count),
                state: state.view_mut(),
                gradient,
            };
            add(stream::fold(isa, args)?.into())?;
            if let Some(sums) = &sums {
                add(linear_part(&factors, tile, sums, self.precision, true, entry > 0)?)?;
            }
        }
        let of_labels = dense(places.of_labels, &[count, self.width()], Dtype::F32);
        if sums.is_some() {
            let labels = rows_of(&self.targets, first..first + count);
            add(lookup(&self.weight, &labels, &of_labels)?)?;
        }
        let args = FinishArgs {
            state: state.view(),
            vocabulary: self.vocabulary,
            targets: self.targets_of(first, count),
            loss: Some(rows_of(&places.losses, first..first + count).view_mut()),
            gradient: sums.map(|sums| (sums.view_mut(), of_labels.view())),
        };
        add(stream::finish(isa, args)?.into())
    }

    /// `count` rows from `first` on, with the logits of the whole vocabulary.
    fn whole(
        &self,
        first: usize,
        count: usize,
        places: &Places,
        add: &mut impl FnMut(Lowered) -> Result<()>,
    ) -> Result<()> {
        let hidden = rows_of(&self.hidden, first..first + count);
        let logits = self.logits(places, count, self.vocabulary);
        let all = (&self.weight, 0..self.vocabulary);
        add(linear_part(&hidden, all.clone(), &logits, self.precision, false, false)?)?;
        let gradient = self.in_place(&logits);
        let args = CrossEntropyArgs {
            logits: logits.view(),
            targets: self.targets_of(first, count),
            loss: Some(rows_of(&places.losses, first..first + count).view_mut()),
            lse: None,
            gradient: Some((gradient.view_mut(), GradientScale { factor: 1.0, rows: None })),
        };
        add(cross_entropy(Isa::get(), args)?.into())?;
        if let Some(dhidden) = &self.dhidden {
            let into = rows_of(dhidden, first..first + count);
            add(linear_part(&gradient, all, &into, self.precision, true, false)?)?;
        }
        if let Some(dweight) = &self.dweight {
            let mut left = gradient;
            left.shape.reverse();
            left.strides.reverse();
            add(product(&left, &hidden, dweight, self.precision, true)?)?;
        }
        Ok(())
    }
}
