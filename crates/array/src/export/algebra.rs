//! Convolutions, Fourier transforms, linear algebra and codes, from JSON that a stranger wrote.

use serde_json::Value as Json;
use smallvec::SmallVec;

use super::decode::{bad, flag, number, precision, signed_wholes, text, whole, wholes};
use crate::ops::conv::{ConvNd, convolution};
use crate::ops::fft::{FftKind, FftSpec, raw};
use crate::ops::linalg;
use crate::ops::quantized::{QuantSpec, QuantizedArray, quantize};
use crate::storage::Spec;
use crate::{Array, Dtype, Result};

/// Strides, dilations and padding of a convolution are no larger, so that sizes can be computed.
const MOST: usize = 1 << 20;

pub(super) fn build(name: &str, node: &Json, inputs: &[Array], spec: &Spec) -> Result<Vec<Array>> {
    let few = || bad(format!("got {} inputs, which is too few", inputs.len()));
    let input = |index: usize| inputs.get(index).ok_or_else(few);
    let one = |array: Array| Ok(vec![array]);
    let upper = || flag(node, "upper");
    match name {
        "conv" => one(convolution(input(0)?, input(1)?, &conv(node)?)?),
        "fft" => one(fft(FftKind::Forward, node, input(0)?, spec)?),
        "ifft" => one(fft(FftKind::Backward, node, input(0)?, spec)?),
        "rfft" => one(fft(FftKind::RealForward, node, input(0)?, spec)?),
        "irfft" => one(fft(FftKind::RealBackward, node, input(0)?, spec)?),
        "qr" => {
            let (q, r) = linalg::qr(input(0)?)?;
            Ok(vec![q, r])
        }
        "svd" if flag(node, "vectors")? => {
            let (u, s, vt) = linalg::svd(input(0)?)?;
            Ok(vec![u, s, vt])
        }
        "svd" => one(linalg::singular_values(input(0)?)?),
        "inv" => one(linalg::inv(input(0)?)?),
        "tri_inv" => one(linalg::tri_inv(input(0)?, upper()?)?),
        "cholesky" => one(linalg::cholesky(input(0)?, upper()?)?),
        "lu" => {
            let lu = linalg::lu_outputs(input(0)?)?;
            Ok((0..4).map(|output| lu.sibling(output)).collect())
        }
        "eigh" if flag(node, "vectors")? => {
            let (values, vectors) = linalg::eigh(input(0)?, upper()?)?;
            Ok(vec![values, vectors])
        }
        "eigh" => one(linalg::eigvalsh(input(0)?, upper()?)?),
        "eig" if flag(node, "vectors")? => {
            let (values, vectors) = linalg::eig(input(0)?)?;
            Ok(vec![values, vectors])
        }
        "eig" => one(linalg::eigvals(input(0)?)?),
        "det" => {
            let all = linalg::determinant("det", input(0)?)?;
            Ok((0..3).map(|output| all.sibling(output)).collect())
        }
        "hadamard_transform" => one(input(0)?.hadamard_transform(Some(number(node, "scale")? as f32))?),
        "gather_mm" => one(input(0)?.gather_mm(input(1)?, Some(input(2)?), Some(input(3)?), false)?),
        "gather_linear" => {
            let how = (precision(node)?, flag(node, "transposed")?);
            one(input(0)?.gather_linear_either(input(1)?, Some(input(2)?), Some(input(3)?), how)?)
        }
        "segmented_mm" => one(input(0)?.segmented_mm(input(1)?, input(2)?)?),
        "quantize" => {
            let codes = quantize(input(0)?, format(node)?, inputs.get(1))?;
            Ok([Some(codes.words), Some(codes.scales), codes.biases].into_iter().flatten().collect())
        }
        "dequantize" => {
            let format = format(node)?;
            let affine = format.mode().micro().is_none();
            let biases = if affine { Some(input(2)?.clone()) } else { None };
            let global = inputs.get(2 + affine as usize).cloned();
            let codes = QuantizedArray::new(input(0)?.clone(), input(1)?.clone(), biases, format, global)?;
            one(codes.dequantize(Some(spec.dtype))?)
        }
        "to_fp8" => one(input(0)?.to_fp8()?),
        "from_fp8" => one(input(0)?.from_fp8(spec.dtype)?),
        _ => Err(bad("there is no op of this name")),
    }
}

fn format(node: &Json) -> Result<QuantSpec> {
    Ok(QuantSpec::new(whole(node, "bits")?, whole(node, "group_size")?, text(node, "mode")?.parse()?)?)
}

fn conv(node: &Json) -> Result<ConvNd> {
    let bounded = |key: &str| -> Result<SmallVec<[usize; 3]>> {
        let numbers = wholes(node, key)?;
        match numbers.iter().all(|&number| number <= MOST) {
            true => Ok(numbers.into_iter().collect()),
            false => Err(bad(format!("{key:?} has an entry above {MOST}"))),
        }
    };
    let padding = |key: &str| -> Result<SmallVec<[isize; 3]>> {
        let numbers = signed_wholes(node, key)?;
        match numbers.iter().all(|number| number.unsigned_abs() <= MOST) {
            true => Ok(numbers.into_iter().collect()),
            false => Err(bad(format!("{key:?} has an entry above {MOST}"))),
        }
    };
    Ok(ConvNd {
        stride: bounded("stride")?,
        low: padding("low")?,
        high: padding("high")?,
        kernel_dilation: bounded("kernel_dilation")?,
        input_dilation: bounded("input_dilation")?,
        groups: whole(node, "groups")?,
        flip: flag(node, "flip")?,
    })
}

fn fft(kind: FftKind, node: &Json, x: &Array, spec: &Spec) -> Result<Array> {
    let axis = whole(node, "axis")?;
    let dtype = if kind == FftKind::RealForward { Dtype::F32 } else { Dtype::C64 };
    let sizes = x.shape().get(axis).zip(spec.shape.get(axis));
    let Some((&from, &to)) = sizes.filter(|_| x.dtype() == dtype) else {
        return Err(bad(format!("needs {dtype} with an axis {axis}, got {x:?}")));
    };
    // The length of a signal, which half a spectrum does not tell.
    let n = if kind == FftKind::RealBackward { to } else { from };
    if n == 0 || (kind == FftKind::RealBackward && from != n / 2 + 1) {
        return Err(bad(format!("{from} values along axis {axis} are no signal of length {n}")));
    }
    raw(x, FftSpec { kind, axis, scale: number(node, "scale")? as f32 }, n)
}
