//! Weights in a kernel's own layout.

mod experts;

use std::ops::Range;

use half::{bf16, f16};
use mica_codec::QuantSpec;
use mica_kernels::gemm::{FloatType, FloatWeight};
pub use mica_kernels::quant::Part;
use mica_kernels::quant::{QuantWeight, ScaleType, ScaleVec, Scales, Unpacked};

use crate::backend::{self, Operand};
use crate::eval::with_pool;
use crate::{Array, Dtype, Error, Result, Shape};

pub use experts::Experts;

/// A weight [out, in] that was repacked once, at load, for the kernels. Packing is a bijection:
/// there is one copy only, and its original form can be had back bit for bit.
#[derive(Debug)]
pub enum PackedWeight {
    /// f32, bf16 or f16.
    Float(FloatWeight),
    /// Quantized in groups.
    Quant(QuantWeight),
    /// Several, of which indices choose: [experts, out, in].
    Experts(Experts),
}

/// MLX's three arrays of a quantized weight.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// u32 [out, in · bits / 32]
    pub words: Array,
    /// [out, in / group_size]
    pub scales: Array,
    /// [out, in / group_size]
    pub biases: Array,
}

impl PackedWeight {
    /// From a plain array [out, in], or [experts, out, in], of f32, bf16 or f16.
    pub fn from_float(weight: &Array) -> Result<PackedWeight> {
        if weight.rank() == 3 {
            return experts::of_slices(weight.dim(0), |one| PackedWeight::from_float(&one(weight)?));
        }
        if weight.rank() != 2 || !weight.dtype().is_float() || weight.dtype() == Dtype::F64 {
            return Err(Error::invalid("pack", format!("needs a float weight [out, in], got {weight:?}")));
        }
        let dense = weight.contiguous()?;
        dense.eval()?;
        let Operand::Host(view) = Operand::of(&dense)? else {
            return Err(Error::invalid("pack", "already packed"));
        };
        let source = backend::cpu::float_view(&view)?;
        Ok(PackedWeight::Float(with_pool(|pool| FloatWeight::pack(source, pool))?))
    }

    /// A float weight [out, in] from somewhere else, a file for example, packed as it comes: `read` writes these rows,
    /// row-major, in native byte order, and is called from several threads. It must not evaluate arrays.
    pub fn read_float<E: From<Error> + Send>(
        shape: [usize; 2],
        dtype: Dtype,
        read: impl Fn(Range<usize>, &mut [u8]) -> Result<(), E> + Sync + Send,
    ) -> Result<PackedWeight, E> {
        let float = match dtype {
            Dtype::F32 => FloatType::F32,
            Dtype::BF16 => FloatType::Bf16,
            Dtype::F16 => FloatType::F16,
            other => return Err(Error::invalid("pack", format!("no weight is of {other}")).into()),
        };
        let weight = with_pool(|pool| FloatWeight::read(pool, shape, float, read)).map_err(Error::from)??;
        Ok(PackedWeight::Float(weight))
    }

    /// A quantized weight [out, in] from somewhere else, packed as it comes: `read` writes these rows of one of MLX's
    /// three arrays, as [`PackedWeight::read_float`]'s does. Scales and biases are of `dtype`.
    pub fn read_mlx<E: From<Error> + Send>(
        shape: [usize; 2],
        bits: usize,
        group_size: usize,
        dtype: Dtype,
        read: impl Fn(Part, Range<usize>, &mut [u8]) -> Result<(), E> + Sync + Send,
    ) -> Result<PackedWeight, E> {
        let bad = |message: String| Error::invalid("quantized_weight", message);
        let spec = QuantSpec::affine(bits, group_size).map_err(|error| bad(error.to_string()))?;
        let scale = match dtype {
            Dtype::F32 => ScaleType::F32,
            Dtype::BF16 => ScaleType::Bf16,
            Dtype::F16 => ScaleType::F16,
            other => return Err(bad(format!("scales of {other}")).into()),
        };
        let weight =
            with_pool(|pool| QuantWeight::read(pool, spec, shape, scale, read)).map_err(Error::from)??;
        Ok(PackedWeight::Quant(weight))
    }

    /// From MLX's three arrays, of one weight or of experts stacked.
    pub fn from_mlx(quantized: &Quantized, bits: usize, group_size: usize) -> Result<PackedWeight> {
        let bad = |message: String| Error::invalid("quantized_weight", message);
        let spec = QuantSpec::affine(bits, group_size).map_err(|error| bad(error.to_string()))?;
        let Quantized { words, scales, biases } = quantized;
        if words.rank() == 3 && scales.rank() == 3 && biases.rank() == 3 {
            let count = words.dim(0);
            if scales.dim(0) != count || biases.dim(0) != count {
                return Err(bad(format!(
                    "of experts, {words:?}, {scales:?} and {biases:?} differ in number"
                )));
            }
            return experts::of_slices(count, |one| {
                let parts = Quantized { words: one(words)?, scales: one(scales)?, biases: one(biases)? };
                PackedWeight::from_mlx(&parts, bits, group_size)
            });
        }
        if words.rank() != 2 || words.dtype() != Dtype::U32 || words.dim(1) * 32 % bits != 0 {
            return Err(bad(format!("words should be uint32 [out, in · {bits} / 32], got {words:?}")));
        }
        let shape = [words.dim(0), words.dim(1) * 32 / bits];
        let expected = [shape[0], shape[1] / group_size];
        if scales.shape() != expected || biases.shape() != expected || scales.dtype() != biases.dtype() {
            return Err(bad(format!(
                "scales and biases should be {expected:?} of one dtype, got {scales:?}, {biases:?}"
            )));
        }
        let (scales, biases) = (scale_vec(scales)?, scale_vec(biases)?);
        let words = words.to_vec::<u32>()?;
        let packed = with_pool(|pool| {
            QuantWeight::pack(pool, spec, shape, &words, scales.as_scales(), biases.as_scales())
        })?;
        Ok(PackedWeight::Quant(packed))
    }

    /// Quantizes a plain array as MLX does, and packs it.
    pub fn quantize(weight: &Array, bits: usize, group_size: usize) -> Result<PackedWeight> {
        PackedWeight::from_mlx(&quantize(weight, bits, group_size)?, bits, group_size)
    }

    /// MLX's three arrays of a quantized weight, bit for bit as they were packed.
    pub fn to_mlx(&self) -> Result<Quantized> {
        match self {
            PackedWeight::Float(_) => Err(not_quantized()),
            PackedWeight::Quant(weight) => to_mlx(weight),
            PackedWeight::Experts(experts) => experts.to_mlx(),
        }
    }

    /// Bits and group size, if it is quantized.
    pub fn quantization(&self) -> Option<(usize, usize)> {
        match self {
            PackedWeight::Float(_) => None,
            PackedWeight::Quant(weight) => Some(format(weight)),
            PackedWeight::Experts(experts) => experts.quantization(),
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match self {
            PackedWeight::Quant(weight) => weight.bytes(),
            PackedWeight::Float(weight) => weight.bytes(),
            PackedWeight::Experts(experts) => experts.bytes(),
        }
    }

    /// [out, in], of experts [experts, out, in].
    pub fn shape(&self) -> Shape {
        match self {
            PackedWeight::Float(weight) => [weight.out(), weight.inputs()][..].into(),
            PackedWeight::Quant(weight) => weight.shape()[..].into(),
            PackedWeight::Experts(experts) => experts.shape(),
        }
    }

    /// The dtype of the logical weight: a quantized one has that of its scales.
    pub fn dtype(&self) -> Dtype {
        match self {
            PackedWeight::Float(weight) => float_dtype(weight),
            PackedWeight::Quant(weight) => scale_dtype(weight),
            PackedWeight::Experts(experts) => experts.dtype(),
        }
    }
}

fn not_quantized() -> Error {
    Error::invalid("quantized_weight", "this weight is not quantized")
}

fn format(weight: &QuantWeight) -> (usize, usize) {
    (weight.spec().bits(), weight.spec().group_size())
}

fn float_dtype(weight: &FloatWeight) -> Dtype {
    match weight.float_type() {
        FloatType::F32 => Dtype::F32,
        FloatType::Bf16 => Dtype::BF16,
        FloatType::F16 => Dtype::F16,
    }
}

fn scale_dtype(weight: &QuantWeight) -> Dtype {
    match weight.scale_type() {
        ScaleType::F32 => Dtype::F32,
        ScaleType::Bf16 => Dtype::BF16,
        ScaleType::F16 => Dtype::F16,
    }
}

fn to_mlx(weight: &QuantWeight) -> Result<Quantized> {
    let Unpacked { words, scales, biases, .. } = weight.unpack();
    let [out, inner] = weight.shape();
    let groups = [out, inner / weight.spec().group_size()];
    Ok(Quantized {
        words: Array::from_slice(&words, &[out, inner * weight.spec().bits() / 32])?,
        scales: scale_array(&scales, &groups)?,
        biases: scale_array(&biases, &groups)?,
    })
}

/// Words, scales and biases of a float array [.., in], as `mlx.core.quantize` makes them.
pub fn quantize(weight: &Array, bits: usize, group_size: usize) -> Result<Quantized> {
    let bad = |message: String| Error::invalid("quantize", message);
    let spec = QuantSpec::affine(bits, group_size).map_err(|error| bad(error.to_string()))?;
    if weight.rank() != 2 {
        return Err(bad(format!("needs two dimensions, got {weight:?}")));
    }
    let [rows, columns] = [weight.dim(0), weight.dim(1)];
    let groups = spec.groups(columns).map_err(|error| bad(error.to_string()))?;
    let mut words = vec![0u32; rows * spec.words(columns)];
    macro_rules! run {
        ($t:ty) => {{
            let values = weight.to_vec::<$t>()?;
            let zero = <$t>::from_bits(0);
            let (mut scales, mut biases) = (vec![zero; rows * groups], vec![zero; rows * groups]);
            mica_codec::affine::quantize(&values, columns, spec, &mut words, &mut scales, &mut biases)
                .map_err(|error| bad(error.to_string()))?;
            let shape = [rows, groups];
            (Array::from_slice(&scales, &shape)?, Array::from_slice(&biases, &shape)?)
        }};
    }
    let (scales, biases) = match weight.dtype() {
        Dtype::F32 => run!(f32),
        Dtype::BF16 => run!(bf16),
        Dtype::F16 => run!(f16),
        other => return Err(bad(format!("needs float32, bfloat16 or float16, got {other}"))),
    };
    Ok(Quantized { words: Array::from_slice(&words, &[rows, spec.words(columns)])?, scales, biases })
}

fn scale_vec(array: &Array) -> Result<ScaleVec> {
    Ok(match array.dtype() {
        Dtype::F32 => ScaleVec::F32(array.to_vec()?),
        Dtype::BF16 => ScaleVec::Bf16(array.to_vec()?),
        Dtype::F16 => ScaleVec::F16(array.to_vec()?),
        other => return Err(Error::invalid("quantized_weight", format!("scales of {other}"))),
    })
}

fn scale_array(values: &ScaleVec, shape: &[usize]) -> Result<Array> {
    match values.as_scales() {
        Scales::F32(values) => Array::from_slice(values, shape),
        Scales::Bf16(values) => Array::from_slice(values, shape),
        Scales::F16(values) => Array::from_slice(values, shape),
    }
}
