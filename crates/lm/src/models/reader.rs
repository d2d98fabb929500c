//! Reading a family's fields from a configuration.

use serde_json::Value;

use crate::config::{Fields, ModelConfig, RopeConfig};
use crate::{Error, Result};

/// The fields of a language model, with the checks that sizes need.
pub(super) struct Reader<'a>(Fields<'a>);

impl<'a> Reader<'a> {
    pub(super) fn new(config: &'a ModelConfig) -> Result<Reader<'a>> {
        Ok(Reader(config.text_fields()?))
    }

    /// The fields themselves.
    pub(super) fn fields(&self) -> &Fields<'a> {
        &self.0
    }

    /// A size that must be there.
    pub(super) fn size(&self, name: &str) -> Result<usize> {
        self.checked(name, self.0.get(name)?)
    }

    /// A size with a default.
    pub(super) fn size_or(&self, name: &str, default: usize) -> Result<usize> {
        self.checked(name, self.0.get_or(name, default)?)
    }

    /// A size that may be absent or null.
    pub(super) fn size_option(&self, name: &str) -> Result<Option<usize>> {
        self.0.opt(name)?.map(|size| self.checked(name, size)).transpose()
    }

    /// Sizes past 2³¹ come from broken files, and would overflow in products. Blocks and heads are bounded
    /// further, because memory is taken for them before a tensor shows that there are no such many.
    fn checked(&self, name: &str, size: usize) -> Result<usize> {
        let most = match name {
            "num_hidden_layers" => 10_000,
            "head_dim" => 65_536,
            _ => i32::MAX as usize,
        };
        if (1..=most).contains(&size) {
            Ok(size)
        } else {
            Err(self.0.bad(name, &format!("a number from 1 to {most}"), &size.into()))
        }
    }

    /// The number that norms add to a mean square, which must not become negative.
    pub(super) fn eps(&self, name: &str, default: f64) -> Result<f32> {
        let eps = self.0.get_or::<f64>(name, default)?;
        if (0.0..=1.0).contains(&eps) {
            Ok(eps as f32)
        } else {
            Err(self.0.bad(name, "a number from 0 to 1", &eps.into()))
        }
    }

    /// `whole / part`, which must come out even.
    pub(super) fn quotient(&self, whole: (&str, usize), part: (&str, usize)) -> Result<usize> {
        if whole.1.is_multiple_of(part.1) {
            Ok(whole.1 / part.1)
        } else {
            Err(self.0.bad(whole.0, &format!("a multiple of {} ({})", part.0, part.1), &whole.1.into()))
        }
    }

    pub(super) fn wrong(&self, name: &str, expected: &str, got: &str) -> Error {
        self.0.bad(name, expected, &Value::from(got))
    }

    /// The rotary embedding, of whole heads in all families that there are.
    pub(super) fn rope(&self, default_theta: f64) -> Result<RopeConfig> {
        RopeConfig::read(&self.0, default_theta, None)?.of_whole_heads(&self.0)
    }
}
