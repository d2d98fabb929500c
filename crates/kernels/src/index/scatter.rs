//! Writing at indices.

use half::{bf16, f16};
use mica_threads::{Scratch, Task};
use smallvec::SmallVec;

use super::gather::along_axis_base;
use super::{AxisIndex, check_slices, common_shape};
use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::element::{Bool8, Complex32, Element, round_bf16, with_element};
use crate::elementwise::tile::{CHUNK, Source, TILE, TILE_BYTES, check_output};
use crate::elementwise::{BinaryOp, complex::joined};
use crate::error::KernelError;
use crate::layout::Linear;

/// What an update does to the element it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScatterOp {
    /// Replaces it; the last update of a place wins.
    Set,
    /// Is added to it.
    Add,
    /// Multiplies it.
    Prod,
    /// Replaces it where larger; NaN stays.
    Max,
    /// Replaces it where smaller; NaN stays.
    Min,
}

/// Chunks that share out the index values of an axis when slices are too small to be cut.
const INDEX_RANGES: usize = 8;

/// `out[s… + indices[i…] on their axes] op= updates[i…, s…]`, positions i… of the index arrays
/// (which broadcast together) in ascending order. `updates` has the index shape followed by the
/// slice's, one size for every axis of `out`; `out` holds what is updated.
pub fn scatter(
    op: ScatterOp,
    out: DynViewMut,
    indices: &[(usize, DynView)],
    updates: DynView,
) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "scatter";
    let index_shape = common_shape(NAME, indices)?;
    check_update(NAME, &out, &updates)?;
    let rank = index_shape.len();
    if updates.shape.len() != rank + out.shape.len() || updates.shape[..rank] != index_shape {
        let message = format!(
            "updates have shape {:?}, expected {index_shape:?} followed by a slice of {:?}",
            updates.shape, out.shape
        );
        return Err(KernelError::new(NAME, message));
    }
    let slice_shape = &updates.shape[rank..];
    check_slices(NAME, &out.shape, indices.iter().map(|&(axis, _)| axis), slice_shape)?;
    let mut axes: SmallVec<[AxisIndex; 2]> = SmallVec::new();
    for (axis, view) in indices {
        let (size, stride) = (out.shape[*axis], out.strides[*axis]);
        axes.push(AxisIndex::new::<i64>(NAME, view, &index_shape, *axis, size, slice_shape[*axis], stride)?);
    }
    let slice = Linear::new(slice_shape, &out.strides);
    let positions: usize = index_shape.iter().product();
    // Updates with different places in their slices never meet, unless slices can overlap.
    let apart = indices.iter().all(|&(axis, _)| slice_shape[axis] == 1);
    let owner = if !apart || positions * slice.size() <= CHUNK || axes.is_empty() {
        Owner::One
    } else if slice.size() >= 128 {
        Owner::Slices { length: (CHUNK / positions).clamp(64, TILE).next_multiple_of(64) }
    } else {
        Owner::Indices { ranges: INDEX_RANGES.min(axes[0].size.max(1)) }
    };
    Ok(Box::new(Scatter {
        name: NAME,
        op,
        out: out.pointer,
        dtype: out.dtype,
        axes,
        base: None,
        slice,
        updates: Source::new(&updates, out.dtype),
        positions,
        owner,
    }))
}

/// `out[…, indices[…, i, …], …] op= updates[…, i, …]` along `axis`, ascending in i. `updates`
/// broadcasts to the shape of `indices`, whose other axes are those of `out`.
pub fn scatter_along_axis(
    op: ScatterOp,
    out: DynViewMut,
    axis: usize,
    indices: DynView,
    updates: DynView,
) -> Result<Box<dyn Task>, KernelError> {
    const NAME: &str = "put_along_axis";
    check_update(NAME, &out, &updates)?;
    let shape = indices.shape.clone();
    let base = along_axis_base(NAME, &out.as_view(), axis, &shape)?;
    if (0..shape.len()).any(|other| other != axis && shape[other] != out.shape[other]) {
        let message = format!("indices of shape {shape:?} into {:?} along axis {axis}", out.shape);
        return Err(KernelError::new(NAME, message));
    }
    let updates = crate::elementwise::tile::broadcast(NAME, &updates, &shape)?;
    let (size, stride) = (out.shape[axis], out.strides[axis]);
    Ok(Box::new(Scatter {
        name: NAME,
        op,
        out: out.pointer,
        dtype: out.dtype,
        axes: SmallVec::from_iter([AxisIndex::new::<i64>(NAME, &indices, &shape, axis, size, 1, stride)?]),
        base: Some(base),
        slice: Linear::new(&[], &[]),
        updates: Source::new(&updates, out.dtype),
        positions: shape.iter().product(),
        owner: Owner::Lines { length: shape[axis], step: shape[axis + 1..].iter().product() },
    }))
}

fn check_update(name: &'static str, out: &DynViewMut, updates: &DynView) -> Result<(), KernelError> {
    if out.dtype != updates.dtype {
        let message = format!("the output is {}, the updates are {}", out.dtype, updates.dtype);
        return Err(KernelError::new(name, message));
    }
    check_output(name, out)
}

/// Which updates a chunk applies: all that can meet in one place are one chunk's.
enum Owner {
    /// One chunk does it all.
    One,
    /// A block of `length` places in all slices.
    Slices { length: usize },
    /// Those whose first index is in one of `ranges` equal parts of its axis.
    Indices { ranges: usize },
    /// Lines along an axis: `length` positions, `step` apart.
    Lines { length: usize, step: usize },
}

struct Scatter {
    name: &'static str,
    op: ScatterOp,
    out: *mut u8,
    dtype: Dtype,
    axes: SmallVec<[AxisIndex; 2]>,
    /// Offsets that depend on the position among the indices.
    base: Option<Linear>,
    slice: Linear,
    updates: Source,
    positions: usize,
    owner: Owner,
}

// SAFETY: made of views that may be used from any thread (their maker's promise); chunks change
// disjoint places, see Owner.
unsafe impl Send for Scatter {}
// SAFETY: as above.
unsafe impl Sync for Scatter {}

/// Where an update goes, and which it is.
struct Plan<'a> {
    places: &'a mut [i64],
    numbers: &'a mut [u64],
}

impl Scatter {
    /// Out offsets of positions from `start`; at most a tile.
    fn places(&self, start: usize, places: &mut [i64], buffers: &Buffers) {
        places.fill(0);
        let mut at = 0;
        if let Some(base) = &self.base {
            base.runs(start, places.len(), |offset, stride, length| {
                for i in 0..length {
                    places[at + i] = (offset + i as isize * stride) as i64;
                }
                at += length;
            });
        }
        for axis in &self.axes {
            // SAFETY: inside the index shape; the buffers hold a tile.
            unsafe { axis.add_offsets(start, places, buffers.tile, buffers.raw) };
        }
    }

    /// The positions `from .. to`, in order.
    fn plan_range<'a>(&self, from: usize, to: usize, scratch: &'a Scratch, buffers: &Buffers) -> Plan<'a> {
        let plan = Plan { places: scratch.take(to - from), numbers: scratch.take(to - from) };
        for start in (from..to).step_by(TILE) {
            let end = to.min(start + TILE);
            self.places(start, &mut plan.places[start - from..end - from], buffers);
        }
        for (i, number) in plan.numbers.iter_mut().enumerate() {
            *number = (from + i) as u64;
        }
        plan
    }

    /// The positions whose first index is in part `part` of `ranges`.
    fn plan_part<'a>(&self, part: usize, ranges: usize, scratch: &'a Scratch, buffers: &Buffers) -> Plan<'a> {
        let Plan { places, numbers } = self.plan_range(0, self.positions, scratch, buffers);
        let axis = &self.axes[0];
        let (low, high) = (axis.size * part / ranges, axis.size * (part + 1) / ranges);
        let mut first = [0i64; TILE];
        let mut kept = 0;
        for start in (0..self.positions).step_by(TILE) {
            let count = TILE.min(self.positions - start);
            // SAFETY: inside the index shape; the buffers hold a tile.
            let values = unsafe {
                let tile = axis.indices.load(0, start, count, buffers.tile, buffers.raw);
                std::slice::from_raw_parts(tile.cast::<i64>(), count)
            };
            for (index, &value) in first.iter_mut().zip(values) {
                *index = if value < 0 { value + axis.size as i64 } else { value };
            }
            for (i, &index) in first[..count].iter().enumerate() {
                if (low..high).contains(&(index as usize)) {
                    (places[kept], numbers[kept]) = (places[start + i], numbers[start + i]);
                    kept += 1;
                }
            }
        }
        Plan { places: &mut places[..kept], numbers: &mut numbers[..kept] }
    }

    /// Lines `from .. to` of one stretch, position by position.
    fn plan_lines<'a>(
        &self,
        (first, count): (usize, usize),
        (length, step): (usize, usize),
        scratch: &'a Scratch,
        buffers: &Buffers,
    ) -> Plan<'a> {
        let plan = Plan { places: scratch.take(count * length), numbers: scratch.take(count * length) };
        for j in 0..length {
            let start = first + j * step;
            self.places(start, &mut plan.places[j * count..(j + 1) * count], buffers);
            for (i, number) in plan.numbers[j * count..(j + 1) * count].iter_mut().enumerate() {
                *number = (start + i) as u64;
            }
        }
        plan
    }

    /// Blocks of lines that chunks take when lines are not dense.
    const LINES: usize = 256;

    /// # Safety
    /// `chunk` is one of [`Task::chunks`] and T the type behind the dtype.
    unsafe fn run_typed<T: Joined>(&self, chunk: usize, scratch: &Scratch) {
        let buffers = Buffers {
            tile: scratch.take::<u8>(TILE_BYTES).as_mut_ptr(),
            raw: scratch.take::<u8>(TILE_BYTES).as_mut_ptr(),
        };
        let mut slice = (0, self.slice.size());
        let plan = match self.owner {
            Owner::One => self.plan_range(0, self.positions, scratch, &buffers),
            Owner::Slices { length } => {
                slice = (chunk * length, self.slice.size().min((chunk + 1) * length));
                self.plan_range(0, self.positions, scratch, &buffers)
            }
            Owner::Indices { ranges } => self.plan_part(chunk, ranges, scratch, &buffers),
            Owner::Lines { length, step: 1 } => {
                let lines = (CHUNK / length).max(1);
                let to = self.positions.min((chunk + 1) * lines * length);
                self.plan_range(chunk * lines * length, to, scratch, &buffers)
            }
            Owner::Lines { length, step } => {
                let blocks = step.div_ceil(Self::LINES);
                let first = chunk % blocks * Self::LINES;
                let count = Self::LINES.min(step - first);
                let start = chunk / blocks * length * step + first;
                self.plan_lines((start, count), (length, step), scratch, &buffers)
            }
        };
        // An accumulator wider than the element must see all updates of its place at once.
        if T::WIDER && matches!(self.op, ScatterOp::Add | ScatterOp::Prod) {
            sort_by_place(&plan, scratch);
        }
        // SAFETY: places are inside the output (checked) and this chunk's own.
        unsafe {
            if self.slice.size() == 1 {
                self.apply_single::<T>(&plan, &buffers);
            } else {
                self.apply_slices::<T>(&plan, slice, &buffers, scratch);
            }
        }
    }

    unsafe fn apply_single<T: Joined>(&self, plan: &Plan, buffers: &Buffers) {
        let out = self.out.cast::<T>();
        let dense = self.updates.linear.contiguous_from(0, self.positions);
        let update = |number: u64| -> T {
            // SAFETY: updates have as many elements as there are positions; the buffers hold one.
            unsafe {
                match dense {
                    Some(offset) => *self.updates.pointer.cast::<T>().offset(offset + number as isize),
                    None => {
                        let at = self.updates.load(0, number as usize, 1, buffers.tile, buffers.raw);
                        *at.cast::<T>()
                    }
                }
            }
        };
        let mut i = 0;
        while i < plan.places.len() {
            let place = plan.places[i];
            // SAFETY: promised by the caller.
            let out = unsafe { &mut *out.offset(place as isize) };
            let mut total = out.widen();
            while i < plan.places.len() && plan.places[i] == place {
                total = T::join(self.op, total, update(plan.numbers[i]).widen());
                i += 1;
            }
            *out = T::narrow(total);
        }
    }

    unsafe fn apply_slices<T: Joined>(
        &self,
        plan: &Plan,
        (from, to): (usize, usize),
        buffers: &Buffers,
        scratch: &Scratch,
    ) {
        let totals = scratch.take::<u8>(TILE_BYTES).as_mut_ptr().cast::<T::Wide>();
        for start in (from..to).step_by(TILE) {
            let count = TILE.min(to - start);
            let mut i = 0;
            while i < plan.places.len() {
                let place = plan.places[i];
                let out = self.out.cast::<T>().wrapping_offset(place as isize);
                // SAFETY: the slice at this place is inside the output and this chunk's own; the
                // buffers hold a tile.
                unsafe {
                    let totals = std::slice::from_raw_parts_mut(totals, count);
                    let mut at = 0;
                    self.slice.runs(start, count, |offset, stride, length| {
                        for k in 0..length {
                            totals[at + k] = (*out.offset(offset + k as isize * stride)).widen();
                        }
                        at += length;
                    });
                    while i < plan.places.len() && plan.places[i] == place {
                        let number = plan.numbers[i] as usize * self.slice.size() + start;
                        let tile = self.updates.load(0, number, count, buffers.tile, buffers.raw);
                        let values = std::slice::from_raw_parts(tile.cast::<T>(), count);
                        T::join_all(self.op, totals, values);
                        i += 1;
                    }
                    let mut at = 0;
                    self.slice.runs(start, count, |offset, stride, length| {
                        for k in 0..length {
                            *out.offset(offset + k as isize * stride) = T::narrow(totals[at + k]);
                        }
                        at += length;
                    });
                }
            }
        }
    }
}

/// Brings updates of one place together, in their order.
fn sort_by_place(plan: &Plan, scratch: &Scratch) {
    let count = plan.places.len();
    let order = scratch.take::<u64>(count);
    for (i, place) in order.iter_mut().enumerate() {
        *place = i as u64;
    }
    order.sort_unstable_by_key(|&i| (plan.places[i as usize], i));
    let (places, numbers) = (scratch.take::<i64>(count), scratch.take::<u64>(count));
    for (i, &from) in order.iter().enumerate() {
        (places[i], numbers[i]) = (plan.places[from as usize], plan.numbers[from as usize]);
    }
    // SAFETY: the plan's slices are this chunk's scratch, of the same length, apart from these.
    unsafe {
        std::ptr::copy_nonoverlapping(places.as_ptr(), plan.places.as_ptr().cast_mut(), count);
        std::ptr::copy_nonoverlapping(numbers.as_ptr(), plan.numbers.as_ptr().cast_mut(), count);
    }
}

struct Buffers {
    tile: *mut u8,
    raw: *mut u8,
}

impl Task for Scatter {
    fn chunks(&self) -> usize {
        if self.positions * self.slice.size() == 0 {
            return 0;
        }
        match self.owner {
            Owner::One => 1,
            Owner::Slices { length } => self.slice.size().div_ceil(length),
            Owner::Indices { ranges } => ranges,
            Owner::Lines { length, step: 1 } => (self.positions / length).div_ceil((CHUNK / length).max(1)),
            Owner::Lines { length, step } => self.positions / (length * step) * step.div_ceil(Self::LINES),
        }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        // SAFETY: a chunk of this task, the type of its dtype.
        with_element!(self.dtype, T => unsafe { self.run_typed::<T>(chunk, scratch) })
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

/// Element types with the type that their joins are computed in.
trait Joined: Element {
    type Wide: Copy;
    /// Whether `Wide` holds more than the type itself.
    const WIDER: bool;
    fn widen(self) -> Self::Wide;
    fn narrow(wide: Self::Wide) -> Self;
    fn join(op: ScatterOp, old: Self::Wide, new: Self::Wide) -> Self::Wide;

    /// The same for many, with one look at the op.
    #[inline]
    fn join_all(op: ScatterOp, old: &mut [Self::Wide], new: &[Self]) {
        macro_rules! each {
            ($($op:ident)*) => {
                match op {
                    $(ScatterOp::$op => {
                        for (old, new) in old.iter_mut().zip(new) {
                            *old = Self::join(ScatterOp::$op, *old, new.widen());
                        }
                    })*
                }
            };
        }
        each!(Set Add Prod Max Min)
    }
}

macro_rules! joined {
    ($($t:ty, $wide:ty, $wider:literal, $widen:expr, $narrow:expr, $add:expr, $prod:expr, $max:expr, $min:expr;)*) => { $(
        impl Joined for $t {
            type Wide = $wide;
            const WIDER: bool = $wider;
            #[inline(always)]
            fn widen(self) -> $wide {
                let f: fn($t) -> $wide = $widen;
                f(self)
            }
            #[inline(always)]
            fn narrow(wide: $wide) -> $t {
                let f: fn($wide) -> $t = $narrow;
                f(wide)
            }
            #[inline(always)]
            fn join(op: ScatterOp, old: $wide, new: $wide) -> $wide {
                let join: fn($wide, $wide) -> $wide = match op {
                    ScatterOp::Set => |_, new| new,
                    ScatterOp::Add => $add,
                    ScatterOp::Prod => $prod,
                    ScatterOp::Max => $max,
                    ScatterOp::Min => $min,
                };
                join(old, new)
            }
        }
    )* };
}
macro_rules! joined_integers {
    ($($t:ty)*) => { $(
        joined!($t, $t, false, |x| x, |x| x, |a, b| a.wrapping_add(b), |a, b| a.wrapping_mul(b), |a, b| a.max(b), |a, b| a.min(b););
    )* };
}
macro_rules! joined_floats {
    ($($t:ty, $wide:ty, $wider:literal, $widen:expr, $narrow:expr;)*) => { $(
        joined!($t, $wide, $wider, $widen, $narrow, |a, b| a + b, |a, b| a * b,
            |a, b| if a.is_nan() || a > b { a } else { b },
            |a, b| if a.is_nan() || a < b { a } else { b };);
    )* };
}
joined_integers!(u8 u16 u32 u64 i8 i16 i32 i64);
joined_floats! {
    f32, f32, false, |x| x, |x| x;
    f64, f64, false, |x| x, |x| x;
    f16, f32, true, |x| x.to_f32(), f16::from_f32;
    bf16, f32, true, |x| x.to_f32(), round_bf16;
}
joined! {
    Bool8, Bool8, false, |x| x, |x| x, |a, b| Bool8(a.0 | b.0), |a, b| Bool8(a.0 & b.0),
        |a, b| Bool8(a.0 | b.0), |a, b| Bool8(a.0 & b.0);
    Complex32, Complex32, false, |x| x, |x| x, |a, b| joined(BinaryOp::Add, a, b),
        |a, b| joined(BinaryOp::Multiply, a, b), |a, b| joined(BinaryOp::Maximum, a, b),
        |a, b| joined(BinaryOp::Minimum, a, b);
}
