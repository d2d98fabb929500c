//! Convolutions over one, two or three spatial dimensions, channels last, as MLX has them.
//!
//! There is one primitive. Transposed convolutions dilate the input, and both gradients are
//! convolutions again, so derivatives nest.

use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::{Grads, Vjp, Vmap};
use crate::dtype::promote;
use crate::op::{Op, first_failure};
use crate::shape::Shape;
use crate::{Array, Error, Result};

/// How a convolution walks. One entry per spatial dimension in each list.
///
/// With the input's elements `input_dilation` apart and `low` zeros before them (a negative number
/// cuts), output p sums over taps k the input at p · stride + k · kernel_dilation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConvNd {
    /// Distance of neighbouring outputs.
    pub stride: SmallVec<[usize; 3]>,
    /// Zeros before the input; negative: cut away.
    pub low: SmallVec<[isize; 3]>,
    /// Zeros after the input; negative: cut away.
    pub high: SmallVec<[isize; 3]>,
    /// Distance of neighbouring taps.
    pub kernel_dilation: SmallVec<[usize; 3]>,
    /// Distance of neighbouring input elements.
    pub input_dilation: SmallVec<[usize; 3]>,
    /// Channels are cut into so many groups that do not see each other.
    pub groups: usize,
    /// The kernel's spatial dimensions run backwards.
    pub flip: bool,
}

impl ConvNd {
    /// Stride and dilations of one, no padding.
    pub fn new(dimensions: usize) -> ConvNd {
        ConvNd {
            stride: SmallVec::from_elem(1, dimensions),
            low: SmallVec::from_elem(0, dimensions),
            high: SmallVec::from_elem(0, dimensions),
            kernel_dilation: SmallVec::from_elem(1, dimensions),
            input_dilation: SmallVec::from_elem(1, dimensions),
            groups: 1,
            flip: false,
        }
    }

    /// Places from the first to the last tap.
    fn reach(&self, axis: usize, taps: usize) -> isize {
        (self.kernel_dilation[axis] * (taps - 1)) as isize + 1
    }

    /// Size of the dilated, padded input.
    fn padded(&self, axis: usize, size: usize) -> isize {
        let dilated = if size == 0 { 0 } else { (self.input_dilation[axis] * (size - 1)) as isize + 1 };
        dilated + self.low[axis] + self.high[axis]
    }

    fn check(&self, input: &Array, weight: &Array) -> Result<()> {
        let bad = |message: String| Err(Error::invalid("conv", message));
        let dimensions = self.stride.len();
        if !(1..=3).contains(&dimensions) || input.rank() != dimensions + 2 || weight.rank() != input.rank() {
            return bad(format!(
                "needs an input [N, …, C_in] and a weight [C_out, …, C_in] of the same 1 to 3 spatial dimensions, got {:?} and {:?} for {dimensions}",
                input.shape(),
                weight.shape()
            ));
        }
        let lists = [self.low.len(), self.high.len(), self.kernel_dilation.len(), self.input_dilation.len()];
        if lists.iter().any(|&length| length != dimensions) {
            return bad(format!(
                "needs {dimensions} numbers each for stride, padding and dilations, got {self:?}"
            ));
        }
        let steps = || self.stride.iter().chain(&self.kernel_dilation).chain(&self.input_dilation);
        if steps().any(|&n| n == 0) {
            return bad(format!("strides and dilations should be positive, got {self:?}"));
        }
        // So far from the largest number, sums and products of two do not overflow below.
        const MOST: usize = 1 << 40;
        let most = |shape: &[usize]| shape[1..=dimensions].iter().copied().max().unwrap_or(0);
        let padding = self.low.iter().chain(&self.high).map(|n| n.unsigned_abs()).max().unwrap_or(0);
        let spread =
            |by: &[usize], shape: &[usize]| by.iter().max().map_or(0, |by| by.saturating_mul(most(shape)));
        if steps().any(|&n| n > MOST)
            || padding > MOST
            || spread(&self.input_dilation, input.shape()) > MOST
            || spread(&self.kernel_dilation, weight.shape()) > MOST
        {
            return bad(format!("strides, dilations and padding should make sizes below 2^40, got {self:?}"));
        }
        let (channels, outputs) = (input.dim(-1), weight.dim(0));
        if self.groups == 0 || !channels.is_multiple_of(self.groups) || !outputs.is_multiple_of(self.groups) {
            return bad(format!(
                "{channels} input and {outputs} output channels cannot be cut into {} groups",
                self.groups
            ));
        }
        if weight.dim(-1) * self.groups != channels {
            return bad(format!(
                "the input has {channels} channels, the weight {:?} takes {} in {} groups",
                weight.shape(),
                weight.dim(-1) * self.groups,
                self.groups
            ));
        }
        for axis in 0..dimensions {
            let (size, taps) = (input.shape()[axis + 1], weight.shape()[axis + 1]);
            if taps == 0 || self.padded(axis, size) < self.reach(axis, taps) {
                return bad(format!(
                    "the padded input should not be smaller than the kernel, got {} and {taps} taps along axis {} of input {:?} and weight {:?}",
                    self.padded(axis, size),
                    axis + 1,
                    input.shape(),
                    weight.shape()
                ));
            }
        }
        Ok(())
    }

    fn output(&self, input: &[usize], weight: &[usize]) -> Shape {
        let mut shape: Shape = smallvec![input[0]];
        for axis in 0..self.stride.len() {
            let free = self.padded(axis, input[axis + 1]) - self.reach(axis, weight[axis + 1]);
            shape.push(free as usize / self.stride[axis] + 1);
        }
        shape.push(weight[0]);
        shape
    }
}

/// The convolution of `input` [N, …, C_in] with `weight` [C_out, …, C_in / groups].
///
/// As in MLX, negative padding cuts elements off the input before it is dilated.
pub fn conv_general(input: &Array, weight: &Array, spec: &ConvNd) -> Result<Array> {
    first_failure(&[input, weight])?;
    let cuts = spec.low.iter().chain(&spec.high).any(|&n| n < 0);
    if !cuts || input.rank() != spec.low.len() + 2 || spec.high.len() != spec.low.len() {
        return convolution(input, weight, spec);
    }
    let (mut input, mut spec) = (input.clone(), spec.clone());
    for axis in 0..spec.low.len() {
        let size = input.shape()[axis + 1];
        let from = spec.low[axis].min(0).unsigned_abs();
        let to = size.saturating_sub(spec.high[axis].min(0).unsigned_abs());
        if from > to {
            return Err(Error::invalid(
                "conv",
                format!(
                    "padding {} and {} cuts more than the {size} of axis {}",
                    spec.low[axis],
                    spec.high[axis],
                    axis + 1
                ),
            ));
        }
        input = input.narrow(axis as i32 + 1, from, to)?;
        spec.low[axis] = spec.low[axis].max(0);
        spec.high[axis] = spec.high[axis].max(0);
    }
    convolution(&input, weight, &spec)
}

/// The node. Negative padding cuts the dilated input here, as gradients need it.
pub(crate) fn convolution(input: &Array, weight: &Array, spec: &ConvNd) -> Result<Array> {
    let dtype = promote(input.dtype(), weight.dtype());
    for array in [input, weight] {
        if !array.dtype().is_float() {
            return Err(Error::dtype("conv", "a real float dtype", array.dtype()));
        }
    }
    spec.check(input, weight)?;
    let shape = spec.output(input.shape(), weight.shape());
    let inputs = smallvec![input.astype(dtype)?, weight.astype(dtype)?.contiguous()?];
    Ok(Array::lazy(Op::Conv(Arc::new(spec.clone())), inputs, shape, dtype))
}

macro_rules! dimensions {
    ($($n:literal $conv:ident $transposed:ident $shape:literal;)*) => { $(
        #[doc = concat!("Cross-correlation of `input` [N, ", $shape, ", C_in] with `weight` [C_out, ", $shape, ", C_in / groups].")]
        pub fn $conv(
            input: &Array,
            weight: &Array,
            stride: [usize; $n],
            padding: [usize; $n],
            dilation: [usize; $n],
            groups: usize,
        ) -> Result<Array> {
            let pad: SmallVec<[isize; 3]> = padding.iter().map(|&n| signed(n)).collect();
            let spec = ConvNd {
                stride: stride[..].into(),
                low: pad.clone(),
                high: pad,
                kernel_dilation: dilation[..].into(),
                groups,
                ..ConvNd::new($n)
            };
            conv_general(input, weight, &spec)
        }

        #[doc = concat!("Transposed convolution: what gives the gradient of [`", stringify!($conv), "`]'s input, with the weight as [C_out, ", $shape, ", C_in / groups].")]
        pub fn $transposed(
            input: &Array,
            weight: &Array,
            stride: [usize; $n],
            padding: [usize; $n],
            dilation: [usize; $n],
            output_padding: [usize; $n],
            groups: usize,
        ) -> Result<Array> {
            transposed(input, weight, &stride, &padding, &dilation, &output_padding, groups)
        }
    )* };
}
dimensions! {
    1 conv1d conv_transpose1d "length";
    2 conv2d conv_transpose2d "height, width";
    3 conv3d conv_transpose3d "depth, height, width";
}

/// Numbers too large for a sign are refused when the convolution is checked.
fn signed(n: usize) -> isize {
    isize::try_from(n).unwrap_or(isize::MAX)
}

fn transposed(
    input: &Array,
    weight: &Array,
    stride: &[usize],
    padding: &[usize],
    dilation: &[usize],
    output_padding: &[usize],
    groups: usize,
) -> Result<Array> {
    let dimensions = stride.len();
    if weight.rank() != dimensions + 2 {
        return Err(Error::invalid(
            "conv_transpose",
            format!("needs a weight of {} dimensions, got {:?}", dimensions + 2, weight.shape()),
        ));
    }
    let low = |axis: usize| {
        let reach = dilation[axis].saturating_mul(weight.shape()[axis + 1].saturating_sub(1));
        signed(reach).saturating_sub(signed(padding[axis]))
    };
    let spec = ConvNd {
        low: (0..dimensions).map(low).collect(),
        high: (0..dimensions).map(|axis| low(axis).saturating_add(signed(output_padding[axis]))).collect(),
        kernel_dilation: dilation.into(),
        input_dilation: stride.into(),
        groups,
        flip: true,
        ..ConvNd::new(dimensions)
    };
    conv_general(input, weight, &spec)
}

/// Which part of a discrete convolution is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ConvolveMode {
    /// Wherever the two overlap at all: a + v − 1.
    #[default]
    Full,
    /// As many as the longer one has, from the middle.
    Same,
    /// Where the shorter one lies wholly inside the longer.
    Valid,
}

impl std::str::FromStr for ConvolveMode {
    type Err = Error;

    fn from_str(name: &str) -> Result<ConvolveMode> {
        Ok(match name {
            "full" => ConvolveMode::Full,
            "same" => ConvolveMode::Same,
            "valid" => ConvolveMode::Valid,
            other => {
                return Err(Error::invalid(
                    "convolve",
                    format!("mode should be \"full\", \"same\" or \"valid\", got {other:?}"),
                ));
            }
        })
    }
}

/// The discrete convolution of two one-dimensional arrays.
pub fn convolve(a: &Array, v: &Array, mode: ConvolveMode) -> Result<Array> {
    if a.rank() != 1 || v.rank() != 1 || a.size() == 0 || v.size() == 0 {
        return Err(Error::invalid(
            "convolve",
            format!("needs two arrays of one dimension that are not empty, got {a:?} and {v:?}"),
        ));
    }
    let (a, v) = if v.size() > a.size() { (v, a) } else { (a, v) };
    let taps = v.size() as isize;
    let (low, high) = match mode {
        ConvolveMode::Full => (taps - 1, taps - 1),
        ConvolveMode::Same => (taps / 2, taps - 1 - taps / 2),
        ConvolveMode::Valid => (0, 0),
    };
    let spec = ConvNd { low: smallvec![low], high: smallvec![high], flip: true, ..ConvNd::new(1) };
    let row = |array: &Array| array.reshape(&[1, -1, 1]);
    conv_general(&row(a)?, &row(v)?, &spec)?.reshape(&[-1])
}

/// Channels by group: [lead, …, groups · c] with the group's part brought to where `order` wants it.
fn regroup(array: &Array, groups: usize, last_out: bool) -> Result<Array> {
    // [a, …, g · c] → [c, …, g · a] (`last_out`), or [g · a, …, c] → [g · c, …, a].
    let rank = array.rank();
    let mut split: Vec<i64> = array.shape().iter().map(|&size| size as i64).collect();
    let g = groups as i64;
    let spatial = |from: i32| (0..rank as i32 - 2).map(move |axis| axis + from);
    let (split, order, merged) = if last_out {
        let (a, c) = (split[0], split[rank - 1] / g);
        split.splice(rank - 1.., [g, c]);
        // [a, …, g, c] → [c, …, g, a]
        let order: Vec<i32> =
            std::iter::once(rank as i32).chain(spatial(1)).chain([rank as i32 - 1, 0]).collect();
        let mut merged = split[..rank - 1].to_vec();
        merged[0] = c;
        merged.push(g * a);
        (split, order, merged)
    } else {
        let (a, c) = (split[0] / g, split[rank - 1]);
        split.splice(..1, [g, a]);
        // [g, a, …, c] → [g, c, …, a]
        let order: Vec<i32> = [0, rank as i32].into_iter().chain(spatial(2)).chain([1]).collect();
        let mut merged = vec![g * c];
        merged.extend(&split[2..rank]);
        merged.push(a);
        (split, order, merged)
    };
    array.reshape(&split)?.transpose(&order)?.reshape(&merged)
}

/// Both gradients are convolutions.
///
/// dx: the cotangent, its elements `stride` apart, with the kernel turned around and in- and output
/// channels exchanged. dw: the input, batch and channels exchanged, with the cotangent as the kernel.
pub(crate) fn conv_vjp(spec: &ConvNd, rule: &Vjp) -> Result<Grads> {
    let (x, w, ct) = (&rule.inputs[0], &rule.inputs[1], rule.cotangent());
    let dimensions = spec.stride.len();
    let mut grads: Grads = smallvec![None, None];
    let size = |array: &Array, axis: usize| array.shape()[axis + 1];
    let spread = |n: usize, by: usize| (by * n.saturating_sub(1)) as isize + 1;
    let empty = x.size() == 0 || ct.size() == 0;
    if rule.needs[0] && !empty {
        let reach = |axis: usize| spec.reach(axis, size(w, axis));
        let low: SmallVec<[isize; 3]> =
            (0..dimensions).map(|axis| reach(axis) - 1 - spec.low[axis]).collect();
        let high = (0..dimensions)
            .map(|axis| {
                spread(size(x, axis), spec.input_dilation[axis]) - 1 + reach(axis)
                    - spread(size(ct, axis), spec.stride[axis])
                    - low[axis]
            })
            .collect();
        let back = ConvNd {
            stride: spec.input_dilation.clone(),
            low,
            high,
            kernel_dilation: spec.kernel_dilation.clone(),
            input_dilation: spec.stride.clone(),
            groups: spec.groups,
            flip: !spec.flip,
        };
        grads[0] = Some(convolution(ct, &regroup(w, spec.groups, false)?, &back)?);
    }
    if rule.needs[1] && !empty {
        let high = (0..dimensions)
            .map(|axis| {
                (spec.kernel_dilation[axis] * (size(w, axis) - 1)) as isize
                    + spread(size(ct, axis), spec.stride[axis])
                    - spread(size(x, axis), spec.input_dilation[axis])
                    - spec.low[axis]
            })
            .collect();
        let across = ConvNd {
            stride: spec.kernel_dilation.clone(),
            low: spec.low.clone(),
            high,
            kernel_dilation: spec.stride.clone(),
            input_dilation: spec.input_dilation.clone(),
            groups: spec.groups,
            flip: false,
        };
        // [N, …, g · c] → [c, …, g · N]; the cotangent [N, …, O] → [O, …, N].
        let data = regroup(x, spec.groups, true)?;
        let grad = convolution(&data, &ct.swap_axes(0, -1)?, &across)?.swap_axes(0, -1)?;
        grads[1] = Some(if spec.flip { reversed(&grad)? } else { grad });
    }
    if empty {
        for (at, grad) in grads.iter_mut().enumerate() {
            *grad = rule.needs[at].then(|| rule.inputs[at].zeros_like());
        }
    }
    Ok(grads)
}

/// Spatial dimensions backwards.
fn reversed(array: &Array) -> Result<Array> {
    let rank = array.rank();
    let spatial = |axis: usize| axis > 0 && axis + 1 < rank;
    let start: Vec<usize> =
        (0..rank).map(|axis| if spatial(axis) { array.shape()[axis] - 1 } else { 0 }).collect();
    let step: Vec<isize> = (0..rank).map(|axis| if spatial(axis) { -1 } else { 1 }).collect();
    array.window(&start, array.shape(), &step)
}

/// Examples that share the kernel are a larger batch; kernels that differ are groups of channels.
pub(crate) fn conv_vmap(spec: &ConvNd, rule: &Vmap) -> Result<Array> {
    let sizes = |shape: &[usize]| shape.iter().map(|&size| size as i64).collect::<Vec<i64>>();
    let out = rule.with_batch(rule.node.shape());
    if !rule.batched[1] {
        let x = rule.inputs[0].flatten_axes(0, 1)?;
        return convolution(&x, &rule.inputs[1], spec)?.reshape(&sizes(&out));
    }
    // [examples, N, …, C] → [N, …, examples · C], and back for the output.
    let (x, w) = (rule.full(0)?, &rule.inputs[1]);
    let last = x.rank() - 2;
    let joined = crate::transforms::move_axis(&x, 0, last)?.flatten_axes(last as i32, -1)?;
    let spec = ConvNd { groups: spec.groups * rule.size, ..spec.clone() };
    let y = convolution(&joined, &w.flatten_axes(0, 1)?, &spec)?;
    let mut split = sizes(&y.shape()[..last]);
    split.extend([rule.size as i64, w.dim(1) as i64]);
    crate::transforms::move_axis(&y.reshape(&split)?, last, 0)
}
