//! The patches of an image under a convolution's kernel, as a product's operand that is never in memory.
//!
//! Channels are last, so the rows of the patch matrix are runs of the image. [`Patches`] writes them straight
//! into the panels that the matrix kernel reads, in the order taps, then channels; padding is zeros that take
//! part. The product is turned around, weight times patches: panels then run over neighbouring positions, which
//! read neighbouring memory.

use std::sync::Arc;

use mica_simd::Isa;

use crate::KernelError;
use crate::gemm::block::{self, Job};
use crate::gemm::{
    Epilogue, FloatType, FloatView, FloatViewMut, Gemm, PanelForm, PanelRange, PanelSource, Precision,
};

/// How a convolution of up to three spatial dimensions walks; missing leading dimensions have size 1, distances
/// 1 and no padding.
#[derive(Clone, Debug)]
pub struct Walk {
    /// Sizes of the input.
    pub input: [usize; 3],
    /// Sizes of the output.
    pub output: [usize; 3],
    /// Sizes of the kernel.
    pub taps: [usize; 3],
    /// Distances of neighbouring outputs.
    pub stride: [usize; 3],
    /// Zeros before the input; negative: cut away.
    pub low: [isize; 3],
    /// Distances of neighbouring taps.
    pub kernel_dilation: [usize; 3],
    /// Distances of neighbouring input elements.
    pub input_dilation: [usize; 3],
    /// The kernel runs backwards.
    pub flip: bool,
}

/// A group's patches: a matrix of (taps, channels) by (batch, output positions).
#[derive(Debug)]
pub struct Patches {
    walk: Walk,
    float: FloatType,
    /// The group's first channel of the first pixel.
    image: *const u8,
    /// Bytes from one batch entry, and from one input place along each dimension, to the next.
    batch: isize,
    strides: [isize; 3],
    /// Channels of the group, side by side.
    depth: usize,
    positions: usize,
    /// What each tap adds to a position's place.
    offsets: Vec<[isize; 3]>,
}

// SAFETY: an image that may be read from any thread (the maker's promise).
unsafe impl Send for Patches {}
// SAFETY: as above.
unsafe impl Sync for Patches {}

impl Patches {
    /// The patches of an image [batch, places.., channels] of which a group sees `depth` channels from `image`
    /// on. Strides are in bytes; channels lie side by side.
    pub fn new(
        walk: Walk,
        (image, float): (*const u8, FloatType),
        (batches, batch): (usize, isize),
        strides: [isize; 3],
        depth: usize,
    ) -> Patches {
        let positions = batches * walk.output.iter().product::<usize>();
        let [a, b, c] = walk.taps;
        let offset = |axis: usize, tap: usize| {
            let tap = if walk.flip { walk.taps[axis] - 1 - tap } else { tap };
            (tap * walk.kernel_dilation[axis]) as isize - walk.low[axis]
        };
        let places = (0..a * b * c).map(|tap| [tap / (b * c), tap / c % b, tap % c]);
        let offsets = places.map(|tap| std::array::from_fn(|axis| offset(axis, tap[axis]))).collect();
        Patches { walk, float, image, batch, strides, depth, positions, offsets }
    }

    /// The product `out [outputs, positions] = weight [outputs, taps · depth] · patches`.
    pub fn product<'a>(
        self,
        weight: FloatView<'a>,
        out: FloatViewMut<'a>,
        precision: Precision,
        isa: Isa,
    ) -> Result<Gemm<'a>, KernelError> {
        if out.shape().len() != 2 || out.shape()[1] != self.positions {
            let message =
                format!("the output has to be [outputs, {}], got {:?}", self.positions, out.shape());
            return Err(KernelError::new("conv", message));
        }
        let k = self.offsets.len() * self.depth;
        Gemm::with_panels(weight, (Arc::new(self), k), out, precision, &Epilogue::none(), isa)
    }

    /// The taps that are no padding at an output position, each with where its channels are; how many positions,
    /// this one included, see the same taps; and how many bytes further each of them sees them.
    pub fn points(&self, position: usize, points: &mut Vec<(usize, *const u8)>) -> (usize, isize) {
        let place = self.place(position);
        points.clear();
        points.extend((0..self.offsets.len()).filter_map(|tap| Some((tap, self.pixel(place, tap)?))));
        let (stride, input) = (self.walk.stride[2], self.walk.input[2] as isize);
        let step = stride as isize * self.strides[2];
        if self.walk.input_dilation[2] != 1 {
            return (1, step);
        }
        let first = place.1[2];
        let mut alike = self.walk.output[2] - first;
        for offset in &self.offsets {
            // A tap moves into the input where it reaches 0, and out of it where it reaches its size.
            let at = (first * stride) as isize + offset[2];
            for edge in [0, input] {
                if at < edge {
                    alike = alike.min((edge - at).unsigned_abs().div_ceil(stride));
                }
            }
        }
        (alike, step)
    }

    /// Batch entry and place of an output position.
    fn place(&self, position: usize) -> (usize, [usize; 3]) {
        let [a, b, c] = self.walk.output;
        (position / (a * b * c), [position / (b * c) % a, position / c % b, position % c])
    }

    /// The input place that a tap sees along a dimension, if there is one.
    #[inline(always)]
    fn seen(&self, axis: usize, place: usize, offset: isize) -> Option<isize> {
        let at = (place * self.walk.stride[axis]) as isize + offset;
        let dilation = self.walk.input_dilation[axis] as isize;
        let (at, exact) =
            if dilation == 1 { (at, true) } else { (at.div_euclid(dilation), at % dilation == 0) };
        (exact && at >= 0 && at < self.walk.input[axis] as isize).then_some(at)
    }

    /// Where the channels are that a tap of a position sees; nothing in padding.
    #[inline(always)]
    fn pixel(&self, (entry, place): (usize, [usize; 3]), tap: usize) -> Option<*const u8> {
        let mut offset = entry as isize * self.batch;
        for axis in 0..3 {
            offset += self.seen(axis, place[axis], self.offsets[tap][axis])? * self.strides[axis];
        }
        Some(self.image.wrapping_offset(offset))
    }

    /// Up to 16 elements from `k` on, which is a channel of a tap, of each of `columns` positions from `first` on,
    /// whose place is given, as lines: where they are, their distance and number. Those in padding are zeros; if all are, there are no lines.
    ///
    /// # Safety
    /// They exist.
    unsafe fn lines(
        &self,
        (first, columns): (usize, usize),
        (entry, place): (usize, [usize; 3]),
        (k, (tap, channel), count): (usize, (usize, usize), usize),
        copy: &mut [u32; 256],
    ) -> (*const u8, isize, usize) {
        let size = self.float.size();
        let in_a_row = place[2] + columns <= self.walk.output[2] && self.walk.input_dilation[2] == 1;
        let step = 16 * size;
        let copies = copy.as_mut_ptr().cast::<u8>();
        if in_a_row && channel + count <= self.depth {
            // One tap of neighbouring positions: lines of one distance, some of which may be padding.
            let mut offset = entry as isize * self.batch + (channel * size) as isize;
            for axis in 0..2 {
                match self.seen(axis, place[axis], self.offsets[tap][axis]) {
                    Some(at) => offset += at * self.strides[axis],
                    None => return (copies, step as isize, 0),
                }
            }
            let stride = self.walk.stride[2] as isize;
            let at = place[2] as isize * stride + self.offsets[tap][2];
            let line = |i: isize| self.image.wrapping_offset(offset + (at + i * stride) * self.strides[2]);
            let inside = |i: isize| (0..self.walk.input[2] as isize).contains(&(at + i * stride));
            if inside(0) && inside(columns as isize - 1) {
                return (line(0), stride * self.strides[2], columns);
            }
            for i in 0..columns {
                let to = copies.wrapping_add(i * step);
                // SAFETY: `count` elements of a pixel inside the image; a line of the copy.
                unsafe {
                    match inside(i as isize) {
                        // Of a constant size: no call.
                        true if count * size == 64 => {
                            to.cast::<[u8; 64]>().write(line(i as isize).cast::<[u8; 64]>().read())
                        }
                        true => std::ptr::copy_nonoverlapping(line(i as isize), to, count * size),
                        false => std::ptr::write_bytes(to, 0, step),
                    }
                }
            }
            return (copies, step as isize, columns);
        }
        for i in 0..columns {
            let place = self.place(first + i);
            let mut done = 0;
            while done < count {
                let (tap, channel) = ((k + done) / self.depth, (k + done) % self.depth);
                let run = (self.depth - channel).min(count - done);
                let to = copies.wrapping_add(i * step + done * size);
                // SAFETY: as above.
                unsafe {
                    match self.pixel(place, tap) {
                        Some(pixel) => {
                            std::ptr::copy_nonoverlapping(pixel.wrapping_add(channel * size), to, run * size)
                        }
                        None => std::ptr::write_bytes(to, 0, run * size),
                    }
                }
                done += run;
            }
        }
        (copies, step as isize, columns)
    }
}

impl PanelSource for Patches {
    fn step(&self) -> usize {
        16
    }

    unsafe fn panels(&self, isa: Isa, form: PanelForm, range: PanelRange) {
        let into = match form {
            PanelForm::F32 => block::Into::F32,
            PanelForm::Rounded => block::Into::Rounded,
            PanelForm::Pairs => block::Into::Pairs,
        };
        let from = match self.float {
            FloatType::F32 => block::From::F32,
            FloatType::Bf16 => block::From::High,
            FloatType::F16 => block::From::F16,
        };
        let block = block::mover(isa, from, true, into);
        let bytes_a_k = if form == PanelForm::Pairs { 32 } else { 64 };
        let mut copy = [0u32; 256];
        for panel in 0..range.panels {
            let first = range.n0 + panel * 16;
            let columns = self.positions.saturating_sub(first).min(16);
            let place = self.place(first);
            let (mut tap, mut channel) = (range.k0 / self.depth, range.k0 % self.depth);
            for at in (0..form.padded(range.k)).step_by(16) {
                let lanes = range.k.saturating_sub(at).min(16);
                let (from, from_step, lines) = match lanes {
                    0 => (copy.as_ptr().cast(), 64, 0),
                    // SAFETY: the range lies inside the operand (the caller's promise).
                    _ => unsafe {
                        self.lines((first, columns), place, (range.k0 + at, (tap, channel), lanes), &mut copy)
                    },
                };
                channel += 16;
                while channel >= self.depth {
                    channel -= self.depth;
                    tap += 1;
                }
                let into = range.into.wrapping_add(panel * range.stride + at * bytes_a_k);
                // SAFETY: the lines are readable, and the panel is the caller's to write.
                unsafe {
                    block(&Job {
                        from,
                        from_step,
                        lines,
                        lanes,
                        into,
                        into_step: 64,
                        ahead: 0,
                        into_lines: 16,
                    })
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mica_testkit::Rng;
    use mica_threads::Pool;

    use super::*;
    use crate::view::{View, ViewMut};

    /// Against a sum over taps, then channels, that adds as the matrix kernel does.
    #[test]
    fn products_are_convolutions() {
        let mut rng = Rng::new(61);
        for (input, taps, stride, low, high, dilation, apart, depth, outputs) in [
            ([1, 9, 40], [1, 3, 3], 1, 1, 1, 1, 1, 16, 24),
            ([1, 9, 40], [1, 3, 3], 2, 1, 1, 1, 1, 32, 5),
            ([1, 1, 70], [1, 1, 4], 1, 3, 0, 2, 1, 3, 17),
            ([3, 5, 6], [2, 2, 3], 1, 1, 0, 1, 2, 20, 40),
            ([1, 6, 20], [1, 2, 2], 1, -1, -1, 1, 1, 16, 16),
        ] {
            for flip in [false, true] {
                let size = |axis: usize| {
                    let one = input[axis] == 1 && taps[axis] == 1;
                    let padding = if one { 0 } else { low + high };
                    let reach = (dilation * (taps[axis] - 1)) as isize + 1;
                    let padded = (apart * (input[axis] - 1)) as isize + 1 + padding;
                    (((padded - reach) / stride as isize) + 1) as usize
                };
                let output: [usize; 3] = std::array::from_fn(size);
                let low =
                    std::array::from_fn(|axis| if input[axis] == 1 && taps[axis] == 1 { 0 } else { low });
                let walk = Walk {
                    input,
                    output,
                    taps,
                    stride: [stride; 3],
                    low,
                    kernel_dilation: [dilation; 3],
                    input_dilation: [apart; 3],
                    flip,
                };
                let batches = 2;
                let pixels: usize = input.iter().product();
                let image = rng.normals(batches * pixels * depth);
                let k = taps.iter().product::<usize>() * depth;
                let weight = rng.normals(outputs * k);
                let positions: usize = batches * output.iter().product::<usize>();
                let mut first: Option<Vec<f32>> = None;
                for &isa in Isa::available() {
                    let row = depth as isize * 4;
                    let [_, b, c] = input.map(|size| size as isize);
                    let patches = Patches::new(
                        walk.clone(),
                        (image.as_ptr().cast(), FloatType::F32),
                        (batches, pixels as isize * row),
                        [b * c * row, c * row, row],
                        depth,
                    );
                    // Outputs are channels last: the matrix stands on its side.
                    let mut out = vec![f32::NAN; positions * outputs];
                    let shape = [outputs, positions];
                    // SAFETY: as many elements as the vector has.
                    let view = unsafe { ViewMut::from_raw(out.as_mut_ptr(), &shape, &[1, outputs as isize]) };
                    let weight = View::new(&weight, &[outputs, k]).unwrap();
                    let gemm = patches.product(weight.into(), view.into(), Precision::Exact, isa).unwrap();
                    gemm.run(&Pool::new(3)).unwrap();
                    match &first {
                        None => first = Some(out),
                        Some(first) => assert!(*first == out, "{isa} {walk:?}"),
                    }
                }
                let got = first.expect("one tier at least");
                let places = Patches::new(
                    walk.clone(),
                    (image.as_ptr().cast(), FloatType::F32),
                    (batches, (pixels * depth * 4) as isize),
                    [0; 3],
                    depth,
                );
                for position in 0..positions {
                    let (entry, place) = places.place(position);
                    for output in 0..outputs {
                        let mut sum = 0f32;
                        for tap in 0..k / depth {
                            let mut pixel = Some(entry * pixels);
                            let mut scale = pixels;
                            for axis in 0..3 {
                                scale /= input[axis];
                                let turned = [taps[1] * taps[2], taps[2], 1][axis];
                                let t = tap / turned % taps[axis];
                                let t = if flip { taps[axis] - 1 - t } else { t };
                                let at = (place[axis] * stride + t * dilation) as isize - low[axis];
                                let there = at >= 0 && at % apart as isize == 0;
                                let at = at / apart as isize;
                                pixel = pixel
                                    .filter(|_| there && at < input[axis] as isize)
                                    .map(|pixel| pixel + at as usize * scale);
                            }
                            for channel in 0..depth {
                                let x = pixel.map_or(0.0, |pixel| image[pixel * depth + channel]);
                                sum = weight[output * k + tap * depth + channel].mul_add(x, sum);
                            }
                        }
                        assert_eq!(got[position * outputs + output], sum, "{walk:?} {position} {output}");
                    }
                }
            }
        }
    }
}
