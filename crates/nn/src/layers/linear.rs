//! Linear maps, with adapters and packed weights.

use mica_array::quantized::QuantSpec;
use mica_array::{Array, Dtype, Error, Result, promote};

use super::quantized::pack;
use super::{LayerQuantization, QQLinear, QuantizedLinear};
use crate::{Context, Keys, Layer, Parameter, Role, init, module};

/// y = x · weightᵀ + bias, plus what an adapter adds.
#[derive(Debug, Clone)]
pub struct Linear {
    /// [out, in], plain or packed.
    pub weight: Parameter,
    /// \[out\]
    pub bias: Option<Parameter>,
    /// A low-rank addition that is trained while the weight is frozen.
    pub adapter: Option<Adapter>,
}

module!(Linear { weight, bias, adapter as "" }
    fn can_quantize(&self) -> bool {
        self.weight.packed().is_none()
    }

    fn quantize(&mut self, format: QuantSpec) -> Result<()> {
        self.weight = Parameter::new(pack(&self.weight, format)?, Role::Frozen);
        Ok(())
    }
);

/// y += scale · (x · a) · b, and DoRA's magnitude.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// [in, rank]
    pub a: Parameter,
    /// [rank, out]
    pub b: Parameter,
    /// Multiplies the product.
    pub scale: f32,
    /// Share of inputs that are zeroed while training.
    pub dropout: f32,
    /// DoRA: the length of each row of the merged weight, \[out\].
    pub magnitude: Option<Parameter>,
}

module!(Adapter { a as "lora_a", b as "lora_b", magnitude as "m" });

impl Linear {
    /// A new layer, weight and bias uniform in ±1/√in.
    pub fn new(input_dims: usize, output_dims: usize, bias: bool, keys: &mut Keys) -> Result<Linear> {
        let bound = (1.0 / input_dims as f64).sqrt();
        let weight = init::uniform(&[output_dims, input_dims], -bound, bound, Dtype::F32, keys)?;
        let bias = match bias {
            true => Some(init::uniform(&[output_dims], -bound, bound, Dtype::F32, keys)?),
            false => None,
        };
        Ok(Linear::from_arrays(weight, bias))
    }

    /// A layer of these parameters, without an adapter.
    pub fn from_arrays(weight: Array, bias: Option<Array>) -> Linear {
        Linear { weight: weight.into(), bias: bias.map(Parameter::from), adapter: None }
    }

    /// The weight with its adapter merged in, as a plain f32 array.
    pub fn merged(&self) -> Result<Array> {
        let weight = self.weight.dequantize_to(Dtype::F32)?;
        let Some(adapter) = &self.adapter else { return Ok(weight) };
        let sum = weight.add(adapter.delta()?)?;
        match &adapter.magnitude {
            None => Ok(sum),
            Some(magnitude) => {
                let norm = row_norm(&sum)?;
                sum.multiply(magnitude.astype(Dtype::F32)?.divide(norm)?.expand_dims(&[1])?)
            }
        }
    }
}

/// [.., in] → [.., out]
impl Layer for Linear {
    fn forward(&self, x: &Array, context: &Context) -> Result<Array> {
        let x = &x.astype(promote(x.dtype(), self.weight.dtype()))?;
        let base = x.linear(&self.weight, None, context.precision)?;
        let y = match &self.adapter {
            None => base,
            Some(adapter) => adapter.apply(x, &base, &self.weight, context)?,
        };
        match &self.bias {
            Some(bias) => y.add(bias.astype(y.dtype())?),
            None => Ok(y),
        }
    }

    fn has_quantized_form(&self) -> bool {
        self.weight.packed().is_none()
    }

    fn to_quantized(&self, how: LayerQuantization) -> Result<Box<dyn Layer>> {
        match how.quantize_input {
            true => Ok(Box::new(QQLinear::from_linear(self, how.format)?)),
            false => Ok(Box::new(QuantizedLinear::from_linear(self, how.format)?)),
        }
    }
}

impl Adapter {
    /// scale · (a · b)ᵀ: what is added to the weight, [out, in] f32.
    fn delta(&self) -> Result<Array> {
        let product = self.b.transpose(&[])?.matmul(&self.a.transpose(&[])?)?;
        product.astype(Dtype::F32)?.multiply(self.scale)
    }

    fn apply(&self, x: &Array, base: &Array, weight: &Array, context: &Context) -> Result<Array> {
        let dropped = context.saved(&context.dropout(x, self.dropout)?)?;
        let flat = dropped.reshape(&[-1, x.dim(-1) as i64])?;
        let (a, b) = (self.a.astype(x.dtype())?, self.b.astype(x.dtype())?);
        let low = flat.matmul_with(&a, context.precision)?.matmul_with(&b, context.precision)?;
        let y = base.add(low.multiply(self.scale)?.reshape(&shape_of(base))?)?;
        match &self.magnitude {
            None => Ok(y),
            Some(magnitude) => {
                // The norm is a constant of the step (DoRA, section 4.3).
                let merged = weight.dequantize_to(Dtype::F32)?.add(self.delta()?)?;
                let norm = row_norm(&merged)?.stop_gradient()?;
                y.multiply(magnitude.astype(Dtype::F32)?.divide(norm)?.astype(y.dtype())?)
            }
        }
    }
}

fn shape_of(array: &Array) -> Vec<i64> {
    array.shape().iter().map(|&size| size as i64).collect()
}

/// ‖row‖₂ of [out, in]: [out].
fn row_norm(weight: &Array) -> Result<Array> {
    weight.square()?.sum(&[1], false)?.sqrt()
}

/// Gives back what it gets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Identity;

module!(Identity {});

impl Layer for Identity {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        Ok(x.clone())
    }
}

/// y_o = x₂ · W_o · x₁ + b_o for two inputs.
#[derive(Debug, Clone)]
pub struct Bilinear {
    /// [out, in₂, in₁]
    pub weight: Parameter,
    /// \[out\]
    pub bias: Option<Parameter>,
}

module!(Bilinear { weight, bias });

impl Bilinear {
    /// A new layer, weight and bias uniform in ±1/√in₁.
    pub fn new(
        input1_dims: usize,
        input2_dims: usize,
        output_dims: usize,
        bias: bool,
        keys: &mut Keys,
    ) -> Result<Bilinear> {
        let bound = (1.0 / input1_dims as f64).sqrt();
        let shape = [output_dims, input2_dims, input1_dims];
        let weight = init::uniform(&shape, -bound, bound, Dtype::F32, keys)?.into();
        let bias = match bias {
            true => Some(init::uniform(&[output_dims], -bound, bound, Dtype::F32, keys)?.into()),
            false => None,
        };
        Ok(Bilinear { weight, bias })
    }

    /// [.., in₁] and [.., in₂] → [.., out]
    pub fn forward(&self, x1: &Array, x2: &Array) -> Result<Array> {
        let [out, in2, in1] = [0, 1, 2].map(|axis| self.weight.dim(axis) as i64);
        let fits = x1.rank() > 0
            && x2.rank() == x1.rank()
            && x1.dim(-1) as i64 == in1
            && x2.dim(-1) as i64 == in2
            && x1.shape()[..x1.rank() - 1] == x2.shape()[..x2.rank() - 1];
        if !fits {
            let message = format!(
                "expected inputs [.., {in1}] and [.., {in2}], got {:?}, {:?}",
                x1.shape(),
                x2.shape()
            );
            return Err(Error::Invalid { op: "Bilinear", message: message.into() });
        }
        let mut shape: Vec<i64> = shape_of(x1);
        *shape.last_mut().expect("the rank is not 0") = out;
        let inner =
            x1.reshape(&[-1, in1])?.matmul(&self.weight.reshape(&[out * in2, in1])?.transpose(&[])?)?;
        let inner = inner.reshape(&[-1, out, in2])?.swap_axes(-2, -1)?;
        let y = x2.reshape(&[-1, 1, in2])?.matmul(&inner)?.reshape(&shape)?;
        match &self.bias {
            Some(bias) => y.add(bias),
            None => Ok(y),
        }
    }
}
