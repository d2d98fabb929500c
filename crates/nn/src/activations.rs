//! Activation functions, and each as a layer.
//!
//! Functions of several steps and no settings are compiled: one pass over memory forward, one
//! backward, nothing kept between but the input. The others become so inside a compiled function.

use std::sync::LazyLock;

use mica_array::transforms::{Compiled, compile};
use mica_array::{Array, Dtype, Error, Operand, Result};

use crate::{Context, Layer, Parameter, module};

type Fused = Compiled<fn(&[Array]) -> Result<Vec<Array>>>;

/// A function that is traced once in a process, for all sizes.
macro_rules! fused {
    ($x:ident, |$input:ident| $body:expr) => {{
        static FUSED: LazyLock<Fused> = LazyLock::new(|| {
            fn body($input: &Array) -> Result<Array> {
                $body
            }
            let f: fn(&[Array]) -> Result<Vec<Array>> = |inputs| Ok(vec![body(&inputs[0])?]);
            compile(f).shapeless()
        });
        let outputs = FUSED.call(std::slice::from_ref($x))?;
        Ok(outputs.into_iter().next().expect("an activation is one array"))
    }};
}

/// 1 / (1 + e⁻ˣ)
pub fn sigmoid(x: &Array) -> Result<Array> {
    x.sigmoid()
}

/// max(x, 0)
pub fn relu(x: &Array) -> Result<Array> {
    x.maximum(0)
}

/// max(x, 0)²
pub fn relu2(x: &Array) -> Result<Array> {
    fused!(x, |x| x.maximum(0)?.square())
}

/// min(max(x, 0), 6)
pub fn relu6(x: &Array) -> Result<Array> {
    fused!(x, |x| x.maximum(0)?.minimum(6.0))
}

/// max(slope · x, x); MLX's default slope is 0.01.
pub fn leaky_relu(x: &Array, negative_slope: f64) -> Result<Array> {
    x.multiply(negative_slope)?.maximum(x)
}

/// log(softmax(x)) along an axis.
pub fn log_softmax(x: &Array, axis: i32) -> Result<Array> {
    let x = x.subtract(x.max(&[axis], true)?.stop_gradient()?)?;
    x.subtract(x.logsumexp(axis, true)?)
}

/// x above 0, alpha · (eˣ − 1) below; MLX's default alpha is 1.
pub fn elu(x: &Array, alpha: f64) -> Result<Array> {
    let below = x.exp()?.subtract(1)?.multiply(alpha)?;
    Array::select(&x.greater(0)?, x, below)
}

/// eˣ / Σ eˣ along an axis.
pub fn softmax(x: &Array, axis: i32) -> Result<Array> {
    x.softmax(axis)
}

/// softmax(−x) along an axis.
pub fn softmin(x: &Array, axis: i32) -> Result<Array> {
    x.negative()?.softmax(axis)
}

/// log(1 + eˣ)
pub fn softplus(x: &Array) -> Result<Array> {
    x.softplus()
}

/// x / (1 + |x|)
pub fn softsign(x: &Array) -> Result<Array> {
    fused!(x, |x| x.divide(x.abs()?.add(1)?))
}

/// x moved towards 0 by lambda, 0 within; MLX's default lambda is 0.5.
pub fn softshrink(x: &Array, lambda: f64) -> Result<Array> {
    let moved = x.subtract(x.sign()?.multiply(lambda)?)?;
    Array::select(&x.abs()?.greater(lambda)?, &moved, 0)
}

/// max(x, 0) + alpha · (e^(min(x, 0) / alpha) − 1); MLX's default alpha is 1.
pub fn celu(x: &Array, alpha: f64) -> Result<Array> {
    let below = x.minimum(0.0)?.divide(alpha)?.exp()?.subtract(1)?.multiply(alpha)?;
    x.maximum(0.0)?.add(below)
}

/// x · sigmoid(x), also called swish.
pub fn silu(x: &Array) -> Result<Array> {
    x.silu()
}

/// log(sigmoid(x))
pub fn log_sigmoid(x: &Array) -> Result<Array> {
    fused!(x, |x| x.negative()?.softplus()?.negative())
}

/// x · Φ(x) with the normal distribution Φ.
pub fn gelu(x: &Array) -> Result<Array> {
    x.gelu()
}

/// [`gelu`] by tanh.
pub fn gelu_approx(x: &Array) -> Result<Array> {
    x.gelu_tanh()
}

/// [`gelu`] as x · sigmoid(1.702 · x).
pub fn gelu_fast_approx(x: &Array) -> Result<Array> {
    fused!(x, |x| x.multiply(x.multiply(1.702)?.sigmoid()?))
}

/// The first half of an axis times the sigmoid of the second.
pub fn glu(x: &Array, axis: i32) -> Result<Array> {
    if axis < -(x.rank() as i32) || axis >= x.rank() as i32 {
        let message = format!("there is no axis {axis} in {:?}", x.shape());
        return Err(Error::Invalid { op: "glu", message: message.into() });
    }
    let half = x.dim(axis) / 2;
    let parts = x.split_sizes(&[half, half], axis)?;
    parts[0].multiply(parts[1].sigmoid()?)
}

/// 1 from the threshold up, 0 below; MLX's default threshold is 0. The result is int32.
pub fn step(x: &Array, threshold: f64) -> Result<Array> {
    let one = 1i32.operand(Dtype::I32);
    Array::select(&x.greater_equal(threshold)?, &one, 0)
}

/// 1.0507 · elu(x, 1.67326)
pub fn selu(x: &Array) -> Result<Array> {
    fused!(x, |x| elu(x, 1.67326)?.multiply(1.0507))
}

/// max(x, 0) + alpha · min(x, 0) with a learned alpha.
pub fn prelu(x: &Array, alpha: &Array) -> Result<Array> {
    // The gradient at 0 goes to the second operand, as in MLX.
    let zero = Array::full(&[], 0.0, x.dtype());
    zero.maximum(x)?.add(alpha.multiply(zero.minimum(x)?)?)
}

/// x · tanh(softplus(x))
pub fn mish(x: &Array) -> Result<Array> {
    fused!(x, |x| x.multiply(x.softplus()?.tanh()?))
}

/// x · min(max(x + 3, 0), 6) / 6
pub fn hardswish(x: &Array) -> Result<Array> {
    fused!(x, |x| x.multiply(x.add(3)?.maximum(0)?.minimum(6)?)?.divide(6))
}

/// x within [min, max]; MLX's defaults are −1 and 1.
pub fn hard_tanh(x: &Array, min: f64, max: f64) -> Result<Array> {
    x.maximum(min)?.minimum(max)
}

/// x outside ±lambda, 0 within; MLX's default lambda is 0.5.
pub fn hard_shrink(x: &Array, lambda: f64) -> Result<Array> {
    Array::select(&x.abs()?.greater(lambda)?, x, 0)
}

/// Hyperbolic tangent.
pub fn tanh(x: &Array) -> Result<Array> {
    x.tanh()
}

macro_rules! plain_layers {
    ($($name:ident => $f:path;)*) => { $(
        #[doc = concat!("[`", stringify!($f), "`] as a layer.")]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $name;

        module!($name {});

        impl Layer for $name {
            fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
                $f(x)
            }
        }
    )* };
}

plain_layers! {
    Sigmoid => sigmoid;
    Relu => relu;
    Relu2 => relu2;
    Relu6 => relu6;
    Softplus => softplus;
    Softsign => softsign;
    Silu => silu;
    LogSigmoid => log_sigmoid;
    Selu => selu;
    Mish => mish;
    Hardswish => hardswish;
    Tanh => tanh;
}

macro_rules! set_layers {
    ($($name:ident { $($field:ident: $type:ty = $default:expr),* } => $f:path;)*) => { $(
        #[doc = concat!("[`", stringify!($f), "`] as a layer; the default is MLX's.")]
        #[derive(Clone, Copy, Debug)]
        #[allow(missing_docs)] // named as the function's
        pub struct $name {
            $(pub $field: $type,)*
        }

        module!($name {});

        impl Default for $name {
            fn default() -> $name {
                $name { $($field: $default),* }
            }
        }

        impl Layer for $name {
            fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
                $f(x, $(self.$field),*)
            }
        }
    )* };
}

set_layers! {
    LeakyRelu { negative_slope: f64 = 0.01 } => leaky_relu;
    LogSoftmax { axis: i32 = -1 } => log_softmax;
    Elu { alpha: f64 = 1.0 } => elu;
    Softmax { axis: i32 = -1 } => softmax;
    Softmin { axis: i32 = -1 } => softmin;
    Softshrink { lambda: f64 = 0.5 } => softshrink;
    Celu { alpha: f64 = 1.0 } => celu;
    Glu { axis: i32 = -1 } => glu;
    Step { threshold: f64 = 0.0 } => step;
    HardTanh { min: f64 = -1.0, max: f64 = 1.0 } => hard_tanh;
    HardShrink { lambda: f64 = 0.5 } => hard_shrink;
}

/// [`gelu`] as a layer, exact or by one of its approximations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gelu {
    /// [`gelu`]: MLX's `none`.
    #[default]
    Exact,
    /// [`gelu_approx`]: MLX's `tanh` and `precise`.
    Tanh,
    /// [`gelu_fast_approx`]: MLX's `fast`.
    Fast,
}

module!(Gelu {});

impl Layer for Gelu {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        match self {
            Gelu::Exact => gelu(x),
            Gelu::Tanh => gelu_approx(x),
            Gelu::Fast => gelu_fast_approx(x),
        }
    }
}

/// [`prelu`] as a layer.
#[derive(Clone, Debug)]
pub struct PRelu {
    /// The slopes below 0: one, or one per feature.
    pub weight: Parameter,
}

module!(PRelu { weight });

impl PRelu {
    /// MLX's defaults are 1 and 0.25.
    pub fn new(num_parameters: usize, init: f64) -> PRelu {
        PRelu { weight: Array::full(&[num_parameters], init, Dtype::F32).into() }
    }
}

impl Layer for PRelu {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        prelu(x, &self.weight)
    }
}
