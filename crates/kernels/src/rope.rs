//! Rotary position embeddings (Su et al. 2021): tables of angles, and the rotation with its
//! inverse, which is the backward pass.
//!
//! [`rope_table`] turns positions and inverse frequencies into cosines and sines, once for all
//! layers of a model; [`rope`] rotates with them. How frequencies are scaled (linear, dynamic,
//! YaRN, Llama 3, LongRoPE) is the model's business: only the numbers arrive here.

use mica_simd::math::sin_cos;
use mica_simd::{Isa, Kernel, LANES, Vector, dispatch};
use mica_threads::{Scratch, Task};

use crate::dtype::{Dtype, DynView, DynViewMut};
use crate::error::KernelError;
use crate::layout::Linear;
use crate::rows::{Rows, check_shape};

/// Elements that one chunk works on, about.
const CHUNK: usize = 16_384;

/// Where the rows of a table stand.
pub enum Positions {
    /// Row i at this + i. The table has one dimension of rows.
    From(i64),
    /// Each row at its own: int32 of the table's shape without its last dimension.
    Each(DynView),
}

/// `cos` and `sin` of shape `[.., dims / 2]`: of the angle position · inv_freq, times `factor`
/// (YaRN's attention factor, else 1).
///
/// `inv_freq` is `[dims / 2]` f32. As in `transformers`, the product is rounded to f32; cosine and
/// sine of it are within 2 units in the last place for any angle (large ones are reduced in f64).
pub fn rope_table(
    positions: Positions,
    inv_freq: DynView,
    factor: f32,
    cos: DynViewMut,
    sin: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let name = "rope_table";
    check_shape(name, "sin", &sin.shape, &cos.shape)?;
    let inv_freq = Rows::new(name, "inv_freq", &inv_freq)?;
    let outer = &cos.shape[..cos.shape.len().saturating_sub(1)];
    let at = match positions {
        Positions::From(start) => {
            if outer.len() != 1 {
                let message = format!(
                    "positions from an offset give one dimension of rows, cos has shape {:?}",
                    cos.shape
                );
                return Err(KernelError::new(name, message));
            }
            At::From(start)
        }
        Positions::Each(view) => {
            check_shape(name, "positions", &view.shape, outer)?;
            if view.dtype != Dtype::I32 {
                return Err(KernelError::new(name, format!("positions are {}, expected int32", view.dtype)));
            }
            At::Each(view.pointer.cast(), Linear::new(&view.shape, &view.strides))
        }
    };
    let (cos, sin) = (Rows::new_mut(name, "cos", &cos)?, Rows::new_mut(name, "sin", &sin)?);
    if inv_freq.count() != 1 || inv_freq.width != cos.width {
        let message = format!("{} frequencies for tables of width {}", inv_freq.width, cos.width);
        return Err(KernelError::new(name, message));
    }
    Ok(Box::new(Table { at, inv_freq, factor, cos, sin }))
}

enum At {
    From(i64),
    Each(*const i32, Linear),
}

struct Table {
    at: At,
    inv_freq: Rows,
    factor: f32,
    cos: Rows,
    sin: Rows,
}

// SAFETY: the pointer inside is of a DynView, whose promises it inherits.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// Rows of a table that one chunk computes.
const TABLE_ROWS: usize = 16;

impl Task for Table {
    fn chunks(&self) -> usize {
        if self.cos.width == 0 { 0 } else { self.cos.count().div_ceil(TABLE_ROWS) }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        // Every tier gives the same bits, so there is no tier to choose.
        dispatch(Isa::get(), TableChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        "rope_table"
    }
}

struct TableChunk<'a> {
    task: &'a Table,
    chunk: usize,
    scratch: &'a Scratch,
}

impl Kernel for TableChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let task = self.task;
        let [inv_freq, cos, sin] = [(); 3].map(|_| self.scratch.take::<f32>(task.cos.width));
        // SAFETY: one row, checked; nobody writes it.
        unsafe { task.inv_freq.load::<V>(0, inv_freq) };
        let start = self.chunk * TABLE_ROWS;
        for row in start..(start + TABLE_ROWS).min(task.cos.count()) {
            let position = match &task.at {
                At::From(start) => start + row as i64,
                // SAFETY: there is a position for each row.
                At::Each(pointer, linear) => unsafe { *pointer.offset(linear.offset(row)) as i64 },
            };
            let (at, factor) = (V::splat(position as f32), V::splat(task.factor));
            for i in (0..inv_freq.len()).step_by(LANES) {
                let end = (i + LANES).min(inv_freq.len());
                let (s, c) = sin_cos(at * V::from_slice(&inv_freq[i..end], 0.0));
                (c * factor).to_slice(&mut cos[i..end]);
                (s * factor).to_slice(&mut sin[i..end]);
            }
            // SAFETY: rows of this chunk are written by this chunk alone.
            unsafe {
                task.cos.store::<V>(row, cos);
                task.sin.store::<V>(row, sin);
            }
        }
    }
}

/// Which entries of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// (i, i + dims/2): Hugging Face's layout, MLX's `traditional = false`.
    Halves,
    /// (2i, 2i + 1): the paper's, MLX's `traditional = true`.
    Interleaved,
}

/// Rotates the first `dims` entries of each head, and copies the others.
///
/// `x` and `out` are `[.., length, heads, head_dim]` (any strides: a `[batch, heads, length,
/// head_dim]` array is passed with its axes swapped), f32, bf16 or f16. `cos` and `sin` are
/// `[.., length, dims / 2]` with the same leading dimensions (broadcast them with strides of
/// zero). `inverse` turns back, which is the gradient. `out` may alias `x` (same layout).
pub fn rope(
    isa: Isa,
    x: DynView,
    cos: DynView,
    sin: DynView,
    pairs: RopePairs,
    inverse: bool,
    out: DynViewMut,
) -> Result<Box<dyn Task>, KernelError> {
    let name = "rope";
    let rank = x.shape.len();
    if rank < 3 {
        let message = format!("x has shape {:?}, expected [.., length, heads, head_dim]", x.shape);
        return Err(KernelError::new(name, message));
    }
    check_shape(name, "out", &out.shape, &x.shape)?;
    check_shape(name, "sin", &sin.shape, &cos.shape)?;
    let half = cos.shape.last().copied().unwrap_or(0);
    if cos.shape.len() != rank - 1
        || cos.shape[..rank - 2] != x.shape[..rank - 2]
        || 2 * half > x.shape[rank - 1]
    {
        let message = format!(
            "cos has shape {:?}, expected {:?} and at most {} frequencies",
            cos.shape,
            &x.shape[..rank - 2],
            x.shape[rank - 1] / 2
        );
        return Err(KernelError::new(name, message));
    }
    let heads = x.shape[rank - 2];
    Ok(Box::new(Rotate {
        isa,
        heads,
        pairs,
        inverse,
        x: Rows::new(name, "x", &x)?,
        cos: Rows::new(name, "cos", &cos)?,
        sin: Rows::new(name, "sin", &sin)?,
        out: Rows::new_mut(name, "out", &out)?,
    }))
}

struct Rotate {
    isa: Isa,
    heads: usize,
    pairs: RopePairs,
    inverse: bool,
    x: Rows,
    cos: Rows,
    sin: Rows,
    out: Rows,
}

impl Rotate {
    /// Positions that one chunk rotates.
    fn positions(&self) -> usize {
        (CHUNK / (self.heads * self.x.width).max(1)).max(1)
    }
}

impl Task for Rotate {
    fn chunks(&self) -> usize {
        if self.x.count() * self.x.width == 0 { 0 } else { self.cos.count().div_ceil(self.positions()) }
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        dispatch(self.isa, RotateChunk { task: self, chunk, scratch });
    }

    fn name(&self) -> &'static str {
        "rope"
    }
}

struct RotateChunk<'a> {
    task: &'a Rotate,
    chunk: usize,
    scratch: &'a Scratch,
}

impl Kernel for RotateChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let task = self.task;
        let half = task.cos.width;
        let x = self.scratch.take::<f32>(task.x.width);
        let [cos, sin, first, second] = [(); 4].map(|_| self.scratch.take::<f32>(half));
        let start = self.chunk * task.positions();
        for position in start..(start + task.positions()).min(task.cos.count()) {
            if half > 0 {
                // SAFETY: the tables have a row for each position; nobody writes them.
                unsafe {
                    task.cos.load::<V>(position, cos);
                    task.sin.load::<V>(position, sin);
                }
            }
            if task.inverse {
                sin.iter_mut().for_each(|s| *s = -*s);
            }
            for row in position * task.heads..(position + 1) * task.heads {
                // SAFETY: rows of this chunk are touched by this chunk alone, and are in range.
                unsafe { task.x.load::<V>(row, x) };
                match task.pairs {
                    RopePairs::Halves => {
                        let (low, rest) = x.split_at_mut(half);
                        turn::<V>(low, &mut rest[..half], cos, sin);
                    }
                    RopePairs::Interleaved => {
                        for i in 0..half {
                            (first[i], second[i]) = (x[2 * i], x[2 * i + 1]);
                        }
                        turn::<V>(first, second, cos, sin);
                        for i in 0..half {
                            (x[2 * i], x[2 * i + 1]) = (first[i], second[i]);
                        }
                    }
                }
                // SAFETY: as above.
                unsafe { task.out.store::<V>(row, x) };
            }
        }
    }
}

/// (a, b) → (a·cos - b·sin, b·cos + a·sin).
#[inline(always)]
fn turn<V: Vector>(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) {
    for at in (0..cos.len()).step_by(LANES) {
        let end = (at + LANES).min(cos.len());
        let (x, y) = (V::from_slice(&a[at..end], 0.0), V::from_slice(&b[at..end], 0.0));
        let (c, s) = (V::from_slice(&cos[at..end], 0.0), V::from_slice(&sin[at..end], 0.0));
        y.neg_mul_add(s, x * c).to_slice(&mut a[at..end]);
        x.mul_add(s, y * c).to_slice(&mut b[at..end]);
    }
}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;
