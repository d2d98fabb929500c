//! Plans that are run again: their tasks are there, but for attention over pages, whose tables and lengths are others
//! each time.

use std::any::Any;
use std::sync::Arc;

use mica_threads::{Pool, Task};

use super::{Cpu, Lowered, fused, told};
use crate::backend::{Kept, Step};
use crate::kv::{PagedStep, Sequences};
use crate::op::Op;
use crate::storage::Buffer;
use crate::{Error, Result};

/// What is noted of a plan that is to be kept.
#[derive(Default)]
pub(super) struct Notes {
    /// The steps that attend over pages, by their place in the plan.
    paged: Vec<(usize, Step)>,
}

struct Plan {
    /// Up to the first step that attends over pages.
    head: Vec<Lowered>,
    /// That one and what follows.
    rest: Vec<Lowered>,
    paged: Vec<Paged>,
    /// Memory of the steps' tasks, but for those that are made anew.
    _workspace: Buffer,
    /// Memory of these.
    varying: Option<Buffer>,
}

impl Kept for Plan {}

/// A step that attends over pages; without the pages, which are the cache's.
struct Paged {
    /// Its place in the rest of the plan.
    at: usize,
    step: Step,
}

impl Notes {
    /// Notes a step that becomes the plan's one at this place.
    pub(super) fn note(&mut self, at: usize, step: &Step) {
        if matches!(step.op, Op::PagedAttention(_)) {
            self.paged.push((at, step.clone()));
        }
    }
}

/// The same step over these sequences.
fn over(step: &PagedStep, sequences: Sequences) -> Op {
    let &PagedStep { layer, ref kv, spec, .. } = step;
    Op::PagedAttention(Arc::new(PagedStep { layer, kv: kv.clone(), spec, sequences }))
}

impl Paged {
    /// Its tasks over these sequences.
    fn lower(&mut self, sequences: &Sequences) -> Result<Lowered> {
        let Op::PagedAttention(paged) = &self.step.op else { unreachable!("only such steps are noted") };
        let without = self.step.op.clone();
        self.step.op = over(paged, sequences.clone());
        let lowered = fused::lower(&self.step);
        self.step.op = without;
        lowered
    }
}

impl Plan {
    /// Makes the tasks of steps that attend over pages.
    fn renew(
        rest: &mut [Lowered],
        paged: &mut [Paged],
        memory: &mut Option<Buffer>,
        sequences: &Sequences,
    ) -> Result<()> {
        let mut bytes = 0;
        for paged in &mut *paged {
            let lowered = paged.lower(sequences)?;
            bytes = bytes.max(lowered.bytes());
            rest[paged.at] = lowered;
        }
        if memory.as_ref().is_none_or(|buffer| buffer.bytes() < bytes) {
            *memory = None;
            *memory = Some(Buffer::new(bytes, false)?);
        }
        let pointer = memory.as_ref().expect("made above").pointer();
        paged.iter().try_for_each(|paged| rest[paged.at].fulfil(pointer))
    }
}

/// The tasks of these steps.
fn tasks(steps: &[Lowered]) -> Vec<&dyn Task> {
    let mut tasks = Vec::with_capacity(2 * steps.len());
    steps.iter().for_each(|lowered| lowered.list(&mut tasks));
    tasks
}

/// Waits for a list that was begun, also when this thread panics meanwhile.
struct Begun<'a>(&'a mut Pool);

impl Begun<'_> {
    fn finish(self) -> Result<()> {
        self.0.finish().map_err(told)
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        // Nothing to wait for, and no error left, once it was finished.
        let _ = self.0.finish();
    }
}

impl Cpu {
    /// Runs the plan and keeps it, if there is memory for a workspace of its own.
    pub(super) fn run_and_keep(&mut self, notes: Notes) -> Result<Option<Box<dyn Kept>>> {
        let mut steps = std::mem::take(&mut self.plan);
        let is_paged = |at: usize| notes.paged.binary_search_by_key(&at, |&(at, _)| at).is_ok();
        let (mut own, mut varying) = (0, 0);
        for (at, lowered) in steps.iter().enumerate() {
            let bytes = if is_paged(at) { &mut varying } else { &mut own };
            *bytes = lowered.bytes().max(*bytes);
        }
        let (workspace, varying) = match (Buffer::new(own, false), Buffer::new(varying, false)) {
            (Ok(workspace), Ok(varying)) => (workspace, varying),
            (Err(Error::OutOfMemory { .. }), _) | (_, Err(Error::OutOfMemory { .. })) => {
                self.plan = steps;
                return self.run_plan().map(|()| None);
            }
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        for (at, lowered) in steps.iter_mut().enumerate() {
            lowered.fulfil(if is_paged(at) { varying.pointer() } else { workspace.pointer() })?;
        }
        self.pool.run_all(&tasks(&steps)).map_err(told)?;
        let first = notes.paged.first().map_or(0, |&(at, _)| at);
        let rest = steps.split_off(first);
        let paged = notes.paged.into_iter().map(|(at, mut step)| {
            if let Op::PagedAttention(paged) = &step.op {
                step.op = over(paged, Arc::new([]));
            }
            Paged { at: at - first, step }
        });
        let paged = paged.collect();
        Ok(Some(Box::new(Plan { head: steps, rest, paged, _workspace: workspace, varying: Some(varying) })))
    }

    /// Runs a plan again. Other threads begin while the steps that attend over pages are made ready.
    pub(super) fn run_kept(&mut self, plan: &mut dyn Kept, sequences: &Sequences) -> Result<()> {
        let plan: &mut dyn Any = plan;
        let Some(plan) = plan.downcast_mut::<Plan>() else {
            return Err(Error::Kernel("a plan of another backend was to be run".into()));
        };
        let head = tasks(&plan.head);
        // SAFETY: the list is waited for before it goes: by `begun` and, if nobody began with it, at once.
        let is_begun = unsafe { self.pool.begin(&head) }.map_err(told)?;
        let begun = Begun(&mut self.pool);
        let renewed = Plan::renew(&mut plan.rest, &mut plan.paged, &mut plan.varying, sequences);
        let rest = tasks(&plan.rest);
        begun.finish()?;
        renewed?;
        if !is_begun {
            self.pool.run_all(&head).map_err(told)?;
        }
        self.pool.run_all(&rest).map_err(told)
    }
}
