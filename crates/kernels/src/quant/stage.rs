//! Activations made ready for a product: quantized, or converted, once for all weights that read
//! them (q, k and v; gate and up).
//!
//! The int8 form is symmetric per group: d = amax / 127, a = rint(x · (127 / amax)), and
//! e = d · Σa, the factor of the bias term. A group whose largest magnitude is below 1e-30 counts
//! as zero. A NaN makes its group's d NaN, an infinity makes it infinite, so neither is lost.

use std::marker::PhantomData;

use half::{bf16, f16};
use mica_simd::Isa;
use mica_threads::{Scratch, Task};

use super::lanes::Lanes;
use super::tier::{self, PerTier, at_tier};
use crate::{KernelError, View};

const NAME: &str = "stage rows";

/// Rows of activations or gradients `[m, k]`; each row is contiguous.
#[derive(Clone, Debug)]
pub enum Rows<'a> {
    /// Single precision.
    F32(View<'a, f32>),
    /// The upper half of an f32.
    Bf16(View<'a, bf16>),
    /// IEEE half precision.
    F16(View<'a, f16>),
}

impl<'a> From<View<'a, f32>> for Rows<'a> {
    fn from(view: View<'a, f32>) -> Rows<'a> {
        Rows::F32(view)
    }
}

impl<'a> From<View<'a, bf16>> for Rows<'a> {
    fn from(view: View<'a, bf16>) -> Rows<'a> {
        Rows::Bf16(view)
    }
}

impl<'a> From<View<'a, f16>> for Rows<'a> {
    fn from(view: View<'a, f16>) -> Rows<'a> {
        Rows::F16(view)
    }
}

impl Rows<'_> {
    /// Shape and strides.
    fn geometry(&self) -> (&[usize], &[isize]) {
        match self {
            Rows::F32(view) => (view.shape(), view.strides()),
            Rows::Bf16(view) => (view.shape(), view.strides()),
            Rows::F16(view) => (view.shape(), view.strides()),
        }
    }
}

/// What activations are turned into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// int8 with a scale per group of this many values.
    Int8 {
        /// Values per group: 32, 64 or 128.
        group: usize,
    },
    /// Rounded to bf16.
    Bf16,
    /// f32.
    F32,
}

/// Zeros after a row, so that kernels read whole steps of k.
const PAD_K: usize = 32;

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
    rows: Rows<'a>,
    form: Form,
    isa: Isa,
    m: usize,
    k: usize,
}

impl<'a> Stage<'a> {
    /// Plans to bring `rows` `[m, k]` into `form` with the code of tier `isa`.
    pub fn new(rows: impl Into<Rows<'a>>, form: Form, isa: Isa) -> Result<Stage<'a>, KernelError> {
        tier::check(NAME, isa)?;
        let rows = rows.into();
        let (shape, strides) = rows.geometry();
        let &[m, k] = shape else {
            return Err(KernelError::new(NAME, format!("expected rows [m, k], got {shape:?}")));
        };
        if k > 1 && strides[1] != 1 {
            let message = format!("rows must be contiguous, got strides {strides:?}: copy them first");
            return Err(KernelError::new(NAME, message));
        }
        if let Form::Int8 { group } = form
            && (!matches!(group, 32 | 64 | 128) || !k.is_multiple_of(group))
        {
            let message = format!(
                "rows of {k} values and groups of {group}: expected groups of 32, 64 or 128 that divide the row"
            );
            return Err(KernelError::new(NAME, message));
        }
        Ok(Stage { rows, form, isa, m, k })
    }

    /// The same for rows that a workspace of this shape will hold: sizes only.
    fn sizes(&self) -> (usize, usize) {
        match self.form {
            Form::Int8 { group } => (row_stride(self.k), self.k / group),
            Form::Bf16 => (row_stride(self.k.next_multiple_of(PAD_K) * 2), 0),
            Form::F32 => (row_stride(self.k.next_multiple_of(PAD_K) * 4), 0),
        }
    }

    /// Bytes of the d or of the e of all rows.
    fn scale_bytes(&self, groups: usize) -> usize {
        self.m.next_multiple_of(ROW_LANES) * groups * 4
    }

    /// Bytes that [`Stage::bind`] needs.
    pub fn workspace_bytes(&self) -> usize {
        let (stride, groups) = self.sizes();
        self.m * stride + 2 * self.scale_bytes(groups)
    }

    /// Puts the staged rows into `workspace`: the task that fills it, and what products read after
    /// that task has run.
    ///
    /// # Safety
    /// `workspace` is aligned to 64 and has [`Stage::workspace_bytes`] bytes, which for `'a`
    /// nothing else uses.
    pub unsafe fn bind(self, workspace: *mut u8) -> (Box<dyn Task + 'a>, Staged<'a>) {
        let (stride, groups) = self.sizes();
        let scales = workspace.wrapping_add(self.m * stride);
        let sums = scales.wrapping_add(self.scale_bytes(groups));
        let staged = Staged {
            form: self.form,
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
    pub(super) form: Form,
    pub(super) m: usize,
    pub(super) k: usize,
    /// Bytes from row to row.
    pub(super) stride: usize,
    /// int8, bf16 or f32 values; the last two end in zeros up to a multiple of 32 values.
    pub(super) values: *mut u8,
    /// Int8 only, `[m / 16][group][16 rows]`: d, with zeros for the rows past the last. A kernel
    /// that multiplies some of 16 rows reads them at constant distances from one pointer.
    pub(super) scales: *mut f32,
    /// Int8 only, laid out as `scales`: e = d · Σa.
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

    /// What the rows were turned into.
    pub fn form(&self) -> Form {
        self.form
    }
}

struct StageTask<'a> {
    rows: Rows<'a>,
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
                    Rows::F32(view) => at_tier(self.isa, StageRow { from: view.run(&[row, 0], k), to }),
                    Rows::Bf16(view) => at_tier(self.isa, StageRow { from: view.run(&[row, 0], k), to }),
                    Rows::F16(view) => at_tier(self.isa, StageRow { from: view.run(&[row, 0], k), to }),
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
        let k = staged.k;
        let padded = k.next_multiple_of(PAD_K);
        // SAFETY: the row's part of the workspace, this chunk's alone.
        unsafe {
            let values = staged.values.add(row * staged.stride);
            match staged.form {
                Form::Int8 { group } => {
                    let groups = k / group;
                    let codes = std::slice::from_raw_parts_mut(values.cast::<i8>(), k);
                    let at = staged.scale_offset(row, groups);
                    quantize_row(self.from, group, codes, |g, scale, sum| {
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
                Form::F32 => {
                    let to = std::slice::from_raw_parts_mut(values.cast::<f32>(), padded);
                    for (to, from) in to.iter_mut().zip(self.from) {
                        *to = from.to_f32();
                    }
                    to[k..].fill(0.0);
                }
                Form::Bf16 => {
                    let to = std::slice::from_raw_parts_mut(values.cast::<u16>(), padded);
                    for (to, from) in to.iter_mut().zip(self.from) {
                        *to = round_bf16(from.to_f32());
                    }
                    to[k..].fill(0);
                }
            }
        }
    }
}

/// To bf16, to nearest even, in integers so that it vectorizes on every tier; NaN stays NaN.
#[inline(always)]
fn round_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if value.is_nan() { quiet } else { rounded }) as u16
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
    use mica_testkit::Rng;

    #[test]
    fn int8_rows_are_within_half_a_step_and_bad_values_stay_bad() {
        let mut rng = Rng::new(3);
        for group in [32, 64, 128] {
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
    fn bf16_is_rounded_as_half_rounds_it() {
        let mut rng = Rng::new(4);
        let special =
            [0.0, -0.0, f32::INFINITY, f32::NAN, f32::MAX, 1e-40, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0];
        for value in special.into_iter().chain((0..10_000).map(|_| f32::from_bits(rng.u32()))) {
            let expected = bf16::from_f32(value);
            let got = bf16::from_bits(round_bf16(value));
            assert!(
                got == expected || (got.is_nan() && expected.is_nan()),
                "{value:e}: {got} for {expected}"
            );
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let data = [0f32; 256];
        let view = |shape: &[usize], strides: &[isize]| View::strided(&data, 0, shape, strides).unwrap();
        for (name, view, form, ok) in [
            ("fits", view(&[2, 64], &[64, 1]), Form::Int8 { group: 64 }, true),
            ("rows further apart", view(&[2, 64], &[128, 1]), Form::Int8 { group: 64 }, true),
            ("rank", view(&[64], &[1]), Form::F32, false),
            ("gaps", view(&[2, 64], &[1, 2]), Form::F32, false),
            ("groups", view(&[2, 96], &[96, 1]), Form::Int8 { group: 64 }, false),
            ("no such group", view(&[2, 96], &[96, 1]), Form::Int8 { group: 96 }, false),
            ("odd rows as f32", view(&[2, 7], &[7, 1]), Form::F32, true),
        ] {
            assert_eq!(Stage::new(view, form, Isa::Scalar).is_ok(), ok, "{name}");
        }
    }
}
