//! Rotary position embeddings: both dialects of their configuration, and the frequencies of every kind.
//!
//! The authority is `transformers`' `modeling_rope_utils.py`, whose arithmetic is followed step by step in f32 (powers
//! are computed in f64 and rounded, which is what a correctly rounded f32 power gives).

use serde_json::Value;

use super::Fields;
use crate::error::{Error, Result};

/// A rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the series is stretched for longer contexts.
    pub kind: RopeKind,
    /// The fraction of each head that is rotated.
    pub partial: f64,
}

/// The kinds of scaling.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeKind {
    /// None.
    Default,
    /// All frequencies divided.
    Linear {
        /// By how much.
        factor: f64,
    },
    /// The base grows with the sequence once it is longer than in training (NTK). Keys of a cache were rotated with
    /// the base of their time and can't follow, so models read no more than the context of training
    /// ([`RopeConfig::reach`]), up to which nothing is changed.
    Dynamic {
        /// How many times longer contexts may become.
        factor: f64,
        /// The context of training.
        max_position: usize,
    },
    /// YaRN: low frequencies divided, high ones kept, a ramp between; attention sharpened.
    Yarn {
        /// How many times longer contexts become.
        factor: f64,
        /// The context of training.
        original_max_position: usize,
        /// Rotations in the training context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// What queries · keys are scaled by, through sine and cosine (each is multiplied by it).
        attention_factor: f64,
    },
    /// A factor per frequency, one list for short contexts and one for long (Phi-3). `transformers` takes the long
    /// list as soon as a sequence is longer than in training; keys of a cache were rotated with the short one by then,
    /// so models read no more than the context of training.
    LongRope {
        /// Divisors up to the original context.
        short: Vec<f64>,
        /// Divisors beyond it.
        long: Vec<f64>,
        /// The context of training.
        original_max_position: usize,
        /// As in YaRN.
        attention_factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth passage between.
    Llama3 {
        /// By how much low frequencies are divided.
        factor: f64,
        /// Where the passage begins, in wavelengths per training context.
        low_freq_factor: f64,
        /// Where it ends.
        high_freq_factor: f64,
        /// The context of training.
        original_max_position: usize,
    },
    /// The series is that of the whole head, and all but its first part is zero (Gemma 4).
    Proportional {
        /// All frequencies are divided by it.
        factor: f64,
    },
}

/// Dimensions of a head that can be rotated: far more than any model has, few enough for a broken file to cost
/// nothing.
const MOST_ROTATED: usize = 65_536;

/// What a rotary embedding multiplies positions with.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFrequencies {
    /// Radians per position, one for each rotated pair `[rotated / 2]`.
    pub inv_freq: Vec<f32>,
    /// Sine and cosine are multiplied by it.
    pub attention_factor: f32,
}

impl RopeConfig {
    /// Plain rotary embeddings of a base.
    pub fn new(theta: f64) -> Self {
        Self { theta, kind: RopeKind::Default, partial: 1.0 }
    }

    /// Reads the rope fields of a configuration in either dialect.
    ///
    /// `default_theta` is the family's base where the file has none. `layer_type` (`full_attention`,
    /// `sliding_attention`) selects among settings given per layer type; files with one setting for all ignore it.
    ///
    /// # Errors
    /// An unknown kind, a missing or impossible value, no settings for the layer type.
    pub fn read(fields: &Fields, default_theta: f64, layer_type: Option<&str>) -> Result<Self> {
        let theta = fields.get_or("rope_theta", default_theta)?;
        let partial = fields.get_or("partial_rotary_factor", 1.0)?;
        let mut given = None;
        for name in ["rope_scaling", "rope_parameters"] {
            given = fields.object(name)?.filter(|given| !given.map().is_empty());
            if given.is_some() {
                break;
            }
        }
        let Some(mut given) = given else {
            return Self { theta, kind: RopeKind::Default, partial }.checked(fields);
        };
        if !given.map().is_empty() && given.map().values().all(|value| value.is_object() || value.is_null()) {
            let (name, map) = layer_type
                .and_then(|wanted| given.map().get_key_value(wanted))
                .and_then(|(name, value)| Some((name, value.as_object()?)))
                .ok_or_else(|| Error::Field {
                    path: fields.path().to_owned(),
                    field: format!("rope_parameters.{}", layer_type.unwrap_or("rope_theta")),
                    expected: "rope settings".into(),
                    got: format!(
                        "settings for {} only",
                        given.map().keys().map(String::as_str).collect::<Vec<_>>().join(", ")
                    ),
                })?;
            given = Fields::within(fields, name, map);
        }
        let theta = given.get_or("rope_theta", theta)?;
        let partial = given.get_or("partial_rotary_factor", partial)?;
        let kind = kind(fields, &given)?;
        Self { theta, kind, partial }.checked(&given)
    }

    /// As models take it that rotate whole heads: `transformers` ignores `partial_rotary_factor` in their plain
    /// embeddings, and fails with it in the scaled kinds.
    ///
    /// # Errors
    /// A scaled kind with a part of the head.
    pub fn of_whole_heads(self, fields: &Fields) -> Result<Self> {
        match self.kind {
            RopeKind::Default => Ok(Self { partial: 1.0, ..self }),
            RopeKind::Proportional { .. } => Ok(self),
            _ if self.partial == 1.0 => Ok(self),
            _ => Err(fields.bad(
                "partial_rotary_factor",
                "1, since models of this family rotate whole heads",
                &self.partial.into(),
            )),
        }
    }

    /// The longest sequence of a model whose `max_position_embeddings` is `stated`, and what bounds it if that is
    /// less than the scaling is made for. Recipes that scale often leave `max_position_embeddings` as it was in
    /// training: then the context is that of training times the factor.
    pub fn reach(&self, stated: usize) -> (usize, Option<&'static str>) {
        let times = |factor: f64, context: usize| ((factor * context as f64) as usize).min(i32::MAX as usize);
        match &self.kind {
            RopeKind::Default | RopeKind::Proportional { .. } => (stated, None),
            RopeKind::Linear { factor } => (times(*factor, stated).max(stated), None),
            RopeKind::Yarn { factor, original_max_position, .. } => {
                (times(*factor, *original_max_position).max(stated), None)
            }
            // Llama 3.2 has a factor of 32 for 16 times the context: what is stated is meant, unless it is the old one.
            RopeKind::Llama3 { original_max_position, .. } if stated > *original_max_position => {
                (stated, None)
            }
            RopeKind::Llama3 { factor, original_max_position, .. } => {
                (times(*factor, *original_max_position).max(stated), None)
            }
            RopeKind::Dynamic { .. } => {
                (stated, Some("dynamic rope is not stretched beyond the context of training"))
            }
            RopeKind::LongRope { original_max_position, .. } => (
                stated.min(*original_max_position),
                Some("the long factors of longrope are not used, so this is the context of training"),
            ),
        }
    }

    fn checked(self, fields: &Fields) -> Result<Self> {
        if self.theta <= 0.0 {
            return Err(fields.bad("rope_theta", "a number above 0", &self.theta.into()));
        }
        if !(self.partial > 0.0 && self.partial <= 1.0) {
            return Err(fields.bad(
                "partial_rotary_factor",
                "a number above 0, at most 1",
                &self.partial.into(),
            ));
        }
        Ok(self)
    }

    /// How many of a head's dimensions are rotated.
    pub fn rotated(&self, head_dim: usize) -> usize {
        match self.kind {
            RopeKind::Proportional { .. } => head_dim,
            _ => (head_dim as f64 * self.partial) as usize,
        }
    }

    /// The frequencies for heads of `head_dim` and sequences of up to `seq_len` positions (which only the dynamic and
    /// long kinds look at).
    ///
    /// # Errors
    /// A head that cannot be rotated, or factors of the wrong number.
    pub fn frequencies(&self, head_dim: usize, seq_len: usize) -> Result<RopeFrequencies> {
        let dim = self.rotated(head_dim);
        if !(2..=MOST_ROTATED).contains(&dim) || dim % 2 == 1 {
            return Err(Error::Unsupported {
                what: format!("config.json: rotating {dim} dimensions of a head of {head_dim}"),
                todo: format!(
                    "head_dim and partial_rotary_factor should come to an even number up to {MOST_ROTATED}"
                ),
            });
        }
        let plain = |theta: f64| -> Vec<f32> { powers(theta, dim, dim).map(|power| 1.0 / power).collect() };
        let mut attention_factor = 1.0;
        let inv_freq = match &self.kind {
            RopeKind::Default => plain(self.theta),
            RopeKind::Linear { factor } => {
                plain(self.theta).into_iter().map(|f| f / *factor as f32).collect()
            }
            RopeKind::Dynamic { factor, max_position } => {
                let max = *max_position as f64;
                let stretch = factor * (seq_len as f64).max(max) / max - (factor - 1.0);
                plain(self.theta * stretch.powf(dim as f64 / (dim as f64 - 2.0)))
            }
            RopeKind::Yarn {
                factor,
                original_max_position,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor: given,
            } => {
                attention_factor = *given;
                self.yarn(dim, *factor, *original_max_position, *beta_fast, *beta_slow, *truncate)
            }
            RopeKind::LongRope { short, long, original_max_position, attention_factor: given } => {
                attention_factor = *given;
                let factors = if seq_len > *original_max_position { long } else { short };
                if factors.len() != dim / 2 {
                    return Err(Error::Unsupported {
                        what: format!("config.json: {} long or short rope factors", factors.len()),
                        todo: format!("{dim} rotated dimensions have {}", dim / 2),
                    });
                }
                powers(self.theta, dim, dim)
                    .zip(factors)
                    .map(|(power, f)| 1.0 / (*f as f32 * power))
                    .collect()
            }
            RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let context = *original_max_position as f64;
                let (low, high) = (*low_freq_factor as f32, *high_freq_factor as f32);
                let factor = *factor as f32;
                let low_wavelength = (context / low_freq_factor) as f32;
                let high_wavelength = (context / high_freq_factor) as f32;
                plain(self.theta)
                    .into_iter()
                    .map(|f| {
                        let wavelength = (2.0 * std::f64::consts::PI) as f32 / f;
                        if wavelength > low_wavelength {
                            f / factor
                        } else if wavelength < high_wavelength {
                            f
                        } else {
                            let smooth = (context as f32 / wavelength - low) / (high - low);
                            (1.0 - smooth) * f / factor + smooth * f
                        }
                    })
                    .collect()
            }
            RopeKind::Proportional { factor } => {
                let angles = (self.partial * head_dim as f64 / 2.0).floor() as usize;
                let mut rotated: Vec<f32> = powers(self.theta, 2 * angles, head_dim)
                    .map(|power| 1.0 / power / *factor as f32)
                    .collect();
                rotated.resize(head_dim / 2, 0.0);
                rotated
            }
        };
        let attention_factor = attention_factor as f32;
        if !attention_factor.is_finite() || inv_freq.iter().any(|frequency| !frequency.is_finite()) {
            return Err(Error::Unsupported {
                what: format!(
                    "config.json: rope settings with a frequency that is no number ({:?})",
                    self.kind
                ),
                todo: "check rope_theta and rope_scaling".into(),
            });
        }
        Ok(RopeFrequencies { inv_freq, attention_factor })
    }

    fn yarn(
        &self,
        dim: usize,
        factor: f64,
        context: usize,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
    ) -> Vec<f32> {
        let correction = |rotations: f64| {
            dim as f64 * (context as f64 / (rotations * 2.0 * std::f64::consts::PI)).ln()
                / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        powers(self.theta, dim, dim)
            .enumerate()
            .map(|(i, power)| {
                let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let keep = 1.0 - ramp;
                let (kept, divided) = (1.0 / power, 1.0 / (factor as f32 * power));
                divided * (1.0 - keep) + kept * keep
            })
            .collect()
    }
}

/// theta^(i/of) for i = 0, 2, … below `count`, in f32.
fn powers(theta: f64, count: usize, of: usize) -> impl Iterator<Item = f32> {
    let theta = f64::from(theta as f32);
    (0..count).step_by(2).map(move |i| theta.powf(f64::from(i as f32 / of as f32)) as f32)
}

/// The kind that an object of settings names; `fields` is the whole configuration.
fn kind(fields: &Fields, given: &Fields) -> Result<RopeKind> {
    let name = given.first_of::<String>(&["rope_type", "type"])?.unwrap_or_else(|| "default".into());
    let positive = |field: &str| -> Result<f64> {
        let value = given.get::<f64>(field)?;
        if value > 0.0 { Ok(value) } else { Err(given.bad(field, "a number above 0", &value.into())) }
    };
    let max_position = || -> Result<usize> {
        match fields.get::<usize>("max_position_embeddings")? {
            0 => Err(fields.bad("max_position_embeddings", "a number above 0", &0.into())),
            max => Ok(max),
        }
    };
    // Phi-3 has the original context beside the rope settings, and there it comes first.
    let original = || -> Result<usize> {
        let name = "original_max_position_embeddings";
        match fields.opt::<usize>(name)?.or(given.opt::<usize>(name)?) {
            Some(0) => Err(given.bad(name, "a number above 0", &0.into())),
            Some(original) => Ok(original),
            None => max_position(),
        }
    };
    let factor_or_ratio = || -> Result<f64> {
        if given.has("factor") { positive("factor") } else { Ok(max_position()? as f64 / original()? as f64) }
    };
    Ok(match name.as_str() {
        // Sections for text, height and width differ for images only; text has the same position in all three.
        "default" | "mrope" => RopeKind::Default,
        "linear" => RopeKind::Linear { factor: positive("factor")? },
        "dynamic" => RopeKind::Dynamic { factor: positive("factor")?, max_position: max_position()? },
        "yarn" => {
            let factor = factor_or_ratio()?;
            let scale = |scale: f64, by: f64| if scale <= 1.0 { 1.0 } else { 0.1 * by * scale.ln() + 1.0 };
            let nonzero =
                |name: &str| given.opt::<f64>(name).map(|value| value.filter(|value| *value != 0.0));
            let attention_factor =
                match (given.opt::<f64>("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?)
                {
                    (Some(given), ..) => given,
                    (None, Some(one), Some(all)) => scale(factor, one) / scale(factor, all),
                    _ => scale(factor, 1.0),
                };
            RopeKind::Yarn {
                factor,
                original_max_position: original()?,
                beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                truncate: given.get_or("truncate", true)?,
                attention_factor,
            }
        }
        "longrope" | "su" => {
            let original_max_position = original()?;
            let factor = factor_or_ratio()?;
            let attention_factor = match given.opt::<f64>("attention_factor")? {
                Some(given) => given,
                None if factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / (original_max_position as f64).ln()).sqrt(),
            };
            RopeKind::LongRope {
                short: given.get("short_factor")?,
                long: given.get("long_factor")?,
                original_max_position,
                attention_factor,
            }
        }
        "llama3" => {
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            if low >= high {
                return Err(given.bad("high_freq_factor", "more than low_freq_factor", &high.into()));
            }
            RopeKind::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position: original()?,
            }
        }
        "proportional" => RopeKind::Proportional { factor: given.get_or("factor", 1.0)? },
        _ => {
            return Err(given.bad(
                "rope_type",
                "default, linear, dynamic, yarn, longrope, llama3 or proportional",
                &Value::String(name),
            ));
        }
    })
}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;
