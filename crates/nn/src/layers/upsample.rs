//! Resizing of the spatial axes: [batch, spatial.., channels].

use mica_array::{Array, Result};

use super::invalid;
use crate::{Context, Layer, module};

/// How values between the given ones are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Interpolation {
    /// That of the nearest.
    #[default]
    Nearest,
    /// On the line between the two nearest.
    Linear,
    /// On a cubic through the four nearest.
    Cubic,
}

/// Makes images larger, or smaller.
#[derive(Clone, Debug)]
pub struct Upsample {
    scale_factor: Vec<f64>,
    mode: Interpolation,
    align_corners: bool,
    antialias: bool,
}

module!(Upsample {});

/// A source place and its share, per target place of an axis.
struct Tap {
    index: Vec<u32>,
    weight: Vec<f32>,
}

impl Upsample {
    /// `scale_factor` holds one factor per spatial axis, or one for all. `align_corners` keeps the
    /// outermost values at the edges; `antialias` widens the kernel when making smaller. Both are
    /// for linear and cubic interpolation, and off in MLX's defaults.
    pub fn new(
        scale_factor: &[f64],
        mode: Interpolation,
        align_corners: bool,
        antialias: bool,
    ) -> Result<Upsample> {
        if scale_factor.is_empty() || scale_factor.iter().any(|scale| !(*scale > 0.0 && scale.is_finite())) {
            let message = format!("expected positive factors, got {scale_factor:?}");
            return Err(invalid("Upsample", message));
        }
        if antialias && (mode == Interpolation::Nearest || align_corners) {
            let message = "antialias is for linear and cubic interpolation without align_corners";
            return Err(invalid("Upsample", message.to_string()));
        }
        Ok(Upsample { scale_factor: scale_factor.to_vec(), mode, align_corners, antialias })
    }

    fn taps(&self, size: usize, scale: f64) -> Vec<Tap> {
        let count = (scale * size as f64) as usize;
        match (self.mode, self.antialias) {
            (Interpolation::Nearest, _) => {
                vec![Tap { index: nearest(size, count), weight: vec![1.0; count] }]
            }
            (Interpolation::Linear, false) => linear(size, &self.places(size, count, scale)),
            (Interpolation::Cubic, false) => cubic(size, &self.places(size, count, scale)),
            (Interpolation::Linear, true) => {
                smooth(size, &self.places(size, count, scale), scale, 1.0, |x| (1.0 - x).max(0.0))
            }
            (Interpolation::Cubic, true) => {
                smooth(size, &self.places(size, count, scale), scale, 2.0, |x| match x {
                    _ if x <= 1.0 => inner_cubic(x, -0.5),
                    _ if x <= 2.0 => outer_cubic(x, -0.5),
                    _ => 0.0,
                })
            }
        }
    }

    /// Where each of `count` target values stands among the source values.
    fn places(&self, size: usize, count: usize, scale: f64) -> Vec<f32> {
        if self.align_corners {
            let step = (size as f64 - 1.0) / (count as f64 - 1.0).max(1.0);
            return (0..count).map(|i| i as f32 * step as f32).collect();
        }
        let step = 1.0 / scale;
        let start = ((count as f64 - 1.0) * step - size as f64 + 1.0) / 2.0;
        (0..count).map(|i| i as f32 * step as f32 - start as f32).collect()
    }
}

impl Layer for Upsample {
    fn forward(&self, x: &Array, _: &Context) -> Result<Array> {
        let axes = x.rank().saturating_sub(2);
        let factors = match self.scale_factor.len() {
            1 if axes > 0 => vec![self.scale_factor[0]; axes],
            count if count == axes => self.scale_factor.clone(),
            count => {
                let message =
                    format!("expected {count} spatial axes between batch and channels, got {:?}", x.shape());
                return Err(invalid("Upsample", message));
            }
        };
        let mut x = x.clone();
        for (axis, scale) in factors.into_iter().enumerate() {
            let axis = axis + 1;
            let taps = self.taps(x.shape()[axis], scale);
            x = if self.mode == Interpolation::Nearest {
                x.take(&indices(&taps[0])?, axis as i32)?
            } else {
                blend(&x, &taps, axis)?
            };
        }
        Ok(x)
    }
}

fn indices(tap: &Tap) -> Result<Array> {
    Array::from_slice(&tap.index, &[tap.index.len()])
}

/// Σ of the taps' values times their shares.
fn blend(x: &Array, taps: &[Tap], axis: usize) -> Result<Array> {
    let mut shape = vec![1; x.rank()];
    let mut sum: Option<Array> = None;
    for tap in taps {
        shape[axis] = tap.weight.len();
        let weight = Array::from_slice(&tap.weight, &shape)?;
        let part = x.take(&indices(tap)?, axis as i32)?.multiply(weight)?;
        sum = Some(match sum {
            Some(sum) => sum.add(part)?,
            None => part,
        });
    }
    sum.ok_or_else(|| invalid("Upsample", "an interpolation without values".to_string()))
}

fn nearest(size: usize, count: usize) -> Vec<u32> {
    let step = (size as f64 / count as f64) as f32;
    (0..count)
        .map(|i| {
            let place = i as f32;
            let place =
                if count > size { ((place + 0.5) * step - 0.5).round_ties_even() } else { place * step };
            place.clamp(0.0, size as f32 - 1.0) as u32
        })
        .collect()
}

fn clamped(place: f32, size: usize) -> u32 {
    place.clamp(0.0, size as f32 - 1.0) as u32
}

fn linear(size: usize, places: &[f32]) -> Vec<Tap> {
    let places: Vec<f32> = places.iter().map(|place| place.clamp(0.0, size as f32 - 1.0)).collect();
    let share: Vec<f32> = places.iter().map(|place| place - place.floor()).collect();
    vec![
        Tap {
            index: places.iter().map(|place| place.floor() as u32).collect(),
            weight: share.iter().map(|share| 1.0 - share).collect(),
        },
        Tap { index: places.iter().map(|place| place.ceil() as u32).collect(), weight: share },
    ]
}

fn inner_cubic(x: f32, a: f32) -> f32 {
    ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
}

fn outer_cubic(x: f32, a: f32) -> f32 {
    (((x - 5.0) * x + 8.0) * x - 4.0) * a
}

fn cubic(size: usize, places: &[f32]) -> Vec<Tap> {
    const A: f32 = -0.75;
    let tap = |of: &dyn Fn(f32) -> f32, kernel: &dyn Fn(f32, f32) -> f32| Tap {
        index: places.iter().map(|&place| clamped(of(place), size)).collect(),
        weight: places.iter().map(|&place| kernel((place - of(place)).abs(), A)).collect(),
    };
    vec![
        tap(&|place| place.floor(), &inner_cubic),
        tap(&|place| (place + 1.0).floor(), &inner_cubic),
        tap(&|place| place.floor() - 1.0, &outer_cubic),
        tap(&|place| (place + 1.0).floor() + 1.0, &outer_cubic),
    ]
}

/// A kernel as wide as the step between target values, its shares adding up to one.
fn smooth(size: usize, places: &[f32], scale: f64, radius: f64, kernel: impl Fn(f32) -> f32) -> Vec<Tap> {
    let wide = if scale < 1.0 { 1.0 / scale } else { 1.0 };
    let reach = (radius * wide).ceil() as i64 + 1;
    let mut taps: Vec<Tap> = (1 - reach..reach)
        .map(|offset| {
            let places = || places.iter().map(|&place| (place, place.floor() + offset as f32));
            let inside = |index: f32| index >= 0.0 && index < size as f32;
            Tap {
                index: places().map(|(_, index)| clamped(index, size)).collect(),
                weight: places()
                    .map(
                        |(place, index)| {
                            if inside(index) { kernel((place - index).abs() / wide as f32) } else { 0.0 }
                        },
                    )
                    .collect(),
            }
        })
        .collect();
    for at in 0..places.len() {
        let sum: f32 = taps.iter().map(|tap| tap.weight[at]).sum();
        let sum = if sum > 0.0 { sum } else { 1.0 };
        for tap in &mut taps {
            tap.weight[at] /= sum;
        }
    }
    taps
}
