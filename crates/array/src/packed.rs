//! Weights in a kernel's own layout.

mod experts;

use std::ops::Range;

use mica_codec::gguf::GgufBlock;
use mica_kernels::gemm::{FloatType, FloatWeight};
pub use mica_kernels::quant::Part;
use mica_kernels::quant::{QuantWeight, ScaleType, ScaleVec, Scales, Unpacked};

use crate::backend::{self, Operand};
use crate::eval::with_pool;
use crate::ops::quantized::{QuantMode, QuantSpec, QuantizedArray, quantize};
use crate::{Array, Dtype, Error, Result, Shape};

pub use experts::Experts;

/// A weight [out, in] that was repacked once, at load, for the kernels. There is one copy only: of floats and of MLX's
/// codes the original form can be had back bit for bit, of ggml's blocks the numbers.
#[derive(Debug)]
pub enum PackedWeight {
    /// f32, bf16 or f16.
    Float(FloatWeight),
    /// Quantized in groups.
    Quant(QuantWeight),
    /// Several, of which indices choose: [experts, out, in].
    Experts(Experts),
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
    /// arrays, as [`PackedWeight::read_float`]'s does. Affine scales and biases are of `dtype`; the other modes have
    /// scales of bytes and no biases.
    ///
    /// # Errors
    /// Of `read`, and if a code or scale that is a float of 8 bits is NaN.
    pub fn read_mlx<E: From<Error> + Send>(
        shape: [usize; 2],
        format: QuantSpec,
        dtype: Dtype,
        read: impl Fn(Part, Range<usize>, &mut [u8]) -> Result<(), E> + Sync + Send,
    ) -> Result<PackedWeight, E> {
        let scale = scale_type(format, dtype)?;
        let read = |part: Part, rows: Range<usize>, into: &mut [u8]| -> Result<(), E> {
            let start = rows.start * (into.len() / rows.len().max(1));
            read(part, rows, into)?;
            Ok(check_numbers(format, part, into, start)?)
        };
        let weight =
            with_pool(|pool| QuantWeight::read(pool, format, shape, scale, read)).map_err(Error::from)??;
        Ok(PackedWeight::Quant(weight))
    }

    /// From MLX's arrays, of one weight or of experts stacked.
    pub fn from_mlx(quantized: &QuantizedArray) -> Result<PackedWeight> {
        let QuantizedArray { words, scales, biases, format, global_scale } = quantized;
        if words.rank() == 3 && global_scale.is_none() {
            return experts::of_slices(words.dim(0), |one| {
                let biases = biases.as_ref().map(one).transpose()?;
                PackedWeight::from_mlx(&QuantizedArray::new(
                    one(words)?,
                    one(scales)?,
                    biases,
                    *format,
                    None,
                )?)
            });
        }
        if words.rank() != 2 || global_scale.is_some() {
            let global = if global_scale.is_some() { " and a global scale" } else { "" };
            return Err(bad(format!(
                "expected a matrix [out, in] without global scale, got words {words:?}{global}"
            )));
        }
        let shape = [words.dim(0), quantized.columns()];
        let scale = scale_type(*format, scales.dtype())?;
        let codes = words.to_vec::<u32>()?;
        let (scales, biases) =
            (scale_vec(scales, scale)?, biases.as_ref().map(|b| scale_vec(b, scale)).transpose()?);
        if let Scales::E8m0(bytes) | Scales::E4m3(bytes) = scales.as_scales() {
            check_numbers(*format, Part::Scales, bytes, 0)?;
        }
        words.with_bytes(|bytes| check_numbers(*format, Part::Words, bytes, 0))??;
        let packed = with_pool(|pool| {
            let biases = biases.as_ref().map(ScaleVec::as_scales);
            QuantWeight::pack(pool, *format, shape, &codes, scales.as_scales(), biases)
        })?;
        Ok(PackedWeight::Quant(packed))
    }

    /// Quantizes a plain array as MLX does, and packs it.
    pub fn quantize(weight: &Array, format: QuantSpec) -> Result<PackedWeight> {
        PackedWeight::from_mlx(&quantize(weight, format, None)?)
    }

    /// A weight [out, in] of ggml's blocks from somewhere else, packed as it comes: `read` writes the blocks of these
    /// rows, as [`PackedWeight::read_float`]'s does.
    ///
    /// # Errors
    /// Of `read`, and if a block's scale is NaN or infinite.
    pub fn read_gguf<E: From<Error> + Send>(
        shape: [usize; 2],
        block: GgufBlock,
        read: impl Fn(Range<usize>, &mut [u8]) -> Result<(), E> + Sync + Send,
    ) -> Result<PackedWeight, E> {
        let read = |rows: Range<usize>, into: &mut [u8]| -> Result<(), E> {
            let first = rows.start * (into.len() / block.bytes() / rows.len().max(1));
            read(rows, into)?;
            match block.first_not_finite(into) {
                None => Ok(()),
                Some(at) => {
                    let name = block.name();
                    Err(bad(format!("block {} of {name} has a scale that is NaN or infinite", first + at))
                        .into())
                }
            }
        };
        let weight =
            with_pool(|pool| QuantWeight::read_gguf(pool, block, shape, read)).map_err(Error::from)??;
        Ok(PackedWeight::Quant(weight))
    }

    /// MLX's arrays of a quantized weight: bit for bit as they were packed, or of ggml's blocks those that hold the
    /// same numbers.
    ///
    /// # Errors
    /// If MLX has no such format ([`PackedWeight::quantization`]), or a bias is too large for half precision.
    pub fn to_mlx(&self) -> Result<QuantizedArray> {
        match self {
            PackedWeight::Float(_) => Err(not_quantized()),
            PackedWeight::Quant(weight) => to_mlx(weight),
            PackedWeight::Experts(experts) => experts.to_mlx(),
        }
    }

    /// Whether it holds codes, MLX's or ggml's.
    pub fn is_quantized(&self) -> bool {
        matches!(self, PackedWeight::Quant(_) | PackedWeight::Experts(Experts::Quant(_)))
    }

    /// How it is coded, if it is quantized in a format that MLX has. Of ggml's blocks that are `Q6_K` it has none.
    pub fn quantization(&self) -> Option<QuantSpec> {
        match self {
            PackedWeight::Float(_) => None,
            PackedWeight::Quant(weight) => weight.spec(),
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

    /// The dtype of the logical weight: a quantized one has that of its scales, or bf16 where these are bytes.
    pub fn dtype(&self) -> Dtype {
        match self {
            PackedWeight::Float(weight) => float_dtype(weight),
            PackedWeight::Quant(weight) => scale_dtype(weight),
            PackedWeight::Experts(experts) => experts.dtype(),
        }
    }
}

fn not_quantized() -> Error {
    bad("this weight is not quantized".to_string())
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
        ScaleType::Bf16 | ScaleType::E8m0 | ScaleType::E4m3 => Dtype::BF16,
        ScaleType::F16 => Dtype::F16,
    }
}

fn to_mlx(weight: &QuantWeight) -> Result<QuantizedArray> {
    let (Some(Unpacked { words, scales, biases }), Some(format)) = (weight.unpack(), weight.spec()) else {
        return Err(bad("MLX has no format for groups of 16 integers: dequantize this weight".to_string()));
    };
    if let Some(ScaleVec::F16(biases)) = &biases
        && biases.iter().any(|bias| bias.is_infinite())
    {
        return Err(bad("a scale is so large that its bias is infinite as float16".to_string()));
    }
    let [out, inner] = weight.shape();
    let groups = [out, inner / format.group_size()];
    QuantizedArray::new(
        Array::from_slice(&words, &[out, format.words(inner)])?,
        scale_array(&scales, &groups)?,
        biases.map(|biases| scale_array(&biases, &groups)).transpose()?,
        format,
        None,
    )
}

/// Refuses NaN among these bytes, from element `start` on, of one of a quantized weight's arrays, if its numbers are
/// floats of 8 bits: kernels would read it as a number. Affine scales and biases are floats like others.
fn check_numbers(format: QuantSpec, part: Part, bytes: &[u8], start: usize) -> Result<()> {
    let (name, found) = match (format.mode(), part) {
        (QuantMode::Mxfp4 | QuantMode::Mxfp8, Part::Scales) => ("scales", first(bytes, |code| code == 0xff)),
        (QuantMode::Nvfp4, Part::Scales) => ("scales", first(bytes, |code| code & 0x7f == 0x7f)),
        (QuantMode::Mxfp8, Part::Words) => ("weight", first(bytes, |code| code & 0x7f == 0x7f)),
        _ => return Ok(()),
    };
    match found {
        Some(at) => Err(bad(format!("{name}: NaN, first at element {}", start + at))),
        None => Ok(()),
    }
}

/// The first of these bytes that is bad: hardly ever one, so all are looked at without branches before.
fn first(bytes: &[u8], bad: impl Fn(u8) -> bool) -> Option<usize> {
    match bytes.iter().fold(false, |any, &code| any | bad(code)) {
        true => bytes.iter().position(|&code| bad(code)),
        false => None,
    }
}

fn bad(message: String) -> Error {
    Error::invalid("quantized_weight", message)
}

/// How scales of this dtype are stored.
fn scale_type(format: QuantSpec, dtype: Dtype) -> Result<ScaleType> {
    match (format.mode(), dtype) {
        (QuantMode::Affine, Dtype::F32) => Ok(ScaleType::F32),
        (QuantMode::Affine, Dtype::BF16) => Ok(ScaleType::Bf16),
        (QuantMode::Affine, Dtype::F16) => Ok(ScaleType::F16),
        (QuantMode::Mxfp4 | QuantMode::Mxfp8, Dtype::U8) => Ok(ScaleType::E8m0),
        (QuantMode::Nvfp4, Dtype::U8) => Ok(ScaleType::E4m3),
        (mode, other) => Err(bad(format!("scales of {other} in mode {}", mode.name()))),
    }
}

fn scale_vec(array: &Array, scale: ScaleType) -> Result<ScaleVec> {
    Ok(match scale {
        ScaleType::F32 => ScaleVec::F32(array.to_vec()?),
        ScaleType::Bf16 => ScaleVec::Bf16(array.to_vec()?),
        ScaleType::F16 => ScaleVec::F16(array.to_vec()?),
        ScaleType::E8m0 => ScaleVec::E8m0(array.to_vec()?),
        ScaleType::E4m3 => ScaleVec::E4m3(array.to_vec()?),
    })
}

fn scale_array(values: &ScaleVec, shape: &[usize]) -> Result<Array> {
    match values.as_scales() {
        Scales::F32(values) => Array::from_slice(values, shape),
        Scales::Bf16(values) => Array::from_slice(values, shape),
        Scales::F16(values) => Array::from_slice(values, shape),
        Scales::E8m0(values) | Scales::E4m3(values) => Array::from_slice(values, shape),
    }
}
