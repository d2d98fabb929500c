//! The epilogue: adds what is to be added to finished sums, converts, stores.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use mica_simd::Isa;

use super::block::round_to_bf16;
use super::types::{FloatType, Matrix};

/// Where a place of the output is, or of something that is added to it.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub pointer: *mut u8,
    pub float: FloatType,
    /// Byte strides.
    pub row: isize,
    pub column: isize,
}

impl Place {
    /// Where the matrix of a batch entry begins.
    pub(super) fn of(matrix: &Matrix, entry: usize, batch: &[usize]) -> Place {
        let Matrix { float, row, column, .. } = *matrix;
        Place { pointer: matrix.at(entry, batch), float, row, column }
    }

    /// The place `rows` further down and `columns` to the right.
    pub fn moved(self, rows: usize, columns: usize) -> Place {
        let by = rows as isize * self.row + columns as isize * self.column;
        Place { pointer: self.pointer.wrapping_offset(by), ..self }
    }
}

/// Up to two places: bias and residual.
pub(super) struct Addends {
    places: [Place; 2],
    count: usize,
}

impl Addends {
    pub(super) fn of(
        addends: &[Matrix],
        entry: usize,
        batch: &[usize],
        row: usize,
        column: usize,
    ) -> Addends {
        let nowhere = Place { pointer: std::ptr::null_mut(), float: FloatType::F32, row: 0, column: 0 };
        let mut places = [nowhere; 2];
        for (slot, matrix) in places.iter_mut().zip(addends) {
            *slot = Place::of(matrix, entry, batch).moved(row, column);
        }
        Addends { places, count: addends.len().min(2) }
    }

    pub(super) fn moved(&self, row: usize, column: usize) -> Addends {
        Addends { places: self.places.map(|place| place.moved(row, column)), count: self.count }
    }

    pub(super) fn as_slice(&self) -> &[Place] {
        &self.places[..self.count]
    }
}

/// Tiles of sums, 16 a row, side by side; `rows` x `columns` sums exist.
pub(super) struct StoreJob<'a> {
    pub sums: *const f32,
    /// f32 from one tile to the next.
    pub panel: usize,
    pub rows: usize,
    pub columns: usize,
    pub out: Place,
    /// Added in this order.
    pub addends: &'a [Place],
}

/// Stores a tile.
///
/// # Safety
/// The processor has the tier's features; the places are valid for `rows` x `columns`, and the
/// sums for `rows` x 16.
pub(super) type StoreFn = unsafe fn(&StoreJob);

/// The storer of a tier.
pub(super) fn storer(isa: Isa) -> StoreFn {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => store_avx512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx2Vnni => store_avx2,
        _ => store_portable,
    }
}

/// # Safety
/// As [`StoreFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn store_avx512(job: &StoreJob) {
    let out = &job.out;
    if out.float == FloatType::F32 && out.row == 4 && job.rows == 8 && job.addends.is_empty() {
        for column in (0..job.columns).step_by(16) {
            let columns = (job.columns - column).min(16);
            // SAFETY: promised by the caller.
            unsafe { store_turned(job.sums.add(column / 16 * job.panel), columns, out.moved(0, column)) };
        }
        return;
    }
    // SAFETY: promised by the caller.
    unsafe { store(job) }
}

/// Eight rows of sums as columns of eight numbers side by side: outputs of convolutions stand so.
///
/// # Safety
/// The processor has the tier's features; eight rows of sums, and as many columns to write.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn store_turned(sums: *const f32, columns: usize, out: Place) {
    use std::arch::x86_64::*;
    let mut halves = [[_mm512_setzero_pd(); 4]; 2];
    for (half, of) in halves.iter_mut().enumerate() {
        // SAFETY: four of the rows.
        let [a, b, c, d] = unsafe {
            let rows = sums.add(half * 64);
            [
                _mm512_loadu_ps(rows),
                _mm512_loadu_ps(rows.add(16)),
                _mm512_loadu_ps(rows.add(32)),
                _mm512_loadu_ps(rows.add(48)),
            ]
        };
        let low = (_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d)));
        let high = (_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d)));
        // Quarter q of vector j: four rows of column 4q + j.
        *of = [
            _mm512_unpacklo_pd(low.0, low.1),
            _mm512_unpackhi_pd(low.0, low.1),
            _mm512_unpacklo_pd(high.0, high.1),
            _mm512_unpackhi_pd(high.0, high.1),
        ];
    }
    let mut lines = [_mm256_setzero_pd(); 16];
    for j in 0..4 {
        let (above, below) = (halves[0][j], halves[1][j]);
        let first = _mm512_permutex2var_pd(above, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), below);
        let second = _mm512_permutex2var_pd(above, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), below);
        lines[j] = _mm512_castpd512_pd256(first);
        lines[4 + j] = _mm512_extractf64x4_pd::<1>(first);
        lines[8 + j] = _mm512_castpd512_pd256(second);
        lines[12 + j] = _mm512_extractf64x4_pd::<1>(second);
    }
    if columns == 16 {
        for column in 0..16 {
            // SAFETY: promised by the caller.
            unsafe { _mm256_storeu_pd(out.moved(0, column).pointer.cast(), lines[column]) };
        }
        return;
    }
    for (column, &line) in lines[..columns].iter().enumerate() {
        // SAFETY: promised by the caller.
        unsafe { _mm256_storeu_pd(out.moved(0, column).pointer.cast(), line) };
    }
}

/// # Safety
/// As [`StoreFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store_avx2(job: &StoreJob) {
    // SAFETY: promised by the caller.
    unsafe { store(job) }
}

/// # Safety
/// As [`StoreFn`].
unsafe fn store_portable(job: &StoreJob) {
    // SAFETY: promised by the caller.
    unsafe { store(job) }
}

/// # Safety
/// As [`StoreFn`].
#[inline(always)]
unsafe fn store(job: &StoreJob) {
    let plain = |place: &Place| place.float == FloatType::F32 && place.column == 4;
    let plain = plain(&job.out) && job.addends.iter().all(plain);
    let half = job.out.float == FloatType::Bf16 && job.out.column == 2 && job.addends.is_empty();
    let whole = if plain || half { job.columns / 16 } else { 0 };
    for row in 0..job.rows {
        // SAFETY: the rows and columns are those that the caller promises.
        unsafe {
            let sums = job.sums.add(row * 16);
            let out = job.out.moved(row, 0).pointer;
            match job.addends {
                [] if half => lines(sums, job.panel, whole, |panel, line| {
                    let mut words = [0u16; 16];
                    for (word, value) in words.iter_mut().zip(line) {
                        *word = round_to_bf16(value);
                    }
                    out.cast::<[u16; 16]>().add(panel).write_unaligned(words);
                }),
                [] => lines(sums, job.panel, whole, |panel, line| {
                    out.cast::<[f32; 16]>().add(panel).write_unaligned(line);
                }),
                addends => lines(sums, job.panel, whole, |panel, mut line| {
                    for addend in addends {
                        let other =
                            addend.moved(row, 0).pointer.cast::<[f32; 16]>().add(panel).read_unaligned();
                        line = std::array::from_fn(|lane| line[lane] + other[lane]);
                    }
                    out.cast::<[f32; 16]>().add(panel).write_unaligned(line);
                }),
            }
            for column in (16 * whole..job.columns).step_by(16) {
                let columns = (job.columns - column).min(16);
                store_any(job, row, column, columns, sums.add(column / 16 * job.panel));
            }
        }
    }
}

/// A row's lines of 16 sums, panel by panel.
///
/// # Safety
/// There are so many panels.
#[inline(always)]
unsafe fn lines(sums: *const f32, panel: usize, count: usize, mut each: impl FnMut(usize, [f32; 16])) {
    let mut from = sums;
    for at in 0..count {
        // SAFETY: promised by the caller.
        each(at, unsafe { from.cast::<[f32; 16]>().read() });
        from = from.wrapping_add(panel);
    }
}

/// One line of any type and stride.
///
/// # Safety
/// As [`StoreFn`].
#[inline(always)]
unsafe fn store_any(job: &StoreJob, row: usize, column: usize, columns: usize, sums: *const f32) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut line = sums.cast::<[f32; 16]>().read();
        for addend in job.addends {
            let other = load_line(addend.moved(row, column), columns);
            for (sum, x) in line.iter_mut().zip(other) {
                *sum += x;
            }
        }
        store_line(job.out.moved(row, column), columns, &line);
    }
}

/// # Safety
/// `columns` (at most 16) elements are readable.
#[inline(always)]
unsafe fn load_line(place: Place, columns: usize) -> [f32; 16] {
    let size = place.float.size();
    let mut line = [0f32; 16];
    // SAFETY: promised by the caller.
    unsafe {
        if place.column == size as isize {
            if place.float == FloatType::F32 {
                if columns == 16 {
                    return place.pointer.cast::<[f32; 16]>().read_unaligned();
                }
                std::ptr::copy_nonoverlapping(place.pointer, line.as_mut_ptr().cast(), 4 * columns);
                return line;
            }
            let mut words = [0u16; 16];
            // Of a constant size: a call for 32 bytes takes longer than all the rest.
            if columns == 16 {
                words = place.pointer.cast::<[u16; 16]>().read_unaligned();
            } else {
                std::ptr::copy_nonoverlapping(place.pointer, words.as_mut_ptr().cast(), 2 * columns);
            }
            if place.float == FloatType::Bf16 {
                for (value, word) in line.iter_mut().zip(words) {
                    *value = f32::from_bits((word as u32) << 16);
                }
                return line;
            }
            words.map(f16::from_bits).convert_to_f32_slice(&mut line);
            return line;
        }
        for (column, value) in line[..columns].iter_mut().enumerate() {
            let at = place.pointer.wrapping_offset(column as isize * place.column);
            *value = match place.float {
                FloatType::F32 => at.cast::<f32>().read(),
                FloatType::Bf16 => at.cast::<bf16>().read().to_f32(),
                FloatType::F16 => at.cast::<f16>().read().to_f32(),
            };
        }
    }
    line
}

/// # Safety
/// `columns` (at most 16) elements are writable.
#[inline(always)]
unsafe fn store_line(place: Place, columns: usize, line: &[f32; 16]) {
    // SAFETY: promised by the caller.
    unsafe {
        if place.column == place.float.size() as isize {
            if place.float == FloatType::F32 {
                if columns == 16 {
                    place.pointer.cast::<[f32; 16]>().write_unaligned(*line);
                } else {
                    std::ptr::copy_nonoverlapping(line.as_ptr().cast(), place.pointer, 4 * columns);
                }
                return;
            }
            let mut words = [0u16; 16];
            if place.float == FloatType::Bf16 {
                // A loop: `map` is a function of its own, without the tier's features.
                for (word, &value) in words.iter_mut().zip(line) {
                    *word = round_to_bf16(value);
                }
            } else {
                let mut halves = [f16::ZERO; 16];
                halves.convert_from_f32_slice(line);
                words = halves.map(f16::to_bits);
            }
            if columns == 16 {
                place.pointer.cast::<[u16; 16]>().write_unaligned(words);
            } else {
                std::ptr::copy_nonoverlapping(words.as_ptr().cast(), place.pointer, 2 * columns);
            }
            return;
        }
        for (column, &value) in line[..columns].iter().enumerate() {
            let at = place.pointer.wrapping_offset(column as isize * place.column);
            match place.float {
                FloatType::F32 => at.cast::<f32>().write(value),
                FloatType::Bf16 => at.cast::<u16>().write(round_to_bf16(value)),
                FloatType::F16 => at.cast::<f16>().write(f16::from_f32(value)),
            }
        }
    }
}
