//! Convolution: the kernel times the patches under it. The matrix kernel reads the patches where they are
//! ([`mica_kernels::patches`]). Where they are few, channels are not side by side or the type is f64, they are
//! copied as rows of a matrix, a block of rows at a time. Kernels that see one channel each run without a
//! matrix.
//!
//! A product's order is the matrix kernel's: one chain over taps, then channels, ascending; padding
//! takes part as zeros.

use mica_kernels::gemm::{self, FloatType};
use mica_kernels::patches::{self, Walk};
use mica_simd::{Isa, Kernel, LANES, Vector, dispatch};
use mica_threads::Task;
use smallvec::SmallVec;

use super::products::{lowered, product, read, write};
use super::strided::{Shared, task, unravel};
use super::{Lowered, by_reference};
use crate::backend::{HostView, Step};
use crate::op::{ConvNd, Precision};
use crate::{Dtype, Result};

/// Bytes of patches at a time: enough rows to make packing the kernel cheap, few enough to stay near
/// the processor.
const BLOCK: usize = 8 << 20;
/// Fewer positions than this leave most of the matrix kernel's lanes empty when they are its columns.
const POSITIONS: usize = 64;
/// Rows of patches per chunk.
const ROWS: usize = 32;

/// What patches are cut from.
#[derive(Clone)]
struct Patches {
    spec: ConvNd,
    x: HostView,
    /// Kernel sizes and output sizes per spatial dimension.
    taps: SmallVec<[usize; 3]>,
    out: SmallVec<[usize; 3]>,
    /// Channels of a group.
    depth: usize,
}

impl Patches {
    /// Calls `each(tap, pointer)` for every tap of an output position; the pointer is null in padding.
    fn visit(&self, row: usize, channel: usize, mut each: impl FnMut(usize, *mut u8)) {
        let size = self.x.dtype.size() as isize;
        let positions: usize = self.out.iter().product();
        let place = unravel(row % positions, &self.out);
        let base = (row / positions) as isize * self.x.strides[0]
            + channel as isize * self.x.strides[self.x.shape.len() - 1];
        let taps: usize = self.taps.iter().product();
        let mut tap: SmallVec<[usize; 3]> = SmallVec::from_elem(0, self.taps.len());
        for number in 0..taps {
            let mut offset = Some(base);
            for axis in 0..tap.len() {
                let k = if self.spec.flip { self.taps[axis] - 1 - tap[axis] } else { tap[axis] };
                let q = (place[axis] * self.spec.stride[axis] + k * self.spec.kernel_dilation[axis]) as isize
                    - self.spec.low[axis];
                let dilation = self.spec.input_dilation[axis] as isize;
                let i = if dilation == 1 { q } else { q.div_euclid(dilation) };
                let inside = i >= 0 && i < self.x.shape[axis + 1] as isize && i * dilation == q;
                offset = offset.filter(|_| inside).map(|at| at + i * self.x.strides[axis + 1]);
            }
            let pointer = offset.map_or(std::ptr::null_mut(), |at| self.x.pointer.wrapping_offset(at * size));
            each(number, pointer);
            for axis in (0..tap.len()).rev() {
                tap[axis] += 1;
                if tap[axis] < self.taps[axis] {
                    break;
                }
                tap[axis] = 0;
            }
        }
    }

    /// Whether a patch is a row of the input as it lies.
    fn is_input(&self) -> bool {
        let spec = &self.spec;
        self.taps.iter().all(|&taps| taps == 1)
            && spec.stride.iter().chain(&spec.input_dilation).all(|&n| n == 1)
            && spec.low.iter().chain(&spec.high).all(|&n| n == 0)
            && self.x.is_contiguous()
    }
}

pub(super) fn lower(spec: &ConvNd, step: &Step) -> Result<Lowered> {
    let (x, w, out) = (step.inputs[0].host()?, step.inputs[1].host()?, step.outputs[0].host()?);
    let rank = x.shape.len();
    if out.shape.contains(&0) || w.shape.contains(&0) || !w.is_contiguous() {
        return Ok(by_reference(step));
    }
    let patches = Patches {
        spec: spec.clone(),
        x: x.clone(),
        taps: w.shape[1..rank - 1].into(),
        out: out.shape[1..rank - 1].into(),
        depth: w.shape[rank - 1],
    };
    if patches.depth == 1 && spec.groups > 1 && w.shape[0] == spec.groups && x.dtype == Dtype::F32 {
        return Ok(depthwise(patches, w.clone(), out.clone()));
    }
    let positions = out.shape[0] * patches.out.iter().product::<usize>();
    let side_by_side = x.strides[rank - 1] == 1 || patches.depth == 1;
    if positions >= POSITIONS && side_by_side && x.dtype != Dtype::F64 && !patches.is_input() {
        return in_place(&patches, w, out);
    }
    general(patches, w.clone(), out.clone())
}

/// What a group sees of the input, whose channels lie side by side if there are several.
fn seen(patches: &Patches, group: usize) -> patches::Patches {
    let (spec, x) = (&patches.spec, &patches.x);
    let spatial = patches.taps.len();
    /// A list with the dimensions that are not there in front.
    fn three<T: Copy>(list: &[T], missing: T) -> [T; 3] {
        std::array::from_fn(|axis| (axis + list.len()).checked_sub(3).map_or(missing, |axis| list[axis]))
    }
    let walk = Walk {
        input: three(&x.shape[1..=spatial], 1),
        output: three(&patches.out, 1),
        taps: three(&patches.taps, 1),
        stride: three(&spec.stride, 1),
        low: three(&spec.low, 0),
        kernel_dilation: three(&spec.kernel_dilation, 1),
        input_dilation: three(&spec.input_dilation, 1),
        flip: spec.flip,
    };
    let float = match x.dtype {
        Dtype::BF16 => FloatType::Bf16,
        Dtype::F16 => FloatType::F16,
        _ => FloatType::F32,
    };
    let bytes = |stride: isize| stride * x.dtype.size() as isize;
    let strides = three(&x.strides[1..=spatial], 0).map(bytes);
    let channel = (group * patches.depth) as isize * bytes(x.strides[spatial + 1]);
    let image = x.pointer.wrapping_offset(channel).cast_const();
    let batch = (x.shape[0], bytes(x.strides[0]));
    patches::Patches::new(walk, (image, float), batch, strides, patches.depth)
}

/// The kernel times the patches where they are.
fn in_place(patches: &Patches, w: &HostView, out: &HostView) -> Result<Lowered> {
    let (groups, size) = (patches.spec.groups, out.dtype.size());
    // As for matrices: those of bf16 are multiplied as such.
    let precision = if out.dtype == Dtype::BF16 { gemm::Precision::Bf16 } else { gemm::Precision::Exact };
    let outputs = w.shape[0];
    let (width, per_group) = (patches.taps.iter().product::<usize>() * patches.depth, outputs / groups);
    let positions = out.shape[0] * patches.out.iter().product::<usize>();
    let mut parts = Vec::with_capacity(groups);
    for group in 0..groups {
        let at = w.pointer.wrapping_add(group * per_group * width * size);
        let kernel = matrix(at, w.dtype, [per_group, width], [width as isize, 1]);
        let at = out.pointer.wrapping_add(group * per_group * size);
        let to = matrix(at, out.dtype, [per_group, positions], [1, outputs as isize]);
        let (kernel, to) = (read(&kernel)?, write(&to)?);
        parts.push(lowered(seen(patches, group).product(kernel, to, precision, Isa::get())?));
    }
    let needed = super::workspace_bytes(&parts);
    Ok(Lowered::WithWorkspace(
        needed,
        Box::new(move |workspace, list: &mut Vec<Box<dyn Task>>| {
            parts.into_iter().try_for_each(|part| part.give(workspace, list))
        }),
    ))
}

fn matrix(pointer: *mut u8, dtype: Dtype, shape: [usize; 2], strides: [isize; 2]) -> HostView {
    HostView { pointer, dtype, shape: shape[..].into(), strides: strides[..].into() }
}

fn general(patches: Patches, w: HostView, out: HostView) -> Result<Lowered> {
    let (dtype, size) = (out.dtype, out.dtype.size());
    let outputs = w.shape[0];
    let (groups, per_group) = (patches.spec.groups, outputs / patches.spec.groups);
    let taps: usize = patches.taps.iter().product();
    let (depth, width) = (patches.depth, taps * patches.depth);
    let rows = out.shape[0] * patches.out.iter().product::<usize>();
    let direct = patches.is_input();
    let block =
        if direct { rows } else { (BLOCK / (width * size)).next_multiple_of(ROWS).max(ROWS).min(rows) };
    let held = if direct { 0 } else { (block * width * size).next_multiple_of(64) };
    let channels = depth * groups;
    let (input, kernel, result) = (Shared(patches.x.pointer), Shared(w.pointer), Shared(out.pointer));
    // The product of rows `from ..` of a group.
    let multiply = move |held: *mut u8, group: usize, from: usize, count: usize| {
        let left = if direct {
            let at = input.get().wrapping_add((from * channels + group * depth) * size);
            matrix(at, dtype, [count, width], [channels as isize, 1])
        } else {
            matrix(held, dtype, [count, width], [width as isize, 1])
        };
        let at = kernel.get().wrapping_add(group * per_group * width * size);
        let right = matrix(at, dtype, [width, per_group], [1, width as isize]);
        let at = result.get().wrapping_add((from * outputs + group * per_group) * size);
        let to = matrix(at, dtype, [count, per_group], [outputs as isize, 1]);
        product(&left, &right, &to, Precision::Exact, false)
    };
    let pieces: Vec<(usize, usize)> =
        (0..rows).step_by(block).map(|from| (from, block.min(rows - from))).collect();
    let mut most = 0;
    for &(from, count) in [pieces.first(), pieces.last()].into_iter().flatten() {
        most = most.max(multiply(std::ptr::dangling_mut::<u64>().cast(), 0, from, count)?.bytes());
    }
    Ok(Lowered::WithWorkspace(
        held + most,
        Box::new(move |workspace, list: &mut Vec<Box<dyn Task>>| {
            for group in 0..groups {
                for &(from, count) in &pieces {
                    if !direct {
                        list.push(gather(patches.clone(), group, from, count, Shared(workspace)));
                    }
                    multiply(workspace, group, from, count)?.give(workspace.wrapping_add(held), list)?;
                }
            }
            Ok(())
        }),
    ))
}

/// Writes patches as rows: taps, then channels.
fn gather(patches: Patches, group: usize, from: usize, count: usize, to: Shared) -> Box<dyn Task> {
    let size = patches.x.dtype.size();
    let (taps, depth) = (patches.taps.iter().product::<usize>(), patches.depth);
    let stride = patches.x.strides[patches.x.shape.len() - 1];
    task("conv", count.div_ceil(ROWS), move |chunk, _| {
        for row in chunk * ROWS..count.min((chunk + 1) * ROWS) {
            let line = to.get().wrapping_add(row * taps * depth * size);
            patches.visit(from + row, group * depth, |tap, pointer| {
                let target = line.wrapping_add(tap * depth * size);
                // SAFETY: `depth` elements of the computed input (its channels are `stride` apart), or
                // none; the target is this row's part of the workspace, this chunk's alone.
                unsafe {
                    if pointer.is_null() {
                        std::ptr::write_bytes(target, 0, depth * size);
                    } else if stride == 1 {
                        std::ptr::copy_nonoverlapping(pointer, target, depth * size);
                    } else {
                        match size {
                            2 => strided::<u16>(pointer, stride, target, depth),
                            4 => strided::<u32>(pointer, stride, target, depth),
                            _ => strided::<u64>(pointer, stride, target, depth),
                        }
                    }
                }
            });
        }
    })
}

/// # Safety
/// `count` elements lie at both places, those of `from` `stride` elements apart.
unsafe fn strided<T: Copy>(from: *mut u8, stride: isize, to: *mut u8, count: usize) {
    let (from, to) = (from.cast::<T>(), to.cast::<T>());
    for i in 0..count {
        // SAFETY: promised by the caller.
        unsafe { to.add(i).write(from.wrapping_offset(i as isize * stride).read()) };
    }
}

/// Every channel by itself: the kernel is turned to [taps, channels] first, so that neighbouring
/// channels are neighbours everywhere.
fn depthwise(patches: Patches, w: HostView, out: HostView) -> Lowered {
    let channels = w.shape[0];
    let taps: usize = patches.taps.iter().product();
    let rows = out.shape[0] * patches.out.iter().product::<usize>();
    let (kernel, result) = (Shared(w.pointer), Shared(out.pointer));
    let stride = patches.x.strides[patches.x.shape.len() - 1];
    let per_chunk = (1usize << 16).div_ceil(channels * taps).max(1);
    let (isa, seen) = (Isa::get(), seen(&patches, 0));
    Lowered::WithWorkspace(
        channels * taps * 4,
        Box::new(move |workspace, list: &mut Vec<Box<dyn Task>>| {
            let turned = Shared(workspace);
            list.push(task("conv", 1, move |_, _| {
                let (from, to) = (kernel.get().cast::<f32>(), turned.get().cast::<f32>());
                for at in 0..channels * taps {
                    // SAFETY: both have `channels · taps` elements.
                    unsafe { to.add(at % taps * channels + at / taps).write(from.add(at).read()) };
                }
            }));
            list.push(task("conv", rows.div_ceil(per_chunk), move |chunk, _| {
                let mut points = Vec::new();
                let (mut row, end) = (chunk * per_chunk, rows.min((chunk + 1) * per_chunk));
                while row < end {
                    let (alike, step) = seen.points(row, &mut points);
                    let positions = alike.min(end - row);
                    let kernel = turned.get().cast::<f32>().cast_const();
                    let out = result.get().cast::<f32>().wrapping_add(row * channels);
                    let work = ByChannels { points: &points, stride, positions, step, kernel, out, channels };
                    // SAFETY: points of the input, whose channels are `stride` apart; the turned kernel, which the
                    // task before has written; rows of the contiguous output, this chunk's alone.
                    unsafe { by_channels(isa, work) }
                    row += positions;
                }
            }));
            Ok(())
        }),
    )
}

/// Neighbouring positions that see the same taps: those that are no padding, each with where its input is for the
/// first position.
struct ByChannels<'a> {
    points: &'a [(usize, *const u8)],
    /// From one channel of the input to the next.
    stride: isize,
    positions: usize,
    /// Bytes from what one position sees to what the next does.
    step: isize,
    /// [taps, channels]
    kernel: *const f32,
    /// [positions, channels]
    out: *mut f32,
    channels: usize,
}

/// Sums over taps, for every channel.
///
/// # Safety
/// All channels are there at every place, and may be written in the output.
unsafe fn by_channels(isa: Isa, work: ByChannels) {
    dispatch(isa, work)
}

impl Kernel for ByChannels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let whole = if self.stride == 1 { self.channels - self.channels % LANES } else { 0 };
        for at in (0..whole).step_by(LANES) {
            self.lanes::<V, true>(at);
        }
        for at in (whole..self.channels).step_by(LANES) {
            self.lanes::<V, false>(at);
        }
    }
}

impl ByChannels<'_> {
    /// Channels from `at` on, as many as a vector has: `WHOLE` says that they are there and side by side.
    #[inline(always)]
    fn lanes<V: Vector, const WHOLE: bool>(&self, at: usize) {
        let count = (self.channels - at).min(LANES);
        for position in 0..self.positions {
            let moved = position as isize * self.step + at as isize * self.stride * size_of::<f32>() as isize;
            let mut sum = V::zero();
            for &(tap, point) in self.points {
                let point = point.wrapping_offset(moved).cast::<f32>();
                let weight = self.kernel.wrapping_add(tap * self.channels + at);
                // SAFETY: promised to `by_channels`.
                let (x, w) = unsafe {
                    if WHOLE {
                        (V::load(point), V::load(weight))
                    } else {
                        let mut lanes = [0.0; LANES];
                        for (i, lane) in lanes[..count].iter_mut().enumerate() {
                            *lane = point.wrapping_offset(i as isize * self.stride).read();
                        }
                        (V::from_slice(&lanes, 0.0), V::load_part(weight, count, 0.0))
                    }
                };
                sum = sum + x * w;
            }
            // SAFETY: as above.
            unsafe { sum.store_part(self.out.add(position * self.channels + at), count) }
        }
    }
}
