//! Every primitive of the graph.
//!
//! One enum, so that each backend and each transformation is an exhaustive `match` and a new op
//! cannot be forgotten. The functions that build these nodes, with their shape and gradient
//! rules, are in `ops/`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use smallvec::SmallVec;

pub use mica_kernels::elementwise::{BinaryOp, CompareOp, UnaryOp};
pub use mica_kernels::index::ScatterOp;
pub use mica_kernels::reduce::ReduceOp;
pub use mica_kernels::scan::ScanOp;
pub use mica_kernels::sort::SortOrder;

pub use crate::ops::conv::ConvNd;
use crate::ops::custom::CustomOp;
pub use crate::ops::fft::FftSpec;
pub use crate::ops::linalg::LinalgOp;
pub use crate::ops::quantized::CodecOp;
use crate::transforms::Region;
use crate::{Array, Result, Shape, Strides};

/// A list of axes.
pub type Axes = SmallVec<[usize; 4]>;

/// What a node computes from its inputs.
#[derive(Clone, Debug)]
pub enum Op {
    /// An input of a function that a transformation traces: its value is its input's.
    Tracer(TraceScope),
    /// The same as its input, without a gradient.
    StopGradient,
    /// The first input, once the others have been computed: gives evaluation an order where data
    /// gives none.
    After,
    /// The first input. A gradient rule that asks for its values is given the second's, a copy in a narrower dtype
    /// that is made before anything else uses the array: it is all that is kept until then. Further inputs are views
    /// of the outputs that follow it on its node, which rules take likewise: else they would hold the whole node.
    SavedAs,
    /// One value everywhere.
    Full(Scalar),
    /// start, start + step, …
    Arange {
        /// First value.
        start: f64,
        /// Difference between neighbours.
        step: f64,
    },
    /// One value to one value.
    Unary(UnaryOp),
    /// Two values to one; inputs already have the same shape and dtype.
    Binary(BinaryOp),
    /// Two values to a bool.
    Compare(CompareOp),
    /// condition ? a : b.
    Select,
    /// Another dtype.
    Cast,
    /// The same elements in another shape.
    Reshape,
    /// Dimensions in another order.
    Transpose(Axes),
    /// Repeated along dimensions of size one.
    Broadcast,
    /// start, start + step, … along every dimension.
    Slice {
        /// First index per dimension.
        start: SmallVec<[usize; 4]>,
        /// Step per dimension; may be negative.
        step: SmallVec<[isize; 4]>,
    },
    /// Row-major without gaps.
    Contiguous,
    /// Inputs one after another along an axis.
    Concatenate {
        /// The axis.
        axis: usize,
    },
    /// The first input with a slice of it replaced by the second.
    SliceUpdate {
        /// First index per dimension.
        start: SmallVec<[usize; 4]>,
        /// Step per dimension.
        step: SmallVec<[isize; 4]>,
    },
    /// A reduction over axes, which keep size one.
    Reduce {
        /// Sum, product …
        op: ReduceOp,
        /// Ascending.
        axes: Axes,
    },
    /// Index of the largest or smallest along an axis, which keeps size one.
    ArgReduce {
        /// Largest rather than smallest.
        max: bool,
        /// The axis.
        axis: usize,
    },
    /// Softmax over the last axis.
    Softmax,
    /// log Σ exp over the last axis, which keeps size one.
    LogSumExp,
    /// Slices of the first input along an axis, by an index array.
    Take {
        /// The axis.
        axis: usize,
    },
    /// One element per index along an axis.
    TakeAlong {
        /// The axis.
        axis: usize,
    },
    /// zeros(shape) with the updates of the second input added to the slices along `axis` that the
    /// first input (indices) names: the transpose of [`Op::Take`].
    ScatterAdd {
        /// The axis.
        axis: usize,
    },
    /// The transpose of [`Op::TakeAlong`].
    ScatterAddAlong {
        /// The axis.
        axis: usize,
    },
    /// A slice of the first input for every position of the others, which are index arrays that
    /// broadcast together: their shape, then the slice's.
    Gather {
        /// The axis that each index array counts along.
        axes: Axes,
        /// Size of the slices per axis.
        slice: Shape,
    },
    /// The first input with the second (updates: the shape of the indices, then a slice's) joined
    /// to it at the places that the other inputs name: the transpose of [`Op::Gather`].
    Scatter {
        /// How an update meets what is there.
        op: ScatterOp,
        /// The axis that each index array counts along.
        axes: Axes,
    },
    /// The first input with the third joined to it at the indices of the second along an axis.
    ScatterAlong {
        /// How an update meets what is there.
        op: ScatterOp,
        /// The axis.
        axis: usize,
    },
    /// Running sums, products and extremes along an axis.
    Scan {
        /// What runs.
        op: ScanOp,
        /// The axis.
        axis: usize,
        /// From the last element to the first.
        reverse: bool,
        /// Without the element itself.
        exclusive: bool,
    },
    /// The values along an axis in ascending order.
    Sort {
        /// The axis.
        axis: usize,
        /// How much order.
        order: SortOrder,
    },
    /// The places along an axis of the values in ascending order.
    ArgSort {
        /// The axis.
        axis: usize,
        /// How much order.
        order: SortOrder,
    },
    /// The bytes of contiguous elements as elements of another dtype.
    Bitcast,
    /// The elements of a contiguous array through these strides.
    AsStrided {
        /// In elements, per dimension of the result.
        strides: Strides,
        /// The element that comes first.
        offset: usize,
    },
    /// Matrix product of the last two dimensions; leading ones are equal.
    Matmul {
        /// Of the products.
        precision: Precision,
    },
    /// x · wᵀ with w [out, in], plain or packed, plus an optional bias.
    Linear {
        /// Of the products.
        precision: Precision,
    },
    /// y · w with w [out, in], plain or packed: the transpose of [`Op::Linear`].
    LinearTransposed {
        /// Of the products.
        precision: Precision,
    },
    /// Rows of a weight [rows, width], plain or packed.
    Embedding,
    /// A packed weight as a plain array of this dtype.
    Dequantize,
    /// Threefry bits from a key.
    RandomBits {
        /// Bytes per value: 1, 2 or 4.
        width: usize,
    },
    /// x / rms(x) · weight.
    RmsNorm {
        /// Added to the mean square.
        eps: f32,
    },
    /// Inputs x, weight, dy; outputs dx, dweight.
    RmsNormVjp {
        /// Added to the mean square.
        eps: f32,
    },
    /// (x − mean) / std · weight + bias.
    LayerNorm {
        /// Added to the variance.
        eps: f32,
    },
    /// Rotary positions.
    Rope(RopeSpec),
    /// Attention over keys and values held in arrays: outputs `out`, `lse`.
    Attention(AttentionSpec),
    /// Gradients of [`Op::Attention`]: inputs q, k, v, out, lse, dout, (key_start); outputs dq, dk, dv.
    AttentionVjp(AttentionSpec),
    /// Attention over the paged store.
    PagedAttention(Arc<crate::kv::PagedStep>),
    /// Causal depthwise convolution over time: inputs x [B, L, C], weight [C, K], (state), (starts);
    /// outputs y and the next state.
    ShortConv(ConvSpec),
    /// Gradients of [`Op::ShortConv`]: inputs x, weight, dy, (starts); outputs dx, dweight.
    ShortConvVjp(ConvSpec),
    /// Summed negative log-likelihood of rows of hidden states under an output head, gradients
    /// formed on the way: inputs hidden [n, d], weight [V, d], targets \[n\]; outputs the sum, the
    /// log-probability per row, dhidden and dweight for a cotangent of one.
    LinearCrossEntropy(CrossEntropySpec),
    /// One fused AdamW step: inputs parameter, gradient, m, v; outputs parameter, m, v.
    AdamW(AdamWSpec),
    /// Elementwise ops as one, made by [`crate::transforms::compile`].
    Fused(Arc<Region>),
    /// Convolution over any number of spatial dimensions: inputs x [N, …, C], weight [O, …, C / groups].
    Conv(Arc<ConvNd>),
    /// Fourier transform along one axis.
    Fft(FftSpec),
    /// A decomposition of the matrices in the last two dimensions.
    Linalg(LinalgOp),
    /// Walsh-Hadamard transform of the last axis, times a number.
    Hadamard {
        /// The number.
        scale: f32,
    },
    /// Products of the matrices that indices name: inputs a [A, m, k], b [B, k, n], indices of `a` and
    /// of `b` (both u32, of one shape); output [indices, m, n].
    GatherMatmul,
    /// x · wᵀ with the w that an index names, or x · w if `transposed`: inputs x [A, m, k], w [experts, out, in], plain
    /// or packed, indices of `x` and of `w` (both u32, of one shape); output [indices, m, n].
    GatherLinear {
        /// Of the products.
        precision: Precision,
        /// k runs over `out`, n over `in`.
        transposed: bool,
    },
    /// One product per segment of the inner dimension: inputs a [m, k], b [k, n], segments [.., 2] u32.
    SegmentedMatmul,
    /// Number formats of quantized weights.
    Codec(CodecOp),
    /// A function with rules of its own.
    Custom(Arc<dyn CustomOp>),
}

/// How products are formed; accumulation is f32 in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Precision {
    /// In the activation's dtype; f32 for f32.
    #[default]
    Exact,
    /// Both sides rounded to bf16.
    Bf16,
    /// Activations quantized to int8 where the weight is quantized, else as [`Precision::Bf16`].
    /// For inference.
    Fast,
}

/// A number of any dtype.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    /// true or false.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A large unsigned integer.
    UInt(u64),
    /// A float.
    Float(f64),
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// How many of a head's dimensions turn.
    pub dims: usize,
    /// Pairs are neighbours (2i, 2i+1) rather than halves (i, i + dims/2).
    pub traditional: bool,
    /// Turn backwards: the gradient.
    pub inverse: bool,
    /// cos and sin are multiplied by this (YaRN's attention factor).
    pub scale: f32,
}

/// Attention over arrays.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Multiplies q·k.
    pub scale: f32,
    /// Query t sees keys up to t + (keys − queries).
    pub causal: bool,
    /// Query t sees only the last `window` keys up to its own.
    pub window: Option<usize>,
    /// softcap · tanh(score / softcap).
    pub softcap: Option<f32>,
    /// Whether a fourth input gives the first visible key per query: [batch, queries] i32.
    pub key_start: bool,
    /// Of the products.
    pub precision: Precision,
}

/// Short convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ConvSpec {
    /// Whether an input carries the last K − 1 positions: [B, K−1, C].
    pub state: bool,
    /// Whether an input gives the first position of each row's sequence: [B, L] i32.
    pub starts: bool,
}

/// Fused output head and loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropySpec {
    /// Of the products.
    pub precision: Precision,
    /// softcap · tanh(logit / softcap).
    pub softcap: Option<f32>,
}

/// One step of AdamW with decoupled weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSpec {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the mean.
    pub beta1: f32,
    /// Decay of the mean square.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Decoupled decay, times lr.
    pub weight_decay: f32,
    /// Divide by 1 − βᵗ; the step t, counted from 1. Zero: no bias correction (MLX's Adam).
    pub step: u32,
    /// Multiplies the gradient first (clipping).
    pub grad_scale: f32,
}

/// One run of a transformation over a function. While it is active, the values of its tracers
/// cannot be read.
#[derive(Clone, Debug)]
pub struct TraceScope(Arc<AtomicBool>);

impl TraceScope {
    /// A new, active scope.
    pub(crate) fn new() -> TraceScope {
        TraceScope(Arc::new(AtomicBool::new(true)))
    }

    pub(crate) fn is_active(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Wraps an array into a tracer of this scope.
    pub(crate) fn wrap(&self, array: &Array) -> Array {
        Array::lazy(
            Op::Tracer(self.clone()),
            smallvec::smallvec![array.clone()],
            array.shape(),
            array.dtype(),
        )
    }

    pub(crate) fn close(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Closes its scope at the end of a block, whichever way the block ends.
pub(crate) struct TraceGuard(pub(crate) TraceScope);

impl Drop for TraceGuard {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Op {
    /// The name in messages and profiles.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Tracer(_) => "tracer",
            Op::StopGradient => "stop_gradient",
            Op::After => "after",
            Op::SavedAs => "saved_as",
            Op::Full(_) => "full",
            Op::Arange { .. } => "arange",
            Op::Unary(op) => op.name(),
            Op::Binary(op) => op.name(),
            Op::Compare(op) => op.name(),
            Op::Select => "where",
            Op::Cast => "astype",
            Op::Reshape => "reshape",
            Op::Transpose(_) => "transpose",
            Op::Broadcast => "broadcast_to",
            Op::Slice { .. } => "slice",
            Op::Contiguous => "contiguous",
            Op::Concatenate { .. } => "concatenate",
            Op::SliceUpdate { .. } => "slice_update",
            Op::Reduce { op, .. } => op.name(),
            Op::ArgReduce { max: true, .. } => "argmax",
            Op::ArgReduce { max: false, .. } => "argmin",
            Op::Softmax => "softmax",
            Op::LogSumExp => "logsumexp",
            Op::Take { .. } => "take",
            Op::TakeAlong { .. } => "take_along_axis",
            Op::ScatterAdd { .. } => "scatter_add",
            Op::ScatterAddAlong { .. } => "scatter_add_along_axis",
            Op::Gather { .. } => "gather",
            Op::Scatter { .. } => "scatter",
            Op::ScatterAlong { .. } => "put_along_axis",
            Op::Scan { op, .. } => op.name(),
            Op::Sort { order: SortOrder::Full, .. } => "sort",
            Op::Sort { .. } => "partition",
            Op::ArgSort { order: SortOrder::Full, .. } => "argsort",
            Op::ArgSort { .. } => "argpartition",
            Op::Bitcast => "view",
            Op::AsStrided { .. } => "as_strided",
            Op::Matmul { .. } => "matmul",
            Op::Linear { .. } => "linear",
            Op::LinearTransposed { .. } => "linear_transposed",
            Op::Embedding => "embedding",
            Op::Dequantize => "dequantize",
            Op::RandomBits { .. } => "random_bits",
            Op::RmsNorm { .. } => "rms_norm",
            Op::RmsNormVjp { .. } => "rms_norm_vjp",
            Op::LayerNorm { .. } => "layer_norm",
            Op::Rope(_) => "rope",
            Op::Attention(_) => "attention",
            Op::AttentionVjp(_) => "attention_vjp",
            Op::PagedAttention(_) => "paged_attention",
            Op::ShortConv(_) => "short_conv",
            Op::ShortConvVjp(_) => "short_conv_vjp",
            Op::LinearCrossEntropy(_) => "linear_cross_entropy",
            Op::AdamW(_) => "adamw",
            Op::Fused(_) => "fused",
            Op::Conv(_) => "conv",
            Op::Fft(spec) => spec.name(),
            Op::Linalg(op) => op.name(),
            Op::Hadamard { .. } => "hadamard_transform",
            Op::GatherMatmul => "gather_mm",
            Op::GatherLinear { .. } => "gather_linear",
            Op::SegmentedMatmul => "segmented_mm",
            Op::Codec(op) => op.name(),
            Op::Custom(custom) => custom.name(),
        }
    }

    /// Whether it moves elements and reads none, so that it can be taken of a copy as well.
    pub(crate) fn is_saved_view(&self) -> bool {
        matches!(self, Op::Reshape | Op::Transpose(_) | Op::Slice { .. } | Op::Broadcast | Op::Contiguous)
    }

    /// Whether its gradient rule takes copies in place of saved arrays ([`Op::SavedAs`]): one that is smooth in them.
    /// Rules that compare, order or round inputs, or set them against outputs, need what the op was given; rules of
    /// others (custom functions, checkpoints) are theirs to know.
    pub(crate) fn gradient_takes_copies(&self) -> bool {
        match self {
            Op::Binary(op) => {
                matches!(op, BinaryOp::Multiply | BinaryOp::Divide | BinaryOp::Power | BinaryOp::Atan2)
            }
            Op::Unary(_)
            | Op::Softmax
            | Op::Matmul { .. }
            | Op::Linear { .. }
            | Op::LinearTransposed { .. }
            | Op::GatherLinear { .. }
            | Op::RmsNorm { .. }
            | Op::LayerNorm { .. }
            | Op::Attention(_)
            | Op::ShortConv(_)
            | Op::Conv(_) => true,
            Op::Fused(region) => region.is_smooth(),
            _ => false,
        }
    }

    /// Whether the result is its input's memory seen through other strides, so that nothing runs.
    pub(crate) fn is_view(&self) -> bool {
        matches!(
            self,
            Op::Tracer(_)
                | Op::StopGradient
                | Op::After
                | Op::SavedAs
                | Op::Transpose(_)
                | Op::Broadcast
                | Op::Slice { .. }
                | Op::AsStrided { .. }
        )
    }
}

impl Scalar {
    /// As a float.
    pub fn to_f64(self) -> f64 {
        match self {
            Scalar::Bool(value) => value as u8 as f64,
            Scalar::Int(value) => value as f64,
            Scalar::UInt(value) => value as f64,
            Scalar::Float(value) => value,
        }
    }
}

/// Checks shared by constructors: fail early if an input already failed.
#[inline]
pub(crate) fn first_failure(inputs: &[&Array]) -> Result<()> {
    match inputs.iter().find_map(|input| input.node().failure()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
