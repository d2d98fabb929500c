//! Weights of which indices choose: those of experts.

use mica_kernels::gemm::FloatExperts;
use mica_kernels::quant::QuantExperts;

use super::PackedWeight;
use crate::ops::quantized::{QuantSpec, QuantizedArray};
use crate::{Array, Dtype, Error, Result, Shape};

/// Weights [out, in] of one shape, dtype and format, each packed for itself: [experts, out, in].
#[derive(Debug)]
pub enum Experts {
    /// f32, bf16 or f16.
    Float(FloatExperts),
    /// Quantized in groups.
    Quant(QuantExperts),
}

impl Experts {
    fn new(weights: Vec<PackedWeight>) -> Result<Experts> {
        let (mut floats, mut quants) = (Vec::new(), Vec::new());
        let count = weights.len();
        for weight in weights {
            match weight {
                PackedWeight::Float(weight) => floats.push(weight),
                PackedWeight::Quant(weight) => quants.push(weight),
                PackedWeight::Experts(_) => return Err(Error::invalid("experts", "an expert is one weight")),
            }
        }
        if floats.len() == count && count > 0 {
            Ok(Experts::Float(FloatExperts::new(floats)?))
        } else if quants.len() == count && count > 0 {
            Ok(Experts::Quant(QuantExperts::new(quants)?))
        } else {
            let message = format!(
                "needs weights of one kind, at least one: {} of floats, {} quantized",
                floats.len(),
                quants.len()
            );
            Err(Error::invalid("experts", message))
        }
    }

    /// [experts, out, in]
    pub fn shape(&self) -> Shape {
        match self {
            Experts::Float(experts) => experts.shape()[..].into(),
            Experts::Quant(experts) => experts.shape()[..].into(),
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Experts::Float(experts) => experts.weights().iter().map(|weight| weight.bytes()).sum(),
            Experts::Quant(experts) => experts.weights().iter().map(|weight| weight.bytes()).sum(),
        }
    }

    pub(super) fn dtype(&self) -> Dtype {
        match self {
            Experts::Float(experts) => super::float_dtype(&experts.weights()[0]),
            Experts::Quant(experts) => super::scale_dtype(&experts.weights()[0]),
        }
    }

    pub(super) fn quantization(&self) -> Option<QuantSpec> {
        match self {
            Experts::Float(_) => None,
            Experts::Quant(experts) => experts.weights()[0].spec(),
        }
    }

    pub(super) fn to_mlx(&self) -> Result<QuantizedArray> {
        let Experts::Quant(experts) = self else { return Err(super::not_quantized()) };
        let each = experts.weights().iter().map(super::to_mlx).collect::<Result<Vec<_>>>()?;
        let stack = |part: fn(&QuantizedArray) -> Option<&Array>| -> Result<Option<Array>> {
            let parts: Option<Vec<Array>> = each.iter().map(|codes| part(codes).cloned()).collect();
            parts.map(|parts| Array::stack(&parts, 0)).transpose()
        };
        let (words, scales) = (stack(|codes| Some(&codes.words))?, stack(|codes| Some(&codes.scales))?);
        let (Some(words), Some(scales)) = (words, scales) else { return Err(super::not_quantized()) };
        QuantizedArray::new(words, scales, stack(|codes| codes.biases.as_ref())?, each[0].format, None)
    }
}

impl PackedWeight {
    /// Weights of one shape, dtype and format as the experts of a layer, [experts, out, in], for
    /// [`Array::gather_linear`].
    pub fn experts(weights: Vec<PackedWeight>) -> Result<PackedWeight> {
        Ok(PackedWeight::Experts(Experts::new(weights)?))
    }
}

/// A weight made of each of the first dimension's slices.
pub(super) fn of_slices(
    count: usize,
    pack: impl Fn(&dyn Fn(&Array) -> Result<Array>) -> Result<PackedWeight>,
) -> Result<PackedWeight> {
    let one = |expert: usize| pack(&|stacked: &Array| stacked.narrow(0, expert, expert + 1)?.squeeze(&[0]));
    PackedWeight::experts((0..count).map(one).collect::<Result<_>>()?)
}
