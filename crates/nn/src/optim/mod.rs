//! Optimizers: from parameters and gradients to parameters.
//!
//! A [`Rule`] is the arithmetic of one parameter's step: [`Sgd`], [`Adam`] and so on hold its
//! settings and have MLX's defaults. A [`Stepper`] applies it to named parameters, at a [`Rate`]
//! that may follow a [`Schedule`], and owns its state, which it hands out and takes back as named
//! arrays for checkpoints. [`MultiOptimizer`] has several for different parameters.
//!
//! ```
//! use mica_array::{Array, Dtype};
//! use mica_nn::optim::{Adam, Optimizer, Schedule, Stepper};
//! use mica_nn::{Context, Keys, Layer, Linear, losses::{Reduction, mse_loss}, value_and_grad};
//!
//! let mut model = Linear::new(2, 1, true, &mut Keys::new(0)?)?;
//! let mut optimizer = Stepper::new(Schedule::cosine_decay(0.1, 100, 0.0)?, Adam::default())?;
//! let (x, y) = (Array::ones(&[8, 2], Dtype::F32), Array::full(&[8, 1], 3.0, Dtype::F32));
//! for _ in 0..100 {
//!     let (_, grads) = value_and_grad(&mut model, |model| {
//!         mse_loss(&model.forward(&x, &Context::default())?, &y, Reduction::Mean)
//!     })?;
//!     optimizer.update(&mut model, &grads)?;
//! }
//! let y = model.forward(&x, &Context::default())?.narrow(0, 0, 1)?.item::<f32>()?;
//! assert!((y - 3.0).abs() < 0.1);
//! # Ok::<(), mica_array::Error>(())
//! ```

mod adafactor;
mod clip;
mod fused;
mod multi;
mod muon;
mod rules;
mod schedule;
mod stepper;

pub use adafactor::Adafactor;
pub use clip::{clip_grad_norm, global_norm};
pub use fused::{AdamWConfig, FusedAdamW};
pub use multi::{Filter, MultiOptimizer};
pub use muon::Muon;
pub use rules::{AdaDelta, Adagrad, Adam, AdamW, Adamax, Lion, RmsProp, Sgd};
pub use schedule::{Rate, Schedule};
pub use stepper::{At, Optimizer, Rule, Slots, Stepper};
