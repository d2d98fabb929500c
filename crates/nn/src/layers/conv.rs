//! Convolutions over the spatial axes and their transposes: [batch, spatial.., channels].

use mica_array::{Array, Dtype, Result, conv};

use super::invalid;
use crate::{Context, Keys, Layer, Parameter, init, module};

/// Uniform in ±1/√(values that go into an output), and zeros as bias.
fn parameters(shape: &[usize], bias: bool, keys: &mut Keys) -> Result<(Parameter, Option<Parameter>)> {
    let inputs: usize = shape[1..].iter().product();
    let bound = (1.0 / inputs as f64).sqrt();
    let weight = init::uniform(shape, -bound, bound, Dtype::F32, keys)?;
    Ok((weight.into(), bias.then(|| Array::zeros(&shape[..1], Dtype::F32).into())))
}

/// [out, kernel.., in]
fn weight_shape<const D: usize>(out: usize, kernel_size: [usize; D], inputs: usize) -> Vec<usize> {
    [&[out], &kernel_size[..], &[inputs]].concat()
}

fn biased(y: Array, bias: &Option<Parameter>) -> Result<Array> {
    match bias {
        Some(bias) => y.add(bias),
        None => Ok(y),
    }
}

/// A convolution over `D` spatial axes.
#[derive(Clone, Debug)]
pub struct Conv<const D: usize> {
    /// [out, kernel.., in / groups]
    pub weight: Parameter,
    /// \[out\]
    pub bias: Option<Parameter>,
    /// Distance of neighbouring outputs; 1 at first.
    pub stride: [usize; D],
    /// Zeros on both sides; none at first.
    pub padding: [usize; D],
    /// Distance of neighbouring taps; 1 at first.
    pub dilation: [usize; D],
    /// Groups of channels that do not see each other.
    pub groups: usize,
}

/// The transpose of a convolution over `D` spatial axes.
#[derive(Clone, Debug)]
pub struct ConvTranspose<const D: usize> {
    /// [out, kernel.., in]
    pub weight: Parameter,
    /// \[out\]
    pub bias: Option<Parameter>,
    /// Distance of neighbouring inputs in the output; 1 at first.
    pub stride: [usize; D],
    /// Places cut off on both sides; none at first.
    pub padding: [usize; D],
    /// Distance of neighbouring taps; 1 at first.
    pub dilation: [usize; D],
    /// More places at the end; none at first.
    pub output_padding: [usize; D],
}

impl<const D: usize> Conv<D> {
    /// A new layer of so many groups of channels that do not see each other (1 in MLX's default).
    pub fn new(
        in_channels: usize,
        out_channels: usize,
        kernel_size: [usize; D],
        groups: usize,
        bias: bool,
        keys: &mut Keys,
    ) -> Result<Conv<D>> {
        if groups == 0 || !in_channels.is_multiple_of(groups) || !out_channels.is_multiple_of(groups) {
            let message = format!("{in_channels} and {out_channels} channels must go into {groups} groups");
            return Err(invalid("Conv", message));
        }
        let shape = weight_shape(out_channels, kernel_size, in_channels / groups);
        let (weight, bias) = parameters(&shape, bias, keys)?;
        Ok(Conv { weight, bias, stride: [1; D], padding: [0; D], dilation: [1; D], groups })
    }
}

impl<const D: usize> ConvTranspose<D> {
    /// A new layer.
    pub fn new(
        in_channels: usize,
        out_channels: usize,
        kernel_size: [usize; D],
        bias: bool,
        keys: &mut Keys,
    ) -> Result<ConvTranspose<D>> {
        let (weight, bias) = parameters(&weight_shape(out_channels, kernel_size, in_channels), bias, keys)?;
        let (ones, zeros) = ([1; D], [0; D]);
        Ok(ConvTranspose {
            weight,
            bias,
            stride: ones,
            padding: zeros,
            dilation: ones,
            output_padding: zeros,
        })
    }
}

macro_rules! dimensions {
    ($($dims:literal: $plain:ident $conv:ident, $transposed:ident $conv_transpose:ident;)*) => { $(
        #[doc = concat!("[`Conv`] over ", stringify!($dims), " spatial axes.")]
        pub type $plain = Conv<$dims>;

        #[doc = concat!("[`ConvTranspose`] over ", stringify!($dims), " spatial axes.")]
        pub type $transposed = ConvTranspose<$dims>;

        module!($plain { weight, bias });
        module!($transposed { weight, bias });

        impl Layer for $plain {
            fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
                let y =
                    conv::$conv(x, &self.weight, self.stride, self.padding, self.dilation, self.groups)?;
                biased(y, &self.bias)
            }
        }

        impl Layer for $transposed {
            fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
                let y = conv::$conv_transpose(
                    x,
                    &self.weight,
                    self.stride,
                    self.padding,
                    self.dilation,
                    self.output_padding,
                    1,
                )?;
                biased(y, &self.bias)
            }
        }
    )* };
}

dimensions! {
    1: Conv1d conv1d, ConvTranspose1d conv_transpose1d;
    2: Conv2d conv2d, ConvTranspose2d conv_transpose2d;
    3: Conv3d conv3d, ConvTranspose3d conv_transpose3d;
}
