//! Model families: one file each, and the table that finds them by `model_type`.

mod lfm2;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod reader;

use std::ops::Range;

use mica_array::kv::KvFormat;
use mica_array::{Array, transforms};
use mica_nn::{Context, Linear, Module};

use self::reader::Reader;
use crate::cache::Cache;
use crate::config::ModelConfig;
use crate::weights::Source;
use crate::{Error, Result};

/// A causal language model.
pub trait LanguageModel: Send + Sync + std::fmt::Debug {
    /// Its sizes.
    fn info(&self) -> &ModelInfo;

    /// The normed states before the output head: [batch, length, hidden] f32, or [batch, 1, hidden] if the input asks
    /// for the last position alone.
    fn hidden(
        &self,
        input: &Input,
        cache: Option<&mut Cache>,
        context: &Context,
    ) -> mica_array::Result<Array>;

    /// The output head [vocabulary, hidden], plain or packed; the embedding itself if it is tied.
    fn head(&self) -> &Array;

    /// An empty memory for `batch` sequences that keeps keys and values in this format.
    fn new_cache(&self, batch: usize, format: KvFormat) -> Cache;

    /// How many blocks there are.
    fn layers(&self) -> usize;

    /// The linear layers of a block, by their path below it, as `self_attn.q_proj`.
    fn linears(&mut self, layer: usize) -> Vec<(String, &mut Linear)>;

    /// The parameter tree.
    fn as_module(&self) -> &dyn Module;

    /// The parameter tree.
    fn as_module_mut(&mut self) -> &mut dyn Module;

    /// Logits [batch, length, vocabulary] f32.
    fn logits(
        &self,
        input: &Input,
        cache: Option<&mut Cache>,
        context: &Context,
    ) -> mica_array::Result<Array> {
        self.hidden(input, cache, context)?.linear(self.head(), None, context.precision)
    }
}

/// Sizes that everybody who holds a model needs.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// `model_type` of the configuration.
    pub family: &'static str,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Key and value heads per layer.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The longest sequence that the model was made for, its rope scaling included.
    pub max_positions: usize,
    /// What bounds it, where that is less than the configuration promises.
    pub positions_note: Option<&'static str>,
    /// The output head is the embedding (unless the file has another one).
    pub tied: bool,
}

/// What a forward pass reads.
#[derive(Debug, Clone)]
pub struct Input {
    /// [batch, length] i32
    pub tokens: Array,
    /// Position of each token in its own sequence: [batch, length] i32.
    pub positions: Array,
    /// Packed rows: index of the first token of each token's own sequence, [batch, length] i32.
    pub key_start: Option<Array>,
    /// Blocks that are computed again in the backward pass instead of keeping what it needs of them.
    pub checkpoint: Range<usize>,
    /// Of the states after the last block, those that are asked for: it computes no more of them than it must.
    pub asked: Asked,
}

/// The positions whose states are asked for.
#[derive(Debug, Clone, Default)]
pub enum Asked {
    /// All: [batch, length, ..].
    #[default]
    All,
    /// The last one of each row: [batch, 1, ..].
    Last,
    /// These, counted through all rows of the batch, \[n\] i32: [1, n, ..].
    These(Array),
}

impl Asked {
    /// Of states [batch, length, ..], those that are asked for.
    pub(crate) fn of(&self, states: &Array) -> mica_array::Result<Array> {
        let length = states.dim(1);
        match self {
            Asked::Last if length > 1 => states.narrow(1, length - 1, length),
            Asked::All | Asked::Last => Ok(states.clone()),
            Asked::These(positions) => states.flatten_axes(0, 1)?.take(positions, 0)?.expand_dims(&[0]),
        }
    }
}

impl Input {
    /// Rows of equal length that continue at these positions.
    ///
    /// # Panics
    /// If rows differ in length or in number from `starts`: a mistake in the calling program.
    pub fn new(rows: &[&[u32]], starts: &[usize]) -> mica_array::Result<Input> {
        let length = rows.first().map_or(0, |row| row.len());
        assert!(
            rows.len() == starts.len() && rows.iter().all(|row| row.len() == length),
            "rows of equal length"
        );
        let tokens: Vec<i32> = rows.iter().flat_map(|row| row.iter().map(|&token| token as i32)).collect();
        let positions: Vec<i32> =
            starts.iter().flat_map(|&start| (start..start + length).map(|p| p as i32)).collect();
        let shape = [rows.len(), length];
        Ok(Input {
            tokens: Array::from_slice(&tokens, &shape)?,
            positions: Array::from_slice(&positions, &shape)?,
            key_start: None,
            checkpoint: 0..0,
            asked: Asked::All,
        })
    }

    /// The same with all positions asked for: what blocks before the last one take.
    pub(crate) fn of_all(&self) -> Input {
        Input { asked: Asked::All, ..self.clone() }
    }

    /// Runs the block with this index, checkpointed if asked for.
    pub(crate) fn layer(
        &self,
        index: usize,
        x: Array,
        cache: Option<&mut Cache>,
        block: impl FnOnce(&Array, Option<&mut Cache>) -> mica_array::Result<Array>,
    ) -> mica_array::Result<Array> {
        if !self.checkpoint.contains(&index) || cache.is_some() {
            return block(&x, cache);
        }
        let mut outputs = transforms::checkpoint(|inputs| Ok(vec![block(&inputs[0], None)?]), &[x])?;
        Ok(outputs.pop().expect("one output was given"))
    }
}

type Build = fn(&Reader, &mut dyn Source) -> Result<Box<dyn LanguageModel>>;

/// Families by `model_type`. A new one is a file and a line here.
const FAMILIES: &[(&str, Build)] = &[
    ("llama", llama::build),
    ("mistral", mistral::build),
    ("qwen2", qwen2::build),
    ("qwen3", qwen3::build),
    ("lfm2", lfm2::build),
];

/// The `model_type`s that can be opened.
pub fn families() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// Whether a configuration is of a family that can be opened.
///
/// # Errors
/// If it is not, with those that can.
pub fn check_family(config: &ModelConfig) -> Result<()> {
    builder(config).map(|_| ())
}

/// The longest sequence that a model was made for, its rope scaling included, if its configuration says so.
///
/// # Errors
/// A wrong field.
pub fn max_positions(config: &ModelConfig) -> Result<Option<usize>> {
    let reader = Reader::new(config)?;
    let stated = reader.size_option("max_position_embeddings")?;
    // The base of the wavelengths has no part in it.
    stated.map(|stated| Ok(reader.rope(10_000.0)?.reach(stated).0)).transpose()
}

fn builder(config: &ModelConfig) -> Result<Build> {
    let name = config.model_type.as_str();
    match FAMILIES.iter().find(|(family, _)| *family == name) {
        Some((_, build)) => Ok(*build),
        None => Err(Error::Unsupported {
            what: format!("{}: the architecture {name:?}", config.path().display()),
            todo: format!("model_type can be one of {}", families().collect::<Vec<_>>().join(", ")),
        }),
    }
}

/// Builds the model that a configuration describes, with parameters from a source.
///
/// # Errors
/// If the family is unknown, a field is wrong, or a parameter is missing or misshapen.
pub fn build(config: &ModelConfig, source: &mut dyn Source) -> Result<Box<dyn LanguageModel>> {
    builder(config)?(&Reader::new(config)?, source)
}
