//! Quantized arrays as MLX lays them out: words, scales and biases in arrays of their own; and fp8.
//!
//! These are for computing with such arrays anywhere. Weights of a model are repacked once for the
//! kernels instead: [`crate::PackedWeight`].

use smallvec::smallvec;

pub use mica_codec::{QuantMode, QuantSpec};

use super::products::matrix_indices;
use super::{Grads, Jvp, Tangents, Vjp};
use crate::dtype::promote;
use crate::node::Inputs;
use crate::op::{Op, first_failure};
use crate::shape::Shape;
use crate::storage::Spec;
use crate::transforms::custom_function;
use crate::{Array, Dtype, Error, Result};

/// Conversions between numbers and the formats of quantized weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodecOp {
    /// Inputs w, (global scale); outputs words, scales, (biases).
    Quantize(QuantSpec),
    /// Inputs words, scales, (biases), (global scale); output values.
    Dequantize(QuantSpec),
    /// Floats as e4m3 in u8.
    ToFp8,
    /// e4m3 in u8 as floats.
    FromFp8,
}

impl CodecOp {
    /// The name in messages and profiles.
    pub fn name(self) -> &'static str {
        match self {
            CodecOp::Quantize(_) => "quantize",
            CodecOp::Dequantize(_) => "dequantize",
            CodecOp::ToFp8 => "to_fp8",
            CodecOp::FromFp8 => "from_fp8",
        }
    }
}

/// A quantized array in MLX's layout.
#[derive(Clone, Debug)]
pub struct QuantizedArray {
    /// u32 [.., values · bits / 32]
    pub words: Array,
    /// [.., values / group size]: the source's dtype if affine, else u8.
    pub scales: Array,
    /// As the scales; affine only.
    pub biases: Option<Array>,
    /// What the bits mean.
    pub format: QuantSpec,
    /// One f32 for the whole array, of `nvfp4` only.
    pub global_scale: Option<Array>,
}

fn check_global(op: &'static str, format: QuantSpec, global: Option<&Array>) -> Result<()> {
    match global {
        Some(_) if format.mode() != QuantMode::Nvfp4 => {
            Err(Error::invalid(op, format!("only nvfp4 has a global scale, got one for {:?}", format.mode())))
        }
        Some(scale) if scale.size() != 1 || scale.dtype() != Dtype::F32 => {
            Err(Error::invalid(op, format!("a global scale is one float32, got {scale:?}")))
        }
        _ => Ok(()),
    }
}

/// Quantizes the last axis of `w` [.., values]. `global_scale` is the largest magnitude of the whole
/// array, for `nvfp4`.
pub fn quantize(w: &Array, format: QuantSpec, global_scale: Option<&Array>) -> Result<QuantizedArray> {
    const NAME: &str = "quantize";
    first_failure(&[w])?;
    check_global(NAME, format, global_scale)?;
    if !matches!(w.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(Error::dtype(NAME, "float32, float16 or bfloat16", w.dtype()));
    }
    if w.rank() < 2 || !w.dim(-1).is_multiple_of(format.group_size()) {
        return Err(Error::invalid(
            NAME,
            format!(
                "needs two dimensions or more, the last divisible by the group size {}, got {:?}",
                format.group_size(),
                w.shape()
            ),
        ));
    }
    let last = |size: usize| -> Shape {
        let mut shape: Shape = w.shape().into();
        *shape.last_mut().expect("two dimensions or more") = size;
        shape
    };
    let groups = last(w.dim(-1) / format.group_size());
    let affine = format.mode() == QuantMode::Affine;
    let mut specs = vec![
        Spec::new(last(w.dim(-1) * format.bits() / 32), Dtype::U32),
        Spec::new(groups.clone(), if affine { w.dtype() } else { Dtype::U8 }),
    ];
    if affine {
        specs.push(Spec::new(groups, w.dtype()));
    }
    let mut inputs: Inputs = smallvec![w.contiguous()?];
    inputs.extend(global_scale.cloned());
    let words = Array::lazy_many(Op::Codec(CodecOp::Quantize(format)), inputs, specs);
    Ok(QuantizedArray {
        scales: words.sibling(1),
        biases: affine.then(|| words.sibling(2)),
        words,
        format,
        global_scale: global_scale.cloned(),
    })
}

impl QuantizedArray {
    /// Checked parts.
    pub fn new(
        words: Array,
        scales: Array,
        biases: Option<Array>,
        format: QuantSpec,
        global_scale: Option<Array>,
    ) -> Result<QuantizedArray> {
        const NAME: &str = "quantized";
        first_failure(&[&words, &scales])?;
        check_global(NAME, format, global_scale.as_ref())?;
        let bad = |message: String| Err(Error::invalid(NAME, message));
        if words.dtype() != Dtype::U32
            || words.rank() == 0
            || !(words.dim(-1) * 32).is_multiple_of(format.bits())
        {
            return bad(format!(
                "words should be uint32 [.., values · {} / 32], got {words:?}",
                format.bits()
            ));
        }
        let mut expected: Shape = words.shape().into();
        let values = words.dim(-1) * 32 / format.bits();
        *expected.last_mut().expect("rank is not 0") = values / format.group_size();
        if scales.shape() != expected.as_slice() || !values.is_multiple_of(format.group_size()) {
            return bad(format!(
                "scales should have the shape {expected:?} for words {words:?}, got {scales:?}"
            ));
        }
        match (&biases, format.mode()) {
            (Some(biases), QuantMode::Affine)
                if biases.shape() == scales.shape()
                    && biases.dtype() == scales.dtype()
                    && matches!(scales.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) => {}
            (_, QuantMode::Affine) => {
                return bad(format!(
                    "affine needs scales and biases of one shape and float dtype, got {scales:?} and {biases:?}"
                ));
            }
            (None, _) if scales.dtype() == Dtype::U8 => {}
            _ => return bad(format!("{:?} needs uint8 scales and no biases, got {scales:?}", format.mode())),
        }
        Ok(QuantizedArray { words, scales, biases, format, global_scale })
    }

    /// Values of the last axis.
    pub fn columns(&self) -> usize {
        self.words.dim(-1) * 32 / self.format.bits()
    }

    /// The values, in `dtype`, or in that of the scales (bfloat16 where these are bytes).
    pub fn dequantize(&self, dtype: Option<Dtype>) -> Result<Array> {
        let natural = if self.biases.is_some() { self.scales.dtype() } else { Dtype::BF16 };
        let dtype = dtype.unwrap_or(natural);
        if !dtype.is_float() {
            return Err(Error::dtype("dequantize", "a float dtype", dtype));
        }
        // Affine values are rounded to the scales' dtype; the others are exact in f32.
        let computed = if self.biases.is_some() || dtype != Dtype::F64 {
            if self.biases.is_some() { natural } else { dtype }
        } else {
            Dtype::F32
        };
        let mut shape: Shape = self.words.shape().into();
        *shape.last_mut().expect("checked") = self.columns();
        let mut inputs: Inputs = smallvec![self.words.contiguous()?, self.scales.contiguous()?];
        if let Some(biases) = &self.biases {
            inputs.push(biases.contiguous()?);
        }
        inputs.extend(self.global_scale.clone());
        Array::lazy(Op::Codec(CodecOp::Dequantize(self.format)), inputs, shape, computed).astype(dtype)
    }

    /// Every part taken by flat indices over the leading dimensions.
    fn take(&self, indices: &Array) -> Result<QuantizedArray> {
        let take = |array: &Array| {
            array.reshape(&[-1, array.dim(-2) as i64, array.dim(-1) as i64])?.take(indices, 0)
        };
        Ok(QuantizedArray {
            words: take(&self.words)?,
            scales: take(&self.scales)?,
            biases: self.biases.as_ref().map(take).transpose()?,
            ..self.clone()
        })
    }

    /// The dtype of a product with `x`.
    fn product_dtype(&self, x: &Array) -> Dtype {
        match &self.biases {
            Some(_) => promote(x.dtype(), self.scales.dtype()),
            None if x.dtype().is_float() => x.dtype(),
            None => Dtype::F32,
        }
    }

    fn check_product(&self, op: &'static str, x: &Array, transpose: bool) -> Result<()> {
        first_failure(&[x])?;
        if x.dtype() == Dtype::C64 || x.rank() == 0 || self.words.rank() < 2 {
            return Err(Error::invalid(
                op,
                format!("needs a real array and a quantized matrix, got {x:?} and {:?}", self.words),
            ));
        }
        let inner = if transpose { self.columns() } else { self.words.dim(-2) };
        if x.dim(-1) != inner {
            return Err(Error::invalid(
                op,
                format!(
                    "the last dimension of {:?} should be {inner}, that of a quantized [{}, {}] ({})",
                    x.shape(),
                    self.words.dim(-2),
                    self.columns(),
                    if transpose { "transposed" } else { "not transposed" }
                ),
            ));
        }
        Ok(())
    }
}

fn turned(w: Array, transpose: bool) -> Result<Array> {
    if transpose { w.swap_axes(-1, -2) } else { Ok(w) }
}

/// x · wᵀ (or x · w) with a quantized w.
pub fn quantized_matmul(x: &Array, w: &QuantizedArray, transpose: bool) -> Result<Array> {
    w.check_product("quantized_matmul", x, transpose)?;
    let dtype = w.product_dtype(x);
    x.astype(dtype)?.matmul(&turned(w.dequantize(Some(dtype))?, transpose)?)
}

/// Products of the matrices that flat indices over leading dimensions name, with quantized ones on the
/// right: [`Array::gather_mm`].
pub fn gather_qmm(
    x: &Array,
    w: &QuantizedArray,
    lhs_indices: Option<&Array>,
    rhs_indices: Option<&Array>,
    transpose: bool,
    sorted_indices: bool,
) -> Result<Array> {
    const NAME: &str = "gather_qmm";
    if lhs_indices.is_none() && rhs_indices.is_none() {
        return quantized_matmul(x, w, transpose);
    }
    w.check_product(NAME, x, transpose)?;
    let dtype = w.product_dtype(x);
    let right = matrix_indices(NAME, &w.words, rhs_indices)?;
    let there: usize = w.words.shape()[..w.words.rank() - 2].iter().product();
    if right.size() >= there {
        let all = turned(w.dequantize(Some(dtype))?, transpose)?;
        return x.astype(dtype)?.gather_mm(&all, lhs_indices, Some(&right), sorted_indices);
    }
    // Fewer are asked for than there are: only these are unpacked.
    let chosen = turned(w.take(&right.flatten()?)?.dequantize(Some(dtype))?, transpose)?;
    let shape: Vec<i64> = right.shape().iter().map(|&size| size as i64).collect();
    let places = Array::arange(0.0, right.size() as f64, 1.0, Dtype::U32)?.reshape(&shape)?;
    x.astype(dtype)?.gather_mm(&chosen, lhs_indices, Some(&places), sorted_indices)
}

/// Whether both sides of a product may have this format.
fn check_both(op: &'static str, format: QuantSpec) -> Result<()> {
    match format.mode() {
        QuantMode::Nvfp4 | QuantMode::Mxfp8 => Ok(()),
        mode => Err(Error::invalid(op, format!("mode should be nvfp4 or mxfp8, got {mode:?}"))),
    }
}

/// Rounded to the numbers that codes can hold.
fn rounded(x: &Array, format: QuantSpec, global_scale: Option<&Array>, dtype: Dtype) -> Result<Array> {
    quantize(&x.astype(dtype)?, format, global_scale)?.dequantize(Some(dtype))
}

/// x · wᵀ with both sides quantized, x on the way. `global_scale_x`, for `nvfp4`, goes with a global
/// scale of `w`. There is no gradient: [`qqmm_floats`] has one.
pub fn qqmm(x: &Array, w: &QuantizedArray, global_scale_x: Option<&Array>) -> Result<Array> {
    const NAME: &str = "qqmm";
    check_both(NAME, w.format)?;
    w.check_product(NAME, x, true)?;
    if w.words.rank() != 2 || global_scale_x.is_some() != w.global_scale.is_some() {
        return Err(Error::invalid(
            NAME,
            format!(
                "needs a quantized matrix and either both global scales or none, got {:?}, {:?}, {global_scale_x:?}",
                w.words, w.global_scale
            ),
        ));
    }
    let dtype = w.product_dtype(x);
    let rows = if x.rank() == 1 { x.expand_dims(&[0])? } else { x.clone() };
    let rows = rounded(&rows, w.format, global_scale_x, dtype)?;
    let product = rows.matmul(&turned(w.dequantize(Some(dtype))?, true)?)?;
    if x.rank() == 1 { product.squeeze(&[0]) } else { Ok(product) }
}

/// [`qqmm`] of floats [.., k] and [n, k], both quantized on the way. `global_scales`, for `nvfp4`,
/// are those of `x` and `w`.
///
/// The gradients are such products too, ct · w and ctᵀ · x: for that of `x`, n must fit the group
/// size, for that of `w`, the number of rows.
pub fn qqmm_floats(
    x: &Array,
    w: &Array,
    format: QuantSpec,
    global_scales: Option<[&Array; 2]>,
) -> Result<Array> {
    const NAME: &str = "qqmm";
    check_both(NAME, format)?;
    first_failure(&[x, w])?;
    if x.rank() == 0 || w.rank() != 2 || !x.dtype().is_float() || x.dim(-1) != w.dim(-1) {
        return Err(Error::invalid(NAME, format!("needs floats [.., k] and [n, k], got {x:?} and {w:?}")));
    }
    let product = move |x: &Array, w: &Array, scales: Option<[&Array; 2]>| {
        qqmm(x, &quantize(w, format, scales.map(|scales| scales[1]))?, scales.map(|scales| scales[0]))
    };
    let scales = |given: &[Array]| match given {
        [_, _, x, w] => Some([x.clone(), w.clone()]),
        _ => None,
    };
    let with = move |x: &Array, w: &Array, scales: Option<[Array; 2]>| {
        product(x, w, scales.as_ref().map(|[x, w]| [x, w]))
    };
    let function = custom_function(move |x| Ok(vec![with(&x[0], &x[1], scales(x))?]))
        .named(NAME)
        .with_jvp(|_, _| Err(Error::unsupported(NAME, "has no tangents (it has none in MLX either)")))
        .with_vjp(move |primals, cotangents, _| {
            let (x, w, ct) = (&primals[0], &primals[1], &cotangents[0]);
            let flat = |array: &Array| array.reshape(&[-1, array.dim(-1) as i64]);
            let (rows, ct) = (flat(x)?, flat(ct)?);
            let largest = |of: &Array| ct.abs()?.max(&[], false)?.astype(of.dtype());
            let (for_x, for_w) = match scales(primals) {
                Some([x, w]) => (Some([largest(&x)?, w]), Some([largest(&x)?, x])),
                None => (None, None),
            };
            let shape: Vec<i64> = x.shape().iter().map(|&size| size as i64).collect();
            let mut grads = vec![
                with(&ct, &w.transpose(&[])?, for_x)?.reshape(&shape)?.astype(x.dtype())?,
                with(&ct.transpose(&[])?, &rows.transpose(&[])?, for_w)?.astype(w.dtype())?,
            ];
            grads.extend(primals[2..].iter().map(Array::zeros_like));
            Ok(grads)
        });
    let mut inputs = vec![x.clone(), w.clone()];
    inputs.extend(global_scales.into_iter().flatten().cloned());
    Ok(function.call(&inputs)?.remove(0))
}

/// [`qqmm`] of the matrices that flat indices over leading dimensions name, as [`gather_qmm`].
///
/// `global_scales`, for `nvfp4`, are one for all of `x`, and one per matrix of `w`.
pub fn gather_qqmm(
    x: &Array,
    w: &QuantizedArray,
    lhs_indices: Option<&Array>,
    rhs_indices: Option<&Array>,
    global_scales: Option<[&Array; 2]>,
    sorted_indices: bool,
) -> Result<Array> {
    const NAME: &str = "gather_qqmm";
    check_both(NAME, w.format)?;
    w.check_product(NAME, x, true)?;
    let dtype = w.product_dtype(x);
    let x = rounded(x, w.format, global_scales.map(|scales| scales[0]), dtype)?;
    let Some([_, scales]) = global_scales else {
        return gather_qmm(&x, w, lhs_indices, rhs_indices, true, sorted_indices);
    };
    let matrices: usize = w.words.shape()[..w.words.rank() - 2].iter().product();
    if scales.size() != matrices || w.global_scale.is_some() || matrices == 0 {
        return Err(Error::invalid(
            NAME,
            format!("needs a global scale per matrix of {:?} and none within, got {scales:?}", w.words),
        ));
    }
    let scales = scales.flatten()?;
    let each = (0..matrices)
        .map(|index| {
            let place = Array::full(&[], index as f64, Dtype::U32);
            let one = QuantizedArray {
                global_scale: Some(scales.take(&place, 0)?.contiguous()?),
                ..w.take(&place)?
            };
            check_global(NAME, one.format, one.global_scale.as_ref())?;
            one.dequantize(Some(dtype))
        })
        .collect::<Result<Vec<Array>>>()?;
    let values = Array::stack(&each, 0)?;
    let right = matrix_indices(NAME, &w.words, rhs_indices)?;
    x.gather_mm(&turned(values, true)?, lhs_indices, Some(&right), sorted_indices)
}

impl Array {
    /// The nearest e4m3 numbers in u8; beyond ±448 the largest.
    pub fn to_fp8(&self) -> Result<Array> {
        first_failure(&[self])?;
        if !self.dtype().is_float() {
            return Err(Error::dtype("to_fp8", "a real float dtype", self.dtype()));
        }
        let inputs = smallvec![self.astype(Dtype::F32)?.contiguous()?];
        Ok(Array::lazy(Op::Codec(CodecOp::ToFp8), inputs, self.shape(), Dtype::U8))
    }

    /// Numbers of e4m3 codes in u8.
    pub fn from_fp8(&self, dtype: Dtype) -> Result<Array> {
        first_failure(&[self])?;
        if self.dtype() != Dtype::U8 || !dtype.is_float() {
            return Err(Error::invalid(
                "from_fp8",
                format!("needs uint8 and a float dtype, got {self:?}, {dtype}"),
            ));
        }
        Array::lazy(Op::Codec(CodecOp::FromFp8), smallvec![self.contiguous()?], self.shape(), Dtype::F32)
            .astype(dtype)
    }
}

/// Of affine scales and biases: value = code · scale + bias.
pub(crate) fn codec_vjp(op: CodecOp, rule: &Vjp) -> Result<Grads> {
    let CodecOp::Dequantize(format) = op else {
        return Err(Error::unsupported(op.name(), "this conversion has no gradient"));
    };
    let mut grads = rule.none()?;
    let [words, scales, biases] = rule.inputs else {
        return Err(Error::unsupported(op.name(), "scales of micro-scaled formats have no gradient"));
    };
    let ct = rule.cotangent();
    let mut grouped: Vec<i64> = scales.shape().iter().map(|&size| size as i64).collect();
    grouped.push(format.group_size() as i64);
    if rule.needs[1] {
        let codes = QuantizedArray {
            words: words.clone(),
            scales: scales.ones_like(),
            biases: Some(biases.zeros_like()),
            format,
            global_scale: None,
        };
        let weighted = ct.multiply(codes.dequantize(Some(ct.dtype()))?)?;
        grads[1] = Some(weighted.reshape(&grouped)?.sum(&[-1], false)?);
    }
    if rule.needs[2] {
        grads[2] = Some(ct.reshape(&grouped)?.sum(&[-1], false)?);
    }
    Ok(grads)
}

/// Affine values are linear in scales and biases.
pub(crate) fn codec_jvp(op: CodecOp, rule: &Jvp) -> Result<Tangents> {
    let (CodecOp::Dequantize(format), [words, scales, _]) = (op, rule.inputs) else {
        return Err(Error::unsupported(op.name(), "this conversion has no tangent"));
    };
    let part = |scales: Array, biases: Array| {
        let array =
            QuantizedArray { words: words.clone(), scales, biases: Some(biases), format, global_scale: None };
        array.dequantize(Some(rule.output.dtype()))
    };
    let zeros = scales.zeros_like();
    rule.sum(|at, tangent| match at {
        1 => part(tangent.clone(), zeros.clone()),
        _ => part(zeros.clone(), tangent.clone()),
    })
}
