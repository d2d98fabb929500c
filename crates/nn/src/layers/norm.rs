//! Normalization: over features, groups, instances and batches.

use std::sync::{Mutex, MutexGuard};

use mica_array::{Array, Dtype, Result, promote};

use super::invalid;
use crate::{Context, Item, ItemMut, Layer, Module, Parameter, Role, join, module};

fn check_eps(op: &'static str, eps: f32) -> Result<()> {
    if eps > 0.0 {
        return Ok(());
    }
    Err(invalid(op, format!("eps must be positive, got {eps}")))
}

fn ones(dims: usize) -> Parameter {
    Array::ones(&[dims], Dtype::F32).into()
}

fn zeros(dims: usize) -> Parameter {
    Array::zeros(&[dims], Dtype::F32).into()
}

/// (x − mean) / √(var + eps) over the last axis, without weights.
fn normalized(x: &Array, eps: f32) -> Result<Array> {
    let width = x.dim(-1);
    x.layer_norm(&Array::ones(&[width], x.dtype()), &Array::zeros(&[width], x.dtype()), eps)
}

/// weight · x + bias, if there is a weight.
fn scaled(x: Array, weight: &Option<Parameter>, bias: &Option<Parameter>) -> Result<Array> {
    match (weight, bias) {
        (Some(weight), Some(bias)) => weight.multiply(x)?.add(bias),
        _ => Ok(x),
    }
}

/// x / rms(x) · weight (Zhang & Sennrich 2019).
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// \[width\]
    pub weight: Parameter,
    /// Added to the mean square.
    pub eps: f32,
}

module!(RmsNorm { weight });

impl RmsNorm {
    /// Ones as weight; MLX's default eps is 1e-5.
    pub fn new(dims: usize, eps: f32) -> Result<RmsNorm> {
        check_eps("RMSNorm", eps)?;
        Ok(RmsNorm { weight: ones(dims), eps })
    }

    /// Of this weight.
    pub fn from_array(weight: Array, eps: f32) -> RmsNorm {
        RmsNorm { weight: weight.into(), eps }
    }
}

/// Over the last axis.
impl Layer for RmsNorm {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        x.astype(promote(x.dtype(), self.weight.dtype()))?.rms_norm(&self.weight, self.eps)
    }
}

/// (x − mean) / √(var + eps) · weight + bias over the last axis (Ba et al. 2016).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// \[width\]
    pub weight: Option<Parameter>,
    /// \[width\]
    pub bias: Option<Parameter>,
    /// Added to the variance.
    pub eps: f32,
}

module!(LayerNorm { weight, bias });

impl LayerNorm {
    /// With a weight if `affine`, and then with a bias if `bias`. MLX's defaults are 1e-5, true, true.
    pub fn new(dims: usize, eps: f32, affine: bool, bias: bool) -> Result<LayerNorm> {
        check_eps("LayerNorm", eps)?;
        Ok(LayerNorm { weight: affine.then(|| ones(dims)), bias: (affine && bias).then(|| zeros(dims)), eps })
    }
}

impl Layer for LayerNorm {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        let Some(weight) = &self.weight else { return normalized(x, self.eps) };
        let x = x.astype(promote(x.dtype(), weight.dtype()))?;
        match &self.bias {
            Some(bias) => x.layer_norm(weight, bias, self.eps),
            None => x.layer_norm(weight, &weight.zeros_like(), self.eps),
        }
    }
}

/// Normalizes each channel of each instance (Ulyanov et al. 2016): [batch, .., channels].
#[derive(Debug, Clone)]
pub struct InstanceNorm {
    /// \[channels\]
    pub weight: Option<Parameter>,
    /// \[channels\]
    pub bias: Option<Parameter>,
    /// Added to the variance.
    pub eps: f32,
}

module!(InstanceNorm { weight, bias });

impl InstanceNorm {
    /// With weight and bias if `affine`; MLX's defaults are 1e-5 and false.
    pub fn new(dims: usize, eps: f32, affine: bool) -> Result<InstanceNorm> {
        check_eps("InstanceNorm", eps)?;
        Ok(InstanceNorm { weight: affine.then(|| ones(dims)), bias: affine.then(|| zeros(dims)), eps })
    }
}

impl Layer for InstanceNorm {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        if x.rank() < 3 {
            let message =
                format!("expected at least 3 dimensions [batch, .., channels], got {:?}", x.shape());
            return Err(invalid("InstanceNorm", message));
        }
        let (batch, channels) = (x.dim(0), x.dim(-1));
        let flat = x.reshape(&[batch as i64, -1, channels as i64])?.swap_axes(1, 2)?;
        let y = normalized(&flat, self.eps)?.swap_axes(1, 2)?;
        scaled(y.reshape(&sizes(x))?, &self.weight, &self.bias)
    }
}

fn sizes(x: &Array) -> Vec<i64> {
    x.shape().iter().map(|&size| size as i64).collect()
}

/// Normalizes groups of channels of each instance (Wu & He 2018): [batch, .., channels].
#[derive(Debug, Clone)]
pub struct GroupNorm {
    /// \[channels\]
    pub weight: Option<Parameter>,
    /// \[channels\]
    pub bias: Option<Parameter>,
    /// Into how many groups the channels go.
    pub num_groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Group g holds channels g · size …, as in PyTorch, instead of every `num_groups`-th.
    pub pytorch_compatible: bool,
}

module!(GroupNorm { bias, weight });

impl GroupNorm {
    /// With weight and bias if `affine`. MLX's defaults are 1e-5, true, false.
    pub fn new(
        num_groups: usize,
        dims: usize,
        eps: f32,
        affine: bool,
        pytorch_compatible: bool,
    ) -> Result<GroupNorm> {
        check_eps("GroupNorm", eps)?;
        if num_groups == 0 || dims == 0 || !dims.is_multiple_of(num_groups) {
            let message = format!("the {dims} features must go evenly into the {num_groups} groups");
            return Err(invalid("GroupNorm", message));
        }
        let (weight, bias) = (affine.then(|| ones(dims)), affine.then(|| zeros(dims)));
        Ok(GroupNorm { weight, bias, num_groups, eps, pytorch_compatible })
    }
}

impl Layer for GroupNorm {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        if x.rank() < 2 || !x.dim(-1).is_multiple_of(self.num_groups) {
            let message = format!(
                "expected [batch, .., channels] with channels for {} groups, got {:?}",
                self.num_groups,
                x.shape()
            );
            return Err(invalid("GroupNorm", message));
        }
        let (batch, groups) = (x.dim(0) as i64, self.num_groups as i64);
        let size = x.dim(-1) as i64 / groups;
        let y = if self.pytorch_compatible {
            let grouped = x.reshape(&[batch, -1, groups, size])?.transpose(&[0, 2, 1, 3])?;
            let shape = sizes(&grouped);
            let y = normalized(&grouped.reshape(&[batch, groups, -1])?, self.eps)?;
            y.reshape(&shape)?.transpose(&[0, 2, 1, 3])?.reshape(&sizes(x))?
        } else {
            let grouped = x.reshape(&[batch, -1, groups])?;
            let centred = grouped.subtract(grouped.mean(&[1], true)?)?;
            let scale = grouped.var(&[1], true, 0)?.add(self.eps)?.rsqrt()?;
            centred.multiply(scale)?.reshape(&sizes(x))?
        };
        scaled(y, &self.weight, &self.bias)
    }
}

/// Normalizes each channel over the batch (Ioffe & Szegedy 2015): [batch, channels],
/// [batch, length, channels] or [batch, height, width, channels].
///
/// A training context makes it use the batch's statistics and move the running ones, which are
/// state of the module: evaluate them with its parameters, or their graph grows.
#[derive(Debug)]
pub struct BatchNorm {
    /// \[channels\]
    pub weight: Option<Parameter>,
    /// \[channels\]
    pub bias: Option<Parameter>,
    /// Added to the variance.
    pub eps: f32,
    /// The share of the batch in the running statistics.
    pub momentum: f32,
    /// Behind a lock, because a forward pass changes them.
    running: Option<Mutex<Running>>,
}

#[derive(Debug, Clone)]
struct Running {
    mean: Parameter,
    var: Parameter,
}

impl BatchNorm {
    /// MLX's defaults are 1e-5, 0.1, true, true.
    pub fn new(
        num_features: usize,
        eps: f32,
        momentum: f32,
        affine: bool,
        track_running_stats: bool,
    ) -> Result<BatchNorm> {
        check_eps("BatchNorm", eps)?;
        let running = || Running {
            mean: Parameter::new(Array::zeros(&[num_features], Dtype::F32), Role::State),
            var: Parameter::new(Array::ones(&[num_features], Dtype::F32), Role::State),
        };
        Ok(BatchNorm {
            weight: affine.then(|| ones(num_features)),
            bias: affine.then(|| zeros(num_features)),
            eps,
            momentum,
            running: track_running_stats.then(|| Mutex::new(running())),
        })
    }
}

fn lock(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    running.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Module for BatchNorm {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        see(name, Item::Module(self));
        self.weight.visit(&join(name, "weight"), see);
        self.bias.visit(&join(name, "bias"), see);
        if let Some(running) = &self.running {
            // A copy, so that whoever looks may run the layer.
            let running = lock(running).clone();
            running.mean.visit(&join(name, "running_mean"), see);
            running.var.visit(&join(name, "running_var"), see);
        }
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        see(name, ItemMut::Module(self));
        self.weight.visit_mut(&join(name, "weight"), see);
        self.bias.visit_mut(&join(name, "bias"), see);
        if let Some(running) = &mut self.running {
            let running = running.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
            running.mean.visit_mut(&join(name, "running_mean"), see);
            running.var.visit_mut(&join(name, "running_var"), see);
        }
    }
}

impl Layer for BatchNorm {
    fn forward(&self, x: &Array, context: &Context) -> Result<Array> {
        if !(2..=4).contains(&x.rank()) {
            let message = format!("expected 2, 3 or 4 dimensions, got {:?}", x.shape());
            return Err(invalid("BatchNorm", message));
        }
        let axes: Vec<i32> = (0..x.rank() as i32 - 1).collect();
        let count: usize = x.shape()[..x.rank() - 1].iter().product();
        if context.is_training() && count <= 1 {
            return Err(invalid("BatchNorm", "training needs more than one value per channel".to_string()));
        }
        let batch = || -> Result<_> { Ok((x.mean(&axes, false)?, x.var(&axes, false, 0)?)) };
        let (mean, var) = match &self.running {
            Some(running) if context.is_training() => {
                let (mean, var) = batch()?;
                let (new, old) = (f64::from(self.momentum), 1.0 - f64::from(self.momentum));
                let mut running = lock(running);
                let next_mean = running.mean.multiply(old)?.add(mean.multiply(new)?)?;
                let next_var = running.var.multiply(old)?.add(x.var(&axes, false, 1)?.multiply(new)?)?;
                running.mean.set(next_mean.stop_gradient()?);
                running.var.set(next_var.stop_gradient()?);
                (mean, var)
            }
            Some(running) => {
                let running = lock(running);
                (running.mean.array().clone(), running.var.array().clone())
            }
            None => batch()?,
        };
        let y = x.subtract(mean)?.multiply(var.add(self.eps)?.rsqrt()?)?;
        scaled(y, &self.weight, &self.bias)
    }
}
