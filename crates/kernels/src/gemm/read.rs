//! A packed weight straight from a file, piece by piece.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use mica_threads::{Pool, Scratch};

use super::types::{FloatType, FloatView};
use super::weight::FloatWeight;
use crate::memory::WeightBytes;
use crate::pieces::in_pieces;
use crate::{KernelError, View};

/// Bytes that a thread reads and packs at a time: source and panels stay in its cache.
const PIECE: usize = 256 << 10;
/// Rows of a panel.
const PANEL: usize = 16;

impl FloatWeight {
    /// Packs a `[out, in]` tensor that comes from somewhere else, in pieces, on all threads: `read` writes these rows,
    /// as they lie in memory. The whole tensor is nowhere, so that there is one copy of a weight while it is read as
    /// afterwards.
    ///
    /// # Errors
    /// Outside a size that is too large and too little memory, inside the first error of `read` in the order of rows.
    pub fn read<E: Send>(
        pool: &Pool,
        [out, inputs]: [usize; 2],
        float: FloatType,
        read: impl Fn(Range<usize>, &mut [u8]) -> Result<(), E> + Sync + Send,
    ) -> Result<Result<FloatWeight, E>, KernelError> {
        let too_large = || KernelError::new("pack weight", format!("[{out}, {inputs}] is too large"));
        // A panel pads both sizes, so that a small weight takes up to this much.
        let padded = |size: usize| size.checked_next_multiple_of(32);
        let most =
            padded(out).zip(padded(inputs)).and_then(|(out, inputs)| out.checked_mul(inputs)?.checked_mul(4));
        most.ok_or_else(too_large)?;
        let memory = Arc::new(WeightBytes::new(Self::packed_bytes(out, inputs, float))?);
        let row = inputs * float.size();
        let panels_per_piece = (PIECE / (row * PANEL).max(1)).max(1);
        let panels = out.div_ceil(PANEL);
        let panel_bytes = Self::packed_bytes(PANEL, inputs, float);
        let piece = |index: usize, scratch: &mut Scratch| {
            let first = index * panels_per_piece;
            let rows = first * PANEL..((first + panels_per_piece) * PANEL).min(out);
            let source = scratch.take::<u8>(rows.len() * row);
            read(rows.clone(), source)?;
            let into = memory.pointer().wrapping_add(first * panel_bytes);
            // SAFETY: whole panels of the weight's memory, which no other piece has; `packed_bytes` is a sum over
            // panels, so those of these rows are a packed weight of their own.
            unsafe { pack_rows(source, [rows.len(), inputs], float, into, memory.clone()) };
            Ok(())
        };
        let read = in_pieces(pool, panels.div_ceil(panels_per_piece), piece)?;
        // SAFETY: every panel was packed, unless there is an error.
        Ok(read.map(|()| unsafe { FloatWeight::from_packed(memory.pointer(), out, inputs, float, memory) }))
    }
}

/// # Safety
/// As for [`FloatWeight::plan_pack_into`].
unsafe fn pack_rows(
    source: &[u8],
    shape: [usize; 2],
    float: FloatType,
    into: *mut u8,
    memory: Arc<WeightBytes>,
) {
    let strides = [shape[1] as isize, 1];
    let pointer = source.as_ptr();
    // SAFETY: scratch is aligned to 64 bytes and holds these rows, one after the other.
    let view: FloatView = unsafe {
        match float {
            FloatType::F32 => View::from_raw(pointer.cast::<f32>(), &shape, &strides).into(),
            FloatType::Bf16 => View::from_raw(pointer.cast::<bf16>(), &shape, &strides).into(),
            FloatType::F16 => View::from_raw(pointer.cast::<f16>(), &shape, &strides).into(),
        }
    };
    // SAFETY: promised by the caller.
    let packing = unsafe { FloatWeight::plan_pack_into(view, into, memory) }.expect("a matrix");
    let mut tasks = Vec::new();
    packing.tasks(&mut tasks);
    for task in &tasks {
        (0..task.chunks()).for_each(|chunk| task.run(chunk, &mut Scratch::new()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_testkit::Rng;

    #[test]
    fn what_is_read_is_what_packing_gives() {
        let mut rng = Rng::new(3);
        let pool = Pool::new(2);
        for float in [FloatType::F32, FloatType::Bf16, FloatType::F16] {
            for [out, inputs] in [[1, 1], [16, 32], [37, 100], [1000, 520], [5, 0], [0, 5]] {
                let bytes: Vec<u32> =
                    (0..(out * inputs * float.size()).div_ceil(4)).map(|_| rng.u32()).collect();
                // SAFETY: plain bytes of the vector.
                let bytes = unsafe {
                    std::slice::from_raw_parts(bytes.as_ptr().cast::<u8>(), out * inputs * float.size())
                };
                let row = inputs * float.size();
                let read = |rows: Range<usize>, into: &mut [u8]| {
                    into.copy_from_slice(&bytes[rows.start * row..rows.end * row]);
                    Ok::<(), ()>(())
                };
                let got = FloatWeight::read(&pool, [out, inputs], float, read).unwrap().unwrap();
                let mut expected = crate::gemm::WorkspaceBuf::new(got.bytes());
                // SAFETY: the buffer is as long as the weight.
                unsafe {
                    expected.pointer().write_bytes(0xee, got.bytes());
                    let memory = Arc::new(WeightBytes::new(1).unwrap());
                    if out > 0 {
                        pack_rows(bytes, [out, inputs], float, expected.pointer(), memory);
                    }
                    let slice = |pointer| std::slice::from_raw_parts(pointer, got.bytes());
                    assert!(
                        slice(got.pointer()) == slice(expected.pointer() as *const u8),
                        "{float:?} [{out}, {inputs}]"
                    );
                }
            }
        }
    }

    #[test]
    fn errors_of_the_source_come_out_and_sizes_are_checked() {
        let pool = Pool::new(2);
        let fail =
            |rows: Range<usize>, _: &mut [u8]| if rows.contains(&900) { Err("cut short") } else { Ok(()) };
        let read = |shape| FloatWeight::read(&pool, shape, FloatType::Bf16, fail);
        assert_eq!(read([1000, 1024]).unwrap().unwrap_err(), "cut short");
        assert!(read([800, 1024]).unwrap().is_ok());
        assert!(read([usize::MAX / 2, 1024]).is_err());
        assert!(read([1024, usize::MAX - 3]).is_err());
    }
}
