//! Activations quantized to int8, once for all weights that read them (q, k and v; gate and up).
//!
//! Symmetric per group: d = amax / 127, a = rint(x · (127 / amax)), and
//! e = d · Σa, the factor of the bias term. A group whose largest magnitude is below 1e-30 counts
//! as zero. A NaN makes its group's d NaN, an infinity makes it infinite, so neither is lost.

use std::marker::PhantomData;
use std::ops::Range;

use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::lanes::Lanes;
use super::tier::{PerTier, at_tier};
use crate::KernelError;
use crate::error::check_tier;
use crate::gemm::FloatView;

const NAME: &str = "stage rows";

/// Rows whose d lie side by side.
pub(super) const ROW_LANES: usize = 16;

/// A row's stride in bytes: an odd number of cache lines, because rows at a power of two apart
/// would share the same few sets of the L1 cache.
fn row_stride(bytes: usize) -> usize {
    (bytes.div_ceil(64) | 1) * 64
}

/// The staging of one matrix: how much workspace it needs, then its task.
#[derive(Clone, Debug)]
pub struct Stage<'a> {
    rows: FloatView<'a>,
    group: usize,
    isa: Isa,
    m: usize,
    k: usize,
}

impl<'a> Stage<'a> {
    /// Plans to quantize `rows` `[m, k]` of contiguous rows, in groups of 16, 32, 64 or 128 that divide
    /// k, with the code of tier `isa`.
    pub fn new(rows: impl Into<FloatView<'a>>, group: usize, isa: Isa) -> Result<Stage<'a>, KernelError> {
        check_tier(NAME, isa)?;
        let rows = rows.into();
        let &[m, k] = rows.shape() else {
            return Err(KernelError::new(NAME, format!("expected rows [m, k], got {:?}", rows.shape())));
        };
        if k > 1 && rows.strides()[1] != 1 {
            let message =
                format!("rows must be contiguous, got strides {:?}: copy them first", rows.strides());
            return Err(KernelError::new(NAME, message));
        }
        if !matches!(group, 16 | 32 | 64 | 128) || !k.is_multiple_of(group) {
            let message = format!(
                "rows of {k} values and groups of {group}: expected groups of 16, 32, 64 or 128 that divide the row"
            );
            return Err(KernelError::new(NAME, message));
        }
        Ok(Stage { rows, group, isa, m, k })
    }

    /// `[m, k]`.
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.m, self.k]
    }

    /// Whether both would write the same.
    pub(super) fn same(&self, other: &Stage) -> bool {
        let address = |rows: &FloatView| match rows {
            FloatView::F32(view) => (0, view.pointer().cast::<u8>()),
            FloatView::Bf16(view) => (1, view.pointer().cast()),
            FloatView::F16(view) => (2, view.pointer().cast()),
        };
        address(&self.rows) == address(&other.rows)
            && self.rows.shape() == other.rows.shape()
            && self.rows.strides() == other.rows.strides()
            && (self.group, self.isa) == (other.group, other.isa)
    }

    /// Values per group.
    pub(super) fn group(&self) -> usize {
        self.group
    }

    /// Bytes from one staged row to the next.
    pub(super) fn stride(&self) -> usize {
        row_stride(self.k)
    }

    fn groups(&self) -> usize {
        self.k / self.group
    }

    /// Bytes of the d or of the e of all rows.
    fn scale_bytes(&self) -> usize {
        self.m.next_multiple_of(ROW_LANES) * self.groups() * 4
    }

    /// Bytes that [`Stage::bind`] needs.
    pub fn workspace_bytes(&self) -> usize {
        self.m * row_stride(self.k) + 2 * self.scale_bytes()
    }

    /// Puts the staged rows into `workspace`: the task that fills it, and what products read after
    /// that task has run.
    ///
    /// # Safety
    /// `workspace` is aligned to 64 and has [`Stage::workspace_bytes`] bytes, which for `'a`
    /// nothing else uses.
    pub unsafe fn bind(self, workspace: *mut u8) -> (Box<dyn Task + 'a>, Staged<'a>) {
        let stride = row_stride(self.k);
        let scales = workspace.wrapping_add(self.m * stride);
        let sums = scales.wrapping_add(self.scale_bytes());
        let staged = Staged {
            group: self.group,
            m: self.m,
            k: self.k,
            stride,
            values: workspace,
            scales: scales.cast(),
            sums: sums.cast(),
            life: PhantomData,
        };
        let task = StageTask { rows: self.rows, isa: self.isa, staged: staged.clone() };
        (Box::new(task), staged)
    }
}

/// Rows that a [`Stage`] has put into a workspace.
#[derive(Clone, Debug)]
pub struct Staged<'a> {
    pub(super) group: usize,
    pub(super) m: usize,
    pub(super) k: usize,
    /// Bytes from row to row.
    pub(super) stride: usize,
    /// `[m]` rows of int8.
    pub(super) values: *mut u8,
    /// `[m / 16][group][16 rows]`: d, with zeros for the rows past the last. A kernel
    /// that multiplies some of 16 rows reads them at constant distances from one pointer.
    pub(super) scales: *mut f32,
    /// Laid out as `scales`: e = d · Σa.
    pub(super) sums: *mut f32,
    life: PhantomData<&'a [u8]>,
}

// SAFETY: the workspace is exclusively this plan's; the staging task writes disjoint rows and ends
// before products read.
unsafe impl Send for Staged<'_> {}
// SAFETY: as above.
unsafe impl Sync for Staged<'_> {}

impl Staged<'_> {
    /// `[m, k]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.m, self.k]
    }

    /// Where the d and e of a row's first group are; the next group's are 16 further.
    #[inline(always)]
    pub(super) fn scale_offset(&self, row: usize, groups: usize) -> usize {
        row / ROW_LANES * groups * ROW_LANES + row % ROW_LANES
    }

    /// Values per group.
    pub fn group(&self) -> usize {
        self.group
    }

    /// `m` rows like these in other memory.
    pub(super) fn elsewhere(&self, m: usize, values: *mut u8, scales: *mut f32, sums: *mut f32) -> Self {
        Staged { m, values, scales, sums, ..self.clone() }
    }

    /// Rows from `first` on, a multiple of [`ROW_LANES`].
    pub(super) fn part(&self, first: usize, m: usize) -> Self {
        let before = self.scale_offset(first, self.k / self.group);
        let values = self.values.wrapping_add(first * self.stride);
        self.elsewhere(m, values, self.scales.wrapping_add(before), self.sums.wrapping_add(before))
    }

    /// Copies a row to row `at` of others of the same width and groups.
    ///
    /// # Safety
    /// There are such rows; the one was staged, and the place of the other is the caller's alone.
    pub(super) unsafe fn copy_row(&self, row: usize, into: &Staged, at: usize) {
        let groups = self.k / self.group;
        let (from, to) = (self.scale_offset(row, groups), into.scale_offset(at, groups));
        // SAFETY: promised by the caller.
        unsafe {
            let values = into.values.add(at * into.stride);
            std::ptr::copy_nonoverlapping(self.values.add(row * self.stride), values, self.k);
            for g in (0..groups * ROW_LANES).step_by(ROW_LANES) {
                into.scales.add(to + g).write(self.scales.add(from + g).read());
                into.sums.add(to + g).write(self.sums.add(from + g).read());
            }
        }
    }

    /// Zeros for rows that are not there, behind the last of a group of [`ROW_LANES`].
    ///
    /// # Safety
    /// These places of the group are the caller's alone.
    pub(super) unsafe fn clear_scales(&self, rows: Range<usize>) {
        let groups = self.k / self.group;
        for row in rows {
            let at = self.scale_offset(row, groups);
            for g in (0..groups * ROW_LANES).step_by(ROW_LANES) {
                // SAFETY: promised by the caller.
                unsafe {
                    self.scales.add(at + g).write(0.0);
                    self.sums.add(at + g).write(0.0);
                }
            }
        }
    }
}

struct StageTask<'a> {
    rows: FloatView<'a>,
    isa: Isa,
    staged: Staged<'a>,
}

impl StageTask<'_> {
    /// Rows per chunk: enough for some microseconds of work.
    fn rows_per_chunk(&self) -> usize {
        (16384 / self.staged.k.max(1)).max(1)
    }
}

impl Task for StageTask<'_> {
    fn chunks(&self) -> usize {
        self.staged.m.div_ceil(self.rows_per_chunk())
    }

    fn run(&self, chunk: usize, _: &mut Scratch) {
        let first = chunk * self.rows_per_chunk();
        for row in first..(first + self.rows_per_chunk()).min(self.staged.m) {
            let k = self.staged.k;
            // SAFETY: the row is inside the view and contiguous; it writes its own row of the
            // workspace; the tier was checked.
            unsafe {
                let to = (&self.staged, row);
                match &self.rows {
                    FloatView::F32(view) => at_tier(self.isa, StageRow { from: view.run(&[row, 0], k), to }),
                    FloatView::Bf16(view) => at_tier(self.isa, StageRow { from: view.run(&[row, 0], k), to }),
                    FloatView::F16(view) => at_tier(self.isa, StageRow { from: view.run(&[row, 0], k), to }),
                }
            }
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }
}

struct StageRow<'a, T> {
    from: &'a [T],
    to: (&'a Staged<'a>, usize),
}

impl<T: mica_codec::Float> PerTier for StageRow<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let (staged, row) = self.to;
        let (k, groups) = (staged.k, staged.k / staged.group);
        let at = staged.scale_offset(row, groups);
        // SAFETY: the row's part of the workspace, this chunk's alone.
        unsafe {
            let codes =
                std::slice::from_raw_parts_mut(staged.values.add(row * staged.stride).cast::<i8>(), k);
            quantize_row(self.from, staged.group, codes, |g, scale, sum| {
                *staged.scales.add(at + g * ROW_LANES) = scale;
                *staged.sums.add(at + g * ROW_LANES) = sum;
            });
            // The last row brings the zeros of the rows that are not there.
            let missing = if row + 1 == staged.m { ROW_LANES - 1 - row % ROW_LANES } else { 0 };
            for g in 0..groups {
                staged.scales.add(at + g * ROW_LANES + 1).write_bytes(0, missing);
                staged.sums.add(at + g * ROW_LANES + 1).write_bytes(0, missing);
            }
        }
    }
}

/// The smallest amax of a group that is not taken for zero: 127 / amax stays finite.
const SMALLEST: f32 = 1e-30;

/// Quantizes a row group by group and puts (g, d, e); the module's documentation has the formula.
/// The same bits on every tier.
#[inline(always)]
fn quantize_row<T: mica_codec::Float>(
    from: &[T],
    group: usize,
    codes: &mut [i8],
    mut put: impl FnMut(usize, f32, f32),
) {
    // Adding this rounds to an integer, ties to even, and leaves it in the low mantissa bits.
    const MAGIC: f32 = 12_582_912.0;
    let mut values = [0f32; 128];
    let values = &mut values[..group];
    let groups = from.chunks_exact(group).zip(codes.chunks_exact_mut(group));
    for (g, (from, codes)) in groups.enumerate() {
        // Magnitudes compare as integers, NaN above infinity.
        let mut largest = 0;
        for (value, from) in values.iter_mut().zip(from) {
            *value = from.to_f32();
            largest = largest.max(value.to_bits() & 0x7fff_ffff);
        }
        let largest = f32::from_bits(largest);
        if largest < SMALLEST {
            codes.fill(0);
            put(g, 0.0, 0.0);
            continue;
        }
        let inverse = 127.0 / largest;
        let mut total = 0;
        for (code, value) in codes.iter_mut().zip(values.iter()) {
            let rounded = ((value * inverse + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
            *code = rounded as i8;
            total += i32::from(rounded as i8);
        }
        let scale = largest / 127.0;
        put(g, scale, scale * total as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::View;
    use mica_testkit::Rng;

    #[test]
    fn int8_rows_are_within_half_a_step_and_bad_values_stay_bad() {
        let mut rng = Rng::new(3);
        for group in [16, 32, 64, 128] {
            let mut x = rng.normals(group * 4);
            x[group] = f32::NAN;
            x[2 * group] = f32::NEG_INFINITY;
            x[3 * group..].fill(1e-38);
            let (mut codes, mut d, mut e) = (vec![0i8; x.len()], [9f32; 4], [9f32; 4]);
            quantize_row(&x, group, &mut codes, |g, scale, sum| (d[g], e[g]) = (scale, sum));
            for (at, (&x, &code)) in x[..group].iter().zip(&codes).enumerate() {
                let error = (x - d[0] * f32::from(code)).abs();
                assert!(error <= d[0] * 0.501, "group {group}, value {at}: {x} became {code} · {}", d[0]);
            }
            let total: i32 = codes[..group].iter().map(|&code| i32::from(code)).sum();
            assert_eq!(e[0], d[0] * total as f32);
            assert!(d[1].is_nan() && e[1].is_nan() && d[2].is_infinite(), "{d:?} {e:?}");
            assert_eq!((d[3], e[3]), (0.0, 0.0));
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let data = [0f32; 256];
        let view = |shape: &[usize], strides: &[isize]| View::strided(&data, 0, shape, strides).unwrap();
        for (name, view, group, ok) in [
            ("fits", view(&[2, 64], &[64, 1]), 64, true),
            ("rows further apart", view(&[2, 64], &[128, 1]), 64, true),
            ("rank", view(&[64], &[1]), 64, false),
            ("gaps", view(&[2, 64], &[1, 2]), 64, false),
            ("groups", view(&[2, 96], &[96, 1]), 64, false),
            ("no such group", view(&[2, 96], &[96, 1]), 96, false),
        ] {
            assert_eq!(Stage::new(view, group, Isa::Scalar).is_ok(), ok, "{name}");
        }
    }
}
